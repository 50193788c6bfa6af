"""A pipeline of the real architecture with random weights, for tests and for measuring time and memory: no download.

    python -m benchmarks.random_model sd15 OUT                  # then: python vmpo.py --model OUT ...
    python -m benchmarks.random_model flux OUT --layers 2       # real width, so few blocks
    python -m benchmarks.random_model sd3.5-medium OUT --layers 2 --small     # a few MB, for tests

Denoiser, VAE and scheduler have the published configurations (benchmarks/configs).  The text encoders have the
published widths, so that the denoiser sees embeddings of the right shape, but only one or two layers, and the embedded
models' tokenizers.  The images are noise; what is real is the cost of the denoiser and of the decoder.
"""

import argparse
import json
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "benchmarks" / "configs"
KINDS = {"sd15": 1, "sd3.5-medium": 2, "flux": 1}  # and the fewest layers: SD3.5's last block is of another sort
CLIP = dict(hidden_size=32, intermediate_size=64, num_attention_heads=2, projection_dim=32)
SMALL = {  # --small: the same kinds of layers, but narrow; by class
    "UNet2DConditionModel": dict(
        block_out_channels=[32, 32, 64, 64], cross_attention_dim=32, norm_num_groups=8,
    ),
    "SD3Transformer2DModel": dict(
        attention_head_dim=16, num_attention_heads=2, caption_projection_dim=32, joint_attention_dim=64,
        pooled_projection_dim=64, pos_embed_max_size=64,
    ),
    "FluxTransformer2DModel": dict(
        attention_head_dim=16, num_attention_heads=2, axes_dims_rope=[4, 6, 6], joint_attention_dim=64,
        pooled_projection_dim=32,
    ),
    "AutoencoderKL": dict(block_out_channels=[32] * 4, layers_per_block=1),
    "CLIPTextModel": CLIP,
    "CLIPTextModelWithProjection": CLIP,
    "T5EncoderModel": dict(d_model=64, d_ff=64, d_kv=16),
}  # fmt: skip


def parts_of(kind: str, layers: int | None = None, small: bool = False) -> dict[str, dict]:
    """{component: its configuration with "_class_name"}, and the pipeline's own "_class_name"."""
    parts = json.loads((CONFIGS / f"{kind}.json").read_text())
    net = parts.get("unet") or parts["transformer"]
    for name in {"layers_per_block", "num_layers", "num_single_layers"} & net.keys() if layers else ():
        net[name] = layers
    if "dual_attention_layers" in net:
        net["dual_attention_layers"] = [n for n in net["dual_attention_layers"] if n < net["num_layers"]]
    for config in parts.values() if small else ():
        if isinstance(config, dict):
            config |= SMALL.get(config["_class_name"], {})
    return parts


def tokenizer_for(encoder: str):
    """The embedded tokenizer of this class of encoder, at the published length."""
    from transformers import CLIPTokenizer, T5Tokenizer

    if encoder == "T5EncoderModel":
        return T5Tokenizer.from_pretrained(ROOT / "tiny" / "sd35" / "tokenizer_3", model_max_length=512)
    return CLIPTokenizer.from_pretrained(ROOT / "tiny" / "sd35" / "tokenizer", model_max_length=77)


def text_encoder(config: dict, tokenizer):
    """A random text encoder of this configuration for this tokenizer's vocabulary."""
    import transformers

    options = {k: v for k, v in config.items() if k != "_class_name"}
    options |= dict(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id)
    if config["_class_name"] == "T5EncoderModel":
        return transformers.T5EncoderModel(transformers.T5Config(**options, is_encoder_decoder=False, use_cache=False))
    options |= dict(bos_token_id=tokenizer.bos_token_id, max_position_embeddings=tokenizer.model_max_length)
    return getattr(transformers, config["_class_name"])(transformers.CLIPTextConfig(**options))


def make(kind: str, out, layers: int | None = None, small: bool = False, dtype=torch.float32, seed: int = 0):
    """Writes the pipeline to `out` and returns it; its weights are made in dtype, none is cast."""
    import diffusers
    import transformers

    transformers.utils.logging.disable_progress_bar()
    parts, built = parts_of(kind, layers, small), {}
    pipeline = getattr(diffusers, parts.pop("_class_name"))
    torch.manual_seed(seed)
    usual = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        for name, config in parts.items():
            if name.startswith("text_encoder"):
                tokenizer = tokenizer_for(config["_class_name"])
                built[name] = text_encoder(config, tokenizer)
                built[name.replace("text_encoder", "tokenizer")] = tokenizer
            else:
                built[name] = getattr(diffusers, config["_class_name"]).from_config(config)
    finally:
        torch.set_default_dtype(usual)
    if kind == "sd15":
        built |= dict(safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    pipe = pipeline(**built)
    pipe.save_pretrained(out)
    return pipe


def main(argv=None):
    parser = argparse.ArgumentParser(prog="random_model", description=__doc__.split("\n")[0])
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("out", help="folder that is made")
    parser.add_argument("--layers", type=int, help="blocks of the denoiser, of each sort (sd15: per resolution)")
    parser.add_argument("--small", action="store_true", help="narrow layers, too: a few MB, for tests")
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16", "float16"], help="on the disk")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if args.layers is not None and args.layers < KINDS[args.kind]:
        parser.error(f"--layers {args.layers} is too few for {args.kind}; use {KINDS[args.kind]} or more")
    if Path(args.out).exists() and any(Path(args.out).iterdir()):
        parser.error(f"{args.out} is not empty; choose another folder")
    pipe = make(args.kind, args.out, args.layers, args.small, getattr(torch, args.dtype), args.seed)
    net = getattr(pipe, "unet", None) or pipe.transformer
    size = sum(file.stat().st_size for file in Path(args.out).rglob("*") if file.is_file())
    count = sum(p.numel() for p in net.parameters())
    print(f"{args.out}: denoiser of {count / 1e6:,.1f} M parameters, {size / 2**30:.2f} GB on the disk")


if __name__ == "__main__":
    sys.exit(main())
