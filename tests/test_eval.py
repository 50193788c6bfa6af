"""eval.py: arithmetic by hand, same noise with and without LoRA, diffusers' pipeline as oracle, bad input, files."""

import copy
import json
import math
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import tensor

import common
import eval as evaluation
import rewards

TINY = ["--preset", "tiny", "--steps", "3", "--device", "cpu"]
PROMPTS = ["a red circle", "two blue squares", "a green triangle above a red square"]
PROBE = "test_eval:probe"


def probe(images, prompts, metadata=None):
    """A random projection: every pixel counts, so two different images have different scores."""
    weights = torch.randn(images[0].numel(), generator=torch.Generator().manual_seed(0))
    return images.flatten(1) @ weights / len(weights) ** 0.5


def broken(images, prompts, metadata):
    return torch.full((len(prompts),), math.nan)


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
        run = common.Run(root, torch.device("cpu"), torch.float32, rank=0, world=1)
        policies[preset] = policy = common.Policy(args, run)
        plain = copy.deepcopy(policy.net)
        args.lora_rank, args.lora_alpha, args.lora_targets = 2, 4, "attention+mlp"
        common.add_lora(policy, args)
        for name, scale in (("zero", 0.0), ("strong", 0.3)):
            torch.manual_seed(1)
            for key, p in policy.net.named_parameters():
                if ".lora_B." in key:
                    p.data = scale * torch.randn(p.shape)
            run.dir = root / (name if preset == "tiny" else f"{name}15")
            for epoch in (1, 2):
                common.save(run, args, policy, epoch, {}, None)
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
    assert evaluation.table(summary).splitlines()[2:] == [
        "| base     | 5.0000 ± 2.3094  |",
        "| L        | 7.0000 ± 2.8868  |",
        "| L - base | +2.0000 ± 0.5774 |",
    ]


def test_one_prompt_has_no_error():
    summary = evaluation.summarise({"base": {"r": tensor([[1.0, 2.0]])}, "L": {"r": tensor([[3.0, 4.0]])}})
    assert summary["base"]["r"] == {"mean": 1.5, "se": None}
    assert "| +2.0000 ± - |" in evaluation.table(summary) and "nan" not in json.dumps(summary).lower()


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
    assert Image.open(tmp_path / "grid.png").size == (2 * (2 * 100 + 10), 96 + 40)  # two pairs, before and after


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
    assert sorted(p.name for p in out.iterdir()) == ["grid.png", "results.json", "results.md"]  # no temporary files
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
    text = (out / "results.md").read_text()
    assert evaluation.table(found["summary"]) in text and found["command"] in text
    assert Image.open(out / "grid.png").size == (3 * (96 + 14), 3 * (96 + 40))  # a row per model, a column per prompt


def test_results_are_not_overwritten_unasked(result, prompts, capsys):
    out, _ = result
    with pytest.raises(SystemExit) as stop:
        evaluation.parse_args([*TINY, "--prompts", prompts, "--out", str(out)])
    assert stop.value.code == 2 and "--overwrite" in capsys.readouterr().err
    evaluation.parse_args([*TINY, "--prompts", prompts, "--out", str(out), "--overwrite"])


# ---- which LoRA -----------------------------------------------------------------------------------------------------
def test_names_of_a_lora(world, tmp_path):
    root, _ = world
    run = root / "strong"
    last = run / "checkpoints" / "last"
    copied = tmp_path / "mine.safetensors"
    save_file(load_file(last / evaluation.LORA_FILE), copied)
    given = [run, last, run / "checkpoints" / "epoch_0001", last / evaluation.LORA_FILE, copied]
    found = evaluation.find_loras(list(map(str, given)), "flow")
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
    weights[key] = torch.full_like(weights[key], math.nan)
    return weights, ["NaN"]


@pytest.mark.parametrize("how", ["wider model", "other rank", "deeper model", "half", "nan"])
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
        common.run_main(evaluation.main, evaluation.parse_args, rewards.UsageError)
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
    "--preset large": ["--preset"],
}


@pytest.mark.parametrize("flags", BAD)
def test_bad_input(flags, world, prompts, capsys):
    root, _ = world
    save_file({}, root / "empty.safetensors")
    argv = [*TINY, "--prompts", prompts, *flags.format(root=root, prompts=prompts).split(" ")]
    with pytest.raises(SystemExit) as stop:
        evaluation.parse_args(argv)
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 2 and "error: " in error
    assert all(word in error for word in BAD[flags]), error


def test_a_reward_that_fails_stops_with_its_name(prompts, tmp_path):
    with pytest.raises(SystemExit) as stop:
        main("--prompts", prompts, "--rewards", "test_eval:broken", "--num-prompts", 1, "--out", tmp_path / "out")
    assert "test_eval:broken" in str(stop.value.code) and not (tmp_path / "out").exists()


def test_presets_and_defaults(prompts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = evaluation.parse_args(["--preset", "tiny-sd15", "--prompts", prompts, "--rewards", "jpeg"])
    assert (args.model, args.rewards, args.cfg, args.steps) == ("tiny-sd15", "jpeg", 1.0, 10)
    assert args.out.startswith("evals/tiny-sd15_") and not Path("evals").exists()
    assert all(set(preset) <= set(vars(args)) for preset in evaluation.PRESETS.values())
    args = evaluation.parse_args(["--model", "tiny-sd35", "--prompts", prompts, "--rewards", "jpeg"])
    assert (args.cfg, args.steps, args.kernel, args.noise_level) == (4.5, 40, "ode", 0.0)
