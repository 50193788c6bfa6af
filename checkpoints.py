"""What a run leaves on the disk and goes on from: complete files, one process per folder, checkpoints with checksums.

Everything here is written whole or not at all: to a temporary name, to the disk, then renamed.  A kill at any moment
leaves a folder from which --resume goes on.
"""

import hashlib
import json
import os
import platform
import shutil
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch

try:
    import fcntl
except ImportError:  # no file locks on Windows
    fcntl = None

import common
from common import UsageError


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
def save(run_dir: Path, policy, epoch: int, state: dict, ema: common.EMA | None) -> None:
    """checkpoints/epoch_NNNN with the exported LoRA and state.pt, complete or absent; `last` points to it."""
    root = run_dir / "checkpoints"
    final, temporary = root / f"epoch_{epoch:04d}", root / f".writing_{epoch:04d}"
    if common.rank() > 0 or final.exists():
        return
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        with ema.applied() if ema else nullcontext():
            common.export_lora(policy, temporary)
        torch.save(state | {"epoch": epoch}, temporary / "state.pt")
    except (OSError, RuntimeError, ValueError) as problem:  # torch and safetensors have their own for a full disk
        raise OSError(f"{final} could not be written ({problem})") from problem
    write_json(temporary / "manifest.json", {file.name: digest(file) for file in temporary.iterdir()})
    for file in temporary.iterdir():
        with file.open("rb+") as f:
            os.fsync(f.fileno())
    temporary.rename(final)
    point_to(final)


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
    root = Path(folder) / "checkpoints"
    newest = sorted(root.glob("epoch_*[0-9]"), key=lambda path: int(path.name[6:]), reverse=True)
    for checkpoint in newest:
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
