"""The three backbones on small random models of their architecture, loaded as a user's folder is (--model FOLDER):
images, grid, LoRA and guidance are those of plain diffusers, every trainer and eval.py run, and FLUX, which has no
embedded model, is invariant as the others are."""

import csv
import json
import math
import multiprocessing
import os
import socket
from pathlib import Path
from types import SimpleNamespace

import diffusers
import pytest
import torch

import arguments
import awm
import common
import eval as evaluation
import first_order_rsm
import grpo
import harness
import tempflow_rsm
import vmpo
from benchmarks import random_model

ROOT = Path(__file__).resolve().parent.parent
PROMPTS = ["a red circle", "two blue squares", "a red circle", ""]
SIZE, STEPS = 32, 4
SMALL = f"--resolution {SIZE} --num-prompts 2 --group-size 2 --steps {STEPS} --epochs 1 --eval-images 2".split()
SMALL += "--reward jpeg --eval-rewards= --sample-every 0 --micro-batch-size 4".split()


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """{kind: folder} of the small random models, made when they are asked for."""
    root, made = tmp_path_factory.mktemp("random"), {}

    def folder(kind):
        if kind not in made:
            made[kind] = str(root / kind)
            layers = str(random_model.KINDS[kind])
            random_model.main([kind, made[kind], "--layers", layers, "--small", "--dtype", "float32"])
        return made[kind]

    return folder


def load(folder, resolution=SIZE, dtype=torch.float32):
    _, backbone = harness.find_model(folder)
    pipe = backbone.load(folder, {"default": dtype, "vae": torch.float32}, True)
    return common.Policy(pipe, "cpu", dtype, resolution, max_sequence_length=10)


def start(policy, steps=STEPS):
    return common.sample_noise(7, 0, range(len(PROMPTS)), steps, policy.latent_shape, "cpu")


def ours(policy, cfg, steps=STEPS, micro_batch=3):
    grid, cond = policy.grid(steps, "ode", 0.0), policy.encode(PROMPTS)
    return policy.decode(common.rollout(policy, grid, cond, start(policy, steps), cfg, micro_batch, desc="").x[:, -1])


def theirs(folder, policy, cfg, steps=STEPS, lora=None):
    """The images of the plain diffusers pipeline from the same noise."""
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    noise, more = start(policy, steps)[:, 0], {"max_sequence_length": 10}
    if isinstance(pipe, diffusers.StableDiffusionPipeline):
        pipe.scheduler, more = diffusers.DDIMScheduler.from_config(pipe.scheduler.config), {}
    if isinstance(pipe, diffusers.FluxPipeline):
        noise = pipe._pack_latents(noise, len(PROMPTS), *policy.latent_shape)
    if lora:
        pipe.load_lora_weights(lora)
    side = dict(height=policy.resolution, width=policy.resolution, output_type="pt")
    return pipe(PROMPTS, latents=noise, num_inference_steps=steps, guidance_scale=cfg, **side, **more).images


KINDS = {"sd15": 5.0, "sd3.5-medium": 4.5, "flux": 3.5}


# ---- against diffusers ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("resolution", [32, 96])
def test_ode_rollout_draws_the_pipelines_own_images(folders, kind, resolution):
    policy = load(folders(kind), resolution)
    drawn, cfg = ours(policy, KINDS[kind]), KINDS[kind]
    assert (drawn - theirs(folders(kind), policy, cfg)).abs().max() < 1e-4
    assert (drawn[0] - drawn[2]).abs().max() > 0.1  # neither grey nor clipped
    assert 0.02 < drawn.mean() < 0.98 and drawn.shape == (4, 3, resolution, resolution)


@pytest.mark.parametrize("kind", KINDS)
def test_prompt_and_guidance_matter(folders, kind):
    policy = load(folders(kind))
    o = {cfg: one_output(policy, cfg) for cfg in (1.0, 2.0, 5.0)}
    scale = o[1.0].abs().mean()
    assert (o[1.0] - o[2.0]).abs().mean() > 1e-4 * scale
    straight = o[1.0] + 4 * (o[2.0] - o[1.0])  # two branches: linear in the guidance; an embedding: not
    assert ((o[5.0] - straight).abs().max() < 1e-4) == (kind != "flux")
    policy.encode = lambda prompts, encode=policy.encode: encode(["three green triangles"] * len(prompts))
    assert (one_output(policy, 1.0)[0] - o[1.0][0]).abs().mean() > 1e-4 * scale


def one_output(policy, cfg):
    x = start(policy)[:, 0]
    return policy.predict(x, torch.full((len(x),), 700.0), policy.encode(PROMPTS), cfg)


def test_flux_is_one_network_call_with_the_guidance_as_an_input(folders, monkeypatch):
    policy, seen = load(folders("flux")), []
    forward = policy.net.forward
    monkeypatch.setattr(policy.net, "forward", lambda *a, **k: seen.append(a) or forward(*a, **k))
    one_output(policy, 3.5)
    (tokens, embeds, pooled, t, places, texts, scale), = seen  # fmt: skip
    assert tokens.shape == (4, 4, 64) and embeds.shape == (4, 10, 64) and pooled.shape == (4, 32)
    assert scale.tolist() == [3.5] * 4 and t.tolist() == pytest.approx([0.7] * 4)
    assert places.tolist() == [[0, 0, 0], [0, 0, 1], [0, 1, 0], [0, 1, 1]] and not texts.any()


@pytest.mark.parametrize("resolution", [256, 512, 768, 1024])
def test_flux_times_are_the_pipelines(resolution):
    """mu = .5 at 256 tokens (16 x 16 pixels each), 1.15 at 4096, a line between; t -> e^mu t / (1 + (e^mu - 1) t)."""
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    config = {k: v for k, v in random_model.parts_of("flux")["scheduler"].items() if k != "_class_name"}
    given = diffusers.FlowMatchEulerDiscreteScheduler(**config)
    made = common.Flux.scheduler(given, (16, resolution // 8, resolution // 8))
    mu = calculate_shift((resolution // 16) ** 2)
    assert mu == pytest.approx({256: 0.5, 512: 0.63, 768: 0.8467, 1024: 1.15}[resolution], abs=1e-4)
    for steps in (6, 28):
        grid = common.make_grid(made, "flow", steps, "flow_sde", 0.9)
        t = torch.arange(steps, 0, -1, dtype=torch.float64) / steps
        torch.testing.assert_close(grid.t, math.exp(mu) * t / (1 + (math.exp(mu) - 1) * t), rtol=0, atol=1e-6)
        given.set_timesteps(sigmas=torch.linspace(1, 1 / steps, steps).numpy(), mu=mu)
        torch.testing.assert_close(grid.timestep, given.timesteps.double(), rtol=1e-6, atol=0)
    assert made.config.shift == pytest.approx(math.exp(mu))  # what AWM's laws of t take


def test_a_flux_without_dynamic_shift_keeps_its_own():
    made = common.Flux.scheduler(diffusers.FlowMatchEulerDiscreteScheduler(shift=1.0), (16, 64, 64))
    grid = common.make_grid(made, "flow", 4, "ode", 0.0)
    assert grid.t.tolist() == [1.0, 0.75, 0.5, 0.25] and made.config.shift == 1


def test_awms_schedulers_take_the_shift_of_the_resolution(folders):
    """NFT's grid is the model's own times, FLUX's included."""
    policy = load(folders("flux"), 512)
    flags = "--model tiny-sd35 --sampler DPMSolverMultistepScheduler --sampler-grid official --steps 6".split()
    made = awm.make_scheduler(awm.parse_args(["--preset", "tiny", *flags]), policy.pipe.scheduler)
    torch.testing.assert_close(made.sigmas[:-1].double(), policy.grid(6, "ode", 0.0).t, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_lora_draws_our_images_in_plain_diffusers(folders, kind, tmp_path):
    policy, cfg = load(folders(kind)), KINDS[kind]
    base = ours(policy, cfg)
    for p in common.add_lora(policy, policy.backbone.attention + policy.backbone.mlp, 3, 5, 0):
        p.data = 0.25 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    drawn = ours(policy, cfg)
    assert (drawn - base).abs().max() > 0.02
    common.export_lora(policy, tmp_path)
    assert (drawn - theirs(folders(kind), policy, cfg, lora=str(tmp_path))).abs().max() < 1e-3
    with policy.reference():
        assert torch.equal(ours(policy, cfg), base)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(folders, kind, dtype):
    """The network is in half precision, everything of ours around it in float32."""
    full, half = load(folders(kind)), load(folders(kind), dtype=dtype)
    assert half.net.dtype == dtype and half.uncond.embeds.dtype == dtype and half.vae.dtype == torch.float32
    a, b = one_output(full, KINDS[kind]), one_output(half, KINDS[kind])
    assert b.dtype == torch.float32 and (a - b).abs().max() < 0.1 * a.abs().max()


def test_models_made_for_real_have_the_published_sizes():
    sizes = {"sd15": (859.5, 83.7), "sd3.5-medium": (2243.2, 83.8), "flux": (11901.4, 83.8)}
    for kind, expected in sizes.items():
        parts = random_model.parts_of(kind)
        with torch.device("meta"):
            nets = [parts.get("unet") or parts["transformer"], parts["vae"]]
            nets = [getattr(diffusers, c["_class_name"]).from_config(c) for c in nets]
        assert [sum(p.numel() for p in net.parameters()) / 1e6 for net in nets] == pytest.approx(expected, abs=0.06)
        name = {"flux": "flux.1-dev"}.get(kind, kind)
        _, pipeline, channels, pixels, _ = harness.MODELS[name]
        millions = arguments.COUNTED[name, "attention"].denoiser
        assert (pipeline, millions) == (parts["_class_name"], pytest.approx(expected[0], rel=1e-3))
        assert (channels, pixels) == (parts["vae"]["latent_channels"], 8)


# ---- what does not fit is said in one sentence ----------------------------------------------------------------------
@pytest.mark.parametrize("flags, words", [("--no-t5", "T5 alone"), ("--detach-uncond", "no unconditional branch")])
def test_flags_that_flux_does_not_have(folders, capsys, flags, words):
    with pytest.raises(SystemExit) as stop:
        grpo.parse_args(["--preset", "tiny", *SMALL, "--model", folders("flux"), flags])
    assert stop.value.code == 2 and words in capsys.readouterr().err


def test_a_flux_without_guidance_embedding_is_refused(folders, tmp_path):
    pipe = common.Flux.load(folders("flux"), torch.float32, True)
    config = dict(pipe.transformer.config) | dict(guidance_embeds=False)
    pipe.register_modules(transformer=diffusers.FluxTransformer2DModel.from_config(config))
    with pytest.raises(common.UsageError, match="schnell"):
        common.Policy(pipe, resolution=SIZE)
    x, cond = torch.randn(2, 16, 4, 4), (torch.randn(2, 5, 64), torch.randn(2, 32))  # as SQDF's one-step model it runs
    assert common.Flux.forward(pipe.transformer, x, torch.ones(2), *cond).shape == x.shape


def test_random_model_names_what_is_wrong(tmp_path, capsys):
    (tmp_path / "file").touch()
    few = ["sd3.5-medium", str(tmp_path / "new"), "--layers", "1"]
    for flags, words in ((["flux", str(tmp_path)], "not empty"), (few, "use 2 or more")):
        with pytest.raises(SystemExit) as stop:
            random_model.main(flags)
        assert stop.value.code == 2 and words in capsys.readouterr().err


def test_passes_of_the_dry_run_count_one_branch():
    """1152 images, 6 steps: one call each, where SD3.5 with guidance has two."""
    one = SimpleNamespace(backbone=common.Flux)
    two = SimpleNamespace(backbone=common.SD35)
    assert [harness.network_passes(a, cfg) for a in (one, two) for cfg in (1, 3.5)] == [1, 1, 1, 2]


# ---- trainers and eval.py -------------------------------------------------------------------------------------------
def train(script, folder, runs, name, *flags):
    argv = ["--preset", "tiny", *SMALL, "--model", folder, "--runs", str(runs), "--name", name, *map(str, flags)]
    script.main(script.parse_args(argv))
    with (runs / name / "metrics.csv").open(newline="") as f:
        return list(csv.DictReader(f))[-1]


CLIP = f"--reward clipscore --reward-path {ROOT / 'tiny' / 'clip'}".split()
TRAINERS = {
    "vmpo": (vmpo, "--cfg 3.5 --mean time_prompt".split()),
    "awm": (awm, "--cfg 3.5 --train-cfg 3.5 --offpolicy half".split()),
    "awm-scheduler": (awm, "--cfg 3.5 --sampler SASolverScheduler --sampler-grid official --steps 5".split()),
    "grpo": (grpo, "--cfg 3.5 --loss guard".split()),
    "tempflow": (tempflow_rsm, ["--cfg", "3.5"]),
    "first-order": (first_order_rsm, ["--cfg", "3.5", "--no-detach-uncond", *CLIP]),
}


@pytest.mark.parametrize("name", TRAINERS)
def test_every_trainer_runs_on_flux(folders, tmp_path, name):
    script, flags = TRAINERS[name]
    row = train(script, folders("flux"), tmp_path, "run", *flags)
    assert row["epoch"] == "1" and float(row["grad/norm"]) > 0
    if row.get("ratio/start_deviation"):
        assert float(row["ratio/start_deviation"]) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_a_trained_random_model_is_evaluated(folders, tmp_path, kind):
    """python vmpo.py --model OUT, then python eval.py --model OUT --lora RUN."""
    train(vmpo, folders(kind), tmp_path, "run", "--cfg", KINDS[kind], "--lr", 0.05)
    out = tmp_path / "out"
    argv = ["--preset", "tiny", "--model", folders(kind), "--lora", str(tmp_path / "run"), "--out", str(out)]
    argv += f"--resolution {SIZE} --cfg {KINDS[kind]} --rewards jpeg --diversity none --num-prompts 3".split()
    evaluation.main(evaluation.parse_args([*argv, *"--images-per-prompt 2 --steps 3 --gallery-mb 0".split()]))
    lines = [json.loads(line) for line in (out / "scores.jsonl").read_text().splitlines()]
    base, run = ([line["score"] for line in lines if line["of"].startswith(label + "-")] for label in ("base", "run"))
    assert len(base) == len(run) == 6 and base != run


def test_eval_takes_fluxs_own_steps_and_guidance(folders):
    args = evaluation.parse_args(["--model", folders("flux"), "--rewards", "jpeg"])
    assert (args.steps, args.cfg) == (28, 3.5)


FLAGS = "--cfg 3.5 --epochs 2 --updates-per-epoch 2 --train-fraction 0.99 --lr 0.01".split()


def same(a, b):
    for key, value in a.items():
        if value and not key.startswith(("time/", "calls/")):
            assert float(value) == pytest.approx(float(b[key]), rel=1e-3, abs=1e-5), key


def one_of_two(rank, port, *run):
    """This process as torchrun would start it."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="localhost", MASTER_PORT=port)
    train(*run)


def test_flux_depends_on_no_micro_batch_and_no_process(folders, tmp_path):
    one = train(grpo, folders("flux"), tmp_path, "one", *FLAGS)
    same(one, train(grpo, folders("flux"), tmp_path, "small", *FLAGS, "--micro-batch-size", 3))
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    run = (grpo, folders("flux"), tmp_path, "two", *FLAGS)
    fork = multiprocessing.get_context("fork")
    both = [fork.Process(target=one_of_two, args=(rank, port, *run)) for rank in range(2)]
    [process.start() for process in both]
    [process.join(120) for process in both]
    assert [process.exitcode for process in both] == [0, 0]
    with (tmp_path / "two" / "metrics.csv").open(newline="") as f:
        same(one, list(csv.DictReader(f))[-1])


def test_gradient_checkpointing_changes_nothing_else(folders, tmp_path):
    one = train(grpo, folders("flux"), tmp_path, "one", *FLAGS)
    same(one, train(grpo, folders("flux"), tmp_path, "two", *FLAGS, "--gradient-checkpointing"))
