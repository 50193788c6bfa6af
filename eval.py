"""Rewards of a model without and with LoRAs, on the same noise: mean, standard error, paired difference, gallery.

Protocol: K images of every prompt (VMPO, App. D: 100 x 10); their scores are averaged first, because they
       are not independent of each other: the sample is the P prompts, mean and std / sqrt(P).  Base and LoRA
       draw from the same noise, a function of (seed, prompt, image), so their difference is paired, too.
Resume: images and scores are named after all they depend on; the same command goes on where it was stopped.
Run:   python eval.py --preset tiny --lora runs/NAME             # embedded model, CPU, minutes
       python eval.py --preset vmpo-table1 --lora runs/NAME/checkpoints/last OTHER.safetensors
       python eval.py --panel runs/NAME                          # is the reward being hacked?
       python eval.py --sweep 'runs/vmpo_*'                      # runs' own curves, the seeds of a setting together
Every preset, file and key: docs/eval.md.
"""

import os

os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # before torch: on a busy CPU, threads that spin on cost ten times

import csv
import hashlib
import importlib.util
import inspect
import json
import re
import shlex
import sys
from pathlib import Path

import huggingface_hub
import safetensors.torch
import torch
from tqdm import tqdm

import checkpoints
import common
import eval_files
import eval_runs
import harness
import pictures
import rewards
from common import LORA_FILE
from eval_files import OVER_TAGS, digest
from harness import need

SD35 = dict(model="sd3.5-medium", images_per_prompt=1, steps=40, cfg=4.5, max_sequence_length=128)
TINY = dict(
    prompts="prompts/shapes_heldout.txt", rewards="shapes,shapes-strict", diversity="diversity-clip",
    images_per_prompt=4, cfg=1.0, steps=10, max_sequence_length=10,
    batch_size=64, decode_batch_size=64, reward_batch_size=256,
)  # fmt: skip
RSM = dict(prompts="prompts/geneval_official.jsonl", rewards="hpsv2", diversity="dreamsim", images_per_prompt=4)
PRESETS = {
    # VMPO Tables 1 and 2: SD1.5, 100 prompts x 10 images; the protocol of soc-fine-tuning-sd
    "vmpo-table1": dict(model="sd15", prompts="prompts/benchmark_ir.txt", rewards="hpsv2,imagereward,clipscore",
                        diversity="dreamsim", images_per_prompt=10, steps=50, cfg=5.0),
    # VMPO Table 3, AWM Table 2: text rendering, the 1,018 test prompts of Flow-GRPO
    "sd35-ocr": SD35 | dict(prompts="prompts/ocr_test.txt", rewards="ocr"),
    # AWM Table 1: 553 prompts x 4 images, the mean of the six tags
    "geneval": SD35 | dict(prompts="prompts/geneval_official.jsonl", rewards="geneval", images_per_prompt=4),
    # AWM Table 2: Pick-a-Pic's test prompts of Flow-GRPO
    "pickscore": SD35 | dict(prompts="", rewards="pickscore"),
    # VMPO Table 3's check against hacking; add DeQA and UnifiedReward, which need servers
    "drawbench": SD35 | dict(prompts="", rewards="aesthetic,imagereward,pickscore"),
    # RSM Fig. 5 and 7: HPSv2.1 and diversity on GenEval's test prompts, each model as it was trained
    "rsm-hpsv2-sd35": SD35 | RSM | dict(resolution=1024, steps=20, cfg=5.0, max_sequence_length=256),
    "rsm-hpsv2-sd15": RSM | dict(model="sd15", steps=50, cfg=5.0),
    # DPG-Bench: 1,065 prompts x 4 images, asked about by a served vision-language model
    "dpg-bench": SD35 | dict(prompts="", rewards="dpg", images_per_prompt=4, max_sequence_length=256),
    # HPDv2's test prompts as in MixGRPO
    "hpdv2-test": dict(model="sd15", prompts="prompts/hpdv2_test400.txt", rewards="hpsv2", images_per_prompt=1),
    "tiny": TINY | dict(model="tiny-sd35"),
    "tiny-sd15": TINY | dict(model="tiny-sd15"),
}  # fmt: skip
# AWM and NFT train without guidance, and their codes evaluate so: a LoRA of theirs belongs here
PRESETS |= {f"{name}-nocfg": PRESETS[name] | dict(cfg=1.0) for name in ("sd35-ocr", "geneval", "pickscore")}
MISSING = {
    "drawbench": "DrawBench's prompts come without a licence (where to get them: prompts/README.md)",
    "pickscore": "Pick-a-Pic's prompts are unfiltered text of users (2,048: Flow-GRPO's dataset/pickscore/test.txt)",
    "dpg-bench": "DPG-Bench's questions are not shipped (python -m judges.questions dpg_bench.csv dpg_bench.jsonl)",
}
MISSING["pickscore-nocfg"] = MISSING["pickscore"]
# steps and cfg where neither flag nor preset says
SAMPLER = {common.SD15: (50, 5.0), common.SD35: (40, 4.5), common.Flux: (28, 3.5)}


# ---- flags and their checks --------------------------------------------------
def parse_args(argv=None):
    parser = harness.make_parser(__doc__, "eval")
    flag = harness.flags(parser, "what is compared")
    flag("--lora", [], "text", "LoRAs: run folders, checkpoints or files", nargs="*", metavar="PATH")
    flag("--panel", "", "text", "a run's checkpoints: is its reward hacked?", metavar="RUN")
    flag("--sweep", [], "text", "held-out curves of runs, seeds together; draws no image", nargs="+", metavar="GLOB")
    flag("--checkpoints", 8, "int >= 1", "of --panel: at most so many, evenly spaced")
    flag("--prompts", "prompts/benchmark_ir.txt", "text", "comma-separated .txt or .jsonl files")
    flag("--num-prompts", None, "int >= 1", "P: the first P prompts; default all (paper: 100)")
    flag("--images-per-prompt", 10, "int >= 1", "K: images per prompt (paper: 10)")
    flag("--rewards", "hpsv2", "text", "names, comma-separated, each reported by itself")
    flag("--reward-path", [], "text", "local weights, also of --diversity", nargs="*", metavar="[NAME=]PATH")
    flag("--diversity", "none", ["none", *rewards.DIVERSITY], "of a prompt's K images (paper: dreamsim)")
    flag = harness.flags(parser, "sampling")
    flag("--steps", None, "int >= 2", "T; default 50 for SD1.5, 40 for SD3.5, 28 for FLUX (Flow-GRPO)")
    flag("--kernel", "ode", [*harness.NOISE_LEVEL], "ode = deterministic; others: the trainers'")
    flag("--noise-level", None, "float", "of a stochastic kernel; default: the trainers'")
    flag("--cfg", None, "float finite", "guidance; default 5 SD1.5, 4.5 SD3.5 (paper), 3.5 FLUX; 1 = off")
    flag("--resolution", None, "int >= 1", "pixels per side; default 512 for SD, else the model's")
    flag("--max-sequence-length", 256, "int >= 1", "T5 tokens of SD3.5 and FLUX; the embedded model: 10")
    flag("--seed", 0, "int", "of the noise")
    flag = harness.flags(parser, "model and performance")
    flag("--model", "sd15", "text", f"{', '.join(harness.MODELS)}, a hub id or a diffusers folder")
    flag("--t5", True, "yes/no", "load SD3.5's T5 text encoder (9.5 GB in bf16)")
    flag("--dtype", "auto", ["auto", "float32", "bfloat16", "float16"], "of the model")
    flag("--device", "auto", "text", "auto, cpu, cuda, cuda:N")
    flag("--batch-size", 8, "int >= 1", "images per forward pass: memory and speed only")
    flag("--decode-batch-size", 8, "int >= 1", "latents per VAE decode")
    flag("--reward-batch-size", 16, "int >= 1", "images per reward call")
    flag = harness.flags(parser, "output")
    flag("--preset", "", ["", *PRESETS], "a paper's protocol: top of the script; flags win")
    flag("--out", "", "text", "folder of all results; default evals/NAME_KEY")
    flag("--overwrite", False, "switch", "replace results of other settings in --out")
    flag("--grid-prompts", 16, "int >= 0", "prompts in grid.png, one image each; 0 = no grid")
    flag("--gallery-mb", 24, "float >= 0", "size of the images in gallery.html; 0 = no gallery")
    # what harness reads besides; once the prompts are encoded, the encoders leave the GPU
    parser.set_defaults(gradient_checkpointing=False, detach_uncond=False, lora_targets="attention")
    parser.set_defaults(offload_text_encoders=True, offload_rollout=False, vae_dtype="float32")
    parser.set_defaults(command=shlex.join(["python", "eval.py", *(sys.argv[1:] if argv is None else argv)]))
    try:
        first = parser.parse_args(argv)
        if first.sweep:
            eval_runs.check_sweep(parser, first)
            return first
        own = eval_runs.panel_defaults(first) if first.panel else eval_runs.lora_defaults(first)
        if first.preset:  # a protocol: with its sampler, which is deterministic
            own = {name: value for name, value in own.items() if name not in ("kernel", "noise_level")}
        parser.set_defaults(**own | PRESETS.get(first.preset, {}))
        args = parser.parse_args(argv)
        eval_runs.own_paths(args, first, own)
        harness.check_limits(parser, args)
        check_args(args)
        args.lora_files = find_loras(args)
        harness.check_model(args)
        make_keys(args)
        check_out(args)
    except (common.UsageError, rewards.UsageError) as problem:
        parser.error(str(problem))
    return args


def check_args(args) -> None:
    """All that can be wrong before a model is loaded; fills in defaults, prompt_list, reward_names, paths."""
    harness.use_model(args)
    kernels = args.backbone.kernels
    wrong = f"--kernel {args.kernel} does not fit --model {args.model}"
    need(args.kernel in kernels, f"{wrong}; use {' or '.join(kernels)}")
    level = args.noise_level
    if args.kernel == "ode":
        need(not level, f"--noise-level {level} does nothing with --kernel ode; leave it out")
    elif level is not None:
        most = 1 if args.kernel in ("ddim", "ancestral", "cps") else float("inf")
        need(0 < level <= most, f"--noise-level {level} of {args.kernel} must be in (0, {most}]")
    args.noise_level = harness.NOISE_LEVEL[args.kernel] if level is None else level
    steps, cfg = SAMPLER[args.backbone]
    args.steps, args.cfg = args.steps or steps, cfg if args.cfg is None else args.cfg
    most = 500 if args.kind == "eps" else 1000
    need(args.steps <= most, f"--steps {args.steps} is too many for {args.model}, trained on 1000; use at most {most}")
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=args.device)
    except (RuntimeError, AssertionError) as problem:
        reason = str(problem).splitlines()[0]
        need(False, f"--device {args.device} cannot be used ({reason}); try --device cpu")
    given = args.prompts or args.preset not in MISSING
    need(given, f"--preset {args.preset}: {MISSING.get(args.preset)}; pass a file of them with --prompts")
    every, count = harness.load_prompts(args.prompts), args.num_prompts
    need(not count or count <= len(every), f"--num-prompts {count} is too many; --prompts has only {len(every)}")
    args.prompt_list = every[:count]
    need("=" not in args.rewards, f"--rewards {args.rewards} has weights; drop them: nothing is summed")
    args.reward_names = [name for name, _ in rewards.parse_spec(args.rewards)]
    args.paths = rewards.parse_paths(args.reward_path)
    texts, metadata = [p.text for p in args.prompt_list], [p.metadata for p in args.prompt_list]
    rewards.check(args.rewards, args.paths, texts, metadata)
    same = f"--rewards {args.rewards} compares the images of one model with each other, which says nothing of it"
    need(not rewards.is_grouped(args.rewards), f"{same}; leave it out")
    if args.diversity != "none":
        from judges.diversity import check_diversity

        need(args.images_per_prompt > 1, f"--images-per-prompt 1 has no --diversity {args.diversity}; use 2 or more")
        if args.diversity == "diversity-clip" and args.model.startswith("tiny-"):
            args.paths = {"diversity-clip": str(harness.HERE / "tiny" / "clip")} | args.paths
        check_diversity(args.diversity, args.paths.get(args.diversity))


def check_out(args) -> None:
    """args.out can be written, and holds no results of other settings without --overwrite."""
    name = Path(args.panel).name or next(iter(args.lora_files), Path(args.model).name)
    out = Path(args.out or f"evals/{name.replace('/', '_')}_{args.key}")
    results = out / "results.json"
    try:
        other = results.exists() and json.loads(results.read_text())["key"] != args.key
    except (OSError, ValueError, KeyError, TypeError):
        other = True
    what = f"--out {out} holds results of other settings"
    need(args.overwrite or not other, f"{what}; choose another folder, or give --overwrite")
    harness.need_writable("--out", out)
    args.out = str(out)


# ---- LoRAs -------------------------------------------------------------------
def fits(lora: str, condition, problem: str) -> None:
    need(condition, f"--lora {lora} does not fit the model: {problem}; pass the one it was trained on")


def find_loras(args) -> dict[str, Path]:
    """{label: file}, with a look at the names in each file before minutes go into loading a model."""
    part, found = args.backbone.part, {}
    for given in args.lora:
        file = checkpoints.lora_file(Path(given).absolute())
        need(file, f"--lora {given}: no {LORA_FILE} there; give a trainer's run folder or checkpoint")
        try:
            names = safetensors.safe_open(file, "pt").keys()
        except (safetensors.SafetensorError, OSError) as problem:
            need(False, f"--lora {given}: {file} is no readable safetensors file ({problem})")
        odd = [name for name in names if not re.fullmatch(rf"{part}\..+\.lora_[AB]\.weight", name)]
        what = f"it has {odd[0] if odd else 'nothing'}, expected is {part}.LAYER.lora_A.weight and .lora_B.weight"
        fits(given, names and not odd, what)
        # its label: RUN for a run's last checkpoint, RUN/epoch_0010 for another one, else folder or file
        where = file.parent if file.name == LORA_FILE else file.with_suffix("")
        label = where.name
        if where.parent.name == "checkpoints" and not args.panel:  # of a panel the run is known
            label = where.parent.parent.name + ("" if label == "last" else f"/{label}")
        while label in found or label == "base":
            label += "'"
        found[label] = file
    return found


def check_lora(label: str, file: Path, net: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The file's weights, {name in net: tensor}; UsageError unless each has its place in net."""
    kinds = (torch.nn.Linear, torch.nn.Conv2d)
    layers = {name: tuple(m.weight.shape) for name, m in net.named_modules() if isinstance(m, kinds)}
    weights = {key.split(".", 1)[1]: value for key, value in safetensors.torch.load_file(file).items()}
    for layer in dict.fromkeys(key.rpartition(".lora_")[0] for key in weights):
        fits(label, layer in layers, f"the model has no layer {layer}")
        down, up = (weights.get(f"{layer}.lora_{x}.weight") for x in "AB")
        fits(label, down is not None and up is not None, f"{layer} has only one of lora_A and lora_B")
        fits(label, up.ndim > 1 and down.ndim > 1, f"lora_B and lora_A of {layer} are no matrices")
        same = (up.shape[0], *down.shape[1:]) == layers[layer] and up.shape[1] == down.shape[0]
        sizes = f"{tuple(up.shape)} and {tuple(down.shape)}, the layer itself is {layers[layer]}"
        fits(label, same, f"lora_B and lora_A of {layer} are {sizes}")
        floats = up.is_floating_point() and down.is_floating_point()
        kind = f"{layer} has rank {len(down)} and {up.dtype}; expected are floats of rank 1 or more"
        fits(label, floats and len(down), kind)
        fits(label, up.isfinite().all() and down.isfinite().all(), f"{layer} has NaN or infinite values")
    return weights


def load_lora(policy, label: str, file: Path) -> None:
    """pipe.load_lora_weights, as users do it, in place of the LoRA before."""
    from peft.utils import get_peft_model_state_dict

    policy.pipe.unload_lora_weights()
    given = check_lora(label, file, policy.net)
    policy.pipe.load_lora_weights(file.parent, weight_name=file.name, adapter_name="evaluated")
    found = get_peft_model_state_dict(policy.net, adapter_name="evaluated")  # what it does not know, it left out
    fits(label, found.keys() == given.keys(), f"diffusers took {len(found)} of its {len(given)} weights")


# ---- names made of all that an image or a score depends on -------------------
def file_digest(path: str | Path) -> str:
    return hashlib.blake2b(Path(path).read_bytes(), digest_size=16).hexdigest()


def identity(path: str) -> list:
    """What tells files and folders apart: content up to 16 MB a file, else size and time of change."""
    root, found = Path(path), []
    for file in sorted(p for p in root.rglob("*") if p.is_file()) or [root]:
        size, time = (stat := file.stat()).st_size, stat.st_mtime_ns
        found.append([str(file.relative_to(root)), file_digest(file) if size <= 2**24 else [size, time]])
    return found


def model_identity(args) -> list:
    """Content of a model folder, or the commit of a model on the hub."""
    if Path(args.model_path).is_dir():
        return identity(args.model_path)
    index = huggingface_hub.hf_hub_download(args.model_path, "model_index.json")
    return [args.model_path, Path(index).parent.name]


def code_of(reward: str) -> list[str]:
    """What computes a reward: its own file, the judges that this names, and of rewards.py what every score passes."""
    place = "judges.diversity:" if reward in rewards.DIVERSITY else rewards.LOADERS.get(reward, reward)
    found = [inspect.getsource(f) for f in (rewards.eight_bit, rewards.pixels)]
    if callable(place):  # in rewards.py itself
        found.append(inspect.getsource(place))
        left, seen = re.findall(r"\b(tiny\.\w+):", found[-1]), []
    else:
        left, seen = [place.partition(":")[0]], []
    while left:
        seen.append(left.pop())
        code = Path(importlib.util.find_spec(seen[-1]).origin).read_text(encoding="utf-8")
        left += set(re.findall(r"^from (judges\.\w+) import", code, re.M)) - {*seen, *left}
    files = [file_digest(importlib.util.find_spec(name).origin) for name in sorted(seen)]
    return [digest(found), *files]


def make_keys(args) -> None:
    """args.folders {label: folder in images/}, args.reward_keys {reward: key}, args.key of it all."""
    dtype, _ = harness.pick_dtype(args.dtype, torch.device(args.device))
    shared = [model_identity(args), str(dtype), args.resolution, args.seed]
    shared += [args.steps, args.kernel, args.noise_level, args.cfg]
    if args.kind == "flow":
        shared += [args.max_sequence_length, args.t5]
    args.folders = {}
    for label, file in [("base", None), *args.lora_files.items()]:
        key = digest(shared, file_digest(file) if file else "")
        args.folders[label] = re.sub("[^A-Za-z0-9.-]+", "_", label) + f"-{key}"
    weights = {}
    for name in args.reward_names + [args.diversity] * (args.diversity != "none"):
        parts = (args.paths.get(name) or args.paths.get("", "")).split(",")
        weights[name] = [identity(part) if part and Path(part).exists() else part for part in parts]
        questions = re.findall(r"question=([^&,]+)", ",".join(parts))  # a judge's address may name one
        weights[name] += [file_digest(file) for file in questions]
    # not part of args.key: after a change in a reward's code the same folder's images are scored again
    args.reward_keys = {name: digest(name, found, code_of(name)) for name, found in weights.items()}
    prompts = [[p.id, p.text, p.metadata] for p in args.prompt_list]
    args.key = digest(args.folders, weights, prompts, args.images_per_prompt)


# ---- images and scores -------------------------------------------------------
@torch.no_grad()
def draw(args, label: str, policy, grid, cond, files: list[Path]) -> None:
    """The images of one model; row r is image r % K of prompt r // K."""
    K, size = args.images_per_prompt, args.batch_size
    for start in tqdm(range(0, len(files), size), desc=label, disable=None):
        rows = range(start, min(start + size, len(files)))
        # one is missing, all are drawn: the same batches give the bits of a run that was never stopped
        if all(files[r].exists() for r in rows):
            continue
        # the noise depends on prompt and image alone: the same for base and LoRA, in any batch
        index = [f"{r // K}/{r % K}" for r in rows]
        noise = common.sample_noise(args.seed, "eval", index, grid.steps, policy.latent_shape, policy.device)
        path = common.rollout(policy, grid, cond[[r // K for r in rows]], noise, args.cfg, len(rows), desc="")
        images = policy.decode(path.x[:, -1])
        if not images.isfinite().all():
            raise SystemExit(f"eval.py: stopped: {label} gives NaN images in {policy.dtype}; try --dtype float32")
        for pixels, r in zip(rewards.pixels(images), rows):
            pictures.save_image(pixels, files[r])


def score(args, reward, measure, files: list[Path], ids: dict, scores: dict) -> None:
    """The scores of one model that are not there, and the diversity of each prompt's K images."""
    K, size, prompts = args.images_per_prompt, args.reward_batch_size, args.prompt_list
    for start in tqdm(range(0, len(files), size), desc="scores", disable=None):
        rows = range(start, min(start + size, len(files)))
        if all(ids[name][r] in scores for name in args.reward_names for r in rows):
            continue
        images = pictures.read_images([files[r] for r in rows])  # what the files hold: 8 bits
        texts, metadata = zip(*((prompts[r // K].text, prompts[r // K].metadata) for r in rows))
        _, terms = reward(images.to(args.device), texts, metadata)
        for name, values in terms.items():
            new = zip([ids[name][r] for r in rows], values.double().tolist())
            eval_files.add_scores(args, scores, dict(new))
    for p, of in enumerate(tqdm(ids.get(args.diversity, ()), desc="diversity", disable=None)):
        if of not in scores:
            images = pictures.read_images(files[p * K : (p + 1) * K])
            eval_files.add_scores(args, scores, {of: measure(images.to(args.device))})


# ---- statistics --------------------------------------------------------------
def mean_and_error(values: torch.Tensor, groups=None) -> tuple[float, float | None]:
    """Mean of (P,) and its standard error: std / sqrt(P), with P - 1 in the variance; None for a single value.

    Prompts that stand in the list more than once are one sample: with G distinct prompts, n_g lines each, the
    error is sqrt(G / (G - 1) sum_g (n_g (mean_g - mean))^2) / P, which is the same where all are distinct.
    """
    groups, values = groups or list(range(len(values))), values.double()
    place, mean = {group: i for i, group in enumerate(groups)}, values.mean()
    off = torch.bincount(torch.tensor([place[g] for g in groups]), values - mean)
    G = len(place)
    error = (G / (G - 1) * (off**2).sum()).sqrt().item() / len(values) if G > 1 else None
    return mean.item(), error


def summarise(scores: dict, groups=None) -> dict:
    """{model: {reward: (P, K)}} -> {model: {reward: mean, se; for a LoRA also its difference to base, and se}}."""
    summary = {model: {} for model in scores}
    for model, terms in scores.items():
        for name, value in terms.items():
            entry = dict(zip(("mean", "se"), mean_and_error(value.mean(1), groups)))
            if model != "base":
                paired = (value - scores["base"][name]).mean(1)
                entry |= zip(("difference", "difference_se"), mean_and_error(paired, groups))
            summary[model][name] = entry
    return summary


def summarise_tags(scores: dict, tags: list[str], groups: list) -> dict:
    """{tag: summary of its prompts}."""
    found = {}
    for tag in dict.fromkeys(tags):
        rows = [i for i, t in enumerate(tags) if t == tag]
        part = {model: {name: value[rows] for name, value in terms.items()} for model, terms in scores.items()}
        found[tag] = summarise(part, [groups[i] for i in rows])
    return found


def mean_over_tags(by_tag: dict, model: str, name: str) -> dict[str, float | None]:
    """One summary entry: the mean of the tags' means, whose errors are independent: sqrt(sum se^2) / tags."""
    entries, found = [summary[model][name] for summary in by_tag.values()], {}
    for value, error in (("mean", "se"), ("difference", "difference_se")):
        if value in entries[0]:
            errors = [e[error] for e in entries]
            found[value] = sum(e[value] for e in entries) / len(entries)
            found[error] = None if None in errors else sum(e**2 for e in errors) ** 0.5 / len(errors)
    return found


def statistics(args, scores) -> tuple[dict, dict, str]:
    """(summary, the same by tag, one sentence on what the numbers are)."""
    groups, tags = [p.text for p in args.prompt_list], [p.metadata.get("tag") for p in args.prompt_list]
    summary, distinct = summarise(scores, groups), len(set(groups))
    count = f"{len(groups)} prompts" + f" ({distinct} distinct)" * (distinct < len(groups))
    note = f"{count} x {args.images_per_prompt} images, same noise; ± standard error over prompts"
    by_tag = summarise_tags(scores, tags, groups) if all(tags) else {}
    if by_tag and OVER_TAGS in args.reward_names:
        note += f"; {OVER_TAGS}: mean over {len(by_tag)} tags"
        for model, terms in summary.items():
            terms[OVER_TAGS] = mean_over_tags(by_tag, model, OVER_TAGS)
    return summary, by_tag, note


def panel_data(args, scores, summary, groups: list) -> dict:
    """panel.json: reward and KL of the training, held-out scores of the checkpoints; declines: what falls from its
    best checkpoint to the last one by more than two standard errors of the paired difference.
    """
    run, models = Path(args.panel), list(args.folders)
    with (run / "metrics.csv").open(newline="") as f:
        rows = [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(f)]
    training = {k: [[r["epoch"], r[k]] for r in rows if k in r] for k in ("reward/mean", "kl/ref")}
    epochs = [0] + [int(file.parent.name.removeprefix("epoch_")) for file in args.lora_files.values()]
    held_out, declines = {}, {}
    for name in summary["base"]:
        entries = [summary[m][name] for m in models]
        held_out[name] = {k: [e.get(k) for e in entries] for k in ("mean", "se", "difference", "difference_se")}
        best = max(range(len(models)), key=held_out[name]["mean"].__getitem__)
        paired = scores[models[best]][name] - scores[models[-1]][name]
        fall, error = mean_and_error(paired.mean(1), groups)
        if epochs[best] < epochs[-1] and error is not None and fall > 2 * error:
            declines[name] = {"best_epoch": epochs[best], "fall": fall, "fall_se": error}
    found = dict(run=run.name, reward=args.trained_on, epochs=epochs, training=training)
    return found | dict(held_out=held_out, declines=declines)


# ---- main --------------------------------------------------------------------
def main(args):
    eval_runs.sweep(args) if args.sweep else evaluate(args)


def evaluate(args):
    # ---- 1 what is there already ---------------------------------------------
    out, device = Path(args.out), torch.device(args.device)
    dtype, reason = harness.pick_dtype(args.dtype, device)
    (files, ids), scores = eval_files.wanted(args), eval_files.load_scores(args)
    there = [file.exists() for of in files.values() for file in of]
    to_score = {name for terms in ids.values() for name, of in terms.items() if not scores.keys() >= set(of)}
    print(f"model {args.model}  device {device}  dtype {dtype} ({reason})  kernel {args.kernel}  steps {args.steps}")
    eval_runs.warn_of_differences(args)
    print(f"folder {out}  images {len(there)}, of which {sum(there)} are there")

    # ---- 2 the model, the LoRAs checked against it, the rewards, as far as they are needed
    policy = reward = measure = None
    if not all(there):
        policy = harness.load_policy(args, harness.Run(out, device, dtype, rank=0, world=1))
        for label, file in args.lora_files.items():
            check_lora(label, file, policy.net)
        grid = policy.grid(args.steps, args.kernel, args.noise_level)
        cond = policy.encode([p.text for p in args.prompt_list])
    if asked := [name for name in args.reward_names if name in to_score]:
        asked = args.reward_names if "" in args.paths else asked  # a path without a name fits one of all
        paths = {name: path for name, path in args.paths.items() if name in ("", *asked)}
        reward = rewards.load(",".join(asked), device, torch.float32, paths)
    if args.diversity in to_score:
        from judges.diversity import load_diversity

        measure = load_diversity(args.diversity, device, args.paths.get(args.diversity))
    out.mkdir(parents=True, exist_ok=True)

    # ---- 3 images, base before the LoRAs: without any adapter; then the scores of the files
    try:
        for label, of in files.items():
            if not all(file.exists() for file in of):
                if label != "base":
                    load_lora(policy, label, args.lora_files[label])
                draw(args, label, policy, grid, cond, of)
            score(args, reward, measure, of, ids[label], scores)

        # ---- 4 statistics over prompts ---------------------------------------
        found = {label: {} for label in ids}  # {model: {reward: (P, K), diversity: (P, 1)}}
        for label, (name, of) in [(label, item) for label, terms in ids.items() for item in terms.items()]:
            values = torch.tensor([scores[i] for i in of], dtype=torch.float64)
            found[label][name] = values.view(len(args.prompt_list), -1)
        summary, by_tag, note = statistics(args, found)

        # ---- 5 files and the table -------------------------------------------
        eval_files.write_pictures(args, files, found, summary, note)
        if args.panel:
            panel = panel_data(args, found, summary, [p.text for p in args.prompt_list])
            eval_files.draw_panel(panel, out / "panel.png")
            checkpoints.write_json(out / "panel.json", panel)
            for name, d in panel["declines"].items():
                print(f"note: {name} falls by {d['fall']:.4f} ± {d['fall_se']:.4f} after epoch {d['best_epoch']}")
        eval_files.write_results(args, files, found, summary, by_tag, note, dtype)
    except KeyboardInterrupt:
        print(f"\nthe images so far are in {out}; the same command goes on from there", file=sys.stderr)
        raise
    except (rewards.RewardError, OSError) as problem:  # OSError: a full disk, say
        raise SystemExit(f"eval.py: stopped: {problem}; the same command goes on from there") from None
    print(f"{eval_files.tables(summary, by_tag)}\n{note}", *sorted(out.glob("*.*")), sep="\n")


if __name__ == "__main__":
    harness.run_main(main, parse_args, rewards.UsageError)
