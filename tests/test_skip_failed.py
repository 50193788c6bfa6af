"""--skip-failed: where a sample has no score its prompt leaves the update, and nothing else changes."""

import csv
import json
import math
import os
import subprocess
import sys
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

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = {s.__name__: s for s in (vmpo, awm, grpo, tempflow_rsm, first_order_rsm)}
SMALL = "--preset tiny --num-prompts 4 --group-size 2 --steps 3 --epochs 1 --eval-images 0 --sample-every 0".split()
PROMPTS = ["a red circle", "two blue squares", "a green triangle", "three yellow circles"]
REWARD = """
import os, torch
def reward(images, prompts, metadata):
    how, scores = os.environ["BROKEN"], images.flatten(1).mean(1)
    bad = [i for i, p in enumerate(prompts) if p == "two blue squares"]
    if how == "every prompt":
        return scores * float("nan")
    if how != "none" and bad:
        scores[bad] += {"first": 0, "last": 5}[how]  # the others of the prompt must not matter
        scores[bad[0 if how == "first" else -1]] = float("nan")
    return scores
"""
METHODS = [
    ("vmpo", "--potential r2g --mean group --updates-per-epoch 2"),
    ("vmpo", "--potential diff --mean batch"),
    ("awm", "--adv-norm global --updates-per-epoch 2"),
    ("grpo", "--adv-norm global --updates-per-epoch 2"),
    ("grpo", "--adv-norm group --drop-zero-advantage"),
    ("tempflow_rsm", "--profile 2 --grouping prompt"),
    ("tempflow_rsm", "--branching tree --tree-splits 0"),
]


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A reward of one's own in tmp_path that fails as BROKEN of the environment says, and its prompts."""
    name = f"own_{abs(hash(tmp_path))}"
    (tmp_path / f"{name}.py").write_text(REWARD)
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    monkeypatch.syspath_prepend(str(tmp_path))
    return ["--reward", f"{name}:reward", "--prompts", str(tmp_path / "prompts.txt"), "--runs", str(tmp_path)]


def train(monkeypatch, own, method, how, *flags):
    monkeypatch.setenv("BROKEN", how)
    script, name = SCRIPTS[method], f"{method}_{how.replace(' ', '-')}"
    script.main(script.parse_args([*SMALL, *own, "--name", name, *flags]))
    return Path(own[-1]) / name


def metrics(run, drop=("time/", "reward/")):
    with (run / "metrics.csv").open(newline="") as f:
        return [{k: v for k, v in row.items() if not k.startswith(drop)} for row in csv.DictReader(f)]


def lora(run):
    return torch.load(run / "checkpoints" / "last" / "state.pt", weights_only=True)["theta"]["lora"]


@pytest.mark.parametrize("method, flags", METHODS)
def test_the_prompt_leaves_the_update_whichever_image_failed(method, flags, own, monkeypatch):
    one, other = (train(monkeypatch, own, method, how, "--skip-failed", *flags.split()) for how in ("first", "last"))
    assert metrics(one) == metrics(other)
    assert all(torch.equal(a, b) for a, b in zip(lora(one), lora(other), strict=True))
    rows = metrics(one, drop=())
    assert [row["reward/skipped"] for row in rows] == ["1"]
    assert all(math.isfinite(float(v)) for row in rows for v in row.values() if v)
    if "--updates-per-epoch" not in flags:
        return
    whole = train(monkeypatch, own, method, "none", *flags.split())
    assert "reward/skipped" not in metrics(whole, drop=())[0]
    assert any(not torch.equal(a, b) for a, b in zip(lora(one), lora(whole), strict=True))


def test_nothing_failed_is_the_same_run(own, monkeypatch):
    flags = ["--adv-norm", "global"]
    plain = train(monkeypatch, [*own[:-1], own[-1] + "/plain"], "grpo", "none", *flags)
    skip = train(monkeypatch, own, "grpo", "none", *flags, "--skip-failed")
    assert metrics(plain, drop=("time/",)) == metrics(skip, drop=("time/", "reward/skipped"))
    assert [row["reward/skipped"] for row in metrics(skip, drop=())] == ["0"]


def test_without_the_flag_and_without_any_prompt_the_run_stops(own, monkeypatch):
    with pytest.raises(SystemExit, match="returned nan.*'two blue squares'"):
        train(monkeypatch, own, "grpo", "first")
    with pytest.raises(SystemExit, match="no prompt of the epoch has a score of every image"):
        train(monkeypatch, own, "grpo", "every prompt", "--skip-failed")


def test_the_number_of_processes_does_not_matter(own, monkeypatch):
    flags = ["--adv-norm", "global", "--updates-per-epoch", "4", "--skip-failed"]
    one = train(monkeypatch, own, "grpo", "first", *flags)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(ROOT / "grpo.py"), *SMALL, *own, "--name", "two", *flags]
    path = os.pathsep.join([own[-1], os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(command, cwd=own[-1], env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    for row, other in zip(metrics(one, ("time/",)), metrics(Path(own[-1]) / "two", ("time/",)), strict=True):
        for key, value in row.items():
            if value and not key.startswith("calls/"):
                assert float(value) == pytest.approx(float(other[key]), rel=1e-3, abs=1e-5), key


def test_held_out_images_without_a_score_leave_the_means(own, monkeypatch):
    run = train(monkeypatch, own, "vmpo", "first", "--skip-failed", "--eval-images", "4", "--eval-prompts", own[3])
    rows = metrics(run, drop=())
    assert all(math.isfinite(float(row[k])) for row in rows[::2] for k in ("eval/reward", "eval/reward_se"))

    scores = json.loads((run / "eval" / "epoch_0000.json").read_text(), parse_constant=pytest.fail)
    known = [v for v, p in zip(scores["reward"], scores["prompts"]) if p != "two blue squares"]
    assert scores["reward"][1] is None and len(known) == 3
    assert float(rows[0]["eval/reward"]) == pytest.approx(sum(known) / 3, rel=1e-6)
    summary = json.loads((run / "summary.json").read_text(), parse_constant=pytest.fail)
    assert all(math.isfinite(v["reward"]) for k, v in summary.items() if k in ("before", "after", "gain", "gain_se"))


@pytest.mark.parametrize("mode", ["group", "global", "none", "rloo"])
@pytest.mark.parametrize("columns", [(), (3,)])
def test_advantages_of_the_others_are_those_without_the_failed_group(mode, columns):
    r = torch.rand(5 * 4, *columns)
    r[9] = math.nan  # of the third group
    adv, _ = common.group_advantage(r, 4, mode)
    kept = [*range(8), *range(12, 20)]
    assert torch.equal(adv[kept], common.group_advantage(r[kept], 4, mode)[0])


@pytest.mark.parametrize("method, flags, words", [
    ("first_order_rsm", [], "--skip-failed does not go with first-order methods"),
    ("vmpo", ["--diff-reward", "train", "--potential", "diff", "--mean", "time_prompt"], "--skip-failed needs"),
    ("grpo", ["--adv-norm", "running"], "--skip-failed does not go with --adv-norm running"),
])  # fmt: skip
def test_trainers_that_cannot_say_so(method, flags, words, capsys, monkeypatch):
    monkeypatch.setattr(rewards, "check_args", lambda args: None)
    with pytest.raises(SystemExit) as stop:
        SCRIPTS[method].parse_args(["--preset", "tiny", "--skip-failed", *flags])
    assert stop.value.code == 2 and words in capsys.readouterr().err
