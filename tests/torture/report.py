"""The table that `make torture` prints: trials and what was wrong with them."""

LINES: dict[str, list[int]] = {}


def add(what: str, trials: int, wrong: int) -> None:
    found = LINES.setdefault(what, [0, 0])
    found[0] += trials
    found[1] += wrong


def table() -> str:
    lines = [f"| {what} | {trials} | {wrong} |" for what, (trials, wrong) in LINES.items()]
    total = [sum(values[j] for values in LINES.values()) for j in (0, 1)]
    return "\n".join(["| what | trials | wrong |", "|---|---|---|", *lines, f"| in all | {total[0]} | {total[1]} |"])
