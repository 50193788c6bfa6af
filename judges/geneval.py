"""GenEval: find the objects, name their colours, compare with the prompt's metadata.

Ghosh et al. 2310.11513, github.com/djghosh13/geneval; reward: github.com/yifan123/reward-server (Flow-GRPO,
AWM).  Deviation: Meta's Mask2Former Swin-S in place of mmdet's training of the same architecture, so that
scores can differ a little from GenEval's own; docs/rewards.md has the smaller ones.
"""

import functools
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from judges.clip import load_clip, normalise, resize_for_clip, unit
from rewards import CARDS, need

TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
POSITIONS = ("left of", "right of", "above", "below")
NAMES = """person bicycle car motorcycle airplane bus train truck boat traffic_light fire_hydrant stop_sign
    parking_meter bench bird cat dog horse sheep cow elephant bear zebra giraffe backpack umbrella handbag tie
    suitcase frisbee skis snowboard sports_ball kite baseball_bat baseball_glove skateboard surfboard
    tennis_racket bottle wine_glass cup fork knife spoon bowl banana apple sandwich orange broccoli carrot
    hot_dog pizza donut cake chair couch potted_plant bed dining_table toilet tv laptop computer_mouse
    tv_remote computer_keyboard cell_phone microwave oven toaster sink refrigerator book clock vase scissors
    teddy_bear hair_drier toothbrush"""
NAMES = tuple(name.replace("_", " ") for name in NAMES.split())  # COCO's 80 classes in COCO's order
COCO_NAMES = {"mouse": "computer mouse", "remote": "tv remote", "keyboard": "computer keyboard"}  # reworded
COCO_NAMES |= {"motorbike": "motorcycle", "aeroplane": "airplane", "sofa": "couch", "tvmonitor": "tv"}
COCO_NAMES |= {"pottedplant": "potted plant", "diningtable": "dining table"}  # an older spelling
SURE, SURE_COUNTING = 0.3, 0.9  # least score; in prompts that count
MOST = 16  # objects of a class
MARGIN = 0.1  # of both sizes: nearer than that is neither left nor right
SHORTER, LONGER = 800, 1333  # the detector's image, pixels
GREY = 0x99 / 255  # outside the object's mask
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass
class Found:
    """A detected object; box (left, top, right, bottom) in pixels, right and bottom exclusive."""

    name: str
    score: float
    box: tuple[float, float, float, float]
    mask: torch.Tensor | None = None  # (H, W) bool
    color: str = ""  # filled in where the prompt asks for one


def check_metadata(metadata: dict) -> None:
    """UsageError unless it has tag, include (class, count, color?, position?) and perhaps exclude."""
    there = isinstance(metadata, dict) and "tag" in metadata and metadata.get("include")
    advice = "use a .jsonl prompt file like prompts/geneval_official.jsonl"
    need(there, f"it has no GenEval metadata ('tag' and 'include'); {advice}")
    need(metadata["tag"] in TAGS, f"tag {metadata['tag']!r} is none of {', '.join(TAGS)}")
    for kind in ("include", "exclude"):
        clauses = metadata.get(kind, [])
        right = isinstance(clauses, list) and all(isinstance(clause, dict) for clause in clauses)
        need(right, f"{kind} is {clauses!r}; expected a list of JSON objects with class and count")
        for i, clause in enumerate(clauses):
            name, color, count = clause.get("class"), clause.get("color", COLORS[0]), clause.get("count")
            need(name in NAMES, f"{kind}[{i}] has class {name!r}, which is none of {', '.join(NAMES)}")
            need(color in COLORS, f"{kind}[{i}] has color {color!r}, which is none of {', '.join(COLORS)}")
            whole = type(count) is int and count > 0  # True is an int
            need(whole, f"{kind}[{i}] has count {count!r}; expected an integer above 0")
            if "position" in clause:
                given, rule = clause["position"], f"one of {', '.join(POSITIONS)} and the index of an earlier clause"
                right = isinstance(given, list) and len(given) == 2 and given[0] in POSITIONS
                right = right and type(given[1]) is int and given[1] in range(i)
                need(right, f"{kind}[{i}] has position {given!r}; expected {rule}")


# ---- scores: pure functions of what was found -------------------------------
def keep(objects: list[Found], tag: str) -> dict[str, list[Found]]:
    """{class: its objects, the surest first}: sure enough for the prompt's tag, at most 16 of a class."""
    sure, kept = SURE_COUNTING if tag == "counting" else SURE, {}
    for thing in sorted(objects, key=lambda o: -o.score):
        if thing.score > sure and len(kept.setdefault(thing.name, [])) < MOST:
            kept[thing.name].append(thing)
    return kept


def relations(a, b) -> set[str]:
    """What box a is to box b: by the offset of their centres, each axis less a tenth of both sizes."""
    offset, reduced = [], []
    for low, high in ((0, 2), (1, 3)):
        offset.append((a[low] + a[high] - b[low] - b[high]) / 2)
        slack = MARGIN * (abs(a[high] - a[low]) + abs(b[high] - b[low]))
        reduced.append(math.copysign(max(abs(offset[-1]) - slack, 0), offset[-1]))
    if max(map(abs, reduced)) < 1e-3:
        return set()
    dx, dy = (v / math.hypot(*offset) for v in reduced)  # over the whole offset, as the reference
    true = {"left of": dx < -0.5, "right of": dx > 0.5, "above": dy < -0.5, "below": dy > 0.5}
    return {relation for relation, holds in true.items() if holds}


def credits(found: dict[str, list[Found]], metadata: dict, exact: bool, flowgrpo=False) -> list[float]:
    """What each demand has earned: 1 where it is met.  exact: more objects than asked for are wrong, too.

    Colour is looked at if the count is right, position if the colour is, too.  flowgrpo: two oddities of
    its code, so that a wrong position costs 1/4 of two objects' reward, where it should cost 1/3.
    """
    groups, earned = [], []
    for clause in metadata["include"]:
        n = clause["count"]
        objects = found.get(clause["class"], [])[: None if exact else n]
        earned.append(1 - abs(n - len(objects)) / n)
        right = len(objects) == n
        if not right and flowgrpo and ("color" in clause or "position" in clause):
            earned.append(0.0)  # for what was not looked at
        if right and "color" in clause:
            same = sum(thing.color == clause["color"] for thing in objects)
            earned.append(1 - (n - same) / n)
            right = same == n
        if right and "position" in clause:
            relation, target = clause["position"]
            others = groups[target]
            pairs = ((a.box, b.box) for a in objects for b in others or ())
            right = others is not None and all(relation in relations(*pair) for pair in pairs)
            earned.append(float(right))
            if flowgrpo and not right and others is not None:
                earned.append(1.0)  # beside the 0
        groups.append(objects if right else None)  # None: nothing to be left or right of
    return earned


def correct(found: dict[str, list[Found]], metadata: dict) -> bool:
    """GenEval's verdict: at least `count` objects (the surest `count` are looked at), none excluded."""
    excluded = (len(found.get(c["class"], [])) >= c["count"] for c in metadata.get("exclude", []))
    return not any(excluded) and min(credits(found, metadata, exact=False)) == 1


def partial(found: dict[str, list[Found]], metadata: dict, flowgrpo: bool = False) -> float:
    """Flow-GRPO's training reward: mean credit with exact counts, at most 1, not bounded below."""
    earned = credits(found, metadata, True, flowgrpo)
    return sum(earned) / len(earned)


def score(correct, tags: list[str]) -> dict[str, float]:
    """0 or 1 per image and the prompts' tags -> {tag: accuracy}, "overall": mean over the six tags."""
    by_tag: dict[str, list[float]] = {tag: [] for tag in TAGS}
    for right, tag in zip(correct, tags, strict=True):
        by_tag[tag].append(float(right))
    empty = ", ".join(tag for tag, values in by_tag.items() if not values)
    need(not empty, f"no image has the tag {empty}; GenEval's score is the mean over all six tags", ValueError)
    means = {tag: sum(values) / len(values) for tag, values in by_tag.items()}
    return means | {"overall": sum(means.values()) / len(means)}


# ---- what is in the image ---------------------------------------------------
class Detector:
    """A frozen Mask2Former with GenEval's post-processing (mmdet's): images in, objects out."""

    def __init__(self, model):
        labels = [str(model.config.id2label.get(i, "")).lower() for i in range(model.config.num_labels)]
        labels = tuple(COCO_NAMES.get(label, label) for label in labels)
        pairs = enumerate(zip(labels, NAMES))
        wrong = [f"class {i} is {label!r}, not {name!r}" for i, (label, name) in pairs if label != name]
        problem = [*wrong, f"{len(labels)} classes"][0]
        advice = f"but {problem}; use {CARDS['geneval'].weights['detector']}"
        need(labels == NAMES, f"GenEval's detector must know COCO's 80 classes in their order, {advice}")
        self.model = model

    def __call__(self, images) -> list[list[Found]]:
        """(B, 3, H, W) in [0, 1] -> for each image all objects with a score above 0.3."""
        h, w = images.shape[-2:]
        scale = min(SHORTER / min(h, w), LONGER / max(h, w))
        size = [32 * math.ceil(round(v * scale) / 32) for v in (h, w)]  # the network wants multiples of 32
        x = F.interpolate(images, size, mode="bilinear", antialias=True, align_corners=False)
        x = normalise(x, IMAGENET_MEAN, IMAGENET_STD)
        out = self.model(pixel_values=x.to(self.model.dtype))
        pairs = zip(out.class_queries_logits.float(), out.masks_queries_logits.float())
        return [self._objects(classes, masks, size, (h, w)) for classes, masks in pairs]

    @staticmethod
    def _objects(classes, masks, size, original) -> list[Found]:
        """Class logits (Q, 81) and mask logits (Q, h, w) of one image -> its objects."""
        chance = classes.softmax(-1)[:, :-1]  # the last: no object
        best, pair = chance.flatten().topk(min(len(classes), chance.numel()))  # of query and class
        best, pair = best[best > SURE], pair[best > SURE]  # the mask's factor only lowers it
        if not len(best):
            return []
        logits = masks[pair // chance.shape[1]][None]
        for target in (size, original):  # in two steps, as mmdet does
            logits = F.interpolate(logits, target, mode="bilinear", align_corners=False)
        inside = logits[0] > 0
        # class probability x mean probability inside the mask
        scores = best * (logits[0].sigmoid() * inside).sum((1, 2)) / (inside.sum((1, 2)) + 1e-6)
        found = []
        for i in (scores > SURE).nonzero().flatten().tolist():
            rows, columns = inside[i].any(1).nonzero().flatten(), inside[i].any(0).nonzero().flatten()
            box = columns[0].item(), rows[0].item(), columns[-1].item() + 1, rows[-1].item() + 1
            found.append(Found(NAMES[pair[i] % chance.shape[1]], scores[i].item(), box, inside[i]))
        return found


def crop(image, thing: Found):
    """Image (3, H, W) -> the object's box of it, #999 outside the object's mask."""
    x0, y0, x1, y1 = (round(v) for v in thing.box)
    if thing.mask is not None:
        image = torch.where(thing.mask, image, torch.full_like(image, GREY))
    part = image[:, y0:y1, x0:x1]
    for axis in (1, 2):  # of a sliver only the middle is seen, and its enlargement would take gigabytes
        extra = part.shape[axis] - 8 * part.shape[3 - axis]
        if extra > 0:
            part = part.narrow(axis, extra // 2, part.shape[axis] - extra // 2 * 2)
    return part


def name_colors(clip, images, objects: list[tuple[int, Found]], chunk=64) -> None:
    """Fill in the colours of (index of its image, object): for CLIP the nearest of ten texts."""
    crops = [resize_for_clip(crop(images[i], thing)[None], clip.size) for i, thing in objects]
    features = [clip.images(torch.cat(crops[i : i + chunk])) for i in range(0, len(crops), chunk)]
    for (_, thing), feature in zip(objects, torch.cat(features) if features else ()):
        texts = []
        for color in COLORS:
            wordings = f"{color} {thing.name}", f"{color}-colored {thing.name}", f"{color} object"
            texts.append(unit(sum(clip.text(f"a photo of a {words}") for words in wordings)))
        thing.color = COLORS[(torch.stack(texts) @ feature).argmax()]


# ---- the rewards ------------------------------------------------------------
@functools.cache  # the three share it
def load_detector(place, device, dtype) -> Detector:
    from transformers import Mask2FormerForUniversalSegmentation

    model = Mask2FormerForUniversalSegmentation.from_pretrained(place, dtype=torch.float32)
    return Detector(model.to(device, dtype).eval().requires_grad_(False))


def geneval(name, device, dtype, places):
    """geneval: 0 or 1 by GenEval's rules; geneval-reward, geneval-reward-flowgrpo: partial credits."""
    clip, _ = load_clip(places, device, dtype)
    detector = load_detector(places["detector"], device, dtype)
    credit = functools.partial(partial, flowgrpo=name == "geneval-reward-flowgrpo")
    judge = correct if name == "geneval" else credit

    def fn(images, prompts, metadata):
        for prompt, extra in zip(prompts, metadata or [{}] * len(prompts)):
            try:
                check_metadata(extra)
            except ValueError as e:
                raise ValueError(f"prompt {prompt!r}: {e}") from e
        images = images.to(device)
        objects = [found for part in images.split(8) for found in detector(part)]
        kept = [keep(found, extra["tag"]) for found, extra in zip(objects, metadata)]
        colored = {}  # an object that two clauses look at is classified once
        for i, (found, extra) in enumerate(zip(kept, metadata)):
            for clause in extra["include"]:
                things = found.get(clause["class"], [])
                if "color" in clause and len(things) >= clause["count"]:
                    colored |= {id(thing): (i, thing) for thing in things[: clause["count"]]}
        name_colors(clip, images, list(colored.values()))
        return torch.tensor([float(judge(found, extra)) for found, extra in zip(kept, metadata)])

    return fn
