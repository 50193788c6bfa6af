"""vmpo.py's pure functions against closed forms (method of the paper: Eq. numbers in the names)."""

import csv
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import common
import harness
import vmpo

F64 = torch.float64


def quadrature(mean, std, n=60):
    """Nodes and weights of an expectation under N(mean, std^2)."""
    x, w = np.polynomial.hermite_e.hermegauss(n)
    return torch.tensor(mean + std * x, dtype=F64), torch.tensor(w / w.sum(), dtype=F64)


class Gauss1D:
    """p_theta = N(m, e^{2l}), p_ref = N(mu0, q2), r = c1 x + c2 x^2 / 2."""

    def __init__(self, m=-0.4, var=0.36, mu0=0.3, q2=0.8, beta=0.5, c1=0.7, c2=0.0):
        self.m = torch.tensor(m, dtype=F64, requires_grad=True)
        self.log_std = torch.tensor(0.5 * math.log(var), dtype=F64, requires_grad=True)
        self.mu0, self.q2, self.beta, self.c1, self.c2 = mu0, q2, beta, c1, c2

    def logp(self, x):
        return -((x - self.m) ** 2) / (2 * (2 * self.log_std).exp()) - self.log_std

    def log_w(self, x):
        log_r = -((x - self.mu0) ** 2) / (2 * self.q2) - 0.5 * math.log(self.q2) - self.logp(x)
        return vmpo.log_weights(log_r, (self.c1 * x + self.c2 * x**2 / 2) / self.beta)

    def kl_grad(self):
        m, v = self.m.item(), math.exp(2 * self.log_std.item())
        return [
            (m - self.mu0) / self.q2 - (self.c1 + self.c2 * m) / self.beta,
            v / self.q2 - 1 - self.c2 * v / self.beta,
        ]

    def tilt(self):
        v = 1 / (1 / self.q2 - self.c2 / self.beta)
        return v * (self.mu0 / self.q2 + self.c1 / self.beta), v

    def grads(self, loss):
        return [g.item() for g in torch.autograd.grad(loss, [self.m, self.log_std], retain_graph=True)]

    @property
    def std(self):
        return math.exp(self.log_std.item())


LINEAR, QUADRATIC = dict(c1=0.7, c2=0.0), dict(c1=1.2, c2=-1.0)
MANY = 10**12  # K/(K-1) = 1


def half_variance(p, x, weight):
    log_w = p.log_w(x)
    mean = (weight * log_w).sum()
    return (weight * vmpo.mc_loss(log_w, mean, MANY)).sum()


@pytest.mark.parametrize("reward, known", [(LINEAR, (-2.275, -0.55)), (QUADRATIC, (-4.075, 0.17))])
def test_proposition_1_on_policy_gradient_is_that_of_kl_to_the_tilt(reward, known):
    p = Gauss1D(**reward)
    x, w = quadrature(p.m.item(), p.std)
    got = p.grads(half_variance(p, x, w))
    assert got == pytest.approx(p.kl_grad(), abs=1e-8)
    assert got == pytest.approx(known, abs=1e-8)


def test_proposition_1_holds_at_random_parameters():
    rng = np.random.default_rng()
    for _ in range(5):
        m, mu0, c1 = rng.normal(size=3)
        p = Gauss1D(m, rng.uniform(0.2, 1), mu0, rng.uniform(0.3, 1), rng.uniform(0.3, 2), c1, -rng.uniform(0, 2))
        x, w = quadrature(p.m.item(), p.std)
        assert p.grads(half_variance(p, x, w)) == pytest.approx(p.kl_grad(), abs=1e-7)


def test_off_policy_gradient():
    p = Gauss1D(**LINEAR)
    x, w = quadrature(0.5, math.sqrt(1.3))
    assert p.grads(half_variance(p, x, w)) == pytest.approx((-13.1806, -30.8971), abs=1e-3)


@pytest.mark.parametrize("reward, tilt", [(LINEAR, (1.42, 0.8)), (QUADRATIC, (0.853846, 0.307692))])
def test_variance_is_zero_at_the_tilt_for_any_proposal_and_positive_elsewhere(reward, tilt):
    mean, var = Gauss1D(**reward).tilt()
    assert (mean, var) == pytest.approx(tilt, abs=1e-6)
    x, w = quadrature(-1.7, 0.9)
    assert half_variance(Gauss1D(mean, var, **reward), x, w).item() < 1e-10
    assert half_variance(Gauss1D(mean + 0.1, var, **reward), x, w).item() > 1e-4


def test_eq5_and_eq6_are_unbiased():
    p, k, groups = Gauss1D(**QUADRATIC), 8, 200_000
    x = p.m.item() + p.std * torch.randn(groups, k, dtype=F64, generator=torch.Generator().manual_seed(0))
    nodes, weight = quadrature(p.m.item(), p.std)
    with torch.no_grad():
        log_w = p.log_w(x)
        estimates = vmpo.mc_loss(log_w, log_w.mean(1, keepdim=True), k).mean(1)
        truth = half_variance(p, nodes, weight).item()
        assert abs(estimates.mean() - truth) < 3 * estimates.std() / groups**0.5
        # Eq. 6, by hand: -1/(K-1) sum A grad log p, d log p / d m = (x - m) / var
        score = (x - p.m) / math.exp(2 * p.log_std)
        gradient = -((log_w - log_w.mean(1, keepdim=True)) * score).sum(1) / (k - 1)
        assert abs(gradient.mean() + 4.075) < 3 * gradient.std() / groups**0.5


def test_eq31_has_the_gradient_of_eq5_with_or_without_gradient_through_the_mean():
    p, k = Gauss1D(**QUADRATIC), 6
    x = torch.randn(5, k, dtype=F64)
    log_w = p.log_w(x)
    mean = log_w.mean(1, keepdim=True)
    through = p.grads(vmpo.mc_loss(log_w, mean, k).mean())
    assert p.grads(vmpo.mc_loss(log_w, mean.detach(), k).mean()) == pytest.approx(through, abs=1e-9)
    assert p.grads(vmpo.surrogate_loss(log_w, mean, p.logp(x), k).mean()) == pytest.approx(through, abs=1e-9)


def test_eq32_at_ratio_1_is_eq31_and_clips_beyond():
    p, k = Gauss1D(**QUADRATIC), 6
    x = torch.randn(5, k, dtype=F64)
    log_w, logp = p.log_w(x), p.logp(x)
    mean = log_w.mean(1, keepdim=True)
    surrogate = p.grads(vmpo.surrogate_loss(log_w, mean, logp, k).mean())
    ratio = logp - logp.detach()
    assert p.grads(vmpo.ppo_loss(log_w, mean, ratio, 0.2, k).mean()) == pytest.approx(surrogate, abs=1e-9)
    shift = torch.full_like(logp, 0.5)  # ratio 1.65: rows with A > 0 are clipped, the others are not
    lost = torch.autograd.grad(vmpo.ppo_loss(log_w, mean, ratio + shift, 0.2, k).sum(), logp, retain_graph=True)[0]
    adv = log_w - mean
    assert (lost[adv > 0] == 0).all()
    assert torch.allclose(lost[adv < 0], (-k / (k - 1) * adv * shift.exp())[adv < 0])


def test_eq8_gradient_is_twice_kl_and_on_policy_the_same_for_any_mean():
    p = Gauss1D(**QUADRATIC)
    x, w = quadrature(p.m.item(), p.std)
    log_w = p.log_w(x)
    for mean in ((w * log_w).sum().item(), -3.0, 8.0):
        theta, _ = vmpo.vmpo_loss(log_w, torch.full_like(log_w, mean))
        assert p.grads((w * theta).sum()) == pytest.approx([2 * g for g in p.kl_grad()], abs=1e-8)
    x, w = quadrature(0.5, math.sqrt(1.3))  # off-policy it is not
    log_w = p.log_w(x)
    mean = (w * log_w).sum().item()
    one, two = (p.grads((w * vmpo.vmpo_loss(log_w, log_w.detach() * 0 + m)[0]).sum()) for m in (mean, mean + 5))
    assert abs(one[0] - two[0]) > 1


def test_eq8_split_keeps_the_gradients_apart_and_adds_up_to_eq8():
    log_w, mean = torch.randn(7, requires_grad=True), torch.randn(7, requires_grad=True)
    theta, phi = vmpo.vmpo_loss(log_w, mean)
    assert torch.autograd.grad(theta.sum(), mean, allow_unused=True, retain_graph=True)[0] is None
    assert torch.autograd.grad(phi.sum(), log_w, allow_unused=True, retain_graph=True)[0] is None
    joint = ((log_w - mean) ** 2).sum()
    for variable in (log_w, mean):
        got = torch.autograd.grad((theta + phi).sum(), variable, retain_graph=True)[0]
        assert torch.allclose(got, torch.autograd.grad(joint, variable, retain_graph=True)[0])


@pytest.mark.parametrize("text_dim", [0, 12])
def test_networks_start_at_zero(text_dim):
    text = torch.randn(5, text_dim) if text_dim else None
    assert (vmpo.MeanNet(text_dim)(torch.rand(5), text) == 0).all()
    assert (common.FieldNet(4)(torch.randn(5, 4, 8, 8), torch.rand(5)) == 0).all()


def test_mean_net_can_fit_time_and_prompt():
    torch.manual_seed(0)
    net, t, text = vmpo.MeanNet(6), torch.rand(256), torch.randn(256, 6)
    target = 3 * t + text[:, 0]
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
    for _ in range(300):
        optimizer.zero_grad()
        loss = vmpo.vmpo_loss(target, net(t, text))[1].mean()
        loss.backward()
        optimizer.step()
    assert loss < 0.05 * target.var()


# ---- potentials -----------------------------------------------------------------------------------------------------
def test_potentials_telescope():
    reward_t, beta, steps = torch.randn(6, 11, dtype=F64), 0.3, 10
    diff = vmpo.diff_potential(reward_t, beta)
    assert diff.shape == (6, steps)
    assert torch.allclose(diff.sum(1), (reward_t[:, -1] - reward_t[:, 0]) / beta)
    final = reward_t[:, -1]
    assert torch.allclose(vmpo.r2g_potential(final, steps, beta, "1/T").sum(1), final / beta)
    assert torch.allclose(vmpo.r2g_potential(final, steps, beta).sum(1), steps * final / beta)


class Chain:
    """x_{t-1} = A_t x_t + B_t + sigma_t z, r = c x_0; the optimal policy shifts every mean by sigma^2 c M / beta."""

    def __init__(self, steps=10, seed=None):
        rng = np.random.default_rng(seed)
        self.a, self.b = rng.uniform(0.7, 1.2, steps), rng.normal(size=steps)
        self.sigma, self.c, self.beta = rng.uniform(0.2, 0.8, steps), rng.normal(), rng.uniform(0.5, 2)
        # in sampling order: later[i] = product of the A of the steps after step i
        self.later = np.append(np.cumprod(self.a[::-1])[::-1][1:], 1.0)
        self.steps = steps

    def optimum(self, beta=None):
        return self.sigma**2 * self.c * self.later / (beta or self.beta)

    def sample(self, delta, n, seed=None):
        """Trajectories of the policy with mean shifts delta: z (n, T), exact soft values (n, T+1), rewards (n,)."""
        rng = np.random.default_rng(seed)
        x, z = rng.normal(size=n), rng.normal(size=(n, self.steps))
        states = [x]
        for i in range(self.steps):
            states.append(self.a[i] * states[-1] + self.b[i] + delta[i] + self.sigma[i] * z[:, i])
        # V_t(x) = c M_t x + const: the constant of the reference process is the tilt's log-normaliser
        value, constant, slope = [], 0.0, 1.0
        for i in range(self.steps, -1, -1):
            value.append(self.c * slope * states[i] + constant)
            if i:
                s = self.sigma[i - 1]
                constant += self.c * slope * self.b[i - 1] + (self.c * slope * s) ** 2 / (2 * self.beta)
                slope *= self.a[i - 1]
        return z, np.stack(value[::-1], 1), self.c * states[-1]

    def log_r(self, delta, z):
        shift = torch.tensor(-delta / self.sigma, dtype=F64)  # (mu_ref - mu_theta) / sigma
        z = torch.tensor(z, dtype=F64)
        rows = [common.log_ratio(shift[i].expand(len(z), 1), z[:, i : i + 1], "sum") for i in range(self.steps)]
        return torch.stack(rows, 1)


def test_diff_with_exact_values_has_zero_variance_at_the_optimum():
    chain = Chain()
    delta = chain.optimum()
    z, value, _ = chain.sample(delta, 64)
    log_w = vmpo.log_weights(chain.log_r(delta, z), vmpo.diff_potential(torch.tensor(value), chain.beta))
    assert log_w.var(0).max() < 1e-10
    off = vmpo.log_weights(chain.log_r(1.2 * delta, z), vmpo.diff_potential(torch.tensor(value), chain.beta))
    assert off.var(0).max() > 1e-6


@pytest.mark.parametrize("scale", ["1", "1/T"])
def test_r2g_is_stationary_at_temperature_beta_or_t_beta(scale):
    chain, n = Chain(seed=3), 400_000
    right = chain.optimum(chain.beta if scale == "1" else chain.steps * chain.beta)
    wrong = chain.optimum(chain.beta if scale == "1/T" else chain.steps * chain.beta)
    for delta, stationary in ((right, True), (wrong, False)):
        z, _, reward = chain.sample(delta, n, seed=1)
        u = vmpo.r2g_potential(torch.tensor(reward), chain.steps, chain.beta, scale)
        log_w = vmpo.log_weights(chain.log_r(delta, z), u)
        # Eq. 6 with d log p / d delta = z / sigma
        gradient = -(log_w - log_w.mean(0)) * torch.tensor(z / chain.sigma)
        deviation = (gradient.mean(0) / (gradient.std(0) / n**0.5)).abs()
        assert (deviation.max() < 4) if stationary else (deviation.max() > 10)


def test_mean_reduction_targets_temperature_beta_over_d():
    d, beta, sigma = 12, 0.7, 0.4
    c = torch.randn(d, dtype=F64)
    for reduce, temperature in (("sum", beta), ("mean", beta / d)):
        shift = sigma**2 * c / temperature  # the tilt of N(0, sigma^2) by c x at that temperature
        z = torch.randn(50, d, dtype=F64)
        x_s = shift + sigma * z
        log_r = common.log_ratio((-shift / sigma).expand(50, d), z, reduce)
        assert vmpo.log_weights(log_r, x_s @ c / beta).var() < 1e-8


# ---- gradient matching ----------------------------------------------------------------------------------------------
def test_gradient_losses_vanish_at_the_optimum_of_the_linear_chain():
    chain = Chain()
    delta, i = chain.optimum(), 4
    z, _, _ = chain.sample(delta, 9)
    a, sigma = chain.a[i], chain.sigma[i]
    value_s, value_t = chain.c * chain.later[i], chain.c * chain.later[i] * a  # grad V of the arriving, leaving state
    z = torch.tensor(z[:, i : i + 1], dtype=F64)
    logp = -z / sigma  # grad_{x_s} log p_theta
    logp_ref = -(z + delta[i] / sigma) / sigma
    assert vmpo.gradient_loss(torch.full_like(z, value_s), logp_ref, logp, chain.beta).max() < 1e-18  # Eq. 52
    back, back_ref = a * z / sigma, a * (z + delta[i] / sigma) / sigma  # grad_{x_t}
    assert vmpo.gradient_loss(torch.full_like(z, -value_t), back_ref, back, chain.beta).max() < 1e-18  # Eq. 53
    half = torch.full_like(z, value_t / 2)  # Eq. 55: a reward gradient that lacks half, and G_phi that makes it up
    assert vmpo.gradient_loss(-half, back_ref, back, chain.beta, -half / chain.beta).max() < 1e-18
    assert vmpo.gradient_loss(-half, back_ref, back, chain.beta, half / chain.beta).min() > 1e-6  # the printed sign


def test_detailed_balance_is_the_square_of_the_log_weight():
    log_w = torch.randn(9, dtype=F64)
    assert torch.equal(vmpo.db_loss(log_w), log_w**2)
    assert torch.allclose(vmpo.db_loss(log_w), vmpo.vmpo_loss(log_w, torch.zeros_like(log_w))[0])


# ---- the official code's recipe -------------------------------------------------------------------------------------
SMALL = "--preset tiny --num-prompts 2 --group-size 2 --steps 3 --eval-images 2 --sample-every 0".split()


def run_metrics(folder, name, *flags):
    vmpo.main(vmpo.parse_args([*SMALL, "--runs", str(folder), "--name", name, *map(str, flags)]))
    with (folder / name / "metrics.csv").open(newline="") as f:
        return [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(f)][1:]


def test_reward_ramp_is_the_official_one():
    """train_vmpo_sd3.py: reward_exp min(1, epoch / 50), epoch from 0."""
    for epoch in range(120):
        assert vmpo.reward_ramp(epoch, 50) == min(1.0, epoch / 50) and vmpo.reward_ramp(epoch, 0) == 1
    assert vmpo.PRESETS["sd35-ocr-release"]["beta_warmup_epochs"] == 50


POTENTIALS = ["--potential r2g", "--potential diff", "--potential learned --mean time",
              "--potential diff --diff-reward train --mean time"]  # fmt: skip


@pytest.mark.parametrize("flags", POTENTIALS)
def test_the_reward_rises_from_nothing(tmp_path, flags):
    """u_t is 0, 1/2, 1, 1 of itself (theta does not move here); without it log w is log R alone."""
    fixed = [*flags.split(), "--lr", 1e-12, "--mean-lr", 1e-12, "--epochs", 4, "--train-fraction", 1]
    now, ramp = (run_metrics(tmp_path, f"w{n}", *fixed, "--beta-warmup-epochs", n) for n in (0, 2))
    for epoch, factor in enumerate((0, 1 / 2, 1, 1)):
        for key in ("potential/mean", "potential/std"):
            assert ramp[epoch][key] == pytest.approx(factor * now[epoch][key], rel=1e-4, abs=1e-7)
    assert now[0]["potential/std"] > 1e-3
    assert all(ramp[0][f"log_w/{key}"] == ramp[0][f"log_r/{key}"] for key in ("mean", "std"))


def test_the_ramp_scales_the_reward_gradients(tmp_path):
    """Gradient matching: at epoch 0 the reward's gradient is 0, and theta starts at the optimum of the rest."""
    clip = ["--reward", "clipscore", "--reward-path", harness.HERE / "tiny" / "clip", "--objective", "gradient"]
    now, ramp = (run_metrics(tmp_path, f"w{n}", *clip, "--epochs", 1, "--beta-warmup-epochs", n) for n in (0, 2))
    assert ramp[0]["loss/theta"] == 0 < now[0]["loss/theta"]


def test_random_steps_are_drawn_for_each_image(tmp_path, monkeypatch):
    """The official 9 of 10: every image its own, each once, the last step among them; the loss is their mean."""
    seen, losses = [], []
    rows, backward = common.Rollout.rows, common.Optimiser.backward
    monkeypatch.setattr(common.Rollout, "rows", lambda *a: (seen.append(torch.stack(a[1:], 1)), rows(*a))[1])
    spy = lambda self, loss: (losses.append(loss.item()), backward(self, loss))[1]  # noqa: E731
    monkeypatch.setattr(common.Optimiser, "backward", spy)
    flags = "--steps 5 --random-steps 4 --train-fraction 1 --epochs 6 --updates-per-epoch 2 --micro-batch-size 3"
    metrics = run_metrics(tmp_path, "run", *flags.split(), "--group-size", 4, "--lr", 1e-3)
    table = torch.cat(seen).view(6, 8 * 4, 2)
    left_out = []
    for epoch in table:
        for n in range(8):
            steps = epoch[epoch[:, 0] == n, 1].tolist()
            assert len(set(steps)) == len(steps) == 4
            left_out.append(10 - sum(steps))
        assert epoch[:, 1].max() == 4  # the last step is trained, too
    assert len(set(left_out)) == 5 and len(set(left_out[:8])) > 1
    per_epoch = len(losses) // 6
    for n, row in enumerate(metrics):  # each of the two updates is a mean over its 16 transitions
        total = sum(losses[n * per_epoch : (n + 1) * per_epoch]) / 2
        assert total == pytest.approx(row["loss/total"], rel=1e-4, abs=1e-9)
    with pytest.raises(SystemExit):
        vmpo.parse_args([*SMALL, "--random-steps", "4"])


def test_the_release_preset_is_the_official_configuration(capsys):
    """config/vmpo.py sd3_ocr, config/base.py and scripts/train_vmpo_sd3.py of the official code."""
    official = dict(
        beta=0.1, steps=10, eval_steps=40, cfg=4.5, noise_level=0.7, num_prompts=256, beta_warmup_epochs=50,
        diff_reward="train", kl_anchor="ref", kl_denom="g2", mean_coef=0.01, mean_lr=3e-5, ema_decay=0.9, ema_every=1,
        dtype="float16", max_sequence_length=128, train_fraction=1.0, random_steps=9, lora_rank=32, lora_alpha=64,
    )  # fmt: skip
    preset = vmpo.PRESETS["sd35-ocr-release"]
    assert {key: preset[key] for key in official} == official
    paper = vmpo.PRESETS["sd35-ocr"]
    assert paper["max_sequence_length"] == 128 and paper["dtype"] == "bfloat16" and "random_steps" not in paper
    for name, values in vmpo.PRESETS.items():
        assert name.startswith("tiny") or len(values["note"]) > 30, name
    with pytest.raises(SystemExit):
        vmpo.parse_args(["--preset", "sd35-ocr-release", "--prompts", "prompts/ocr_test.txt", "--dry-run"])
    printed = capsys.readouterr().out
    assert "2304, 1152 per update" in printed and preset["note"] in printed  # 256 x 9


def test_the_average_is_the_official_one():
    """EMAModuleWrapper(decay=0.9, update_step_interval=1): min((1 + s) / (10 + s), 0.9) after every step."""
    preset = vmpo.PRESETS["sd35-ocr-release"]
    args = vmpo.parse_args([*SMALL, f"--ema-decay={preset['ema_decay']}", f"--ema-every={preset['ema_every']}",
                            "--ema-warmup"])  # fmt: skip
    weight, run = torch.nn.Parameter(torch.randn(5)), SimpleNamespace(dtype=torch.float32, device=torch.device("cpu"))
    optimiser = harness.make_optimiser(args, run, [weight])
    average = weight.detach().double().clone()
    for s in range(1, 120):
        optimiser.backward((weight * torch.randn(5)).sum())
        optimiser.step()
        average += (1 - min((1 + s) / (10 + s), 0.9)) * (weight.detach().double() - average)
        assert torch.allclose(optimiser.ema.shadow[0].double(), average, atol=1e-6)
