"""Sample efficiency of the methods on the embedded models: several variants x models x seeds, one process each.

    python benchmarks/learning.py --seeds 0 1 2 --jobs 2                 # everything, two runs at a time
    python benchmarks/learning.py --only vmpo-diff --epochs 50 --out /tmp/trial
    python benchmarks/learning.py --only grpo awm --time                 # seconds per epoch, one run at a time

Each run is a plain command (printed, and kept in the results); finished runs are not repeated and interrupted ones go
on.  Results are added to results/learning.json; prints the tables of docs/ and draws results/learning_PRESET.png,
results/tempflow_PRESET.png and results/first_order_PRESET.png.
"""

import argparse
import csv
import functools
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
RELEASE = (
    "--sampler SASolverScheduler --sampler-noise 0.4 --weight ghuber --train-timesteps 6 --train-fraction 0.9 "
    "--skip-first --adv-norm global --adv-scale 5 --clip-range 1 --ratio exp-each --offpolicy none "
    "--updates-per-epoch 1 --beta 0.003 --lag-coef 1"
)
NFT = "--objective nft --offpolicy lagged --updates-per-epoch 1 --adv-norm global --beta 1e-4 --lag-decay-max 0.5"
LEARNING = {  # name: command; flags of one preset only; epochs by preset (None: the preset's own; 0: not there)
    "vmpo-r2g-group": ("vmpo.py --potential r2g --mean group", {}, None),
    "vmpo-r2g-amortised": ("vmpo.py --potential r2g --mean time_prompt", {}, None),
    "vmpo-diff": ("vmpo.py --potential diff --mean group", {}, None),
    "grpo": ("grpo.py", {}, (100, 60)),
    "grpo-2-updates": ("grpo.py --updates-per-epoch 2", {}, (100, 60)),  # as many as awm
    "dr-grpo": ("grpo.py --adv-norm none --beta 0.0125", {}, (100, 60)),
    "guard": ("grpo.py --loss guard", {"tiny": "--beta 0.5", "tiny-sd15": "--beta 0.3"}, (100, 60)),
    "pcpo": ("grpo.py --loss pcpo", {"tiny-sd15": "--pcpo-weights loss-only"}, (100, 60)),
    "awm": ("awm.py", {}, (100, 60)),
    "awm-release": (f"awm.py {RELEASE}", {}, (100, 60)),
    "nft": (
        f"awm.py {NFT}",
        {},
        (100, 60),
    ),
}
PRESETS = ("tiny", "tiny-sd15")
IMAGES = 64  # per epoch of the first family, in both presets
# Two more families, in which the unit of cost is not the image.  ours: a mean log ratio over 256 scalars spreads 16
# times as wide as over SD3.5's 65,536, hence the clip range; beta is the baseline's times the mean of sigma_t / dt.
BRANCH = "tempflow_rsm.py --lr 1e-3 --updates-per-epoch 2 --clip-range 1e-3"
RSM = f"{BRANCH} --loss hinge --reweight none --fair-clip guard"
RSM_BETA = {"tiny": 0.35, "tiny-sd15": 0.25}


def branching(tiny, sd15, *more):
    return {
        p: f"--profile {profile}" + "".join(f" {flag} {RSM_BETA[p]}" for flag in ("--beta", *more))
        for p, profile in zip(PRESETS, (tiny, sd15))
    }


TEMPFLOW = {
    "tempflow": (BRANCH, dict.fromkeys(PRESETS, "--profile 6,6,6,6,6,6,6,6,6"), (40, 60)),
    "rsm-uniform": (RSM, branching(*["7,7,7,7,7,7,6,6,0"] * 2), (40, 60)),
    "rsm-equalvar": (RSM, branching("4,5,5,6,7,8,9,10,0", "4,5,5,5,6,7,9,13,0"), (40, 60)),
    "rsm-lowsnr": (RSM, branching("6,6,8,10", "7,7,8,8", "--anchor-beta"), (60, 80)),
}
FIRST = "first_order_rsm.py --lr 4e-3"  # its presets are the redesigns
PRUNED_DB = "--method residual-db --guidance lookahead --temporal alpha-bar --residual-scale none"
FIRST_ORDER = {
    "vgg-flow": (f"{FIRST} --method vgg-flow --scale 150 --guidance current --temporal quad", {}, (60, 0)),
    "vgg-flow-rsm": (f"{FIRST} --method vgg-flow", {}, (120, 0)),
    "residual-db": (f"{FIRST} {PRUNED_DB}", {}, (0, 60)),
    "residual-db-rsm": (f"{FIRST} --method residual-db", {}, (0, 120)),
    "residual-db-1e-3": (f"first_order_rsm.py --lr 1e-3 {PRUNED_DB}", {}, (0, 60)),
    "residual-db-rsm-1e-3": ("first_order_rsm.py --lr 1e-3 --method residual-db", {}, (0, 120)),
    "sqdf": (
        f"{FIRST} --method sqdf --scale 1 --alpha 2.56 --residual-scale none --guidance lookahead "
        "--temporal gamma-discount",
        {},
        (60, 60),
    ),
    "sqdf-terminal": (
        f"{FIRST} --method sqdf --scale 1 --alpha 2.56 --residual-scale none --guidance terminal --temporal constant",
        {},
        (120, 120),
    ),
}
FAMILIES = {"learning": LEARNING, "tempflow": TEMPFLOW, "first_order": FIRST_ORDER}
VARIANTS = LEARNING | TEMPFLOW | FIRST_ORDER


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--presets", nargs="+", choices=PRESETS, default=list(PRESETS))
    parser.add_argument("--epochs", type=int, help="instead of the variant's")
    parser.add_argument(
        "--time", action="store_true", help="6 epochs of every variant alone: seconds per epoch (median of the last 4)"
    )
    parser.add_argument("--report", action="store_true", help="tables and figures of the results there are, no runs")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "learning", help="where the run folders go")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results" / "learning.json")
    return parser.parse_args()


def flags_of(preset, variant, epochs):
    command, extra, own = VARIANTS[variant]
    script, *flags = f"{command} {extra.get(preset, '')}".split()
    epochs = epochs or (own and own[PRESETS.index(preset)])
    return script, ["--preset", preset, *flags, *(["--epochs", str(epochs)] if epochs else [])]


def start(command):
    print(" ".join(["python", *command[1:]]), flush=True)
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")


def rows_of(folder):
    with (folder / "metrics.csv").open(newline="") as f:
        return list(csv.DictReader(f))


def scores_at(folder, epoch):
    """{reward: (images,) scores} of the held-out images after this epoch."""
    found = json.loads((folder / "eval" / f"epoch_{epoch:04d}.json").read_text())
    return {name: torch.tensor(values, dtype=torch.float64) for name, values in found.items() if name != "prompts"}


@functools.cache  # all seeds have the same
def evaluations(preset, variant):
    """Network evaluations of an epoch, by --dry-run; one with a backward pass counts as three."""
    script, flags = flags_of(preset, variant, None)
    done = subprocess.run(
        [sys.executable, script, *flags, "--dry-run"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    line = next(line for line in done.stdout.splitlines() if line.startswith("network evaluations"))
    counts = re.findall(r"(\d+) (in the rollout|of the|in the reward gradient|with gradient)", line)
    return sum(int(n) * (3 if "gradient" in what else 1) for n, what in counts)


def run(args, preset, variant, seed):
    script, flags = flags_of(preset, variant, args.epochs)
    folder = args.out / f"{preset}_{variant}_s{seed}"
    command = [sys.executable, script, *flags, "--seed", str(seed)]
    command += [
        "--runs",
        str(args.out),
        "--name",
        folder.name,
        "--sample-every",
        "0",
        "--eval-every",
        "20",
        "--save-every",
        "20",
        "--keep",
        "0",
    ]
    if (folder / "checkpoints" / "last").exists():
        command = [sys.executable, script, "--resume", str(folder)]  # an interrupted run goes on
    elif folder.exists():
        shutil.rmtree(folder)
    epochs = int(flags[flags.index("--epochs") + 1]) if "--epochs" in flags else None
    done = epochs and (folder / "eval" / f"epoch_{epochs:04d}.json").exists()  # a longer run holds the shorter one
    if not done and not (folder / "summary.json").exists():
        start(command)
    epochs = epochs or json.loads((folder / "summary.json").read_text())["epochs"]
    row = {
        "preset": preset,
        "variant": variant,
        "seed": seed,
        "epochs": epochs,
        "before": {},
        "after": {},
        "gain": {},
        "gain_se": {},
    }
    before, after = scores_at(folder, 0), scores_at(folder, epochs)
    for name in before:
        gain = after[name] - before[name]
        row["before"][name], row["after"][name] = before[name].mean().item(), after[name].mean().item()
        row["gain"][name], row["gain_se"][name] = gain.mean().item(), gain.std().item() / len(gain) ** 0.5
    rows = [r for r in rows_of(folder) if int(r["epoch"]) <= epochs]
    row["curve"] = [[int(r["epoch"]), float(r["eval/reward"])] for r in rows if r["eval/reward"]]
    if variant not in FAMILIES["learning"]:
        if not (folder / "frontier.json").exists():
            start([sys.executable, "benchmarks/frontier.py", str(folder)])
        row["frontier"] = json.loads((folder / "frontier.json").read_text())
        row["evaluations"] = evaluations(preset, variant)
    return row | {"command": " ".join(["python", script, *flags, "--seed", str(seed)])}


def seconds_per_epoch(args, preset, variant):
    """Median of the last 4 of 6 epochs' rollout + reward + update, on an otherwise idle machine."""
    script, flags = flags_of(preset, variant, 6)
    name = f"time_{preset}_{variant}"
    shutil.rmtree(args.out / name, ignore_errors=True)
    start(
        [
            sys.executable,
            script,
            *flags,
            "--runs",
            str(args.out),
            "--name",
            name,
            "--sample-every",
            "0",
            "--eval-images",
            "0",
        ]
    )
    spent = sorted(
        sum(float(r[f"time/{k}"]) for k in ("rollout", "reward", "update")) for r in rows_of(args.out / name)[-4:]
    )
    return (spent[1] + spent[2]) / 2


def mean_curve(runs):
    """[(epoch, mean reward over the seeds, standard error over the seeds)]."""
    points = []
    for epoch in sorted(set.intersection(*({e for e, _ in r["curve"]} for r in runs))):
        values = [v for r in runs for e, v in r["curve"] if e == epoch]
        mean = sum(values) / len(values)
        spread = (sum((v - mean) ** 2 for v in values) / max(1, len(values) - 1)) ** 0.5
        points.append((epoch, mean, spread / len(values) ** 0.5))
    return points


def epochs_to_reach(points, level):
    """First epoch at which the mean curve, interpolated linearly, is at `level`; None if it is never."""
    for (e0, v0, _), (e1, v1, _) in zip(points, points[1:]):
        if v1 >= level > v0 or v0 >= level:
            return e0 if v0 >= level else e0 + (e1 - e0) * (level - v0) / (v1 - v0)
    return None


def gain_of(runs, key) -> str:
    """Mean gain +- standard error over the seeds; that over the images, which all seeds share; every seed."""
    gains = [r["gain"][key] for r in runs]
    n, mean = len(gains), sum(gains) / len(gains)
    seeds = (sum((g - mean) ** 2 for g in gains) / (n - 1) / n) ** 0.5 if n > 1 else float("nan")
    images = sum(r["gain_se"][key] for r in runs) / n
    return f"**{mean:+.3f}** ± {seeds:.3f}; {images:.3f} ({', '.join(f'{g:+.3f}' for g in gains)})"


def table(rows, seconds):
    """One line per preset and variant: means over seeds."""
    print(
        "| preset | variant | seeds | epochs | reward before | after | gain ± over seeds; over images (each seed) "
        "| strict before | after | gain | s per epoch | epochs (s) to GRPO's final reward |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|---|")
    for preset in PRESETS:
        grpo = [r for r in rows if r["preset"] == preset and r["variant"] == "grpo" and r.get("curve")]
        goal = mean_curve(grpo)[-1][1] if grpo else None
        for variant in FAMILIES["learning"]:
            runs = [r for r in rows if r["preset"] == preset and r["variant"] == variant]
            if not runs:
                continue
            n, cells = len(runs), []
            for key in ("shapes", "shapes-strict"):
                before, after = (sum(r[k][key] for r in runs) / n for k in ("before", "after"))
                cells.append(f"{before:.3f} | {after:.3f} | {gain_of(runs, key)}")
            cost = seconds.get(f"{preset} {variant}")
            reached = epochs_to_reach(mean_curve(runs), goal) if goal and all(r.get("curve") for r in runs) else None
            when = "" if reached is None else f"{reached:.0f}" + (f" ({reached * cost:.0f})" if cost else "")
            print(
                f"| {preset} | `{variant}` | {n} | {runs[0]['epochs']} | {cells[0]} | {cells[1]} "
                f"| {f'{cost:.2f}' if cost else ''} | {when} |"
            )


def value_at(points, cost, budget):
    """(mean reward, standard error over the seeds), interpolated where `cost` an epoch adds up to `budget`."""
    where = budget / cost
    for (e0, v0, s0), (e1, v1, s1) in zip(points, points[1:]):
        if e0 <= where <= e1 * (1 + 1e-9):
            share = (where - e0) / (e1 - e0)
            return v0 + share * (v1 - v0), s0 + share * (s1 - s0)
    return None


def frontier_mean(runs, key):
    """[(epoch, mean over the seeds)] of drift or diversity."""
    epochs = sorted(set.intersection(*(set(map(int, r["frontier"])) for r in runs)))
    return [(e, sum(r["frontier"][str(e)][key] for r in runs) / len(runs)) for e in epochs]


def family_table(rows, seconds, family):
    """One line per preset and variant of a family whose unit of cost is the network evaluation or the second."""
    print(
        "| preset | variant | seeds | epochs | evaluations per epoch | s per epoch | reward before "
        "| gain ± over seeds; over images (each seed) | gain at equal evaluations | gain at equal time "
        "| strictly right, gain | drift | diversity |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|---|---|")
    for preset in PRESETS:
        found = {v: [r for r in rows if r["preset"] == preset and r["variant"] == v] for v in FAMILIES[family]}
        found = {v: runs for v, runs in found.items() if runs}
        times = {v: seconds.get(f"{preset} {v}") for v in found}
        least = min((runs[0]["epochs"] * runs[0]["evaluations"] for runs in found.values()), default=0)
        soonest = (
            min((runs[0]["epochs"] * times[v] for v, runs in found.items()), default=0)
            if all(times.values())
            else None
        )
        for variant, runs in found.items():
            n, points, first = len(runs), mean_curve(runs), runs[0]
            base, cells = points[0][1], []
            for cost, budget in ((first["evaluations"], least), (times[variant], soonest)):
                value = value_at(points, cost, budget) if budget else None
                cells.append(f"{value[0] - base:+.3f} ± {value[1]:.3f}" if value else "")
            drift, alike = (frontier_mean(runs, key) for key in ("drift", "diversity"))
            cost = f"{times[variant]:.2f}" if times[variant] else ""
            print(
                f"| {preset} | `{variant}` | {n} | {first['epochs']} | {first['evaluations']} | {cost} | {base:.3f} "
                f"| {gain_of(runs, 'reward')} | {cells[0]} | {cells[1]} | "
                f"{gain_of(runs, 'shapes-strict')} | {drift[-1][1]:.4f} | {alike[0][1]:.3f} → {alike[-1][1]:.3f} |"
            )


def family_figure(rows, seconds, family, preset, path):
    """Held-out reward against network evaluations, seconds and drift: mean and standard error over the seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels, axes = pyplot.subplots(1, 3, figsize=(17, 5), sharey=True)
    for number, variant in enumerate(FAMILIES[family]):
        runs = [r for r in rows if r["preset"] == preset and r["variant"] == variant]
        if not runs:
            continue
        epochs, means, errors = zip(*mean_curve(runs))
        style = dict(
            color=pyplot.cm.tab10(number),
            marker="osvD^<>P"[number],
            markersize=4,
            capsize=2,
            label=f"{variant} ({len(runs)})",
        )
        axes[0].errorbar([e * runs[0]["evaluations"] / 1000 for e in epochs], means, errors, **style)
        if cost := seconds.get(f"{preset} {variant}"):
            axes[1].errorbar([e * cost for e in epochs], means, errors, **style)
        drift = dict(frontier_mean(runs, "drift"))
        axes[2].errorbar([drift[e] for e in epochs], means, errors, **style)
    for axis, label in zip(
        axes,
        (
            "network evaluations (thousands; with backward pass: 3)",
            "seconds on one idle core",
            "drift from the reference (benchmarks/frontier.py)",
        ),
    ):
        axis.set(xlabel=label)
        axis.grid(alpha=0.3)
    axes[0].set(ylabel="held-out training reward, 256 images", title=preset)
    axes[0].legend(fontsize=8, title="variant (seeds)")
    panels.tight_layout()
    panels.savefig(path, dpi=80)
    pyplot.close(panels)


def figure(rows, seconds, preset, path):
    """Held-out reward against images and against seconds of an idle core, mean and standard error over the seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels, axes = pyplot.subplots(1, 2, figsize=(13, 5), sharey=True)
    for number, variant in enumerate(FAMILIES["learning"]):
        runs = [r for r in rows if r["preset"] == preset and r["variant"] == variant and r.get("curve")]
        if not runs:
            continue
        epochs, means, errors = zip(*mean_curve(runs))
        style = dict(
            color=pyplot.cm.tab20(number),
            marker="osvD^<>Pxh*"[number],
            markersize=4,
            capsize=2,
            label=f"{variant} ({len(runs)})",
        )
        axes[0].errorbar([e * IMAGES for e in epochs], means, errors, **style)
        if cost := seconds.get(f"{preset} {variant}"):
            axes[1].errorbar([e * cost for e in epochs], means, errors, **style)
    axes[0].set(
        xlabel="images sampled", ylabel="held-out reward (shapes), 256 images", title=f"{preset}: equal images"
    )
    axes[1].set(xlabel="seconds on one idle core", title="equal time")
    for axis in axes:
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8, title="variant (seeds)")
    panels.tight_layout()
    panels.savefig(path, dpi=100)
    pyplot.close(panels)


def main():
    args = parse_args()
    known = json.loads(args.results.read_text()) if args.results.exists() else {"runs": []}
    seconds = known.get("seconds_per_epoch", {})
    pairs = [
        (p, v) for p in args.presets for v in args.only if VARIANTS[v][2] is None or VARIANTS[v][2][PRESETS.index(p)]
    ]
    fresh = []
    if args.time:
        for preset, variant in pairs:
            seconds[f"{preset} {variant}"] = round(seconds_per_epoch(args, preset, variant), 3)
    elif not args.report:
        jobs = [(p, v, s) for s in args.seeds for p, v in pairs]
        with ThreadPoolExecutor(args.jobs) as pool:
            fresh = list(pool.map(lambda job: run(args, *job), jobs))
    taken = {(r["preset"], r["variant"], r["seed"]) for r in fresh}
    rows = fresh + [r for r in known["runs"] if (r["preset"], r["variant"], r["seed"]) not in taken]
    rows.sort(key=lambda r: (PRESETS.index(r["preset"]), list(VARIANTS).index(r["variant"]), r["seed"]))
    machine = f"{platform.machine()}, {os.cpu_count()} cores, one thread per run"
    args.results.parent.mkdir(parents=True, exist_ok=True)
    args.results.write_text(
        json.dumps({"machine": machine, "seconds_per_epoch": seconds, "runs": rows}, indent=1) + "\n"
    )
    table(rows, seconds)
    for preset in PRESETS:
        if any(r["preset"] == preset and r["variant"] in FAMILIES["learning"] and r.get("curve") for r in rows):
            figure(rows, seconds, preset, args.results.parent / f"learning_{preset}.png")
    for family in ("tempflow", "first_order"):
        print()
        family_table(rows, seconds, family)
        for preset in PRESETS:
            if any(r["preset"] == preset and r["variant"] in FAMILIES[family] for r in rows):
                family_figure(rows, seconds, family, preset, args.results.parent / f"{family}_{preset}.png")


if __name__ == "__main__":
    main()
