"""Rewards: a dict of loaders, and weighted sums of them.  Images (B, 3, H, W) in [0, 1] and prompts in, (B,) out.

    check("hpsv2=1,clipscore=0.5", paths, prompts)     # light: names, packages, weights, prompts; raises UsageError
    reward = load("hpsv2=1,clipscore=0.5", "cuda", torch.bfloat16, paths)
    total, parts = reward(images, prompts)             # on uint8-rounded pixels, no graph
    total, parts = reward(images, prompts, grad=True)  # on the float tensor, differentiable with respect to it

Larger is always better.  A reward that fails stops the run with its name and the sample (RewardError): there is no
fallback and no score in place of an error.  Your own: --reward package.module:function, a function of (images,
prompts, metadata) that returns (B,); set `function.differentiable = True` if gradients may pass through it.
A new reward here is a Card, a loader and, where it is not of the CLIP type, an entry in LOADERS at the end.
How far apart the images of one prompt are is no reward but a metric of the group: load_diversity("diversity-clip").
docs/rewards.md has the table of all names, where their weights come from, and what differs from the references.
"""

import base64
import dataclasses
import difflib
import functools
import html
import importlib
import importlib.util
import io
import json
import math
import os
import re
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn


class RewardError(RuntimeError):
    """A reward raised, or returned something that is not (B,) finite floats, while running."""


class UsageError(ValueError):
    """Bad input found before anything heavy: what was given, what is expected, what to do."""


# ---- what there is --------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Card:
    """What check() and --help know about a reward without loading it."""

    note: str  # model, scale and typical range
    licence: str
    differentiable: bool = False
    packages: tuple[str, ...] = ()  # names to import
    clip: str = ""  # hub id of a CLIPModel; --reward-path FOLDER (CLIPModel.save_pretrained + tokenizer) replaces it
    file: tuple[str, ...] = ()  # hub id and name of a checkpoint; --reward-path FILE (or FOLDER,FILE) replaces it
    detector: str = ""  # hub id of a Mask2Former; --reward-path FOLDER or CLIP_FOLDER,FOLDER replaces it
    tokenizer: str = ""  # hub id; replaced by FOLDER, or by a folder `tokenizer` beside FILE
    beside: str = ""  # a second file of the checkpoint's repository, expected beside FILE
    url: bool = False  # scored by a server of yours: --reward-path NAME=URL is required
    metric: bool = False  # meant for reporting; too coarse to train on


HF, OCR, L14 = ("transformers",), ("rapidocr", "onnxruntime"), "openai/clip-vit-large-patch14"
B32, PICK = "openai/clip-vit-base-patch32", ("yuvalkirstain/PickScore_v1", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K")
HPS21, HPS20 = ("xswu/HPSv2", "HPS_v2.1_compressed.pt"), ("xswu/HPSv2", "HPS_v2_compressed.pt")
HEAD = ("trl-lib/ddpo-aesthetic-predictor", "aesthetic-model.pth")  # = sac+logos+ava1-l14-linearMSE.pth
BLIP, BERT = ("THUDM/ImageReward", "ImageReward.pt"), "bert-base-uncased"
GENEVAL = False, HF, L14, (), "facebook/mask2former-swin-small-coco-instance", L14
CARDS = {
    "shapes": Card("share of the caption's clauses true of the 32x32 image; 0..1", "MIT", packages=("scipy",)),
    "shapes-strict": Card("1 if all of them are true, else 0; accuracy", "MIT", packages=("scipy",), metric=True),
    "clipscore": Card("cosine, CLIP L/14 (VMPO's); SD1.5 .27", "MIT", True, HF, L14, tokenizer=L14),
    "clipscore-hessel": Card("2.5 max(cosine, 0), CLIP B/32, 'A photo depicts'", "MIT", True, HF, B32, tokenizer=B32),
    "pickscore": Card("exp(logit_scale) cosine; 20..24", "code MIT", True, HF, PICK[0], tokenizer=PICK[1]),
    "pickscore26": Card("pickscore / 26 (AWM's training scale)", "code MIT", True, HF, PICK[0], tokenizer=PICK[1]),
    "aesthetic": Card("LAION aesthetic V2, ignores the prompt; 3..8", "Apache-2.0", True, HF, L14, HEAD),
    "hpsv2": Card("HPS v2.1, cosine; SD1.5 .24", "Apache-2.0", True, (*HF, "ftfy"), "", HPS21, tokenizer=L14),
    "hpsv2.0": Card("HPS v2.0, another scale; SD1.5 .27", "Apache-2.0", True, (*HF, "ftfy"), "", HPS20, tokenizer=L14),
    "imagereward": Card("BLIP, standardised; -2..2, SD1.5 .03", "Apache-2.0", True, HF, "", BLIP, tokenizer=BERT),
    "hpsv2-openclip": Card("hpsv2 by the package open_clip", "Apache-2.0", True, ("open_clip",), "", HPS21),
    "imagereward-package": Card(
        "imagereward by its own package", "Apache-2.0", True, ("ImageReward",), "", BLIP, beside="med_config.json"
    ),
    "geneval": Card("GenEval's own 0 or 1; the score is their mean by tag", "code MIT", *GENEVAL, metric=True),
    "geneval-reward": Card("mean of partial credits, exact counts; at most 1", "code MIT", *GENEVAL),
    "geneval-reward-flowgrpo": Card("the same with Flow-GRPO's two oddities", "code MIT", *GENEVAL),
    "ocr": Card('reads the text between the first two " of the prompt; 0..1', "Apache-2.0", packages=OCR),
    "unifiedreward": Card("a served UnifiedReward's judgement; 1..5", "your server's", packages=("PIL",), url=True),
    "deqa": Card("a served DeQA-Score, ignores the prompt; 1..5", "your server's", packages=("PIL",), url=True),
    "http": Card("any server of yours that answers POST with scores", "your server's", packages=("PIL",), url=True),
    "jpeg": Card("compressibility: -(kB of a quality-95 JPEG), kB = 1000 bytes (DDPO)", "MIT", packages=("PIL",)),
    "jpeg-incompress": Card("kB of a quality-95 JPEG (DDPO)", "MIT", packages=("PIL",)),
}
DIVERSITY = {  # metrics of a group of images, see load_diversity
    "diversity-clip": Card("1 - mean pairwise cosine, CLIP L/14; 0..2", "MIT", False, HF, L14, metric=True),
    "dreamsim": Card("the same, DreamSim ensemble (VMPO's); SD1.5 .44", "MIT", False, ("dreamsim",), metric=True),
}
PIP = {  # where not the name
    "rapidocr": "rapidocr==3.10.0",
    "onnxruntime": "onnxruntime==1.31.1",
    "PIL": "pillow",
    "open_clip": "open_clip_torch==3.3.0",  # brings torchvision, which must fit the installed torch
    "dreamsim": "dreamsim==0.2.1",  # the same
    # needs an old transformers, hence an environment of its own
    "ImageReward": "image-reward==1.5 clip-anytorch 'setuptools<81' transformers==4.55.4 diffusers==0.39.0",
}
INSTEAD = {"hpsv2-openclip": "hpsv2", "imagereward-package": "imagereward", "dreamsim": "diversity-clip"}
MODEL_FILES = (("config.json",), ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"))
TOKENIZER_FILES = (("tokenizer.json", "vocab.json", "vocab.txt"),)


def describe() -> str:
    """A table of all rewards for --help."""
    rows = [("reward", "grad", "what and range", "weights", "licence")]
    for name, card in CARDS.items():
        weights = " + ".join(filter(None, (card.clip, card.detector, "/".join(card.file), card.url * "URL"))) or "-"
        rows.append((name, "yes" if card.differentiable else "no", card.note, weights, card.licence))
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths)).rstrip() for row in rows)


def is_differentiable(name: str) -> bool:
    """Whether a named reward passes gradients, known before anything is loaded; your own is imported to see."""
    return CARDS[name].differentiable if name in CARDS else _function_term(name).differentiable


# ---- terms and their weighted sum -----------------------------------------------------------------------------------
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
        """Images (B, 3, H, W) float in [0, 1], B prompts, B metadata or None -> total (B,), {term: (B,)}, float32.

        Without grad: pixels rounded to 8 bits (what a saved image would score), no graph, `chunk` images at a time.
        With grad: the tensor itself; ValueError if a term passes no gradients.  RewardError if a term misbehaves.
        """
        _check_batch(images, prompts, metadata)
        if grad and not self.differentiable:
            names = ", ".join(t.name for t in self.terms if not t.differentiable)
            raise ValueError(f"reward {names} passes no gradients; use a black-box method or e.g. --reward clipscore")
        images = images.to(_wide(images.dtype))
        if not grad:
            images = (images.detach().float().clamp(0, 1) * 255).round() / 255
        scores: dict[str, list] = {term.name: [] for term in self.terms}
        # autocast off: a score must not depend on the precision of the training code around it
        with torch.set_grad_enabled(grad), torch.autocast(images.device.type, enabled=False):
            for i in range(0, len(images), chunk or len(images)):
                part = slice(i, i + (chunk or len(images)))
                for term in self.terms:
                    extra = None if metadata is None else metadata[part]
                    scores[term.name].append(_score(term, images[part], list(prompts[part]), extra, first=i))
            parts = {name: torch.cat(values) for name, values in scores.items()}
            total = torch.stack([term.weight * parts[term.name] for term in self.terms]).sum(0)
        return total, parts


def _wide(dtype):
    return torch.promote_types(dtype, torch.float32)


def _check_batch(images, prompts, metadata) -> None:
    if not torch.is_tensor(images) or images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
        given = f"{images.dtype} {tuple(images.shape)}" if torch.is_tensor(images) else type(images).__name__
        raise ValueError(f"images are {given}; a reward expects a float tensor (B, 3, H, W) in [0, 1]")
    for what, given in (("prompts", prompts), ("metadata", prompts if metadata is None else metadata)):
        if isinstance(given, str) or len(given) != len(images) or len(images) == 0:
            raise ValueError(f"{len(images)} images but {len(given)} {what}; a reward needs a list with one for each")
    low, high = (v.item() for v in images.detach().aminmax())
    if not (low >= -1e-3 and high <= 1 + 1e-3):  # NaN fails this, too
        # what a diverged policy draws, hence no ValueError: the run is to stop with a checkpoint
        raise RewardError(f"pixels range from {low:.3g} to {high:.3g}; rewards expect [0, 1], not [-1, 1] and no NaN")


def _score(term: Term, images, prompts: list[str], metadata, first: int) -> torch.Tensor:
    """One term on one chunk, checked: (B,) float32 on the images' device.  `first` is the chunk's first sample."""

    def error(problem, i=None):
        where = f"sample {first + i}" if i is not None else f"samples {first} to {first + len(prompts) - 1}, the first"
        return RewardError(f"reward {term.name!r} {problem} ({where}: prompt {prompts[i or 0]!r})")

    try:
        out = term.fn(images, prompts, metadata)
    except Exception as e:
        raise error(f"raised {type(e).__name__}: {e}") from e
    try:
        out = torch.as_tensor(out)
    except (TypeError, ValueError, RuntimeError) as e:
        raise error(f"returned {type(out).__name__}; expected {len(prompts)} floats") from e
    if tuple(out.shape) != (len(prompts),) or not out.is_floating_point():
        raise error(f"returned {out.dtype} of shape {tuple(out.shape)}; expected floats of shape ({len(prompts)},)")
    bad = (~out.detach().isfinite()).nonzero().flatten().tolist()
    if bad:
        raise error(f"returned {out[bad[0]].item()}; expected finite numbers", bad[0])
    if torch.is_grad_enabled() and images.requires_grad and not out.requires_grad:
        raise error("is declared differentiable but what it returned has no gradient")
    return out.to(images.device, torch.float32)


# ---- command line values --------------------------------------------------------------------------------------------
def parse_spec(spec: str) -> list[tuple[str, float]]:
    """ "a=1,b=0.5", "a" or "package.module:function" -> [(name, weight)].  UsageError with the closest names."""
    terms: dict[str, float] = {}
    for item in spec.split(","):
        name, equals, number = (s.strip() for s in item.partition("="))
        try:
            weight = float(number) if equals else 1.0
        except ValueError:
            weight = math.nan
        module, colon, function = name.partition(":")
        if not name:
            raise UsageError(f"--reward {spec!r} has an empty term; expected NAME or NAME=WEIGHT,NAME=WEIGHT")
        if colon and not all(s.isidentifier() for s in (*module.split("."), function)):
            raise UsageError(f"--reward {name!r} is not of the form package.module:function")
        if not colon and name not in REWARDS:
            close = " or ".join(difflib.get_close_matches(name, REWARDS, cutoff=0.5))
            hint = f"did you mean {close}? " if close else ""
            raise UsageError(f"unknown reward {name!r}; {hint}known: {', '.join(REWARDS)}, or package.module:function")
        if not math.isfinite(weight):
            raise UsageError(f"weight {number!r} of reward {name!r} is not a finite number; write e.g. {name}=0.5")
        if name in terms:
            raise UsageError(f"--reward {spec!r} names {name!r} twice; give it one weight")
        terms[name] = weight
    return list(terms.items())


def parse_paths(paths) -> dict[str, str]:
    """None, "PATH", ["NAME=PATH", ...] or a dict -> {name: path}; a path without a name is filed under ""."""
    if isinstance(paths, dict):
        return paths
    found: dict[str, str] = {}
    for item in [paths] if isinstance(paths, str) else paths or []:
        name, equals, path = item.partition("=")
        if not equals or "/" in name:
            name, path = "", item
        if name and name not in REWARDS and name not in DIVERSITY:
            raise UsageError(f"--reward-path {item!r} names no reward; known: {', '.join((*REWARDS, *DIVERSITY))}")
        if not path or name in found:
            raise UsageError(f"--reward-path {item!r} is empty or given twice; expected one NAME=PATH for each reward")
        found[name] = path
    return found


def _assign_paths(terms: list[tuple[str, float]], paths) -> dict[str, str]:
    """{name: its --reward-path or ""}; UsageError if a path belongs to no term."""
    paths = {name: path for name, path in parse_paths(paths).items() if name not in DIVERSITY}  # eval.py's
    takers = [n for n, _ in terms if n in CARDS and (CARDS[n].clip or CARDS[n].file or CARDS[n].url)]
    for name, path in paths.items():
        if not name and len(takers) != 1:
            who = f"{', '.join(takers)} all take one: write NAME=PATH" if takers else "no reward in --reward takes one"
            raise UsageError(f"--reward-path {path!r} fits no single reward; {who}")
        if name and name not in takers:
            raise UsageError(f"--reward-path {name}={path}: {name!r} is not in --reward, or takes no path")
    return {name: paths.get(name) or (name in takers and paths.get("")) or "" for name, _ in terms}


# ---- weights: a given path, the local hub cache, the hub ------------------------------------------------------------
def _card(name: str) -> Card:
    return CARDS[name] if name in CARDS else DIVERSITY[name]


def _sources(name: str, path: str | None) -> dict:
    """What a loader opens: {part: (local folder as a Path, or hub id; the files needed, each with alternatives)}."""
    card, found, path = _card(name), {}, path or ""
    if card.clip and (card.file or card.detector):
        folder, _, file = path.rpartition(",")
    else:
        folder, file = (path, "") if card.clip else ("", path)
    if card.clip:
        found["clip"] = Path(folder) if folder else card.clip, MODEL_FILES
    if card.detector:
        found["detector"] = Path(file) if file else card.detector, MODEL_FILES
    if card.file:
        found["file"] = (Path(file).parent, ((Path(file).name,),)) if file else (card.file[0], (card.file[1:],))
    if card.beside:
        found["beside"] = Path(file).parent if file else card.file[0], ((card.beside,),)
    if card.tokenizer:
        beside = Path(file).parent / "tokenizer"
        local = Path(folder) if folder else beside if file and beside.is_dir() else None
        found["tokenizer"] = local or card.tokenizer, TOKENIZER_FILES
    return found


def _path_form(name: str) -> str:
    """What --reward-path NAME= expects, for messages."""
    card = _card(name)
    last = "URL" * card.url + "FILE" * bool(card.file) + "DETECTOR_FOLDER" * bool(card.detector)
    return ",".join(filter(None, (("CLIP_FOLDER" if card.detector else "FOLDER") * bool(card.clip), last)))


def _here(source, names) -> str | None:
    """The first of these files that is in the folder, or in the local cache of the hub id."""
    if isinstance(source, Path):
        return next((str(source / n) for n in names if (source / n).is_file()), None)
    from huggingface_hub import try_to_load_from_cache

    return next((path for n in names if isinstance(path := try_to_load_from_cache(source, n), str)), None)


def _pretrained(cls, source, groups, **options):
    """cls.from_pretrained; asks the hub only for what is not here (an unreachable hub costs a minute of retries)."""
    here = all(_here(source, names) for names in groups)
    return cls.from_pretrained(str(source), local_files_only=here, **options)


def _file(source, groups) -> str:
    """A file's place on this machine; fetched from the hub if it is nowhere here."""
    file = _here(source, groups[0])
    if file is None:
        from huggingface_hub import hf_hub_download

        file = hf_hub_download(source, groups[0][0])
    return file


def _read_checkpoint(source, groups) -> dict:
    """The state dict of a checkpoint file, read without running pickled code."""
    state = torch.load(_file(source, groups), map_location="cpu", weights_only=True)
    return state.get("state_dict", state)


def _within(seconds: float, ask: Callable[[], object]) -> str:
    """Why a network call fails, or ""; in a thread, since a stuck name lookup ignores the socket's time-out."""
    answer = [f"no answer in {seconds:g} s"]

    def run():
        try:
            ask()
            answer[0] = ""
        except (OSError, ValueError) as e:
            answer[0] = str(e)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    return answer[0]


def _hub_problem(repo: str, file: str) -> str:
    """Why the hub cannot give this file, or "" if it can: one request, four seconds at the most."""
    if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
        return "HF_HUB_OFFLINE is set"
    import urllib.request

    url = f"{os.environ.get('HF_ENDPOINT') or 'https://huggingface.co'}/{repo}/resolve/main/{file}"
    request = urllib.request.Request(url, method="HEAD")
    return _within(4, lambda: urllib.request.urlopen(request, timeout=4).close())


def _check_weights(name: str, path: str) -> None:
    if _card(name).url:
        return _check_server(name, path)
    needed = [(source, names) for source, groups in _sources(name, path).values() for names in groups]
    missing = [(source, names) for source, names in needed if not _here(source, names)]
    form = _path_form(name)
    for source, names in missing:
        if isinstance(source, Path):
            what = f"{form} (FOLDER: written by save_pretrained, with tokenizer; FILE: the original checkpoint)"
            raise UsageError(f"--reward-path {name}={path}: no {' or '.join(names)} in {source}; expected {what}")
    problem = _hub_problem(missing[0][0], missing[0][1][0]) if missing else ""
    if problem:
        files = ", ".join(f"{names[0]} of {repo}" for repo, names in missing)
        beside = ", with the tokenizer in a folder `tokenizer` beside it" if form == "FILE" else ""
        raise UsageError(
            f"{_kind(name)} {name!r} needs weights that are neither given nor in the local hub cache ({files}), and "
            f"the hub is not reachable ({problem}): fetch them elsewhere (hf download {missing[0][0]}) and pass "
            f"--reward-path {name}={form}{beside}; or take the embedded "
            + ("task: --reward shapes --model tiny-sd35" if name in CARDS else f"CLIP: {name}=tiny/clip")
        )


def _kind(name: str) -> str:
    return "reward" if name in CARDS else "diversity"


def _check_packages(name: str) -> None:
    packages = _card(name).packages
    absent = [p for p in packages if importlib.util.find_spec(p) is None]
    if absent:
        line = " ".join(PIP.get(p, p) for p in packages)
        raise UsageError(f"{_kind(name)} {name!r} needs the package {', '.join(absent)}: pip install {line}")


def _import_package(name: str, package: str):
    """The package; UsageError with the pip line where it cannot be imported (torchvision of another torch, say)."""
    try:
        return importlib.import_module(package)
    except Exception as e:
        problem = f"{type(e).__name__}: {e}".splitlines()[0]
        raise UsageError(
            f"{_kind(name)} {name!r} needs the package {package}, which cannot be imported here ({problem}): "
            f"pip install {PIP[package]} in an environment where its torchvision fits torch, "
            f"or take {INSTEAD[name]}, which does without"
        ) from e


def check(spec: str, paths=None, prompts: list[str] | None = None, metadata=None, lines=None) -> None:
    """Everything that can be found without loading a model, in well under a second; UsageError says what to do.

    metadata: the prompts' JSON objects, {} for a prompt without; None leaves them unchecked.
    lines: the prompts' line numbers in their file, for messages; None counts from 1.
    """
    for name, path in _assign_paths(parse_spec(spec), paths).items():
        if name not in CARDS:
            _import_function(name)
            continue
        _check_packages(name)
        _check_weights(name, path)
        if name.startswith("shapes"):
            _shapes()
        for i, prompt in enumerate(prompts or []):
            try:
                _check_prompt(name, prompt, None if metadata is None else metadata[i])
            except ValueError as e:
                line = lines[i] if lines else i + 1
                raise UsageError(f"reward {name!r} cannot score line {line} of the prompts: {e}") from e


def _check_prompt(name: str, prompt: str, metadata: dict | None) -> None:
    """ValueError if this reward cannot score this prompt."""
    if name == "ocr":
        ocr_target(prompt)
    elif name.startswith("shapes"):
        _shapes().parse(prompt)
    elif name.startswith("geneval") and metadata is not None:
        check_geneval(metadata)


def check_args(args) -> None:
    """check() for a trainer's --reward and --eval-rewards; fills in args.paths and args.eval_paths."""
    every = parse_paths(args.reward_path)
    scored = {name for name, _ in parse_spec(args.eval_rewards)} if args.eval_rewards else set()
    trained = {name for name, _ in parse_spec(args.reward)}
    args.paths = {k: p for k, p in every.items() if k in trained or k not in scored}
    args.eval_paths = {k: p for k, p in every.items() if k in scored}
    train, held_out = (
        ([p.text for p in prompts], [p.metadata for p in prompts])
        for prompts in (args.prompt_list, args.eval_prompt_list)
    )
    check(args.reward, args.paths, *train)
    if args.eval_images:
        check(args.reward, args.paths, *held_out)
    if args.eval_images and args.eval_rewards:
        check(args.eval_rewards, args.eval_paths, *held_out)


def load_args(args, device) -> tuple:
    """load() of a trainer's --reward, and of its --eval-rewards or None; after check_args()."""
    more = load(args.eval_rewards, device, torch.float32, args.eval_paths) if args.eval_rewards else None
    return load(args.reward, device, torch.float32, args.paths), more


def load(spec: str, device="cpu", dtype=torch.float32, paths=None) -> Reward:
    """The reward of a spec.  Each model is loaded once per process, also when two rewards share it."""
    parsed = parse_spec(spec)
    assigned, where = _assign_paths(parsed, paths), str(torch.device(device))
    terms = []
    for name, weight in parsed:
        term = _load_term(name, where, dtype, assigned[name]) if name in CARDS else _function_term(name)
        terms.append(dataclasses.replace(term, weight=weight))
    return Reward(spec, terms, all(t.differentiable for t in terms))


@functools.cache
def _load_term(name, device, dtype, path) -> Term:
    _check_weights(name, path)  # seconds and one sentence, where the hub's own retries take a minute
    return REWARDS[name](device, dtype, path)


def _term(name: str, fn) -> Term:
    card = CARDS[name]
    return Term(name, 1.0, fn, card.differentiable, card.note, card.licence, card.metric)


# ---- CLIP-type rewards ----------------------------------------------------------------------------------------------
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def resize_for_clip(images, size=224, mode="crop"):
    """(B, 3, H, W) in [0, 1] -> (B, 3, size, size) in [0, 1], differentiable; the one resize of all model rewards.

    mode "crop": shorter side to `size`, centre crop (CLIP, ImageReward); "pad": longer side, zeros around it (HPSv2).
    Antialiased bicubic is PIL's up to rounding; without antialias it is ten times further off.  HPSv2's own code had
    none under torchvision < 0.17, so its numbers of 2023 differ from today's by that alone.
    """
    if mode not in ("crop", "pad"):
        raise ValueError(f"mode {mode!r} is unknown; use 'crop' or 'pad'")
    images = images.to(_wide(images.dtype)).clamp(0, 1)
    h, w = images.shape[-2:]
    side = min(h, w) if mode == "crop" else max(h, w)
    if side != size:
        h, w = (max(1, (int if mode == "crop" else round)(v * size / side)) for v in (h, w))
        images = F.interpolate(images, (h, w), mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
    if mode == "crop":
        top, left = round((h - size) / 2), round((w - size) / 2)
        return images[..., top : top + size, left : left + size]
    top, left = (size - h) // 2, (size - w) // 2
    return F.pad(images, (left, size - w - left, top, size - h - top))


def normalise_for_clip(images):
    mean, std = (torch.tensor(v, dtype=torch.float64).to(images).view(3, 1, 1) for v in (CLIP_MEAN, CLIP_STD))
    return (images - mean) / std


def clean_text(prompt: str) -> str:
    """HPSv2's text cleaning; HF's tokenizer has none (curly quotes and HTML entities would change the tokens)."""
    import ftfy

    return html.unescape(html.unescape(ftfy.fix_text(prompt))).strip()


class Clip:
    """A frozen CLIPModel and its preprocessing.  Features have unit length and are at least float32."""

    def __init__(self, model, tokenizer=None, mode="crop", clean=str):
        self.model, self.tokenizer, self.mode, self.clean = model, tokenizer, mode, clean
        self.size, text = model.config.vision_config.image_size, model.config.text_config
        self.length = text.max_position_embeddings
        # The text feature is read at eos_token_id (2: an old config, for "at the largest id"); a wrong one is silent.
        if tokenizer and text.eos_token_id not in (2, tokenizer.eos_token_id):
            ids = f"{text.eos_token_id} in the model's config, {tokenizer.eos_token_id} in the tokenizer"
            raise UsageError(f"CLIP's eos_token_id is {ids}; use the tokenizer the model was trained with")
        # One prompt at a time: a feature depends neither on its batch nor on what was scored before a resume.
        self.text = functools.lru_cache(8192)(self._encode)

    def images(self, images):
        """(B, 3, H, W) in [0, 1] -> (B, D)."""
        x = normalise_for_clip(resize_for_clip(images.to(self.model.device), self.size, self.mode))
        return _unit(self.model.get_image_features(pixel_values=x.to(self.model.dtype)).pooler_output)

    def _encode(self, prompt):
        with torch.no_grad():
            ids = self.tokenizer(self.clean(prompt), truncation=True, max_length=self.length, return_tensors="pt")
            return _unit(self.model.get_text_features(input_ids=ids.input_ids.to(self.model.device)).pooler_output)[0]

    def cosine(self, images, prompts):
        """(B,) cosine of image i and prompt i."""
        return (self.images(images) * torch.stack([self.text(p) for p in prompts])).sum(-1)


def _unit(x):
    x = x.to(_wide(x.dtype))
    return x / x.norm(dim=-1, keepdim=True)


@functools.cache
def _clip_model(source, device, dtype):
    """CLIPModel of a folder or hub id, and exp(logit_scale), taken before the weights are rounded to dtype."""
    from transformers import CLIPModel

    model = _pretrained(CLIPModel, source, MODEL_FILES, dtype=torch.float32)
    scale = model.logit_scale.double().exp().item()
    return model.to(device, dtype).eval().requires_grad_(False), scale


def _build(make, state: dict, device, dtype):
    """make() with exactly these weights, frozen; the global random state stays as it was."""
    with torch.random.fork_rng([torch.device(device)] if "cuda" in device else []), torch.device(device):
        model = make()
    model.load_state_dict(state, strict=True)
    return model.to(device, dtype).eval().requires_grad_(False)


def clip_reward(name, device, dtype, path=None):
    """The rewards on a transformers.CLIPModel.

    clipscore         cosine (Radford et al. 2103.00020), as VMPO reports it: no factor, no prefix
    clipscore-hessel  2.5 max(cosine, 0), prompts prefixed (Hessel et al. 2104.08718)
    pickscore         exp(logit_scale) cosine (Kirstain et al. 2305.01569); pickscore26 divides it by 26
    aesthetic         affine in the image feature (LAION, sac+logos+ava1); path: "HEAD.pth" or "CLIP_FOLDER,HEAD.pth"
    hpsv2, hpsv2.0    cosine of a fine-tuned ViT-H/14 (Wu et al. 2306.09341); path: the original checkpoint file
    """
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

    source, card = _sources(name, path), CARDS[name]
    tokenizer = _pretrained(CLIPTokenizer, *source["tokenizer"]) if card.tokenizer else None
    scale = 1.0
    if card.clip:
        model, scale = _clip_model(source["clip"][0], device, dtype)
        clip = Clip(model, tokenizer)
    else:
        config = CLIPConfig(vision_config=HPS_VISION, text_config=HPS_TEXT, projection_dim=HPS_TEXT["projection_dim"])
        weights = openclip_to_clip(_read_checkpoint(*source["file"]))
        clip = Clip(_build(lambda: CLIPModel(config), weights, device, dtype), tokenizer, "pad", clean_text)

    if name == "aesthetic":
        weight, bias = (v.to(device, _wide(dtype)) for v in aesthetic_head(_read_checkpoint(*source["file"])))
        return _term(name, lambda images, prompts, metadata: clip.images(images) @ weight + bias)
    hessel = name == "clipscore-hessel"
    factor = {"clipscore-hessel": 2.5, "pickscore": scale, "pickscore26": scale / 26}.get(name, 1)

    def fn(images, prompts, metadata):
        cosine = clip.cosine(images, [f"A photo depicts {p}" for p in prompts] if hessel else prompts)
        return factor * (cosine.clamp(min=0) if hessel else cosine)

    return _term(name, fn)


def aesthetic_head(state: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """The predictor's five Linears have nothing between them but Dropout: one weight (768,), one bias (), float64."""
    weight, bias = None, None
    for i in (0, 2, 4, 6, 7):
        w, b = state[f"layers.{i}.weight"].double(), state[f"layers.{i}.bias"].double()
        weight, bias = (w, b) if weight is None else (w @ weight, w @ bias + b)
    return weight[0], bias[0]


# ---- HPSv2: an open_clip ViT-H/14 checkpoint in a CLIPModel ---------------------------------------------------------
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
BLOCK_NAMES = {".attn.": ".self_attn.", ".ln_": ".layer_norm", ".mlp.c_fc.": ".mlp.fc1.", ".mlp.c_proj.": ".mlp.fc2."}


def openclip_to_clip(state: dict) -> dict:
    """open_clip CLIP state dict -> transformers CLIPModel state dict.  KeyError for a name that has no place in it."""
    out = {}
    for key, value in state.items():
        old = next((old for old in OPENCLIP_NAMES if key.startswith(old)), None)
        if old is None:
            raise KeyError(f"checkpoint entry {key!r} belongs to no part of an open_clip CLIP model")
        name = OPENCLIP_NAMES[old] + key.removeprefix(old)
        for a, b in BLOCK_NAMES.items():
            name = name.replace(a, b)
        if ".in_proj_" in name:
            for part, chunk in zip("qkv", value.chunk(3)):
                out[name.replace("in_proj_", f"{part}_proj.")] = chunk
        else:
            out[name] = value.T if key in ("visual.proj", "text_projection") else value
    return out


# ---- ImageReward: a BLIP checkpoint in transformers' BLIP classes ---------------------------------------------------
# Silent traps: the defaults for text heads (8) and vision eps (1e-5) load strictly and give other rewards.
BLIP_VISION = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
               "image_size": 224, "patch_size": 16, "layer_norm_eps": 1e-6}  # fmt: skip
BLIP_TEXT = {"vocab_size": 30524, "hidden_size": 768, "encoder_hidden_size": 1024, "intermediate_size": 3072,
             "num_hidden_layers": 12, "num_attention_heads": 12, "max_position_embeddings": 512,
             "layer_norm_eps": 1e-12, "is_decoder": True}  # is_decoder: builds the cross-attention  # fmt: skip
BLIP_NAMES = {"blip.visual_encoder.norm.": "vision.post_layernorm.", "blip.visual_encoder.": "vision.",
              "blip.text_encoder.": "text.", "mlp.layers.": "head.", ".cls_token": ".embeddings.class_embedding",
              ".pos_embed": ".embeddings.position_embedding", ".blocks.": ".encoder.layers.", ".norm": ".layer_norm",
              ".patch_embed.proj.": ".embeddings.patch_embedding.", ".attn.qkv.": ".self_attn.qkv.",
              ".attn.proj.": ".self_attn.projection."}  # fmt: skip
REWARD_MEAN, REWARD_STD, REWARD_TOKENS = 0.16717362830052426, 1.0333394966054072, 35


def imagereward_to_blip(state: dict) -> dict:
    """ImageReward.pt -> ImageReward.state_dict(): both encoders and the head; BLIP's contrastive projections go."""
    out = {}
    for key, value in state.items():
        name = key
        for old, new in BLIP_NAMES.items():
            name = name.replace(old, new)
        if name.startswith(("vision.", "text.", "head.")) and not name.endswith("position_ids"):
            out[name] = value
    return out


class ImageReward(nn.Module):
    """Xu et al. 2304.05977: BERT over the prompt, attending to the ViT's tokens, and five Linears on [CLS]."""

    def __init__(self, vision: dict, text: dict):
        from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

        super().__init__()
        self.vision = BlipVisionModel(BlipVisionConfig(**vision))
        self.text = BlipTextModel(BlipTextConfig(**text), add_pooling_layer=False)
        sizes = (text["hidden_size"], 1024, 128, 64, 16, 1)
        self.head = nn.ModuleDict({i: nn.Linear(a, b) for i, a, b in zip("02467", sizes, sizes[1:])})  # rest: Dropout

    def forward(self, pixels, ids, mask):
        """Pixels (B, 3, 224, 224), CLIP-normalised; ids and mask (B, 35) -> (B,) standardised."""
        context = self.vision(pixels).last_hidden_state
        # is_decoder=True here would mask the text causally
        text = self.text(ids, attention_mask=mask, encoder_hidden_states=context, is_decoder=False)
        x = text.last_hidden_state[:, 0]
        for linear in self.head.values():
            x = linear(x)
        return (x[:, 0].to(_wide(x.dtype)) - REWARD_MEAN) / REWARD_STD


def imagereward(name, device, dtype, path=None):
    """ImageReward-v1.0.  path: the original ImageReward.pt."""
    from transformers import BertTokenizer

    source = _sources(name, path)
    tokenizer = _pretrained(BertTokenizer, *source["tokenizer"])
    weights = imagereward_to_blip(_read_checkpoint(*source["file"]))
    model = _build(lambda: ImageReward(BLIP_VISION, BLIP_TEXT), weights, device, dtype)
    options = {"padding": "max_length", "truncation": True, "max_length": REWARD_TOKENS, "return_tensors": "pt"}

    def fn(images, prompts, metadata):
        text = tokenizer(prompts, **options).to(device)
        pixels = normalise_for_clip(resize_for_clip(images.to(device), BLIP_VISION["image_size"]))
        return model(pixels.to(dtype), text.input_ids, text.attention_mask)

    return _term(name, fn)


# ---- the packages themselves: the same two rewards by the code of their authors -------------------------------------
def hpsv2_openclip(name, device, dtype, path=None):
    """HPS v2.1 by open_clip.  path: the original checkpoint file."""
    open_clip = _import_package(name, "open_clip")
    file = _file(*_sources(name, path)["file"])
    model = open_clip.create_model("ViT-H-14", pretrained=file, device=device).to(dtype).eval().requires_grad_(False)
    tokenizer = open_clip.get_tokenizer("ViT-H-14")

    def fn(images, prompts, metadata):
        pixels = normalise_for_clip(resize_for_clip(images.to(device), HPS_VISION["image_size"], "pad"))
        text = model.encode_text(tokenizer(prompts).to(device))
        return (_unit(model.encode_image(pixels.to(dtype))) * _unit(text)).sum(-1)

    return _term(name, fn)


def imagereward_package(name, device, dtype, path=None):
    """ImageReward-v1.0 by its own package, which asks the hub's cache for bert-base-uncased.  path: ImageReward.pt."""
    package, source = _import_package(name, "ImageReward"), _sources(name, path)
    model = package.load(_file(*source["file"]), device=device, med_config=_file(*source["beside"]))
    model = model.to(dtype).eval().requires_grad_(False)
    options = {"padding": "max_length", "truncation": True, "max_length": REWARD_TOKENS, "return_tensors": "pt"}

    def fn(images, prompts, metadata):
        text = model.blip.tokenizer(prompts, **options).to(device)
        pixels = normalise_for_clip(resize_for_clip(images.to(device), BLIP_VISION["image_size"]))
        return model.score_gard(text.input_ids, text.attention_mask, pixels.to(dtype))[:, 0]

    return _term(name, fn)


# ---- GenEval: find the objects, name their colours, compare with the prompt's metadata ------------------------------
# Ghosh et al. 2310.11513, github.com/djghosh13/geneval; reward: github.com/yifan123/reward-server (Flow-GRPO, AWM).
GENEVAL_TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
GENEVAL_COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
GENEVAL_POSITIONS = ("left of", "right of", "above", "below")
GENEVAL_NAMES = """person bicycle car motorcycle airplane bus train truck boat traffic_light fire_hydrant stop_sign
    parking_meter bench bird cat dog horse sheep cow elephant bear zebra giraffe backpack umbrella handbag tie suitcase
    frisbee skis snowboard sports_ball kite baseball_bat baseball_glove skateboard surfboard tennis_racket bottle
    wine_glass cup fork knife spoon bowl banana apple sandwich orange broccoli carrot hot_dog pizza donut cake chair
    couch potted_plant bed dining_table toilet tv laptop computer_mouse tv_remote computer_keyboard cell_phone
    microwave oven toaster sink refrigerator book clock vase scissors teddy_bear hair_drier toothbrush""".split()
GENEVAL_NAMES = tuple(name.replace("_", " ") for name in GENEVAL_NAMES)  # COCO's 80 classes in COCO's order
COCO_NAMES = {"mouse": "computer mouse", "remote": "tv remote", "keyboard": "computer keyboard"}  # GenEval's rewording
COCO_NAMES |= {"motorbike": "motorcycle", "aeroplane": "airplane", "sofa": "couch", "tvmonitor": "tv",
               "pottedplant": "potted plant", "diningtable": "dining table"}  # an older spelling  # fmt: skip
SURE, SURE_COUNTING, MOST, MARGIN = 0.3, 0.9, 16, 0.1  # least score; in counting prompts; objects per class; positions
SHORTER, LONGER = 800, 1333  # the detector's image, pixels
GREY = 0x99 / 255  # outside the object's mask
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass
class Found:
    """A detected object: box (left, top, right, bottom) in pixels, right and bottom exclusive; mask (H, W) bool."""

    name: str
    score: float
    box: tuple[float, float, float, float]
    mask: torch.Tensor | None = None
    color: str = ""  # filled in where the prompt asks for one


def check_geneval(metadata: dict) -> None:
    """ValueError unless this is a GenEval object: tag, include (class, count, color?, position?), exclude?."""
    advice = "use a .jsonl prompt file like prompts/geneval_official.jsonl"
    if not isinstance(metadata, dict) or "tag" not in metadata or not metadata.get("include"):
        raise ValueError(f"it has no GenEval metadata ('tag' and 'include'); {advice}")
    if metadata["tag"] not in GENEVAL_TAGS:
        raise ValueError(f"tag {metadata['tag']!r} is none of {', '.join(GENEVAL_TAGS)}")
    for kind in ("include", "exclude"):
        for i, clause in enumerate(metadata.get(kind, [])):
            known = {"class": GENEVAL_NAMES} | ({"color": GENEVAL_COLORS} if "color" in clause else {})
            for key, values in known.items():
                if clause.get(key) not in values:
                    given = f"{kind}[{i}] has {key} {clause.get(key)!r}"
                    raise ValueError(f"{given}, which is none of {', '.join(values)}")
            if type(clause.get("count")) is not int or clause["count"] < 1:
                raise ValueError(f"{kind}[{i}] has count {clause.get('count')!r}; expected an integer above 0")
            relation, target = clause.get("position", (GENEVAL_POSITIONS[0], 0))
            if relation not in GENEVAL_POSITIONS or ("position" in clause and target not in range(i)):
                rule = f"one of {', '.join(GENEVAL_POSITIONS)} and the index of an earlier clause"
                raise ValueError(f"{kind}[{i}] has position {clause['position']}; expected {rule}")


def geneval_keep(objects: list[Found], tag: str) -> dict[str, list[Found]]:
    """{class: its objects, the surest first}: above the threshold of the prompt's tag, at most 16 of a class."""
    sure, kept = SURE_COUNTING if tag == "counting" else SURE, {}
    for thing in sorted(objects, key=lambda o: -o.score):
        if thing.score > sure and len(kept.setdefault(thing.name, [])) < MOST:
            kept[thing.name].append(thing)
    return kept


def geneval_relations(a, b) -> set[str]:
    """What box a is to box b: centre offset, each axis less a tenth of both sizes, over the offset's length, > 1/2."""
    offset, reduced = [], []
    for low, high in ((0, 2), (1, 3)):
        offset.append((a[low] + a[high] - b[low] - b[high]) / 2)
        slack = MARGIN * (abs(a[high] - a[low]) + abs(b[high] - b[low]))
        reduced.append(math.copysign(max(abs(offset[-1]) - slack, 0), offset[-1]))
    if max(map(abs, reduced)) < 1e-3:
        return set()
    dx, dy = (v / math.hypot(*offset) for v in reduced)
    true = {"left of": dx < -0.5, "right of": dx > 0.5, "above": dy < -0.5, "below": dy > 0.5}
    return {relation for relation, holds in true.items() if holds}


def _placed(objects, targets, relation) -> bool:
    return all(relation in geneval_relations(a.box, b.box) for a in objects for b in targets)


def geneval_correct(found: dict[str, list[Found]], metadata: dict) -> bool:
    """GenEval's verdict on one image: at least `count` objects (the surest `count` are looked at), none excluded."""
    groups, correct = [], True
    for clause in metadata["include"]:
        objects = found.get(clause["class"], [])[: clause["count"]]
        right = len(objects) == clause["count"]
        if right and "color" in clause:
            right = all(thing.color == clause["color"] for thing in objects)
        if right and "position" in clause:
            relation, target = clause["position"]
            right = _placed(objects, groups[target], relation)
        groups.append(objects)  # where it is not right, the verdict is settled
        correct = correct and right
    return correct and all(len(found.get(c["class"], [])) < c["count"] for c in metadata.get("exclude", []))


def geneval_partial(found: dict[str, list[Found]], metadata: dict, flowgrpo: bool = False) -> float:
    """Flow-GRPO's training reward of one image: mean credit of the clauses' demands, at most 1, not bounded below.

    Counts are exact: 1 - |found - count| / count, the same for the objects of the right colour, 1 or 0 for the
    position.  Colour and position are looked at if the count is right, position if the colour is, too.
    flowgrpo: as its code has it, a wrong count adds a 0 if colour or position was asked for, and a wrong position
    counts as a 0 and a 1 (so that it costs 1/4 where it should cost 1/3).
    """
    groups, credits = [], []
    for clause in metadata["include"]:
        objects, n = found.get(clause["class"], []), clause["count"]
        credits.append(1 - abs(n - len(objects)) / n)
        right = len(objects) == n
        if not right and flowgrpo and ("color" in clause or "position" in clause):
            credits.append(0.0)
        if right and "color" in clause:
            same = sum(thing.color == clause["color"] for thing in objects)
            credits.append(1 - (n - same) / n)
            right = same == n
        if right and "position" in clause:
            relation, target = clause["position"]
            right = groups[target] is not None and _placed(objects, groups[target], relation)
            credits.append(float(right))
            if flowgrpo and not right and groups[target] is not None:
                credits.append(1.0)
        groups.append(objects if right else None)
    return sum(credits) / len(credits)


def geneval_score(correct, tags: list[str]) -> dict[str, float]:
    """0 or 1 per image and the prompts' tags -> {tag: accuracy}, "overall": mean over the six tags.

    ValueError if a tag has no image: the overall score is the mean of six.
    """
    by_tag: dict[str, list[float]] = {tag: [] for tag in GENEVAL_TAGS}
    for right, tag in zip(correct, tags, strict=True):
        by_tag[tag].append(float(right))
    empty = [tag for tag, values in by_tag.items() if not values]
    if empty:
        raise ValueError(f"no image has the tag {', '.join(empty)}; GenEval's score is the mean over all six tags")
    score = {tag: sum(values) / len(values) for tag, values in by_tag.items()}
    return score | {"overall": sum(score.values()) / len(score)}


class Detector:
    """A frozen Mask2Former with GenEval's post-processing (mmdet's): images in, objects out."""

    def __init__(self, model):
        labels = [str(model.config.id2label.get(i, "")).lower() for i in range(model.config.num_labels)]
        labels = [COCO_NAMES.get(label, label) for label in labels]
        if tuple(labels) != GENEVAL_NAMES:
            i = next((i for i, pair in enumerate(zip(labels, GENEVAL_NAMES)) if len(set(pair)) == 2), "")
            wrong = f"class {i} is {labels[i]!r}, not {GENEVAL_NAMES[i]!r}" if i != "" else f"{len(labels)} classes"
            use = f"use {CARDS['geneval'].detector}"
            raise UsageError(f"GenEval's detector must know COCO's 80 classes in their order, but {wrong}; {use}")
        self.model = model

    def __call__(self, images) -> list[list[Found]]:
        """(B, 3, H, W) in [0, 1] -> for each image all objects with a score above 0.3."""
        h, w = images.shape[-2:]
        scale = min(SHORTER / min(h, w), LONGER / max(h, w))  # then up to multiples of 32
        size = [32 * math.ceil(round(v * scale) / 32) for v in (h, w)]
        stats = (torch.tensor(v, dtype=torch.float64) for v in (IMAGENET_MEAN, IMAGENET_STD))
        mean, std = (v.to(images).view(3, 1, 1) for v in stats)
        x = F.interpolate(images, size, mode="bilinear", antialias=True, align_corners=False)
        out = self.model(pixel_values=((x - mean) / std).to(self.model.dtype))
        pairs = zip(out.class_queries_logits.float(), out.masks_queries_logits.float())
        return [self._objects(classes, masks, size, (h, w)) for classes, masks in pairs]

    @staticmethod
    def _objects(classes, masks, size, original) -> list[Found]:
        """Logits (Q, 81) and (Q, h, w) of one image; score = class probability x mean probability inside the mask."""
        probability = classes.softmax(-1)[:, :-1]
        best, pair = probability.flatten().topk(min(len(classes), probability.numel()))  # pairs of query and class
        best, pair = best[best > SURE], pair[best > SURE]  # the mask's factor only lowers it
        if not len(best):
            return []
        logits = masks[pair // probability.shape[1]][None]
        for target in (size, original):
            logits = F.interpolate(logits, target, mode="bilinear", align_corners=False)
        inside = logits[0] > 0
        score = best * (logits[0].sigmoid() * inside).sum((1, 2)) / (inside.sum((1, 2)) + 1e-6)
        found = []
        for i in (score > SURE).nonzero().flatten().tolist():
            rows, columns = inside[i].any(1).nonzero().flatten(), inside[i].any(0).nonzero().flatten()
            box = columns[0].item(), rows[0].item(), columns[-1].item() + 1, rows[-1].item() + 1
            found.append(Found(GENEVAL_NAMES[pair[i] % probability.shape[1]], score[i].item(), box, inside[i]))
        return found


def geneval_crop(image, thing: Found):
    """Image (3, H, W) -> the object's box of it, #999 outside the object's mask."""
    x0, y0, x1, y1 = (round(v) for v in thing.box)
    if thing.mask is not None:
        image = torch.where(thing.mask, image, torch.full_like(image, GREY))
    crop = image[:, y0:y1, x0:x1]
    for axis in (1, 2):  # of a sliver only the middle is seen, and its enlargement would take gigabytes
        extra = crop.shape[axis] - 8 * crop.shape[3 - axis]
        if extra > 0:
            crop = crop.narrow(axis, extra // 2, crop.shape[axis] - extra // 2 * 2)
    return crop


def geneval_colors(clip, images, objects: list[tuple[int, Found]], chunk=64) -> None:
    """Fill in the colour of (index of its image, object) pairs: for CLIP the nearest of ten texts; one batch."""
    crops = [resize_for_clip(geneval_crop(images[i], thing)[None], clip.size) for i, thing in objects]
    features = [clip.images(torch.cat(crops[i : i + chunk])) for i in range(0, len(crops), chunk)]
    for (_, thing), feature in zip(objects, torch.cat(features) if features else ()):
        texts = []
        for color in GENEVAL_COLORS:
            wordings = f"{color} {thing.name}", f"{color}-colored {thing.name}", f"{color} object"
            texts.append(_unit(sum(clip.text(f"a photo of a {words}") for words in wordings)))
        thing.color = GENEVAL_COLORS[(torch.stack(texts) @ feature).argmax()]


@functools.cache
def _detector(source, device, dtype) -> Detector:
    from transformers import Mask2FormerForUniversalSegmentation

    model = _pretrained(Mask2FormerForUniversalSegmentation, source, MODEL_FILES, dtype=torch.float32)
    return Detector(model.to(device, dtype).eval().requires_grad_(False))


def geneval(name, device, dtype, path=None):
    """geneval: 0 or 1 by GenEval's rules; geneval-reward, geneval-reward-flowgrpo: partial credits.

    path: "DETECTOR_FOLDER" or "CLIP_FOLDER,DETECTOR_FOLDER".  Detector: Meta's Mask2Former Swin-S in place of mmdet's
    training of the same architecture, so that scores can differ a little from GenEval's own.
    """
    from transformers import CLIPTokenizer

    source = _sources(name, path)
    clip = Clip(_clip_model(source["clip"][0], device, dtype)[0], _pretrained(CLIPTokenizer, *source["tokenizer"]))
    detector = _detector(source["detector"][0], device, dtype)
    partial = functools.partial(geneval_partial, flowgrpo=name == "geneval-reward-flowgrpo")
    judge = geneval_correct if name == "geneval" else partial

    def fn(images, prompts, metadata):
        for prompt, extra in zip(prompts, metadata or [{}] * len(prompts)):
            try:
                check_geneval(extra)
            except ValueError as e:
                raise ValueError(f"prompt {prompt!r}: {e}") from e
        images = images.to(device)
        objects = [found for part in images.split(8) for found in detector(part)]
        kept = [geneval_keep(found, extra["tag"]) for found, extra in zip(objects, metadata)]
        colored = {}  # an object that two clauses look at is classified once
        for i, (found, extra) in enumerate(zip(kept, metadata)):
            for clause in extra["include"]:
                things = found.get(clause["class"], [])
                if "color" in clause and len(things) >= clause["count"]:
                    colored |= {id(thing): (i, thing) for thing in things[: clause["count"]]}
        geneval_colors(clip, images, list(colored.values()))
        return torch.tensor([float(judge(found, extra)) for found, extra in zip(kept, metadata)])

    return _term(name, fn)


# ---- rewards of a server: PNG and JSON over HTTP --------------------------------------------------------------------
# POST URL   {"images": [PNG in base64, ...], "prompts": [text, ...], "metadata": [object, ...]}
# 200        {"scores": [number, ...]}                     one for each image, larger is better
# 429, 5xx, a time-out or a broken connection: asked again after 1, 2, 4, .. 30 s; anything else stops the run.
HTTP = {"timeout": 120.0, "tries": 8, "wait": 1.0, "workers": 8, "batch": 8}  # seconds, -, seconds, requests, images
# ours; the model's own question: --reward-path unifiedreward=URL#question=FILE (docs/rewards.md)
UNIFIED_QUESTION = (
    "<image>\nThe picture above was drawn for a caption. Judge two things: whether it shows what the caption asks "
    "for (objects, their number, attributes and relations), and how good it looks (sharpness, detail, colours, "
    "composition). Give one mark from 1 (worst) to 5 (best) and end your answer with it, written as 'Final Score: ' "
    "and the number.\nText Caption: [{prompt}]"
)


def _server(name: str, path: str) -> tuple[str, dict]:
    """ "http://host:port/path#timeout=60&tries=20" -> the URL, the settings; UsageError if it is none."""
    from urllib.parse import urlsplit

    form = f"--reward-path {name}=http://HOST:PORT/PATH"
    try:
        parts = urlsplit(path)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.port == 0:
            raise ValueError
    except ValueError:
        raise UsageError(f"reward {name!r} is scored by a server of yours, {path!r} is no URL; give {form}") from None
    settings = dict(HTTP)
    for item in parts.fragment.split("&") if parts.fragment else ():
        key, _, value = item.partition("=")
        if key == "question" and name == "unifiedreward":
            settings[key] = _question(value)
            continue
        try:
            settings[key] = type(HTTP[key])(value)
            if not (math.isfinite(settings[key]) and settings[key] > 0):
                raise ValueError
        except (KeyError, ValueError):
            known = "&".join(f"{k}={v:g}" for k, v in HTTP.items())
            raise UsageError(f"--reward-path {name}=...#{item} is no setting; these are: {form}#{known}") from None
    return path.partition("#")[0], settings


def _question(file: str) -> str:
    """The text asked about every image, with {prompt} where the caption goes."""
    try:
        text = Path(file).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as problem:
        advice = "give a text file with {prompt} where the caption goes"
        raise UsageError(f"question={file}: {problem}; {advice}") from None
    if text.count("{prompt}") != 1 or "Final Score:" not in text:
        raise UsageError(f"question={file} needs {{prompt}} once and the words 'Final Score:', which answers repeat")
    return text


def _check_server(name: str, path: str) -> None:
    """UsageError unless something listens where the URL points; what, shows at the first request."""
    import socket
    import urllib.request
    from urllib.parse import urlsplit

    parts = urlsplit(_server(name, path)[0])
    if parts.scheme in urllib.request.getproxies() and not urllib.request.proxy_bypass(parts.hostname):
        return
    port = parts.port or {"http": 80, "https": 443}[parts.scheme]
    problem = _within(4, lambda: socket.create_connection((parts.hostname, port), timeout=4).close())
    if problem:
        raise UsageError(f"reward {name!r}: no server at {path} ({problem}); start it, or correct --reward-path")


class Retry(Exception):
    """A request that may succeed if it is made again."""


def _request(url: str, body: dict | None, timeout: float):
    """One request, JSON in and out; body None: GET.  Retry for what may pass, ValueError for what will not."""
    import http.client
    import urllib.error
    import urllib.request

    headers = {"Content-Type": "application/json"}
    if os.environ.get("REWARD_API_KEY"):
        headers["Authorization"] = "Bearer " + os.environ["REWARD_API_KEY"]
    data = None if body is None else json.dumps(body).encode()
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data, headers), timeout=timeout) as answer:
            text = answer.read().decode(errors="replace")
    except urllib.error.HTTPError as e:
        with e:
            said = e.read(200).decode(errors="replace")
        problem = f"{url} answered HTTP {e.code} {e.reason}: {said!r}"
        if e.code in (408, 429) or e.code >= 500 and e.code != 501:
            raise Retry(problem) from e
        raise ValueError(problem) from e
    except (OSError, http.client.HTTPException) as e:  # refused, reset, timed out, cut short
        raise Retry(f"{url} failed: {getattr(e, 'reason', '') or e or type(e).__name__}") from e
    try:
        return json.loads(text)
    except ValueError as e:
        raise ValueError(f"{url} answered what is no JSON: {text[:200]!r}") from e


def _ask(url: str, body: dict | None, settings: dict, stop: threading.Event):
    """A request, repeated with growing pauses while that may help."""
    for attempt in range(1, settings["tries"] + 1):
        try:
            return _request(url, body, settings["timeout"])
        except Retry as e:
            if attempt == settings["tries"]:
                times = f"{attempt} tries" if attempt > 1 else "1 try"
                raise ValueError(f"{e} ({times}, {settings['timeout']:g} s each)") from e
            stop.wait(min(settings["wait"] * 2 ** (attempt - 1), 30 * settings["wait"]))
            if stop.is_set():
                raise


def _ask_all(url: str, bodies: list, settings: dict) -> list:
    """The answers to all bodies, in order, `workers` requests at a time; a failure ends the others' waiting."""
    stop = threading.Event()
    pool = ThreadPoolExecutor(settings["workers"])
    try:
        futures = [pool.submit(_ask, url, body, settings, stop) for body in bodies]
        return [future.result() for future in futures]
    finally:
        stop.set()
        pool.shutdown(wait=False, cancel_futures=True)


def _png(pixels, size=None) -> str:
    """(H, W, 3) uint8 -> PNG in base64; size: (width, height) to resize to, bicubic."""
    from PIL import Image

    image, buffer = Image.fromarray(pixels), io.BytesIO()
    (image.resize(size, Image.BICUBIC) if size else image).save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def http_scores(answer, n: int) -> list[float]:
    """The scores in a server's answer; ValueError unless it is {"scores": [n numbers]}."""
    scores = answer.get("scores") if isinstance(answer, dict) else None
    if not isinstance(scores, list) or len(scores) != n:
        what = f"{len(scores)} scores" if isinstance(scores, list) else f"no list of scores: {str(answer)[:200]!r}"
        raise ValueError(f'the server answered {what}; expected {{"scores": [...]}} with {n} numbers')
    for i, score in enumerate(scores):
        if isinstance(score, bool) or not isinstance(score, int | float):
            raise ValueError(f"the server answered {score!r} as score {i}; expected a number")
    return [float(score) for score in scores]


def http_reward(name, device, dtype, path=None):
    """deqa, http: the protocol above.  path: http://HOST:PORT/PATH, with settings after a # (see HTTP)."""
    url, settings = _server(name, path or "")
    batch = settings["batch"]

    def fn(images, prompts, metadata):
        encoded, extra = [_png(pixels) for pixels in _bytes(images)], metadata or [{}] * len(prompts)
        parts = [slice(i, i + batch) for i in range(0, len(encoded), batch)]
        bodies = [{"images": encoded[p], "prompts": prompts[p], "metadata": list(extra[p])} for p in parts]
        answers = _ask_all(url, bodies, settings)
        return [v for answer, body in zip(answers, bodies) for v in http_scores(answer, len(body["images"]))]

    return _term(name, fn)


def unified_score(answer: dict) -> float:
    """The number after "Final Score:" in a chat completion; ValueError if there is none from 1 to 5."""
    try:
        text = answer["choices"][0]["message"]["content"]
        found = re.search(r"Final Score:\s*(\d+(?:\.\d+)?)", text)
    except (LookupError, TypeError) as e:
        raise ValueError(f"the server's answer is no chat completion: {str(answer)[:200]!r}") from e
    if not found or not 1 <= float(found[1]) <= 5:
        raise ValueError(f"the model's answer has no 'Final Score:' from 1 to 5: {text[-200:]!r}")
    return float(found[1])


def unifiedreward(name, device, dtype, path=None):
    """UnifiedReward-7b behind an OpenAI-compatible server (sglang, vLLM).  path: http://HOST:PORT/v1, # as above."""
    url, settings = _server(name, path or "")
    url, models = url.rstrip("/").removesuffix("/chat/completions"), []
    question_text = settings.pop("question", UNIFIED_QUESTION)

    def fn(images, prompts, metadata):
        if not models:  # vLLM wants the name under which it serves the model
            answer = _ask_all(f"{url}/models", [None], settings)[0]
            try:
                models.append(answer["data"][0]["id"])
            except (LookupError, TypeError) as e:
                raise ValueError(f"{url}/models lists no model: {str(answer)[:200]!r}") from e
        bodies = []
        for pixels, prompt in zip(_bytes(images), prompts):
            picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + _png(pixels, (512, 512))}}
            question = {"type": "text", "text": question_text.replace("{prompt}", prompt)}
            message = {"role": "user", "content": [picture, question]}
            bodies.append({"model": models[0], "temperature": 0, "messages": [message]})
        scores = []
        for answer, prompt in zip(_ask_all(f"{url}/chat/completions", bodies, settings), prompts):
            try:
                scores.append(unified_score(answer))
            except ValueError as e:
                raise ValueError(f"prompt {prompt!r}: {e}") from e
        return scores

    return _term(name, fn)


# ---- black-box rewards ----------------------------------------------------------------------------------------------
def _bytes(images):
    """(B, 3, H, W) in [0, 1] -> (B, H, W, 3) uint8, RGB."""
    return (images * 255).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def _shapes():
    try:
        from tiny import shapes
    except ImportError as e:
        raise UsageError(f"rewards shapes and shapes-strict need this repository's folder tiny ({e}); copy it") from e
    return shapes


def shapes_reward(name, device, dtype, path=None):
    """The checker of the embedded task, tiny/shapes.py: score, or strict accuracy."""
    score, column = _shapes().score, name == "shapes-strict"
    return _term(name, lambda images, prompts, metadata: score(images.cpu().numpy(), prompts)[column])


def ocr_target(prompt: str) -> str:
    """The text between the first two double quotes; ValueError if there is none."""
    parts = prompt.split('"')
    if len(parts) < 3 or not parts[1].strip():
        raise ValueError(f'{prompt!r} has no text between two double quotes; write e.g. a sign that says "Hello"')
    return parts[1]


def ocr_score(text: str, target: str) -> float:
    """1 if target is in text, else 1 - min(edit distance, n) / n, n = len(target); case and spaces ignored."""
    text, target = (s.lower().replace(" ", "") for s in (text, target))
    if target in text:
        return 1.0
    row = list(range(len(target) + 1))
    for i, a in enumerate(text, 1):
        above, row = row, [i]
        for j, b in enumerate(target, 1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (a != b)))
    return 1 - min(row[-1], len(target)) / len(target)


def ocr(name, device, dtype, path=None):
    """Text rendering by Flow-GRPO's and AWM's rule; rapidocr in place of PaddleOCR.  Letters need about 15 pixels."""
    from rapidocr import RapidOCR

    # All settings here, since arguments of a call persist; 960/max is PaddleOCR's own detector size.
    params = {
        "Global.log_level": "critical",
        "Global.use_cls": False,
        "Det.limit_side_len": 960,
        "Det.limit_type": "max",
    }
    # by default every process takes all cores and spins on them: with torchrun that is cores x processes
    engine = RapidOCR(params=params | {"EngineConfig.onnxruntime.intra_op_num_threads": torch.get_num_threads()})

    def fn(images, prompts, metadata):
        read = ["".join(engine(image[..., ::-1]).txts or ()) for image in _bytes(images)]  # the engine wants BGR
        return torch.tensor([ocr_score(text, ocr_target(p)) for text, p in zip(read, prompts)])

    return _term(name, fn)


def jpeg(name, device, dtype, path=None):
    """File size as in DDPO (Black et al. 2305.13301), units of 1000 bytes; it grows with the image (theirs: 512^2)."""
    from PIL import Image

    def size(pixels):
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, format="JPEG", quality=95)
        return buffer.tell() / 1000

    sign = 1 if name == "jpeg-incompress" else -1
    return _term(name, lambda images, prompts, metadata: torch.tensor([sign * size(x) for x in _bytes(images)]))


# ---- diversity of the images of one prompt --------------------------------------------------------------------------
def diversity(features) -> float:
    """(n, D) -> sum over i, j of |e_i - e_j|^2 / (2 n (n - 1)), e = features at unit length.

    The same as 1 - mean cosine of the pairs i != j; VMPO's and soc-fine-tuning-sd's with DreamSim embeddings.
    """
    n = len(features)
    if n < 2:
        raise ValueError(f"the diversity of {n} image is not defined; give two or more images of the prompt")
    e = _unit(features.double())
    return (torch.cdist(e, e, compute_mode="donot_use_mm_for_euclid_dist").square().sum() / (2 * n * (n - 1))).item()


def check_diversity(name: str, path: str | None = None) -> None:
    """UsageError if load_diversity(name, device, path) cannot work: name, packages, weights."""
    if name not in DIVERSITY:
        close = " or ".join(difflib.get_close_matches(name, DIVERSITY, cutoff=0.4))
        hint = f"did you mean {close}? " if close else ""
        raise UsageError(f"unknown diversity {name!r}; {hint}known: {', '.join(DIVERSITY)}")
    _check_packages(name)
    _check_weights(name, path or "")
    if name == "dreamsim" and path and not Path(path).is_dir():
        raise UsageError(f"--reward-path dreamsim={path} is no folder; expected the unpacked weights of its release")


def load_diversity(name: str, device="cpu", path: str | None = None) -> Callable[[torch.Tensor], float]:
    """The function images (n, 3, H, W) in [0, 1], n >= 2, of one prompt -> their diversity, on 8-bit pixels.

    diversity-clip  CLIP L/14 image features; path: a folder of another CLIPModel
    dreamsim        the DreamSim ensemble of package dreamsim (Fu et al. 2306.09344); path: folder of its weights
    """
    check_diversity(name, path)
    embed = _embedder(name, str(torch.device(device)), path or "")

    def fn(images) -> float:
        if not torch.is_tensor(images) or images.ndim != 4 or images.shape[1] != 3 or len(images) < 2:
            given = tuple(images.shape) if torch.is_tensor(images) else type(images).__name__
            raise ValueError(f"images are {given}; the diversity needs a tensor (n, 3, H, W) with n of 2 or more")
        images = (images.detach().float().clamp(0, 1) * 255).round() / 255
        with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
            found = diversity(torch.cat([embed(part) for part in images.split(16)]))
        if not math.isfinite(found):
            raise RewardError(f"diversity {name!r} is {found}; expected a finite number")
        return found

    return fn


@functools.cache
def _embedder(name: str, device: str, path: str) -> Callable:
    """(n, 3, H, W) in [0, 1] -> (n, D)."""
    if name == "diversity-clip":
        return Clip(_clip_model(_sources(name, path)["clip"][0], device, torch.float32)[0]).images
    package = _import_package(name, "dreamsim")
    folder = path or os.path.join(torch.hub.get_dir(), "dreamsim")
    os.makedirs(folder, exist_ok=True)
    try:
        model, _ = package.dreamsim(pretrained=True, device=device, cache_dir=folder)
    except Exception as e:
        raise UsageError(
            f"diversity 'dreamsim' could not load its weights ({type(e).__name__}: {e}); unpack the zip of "
            "github.com/ssundaram21/dreamsim/releases in FOLDER and pass --reward-path dreamsim=FOLDER, "
            "or take diversity-clip"
        ) from e

    def embed(images):  # squashed to 224 x 224, as by the package's own preprocessing
        x = F.interpolate(images.to(device), (224, 224), mode="bicubic", antialias=True, align_corners=False)
        return model.embed(x.clamp(0, 1)).reshape(len(images), -1)

    return embed


# ---- your own, and the list -----------------------------------------------------------------------------------------
def _import_function(name: str):
    """The function of "package.module:function", the current directory being on sys.path; else UsageError."""
    module, _, function = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found = vars(importlib.import_module(module)).get(function)
    except Exception as e:
        raise UsageError(f"reward {name!r}: importing {module} from {os.getcwd()} or sys.path failed: {e!r}") from e
    if not callable(found):
        raise UsageError(f"reward {name!r}: {module} has no function {function!r}; define it there")
    return found


def _function_term(name: str) -> Term:
    fn = _import_function(name)
    return Term(name, 1.0, fn, bool(getattr(fn, "differentiable", False)), "your own", "your own")


LOADERS = {
    **dict.fromkeys(("shapes", "shapes-strict"), shapes_reward),
    **dict.fromkeys(("jpeg", "jpeg-incompress"), jpeg),
    **dict.fromkeys(("geneval", "geneval-reward", "geneval-reward-flowgrpo"), geneval),
    **dict.fromkeys(("deqa", "http"), http_reward),
    "hpsv2-openclip": hpsv2_openclip,
    "imagereward": imagereward,
    "imagereward-package": imagereward_package,
    "ocr": ocr,
    "unifiedreward": unifiedreward,
}
REWARDS = {name: functools.partial(LOADERS.get(name, clip_reward), name) for name in CARDS}  # (device, dtype, path)
