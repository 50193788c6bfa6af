"""What the five trainers share word for word: flags, run folder, the two backbones, samplers, logging, checkpoints.

Nothing here knows a method.  A *kernel* turns a network output o (epsilon or velocity) into the Gaussian of one
sampler step, N(mu, sigma^2 I); every kernel of the papers is linear, mu = x_coef * x_t + o_coef * o, so a `Grid` holds
three numbers per step and the rest is arithmetic.  Time runs from t = 1 (noise) to t = 0 (data); step i = 0 leaves
pure noise; x_s is the next, cleaner state.  Shapes: B samples (group-major: P prompts x K images), T sampler steps.
Everything random is a function of (seed, epoch, sample index), so a run depends neither on the micro-batch size, nor
on the number of processes, nor on having been interrupted.
"""

import argparse
import csv
import hashlib
import json
import math
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
MODELS = {  # name: folder or hub id, kind, latent channels, pixels per latent, resolution of the papers, parameters (M)
    "sd15": ("stable-diffusion-v1-5/stable-diffusion-v1-5", "eps", 4, 8, 512, 860),
    "sd3.5-medium": ("stabilityai/stable-diffusion-3.5-medium", "flow", 16, 8, 512, 2243),
    "tiny-sd15": (str(HERE / "tiny" / "sd15"), "eps", 4, 4, 32, 1.1),
    "tiny-sd35": (str(HERE / "tiny" / "sd35"), "flow", 4, 4, 32, 1.3),
}
PIPELINES = {"StableDiffusionPipeline": "eps", "StableDiffusion3Pipeline": "flow"}
KERNELS = {"eps": ("ddim", "ancestral", "ode"), "flow": ("flow_sde", "dance", "ancestral", "cps", "ode")}
NOISE_LEVEL = {"ddim": 1.0, "flow_sde": 0.7, "dance": 0.3, "cps": 0.8, "ancestral": 1.0, "ode": 0.0}
ATTENTION = {"eps": ["to_q", "to_k", "to_v", "to_out.0"],
             "flow": ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]}  # fmt: skip
MLP = {"eps": ["ff.net.0.proj", "ff.net.2"],
       "flow": ["ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"]}  # fmt: skip
# the embedded models' experiment, in every script: coloured shapes, 64 images an epoch, one update
TINY = dict(prompts="prompts/shapes_train.txt", eval_prompts="prompts/shapes_heldout.txt", reward="shapes",
            eval_rewards="shapes-strict", eval_images=256, max_sequence_length=10, steps=10, eval_steps=None, cfg=1.0, num_prompts=8,
            group_size=8, updates_per_epoch=1, ema_decay=0.9, ema_every=1, lora_rank=16, lora_alpha=16,
            lora_targets="attention+mlp", micro_batch_size=64, decode_batch_size=64, reward_batch_size=256)  # fmt: skip
MIN_SIGMA = 1e-6  # below this a step has no density: it is performed, but it is not a step of the policy
# flags that may change when a run is resumed: none of them enters the mathematics
RESUMABLE = {"resume", "epochs", "micro_batch_size", "reward_batch_size", "decode_batch_size", "sample_every",
             "save_every", "eval_every", "device", "wandb", "dry_run", "gradient_checkpointing",
             "offload_text_encoders", "runs", "preset"}  # fmt: skip


class UsageError(ValueError):
    """Bad input, found before anything heavy: one sentence with what was given, what is expected and what to do."""


# ---- args -----------------------------------------------------------------------------------------------------------
def add_args(parser: argparse.ArgumentParser) -> None:
    """The flag groups that all five trainers share.  Defaults are the papers'; a method's own group is in its script."""
    yes_no = argparse.BooleanOptionalAction
    g = parser.add_argument_group("reward")
    g.add_argument("--reward", default="hpsv2", help="r: name, weighted sum 'a=1,b=0.5', or 'module:function' of your own (paper: hpsv2, imagereward, ocr)")
    g.add_argument("--reward-path", nargs="*", default=[], metavar="[NAME=]PATH", help="local weights of the reward models, instead of the hub's")
    g.add_argument("--eval-rewards", default="", help="more rewards to report in evaluations, not trained on: names, comma-separated (paper: CLIPScore, ImageReward, DreamSim beside HPSv2, Table 1)")
    g.add_argument("--reward-batch-size", type=int, default=16, help="images per reward call; changes memory and speed only")
    g.add_argument("--prompts", default="prompts/hpdv2_photo.txt,prompts/hpdv2_paintings.txt", help="training prompts c: file(s), comma-separated; .txt has one prompt a line, .jsonl one object with 'prompt' a line (paper: HPDv2 photo and painting, App. D)")
    g.add_argument("--eval-prompts", default="", help="held-out prompts of the evaluation; default: the training prompts")

    g = parser.add_argument_group("sampling")
    g.add_argument("--num-prompts", type=int, default=128, help="P: prompts per epoch, over all GPUs (paper: 128 trajectories an epoch, App. D)")
    g.add_argument("--group-size", type=int, default=1, help="K: images per prompt (paper: K of Eq. 5; the amortised mean needs only 1)")
    g.add_argument("--steps", type=int, default=50, help="T: sampler steps (paper: 50 for SD1.5, 10 for SD3.5, App. D)")
    g.add_argument("--kernel", default="auto", choices=["auto", "ddim", "flow_sde", "dance", "ancestral", "cps", "ode"], help="transition kernel of the rollout; auto = ddim for SD1.5, flow_sde (Flow-GRPO) for SD3.5")
    g.add_argument("--noise-level", type=float, help="eta of ddim (DDPO: 1), nl of flow_sde (Flow-GRPO: 0.7), g of dance (0.3), nl of cps (0.8); default: these")
    g.add_argument("--cfg", type=float, default=5.0, help="classifier-free guidance scale, in rollout and training alike (paper: 5 for SD1.5, 4.5 for SD3.5, App. D); 1 = off")
    g.add_argument("--shared-noise", action=yes_no, default=False, help="the K images of a prompt start from the same x_T (DanceGRPO), so that the group's rewards differ by the policy's own draws only")
    g.add_argument("--detach-uncond", action=yes_no, default=False, help="no gradient through the unconditional branch (early Flow-GRPO, VGG-Flow)")
    g.add_argument("--train-fraction", type=float, help="leading fraction of the T steps that are trained (Flow-GRPO: 0.99 = all but the last); default 1 for SD1.5, 0.99 for SD3.5, all but the last two with --kernel cps")
    g.add_argument("--resolution", type=int, help="pixels per side (paper: 512); default 512 for SD1.5 and SD3.5, else the model's own")
    g.add_argument("--max-sequence-length", type=int, default=256, help="length of SD3.5's T5 part of the text; the embedded model uses 10 (Flow-GRPO: 128)")

    g = parser.add_argument_group("optimisation")
    g.add_argument("--epochs", type=int, default=150, help="rollout-update rounds (paper: 150, App. D)")
    g.add_argument("--updates-per-epoch", type=int, default=2, help="optimiser steps per rollout (paper: 2, App. D)")
    g.add_argument("--inner-epochs", type=int, default=1, help="passes over one rollout (paper: 1)")
    g.add_argument("--lr", type=float, default=3e-4, help="learning rate of theta (paper: 3e-4, App. D)")
    g.add_argument("--adam-beta1", type=float, default=0.9, help="AdamW (DDPO: 0.9)")
    g.add_argument("--adam-beta2", type=float, default=0.999, help="AdamW (DDPO: 0.999)")
    g.add_argument("--adam-eps", type=float, default=1e-8, help="AdamW (DDPO: 1e-8)")
    g.add_argument("--weight-decay", type=float, default=1e-4, help="AdamW (DDPO: 1e-4)")
    g.add_argument("--max-grad-norm", type=float, default=1.0, help="gradient norm clipped at (paper: 1, App. D)")
    g.add_argument("--logprob-reduce", choices=["mean", "sum"], default="mean", help="over the latent's d scalars: mean = all public code (temperature beta/d), sum = the exact log-density")
    g.add_argument("--ema-decay", type=float, default=0.0, help="decay of the averaged LoRA that is evaluated and exported (Flow-GRPO: 0.9); 0 = off")
    g.add_argument("--ema-every", type=int, default=8, help="optimiser steps between two averagings (Flow-GRPO: 8)")
    g.add_argument("--max-bad-steps", type=int, default=5, help="updates with a NaN or infinite gradient that are skipped before the run stops")
    g.add_argument("--ratio-tolerance", type=float, help="largest |log ratio| (mean reduction) allowed in the first micro-batch after a rollout; default 1e-4 in float32, 1e-2 in half precision")

    g = parser.add_argument_group("model")
    g.add_argument("--model", default="sd15", help=f"{', '.join(MODELS)}, a hub id or a folder in diffusers format")
    g.add_argument("--lora-rank", type=int, default=4, help="r (paper: 4 for SD1.5, 32 for SD3.5, App. D)")
    g.add_argument("--lora-alpha", type=float, default=4, help="alpha (paper: 4 for SD1.5, 64 for SD3.5, App. D)")
    g.add_argument("--lora-targets", default="attention", help="attention (the papers'), attention+mlp, or module name endings, comma-separated")
    g.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"], help="of the frozen base; LoRA, log-probs and losses are float32 always")
    g.add_argument("--t5", action=yes_no, default=True, help="load SD3.5's T5 text encoder (9.5 GB in bf16)")

    g = parser.add_argument_group("performance")
    g.add_argument("--micro-batch-size", type=int, default=8, help="samples per forward pass, in rollout and update; changes memory and speed only")
    g.add_argument("--decode-batch-size", type=int, default=8, help="latents per VAE decode")
    g.add_argument("--gradient-checkpointing", action=yes_no, default=False, help="recompute activations: less memory, about a third slower")
    g.add_argument("--offload-text-encoders", action=yes_no, default=False, help="keep the text encoders on the CPU except while encoding")
    g.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N")

    g = parser.add_argument_group("run")
    g.add_argument("--preset", default="", help="a paper's experiment: see the top of the script; explicit flags win")
    g.add_argument("--seed", type=int, default=0, help="of everything that is random")
    g.add_argument("--runs", default="runs", help="folder in which the run folder is made")
    g.add_argument("--name", default="", help="name of the run folder; default METHOD_REWARD_sSEED_TIME")
    g.add_argument("--resume", default="", metavar="RUN", help="continue this run folder from its last checkpoint, with its own flags")
    g.add_argument("--eval-images", type=int, default=64, help="held-out images (same noise every time) of the evaluation before, after and every --eval-every epochs; 0 = none")
    g.add_argument("--eval-steps", type=int, help="sampler steps of evaluation and sample grids (Flow-GRPO: 40 for SD3.5); default --steps")
    g.add_argument("--eval-kernel", default="ode", choices=["ode", "same"], help="ode = deterministic sampler, what users run (Flow-GRPO); same = the rollout's kernel")
    g.add_argument("--eval-every", type=int, default=0, help="epochs between evaluations; 0 = before and after only")
    g.add_argument("--sample-every", type=int, default=10, help="epochs between sample grids; 0 = none")
    g.add_argument("--save-every", type=int, default=10, help="epochs between checkpoints (the last epoch is always saved)")
    g.add_argument("--wandb", metavar="PROJECT", help="log to this Weights & Biases project too (needs the wandb package and an account)")
    g.add_argument("--dry-run", action="store_true", help="print the derived sizes and exit")


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
    title = doc.strip().split("\n")[0]
    return _Parser(f"{method}.py", "%(prog)s [flags]", title, formatter_class=lambda prog: _Help(prog, width=110))


def parse(parser, presets: dict[str, dict], argv, rewards, check, sizes) -> argparse.Namespace:
    """Defaults < --preset < explicit flags; a resumed run takes its own flags.  Ends the program on bad input.

    `check(args)` raises UsageError for what only this method knows, `sizes(args)` are its lines of --dry-run, and
    `rewards` is the module of that name, whose checks come after the cheap ones.
    """
    defaults = vars(parser.parse_args([]))
    unset = object()
    given = vars(parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(defaults, unset))))
    explicit = {k: v for k, v in given.items() if v is not unset}
    preset_name = explicit.get("preset", defaults["preset"])
    if preset_name and preset_name not in presets:
        parser.error(f"--preset {preset_name} is unknown; this script has {', '.join(presets)}")
    preset = presets.get(preset_name, {})
    if unknown := set(preset) - set(defaults):
        raise AssertionError(f"preset {preset_name} names flags that do not exist: {unknown}")
    args = argparse.Namespace(**(defaults | preset | explicit))
    args.argv = list(sys.argv[1:] if argv is None else argv)
    args.changed = {k: [preset[k], v] for k, v in explicit.items() if k in preset and preset[k] != v}
    if args.resume:
        args = _resumed(parser, args, explicit)
    try:
        check_args(args)
        check(args)
        if args.dry_run:
            print_sizes(args, sizes(args))
            raise SystemExit(0)
        rewards.check_args(args)
        check_model(args)
    except (UsageError, rewards.UsageError) as problem:
        parser.error(str(problem))
    return args


def _resumed(parser, args, explicit):
    folder = Path(args.resume)
    try:
        saved = json.loads((folder / "args.json").read_text())
        method, own = saved["method"], saved["args"]
    except (OSError, ValueError, KeyError, TypeError):
        parser.error(f"--resume {folder} is not a run folder (no readable args.json); give the folder that holds checkpoints/")
    if method != parser.prog.removesuffix(".py"):
        parser.error(f"--resume {folder} is a run of {method}.py, not of {parser.prog}; resume it with that script")
    if not (folder / "checkpoints" / "last" / "state.pt").exists():
        parser.error(f"--resume {folder} has no complete checkpoint yet; start it again without --resume")
    for key, value in explicit.items():
        if key not in RESUMABLE and own.get(key) != value:
            flag = "--" + key.replace("_", "-")
            parser.error(f"{flag} {value} differs from the resumed run's {own.get(key)}; leave {flag} out, or start a new run")
    fresh = {k: v for k, v in explicit.items() if k in RESUMABLE and k != "preset"}
    return argparse.Namespace(**(vars(args) | own | fresh | {"resume": str(folder), "changed": {}}))


def check_args(args) -> None:
    """Everything that can be wrong before a model is loaded.  Fills in the defaults that depend on the model."""
    for name in ("num_prompts", "group_size", "epochs", "updates_per_epoch", "inner_epochs", "micro_batch_size", "lora_rank", "decode_batch_size", "reward_batch_size", "max_sequence_length", "ema_every"):  # fmt: skip
        if getattr(args, name) < 1:
            raise UsageError(f"--{name.replace('_', '-')} {getattr(args, name)} is too small; use 1 or more")
    check_not_negative(args, "eval_images", "sample_every", "save_every", "eval_every", "max_bad_steps")
    for name in ("resolution", "eval_steps"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise UsageError(f"--{name.replace('_', '-')} {getattr(args, name)} is too small; use 1 or more")
    for name in ("adam_beta1", "adam_beta2", "ema_decay"):
        if not 0 <= getattr(args, name) < 1:
            raise UsageError(f"--{name.replace('_', '-')} {getattr(args, name)} must lie in [0, 1)")
    if args.eval_images == 1:
        raise UsageError("--eval-images 1 gives no standard error; use 2 or more, or 0 for none")
    if args.device.startswith("cuda:") and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UsageError(f"--device {args.device} would put all processes on one GPU; leave it out")
    if args.device not in ("auto", "cpu", "cuda") and not args.device.startswith("cuda:"):
        raise UsageError(f"--device {args.device} is unknown; use auto, cpu, cuda or cuda:N")
    if args.steps < 2:
        raise UsageError(f"--steps {args.steps} is too few; a sampler needs at least 2 (papers: 50 for SD1.5, 10 for SD3.5)")
    check_above_zero(args, "lr", "lora_alpha", "max_grad_norm")
    for name in ("lr", "cfg", "weight_decay", "lora_alpha"):
        if not math.isfinite(getattr(args, name)):
            raise UsageError(f"--{name.replace('_', '-')} {getattr(args, name)} is not a number one can use; give a finite one")
    world = max(1, int(os.environ.get("WORLD_SIZE", 1)))
    if args.num_prompts % world:
        fits = [w for w in range(1, args.num_prompts + 1) if args.num_prompts % w == 0 and w <= world]
        raise UsageError(f"{world} processes do not divide --num-prompts {args.num_prompts}; use {fits[-1]} processes or --num-prompts {world * (args.num_prompts // world + 1)}")
    args.model_path, args.kind = find_model(args.model)
    known = MODELS.get(args.model)
    args.resolution = args.resolution or (known[4] if known else None)
    if args.kernel == "auto":
        args.kernel = "ddim" if args.kind == "eps" else "flow_sde"
    if args.kernel not in KERNELS[args.kind]:
        raise UsageError(f"--kernel {args.kernel} does not fit --model {args.model}; use one of {', '.join(KERNELS[args.kind])}")
    if args.noise_level is None:
        args.noise_level = NOISE_LEVEL[args.kernel]
    if args.kernel != "ode" and not args.noise_level > 0:
        raise UsageError(f"--noise-level {args.noise_level} leaves no noise to learn from; use a value above 0")
    if args.kernel == "ode":
        raise UsageError("--kernel ode is deterministic and has no log-probability; use a stochastic kernel for training")
    if args.kernel == "ancestral" and args.noise_level != 1:
        raise UsageError(f"--kernel ancestral has no noise level, --noise-level {args.noise_level} would do nothing; leave it out")
    if args.kind == "eps" and max(args.steps, args.eval_steps or 0) > 500:
        raise UsageError(f"--steps {max(args.steps, args.eval_steps or 0)} is too many for the 1000 training steps of {args.model}; use at most 500")
    if args.kernel in ("ddim", "cps") and args.noise_level > 1:
        raise UsageError(f"--noise-level {args.noise_level} is above 1, where {args.kernel} has no real step; use at most 1")
    if args.train_fraction is None:
        args.train_fraction = 1.0 if args.kind == "eps" else 0.99
        if args.kernel == "cps" and args.steps > 2:  # its noise is proportional to s: next to nothing in the last two
            args.train_fraction = (args.steps - 2) / args.steps
    args.train_steps = int(args.steps * args.train_fraction + 1e-9) if math.isfinite(args.train_fraction) else 0
    if not 1 <= args.train_steps <= args.steps:
        raise UsageError(f"--train-fraction {args.train_fraction} of {args.steps} steps is {args.train_steps}; it must leave 1 to {args.steps}")
    args.eval_steps = args.eval_steps or args.steps
    args.prompt_list = load_prompts(args.prompts)
    args.eval_prompt_list = load_prompts(args.eval_prompts) if args.eval_prompts else args.prompt_list
    if len(args.prompt_list) < args.num_prompts:
        print(f"note: --prompts has {len(args.prompt_list)} prompts, fewer than --num-prompts {args.num_prompts}; they repeat within an epoch")
    runs = Path(args.runs)
    parent = next(p for p in [runs.absolute(), *runs.absolute().parents] if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise UsageError(f"--runs {runs} cannot be written ({parent} is not a writable folder); choose another folder")


def check_above_zero(args, *names: str) -> None:
    for name in names:
        if not getattr(args, name) > 0:
            raise UsageError(f"--{name.replace('_', '-')} {getattr(args, name)} must be above 0")


def check_not_negative(args, *names: str) -> None:
    for name in names:
        if not getattr(args, name) >= 0:
            raise UsageError(f"--{name.replace('_', '-')} {getattr(args, name)} is negative; use 0 or more")


def warn_of_clip_range(args) -> None:
    """The papers' clip ranges are for mean log-probs; says so where they would be used on sums."""
    if args.logprob_reduce == "sum" and args.clip_range < 1e-2:
        d = latent_size(args)
        print(f"warning: --clip-range {args.clip_range} is meant for mean log-probs; with --logprob-reduce sum the same range is "
              + (f"{args.clip_range * d:g} (times the latent's {d} scalars)" if d else "that times the latent's size d"))  # fmt: skip


def check_updates(args, rows: int, what: str = "transitions") -> None:
    if rows % args.updates_per_epoch:
        fits = [u for u in range(1, 2 * args.updates_per_epoch + 1) if rows % u == 0]
        raise UsageError(f"--updates-per-epoch {args.updates_per_epoch} does not divide the {rows} {what} of an epoch; use {fits[-1]}")


def find_model(name: str) -> tuple[str, str]:
    """Model name -> (folder or hub id, kind 'eps' | 'flow').  Reads at most one small file."""
    if name in MODELS:
        return MODELS[name][0], MODELS[name][1]
    index = Path(name) / "model_index.json"
    if not index.exists():
        if Path(name).is_dir():
            raise UsageError(f"--model {name} is a folder without model_index.json; give a folder in diffusers format")
        if name.count("/") != 1 or name.startswith((".", "/")):
            near = ", ".join(MODELS)
            raise UsageError(f"--model {name} is neither a known name ({near}) nor a folder nor a hub id such as owner/name")
        from huggingface_hub import hf_hub_download, try_to_load_from_cache

        require_hub(name, f"--model {name}")
        cached = try_to_load_from_cache(name, "model_index.json")
        if not isinstance(cached, str):
            cached = hf_hub_download(name, "model_index.json")
        index = Path(cached)
    try:
        pipeline = json.loads(index.read_text())["_class_name"]
    except (ValueError, KeyError, TypeError):
        raise UsageError(f"--model {name}: {index} does not name a pipeline; give a folder in diffusers format") from None
    if pipeline not in PIPELINES:
        raise UsageError(f"--model {name} is a {pipeline}; supported are {', '.join(PIPELINES)}")
    return name, PIPELINES[pipeline]


def require_hub(repo: str, what: str, file: str = "model_index.json") -> None:
    """Nothing if `file` of `repo` is in the local cache; else one short probe: UsageError if the hub cannot give it."""
    from huggingface_hub import try_to_load_from_cache

    try:
        if isinstance(try_to_load_from_cache(repo, file), str):
            return
    except ValueError as problem:
        raise UsageError(f"{what} is no valid hub id: {problem}") from None
    advice = "; put the files in a folder and pass its path, or use the embedded model: --preset tiny (no download)"
    if os.environ.get("HF_HUB_OFFLINE", "0") not in ("0", ""):
        raise UsageError(f"{what} ({repo}) is not in the local cache and HF_HUB_OFFLINE is set" + advice)
    end = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    request = urllib.request.Request(f"{end}/api/models/{repo}")
    if token := os.environ.get("HF_TOKEN"):
        request.add_header("Authorization", f"Bearer {token}")
    try:
        urllib.request.urlopen(request, timeout=4).close()
    except urllib.error.HTTPError as problem:
        raise UsageError(f"{what}: the hub answered {problem.code} for {repo}; check the name, or log in if it is gated" + advice) from None
    except OSError:
        raise UsageError(f"{what} ({repo}) is not in the local cache and the hub cannot be reached" + advice) from None


def check_model(args) -> None:
    """The model's weights can be had, and the LoRA targets exist in it.  UsageError before any weight is read."""
    local = (Path(args.model_path) / "model_index.json").exists()
    if not local and args.model.startswith("tiny-"):
        raise UsageError(f"--model {args.model}: {args.model_path} is missing; make it with python -m tiny.pretrain --all, or pass the folder's path")
    if not local:
        require_hub(args.model_path, f"--model {args.model}")
    if args.lora_targets in ("attention", "attention+mlp") or not local:
        return  # for weights that are still on the hub, add_lora finds a wrong target
    from diffusers import SD3Transformer2DModel, UNet2DConditionModel

    cls, folder = (UNet2DConditionModel, "unet") if args.kind == "eps" else (SD3Transformer2DModel, "transformer")
    with torch.device("meta"):
        net = cls.from_config(cls.load_config(args.model_path, subfolder=folder))
    check_lora_targets(net, args)


def check_lora_targets(net, args) -> list[str]:
    targets = lora_targets(args)
    linear = [n for n, m in net.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    for target in targets:
        if not any(n == target or n.endswith("." + target) for n in linear):
            endings = sorted({n.rsplit(".", 1)[-1] for n in linear if not n.rsplit(".", 1)[-1].isdigit()})
            raise UsageError(f"--lora-targets {target} matches no layer of {args.model}; layer names end in {', '.join(endings[:12])} ...")
    return targets


def latent_size(args) -> int | None:
    """d, the number of scalars in one latent; None for a model that is not in MODELS."""
    if args.model not in MODELS:
        return None
    _, _, channels, pixels, _, _ = MODELS[args.model]
    return channels * (args.resolution // pixels) ** 2


def lora_targets(args) -> list[str]:
    named = {"attention": ATTENTION[args.kind], "attention+mlp": ATTENTION[args.kind] + MLP[args.kind]}
    return named.get(args.lora_targets) or [t.strip() for t in args.lora_targets.split(",") if t.strip()]


def run_main(main, parse_args, usage_error: type[Exception]) -> None:
    """Entry point of every script: one sentence and exit code 2 for bad input, 130 after Ctrl-C or SIGTERM."""
    args = parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        main(args)
    except (UsageError, usage_error) as problem:
        if made := getattr(args, "made_dir", None):  # nothing ran yet: the corrected command may use the name
            shutil.rmtree(made, ignore_errors=True)
        print(f"{Path(sys.argv[0]).name}: error: {problem}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        where = getattr(args, "run_dir", None)
        saved = where and (Path(where) / "checkpoints" / "last").exists()
        print("\nstopped" + (f"; continue with --resume {where}" if saved else ""), file=sys.stderr)
        sys.exit(130)
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def rollout_memory(args, latents: int, what: str) -> str:
    """The line of --dry-run for so many latents; "unknown" where their size is not."""
    d = latent_size(args)
    return f"{latents * d * 4 / 2**30:.2f} GB over all processes ({what}; float32)" if d else "unknown"


def print_sizes(args, rows: dict[str, str]) -> None:
    """--dry-run: the sizes that follow from the flags, and the memory they need apart from activations."""
    print(f"{'model':42s} {args.model} ({args.model_path}), kernel {args.kernel}, noise level {args.noise_level}")
    print(f"{'prompts':42s} {len(args.prompt_list)} for training, {len(args.eval_prompt_list)} for evaluation")
    print(f"{'steps':42s} {args.steps}, of which {args.train_steps} are trained; evaluation {args.eval_steps}")
    for key, value in rows.items():
        print(f"{key:42s} {value}")
    if latent_size(args):
        millions = MODELS[args.model][5]
        if "memory for the rollout" not in rows:
            latents = args.num_prompts * args.group_size * (4 * args.steps + 1)
            print(f"{'memory for the rollout':42s} {rollout_memory(args, latents, 'states, noise, two outputs')}")
        print(f"{'memory for the denoiser':42s} {millions * 2e6 / 2**30:.2f} GB in half precision, {millions * 4e6 / 2**30:.2f} GB in float32, activations not counted")


# ---- setup ----------------------------------------------------------------------------------------------------------
@dataclass
class Run:
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


def setup(args, method: str) -> Run:
    """Process group (where started by torchrun), device, dtype, run folder with everything needed to repeat the run."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local = int(os.environ.get("LOCAL_RANK", 0))
    name = args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(f"cuda:{local}" if name == "cuda" else name)
    if world > 1 and not torch.distributed.is_initialized():
        torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    dtype, reason = pick_dtype(args.dtype, device)
    reward = "".join(c if c.isalnum() else "-" for c in args.reward)
    folder = Path(args.runs) / (args.name or f"{method}_{reward}_s{args.seed}_{time.strftime('%Y%m%d-%H%M%S')}")
    news = [str(folder), (folder / "args.json").exists()]
    if world > 1:
        torch.distributed.broadcast_object_list(news)  # one name and one verdict for all processes
    if news[1] and not args.resume:
        raise UsageError(f"{news[0]} holds a run already; continue it with --resume {news[0]}, or choose another --name")
    folder = Path(args.resume or news[0])
    args.run_dir = str(folder)
    run = Run(folder, device, dtype, rank, world, method=method)
    if run.is_main and not args.resume:
        args.made_dir = None if folder.exists() else str(folder)
        (folder / "samples").mkdir(parents=True, exist_ok=True)
        (folder / "checkpoints").mkdir(exist_ok=True)
        skip = {"prompt_list", "eval_prompt_list", "argv", "changed", "run_dir", "made_dir", "resume", "dry_run", "paths", "eval_paths"}
        plain = {k: v for k, v in vars(args).items() if k not in skip}
        write_json(folder / "args.json", {"method": method, "args": plain})
        (folder / "command.txt").write_text(shlex.join([Path(sys.executable).name, *sys.argv]) + "\n")
        write_json(folder / "versions.json", versions())
        for script in (f"{method}.py", "common.py", "rewards.py"):
            if (HERE / script).exists():
                shutil.copy(HERE / script, folder / script)
    if run.is_main:
        print(f"run folder {folder}  device {device}  dtype {dtype} ({reason})  processes {world}")
        for key, (was, now) in args.changed.items():
            print(f"  --{key.replace('_', '-')} {now}  (preset {args.preset}: {was})")
    return run


def pick_dtype(name: str, device: torch.device) -> tuple[torch.dtype, str]:
    if name != "auto":
        return getattr(torch, name), "as asked"
    if device.type != "cuda":
        return torch.float32, "half precision is slow on a CPU"
    if torch.cuda.is_bf16_supported():
        return torch.bfloat16, "the GPU has it, and it needs no loss scaling"
    return torch.float16, "the GPU has no bfloat16"


def versions() -> dict[str, str]:
    import importlib.metadata as meta

    found = {"python": platform.python_version(), "platform": platform.platform()}
    for package in ("torch", "diffusers", "transformers", "peft", "accelerate", "safetensors"):
        found[package] = meta.version(package)
    git = ["git", "-C", str(HERE), "describe", "--always", "--dirty"]
    try:
        found["git"] = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        found["git"] = "not a git checkout"
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


def write_json(path: Path, value) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value, indent=1) + "\n")
    temporary.replace(path)


# ---- dist -----------------------------------------------------------------------------------------------------------
def all_reduce_grads(params: list[nn.Parameter], run: Run) -> None:
    """Sum of the gradients over the processes, one flattened all-reduce (losses carry 1/global count already)."""
    if run.world == 1:
        return
    flat = torch.cat([(p.grad if p.grad is not None else torch.zeros_like(p)).flatten() for p in params])
    torch.distributed.all_reduce(flat)
    for p, g in zip(params, flat.split([p.numel() for p in params])):
        p.grad = g.view_as(p).clone()


def gather(x: torch.Tensor, run: Run) -> torch.Tensor:
    """Rows of all processes, in rank order (= sample order: each process holds a contiguous block of prompts)."""
    if run.world == 1:
        return x
    parts = [torch.empty_like(x) for _ in range(run.world)]
    torch.distributed.all_gather(parts, x.contiguous())
    return torch.cat(parts)


def all_reduce(values: dict[str, float], run: Run, how: str = "SUM") -> dict[str, float]:
    """Each value's sum (or how="MAX") over the processes."""
    if run.world == 1:
        return values
    flat = torch.tensor(list(values.values()), dtype=torch.float64, device=run.device)
    torch.distributed.all_reduce(flat, getattr(torch.distributed.ReduceOp, how))
    return dict(zip(values, flat.tolist()))


def broadcast(params: list[torch.Tensor], run: Run) -> None:
    """Rank 0's weights for all: the processes stay equal because they start equal and apply equal gradients."""
    for p in params if run.world > 1 else ():
        torch.distributed.broadcast(p.data, 0)


# ---- model ----------------------------------------------------------------------------------------------------------
@dataclass
class Cond:
    """Text conditions of B samples: the unique prompts' embeddings, and which of them each sample has."""

    embeds: torch.Tensor  # (U, L, D)
    pooled: torch.Tensor | None  # (U, D') for SD3.5
    index: torch.Tensor  # (B,) into the U unique prompts

    def __getitem__(self, rows) -> "Cond":
        return Cond(self.embeds, self.pooled, self.index[rows])

    def __add__(self, other: "Cond") -> "Cond":
        """The rows of both, one after the other."""
        pooled = None if self.pooled is None else torch.cat([self.pooled, other.pooled])
        return Cond(torch.cat([self.embeds, other.embeds]), pooled, torch.cat([self.index, other.index + len(self.embeds)]))

    def mean_embedding(self) -> torch.Tensor:
        """(B, D) mean over the tokens, float32."""
        return self.embeds.float().mean(1)[self.index]


class Policy:
    """A diffusers pipeline whose UNet or transformer carries a LoRA: the one interface to both backbones."""

    def __init__(self, args, run: Run):
        import diffusers

        diffusers.utils.logging.set_verbosity_error()
        diffusers.utils.logging.disable_progress_bar()
        import transformers

        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        self.kind, self.device, self.dtype = args.kind, run.device, run.dtype
        self.max_sequence_length, self.offload = args.max_sequence_length, args.offload_text_encoders
        dtypes = {"default": self.dtype, "vae": torch.float32}
        if self.kind == "eps":
            off = dict(safety_checker=None, feature_extractor=None, requires_safety_checker=False)
            self.pipe = diffusers.StableDiffusionPipeline.from_pretrained(args.model_path, dtype=dtypes, **off)
            self.net = self.pipe.unet
            # rollouts use DDIM with the model's own noise schedule, whatever its default sampler is (as DDPO does)
            self.pipe.scheduler = diffusers.DDIMScheduler.from_config(self.pipe.scheduler.config)
            if self.pipe.scheduler.config.prediction_type != "epsilon":
                raise UsageError(f"--model {args.model} predicts {self.pipe.scheduler.config.prediction_type}; only epsilon is supported")
            self.encoders = [self.pipe.text_encoder]
        else:
            off = {} if args.t5 else dict(text_encoder_3=None, tokenizer_3=None)
            self.pipe = diffusers.StableDiffusion3Pipeline.from_pretrained(args.model_path, dtype=dtypes, **off)
            self.net = self.pipe.transformer
            encoders = (self.pipe.text_encoder, self.pipe.text_encoder_2, self.pipe.text_encoder_3)
            self.encoders = [e for e in encoders if e is not None]
        self.vae = self.pipe.vae.to(self.device, torch.float32).eval().requires_grad_(False)
        self.net.to(self.device).eval().requires_grad_(False)
        for encoder in self.encoders:
            encoder.to("cpu" if self.offload else self.device).eval().requires_grad_(False)
        if args.gradient_checkpointing:
            self.net.enable_gradient_checkpointing()
        pixels = self.pipe.vae_scale_factor
        self.resolution = args.resolution or self.net.config.sample_size * pixels
        if self.resolution % (2 * pixels):
            raise UsageError(f"--resolution {self.resolution} must be a multiple of {2 * pixels} for --model {args.model}")
        self.latent_shape = (self.net.config.in_channels, self.resolution // pixels, self.resolution // pixels)
        self.decode_batch_size, self.detach_uncond = args.decode_batch_size, args.detach_uncond
        self.uncond = self.encode([""])
        self.network_calls = self.decode_calls = 0

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> Cond:
        """Prompts (B) -> Cond; every distinct text is encoded once."""
        unique = list(dict.fromkeys(prompts))
        if self.offload:
            for encoder in self.encoders:
                encoder.to(self.device)
        embeds, pooled = [], []
        for start in range(0, len(unique), 16):
            texts = unique[start : start + 16]
            if self.kind == "eps":
                embeds.append(self.pipe.encode_prompt(texts, self.device, 1, False)[0])
            else:
                e, _, p, _ = self.pipe.encode_prompt(
                    texts, None, None, device=self.device, do_classifier_free_guidance=False,
                    max_sequence_length=self.max_sequence_length,
                )  # fmt: skip
                embeds.append(e), pooled.append(p)
        if self.offload:
            for encoder in self.encoders:
                encoder.to("cpu")
        place = {text: i for i, text in enumerate(unique)}
        index = torch.tensor([place[p] for p in prompts], device=self.device)
        return Cond(torch.cat(embeds).to(self.dtype), torch.cat(pooled).to(self.dtype) if pooled else None, index)

    def predict(self, x_t: torch.Tensor, timestep: torch.Tensor, cond: Cond, cfg: float) -> torch.Tensor:
        """Guided network output o_u + cfg (o_c - o_u), float32 (B, C, h, w), in one batched call; timestep (B,)."""
        self.network_calls += 1
        embeds, pooled = cond.embeds[cond.index], None if cond.pooled is None else cond.pooled[cond.index]
        x, t = x_t.to(self.dtype), timestep
        if cfg != 1:
            x, t = torch.cat([x, x]), torch.cat([t, t])
            embeds = torch.cat([self.uncond.embeds.expand(len(embeds), -1, -1), embeds])
            if pooled is not None:
                pooled = torch.cat([self.uncond.pooled.expand(len(pooled), -1), pooled])
        if self.kind == "eps":
            o = self.net(x, t, embeds, return_dict=False)[0].float()
        else:
            o = self.net(x, embeds, pooled, t, return_dict=False)[0].float()
        if cfg == 1:
            return o
        o_uncond, o_cond = o.chunk(2)
        if self.detach_uncond:
            o_uncond = o_uncond.detach()
        return o_uncond + cfg * (o_cond - o_uncond)

    @contextmanager
    def reference(self):
        """Adapters off: the frozen pretrained model."""
        self.net.disable_adapters()
        try:
            yield
        finally:
            self.net.enable_adapters()

    @contextmanager
    def whole_gradient(self):
        """Gradients with respect to x_t need both branches of the guidance: --detach-uncond is for theta's only."""
        kept, self.detach_uncond = self.detach_uncond, False
        try:
            yield
        finally:
            self.detach_uncond = kept

    def decode(self, x0: torch.Tensor) -> torch.Tensor:
        """Latents (B, C, h, w) -> images (B, 3, H, W) in [0, 1], float32; differentiable where gradients are on."""
        self.decode_calls += 1
        z = x0 / self.vae.config.scaling_factor
        if self.kind == "flow":
            z = z + self.vae.config.shift_factor
        images = [self.vae.decode(c, return_dict=False)[0] for c in z.split(self.decode_batch_size)]
        return (torch.cat(images) / 2 + 0.5).clamp(0, 1)


def second_order(needed: bool) -> None:
    """Switches the fast CUDA attention kernels off where a gradient is differentiated again: they cannot be."""
    torch.backends.cuda.enable_flash_sdp(not needed)
    torch.backends.cuda.enable_mem_efficient_sdp(not needed)
    torch.backends.cuda.enable_cudnn_sdp(not needed)


def add_lora(policy: Policy, args) -> list[nn.Parameter]:
    """Adds the trainable adapter (float32, B = 0, so that the policy starts as the reference) and returns its weights."""
    from peft import LoraConfig

    targets = check_lora_targets(policy.net, args)
    torch.manual_seed(args.seed)
    config = LoraConfig(r=args.lora_rank, lora_alpha=args.lora_alpha, init_lora_weights="gaussian", target_modules=targets)
    policy.net.add_adapter(config)
    params = [p for p in policy.net.parameters() if p.requires_grad]
    for p in params:
        p.data = p.data.float()
    return params


def sinusoid(t: torch.Tensor, width: int = 256) -> torch.Tensor:
    frequency = torch.exp(-math.log(1e4) * torch.arange(width // 2, device=t.device) / (width // 2))
    angle = 1000 * t.float()[:, None] * frequency
    return torch.cat([angle.cos(), angle.sin()], 1)


class FieldNet(nn.Module):
    """A small convolutional field (x, t) -> (B, C, h, w), 0 at the start: residual gradient and value networks."""

    def __init__(self, channels: int, width: int = 64):
        super().__init__()
        self.time = nn.Linear(256, width)
        self.first, self.middle = nn.Conv2d(channels, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)
        self.last = nn.Conv2d(width, channels, 3, padding=1)
        nn.init.zeros_(self.last.weight), nn.init.zeros_(self.last.bias)

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        h = nn.functional.silu(self.first(x) + self.time(sinusoid(t))[..., None, None])
        return self.last(nn.functional.silu(self.middle(h)))


# ---- prompts --------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Prompt:
    id: int  # line number in the list, from 0: groups go by this, never by the text
    text: str
    metadata: dict = field(default_factory=dict, hash=False)


def load_prompts(paths: str) -> list[Prompt]:
    """Comma-separated .txt (a prompt a line) or .jsonl ({"prompt": ...} a line) files -> prompts; UsageError if none."""
    rows: list[tuple[str, dict]] = []
    for name in paths.split(","):
        path = Path(name) if Path(name).exists() else HERE / name
        if not path.is_file():
            raise UsageError(f"--prompts {name or '(empty)'} does not exist; give a .txt file with one prompt a line or a .jsonl file (see prompts/README.md)")
        try:
            lines = path.read_text(encoding="utf-8-sig").split("\n")  # splitlines() would cut at other separators too
        except UnicodeDecodeError:
            raise UsageError(f"--prompts {name} is not UTF-8 text; save it as UTF-8") from None
        for number, line in enumerate(lines, 1):
            text, metadata = line.strip(), {}
            if text and path.suffix == ".jsonl":
                try:
                    metadata = json.loads(line)
                    text = metadata["prompt"].strip()
                except (ValueError, KeyError, TypeError, AttributeError):
                    raise UsageError(f"--prompts {name}, line {number}: not a JSON object with a 'prompt' text") from None
            if text:
                rows.append((text, metadata))
    if not rows:
        raise UsageError(f"--prompts {paths} is empty; it needs at least one prompt")
    return [Prompt(i, text, metadata) for i, (text, metadata) in enumerate(rows)]


def prompt_batch(prompts: list[Prompt], epoch: int, seed: int, n: int) -> list[Prompt]:
    """The n prompts of this epoch: an endless stream of shuffled passes over the list, a function of epoch alone."""
    order: dict[int, list[int]] = {}
    chosen = []
    for position in range(epoch * n, (epoch + 1) * n):
        lap, place = divmod(position, len(prompts))
        if lap not in order:
            order[lap] = torch.randperm(len(prompts), generator=generator("prompts", seed, lap)).tolist()
        chosen.append(prompts[order[lap][place]])
    return chosen


def generator(*key) -> torch.Generator:
    """A CPU random generator that depends on `key` alone (its seed keeps 32 bits of the key's hash)."""
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def sample_noise(seed: int, epoch: int | str, indices, steps: int, shape, device) -> torch.Tensor:
    """(len(indices), steps + 1, *shape) standard normals: the start and one draw per step, by (seed, epoch, index)."""
    rows = [torch.randn((steps + 1, *shape), generator=generator("noise", seed, epoch, i)) for i in indices]
    return torch.stack(rows).to(device)


# ---- sampler --------------------------------------------------------------------------------------------------------
@dataclass
class Grid:
    """One sampler: per step i the network's timestep and mu = x_coef x_t + o_coef o, sigma; x0_hat = x0_x x_t + x0_o o.

    All (T,) float64 on the CPU.  t and dt are the flow time and its step (for SD1.5: alphas_bar index / 1000 and the
    step's length); g2 = sigma^2 / dt is the squared diffusion coefficient of the flow SDEs, None for SD1.5.
    """

    kind: str
    kernel: str
    timestep: torch.Tensor
    t: torch.Tensor
    dt: torch.Tensor
    alpha: torch.Tensor
    nu: torch.Tensor
    alpha_s: torch.Tensor
    nu_s: torch.Tensor
    x_coef: torch.Tensor
    o_coef: torch.Tensor  # = b_t k_t: the mean's change per unit of network output (negative)
    sigma: torch.Tensor
    x0_x: torch.Tensor
    x0_o: torch.Tensor

    @property
    def steps(self) -> int:
        return len(self.t)

    @property
    def w(self) -> torch.Tensor:
        """Signed sensitivity o_coef / sigma (T,): delta = w (o_a - o_b) is the mean's shift in standard deviations."""
        return self.o_coef / self.sigma

    def at(self, table: torch.Tensor, i, like: torch.Tensor) -> torch.Tensor:
        """table[i] as float32 shaped to broadcast against `like`; i an int or a (B,) tensor of step indices."""
        value = table[i].to(like.device, torch.float32)
        return value if value.ndim == 0 else value.view(-1, *[1] * (like.ndim - 1))

    def time(self, i, batch: int, device) -> torch.Tensor:
        """The network's timestep (B,) of step i."""
        value = self.timestep[i].to(device, torch.float32)
        return value.expand(batch) if value.ndim == 0 else value

    def mu(self, x_t, o, i):
        return self.at(self.x_coef, i, x_t) * x_t + self.at(self.o_coef, i, x_t) * o

    def x0_hat(self, x_t, o, i):
        """Tweedie's estimate of E[x_0 | x_t]."""
        return self.at(self.x0_x, i, x_t) * x_t + self.at(self.x0_o, i, x_t) * o


def make_grid(scheduler, kind: str, steps: int, kernel: str, level: float) -> Grid:
    """Grid of `steps` steps of the pipeline's own scheduler with one of the KERNELS at noise level `level`."""
    scheduler.set_timesteps(steps)
    if kind == "eps":
        timestep = scheduler.timesteps.double().cpu()
        abar = scheduler.alphas_cumprod.double()
        index = scheduler.timesteps.long().cpu()
        before = index - scheduler.config.num_train_timesteps // steps
        abar_t = abar[index]
        abar_s = torch.where(before >= 0, abar[before.clamp(min=0)], scheduler.final_alpha_cumprod.double())
        alpha, nu, alpha_s, nu_s = abar_t.sqrt(), (1 - abar_t).sqrt(), abar_s.sqrt(), (1 - abar_s).sqrt()
        t, dt = timestep / 1000, torch.full_like(timestep, 1 / steps)
        x0_x, x0_o = 1 / alpha, -nu / alpha
        eta = {"ddim": level, "ancestral": 1.0, "ode": 0.0}[kernel]
        sigma = eta * ((1 - abar_s) / (1 - abar_t) * (1 - abar_t / abar_s)).clamp(min=0).sqrt()
        x_coef = alpha_s / alpha  # mu = alpha_s x0_hat + sqrt(nu_s^2 - sigma^2) eps
        o_coef = -alpha_s * nu / alpha + (nu_s**2 - sigma**2).clamp(min=0).sqrt()
    else:
        sigmas = scheduler.sigmas.double().cpu()
        timestep = scheduler.timesteps.double().cpu()
        t, s = sigmas[:-1], sigmas[1:]
        dt, alpha, nu, alpha_s, nu_s = t - s, 1 - t, t, 1 - s, s
        x0_x, x0_o = torch.ones_like(t), -t
        if kernel in ("flow_sde", "dance", "ode"):  # Euler-Maruyama of dx = [v - g^2/2 score] dt + g dw
            # Flow-GRPO's g is infinite at t = 1: there 1 - t becomes 1 - (the second grid value), inside g only
            room = torch.where(t < 1, 1 - t, 1 - sigmas[1])
            g2 = {"flow_sde": level**2 * t / room, "dance": torch.full_like(t, level**2), "ode": 0 * t}[kernel]
            x_coef = 1 - dt * g2 / (2 * t)
            o_coef = -dt * (1 + (1 - t) * g2 / (2 * t))
            sigma = (g2 * dt).sqrt()
        elif kernel == "ancestral":  # q(x_s | x_t, x_0 = x0_hat)
            q = t**2 - ((1 - t) / (1 - s)) ** 2 * s**2
            x_coef = (1 - s) + (1 - t) * s**2 / (t * (1 - s))
            o_coef = -(1 - s) / t * q
            sigma = s / t * q.clamp(min=0).sqrt()
        else:  # coefficients-preserving sampling
            sigma = s * math.sin(level * math.pi / 2)
            rest = (s**2 - sigma**2).clamp(min=0).sqrt()
            x_coef = (1 - s) + rest
            o_coef = -(1 - s) * t + rest * (1 - t)
    return Grid(kind, kernel, timestep, t, dt, alpha, nu, alpha_s, nu_s, x_coef, o_coef, sigma, x0_x, x0_o)


def policy_steps(grid: Grid, train_steps: int) -> list[int]:
    """The step indices that are trained: the leading `train_steps`, without those that have no density."""
    steps = [i for i in range(train_steps) if grid.sigma[i] >= MIN_SIGMA]
    if not steps:
        raise UsageError(f"none of the first {train_steps} steps of kernel {grid.kernel} is stochastic; raise --noise-level")
    if len(steps) < train_steps:
        print(f"note: {train_steps - len(steps)} of the {train_steps} steps has no noise (sigma < {MIN_SIGMA}) and is not trained")
    return steps


def reduce_latent(x: torch.Tensor, how: str) -> torch.Tensor:
    """(B, ...) -> (B,): mean or sum over the latent's scalars."""
    return x.flatten(1).mean(1) if how == "mean" else x.flatten(1).sum(1)


def gaussian_logp(x_s: torch.Tensor, mu: torch.Tensor, sigma, reduce: str) -> torch.Tensor:
    """log N(x_s; mu, sigma^2 I) per sample, (B,); sigma a float or broadcastable to x_s; 'mean' divides by d."""
    sigma = torch.as_tensor(sigma, dtype=x_s.dtype, device=x_s.device)
    density = -((x_s - mu) ** 2) / (2 * sigma**2) - sigma.log() - 0.5 * math.log(2 * math.pi)
    return reduce_latent(density, reduce)


def log_ratio(delta: torch.Tensor, z: torch.Tensor, reduce: str) -> torch.Tensor:
    """log N(x_s; mu_a) - log N(x_s; mu_b), (B,), from delta = (mu_a - mu_b) / sigma and z = (x_s - mu_b) / sigma.

    Equal to the difference of two gaussian_logp, without losing the digits that a clip range of 1e-4 needs.
    """
    return reduce_latent(delta * z - 0.5 * delta**2, reduce)


def kl_divergence(delta: torch.Tensor, reduce: str) -> torch.Tensor:
    """KL between two Gaussians of equal covariance whose means differ by delta standard deviations, (B,)."""
    return reduce_latent(0.5 * delta**2, reduce)


# ---- data -----------------------------------------------------------------------------------------------------------
@dataclass
class Batch:
    """This process's share of an epoch: B samples, group-major, so that x.view(P, K) works; indices count over all."""

    prompts: list[Prompt]
    indices: range
    cond: Cond
    noise: torch.Tensor  # (B, T+1, C, h, w): the start and one draw per step

    @property
    def texts(self) -> list[str]:
        return [p.text for p in self.prompts]

    @property
    def metadata(self) -> list[dict]:
        return [p.metadata for p in self.prompts]


def epoch_batch(policy, args, run: Run, epoch: int, draws: int | None = None) -> Batch:
    """Prompts, text conditions and noise of this epoch, the start and `draws` (default --steps): whole groups for each process."""
    chosen = prompt_batch(args.prompt_list, epoch, args.seed, args.num_prompts)
    samples = args.num_prompts * args.group_size // run.world
    first = run.rank * samples
    prompts = [p for p in chosen for _ in range(args.group_size)][first : first + samples]
    indices = range(first, first + samples)
    noise = sample_noise(args.seed, epoch, indices, args.steps if draws is None else draws, policy.latent_shape, run.device)
    if args.shared_noise:
        noise[:, 0] = noise[:: args.group_size, 0].repeat_interleave(args.group_size, 0)
    return Batch(prompts, indices, policy.encode([p.text for p in prompts]), noise)


@dataclass
class Rollout:
    """Trajectories of this process, float32: states x (B, T+1, C, h, w), draws z and behaviour outputs o_old (B, T, ...).

    x_s = mu_old + sigma z was formed from exactly these tensors; o_ref are the reference's outputs at the same x_t.
    """

    x: torch.Tensor
    z: torch.Tensor
    o_old: torch.Tensor
    o_ref: torch.Tensor | None  # 0 at steps without a reference pass
    cond: Cond
    prompts: list[Prompt]  # (B,)


@torch.no_grad()
def rollout(policy, grid, cond, prompts, noise, cfg, micro_batch, reference=(), desc="rollout") -> Rollout:
    """Samples B trajectories from noise (B, T+1, C, h, w); at the steps in `reference` the frozen model is run, too."""
    count, steps = len(noise), grid.steps
    x = torch.empty_like(noise)
    x[:, 0] = noise[:, 0]
    o_old = torch.empty_like(noise[:, 1:])
    o_ref = torch.zeros_like(o_old) if reference else None
    starts = range(0, count, micro_batch)
    bar = tqdm(total=len(starts) * steps, desc=desc, leave=False, disable=not desc or None, mininterval=0.5)
    for start in starts:
        rows = slice(start, min(start + micro_batch, count))
        for i in range(steps):
            x_t = x[rows, i]
            time_i = grid.time(i, len(x_t), x_t.device)
            o = policy.predict(x_t, time_i, cond[rows], cfg)
            if i in reference:
                with policy.reference():
                    o_ref[rows, i] = policy.predict(x_t, time_i, cond[rows], cfg)
            x[rows, i + 1] = grid.mu(x_t, o, i) + grid.at(grid.sigma, i, x_t) * noise[rows, i + 1]
            o_old[rows, i] = o
            bar.update(1)
    bar.close()
    return Rollout(x, noise[:, 1:], o_old, o_ref, cond, prompts)


def backward_scores(policy, grid, i, x_t, x_s, o, cond: Cond, cfg: float) -> tuple[torch.Tensor, torch.Tensor]:
    """grad log p_theta and grad log p_ref (x_s | x_t), both with respect to x_t (B, C, h, w), at steps i (B,).

    o = policy.predict(x_t, ...) with x_t requiring a gradient; the first is differentiable again (second_order()).
    """
    sigma = grid.at(grid.sigma, i, o)
    logp = gaussian_logp(x_s, grid.mu(x_t, o, i), sigma, "sum")
    back = torch.autograd.grad(logp.sum(), x_t, create_graph=True)[0]
    x_ref = x_t.detach().requires_grad_()
    with policy.reference():
        o_ref = policy.predict(x_ref, grid.time(i, len(o), o.device), cond, cfg)
        logp_ref = gaussian_logp(x_s, grid.mu(x_ref, o_ref, i), sigma, "sum")
        back_ref = torch.autograd.grad(logp_ref.sum(), x_ref)[0]  # inside: checkpointing repeats the forward pass here
    return back, back_ref


def shuffled_rows(args, run: Run, steps: list[int], epoch: int, inner: int) -> list[torch.Tensor]:
    """For each of the epoch's optimiser steps this process's transitions, (n, 2) of (local sample, step index).

    The shuffle is over all transitions of all processes, so every update sees the same set however many there are.
    """
    samples = args.num_prompts * args.group_size
    local = samples // run.world
    order = torch.randperm(samples * len(steps), generator=generator("shuffle", args.seed, epoch, inner))
    rows = torch.stack([order // len(steps), torch.tensor(steps)[order % len(steps)]], 1)
    parts = rows.tensor_split(args.updates_per_epoch)
    first = run.rank * local
    return [p[(p[:, 0] >= first) & (p[:, 0] < first + local)] - torch.tensor([first, 0]) for p in parts]


def epoch_updates(args, run: Run, steps: list[int], epoch: int) -> list[torch.Tensor]:
    """The rows of each optimiser step of the epoch: shuffled_rows of one pass (--inner-epochs) after the other."""
    return [part for inner in range(args.inner_epochs) for part in shuffled_rows(args, run, steps, epoch, inner)]


def micro_batches(rows: torch.Tensor, size: int, run: Run, desc: str):
    """rows in pieces of at most `size`, under a progress bar; none where a process has no rows in an update."""
    with tqdm(total=len(rows), desc=desc, leave=False, disable=not run.is_main or None) as bar:
        for part in rows.split(size) if len(rows) else ():
            yield part
            bar.update(len(part))


class EMA:
    """Averaged copies of the trained weights; `applied()` swaps them in (not between a forward pass and its backward)."""

    def __init__(self, params: list[nn.Parameter], decay: float):
        self.params, self.decay, self.shadow = params, decay, [p.detach().clone() for p in params]

    @torch.no_grad()
    def update(self, decay: float | None = None) -> None:
        """shadow <- d shadow + (1 - d) weights."""
        for s, p in zip(self.shadow, self.params):
            s.lerp_(p, 1 - (self.decay if decay is None else decay))

    @contextmanager
    @torch.no_grad()
    def applied(self):
        kept = [p.detach().clone() for p in self.params]
        for p, s in zip(self.params, self.shadow):
            p.copy_(s)
        try:
            yield
        finally:
            for p, k in zip(self.params, kept):
                p.copy_(k)

    def state_dict(self) -> dict:
        return {"shadow": self.shadow}

    def load_state_dict(self, state: dict) -> None:
        self.shadow = [x.to(p.device) for x, p in zip(state["shadow"], self.params)]


class Optimiser:
    """AdamW on theta, and on phi where a method has one: loss scaling, clipping, averaging, bad steps counted."""

    def __init__(self, args, run: Run, params: list[nn.Parameter], *others: tuple[list[nn.Parameter], float, float]):
        """`others`: further weights, each with its own learning rate and clipping norm."""
        self.args, self.run, self.params = args, run, params
        adam = dict(betas=(args.adam_beta1, args.adam_beta2), eps=args.adam_eps, weight_decay=args.weight_decay)
        self.parts = [
            (torch.optim.AdamW(weights, lr=lr, **adam), weights, norm)
            for weights, lr, norm in [(params, args.lr, args.max_grad_norm), *others]
        ]
        for _, weights, _ in self.parts:
            broadcast(weights, run)
        self.ema = EMA(params, args.ema_decay) if args.ema_decay else None
        self.scaler = torch.amp.GradScaler(run.device.type, init_scale=1024.0) if run.dtype == torch.float16 else None
        self.steps = self.bad_steps = 0

    def backward(self, loss: torch.Tensor) -> None:
        (self.scaler.scale(loss) if self.scaler else loss).backward()

    def step(self) -> list[float]:
        """One update of every part; their gradient norms before clipping.  Stops after --max-bad-steps bad ones."""
        done = [optimizer_step(opt, weights, norm, self.run, self.scaler) for opt, weights, norm in self.parts]
        if self.scaler:
            self.scaler.update()
        taken = all(fine for _, fine in done)
        self.steps += 1
        self.bad_steps = 0 if taken else self.bad_steps + 1
        if self.bad_steps > self.args.max_bad_steps:
            raise SystemExit(f"stopped: {self.bad_steps} updates in a row had a NaN or infinite gradient; the last checkpoint is intact; try a smaller --lr")
        if self.ema and taken and self.steps % self.args.ema_every == 0:
            self.ema.update()
        return [norm for norm, _ in done]

    def averaged(self):
        """Context in which theta is its EMA, where there is one."""
        return self.ema.applied() if self.ema else nullcontext()

    def state_dict(self) -> dict:
        return dict(lora=[p.detach() for p in self.params], parts=[opt.state_dict() for opt, _, _ in self.parts],
                    ema=self.ema.state_dict() if self.ema else None, scaler=self.scaler.state_dict() if self.scaler else None,
                    steps=self.steps, bad_steps=self.bad_steps)  # fmt: skip

    def load_state_dict(self, state: dict) -> None:
        for p, saved in zip(self.params, state["lora"], strict=True):
            p.data.copy_(saved)
        for (opt, _, _), saved in zip(self.parts, state["parts"], strict=True):
            opt.load_state_dict(saved)
        if self.ema:
            self.ema.load_state_dict(state["ema"])
        if self.scaler:
            self.scaler.load_state_dict(state["scaler"])
        self.steps, self.bad_steps = state["steps"], state["bad_steps"]


def optimizer_step(optimizer, params, max_norm: float, run: Run, scaler=None) -> tuple[float, bool]:
    """All-reduce, clip, step.  Returns (gradient norm, taken?); a NaN or infinite gradient is not applied.

    The all-reduce comes before the scaler looks for overflow, so every process takes the same decision.
    """
    all_reduce_grads(params, run)
    if scaler is not None:
        scaler.unscale_(optimizer)
    norm = nn.utils.clip_grad_norm_(params, max_norm).item()
    taken = math.isfinite(norm)
    if scaler is not None:
        scaler.step(optimizer)  # skips by itself where it saw an overflow
    elif taken:
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm, taken


# ---- stats ----------------------------------------------------------------------------------------------------------
def group_advantage(reward: torch.Tensor, group_size: int, mode: str, run: Run) -> tuple[torch.Tensor, torch.Tensor]:
    """Advantages of rewards (B,) or (B, S), group-major, each column by itself, and which samples' group has one reward
    only (A is 0 there, but for raw); both of the rewards' shape.

    group: (r - mean) / (std + 1e-4) of the prompt's K samples (GRPO); global: the same mean, the std of all rewards of
    the epoch (Flow-GRPO); none: r - mean (Dr.GRPO; VMPO Eq. 20); rloo: r - mean of the other K - 1; raw: r itself.
    The standard deviations are the biased ones (as in Flow-GRPO's code).
    """
    r = reward.double().unflatten(0, (-1, group_size))  # (P, K) or (P, K, S)
    equal = (r == r[:, :1]).all(1, keepdim=True)
    centred = torch.where(equal, 0.0, r - r.mean(1, keepdim=True))
    if mode == "group":
        adv = centred / (r.std(1, correction=0, keepdim=True) + 1e-4)
    elif mode == "global":
        adv = centred / (gather(reward, run).double().std(0, correction=0) + 1e-4)
    elif mode == "rloo":
        adv = centred * group_size / (group_size - 1)
    else:
        adv = centred if mode == "none" else r
    return adv.flatten(0, 1).float(), equal.expand_as(r).flatten(0, 1)


def check_start(moved: torch.Tensor, z: torch.Tensor, args, run: Run, epoch: int) -> float:
    """The first micro-batch after a rollout repeats the rollout's network calls: log ratio and KL must be 0 there."""
    tolerance = args.ratio_tolerance
    if tolerance is None:
        tolerance = 1e-4 if run.dtype == torch.float32 else 1e-2
    deviation = log_ratio(moved, z, "mean").abs().max().item()
    if not deviation <= tolerance:
        raise SystemExit(f"stopped in epoch {epoch + 1}: right after the rollout |log p_theta - log p_old| is {deviation:.1e}, expected below {tolerance:.0e}; the rollout's and the update's passes differ: use --dtype float32 or float16, or accept it with --ratio-tolerance")
    return deviation


class Stats:
    """Means of per-row quantities over an epoch and all processes, and maxima."""

    def __init__(self, means: list[str], tops: list[str] = ()):
        self.sums = {key: [0.0, 0.0, 0.0] for key in means}  # count, sum, sum of squares
        self.tops = dict.fromkeys(tops, 0.0)

    @torch.no_grad()
    def add(self, values: dict[str, torch.Tensor]) -> None:
        """Each value (n,): one number per row."""
        for key, value in values.items():
            value = value.double()
            for j, part in enumerate((value.numel(), value.sum(), (value**2).sum())):
                self.sums[key][j] = self.sums[key][j] + part

    def top(self, key: str, value: float) -> None:
        self.tops[key] = value if math.isnan(value) else max(self.tops[key], value)

    def result(self, run: Run, std: tuple[str, ...] = ()) -> dict[str, float]:
        """{key: mean}, {"x/std": standard deviation} for the "x/mean" in `std`, and the maxima."""
        flat = all_reduce({(key, j): float(part) for key, parts in self.sums.items() for j, part in enumerate(parts)}, run)
        found = {}
        for key in self.sums:
            count, total, squares = (flat[key, j] for j in range(3))
            if count:
                found[key] = total / count
            if count and key in std:
                found[key.removesuffix("mean") + "std"] = max(0.0, squares / count - found[key] ** 2) ** 0.5
        return found | all_reduce(self.tops, run, "MAX")


# ---- evaluation during training -------------------------------------------------------------------------------------
@torch.no_grad()
def draw(policy, args, run, indices) -> tuple[torch.Tensor, list[Prompt]]:
    """Images (N, 3, H, W) on the CPU of the held-out prompts (repeated in order as needed) with these indices.

    The noise depends on the image's index alone: the same in every run and epoch.
    """
    prompts = [args.eval_prompt_list[n % len(args.eval_prompt_list)] for n in indices]
    kernel, level = (args.kernel, args.noise_level) if args.eval_kernel == "same" else ("ode", 0.0)
    grid = make_grid(policy.pipe.scheduler, policy.kind, args.eval_steps, kernel, level)
    cond = policy.encode([p.text for p in prompts])
    images = []
    for start in range(0, len(indices), args.micro_batch_size):
        rows = slice(start, start + args.micro_batch_size)
        noise = sample_noise(0, "held-out", indices[rows], grid.steps, policy.latent_shape, run.device)
        path = rollout(policy, grid, cond[rows], prompts[rows], noise, args.cfg, len(noise), desc="")
        images.append(policy.decode(path.x[:, -1]).cpu())
    return torch.cat(images), prompts


def score_held_out(policy, args, run, reward, more) -> dict[str, torch.Tensor]:
    """This process's share of the held-out images, drawn and scored: {name: (share,)}; the last ones may repeat."""
    share = -(-args.eval_images // run.world)
    images, prompts = draw(policy, args, run, range(run.rank * share, (run.rank + 1) * share))
    texts, extra = [p.text for p in prompts], [p.metadata for p in prompts]
    scores = {}
    for scorer in (reward, more):
        if scorer is not None:
            total, parts = scorer(images.to(run.device), texts, extra, chunk=args.reward_batch_size)
            scores = {"reward": total} | scores | parts
    return scores


def held_out_metrics(scores: dict[str, torch.Tensor], args, run, epoch: int) -> dict[str, float]:
    """Held-out reward (mean, standard error), its terms and the --eval-rewards; each image's scores go to eval/."""
    scores = {name: gather(value.to(run.device), run)[: args.eval_images] for name, value in scores.items()}
    if run.is_main:
        texts = [args.eval_prompt_list[n % len(args.eval_prompt_list)].text for n in range(args.eval_images)]
        (run.dir / "eval").mkdir(exist_ok=True)
        write_json(run.dir / "eval" / f"epoch_{epoch:04d}.json", {"prompts": texts} | {k: v.tolist() for k, v in scores.items()})
    result = {f"eval/{name}": value.mean().item() for name, value in scores.items()}
    return result | {"eval/reward_se": scores["reward"].std().item() / args.eval_images**0.5}


def sample_grid(policy, args, run, epoch: int) -> None:
    """samples/epoch_NNNN.png: the first held-out prompts with the same noise every time."""
    if run.is_main:
        images, prompts = draw(policy, args, run, range(16))
        image_grid(images, [p.text for p in prompts], run.dir / "samples" / f"epoch_{epoch:04d}.png")


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
            pen.text((x + 2, y + line + size + frame + 2), f"{old:.2f} -> {new:.2f}", fill=colour if new != old else "gray", font=font)
        pen.rectangle((x - frame, y + line - frame, x + parts * (size + gap) - gap + frame - 1, y + line + size + frame - 1), fill=colour)
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
    temporary = path.with_suffix(".tmp.png")
    sheet.save(temporary)
    temporary.replace(path)


# ---- log ------------------------------------------------------------------------------------------------------------
class Logger:
    """metrics.csv + TensorBoard (+ wandb if asked); the columns are fixed from the first row."""

    def __init__(self, run: Run, args, keys: list[str]):
        self.run, self.keys, self.path, self.wandb = run, ["epoch", *keys], run.dir / "metrics.csv", None
        if not run.is_main:
            return
        kept = []
        if self.path.exists():  # a resumed run: drop what was logged after the checkpoint
            kept = [r for r in csv.DictReader(self.path.open(newline="")) if int(r["epoch"]) <= run.start_epoch]
        with self.path.open("w", newline="") as f:
            writer = csv.DictWriter(f, self.keys)
            writer.writeheader()
            writer.writerows(kept)
        from torch.utils.tensorboard import SummaryWriter

        self.board = SummaryWriter(run.dir, purge_step=run.start_epoch + 1 if run.start_epoch else None)
        if args.wandb:
            import wandb

            self.wandb = wandb.init(project=args.wandb, name=run.dir.name, dir=run.dir, resume="allow", id=run.dir.name)

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


def plot_curve(logger: Logger, path: Path, title: str) -> None:
    """curve.png: the training reward per epoch and the held-out reward with its standard error."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = logger.rows()
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
        e, m, s = zip(*held)
        axis.errorbar(e, m, s, color="tab:orange", marker="o", capsize=3, label="held-out prompts, same noise")
    axis.set(xlabel="epoch", ylabel="reward", title=title)
    axis.legend()
    axis.grid(alpha=0.3)
    figure.tight_layout()
    temporary = path.with_suffix(".tmp.png")
    figure.savefig(temporary, dpi=110)
    pyplot.close(figure)
    temporary.replace(path)


# ---- ckpt -----------------------------------------------------------------------------------------------------------
def export_lora(policy: Policy, folder: Path) -> None:
    """pytorch_lora_weights.safetensors that pipe.load_lora_weights(folder) loads; alpha / rank is folded into B."""
    from peft.utils import get_peft_model_state_dict

    config = policy.net.peft_config["default"]
    weights = get_peft_model_state_dict(policy.net, adapter_name="default")
    scale = config.lora_alpha / config.r
    weights = {k: (v * scale if ".lora_B." in k else v).detach().cpu().contiguous() for k, v in weights.items()}
    part = "unet_lora_layers" if policy.kind == "eps" else "transformer_lora_layers"
    policy.pipe.save_lora_weights(str(folder), **{part: weights}, safe_serialization=True)


def save(run: Run, args, policy: Policy, epoch: int, state: dict, ema: EMA | None) -> None:
    """checkpoints/epoch_NNNN with the exported LoRA and state.pt, complete or absent; `last` points to it."""
    if not run.is_main:
        return
    root = run.dir / "checkpoints"
    final, temporary = root / f"epoch_{epoch:04d}", root / f".writing_{epoch:04d}"
    if final.exists():
        return
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    with ema.applied() if ema else nullcontext():
        export_lora(policy, temporary)
    torch.save(state | {"epoch": epoch}, temporary / "state.pt")
    temporary.rename(final)
    link = root / ".last"
    link.unlink(missing_ok=True)
    link.symlink_to(final.name)
    link.replace(root / "last")


def load(folder: str | Path) -> dict:
    """The state of a run folder's last checkpoint, on the CPU (the optimisers move what they need)."""
    return torch.load(Path(folder) / "checkpoints" / "last" / "state.pt", map_location="cpu", weights_only=True)


class Recorder:
    """What happens around every method's epochs: resume, evaluation, log, sample grids, checkpoints, the final summary."""

    def __init__(self, run, args, policy, optimiser, reward, more, failure, keys, modules=None):
        """`more` scores evaluations too, `failure` is what rewards raise, `keys` are the method's own metrics, and
        `modules` {name: object with state_dict()} is what a checkpoint holds beside theta."""
        self.run, self.args, self.policy, self.optimiser = run, args, policy, optimiser
        self.reward, self.more, self.failure, self.modules = reward, more, failure, modules or {}
        if args.resume:
            state = load(run.dir)
            if state["epoch"] >= args.epochs:
                raise UsageError(f"--resume {run.dir}: epoch {state['epoch']} of {args.epochs} is done; give a larger --epochs to go on")
            optimiser.load_state_dict(state["theta"])
            for name, module in self.modules.items():
                module.load_state_dict(state[name])
            run.start_epoch = state["epoch"]
        terms = [f"reward/{t.name}" for t in reward.terms]
        held = [f"eval/{t.name}" for r in (reward, more) if r for t in r.terms]
        args.made_dir = None  # from here on the folder is worth keeping
        self.logger = Logger(run, args, [
            "reward/mean", "reward/std", *terms, *keys, "grad/bad_steps", "calls/network", "time/rollout", "time/reward",
            "time/update", "mem/peak_gb", "eval/reward", "eval/reward_se", *held])  # fmt: skip
        self.calls, self.clock = 0, []

    def epochs(self):
        """The epochs that are left, after the evaluation of the untrained policy."""
        run, args = self.run, self.args
        if run.start_epoch == 0 and args.eval_images:
            scores, problem = self._held_out()
            self._stop_if(problem, 0)
            self.logger.log(0, held_out_metrics(scores, args, run, 0))
        self.bar = tqdm(range(run.start_epoch, args.epochs), desc=run.method, disable=not run.is_main,
                        initial=run.start_epoch, total=args.epochs)  # fmt: skip
        for epoch in self.bar:
            self.calls, self.clock = self.policy.network_calls, []
            yield epoch

    def phase(self) -> None:
        """Called where an epoch's rollout, reward and update begin: the time columns."""
        self.clock.append(time.time())

    @contextmanager
    def scoring(self, epoch: int):
        """A reward that fails inside stops all processes with its sentence, after a checkpoint."""
        problem = None
        try:
            yield
        except self.failure as failure:
            problem = failure
        self._stop_if(problem, epoch)

    def end_epoch(self, epoch: int, final: torch.Tensor, parts: dict, metrics: dict[str, float]) -> None:
        """Rewards (B,), their terms and the method's metrics of `epoch` -> log, evaluation, samples, checkpoint."""
        run, args = self.run, self.args
        self.phase()
        every = gather(final, run)
        row = {"reward/mean": every.mean().item(), "reward/std": every.std().item() if len(every) > 1 else 0.0}
        row |= {f"reward/{name}": gather(value, run).mean().item() for name, value in parts.items()} | metrics
        row |= {"grad/bad_steps": self.optimiser.bad_steps, "calls/network": self.policy.network_calls - self.calls}
        row |= {f"time/{name}": self.clock[j + 1] - self.clock[j] for j, name in enumerate(("rollout", "reward", "update"))}
        if run.device.type == "cuda":
            row["mem/peak_gb"] = torch.cuda.max_memory_allocated() / 2**30
        done, last = epoch + 1, epoch + 1 == args.epochs
        scores = problem = None
        with self.optimiser.averaged():
            if args.eval_images and (last or args.eval_every and done % args.eval_every == 0):
                scores, problem = self._held_out()
            if args.sample_every and done % args.sample_every == 0:
                sample_grid(self.policy, args, run, done)
        self._stop_if(problem, done, row)  # the policy's own weights are back: they are what a checkpoint keeps
        if scores:
            row |= held_out_metrics(scores, args, run, done)
        self.logger.log(done, row)
        self.bar.set_postfix(reward=f"{row['reward/mean']:.3f}", kl=f"{row.get('kl/ref', math.nan):.1e}")
        if last or args.save_every and done % args.save_every == 0:
            self._save(done)  # after the log: a resumed run drops the rows that came after its checkpoint

    def finish(self) -> None:
        with self.optimiser.averaged():
            finish(self.run, self.args, self.policy, self.logger)
        self.logger.close()

    def _held_out(self):
        try:
            return score_held_out(self.policy, self.args, self.run, self.reward, self.more), None
        except self.failure as failure:
            return None, failure

    def _stop_if(self, problem, epoch: int, row=None) -> None:
        if all_reduce({"failed": float(problem is not None)}, self.run)["failed"]:
            if row is not None:
                self.logger.log(epoch, row)
            if epoch > self.run.start_epoch:
                self._save(epoch)
            raise SystemExit(f"{self.run.method}.py: stopped after epoch {epoch}: {problem or 'the reward failed in another process'}")

    def _save(self, epoch: int) -> None:
        state = {"theta": self.optimiser.state_dict()} | {k: m.state_dict() for k, m in self.modules.items()}
        save(self.run, self.args, self.policy, epoch, state, self.optimiser.ema)


def finish(run: Run, args, policy: Policy, logger: Logger) -> None:
    """summary.json, curve.png, before_after.png (same noise, adapters off and on), and the result in a few lines."""
    if not run.is_main:
        return
    last, prompts = draw(policy, args, run, range(24))
    with policy.reference():
        first, _ = draw(policy, args, run, range(24))
    pairs, scores = torch.stack([first, last], 1).flatten(0, 1), None
    plot_curve(logger, run.dir / "curve.png", run.dir.name)
    seconds = sum(r.get(f"time/{k}", 0.0) for r in logger.rows() for k in ("rollout", "reward", "update"))
    summary = {"seed": args.seed, "epochs": args.epochs, "seconds": round(seconds, 1), "images": args.eval_images,
               "command": (run.dir / "command.txt").read_text().strip(), "before": {}, "after": {}, "gain": {}, "gain_se": {}}  # fmt: skip
    print(f"{args.epochs} epochs, {seconds:.0f} s of training; {args.eval_images} held-out images, same noise before and after:")
    if args.eval_images:
        before, after = (json.loads((run.dir / "eval" / f"epoch_{e:04d}.json").read_text()) for e in (0, args.epochs))
        for key in (k for k in before if k != "prompts"):
            old, new = (torch.tensor(scores[key], dtype=torch.float64) for scores in (before, after))
            summary["before"][key], summary["after"][key] = old.mean().item(), new.mean().item()
            summary["gain"][key] = (new - old).mean().item()
            summary["gain_se"][key] = (new - old).std().item() / len(old) ** 0.5  # paired, over images
            print(f"  {key:20s} {old.mean():8.4f} -> {new.mean():8.4f}   gain {summary['gain'][key]:+.4f} +- {summary['gain_se'][key]:.4f}")
        if args.eval_images >= len(prompts):  # the same images, hence the same scores
            scores = list(zip(before["reward"], after["reward"]))
    write_json(run.dir / "summary.json", summary)
    image_grid(pairs, [p.text for p in prompts], run.dir / "before_after.png", columns=4, pairs=True, scores=scores)
    print(f"curve     {run.dir / 'curve.png'}")
    print(f"pictures  {run.dir / 'before_after.png'}")
    print(f"LoRA      pipe.load_lora_weights('{run.dir / 'checkpoints' / 'last'}')")
