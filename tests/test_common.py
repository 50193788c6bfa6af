"""common.py without a model: prompts, random numbers, averaging, logging, and every check of the flags."""

import csv
import json
import math
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torch import nn

import common
import vmpo

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")


def make_run(folder=".", rank=0, world=1, start_epoch=0):
    return common.Run(Path(folder), CPU, torch.float32, rank, world, start_epoch)


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


def test_load_prompts_text_and_json_lines_together(tmp_path):
    (tmp_path / "a.txt").write_text("a cat\n\n  a dog  \n", encoding="utf-8")
    (tmp_path / "b.jsonl").write_text('{"prompt": "a café", "tag": 3}\n\n{"prompt": "a cat"}\n', encoding="utf-8")
    prompts = common.load_prompts(f"{tmp_path / 'a.txt'},{tmp_path / 'b.jsonl'}")
    assert [p.text for p in prompts] == ["a cat", "a dog", "a café", "a cat"]
    assert [p.id for p in prompts] == [0, 1, 2, 3]  # equal texts stay two prompts
    assert prompts[0].metadata == {} and prompts[2].metadata == {"prompt": "a café", "tag": 3}


def test_load_prompts_finds_the_embedded_files_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert len(common.load_prompts("prompts/shapes_train.txt")) > 100


@pytest.mark.parametrize(
    "name,content,words",
    [
        ("x.txt", "\n  \n", ["x.txt", "empty"]),
        ("x.jsonl", "", ["x.jsonl", "empty"]),
        ("x.jsonl", '{"prompt": "a"}\n{"prompt": \n', ["x.jsonl", "line 2", "JSON"]),
        ("x.jsonl", '{"prompt": "a"}\n\n{"text": "b"}\n', ["x.jsonl", "line 3", "'prompt'"]),
        ("x.jsonl", '["prompt"]\n', ["x.jsonl", "line 1"]),
        ("x.txt", None, ["x.txt", "does not exist"]),
    ],
)
def test_load_prompts_says_what_is_wrong(tmp_path, name, content, words):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(common.UsageError) as problem:
        common.load_prompts(str(tmp_path / name))
    assert all(word in str(problem.value) for word in words) and "\n" not in str(problem.value)


def test_load_prompts_of_nothing():
    for nothing in ("", ","):
        with pytest.raises(common.UsageError, match="--prompts .*does not exist"):
            common.load_prompts(nothing)


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
    args = SimpleNamespace(num_prompts=6, group_size=2, updates_per_epoch=updates, seed=3)
    one = common.shuffled_rows(args, make_run(), steps, epoch=4, inner=0)
    assert len(one) == updates and {len(rows) for rows in one} == {12 * len(steps) // updates}
    flat = [tuple(row) for rows in one for row in rows.tolist()]
    assert len(flat) == len(set(flat)) and set(flat) == {(n, i) for n in range(12) for i in steps}
    assert flat != sorted(flat)
    for world in (2, 3, 6):
        local = 12 // world
        ranks = [common.shuffled_rows(args, make_run(rank=r, world=world), steps, 4, 0) for r in range(world)]
        for update in range(updates):
            assert all(((0 <= p[update][:, 0]) & (p[update][:, 0] < local)).all() for p in ranks)
            assert sum(len(p[update]) for p in ranks) == len(one[update])
            assert set().union(*(as_set(p[update], r * local) for r, p in enumerate(ranks))) == as_set(one[update])


def test_shuffled_rows_change_with_epoch_pass_and_seed():
    args = SimpleNamespace(num_prompts=4, group_size=4, updates_per_epoch=1, seed=0)
    base = common.shuffled_rows(args, make_run(), [0, 1], 0, 0)[0].tolist()
    assert base == common.shuffled_rows(args, make_run(), [0, 1], 0, 0)[0].tolist()
    assert base != common.shuffled_rows(args, make_run(), [0, 1], 1, 0)[0].tolist()
    assert base != common.shuffled_rows(args, make_run(), [0, 1], 0, 1)[0].tolist()
    args.seed = 1
    assert base != common.shuffled_rows(args, make_run(), [0, 1], 0, 0)[0].tolist()


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
    norm, taken = common.optimizer_step(optimizer, [param], 1.0, make_run())
    assert norm == 5 and taken and param.grad is None
    torch.testing.assert_close(param.data, torch.tensor([-0.6, -0.8, 0.0, 0.0]), rtol=0, atol=1e-5)
    param.grad = torch.tensor([0.3, 0.0, 0.0, 0.0])  # below the limit: as it is
    common.optimizer_step(optimizer, [param], 1.0, make_run())
    torch.testing.assert_close(param.data, torch.tensor([-0.9, -0.8, 0.0, 0.0]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_optimizer_step_skips_bad_gradients(bad):
    params = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2))]
    optimizer = torch.optim.AdamW(params, lr=0.1, weight_decay=0.1)
    for p in params:
        p.grad = torch.ones_like(p)
    assert common.optimizer_step(optimizer, params, 1.0, make_run())[1]
    kept, state = [p.detach().clone() for p in params], optimizer.state[params[0]]["exp_avg"].clone()
    params[0].grad, params[1].grad = torch.ones(3), torch.tensor([1.0, bad])
    norm, taken = common.optimizer_step(optimizer, params, 1.0, make_run())
    assert taken is False and not math.isfinite(norm)
    assert all(torch.equal(p, k) for p, k in zip(params, kept)) and all(p.grad is None for p in params)
    assert torch.equal(optimizer.state[params[0]]["exp_avg"], state)
    params[0].grad, params[1].grad = torch.ones(3), torch.ones(2)
    assert common.optimizer_step(optimizer, params, 1.0, make_run())[1]  # the next one is taken again
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
    dtype, reason = common.pick_dtype(name, torch.device(device))
    assert dtype == expected and reason


# ---- advantages -----------------------------------------------------------------------------------------------------
MODES = ["group", "global", "none", "rloo"]


def advantage(reward, group_size, mode, run=None):
    return common.group_advantage(torch.as_tensor(reward), group_size, mode, run or make_run())


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
    monkeypatch.setattr(common, "gather", lambda x, run: reward)
    for rank, share in enumerate(reward.split(12)):
        adv, zero = advantage(share, 4, mode, make_run(rank=rank, world=2))
        torch.testing.assert_close(adv, whole[12 * rank : 12 * rank + 12])
        assert torch.equal(zero, flags[12 * rank : 12 * rank + 12])


def test_groups_go_by_position():
    """Two prompts with one text are two groups: rewards are compared within rows of group_size only."""
    adv, _ = advantage([1.0, 2.0, 101.0, 103.0], 2, "none")
    assert adv.tolist() == [-0.5, 0.5, -1.0, 1.0]


# ---- statistics -----------------------------------------------------------------------------------------------------
def test_stats_are_means_over_all_rows_and_maxima():
    rows, stats = torch.randn(31) * 2 + 5, common.Stats(["a/mean", "b", "never"], ["top", "low"])
    for part in rows.split([10, 1, 20]):  # unequal micro-batches
        stats.add({"a/mean": part, "b": part**2})
        stats.top("top", part.max().item())
    stats.top("low", -3.0)
    found = stats.result(make_run(), std=("a/mean",))
    assert set(found) == {"a/mean", "a/std", "b", "top", "low"}  # what was never added has no value
    assert found["a/mean"] == pytest.approx(rows.mean().item(), rel=1e-5)
    assert found["a/std"] == pytest.approx(rows.std(correction=0).item(), rel=1e-5)
    assert found["b"] == pytest.approx((rows**2).mean().item(), rel=1e-5)
    assert found["top"] == rows.max().item() and found["low"] == 0


def test_stats_of_several_processes(monkeypatch):
    shares, sums = torch.randn(20).split([4, 16]), []

    def result():
        stats = common.Stats(["x/mean"], ["top"])
        stats.add({"x/mean": shares[0]})
        stats.top("top", 1.0)
        return stats.result(make_run(world=2), std=("x/mean",))

    def all_reduce(values, run, how="SUM"):
        if how == "MAX":
            return {"top": 2.5}
        sums.append(values)
        other = [len(shares[1]), shares[1].double().sum().item(), (shares[1].double() ** 2).sum().item()]
        return {key: value + other[key[1]] for key, value in values.items()}

    monkeypatch.setattr(common, "all_reduce", all_reduce)
    found, whole = result(), torch.cat(shares)
    assert found["x/mean"] == pytest.approx(whole.mean().item(), abs=1e-6) and found["top"] == 2.5
    assert found["x/std"] == pytest.approx(whole.std(correction=0).item(), rel=1e-5)


def test_stats_take_no_part_in_the_graph():
    x = torch.ones(3, requires_grad=True)
    stats = common.Stats(["x"])
    stats.add({"x": 2 * x})
    assert not stats.sums["x"][1].requires_grad


# ---- the optimiser --------------------------------------------------------------------------------------------------
def adam(**changes):
    plain = dict(lr=0.1, adam_beta1=0.9, adam_beta2=0.999, adam_eps=1e-8, weight_decay=0.01, max_grad_norm=1.0,
                 ema_decay=0.5, ema_every=2, max_bad_steps=2)  # fmt: skip
    return SimpleNamespace(**(plain | changes))


def optimiser(args, seed=0):
    gen = torch.Generator().manual_seed(seed)
    params, others = ([nn.Parameter(torch.randn(3, generator=gen)) for _ in range(2)] for _ in range(2))
    return common.Optimiser(args, make_run(), params, (others, 0.01, 5.0)), params, others


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


# ---- the recorder ---------------------------------------------------------------------------------------------------
class Failure(Exception):
    pass


@pytest.fixture
def recorder(tmp_path, monkeypatch):
    """Recorder of a run without a model: theta is one weight, the exported LoRA a text file of its value."""
    args = adam(ema_decay=0.5, ema_every=1, resume="", epochs=3, eval_images=4, eval_every=1, sample_every=0,
                save_every=9, wandb=None)  # fmt: skip
    run = make_run(tmp_path)
    run.method = "grpo"
    (tmp_path / "checkpoints").mkdir()
    theta = nn.Parameter(torch.zeros(2))
    opt = common.Optimiser(args, run, [theta])
    policy = SimpleNamespace(network_calls=0)
    reward = SimpleNamespace(terms=[SimpleNamespace(name="shapes")])
    copy = lambda policy, folder: (folder / "lora.txt").write_text(str(theta.tolist()))  # noqa: E731
    monkeypatch.setattr(common, "export_lora", copy)
    made = common.Recorder(run, args, policy, opt, reward, None, Failure, ["loss"], {"lag": common.EMA([theta], 0.0)})
    return SimpleNamespace(made=made, args=args, theta=theta, opt=opt, run=run)


def one_epoch(parts, epoch):
    for _ in range(3):
        parts.made.phase()
    parts.opt.backward((parts.theta - 5).square().sum())
    parts.opt.step()
    parts.made.end_epoch(epoch, torch.tensor([1.0, 2.0]), {"shapes": torch.tensor([1.0, 2.0])}, {"loss": 0.5})


def test_a_reward_failing_in_an_evaluation_keeps_the_policys_own_weights(recorder, monkeypatch):
    """The evaluation runs with the averaged weights; the checkpoint it leaves behind must hold theta itself."""
    seen = []

    def held_out(policy, args, run, reward, more):
        seen.append(recorder.theta.detach().clone())
        if len(seen) > 1:
            raise Failure("server gone")
        return {"reward": torch.ones(4)}

    monkeypatch.setattr(common, "score_held_out", held_out)
    recorder.args.eval_prompt_list = numbered(4)
    epochs = recorder.made.epochs()
    next(epochs)
    with pytest.raises(SystemExit, match="grpo.py: stopped after epoch 1: server gone"):
        one_epoch(recorder, 0)
    own, averaged = recorder.theta.detach(), recorder.opt.ema.shadow[0]
    assert not torch.equal(own, averaged)
    assert torch.equal(seen[1], averaged)  # what was evaluated
    folder = recorder.run.dir / "checkpoints" / "last"
    kept = torch.load(folder / "state.pt", weights_only=True)
    assert kept["epoch"] == 1 and set(kept) == {"theta", "lag", "epoch"}
    assert torch.equal(kept["theta"]["lora"][0], own) and torch.equal(kept["theta"]["ema"]["shadow"][0], averaged)
    assert (folder / "lora.txt").read_text() == str(averaged.tolist())  # what is exported, as ever
    assert [row["epoch"] for row in recorder.made.logger.rows()] == [0, 1]


def test_a_failing_reward_before_the_first_epoch_leaves_no_checkpoint(recorder, monkeypatch):
    def held_out(*a):
        raise Failure("no server")

    monkeypatch.setattr(common, "score_held_out", held_out)
    with pytest.raises(SystemExit, match="stopped after epoch 0: no server"):
        next(recorder.made.epochs())
    assert not list((recorder.run.dir / "checkpoints").iterdir())


def test_a_failing_reward_in_a_rollout_keeps_the_epochs_before(recorder, monkeypatch):
    recorder.args.eval_images = 0
    epochs = recorder.made.epochs()
    next(epochs)
    one_epoch(recorder, 0)
    next(epochs)
    with pytest.raises(SystemExit, match="stopped after epoch 1: bad image"), recorder.made.scoring(1):
        raise Failure("bad image")
    assert common.load(recorder.run.dir)["epoch"] == 1
    with pytest.raises(ZeroDivisionError), recorder.made.scoring(1):  # anything else is a bug and shows itself
        raise ZeroDivisionError


# ---- logs and pictures ----------------------------------------------------------------------------------------------
def read(path):
    with path.open(newline="") as f:
        return list(csv.reader(f))


def test_logger_columns_are_fixed_and_a_resumed_run_drops_what_came_after_its_checkpoint(tmp_path):
    args = SimpleNamespace(wandb=None)
    logger = common.Logger(make_run(tmp_path), args, ["a", "b"])
    logger.log(0, {"b": 0.5})
    for epoch in (1, 2, 3):
        logger.log(epoch, {"a": epoch / 4, "b": -epoch})
    with pytest.raises(KeyError, match="typo"):
        logger.log(4, {"a": 1.0, "typo": 2.0})
    logger.close()
    table = tmp_path / "metrics.csv"
    assert read(table) == [
        ["epoch", "a", "b"],
        ["0", "", "0.5"],
        ["1", "0.25", "-1"],
        ["2", "0.5", "-2"],
        ["3", "0.75", "-3"],
    ]
    logger = common.Logger(make_run(tmp_path, start_epoch=2), args, ["a", "b"])
    logger.log(3, {"a": 9.0, "b": 9.0})
    logger.close()
    assert read(table)[-2:] == [["2", "0.5", "-2"], ["3", "9.0", "9.0"]] and len(read(table)) == 5
    assert logger.rows()[0] == {"epoch": 0.0, "b": 0.5} and logger.rows()[-1] == {"epoch": 3.0, "a": 9.0, "b": 9.0}
    assert list(tmp_path.glob("events.out.tfevents*"))


def test_logger_of_another_process_writes_nothing(tmp_path):
    logger = common.Logger(make_run(tmp_path, rank=1, world=2), SimpleNamespace(wandb=None), ["a"])
    logger.log(1, {"a": 1.0})
    logger.close()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("pixels,side", [(32, 96), (128, 128), (512, 256)])
def test_image_grid_has_a_tile_per_image(tmp_path, pixels, side):
    images = torch.zeros(5, 3, pixels, pixels)
    images[:, 0], images[4, 2] = 1.0, 1.0  # red; the fifth magenta
    common.image_grid(images, [f"a caption of many words {n}" for n in range(5)], tmp_path / "grid.png", columns=3)
    with Image.open(tmp_path / "grid.png") as sheet:
        assert sheet.format == "PNG" and sheet.size == (3 * (side + 14), 2 * (side + 40))
        centre = side // 2
        assert sheet.getpixel((centre, 30 + centre)) == (255, 0, 0)
        assert sheet.getpixel((side + 14 + centre, side + 70 + centre)) == (255, 0, 255)
        assert sheet.getpixel((2 * (side + 14) + centre, side + 70 + centre)) == (255, 255, 255)  # no sixth image
    assert [p.name for p in tmp_path.iterdir()] == ["grid.png"]


def test_image_grid_of_pairs(tmp_path):
    images = torch.zeros(4, 3, 32, 32)
    images[1::2] = 1.0  # before black, after white
    common.image_grid(images, ["a", "b"], tmp_path / "pairs.png", columns=2, pairs=True)
    with Image.open(tmp_path / "pairs.png") as sheet:
        assert sheet.size == (2 * (2 * 100 + 10), 96 + 40)
        assert sheet.getpixel((48, 78)) == (0, 0, 0) and sheet.getpixel((100 + 48, 78)) == (255, 255, 255)
        assert sheet.getpixel((210 + 48, 78)) == (0, 0, 0)
    both = [(0.0, 1.0), (0.5, 0.25)]
    common.image_grid(images, ["a", "b"], tmp_path / "pairs.png", columns=2, pairs=True, scores=both)
    with Image.open(tmp_path / "pairs.png") as sheet:
        assert sheet.size == (2 * (2 * 100 + 10), 96 + 54)
        rose, fell = sheet.getpixel((1, 60)), sheet.getpixel((211, 60))  # the frames
        assert rose[1] > max(rose[0], rose[2]) and fell[0] > max(fell[1:])


# ---- models ---------------------------------------------------------------------------------------------------------
def test_find_model_knows_its_names_and_folders(tmp_path):
    assert common.find_model("sd15") == ("stable-diffusion-v1-5/stable-diffusion-v1-5", "eps")
    assert common.find_model("tiny-sd35")[1] == "flow"
    for cls, kind in common.PIPELINES.items():
        (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": cls}))
        assert common.find_model(str(tmp_path)) == (str(tmp_path), kind)


@pytest.mark.parametrize(
    "name,words",
    [
        ("sd16", ["sd16", "tiny-sd35", "owner/name"]),
        ("./sd/16", ["./sd/16"]),
        ("/no/folder", ["/no/folder"]),
        ("nobody/nothing", ["nobody/nothing", "HF_HUB_OFFLINE", "--preset tiny"]),
    ],
)
def test_find_model_of_an_unknown_name(name, words, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(common.UsageError) as problem:
        common.find_model(name)
    assert all(word in str(problem.value) for word in words)


def test_find_model_of_an_unsuitable_folder(tmp_path):
    with pytest.raises(common.UsageError, match="without model_index.json"):
        common.find_model(str(tmp_path))
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline"}))
    with pytest.raises(common.UsageError, match="FluxPipeline; supported are StableDiffusionPipeline"):
        common.find_model(str(tmp_path))


# ---- flags ----------------------------------------------------------------------------------------------------------
def refused(capsys, *flags, preset="tiny"):
    """The one sentence with which vmpo.py ends (exit code 2) before anything is loaded."""
    with pytest.raises(SystemExit) as stop:
        vmpo.parse_args(["--preset", preset, *map(str, flags)])
    assert stop.value.code == 2
    *usage, message = capsys.readouterr().err.splitlines()
    assert message.startswith("vmpo.py: error: ") and all(not line.startswith("vmpo.py") for line in usage)
    return message


@pytest.fixture(autouse=True)
def started_as_vmpo(monkeypatch):
    monkeypatch.setattr("sys.argv", ["vmpo.py"])
    monkeypatch.delenv("WORLD_SIZE", raising=False)


REFUSED = [
    ("--steps 1", ["--steps 1", "at least 2"]),
    ("--group-size 1", ["--mean group", "--group-size is 1"]),
    ("--group-size 0", ["--group-size 0", "1 or more"]),
    ("--num-prompts 0", ["--num-prompts 0"]),
    ("--epochs 0", ["--epochs 0"]),
    ("--micro-batch-size -1", ["--micro-batch-size -1"]),
    (
        "--updates-per-epoch 5 --num-prompts 8 --group-size 8 --steps 10",
        ["--updates-per-epoch 5", "384 transitions", "use 8"],
    ),
    ("--kernel ddim", ["--kernel ddim", "flow_sde, dance"]),
    ("--kernel flow_sde --model tiny-sd15", ["--kernel flow_sde", "ddim, ancestral"]),
    ("--kernel euler", ["--kernel", "euler"]),
    ("--kernel ode", ["--kernel ode", "deterministic"]),
    ("--noise-level 0", ["--noise-level 0", "above 0"]),
    ("--noise-level -0.5", ["--noise-level -0.5", "above 0"]),
    ("--noise-level nan", ["--noise-level nan"]),
    ("--noise-level 1.5 --model tiny-sd15", ["--noise-level 1.5", "ddim", "at most 1"]),
    ("--noise-level 1.5 --kernel cps", ["--noise-level 1.5", "cps"]),
    ("--train-fraction 0 --steps 10", ["--train-fraction 0", "1 to 10"]),
    ("--train-fraction nan --steps 10", ["--train-fraction nan", "1 to 10"]),
    ("--cfg nan", ["--cfg nan", "finite"]),
    ("--lr inf", ["--lr inf", "finite"]),
    ("--train-fraction 1.2 --steps 10", ["--train-fraction 1.2", "1 to 10"]),
    ("--prompts=", ["--prompts", "does not exist"]),
    ("--prompts nowhere.txt", ["--prompts nowhere.txt", "does not exist"]),
    ("--preset nothing", ["--preset nothing", "sd15-hpsv2"]),
    ("--model sd16", ["--model sd16", "sd3.5-medium"]),
    ("--model nobody/nothing", ["nobody/nothing", "HF_HUB_OFFLINE"]),
    ("--beta 0", ["--beta 0", "above 0"]),
    ("--beta nan", ["--beta nan"]),
    ("--lr 0", ["--lr 0", "above 0"]),
    ("--ema-decay 1", ["--ema-decay 1", "[0, 1)"]),
    ("--objective mc --mean time", ["--objective mc", "--mean time", "group or batch"]),
    ("--objective ppo --mean time_prompt", ["--objective ppo", "--mean time_prompt"]),
    ("--no-such-flag 3", ["--no-such-flag"]),
]


@pytest.mark.parametrize("flags,words", REFUSED)
def test_wrong_flags_end_in_one_sentence(flags, words, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    message = refused(capsys, *flags.split())
    assert all(word in message for word in words), message


def test_empty_prompt_file_is_refused(capsys, tmp_path):
    (tmp_path / "none.txt").write_text("\n")
    assert "is empty" in refused(capsys, "--prompts", tmp_path / "none.txt")


WORLDS = [(3, ["3 processes", "use 2 processes or --num-prompts 9"]), (16, ["use 8", "16"])]


@pytest.mark.parametrize("world,words", WORLDS)
def test_processes_must_divide_the_prompts(world, words, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", str(world))
    message = refused(capsys, "--num-prompts", 8)
    assert all(word in message for word in words), message


def test_runs_folder_must_be_writable(capsys, tmp_path):
    (tmp_path / "file").write_text("x")  # below a regular file, where root cannot write either
    message = refused(capsys, "--runs", tmp_path / "file" / "runs")
    assert "--runs" in message and "not a writable folder" in message


def check_only(monkeypatch, *flags):
    """parse_args without the model and the reward."""
    monkeypatch.setattr(common, "check_model", lambda args: None)
    monkeypatch.setattr(vmpo.rewards, "check", lambda *a: None)
    return vmpo.parse_args([*map(str, flags)])


def saved_run(folder, args, method="vmpo", complete=True):
    """A run folder as setup() and save() leave it."""
    skip = {"prompt_list", "eval_prompt_list", "argv", "changed", "run_dir", "resume", "dry_run"}
    plain = {k: v for k, v in vars(args).items() if k not in skip}
    (folder / "checkpoints" / "last").mkdir(parents=True)
    (folder / "args.json").write_text(json.dumps({"method": method, "args": plain}))
    if complete:
        (folder / "checkpoints" / "last" / "state.pt").write_bytes(b"")
    return folder


def resume_refused(capsys, folder, *flags):
    with pytest.raises(SystemExit) as stop:
        vmpo.parse_args(["--resume", str(folder), *map(str, flags)])
    assert stop.value.code == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("vmpo.py: error: ")
    return message


def test_resume_takes_the_runs_own_flags(tmp_path, monkeypatch):
    args = check_only(monkeypatch, "--preset", "tiny", "--lr", 1e-3, "--epochs", 7)
    folder = saved_run(tmp_path / "run", args)
    again = check_only(monkeypatch, "--resume", folder)
    assert again.lr == 1e-3 and again.epochs == 7 and again.model == "tiny-sd35" and again.resume == str(folder)
    changed = check_only(monkeypatch, "--resume", folder, "--epochs", 9, "--micro-batch-size", 3, "--lr", 1e-3)
    assert changed.epochs == 9 and changed.micro_batch_size == 3
    drop = dict.fromkeys(("argv", "changed", "resume"))
    assert vars(args) | drop == vars(again) | drop


def test_resume_of_something_else_is_refused(capsys, tmp_path, monkeypatch):
    args = check_only(monkeypatch, "--preset", "tiny")
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "empty", tmp_path / "nowhere"):
        assert "is not a run folder" in resume_refused(capsys, folder)
    message = resume_refused(capsys, saved_run(tmp_path / "other", args, method="grpo"))
    assert "a run of grpo.py, not of vmpo.py" in message
    message = resume_refused(capsys, saved_run(tmp_path / "early", args, complete=False))
    assert "no complete checkpoint" in message
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "args.json").write_text('{"method": ')
    assert "is not a run folder" in resume_refused(capsys, tmp_path / "torn")


@pytest.mark.parametrize("flag,value", [("--lr", 0.5), ("--num-prompts", 60), ("--beta", 7.5), ("--model", "sd15")])
def test_resume_with_another_mathematics_is_refused(flag, value, capsys, tmp_path, monkeypatch):
    folder = saved_run(tmp_path / "run", check_only(monkeypatch, "--preset", "tiny"))
    message = resume_refused(capsys, folder, flag, value)
    assert f"{flag} {value} differs from the resumed run's" in message and f"leave {flag} out" in message


def test_defaults_then_preset_then_flags(monkeypatch):
    args = check_only(monkeypatch, "--preset", "tiny", "--steps", 10, "--lr", 0.0123)
    assert args.lr == 0.0123 and args.group_size == vmpo.PRESETS["tiny"]["group_size"] and args.adam_beta1 == 0.9
    assert args.changed == {"lr": [vmpo.PRESETS["tiny"]["lr"], 0.0123]}
    assert (args.kernel, args.noise_level, args.kind, args.train_steps) == ("flow_sde", 0.7, "flow", 6)
    args = check_only(monkeypatch, "--preset", "tiny-sd15", "--steps", 10)
    assert (args.kernel, args.noise_level, args.kind, args.train_steps) == ("ddim", 1.0, "eps", 7)
