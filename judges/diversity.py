"""How far apart the images of one prompt are: a metric of the group, no reward.

    fn = load_diversity("diversity-clip", "cuda")
    fn(images)                       # (n, 3, H, W) of one prompt, n >= 2 -> float

diversity-clip: CLIP L/14 image features; path: a folder of another CLIPModel.  dreamsim: the ensemble of
package dreamsim (Fu et al. 2306.09344); path: the folder of its weights and of its backbone's code.
"""

import functools
import math
import os
from collections.abc import Callable

import torch
import torch.nn.functional as F

import rewards
from judges.clip import load_clip, unit
from rewards import DIVERSITY, RewardError, UsageError, need

DINO, BACKBONE = "github.com/facebookresearch/dino", "facebookresearch_dino_main"  # torch.hub's name for it


def diversity(features) -> float:
    """(n, D) -> sum over i, j of |e_i - e_j|^2 / (2 n (n - 1)), e = features at unit length.

    The same as 1 - mean cosine of the pairs i != j; VMPO's and soc-fine-tuning-sd's with DreamSim embeddings.
    """
    n = len(features)
    need(n >= 2, f"the diversity of {n} image is not defined; give two or more of the prompt", ValueError)
    e = unit(features.double())
    # differences, no dot products: those of near images would be lost
    distance = torch.cdist(e, e, compute_mode="donot_use_mm_for_euclid_dist")
    return (distance.square().sum() / (2 * n * (n - 1))).item()


def check_diversity(name: str, path: str | None = None) -> None:
    """UsageError if load_diversity(name, device, path) cannot work: name, packages, weights."""
    rewards.check_name(name, DIVERSITY, "diversity")
    rewards.check_packages(name)
    rewards.find_weights(name, path or "")
    there = name != "dreamsim" or not path or os.path.isdir(path)
    need(there, f"--reward-path dreamsim={path} is no folder; expected the unpacked weights of its release")


def load_diversity(name: str, device="cpu", path: str | None = None) -> Callable[[torch.Tensor], float]:
    """The function images (n, 3, H, W) in [0, 1] of one prompt -> their diversity, on 8-bit pixels."""
    check_diversity(name, path)
    embed = load_embedder(name, str(torch.device(device)), path or "")

    def fn(images) -> float:
        tensor = torch.is_tensor(images)
        given = tuple(images.shape) if tensor else type(images).__name__
        right = tensor and images.ndim == 4 and images.shape[1] == 3 and len(images) > 1
        need(right, f"images are {given}; needed is a tensor (n, 3, H, W) with n of 2 or more", ValueError)
        with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
            found = diversity(torch.cat([embed(part) for part in rewards.eight_bit(images).split(16)]))
        need(math.isfinite(found), f"diversity {name!r} is {found}; expected a finite number", RewardError)
        return found

    return fn


@functools.cache
def load_embedder(name: str, device: str, path: str) -> Callable:
    """(n, 3, H, W) in [0, 1] -> (n, D)."""
    if name == "diversity-clip":
        return load_clip(rewards.find_weights(name, path), device, torch.float32)[0].images
    hub = torch.hub.get_dir()
    folder = path or os.path.join(hub, "dreamsim")  # its default is the current folder
    os.makedirs(folder, exist_ok=True)
    there = os.path.isdir(os.path.join(folder, BACKBONE))  # offline: torch.hub would fetch it from GitHub
    try:  # the import, too: a torchvision of another torch raises there
        import dreamsim

        if there:
            torch.hub.set_dir(folder)
        model, _ = dreamsim.dreamsim(pretrained=True, device=device, cache_dir=folder)
    except Exception as e:
        raise UsageError(
            f"diversity 'dreamsim' could not load its weights ({type(e).__name__}: {e}); unpack the zip of "
            f"github.com/ssundaram21/dreamsim/releases in FOLDER, clone {DINO} to FOLDER/{BACKBONE} and pass "
            "--reward-path dreamsim=FOLDER, or take diversity-clip"
        ) from e
    finally:
        if there:
            torch.hub.set_dir(hub)

    def embed(images):  # squashed to 224 x 224, as by the package's own preprocessing
        x = F.interpolate(images.to(device), (224, 224), mode="bicubic", antialias=True, align_corners=False)
        return model.embed(x.clamp(0, 1)).reshape(len(images), -1)  # one image comes back as (D,)

    return embed
