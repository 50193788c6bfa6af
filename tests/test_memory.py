"""What an epoch holds and for how long: last epoch's tensors, images in pieces."""

import gc
import importlib
from types import SimpleNamespace

import pytest
import torch

import arguments
import common
import harness

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


def test_dry_run_estimates_the_activations(capsys):
    """Linear in samples, branches and pixels; less with checkpointing."""
    vmpo, found = importlib.import_module("vmpo"), []
    for more in ("", "--micro-batch-size 16", "--cfg 1", "--resolution 1024", "--dtype float32"):
        with pytest.raises(SystemExit):
            vmpo.parse_args(["--model", "sd15", "--dry-run", *more.split()])
        line = next(x for x in capsys.readouterr().out.splitlines() if x.startswith("memory for its activations"))
        found.append([float(word) for word in line.split() if "." in word])
    usual = [8 * 2 * each for each in arguments.ACTIVATIONS["sd15"]]  # micro-batches of 8, two branches
    for factor, pair in zip((1, 2, 0.5, 4, 2), found):
        assert pair == pytest.approx([factor * each for each in usual], abs=0.06)


def test_kept_tensors_are_counted_once_and_without_weights():
    from benchmarks import activations

    weight = torch.nn.Parameter(torch.randn(3, 5))
    x = torch.randn(7, 5, requires_grad=True)
    with activations.kept({weight.untyped_storage()._cdata}) as found:
        y = x @ weight.T  # keeps x
        out = y.exp().tanh().sum() + (x**2).sum()  # keep the two results, and x again
    assert activations.size(found) == 4 * (x.numel() + 2 * y.numel()) and out.requires_grad
