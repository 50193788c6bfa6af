"""TensorBoard and wandb get the same scalars, pictures and settings, all from harness.Logger."""

import importlib.util
import json
import sys

import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import vmpo

SMALL = (
    "--preset tiny --num-prompts 2 --group-size 2 --steps 3 --eval-images 4 --sample-every 1 --save-every 1".split()
)
FAKE = """
import json, os
def record(*what):
    with open(os.environ["FAKE_WANDB"], "a") as f:
        f.write(json.dumps(what) + "\\n")
class Run:
    def log(self, values, step):
        record("log", step, values)
    def finish(self):
        record("finish")
class Image(str):
    pass
def init(**settings):
    if os.environ.get("FAKE_WANDB_FAILS"):
        raise RuntimeError("no API key\\nconfigured")
    record("init", {k: v if isinstance(v, dict) else str(v) for k, v in settings.items()})
    return Run()
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    (tmp_path / "wandb.py").write_text(FAKE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("FAKE_WANDB", str(tmp_path / "calls.jsonl"))
    yield lambda: [json.loads(line) for line in (tmp_path / "calls.jsonl").read_text().splitlines()]
    sys.modules.pop("wandb", None)


def train(tmp_path, *flags):
    vmpo.main(vmpo.parse_args([*SMALL, "--runs", str(tmp_path / "runs"), *map(str, flags)]))


def board(folder):
    found = EventAccumulator(str(folder), size_guidance={"images": 0})
    found.Reload()
    return found


def test_both_get_scalars_pictures_and_settings(tmp_path, fake):
    train(tmp_path, "--name", "run", "--epochs", 2, "--wandb", "shapes", "--lr", 2e-3)
    folder = tmp_path / "runs" / "run"
    events, calls = board(folder), fake()
    assert [e.step for e in events.Images("samples")] == [0, 1, 2]
    with Image.open(folder / "samples" / "epoch_0002.png") as sheet:
        assert (events.Images("samples")[2].width, events.Images("samples")[2].height) == sheet.size
    assert [e.step for e in events.Images("before_after")] == [2] and events.Images("curve")
    assert [e.step for e in events.Scalars("eval/reward")] == [0, 2]
    text = events.Tensors("settings/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "lr: 0.002" in text and "method: vmpo" in text
    metadata = events.summary_metadata
    assert {"_hparams_/experiment", "_hparams_/session_start_info", "_hparams_/session_end_info"} <= metadata.keys()

    kinds = [call[0] for call in calls]
    assert kinds[0] == "init" and kinds[-1] == "finish" and kinds.count("init") == 1
    settings = calls[0][1]
    assert settings["project"] == "shapes" and settings["name"] == "run" and settings["config"]["lr"] == 2e-3
    logged = [(step, key) for _, step, values in calls[1:-1] for key in values]
    assert {(0, "samples"), (1, "samples"), (2, "samples"), (2, "before_after"), (2, "curve")} <= set(logged)
    for _, step, values in calls[1:-1]:
        for key, value in values.items():
            if not isinstance(value, str):
                on_board = {e.step: e.value for e in events.Scalars(key)}
                assert on_board[step] == pytest.approx(value, rel=1e-6)
    assert [step for step, _ in logged] == sorted(step for step, _ in logged)  # wandb drops steps that go back


def test_two_folders_of_one_name_are_two_runs_and_a_resumed_one_is_the_same(tmp_path, fake):
    train(tmp_path / "a", "--name", "run", "--epochs", 1, "--wandb", "shapes")
    train(tmp_path / "b", "--name", "run", "--epochs", 1, "--wandb", "shapes")
    vmpo.main(vmpo.parse_args(["--resume", str(tmp_path / "a" / "runs" / "run"), "--epochs", "2"]))
    first, second, third = (call[1]["id"] for call in fake() if call[0] == "init")
    assert first == third != second


def test_wandb_is_checked_at_the_start(tmp_path, monkeypatch, capsys, fake):
    monkeypatch.setenv("FAKE_WANDB_FAILS", "1")
    with pytest.raises(vmpo.harness.UsageError, match="--wandb shapes: no API key configured; log in"):
        train(tmp_path, "--wandb", "shapes")
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "wandb" else find(name))
    monkeypatch.setattr(vmpo.harness, "load_policy", lambda *a: pytest.fail("a model was loaded"))
    with pytest.raises(SystemExit) as stop:
        train(tmp_path, "--wandb", "shapes")
    message = capsys.readouterr().err
    assert stop.value.code == 2 and message.count("\n") == 1 and "pip install wandb" in message
