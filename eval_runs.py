"""What an evaluation takes from a run folder: its own settings as flags, and warnings where flags differ; and, for
--sweep, what many runs have measured themselves, the seeds of each setting together.
"""

import csv
import glob
import json
import textwrap
from pathlib import Path

import numpy

import checkpoints
import common
import eval_files
import harness
import rewards
from arguments import RESUMABLE
from harness import need

# of a run's args.json: what is taken over as it is
SAME = "reward_path resolution max_sequence_length model t5 dtype decode_batch_size reward_batch_size".split()
# what makes no other setting: seed, names, what changes no result, and what follows from the flags
ASIDE = RESUMABLE | {"seed", "name", "resume_or_start", "model_path", "kind", "train_steps", "widths"}


def run_settings(own: dict) -> dict:
    """A run's args.json -> its own evaluation as flags."""
    found = {name: own[name] for name in SAME}
    found |= {"steps": own["eval_steps"], "batch_size": own["micro_batch_size"]}
    found["cfg"] = own.get("eval_cfg", own["cfg"])
    if own["eval_kernel"] == "same":
        found |= {name: own[name] for name in ("kernel", "noise_level")}
    specs = [spec for spec in (own["reward"], own["eval_rewards"]) if spec and not rewards.is_grouped(spec)]
    names = dict.fromkeys(name for spec in specs for name, _ in rewards.parse_spec(spec))
    return found | dict(prompts=own["eval_prompts"] or own["prompts"], rewards=",".join(names))


def panel_defaults(args) -> dict:
    """--panel RUN: the run's own evaluation as flags, with K = 4 and --eval-images in all."""
    run = Path(args.panel)
    try:
        own = json.loads((run / "args.json").read_text())["args"]
        found, images = run_settings(own), own["eval_images"]
    except (OSError, ValueError, KeyError, TypeError) as problem:
        need(False, f"--panel {run} is no run folder ({problem!r}); give a trainer's, e.g. runs/NAME")
    need(not args.lora, f"--panel {run} evaluates the run's own checkpoints; leave --lora out")
    need(args.checkpoints > 0, f"--checkpoints {args.checkpoints} is too few; use 1 or more")
    epochs = [folder for folder in reversed(checkpoints.by_epoch(run)) if (folder / common.LORA_FILE).exists()]
    need(epochs, f"--panel {run} has no checkpoint yet; let it train longer")
    count = min(args.checkpoints, len(epochs))
    return found | dict(
        lora=[str(epochs[(i + 1) * len(epochs) // count - 1]) for i in range(count)],
        num_prompts=min(max(1, images // 4), len(harness.load_prompts(found["prompts"]))),
        images_per_prompt=4, diversity="diversity-clip", trained_on=own["reward"],
    )  # fmt: skip


def runs_of(args) -> dict[str, dict]:
    """{run folder: its flags} of those --lora that lie in one."""
    found = {}
    for given in args.lora:
        place = Path(given).absolute()
        for folder in (place, place.parent.parent, place.parent.parent.parent):  # RUN, its checkpoint, its file
            try:
                found[folder.name] = json.loads((folder / "args.json").read_text())["args"]
                break
            except (OSError, ValueError, KeyError, TypeError):
                continue
    return found


def lora_defaults(args) -> dict:
    """--lora RUN: model, sampler, prompts and rewards of its own evaluation; flags and presets win."""
    for own in runs_of(args).values():
        try:
            found = run_settings(own)
        except (KeyError, TypeError, common.UsageError, rewards.UsageError):  # of another version, or moved
            return {}
        return found if found["rewards"] else found | {"rewards": args.rewards}
    return {}


def differences(args) -> list[str]:
    """What the images are drawn with that neither the run's training nor its own evaluation had."""
    found = []
    for name, own in runs_of(args).items():
        for key in ("cfg", "resolution", "steps", "max_sequence_length"):
            trained, tested = own.get(key), own.get(f"eval_{key}", own.get(key))
            mine = getattr(args, key)
            if trained is not None and mine not in (trained, tested) and (args.kind == "flow" or "length" not in key):
                flag, also = "--" + key.replace("_", "-"), f" and evaluated at {tested}" * (tested != trained)
                found.append(f"warning: {flag} {mine}, but {name} was trained at {trained}{also}")
    return found


def own_paths(args, first, own: dict) -> None:
    """The run's --reward-path goes with the run's rewards: of others' they are left out."""
    if own and not first.reward_path:
        same, names = args.rewards == own["rewards"], {*args.rewards.split(","), args.diversity}
        paths = rewards.parse_paths(args.reward_path)
        kept = {name: path for name, path in paths.items() if name in names or not name and same}
        args.reward_path = [f"{name}={path}" if name else path for name, path in kept.items()]


def warn_of_differences(args) -> None:
    for line in differences(args):
        print(line)


# ---- statistics over seeds (SciPy is imported where it is used: --help need not wait for it) ----
def iqm(values, axis=-1):
    """Interquartile mean: of the middle half (Agarwal et al., NeurIPS 2021); of three: the mean."""
    from scipy import stats

    return stats.trim_mean(values, 0.25, axis=axis)


def interval(statistic, *samples) -> list:
    """95 % percentile bootstrap interval over the seeds (last axis); of three it is little more than their range."""
    from scipy import stats

    if min(numpy.shape(sample)[-1] for sample in samples) < 2:
        return [float("nan")] * 2
    options = dict(n_resamples=4000, method="percentile", axis=-1, rng=numpy.random.default_rng(0))
    return list(stats.bootstrap(samples, statistic, **options).confidence_interval)


def over_seeds(values) -> dict:
    """(..., seeds) -> {iqm, interval: [low, high], or None of one seed}."""
    ends = [end.tolist() for end in interval(iqm, values)] if values.shape[-1] > 1 else None
    return {"iqm": iqm(values).tolist(), "interval": ends}


# ---- --sweep: the seeds of each setting --------------------------------------
def check_sweep(parser, args) -> None:
    """No flag is given beside it and --out: nothing is drawn or scored anew."""
    given = [k for k, v in vars(args).items() if k not in ("sweep", "out") and v != parser.get_default(k)]
    odd = ", ".join("--" + key.replace("_", "-") for key in given)
    need(not given, f"--sweep shows what the runs have measured themselves; leave {odd} out")


def read_run(folder: Path) -> tuple[dict, dict]:
    """What decides its results but the seed; and the run, with its held-out rewards {epoch: mean} so far."""
    try:
        saved = json.loads((folder / "args.json").read_text())
        own = {"method": saved["method"]} | saved["args"]
        own |= {key: str(own[key]) for key in ("prompts", "eval_prompts", "reward")}
        run = dict(folder=str(folder), seed=int(own["seed"]), finished=harness.finished(folder, own["epochs"]))
        for kind, name, _, content in saved.get("sources", []):  # a file is the same wherever it lies, until edited
            for key in ("prompts", "eval_prompts", "reward") if kind != "model" else ():
                own[key] = own[key].replace(name, f"{Path(name).name} ({content[:6]})")
        text = log.read_text() if (log := folder / "metrics.csv").exists() else ""
        rows = csv.DictReader(text[: text.rfind("\n") + 1].splitlines())  # a running run may be writing its last line
        known = (row for row in rows if row.get("eval/reward") not in (None, "", "nan"))
        run["curve"] = {int(row["epoch"]): float(row["eval/reward"]) for row in known}
    except (OSError, ValueError, KeyError, TypeError) as problem:
        need(False, f"--sweep {folder} is no run folder ({problem!r}); give trainers', e.g. 'runs/vmpo_*'")
    return {k: v for k, v in own.items() if k not in ASIDE}, run


def groups_of(args, notes: list[str]) -> list[tuple[dict, list[dict]]]:
    """Each setting with its runs; `notes` gets which runs are left out, and why."""
    found, groups = {}, {}
    for given in args.sweep:
        places = [given] if Path(given).exists() else sorted(glob.glob(given))
        need(places, f"--sweep {given} matches nothing; give run folders or a glob, e.g. 'runs/vmpo_*'")
        found |= dict.fromkeys(map(Path, places))
    runs = map(read_run, found)
    for own, run in sorted(runs, key=lambda pair: -max(pair[1]["curve"], default=0)):  # the longest of a seed's counts
        if not {0} < run["curve"].keys():
            notes.append(f"{run['folder']} is left out: no held-out evaluation before and after training (yet)")
            continue
        _, seeds = groups.setdefault(json.dumps(own, sort_keys=True), (own, {}))
        if (first := seeds.setdefault(run["seed"], run)) is not run:
            notes.append(f"{run['folder']} is left out: settings and seed are those of {first['folder']}")
    none = f"--sweep {' '.join(args.sweep)}: no run has held-out evaluations before and after training"
    need(groups, f"{none}; let them go on, or train with --eval-images 64")
    held_out = {own["reward"]: next(iter(seeds.values()))["folder"] for own, seeds in groups.values()}
    listed = ", ".join(f"{reward} ({folder})" for reward, folder in held_out.items())
    need(len(held_out) == 1, f"--sweep: the runs hold out different rewards: {listed}; give those of one reward")
    return [(own, [seeds[seed] for seed in sorted(seeds)]) for own, seeds in groups.values()]


def as_flag(key: str, value) -> str:
    if key == "method":
        return value
    flag, words = key.replace("_", "-"), value if isinstance(value, list) else [value]
    return f"--{'no-' * (not value)}{flag}" if isinstance(value, bool) else " ".join([f"--{flag}", *map(str, words)])


def names_of(settings: list[dict]) -> list[str]:
    """For each the method and flags in which they differ; a flag that only another method has is no difference."""
    known, names = {(s["method"], key) for s in settings for key in s}, [[] for _ in settings]
    for key in dict.fromkeys(key for s in settings for key in s):
        texts = {n: as_flag(key, s.get(key)) for n, s in enumerate(settings) if (s["method"], key) in known}
        for n, text in texts.items() if len(set(texts.values())) > 1 else ():
            names[n].append(text)
    return [" ".join(words) or s["method"] for words, s in zip(names, settings)]


def sweep(args) -> None:
    """The table, sweep.json and sweep.png; the largest gain comes first."""
    notes, found = [], []
    groups = groups_of(args, notes)
    for name, (own, runs) in zip(names_of([own for own, _ in groups]), groups):
        epochs = sorted(set.intersection(*(set(run["curve"]) for run in runs)))
        listed = ", ".join(f"{run['folder']} (epoch {max(run['curve'])})" for run in runs)
        need(len(epochs) > 1, f"--sweep: no epoch after 0 was evaluated in all of {listed}; give them one by one")
        if any(len(run["curve"]) > len(epochs) for run in runs):
            ends = sorted(max(run["curve"]) for run in runs)
            notes.append(f"{name}: runs of {ends[0]} to {ends[-1]} epochs; taken are the evaluations that all have")
        values = numpy.array([[run["curve"][epoch] for run in runs] for epoch in epochs])  # (epochs, seeds)
        curve, last, gain = map(over_seeds, (values, values[-1], values[-1] - values[0]))
        found.append(dict(name=name, epochs=epochs, gain=gain, last=last, curve=curve, runs=runs, settings=own))
    found.sort(key=lambda entry: -entry["gain"]["iqm"])
    if len({entry["epochs"][-1] for entry in found}) > 1:
        notes.append("the settings' last epochs differ: compare the curves at the same one")
    out = Path(args.out or f"evals/sweep_{eval_files.digest(args.sweep)}")
    harness.need_writable("--out", out)
    out.mkdir(parents=True, exist_ok=True)
    checkpoints.write_json(out / "sweep.json", dict(command=args.command, notes=notes, settings=found))
    draw_sweep(found, out / "sweep.png")
    print(sweep_table(found), *(f"note: {note}" for note in notes), *sorted(out.glob("sweep.*")), sep="\n")


def sweep_table(found: list[dict]) -> str:
    def cell(entry, sign=""):
        ends = [f"{end:{sign}.4f}" for end in entry["interval"] or ()]
        return f"{entry['iqm']:{sign}.4f} " + (f"[{', '.join(ends)}]" if ends else "(1 seed)")

    rows = [["setting", "seeds", "finished", "epoch", "held-out reward", "gain"]]
    for entry in found:
        counts = len(entry["runs"]), sum(run["finished"] for run in entry["runs"]), entry["epochs"][-1]
        rows.append([entry["name"], *map(str, counts), cell(entry["last"]), cell(entry["gain"], "+")])
    return f"{eval_files.aligned(rows)}\ninterquartile mean over the seeds [95 % bootstrap interval]"


def draw_sweep(found: list[dict], path: Path) -> None:
    """sweep.png: every setting's held-out curve and its interval."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure  # without pyplot: no backend to choose, nothing to close

    figure = Figure(figsize=(8, 4.8))
    axis = figure.add_subplot(xlabel="epoch", ylabel=f"held-out reward: {found[0]['settings']['reward']}")
    for n, entry in enumerate(found):
        colour, seeds = colormaps["tab10" if len(found) <= 10 else "tab20"](n % 20), len(entry["runs"])
        label = textwrap.fill(f"{entry['name']}: {seeds} seed{'s' * (seeds > 1)}", 60, break_on_hyphens=False)
        axis.plot(entry["epochs"], entry["curve"]["iqm"], marker="osvD^<>Pxh*"[n % 11], color=colour, label=label)
        if ends := entry["curve"]["interval"]:
            axis.fill_between(entry["epochs"], *ends, color=colour, alpha=0.2, linewidth=0)
    axis.set_title("interquartile mean over the seeds, 95 % bootstrap interval", fontsize=10)
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1))  # beside the plot: it hides no curve
    axis.grid(alpha=0.3)
    with checkpoints.complete(path) as temporary:
        figure.savefig(temporary, dpi=120, bbox_inches="tight")
