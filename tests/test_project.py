"""The files around the code: workflow, pre-commit, Dockerfile, citation agree with each other."""

import re
import tomllib
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent
PINNED = dict(line.split("==") for line in (ROOT / "requirements.txt").read_text().splitlines() if "==" in line)
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def targets():
    return set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M))


def test_workflow_runs_what_a_contributor_runs():
    jobs = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]
    steps = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    assert set(re.findall(r"^make (\w+)", "\n".join(steps), re.M)) <= targets()
    oldest = PROJECT["project"]["requires-python"].removeprefix(">=")
    assert jobs["test"]["strategy"]["matrix"]["python"][0] == oldest and len(jobs["test"]["strategy"]["matrix"]) == 1
    assert f"Python ≥ {oldest}" in (ROOT / "README.md").read_text()


def test_one_version_of_ruff():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert [hook["rev"] for hook in hooks] == [f"v{PINNED['ruff']}"]


def test_the_tested_versions_are_within_the_ranges():
    def numbers(version):
        return [int(x) for x in version.split(".")[:2]] + [0]

    for requirement in PROJECT["project"]["dependencies"]:
        name, least = requirement.split(">=")
        assert numbers(PINNED[name])[:2] >= numbers(least)[:2], requirement


def test_the_container_makes_what_the_makefile_knows():
    text = (ROOT / "Dockerfile").read_text()
    assert ".venv/installed:" in (ROOT / "Makefile").read_text() and "make .venv/installed" in text
    assert re.search(r'^CMD \["make", "(\w+)"\]', text, re.M)[1] in targets()
    for name in re.search(r"^COPY (.*) \./", text, re.M)[1].split():
        assert (ROOT / name).exists()
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert not set(ignored) & {"tiny", "prompts", "judges"} and ".venv" in ignored


def test_citation():
    found = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= found.keys()
    assert found["version"] == PROJECT["project"]["version"]
