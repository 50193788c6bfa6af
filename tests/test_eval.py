"""eval.py: arithmetic by hand, same noise with and without LoRA, diffusers' pipeline as oracle, kill and continue,
tags, diversity, the panel, bad input, files.  The gallery in a browser: test_eval_gallery.py.
"""

import copy
import csv
import json
import math
import os
import random
import signal
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import tensor

import checkpoints
import common
import eval as evaluation
import eval_files
import eval_runs
import harness
import pictures
import rewards
from judges import diversity, geneval

TINY = ["--preset", "tiny", "--steps", "3", "--device", "cpu", "--diversity", "none", "--gallery-mb", "0"]
PROMPTS = ["a red circle", "two blue squares", "a green triangle above a red square"]
PROBE = "test_eval:probe"


def probe(images, prompts, metadata=None):
    """A random projection: every pixel counts, so two different images have different scores."""
    weights = torch.randn(images[0].numel(), generator=torch.Generator().manual_seed(0))
    return images.flatten(1) @ weights / len(weights) ** 0.5


def best(images, prompts, metadata):
    return (images.mean((1, 2, 3)) == images.mean((1, 2, 3)).max()).float()


best.grouped = True


def broken(images, prompts, metadata):
    return torch.full((len(prompts),), math.nan)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """The pictures are tiny: a second thread mostly waits for the first, above all on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("\n".join(PROMPTS) + "\n")
    return str(path)


@pytest.fixture(scope="module")
def world(tmp_path_factory, prompts):
    """Runs as the trainers leave them: of the flow model with B = 0 and with B > 0, and one of the other backbone."""
    root, policies = tmp_path_factory.mktemp("runs"), {}
    for preset in ("tiny-sd15", "tiny"):
        args = evaluation.parse_args([*TINY, "--preset", preset, "--prompts", prompts])
        run = harness.Run(root, torch.device("cpu"), torch.float32, rank=0, world=1)
        policies[preset] = policy = harness.load_policy(args, run)
        plain = copy.deepcopy(policy.net)
        args.lora_rank, args.lora_alpha, args.lora_targets, args.init_lora = 2, 4, "attention+mlp", ""
        harness.add_lora(policy, args)
        for name, scale in (("zero", 0.0), ("strong", 0.3)):
            torch.manual_seed(1)
            for key, p in policy.net.named_parameters():
                if ".lora_B." in key:
                    p.data = scale * torch.randn(p.shape)
            run.dir = root / (name if preset == "tiny" else f"{name}15")
            for epoch in (1, 2):
                checkpoints.save(run.dir, policy, epoch, {}, None)
        policy.net = plain  # for check_lora
    return root, policies


def main(*argv):
    args = evaluation.parse_args([*TINY, *map(str, argv)])
    evaluation.main(args)
    return json.loads((Path(args.out) / "results.json").read_text())


@pytest.fixture(scope="module")
def result(world, prompts, tmp_path_factory):
    """One evaluation of a LoRA that changes the images, then one that must not."""
    root, _ = world
    out = tmp_path_factory.mktemp("out") / "two" / "loras"
    loras = (root / "strong", root / "zero" / "checkpoints" / "epoch_0001")
    argv = ["--prompts", prompts, "--rewards", f"{PROBE},shapes,shapes-strict", "--images-per-prompt", 2, "--out", out]
    return out, main("--lora", *loras, *argv)


def images(found, model, reward=PROBE):
    return tensor([p["images"][model][reward] for p in found["per_prompt"]], dtype=torch.float64)


# ---- arithmetic -----------------------------------------------------------------------------------------------------
def test_mean_and_error():
    mean, error = evaluation.mean_and_error(tensor([1.0, 2.0, 3.0, 6.0]))
    assert mean == 3 and error == pytest.approx(math.sqrt((4 + 1 + 0 + 9) / 3) / 2)
    assert evaluation.mean_and_error(tensor([5.0])) == (5.0, None)


def test_paired_difference():
    """Prompt means 1, 5, 9 and 2, 7, 12: differences 1, 2, 3, whose error is far below that of either mean."""
    base = tensor([[0.0, 2.0], [5.0, 5.0], [8.0, 10.0]], dtype=torch.float64)
    lora = tensor([[4.0, 0.0], [6.0, 8.0], [12.0, 12.0]], dtype=torch.float64)
    summary = evaluation.summarise({"base": {"r": base}, "L": {"r": lora}})
    assert summary["base"]["r"] == {"mean": 5.0, "se": pytest.approx(4 / math.sqrt(3))}
    assert summary["L"]["r"] == {"mean": 7.0, "se": pytest.approx(5 / math.sqrt(3)), "difference": 2.0,
                                 "difference_se": pytest.approx(1 / math.sqrt(3))}  # fmt: skip
    assert eval_files.table(summary).splitlines()[2:] == [
        "| base     | 5.0000 ± 2.3094  |",
        "| L        | 7.0000 ± 2.8868  |",
        "| L - base | +2.0000 ± 0.5774 |",
    ]


def test_repeated_prompts_are_one_sample():
    """Five copies of each prompt have the error of the prompts, not of the lines; unequal numbers by hand."""
    values = torch.randn(7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    once = evaluation.mean_and_error(values)
    noise = torch.randn(7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    lines = values[:, None] + noise - noise.mean(1, keepdim=True)
    assert evaluation.mean_and_error(lines.flatten(), [i // 5 for i in range(35)]) == pytest.approx(once)
    assert evaluation.mean_and_error(values, list("abcdefg")) == pytest.approx(once)
    # a, a, b: 1, 3, 8: mean 4; offs -1, -3 | 4 summed per prompt -4, 4; sqrt(2 (16 + 16)) / 3
    assert evaluation.mean_and_error(tensor([1.0, 3.0, 8.0]), ["a", "a", "b"]) == pytest.approx((4.0, 8 / 3))
    assert evaluation.mean_and_error(tensor([1.0, 3.0]), ["a", "a"]) == (2.0, None)


def test_mean_over_tags():
    """Tag x: prompt means 0, 1; tag y: 1, 1, 1, 0.  The mean of 0.5 and 0.75, not of the six; the errors add up."""
    base = tensor([[0.0], [1.0], [1.0], [1.0], [1.0], [0.0]], dtype=torch.float64)
    scores, tags = {"base": {"geneval": base}, "L": {"geneval": torch.ones_like(base)}}, list("xxyyyy")
    by_tag = evaluation.summarise_tags(scores, tags, list(range(6)))
    assert by_tag["x"]["base"]["geneval"]["mean"] == 0.5 and by_tag["y"]["base"]["geneval"]["mean"] == 0.75
    found = evaluation.mean_over_tags(by_tag, "base", "geneval")
    assert found == {"mean": 0.625, "se": pytest.approx(math.sqrt(0.5**2 + 0.25**2) / 2)}
    found = evaluation.mean_over_tags(by_tag, "L", "geneval")
    assert found["difference"] == 0.375 and found["difference_se"] == pytest.approx(math.sqrt(0.5**2 + 0.25**2) / 2)
    summary = {model: {"geneval": evaluation.mean_over_tags(by_tag, model, "geneval")} for model in scores}
    text = eval_files.tables(summary, by_tag)
    assert "geneval by tag:" in text and "| overall " in text and text.count("0.6250 ± 0.2795") == 2


def test_geneval_overall_is_the_official_score():
    choose = random.Random(0)
    tags = [t for t, n in zip(geneval.TAGS, (3, 4, 5, 2, 6, 3)) for _ in range(n)]
    values = tensor([[float(choose.random() < 0.6) for _ in range(4)] for _ in tags], dtype=torch.float64)
    by_tag = evaluation.summarise_tags({"base": {"geneval": values}}, tags, list(range(len(tags))))
    want = geneval.score(values.flatten().tolist(), [t for t in tags for _ in range(4)])
    assert evaluation.mean_over_tags(by_tag, "base", "geneval")["mean"] == pytest.approx(want["overall"])
    for tag in geneval.TAGS:
        assert by_tag[tag]["base"]["geneval"]["mean"] == pytest.approx(want[tag])


def test_one_prompt_has_no_error():
    summary = evaluation.summarise({"base": {"r": tensor([[1.0, 2.0]])}, "L": {"r": tensor([[3.0, 4.0]])}})
    assert summary["base"]["r"] == {"mean": 1.5, "se": None}
    assert "| +2.0000 ± - |" in eval_files.table(summary) and "nan" not in json.dumps(summary).lower()


# ---- sampling -------------------------------------------------------------------------------------------------------
def test_a_zero_lora_is_the_base_and_a_lora_leaves_no_trace(result):
    _, found = result
    zero, strong = "zero/epoch_0001", "strong"
    assert torch.equal(images(found, zero), images(found, "base"))  # sampled after `strong` was taken out again
    assert (images(found, strong) - images(found, "base")).abs().min() > 1e-3
    assert found["summary"][zero][PROBE]["difference"] == 0 == found["summary"][zero][PROBE]["difference_se"]
    assert len({round(x, 9) for x in images(found, "base").flatten().tolist()}) == 6  # every image has its own noise


@pytest.mark.parametrize("preset, lora", [("tiny", "strong"), ("tiny-sd15", "strong15")])
def test_against_the_pipeline(world, prompts, tmp_path, preset, lora):
    """What eval.py scores is what pipe.load_lora_weights(folder); pipe(prompt) draws from the same start."""
    import diffusers

    root, policies = world
    argv = ["--preset", preset, "--prompts", prompts, "--rewards", PROBE, "--images-per-prompt", 1, "--cfg", 2]
    argv += ["--diversity", "none"]
    found = main(*argv, "--lora", root / lora, "--out", tmp_path, "--num-prompts", 2, "--grid-prompts", 2)
    args = evaluation.parse_args([*map(str, argv), "--steps", "3", "--out", str(tmp_path / "other")])
    if preset == "tiny":
        pipe, extra = diffusers.StableDiffusion3Pipeline.from_pretrained(args.model_path), {"max_sequence_length": 10}
    else:
        pipe, extra = diffusers.StableDiffusionPipeline.from_pretrained(args.model_path, safety_checker=None), {}
        pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    size = policies[preset].resolution
    extra |= dict(height=size, width=size, guidance_scale=2.0, num_inference_steps=3, output_type="pt")
    for model in ("base", lora):
        if model == lora:
            pipe.load_lora_weights(str(root / lora / "checkpoints" / "last"))
        for p in range(2):
            start = common.sample_noise(0, "eval", [f"{p}/0"], 3, policies[preset].latent_shape, "cpu")[:, 0]
            drawn = pipe(PROMPTS[p], negative_prompt="", latents=start, **extra).images
            want = probe((drawn * 255).round() / 255, PROMPTS[p]).item()
            assert images(found, model)[p, 0].item() == pytest.approx(want, abs=1e-3), (model, p)
    assert (images(found, lora) - images(found, "base")).abs().max() > 2e-2  # ... and the LoRA matters
    assert Image.open(tmp_path / "grid.png").size == (2 * (2 * 100 + 10), 96 + 54)  # two pairs, named below


def test_batch_sizes_order_and_numbers_change_nothing(world, prompts, result, tmp_path):
    _, found = result
    root, _ = world
    argv = ["--lora", root / "zero", root / "strong", "--prompts", prompts, "--num-prompts", 2, "--out", tmp_path]
    sizes = ["--batch-size", 3, "--decode-batch-size", 2, "--reward-batch-size", 1, "--images-per-prompt", 3]
    other = main(*argv, *sizes, "--rewards", PROBE)
    for model in ("base", "strong"):
        torch.testing.assert_close(images(other, model)[:, :2], images(found, model)[:2], atol=1e-3, rtol=0)


def test_seed_and_stochastic_kernel(prompts, result, tmp_path):
    argv = ["--prompts", prompts, "--rewards", PROBE, "--images-per-prompt", 2, "--num-prompts", 1]
    seed = main(*argv, "--seed", 1, "--grid-prompts", 0, "--out", tmp_path / "seed")
    assert (images(seed, "base") - images(result[1], "base")[:1]).abs().min() > 1e-3
    noisy = main(*argv, "--kernel", "flow_sde", "--out", tmp_path / "noisy")
    assert (images(noisy, "base") - images(result[1], "base")[:1]).abs().min() > 1e-3
    assert noisy["settings"]["noise_level"] == 0.7 and noisy["summary"]["base"][PROBE]["se"] is None
    assert not (tmp_path / "seed" / "grid.png").exists()


# ---- files ----------------------------------------------------------------------------------------------------------
def test_files(result, world):
    out, found = result
    root, _ = world
    names = ["grid.png", "images", "results.json", "results.md", "scores.jsonl"]
    assert sorted(p.name for p in out.iterdir()) == names  # no temporary files
    assert sum(p.is_file() for p in out.rglob("images/**/*")) == 18 == len(list(out.rglob("*.png"))) - 1
    assert list(found["summary"]) == ["base", "strong", "zero/epoch_0001"]
    assert list(found["summary"]["base"]) == [PROBE, "shapes", "shapes-strict"]
    assert found["loras"]["strong"] == str(root / "strong" / "checkpoints" / "epoch_0002" / evaluation.LORA_FILE)
    assert [(p["prompt"], p["text"]) for p in found["per_prompt"]] == list(enumerate(PROMPTS))
    assert [found["settings"][name] for name in ("steps", "dtype", "seed", "cfg")] == [3, "float32", 0, 1.0]
    assert found["command"].startswith("python eval.py --preset tiny") and "torch" in found["versions"]
    for model, terms in found["summary"].items():
        for name, entry in terms.items():
            per_prompt = images(found, model, name).mean(1)
            assert [p["mean"][model][name] for p in found["per_prompt"]] == pytest.approx(per_prompt.tolist())
            assert entry["mean"] == pytest.approx(per_prompt.mean().item())
            assert entry["se"] == pytest.approx(per_prompt.std().item() / math.sqrt(3))
    for entry in found["per_prompt"]:
        for model, files in entry["files"].items():
            pixels = pictures.read_images([out / file for file in files])
            rescored = probe(pixels, None).tolist()  # the scores are those of the files
            assert entry["images"][model][PROBE] == pytest.approx(rescored, abs=1e-6)
    text = (out / "results.md").read_text()
    assert eval_files.table(found["summary"]) in text and found["command"] in text
    assert Image.open(out / "grid.png").size == (3 * (96 + 14), 3 * (96 + 40))  # a row per model, a column per prompt


def test_results_are_not_overwritten_unasked(result, world, prompts, capsys):
    out, found = result
    with pytest.raises(SystemExit) as stop:
        evaluation.parse_args([*TINY, "--prompts", prompts, "--out", str(out)])
    assert stop.value.code == 2 and "--overwrite" in capsys.readouterr().err
    evaluation.parse_args([*TINY, "--prompts", prompts, "--out", str(out), "--overwrite"])


# ---- kill and continue ----------------------------------------------------------------------------------------------
def drawn(monkeypatch):
    """The images that are drawn: their prompts."""
    count, plain = [], common.sample_noise

    def counting(seed, epoch, indices, *rest):
        count.extend(PROMPTS[int(index.split("/")[0])] for index in indices)
        return plain(seed, epoch, indices, *rest)

    monkeypatch.setattr(common, "sample_noise", counting)
    return count


def test_finished_is_not_made_again(world, prompts, tmp_path, monkeypatch):
    """Not even the model is loaded; a new LoRA, more images or another reward need only what is new."""
    root, _ = world
    argv = ["--prompts", prompts, "--num-prompts", 2, "--images-per-prompt", 2, "--out", tmp_path / "out"]
    count = drawn(monkeypatch)
    first = main(*argv, "--rewards", PROBE)
    assert len(count) == 4
    count.clear()
    with monkeypatch.context() as m:
        m.setattr(harness, "load_policy", None)
        m.setattr(rewards, "load", None)
        again = main(*argv, "--rewards", PROBE)
    assert again["summary"] == first["summary"] and again["per_prompt"] == first["per_prompt"]
    both = main(*argv, "--rewards", f"{PROBE},jpeg", "--overwrite")  # scores of the files
    assert count == [] and torch.equal(images(both, "base"), images(first, "base"))
    more = main(*argv, "--rewards", PROBE, "--lora", root / "strong", "--overwrite")
    assert len(count) == 4 and torch.equal(images(more, "base"), images(first, "base"))
    count.clear()
    main(*argv, "--rewards", PROBE, "--cfg", 2, "--overwrite")
    main(*argv, "--rewards", PROBE, "--seed", 1, "--overwrite")
    assert len(count) == 8


def test_a_lora_is_known_by_its_content(world, prompts, tmp_path):
    root, _ = world
    weights = load_file(root / "strong" / "checkpoints" / "last" / evaluation.LORA_FILE)
    save_file(weights, tmp_path / "mine.safetensors")
    argv = [*TINY, "--prompts", prompts, "--lora", str(tmp_path / "mine.safetensors")]
    first = evaluation.parse_args(argv)
    save_file(weights, tmp_path / "mine.safetensors")  # the same, later
    assert evaluation.parse_args(argv).key == first.key and evaluation.parse_args(argv).out == first.out
    save_file({k: v * 1.001 for k, v in weights.items()}, tmp_path / "mine.safetensors")
    other = evaluation.parse_args(argv)
    assert other.folders["mine"] != first.folders["mine"] and other.folders["base"] == first.folders["base"]


def test_a_change_of_a_rewards_code_needs_new_scores_alone(prompts, tmp_path, monkeypatch):
    argv = ["--prompts", prompts, "--num-prompts", 1, "--images-per-prompt", 2, "--out", tmp_path, "--rewards", PROBE]
    first = main(*argv)
    count, plain = drawn(monkeypatch), evaluation.code_of
    monkeypatch.setattr(evaluation, "code_of", lambda name: [*plain(name), "changed"])
    monkeypatch.setattr(sys.modules[__name__], "probe", lambda images, prompts, metadata: images.mean((1, 2, 3)))
    rewards._load_term.cache_clear()  # in a new process it would be empty
    second = main(*argv)
    rewards._load_term.cache_clear()
    assert count == [] and second["key"] == first["key"] and first["summary"] != second["summary"]


def test_the_code_of_a_reward_is_its_files_and_not_the_rest_of_rewards(monkeypatch):
    """A comment in rewards.py or another judge leaves every score as it is; what makes the number does not."""
    files = {"geneval": ["clip", "geneval"], "ocr": ["ocr"], "clipscore": ["clip"],
             "diversity-clip": ["clip", "diversity"],
             "winrate": ["questions", "served", "vlm"], "jpeg": [], PROBE: []}  # fmt: skip
    more = {PROBE: ["tests/test_eval.py"], "shapes": ["tiny/shapes.py"]}
    for reward, judges in (files | {"shapes": []}).items():
        names = [f"judges/{name}.py" for name in judges] + more.get(reward, [])
        digests = [evaluation.file_digest(harness.HERE / name) for name in names]
        assert evaluation.code_of(reward)[1:] == digests, reward
    plain = {name: evaluation.code_of(name) for name in ("jpeg", "ocr", "shapes")}
    real = evaluation.inspect.getsource
    for changed, affected in (("jpeg", {"jpeg"}), ("pixels", {"jpeg", "ocr", "shapes"}), ("parse_spec", set())):
        source = lambda f, changed=changed: real(f) + "#" * (f.__name__ == changed)  # noqa: E731
        monkeypatch.setattr(evaluation.inspect, "getsource", source)
        assert {name for name, code in plain.items() if evaluation.code_of(name) != code} == affected


def test_a_model_on_the_hub_is_known_by_its_commit(monkeypatch):
    import huggingface_hub

    at = "/cache/models--a--b/snapshots/0a1b2c/model_index.json"
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda repo, file: at)
    args = type("Args", (), {"model_path": "a/b"})()
    assert evaluation.model_identity(args) == ["a/b", "0a1b2c"]
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda repo, file: at.replace("0a1b2c", "ffff"))
    assert evaluation.model_identity(args) == ["a/b", "ffff"]


@pytest.mark.parametrize("problem", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_stopped_says_how_to_go_on(problem, prompts, tmp_path, monkeypatch, capsys):
    def fail(*_, **__):
        raise problem

    monkeypatch.setattr(pictures, "save_image", fail)
    with pytest.raises(KeyboardInterrupt if isinstance(problem, KeyboardInterrupt) else SystemExit) as stop:
        main("--prompts", prompts, "--rewards", PROBE, "--num-prompts", 1, "--out", tmp_path)
    assert "the same command goes on from there" in capsys.readouterr().err + str(stop.value)


KILL = """
import os, signal, sys
sys.path[:0] = [{root!r}, {tests!r}]
import torch
torch.set_num_threads({threads})
import eval as evaluation
from PIL import Image
plain, count = Image.Image.save, []
def save(image, path, **more):
    plain(image, path, **more)
    count.append(path)
    if len(count) == {at}:
        os.kill(os.getpid(), signal.SIGKILL)  # the file is written, but has not got its name yet
Image.Image.save = save
evaluation.main(evaluation.parse_args({argv!r}))
"""


def test_killed_and_continued(world, prompts, tmp_path, monkeypatch):
    """SIGKILL at the fifth of six images, in the middle of the second model's first batch of two, and a torn line:
    that batch and the rest are drawn, nothing else, and every file and number is the uninterrupted run's."""
    (root, _), at = world, 5
    argv = ["--lora", root / "strong", "--prompts", prompts, "--rewards", f"{PROBE},shapes", "--batch-size", 2]
    argv += ["--images-per-prompt", 1]  # batches of 2 and 1, twice
    whole = main(*argv, "--out", tmp_path / "whole")
    flags = [*TINY, *map(str, argv), "--out", str(tmp_path / "killed")]
    here = Path(__file__).resolve().parent
    code = KILL.format(root=str(here.parent), tests=str(here), threads=torch.get_num_threads(), argv=flags, at=at)
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | {"HF_HUB_OFFLINE": "1"}, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    found = list((tmp_path / "killed").rglob("images/*/[0-9]*.png"))
    assert len(found) == at - 1 and not (tmp_path / "killed" / "results.json").exists()
    with (tmp_path / "killed" / "scores.jsonl").open("a") as f:
        f.write('{"of": "base-0123456789ab/00000-00')  # as if the kill had come while a line was written
    count = drawn(monkeypatch)
    rest = main(*argv, "--out", tmp_path / "killed")
    assert count == PROMPTS  # of the second model: its first batch as a whole, for the same bits
    assert rest["summary"] == whole["summary"] and rest["per_prompt"] == whole["per_prompt"]
    for file in (tmp_path / "whole").rglob("images/*/*.png"):
        same = tmp_path / "killed" / file.relative_to(tmp_path / "whole")
        assert same.read_bytes() == file.read_bytes()
    assert not list((tmp_path / "killed").rglob("*.tmp*"))


def test_an_image_that_cannot_be_read(prompts, tmp_path):
    argv = ["--prompts", prompts, "--num-prompts", 1, "--images-per-prompt", 1, "--out", tmp_path, "--grid-prompts", 0]
    main(*argv, "--rewards", PROBE)
    file = next(tmp_path.rglob("images/*/*.png"))
    file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(SystemExit) as stop:
        main(*argv, "--rewards", "jpeg", "--overwrite")
    assert str(file) in str(stop.value.code) and "delete it" in str(stop.value.code)


def test_damaged_scores_are_made_again(tmp_path):
    """Bytes that are no text, a score that is no number: as if the line were not there."""
    good = '{"of": "a", "reward": "r", "key": "k", "score": 0.5}\n'
    lines = [good.encode(), b"\xff\xfe\x00{\n", good.replace('"a"', '"b"').replace("0.5", "NaN").encode(),
             good.replace('"a"', '"c"').replace("0.5", "Infinity").encode(),
             good.replace('"a"', '"d"').encode()[:-9]]  # fmt: skip
    (tmp_path / "scores.jsonl").write_bytes(b"".join(lines))
    assert eval_files.load_scores(Namespace(out=str(tmp_path))) == {("a", "r", "k"): 0.5}


# ---- a run's own settings -------------------------------------------------------------------------------------------
def test_a_run_is_evaluated_as_it_was_trained_unless_told_otherwise(world, prompts, tmp_path, capsys):
    own = dict(cfg=3.0, eval_cfg=1.0, steps=10, resolution=32)
    run = run_folder(world, tmp_path / "run", prompts, **own)
    argv = ["--device", "cpu", "--out", str(tmp_path / "out"), "--lora"]
    for given in (run, run / "checkpoints" / "epoch_0003", run / "checkpoints" / "epoch_0003" / evaluation.LORA_FILE):
        args = evaluation.parse_args([*argv, str(given)])
        assert (args.model, args.cfg, args.steps, args.max_sequence_length) == ("tiny-sd35", 1.0, 3, 10)
        assert args.rewards == f"{PROBE},shapes" and args.prompts == prompts
        assert eval_runs.differences(args) == []
    args = evaluation.parse_args([*argv, str(run), "--cfg", "4.5", "--steps", "10", "--rewards", "jpeg"])
    assert (args.cfg, args.steps, args.rewards) == (4.5, 10, "jpeg")
    assert eval_runs.differences(args) == ["warning: --cfg 4.5, but run was trained at 3.0 and evaluated at 1.0"]
    args = evaluation.parse_args([*argv, str(run), "--preset", "tiny", "--steps", "7", "--max-sequence-length", "9"])
    assert args.prompts == "prompts/shapes_heldout.txt" and args.steps == 7
    noisy = run_folder(world, tmp_path / "noisy", prompts, eval_kernel="same")
    assert evaluation.parse_args([*argv, str(noisy)]).kernel == "flow_sde"
    assert evaluation.parse_args([*argv, str(noisy), "--preset", "tiny"]).kernel == "ode"  # a protocol keeps its own
    assert [w.split(",")[0] for w in eval_runs.differences(args)] == ["warning: --steps 7",
                                                                       "warning: --max-sequence-length 9"]  # fmt: skip


def test_a_runs_reward_paths_go_with_its_rewards(world, prompts, tmp_path):
    clip = str(harness.HERE / "tiny" / "clip")
    for paths in ([clip], [f"clipscore={clip}"]):
        run = run_folder(world, tmp_path / f"run{len(paths[0])}", prompts, reward="clipscore", reward_path=paths)
        argv = ["--lora", str(run), "--device", "cpu", "--out", str(tmp_path / "out")]
        args = evaluation.parse_args(argv)
        assert args.rewards == "clipscore,shapes" and args.reward_path == paths
        assert evaluation.parse_args([*argv, "--rewards", "jpeg"]).reward_path == []


def test_a_run_of_another_version_or_with_a_grouped_reward(world, prompts, tmp_path):
    run = run_folder(world, tmp_path / "run", prompts, reward="test_eval:best", eval_rewards="jpeg")
    assert eval_runs.lora_defaults(Namespace(lora=[str(run)], rewards="x"))["rewards"] == "jpeg"
    (run / "args.json").write_text('{"args": {"model": "sd15"}}')
    assert eval_runs.lora_defaults(Namespace(lora=[str(run)], rewards="x")) == {}
    (run / "args.json").write_text("no JSON")
    assert eval_runs.runs_of(Namespace(lora=[str(run), "nowhere"])) == {}


# ---- tags and diversity ---------------------------------------------------------------------------------------------
def test_prompts_with_metadata(tmp_path):
    """A .jsonl file: the rewards get the metadata, the tags get a table each; other metadata, other scores."""
    rows = [{"prompt": text, "tag": tag} for text, tag in zip(PROMPTS, ("colors", "counting", "colors"))]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    argv = ["--prompts", tmp_path / "p.jsonl", "--rewards", "test_eval:tag_length", "--images-per-prompt", 1]
    found = main(*argv, "--out", tmp_path / "out")
    assert images(found, "base", "test_eval:tag_length").flatten().tolist() == [6, 8, 6]
    assert list(found["tags"]) == ["colors", "counting"]
    assert found["tags"]["colors"]["base"]["test_eval:tag_length"] == {"mean": 6, "se": 0}
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, rows)).replace("counting", "count"))
    found = main(*argv, "--out", tmp_path / "out", "--overwrite")
    assert images(found, "base", "test_eval:tag_length").flatten().tolist() == [6, 5, 6]


def tag_length(images, prompts, metadata):
    return tensor([float(len(m["tag"])) for m in metadata])


def test_diversity(world, prompts, tmp_path, monkeypatch):
    """One value a prompt, of exactly its images, from the embedded CLIP; cached like the rest."""
    root, _ = world
    argv = ["--lora", root / "zero", "--prompts", prompts, "--rewards", PROBE, "--images-per-prompt", 3]
    argv += ["--out", tmp_path]
    found = main(*argv, "--diversity", "diversity-clip")
    measure = diversity.load_diversity("diversity-clip", "cpu", str(harness.HERE / "tiny" / "clip"))
    for entry in found["per_prompt"]:
        pixels = pictures.read_images([tmp_path / file for file in entry["files"]["base"]])
        assert entry["mean"]["base"]["diversity-clip"] == pytest.approx(measure(pixels), abs=1e-6) != 0
        assert list(entry["images"]["base"]) == [PROBE]
    summary = found["summary"]["zero"]["diversity-clip"]
    assert summary["difference"] == 0 and summary["mean"] == found["summary"]["base"]["diversity-clip"]["mean"]
    monkeypatch.setattr(diversity, "load_diversity", None)
    assert main(*argv, "--diversity", "diversity-clip")["summary"] == found["summary"]


# ---- panel ----------------------------------------------------------------------------------------------------------
def run_folder(world, path, prompts, **own):
    """A run with two checkpoints and six epochs of metrics."""
    root, _ = world
    (path / "checkpoints").mkdir(parents=True)
    for epoch, source in ((3, "zero"), (6, "strong")):
        (path / "checkpoints" / f"epoch_{epoch:04d}").symlink_to(root / source / "checkpoints" / "epoch_0001")
    (path / "checkpoints" / "last").symlink_to("epoch_0006")
    args = dict(
        reward=f"{PROBE}=2", eval_rewards="shapes", reward_path=[], prompts="nowhere.txt", eval_prompts=prompts,
        eval_images=8, eval_steps=3, eval_kernel="ode", kernel="flow_sde", noise_level=0.7, cfg=1.0, resolution=None,
        max_sequence_length=10, model="tiny-sd35", t5=True, dtype="auto", micro_batch_size=8, decode_batch_size=8,
        reward_batch_size=8,
    )  # fmt: skip
    (path / "args.json").write_text(json.dumps({"method": "vmpo", "args": args | own}))
    with (path / "metrics.csv").open("w", newline="") as f:
        writer = csv.writer(f)
        writer.writerows([["epoch", "reward/mean", "kl/ref", "eval/reward"], [0, "", "", 0.5]])
        writer.writerows([[e, e / 10, e / 100, ""] for e in range(1, 7)])
    return path


def test_panel(world, prompts, tmp_path, capsys):
    run = run_folder(world, tmp_path / "run", prompts)
    argv = ["--panel", str(run), "--device", "cpu", "--out", str(tmp_path / "out"), "--gallery-mb", "0"]
    args = evaluation.parse_args(argv)
    assert (args.model, args.rewards, args.prompts) == ("tiny-sd35", f"{PROBE},shapes", prompts)
    assert (args.images_per_prompt, args.num_prompts, args.steps, args.kernel) == (4, 2, 3, "ode")
    assert args.diversity == "diversity-clip" and list(args.lora_files) == ["epoch_0003", "epoch_0006"]
    evaluation.main(args)
    panel = json.loads((tmp_path / "out" / "panel.json").read_text())
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert panel["epochs"] == [0, 3, 6] and list(panel["held_out"]) == [PROBE, "shapes", "diversity-clip"]
    assert panel["training"]["reward/mean"] == [[e, e / 10] for e in range(1, 7)]
    assert panel["training"]["kl/ref"][-1] == [6, 0.06]
    for name, values in panel["held_out"].items():
        assert values["mean"] == [results["summary"][m][name]["mean"] for m in results["summary"]]
        assert values["difference"][:2] == [None, 0]
    picture = Image.open(tmp_path / "out" / "panel.png")
    assert picture.size[0] > 1000 and len(picture.convert("RGB").getcolors(1 << 24)) > 50
    assert "panel.png" in capsys.readouterr().out
    args = evaluation.parse_args([*argv, "--rewards", "jpeg", "--checkpoints", "1", "--overwrite", "--steps", "4"])
    assert args.rewards == "jpeg" and args.steps == 4 and list(args.lora_files) == ["epoch_0006"]


def test_decline(world, prompts, tmp_path):
    """Epoch 3 is best; at epoch 6 `a` has lost 0.5 on every prompt but one, `b` no more than its noise."""
    run = run_folder(world, tmp_path / "run", prompts)
    args = evaluation.parse_args(["--panel", str(run), "--device", "cpu", "--out", str(tmp_path / "out")])
    base = torch.zeros(4, 1, dtype=torch.float64)
    best, last = base + 1, tensor([[0.5], [0.5], [0.5], [0.6]], dtype=torch.float64)
    noisy = tensor([[1.9], [0.0], [1.8], [0.0]], dtype=torch.float64)
    scores = {m: {"a": a, "b": b} for m, a, b in zip(args.folders, (base, best, last), (base, best, noisy))}
    panel = evaluation.panel_data(args, scores, evaluation.summarise(scores), list("wxyz"))
    assert list(panel["declines"]) == ["a"]
    decline = {"best_epoch": 3, "fall": pytest.approx(0.475), "fall_se": pytest.approx(0.025)}
    assert panel["declines"]["a"] == decline
    eval_files.draw_panel(panel, tmp_path / "panel.png")


PANEL_BAD = {
    "--panel {root}/strong": ["is no run folder"],
    "--panel nowhere": ["is no run folder"],
    "--panel {run} --lora {root}/strong": ["leave --lora out"],
    "--panel {run} --checkpoints 0": ["--checkpoints 0 is too few"],
    "--panel {run} --preset tiny-sd15": ["does not fit the model"],
    "--panel {empty}": ["has no checkpoint"],
}


@pytest.mark.parametrize("flags", PANEL_BAD)
def test_bad_panel(flags, world, prompts, tmp_path, capsys):
    run, empty = run_folder(world, tmp_path / "run", prompts), run_folder(world, tmp_path / "empty", prompts)
    for checkpoint in (empty / "checkpoints").iterdir():
        checkpoint.unlink()
    argv = flags.format(root=world[0], run=run, empty=empty).split(" ")
    with pytest.raises(SystemExit) as stop:
        evaluation.parse_args([*argv, "--device", "cpu", "--out", str(tmp_path / "out")])
    error = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and all(word in error for word in PANEL_BAD[flags]) and "\n" not in error


# ---- which LoRA -----------------------------------------------------------------------------------------------------
def test_names_of_a_lora(world, tmp_path):
    root, _ = world
    run = root / "strong"
    last = run / "checkpoints" / "last"
    copied = tmp_path / "mine.safetensors"
    save_file(load_file(last / evaluation.LORA_FILE), copied)
    given = [run, last, run / "checkpoints" / "epoch_0001", last / evaluation.LORA_FILE, copied]
    found = evaluation.find_loras(Namespace(lora=list(map(str, given)), backbone=common.SD35, panel=""))
    first, old = last / evaluation.LORA_FILE, run / "checkpoints" / "epoch_0001" / evaluation.LORA_FILE
    assert found == {"strong": first, "strong'": first, "strong/epoch_0001": old, "strong''": first, "mine": copied}


def damaged(weights, how):
    """A copy of a good LoRA with one thing wrong, and words of the message."""
    key = next(k for k in weights if k.endswith("lora_A.weight") and "attn" in k)
    weights, (rank, wide) = dict(weights), weights[key].shape
    if how == "wider model":
        weights[key] = torch.zeros(rank, wide + 1)
        return weights, [f"the layer itself is ({wide}, {wide})"]
    if how == "other rank":
        weights[key] = torch.zeros(rank + 1, wide)
        return weights, [f"({wide}, {rank}) and ({rank + 1}, {wide})"]
    if how == "deeper model":
        for part in ("lora_A", "lora_B"):
            layer = key.replace("lora_A", part)
            weights[layer.replace("blocks.0", "blocks.40")] = weights[layer].clone()
        return weights, ["the model has no layer transformer_blocks.40"]
    if how == "half":
        del weights[key]
        return weights, ["only one of lora_A and lora_B"]
    if how == "integers":
        weights[key] = weights[key].to(torch.int32)
        return weights, ["expected are floats"]
    if how == "rank 0":
        up = key.replace("lora_A", "lora_B")
        weights[key], weights[up] = weights[key][:0], weights[up][:, :0].contiguous()
        return weights, ["rank 0", "expected are floats of rank 1 or more"]
    weights[key] = torch.full_like(weights[key], math.nan)
    return weights, ["NaN"]


@pytest.mark.parametrize("how", ["wider model", "other rank", "deeper model", "half", "nan", "integers", "rank 0"])
def test_a_lora_that_does_not_fit(world, tmp_path, how):
    root, policies = world
    good = root / "strong" / "checkpoints" / "last" / evaluation.LORA_FILE
    assert evaluation.check_lora("L", good, policies["tiny"].net)
    weights, words = damaged(load_file(good), how)
    save_file(weights, tmp_path / "bad.safetensors")
    with pytest.raises(common.UsageError) as problem:
        evaluation.check_lora("L", tmp_path / "bad.safetensors", policies["tiny"].net)
    assert all(word in str(problem.value) for word in ["--lora L", *words]) and "\n" not in str(problem.value)


def test_a_lora_that_does_not_fit_ends_with_2_before_sampling(world, prompts, tmp_path, monkeypatch, capsys):
    root, _ = world
    weights, words = damaged(load_file(root / "strong" / "checkpoints" / "last" / evaluation.LORA_FILE), "wider model")
    save_file(weights, tmp_path / "bad.safetensors")
    loras = ["--lora", str(root / "strong"), str(tmp_path / "bad.safetensors")]
    argv = ["eval.py", *TINY, *loras, "--prompts", prompts, "--rewards", PROBE, "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.setattr(common, "rollout", None)  # would raise if it came to that
    with pytest.raises(SystemExit) as stop:
        harness.run_main(evaluation.main, evaluation.parse_args, rewards.UsageError)
    error = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and error.startswith("eval.py: error: --lora bad") and error.count("\n") == 0
    assert words[0] in error and not (tmp_path / "out").exists()


# ---- bad input ------------------------------------------------------------------------------------------------------
BAD = {
    "--lora {root}/strong15": ["does not fit the model", "unet.", "expected is transformer."],
    "--preset tiny-sd15 --lora {root}/strong": ["does not fit the model", "expected is unet."],
    "--lora {root}/nothing": ["nothing: no pytorch_lora_weights.safetensors there"],
    "--lora {root}": ["no pytorch_lora_weights.safetensors there"],
    "--lora {prompts}": ["no readable safetensors file"],
    "--lora {root}/empty.safetensors": ["it has nothing"],
    "--prompts no_such_file.txt": ["no_such_file.txt does not exist"],
    "--prompts=": ["does not exist", "one prompt a line"],
    "--rewards shape": ["unknown reward 'shape'", "did you mean shapes"],
    "--rewards shapes=1,jpeg=0.5": ["--rewards shapes=1,jpeg=0.5 has weights"],
    "--rewards ocr": ["reward 'ocr'"],
    "--rewards shapes --reward-path nowhere": ["--reward-path"],
    "--num-prompts 0": ["--num-prompts 0 is too small; use 1"],
    "--num-prompts 4": ["--num-prompts 4 is too many", "only 3"],
    "--images-per-prompt -1": ["--images-per-prompt -1 is too small"],
    "--batch-size 0": ["--batch-size 0 is too small"],
    "--steps 1": ["--steps 1 is too small; use 2"],
    "--steps 1001": ["--steps 1001 is too many", "at most 1000"],
    "--preset tiny-sd15 --steps 501": ["--steps 501 is too many", "at most 500"],
    "--gallery-mb nan": ["--gallery-mb nan is not a number"],
    "--cfg inf": ["--cfg inf is not a number"],
    "--rewards test_eval:best": ["compares the images of one model"],
    "--grid-prompts -1": ["--grid-prompts -1 is too small"],
    "--resolution -32": ["--resolution -32 is too small"],
    "--kernel ddim": ["--kernel ddim does not fit --model tiny-sd35"],
    "--noise-level 0.5": ["does nothing with --kernel ode"],
    "--kernel cps --noise-level 1.5": ["(0, 1]"],
    "--kernel dance --noise-level -1": ["--noise-level -1.0 of dance"],
    "--device cuda:99": ["--device cuda:99 cannot be used"],
    "--device gpu": ["--device gpu cannot be used"],
    "--model no/such/model": ["--model no/such/model"],
    "--out {prompts}/evals": ["cannot be written"],
    "--out {other}": ["--out", "holds results of other settings", "--overwrite"],
    "--preset large": ["--preset"],
    "--diversity lpips": ["--diversity"],
    "--diversity diversity-clip --images-per-prompt 1": ["--images-per-prompt 1", "use 2 or more"],
    "--diversity diversity-clip --reward-path diversity-clip=nowhere": ["diversity-clip=nowhere"],
    "--diversity dreamsim": ["dreamsim"],
    "--rewards hpsv2": ["reward 'hpsv2' needs weights"],
    "--rewards geneval --reward-path geneval={clip},{clip}": ["cannot score line 1 of the prompts", "metadata"],
    "--gallery-mb -1": ["--gallery-mb -1.0 is too small"],
}


@pytest.mark.parametrize("flags", BAD)
def test_bad_input(flags, world, prompts, capsys):
    root, _ = world
    save_file({}, root / "empty.safetensors")
    (root / "other").mkdir(exist_ok=True)
    (root / "other" / "results.json").write_text('{"key": "of an older one"}')
    clip = harness.HERE / "tiny" / "clip"
    flags_ = flags.format(root=root, prompts=prompts, other=root / "other", clip=clip)
    argv = [*TINY, "--prompts", prompts, *flags_.split(" ")]
    with pytest.raises(SystemExit) as stop:
        evaluation.parse_args(argv)
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 2 and "error: " in error
    assert all(word in error for word in BAD[flags]), error


def test_a_reward_that_fails_stops_with_its_name(prompts, tmp_path):
    with pytest.raises(SystemExit) as stop:
        main("--prompts", prompts, "--rewards", "test_eval:broken", "--num-prompts", 1, "--out", tmp_path / "out")
    assert "test_eval:broken" in str(stop.value.code) and not (tmp_path / "out" / "results.json").exists()


@pytest.mark.parametrize("preset", evaluation.PRESETS)
def test_presets_say_in_one_sentence_what_they_lack(preset, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    try:
        args = evaluation.parse_args(["--preset", preset, "--device", "cpu", "--out", str(tmp_path / "out")])
    except SystemExit as stop:
        error = capsys.readouterr().err.strip()
        assert stop.code == 2 and error.startswith("eval.py: error: ") and "\n" not in error
        missing = {"drawbench": ["without a licence", "--prompts", "prompts/README.md"],
                   "pickscore": ["unfiltered", "--prompts"], "pickscore-nocfg": ["unfiltered"],
                   "dpg-bench": ["judges.questions", "--prompts"]}.get(preset, [])  # fmt: skip
        assert all(word in error for word in missing), error
        assert missing or "is not in the local cache" in error or " needs " in error, error
    else:
        assert preset.startswith("tiny") and args.diversity == "diversity-clip"


def test_protocols():
    """Sizes of the papers' protocols, of the files that are shipped."""
    sizes = {"vmpo-table1": (100, 10), "sd35-ocr": (1018, 1), "geneval": (553, 4), "hpdv2-test": (400, 1)}
    for preset, (count, per_prompt) in sizes.items():
        found = harness.load_prompts(evaluation.PRESETS[preset]["prompts"])
        assert len(found) == count and evaluation.PRESETS[preset]["images_per_prompt"] == per_prompt
    for name in ("sd35-ocr", "geneval", "pickscore"):  # AWM's and NFT's convention: the same without guidance
        assert evaluation.PRESETS[f"{name}-nocfg"] == evaluation.PRESETS[name] | {"cfg": 1.0}
        assert evaluation.PRESETS[name]["cfg"] == 4.5
    tags = [p.metadata["tag"] for p in harness.load_prompts(evaluation.PRESETS["geneval"]["prompts"])]
    assert sorted(set(tags)) == sorted(geneval.TAGS)


def test_help(capsys):
    """Every flag with its explanation; every preset is named."""
    with pytest.raises(SystemExit) as stop:
        evaluation.parse_args(["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0 and all(name in text for name in evaluation.PRESETS)
    for flag in "--panel --diversity --gallery-mb --overwrite --seed --cfg --steps --noise-level".split():
        after = text.split(f"\n  {flag} ")[1].split("\n  --")[0]
        assert len(" ".join(after.split())) > 20, flag


def test_presets_and_defaults(prompts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = evaluation.parse_args(["--preset", "tiny-sd15", "--prompts", prompts, "--rewards", "jpeg"])
    assert (args.model, args.rewards, args.cfg, args.steps) == ("tiny-sd15", "jpeg", 1.0, 10)
    assert args.out.startswith("evals/tiny-sd15_") and not Path("evals").exists()
    assert all(set(preset) <= set(vars(args)) for preset in evaluation.PRESETS.values())
    args = evaluation.parse_args(["--model", "tiny-sd35", "--prompts", prompts, "--rewards", "jpeg"])
    assert (args.cfg, args.steps, args.kernel, args.noise_level) == (4.5, 40, "ode", 0.0)


def test_another_question_to_a_judge_needs_new_scores(prompts, tmp_path, monkeypatch):
    """The file of #question= is part of a score's key: its content, not its name."""
    monkeypatch.setattr(rewards, "check", lambda *a: None)
    file, keys = tmp_path / "question.txt", []
    for text in ("Is it {prompt}?", "Is it really {prompt}?", "Is it {prompt}?"):
        file.write_text(text)
        argv = [*TINY, "--prompts", prompts, "--rewards", "vqascore", "--out", str(tmp_path / "out")]
        path = f"vqascore=http://127.0.0.1:1/v1#tries=2&question={file}"
        keys.append(evaluation.parse_args([*argv, "--reward-path", path]).reward_keys["vqascore"])
    assert keys[0] == keys[2] != keys[1]
