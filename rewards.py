"""Rewards by name, and weighted sums of them: images (B, 3, H, W) in [0, 1] and prompts in, (B,) out.

    check("hpsv2=1,clipscore=0.5", paths, prompts)     # light: names, packages, weights, prompts
    reward = load("hpsv2=1,clipscore=0.5", "cuda", torch.bfloat16, paths)
    total, parts = reward(images, prompts)             # on uint8-rounded pixels, no graph
    total, parts = reward(images, prompts, grad=True)  # on the float tensor, differentiable

Larger is always better.  A reward that fails stops the run with its name and the sample (RewardError);
bad input is one sentence (UsageError).  Your own: --reward package.module:function, a function of
(images, prompts, metadata) that returns (B,), with `function.differentiable = True` if gradients pass.
A new one: a Card, a loader, an entry in LOADERS; what is more than a CLIP is a file in judges/.
"""

import difflib
import functools
import html
import importlib.util
import io
import math
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from multiprocessing.pool import ThreadPool
from pathlib import Path

import torch
import torch.nn.functional as F


# ---- the contract: terms and their weighted sum -----------------------------
class RewardError(RuntimeError):
    """While running: a reward raised, or returned what is not (B,) finite floats."""


class UsageError(ValueError):
    """Bad input: what was given, what is expected, what to do."""


def need(ok, sentence: str, error=UsageError) -> None:
    if not ok:
        raise error(sentence)


@dataclass
class Term:
    name: str
    weight: float
    fn: Callable  # (images (B, 3, H, W), prompts, metadata) -> (B,)
    differentiable: bool
    note: str
    licence: str
    metric: bool = False


@dataclass
class Reward:
    """A weighted sum of terms; `differentiable` only if every term is."""

    spec: str
    terms: list[Term]
    differentiable: bool

    def __call__(self, images, prompts, metadata=None, grad=False, chunk=None):
        """Images (B, 3, H, W) in [0, 1], B prompts, B metadata or None -> total (B,), {term: (B,)}.

        Without grad: pixels rounded to 8 bits, as a saved image would be scored, no graph.  With grad:
        the tensor itself; ValueError if a term passes no gradients.  RewardError if a term misbehaves.
        """
        _check_batch(images, prompts, metadata)
        if grad and not self.differentiable:
            names = ", ".join(t.name for t in self.terms if not t.differentiable)
            raise ValueError(f"reward {names} passes no gradients; use a black-box method or --reward clipscore")
        images = images.to(wide(images.dtype)) if grad else eight_bit(images)
        size = chunk or len(images)
        chunks = [slice(i, i + size) for i in range(0, len(images), size)]
        # autocast off: a score must not depend on the precision of the training code around it
        with torch.set_grad_enabled(grad), torch.autocast(images.device.type, enabled=False):
            scores = {t.name: [_score(t, images, prompts, metadata, c) for c in chunks] for t in self.terms}
            parts = {name: torch.cat(values) for name, values in scores.items()}
            total = torch.stack([t.weight * parts[t.name] for t in self.terms]).sum(0)
        return total, parts


def wide(dtype):  # a dot product in half precision loses the digits in which images differ
    return torch.promote_types(dtype, torch.float32)


def eight_bit(images):
    """What a PNG keeps, as floats in [0, 1], without a graph."""
    return (images.detach().float().clamp(0, 1) * 255).round() / 255


def pixels(images):
    """(B, 3, H, W) in [0, 1] -> (B, H, W, 3) uint8 array, RGB."""
    return (images * 255).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def _check_batch(images, prompts, metadata) -> None:
    tensor = torch.is_tensor(images) and images.is_floating_point()
    if not tensor or images.ndim != 4 or images.shape[1] != 3:
        given = f"{images.dtype} {tuple(images.shape)}" if torch.is_tensor(images) else type(images).__name__
        raise ValueError(f"images are {given}; a reward expects a float tensor (B, 3, H, W) in [0, 1]")
    n = len(images)
    for what, given in (("prompts", prompts), ("metadata", prompts if metadata is None else metadata)):
        right = not isinstance(given, str) and len(given) == n > 0
        need(right, f"{n} images but {len(given)} {what}; a reward needs a list with one for each", ValueError)
    low, high = (v.item() for v in images.detach().aminmax())
    seen = f"pixels range from {low:.3g} to {high:.3g}"
    # a diverged policy draws such, hence no ValueError: the run is to stop with a checkpoint; NaN fails, too
    sane = low >= -1e-3 and high <= 1 + 1e-3
    need(sane, f"{seen}; rewards expect [0, 1], not [-1, 1] and no NaN", RewardError)


def _score(term: Term, images, prompts, metadata, chunk: slice) -> torch.Tensor:
    """(n,) float32 on the images' device: one term on one chunk, checked."""
    images, prompts, first = images[chunk], list(prompts[chunk]), chunk.start
    metadata, n = metadata and metadata[chunk], len(prompts)

    def error(problem, i=None):
        where = f"samples {first} to {first + n - 1}, the first" if i is None else f"sample {first + i}"
        return RewardError(f"reward {term.name!r} {problem} ({where}: prompt {prompts[i or 0]!r})")

    try:
        out = term.fn(images, prompts, metadata)
    except Exception as e:  # whatever it is, the message needs the reward and the sample
        raise error(f"raised {type(e).__name__}: {e}") from e
    try:
        out = torch.as_tensor(out)
    except (TypeError, ValueError, RuntimeError) as e:
        raise error(f"returned {type(out).__name__}; expected {n} floats") from e
    if tuple(out.shape) != (n,) or not out.is_floating_point():
        raise error(f"returned {out.dtype} of shape {tuple(out.shape)}; expected floats of shape ({n},)")
    bad = (~out.detach().isfinite()).nonzero().flatten().tolist()
    if bad:
        raise error(f"returned {out[bad[0]].item()}; expected finite numbers", bad[0])
    if torch.is_grad_enabled() and images.requires_grad and not out.requires_grad:
        raise error("is declared differentiable but what it returned has no gradient")
    return out.to(images.device, torch.float32)


# ---- what there is ----------------------------------------------------------
@dataclass(frozen=True)
class Card:
    """What is known of a reward without loading it."""

    note: str  # model, scale and typical range
    licence: str
    differentiable: bool = False
    packages: tuple[str, ...] = ()  # names to import
    path: str = ""  # what --reward-path NAME= gives
    weights: dict[str, str] = field(default_factory=dict)  # part: hub id, or hub id/file; see find_weights()
    suits: Callable | str = str  # of a prompt: ValueError if the reward cannot score it
    metadata: bool = False  # suits() is of the prompt's JSON object
    metric: bool = False  # meant for reporting; too coarse to train on


HF, FTFY, PNG, L14 = ("transformers",), ("transformers", "ftfy"), ("PIL",), "openai/clip-vit-large-patch14"
CLIP = "FOLDER", {"clip": L14, "tokenizer": L14}
HESSEL = "FOLDER", dict.fromkeys(("clip", "tokenizer"), "openai/clip-vit-base-patch32")
PICK = "FOLDER", {"clip": "yuvalkirstain/PickScore_v1", "tokenizer": "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"}
# the file is sac+logos+ava1-l14-linearMSE.pth
HEAD = "FOLDER,FILE", {"clip": L14, "file": "trl-lib/ddpo-aesthetic-predictor/aesthetic-model.pth"}
HPS21 = "FILE", {"file": "xswu/HPSv2/HPS_v2.1_compressed.pt", "tokenizer": L14}
HPS20 = "FILE", {"file": "xswu/HPSv2/HPS_v2_compressed.pt", "tokenizer": L14}
BLIP = "FILE", {"file": "THUDM/ImageReward/ImageReward.pt", "tokenizer": "bert-base-uncased"}
COCO = {"clip": L14, "detector": "facebook/mask2former-swin-small-coco-instance", "tokenizer": L14}
GENEVAL = "code MIT", False, HF, "CLIP_FOLDER,DETECTOR_FOLDER", COCO, "judges.geneval:check_metadata", True
OCR = "Apache-2.0", False, ("rapidocr", "onnxruntime"), "", {}, "judges.ocr:ocr_target"
SHAPES = "MIT", False, ("scipy",), "", {}, "tiny.shapes:parse"
SERVED = "your server's", False, PNG, "URL"
CARDS = {
    "shapes": Card("share of the caption's clauses true of the 32x32 image; 0..1", *SHAPES),
    "shapes-strict": Card("1 if all of them are true, else 0; accuracy", *SHAPES, metric=True),
    "clipscore": Card("cosine, CLIP L/14 (VMPO's); SD1.5 .27", "MIT", True, HF, *CLIP),
    "clipscore-hessel": Card("2.5 max(cosine, 0), CLIP B/32, 'A photo depicts'", "MIT", True, HF, *HESSEL),
    "pickscore": Card("exp(logit_scale) cosine; 20..24", "code MIT", True, HF, *PICK),
    "pickscore26": Card("pickscore / 26 (AWM's training scale)", "code MIT", True, HF, *PICK),
    "aesthetic": Card("LAION aesthetic V2, ignores the prompt; 3..8", "Apache-2.0", True, HF, *HEAD),
    "hpsv2": Card("HPS v2.1, cosine; SD1.5 .24", "Apache-2.0", True, FTFY, *HPS21),
    "hpsv2.0": Card("HPS v2.0, another scale; SD1.5 .27", "Apache-2.0", True, FTFY, *HPS20),
    "imagereward": Card("BLIP, standardised; -2..2, SD1.5 .03", "Apache-2.0", True, HF, *BLIP),
    "geneval": Card("GenEval's own 0 or 1; the score is their mean by tag", *GENEVAL, metric=True),
    "geneval-reward": Card("mean of partial credits, exact counts; at most 1", *GENEVAL),
    "geneval-reward-flowgrpo": Card("the same with Flow-GRPO's two oddities", *GENEVAL),
    "ocr": Card('reads the text between the first two " of the prompt; 0..1', *OCR),
    "unifiedreward": Card("a served UnifiedReward's judgement; 1..5", *SERVED),
    "deqa": Card("a served DeQA-Score, ignores the prompt; 1..5", *SERVED),
    "http": Card("any server of yours that answers POST with scores", *SERVED),
    "jpeg": Card("compressibility: -(kB of a quality-95 JPEG), kB = 1000 bytes (DDPO)", "MIT", False, PNG),
    "jpeg-incompress": Card("kB of a quality-95 JPEG (DDPO)", "MIT", False, PNG),
}
DIVERSITY = {  # metrics of a group of images, judges/diversity.py
    "diversity-clip": Card("1 - mean pairwise cosine, CLIP L/14; 0..2", "MIT", False, HF, "FOLDER", {"clip": L14}),
    "dreamsim": Card("the same, DreamSim ensemble (VMPO's); SD1.5 .44", "MIT", False, ("dreamsim",)),
}
PIP = {  # where not the name
    "rapidocr": "rapidocr==3.10.0",
    "onnxruntime": "onnxruntime==1.31.1",
    "PIL": "pillow",
    "dreamsim": "dreamsim==0.2.1",  # brings torchvision, which must fit the installed torch
}


# ---- command line values ----------------------------------------------------
def parse_spec(spec: str) -> list[tuple[str, float]]:
    """ "a=1,b=0.5", "a" or "package.module:function" -> [(name, weight)], or UsageError."""
    terms: dict[str, float] = {}
    for item in spec.split(","):
        name, equals, number = (s.strip() for s in item.partition("="))
        need(name, f"--reward {spec!r} has an empty term; expected NAME or NAME=WEIGHT,NAME=WEIGHT")
        module, colon, function = name.partition(":")
        if not colon:
            check_name(name, CARDS, "reward", ", or package.module:function")
        elif not all(s.isidentifier() for s in (*module.split("."), function)):
            raise UsageError(f"--reward {name!r} is not of the form package.module:function")
        try:
            weight = float(number) if equals else 1.0
        except ValueError:
            weight = math.nan
        what = f"weight {number!r} of reward {name!r}"
        need(math.isfinite(weight), f"{what} is not a finite number; write e.g. {name}=0.5")
        need(name not in terms, f"--reward {spec!r} names {name!r} twice; give it one weight")
        terms[name] = weight
    return list(terms.items())


def check_name(name: str, known, kind: str, more="") -> None:
    """UsageError with the closest names unless `name` is known."""
    close = " or ".join(difflib.get_close_matches(name, known, cutoff=0.5))
    hint = f"did you mean {close}? " if close else ""
    need(name in known, f"unknown {kind} {name!r}; {hint}known: {', '.join(known)}{more}")


def parse_paths(paths) -> dict[str, str]:
    """None, "PATH", ["NAME=PATH", ...] or a dict -> {name: path}; "" for one without a name."""
    if isinstance(paths, dict):
        return paths
    found: dict[str, str] = {}
    for item in [paths] if isinstance(paths, str) else paths or []:
        name, equals, path = item.partition("=")
        if not equals or "/" in name:  # a path may contain a =
            name, path = "", item
        if name and name not in CARDS | DIVERSITY:
            names = ", ".join(CARDS | DIVERSITY)
            raise UsageError(f"--reward-path {item!r} names no reward; known: {names}")
        once = path and name not in found
        need(once, f"--reward-path {item!r} is empty or given twice; expected one NAME=PATH for each")
        found[name] = path
    return found


def _assign_paths(terms: list[tuple[str, float]], paths) -> dict[str, str]:
    """{name: its --reward-path or ""}; UsageError if a path belongs to no term."""
    paths = {k: path for k, path in parse_paths(paths).items() if k not in DIVERSITY}  # eval.py's
    takers = [name for name, _ in terms if name in CARDS and CARDS[name].path]
    who = f"{', '.join(takers)} all take one: write NAME=PATH" if takers else "none in --reward takes one"
    for name, path in paths.items():
        need(name or len(takers) == 1, f"--reward-path {path!r} fits no single reward; {who}")
        mine = not name or name in takers
        need(mine, f"--reward-path {name}={path}: {name!r} is not in --reward, or takes no path")
    return {name: paths.get(name) or (name in takers and paths.get("")) or "" for name, _ in terms}


# ---- weights: a given path, the local hub cache, the hub --------------------
MODEL_FILES = (("config.json",), ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"))
TOKENIZER_FILES = (("tokenizer.json", "vocab.json", "vocab.txt"),)


def find_weights(name: str, path: str) -> dict[str, str]:
    """{part: its folder or file here, or its hub id if it is to be fetched}; UsageError if it cannot be.

    clip, detector: folders as save_pretrained writes them; tokenizer: in the CLIP's folder, or in a folder
    `tokenizer` beside the file; file: a checkpoint; url: of a server.
    """
    card, found, missing = (CARDS | DIVERSITY)[name], {}, []
    if card.path == "URL":
        _find(name, "judges.served:check_url")(name, path)
        return {"url": path}
    parts = [part for part in card.weights if part in ("clip", "detector", "file")]
    # from the right: "FOLDER,FILE" gives both, "FILE" the checkpoint alone
    given = zip(parts[::-1], path.rsplit(",", len(parts) - 1)[::-1])
    given = {part: Path(place) for part, place in given if place}
    folder = given["file"].parent if "file" in given else None
    for part, hub in card.weights.items():
        if part in ("clip", "detector"):
            source, needed = given.get(part, hub), MODEL_FILES
        elif part == "tokenizer":
            beside = folder and (folder / "tokenizer").is_dir() and folder / "tokenizer"
            source, needed = given.get("clip") or beside or hub, TOKENIZER_FILES
        else:  # a file is called as on the hub unless the path says otherwise
            repo, _, file = hub.rpartition("/")
            source, needed = folder or repo, ((given[part].name if part in given else file,),)
        here = [_here(source, names) for names in needed]
        missing += [(source, names) for names, file in zip(needed, here) if not file]
        # by its place: by its id the hub would be asked, for a minute if it is not reachable
        place = here[0] if part == "file" else os.path.dirname(here[0])
        found[part] = place if all(here) else hub
    if missing:
        _check_missing(name, path, missing)
    return found


def _here(source: Path | str, names) -> str:
    """The first of these files in the folder, or in the local cache of the hub id; or ""."""
    if isinstance(source, Path):
        return next((str(source / n) for n in names if (source / n).is_file()), "")
    from huggingface_hub import try_to_load_from_cache

    return next((path for n in names if isinstance(path := try_to_load_from_cache(source, n), str)), "")


def _check_missing(name: str, path: str, missing) -> None:
    """UsageError if [(folder or hub id, names), ...] cannot be fetched; asks the hub once, 4 s."""
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url

    form = (CARDS | DIVERSITY)[name].path
    for source, names in missing:
        if isinstance(source, Path):
            what = f"{form} (FOLDER: written by save_pretrained, with tokenizer; FILE: the original checkpoint)"
            raise UsageError(f"--reward-path {name}={path}: no {' or '.join(names)} in {source}; expected {what}")
    repo, (file, *_) = missing[0]
    problem = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else ""
    problem = problem or within(4, lambda: get_hf_file_metadata(hf_hub_url(repo, file), timeout=4))
    files = ", ".join(f"{names[0]} of {repo}" for repo, names in missing)
    beside = ", with the tokenizer in a folder `tokenizer` beside it" if form == "FILE" else ""
    embedded = "task: --reward shapes --model tiny-sd35" if name in CARDS else f"CLIP: {name}=tiny/clip"
    need(
        not problem,
        f"{_named(name)} needs weights that are neither given nor in the local hub cache ({files}), and the "
        f"hub is not reachable ({problem}): fetch them elsewhere (hf download {repo}) and pass --reward-path "
        f"{name}={form}{beside}; or take the embedded {embedded}",
    )


def within(seconds: float, ask: Callable[[], object]) -> str:
    """Why a network call fails, or ""."""
    with ThreadPool(1) as pool:  # a stuck name lookup ignores the socket's time-out
        try:
            pool.apply_async(ask).get(seconds)
        except Exception as e:  # each library has its own; the pool's has no text: too late
            return str(e).partition("\n")[0] or f"no answer in {seconds:g} s"
    return ""


def fetch(place: str) -> str:
    """A file of find_weights(), on this machine."""
    from huggingface_hub import hf_hub_download

    return place if os.path.isfile(place) else hf_hub_download(*place.rsplit("/", 1))


def read_checkpoint(place: str) -> dict:
    """The state dict of a checkpoint file."""
    state = torch.load(fetch(place), map_location="cpu", weights_only=True)  # runs no pickled code
    return state.get("state_dict", state)


def _named(name: str) -> str:
    return f"{'reward' if name in CARDS else 'diversity'} {name!r}"


def check_packages(name: str) -> None:
    """UsageError with the pip line unless they are installed; imports nothing."""
    packages = (CARDS | DIVERSITY)[name].packages
    absent = ", ".join(p for p in packages if importlib.util.find_spec(p) is None)
    line = " ".join(PIP.get(p, p) for p in packages)
    need(not absent, f"{_named(name)} needs the package {absent}: pip install {line}")


# ---- check and load ---------------------------------------------------------
def check(spec: str, paths=None, prompts: list[str] | None = None, metadata=None, lines=None) -> None:
    """UsageError for everything that can be found without loading a model, in well under a second.

    metadata: the prompts' JSON objects, {} for a prompt without; None leaves them unchecked.
    lines: the prompts' line numbers in their file, for messages; None counts from 1.
    """
    for name, path in _assign_paths(parse_spec(spec), paths).items():
        if name not in CARDS:
            _find(name, name)
            continue
        check_packages(name)
        find_weights(name, path)
        card = CARDS[name]
        _, suits = _find(name, LOADERS[name]), _find(name, card.suits)  # their files are there
        for i, prompt in enumerate((metadata if card.metadata else prompts) or []):
            try:
                suits(prompt)
            except ValueError as e:
                line = lines[i] if lines else i + 1
                raise UsageError(f"reward {name!r} cannot score line {line} of the prompts: {e}") from e


def check_args(args) -> None:
    """check() of --reward and --eval-rewards; fills in args.paths and args.eval_paths."""
    paths, specs = parse_paths(args.reward_path), (args.reward, args.eval_rewards)
    trained, scored = ({name for name, _ in parse_spec(spec)} if spec else set() for spec in specs)
    args.paths = {k: p for k, p in paths.items() if k in trained or k not in scored}
    args.eval_paths = {k: p for k, p in paths.items() if k in scored}
    uses = [(args.reward, args.paths, args.prompt_list)]
    if args.eval_images:
        uses.append((args.reward, args.paths, args.eval_prompt_list))
        uses.append((args.eval_rewards, args.eval_paths, args.eval_prompt_list))
    for spec, paths, prompts in uses:
        if spec:
            check(spec, paths, [p.text for p in prompts], [p.metadata for p in prompts])


def load_args(args, device) -> tuple:
    """--reward, and --eval-rewards or None; after check_args()."""
    more = load(args.eval_rewards, device, torch.float32, args.eval_paths) if args.eval_rewards else None
    return load(args.reward, device, torch.float32, args.paths), more


def load(spec: str, device="cpu", dtype=torch.float32, paths=None) -> Reward:
    """The reward of a spec.  A model is loaded once per process, whichever rewards share it."""
    parsed, device = parse_spec(spec), str(torch.device(device))
    paths = _assign_paths(parsed, paths)
    terms = [
        _load_term(name, device, dtype, paths[name]) if name in CARDS else _your_own(name) for name, _ in parsed
    ]
    terms = [replace(term, weight=weight) for term, (_, weight) in zip(terms, parsed)]
    return Reward(spec, terms, all(t.differentiable for t in terms))


@functools.cache
def _load_term(name: str, device="cpu", dtype=torch.float32, path="") -> Term:
    card, places = CARDS[name], find_weights(name, path)
    fn = _find(name, LOADERS[name])(name, device, dtype, places)
    return Term(name, 1.0, fn, card.differentiable, card.note, card.licence, card.metric)


def _your_own(name: str) -> Term:
    """Not cached: looked up anew wherever it is asked for."""
    fn = _find(name, name)
    return Term(name, 1.0, fn, bool(getattr(fn, "differentiable", False)), "your own", "your own")


def is_differentiable(name: str) -> bool:
    """Whether a reward passes gradients, before anything is loaded; your own is imported to see."""
    return CARDS[name].differentiable if name in CARDS else _your_own(name).differentiable


def _find(name: str, place: Callable | str) -> Callable:
    """A function, or "module:function" of a judge or of yours, imported now that it is asked for."""
    if callable(place):
        return place
    module, _, function = place.partition(":")
    yours, folder = place == name, os.getcwd()
    if yours and folder not in sys.path:  # it may stand where you are
        sys.path.insert(0, folder)
    try:
        found = vars(importlib.import_module(module)).get(function)
    except Exception as e:
        advice = "" if yours else f"; copy this repository's folder {module.partition('.')[0]}"
        where = f"importing {module} from {folder} or sys.path"
        raise UsageError(f"reward {name!r}: {where} failed: {e!r}{advice}") from e
    need(callable(found), f"reward {name!r}: {module} has no function {function!r}; define it there")
    return found


# ---- CLIP-type rewards ------------------------------------------------------
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def resize_for_clip(images, size=224, mode="crop"):
    """(B, 3, H, W) in [0, 1] -> (B, 3, size, size) in [0, 1], differentiable.

    "crop": shorter side to `size`, centre crop (CLIP, ImageReward); "pad": longer side, zeros around (HPSv2).
    Antialiased bicubic is PIL's up to rounding; without antialias it is ten times further off (HPSv2's own
    code had none under torchvision < 0.17, so its numbers of 2023 differ from today's by that alone).
    """
    need(mode in ("crop", "pad"), f"mode {mode!r} is unknown; use 'crop' or 'pad'", ValueError)
    images = images.to(wide(images.dtype)).clamp(0, 1)
    h, w = images.shape[-2:]
    side = min(h, w) if mode == "crop" else max(h, w)
    if side != size:
        to_int = int if mode == "crop" else round  # as each reference does
        h, w = (max(1, to_int(v * size / side)) for v in (h, w))
        images = F.interpolate(images, (h, w), mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
    if mode == "crop":
        top, left = round((h - size) / 2), round((w - size) / 2)
        return images[..., top : top + size, left : left + size]
    top, left = (size - h) // 2, (size - w) // 2
    return F.pad(images, (left, size - w - left, top, size - h - top))


def normalise(images, mean, std):
    mean, std = (torch.tensor(v, dtype=torch.float64).to(images).view(3, 1, 1) for v in (mean, std))
    return (images - mean) / std


def clip_input(images, size=224, mode="crop"):
    """Images as above -> what CLIP, and all that learned from its preprocessing, takes."""
    return normalise(resize_for_clip(images, size, mode), CLIP_MEAN, CLIP_STD)


def clean_text(prompt: str) -> str:
    """As HPSv2 does and HF's tokenizer does not: curly quotes and HTML entities change the tokens."""
    import ftfy

    return html.unescape(html.unescape(ftfy.fix_text(prompt))).strip()


def unit(x):
    """Unit length along the last axis, at least float32."""
    x = x.to(wide(x.dtype))
    return x / x.norm(dim=-1, keepdim=True)


class Clip:
    """A frozen CLIPModel and its preprocessing.  Features: unit length, at least float32."""

    def __init__(self, model, tokenizer=None, mode="crop", clean=str):
        self.model, self.tokenizer, self.mode, self.clean = model, tokenizer, mode, clean
        self.size, text = model.config.vision_config.image_size, model.config.text_config
        self.length = text.max_position_embeddings
        # the text feature is read at this id (2: an old config, for "at the largest"); a wrong one is silent
        if tokenizer and text.eos_token_id not in (2, tokenizer.eos_token_id):
            ids = f"{text.eos_token_id} in the model's config, {tokenizer.eos_token_id} in the tokenizer"
            raise UsageError(f"CLIP's eos_token_id is {ids}; use the tokenizer of its training")
        # one prompt at a time: a feature depends neither on its batch nor on what came before a resume
        self.text = functools.lru_cache(8192)(self._encode)

    def images(self, images):
        """(B, 3, H, W) in [0, 1] -> (B, D)."""
        x = clip_input(images.to(self.model.device), self.size, self.mode)
        return unit(self.model.get_image_features(pixel_values=x.to(self.model.dtype)).pooler_output)

    def _encode(self, prompt):
        with torch.no_grad():
            options = {"truncation": True, "max_length": self.length, "return_tensors": "pt"}
            ids = self.tokenizer(self.clean(prompt), **options).input_ids
            return unit(self.model.get_text_features(input_ids=ids.to(self.model.device)).pooler_output)[0]

    def cosine(self, images, prompts):
        """(B,) cosine of image i and prompt i."""
        return (self.images(images) * torch.stack([self.text(p) for p in prompts])).sum(-1)


@functools.cache
def _clip_model(place, device, dtype):
    from transformers import CLIPModel

    model = CLIPModel.from_pretrained(place, dtype=torch.float32)
    scale = model.logit_scale.double().exp().item()  # before rounding: bfloat16 makes 98.9 of 100
    return model.to(device, dtype).eval().requires_grad_(False), scale


def load_clip(places: dict, device, dtype) -> tuple[Clip, float]:
    """The Clip, with a tokenizer if there is one among the places, and exp(logit_scale)."""
    from transformers import CLIPTokenizer

    model, scale = _clip_model(places["clip"], device, dtype)
    tokenizer = CLIPTokenizer.from_pretrained(places["tokenizer"]) if "tokenizer" in places else None
    return Clip(model, tokenizer), scale


def build(make: Callable, state: dict, device, dtype):
    """make() with exactly these weights, frozen."""
    # a run's random state must not depend on which rewards it loads
    with torch.random.fork_rng([torch.device(device)] if "cuda" in device else []), torch.device(device):
        model = make()
    model.load_state_dict(state, strict=True)
    return model.to(device, dtype).eval().requires_grad_(False)


def clip_reward(name, device, dtype, places):
    """Cosines of a CLIPModel times a factor."""
    clip, scale = load_clip(places, device, dtype)
    factor = {
        "clipscore": 1,  # Radford et al. 2103.00020, as VMPO reports it
        "clipscore-hessel": 2.5,  # Hessel et al. 2104.08718
        "pickscore": scale,  # Kirstain et al. 2305.01569
        "pickscore26": scale / 26,
    }[name]

    def fn(images, prompts, metadata):
        if name == "clipscore-hessel":
            return factor * clip.cosine(images, [f"A photo depicts {p}" for p in prompts]).clamp(min=0)
        return factor * clip.cosine(images, prompts)

    return fn


def aesthetic(name, device, dtype, places):
    """LAION's predictor, affine in the image feature (sac+logos+ava1)."""
    clip, _ = load_clip(places, device, dtype)
    weight, bias = (v.to(device, wide(dtype)) for v in aesthetic_head(read_checkpoint(places["file"])))
    return lambda images, prompts, metadata: clip.images(images) @ weight + bias


def aesthetic_head(state: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight (768,) and bias () in float64."""
    weight, bias = None, None  # five Linears with nothing but Dropout between them are one
    for i in (0, 2, 4, 6, 7):
        w, b = state[f"layers.{i}.weight"].double(), state[f"layers.{i}.bias"].double()
        weight, bias = (w, b) if weight is None else (w @ weight, w @ bias + b)
    return weight[0], bias[0]


# ---- HPSv2: an open_clip ViT-H/14 checkpoint in a CLIPModel -----------------
# Plain gelu in both towers: CLIPConfig's default quick_gelu loads without complaint and gives another reward.
HPS_VISION = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 16,
              "patch_size": 14, "image_size": 224, "hidden_act": "gelu", "projection_dim": 1024}  # fmt: skip
HPS_TEXT = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
            "vocab_size": 49408, "max_position_embeddings": 77, "hidden_act": "gelu", "projection_dim": 1024,
            "eos_token_id": 49407}  # fmt: skip
OPENCLIP_NAMES = {  # beginnings of names, the longer first
    "visual.transformer.resblocks.": "vision_model.encoder.layers.",
    "visual.conv1.": "vision_model.embeddings.patch_embedding.",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.ln_pre.": "vision_model.pre_layrnorm.",  # sic
    "visual.ln_post.": "vision_model.post_layernorm.",
    "visual.proj": "visual_projection.weight",
    "transformer.resblocks.": "text_model.encoder.layers.",
    "token_embedding.": "text_model.embeddings.token_embedding.",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.": "text_model.final_layer_norm.",
    "text_projection": "text_projection.weight",
    "logit_scale": "logit_scale",
}
BLOCK_NAMES = {".attn.": ".self_attn.", ".ln_": ".layer_norm", ".c_fc.": ".fc1.", ".c_proj.": ".fc2."}


def openclip_to_clip(state: dict) -> dict:
    """State dict of open_clip's CLIP -> of CLIPModel; KeyError for a name that has no place in it."""
    out = {}
    for key, value in state.items():
        old = next((old for old in OPENCLIP_NAMES if key.startswith(old)), None)
        if old is None:
            raise KeyError(f"checkpoint entry {key!r} belongs to no part of an open_clip CLIP model")
        name = OPENCLIP_NAMES[old] + key.removeprefix(old)
        for a, b in BLOCK_NAMES.items():
            name = name.replace(a, b)
        if ".in_proj_" in name:  # query, key and value in one matrix
            for part, chunk in zip("qkv", value.chunk(3)):
                out[name.replace("in_proj_", f"{part}_proj.")] = chunk
        else:  # the projections are plain matrices there, Linears here
            out[name] = value.T if key in ("visual.proj", "text_projection") else value
    return out


def hpsv2(name, device, dtype, places):
    """Cosine of a fine-tuned ViT-H/14 (Wu et al. 2306.09341), v2.1 and v2.0."""
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

    size = HPS_TEXT["projection_dim"]
    config = CLIPConfig(vision_config=HPS_VISION, text_config=HPS_TEXT, projection_dim=size)
    weights = openclip_to_clip(read_checkpoint(places["file"]))
    model = build(lambda: CLIPModel(config), weights, device, dtype)
    clip = Clip(model, CLIPTokenizer.from_pretrained(places["tokenizer"]), "pad", clean_text)
    return lambda images, prompts, metadata: clip.cosine(images, prompts)


# ---- rewards without a model ------------------------------------------------
def shapes(name, device, dtype, places):
    """The checker of the embedded task, tiny/shapes.py: score, or strict accuracy."""
    score, column = _find(name, "tiny.shapes:score"), name == "shapes-strict"
    return lambda images, prompts, metadata: score(images.cpu().numpy(), prompts)[column]


def jpeg(name, device, dtype, places):
    """File size as in DDPO (Black et al. 2305.13301), 1000 bytes; grows with the image (theirs: 512^2)."""
    from PIL import Image

    def size(image):
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, format="JPEG", quality=95)
        return buffer.tell() / 1000

    sign = 1 if name == "jpeg-incompress" else -1
    return lambda images, prompts, metadata: torch.tensor([sign * size(image) for image in pixels(images)])


# ---- where they are ---------------------------------------------------------
LOADERS = {  # (name, device, dtype, places) -> fn of a Term; a string is imported when asked for
    clip_reward: ("clipscore", "clipscore-hessel", "pickscore", "pickscore26"),
    aesthetic: ("aesthetic",),
    hpsv2: ("hpsv2", "hpsv2.0"),
    "judges.imagereward:imagereward": ("imagereward",),
    "judges.geneval:geneval": ("geneval", "geneval-reward", "geneval-reward-flowgrpo"),
    "judges.ocr:ocr": ("ocr",),
    "judges.served:unifiedreward": ("unifiedreward",),
    "judges.served:http_reward": ("deqa", "http"),
    shapes: ("shapes", "shapes-strict"),
    jpeg: ("jpeg", "jpeg-incompress"),
}
LOADERS = {name: loader for loader, names in LOADERS.items() for name in names}
# (device, dtype, path) -> a new Term
REWARDS = {name: functools.partial(_load_term.__wrapped__, name) for name in CARDS}
