"""judges/clip.py and judges/imagereward.py against the reference implementations: differences and tolerances.

The reference's side is in tests/golden/ (oracle.py made it); here the same random weights are written as a checkpoint
of the original format and loaded by rewards.py.  test_golden.py asserts every line; `make reference` prints them.
"""

import argparse
import json
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
import transformers
from reference import recipe
from safetensors.torch import load_file

import rewards
from judges import clip as clip_judge
from judges import imagereward as blip

GOLDEN = Path(__file__).resolve().parent.parent / "golden"


class Line(NamedTuple):
    reward: str
    what: str
    difference: float
    tolerance: float


def golden() -> dict:
    return load_file(GOLDEN / "values.safetensors")


def read(name: str) -> dict:
    return json.loads((GOLDEN / name).read_text())


def apart(ours, theirs) -> float:
    """Largest absolute difference."""
    return (ours.detach().double() - theirs.double()).abs().max().item()


def score_and_probe(fn, images, prompts):
    x = images.clone().requires_grad_()
    scores = fn(x, prompts, None)
    (gradient,) = torch.autograd.grad(scores.sum(), x)
    return scores.detach(), recipe.probe(gradient)


def lines(reward, what, fn, expected, images, prompts, value, gradient):
    """A line for the scores, and one for the gradient with respect to the pixels in [0, 1], relative to its norm."""
    scores, probe = score_and_probe(fn, images, prompts)
    yield Line(reward, f"{what}, score", apart(scores, expected[f"{reward}.score"]), value)
    theirs = expected[f"{reward}.gradient"]
    relative = (probe - theirs).abs().amax(1) / theirs[:, -1]
    yield Line(reward, f"{what}, gradient (relative)", relative.max().item(), gradient)


# ---- tokenizers of the golden vocabulary ----------------------------------------------------------------------------
def clip_tokenizer(vocabulary, merges):
    from transformers import CLIPTokenizer

    return CLIPTokenizer(vocab=vocabulary, merges=[tuple(m.split()) for m in merges])


def bert_tokenizer(vocabulary):
    from transformers import BertTokenizer

    return BertTokenizer(vocab=vocabulary)


def clip_ids(tokenizer, prompt):
    """Tokenised as judges.clip.Clip does it."""
    return tokenizer(prompt, truncation=True, max_length=77).input_ids


def bert_ids(tokenizer, prompt):
    """Tokenised as judges/imagereward.py does it, without the padding."""
    return tokenizer(prompt, truncation=True, max_length=blip.REWARD_TOKENS).input_ids


def save_tokenizers(folder):
    """What the checkpoints below are loaded with: `tokenizer` beside each file."""
    text = read("text.json")
    clip_tokenizer(text["clip"]["vocabulary"], text["clip"]["merges"]).save_pretrained(folder / "clip" / "tokenizer")
    bert_tokenizer(text["bert"]["vocabulary"]).save_pretrained(folder / "blip" / "tokenizer")


def token_lines(clip, bert, prompts, clip_expected, bert_expected):
    """How many prompts become other ids; an id list of the reference ends at its last non-padding entry."""
    for name, ours, theirs in (
        ("CLIP ids, cleaned", [clip_ids(clip, clip_judge.clean_text(p)) for p in prompts], clip_expected),
        ("BERT ids, 35 tokens", [bert_ids(bert, p) for p in prompts], bert_expected),
    ):
        wrong = sum(a != b for a, b in zip(ours, theirs))
        yield Line("tokens", f"{name}: prompts that differ of {len(prompts)}", wrong, 0)


def tokens(folder=None):
    text = read("text.json")
    clip = clip_tokenizer(text["clip"]["vocabulary"], text["clip"]["merges"])
    bert = bert_tokenizer(text["bert"]["vocabulary"])
    yield from token_lines(clip, bert, text["prompts"], text["clip"]["ids"], text["bert"]["ids"])


# ---- reduced models -------------------------------------------------------------------------------------------------
def reduced(name, dtype, path, module=clip_judge, **constants):
    """The reward of a checkpoint with the recipe's sizes: all else (heads, gelu, eps, context) stays its module's."""
    with mock.patch.multiple(module, **{k: getattr(module, k) | v for k, v in constants.items()}):
        return rewards.REWARDS[name]("cpu", dtype, str(path)).fn


def clip_sizes(config):
    """The recipe's sizes in transformers' names: vision, text."""
    towers = []
    for tower in ("vision_cfg", "text_cfg"):
        width, layers = config[tower]["width"], config[tower]["layers"]
        towers.append({"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers,
                       "projection_dim": config["embed_dim"]})  # fmt: skip
    return towers


def hpsv2(folder):
    save_tokenizers(folder)
    torch.save({"state_dict": recipe.weights(read("shapes.json")["hpsv2"])}, folder / "clip" / "HPS.pt")
    vision, text = clip_sizes(recipe.CLIPS["hpsv2"])
    load = partial(reduced, "hpsv2", path=folder / "clip" / "HPS.pt", HPS_VISION=vision, HPS_TEXT=text)
    expected, images = golden(), recipe.tensor(recipe.pictures())
    yield from lines("hpsv2", "float64", load(torch.float64), expected, images, recipe.PROMPTS, 1e-12, 1e-10)
    single, images = load(torch.float32), images.float()
    yield from lines("hpsv2", "float32", single, expected, images, recipe.PROMPTS, 1e-6, 1e-4)
    scores = [single(recipe.tensor(p[None]).float(), [q], None) for p, q in zip(recipe.resized(), recipe.PROMPTS)]
    yield Line("hpsv2", "float32 with its own resize and padding, score",
               apart(torch.cat(scores), expected["hpsv2.resized"]), 3e-4)  # fmt: skip


def clip_folder(name, folder, hidden_act, text_heads):
    """The random open_clip weights as a folder of transformers, as the hub has the OpenAI and PickScore models."""
    from transformers import CLIPConfig, CLIPModel

    (vision, text), ends = clip_sizes(recipe.CLIPS[name]), {"bos_token_id": 49406, "eos_token_id": 49407}
    vision |= {"num_attention_heads": 16, "patch_size": 14, "image_size": 224, "hidden_act": hidden_act}
    text |= {"num_attention_heads": text_heads, "vocab_size": 49408, "hidden_act": hidden_act, **ends}
    size = recipe.CLIPS[name]["embed_dim"]
    model = CLIPModel(CLIPConfig(vision_config=vision, text_config=text, projection_dim=size))
    model.load_state_dict(clip_judge.openclip_to_clip(recipe.weights(read("shapes.json")[name])), strict=True)
    model.save_pretrained(folder / name)
    golden_text = read("text.json")["clip"]
    clip_tokenizer(golden_text["vocabulary"], golden_text["merges"]).save_pretrained(folder / name)
    return str(folder / name)


def clip_type(folder, hidden_act="quick_gelu"):
    expected = golden()
    images = recipe.tensor(recipe.pictures())[[recipe.PROMPTS.index(p) for p in recipe.PLAIN]]
    path = clip_folder("clip", folder, hidden_act, 12)
    torch.save(recipe.weights(read("shapes.json")["aesthetic"]), folder / "head.pth")
    paths = {"clipscore": path, "clipscore-hessel": path, "aesthetic": f"{path},{folder / 'head.pth'}"}
    fns = {name: rewards.REWARDS[name]("cpu", torch.float64, p).fn for name, p in paths.items()}
    yield from lines("clipscore", "float64", fns["clipscore"], expected, images, recipe.PLAIN, 1e-12, 1e-10)
    hessel = fns["clipscore-hessel"](images, recipe.PLAIN, None)
    yield Line("clipscore-hessel", "float64, score", apart(hessel, expected["clipscore-hessel.score"]), 1e-12)
    yield from lines("aesthetic", "float64", fns["aesthetic"], expected, images, recipe.PLAIN, 1e-12, 1e-10)
    scores = [fns["clipscore"](recipe.tensor(p[None]), recipe.PLAIN[:1], None) for p in recipe.resized()]
    yield Line("clipscore", "float64 with PIL's resize, score",
               apart(torch.cat(scores), expected["clipscore.resized"]), 1e-3)  # fmt: skip
    path = clip_folder("hpsv2", folder, "gelu", 16)
    scores = rewards.REWARDS["pickscore"]("cpu", torch.float64, path).fn(images, recipe.PLAIN, None)
    yield Line("pickscore", "float64, score (scale 100)", apart(scores, expected["pickscore.score"]), 1e-11)


def imagereward(folder):
    save_tokenizers(folder)
    path = folder / "blip" / "ImageReward.pt"
    torch.save(recipe.weights(read("shapes.json")["imagereward"]), path)
    sizes = {"BLIP_VISION": recipe.BLIP_VISION, "BLIP_TEXT": recipe.BLIP_TEXT}
    load = partial(reduced, "imagereward", path=path, module=blip, **sizes)
    expected, images = golden(), recipe.tensor(recipe.pictures())
    yield from lines("imagereward", "float64", load(torch.float64), expected, images, recipe.PROMPTS, 1e-12, 1e-10)
    single, images = load(torch.float32), images.float()
    yield from lines("imagereward", "float32", single, expected, images, recipe.PROMPTS, 1e-5, 1e-4)
    scores = [single(recipe.tensor(p[None]).float(), [q], None) for p, q in zip(recipe.resized(), recipe.PROMPTS)]
    yield Line("imagereward", "float32, its score(prompt, picture)",
               apart(torch.cat(scores), expected["imagereward.resized"]), 1e-2)  # fmt: skip


# ---- preprocessing --------------------------------------------------------------------------------------------------
def preprocessing(folder=None):
    expected, small = golden(), recipe.SMALL
    crops, pads = [], []
    for i, pixels in enumerate(recipe.resized()):
        x = recipe.tensor(pixels[None]).float()
        crops.append((255 * clip_judge.resize_for_clip(x, small)[0] - expected[f"pixels.crop.{i}"].float()).abs())
        if f"pixels.pad.{i}" in expected:
            theirs = expected[f"pixels.pad.{i}"]
            pads.append((255 * (clip_judge.resize_for_clip(x, small, "pad")[0] - theirs)).abs())
    crops, pads = torch.cat([c.flatten() for c in crops]), torch.cat([p.flatten() for p in pads])
    yield Line("pixels", "PIL resize and crop, mean, in 1/255", crops.mean().item(), 0.5)
    yield Line("pixels", "PIL resize and crop, max, in 1/255", crops.max().item(), 3)
    yield Line("pixels", "HPSv2's resize and padding, max, in 1/255", pads.max().item(), 1e-3)


CHECKS = {f.__name__: f for f in (hpsv2, clip_type, imagereward, preprocessing, tokens)}


# ---- with what the oracle left outside the repository ---------------------------------------------------------------
def all_prompts(folder):
    """Every prompt of prompts/ with the whole vocabularies."""
    prompts, whole = (json.loads((folder / f"{n}.json").read_text()) for n in ("prompts", "vocabularies"))
    clip = clip_tokenizer(whole["vocabulary"], whole["merges"])
    bert = bert_tokenizer({piece: i for i, piece in enumerate(whole["bert"])})
    theirs = load_file(folder / "ids.safetensors")
    theirs = [[row[: row.nonzero()[-1, 0] + 1].tolist() for row in theirs[k]] for k in ("clip", "bert")]
    yield from token_lines(clip, bert, prompts, *theirs)
    raw = sum(clip_ids(clip, p) != t for p, t in zip(prompts, theirs[0]))
    yield Line("tokens", f"CLIP ids without cleaning: prompts that differ of {len(prompts)}", raw, float("inf"))
    clip.save_pretrained(folder / "tokenizers" / "clip")
    bert.save_pretrained(folder / "tokenizers" / "bert")


def full(folder):
    """The published sizes in float32, loaded as a user's --reward-path is."""
    expected, images = load_file(folder / "full.safetensors"), recipe.tensor(recipe.pictures()[:2]).float()
    for name, file, tokenizer in (("hpsv2", "HPS.pt", "clip"), ("imagereward", "ImageReward.pt", "bert")):
        (folder / "tokenizer").unlink(missing_ok=True)
        (folder / "tokenizer").symlink_to(folder / "tokenizers" / tokenizer)
        fn = rewards.REWARDS[name]("cpu", torch.float32, str(folder / file)).fn
        yield from lines(name, "full size, float32", fn, expected, images, recipe.PROMPTS[:2], 1e-5, 1e-4)
        del fn


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True, help="what oracle.py was given")
    parser.add_argument("--full", action="store_true")
    args = parser.parse_args()
    folder, failed = args.folder.resolve(), []
    transformers.utils.logging.disable_progress_bar()
    print("| reward | what is compared | largest difference | tolerance |\n|---|---|---|---|")
    for check in (*CHECKS.values(), all_prompts, *([full] if args.full else [])):
        start = time.time()
        for line in check(folder):
            bound = f"{line.tolerance:g}" if line.tolerance < float("inf") else "for information"
            print(f"| {line.reward} | {line.what} | {line.difference:.2g} | {bound} |", flush=True)
            failed += [line] if not line.difference <= line.tolerance else []
        print(f"<!-- {check.__name__}: {time.time() - start:.0f} s -->", flush=True)
    if failed:
        raise SystemExit("\n".join(f"outside the tolerance: {line}" for line in failed))


if __name__ == "__main__":
    main()
