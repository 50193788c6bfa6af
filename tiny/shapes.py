"""Coloured shapes: the little world of the embedded models.  Renderer, caption grammar, prompt lists and checker.

A caption says which shapes an image shows; the checker finds the shapes in the pixels and says how far that is true.
The six caption types are GenEval's task types (2310.11513, section 3.2), at 32x32 pixels on black:

    single    a circle                                        colour    a red circle
    two       a circle and a square                           counting  three yellow circles          (two to four)
    position  a green triangle left of a red square           binding   a red circle and a blue square

    python -m tiny.shapes        # writes a sheet of rendered examples and the checker's accuracy on them
"""

import itertools
import re
import sys
from dataclasses import dataclass
from functools import cache

import numpy as np
from scipy import ndimage

SIZE = 32
CELL = 8  # pixels; corners and sizes are multiples of it, which keeps the world easy to learn
COLOURS = {
    "red": (0.95, 0.15, 0.15),
    "green": (0.15, 0.85, 0.20),
    "blue": (0.20, 0.35, 1.00),
    "yellow": (1.00, 0.90, 0.15),
}
SHAPES = ("circle", "square", "triangle")
NUMBERS = {"two": 2, "three": 3, "four": 4}
RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}  # of the first, in (x, y)
KINDS = ("single", "colour", "two", "counting", "position", "binding")

FOREGROUND = 0.40  # a pixel whose brightest channel is above this belongs to an object
MIN_AREA = 10  # pixels; smaller connected components are specks, not objects
SQUARE_FILL, CIRCLE_FILL = 0.90, 0.68  # area / bounding box: square 1, circle pi/4, triangle 1/2
MIN_OFFSET = 3.0  # pixels between the centres along the named axis for a relation to hold


@dataclass(frozen=True)
class Scene:
    """What a caption asks for: `objects` is a tuple of (count, colour or None, shape)."""

    kind: str
    objects: tuple[tuple[int, str | None, str], ...]
    relation: str | None = None


_OBJECT = r"a (?:(\w+) )?(\w+)"
_COUNT = re.compile(r"(two|three|four) (\w+) (\w+)s")
_RELATION = re.compile(rf"{_OBJECT} (left of|right of|above|below) {_OBJECT}")
_PAIR = re.compile(rf"{_OBJECT} and {_OBJECT}")
_ONE = re.compile(_OBJECT)


@cache
def parse(caption: str) -> Scene:
    """Caption -> Scene.  ValueError, with the forms that are known, for a caption outside the grammar."""
    text = " ".join(caption.lower().split())
    if m := _COUNT.fullmatch(text):
        scene = Scene("counting", ((NUMBERS[m[1]], m[2], m[3]),))
    elif m := _RELATION.fullmatch(text):
        scene = Scene("position", ((1, m[1], m[2]), (1, m[4], m[5])), m[3])
    elif m := _PAIR.fullmatch(text):
        scene = Scene("binding" if m[1] else "two", ((1, m[1], m[2]), (1, m[3], m[4])))
    elif m := _ONE.fullmatch(text):
        scene = Scene("colour" if m[1] else "single", ((1, m[1], m[2]),))
    else:
        scene = None
    if scene is None or any(c not in (None, *COLOURS) or s not in SHAPES for _, c, s in scene.objects):
        raise ValueError(
            f"caption {caption!r} is outside the shapes grammar: use e.g. 'a red circle', 'three yellow circles', "
            f"'a red circle and a blue square' or 'a green triangle left of a red square', with colours "
            f"{', '.join(COLOURS)} and shapes {', '.join(SHAPES)}"
        )
    return scene


# ---- prompt lists ---------------------------------------------------------------------------------------------------
@cache
def captions(split: str) -> dict[str, tuple[str, ...]]:
    """{kind: captions} of split 'train' or 'heldout'.  The two are disjoint; a fifth of each kind is held out."""
    every = {
        "single": [f"a {s}" for s in SHAPES],
        "colour": [f"a {c} {s}" for c in COLOURS for s in SHAPES],
        "two": [f"a {a} and a {b}" for a, b in itertools.permutations(SHAPES, 2)],
        "counting": [f"{n} {c} {s}s" for n in NUMBERS for c in COLOURS for s in SHAPES],
        "position": [],
        "binding": [],
    }
    for (c1, s1), (c2, s2) in itertools.permutations(itertools.product(COLOURS, SHAPES), 2):
        if c1 != c2 and s1 != s2:
            every["binding"].append(f"a {c1} {s1} and a {c2} {s2}")
            every["position"] += [f"a {c1} {s1} {r} a {c2} {s2}" for r in RELATIONS]
    chosen = {}
    for kind in KINDS:
        order = np.random.default_rng(len(kind)).permutation(len(every[kind]))
        cut = max(1, len(order) // 5)
        keep = order[:cut] if split == "heldout" else order[cut:]
        chosen[kind] = tuple(every[kind][i] for i in sorted(keep))
    return chosen


def prompt_list(split: str, n: int, seed: int = 0) -> list[str]:
    """n captions, the six kinds in turn, each drawn without repetition until its list is used up."""
    rng = np.random.default_rng((seed, split == "heldout"))
    streams = []
    for kind in KINDS:
        pool = captions(split)[kind]
        rounds = -(-n // len(KINDS) // len(pool)) + 1
        streams.append([pool[i] for _ in range(rounds) for i in rng.permutation(len(pool))])
    return [streams[i % len(KINDS)][i // len(KINDS)] for i in range(n)]


# ---- renderer -------------------------------------------------------------------------------------------------------
@cache
def sprite(shape: str, size: int) -> np.ndarray:
    """(size, size) coverage in [0, 1], 8x8 supersampled."""
    y, x = (np.mgrid[: 8 * size, : 8 * size] + 0.5) / (8 * size)
    if shape == "circle":
        inside = (x - 0.5) ** 2 + (y - 0.5) ** 2 <= 0.25
    elif shape == "square":
        inside = np.ones_like(x, dtype=bool)
    else:
        inside = np.abs(x - 0.5) <= y / 2
    return inside.reshape(size, 8, size, 8).mean((1, 3))


def _place(scene: Scene, sizes: list[int], rng: np.random.Generator) -> list[tuple[int, int]] | None:
    """Top-left corners, objects a cell apart and the relation kept, or None where a draw does not fit."""
    corners: list[tuple[int, int]] = []
    for size in sizes:
        for _ in range(30):
            x, y = (CELL * int(v) for v in rng.integers(0, (SIZE - size) // CELL + 1, 2))
            if all(
                x + size < u or u + other < x or y + size < v or v + other < y for (u, v), other in zip(corners, sizes)
            ):
                corners.append((x, y))
                break
        else:
            return None
    if scene.relation:
        (x1, y1), (x2, y2) = ((x + s / 2, y + s / 2) for (x, y), s in zip(corners, sizes))
        if not _related(scene.relation, x1 - x2, y1 - y2, least=MIN_OFFSET, tie=2):
            return None
    return corners


def _related(relation: str, dx: float, dy: float, least: float, tie: float = 0.0) -> bool:
    """The offset along the named axis is above `least` and larger (by more than `tie`) than that across it."""
    sx, sy = RELATIONS[relation]
    along, across = (dx * sx, dy) if sx else (dy * sy, dx)
    return along > least and along > abs(across) + tie


def render(caption: str, rng: np.random.Generator) -> np.ndarray:
    """One random image of the caption: (32, 32, 3) uint8."""
    scene = parse(caption)
    wanted = [(colour, shape) for n, colour, shape in scene.objects for _ in range(n)]
    corners = None
    while corners is None:
        sizes = [CELL * int(s) for s in rng.integers(1, 3 if len(wanted) < 3 else 2, len(wanted))]
        corners = _place(scene, sizes, rng)
    image = np.zeros((SIZE, SIZE, 3))
    names = list(COLOURS)
    for (colour, shape), size, (x, y) in zip(wanted, sizes, corners):
        colour = colour or names[rng.integers(len(names))]
        image[y : y + size, x : x + size] = sprite(shape, size)[..., None] * np.array(COLOURS[colour])
    return (image * 255).round().astype(np.uint8)


# ---- checker --------------------------------------------------------------------------------------------------------
def find_objects(images: np.ndarray) -> list[list[tuple[str, str, float, float]]]:
    """Images (B, 3, 32, 32) in [0, 1] -> for each the (colour, shape, centre x, centre y) of the objects in it.

    A pixel's colour is the nearest direction in RGB (so an edge blended with black keeps its colour), objects are
    the 8-connected components of one colour, and the shape follows from area / bounding box.
    """
    images = np.asarray(images, dtype=np.float32)
    if images.ndim != 4 or images.shape[1:] != (3, SIZE, SIZE):
        raise ValueError(f"images have shape {images.shape}; the shapes checker expects (B, 3, {SIZE}, {SIZE})")
    palette = np.array(list(COLOURS.values()), dtype=np.float32)
    palette /= np.linalg.norm(palette, axis=1, keepdims=True)
    b, y, x = np.nonzero(images.max(1) > FOREGROUND)
    nearest = (images[b, :, y, x] @ palette.T).argmax(1)
    masks = np.zeros((len(images), len(palette), SIZE, SIZE), dtype=bool)
    masks[b, nearest, y, x] = True
    plane = np.zeros((3, 3, 3), dtype=int)
    plane[1] = 1  # neighbours in the plane only: images and colours stay apart
    labels, count = ndimage.label(masks.reshape(-1, SIZE, SIZE), structure=plane)
    ids = labels.reshape(masks.shape)[b, nearest, y, x] - 1
    area = np.bincount(ids, minlength=count)
    found: list[list[tuple[str, str, float, float]]] = [[] for _ in images]
    if count == 0:
        return found
    order = np.argsort(ids, kind="stable")
    starts = np.concatenate([[0], np.cumsum(area)[:-1]])
    xs, ys = x[order], y[order]
    width = np.maximum.reduceat(xs, starts) - np.minimum.reduceat(xs, starts) + 1
    height = np.maximum.reduceat(ys, starts) - np.minimum.reduceat(ys, starts) + 1
    fill = area / (width * height)
    cx, cy = np.add.reduceat(xs, starts) / area, np.add.reduceat(ys, starts) / area
    image_of, colour_of = b[order][starts], nearest[order][starts]
    names = list(COLOURS)
    for i in np.nonzero(area >= MIN_AREA)[0]:
        shape = "square" if fill[i] > SQUARE_FILL else "circle" if fill[i] > CIRCLE_FILL else "triangle"
        found[image_of[i]].append((names[colour_of[i]], shape, float(cx[i]), float(cy[i])))
    return found


def _count_score(found: int, wanted: int) -> float:
    return max(0.0, 1.0 - abs(found - wanted) / wanted)


def judge(objects: list[tuple[str, str, float, float]], caption: str) -> tuple[float, bool]:
    """(score in [0, 1], strictly right?) of the objects found against the caption.

    The score is the mean over the caption's clauses: one per kind of object asked for (a quarter each for the number
    of objects of that colour and of that shape, half for the number of those with both), one for the total number
    of objects, one (0 or 1) for the relation.  Numbers score 1 - |found - wanted| / wanted, at least 0.
    """
    scene = parse(caption)
    clauses, strict = [], True
    for wanted, colour, shape in scene.objects:
        same_shape = sum(s == shape for _, s, _, _ in objects)
        if colour is None:
            both = same_shape
            clauses.append(_count_score(both, wanted))
        else:
            same_colour = sum(c == colour for c, _, _, _ in objects)
            both = sum(c == colour and s == shape for c, s, _, _ in objects)
            parts = _count_score(same_colour, wanted) + _count_score(same_shape, wanted)
            clauses.append(parts / 4 + _count_score(both, wanted) / 2)
        strict &= both == wanted
    total = sum(n for n, _, _ in scene.objects)
    clauses.append(_count_score(len(objects), total))
    strict &= len(objects) == total
    if scene.relation:
        (_, c1, s1), (_, c2, s2) = scene.objects
        holds = any(
            _related(scene.relation, ax - bx, ay - by, MIN_OFFSET)
            for ac, as_, ax, ay in objects
            for bc, bs, bx, by in objects
            if (ac, as_, bc, bs) == (c1 or ac, s1, c2 or bc, s2)
        )
        clauses.append(float(holds))
        strict &= holds
    return sum(clauses) / len(clauses), bool(strict)


def score(images: np.ndarray, prompts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Images (B, 3, 32, 32) in [0, 1] and their captions -> scores (B,) float32 in [0, 1], strict (B,) float32."""
    if len(images) != len(prompts):
        raise ValueError(f"{len(images)} images but {len(prompts)} captions; the shapes checker needs one for each")
    judged = [judge(objects, p) for objects, p in zip(find_objects(images), prompts)]
    return np.array([j[0] for j in judged], np.float32), np.array([j[1] for j in judged], np.float32)


def main() -> None:
    from PIL import Image

    rng = np.random.default_rng(0)
    prompts = prompt_list("train", 600)
    images = np.stack([render(p, rng) for p in prompts])
    points, strict = score(images.transpose(0, 3, 1, 2) / 255, prompts)
    for kind in KINDS:
        rows = [i for i, p in enumerate(prompts) if parse(p).kind == kind]
        print(f"{kind:9s} score {points[rows].mean():.4f}  strict {strict[rows].mean():.4f}")
    sheet = images[:96].reshape(8, 12, SIZE, SIZE, 3).transpose(0, 2, 1, 3, 4).reshape(8 * SIZE, 12 * SIZE, 3)
    path = sys.argv[1] if len(sys.argv) > 1 else "shapes.png"
    Image.fromarray(sheet).resize((12 * SIZE * 2, 8 * SIZE * 2), Image.NEAREST).save(path)
    print(f"sheet of examples: {path}")


if __name__ == "__main__":
    main()
