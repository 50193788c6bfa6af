"""common.py without a model: prompts, random numbers, transitions, averaging, advantages, the optimiser."""

import math
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import common
import harness

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")


def make_run(folder=".", rank=0, world=1, start_epoch=0):
    return harness.Run(Path(folder), CPU, torch.float32, rank, world, start_epoch)


def numbered(count):
    return [common.Prompt(i, f"prompt {i}") for i in range(count)]


# ---- prompts --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("count,n", [(7, 3), (5, 5), (3, 8), (100, 1)])
def test_prompt_batch_is_a_stream_of_whole_passes(count, n):
    """Cut at any epoch, the stream goes on as it would have; every pass holds every prompt once."""
    prompts = numbered(count)
    epochs = 4 * count
    stream = [p.id for e in range(epochs) for p in common.prompt_batch(prompts, e, 5, n)]
    assert Counter(stream) == dict.fromkeys(range(count), 4 * n)
    laps = [stream[k : k + count] for k in range(0, len(stream), count)]
    assert all(sorted(lap) == list(range(count)) for lap in laps)
    if count > 5:
        assert laps[0] != laps[1] and laps[0] != sorted(laps[0])  # shuffled anew
    for e in (0, 1, epochs - 1, 1):  # in any order, again and again
        assert [p.id for p in common.prompt_batch(prompts, e, 5, n)] == stream[e * n : (e + 1) * n]


def test_prompt_batch_depends_on_the_seed():
    prompts = numbered(50)
    assert common.prompt_batch(prompts, 0, 0, 50) != common.prompt_batch(prompts, 0, 1, 50)


# ---- random numbers -------------------------------------------------------------------------------------------------
def test_sample_noise_is_a_function_of_seed_epoch_and_index():
    shape = (2, 3, 3)
    whole = common.sample_noise(3, 7, range(10), 4, shape, CPU)
    assert whole.shape == (10, 5, 2, 3, 3) and whole.dtype == torch.float32
    for cuts in ([0, 5, 10], [0, 1, 2, 9, 10], list(range(11))):
        parts = [common.sample_noise(3, 7, range(a, b), 4, shape, CPU) for a, b in zip(cuts[:-1], cuts[1:])]
        assert torch.equal(torch.cat(parts), whole)
    assert torch.equal(common.sample_noise(3, 7, [8, 2], 4, shape, CPU), whole[[8, 2]])
    for seed, epoch in ((4, 7), (3, 8), (7, 3)):
        assert (common.sample_noise(seed, epoch, range(10), 4, shape, CPU) != whole).all()
    torch.manual_seed(0)
    state = torch.get_rng_state()
    assert torch.equal(common.sample_noise(3, 7, range(2), 4, shape, CPU), whole[:2])
    assert torch.equal(torch.get_rng_state(), state)  # the global generator is not touched


def test_sample_noise_is_standard_normal_and_independent():
    x = common.sample_noise(0, 0, range(64), 3, (4, 8, 8), CPU).double()
    n = x.numel()
    assert abs(x.mean()) < 4 / n**0.5 and abs(x.var() - 1) < 4 * (2 / n) ** 0.5
    assert abs((x**4).mean() - 3) < 4 * (96 / n) ** 0.5
    rows = x.flatten(1)
    correlation = (rows @ rows.T / rows.shape[1]).fill_diagonal_(0)
    assert correlation.abs().max() < 6 / rows.shape[1] ** 0.5
    steps = x.transpose(0, 1).flatten(1)
    assert (steps @ steps.T / steps.shape[1]).fill_diagonal_(0).abs().max() < 5 / steps.shape[1] ** 0.5


def test_generators_of_different_keys_differ():
    keys = [("noise", 1, 23), ("noise", 12, 3), ("noise", 123), ("noise", -1, 23), ("prompts", 1, 23)]
    keys += [("noise", 1, 2, 3), ("noise", 3, 2, 1), ("noise", 2, 1, 3), ("shuffle", 1, 2, 3)]
    keys += [("noise", "held-out", 1), ("noise", 1, "held-out")]
    keys += [("noise", s, e, i) for s in range(5) for e in range(10) for i in range(20) if (s, e, i) != (1, 2, 3)]
    keys = [k for n, k in enumerate(keys) if k not in keys[:n]]
    firsts = {torch.randn(4, generator=common.generator(*k)).sum().item() for k in keys}
    assert len(firsts) == len(keys)
    a, b = (torch.randn(9, generator=common.generator("noise", 1, 2)) for _ in range(2))
    assert torch.equal(a, b)


# ---- transitions ----------------------------------------------------------------------------------------------------
def as_set(rows, first=0):
    return {(n + first, i) for n, i in rows.tolist()}


@pytest.mark.parametrize("updates", [1, 2, 3])
@pytest.mark.parametrize("steps", [[0, 1, 2], [1, 4, 5, 8]])
def test_shuffled_rows_are_a_partition_and_the_same_for_any_number_of_processes(updates, steps):
    key = 3, 4, 0  # seed, epoch, pass
    one = common.shuffled_rows(range(12), 12, steps, updates, *key)
    assert len(one) == updates and {len(rows) for rows in one} == {12 * len(steps) // updates}
    flat = [tuple(row) for rows in one for row in rows.tolist()]
    assert len(flat) == len(set(flat)) and set(flat) == {(n, i) for n in range(12) for i in steps}
    assert flat != sorted(flat)
    for world in (2, 3, 6):
        local = 12 // world
        shares = [range(r * local, (r + 1) * local) for r in range(world)]
        ranks = [common.shuffled_rows(mine, 12, steps, updates, *key) for mine in shares]
        for update in range(updates):
            assert all(((0 <= p[update][:, 0]) & (p[update][:, 0] < local)).all() for p in ranks)
            assert sum(len(p[update]) for p in ranks) == len(one[update])
            assert set().union(*(as_set(p[update], r * local) for r, p in enumerate(ranks))) == as_set(one[update])


@pytest.mark.parametrize("updates", [2, 3, 5])
@pytest.mark.parametrize("samples, steps, world", [(24, [0, 1, 2, 5], 8), (48, [0], 6), (30, [3, 4, 6], 3)])
def test_shuffled_rows_are_shared_out_evenly_among_the_processes(samples, steps, world, updates):
    local = samples // world
    for epoch in range(20):
        shares = [range(r * local, (r + 1) * local) for r in range(world)]
        counts = [[len(p) for p in common.shuffled_rows(mine, samples, steps, updates, 7, epoch)] for mine in shares]
        even = local * len(steps) / updates
        assert all(abs(n - even) < 2 for each in counts for n in each)
        whole = [sum(each) for each in zip(*counts)]
        assert sum(whole) == samples * len(steps) and max(whole) - min(whole) <= 1


def test_shuffled_rows_give_each_transition_to_each_update_as_often():
    seen, epochs = torch.zeros(3, 5, 2), 3000  # updates, samples, steps
    for epoch in range(epochs):
        for update, rows in enumerate(common.shuffled_rows(range(5), 5, [0, 1], 3, 1, epoch)):
            seen[update, rows[:, 0], rows[:, 1]] += 1
    expected = epochs / 3
    assert ((seen - expected).abs() < 5 * (expected * 2 / 3) ** 0.5).all()


def test_shuffled_rows_change_with_epoch_pass_and_seed():
    def rows(seed, epoch, inner):
        return common.shuffled_rows(range(16), 16, [0, 1], 1, seed, epoch, inner)[0].tolist()

    base = rows(0, 0, 0)
    assert base == rows(0, 0, 0)
    assert base != rows(0, 1, 0)
    assert base != rows(0, 0, 1)
    assert base != rows(1, 0, 0)


# ---- weights --------------------------------------------------------------------------------------------------------
def test_ema_averages_and_restores():
    param = nn.Parameter(torch.tensor([1.0, -2.0]))
    ema = common.EMA([param], 0.75)
    values, expected = [torch.tensor([3.0, 4.0]), torch.tensor([-1.0, 0.5])], torch.tensor([1.0, -2.0])
    for value in values:
        param.data.copy_(value)
        ema.update()
        expected = 0.75 * expected + 0.25 * value
    param.data.copy_(torch.tensor([0.1, 0.2]))
    before = param.detach().clone()
    with ema.applied():
        torch.testing.assert_close(param.data, expected)
        assert torch.is_grad_enabled() and param.requires_grad
    assert torch.equal(param, before)
    with pytest.raises(RuntimeError), ema.applied():
        raise RuntimeError
    assert torch.equal(param, before)
    torch.testing.assert_close(ema.shadow[0], expected)


def test_optimizer_step_clips():
    param = nn.Parameter(torch.zeros(4))
    optimizer = torch.optim.SGD([param], lr=1.0)
    param.grad = torch.tensor([3.0, 4.0, 0.0, 0.0])
    norm, taken = common.optimizer_step(optimizer, [param], 1.0)
    assert norm == 5 and taken and param.grad is None
    torch.testing.assert_close(param.data, torch.tensor([-0.6, -0.8, 0.0, 0.0]), rtol=0, atol=1e-5)
    param.grad = torch.tensor([0.3, 0.0, 0.0, 0.0])  # below the limit: as it is
    common.optimizer_step(optimizer, [param], 1.0)
    torch.testing.assert_close(param.data, torch.tensor([-0.9, -0.8, 0.0, 0.0]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_optimizer_step_skips_bad_gradients(bad):
    params = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2))]
    optimizer = torch.optim.AdamW(params, lr=0.1, weight_decay=0.1)
    for p in params:
        p.grad = torch.ones_like(p)
    assert common.optimizer_step(optimizer, params, 1.0)[1]
    kept, state = [p.detach().clone() for p in params], optimizer.state[params[0]]["exp_avg"].clone()
    params[0].grad, params[1].grad = torch.ones(3), torch.tensor([1.0, bad])
    norm, taken = common.optimizer_step(optimizer, params, 1.0)
    assert taken is False and not math.isfinite(norm)
    assert all(torch.equal(p, k) for p, k in zip(params, kept)) and all(p.grad is None for p in params)
    assert torch.equal(optimizer.state[params[0]]["exp_avg"], state)
    params[0].grad, params[1].grad = torch.ones(3), torch.ones(2)
    assert common.optimizer_step(optimizer, params, 1.0)[1]  # the next one is taken again
    assert not torch.equal(params[0], kept[0])


def test_reduce_latent():
    x = torch.arange(24.0).view(2, 3, 2, 2)
    assert common.reduce_latent(x, "sum").tolist() == [66.0, 210.0]
    assert common.reduce_latent(x, "mean").tolist() == [5.5, 17.5]


@pytest.mark.parametrize(
    "name,device,bf16,expected",
    [
        ("auto", "cpu", True, torch.float32),
        ("auto", "cuda", True, torch.bfloat16),
        ("auto", "cuda", False, torch.float16),
        ("float16", "cpu", False, torch.float16),
        ("float32", "cuda", True, torch.float32),
    ],
)
def test_pick_dtype(name, device, bf16, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *a: bf16)
    dtype, reason = harness.pick_dtype(name, torch.device(device))
    assert dtype == expected and reason


# ---- advantages -----------------------------------------------------------------------------------------------------
MODES = ["group", "global", "none", "rloo"]


def advantage(reward, group_size, mode):
    return common.group_advantage(torch.as_tensor(reward), group_size, mode)


@pytest.mark.parametrize("size", [2, 3, 8])
def test_group_advantage_is_the_printed_formula(size):
    reward = torch.randn(6 * size) * 3 + 7
    r = reward.double().view(6, size)
    mean, n = r.mean(1, keepdim=True), size
    others = torch.stack([(r.sum(1) - r[:, j]) / (n - 1) for j in range(n)], 1)
    truth = {
        "group": (r - mean) / (((r - mean) ** 2).mean(1, keepdim=True).sqrt() + 1e-4),
        "global": (r - mean) / (((r - r.mean()) ** 2).mean().sqrt() + 1e-4), "none": r - mean, "rloo": r - others,
        "raw": r,
    }  # fmt: skip
    for mode, expected in truth.items():
        adv, zero = advantage(reward, size, mode)
        assert adv.dtype == torch.float32 and adv.shape == reward.shape and not zero.any()
        torch.testing.assert_close(adv.double(), expected.flatten(), rtol=1e-5, atol=1e-6)
        if mode != "raw":  # G20
            assert adv.view(6, size).sum(1).abs().max() < 1e-5
    centred, rloo = (advantage(reward, size, mode)[0] for mode in ("none", "rloo"))
    torch.testing.assert_close(rloo, centred * size / (size - 1))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("value", [0.0, 0.1, 1 / 3, -1e6])
def test_a_group_of_equal_rewards_has_no_advantage(mode, value):
    """Exactly 0, however the mean is rounded; and only that group."""
    reward = torch.tensor([value] * 7 + [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0])
    adv, zero = advantage(reward, 7, mode)
    assert (adv[:7] == 0).all() and adv[7:].abs().max() > 0 and torch.isfinite(adv).all()
    assert zero.tolist() == [True] * 7 + [False] * 7
    adv, zero = advantage(reward[:7], 7, mode)  # nothing else in the epoch
    assert (adv == 0).all() and zero.all()


def test_small_differences_of_large_rewards_are_not_lost():
    adv, zero = advantage(torch.tensor([1000.0, 1000.0001, 1000.0, 1000.0001]), 4, "none")
    assert not zero.any() and adv[1] > 0 > adv[0]


@pytest.mark.parametrize("mode", [*MODES, "raw"])
def test_group_advantage_of_a_share_is_that_of_the_whole_epoch(mode, monkeypatch):
    """Groups lie within a process; the standard deviation of --adv-norm global is over all processes."""
    reward = torch.randn(24) * torch.tensor([1.0] * 12 + [30.0] * 12)
    whole, flags = advantage(reward, 4, mode)
    monkeypatch.setattr(common, "gather", lambda x: reward)
    for rank, share in enumerate(reward.split(12)):
        adv, zero = advantage(share, 4, mode)
        torch.testing.assert_close(adv, whole[12 * rank : 12 * rank + 12])
        assert torch.equal(zero, flags[12 * rank : 12 * rank + 12])


def test_groups_go_by_position():
    """Two prompts with one text are two groups: rewards are compared within rows of group_size only."""
    adv, _ = advantage([1.0, 2.0, 101.0, 103.0], 2, "none")
    assert adv.tolist() == [-0.5, 0.5, -1.0, 1.0]


# ---- the optimiser --------------------------------------------------------------------------------------------------
def adam(**changes):
    plain = dict(lr=0.1, adam_beta1=0.9, adam_beta2=0.999, adam_eps=1e-8, weight_decay=0.01, max_grad_norm=1.0,
                 ema_decay=0.5, ema_every=2, ema_warmup=False, ema_repeats=1, max_bad_steps=2)  # fmt: skip
    return SimpleNamespace(**(plain | changes))


def optimiser(args, seed=0):
    gen = torch.Generator().manual_seed(seed)
    params, others = ([nn.Parameter(torch.randn(3, generator=gen)) for _ in range(2)] for _ in range(2))
    return harness.make_optimiser(args, make_run(), params, (others, 0.01, 5.0)), params, others


def descend(opt, params, others, steps):
    for n in range(steps):
        opt.backward(sum(((p - n) ** 2).sum() for p in params) + sum((p**4).sum() for p in others))
        opt.step()


def test_optimiser_continues_from_its_state_bit_by_bit(tmp_path):
    whole, part = optimiser(adam()), optimiser(adam())
    descend(*whole, 4), descend(*part, 4)
    torch.save(part[0].state_dict(), tmp_path / "state.pt")
    again = optimiser(adam(), seed=9)
    kept = [p.detach().clone() for p in part[2]]
    for p, k in zip(again[2], kept):  # a method keeps its other weights itself (Recorder's modules)
        p.data.copy_(k)
    again[0].load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    descend(*whole, 5), descend(*again, 5)
    for a, b in zip(
        [*whole[1], *whole[2], *whole[0].ema.shadow], [*again[1], *again[2], *again[0].ema.shadow], strict=True
    ):
        assert torch.equal(a, b)
    assert again[0].steps == whole[0].steps == 9


def test_optimiser_averages_every_so_many_steps_and_lends_the_average():
    opt, params, others = optimiser(adam(ema_every=3))
    start = [p.detach().clone() for p in params]
    descend(opt, params, others, 2)
    assert all(torch.equal(s, k) for s, k in zip(opt.ema.shadow, start))
    descend(opt, params, others, 1)
    now = [p.detach().clone() for p in params]
    expected = [0.5 * k + 0.5 * p for k, p in zip(start, now)]
    with opt.averaged():
        for p, e in zip(params, expected):
            torch.testing.assert_close(p.data, e)
    assert all(torch.equal(p, n) for p, n in zip(params, now))
    none, params, _ = optimiser(adam(ema_decay=0.0))
    with none.averaged():
        assert none.ema is None


def test_optimiser_clips_each_part_by_its_own_norm_and_reports_the_norms_before():
    opt, params, others = optimiser(adam())
    opt.backward(sum((30 * p).sum() for p in params) + sum((2 * p).sum() for p in others))
    assert opt.step() == pytest.approx([30 * 6**0.5, 2 * 6**0.5], rel=1e-5)


def test_optimiser_stops_after_too_many_bad_steps_and_counts_from_the_last_good_one():
    opt, params, others = optimiser(adam(max_bad_steps=2))
    before = [p.detach().clone() for p in params]

    def bad():
        opt.backward(sum((p * math.nan).sum() for p in [*params, *others]))
        opt.step()

    bad(), bad()
    assert opt.bad_steps == 2 and all(torch.equal(p, b) for p, b in zip(params, before))
    assert all(torch.equal(s, b) for s, b in zip(opt.ema.shadow, before))
    descend(opt, params, others, 1)
    assert opt.bad_steps == 0
    bad(), bad()
    with pytest.raises(SystemExit, match="3 updates in a row"):
        bad()
