"""judges/diversity.py: the formula, CLIP features, the dreamsim package, messages."""

import importlib.util
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from test_rewards import pictures, save_clip

import rewards
from judges import clip as clip_judge
from judges import diversity
from judges.diversity import check_diversity, load_diversity
from rewards import UsageError

ROOT = Path(rewards.__file__).parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(save_clip(tmp_path_factory.mktemp("clip")))


# ---- the formula ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("n", [2, 3, 10])
def test_formula_is_the_double_sum_and_one_minus_the_mean_cosine(n):
    features = torch.randn(n, 7, dtype=torch.float64) * torch.rand(n, 1) * 9
    e = features / features.norm(dim=-1, keepdim=True)
    double_sum = sum(((e[i] - e[j]) ** 2).sum() for i in range(n) for j in range(n)) / (2 * n * (n - 1))
    pairs = [F.cosine_similarity(e[i], e[j], dim=0) for i in range(n) for j in range(n) if i != j]
    assert diversity.diversity(features) == pytest.approx(double_sum.item(), abs=1e-12)
    assert diversity.diversity(features) == pytest.approx(1 - torch.stack(pairs).mean().item(), abs=1e-12)


def test_known_values():
    assert diversity.diversity(torch.tensor([[3.0, 4], [6, 8], [0.3, 0.4]])) == pytest.approx(0, abs=1e-7)
    assert diversity.diversity(torch.eye(5)) == pytest.approx(1)  # orthogonal
    assert diversity.diversity(torch.tensor([[1.0, 0], [-2, 0]])) == pytest.approx(2)  # opposite
    nearly = torch.tensor([[1.0, 0], [1, 1e-4]])  # differences of cosines would lose this in float32
    assert diversity.diversity(nearly) == pytest.approx(0.5e-8, rel=1e-3)
    with pytest.raises(ValueError, match="1 image"):
        diversity.diversity(torch.ones(1, 3))


# ---- CLIP features --------------------------------------------------------------------------------------------------
def test_diversity_of_clip_features_on_eight_bit_pixels(folder):
    from transformers import CLIPModel

    fn = load_diversity("diversity-clip", "cpu", folder)
    x = pictures(20, 50, 40, seed=8)
    model = CLIPModel.from_pretrained(folder, dtype=torch.float32).eval()
    rounded = (x * 255).round() / 255
    with torch.no_grad():
        pixels = clip_judge.clip_input(rounded, 32)
        e = F.normalize(model.get_image_features(pixel_values=pixels).pooler_output.double(), dim=-1)
    found = fn(x.requires_grad_())
    assert type(found) is float and found == pytest.approx(1 - ((e @ e.T).sum().item() - 20) / 380, abs=1e-6)
    assert found == fn(rounded) and found > 1e-4
    assert fn(x[:1].expand(4, -1, -1, -1)) == pytest.approx(0, abs=1e-7)
    with torch.autocast("cpu", torch.bfloat16):
        assert fn(x) == found


def test_it_shares_clipscores_model(folder):
    clip_judge._clip_model.cache_clear()
    rewards._load_term.cache_clear(), diversity.load_embedder.cache_clear()
    rewards.load("clipscore", paths=folder)
    load_diversity("diversity-clip", "cpu", folder)
    load_diversity("diversity-clip", "cpu", folder)
    assert clip_judge._clip_model.cache_info().misses == 1 and diversity.load_embedder.cache_info().misses == 1


def test_the_embedded_clip_serves():
    fn = load_diversity("diversity-clip", "cpu", str(ROOT / "tiny" / "clip"))
    same, different = pictures(2, 32, 32, seed=1)[:1].expand(2, -1, -1, -1), torch.rand(2, 3, 32, 32)
    assert fn(same) < 1e-6 < fn(different)


@pytest.mark.parametrize("images", [torch.rand(1, 3, 8, 8), torch.rand(3, 8, 8), torch.rand(2, 1, 8, 8), [1, 2]])
def test_wrong_images(images, folder):
    with pytest.raises(ValueError, match="n of 2 or more"):
        load_diversity("diversity-clip", "cpu", folder)(images)


def test_nan_is_an_error(folder):
    with pytest.raises(rewards.RewardError, match="diversity 'diversity-clip' is nan"):
        load_diversity("diversity-clip", "cpu", folder)(torch.full((2, 3, 32, 32), math.nan))


# ---- the dreamsim package -------------------------------------------------------------------------------------------
class StubDreamsim:
    """The interface of package dreamsim 0.2.1; embed() gives (n, D), and (D,) for one image."""

    def __init__(self):
        self.asked, self.seen = [], []

    def dreamsim(self, pretrained=True, device="cuda", cache_dir="./models"):
        self.asked.append((pretrained, device, cache_dir))
        return SimpleNamespace(embed=self.embed), None

    def embed(self, images):
        self.seen.append(images)
        return (images.mean((2, 3)) - 0.2).squeeze()


@pytest.fixture
def dreamsim(monkeypatch):
    stub = StubDreamsim()
    stub.__spec__ = "something"
    monkeypatch.setitem(sys.modules, "dreamsim", stub)
    diversity.load_embedder.cache_clear()
    yield stub
    diversity.load_embedder.cache_clear()


def test_dreamsim_embeds_squashed_images_once_loaded(dreamsim, tmp_path):
    fn = load_diversity("dreamsim", "cpu", str(tmp_path))
    x = pictures(17, 60, 90, seed=2)
    rounded = (x * 255).round() / 255
    squashed = F.interpolate(rounded, (224, 224), mode="bicubic", antialias=True).clamp(0, 1)
    assert fn(x) == pytest.approx(diversity.diversity(squashed.mean((2, 3)) - 0.2), abs=1e-6)
    assert [tuple(batch.shape) for batch in dreamsim.seen] == [(16, 3, 224, 224), (1, 3, 224, 224)]
    load_diversity("dreamsim", "cpu", str(tmp_path))
    assert dreamsim.asked == [(True, "cpu", str(tmp_path))]


def test_dreamsim_keeps_its_downloads_with_torchs(dreamsim, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    load_diversity("dreamsim")
    assert dreamsim.asked == [(True, "cpu", str(tmp_path / "hub" / "dreamsim"))] and (tmp_path / "hub").is_dir()


def test_dreamsim_takes_its_backbones_code_from_the_folder_too(dreamsim, tmp_path, monkeypatch):
    """Offline: dreamsim asks torch.hub for facebookresearch/dino, which looks in torch.hub's folder first."""
    before, asked = torch.hub.get_dir(), []
    (tmp_path / "facebookresearch_dino_main").mkdir()
    loaded = dreamsim.dreamsim
    dreamsim.dreamsim = lambda **options: asked.append(torch.hub.get_dir()) or loaded(**options)
    load_diversity("dreamsim", "cpu", str(tmp_path))
    assert asked == [str(tmp_path)] and torch.hub.get_dir() == before


def test_dreamsim_that_cannot_load_says_what_to_do(dreamsim, tmp_path):
    def offline(**options):
        raise OSError("Name or service not known")

    dreamsim.dreamsim = offline
    with pytest.raises(
        UsageError, match="Name or service not known.*facebookresearch/dino.*dreamsim=FOLDER, or take diversity-clip"
    ):
        load_diversity("dreamsim", "cpu", str(tmp_path))
    with pytest.raises(UsageError, match="is no folder"):
        check_diversity("dreamsim", str(tmp_path / "absent"))


# ---- messages -------------------------------------------------------------------------------------------------------
def test_start_up_checks(folder, tmp_path, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda repo, file: None)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    original = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n == "dreamsim" else original(n))
    check_diversity("diversity-clip", folder)
    cases = [
        ("dreamsin", None, "unknown diversity 'dreamsin'; did you mean dreamsim.*known: diversity-clip, dreamsim"),
        ("clipscore", None, "unknown diversity 'clipscore'"),
        ("dreamsim", None, "diversity 'dreamsim' needs the package dreamsim: pip install dreamsim==0.2.1"),
        ("diversity-clip", None, "config.json of openai/clip-vit-large-patch14.*diversity-clip=FOLDER;.*tiny/clip"),
        ("diversity-clip", str(tmp_path), "no config.json in"),
    ]
    for name, path, words in cases:
        for function in (check_diversity, lambda name, path: load_diversity(name, "cpu", path)):
            with pytest.raises(UsageError, match=words) as e:
                function(name, path)
            assert "\n" not in str(e.value)


def test_its_paths_do_not_disturb_those_of_rewards(folder):
    paths = rewards.parse_paths([f"diversity-clip={folder}", f"clipscore={folder}"])
    assert paths == {"diversity-clip": folder, "clipscore": folder}
    rewards.check("clipscore", paths)
    rewards.check("jpeg", rewards.parse_paths([f"diversity-clip={folder}"]))
