"""judges/clip.py and judges/imagereward.py against results of open_clip_torch, image-reward and HPSv2 themselves.

tests/golden/ holds what they returned for random weights (`make reference`, docs/parity.md); the weights are rebuilt
here from their names, written as checkpoints of the original formats, and loaded by rewards.py.
"""

import pytest
import torch
from reference import parity, recipe

from judges import clip as clip_judge
from judges import imagereward


def outside(check, folder, factor=1.0, **options):
    """The first line of a check whose difference is above factor times its tolerance, or None."""
    found = parity.CHECKS[check](folder, **options)
    return next((line for line in found if not line.difference <= factor * line.tolerance), None)


@pytest.mark.parametrize("check", parity.CHECKS)
def test_rewards_are_the_reference_implementations(check, tmp_path):
    assert outside(check, tmp_path) is None


def renamed(convert, *pairs):
    """A key map that confuses two names of the same shape."""

    def wrong(state):
        new = convert(state)
        for a, b in pairs:
            new = {k.replace(a, "\0").replace(b, a).replace("\0", b): v for k, v in new.items()}
        return new

    return wrong


def untransposed(state):
    return {k: v.T if "_projection" in k else v for k, v in CLIP_MAP(state).items()}


CLIP_MAP, BLIP_MAP = clip_judge.openclip_to_clip, imagereward.imagereward_to_blip
HPS_V, HPS_T = clip_judge.HPS_VISION, clip_judge.HPS_TEXT
BLIP_V, BLIP_T = imagereward.BLIP_VISION, imagereward.BLIP_TEXT
# each loads without complaint
MUTATIONS = {
    "quick gelu, images": ("hpsv2", "HPS_VISION", HPS_V | {"hidden_act": "quick_gelu"}),
    "quick gelu, text": ("hpsv2", "HPS_TEXT", HPS_T | {"hidden_act": "quick_gelu"}),
    "other text heads": ("hpsv2", "HPS_TEXT", HPS_T | {"num_attention_heads": 8}),
    "query and key swapped": ("hpsv2", "openclip_to_clip", renamed(CLIP_MAP, ("q_proj", "k_proj"))),
    "norms swapped": ("hpsv2", "openclip_to_clip", renamed(CLIP_MAP, ("layer_norm1", "layer_norm2"))),
    "projections not transposed": ("hpsv2", "openclip_to_clip", untransposed),
    "no text cleaning": ("hpsv2", "clean_text", str),
    "mean of ImageNet": ("hpsv2", "CLIP_MEAN", (0.485, 0.456, 0.406)),
    "deviation of ImageNet": ("imagereward", "CLIP_STD", (0.229, 0.224, 0.225)),
    "512 BERT tokens": ("imagereward", "REWARD_TOKENS", 512),
    "34 BERT tokens": ("imagereward", "REWARD_TOKENS", 34),
    "8 text heads, the default": ("imagereward", "BLIP_TEXT", BLIP_T | {"num_attention_heads": 8}),
    "vision eps 1e-5, the default": ("imagereward", "BLIP_VISION", BLIP_V | {"layer_norm_eps": 1e-5}),
    "key and value swapped": ("imagereward", "imagereward_to_blip", renamed(BLIP_MAP, ("self.key", "self.value"))),
    "scale of the score": ("imagereward", "REWARD_STD", 1.0),
    "tokens cut at 34": ("tokens", "REWARD_TOKENS", 34),
    "ids without cleaning": ("tokens", "clean_text", str),
    "no antialias": ("preprocessing", "F", "no antialias"),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_wrong_setting_is_far_outside_the_tolerance(name, tmp_path, monkeypatch):
    check, constant, value = MUTATIONS[name]
    if value == "no antialias":
        resize = torch.nn.functional.interpolate
        monkeypatch.setattr(clip_judge.F, "interpolate", lambda *a, antialias, **k: resize(*a, **k))
    else:
        monkeypatch.setattr(clip_judge if constant in vars(clip_judge) else imagereward, constant, value)
    assert outside(check, tmp_path, factor=5)


def test_the_activation_of_clip_models_is_their_configs(tmp_path):
    assert outside("clip_type", tmp_path, factor=5, hidden_act="gelu")


def test_the_recipe_is_the_same_on_every_machine():
    assert recipe.uniform("logit", (3,)).tolist() == [-0.9152716103724221, 0.31770350146543636, 0.6600525731538995]
    assert recipe.weight("visual.ln_pre.weight", (2,)).tolist() == [1.1387348175048828, 1.2956072092056274]
    assert recipe.picture("picture 0", 224, 224).sum() == 18853733
