"""awm.py's pure functions, noisings and samplers against formulas, exact solutions and the theory of the paper."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

import awm
import common
import harness
import rewards

F64 = torch.float64
WEIGHTS = ["uniform", "elbo", "t", "t2", "huber", "ghuber"]
MODELS = {"flow": "tiny-sd35", "eps": "tiny-sd15"}


def randn(*shape, scale=1.0):
    return scale * torch.randn(*shape, dtype=F64)


def close(actual, expected, tolerance=1e-9):
    torch.testing.assert_close(actual, torch.as_tensor(expected), rtol=tolerance, atol=tolerance, check_dtype=False)


def schedulers():
    settings = dict(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1, clip_sample=False
    )
    ddim = DDIMScheduler(**settings, set_alpha_to_one=False, timestep_spacing="leading")
    return {"eps": ddim, "flow": FlowMatchEulerDiscreteScheduler(shift=3.0)}


def arguments(kind, *flags):
    small = "--preset tiny --num-prompts 2 --group-size 4".split()
    return awm.parse_args([*small, "--model", MODELS[kind], *map(str, flags)])


class GaussianPolicy:
    """The exact network of data N(m, tau^2 I), method_notes F.4: sampling has a closed form."""

    latent_shape, device, store = (2, 8, 8), *[torch.device("cpu")] * 2

    def __init__(self, kind, mean=0.7, tau=0.6):
        self.kind, self.mean, self.tau = kind, mean, tau
        self.pipe = SimpleNamespace(scheduler=schedulers()[kind])
        self.seen = []

    def grid(self, *kernel):
        return common.make_grid(self.pipe.scheduler, self.kind, *kernel)

    def predict(self, x, time, cond, cfg):
        assert time.shape == (len(x),) and x.dtype == torch.float32
        self.seen.append((x.clone(), time.clone(), cond))
        x, time, tau2 = x.double(), time.double()[:, None, None, None], self.tau**2
        if self.kind == "flow":
            t = time / 1000
            var = (1 - t) ** 2 * tau2 + t**2
            return (-self.mean + (t - (1 - t) * tau2) / var * (x - (1 - t) * self.mean)).float()
        alpha, nu = self.levels(time)
        return (nu * (x - alpha * self.mean) / (alpha**2 * tau2 + nu**2)).float()

    def levels(self, time):
        """alpha, nu at an index 0 ... 999 or between two."""
        log_abar = self.pipe.scheduler.alphas_cumprod.double().log()
        below = time.floor().long().clamp(0, 998)
        abar = (log_abar[below] + (time - below) * (log_abar[below + 1] - log_abar[below])).exp()
        return abar.sqrt(), (1 - abar).sqrt()

    def ode_solution(self, noise):
        """x_0 of the probability-flow ODE that starts at `noise`."""
        if self.kind == "flow":
            return self.mean + self.tau * noise
        alpha, nu = self.levels(torch.tensor(999.0, dtype=F64))
        return self.mean + self.tau * (noise - alpha * self.mean) / (alpha**2 * self.tau**2 + nu**2).sqrt()


def bare_policy(scheduler, kind):
    """As much of a policy as noisings need."""
    grid = lambda *kernel: common.make_grid(scheduler, kind, *kernel)  # noqa: E731
    return SimpleNamespace(kind=kind, device="cpu", pipe=SimpleNamespace(scheduler=scheduler), grid=grid)


class Rows:
    """Stands for Cond: remembers which rows it was indexed with."""

    def __init__(self, index):
        self.index = index

    def __getitem__(self, rows):
        return Rows(self.index[rows])


def gaussian_batch(policy, count, steps, first=0, seed=0):
    noise = common.sample_noise(seed, 0, range(first, first + count), steps, policy.latent_shape, "cpu")
    return common.Batch([], range(first, first + count), Rows(torch.arange(first, first + count)), noise)


# ---- the matching error and its weights -----------------------------------------------------------------------------
def test_matching_error_is_a_mean_in_float64():
    o, target = torch.randn(3, 4, 5, 6), torch.randn(3, 4, 5, 6)
    error = awm.matching_error(o, target)
    assert error.dtype == F64 and error.shape == (3,)
    loops = [
        sum((a - b) ** 2 for a, b in zip(x.flatten().tolist(), y.flatten().tolist())) / 120 for x, y in zip(o, target)
    ]
    assert error.tolist() == pytest.approx(loops, rel=1e-6)


def test_weights_are_the_printed_formulas():
    e, t = torch.rand(5, 4, dtype=F64) + 1e-3, torch.rand(5, 4, dtype=F64)
    p = 0.3
    printed = {
        "uniform": e, "elbo": (1 - t) / t * e, "t": t * e, "t2": t**2 * e, "huber": ((e + 1e-10).sqrt() - 1e-5) * t,
        "ghuber": ((e + 1e-10).pow(p) - 1e-10**p) * t / p,
    }  # fmt: skip
    assert list(printed) == WEIGHTS
    for kind, value in printed.items():
        close(awm.weighted_error(e, t, kind, p), value, 1e-12)
    close(
        awm.weighted_error(e, t, "ghuber"), ((e + 1e-10) ** 0.25 - 1e-10**0.25) * t / 0.25, 1e-12
    )  # the default power
    zero = torch.zeros_like(e)
    for kind in WEIGHTS:
        assert awm.weighted_error(zero, t, kind).abs().max() < 1e-15
        assert torch.isfinite(
            torch.autograd.grad(awm.weighted_error(zero.requires_grad_(), t, kind).sum(), zero)[0]
        ).all()
    close(awm.weighted_error(e, torch.ones_like(t), "elbo"), torch.zeros_like(e))  # t = 1 carries no evidence


# ---- the policy loss ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("clip_range", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("ratio", ["mean-then-exp", "exp-each"])
def test_on_policy_gradient_is_advantage_times_flow_matching(ratio, clip_range):
    """G28: with the old policy theta itself, ratio = 1 and the gradient is A grad E_t[w(t) ||v - v*||^2]."""
    adv, t, target, v = randn(5), torch.rand(5, 3, dtype=F64), randn(15, 2, 4, 4), randn(15, 2, 4, 4).requires_grad_()
    for kind in WEIGHTS:
        weighted = awm.weighted_error(awm.matching_error(v, target).view(5, 3), t, kind)
        loss, log_ratio = awm.awm_loss(adv, weighted, weighted.detach(), ratio, clip_range)
        assert loss.shape == (5,) and (log_ratio == 0).all()
        close(loss, -adv, 1e-14)
        ours = torch.autograd.grad(loss.sum(), v, retain_graph=True)[0]
        e = ((v - target) ** 2).mean((1, 2, 3)).view(5, 3)
        flow_matching = awm.weighted_error(e, t, kind).mean(1)
        close(ours, torch.autograd.grad((adv * flow_matching).sum(), v)[0], 1e-12)
    assert ours.abs().min() > 0


def test_off_policy_ratios_are_eq_11():
    adv, new, old = randn(200), torch.rand(200, 4, dtype=F64), torch.rand(200, 4, dtype=F64)
    first, log_ratio = awm.awm_loss(adv, new, old, "mean-then-exp")
    assert log_ratio.shape == (200, 1)
    close(first, -adv * torch.exp((old - new).mean(1)), 1e-12)  # l = -weighted error
    each, log_ratio = awm.awm_loss(adv, new, old, "exp-each")
    assert log_ratio.shape == (200, 4)
    close(each, -adv * torch.exp(old - new).mean(1), 1e-12)
    assert (first - each).abs().max() > 1e-2
    xi = 0.2
    for ratio, values in (("mean-then-exp", (old - new).mean(1, keepdim=True).exp()), ("exp-each", (old - new).exp())):
        loss, _ = awm.awm_loss(adv, new, old, ratio, xi)
        rows = [
            sum(max(-a * r, -a * min(max(r, 1 - xi), 1 + xi)) for r in row) / len(row)
            for a, row in zip(adv.tolist(), values.tolist())
        ]
        assert loss.tolist() == pytest.approx(rows, abs=1e-12)


def test_the_better_image_is_pulled_closer_and_the_worse_pushed_away():
    v = randn(2, 1, 2, 2).requires_grad_()
    target = v.detach() + 1
    error = awm.matching_error(v, target).view(2, 1)
    loss, _ = awm.awm_loss(torch.tensor([1.0, -1.0]), error, error.detach(), "mean-then-exp")
    step = -torch.autograd.grad(loss.sum(), v)[0]
    assert (step[0] > 0).all() and (step[1] < 0).all()


# ---- noise prediction -----------------------------------------------------------------------------------------------
def test_eps_error_is_a_weighted_velocity_error():
    """SD1.5's docstring: seen as a rectified flow at t = nu / (alpha + nu), v_theta - v = (e_theta - e) / (1 - t)."""
    # the second time for a rectified flow written as VP, whose bound is the flow's
    times = (torch.arange(100_000, dtype=F64) + 0.5) / 100_000
    flow = ((1 - times) / times) ** 2
    index = torch.randint(1000, 99_000, (6,))
    for abar, elbo in (
        (schedulers()["eps"].alphas_cumprod.double()[torch.randint(1000, (6,))], None),
        ((flow / (1 + flow))[index], awm.elbo_weights(flow / (1 + flow))[index]),
    ):
        check_eps_error(abar, elbo)


def check_eps_error(abar, elbo):
    alpha, nu = abar.sqrt(), (1 - abar).sqrt()
    a, n = alpha[:, None, None, None], nu[:, None, None, None]
    x0, e, e_theta = randn(6, 2, 4, 4), randn(6, 2, 4, 4), randn(6, 2, 4, 4)
    x_t = a * x0 + n * e
    t = nu / (alpha + nu)
    y, s = x_t / (a + n), t[:, None, None, None]  # the same state on the rectified flow
    close(y, (1 - s) * x0 + s * e, 1e-12)
    x0_theta = (x_t - n * e_theta) / a
    v_theta = (y - x0_theta) / s  # y - t v = x_0
    v_error, e_error = awm.matching_error(v_theta, e - x0), awm.matching_error(e_theta, e)
    close(v_error, e_error / (1 - t) ** 2, 1e-9)
    if elbo is not None:
        weighted = awm.weighted_error(e_error, t, "elbo", elbo=elbo)
        close(weighted, awm.weighted_error(v_error, t, "elbo"), 1e-5)
        close(weighted, e_error / (t * (1 - t)), 1e-5)


def test_elbo_of_a_noise_predicting_model_is_the_evidence_bound():
    """tiny-sd15's schedule: -1/2 d logSNR / du by differences, and the exact discrete bound, whose term at index i is
    (SNR_{i-1} / SNR_i - 1) / 2 ||e - e_hat||^2 summed over i, hence 1000 times that as a mean over i."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=F64) ** 2
    abar = torch.cumprod(1 - betas, 0)
    config = json.loads((harness.HERE / "tiny" / "sd15" / "scheduler" / "scheduler_config.json").read_text())
    assert (config["beta_start"], config["beta_end"], config["beta_schedule"]) == (0.00085, 0.012, "scaled_linear")
    scheduler = DDIMScheduler.from_config(config)
    policy = bare_policy(scheduler, "eps")
    draw = awm.Noising(arguments("eps", "--timesteps", "uniform", "--t-min", 1e-6), policy)
    snr = (abar / (1 - abar)).tolist()
    differences = [(math.log(snr[i - 1]) - math.log(snr[i + 1])) * 1000 / 4 for i in range(1, 999)]
    assert draw.elbo.shape == (1000,) and (draw.elbo > 0).all()
    assert draw.elbo[1:-1].tolist() == pytest.approx(differences, rel=1e-3)  # the scheduler's betas are float32
    bound = [1000 * (snr[i - 1] / snr[i] - 1) / 2 for i in range(30, 1000)]
    assert draw.elbo[30:].tolist() == pytest.approx(bound, rel=0.04)
    batch = SimpleNamespace(indices=range(4), cond=Rows(torch.arange(4)))
    elbo = draw.rows(torch.tensor([2, 0]), torch.randn(4, 4, 3, 3), batch, 1).elbo
    _, _, timestep, *_ = draw(torch.randn(2, 4, 3, 3), 1, [2, 0])
    close(elbo, draw.elbo[timestep.long()].float())  # an image's weights are those of its own times
    error, t = torch.rand(2, 4, dtype=F64), torch.rand(2, 4, dtype=F64)
    close(awm.weighted_error(error, t, "elbo", elbo=elbo), elbo * error)


@pytest.mark.parametrize("kind", ["flow", "eps"])
def test_x0_hat(kind):
    x0, e, nu = randn(5, 2, 3, 3), randn(5, 2, 3, 3), torch.rand(5, dtype=F64)
    alpha = 1 - nu if kind == "flow" else (1 - nu**2).sqrt()
    x_t = alpha[:, None, None, None] * x0 + nu[:, None, None, None] * e
    close(awm.x0_hat(kind, x_t, alpha, nu, e - x0 if kind == "flow" else e), x0, 1e-9)


# ---- noisings -------------------------------------------------------------------------------------------------------
def noising(kind, *flags, **changes):
    args = arguments(kind, *flags)
    vars(args).update(changes)
    return awm.Noising(args, bare_policy(schedulers()[kind], kind))


@pytest.mark.parametrize("kind", ["flow", "eps"])
@pytest.mark.parametrize("law", ["discrete", "uniform", "logit-normal"])
def test_noisings_are_the_forward_process(kind, law):
    x0 = torch.randn(6, 4, 3, 3)
    x_t, target, timestep, t, alpha, nu = noising(kind, "--timesteps", law, "--train-timesteps", 5)(x0, 2, range(6))
    assert x_t.shape == target.shape == (6, 5, 4, 3, 3) and timestep.shape == t.shape == alpha.shape == nu.shape == (
        6,
        5,
    )
    assert all(v.dtype == torch.float32 for v in (x_t, target, timestep, t, alpha, nu))
    a, n = alpha[..., None, None, None], nu[..., None, None, None]
    if kind == "flow":
        close(alpha, 1 - timestep / 1000, 1e-6), close(nu, timestep / 1000, 1e-6), close(t, timestep / 1000, 1e-6)
        e = target + x0[:, None]
    else:
        assert (timestep == timestep.round()).all()
        abar = schedulers()["eps"].alphas_cumprod[timestep.long()]
        close(alpha, abar.sqrt(), 1e-6), close(nu, (1 - abar).sqrt(), 1e-6), close(t, nu / (alpha + nu), 1e-6)
        e = target
    close(x_t, a * x0[:, None] + n * e, 1e-5)
    assert len({round(v, 4) for v in e.flatten().tolist()}) > 0.9 * e.numel()  # every noising has its own noise
    assert abs(e.mean()) < 0.15 and abs(e.std() - 1) < 0.1


@pytest.mark.parametrize("kind", ["flow", "eps"])
def test_noisings_belong_to_seed_epoch_and_image_alone(kind):
    x0 = torch.randn(8, 2, 3, 3)
    draw = noising(kind, "--seed", 5)
    whole = draw(x0, 3, range(8))
    for again, want in zip(draw(x0, 3, range(8)), whole):  # the same for every policy that asks
        assert torch.equal(again, want)
    order = torch.randperm(8)
    for part, want in zip(draw(x0[order], 3, order.tolist()), whole):
        assert torch.equal(part, want[order])
    for rows in order.split(3):
        for part, want in zip(draw(x0[rows], 3, rows.tolist()), whole):
            assert torch.equal(part, want[rows])
    for other in (draw(x0, 4, range(8)), noising(kind, "--seed", 6)(x0, 3, range(8)), draw(x0, 3, range(8, 16))):
        assert not torch.isclose(other[0], whole[0]).flatten(1).all(1).any()
    torch.manual_seed(0)
    state = torch.get_rng_state()
    draw(x0, 3, range(8))
    assert torch.equal(torch.get_rng_state(), state)


def times(draw, count=2000):
    return torch.stack([draw.timesteps(common.generator("law", n)) for n in range(count)])


@pytest.mark.parametrize("kind", ["flow", "eps"])
@pytest.mark.parametrize(
    "flags, used",
    [("", range(9)), ("--skip-first", range(1, 9)), ("--no-stratified", range(9)),
     ("--train-fraction 0.7", range(7))],
)  # fmt: skip
def test_discrete_law_covers_the_samplers_grid_equally(kind, flags, used):
    fraction = [] if "fraction" in flags else ["--train-fraction", 0.9]
    draw = noising(kind, "--steps", 10, "--train-timesteps", 4, *fraction, *flags.split())
    steps = 20 if "grid" in flags else 10
    scheduler = schedulers()[kind]
    scheduler.set_timesteps(steps)
    grid = scheduler.timesteps.double()[list(used)]
    drawn = times(draw, 3000)
    assert set(drawn.flatten().tolist()) == set(grid.tolist())
    counts = torch.stack([(drawn == g).sum() for g in grid]).double()
    expected = drawn.numel() / len(grid)
    assert ((counts - expected).abs() < 4.5 * expected**0.5).all(), counts
    assert (drawn == 1000).any() == (kind == "flow" and 0 in used)


@pytest.mark.parametrize("law", ["discrete", "uniform", "logit-normal"])
def test_stratified_draws_come_one_from_each_bin(law):
    draw = noising(
        "flow", "--timesteps", law, "--steps", 20, "--train-fraction", 1, "--train-timesteps", 5, "--t-min", 1e-6
    )
    drawn = times(draw, 400)
    independent = times(
        noising("flow", "--timesteps", law, "--train-timesteps", 5, "--no-stratified", "--t-min", 1e-6), 400
    )
    if law == "discrete":  # 20 steps, 5 bins of 4
        place = {t: j // 4 for j, t in enumerate(draw.grid.tolist())}
        bins = torch.tensor([[place[t] for t in row] for row in drawn.tolist()])
        assert (bins == torch.arange(5)).all()
    else:
        t = drawn / 1000
        u = t if law == "uniform" else torch.special.ndtr((t / (3 - 2 * t)).logit())  # undo the shift, the sigmoid
        assert ((u * 5).floor() == torch.arange(5)).all()
    assert drawn.std(0).mean() < 0.4 * independent.std()
    whole = [
        len(set(row))
        for row in times(noising("flow", "--steps", 10, "--train-timesteps", 10, "--train-fraction", 1), 20).tolist()
    ]
    assert whole == [10] * 20  # as many noisings as steps: each step once


def quantiles(x, q):
    return torch.quantile(x.flatten(), q)


def test_uniform_law():
    q = torch.linspace(0.02, 0.98, 25, dtype=F64)
    for kind in ("flow", "eps"):
        t = times(noising(kind, "--timesteps", "uniform", "--t-min", 0.2, "--train-timesteps", 8)) / 1000
        close(quantiles(t, q), 0.2 + 0.8 * q, 5e-3 if kind == "flow" else 6e-3)
        assert t.min() >= 0.2 - 1e-3 and t.max() <= 1


def test_logit_normal_law_with_the_models_shift():
    """t = 3 s / (1 + 2 s), s = sigmoid(N(0, 1)), clamped from below; SD1.5 has no shift."""
    q = torch.linspace(0.02, 0.98, 25, dtype=F64)
    s = torch.sigmoid(torch.distributions.Normal(0.0, 1.0).icdf(q))
    for kind, truth in (("flow", 3 * s / (1 + 2 * s)), ("eps", s)):
        t = times(noising(kind, "--timesteps", "logit-normal", "--train-timesteps", 8)) / 1000
        close(quantiles(t, q), truth, 1e-2)
    low = times(noising("flow", "--timesteps", "logit-normal", "--t-min", 0.5), 200) / 1000
    assert low.min() == 0.5 and (low == 0.5).double().mean().item() == pytest.approx(
        torch.distributions.Normal(0.0, 1.0).cdf(torch.tensor(0.25).logit()).item(), abs=0.05
    )  # 3 s / (1 + 2 s) < 1/2 for s < 1/4


def test_eps_timesteps_are_training_indices():
    for law in ("uniform", "logit-normal"):
        t = times(noising("eps", "--timesteps", law, "--t-min", 1e-6, "--train-timesteps", 8))
        assert (t == t.round()).all() and t.min() >= 0 and t.max() <= 999 and len(t.unique()) > 500


# ---- the lagged copy ------------------------------------------------------------------------------------------------
def test_lag_decay_schedules():
    release = awm.parse_args(["--preset", "tiny", "--lag-coef", "1"])
    nft = awm.PRESETS["nft-ocr"]
    for step in range(400):
        ours = awm.lag_decay(step, release.lag_decay_max, release.lag_decay_slope, release.lag_decay_start)
        assert ours == pytest.approx(min(0.3, 0.001 * step))
        ours = awm.lag_decay(step, nft["lag_decay_max"], nft["lag_decay_slope"], nft["lag_decay_start"])
        assert ours == pytest.approx(0 if step < 75 else min(0.0075 * (step - 75), 0.999))
    assert awm.PRESETS["nft-geneval"]["lag_decay_max"] == 0.5
    settings = (nft["lag_decay_max"], nft["lag_decay_slope"], nft["lag_decay_start"])
    for epoch, value in ((37, 0.0), (38, 0.0075), (60, 0.3375), (100, 0.9375)):  # ends of these epochs, from 1
        assert awm.lag_decay(epoch * nft["updates_per_epoch"], *settings) == pytest.approx(value)


def test_the_lagged_copy_counts_optimiser_steps(tmp_path):
    """Copy <- d copy + (1 - d) theta with d of all steps so far: two an epoch here, also after a resume."""
    small = "--preset tiny --num-prompts 2 --group-size 2 --steps 2 --train-timesteps 1 --train-fraction 1"
    small += " --eval-images 2 --sample-every 0"
    small += " --lag-coef 1 --lag-decay-slope 0.1 --lag-decay-start 1 --lag-decay-max 0.6"
    awm.main(awm.parse_args([*small.split(), "--epochs", "2", "--runs", str(tmp_path), "--name", "run"]))
    awm.main(awm.parse_args(["--resume", str(tmp_path / "run"), "--epochs", "4"]))
    rows = [row.split(",") for row in (tmp_path / "run" / "metrics.csv").read_text().splitlines()]
    decays = [float(row[rows[0].index("lag/decay")]) for row in rows[2:]]
    assert decays == pytest.approx([0.1, 0.3, 0.5, 0.6])


# ---- the official laws of t -----------------------------------------------------------------------------------------
def official_bins(first, stop, count):
    """train_sd3_awm.py: bounds linspace(first, stop, count + 1).long()."""
    bounds = [int(first + (stop - first) * j / count + 1e-9) for j in range(count + 1)]
    return [list(range(a, b)) for a, b in zip(bounds, bounds[1:])]


def test_integer_bins_are_the_official_ones():
    assert official_bins(1, 12, 6) == [[1], [2, 3], [4, 5], [6, 7], [8, 9], [10, 11]]
    assert official_bins(1, 12, 5) == [[1, 2], [3, 4], [5, 6], [7, 8], [9, 10, 11]]
    for first, stop, count in ((1, 12, 6), (1, 12, 5), (0, 12, 6), (1, 9, 6), (1, 30, 7)):
        drawn = torch.stack([awm.integer_bins(torch.rand(count, dtype=F64), first, stop) for _ in range(4000)])
        for column, allowed in zip(drawn.T, official_bins(first, stop, count)):
            values, counts = column.unique(return_counts=True)
            assert values.tolist() == allowed
            expected = len(drawn) / len(allowed)
            assert ((counts - expected).abs() < 5 * expected**0.5).all()


@pytest.mark.parametrize("law, first", [("--skip-first", []), ("--timesteps discrete-with-init", [0])])
def test_official_discrete_laws_put_an_index_into_every_set(law, first):
    """AWM's release: 14 steps, the first 12, six noisings; times of the unchanged grid 1, .97306, ..., .00893."""
    flags = ["--steps", 14, "--train-timesteps", 6, "--train-fraction", 0.9, *law.split()]
    drawn = times(noising("flow", *flags), 2000) / 1000
    u = 1 - torch.arange(14, dtype=F64) / 13  # the model's grid: evenly from 1 to 1/1000, shifted twice by 3
    u = 0.002994 + u * (1 - 0.002994)
    grid = 3 * u / (1 + 2 * u)
    close(grid[[1, 12, 13]], [0.97306, 0.2062, 0.00893], 1e-4)
    bins = [[j] for j in first] + official_bins(1, 12, 6 - len(first))
    for column, allowed in zip(drawn.T, bins):
        close(column.unique().flip(0), grid[allowed], 1e-4)
    free = noising("flow", *flags, "--no-stratified")  # without the bins a set need not hold index 1
    if not first:
        assert (times(free, 200).max(1).values < 973).any()


def test_subset_law_draws_no_step_twice():
    """DiffusionNFT: nine of all ten times of the grid, a random permutation for every image."""
    drawn = times(noising("flow", *"--timesteps subset --train-timesteps 9 --steps 10 --train-fraction 1".split()))
    grid = schedulers()["flow"]
    grid.set_timesteps(10)
    grid = grid.timesteps.double()
    place = (drawn[:, :, None] - grid).abs().argmin(2)
    close(grid[place], drawn, 1e-6)
    assert (place.sort(1).values.diff(dim=1) > 0).all()
    left = 45 - place.sum(1)  # the step that is left out
    assert ((left.bincount(minlength=10) - 200).abs() < 5 * 200**0.5).all()
    assert ((place[:, 0].bincount(minlength=10) - 200).abs() < 5 * 200**0.5).all()  # in random order


def test_shifted_uniform_law_is_the_official_uniform():
    q = torch.linspace(0.02, 0.98, 25, dtype=F64)
    for kind, shift in (("flow", 3), ("eps", 1)):
        flags = ["--timesteps", "uniform-shifted", "--t-min", 0.2, "--train-timesteps", 8]
        t, u = times(noising(kind, *flags)) / 1000, 0.2 + 0.8 * q
        close(quantiles(t, q), shift * u / (1 + (shift - 1) * u), 6e-3)


def test_laws_without_steps_are_refused(capsys):
    for flags in ("--timesteps subset --train-timesteps 10", "--timesteps discrete-with-init --train-fraction 0.1"):
        with pytest.raises(SystemExit) as stop:
            arguments("flow", "--steps", 10, *flags.split())
        message = capsys.readouterr().err.strip()
        assert stop.value.code == 2 and "\n" not in message and ("subset" in message or "leaves no step" in message)


# ---- theory of the paper --------------------------------------------------------------------------------------------
def kappa(s, t):
    return (1 - t) ** 2 * s**2 / (t**2 * (t**2 * (1 - s) ** 2 - s**2 * (1 - t) ** 2))


def test_kappa_is_zero_at_data_and_increases():
    for t in (0.2, 0.6, 0.95):
        values = [kappa(s, t) for s in torch.linspace(0, 0.99 * t, 50, dtype=F64).tolist()]
        assert values[0] == 0 and all(a < b for a, b in zip(values, values[1:])) and kappa(0.999999 * t, t) > 1e3
        s = 0.4 * t
        a = (1 - t) / (1 - s)
        q = t**2 - a**2 * s**2
        assert kappa(s, t) == pytest.approx(a**2 * s**2 / (q * t**2), rel=1e-12)


@pytest.mark.parametrize("s, t", [(0.1, 0.3), (0.3, 0.6), (0.5, 0.7), (0.6, 0.95)])
def test_noisy_conditioning_adds_kappa_to_covariance_risk_and_variance(s, t):
    """G29 on a three-component mixture in the plane, given one x_t; x_s is drawn by Bayes' rule from (x_0, x_t)."""
    gen, n, d = torch.Generator().manual_seed(int(1000 * t)), 600_000, 2
    means, tau2 = torch.tensor([[1.5, 0.0], [-1.0, 1.0], [0.0, -1.2]], dtype=F64), 0.36
    x_t = (1 - t) * means[0] + torch.tensor([0.4, -0.7], dtype=F64)
    # posterior of x_0: component by its evidence, then a Gaussian
    total = (1 - t) ** 2 * tau2 + t**2
    odds = torch.softmax(-((x_t - (1 - t) * means) ** 2).sum(1) / (2 * total), 0)
    k = torch.multinomial(odds, n, True, generator=gen)
    precision = 1 / tau2 + (1 - t) ** 2 / t**2
    mean = (means[k] / tau2 + (1 - t) * x_t / t**2) / precision
    x_0 = mean + torch.randn(n, d, dtype=F64, generator=gen) / precision**0.5
    a = (1 - t) / (1 - s)
    q = t**2 - a**2 * s**2  # x_t | x_s ~ N(a x_s, q)
    precision = 1 / s**2 + a**2 / q
    x_s = ((1 - s) * x_0 / s**2 + a * x_t / q) / precision + torch.randn(
        n, d, dtype=F64, generator=gen
    ) / precision**0.5
    clean, noisy = -(x_t - (1 - t) * x_0) / t**2, -(x_t - a * x_s) / q
    scale = clean.std()
    close(noisy.mean(0) / scale, clean.mean(0) / scale, 2e-2)  # the same conditional mean
    excess = (torch.cov(noisy.T) - torch.cov(clean.T)) / kappa(s, t)
    close(excess, torch.eye(d, dtype=F64), 2e-2 * (1 + torch.cov(clean.T).max().item() / kappa(s, t)))
    guess = torch.tensor([0.5, -0.3], dtype=F64) / t
    risk_noisy, risk_clean = (((guess - score) ** 2).sum(1) for score in (noisy, clean))
    assert risk_noisy.mean().item() == pytest.approx(risk_clean.mean().item() + d * kappa(s, t), rel=2e-2)
    spread = risk_clean.var() + 2 * d * kappa(s, t) ** 2 + 4 * kappa(s, t) * risk_clean.mean()
    assert risk_noisy.var().item() == pytest.approx(spread.item(), rel=3e-2)


def test_ddpo_is_noisy_score_matching():
    """Theorem 1, pointwise, exponential integrator: -log p(x_s | x_t) = ||S - grad log p(x_t | x_s)||^2 / 2 kappa."""
    grid = common.make_grid(schedulers()["flow"], "flow", 12, "ancestral", 1.0)
    for i in range(1, 11):
        t, s = grid.t[i], grid.t[i] - grid.dt[i]
        x_t, x_s, v = randn(40, 6), randn(40, 6), randn(40, 6)
        mu = grid.x_coef[i] * x_t + grid.o_coef[i] * v
        minus_log_p = -torch.distributions.Normal(mu, grid.sigma[i]).log_prob(x_s).sum(1)
        a = (1 - t) / (1 - s)
        score, conditional = -(x_t + (1 - t) * v) / t, -(x_t - a * x_s) / (t**2 - a**2 * s**2)
        difference = minus_log_p - ((score - conditional) ** 2).sum(1) / (2 * kappa(s, t))
        assert (difference - difference.mean()).abs().max() < 1e-8 * minus_log_p.abs().max()


# ---- DiffusionNFT ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("b", [1.0, 0.1, 0.5])
def test_nft_identity(b):
    """G30: up to constants the loss is b^2 ||v - (v_old + c (v* - v_old))||^2 with c = (2r - 1) / b, which is
    b^2 (c ||v - v*||^2 + (1 - c) ||v - v_old||^2)."""
    top, adv = 5.0, randn(30, scale=4.0)
    v_old, target = randn(30, 2, 3, 3), randn(30, 2, 3, 3)
    adv[:4] = torch.tensor([-6.0, 6.0, -1.0, 1.0])
    r = (0.5 + adv / (2 * top)).clamp(0, 1)
    assert r[:4].tolist() == pytest.approx([0, 1, 0.4, 0.6])  # beyond A_max either way, and within
    c = (2 * r - 1) / b
    wanted = v_old + c[:, None, None, None] * (target - v_old)
    losses, regressions, mixtures, grads = [], [], [], []
    for _ in range(3):
        v = randn(30, 2, 3, 3).requires_grad_()
        loss = awm.nft_loss(adv, v, v_old, target, b, top)
        regression = top * b * ((v - wanted) ** 2).mean((1, 2, 3))  # the loss carries A_max / b
        mixture = top * b * (c * ((v - target) ** 2).mean((1, 2, 3)) + (1 - c) * ((v - v_old) ** 2).mean((1, 2, 3)))
        grads.append([torch.autograd.grad(x.sum(), v)[0] for x in (loss, regression, mixture)])
        losses.append(loss.detach()), regressions.append(regression.detach()), mixtures.append(mixture.detach())
    for other in (regressions, mixtures):
        close(losses[1] - losses[0], other[1] - other[0], 1e-8)
        close(losses[2] - losses[0], other[2] - other[0], 1e-8)
    for ours, one, two in grads:
        close(ours, one, 1e-8), close(ours, two, 1e-8)


@pytest.mark.parametrize("kind", ["flow", "eps"])
def test_nft_in_x0_space(kind):
    """The authors' form, row by row: A_max (r L+ / b + (1 - r) L- / b), L = mean d^2 / sg mean |d| of x_0."""
    b, top, adv = 0.3, 4.0, randn(6, scale=3.0)
    nu = 0.1 + 0.8 * torch.rand(6, dtype=F64)
    alpha = 1 - nu if kind == "flow" else (1 - nu**2).sqrt()
    x0, e, o_old = randn(6, 2, 3, 3), randn(6, 2, 3, 3), randn(6, 2, 3, 3)
    o = randn(6, 2, 3, 3).requires_grad_()
    x_t = alpha[:, None, None, None] * x0 + nu[:, None, None, None] * e
    target = e - x0 if kind == "flow" else e
    ours = awm.nft_loss(adv, o, o_old, target, b, top, lambda out: awm.x0_hat(kind, x_t, alpha, nu, out), x0)
    rows = []
    for j in range(6):
        r = min(max(adv[j].item() / top / 2 + 0.5, 0), 1)
        total = 0
        for share, sign in ((r, 1), (1 - r, -1)):
            mixed = b * o[j] + (1 - b) * o_old[j] if sign > 0 else (1 + b) * o_old[j] - b * o[j]
            back = x_t[j] - nu[j] * mixed if kind == "flow" else (x_t[j] - nu[j] * mixed) / alpha[j]
            scale = (back - x0[j]).abs().mean().item()
            total = total + share / b * ((back - x0[j]) ** 2).mean() / scale
        rows.append(top * total)
    close(ours, torch.stack(rows), 1e-9)
    close(torch.autograd.grad(ours.sum(), o, retain_graph=True)[0], torch.autograd.grad(sum(rows), o)[0], 1e-9)


def test_nft_divides_by_no_zero():
    o = randn(2, 1, 2, 2).requires_grad_()
    loss = awm.nft_loss(torch.tensor([1.0, -1.0]), o, o.detach(), None, 1.0, 5.0, lambda out: out, o.detach())
    assert (loss == 0).all() and (torch.autograd.grad(loss.sum(), o)[0] == 0).all()


# ---- RAM ------------------------------------------------------------------------------------------------------------
def gradient(loss, x):
    return torch.autograd.grad(loss.sum(), x, retain_graph=True)[0]


def test_ram_with_its_anchor_is_the_regression_of_eq_17():
    """|| v - sg[v_ref + m A (v* - v_old)] ||^2 / m of rows and times, m = 1 / beta, against ram_loss + beta KL."""
    beta, adv, v = 0.05, randn(5), randn(5, 3, 2, 4, 4).requires_grad_()
    ref, target, lag = randn(5, 3, 2, 4, 4), randn(5, 3, 2, 4, 4), randn(5, 3, 2, 4, 4)
    for old in (lag, v.detach()):
        ours = awm.ram_loss(adv[:, None], v, old, target) + beta * awm.matching_error(v, ref)
        assert ours.shape == (5, 3)
        rows = [
            ((v[j] - ref[j] - a / beta * (target[j] - old[j])) ** 2).mean((1, 2, 3)) * beta
            for j, a in enumerate(adv.tolist())
        ]
        close(gradient(ours, v), gradient(torch.stack(rows), v), 1e-10)
        offsets = (torch.stack(rows) - ours).detach()  # the same square up to what does not depend on v
        moved = torch.randn_like(v)
        again = awm.ram_loss(adv[:, None], moved, old, target) + beta * awm.matching_error(moved, ref)
        rows = [
            ((moved[j] - ref[j] - a / beta * (target[j] - old[j])) ** 2).mean((1, 2, 3)) * beta
            for j, a in enumerate(adv.tolist())
        ]
        close(torch.stack(rows) - again, offsets, 1e-9)


def test_ram_on_policy_is_awm_on_policy():
    """Old policy theta, w = 1: the same gradient; off-policy RAM is AWM's exponent without the square of v - v_old."""
    adv, v, target, old = randn(6), randn(6, 3, 2, 4, 4).requires_grad_(), randn(6, 3, 2, 4, 4), randn(6, 3, 2, 4, 4)
    error = awm.matching_error(v, target)
    matching, _ = awm.awm_loss(adv, error, error.detach(), "mean-then-exp")
    ram = awm.ram_loss(adv[:, None], v, v.detach(), target).mean(1)
    close(gradient(ram, v), gradient(matching, v), 1e-10)
    assert gradient(ram, v).abs().min() > 0
    log_ratio = awm.matching_error(old, target) - error
    close(awm.ram_loss(adv[:, None], v, old, target), -adv[:, None] * (log_ratio + awm.matching_error(v, old)), 1e-10)


@pytest.mark.parametrize("exact", [True, False])
def test_rams_fixed_point_in_closed_form(exact):
    """Reference N(0, 1) at t = 1/2: exp(c x) makes it N(c, 1), exp(-c x^2 / 2) makes it N(0, 1 / (1 + c)).

    RAM stands still at the first; at the second (c = 1) it pulls from v* - v_ref = 2/3 x_t towards 4/9 x_t.
    """
    c, x_t = (0.8 if exact else 1.0), 0.6 + torch.rand(()).item()
    var = 1 if exact else 1 / (1 + c)
    mean = c if exact else 0.0
    # x_0 given x_t = (x_0 + e) / 2
    posterior_var = 1 / (1 / var + 1)
    posterior = posterior_var * (mean / var + 2 * x_t)
    grid = torch.linspace(-9, 9, 20001, dtype=F64) * posterior_var**0.5 + posterior
    weight = torch.exp(-((grid - posterior) ** 2) / (2 * posterior_var))
    weight = weight / weight.sum()
    reward = c * grid if exact else -c * grid**2 / 2
    target = (2 * x_t - grid) - grid  # e - x_0
    best = (weight * target).sum()  # E[e - x_0 | x_t] under the optimum
    reference = torch.tensor(0.0, dtype=F64)  # of N(0, 1) at t = 1/2
    v = best.clone().requires_grad_()
    one = v.expand(len(grid), 1, 1, 1)
    loss = awm.ram_loss(reward, one, one.detach(), target[:, None, None, None])
    anchor = awm.matching_error(v.view(1, 1, 1), reference.view(1, 1, 1))
    left = torch.autograd.grad((weight * loss).sum() + anchor, v)[0]
    close(left, 0.0 if exact else 2 * (best - 4 / 9 * x_t).item(), 1e-7)
    assert best.item() == pytest.approx(-c if exact else 2 / 3 * x_t)


def test_ram_takes_theta_or_the_lagged_copy(capsys):
    arguments("flow", *"--objective ram --offpolicy none --beta 0.01".split())
    arguments("eps", *"--objective ram --offpolicy lagged --adv-scale 5".split())
    for flags in ("--offpolicy half", "--offpolicy none --beta 0", "--offpolicy none --kl-weight elbo"):
        with pytest.raises(SystemExit) as stop:
            arguments("flow", "--objective", "ram", *flags.split())
        assert stop.value.code == 2 and "--objective ram" in capsys.readouterr().err


@pytest.mark.parametrize("flags", ["nft --adv-clip inf", "nft --weight t", "ram --beta 1 --weight adaptive"])
def test_a_number_that_an_objective_cannot_use_is_refused(flags, capsys):
    with pytest.raises(SystemExit) as stop:
        arguments("flow", "--offpolicy", "lagged", "--objective", *flags.split())
    assert stop.value.code == 2 and flags.split()[-2] in capsys.readouterr().err


def test_linear_law_has_density_2t():
    q = torch.linspace(0.02, 0.98, 25, dtype=F64)
    for kind in ("flow", "eps"):
        t = times(noising(kind, "--timesteps", "linear", "--train-timesteps", 8)) / 1000
        close(quantiles(t, q), q.sqrt(), 6e-3)
    assert times(noising("flow", "--timesteps", "linear", "--t-min", 0.3), 300).min() == 300


# ---- V-GRPO ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["flow", "eps"])
def test_adaptive_weight_is_x0s_error_over_its_own_size(kind):
    """V-GRPO's surrogate as its code has it, mean (x - x_0)^2 / sg mean |x - x_0| of the predicted x, and exp of
    the difference of its means over t; on-policy its gradient is DiffusionNFT's, whatever NFT's b."""
    count = (5, 3)
    nu = 0.05 + 0.9 * torch.rand(count, dtype=F64)
    alpha = 1 - nu if kind == "flow" else (1 - nu**2).sqrt()
    wide = (..., None, None, None)
    x0, e, o_old, o = (randn(*count, 2, 4, 4) for _ in range(4))
    x0 = x0[:, :1]  # an image's noisings have its x_0
    x_t, target = alpha[wide] * x0 + nu[wide] * e, e - x0 if kind == "flow" else e
    o.requires_grad_()
    rows = SimpleNamespace(t=nu / (alpha + nu), target=target, elbo=None if kind == "flow" else torch.ones(count))
    args = SimpleNamespace(weight="adaptive", huber_power=0.25)

    def surrogate(o):
        x = x_t - nu[wide] * o if kind == "flow" else (x_t - nu[wide] * o) / alpha[wide]
        return ((x - x0) ** 2).mean((2, 3, 4)) / (x - x0).detach().abs().mean((2, 3, 4))

    for out in (o, o_old):
        close(awm.bound(args, rows, out), surrogate(out), 1e-9)
    close(gradient(awm.bound(args, rows, o), o), gradient(surrogate(o), o), 1e-9)
    adv, xi = randn(5), 0.01
    ours, _ = awm.awm_loss(adv, awm.bound(args, rows, o), awm.bound(args, rows, o_old), "mean-then-exp", xi)
    rho = (surrogate(o_old).mean(1) - surrogate(o).mean(1)).exp()
    close(ours, -torch.minimum(rho * adv, rho.clamp(1 - xi, 1 + xi) * adv), 1e-9)
    on_policy, _ = awm.awm_loss(adv, awm.bound(args, rows, o), awm.bound(args, rows, o).detach(), "mean-then-exp")
    to_x0 = lambda v: awm.x0_hat(kind, x_t, alpha, nu, v)  # noqa: E731
    nft = awm.nft_loss(adv[:, None], o, o.detach(), target, 0.1 + torch.rand(()).item(), 9.0, to_x0, x0).mean(1)
    close(gradient(on_policy, o), gradient(nft, o), 1e-9)


@pytest.mark.parametrize("kind", ["flow", "eps"])
def test_noisings_of_a_group_are_shared_by_its_images_alone(kind):
    x0 = torch.randn(8, 2, 3, 3)
    draw = noising(kind, "--noisings-of", "group")  # groups of 4
    x_t, target, timestep, _, alpha, nu = draw(x0, 3, range(8))
    e = (x_t - alpha[..., None, None, None] * x0[:, None]) / nu[..., None, None, None]
    for one, two, same in ((0, 3, True), (4, 7, True), (3, 4, False), (0, 4, False)):
        assert torch.equal(timestep[one], timestep[two]) or not same
        assert torch.allclose(e[one], e[two], atol=1e-3) == same
    part = draw(x0[[6, 1]], 3, [6, 1])
    assert torch.equal(part[0], x_t[[6, 1]])
    assert not torch.isclose(draw(x0, 4, range(8))[0], x_t).flatten(1).all(1).any()


# ---- samplers -------------------------------------------------------------------------------------------------------
SAMPLERS = [
    ("flow", "ode"), ("flow", "sde"), ("flow", "DPMSolverMultistepScheduler"), ("flow", "UniPCMultistepScheduler"),
    ("flow", "DPMSolverSinglestepScheduler"), ("flow", "DEISMultistepScheduler"), ("flow", "SASolverScheduler"),
    ("eps", "ode"), ("eps", "sde"), ("eps", "DDIMScheduler"), ("eps", "DPMSolverMultistepScheduler"),
    ("eps", "UniPCMultistepScheduler"), ("eps", "SASolverScheduler"), ("eps", "EulerDiscreteScheduler"),
    ("eps", "EulerAncestralDiscreteScheduler"), ("eps", "DDPMScheduler"),
]  # fmt: skip


def drawn(policy, sampler, batch, steps, micro=64, epoch=0):
    flags = ["--sampler", sampler, "--steps", steps]
    return awm.sample(policy, arguments(policy.kind, *flags, "--micro-batch-size", micro), batch, epoch, "")


@pytest.mark.parametrize("kind, sampler", SAMPLERS)
def test_every_sampler_ends_at_the_data(kind, sampler):
    """All data in one point m: whatever the sampler, few steps are enough, and no noise may be left at the end."""
    policy = GaussianPolicy(kind, mean=0.7, tau=0.0)
    x0 = drawn(policy, sampler, gaussian_batch(policy, 2, 14), 14)
    assert x0.dtype == torch.float32 and x0.shape == (2, *policy.latent_shape)
    # SD1.5's own last level has nu = 0.029; a flow ends at t = 0, but Euler-Maruyama's last step draws noise
    assert (x0 - 0.7).abs().max() < (0.15 if kind == "eps" else 0.25 if sampler == "sde" else 0.02)


ODE = {  # steps, and the largest error of a latent's scalar allowed
    ("flow", "ode"): (100, 0.07), ("flow", "DPMSolverMultistepScheduler"): (60, 0.03),
    ("flow", "UniPCMultistepScheduler"): (60, 0.02), ("flow", "DPMSolverSinglestepScheduler"): (100, 0.02),
    ("flow", "DEISMultistepScheduler"): (60, 0.06),
    ("eps", "ode"): (100, 0.06), ("eps", "DPMSolverMultistepScheduler"): (100, 0.04),
    ("eps", "DDIMScheduler"): (100, 0.06),
    ("eps", "UniPCMultistepScheduler"): (100, 0.04), ("eps", "EulerDiscreteScheduler"): (100, 0.07),
}  # fmt: skip


@pytest.mark.parametrize("kind, sampler", ODE)
def test_ode_samplers_solve_the_probability_flow(kind, sampler):
    """Data N(m, tau^2): x_0 = m + tau (x_T - alpha m) / std of p_T; with few steps it is further away."""
    steps, tolerance = ODE[kind, sampler]
    errors = []
    for count in (steps, 5):
        policy = GaussianPolicy(kind)
        batch = gaussian_batch(policy, 3, count)
        x0 = drawn(policy, sampler, batch, count)
        start = policy.seen[0][1][0].double()  # schedulers of diffusers start at slightly different times
        alpha, nu = (1 - start / 1000, start / 1000) if kind == "flow" else policy.levels(start)
        std = (alpha**2 * policy.tau**2 + nu**2).sqrt()
        truth = policy.mean + policy.tau * (batch.noise[:, 0].double() - alpha * policy.mean) / std
        errors.append((x0 - truth).abs().max().item())
    assert errors[0] < tolerance and errors[1] > 3 * tolerance


STOCHASTIC = ("sde", "SASolverScheduler", "EulerAncestralDiscreteScheduler", "DDPMScheduler")
SDE = [row for row in SAMPLERS if row[1] in STOCHASTIC]


@pytest.mark.parametrize("kind, sampler", SDE)
def test_sde_samplers_draw_the_data(kind, sampler):
    policy = GaussianPolicy(kind)
    batch = gaussian_batch(policy, 24, 200 if sampler == "sde" else 1)  # 3072 scalars: standard errors .011 and .008
    x0 = drawn(policy, sampler, batch, 200)
    assert abs(x0.mean() - 0.7) < 0.04 and abs(x0.std() - 0.6) < 0.04
    correlation = torch.corrcoef(x0.flatten(1))
    assert (correlation - torch.eye(24)).abs().max() < 0.5  # 128 scalars each: every image has draws of its own


@pytest.mark.parametrize("kind, sampler", SAMPLERS)
def test_an_image_depends_on_no_micro_batch_and_no_process(kind, sampler):
    policy, steps = GaussianPolicy(kind), 5
    whole = drawn(policy, sampler, gaussian_batch(policy, 6, steps), steps)
    for micro in (1, 4):
        close(drawn(policy, sampler, gaussian_batch(policy, 6, steps), steps, micro), whole, 1e-5)
    halves = [drawn(policy, sampler, gaussian_batch(policy, 3, steps, first), steps, 2) for first in (0, 3)]
    close(torch.cat(halves), whole, 1e-5)
    again = drawn(policy, sampler, gaussian_batch(policy, 6, steps), steps, epoch=1)
    own_draws = (kind, sampler) in SDE and sampler != "sde"
    assert torch.equal(again, whole) != own_draws  # of a scheduler with draws of its own they change with the epoch
    policy.seen.clear()
    drawn(policy, sampler, gaussian_batch(policy, 6, steps, first=6), steps, 4)
    assert len(policy.seen) == 2 * steps  # as --dry-run says
    rows = torch.cat([cond.index for _, _, cond in policy.seen[::steps]])
    assert rows.tolist() == list(range(6, 12))


def test_the_start_of_an_image_does_not_depend_on_the_draws_after_it(monkeypatch):
    """--sampler ode and diffusers' schedulers need no draws of ours: the start is the same without them."""
    for shape in ((4, 8, 8), (16, 64, 64), (4, 64, 64)):
        whole, alone = (common.sample_noise(3, 1, range(2), steps, shape, "cpu") for steps in (10, 0))
        assert alone.shape[1] == 1 and torch.equal(whole[:, :1], alone)
    asked = []
    real = common.sample_noise
    monkeypatch.setattr(common, "sample_noise", lambda *a: asked.append(a[3]) or real(*a))
    policy = SimpleNamespace(latent_shape=(4, 8, 8), device="cpu", store="cpu", encode=lambda texts: None)
    for sampler, draws in (("sde", 7), ("ode", 0), ("SASolverScheduler", 0)):
        args = arguments("flow", "--sampler", sampler, "--steps", 7)
        batch = harness.epoch_batch(args, policy, 0, awm.draws(args))
        assert asked.pop() == draws and batch.noise.shape == (8, draws + 1, 4, 8, 8)
        size = 8 * (draws + 2) * 256 * 4 / 2**30  # x_0 and the noise
        assert awm.sizes(args)["memory for the rollout"].startswith(f"{size:.3g} GB")
    huge = awm.sizes(arguments("flow", "--sampler", "ode", "--num-prompts", 4096))["memory for the rollout"]
    assert huge.startswith(f"{4096 * 4 * 2 * 256 * 4 / 2**30:.3g} GB")


@pytest.mark.parametrize("kind", ["flow", "eps"])
def test_sampler_noise_is_tau_between_300_and_900(kind):
    flags = ["--sampler", "SASolverScheduler", "--steps", 14, "--sampler-noise"]
    policy = GaussianPolicy(kind)
    tau = awm.make_scheduler(arguments(kind, *flags, 0.4), policy.pipe.scheduler).tau_func
    assert [tau(t) for t in (0, 299, 300, 600, 900, 901, 1000)] == [0, 0, 0.4, 0.4, 0.4, 0, 0]
    batch = gaussian_batch(policy, 2, 0)
    for noise in (0, 0.4):  # the epoch is the key of the scheduler's draws, the start is the same
        one, two = (awm.sample(policy, arguments(kind, *flags, noise), batch, epoch, "") for epoch in (0, 1))
        assert torch.equal(one, two) == (noise == 0)
    default = awm.make_scheduler(arguments(kind, *flags[:-1]), policy.pipe.scheduler).tau_func
    assert [default(t) for t in (199, 250, 850)] == [0, 1, 0]  # diffusers' own


FLOW = sorted({name for kind, name in SAMPLERS if kind == "flow" and name not in ("ode", "sde")})


@pytest.mark.parametrize("sampler", FLOW)
def test_the_network_is_told_the_time_of_x(sampler):
    """A flow's schedulers: 1000 sigma, not diffusers' integer below it."""
    policy = GaussianPolicy("flow")
    drawn(policy, sampler, gaussian_batch(policy, 2, 7), 7)
    u = torch.linspace(1, 1e-3, 8, dtype=F64)[1:]  # diffusers: alpha evenly, then the shift
    sigmas = (3 * (1 - u) / (1 + 2 * (1 - u))).flip(0)
    told = torch.stack([time[0] for _, time, _ in policy.seen]).double()
    made = awm.make_scheduler(arguments("flow", "--sampler", sampler, "--steps", 7), policy.pipe.scheduler)
    close(told / 1000, made.sigmas[:7].double(), 1e-6)
    if sampler != "UniPCMultistepScheduler":  # whose grid starts a little later
        close(told / 1000, sigmas, 1e-6)


RELEASED = [0.999, 0.97306, 0.94305, 0.90941, 0.87145, 0.82828, 0.77874, 0.72131, 0.65394, 0.57381, 0.47691, 0.35737,
            0.2062, 0.1031, 0.0]  # fmt: skip


def sa_solver(policy, x, times, tau, noise):
    """AWM's sa_solver.py as formulas: predictor and corrector of order 2 with rescaled O(h^3) terms; tau(arrival)."""
    step = [t.item() for t in times]
    lam = [math.log(1 - t) - math.log(t) for t in step[:-1]]

    def clean(x, i):
        t = torch.full((len(x),), step[i], dtype=F64)
        return x - step[i] * policy.predict(x.float(), (1000 * t).float(), None, 1.0).double()

    data = [clean(x, 0)]
    for i in range(1, len(step) - 1):
        h, a = lam[i] - lam[i - 1], 1 + tau(step[i]) ** 2
        base = math.exp(-(a - 1) * h) * step[i] / step[i - 1] * x + (1 - step[i]) * (1 - math.exp(-a * h)) * data[-1]
        base = base + step[i] * math.sqrt(1 - math.exp(-2 * (a - 1) * h)) * noise[i - 1]
        guess = base
        if i > 1:
            slope = (data[-1] - data[-2]) / (lam[i - 1] - lam[i - 2])
            guess = base + a * (1 - step[i]) * h**2 / 2 * slope
        now = clean(guess, i)
        x = base + a * (1 - step[i]) * h / 2 * (now - data[-1]) if i > 1 else guess  # the first is not corrected
        data.append(now)
    return data[-1]  # denoise to zero


@pytest.mark.parametrize("noise", [0.0, 0.4])
def test_official_grid_of_sasolver_is_the_authors_sampler(noise):
    policy = GaussianPolicy("flow")
    args = arguments("flow", *"--sampler SASolverScheduler --sampler-grid official --steps 14".split(),
                     "--sampler-noise", noise)  # fmt: skip
    scheduler = awm.make_scheduler(args, policy.pipe.scheduler)
    close(scheduler.sigmas.double(), RELEASED, 1e-5)
    noisy = [scheduler.tau_func(t) > 0 for t in scheduler.timesteps]
    assert sum(noisy) == (8 if noise else 0) and (not noise or noisy[3:11] == [True] * 8)  # arrivals .87145 ... .35737
    batch = gaussian_batch(policy, 3, 0, seed=torch.randint(10**6, ()).item())
    ours = awm.sample(policy, args, batch, 5, "")
    told = torch.stack([time[0] for _, time, _ in policy.seen]).double()
    close(told / 1000, RELEASED[:-1], 1e-5)
    draws = []
    for n in range(3):
        generator = common.generator("sampler", args.seed, 5, n)
        draws.append([torch.randn((1, *policy.latent_shape), generator=generator)[0] for _ in range(13)])
    draws = [torch.stack(each).double() for each in zip(*draws)]
    tau = lambda t: noise if 0.3 <= t <= 0.9 else 0.0  # noqa: E731
    theirs = sa_solver(policy, batch.noise[:, 0].double(), scheduler.sigmas.double(), tau, draws)
    close(ours.double(), theirs, 3e-4)
    plain = arguments("flow", *"--sampler SASolverScheduler --steps 14 --sampler-noise".split(), noise)
    assert (awm.sample(policy, plain, batch, 5, "") - ours).abs().max() > 0.01


def test_official_grid_of_dpm_solver_is_the_models_own():
    """DiffusionNFT: second order multistep on 1, .96013, ..., .27805, .00893, 0; first and last step of order 1."""
    policy = GaussianPolicy("flow")
    flags = "--sampler DPMSolverMultistepScheduler --sampler-grid official --steps 10".split()
    batch = gaussian_batch(policy, 3, 0, seed=torch.randint(10**6, ()).item())
    ours = awm.sample(policy, arguments("flow", *flags), batch, 0, "")
    t = policy.grid(10, "ode", 0.0).t.tolist()
    close(torch.tensor([t[0], t[1], t[-2], t[-1]]), [1, 0.96013, 0.27805, 0.00893], 1e-4)
    close(torch.stack([time[0] for _, time, _ in policy.seen]).double() / 1000, t, 1e-6)
    x, data = batch.noise[:, 0].double(), []
    for i, now in enumerate(t):
        data.append(x - now * policy.predict(x.float(), torch.full((3,), 1000 * now), None, 1.0).double())
        if i == 9:
            break
        after = t[i + 1]
        lam = [math.log((1 - s) / s) if s < 1 else -math.inf for s in (t[i - 1], now, after)]
        blend = data[-1]
        if i > 1:  # at i = 1 the step before has infinite length, and the slope is 0
            blend = blend + (lam[2] - lam[1]) / (2 * (lam[1] - lam[0])) * (data[-1] - data[-2])
        x = after / now * x + (1 - after - after / now * (1 - now)) * blend
    close(ours.double(), data[-1], 3e-4)


def test_official_grid_needs_a_flow_model(capsys):
    with pytest.raises(SystemExit) as stop:
        arguments("eps", *"--sampler SASolverScheduler --sampler-grid official".split())
    assert stop.value.code == 2 and "--sampler-grid" in capsys.readouterr().err


def test_sampler_noise_belongs_to_sasolver(capsys, monkeypatch):
    for flags in ("ode --sampler-noise 0.4", "UniPCMultistepScheduler --sampler-noise=0",
                  "SASolverScheduler --sampler-noise -0.1", "SASolverScheduler --sampler-noise nan"):  # fmt: skip
        with pytest.raises(SystemExit) as stop:
            arguments("flow", "--sampler", *flags.split())
        assert stop.value.code == 2 and "--sampler-noise" in capsys.readouterr().err
    noisy = dict(sampler="SASolverScheduler", sampler_noise=0.4)
    monkeypatch.setitem(awm.PRESETS, "small", awm.PRESETS["tiny"] | noisy)
    assert awm.parse_args(["--preset", "small"]).sampler_noise == 0.4
    assert awm.parse_args(["--preset", "small", "--sampler", "ode"]).sampler_noise is None  # it was the replaced one's


def test_sde_rollout_is_common_rollouts():
    for kind in ("flow", "eps"):
        policy, steps = GaussianPolicy(kind), 6
        batch = gaussian_batch(policy, 4, steps)
        args = arguments(kind, "--steps", steps)
        grid = common.make_grid(policy.pipe.scheduler, kind, steps, args.kernel, args.noise_level)
        path = common.rollout(policy, grid, batch.cond, batch.noise, 1.0, 2, desc="")
        close(drawn(policy, "sde", batch, steps), path.x[:, -1], 1e-6)


UNFIT = [  # unknown, or of another model or use: they would crash in the first epoch, or draw noise without a word
    ("flow", "nonsense"), ("flow", "NoScheduler"), ("flow", "AutoencoderKL"), ("flow", "SchedulerMixin"),
    ("flow", "DDIMScheduler"), ("flow", "FlowMatchEulerDiscreteScheduler"), ("flow", "HeliosScheduler"),
    ("flow", "DPMSolverMultistepInverseScheduler"), ("eps", "FlowMatchEulerDiscreteScheduler"),
    ("eps", "VQDiffusionScheduler"), ("eps", "ScoreSdeVeScheduler"), ("eps", "DDIMInverseScheduler"),
    ("eps", "IPNDMScheduler"), ("eps", "EDMEulerScheduler"), ("eps", "DPMSolverSDEScheduler"),
]  # fmt: skip


@pytest.mark.parametrize("kind, sampler", UNFIT)
def test_unfit_samplers_are_refused_in_one_sentence(kind, sampler, capsys):
    with pytest.raises(SystemExit) as stop:
        arguments(kind, "--sampler", sampler)
    message = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and message.startswith("awm.py: error: --sampler " + sampler) and "\n" not in message


@pytest.mark.parametrize(
    "kind, sampler, stochastic",
    [("flow", "SASolverScheduler", True), ("flow", "UniPCMultistepScheduler", False),
     ("flow", "DPMSolverMultistepScheduler", False),
     ("eps", "DDIMScheduler", False), ("eps", "EulerAncestralDiscreteScheduler", True)],
)  # fmt: skip
def test_shared_noise_needs_a_sampler_with_draws(kind, sampler, stochastic, capsys):
    flags = ["--sampler", sampler, "--shared-noise"]
    if stochastic:
        arguments(kind, *flags)
        flags += ["--sampler-noise", 0]
        if sampler != "SASolverScheduler":
            return
    with pytest.raises(SystemExit) as stop:
        arguments(kind, *flags)
    assert stop.value.code == 2 and "--shared-noise" in capsys.readouterr().err


# ---- flags ----------------------------------------------------------------------------------------------------------
def test_the_defaults_are_the_papers():
    args = awm.parse_args(["--model", "tiny-sd35", "--reward", "shapes", "--prompts", "prompts/shapes_train.txt",
                           "--eval-prompts", "prompts/shapes_heldout.txt"])  # fmt: skip
    paper = dict(weight="uniform", train_timesteps=4, timesteps="discrete", sampler="sde", kernel="flow_sde", beta=0.4,
                 group_size=24, offpolicy="half", updates_per_epoch=2, train_cfg=1.0, ratio="mean-then-exp", lr=3e-4,
                 kl_weight="uniform", clip_range=0.0, adv_scale=1.0, lag_coef=0.0, lora_rank=32,
                 lora_alpha=64)  # fmt: skip
    assert {key: getattr(args, key) for key in paper} == paper


def test_the_release_presets_are_the_official_configurations():
    for name, beta, prompts, skip, noise, reward in (
        ("ocr", 0.003, 72, True, 0.4, "ocr"),
        ("geneval", 0.001, 72, True, 0.4, "geneval-reward-flowgrpo"),
        ("pickscore", 1e-4, 24, False, 0, "pickscore26"),
    ):
        preset = awm.PRESETS[f"release-{name}"]
        official = dict(beta=beta, num_prompts=prompts, skip_first=skip, steps=14, cfg=1.0, weight="ghuber",
                        train_timesteps=6, train_fraction=0.9, adv_norm="global", adv_scale=5.0, clip_range=1.0,
                        ratio="exp-each", lag_coef=1.0, updates_per_epoch=1, ema_decay=0.99, ema_every=1,
                        dtype="float16", eval_cfg=1.0, sampler_grid="official")  # fmt: skip
        assert {key: preset[key] for key in official} == official
        assert preset["sampler"] == "SASolverScheduler" and preset["sampler_noise"] == noise
        assert ("ocr" if name == "ocr" else preset["reward"]) == reward
        if name != "ocr":
            assert awm.PRESETS[f"awm-{name}"]["reward"] == reward and reward in rewards.REWARDS
        policy = GaussianPolicy("flow")
        args = arguments("flow", "--sampler", preset["sampler"], "--sampler-noise", noise, "--steps", preset["steps"])
        one, two = (awm.sample(policy, args, gaussian_batch(policy, 2, 0), epoch, "") for epoch in (0, 1))
        assert torch.equal(one, two) == (noise == 0)  # PickScore: an ODE
    assert awm.PRESETS["nft-geneval"]["reward"] == "geneval-reward-flowgrpo"


def test_the_nft_presets_are_the_official_configurations():
    for name, updates, beta in (("ocr", 2, 0.1), ("geneval", 1, 1.0)):
        preset = awm.PRESETS[f"nft-{name}"]
        official = dict(updates_per_epoch=updates, timesteps="subset", train_timesteps=9, train_fraction=1.0, cfg=1.0,
                        eval_cfg=1.0, dtype="float16", sampler="DPMSolverMultistepScheduler", sampler_grid="official",
                        offpolicy="lagged", adv_norm="global", beta=1e-4, ema_decay=0.9, ema_every=1)  # fmt: skip
        assert {key: preset[key] for key in official} == official and preset.get("nft_beta", 1.0) == beta


@pytest.mark.parametrize("name, decay", [("release-ocr", 0.99), ("nft-geneval", 0.9), ("nft-ocr", 0.9)])
def test_the_average_is_the_official_one(name, decay):
    """min((1 + s) / (10 + s), d) after every optimiser step (AWM: once an epoch of one update)."""
    keys = ("ema_decay", "ema_every", "updates_per_epoch")
    flags = [f"--{key.replace('_', '-')}={awm.PRESETS[name][key]}" for key in keys]
    args = awm.parse_args(["--preset", "tiny", *flags, "--ema-warmup"])
    here = ["--model=tiny-sd35", "--reward=shapes", "--prompts=prompts/shapes_train.txt"]
    assert awm.parse_args(["--preset", name, *here, "--eval-prompts=", "--eval-rewards="]).ema_warmup
    weight = torch.nn.Parameter(torch.randn(5))
    run = SimpleNamespace(dtype=torch.float32, device=torch.device("cpu"))
    optimiser = harness.make_optimiser(args, run, [weight])
    average = weight.detach().double().clone()
    for s in range(1, 40):
        optimiser.backward((weight * torch.randn(5)).sum())
        optimiser.step()
        d = min((1 + s) / (10 + s), decay)
        average = d * average + (1 - d) * weight.detach().double()
        close(optimiser.ema.shadow[0].double(), average, 1e-5)


def test_every_preset_says_what_differs_from_its_authors_run(capsys):
    for name, preset in awm.PRESETS.items():
        assert name.startswith("tiny") or len(preset["note"]) > 30, name
    with pytest.raises(SystemExit):
        awm.parse_args(["--preset", "nft-ocr", "--prompts", "prompts/ocr_test.txt", "--dry-run"])
    printed = capsys.readouterr().out
    assert awm.PRESETS["nft-ocr"]["note"] in printed and "2 per epoch" in printed
