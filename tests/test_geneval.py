"""judges/geneval.py: both scorings on hand-made boxes, the colour step, the detector, loading.  No weights."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from test_rewards import pictures, save_clip

import rewards
from judges import clip as clip_judge
from judges import geneval
from judges.geneval import Found
from rewards import UsageError, check, load

ROOT = Path(rewards.__file__).parent
OFFICIAL = [json.loads(line) for line in (ROOT / "prompts" / "geneval_official.jsonl").read_text().splitlines()]


def boxes(name, n=1, x=0, y=0, size=10, color="", score=0.95):
    """n objects of one class in a column at x, the surest first; color: one for all, or one each."""
    colors = color if isinstance(color, list) else [color] * n
    return [Found(name, score - 0.001 * i, (x, y + 2 * size * i, x + size, y + 2 * size * i + size), None, colors[i])
            for i in range(n)]  # fmt: skip


def image(*groups):
    return {group[0].name: list(group) for group in groups if group}


def clause(name, count=1, **more):
    return {"class": name, "count": count} | more


# ---- both scorings --------------------------------------------------------------------------------------------------
ONE = {"tag": "single_object", "include": [clause("bench")]}
TWO = {"tag": "two_object", "include": [clause("bench"), clause("cat")]}
THREE = {"tag": "counting", "include": [clause("cat", 3)], "exclude": [clause("cat", 4)]}
RED = {"tag": "colors", "include": [clause("car", color="red")]}
BELOW = {"tag": "position", "include": [clause("cat"), clause("dog", position=["below", 0])]}
ATTR = {"tag": "color_attr", "include": [clause("car", color="red"), clause("cup", color="blue")]}
BOTH = {"tag": "position", "include": [clause("cat"), clause("dog", color="red", position=["below", 0])]}
cat, low_dog, high_dog = boxes("cat"), boxes("dog", y=40), boxes("dog", y=-40)
red_car, blue_car = boxes("car", color="red"), boxes("car", color="blue")
CASES = [  # prompt, what was found, GenEval's verdict, training reward, the same with Flow-GRPO's oddities
    (ONE, image(boxes("bench")), True, 1, 1),
    (ONE, image(), False, 0, 0),
    (ONE, image(cat), False, 0, 0),
    (ONE, image(boxes("bench", 2)), True, 0, 0),  # at least one for GenEval, exactly one for the reward
    (ONE, image(boxes("bench", 4)), True, -2, -2),  # not bounded below
    (ONE, image(boxes("bench"), cat), True, 1, 1),  # other classes do not matter
    (TWO, image(boxes("bench"), cat), True, 1, 1),
    (TWO, image(cat), False, 1 / 2, 1 / 2),
    (TWO, image(boxes("bench", 2), cat), True, 1 / 2, 1 / 2),
    (THREE, image(boxes("cat", 3)), True, 1, 1),
    (THREE, image(boxes("cat", 2)), False, 2 / 3, 2 / 3),
    (THREE, image(boxes("cat", 4)), False, 2 / 3, 2 / 3),  # excluded: four or more
    (THREE, image(), False, 0, 0),
    (RED, image(red_car), True, 1, 1),
    (RED, image(blue_car), False, 1 / 2, 1 / 2),
    (RED, image(), False, 0, 0),
    (RED, image(boxes("car", 2, color=["red", "blue"])), True, 0, 0),  # the surest one is red; the count is not exact
    (RED, image(boxes("car", 2, color=["blue", "red"])), False, 0, 0),  # the surest one is not
    (RED | {"include": [clause("car", 2, color="red")]}, image(boxes("car", 2, color=["red", "blue"])), False, 3 / 4,
     3 / 4),
    (RED | {"include": [clause("car", 2, color="red")]}, image(boxes("car", 1, color="red")), False, 1 / 2, 1 / 4),
    (BELOW, image(cat, low_dog), True, 1, 1),
    (BELOW, image(cat, high_dog), False, 2 / 3, 3 / 4),  # oddity: a wrong position is a 0 and a 1
    (BELOW, image(low_dog), False, 1 / 3, 1 / 3),  # nothing for it to be below of
    (BELOW, image(cat), False, 1 / 2, 1 / 3),  # oddity: a wrong count adds a 0
    (BELOW, image(), False, 0, 0),
    (BELOW, image(cat, low_dog + high_dog), True, 1 / 2, 1 / 3),  # GenEval looks at the surest dog only
    (BELOW, image(cat, high_dog + low_dog), False, 1 / 2, 1 / 3),
    (ATTR, image(red_car, boxes("cup", color="blue")), True, 1, 1),
    (ATTR, image(red_car, boxes("cup", color="red")), False, 3 / 4, 3 / 4),
    (ATTR, image(blue_car, boxes("cup", color="red")), False, 1 / 2, 1 / 2),
    (ATTR, image(red_car), False, 2 / 3, 1 / 2),
    (BOTH, image(cat, boxes("dog", y=40, color="red")), True, 1, 1),
    (BOTH, image(cat, boxes("dog", y=40, color="pink")), False, 2 / 3, 2 / 3),  # then the position is not looked at
    (BOTH, image(cat, boxes("dog", y=-40, color="red")), False, 3 / 4, 4 / 5),
    (BOTH, image(cat), False, 1 / 2, 1 / 3),  # one 0 for both
]  # fmt: skip


@pytest.mark.parametrize("metadata, found, correct, reward, flowgrpo", CASES)
def test_hand_made_boxes(metadata, found, correct, reward, flowgrpo):
    assert geneval.correct(found, metadata) is correct
    assert geneval.partial(found, metadata) == pytest.approx(reward)
    assert geneval.partial(found, metadata, flowgrpo=True) == pytest.approx(flowgrpo)


def test_the_cases_cover_every_tag_and_separate_the_scorings():
    assert {metadata["tag"] for metadata, *_ in CASES} == set(geneval.TAGS)
    assert {(correct, reward == flowgrpo) for _, _, correct, reward, flowgrpo in CASES} == {
        (True, True), (False, True), (True, False), (False, False)}  # fmt: skip


def test_a_position_is_demanded_of_every_pair():
    metadata = {"tag": "position", "include": [clause("cat", 2), clause("dog", 2, position=["right of", 0])]}
    two_cats = boxes("cat", 2)
    assert geneval.correct(image(two_cats, boxes("dog", 2, x=90)), metadata)
    one_off = [*boxes("dog", x=90), *boxes("dog", x=-90)]
    assert not geneval.correct(image(two_cats, one_off), metadata)
    assert geneval.partial(image(two_cats, one_off), metadata) == pytest.approx(2 / 3)


def test_a_target_of_the_wrong_colour_is_no_target():
    metadata = {"tag": "position", "include": [clause("cat", color="red"), clause("dog", position=["below", 0])]}
    assert geneval.correct(image(boxes("cat", color="red"), low_dog), metadata)
    found = image(boxes("cat", color="blue"), low_dog)
    assert not geneval.correct(found, metadata)
    for flag in (False, True):  # 1, 0 and 1, 0: no second credit where there is no target
        assert geneval.partial(found, metadata, flag) == pytest.approx(1 / 2)


def test_exclude_is_an_or_and_looks_at_its_count():
    metadata = ONE | {"exclude": [clause("cat"), clause("dog", 2)]}
    assert geneval.correct(image(boxes("bench"), boxes("dog")), metadata)
    assert not geneval.correct(image(boxes("bench"), boxes("dog", 2)), metadata)
    assert not geneval.correct(image(boxes("bench"), cat), metadata)


@pytest.mark.parametrize("metadata", OFFICIAL[::7], ids=lambda m: m["prompt"].replace(" ", "_"))
def test_official_prompts_accept_what_they_ask_for_and_nothing_less(metadata):
    """For prompts of the official list: a layout that fulfils them, and each clause taken away in turn."""
    place = {"left of": (-90, 0), "right of": (90, 0), "above": (0, -90), "below": (0, 90)}
    groups = []
    for i, c in enumerate(metadata["include"]):
        dx, dy = place[c["position"][0]] if "position" in c else (400 * i, 0)
        groups.append(boxes(c["class"], c["count"], dx, dy, color=c.get("color", "")))
    for scoring in (geneval.correct, geneval.partial, lambda f, m: geneval.partial(f, m, True)):
        full = scoring(image(*groups), metadata)
        assert full == 1
        for i, group in enumerate(groups):
            assert scoring(image(*groups[:i], group[:-1], *groups[i + 1 :]), metadata) < full
            if "color" in metadata["include"][i]:
                wrong = boxes(group[0].name, len(group), color="no such colour")
                assert scoring(image(*groups[:i], wrong, *groups[i + 1 :]), metadata) < full
            if "position" in metadata["include"][i]:
                away = boxes(group[0].name, len(group), x=-place[metadata["include"][i]["position"][0]][0],
                             y=-place[metadata["include"][i]["position"][0]][1])  # fmt: skip
                assert scoring(image(*groups[:i], away, *groups[i + 1 :]), metadata) < full


# ---- thresholds and positions ---------------------------------------------------------------------------------------
def test_thresholds_by_tag_order_and_at_most_sixteen():
    scores = [0.2, 0.3, 0.31, 0.9, 0.91, 0.5]
    found = [Found("cat", s, (0, 0, 1, 1)) for s in scores] + [Found("dog", 0.25, (0, 0, 1, 1))]
    assert [o.score for o in geneval.keep(found, "colors")["cat"]] == [0.91, 0.9, 0.5, 0.31]  # above, not at
    assert [o.score for o in geneval.keep(found, "counting")["cat"]] == [0.91]
    assert "dog" not in geneval.keep(found, "colors")
    many = [Found(name, 0.31 + 0.01 * i, (i, 0, 1, 1)) for i in range(20) for name in ("cat", "dog")]
    kept = geneval.keep(many, "two_object")
    assert [len(kept[name]) for name in ("cat", "dog")] == [16, 16]
    assert [o.box[0] for o in kept["cat"]] == list(range(19, 3, -1))


@pytest.mark.parametrize(
    "a, expected",
    [  # against the box (0, 0, 100, 100), centre (50, 50); both sizes 100: a tenth of both is 20
        ((200, 0, 300, 100), {"right of"}),
        ((-200, 0, -100, 100), {"left of"}),
        ((0, -200, 100, -100), {"above"}),
        ((0, 200, 100, 300), {"below"}),
        ((0, 0, 100, 100), set()),  # the same place
        ((19, 0, 119, 100), set()),  # within the margin
        ((41, 0, 141, 100), {"right of"}),  # 21 of 41
        ((39, 0, 139, 100), set()),  # 19 of 39
        ((200, 200, 300, 300), {"right of", "below"}),  # 180 of 283
        ((200, 60, 300, 160), {"right of"}),  # 40 of 209 below is too little
        ((-60, -60, 40, 40), set()),  # 40 of 85 on both axes
        ((0, 41, 100, 141), {"below"}),
        ((0, 39, 100, 139), set()),
    ],
)
def test_positions(a, expected):
    assert geneval.relations(a, (0, 0, 100, 100)) == expected
    opposite = {"right of": "left of", "left of": "right of", "above": "below", "below": "above"}
    assert geneval.relations((0, 0, 100, 100), a) == {opposite[r] for r in expected}


def test_the_margin_goes_with_both_sizes():
    small, large = (0, 0, 10, 10), (0, 0, 400, 400)
    assert geneval.relations((30, 0, 40, 10), small) == {"right of"}
    shifted = (30 + 195, 195, 40 + 195, 205)  # the same offset of the centres
    assert geneval.relations(shifted, large) == set()


def test_score_is_the_mean_over_tags_not_over_images():
    tags = [*geneval.TAGS, "colors", "colors"]
    correct = [1, 0, 1, 1, 0, 0, 0, 0]
    score = geneval.score(torch.tensor(correct), tags)
    assert score["colors"] == pytest.approx(1 / 3) and score["single_object"] == 1 and score["two_object"] == 0
    assert score["overall"] == pytest.approx((1 + 0 + 1 + 1 / 3 + 0 + 0) / 6) and len(score) == 7
    with pytest.raises(ValueError, match="no image has the tag color_attr"):
        geneval.score([1] * 5, list(geneval.TAGS[:5]))
    with pytest.raises(ValueError):
        geneval.score([1] * 5, tags)


# ---- metadata, before anything is loaded ----------------------------------------------------------------------------
def test_official_prompts_are_valid_and_the_names_are_theirs():
    for metadata in OFFICIAL:
        geneval.check_metadata(metadata)
    assert len(OFFICIAL) == 553
    names = (ROOT / "prompts" / "geneval_object_names.txt").read_text().split("\n")
    assert geneval.NAMES == tuple(name for name in names if name)
    asked = {c["class"] for m in OFFICIAL for c in m["include"]}
    assert asked <= set(geneval.NAMES) and len(asked) > 70


@pytest.mark.parametrize(
    "change, words",
    [
        ({"tag": None}, "tag None is none of single_object"),
        ({"include": []}, "no GenEval metadata"),
        ({"include": [clause("lion")]}, "include[0] has class 'lion'"),
        ({"include": [clause("cat"), {"class": "dog"}]}, "include[1] has count None"),
        ({"include": [clause("cat", True)]}, "count True"),
        ({"include": [clause("cat", 0)]}, "count 0"),
        ({"include": [clause("cat", color="gold")]}, "color 'gold', which is none of red"),
        ({"include": [clause("cat", position=["left of", 0])]}, "the index of an earlier clause"),
        ({"include": [clause("cat"), clause("dog", position=["near", 0])]}, "position ['near', 0]"),
        ({"exclude": [clause("lion")]}, "exclude[0] has class 'lion'"),
        ({"include": "cat"}, "include is 'cat'; expected a list"),
        ({"include": ["cat"]}, "include is ['cat']; expected a list"),
        ({"exclude": {"class": "cat"}}, "expected a list"),
        ({"exclude": None}, "exclude is None"),
        ({"include": [clause("cat"), clause("dog", position=3)]}, "position 3"),
        ({"include": [clause("cat"), clause("dog", position=["left of"])]}, "position ['left of']"),
        ({"include": [clause("cat"), clause("dog", position=["left of", "0"])]}, "position ['left of', '0']"),
        ({"include": [clause("cat"), clause("dog", position=["left of", 0.0])]}, "position ['left of', 0.0]"),
        ({"include": [clause(["cat"])]}, "class ['cat']"),
    ],
)
def test_wrong_metadata(change, words):
    with pytest.raises(ValueError) as e:
        geneval.check_metadata(ONE | change)
    assert words in str(e.value)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """--reward-path of a tiny random Mask2Former that is sure of itself, and a tiny CLIP."""
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig

    names = list(geneval.NAMES)
    names[64:67] = "mouse", "remote", "keyboard"  # as COCO has them
    swin = SwinConfig(image_size=64, patch_size=4, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 2, 2, 2],
                      window_size=4, out_features=["stage1", "stage2", "stage3", "stage4"])  # fmt: skip
    config = Mask2FormerConfig(
        backbone_config=swin, feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=16,
        encoder_layers=1, decoder_layers=2, num_attention_heads=2, dim_feedforward=16, num_queries=12,
        id2label=dict(enumerate(names)), label2id={name: i for i, name in enumerate(names)},
    )  # fmt: skip
    torch.manual_seed(0)
    model = Mask2FormerForUniversalSegmentation(config)
    with torch.no_grad():
        model.class_predictor.weight.mul_(40)
        model.class_predictor.bias[-1] -= 10
    detector = tmp_path_factory.mktemp("mask2former")
    model.save_pretrained(detector)
    return f"{save_clip(tmp_path_factory.mktemp('clip'))},{detector}"


NAMES = ["geneval", "geneval-reward", "geneval-reward-flowgrpo"]


@pytest.mark.parametrize("name", NAMES)
def test_prompts_without_metadata_are_named_by_line_before_anything_is_loaded(name, folders, tmp_path):
    texts, paths = [m["prompt"] for m in OFFICIAL], {name: folders}
    check(name, paths, texts, OFFICIAL)
    check(name, paths, texts)  # a caller without metadata is not refused here; scoring names the prompt
    for bad, words in (({}, "no GenEval metadata"), ({"tag": "colors", "include": [clause("sock")]}, "'sock'")):
        with pytest.raises(UsageError) as e:
            check(name, paths, texts[:3], [OFFICIAL[0], OFFICIAL[1], bad])
        assert "cannot score line 3 of the prompts" in str(e.value) and words in str(e.value)
    with pytest.raises(UsageError, match="line 17 of the prompts"):
        check(name, paths, texts[:2], [OFFICIAL[0], {}], lines=[4, 17])
    empty = tmp_path / "empty"
    empty.mkdir()
    for path, missing in ((f"{folders},x", "x"), (str(empty), "empty"), (f"{empty},{folders.split(',')[1]}", "empty")):
        with pytest.raises(UsageError, match=rf"no config.json in .*{missing}.*CLIP_FOLDER,DETECTOR_FOLDER"):
            check(name, {name: path}, texts, OFFICIAL)


# ---- the colour step ------------------------------------------------------------------------------------------------
class ColorClip:
    """A Clip whose image feature is the mean colour and whose text feature is the named one."""

    size = 16
    rgb = {"red": (1, 0, 0), "green": (0, 1, 0), "blue": (0, 0, 1), "yellow": (1, 1, 0)}

    def __init__(self):
        self.batches, self.texts = [], set()

    def images(self, images):
        self.batches.append(images)
        return clip_judge.unit(images.mean((2, 3)) - 0.3)

    def text(self, prompt):
        self.texts.add(prompt)
        color = next(c for c in geneval.COLORS if f" {c} " in prompt or f" {c}-colored " in prompt)
        return clip_judge.unit(torch.tensor(self.rgb.get(color, (-1, -1, -1)), dtype=torch.float32))


def test_colours_come_from_the_mask_in_one_batch():
    x = torch.zeros(2, 3, 40, 60)
    x[0] = torch.tensor([0.0, 0, 1]).view(3, 1, 1)  # blue all over
    x[1] = torch.tensor([0.0, 1, 0]).view(3, 1, 1)
    mask = torch.zeros(40, 60, dtype=torch.bool)
    mask[10:30, 5:35] = True
    x[0][:, mask] = torch.tensor([[1.0], [0], [0]])  # with a red object
    things = [
        (0, Found("car", 1, (5, 10, 35, 30), mask)),
        (0, Found("cat", 1, (0, 0, 60, 40), ~mask)),  # the rest of the picture: a mask, not the box's content
        (1, Found("cup", 1, (30, 20, 40, 30))),
    ]
    clip = ColorClip()
    geneval.name_colors(clip, x, things)
    assert [thing.color for _, thing in things] == ["red", "blue", "green"]
    assert [tuple(batch.shape) for batch in clip.batches] == [(3, 3, 16, 16)]
    wordings = {"a photo of a red car", "a photo of a red-colored car", "a photo of a red object"}
    assert wordings <= clip.texts and len(clip.texts) == 10 * (3 * 2 + 1)
    clip.batches.clear()
    geneval.name_colors(clip, x, things, chunk=2)
    assert [len(batch) for batch in clip.batches] == [2, 1]
    geneval.name_colors(clip, x, [])


def test_crops_are_grey_outside_the_mask():
    g = torch.Generator().manual_seed(3)
    x = torch.rand(3, 30, 50, generator=g)
    mask = torch.rand(30, 50, generator=g) > 0.5
    crop = geneval.crop(x, Found("cat", 1, (4, 6, 24, 16), mask))
    expected = torch.full((3, 10, 20), 0x99 / 255)
    for row in range(10):
        for column in range(20):
            if mask[6 + row, 4 + column]:
                expected[:, row, column] = x[:, 6 + row, 4 + column]
    assert torch.equal(crop, expected)
    assert torch.equal(geneval.crop(x, Found("cat", 1, (4, 6, 24, 16))), x[:, 6:16, 4:24])


@pytest.mark.parametrize("box", [(7, 0, 8, 512), (0, 9, 512, 11)])
def test_slivers_are_cut_before_they_are_enlarged(box):
    x = torch.rand(3, 512, 512)
    crop = geneval.crop(x, Found("tie", 1, box))
    assert max(crop.shape[1:]) <= 8 * min(crop.shape[1:])
    whole = x[:, box[1] : box[3], box[0] : box[2]][None]
    assert (clip_judge.resize_for_clip(crop[None], 32) - clip_judge.resize_for_clip(whole, 32)).abs().max() < 1e-5


# ---- the detector ---------------------------------------------------------------------------------------------------
def test_objects_are_transformers_post_processing():
    """Boxes, classes, scores and masks against the library's own code, at the one size at which it does the same."""
    from types import SimpleNamespace

    from transformers.models.mask2former.image_processing_pil_mask2former import Mask2FormerImageProcessorPil

    classes, masks = 6 * torch.randn(30, 81), F.interpolate(8 * torch.randn(1, 30, 6, 6), (48, 48), mode="bicubic")[0]
    ours = geneval.Detector._objects(classes, masks, (384, 384), (384, 384))
    outputs = SimpleNamespace(class_queries_logits=classes[None], masks_queries_logits=masks[None])
    (theirs,) = Mask2FormerImageProcessorPil().post_process_instance_segmentation(
        outputs, threshold=0.3, target_sizes=[(384, 384)], return_binary_maps=True
    )
    expected = {(geneval.NAMES[info["label_id"]], info["score"]): theirs["segmentation"][info["id"]].bool()
                for info in theirs["segments_info"]}  # fmt: skip
    assert len(ours) == len(expected) > 5
    for thing in ours:
        mask = next(m for (name, s), m in expected.items() if name == thing.name and abs(s - thing.score) < 1e-5)
        assert torch.equal(thing.mask, mask)
        y, x = mask.numpy().nonzero()
        assert thing.box == (x.min(), y.min(), x.max() + 1, y.max() + 1)
        assert type(thing.score) is float and all(type(v) is int for v in thing.box)


def test_nothing_sure_nothing_found():
    assert geneval.Detector._objects(torch.zeros(5, 81), torch.randn(5, 8, 8), (32, 32), (32, 32)) == []
    certain = torch.zeros(5, 81)
    certain[:, 7] = 50
    assert geneval.Detector._objects(certain, torch.full((5, 8, 8), -9.0), (32, 32), (32, 32)) == []  # empty masks
    assert len(geneval.Detector._objects(certain, torch.full((5, 8, 8), 9.0), (32, 32), (20, 24))) == 5


@pytest.mark.parametrize("h, w, size", [(512, 512, (800, 800)), (512, 768, (800, 1216)), (256, 1024, (352, 1344))])
def test_detector_sees_eight_hundred_pixels_and_imagenet_colours(h, w, size):
    from types import SimpleNamespace

    seen = []

    class Net:
        dtype = torch.float32
        config = SimpleNamespace(id2label=dict(enumerate(geneval.NAMES)), num_labels=80)

        def __call__(self, pixel_values):
            seen.append(pixel_values)
            empty = torch.zeros(len(pixel_values), 3, 81)
            return SimpleNamespace(class_queries_logits=empty, masks_queries_logits=torch.zeros(1, 3, 9, 9))

    x = torch.ones(1, 3, h, w) * torch.tensor([0.485, 0.456 + 0.224, 0.406 - 0.225]).view(3, 1, 1)
    assert geneval.Detector(Net())(x) == [[]]
    assert tuple(seen[0].shape[-2:]) == size
    assert torch.allclose(seen[0][0].mean((1, 2)), torch.tensor([0.0, 1, -1]), atol=1e-5)


def test_a_detector_of_other_classes_is_refused(folders, monkeypatch):
    from transformers import Mask2FormerForUniversalSegmentation

    model = Mask2FormerForUniversalSegmentation.from_pretrained(folders.split(",")[1])
    geneval.Detector(model)
    labels = model.config.id2label
    labels[0], labels[2] = "car", "person"
    with pytest.raises(UsageError, match="class 0 is 'car', not 'person'"):
        geneval.Detector(model)
    labels[0], labels[2] = "person", "car"
    model.config.id2label = dict(list(labels.items())[:79])
    with pytest.raises(UsageError, match="79 classes"):
        geneval.Detector(model)


# ---- from files to scores -------------------------------------------------------------------------------------------
@pytest.fixture
def scored(folders, monkeypatch):
    """Three images, what the saved detector finds in them, and the three rewards."""
    from transformers import Mask2FormerForUniversalSegmentation

    x = (pictures(3, 64, 96, seed=5) * 255).round() / 255
    monkeypatch.setattr(geneval, "SHORTER", 128)
    model = Mask2FormerForUniversalSegmentation.from_pretrained(folders.split(",")[1]).eval()
    with torch.no_grad():
        objects = geneval.Detector(model)(x)
    return x, objects, {name: load(name, paths={name: folders}) for name in NAMES}


def test_the_saved_detector_finds_something(scored):
    x, objects, _ = scored
    assert all(objects) and len({thing.name for found in objects for thing in found}) > 1
    for thing in objects[0]:
        assert thing.mask.shape == x.shape[-2:] and thing.score > 0.3
        assert 0 <= thing.box[0] < thing.box[2] <= 96 and 0 <= thing.box[1] < thing.box[3] <= 64


def test_scores_are_the_pure_functions_of_what_is_found(scored):
    x, objects, loaded = scored
    judges = geneval.correct, geneval.partial, lambda f, m: geneval.partial(f, m, True)
    names = [found[0].name for found in objects]
    kept = [geneval.keep(found, "two_object") for found in objects]
    counts = [len(k[n]) for k, n in zip(kept, names)]
    prompts = ["a prompt"] * 3
    for delta in (0, 1):  # what is there; one more of the first, and a position
        metadata = [{"tag": "two_object", "include": [clause(n, c + delta), clause("zebra", position=["above", 0])]}
                    for n, c in zip(names, counts)]  # fmt: skip
        for reward, judge in zip(loaded.values(), judges):
            total, _ = reward(x, prompts, metadata, chunk=2)
            assert total.tolist() == pytest.approx([float(judge(k, m)) for k, m in zip(kept, metadata)])
    metadata = [{"tag": "single_object", "include": [clause(n, c)]} for n, c in zip(names, counts)]
    assert all(reward(x, prompts, metadata)[0].tolist() == [1, 1, 1] for reward in loaded.values())


def test_exactly_one_colour_is_right_and_it_is_clips(scored, folders):
    """Colours end to end: of the ten prompts about an object, the one with CLIP's nearest text is fulfilled."""
    from transformers import CLIPModel, CLIPTokenizer

    x, objects, loaded = scored
    thing = next(iter(geneval.keep(objects[1], "colors").values()))[0]
    asked = [{"tag": "colors", "include": [clause(thing.name, color=c)]} for c in geneval.COLORS]
    total, _ = loaded["geneval"](x[1:2].expand(10, -1, -1, -1), ["a prompt"] * 10, asked)
    assert sorted(total.tolist()) == [0] * 9 + [1]
    folder = Path(folders.split(",")[0])
    clip = clip_judge.Clip(CLIPModel.from_pretrained(folder).eval(), CLIPTokenizer.from_pretrained(folder))
    with torch.no_grad():
        image_feature = clip.images(geneval.crop(x[1], thing)[None])[0]
        cosines = []
        for c in geneval.COLORS:
            texts = [f"a photo of a {w}" for w in (f"{c} {thing.name}", f"{c}-colored {thing.name}", f"{c} object")]
            mean = torch.stack([clip.text(t) for t in texts]).mean(0)
            cosines.append((image_feature @ mean / mean.norm()).item())
    assert total.argmax() == max(range(10), key=cosines.__getitem__)


def test_every_object_of_the_right_count_gets_a_colour(scored):
    """Over the ten colours the credits for colour add up to one, however many objects there are."""
    x, objects, loaded = scored
    for i, found in enumerate(objects):
        for name, things in geneval.keep(found, "colors").items():
            n = len(things)
            asked = [{"tag": "colors", "include": [clause(name, n, color=c)]} for c in geneval.COLORS]
            total, _ = loaded["geneval-reward"](x[i : i + 1].expand(10, -1, -1, -1), ["a prompt"] * 10, asked)
            assert (2 * total - 1).sum().item() == pytest.approx(1, abs=1e-5)
    assert max(len(t) for found in objects for t in geneval.keep(found, "colors").values()) > 1
    assert min(len(t) for found in objects for t in geneval.keep(found, "colors").values()) == 1


def test_a_prompt_without_metadata_stops_the_run_with_its_text(scored):
    x, _, loaded = scored
    good = {"tag": "single_object", "include": [clause("cat")]}
    for metadata in (None, [good, {}, good]):
        with pytest.raises(rewards.RewardError, match="reward 'geneval' raised.*no GenEval metadata"):
            loaded["geneval"](x, ["first", "second", "third"], metadata)


def test_the_three_rewards_share_their_models(folders):
    assert geneval.load_detector.cache_info().currsize == 1
    reward = load("geneval=1,geneval-reward=1", paths=dict.fromkeys(NAMES[:2], folders))
    assert geneval.load_detector.cache_info().currsize == 1 and not reward.differentiable
    assert load("geneval", paths=folders).terms[0].metric
