"""What a run draws: captioned contact sheets, the learning curve, the gallery page."""

import base64
import io
import json
import textwrap
from pathlib import Path

import numpy
import torch
from PIL import Image, ImageDraw, ImageFont, features

from checkpoints import complete

TEMPLATE = Path(__file__).resolve().parent / "eval_gallery.html"


# ---- PNG files ---------------------------------------------------------------
def as_uint8(images: torch.Tensor) -> numpy.ndarray:
    """(N, 3, H, W) in [0, 1] -> (N, H, W, 3) uint8."""
    return images.detach().cpu().mul(255).round().byte().permute(0, 2, 3, 1).numpy()


def save_image(pixels: numpy.ndarray, path: Path) -> None:
    """(H, W, 3) uint8 -> PNG, complete or absent."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with complete(path) as temporary:
        Image.fromarray(pixels).save(temporary, format="PNG")


def read_images(paths: list[Path]) -> torch.Tensor:
    """PNG files of one size -> (N, 3, H, W) float32 in [0, 1]; OSError names the file that is none."""
    images = []
    for path in paths:
        try:
            images.append(numpy.array(Image.open(path).convert("RGB")))
        except (OSError, ValueError, SyntaxError) as problem:  # whatever Pillow makes of damaged bytes
            raise OSError(f"{path} cannot be read ({problem}); delete it") from None
    return torch.from_numpy(numpy.stack(images)).permute(0, 3, 1, 2) / 255


# ---- contact sheets ----------------------------------------------------------
def image_grid(images, captions: list[str], path: Path, columns: int = 8, pairs: bool = False) -> None:
    """Captioned contact sheet (PNG) of images (N, 3, H, W); with `pairs`: before, after, before, after, ..."""
    save_image(numpy.asarray(contact_sheet(images, captions, columns, pairs)), path)


def stacked_sheets(parts: list[tuple], path: Path, columns: int = 4) -> None:
    """Contact sheets of pairs one below the other: (heading, images, captions, [(before, after) scores, ...])."""
    sheets = [contact_sheet(images, captions, columns, True, scores) for _, images, captions, scores in parts]
    font, band, top = ImageFont.load_default(16), 34, 0
    size = max(sheet.width for sheet in sheets), sum(sheet.height + band for sheet in sheets)
    whole = Image.new("RGB", size, "white")
    for (heading, *_), sheet in zip(parts, sheets):
        ImageDraw.Draw(whole).text((4, top + 8), heading, fill="black", font=font)
        whole.paste(sheet, (0, top + band))
        top += band + sheet.height
    save_image(numpy.asarray(whole), path)


def contact_sheet(images, captions: list[str], columns: int, pairs: bool = False, scores=None) -> Image.Image:
    """`scores` of the pairs, [(before, after), ...], colour their frames: green where it rose, red where it fell."""
    size = max(96, images.shape[-1]) if images.shape[-1] < 256 else 256
    font, line, gap, frame, parts = ImageFont.load_default(11), 30, 4, 3, 2 if pairs else 1
    wide, high = parts * (size + gap) + 2 * frame + 4, size + line + 2 * frame + 4 + 14 * pairs
    tiles, columns = as_uint8(images), min(columns, len(captions))
    sheet = Image.new("RGB", (columns * wide, -(-len(captions) // columns) * high), "white")
    pen = ImageDraw.Draw(sheet)
    for n, caption in enumerate(captions):
        x, y = n % columns * wide + frame, n // columns * high
        old, new = scores[n] if scores else (0, 0)
        colour = "green" if new > old else "crimson" if new < old else "lightgray"
        right, low = x + parts * (size + gap) - gap + frame - 1, y + line + size + frame - 1
        pen.rectangle((x - frame, y + line - frame, right, low), fill=colour)
        for k in range(parts):
            left, tile = x + k * (size + gap), Image.fromarray(tiles[n * parts + k])
            tile = tile.resize((size, size), Image.NEAREST if tile.width < size else Image.LANCZOS)
            sheet.paste(tile, (left, y + line))
            side = ("before", "after")[k] + (f" {scores[n][k]:.2f}" if scores else "")
            if pairs:
                ink = "black" if colour == "lightgray" else colour
                pen.text((left + 2, low + 2), side, fill=ink, font=font)
        pen.multiline_text((x, y), two_lines(caption, font, wide - 8), fill="black", font=font, spacing=1)
    return sheet


def two_lines(caption: str, font, width: float) -> str:
    lines = [""]
    for word in caption.split():
        if font.getlength(lines[-1] + " " + word) > width and lines[-1]:
            lines.append("")
        lines[-1] = (lines[-1] + " " + word).strip()
    return "\n".join(lines[:2])


# ---- the learning curve ------------------------------------------------------
def plot_curve(rows: list[dict[str, float]], path: Path, title: str, note: str = "") -> None:
    """curve.png: the training reward per epoch and the held-out reward with its standard error; `note` below."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(9, 4.2))
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
        axis.errorbar(*zip(*held), color="tab:orange", marker="o", capsize=3, label="held-out prompts,\nsame noise")
    axis.set(xlabel=f"epoch\n{textwrap.fill(note, 90)}".strip(), ylabel="reward", title=title)
    axis.legend(loc="upper left", bbox_to_anchor=(1.01, 1))  # beside the plot: it hides no curve
    axis.grid(alpha=0.3)
    figure.tight_layout()
    with complete(path) as temporary:
        figure.savefig(temporary, dpi=110)
    pyplot.close(figure)


# ---- gallery.html: one page with everything in it ----------------------------
def data_uri(path: Path, side: int) -> str:
    """The image, at most `side` pixels per side: as it is up to 64 pixels (PNG), else WebP or, without it, JPEG."""
    image, kind, data = Image.open(path), "png", path.read_bytes()
    if max(image.size) > min(side, 64):
        image = image.convert("RGB")
        image.thumbnail((side, side), Image.LANCZOS)
        buffer, kind = io.BytesIO(), "webp" if features.check("webp") else "jpeg"
        image.save(buffer, format=kind, quality=85)
        data = buffer.getvalue()
    return f"data:image/{kind};base64," + base64.b64encode(data).decode()


def fit_gallery(sizes: dict[int, float], prompts: int, per_prompt: int, models: int, budget: float):
    """(side, images per prompt, prompts) to show in `budget` bytes; sizes: {side: mean bytes of an image}, full first.
    Thumbnails down to 256 pixels come first, then fewer images per prompt, smaller thumbnails, fewer prompts.
    """
    large = [side for side in sizes if side >= min(256, max(sizes))]
    ways = [(side, per_prompt) for side in large]
    ways += [(large[-1], k) for k in range(per_prompt - 1, 0, -1)]
    ways += [(side, 1) for side in sizes if side < large[-1]]
    for side, k in ways:
        if models * prompts * k * sizes[side] <= budget:
            return side, k, prompts
    return side, 1, max(1, int(budget / (models * sizes[side])))


def write_gallery(path: Path, head: dict, prompts, files, scores, megabytes: float) -> None:
    """eval_gallery.html with the data put in: to show it, no other file and no network is needed.
    head: title, note, command, summary and `rewards`, the names of the scores that are shown.
    """
    models, K = list(files), len(files["base"]) // len(prompts)
    sample = files["base"][::K][:: max(1, len(prompts) // 8)][:8]  # to judge the size of all
    full = max(Image.open(sample[0]).size)
    sides = [full, *(side for side in (768, 512, 384, 256, 192, 128, 96) if side < full)]
    sizes = {side: sum(len(data_uri(file, side)) for file in sample) / len(sample) for side in sides}
    side, shown, count = fit_gallery(sizes, len(prompts), K, len(models), megabytes * 1e6)
    cuts = ((side, full, "pixels"), (shown, K, "images per prompt"), (count, len(prompts), "prompts"))
    left = ", ".join(f"{part} of {whole} {what}" for part, whole, what in cuts if part < whole)
    rows = []
    for prompt, k in ((prompt, k) for prompt in prompts[:count] for k in range(shown)):
        p, tag = prompt.id, str(prompt.metadata.get("tag", ""))
        rows.append({
            "prompt": p, "image": k, "text": prompt.text, "tag": tag,
            "scores": [[scores[m][r][p, k].item() for r in head["rewards"]] for m in models],
            "pictures": [data_uri(files[m][p * K + k], side) for m in models],
        })  # fmt: skip
    left = f"Shown: {left}; the folder images/ has all in full." if left else ""
    data = json.dumps(head | {"left_out": left, "models": models, "side": side, "rows": rows})
    data = data.replace("<", "\\u003c")  # a prompt may hold "</script>"
    page = TEMPLATE.read_text(encoding="utf-8")
    path.write_text(page.replace("__DATA__", data), encoding="utf-8")
