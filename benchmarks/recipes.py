"""docs/recipes.md from tests/golden/recipes.json: what each preset runs, where it stands, what differs and why.

    python -m benchmarks.recipes            # writes docs/recipes.md
"""

import contextlib
import importlib
import io
import json
import sys
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import common  # noqa: E402
import harness  # noqa: E402

RECIPES = ROOT / "tests" / "golden" / "recipes.json"
LEVELS = {
    "V": "learning curve measured here",
    "R": "run on the real architecture with random weights",
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
        mock.patch.object(harness, "load_prompts", lambda paths: prompts),
        mock.patch.object(harness, "check_model", nothing),
        mock.patch.object(harness, "require_hub", nothing),
        mock.patch.object(script.rewards, "check_args", nothing),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        args = script.parse_args(["--preset", preset])
    values = {k: "inf" if v == float("inf") else v for k, v in vars(args).items()}
    return values | {"lora_targets": sorted(harness.lora_targets(args)), "note": args.note}


def level(entry) -> str:
    return entry.get("level", "N")


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
            lines.append(f"| `{name}.py` | {anchor} | {level(entry)} | {where} | {count} | {ours} |")
    for name, presets in golden.items():
        script = importlib.import_module(name)
        for preset, entry in presets.items():
            source = "; ".join(f"{k} {v}" for k, v in entry["source"].items())
            lines += ["", f"## {name}.py --preset {preset}", "", f"Source: {source}. Evidence: {level(entry)}."]
            if note := script.PRESETS[preset].get("note"):
                lines += ["", f"Note: {note}."]
            lines += ["", "| flag | value | where it stands | ours, and why |", "|---|---|---|---|"]
            for flag, (value, place) in entry["values"].items():
                mine = "; ".join(map(cell, entry["ours"][flag])) if flag in entry["ours"] else ""
                lines.append(f"| `{flag}` | {cell(value)} | {cell(place)} | {mine} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    (ROOT / "docs" / "recipes.md").write_text(page())
