"""Sample efficiency of the methods on the embedded models: several variants x models x seeds, one process each.

    python benchmarks/learning.py --seeds 0 1 2 --jobs 2                 # everything, two runs at a time
    python benchmarks/learning.py --only vmpo-diff --epochs 50 --out /tmp/trial

Each run is a plain command (printed, and kept in the results); finished runs are not repeated.  Writes
results/learning.json and prints the table of docs/vmpo.md.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VARIANTS = {
    "vmpo-r2g-group": "vmpo.py --potential r2g --mean group",
    "vmpo-r2g-amortised": "vmpo.py --potential r2g --mean time_prompt",
    "vmpo-diff": "vmpo.py --potential diff --mean group",
}
PRESETS = ("tiny", "tiny-sd15")


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--presets", nargs="+", choices=PRESETS, default=list(PRESETS))
    parser.add_argument("--epochs", type=int, help="instead of the preset's")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "learning", help="where the run folders go")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results" / "learning.json")
    return parser.parse_args()


def run(args, preset, variant, seed):
    script, *flags = VARIANTS[variant].split()
    name = f"{preset}_{variant}_s{seed}"
    command = [sys.executable, script, "--preset", preset, *flags, "--seed", str(seed)]
    command += ["--runs", str(args.out), "--name", name, "--sample-every", "0", "--eval-every", "50"]
    if args.epochs:
        command += ["--epochs", str(args.epochs)]
    summary = args.out / name / "summary.json"
    if (args.out / name / "checkpoints" / "last").exists():
        command = [sys.executable, script, "--resume", str(args.out / name)]  # an interrupted run goes on
    elif (args.out / name).exists():
        shutil.rmtree(args.out / name)
    if not summary.exists():
        print(" ".join(["python", *command[1:]]), flush=True)
        env = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{name} failed:\n{done.stderr[-3000:]}")
    result = json.loads(summary.read_text())
    shown = ["python", script, "--preset", preset, *flags, "--seed", str(seed)]
    if args.epochs:
        shown += ["--epochs", str(args.epochs)]
    return {"preset": preset, "variant": variant, **result, "command": " ".join(shown)}


def table(rows):
    """One line per preset and variant: means over seeds, and the gain's standard error over images and seeds."""
    print("| preset | variant | seeds | reward before | after | gain | strict before | after | gain | s per run |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for preset in PRESETS:
        for variant in VARIANTS:
            runs = [r for r in rows if r["preset"] == preset and r["variant"] == variant]
            if not runs:
                continue
            n, cells = len(runs), []
            for key in ("shapes", "shapes-strict"):
                before, after, gain = (sum(r[k][key] for r in runs) / n for k in ("before", "after", "gain"))
                error = sum(r["gain_se"][key] ** 2 for r in runs) ** 0.5 / n
                each = ", ".join(f"{r['gain'][key]:+.3f}" for r in runs)
                cells.append(f"{before:.3f} | {after:.3f} | **{gain:+.3f}** ± {error:.3f} ({each})")
            seconds = sum(r["seconds"] for r in runs) / n
            print(f"| {preset} | `{variant}` | {n} | {cells[0]} | {cells[1]} | {seconds:.0f} |")


def main():
    args = parse_args()
    jobs = [(p, v, s) for p in args.presets for v in args.only for s in args.seeds]
    with ThreadPoolExecutor(args.jobs) as pool:
        rows = list(pool.map(lambda job: run(args, *job), jobs))
    machine = f"{platform.machine()}, {os.cpu_count()} cores, one thread per run, {args.jobs} runs at a time"
    args.results.parent.mkdir(parents=True, exist_ok=True)
    args.results.write_text(json.dumps({"machine": machine, "runs": rows}, indent=1) + "\n")
    table(rows)


if __name__ == "__main__":
    main()
