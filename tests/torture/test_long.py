"""Long runs.  500 epochs of every trainer: memory, file descriptors and seconds per epoch stay where they were after
epoch 20; and 24 epochs of what make demo trains: the held-out reward rises.
"""

import json
import os
import time

import pytest

from torture import report
from torture.trials import SCRIPTS, flags_of, fork, harness, run

EPOCHS = 500


def watch(path):
    """After each epoch: resident memory (bytes), open files, the time."""
    real = harness.Recorder.end_epoch

    def end_epoch(self, *a, **k):
        real(self, *a, **k)
        with open("/proc/self/statm") as statm, path.open("a") as f:
            memory = int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
            f.write(json.dumps([memory, len(os.listdir("/proc/self/fd")), time.process_time()]) + "\n")

    harness.Recorder.end_epoch = end_epoch


@pytest.mark.parametrize("name", SCRIPTS)
def test_nothing_grows(name, tmp_path):
    script, seen = SCRIPTS[name], tmp_path / "seen.jsonl"
    rare = ["--epochs", EPOCHS, "--eval-every", 100, "--sample-every", 0, "--save-every", 50]
    code, err = fork(lambda: (watch(seen), run(script, flags_of(script, tmp_path, "run", *rare))))
    assert code == 0, err[-2000:]
    memory, files, seconds = zip(*map(json.loads, seen.read_text().splitlines()))
    assert len(memory) == EPOCHS
    early, late = (sum(memory[n : n + 20]) / 20 for n in (20, EPOCHS - 20))
    spent = [(seconds[n + 200] - seconds[n]) / 200 for n in (20, EPOCHS - 201)]
    growth, slower = late / early - 1, spent[1] / spent[0] - 1
    wrong = growth > 0.02 or files[-1] > files[20] or slower > 0.2
    flat = f"memory {100 * growth:+.1f} %, files {files[20]} to {files[-1]}, seconds {100 * slower:+.0f} %"
    report.add(f"{name}: {EPOCHS} epochs ({flat})", 1, wrong)
    assert not wrong, flat


def test_the_beginning_of_the_demo_rises(tmp_path):
    """24 of its 80 epochs: more than three standard errors over the held-out images."""
    few = ["--epochs", 24, "--eval-every", 24, "--eval-images", 512, "--sample-every", 0, "--runs", tmp_path]
    flags = ["--preset", "tiny-sd15-release", "--name", "run", *few]
    code, err = fork(lambda: run(SCRIPTS["awm"], list(map(str, flags))))
    assert code == 0, err[-2000:]
    found = json.loads((tmp_path / "run" / "summary.json").read_text())
    gain, error = (found[key]["reward"] for key in ("gain", "gain_se"))
    report.add(f"awm: 24 epochs of make demo (held-out reward {gain:+.3f} +- {error:.3f})", 1, gain < 3 * error)
    assert gain > 3 * error > 0
