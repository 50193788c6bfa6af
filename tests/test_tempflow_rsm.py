"""tempflow_rsm.py: profiles and their cost, RSM's table against Eq. 10, rollouts, the trainer's gradients.

The oracles share no code with the script: the losses as the papers print them, with torch.distributions, and the
transition kernels by their formulas.  A training run is taped: every network call, and the gradient of the loss with
respect to every network output, which must be the oracle's.
"""

import copy
import csv
import functools
import math
import os
import re
import socket
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from torch.distributions import Normal, kl_divergence

import arguments
import common
import grpo
import harness
import rewards
import tempflow_rsm as tempflow

ROOT = Path(__file__).resolve().parent.parent
F64 = torch.float64
SMALL = "--preset tiny --num-prompts 2 --steps 4 --epochs 1 --eval-images 0 --sample-every 0 --profile 3,2,2".split()
MODEL = {"flow": "tiny-sd35", "eps": "tiny-sd15"}


@pytest.fixture(autouse=True, scope="module")
def from_one_copy_in_memory():
    """The pipelines are read once; the pictures at the end of a run, which take longer than the run, are left out."""
    patch, kept = pytest.MonkeyPatch(), {}
    for name in common.BACKBONES:
        cls = getattr(diffusers, name)

        def load(path, real=cls.from_pretrained, **options):
            if path not in kept:
                kept[path] = real(path, **options)
            return copy.deepcopy(kept[path])

        patch.setattr(cls, "from_pretrained", staticmethod(load))
    patch.setattr(harness, "finish", lambda *a: None)
    patch.setattr(common, "export_lora", lambda *a: None)
    patch.chdir(ROOT)
    yield
    patch.undo()


def parse(*flags):
    return tempflow.parse_args([*SMALL, *" ".join(map(str, flags)).split()])


def close(actual, expected, tolerance=1e-9):
    actual, expected = torch.as_tensor(actual), torch.as_tensor(expected)
    torch.testing.assert_close(actual.to(F64), expected.to(F64), rtol=tolerance, atol=tolerance)


def relative(actual, expected):
    return ((actual.double() - expected.double()).abs().max() / expected.double().abs().max()).item()


# ---- oracles: the kernels and the losses as printed -----------------------------------------------------------------
def kernel(kind, steps, level=None, big_w=0.0):
    """t, dt, bk = d mu / d o, sigma and ode(x, o, i), sde mean(x, o, i) of Flow-GRPO's SDE or of DDIM with eta."""
    if kind == "flow":
        scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
        scheduler.set_timesteps(steps)
        t = scheduler.sigmas[:-1].double()
        dt = t - scheduler.sigmas[1:].double()
        room = torch.where(t < 1, 1 - t, 1 - scheduler.sigmas[1].double())
        g2 = (0.7 if level is None else level) ** 2 * t / room
        bk, sigma = -dt * (1 + (1 - t) * g2 / (2 * t)), (g2 * dt).sqrt()
        b = dt * (t / (1 - t) + g2 / 2)  # infinite at t = 1

        def ode(x, v, i):
            return x - dt[i] * v

        def mean(x, v, i):
            return x - dt[i] * (v + g2[i] / (2 * t[i]) * (x + (1 - t[i]) * v))

        def score(x, v, i):
            return -(x + wide(1 - t[i]) * v) / wide(t[i])
    else:
        settings = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1)
        scheduler = DDIMScheduler(**settings, set_alpha_to_one=False, timestep_spacing="leading")
        scheduler.set_timesteps(steps)
        bar = scheduler.alphas_cumprod.double()
        at = bar[scheduler.timesteps]
        before = scheduler.timesteps - 1000 // steps
        to = torch.where(before >= 0, bar[before.clamp(min=0)], bar[0])
        t, dt = scheduler.timesteps / 1000, torch.full((steps,), 1 / steps, dtype=F64)
        sigma = (1.0 if level is None else level) * ((1 - to) / (1 - at) * (1 - at / to)).sqrt()
        c1 = ((1 - at) * to / at).sqrt()
        if big_w:  # PCPO's sampler, plus root
            sigma = (big_w * c1 + ((1 - to) * (big_w**2 + 1) - c1**2).sqrt()) / (big_w**2 + 1)
        bk = -(c1 - (1 - to - sigma**2).sqrt())
        b = -(1 - at).sqrt() * bk

        def ode(x, e, i):
            return (to[i] / at[i]).sqrt() * (x - (1 - at[i]).sqrt() * e) + (1 - to[i]).sqrt() * e

        def mean(x, e, i):
            return (to[i] / at[i]).sqrt() * (x - (1 - at[i]).sqrt() * e) + (1 - to[i] - sigma[i] ** 2).sqrt() * e

        def score(x, e, i):
            return -e / wide(1 - at[i]).sqrt()

    shared = dict(kind=kind, steps=steps, t=t, dt=dt, sigma=sigma, ode=ode, mean=mean)
    return SimpleNamespace(**shared, b=b, bk=bk, w=-bk / sigma, score=score)


def wide(v):
    return v[:, None, None, None]


def printed(loss, reweight, fair, adv, o, o_old, z, i, k, xi, reduce, weight=None, scale=2.25):
    """The methods' losses per row, and which rows the clip leaves open; k a kernel, i the rows' steps."""
    red = (lambda x: x.flatten(1).mean(1)) if reduce == "mean" else (lambda x: x.flatten(1).sum(1))
    sigma, dt = k.sigma[i], k.dt[i]
    mu, mu_old, s = wide(k.bk[i]) * o, wide(k.bk[i]) * o_old, wide(sigma)
    x_s = mu_old + s * z
    lam = red(Normal(mu, s).log_prob(x_s) - Normal(mu_old, s).log_prob(x_s))
    if reweight == "pcpo":  # the regression form, with w~ in place of w
        w = wide(weight[i])
        lam = -red(0.5 * w**2 * (o - o_old) ** 2 + w * (o - o_old) * z)
    if reweight == "guard":
        lam = (lam + red((mu - mu_old) ** 2 / (2 * s**2))) * sigma
    unit = sigma**2 if fair != "none" else torch.ones_like(sigma)  # u = sigma^2 lambda is clipped at xi
    inside = (loss, reweight, fair) == ("hinge", "tempflow", "none")  # RSM's code; with PPO the weight is outside
    lam = lam * scale * sigma if inside else lam
    u = unit * lam
    if loss == "hinge":
        value = (xi * adv.abs() - adv * u).clamp(min=0) / unit
        shut = adv * u >= xi * adv.abs()
    else:
        ratio = lam.exp()
        value = torch.maximum(-adv * ratio, -adv * torch.minimum(torch.maximum(ratio, 1 - xi / unit), 1 + xi / unit))
        shut = (adv > 0) & (ratio > 1 + xi / unit) | (adv < 0) & (ratio < 1 - xi / unit)
    if fair == "guard":
        value = value * sigma / dt
    if reweight == "tempflow" and not inside:
        value = value * scale * sigma
    if reweight == "guard":
        value = value / dt
    return value, ~shut, lam


def table_e5(reweight, fair, adv, i, k, weight=None, scale=2.25):
    """gamma and C2 beta of RSM's Table 1."""
    gamma = {"none": torch.ones_like(adv), "tempflow": scale * k.sigma[i], "guard": k.sigma[i] / k.dt[i]}.get(reweight)
    if reweight == "pcpo":
        gamma = weight[i] / k.w[i]
        return gamma, gamma**2 * adv
    if fair == "guard":
        gamma = gamma * k.sigma[i] / k.dt[i]
    return gamma, torch.zeros_like(adv) if reweight == "guard" else gamma * adv


KERNELS = {"flow": kernel("flow", 10), "eps": kernel("eps", 50), "pcpo": kernel("eps", 50, big_w=4.5)}
ROWS = [
    ("none", "none"),
    ("tempflow", "none"),
    ("pcpo", "none"),
    ("guard", "none"),
    ("none", "sigma2"),
    ("none", "guard"),
    ("tempflow", "sigma2"),
    ("tempflow", "guard"),
]


def pcpo_w(k):
    trained = slice(0, k.steps - 1) if k.kind == "flow" else slice(None)
    if k.kind == "flow":  # zeta dt
        return k.w[trained].sum() / k.dt[trained].sum() * k.dt
    return KERNELS["eps"].w.mean().expand(k.steps)


@pytest.mark.parametrize("reduce", ["mean", "sum"])
@pytest.mark.parametrize("loss", ["ppo", "hinge"])
@pytest.mark.parametrize(
    "reweight, fair, name", [(*r, n) for r in ROWS for n in ("flow", "eps")] + [("pcpo", "none", "pcpo")]
)
def test_every_row_of_table_1_has_the_gradient_of_eq_10(loss, reweight, fair, name, reduce):
    """G25: autograd of (method + beta KL) with respect to o = autograd of rsm_loss, clipped rows included."""
    k, beta, rows = KERNELS[name], 0.04, 60
    gen = torch.Generator().manual_seed(10 * ROWS.index((reweight, fair)) + len(name))
    draw = lambda *shape: torch.randn(shape, generator=gen, dtype=F64)  # noqa: E731
    i = torch.randint(k.steps - 1, (rows,), generator=gen)
    shape = (rows, 3, 4, 2)
    o_ref, o_old, z, adv = draw(*shape), draw(*shape), draw(*shape), draw(rows)
    o = (o_old + 0.1 * draw(*shape)).requires_grad_()
    weight = pcpo_w(k)
    lam = printed(loss, reweight, fair, adv, o, o_old, z, i, k, 1.0, reduce, weight)[2].detach()
    xi = 1.001 * (lam * (k.sigma[i] ** 2 if fair != "none" else 1)).abs().median().item()
    value, is_open, lam = printed(loss, reweight, fair, adv, o, o_old, z, i, k, xi, reduce, weight)
    assert 5 < (~is_open).sum() < rows - 5
    mu, mu_ref = wide(k.bk[i]) * o, wide(k.bk[i]) * o_ref
    kl = kl_divergence(Normal(mu, wide(k.sigma[i])), Normal(mu_ref, wide(k.sigma[i]))).flatten(1)
    kl = kl.mean(1) if reduce == "mean" else kl.sum(1)
    (expected,) = torch.autograd.grad((value + beta * kl).sum(), o, retain_graph=True)

    a = adv * lam.exp().detach() if loss == "ppo" else adv  # PPO's gradient has the ratio in front of A
    gamma, c2 = table_e5(reweight, fair, a, i, k, weight)
    moved = wide(k.bk[i] / k.sigma[i]) * (o - o_old)
    drift = wide(k.bk[i] / k.sigma[i]) * (o - o_ref)
    eq10 = tempflow.rsm_loss(a, drift, moved, z, gamma, c2 / beta, beta, is_open)
    eq10 = common.reduce_latent(eq10, reduce)
    (ours,) = torch.autograd.grad(eq10.sum(), o)
    assert relative(ours, expected) < 1e-8
    (kl_only,) = torch.autograd.grad(beta * kl.sum(), o)
    assert relative(ours[~is_open], kl_only[~is_open]) < 1e-8  # a closed row keeps its KL and nothing else


def eq10(score, score_ref, score_old, c1, guidance, c2):
    """C1 (||S - (S_ref + gamma Psi)||^2 + C2 ||S - S_old||^2), (R,)."""
    square = lambda x: (x**2).flatten(1).sum(1)  # noqa: E731
    return c1 * (square(score - (score_ref + guidance)) + c2 * square(score - score_old))


def ppo_rows(a, ratio, xi):
    return ~((a > 0) & (ratio > 1 + xi) | (a < 0) & (ratio < 1 - xi))


# method: (the script's loss per row, the estimator's A, gamma, beta C2, open rows) of the rows r
E5 = {
    "reinforce": lambda r: (grpo.reinforce_loss(r.adv, r.lam), r.adv, r.one, 0 * r.adv, r.adv == r.adv),
    "ppo": lambda r: (
        tempflow.clipped_loss(r.adv, r.lam, r.xi), r.ra, r.one, r.ra, ppo_rows(r.adv, r.ratio, r.xi)),
    "grpo": lambda r: (grpo.clipped_loss(r.adv, r.lam, r.xi), r.ra, r.one, r.ra, ppo_rows(r.adv, r.ratio, r.xi)),
    "epg": lambda r: (grpo.epg_loss(r.adv, r.lam), r.ra, r.one, r.ra, r.adv == r.adv),
    "pcpo-base": lambda r: (
        tempflow.hinge_loss(r.adv, r.lam, r.xi), r.adv, r.one, r.adv, r.adv * r.lam < r.xi * r.adv.abs()),
    "pcpo": lambda r: (
        tempflow.hinge_loss(r.adv, r.lam_w, r.xi), r.adv, r.gamma, r.gamma**2 * r.adv,
        r.adv * r.lam_w < r.xi * r.adv.abs()),
    "tempflow": lambda r: (
        2.25 * r.sigma * tempflow.clipped_loss(r.adv, r.lam, r.xi), r.ra, 2.25 * r.sigma, 2.25 * r.sigma * r.ra,
        ppo_rows(r.adv, r.ratio, r.xi)),
    "tempflow-hinge": lambda r: (
        tempflow.hinge_loss(r.adv, 2.25 * r.sigma * r.lam, r.xi), r.adv, 2.25 * r.sigma, 2.25 * r.sigma * r.adv,
        r.adv * 2.25 * r.sigma * r.lam < r.xi * r.adv.abs()),
    "guard": lambda r: (
        tempflow.clipped_loss(r.adv, r.cross, r.xi) / r.dt, r.adv * r.cross.exp().detach(), r.sigma / r.dt, 0 * r.adv,
        ppo_rows(r.adv, r.cross.exp(), r.xi)),
    "fair": lambda r: (
        tempflow.hinge_loss(r.adv, r.lam, r.xi / r.sigma**2) * r.sigma / r.dt, r.adv, r.sigma / r.dt,
        r.sigma / r.dt * r.adv, r.adv * r.lam * r.sigma**2 < r.xi * r.adv.abs()),
}  # fmt: skip


@pytest.mark.parametrize("grid", ["flow", "eps", "pcpo"])
@pytest.mark.parametrize("method", E5)
def test_every_zeroth_order_row_is_eq_10_in_scores(method, grid):
    """G25 as E.5 has it: C1 = beta b^2 / 2 sigma^2, Psi = sigma A z / (beta b), sum reduction.  "pcpo" is the flow's
    zeta dt or SD1.5's constant for w; on the grid "pcpo" the other rows are E.5's 'with sigma~, b~' (gamma 1)."""
    native, k = (sd35_grid() if grid == "flow" else sd15_grid()), KERNELS[grid]
    ours = common.pcpo_grid(native, 4.5) if grid == "pcpo" else native
    flow = grid == "flow"
    table = -common.pcpo_weights(native, list(range(9 if flow else 50)), "zeta" if flow else "public")
    close(table, pcpo_w(k), 1e-9)
    rows, beta = 80, 0.3
    draw = lambda *shape: torch.randn(shape, dtype=F64)  # noqa: E731
    i = torch.randint(1 if grid == "flow" else 0, k.steps, (rows,))  # b is infinite at the flow's t = 1
    x, o_ref, o_old, z = (draw(rows, 3, 4, 2) for _ in range(4))
    o = o_old if method == "reinforce" else o_old + 0.02 * draw(rows, 3, 4, 2) / wide(k.w[i])
    o = o.detach().clone().requires_grad_()
    r = SimpleNamespace(adv=draw(rows), one=torch.ones(rows, dtype=F64), sigma=ours.sigma[i], dt=ours.dt[i])
    moved = wide(ours.w[i]) * (o - o_old)
    r.lam, r.cross = common.log_ratio(moved, z, "sum"), common.reduce_latent(moved * z, "sum") * r.sigma
    r.lam_w, r.gamma = common.log_ratio(wide(-table[i]) * (o - o_old), z, "sum"), table[i] / k.w[i]
    r.ratio = r.lam.exp().detach()
    r.ra = r.adv * r.ratio
    scale = {"guard": r.cross, "fair": r.lam * r.sigma**2, "pcpo": r.lam_w, "tempflow-hinge": 2.25 * r.sigma * r.lam}
    scale = scale.get(method, r.lam)
    r.xi = 1.001 * scale.detach().abs().median().item()
    loss, a, gamma, c2, is_open = E5[method](r)
    if method not in ("reinforce", "epg"):
        assert 5 < (~is_open).sum() < rows - 5
    loss = loss + beta * common.kl_divergence(wide(ours.w[i]) * (o - o_ref), "sum")

    c1 = beta * k.b[i] ** 2 / (2 * k.sigma[i] ** 2)
    psi = wide(is_open * a * k.sigma[i] / (beta * k.b[i])) * z
    rsm = eq10(*(k.score(x, out, i) for out in (o, o_ref, o_old)), c1, wide(gamma) * psi, is_open * c2 / beta)
    grads = [torch.autograd.grad(v.sum(), o, retain_graph=True)[0] for v in (loss, rsm)]
    gap, size = ((v.flatten(1)).norm(dim=1) for v in (grads[0] - grads[1], grads[1]))
    assert (gap <= 1e-8 * size).all() and (size > 0).all()


def test_eq_10_without_reward_is_minimal_at_the_reference():
    drift, z = torch.randn(5, 2, 3, 3, dtype=F64), torch.randn(5, 2, 3, 3, dtype=F64)
    zero, one = torch.zeros(5, dtype=F64), torch.ones(5, dtype=F64)
    value = tempflow.rsm_loss(zero, drift, drift, z, one, zero, 0.3, one > 0)
    close(value, 0.15 * drift**2, 1e-14)
    adv = torch.randn(5, dtype=F64)
    target = wide(2 * adv) * z / 0.3  # mu_theta - mu_ref = sigma gamma A z / beta
    assert tempflow.rsm_loss(adv, target, drift, z, 2 * one, zero, 0.3, one > 0).abs().max() < 1e-25


def test_losses_as_printed():
    adv, lam = torch.randn(4000, dtype=F64), (1e-3 * torch.randn(4000, dtype=F64)).requires_grad_()
    for xi in (4e-4, 1e-3 * torch.rand(4000, dtype=F64)):
        wanted = [
            torch.maximum(-adv * lam.exp(), -adv * lam.exp().clamp(1 - xi, 1 + xi)),
            (xi * adv.abs() - adv * lam).clamp(min=0),
        ]
        for ours, truth in zip((tempflow.clipped_loss(adv, lam, xi), tempflow.hinge_loss(adv, lam, xi)), wanted):
            close(ours, truth, 1e-12)
            g_ours, g = (torch.autograd.grad(x.sum(), lam, retain_graph=True)[0] for x in (ours, truth))
            close(g_ours, g, 1e-12)
            assert 400 < (g == 0).sum() < 3600


def test_hinge_is_clipping_in_log_space():
    """Eq. 104, G21; and fair clipping is clipping at xi / sigma^2 (Eq. 24, G23)."""
    adv, lam = torch.randn(3000, dtype=F64), (1e-3 * torch.randn(3000, dtype=F64)).requires_grad_()
    sigma, xi = 0.1 + torch.rand(3000, dtype=F64), 2e-4
    u = sigma**2 * lam
    eq24 = torch.maximum(-adv * u, -adv * u.clamp(-xi, xi)) / sigma**2
    ours = tempflow.hinge_loss(adv, lam, xi / sigma**2)
    a, b = (torch.autograd.grad(x.sum(), lam)[0] for x in (ours, eq24))
    close(a, b, 1e-10)
    assert 300 < (a == 0).sum() < 2700


def test_children_regress_on_their_mean():
    """G26: the mean loss of B children of one state is the loss of their mean, up to a constant."""
    adv, z, one = torch.randn(7, dtype=F64), torch.randn(7, 2, 3, 3, dtype=F64), torch.ones(7, dtype=F64)
    target = (wide(1.7 * adv) * z / 0.2).mean(0)
    differences, grads = [], []
    for _ in range(3):
        drift = torch.randn(1, 2, 3, 3, dtype=F64, requires_grad=True)
        children = tempflow.rsm_loss(adv, drift.expand(7, -1, -1, -1), 0 * z, z, 1.7 * one, 0 * one, 0.2, one > 0)
        one_point = 0.1 * (drift[0] - target) ** 2
        differences.append((children.mean(0) - one_point).detach())
        grads.append([torch.autograd.grad(x.sum(), drift)[0] for x in (children.mean(0), one_point)])
    close(differences[0], differences[1], 1e-10), close(differences[0], differences[2], 1e-10)
    for a, b in grads:
        close(a, b, 1e-12)


# ---- PCPO -----------------------------------------------------------------------------------------------------------
def sd15_grid(steps=50):
    settings = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1)
    scheduler = DDIMScheduler(**settings, set_alpha_to_one=False, timestep_spacing="leading")
    return common.make_grid(scheduler, "eps", steps, "ddim", 1.0)


def sd35_grid(steps=10):
    return common.make_grid(FlowMatchEulerDiscreteScheduler(shift=3.0), "flow", steps, "flow_sde", 0.7)


def test_pcpo_weights_and_sampler():
    flow, vp = sd35_grid(), sd15_grid()
    w = common.pcpo_weights(flow, list(range(9)), "zeta")
    assert (w / -flow.dt).tolist() == pytest.approx([3.970] * 10, abs=5e-4)  # zeta over 9 steps
    assert -w[:9].sum().item() == pytest.approx(-flow.w[:9].sum().item(), rel=1e-9)  # G24
    assert common.pcpo_weights(vp, list(range(50)), "public").tolist() == pytest.approx([-0.516900] * 50, abs=1e-6)
    pcpo, k = common.pcpo_grid(vp, 4.5), KERNELS["pcpo"]
    close(pcpo.sigma, k.sigma, 1e-7), close(pcpo.o_coef, k.bk, 1e-7)
    c1, c2 = vp.nu * vp.alpha_s / vp.alpha, (vp.nu_s**2 - pcpo.sigma**2).sqrt()
    close((c1 + c2) / pcpo.sigma, torch.full((50,), 4.5), 1e-9)
    x, e = torch.randn(2, 3, 4, 4, dtype=F64), torch.randn(2, 3, 4, 4, dtype=F64)
    close(pcpo.x_coef[7] * x + pcpo.o_coef[7] * e, k.mean(x, e, 7), 1e-6)
    with pytest.raises(common.UsageError, match="--pcpo-w 4.5"):
        common.pcpo_grid(sd15_grid(10), 4.5)


# ---- profiles -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "profile, rows, nfe",
    [("6 6 6 6 6 6 6 6 6", 54, 333), ("7 7 7 7 7 7 6 6 0", 54, 366), ("4 5 5 6 7 8 9 10 0", 54, 324),
     ("3 3 4 5 6 7 7 8 11", 54, 278), ("6 6 8 10 11 13 0 0 0", 54, 388), ("6 6 8 10 0 0 0 0 0", 30, 257)],
)  # fmt: skip
def test_published_numbers_of_network_evaluations(profile, rows, nfe):
    """E.7's table counts T - 1 = 9 trunk steps and one evaluation more per child, of its parent."""
    widths = [*map(int, profile.split()), 0]
    assert sum(widths) == rows
    assert tempflow.network_evaluations(widths, 8) + rows == nfe
    assert 9 + sum(b * (1 + 9 - i) for i, b in enumerate(widths)) == nfe


def test_profiles_as_given():
    assert parse("--steps 10 --profile 6,6,8,10").widths == [6, 6, 8, 10, 0, 0, 0, 0, 0, 0]
    sparse = parse("--model tiny-sd15 --steps 50 --profile 0:4,10:4,20:4,30:4,40:4").widths
    assert sparse == [4 if i % 10 == 0 else 0 for i in range(50)]
    for steps in (4, 7, 10, 25):
        assert parse("--steps", steps, "--profile base").widths == [6] * (steps - 1) + [0]


def test_children_of_a_step_without_noise_are_refused_before_training(tmp_path, monkeypatch):
    monkeypatch.setattr(harness, "epoch_batch", lambda *a, **b: pytest.fail("a rollout began"))
    flags = "--kernel ancestral --train-fraction 1 --profile 2,2,2,2 --runs"  # its last step has no noise
    with pytest.raises(common.UsageError, match="--profile 2,2,2,2 has children at step 3, which has no noise"):
        tempflow.main(parse(flags, tmp_path))


def test_a_split_at_a_step_without_noise_is_refused(tmp_path):
    tree = "--kernel ancestral --train-fraction 1 --branching tree --tree-splits"
    with pytest.raises(common.UsageError, match="--tree-splits 0,3 has children at step 3, which has no noise"):
        tempflow.main(parse(tree, "0,3 --runs", tmp_path))


def test_base_profile_holds_227_latents_an_image(capsys):
    lines = dry_run("--preset tiny", capsys)
    assert f"({4 * 227} latents: " in lines["memory for the rollout"]


def dry_run(flags, capsys):
    with pytest.raises(SystemExit) as stop:
        tempflow.parse_args([*flags.split(), "--dry-run"])
    out = capsys.readouterr()
    assert stop.value.code == 0, out.err
    return {line[:42].strip(): line[43:] for line in out.out.splitlines()}


PRESET_NUMBERS = {  # per image: rows, evaluations without the parents' repetition; images per epoch; model
    "tempflow-sd35-geneval": (54, 333 - 54, 192, "sd3.5-medium"),
    "tempflow-sd35-aesthetic": (54, 333 - 54, 64, "sd3.5-medium"),
    "rsm-uniform": (54, 366 - 54 - 1, 64, "sd3.5-medium"),
    "rsm-equalvar": (54, 324 - 54 - 1, 64, "sd3.5-medium"),
    "rsm-geneval": (30, 257 - 30, 192, "sd3.5-medium"),
    # 8 prompts, one trunk each (5 equal ones officially), 4 * 5 children at 0, 10, ..., 40 of 50 steps; the trunk is
    # needed to the last anchor, step 48
    "rsm-sd15-hpsv2": (100, 49 + 20 * (49 + 39 + 29 + 19 + 9), 8, "sd15"),
    "tiny": (54, 333 - 54, None, "tiny-sd35"),
    "tiny-sd15": (54, 333 - 54, None, "tiny-sd15"),
}


@pytest.mark.parametrize("preset", PRESET_NUMBERS)
def test_presets_have_the_papers_sizes(preset, capsys):
    rows, calls, images, model = PRESET_NUMBERS[preset]
    lines = dry_run(f"--preset {preset}", capsys)
    assert lines["model"].split()[0] == model
    count = int(lines["samples per epoch"].split()[0])
    assert images in (None, count)
    assert int(lines["training rows per epoch"]) == count * rows
    cfg = 1 if preset.startswith("tiny") else 2
    found = re.match(r"(\d+) in the rollout", lines["network evaluations per epoch"])
    assert int(found.group(1)) == cfg * count * calls


def test_sd15_presets_are_sd15(capsys, monkeypatch):
    monkeypatch.setattr(arguments, "check_model", lambda args: None)  # the weights need not be here
    monkeypatch.setattr(rewards, "check_args", lambda args: None)
    for preset, images in (("pcpo-sd15-hpsv2", "128 = 8 prompts x 16"), ("rsm-sd15-hpsv2", "8 = 8 prompts x 1")):
        lines = dry_run(f"--preset {preset}", capsys)  # their prompts are in the repository
        assert lines["model"].startswith("sd15 ") and "kernel ddim, noise level 1.0" in lines["model"]
        trained = "50, of which 49" if preset.startswith("pcpo") else "50, of which 50"
        assert lines["steps"].startswith(trained) and images in lines["samples per epoch"]
        assert "benchmark files" in lines["note"] and "per GPU" in lines["note"]
        args = tempflow.parse_args(["--preset", preset])
        assert (args.dtype, args.shared_blocks, args.eval_kernel) == ("float16", 2, "same")
        assert args.mask == ("none" if preset.startswith("pcpo") else "rows")
        assert args.adv_eps == (1e-8 if preset.startswith("pcpo") else 1e-4) and not args.adv_unbiased
        assert (
            args.cfg == 5.0
            and args.ema_decay == 0.0
            and args.eval_steps == 50
            and args.loss == "hinge"
            and args.reweight == "pcpo"
            and args.kl == "none"
        )
        assert args.lora_rank == 16 and args.epochs == 300


def test_flow_presets_are_the_official_recipe(capsys):
    """sd3_reward_presets.py, base.py of RSM's code; averagings a step: 24, 14 or 16 micro-batches in two updates."""
    repeats = {"tempflow-sd35-geneval": 12, "rsm-geneval": 7, "rsm-uniform": 8, "rsm-equalvar": 8}
    for preset, count in (repeats | {"tempflow-sd35-aesthetic": 8}).items():
        flags = f"--preset {preset} --prompts prompts/ocr_test.txt --eval-prompts prompts/ocr_test.txt"
        args = tempflow.PRESETS[preset]
        assert (args["ema_repeats"], args["ema_decay"], args["dtype"]) == (count, 0.9, "float16")
        assert "float16" in dry_run(flags, capsys)["note"]
        if "geneval" in preset:
            assert (args["reward"], args["eval_rewards"]) == ("geneval-reward-flowgrpo", "geneval,pickscore")
            assert "1081" in args["note"] and ("TempFlow's own run" in args["note"]) == preset.startswith("tempflow")


WRONG = [
    ("--shared-noise --group-size 2", "identical"),
    ("--branching tree --tree-splits 0,1 --anchor-beta 0.1", "--anchor-beta"),
    ("--profile 2,2,2,2,2", "grid has 4 steps"),
    ("--profile 2,2,0,2", "3 are trained"),
    ("--profile 0,0,0", "no children"),
    ("--profile 2,x", "a list"),
    ("--profile 2,-3", "-3"),
    ("--profile 7:2", "step 7"),
    ("--profile lowsnr2", "not base or a list"),
    ("--profile base --train-fraction 0.5", "2 are trained"),
    ("--shared-blocks 2 --group-size 2", "--shared-blocks makes the 2 trunks of a prompt identical"),
    ("--shared-blocks 2 --group-size 1 --shared-noise", "in two ways"),
    ("--profile 2 --anchor-beta 1 --anchor-first 1 --updates-per-epoch 3", "the 2 states"),
    ("--adv-eps 0", "above 0"),
    ("--anchor-first -1", "negative"),
    ("--profile 2:2:3", "2:2:3"),
    ("--profile 3,1,2", "one child"),
    ("--grouping prompt --group-size 1 --profile 1,1", "--group-size 1"),
    ("--branching tree --tree-splits 0,3", "use 0 to 2"),
    ("--branching tree --tree-splits=-1,0", "trained steps"),
    ("--branching tree --tree-splits 0;2", "--tree-splits"),
    ("--branching tree --tree-splits=", "one node"),
    ("--branching tree --tree-splits 1", "one node"),
    ("--branching tree --grouping prompt --tree-splits=", "--group-size 1"),
    ("--branching tree --grouping prompt --tree-splits 1", "--group-size 1"),
    ("--entropy 0.1", "--tail sde"),
    ("--entropy -1 --tail sde", "negative"),
    ("--beta -1", "negative"),
    ("--loss rsm --kl none", "--kl true"),
    ("--loss rsm --beta 0", "--beta"),
    ("--loss ppo --reweight pcpo", "hinge"),
    ("--fair-clip guard --reweight guard", "--reweight guard"),
    ("--fair-clip sigma2 --reweight pcpo --loss hinge", "--reweight pcpo"),
    ("--model tiny-sd15 --kl heuristic", "heuristic"),
    ("--clip-range 0", "above 0"),
    ("--adv-clip 0", "above 0"),
    ("--pcpo-w -1", "negative"),
    ("--anchor-beta -1", "negative"),
    ("--anchor-beta 0.1 --anchor-max-ratio -0.5", "--anchor-max-ratio"),
    ("--kernel ode", "deterministic"),
    ("--tail both", "--tail"),
    ("--profile 2,2 --updates-per-epoch 40", "--updates-per-epoch 40"),
    ("--profile base --updates-per-epoch 7", "the 6 states"),
    ("--profile 2 --anchor-beta 1 --updates-per-epoch 7", "the 6 states"),
    ("--profile 2 --anchor-beta 1 --anchor-max-ratio 0.5 --updates-per-epoch 5", "the 4 states"),
    ("--branching tree --tree-splits 0 --updates-per-epoch 7", "the 6 states"),
    ("--profile 0:4,0:2", "names a step twice"),
    ("--profile 3,2,0:4", "names a step twice"),
]


@pytest.mark.parametrize("flags, word", WRONG)
def test_bad_input_is_one_sentence_before_any_model_is_loaded(flags, word, capsys, monkeypatch):
    monkeypatch.setattr(harness, "setup", lambda *a: pytest.fail("the run began"))
    with pytest.raises(SystemExit) as stop:
        tempflow.main(parse(flags))
    lines = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and len(lines) == 1 and word in lines[0] and len(lines[0]) < 400


# ---- rollouts on a toy policy ---------------------------------------------------------------------------------------
class Toy:
    """A network that is linear in x, o = slope[i] x + shift[i] + 0.3 prompt; for the reference with other numbers."""

    device = torch.device("cpu")

    def __init__(self, kind, steps, shape=(2, 3, 2), seed=0):
        gen = torch.Generator().manual_seed(seed)
        self.k, self.latent_shape, self.kind, self.off, self.calls = kernel(kind, steps), shape, kind, False, []
        if kind == "eps":
            settings = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1)
            scheduler = DDIMScheduler(**settings, set_alpha_to_one=False, timestep_spacing="leading")
        else:
            scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
        self.sde = common.make_grid(
            scheduler, kind, steps, "ddim" if kind == "eps" else "flow_sde", 1.0 if kind == "eps" else 0.7
        )
        self.ode = common.make_grid(scheduler, kind, steps, "ode", 0.0)
        self.slope, self.shift = 0.4 * torch.randn(2, steps, generator=gen), torch.randn(2, steps, generator=gen)

    def out(self, x, i, prompt=0):
        return self.slope[int(self.off), i] * x + self.shift[int(self.off), i] + 0.3 * prompt

    def predict(self, x, timestep, cond, cfg):
        (i,) = {int((self.ode.timestep.float() - t).abs().argmin()) for t in timestep}
        assert len(x) == len(timestep) == len(cond.index)
        self.calls.append((len(x), i, self.off))
        return self.out(x, i, wide(cond.index))

    @contextmanager
    def reference(self):
        self.off = True
        yield
        self.off = False

    def batch(self, count=3):
        start = torch.randn(count, self.k.steps + 1, *self.latent_shape, generator=torch.Generator().manual_seed(5))
        cond = common.Cond(torch.zeros(count, 1, 1), None, torch.arange(count))
        return common.Batch([common.Prompt(n, f"p{n}") for n in range(count)], range(4, 4 + count), cond, start)


def bar():
    return SimpleNamespace(update=lambda n: None)


@pytest.fixture
def draws(monkeypatch):
    """Every call of branch_noise: {key of the step: (N, count, ...)}."""
    kept, real = {}, tempflow.branch_noise
    monkeypatch.setattr(tempflow, "branch_noise", lambda a, e, i, *rest: kept.setdefault(str(i), real(a, e, i, *rest)))
    return kept


def test_branch_noise_depends_on_seed_epoch_step_and_sample_only():
    args, shape = parse(), (4, 4, 4)
    a = tempflow.branch_noise(args, 3, 1, range(5), 6, shape, "cpu")
    assert a.shape == (5, 6, 4, 4, 4) and torch.equal(
        a[2:4], tempflow.branch_noise(args, 3, 1, range(2, 4), 6, shape, "cpu")
    )
    others = [(args, 3, 2), (args, 4, 1), (parse("--seed 1"), 3, 1)]
    others = [tempflow.branch_noise(*key, range(5), 6, shape, "cpu") for key in others]
    flat = torch.cat([a, *others]).flatten(0, 1).flatten(1)
    assert len({tuple(row.tolist()) for row in flat}) == len(flat)
    assert abs(flat.mean()) < 4 / flat.numel() ** 0.5 and abs(flat.var() - 1) < 4 * (2 / flat.numel()) ** 0.5


@pytest.mark.parametrize("depth", [1, 2, 9])
@pytest.mark.parametrize("tail", ["ode", "sde"])
@pytest.mark.parametrize("kind", MODEL)
def test_the_look_ahead_ends_in_tweedies_estimate(kind, tail, depth, draws):
    """RSM Eq. 15: a child's reward at x0_hat(x_{t_j}), i - j = depth, or at x_0 where the end comes before; with one
    evaluation of each child a step, as many as --dry-run says."""
    steps, widths, toy = 5, [2, 0, 3, 2, 0], Toy(kind, 5)
    k, batch = toy.k, toy.batch()
    flags = "--steps 5 --micro-batch-size 64 --profile 2,0,3,2 --kl none --lookahead"
    args = parse("--model", MODEL[kind], flags, str(depth), "--tail", tail)
    levels, leaves = tempflow.trunk_rollout(toy, toy.sde, toy.ode, batch, widths, args, 0, bar())
    assert sum(rows for rows, *_ in toy.calls) == 3 * tempflow.network_evaluations(widths, 3, depth)
    for i, (x0, _) in leaves.items():
        for n, b in ((n, b) for n in range(3) for b in range(widths[i])):
            y = k.mean(levels[i].x_t[n], toy.out(levels[i].x_t[n], i, n), i) + k.sigma[i] * draws[str(i)][n, b]
            for j in range(i + 1, steps):
                o = toy.out(y, j, n)
                if j == i + depth:
                    alpha, nu = toy.ode.alpha[j], toy.ode.nu[j]
                    y = y - nu * o if kind == "flow" else (y - nu * o) / alpha
                    break
                noisy = tail == "sde" and j < args.train_steps
                y = k.mean(y, o, j) + k.sigma[j] * draws[f"{i}/{j}"][n, b] if noisy else k.ode(y, o, j)
            close(x0.view(3, widths[i], *toy.latent_shape)[n, b], y, 1e-4)


@pytest.mark.parametrize("tail", ["ode", "sde"])
@pytest.mark.parametrize("kind", MODEL)
def test_a_child_is_one_sde_step_from_the_ode_trunk(kind, tail, draws):
    steps, widths, toy = 5, [2, 0, 3, 2, 0], Toy(kind, 5)
    k, batch = toy.k, toy.batch()
    args = parse(
        "--model", MODEL[kind], "--steps 5 --micro-batch-size 64 --profile 2,0,3,2 --anchor-beta 0.1 --tail", tail
    )
    levels, leaves = tempflow.trunk_rollout(toy, toy.sde, toy.ode, batch, widths, args, 0, bar())
    assert set(levels) == {0, 1, 2, 3} and set(leaves) == {0, 2, 3}  # step 1 has anchors, the last has not
    toy.off = False
    for n in range(3):
        x = batch.noise[n, 0].double()
        for i in range(steps):
            if i in levels:
                close(levels[i].x_t[n], x, 1e-5)
                close(levels[i].o_old[n], toy.out(x, i, n), 1e-5)
                toy.off = True
                close(levels[i].o_ref[n], toy.out(x, i, n), 1e-5)
                toy.off = False
                assert levels[i].z.shape == (3, widths[i], *toy.latent_shape)
            for b in range(widths[i]):
                y = k.mean(x, toy.out(x, i, n), i) + k.sigma[i] * draws[str(i)][n, b]
                assert torch.equal(levels[i].z[n, b], draws[str(i)][n, b])
                for j in range(i + 1, steps):
                    o = toy.out(y, j, n)
                    if tail == "sde" and j < args.train_steps:
                        y = k.mean(y, o, j) + k.sigma[j] * draws[f"{i}/{j}"][n, b]
                    else:
                        y = k.ode(y, o, j)
                close(leaves[i][0].view(3, widths[i], *toy.latent_shape)[n, b], y, 1e-4)
            x = k.ode(x, toy.out(x, i, n), i)
    assert {str(i) for i in levels} <= set(draws) and (tail == "ode") == (len(draws) <= 4)


@pytest.mark.parametrize("kind", MODEL)
def test_the_trunk_is_plain_ode_sampling_and_children_go_as_one_batch(kind):
    toy, widths = Toy(kind, 6), [2, 3, 0, 0, 2, 0]
    batch = toy.batch(4)
    args = parse("--model", MODEL[kind], "--steps 6 --micro-batch-size 999 --profile 2,3,0,0,2 --kl none")
    levels, _ = tempflow.trunk_rollout(toy, toy.sde, toy.ode, batch, widths, args, 0, bar())
    calls, toy.calls = toy.calls, []
    path = common.rollout(toy, toy.ode, batch.cond, batch.noise, 1.0, 999, desc="")
    for i, level in levels.items():
        assert torch.equal(level.x_t, path.x[:, i]) and level.o_ref is None
    expected = [(4, i, False) for i in range(5)]  # the trunk, to the last step with children
    expected += [(4 * widths[i], j, False) for i in (0, 1, 4) for j in range(i + 1, 6)]
    assert sorted(calls) == sorted(expected)
    toy.calls, args.micro_batch_size = [], 5
    again, _ = tempflow.trunk_rollout(toy, toy.sde, toy.ode, batch, widths, args, 0, bar())
    assert max(rows for rows, *_ in toy.calls) == 5 and sum(r for r, *_ in toy.calls) == sum(r for r, *_ in expected)
    close(again[4].z, levels[4].z, 0)


@pytest.mark.parametrize("kind", MODEL)
def test_a_tree_without_splits_is_an_sde_trajectory(kind, monkeypatch):
    toy = Toy(kind, 5)
    batch = toy.batch()
    args = parse("--model", MODEL[kind], "--steps 5 --branching tree --tree-splits= --grouping prompt --group-size 3")
    monkeypatch.setattr(tempflow, "branch_noise", lambda a, e, i, *rest: batch.noise[:, i + 1, None])
    levels, ends = tempflow.tree_rollout(toy, toy.sde, toy.ode, batch, args.widths, args, 0, bar())
    widths, args.tail = [*args.widths[:3], 0, 0], "sde"  # the last steps are not trained, but have their noise
    sampled, last = tempflow.tree_rollout(toy, toy.sde, toy.ode, batch, widths, args, 0, bar())
    close(last, common.rollout(toy, toy.sde, batch.cond, batch.noise, 1.0, 99, desc="").x[:, -1], 1e-6)
    assert list(sampled) == [0, 1, 2]
    path = common.rollout(toy, toy.sde, batch.cond, batch.noise, 1.0, 99, desc="")
    assert list(levels) == list(range(args.train_steps)) and args.train_steps == (4 if kind == "flow" else 5)
    for i, level in levels.items():
        close(level.x_t, path.x[:, i], 1e-6), close(level.o_old, path.o_old[:, i], 1e-6)
        assert torch.equal(level.z[:, 0], batch.noise[:, i + 1])
    if kind == "eps":
        close(ends, path.x[:, -1], 1e-6)
    else:  # the untrained last step is deterministic
        close(ends, toy.ode.mu(path.x[:, 4], path.o_old[:, 4], 4), 1e-6)


def find(rows, x):
    """The one row of `rows` that is x."""
    distance = (rows.double() - x).flatten(1).abs().max(1).values
    assert distance.min() < 1e-4 and (distance < 1e-3).sum() == 1
    return int(distance.argmin())


@pytest.mark.parametrize("entropy", [0.0, 0.7])
@pytest.mark.parametrize("kind", MODEL)
def test_a_trees_nodes_have_the_mean_return_of_their_leaves(kind, entropy):
    """The tree is walked from its root; no order of its nodes is assumed."""
    toy = Toy(kind, 5, shape=(1, 2, 2))
    batch, k = toy.batch(2), toy.k
    args = parse(
        "--model",
        MODEL[kind],
        "--steps 5 --branching tree --tree-splits 0,2,3 --logprob-reduce sum --entropy",
        entropy,
    )
    levels, ends = tempflow.tree_rollout(toy, toy.sde, toy.ode, batch, args.widths, args, 0, bar())
    assert [len(levels[i].x_t) for i in range(4)] == [2, 4, 4, 8] and len(ends) == 16
    assert [levels[i].z.shape[1] for i in range(4)] == [2, 1, 2, 2]
    reward = torch.randn(16, generator=torch.Generator().manual_seed(1))
    tempflow.back_up(levels, toy.sde, args, reward)
    seen = []

    def below(x, i, n):
        """Returns of the leaves below the state x of step i: reward - entropy * the log ratios from here on."""
        if i == 5:
            leaf = find(ends, x)
            assert leaf // 8 == n  # the reward is of the right prompt
            seen.append(leaf)
            return [reward[leaf].item()]
        toy.off = True
        o_ref = toy.out(x, i, n)
        toy.off = False
        o = toy.out(x, i, n)
        if i not in levels:
            return below(k.ode(x, o, i), i + 1, n)
        p, total = find(levels[i].x_t, x), []
        for b, z in enumerate(levels[i].z[p].double()):
            policy, ref = (Normal(k.mean(x, out, i), k.sigma[i]) for out in (o, o_ref))
            x_s = policy.loc + k.sigma[i] * z
            cost = (policy.log_prob(x_s) - ref.log_prob(x_s)).sum().item()
            returns = below(x_s, i + 1, n)
            assert levels[i].value[p, b].item() == pytest.approx(sum(returns) / len(returns), rel=1e-5, abs=1e-3)
            total += [r - entropy * cost for r in returns]
        return total

    for n in range(2):
        assert len(below(batch.noise[n, 0].double(), 0, n)) == 8
    assert sorted(seen) == list(range(16))


@pytest.mark.parametrize("reduce", ["mean", "sum"])
def test_entropy_cost_of_a_stochastic_tail(draws, reduce):
    toy = Toy("eps", 5, shape=(1, 2, 2))
    batch, k, widths = toy.batch(2), toy.k, [0, 3, 0, 2, 0]
    args = parse("--model tiny-sd15 --steps 5 --profile 0,3,0,2 --tail sde --entropy 0.5 --logprob-reduce", reduce)
    levels, leaves = tempflow.trunk_rollout(toy, toy.sde, toy.ode, batch, widths, args, 0, bar())
    toy.off = False
    for i in (1, 3):
        for n in range(2):
            for b in range(widths[i]):
                x = levels[i].x_t[n].double()
                x, cost = k.mean(x, toy.out(x, i, n), i) + k.sigma[i] * levels[i].z[n, b], 0.0
                for j in range(i + 1, 5):
                    o = toy.out(x, j, n)
                    toy.off = True
                    ref = Normal(k.mean(x, toy.out(x, j, n), j), k.sigma[j])
                    toy.off = False
                    policy = Normal(k.mean(x, o, j), k.sigma[j])
                    x = policy.loc + k.sigma[j] * draws[f"{i}/{j}"][n, b]
                    ratio = policy.log_prob(x) - ref.log_prob(x)
                    cost += (ratio.mean() if reduce == "mean" else ratio.sum()).item()
                assert leaves[i][1][n, b].item() == pytest.approx(cost, rel=1e-3, abs=1e-3)


def test_mean_of_return_times_draw_is_the_gradient_of_the_soft_value():
    """RSM Eq. 57-60: E[G z] = sigma E grad V, V_j(x) = E[V_{j+1}] - beta KL_j(x), a recursion of quadratics."""
    steps, first, count, beta, c = 4, 1, 20_000, 0.3, torch.tensor([1.0, -0.6, 0.3, 0.8], dtype=F64).view(1, 2, 2)
    toy = Toy("eps", steps, shape=(1, 2, 2), seed=3)
    k, batch = toy.k, toy.batch(1)
    flags = f"--model tiny-sd15 --steps 4 --profile 0:2 --tail sde --entropy {beta} --logprob-reduce sum"
    args = parse(flags, "--micro-batch-size", count)
    widths = [count if i == first else 0 for i in range(steps)]
    levels, leaves = tempflow.trunk_rollout(toy, toy.sde, toy.ode, batch, widths, args, 0, bar())
    z = levels[first].z[0].double()
    x0, cost = leaves[first][0].double(), leaves[first][1][0].double()
    reward = (c * x0).flatten(1).sum(1)
    # V_j(x) = p x^2 / 2 + q x + const in every coordinate
    p, q = torch.zeros_like(c), c.clone()
    for j in range(steps - 1, first, -1):
        mu0 = k.mean(torch.zeros(1, dtype=F64), toy.shift[0, j].double(), j)
        a = k.mean(torch.ones(1, dtype=F64), (toy.slope[0, j] + toy.shift[0, j]).double(), j) - mu0
        m, n = ((toy.slope[0, j] - toy.slope[1, j]).double(), (toy.shift[0, j] - toy.shift[1, j]).double())
        w2 = k.w[j] ** 2  # KL = w^2 (m x + n)^2 / 2
        p, q = a**2 * p - beta * w2 * m**2, a * (p * mu0 + q) - beta * w2 * m * n
    x = levels[first].x_t[0].double()
    mu = k.mean(x, toy.out(x, first), first)
    truth = k.sigma[first] * (p * mu + q)  # Stein: E[V(mu + sigma z) z] = sigma E grad V

    def estimate(value):
        rows = (value - value.mean())[:, None, None, None] * z
        return rows.mean(0), rows.std(0) / count**0.5

    mean, error = estimate(reward - beta * cost)
    assert ((mean - truth).abs() < 3 * error).all(), (mean, truth, error)
    hard, error = estimate(reward)
    assert ((hard - truth).abs() > 5 * error).any()  # without the log ratios it is another gradient


# ---- the trainer, taped ---------------------------------------------------------------------------------------------
BASE = "--num-prompts 3 --group-size 2 --updates-per-epoch 2 --lr 2e-3 --clip-range 3e-4 --profile 2,4,3"
BASE += " --micro-batch-size 5"
TAPES = {  # name: flags
    "ppo tempflow": "",
    "ppo none": "--reweight none --cfg 2 --logprob-reduce sum --clip-range 0.1",
    "ppo guard": "--reweight guard",
    "hinge tempflow": "--loss hinge --grouping prompt --profile 1,3,2",
    "hinge pcpo": "--loss hinge --reweight pcpo",
    "ppo fair": "--fair-clip sigma2 --clip-range 2.3e-4",
    "hinge guard": "--loss hinge --reweight guard --kl none --clip-range 1e-4",
    "fair guard": "--loss hinge --reweight none --fair-clip guard --kl heuristic --clip-range 1e-3 --inner-epochs 2",
    "fair sigma2": "--loss hinge --reweight none --fair-clip sigma2 --profile 3,2 --anchor-beta 0.7"
    " --clip-range 2.5e-4",
    "rsm none": "--loss rsm --reweight none",
    "rsm tempflow": "--loss rsm --reweight tempflow",
    "rsm pcpo": "--loss rsm --reweight pcpo",
    "rsm guard": "--loss rsm --reweight guard --clip-range 1e-4",
    "rsm fair sigma2": "--loss rsm --reweight none --fair-clip sigma2 --profile 3,2 --anchor-beta 0.7"
    " --clip-range 2.5e-4",
    "rsm fair guard": "--loss rsm --reweight tempflow --fair-clip guard --clip-range 1e-4",
    "sd15 redesign": "--model tiny-sd15 --steps 5 --loss hinge --reweight pcpo --pcpo-w 30 --kl none --grouping prompt"
    " --profile 0:3,3:2 --anchor-beta 0.5 --anchor-form pcpo --anchor-max-ratio 0.2 --clip-range 1e-3",
    "sd15 native": "--model tiny-sd15 --loss hinge --reweight pcpo --pcpo-w 0 --grouping prompt --profile 0:2,2:3"
    " --clip-range 1e-3",
    "sd15 anchors first": "--model tiny-sd15 --steps 5 --loss hinge --reweight pcpo --pcpo-w 30 --kl none"
    " --grouping prompt --profile 0:3,3:2 --anchor-beta 0.5 --anchor-form pcpo --anchor-max-ratio 0.2"
    " --clip-range 1e-3 --anchor-first 0.8 --train-fraction 0.8 --inner-epochs 2",
    "rewards at the mean": "--loss hinge --reweight none --profile 3,3,3 --beta 0.5 --mask rows",  # see FIXED
    "rewards all equal": "--loss hinge --reweight none --profile 3,3,3 --beta 0.5 --mask rows",
    "branch": "--branching tree --tree-splits 0,2 --reweight none --mask none --adv-unbiased --adv-eps 1e-8",
    "tree": "--branching tree --tree-splits 0,2 --loss hinge --reweight none --entropy 0.05",
    "trajectories": "--model tiny-sd15 --branching tree --tree-splits= --grouping prompt --group-size 3"
    " --reweight none --reward jpeg --clip-range 2e-3",
    "sde tail": "--tail sde --entropy 0.1 --kl none --profile 2,2,2",
}




def around(rewards_):
    """Rewards m - d, m, m + d of every three children, with random m and d: the second has A = 0 exactly."""
    m, d = torch.randint(-64, 64, (2, len(rewards_) // 3, 1)) / 64
    return torch.cat([m - d, m, m + d], 1).flatten()


FIXED = {"rewards at the mean": around, "rewards all equal": lambda r: torch.full_like(r, 0.4)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


class Tape:
    """One run of tempflow.main with theta apart from the reference, and all that was asked of the network."""

    def __init__(self, flags, folder, name, module=tempflow, spread=0.05, fixed_reward=None):
        self.args = parse(flags, "--runs", folder, "--name", name) if module is tempflow else None
        self.calls, self.rewards, self.texts, self.updates, self.grads, self.rows, self.off = (
            [],
            [],
            [],
            [],
            [],
            [],
            False,
        )
        self.name = name
        with pytest.MonkeyPatch.context() as patch:
            self.patch(patch, spread, fixed_reward)
            if module is tempflow:
                tempflow.main(self.args)
            else:
                module.main(module.parse_args([*flags.split(), "--runs", str(folder), "--name", name]))
        with (Path(folder) / name / "metrics.csv").open(newline="") as f:
            self.metrics = {key: float(v) for key, v in list(csv.DictReader(f))[-1].items() if v}

    def patch(self, patch, spread, fixed_reward):
        tape, predict, reference, step = self, common.Policy.predict, common.Policy.reference, common.Optimiser.step
        add_lora, score = harness.add_lora, rewards.Reward.__call__

        def taped_predict(policy, x, t, cond, cfg):
            o = predict(policy, x, t, cond, cfg)
            tape.calls.append(
                SimpleNamespace(
                    x=x.clone(),
                    t=t.clone(),
                    cond=cond.index.clone(),
                    grad=o.requires_grad,
                    off=tape.off,
                    passes=1 + (cfg != 1),
                )
            )
            if o.requires_grad:
                row = [x.clone(), t.clone(), o.detach().clone(), None]
                tape.rows.append(row)
                o.register_hook(lambda g: row.__setitem__(3, g.clone()))
            return o

        @contextmanager
        def taped_reference(policy):
            with reference(policy):
                tape.off = True
                yield
                tape.off = False

        def taped_step(optimiser):
            tape.updates.append(tape.rows)
            tape.rows = []
            tape.grads.append([p.grad.clone() for p in optimiser.params])
            return step(optimiser)

        def moved_lora(policy, args):
            params, gen = add_lora(policy, args), torch.Generator().manual_seed(11)
            for p in params[1::2]:
                p.data = spread * torch.randn(p.shape, generator=gen)
            return params

        def taped_score(reward, images, texts, *a, **b):
            total, parts = score(reward, images, texts, *a, **b)
            tape.texts.append(texts)
            total = total if fixed_reward is None else fixed_reward(total)
            tape.rewards.append(total)
            return total, parts

        def keep(real):
            def rollout(*a, **b):
                tape.levels, tape.leaves = real(*a, **b)
                return tape.levels, tape.leaves

            return rollout

        patch.setattr(common.Policy, "predict", taped_predict)
        patch.setattr(common.Policy, "reference", taped_reference)
        patch.setattr(common.Optimiser, "step", taped_step)
        patch.setattr(harness, "add_lora", moved_lora)
        patch.setattr(rewards.Reward, "__call__", taped_score)
        patch.setattr(tempflow, "trunk_rollout", keep(tempflow.trunk_rollout))
        patch.setattr(tempflow, "tree_rollout", keep(tempflow.tree_rollout))


@pytest.fixture(scope="module")
def tape(folder):
    def run(name):
        return Tape(f"{BASE} {TAPES[name]}", folder, name.replace(" ", "-"), fixed_reward=FIXED.get(name))

    return functools.cache(run)


def advantages(args, values):
    """values (states, children) of one step -> A, and whether all values of the child's group are equal.

    Written out from RSM's stat_tracking.py (biased, + 1e-4) and BranchGRPO (unbiased, + 1e-8).
    """
    flat = values.double().flatten()
    per_sample = len(flat) // (args.num_prompts * args.group_size)
    group = per_sample * (args.group_size if args.grouping == "prompt" else 1)
    adv, equal = torch.zeros_like(flat), torch.zeros(len(flat), dtype=torch.bool)
    for start in range(0, len(flat), group):
        r = flat[start : start + group]
        equal[start : start + group] = bool((r == r[0]).all())
        square = ((r - r.mean()) ** 2).sum() / (group - args.adv_unbiased)
        adv[start : start + group] = (r - r.mean()) / (square.sqrt() + args.adv_eps)
    adv[equal] = 0
    return adv.clamp(-args.adv_clip, args.adv_clip).view(values.shape), equal.view(values.shape)


def left_out(args, advs):
    """Rows that do not count.  rows (RSM): A exactly 0, unless it is 0 in every row; groups: the embedded presets."""
    zero = {i: adv == 0 for i, (adv, _) in advs.items()}
    if args.mask == "groups":
        return {i: equal for i, (_, equal) in advs.items()}
    if args.mask == "none" or all(z.all() for z in zero.values()):
        return {i: torch.zeros_like(z) for i, z in zero.items()}
    return zero


@pytest.mark.parametrize("name", TAPES)
def test_gradients_of_the_trainer_are_those_of_the_printed_loss(tape, name):
    """dL/do of every network output of every update: loss, gamma, clip, KL, masks, row weights, anchors, averages."""
    run = tape(name)
    args, levels = run.args, run.levels
    k = kernel(args.kind, args.steps, big_w=args.pcpo_w if args.reweight == "pcpo" and args.kind == "eps" else 0)
    native = kernel(args.kind, args.steps)
    trained = list(range(args.train_steps))
    weight = (
        native.w.mean().expand(args.steps)  # a constant of the sampler: of all its steps
        if args.kind == "eps"
        else native.w[trained].sum() / native.dt[trained].sum() * native.dt
    )
    with_children = [i for i, level in levels.items() if level.z.shape[1]]
    width = {i: levels[i].z.shape[1] for i in levels}
    mean_width = sum(width.values()) / len(with_children)
    advs = {i: advantages(args, levels[i].value) for i in with_children}
    out = left_out(args, advs)
    times = native.t * 1000
    method = "hinge" if args.loss == "rsm" else args.loss
    total = closed = skipped = 0
    assert len(run.updates) == args.updates_per_epoch * args.inner_epochs
    for number, update in enumerate(run.updates):
        states, loss_rows, valid, anchors = [], [], 0, 0
        for x, t, o, grad in update:
            for n in range(len(x)):
                i = int((times - t[n]).abs().argmin())
                p = find(levels[i].x_t, x[n].double())
                states.append((i, p, o[n].double()[None].requires_grad_(), grad[n]))
        assert len({s[:2] for s in states}) == len(states)  # a state once per update: its children share the pass
        for i, p, o, _ in states:
            level, count, rows = levels[i], width[i], 0.0
            o_old = level.o_old[p].double()[None]
            drift = None if level.o_ref is None else k.bk[i] / k.sigma[i] * (o - level.o_ref[p].double())
            reduce = torch.mean if args.logprob_reduce == "mean" else torch.sum
            if count:
                adv, equal = advs[i][0][p], out[i][p]
                many = [v.expand(count, -1, -1, -1) for v in (o, o_old)]
                step, xi = torch.full((count,), i), args.clip_range
                shared = (k, xi, args.logprob_reduce, weight, tempflow.TEMPFLOW)
                value, is_open, _ = printed(
                    method, args.reweight, args.fair_clip, adv, *many, level.z[p].double(), step, *shared
                )
                if args.kl != "none":
                    value = value + args.beta * reduce(drift**2 / 2) * (k.dt[i] if args.kl == "heuristic" else 1)
                share = mean_width / count if args.branching == "trunk" else 1.0  # the row weight
                rows = (value * share)[~equal].sum()
                valid += int((~equal).sum())
                total, closed, skipped = (
                    total + count,
                    closed + int((~is_open & ~equal).sum()),
                    skipped + int(equal.sum()),
                )
            else:
                anchors += 1
                anchor = mean_width * reduce(drift**2 / 2)
                if args.anchor_form == "pcpo":
                    anchor = 0.5 * args.pcpo_w**2 * ((o - level.o_ref[p].double()) ** 2).mean()
                rows = anchor
            loss_rows.append(rows)
        expected = []
        for (i, _, o, _), rows in zip(states, loss_rows):
            beta = args.anchor_beta * (args.anchor_first or 1.0)
            rows = rows * (beta / max(1, anchors) if not width[i] else 1 / max(1, valid))
            expected.append(torch.autograd.grad(rows, o)[0][0] if rows.requires_grad else torch.zeros_like(o[0]))
        if args.anchor_first:
            assert anchors == (0 if number % args.updates_per_epoch else 6)
        ours, expected = torch.stack([s[3] for s in states]), torch.stack(expected)
        assert relative(ours, expected) < 2e-3
        worst = (ours - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1).clamp(
            min=1e-9 * expected.norm()
        )
        assert worst.max() < 2e-2  # each state, the quiet ones too
    assert total > 20 and closed > 0  # rows that the clip stops
    assert skipped > 0 or name != "ppo tempflow"  # groups with equal rewards
    assert run.metrics["ratio/start_deviation"] < 1e-5


@pytest.mark.parametrize("name", TAPES)
def test_no_network_call_is_made_twice(tape, name):
    seen = [(x.numpy().tobytes(), float(t), int(c), call.off)
            for call in tape(name).calls if not call.grad for x, t, c in zip(call.x, call.t, call.cond)]  # fmt: skip
    assert len(seen) == len(set(seen)) > 0


@pytest.mark.parametrize("name", TAPES)
def test_dry_run_counts_what_a_run_asks_for(tape, name):
    run = tape(name)

    def rows(grad, off):
        return sum(len(c.x) * c.passes for c in run.calls if (c.grad, c.off) == (grad, off))

    lines = tempflow.sizes(run.args)
    images = int(lines["decodes and reward evaluations per epoch"].split()[0])
    assert images == sum(len(r) for r in run.rewards)
    found = re.match(
        r"(\d+) in the rollout.*, (\d+) with gradient, (\d+) of the reference", lines["network evaluations per epoch"]
    )
    assert [int(n) for n in found.groups()] == [rows(False, False), rows(True, False), rows(False, True)]
    assert int(lines["training rows per epoch"]) == sum(
        level.z.shape[0] * level.z.shape[1] for level in run.levels.values()
    )
    levels, any_ref = run.levels.values(), any(level.o_ref is not None for level in run.levels.values())
    held = sum(2 * (2 * len(v.x_t) + v.z.shape[0] * v.z.shape[1]) + len(v.x_t) * any_ref for v in levels)
    held += sum(len(v.o_ref) for v in levels if v.o_ref is not None)
    held += images + run.args.num_prompts * run.args.group_size * (run.args.steps + 1)
    assert f"({held} latents: " in lines["memory for the rollout"]


def test_children_of_one_step_have_the_rewards_of_their_own_images(tape):
    for name in ("ppo tempflow", "sd15 redesign", "tree"):
        run = tape(name)
        prompts = common.prompt_batch(run.args.prompt_list, 0, 0, 3)
        assert len({p.text for p in prompts}) == 3
        for texts in run.texts:  # prompt by prompt, image by image, child by child
            assert texts == [p.text for p in prompts for _ in range(len(texts) // 3)]
        if name == "tree":
            continue
        for j, (i, (x0, _)) in enumerate(run.leaves.items()):
            assert torch.equal(run.levels[i].value.flatten(), run.rewards[j]) and len(x0) == len(run.rewards[j])
            spread = run.metrics[f"value_std/{i:02d}"]
            group = run.levels[i].z.shape[1] * (run.args.group_size if run.args.grouping == "prompt" else 1)
            assert spread == pytest.approx(run.rewards[j].view(-1, group).std(1, correction=0).mean().item(), rel=1e-5)
        every = torch.cat(run.rewards)
        assert run.metrics["reward/mean"] == pytest.approx(every.mean().item(), rel=1e-5)


def test_logged_means(tape):
    run = tape("fair guard")  # two inner epochs over the same rows
    equal = torch.cat([advantages(run.args, level.value)[1].flatten() for level in run.levels.values()])
    adv = torch.cat([advantages(run.args, level.value)[0].flatten() for level in run.levels.values()])
    assert run.metrics["adv/zero_std_frac"] == pytest.approx(equal.double().mean().item(), rel=1e-5)
    assert run.metrics["adv/std"] == pytest.approx(adv.std(correction=0).item(), rel=1e-4)
    assert run.metrics["kl/ref"] > 0 and 0 < run.metrics["ratio/clip_frac"] < 1 and "loss/anchor" not in run.metrics
    assert tape("fair sigma2").metrics["loss/anchor"] > 0


@pytest.mark.parametrize("loss", ["hinge", "ppo"])
def test_a_tree_without_splits_has_grpos_gradient(folder, monkeypatch, loss):
    """The same draws into both: hinge = PCPO's clipping, ppo = GRPO; every update of an epoch."""
    flags = "--num-prompts 2 --group-size 4 --steps 3 --epochs 1 --updates-per-epoch 2 --clip-range 1e-3 --beta 0.05"
    flags += " --reward jpeg --eval-images 0 --sample-every 0 --model tiny-sd15 --lr 1e-3"
    other = f"--preset tiny-sd15 {flags} --adv-norm group --kl mean --kl-anchor ref --train-fraction 1"
    other += " --loss pcpo --pcpo-weights none" if loss == "hinge" else " --loss grpo"
    theirs = Tape(other, folder, f"grpo-{loss}", grpo)
    flags += f" --branching tree --tree-splits= --grouping prompt --kl true --reweight none --loss {loss}"

    def same(args, epoch, i, indices, count, shape, device):
        return common.sample_noise(args.seed, epoch, indices, args.steps, shape, device)[:, i + 1, None]

    monkeypatch.setattr(tempflow, "branch_noise", same)
    ours = Tape(flags, folder, f"tree-{loss}")
    assert not any(advantages(ours.args, level.value)[1].any() for level in ours.levels.values())
    for j, tolerance in ((0, 1e-4), (1, 2e-2)):
        norm = sum((b**2).sum() for b in theirs.grads[j]) ** 0.5
        gap = sum(((a - b) ** 2).sum() for a, b in zip(ours.grads[j], theirs.grads[j], strict=True)) ** 0.5
        assert gap < tolerance * norm


def test_every_active_step_weighs_the_same_whatever_its_width(folder, monkeypatch):
    """G26: one backward pass per state; with a loss of 1 per child it is the state's total weight."""
    monkeypatch.setattr(tempflow, "hinge_loss", lambda adv, log_ratio, clip_range: 1 + 0 * log_ratio)
    weights, backward = [], common.Optimiser.backward
    monkeypatch.setattr(
        common.Optimiser, "backward", lambda self, loss: weights.append(loss.item()) or backward(self, loss)
    )
    flags = f"{BASE} --profile 2,7,3 --loss hinge --reweight none --kl none --reward jpeg"
    run = Tape(f"{flags} --micro-batch-size 1 --updates-per-epoch 1", folder, "weights")
    assert run.metrics["adv/zero_std_frac"] == 0
    times, total = kernel("flow", 4).t * 1000, torch.zeros(3, dtype=F64)
    for (_, t, _, _), weight in zip(run.updates[0], weights, strict=True):
        total[int((times - t).abs().argmin())] += weight
    close(total, torch.full((3,), 1 / 3), 1e-6)


def test_rewards_that_are_all_equal_move_nothing_and_crash_nothing(folder):
    flat = FIXED["rewards all equal"]
    run = Tape(f"{BASE} --beta 1", folder, "equal", fixed_reward=flat)
    assert all((g == 0).all() for grads in run.grads for g in grads)  # not even the KL of these rows
    assert run.metrics["adv/zero_std_frac"] == 1 and run.metrics["grad/norm"] == 0
    run = Tape(f"{BASE} --profile 2,2 --anchor-beta 1", folder, "equal-anchors", fixed_reward=flat)
    assert all(any((g != 0).any() for g in grads) for grads in run.grads)  # the anchors remain


def test_rows_that_count(tape):
    """The gradients are checked above: with RSM's mask the KL is all that moves where all rewards are equal."""
    run = tape("rewards all equal")
    assert run.metrics["adv/zero_std_frac"] == 1 and run.metrics["grad/norm"] > 0
    run = tape("rewards at the mean")
    values = torch.cat([level.value for level in run.levels.values()])
    mixed = values[:, 0] != values[:, 1]
    assert mixed.any()
    assert run.metrics["adv/zero_std_frac"] == pytest.approx(1 - mixed.double().mean().item())  # by group, as ever
    adv, equal = torch.tensor([0.0, -1e-9, 2.0, 0.0]), torch.tensor([False, False, False, True])
    wanted = {"rows": [False, True, True, False], "groups": [True, True, True, False], "none": [True] * 4}
    for mask, counts in wanted.items():
        assert tempflow.rows_that_count(adv, equal, parse("--mask", mask)).tolist() == counts
    assert tempflow.rows_that_count(0 * adv, equal, parse("--mask rows")).all()
    masks = {name: tempflow.parse_args(["--preset", name]).mask for name in ("tiny", "tiny-sd15")}
    assert set(masks.values()) == {"groups"} and tempflow.PRESETS["pcpo-sd15-hpsv2"]["mask"] == "none"
    assert not any("mask" in v for k, v in tempflow.PRESETS.items() if k.startswith(("rsm", "tempflow")))


def test_two_nodes_of_branchgrpo_have_advantages_of_root_a_half(folder, monkeypatch):
    kept, real = [], tempflow.all_rows
    monkeypatch.setattr(tempflow, "all_rows", lambda levels, adv, *a: kept.append(adv) or real(levels, adv, *a))
    flags = "--branching tree --tree-splits 0 --adv-unbiased --adv-eps 1e-8 --reward jpeg --updates-per-epoch 1"
    run = Tape(f"{BASE} {flags}", folder, "two-nodes")
    assert all(level.value.std(1 if i == 0 else 0).min() > 0 for i, level in run.levels.items())
    close(kept[0].abs(), torch.full_like(kept[0], 0.5**0.5), 1e-4)
    level = run.levels[0].value
    assert torch.equal(kept[0][: level.numel()].view_as(level) > 0, level > level.mean(1, keepdim=True))


# ---- anchors --------------------------------------------------------------------------------------------------------
def test_anchors_are_on_steps_without_children_and_never_the_last():
    cases = {
        "--profile 3,2": [],
        "--profile 3,2 --anchor-beta 1": [2],
        "--profile 0:2,1:2,2:2 --anchor-beta 1": [],
        "--model tiny-sd15 --profile 1:2 --anchor-beta 1": [0, 2],
        "--model tiny-sd15 --steps 6 --profile 0:2,3:2 --anchor-beta 1 --train-fraction 0.7": [1, 2],
    }
    for flags, expected in cases.items():
        args = parse(flags)
        assert tempflow.anchor_steps(args, args.widths) == expected


def test_anchor_subset():
    args = parse("--num-prompts 4 --group-size 5 --profile 2,3 --anchor-beta 1 --anchor-max-ratio 0.1")
    rows = 5
    for ratio, size in ((0.1, 10), (0.05, 5), (0.0, 0), (9.0, 60)):
        args.anchor_max_ratio = ratio
        kept = tempflow.kept_anchors(args, 0, [2, 3, 4], rows)
        assert len(kept) == size and kept <= {(n, i) for n in range(20) for i in (2, 3, 4)}
    args.anchor_max_ratio = 0.2
    sets = [tempflow.kept_anchors(args, epoch, [2, 3, 4], rows) for epoch in (0, 0, 1, 2)]
    assert sets[0] == sets[1] and sets[0] != sets[2] != sets[3]
    args.seed = 1
    assert tempflow.kept_anchors(args, 0, [2, 3, 4], rows) != sets[0]
    args.anchor_max_ratio = None
    assert tempflow.kept_anchors(args, 0, [2, 3, 4], rows) is None


def test_anchor_subset_in_a_run(tape):
    run = tape("sd15 redesign")  # 6 images x 5 children, 20 % of them
    anchors = [s for update in run.updates for x, t, *_ in update for s in t.tolist() if round(s) not in (801, 201)]
    assert len(anchors) == 6 and 1 not in anchors  # 5 DDIM steps: 801 601 401 201 1


def test_without_kl_only_the_kept_anchors_meet_the_reference(tape):
    run = tape("sd15 redesign")
    kept = tempflow.kept_anchors(run.args, 0, [1, 2], 5)
    for i, level in run.levels.items():
        if i in (0, 3):
            assert level.o_ref is None and len(level.x_t) == 6
        else:
            assert level.image.tolist() == [n for n in range(6) if (n, i) in kept] and level.z.shape[1] == 0
            assert len(level.x_t) == len(level.o_old) == len(level.o_ref) == len(level.image)
            for n, x in zip(level.image.tolist(), level.x_t):
                assert any((call.x == x).flatten(1).all(1).any() and call.off for call in run.calls), (n, i)
    for_the_log = 6 * 2  # all states with children, which are fewer than WATCHED
    assert sum(len(call.x) for call in run.calls if call.off) == len(kept) + for_the_log == 6 + 12
    assert run.metrics["kl/ref"] > 0 and run.metrics["loss/kl"] == 0 and run.metrics["loss/anchor"] > 0


def test_anchors_weigh_as_in_the_official_micro_batches():
    """train_grpo_pr.py: 80 anchors cut by tensor_split over the micro-batches of 4 rows of both updates; each adds its
    mean to its micro-batch's loss, and an update is the mean of its micro-batches."""
    args = SimpleNamespace(**tempflow.PRESETS["rsm-sd15-hpsv2"])
    rows = 8 * sum(int(item.split(":")[1]) for item in args.profile.split(","))
    count = tempflow.anchor_count(args, list(range(44)), rows // 8)
    assert (rows, count) == (800, 80)
    value, pieces = torch.randn(count, dtype=F64), torch.arange(count).tensor_split(rows // 4)
    halves = pieces[: rows // 8], pieces[rows // 8 :]
    weight = [sum(value[p].mean() for p in half if len(p)) / len(half) for half in halves]
    close(weight[0], args.anchor_first * value.mean(), 1e-12)
    assert weight[1] == 0


def test_all_anchors_are_in_the_first_update(tape):
    run = tape("sd15 anchors first")  # two passes of two updates
    anchors = [[s for x, t, *_ in update for s in t.tolist() if round(s) in (601, 401)] for update in run.updates]
    assert [len(a) for a in anchors] == [6, 0, 6, 0] and run.metrics["loss/anchor"] > 0


def test_one_start_for_each_block_of_an_epoch(folder):
    flags = "--num-prompts 5 --group-size 1 --profile 2,2 --updates-per-epoch 1"
    starts = Tape(f"{flags} --shared-blocks 2", folder, "blocks").levels[0].x_t
    assert [[bool((a == b).all()) for b in starts] for a in starts] == [
        [n < 3 and m < 3 or n >= 3 and m >= 3 for m in range(5)] for n in range(5)
    ]
    starts = Tape(flags, folder, "no-blocks").levels[0].x_t
    assert len({x.numpy().tobytes() for x in starts}) == 5


def test_an_update_of_dropped_anchors_only_is_no_update(folder):
    flags = "--profile 2 --anchor-beta 0.1 --anchor-max-ratio 0 --updates-per-epoch 2 --name none"
    batch = SimpleNamespace(indices=range(2), kept=None)
    for seed in range(99):
        args = parse(flags, "--seed", seed)
        if sum((part[:, 1] == 0).any() for part in harness.epoch_updates(args, batch, [0, 1, 2], 0)) == 1:
            break
    run = Tape(f"{flags} --seed {seed}", folder, "none")
    assert len(run.updates) == 1 and run.metrics["grad/norm"] > 0


# ---- what runs, and what must not change a run ----------------------------------------------------------------------
VARIANTS = [
    "--profile base",
    "--profile 3,3,0,2 --steps 6 --tail sde",
    "--kernel ancestral --group-size 2",
    "--kernel dance --branching tree --tree-splits 0 --train-fraction 0.5 --ema-decay 0.5",
    "--kernel ancestral --train-fraction 1 --branching tree --tree-splits 0,1",  # its last step has no noise
]


@pytest.mark.parametrize("flags", VARIANTS)
def test_other_variants_run(tmp_path, flags):
    run = Tape(flags, tmp_path, "run", spread=0.0)
    assert run.metrics["grad/norm"] > 0 and run.metrics["ratio/start_deviation"] < 1e-5 and run.metrics["epoch"] == 1


SAME = "--num-prompts 2 --group-size 2 --steps 4 --updates-per-epoch 2 --ema-decay 0.5 --ema-every 1 --save-every 1"
SAME += " --profile 3,0,2 --model tiny-sd15 --loss hinge --reweight none --fair-clip guard --clip-range 1e-3 --lr 3e-4"
SAME += " --anchor-beta 0.1 --anchor-max-ratio 0.1 --epochs 2 --reward clipscore --reward-path tiny/clip"


def start(folder, rank, port):
    """One of two processes (what torchrun does, without its launcher)."""
    env = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    env |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
    command = [
        sys.executable,
        str(ROOT / "tempflow_rsm.py"),
        *SMALL,
        *SAME.split(),
        "--runs",
        str(folder),
        "--name",
        "two",
    ]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, env=os.environ | env, stdout=pipe, stderr=pipe, text=True)


@pytest.fixture(scope="module")
def whole(folder):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [start(folder, rank, port) for rank in range(2)]
    tempflow.main(parse(SAME, "--runs", folder, "--name", "whole"))
    yield processes
    for process in processes:
        process.kill()


def table(run):
    with (run / "metrics.csv").open(newline="") as f:
        return [{k: v for k, v in row.items() if not k.startswith(("time/", "calls/"))} for row in csv.DictReader(f)]


def same(a, b, rel=1e-3, atol=1e-5):
    for row, other in zip(table(a), table(b), strict=True):
        for key, value in row.items():
            assert bool(value) == bool(other[key]), key
            if value:
                assert float(value) == pytest.approx(float(other[key]), rel=rel, abs=atol), key


def lora(run):
    return torch.load(run / "checkpoints" / "last" / "state.pt", weights_only=True)["theta"]["lora"]


def test_resumed_run_is_bitwise_the_uninterrupted_one(whole, folder):
    tempflow.main(parse(SAME, "--runs", folder, "--name halves --epochs 1"))
    tempflow.main(tempflow.parse_args(["--resume", str(folder / "halves"), "--epochs", "2"]))
    assert table(folder / "whole") == table(folder / "halves") and len(table(folder / "whole")) == 2
    assert all(torch.equal(a, b) for a, b in zip(lora(folder / "whole"), lora(folder / "halves"), strict=True))


def test_micro_batch_size_changes_nothing_else(whole, folder):
    tempflow.main(parse(SAME, "--runs", folder, "--name micro --micro-batch-size 3"))
    same(folder / "whole", folder / "micro")


def test_two_processes_give_the_metrics_of_one(whole, folder):
    for process in whole:
        _, error = process.communicate(timeout=300)
        assert process.returncode == 0, error[-2000:]
    same(folder / "whole", folder / "two")
    for a, b in zip(lora(folder / "whole"), lora(folder / "two"), strict=True):
        assert (a - b).norm() < 2e-2 * a.norm()


def test_update_that_differs_from_the_rollout_stops_the_run(tmp_path, monkeypatch):
    real = tempflow.trunk_rollout

    def perturbed(*a):
        levels, leaves = real(*a)
        for level in levels.values():
            level.o_old += 0.1 * torch.randn(level.o_old.shape)
        return levels, leaves

    monkeypatch.setattr(tempflow, "trunk_rollout", perturbed)
    with pytest.raises(SystemExit, match="right after the rollout"):
        tempflow.main(parse("--runs", tmp_path, "--name run"))


def test_help_shows_the_method_and_every_flag_is_explained(capsys):
    with pytest.raises(SystemExit) as stop:
        tempflow.parse_args(["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0 and "\nmethod:" in text
    method = text.split("\nmethod:")[1].split("\nreward:")[0]
    flags = re.findall(r"^  (--[a-z0-9-]+)", method, re.M)
    assert len(flags) >= 20 and math.prod(len(x) > 20 for x in re.split(r"\n  --", method)[1:])
