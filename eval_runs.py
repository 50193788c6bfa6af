"""What an evaluation takes from a run folder: its own settings as flags, and warnings where flags differ."""

import json
from pathlib import Path

import checkpoints
import common
import harness
import rewards
from harness import need

# of a run's args.json: what is taken over as it is
SAME = "reward_path resolution max_sequence_length model t5 dtype decode_batch_size reward_batch_size".split()


def run_settings(own: dict) -> dict:
    """A run's args.json -> its own evaluation as flags."""
    found = {name: own[name] for name in SAME}
    found |= {"steps": own["eval_steps"], "batch_size": own["micro_batch_size"]}
    found["cfg"] = own.get("eval_cfg", own["cfg"])
    if own["eval_kernel"] == "same":
        found |= {name: own[name] for name in ("kernel", "noise_level")}
    specs = [spec for spec in (own["reward"], own["eval_rewards"]) if spec and not rewards.is_grouped(spec)]
    names = dict.fromkeys(name for spec in specs for name, _ in rewards.parse_spec(spec))
    return found | dict(prompts=own["eval_prompts"] or own["prompts"], rewards=",".join(names))


def panel_defaults(args) -> dict:
    """--panel RUN: the run's own evaluation as flags, with K = 4 and --eval-images in all."""
    run = Path(args.panel)
    try:
        own = json.loads((run / "args.json").read_text())["args"]
        found, images = run_settings(own), own["eval_images"]
    except (OSError, ValueError, KeyError, TypeError) as problem:
        need(False, f"--panel {run} is no run folder ({problem!r}); give a trainer's, e.g. runs/NAME")
    need(not args.lora, f"--panel {run} evaluates the run's own checkpoints; leave --lora out")
    need(args.checkpoints > 0, f"--checkpoints {args.checkpoints} is too few; use 1 or more")
    epochs = [folder for folder in reversed(checkpoints.by_epoch(run)) if (folder / common.LORA_FILE).exists()]
    need(epochs, f"--panel {run} has no checkpoint yet; let it train longer")
    count = min(args.checkpoints, len(epochs))
    return found | dict(
        lora=[str(epochs[(i + 1) * len(epochs) // count - 1]) for i in range(count)],
        num_prompts=min(max(1, images // 4), len(harness.load_prompts(found["prompts"]))),
        images_per_prompt=4, diversity="diversity-clip", trained_on=own["reward"],
    )  # fmt: skip


def runs_of(args) -> dict[str, dict]:
    """{run folder: its flags} of those --lora that lie in one."""
    found = {}
    for given in args.lora:
        place = Path(given).absolute()
        for folder in (place, place.parent.parent, place.parent.parent.parent):  # RUN, its checkpoint, its file
            try:
                found[folder.name] = json.loads((folder / "args.json").read_text())["args"]
                break
            except (OSError, ValueError, KeyError, TypeError):
                continue
    return found


def lora_defaults(args) -> dict:
    """--lora RUN: model, sampler, prompts and rewards of its own evaluation; flags and presets win."""
    for own in runs_of(args).values():
        try:
            found = run_settings(own)
        except (KeyError, TypeError, common.UsageError, rewards.UsageError):  # of another version, or moved
            return {}
        return found if found["rewards"] else found | {"rewards": args.rewards}
    return {}


def differences(args) -> list[str]:
    """What the images are drawn with that neither the run's training nor its own evaluation had."""
    found = []
    for name, own in runs_of(args).items():
        for key in ("cfg", "resolution", "steps", "max_sequence_length"):
            trained, tested = own.get(key), own.get(f"eval_{key}", own.get(key))
            mine = getattr(args, key)
            if trained is not None and mine not in (trained, tested) and (args.kind == "flow" or "length" not in key):
                flag, also = "--" + key.replace("_", "-"), f" and evaluated at {tested}" * (tested != trained)
                found.append(f"warning: {flag} {mine}, but {name} was trained at {trained}{also}")
    return found


def own_paths(args, first, own: dict) -> None:
    """The run's --reward-path goes with the run's rewards: of others' they are left out."""
    if own and not first.reward_path:
        same, names = args.rewards == own["rewards"], {*args.rewards.split(","), args.diversity}
        paths = rewards.parse_paths(args.reward_path)
        kept = {name: path for name, path in paths.items() if name in names or not name and same}
        args.reward_path = [f"{name}={path}" if name else path for name, path in kept.items()]


def warn_of_differences(args) -> None:
    for line in differences(args):
        print(line)
