"""What an epoch holds and for how long: last epoch's tensors, images in pieces."""

import gc
import importlib
from types import SimpleNamespace

import pytest
import torch

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
