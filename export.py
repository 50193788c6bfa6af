"""A run's LoRA for other programs: python export.py runs/NAME --format kohya | peft | merged

kohya   NAME.safetensors for A1111, ComfyUI, kohya's scripts; SD1.5 only: for SD3.5 and FLUX these programs read the
        run's own checkpoints/last/pytorch_lora_weights.safetensors, in diffusers' names
peft    a folder for peft.PeftModel.from_pretrained(pipe.unet or pipe.transformer, folder)
merged  a whole diffusers folder whose denoiser has the LoRA added to its weights: needs nothing but diffusers
"""

import argparse
import json
import sys
from pathlib import Path

import torch

import checkpoints
import common
import harness
from harness import need

FORMATS = ("kohya", "peft", "merged")


def read_run(given: str) -> tuple[dict, Path]:
    """Run folder or one of its checkpoints -> the run's flags and the LoRA file."""
    place, what = Path(given), f"{given} is neither a run folder nor one of its checkpoints"
    file = checkpoints.lora_file(place) if place.is_dir() else None
    need(file, f"{what} (no {common.LORA_FILE})", "give runs/NAME or runs/NAME/checkpoints/epoch_NNNN")
    record = next((d / "args.json" for d in (place, *place.resolve().parents[:2]) if (d / "args.json").exists()), None)
    need(record, f"{what} (no args.json beside it)", "give the run folder")
    return json.loads(record.read_text())["args"], file


def read_lora(file: Path, part: str) -> dict[str, torch.Tensor]:
    """Layer names without the denoiser's own -> lora_A (r, in) and lora_B (out, r), alpha / r folded into B."""
    from safetensors.torch import load_file

    return {key.removeprefix(f"{part}."): value for key, value in load_file(file).items()}


def to_kohya(weights, out: Path) -> None:
    from diffusers.utils import convert_state_dict_to_kohya
    from safetensors.torch import save_file

    found = convert_state_dict_to_kohya({f"unet.{key}": value for key, value in weights.items()})
    save_file({key: value.float().contiguous() for key, value in found.items()}, out)


def to_peft(weights, out: Path, base: str) -> None:
    from peft import LoraConfig
    from safetensors.torch import save_file

    layers = sorted({key.rsplit(".lora_", 1)[0] for key in weights})
    rank = next(value.shape[0] for key, value in weights.items() if ".lora_A." in key)
    out.mkdir(parents=True)
    LoraConfig(r=rank, lora_alpha=rank, target_modules=layers, base_model_name_or_path=base).save_pretrained(out)
    save_file({f"base_model.model.{key}": value for key, value in weights.items()}, out / "adapter_model.safetensors")


def to_merged(file: Path, args, backbone, out: Path) -> None:
    pipe = backbone.load(harness.find_model(args["model"])[0], torch.float32, args["t5"])
    pipe.load_lora_weights(str(file.parent))
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    pipe.save_pretrained(out)


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="runs/NAME (its last checkpoint) or runs/NAME/checkpoints/epoch_NNNN")
    parser.add_argument("--format", choices=FORMATS, required=True, help="see above")
    parser.add_argument("--out", help="file (kohya) or folder; default RUN/export/FORMAT")
    options = parser.parse_args(argv)
    try:
        args, file = read_run(options.run)
        _, backbone = harness.find_model(args["model"])
        known = options.format != "kohya" or backbone is common.SD15
        other = f"--format kohya is for SD1.5, this run's model is {args['model']}"
        need(known, other, f"ComfyUI reads {file} as it is")
        usual = file.parent.parent.parent / "export" / options.format
        out = Path(options.out or (usual.with_suffix(".safetensors") if options.format == "kohya" else usual))
        need(not out.exists(), f"--out {out} is there already", "remove it, or choose another --out")
        out.parent.mkdir(parents=True, exist_ok=True)
        weights = read_lora(file, backbone.part)
        if options.format == "kohya":
            to_kohya(weights, out)
        elif options.format == "peft":
            to_peft(weights, out, args["model_path"])
        else:
            to_merged(file, args, backbone, out)
    except (common.UsageError, OSError) as problem:
        parser.exit(2, f"export.py: error: {problem}\n")
    print(out)


if __name__ == "__main__":
    main(sys.argv[1:])
