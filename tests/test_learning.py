"""benchmarks/learning.py: statistics over seeds against their definitions; two numbers of the docs, computed anew."""

import itertools
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest

import awm
import first_order_rsm
import grpo
import tempflow_rsm
import vmpo
from benchmarks import learning

ROOT = Path(__file__).resolve().parent.parent
RUNS = json.loads((ROOT / "benchmarks" / "results" / "learning.json").read_text())["runs"]


def gains(preset, variant, key="reward"):
    return [r["gain"][key] for r in RUNS if (r["preset"], r["variant"]) == (preset, variant)]


def line(page, *starts):
    """The cells of the table's line that begins so."""
    rows = [[c.strip() for c in row.split("|")[1:-1]] for row in (ROOT / page).read_text().splitlines() if "|" in row]
    return next(row for row in rows if row[: len(starts)] == list(starts))


def test_interquartile_mean():
    x = np.random.default_rng(1).normal(size=8)
    assert learning.iqm(x) == pytest.approx(np.sort(x)[2:6].mean())
    assert learning.iqm([5.0, 1.0, 100.0, 2.0, -90.0]) == pytest.approx(8 / 3)
    assert learning.iqm([1.0, 2.0, 6.0]) == pytest.approx(3)  # of three: the mean


def test_probability_of_improvement():
    rng = np.random.default_rng(2)
    x, y = rng.integers(0, 5, 7), rng.integers(0, 5, 4)  # with ties
    pairs = [(a > b) + (a == b) / 2 for a, b in itertools.product(x, y)]
    assert learning.improvement(x, y) == pytest.approx(np.mean(pairs))
    assert learning.improvement([1.0, 2.0], [0.0]) == 1 and learning.improvement([0.0], [1.0, 2.0]) == 0


def test_interval_is_the_percentile_bootstrap():
    x = np.random.default_rng(3).normal(size=6)
    every = learning.iqm(np.array(list(itertools.product(x, repeat=6))))  # all 46,656 resamples
    wanted = np.percentile(every, [2.5, 97.5])
    assert learning.interval(learning.iqm, x) == pytest.approx(wanted, abs=0.1 * np.ptp(wanted))
    assert all(math.isnan(end) for end in learning.interval(learning.iqm, x[:1]))


def test_two_numbers_of_the_docs():
    """A gain of awm.md and a claim's probability, from the committed runs."""
    found = gains("tiny-sd15", "awm", "shapes-strict")
    assert len(found) == 3
    cell = line("docs/awm.md", "tiny-sd15", "`awm`")[-4]
    assert cell.startswith(f"**{np.mean(found):+.3f}** ")
    low, high = map(float, re.search(r"\[(.+), (.+)\]", cell).groups())
    assert min(found) - 1e-3 <= low < high <= max(found) + 1e-3
    better, worse = gains("tiny-sd15", "awm"), gains("tiny-sd15", "grpo-2-updates")  # 60 epochs each
    pairs = [a > b for a, b in itertools.product(better, worse)]
    chance = line("docs/awm.md", "`awm` > `grpo-2-updates`", "tiny-sd15")[-1]
    assert chance.startswith(f"**{np.mean(pairs):.3f}** ")


def test_the_docs_hold_what_the_report_says(tmp_path, monkeypatch):
    """A copy of the pages, their tables emptied, is filled in as they are."""
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    (tmp_path / "docs").mkdir()
    for page in pages:
        empty = re.sub(
            r"(<!-- (?:(?:learning|short) [^>]+|claims) -->\n).*?(<!-- end -->)", r"\1\2", page.read_text(), flags=re.S
        )
        (tmp_path / page.relative_to(ROOT)).write_text(empty)
    monkeypatch.setattr(learning, "ROOT", tmp_path)
    learning.fill_in(learning.Results(ROOT / "benchmarks" / "results" / "learning.json"))
    for page in pages:
        assert (tmp_path / page.relative_to(ROOT)).read_text() == page.read_text(), page


@pytest.mark.parametrize("variant", learning.VARIANTS)
def test_commands_are_complete(variant):
    """No variant depends on what a preset says of epochs; costs are there for what was run."""
    costs = json.loads((ROOT / "benchmarks" / "results" / "learning.json").read_text())["costs"]
    for preset, epochs in zip(learning.PRESETS, learning.VARIANTS[variant][2]):
        if epochs:
            assert learning.flags_of(preset, variant)[1][-2:] == ["--epochs", str(epochs)]
            assert {"images", "evaluations", "transitions"} <= costs[f"{preset} {variant}"].keys()


@pytest.mark.parametrize("script", [vmpo, awm, grpo, tempflow_rsm, first_order_rsm], ids=lambda s: s.__name__)
def test_demos_show_six_held_out_points(script):
    for name in (name for name in script.PRESETS if name.startswith("tiny")):
        preset = script.PRESETS[name]
        assert 1 + preset["epochs"] // preset["eval_every"] >= 6


def test_the_embedded_release_preset_is_the_benchmarks_variant():
    script, flags = learning.flags_of("tiny-sd15", "awm-release", 80)
    variant, preset = (vars(awm.parse_args(argv)) for argv in (flags, ["--preset", "tiny-sd15-release"]))
    own = {"preset", "argv", "changed", "note", "eval_every", "backbone", "prompt_list", "eval_prompt_list"}
    assert script == "awm.py" and {k for k in variant if variant[k] != preset[k]} <= own


def test_the_readmes_demo_is_the_committed_run():
    found = json.loads((ROOT / "benchmarks" / "results" / "demo_awm.json").read_text())
    cell = line("README.md", "`make demo` (AWM, released recipe)")[1]
    assert cell.startswith(f"**{found['after']['shapes-strict']:.3f}**".replace("0.", "."))
    assert f"{found['improved']['reward']} images improved, {found['worsened']['reward']} worsened" in cell
    vmpo_gains = np.array(gains("tiny-sd15", "vmpo-r2g-group", "shapes-strict"))
    before, cell = found["before"]["shapes-strict"], line("README.md", "`make demo METHOD=vmpo` (return-to-go)")[1]
    assert cell.startswith(f"{before + vmpo_gains.mean():.3f} ".removeprefix("0"))


def test_the_readmes_method_table_is_its_result_table():
    for script in ("vmpo", "awm", "grpo", "tempflow_rsm", "first_order_rsm"):
        cells = line("README.md", f"[`{script}.py`]({script}.py)")
        lines = len((ROOT / f"{script}.py").read_text().splitlines())
        assert abs(int(cells[1]) - lines) < 0.1 * lines, (script, lines)
        assert cells[4].strip("`") in __import__(script).PRESETS
        if script != "first_order_rsm":
            variant, gain = cells[5].split(" ", 1)
            row = line("README.md", variant)
            assert gain == f"{row[7].replace('*', '')} ({row[2]} k)"
