"""The scripts as a user starts them: help, wrong flags, missing weights, Ctrl-C, a kill and a resume, a fork."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import common
import vmpo

ROOT = Path(__file__).resolve().parent.parent
ENV = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
SMALL = (
    "--preset tiny --num-prompts 2 --group-size 2 --steps 3 --eval-images 4 --sample-every 0 --save-every 1".split()
)


def call(*flags, script="vmpo.py", cwd=ROOT, **env):
    return subprocess.run(
        [sys.executable, str(script), *map(str, flags)],
        cwd=cwd,
        env=ENV | env,
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_help_is_light_grouped_and_complete():
    probe = "import sys, vmpo\ntry: vmpo.parse_args(['--help'])\nexcept SystemExit: pass\n"
    probe += "print('HEAVY', [m for m in ('diffusers', 'transformers', 'peft', 'matplotlib') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", probe], cwd=ROOT, env=ENV, capture_output=True, text=True)
    assert "HEAVY []" in done.stdout, done.stderr
    for group in ("method", "reward", "sampling", "optimisation", "model", "performance", "run"):
        assert f"\n{group}:" in done.stdout
    flags = re.findall(r"^  (--[a-z0-9-]+)", done.stdout, re.M)
    assert len(flags) > 50


def test_every_flag_is_explained():
    parser = common.make_parser(vmpo.__doc__, "vmpo")
    common.add_args(parser)
    for action in parser._actions:
        assert action.help and len(action.help) > 8, action.dest


def test_dry_run_prints_the_sizes_of_the_papers_experiment_and_loads_nothing():
    done = call("--preset", "sd15-hpsv2", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "128 = 128 prompts x 1" in done.stdout
    assert "6400, 3200 per update" in done.stdout  # 128 trajectories x 50 steps, two updates (App. D)
    assert "6528 images" in done.stdout  # 128 x (50 + 1): Diff scores every step and the end


def test_missing_weights_end_in_one_sentence_within_ten_seconds():
    start = time.time()
    done = call("--potential", "diff", "--reward", "hpsv2", "--beta", "0.01", "--prompts", "prompts/hpdv2_photo.txt")
    assert done.returncode == 2 and time.time() - start < 10
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("vmpo.py: error:") and "tiny" in last
    assert "HPS_v2.1" in last or "stable-diffusion-v1-5" in last


WRONG = [
    ("--model nowhere", "nowhere"), ("--model /tmp", "model_index.json"), ("--reward shaps", "shapes"),
    ("--preset tinny", "tinny"), ("--steps 1", "at least 2"), ("--group-size 1", "--group-size"),
    ("--updates-per-epoch 5", "does not divide"), ("--prompts none.txt", "none.txt"), ("--beta 0", "above 0"),
    ("--lora-targets to_x", "to_x"), ("--kernel ddim", "ddim"), ("--objective mc --mean time", "--mean"),
    ("--objective gradient", "differentiable"), ("--runs README.md/x", "README.md"), ("--resume tiny", "tiny"),
    ("--model tiny-sd15 --kl-denom g2", "g2"), ("--reward no_module:f", "no_module"), ("--noise-level 0", "noise"),
    ("--lr 0", "--lr"), ("--reward shapes --prompts prompts/simple_animals.txt", "grammar"),
]  # fmt: skip


@pytest.mark.parametrize("flags, word", WRONG)
def test_bad_input_is_one_sentence_before_any_model_is_loaded(flags, word, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(common.Policy, "__init__", lambda *a: pytest.fail("a model was loaded"))
    with pytest.raises(SystemExit) as stop:
        vmpo.main(vmpo.parse_args([*SMALL, *flags.split()]))
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 2 and word in message and len(message) < 600


def test_sum_reduction_with_a_clip_range_for_means_is_warned_of(capsys):
    vmpo.parse_args([*SMALL, "--objective", "ppo", "--logprob-reduce", "sum"])
    assert "0.0256 (times the latent's 256 scalars)" in capsys.readouterr().out


def long_run(folder):
    flags = [*SMALL, "--epochs", "500", "--runs", str(folder), "--name", "run"]
    return [sys.executable, str(ROOT / "vmpo.py"), *flags]


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_keeps_the_checkpoint_and_resume_goes_on(tmp_path, sent):
    heed = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731  (a background job inherits "ignore")
    process = subprocess.Popen(
        long_run(tmp_path), cwd=ROOT, env=ENV, stderr=subprocess.PIPE, text=True, preexec_fn=heed
    )
    last = tmp_path / "run" / "checkpoints" / "last" / "state.pt"
    while not last.exists() and process.poll() is None:
        time.sleep(0.2)
    process.send_signal(sent)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "--resume" in err, err[-2000:]
    lines = len((tmp_path / "run" / "metrics.csv").read_text().splitlines())
    done = call("--resume", tmp_path / "run", "--epochs", lines + 1)
    assert done.returncode == 0, done.stderr[-2000:]
    assert len((tmp_path / "run" / "metrics.csv").read_text().splitlines()) == lines + 3  # header, evaluation, epochs


def test_killed_run_resumes_from_a_valid_checkpoint(tmp_path):
    process = subprocess.Popen(long_run(tmp_path), cwd=ROOT, env=ENV, stderr=subprocess.DEVNULL)
    while not (tmp_path / "run" / "checkpoints" / "epoch_0003").exists() and process.poll() is None:
        time.sleep(0.05)
    process.kill()
    process.wait()
    vmpo.main(vmpo.parse_args(["--resume", str(tmp_path / "run"), "--epochs", "30"]))
    vmpo.main(vmpo.parse_args([*SMALL, "--epochs", "30", "--runs", str(tmp_path), "--name", "whole"]))
    rows = []
    for name in ("run", "whole"):
        text = (tmp_path / name / "metrics.csv").read_text().splitlines()
        columns = [j for j, key in enumerate(text[0].split(",")) if not key.startswith(("time/", "calls/"))]
        rows.append([[line.split(",")[j] for j in columns] for line in text])
    assert rows[0] == rows[1]


def test_fork_runs_in_another_folder(tmp_path):
    for name in ("vmpo.py", "common.py", "rewards.py"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "my_module.py").write_text(
        "def my_reward(images, prompts, metadata):\n    return images[:, 0].mean((1, 2))\n"
    )
    (tmp_path / "my.txt").write_text("a red circle\nsomething else\n")
    flags = "--reward my_module:my_reward --prompts my.txt --cfg 1 --steps 3 --num-prompts 2 --epochs 1".split()
    flags += "--max-sequence-length 10 --eval-images 4 --micro-batch-size 4".split()
    done = call(*flags, "--model", ROOT / "tiny" / "sd35", script=tmp_path / "vmpo.py", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert list((tmp_path / "runs").glob("vmpo_*/before_after.png"))


def readme_commands():
    text = "\n".join(f.read_text() for f in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))])
    lines = re.findall(r"^(?:python|torchrun --nproc-per-node 8) vmpo\.py (.*?)(?:\s+#.*)?$", text, re.M)
    return sorted({line for line in lines if "runs/NAME" not in line})


@pytest.mark.parametrize("flags", readme_commands())
def test_commands_in_the_documentation_parse(flags, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as stop:
        vmpo.parse_args([*flags.split(), "--dry-run"])
    assert stop.value.code == 0, capsys.readouterr().err


@pytest.mark.parametrize(
    "preset", [p for p in vmpo.PRESETS if p not in ("sd15-imagereward", "sd35-ocr", "sd35-ocr-release")]
)
def test_presets_parse(preset, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as stop:
        vmpo.parse_args(["--preset", preset, "--dry-run"])
    assert stop.value.code == 0


@pytest.mark.parametrize("preset, file", [("sd15-imagereward", "drawbench.txt"), ("sd35-ocr", "ocr_train.txt")])
def test_presets_whose_prompts_cannot_be_shipped_name_the_file_and_run_with_another(preset, file, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as stop:
        vmpo.parse_args(["--preset", preset, "--dry-run"])
    assert stop.value.code == 2 and file in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        vmpo.parse_args(["--preset", preset, "--dry-run", "--prompts", "prompts/ocr_test.txt"])
    assert stop.value.code == 0
