"""benchmarks/estimators.py: closed forms against quadrature and autograd, estimators against brute force."""

import argparse
import importlib.util
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.distributions import MultivariateNormal, Normal

import common

ROOT = Path(__file__).resolve().parent.parent
spec = importlib.util.spec_from_file_location("estimators", ROOT / "benchmarks" / "estimators.py")
est = sys.modules["estimators"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(est)

F64 = torch.float64
PAIRS = [(math.sqrt(0.009848), math.sqrt(1 - 0.009848)), (0.8, 0.6), (0.3, 0.7), (0.9, 0.25)]  # VP, VP, flow, other
SETTINGS = [(*p, beta) for p in PAIRS for beta in (1.0, 0.6)]
PROBE = 11  # step of index 389 among 499, 489, ..


def states(n=6, seed=0):
    return 2 * torch.randn(n, 2, generator=torch.Generator().manual_seed(seed), dtype=F64)


def vp(steps=50):
    return est.make_grid("eps", "ancestral", 1.0, steps)


def known(x, alpha, nu, beta=1.0):
    return est.hard_gradient(est.tilt(est.REF, est.C, beta), x, alpha, nu) / beta, est.psi_star(
        est.REF, x, alpha, nu, beta
    )


# ---- closed forms ---------------------------------------------------------------------------------------------------
class Lattice:
    """Integrals over x_0 on a lattice: exact to rounding for such smooth densities; shares no formula with est."""

    def __init__(self):
        axis = torch.linspace(-13, 13, 201, dtype=F64)
        self.x0 = torch.cartesian_prod(axis, axis)
        eye = torch.eye(2, dtype=F64)
        means = [[3, -math.sqrt(3)], [-3, -math.sqrt(3)], [0, 2 * math.sqrt(3)]]
        parts = [MultivariateNormal(torch.tensor(m, dtype=F64), eye).log_prob(self.x0).exp() / 3 for m in means]
        self.prior = sum(parts) * (axis[1] - axis[0]) ** 2
        self.r = 3 - self.x0[:, 0] / 2

    def posterior(self, x, alpha, nu, beta=None):
        """Weights (N, M) of x_0 given x, and the density of x; of the data, or of the data tilted by exp(r / beta)."""
        prior = self.prior * (self.r / beta).exp() if beta else self.prior
        prior = prior / prior.sum()
        joint = torch.stack(
            [MultivariateNormal(alpha * self.x0, nu**2 * torch.eye(2, dtype=F64)).log_prob(v).exp() for v in x]
        )
        joint = joint * prior
        return joint / joint.sum(1, keepdim=True), joint.sum(1)


LATTICE = Lattice()


@pytest.mark.parametrize("alpha, nu, beta", SETTINGS)
def test_closed_forms_are_the_integrals(alpha, nu, beta):
    x, star = states(), est.tilt(est.REF, est.C, beta)
    for mix, by in ((est.REF, None), (star, beta)):
        weight, marginal = LATTICE.posterior(x, alpha, nu, by)
        mean = weight @ LATTICE.r
        assert torch.allclose(est.log_density(mix, x, alpha, nu), marginal.log(), atol=1e-9)
        assert torch.allclose(est.x0_hat(mix, x, alpha, nu), weight @ LATTICE.x0, atol=1e-9)
        assert torch.allclose(est.hard_value(mix, x, alpha, nu), mean, atol=1e-9)
        variance = weight @ LATTICE.r**2 - mean**2
        assert torch.allclose(est.reward_variance(mix, x, alpha, nu), variance, atol=1e-8)
    weight, _ = LATTICE.posterior(x, alpha, nu)
    soft = beta * (weight @ (LATTICE.r / beta).exp()).log()  # Eq. 7
    assert torch.allclose(est.soft_value(est.REF, x, alpha, nu, beta), soft, atol=1e-9)
    assert (soft - mean).abs().min() > 1e-3  # hard and soft differ everywhere here


@pytest.mark.parametrize("alpha, nu, beta", SETTINGS)
def test_gradients_are_autograds(alpha, nu, beta):
    x, star = states().requires_grad_(), est.tilt(est.REF, est.C, beta)

    def grad(f):
        return torch.autograd.grad(f.sum(), x)[0]

    for mix in (est.REF, star):
        assert torch.allclose(est.score(mix, x, alpha, nu), grad(est.log_density(mix, x, alpha, nu)), atol=1e-12)
        rows = [grad(est.x0_hat(mix, x, alpha, nu)[:, k]) for k in range(2)]
        assert torch.allclose(est.x0_jacobian(mix, x, alpha, nu), torch.stack(rows, 1), atol=1e-12)
        assert torch.allclose(
            est.hard_gradient(mix, x, alpha, nu), grad(est.hard_value(mix, x, alpha, nu)), atol=1e-12
        )
        tweedie = (x + nu**2 * est.score(mix, x, alpha, nu)) / alpha
        assert torch.allclose(est.x0_hat(mix, x, alpha, nu), tweedie, atol=1e-10)
    soft = est.soft_value(est.REF, x, alpha, nu, beta)
    assert torch.allclose(est.psi_star(est.REF, x, alpha, nu, beta), grad(soft) / beta, atol=1e-10)  # Eq. 8


def test_soft_value_is_the_log_density_ratio_up_to_one_constant():
    """Eq. 7: V / beta = log p*_t - log p_t + log Z, with the same Z at every t."""
    x, beta = states(), 0.6
    star = est.tilt(est.REF, est.C, beta)
    offsets = []
    for alpha, nu in PAIRS:
        ratio = est.log_density(star, x, alpha, nu) - est.log_density(est.REF, x, alpha, nu)
        offsets.append(est.soft_value(est.REF, x, alpha, nu, beta) / beta - ratio)
    offsets = torch.stack(offsets)
    log_z = (LATTICE.prior @ (LATTICE.r / beta).exp()).log().item()
    assert torch.allclose(offsets, torch.full_like(offsets, log_z), atol=1e-9)


def test_golden_numbers():
    star = est.tilt(est.REF)
    assert torch.allclose(star.weights, torch.tensor([0.039113, 0.785597, 0.175290], dtype=F64), atol=1e-6)
    assert torch.allclose(star.means[:, 0], torch.tensor([2.5, -3.5, -0.5], dtype=F64))
    assert vp().timestep[PROBE] == 389 and abs(vp().alpha[PROBE] ** 2 - 0.009848) < 1e-6
    rows = est.closed_form_rows(argparse.Namespace(seed=1, beta=1.0), (489, 389, 289, 189, 89))
    for row, psi, gap in zip(rows, (0.052, 0.192, 0.411, 0.365, 0.318), (0.019, 0.073, 0.154, 0.088, 0.005)):
        assert row["psi_star"] == pytest.approx(psi, abs=0.006) and row["hard_gap"] == pytest.approx(gap, abs=0.002)


def test_tweedie_at_the_final_sample_is_the_sample():
    x = states()
    assert torch.equal(est.x0_hat(est.REF, x, 1.0, 0.0), x)
    assert torch.equal(est.hard_value(est.tilt(est.REF), x, 1.0, 0.0), est.reward(x))
    for path, kernel, level in est.SAMPLERS.values():
        assert est.level(est.make_grid(path, kernel, level, 20), 20) == (1.0, 0.0)


@pytest.mark.parametrize("noise", [0.7, 1.0, math.sqrt(2)])
def test_sigma2_over_b_of_the_flow_sde(noise):
    grid = est.make_grid("flow", "flow_sde", noise, 10)
    found = [grid.sigma[i].item() ** 2 / est.score_coef(grid, i) for i in range(1, 10)]
    assert found == pytest.approx([2 * noise**2 / (2 + noise**2)] * 9, abs=1e-10)


def test_sigma2_over_b_of_the_posterior_step_tends_to_one():
    def far(path, steps):
        grid = est.make_grid(path, "ancestral", 1.0, steps)
        i = (grid.alpha - grid.nu).abs().argmin().item()
        return 1 - grid.sigma[i].item() ** 2 / est.score_coef(grid, i)

    for path in ("eps", "flow"):
        assert 0.6 > far(path, 25) > 1.7 * far(path, 50) > 3 * far(path, 100) > 0


# ---- roll-outs ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("sampler", ["vp", "flow-sde"])
def test_roll_out_is_the_textbook_chain(sampler):
    """Same draws through steps written from the score, log-densities of torch, gradients by autograd; five steps."""
    path, kernel, noise = est.SAMPLERS[sampler]
    steps, first, beta, star = 5, 1, 0.8, est.tilt(est.REF, est.C, 0.8)
    grid, ode = est.make_grid(path, kernel, noise, steps), est.make_grid(path, "ode", 0.0, steps)
    x_t, count = states(3), 4
    found = est.roll_out(star, est.REF, grid, ode, x_t, first, count, beta, torch.Generator().manual_seed(3))
    generator = torch.Generator().manual_seed(3)
    z = torch.randn(3, count, 2, generator=generator, dtype=F64)

    def levels(i):
        return (*est.level(grid, i), *est.level(grid, i + 1))

    def step(mix, x, i):
        """Mean, standard deviation, score coefficient and the ODE's next state."""
        a, n, a_s, n_s = levels(i)
        s = est.score(mix, x, a, n)
        x0 = (x + n**2 * s) / a
        if path == "eps":  # q(x_s | x_t, x_0 = x0_hat)
            rho = (a / a_s) ** 2
            mean = math.sqrt(rho) * n_s**2 / n**2 * x + a_s * (1 - rho) / n**2 * x0
            return mean, n_s / n * math.sqrt(1 - rho), (1 - rho) / math.sqrt(rho), a_s * x0 - n_s * n * s
        dt, g2 = n - n_s, noise**2 * n / (1 - n)
        v = -(x + n * s) / (1 - n)
        return x - dt * (v - g2 / 2 * s), math.sqrt(g2 * dt), dt * (n / (1 - n) + g2 / 2), x - dt * v

    mean, sigma, b, _ = step(star, x_t.repeat_interleave(count, 0), first)
    x_s = (mean + sigma * z.flatten(0, 1)).requires_grad_()
    assert found.scale == pytest.approx(sigma / (beta * b), rel=1e-10)
    assert torch.equal(found.z, z)

    def check(name, value):
        assert torch.allclose(found.reward[f"zo_{name}"].flatten(), value, atol=1e-9), name
        if f"fo_{name}" in found.gradient:
            gradient = torch.autograd.grad(value.sum(), x_s, retain_graph=True)[0] * sigma**2 / (beta * b)
            assert torch.allclose(found.gradient[f"fo_{name}"].flatten(0, 1), gradient, atol=1e-9), name

    x, cost = x_s, 0
    for i in range(first + 1, steps):
        for name, depth in (("one", first + 1), ("half", 3)):
            if i == depth:
                a, n = est.level(grid, i)
                check(name, 3 - (x + n**2 * est.score(star, x, a, n))[:, 0] / (2 * a))
        mean, sd, _, _ = step(star, x, i)
        if sd > 1e-9:
            new = mean + sd * torch.randn(x.shape, generator=generator, dtype=F64)
            other = step(est.REF, x, i)[0]
            cost = cost + (Normal(mean, sd).log_prob(new) - Normal(other, sd).log_prob(new)).sum(1)
        x = new if sd > 1e-9 else mean
    check("full", 3 - x[:, 0] / 2)
    check("full_raw", 3 - x[:, 0] / 2)
    check("entropy", 3 - x[:, 0] / 2 - beta * cost)
    assert cost.abs().min() > 1e-3
    x = x_s
    for i in range(first + 1, steps):
        x = step(star, x, i)[3]
    check("ode", 3 - x[:, 0] / 2)


@pytest.fixture(scope="module")
def brute():
    """2 states of index 389 at which hard and soft differ much; 40960 roll-outs each."""
    grid, star = vp(), est.tilt(est.REF)
    generator = torch.Generator().manual_seed(5)
    x = star.sample(500, *est.level(grid, PROBE), generator)
    hard, psi = known(x, *est.level(grid, PROBE))
    kept = (hard - psi).norm(dim=1).topk(100).indices[::60]
    ode = est.make_grid("eps", "ode", 0.0, 50)
    parts = [est.roll_out(star, est.REF, grid, ode, x[k : k + 1], PROBE, 40960, 1.0, generator) for k in kept]
    return est.merge(parts), hard[kept], psi[kept]


def mean_and_error(draws, name):
    found = est.estimates(draws, name, 256)  # (R, P, d)
    return found.mean(0), found.std(0) / len(found) ** 0.5


@pytest.mark.parametrize("name", ["zo_full", "zo_full_raw", "zo_half", "zo_one"])
def test_zeroth_order_is_the_gradient_of_its_own_return(brute, name):
    """Stein: E[r z] sigma / (beta b) = E[grad r] sigma^2 / (beta b), on the sampler as it is."""
    draws, _, _ = brute
    mean, error = mean_and_error(draws, name)
    by_gradient, other = mean_and_error(draws, name.replace("zo_", "fo_").removesuffix("_raw"))
    assert ((mean - by_gradient).abs() < 3 * (error**2 + other**2).sqrt()).all()
    assert error.max() < (0.05 if name == "zo_full_raw" else 0.011)


def test_full_roll_out_is_the_hard_value_and_the_entropy_augmented_one_the_soft(brute):
    draws, hard, psi = brute
    gap = (hard - psi).norm(dim=1)
    step = 0.1 * gap[:, None]  # finite steps: a tenth of the distance between the two at most
    assert (gap > 0.12).all()
    for name, truth, other in (("zo_full", hard, psi), ("fo_full", hard, psi), ("zo_entropy", psi, hard)):
        mean, error = mean_and_error(draws, name)
        assert ((mean - truth).abs() < 3 * error + step).all(), name
        assert ((mean - other).norm(dim=1) > 0.7 * gap).all(), name


def test_the_ode_tail_is_another_problem(brute):
    draws, hard, psi = brute
    mean, error = mean_and_error(draws, "zo_ode")
    for truth in (hard, psi):
        assert ((mean - truth).norm(dim=1) > 6 * error.norm(dim=1)).all()


def test_the_distance_to_the_hard_value_shrinks_with_the_step():
    x, bias = states(40), []
    for steps in (25, 100):
        grid = vp(steps)
        i = (grid.timestep == 399).nonzero().item()
        draws = est.roll_out(est.tilt(est.REF), est.REF, grid, grid, x, i, 400, 1.0, torch.Generator().manual_seed(0))
        found = est.estimates(draws, "fo_one", 400)[0] - known(x, *est.level(grid, i))[0]
        bias.append((found**2).mean().sqrt().item())
    assert 0.001 < bias[0] and bias[1] < 0.4 * bias[0]


def test_only_memoryless_noise_leads_to_the_closed_forms():
    """Flow-GRPO's noise level: same marginals, another dependence of x_0 on x_t."""
    x, bias = est.tilt(est.REF).sample(24, 0.2, 0.8, torch.Generator().manual_seed(1)), {}
    for sampler in ("flow-memoryless", "flow-sde"):
        path, kernel, noise = est.SAMPLERS[sampler]
        grid = est.make_grid(path, kernel, noise, 60)
        i = (grid.t - 0.8).abs().argmin().item()
        draws = est.roll_out(est.tilt(est.REF), est.REF, grid, grid, x, i, 512, 1.0, torch.Generator().manual_seed(0))
        hard = known(x, *est.level(grid, i))[0]
        bias[sampler] = est.errors(est.estimates(draws, "fo_full", 64), hard)["bias"]
    assert bias["flow-memoryless"] < 0.05 < 0.1 < bias["flow-sde"]  # 60 steps


def test_stein_by_quadrature():
    grid, star = vp(), est.tilt(est.REF)
    x = states(1)
    i, sigma = 25, grid.sigma[25].item()
    mu = grid.x_coef[i] * x + grid.o_coef[i] * est.output(star, grid, x, i)[0]
    node, weight = np.polynomial.hermite_e.hermegauss(60)
    z = torch.cartesian_prod(*[torch.tensor(node, dtype=F64)] * 2)
    w = torch.outer(*[torch.tensor(weight / weight.sum(), dtype=F64)] * 2).flatten()
    value = est.hard_value(star, mu + sigma * z, *est.level(grid, i + 1))
    gradient = est.hard_gradient(star, mu + sigma * z, *est.level(grid, i + 1))
    assert torch.allclose(w * value @ z, sigma * w @ gradient, atol=1e-9)
    assert (w @ gradient).norm() > 0.1


# ---- estimators and their errors ------------------------------------------------------------------------------------
def test_centring_leaves_each_draw_out_of_its_own_mean():
    g = torch.Generator().manual_seed(0)
    z, r = torch.randn(2, 11, 2, generator=g, dtype=F64), torch.randn(2, 11, generator=g, dtype=F64)
    draws = est.Draws(z, 0.7, {"zo_a": r, "zo_a_raw": r}, {})
    centred, raw = est.estimates(draws, "zo_a", 5), est.estimates(draws, "zo_a_raw", 5)  # two groups, one draw unused
    assert centred.shape == (2, 2, 2)
    for k in range(2):
        for p in range(2):
            group = range(5 * k, 5 * k + 5)
            others = [sum(r[p, j] for j in group if j != n) / 4 for n in group]
            by_hand = sum((r[p, n] - others[n - 5 * k]) * z[p, n] for n in group) * 0.7 / 5
            assert torch.allclose(centred[k, p], by_hand, atol=1e-6)  # group_advantage returns float32
            assert torch.allclose(raw[k, p], sum(r[p, n] * z[p, n] for n in group) * 0.7 / 5, atol=1e-6)


def test_errors_are_split_into_bias_and_spread():
    g = torch.Generator().manual_seed(0)
    truth = torch.randn(50, 2, generator=g, dtype=F64)
    estimate = truth + 0.3 + 0.4 * torch.randn(64, 50, 2, generator=g, dtype=F64)
    found = est.errors(estimate, truth)
    assert found["rmse"] == pytest.approx(0.5, rel=0.03)
    assert found["bias"] == pytest.approx(0.3, rel=0.03) and found["std"] == pytest.approx(0.4, rel=0.03)
    assert est.errors(truth + 0.4 * torch.randn(2, 50, 2, generator=g, dtype=F64), truth)["bias"] < 0.15


@pytest.mark.parametrize("index, beta", [(389, 1.0), (289, 2.0)])
def test_measured_spread_is_the_closed_forms(index, beta):
    args = argparse.Namespace(seed=2, draws=64, points=32, beta=beta)
    found = est.measure("vp", 50, (499 - index) // 10, args, 8)["estimators"]
    for name, target, side in (
        ("zo_full_raw", "hard", 0),
        ("zo_full", "hard", 0),
        ("zo_one", "hard", 0),
        ("zo_entropy", "psi_star", 1),
        ("terminal", "psi_star", 1),
    ):
        # half of the ratio's range is the finite step
        assert found[name][target]["rmse"] == pytest.approx(found[name]["expected"][side], rel=0.25), name
    assert found["zo_full"]["hard"]["std"] < 0.6 * found["zo_full_raw"]["hard"]["std"]
    assert found["zo_one"]["hard"]["std"] < 0.4 * found["zo_full"]["hard"]["std"]
    assert found["fo_current"]["hard"]["rmse"] == 0


def test_evaluations_are_counted():
    """38 steps remain after the step of index 389."""
    grid = vp()
    found = {name: est.evaluations(name, grid, PROBE) for name in est.ESTIMATORS}
    assert found["fo_current"] == 0 and found["zo_one"] == found["fo_one"] == 1
    assert found["zo_full"] == found["zo_ode"] == found["fo_full"] == found["terminal"] == 38
    assert found["zo_entropy"] == 76 and found["zo_half"] == est.halfway(grid, PROBE) - PROBE == 20


# ---- the script -----------------------------------------------------------------------------------------------------
SMALL = ["--draws", "4", "--points", "2", "--replicates", "2"]


def test_script(tmp_path, capsys):
    est.main([*SMALL, "--seed", "3", "--out", str(tmp_path / "a.json")])
    results = json.loads((tmp_path / "a.json").read_text())
    assert (tmp_path / "a.png").stat().st_size > 20000
    assert est.tables(results) in capsys.readouterr().out
    settings = argparse.Namespace(**results["settings"])
    again = [est.measure("vp", 50, PROBE, argparse.Namespace(**vars(settings) | {"seed": s}), 2, True) for s in (3, 4)]
    assert json.loads(json.dumps(again[0])) == results["probe"]
    assert again[1]["rms_psi_star"] != again[0]["rms_psi_star"]


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--draws", "1"], "--draws 1 leaves nothing to average over; use 2 or more"),
        (["--index", "9"], "--index 9 is not a stochastic step"),
        (["--index", "385"], "--index 385 is not a stochastic step"),
        (["--beta", "0"], "--beta 0.0 must be above 0"),
    ],
)
def test_mistakes_are_one_sentence(flags, message, capsys):
    with pytest.raises(SystemExit) as stop:
        est.parse_args(flags)
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_the_page_shows_the_committed_results():
    results = json.loads((ROOT / "benchmarks" / "results" / "estimators.json").read_text())
    page = (ROOT / "docs" / "estimators.md").read_text(encoding="utf-8")
    for table in est.tables(results).split("\n\n"):
        assert table in page
    args = est.parse_args([])
    assert results["settings"] == {k: getattr(args, k) for k in results["settings"]}


def test_float64_throughout():
    grid = vp()
    assert grid.sigma.dtype == est.REF.means.dtype == F64
    draws = est.roll_out(est.REF, est.REF, grid, grid, states(2), 40, 3, 1.0, torch.Generator())
    kinds = {v.dtype for v in (draws.z, *draws.reward.values(), *draws.gradient.values())}
    assert kinds == {F64} and common.MIN_SIGMA < grid.sigma[48]
