"""Rewards: a dict of loaders, and weighted sums of them.  Images (B, 3, H, W) in [0, 1] and prompts in, (B,) out.

    check("hpsv2=1,clipscore=0.5", paths, prompts)     # light: names, packages, weights, prompts; raises UsageError
    reward = load("hpsv2=1,clipscore=0.5", "cuda", torch.bfloat16, paths)
    total, parts = reward(images, prompts)             # on uint8-rounded pixels, no graph
    total, parts = reward(images, prompts, grad=True)  # on the float tensor, differentiable with respect to it

Larger is always better.  A reward that fails stops the run with its name and the sample (RewardError): there is no
fallback and no score in place of an error.  Your own: --reward package.module:function, a function of (images,
prompts, metadata) that returns (B,); set `function.differentiable = True` if gradients may pass through it.
A new reward here is a Card, a loader and, where it is not of the CLIP type, an entry in LOADERS at the end.
"""

import dataclasses
import difflib
import functools
import html
import importlib
import importlib.util
import io
import math
import os
import sys
import threading
from collections.abc import Callable
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
    tokenizer: str = ""  # hub id; replaced by FOLDER, or by a folder `tokenizer` beside FILE
    metric: bool = False  # meant for reporting; too coarse to train on


HF, OCR, L14 = ("transformers",), ("rapidocr", "onnxruntime"), "openai/clip-vit-large-patch14"
B32, PICK = "openai/clip-vit-base-patch32", ("yuvalkirstain/PickScore_v1", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K")
HPS21, HPS20 = ("xswu/HPSv2", "HPS_v2.1_compressed.pt"), ("xswu/HPSv2", "HPS_v2_compressed.pt")
HEAD = ("trl-lib/ddpo-aesthetic-predictor", "aesthetic-model.pth")  # = sac+logos+ava1-l14-linearMSE.pth
BLIP = ("THUDM/ImageReward", "ImageReward.pt")
CARDS = {
    "shapes": Card("share of the caption's clauses true of the 32x32 image; 0..1", "MIT", packages=("scipy",)),
    "shapes-strict": Card("1 if all of them are true, else 0; accuracy", "MIT", packages=("scipy",), metric=True),
    "clipscore": Card("cosine, CLIP L/14 (VMPO's); SD1.5 .27", "MIT", True, HF, L14, (), L14),
    "clipscore-hessel": Card("2.5 max(cosine, 0), CLIP B/32, 'A photo depicts'", "MIT", True, HF, B32, (), B32),
    "pickscore": Card("exp(logit_scale) cosine; 20..24", "code MIT", True, HF, PICK[0], (), PICK[1]),
    "pickscore26": Card("pickscore / 26 (AWM's training scale)", "code MIT", True, HF, PICK[0], (), PICK[1]),
    "aesthetic": Card("LAION aesthetic V2, ignores the prompt; 3..8", "Apache-2.0", True, HF, L14, HEAD),
    "hpsv2": Card("HPS v2.1, cosine; SD1.5 .24", "Apache-2.0", True, (*HF, "ftfy"), "", HPS21, L14),
    "hpsv2.0": Card("HPS v2.0, another scale; SD1.5 .27", "Apache-2.0", True, (*HF, "ftfy"), "", HPS20, L14),
    "imagereward": Card("BLIP, standardised; -2..2, SD1.5 .03", "Apache-2.0", True, HF, "", BLIP, "bert-base-uncased"),
    "ocr": Card('reads the text between the first two " of the prompt; 0..1', "Apache-2.0", packages=OCR),
    "jpeg": Card("compressibility: -(kB of a quality-95 JPEG), kB = 1000 bytes (DDPO)", "MIT", packages=("PIL",)),
    "jpeg-incompress": Card("kB of a quality-95 JPEG (DDPO)", "MIT", packages=("PIL",)),
}
PIP = {"rapidocr": "rapidocr==3.10.0", "onnxruntime": "onnxruntime==1.31.1", "PIL": "pillow"}  # where not the name
CLIP_FILES = (("config.json",), ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"))
TOKENIZER_FILES = (("tokenizer.json", "vocab.json", "vocab.txt"),)


def describe() -> str:
    """A table of all rewards for --help."""
    rows = [("reward", "grad", "what and range", "weights", "licence")]
    for name, card in CARDS.items():
        weights = " + ".join(filter(None, (card.clip, "/".join(card.file)))) or "-"
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
        if name and name not in REWARDS:
            raise UsageError(f"--reward-path {item!r} names no reward; known: {', '.join(REWARDS)}")
        if not path or name in found:
            raise UsageError(f"--reward-path {item!r} is empty or given twice; expected one NAME=PATH for each reward")
        found[name] = path
    return found


def _assign_paths(terms: list[tuple[str, float]], paths) -> dict[str, str]:
    """{name: its --reward-path or ""}; UsageError if a path belongs to no term."""
    paths = parse_paths(paths)
    takers = [name for name, _ in terms if name in CARDS and (CARDS[name].clip or CARDS[name].file)]
    for name, path in paths.items():
        if not name and len(takers) != 1:
            who = f"{', '.join(takers)} all take one: write NAME=PATH" if takers else "no reward in --reward takes one"
            raise UsageError(f"--reward-path {path!r} fits no single reward; {who}")
        if name and name not in takers:
            raise UsageError(f"--reward-path {name}={path}: {name!r} is not in --reward, or takes no path")
    return {name: paths.get(name) or (name in takers and paths.get("")) or "" for name, _ in terms}


# ---- weights: a given path, the local hub cache, the hub ------------------------------------------------------------
def _sources(name: str, path: str | None) -> dict:
    """What a loader opens: {part: (local folder as a Path, or hub id; the files needed, each with alternatives)}."""
    card, found, path = CARDS[name], {}, path or ""
    folder, file = path.rpartition(",")[::2] if card.clip and card.file else ("", path) if card.file else (path, "")
    if card.clip:
        found["clip"] = Path(folder) if folder else card.clip, CLIP_FILES
    if card.file:
        found["file"] = (Path(file).parent, ((Path(file).name,),)) if file else (card.file[0], (card.file[1:],))
    if card.tokenizer:
        beside = Path(file).parent / "tokenizer"
        local = Path(folder) if folder else beside if file and beside.is_dir() else None
        found["tokenizer"] = local or card.tokenizer, TOKENIZER_FILES
    return found


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


def _read_checkpoint(source, groups) -> dict:
    """The state dict of a checkpoint file, read without running pickled code."""
    file = _here(source, groups[0])
    if file is None:
        from huggingface_hub import hf_hub_download

        file = hf_hub_download(source, groups[0][0])
    state = torch.load(file, map_location="cpu", weights_only=True)
    return state.get("state_dict", state)


def _hub_problem(repo: str, file: str) -> str:
    """Why the hub cannot give this file, or "" if it can: one request, four seconds at the most."""
    if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
        return "HF_HUB_OFFLINE is set"
    import urllib.request

    url = f"{os.environ.get('HF_ENDPOINT') or 'https://huggingface.co'}/{repo}/resolve/main/{file}"
    answer = ["no answer in 4 s"]

    def ask():
        try:
            urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=4).close()
            answer[0] = ""
        except (OSError, ValueError) as e:
            answer[0] = str(e)

    thread = threading.Thread(target=ask, daemon=True)  # a stuck name lookup ignores the socket's timeout
    thread.start()
    thread.join(4)
    return answer[0]


def _check_weights(name: str, path: str) -> None:
    needed = [(source, names) for source, groups in _sources(name, path).values() for names in groups]
    missing = [(source, names) for source, names in needed if not _here(source, names)]
    form = ("FOLDER," if CARDS[name].file else "FOLDER") * bool(CARDS[name].clip) + "FILE" * bool(CARDS[name].file)
    for source, names in missing:
        if isinstance(source, Path):
            what = f"{form} (FOLDER: written by save_pretrained, with tokenizer; FILE: the original checkpoint)"
            raise UsageError(f"--reward-path {name}={path}: no {' or '.join(names)} in {source}; expected {what}")
    problem = _hub_problem(missing[0][0], missing[0][1][0]) if missing else ""
    if problem:
        files = ", ".join(f"{names[0]} of {repo}" for repo, names in missing)
        beside = ", with the tokenizer in a folder `tokenizer` beside it" if form == "FILE" else ""
        raise UsageError(
            f"reward {name!r} needs weights that are neither given nor in the local hub cache ({files}), and the hub "
            f"is not reachable ({problem}): fetch them elsewhere (hf download {missing[0][0]}) and pass --reward-path "
            f"{name}={form}{beside}; or take the embedded task: --reward shapes --model tiny-sd35"
        )


def check(spec: str, paths=None, prompts: list[str] | None = None) -> None:
    """Everything that can be found without loading a model, in well under a second; UsageError says what to do."""
    for name, path in _assign_paths(parse_spec(spec), paths).items():
        if name not in CARDS:
            _import_function(name)
            continue
        packages = CARDS[name].packages
        absent = [p for p in packages if importlib.util.find_spec(p) is None]
        if absent:
            line = " ".join(PIP.get(p, p) for p in packages)
            raise UsageError(f"reward {name!r} needs the package {', '.join(absent)}: pip install {line}")
        _check_weights(name, path)
        rule = ocr_target if name == "ocr" else _shapes().parse if name.startswith("shapes") else str
        for line, prompt in enumerate(prompts or [], 1):
            try:
                rule(prompt)
            except ValueError as e:
                raise UsageError(f"reward {name!r} cannot score line {line} of the prompts: {e}") from e


def check_args(args) -> None:
    """check() for a trainer's --reward and --eval-rewards; fills in args.paths and args.eval_paths."""
    every = parse_paths(args.reward_path)
    scored = {name for name, _ in parse_spec(args.eval_rewards)} if args.eval_rewards else set()
    trained = {name for name, _ in parse_spec(args.reward)}
    args.paths = {k: p for k, p in every.items() if k in trained or k not in scored}
    args.eval_paths = {k: p for k, p in every.items() if k in scored}
    held_out = [p.text for p in args.eval_prompt_list]
    check(args.reward, args.paths, [p.text for p in args.prompt_list])
    if args.eval_images:
        check(args.reward, args.paths, held_out)
    if args.eval_images and args.eval_rewards:
        check(args.eval_rewards, args.eval_paths, held_out)


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
    mean, std = (torch.tensor(v).to(images).view(3, 1, 1) for v in (CLIP_MEAN, CLIP_STD))
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

    model = _pretrained(CLIPModel, source, CLIP_FILES, dtype=torch.float32)
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
    "imagereward": imagereward,
    "ocr": ocr,
}
REWARDS = {name: functools.partial(LOADERS.get(name, clip_reward), name) for name in CARDS}  # (device, dtype, path)
