"""Every kernel of common.make_grid against oracles that share no code with it.

The oracles are diffusers' own schedulers, the public expressions of the methods' authors, and the (a, b, S) form
mu = a x_t + b S(x_t, t) of a Gaussian step, with S the score.  Golden numbers are on the two papers' grids: SD1.5's 50
DDIM steps and SD3.5's 10 flow-matching steps.
"""

import math
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler
from torch.distributions import Normal
from torch.distributions import kl_divergence as torch_kl

import common

F64 = torch.float64
SD15 = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1, clip_sample=False,
            set_alpha_to_one=False, timestep_spacing="leading")  # fmt: skip
FLOW = [("flow_sde", 0.7), ("dance", 0.3), ("ancestral", 1.0), ("cps", 0.8), ("ode", 0.0)]
VP = [("ddim", 0.3), ("ddim", 1.0), ("ancestral", 1.0), ("ode", 0.0)]


def sd15(steps=50, kernel="ddim", level=1.0, **changes):
    scheduler = DDIMScheduler(**(SD15 | changes))
    return common.make_grid(scheduler, "eps", steps, kernel, level), scheduler


def sd35(steps=10, kernel="flow_sde", level=0.7):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    return common.make_grid(scheduler, "flow", steps, kernel, level), scheduler


def any_grid(kind, kernel, level):
    return sd15(50, kernel, level)[0] if kind == "eps" else sd35(10, kernel, level)[0]


ALL = [("eps", *k) for k in VP] + [("flow", *k) for k in FLOW]


class UniformFlow:
    """t = 1, 1 - 1/N, ..., 0 without any shift."""

    def set_timesteps(self, steps):
        self.sigmas = torch.linspace(1, 0, steps + 1, dtype=F64)
        self.timesteps = 1000 * self.sigmas[:-1]


class UniformVP:
    """SD1.5's schedule in continuous time, sqrt(beta) linear in t from 0.85 to 12, at t = 1, 1 - 1/N, ..., 0."""

    def __init__(self, steps):
        root0, slope = math.sqrt(0.85), math.sqrt(12.0) - math.sqrt(0.85)
        t = torch.linspace(0, 1, steps + 1, dtype=F64)
        self.alphas_cumprod = torch.exp(-((root0 + slope * t) ** 3 - root0**3) / (3 * slope))
        self.final_alpha_cumprod = torch.tensor(1.0)
        self.config = SimpleNamespace(num_train_timesteps=steps)

    def set_timesteps(self, steps):
        self.timesteps = torch.arange(steps, 0, -1)


def fresh(seed, shape=(3, 4, 2, 2), dtype=F64):
    gen = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=gen, dtype=dtype) for _ in range(3)]  # x_t, o, z


def mean64(grid, i, x, o):
    return grid.x_coef[i] * x + grid.o_coef[i] * o


def close(actual, expected, tolerance):
    torch.testing.assert_close(
        torch.as_tensor(actual, dtype=F64), torch.as_tensor(expected, dtype=F64), rtol=0, atol=tolerance
    )


def ab(grid):
    """a and b of mu = a x + b S from x_coef and o_coef: o = -nu S (eps), o = -(x + t S) / (1 - t) (velocity)."""
    if grid.kind == "eps":
        return grid.x_coef, -grid.nu * grid.o_coef
    t = grid.t
    return grid.x_coef - grid.o_coef / (1 - t), -grid.o_coef * t / (1 - t)


def printed(value, text):
    """`value` agrees with the printed number in every digit that is printed."""
    digits = len(text.split(".")[1]) if "." in text else 0
    assert abs(float(value) - float(text)) <= 0.5000001 * 10**-digits, f"{float(value)!r} is not {text}"


# ---- against diffusers ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_ddim_is_the_diffusers_step_with_the_same_noise(eta):
    grid, scheduler = sd15(50, "ddim", eta)
    assert grid.timestep.tolist() == list(range(981, 0, -20)) and grid.steps == 50
    for i, t in enumerate(scheduler.timesteps):
        x, o, z = fresh(i)
        expected = scheduler.step(o, t, x, eta=eta, variance_noise=z).prev_sample
        close(mean64(grid, i, x, o) + grid.sigma[i] * z, expected, 2e-6)  # the scheduler's own tables are float32


@pytest.mark.parametrize("steps", [10, 30, 50])
def test_ddim_steps_that_do_not_divide_1000(steps):
    grid, scheduler = sd15(steps, "ddim", 1.0)
    for i, t in enumerate(scheduler.timesteps):
        x, o, z = fresh(i)
        expected = scheduler.step(o, t, x, eta=1.0, variance_noise=z).prev_sample
        close(mean64(grid, i, x, o) + grid.sigma[i] * z, expected, 2e-6)


def test_ode_and_the_noiseless_limits_are_the_diffusers_euler_step():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    grids = [sd35(10, kernel, level)[0] for kernel, level in (("ode", 0.0), ("flow_sde", 1e-9), ("cps", 1e-9))]
    exact = [sd35(10, kernel, 0.0)[0] for kernel in ("flow_sde", "dance", "cps")]
    scheduler.set_timesteps(10)
    for i, t in enumerate(scheduler.timesteps):
        x, o, _ = fresh(i)
        expected = scheduler.step(o.float(), t, x.float()).prev_sample
        for grid in grids + exact:
            close(mean64(grid, i, x, o), expected, 2e-6)
        for grid in exact + grids[:1]:
            assert grid.sigma[i] == 0
    for grid in grids[1:] + exact:
        close(grid.x_coef, torch.ones(10), 1e-12)
        close(grid.o_coef, -grid.dt, 1e-12)
    assert torch.equal(grids[0].timestep, scheduler.timesteps.double())


def test_eta_0_is_the_ode_kernel_of_sd15():
    a, b = sd15(50, "ddim", 0.0)[0], sd15(50, "ode", 0.0)[0]
    assert torch.equal(a.x_coef, b.x_coef) and torch.equal(a.o_coef, b.o_coef) and not b.sigma.any()


def test_eta_1_is_the_ancestral_kernel_of_sd15():
    a, b = sd15(50, "ddim", 1.0)[0], sd15(50, "ancestral", 1.0)[0]
    assert torch.equal(a.x_coef, b.x_coef) and torch.equal(a.o_coef, b.o_coef) and torch.equal(a.sigma, b.sigma)


def test_eta_1_is_the_diffusers_ddpm_posterior():
    grid, _ = sd15()
    ddpm = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
                         steps_offset=1, timestep_spacing="leading")  # fmt: skip
    ddpm.set_timesteps(50)
    for i, t in enumerate(ddpm.timesteps[:-1]):  # its last step goes to 1, SD1.5's DDIM to the schedule's first value
        x, o, _ = fresh(i)
        x0 = (x - grid.nu[i] * o) / grid.alpha[i]
        rho = grid.alpha[i] ** 2 / grid.alpha_s[i] ** 2
        posterior = rho.sqrt() * grid.nu_s[i] ** 2 / grid.nu[i] ** 2 * x
        posterior = posterior + grid.alpha_s[i] * (1 - rho) / grid.nu[i] ** 2 * x0
        close(mean64(grid, i, x, o), posterior, 1e-11)
        close(grid.sigma[i] ** 2, grid.nu_s[i] ** 2 / grid.nu[i] ** 2 * (1 - rho), 1e-14)
        close(grid.sigma[i] ** 2, ddpm._get_variance(t), 1e-6)
        close(ab(grid)[1][i], (1 - rho) / rho.sqrt(), 1e-12)


@pytest.mark.parametrize("kind", ["eps", "flow"])
def test_ancestral_is_sde_dpm_solver_of_order_1(kind):
    grid = any_grid(kind, "ancestral", 1.0)
    solver = DPMSolverMultistepScheduler(
        algorithm_type="sde-dpmsolver++", solver_order=1, use_flow_sigmas=kind == "flow"
    )
    ends = torch.cat([grid.nu[:1] / grid.alpha[:1], grid.nu_s / grid.alpha_s]) if kind == "eps" else None
    solver.sigmas = ends if kind == "eps" else torch.cat([grid.t, grid.nu_s[-1:]])
    steps = range(grid.steps) if kind == "eps" else range(1, grid.steps - 1)  # log 0 at the ends of the flow
    for i in steps:
        x, o, z = fresh(i)
        solver._step_index = i
        x0 = (x - grid.nu[i] * o) / grid.alpha[i] if kind == "eps" else x - grid.t[i] * o
        expected = solver.dpm_solver_first_order_update(x0, sample=x, noise=z)
        close(mean64(grid, i, x, o) + grid.sigma[i] * z, expected, 1e-10)


# ---- against the formulas in (a, b, S) form -------------------------------------------------------------------------
def table_ab(kernel, level, t, s, t_max):
    """a, b, sigma of one step of the flow kernels; t < 1."""
    dt = t - s
    if kernel in ("flow_sde", "dance", "ode"):
        g = {"flow_sde": level * math.sqrt(t / (1 - t)), "dance": level, "ode": 0.0}[kernel]
        return 1 + dt / (1 - t), dt * (t / (1 - t) + g**2 / 2), g * math.sqrt(dt)
    if kernel == "ancestral":
        q = t**2 - ((1 - t) / (1 - s)) ** 2 * s**2
        return (1 - s) / (1 - t), (1 - s) / (1 - t) * q, s / t * math.sqrt(q)
    sigma = s * math.sin(level * math.pi / 2)
    return (1 - s) / (1 - t), (1 - s) * t**2 / (1 - t) - t * math.sqrt(s**2 - sigma**2), sigma


@pytest.mark.parametrize("kernel,level", FLOW)
@pytest.mark.parametrize("steps", [10, 25])
def test_flow_kernels_are_a_x_plus_b_score(kernel, level, steps):
    grid, scheduler = sd35(steps, kernel, level)
    sigmas = scheduler.sigmas.tolist()
    for i in range(1, steps):
        t, s = sigmas[i], sigmas[i + 1]
        x, v, _ = fresh(i)
        score = -(x + (1 - t) * v) / t
        a, b, sigma = table_ab(kernel, level, t, s, sigmas[1])
        close(mean64(grid, i, x, v), a * x + b * score, 1e-10)
        close(grid.sigma[i], sigma, 1e-12)
        close(ab(grid)[0][i], a, 1e-9)
        close(ab(grid)[1][i], b, 1e-9)
        close(grid.o_coef[i], b * -(1 - t) / t, 1e-12)  # o_coef = b k
        if sigma > 0:
            close(grid.w[i], -abs(b * (1 - t) / t) / sigma, 1e-10)


@pytest.mark.parametrize("kernel,level", VP)
def test_vp_kernels_are_a_x_plus_b_score(kernel, level):
    grid, scheduler = sd15(50, kernel, level)
    eta = {"ode": 0.0, "ancestral": 1.0}.get(kernel, level)
    abar = scheduler.alphas_cumprod.double().tolist()
    for i, t in enumerate(range(981, 0, -20)):
        at, ar = abar[t], abar[max(t - 20, 0)]
        sigma = eta * math.sqrt((1 - ar) / (1 - at) * (1 - at / ar))
        c1, c2 = math.sqrt((1 - at) * ar / at), math.sqrt(1 - ar - sigma**2)
        x, eps, _ = fresh(i)
        score = -eps / math.sqrt(1 - at)
        close(mean64(grid, i, x, eps), math.sqrt(ar / at) * x + math.sqrt(1 - at) * (c1 - c2) * score, 1e-11)
        close(grid.sigma[i], sigma, 1e-13)
        close(grid.o_coef[i], -(c1 - c2), 1e-12)
        if eta:
            close(grid.w[i], -(c1 - c2) / sigma, 1e-11)


def flow_grpo_step(v, x, t, s, t_max, level):
    """The public Flow-GRPO step (dt < 0)."""
    dt = s - t
    std = math.sqrt(t / (1 - (t_max if t == 1 else t))) * level
    mean = x * (1 + std**2 / (2 * t) * dt) + v * (1 + std**2 * (1 - t) / (2 * t)) * dt
    return mean, std * math.sqrt(-dt)


def dance_step(v, x, t, s, t_max, level):
    """The public DanceGRPO step."""
    delta = t - s
    x0 = x - t * v
    score = -(x - x0 * (1 - t)) / t**2
    return x - delta * v + 0.5 * level**2 * score * delta, level * math.sqrt(delta)


def cps_step(v, x, t, s, t_max, level):
    """The public Flow-CPS step."""
    std = s * math.sin(level * math.pi / 2)
    return (x - t * v) * (1 - s) + (x + v * (1 - t)) * math.sqrt(s**2 - std**2), std


def posterior_step(v, x, t, s, t_max, level):
    """q(x_s | x_t, x_0 = x0_hat) by Bayes' rule from q(x_s | x_0) and q(x_t | x_s)."""
    x0 = x - t * v
    ratio = (1 - t) / (1 - s)
    noise = t**2 - ratio**2 * s**2  # q(x_t | x_s) = N(ratio x_s, noise)
    if s == 0:
        return x0, 0.0
    var = 1 / (1 / s**2 + ratio**2 / noise)
    return var * ((1 - s) * x0 / s**2 + ratio * x / noise), math.sqrt(var)


@pytest.mark.parametrize(
    "kernel,level,step",
    [("flow_sde", 0.7, flow_grpo_step), ("flow_sde", 1.2, flow_grpo_step), ("dance", 0.3, dance_step),
     ("cps", 0.8, cps_step), ("ancestral", 1.0, posterior_step)],
)  # fmt: skip
@pytest.mark.parametrize("steps", [2, 10, 40])
def test_flow_kernels_are_the_published_steps_including_the_first_and_the_last(kernel, level, step, steps):
    grid, scheduler = sd35(steps, kernel, level)
    sigmas = scheduler.sigmas.tolist()
    assert sigmas[0] == 1 and sigmas[-1] == 0
    for i in range(steps):
        x, v, _ = fresh(i)
        mean, std = step(v, x, sigmas[i], sigmas[i + 1], sigmas[1], level)
        close(mean64(grid, i, x, v), mean, 1e-11)
        close(grid.sigma[i], std, 1e-9)  # near s = 0 the ancestral root loses digits


def test_float32_mean_by_int_and_by_tensor_of_steps():
    for kind, kernel, level in ALL:
        grid = any_grid(kind, kernel, level)
        x, o, _ = fresh(3, dtype=torch.float32)
        rows = torch.tensor([grid.steps - 1, 0, 4])
        mixed, guess = grid.mu(x, o, rows), grid.x0_hat(x, o, rows)
        assert mixed.dtype == torch.float32 and grid.time(rows, x).tolist() == grid.timestep[rows].tolist()
        for n, i in enumerate(rows.tolist()):
            assert torch.equal(grid.mu(x, o, i)[n], mixed[n])
            assert torch.equal(grid.x0_hat(x, o, i)[n], guess[n])
            close(mixed[n], mean64(grid, i, x[n].double(), o[n].double()), 2e-5 if kind == "eps" else 1e-6)
        assert grid.time(4, x).tolist() == [float(grid.timestep[4])] * 3


# ---- golden numbers -------------------------------------------------------------------------------------------------
VP_TABLE = """
981 0.005776 0.007282 1.122852 0.232262 0.454463 0.512551 0.889240
501 0.274999 0.302296 1.048456 0.094673 0.294785 0.377184 0.917873
41 0.960873 0.980381 1.010100 0.020099 0.099887 1.017260 0.496408
21 0.980381 0.998296 1.009096 0.018109 0.039480 3.274788 0.086069
1 0.998296 0.999150 1.000428 0.000855 0.020648 1.003189 0.498621
"""
FLOW_TABLE = """
0 1.000000 0.039871 3.505672 0.700000 0.039871 0.056958
1 0.960129 0.046780 3.435074 0.742964 0.058242 0.078391
2 0.913349 0.055657 2.272634 0.536152 0.069293 0.129240
3 0.857692 0.067324 1.718500 0.445897 0.083818 0.187977
4 0.790368 0.083090 1.359203 0.391794 0.103447 0.264033
5 0.707278 0.105128 1.088093 0.352797 0.130884 0.370990
6 0.602151 0.137275 0.861175 0.319070 0.170907 0.535640
7 0.464876 0.186827 0.652438 0.282007 0.232600 0.824803
8 0.278049 0.269120 0.434415 0.225360 0.335055 1.486750
9 0.008929 0.008929 0.066441 0.006278 0.011116 1.770614
"""
CPS_STD = ".9131 .8686 .8157 .7517 .6727 .5727 .4421 .2644 .0085 0"


@pytest.mark.parametrize("row", VP_TABLE.strip().splitlines())
def test_golden_sd15(row):
    """All printed digits on the float64 schedule; diffusers' float32 table moves them by up to 3e-5 of their value."""
    t, *numbers = row.split()
    scheduler = DDIMScheduler(**SD15)
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=F64) ** 2
    scheduler.alphas_cumprod = (1 - betas).cumprod(0)
    scheduler.final_alpha_cumprod = scheduler.alphas_cumprod[0]
    exact, real = common.make_grid(scheduler, "eps", 50, "ddim", 1.0), sd15()[0]
    i = exact.timestep.tolist().index(float(t))
    assert exact.o_coef[i] < 0

    def values(grid):
        a, b = ab(grid)
        return [grid.alpha**2, grid.alpha_s**2, a, b, grid.sigma, -grid.w, grid.sigma**2 / b]

    for value, rounded, text in zip(values(exact), values(real), numbers, strict=True):
        printed(value[i], text)
        assert abs(rounded[i] / value[i] - 1) < 1e-4


def test_golden_sd15_mean_weight():
    grid, _ = sd15()
    printed(-grid.w.mean(), "0.516900")


@pytest.mark.parametrize("row", FLOW_TABLE.strip().splitlines())
def test_golden_sd35(row):
    i, *numbers = row.split()
    grid, _ = sd35()
    values = [grid.t, grid.dt, grid.sigma / grid.dt.sqrt(), grid.sigma, -grid.o_coef, -grid.w]
    for value, text in zip(values, numbers, strict=True):
        printed(value[int(i)], text)


def test_golden_cps_std():
    grid, _ = sd35(10, "cps", 0.8)
    for sigma, text in zip(grid.sigma, CPS_STD.split(), strict=True):
        printed(sigma, text)


@pytest.mark.parametrize("level", [0.3, 0.7, 1.2])
@pytest.mark.parametrize("steps", [4, 10, 40])
def test_at_t_1_sigma_is_the_noise_level(level, steps):
    grid, _ = sd35(steps, "flow_sde", level)
    assert grid.t[0] == 1
    close(grid.sigma[0], level, 1e-12)  # g^2 dt = level^2 (1 / dt) dt
    close(grid.o_coef[0], -grid.dt[0], 0)  # b k is finite: 1 - t = 0 everywhere but in g
    assert torch.isfinite(torch.stack([grid.x_coef, grid.o_coef, grid.sigma, grid.w])).all()


@pytest.mark.parametrize("level", [0.3, 0.7, math.sqrt(2)])
def test_flow_sde_has_constant_sigma2_over_b(level):
    grid, _ = sd35(10, "flow_sde", level)
    close((grid.sigma**2 / ab(grid)[1])[1:], torch.full((9,), 2 * level**2 / (2 + level**2), dtype=F64), 1e-10)


def test_ancestral_has_sigma2_over_b_tending_to_1():
    gaps = []
    for steps in (50, 500):
        grid = common.make_grid(UniformFlow(), "flow", steps, "ancestral", 1.0)
        value = grid.sigma**2 / ab(grid)[1]
        gaps.append(1 - value[steps // 2].item())
    assert 0 < gaps[1] < 0.11 * gaps[0] and gaps[1] < 0.015


# ---- x0_hat ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind,kernel,level", ALL)
def test_x0_hat_inverts_the_forward_process(kind, kernel, level):
    """With the exact output of a point mass, x0_hat is the point at every step, in particular at the data."""
    grid = any_grid(kind, kernel, level)
    x0, eps, _ = fresh(5)
    for i in range(grid.steps):
        alpha, nu = grid.alpha[i], grid.nu[i]
        x, o = alpha * x0 + nu * eps, eps if kind == "eps" else eps - x0
        close(grid.x0_x[i] * x + grid.x0_o[i] * o, x0, 1e-10)
        score = -eps / nu
        if alpha > 0:
            close(grid.x0_x[i] * x + grid.x0_o[i] * o, (x + nu**2 * score) / alpha, 1e-10)
        close(grid.x0_hat(x.float(), o.float(), i), x0, 5e-5)
    if kind == "flow":
        close(grid.alpha + grid.nu, torch.ones(grid.steps), 0)
        assert grid.nu_s[-1] == 0 and grid.alpha_s[-1] == 1
    else:
        close(grid.alpha**2 + grid.nu**2, torch.ones(grid.steps), 1e-14)
    close(grid.nu[1:], grid.nu_s[:-1], 0)
    close(grid.alpha[1:], grid.alpha_s[:-1], 0)


def test_x0_hat_at_the_data_is_the_latent_itself():
    """At nu = 0 Tweedie's estimate does not see the network's output."""

    class Ends(UniformFlow):
        def set_timesteps(self, steps):
            self.sigmas = torch.tensor([1.0, 0.5, 0.0, 0.0], dtype=F64)
            self.timesteps = 1000 * self.sigmas[:-1]

    grid = common.make_grid(Ends(), "flow", 3, "ode", 0.0)
    x, o, _ = fresh(0, dtype=torch.float32)
    assert torch.equal(grid.x0_hat(x, 1e6 * o, 2), x) and not torch.equal(grid.x0_hat(x, o, 1), x)
    # the last mean of the kernels that end without noise is the last estimate
    for kernel, level in (("ancestral", 1.0), ("cps", 0.8), ("ode", 0.0)):
        grid, _ = sd35(10, kernel, level)
        close(grid.mu(x, o, 9), grid.x0_hat(x, o, 9), 1e-6)


# ---- steps without a density ----------------------------------------------------------------------------------------
def test_last_step_of_sd15_has_noise_unless_the_final_alpha_is_1():
    grid, _ = sd15()
    printed(grid.sigma[-1], "0.020648")
    assert common.policy_steps(grid, 50) == list(range(50))
    grid, _ = sd15(set_alpha_to_one=True)
    assert grid.sigma[-1] == 0 and (grid.sigma[:-1] > 0.02).all()
    assert common.policy_steps(grid, 50) == list(range(49))
    x, o, _ = fresh(1)
    close(mean64(grid, 49, x, o), (x - grid.nu[49] * o) / grid.alpha[49], 1e-12)  # performed all the same


@pytest.mark.parametrize("kernel,level", [("ancestral", 1.0), ("cps", 0.8)])
def test_last_flow_step_without_noise_is_not_a_step_of_the_policy(kernel, level):
    grid, _ = sd35(10, kernel, level)
    assert grid.sigma[9] == 0 and common.policy_steps(grid, 10) == list(range(9))
    assert common.policy_steps(grid, 4) == list(range(4))


def test_last_flow_sde_step_has_noise():
    assert common.policy_steps(sd35()[0], 10) == list(range(10))


@pytest.mark.parametrize("kernel,level", [("ode", 0.0), ("flow_sde", 1e-8)])
def test_no_stochastic_step_left_is_a_usage_error(kernel, level):
    with pytest.raises(common.UsageError, match="--noise-level"):
        common.policy_steps(sd35(10, kernel, level)[0], 9)


# ---- densities ------------------------------------------------------------------------------------------------------
def total(x, how):
    return x.flatten(1).mean(1) if how == "mean" else x.flatten(1).sum(1)


@pytest.mark.parametrize("how", ["mean", "sum"])
def test_gaussian_logp_is_torch_normal(how):
    x, mu, sigma = fresh(11)
    close(common.gaussian_logp(x, mu, 0.37, how), total(Normal(mu, 0.37).log_prob(x), how), 1e-11)
    per_row = sigma[:, :1, :1, :1].abs() + 0.1
    close(common.gaussian_logp(x, mu, per_row, how), total(Normal(mu, per_row).log_prob(x), how), 1e-9)


@pytest.mark.parametrize("how", ["mean", "sum"])
@pytest.mark.parametrize("kind,kernel,level", [k for k in ALL if k[1] != "ode"])
def test_log_ratio_and_kl_are_those_of_the_gaussians(kind, kernel, level, how):
    grid = any_grid(kind, kernel, level)
    for i in common.policy_steps(grid, grid.steps):
        x, o_a, z = fresh(i)
        o_b = o_a + 0.1 * fresh(i + 1000)[1]
        mu_a, mu_b, sigma = mean64(grid, i, x, o_a), mean64(grid, i, x, o_b), grid.sigma[i]
        x_s = mu_b + sigma * z
        delta = grid.w[i] * (o_a - o_b)
        expected = common.gaussian_logp(x_s, mu_a, sigma, how) - common.gaussian_logp(x_s, mu_b, sigma, how)
        close(common.log_ratio(delta, z, how), expected, 1e-9)
        kl = total(torch_kl(Normal(mu_a, sigma), Normal(mu_b, sigma)), how)
        close(common.kl_divergence(delta, how), kl, 1e-10)
        close(common.kl_divergence(-delta, how), kl, 1e-10)


def test_log_ratio_keeps_small_digits_in_float32():
    """A shift of 1e-5 standard deviations: the difference of two float32 log-densities would be noise."""
    _, delta, z = (v.float() * 1e-5 for v in fresh(2, (2, 16, 8, 8)))
    z = z * 1e5
    expected = total(delta.double() * z.double() - 0.5 * delta.double() ** 2, "mean")
    error = (common.log_ratio(delta, z, "mean") - expected).abs() / expected.abs()
    assert error.max() < 1e-4


# ---- marginals: every kernel is linear, so mean and variance propagate in closed form -------------------------------
def propagate(grid, output, mean, var):
    """Mean and variance at the end; output(i) = (slope, offset) of o = slope x + offset."""
    for i in range(grid.steps):
        slope, offset = output(i)
        gain = (grid.x_coef[i] + grid.o_coef[i] * slope).item()
        mean, var = gain * mean + grid.o_coef[i].item() * offset, gain**2 * var + grid.sigma[i].item() ** 2
    return mean, var


M, TAU2 = 0.7, 0.49  # data N(0.7, 0.49)


def gaussian_output(grid):
    """The exact network for Gaussian data, as (slope, offset)."""

    def output(i):
        alpha, nu = grid.alpha[i].item(), grid.nu[i].item()
        var = alpha**2 * TAU2 + nu**2
        if grid.kind == "eps":  # eps_hat = -nu S, S = -(x - alpha m) / var
            return nu / var, -nu * alpha * M / var
        slope = (nu - alpha * TAU2) / var
        return slope, -M - slope * alpha * M

    return output


def start(grid):
    alpha, nu = grid.alpha[0].item(), grid.nu[0].item()
    return alpha * M, alpha**2 * TAU2 + nu**2


def within_print(value, text, relative=0.0):
    digits = len(text.split(".")[1])
    tolerance = max(0.5000001 * 10**-digits, relative * abs(float(text)))
    assert abs(value - float(text)) <= tolerance, f"{value!r} is not {text}"


MARGINALS = [
    ("ode", 0.0, "-0.115", "-0.0129", "-0.0013"),
    ("flow_sde", 0.7, "-0.034", "0.0025", "0.0023"),
    ("dance", 0.3, "-0.104", "-0.0116", "-0.0012"),
    ("ancestral", 1.0, "-0.182", "-0.0268", "-0.0029"),
    ("cps", 0.7, "-0.212", "-0.147", "-0.136"),
]


@pytest.mark.parametrize("kernel,level,n10,n100,n1000", MARGINALS)
def test_flow_marginals(kernel, level, n10, n100, n1000):
    """Error of the final variance on the uniform grid; CPS keeps the coefficients, not the marginals."""
    for steps, text in ((10, n10), (100, n100), (1000, n1000)):
        grid = common.make_grid(UniformFlow(), "flow", steps, kernel, level)
        mean, var = propagate(grid, gaussian_output(grid), *start(grid))
        close(mean, M, 1e-9)
        within_print(var - TAU2, text)


@pytest.mark.parametrize(
    "eta,n50,n500", [(0, "-0.0405", "-0.0052"), (0.5, "-0.0466", "-0.0064"), (1, "-0.0688", "-0.0109")]
)
def test_vp_marginals_in_continuous_time(eta, n50, n500):
    for steps, text in ((50, n50), (500, n500)):
        grid = common.make_grid(UniformVP(steps), "eps", steps, "ddim", eta)
        mean, var = propagate(grid, gaussian_output(grid), *start(grid))
        close(mean, M, 1e-9)
        within_print(var - TAU2, text)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_vp_marginals_on_the_real_grid(eta):
    """SD1.5's own 50 and 500 steps end at alphas_bar_0 = 0.99915: the target has its mean and variance."""
    errors = []
    for steps in (50, 500):
        grid, scheduler = sd15(steps, "ddim", eta)
        mean, var = propagate(grid, gaussian_output(grid), *start(grid))
        last = scheduler.alphas_cumprod[0].double().item()
        close(mean, math.sqrt(last) * M, 1e-9)
        errors.append(var - (last * TAU2 + 1 - last))
    assert -0.09 < errors[0] < -0.02 and abs(errors[1]) < 0.2 * abs(errors[0])


@pytest.mark.parametrize("kind,kernel,level", [k for k in ALL if k[1] not in ("flow_sde", "dance")])
def test_point_mass_is_exact_in_every_step(kind, kernel, level):
    """All but the Euler-Maruyama kernels take alpha_t x_0 + nu_t eps to alpha_s x_0 + nu_s eps exactly."""
    grid, point = any_grid(kind, kernel, level), 1.3
    for i in range(grid.steps):
        slope, offset = point_output(grid, i, point)
        gain = (grid.x_coef[i] + grid.o_coef[i] * slope).item()
        close(gain * grid.alpha[i] * point + grid.o_coef[i] * offset, grid.alpha_s[i] * point, 1e-10)
        close(gain**2 * grid.nu[i] ** 2 + grid.sigma[i] ** 2, grid.nu_s[i] ** 2, 1e-10)


def point_output(grid, i, point):
    alpha, nu = grid.alpha[i].item(), grid.nu[i].item()
    return (1 / nu, -alpha * point / nu) if grid.kind == "eps" else (1 / nu, -point / nu)  # v = (x - x_0) / t


@pytest.mark.parametrize(
    "kernel,level,i,text",
    [("flow_sde", 0.7, 4, "0.5258"), ("dance", 0.3, 4, "0.5011"), ("flow_sde", 0.7, 8, "0.0576")],
)
def test_euler_maruyama_inflates_the_variance_of_a_point_mass(kernel, level, i, text):
    grid, _ = sd35(10, kernel, level)
    slope, offset = point_output(grid, i, 1.3)
    gain = (grid.x_coef[i] + grid.o_coef[i] * slope).item()
    close(gain * grid.alpha[i] * 1.3 + grid.o_coef[i] * offset, grid.alpha_s[i] * 1.3, 1e-10)  # the mean is exact
    printed(gain**2 * grid.nu[i] ** 2 + grid.sigma[i] ** 2, text)
    printed(grid.nu_s[i] ** 2, {4: "0.5002", 8: "0.00008"}[i])
