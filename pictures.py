"""What a run draws: captioned contact sheets and the learning curve."""

from pathlib import Path

from checkpoints import complete


def image_grid(images, captions: list[str], path: Path, columns: int = 8, pairs: bool = False, scores=None) -> None:
    """Captioned contact sheet (PNG) of images (N, 3, H, W).

    With `pairs`, images come as before, after, before, after, ...; `scores`, [(before, after), ...], are written under
    each pair and colour its frame: green where the score rose, red where it fell.
    """
    from PIL import Image, ImageDraw, ImageFont

    size = max(96, images.shape[-1]) if images.shape[-1] < 256 else 256
    font, line, gap, frame = ImageFont.load_default(11), 30, 4, 3
    parts = 2 if pairs else 1
    wide, high = parts * (size + gap) + 2 * frame + 4, size + line + 2 * frame + 4 + (14 if scores else 0)
    tiles = images.detach().cpu().mul(255).round().byte().permute(0, 2, 3, 1).numpy()
    sheet = Image.new("RGB", (columns * wide, -(-len(captions) // columns) * high), "white")
    pen = ImageDraw.Draw(sheet)
    for n, caption in enumerate(captions):
        x, y = n % columns * wide + frame, n // columns * high
        colour = "lightgray"
        if scores:
            old, new = scores[n]
            colour = "green" if new > old else "crimson" if new < old else "lightgray"
            ink = colour if new != old else "gray"
            pen.text((x + 2, y + line + size + frame + 2), f"{old:.2f} -> {new:.2f}", fill=ink, font=font)
        right, low = x + parts * (size + gap) - gap + frame - 1, y + line + size + frame - 1
        pen.rectangle((x - frame, y + line - frame, right, low), fill=colour)
        for k in range(parts):
            tile = Image.fromarray(tiles[n * parts + k])
            tile = tile.resize((size, size), Image.NEAREST if tile.width < size else Image.LANCZOS)
            sheet.paste(tile, (x + k * (size + gap), y + line))
        lines = [""]
        for word in caption.split():
            if font.getlength(lines[-1] + " " + word) > wide - 8 and lines[-1]:
                lines.append("")
            lines[-1] = (lines[-1] + " " + word).strip()
        pen.multiline_text((x, y), "\n".join(lines[:2]), fill="black", font=font, spacing=1)
    with complete(path) as temporary:
        sheet.save(temporary)


def plot_curve(rows: list[dict[str, float]], path: Path, title: str) -> None:
    """curve.png: the training reward per epoch and the held-out reward with its standard error."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(7, 4))
    train = [(r["epoch"], r["reward/mean"]) for r in rows if "reward/mean" in r]
    held = [(r["epoch"], r["eval/reward"], r["eval/reward_se"]) for r in rows if "eval/reward" in r]
    if train:
        axis.plot(*zip(*train), color="tab:blue", alpha=0.35, label="training rollouts")
        smooth, value = [], train[0][1]
        for _, reward in train:
            value = 0.9 * value + 0.1 * reward
            smooth.append(value)
        axis.plot([e for e, _ in train], smooth, color="tab:blue", label="smoothed")
    if held:
        axis.errorbar(*zip(*held), color="tab:orange", marker="o", capsize=3, label="held-out prompts, same noise")
    axis.set(xlabel="epoch", ylabel="reward", title=title)
    axis.legend()
    axis.grid(alpha=0.3)
    figure.tight_layout()
    with complete(path) as temporary:
        figure.savefig(temporary, dpi=110)
    pyplot.close(figure)
