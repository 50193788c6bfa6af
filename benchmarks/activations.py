"""What a model takes of a card's memory: `python -m benchmarks.activations` fills in arguments.COUNTED.

The real networks on the meta device (shapes, no numbers): their parameters, and the most bytes that are alive at once,
weights apart, in a forward and backward pass of the denoiser with its LoRA (bfloat16, a sample of 512 px without
guidance; as it is, and with checkpointing) and in a decode (float32; as it is, and with gradient).  Attention is
counted as a fused kernel's.  A GPU's allocator and its kernels' work space are not in it.
So `--memory` counts a model that is not in the table.
"""

import argparse
import sys
import weakref
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import diffusers
import torch
import torch.nn.functional as F
import transformers
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import arguments  # noqa: E402
import common  # noqa: E402
from benchmarks import random_model  # noqa: E402

diffusers.utils.logging.set_verbosity_error()
KINDS = {"sd15": "sd15", "sd3.5-medium": "sd3.5-medium", "flux": "flux.1-dev"}  # shipped configuration: --model
PUBLISHED = {  # the shipped configurations of text encoders are short: by width, the whole
    768: dict(num_hidden_layers=12, vocab_size=49408), 1280: dict(num_hidden_layers=32, vocab_size=49408),
    4096: dict(d_ff=10240, num_heads=64, num_layers=24, vocab_size=32128),
}  # fmt: skip


class Fused(torch.autograd.Function):
    """What a fused attention kernel keeps and makes."""

    @staticmethod
    def forward(ctx, q, k, v):
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx, grad):
        return tuple(torch.empty_like(x) for x in ctx.saved_tensors[:3])


@contextmanager
def fused_attention():
    fused = lambda query, key, value, *args, **more: Fused.apply(query, key, value)  # noqa: E731
    with mock.patch.object(F, "scaled_dot_product_attention", fused):
        yield


class Peak(TorchDispatchMode):
    """The most bytes of tensors made in the block that were alive at once (`most`), on whichever device."""

    def __init__(self, *modules):
        super().__init__()
        self.live = self.most = 0
        self.known = {p.untyped_storage()._cdata for m in modules for p in [*m.parameters(), *m.buffers()]}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if torch.is_tensor(x) and (key := x.untyped_storage()._cdata) not in self.known:
                self.known.add(key)
                self.live += (size := x.untyped_storage().nbytes())
                self.most = max(self.most, self.live)
                weakref.finalize(x.untyped_storage(), self._gone, key, size)
        return result

    def _gone(self, key, size):
        self.live -= size
        self.known.discard(key)


def millions(module) -> float:
    return sum(p.numel() for p in module.parameters()) / 1e6


def add_lora(net, targets: list[str], rank: int, dtype) -> float:
    """The adapter as common.add_lora() makes it; its parameters per rank, M."""
    policy = SimpleNamespace(net=net.to(dtype).requires_grad_(False), dtype=dtype)
    return sum(p.numel() for p in common.add_lora(policy, targets, rank, rank, 0)) / rank / 1e6


def update(net, backbone, latent, words: int, width: int, dtype) -> float:
    """GiB of a forward and backward pass of a sample, one of two, for each two bytes of a number."""
    x, embeds = torch.empty(2, *latent, dtype=dtype), torch.empty(2, words, width, dtype=dtype)
    pooled = net.config.get("pooled_projection_dim")
    pooled = torch.empty(2, pooled, dtype=dtype) if pooled else None
    with fused_attention(), Peak(net) as peak:
        out = backbone.forward(net, x, torch.empty(2), embeds, pooled)
        torch.autograd.grad(out.sum(), [p for p in net.parameters() if p.requires_grad])
    return peak.most / dtype.itemsize / 2**30


def decode(vae, latent, gradient: bool) -> float:
    """GiB of the decode of one image."""
    z = torch.empty(1, *latent, requires_grad=gradient)
    with fused_attention(), Peak(vae) as peak, nullcontext() if gradient else torch.no_grad():
        images = vae.decode(z, return_dict=False)[0]
        if gradient:
            torch.autograd.grad(images.sum(), z)
    return peak.most / 2**30


def count(modules: dict, backbone, resolution, length: int, targets: list[str], rank=32, dtype=torch.bfloat16):
    """arguments.Counted of a pipeline's networks on the meta device; at their usual resolution unless given."""
    net, vae = modules[backbone.part], modules["vae"].requires_grad_(False)
    encoders = {name: millions(modules[name]) for name in backbone.encoders if name in modules}
    t5 = sum(size for name, size in encoders.items() if type(modules[name]).__name__ == "T5EncoderModel")
    width = net.config.get("joint_attention_dim") or net.config.cross_attention_dim
    factor, (channels, usual) = 2 ** (len(vae.config.block_out_channels) - 1), backbone.latents(net.config)
    side = resolution // factor if resolution else usual
    latent = channels, side, side
    denoiser, call = millions(net), (net, backbone, latent, arguments.words_of(backbone, length), width, dtype)
    with torch.device("meta"):
        adapter = add_lora(net, targets, rank, dtype)
        net.train()
        plain = update(*call)
        net.enable_gradient_checkpointing()
        passes, decodes = (plain, update(*call)), (decode(vae, latent, False), decode(vae, latent, True))
    sizes = denoiser, millions(vae), sum(encoders.values()) - t5, t5, width, adapter
    return arguments.Counted(*sizes, passes, decodes, side * factor, channels * side**2)


def folder(path: str, backbone) -> dict:
    """The networks of a folder in diffusers format, or of a hub id, on the meta device."""
    found = {}
    for name in ("vae", backbone.part, *backbone.encoders):
        kind = diffusers.DiffusionPipeline.load_config(path)[name][1]
        with torch.device("meta"):
            if cls := getattr(diffusers, kind or "", None):
                found[name] = cls.from_config(cls.load_config(path, subfolder=name))
            elif kind:
                cls = getattr(transformers, kind)
                found[name] = cls(cls.config_class.from_pretrained(path, subfolder=name))
    return found


def published(kind: str) -> dict:
    """The networks of benchmarks/configs, their text encoders whole, on the meta device."""
    found = {}
    for name, config in random_model.parts_of(kind).items():
        with torch.device("meta"):
            if name.startswith("text_encoder"):
                config |= PUBLISHED[config.get("hidden_size") or config["d_model"]]
                cls = getattr(transformers, config["_class_name"])
                found[name] = cls(cls.config_class(**{k: v for k, v in config.items() if k != "_class_name"}))
            elif name in ("unet", "transformer", "vae"):
                found[name] = getattr(diffusers, config["_class_name"]).from_config(config)
    return found


def main():
    parser = argparse.ArgumentParser(prog="activations", description=__doc__.split("\n")[0])
    parser.add_argument("kinds", nargs="*", default=list(KINDS), help=", ".join(KINDS))
    for kind in parser.parse_args().kinds:
        backbone = common.BACKBONES[random_model.parts_of(kind)["_class_name"]]
        both = {"attention": backbone.attention, "attention+mlp": backbone.attention + backbone.mlp}
        for name, targets in both.items():
            print((KINDS[kind], name), count(published(kind), backbone, 512, 128, list(targets)), flush=True)


if __name__ == "__main__":
    main()
