"""Rewards by name, and weighted sums of them: images (B, 3, H, W) in [0, 1] and prompts in, (B,) out.

    check("hpsv2=1,clipscore=0.5", paths, prompts)     # light: names, packages, weights, prompts
    reward = load("hpsv2=1,clipscore=0.5", "cuda", torch.bfloat16, paths)
    total, parts = reward(images, prompts)             # on uint8-rounded pixels, no graph
    total, parts = reward(images, prompts, grad=True)  # on the float tensor, differentiable

Larger is always better.  A reward that fails stops the run with its name and the sample (RewardError);
bad input is one sentence (UsageError).  Your own: --reward package.module:function, a function of
(images, prompts, metadata) that returns (B,), with `function.differentiable = True` if gradients pass.
A new one: a Card here, a loader in a file of judges/, an entry in LOADERS.
"""

import copy
import difflib
import functools
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


# ---- the contract: terms and their weighted sum -----------------------------
class RewardError(RuntimeError):
    """While running: a reward raised, or returned what is not (B,) finite floats."""


class UsageError(ValueError):
    """Bad input: what was given, what is expected, what to do."""


class Missing(UsageError):
    """What is asked for is right, but its weights, package or server are not here."""


class NoScore(ValueError):
    """A judge's answers hold no score for some of the samples; scores (n,): nan there."""

    def __init__(self, problem: str, scores: list[float]):
        super().__init__(problem)
        self.scores = scores


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
    grouped: bool = False  # sees the images of one prompt, and nothing else, in every call


@dataclass
class Reward:
    """A weighted sum of terms; `differentiable` only if every term is, `grouped` if one is."""

    spec: str
    terms: list[Term]
    differentiable: bool
    group_size: int = 0  # images of a prompt, one after the other: what a grouped term sees
    skip_failed: bool = False  # nan in place of a score that a judge did not give

    @property
    def weights(self) -> dict[str, float]:
        return {t.name: t.weight for t in self.terms}

    @property
    def grouped(self) -> bool:
        return any(t.grouped for t in self.terms)

    def __call__(self, images, prompts, metadata=None, grad=False, chunk=None):
        """Images (B, 3, H, W) in [0, 1], B prompts, B metadata or None -> total (B,), {term: (B,)}.

        Without grad: pixels rounded to 8 bits, as a saved image would be scored, no graph.  With grad:
        the tensor itself; ValueError if a term passes no gradients.  RewardError if a term misbehaves.
        """
        _check_batch(images, prompts, metadata)
        if grad and not self.differentiable:
            names = ", ".join(t.name for t in self.terms if not t.differentiable)
            raise ValueError(f"reward {names} passes no gradients; use a black-box method or --reward clipscore")
        images, parts = images.to(wide(images.dtype)) if grad else eight_bit(images), {}
        # autocast off: a score must not depend on the precision of the training code around it
        with torch.set_grad_enabled(grad), torch.autocast(images.device.type, enabled=False):
            for t in self.terms:
                size = self._whole_groups(t, len(images)) if t.grouped else chunk or len(images)
                chunks = [slice(i, i + size) for i in range(0, len(images), size)]
                scores = [_score(t, images, prompts, metadata, c, self.skip_failed) for c in chunks]
                parts[t.name] = torch.cat(scores)
            total = torch.stack([t.weight * parts[t.name] for t in self.terms]).sum(0)
        scored = torch.stack(list(parts.values())).isfinite().all(0)
        over = (scored & ~total.detach().isfinite()).nonzero().flatten().tolist()
        need(not over, f"the sum {self.spec} is too large for float32 (sample {(over or [0])[0]})", RewardError)
        return total, parts

    def _whole_groups(self, term, count: int) -> int:
        whole = self.group_size > 1 and count % self.group_size == 0
        given = f"{count} images in groups of {self.group_size}"
        need(whole, f"reward {term.name!r} compares the images of a prompt; given are {given}", ValueError)
        return self.group_size


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


def _score(term: Term, images, prompts, metadata, chunk: slice, skip=False) -> torch.Tensor:
    """(n,) float32 on the images' device: one term on one chunk, checked.  skip: nan where there is no score."""
    prompts, first = list(prompts[chunk]), chunk.start
    # copies: what a reward does to them reaches no other reward, nor the caller
    images, metadata, n = images[chunk].clone(), copy.deepcopy(metadata and list(metadata[chunk])), len(prompts)

    def error(problem, i=None):
        where = f"samples {first} to {first + n - 1}, the first" if i is None else f"sample {first + i}"
        return RewardError(f"reward {term.name!r} {problem} ({where}: prompt {prompts[i or 0]!r})")

    try:
        out = term.fn(images, prompts, metadata)
    except NoScore as e:
        if not skip:
            raise error(f"has no score: {e}", [math.isnan(v) for v in e.scores].index(True)) from e
        out = e.scores
    except (Exception, SystemExit) as e:  # whatever it is, the message needs the reward and the sample
        raise error(f"raised {type(e).__name__}: {e}") from e
    try:
        out = torch.as_tensor(out)
    except (TypeError, ValueError, RuntimeError) as e:
        raise error(f"returned {type(out).__name__}; expected {n} floats") from e
    if tuple(out.shape) != (n,) or not out.is_floating_point():
        raise error(f"returned {out.dtype} of shape {tuple(out.shape)}; expected floats of shape ({n},)")
    if torch.is_grad_enabled() and images.requires_grad and not out.requires_grad:
        raise error("is declared differentiable but what it returned has no gradient")
    given, out = out, out.to(images.device, torch.float32)
    bad = out.detach().isinf() if skip else ~out.detach().isfinite()
    for i in bad.nonzero().flatten().tolist()[:1]:
        raise error(f"returned {given[i].item()}; expected finite numbers (of float32)", i)
    return out


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
    grouped: bool = False  # compares the images of a prompt


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
ASKED = {}, "judges.questions:check_questions", True
CARDS = {
    "shapes": Card("share of the caption's clauses true of the 32x32 image; 0..1", *SHAPES),
    "shapes-strict": Card("1 if all of them are true, else 0; accuracy", *SHAPES, metric=True),
    "clipscore": Card("cosine, CLIP L/14 (VMPO's); SD1.5 .27", "MIT", True, FTFY, *CLIP),
    "clipscore-hessel": Card("2.5 max(cosine, 0), CLIP B/32, 'A photo depicts'", "MIT", True, FTFY, *HESSEL),
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
    "unifiedreward": Card("a served UnifiedReward's mark; 1..5", *SERVED),
    "unifiedreward2": Card("a served UnifiedReward 2.0: alignment, coherence, style; 1..5", *SERVED),
    "rubric": Card("the mark of any served vision-language model; 0..1", *SERVED),
    "vqascore": Card("a served model's P(yes) that this is the prompt; 0..1", *SERVED),
    "soft-tifa": Card("mean P(right answer) of the prompt's questions (GenEval 2); 0..1", *SERVED, *ASKED),
    "soft-tifa-gm": Card("their geometric mean (its prompt-level score); 0..1", *SERVED, *ASKED),
    "dpg": Card("share of the questions answered yes (DPG-Bench); 0..1", *SERVED, *ASKED),
    "winrate": Card("P(preferred to the prompt's other images), served model; 0..1", *SERVED, grouped=True),
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
LARGEST_WEIGHT = 1e6


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
        need(abs(weight) <= LARGEST_WEIGHT, f"{what} is beyond +-{LARGEST_WEIGHT:.0e}; scale the others down instead")
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
    """UsageError if [(folder or hub id, names), ...] cannot be fetched; asks the hub once for each id, 4 s."""
    from huggingface_hub import HfApi, constants

    form = (CARDS | DIVERSITY)[name].path
    for source, names in missing:
        if isinstance(source, Path):
            what = f"{form} (FOLDER: written by save_pretrained, with tokenizer; FILE: the original checkpoint)"
            raise UsageError(f"--reward-path {name}={path}: no {' or '.join(names)} in {source}; expected {what}")

    def there(repo, names):  # huggingface_hub's own call: with the user's token, and gated ids say so
        listed = {file.rfilename for file in HfApi().model_info(repo, timeout=4).siblings or ()}
        need(listed & set(names), f"{repo} has no {' or '.join(names)}")

    problem = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else ""
    for repo, names in missing:
        problem = problem or within(4, functools.partial(there, repo, names))
    repo = missing[0][0]
    files = ", ".join(f"{names[0]} of {repo}" for repo, names in missing)
    beside = ", with the tokenizer in a folder `tokenizer` beside it" if form == "FILE" else ""
    embedded = "task, --preset tiny" if name in CARDS else f"CLIP, {name}=tiny/clip"
    need(
        not problem,
        f"{_named(name)} needs weights that are neither given nor in the local hub cache ({files}), and not to "
        f"be had from the hub ({problem}): fetch them elsewhere (hf download {repo}) and pass --reward-path "
        f"{name}={form}{beside}; or take the embedded {embedded}",
        Missing,
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
    need(not absent, f"{_named(name)} needs the package {absent}: pip install {line}", Missing)


# ---- check and load ---------------------------------------------------------
def check(spec: str, paths=None, prompts: list[str] | None = None, metadata=None, lines=None, flag="") -> None:
    """UsageError for everything that can be found without loading a model, in well under a second.

    metadata: the prompts' JSON objects, {} for a prompt without; None leaves them unchecked.
    lines: the prompts' line numbers in their file, for messages; None counts from 1.  flag: that gave them.
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
                line, of = lines[i] if lines else i + 1, f" (--{flag})" * bool(flag)
                raise UsageError(f"reward {name!r} cannot score line {line} of the prompts{of}: {e}") from e


def check_args(args) -> None:
    """check() of --reward and --eval-rewards; fills in args.paths and args.eval_paths."""
    paths, specs = dict(parse_paths(args.reward_path)), (args.reward, args.eval_rewards)
    again = f"retries={args.reward_retries}"  # a setting of the address, unless that has its own
    for name, path in paths.items():
        if path.startswith(("http://", "https://")) and "retries=" not in path:
            paths[name] = path + ("&" if "#" in path else "#") + again
    trained, scored = ({name for name, _ in parse_spec(spec)} if spec else set() for spec in specs)
    args.paths = {k: p for k, p in paths.items() if k in trained or k not in scored}
    args.eval_paths = {k: p for k, p in paths.items() if k in scored}
    own, held = args.prompt_list, args.eval_prompt_list
    uses, flag = [(args.reward, args.paths, own, "prompts")], "prompts" if held is own else "eval-prompts"
    if args.eval_images:
        uses += [(args.reward, args.paths, held, flag), (args.eval_rewards, args.eval_paths, held, flag)]
    for spec, paths, prompts, flag in uses:
        if spec:
            check(spec, paths, [p.text for p in prompts], [p.metadata for p in prompts], None, flag)
    if is_grouped(args.reward):
        alone = f"--reward {args.reward} compares the images of a prompt, --group-size is {args.group_size}"
        need(args.group_size > 1, f"{alone}; use 2 or more")
        scored = args.eval_rewards or not args.eval_images
        need(scored, f"--reward {args.reward} says nothing of one held-out image; give --eval-rewards as well")
    need(
        not args.eval_rewards or not is_grouped(args.eval_rewards),
        f"--eval-rewards {args.eval_rewards} compares images of one model, whose mean says nothing; leave it out",
    )


def load_args(args, device) -> tuple:
    """--reward, and --eval-rewards or None; after check_args()."""
    load_one = functools.partial(load, device=device, group_size=args.group_size, skip_failed=args.skip_failed)
    more = load_one(args.eval_rewards, paths=args.eval_paths) if args.eval_rewards else None
    return load_one(args.reward, paths=args.paths), more


def load(spec: str, device="cpu", dtype=torch.float32, paths=None, group_size=0, skip_failed=False) -> Reward:
    """The reward of a spec.  A model is loaded once per process, whichever rewards share it."""
    parsed, device = parse_spec(spec), str(torch.device(device))
    paths = _assign_paths(parsed, paths)
    terms = [_load_term(name, device, dtype, paths[name]) if name in CARDS else _your_own(name) for name, _ in parsed]
    terms = [replace(term, weight=weight) for term, (_, weight) in zip(terms, parsed)]
    return Reward(spec, terms, all(t.differentiable for t in terms), group_size, skip_failed)


@functools.cache
def _load_term(name: str, device="cpu", dtype=torch.float32, path="") -> Term:
    card, places = CARDS[name], find_weights(name, path)
    fn = _find(name, LOADERS[name])(name, device, dtype, places)
    return Term(name, 1.0, fn, card.differentiable, card.note, card.licence, card.metric, card.grouped)


def _your_own(name: str) -> Term:
    """Not cached: looked up anew wherever it is asked for."""
    fn = _find(name, name)
    differentiable, grouped = (bool(getattr(fn, key, False)) for key in ("differentiable", "grouped"))
    return Term(name, 1.0, fn, differentiable, "your own", "your own", grouped=grouped)


def is_differentiable(name: str) -> bool:
    """Whether a reward passes gradients, before anything is loaded; your own is imported to see."""
    return CARDS[name].differentiable if name in CARDS else _your_own(name).differentiable


def is_grouped(spec: str) -> bool:
    """Whether a reward of the spec compares the images of a prompt; your own is imported to see."""
    cards = [CARDS[name] if name in CARDS else _your_own(name) for name, _ in parse_spec(spec)]
    return any(card.grouped for card in cards)


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
    except (Exception, SystemExit) as e:
        advice = "" if yours else f"; copy this repository's folder {module.partition('.')[0]}"
        where = f"importing {module} from {folder} or sys.path"
        raise UsageError(f"reward {name!r}: {where} failed: {e!r}{advice}") from e
    need(callable(found), f"reward {name!r}: {module} has no function {function!r}; define it there")
    return found


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
    "judges.clip:clip_reward": ("clipscore", "clipscore-hessel", "pickscore", "pickscore26"),
    "judges.clip:aesthetic": ("aesthetic",),
    "judges.clip:hpsv2": ("hpsv2", "hpsv2.0"),
    "judges.imagereward:imagereward": ("imagereward",),
    "judges.geneval:geneval": ("geneval", "geneval-reward", "geneval-reward-flowgrpo"),
    "judges.ocr:ocr": ("ocr",),
    "judges.vlm:unifiedreward": ("unifiedreward", "unifiedreward2"),
    "judges.vlm:rubric": ("rubric",),
    "judges.questions:vqascore": ("vqascore",),
    "judges.questions:soft_tifa": ("soft-tifa", "soft-tifa-gm", "dpg"),
    "judges.questions:winrate": ("winrate",),
    "judges.served:http_reward": ("deqa", "http"),
    shapes: ("shapes", "shapes-strict"),
    jpeg: ("jpeg", "jpeg-incompress"),
}
LOADERS = {name: loader for loader, names in LOADERS.items() for name in names}
# (device, dtype, path) -> a new Term
REWARDS = {name: functools.partial(_load_term.__wrapped__, name) for name in CARDS}
