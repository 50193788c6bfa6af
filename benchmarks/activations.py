"""How much memory a network call with gradient keeps: `python -m benchmarks.activations` fills in the table below.

The real denoisers on the meta device (shapes, no numbers), LoRA on the attention layers, bfloat16, one sample of
512 px without guidance: the bytes of all tensors that autograd keeps for the backward pass, each storage once,
without weights.  Attention is counted as a fused kernel's: q, k, v, the output and a float per query.  With
checkpointing: the inputs of all blocks, and the largest block's own activations, which come back one at a time.
A GPU's allocator adds its own; the figures grow linearly with samples and pixels.
"""

import argparse
import sys
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import common  # noqa: E402
from benchmarks import random_model  # noqa: E402

TEXT = {"sd15": (77, 768, 0), "sd3.5-medium": (77 + 128, 4096, 2048), "flux": (128, 4096, 768)}  # tokens, widths


class Fused(torch.autograd.Function):
    """What a fused attention kernel keeps."""

    @staticmethod
    def forward(ctx, q, k, v):
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx, grad):
        return grad, grad, grad


@contextmanager
def kept(weights: set):
    """{storage: bytes} of what autograd keeps in the block."""
    found = {}

    def pack(x):
        storage = x.untyped_storage()
        if storage._cdata not in weights:
            found[storage._cdata] = (storage.nbytes(), x)  # x: lest the storage's number is used again
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        yield found


def size(found: dict) -> int:
    return sum(count for count, _ in found.values())


def measure(kind: str) -> tuple[float, float]:
    """GiB that a call of one sample keeps, without and with checkpointing."""
    import diffusers
    from peft import LoraConfig

    parts = random_model.parts_of(kind)
    config = parts.get("unet") or parts["transformer"]
    backbone = common.BACKBONES[parts["_class_name"]]
    with torch.device("meta"):
        net = getattr(diffusers, config["_class_name"]).from_config(config).to(torch.bfloat16).requires_grad_(False)
        net.add_adapter(LoraConfig(r=32, target_modules=list(backbone.attention)))
        for layer in net.modules():
            if hasattr(layer, "lora_A"):
                layer.cast_input_dtype_enabled = False
        tokens, width, pooled = TEXT[kind]
        x = torch.empty(1, backbone.latents(net.config)[0], 64, 64, dtype=torch.bfloat16)
        embeds = torch.empty(1, tokens, width, dtype=torch.bfloat16)
        pooled = torch.empty(1, pooled, dtype=torch.bfloat16) if pooled else None
        t = torch.empty(1)
        net.train()
        weights = {p.untyped_storage()._cdata for p in [*net.parameters(), *net.buffers()]}

        def call():
            return backbone.forward(net, x, t, embeds, pooled)

        fused = lambda query, key, value, *args, **more: Fused.apply(query, key, value)  # noqa: E731
        with mock.patch.object(F, "scaled_dot_product_attention", fused):
            with kept(weights) as found:
                out = call()
            inputs, largest = {}, 0

            def block(module, *args):
                nonlocal largest
                for a in args:
                    if torch.is_tensor(a):
                        inputs[a.untyped_storage()._cdata] = (a.untyped_storage().nbytes(), a)
                with kept(weights) as inside:
                    result = module(*args)
                largest = max(largest, size(inside))
                return result

            net.enable_gradient_checkpointing(block)
            with kept(weights) as outside:
                out = call()
    assert out.device.type == "meta"
    return size(found) / 2**30, (size(outside | inputs) + largest) / 2**30


def main():
    parser = argparse.ArgumentParser(prog="activations", description=__doc__.split("\n")[0])
    parser.add_argument("kinds", nargs="*", default=list(TEXT), help="sd15, sd3.5-medium, flux")
    for kind in parser.parse_args().kinds:
        usual, less = measure(kind)
        print(f"{kind:14s} {usual:.2f} GiB a sample, {less:.2f} with checkpointing", flush=True)


if __name__ == "__main__":
    main()
