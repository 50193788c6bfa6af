"""Runs in forked children: torch and the trainers are imported once, so that a trial costs its run alone."""

import csv
import json
import os
import signal
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))
os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}

import diffusers  # noqa: E402, F401
import matplotlib.pyplot  # noqa: E402, F401
import peft  # noqa: E402, F401
import torch  # noqa: E402
import torch.utils.tensorboard  # noqa: E402, F401
from safetensors.torch import load_file  # noqa: E402

import awm  # noqa: E402
import first_order_rsm  # noqa: E402
import grpo  # noqa: E402
import harness  # noqa: E402
import rewards  # noqa: E402
import tempflow_rsm  # noqa: E402
import vmpo  # noqa: E402

torch.set_num_threads(1)
SMALL = "--preset tiny --num-prompts 2 --epochs 5 --eval-images 2 --eval-every 2 --sample-every 2 --save-every 1"
SIZES = {
    vmpo: "--group-size 2 --steps 3 --mean time_prompt",
    awm: "--group-size 2 --steps 3",
    grpo: "--group-size 2 --steps 3",
    tempflow_rsm: "--group-size 1 --steps 4 --profile 3,2,2",
    first_order_rsm: "--group-size 1 --steps 3",
}
SCRIPTS = {script.__name__: script for script in SIZES}


def flags_of(script, folder, name="run", *more) -> list[str]:
    own = SIZES[script].replace("--group-size 1", "") if script is tempflow_rsm else SIZES[script]
    return [*SMALL.split(), *own.split(), "--runs", str(folder), "--name", name, *map(str, more)]


def fork(work) -> tuple[int, str]:
    """Exit code (minus the signal's number after a kill) and stderr of work() in a child process."""
    with tempfile.TemporaryFile("w+") as err:
        pid = os.fork()
        if pid == 0:
            code = 70
            try:
                os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
                os.dup2(err.fileno(), 2)
                work()
                code = 0
            except SystemExit as stop:
                code = stop.code if isinstance(stop.code, int) else 1
                print(stop.code if isinstance(stop.code, str) else "", file=sys.stderr)
            except BaseException:
                import traceback

                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code or 0)
        _, status = os.waitpid(pid, 0)
        err.seek(0)
        return os.waitstatus_to_exitcode(status), err.read()


def run(script, flags) -> None:
    sys.argv = [f"{script.__name__}.py", *flags]
    harness.run_main(script.main, script.parse_args, rewards.UsageError)


def finish(script, folder: Path, flags) -> str:
    """Start again or go on, as a user would, a run that was stopped: what went wrong, or ""."""
    if not (folder / "run" / "args.json").exists():  # stopped before it was a run: a start takes the name
        code, err = fork(lambda: run(script, flags))
        return "" if code == 0 else err[-1500:]
    code, err = fork(lambda: run(script, ["--resume", str(folder / "run")]))
    finished = code == 2 and "is done" in err  # the stop came after the summary
    return "" if code == 0 or finished else err[-1500:]


def state_of(folder: Path) -> dict:
    """What a run is to leave, apart from seconds and dates."""
    with (folder / "metrics.csv").open(newline="") as f:
        every, own = list(csv.DictReader(f)), ("time/", "mem/", "calls/")
        rows = [{k: v for k, v in row.items() if not k.startswith(own)} for row in every]
    lora = load_file(folder / "checkpoints" / "last" / "pytorch_lora_weights.safetensors")
    summary = json.loads((folder / "summary.json").read_text())
    pictures = [(folder / name).exists() for name in ("curve.png", "before_after.png")]
    return {"rows": rows, "lora": {k: v.numpy().tobytes() for k, v in lora.items()}, "gain": summary["gain"],
            "pictures": pictures}  # fmt: skip


def kill_at(operation: int, folder: Path) -> None:
    """From here on this process counts what it does to files in the folder, and dies just before this one."""
    seen = 0

    def hook(event, args):
        nonlocal seen
        if event not in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.symlink", "os.truncate"):
            return
        path = args[0]
        writes = event != "open" or isinstance(args[1], str) and set(args[1]) & set("wax+")
        if writes and isinstance(path, (str, os.PathLike)) and str(path).startswith(str(folder)):
            seen += 1
            if seen == operation:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
