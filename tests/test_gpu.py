"""What only a GPU can show: benchmarks/gpu_day.sh runs these."""

import csv
import importlib

import pytest
import torch

import harness

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
SMALL = "--num-prompts 2 --group-size 2 --steps 4 --epochs 1 --eval-images 2 --sample-every 0 --micro-batch-size 2"
CLIP = f"--reward clipscore --reward-path {harness.HERE / 'tiny' / 'clip'} --eval-rewards="


@pytest.mark.parametrize("more", ["", "--offload-rollout --offload-text-encoders", "--dtype bfloat16"])
@pytest.mark.parametrize("script", ["vmpo", "awm", "grpo", "tempflow_rsm", "first_order_rsm"])
def test_a_gpu_draws_and_rewards_what_a_cpu_does(tmp_path, script, more):
    trainer, found = importlib.import_module(script), {}
    for device in ("cpu", "cuda"):
        flags = [*SMALL.split(), *CLIP.split(), *(more.split() if device == "cuda" else ())]
        argv = ["--preset", "tiny", *flags, "--device", device, "--runs", str(tmp_path), "--name", device]
        trainer.main(trainer.parse_args(argv))
        with (tmp_path / device / "metrics.csv").open(newline="") as f:
            found[device] = list(csv.DictReader(f))[-1]
    for key in ("reward/mean", "grad/norm"):
        close = pytest.approx(float(found["cpu"][key]), rel=0.2 if key == "grad/norm" else 0.02)
        assert float(found["cuda"][key]) == close, key
