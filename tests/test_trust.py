"""A run that is killed, moved or fed damaged files: nothing is lost, and either start or resume always works."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import checkpoints
import harness
import vmpo

ROOT = Path(__file__).resolve().parent.parent
SMALL = "--preset tiny --num-prompts 2 --group-size 2 --steps 3 --eval-images 4 --sample-every 0 --save-every 1"
SMALL = SMALL.split()
ENV = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def train(folder, name, *flags):
    vmpo.main(vmpo.parse_args([*SMALL, "--runs", str(folder), "--name", name, *map(str, flags)]))
    return Path(folder) / name


def resume(run, *flags):
    vmpo.main(vmpo.parse_args(["--resume", str(run), *map(str, flags)]))


def rows(run):
    lines = [line.split(",") for line in (run / "metrics.csv").read_text().splitlines()]
    keep = [j for j, key in enumerate(lines[0]) if not key.startswith(("time/", "calls/"))]
    return [[line[j] for j in keep] for line in lines]


def same(run, other):
    """Metrics, the exported LoRA and the summary's numbers."""
    lora = [(r / "checkpoints" / "last" / "pytorch_lora_weights.safetensors").read_bytes() for r in (run, other)]
    gains = [json.loads((r / "summary.json").read_text())["gain"] for r in (run, other)]
    return rows(run) == rows(other) and lora[0] == lora[1] and gains[0] == gains[1]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return train(tmp_path_factory.mktemp("whole"), "run", "--epochs", 3)


@pytest.fixture
def run(whole, tmp_path):
    """A copy of a finished run of three epochs."""
    return Path(shutil.copytree(whole, tmp_path / "run", symlinks=True))


def test_killed_before_the_first_checkpoint(run, whole):
    """Neither start nor resume worked on such a folder."""
    shutil.rmtree(run / "checkpoints")
    (run / "summary.json").unlink()
    with pytest.raises(harness.UsageError, match="continue it with --resume"):
        train(run.parent, "run")
    resume(run)
    assert same(run, whole)


def refused(capsys, run, *flags):
    """The sentence with which a resume is refused, before a model is loaded."""
    with pytest.raises(SystemExit) as stop:
        vmpo.parse_args(["--resume", str(run), *map(str, flags)])
    assert stop.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_killed_between_the_last_checkpoint_and_the_summary(run, whole, capsys):
    for file in ("summary.json", "curve.png", "before_after.png"):
        (run / file).unlink()
    resume(run)
    assert same(run, whole) and (run / "curve.png").exists() and (run / "before_after.png").exists()
    assert "epoch 3 of 3 is done; give a larger --epochs" in refused(capsys, run)


def test_killed_between_a_checkpoint_and_its_link(run, whole):
    (run / "checkpoints" / "last").unlink()
    (run / "checkpoints" / "last").symlink_to("epoch_0001")
    (run / "summary.json").unlink()
    resume(run)
    assert os.readlink(run / "checkpoints" / "last") == "epoch_0003" and same(run, whole)


def test_torn_row_of_the_metrics(run, whole):
    (run / "summary.json").unlink()
    shutil.rmtree(run / "checkpoints" / "epoch_0003")
    text = (run / "metrics.csv").read_text()
    last = text.splitlines()[-1]
    (run / "metrics.csv").write_text(text.replace(last + "\n", "1"))  # of "3,...": a kill in the middle of a write
    resume(run)
    assert same(run, whole)


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "manifest"])
@pytest.mark.parametrize("file", ["state.pt", "pytorch_lora_weights.safetensors"])
def test_damaged_checkpoint_is_named_and_the_one_before_is_taken(run, whole, damage, file, capsys):
    newest = run / "checkpoints" / "epoch_0003"
    data = bytearray((newest / file).read_bytes())
    if damage == "flip":
        data[len(data) // 2] ^= 1
        (newest / file).write_bytes(data)
    elif damage == "truncate":
        (newest / file).write_bytes(data[:-7])
    elif damage == "remove":
        (newest / file).unlink()
    else:
        (newest / "manifest.json").write_text("{")
    (run / "summary.json").unlink()
    resume(run)
    said = capsys.readouterr().out
    assert "epoch_0003 is damaged" in said and (file in said or damage == "manifest")
    assert same(run, whole) and (run / "checkpoints" / "epoch_0003.damaged").is_dir()  # nothing is thrown away


def test_all_checkpoints_damaged_starts_again(run, whole, capsys):
    for checkpoint in (run / "checkpoints").glob("epoch_*"):
        (checkpoint / "state.pt").write_bytes(b"")
    (run / "summary.json").unlink()
    resume(run)
    assert capsys.readouterr().out.count("is damaged") == 3 and same(run, whole)


def test_stopped_in_the_last_evaluation(run, whole):
    """The last checkpoint is there and its evaluation is not: a resume makes it."""
    (run / "eval" / "epoch_0003.json").unlink()
    (run / "summary.json").unlink()
    resume(run)
    assert (run / "eval" / "epoch_0003.json").read_text() == (whole / "eval" / "epoch_0003.json").read_text()
    gains = [json.loads((r / "summary.json").read_text())["gain"] for r in (run, whole)]
    assert gains[0] == gains[1]


def test_summary_of_a_shorter_run_does_not_stand_in(run):
    resume(run, "--epochs", 4)
    text = (run / "summary.json").read_text()
    (run / "summary.json").write_text(text.replace('"epochs": 4', '"epochs": 3'))  # killed before the second one
    resume(run, "--epochs", 4)
    assert json.loads((run / "summary.json").read_text()) == json.loads(text)


def test_a_run_copied_without_links(run, whole):
    (run / "checkpoints" / "last").unlink()
    shutil.copytree(run / "checkpoints" / "epoch_0003", run / "checkpoints" / "last")
    (run / "summary.json").unlink()
    resume(run)
    assert (run / "checkpoints" / "last").is_symlink() and same(run, whole)


def test_a_run_of_an_older_version_is_refused_and_left_alone(run, capsys):
    saved = json.loads((run / "args.json").read_text())
    del saved["args"]["ema_warmup"]
    (run / "args.json").write_text(json.dumps(saved))
    before = rows(run)
    with pytest.raises(SystemExit) as stop:
        resume(run, "--epochs", 4)
    assert stop.value.code == 2 and "has no ema_warmup" in capsys.readouterr().err and rows(run) == before


def test_a_reward_that_fails_in_the_first_epochs_evaluation_keeps_that_epoch(tmp_path, monkeypatch, capsys):
    real = harness.score_held_out
    monkeypatch.setattr("sys.argv", ["vmpo.py"])

    def fails_later(policy, args, run, reward, more):
        if (run.dir / "metrics.csv").read_text().count("\n") > 1:
            raise vmpo.rewards.RewardError("server gone")
        return real(policy, args, run, reward, more)

    monkeypatch.setattr(harness, "score_held_out", fails_later)
    flags = [*SMALL, "--epochs", "2", "--eval-every", "1", "--runs", str(tmp_path), "--name", "run"]
    with pytest.raises(SystemExit):
        harness.run_main(vmpo.main, lambda: vmpo.parse_args(flags), ValueError)
    message = f"vmpo.py: stopped after epoch 1: server gone; go on with --resume {tmp_path / 'run'}"
    assert capsys.readouterr().err.strip().splitlines()[-1] == message
    monkeypatch.setattr(harness, "score_held_out", real)
    resume(tmp_path / "run")
    assert [row[0] for row in rows(tmp_path / "run")] == ["epoch", "0", "1", "2"]


def test_an_empty_folder_of_that_name_is_left_empty(tmp_path, monkeypatch):
    (tmp_path / "run").mkdir()
    monkeypatch.setattr("sys.argv", ["vmpo.py"])
    wrong = [*SMALL, "--resolution", "36", "--runs", str(tmp_path), "--name", "run"]  # found when the model is loaded
    with pytest.raises(SystemExit) as stop:
        harness.run_main(vmpo.main, lambda: vmpo.parse_args(wrong), ValueError)
    assert stop.value.code == 2 and not (tmp_path / "run").exists()


def call(*flags, **env):
    command = [sys.executable, "vmpo.py", *map(str, flags)]
    return subprocess.run(command, cwd=ROOT, env=ENV | env, capture_output=True, text=True, timeout=300)


HOLDER = """
import pathlib, sys, time
import checkpoints
checkpoints.lock(pathlib.Path(sys.argv[1]))
print("held", flush=True)
time.sleep(99)
"""


def test_one_process_for_each_run_folder(run):
    """The second is told who has it; the lock of a dead process holds nobody up."""
    command = [sys.executable, "-c", HOLDER, str(run)]
    holder = subprocess.Popen(command, cwd=ROOT, env=ENV, stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    checkpoints.LOCKS.clear()
    before = rows(run)
    with pytest.raises(harness.UsageError, match=f"is in use by process {holder.pid} on"):
        resume(run, "--epochs", 4)
    assert rows(run) == before
    holder.kill()
    holder.wait()
    resume(run, "--epochs", 4)
    assert len(rows(run)) == len(before) + 1


def test_a_start_that_fails_before_its_first_epoch_leaves_nothing(tmp_path):
    (tmp_path / "mine.py").write_text("def reward(images, prompts, metadata):\n    raise OSError('server gone')\n")
    flags = [*SMALL, "--reward", "mine:reward", "--runs", tmp_path / "runs", "--name", "run"]
    done = call(*flags, PYTHONPATH=str(tmp_path))
    assert done.returncode == 1 and "server gone" in done.stderr and not (tmp_path / "runs" / "run").exists()


def test_a_full_disk_ends_with_one_sentence_and_an_intact_checkpoint(run, monkeypatch, capsys):
    real = torch.save

    def full(state, path):
        Path(path).write_bytes(b"half")
        raise RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0")

    monkeypatch.setattr(torch, "save", full)
    monkeypatch.setattr(sys, "argv", ["vmpo.py"])
    with pytest.raises(SystemExit) as stop:
        harness.run_main(vmpo.main, lambda: vmpo.parse_args(["--resume", str(run), "--epochs", "4"]), ValueError)
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 1 and "epoch_0004 could not be written" in message and f"--resume {run}" in message
    monkeypatch.setattr(torch, "save", real)
    resume(run, "--epochs", 4)
    assert rows(run)[-1][0] == "4"


@pytest.mark.parametrize("flags, env, words", [
    ("--name ../x", {}, "--name ../x is no name of a folder"),
    ("--name ..", {}, "--name .. is no name of a folder"),
    (f"--name {'x' * 300}", {}, "at most 200 characters"),
    ("--device cuda", {}, "there is no CUDA device"),
    ("--seed 1", {"WORLD_SIZE": "two"}, "WORLD_SIZE, RANK, LOCAL_RANK are two"),
    ("--seed 1", {"RANK": "-1"}, "torchrun"),
])  # fmt: skip
def test_nonsense_is_one_sentence_and_leaves_no_folder(tmp_path, flags, env, words, monkeypatch, capsys):
    if "cuda" in flags and torch.cuda.is_available():
        pytest.skip("there is one here")
    for key, value in env.items():
        monkeypatch.setenv(key, value)
    with pytest.raises(SystemExit) as stop:
        vmpo.parse_args([*SMALL, "--runs", str(tmp_path / "runs"), *flags.split()])
    assert stop.value.code == 2 and words in capsys.readouterr().err and not (tmp_path / "runs").exists()


@pytest.mark.parametrize("broken", ["truncated", "html", "missing"])
def test_broken_weights_are_one_sentence(tmp_path, broken):
    shutil.copytree(ROOT / "tiny" / "sd35", tmp_path / "model")
    weights = next((tmp_path / "model" / "transformer").glob("*.safetensors"))
    content = {"truncated": weights.read_bytes()[:5000], "html": b"<html>", "missing": None}[broken]
    weights.unlink()
    if content:
        weights.write_bytes(content)
    done = call(*SMALL, "--model", tmp_path / "model", "--max-sequence-length", 10, "--runs", tmp_path / "runs")
    assert done.returncode == 2 and "cannot be loaded" in done.stderr.strip().splitlines()[-1], done.stderr[-600:]
    assert not list((tmp_path / "runs").glob("*"))


# ---- what a run is made from --------------------------------------------------------------------------------------
MINE = "def reward(images, prompts, metadata):\n    return images[:, {channel}].mean((1, 2))\n"


@pytest.fixture
def made_here(tmp_path, monkeypatch):
    """A run of files of the folder it was started in, named as seen from there."""
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.chdir(home)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    (home / "mine.py").write_text(MINE.format(channel=0))
    (home / "list.txt").write_text("a red circle\na blue square\n")
    shutil.copytree(ROOT / "tiny" / "sd35", home / "model")
    train("runs", "run", "--epochs", 1, "--prompts", "list.txt", "--eval-prompts", "", "--reward", "mine:reward",
          "--eval-rewards", "", "--model", "model", "--resolution", 32)  # fmt: skip
    return home


def elsewhere(home, monkeypatch):
    """Another folder, with other files of the same names."""
    other = home.parent / "other"
    other.mkdir(exist_ok=True)
    (other / "mine.py").write_text(MINE.format(channel=2))
    (other / "list.txt").write_text("a green circle\n")
    monkeypatch.chdir(other)
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != home]


def test_a_run_takes_its_own_files_wherever_it_is_resumed(made_here, monkeypatch):
    shutil.copytree(made_here / "runs" / "run", made_here / "whole", symlinks=True)
    resume(made_here / "whole", "--epochs", 2)
    elsewhere(made_here, monkeypatch)
    resume(made_here / "runs" / "run", "--epochs", 2)
    assert rows(made_here / "runs" / "run") == rows(made_here / "whole")
    assert (made_here / "runs" / "run" / "mine.py").read_text() == MINE.format(channel=0)  # a copy, for the record


@pytest.mark.parametrize("file", ["list.txt", "mine.py", "model/model_index.json"])
@pytest.mark.parametrize("change", ["edit", "remove"])
def test_a_changed_file_is_named_and_can_be_accepted(made_here, monkeypatch, capsys, file, change):
    run, path = made_here / "runs" / "run", made_here / file
    path.write_text(path.read_text() + "\n") if change == "edit" else path.unlink()
    elsewhere(made_here, monkeypatch)
    message = refused(capsys, run, "--epochs", 2)
    kind = {"list.txt": "prompts", "mine.py": "reward"}.get(file, "model")
    assert f"{kind} " in message and "is not the file the run was made from" in message
    if change == "edit":
        monkeypatch.chdir(made_here)
        accepted = vmpo.parse_args(["--resume", str(run), "--epochs", "2", "--accept-changes"])
        assert [name for _, name, *_ in accepted.sources] == ["list.txt", "model", "mine"]


def test_numbers_change_only_with_the_flag_for_it_and_are_on_record(run, capsys):
    message = refused(capsys, run, "--epochs", 4, "--lr", 1e-5)
    assert "--lr 1e-05 differs from the resumed run's 0.0004" in message and "--accept-changes" in message
    for flag, value in (("--lora-rank", 2), ("--seed", 1), ("--potential", "diff"), ("--steps", 4)):
        assert "--accept-changes" not in refused(capsys, run, "--epochs", 4, flag, value, "--accept-changes")
    args = vmpo.parse_args(["--resume", str(run), "--epochs", "4", "--lr", "1e-5", "--accept-changes"])
    optimisers, real = [], harness.make_optimiser
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(harness, "make_optimiser", lambda *a: optimisers.append(real(*a)) or optimisers[0])
        vmpo.main(args)
    assert optimisers[0].parts[0][0].param_groups[0]["lr"] == 1e-5  # not the saved optimiser's
    segment = json.loads((run / "history.jsonl").read_text())
    assert segment["changed"] == {"epochs": [3, 4], "lr": [4e-4, 1e-5]} and segment["command"]
    assert "epoch 4 of 4 is done" in refused(capsys, run)  # a next resume takes over what was changed


# ---- disk and signals ---------------------------------------------------------------------------------------------
def test_only_the_newest_checkpoints_and_the_best_are_kept(tmp_path, monkeypatch):
    score = iter([0.1, 0.2, 0.9, 0.3, 0.4, 0.5, 0.6])
    monkeypatch.setattr(
        harness, "score_held_out", lambda *a: ({"reward": torch.full((4,), next(score))}, torch.zeros(4, 3, 8, 8))
    )
    run = train(tmp_path, "run", "--epochs", 6, "--eval-every", 1, "--keep", 2, "--eval-rewards", "")
    kept = sorted(p.name for p in (run / "checkpoints").iterdir())
    assert kept == ["epoch_0002", "epoch_0005", "epoch_0006", "last"]  # the held-out reward was .9 after epoch 2
    assert checkpoints.damage(run / "checkpoints" / "epoch_0002") == ""


STOPPED = """
import os, signal, sys, time
import common, harness, vmpo
number, seen, real = int(sys.argv.pop(1)), [], common.Optimiser.step
def step(self):
    seen.append(0)
    if len(seen) == 4:  # in epoch 4's update, when theta has moved
        real(self)
        os.kill(os.getpid(), number)
        time.sleep(9)
    return real(self)
common.Optimiser.step = step
harness.run_main(vmpo.main, vmpo.parse_args, ValueError)
"""


@pytest.mark.parametrize("number", [1, 2, 15])
def test_a_signal_writes_the_last_complete_epoch(whole, tmp_path, number):
    flags = [*SMALL, "--epochs", 4, "--save-every", 0, "--runs", tmp_path, "--name", "run"]
    heed = lambda: [signal.signal(n, signal.SIG_DFL) for n in (1, 2, 15)]  # noqa: E731
    done = subprocess.run([sys.executable, "-c", STOPPED, str(number), *map(str, flags)], cwd=ROOT, env=ENV,
                          capture_output=True, text=True, timeout=300, preexec_fn=heed)  # fmt: skip
    run = tmp_path / "run"
    assert done.returncode == 128 + number, done.stderr[-2000:]
    name = {1: "SIGHUP", 2: "SIGINT", 15: "SIGTERM"}[number]
    assert f"stopped by {name}; go on with --resume {run}" in done.stderr.strip().splitlines()[-1]
    assert [c.name for c in checkpoints.by_epoch(run)] == ["epoch_0003"]
    lora = "checkpoints/last/pytorch_lora_weights.safetensors"
    mine, other = load_file(run / lora), load_file(whole / lora)
    assert all(torch.equal(mine[key], other[key]) for key in other)  # not what the half epoch made of it


def test_a_second_signal_ends_at_once_and_one_while_writing_waits(tmp_path):
    code = """
import os, signal, sys, time
import checkpoints
with checkpoints.signals_stop():
    try:
        with checkpoints.unbroken():
            os.kill(os.getpid(), 15)
            print("written", flush=True)
        print("never", flush=True)
    except checkpoints.Stopped as stop:
        print(stop, stop.number, flush=True)
        os.kill(os.getpid(), 2)  # a terminal's and torchrun's signal come together
        print("still here", flush=True)
        time.sleep(1.1)
        os.kill(os.getpid(), 15)
        time.sleep(9)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=ENV, capture_output=True, text=True, timeout=60)
    assert done.returncode == 143 and done.stdout.splitlines() == ["written", "SIGTERM 15", "still here"]


def test_one_command_starts_continues_and_ends(tmp_path, capsys):
    flags = [*SMALL, "--epochs", "2", "--resume-or-start", str(tmp_path / "jobs" / "run")]
    vmpo.main(vmpo.parse_args(flags))
    run = tmp_path / "jobs" / "run"
    shutil.rmtree(run / "checkpoints" / "epoch_0002")
    (run / "summary.json").unlink()
    vmpo.main(vmpo.parse_args(flags))
    assert [row[0] for row in rows(run)] == ["epoch", "0", "1", "2"] and (run / "summary.json").exists()
    with pytest.raises(SystemExit) as stop:
        vmpo.parse_args(flags)
    assert stop.value.code == 0 and "all 2 epochs are done" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        vmpo.parse_args([*flags, "--name", "x"])
    assert stop.value.code == 2
