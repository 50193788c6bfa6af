"""The table that `make torture` prints: trials and what was wrong with them, of all workers."""

import json
import tempfile
from pathlib import Path

FILE = Path(tempfile.gettempdir()) / "clean-diffusion-rl-torture.jsonl"


def add(what: str, trials: int, wrong: int) -> None:
    with FILE.open("a") as f:
        f.write(json.dumps([what, trials, int(wrong)]) + "\n")


def table() -> str:
    found: dict[str, list[int]] = {}
    for what, trials, wrong in map(json.loads, FILE.read_text().splitlines() if FILE.exists() else ()):
        sums = found.setdefault(what, [0, 0])
        sums[0], sums[1] = sums[0] + trials, sums[1] + wrong
    lines = [f"| {what} | {trials} | {wrong} |" for what, (trials, wrong) in sorted(found.items())]
    total = [sum(values[j] for values in found.values()) for j in (0, 1)]
    return "\n".join(["| what | trials | wrong |", "|---|---|---|", *lines, f"| in all | {total[0]} | {total[1]} |"])
