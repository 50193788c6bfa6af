"""Sample efficiency of the methods on the embedded models: several variants x models x seeds, one process each.

    python benchmarks/learning.py --seeds 0 1 2 3 4 --jobs 2             # everything, two runs at a time
    python benchmarks/learning.py --only vmpo-diff --epochs 50 --out /tmp/trial
    python benchmarks/learning.py --only grpo awm --time                 # seconds per epoch, one run at a time
    python benchmarks/learning.py --report                               # tables and figures of the committed results

Each run is a plain command (printed, and kept in the results); finished runs are not repeated and interrupted ones go
on.  Results are added to results/learning.json.  The report draws results/FAMILY_PRESET.png and fills in the tables of
README.md and docs/, each between a line <!-- learning PRESETS: VARIANTS -->, <!-- short PRESETS: VARIANTS --> or
<!-- claims --> and <!-- end -->.
Over seeds: the interquartile mean (Agarwal et al., NeurIPS 2021; of three seeds: the mean), its 95 % percentile
bootstrap interval, and for each claim the probability that a run of one method beats one of the other.
"""

import argparse
import csv
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy
from scipy import stats

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from eval_runs import interval, iqm  # noqa: E402

RELEASE = (
    "--sampler SASolverScheduler --sampler-noise 0.4 --weight ghuber --train-timesteps 6 --train-fraction 0.9 "
    "--skip-first --adv-norm global --adv-scale 5 --clip-range 1 --ratio exp-each --offpolicy none "
    "--updates-per-epoch 1 --beta 0.003 --lag-coef 1"
)
NFT = "--objective nft --offpolicy lagged --updates-per-epoch 1 --adv-norm global --beta 1e-4 --lag-decay-max 0.5"
VMPO = "vmpo.py --num-prompts 8 --micro-batch-size 64"
LEARNING = {  # name: command; flags of one preset only; epochs by preset (0: not there)
    "vmpo-r2g-group": (f"{VMPO} --potential r2g --mean group", {}, (200, 120)),
    "vmpo-r2g-amortised": (f"{VMPO} --potential r2g --mean time_prompt", {}, (200, 120)),
    "vmpo-diff": (f"{VMPO} --potential diff --mean group", {}, (200, 120)),
    "grpo": ("grpo.py", {}, (100, 60)),
    "grpo-2-updates": ("grpo.py --updates-per-epoch 2", {}, (100, 60)),  # as many as awm
    "dr-grpo": ("grpo.py --adv-norm none --beta 0.0125", {}, (100, 60)),
    "guard": ("grpo.py --loss guard", {"tiny": "--beta 0.5", "tiny-sd15": "--beta 0.3"}, (100, 60)),
    "pcpo": ("grpo.py --loss pcpo", {"tiny-sd15": "--pcpo-weights loss-only"}, (100, 60)),
    "awm": ("awm.py", {}, (100, 60)),
    "awm-release": (f"awm.py {RELEASE}", {}, (100, 60)),
    "nft": (f"awm.py {NFT}", {}, (100, 60)),
}
PRESETS = ("tiny", "tiny-sd15")
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
CLAIMS = [  # (better, worse, clock): what the papers say, where they say it of things that can be compared here
    ("vmpo-diff", "vmpo-r2g-group", "images"),  # VMPO Tables 1, 2
    ("vmpo-r2g-group", "grpo", "images"),
    ("awm", "grpo", "images"),  # AWM Tables 1, 2
    ("awm", "grpo-2-updates", "images"),
    ("awm-release", "awm", "images"),
    ("nft", "grpo", "images"),
    ("rsm-equalvar", "tempflow", "evaluations"),  # RSM Fig. 2-6
    ("rsm-lowsnr", "tempflow", "evaluations"),
    ("vgg-flow-rsm", "vgg-flow", "evaluations"),
    ("residual-db-rsm-1e-3", "residual-db-1e-3", "evaluations"),
]
CLOCKS = {
    "images": "images sampled",
    "evaluations": "network evaluations (with backward pass: 3)",
    "transitions": "passes with gradient",
    "seconds": "seconds on one idle core",
}
HELD_OUT = 512  # images of an evaluation
SHORT = (1, 2, 3, 6, 7, 8, 10, 11)  # columns of the README's table


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--presets", nargs="+", choices=PRESETS, default=list(PRESETS))
    parser.add_argument("--epochs", type=int, help="instead of the variant's; 300 for the plateau")
    parser.add_argument("--time", action="store_true", help="6 epochs of every variant alone: seconds per epoch")
    parser.add_argument("--report", action="store_true", help="tables and figures of the results there are, no runs")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "learning", help="where the run folders go")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results" / "learning.json")
    return parser.parse_args()


# ---- runs --------------------------------------------------------------------
def flags_of(preset, variant, epochs=None):
    command, extra, own = VARIANTS[variant]
    script, *flags = f"{command} {extra.get(preset, '')}".split()
    return script, ["--preset", preset, *flags, "--epochs", str(epochs or own[PRESETS.index(preset)])]


def start(*command) -> str:
    print(" ".join(["python", *command]), flush=True)
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *command], cwd=ROOT, env=env, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    return done.stdout


def rows_of(folder):
    with (folder / "metrics.csv").open(newline="") as f:
        return list(csv.DictReader(f))


def cost_of(preset, variant) -> dict[str, int]:
    """What an epoch costs by three of the clocks, from --dry-run."""
    script, flags = flags_of(preset, variant)
    sizes = dict(re.split(" {2,}", line, maxsplit=1) for line in start(script, *flags, "--dry-run").splitlines())
    kinds = r"(\d+) (in the rollout|of the|in the reward gradient|with gradient)"
    counts = re.findall(kinds, sizes["network evaluations per epoch"])
    images = "decodes and reward evaluations per epoch" if "children per image" in sizes else "samples per epoch"
    return {
        "images": int(sizes[images].split()[0]),
        "evaluations": sum(int(n) * (3 if "gradient" in what else 1) for n, what in counts),
        "transitions": sum(int(n) for n, what in counts if what == "with gradient"),
    }


def run(args, preset, variant, seed) -> dict:
    script, flags = flags_of(preset, variant, args.epochs)
    epochs, folder = int(flags[-1]), args.out / f"{preset}_{variant}_s{seed}"
    if not (folder / "eval" / f"epoch_{epochs:04d}.json").exists():  # a longer run holds the shorter one
        places = ["--runs", str(args.out), "--name", folder.name, "--sample-every", "0"]
        every = str(max(1, epochs // 10))
        more = ["--eval-images", str(HELD_OUT), "--eval-every", every, "--save-every", every, "--keep", "0"]
        if (folder / "checkpoints" / "last").exists():
            start(script, "--resume", str(folder), "--epochs", str(epochs))
        else:
            shutil.rmtree(folder, ignore_errors=True)
            start(script, *flags, "--seed", str(seed), *places, *more)
    row = {"preset": preset, "variant": variant, "seed": seed, "epochs": epochs, "held_out": HELD_OUT}
    both = [json.loads((folder / "eval" / f"epoch_{epoch:04d}.json").read_text()) for epoch in (0, epochs)]
    for name in (key for key in both[0] if key != "prompts"):
        before, after = (numpy.array(scores[name]) for scores in both)
        found = {"before": before.mean(), "after": after.mean(), "gain": (after - before).mean()}
        found["gain_se"] = (after - before).std(ddof=1) / len(before) ** 0.5
        for key, value in found.items():
            row.setdefault(key, {})[name] = float(value)
    rows = [r for r in rows_of(folder) if int(r["epoch"]) <= epochs]
    row["curve"] = [[int(r["epoch"]), float(r["eval/reward"])] for r in rows if r["eval/reward"]]
    if variant not in LEARNING:
        if not (folder / "frontier.json").exists():
            start("benchmarks/frontier.py", str(folder))
        row["frontier"] = json.loads((folder / "frontier.json").read_text())
    return row | {"command": " ".join(["python", script, *flags, "--seed", str(seed)])}


def seconds_per_epoch(args, preset, variant) -> float:
    """Median of the last 4 of 6 epochs' rollout + reward + update, on an otherwise idle machine."""
    script, flags = flags_of(preset, variant, 6)
    folder = args.out / f"time_{preset}_{variant}"
    shutil.rmtree(folder, ignore_errors=True)
    start(script, *flags, "--runs", str(args.out), "--name", folder.name, "--eval-images", "0")
    phases = ("rollout", "reward", "update")
    return float(numpy.median([sum(float(r[f"time/{k}"]) for k in phases) for r in rows_of(folder)[-4:]]))


# ---- statistics over seeds ---------------------------------------------------
def improvement(x, y, axis=-1):
    """P(X > Y) + P(X = Y) / 2 over all pairs of seeds: the Mann-Whitney statistic."""
    return stats.mannwhitneyu(x, y, axis=axis).statistic / (numpy.shape(x)[axis] * numpy.shape(y)[axis])


def said(statistic, *samples, sign="+") -> str:
    low, high = interval(statistic, *samples)
    return f"**{statistic(*map(numpy.array, samples)):{sign}.3f}** [{low:{sign}.3f}, {high:{sign}.3f}]"


class Results:
    """learning.json: runs, seconds and costs per epoch."""

    def __init__(self, path: Path):
        known = json.loads(path.read_text()) if path.exists() else {}
        self.path, self.runs = path, known.get("runs", [])
        self.costs = known.get("costs", {})  # {"PRESET VARIANT": {clock: of an epoch}}

    def of(self, preset, variant) -> list[dict]:
        """The runs with the most held-out images there are: others have another start."""
        runs = [r for r in self.runs if (r["preset"], r["variant"]) == (preset, variant)]
        most = max((r.get("held_out", 256) for r in runs), default=0)
        return [r for r in runs if r.get("held_out", 256) == most]

    def add(self, fresh: list[dict]) -> None:
        key = lambda r: (PRESETS.index(r["preset"]), list(VARIANTS).index(r["variant"]), r["seed"])  # noqa: E731
        self.runs = sorted(({key(r): r for r in [*self.runs, *fresh]}).values(), key=key)
        machine = f"{platform.machine()}, {os.cpu_count()} cores, one thread per run"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        content = {"machine": machine, "costs": self.costs, "runs": self.runs}
        self.path.write_text(json.dumps(content, indent=1) + "\n")

    def gains(self, preset, variant, clock: str, budget: float) -> list[float]:
        """Each seed's gain when `budget` was spent, interpolated between its evaluations."""
        cost, found = self.costs[f"{preset} {variant}"][clock], []
        for r in self.of(preset, variant):
            epochs, values = zip(*r["curve"])
            found.append(float(numpy.interp(budget / cost, epochs, values)) - values[0])
        return found

    def spent(self, preset, variant, clock: str) -> float:
        return min(r["epochs"] for r in self.of(preset, variant)) * self.costs[f"{preset} {variant}"].get(clock, 0)


# ---- report ------------------------------------------------------------------
def table(results, presets, variants, columns=range(15)) -> list[str]:
    """One line per preset and variant: four clocks, what was gained, and where it was measured drift and diversity."""
    chosen = lambda cells: "| " + " | ".join(cells[c] for c in columns) + " |"  # noqa: E731
    head = "preset | variant | seeds | images (k) | network evaluations (k) | passes with gradient (k) | s | "
    head += "reward before | gain | ± over images | strictly right before | gain | ± over images | drift | diversity"
    rows = [chosen(head.split(" | ")), "|" + "---|" * len(columns)]
    for preset, variant in ((p, v) for p in presets for v in variants if results.of(p, v)):
        runs, spent = results.of(preset, variant), [results.spent(preset, variant, clock) for clock in CLOCKS]
        cells = [preset, f"`{variant}`", str(len(runs)), *(f"{x / 1000:.1f}" for x in spent[:3])]
        cells.append(f"{spent[3]:.0f}" if spent[3] else "")
        for key in ("reward", "shapes-strict"):
            before, error = (numpy.mean([r[k][key] for r in runs]) for k in ("before", "gain_se"))
            cells += [f"{before:.3f}", said(iqm, [r["gain"][key] for r in runs]), f"{error:.3f}"]
        if "frontier" in runs[0]:
            ends = ["0", str(runs[0]["epochs"])]
            alike = " → ".join(f"{iqm([r['frontier'][e]['diversity'] for r in runs]):.3f}" for e in ends)
            cells += [f"{iqm([r['frontier'][ends[1]]['drift'] for r in runs]):.4f}", alike]
        rows.append(chosen(cells + [""] * (15 - len(cells))))
    return rows


def claims(results) -> list[str]:
    """Each claim at equal cost: the shorter method's whole length."""
    rows = ["| A > B | preset | at equal | A's gain | B's gain | P(a run of A beats one of B) |", "|" + "---|" * 6]
    for better, worse, clock in CLAIMS:
        for preset in (p for p in PRESETS if results.of(p, better) and results.of(p, worse)):
            budget = min(results.spent(preset, v, clock) for v in (better, worse))
            a, b = (results.gains(preset, v, clock, budget) for v in (better, worse))
            chance = said(improvement, a, b, sign="").replace("nan", "-")
            where = f"{clock} ({budget / 1000:.1f} k)"
            rows.append(
                f"| `{better}` > `{worse}` | {preset} | {where} | {said(iqm, a)} | {said(iqm, b)} | {chance} |"
            )
    return rows


def fill_in(results) -> None:
    """The tables between the marks in README.md and docs/."""
    mark = re.compile(r"<!-- ((learning|short) ([^:>]+): ([^>]+)|claims) -->\n.*?<!-- end -->", re.S)

    def filled(found):
        columns = SHORT if found[2] == "short" else range(15)
        of = found[1] != "claims" and (found[3].split(), found[4].split(), columns)
        rows = table(results, *of) if of else claims(results)
        return "\n".join([f"<!-- {found[1]} -->", *rows, "<!-- end -->"])

    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        text = page.read_text(encoding="utf-8")
        if (new := mark.sub(filled, text)) != text:
            page.write_text(new, encoding="utf-8")


def figure(results, family, preset) -> None:
    """Held-out reward by each clock, and by drift where it was measured: interquartile mean and interval."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = [v for v in FAMILIES[family] if results.of(preset, v)]
    if not shown:
        return
    panels, axes = pyplot.subplots(1, 4, figsize=(20, 4.6), sharey=True)
    labels = CLOCKS if family == "learning" else CLOCKS | {"transitions": "drift from the reference (frontier.py)"}
    for number, variant in enumerate(shown):
        runs, costs = results.of(preset, variant), results.costs[f"{preset} {variant}"]
        epochs = sorted(set.intersection(*({e for e, _ in r["curve"]} for r in runs)))
        values = [[dict(r["curve"])[e] for r in runs] for e in epochs]
        means, ends = [iqm(v) for v in values], [interval(iqm, v) for v in values]
        errors = [[m - low for m, (low, _) in zip(means, ends)], [high - m for m, (_, high) in zip(means, ends)]]
        style = dict(color=pyplot.cm.tab20(number), marker="osvD^<>Pxh*"[number], markersize=4, capsize=2)
        for axis, (clock, label) in zip(axes, labels.items()):
            x = [e * costs[clock] for e in epochs] if clock in costs else None
            if "drift" in label:
                x = [iqm([r["frontier"][str(e)]["drift"] for r in runs]) for e in epochs]
            if x:
                axis.errorbar(x, means, numpy.abs(errors), label=f"{variant} ({len(runs)})", **style)
            axis.set(xlabel=label)
            axis.grid(alpha=0.3)
    axes[0].set(ylabel="held-out reward", title=preset)
    axes[-1].legend(
        *axes[0].get_legend_handles_labels(),
        fontsize=8,
        title="variant (seeds)",
        loc="upper left",
        bbox_to_anchor=(1.01, 1),
    )
    panels.tight_layout()
    panels.savefig(results.path.parent / f"{family}_{preset}.png", dpi=80)
    pyplot.close(panels)


def main():
    args = parse_args()
    results = Results(args.results)
    pairs = [(p, v) for p in args.presets for v in args.only if VARIANTS[v][2][PRESETS.index(p)]]
    if args.time or not args.report:
        for preset, variant in pairs:
            cost = results.costs.setdefault(f"{preset} {variant}", {})
            cost |= cost_of(preset, variant)
            if args.time:
                cost["seconds"] = round(seconds_per_epoch(args, preset, variant), 3)
    fresh = []
    if not args.time and not args.report:
        jobs = [(p, v, s) for s in args.seeds for p, v in pairs]
        with ThreadPoolExecutor(args.jobs) as pool:
            fresh = list(pool.map(lambda job: run(args, *job), jobs))
    results.add(fresh)
    if args.results.resolve() == (ROOT / "benchmarks" / "results" / "learning.json"):
        fill_in(results)
    for family in FAMILIES:
        for preset in PRESETS:
            figure(results, family, preset)
    print(*table(results, args.presets, args.only), *claims(results), sep="\n")


if __name__ == "__main__":
    main()
