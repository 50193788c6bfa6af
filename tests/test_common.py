"""common.py without a model: prompts, random numbers, averaging, logging, and every check of the flags."""

import csv
import json
import math
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torch import nn

import common
import vmpo

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")


def make_run(folder=".", rank=0, world=1, start_epoch=0):
    return common.Run(Path(folder), CPU, torch.float32, rank, world, start_epoch)


def numbered(count):
    return [common.Prompt(i, f"prompt {i}") for i in range(count)]


# ---- prompts --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("count,n", [(7, 3), (5, 5), (3, 8), (100, 1)])
def test_prompt_batch_is_a_stream_of_whole_passes(count, n):
    """Cut at any epoch, the stream goes on as it would have; every pass holds every prompt once."""
    prompts = numbered(count)
    epochs = 4 * count
    stream = [p.id for e in range(epochs) for p in common.prompt_batch(prompts, e, 5, n)]
    assert Counter(stream) == dict.fromkeys(range(count), 4 * n)
    laps = [stream[k : k + count] for k in range(0, len(stream), count)]
    assert all(sorted(lap) == list(range(count)) for lap in laps)
    if count > 5:
        assert laps[0] != laps[1] and laps[0] != sorted(laps[0])  # shuffled anew
    for e in (0, 1, epochs - 1, 1):  # in any order, again and again
        assert [p.id for p in common.prompt_batch(prompts, e, 5, n)] == stream[e * n : (e + 1) * n]


def test_prompt_batch_depends_on_the_seed():
    prompts = numbered(50)
    assert common.prompt_batch(prompts, 0, 0, 50) != common.prompt_batch(prompts, 0, 1, 50)


def test_load_prompts_text_and_json_lines_together(tmp_path):
    (tmp_path / "a.txt").write_text("a cat\n\n  a dog  \n", encoding="utf-8")
    (tmp_path / "b.jsonl").write_text('{"prompt": "a café", "tag": 3}\n\n{"prompt": "a cat"}\n', encoding="utf-8")
    prompts = common.load_prompts(f"{tmp_path / 'a.txt'},{tmp_path / 'b.jsonl'}")
    assert [p.text for p in prompts] == ["a cat", "a dog", "a café", "a cat"]
    assert [p.id for p in prompts] == [0, 1, 2, 3]  # equal texts stay two prompts
    assert prompts[0].metadata == {} and prompts[2].metadata == {"prompt": "a café", "tag": 3}


def test_load_prompts_finds_the_embedded_files_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert len(common.load_prompts("prompts/shapes_train.txt")) > 100


@pytest.mark.parametrize(
    "name,content,words",
    [
        ("x.txt", "\n  \n", ["x.txt", "empty"]),
        ("x.jsonl", "", ["x.jsonl", "empty"]),
        ("x.jsonl", '{"prompt": "a"}\n{"prompt": \n', ["x.jsonl", "line 2", "JSON"]),
        ("x.jsonl", '{"prompt": "a"}\n\n{"text": "b"}\n', ["x.jsonl", "line 3", "'prompt'"]),
        ("x.jsonl", '["prompt"]\n', ["x.jsonl", "line 1"]),
        ("x.txt", None, ["x.txt", "does not exist"]),
    ],
)
def test_load_prompts_says_what_is_wrong(tmp_path, name, content, words):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(common.UsageError) as problem:
        common.load_prompts(str(tmp_path / name))
    assert all(word in str(problem.value) for word in words) and "\n" not in str(problem.value)


def test_load_prompts_of_nothing():
    for nothing in ("", ","):
        with pytest.raises(common.UsageError, match="--prompts .*does not exist"):
            common.load_prompts(nothing)


# ---- random numbers -------------------------------------------------------------------------------------------------
def test_sample_noise_is_a_function_of_seed_epoch_and_index():
    shape = (2, 3, 3)
    whole = common.sample_noise(3, 7, range(10), 4, shape, CPU)
    assert whole.shape == (10, 5, 2, 3, 3) and whole.dtype == torch.float32
    for cuts in ([0, 5, 10], [0, 1, 2, 9, 10], list(range(11))):
        parts = [common.sample_noise(3, 7, range(a, b), 4, shape, CPU) for a, b in zip(cuts[:-1], cuts[1:])]
        assert torch.equal(torch.cat(parts), whole)
    assert torch.equal(common.sample_noise(3, 7, [8, 2], 4, shape, CPU), whole[[8, 2]])
    for seed, epoch in ((4, 7), (3, 8), (7, 3)):
        assert (common.sample_noise(seed, epoch, range(10), 4, shape, CPU) != whole).all()
    torch.manual_seed(0)
    state = torch.get_rng_state()
    assert torch.equal(common.sample_noise(3, 7, range(2), 4, shape, CPU), whole[:2])
    assert torch.equal(torch.get_rng_state(), state)  # the global generator is not touched


def test_sample_noise_is_standard_normal_and_independent():
    x = common.sample_noise(0, 0, range(64), 3, (4, 8, 8), CPU).double()
    n = x.numel()
    assert abs(x.mean()) < 4 / n**0.5 and abs(x.var() - 1) < 4 * (2 / n) ** 0.5
    assert abs((x**4).mean() - 3) < 4 * (96 / n) ** 0.5
    rows = x.flatten(1)
    correlation = (rows @ rows.T / rows.shape[1]).fill_diagonal_(0)
    assert correlation.abs().max() < 6 / rows.shape[1] ** 0.5
    steps = x.transpose(0, 1).flatten(1)
    assert (steps @ steps.T / steps.shape[1]).fill_diagonal_(0).abs().max() < 5 / steps.shape[1] ** 0.5


def test_generators_of_different_keys_differ():
    keys = [("noise", 1, 23), ("noise", 12, 3), ("noise", 123), ("noise", -1, 23), ("prompts", 1, 23)]
    keys += [("noise", 1, 2, 3), ("noise", 3, 2, 1), ("noise", 2, 1, 3), ("shuffle", 1, 2, 3)]
    keys += [("noise", "held-out", 1), ("noise", 1, "held-out")]
    keys += [("noise", s, e, i) for s in range(5) for e in range(10) for i in range(20) if (s, e, i) != (1, 2, 3)]
    keys = [k for n, k in enumerate(keys) if k not in keys[:n]]
    firsts = {torch.randn(4, generator=common.generator(*k)).sum().item() for k in keys}
    assert len(firsts) == len(keys)
    a, b = (torch.randn(9, generator=common.generator("noise", 1, 2)) for _ in range(2))
    assert torch.equal(a, b)


# ---- transitions ----------------------------------------------------------------------------------------------------
def as_set(rows, first=0):
    return {(n + first, i) for n, i in rows.tolist()}


@pytest.mark.parametrize("updates", [1, 2, 3])
@pytest.mark.parametrize("steps", [[0, 1, 2], [1, 4, 5, 8]])
def test_shuffled_rows_are_a_partition_and_the_same_for_any_number_of_processes(updates, steps):
    args = SimpleNamespace(num_prompts=6, group_size=2, updates_per_epoch=updates, seed=3)
    one = common.shuffled_rows(args, make_run(), steps, epoch=4, inner=0)
    assert len(one) == updates and {len(rows) for rows in one} == {12 * len(steps) // updates}
    flat = [tuple(row) for rows in one for row in rows.tolist()]
    assert len(flat) == len(set(flat)) and set(flat) == {(n, i) for n in range(12) for i in steps}
    assert flat != sorted(flat)
    for world in (2, 3, 6):
        local = 12 // world
        ranks = [common.shuffled_rows(args, make_run(rank=r, world=world), steps, 4, 0) for r in range(world)]
        for update in range(updates):
            assert all(((0 <= p[update][:, 0]) & (p[update][:, 0] < local)).all() for p in ranks)
            assert sum(len(p[update]) for p in ranks) == len(one[update])
            assert set().union(*(as_set(p[update], r * local) for r, p in enumerate(ranks))) == as_set(one[update])


def test_shuffled_rows_change_with_epoch_pass_and_seed():
    args = SimpleNamespace(num_prompts=4, group_size=4, updates_per_epoch=1, seed=0)
    base = common.shuffled_rows(args, make_run(), [0, 1], 0, 0)[0].tolist()
    assert base == common.shuffled_rows(args, make_run(), [0, 1], 0, 0)[0].tolist()
    assert base != common.shuffled_rows(args, make_run(), [0, 1], 1, 0)[0].tolist()
    assert base != common.shuffled_rows(args, make_run(), [0, 1], 0, 1)[0].tolist()
    args.seed = 1
    assert base != common.shuffled_rows(args, make_run(), [0, 1], 0, 0)[0].tolist()


# ---- weights --------------------------------------------------------------------------------------------------------
def test_ema_averages_and_restores():
    param = nn.Parameter(torch.tensor([1.0, -2.0]))
    ema = common.EMA([param], 0.75)
    values, expected = [torch.tensor([3.0, 4.0]), torch.tensor([-1.0, 0.5])], torch.tensor([1.0, -2.0])
    for value in values:
        param.data.copy_(value)
        ema.update()
        expected = 0.75 * expected + 0.25 * value
    param.data.copy_(torch.tensor([0.1, 0.2]))
    before = param.detach().clone()
    with ema.applied():
        torch.testing.assert_close(param.data, expected)
        assert torch.is_grad_enabled() and param.requires_grad
    assert torch.equal(param, before)
    with pytest.raises(RuntimeError), ema.applied():
        raise RuntimeError
    assert torch.equal(param, before)
    torch.testing.assert_close(ema.shadow[0], expected)


def test_optimizer_step_clips():
    param = nn.Parameter(torch.zeros(4))
    optimizer = torch.optim.SGD([param], lr=1.0)
    param.grad = torch.tensor([3.0, 4.0, 0.0, 0.0])
    norm, taken = common.optimizer_step(optimizer, [param], 1.0, make_run())
    assert norm == 5 and taken and param.grad is None
    torch.testing.assert_close(param.data, torch.tensor([-0.6, -0.8, 0.0, 0.0]), rtol=0, atol=1e-5)
    param.grad = torch.tensor([0.3, 0.0, 0.0, 0.0])  # below the limit: as it is
    common.optimizer_step(optimizer, [param], 1.0, make_run())
    torch.testing.assert_close(param.data, torch.tensor([-0.9, -0.8, 0.0, 0.0]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_optimizer_step_skips_bad_gradients(bad):
    params = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2))]
    optimizer = torch.optim.AdamW(params, lr=0.1, weight_decay=0.1)
    for p in params:
        p.grad = torch.ones_like(p)
    assert common.optimizer_step(optimizer, params, 1.0, make_run())[1]
    kept, state = [p.detach().clone() for p in params], optimizer.state[params[0]]["exp_avg"].clone()
    params[0].grad, params[1].grad = torch.ones(3), torch.tensor([1.0, bad])
    norm, taken = common.optimizer_step(optimizer, params, 1.0, make_run())
    assert taken is False and not math.isfinite(norm)
    assert all(torch.equal(p, k) for p, k in zip(params, kept)) and all(p.grad is None for p in params)
    assert torch.equal(optimizer.state[params[0]]["exp_avg"], state)
    params[0].grad, params[1].grad = torch.ones(3), torch.ones(2)
    assert common.optimizer_step(optimizer, params, 1.0, make_run())[1]  # the next one is taken again
    assert not torch.equal(params[0], kept[0])


def test_reduce_latent():
    x = torch.arange(24.0).view(2, 3, 2, 2)
    assert common.reduce_latent(x, "sum").tolist() == [66.0, 210.0]
    assert common.reduce_latent(x, "mean").tolist() == [5.5, 17.5]


@pytest.mark.parametrize(
    "name,device,bf16,expected",
    [
        ("auto", "cpu", True, torch.float32),
        ("auto", "cuda", True, torch.bfloat16),
        ("auto", "cuda", False, torch.float16),
        ("float16", "cpu", False, torch.float16),
        ("float32", "cuda", True, torch.float32),
    ],
)
def test_pick_dtype(name, device, bf16, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *a: bf16)
    dtype, reason = common.pick_dtype(name, torch.device(device))
    assert dtype == expected and reason


# ---- logs and pictures ----------------------------------------------------------------------------------------------
def read(path):
    with path.open(newline="") as f:
        return list(csv.reader(f))


def test_logger_columns_are_fixed_and_a_resumed_run_drops_what_came_after_its_checkpoint(tmp_path):
    args = SimpleNamespace(wandb=None)
    logger = common.Logger(make_run(tmp_path), args, ["a", "b"])
    logger.log(0, {"b": 0.5})
    for epoch in (1, 2, 3):
        logger.log(epoch, {"a": epoch / 4, "b": -epoch})
    with pytest.raises(KeyError, match="typo"):
        logger.log(4, {"a": 1.0, "typo": 2.0})
    logger.close()
    table = tmp_path / "metrics.csv"
    assert read(table) == [
        ["epoch", "a", "b"],
        ["0", "", "0.5"],
        ["1", "0.25", "-1"],
        ["2", "0.5", "-2"],
        ["3", "0.75", "-3"],
    ]
    logger = common.Logger(make_run(tmp_path, start_epoch=2), args, ["a", "b"])
    logger.log(3, {"a": 9.0, "b": 9.0})
    logger.close()
    assert read(table)[-2:] == [["2", "0.5", "-2"], ["3", "9.0", "9.0"]] and len(read(table)) == 5
    assert logger.rows()[0] == {"epoch": 0.0, "b": 0.5} and logger.rows()[-1] == {"epoch": 3.0, "a": 9.0, "b": 9.0}
    assert list(tmp_path.glob("events.out.tfevents*"))


def test_logger_of_another_process_writes_nothing(tmp_path):
    logger = common.Logger(make_run(tmp_path, rank=1, world=2), SimpleNamespace(wandb=None), ["a"])
    logger.log(1, {"a": 1.0})
    logger.close()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("pixels,side", [(32, 96), (128, 128), (512, 256)])
def test_image_grid_has_a_tile_per_image(tmp_path, pixels, side):
    images = torch.zeros(5, 3, pixels, pixels)
    images[:, 0], images[4, 2] = 1.0, 1.0  # red; the fifth magenta
    common.image_grid(images, [f"a caption of many words {n}" for n in range(5)], tmp_path / "grid.png", columns=3)
    with Image.open(tmp_path / "grid.png") as sheet:
        assert sheet.format == "PNG" and sheet.size == (3 * (side + 14), 2 * (side + 40))
        centre = side // 2
        assert sheet.getpixel((centre, 30 + centre)) == (255, 0, 0)
        assert sheet.getpixel((side + 14 + centre, side + 70 + centre)) == (255, 0, 255)
        assert sheet.getpixel((2 * (side + 14) + centre, side + 70 + centre)) == (255, 255, 255)  # no sixth image
    assert [p.name for p in tmp_path.iterdir()] == ["grid.png"]


def test_image_grid_of_pairs(tmp_path):
    images = torch.zeros(4, 3, 32, 32)
    images[1::2] = 1.0  # before black, after white
    common.image_grid(images, ["a", "b"], tmp_path / "pairs.png", columns=2, pairs=True)
    with Image.open(tmp_path / "pairs.png") as sheet:
        assert sheet.size == (2 * (2 * 100 + 10), 96 + 40)
        assert sheet.getpixel((48, 78)) == (0, 0, 0) and sheet.getpixel((100 + 48, 78)) == (255, 255, 255)
        assert sheet.getpixel((210 + 48, 78)) == (0, 0, 0)
    both = [(0.0, 1.0), (0.5, 0.25)]
    common.image_grid(images, ["a", "b"], tmp_path / "pairs.png", columns=2, pairs=True, scores=both)
    with Image.open(tmp_path / "pairs.png") as sheet:
        assert sheet.size == (2 * (2 * 100 + 10), 96 + 54)
        rose, fell = sheet.getpixel((1, 60)), sheet.getpixel((211, 60))  # the frames
        assert rose[1] > max(rose[0], rose[2]) and fell[0] > max(fell[1:])


# ---- models ---------------------------------------------------------------------------------------------------------
def test_find_model_knows_its_names_and_folders(tmp_path):
    assert common.find_model("sd15") == ("stable-diffusion-v1-5/stable-diffusion-v1-5", "eps")
    assert common.find_model("tiny-sd35")[1] == "flow"
    for cls, kind in common.PIPELINES.items():
        (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": cls}))
        assert common.find_model(str(tmp_path)) == (str(tmp_path), kind)


@pytest.mark.parametrize(
    "name,words",
    [
        ("sd16", ["sd16", "tiny-sd35", "owner/name"]),
        ("./sd/16", ["./sd/16"]),
        ("/no/folder", ["/no/folder"]),
        ("nobody/nothing", ["nobody/nothing", "HF_HUB_OFFLINE", "--preset tiny"]),
    ],
)
def test_find_model_of_an_unknown_name(name, words, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(common.UsageError) as problem:
        common.find_model(name)
    assert all(word in str(problem.value) for word in words)


def test_find_model_of_an_unsuitable_folder(tmp_path):
    with pytest.raises(common.UsageError, match="without model_index.json"):
        common.find_model(str(tmp_path))
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline"}))
    with pytest.raises(common.UsageError, match="FluxPipeline; supported are StableDiffusionPipeline"):
        common.find_model(str(tmp_path))


# ---- flags ----------------------------------------------------------------------------------------------------------
def refused(capsys, *flags, preset="tiny"):
    """The one sentence with which vmpo.py ends (exit code 2) before anything is loaded."""
    with pytest.raises(SystemExit) as stop:
        vmpo.parse_args(["--preset", preset, *map(str, flags)])
    assert stop.value.code == 2
    *usage, message = capsys.readouterr().err.splitlines()
    assert message.startswith("vmpo.py: error: ") and all(not line.startswith("vmpo.py") for line in usage)
    return message


@pytest.fixture(autouse=True)
def started_as_vmpo(monkeypatch):
    monkeypatch.setattr("sys.argv", ["vmpo.py"])
    monkeypatch.delenv("WORLD_SIZE", raising=False)


REFUSED = [
    ("--steps 1", ["--steps 1", "at least 2"]),
    ("--group-size 1", ["--mean group", "--group-size is 1"]),
    ("--group-size 0", ["--group-size 0", "1 or more"]),
    ("--num-prompts 0", ["--num-prompts 0"]),
    ("--epochs 0", ["--epochs 0"]),
    ("--micro-batch-size -1", ["--micro-batch-size -1"]),
    (
        "--updates-per-epoch 5 --num-prompts 8 --group-size 8 --steps 10",
        ["--updates-per-epoch 5", "384 transitions", "use 8"],
    ),
    ("--kernel ddim", ["--kernel ddim", "flow_sde, dance"]),
    ("--kernel flow_sde --model tiny-sd15", ["--kernel flow_sde", "ddim, ancestral"]),
    ("--kernel euler", ["--kernel", "euler"]),
    ("--kernel ode", ["--kernel ode", "deterministic"]),
    ("--noise-level 0", ["--noise-level 0", "above 0"]),
    ("--noise-level -0.5", ["--noise-level -0.5", "above 0"]),
    ("--noise-level nan", ["--noise-level nan"]),
    ("--noise-level 1.5 --model tiny-sd15", ["--noise-level 1.5", "ddim", "at most 1"]),
    ("--noise-level 1.5 --kernel cps", ["--noise-level 1.5", "cps"]),
    ("--train-fraction 0 --steps 10", ["--train-fraction 0", "1 to 10"]),
    ("--train-fraction 1.2 --steps 10", ["--train-fraction 1.2", "1 to 10"]),
    ("--prompts=", ["--prompts", "does not exist"]),
    ("--prompts nowhere.txt", ["--prompts nowhere.txt", "does not exist"]),
    ("--preset nothing", ["--preset nothing", "sd15-hpsv2"]),
    ("--model sd16", ["--model sd16", "sd3.5-medium"]),
    ("--model nobody/nothing", ["nobody/nothing", "HF_HUB_OFFLINE"]),
    ("--beta 0", ["--beta 0", "above 0"]),
    ("--beta nan", ["--beta nan"]),
    ("--lr 0", ["--lr 0", "above 0"]),
    ("--ema-decay 1", ["--ema-decay 1", "[0, 1)"]),
    ("--objective mc --mean time", ["--objective mc", "--mean time", "group or batch"]),
    ("--objective ppo --mean time_prompt", ["--objective ppo", "--mean time_prompt"]),
    ("--no-such-flag 3", ["--no-such-flag"]),
]


@pytest.mark.parametrize("flags,words", REFUSED)
def test_wrong_flags_end_in_one_sentence(flags, words, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    message = refused(capsys, *flags.split())
    assert all(word in message for word in words), message


def test_empty_prompt_file_is_refused(capsys, tmp_path):
    (tmp_path / "none.txt").write_text("\n")
    assert "is empty" in refused(capsys, "--prompts", tmp_path / "none.txt")


WORLDS = [(3, ["3 processes", "use 2 processes or --num-prompts 9"]), (16, ["use 8", "16"])]


@pytest.mark.parametrize("world,words", WORLDS)
def test_processes_must_divide_the_prompts(world, words, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", str(world))
    message = refused(capsys, "--num-prompts", 8)
    assert all(word in message for word in words), message


def test_runs_folder_must_be_writable(capsys, tmp_path):
    (tmp_path / "file").write_text("x")  # below a regular file, where root cannot write either
    message = refused(capsys, "--runs", tmp_path / "file" / "runs")
    assert "--runs" in message and "not a writable folder" in message


def check_only(monkeypatch, *flags):
    """parse_args without the model and the reward."""
    monkeypatch.setattr(common, "check_model", lambda args: None)
    monkeypatch.setattr(vmpo.rewards, "check", lambda *a: None)
    return vmpo.parse_args([*map(str, flags)])


def saved_run(folder, args, method="vmpo", complete=True):
    """A run folder as setup() and save() leave it."""
    skip = {"prompt_list", "eval_prompt_list", "argv", "changed", "run_dir", "resume", "dry_run"}
    plain = {k: v for k, v in vars(args).items() if k not in skip}
    (folder / "checkpoints" / "last").mkdir(parents=True)
    (folder / "args.json").write_text(json.dumps({"method": method, "args": plain}))
    if complete:
        (folder / "checkpoints" / "last" / "state.pt").write_bytes(b"")
    return folder


def resume_refused(capsys, folder, *flags):
    with pytest.raises(SystemExit) as stop:
        vmpo.parse_args(["--resume", str(folder), *map(str, flags)])
    assert stop.value.code == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("vmpo.py: error: ")
    return message


def test_resume_takes_the_runs_own_flags(tmp_path, monkeypatch):
    args = check_only(monkeypatch, "--preset", "tiny", "--lr", 1e-3, "--epochs", 7)
    folder = saved_run(tmp_path / "run", args)
    again = check_only(monkeypatch, "--resume", folder)
    assert again.lr == 1e-3 and again.epochs == 7 and again.model == "tiny-sd35" and again.resume == str(folder)
    changed = check_only(monkeypatch, "--resume", folder, "--epochs", 9, "--micro-batch-size", 3, "--lr", 1e-3)
    assert changed.epochs == 9 and changed.micro_batch_size == 3
    drop = dict.fromkeys(("argv", "changed", "resume"))
    assert vars(args) | drop == vars(again) | drop


def test_resume_of_something_else_is_refused(capsys, tmp_path, monkeypatch):
    args = check_only(monkeypatch, "--preset", "tiny")
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "empty", tmp_path / "nowhere"):
        assert "is not a run folder" in resume_refused(capsys, folder)
    message = resume_refused(capsys, saved_run(tmp_path / "other", args, method="grpo"))
    assert "a run of grpo.py, not of vmpo.py" in message
    message = resume_refused(capsys, saved_run(tmp_path / "early", args, complete=False))
    assert "no complete checkpoint" in message
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "args.json").write_text('{"method": ')
    assert "is not a run folder" in resume_refused(capsys, tmp_path / "torn")


@pytest.mark.parametrize("flag,value", [("--lr", 0.5), ("--num-prompts", 60), ("--beta", 7.5), ("--model", "sd15")])
def test_resume_with_another_mathematics_is_refused(flag, value, capsys, tmp_path, monkeypatch):
    folder = saved_run(tmp_path / "run", check_only(monkeypatch, "--preset", "tiny"))
    message = resume_refused(capsys, folder, flag, value)
    assert f"{flag} {value} differs from the resumed run's" in message and f"leave {flag} out" in message


def test_defaults_then_preset_then_flags(monkeypatch):
    args = check_only(monkeypatch, "--preset", "tiny", "--steps", 10, "--lr", 0.0123)
    assert args.lr == 0.0123 and args.group_size == vmpo.PRESETS["tiny"]["group_size"] and args.adam_beta1 == 0.9
    assert args.changed == {"lr": [vmpo.PRESETS["tiny"]["lr"], 0.0123]}
    assert (args.kernel, args.noise_level, args.kind, args.train_steps) == ("flow_sde", 0.7, "flow", 6)
    args = check_only(monkeypatch, "--preset", "tiny-sd15", "--steps", 10)
    assert (args.kernel, args.noise_level, args.kind, args.train_steps) == ("ddim", 1.0, "eps", 7)
