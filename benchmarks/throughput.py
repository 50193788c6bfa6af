"""What a trainer's epoch costs beside the bare calls that it consists of: network, decoder, reward.

    python -m benchmarks.throughput tiny-sd15                         # all five trainers, embedded model
    python -m benchmarks.random_model sd3.5-medium /tmp/sd35 && \\
    python -m benchmarks.throughput /tmp/sd35 grpo vmpo --flags="--resolution 512 --cfg 4.5 --micro-batch-size 4"

Each trainer runs two epochs as from the command line, in a process of its own.  The calls of the second are counted
by kind and batch size, and then repeated bare in the same process: the network's forward pass, forward and backward,
the decoder, the reward.  A ratio of 1.03 says that a phase took 3 % more than its calls.  Seconds are the GPU's
(synchronised), or those of the processor, which other programs on the machine do not lengthen.
Results are added to the JSON file; the table is that of docs/speed.md (--table: print it from the file).
"""

import argparse
import datetime
import importlib
import json
import platform
import resource
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from unittest import mock

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import common  # noqa: E402
import harness  # noqa: E402
import rewards  # noqa: E402

SCRIPTS = ("vmpo", "grpo", "awm", "tempflow_rsm", "first_order_rsm")
PHASES = ("rollout", "reward", "update")
REWARD = f"--reward clipscore --reward-path {ROOT / 'tiny' / 'clip'}"  # differentiable, and there everywhere
QUIET = "--epochs 2 --eval-images 0 --eval-rewards= --sample-every 0 --save-every 0 --name run --runs"


def clock() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


class Tape:
    """The calls of each phase, by kind and size, and when it began."""

    def __init__(self):
        self.calls, self.marks, self.policy, self.scorer = Counter(), [], None, None

    def phase(self, recorder) -> None:
        self.marks.append((clock(), Counter(self.calls)))
        self.calls.clear()
        recorder.clock.append(time.time())

    def predict(self, real):
        def call(policy, x_t, timestep, cond, cfg):
            self.policy, frozen = policy, any(layer.disable_adapters for layer in policy.adapted[:1])
            guided = cfg != 1 and not policy.backbone.distilled
            self.calls["network", len(x_t), guided, torch.is_grad_enabled() and not frozen, frozen] += 1
            return real(policy, x_t, timestep, cond, cfg)

        return call

    def decode(self, real):
        def call(policy, x0):
            self.calls["decode", len(x0), torch.is_grad_enabled() and x0.requires_grad] += 1
            return real(policy, x0)

        return call

    def reward(self, real):
        def call(reward, images, texts, metadata=None, grad=False, chunk=None):
            self.scorer = reward
            self.calls["reward", len(images), tuple(images.shape[1:]), grad, chunk] += 1
            return real(reward, images, texts, metadata, grad, chunk)

        return call


def record(script: str, flags: list[str]) -> Tape:
    """Two epochs of the trainer under the tape; the marks of the second are the last four."""
    trainer, tape = importlib.import_module(script), Tape()
    with tempfile.TemporaryDirectory() as folder, mock.patch.multiple(
        harness.Recorder, phase=lambda recorder: tape.phase(recorder), finish=lambda *args: None,
        _save=lambda *args, **more: None,
    ), mock.patch.multiple(
        common.Policy, predict=tape.predict(common.Policy.predict), decode=tape.decode(common.Policy.decode)
    ), mock.patch.object(rewards.Reward, "__call__", tape.reward(rewards.Reward.__call__)):  # fmt: skip
        trainer.main(trainer.parse_args([*flags, *QUIET.split(), folder]))
    return tape


def bare(tape: Tape, call: tuple, repeat: int) -> float:
    """Median seconds of one such call by itself."""
    policy, device, (kind, count, *more) = tape.policy, tape.policy.device, call
    if kind == "network":
        guided, grad, frozen = more
        rows = count * (1 + guided)
        x = torch.randn(rows, *policy.latent_shape, device=device, dtype=policy.dtype)
        t, embeds = torch.full((rows,), 500.0, device=device), policy.uncond.embeds.expand(rows, -1, -1).clone()
        pooled = None if policy.uncond.pooled is None else policy.uncond.pooled.expand(rows, -1).clone()
        run = lambda: policy.backbone.forward(policy.net, x, t, embeds, pooled).float()  # noqa: E731
    elif kind == "decode":
        (grad,), frozen = more, False
        x = torch.randn(count, *policy.latent_shape, device=device, requires_grad=grad)
        run = lambda: policy.decode(x)  # noqa: E731
    else:
        (shape, grad, chunk), frozen = more, False
        x = torch.rand(count, *shape, device=device, requires_grad=grad)
        texts, metadata = ["a red circle above a blue square"] * count, [{}] * count
        run = lambda: tape.scorer(x, texts, metadata, grad=grad, chunk=chunk)[0]  # noqa: E731
    times = []
    for _ in range(repeat + 1):
        with policy.reference() if frozen else torch.set_grad_enabled(grad), torch.set_grad_enabled(grad):
            begin = clock()
            out = run()
            if grad:
                out.square().mean().backward()
            times.append(clock() - begin)
    return statistics.median(times[1:])


def measure(script: str, flags: list[str], repeat: int) -> dict:
    tape = record(script, flags)
    # before the bare calls, which are no part of the trainer
    cuda = torch.cuda.is_available()
    peak = torch.cuda.max_memory_allocated() if cuda else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    marks, costs, result = tape.marks[-4:], {}, {"peak_gib": round(peak / 2**30, 2)}
    for name, (begin, _), (end, calls) in zip(PHASES, marks, marks[1:]):
        for call in calls:
            costs[call] = costs.get(call) or bare(tape, call, repeat)
        ideal = sum(count * costs[call] for call, count in calls.items())
        result[name] = {"seconds": end - begin, "calls": ideal, "ratio": (end - begin) / ideal if ideal else None}
    update = marks[3][1]
    trained = sum(call[1] * count for call, count in update.items() if call[0] == "network" and call[3])
    scored = sum(call[1] * count for call, count in marks[2][1].items() if call[0] == "reward" and not call[3])
    seconds = marks[3][0] - marks[0][0]
    result |= {"images": scored, "images_per_s": scored / seconds, "seconds_per_epoch": seconds}
    result["transitions_per_s"] = trained / result["update"]["seconds"]
    result["call_ms"] = {" ".join(map(str, call)): 1000 * cost for call, cost in costs.items()}
    return result


def machine() -> dict:
    cuda, threads = torch.cuda.is_available(), torch.get_num_threads()
    name = torch.cuda.get_device_name() if cuda else f"{threads} thread(s) of a {platform.machine()} CPU"
    return {"device": name, "torch": torch.__version__, "date": datetime.date.today().isoformat()}


def table(results: list[dict]) -> str:
    """Markdown; seconds and ratio of each phase."""
    lines = ["| model | trainer | images/s | transitions/s | s/epoch | rollout | reward | update | peak GiB | on |"]
    lines.append("|---" * 10 + "|")
    for r in results:
        cell = lambda p: f"{p['seconds']:.1f} s" + (f" x{p['ratio']:.2f}" if p["ratio"] else "")  # noqa: E731
        speed = f"{r['images_per_s']:.2f} | {r['transitions_per_s']:.2f} | {r['seconds_per_epoch']:.1f}"
        phases, at = " | ".join(cell(r[name]) for name in PHASES), f"{r['device']}, {r['date']}"
        lines.append(f"| {r['model']} | `{r['script']}` | {speed} | {phases} | {r['peak_gib']} | {at} |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(prog="throughput", description=__doc__.split("\n")[0])
    parser.add_argument("model", nargs="?", help="a model of the trainers: a name or a folder")
    parser.add_argument("scripts", nargs="*", default=SCRIPTS, help="trainers; default all five")
    parser.add_argument("--flags", default="", help="more flags of the trainers")
    parser.add_argument("--label", help="the model's name in the table")
    parser.add_argument("--repeat", type=int, default=3, help="bare calls of each kind; their median counts")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "throughput.json")
    parser.add_argument("--table", action="store_true", help="print the file's table and end")
    args = parser.parse_args()
    results = json.loads(args.out.read_text()) if args.out.exists() else []
    if args.table or not args.model:
        print(table(results))
        return
    if len(args.scripts) > 1:  # each in a process of its own, whose peak memory is then its own
        more = [f"--flags={args.flags}", "--repeat", str(args.repeat), "--out", str(args.out)]
        more += ["--label", args.label] if args.label else []
        for script in args.scripts:
            command = [sys.executable, "-m", "benchmarks.throughput", args.model, script, *more]
            subprocess.run(command, cwd=ROOT, check=True)
        return
    script, embedded = args.scripts[0], args.model.startswith("tiny-")
    preset = "tiny" if harness.find_model(args.model)[1].kind == "flow" else "tiny-sd15"
    flags = ["--preset", preset, "--model", args.model, *REWARD.split(), *shlex.split(args.flags)]
    if not embedded:
        flags[2:2] = ["--lora-targets", "attention"]
    found = {"model": args.label or args.model, "script": script, "flags": args.flags} | machine()
    found |= measure(script, flags, args.repeat)
    keys = ("model", "script", "flags", "device")
    results = json.loads(args.out.read_text()) if args.out.exists() else []  # again: another may have written
    results = [r for r in results if any(r[k] != found[k] for k in keys)] + [found]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    harness.write_json(args.out, results)
    print(table([found]), flush=True)


if __name__ == "__main__":
    main()
