"""How noisy is a method's gradient?  The policy gradients of independent epochs of 64 images at the untrained policy.

    python benchmarks/gradient_noise.py --presets tiny tiny-sd15 --batches 12

Runs the trainers themselves with the optimiser's step replaced by "keep the gradient", so nothing moves and every
epoch is an independent batch.  For gradients g_1 ... g_N: signal = mean of g_i . g_j over i != j, an unbiased estimate
of ||E g||^2; noise = mean ||g_i||^2 - signal.  signal / noise is the signal-to-noise ratio of one batch, and cosine =
signal / mean ||g_i||^2.  Standard errors are jackknifed over the batches.  Writes results/gradient_noise.json.
"""

import argparse
import contextlib
import importlib
import io
import json
import platform
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import common  # noqa: E402
from benchmarks.learning import PRESETS, VARIANTS  # noqa: E402

ON_POLICY = "--updates-per-epoch 1 --max-grad-norm 1e9 --eval-images 0 --sample-every 0 --save-every 0 --beta 0"
EXTRA = {"awm": "--offpolicy none", "awm-release": "", "nft": ""}


def gradients(preset: str, variant: str, batches: int, seed: int) -> torch.Tensor:
    """(N, parameters) float64: the gradient of each of N epochs at the untrained policy."""
    command, own, _ = VARIANTS[variant]
    script, *flags = f"{command} {own.get(preset, '')} {ON_POLICY} {EXTRA.get(variant, '')}".split()
    if variant.startswith("vmpo"):
        at = flags.index("--beta")
        del flags[at : at + 2]  # there it is the temperature, not the weight of a KL
    trainer = importlib.import_module(script.removesuffix(".py"))
    kept = []

    def keep(optimizer, params, max_norm, scaler=None):
        if optimizer.param_groups[0]["params"][0] is trained[0]:
            kept.append(torch.cat([p.grad.flatten().double() for p in params]))
        optimizer.zero_grad(set_to_none=True)
        return 0.0, True

    def watch(*given):
        trained[:] = add_lora(*given)
        return list(trained)

    trained, add_lora, step = [], common.add_lora, common.optimizer_step
    common.add_lora, common.optimizer_step = watch, keep
    try:
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            argv = ["--preset", preset, *flags, "--epochs", str(batches), "--seed", str(seed), "--runs", folder]
            trainer.main(trainer.parse_args(argv))
    finally:
        common.add_lora, common.optimizer_step = add_lora, step
    return torch.stack(kept)


def signal_and_cosine(g: torch.Tensor) -> tuple[float, float]:
    products = g @ g.T
    total = products.diagonal().mean()
    signal = (products.sum() - products.diagonal().sum()) / (len(g) * (len(g) - 1))
    return (signal / (total - signal)).item(), (signal / total).item()


def measure(g: torch.Tensor) -> dict[str, float]:
    value = torch.tensor(signal_and_cosine(g))
    left_out = torch.tensor([signal_and_cosine(torch.cat([g[:i], g[i + 1 :]])) for i in range(len(g))])
    n = len(g)
    error = ((n - 1) / n * ((left_out - left_out.mean(0)) ** 2).sum(0)) ** 0.5
    return {"snr": value[0].item(), "snr_se": error[0].item(), "cosine": value[1].item(), "cosine_se": error[1].item()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="+", choices=PRESETS, default=list(PRESETS))
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--batches", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results" / "gradient_noise.json")
    args = parser.parse_args()
    rows = json.loads(args.results.read_text())["rows"] if args.results.exists() else []
    print(
        "| preset | variant | signal-to-noise of one batch of 64 images | cosine of two batches |\n|---|---|---|---|"
    )
    for preset in args.presets:
        for variant in args.only:
            found = measure(gradients(preset, variant, args.batches, args.seed))
            row = {"preset": preset, "variant": variant, "batches": args.batches, "seed": args.seed} | found
            rows = [r for r in rows if (r["preset"], r["variant"]) != (preset, variant)] + [row]
            cells = [f"{found[key]:.4f} ± {found[f'{key}_se']:.4f}" for key in ("snr", "cosine")]
            print(f"| {preset} | `{variant}` | {cells[0]} | {cells[1]} |", flush=True)
            args.results.write_text(json.dumps({"machine": platform.machine(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
