"""SD1.5 at its real size (0.86 G parameters, random weights) through a trainer and eval.py on a CPU.

Minutes and about 8 GB of memory, so not part of `make test`:  python -m pytest tests/torture/test_full_size.py -s
"""

import csv
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
TRAIN = (
    "--preset tiny-sd15 --resolution 128 --cfg 5 --lora-targets attention --lora-rank 4 --max-sequence-length 77 "
    "--num-prompts 1 --group-size 2 --steps 3 --epochs 1 --updates-per-epoch 1 --micro-batch-size 2 "
    "--decode-batch-size 2 --reward jpeg --eval-rewards= --eval-images 2 --sample-every 0"
)


def call(*command):
    """Seconds that python COMMAND took."""
    start = time.time()
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return time.time() - start


def test_sd15_trains_and_is_evaluated_on_a_cpu(tmp_path):
    model, run = str(tmp_path / "sd15"), tmp_path / "run"
    seconds = {"make": call("-m", "benchmarks.random_model", "sd15", model)}
    flags = [*TRAIN.split(), "--model", model, "--runs", str(tmp_path), "--name", "run"]
    seconds["vmpo.py"] = call("vmpo.py", *flags)
    with (run / "metrics.csv").open(newline="") as f:
        row = list(csv.DictReader(f))[-1]
    assert row["epoch"] == "1" and float(row["grad/norm"]) > 0 and float(row["ratio/start_deviation"]) < 1e-4
    seconds |= {key: float(row[key]) for key in row if key.startswith("time/")}
    flags = f"--model {model} --lora {run} --resolution 128 --steps 3 --rewards jpeg --diversity none --num-prompts 1"
    more = f"--images-per-prompt 2 --prompts prompts/shapes_heldout.txt --out {tmp_path / 'out'} --gallery-mb 0"
    seconds["eval.py"] = call("eval.py", *flags.split(), *more.split())
    assert (tmp_path / "out" / "results.json").exists()
    print({key: round(value, 1) for key, value in seconds.items()})
