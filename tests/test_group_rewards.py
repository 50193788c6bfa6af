"""Rewards that compare a prompt's images, and sums of which each reward is scaled by itself, in the trainers."""

import csv
import math
from pathlib import Path

import pytest
import torch

import awm
import common
import first_order_rsm
import grpo
import rewards
import tempflow_rsm
import vmpo

SCRIPTS = {s.__name__: s for s in (vmpo, awm, grpo, tempflow_rsm, first_order_rsm)}
SMALL = "--preset tiny --num-prompts 2 --group-size 3 --steps 2 --epochs 1 --sample-every 0".split()
REWARDS = """
import torch
calls = []
def best(images, prompts, metadata):
    calls.append(list(prompts))
    b = images.mean((1, 2, 3))
    return (b[:, None] > b[None]).float().sum(1) / (len(b) - 1)
best.grouped = True
def bright(images, prompts, metadata):
    return images.mean((1, 2, 3))
def loud(images, prompts, metadata):
    return 1000 * images[:, 0].mean((1, 2))
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    name = f"grouped_{abs(hash(tmp_path))}"
    (tmp_path / f"{name}.py").write_text(REWARDS)
    monkeypatch.syspath_prepend(str(tmp_path))
    return name, ["--runs", str(tmp_path)]


def train(method, *flags):
    args = SCRIPTS[method].parse_args([*SMALL, *flags])
    SCRIPTS[method].main(args)
    with (Path(args.run_dir) / "metrics.csv").open(newline="") as f:
        return list(csv.DictReader(f))


@pytest.mark.parametrize("method, flags", [
    ("grpo", ["--reward-batch-size", "2", "--decode-batch-size", "4"]), ("awm", []),
    ("vmpo", ["--potential", "diff", "--mean", "group"]),
])  # fmt: skip
def test_a_grouped_reward_sees_whole_prompts_only(method, flags, own):
    name, runs = own
    rows = train(method, "--reward", f"{name}:best", "--eval-rewards", "shapes", "--eval-images", "2", *runs, *flags)
    calls = vars(__import__(name))["calls"]
    assert all(len(prompts) == 3 and len(set(prompts)) == 1 for prompts in calls) and len(calls) >= 2
    assert 0 < float(rows[1]["reward/mean"]) <= 0.5 and float(rows[1]["grad/norm"]) > 0
    assert rows[0]["eval/reward"] == rows[0]["eval/shapes"] and f"eval/{name}:best" not in rows[0]


@pytest.mark.parametrize("method, flags, words", [
    ("grpo", ["--eval-images", "4", "--eval-rewards", ""], "says nothing of one held-out image"),
    ("grpo", ["--eval-images", "0", "--group-size", "1", "--adv-norm", "raw"], "compares the images of a prompt"),
    ("vmpo", ["--diff-reward", "train", "--potential", "diff", "--mean", "time_prompt"], "gradients take them singly"),
    ("tempflow_rsm", [], "not the children of a state"),
])  # fmt: skip
def test_where_it_cannot_be(method, flags, words, own, capsys):
    name, runs = own
    with pytest.raises(SystemExit) as stop:
        SCRIPTS[method].parse_args([*SMALL, *runs, "--reward", f"{name}:best", *flags])
    assert stop.value.code == 2 and words in capsys.readouterr().err


def test_evaluations_cannot_be_grouped_alone(own, capsys):
    name, runs = own
    with pytest.raises(SystemExit):
        grpo.parse_args([*SMALL, *runs, "--reward", "shapes", "--eval-rewards", f"{name}:best"])
    assert "compares images of one model" in capsys.readouterr().err


# ---- --adv-per-reward -----------------------------------------------------------------------------------------------
def test_each_reward_of_a_sum_is_scaled_by_itself():
    """Float64 by hand, and what it is for: a reward that varies a thousand times more does not drown the other."""
    r, loud, weights = torch.rand(12), 1000 * torch.rand(12), {"a": 1.0, "b": -0.5}
    adv, equal = common.sum_of_advantages({"a": r, "b": loud}, weights, 4, "group")
    expected = torch.zeros(12, dtype=torch.float64)
    for value, weight in ((r, 1.0), (loud, -0.5)):
        groups = value.double().view(3, 4)
        expected += weight * ((groups - groups.mean(1, keepdim=True)) / (groups.std(1, correction=0, keepdim=True)
                                                                         + 1e-4)).flatten()  # fmt: skip
    assert torch.allclose(adv.double(), expected, atol=1e-5) and not equal.any()
    for mode in ("none", "raw", "rloo"):  # linear: the same as of the sum
        both = common.sum_of_advantages({"a": r, "b": loud}, weights, 4, mode)[0]
        assert torch.allclose(both, common.group_advantage(r - 0.5 * loud, 4, mode)[0], atol=1e-3)
    flat = torch.ones(12)
    adv, equal = common.sum_of_advantages({"a": r, "b": flat}, weights, 4, "group")
    assert torch.equal(adv, common.group_advantage(r, 4, "group")[0]) and not equal.any()  # one of them still differs
    assert common.sum_of_advantages({"a": flat, "b": flat}, weights, 4, "group")[1].all()


@pytest.mark.parametrize("method, norm", [("grpo", "global"), ("awm", "group")])
def test_trainers_with_adv_per_reward(method, norm, own, monkeypatch):
    name, runs = own
    seen = []
    real = common.sum_of_advantages
    monkeypatch.setattr(common, "sum_of_advantages", lambda *a: seen.append(a) or real(*a))
    spec = f"{name}:bright=1,{name}:loud=0.25"
    flags = ["--reward", spec, "--eval-images", "0", "--adv-norm", norm, *runs]
    rows = train(method, *flags, "--name", "each", "--adv-per-reward")
    ((parts, weights, K, *how),) = seen
    assert list(parts) == [f"{name}:bright", f"{name}:loud"] == list(weights) and list(weights.values()) == [1, 0.25]
    assert K == 3 and how[0] == norm and math.isfinite(float(rows[0]["grad/norm"]))
    whole = train(method, *flags, "--name", "sum")
    assert rows[0]["grad/norm"] != whole[0]["grad/norm"] and len(seen) == 1


def test_what_it_does_not_go_with(own, capsys):
    name, runs = own
    for flags in (["--adv-norm", "running"], ["--kl", "implicit"]):
        with pytest.raises(SystemExit):
            grpo.parse_args([*SMALL, *runs, "--adv-per-reward", *flags])
        assert "--adv-per-reward takes the rewards one by one" in capsys.readouterr().err
    assert rewards.load("shapes=2,jpeg").weights == {"shapes": 2, "jpeg": 1}
