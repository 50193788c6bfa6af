"""docs/recipes.md from tests/golden/recipes.json: what each preset runs, where it stands, what differs and why.

    python -m benchmarks.recipes                           # writes docs/recipes.md
    python -m benchmarks.recipes --run                     # first runs each preset an epoch on a small random model
    python -m benchmarks.recipes --run awm nft-ocr         # or those of a script, or these
"""

import argparse
import contextlib
import csv
import importlib
import io
import json
import math
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import arguments  # noqa: E402
import common  # noqa: E402
import harness  # noqa: E402

RECIPES = ROOT / "tests" / "golden" / "recipes.json"
RUNS = ROOT / "benchmarks" / "results" / "recipes.json"  # what --run has found
BLOCKS = {"sd15": 1, "sd3.5-medium": 2, "flux.1-dev": 1}
LEVELS = {
    "V": "learning curve measured here",
    "R": "its flags ran an epoch on the real architecture, but with few, narrow blocks and random weights, 64 pixels, "
    "few images and a trivial reward (`benchmarks/results/recipes.json`): they fit together, no more",
    "N": "never run: parsed and checked against its source",
}
HEAD = """# Recipes

What each preset runs, value by value, with the place where it stands in the authors' code (at the commit named) or
paper. *Ours* is filled where the preset differs on purpose. Made by `python -m benchmarks.recipes` from
`tests/golden/recipes.json`, which `tests/test_recipes.py` holds against the presets: a changed default breaks that
test, not the recipe. A value without a source in code or paper is not listed.

Evidence: {levels}. The embedded presets `tiny` and `tiny-sd15` of all five scripts are V; their settings are ours
(docs of each method).
"""


def parsed(script, preset: str) -> dict:
    """{flag: value} of a preset as its run would have them, whether or not prompts and weights are here."""
    nothing = lambda *a, **k: None  # noqa: E731
    prompts = [common.Prompt(n, "a") for n in range(1000)]
    with (
        mock.patch.object(arguments, "load_prompts", lambda *a: prompts),
        mock.patch.object(arguments, "check_model", nothing),
        mock.patch.object(arguments, "require_hub", nothing),
        mock.patch.object(harness, "require_hub", nothing),
        mock.patch.object(script.rewards, "check_args", nothing),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        args = script.parse_args(["--preset", preset])
    values = {k: "inf" if v == float("inf") else v for k, v in vars(args).items()}
    return values | {"lora_targets": sorted(harness.lora_targets(args)), "note": args.note}


def level(name: str, preset: str) -> str:
    return "R" if preset in json.loads(RUNS.read_text()).get(name, {}) else "N"


def small(args) -> list[str]:
    """The flags that make a preset's run small: its method, steps and LoRA layers stay."""
    flags = dict(
        resolution=64, num_prompts=2, group_size=min(args.group_size, 2), micro_batch_size=8, reward="jpeg",
        prompts="prompts/hpdv2_photo.txt", epochs=1, eval_images=2, eval_steps=2, eval_rewards="",
        eval_prompts="prompts/benchmark_ir.txt", sample_every=0, device="cpu",
    )  # fmt: skip
    if vars(args).get("beta_warmup_epochs"):  # its first epoch has no reward
        flags |= dict(epochs=2)
    if args.kind == "eps":
        flags |= dict(dtype="float32")  # half-precision convolutions take minutes on a CPU
    if "guidance" in args:  # first_order_rsm.py
        flags |= dict(reward="clipscore", reward_path=str(ROOT / "tiny" / "clip"), tiny_vae="")
    return [word for key, value in flags.items() for word in ("--" + key.replace("_", "-"), str(value))]


def run(script, preset: str, models: Path) -> dict:
    """One small epoch of a preset -> how it was run; AssertionError unless all that is logged is finite."""
    from benchmarks import random_model

    with mock.patch.object(arguments, "check_model"), contextlib.redirect_stdout(io.StringIO()):
        given = parsed(script, preset)
    kind, folder = given["model"], models / given["model"]
    if not folder.exists():
        random_model.make(kind.removesuffix(".1-dev"), folder, BLOCKS[kind], small=True)
    flags = small(argparse.Namespace(**given))
    out, begin = tempfile.TemporaryDirectory(dir=models), time.time()
    with out, mock.patch.object(harness.Recorder, "finish"):
        place = ["--model", str(folder), "--runs", out.name, "--name", "run"]
        script.main(script.parse_args(["--preset", preset, *flags, *place]))
        rows = list(csv.DictReader((Path(out.name) / "run" / "metrics.csv").open(newline="")))
    # guidance/limit is inf where a preset clips nothing
    last = {key: float(value) for key, value in rows[-1].items() if value and key != "guidance/limit"}
    assert all(map(math.isfinite, last.values())) and last["grad/norm"] > 0 and not last["grad/bad_steps"], last
    start = {key: last[key] for key in ("ratio/start_deviation",) if key in last}
    what = {"model": f"{kind}, {BLOCKS[kind]} narrow block(s)", "flags": " ".join(flags)}
    return what | start | {"seconds": round(time.time() - begin)}


def run_all(names: list[str]) -> None:
    """--run: each preset that is named itself or by its script (none: all); keeps what ran in RUNS."""
    found = json.loads(RUNS.read_text()) if RUNS.exists() else {}
    with tempfile.TemporaryDirectory() as models:
        for name, presets in json.loads(RECIPES.read_text()).items():
            script, done = importlib.import_module(name), found.setdefault(name, {})
            for preset in [p for p in presets if not names or {name, p} & set(names)]:
                done.pop(preset, None)
                try:
                    done[preset] = run(script, preset, Path(models))
                except (Exception, SystemExit) as problem:
                    print(f"{name}.py --preset {preset}: {type(problem).__name__} {problem}", file=sys.stderr)
                RUNS.write_text(json.dumps(found, indent=1) + "\n")


def cell(value) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text.replace("|", "\\|")


def page() -> str:
    golden = json.loads(RECIPES.read_text())
    lines = [HEAD.format(levels="; ".join(f"**{k}** {v}" for k, v in LEVELS.items()))]
    lines += ["| script | preset | evidence | source | values | of them ours |", "|---|---|---|---|---|---|"]
    for name, presets in golden.items():
        for preset, entry in presets.items():
            where = entry["source"].get("repository") or entry["source"]["paper"]
            count, ours = len(entry["values"]), len(entry["ours"])
            anchor = f"[`{preset}`](#{name}py---preset-{preset})"
            lines.append(f"| `{name}.py` | {anchor} | {level(name, preset)} | {where} | {count} | {ours} |")
    for name, presets in golden.items():
        script = importlib.import_module(name)
        for preset, entry in presets.items():
            source = "; ".join(f"{k} {v}" for k, v in entry["source"].items())
            lines += ["", f"## {name}.py --preset {preset}", "", f"Source: {source}. Evidence: {level(name, preset)}."]
            if note := script.PRESETS[preset].get("note"):
                lines += ["", f"Note: {note}."]
            lines += ["", "| flag | value | where it stands | ours, and why |", "|---|---|---|---|"]
            for flag, (value, place) in entry["values"].items():
                mine = "; ".join(map(cell, entry["ours"][flag])) if flag in entry["ours"] else ""
                lines.append(f"| `{flag}` | {cell(value)} | {cell(place)} | {mine} |")
    return "\n".join(lines) + "\n"


def main(argv=None):
    parser = argparse.ArgumentParser(prog="recipes", description=__doc__.split("\n")[0])
    parser.add_argument("--run", nargs="*", metavar="NAME", help="scripts or presets; none: all")
    args = parser.parse_args(argv)
    if args.run is not None:
        run_all(args.run)
    (ROOT / "docs" / "recipes.md").write_text(page())


if __name__ == "__main__":
    main()
