"""Rewards of a model without and with LoRAs, on the same noise: mean, standard error and paired difference.

Protocol: K images of every prompt (paper: 100 prompts x 10, arXiv 2602.12229, App. D).  The images of one prompt are
       not independent of each other, so the sample is the prompt: each reward is averaged over the prompt's images
       first; reported are the mean of these P values and its standard error std / sqrt(P).  Base and LoRA draw from
       the same noise, a function of (seed, prompt, image), so their difference is taken per prompt, and its standard
       error is that of the P differences: usually far smaller than the two errors side by side suggest.
Steps:  1 the model, the LoRAs checked against it, the rewards    2 images and scores: base, then each LoRA
       3 statistics over prompts                                  4 results.json, results.md, grid.png and the table
Run:   python eval.py --preset tiny --lora runs/NAME             # embedded model, CPU, minutes
       python eval.py --preset vmpo-table1 --lora runs/NAME/checkpoints/last OTHER.safetensors
       python eval.py --preset vmpo-table1                       # the base model alone
"""

import argparse
import os
import shlex
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

import common
import rewards

LORA_FILE = "pytorch_lora_weights.safetensors"
TINY = dict(prompts="prompts/shapes_heldout.txt", rewards="shapes,shapes-strict", images_per_prompt=4, cfg=1.0,
            steps=10, max_sequence_length=10, batch_size=64, decode_batch_size=64, reward_batch_size=256)  # fmt: skip
PRESETS = {
    # Table 1 of VMPO without its DreamSim diversity: SD1.5, 100 prompts x 10 images, CFG 5
    "vmpo-table1": dict(model="sd15", prompts="prompts/benchmark_ir.txt", rewards="hpsv2,imagereward,clipscore"),
    # the embedded models
    "tiny": TINY | dict(model="tiny-sd35"),
    "tiny-sd15": TINY | dict(model="tiny-sd15"),
}


def parse_args(argv=None):
    parser = common.make_parser(__doc__, "eval")
    yes_no, kernels = argparse.BooleanOptionalAction, sorted({k for of in common.KERNELS.values() for k in of})
    g = parser.add_argument_group("what is compared")
    g.add_argument("--lora", nargs="*", default=[], metavar="PATH", help="LoRAs: run folders, checkpoints or files")
    g.add_argument("--prompts", default="prompts/benchmark_ir.txt", help="comma-separated .txt or .jsonl files")
    g.add_argument("--num-prompts", type=int, help="P: only the first P prompts; default all (paper: 100)")
    g.add_argument("--images-per-prompt", type=int, default=10, help="K: images per prompt (paper: 10)")
    g.add_argument("--rewards", default="hpsv2", help="names, comma-separated, no weights: each is reported by itself")
    g.add_argument("--reward-path", nargs="*", default=[], metavar="[NAME=]PATH", help="local weights of the rewards")

    g = parser.add_argument_group("sampling")
    g.add_argument("--steps", type=int, help="T: sampler steps; default 50 for SD1.5, 40 for SD3.5 (Flow-GRPO: 40)")
    g.add_argument("--kernel", default="ode", choices=kernels, help="ode = deterministic; others: see the trainers")
    g.add_argument("--noise-level", type=float, help="of a stochastic kernel; default as in the trainers")
    g.add_argument("--cfg", type=float, help="guidance scale; default 5 for SD1.5, 4.5 for SD3.5 (paper); 1 = off")
    g.add_argument("--resolution", type=int, help="pixels per side; default 512 for SD1.5 and SD3.5, else the model's")
    g.add_argument("--max-sequence-length", type=int, default=256, help="T5 tokens of SD3.5; the embedded model: 16")
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
    g.add_argument("--out", default="", help="folder of the results; default evals/NAME_TIME, NAME of the first LoRA")
    g.add_argument("--overwrite", action="store_true", help="replace the results that --out holds")
    g.add_argument("--grid-prompts", type=int, default=16, help="prompts in grid.png, one image each; 0 = no grid")
    parser.set_defaults(**PRESETS.get(parser.parse_args(argv).preset, {}))
    args = parser.parse_args(argv)
    args.command = shlex.join(["python", "eval.py", *(sys.argv[1:] if argv is None else argv)])
    try:
        check_args(args)
        common.check_model(args)
    except (common.UsageError, rewards.UsageError) as problem:
        parser.error(str(problem))
    return args


def check_args(args) -> None:
    """What can be wrong before a model is loaded.  Fills in the model's defaults and the rest that Policy reads."""
    least = dict(num_prompts=1, images_per_prompt=1, steps=2, max_sequence_length=1, resolution=1, batch_size=1,
                 decode_batch_size=1, reward_batch_size=1, grid_prompts=0)  # fmt: skip
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
    args.prompt_list = common.load_prompts(args.prompts)
    if (args.num_prompts or 0) > len(args.prompt_list):
        have = f"--prompts has only {len(args.prompt_list)}"
        raise common.UsageError(f"--num-prompts {args.num_prompts} is too many, {have}; leave it out to take all")
    args.prompt_list = args.prompt_list[: args.num_prompts]
    if "=" in args.rewards:
        raise common.UsageError(f"--rewards {args.rewards} has weights, but each is reported by itself; drop the =...")
    rewards.check(args.rewards, rewards.parse_paths(args.reward_path), [p.text for p in args.prompt_list])
    args.lora_files = find_loras(args.lora, args.kind)
    name = next(iter(args.lora_files), Path(args.model).name).replace("/", "_")
    out = Path(args.out or f"evals/{name}_{time.strftime('%Y%m%d-%H%M%S')}")
    if (out / "results.json").exists() and not args.overwrite:
        raise common.UsageError(f"--out {out} holds results already; choose another folder, or give --overwrite")
    parent = next(p for p in [out.absolute(), *out.absolute().parents] if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise common.UsageError(f"--out {out} cannot be written ({parent} is not a writable folder); choose another")
    args.out = str(out)
    args.gradient_checkpointing, args.detach_uncond, args.lora_targets = False, False, "attention"  # of training only
    args.offload_text_encoders = True  # the prompts are encoded once; after that the GPU need not hold the encoders


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


def load_lora(policy, file: Path, weights: dict[str, torch.Tensor]) -> None:
    """pipe.load_lora_weights, as users do it; then nothing of the file may be missing from the network."""
    from peft.utils import get_peft_model_state_dict

    policy.pipe.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name="evaluated")
    if missing := set(weights) ^ set(get_peft_model_state_dict(policy.net, adapter_name="evaluated")):
        raise common.UsageError(f"{file}: diffusers did not load {len(missing)} of its weights, e.g. {min(missing)}")


# ---- images, scores, statistics -------------------------------------------------------------------------------------
@torch.no_grad()
def score(policy, grid, cond, reward, args, label: str) -> tuple[dict[str, torch.Tensor], list[torch.Tensor]]:
    """Scores {reward: (P, K)} float64, and image 0 of each of the first --grid-prompts prompts; all on the CPU."""
    rows = [(p, k) for p in range(len(args.prompt_list)) for k in range(args.images_per_prompt)]
    scores: dict[str, list[torch.Tensor]] = {term.name: [] for term in reward.terms}
    shown = []
    with tqdm(total=len(rows), desc=label, unit="image", disable=None) as bar:
        for start in range(0, len(rows), args.batch_size):
            batch = rows[start : start + args.batch_size]
            prompts = [args.prompt_list[p] for p, _ in batch]
            index = [f"{prompt.id}/{k}" for prompt, (_, k) in zip(prompts, batch)]  # the noise depends on this alone
            noise = common.sample_noise(args.seed, "eval", index, grid.steps, policy.latent_shape, policy.device)
            part = cond[[p for p, _ in batch]]
            path = common.rollout(policy, grid, part, prompts, noise, args.cfg, len(batch), desc="")
            images = policy.decode(path.x[:, -1])
            if not images.isfinite().all():
                raise SystemExit(f"eval.py: stopped: {label} gives NaN images in {policy.dtype}; try --dtype float32")
            texts, extra = [p.text for p in prompts], [p.metadata for p in prompts]
            _, terms = reward(images, texts, extra, chunk=args.reward_batch_size)
            for name, value in terms.items():
                scores[name].append(value.double().cpu())
            shown += [image.cpu() for image, (p, k) in zip(images, batch) if k == 0 and p < args.grid_prompts]
            bar.update(len(batch))
    return {name: torch.cat(v).view(-1, args.images_per_prompt) for name, v in scores.items()}, shown


def mean_and_error(values: torch.Tensor) -> tuple[float, float | None]:
    """Mean of (P,) and its standard error std / sqrt(P), with P - 1 in the variance; None for a single value."""
    return values.mean().item(), values.std().item() / len(values) ** 0.5 if len(values) > 1 else None


def summarise(scores: dict[str, dict[str, torch.Tensor]]) -> dict[str, dict[str, dict]]:
    """{model: {reward: (P, K)}} -> {model: {reward: mean, se; for a LoRA also its difference to base, and se}}."""
    summary: dict[str, dict[str, dict]] = {model: {} for model in scores}
    for model, terms in scores.items():
        for name, value in terms.items():
            entry = dict(zip(("mean", "se"), mean_and_error(value.mean(1))))
            if model != "base":
                paired = (value - scores["base"][name]).mean(1)
                entry |= zip(("difference", "difference_se"), mean_and_error(paired))
            summary[model][name] = entry
    return summary


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


def write_results(args, scores, summary, note: str, dtype) -> None:
    """results.md, then results.json: once that is there, the folder is complete."""
    out, skip = Path(args.out), ("prompt_list", "command", "lora_files", "lora_targets")
    loras = {label: str(file.resolve()) for label, file in args.lora_files.items()}  # last -> epoch_NNNN
    per_prompt = [
        {"prompt": prompt.id, "text": prompt.text,
         "mean": {m: {r: v[p].mean().item() for r, v in terms.items()} for m, terms in scores.items()},
         "images": {m: {r: v[p].tolist() for r, v in terms.items()} for m, terms in scores.items()}}
        for p, prompt in enumerate(args.prompt_list)
    ]  # fmt: skip
    settings = {k: v for k, v in vars(args).items() if k not in skip} | {"dtype": str(dtype).removeprefix("torch.")}
    files = "".join(f"- {label}: `{file}`\n" for label, file in loras.items())
    temporary = out / "results.md.tmp"
    temporary.write_text(f"{table(summary)}\n\n{note}\n\n{files}\n```\n{args.command}\n```\n", encoding="utf-8")
    temporary.replace(out / "results.md")
    common.write_json(out / "results.json", {
        "note": note, "command": args.command, "summary": summary, "loras": loras, "settings": settings,
        "versions": common.versions(), "per_prompt": per_prompt,
    })  # fmt: skip


def draw_grid(shown: dict[str, list[torch.Tensor]], texts: list[str], path: Path) -> None:
    """Before and after side by side for one LoRA; otherwise a row for each model, a column for each prompt."""
    if len(shown) == 2:
        pairs = [image for pair in zip(*shown.values()) for image in pair]
        common.image_grid(torch.stack(pairs), texts, path, columns=min(4, len(texts)), pairs=True)
    else:
        captions = [f"{label}: {text}" for label in shown for text in texts]
        common.image_grid(torch.stack(sum(shown.values(), [])), captions, path, columns=len(texts))


def main(args):
    # ---- 1 the model, the LoRAs checked against it, the rewards -----------------------------------------------------
    device = torch.device(args.device)
    dtype, reason = common.pick_dtype(args.dtype, device)
    print(f"model {args.model}  device {device}  dtype {dtype} ({reason})")
    print(f"kernel {args.kernel}  steps {args.steps}  cfg {args.cfg}  seed {args.seed}")
    policy = common.Policy(args, common.Run(Path(args.out), device, dtype, rank=0, world=1))
    for label, file in args.lora_files.items():
        check_lora(label, file, policy.net)
    reward = rewards.load(args.rewards, device, torch.float32, rewards.parse_paths(args.reward_path))
    grid = common.make_grid(policy.pipe.scheduler, policy.kind, args.steps, args.kernel, args.noise_level)
    texts = [p.text for p in args.prompt_list]
    cond = policy.encode(texts)

    # ---- 2 images and scores: base without any adapter, then each LoRA, taken out again before the next -------------
    scores, shown = {}, {}
    try:
        scores["base"], shown["base"] = score(policy, grid, cond, reward, args, "base")
        for label, file in args.lora_files.items():
            load_lora(policy, file, check_lora(label, file, policy.net))
            scores[label], shown[label] = score(policy, grid, cond, reward, args, label)
            policy.pipe.unload_lora_weights()
    except rewards.RewardError as problem:
        raise SystemExit(f"eval.py: stopped: {problem}") from None

    # ---- 3 statistics over prompts ----------------------------------------------------------------------------------
    summary = summarise(scores)

    # ---- 4 files and the table --------------------------------------------------------------------------------------
    note = f"{len(texts)} prompts x {args.images_per_prompt} images, same noise; ± standard error over prompts"
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    if args.grid_prompts:
        draw_grid(shown, texts[: args.grid_prompts], out / "grid.png")
    write_results(args, scores, summary, note, dtype)
    print(f"{table(summary)}\n{note}\nresults   {out}")


if __name__ == "__main__":
    common.run_main(main, parse_args, rewards.UsageError)
