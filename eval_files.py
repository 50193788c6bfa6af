"""What lies in the folder of an evaluation: images/, scores.jsonl, results, grid.png, gallery.html, panel.png.

files: {model: PNG files}, row r is image r % K of prompt r // K; scores: {model: {reward: (P, K), diversity: (P, 1)}};
the base model comes first.
"""

import hashlib
import json
import math
from itertools import accumulate
from pathlib import Path

import checkpoints
import harness
import pictures
import rewards

OVER_TAGS = "geneval"  # official: each tag counts the same, however many prompts it has


# ---- images and scores -------------------------------------------------------
def digest(*parts) -> str:
    """12 hexadecimal digits for anything that JSON can hold."""
    return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=6).hexdigest()


def wanted(args) -> tuple[dict, dict]:
    """All that an evaluation consists of, there or not: files, and {model: {reward: [(image, reward, key), ...]}}.
    A file's name holds all that its pixels depend on; under these three a score stands in scores.jsonl.
    """
    K, files, ids = args.images_per_prompt, {}, {}
    prompts = [prompt for prompt in args.prompt_list for _ in range(K)]
    ends = [f"{r // K:05d}-{r % K:02d}_{digest(p.text)[:8]}" for r, p in enumerate(prompts)]
    extra = [f"-{digest(p.metadata)}" if p.metadata else "" for p in prompts]
    for label, folder in args.folders.items():
        names, ids[label] = [f"{folder}/{end}" for end in ends], {}
        files[label] = [Path(args.out, "images", f"{name}.png") for name in names]
        for reward, key in args.reward_keys.items():
            ids[label][reward] = [(name, reward, key + more) for name, more in zip(names, extra)]
            if reward == args.diversity:  # one for each prompt, of its K images
                ids[label][reward] = [(f"{name} x{K}", reward, key) for name in names[::K]]
    return files, ids


def load_scores(args) -> dict[tuple[str, str, str], float]:
    """{(image, reward, key): score} of scores.jsonl."""
    scores, path = {}, Path(args.out, "scores.jsonl")
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else "\n"
    for line in text.split("\n"):
        try:
            row = json.loads(line)
            score = float(row["score"])
            if math.isfinite(score):
                scores[row["of"], row["reward"], row["key"]] = score
        except (ValueError, KeyError, TypeError):  # the end, a line that a kill cut off, or a damaged one
            continue
    if not text.endswith("\n"):
        with path.open("a") as f:
            f.write("\n")  # or the next line would be lost with the torn one
    return scores


def add_scores(args, scores: dict, new: dict) -> None:
    with Path(args.out, "scores.jsonl").open("a", encoding="utf-8") as f:
        for id, score in new.items():
            f.write(json.dumps(dict(zip(("of", "reward", "key"), id), score=score)) + "\n")
    scores.update(new)


# ---- results -----------------------------------------------------------------
def table(summary: dict) -> str:
    """Markdown with aligned columns: for the terminal and results.md alike."""

    def cell(value, error, sign=""):
        return f"{value:{sign}.4f} ± " + ("-" if error is None else f"{error:.4f}")

    rows = [["", *summary["base"]]]
    for model, terms in summary.items():
        rows.append([model, *(cell(e["mean"], e["se"]) for e in terms.values())])
        if model != "base":
            gains = (cell(e["difference"], e["difference_se"], "+") for e in terms.values())
            rows.append([f"{model} - base", *gains])
    return aligned(rows)


def aligned(rows: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows)]
    rows.insert(1, ["-" * w for w in widths])
    return "\n".join("| " + " | ".join(c.ljust(w) for c, w in zip(row, widths)) + " |" for row in rows)


def tables(summary, by_tag) -> str:
    """The summary, and for the reward that is averaged over tags a table of them."""
    parts = [table(summary)]
    if by_tag and OVER_TAGS in summary["base"]:
        tags = {m: {tag: part[m][OVER_TAGS] for tag, part in by_tag.items()} for m in summary}
        columns = {m: tags[m] | {"overall": summary[m][OVER_TAGS]} for m in summary}
        parts += [f"{OVER_TAGS} by tag:", table(columns)]
    return "\n\n".join(parts)


def write_results(args, files, scores, summary, by_tag, note: str, dtype) -> None:
    """results.md, then results.json: once that is there, the folder is complete."""
    out, K = Path(args.out), args.images_per_prompt
    loras = {label: str(file.resolve()) for label, file in args.lora_files.items()}  # last -> epoch_NNNN
    listed = "".join(f"- {label}: `{file}`\n" for label, file in loras.items())
    text = f"{tables(summary, by_tag)}\n\n{note}\n\n{listed}\n```\n{args.command}\n```\n"
    (out / "results.md").write_text(text, encoding="utf-8")
    per_prompt = []
    for p, prompt in enumerate(args.prompt_list):
        of = slice(p * K, (p + 1) * K)
        per_prompt.append({
            "prompt": prompt.id, "text": prompt.text, "metadata": prompt.metadata,
            "mean": {m: {r: v[p].mean().item() for r, v in terms.items()} for m, terms in scores.items()},
            "images": {m: {r: terms[r][p].tolist() for r in args.reward_names} for m, terms in scores.items()},
            "files": {m: [str(file.relative_to(out)) for file in every[of]] for m, every in files.items()},
        })  # fmt: skip
    skip = harness.DERIVED | {"command", "lora_files", "lora_targets", "folders", "key", "trained_on"}
    settings = {k: v for k, v in vars(args).items() if k not in skip} | {"dtype": str(dtype).removeprefix("torch.")}
    checkpoints.write_json(out / "results.json", {
        "note": note, "command": args.command, "key": args.key, "summary": summary, "tags": by_tag, "loras": loras,
        "settings": settings, "versions": harness.versions(), "per_prompt": per_prompt,
    })  # fmt: skip


def write_pictures(args, files, scores, summary, note: str) -> None:
    """grid.png: pairs of before and after for one LoRA, otherwise a row for each model; and the gallery."""
    out, prompts = Path(args.out), args.prompt_list
    if args.grid_prompts:
        texts = [p.text for p in prompts[: args.grid_prompts]]
        first = [of[:: args.images_per_prompt][: len(texts)] for of in files.values()]
        pairs = len(first) == 2
        images = pictures.read_images([file for row in (zip(*first) if pairs else first) for file in row])
        captions = texts if pairs else [f"{label}: {text}" for label in files for text in texts]
        columns = min(4, len(texts)) if pairs else len(texts)
        pictures.image_grid(images, captions, out / "grid.png", columns, pairs)
    if args.gallery_mb:
        shown = [Path(args.panel).name] if args.panel else args.lora_files
        head = dict(note=note, command=args.command, rewards=args.reward_names, summary=summary)
        head["title"] = " · ".join([args.model, *shown])
        pictures.write_gallery(out / "gallery.html", head, prompts, files, scores, args.gallery_mb)


# ---- panel.png: is the reward being hacked? ----------------------------------
def draw_panel(data: dict, path: Path) -> None:
    """One axis each: training reward, every held-out score, diversity, KL.  data: panel.json, see docs/eval.md.
    The bars are the standard errors of the paired differences to the base model, whose own value is dashed.
    """
    from matplotlib.figure import Figure  # without pyplot: no backend to choose, nothing to close

    held_out, declines, kl = data["held_out"], data["declines"], data["training"]["kl/ref"]
    trained = [name for name, _ in rewards.parse_spec(data["reward"])]
    count = 1 + len(held_out) + bool(kl)
    wide, high = min(3, count), -(-count // 3)
    figure = Figure(figsize=(4.2 * wide, 2.9 * high), layout="tight")
    axes = [figure.add_subplot(high, wide, 1)]
    axes += [figure.add_subplot(high, wide, n, sharex=axes[0]) for n in range(2, count + 1)]
    x, y = zip(*data["training"]["reward/mean"])
    axes[0].plot(x, y, color="tab:blue", alpha=0.3)
    axes[0].plot(x, list(accumulate(y, lambda old, new: 0.9 * old + 0.1 * new)), color="tab:blue")
    titles = [f"training reward: {data['reward']}"]
    for axis, (name, values) in zip(axes[1:], held_out.items()):
        axis.axhline(values["mean"][0], color="gray", linestyle="--", linewidth=1)
        look = dict(color="tab:blue" if name in trained else "tab:orange", marker="o", capsize=3)
        axis.errorbar(data["epochs"], values["mean"], [se or 0 for se in values["difference_se"]], **look)
        titles.append(f"{name}, held-out prompts" + " (trained on)" * (name in trained))
        if name in declines:
            axis.axvspan(declines[name]["best_epoch"], data["epochs"][-1], color="tab:red", alpha=0.12)
            titles[-1] += "\nfalls after its best checkpoint"
    if kl:
        axes[-1].plot(*zip(*kl), color="tab:purple")
        titles.append("KL to the base model, training rollouts (kl/ref)")
    for axis, title in zip(axes, titles):
        axis.grid(alpha=0.3)
        axis.set_xlabel("epoch")
        axis.set_title(title, fontsize=10)
    bars = "(bars: ± standard error of the difference to the base model, same noise)"
    title = f"{data['run']}: does the training reward rise at the cost of the rest?   {bars}"
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=120)
