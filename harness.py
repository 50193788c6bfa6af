"""The run side of the five trainers: what no paper mentions.  Run folder, processes, log, held-out evaluation, resume;
the flags and their checks are in arguments.py.  Nothing here knows a method.

A trainer's main() is: start(), make_optimiser(), Recorder(...), and between recorder.epochs() and recorder.end_epoch()
the paper's algorithm.
"""

import csv
import json
import math
import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
import uuid
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

import checkpoints
import common
import pictures
from arguments import (  # noqa: F401  (a trainer knows harness alone)
    DERIVED,
    HERE,
    MODELS,
    NOISE_LEVEL,
    SHARED,
    TINY,
    UNKNOWN,
    add_args,
    check_group,
    check_limits,
    check_lora_targets,
    check_model,
    check_updates,
    find_model,
    finished,
    flags,
    latent_size,
    load_prompts,
    lora_targets,
    make_parser,
    need,
    need_writable,
    network_passes,
    parse,
    require_hub,
    rollout_memory,
    use_model,
    warn_of_clip_range,
)  # fmt: skip
from checkpoints import complete, write_json
from common import UsageError, all_reduce, gather

INIT = "init_lora.safetensors"  # a run's copy of --init-lora

WATCHED = 32  # transitions of an epoch and held-out images whose distance to the reference is for the log alone
# how far a log ratio may be from 0 at the start by rounding alone, some ten times what was measured: docs/vmpo.md
ROUNDING = {torch.float32: 1e-4, torch.float16: 3e-4, torch.bfloat16: 3e-3}


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
    if args.init_lora:
        shutil.copy(checkpoints.lora_file(args.init_lora), run.dir / INIT)
    write_args(args, run)  # last: with it the folder is a run


def write_args(args, run: Run) -> None:
    write_json(run.dir / "args.json", {"method": run.method, "args": plain(args), "sources": args.sources})


def plain(args) -> dict:
    """The flags and what follows from them, without the objects."""
    return {k: v for k, v in vars(args).items() if k not in DERIVED}


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
def start(args, method: str, rewards):
    """Run, policy, its adapter's weights theta, and (the reward, one more for evaluations or None)."""
    run = setup(args, method)
    policy = load_policy(args, run)
    return run, policy, add_lora(policy, args), rewards.load_args(args, run.device)


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
    theta = common.add_lora(policy, lora_targets(args), args.lora_rank, args.lora_alpha, args.seed)
    if args.init_lora:
        from safetensors.torch import load_file

        file = Path(args.run_dir) / INIT if args.resume else checkpoints.lora_file(args.init_lora)
        problem = common.import_lora(policy, load_file(file))
        need(not problem, f"--init-lora {args.init_lora}: {problem}", "use that run's --model and --lora-targets")
    return theta


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
        self._open(args)

    def _open(self, args) -> None:
        """TensorBoard and wandb, both with the settings."""
        from torch.utils.tensorboard import SummaryWriter
        from torch.utils.tensorboard.summary import hparams

        run, settings = self.run, {"method": self.run.method} | plain(args)
        self.board = SummaryWriter(run.dir, purge_step=run.start_epoch + 1 if run.start_epoch else None)
        simple = {k: v if isinstance(v, (bool, int, float, str)) else str(v) for k, v in settings.items()}
        *start, self.end = hparams(simple, {"eval/reward": 0, "reward/mean": 0})
        for summary in start:
            self.board.file_writer.add_summary(summary)
        self.board.add_text("settings", "\n".join(f"    {k}: {v}" for k, v in settings.items()), run.start_epoch)
        if args.wandb:
            import wandb

            known = run.dir / "wandb_id.txt"  # not the folder's name: two projects' folders may share it
            if not known.exists():
                known.write_text(uuid.uuid4().hex)
            where = dict(project=args.wandb, name=run.dir.name, dir=run.dir, id=known.read_text())
            try:
                self.wandb = wandb.init(**where, resume="allow", config=settings)
            except Exception as problem:  # no account, no network: its own errors
                said = " ".join(str(problem).split())[:200]
                advice = "log in, set WANDB_MODE=offline, or leave it out"
                raise UsageError(f"--wandb {args.wandb}: {said}; {advice}") from None

    def image(self, epoch: int, name: str, path: Path) -> None:
        """A picture of the run folder."""
        if not self.run.is_main or not path.exists():
            return
        self.board.add_image(name, pictures.read_images([path])[0], epoch)
        if self.wandb:
            import wandb

            self.wandb.log({name: wandb.Image(str(path))}, step=epoch)

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
            self.board.file_writer.add_summary(self.end)
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
        path = self.run.dir / "samples" / f"epoch_{epoch:04d}.png"
        pictures.image_grid(images[: len(first)], texts, path)
        self.logger.image(epoch, "samples", path)

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
    about |= {"init_lora": args.init_lora} if args.init_lora else {}
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
        if path.suffix == ".png":
            logger.image(args.epochs, path.stem, path)
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
