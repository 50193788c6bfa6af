"""Estimators of the value guidance on a 2-D problem with a known answer (RSM, arXiv 2604.17415, Section 5.1).

    python benchmarks/estimators.py                       # the table and the figure of docs/estimators.md; minutes
    python benchmarks/estimators.py --draws 64 --points 8 --replicates 2 --out /tmp/trial.json

The data are a mixture of three unit Gaussians and the reward is linear, so that the tilted p* ~ p exp(r / beta) is
such a mixture too, and every score, value and value gradient is known.  The samplers' steps are common.make_grid's.
Each estimator of the guidance Psi* = S* - S_ref at x_t ~ p*_t gets `--draws` roll-outs under p* per state; its error
is taken to Psi* (the gradient of the soft value) and to the gradient of the hard value E[r(x_0) | x_t], which is what
a roll-out with the final reward estimates.  Errors are root mean squares over states, coordinates and repetitions.
Writes --out and a picture beside it, and prints the tables.
"""

import argparse
import json
import math
import platform
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import common  # noqa: E402

F64 = torch.float64
ROOT3 = math.sqrt(3)
MEANS = torch.tensor([[3, -ROOT3], [-3, -ROOT3], [0, 2 * ROOT3]], dtype=F64)
C, R0 = torch.tensor([-0.5, 0.0], dtype=F64), 3.0  # r(x) = C x + R0
SAMPLERS = {  # path, kernel of common.make_grid, noise level
    "vp": ("eps", "ancestral", 1.0),  # DDIM with eta = 1
    "flow-memoryless": ("flow", "flow_sde", math.sqrt(2)),
    "flow-sde": ("flow", "flow_sde", 0.7),  # Flow-GRPO's noise level
}
ESTIMATORS = {  # label, colour, dash
    "zo_full_raw": ("0th order, full roll-out, r as it is", "#9e9e9e", "-"),
    "zo_full": ("0th order, full roll-out, centred", "#d62728", "-"),
    "zo_half": ("0th order, half roll-out, centred", "#ff7f0e", "-"),
    "zo_one": ("0th order, one step, centred", "#bcbd22", "-"),
    "zo_ode": ("0th order, this step SDE and the rest ODE, centred", "#8c564b", "-"),
    "zo_entropy": ("0th order, full, entropy-augmented, centred", "#1f77b4", "-"),
    "fo_one": ("1st order, one step", "#2ca02c", "--"),
    "fo_full": ("1st order, full, through the whole chain", "#e377c2", "--"),
    "fo_current": ("1st order, current state", "#17becf", ":"),
    "terminal": ("gradient at the final sample", "#000000", ":"),
}


# ---- closed forms: x_t = alpha x_0 + nu eps, any (alpha, nu) --------------------------------------------------------
@dataclass(frozen=True)
class Mixture:
    """Unit-covariance Gaussians at means (K, d) with weights (K,)."""

    means: torch.Tensor
    weights: torch.Tensor

    def sample(self, n: int, alpha, nu, generator) -> torch.Tensor:
        """n draws of x_t, (n, d)."""
        k = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        noise = torch.randn((n, self.means.shape[1]), generator=generator, dtype=F64)
        return alpha * self.means[k] + math.sqrt(alpha**2 + nu**2) * noise


REF = Mixture(MEANS, torch.full((3,), 1 / 3, dtype=F64))


def tilt(ref: Mixture, c=C, beta: float = 1.0) -> Mixture:
    """p* ~ p exp(c x / beta): the means move by c / beta, the weights by E_k[exp(c x / beta)]."""
    return Mixture(ref.means + c / beta, (ref.weights.log() + ref.means @ c / beta).softmax(0))


def responsibilities(mix: Mixture, x, alpha, nu) -> torch.Tensor:
    """p(k | x_t), (N, K)."""
    var = alpha**2 + nu**2
    return (mix.weights.log() + (alpha * x @ mix.means.T - alpha**2 * (mix.means**2).sum(1) / 2) / var).softmax(-1)


def log_density(mix: Mixture, x, alpha, nu) -> torch.Tensor:
    """log p_t(x), (N,)."""
    var = alpha**2 + nu**2
    distance = ((x[:, None] - alpha * mix.means) ** 2).sum(-1)
    norm = 0.5 * x.shape[-1] * math.log(2 * math.pi * var)
    return (mix.weights.log() - distance / (2 * var)).logsumexp(-1) - norm


def score(mix: Mixture, x, alpha, nu) -> torch.Tensor:
    """S(x, t), (N, d)."""
    return -(x - alpha * responsibilities(mix, x, alpha, nu) @ mix.means) / (alpha**2 + nu**2)


def x0_hat(mix: Mixture, x, alpha, nu) -> torch.Tensor:
    """E[x_0 | x_t], (N, d): Tweedie's (x + nu^2 S) / alpha, without its division by 0 at alpha = 0."""
    return (nu**2 * responsibilities(mix, x, alpha, nu) @ mix.means + alpha * x) / (alpha**2 + nu**2)


def mean_covariance(mix: Mixture, x, alpha, nu) -> torch.Tensor:
    """Covariance of the component's mean given x_t, (N, d, d)."""
    d = mix.means.shape[1]
    g = responsibilities(mix, x, alpha, nu)
    mean = g @ mix.means
    second = g @ (mix.means[:, :, None] * mix.means[:, None]).flatten(1)
    return second.view(-1, d, d) - mean[:, :, None] * mean[:, None]


def x0_jacobian(mix: Mixture, x, alpha, nu) -> torch.Tensor:
    """d x0_hat / d x_t, (N, d, d), symmetric: (I + nu^2 H) / alpha with H the Hessian of log p_t."""
    var = alpha**2 + nu**2
    eye = torch.eye(x.shape[-1], dtype=x.dtype)
    return (alpha * nu**2 / var**2) * mean_covariance(mix, x, alpha, nu) + alpha / var * eye


def reward(x0) -> torch.Tensor:
    return x0 @ C + R0


def hard_value(mix: Mixture, x, alpha, nu) -> torch.Tensor:
    """E[r(x_0) | x_t] of the policy with mix's scores and memoryless noise, (N,): the reward is linear."""
    return reward(x0_hat(mix, x, alpha, nu))


def hard_gradient(mix: Mixture, x, alpha, nu) -> torch.Tensor:
    """Gradient of hard_value, (N, d)."""
    return x0_jacobian(mix, x, alpha, nu) @ C


def reward_variance(mix: Mixture, x, alpha, nu) -> torch.Tensor:
    """Var(r(x_0) | x_t), (N,)."""
    shrink = nu**2 / (alpha**2 + nu**2)
    return shrink * C @ C + shrink**2 * (mean_covariance(mix, x, alpha, nu) @ C) @ C


def soft_value(ref: Mixture, x, alpha, nu, beta: float = 1.0) -> torch.Tensor:
    """V_t(x) = beta log E_ref[exp(r(x_0) / beta) | x_t = x], (N,); Eq. 7."""
    shrink = nu**2 / (alpha**2 + nu**2)
    mean = shrink * ref.means + (alpha / (alpha**2 + nu**2) * x)[:, None]  # of x_0 given x_t and the component
    exponent = mean @ C / beta + 0.5 * shrink * (C @ C) / beta**2
    return beta * (responsibilities(ref, x, alpha, nu).log() + exponent).logsumexp(-1) + R0


def psi_star(ref: Mixture, x, alpha, nu, beta: float = 1.0) -> torch.Tensor:
    """Optimal guidance S* - S_ref = grad V_soft / beta, (N, d); Eq. 8."""
    return score(tilt(ref, C, beta), x, alpha, nu) - score(ref, x, alpha, nu)


# ---- samplers -------------------------------------------------------------------------------------------------------
def make_grid(path: str, kernel: str, level: float, steps: int) -> common.Grid:
    """VP: 500 training steps, betas linear in 1e-4..0.03, each (500/steps)-th index, the last step deterministic.
    Flow: rectified flow with SD3.5's shift 3."""
    scheduler = SimpleNamespace(set_timesteps=lambda steps: None)
    if path == "eps":
        every = 500 // steps
        scheduler.timesteps = torch.arange(499, -1, -every)[:steps]
        scheduler.alphas_cumprod = (1 - torch.linspace(1e-4, 0.03, 500, dtype=F64)).cumprod(0)
        scheduler.final_alpha_cumprod = torch.tensor(1.0, dtype=F64)
        scheduler.config = SimpleNamespace(num_train_timesteps=every * steps)
    else:
        u = torch.linspace(1, 0, steps + 1, dtype=F64)
        scheduler.sigmas = 3 * u / (1 + 2 * u)
        scheduler.timesteps = 1000 * scheduler.sigmas[:-1]
    return common.make_grid(scheduler, path, steps, kernel, level)


def level(grid: common.Grid, i: int) -> tuple[float, float]:
    """(alpha, nu) of the state that step i leaves; i = steps: of the final sample."""
    if i == grid.steps:
        return grid.alpha_s[-1].item(), grid.nu_s[-1].item()
    return grid.alpha[i].item(), grid.nu[i].item()


def output(mix: Mixture, grid: common.Grid, x, i: int, jacobian: bool = False):
    """The network's output o at step i with mix's exact score: noise (VP) or velocity (flow); and do / dx."""
    alpha, nu = level(grid, i)
    x0 = x0_hat(mix, x, alpha, nu)
    o, jac = (x - alpha * x0) / nu, None
    if jacobian:
        jac0 = x0_jacobian(mix, x, alpha, nu)
        jac = (torch.eye(x.shape[-1], dtype=x.dtype) - alpha * jac0) / nu
    if grid.kind == "flow":
        o, jac = o - x0, jac - jac0 if jacobian else None
    return o, jac


def score_coef(grid: common.Grid, i: int) -> float:
    """b_t of mu = a x + b S: o_coef = b k with k = -1 / nu (noise) or -(1 - t) / t (velocity)."""
    k = -1 / grid.nu[i] if grid.kind == "eps" else -(1 - grid.t[i]) / grid.t[i]
    return (grid.o_coef[i] / k).item()


def log_ratio_to_ref(policy: Mixture, ref: Mixture, grid, x, o, z, i: int) -> torch.Tensor:
    """log p_policy - log p_ref of the step x_s = mu_policy + sigma z, (N,)."""
    return -common.log_ratio(grid.w[i] * (output(ref, grid, x, i)[0] - o), z, "sum")


@dataclass
class Draws:
    """N roll-outs from each of P states: what the estimators need of them."""

    z: torch.Tensor  # (P, N, d) noise of the first step
    scale: float  # sigma / (beta b): Psi = scale * mean(return * z)
    reward: dict[str, torch.Tensor]  # estimator -> (P, N): its return, for zeroth order
    gradient: dict[str, torch.Tensor]  # estimator -> (P, N, d): of the return at x_s, times sigma^2 / (beta b)


def halfway(grid: common.Grid, i: int) -> int:
    return (i + 1 + grid.steps) // 2


@torch.no_grad()
def roll_out(policy, ref, grid, ode, x_t, i: int, draws: int, beta: float, generator) -> Draws:
    """`draws` trajectories of `policy` from each x_t (P, d) of step i to the end; Eq. 14, 15 and 60 share them."""
    points, d = x_t.shape
    sigma, b = grid.sigma[i].item(), score_coef(grid, i)
    z = torch.randn((points, draws, d), generator=generator, dtype=F64)
    x = x_t.repeat_interleave(draws, 0)
    x = grid.x_coef[i] * x + grid.o_coef[i] * output(policy, grid, x, i)[0] + sigma * z.flatten(0, 1)
    returns, gradients = {}, {}

    x_ode = x.clone()
    for j in range(i + 1, ode.steps):
        x_ode = ode.x_coef[j] * x_ode + ode.o_coef[j] * output(policy, ode, x_ode, j)[0]
    returns["zo_ode"] = reward(x_ode)

    chain = torch.eye(d, dtype=F64).expand(len(x), d, d)  # d x_j / d x_s
    cost = torch.zeros(len(x), dtype=F64)
    for j in range(i + 1, grid.steps + 1):
        for name, depth in (("one", i + 1), ("half", halfway(grid, i)), ("full", grid.steps)):
            if j == depth:  # x0_hat of the final sample is the sample
                returns[f"zo_{name}"] = hard_value(policy, x, *level(grid, j))
                pulled = (hard_gradient(policy, x, *level(grid, j))[:, None] @ chain)[:, 0]
                gradients[f"fo_{name}"] = sigma**2 / (beta * b) * pulled
        if j < grid.steps:
            o, jac = output(policy, grid, x, j, jacobian=True)
            chain = grid.x_coef[j] * chain + grid.o_coef[j] * (jac @ chain)
            noise = torch.zeros_like(x)
            if grid.sigma[j] > common.MIN_SIGMA:
                noise = torch.randn(x.shape, generator=generator, dtype=F64)
                cost += log_ratio_to_ref(policy, ref, grid, x, o, noise, j)
            x = grid.x_coef[j] * x + grid.o_coef[j] * o + grid.sigma[j] * noise
    returns["zo_entropy"] = returns["zo_full"] - beta * cost  # Eq. 60: of the steps after the first
    returns["zo_full_raw"] = returns["zo_full"]
    return Draws(
        z,
        sigma / (beta * b),
        {k: v.view(points, draws) for k, v in returns.items()},
        {k: v.view(points, draws, d) for k, v in gradients.items()},
    )


def merge(parts: list[Draws]) -> Draws:
    """Draws of several sets of states as one."""
    first = parts[0]
    reward = {k: torch.cat([p.reward[k] for p in parts]) for k in first.reward}
    gradient = {k: torch.cat([p.gradient[k] for p in parts]) for k in first.gradient}
    return Draws(torch.cat([p.z for p in parts]), first.scale, reward, gradient)


# ---- estimators -----------------------------------------------------------------------------------------------------
def estimates(draws: Draws, name: str, size: int) -> torch.Tensor:
    """Estimates of Psi from `size` draws each, (R, P, d): as many as the draws allow.  Eq. 14 (fo_), Eq. 15 (zo_)."""
    points, total, d = draws.z.shape
    groups = total // size
    if name in draws.gradient:
        return draws.gradient[name][:, : groups * size].view(points, groups, size, d).mean(2).transpose(0, 1)
    r = draws.reward[name][:, : groups * size].reshape(-1)
    mode = "raw" if name.endswith("_raw") else "rloo"  # leaving itself out keeps the estimator unbiased
    adv = common.group_advantage(r, size, mode)[0].double().view(points, groups, size, 1)
    z = draws.z[:, : groups * size].view(points, groups, size, d)
    return draws.scale * (adv * z).mean(2).transpose(0, 1)


def errors(estimate: torch.Tensor, truth: torch.Tensor) -> dict[str, float]:
    """Of estimates (R, P, d): RMSE per coordinate, its standard error over states, and its two parts (R > 1)."""
    square = ((estimate - truth) ** 2).mean(-1).mean(0)  # (P,)
    found = {"rmse": square.mean().sqrt().item()}
    found["se"] = (square.std() / len(square) ** 0.5 / (2 * found["rmse"])).item() if found["rmse"] > 1e-12 else 0.0
    if len(estimate) > 1:
        var = estimate.var(0).mean(-1)
        bias2 = ((estimate.mean(0) - truth) ** 2).mean(-1) - var / len(estimate)  # the noise's own part taken out
        found |= {"bias": bias2.mean().clamp(min=0).sqrt().item(), "std": var.mean().sqrt().item()}
    return found


def path_noise(ref: Mixture, grid, i: int, beta: float, generator, n: int = 2048) -> float:
    """Variance of the entropy-augmented return given x_s, averaged over x_t ~ p*_t; 0 in continuous time.

    There r - beta log(p* / p_ref) of a path is V_soft at its start.  In a finite step the log ratio's part in the draw
    z, beta b / sigma Psi z, differs from V_soft's change, sigma beta Psi z + sigma^2 (z' V'' z - tr V'') / 2.
    """
    star, total = tilt(ref, C, beta), 0.0
    for j in range(i + 1, grid.steps):
        sigma = grid.sigma[j].item()
        if sigma > common.MIN_SIGMA:
            alpha, nu = level(grid, j + 1)
            x = star.sample(n, alpha, nu, generator)
            linear = (sigma - score_coef(grid, j) / sigma) * psi_star(ref, x, alpha, nu, beta)
            change = mean_covariance(star, x, alpha, nu) - mean_covariance(ref, x, alpha, nu)
            hessian = (alpha / (alpha**2 + nu**2)) ** 2 * change
            square = (linear**2).sum(1) + sigma**4 / 2 * (hessian**2).sum((1, 2))
            total += beta**2 * square.mean().item()
    return total


def expected_error(name: str, size: int, scale: float, sigma: float, known: dict, beta: float) -> list[float] | None:
    """RMSE to [hard-value gradient / beta, Psi*] of `size` draws for small steps; None where there is no closed form.

    The variance is Eq. 19's, for a return that is linear in z around its mean, r = V + sigma g z + rest:
    tr Cov(r z) = d Var(r) + sigma^2 |g|^2 when centred, and d V^2 more as it is.
    """
    hard, psi = known["hard"], known["psi_star"]
    d, none = hard.shape[1], torch.zeros(1, dtype=F64)
    towards = {"zo_entropy": psi, "terminal": (C / beta).expand_as(hard)}.get(name, hard)
    linear = sigma**2 * ((beta * towards) ** 2).sum(1)
    noise = {
        "zo_full_raw": d * (known["variance"] + known["value"] ** 2) + linear,
        "zo_full": d * known["variance"] + linear,
        "zo_one": (d + 1) * linear,  # the return is a function of x_s
        "zo_entropy": (d + 1) * linear + d * known["path_noise"],
        "fo_one": none,
        "fo_current": none,
        "terminal": none,
    }.get(name)
    if noise is None:
        return None
    variance = scale**2 * noise.mean() / (d * size)
    return [(((towards - truth) ** 2).mean() + variance).sqrt().item() for truth in (hard, psi)]


def evaluations(name: str, grid, i: int) -> int:
    """Network evaluations of one draw, without the one at x_t that all draws share."""
    depth = {"one": 1, "half": halfway(grid, i) - i}.get(name.split("_")[1] if "_" in name else "", grid.steps - i - 1)
    if name == "fo_current":
        return 0
    return 2 * depth if name == "zo_entropy" else depth  # the reference is evaluated as well


# ---- measurement ----------------------------------------------------------------------------------------------------
def truths(ref, grid, x, i: int, beta: float):
    """(hard-value gradient / beta, Psi*) at x of step i."""
    star = tilt(ref, C, beta)
    return hard_gradient(star, x, *level(grid, i)) / beta, psi_star(ref, x, *level(grid, i), beta)


def measure(sampler: str, steps: int, i: int, args, replicates: int, curve: bool = False) -> dict:
    """All estimators at step i of a sampler."""
    path, kernel, noise_level = SAMPLERS[sampler]
    grid, ode = make_grid(path, kernel, noise_level, steps), make_grid(path, "ode", 0.0, steps)
    generator = common.generator("estimators", args.seed, sampler, i)
    star = tilt(REF, C, args.beta)
    x = star.sample(args.points, *level(grid, i), generator)
    total = args.draws * replicates
    draws = merge([roll_out(star, REF, grid, ode, part, i, total, args.beta, generator) for part in x.split(4)])
    hard, psi = truths(REF, grid, x, i, args.beta)
    sigma, (alpha, nu) = grid.sigma[i].item(), level(grid, i)
    known = {"hard": hard, "psi_star": psi, "variance": reward_variance(star, x, alpha, nu)}
    known |= {"value": hard_value(star, x, alpha, nu)}
    known |= {"path_noise": path_noise(REF, grid, i, args.beta, generator)}
    time_index = grid.timestep[i].item() if path == "eps" else grid.t[i].item()
    result = {"sampler": sampler, "step": i, "t": time_index, "alpha": alpha, "nu": nu}
    result |= {"sigma": sigma, "sigma2_over_b": sigma**2 / score_coef(grid, i)}
    result |= {"rms_psi_star": (psi**2).mean().sqrt().item(), "rms_hard_gradient": (hard**2).mean().sqrt().item()}
    result |= {"rms_gap": ((hard - psi) ** 2).mean().sqrt().item(), "estimators": {}, "curves": {}}
    for name in ESTIMATORS:
        fixed = {"fo_current": hard, "terminal": (C / args.beta).expand_as(hard)}.get(name)
        row = {"evaluations": evaluations(name, grid, i)}
        sizes = sorted({args.draws, *(4**k for k in range(1, 12) if curve and 4**k <= total)})
        by_size = {n: estimates(draws, name, n) if fixed is None else fixed[None].expand(2, -1, -1) for n in sizes}
        for target, truth in (("hard", hard), ("psi_star", psi)):
            row[target] = errors(by_size[args.draws], truth)
            if curve:
                found = [errors(by_size[n], truth)["rmse"] for n in sizes]
                result["curves"].setdefault(name, {"draws": sizes})[target] = found
        if path == "eps":
            row["expected"] = expected_error(name, args.draws, draws.scale, sigma, known, args.beta)
        result["estimators"][name] = row
    return result


def closed_form_rows(args, indices, n: int = 2**17) -> list[dict]:
    """How large Psi* is at x_t ~ p*_t, and how far hard-value gradients are from it, under p* and under p_ref."""
    grid, rows, star = make_grid("eps", "ancestral", 1.0, 50), [], tilt(REF, C, args.beta)
    for index in indices:
        alpha, nu = level(grid, i := (499 - index) // 10)
        x = star.sample(n, alpha, nu, common.generator("estimators", args.seed, "closed form", index))
        hard, psi = truths(REF, grid, x, i, args.beta)
        of_ref = hard_gradient(REF, x, alpha, nu) / args.beta
        rms = [(v**2).mean().sqrt().item() for v in (psi, hard - psi, of_ref - psi)]
        rows.append({"index": index, "alpha_bar": alpha**2} | dict(zip(("psi_star", "hard_gap", "hard_gap_ref"), rms)))
    return rows


# ---- output ---------------------------------------------------------------------------------------------------------
def number(value) -> str:
    return "-" if value is None else f"{value:.3f}"


def lines_of(header: list[str], rows: list[list[str]]) -> list[str]:
    return ["| " + " | ".join(cells) + " |" for cells in (header, ["---"] * len(header), *rows)]


def tables(results: dict) -> str:
    """The tables of docs/estimators.md."""
    rows = []
    for name, row in results["probe"]["estimators"].items():
        hard, psi, (a, b) = row["hard"], row["psi_star"], row["expected"] or (None, None)
        cells = [f"**{psi['rmse']:.3f}** ± {psi['se']:.3f}", number(b), number(psi["bias"])]
        cells += [f"**{hard['rmse']:.3f}** ± {hard['se']:.3f}", number(a), number(hard["bias"])]
        rows.append([ESTIMATORS[name][0], *cells, number(hard["std"]), str(row["evaluations"])])
    header = ["estimator", "RMSE to Ψ*", "closed form", "bias", "RMSE to hard", "closed form", "bias"]
    header += ["std of either", "evaluations per draw"]
    text = lines_of(header, rows)

    keys = ("psi_star", "hard_gap", "hard_gap_ref")
    rows = [[str(r["index"]), f"{r['alpha_bar']:.4f}", *(number(r[k]) for k in keys)] for r in results["closed_form"]]
    text += ["", *lines_of(["index", "ᾱ", "rms Ψ*", "hard under p* − Ψ*", "hard under p_ref − Ψ*"], rows)]

    names = ("zo_full", "zo_entropy", "fo_one", "fo_full", "fo_current")
    rows = []
    for row in [results["probe"], *results["flow"]]:
        found = [row["estimators"][n] for n in names]
        pairs = [f"{f['psi_star']['bias']:.3f} / {f['hard']['bias']:.3f}" for f in found]
        rows.append([f"`{row['sampler']}`", number(row["sigma2_over_b"]), number(row["rms_psi_star"]), *pairs])
    text += ["", *lines_of(["sampler", "σ²/b", "rms Ψ*", *(ESTIMATORS[n][0] for n in names)], rows)]
    return "\n".join(text)


def figure(results: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    fig, axes = plt.subplots(2, 2, figsize=(12, 10), sharey=True)
    probe, over_time = results["probe"], results["over_time"]
    goals = {
        "psi_star": ("Ψ* (soft value)", "rms_psi_star"),
        "hard": ("the hard value's gradient", "rms_hard_gradient"),
    }
    for (left, right), (target, (goal, size)) in zip(axes, goals.items()):
        for name, (label, colour, dash) in ESTIMATORS.items():
            style = dict(color=colour, ls=dash, lw=1.7, label=label)
            at_probe = probe["estimators"][name]
            y = [p["estimators"][name][target]["rmse"] for p in over_time]
            if max(y) < 1e-9:  # nothing to see on a logarithmic axis
                for ax, x, side in ((left, 0.02, "left"), (right, 0.98, "right")):
                    note = f"{label}: error 0, because the reward is linear"
                    ax.text(x, 0.03, note, ha=side, transform=ax.transAxes, fontsize=8.5, color=colour)
                continue
            if name in ("fo_current", "terminal"):  # one evaluation or one trajectory, nothing to average
                left.axhline(at_probe[target]["rmse"], **style)
            else:
                cost = [n * at_probe["evaluations"] for n in probe["curves"][name]["draws"]]
                left.plot(cost, probe["curves"][name][target], marker="o", ms=3.5, **style)
            right.plot([p["t"] for p in over_time], y, marker="o", ms=3.5, **style)
        left.axhline(probe[size], color="k", lw=5, alpha=0.12, label="size of what is estimated (rms)")
        right.plot([p["t"] for p in over_time], [p[size] for p in over_time], color="k", lw=5, alpha=0.12)
        left.set(xscale="log", xlabel="network evaluations per state (draws × steps of look-ahead)")
        right.set(xlabel="time index of $x_t$: noise (499) to data (0)", xlim=(505, 25))
        left.set_title(f"error to {goal}, at time index {round(probe['t'])}", fontsize=11)
        right.set_title(f"error to {goal}, {results['settings']['draws']} draws per state", fontsize=11)
        left.set_ylabel("RMSE per coordinate (1 / unit of x)")
        for ax in (left, right):
            ax.set(yscale="log", ylim=(1e-3, 7))
            ax.grid(alpha=0.25)
    fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="lower center", ncol=2, fontsize=9.5, frameon=False)
    fig.tight_layout(rect=(0, 0.14, 1, 1))
    fig.savefig(path, dpi=100)
    plt.close(fig)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--draws", type=int, default=1024, help="roll-outs per estimate")
    parser.add_argument("--points", type=int, default=128, help="states x_t")
    parser.add_argument("--replicates", type=int, default=16, help="estimates per state at --index (over time 2)")
    parser.add_argument("--index", type=int, default=389, help="time index of the table, 9, 19, .. 499 (RSM: 389)")
    parser.add_argument("--beta", type=float, default=1.0, help="temperature of the tilt p exp(r / beta)")
    default = ROOT / "benchmarks" / "results" / "estimators.json"
    parser.add_argument("--out", type=Path, default=default, help="results; the figure goes beside it as .png")
    args = parser.parse_args(argv)
    if args.index not in range(19, 500, 10):
        parser.error(f"--index {args.index} is not a stochastic step of the sampler; use 19, 29, .., 499")
    for name, least in (("draws", 2), ("points", 2), ("replicates", 2)):
        if getattr(args, name) < least:
            parser.error(f"--{name} {getattr(args, name)} leaves nothing to average over; use {least} or more")
    if not args.beta > 0:
        parser.error(f"--beta {args.beta} must be above 0")
    return args


def main(argv=None):
    args = parse_args(argv)
    started, cpu = time.time(), time.process_time()
    settings = {k: getattr(args, k) for k in ("seed", "draws", "points", "replicates", "index", "beta")}
    results = {"settings": settings, "closed_form": closed_form_rows(args, (489, 389, 289, 189, 89))}
    results["probe"] = measure("vp", 50, (499 - args.index) // 10, args, args.replicates, curve=True)
    results["over_time"] = [measure("vp", 50, i, args, 2) for i in range(1, 47, 5)]
    flow = make_grid("flow", "ode", 0.0, 50)
    ratio = results["probe"]["alpha"] / results["probe"]["nu"]
    i = ((1 - flow.t) / flow.t - ratio).abs().argmin().item()  # the same signal-to-noise ratio
    results["flow"] = [
        measure(name, 50, i, args, max(args.replicates // 2, 2)) for name in ("flow-memoryless", "flow-sde")
    ]
    results["machine"] = f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    results |= {"seconds": round(time.time() - started), "cpu_seconds": round(time.process_time() - cpu)}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    figure(results, args.out.with_suffix(".png"))
    print(tables(results))
    print(f"\n{results['seconds']} s, {results['cpu_seconds']} s of processor time; {args.out} and .png")


if __name__ == "__main__":
    main()
