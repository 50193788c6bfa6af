"""What a preset runs is what the paper and its code ran: LoRA layers, averaging of weights, every value."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import awm
import common
import first_order_rsm
import grpo
import harness
import tempflow_rsm
import vmpo
from benchmarks import random_model, recipes

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = {s.__name__: s for s in (vmpo, awm, grpo, tempflow_rsm, first_order_rsm)}
GOLDEN = json.loads((ROOT / "tests" / "golden" / "recipes.json").read_text())


# ---- LoRA layers of the real architectures, on the meta device ------------------------------------------------------
def network(name):
    import diffusers

    parts = random_model.parts_of(name)
    config = parts.get("unet") or parts["transformer"]
    with torch.device("meta"):
        return getattr(diffusers, config["_class_name"]).from_config(config)


def adapted(net, targets, rank):
    """Layers that a LoRA of these targets changes, and its parameters."""
    from peft import LoraConfig

    net.add_adapter(LoraConfig(r=rank, target_modules=list(targets)))
    found = {n.split(".lora_")[0] for n, _ in net.named_parameters() if ".lora_" in n}
    return found, sum(p.numel() for n, p in net.named_parameters() if ".lora_" in n)


def test_lora_layers_of_sd35_are_the_official_codes():
    """191 layers, 18.8 M: the joint attention, without attn2 (Flow-GRPO's and its descendants' lists of names)."""
    net = network("sd3.5-medium")
    assert sum(p.numel() for p in net.parameters()) / 1e6 == pytest.approx(2243, abs=1)
    layers, size = adapted(net, common.SD35.attention, 32)
    assert len(layers) == 191 and size / 1e6 == pytest.approx(18.78, abs=0.01)
    assert not [n for n in layers if "attn2" in n]


def test_lora_layers_of_rsms_first_order_run():
    """148 layers, 3.64 M: to_q, to_k, to_v, to_out.0 of both attentions, none of the added ones."""
    given = first_order_rsm.PRESETS["rsm-sd35-hpsv2"]["lora_targets"]
    args = SimpleNamespace(lora_targets=given, backbone=common.SD35)
    layers, size = adapted(network("sd3.5-medium"), harness.lora_targets(args), 8)
    assert len(layers) == 148 and size / 1e6 == pytest.approx(3.64, abs=0.01)
    assert any("attn2" in n for n in layers) and not any("add_" in n for n in layers)


def test_lora_layers_of_flux_are_flow_grpos():
    """Attention and feed-forward of the 19 double blocks, q, k, v of the 38 single ones (their proj_* are none)."""
    net = network("flux")
    assert sum(p.numel() for p in net.parameters()) / 1e6 == pytest.approx(11901, abs=1)
    layers, size = adapted(net, common.Flux.attention + common.Flux.mlp, 64)
    assert len(layers) == 19 * 12 + 38 * 3
    assert size == 64 * 3072 * (19 * (8 * 2 + 4 * 5) + 38 * 3 * 2)  # rank x (in + out); feed-forward is 4 x as wide


def test_lora_layers_of_sd15():
    """Both attentions of every block of the UNet: 16 blocks x 2 x 4."""
    layers, _ = adapted(network("sd15"), common.SD15.attention, 4)
    assert len(layers) == 128


# ---- averaging of the weights ---------------------------------------------------------------------------------------
def official(values, decay, interval, calls):
    """EMAModuleWrapper as the training loops call it: `calls` times while s, the steps done, stands."""
    ema, s = values[0], 0
    for value in values[1:]:
        s += 1
        for _ in range(calls):
            if (s + 1) % interval == 0:
                d = min((1 + s) / (10 + s), decay)
                ema = ema + (1 - d) * (value - ema)
    return ema


@pytest.mark.parametrize("decay, every, repeats", [(0.9, 8, 2), (0.9, 8, 7), (0.9, 1, 1), (0.99, 1, 1), (0.3, 3, 1)])
def test_averaging_is_the_official_classs(decay, every, repeats):
    values = torch.randn(90, dtype=torch.float64).tolist()
    param = nn.Parameter(torch.tensor([values[0]], dtype=torch.float64))
    part = [([param], 1.0, 1.0)]
    optimiser = common.Optimiser(part, {}, decay, every, ema_warmup=True, ema_repeats=repeats)
    for value in values[1:]:
        param.grad = torch.zeros_like(param)
        optimiser.parts = [(SimpleNamespace(step=lambda v=value: param.data.fill_(v), zero_grad=lambda **k: None),
                            [param], 1.0)]  # fmt: skip
        optimiser.step()
    assert optimiser.ema.shadow[0].item() == pytest.approx(official(values, decay, every, repeats), abs=1e-12)


def test_lag_of_the_released_averages():
    """Behind weights that grow by 1 a step: Flow-GRPO 35, VMPO 9, AWM's .99 after 150 steps 15; a flat decay 77."""
    ramp = [float(n) for n in range(841)]
    assert 840 - official(ramp, 0.9, 8, 2) == pytest.approx(36, abs=2)
    assert 840 - official(ramp, 0.9, 1, 1) == pytest.approx(9, abs=0.1)
    assert 150 - official(ramp[:151], 0.99, 1, 1) == pytest.approx(15, abs=1)


# ---- shared pieces --------------------------------------------------------------------------------------------------
def test_random_steps_of_each_sample():
    """N different ones of the steps, another choice for each sample and epoch; the same for all process counts."""
    steps = [0, 1, 2, 4, 5]
    parts = common.shuffled_rows(range(40), 40, steps, 2, 7, 3, 0, each=3)
    rows = torch.cat(parts).tolist()
    assert [len(p) for p in parts] == [60, 60] and len({tuple(row) for row in rows}) == 120
    chosen = {n: {i for m, i in rows if m == n} for n in range(40)}
    assert all(len(c) == 3 and c <= set(steps) for c in chosen.values())
    assert len(set(map(frozenset, chosen.values()))) > 3
    counts = [sum(i in c for c in chosen.values()) for i in steps]
    assert min(counts) > 12 and max(counts) < 36  # 24 each; 4 standard deviations are 12
    other = torch.cat(common.shuffled_rows(range(40), 40, steps, 2, 7, 4, 0, each=3)).tolist()
    assert {tuple(row) for row in rows} != {tuple(row) for row in other}
    half = torch.cat(common.shuffled_rows(range(20, 40), 40, steps, 2, 7, 3, 0, each=3)).tolist()
    assert {(n + 20, i) for n, i in half} == {(n, i) for n, i in rows if n >= 20}


@pytest.mark.parametrize("blocks, groups", [(1, [range(12)]), (2, [range(6), range(6, 12)]), (4, None)])
def test_one_start_for_each_part_of_an_epoch(blocks, groups):
    """PCPO's code: half of an epoch's images start from one x_T; draws of the steps stay each image's own."""
    policy = SimpleNamespace(latent_shape=(2, 3, 3), device="cpu", store="cpu", encode=lambda texts: None)
    prompts = [common.Prompt(n, f"p{n}") for n in range(9)]
    noise = common.epoch_batch(policy, prompts, 5, 1, 6, 2, 3, blocks=blocks).noise
    plain = common.epoch_batch(policy, prompts, 5, 1, 6, 2, 3).noise
    assert torch.equal(noise[:, 1:], plain[:, 1:])
    starts = [noise[n, 0] for n in range(12)]
    for group in groups or [range(n, n + 3) for n in range(0, 12, 3)]:
        assert all(torch.equal(starts[n], starts[group[0]]) for n in group)
    assert len({round(s.sum().item(), 5) for s in starts}) == blocks


@pytest.mark.parametrize("mode", ["group", "global"])
def test_advantage_with_another_standard_deviation(mode):
    r = torch.randn(5, 4, dtype=torch.float64) * 3 + 1
    adv, _ = common.group_advantage(r.flatten().float(), 4, mode, eps=1e-8, unbiased=True)
    r = r.float().double()
    std = r.std(1, keepdim=True) if mode == "group" else r.std()
    expected = (r - r.mean(1, keepdim=True)) / (std + 1e-8)
    torch.testing.assert_close(adv.double(), expected.flatten(), rtol=1e-5, atol=1e-6)


def test_guidance_of_evaluations(monkeypatch):
    args = vmpo.parse_args("--preset tiny --cfg 3 --eval-cfg 1.5 --eval-images 2 --steps 2".split())
    asked = []
    policy = SimpleNamespace(
        latent_shape=(1, 2, 2),
        device="cpu", store="cpu",
        encode=lambda texts: common.Cond(torch.zeros(2), None, torch.arange(2)),
        decode=lambda x: x.new_zeros(len(x), 3, 8, 8),
        grid=lambda *a: SimpleNamespace(steps=2),
    )
    path = SimpleNamespace(x=torch.zeros(2, 3, 1, 2, 2))
    monkeypatch.setattr(common, "rollout", lambda p, g, c, noise, cfg, *a, **k: asked.append(cfg) or path)
    harness.draw(policy, args, range(2))
    assert asked == [1.5]
    assert vmpo.parse_args("--preset tiny --cfg 3".split()).eval_cfg == 3


def test_what_differs_is_said_at_the_start(capsys, monkeypatch):
    monkeypatch.setitem(vmpo.PRESETS, "tiny", vmpo.PRESETS["tiny"] | {"note": "ours, because"})
    with pytest.raises(SystemExit):
        vmpo.parse_args(["--preset", "tiny", "--dry-run"])
    assert "preset tiny: ours, because" in capsys.readouterr().out


# ---- every value of every preset ------------------------------------------------------------------------------------
PRESETS = [(name, preset) for name, script in SCRIPTS.items() for preset in script.PRESETS if "tiny" not in preset]


@pytest.mark.parametrize("name, preset", PRESETS)
def test_preset_is_the_recipe(name, preset):
    """Each value is the official one, or an intended deviation with its reason; no value is without a source."""
    entry, ours = GOLDEN[name][preset], recipes.parsed(SCRIPTS[name], preset)
    for flag, (value, place) in entry["values"].items():
        wanted, reason = entry["ours"].get(flag, (value, place))
        assert ours[flag] == wanted, f"{preset}: --{flag} is {ours[flag]}, {place}: {value}"
        assert reason
    free = {"note", "micro_batch_size", "decode_batch_size", "reward_batch_size"}  # memory and speed only
    unsourced = set(SCRIPTS[name].PRESETS[preset]) - set(entry["values"]) - free
    assert not unsourced, f"{preset} sets {unsourced} without a source in tests/golden/recipes.json"
    assert set(entry["source"]) & {"repository", "paper"}


def test_a_preset_is_run_small_and_what_is_not_finite_is_no_evidence(tmp_path, monkeypatch):
    found = recipes.run(grpo, "flowgrpo-fast", tmp_path)
    assert found["model"].startswith("sd3.5-medium") and "--resolution 64" in found["flags"]
    real = common.Optimiser.step
    monkeypatch.setattr(common.Optimiser, "step", lambda self: [float("nan") for _ in real(self)])
    with pytest.raises(AssertionError):
        recipes.run(grpo, "flowgrpo-fast", tmp_path)


def test_evidence_is_of_presets_that_exist():
    runs = json.loads(recipes.RUNS.read_text())
    assert {(name, preset) for name in runs for preset in runs[name]} <= set(PRESETS)


def test_every_recipe_belongs_to_a_preset():
    assert {(name, preset) for name in GOLDEN for preset in GOLDEN[name]} == set(PRESETS)


def test_the_page_is_made_from_the_recipes():
    assert (ROOT / "docs" / "recipes.md").read_text() == recipes.page()
