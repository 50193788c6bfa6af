"""eval.py --sweep: run folders as the trainers' Logger writes them; statistics by hand, names, files, bad input."""

import itertools
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import awm
import checkpoints
import eval as evaluation
import eval_runs
import harness
import rewards
import vmpo

ROOT = Path(__file__).resolve().parent.parent
ENDS = {  # of the 8 seeds of one setting: far from symmetric, so that the mean is not the interquartile mean
    0: [0.5] * 8,
    10: [0.50, 0.51, 0.53, 0.56, 0.60, 0.65, 0.71, 0.99],
    20: [0.10, 0.60, 0.61, 0.63, 0.64, 0.66, 0.70, 0.75],
}


def make_run(folder, curve, *flags, script=vmpo, finished=True):
    """{epoch: held-out reward or None} -> a run folder with args.json, metrics.csv and summary.json."""
    last = ["--epochs", str(max(curve))]
    args = script.parse_args(["--preset", "tiny", "--runs", str(folder.parent), "--name", folder.name, *last, *flags])
    run = harness.Run(folder, torch.device("cpu"), torch.float32, rank=0, world=1, method=script.__name__)
    folder.mkdir(parents=True)
    harness.write_args(args, run)
    logger = harness.Logger(run, args, ["reward/mean", "eval/reward", "eval/reward_se"])
    for epoch in range(max(curve) + 1):
        held_out = {"eval/reward": curve[epoch], "eval/reward_se": 0.01} if curve.get(epoch) is not None else {}
        logger.log(epoch, held_out | ({"reward/mean": 0.9} if epoch else {}))
    logger.close()
    if finished:
        checkpoints.write_json(folder / "summary.json", {"epochs": max(curve)})


def sweep(*argv):
    args = evaluation.parse_args(["--sweep", *map(str, argv)])
    evaluation.main(args)
    return json.loads((Path(argv[argv.index("--out") + 1]) / "sweep.json").read_text())


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Eight seeds of one setting, three of another, one of a third, which goes on."""
    folder = tmp_path_factory.mktemp("runs")
    for s in range(8):
        curve = {epoch: values[s] for epoch, values in ENDS.items()}
        make_run(folder / f"vmpo_a{s}", curve, "--seed", str(s))
    for s in range(3):
        more = ("--lr", "2e-3", "--no-t5", "--micro-batch-size", str(s + 1))  # the last changes no result
        make_run(folder / f"vmpo_b{s}", {0: 0.5, 10: 0.6 + s / 100}, "--seed", str(s), *more)
    make_run(folder / "awm", {0: 0.5, 5: 0.9}, script=awm, finished=False)
    return folder


def test_statistics_by_hand(runs, tmp_path, capsys):
    found = sweep(runs / "vmpo_*", "--out", tmp_path)["settings"]
    a, b = found  # the largest gain first
    assert [len(entry["runs"]) for entry in found] == [8, 3] and a["epochs"] == [0, 10, 20]
    middle = {epoch: sum(sorted(values)[2:6]) / 4 for epoch, values in ENDS.items()}
    assert a["curve"]["iqm"] == pytest.approx(list(middle.values()))
    assert a["last"]["iqm"] == pytest.approx(middle[20]) and a["gain"]["iqm"] == pytest.approx(middle[20] - 0.5)
    assert b["gain"]["iqm"] == pytest.approx(0.11)  # of three: the mean
    every = [sum(x) / 3 for x in itertools.product([0.1, 0.11, 0.12], repeat=3)]  # all resamples
    assert b["gain"]["interval"] == pytest.approx(np.percentile(every, [2.5, 97.5], method="inverted_cdf"))
    rng = np.random.default_rng(5)  # the last value's interval by another generator and another formula
    draws = np.sort(rng.choice(ENDS[20], (20000, 8)))[:, 2:6].mean(1)
    assert a["last"]["interval"] == pytest.approx(np.percentile(draws, [2.5, 97.5]), abs=0.01)
    low, high = np.array(a["curve"]["interval"])
    assert [low[-1], high[-1]] == a["last"]["interval"] and low[0] == high[0] == 0.5
    assert np.subtract(a["last"]["interval"], 0.5) == pytest.approx(a["gain"]["interval"])
    printed = capsys.readouterr().out
    cell = f"{middle[20] - 0.5:+.4f} [{a['gain']['interval'][0]:+.4f}, {a['gain']['interval'][1]:+.4f}]"
    assert cell in printed and "1 seed" not in printed and str(tmp_path / "sweep.png") in printed


def test_names_are_the_flags_that_differ(runs, tmp_path):
    names = [entry["name"] for entry in sweep(runs / "vmpo_*", "--out", tmp_path)["settings"]]
    assert names == [f"--lr {vmpo.PRESETS['tiny']['lr']} --t5", "--lr 0.002 --no-t5"]
    assert [entry["name"] for entry in sweep(runs / "vmpo_b*", "--out", tmp_path)["settings"]] == ["vmpo"]
    names = [entry["name"] for entry in sweep(runs / "awm", runs / "vmpo_b0", "--out", tmp_path)["settings"]]
    assert names[0].startswith("awm --") and names[1].startswith("vmpo --")
    assert "--potential" not in names[1] and "--clip-range" in names[0] and "--clip-range" in names[1]


def test_one_seed_and_one_that_goes_on(runs, tmp_path, capsys):
    (entry,) = sweep(runs / "awm", "--out", tmp_path)["settings"]
    assert entry["gain"] == {"iqm": pytest.approx(0.4), "interval": None} and not entry["runs"][0]["finished"]
    row = [cell.strip() for cell in capsys.readouterr().out.splitlines()[2].strip("|").split("|")]
    assert row == ["awm", "1", "0", "5", "0.9000 (1 seed)", "+0.4000 (1 seed)"]


def test_the_picture_has_a_band_for_each_setting(runs, tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    drawn, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (drawn.append(self), save(self, *a, **k)))
    found = sweep(runs / "*", "--out", tmp_path)["settings"]
    (axis,) = drawn[0].axes
    assert [line.get_label().replace("\n", " ") for line in axis.lines] == [
        f"{e['name']}: {len(e['runs'])} seed{'s' * (len(e['runs']) > 1)}" for e in found
    ]
    for line, entry in zip(axis.lines, found):
        assert line.get_xdata().tolist() == entry["epochs"] and line.get_ydata().tolist() == entry["curve"]["iqm"]
    bands = [e for e in found if e["curve"]["interval"]]
    assert len(axis.collections) == len(bands) == 2  # none for the one seed
    for band, entry in zip(axis.collections, bands):
        corners = {tuple(point) for point in band.get_paths()[0].vertices.tolist()}
        assert corners >= {(x, y) for ends in entry["curve"]["interval"] for x, y in zip(entry["epochs"], ends)}
    assert Image.open(tmp_path / "sweep.png").size[0] > 900


def test_what_is_left_out_is_said(tmp_path, capsys):
    make_run(tmp_path / "r0", {0: 0.5, 10: 0.6, 20: 0.8}, "--seed", "0")
    make_run(tmp_path / "r1", {0: 0.5, 10: 0.7}, "--seed", "1", finished=False)
    with (tmp_path / "r1" / "metrics.csv").open("a") as f:
        f.write("20,,0.1")  # the row that the running trainer is writing
    make_run(tmp_path / "r2", {0: 0.5, 1: float("nan")}, "--seed", "2")
    make_run(tmp_path / "again", {0: 0.5, 10: 0.1}, "--seed", "0")
    make_run(tmp_path / "started", {0: 0.5, 10: 0.9}, "--seed", "3")
    (tmp_path / "started" / "metrics.csv").unlink()
    found = sweep(tmp_path / "*", tmp_path / "r1", "--out", tmp_path / "out")
    (entry,) = found["settings"]
    assert [Path(run["folder"]).name for run in entry["runs"]] == ["r0", "r1"]
    assert entry["epochs"] == [0, 10] and entry["last"]["iqm"] == pytest.approx(0.65)
    said = {word: [n for n in found["notes"] if f"{tmp_path / word} " in n] for word in ("r2", "again", "started")}
    assert all("left out" in notes[0] for notes in said.values()) and f"those of {tmp_path / 'r0'}" in said["again"][0]
    assert len(found["notes"]) == 4
    assert found["notes"][-1] == "vmpo: runs of 10 to 20 epochs; taken are the evaluations that all have"
    printed = capsys.readouterr().out
    assert all(f"note: {note}\n" in printed for note in found["notes"])


def test_a_prompt_list_is_known_by_its_content(tmp_path):
    lists = [tmp_path / "a" / "mine.txt", tmp_path / "b" / "mine.txt", tmp_path / "c" / "mine.txt"]
    for s, (file, text) in enumerate(zip(lists, ("a red circle\n", "a red circle\n", "a blue square\n"))):
        file.parent.mkdir()
        file.write_text(text * 8)
        make_run(tmp_path / f"run{s}", {0: 0.5, 1: 0.5 + s / 10}, "--seed", str(s), "--prompts", str(file))
    found = sweep(tmp_path / "run*", "--out", tmp_path / "out")["settings"]
    assert [[run["seed"] for run in entry["runs"]] for entry in found] == [[2], [0, 1]]
    assert all(entry["name"].startswith("--prompts mine.txt (") for entry in found)


BAD = {
    "{runs}/nothing_*": ["nothing_* matches nothing"],
    "{runs}": ["is no run folder"],
    "{root}/eval.py": ["is no run folder"],
    "{tmp}/foreign": ["is no run folder", "prompts"],
    "{tmp}/unheld*": ["no run has held-out evaluations", "--eval-images"],
    "{runs}/vmpo_a0 {tmp}/jpeg": ["different rewards", "shapes (", "jpeg (", "/jpeg)"],
    "{tmp}/other0 {tmp}/other1": ["no epoch after 0", "other0 (epoch 2)", "other1 (epoch 3)"],
    "{runs}/awm --lora x --steps 3": ["leave --lora, --steps out"],
}


@pytest.fixture(scope="module")
def bad(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad")
    make_run(folder / "unheld", {0: None, 4: None}, "--eval-images", "0")
    make_run(folder / "foreign", {0: 0.5, 4: 0.6})
    (folder / "foreign" / "args.json").write_text('{"method": "vmpo", "args": {"seed": 0, "epochs": 4}}')
    make_run(folder / "jpeg", {0: -3.0, 10: -2.0}, "--reward", "jpeg")
    for s in range(2):
        make_run(folder / f"other{s}", {0: 0.5, s + 2: 0.6}, "--seed", str(s))
    return folder


@pytest.mark.parametrize("flags", BAD)
def test_bad_input(flags, runs, bad, tmp_path, monkeypatch, capsys):
    argv = flags.format(runs=runs, root=ROOT, tmp=bad).split()
    monkeypatch.setattr(sys, "argv", ["eval.py", "--sweep", *argv, "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as stop:
        harness.run_main(evaluation.main, evaluation.parse_args, rewards.UsageError)
    error = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and error.startswith("eval.py: error: --sweep") and "\n" not in error, error
    assert all(word in error for word in BAD[flags]) and not (tmp_path / "out").exists(), error


def test_the_default_folder(runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    evaluation.main(evaluation.parse_args(["--sweep", str(runs / "awm")]))
    (made,) = (tmp_path / "evals").glob("sweep_*")
    assert {file.name for file in made.iterdir()} == {"sweep.json", "sweep.png"}


def test_what_follows_from_the_flags_makes_no_setting():
    """args.json has more than flags: of another checkout it would be another setting, --train-steps no flag."""
    args = vars(vmpo.parse_args(["--preset", "tiny"]))
    assert {"model_path", "kind", "train_steps"} <= args.keys() & eval_runs.ASIDE
