"""export.py: what each format holds, loaded by plain diffusers or peft, draws the images of the run's own file."""

import json
import re
import shutil
import sys
from pathlib import Path

import diffusers
import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import common
import export
import grpo
import vmpo

ROOT = Path(__file__).resolve().parent.parent
SMALL = "--num-prompts 2 --group-size 2 --steps 3 --eval-images 0 --sample-every 0 --epochs 1 --lora-rank 3".split()
OWN = "checkpoints/last/pytorch_lora_weights.safetensors"
PIPES = {"tiny-sd15": diffusers.StableDiffusionPipeline, "tiny-sd35": diffusers.StableDiffusion3Pipeline}


@pytest.fixture(scope="module", params=PIPES)
def run(request, tmp_path_factory):
    """A run whose LoRA does something: B is drawn at random."""
    folder, preset = tmp_path_factory.mktemp(request.param), {"tiny-sd35": "tiny"}.get(request.param, request.param)
    vmpo.main(vmpo.parse_args(["--preset", preset, *SMALL, "--runs", str(folder), "--name", "run"]))
    weights = load_file(folder / "run" / OWN)
    draw = torch.Generator().manual_seed(1)
    weights = {k: 0.2 * torch.randn(v.shape, generator=draw) if "lora_B" in k else v for k, v in weights.items()}
    save_file(weights, folder / "run" / OWN, {"format": "pt"})
    return request.param, folder / "run"


def plain(model):
    pipe = PIPES[model].from_pretrained(ROOT / "tiny" / model.removeprefix("tiny-"))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def images(pipe):
    extra = {"max_sequence_length": 10} if isinstance(pipe, diffusers.StableDiffusion3Pipeline) else {}
    call = dict(num_inference_steps=3, guidance_scale=1.0, height=32, width=32, output_type="pt")
    return pipe("a red circle", **call, **extra, generator=torch.Generator().manual_seed(0)).images


@pytest.fixture(scope="module")
def wanted(run):
    pipe = plain(run[0])
    base = images(pipe)
    pipe.load_lora_weights(str(run[1] / "checkpoints" / "last"))
    found = images(pipe)
    assert (found - base).abs().max() > 0.05
    return found


def test_kohya(run, wanted, capsys):
    model, folder = run
    if model == "tiny-sd35":
        with pytest.raises(SystemExit) as stop:
            export.main([str(folder), "--format", "kohya"])
        message = capsys.readouterr().err
        assert stop.value.code == 2 and "SD1.5" in message and "ComfyUI reads" in message
        return
    export.main([str(folder), "--format", "kohya"])
    file = Path(capsys.readouterr().out.strip())
    keys = set(load_file(file))
    assert all(key.startswith("lora_unet_") for key in keys)
    assert {key.rsplit(".", 1)[-1] for key in keys} == {"alpha", "weight"}
    pipe = plain(model)
    pipe.load_lora_weights(str(file))
    assert torch.allclose(images(pipe), wanted, atol=1e-5)


def test_peft(run, wanted, capsys):
    model, folder = run
    export.main([str(folder / "checkpoints" / "last"), "--format", "peft"])
    out, pipe = capsys.readouterr().out.strip(), plain(model)
    part = "unet" if model == "tiny-sd15" else "transformer"
    setattr(pipe, part, PeftModel.from_pretrained(getattr(pipe, part), out).merge_and_unload())
    assert torch.allclose(images(pipe), wanted, atol=1e-5)


def test_merged(run, wanted, tmp_path):
    model, folder = run
    export.main([str(folder), "--format", "merged", "--out", str(tmp_path / "whole")])
    pipe = PIPES[model].from_pretrained(tmp_path / "whole")
    pipe.set_progress_bar_config(disable=True)
    assert torch.allclose(images(pipe), wanted, atol=1e-5)


def test_the_file_says_where_it_is_from(tmp_path):
    vmpo.main(vmpo.parse_args(["--preset", "tiny", *SMALL, "--runs", str(tmp_path), "--name", "run"]))
    file = tmp_path / "run" / OWN
    with safe_open(file, "pt") as f:
        about = json.loads(f.metadata()["made_by"])
    expected = {"method": "vmpo", "base_model": "tiny-sd35", "preset": "tiny", "rank": 3, "epoch": 1, "seed": 0}
    assert expected.items() <= about.items() and about["commit"] and sys.argv[-1] in about["command"]
    assert file.stat().st_mode & 0o444 == 0o444  # others may read it, too


@pytest.mark.parametrize("wrong", ["nothing here", "no record", "taken"])
def test_bad_input_is_one_sentence(tmp_path, capsys, wrong):
    run = tmp_path / "run"
    if wrong != "nothing here":
        (run / OWN).parent.mkdir(parents=True)
        save_file({}, run / OWN)
    if wrong == "taken":
        (run / "args.json").write_text(json.dumps({"args": {"model": "tiny-sd15"}}))
    with pytest.raises(SystemExit) as stop:
        export.main([str(run), "--format", "peft", "--out", str(tmp_path)])
    message = capsys.readouterr().err
    words = {"nothing here": "neither a run folder", "no record": "no args.json", "taken": "is there already"}
    assert stop.value.code == 2 and message.count("\n") == 1 and words[wrong] in message


def test_the_block_of_docs_use(run, tmp_path, monkeypatch):
    """As printed, on the embedded model: two adapters with weights, switched off, fused, saved."""
    model, folder = run
    if model != "tiny-sd15":
        pytest.skip("the page's block is for SD1.5")
    page = (ROOT / "docs" / "use.md").read_text()
    block = re.search(r"^```python\n(import torch\n.*?)^```", page, re.M | re.S)[1]
    head, middle, end = re.split(r"image = .*\n|pipe.disable_lora.*\npipe.enable_lora.*\n", block)
    head = head.replace("stable-diffusion-v1-5/stable-diffusion-v1-5", str(ROOT / "tiny" / "sd15"))
    head = head.replace("float16", "float32").replace("pipe.to", "# ")
    for name, factor in (("NAME", 1.0), ("OTHER", -0.5)):
        weights = {k: factor * v if "lora_B" in k else v for k, v in load_file(folder / OWN).items()}
        (tmp_path / "runs" / name / OWN).parent.mkdir(parents=True)
        save_file(weights, tmp_path / "runs" / name / OWN, {"format": "pt"})
    monkeypatch.chdir(tmp_path)
    scope = {}
    exec(head, scope)  # noqa: S102
    pipe = scope["pipe"]
    pipe.set_progress_bar_config(disable=True)
    both = images(pipe)
    pipe.disable_lora()
    assert torch.allclose(images(pipe), images(plain(model)), atol=1e-5)
    pipe.enable_lora()
    exec(middle + end, scope)  # noqa: S102
    merged = PIPES[model].from_pretrained(tmp_path / "merged")
    merged.set_progress_bar_config(disable=True)
    assert torch.allclose(images(merged), both, atol=1e-5)
    one = plain(model)  # 0.7 of the one and 0.5 of -0.5 times it: 0.45
    one.load_lora_weights(str(folder / "checkpoints" / "last"), adapter_name="a")
    one.set_adapters("a", adapter_weights=0.45)
    assert torch.allclose(images(one), both, atol=1e-5)


def lora_of(folder):
    return load_file(folder / OWN)


@pytest.mark.parametrize("given", ["run", "run/checkpoints/epoch_0002", f"run/{OWN}"])
def test_init_lora_starts_where_the_other_run_ended(tmp_path, given):
    """With another alpha and another trainer: the same held-out scores and LoRA; two epochs on, it is resumable."""
    small = "--preset tiny-sd15 --num-prompts 2 --group-size 2 --steps 3 --eval-images 4 --sample-every 0".split()
    small += ["--lora-rank", "3", "--ema-decay", "0", "--runs", str(tmp_path)]
    vmpo.main(vmpo.parse_args([*small, "--lora-alpha", "7", "--lr", "0.05", "--epochs", "2", "--name", "run"]))
    more = [*small, "--lora-alpha", "2", "--init-lora", str(tmp_path / given), "--save-every", "1"]
    grpo.main(grpo.parse_args([*more, "--epochs", "1", "--lr", "1e-12", "--name", "on"]))
    wanted, found = (lora_of(tmp_path / name) for name in ("run", "on"))
    assert wanted.keys() == found.keys() and max(v.abs().max() for k, v in wanted.items() if "lora_B" in k) > 0.01
    assert all(torch.allclose(found[key], wanted[key], atol=1e-6) for key in wanted)
    scores = [json.loads((tmp_path / f).read_text()) for f in ("run/eval/epoch_0002.json", "on/eval/epoch_0000.json")]
    before = json.loads((tmp_path / "run" / "eval" / "epoch_0000.json").read_text())["reward"]
    assert scores[0]["reward"] == pytest.approx(scores[1]["reward"], abs=1e-3) != pytest.approx(before, abs=1e-3)
    rows = (tmp_path / "on" / "metrics.csv").read_text().splitlines()
    kl = dict(zip(rows[0].split(","), rows[2].split(",")))["kl/ref"]
    assert float(kl) > 0  # the reference is the model, not the LoRA
    shutil.rmtree(tmp_path / "run")  # a resumed run needs its own copy alone
    grpo.main(grpo.parse_args(["--resume", str(tmp_path / "on"), "--epochs", "2"]))
    shutil.rmtree(tmp_path / "on" / "checkpoints")
    grpo.main(grpo.parse_args(["--resume", str(tmp_path / "on"), "--epochs", "2"]))
    assert all(torch.allclose(lora_of(tmp_path / "on")[key], wanted[key], atol=1e-6) for key in wanted)


@pytest.mark.parametrize("wrong", ["nothing", "rank", "no LoRA", "other model", "layers"])
def test_an_init_lora_that_does_not_fit_is_one_sentence(tmp_path, capsys, wrong):
    shape = {"unet.a.lora_A.weight": torch.zeros(3, 4), "unet.a.lora_B.weight": torch.zeros(4, 3)}
    weights = {"other model": {"transformer" + key[4:]: value for key, value in shape.items()}}.get(wrong, shape)
    file, words = tmp_path / "given.safetensors", {
        "nothing": "holds no LoRA", "rank": "has rank 3, --lora-rank is 5; use --lora-rank 3",
        "no LoRA": "is no safetensors file", "other model": "is no LoRA of tiny-sd15's unet",
        "layers": "the layers are not the same",
    }  # fmt: skip
    if wrong != "nothing":
        save_file(weights, file)
    if wrong == "no LoRA":
        file.write_text("something else")
    flags = ["--preset", "tiny-sd15", "--lora-rank", "5" if wrong == "rank" else "3", "--init-lora", str(file)]
    flags += ["--runs", str(tmp_path), "--num-prompts", "2", "--group-size", "2"]
    if wrong == "layers":
        with pytest.raises(common.UsageError, match=words[wrong]):
            vmpo.main(vmpo.parse_args(flags))
        return
    with pytest.raises(SystemExit) as stop:
        vmpo.parse_args(flags)
    message = capsys.readouterr().err
    assert stop.value.code == 2 and message.count("\n") == 1 and words[wrong] in message


def test_the_reference_is_without_a_lora_that_a_pipeline_has_loaded(run):
    """Not only without one of add_lora(): benchmarks/frontier.py measures a checkpoint's drift so."""
    model, folder = run
    policy = common.Policy(plain(model), max_sequence_length=10)
    grid, cond = policy.grid(3, "ode", 0.0), policy.encode(["a red circle"])
    x = torch.randn(1, *policy.latent_shape, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        base = policy.predict(x, grid.time(0, x), cond, 1.0)
        policy.pipe.load_lora_weights(str(folder / "checkpoints" / "last"), adapter_name="measured")
        with policy.reference():
            frozen = policy.predict(x, grid.time(0, x), cond, 1.0)
        own = policy.predict(x, grid.time(0, x), cond, 1.0)
    assert torch.equal(frozen, base) and (own - base).abs().max() > 0.01
