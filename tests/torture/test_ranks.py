"""Several processes: 1 = 2 = 3, two nodes, accelerate, a rank that dies, an elastic restart that goes on by itself."""

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from torture import report
from torture.trials import ROOT, SCRIPTS

SIZES = "--preset tiny --num-prompts 6 --epochs 2 --eval-images 6 --eval-every 1 --sample-every 0 --save-every 1"
OWN = dict.fromkeys(SCRIPTS, "--group-size 2 --steps 3") | {
    "tempflow_rsm": "--steps 4 --profile 3,2,2", "first_order_rsm": "--group-size 1 --steps 3",
}  # fmt: skip
ENV = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]


def flags(name, folder, *more) -> list[str]:
    return [f"{name}.py", *SIZES.split(), *OWN[name].split(), "--runs", str(folder), "--name", "run", *more]


def call(command, **more):
    return subprocess.run(command, cwd=ROOT, env=ENV, capture_output=True, text=True, timeout=900, **more)


def rows(folder: Path):
    with (folder / "run" / "metrics.csv").open(newline="") as f:
        return list(csv.DictReader(f))


def furthest(one, other) -> tuple[float, str]:
    """Largest difference of two runs' metrics, relative to max(|x|, 1e-3), and whose."""
    skip = ("time/", "mem/", "calls/", "epoch", "ratio/start_deviation", "ratio/max")  # maxima of rounding
    worst = (0.0, "")
    for a, b in zip(one, other, strict=True):
        for key in (k for k in a if a[k] and not k.startswith(skip)):
            x, y = float(a[key]), float(b[key])
            worst = max(worst, (abs(x - y) / max(abs(x), 1e-3), key))
    return worst


@pytest.mark.parametrize("name", SCRIPTS)
def test_one_two_and_three_processes_are_one_run(name, tmp_path):
    found = {}
    for count in (1, 2, 3):
        folder = tmp_path / str(count)
        start = [sys.executable] if count == 1 else [*TORCHRUN, "--standalone", f"--nproc-per-node={count}"]
        done = call([*start, *flags(name, folder)])
        assert done.returncode == 0, done.stderr[-3000:]
        found[count] = rows(folder)
    worst = max(furthest(found[1], found[count]) for count in (2, 3))
    far = f"largest relative difference {worst[0]:.1e}, {worst[1]}"
    report.add(f"{name}: 1 = 2 = 3 processes ({far})", 2, worst[0] > 5e-4)
    assert worst[0] < 5e-4, worst


def test_two_nodes(tmp_path):
    """Two agents on this machine, as two machines would start them."""
    where = "--nnodes=2 --nproc-per-node=1 --rdzv-backend=c10d --rdzv-endpoint=localhost:29511 --rdzv-id=x"
    command = [*TORCHRUN, *where.split(), *flags("vmpo", tmp_path / "two")]
    other = subprocess.Popen(command, cwd=ROOT, env=ENV, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    done = call(command)
    assert done.returncode == 0 and other.wait(60) == 0, done.stderr[-3000:]
    assert call([sys.executable, *flags("vmpo", tmp_path / "one")]).returncode == 0
    worst = furthest(rows(tmp_path / "one"), rows(tmp_path / "two"))
    report.add(f"vmpo: two nodes (largest relative difference {worst[0]:.1e}, {worst[1]})", 1, worst[0] > 5e-4)
    assert worst[0] < 5e-4, worst


def test_accelerate_starts_the_processes_too(tmp_path):
    """As on GPUs: through torchrun's environment.  (accelerate launch --cpu starts one process, or needs MPI.)"""
    more = "--multi_gpu --num_processes=2 --num_machines=1 --mixed_precision=no --dynamo_backend=no"
    start = [sys.executable, "-m", "accelerate.commands.launch", *more.split()]
    done = call([*start, *flags("vmpo", tmp_path / "two")])
    assert done.returncode == 0 and "processes 2" in done.stdout, done.stderr[-3000:]
    assert call([sys.executable, *flags("vmpo", tmp_path / "one")]).returncode == 0
    worst = furthest(rows(tmp_path / "one"), rows(tmp_path / "two"))
    report.add("vmpo: accelerate launch", 1, worst[0] > 5e-4)
    assert worst[0] < 5e-4, worst


def children(pid: int) -> list[int]:
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.parametrize("restarts", [0, 1])
def test_a_rank_that_dies(tmp_path, restarts):
    """The others end within 30 s with a sentence; with restarts and --resume-or-start the run goes on by itself."""
    run = tmp_path / "run"
    more = ["--epochs", "40"] if not restarts else ["--epochs", "12"]
    command = [*TORCHRUN, "--standalone", "--nproc-per-node=2", f"--max-restarts={restarts}", "vmpo.py"]
    command += [*SIZES.split(), *OWN["vmpo"].split(), *more, "--eval-every", "0", "--resume-or-start", str(run)]
    job = subprocess.Popen(command, cwd=ROOT, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not (run / "checkpoints" / "epoch_0003").exists() and job.poll() is None:
        time.sleep(0.05)
    os.kill(children(job.pid)[1], signal.SIGKILL)
    begin = time.time()
    _, err = job.communicate(timeout=600)
    if restarts:
        assert job.returncode == 0, err[:6000]
        assert call([sys.executable, *flags("vmpo", tmp_path / "whole", *more, "--eval-every", "0")]).returncode == 0
        with (run / "metrics.csv").open(newline="") as f:
            worst = furthest(rows(tmp_path / "whole"), list(csv.DictReader(f)))
        report.add("vmpo: a killed rank, restarted by torchrun, goes on", 1, worst[0] > 5e-4)
        assert worst[0] < 5e-4, worst
    else:
        ours = err.split("torch/distributed/run.py")[0].split("Root Cause")[0]
        clean = job.returncode == 1 and time.time() - begin < 30 and "vmpo.py: stopped" in err
        report.add(f"vmpo: a killed rank ends the other ({time.time() - begin:.0f} s)", 1, not clean)
        assert clean and 'vmpo.py", line' not in ours, err[-3000:]
