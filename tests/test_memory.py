"""What an epoch holds and for how long: last epoch's tensors, images in pieces."""

import gc
import importlib
import re
from types import SimpleNamespace

import pytest
import torch

import arguments
import common
import harness
from benchmarks import activations
from benchmarks.random_model import KINDS

SMALL = "--num-prompts 2 --group-size 3 --steps 4 --epochs 2 --eval-images 0 --sample-every 0 --micro-batch-size 1"
CLIP = f"--reward clipscore --reward-path {harness.HERE / 'tiny' / 'clip'}"
RUNS = ["vmpo", "awm", "grpo", "tempflow_rsm", "tempflow_rsm --branching tree --tree-splits 0,1", "first_order_rsm"]
RUNS[3] += " --profile 2,2,2"


def held() -> int:
    """Latents that are alive in this process."""
    gc.collect()
    tensors = [x for x in gc.get_objects() if type(x) is torch.Tensor and x.shape[-3:] == (4, 8, 8)]
    return sum(x.untyped_storage().nbytes() for x in {x.data_ptr(): x for x in tensors}.values()) // (4 * 8 * 8 * 4)


@pytest.mark.parametrize("command", RUNS)
def test_an_epoch_is_gone_before_the_next_is_drawn(tmp_path, monkeypatch, command):
    script, *flags = command.split()
    module, alive, real = importlib.import_module(script), [], common.epoch_batch

    def epoch_batch(*args):
        alive.append(held())
        return real(*args)

    monkeypatch.setattr(common, "epoch_batch", epoch_batch)
    monkeypatch.setattr(harness, "finish", lambda *args: None)
    before = held()
    argv = ["--preset", "tiny", *SMALL.split(), *flags, "--runs", str(tmp_path), "--name", "run"]
    module.main(module.parse_args(argv))
    # an epoch is 6 x (1 + 4) latents of noise alone; one transition of the last update is 15 or so
    assert len(alive) == 2 and alive[1] - before < 25, (before, alive)


@pytest.mark.parametrize("decode, chunk", [(2, 3), (4, 4), (1, 16), (16, 2)])
def test_images_are_scored_in_pieces_of_whole_batches(decode, chunk):
    """The same decode and reward batches as in one piece, and never more images than these need."""
    seen, prompts = {"decode": [], "reward": []}, [common.Prompt(i, f"p{i}", {"i": i}) for i in range(4)]

    def decoded(x0):
        seen["decode"] += [len(part) for part in x0.split(decode)]
        assert len(x0) <= max(16, decode, chunk)
        return x0 * 2

    def reward(images, texts, metadata, chunk):
        seen["reward"] += [len(part) for part in images.split(chunk)]
        number = torch.tensor([float(text[1:]) for text in texts])
        assert metadata == [{"i": i} for i in number.tolist()]
        return images.flatten(1).sum(1) + 100 * number, {"number": number}

    reward.grouped = False
    x0, args = torch.randn(20, 1, 2, 2), SimpleNamespace(decode_batch_size=decode, reward_batch_size=chunk)
    total, parts = harness.score(args, SimpleNamespace(decode=decoded), reward, x0, prompts)
    number = torch.arange(4.0).repeat_interleave(5)
    assert torch.equal(total, (2 * x0).flatten(1).sum(1) + 100 * number) and torch.equal(parts["number"], number)
    for what, size in (("decode", decode), ("reward", chunk)):
        assert seen[what] == [len(part) for part in x0.split(size)]


@pytest.fixture(scope="module", params=["StableDiffusionPipeline", "StableDiffusion3Pipeline"])
def half(request):
    """An embedded model in bfloat16 whose LoRA has been moved, and the same in float32."""
    found, backbone = [], common.BACKBONES[request.param]
    folder = harness.HERE / "tiny" / ("sd15" if backbone.kind == "eps" else "sd35")
    for dtype in (torch.bfloat16, torch.float32):
        policy = common.Policy(backbone.load(folder, dtype, True), dtype=dtype, max_sequence_length=10)
        params = common.add_lora(policy, backbone.attention, rank=4, alpha=8, seed=0)
        for p in params:
            p.data = 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
        found.append((policy, params))
    return found


def outputs_and_gradients(policy, params):
    """A call of the network, and the LoRA's gradient of a fixed functional of it."""
    x, cond = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(1)), policy.encode(["a red circle"] * 4)
    o = policy.predict(x, torch.full((4,), 500.0), cond, 1.0)
    target = torch.randn(o.shape, generator=torch.Generator().manual_seed(2))
    grads = torch.autograd.grad((o * target).sum(), params)
    return o.detach(), grads


def test_lora_computes_in_the_bases_precision_with_float32_weights_and_gradients(half):
    (policy, params), (full, full_params) = half
    kinds, down = set(), [layer.lora_A["default"] for layer in common.adapter_layers(policy.net)]
    hooks = [part.register_forward_hook(lambda _, x, y: kinds.update([x[0].dtype, y.dtype])) for part in down]
    o, grads = outputs_and_gradients(policy, params)
    assert kinds == {torch.bfloat16}  # peft would compute it, and keep a copy of its input, in float32
    for hook in hooks:
        hook.remove()
    exact, full_grads = outputs_and_gradients(full, full_params)
    assert all(p.dtype == g.dtype == torch.float32 for p, g in zip(params, grads))
    assert (o - exact).abs().mean() < 0.02 * exact.abs().mean()
    flat, full_flat = (torch.cat([g.flatten() for g in each]) for each in (grads, full_grads))
    assert torch.cosine_similarity(flat, full_flat, 0) > 0.998
    assert flat.norm() == pytest.approx(full_flat.norm().item(), rel=0.02)


def test_reference_is_the_model_without_its_lora_and_leaves_it_as_it_was(half):
    for policy, params in half:
        with_lora, _ = outputs_and_gradients(policy, params)
        x, texts = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(1)), ["a red circle"] * 4
        call = (x, torch.full((4,), 500.0), policy.encode(texts), 1.0)
        with torch.no_grad():
            with pytest.raises(KeyboardInterrupt), policy.reference():
                o_ref = policy.predict(*call)
                raise KeyboardInterrupt
            assert torch.equal(policy.predict(*call), with_lora) and all(p.requires_grad for p in params)
            policy.net.disable_adapters()
            assert torch.equal(policy.predict(*call), o_ref) and not torch.equal(o_ref, with_lora)
            policy.net.enable_adapters()


def test_decoder_in_bfloat16_moves_the_images_by_less_than_a_level_on_average(half):
    """The drift of --vae-dtype bfloat16, on the model's own images."""
    policy, _ = half[1]
    grid, cond = policy.grid(10, "ode", 0.0), policy.encode(["a red circle above a blue square"] * 8)
    noise = common.sample_noise(0, "held-out", range(8), 10, policy.latent_shape, "cpu")
    with torch.no_grad(), policy.reference():
        x0 = common.rollout(policy, grid, cond, noise, 1.0, 8, desc="").x[:, -1]
        exact = policy.decode(x0)
        policy.vae.to(torch.bfloat16)
        low = policy.decode(x0)
        policy.vae.float()
    drift = 255 * (low - exact).abs()
    print(f"drift in levels of 255: mean {drift.mean():.2f}, max {drift.max():.1f}")
    assert low.dtype == torch.float32 and 0 < drift.mean() < 0.6


# ---- the estimate, and what --memory makes of it ------------------------------------------------------------------
def dry_run(capsys, command: str) -> tuple[float, dict[str, float], str]:
    """What --dry-run says: GB in all, the parts, the flags."""
    script, *flags = command.split()
    with pytest.raises(SystemExit) as stop:
        importlib.import_module(script).parse_args([*flags, "--dry-run"])
    out, err = capsys.readouterr()
    assert stop.value.code == 0, err
    lines = [line for line in out.splitlines() if line.startswith(("  ", "memory of each GPU"))]
    parts = {line[2:42].strip(): float(line[42:].split()[0]) for line in lines[1:]}
    return float(lines[0][42:].split()[0]), parts, lines[0].partition(" with ")[2]


def test_the_updates_part_is_linear(capsys):
    """In samples, branches, pixels and bytes; less with checkpointing."""
    found = {}
    for more in ("", "--micro-batch-size 16", "--cfg 1", "--resolution 1024", "--dtype float32", CHECKPOINTING):
        found[more] = dry_run(capsys, f"vmpo --model sd15 {more}")[1]["during the update"]
    usual, less = (8 * 2 * each for each in arguments.COUNTED["sd15", "attention"].update)
    wanted = [usual, 2 * usual, usual / 2, 4 * usual, 2 * usual, less]
    assert list(found.values()) == pytest.approx(wanted, abs=0.06)


CHECKPOINTING = "--gradient-checkpointing"
AIMS = [  # what a card of so many GB must hold; the last: does it have to checkpoint?
    ("vmpo --preset sd15-hpsv2", 12, False), ("vmpo --preset sd35-ocr", 24, False),
    ("grpo --preset flowgrpo-sd35-ocr", 24, False), ("grpo --preset flowgrpo-flux", 80, False),
    ("awm --preset awm-geneval", 24, False), ("awm --preset awm-flux-ocr", 80, False),
    ("awm --preset awm-flux-ocr", 48, True),
    ("first_order_rsm --preset rsm-sd15-hpsv2", 24, False), ("tempflow_rsm --preset rsm-geneval", 48, False),
]  # fmt: skip


@pytest.mark.parametrize("command, card, checkpointing", AIMS)
def test_the_papers_experiments_fit_the_cards_with_a_tenth_to_spare(capsys, command, card, checkpointing):
    total, parts, flags = dry_run(capsys, f"{command} --memory {card}")
    during = {name: size for name, size in parts.items() if name.startswith("during")}
    held = sum(parts.values()) - sum(during.values())
    assert 0.5 * card < total < 0.9 * card + 0.05 and total == pytest.approx(held + max(during.values()), abs=0.1)
    assert (CHECKPOINTING in flags) == checkpointing
    assert dry_run(capsys, f"{command} {flags} --memory {card}") == (total, parts, flags)  # as given
    low, _, fewer = dry_run(capsys, f"{command} --micro-batch-size 1 --memory {card}")  # what is given stays
    assert low < 0.9 * card + 0.05 and "--micro-batch-size 1 " in fewer


def test_memory_prefers_what_is_fast(capsys):
    """No checkpointing if it can be, micro-batches of 8 before encoders and rollout stay, even pieces."""
    base = "vmpo --preset sd15-hpsv2 --reward jpeg --eval-images 0 --prompts prompts/simple_animals.txt"
    found = {gb: dry_run(capsys, f"{base} --num-prompts 20 --group-size 5 --memory {gb}")[2] for gb in CARDS}
    assert found == CARDS


CARDS = {  # 100 samples: 50 and 10 are as good as what lies between, 5 is a twentieth
    120: "--micro-batch-size 50 --decode-batch-size 16",
    24: "--micro-batch-size 10 --decode-batch-size 16",
    12: "--micro-batch-size 5 --offload-rollout --decode-batch-size 8",
    4: "--micro-batch-size 1 --offload-text-encoders --offload-rollout --decode-batch-size 2",
    3.4: "--gradient-checkpointing --micro-batch-size 2 --offload-rollout --decode-batch-size 1",
}


def test_what_fits_no_card_is_said_before_anything_is_loaded(capsys):
    vmpo = importlib.import_module("vmpo")
    flags = "--preset sd35-ocr --prompts prompts/ocr_test.txt --reward jpeg --memory".split()
    with pytest.raises(SystemExit) as stop:
        vmpo.parse_args([*flags, "8"])
    message = capsys.readouterr().err
    assert stop.value.code == 2 and message.count("\n") == 1 and "--no-t5" in message
    card = re.search(r"take a card of (\d+) GB", message)[1]
    dry_run(capsys, "vmpo " + " ".join([*flags, card]))  # fits
    with pytest.raises(SystemExit) as stop:
        vmpo.parse_args([*flags, str(int(card) - 2)])
    assert stop.value.code == 2
    with pytest.raises(SystemExit) as stop:  # double backward: not estimated
        vmpo.parse_args("--preset sd15-hpsv2 --objective gradient-xt --potential r2g --memory 80 --dry-run".split())
    assert stop.value.code == 2 and "second derivative" in capsys.readouterr().err


ADVICE = {  # what would fit, and what would not
    "vmpo --preset sd15-hpsv2 --memory 12 --micro-batch-size 64": ("leave --micro-batch-size out", "images an epoch"),
    "tempflow_rsm --preset rsm-geneval --memory 24": ("--no-t5", "leave"),
    "first_order_rsm --preset rsm-sd35-hpsv2 --memory 24": ("reward's gradient)", "--no-t5"),
    "vmpo --preset tiny --memory 24 --lora-targets nothing": ("--lora-targets nothing matches no layer", "leave"),
}


@pytest.mark.parametrize("command", ADVICE)
def test_advice_is_what_helps(capsys, command):
    script, *flags = command.split()
    with pytest.raises(SystemExit) as stop:
        importlib.import_module(script).parse_args([*flags, "--dry-run"])
    (helps, idle), message = ADVICE[command], capsys.readouterr().err
    assert stop.value.code == 2 and helps in message and idle not in message, message


def test_what_is_not_estimated_has_no_estimate(capsys):
    with pytest.raises(SystemExit):
        importlib.import_module("vmpo").parse_args(["--objective", "gradient-xt", "--potential", "r2g", "--dry-run"])
    printed = capsys.readouterr().out
    assert arguments.UNKNOWN in printed and "memory of each GPU" not in printed


@pytest.mark.parametrize("command, stays", [  # the start and the noise of each step; states, outputs
    ("awm --preset awm-geneval", 1 / 12), ("vmpo --model sd15 --objective gradient --potential r2g", 51 / 252),
    ("tempflow_rsm --preset rsm-geneval", 1 - 192 * 11 / 29760), ("grpo --preset flowgrpo-flux", 0),
])  # fmt: skip
def test_offloading_moves_all_but_what_a_method_keeps_on_the_gpu(capsys, command, stays):
    whole, rest = (dry_run(capsys, command + more)[1].get("rollout", 0) for more in ("", " --offload-rollout"))
    assert rest == pytest.approx(whole * stays, abs=0.01)


def test_a_model_that_cannot_be_counted_is_named(tmp_path, capsys):
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    with pytest.raises(SystemExit) as stop:
        importlib.import_module("vmpo").parse_args(["--model", str(tmp_path), "--memory", "24", "--dry-run"])
    message = capsys.readouterr().err
    assert stop.value.code == 2 and message.count("\n") == 1 and f"cannot count --model {tmp_path}" in message


def test_processes_share_the_rollout(capsys, monkeypatch):
    one = dry_run(capsys, "grpo --preset flowgrpo-sd35-ocr --eval-images 0")[1]
    monkeypatch.setenv("WORLD_SIZE", "8")
    eight = dry_run(capsys, "grpo --preset flowgrpo-sd35-ocr --eval-images 0")[1]
    assert eight.pop("rollout") == pytest.approx(one.pop("rollout") / 8, abs=0.01)
    assert eight.pop("embeddings") < one.pop("embeddings") and one == eight


def test_the_table_is_what_the_networks_count():
    """A row of it: python -m benchmarks.activations."""
    found = activations.count(activations.published("sd15"), common.SD15, 512, 128, list(common.SD15.attention))
    table = arguments.COUNTED["sd15", "attention"]
    assert [*found.update, *found.decode] == pytest.approx([*table.update, *table.decode], abs=0.006)
    assert found[:6] == pytest.approx(table[:6], rel=2e-3)


def test_what_is_alive_is_counted_once_and_without_weights():
    weight, x = torch.nn.Parameter(torch.randn(3, 5)), torch.randn(5, 7)
    with activations.Peak(torch.nn.ParameterList([weight])) as peak, torch.no_grad():
        y = torch.mm(weight.view(3, 5), x)
        z = y[:2].exp()  # a view is no memory of its own
        del y
        z = z.tanh()
    assert peak.most == 4 * (21 + 14) and peak.live == 4 * 14


RUNS = [  # script, kind, flags; of the last the decoder is the largest
    ("vmpo", "sd15", "--cfg 4"), ("grpo", "sd3.5-medium", f"--cfg 4 {CHECKPOINTING} --decode-batch-size 1"),
    ("awm", "flux", "--train-cfg 3.5 --micro-batch-size 12"),
]  # fmt: skip


@pytest.mark.parametrize("script, kind, flags", RUNS)
def test_estimate_is_what_a_run_takes(tmp_path, monkeypatch, script, kind, flags):
    """All parts, of a run with small networks of the real kinds: what the run's own tensors take, within 15 %."""
    from benchmarks import random_model

    random_model.make(kind, tmp_path / "model", KINDS[kind], small=True)
    module, real, weights, peaks = importlib.import_module(script), harness.start, [], []
    argv = f"--preset tiny --model {tmp_path / 'model'} --resolution 64 --memory 24 --device cpu --reward jpeg {flags}"
    argv += " --num-prompts 2 --group-size 6 --steps 4 --epochs 1 --eval-images 0 --sample-every 0 --eval-rewards"
    argv = ["--micro-batch-size", "6", "--decode-batch-size", "4", *argv.split(), "", "--runs", str(tmp_path)]
    args = module.parse_args(argv)

    def start(*given):
        found = real(*given)
        parts = [found[1].net, found[1].vae, *found[1].encoders]
        weights.append(sum(p.numel() * p.element_size() for part in parts for p in part.parameters()))
        peaks.append(activations.Peak(*parts).__enter__())
        return found

    monkeypatch.setattr(harness, "start", start)
    estimate = arguments.memory(args, module.sizes(args))["in all"]
    try:
        module.main(args)
    finally:
        peaks[0].__exit__(None, None, None)
    measured = (weights[0] + peaks[0].most) / 2**30
    print(f"{script} on {kind}: {1024 * estimate:.1f} MiB estimated, {1024 * measured:.1f} measured")
    assert estimate == pytest.approx(measured, rel=0.15)


def test_a_resumed_run_keeps_what_was_chosen(tmp_path, capsys):
    vmpo = importlib.import_module("vmpo")
    argv = f"--preset tiny {SMALL} --memory 1 --device cpu --runs {tmp_path} --name run".split()
    argv = [flag for flag in argv if flag not in ("--micro-batch-size", "1")] + ["--epochs", "1"]
    args = vmpo.parse_args([flag if flag != "--memory" else "--memory=1" for flag in argv])
    assert "memory of each GPU" in capsys.readouterr().out and args.micro_batch_size == 6
    need = arguments.memory(args, vmpo.sizes(args))["in all"]
    vmpo.main(args)
    resume = ["--resume", str(tmp_path / "run"), "--epochs", "2"]
    for more, micro in (([], 6), (["--memory", "1"], 6), (["--micro-batch-size", "4"], 4)):
        again = vmpo.parse_args([*resume, *more])
        assert again.micro_batch_size == micro and again.memory == 1 and again.counted is None
        assert "memory of each GPU" not in capsys.readouterr().out
    with pytest.raises(SystemExit):  # too small a card: a run keeps its --resolution
        vmpo.parse_args([*resume, "--memory", "0.001"])
    assert re.search(r"stay free; take a card of \d GB$", capsys.readouterr().err.strip())
    other = vmpo.parse_args([*resume, "--memory", str(0.8 * need / 0.9)])  # another card
    assert other.micro_batch_size == 3 and "memory of each GPU" in capsys.readouterr().out
    vmpo.main(other)
    assert (tmp_path / "run" / "summary.json").exists()
