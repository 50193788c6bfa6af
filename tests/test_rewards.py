"""rewards.py, judges/imagereward.py, judges/ocr.py: contract, preprocessing, key maps against plain-torch references,
conventions, messages.  No weights."""

import http.server
import importlib.util
import io
import json
import math
import string
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import tensor

import rewards
from judges import clip as clip_judge
from judges import imagereward, ocr
from rewards import Reward, RewardError, Term, UsageError, check, load, parse_paths, parse_spec
from tiny import shapes

ROOT = Path(rewards.__file__).parent
PROMPTS = ["a red circle", "two blue squares", "a green triangle above a red square"]


def reward_of(*functions, weights=None, differentiable=True):
    weights = weights or [1.0] * len(functions)
    terms = [Term(f.__name__, w, f, differentiable, "", "") for f, w in zip(functions, weights)]
    return Reward("test", terms, differentiable)


def mean(images, prompts, metadata):
    return images.mean((1, 2, 3))


def red(images, prompts, metadata):
    return images[:, 0].mean((1, 2))


def pictures(n=3, h=40, w=40, dtype=torch.float32, seed=0):
    """Smooth random images inside [0.2, 0.8]: no clamp is active, so finite differences are clean."""
    small = torch.rand(n, 3, 5, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return 0.2 + 0.6 * F.interpolate(small, (h, w), mode="bilinear").to(dtype)


# ---- contract -------------------------------------------------------------------------------------------------------
def raises(images, prompts, metadata):
    raise KeyError("boom")


def nan(images, prompts, metadata):
    return tensor([math.nan if p == "two blue squares" else 1.0 for p in prompts])


def infinite(images, prompts, metadata):
    return [math.inf if p == "two blue squares" else 1.0 for p in prompts]


def leaves(images, prompts, metadata):
    sys.exit("no licence")


def huge(images, prompts, metadata):
    return tensor([1e39 if p == "two blue squares" else 1.0 for p in prompts], dtype=torch.float64)


def large(images, prompts, metadata):
    return tensor([3e38] * len(prompts))


def also_large(images, prompts, metadata):
    return tensor([3e38 if p == "two blue squares" else 0.0 for p in prompts])


def shape(images, prompts, metadata):
    return torch.zeros(len(prompts), 1)


def integer(images, prompts, metadata):
    return torch.zeros(len(prompts), dtype=torch.long)


def text(images, prompts, metadata):
    return "good"


@pytest.mark.parametrize(
    "fn, chunk, words",
    [
        (raises, None, ["KeyError", "boom", "samples 0 to 2", "a red circle"]),
        (raises, 1, ["KeyError", "samples 0 to 0", "a red circle"]),
        (nan, None, ["nan", "(sample 1: prompt 'two blue squares')"]),
        (nan, 1, ["nan", "(sample 1: prompt 'two blue squares')"]),
        (infinite, None, ["inf", "(sample 1: prompt 'two blue squares')"]),
        (shape, None, ["(3, 1)", "(3,)", "a red circle"]),
        (integer, None, ["int64", "floats", "a red circle"]),
        (text, None, ["returned str", "3 floats"]),
        (leaves, None, ["SystemExit: no licence"]),
        (huge, None, ["1e+39", "float32", "(sample 1: prompt 'two blue squares')"]),
    ],
)
def test_misbehaving_reward_is_named_with_sample_and_prompt(fn, chunk, words):
    with pytest.raises(RewardError) as e:
        reward_of(mean, fn, differentiable=False)(pictures(), PROMPTS, chunk=chunk)
    for word in [f"reward '{fn.__name__}'", *words]:
        assert word in str(e.value)


def test_a_sum_beyond_float32_is_no_reward():
    with pytest.raises(RewardError, match="too large for float32 .sample 1"):
        reward_of(large, also_large, differentiable=False)(pictures(), PROMPTS)
    assert reward_of(large, also_large, weights=[1, -1])(pictures(), PROMPTS)[0][1] == 0


@pytest.mark.parametrize("grad", [False, True])
def test_what_a_reward_does_to_its_inputs_stays_with_it(grad):
    def vandal(images, prompts, metadata):
        score = images.mean((1, 2, 3))
        images.zero_() if not grad else images.mul_(0)
        prompts[0] = metadata[0]["prompt"] = "another"
        return score

    x, extra = (pictures() * 255).round() / 255, [{"prompt": p} for p in PROMPTS]
    before, prompts = x.clone(), list(PROMPTS)
    total, parts = reward_of(vandal, mean)(x.requires_grad_(grad), prompts, extra, grad=grad)
    assert torch.equal(parts["vandal"], parts["mean"]) and parts["mean"].min() > 0
    assert torch.equal(x, before) and prompts == PROMPTS and extra[0]["prompt"] == PROMPTS[0]


@pytest.mark.parametrize("convert", [list, np.asarray, lambda v: v.double()])
def test_lists_arrays_and_other_floats_become_float32(convert):
    def fn(images, prompts, metadata):
        return convert(images.mean((1, 2, 3)))

    total, parts = reward_of(fn)(pictures(), PROMPTS)
    assert total.dtype == parts["fn"].dtype == torch.float32 and total.shape == (3,)


@pytest.mark.parametrize("grad", [False, True])
def test_total_is_the_weighted_sum_and_every_term_is_logged(grad):
    x = pictures()
    total, parts = reward_of(mean, red, weights=[2.0, -0.5])(x, PROMPTS, grad=grad)
    assert list(parts) == ["mean", "red"]
    assert torch.allclose(parts["red"], x[:, 0].mean((1, 2)), atol=2e-3)
    assert torch.allclose(total, 2 * parts["mean"] - 0.5 * parts["red"], atol=1e-6)


def test_scoring_sees_eight_bit_pixels_and_no_graph_gradients_see_the_tensor():
    seen = []

    def fn(images, prompts, metadata):
        seen.append(images)
        return images.mean((1, 2, 3))

    x = pictures().requires_grad_()
    total, _ = reward_of(fn)(x, PROMPTS)
    assert torch.equal(seen[0], (x.detach() * 255).round() / 255) and not torch.equal(seen[0], x)
    assert not total.requires_grad
    total, _ = reward_of(fn)(x, PROMPTS, grad=True)
    assert torch.equal(seen[1], x) and total.requires_grad
    total, _ = reward_of(fn)(x.detach().bfloat16(), PROMPTS, grad=True)
    assert seen[2].dtype == torch.float32


def test_chunks_see_their_own_prompts_and_metadata():
    def fn(images, prompts, metadata):
        assert len(images) <= 2
        return tensor([m["n"] + len(p) for p, m in zip(prompts, metadata)], dtype=torch.float32)

    extra = [{"n": 100 * i} for i in range(3)]
    total, _ = reward_of(fn)(pictures(), PROMPTS, extra, chunk=2)
    assert total.tolist() == [100 * i + len(p) for i, p in enumerate(PROMPTS)]


def test_autocast_around_the_reward_changes_nothing():
    w = torch.randn(3 * 1600)

    def fn(images, prompts, metadata):
        return images.flatten(1) @ w

    outside, _ = reward_of(fn)(pictures(), PROMPTS)
    with torch.autocast("cpu", torch.bfloat16):
        inside, _ = reward_of(fn)(pictures(), PROMPTS)
    assert torch.equal(outside, inside)


@pytest.mark.parametrize(
    "images, prompts, words",
    [
        (torch.zeros(3, 3, 8, 8, dtype=torch.uint8), PROMPTS, "uint8"),
        (pictures()[0], PROMPTS, "(3, 40, 40)"),
        (pictures(), PROMPTS[:2], "3 images but 2 prompts"),
        (pictures()[:1], "x", "list"),
        (np.zeros((3, 3, 8, 8)), PROMPTS, "ndarray"),
    ],
)
def test_wrong_inputs_are_refused(images, prompts, words):
    with pytest.raises(ValueError) as e:
        reward_of(mean)(images, prompts)
    assert words in str(e.value) and not isinstance(e.value, RewardError)


@pytest.mark.parametrize("images, words", [(pictures() * 2 - 1, "[-1, 1]"), (pictures() * math.nan, "nan")])
def test_pixels_that_only_a_broken_run_makes_stop_it_with_a_checkpoint(images, words):
    with pytest.raises(RewardError) as e:
        reward_of(mean)(images, PROMPTS)
    assert words in str(e.value)


def test_gradient_is_refused_where_there_is_none():
    with pytest.raises(ValueError, match="reward jpeg passes no gradients"):
        load("jpeg")(pictures(), PROMPTS, grad=True)

    def cut(images, prompts, metadata):
        return images.mean((1, 2, 3)).detach()

    with pytest.raises(RewardError, match="'cut' is declared differentiable"):
        reward_of(cut)(pictures().requires_grad_(), PROMPTS, grad=True)


# ---- the resize -----------------------------------------------------------------------------------------------------
def photo(h, w):
    """Edges, gradients and texture, (h, w, 3) uint8; not saturated, since PIL clips between its two passes."""
    y, x = np.mgrid[:h, :w] / min(h, w)
    image = np.stack([np.sin(9 * x * y + c) + 0.5 * np.sin(40 * x + 31 * y * c) for c in range(3)], -1) / 5 + 0.5
    image[h // 4 : h // 2, w // 3 : w // 2] = (0.85, 0.3, 0.2)
    image += np.random.default_rng(0).normal(0, 0.03, image.shape)
    return (image.clip(0, 1) * 255).astype(np.uint8)


def pil_reference(pixels, size, mode):
    h, w = pixels.shape[:2]
    side = min(h, w) if mode == "crop" else max(h, w)
    small = Image.fromarray(pixels).resize((round(w * size / side), round(h * size / side)), Image.BICUBIC)
    shift = round if mode == "crop" else math.ceil  # padding: the odd row goes to the right and below
    left, top = shift((small.width - size) / 2), shift((small.height - size) / 2)
    return np.asarray(small.crop((left, top, left + size, top + size)), np.float64)  # outside the picture: zeros


@pytest.mark.parametrize("h, w, mode", [(512, 512, "crop"), (32, 32, "crop"), (300, 450, "crop"), (450, 300, "pad")])
def test_resize_is_pils_bicubic(h, w, mode):
    pixels = photo(h, w)
    x = torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255
    out = clip_judge.resize_for_clip(x, 224, mode)
    assert out.shape == (1, 3, 224, 224) and out.min() >= 0 and out.max() <= 1
    error = np.abs(out[0].permute(1, 2, 0).numpy() * 255 - pil_reference(pixels, 224, mode))
    assert error.mean() < 0.5 and error.max() < 3
    if h > 224:  # the bound is tight enough to notice a resize without antialiasing
        plain = F.interpolate(x, (224, 224), mode="bicubic", align_corners=False)[0].permute(1, 2, 0).numpy() * 255
        assert np.abs(plain - pil_reference(pixels, 224, mode)).mean() > 1.5


def test_hpsv2s_resize_keeps_bicubics_overshoot_and_clips_does_not():
    """Its reference resizes a float tensor and does not clamp it; PIL, hence CLIP's, does."""
    x = torch.zeros(1, 3, 448, 448)
    x[..., 200:] = 1
    plain = F.interpolate(x, (224, 224), mode="bicubic", antialias=True, align_corners=False)
    assert plain.max() > 1.01 and plain.min() < -0.01
    assert torch.equal(clip_judge.resize_for_clip(x, 224, "pad"), plain)
    assert torch.equal(clip_judge.resize_for_clip(x, 224, "crop"), plain.clamp(0, 1))


def test_resize_at_the_models_size_is_exact_and_unknown_modes_are_refused():
    x = pictures(1, 32, 32)
    assert torch.equal(clip_judge.resize_for_clip(x, 32), x)
    with pytest.raises(ValueError, match="'squash'"):
        clip_judge.resize_for_clip(x, 32, "squash")


# ---- tiny checkpoints -----------------------------------------------------------------------------------------------
def clip_tokenizer():
    """A real CLIPTokenizer that spells everything."""
    from transformers import CLIPTokenizer

    letters = [c for c in string.printable if 33 <= ord(c) < 127]
    vocab = letters + [c + "</w>" for c in letters] + ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={token: i for i, token in enumerate(vocab)}, merges=[])


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory):
    return save_clip(tmp_path_factory.mktemp("clip"))


def save_clip(folder):
    """A small random CLIPModel with tokenizer, as save_pretrained writes them, and an aesthetic head head.pth."""
    from transformers import CLIPConfig, CLIPModel

    tokenizer = clip_tokenizer()
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    text = {**size, **ends, "vocab_size": len(tokenizer), "max_position_embeddings": 40}
    vision = {**size, "image_size": 32, "patch_size": 8}
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.2)
        model.logit_scale.fill_(math.log(100))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    head = {}
    sizes = (8, 1024, 128, 64, 16, 1)
    for i, a, b in zip((0, 2, 4, 6, 7), sizes, sizes[1:]):
        head[f"layers.{i}.weight"], head[f"layers.{i}.bias"] = torch.randn(b, a) / a**0.5, torch.randn(b)
    torch.save(head, folder / "head.pth")
    return folder


def random_state(shapes_of: dict, seed=0):
    """Random float64 weights; LayerNorm gains (1-D .weight) around 1."""
    g = torch.Generator().manual_seed(seed)
    state = {}
    for name, s in shapes_of.items():
        noise = 0.3 * torch.randn(s, generator=g, dtype=torch.float64)
        state[name] = noise + (len(s) == 1 and name.endswith("weight"))
    return state


def attention(q, k, v, heads, mask=None):
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


def linear(s, name, x):
    return x @ s[name + ".weight"].T + s[name + ".bias"]


def norm(s, name, x, eps=1e-5):
    return F.layer_norm(x, x.shape[-1:], s[name + ".weight"], s[name + ".bias"], eps)


def normalised(x):
    m, d = tensor([0.48145466, 0.4578275, 0.40821073]), tensor([0.26862954, 0.26130258, 0.27577711])
    return (x - m.to(x).view(3, 1, 1)) / d.to(x).view(3, 1, 1)


# open_clip's CLIP, reduced: the heads stay those of ViT-H/14
HPS_V = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "patch_size": 8, "image_size": 24,
         "projection_dim": 12}  # fmt: skip
HPS_T = {"hidden_size": 16, "intermediate_size": 40, "num_hidden_layers": 2, "projection_dim": 12}


def openclip_state(vocab):
    names = {"positional_embedding": (77, 16), "text_projection": (16, 12), "logit_scale": (),
             "visual.class_embedding": (32,), "visual.positional_embedding": (10, 32), "visual.proj": (32, 12),
             "visual.conv1.weight": (32, 3, 8, 8), "token_embedding.weight": (vocab, 16)}  # fmt: skip
    for ln, width in (("visual.ln_pre", 32), ("visual.ln_post", 32), ("ln_final", 16)):
        names |= {f"{ln}.weight": (width,), f"{ln}.bias": (width,)}
    for tower, d, m in (("visual.transformer", 32, 48), ("transformer", 16, 40)):
        for b in (f"{tower}.resblocks.{i}." for i in range(2)):
            for part, s in (("ln_1", (d,)), ("ln_2", (d,)), ("attn.out_proj", (d, d)), ("mlp.c_fc", (m, d)),
                            ("mlp.c_proj", (d, m))):  # fmt: skip
                names |= {f"{b}{part}.weight": s, f"{b}{part}.bias": s[:1]}
            names |= {f"{b}attn.in_proj_weight": (3 * d, d), f"{b}attn.in_proj_bias": (3 * d,)}
    return random_state(names)


def openclip_score(s, images, ids, gelu=F.gelu, heads=16):
    """Cosine of image and text, written from open_clip's definition."""

    def blocks(x, tower, mask=None):
        for i in range(2):
            b = f"{tower}.resblocks.{i}."
            h = norm(s, b + "ln_1", x)
            qkv = (h @ s[b + "attn.in_proj_weight"].T + s[b + "attn.in_proj_bias"]).chunk(3, -1)
            x = x + linear(s, b + "attn.out_proj", attention(*qkv, heads, mask))
            x = x + linear(s, b + "mlp.c_proj", gelu(linear(s, b + "mlp.c_fc", norm(s, b + "ln_2", x))))
        return x

    v = F.conv2d(normalised(images), s["visual.conv1.weight"], stride=8).flatten(2).transpose(1, 2)
    v = torch.cat([s["visual.class_embedding"].expand(len(v), 1, -1), v], 1) + s["visual.positional_embedding"]
    v = norm(s, "visual.ln_post", blocks(norm(s, "visual.ln_pre", v), "visual.transformer")[:, 0]) @ s["visual.proj"]
    t = s["token_embedding.weight"][ids] + s["positional_embedding"]
    t = blocks(t, "transformer", torch.ones(77, 77, dtype=torch.bool).tril())
    t = norm(s, "ln_final", t)[torch.arange(len(ids)), ids.argmax(-1)] @ s["text_projection"]
    return F.cosine_similarity(v, t)


@pytest.fixture
def hps(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("hps")
    tokenizer = clip_tokenizer()
    ends = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
    monkeypatch.setattr(clip_judge, "HPS_VISION", clip_judge.HPS_VISION | HPS_V)
    monkeypatch.setattr(clip_judge, "HPS_TEXT", clip_judge.HPS_TEXT | HPS_T | ends)
    state = openclip_state(len(tokenizer))
    torch.save({"state_dict": state, "epoch": 3}, folder / "HPS.pt")
    tokenizer.save_pretrained(folder / "tokenizer")
    return folder / "HPS.pt", state, tokenizer


def test_hpsv2_is_open_clip_in_value_and_gradient(hps):
    path, state, tokenizer = hps
    random = torch.get_rng_state()
    fn = load("hpsv2", dtype=torch.float64, paths={"hpsv2": str(path)}).terms[0].fn
    assert torch.equal(random, torch.get_rng_state())  # loading leaves the global random state alone
    ids = torch.zeros(3, 77, dtype=torch.long)  # open_clip pads with zeros
    for row, prompt in zip(ids, PROMPTS):
        tokens = tensor(tokenizer(prompt).input_ids)
        row[: len(tokens)] = tokens
    x = pictures(3, 24, 24, torch.float64).requires_grad_()
    y = x.detach().clone().requires_grad_()
    ours, theirs = fn(x, PROMPTS, None), openclip_score(state, y, ids)
    assert (ours - theirs).abs().max() < 1e-7  # 1e-7: the mean and deviation of the reference are float32
    ours.sum().backward(), theirs.sum().backward()
    assert (x.grad - y.grad).abs().max() < 1e-6 * y.grad.abs().max() and y.grad.abs().max() > 1e-3
    for wrong in (dict(gelu=lambda h: h * (1.702 * h).sigmoid()), dict(heads=8)):
        assert (ours - openclip_score(state, y, ids, **wrong)).abs().max() > 1e-4, wrong


def test_hpsv2_cleans_text_truncates_and_pads_non_square_images(hps):
    fn = load("hpsv2", dtype=torch.float64, paths={"hpsv2": str(hps[0])}).terms[0].fn
    x = pictures(1, 24, 24, torch.float64)
    assert torch.equal(fn(x, ["  \u201ccaf\u201d &amp;amp; tea"], None), fn(x, ['"caf" & tea'], None))
    assert torch.equal(fn(x, ["x " * 200], None), fn(x, ["x " * 75], None))  # 77 tokens with both ends
    assert not torch.equal(fn(x, ["x " * 74], None), fn(x, ["x " * 75], None))
    wide = x[:, :, 6:18]
    assert torch.allclose(fn(wide, ["a"], None), fn(F.pad(wide, (0, 0, 6, 6)), ["a"], None))


def test_openclip_key_map_is_strict(hps):
    path, state, _ = hps
    with pytest.raises(KeyError, match="visual.attnpool"):
        clip_judge.openclip_to_clip(state | {"visual.attnpool.weight": torch.zeros(1)})
    del state["visual.transformer.resblocks.1.mlp.c_fc.bias"]
    torch.save({"state_dict": state}, path.with_name("less.pt"))
    with pytest.raises(RuntimeError, match="vision_model.encoder.layers.1.mlp.fc1.bias"):
        load("hpsv2.0", paths={"hpsv2.0": str(path.with_name("less.pt"))})


# ImageReward, reduced: the heads and eps stay the real ones
BLIP_V = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "image_size": 24, "patch_size": 8}
BLIP_T = {"vocab_size": 12, "hidden_size": 24, "encoder_hidden_size": 32, "intermediate_size": 40,
          "num_hidden_layers": 2, "max_position_embeddings": 64}  # fmt: skip
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "circle", "two", "blue", "squares", "above"]


def imagereward_state():
    v, t = "blip.visual_encoder.", "blip.text_encoder."
    names = {v + "cls_token": (1, 1, 32), v + "pos_embed": (1, 10, 32), v + "patch_embed.proj.weight": (32, 3, 8, 8),
             v + "patch_embed.proj.bias": (32,), v + "norm.weight": (32,), v + "norm.bias": (32,),
             t + "embeddings.word_embeddings.weight": (12, 24), t + "embeddings.position_embeddings.weight": (64, 24),
             t + "embeddings.LayerNorm.weight": (24,), t + "embeddings.LayerNorm.bias": (24,),
             "blip.vision_proj.weight": (4, 32), "blip.text_proj.weight": (4, 24)}  # fmt: skip
    linears = {}
    for i in range(2):
        b = f"{v}blocks.{i}."
        linears |= {b + "norm1": (32,), b + "norm2": (32,), b + "attn.qkv": (96, 32), b + "attn.proj": (32, 32),
                    b + "mlp.fc1": (48, 32), b + "mlp.fc2": (32, 48)}  # fmt: skip
        b = f"{t}encoder.layer.{i}."
        linears |= {b + "intermediate.dense": (40, 24), b + "output.dense": (24, 40), b + "output.LayerNorm": (24,)}
        for kind, source in (("attention", 24), ("crossattention", 32)):
            linears |= {f"{b}{kind}.self.query": (24, 24), f"{b}{kind}.self.key": (24, source),
                        f"{b}{kind}.self.value": (24, source), f"{b}{kind}.output.dense": (24, 24),
                        f"{b}{kind}.output.LayerNorm": (24,)}  # fmt: skip
    sizes = (24, 1024, 128, 64, 16, 1)
    linears |= {f"mlp.layers.{i}": (b, a) for i, a, b in zip((0, 2, 4, 6, 7), sizes, sizes[1:])}
    for name, s in linears.items():
        names |= {name + ".weight": s, name + ".bias": s[:1]}
    state = random_state(names)
    for i in (0, 2, 4, 6, 7):
        state[f"mlp.layers.{i}.weight"] *= 0.3
    state[t + "embeddings.position_ids"] = torch.arange(64)[None]
    return state


def imagereward_score(s, images, prompts, heads=12, vision_heads=16, eps=1e-6, masked=True, causal=False):
    """Written from the definition of BLIP (ViT with LayerNorm before, BERT with LayerNorm after each part)."""
    v = "blip.visual_encoder."
    x = F.conv2d(normalised(images), s[v + "patch_embed.proj.weight"], s[v + "patch_embed.proj.bias"], stride=8)
    x = x.flatten(2).transpose(1, 2)
    x = torch.cat([s[v + "cls_token"].expand(len(x), 1, -1), x], 1) + s[v + "pos_embed"]
    for b in (f"{v}blocks.{i}." for i in range(2)):
        qkv = linear(s, b + "attn.qkv", norm(s, b + "norm1", x, eps)).chunk(3, -1)
        x = x + linear(s, b + "attn.proj", attention(*qkv, vision_heads))
        x = x + linear(s, b + "mlp.fc2", F.gelu(linear(s, b + "mlp.fc1", norm(s, b + "norm2", x, eps))))
    context = norm(s, v + "norm", x, eps)

    ids = torch.zeros(len(prompts), 35, dtype=torch.long)
    for row, prompt in zip(ids, prompts):
        words = [WORDS.index("[CLS]"), *(WORDS.index(w) for w in prompt.split())][:34] + [WORDS.index("[SEP]")]
        row[: len(words)] = tensor(words)
    mask = (ids != 0)[:, None, None] if masked else torch.ones(1, 1, 1, 35, dtype=torch.bool)
    if causal:
        mask = mask & torch.ones(35, 35, dtype=torch.bool).tril()
    e = "blip.text_encoder.embeddings."
    x = s[e + "word_embeddings.weight"][ids] + s[e + "position_embeddings.weight"][:35]
    x = norm(s, e + "LayerNorm", x, 1e-12)
    for b in (f"blip.text_encoder.encoder.layer.{i}." for i in range(2)):
        for kind, other, m in (("attention", None, mask), ("crossattention", context, None)):
            source = x if other is None else other
            q, k, w = (linear(s, f"{b}{kind}.self.{n}", y) for n, y in
                       (("query", x), ("key", source), ("value", source)))  # fmt: skip
            h = linear(s, f"{b}{kind}.output.dense", attention(q, k, w, heads, m))
            x = norm(s, f"{b}{kind}.output.LayerNorm", h + x, 1e-12)
        h = linear(s, b + "output.dense", F.gelu(linear(s, b + "intermediate.dense", x)))
        x = norm(s, b + "output.LayerNorm", h + x, 1e-12)
    x = x[:, 0]
    for i in (0, 2, 4, 6, 7):
        x = linear(s, f"mlp.layers.{i}", x)
    return (x[:, 0] - 0.16717362830052426) / 1.0333394966054072


@pytest.fixture
def blip(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("blip")
    monkeypatch.setattr(imagereward, "BLIP_VISION", imagereward.BLIP_VISION | BLIP_V)
    monkeypatch.setattr(imagereward, "BLIP_TEXT", imagereward.BLIP_TEXT | BLIP_T)
    state = imagereward_state()
    torch.save(state, folder / "ImageReward.pt")
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "vocab.txt").write_text("\n".join(WORDS))
    return folder / "ImageReward.pt", state


def test_imagereward_is_the_definition_and_no_silent_default(blip):
    path, state = blip
    fn = load("imagereward", dtype=torch.float64, paths=str(path)).terms[0].fn
    prompts = ["a red circle", "two blue squares above a red circle", "a red " * 30]  # the last is cut at 35 tokens
    x = pictures(3, 24, 24, torch.float64).requires_grad_()
    y = x.detach().clone().requires_grad_()
    ours, theirs = fn(x, prompts, None), imagereward_score(state, y, prompts)
    assert (ours - theirs).abs().max() < 1e-6 and ours.std() > 0.01
    assert torch.equal(ours, fn(x, prompts, None))  # nothing random: no dropout is on
    ours.sum().backward(), theirs.sum().backward()
    assert (x.grad - y.grad).abs().max() < 1e-5 * y.grad.abs().max() and y.grad.abs().max() > 1e-4
    traps = dict(heads=8), dict(vision_heads=8), dict(eps=1e-5), dict(masked=False), dict(causal=True)
    for trap in traps:
        distance = (ours - imagereward_score(state, y, prompts, **trap)).abs().max()
        assert distance > 3 * (ours - theirs).abs().max() and distance > 3e-6, (trap, distance)


def text_call(**forced):
    """BlipTextModel.forward with these arguments whatever the caller says."""
    from transformers import BlipTextModel

    original = BlipTextModel.forward
    return BlipTextModel, "forward", lambda self, *a, **k: original(self, *a, **(k | forced))


TRAPS = {
    "text heads of BLIP's default config": lambda: (imagereward.BLIP_TEXT, "num_attention_heads", 8),
    "vision eps of BLIP's default config": lambda: (imagereward.BLIP_VISION, "layer_norm_eps", 1e-5),
    "is_decoder in the call": lambda: text_call(is_decoder=True),
    "no attention mask": lambda: text_call(attention_mask=None),
    "head in train mode": lambda: (imagereward.ImageReward, "forward", dropped(imagereward.ImageReward.forward)),
}


def dropped(forward):
    """What the package's head would do if nobody called eval()."""

    def wrong(self, *inputs):
        with pytest.MonkeyPatch.context() as patch:
            original = torch.nn.Linear.forward
            is_head = {id(linear) for linear in self.head.values()}
            patch.setattr(torch.nn.Linear, "forward",
                          lambda m, x: F.dropout(original(m, x), 0.2 if id(m) in is_head else 0.0))  # fmt: skip
            return forward(self, *inputs)

    return wrong


@pytest.mark.parametrize("trap", TRAPS)
def test_each_silent_trap_of_imagereward_loads_strictly_and_is_noticed(trap, blip, monkeypatch):
    path, state = blip
    prompts = ["a red circle", "two blue squares above a red circle"]
    x = pictures(2, 24, 24, torch.float64)
    truth = imagereward_score(state, x, prompts)

    def error():
        rewards._load_term.cache_clear()
        fn = load("imagereward", dtype=torch.float64, paths=str(path)).terms[0].fn
        return (fn(x, prompts, None) - truth).abs().max().item()

    ours = error()
    target, name, value = TRAPS[trap]()
    (monkeypatch.setitem if isinstance(target, dict) else monkeypatch.setattr)(target, name, value)
    trapped = error()  # no error at loading
    rewards._load_term.cache_clear()
    assert ours < 1e-6 and trapped > 3e-6 and trapped > 5 * ours, (ours, trapped)


def test_imagereward_is_in_eval_mode_and_has_no_dropout_to_forget(blip):
    model = imagereward.ImageReward(imagereward.BLIP_VISION, imagereward.BLIP_TEXT)
    assert not any(m.p for m in model.modules() if isinstance(m, torch.nn.Dropout))
    fn = load("imagereward", dtype=torch.float64, paths=str(blip[0])).terms[0].fn
    loaded = next(c.cell_contents for c in fn.__closure__ if isinstance(c.cell_contents, imagereward.ImageReward))
    assert not any(m.training for m in loaded.modules()) and not any(p.requires_grad for p in loaded.parameters())


def test_is_decoder_false_in_the_config_would_not_load(blip, monkeypatch):
    monkeypatch.setitem(imagereward.BLIP_TEXT, "is_decoder", False)
    rewards._load_term.cache_clear()
    with pytest.raises(RuntimeError, match="crossattention"):
        load("imagereward", paths=str(blip[0]))


def test_imagereward_key_map_is_strict(blip):
    path, state = blip
    del state["blip.text_encoder.encoder.layer.1.crossattention.self.key.weight"]
    torch.save(state, path.with_name("less.pt"))
    with pytest.raises(RuntimeError, match="crossattention.self.key.weight"):
        load("imagereward", paths=str(path.with_name("less.pt")))


def test_published_sizes():
    """What the checkpoints were trained with and no strict load would notice."""
    from transformers import CLIPConfig, CLIPModel

    with torch.device("meta"):
        vit_h = CLIPModel(
            CLIPConfig(vision_config=clip_judge.HPS_VISION, text_config=clip_judge.HPS_TEXT, projection_dim=1024)
        )
        blip = imagereward.ImageReward(imagereward.BLIP_VISION, imagereward.BLIP_TEXT)
    millions = [sum(p.numel() for p in m.parameters()) / 1e6 for m in (vit_h, blip)]
    assert millions == pytest.approx([986.1, 446.2], abs=0.05)
    assert imagereward.BLIP_TEXT["num_attention_heads"] == 12 and imagereward.BLIP_VISION["num_attention_heads"] == 16
    assert imagereward.BLIP_VISION["layer_norm_eps"] == 1e-6 and imagereward.BLIP_TEXT["layer_norm_eps"] == 1e-12
    assert clip_judge.HPS_VISION["hidden_act"] == clip_judge.HPS_TEXT["hidden_act"] == "gelu"
    assert clip_judge.HPS_VISION["num_attention_heads"] == clip_judge.HPS_TEXT["num_attention_heads"] == 16


# ---- gradients ------------------------------------------------------------------------------------------------------
CLIP_TYPE = ["clipscore", "clipscore-hessel", "pickscore", "pickscore26", "aesthetic"]


def clip_paths(name, folder):
    return {name: f"{folder},{folder / 'head.pth'}" if name == "aesthetic" else str(folder)}


def directional_error(fn, x, prompts):
    """Relative error of the derivative along a random direction against central differences, float64."""
    x = x.clone().requires_grad_()
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (gradient,) = torch.autograd.grad(fn(x, prompts, None).sum(), x)
    with torch.no_grad():
        h = 1e-4
        numeric = (fn(x + h * direction, prompts, None) - fn(x - h * direction, prompts, None)).sum() / (2 * h)
    assert numeric.abs() > 1e-6
    return abs((gradient * direction).sum() / numeric - 1)


@pytest.mark.parametrize("name", CLIP_TYPE)
def test_gradient_of_clip_rewards_through_the_resize(name, clip_folder):
    reward = load(name, dtype=torch.float64, paths=clip_paths(name, clip_folder))
    fn = reward.terms[0].fn
    prompts = PROMPTS
    if name == "clipscore-hessel":  # keep away from the kink at 0: choose prompts with a positive score
        prompts = [max(PROMPTS, key=lambda p, i=i: fn(pictures(3, 50, 40, torch.float64)[i : i + 1], [p], None))
                   for i in range(3)]  # fmt: skip
    x = pictures(3, 50, 40, torch.float64)
    assert directional_error(fn, x, prompts) < 1e-5
    y = x.clone().requires_grad_()
    total, _ = reward(y, prompts, grad=True, chunk=2)  # the callable passes the same gradient on
    expected = torch.autograd.grad(fn(x := x.requires_grad_(), prompts, None).sum(), x)[0]
    assert torch.allclose(torch.autograd.grad(total.sum(), y)[0], expected, rtol=1e-5, atol=1e-9)


def test_gradient_of_hpsv2_and_imagereward_through_the_resize(hps, blip):
    x = pictures(2, 50, 40, torch.float64)
    fn = load("hpsv2", dtype=torch.float64, paths={"hpsv2": str(hps[0])}).terms[0].fn
    assert directional_error(fn, x, PROMPTS[:2]) < 1e-5
    fn = load("imagereward", dtype=torch.float64, paths={"imagereward": str(blip[0])}).terms[0].fn
    assert directional_error(fn, x, ["a red circle", "two blue squares"]) < 1e-5


# ---- conventions of the CLIP-type rewards ---------------------------------------------------------------------------
def test_conventions_with_known_embeddings(monkeypatch, clip_folder):
    """Image (3, 4); text (1, 0), (0, 1), (-1, 0) by prompt: cosines .6, .8, -.6, whatever the lengths."""
    known = {"x": (1.0, 0.0), "y": (0.0, 7.0), "-x": (-2.0, 0.0)}
    seen = []

    def text(self, prompt):
        seen.append(prompt)
        return clip_judge.unit(tensor(known[prompt.removeprefix("A photo depicts ")]))

    monkeypatch.setattr(clip_judge.Clip, "_encode", text)
    monkeypatch.setattr(
        clip_judge.Clip, "images", lambda self, images: clip_judge.unit(tensor([[3.0, 4.0]] * len(images)))
    )
    rewards._load_term.cache_clear()
    score = {n: load(n, paths=clip_paths(n, clip_folder))(pictures(), list(known))[0] for n in CLIP_TYPE[:4]}
    rewards._load_term.cache_clear()
    assert torch.allclose(score["clipscore"], tensor([0.6, 0.8, -0.6]))
    assert torch.allclose(score["clipscore-hessel"], tensor([1.5, 2.0, 0.0]))
    assert torch.allclose(score["pickscore"], tensor([60.0, 80.0, -60.0]))
    assert torch.allclose(score["pickscore26"], tensor([60.0, 80.0, -60.0]) / 26)
    assert seen[3] == "A photo depicts x" and seen[:3] == list(known)


def test_clipscores_text_is_cleaned_as_openais_and_pickscores_is_not(clip_folder, monkeypatch):
    """clip.tokenize() mends quotes and entities before it counts tokens; PickScore's processor is transformers'."""
    monkeypatch.setattr(rewards, "check_packages", lambda name: None)
    curly, plain = "a \u201cred\u201d &amp;amp; blue sign", 'a "red" & blue sign'
    x = pictures(1).expand(2, -1, -1, -1)
    for name, same in (("clipscore", True), ("clipscore-hessel", True), ("pickscore", False)):
        both = (
            load(name, dtype=torch.float64, paths=clip_paths(name, clip_folder)).terms[0].fn(x, [curly, plain], None)
        )
        assert (both[0] == both[1]).item() == same, name


def test_clipscore_is_transformers_cosine(clip_folder):
    from transformers import CLIPModel

    model, tokenizer = CLIPModel.from_pretrained(clip_folder, dtype=torch.float32).eval(), clip_tokenizer()
    x = pictures(3, 32, 32)
    ids = tokenizer(PROMPTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        rounded = (x * 255).round() / 255
        expected = F.cosine_similarity(model.get_image_features(pixel_values=normalised(rounded)).pooler_output,
                                       model.get_text_features(**ids).pooler_output)  # fmt: skip
    total, _ = load("clipscore", paths=str(clip_folder))(x, PROMPTS)
    assert torch.allclose(total, expected, atol=1e-6) and expected.std() > 1e-3


def test_aesthetic_five_layers_are_one_affine_map(clip_folder):
    state = torch.load(clip_folder / "head.pth", weights_only=True)
    weight, bias = clip_judge.aesthetic_head(state)
    x = torch.randn(5, 8, dtype=torch.float64)
    y = x
    for i in (0, 2, 4, 6, 7):
        y = linear({k: v.double() for k, v in state.items()}, f"layers.{i}", y)
    assert (y[:, 0] - (x @ weight + bias)).abs().max() < 1e-12
    clip = clip_judge.Clip(clip_judge._clip_model(clip_folder, "cpu", torch.float32)[0])
    total, _ = load("aesthetic", paths=clip_paths("aesthetic", clip_folder))(pictures(), PROMPTS)
    rounded = (pictures() * 255).round() / 255
    assert torch.allclose(total, (clip.images(rounded).double() @ weight + bias).float(), atol=1e-5)


def test_half_precision_models_give_float32_scores_from_unrounded_dot_products(clip_folder):
    fine, coarse = (load("clipscore", dtype=d, paths=str(clip_folder)) for d in (torch.float32, torch.bfloat16))
    out = coarse.terms[0].fn(pictures(), PROMPTS, None)
    assert out.dtype == torch.float32 and not torch.equal(out, out.bfloat16().float())
    assert (fine(pictures(), PROMPTS)[0] - out).abs().max() < 0.05
    scale = clip_judge._clip_model(clip_folder, "cpu", torch.bfloat16)[1]
    assert scale == pytest.approx(100, rel=1e-6)  # bfloat16 would make it 98.9


def test_chunks_change_nothing_but_memory(clip_folder):
    reward = load("clipscore=1,aesthetic=0.1,jpeg=0.5", paths=clip_paths("aesthetic", clip_folder) |
                  {"clipscore": str(clip_folder)})  # fmt: skip
    x, prompts = pictures(7), (PROMPTS * 3)[:7]
    whole, parts = reward(x, prompts)
    for chunk in (1, 3):
        total, by_chunk = reward(x, prompts, chunk=chunk)
        assert torch.allclose(total, whole, atol=1e-5)
        assert all(torch.allclose(by_chunk[k], parts[k], atol=1e-5) for k in parts)


def test_models_are_loaded_once_and_shared(clip_folder, monkeypatch):
    from transformers import CLIPModel

    loads = []
    original = CLIPModel.from_pretrained
    monkeypatch.setattr(CLIPModel, "from_pretrained", lambda *a, **k: loads.append("CLIPModel") or original(*a, **k))
    rewards._load_term.cache_clear(), clip_judge._clip_model.cache_clear()
    paths = {"pickscore": str(clip_folder), "pickscore26": str(clip_folder)}
    first = load("pickscore=1,pickscore26=1", paths=paths)
    second = load("pickscore=3", paths={"pickscore": str(clip_folder)})
    assert loads.count("CLIPModel") == 1
    assert first.terms[0].fn is second.terms[0].fn and [first.terms[0].weight, second.terms[0].weight] == [1, 3]


def test_prompts_first_seen_in_inference_mode_work_in_a_graph(clip_folder):
    reward = load("clipscore", paths=str(clip_folder))
    with torch.inference_mode():
        reward(pictures(), ["first", "seen", "here"])
    x = pictures().requires_grad_()
    total, _ = reward(x, ["first", "seen", "here"], grad=True)
    assert torch.autograd.grad(total.sum(), x)[0].abs().max() > 0


def test_tokenizer_of_another_model_is_refused(clip_folder, tmp_path):
    import shutil

    shutil.copytree(clip_folder, tmp_path / "clip")
    config = tmp_path / "clip" / "config.json"
    config.write_text(
        config.read_text().replace(f'"eos_token_id": {clip_tokenizer().eos_token_id}', '"eos_token_id": 5')
    )
    with pytest.raises(UsageError, match="eos_token_id is 5 in the model"):
        load("clipscore", paths=str(tmp_path / "clip"))


# ---- black-box rewards ----------------------------------------------------------------------------------------------
def test_shapes_reward_is_the_checkers():
    rng = np.random.default_rng(0)
    images = np.stack([shapes.render(p, rng) for p in PROMPTS]).transpose(0, 3, 1, 2) / 255
    x = torch.from_numpy(images).float()
    total, parts = load("shapes=1,shapes-strict=10")(x, PROMPTS)
    score, strict = shapes.score(images, PROMPTS)
    assert parts["shapes"].tolist() == score.tolist() and parts["shapes-strict"].tolist() == strict.tolist()
    total, parts = load("shapes=1,shapes-strict=10")(x, PROMPTS[1:] + PROMPTS[:1])  # wrong captions
    assert parts["shapes"].max() < 1 and parts["shapes-strict"].sum() == 0 and parts["shapes"].max() > 0
    assert load("shapes-strict").terms[0].metric and not load("shapes").terms[0].metric
    with pytest.raises(RewardError, match="reward 'shapes' raised ValueError.*32"):
        load("shapes")(pictures(), PROMPTS)


@pytest.mark.parametrize(
    "text, target, score",
    [
        ("Hello", "Hello", 1),
        ("xx he lloyy", "HELLO", 1),  # substring, case, spaces
        ("hxllo", "hello", 0.8),
        ("helo", "hello", 0.8),
        ("hexllo", "hello", 0.8),
        ("", "hello", 0),
        ("a completely different long text", "zq", 0),  # the distance is capped at the target's length
        ("GRÜSSE aus Köln", "grüsse", 1),
        ("日本語", "日本人", 1 - 1 / 3),
    ],
)
def test_ocr_score(text, target, score):
    assert ocr.ocr_score(text, target) == pytest.approx(score)


def test_ocr_target_is_between_the_first_two_quotes():
    assert ocr.ocr_target('a sign "Open" by "Bob"') == "Open"
    for prompt in ("no quotes", 'one " only', 'empty ""', 'blank " "', "curly \u201cHello\u201d"):
        with pytest.raises(ValueError, match="double quotes"):
            ocr.ocr_target(prompt)


def test_ocr_engine_reads_rendered_words():
    pytest.importorskip(
        "rapidocr", reason="rapidocr is not installed (pip install rapidocr==3.10.0 onnxruntime==1.31.1)"
    )
    words, images = ["Hello", "COFFEE", ""], []
    for word in words:
        image = Image.new("RGB", (256, 96), "white")
        ImageDraw.Draw(image).text((20, 20), word, fill=(180, 0, 0), font=ImageFont.load_default(48))
        images.append(torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255)
    prompts = ['a sign that says "hello"', 'a cup with "Coffee" on it', 'a sign that says "hello"']
    total, _ = load("ocr")(torch.stack(images), prompts)
    assert total.tolist() == [1, 1, 0]
    total, _ = load("ocr")(torch.stack(images[:1]), ['a sign "Jello"'])
    assert total.item() == pytest.approx(0.8)


def test_jpeg_is_ddpos_size():
    x = torch.cat([torch.full((1, 3, 64, 64), 0.5), torch.rand(1, 3, 64, 64)])
    sizes = []
    for image in x:
        buffer = io.BytesIO()
        Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy()).save(buffer, "JPEG", quality=95)
        sizes.append(len(buffer.getvalue()) / 1000)
    assert load("jpeg-incompress")(x, PROMPTS[:2])[0].tolist() == pytest.approx(sizes)
    assert load("jpeg")(x, PROMPTS[:2])[0].tolist() == pytest.approx([-s for s in sizes])


# ---- your own -------------------------------------------------------------------------------------------------------
def test_own_function_from_the_current_directory(tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text(
        "def bright(images, prompts, metadata):\n    return images.mean((1, 2, 3))\n"
        "bright.differentiable = True\n"
        "def length(images, prompts, metadata):\n    return [float(len(p)) for p in prompts]\n"
    )
    (tmp_path / "broken_rewards.py").write_text("import no_such_package\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    check("my_rewards:bright=2,my_rewards:length")
    assert rewards.is_differentiable("my_rewards:bright") and not rewards.is_differentiable("my_rewards:length")
    assert rewards.is_differentiable("clipscore") and not rewards.is_differentiable("shapes")
    assert load("my_rewards:bright").differentiable and not load("my_rewards:bright,my_rewards:length").differentiable
    total, parts = load("my_rewards:bright=2,my_rewards:length=0.5")(pictures(), PROMPTS)
    assert parts["my_rewards:length"].tolist() == [len(p) for p in PROMPTS]
    assert torch.allclose(total, 2 * parts["my_rewards:bright"] + 0.5 * parts["my_rewards:length"])
    for spec, word in (("my_rewards:nothing", "no function 'nothing'"), ("absent_module:f", "absent_module"),
                       ("broken_rewards:f", "no_such_package")):  # fmt: skip
        with pytest.raises(UsageError, match=word):
            check(spec)


# ---- command line values and check() --------------------------------------------------------------------------------
def test_parse_spec():
    assert parse_spec("shapes") == [("shapes", 1.0)]
    assert parse_spec(" hpsv2 = 1 , hpsv2.0=-0.5,a.b:f=2e-1") == [("hpsv2", 1), ("hpsv2.0", -0.5), ("a.b:f", 0.2)]


@pytest.mark.parametrize(
    "spec, words",
    [
        ("", "empty term"),
        ("shapes,,jpeg", "empty term"),
        ("clipscor", "did you mean clipscore"),
        ("xyzzy", "known: shapes, shapes-strict, clipscore"),
        ("shapes=one", "'one'"),
        ("shapes=", "not a finite number"),
        ("shapes=nan", "'nan'"),
        ("shapes=1e7", "beyond"),
        ("shapes=-1e300", "beyond"),
        ("shapes=1,shapes=2", "twice"),
        ("a b:f", "package.module:function"),
        ("a:", "package.module:function"),
    ],
)
def test_bad_specs(spec, words):
    with pytest.raises(UsageError, match=words):
        parse_spec(spec)


def test_paths(clip_folder):
    assert parse_paths(None) == {} and parse_paths("tiny/clip") == {"": "tiny/clip"}
    assert parse_paths(["clipscore=tiny/clip", "hpsv2=/a=b.pt"]) == {"clipscore": "tiny/clip", "hpsv2": "/a=b.pt"}
    assert parse_paths(["/runs/lr=1/clip"]) == {"": "/runs/lr=1/clip"}
    for bad in (["clipscor=x"], ["clipscore="], ["clipscore=a", "clipscore=b"], ["a", "b"]):
        with pytest.raises(UsageError):
            parse_paths(bad)
    check("clipscore=1,shapes=1", str(clip_folder), PROMPTS)  # one term takes a path: it gets it
    check("clipscore=1,pickscore=1", {"clipscore": str(clip_folder), "pickscore": str(clip_folder)})
    for spec, paths in (("clipscore,pickscore", "x"), ("shapes", "x"), ("shapes", ["clipscore=x"]),
                        ("shapes", ["shapes=x"])):  # fmt: skip
        with pytest.raises(UsageError, match="--reward-path"):
            check(spec, parse_paths(paths))


@pytest.fixture
def empty_cache(monkeypatch):
    import huggingface_hub

    cached = {}
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda repo, file: cached.get((repo, file)))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return cached


def message(spec, paths=None, prompts=None, metadata=None, lines=None):
    with pytest.raises(UsageError) as e:
        check(spec, paths, prompts, metadata, lines)
    assert "\n" not in str(e.value)
    return str(e.value)


@pytest.mark.parametrize(
    "name, words",
    [
        (
            "hpsv2",
            ["HPS_v2.1_compressed.pt of xswu/HPSv2", "openai/clip-vit-large-patch14", "--reward-path hpsv2=FILE"],
        ),
        ("hpsv2.0", ["HPS_v2_compressed.pt of xswu/HPSv2"]),
        ("clipscore", ["openai/clip-vit-large-patch14", "--reward-path clipscore=FOLDER;"]),
        ("clipscore-hessel", ["openai/clip-vit-base-patch32"]),
        ("pickscore", ["yuvalkirstain/PickScore_v1"]),
        ("aesthetic", ["aesthetic-model.pth of trl-lib/ddpo-aesthetic-predictor", "aesthetic=FOLDER,FILE"]),
        ("imagereward", ["ImageReward.pt of THUDM/ImageReward", "bert-base-uncased", "imagereward=FILE"]),
    ],
)
def test_missing_weights_say_what_where_and_what_else(empty_cache, name, words):
    for word in [f"reward '{name}'", "HF_HUB_OFFLINE is set", "--preset tiny", *words]:
        assert word in message(name)


def test_weights_in_the_cache_or_beside_the_checkpoint_are_enough(empty_cache, tmp_path):
    empty_cache["xswu/HPSv2", "HPS_v2.1_compressed.pt"] = "/cache/file"
    assert "HPS_v2.1" not in message("hpsv2") and "tokenizer.json of openai" in message("hpsv2")
    empty_cache["openai/clip-vit-large-patch14", "vocab.json"] = "/cache/vocab"
    check("hpsv2")
    empty_cache.clear()
    (tmp_path / "ImageReward.pt").touch()
    assert "bert-base-uncased" in message("imagereward", str(tmp_path / "ImageReward.pt"))
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "vocab.txt").touch()
    check("imagereward", str(tmp_path / "ImageReward.pt"))


def test_load_without_check_fails_in_one_sentence_too(empty_cache, tmp_path):
    with pytest.raises(UsageError, match="nor in the local hub cache"):
        load("pickscore")
    with pytest.raises(UsageError, match="no config.json in"):
        load("clipscore", paths=str(tmp_path / "absent"))


def test_check_args_gives_every_reward_its_prompts_and_paths(clip_folder, monkeypatch):
    from types import SimpleNamespace

    seen = []
    monkeypatch.setattr(rewards, "check", lambda *a: seen.append(a))
    train = [SimpleNamespace(text="a", metadata={}), SimpleNamespace(text="b", metadata={"tag": 1})]
    held_out = [SimpleNamespace(text="c", metadata={"tag": 2})]
    args = SimpleNamespace(reward="clipscore", eval_rewards="pickscore=1,jpeg=1", eval_images=1, prompt_list=train,
                           eval_prompt_list=held_out, reward_path=["clipscore=x", "pickscore=y", "deqa=http://h", "http=http://h#tries=2",
                                                          "unifiedreward=http://h#retries=0"],
                           reward_retries=3, group_size=1)  # fmt: skip
    rewards.check_args(args)
    assert {k: args.paths.pop(k) for k in ("deqa", "http", "unifiedreward")} == {
        "deqa": "http://h#retries=3", "http": "http://h#tries=2&retries=3", "unifiedreward": "http://h#retries=0"
    }  # fmt: skip
    assert args.paths == {"clipscore": "x"} and args.eval_paths == {"pickscore": "y"}
    args.reward_path = args.reward_path[:2]
    assert seen == [
        ("clipscore", args.paths, ["a", "b"], [{}, {"tag": 1}], None, "prompts"),
        ("clipscore", args.paths, ["c"], [{"tag": 2}], None, "eval-prompts"),
        ("pickscore=1,jpeg=1", args.eval_paths, ["c"], [{"tag": 2}], None, "eval-prompts"),
    ]
    args.eval_images, seen[:] = 0, []
    rewards.check_args(args)
    assert len(seen) == 1


def test_wrong_paths(tmp_path, clip_folder):
    assert "no config.json in" in message("clipscore", str(tmp_path / "absent"))
    assert "no nothing.pt in" in message("hpsv2", str(tmp_path / "nothing.pt"))
    assert "no tokenizer.json" in message("clipscore", str(copy_without(clip_folder, tmp_path, "tokenizer.json")))
    assert "no head2.pth in" in message("aesthetic", f"{clip_folder},{clip_folder / 'head2.pth'}")


def copy_without(folder, tmp_path, name):
    import shutil

    target = tmp_path / "partial"
    shutil.copytree(folder, target)
    for file in (name, "vocab.json", "merges.txt"):
        (target / file).unlink(missing_ok=True)
    return target


def test_the_hub_is_asked_once_and_not_when_offline(empty_cache, monkeypatch):
    from huggingface_hub import constants

    asked, status, files = [], [200], ["HPS_v2.1_compressed.pt", "vocab.json", "pytorch_model.bin", "config.json"]

    class Hub(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            if self.path.startswith("/api/models/"):
                asked.append((self.path, self.headers["Authorization"]))
            content = json.dumps({"id": "x", "siblings": [{"rfilename": name} for name in files]}).encode()
            self.send_response(status[0])
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *args):
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    message("hpsv2")
    assert asked == []
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    check("hpsv2")
    ids = ["/api/models/xswu/HPSv2", "/api/models/openai/clip-vit-large-patch14"]
    assert asked == [(place, "Bearer hf_secret") for place in ids]
    check("clipscore")  # its weights under the second of three names, its tokenizer under the second of three
    files.remove("pytorch_model.bin")
    assert "openai/clip-vit-large-patch14 has no model.safetensors or" in message("clipscore")
    status[0], asked[:] = 404, []
    assert "404" in message("hpsv2") and len(asked) == 1
    server.shutdown()
    server.server_close()
    assert "not to be had from the hub (" in message("hpsv2")


def test_missing_package_gives_the_pip_line(monkeypatch):
    original = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n in ("rapidocr", "ftfy") else original(n))
    assert "pip install rapidocr==3.10.0 onnxruntime==1.31.1" in message("ocr")
    assert "needs the package ftfy: pip install transformers ftfy" in message("hpsv2")
    monkeypatch.setitem(sys.modules, "tiny.shapes", None)  # a fork without the folder
    assert "folder tiny" in message("shapes")


def test_unsuited_prompts_are_named_by_line(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: True)
    found = message("ocr", prompts=['a sign "a"', "a sign", 'a sign "b"'])
    assert "line 2" in found and "'a sign'" in found and "double quotes" in found
    found = message("shapes-strict", prompts=["a red circle", "a red circle", "a dog"])
    assert "line 3" in found and "'a dog'" in found and "three yellow circles" in found
    check("shapes", prompts=PROMPTS)
    assert "line b.txt:7 " in message("ocr", prompts=['a sign "a"', "a sign"], lines=["b.txt:3", "b.txt:7"])


def test_check_and_import_are_light(clip_folder):
    code = (
        "import sys, time, rewards\n"
        "assert not {'transformers', 'diffusers', 'scipy', 'PIL', 'ftfy', 'rapidocr'} & set(sys.modules)\n"
        "start = time.process_time()\n"
        f"rewards.check('clipscore=1,pickscore=1,jpeg=1', ['clipscore={clip_folder}', 'pickscore={clip_folder}'])\n"
        "print(time.process_time() - start)\n"
        "assert 'transformers' not in sys.modules\n"
        "assert {name for name in sys.modules if name.startswith('judges')} == {'judges', 'judges.clip'}\n"
        "rewards.check('shapes', None, ['a red circle'] * 1000)\n"
        "print(time.process_time() - start)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    seconds = [float(s) for s in done.stdout.split()]
    assert seconds[0] < 0.8 and seconds[1] < 2  # on a busy machine; 0.01 and 0.4 measured


def test_cards_and_loaders(clip_folder):
    assert set(rewards.CARDS) == set(rewards.REWARDS) == set(rewards.LOADERS)
    term = rewards.REWARDS["jpeg"]("cpu", torch.float32)
    assert (term.name, term.weight, term.differentiable) == ("jpeg", 1.0, False) and "DDPO" in term.note
    term = rewards.REWARDS["clipscore"]("cpu", torch.float32, path=str(clip_folder))
    assert (term.name, term.differentiable, term.licence) == ("clipscore", True, "MIT")
    assert "v2.1" in rewards.CARDS["hpsv2"].note and "v2.0" in rewards.CARDS["hpsv2.0"].note
