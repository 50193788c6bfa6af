"""Rewards of a model without and with LoRAs, on the same noise: mean, standard error, paired difference, gallery.

Protocol: K images of every prompt (paper: 100 prompts x 10, arXiv 2602.12229, App. D).  The images of one prompt are
       not independent of each other, so the sample is the prompt: each reward is averaged over the prompt's images
       first; reported are the mean of these P values and its standard error std / sqrt(P).  Base and LoRA draw from
       the same noise, a function of (seed, prompt, image), so their difference is taken per prompt, and its standard
       error is that of the P differences: usually far smaller than the two errors side by side suggest.
Steps:  1 what is there already     2 the model, the LoRAs checked against it, the rewards, as far as they are needed
       3 images and scores: base, then each LoRA     4 diversity within each prompt     5 statistics over prompts
       6 results.json, results.md, grid.png, gallery.html, the panel of a run, and the table
Resume: every image is a file as soon as it is drawn, every score a line in scores.jsonl, both named after all that
       they depend on.  The same command goes on where it was stopped, and what is finished is not made again.
Run:   python eval.py --preset tiny --lora runs/NAME             # embedded model, CPU, minutes
       python eval.py --preset vmpo-table1 --lora runs/NAME/checkpoints/last OTHER.safetensors
       python eval.py --preset vmpo-table1                       # the base model alone
       python eval.py --panel runs/NAME                          # is the reward being hacked?  A run's checkpoints
Every preset, file and key: docs/eval.md.
"""

import argparse
import base64
import csv
import hashlib
import io
import json
import os
import re
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

import common
import rewards

HERE = Path(__file__).resolve().parent
LORA_FILE = "pytorch_lora_weights.safetensors"
SD35 = dict(model="sd3.5-medium", images_per_prompt=1, steps=40, cfg=4.5, max_sequence_length=128)
TINY = dict(prompts="prompts/shapes_heldout.txt", rewards="shapes,shapes-strict", diversity="diversity-clip",
            images_per_prompt=4, cfg=1.0, steps=10, max_sequence_length=10, batch_size=64, decode_batch_size=64,
            reward_batch_size=256)  # fmt: skip
PRESETS = {
    # VMPO Tables 1 and 2: SD1.5, 100 prompts x 10 images, CFG 5; the protocol of soc-fine-tuning-sd
    "vmpo-table1": dict(model="sd15", prompts="prompts/benchmark_ir.txt", rewards="hpsv2,imagereward,clipscore",
                        diversity="dreamsim", images_per_prompt=10, steps=50, cfg=5.0),
    # VMPO Table 3, AWM Table 2: text rendering, the 1,018 test prompts of Flow-GRPO
    "sd35-ocr": SD35 | dict(prompts="prompts/ocr_test.txt", rewards="ocr"),
    # AWM Table 1: 553 prompts x 4 images, the mean of the six tags
    "geneval": SD35 | dict(prompts="prompts/geneval_official.jsonl", rewards="geneval", images_per_prompt=4),
    # VMPO Table 3's check against hacking (its DeQA and UnifiedReward come from servers: add them to --rewards)
    "drawbench": SD35 | dict(prompts="", rewards="aesthetic,imagereward,pickscore"),
    # HPSv2's test prompts as in DanceGRPO, MixGRPO and RSM
    "hpdv2-test": dict(model="sd15", prompts="prompts/hpdv2_test400.txt", rewards="hpsv2", images_per_prompt=1),
    # the embedded models
    "tiny": TINY | dict(model="tiny-sd35"),
    "tiny-sd15": TINY | dict(model="tiny-sd15"),
}  # fmt: skip
NOT_SHIPPED = {
    "drawbench": "DrawBench's 200 prompts come without a licence and are not in this repository; pass a file of them "
    "with --prompts (where to get one: prompts/README.md)",
}
# of a run's args.json: what --panel takes over as it is, and what it needs
SAME_FLAGS = ("reward_path", "cfg", "resolution", "max_sequence_length", "model", "t5", "dtype", "decode_batch_size",
              "reward_batch_size")  # fmt: skip
PANEL_FLAGS = (*SAME_FLAGS, "reward", "eval_rewards", "prompts", "eval_prompts", "eval_images", "eval_steps",
               "eval_kernel", "kernel", "noise_level", "micro_batch_size")  # fmt: skip
MEAN_OVER_TAGS = ("geneval",)  # official: each tag counts the same, however many prompts it has


def parse_args(argv=None):
    parser = common.make_parser(__doc__, "eval")
    yes_no, kernels = argparse.BooleanOptionalAction, sorted({k for of in common.KERNELS.values() for k in of})
    # fmt: off
    g = parser.add_argument_group("what is compared")
    g.add_argument("--lora", nargs="*", default=[], metavar="PATH", help="LoRAs: run folders, checkpoints or files")
    g.add_argument("--panel", default="", metavar="RUN", help="evaluate a run's checkpoints instead, with its own "
                   "settings as defaults: training reward against held-out rewards, diversity and KL in one figure")
    g.add_argument("--checkpoints", type=int, default=8, help="of --panel: at most so many, evenly spaced")
    g.add_argument("--prompts", default="prompts/benchmark_ir.txt", help="comma-separated .txt or .jsonl files")
    g.add_argument("--num-prompts", type=int, help="P: only the first P prompts; default all (paper: 100)")
    g.add_argument("--images-per-prompt", type=int, default=10, help="K: images per prompt (paper: 10)")
    g.add_argument("--rewards", default="hpsv2", help="names, comma-separated, no weights: each is reported by itself")
    g.add_argument("--reward-path", nargs="*", default=[], metavar="[NAME=]PATH",
                   help="local weights of the rewards and of --diversity")
    g.add_argument("--diversity", default="none", choices=["none", "dreamsim", "diversity-clip"],
                   help="of a prompt's K images: 1 - mean pairwise cosine of DreamSim (paper) or CLIP embeddings")

    g = parser.add_argument_group("sampling")
    g.add_argument("--steps", type=int, help="T: sampler steps; default 50 for SD1.5, 40 for SD3.5 (Flow-GRPO: 40)")
    g.add_argument("--kernel", default="ode", choices=kernels, help="ode = deterministic; others: see the trainers")
    g.add_argument("--noise-level", type=float, help="of a stochastic kernel (ddim: eta); default as in the trainers")
    g.add_argument("--cfg", type=float, help="guidance scale; default 5 for SD1.5, 4.5 for SD3.5 (paper); 1 = off")
    g.add_argument("--resolution", type=int, help="pixels per side; default 512 for SD1.5 and SD3.5, else the model's")
    g.add_argument("--max-sequence-length", type=int, default=256, help="T5 tokens of SD3.5; the embedded model: 10")
    g.add_argument("--seed", type=int, default=0, help="of the noise")

    g = parser.add_argument_group("model and performance")
    g.add_argument("--model", default="sd15", help=f"{', '.join(common.MODELS)}, a hub id or a diffusers folder")
    g.add_argument("--t5", action=yes_no, default=True, help="load SD3.5's T5 text encoder (9.5 GB in bf16)")
    g.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"], help="of the model")
    g.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N")
    g.add_argument("--batch-size", type=int, default=8, help="images per forward pass; changes memory and speed only")
    g.add_argument("--decode-batch-size", type=int, default=8, help="latents per VAE decode")
    g.add_argument("--reward-batch-size", type=int, default=16, help="images per reward call")

    g = parser.add_argument_group("output")
    g.add_argument("--preset", default="", choices=["", *PRESETS], help="see the top of the script; other flags win")
    g.add_argument("--out", default="", help="folder of images and results; default evals/NAME_KEY, NAME of "
                   "the first LoRA, KEY of all settings, so that the same command continues there")
    g.add_argument("--overwrite", action="store_true", help="replace the results of other settings that --out holds; "
                   "images and scores that fit are used again")
    g.add_argument("--grid-prompts", type=int, default=16, help="prompts in grid.png, one image each; 0 = no grid")
    g.add_argument("--gallery-mb", type=float, default=24, help="size of the images in gallery.html; where they do "
                   "not fit in full: thumbnails down to 256 pixels, then fewer images per prompt, then smaller ones, "
                   "then fewer prompts (the page says so; the folder images/ has all); 0 = no gallery")
    # fmt: on
    first = parser.parse_args(argv)
    try:
        parser.set_defaults(**panel_defaults(first) if first.panel else {})
        parser.set_defaults(**PRESETS.get(first.preset, {}))
        args = parser.parse_args(argv)
        args.command = shlex.join(["python", "eval.py", *(sys.argv[1:] if argv is None else argv)])
        check_args(args)
        common.check_model(args)
        make_keys(args)
        check_out(args)
    except (common.UsageError, rewards.UsageError) as problem:
        parser.error(str(problem))
    return args


def panel_defaults(args) -> dict:
    """--panel RUN: the run's own evaluation as flags, with K = 4 images per prompt, --eval-images in all."""
    run = Path(args.panel)
    try:
        own = json.loads((run / "args.json").read_text())["args"]
        with (run / "metrics.csv").open(newline="") as f:
            columns = next(csv.reader(f))
    except (OSError, ValueError, KeyError, TypeError, StopIteration):
        problem = f"--panel {run} is no run folder (args.json and metrics.csv cannot be read); give a trainer's"
        raise common.UsageError(f"{problem}, e.g. runs/NAME") from None
    if args.lora:
        raise common.UsageError(f"--panel {run} evaluates the run's own checkpoints; leave --lora out, or --panel")
    if args.checkpoints < 1:
        raise common.UsageError(f"--checkpoints {args.checkpoints} is too few; use 1 or more")
    epochs = sorted(run.glob("checkpoints/epoch_*/" + LORA_FILE))
    if not epochs or "reward/mean" not in columns:
        raise common.UsageError(f"--panel {run} has no checkpoint or no training reward yet; let it train longer")
    count = min(args.checkpoints, len(epochs))
    epochs = [epochs[(i + 1) * len(epochs) // count - 1] for i in range(count)]
    if absent := [k for k in PANEL_FLAGS if k not in own]:
        raise common.UsageError(f"--panel {run}: its args.json lacks {', '.join(absent)}; give a trainer's run folder")
    names = [name for spec in (own["reward"], own["eval_rewards"]) if spec for name, _ in rewards.parse_spec(spec)]
    eval_prompts = own["eval_prompts"] or own["prompts"]
    wanted = max(1, own["eval_images"] // 4)
    found = dict(
        lora=[str(file.parent) for file in epochs], prompts=eval_prompts, images_per_prompt=4,
        num_prompts=min(wanted, len(common.load_prompts(eval_prompts))), rewards=",".join(dict.fromkeys(names)),
        steps=own["eval_steps"], batch_size=own["micro_batch_size"], diversity="diversity-clip",
        **{k: own[k] for k in SAME_FLAGS},
    )  # fmt: skip
    return found | (dict(kernel=own["kernel"], noise_level=own["noise_level"]) if own["eval_kernel"] == "same" else {})


def check_args(args) -> None:
    """What can be wrong before a model is loaded.  Fills in the model's defaults and the rest that Policy reads."""
    least = dict(num_prompts=1, images_per_prompt=1, steps=2, max_sequence_length=1, resolution=1, batch_size=1,
                 decode_batch_size=1, reward_batch_size=1, grid_prompts=0, gallery_mb=0)  # fmt: skip
    for name, low in least.items():
        if vars(args)[name] is not None and vars(args)[name] < low:
            flag = "--" + name.replace("_", "-")
            raise common.UsageError(f"{flag} {vars(args)[name]} is too small; use {low} or more")
    args.model_path, args.kind = common.find_model(args.model)
    if args.kernel not in (fits := common.KERNELS[args.kind]):
        raise common.UsageError(f"--kernel {args.kernel} does not fit --model {args.model}; use {' or '.join(fits)}")
    if args.kernel == "ode" and args.noise_level:
        raise common.UsageError(f"--noise-level {args.noise_level} does nothing with --kernel ode; leave it out")
    args.noise_level = common.NOISE_LEVEL[args.kernel] if args.noise_level is None else args.noise_level
    most = 1 if args.kernel in ("ddim", "ancestral", "cps") else float("inf")
    if args.kernel != "ode" and not 0 < args.noise_level <= most:
        raise common.UsageError(f"--noise-level {args.noise_level} of {args.kernel} must be in (0, {most}]")
    args.steps = args.steps or {"eps": 50, "flow": 40}[args.kind]
    args.cfg = {"eps": 5.0, "flow": 4.5}[args.kind] if args.cfg is None else args.cfg
    if args.model in common.MODELS:
        args.resolution = args.resolution or common.MODELS[args.model][4]
    args.device = args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=args.device)
    except (RuntimeError, AssertionError) as problem:
        reason = str(problem).splitlines()[0]
        raise common.UsageError(f"--device {args.device} cannot be used ({reason}); try --device cpu") from None
    if args.preset in NOT_SHIPPED and not args.prompts:
        raise common.UsageError(f"--preset {args.preset}: {NOT_SHIPPED[args.preset]}")
    args.prompt_list = common.load_prompts(args.prompts)
    if (args.num_prompts or 0) > len(args.prompt_list):
        have = f"--prompts has only {len(args.prompt_list)}"
        raise common.UsageError(f"--num-prompts {args.num_prompts} is too many, {have}; leave it out to take all")
    args.prompt_list = args.prompt_list[: args.num_prompts]
    if "=" in args.rewards:
        raise common.UsageError(f"--rewards {args.rewards} has weights, but each is reported by itself; drop the =...")
    args.reward_names = [name for name, _ in rewards.parse_spec(args.rewards)]
    args.paths = rewards.parse_paths(args.reward_path)
    texts, metadata = [p.text for p in args.prompt_list], [p.metadata for p in args.prompt_list]
    rewards.check(args.rewards, args.paths, texts, metadata)
    if args.diversity != "none":
        if args.images_per_prompt < 2:
            few = f"--images-per-prompt {args.images_per_prompt} has no --diversity {args.diversity}"
            raise common.UsageError(f"{few}; use 2 or more, or --diversity none")
        if args.diversity == "diversity-clip" and args.model.startswith("tiny-"):
            args.paths = {"diversity-clip": str(HERE / "tiny" / "clip")} | args.paths
        rewards.check_diversity(args.diversity, args.paths.get(args.diversity))
    args.lora_files = find_loras(args.lora, args.kind)
    if args.panel:  # RUN/epoch_0010: the run is known
        args.lora_files = {label.rpartition("/")[2]: file for label, file in args.lora_files.items()}
    args.gradient_checkpointing, args.detach_uncond, args.lora_targets = False, False, "attention"  # of training only
    args.offload_text_encoders = True  # the prompts are encoded once; after that the GPU need not hold the encoders


# ---- names made of all that an image or a score depends on ----------------------------------------------------------
def digest(*parts) -> str:
    """12 hexadecimal digits for anything that JSON can hold."""
    return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=6).hexdigest()


def file_digest(path: Path) -> str:
    return hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()


def identity(path: str | Path) -> list:
    """What tells two files or folders apart: content of files up to 16 MB, else size and time of the last change."""
    path = Path(path)
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    found = []
    for file in files:
        stat = file.stat()
        what = file_digest(file) if stat.st_size <= 2**24 else [stat.st_size, stat.st_mtime_ns]
        found.append([str(file.relative_to(path)) if file != path else "", what])
    return found


def model_identity(args) -> list:
    """Content of a model folder, or the commit of a model on the hub."""
    if Path(args.model_path).is_dir():
        return identity(args.model_path)
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    cached = try_to_load_from_cache(args.model_path, "model_index.json")
    if not isinstance(cached, str):
        cached = hf_hub_download(args.model_path, "model_index.json")
    return [args.model_path, Path(cached).parent.name]


def code_of(reward: str) -> list[str]:
    """The files that compute a reward; a user's own has been imported by rewards.check."""
    own = [sys.modules[reward.partition(":")[0]]] if ":" in reward else []
    return [file_digest(Path(module.__file__)) for module in (rewards, *own)]


def make_keys(args) -> None:
    """args.folders {label: its folder in images/}, args.reward_keys {reward: key}, args.key of the evaluation.

    The rewards' code is part of their keys but not of args.key: after a change in it the same command stays in its
    folder, keeps the images and scores them again.
    """
    dtype, _ = common.pick_dtype(args.dtype, torch.device(args.device))
    shared = [model_identity(args), str(dtype), args.resolution, args.seed]
    shared += [args.steps, args.kernel, args.noise_level, args.cfg]
    if args.kind == "flow":
        shared += [args.max_sequence_length, args.t5]
    args.folders = {}
    for label, file in [("base", None), *args.lora_files.items()]:
        plain = re.sub("[^A-Za-z0-9.-]+", "_", label)
        args.folders[label] = f"{plain}-{digest(shared, file_digest(file) if file else '')}"
    paths = {name: args.paths.get(name) or args.paths.get("", "") for name in args.reward_names}
    if args.diversity != "none":
        paths[args.diversity] = args.paths.get(args.diversity, "")
    weights = {name: [identity(part) if part and Path(part).exists() else part for part in path.split(",")]
               for name, path in paths.items()}  # fmt: skip
    args.reward_keys = {name: digest(name, found, code_of(name)) for name, found in weights.items()}
    prompts = [[p.id, p.text, p.metadata] for p in args.prompt_list]
    args.key = digest(args.folders, weights, prompts, args.images_per_prompt)


def check_out(args) -> None:
    """args.out can be written, and holds no results of other settings unless --overwrite is given."""
    name = Path(args.panel).name or next(iter(args.lora_files), Path(args.model).name)
    out = Path(args.out or f"evals/{name.replace('/', '_')}_{args.key}")
    try:
        other = json.loads((out / "results.json").read_text())["key"] != args.key
    except FileNotFoundError:
        other = False
    except (OSError, ValueError, KeyError, TypeError):
        other = (out / "results.json").exists()
    if other and not args.overwrite:
        problem = f"--out {out} holds results of other settings"
        raise common.UsageError(f"{problem}; choose another folder, or give --overwrite")
    parent = next(p for p in [out.absolute(), *out.absolute().parents] if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise common.UsageError(f"--out {out} cannot be written ({parent} is not a writable folder); choose another")
    args.out = str(out)


# ---- LoRAs ----------------------------------------------------------------------------------------------------------
def find_loras(paths: list[str], kind: str) -> dict[str, Path]:
    """{label: file}, after a look at the names in each file.  A run folder stands for its checkpoints/last."""
    from safetensors import SafetensorError, safe_open

    part, ends = {"eps": "unet.", "flow": "transformer."}[kind], (".lora_A.weight", ".lora_B.weight")
    found: dict[str, Path] = {}
    for given in paths:
        path = Path(given).absolute()
        file = next((p for p in (path, path / LORA_FILE, path / "checkpoints/last" / LORA_FILE) if p.is_file()), None)
        if file is None:
            raise common.UsageError(f"--lora {given}: no {LORA_FILE} there; give a trainer's run folder or checkpoint")
        try:
            with safe_open(file, "pt") as opened:
                names = list(opened.keys())
        except (SafetensorError, OSError) as problem:
            raise common.UsageError(f"--lora {given}: {file} is no readable safetensors file ({problem})") from None
        odd = [n for n in names if not (n.startswith(part) and n.endswith(ends))]
        if odd or not names:
            what = f"it has {odd[0] if odd else 'nothing'}, expected is {part}LAYER.lora_A.weight and .lora_B.weight"
            raise common.UsageError(f"--lora {given} does not fit the model: {what}; pass the one it was trained on")
        # its label: RUN for the last checkpoint of a run, RUN/epoch_0010 for another one, else the folder or file
        where = file.parent if file.name == LORA_FILE else file.with_suffix("")
        label = where.name
        if where.parent.name == "checkpoints":
            label = where.parent.parent.name + ("" if label == "last" else f"/{label}")
        while label in found or label == "base":
            label += "'"
        found[label] = file
    return found


def check_lora(label: str, file: Path, net: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The file's weights, {name in net: tensor}; UsageError unless every one of them has its place in net."""
    from safetensors.torch import load_file

    kinds = (torch.nn.Linear, torch.nn.Conv2d)
    layers = {name: tuple(m.weight.shape) for name, m in net.named_modules() if isinstance(m, kinds)}  # (out, in, ...)
    weights = {key.split(".", 1)[1]: value for key, value in load_file(file).items()}
    for key, value in weights.items():
        layer, part = key.removesuffix(".weight").rsplit(".", 1)
        down, up = (weights.get(f"{layer}.lora_{x}.weight") for x in "AB")
        if layer not in layers:
            problem = f"the model has no layer {layer}"
        elif down is None or up is None:
            problem = f"{layer} has only one of lora_A and lora_B"
        elif (up.shape[0], *down.shape[1:]) != layers[layer] or up.shape[1] != down.shape[0]:
            sizes = f"{tuple(up.shape)} and {tuple(down.shape)}"
            problem = f"lora_B and lora_A of {layer} are {sizes}, the layer itself is {layers[layer]}"
        elif not value.isfinite().all():
            problem = f"{part} of {layer} has NaN or infinite values"
        else:
            continue
        raise common.UsageError(f"--lora {label} does not fit the model: {problem}; pass the one it was trained on")
    return weights


def load_lora(policy, file: Path, names: set[str]) -> None:
    """pipe.load_lora_weights, as users do it; then nothing of the file may be missing from the network."""
    from peft.utils import get_peft_model_state_dict

    policy.pipe.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name="evaluated")
    if missing := names ^ set(get_peft_model_state_dict(policy.net, adapter_name="evaluated")):
        raise common.UsageError(f"{file}: diffusers did not load {len(missing)} of its weights, e.g. {min(missing)}")


# ---- what is there already: images/ and scores.jsonl ----------------------------------------------------------------
@dataclass
class Cache:
    out: Path
    scores: dict[tuple[str, str, str], float]  # (image or set of images, reward, its key) -> score
    torn: bool = False  # the file's last line is unfinished
    drawn: int = 0  # in this process
    scored: int = 0


def open_cache(out: Path) -> Cache:
    """The scores in out/scores.jsonl; a line that a kill left unfinished is not there."""
    scores, text = {}, ""
    path = out / "scores.jsonl"
    if path.exists():
        text = path.read_text(encoding="utf-8")
        for line in text.split("\n"):
            try:
                row = json.loads(line)
                scores[row["of"], row["reward"], row["key"]] = float(row["score"])
            except (ValueError, KeyError, TypeError):
                continue
    return Cache(out, scores, torn=text != "" and not text.endswith("\n"))


def add_scores(cache: Cache, rows: list[tuple[str, str, str, float]]) -> None:
    """Appends (image, reward, key, score) to the file, then to the dict."""
    names = ("of", "reward", "key", "score")
    with (cache.out / "scores.jsonl").open("a", encoding="utf-8") as f:
        f.write("\n" * cache.torn + "".join(json.dumps(dict(zip(names, row))) + "\n" for row in rows))
    cache.torn = False
    cache.scores |= {row[:3]: row[3] for row in rows}
    cache.scored += len(rows)


def image_name(folder: str, prompt: common.Prompt, k: int) -> str:
    """FOLDER/PROMPT-IMAGE_TEXT: with the folder's key all that the pixels depend on."""
    return f"{folder}/{prompt.id:05d}-{k:02d}_{digest(prompt.text)[:8]}"


def image_path(out: Path, name: str) -> Path:
    return out / "images" / f"{name}.png"


def save_image(pixels: torch.Tensor, path: Path) -> None:
    """(3, H, W) uint8 -> PNG, complete or absent."""
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(temporary, format="PNG")
    temporary.replace(path)


def read_image(path: Path) -> torch.Tensor:
    """(3, H, W) float32 in [0, 1]."""
    import numpy
    from PIL import Image, UnidentifiedImageError

    try:
        pixels = numpy.array(Image.open(path).convert("RGB"))
    except (UnidentifiedImageError, OSError) as problem:
        raise SystemExit(f"eval.py: stopped: {path} cannot be read ({problem}); delete it and repeat") from None
    return torch.from_numpy(pixels).permute(2, 0, 1).float() / 255


# ---- images, scores, diversity --------------------------------------------------------------------------------------
def score_key(args, reward: str, prompt: common.Prompt) -> str:
    """What a reward's score of an image depends on besides the image, whose name has the prompt's text."""
    return args.reward_keys[reward] + (f"-{digest(prompt.metadata)}" if prompt.metadata else "")


def missing(args, cache: Cache, label: str) -> tuple[int, set[str]]:
    """How many images of a model are not there, and the rewards of which a score is not there."""
    images, of = 0, set()
    for prompt in args.prompt_list:
        for k in range(args.images_per_prompt):
            name = image_name(args.folders[label], prompt, k)
            images += not image_path(cache.out, name).exists()
            of |= {r for r in args.reward_names if (name, r, score_key(args, r, prompt)) not in cache.scores}
    return images, of


@torch.no_grad()
def draw_and_score(policy, grid, cond, reward, args, cache: Cache, label: str) -> None:
    """Every image and score of one model that is not in the cache, batch by batch, into the cache.

    A batch is drawn as a whole even if some of its images are there: the same batches give the same bits as a run
    that was never stopped.  Rewards see what the PNG files hold.
    """
    rows = [(p, k) for p in range(len(args.prompt_list)) for k in range(args.images_per_prompt)]
    with tqdm(total=len(rows), desc=label, unit="image", disable=None) as bar:
        for start in range(0, len(rows), args.batch_size):
            batch = rows[start : start + args.batch_size]
            prompts = [args.prompt_list[p] for p, _ in batch]
            names = [image_name(args.folders[label], prompt, k) for prompt, (_, k) in zip(prompts, batch)]
            paths = [image_path(cache.out, name) for name in names]
            pixels = None
            if not all(path.exists() for path in paths):
                index = [f"{prompt.id}/{k}" for prompt, (_, k) in zip(prompts, batch)]  # the noise: of this alone
                noise = common.sample_noise(args.seed, "eval", index, grid.steps, policy.latent_shape, policy.device)
                part = cond[[p for p, _ in batch]]
                path = common.rollout(policy, grid, part, prompts, noise, args.cfg, len(batch), desc="")
                images = policy.decode(path.x[:, -1])
                if not images.isfinite().all():
                    raise SystemExit(
                        f"eval.py: stopped: {label} gives NaN images in {policy.dtype}; try --dtype float32"
                    )
                pixels = (images.clamp(0, 1) * 255).round().byte().cpu()
                for image, file in zip(pixels, paths):
                    save_image(image, file)
                cache.drawn += len(batch)
            keys = {r: [score_key(args, r, prompt) for prompt in prompts] for r in args.reward_names}
            if any((n, r, k) not in cache.scores for r, of in keys.items() for n, k in zip(names, of)):
                images = torch.stack([read_image(path) for path in paths]) if pixels is None else pixels.float() / 255
                texts, extra = [p.text for p in prompts], [p.metadata for p in prompts]
                _, terms = reward(images.to(args.device), texts, extra, chunk=args.reward_batch_size)
                found = {r: value.double().tolist() for r, value in terms.items()}
                add_scores(cache, [(n, r, k, s) for r in found for n, k, s in zip(names, keys[r], found[r])])
            bar.update(len(batch))


def diversity_name(args, label: str, prompt: common.Prompt) -> str:
    return f"{image_name(args.folders[label], prompt, 0)} x{args.images_per_prompt}"


def missing_diversity(args, cache: Cache) -> list[tuple[str, common.Prompt]]:
    key, pairs = args.reward_keys[args.diversity], [(m, p) for m in args.folders for p in args.prompt_list]
    return [(m, p) for m, p in pairs if (diversity_name(args, m, p), args.diversity, key) not in cache.scores]


def score_diversity(args, cache: Cache, measure) -> None:
    """measure(images (K, 3, H, W)) of each prompt and model that is not in the cache, into the cache."""
    for label, prompt in tqdm(missing_diversity(args, cache), desc=args.diversity, unit="prompt", disable=None):
        names = [image_name(args.folders[label], prompt, k) for k in range(args.images_per_prompt)]
        images = torch.stack([read_image(image_path(cache.out, name)) for name in names])
        value = measure(images.to(args.device))
        row = (diversity_name(args, label, prompt), args.diversity, args.reward_keys[args.diversity], value)
        add_scores(cache, [row])


def collect(args, cache: Cache) -> dict[str, dict[str, torch.Tensor]]:
    """{model: {reward: (P, K), diversity: (P, 1)}} float64, from the cache."""
    scores: dict[str, dict[str, torch.Tensor]] = {label: {} for label in args.folders}
    for label, folder in args.folders.items():
        for reward in args.reward_names:
            values = [
                [cache.scores[image_name(folder, prompt, k), reward, score_key(args, reward, prompt)]
                 for k in range(args.images_per_prompt)] for prompt in args.prompt_list
            ]  # fmt: skip
            scores[label][reward] = torch.tensor(values, dtype=torch.float64)
        if args.diversity != "none":
            key = args.reward_keys[args.diversity]
            values = [[cache.scores[diversity_name(args, label, p), args.diversity, key]] for p in args.prompt_list]
            scores[label][args.diversity] = torch.tensor(values, dtype=torch.float64)
    return scores


# ---- statistics -----------------------------------------------------------------------------------------------------
def mean_and_error(values: torch.Tensor, groups: list | None = None) -> tuple[float, float | None]:
    """Mean of (P,) and its standard error: std / sqrt(P), with P - 1 in the variance; None for a single value.

    Prompts that stand in the list more than once are one sample: with G distinct prompts, n_g lines each, the error
    is sqrt(G / (G - 1) sum_g (n_g (mean_g - mean))^2) / P, which is the same where all are distinct.
    """
    groups = list(range(len(values))) if groups is None else groups
    place = {g: i for i, g in enumerate(dict.fromkeys(groups))}
    index = torch.tensor([place[g] for g in groups])
    off = torch.zeros(len(place), dtype=torch.float64).index_add_(0, index, (values - values.mean()).double())
    error = (len(place) / (len(place) - 1) * (off**2).sum()).sqrt().item() / len(values) if len(place) > 1 else None
    return values.mean().item(), error


def summarise(scores: dict[str, dict[str, torch.Tensor]], groups: list | None = None) -> dict[str, dict[str, dict]]:
    """{model: {reward: (P, K)}} -> {model: {reward: mean, se; for a LoRA also its difference to base, and se}}."""
    summary: dict[str, dict[str, dict]] = {model: {} for model in scores}
    for model, terms in scores.items():
        for name, value in terms.items():
            entry = dict(zip(("mean", "se"), mean_and_error(value.mean(1), groups)))
            if model != "base":
                paired = (value - scores["base"][name]).mean(1)
                entry |= zip(("difference", "difference_se"), mean_and_error(paired, groups))
            summary[model][name] = entry
    return summary


def summarise_tags(scores, tags: list[str], groups: list) -> dict[str, dict[str, dict[str, dict]]]:
    """{tag: summary of its prompts}."""
    found = {}
    for tag in dict.fromkeys(tags):
        rows = [i for i, t in enumerate(tags) if t == tag]
        part = {model: {name: value[rows] for name, value in terms.items()} for model, terms in scores.items()}
        found[tag] = summarise(part, [groups[i] for i in rows])
    return found


def mean_over_tags(by_tag: dict, model: str, name: str) -> dict[str, float | None]:
    """One summary entry: the mean of the tags' means, whose errors are independent: sqrt(sum se^2) / tags."""
    entries = [summary[model][name] for summary in by_tag.values()]
    found = {}
    for value, error in (("mean", "se"), ("difference", "difference_se")):
        if value in entries[0]:
            found[value] = sum(e[value] for e in entries) / len(entries)
            errors = [e[error] for e in entries]
            found[error] = None if None in errors else sum(e**2 for e in errors) ** 0.5 / len(errors)
    return found


def table(summary: dict[str, dict[str, dict]]) -> str:
    """Markdown with aligned columns: for the terminal and results.md alike."""

    def cell(value, error, sign=""):
        return f"{value:{sign}.4f} ± " + ("-" if error is None else f"{error:.4f}")

    rows = [["", *summary["base"]]]
    for model, terms in summary.items():
        rows.append([model, *(cell(e["mean"], e["se"]) for e in terms.values())])
        if model != "base":
            differences = (cell(e["difference"], e["difference_se"], "+") for e in terms.values())
            rows.append([f"{model} - base", *differences])
    widths = [max(map(len, column)) for column in zip(*rows)]
    rows.insert(1, ["-" * w for w in widths])
    return "\n".join("| " + " | ".join(c.ljust(w) for c, w in zip(row, widths)) + " |" for row in rows)


def tables(summary, by_tag) -> str:
    """The summary, and for each reward that is averaged over tags a table of them."""
    parts = [table(summary)]
    for name in (n for n in summary["base"] if by_tag and n in MEAN_OVER_TAGS):
        columns = {m: {tag: s[m][name] for tag, s in by_tag.items()} | {"overall": summary[m][name]} for m in summary}
        parts.append(f"{name} by tag:\n\n{table(columns)}")
    return "\n\n".join(parts)


# ---- files ----------------------------------------------------------------------------------------------------------
def write_results(args, scores, summary, by_tag, note: str, dtype) -> None:
    """results.md, then results.json: once that is there, the folder is complete."""
    out, skip = Path(args.out), {"prompt_list", "command", "lora_files", "lora_targets", "folders", "key", "paths"}
    loras = {label: str(file.resolve()) for label, file in args.lora_files.items()}  # last -> epoch_NNNN
    per_prompt = [
        {"prompt": prompt.id, "text": prompt.text, "metadata": prompt.metadata,
         "mean": {m: {r: v[p].mean().item() for r, v in terms.items()} for m, terms in scores.items()},
         "images": {m: {r: terms[r][p].tolist() for r in args.reward_names} for m, terms in scores.items()},
         "files": {m: [f"images/{image_name(folder, prompt, k)}.png" for k in range(args.images_per_prompt)]
                   for m, folder in args.folders.items()}}
        for p, prompt in enumerate(args.prompt_list)
    ]  # fmt: skip
    settings = {k: v for k, v in vars(args).items() if k not in skip} | {"dtype": str(dtype).removeprefix("torch.")}
    files = "".join(f"- {label}: `{file}`\n" for label, file in loras.items())
    text = f"{tables(summary, by_tag)}\n\n{note}\n\n{files}\n```\n{args.command}\n```\n"
    write_text(out / "results.md", text)
    common.write_json(out / "results.json", {
        "note": note, "command": args.command, "key": args.key, "summary": summary, "tags": by_tag, "loras": loras,
        "settings": settings, "versions": common.versions(), "per_prompt": per_prompt,
    })  # fmt: skip


def write_text(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def draw_grid(args, path: Path) -> None:
    """Before and after side by side for one LoRA; otherwise a row for each model, a column for each prompt."""
    prompts, texts = args.prompt_list[: args.grid_prompts], [p.text for p in args.prompt_list[: args.grid_prompts]]
    shown = {label: [read_image(image_path(path.parent, image_name(folder, prompt, 0))) for prompt in prompts]
             for label, folder in args.folders.items()}  # fmt: skip
    if len(shown) == 2:
        pairs = [image for pair in zip(*shown.values()) for image in pair]
        common.image_grid(torch.stack(pairs), texts, path, columns=min(4, len(texts)), pairs=True)
    else:
        captions = [f"{label}: {text}" for label in shown for text in texts]
        common.image_grid(torch.stack(sum(shown.values(), [])), captions, path, columns=len(texts))


# ---- gallery.html: one page with everything in it -------------------------------------------------------------------
def data_uri(path: Path, side: int) -> str:
    """The image, at most `side` pixels per side: as it is up to 64 pixels (PNG), else WebP or, without it, JPEG."""
    from PIL import Image, features

    image = Image.open(path)
    if max(image.size) <= min(side, 64):
        return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
    image = image.convert("RGB")
    image.thumbnail((side, side), Image.LANCZOS)
    buffer, kind = io.BytesIO(), "webp" if features.check("webp") else "jpeg"
    image.save(buffer, format=kind, quality=85)
    return f"data:image/{kind};base64," + base64.b64encode(buffer.getvalue()).decode()


def fit_gallery(sizes: dict[int, float], prompts: int, per_prompt: int, models: int, budget: float):
    """(side, images per prompt, prompts) to show in `budget` bytes; sizes: {side: mean bytes of an image}, full first.

    In full if that fits; else thumbnails down to 256 pixels, then fewer images per prompt, then smaller thumbnails,
    then fewer prompts.
    """
    full = next(iter(sizes))
    large = [side for side in sizes if side >= min(256, full)]
    small = [side for side in sizes if side < large[-1]]
    ways = [(side, per_prompt) for side in large] + [(large[-1], k) for k in range(per_prompt - 1, 0, -1)]
    for side, k in ways + [(side, 1) for side in small]:
        if models * prompts * k * sizes[side] <= budget:
            return side, k, prompts
    side = [*large, *small][-1]
    return side, 1, max(1, int(budget / (models * sizes[side])))


def write_gallery(args, scores, summary, note: str, path: Path) -> None:
    """eval_gallery.html with the data put in: nothing else is needed to show it, no file and no network."""
    out, folders = path.parent, list(args.folders.values())
    every = [image_path(out, image_name(folders[0], prompt, 0)) for prompt in args.prompt_list]
    sample = every[:: max(1, len(every) // 8)][:8]
    full = max(read_image(sample[0]).shape)
    sides = [full, *(side for side in (768, 512, 384, 256, 192, 128, 96) if side < full)]
    sizes = {side: sum(len(data_uri(file, side)) for file in sample) / len(sample) for side in sides}
    budget = args.gallery_mb * 1e6
    side, per_prompt, prompts = fit_gallery(sizes, len(every), args.images_per_prompt, len(folders), budget)
    left = [f"{side} of {full} pixels"] * (side < full)
    left += [f"{per_prompt} of {args.images_per_prompt} images per prompt"] * (per_prompt < args.images_per_prompt)
    left += [f"{prompts} of {len(every)} prompts"] * (prompts < len(every))
    rows = []
    for p, prompt in enumerate(tqdm(args.prompt_list[:prompts], desc="gallery", unit="prompt", disable=None)):
        for k in range(per_prompt):
            files = [image_path(out, image_name(folder, prompt, k)) for folder in folders]
            rows.append({
                "prompt": prompt.id, "image": k, "text": prompt.text, "tag": str(prompt.metadata.get("tag", "")),
                "scores": [[scores[m][r][p, k].item() for r in args.reward_names] for m in args.folders],
                "pictures": [data_uri(file, side) for file in files],
            })  # fmt: skip
    title = [args.model, Path(args.panel).name] if args.panel else [args.model, *args.lora_files]
    data = {
        "title": " · ".join(title[:4]) + f" and {len(title) - 4} more" * (len(title) > 4),
        "left_out": f"Shown: {', '.join(left)}; the folder images/ has all in full." if left else "",
        "note": note, "command": args.command,
        "models": list(args.folders), "rewards": args.reward_names, "summary": summary, "side": side, "rows": rows,
    }  # fmt: skip
    text = json.dumps(data).replace("<", "\\u003c")  # no "</script>" in it
    write_text(path, (HERE / "eval_gallery.html").read_text(encoding="utf-8").replace("__DATA__", text))


# ---- panel: is the reward being hacked? -----------------------------------------------------------------------------
def panel_data(args, scores, summary, groups: list) -> dict:
    """Training reward and KL of every epoch, from metrics.csv; held-out scores and diversity of the checkpoints.

    `declines`: quantities that have fallen from their best checkpoint to the last one by more than two standard
    errors of the paired difference.
    """
    with (Path(args.panel) / "metrics.csv").open(newline="") as f:
        rows = [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(f)]
    training = {k: [[r["epoch"], r[k]] for r in rows if k in r] for k in ("reward/mean", "kl/ref")}
    models = list(args.folders)
    epochs = [0] + [int(file.parent.name.removeprefix("epoch_")) for file in args.lora_files.values()]
    held_out, declines = {}, {}
    for name in summary["base"]:
        entries = [summary[m][name] for m in models]
        held_out[name] = {k: [e.get(k) for e in entries] for k in ("mean", "se", "difference", "difference_se")}
        best = max(range(len(models)), key=held_out[name]["mean"].__getitem__)
        fall, error = mean_and_error((scores[models[best]][name] - scores[models[-1]][name]).mean(1), groups)
        if best < len(models) - 1 and error is not None and fall > 2 * error:
            declines[name] = {"best_epoch": epochs[best], "fall": fall, "fall_se": error}
    trained = json.loads((Path(args.panel) / "args.json").read_text())["args"]["reward"]
    return {"run": Path(args.panel).name, "reward": trained, "epochs": epochs, "training": training,
            "held_out": held_out, "declines": declines}  # fmt: skip


def draw_panel(data: dict, trained: list[str], path: Path) -> None:
    """One axis each: training reward, every held-out score, diversity, KL; the base model's value dashed.

    The bars are the standard errors of the paired differences to the base model.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(data["held_out"])
    kl = data["training"]["kl/ref"]
    count = 1 + len(names) + bool(kl)
    wide = min(3, count)
    high = -(-count // wide)
    figure, axes = pyplot.subplots(high, wide, figsize=(4.2 * wide, 2.9 * high), sharex=True, squeeze=False)
    axes = axes.flatten()
    x, y = zip(*data["training"]["reward/mean"])
    smooth = [y[0]]
    for value in y[1:]:
        smooth.append(0.9 * smooth[-1] + 0.1 * value)
    axes[0].plot(x, y, color="tab:blue", alpha=0.3)
    axes[0].plot(x, smooth, color="tab:blue")
    axes[0].set_title(f"training reward: {data['reward']}", fontsize=10)
    for axis, name in zip(axes[1:], names):
        values = data["held_out"][name]
        colour = "tab:blue" if name in trained else "tab:orange"
        axis.axhline(values["mean"][0], color="gray", linestyle="--", linewidth=1)
        errors = [se or 0 for se in values["difference_se"]]  # of the base: none
        axis.errorbar(data["epochs"], values["mean"], errors, color=colour, marker="o", capsize=3)
        title = f"{name}, held-out prompts" + " (trained on)" * (name in trained)
        if name in data["declines"]:
            axis.axvspan(data["declines"][name]["best_epoch"], data["epochs"][-1], color="tab:red", alpha=0.12)
            title += "\nfalls after its best checkpoint"
        axis.set_title(title, fontsize=10)
    if kl:
        axes[count - 1].plot(*zip(*kl), color="tab:purple")
        axes[count - 1].set_title("KL to the base model, training rollouts (kl/ref)", fontsize=10)
    for axis in axes[:count]:
        axis.grid(alpha=0.3)
        axis.set_xlabel("epoch")
        axis.tick_params(labelbottom=True)
    for axis in axes[count:]:
        axis.remove()
    bars = "bars: ± standard error of the difference to the base model, same noise"
    figure.suptitle(f"{data['run']}: does the training reward rise at the cost of the rest?   ({bars})", fontsize=10)
    figure.tight_layout()
    temporary = path.with_suffix(".tmp.png")
    figure.savefig(temporary, dpi=120)
    pyplot.close(figure)
    temporary.replace(path)


# ---- main -----------------------------------------------------------------------------------------------------------
def main(args):
    # ---- 1 what is there already ------------------------------------------------------------------------------------
    out, device = Path(args.out), torch.device(args.device)
    dtype, reason = common.pick_dtype(args.dtype, device)
    print(f"model {args.model}  device {device}  dtype {dtype} ({reason})")
    print(f"kernel {args.kernel} ({args.noise_level})  steps {args.steps}  cfg {args.cfg}  seed {args.seed}")
    cache = open_cache(out)
    wanted = {label: missing(args, cache, label) for label in args.folders}
    to_draw, to_score = sum(n for n, _ in wanted.values()), set().union(*(of for _, of in wanted.values()))
    total = len(args.folders) * len(args.prompt_list) * args.images_per_prompt
    print(f"folder {out}  images {total}, of which {total - to_draw} are there")

    # ---- 2 the model, the LoRAs checked against it, the rewards, as far as they are needed --------------------------
    reward = measure = policy = grid = cond = None
    if to_draw:
        policy = common.Policy(args, common.Run(out, device, dtype, rank=0, world=1))
        names = {label: set(check_lora(label, file, policy.net)) for label, file in args.lora_files.items()}
        grid = common.make_grid(policy.pipe.scheduler, policy.kind, args.steps, args.kernel, args.noise_level)
        cond = policy.encode([p.text for p in args.prompt_list])
    if to_score:
        asked = args.reward_names if "" in args.paths else sorted(to_score)  # a path without a name fits one of all
        paths = {name: path for name, path in args.paths.items() if name in ("", *asked)}
        reward = rewards.load(",".join(asked), device, torch.float32, paths)
    if args.diversity != "none" and missing_diversity(args, cache):
        measure = rewards.load_diversity(args.diversity, device, args.paths.get(args.diversity))
    out.mkdir(parents=True, exist_ok=True)

    # ---- 3 images and scores: base without any adapter, then each LoRA, taken out again before the next -------------
    try:
        for label, (images, of) in wanted.items():
            if images and label != "base":
                load_lora(policy, args.lora_files[label], names[label])
            if images or of:
                draw_and_score(policy, grid, cond, reward, args, cache, label)
            if images and label != "base":
                policy.pipe.unload_lora_weights()

        # ---- 4 diversity within each prompt -------------------------------------------------------------------------
        if measure is not None:
            score_diversity(args, cache, measure)
    except rewards.RewardError as problem:
        raise SystemExit(f"eval.py: stopped: {problem}") from None
    except OSError as problem:  # a full disk, say
        raise SystemExit(f"eval.py: stopped: {problem}; the same command goes on from there") from None
    except KeyboardInterrupt:
        print(f"\nthe images so far are in {out}; the same command goes on from there", file=sys.stderr)
        raise
    print(f"drawn {cache.drawn} images, {cache.scored} scores; the rest was there")

    # ---- 5 statistics over prompts ----------------------------------------------------------------------------------
    scores, groups = collect(args, cache), [p.text for p in args.prompt_list]
    summary, tags = summarise(scores, groups), [p.metadata.get("tag") for p in args.prompt_list]
    by_tag = summarise_tags(scores, tags, groups) if all(tags) else {}
    for model, terms in summary.items():
        terms |= {name: mean_over_tags(by_tag, model, name) for name in terms if by_tag and name in MEAN_OVER_TAGS}

    # ---- 6 files and the table --------------------------------------------------------------------------------------
    distinct = f" ({len(set(groups))} distinct)" if len(set(groups)) < len(groups) else ""
    count = f"{len(groups)} prompts{distinct} x {args.images_per_prompt} images"
    note = f"{count}, same noise; ± standard error over prompts"
    if by_tag:
        note += "".join(f"; {n}: mean over {len(by_tag)} tags" for n in MEAN_OVER_TAGS if n in args.reward_names)
    if args.grid_prompts:
        draw_grid(args, out / "grid.png")
    if args.gallery_mb:
        write_gallery(args, scores, summary, note, out / "gallery.html")
    if args.panel:
        panel = panel_data(args, scores, summary, groups)
        draw_panel(panel, [name for name, _ in rewards.parse_spec(panel["reward"])], out / "panel.png")
        common.write_json(out / "panel.json", panel)
        for name, d in panel["declines"].items():
            print(f"note: {name} falls by {d['fall']:.4f} ± {d['fall_se']:.4f} after epoch {d['best_epoch']}")
    write_results(args, scores, summary, by_tag, note, dtype)
    print(f"{tables(summary, by_tag)}\n{note}")
    for file in ("results.json", "gallery.html", "panel.png"):
        if (out / file).exists():
            print(f"{file:13s} {out / file}")


if __name__ == "__main__":
    common.run_main(main, parse_args, rewards.UsageError)
