"""The flags of the five trainers: their limits, presets and checks, what a resumed run may change, --dry-run.

Everything that can be wrong before a model is loaded is found here, in one sentence.  Nothing here knows a method.
"""

import argparse
import importlib.util
import itertools
import json
import math
import os
import re
import sys
import textwrap
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

import checkpoints
import common
from common import UsageError

HERE = Path(__file__).resolve().parent
# what every trainer needs
SHARED = ("common.py", "harness.py", "arguments.py", "checkpoints.py", "pictures.py", "rewards.py")
MODELS = {  # name: folder or hub id, pipeline, latent channels, pixels per latent, papers' resolution
    "sd15": ("stable-diffusion-v1-5/stable-diffusion-v1-5", "StableDiffusionPipeline", 4, 8, 512),
    "sd3.5-medium": ("stabilityai/stable-diffusion-3.5-medium", "StableDiffusion3Pipeline", 16, 8, 512),
    "flux.1-dev": ("black-forest-labs/FLUX.1-dev", "FluxPipeline", 16, 8, 512),
    "tiny-sd15": (str(HERE / "tiny" / "sd15"), "StableDiffusionPipeline", 4, 4, 32),
    "tiny-sd35": (str(HERE / "tiny" / "sd35"), "StableDiffusion3Pipeline", 4, 4, 32),
}


class Counted(NamedTuple):
    """What of a model takes memory."""

    denoiser: float  # parameters (M), as are the next three
    decoder: float  # with its encoder
    encoders: float  # of the text, without T5
    t5: float
    width: int  # of a token's embedding
    adapter: float  # LoRA weights of each rank (M)
    update: tuple[float, float]  # GiB of a forward and backward pass, half precision; and with checkpointing
    decode: tuple[float, float] = (0.75, 5.68)  # GiB of an image, float32; and with gradient
    resolution: int = 512
    latent: int = 0  # scalars


COUNTED = {  # python -m benchmarks.activations: a sample of 512 px, 128 tokens of T5
    ("sd15", "attention"): Counted(859.5, 83.7, 123.1, 0, 768, 0.199, (0.78, 0.22)),
    ("sd15", "attention+mlp"): Counted(859.5, 83.7, 123.1, 0, 768, 0.374, (0.89, 0.22)),
    ("sd3.5-medium", "attention"): Counted(2243.2, 83.8, 818.3, 4762.3, 4096, 0.587, (1.93, 0.18)),
    ("sd3.5-medium", "attention+mlp"): Counted(2243.2, 83.8, 818.3, 4762.3, 4096, 1.309, (2.37, 0.21)),
    ("flux.1-dev", "attention"): Counted(11901.4, 83.8, 123.1, 4762.3, 4096, 1.634, (5.68, 0.56)),
    ("flux.1-dev", "attention+mlp"): Counted(11901.4, 83.8, 123.1, 4762.3, 4096, 2.802, (6.34, 0.56)),
}
# GiB of the rewards' models (float32), and of the gradient of an image; others, and your own, are not counted
H14, L14 = (3.7, 0.41), (1.6, 0.35)
REWARDS = dict.fromkeys(("hpsv2", "hpsv2.0", "pickscore", "pickscore26"), H14)
REWARDS |= {"clipscore": L14, "aesthetic": L14, "clipscore-hessel": (0.6, 0.03), "imagereward": (1.8, 0.5)}
REWARDS |= dict.fromkeys(("geneval", "geneval-reward", "geneval-reward-flowgrpo"), (1.9, 0))
NOT_SHIPPED = {  # prompt lists that presets name: prompts/README.md
    "drawbench.txt", "geneval_train.jsonl", "ocr_train.txt", "pickscore_test.txt", "pickscore_train.txt",
}  # fmt: skip
NOISE_LEVEL = {"ddim": 1.0, "flow_sde": 0.7, "dance": 0.3, "cps": 0.8, "ancestral": 1.0, "ode": 0.0}
TINY = dict(  # the embedded models' experiment, in every script: coloured shapes, 64 images an epoch, one update
    prompts="prompts/shapes_train.txt", eval_prompts="prompts/shapes_heldout.txt",
    reward="shapes", eval_rewards="shapes-strict", eval_images=256, eval_every=20,
    max_sequence_length=10, steps=10, eval_steps=None, cfg=1.0, num_prompts=8, group_size=8,
    updates_per_epoch=1, ema_decay=0.9, ema_every=1, ema_warmup=False,
    lora_rank=16, lora_alpha=16, lora_targets="attention+mlp",
    micro_batch_size=64, decode_batch_size=64, reward_batch_size=256,
)  # fmt: skip
# flags that may change when a run is resumed: none of them enters the mathematics
RESUMABLE = {
    "resume", "epochs", "micro_batch_size", "reward_batch_size", "decode_batch_size", "sample_every", "save_every",
    "eval_every", "device", "wandb", "dry_run", "gradient_checkpointing", "offload_text_encoders", "offload_rollout",
    "runs", "preset", "reward_retries", "keep", "accept_changes", "memory",
}  # fmt: skip
# numbers that make another model, task or set of noise: a run goes on with its own even with --accept-changes
FIXED = {
    "seed", "num_prompts", "group_size", "steps", "resolution", "max_sequence_length", "lora_rank", "lora_alpha",
    "eval_images",
}  # fmt: skip
DERIVED = {  # what parse() adds to the flags: not part of args.json
    "prompt_list", "eval_prompt_list", "backbone", "argv", "changed", "note", "run_dir", "made_dir", "resume",
    "dry_run", "paths", "eval_paths", "resume_or_start", "accept_changes", "sources", "rescue", "missing", "counted",
}  # fmt: skip
# what --memory sets; lines of --dry-run: what it asks for, and where it cannot
CHOSEN = (
    "gradient_checkpointing", "micro_batch_size", "offload_text_encoders", "offload_rollout", "decode_batch_size",
)  # fmt: skip
ROLLOUT, UNKNOWN = "memory for the rollout", "memory, not estimated"


class Missing(UsageError):
    """What is asked for is right, but not on this machine: --dry-run goes on."""


def need(condition, what: str, advice: str = "", error=UsageError) -> None:
    """Unless the condition holds, the program ends with "what; advice" and exit code 2."""
    if not condition:
        raise error(what + (f"; {advice}" if advice else ""))


# ---- flags -------------------------------------------------------------------
class _Help(argparse.HelpFormatter):
    """Every flag shows its default, and a '%' in a help text is just that."""

    def _get_help_string(self, action):
        text = (action.help or "").replace("%", "%%")
        plain = action.default is None or action.default in ("", []) or action.dest in ("help", "dry_run")
        return text if plain else text + " [%(default)s]"

    def _fill_text(self, text, width, indent):
        return "\n".join(textwrap.fill(line, width, subsequent_indent="      ") for line in text.split("\n"))


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}\n")  # one sentence, without the usage


def make_parser(doc: str, method: str) -> argparse.ArgumentParser:
    """The parser of METHOD.py, whose help begins with the first line of its docstring."""
    title = doc.strip().split("\n")[0]
    parser = _Parser(f"{method}.py", "%(prog)s [flags]", title, formatter_class=lambda prog: _Help(prog, width=110))
    parser.limits = {}  # flag: what its number may be, see flags()
    return parser


def list_presets(script: Path, presets: dict) -> str:
    """The presets, each with the comment above it in the script, for --help."""
    said, comment, names = ["presets:"], "", []
    lines = script.read_text(encoding="utf-8").split("\nPRESETS")[-1].split("\n}")[0].split("\n")[1:]
    for line in [*lines, "# end"]:
        name = re.match(r'    "([^"]+)": ', line)
        if name and name[1] in presets:
            names.append(name[1])
        elif line.strip().startswith("# "):
            if names:
                said, comment, names = [*said, f"  {', '.join(names)}: {comment}"], "", []
            comment = f"{comment} {line.strip()[2:]}".strip()
    return "\n".join([*said, "each value's source, and what has been run: docs/recipes.md"])


def flags(parser, group: str):
    """The function that adds one flag to this group: name, default, what it may be, what it means.

    What it may be: a list of choices, "text", "yes/no" (also --no-...), "switch", or "int" / "float" and a limit, as
    in "int >= 1", "float > 0", "float in [0, 1)", "float finite".  Without a limit the script checks it itself.
    """
    section = parser.add_argument_group(group)

    def flag(name: str, default, kind, help: str, **more) -> None:
        word, _, limit = kind.partition(" ") if isinstance(kind, str) else ("choice", "", "")
        actions = {"yes/no": argparse.BooleanOptionalAction, "switch": "store_true"}
        if word == "choice":
            more["choices"] = list(kind)
        elif word in actions:
            more["action"] = actions[word]
        elif word != "text":
            more["type"] = {"int": int, "float": float}[word]
        action = section.add_argument(name, default=default, help=help, **more)
        if limit:
            parser.limits[action.dest] = limit

    return flag


def limit_problem(limit: str, value: float) -> str:
    """What is wrong with a number, or ""."""
    if not math.isfinite(value):
        return "" if "inf" in limit and value > 0 else "is not a number one can use; give a finite one"
    if limit.startswith(">="):
        least = int(limit.split()[1])
        return "" if value >= least else f"is too small{' (negative)' * (least == 0)}; use {least} or more"
    if limit.startswith(">"):
        return "" if value > 0 else "must be above 0"
    low, high = (float(x.strip("in[]() ")) for x in limit.split(",")) if "," in limit else (-math.inf, math.inf)
    inside = low <= value <= high and (value > low or "[" in limit) and (value < high or "]" in limit)
    return "" if inside or low == -math.inf else f"must lie {limit}"


def check_limits(parser, args) -> None:
    """Every number within its limits: flags, presets and resumed runs alike."""
    for name, limit in parser.limits.items():
        value = getattr(args, name)
        for number in value if isinstance(value, list) else [] if value is None else [value]:
            problem = limit_problem(limit, number)
            need(not problem, f"--{name.replace('_', '-')} {number} {problem}")


def add_args(parser) -> None:
    """The flag groups that all five trainers share; a method's own group is in its script."""
    for group in (reward_flags, sampling_flags, optimisation_flags, model_flags, run_flags):
        group(parser)


def reward_flags(parser) -> None:
    flag = flags(parser, "reward")
    flag("--reward", "hpsv2", "text", "r: name, weighted sum 'a=1,b=0.5', or 'module:function' of your own")
    flag("--reward-path", [], "text", "local weights of the rewards' models", nargs="*", metavar="[NAME=]PATH")
    flag("--eval-rewards", "", "text", "reported in evaluations, not trained on: names with commas (VMPO, Table 1)")
    flag("--reward-batch-size", 16, "int >= 1", "images per reward call; changes memory and speed only")
    flag("--reward-retries", 2, "int >= 0", "times that a served judge is asked again where an answer has no score")
    flag("--skip-failed", False, "switch", "leave the images of a prompt out of the update where one has no score; "
         "else the run stops")  # fmt: skip
    flag("--prompts", "prompts/hpdv2_photo.txt,prompts/hpdv2_paintings.txt", "text",
         "training prompts c: .txt (one a line) or .jsonl files, comma-separated (VMPO: HPDv2, App. D)")  # fmt: skip
    flag("--eval-prompts", "", "text", "held-out prompts of the evaluation; default: the training prompts")


def sampling_flags(parser) -> None:
    flag = flags(parser, "sampling")
    flag("--num-prompts", 128, "int >= 1", "P: prompts per epoch, over all GPUs (VMPO: 128 trajectories, App. D)")
    flag("--group-size", 1, "int >= 1", "K: images per prompt (VMPO Eq. 5; the amortised mean needs only 1)")
    flag("--steps", 50, "int", "T: sampler steps (VMPO: 50 for SD1.5, 10 for SD3.5, App. D)")
    flag("--kernel", "auto", ["auto", *NOISE_LEVEL], "transition kernel; auto = ddim for SD1.5, flow_sde for SD3.5")
    flag("--noise-level", None, "float", "eta of ddim (DDPO: 1), level of flow_sde (0.7), dance (0.3), cps (0.8)")
    flag("--cfg", 5.0, "float finite", "guidance in rollout, training (VMPO: 5 SD1.5, 4.5 SD3.5; FLUX: 3.5); 1 = off")
    flag("--shared-noise", False, "yes/no", "the K images of a prompt start from the same x_T (DanceGRPO)")
    flag("--detach-uncond", False, "yes/no", "no gradient through the unconditional branch (VGG-Flow)")
    flag("--train-fraction", None, "float", "leading part of the T steps that is trained; default 1 SD1.5, 0.99 SD3.5")
    flag("--resolution", None, "int >= 1", "pixels per side (papers: 512, the default); other models: their own")
    flag("--max-sequence-length", 256, "int >= 1", "length of SD3.5's and FLUX's T5 part of the text (Flow-GRPO: 128)")


def optimisation_flags(parser) -> None:
    flag = flags(parser, "optimisation")
    flag("--epochs", 150, "int >= 1", "rollout-update rounds (VMPO: 150, App. D)")
    flag("--updates-per-epoch", 2, "int >= 1", "optimiser steps per rollout (VMPO: 2, App. D)")
    flag("--inner-epochs", 1, "int >= 1", "passes over one rollout (all papers: 1)")
    flag("--lr", 3e-4, "float > 0", "learning rate of theta (VMPO, Flow-GRPO: 3e-4)")
    flag("--adam-beta1", 0.9, "float in [0, 1)", "AdamW (DDPO: 0.9)")
    flag("--adam-beta2", 0.999, "float in [0, 1)", "AdamW (DDPO: 0.999)")
    flag("--adam-eps", 1e-8, "float > 0", "AdamW (DDPO: 1e-8)")
    flag("--weight-decay", 1e-4, "float >= 0", "AdamW (DDPO: 1e-4)")
    flag("--max-grad-norm", 1.0, "float > 0 or inf", "gradient norm clipped at (VMPO: 1, App. D)")
    flag("--logprob-reduce", "mean", ["mean", "sum"], "over a latent's scalars: mean (public code) or sum (density)")
    flag("--ema-decay", 0.0, "float in [0, 1)", "decay of the averaged, exported LoRA (Flow-GRPO: 0.9); 0 = off")
    flag("--ema-every", 8, "int >= 1", "optimiser steps between two averagings (Flow-GRPO: 8; VMPO, NFT: 1)")
    flag("--ema-warmup", True, "yes/no", "decay min((1 + s) / (10 + s), d) after s steps (all official codes)")
    flag("--ema-repeats", 1, "int >= 1", "averagings at once, in the micro-batches of a step (Flow-GRPO: 2)")
    flag("--max-bad-steps", 5, "int >= 0", "updates with a NaN or infinite gradient, skipped before the run stops")
    flag("--ratio-tolerance", None, "float > 0 or inf",
         "largest |log ratio| right after a rollout; default 1e-4, float16 3e-4, bfloat16 3e-3")  # fmt: skip


def model_flags(parser) -> None:
    flag = flags(parser, "model")
    flag("--model", "sd15", "text", f"{', '.join(MODELS)}, a hub id or a folder in diffusers format")
    flag("--lora-rank", 4, "int >= 1", "r (VMPO: 4 for SD1.5, 32 for SD3.5, App. D)")
    flag("--lora-alpha", 4, "float > 0", "alpha (VMPO: 4 for SD1.5, 64 for SD3.5, App. D)")
    flag("--lora-targets", "attention", "text", "attention (papers), attention+mlp, or endings of layer names")
    flag("--init-lora", "", "text", "starts from this run's LoRA; the reference stays the --model", metavar="RUN")
    flag("--dtype", "auto", ["auto", "float32", "bfloat16", "float16"], "of the base; LoRA and losses are float32")
    flag("--t5", True, "yes/no", "load SD3.5's T5 text encoder (9.5 GB in bf16)")

    flag = flags(parser, "performance")
    flag("--memory", None, "float > 0", "GB of the GPU: sets those of the next five that are not given; docs/speed.md",
         metavar="GB")  # fmt: skip
    flag("--micro-batch-size", 8, "int >= 1", "samples per forward pass; changes memory and speed only")
    flag("--decode-batch-size", 8, "int >= 1", "latents per VAE decode")
    flag("--gradient-checkpointing", False, "yes/no", "recompute activations: less memory, about a third slower")
    flag("--offload-text-encoders", False, "yes/no", "keep the text encoders on the CPU except while encoding")
    flag("--offload-rollout", False, "yes/no", "keep an epoch's noise and trajectories in the host's memory")
    flag("--vae-dtype", "float32", ["float32", "bfloat16"], "of the decoder (bfloat16: docs/speed.md)")
    flag("--device", "auto", "text", "auto, cpu, cuda, cuda:N")


def run_flags(parser) -> None:
    flag = flags(parser, "run")
    flag("--preset", "", "text", "a paper's experiment, see the end of this help; explicit flags win")
    flag("--seed", 0, "int", "of everything that is random; several seeds together: eval.py --sweep")
    flag("--runs", "runs", "text", "folder in which the run folder is made")
    flag("--name", "", "text", "name of the run folder; default METHOD_REWARD_sSEED_TIME")
    flag("--resume", "", "text", "go on with this run from its last checkpoint, with its own flags", metavar="RUN")
    flag("--resume-or-start", "", "text", "the same if this run exists, else start it (job queues)", metavar="RUN")
    flag("--accept-changes", False, "switch", "with --resume: take other numbers (lr, beta, ...) and changed files")
    flag("--eval-images", 64, "int >= 0", "held-out images, same noise every time: all a run draws to show; 0 = none")
    flag("--eval-cfg", None, "float finite", "guidance of evaluations (AWM's and NFT's codes: 1); default --cfg")
    flag("--eval-steps", None, "int >= 1", "sampler steps of evaluations (Flow-GRPO: 40 for SD3.5); default --steps")
    flag("--eval-kernel", "ode", ["ode", "same"], "ode = deterministic, what users run (Flow-GRPO); same = --kernel")
    flag("--eval-every", 0, "int >= 0", "epochs between evaluations; 0 = before and after only")
    flag("--sample-every", 10, "int >= 0", "epochs between grids of the first 16 held-out images; 0 = none")
    flag("--save-every", 10, "int >= 0", "epochs between checkpoints (the last epoch is always saved)")
    flag("--keep", 3, "int >= 0", "of the checkpoints, the newest N and the best held-out one; 0 = all", metavar="N")
    flag("--wandb", None, "text", "log to this Weights & Biases project too (package and account)", metavar="PROJECT")
    flag("--dry-run", False, "switch", "print the derived sizes and exit")


def parse(parser, presets: dict[str, dict], argv, rewards, check, sizes) -> argparse.Namespace:
    """Defaults < --preset < explicit flags; a resumed run takes its own flags.  Ends the program on bad input.

    `check(args)` raises UsageError for what only this method knows, `sizes(args)` are its lines of --dry-run, and
    `rewards` is the module of that name, whose checks come after the cheap ones.
    """
    parser.epilog = list_presets(HERE / parser.prog, presets)
    defaults = vars(parser.parse_args([]))
    unset = object()
    given = vars(parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(defaults, unset))))
    explicit = {k: v for k, v in given.items() if v is not unset}
    name = explicit.get("preset", defaults["preset"])
    if name and name not in presets:
        parser.error(f"--preset {name} is unknown; this script has {', '.join(presets)}")
    preset = dict(presets.get(name, {}))
    note = preset.pop("note", "")  # what differs from the authors' run, and why
    if unknown := set(preset) - set(defaults):
        raise AssertionError(f"preset {name} names flags that do not exist: {unknown}")
    args = argparse.Namespace(**(defaults | preset | explicit))
    args.argv = list(sys.argv[1:] if argv is None else argv)
    args.changed = {k: [preset[k], v] for k, v in explicit.items() if k in preset and preset[k] != v}
    args.note = f"preset {name}: {note}" if note else ""
    try:
        if args.resume_or_start:
            start_or_resume(args)
        if args.resume:
            args = resumed_args(parser.prog.removesuffix(".py"), args, explicit)
        check_limits(parser, args)
        check_args(args)
        check(args)
        args.counted = counted(args)
        if args.memory and (not args.resume or "memory" in args.changed):
            choose(args, explicit, sizes)
        if args.dry_run:
            what_is_missing(args, rewards)
            print_sizes(args, sizes(args))
            raise SystemExit(0)
        rewards.check_args(args)
        check_model(args)
        args.sources = sources(args, rewards)
    except (UsageError, rewards.UsageError) as problem:
        parser.error(str(problem))
    return args


def what_is_missing(args, rewards) -> None:
    """Adds the weights, packages and servers that a run needs and that are not here to args.missing."""
    for check in (rewards.check_args, check_model):
        try:
            check(args)
        except (Missing, rewards.Missing) as problem:
            args.missing.append(str(problem))


def resumed_args(method: str, args, explicit: dict) -> argparse.Namespace:
    """The flags of the run in --resume, with those changes that do not enter the mathematics."""
    folder, what = Path(args.resume), f"--resume {args.resume}"
    try:
        saved = json.loads((folder / "args.json").read_text())
        owner, own = saved["method"], saved["args"]
    except (OSError, ValueError, KeyError, TypeError):
        advice = "give the folder that holds checkpoints/"
        raise UsageError(f"{what} is not a run folder (no readable args.json); {advice}") from None
    need(owner == method, f"{what} is a run of {owner}.py, not of {method}.py", "resume it with that script")
    absent = ", ".join(sorted(vars(args).keys() - own.keys() - DERIVED))
    need(not absent, f"{what} was made by an older version (its args.json has no {absent})", "resume it with that one")
    new = {k: v for k, v in explicit.items() if k not in DERIVED | {"preset"} and own.get(k) != v}
    for key, value in new.items():
        flag, free = "--" + key.replace("_", "-"), key in RESUMABLE
        differs = f"{flag} {value} differs from the resumed run's {own.get(key)}"
        number = isinstance(value, (int, float)) and not isinstance(value, bool) and key not in FIXED
        more = f", go on with it by --accept-changes (it is recorded in {folder}/history.jsonl)" if number else ""
        need(free or number and args.accept_changes, differs, f"leave {flag} out{more}, or start a new run")
    changed = {k: [own.get(k), v] for k, v in new.items()}
    args = argparse.Namespace(**(vars(args) | own | new | {"resume": str(folder), "changed": changed}))
    newest = next((int(c.name[6:]) for c in checkpoints.by_epoch(folder)), 0)
    over = newest >= args.epochs and (newest > args.epochs or finished(folder, args.epochs))
    need(not over, f"{what}: epoch {newest} of {args.epochs} is done", "give a larger --epochs to go on")
    follow_sources(args, saved.get("sources", []), what)
    return args


def finished(folder: Path, epochs: int) -> bool:
    """Whether the run got to its summary, which is written last."""
    summary = folder / "summary.json"
    return summary.exists() and json.loads(summary.read_text())["epochs"] == epochs


def start_or_resume(args) -> None:
    """--resume-or-start RUN is --resume RUN where there is a run, else --runs and --name; ends if finished."""
    folder = Path(args.resume_or_start)
    what = f"--resume-or-start {folder} names the run"
    need(not args.resume and not args.name, what, "leave --resume and --name out")
    args.runs, args.name, there = str(folder.parent), folder.name, (folder / "args.json").exists()
    if there and finished(folder, args.epochs):
        print(f"{folder}: all {args.epochs} epochs are done")
        raise SystemExit(0)
    args.resume = str(folder) if there else ""


def source(kind: str, name: str) -> Path:
    """The file of a prompt list, of a model's index or of your own reward's module."""
    if kind == "prompts":
        return Path(name) if Path(name).exists() else HERE / name
    if kind == "model":
        return Path(MODELS[name][0] if name in MODELS else name) / "model_index.json"
    try:
        found = sys.modules.get(name) or importlib.util.find_spec(name)
    except ModuleNotFoundError:  # of the package that it is in
        found = None
    return Path(getattr(found, "__file__", None) or getattr(found, "origin", None) or name)


def sources(args, rewards) -> list[list[str]]:
    """What a run is made from beside its flags: (kind, name, absolute path, sha256) of each file that is there."""
    lists = [name for flag in (args.prompts, args.eval_prompts) for name in flag.split(",") if name]
    terms = rewards.parse_spec(args.reward) + (rewards.parse_spec(args.eval_rewards) if args.eval_rewards else [])
    own = [name.partition(":")[0] for name, _ in terms if ":" in name]
    names = [*(("prompts", name) for name in lists), ("model", args.model), *(("reward", name) for name in own)]
    found = [(kind, name, source(kind, name).absolute()) for kind, name in dict.fromkeys(names)]
    return [[kind, name, str(path), checkpoints.digest(path)] for kind, name, path in found if path.is_file()]


def follow_sources(args, saved: list[list[str]], what: str) -> None:
    """A resumed run goes on with the very files it was made from, wherever it is resumed: they may be where they
    were, or at the same name from here.  UsageError where one has changed."""
    sys.path.insert(0, os.getcwd())
    for kind, name, path, wanted in saved:
        here, there = source(kind, name), Path(path)
        if here.is_file() and checkpoints.digest(here) == wanted:
            continue
        same = there.is_file() and checkpoints.digest(there) == wanted
        changed = f"{what}: {kind} {name} ({there if there.is_file() else here}) is not the file the run was made from"
        advice = "restore it, or go on with it as it is now by --accept-changes"
        need(same or args.accept_changes, changed, advice)
        if same and kind == "prompts":
            for flag in ("prompts", "eval_prompts"):
                names = [path if n == name else n for n in getattr(args, flag).split(",")]
                setattr(args, flag, ",".join(names))
        elif same and kind == "model":
            args.model = str(there.parent)
        elif same:
            sys.path.insert(0, str(there.parents[name.count(".")]))


# ---- checks of the shared flags: everything that can be wrong before a model is loaded
def check_args(args) -> None:
    """Raises UsageError, or fills in the defaults that depend on the model."""
    need(args.eval_images != 1, "--eval-images 1 gives no standard error", "use 2 or more, or 0 for none")
    check_processes(args)
    use_model(args)
    check_sampler(args)
    check_init_lora(args)
    args.missing, args.counted = [], None
    args.prompt_list = args.eval_prompt_list = prompts_of(args, "prompts")
    if args.eval_prompts:
        args.eval_prompt_list = prompts_of(args, "eval_prompts")
    if 0 < len(args.prompt_list) < args.num_prompts:
        have = f"--prompts has {len(args.prompt_list)} prompts, fewer than --num-prompts {args.num_prompts}"
        print(f"note: {have}; they repeat within an epoch")
    plain = args.name == Path(args.name).name != ".." and len(args.name.encode()) <= 200
    what = f"--name {args.name[:60]} is no name of a folder"
    need(plain or args.resume, what, "use at most 200 characters without /")
    need_writable("--runs", args.runs)
    there = not args.wandb or importlib.util.find_spec("wandb")
    need(there, f"--wandb {args.wandb} needs the package wandb", "pip install wandb, or leave it out")


def need_writable(flag: str, folder: str | Path) -> None:
    """The folder, or the nearest one above it that exists, can be written to."""
    path = Path(folder).absolute()
    parent = next(p for p in [path, *path.parents] if p.exists())
    wrong = f"{flag} {folder} cannot be written ({parent} is not a writable folder)"
    need(parent.is_dir() and os.access(parent, os.W_OK), wrong, "choose another folder")


def check_processes(args) -> None:
    ranks = [os.environ.get(key, "1") for key in ("WORLD_SIZE", "RANK", "LOCAL_RANK")]
    sane = all(value.isdigit() for value in ranks)
    need(sane, f"WORLD_SIZE, RANK, LOCAL_RANK are {', '.join(ranks)}", "start several processes with torchrun")
    world, prompts, device = processes(), args.num_prompts, args.device
    numbered = device.startswith("cuda:")
    need(not numbered or world == 1, f"--device {device} would put all processes on one GPU", "leave it out")
    known = numbered or device in ("auto", "cpu", "cuda")
    need(known, f"--device {device} is unknown", "use auto, cpu, cuda or cuda:N")
    there = not device.startswith("cuda") or torch.cuda.is_available()
    need(there, f"--device {device}: there is no CUDA device", "use --device cpu, or a torch built for CUDA")
    fewer = max(w for w in range(1, min(prompts, world) + 1) if prompts % w == 0)
    more = world * (prompts // world + 1)
    wrong = f"{world} processes do not divide --num-prompts {prompts}"
    need(prompts % world == 0, wrong, f"use {fewer} processes or --num-prompts {more}")


def check_sampler(args) -> None:
    """Kernel, noise level and trained steps fit the model and each other; fills in their defaults."""
    steps, kernels = args.steps, args.backbone.kernels
    need(steps >= 2, f"--steps {steps} is too few", "a sampler needs at least 2 (papers: 50 for SD1.5, 10 for SD3.5)")
    kernel = args.kernel = kernels[0] if args.kernel == "auto" else args.kernel
    fits = f"use one of {', '.join(kernels)}"
    need(kernel in kernels, f"--kernel {kernel} does not fit --model {args.model}", fits)
    silent = "--kernel ode is deterministic and has no log-probability"
    need(kernel != "ode", silent, "use a stochastic kernel for training")
    level = args.noise_level = NOISE_LEVEL[kernel] if args.noise_level is None else args.noise_level
    need(0 < level < math.inf, f"--noise-level {level} leaves no noise to learn from", "use a finite one above 0")
    idle = f"--kernel ancestral has no noise level, --noise-level {level} would do nothing"
    need(kernel != "ancestral" or level == 1, idle, "leave it out")
    high = f"--noise-level {level} is above 1, where {kernel} has no real step"
    need(kernel not in ("ddim", "cps") or level <= 1, high, "use at most 1")
    most = max(steps, args.eval_steps or 0)
    many = f"--steps {most} is too many for the 1000 training steps of {args.model}"
    need(args.kind == "flow" or most <= 500, many, "use at most 500")
    if args.train_fraction is None:
        args.train_fraction = 1.0 if args.kind == "eps" else 0.99
        if kernel == "cps" and steps > 2:  # its noise is proportional to s: next to nothing in the last two
            args.train_fraction = (steps - 2) / steps
    train = args.train_steps = int(steps * args.train_fraction + 1e-9) if math.isfinite(args.train_fraction) else 0
    left = f"--train-fraction {args.train_fraction} of {steps} steps is {train}"
    need(1 <= train <= steps, left, f"it must leave 1 to {steps}")
    args.eval_steps, args.eval_cfg = args.eval_steps or steps, args.cfg if args.eval_cfg is None else args.eval_cfg


def check_init_lora(args) -> None:
    """--init-lora is a LoRA of this rank; a resumed run has its own copy."""
    if not args.init_lora or args.resume:
        return
    from safetensors import SafetensorError, safe_open

    file, what = checkpoints.lora_file(args.init_lora), f"--init-lora {args.init_lora}"
    need(
        file, f"{what} holds no LoRA", "give a run folder, one of its checkpoints, or a LoRA file in diffusers' format"
    )
    try:
        with safe_open(file, "pt") as f:
            ranks = {f.get_slice(key).get_shape()[0] for key in f.keys() if ".lora_A." in key}
            other = [key for key in f.keys() if not key.startswith(f"{args.backbone.part}.")]
    except SafetensorError as problem:
        raise UsageError(f"{what}: {file} is no safetensors file ({problem}); give a run folder") from None
    need(
        ranks and not other,
        f"{what} is no LoRA of {args.model}'s {args.backbone.part}",
        "give one in diffusers' format",
    )
    rank = ", ".join(map(str, sorted(ranks)))
    need(
        ranks == {args.lora_rank},
        f"{what} has rank {rank}, --lora-rank is {args.lora_rank}",
        f"use --lora-rank {rank}",
    )


def check_updates(args, rows: int, what: str = "transitions") -> None:
    updates = args.updates_per_epoch
    fits = max((u for u in range(1, 2 * updates + 1) if rows % u == 0), default=1)
    wrong = f"--updates-per-epoch {updates} does not divide the {rows} {what} of an epoch"
    need(rows % updates == 0, wrong, f"use {fits}")


def check_group(args) -> None:
    """The advantage compares images: there are two or more of a prompt."""
    alone = f"--adv-norm {args.adv_norm} compares the images of a prompt, --group-size is {args.group_size}"
    need(args.group_size > 1 or args.adv_norm == "raw", alone, "use 2 or more, or --adv-norm raw")


def warn_of_clip_range(args) -> None:
    """The papers' clip ranges are for mean log-probs; says so where they would be used on sums."""
    if args.logprob_reduce == "sum" and args.clip_range < 1e-2:
        d, what = latent_size(args), f"--clip-range {args.clip_range} is meant for mean log-probs"
        same = f"{args.clip_range * d:g} (times the latent's {d} scalars)" if d else "that times the latent's size d"
        print(f"warning: {what}; with --logprob-reduce sum the same range is {same}")


def prompts_of(args, flag: str) -> list[common.Prompt]:
    """The prompts of a flag.  A dry run goes on without a list that cannot be shipped, and says so."""
    try:
        return load_prompts(getattr(args, flag), "--" + flag.replace("_", "-"))
    except Missing as problem:
        if not args.dry_run:
            raise
        args.missing.append(str(problem))
        return []


def load_prompts(paths: str, flag: str = "--prompts") -> list[common.Prompt]:
    """Comma-separated .txt (a prompt a line) and .jsonl files ({"prompt": ...} a line); UsageError if none."""
    found: list[tuple[str, dict]] = []
    for name in paths.split(","):
        path = source("prompts", name)
        elsewhere = path.name in NOT_SHIPPED and path.parent == HERE / "prompts"
        fetch = f"prompts/README.md has the line that fetches it, or give another {flag}"
        need(path.is_file() or not elsewhere, f"{flag} {name} is not shipped with this repository", fetch, Missing)
        give = "give a .txt file with one prompt a line or a .jsonl file (see prompts/README.md)"
        need(path.is_file(), f"{flag} {name or '(empty)'} does not exist", give)
        try:
            lines = path.read_text(encoding="utf-8-sig").split("\n")  # splitlines() would cut at other separators too
        except UnicodeDecodeError:
            raise UsageError(f"{flag} {name} is not UTF-8 text; save it as UTF-8") from None
        for number, line in enumerate(lines, 1):
            try:
                metadata = json.loads(line) if line.strip() and path.suffix == ".jsonl" else {"prompt": line}
                text = metadata["prompt"].strip()
                text.encode()  # half of a surrogate pair is no text
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                problem = "not a JSON object with a 'prompt' text"
                raise UsageError(f"{flag} {name}, line {number}: {problem}") from None
            if text:
                found.append((text, metadata if path.suffix == ".jsonl" else {}))
    need(found, f"{flag} {paths} is empty", "it needs at least one prompt")
    return [common.Prompt(i, text, metadata) for i, (text, metadata) in enumerate(found)]


# ---- where the model is ------------------------------------------------------
def find_model(name: str) -> tuple[str, type]:
    """Model name -> (folder or hub id, its class of common.BACKBONES).  Reads at most one small file."""
    if name in MODELS:
        return MODELS[name][0], common.BACKBONES[MODELS[name][1]]
    what, index = f"--model {name}", Path(name) / "model_index.json"
    if not index.exists():
        folder, hub = Path(name).is_dir(), name.count("/") == 1 and not name.startswith((".", "/"))
        need(not folder, f"{what} is a folder without model_index.json", "give a folder in diffusers format")
        need(hub, f"{what} is neither of {', '.join(MODELS)} nor a folder nor a hub id such as owner/name")
        from huggingface_hub import hf_hub_download

        require_hub(name, what)
        index = Path(hf_hub_download(name, "model_index.json"))
    try:
        pipeline = str(json.loads(index.read_text())["_class_name"])
    except (ValueError, KeyError, TypeError):
        advice = "give a folder in diffusers format"
        raise UsageError(f"{what}: {index} does not name a pipeline; {advice}") from None
    known = ", ".join(common.BACKBONES)
    need(pipeline in common.BACKBONES, f"{what} is a {pipeline[:80]}", f"supported are {known}")
    return name, common.BACKBONES[pipeline]


def use_model(args) -> None:
    """Fills in what follows from --model: its place, backbone, kind and the papers' resolution."""
    args.model_path, args.backbone = find_model(args.model)
    args.kind, distilled = args.backbone.kind, args.backbone.distilled
    blind = f"--no-t5: --model {args.model} has its text from T5 alone"
    need(args.t5 or not distilled, blind, "leave it out (--offload-text-encoders frees its memory after encoding)")
    idle = f"--detach-uncond: --model {args.model} is distilled and has no unconditional branch"
    need(not distilled or not args.detach_uncond, idle, "leave it out, or give --no-detach-uncond")
    if args.model in MODELS:
        args.resolution = args.resolution or MODELS[args.model][4]


def require_hub(repo: str, what: str, file: str = "model_index.json") -> None:
    """UsageError if `file` of `repo` is neither in the local cache nor, by one short probe, to be had from the hub."""
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        if isinstance(huggingface_hub.try_to_load_from_cache(repo, file), str):
            return
    except HFValidationError as problem:
        raise UsageError(f"{what} is no valid hub id: {problem}") from None
    advice = "put the files in a folder and pass its path, or use the embedded model: --preset tiny (no download)"
    absent = f"{what} ({repo}) is not in the local cache and"
    need(os.environ.get("HF_HUB_OFFLINE", "0") in ("0", ""), f"{absent} HF_HUB_OFFLINE is set", advice, Missing)
    try:
        huggingface_hub.HfApi().model_info(repo, timeout=4)
    except HfHubHTTPError as problem:
        answer = f"the hub answered {problem.response.status_code} for {repo}; check the name or log in"
        raise Missing(f"{what}: {answer}; {advice}") from None
    except Exception:  # of whichever HTTP library the hub's client stands on
        raise Missing(f"{absent} the hub cannot be reached; {advice}") from None


def check_model(args) -> None:
    """The model's weights can be had, and the LoRA targets exist in it.  UsageError before any weight is read."""
    index, what = Path(args.model_path) / "model_index.json", f"--model {args.model}"
    make = "make it with python -m tiny.pretrain --all, or pass the folder's path"
    need(index.exists() or not args.model.startswith("tiny-"), f"{what}: {args.model_path} is missing", make)
    if not index.exists():
        require_hub(args.model_path, what)  # add_lora() finds a wrong target
    elif args.lora_targets not in ("attention", "attention+mlp"):
        import diffusers

        part = args.backbone.part
        cls = getattr(diffusers, json.loads(index.read_text())[part][1])
        with torch.device("meta"):
            net = cls.from_config(cls.load_config(args.model_path, subfolder=part))
        check_lora_targets(net, args)


def check_lora_targets(net, args) -> None:
    need(lora_targets(args), "--lora-targets is empty", "use attention, attention+mlp, or endings of layer names")
    linear = [n for n, m in net.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    endings = sorted({n.rsplit(".", 1)[-1] for n in linear if not n.rsplit(".", 1)[-1].isdigit()})
    for target in lora_targets(args):
        there = any(n == target or n.endswith("." + target) for n in linear)
        names = f"layer names end in {', '.join(endings[:12])} ..."
        need(there, f"--lora-targets {target} matches no layer of {args.model}", names)


def lora_targets(args) -> list[str]:
    named = {"attention": args.backbone.attention, "attention+mlp": args.backbone.attention + args.backbone.mlp}
    return list(named.get(args.lora_targets) or [t.strip() for t in args.lora_targets.split(",") if t.strip()])


def network_passes(args, cfg: float) -> int:
    """Network evaluations of one guided output: two branches, unless guidance is off or an input of the network."""
    return 1 if cfg == 1 or args.backbone.distilled else 2


def latent_size(args) -> int | None:
    """d, the number of scalars in one latent; None for a model that is neither in MODELS nor counted."""
    if args.model not in MODELS:
        return args.counted and args.counted.latent
    _, _, channels, pixels, _ = MODELS[args.model]
    return channels * (args.resolution // pixels) ** 2


# ---- --memory and --dry-run --------------------------------------------------
def rollout_memory(args, latents: int, what: str, movable: int = 0) -> str:
    """The line of --dry-run for so many latents, of which --offload-rollout moves `movable` to the host's memory.

    "unknown" where their size is not.
    """
    scalar, moved = (latent_size(args) or 0) * 4 / 2**30, movable * args.offload_rollout
    host = f", {moved * scalar:.3g} GB more on the host" * bool(moved)
    return f"{(latents - moved) * scalar:.3g} GB over all processes ({what}{host}; float32)" if scalar else "unknown"


def usual_rollout(args) -> str:
    """The line of the methods that keep what common.rollout() gives."""
    latents = args.num_prompts * args.group_size * (4 * args.steps + 1)
    return rollout_memory(args, latents, "states, noise, two outputs", latents)


def processes() -> int:
    """Of this run, as torchrun started it."""
    return max(1, int(os.environ.get("WORLD_SIZE", 1)))


def bytes_of(args) -> int:
    """Of a number in the denoiser; --dry-run takes --dtype auto as on a GPU."""
    on_cpu = args.device == "cpu" or not (args.dry_run or torch.cuda.is_available())
    return 4 if args.dtype == "float32" or args.dtype == "auto" and on_cpu else 2


def words_of(backbone, length: int) -> int:
    """Tokens of a prompt's embedding, of which T5 gives `length`."""
    return {"SD15": 77, "SD35": 77 + length, "Flux": length}[backbone.__name__]


def counted(args) -> Counted | None:
    """What of the model takes memory at the flags' sizes; models that are not in the table only for --memory."""
    targets = args.lora_targets if args.lora_targets == "attention" else "attention+mlp"  # of others at most
    if found := COUNTED.get((args.model, targets)):
        pixels, usual = (args.resolution / 512) ** 2, words_of(args.backbone, 128)
        tokens = 1024 * pixels + words_of(args.backbone, args.max_sequence_length)  # of 2 x 2 latents each, and words
        longer = pixels if args.kind == "eps" else tokens / (1024 + usual)
        each, images = [x * longer for x in found.update], [x * pixels for x in found.decode]
        return found._replace(update=each, decode=images, resolution=args.resolution, latent=latent_size(args))
    if not args.memory or args.resume and not args.dry_run and "memory" not in args.changed:
        return None
    check_model(args)
    lora = lora_targets(args), args.lora_rank, torch.float32 if bytes_of(args) == 4 else torch.bfloat16
    try:
        from benchmarks import activations

        networks = activations.folder(args.model_path, args.backbone)
        return activations.count(networks, args.backbone, args.resolution, args.max_sequence_length, *lora)
    except Exception as problem:  # foreign or missing files: whatever the libraries raise
        said = " ".join(str(problem).split())[:300]
        raise UsageError(f"--memory cannot count --model {args.model} ({said}); leave --memory out") from None


def memory(args, rows: dict[str, str]) -> dict[str, float]:
    """GiB that each part takes on each GPU: what is held throughout, what comes and goes, and the most at once.

    rows: the method's lines of --dry-run.
    """
    c, wide, world = args.counted, bytes_of(args), processes()
    million, low = 1e6 / 2**30, 1 if args.vae_dtype == "float32" else 0.5
    encoders, adapter = (c.encoders + args.t5 * c.t5) * wide * million, c.adapter * args.lora_rank * 4 * million
    prompts = -(-min(args.num_prompts, len(args.prompt_list) or args.num_prompts) // world)
    words, rollout = words_of(args.backbone, args.max_sequence_length), rows.get(ROLLOUT) or usual_rollout(args)
    names = {term.partition("=")[0].strip() for term in f"{args.reward},{args.eval_rewards}".split(",")}
    models = [REWARDS.get(name, (0, 0)) for name in names]
    held = {
        "denoiser": c.denoiser * wide * million,
        "adapter": adapter * (1 + bool(args.ema_decay)),
        "its gradient and AdamW": 3 * adapter,
        "decoder": c.decoder * 4 * low * million,
        "text encoders": 0 if args.offload_text_encoders else encoders,
        "embeddings": prompts * words * c.width * wide / 2**30,
        "reward": sum(weights for weights, _ in models),
        "rollout": float(rollout.split()[0]) / world,
    }
    each = vars(args).get("train_timesteps", 1)  # AWM's passes hold whole images
    branches = network_passes(args, vars(args).get("train_cfg", args.cfg))
    row = branches * c.update[args.gradient_checkpointing] * wide / 2
    few = min(args.micro_batch_size, args.decode_batch_size) * ("reward gradients per epoch" in rows)
    scored = min(args.num_prompts * args.group_size / world, math.lcm(args.decode_batch_size, args.reward_batch_size))
    pictures = max(scored, args.eval_images / world) * 36 * c.resolution**2 / 2**30  # three times, in float32
    passing = {
        "during the update": max(each, args.micro_batch_size // each * each) * row,
        "during decoding": args.decode_batch_size * low * c.decode[0] + pictures,
        "during encoding": encoders if args.offload_text_encoders else 0,
        "during the reward's gradient": few * (low * c.decode[1] + sum(graph for _, graph in models) + row),
    }
    return held | passing | {"in all": sum(held.values()) + max(passing.values())}


def choose(args, explicit: dict, sizes) -> None:
    """--memory: the fastest values, of CHOSEN not given, with which the run needs at most nine tenths of it.

    It checkpoints last of all; for micro-batches of 8 text encoders and rollout leave the GPU, for larger ones they do
    not.  Micro-batches divide a process's samples as evenly as can be.
    """
    unknown = f"--memory: {sizes(args).get(UNKNOWN)}, not estimated"
    need(UNKNOWN not in sizes(args), unknown, "leave --memory out; --micro-batch-size 1 takes the least")
    samples, each = args.num_prompts * args.group_size // processes(), vars(args).get("train_timesteps", 1)
    even = {-(-samples // pieces) * each for pieces in range(1, samples + 1)}
    options = [(False, True), [m for m in even if m <= max(64, each)], (False, True), (False, True), (1, 2, 4, 8, 16)]
    options = [[explicit[name]] if name in explicit else some for name, some in zip(CHOSEN, options)]
    found = {}
    for trial in itertools.product(*options):
        vars(args).update(zip(CHOSEN, trial))
        found[trial] = memory(args, sizes(args))
    room, least = 0.9 * args.memory, min(found.values(), key=lambda parts: parts["in all"])
    most = max(list(least)[:-1], key=least.get)
    small = f"--memory {args.memory:g}: the run needs {least['in all']:.1f} GB at least (most: {most}),"
    ways = [f"take a card of {math.ceil(least['in all'] / 0.9)} GB"]
    ways += [f"leave --{name.replace('_', '-')} out" for name in CHOSEN if name in explicit]
    if not args.resume:  # which keeps these
        t5 = args.t5 and args.backbone is common.SD35 and most in ("text encoders", "during encoding")
        ways += ["--no-t5"] * t5 + ["a smaller --resolution"] + ["fewer images an epoch"] * (least["rollout"] > 1)
    need(least["in all"] <= room, f"{small} and a tenth must stay free", " or ".join(ways))
    fits = [trial for trial, parts in found.items() if parts["in all"] <= room]
    best = min(fits, key=lambda c: (c[0], -min(c[1], 8), c[2], c[3], -c[1], -c[4]))
    vars(args).update(zip(CHOSEN, best))
    if os.environ.get("RANK", "0") == "0" and not args.dry_run:
        for key, value in memory_lines(args, sizes(args)).items():
            print(f"{key:42s} {value}")


def memory_lines(args, rows: dict[str, str]) -> dict[str, str]:
    """What --dry-run and --memory say of it."""
    found = memory(args, rows)
    values = {name.replace("_", "-"): vars(args)[name] for name in CHOSEN}
    own = [f"--{name}" + f" {value}" * (value is not True) for name, value in values.items() if value is not False]
    lines = {"memory of each GPU, estimated": f"{found.pop('in all'):.1f} GB with {' '.join(own)}"}
    return lines | {f"  {name}": f"{size:.2f} GB" for name, size in found.items() if size}


def print_sizes(args, rows: dict[str, str]) -> None:
    """The sizes that follow from the flags (`rows` are the method's), and the memory that the large parts take."""
    samples, updates = args.num_prompts * args.group_size, args.updates_per_epoch * args.inner_epochs
    lists = f"{len(args.prompt_list)} for training, {len(args.eval_prompt_list)} for evaluation"
    lines = {"note": args.note} if args.note else {}
    lines |= {
        "model": f"{args.model} ({args.model_path}), kernel {args.kernel}, noise level {args.noise_level}",
        "prompts": lists,
        "steps": f"{args.steps}, of which {args.train_steps} are trained; evaluation {args.eval_steps}",
        "samples per epoch": f"{samples} = {args.num_prompts} prompts x {args.group_size}",
        **rows,
        "updates": f"{updates} per epoch, {updates * args.epochs} in all",
    }
    lines[ROLLOUT] = lines.pop(ROLLOUT, None) or usual_rollout(args)
    if args.counted and UNKNOWN not in rows:
        lines |= memory_lines(args, rows)
    for key, value in [*lines.items(), *(("missing here", what) for what in args.missing)]:
        print(f"{key:42s} {value}")
