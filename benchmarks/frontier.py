"""How far a run moved from the reference, and how alike its images became: drift and diversity of every checkpoint.

    python benchmarks/frontier.py runs/NAME                   # an embedded model's run; writes runs/NAME/frontier.json

drift      sum over the steps of mean ||mu_theta - mu_ref||^2 along trajectories of the deterministic sampler, which
           has the same meaning for every method, whatever its own sampler, trained steps and units of KL are
diversity  1 - mean pairwise cosine of the images of one prompt in the embedded CLIP (rewards.py, diversity-clip)
Both on 32 held-out prompts x 4 images with the same noise for all.
"""

import argparse
import json
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import checkpoints  # noqa: E402
import common  # noqa: E402
import harness  # noqa: E402
from judges import diversity as judge  # noqa: E402

PROMPTS, EACH = 32, 4


def measure(policy, grid, prompts, noise, diversity) -> dict[str, float]:
    cond = policy.encode([p.text for p in prompts])
    path = common.rollout(policy, grid, cond, noise, 1.0, 64, desc="")
    drift, _ = common.path_distance(policy, grid, path, len(noise), 1.0, "mean")
    images = policy.decode(path.x[:, -1])
    return {"drift": drift.mean().item(), "diversity": sum(diversity(group) for group in images.split(EACH)) / PROMPTS}


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="run folder of one of the trainers on an embedded model")
    folder = parser.parse_args().run
    args = argparse.Namespace(**json.loads((folder / "args.json").read_text())["args"])
    if not args.model.startswith("tiny-"):
        parser.error(f"{folder} is a run of {args.model}; this benchmark measures the embedded models")
    args.model_path, args.backbone = harness.find_model(args.model)
    policy = harness.load_policy(args, harness.Run(folder, torch.device("cpu"), torch.float32, rank=0, world=1))
    grid = policy.grid(args.steps, "ode", 0.0)
    diversity = judge.load_diversity("diversity-clip", "cpu", str(ROOT / "tiny" / "clip"))
    prompts = [p for p in harness.load_prompts(args.eval_prompts)[:PROMPTS] for _ in range(EACH)]
    noise = common.sample_noise(0, "frontier", range(len(prompts)), grid.steps, policy.latent_shape, "cpu")
    found = {0: measure(policy, grid, prompts, noise, diversity)}
    for checkpoint in reversed(checkpoints.by_epoch(folder)):
        policy.pipe.load_lora_weights(str(checkpoint), adapter_name="measured")
        found[int(checkpoint.name[6:])] = measure(policy, grid, prompts, noise, diversity)
        policy.pipe.unload_lora_weights()
    checkpoints.write_json(folder / "frontier.json", found)


if __name__ == "__main__":
    main()
