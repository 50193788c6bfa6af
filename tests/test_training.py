"""vmpo.py as a whole on the embedded models: every variant runs, and what must not change a run does not."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import common
import harness
import rewards
import vmpo

ROOT = Path(__file__).resolve().parent.parent
SMALL = "--num-prompts 2 --group-size 2 --steps 3 --epochs 1 --eval-images 4 --sample-every 0".split()
MODELS = ["tiny-sd35", "tiny-sd15"]


def train(folder, name, *flags, preset="tiny"):
    """Runs vmpo.main in this process; returns the run folder."""
    argv = ["--preset", preset, *SMALL, "--runs", str(folder), "--name", name, *map(str, flags)]
    vmpo.main(vmpo.parse_args(argv))
    return Path(folder) / name


def metrics(run, drop=("time/", "calls/")):
    with (Path(run) / "metrics.csv").open(newline="") as f:
        rows = list(csv.DictReader(f))
    return [{k: v for k, v in row.items() if not k.startswith(drop)} for row in rows]


def lora(run):
    return torch.load(Path(run) / "checkpoints" / "last" / "state.pt", weights_only=True)["theta"]["lora"]


def close(a, b, rtol=1e-3, atol=1e-5):
    for row, other in zip(metrics(a), metrics(b), strict=True):
        for key, value in row.items():
            if value or other[key]:
                assert float(value) == pytest.approx(float(other[key]), rel=rtol, abs=atol), key


VARIANTS = [
    "--mean time", "--mean time_prompt", "--mean group", "--mean batch", "--potential r2g",
    "--potential r2g --r2g-scale 1/T --mean time", "--potential learned --mean time_prompt",
    "--potential diff --diff-reward train --mean time_prompt",
    "--potential diff", "--objective mc", "--objective surrogate --mean batch",
    "--objective ppo --updates-per-epoch 2 --clip-range 1e-3", "--objective db", "--kl-anchor ref --kl-coef 10",
    "--logprob-reduce sum --beta 1", "--random-steps 1 --updates-per-epoch 2", "--cfg 2 --reward jpeg",
    "--cfg 2 --detach-uncond --potential diff --reward jpeg",
    "--inner-epochs 2 --updates-per-epoch 2", "--kernel ancestral", "--lora-targets to_q,to_v --lora-alpha 3",
    "--ema-decay 0.9 --ema-every 1 --sample-every 1", "--eval-kernel same --eval-steps 4", "--gradient-checkpointing",
    "--offload-text-encoders", "--reward shapes=0.7,shapes-strict=0.3", "--train-fraction 0.67", "--shared-noise",
]  # fmt: skip


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("flags", VARIANTS)
def test_every_variant_runs(tmp_path, model, flags):
    run = train(tmp_path, "run", "--model", model, *flags.split())
    rows = metrics(run)
    assert [r["epoch"] for r in rows] == ["0", "1"]
    assert float(rows[1]["ratio/start_deviation"]) < 1e-5
    assert float(rows[1]["grad/norm"]) > 0
    assert any(b.abs().max() > 0 for b in lora(run)[1::2])  # the B matrices have moved


GRADIENT = [f"--objective {o} --reward clipscore --reward-path {ROOT / 'tiny' / 'clip'}" for o in vmpo.GRADIENT]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("flags", GRADIENT)
def test_gradient_matching_runs(tmp_path, model, flags):
    run = train(tmp_path, "run", "--model", model, *flags.split())
    assert float(metrics(run)[1]["grad/norm"]) > 0


@pytest.mark.parametrize("flags", ["--kernel dance", "--kernel cps --train-fraction 0.67", "--kl-denom g2", "--no-t5"])
def test_flow_only_variants_run(tmp_path, flags):
    train(tmp_path, "run", *flags.split())


# ---- what must not change a run -------------------------------------------------------------------------------------
STATEFUL = "--mean time_prompt --updates-per-epoch 2 --ema-decay 0.9 --ema-every 1 --save-every 1".split()


@pytest.mark.parametrize("model", MODELS)
def test_resumed_run_is_bitwise_the_uninterrupted_one(tmp_path, model):
    whole = train(tmp_path, "whole", "--model", model, *STATEFUL, "--epochs", 4, "--eval-every", 2)
    halves = train(tmp_path, "halves", "--model", model, *STATEFUL, "--epochs", 2, "--eval-every", 2)
    vmpo.main(vmpo.parse_args(["--resume", str(halves), "--epochs", "4"]))
    assert metrics(whole) == metrics(halves)
    assert all(torch.equal(a, b) for a, b in zip(lora(whole), lora(halves), strict=True))
    a, b = (load_file(r / "checkpoints" / "last" / "pytorch_lora_weights.safetensors") for r in (whole, halves))
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)  # their headers name the runs
    summaries = [json.loads((r / "summary.json").read_text()) for r in (whole, halves)]
    assert summaries[0]["before"] == summaries[1]["before"] and summaries[0]["after"] == summaries[1]["after"]


@pytest.mark.parametrize("model", MODELS)
def test_micro_batch_size_changes_nothing_else(tmp_path, model):
    flags = ["--model", model, "--epochs", 2, "--mean", "time_prompt", "--updates-per-epoch", 2]
    one = train(tmp_path, "one", *flags, "--micro-batch-size", 64)
    for size in (1, 3):
        close(one, train(tmp_path, f"size{size}", *flags, "--micro-batch-size", size))


def test_two_processes_give_the_metrics_of_one(tmp_path):
    flags = [
        *SMALL,
        "--preset",
        "tiny",
        "--runs",
        str(tmp_path),
        "--epochs",
        "2",
        "--mean",
        "batch",
        "--updates-per-epoch",
        "2",
    ]
    flags += ["--objective", "mc", "--num-prompts", "4"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    for name, command in (("one", [sys.executable]), ("two", launch)):
        done = subprocess.run(
            [*command, str(ROOT / "vmpo.py"), *flags, "--name", name],
            cwd=ROOT,
            env=env,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-2000:]
    close(tmp_path / "one", tmp_path / "two")


def test_kl_to_the_old_policy_is_silent_at_the_first_update(tmp_path):
    without, with_kl = (train(tmp_path, f"kl{c}", "--kl-coef", c) for c in (0, 1000))
    assert all(torch.equal(a, b) for a, b in zip(lora(without), lora(with_kl), strict=True))
    row = metrics(with_kl)[1]
    assert float(row["loss/kl"]) == 0 and float(row["log_r/std"]) == 0 and float(row["kl/ref"]) == 0


def test_kl_to_the_reference_acts_once_the_policy_has_moved(tmp_path):
    # beta is huge, so that nothing but the KL term differs; at the second update theta is no longer the reference
    runs = [
        train(tmp_path, f"c{c}", "--kl-anchor", "ref", "--kl-coef", c, "--updates-per-epoch", 2) for c in (0, 1000)
    ]
    assert any(not torch.equal(a, b) for a, b in zip(lora(runs[0]), lora(runs[1]), strict=True))


def test_warmup_scales_the_potential(tmp_path):
    """From 0: nothing moves in the first epoch."""
    flags = ["--lr", 1e-12, "--epochs", 2, "--beta-warmup-epochs"]
    now, warm = (metrics(train(tmp_path, f"w{n}", *flags, n)) for n in (0, 4))
    assert float(warm[1]["potential/std"]) == 0 < float(now[1]["potential/std"])
    ratio = float(warm[2]["potential/std"]) / float(now[2]["potential/std"])
    assert ratio == pytest.approx(1 / 4, rel=1e-4)


# ---- cost -----------------------------------------------------------------------------------------------------------
def count(monkeypatch, tmp_path, name, *flags):
    """Network, decode and reward calls of one epoch (evaluation and pictures are off or replaced)."""
    seen = {"reward": 0, "decode": 0}
    policies = []
    real_init, real_decode, real_call = common.Policy.__init__, common.Policy.decode, rewards.Reward.__call__
    kept = lambda self, *a: (policies.append(self), real_init(self, *a))[1]  # noqa: E731
    monkeypatch.setattr(common.Policy, "__init__", kept)
    monkeypatch.setattr(
        common.Policy, "decode", lambda self, x: (seen.update(decode=seen["decode"] + 1), real_decode(self, x))[1]
    )
    monkeypatch.setattr(
        rewards.Reward,
        "__call__",
        lambda self, *a, **k: (seen.update(reward=seen["reward"] + 1), real_call(self, *a, **k))[1],
    )
    monkeypatch.setattr(harness, "finish", lambda *a: None)
    train(tmp_path, name, "--eval-images", 0, *flags)
    monkeypatch.undo()
    return policies[0].network_calls, seen["decode"], seen["reward"]


def test_diff_costs_one_decode_and_one_reward_call_per_step_and_no_network_call(monkeypatch, tmp_path):
    steps = 5
    flags = ["--steps", steps, "--train-fraction", 1, "--micro-batch-size", 4]
    r2g = count(monkeypatch, tmp_path, "r2g", "--potential", "r2g", *flags)
    diff = count(monkeypatch, tmp_path, "diff", "--potential", "diff", *flags)
    assert r2g == (steps * 2 + steps, 1, 1)  # rollout with reference + update; one terminal decode and reward
    assert diff == (r2g[0], 1 + steps, 1 + steps)


# ---- export ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("model", MODELS)
def test_exported_lora_draws_the_trainers_images_in_plain_diffusers(tmp_path, model):
    import diffusers

    argv = [
        "--preset",
        "tiny",
        *SMALL,
        "--model",
        model,
        "--lora-alpha",
        "5",
        "--lora-rank",
        "3",
        "--runs",
        str(tmp_path),
    ]
    args = vmpo.parse_args([*argv, "--steps", "4", "--name", "run"])
    policy = harness.load_policy(args, harness.setup(args, "vmpo"))
    base, prompts = harness.draw(policy, args, range(4))
    params = harness.add_lora(policy, args)
    for p in params:
        p.data = 0.25 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    images, _ = harness.draw(policy, args, range(4))
    assert (images - base).abs().max() > 0.05
    common.export_lora(policy, tmp_path / "export")
    cls = diffusers.StableDiffusionPipeline if model == "tiny-sd15" else diffusers.StableDiffusion3Pipeline
    pipe = cls.from_pretrained(args.model_path, **({"safety_checker": None} if model == "tiny-sd15" else {}))
    if model == "tiny-sd15":
        pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    noise = common.sample_noise(0, "held-out", range(4), 4, policy.latent_shape, "cpu")[:, 0]
    extra = {} if model == "tiny-sd15" else {"max_sequence_length": 10}

    def plain():
        call = dict(
            latents=noise.clone(), num_inference_steps=4, guidance_scale=1.0, height=32, width=32, output_type="pt"
        )
        return pipe([p.text for p in prompts], **call, **extra).images

    assert (plain() - base).abs().max() < 1e-4
    pipe.load_lora_weights(str(tmp_path / "export"))
    assert (plain() - images).abs().max() < 5e-3  # strong weights amplify rounding; one level of 8 bits is 4e-3


def test_lora_keeps_float32_on_a_half_precision_base(tmp_path):
    argv = ["--preset", "tiny", *SMALL, "--dtype", "bfloat16", "--runs", str(tmp_path), "--name", "bf16"]
    args = vmpo.parse_args(argv)
    vmpo.main(args)
    assert all(p.dtype == torch.float32 for p in lora(tmp_path / "bf16"))
    row = metrics(tmp_path / "bf16")[1]
    assert float(row["ratio/start_deviation"]) < 1e-2 and float(row["grad/norm"]) > 0


# ---- what goes wrong ------------------------------------------------------------------------------------------------
FAILING = """
calls = 0
def reward(images, prompts, metadata):
    global calls
    calls += 1
    if calls > {good}:
        {bad}
    return images.flatten(1).mean(1)
"""


@pytest.mark.parametrize(
    "bad",
    ["raise OSError('server gone')", "return images.flatten(1).mean(1) * float('nan')", "return images[0, 0, 0, :2]"],
)
def test_failing_reward_stops_the_run_with_its_name_after_a_checkpoint(tmp_path, monkeypatch, bad):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    name = f"failing{abs(hash(bad))}"
    (tmp_path / f"{name}.py").write_text(FAILING.format(good=2, bad=bad))  # r2g, no evaluation: one call per epoch
    with pytest.raises(SystemExit) as stop:
        train(
            tmp_path,
            "run",
            "--reward",
            f"{name}:reward",
            "--potential",
            "r2g",
            "--eval-images",
            0,
            "--epochs",
            5,
            "--save-every",
            9,
        )
    assert name in str(stop.value) and "after epoch 2" in str(stop.value)
    state = torch.load(tmp_path / "run" / "checkpoints" / "last" / "state.pt", weights_only=True)
    assert state["epoch"] == 2 and len(metrics(tmp_path / "run")) == 2


def test_nan_gradients_are_not_applied_and_stop_the_run(tmp_path, monkeypatch):
    good = train(tmp_path, "run", "--epochs", 1)
    before = lora(good)
    monkeypatch.setattr(vmpo, "vmpo_loss", lambda w, m: (w * float("nan"), w * 0))
    with pytest.raises(SystemExit, match=r"not finite: loss/total, loss/theta at step 0\); the last"):
        vmpo.main(vmpo.parse_args(["--resume", str(good), "--epochs", "20"]))
    assert all(torch.equal(a, b) for a, b in zip(before, lora(good), strict=True))
    assert len(metrics(good)) == 1 + 1 + 5  # evaluation, one good epoch, --max-bad-steps bad ones


def test_replay_that_differs_from_the_rollout_stops_the_run(tmp_path, monkeypatch):
    real = common.rollout

    def perturbed(*args, **kwargs):
        path = real(*args, **kwargs)
        path.o_old += 0.1 * torch.randn_like(path.o_old)
        return path

    monkeypatch.setattr(common, "rollout", perturbed)
    with pytest.raises(SystemExit, match="right after the rollout"):
        train(tmp_path, "run", "--eval-images", 0)
