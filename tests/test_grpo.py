"""grpo.py's pure functions against torch.distributions, automatic differentiation and the formulas as printed."""

import collections
import io
import math

import numpy
import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from torch.distributions import Normal, kl_divergence

import common
import grpo

F64 = torch.float64
SHAPE = (6, 4, 5, 3)


def sd15(steps=50, level=1.0, kernel="ddim"):
    settings = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1)
    scheduler = DDIMScheduler(**settings, set_alpha_to_one=False, timestep_spacing="leading")
    return common.make_grid(scheduler, "eps", steps, kernel, level)


def sd35(steps=10, level=0.7, kernel="flow_sde", shift=3.0):
    return common.make_grid(FlowMatchEulerDiscreteScheduler(shift=shift), "flow", steps, kernel, level)


GRIDS = {
    "ddim": sd15(), "ddim0.4": sd15(20, 0.4), "flow_sde": sd35(), "dance": sd35(12, 0.3, "dance"),
    "cps": sd35(9, 0.8, "cps"), "ancestral": sd35(10, 1.0, "ancestral"),
}  # fmt: skip


def randn(*shape, scale=1.0):
    return scale * torch.randn(*(shape or SHAPE), dtype=F64)


class Move:
    """One step of a grid, six samples, float64: behaviour output o_old, draw z, and a policy output o near it."""

    def __init__(self, grid, i, distance=0.05, reduce="mean"):
        self.grid, self.i, self.reduce = grid, i, reduce
        self.x_t, self.o_old, self.z, self.adv = randn(), randn(), randn(), randn(SHAPE[0])
        self.sigma = grid.sigma[i]
        self.x_s = self.mu(self.o_old) + self.sigma * self.z
        self.o = (self.o_old + randn(scale=distance)).requires_grad_()

    def mu(self, o):
        return self.grid.x_coef[self.i] * self.x_t + self.grid.o_coef[self.i] * o

    def reduced(self, x):
        return x.flatten(1).mean(1) if self.reduce == "mean" else x.flatten(1).sum(1)

    def logp(self, o):
        return self.reduced(Normal(self.mu(o), self.sigma).log_prob(self.x_s))

    @property
    def moved(self):
        return self.grid.w[self.i] * (self.o - self.o_old)

    @property
    def log_ratio(self):
        return common.log_ratio(self.moved, self.z, self.reduce)

    def grad(self, loss):
        return torch.autograd.grad(loss.sum(), self.o, retain_graph=True)[0]


@pytest.fixture(params=list(GRIDS))
def grid(request):
    return GRIDS[request.param]


def steps_of(grid):
    return [i for i in (0, 1, grid.steps // 2, grid.steps - 2) if grid.sigma[i] > 1e-6]


def close(actual, expected, tolerance=1e-9):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


# ---- the losses -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("reduce", ["mean", "sum"])
def test_every_loss_has_reinforces_gradient_at_ratio_1(grid, reduce):
    for i in steps_of(grid):
        m = Move(grid, i, distance=0, reduce=reduce)
        truth = m.grad(-m.adv * m.logp(m.o))  # -A grad log p_theta(x_s | x_t)
        assert truth.abs().min() > 0
        xi = 1e-4
        for loss in (
            grpo.reinforce_loss(m.adv, m.log_ratio),
            grpo.clipped_loss(m.adv, m.log_ratio, xi),
            grpo.epg_loss(m.adv, m.log_ratio),
            grpo.pcpo_loss(m.adv, m.log_ratio, xi),
        ):
            assert loss.shape == (SHAPE[0],)
            close(m.grad(loss), truth)
        guard = grpo.clipped_loss(m.adv, grpo.guard_log_ratio(m.moved, m.z, m.sigma, reduce), xi)
        close(m.grad(guard), truth * m.sigma)  # Guard: the same, times sigma_t


def test_reinforce_and_epg_off_policy(grid):
    for i in steps_of(grid):
        m = Move(grid, i)
        ratio = (m.logp(m.o) - m.logp(m.o_old)).exp().detach()
        assert (ratio - 1).abs().min() > 0
        close(m.grad(grpo.reinforce_loss(m.adv, m.log_ratio)), m.grad(-m.adv * m.logp(m.o)))
        close(m.grad(grpo.epg_loss(m.adv, m.log_ratio)), m.grad(-ratio * m.adv * m.logp(m.o)))
        close(
            m.grad(grpo.clipped_loss(m.adv, m.log_ratio, 1e9)), m.grad(-m.adv * (m.logp(m.o) - m.logp(m.o_old)).exp())
        )


def test_clipped_loss_stops_only_what_goes_too_far_in_its_own_direction():
    xi = 0.2
    adv = torch.tensor([2.0, 2.0, 2.0, -3.0, -3.0, -3.0], dtype=F64)
    ratio = torch.tensor([1.3, 1.1, 0.5, 1.3, 0.9, 0.5], dtype=F64)
    log_ratio = ratio.log().requires_grad_()
    loss = grpo.clipped_loss(adv, log_ratio, xi)
    close(loss, torch.tensor([-2.4, -2.2, -1.0, 3.9, 2.7, 2.4], dtype=F64))
    gradient = torch.autograd.grad(loss.sum(), log_ratio)[0]
    close(gradient, torch.tensor([0.0, -2.2, -1.0, 3.9, 2.7, 0.0], dtype=F64))  # -A ratio, or nothing


def test_clip_range_may_differ_from_row_to_row():
    adv, log_ratio = torch.randn(400, dtype=F64), 0.3 * torch.randn(400, dtype=F64)
    xi = 0.5 * torch.rand(400, dtype=F64)
    for loss in (grpo.clipped_loss, grpo.pcpo_loss):
        rows = [loss(a[None], r[None], x.item()) for a, r, x in zip(adv, log_ratio, xi)]
        close(loss(adv, log_ratio, xi), torch.cat(rows), 1e-12)


@pytest.mark.parametrize("per_row", [False, True])
def test_hinge_identity(per_row):
    """G21: max(-A l, -A clip(l, -xi, xi)) and max(0, xi |A| - A l) have the same gradient, clipped rows included."""
    adv, log_ratio = torch.randn(5000, dtype=F64), (0.01 * torch.randn(5000, dtype=F64)).requires_grad_()
    xi = 0.01 * torch.rand(5000, dtype=F64) if per_row else 0.006
    clipped = grpo.pcpo_loss(adv, log_ratio, xi)
    hinge = (xi * adv.abs() - adv * log_ratio).clamp(min=0)
    ours, other = (torch.autograd.grad(x.sum(), log_ratio)[0] for x in (clipped, hinge))
    assert torch.equal(ours, other)
    assert 500 < (ours == 0).sum() < 4500  # both kinds of rows are there
    close(clipped, hinge - xi * adv.abs())


def test_regression_form_is_the_difference_of_log_densities(grid):
    """PCPO's and RSM's lambda = -(w^2 ||do||^2 / 2 + w do.z) with w = |b k| / sigma, G7."""
    for i in steps_of(grid):
        for reduce in ("mean", "sum"):
            m = Move(grid, i, reduce=reduce)
            do, w = m.o - m.o_old, (grid.o_coef[i].abs() / grid.sigma[i])
            regression = -m.reduced(0.5 * w**2 * do**2 + w * do * m.z)
            close(regression, m.logp(m.o) - m.logp(m.o_old), 1e-8)
            close(regression, m.log_ratio)


def test_guard_exponent_is_the_cross_term_alone(grid):
    """G22: (log ratio + ||mu - mu_old||^2 / 2 sigma^2) sigma = b k do.z, each sample with its own bias."""
    for i in steps_of(grid):
        for reduce in ("mean", "sum"):
            m = Move(grid, i, reduce=reduce)
            bias = m.reduced((m.mu(m.o) - m.mu(m.o_old)) ** 2 / (2 * m.sigma**2))
            exponent = grpo.guard_log_ratio(m.moved, m.z, m.sigma, reduce)
            assert exponent.shape == (SHAPE[0],)
            close(exponent, (m.logp(m.o) - m.logp(m.o_old) + bias) * m.sigma, 1e-8)
            close(exponent, m.reduced(grid.o_coef[i] * (m.o - m.o_old) * m.z))


def test_guard_bias_is_not_averaged_over_the_batch():
    sigma, moved, z = torch.tensor([0.2, 0.7, 0.4], dtype=F64), randn(3, 4, 2, 2), randn(3, 4, 2, 2)
    far = moved.clone()
    far[2] *= 1000
    one, two = (grpo.guard_log_ratio(x, z, sigma, "mean") for x in (moved, far))
    assert torch.equal(one[:2], two[:2]) and one[2] != two[2]
    rows = [grpo.guard_log_ratio(moved[j : j + 1], z[j : j + 1], sigma[j : j + 1], "mean") for j in range(3)]
    close(one, torch.cat(rows), 1e-14)


# ---- PCPO -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("trained, zeta", [(9, 3.970), (10, 5.705)])
def test_zeta_on_sd35s_grid(trained, zeta):
    grid, steps = GRIDS["flow_sde"], list(range(trained))
    w = common.pcpo_weights(grid, steps, "zeta")
    assert (w[steps] / -grid.dt[steps]).tolist() == pytest.approx([zeta] * trained, abs=5e-4)
    # by hand from the table: w = sqrt(dt)/g (1 + (1-t) g^2 / 2t)
    t, dt = grid.t[steps], grid.dt[steps]
    g = 0.7 * (t / torch.where(t < 1, 1 - t, 1 - grid.t[1])).sqrt()
    native = dt.sqrt() / g * (1 + (1 - t) * g**2 / (2 * t))
    assert (w[steps] / -dt).tolist() == pytest.approx([(native.sum() / dt.sum()).item()] * trained, rel=1e-9)
    assert -w[steps].sum().item() == pytest.approx(native.sum().item(), rel=1e-9)  # G24


@pytest.mark.parametrize("name", ["flow_sde", "dance"])
@pytest.mark.parametrize("steps", [range(9), range(2, 5), [4], [0, 3, 7]])
def test_pcpo_weights_keep_the_sum_over_the_trained_steps(name, steps):
    grid, steps = GRIDS[name], list(steps)
    for kind in ("zeta", "loss-only"):
        w = common.pcpo_weights(grid, steps, kind)
        assert w.dtype == F64 and w.shape == (grid.steps,) and (w[steps] < 0).all()  # signed as grid.w
        assert w[steps].abs().sum().item() == pytest.approx(grid.w[steps].abs().sum().item(), rel=1e-12)
    shape = common.pcpo_weights(grid, steps, "zeta")[steps] / grid.dt[steps]
    close(shape, shape[:1].expand(len(steps)))


def test_zeta_on_the_grid_of_the_public_code_and_pinned():
    """The public constant is 4.3152; a grid 3u/(1+2u) of 10 steps with u = 1, .9, ... gives 4.297."""
    u = torch.linspace(1, 0, 11, dtype=F64)
    sigmas = 3 * u / (1 + 2 * u)

    class Plain:
        def set_timesteps(self, steps):
            self.sigmas, self.timesteps = sigmas, 1000 * sigmas[:-1]

    grid = common.make_grid(Plain(), "flow", 10, "flow_sde", 0.7)
    w = common.pcpo_weights(grid, list(range(10)), "zeta")
    assert (-w / grid.dt)[0].item() == pytest.approx(4.297, abs=1e-3)


def test_mean_sensitivity_of_sd15s_grid():
    grid = GRIDS["ddim"]
    for kind in ("public", "loss-only"):
        w = common.pcpo_weights(grid, list(range(50)), kind)
        assert w.tolist() == pytest.approx([-0.516900] * 50, abs=1e-6)


def test_pcpo_sampler():
    """sigma~ is the plus root: (c1 + c2) / sigma~ = W on every step; the true weight (c1 - c2) / sigma~ varies."""
    native = GRIDS["ddim"]
    grid = common.pcpo_grid(native, 4.5)
    c1 = grid.nu * grid.alpha_s / grid.alpha
    c2 = (grid.nu_s**2 - grid.sigma**2).sqrt()
    close((c1 + c2) / grid.sigma, torch.full((50,), 4.5, dtype=F64), 1e-9)
    printed = (4.5 * c1 + (native.nu_s**2 * (4.5**2 + 1) - c1**2).sqrt()) / (4.5**2 + 1)
    close(grid.sigma, printed, 1e-12)
    true = grid.w.abs()
    close(true, (c1 - c2) / grid.sigma)
    assert (true.min().item(), true.max().item(), true.mean().item()) == pytest.approx((0.386, 3.37, 0.528), abs=5e-3)
    x_t, eps = randn(), randn()  # it remains a DDIM step: alpha_s x0_hat + c2 eps
    for i in (0, 25, 49):
        mu = grid.x_coef[i] * x_t + grid.o_coef[i] * eps
        close(mu, grid.alpha_s[i] * (x_t - grid.nu[i] * eps) / grid.alpha[i] + c2[i] * eps)
    assert torch.equal(native.sigma, GRIDS["ddim"].sigma)  # the native grid is left alone


def test_pcpo_sampler_that_does_not_exist_is_refused():
    with pytest.raises(common.UsageError, match="--pcpo-w 0.5"):
        common.pcpo_grid(sd15(5), 0.5)


def test_the_pcpo_preset_has_the_public_constant_in_49_of_50_steps():
    """Weight 4.5 / 8.70575 of the official loss; the mean over the trained steps would be .507."""
    args = grpo.parse_args(["--preset", "pcpo-sd15", "--reward", "jpeg", "--model", "tiny-sd15"])
    assert args.train_steps == 49 and args.pcpo_weights == "public" and args.shared_blocks == 2
    w = common.pcpo_weights(sd15(), list(range(50)), "public")
    assert w[0].item() == pytest.approx(-4.5 / 8.70575, abs=1e-5)


# ---- advantages -----------------------------------------------------------------------------------------------------
class PerPromptStatTracker:
    """ddpo_pytorch/stat_tracking.py, as its formula: buffer_size and min_count of config/dgx.py, aesthetic()."""

    def __init__(self, buffer_size=32, min_count=16):
        self.buffer_size, self.min_count, self.stats = buffer_size, min_count, {}

    def update(self, prompts, rewards):
        prompts, rewards = numpy.array(prompts), numpy.array(rewards)
        advantages = numpy.empty_like(rewards)
        for prompt in numpy.unique(prompts):
            mine = rewards[prompts == prompt]
            deque = self.stats.setdefault(prompt, collections.deque(maxlen=self.buffer_size))
            deque.extend(mine)
            few = len(deque) < self.min_count
            mean, std = numpy.mean(rewards if few else deque), numpy.std(rewards if few else deque) + 1e-6
            advantages[prompts == prompt] = (mine - mean) / std
        return advantages


def test_running_statistics_are_ddpos():
    ours, theirs, full = grpo.RunningStats(1e-6), PerPromptStatTracker(), 0
    for _ in range(12):
        prompts = [p % 5 for p in torch.randint(0, 9, (40,)).tolist()]  # 0 ... 3 often, 4 seldom
        reward = torch.randn(40) + torch.tensor(prompts)
        adv, equal = ours.advantage(reward, prompts)
        truth = torch.tensor(theirs.update(prompts, reward.double().tolist()))
        close(adv.double(), truth, 1e-5)
        assert adv.dtype == torch.float32 and not equal.any()
        full += sum(len(kept) == 32 for kept in theirs.stats.values())
        saved = io.BytesIO()  # what a checkpoint keeps: the next epoch goes on from it
        torch.save(ours.state_dict(), saved)
        ours = grpo.RunningStats(1e-6)
        ours.load_state_dict(torch.load(io.BytesIO(saved.getvalue()), weights_only=True))
    assert full > 10


def test_running_statistics_of_equal_rewards_are_exactly_zero():
    value = torch.rand(()).item()
    adv, equal = grpo.RunningStats(1e-6).advantage(torch.full((3,), value), [7] * 3)  # of the epoch
    assert (adv == 0).all() and equal.all()
    reward = torch.cat([torch.full((17,), value), torch.rand(4)])  # of the prompt, beside another one
    adv, equal = grpo.RunningStats(1e-6).advantage(reward, [0] * 17 + [1] * 4)
    assert (adv[:17] == 0).all() and equal[:17].all() and (adv[17:] != 0).all() and not equal[17:].any()


# ---- the window -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["eps", "flow"])
def test_mixed_grid_is_stochastic_inside_and_the_ode_outside(kind):
    sde, ode = (sd15(8), sd15(8, 0, "ode")) if kind == "eps" else (sd35(8), sd35(8, 0, "ode"))
    steps = [2, 3, 6]
    grid = grpo.mixed_grid(sde, ode, steps)
    x_t, o, z = randn(), randn(), randn()
    for i in range(8):
        x_s = grid.x_coef[i] * x_t + grid.o_coef[i] * o + grid.sigma[i] * z
        one = sde if i in steps else ode
        assert torch.equal(x_s, one.x_coef[i] * x_t + one.o_coef[i] * o + one.sigma[i] * z)
        if i not in steps:  # and that is the textbook's deterministic step
            assert grid.sigma[i] == 0
            if kind == "flow":
                close(x_s, x_t - grid.dt[i] * o, 1e-12)
            else:
                x0 = (x_t - grid.nu[i] * o) / grid.alpha[i]
                close(x_s, grid.alpha_s[i] * x0 + grid.nu_s[i] * o, 1e-12)
        else:
            assert grid.sigma[i] == sde.sigma[i] > 0
    for table in ("timestep", "t", "dt", "alpha", "nu", "x0_x", "x0_o"):
        assert torch.equal(getattr(grid, table), getattr(sde, table))
    assert sde.sigma.min() > 0  # the SDE's own grid is left alone


def test_windows_lie_where_their_mode_says():
    for lap in range(40):
        assert grpo.window("fixed", 2, 1, 6, lap, 0) == [1, 2]
        assert grpo.window("random", 5, 1, 6, lap, 0) == [1, 2, 3, 4, 5]


def test_the_progressive_window_is_mixgrpos():
    """Its GRPOTrainingStates with roll-back: 25 steps, of which the last is T - 3; a window of 4 moves by 1 every 25
    iterations and shrinks at the end.  Theirs is then empty for 25 iterations, which train nothing: left out here."""
    T, width, every, start = 25, 4, 25, 0
    official, inside = [], 0
    for _ in range(3 * every * T):
        official.append(list(range(start, min(start + width, T - 2))))
        inside += 1
        if inside >= every:
            inside, start = 0, start + 1
        if start > T - 2:
            inside, start = 0, 0
    kept = [steps for steps in official if steps]
    ours = [grpo.window("progressive", width, 0, T - 2, epoch // every, 0) for epoch in range(len(kept))]
    assert ours == kept and {len(steps) for steps in ours} == {4, 3, 2, 1}


def test_a_shrinking_window_needs_updates_that_fit_one_step(capsys):
    flags = "--preset tiny --num-prompts 3 --group-size 5 --sde-window 2 --updates-per-epoch 2".split()
    assert grpo.parse_args([*flags, "--sde-window-mode", "fixed"]).sde_window == 2
    with pytest.raises(SystemExit):
        grpo.parse_args([*flags, "--sde-window-mode", "progressive"])
    assert "does not divide the 15 transitions" in capsys.readouterr().err


def test_random_windows_lie_in_their_range_and_depend_on_seed_and_lap_only():
    draws = [grpo.window("random", 2, 1, 6, lap, 7)[0] for lap in range(400)]
    assert set(draws) == {1, 2, 3, 4}
    counts = torch.bincount(torch.tensor(draws))[1:]
    assert ((counts - 100).abs() < 4 * math.sqrt(75)).all()  # uniform, 4 standard deviations
    torch.manual_seed(0)
    state = torch.get_rng_state()
    assert draws == [grpo.window("random", 2, 1, 6, lap, 7)[0] for lap in range(400)]
    assert torch.equal(torch.get_rng_state(), state)
    assert draws != [grpo.window("random", 2, 1, 6, lap, 8)[0] for lap in range(400)]


# ---- KL -------------------------------------------------------------------------------------------------------------
def test_kl_forms(grid):
    """mean = KL of the two Gaussians, reduced over the latent; times dt = ||d mu||^2 / 2 g^2 (Flow-GRPO)."""
    for i in steps_of(grid):
        for reduce in ("mean", "sum"):
            m = Move(grid, i, reduce=reduce)
            truth = kl_divergence(Normal(m.mu(m.o), m.sigma), Normal(m.mu(m.o_old), m.sigma))
            value = common.kl_divergence(m.moved, reduce)
            close(value, m.reduced(truth), 1e-8)
            if grid.kind == "flow":
                g2 = grid.sigma[i] ** 2 / grid.dt[i]
                heuristic = m.reduced((m.mu(m.o) - m.mu(m.o_old)) ** 2 / (2 * g2))
                close(value * grid.dt[i], heuristic, 1e-8)
    if grid.kernel == "flow_sde":  # the public code's std_dev_t is g, of sigma / (1 - sigma)
        i = 4
        g2 = 0.49 * grid.t[i] / (1 - grid.t[i])
        close(grid.sigma[i] ** 2 / grid.dt[i], g2, 1e-12)


def test_kl_and_its_gradient_vanish_where_the_outputs_agree(grid):
    m = Move(grid, 1, distance=0)
    for value in (common.kl_divergence(m.moved, "mean"), m.reduced((m.o - m.o_old) ** 2)):
        assert (value == 0).all() and (m.grad(value) == 0).all()
    m = Move(grid, 1)
    for value in (common.kl_divergence(m.moved, "mean"), m.reduced((m.o - m.o_old) ** 2)):
        assert (value > 0).all() and (m.grad(value) != 0).all()


# ---- flags ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "flags, word",
    [("--sde-window-range 0 3", "--sde-window-range"), ("--sde-window-mode random", "--sde-window-mode"),
     ("--sde-window 0 --sde-window-every=4", "--sde-window-every"), ("--random-steps 7", "--random-steps 7"),
     ("--sde-window 2 --random-steps 3", "more than the 2"), ("--shared-blocks 2 --shared-noise", "share x_T"),
     ("--adv-norm running --kl implicit", "--adv-norm running"), ("--adv-eps 0", "--adv-eps")],
)  # fmt: skip
def test_flags_without_meaning_are_refused(flags, word, capsys):
    with pytest.raises(SystemExit) as stop:
        grpo.parse_args(["--preset", "tiny", *flags.split()])
    assert stop.value.code == 2 and word in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags, silent",
    [("--kl mean --kl-anchor old", True), ("--kl velocity --kl-anchor old", True),
     ("--kl mean --kl-anchor ref", False), ("--kl none --kl-anchor old", False),
     ("--kl implicit --kl-anchor old", False),
     ("--kl mean --kl-anchor old --updates-per-epoch 2", False),
     ("--kl mean --kl-anchor old --inner-epochs 2", False)],
)  # fmt: skip
def test_a_kl_that_is_identically_zero_is_noted(flags, silent, capsys):
    grpo.parse_args(["--preset", "tiny", *flags.split()])
    assert ("identically 0" in capsys.readouterr().out) == silent


def test_the_fast_preset_is_the_released_one_and_its_clip_range_fits_our_density():
    """CPS log-probs of the public code lack 1 / 2 sigma^2: its 1e-5 is 1e-5 / 2 sigma^2 of ours."""
    preset = grpo.PRESETS["flowgrpo-fast"]
    released = dict(kernel="cps", sde_window=3, sde_window_mode="random", sde_window_range=[0, 5], noise_level=0.8,
                    cfg=1.0, kl="none", clip_range=1e-5, steps=10, reward="geneval-reward-flowgrpo",
                    prompts="prompts/geneval_train.jsonl", drop_zero_advantage=True)  # fmt: skip
    assert {key: preset[key] for key in released} == released
    factor = 2 * sd35(preset["steps"], preset["noise_level"], preset["kernel"]).sigma ** 2
    assert (factor[0].item(), factor[4].item()) == pytest.approx((1.668, 0.905), abs=1e-3)  # docs/grpo.md
    assert ((0.9 < factor[:5]) & (factor[:5] < 1.7)).all() and factor[7] < 0.2
    assert grpo.PRESETS["flowgrpo-sd35-geneval"]["reward"] == "geneval-reward-flowgrpo"


@pytest.mark.parametrize(
    "flags, needed",
    [("--kl none", False), ("--kl mean --kl-anchor old", False), ("--kl velocity --kl-anchor old", False),
     ("--kl mean --kl-anchor ref", True), ("--kl mean-nodt --kl-anchor ref", True), ("--kl implicit", True),
     ("--kl velocity --kl-anchor ref", True), ("--kl implicit --kl-anchor old", True)],
)  # fmt: skip
def test_the_reference_is_run_only_where_it_is_needed(flags, needed):
    assert grpo.needs_reference(grpo.parse_args(["--preset", "tiny", *flags.split()])) is needed


def test_the_dance_preset_is_dancegrpos_script(capsys):
    """finetune_flux_grpo.sh, train_grpo_flux.py: 16 GPUs x 1 prompt x 12, 16 steps, int(15 * .6) of the first 15."""
    with pytest.raises(SystemExit):
        grpo.parse_args(["--preset", "dance-sd35", "--dry-run"])
    said = capsys.readouterr().out
    sizes = [f"{192 * 9}, {192 * 9 // 3} per update", "64 of the reference, 3456 with gradient", "900 in all"]
    sizes += ["kernel dance, noise level 0.3", "16, of which 15 are trained", "192 = 16 prompts x 12", "note "]
    assert all(words in said for words in sizes), said
    released = dict(adv_norm="group", adv_unbiased=True, adv_eps=1e-8, kl="none", shared_noise=True, ema_decay=0,
                    epochs=300, dtype="bfloat16", drop_zero_advantage=False)  # fmt: skip
    assert {key: grpo.PRESETS["dance-sd35"][key] for key in released} == released
