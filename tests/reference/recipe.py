"""What both environments rebuild exactly, so that the golden files need to hold results only: random weights by
parameter name, pictures, prompts, and the few numbers kept of a gradient.  MT19937 and integer arithmetic: the same
on every machine and with every version of numpy and torch."""

import zlib

import numpy as np
import torch

# Reduced models: widths and depths are small; heads, patches, image size, context and vocabularies are the real ones.
CLIPS = {
    "hpsv2": {  # as ViT-H-14: plain gelu, 16 heads in both towers
        "embed_dim": 64,
        "vision_cfg": {"layers": 2, "width": 64, "head_width": 4, "patch_size": 14, "image_size": 224},
        "text_cfg": {"layers": 2, "width": 64, "heads": 16, "context_length": 77, "vocab_size": 49408},
        "quick_gelu": False,
    },
    "clip": {  # as OpenAI's ViT-L-14: quick gelu, 16 and 12 heads, features of 768
        "embed_dim": 768,
        "vision_cfg": {"layers": 2, "width": 64, "head_width": 4, "patch_size": 14, "image_size": 224},
        "text_cfg": {"layers": 2, "width": 48, "heads": 12, "context_length": 77, "vocab_size": 49408},
        "quick_gelu": True,
    },
}
BLIP_VISION = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2}
BLIP_TEXT = {"hidden_size": 48, "encoder_hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}

LONG = ", ".join(f"{n} {c} {s}" for n in ("two", "three") for c in ("red", "pale blue", "green")
                 for s in ("circles", "squares", "triangles on a wooden table"))  # fmt: skip
PROMPTS = [  # one for each picture; 1 is longer than 77 CLIP and 35 BERT tokens
    "a red circle above two blue squares",
    LONG,
    "A sign that says \u201cCaf\u00e9 &amp;amp; Bar\u201d \u2014 it\u2019s na\u00efve, 3\u00bd euros \U0001f600",
    "portrait of a cat, oil painting, highly detailed, trending on artstation",
]
PLAIN = [PROMPTS[i] for i in (0, 1, 3)]  # read alike with and without HPSv2's text cleaning
SIZES = [(512, 512), (96, 96), (300, 450), (450, 300)]  # height and width of the pictures that are resized
SMALL = 48  # they are also resized to this size, of which the golden files hold every pixel


def uniform(name: str, shape) -> np.ndarray:
    """Uniform in [-1, 1), seeded by the name."""
    return 2 * np.random.RandomState(zlib.crc32(name.encode())).random_sample(tuple(shape)) - 1


def weight(name: str, shape) -> torch.Tensor:
    """Float32; the scale keeps activations, attention logits and scores around 1."""
    if name.endswith("position_ids"):
        return torch.arange(shape[-1]).expand(*shape).clone()
    if name == "logit_scale":
        return torch.tensor(4.6)
    u = uniform(name, shape)
    if len(shape) == 1:  # a LayerNorm's gain, or a bias
        u = 0.3 * u + name.endswith("weight")
    else:
        fan_in = int(np.prod(shape[1:])) if len(shape) == 4 else shape[-1]
        u *= (3 / fan_in) ** 0.5
    return torch.from_numpy(np.asarray(u, np.float32))


def weights(shapes: dict) -> dict[str, torch.Tensor]:
    return {name: weight(name, shape) for name, shape in shapes.items()}


def picture(name: str, h: int, w: int) -> np.ndarray:
    """(h, w, 3) uint8: colour gradients, a hard edge, noise; not saturated, since PIL clips between its two passes."""
    rng = np.random.RandomState(zlib.crc32(name.encode()))
    coarse = rng.randint(50, 206, (6, 6, 3))
    y, x = (np.arange(n) * 5 * 64 // n for n in (h, w))  # fixed point, 6 bits
    rows = coarse[y // 64] * (64 - y % 64)[:, None, None] + coarse[y // 64 + 1] * (y % 64)[:, None, None]
    fy = (x % 64)[None, :, None]
    image = (rows[:, x // 64] * (64 - fy) + rows[:, x // 64 + 1] * fy) // 4096
    image[h // 4 : h // 2, w // 3 : w // 2] = (215, 75, 50)
    return (image + rng.randint(-10, 11, image.shape)).astype(np.uint8)


def pictures() -> np.ndarray:
    """(4, 224, 224, 3): at the models' own size, no resize between the picture and the score."""
    return np.stack([picture(f"picture {i}", 224, 224) for i in range(len(PROMPTS))])


def resized() -> list[np.ndarray]:
    return [picture(f"resized {h} {w}", h, w) for h, w in SIZES]


def tensor(images: np.ndarray) -> torch.Tensor:
    """(B, H, W, 3) uint8 -> (B, 3, H, W) float64 in [0, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).double() / 255


def probe(gradient: torch.Tensor) -> torch.Tensor:
    """(B, 3, H, W) -> (B, 265) float64: 256 entries at random places times sqrt(n), 8 projections on random signs,
    the norm: all of the size of the norm."""
    g = gradient.double().flatten(1)
    n = g.shape[1]
    places = np.random.RandomState(1).randint(0, n, 256)
    signs = torch.from_numpy(np.random.RandomState(2).randint(0, 2, (8, n)) * 2.0 - 1)
    return torch.cat([g[:, places] * n**0.5, g @ signs.T, g.norm(dim=1, keepdim=True)], 1)
