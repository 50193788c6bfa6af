"""What is measured for the log alone: distance to the reference, influence of the steps, sizes of learned parts."""

import csv
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.distributions import Normal, kl_divergence

import awm
import common
import first_order_rsm
import grpo
import harness
import tempflow_rsm
import vmpo

ROOT = Path(__file__).resolve().parent.parent
SMALL = "--num-prompts 2 --group-size 2 --steps 4 --epochs 2 --eval-images 0 --sample-every 0 --save-every 9".split()
MODELS = ["tiny-sd35", "tiny-sd15"]


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    monkeypatch.setattr(harness, "finish", lambda *a: None)


def train(script, folder, name, *flags, preset="tiny"):
    """Runs the script in this process -> rows of metrics.csv, LoRA."""
    argv = ["--preset", preset, *SMALL, "--runs", str(folder), "--name", name, *" ".join(flags).split()]
    script.main(script.parse_args(argv))
    with (folder / name / "metrics.csv").open(newline="") as f:
        rows = [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(f)]
    state = torch.load(folder / name / "checkpoints" / "last" / "state.pt", weights_only=True)
    return rows, state["theta"]["lora"]


def spoiled(images, prompts, metadata):
    """A reward without ties."""
    mask = torch.randn(images.shape[1:], generator=torch.Generator().manual_seed(1))
    return (images * mask).flatten(1).sum(1) / 10


def constant(images, prompts, metadata):
    return torch.full((len(images),), 0.3)


REWARD = f"--reward {__name__}:spoiled"


# ---- distance to the reference --------------------------------------------------------------------------------------
class Linear:
    """A policy without a network: the reference says A x + t."""

    def __init__(self, grid):
        self.a, self.grid = torch.randn(3, 3), grid
        self.reference = lambda: common.nullcontext()
        self.asked = 0

    def predict(self, x, timestep, cond, cfg):
        self.asked += len(x)
        return torch.einsum("ab,nbhw->nahw", self.a, x) + timestep[:, None, None, None] / 1000


def grid_of(kind, steps=5, level=None, kernel=None):
    from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

    if kind == "flow":
        return common.make_grid(FlowMatchEulerDiscreteScheduler(shift=3.0), kind, steps, kernel or "flow_sde", 0.7)
    scheduler = DDIMScheduler(1000, 0.00085, 0.012, "scaled_linear", set_alpha_to_one=False, steps_offset=1)
    return common.make_grid(scheduler, kind, steps, kernel or "ddim", 1.0)


COND = common.Cond(torch.zeros(6, 1), None, torch.arange(6))


@pytest.mark.parametrize("kind", ["flow", "eps"])
@pytest.mark.parametrize("reduce", ["mean", "sum"])
def test_distances_are_those_of_the_gaussians(kind, reduce):
    """Each step's mean by hand from its coefficients, the KL from torch.distributions; none without noise."""
    grid = grid_of(kind)
    grid.sigma[-1] = 0.0
    policy, x, o_old = Linear(grid), torch.randn(6, 6, 3, 4, 4), torch.randn(6, 5, 3, 4, 4)
    path = common.Rollout(x, o_old, o_old, None, COND)
    drift, kl = common.path_distance(policy, grid, path, 4, 2.0, reduce)
    assert policy.asked == 4 * 5
    fold = (lambda v: v.flatten(1).mean(1)) if reduce == "mean" else (lambda v: v.flatten(1).sum(1))
    want_drift, want_kl = torch.zeros(4).double(), torch.zeros(4).double()
    for i in range(5):
        o_ref = torch.stack([torch.tensordot(policy.a, x[n, i], 1) for n in range(4)]) + grid.timestep[i] / 1000
        mu, mu_ref = (grid.x_coef[i] * x[:4, i] + grid.o_coef[i] * o.double() for o in (o_old[:4, i], o_ref))
        want_drift += ((mu - mu_ref) ** 2).flatten(1).mean(1)
        if i < 4:
            want_kl += fold(kl_divergence(Normal(mu, grid.sigma[i]), Normal(mu_ref, grid.sigma[i])))
    torch.testing.assert_close(drift.double(), want_drift, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(kl.double(), want_kl, rtol=1e-4, atol=1e-6)
    i, n = torch.tensor([3, 0, 2, 1, 0]), torch.tensor([0, 1, 1, 3, 4])
    found = common.reference_kl(policy, grid, i, x[n, i], o_old[n, i], COND[n], 2.0, reduce, 2)
    for j, (a, b) in enumerate(zip(n.tolist(), i.tolist())):
        o_ref = torch.tensordot(policy.a, x[a, b], 1) + grid.timestep[b] / 1000
        mu, mu_ref = (grid.o_coef[b] * o.double() for o in (o_old[a, b], o_ref))
        truth = fold(kl_divergence(Normal(mu, grid.sigma[b]), Normal(mu_ref, grid.sigma[b]))[None])[0]
        assert found[j].item() == pytest.approx(truth.item(), rel=1e-4)
    assert len(common.reference_kl(policy, grid, i[:0], x[:0, 0], o_old[:0, 0], COND[n[:0]], 2.0, reduce, 2)) == 0


def test_watched_transitions_are_the_same_for_all_process_counts(monkeypatch):
    args, steps = SimpleNamespace(num_prompts=4, group_size=5, seed=3), [0, 2, 5]
    whole = harness.watched_rows(args, SimpleNamespace(indices=range(20)), steps, 7)
    assert len(whole) == harness.WATCHED == len({tuple(r) for r in whole.tolist()})
    assert set(whole[:, 1].tolist()) == {0, 2, 5}
    halves = [harness.watched_rows(args, SimpleNamespace(indices=r), steps, 7) for r in (range(10), range(10, 20))]
    found = [(n + 10 * k, i) for k, part in enumerate(halves) for n, i in part.tolist()]
    assert sorted(found) == sorted(map(tuple, whole.tolist()))
    other = harness.watched_rows(args, SimpleNamespace(indices=range(20)), steps, 8)
    assert {tuple(r) for r in other.tolist()} != {tuple(r) for r in whole.tolist()}
    assert len(harness.watched_rows(args, SimpleNamespace(indices=range(20)), [4], 7)) == 20  # all there are


NO_KL = [
    (grpo, "tiny", "--kl none --updates-per-epoch 2"), (grpo, "tiny-sd15", "--kl mean --kl-anchor old"),
    (tempflow_rsm, "tiny", "--kl none --branching tree --tree-splits 0,1 --mask none --group-size 1"),
    (tempflow_rsm, "tiny-sd15", "--kl none --profile 3,0 --anchor-beta 0.1 --group-size 1"),
    (awm, "tiny", "--beta 0"),
]  # fmt: skip


@pytest.mark.parametrize("script, preset, flags", NO_KL)
def test_the_kl_without_a_kl_term_changes_nothing_else(tmp_path, monkeypatch, script, preset, flags):
    """It is 0 before the first update, as it is of the rollout's policy, then it is not."""
    flags = f"{flags} {REWARD} --lr 1e-3"
    rows, lora = train(script, tmp_path, "run", flags, preset=preset)
    assert 0 <= rows[0]["kl/ref"] < 1e-9 < rows[1]["kl/ref"]
    nothing = lambda *a: torch.zeros(0, 2, dtype=torch.long)  # noqa: E731
    monkeypatch.setattr(harness, "watched_rows", nothing)
    without, same = train(script, tmp_path, "without", flags, preset=preset)
    assert "kl/ref" not in without[1] and all(map(torch.equal, lora, same))
    kept = [{k: v for k, v in r.items() if not k.startswith(("time/", "calls/", "kl/ref"))} for r in rows]
    assert kept == [{k: v for k, v in r.items() if not k.startswith(("time/", "calls/"))} for r in without]


@pytest.mark.parametrize("kernel", ["ode", "same"])
def test_drift_of_an_evaluation(tmp_path, monkeypatch, kernel):
    """From both models' means along the path that was kept; of the first WATCHED images alone."""
    monkeypatch.setattr(harness, "WATCHED", 3)
    held = []
    real = common.path_distance
    monkeypatch.setattr(common, "path_distance", lambda *a: held.append(a) or real(*a))
    flags = f"{REWARD} --lr 1e-2 --eval-images 5 --eval-steps 3 --eval-kernel {kernel} --cfg 2 --eval-cfg 1.5"
    rows, _ = train(grpo, tmp_path, "run", flags, "--micro-batch-size 2 --epochs 1")
    assert [a[3] for a in held] == [2, 1, 2, 1]  # images of each micro-batch, before and after
    policy, grid, *_ = held[-1]
    drift = kl = 0.0  # of the outputs that were kept: the averaged weights are not in force any more
    for *_, one, count, _, _ in held[2:]:
        with policy.reference():
            for i in range(3):
                o_ref = policy.predict(one.x[:count, i], grid.time(i, one.x[:count, i]), one.cond[range(count)], 1.5)
                mu, mu_ref = (grid.mu(one.x[:count, i], o, i) for o in (one.o_old[:count, i], o_ref))
                drift += ((mu - mu_ref) ** 2).flatten(1).mean(1).sum().item() / 3
                if kernel == "same" and grid.sigma[i] > 1e-6:
                    pair = (Normal(m, grid.at(grid.sigma, i, m)) for m in (mu, mu_ref))
                    kl += kl_divergence(*pair).flatten(1).mean(1).sum().item() / 3
    assert rows[0]["eval/drift"] == 0 < rows[1]["eval/drift"] == pytest.approx(drift, rel=1e-3)
    assert ("eval/kl" in rows[1]) == (kernel == "same")
    if kernel == "same":
        assert rows[0]["eval/kl"] == 0 < rows[1]["eval/kl"] == pytest.approx(kl, rel=1e-3)
    saved = json.loads((tmp_path / "run" / "eval" / "epoch_0001.json").read_text())
    assert not {"drift", "kl"} & set(saved)


# ---- influence and clipping of the steps ----------------------------------------------------------------------------
def felt(grid, loss_of):
    """h (T,): the size of o's gradient at theta_old for A = 1 over that of the draw's value gradient, z / sigma."""
    found = []
    for i in range(4):
        o, z = torch.randn(1, 3, 4, 4).double().requires_grad_(), torch.randn(1, 3, 4, 4).double()
        gradient = torch.autograd.grad(loss_of(i, o, o.detach(), z).sum(), o)[0]
        found.append((gradient.norm() / (z / grid.sigma[i]).norm()).item())
    return torch.tensor(found).double()


def same_shape(h, other):
    h = h[: len(other)]
    torch.testing.assert_close(h / h.mean(), other / other.mean(), rtol=1e-5, atol=1e-8)


GRPO_LOSSES = ["grpo", "reinforce", "epg", "guard", "pcpo", "pcpo --pcpo-weights none"]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("flags", GRPO_LOSSES)
def test_influence_of_grpos_losses_is_what_their_gradients_say(flags, model):
    """RSM Eq. 23: A z / sigma estimates the value's gradient, whose weight in o's gradient is h."""
    args = grpo.parse_args(f"--preset tiny --steps 5 --pcpo-w 20 --model {model} --kl none --loss {flags}".split())
    native = grid_of(args.kind)
    grid = grpo.stochastic_grid(native, args)
    table = grpo.pcpo_table(native, list(range(4)), args)

    def loss(i, o, o_old, z):
        i = torch.tensor([i])
        rows, moved = SimpleNamespace(i=i, z=z, o_old=o_old), grid.at(grid.w, i, o) * (o - o_old)
        log_ratio = common.log_ratio(moved, z, "mean")
        return grpo.policy_loss(grid, rows, o, moved, log_ratio, torch.ones(1), table, args)[0]

    same_shape(grpo.influence(grid, table, args), felt(grid, loss))


TEMPFLOW_LOSSES = [
    "--loss ppo --reweight none", "--loss ppo --reweight tempflow", "--loss hinge --reweight tempflow",
    "--loss hinge --reweight pcpo", "--loss hinge --reweight guard", "--loss hinge --reweight none --fair-clip sigma2",
    "--loss hinge --reweight none --fair-clip guard", "--loss hinge --reweight tempflow --fair-clip guard",
]  # fmt: skip


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("flags", TEMPFLOW_LOSSES)
def test_influence_of_tempflows_losses_is_what_their_gradients_say(flags, model):
    words = f"--preset tiny --steps 5 --profile 2,2,2,2 --pcpo-w 20 --model {model} --kl none --clip-range 9 {flags}"
    args = tempflow_rsm.parse_args(words.split())
    native = grid_of(args.kind)
    grid, w_loss = tempflow_rsm.stochastic_grid(native, args), native.w
    if args.reweight == "pcpo":
        w_loss = common.pcpo_weights(native, list(range(4)), "zeta" if args.kind == "flow" else "public")

    def loss(i, o, o_old, z):
        i = torch.tensor([i])
        rows = SimpleNamespace(z=z, adv=torch.ones(1))
        return tempflow_rsm.policy_loss(grid, rows, i, grid.at(w_loss, i, o) * (o - o_old), args)[0]

    same_shape(tempflow_rsm.influence(grid, w_loss, args), felt(grid, loss))


@pytest.mark.parametrize("script, steps", [(grpo, 2), (vmpo, 2), (tempflow_rsm, 3), (first_order_rsm, 3)])
def test_influence_is_written_with_mean_one(tmp_path, script, steps):
    train(script, tmp_path, "run", "--epochs 1")
    found = json.loads((tmp_path / "run" / "influence.json").read_text())
    assert found["step"] == list(range(steps)) and sum(found["h"]) / steps == pytest.approx(1)
    if script is not first_order_rsm:  # plain log ratios, times 2.25 sigma in TempFlow
        grid = grid_of("flow", 4)
        h = grid.o_coef.abs() * (grid.sigma if script is tempflow_rsm else 1)
        h = h[:steps] / h[:steps].mean()
        assert found["h"] == pytest.approx(h.tolist(), rel=1e-5)


def test_rows_by_step():
    i, value = torch.tensor([3, 0, 3, 12]), torch.tensor([1.0, 2.0, 5.0, 7.0])
    found = harness.by_step(i, {"a": value, "b": value > 4})
    assert {k: v.tolist() for k, v in found.items()} == {
        "a/00": [2], "a/03": [1, 5], "a/12": [7], "b/00": [False], "b/03": [False, True], "b/12": [True],
    }  # fmt: skip
    assert harness.Metrics(["x"]).with_steps(["a"], [0, 12]).means == ["x", "a/00", "a/12"]


@pytest.mark.parametrize("script", [grpo, tempflow_rsm])
def test_clip_fraction_of_the_steps_makes_up_that_of_all(tmp_path, script):
    flags = "--updates-per-epoch 2 --lr 1e-3 --clip-range 1e-5 --inner-epochs 2"
    more = "--profile 3,2,2 --group-size 1" if script is tempflow_rsm else ""
    rows, _ = train(script, tmp_path, "run", flags, more, REWARD)
    shares = [value for key, value in sorted(rows[1].items()) if key.startswith("clip_frac/")]
    weights = [3 / 7, 2 / 7, 2 / 7] if script is tempflow_rsm else [0.5, 0.5]
    assert len(shares) == len(weights) and 0 < rows[1]["ratio/clip_frac"] < 1
    assert sum(w * s for w, s in zip(weights, shares)) == pytest.approx(rows[1]["ratio/clip_frac"], rel=1e-6)


# ---- sizes of the learned parts -------------------------------------------------------------------------------------
class Everywhere(torch.nn.Module):
    """A learned field that is 0.25 everywhere."""

    def __init__(self, channels):
        super().__init__()
        self.value = torch.nn.Parameter(torch.tensor(0.25))

    def forward(self, x, t):
        return self.value.expand_as(x)


LEARNED = f"--lr 1e-9 --net-lr 1e-9 --reward clipscore --reward-path {ROOT / 'tiny' / 'clip'} --group-size 1"


@pytest.mark.parametrize("preset, flags, scale", [
    ("tiny", "--value-net --guidance current --temporal quad --train-fraction 1", 75.0),
    ("tiny-sd15", "--flow-net", 1.0),
])  # fmt: skip
def test_sizes_of_a_learned_guidance(tmp_path, monkeypatch, preset, flags, scale):
    monkeypatch.setattr(common, "FieldNet", Everywhere)
    rows, _ = train(first_order_rsm, tmp_path, "run", LEARNED, flags, "--epochs 1 --guidance-clip 1e-3", preset=preset)
    d = 4 * 8 * 8
    assert rows[0]["push/net"] == pytest.approx(scale * 0.25 * d**0.5, rel=1e-4)
    args = first_order_rsm.parse_args(["--preset", preset, "--steps", "4", *flags.split()])
    grid = grid_of(args.kind, 4, kernel="ode" if args.kind == "flow" else "ddim")
    eta = first_order_rsm.temporal_weight(args.temporal, grid, 0.9)[: args.train_steps]
    assert rows[0]["guidance/norm"] > 1e-3  # every g is clipped
    assert rows[0]["push/reward"] == pytest.approx(args.scale * eta.mean().item() * 1e-3, rel=1e-4)
    rows, _ = train(first_order_rsm, tmp_path, "plain", LEARNED, "--epochs 1", preset=preset)
    assert rows[0]["push/net"] == 0 < rows[0]["push/reward"]


def test_sizes_of_vmpos_learned_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "FieldNet", Everywhere)
    flags = "--lr 1e-9 --mean-lr 1e-9 --epochs 1 --beta 0.5 --mean time "
    rows, _ = train(vmpo, tmp_path, "potential", flags, f"--potential learned --reward {__name__}:constant")
    nu = grid_of("flow", 4).nu[:2]  # the two trained steps
    assert rows[0]["phi/reward"] == pytest.approx(0.3 / 0.5, rel=1e-6)
    assert rows[0]["phi/net"] == pytest.approx(nu.mean().item() * 0.25 * 0.3 / 0.5, rel=1e-4)
    clip = f"--reward clipscore --reward-path {ROOT / 'tiny' / 'clip'}"
    seen = []
    real = vmpo.reward_gradients
    monkeypatch.setattr(vmpo, "reward_gradients", lambda *a: seen.append(real(*a)) or seen[-1].clone())
    rows, _ = train(vmpo, tmp_path, "residual", flags, "--objective gradient-gfn", clip)
    assert rows[0]["phi/net"] == pytest.approx(0.25 * (4 * 8 * 8) ** 0.5, rel=1e-4)
    norms = seen[0][:, 1:3].flatten(2).norm(dim=2) / 0.5  # at the states that the two trained steps reach
    assert rows[0]["phi/reward"] == pytest.approx(norms.mean().item(), rel=1e-4)
    rows, _ = train(vmpo, tmp_path, "plain", flags)
    assert "phi/net" not in rows[0]
