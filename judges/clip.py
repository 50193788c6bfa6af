"""CLIP-type rewards, all on transformers' CLIPModel: clipscore*, pickscore*, aesthetic, hpsv2*.

One differentiable preprocessing for all; other judges (geneval, imagereward, diversity) use it, too.
"""

import functools
import html
from collections.abc import Callable

import torch
import torch.nn.functional as F

from rewards import UsageError, need, read_checkpoint, wide

# ---- pixels and text ---------------------------------------------------------
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def resize_for_clip(images, size=224, mode="crop"):
    """(B, 3, H, W) in [0, 1] -> (B, 3, size, size), differentiable.

    "crop": shorter side to `size`, centre crop (CLIP, ImageReward); "pad": longer side, zeros around (HPSv2).
    "crop" clamps, as PIL does; "pad" leaves bicubic's overshoot, as HPSv2 does, which resizes float tensors.
    Antialiased bicubic is PIL's up to rounding; without antialias it is ten times further off (HPSv2's own
    code had none under torchvision < 0.17, so its numbers of 2023 differ from today's by that alone).
    """
    need(mode in ("crop", "pad"), f"mode {mode!r} is unknown; use 'crop' or 'pad'", ValueError)
    images = images.to(wide(images.dtype)).clamp(0, 1)
    h, w = images.shape[-2:]
    side = min(h, w) if mode == "crop" else max(h, w)
    if side != size:
        to_int = int if mode == "crop" else round  # as each reference does
        h, w = (max(1, to_int(v * size / side)) for v in (h, w))
        images = F.interpolate(images, (h, w), mode="bicubic", antialias=True, align_corners=False)
    if mode == "crop":
        images = images.clamp(0, 1)
        top, left = round((h - size) / 2), round((w - size) / 2)
        return images[..., top : top + size, left : left + size]
    top, left = (size - h) // 2, (size - w) // 2
    return F.pad(images, (left, size - w - left, top, size - h - top))


def normalise(images, mean, std):
    mean, std = (torch.tensor(v, dtype=torch.float64).to(images).view(3, 1, 1) for v in (mean, std))
    return (images - mean) / std


def clip_input(images, size=224, mode="crop"):
    """Images as above -> what CLIP, and all that learned from its preprocessing, takes."""
    return normalise(resize_for_clip(images, size, mode), CLIP_MEAN, CLIP_STD)


def clean_text(prompt: str) -> str:
    """As OpenAI's CLIP and HPSv2 do and HF's tokenizer does not: curly quotes and HTML entities change the tokens."""
    import ftfy

    return html.unescape(html.unescape(ftfy.fix_text(prompt))).strip()


def unit(x):
    """Unit length along the last axis, at least float32."""
    x = x.to(wide(x.dtype))
    return x / x.norm(dim=-1, keepdim=True)


class Clip:
    """A frozen CLIPModel and its preprocessing.  Features: unit length, at least float32."""

    def __init__(self, model, tokenizer=None, mode="crop", clean=str):
        self.model, self.tokenizer, self.mode, self.clean = model, tokenizer, mode, clean
        self.size, text = model.config.vision_config.image_size, model.config.text_config
        self.length = text.max_position_embeddings
        # the text feature is read at this id (2: an old config, for "at the largest"); a wrong one is silent
        if tokenizer and text.eos_token_id not in (2, tokenizer.eos_token_id):
            ids = f"{text.eos_token_id} in the model's config, {tokenizer.eos_token_id} in the tokenizer"
            raise UsageError(f"CLIP's eos_token_id is {ids}; use the tokenizer of its training")
        # one prompt at a time: a feature depends neither on its batch nor on what came before a resume
        self.text = functools.lru_cache(8192)(self._encode)

    def images(self, images):
        """(B, 3, H, W) in [0, 1] -> (B, D)."""
        x = clip_input(images.to(self.model.device), self.size, self.mode)
        return unit(self.model.get_image_features(pixel_values=x.to(self.model.dtype)).pooler_output)

    def _encode(self, prompt):
        with torch.no_grad():
            options = {"truncation": True, "max_length": self.length, "return_tensors": "pt"}
            ids = self.tokenizer(self.clean(prompt), **options).input_ids
            return unit(self.model.get_text_features(input_ids=ids.to(self.model.device)).pooler_output)[0]

    def cosine(self, images, prompts):
        """(B,) cosine of image i and prompt i."""
        return (self.images(images) * torch.stack([self.text(p) for p in prompts])).sum(-1)


@functools.cache
def _clip_model(place, device, dtype):
    from transformers import CLIPModel

    model = CLIPModel.from_pretrained(place, dtype=torch.float32)
    scale = model.logit_scale.double().exp().item()  # before rounding: bfloat16 makes 98.9 of 100
    return model.to(device, dtype).eval().requires_grad_(False), scale


def load_clip(places: dict, device, dtype, clean=str) -> tuple[Clip, float]:
    """The Clip, with a tokenizer if there is one among the places, and exp(logit_scale)."""
    from transformers import CLIPTokenizer

    model, scale = _clip_model(places["clip"], device, dtype)
    tokenizer = CLIPTokenizer.from_pretrained(places["tokenizer"]) if "tokenizer" in places else None
    return Clip(model, tokenizer, clean=clean), scale


def build(make: Callable, state: dict, device, dtype):
    """make() with exactly these weights, frozen."""
    # a run's random state must not depend on which rewards it loads
    with torch.random.fork_rng([torch.device(device)] if "cuda" in device else []), torch.device(device):
        model = make()
    model.load_state_dict(state, strict=True)
    return model.to(device, dtype).eval().requires_grad_(False)


def clip_reward(name, device, dtype, places):
    """Cosines of a CLIPModel times a factor; OpenAI's tokenizer cleans the text, PickScore's (HF's) does not."""
    clip, scale = load_clip(places, device, dtype, clean_text if name.startswith("clipscore") else str)
    factor = {
        "clipscore": 1,  # Radford et al. 2103.00020, as VMPO reports it
        "clipscore-hessel": 2.5,  # Hessel et al. 2104.08718
        "pickscore": scale,  # Kirstain et al. 2305.01569
        "pickscore26": scale / 26,
    }[name]

    def fn(images, prompts, metadata):
        if name == "clipscore-hessel":
            return factor * clip.cosine(images, [f"A photo depicts {p}" for p in prompts]).clamp(min=0)
        return factor * clip.cosine(images, prompts)

    return fn


def aesthetic(name, device, dtype, places):
    """LAION's predictor, affine in the image feature (sac+logos+ava1)."""
    clip, _ = load_clip(places, device, dtype)
    weight, bias = (v.to(device, wide(dtype)) for v in aesthetic_head(read_checkpoint(places["file"])))
    return lambda images, prompts, metadata: clip.images(images) @ weight + bias


def aesthetic_head(state: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight (768,) and bias () in float64."""
    weight, bias = None, None  # five Linears with nothing but Dropout between them are one
    for i in (0, 2, 4, 6, 7):
        w, b = state[f"layers.{i}.weight"].double(), state[f"layers.{i}.bias"].double()
        weight, bias = (w, b) if weight is None else (w @ weight, w @ bias + b)
    return weight[0], bias[0]


# ---- HPSv2: an open_clip ViT-H/14 checkpoint in a CLIPModel -----------------
# Plain gelu in both towers: CLIPConfig's default quick_gelu loads without complaint and gives another reward.
HPS_VISION = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 16,
              "patch_size": 14, "image_size": 224, "hidden_act": "gelu", "projection_dim": 1024}  # fmt: skip
HPS_TEXT = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
            "vocab_size": 49408, "max_position_embeddings": 77, "hidden_act": "gelu", "projection_dim": 1024,
            "eos_token_id": 49407}  # fmt: skip
OPENCLIP_NAMES = {  # beginnings of names, the longer first
    "visual.transformer.resblocks.": "vision_model.encoder.layers.",
    "visual.conv1.": "vision_model.embeddings.patch_embedding.",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.ln_pre.": "vision_model.pre_layrnorm.",  # sic
    "visual.ln_post.": "vision_model.post_layernorm.",
    "visual.proj": "visual_projection.weight",
    "transformer.resblocks.": "text_model.encoder.layers.",
    "token_embedding.": "text_model.embeddings.token_embedding.",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.": "text_model.final_layer_norm.",
    "text_projection": "text_projection.weight",
    "logit_scale": "logit_scale",
}
BLOCK_NAMES = {".attn.": ".self_attn.", ".ln_": ".layer_norm", ".c_fc.": ".fc1.", ".c_proj.": ".fc2."}


def openclip_to_clip(state: dict) -> dict:
    """State dict of open_clip's CLIP -> of CLIPModel; KeyError for a name that has no place in it."""
    out = {}
    for key, value in state.items():
        old = next((old for old in OPENCLIP_NAMES if key.startswith(old)), None)
        if old is None:
            raise KeyError(f"checkpoint entry {key!r} belongs to no part of an open_clip CLIP model")
        name = OPENCLIP_NAMES[old] + key.removeprefix(old)
        for a, b in BLOCK_NAMES.items():
            name = name.replace(a, b)
        if ".in_proj_" in name:  # query, key and value in one matrix
            for part, chunk in zip("qkv", value.chunk(3)):
                out[name.replace("in_proj_", f"{part}_proj.")] = chunk
        else:  # the projections are plain matrices there, Linears here
            out[name] = value.T if key in ("visual.proj", "text_projection") else value
    return out


def hpsv2(name, device, dtype, places):
    """Cosine of a fine-tuned ViT-H/14 (Wu et al. 2306.09341), v2.1 and v2.0."""
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

    size = HPS_TEXT["projection_dim"]
    config = CLIPConfig(vision_config=HPS_VISION, text_config=HPS_TEXT, projection_dim=size)
    weights = openclip_to_clip(read_checkpoint(places["file"]))
    model = build(lambda: CLIPModel(config), weights, device, dtype)
    clip = Clip(model, CLIPTokenizer.from_pretrained(places["tokenizer"]), "pad", clean_text)
    return lambda images, prompts, metadata: clip.cosine(images, prompts)
