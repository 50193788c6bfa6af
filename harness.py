"""The run side of the five trainers: what no paper mentions.  Flags and their checks, presets, run folder, processes,
log, held-out evaluation, resume.  Nothing here knows a method.

A trainer's main() is: setup(), load_policy(), add_lora(), make_optimiser(), Recorder(...), and between
recorder.epochs() and recorder.end_epoch() the paper's algorithm.
"""

import argparse
import csv
import importlib.util
import json
import math
import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

import checkpoints
import common
import pictures
from checkpoints import complete, write_json
from common import UsageError, all_reduce, gather

HERE = Path(__file__).resolve().parent
SHARED = ("common.py", "harness.py", "checkpoints.py", "pictures.py", "rewards.py")  # what every trainer needs
MODELS = {  # name: folder or hub id, pipeline, latent channels, pixels per latent, papers' resolution, parameters (M)
    "sd15": ("stable-diffusion-v1-5/stable-diffusion-v1-5", "StableDiffusionPipeline", 4, 8, 512, 860),
    "sd3.5-medium": ("stabilityai/stable-diffusion-3.5-medium", "StableDiffusion3Pipeline", 16, 8, 512, 2243),
    "flux.1-dev": ("black-forest-labs/FLUX.1-dev", "FluxPipeline", 16, 8, 512, 11901),
    "tiny-sd15": (str(HERE / "tiny" / "sd15"), "StableDiffusionPipeline", 4, 4, 32, 1.1),
    "tiny-sd35": (str(HERE / "tiny" / "sd35"), "StableDiffusion3Pipeline", 4, 4, 32, 1.3),
}
WATCHED = 32  # transitions of an epoch and held-out images whose distance to the reference is for the log alone
# GiB that the network keeps of a sample of 512 px and a branch of the guidance, in half precision, for the backward
# pass: as it is, and with checkpointing (python -m benchmarks.activations)
ACTIVATIONS = {"sd15": (0.75, 0.20), "sd3.5-medium": (1.89, 0.18), "flux.1-dev": (5.42, 0.48)}
# how far a log ratio may be from 0 at the start by rounding alone, some ten times what was measured: docs/vmpo.md
ROUNDING = {torch.float32: 1e-4, torch.float16: 3e-4, torch.bfloat16: 3e-3}
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
    "runs", "preset", "reward_retries", "keep", "accept_changes",
}  # fmt: skip
# numbers that make another model, task or set of noise: a run goes on with its own even with --accept-changes
FIXED = {
    "seed", "num_prompts", "group_size", "steps", "resolution", "max_sequence_length", "lora_rank", "lora_alpha",
    "eval_images",
}  # fmt: skip
DERIVED = {  # what parse() adds to the flags: not part of args.json
    "prompt_list", "eval_prompt_list", "backbone", "argv", "changed", "note", "run_dir", "made_dir", "resume",
    "dry_run", "paths", "eval_paths", "resume_or_start", "accept_changes", "sources", "rescue",
}  # fmt: skip


def need(condition, what: str, advice: str = "") -> None:
    """Unless the condition holds, the program ends with "what; advice" and exit code 2."""
    if not condition:
        raise UsageError(what + (f"; {advice}" if advice else ""))


# ---- flags -------------------------------------------------------------------
class _Help(argparse.HelpFormatter):
    """Every flag shows its default, and a '%' in a help text is just that."""

    def _get_help_string(self, action):
        text = (action.help or "").replace("%", "%%")
        plain = action.default is None or action.default in ("", []) or action.dest in ("help", "dry_run")
        return text if plain else text + " [%(default)s]"


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}\n")  # one sentence, without the usage


def make_parser(doc: str, method: str) -> argparse.ArgumentParser:
    """The parser of METHOD.py, whose help begins with the first line of its docstring."""
    title = doc.strip().split("\n")[0]
    parser = _Parser(f"{method}.py", "%(prog)s [flags]", title, formatter_class=lambda prog: _Help(prog, width=110))
    parser.limits = {}  # flag: what its number may be, see flags()
    return parser


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

    flag = flags(parser, "model")
    flag("--model", "sd15", "text", f"{', '.join(MODELS)}, a hub id or a folder in diffusers format")
    flag("--lora-rank", 4, "int >= 1", "r (VMPO: 4 for SD1.5, 32 for SD3.5, App. D)")
    flag("--lora-alpha", 4, "float > 0", "alpha (VMPO: 4 for SD1.5, 64 for SD3.5, App. D)")
    flag("--lora-targets", "attention", "text", "attention (papers), attention+mlp, or endings of layer names")
    flag("--dtype", "auto", ["auto", "float32", "bfloat16", "float16"], "of the base; LoRA and losses are float32")
    flag("--t5", True, "yes/no", "load SD3.5's T5 text encoder (9.5 GB in bf16)")

    flag = flags(parser, "performance")
    flag("--micro-batch-size", 8, "int >= 1", "samples per forward pass; changes memory and speed only")
    flag("--decode-batch-size", 8, "int >= 1", "latents per VAE decode")
    flag("--gradient-checkpointing", False, "yes/no", "recompute activations: less memory, about a third slower")
    flag("--offload-text-encoders", False, "yes/no", "keep the text encoders on the CPU except while encoding")
    flag("--offload-rollout", False, "yes/no", "keep an epoch's noise and trajectories in the host's memory")
    flag("--vae-dtype", "float32", ["float32", "bfloat16"], "of the decoder (bfloat16: docs/speed.md)")
    flag("--device", "auto", "text", "auto, cpu, cuda, cuda:N")

    flag = flags(parser, "run")
    flag("--preset", "", "text", "a paper's experiment: see the top of the script; explicit flags win")
    flag("--seed", 0, "int", "of everything that is random")
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
        if args.dry_run:
            print_sizes(args, sizes(args))
            raise SystemExit(0)
        rewards.check_args(args)
        check_model(args)
        args.sources = sources(args, rewards)
    except (UsageError, rewards.UsageError) as problem:
        parser.error(str(problem))
    return args


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
    args.prompt_list = args.eval_prompt_list = load_prompts(args.prompts)
    if args.eval_prompts:
        args.eval_prompt_list = load_prompts(args.eval_prompts, "--eval-prompts")
    if len(args.prompt_list) < args.num_prompts:
        have = f"--prompts has {len(args.prompt_list)} prompts, fewer than --num-prompts {args.num_prompts}"
        print(f"note: {have}; they repeat within an epoch")
    plain = args.name == Path(args.name).name != ".." and len(args.name.encode()) <= 200
    what = f"--name {args.name[:60]} is no name of a folder"
    need(plain or args.resume, what, "use at most 200 characters without /")
    need_writable("--runs", args.runs)


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
    world, prompts, device = max(1, int(ranks[0])), args.num_prompts, args.device
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


def load_prompts(paths: str, flag: str = "--prompts") -> list[common.Prompt]:
    """Comma-separated .txt (a prompt a line) and .jsonl files ({"prompt": ...} a line); UsageError if none."""
    found: list[tuple[str, dict]] = []
    for name in paths.split(","):
        path = source("prompts", name)
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
    need(os.environ.get("HF_HUB_OFFLINE", "0") in ("0", ""), f"{absent} HF_HUB_OFFLINE is set", advice)
    try:
        huggingface_hub.HfApi().model_info(repo, timeout=4)
    except HfHubHTTPError as problem:
        answer = f"the hub answered {problem.response.status_code} for {repo}; check the name or log in"
        raise UsageError(f"{what}: {answer}; {advice}") from None
    except Exception:  # of whichever HTTP library the hub's client stands on
        raise UsageError(f"{absent} the hub cannot be reached; {advice}") from None


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
    """d, the number of scalars in one latent; None for a model that is not in MODELS."""
    if args.model not in MODELS:
        return None
    _, _, channels, pixels, _, _ = MODELS[args.model]
    return channels * (args.resolution // pixels) ** 2


# ---- --dry-run ---------------------------------------------------------------
def rollout_memory(args, latents: int, what: str) -> str:
    """The line of --dry-run for so many latents; "unknown" where their size is not."""
    d = latent_size(args)
    return f"{latents * d * 4 / 2**30:.2f} GB over all processes ({what}; float32)" if d else "unknown"


def activation_memory(args) -> str:
    """The line of --dry-run for what a micro-batch of the update keeps."""
    branches = 1 if args.cfg == 1 or args.backbone.distilled else 2
    wide, pixels = 1 + (args.dtype == "float32"), (args.resolution / 512) ** 2
    usual, less = (each * args.micro_batch_size * branches * wide * pixels for each in ACTIVATIONS[args.model])
    return f"{usual:.1f} GB for --micro-batch-size {args.micro_batch_size}, {less:.1f} with --gradient-checkpointing"


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
    usual = rollout_memory(args, samples * (4 * args.steps + 1), "states, noise, two outputs")
    lines["memory for the rollout"] = lines.pop("memory for the rollout", usual)
    if latent_size(args):
        gigabytes = MODELS[args.model][5] * 1e6 / 2**30
        half, full = f"{2 * gigabytes:.2f} GB in half precision", f"{4 * gigabytes:.2f} GB in float32"
        lines["memory for the denoiser"] = f"{half}, {full}"
    if args.model in ACTIVATIONS:
        lines["memory for its activations"] = activation_memory(args)
    for key, value in lines.items():
        print(f"{key:42s} {value}")


# ---- the run -----------------------------------------------------------------
@dataclass
class Run:
    """Where this process runs and where it writes."""

    dir: Path
    device: torch.device
    dtype: torch.dtype
    rank: int
    world: int
    start_epoch: int = 0
    method: str = ""

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def run_main(main, parse_args, usage_error: type[Exception]) -> None:
    """Entry point of every script.  Whatever ends it, the last complete epoch is kept and one sentence says why.

    Exit code 2 for bad input, 1 for what happens on the way, 128 + its number for a signal.
    """
    args, script = None, Path(sys.argv[0]).name
    with checkpoints.signals_stop():
        try:
            args = parse_args()
            main(args)
            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()
        except BaseException as problem:
            code, said = verdict(problem, (UsageError, usage_error))
            where = go_on(args)
            if not said:  # a fault of the program, with its traceback
                raise
            if common.rank() == 0 or code == 1:
                print(f"\n{script}: {said}{where}", file=sys.stderr)
            sys.exit(code)
        finally:
            if made := getattr(args, "made_dir", None):  # no epoch was done: the corrected command may use the name
                shutil.rmtree(made, ignore_errors=True)


def verdict(problem: BaseException, usage_errors: tuple) -> tuple[int, str]:
    """Exit code and sentence for what ended the program; no sentence for what nobody expected."""
    if isinstance(problem, usage_errors):
        return 2, f"error: {problem}"
    if isinstance(problem, checkpoints.Stopped):
        return 128 + problem.number, f"stopped by {problem}"
    if isinstance(problem, SystemExit) and isinstance(problem.code, str):
        return 1, problem.code
    if isinstance(problem, OSError):  # a full disk, a folder that cannot be written
        return 1, f"stopped: {problem}"
    if isinstance(problem, torch.OutOfMemoryError):
        smaller = "use a smaller --micro-batch-size, --decode-batch-size or --reward-batch-size"
        return 1, f"stopped: the GPU's memory is full; {smaller}, or --gradient-checkpointing"
    gone = isinstance(problem, RuntimeError) and ("onnection" in str(problem) or "NCCL" in str(problem))
    if gone and common.world() > 1:
        return 1, f"stopped: another process of this run has ended ({str(problem).splitlines()[0][:200]})"
    return 1, ""


def go_on(args) -> str:
    """Writes the checkpoint of the last complete epoch where there is none yet; how to go on from there."""
    try:
        getattr(args, "rescue", int)()
    except (OSError, RuntimeError) as problem:  # the disk is full, or the GPU has failed
        print(f"the last complete epoch could not be saved: {problem}", file=sys.stderr)
    where = "" if getattr(args, "made_dir", None) else getattr(args, "run_dir", "")
    return f"; go on with --resume {where}" if where else ""


def setup(args, method: str) -> Run:
    """Process group (where started by torchrun), device, dtype, run folder with all to repeat the run."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local = int(os.environ.get("LOCAL_RANK", 0))
    name = args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(f"cuda:{local}" if name == "cuda" else name)
    if world > 1 and not torch.distributed.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        store = next(torch.distributed.rendezvous("env://", rank, world))[0]
        # after a restart torchrun's store still has the addresses of the dead processes
        store = torch.distributed.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        torch.distributed.init_process_group(backend, store=store, rank=rank, world_size=world)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    dtype, reason = pick_dtype(args.dtype, device)
    reward = "".join(c if c.isalnum() else "-" for c in args.reward)
    folder = Path(args.runs) / (args.name or f"{method}_{reward}_s{args.seed}_{time.strftime('%Y%m%d-%H%M%S')}")
    news = [str(folder), (folder / "args.json").exists()]
    if world > 1:
        torch.distributed.broadcast_object_list(news)  # one name and one verdict for all processes
    what = f"{news[0]} holds a run already; continue it with --resume {news[0]}"
    need(args.resume or not news[1], f"{what}, or choose another --name")
    folder = Path(args.resume or news[0])
    if rank == 0:
        new = not args.resume and not (folder.exists() and any(folder.iterdir()))
        folder.mkdir(parents=True, exist_ok=True)
        checkpoints.lock(folder)
        args.made_dir = str(folder) if new else None  # after the lock: it is ours alone
    args.run_dir = str(folder)
    run = Run(folder, device, dtype, rank, world, method=method)
    if run.is_main:
        if args.resume:
            record_resume(args, run)
        else:
            make_folder(args, run)
        print(f"run folder {folder}  device {device}  dtype {dtype} ({reason})  processes {world}")
        if args.note:
            print(args.note)
        for key, (was, now) in args.changed.items():
            before = "it was" if args.resume else f"preset {args.preset}:"
            print(f"  --{key.replace('_', '-')} {now}  ({before} {was})")
    return run


def make_folder(args, run: Run) -> None:
    """The run folder with args.json, command.txt, versions.json and copies of the scripts."""
    for name in ("samples", "checkpoints"):
        (run.dir / name).mkdir(parents=True, exist_ok=True)
    (run.dir / "command.txt").write_text(shlex.join([Path(sys.executable).name, *sys.argv]) + "\n")
    write_json(run.dir / "versions.json", versions())
    for script in (f"{run.method}.py", *SHARED, *HERE.glob("judges/*.py")):
        if (HERE / script).exists():
            copy = run.dir / (HERE / script).relative_to(HERE)
            copy.parent.mkdir(exist_ok=True)
            shutil.copy(HERE / script, copy)
    for kind, _, path, _ in args.sources:
        if kind == "reward":
            shutil.copy(path, run.dir)
    write_args(args, run)  # last: with it the folder is a run


def write_args(args, run: Run) -> None:
    plain = {k: v for k, v in vars(args).items() if k not in DERIVED}
    write_json(run.dir / "args.json", {"method": run.method, "args": plain, "sources": args.sources})


def record_resume(args, run: Run) -> None:
    """history.jsonl: each segment's command and what it changed, which the next one takes over."""
    segment = {"time": time.strftime("%F %T"), "command": shlex.join(sys.argv), "changed": args.changed}
    with (run.dir / "history.jsonl").open("a") as f:
        f.write(json.dumps(segment) + "\n")
    write_args(args, run)


def pick_dtype(name: str, device: torch.device) -> tuple[torch.dtype, str]:
    """The frozen base's precision, and why."""
    if name != "auto":
        return getattr(torch, name), "as asked"
    if device.type != "cuda":
        return torch.float32, "half precision is slow on a CPU"
    if torch.cuda.is_bf16_supported():
        return torch.bfloat16, "the GPU has it, and it needs no loss scaling"
    return torch.float16, "the GPU has no bfloat16"


def versions() -> dict[str, str]:
    import importlib.metadata as meta

    packages = ("torch", "diffusers", "transformers", "peft", "accelerate", "safetensors")
    found = {"python": platform.python_version(), "platform": platform.platform()}
    found |= {package: meta.version(package) for package in packages}
    try:
        git = ["git", "-C", str(HERE), "describe", "--always", "--dirty"]
        found["git"] = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        found["git"] = "not a git checkout"
    return found | ({"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {})


# ---- model and optimiser from the flags --------------------------------------
def load_policy(args, run: Run) -> common.Policy:
    """The pipeline of --model behind common's interface, without an adapter yet."""
    import diffusers
    import transformers

    for library in (diffusers.utils.logging, transformers.utils.logging):
        library.set_verbosity_error()
        library.disable_progress_bar()
    try:
        pipe = args.backbone.load(args.model_path, {"default": run.dtype, "vae": torch.float32}, args.t5)
    except Exception as problem:  # truncated, missing or foreign files: whatever the libraries raise
        said = " ".join([type(problem).__name__, *str(problem).split()])[:300]
        raise UsageError(f"--model {args.model} cannot be loaded ({said}); fetch its files again") from None
    policy = common.Policy(
        pipe, run.device, run.dtype, args.resolution, args.max_sequence_length, args.decode_batch_size,
        args.detach_uncond, args.offload_text_encoders, args.offload_rollout, getattr(torch, args.vae_dtype),
    )  # fmt: skip
    if args.gradient_checkpointing:
        policy.net.enable_gradient_checkpointing()
    return policy


def add_lora(policy, args) -> list[nn.Parameter]:
    """theta: the trainable adapter's weights."""
    check_lora_targets(policy.net, args)
    return common.add_lora(policy, lora_targets(args), args.lora_rank, args.lora_alpha, args.seed)


def make_optimiser(args, run: Run, theta: list[nn.Parameter], *others) -> common.Optimiser:
    """AdamW on theta, and on `others`, each (weights, learning rate, clipping norm)."""
    adam = dict(betas=(args.adam_beta1, args.adam_beta2), eps=args.adam_eps, weight_decay=args.weight_decay)
    scaler = torch.amp.GradScaler(run.device.type, init_scale=1024.0) if run.dtype == torch.float16 else None
    parts = [(theta, args.lr, args.max_grad_norm), *others]
    ema = (args.ema_decay, args.ema_every, args.ema_warmup, args.ema_repeats)
    return common.Optimiser(parts, adam, *ema, scaler, args.max_bad_steps)


def epoch_batch(args, policy, epoch: int, draws: int | None = None, blocks: int = 0) -> common.Batch:
    """common.epoch_batch with the flags' sizes; `draws` is --steps unless given."""
    draws, sizes = args.steps if draws is None else draws, (args.num_prompts, args.group_size)
    return common.epoch_batch(policy, args.prompt_list, epoch, args.seed, *sizes, draws, args.shared_noise, blocks)


def watched_rows(args, batch: common.Batch, steps: list[int], epoch: int) -> torch.Tensor:
    """WATCHED transitions of an epoch, by (seed, epoch): this process's (n, 2) of (local sample, step)."""
    total = args.num_prompts * args.group_size * len(steps)
    rows = torch.randperm(total, generator=common.generator("watched", args.seed, epoch))[:WATCHED]
    n, i = rows // len(steps) - batch.indices.start, torch.tensor(steps)[rows % len(steps)]
    return torch.stack([n, i], 1)[(n >= 0) & (n < len(batch.indices))]


def epoch_updates(args, batch: common.Batch, steps: list[int], epoch: int, each: int = 0) -> list[torch.Tensor]:
    """The rows of each optimiser step of the epoch: shuffled rows of one pass (--inner-epochs) after the other.

    Without those of the images that Recorder.leave_out() left out; a step of which no process has a row is none.
    """
    sizes = (batch.indices, args.num_prompts * args.group_size, steps, args.updates_per_epoch)
    keys = [(args.seed, epoch, inner) for inner in range(args.inner_epochs)]
    parts = [part for key in keys for part in common.shuffled_rows(*sizes, *key, each=each)]
    if batch.kept is None:
        return parts
    parts = [part[batch.kept[part[:, 0]]] for part in parts]
    counts = all_reduce({i: float(len(part)) for i, part in enumerate(parts)})
    return [part for i, part in enumerate(parts) if counts[i]]


def scored(values: torch.Tensor) -> torch.Tensor:
    """Those that a reward gave: under --skip-failed it may have given none (nan)."""
    return values[~values.isnan()]


@torch.no_grad()
def score(args, policy, reward, x0: torch.Tensor, prompts: list[common.Prompt]) -> tuple[torch.Tensor, dict]:
    """Rewards of the latents x0 (B N, C, h, w), N of each prompt in turn: (B N,), {term: (B N,)}.

    Decoded and scored a piece at a time: all images of an epoch, and their decoder's work, would be gigabytes.
    """
    prompts = [p for p in prompts for _ in range(len(x0) // len(prompts))]
    size = math.lcm(args.decode_batch_size, args.reward_batch_size)  # whole batches: the same bits as in one piece
    size = math.lcm(size, args.group_size) if reward.grouped else size
    found = []
    for n in range(0, len(x0), size):
        images, some = policy.decode(x0[n : n + size]), prompts[n : n + size]
        texts, extra = [p.text for p in some], [p.metadata for p in some]
        found.append(reward(images, texts, extra, chunk=args.reward_batch_size))
    totals, terms = zip(*found)
    return torch.cat(totals), {name: torch.cat([each[name] for each in terms]) for name in terms[0]}


# ---- statistics of an epoch --------------------------------------------------
@dataclass
class Metrics:
    """A method's columns of metrics.csv, in order."""

    means: list[str]  # of rows, over the epoch and all processes
    stds: tuple[str, ...] = ()  # those "x/mean" whose "x/std" is logged, too
    tops: tuple[str, ...] = ()  # maxima
    more: tuple[str, ...] = ()  # what main() computes itself

    def with_steps(self, names: list[str], steps: list[int]) -> "Metrics":
        """And the means "name/NN" of each step, see by_step()."""
        return replace(self, means=[*self.means, *(f"{name}/{i:02d}" for name in names for i in steps)])

    @property
    def columns(self) -> list[str]:
        return [*self.means, *(key.removesuffix("mean") + "std" for key in self.stds), *self.tops, *self.more]


def by_step(i: torch.Tensor, values: dict) -> dict[str, torch.Tensor]:
    """The rows (R,) of each value sorted by their steps i (R,), as "name/NN"."""
    steps = i.unique().tolist()
    return {f"{name}/{j:02d}": value[i == j] for name, value in values.items() for j in steps}


def write_influence(run, steps: list[int], h: torch.Tensor) -> None:
    """influence.json: h_t (T,), the weight of the value's gradient in that of o, with mean 1 over `steps`."""
    if run.is_main:
        write_json(run.dir / "influence.json", {"step": steps, "h": (h[steps] / h[steps].mean()).tolist()})


class Stats:
    """Means of per-row quantities over an epoch and all processes, and maxima."""

    def __init__(self, means: list[str], tops=(), stds=(), tolerance: float = math.inf, epoch: int = 0):
        self.sums = {key: [0.0, 0.0, 0.0] for key in means}  # count, sum, sum of squares
        self.tops = dict.fromkeys(tops, 0.0)
        self.stds, self.tolerance, self.epoch, self.started, self.rows = stds, tolerance, epoch, False, []

    @torch.no_grad()
    def add(self, values: dict[str, torch.Tensor], i: torch.Tensor | None = None) -> None:
        """Each value (n,): one number per row; i: the rows' steps, for broken()."""
        if i is not None:
            self.rows.append((i, values["loss/total"].isfinite()))
        for key, value in values.items():
            value = value.double()
            for j, part in enumerate((value.numel(), value.sum(), (value**2).sum())):
                self.sums[key][j] = self.sums[key][j] + part

    def top(self, key: str, value: float) -> None:
        self.tops[key] = value if math.isnan(value) else max(self.tops[key], value)

    def check_start(self, moved: torch.Tensor, z: torch.Tensor) -> None:
        """The first micro-batch after a rollout repeats the rollout's network calls: the log ratio must be 0 there.

        moved = (mu_theta - mu_old) / sigma and the draws z; later calls of an epoch do nothing.
        """
        if self.started:
            return
        self.started = True
        deviation = common.log_ratio(moved, z, "mean").abs().max().item()
        self.top("ratio/start_deviation", deviation)
        if not deviation <= self.tolerance:
            raise SystemExit(
                f"stopped in epoch {self.epoch + 1}: right after the rollout |log p_theta - log p_old| is "
                f"{deviation:.1e}, expected below {self.tolerance:.0e}; the rollout's and the update's passes differ: "
                "use --dtype float32 or float16, or accept it with --ratio-tolerance"
            )

    def broken(self) -> str:
        """Which quantities of the epoch so far are not finite, and at which steps: why a gradient is not."""
        names = [key for key, (_, total, _) in self.sums.items() if not math.isfinite(float(total))]
        steps = sorted({j for i, fine in self.rows for j in i[~fine.to(i.device)].tolist()})
        found = ", ".join(names) + (f" at step {', '.join(map(str, steps))}" if steps else "")
        return f"not finite: {found}" if names else "every logged quantity was finite: the backward pass was not"

    def result(self) -> dict[str, float]:
        """{key: mean}, {"x/std": standard deviation} of the "x/mean" in stds, and the maxima."""
        flat = {(key, j): float(part) for key, parts in self.sums.items() for j, part in enumerate(parts)}
        flat, found = all_reduce(flat), {}
        for key in self.sums:
            count, total, squares = (flat[key, j] for j in range(3))
            if count:
                found[key] = total / count
            if count and key in self.stds:
                found[key.removesuffix("mean") + "std"] = max(0.0, squares / count - found[key] ** 2) ** 0.5
        return found | all_reduce(self.tops, "MAX")


# ---- held-out evaluation -----------------------------------------------------
@torch.no_grad()
def draw(policy, args, indices, desc="", distances: dict | None = None) -> tuple[torch.Tensor, list[common.Prompt]]:
    """Images (N, 3, H, W) on the CPU of the held-out prompts (repeated in order as needed) with these indices.

    The noise depends on the image's index alone: the same in every run and epoch.  desc: of a progress bar;
    distances: the tensors (N,) of common.path_distance(), to be filled in for the first WATCHED of all images.
    """
    prompts = [args.eval_prompt_list[n % len(args.eval_prompt_list)] for n in indices]
    kernel, level = (args.kernel, args.noise_level) if args.eval_kernel == "same" else ("ode", 0.0)
    grid = policy.grid(args.eval_steps, kernel, level)
    cond = policy.encode([p.text for p in prompts])
    images, bar = [], common.progress(len(indices), desc)
    for start in range(0, len(indices), args.micro_batch_size):
        rows = slice(start, start + args.micro_batch_size)
        noise = common.sample_noise(0, "held-out", indices[rows], grid.steps, policy.latent_shape, policy.device)
        path = common.rollout(policy, grid, cond[rows], noise, args.eval_cfg, len(noise), desc="")
        count = min(len(noise), WATCHED - indices[start])
        if distances and count > 0:
            found = common.path_distance(policy, grid, path, count, args.eval_cfg, args.logprob_reduce)
            for values, value in zip(distances.values(), found):
                values[start : start + count] = value
        images.append(policy.decode(path.x[:, -1]).cpu())
        bar.update(len(noise))
    bar.close()
    return torch.cat(images), prompts


def held_out_share(args, run) -> int:
    """How many of the held-out images each process draws; the last process's may go on from the first prompt."""
    return -(-args.eval_images // run.world)


def score_held_out(policy, args, run, reward, more) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """This process's share of the held-out images, drawn and scored: {name: (share,)}, and the images."""
    share = held_out_share(args, run)
    names = ("drift", "kl") if args.eval_kernel == "same" else ("drift",)
    scores = {name: torch.full((share,), torch.nan, device=run.device) for name in names}
    mine = range(run.rank * share, (run.rank + 1) * share)
    images, prompts = draw(policy, args, mine, "held-out images", scores)
    texts, extra = [p.text for p in prompts], [p.metadata for p in prompts]
    for scorer in (reward, more):
        if scorer is not None and not scorer.grouped:  # it would say nothing of one image
            total, parts = scorer(images.to(run.device), texts, extra, chunk=args.reward_batch_size)
            scores = {"reward": total} | scores | parts
    return scores, images


def held_out_file(run_dir: Path, epoch: int, n: int) -> Path:
    return run_dir / "eval" / f"epoch_{epoch:04d}" / f"{n:04d}.png"


def keep_images(images: torch.Tensor, args, run, epoch: int) -> None:
    """This process's held-out images of the first or last evaluation, as files: finish() draws nothing again."""
    first = run.rank * len(images)
    for n, pixels in enumerate(pictures.as_uint8(images)[: max(0, args.eval_images - first)], first):
        pictures.save_image(pixels, held_out_file(run.dir, epoch, n))


def held_out_metrics(scores: dict[str, torch.Tensor], args, run, epoch: int) -> dict[str, float]:
    """Held-out reward (mean, standard error), its terms and the --eval-rewards; each image's scores go to eval/.

    And the distance to the reference, of the first WATCHED images.
    """
    scores = {name: gather(value.to(run.device))[: args.eval_images] for name, value in scores.items()}
    far = {f"eval/{name}": scores.pop(name)[:WATCHED].mean().item() for name in ("drift", "kl") if name in scores}
    if run.is_main:
        texts = [args.eval_prompt_list[n % len(args.eval_prompt_list)].text for n in range(args.eval_images)]
        (run.dir / "eval").mkdir(exist_ok=True)
        plain = {k: [None if x != x else x for x in v.tolist()] for k, v in scores.items()}  # JSON knows no nan
        content = {"prompts": texts} | plain
        write_json(run.dir / "eval" / f"epoch_{epoch:04d}.json", content)
    scores = {name: scored(value) for name, value in scores.items()}
    result = {f"eval/{name}": value.mean().item() for name, value in scores.items()}
    return result | far | {"eval/reward_se": scores["reward"].std().item() / len(scores["reward"]) ** 0.5}


# ---- log ---------------------------------------------------------------------
class Logger:
    """metrics.csv + TensorBoard (+ wandb if asked); the columns are fixed from the first row."""

    def __init__(self, run: Run, args, keys: list[str]):
        self.run, self.keys, self.path, self.wandb = run, ["epoch", *keys], run.dir / "metrics.csv", None
        if not run.is_main:
            return
        kept = []
        if self.path.exists() and run.start_epoch:  # a resumed run: drop what was logged after the checkpoint
            with self.path.open(newline="") as f:
                whole = [row for row in csv.DictReader(f) if None not in row.values()]  # a kill may tear the last one
            kept = [row for row in whole if int(row["epoch"]) <= run.start_epoch]
        with complete(self.path) as temporary, temporary.open("w", newline="") as f:
            writer = csv.DictWriter(f, self.keys)
            writer.writeheader()
            writer.writerows(kept)
        from torch.utils.tensorboard import SummaryWriter

        self.board = SummaryWriter(run.dir, purge_step=run.start_epoch + 1 if run.start_epoch else None)
        if args.wandb:
            import wandb

            name = run.dir.name
            self.wandb = wandb.init(project=args.wandb, name=name, dir=run.dir, resume="allow", id=name)

    def log(self, epoch: int, values: dict[str, float]) -> None:
        if not self.run.is_main:
            return
        if unknown := set(values) - set(self.keys):
            raise KeyError(f"metrics {sorted(unknown)} were not announced to the Logger")
        with self.path.open("a", newline="") as f:
            csv.DictWriter(f, self.keys, restval="").writerow({"epoch": epoch, **values})
        for key, value in values.items():
            self.board.add_scalar(key, value, epoch)
        self.board.flush()
        if self.wandb:
            self.wandb.log(values, step=epoch)

    def rows(self) -> list[dict[str, float]]:
        with self.path.open(newline="") as f:
            return [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(f)]

    def close(self) -> None:
        if self.run.is_main:
            self.board.close()
            if self.wandb:
                self.wandb.finish()


# ---- what happens around every method's epochs -------------------------------
class Recorder:
    """Resume, evaluation, log, sample grids, checkpoints, the final summary."""

    def __init__(self, run, args, policy, optimiser, scorers, failure, metrics: Metrics, modules=None):
        """scorers: (the reward, one more for evaluations or None); failure: what they raise; modules: {name: object
        with state_dict()} is what a checkpoint holds beside theta."""
        self.run, self.args, self.policy, self.optimiser = run, args, policy, optimiser
        (self.reward, self.more), self.failure = scorers, failure
        self.metrics, self.modules = metrics, modules or {}
        state = checkpoints.load(run.dir) if args.resume and run.is_main else None
        if run.world > 1:
            torch.distributed.barrier()  # the first process sets damaged checkpoints aside
        state = checkpoints.load(run.dir) if args.resume and not run.is_main else state
        if state:
            self._load(state)
            run.start_epoch = state["epoch"]
        self.kept, args.rescue = (), self._rescue  # (epoch, state) of the last complete epoch
        terms = [f"reward/{t.name}" for t in self.reward.terms] + ["reward/skipped"] * args.skip_failed
        held = [f"eval/{t.name}" for r in scorers if r and not r.grouped for t in r.terms]
        keys = ["reward/mean", "reward/std", *terms, *metrics.columns, "grad/bad_steps", "calls/network"]
        keys += ["time/rollout", "time/reward", "time/update", "mem/peak_gb", "eval/reward", "eval/reward_se"]
        keys += ["eval/drift", "eval/kl"][: 1 + (args.eval_kernel == "same")] + held
        self.logger, self.calls, self.clock = Logger(run, args, keys), 0, []

    def epochs(self):
        """The epochs that are left, after the evaluation of the untrained policy."""
        run, args, at = self.run, self.args, self.run.start_epoch
        there = (run.dir / "eval" / f"epoch_{at:04d}.json").exists()
        if args.eval_images and (at == 0 or at == args.epochs and not there):  # a stop may fall before the last one
            with self.optimiser.averaged():
                scores, images, problem = self._held_out(at)
            self._stop_if(problem, at)
            row = held_out_metrics(scores, args, run, at)
            self.logger.log(at, row)
            if at == 0 and args.sample_every:
                self._sample_grid(0, images)
            self._say(at, row)
        left, off = range(run.start_epoch, args.epochs), not run.is_main or not sys.stderr.isatty()
        self.bar = common.tqdm(left, desc=run.method, disable=off, initial=run.start_epoch, total=args.epochs)
        for epoch in self.bar:
            self.calls, self.clock = self.policy.network_calls, []
            yield epoch

    def phase(self) -> None:
        """Called where an epoch's rollout, reward and update begin: the time columns."""
        self.clock.append(time.time())

    def stats(self, epoch: int) -> Stats:
        """Empty statistics for the update of this epoch."""
        given = self.args.ratio_tolerance
        tolerance = ROUNDING[self.run.dtype] if given is None else given
        stats = Stats(self.metrics.means, self.metrics.tops, self.metrics.stds, tolerance, epoch)
        self.optimiser.cause = stats.broken
        return stats

    @contextmanager
    def scoring(self, epoch: int):
        """A reward that fails inside stops all processes with its sentence, after a checkpoint."""
        problem = None
        try:
            yield
        except self.failure as failure:
            problem = failure
        self._stop_if(problem, epoch)

    def leave_out(self, epoch: int, batch: common.Batch, *scores: torch.Tensor) -> None:
        """--skip-failed: no update of the epoch has a row of a prompt of whose images one has no score.

        scores (B, ...) or (B n,) image by image: nan where there is none, and from here on for the whole prompt.
        Stops the run where no prompt is left.
        """
        if not self.args.skip_failed:
            return
        each = [x.reshape(len(batch.prompts), -1).isnan().any(1) for x in scores]
        groups = torch.stack(each).any(0).view(-1, self.args.group_size).any(1)
        batch.kept = ~groups.repeat_interleave(self.args.group_size).cpu()
        for x in scores:
            x.view(len(batch.prompts), -1)[~batch.kept] = math.nan
        count = all_reduce({"skipped": float(groups.sum()), "all": float(len(groups))})
        self.skipped, none = int(count["skipped"]), count["skipped"] == count["all"]
        self._stop_if(self.failure("no prompt of the epoch has a score of every image") if none else None, epoch)

    def end_epoch(self, epoch: int, final: torch.Tensor, parts: dict, metrics: dict[str, float]) -> None:
        """Rewards (B,), their terms and the method's metrics of `epoch` -> log, evaluation, samples, checkpoint."""
        run, args = self.run, self.args
        self.phase()
        every = scored(gather(final))
        row = {"reward/mean": every.mean().item(), "reward/std": every.std().item() if len(every) > 1 else 0.0}
        row |= {f"reward/{name}": scored(gather(value)).mean().item() for name, value in parts.items()} | metrics
        if args.skip_failed:
            row["reward/skipped"] = self.skipped
        row |= {"grad/bad_steps": self.optimiser.bad_steps, "calls/network": self.policy.network_calls - self.calls}
        for name, begin, end in zip(("rollout", "reward", "update"), self.clock, self.clock[1:]):
            row[f"time/{name}"] = end - begin
        if run.device.type == "cuda":
            row["mem/peak_gb"] = torch.cuda.max_memory_allocated() / 2**30
        done, last = epoch + 1, epoch + 1 == args.epochs
        scores = images = problem = None
        with self.optimiser.averaged():
            if args.eval_images and (last or args.eval_every and done % args.eval_every == 0):
                scores, images, problem = self._held_out(done)
            if args.eval_images and args.sample_every and done % args.sample_every == 0:
                self._sample_grid(done, images)
        if scores:
            row |= held_out_metrics(scores, args, run, done)
        with checkpoints.unbroken():  # the policy's own weights are back: they are what a checkpoint keeps
            args.made_dir = None  # an epoch is done: from here on the folder is worth keeping
            self.logger.log(done, row)
            self.kept = (done, self._state()) if run.is_main else ()
            if last or args.save_every and done % args.save_every == 0:
                self._save()  # after the log: a resumed run drops the rows that came after its checkpoint
        self._say(done, row)
        self._stop_if(problem, done)

    def finish(self) -> None:
        finish(self.run, self.args, self.logger)
        self.logger.close()

    def _held_out(self, epoch: int):
        """Scores and images of the held-out prompts, or the failure; the first and last images are kept as files."""
        try:
            scores, images = score_held_out(self.policy, self.args, self.run, self.reward, self.more)
        except self.failure as failure:
            return None, None, failure
        if epoch in (0, self.args.epochs):
            keep_images(images, self.args, self.run, epoch)
        return scores, images, None

    def _sample_grid(self, epoch: int, images) -> None:
        """samples/epoch_NNNN.png: the first held-out images, drawn unless this epoch's evaluation has them."""
        if not self.run.is_main:
            return
        first = range(min(16, held_out_share(self.args, self.run)))
        if images is None:
            images, _ = draw(self.policy, self.args, first)
        prompts = self.args.eval_prompt_list
        texts = [prompts[n % len(prompts)].text for n in first]
        pictures.image_grid(images[: len(first)], texts, self.run.dir / "samples" / f"epoch_{epoch:04d}.png")

    def _say(self, epoch: int, row: dict[str, float]) -> None:
        """The epoch's numbers behind the bar or, in a log file, as a line."""
        if not self.run.is_main:
            return
        named = {"reward": ("reward/mean", ".3f"), "kl": ("kl/ref", ".1e"), "held-out": ("eval/reward", ".3f")}
        said = {name: f"{row[key]:{form}}" for name, (key, form) in named.items() if key in row}
        if sys.stderr.isatty():
            if epoch > self.run.start_epoch:
                self.bar.set_postfix(said)
            return
        seconds = sum(row.get(f"time/{phase}", 0.0) for phase in ("rollout", "reward", "update"))
        words = [f"epoch {epoch}/{self.args.epochs}", *(f"{name} {value}" for name, value in said.items())]
        print("  ".join(words) + (f"  {seconds:.1f} s" if seconds else ""), flush=True)

    def _stop_if(self, problem, epoch: int) -> None:
        if all_reduce({"failed": float(problem is not None)})["failed"]:
            self._rescue()
            raise SystemExit(f"stopped after epoch {epoch}: {problem or 'the reward failed in another process'}")

    def _state(self) -> dict:
        """A copy of all that a resume needs; a module whose state is only ever replaced is not copied."""
        parts = {name: module.state_dict() for name, module in self.modules.items()}
        fixed = {name for name, module in self.modules.items() if getattr(module, "replaced", False)}
        parts = {name: state if name in fixed else checkpoints.copied(state) for name, state in parts.items()}
        return parts | {"theta": checkpoints.copied(self.optimiser.state_dict())}

    def _load(self, state: dict) -> None:
        self.optimiser.load_state_dict(state["theta"])
        for name, module in self.modules.items():
            module.load_state_dict(state[name])

    def _save(self) -> None:
        if not self.kept:  # in all processes but the first
            return
        epoch, state = self.kept
        about = header(self.args, self.run, epoch)
        checkpoints.save(self.run.dir, self.policy, epoch, state, self.optimiser.ema, self.args.keep, about)

    def _rescue(self) -> None:
        """The checkpoint of the last complete epoch, whatever has happened since."""
        if self.kept:
            self._load(self.kept[1])
            self._save()


def header(args, run: Run, epoch: int) -> dict:
    """What a LoRA file says of itself."""
    about = {"method": run.method, "base_model": args.model, "preset": args.preset, "reward": args.reward}
    about |= {"seed": args.seed, "epoch": epoch, "rank": args.lora_rank, "trained_alpha": args.lora_alpha}
    about["alpha"] = args.lora_rank  # alpha / rank is folded into B: 1 is left
    about["command"] = (run.dir / "command.txt").read_text().strip()
    about["commit"] = json.loads((run.dir / "versions.json").read_text())["git"]
    return about


def finish(run: Run, args, logger: Logger) -> None:
    """summary.json, curve.png, before_after.png and gallery.html, and the result in a few lines.  Draws no image."""
    if not run.is_main:
        return
    rows, why = logger.rows(), why_they_differ(args)
    pictures.plot_curve(rows, run.dir / "curve.png", run.dir.name, why)
    phases = ("time/rollout", "time/reward", "time/update")
    seconds = sum(row.get(key, 0.0) for row in rows for key in phases)
    images = f"; {args.eval_images} held-out images, same noise before and after:" if args.eval_images else ""
    print(f"{args.epochs} epochs, {seconds:.0f} s of training{images}")
    summary = {"seed": args.seed, "epochs": args.epochs, "seconds": round(seconds, 1), "images": args.eval_images}
    summary["command"] = (run.dir / "command.txt").read_text().strip()
    gains, both = compare_scores(args, run)
    shown = show_pairs(args, run, summary["command"], gains, both) if both else {}
    write_json(run.dir / "summary.json", summary | gains)  # last: where it is, the run is finished
    print(why)
    for what, path in ({"curve": run.dir / "curve.png"} | shown).items():
        print(f"{what:9s} {path}")
    print(f"LoRA      pipe.load_lora_weights('{run.dir / 'checkpoints' / 'last'}')")


def unblank(scores: dict[str, list]) -> dict[str, list]:
    return {k: [math.nan if x is None else x for x in v] for k, v in scores.items()}


def why_they_differ(args) -> str:
    """One sentence on the gap between the training and the held-out reward."""
    same = args.eval_kernel == "same"
    reasons = ["with the sampler's noise" if same else "without the sampler's noise"]
    reasons += [f"in {args.eval_steps} steps (training: {args.steps})"] if args.eval_steps != args.steps else []
    reasons += [f"at guidance {args.eval_cfg:g} (training: {args.cfg:g})"] if args.eval_cfg != args.cfg else []
    reasons += ["from averaged weights"] if args.ema_decay else []
    reasons += ["on other prompts"] if args.eval_prompts else []
    how = ", ".join(reasons)
    return f"Held-out images are drawn {how}: compare held-out rewards with each other, not with training rewards."


def compare_scores(args, run) -> tuple[dict, list[dict]]:
    """Means before and after, gains, standard errors, how many images improved and worsened, by score; and the
    scores themselves: {name: one number per image}, before and after."""
    result = {"before": {}, "after": {}, "gain": {}, "gain_se": {}, "improved": {}, "worsened": {}}
    if not args.eval_images:
        return result, []
    files = [run.dir / "eval" / f"epoch_{epoch:04d}.json" for epoch in (0, args.epochs)]
    both = [unblank(json.loads(file.read_text())) for file in files]
    for key in (k for k in both[0] if k != "prompts"):
        old, new = (torch.tensor(scores[key], dtype=torch.float64) for scores in both)
        known = ~(old + new).isnan()
        old, new = old[known], new[known]
        gain, error = (new - old).mean().item(), (new - old).std().item() / len(old) ** 0.5  # paired, over images
        found = {"before": old.mean().item(), "after": new.mean().item(), "gain": gain, "gain_se": error}
        found |= {"improved": (new > old).sum().item(), "worsened": (new < old).sum().item()}
        for name, value in found.items():
            result[name][key] = value
        images = f"{found['improved']} of {len(old)} improved, {found['worsened']} worsened"
        print(f"  {key:15s} {old.mean():8.4f} -> {new.mean():8.4f}   gain {gain:+.4f} +- {error:.4f}   {images}")
    return result, both


def show_pairs(args, run, command: str, gains: dict, both: list[dict]) -> dict[str, Path]:
    """before_after.png, 12 pairs at random and the 12 largest changes, and gallery.html with all; {what: file}."""
    epochs, texts = (0, args.epochs), both[0]["prompts"]
    files = [[held_out_file(run.dir, epoch, n) for n in range(args.eval_images)] for epoch in epochs]
    if not all(file.exists() for part in files for file in part):
        return {}  # another machine's process has drawn some
    old, new = (torch.tensor(scores["reward"], dtype=torch.float64) for scores in both)
    names = [name for name in both[0] if name != "prompts"]
    failed = {n for scores in both for name in names for n, x in enumerate(scores[name]) if math.isnan(x)}
    known = [n for n in range(len(old)) if n not in failed]
    order = torch.randperm(len(known), generator=common.generator("pairs", args.seed)).tolist()
    random = [known[n] for n in order[:12]]
    largest = sorted((n for n in known if old[n] != new[n]), key=lambda n: -abs(new[n] - old[n]))[:12]
    parts = []
    for chosen, what in ((random, "at random"), (largest, "with the largest changes of the reward")):
        images = [part[n] for n in chosen for part in files]
        scores = [(old[n].item(), new[n].item()) for n in chosen]
        if chosen:
            heading = f"{len(chosen)} of {len(old)} held-out images, {what}"
            parts.append((heading, pictures.read_images(images), [texts[n] for n in chosen], scores))
    shown = {"pictures": run.dir / "before_after.png"}
    pictures.stacked_sheets(parts, shown["pictures"])
    if pictures.TEMPLATE.exists():
        shown["gallery"] = run.dir / "gallery.html"
        head = dict(title=run.dir.name, note="held-out prompts, same noise before and after", command=command)
        write_gallery(shown["gallery"], head, gains, both, files, known)
    return shown


def write_gallery(path: Path, head: dict, gains: dict, both: list[dict], files: list[list[Path]], known) -> None:
    """The page of eval.py with the run's first and last evaluation; `known`: the images that are scored."""
    names = [name for name in both[0] if name not in ("prompts", "reward")]
    summary = {"base": {}, "trained": {}}
    for name in names:
        summary["base"][name] = {"mean": gains["before"][name], "se": None}
        summary["trained"][name] = {"mean": gains["after"][name], "se": None}
        summary["trained"][name] |= {"difference": gains["gain"][name], "difference_se": gains["gain_se"][name]}
    head |= dict(rewards=names, summary=summary)
    scores = {m: {name: torch.tensor(s[name])[known, None] for name in names} for m, s in zip(summary, both)}
    prompts = [common.Prompt(i, both[0]["prompts"][n], {}) for i, n in enumerate(known)]
    shown = {model: [part[n] for n in known] for model, part in zip(summary, files)}
    pictures.write_gallery(path, head, prompts, shown, scores, megabytes=24)
