"""What a run leaves on the disk and goes on from: complete files, one process per folder, checkpoints with checksums.

Everything here is written whole or not at all: to a temporary name, to the disk, then renamed.  A kill at any moment
leaves a folder from which --resume goes on.
"""

import hashlib
import json
import os
import platform
import shutil
import signal
import time
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch

try:
    import fcntl
except ImportError:  # no file locks on Windows
    fcntl = None

import common
from common import LORA_FILE, UsageError


# ---- files -------------------------------------------------------------------
@contextmanager
def complete(path: Path):
    """A temporary path, which becomes `path` when all is written and on the disk: complete or as it was."""
    temporary = path.with_name(f".{path.stem}.tmp{path.suffix}")
    yield temporary
    with temporary.open("rb+") as f:
        os.fsync(f.fileno())
    temporary.replace(path)


def write_json(path: Path, value) -> None:
    with complete(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1) + "\n")


# ---- signals -----------------------------------------------------------------
SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name)]
HELD = {"depth": 0, "number": 0}  # of unbroken(): how deep, and the signal that waits


class Stopped(KeyboardInterrupt):
    """A signal asks the program to end; `number` is which."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.number = number


@contextmanager
def signals_stop():
    """Inside, SIGTERM, SIGINT and SIGHUP raise Stopped where the program is; a second one ends it at once."""
    first = []

    def stop(number, frame):
        if not first:
            first.append(time.monotonic())
            if HELD["depth"] == 0:
                raise Stopped(number)
            HELD["number"] = number
        elif time.monotonic() - first[0] > 1:  # a terminal and torchrun may both pass on one Ctrl-C
            os._exit(128 + number)

    heeded = [each for each in SIGNALS if signal.getsignal(each) != signal.SIG_IGN]  # nohup's SIGHUP stays ignored
    before = {each: signal.signal(each, stop) for each in heeded}
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


@contextmanager
def unbroken():
    """What is inside is finished before a signal stops the program."""
    HELD["depth"] += 1
    try:
        yield
    finally:
        HELD["depth"] -= 1
        number = 0 if HELD["depth"] else HELD["number"]
        if number:
            HELD["number"] = 0
            raise Stopped(number)


# ---- one process per run folder ----------------------------------------------
LOCKS = {}  # of this process: an open file each, which the system unlocks when the process ends, however it ends


def lock(folder: Path) -> None:
    """UsageError if another process writes to this run folder; it says which."""
    if fcntl is None or str(folder.resolve()) in LOCKS:
        return
    file = (folder / "lock").open("a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        busy = f"{folder} is in use by {file.read().strip() or 'another process'}"
        raise UsageError(f"{busy}; wait for its end, or start under another --name") from None
    except OSError:  # this file system has no locks
        return file.close()
    file.truncate(0)
    file.write(f"process {os.getpid()} on {platform.node()}\n")
    file.flush()
    LOCKS[str(folder.resolve())] = file


# ---- checkpoints -------------------------------------------------------------
def save(run_dir: Path, policy, epoch: int, state: dict, ema: common.EMA | None, keep=0, about=None) -> None:
    """checkpoints/epoch_NNNN with the exported LoRA and state.pt, complete or absent; `last` points to it.

    keep N: of all checkpoints only the newest N and the best one stay; 0: all.  about: see common.export_lora().
    """
    root = run_dir / "checkpoints"
    final, temporary = root / f"epoch_{epoch:04d}", root / f".writing_{epoch:04d}"
    if common.rank() > 0 or final.exists():
        return
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        with ema.applied() if ema else nullcontext():
            common.export_lora(policy, temporary, about)
        torch.save(state | {"epoch": epoch}, temporary / "state.pt")
    except (OSError, RuntimeError, ValueError) as problem:  # torch and safetensors have their own for a full disk
        raise OSError(f"{final} could not be written ({problem})") from problem
    write_json(temporary / "manifest.json", {file.name: digest(file) for file in temporary.iterdir()})
    for file in temporary.iterdir():
        with file.open("rb+") as f:
            os.fsync(f.fileno())
    temporary.rename(final)
    point_to(final)
    if keep:
        prune(run_dir, keep)


def prune(run_dir: Path, keep: int) -> None:
    """Removes all checkpoints but the newest `keep` and the one with the best held-out reward."""
    root, found = run_dir / "checkpoints", by_epoch(run_dir)
    held = {c: run_dir / "eval" / f"{c.name}.json" for c in found}
    scores = {c: json.loads(file.read_text())["reward"] for c, file in held.items() if file.exists()}
    scores = {c: [x for x in each if x is not None] for c, each in scores.items()}  # None: not scored
    best = max(scores, key=lambda c: sum(scores[c]) / max(1, len(scores[c])), default=None)
    for checkpoint in found[keep:]:
        if checkpoint != best:
            checkpoint.rename(root / f".old_{checkpoint.name}")  # first: a kill may fall into the removal
    for old in root.glob(".old_*"):
        shutil.rmtree(old)


def lora_file(given: str | Path) -> Path | None:
    """The LoRA of a run folder (its last checkpoint), of a checkpoint's folder, or the file itself."""
    place = Path(given)
    each = (place / "checkpoints" / "last" / LORA_FILE, place / LORA_FILE, place)
    return next((file for file in each if os.path.isfile(file)), None)  # unlike Path's, it takes any text


def by_epoch(run_dir: Path) -> list[Path]:
    """The checkpoints of a run, the newest first."""
    found = (Path(run_dir) / "checkpoints").glob("epoch_*[0-9]")
    return sorted(found, key=lambda path: int(path.name[6:]), reverse=True)


def copied(state):
    """A copy on the CPU that training does not change, of tensors in dicts and lists."""
    if isinstance(state, torch.Tensor):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, dict):
        return {key: copied(value) for key, value in state.items()}
    return type(state)(map(copied, state)) if isinstance(state, (list, tuple)) else state


def digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def point_to(checkpoint: Path) -> None:
    """checkpoints/last -> the newest one."""
    link, last = checkpoint.with_name(".last"), checkpoint.with_name("last")
    if last.is_dir() and not last.is_symlink():
        shutil.rmtree(last)  # a copy of the run that was made without links
    link.unlink(missing_ok=True)
    link.symlink_to(checkpoint.name)
    link.replace(last)


def load(folder: str | Path) -> dict | None:
    """The state of a run's newest intact checkpoint, on the CPU; None where there is none.

    Damaged ones are named and set aside, so that the run can write them anew.
    """
    for checkpoint in by_epoch(folder):
        if not (problem := damage(checkpoint)):
            if common.rank() == 0:  # a kill may have fallen between a checkpoint and its link
                point_to(checkpoint)
            return torch.load(checkpoint / "state.pt", map_location="cpu", weights_only=True)
        if common.rank() > 0:
            raise OSError(f"{checkpoint} is damaged for this process alone ({problem})")
        print(f"note: {checkpoint} is damaged ({problem}) and set aside as {checkpoint.name}.damaged")
        shutil.rmtree(checkpoint.with_name(f"{checkpoint.name}.damaged"), ignore_errors=True)
        checkpoint.rename(checkpoint.with_name(f"{checkpoint.name}.damaged"))
    return None


def damage(checkpoint: Path) -> str:
    """What is wrong with a checkpoint's files, or ""."""
    try:
        manifest = json.loads((checkpoint / "manifest.json").read_text())
        for name, wanted in manifest.items():
            if digest(checkpoint / name) != wanted:
                return f"{name} was altered"
    except FileNotFoundError as problem:
        return f"{Path(problem.filename).name} is missing"
    except (ValueError, AttributeError) as problem:  # a file that cannot be read now is no damaged one
        return f"manifest.json: {problem}"
    return ""
