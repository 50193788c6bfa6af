"""grpo.py and awm.py as a whole on the embedded models: each update is recomputed from the run by other means.

A Spy keeps what a run saw (states, rewards, weights and gradients at every optimiser step, network calls); the oracles
below rebuild each gradient in float64 from torch.distributions and the formulas of the papers.
"""

import csv
import math
import os
import re
import subprocess
import sys
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.distributions import Normal

import awm
import common
import grpo
import harness
import vmpo

ROOT = Path(__file__).resolve().parent.parent
SMALL = "--num-prompts 2 --group-size 3 --steps 4 --epochs 1 --eval-images 0 --sample-every 0 --save-every 9".split()
MODELS = ["tiny-sd35", "tiny-sd15"]
BOTH = pytest.mark.parametrize("script", [grpo, awm], ids=["grpo", "awm"])


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    monkeypatch.setattr(harness, "finish", lambda *a: None)  # pictures and summary: test_training.py


def arguments(script, folder, name, *flags):
    argv = ["--preset", "tiny", *SMALL, "--runs", str(folder), "--name", name, *map(str, flags)]
    return script.parse_args(argv)


def pattern(images, prompts, metadata):
    """A reward without ties: the image's likeness to a fixed pattern."""
    mask = torch.randn(images.shape[1:], generator=torch.Generator().manual_seed(1))
    return (images * mask).flatten(1).sum(1) / 10


def constant(images, prompts, metadata):
    return torch.full((len(images),), 0.3)


def mixed(images, prompts, metadata):
    """Every other group of three equal, in the others the mean, more and less."""
    return torch.tensor([0.5, 0.5, 0.5, 1.0, 2.0, 3.0]).repeat(len(images))[: len(images)]


PATTERN, CONSTANT, MIXED = (f"{__name__}:{name}" for name in ("pattern", "constant", "mixed"))


def train(script, folder, name, *flags):
    script.main(arguments(script, folder, name, *flags))
    return Path(folder) / name


def metrics(run, drop=("time/", "calls/")):
    with (Path(run) / "metrics.csv").open(newline="") as f:
        rows = list(csv.DictReader(f))
    return [{k: float(v) for k, v in row.items() if v and not k.startswith(drop)} for row in rows]


def state(run):
    return torch.load(Path(run) / "checkpoints" / "last" / "state.pt", weights_only=True)


def lora(run):
    return state(run)["theta"]["lora"]


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def close(a, b, rtol=1e-3, atol=1e-5):
    for row, other in zip(metrics(a), metrics(b), strict=True):
        assert row == pytest.approx(other, rel=rtol, abs=atol)


class Spy:
    """What a run did."""

    def __init__(self, monkeypatch):
        self.updates, self.old, self.images, self.paths, self.finals, self.metrics = [], [], [], [], [], []
        self.calls, self.phase, self.frozen = [], "update", False
        patch = monkeypatch.setattr
        add_lora, rollout, sample = harness.add_lora, common.rollout, awm.sample
        step, end, predict, reference = (
            common.Optimiser.step, harness.Recorder.end_epoch, common.Policy.predict, common.Policy.reference,
        )  # fmt: skip

        def spy_add_lora(policy, args):
            self.policy, self.args, self.params = policy, args, add_lora(policy, args)
            return self.params

        def rolled(result, kept):
            self.phase = "update"
            self.old.append(self.weights())
            kept.append(result)
            return result

        def spy_rollout(*a, **k):
            self.phase = "rollout"
            return rolled(rollout(*a, **k), self.paths)

        def spy_sample(*a):
            self.phase = "rollout"
            return rolled(sample(*a), self.images)

        def spy_step(optimiser):
            self.updates.append((self.weights(), [p.grad.clone() for p in self.params]))
            return step(optimiser)

        def spy_end(recorder, epoch, final, parts, found):
            self.finals.append(final), self.metrics.append(found)
            return end(recorder, epoch, final, parts, found)

        def spy_predict(policy, x, time, cond, cfg):
            kind = "reference" if self.frozen else "gradient" if torch.is_grad_enabled() else self.phase
            rows = len(x) * (2 if cfg != 1 else 1)
            self.calls.append((kind, rows, x.detach().clone(), time.clone(), cond.index.clone(), len(self.finals)))
            return predict(policy, x, time, cond, cfg)

        @contextmanager
        def spy_reference(policy):
            self.frozen = True
            with reference(policy):
                yield
            self.frozen = False

        (
            patch(harness, "add_lora", spy_add_lora),
            patch(common, "rollout", spy_rollout),
            patch(awm, "sample", spy_sample),
        )
        patch(common.Optimiser, "step", spy_step), patch(harness.Recorder, "end_epoch", spy_end)
        patch(common.Policy, "predict", spy_predict), patch(common.Policy, "reference", spy_reference)
        self.undo = monkeypatch.undo

    def weights(self):
        return [p.detach().clone() for p in self.params]

    def network(self, weights, x, time, cond, cfg=1.0):
        """Output in float64 of the network with these LoRA weights; None: of the frozen model."""
        if weights is None:
            with self.policy.reference(), torch.no_grad():
                return self.policy.predict(x, time, cond, cfg).double()
        for p, w in zip(self.params, weights, strict=True):
            p.data.copy_(w)
        return self.policy.predict(x, time, cond, cfg).double()

    def evaluations(self, epoch):
        """Rows through the network in one epoch, by purpose."""
        count = Counter()
        for kind, rows, *_, at in self.calls:
            if at == epoch:
                count[kind] += rows
        return [count[kind] for kind in ("rollout", "reference", "gradient", "update")]


def same_gradient(spy, update, loss, tolerance=1e-3):
    ours = torch.autograd.grad(loss, spy.params)
    found = torch.cat([g.flatten() for g in spy.updates[update][1]]).double()
    truth = torch.cat([g.flatten() for g in ours]).double()
    assert (found - truth).norm() <= tolerance * truth.norm(), (update, found.norm(), truth.norm())
    return truth.norm() > 0


def advantages(reward, mode, size, clip, eps=1e-4, unbiased=False):
    """(B,) in plain Python, and which samples belong to a group of equal rewards."""
    r = [float(x) for x in reward]
    found, equal_groups = [], []
    for start in range(0, len(r), size):
        g = r[start : start + size]
        mean = sum(g) / size
        std = (sum((x - mean) ** 2 for x in g) / (size - unbiased)) ** 0.5
        whole = sum((x - sum(r) / len(r)) ** 2 for x in r) / (len(r) - unbiased)
        for j, x in enumerate(g):
            others = [y for n, y in enumerate(g) if n != j]
            value = {
                "group": (x - mean) / (std + eps), "global": (x - mean) / (whole**0.5 + eps), "none": x - mean,
                "rloo": x - sum(others) / max(1, len(others)), "raw": x,
            }[mode]  # fmt: skip
            found.append(min(max(value, -clip), clip))
            equal_groups.append(max(g) == min(g))
    return torch.tensor(found, dtype=torch.float64), equal_groups


# ---- GRPO -----------------------------------------------------------------------------------------------------------
def kernels(args, scheduler):
    """Per step (mean(x, o), sigma, dt) from the papers' formulas, method_notes A.1 and A.2, and the ODE's means."""
    scheduler.set_timesteps(args.steps)
    steps, odes = [], []
    if args.kind == "eps":
        levels = scheduler.alphas_cumprod.double()
        for n in scheduler.timesteps.tolist():
            before = n - 1000 // args.steps
            one, two = levels[n], levels[before] if before >= 0 else scheduler.final_alpha_cumprod.double()
            sigma = args.noise_level * ((1 - two) / (1 - one) * (1 - one / two)) ** 0.5
            if args.loss == "pcpo" and args.pcpo_weights == "public":
                c1, w = ((1 - one) * two / one) ** 0.5, args.pcpo_w
                sigma = (w * c1 + ((1 - two) * (w**2 + 1) - c1**2) ** 0.5) / (w**2 + 1)

            def mean(x, o, one=one, two=two, sigma=sigma):
                x0 = (x - (1 - one) ** 0.5 * o) / one**0.5
                return two**0.5 * x0 + (1 - two - sigma**2) ** 0.5 * o

            steps.append((mean, sigma, 1 / args.steps))
            odes.append(lambda x, o, mean=mean: mean(x, o, sigma=0 * x[0, 0, 0, 0]))
        return steps, odes
    sigmas = scheduler.sigmas.double().tolist()
    for t, s in zip(sigmas[:-1], sigmas[1:]):
        dt, nl = t - s, args.noise_level
        if args.kernel == "ancestral":
            a = (1 - t) / (1 - s)
            q = t**2 - a**2 * s**2

            def mean(x, o, t=t, s=s, a=a, q=q):
                return (q * (1 - s) * (x - t * o) + a * s**2 * x) / t**2  # posterior of x_s given (x_t, x_0 = x0_hat)

            sigma = s / t * q**0.5
        elif args.kernel == "cps":
            sigma = s * float(torch.sin(torch.tensor(nl * torch.pi / 2, dtype=torch.float64)))

            def mean(x, o, t=t, s=s, sigma=sigma):
                return (1 - s) * (x - t * o) + (s**2 - sigma**2) ** 0.5 * (x + (1 - t) * o)

        else:
            g2 = nl**2 if args.kernel == "dance" else nl**2 * t / (1 - t if t < 1 else 1 - sigmas[1])

            def mean(x, o, t=t, dt=dt, g2=g2):
                return x - dt * (o + g2 / (2 * t) * (x + (1 - t) * o))

            sigma = (g2 * dt) ** 0.5
        steps.append((mean, torch.tensor(sigma, dtype=torch.float64), dt))
        odes.append(lambda x, o, dt=dt: x - dt * o)
    return steps, odes


class Oracle:
    """grpo.py's update anew: densities from torch.distributions, network outputs from the weights of the time."""

    def __init__(self, spy, epoch):
        self.spy, self.args, self.epoch, self.path = spy, spy.args, epoch, spy.paths[epoch]
        self.steps, self.odes = kernels(spy.args, spy.policy.pipe.scheduler)
        self.old = spy.old[epoch]
        self.times = spy.policy.pipe.scheduler.timesteps.float()

    def reduce(self, x):
        return x.flatten(1).mean(1) if self.args.logprob_reduce == "mean" else x.flatten(1).sum(1)

    def output(self, weights, i, rows=slice(None)):
        x = self.path.x[rows, i]
        return self.spy.network(weights, x, self.times[i].expand(len(x)), self.path.cond[rows], self.args.cfg)

    def logp(self, o, i, rows=slice(None)):
        mean, sigma, _ = self.steps[i]
        x_t, x_s = self.path.x[rows, i].double(), self.path.x[rows, i + 1].double()
        return self.reduce(Normal(mean(x_t, o), sigma).log_prob(x_s))

    def kl(self, a, b, i, rows):
        mean, sigma, _ = self.steps[i]
        x_t = self.path.x[rows, i].double()
        p, q = (Normal(mean(x_t, o), sigma) for o in (a, b))
        return self.reduce(torch.distributions.kl_divergence(p, q))

    def weight(self, i):
        """|b k| / sigma of the native sampler: the mean's change per unit of output, in standard deviations."""
        native = kernels(self.vary(loss="grpo"), self.spy.policy.pipe.scheduler)[0][i]
        x = torch.zeros(1, 1, 1, 1, dtype=torch.float64)
        return abs(native[0](x, x + 1) - native[0](x, x)).item() / float(native[1])

    def vary(self, **changes):
        return type(self.args)(**(vars(self.args) | changes))

    def advantages(self, trained):
        args, reward = self.args, self.spy.finals[self.epoch].double()
        columns = [reward] * len(trained)
        if args.kl == "implicit":
            with torch.no_grad():
                drift = [self.logp(self.output(self.old, i), i) - self.logp(self.output(None, i), i) for i in trained]
            columns = [reward - args.beta * d for d in drift]
        std = args.adv_eps, args.adv_unbiased
        found = [advantages(c, args.adv_norm, args.group_size, args.adv_clip, *std) for c in columns]
        return {i: a for i, (a, _) in zip(trained, found)}

    def loss(self, update, trained):
        """The update's objective as a function of theta, and the means that the log should show."""
        args, weights = self.args, self.spy.updates[update][0]
        inner, part = divmod(update - self.epoch * args.updates_per_epoch * args.inner_epochs, args.updates_per_epoch)
        samples, key = args.num_prompts * args.group_size, (args.seed, self.epoch, inner)
        parts = args.updates_per_epoch
        rows = common.shuffled_rows(range(samples), samples, trained, parts, *key, each=args.random_steps)[part]
        adv, total, seen = self.advantages(trained), 0.0, Counter()
        if args.drop_zero_advantage:
            rows = torch.tensor([row for row in rows.tolist() if adv[row[1]][row[0]] != 0])
        with torch.no_grad():
            fixed = {i: (self.output(self.old, i), self.output(None, i)) for i in trained}
        for i in sorted(set(rows[:, 1].tolist())):
            n = rows[rows[:, 1] == i, 0]
            mean, sigma, dt = self.steps[i]
            o_old, o_ref = (o[n] for o in fixed[i])
            o, a, xi = self.output(weights, i, n), adv[i][n], args.clip_range
            lam = self.logp(o, i, n) - self.logp(o_old, i, n)
            x_t = self.path.x[n, i].double()
            gap = mean(x_t, o) - mean(x_t, o_old)
            if args.loss == "pcpo" and args.pcpo_weights != "none":
                z = (self.path.x[n, i + 1].double() - mean(x_t, o_old)) / sigma
                over = range(args.steps) if args.pcpo_weights == "public" else trained  # the public constant
                w = sum(self.weight(j) for j in over) / len(over)
                if args.pcpo_weights == "zeta":
                    zeta = sum(map(self.weight, trained)) / sum(self.steps[j][2] for j in trained)
                    w = zeta * dt
                do = o - o_old
                lam = -self.reduce(0.5 * w**2 * do**2 - w * do * z * (-1))  # -(w^2 do^2 / 2 + w do.z)
            if args.loss == "guard":
                lam = (lam + self.reduce(gap**2 / (2 * sigma**2))) * sigma
            ratio = lam.exp()
            if args.loss == "reinforce":
                loss = -a * self.logp(o, i, n)
            elif args.loss == "epg":
                loss = -ratio.detach() * a * self.logp(o, i, n)
            elif args.loss == "pcpo":
                loss = torch.where(a * lam > xi * a.abs(), -xi * a.abs(), -a * lam)
            else:
                loss = torch.maximum(-a * ratio, -a * ratio.clamp(1 - xi, 1 + xi))
            if args.loss == "guard":
                loss = loss / dt
            anchor = o_ref if args.kl_anchor == "ref" else o_old
            kl = torch.zeros_like(loss)
            if args.kl == "mean":
                kl = self.kl(o, anchor, i, n)
            elif args.kl == "mean-nodt":
                x = mean(x_t, o) - mean(x_t, anchor)
                kl = self.reduce(x**2) / (2 * sigma**2 / dt)  # 2 g^2
            elif args.kl == "velocity":
                kl = ((o - anchor) ** 2).flatten(1).mean(1)
            total = total + (loss + args.beta * kl).sum()
            far = (lam if args.loss == "pcpo" else ratio - 1).detach().abs() > xi
            seen.update({
                "loss/kl": kl.sum().item(), "ratio/mean": ratio.sum().item(), "ratio/clip_frac": far.sum().item(),
                "adv/mean": a.sum().item(), "square": (a**2).sum().item(), "rows": len(n),
                "kl/ref": self.kl(o, o_ref, i, n).sum().item(), "ratio/approx_kl": (0.5 * lam**2).sum().item(),
            })  # fmt: skip
        return total / len(rows), seen


TWO = "--updates-per-epoch 2 --lr 5e-4 --clip-range 1e-4 "
GRPO_BOTH = [
    "--loss reinforce --kl mean --kl-anchor ref --beta 3 --adv-norm none --epochs 2",
    TWO + "--loss ddpo --kl none --adv-norm global",
    TWO + "--loss grpo --kl velocity --kl-anchor ref --beta 0.7 --adv-norm group --adv-clip 1",
    TWO + "--loss epg --kl mean --kl-anchor old --beta 0.05 --adv-norm rloo --kernel ancestral --train-fraction 0.75",
    TWO + "--loss pcpo --adv-norm raw --kl velocity --kl-anchor old --beta 2 --pcpo-w 20",
    TWO + "--loss pcpo --pcpo-weights loss-only --clip-range 1e-5 --kl none"
    " --sde-window 2 --sde-window-mode random --epochs 2",
    TWO + "--loss pcpo --pcpo-weights none --clip-range 1e-5 --kl implicit --beta 2000 --adv-norm group --epochs 2",
    TWO + "--loss guard --clip-range 1e-4 --kl none --adv-norm global --noise-level 0.6",
    TWO + "--loss grpo --kl implicit --beta 2000 --adv-norm none --inner-epochs 2 --epochs 2 --clip-range 1e-2",
    TWO + "--loss grpo --clip-range 3e-2 --kl mean --kl-anchor ref --logprob-reduce sum --beta 0.01",
    TWO + "--loss grpo --kl mean --kl-anchor ref --beta 3 --adv-norm group --adv-unbiased --adv-eps 1e-2"
    " --random-steps 2 --shared-blocks 3 --inner-epochs 2",
    TWO + "--loss grpo --kl velocity --kl-anchor ref --beta 9 --drop-zero-advantage --adv-norm global --epochs 2"
    f" --reward {MIXED} --num-prompts 4 --random-steps 1 --seed 1",
    TWO + "--loss grpo --sde-window 2 --sde-window-mode progressive --kl mean --kl-anchor ref --beta 3"
    " --adv-norm global --epochs 2 --train-fraction 0.75",
    TWO + "--loss grpo --sde-window 2 --sde-window-mode progressive --kl none --adv-norm global --epochs 3",
]
GRPO_FLOW = [
    TWO + "--kl mean-nodt --kl-anchor ref --beta 4 --kernel dance --noise-level 0.4 --adv-norm global",
    TWO + "--kl mean-nodt --kl-anchor old --beta 4 --kernel cps --sde-window 2 --sde-window-mode fixed",
    TWO + "--loss pcpo --kl none --cfg 2",
]


@pytest.mark.parametrize(
    "model, flags", [(m, f) for m in MODELS for f in GRPO_BOTH] + [("tiny-sd35", f) for f in GRPO_FLOW]
)
def test_grpo_updates_are_the_papers(tmp_path, monkeypatch, model, flags):
    spy = Spy(monkeypatch)
    train(grpo, tmp_path, "run", "--model", model, "--reward", PATTERN, *flags.split())
    spy.undo()
    args = spy.args
    per_epoch = args.updates_per_epoch * args.inner_epochs
    counts = re.findall(r"\d+", grpo.sizes(args)["network evaluations per epoch"])
    for epoch in range(args.epochs):
        oracle, found = Oracle(spy, epoch), spy.metrics[epoch]
        trained = list(range(args.train_steps))
        if args.sde_window:
            first = int(found["window/first"])
            trained = list(range(first, min(first + args.sde_window, args.train_steps)))
            assert trained and (args.sde_window_mode != "progressive" or first == epoch % args.train_steps)
        if args.shared_blocks:
            start = oracle.path.x[:, 0].unflatten(0, (args.shared_blocks, -1))
            assert (start == start[:, :1]).all() and len({block[0].sum().item() for block in start}) == len(start)
        for i in range(args.steps):  # stochastic where it is trained; the ODE's step elsewhere, if there is a window
            if args.sde_window and i not in trained:
                with torch.no_grad():
                    step = oracle.odes[i](oracle.path.x[:, i].double(), oracle.output(oracle.old, i))
                assert (oracle.path.x[:, i + 1] - step).abs().max() < 1e-5
        seen, moved = Counter(), 0
        for update in range(epoch * per_epoch, (epoch + 1) * per_epoch):
            loss, values = oracle.loss(update, trained)
            moved += same_gradient(spy, update, loss)
            seen.update(values)
        assert moved > per_epoch / 2
        rows, square = seen.pop("rows"), seen.pop("square")
        samples = args.num_prompts * args.group_size
        each = args.random_steps or len(trained)
        kept = 1 / 3 if args.drop_zero_advantage else 1  # MIXED: two of six images
        assert rows == samples * each * args.inner_epochs * kept
        if args.drop_zero_advantage:
            assert found["adv/zero_std_frac"] == 0.5 and found["adv/mean"] == pytest.approx(0, abs=1e-6)
        if not grpo.needs_reference(args):  # at the rollout's policy and a few transitions: test_diagnostics.py
            assert "kl/ref" in found
            del seen["kl/ref"]
        for key, value in seen.items():
            assert found[key] == pytest.approx(value / rows, rel=2e-2, abs=1e-6), key
        spread = square / rows - (seen["adv/mean"] / rows) ** 2
        assert found["adv/std"] == pytest.approx(max(0, spread) ** 0.5, rel=1e-3, abs=1e-5)
        share = len(trained) / (args.sde_window or len(trained))  # of a window at the end
        said = [int(counts[0]), int(int(counts[1]) * share), int(int(counts[2]) * kept * share), 0]
        assert spy.evaluations(epoch) == said  # as --dry-run says, without the rows that are dropped


# ---- AWM ------------------------------------------------------------------------------------------------------------
class AwmOracle:
    """awm.py's update anew: noisings as the run made them, everything else from the formulas of D.1, D.3 and D.4."""

    def __init__(self, spy, epoch, lag):
        self.spy, self.args, self.epoch, self.lag = spy, spy.args, epoch, lag
        self.x0, self.old = spy.images[epoch], spy.old[epoch] if spy.args.offpolicy != "lagged" else lag
        self.cond = spy.policy.encode([p.text for p in common.prompt_batch(*self.prompts())])
        x_t, target, time, t, alpha, nu = awm.Noising(self.args, spy.policy)(self.x0, epoch, range(len(self.x0)))
        self.x_t, self.time, self.target = x_t, time, target.double()
        self.t, self.alpha, self.nu = t.double(), alpha.double(), nu.double()

    def prompts(self):
        return self.args.prompt_list, self.epoch, self.args.seed, self.args.num_prompts

    def output(self, weights, n):
        """(n, n_t, C, h, w) of images n."""
        size = self.args.train_timesteps
        cond = self.cond[(n // self.args.group_size).repeat_interleave(size)]
        x, time = self.x_t[n].flatten(0, 1), self.time[n].flatten()
        return self.spy.network(weights, x, time, cond, self.args.train_cfg).view(len(n), size, *x.shape[1:])

    def loss(self, update):
        args, weights = self.args, self.spy.updates[update][0]
        per_epoch = args.updates_per_epoch * args.inner_epochs
        inner, part = divmod(update - self.epoch * per_epoch, args.updates_per_epoch)
        samples, key = args.num_prompts * args.group_size, (args.seed, self.epoch, inner)
        n = common.shuffled_rows(range(samples), samples, [0], args.updates_per_epoch, *key)[part][:, 0]
        adv, _ = advantages(self.spy.finals[self.epoch].double(), args.adv_norm, args.group_size, args.adv_clip)
        a, t = adv[n] / args.adv_scale, self.t[n]
        if args.adv_soft_clip:
            a = args.adv_soft_clip * torch.tanh(a / args.adv_soft_clip)
        with torch.no_grad():
            first = update % per_epoch == 0 and args.offpolicy == "half" or args.offpolicy == "none"
            o_old, o_ref, o_lag = (self.output(w, n) for w in (weights if first else self.old, None, self.lag))
        o = self.output(weights, n)

        def square(x, y):
            return ((x - y) ** 2).mean((2, 3, 4))

        elbo = (1 - t) / t
        if args.kind == "eps":  # -1/2 d logSNR / du, u = index / 1000; one-sided at the ends
            snr = [x / (1 - x) for x in self.spy.policy.pipe.scheduler.alphas_cumprod.double().tolist()]
            ends = [[(max(0, i - 1), min(999, i + 1)) for i in row] for row in self.time[n].long().tolist()]
            elbo = torch.tensor([[500 * math.log(snr[a] / snr[b]) / (b - a) for a, b in row] for row in ends])

        def bound(e, o):  # -l
            p, wide = args.huber_power, (slice(None), slice(None), None, None, None)
            gap = o.detach() - self.target[n]
            gap = self.nu[n][wide] * gap if args.kind == "flow" else self.nu[n][wide] / self.alpha[n][wide] * gap
            if args.weight == "adaptive":  # V-GRPO: mean squares of x_0's error over its detached mean
                gain = (gap**2).mean((2, 3, 4)) / e.detach()
                return gain * e / gap.abs().mean((2, 3, 4))
            return {
                "uniform": e, "elbo": e * elbo, "t": e * t, "t2": e * t**2,
                "huber": t * ((e + 1e-10).sqrt() - 1e-5), "ghuber": t / p * ((e + 1e-10) ** p - 1e-10**p),
            }[args.weight]  # fmt: skip

        e, e_old = square(o, self.target[n]), square(o_old, self.target[n])
        log_ratio = bound(e_old, o_old) - bound(e, o)
        if args.ratio == "mean-then-exp":
            log_ratio = log_ratio.mean(1, keepdim=True)
        ratio = log_ratio.exp()
        policy = -a[:, None] * ratio
        if args.clip_range:
            policy = torch.maximum(policy, -a[:, None] * ratio.clamp(1 - args.clip_range, 1 + args.clip_range))
        policy = policy.mean(1)
        if args.objective == "nft":
            r, b = (0.5 + a / (2 * args.adv_clip)).clamp(0, 1)[:, None], args.nft_beta
            parts = []
            for v in ((1 - b) * o_lag + b * o, (1 + b) * o_lag - b * o):
                if args.nft_space == "native":
                    parts.append(square(v, self.target[n]))
                    continue
                wide = (slice(None), slice(None), None, None, None)
                x0_hat = self.x_t[n].double() - self.nu[n][wide] * v
                gap = (x0_hat if args.kind == "flow" else x0_hat / self.alpha[n][wide]) - self.x0[n, None].double()
                parts.append((gap**2).mean((2, 3, 4)) / gap.detach().abs().mean((2, 3, 4)))
            policy = args.adv_clip / b * (r * parts[0] + (1 - r) * parts[1]).mean(1)
        if args.objective == "ram":  # Eq. 17's regression with m = 1 / beta, less the anchor that is added below
            pull = a.view(-1, 1, 1, 1, 1) / args.beta * (self.target[n] - o_old)
            policy = args.beta * (square(o, o_ref + pull) - square(o, o_ref)).mean(1)
        w_kl = (1 - t).clamp(min=0.01) / (0.98 * t) if args.kl_weight == "elbo" else torch.ones_like(t)
        kl, lag = (w_kl * square(o, o_ref)).mean(1), square(o, o_lag).mean(1)
        seen = Counter({
            "rows": len(n), "loss/policy": policy.sum().item(), "loss/kl": kl.sum().item(),
            "loss/lag": lag.sum().item(),
            "matching/error": e.mean(1).sum().item(), "ratio/mean": ratio.mean(1).sum().item(),
            "adv/mean": a.sum().item(),
            "kl/ref": square(o, o_ref).mean(1).sum().item(),
        })  # fmt: skip
        return (policy + args.beta * kl + args.lag_coef * lag).sum() * args.updates_per_epoch / len(self.x0), seen


HALF = "--updates-per-epoch 2 --lr 1e-3 "
AWM_BOTH = [
    HALF,  # the paper
    HALF + "--weight elbo --timesteps uniform --ratio exp-each --beta 0 --adv-norm none --inner-epochs 2",
    HALF
    + "--weight t --timesteps logit-normal --no-stratified --clip-range 1e-3 --beta 2 --adv-norm rloo --sampler sde",
    HALF + "--weight t2 --offpolicy lagged --ratio exp-each --adv-norm raw --beta 0.5 --lag-coef 0"
    " --lag-decay-slope 0.4 --epochs 2",
    "--weight huber --offpolicy none --lag-coef 2 --lag-decay-slope 0.2 --beta 0 --skip-first --adv-scale 5"
    " --adv-clip 1 --epochs 3 --sampler SASolverScheduler",
    "--weight ghuber --huber-power 0.3 --lag-coef 0.5 --ratio exp-each --clip-range 1"
    " --sampler UniPCMultistepScheduler --train-timesteps 3 --updates-per-epoch 3 --adv-norm global",
    "--objective nft --offpolicy lagged --updates-per-epoch 2 --nft-beta 0.5 --beta 0.1"
    " --lag-decay-slope 0.3 --adv-clip 2 --epochs 2",
    "--objective nft --offpolicy lagged --nft-space native --lag-decay-slope 0.9"
    " --lag-decay-max 0.6 --lag-decay-start 2 --epochs 2",
    HALF + "--objective ram --offpolicy lagged --lag-decay-slope 0.3 --beta 0.05 --timesteps linear --epochs 2",
    "--objective ram --offpolicy none --adv-norm global --adv-clip inf --beta 0.01",
    HALF + "--weight adaptive --noisings-of group --adv-soft-clip 0.7 --clip-range 1e-3 --beta 0 --epochs 2",
    HALF + "--train-cfg 2 --cfg 2 --train-timesteps 2 --shared-noise --sampler sde",
]
AWM_ONE = [
    ("tiny-sd35", HALF + "--kl-weight elbo --beta 0.3 --kernel cps --sampler sde"),
    ("tiny-sd15", "--sampler EulerAncestralDiscreteScheduler --updates-per-epoch 1 --beta 0.01"),
]


@pytest.mark.parametrize("model, flags", [(m, f) for m in MODELS for f in AWM_BOTH] + AWM_ONE)
def test_awm_updates_are_the_papers(tmp_path, monkeypatch, model, flags):
    spy = Spy(monkeypatch)
    train(awm, tmp_path, "run", "--model", model, "--reward", PATTERN, *flags.split())
    spy.undo()
    args = spy.args
    per_epoch = args.updates_per_epoch * args.inner_epochs
    lag = spy.updates[0][0]  # the lagged copy starts as theta
    counts = [int(x) for x in re.findall(r"\d+", awm.sizes(args)["network evaluations per epoch"])]
    for epoch in range(args.epochs):
        behaviour = lag if args.offpolicy == "lagged" else spy.updates[epoch * per_epoch][0]
        assert all(torch.allclose(x, y, rtol=0, atol=1e-7) for x, y in zip(spy.old[epoch], behaviour, strict=True))
        oracle, seen, found = AwmOracle(spy, epoch, lag), Counter(), spy.metrics[epoch]
        for update in range(epoch * per_epoch, (epoch + 1) * per_epoch):
            loss, values = oracle.loss(update)
            assert same_gradient(spy, update, loss)
            seen.update(values)
        rows = seen.pop("rows")
        assert rows == args.num_prompts * args.group_size * args.inner_epochs
        if not args.lag_coef:
            seen.pop("loss/lag"), found.pop("loss/lag", None)
        if not args.beta:
            seen.pop("loss/kl"), seen.pop("kl/ref"), found.pop("loss/kl", None), found.pop("kl/ref", None)
        if args.objective != "awm":  # they have no ratio; RAM's loss is the regression's up to a constant
            seen.pop("ratio/mean"), args.objective == "ram" and seen.pop("loss/policy")
        for key, value in seen.items():
            assert found[key] == pytest.approx(value / rows, rel=1e-3, abs=1e-6), key
        rollout, gradient, reference, old = counts  # as --dry-run says
        assert spy.evaluations(epoch) == [rollout, reference, gradient, old]
        # theta's new weights: the next update's, or the checkpoint's; the lagged copy follows once an epoch
        after = spy.updates[(epoch + 1) * per_epoch][0] if epoch + 1 < args.epochs else lora(tmp_path / "run")
        steps = (epoch + 1) * per_epoch  # of the optimiser: NFT's return_decay(global_step)
        d = min(args.lag_decay_max, args.lag_decay_slope * max(0, steps - args.lag_decay_start))
        lag = [d * x + (1 - d) * y for x, y in zip(lag, after)]
        assert found["lag/decay"] == pytest.approx(d)
    kept = state(tmp_path / "run")["lag"]["shadow"]
    assert all(torch.allclose(x, y, atol=1e-7) for x, y in zip(lag, kept, strict=True))


def test_awm_shows_the_same_noisings_to_all_policies(tmp_path, monkeypatch):
    spy = Spy(monkeypatch)
    train(awm, tmp_path, "run", *"--updates-per-epoch 2 --lag-coef 1 --beta 1 --micro-batch-size 4 --epochs 1".split())
    key = lambda x, time, index: tuple(x.flatten().tolist()[:9]) + (time.item(), index.item())  # noqa: E731
    sets = {"reference": Counter(), "gradient": Counter(), "update": Counter()}
    for kind, _, x, time, index, _ in spy.calls:
        if kind != "rollout":
            sets[kind].update(key(*row) for row in zip(x, time, index))
    assert len(sets["gradient"]) == 2 * 3 * 4 and set(sets["gradient"].values()) == {1}
    assert sets["reference"] == sets["gradient"]
    # without gradient: the lagged copy on all images, the rollout's policy on the second half
    assert set(sets["update"]) == set(sets["gradient"]) and Counter(sets["update"].values()) == {1: 12, 2: 12}


@pytest.mark.parametrize("flags", ["--updates-per-epoch 2 --inner-epochs 3", "--updates-per-epoch 1 --inner-epochs 2"])
def test_dry_run_counts_awms_old_policy_over_several_passes(tmp_path, monkeypatch, flags):
    """The rollout's policy is asked once for each image that any update but the first one sees."""
    spy = Spy(monkeypatch)
    train(awm, tmp_path, "run", "--epochs", 1, *flags.split())
    rollout, gradient, reference, old = (
        int(x) for x in re.findall(r"\d+", awm.sizes(spy.args)["network evaluations per epoch"])
    )
    assert spy.evaluations(0) == [rollout, reference, gradient, old]


# ---- what must not change a run -------------------------------------------------------------------------------------
STATEFUL = {
    grpo: "--updates-per-epoch 2 --kl mean --kl-anchor ref --sde-window 2 --sde-window-mode random --ema-every 3",
    awm: "--updates-per-epoch 2 --lag-coef 1 --lag-decay-slope 0.2 --offpolicy lagged --sampler SASolverScheduler",
}


@BOTH
@pytest.mark.parametrize("model", MODELS)
def test_resumed_run_is_bitwise_the_uninterrupted_one(tmp_path, script, model):
    flags = ["--model", model, *STATEFUL[script].split(), "--save-every", 1]
    whole = train(script, tmp_path, "whole", *flags, "--epochs", 3)
    halves = train(script, tmp_path, "halves", *flags, "--epochs", 1)
    script.main(script.parse_args(["--resume", str(halves), "--epochs", "3"]))
    assert metrics(whole) == metrics(halves)
    one, two = state(whole), state(halves)
    assert equal(one["theta"]["lora"], two["theta"]["lora"]) and equal(
        one["theta"]["ema"]["shadow"], two["theta"]["ema"]["shadow"]
    )
    if script is awm:
        assert equal(one["lag"]["shadow"], two["lag"]["shadow"]) and not equal(
            one["lag"]["shadow"], one["theta"]["lora"]
        )
    a, b = (load_file(r / "checkpoints" / "last" / "pytorch_lora_weights.safetensors") for r in (whole, halves))
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)  # their headers name the runs


@BOTH
@pytest.mark.parametrize("model", MODELS)
def test_micro_batch_size_changes_nothing_else(tmp_path, monkeypatch, script, model):
    spy = Spy(monkeypatch)
    flags = ["--model", model, "--reward", PATTERN, "--epochs", 2, *STATEFUL[script].split()]
    one = train(script, tmp_path, "one", *flags, "--micro-batch-size", 64)
    other = train(script, tmp_path, "other", *flags, "--micro-batch-size", 5 if script is grpo else 1)
    close(one, other)
    a, b, start = (torch.cat([x.flatten() for x in w]) for w in (lora(one), lora(other), spy.updates[0][0]))
    # AdamW divides the smallest gradients by themselves, hence their rounding, too
    assert (a - b).norm() < 2e-2 * (a - start).norm()


TWICE = """
import harness, grpo, awm
harness.finish = lambda *a: None
for script, flags in {runs!r}:
    script = dict(grpo=grpo, awm=awm)[script]
    script.main(script.parse_args(flags))
import torch
torch.distributed.destroy_process_group()
"""


DROP = f"--updates-per-epoch 2 --kl mean --kl-anchor ref --drop-zero-advantage --random-steps 2 --reward {MIXED}"
RUNNING = "--updates-per-epoch 2 --kl none --shared-blocks 2 --adv-norm running"


def test_two_processes_give_the_metrics_of_one(tmp_path):
    """Both scripts, in one pair of processes; the standard deviation of the advantage is that of all processes."""
    runs, names = [], []
    for script, own in ((grpo, STATEFUL[grpo]), (grpo, DROP), (grpo, RUNNING), (awm, STATEFUL[awm])):
        name = f"{script.__name__}{len(runs)}"
        flags = ["--preset", "tiny", *SMALL, "--runs", str(tmp_path), "--num-prompts", "4", "--adv-norm", "global"]
        flags += ["--epochs", "2", *own.split()]
        script.main(script.parse_args([*flags, "--name", f"{name}-one"]))
        runs.append((script.__name__, [*flags, "--name", f"{name}-two"])), names.append(name)
    env = os.environ | dict(OMP_NUM_THREADS="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="29617", WORLD_SIZE="2")
    env["PYTHONPATH"] = str(ROOT / "tests")  # of the reward
    pair = [
        subprocess.Popen(
            [sys.executable, "-c", TWICE.format(runs=runs)], cwd=ROOT, env=env | {"RANK": str(rank)},
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    for process in pair:
        _, err = process.communicate(timeout=300)
        assert process.returncode == 0, err[-2000:]
    for name in names:
        close(tmp_path / f"{name}-one", tmp_path / f"{name}-two")


def test_running_statistics_are_used_and_resumed(tmp_path, monkeypatch):
    """12 images an epoch of 2 prompts: from the third epoch on each prompt has its own 16 rewards or more."""
    (tmp_path / "two.txt").write_text("a red circle\na blue square\n")
    sizes = "--num-prompts 12 --group-size 1 --save-every 1"
    flags = ["--prompts", tmp_path / "two.txt", *sizes.split(), *RUNNING.split()]
    spy = Spy(monkeypatch)
    whole = train(grpo, tmp_path, "whole", *flags, "--epochs", 4)
    args, kept = spy.args, {0: [], 1: []}
    for epoch, (final, found) in enumerate(zip(spy.finals, spy.metrics)):
        ids, r, adv = [p.id for p in common.prompt_batch(args.prompt_list, epoch, 0, 12)], final.tolist(), []
        for number, value in zip(ids, r):
            kept[number] = [*kept[number], value][-32:]
        for number, value in zip(ids, r):
            base = r if epoch < 2 else kept[number]
            assert (len(kept[number]) >= 16) == (epoch >= 2)
            mean = sum(base) / len(base)
            std = (sum((x - mean) ** 2 for x in base) / len(base)) ** 0.5
            adv.append(max(-5, min(5, (value - mean) / (std + args.adv_eps))))
        mean = sum(adv) / 12
        assert found["adv/mean"] == pytest.approx(mean, abs=1e-5)
        assert found["adv/std"] == pytest.approx((sum(a * a for a in adv) / 12 - mean**2) ** 0.5, abs=1e-4)
    spy.undo()
    monkeypatch.setattr(harness, "finish", lambda *a: None)
    half = train(grpo, tmp_path, "half", *flags, "--epochs", 2)
    grpo.main(grpo.parse_args(["--resume", str(half), "--epochs", "4"]))
    assert metrics(whole) == metrics(half) and equal(lora(whole), lora(half))
    assert state(whole)["running"] == state(half)["running"] == {n: pytest.approx(v) for n, v in kept.items()}


@pytest.mark.parametrize("script", [vmpo, grpo, awm], ids=["vmpo", "grpo", "awm"])
def test_an_update_may_hold_no_row_of_a_process(tmp_path, monkeypatch, script):
    """With several processes a small update's rows can all lie in the others."""
    real = common.shuffled_rows
    monkeypatch.setattr(common, "shuffled_rows", lambda *a, **k: [(p := torch.cat(real(*a, **k)))[:0], p])
    run = train(script, tmp_path, "run", "--updates-per-epoch", 2, "--epochs", 1)
    assert metrics(run)[0]["grad/norm"] > 0


def test_a_window_of_steps_without_noise_is_refused(tmp_path):
    """cps arrives at data without noise: that step has no density and cannot be trained."""
    flags = "--kernel cps --train-fraction 1 --sde-window 1 --sde-window-range 3 4".split()
    with pytest.raises(common.UsageError, match="step 3 of kernel cps has no noise"):
        train(grpo, tmp_path, "run", *flags)


def test_a_step_without_noise_is_not_counted_as_a_transition(tmp_path, capsys):
    """2 x 3 images and 4 steps, the last of which cps performs without noise: 18 transitions, not 24."""
    flags = "--kernel cps --train-fraction 1 --updates-per-epoch".split()
    with pytest.raises(common.UsageError, match="does not divide the 18 transitions"):
        train(grpo, tmp_path, "four", *flags, 4)
    spy_rows = []
    with pytest.MonkeyPatch.context() as patch:
        real = common.shuffled_rows
        patch.setattr(common, "shuffled_rows", lambda *a, **k: spy_rows.append(real(*a, **k)) or spy_rows[-1])
        train(grpo, tmp_path, "three", *flags, 3)
    assert [len(part) for part in spy_rows[0]] == [6, 6, 6]


# ---- advantages -----------------------------------------------------------------------------------------------------
ZERO = [
    (grpo, "--loss grpo --kl none --adv-norm group --updates-per-epoch 2"),
    (grpo, "--loss pcpo --kl none --adv-norm global --pcpo-w 20 --model tiny-sd15"),
    (grpo, "--loss guard --kl none --adv-norm none"), (grpo, "--loss epg --kl none --adv-norm rloo --model tiny-sd15"),
    (awm, "--beta 0 --adv-norm group --updates-per-epoch 2 --epochs 2"),
    (awm, "--beta 0 --adv-norm global --weight huber --model tiny-sd15"),
]  # fmt: skip


@pytest.mark.parametrize("script, flags", ZERO)
def test_an_epoch_of_equal_rewards_leaves_only_weight_decay(tmp_path, monkeypatch, script, flags):
    spy = Spy(monkeypatch)
    decay = ["--lr", 1e-2, "--weight-decay", 0.5]
    run = train(script, tmp_path, "run", "--reward", CONSTANT, *decay, *flags.split())
    for row in metrics(run):
        assert row["adv/zero_std_frac"] == 1 and row["adv/mean"] == row["adv/std"] == row["grad/norm"] == 0
    for before, after in zip(spy.updates[0][0], lora(run), strict=True):
        assert torch.allclose(after, before * (1 - 1e-2 * 0.5) ** len(spy.updates), rtol=1e-5, atol=0)


def test_without_an_advantage_nothing_is_done_where_such_rows_are_dropped(tmp_path, monkeypatch):
    """Not even a KL or a step of weight decay: Flow-GRPO's filter comes before both."""
    spy = Spy(monkeypatch)
    flags = "--kl mean --kl-anchor ref --beta 9 --lr 1e-2 --weight-decay 0.5 --updates-per-epoch 2 --epochs 2"
    run = train(grpo, tmp_path, "run", "--reward", CONSTANT, "--drop-zero-advantage", *flags.split())
    assert not spy.updates and spy.evaluations(0)[2] == 0 and equal(lora(run), spy.old[0])
    assert [row["adv/zero_std_frac"] for row in metrics(run)] == [1, 1]
    assert [row["grad/norm"] for row in metrics(run)] == [0, 0] and "kl/ref" not in metrics(run)[0]


@BOTH
def test_groups_of_equal_texts_stay_apart(tmp_path, monkeypatch, script):
    """Two lines with the same prompt are two groups, normalised each by itself."""
    (tmp_path / "same.txt").write_text("a red circle\na red circle\n")
    spy = Spy(monkeypatch)
    given = torch.tensor([0.0, 1.0, 2.0, 10.0, 30.0, 50.0])
    monkeypatch.setattr(sys.modules[__name__], "constant", lambda images, prompts, metadata: given[: len(images)])
    seen = []
    real = common.group_advantage
    monkeypatch.setattr(common, "group_advantage", lambda *a: seen.append(real(*a)) or seen[-1])
    flags = ["--prompts", tmp_path / "same.txt", "--adv-norm", "none", "--adv-clip", 100, "--epochs", 1]
    train(script, tmp_path, "run", "--reward", CONSTANT, *flags)
    for adv, zero in seen:
        assert adv.tolist() == [-1, 0, 1, -20, 0, 20] and not zero.any()
    assert seen and spy.updates


# ---- KL -------------------------------------------------------------------------------------------------------------
KL = [
    (grpo, "--kl mean --kl-anchor ref", 10), (grpo, "--kl velocity --kl-anchor old", 10),
    (grpo, "--kl mean-nodt --kl-anchor ref", 300), (awm, "", 10), (awm, "--kl-weight elbo --model tiny-sd35", 10),
]  # fmt: skip


@pytest.mark.parametrize("script, flags, strong", KL)
def test_kl_is_silent_at_the_reference_and_acts_after_the_first_update(tmp_path, script, flags, strong):
    runs = []
    for beta in (1e-9, strong):
        with pytest.MonkeyPatch.context() as patch:
            spy = Spy(patch)
            run = train(
                script, tmp_path, f"b{beta}", "--updates-per-epoch", 2, "--epochs", 1, "--beta", beta, *flags.split()
            )
            runs.append((spy, metrics(run)[0]))
    (small, _), (large, row) = runs
    first, second = ([torch.cat([g.flatten() for g in s.updates[u][1]]) for s in (small, large)] for u in (0, 1))
    assert (first[0] - first[1]).norm() < 1e-3 * first[0].norm()
    assert (second[0] - second[1]).norm() > 3e-2 * second[0].norm()
    assert row["loss/kl"] > 0


# ---- export ---------------------------------------------------------------------------------------------------------
@BOTH
def test_the_exported_lora_is_the_averaged_policy(tmp_path, script):
    run = train(script, tmp_path, "run", "--ema-decay", 0.5, "--ema-every", 1, "--lora-alpha", 8, "--lora-rank", 4)
    kept = state(run)["theta"]
    exported = load_file(run / "checkpoints" / "last" / "pytorch_lora_weights.safetensors")
    sums = lambda tensors: sorted(round(x.double().abs().sum().item(), 4) for x in tensors)  # noqa: E731
    a = [v for k, v in exported.items() if ".lora_A." in k or ".lora.down." in k]
    b = [v / 2 for k, v in exported.items() if ".lora_B." in k or ".lora.up." in k]  # alpha / rank is folded into B
    assert len(a) == len(b) == len(exported) / 2
    assert sums(a + b) == pytest.approx(sums(kept["ema"]["shadow"]), abs=2e-3)
    assert sums(a + b) != pytest.approx(sums(kept["lora"]), abs=2e-3)
