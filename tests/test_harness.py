"""harness.py without a model: statistics, the recorder, logs, pictures, models, and every check of the flags."""

import csv
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from test_common import adam, make_run, numbered
from torch import nn

import arguments
import checkpoints
import common
import harness
import pictures
import vmpo

ROOT = Path(__file__).resolve().parent.parent


# ---- prompts --------------------------------------------------------------------------------------------------------
def test_load_prompts_text_and_json_lines_together(tmp_path):
    (tmp_path / "a.txt").write_text("a cat\n\n  a dog  \n", encoding="utf-8")
    (tmp_path / "b.jsonl").write_text('{"prompt": "a café", "tag": 3}\n\n{"prompt": "a cat"}\n', encoding="utf-8")
    prompts = harness.load_prompts(f"{tmp_path / 'a.txt'},{tmp_path / 'b.jsonl'}")
    assert [p.text for p in prompts] == ["a cat", "a dog", "a café", "a cat"]
    assert [p.id for p in prompts] == [0, 1, 2, 3]  # equal texts stay two prompts
    assert prompts[0].metadata == {} and prompts[2].metadata == {"prompt": "a café", "tag": 3}


def test_load_prompts_finds_the_embedded_files_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert len(harness.load_prompts("prompts/shapes_train.txt")) > 100


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
        harness.load_prompts(str(tmp_path / name))
    assert all(word in str(problem.value) for word in words) and "\n" not in str(problem.value)


def test_load_prompts_of_nothing():
    for nothing in ("", ","):
        with pytest.raises(harness.UsageError, match="--prompts .*does not exist"):
            harness.load_prompts(nothing)


# ---- statistics -----------------------------------------------------------------------------------------------------
def test_stats_are_means_over_all_rows_and_maxima():
    rows, stats = torch.randn(31) * 2 + 5, harness.Stats(["a/mean", "b", "never"], ["top", "low"], ("a/mean",))
    for part in rows.split([10, 1, 20]):  # unequal micro-batches
        stats.add({"a/mean": part, "b": part**2})
        stats.top("top", part.max().item())
    stats.top("low", -3.0)
    found = stats.result()
    assert set(found) == {"a/mean", "a/std", "b", "top", "low"}  # what was never added has no value
    assert found["a/mean"] == pytest.approx(rows.mean().item(), rel=1e-5)
    assert found["a/std"] == pytest.approx(rows.std(correction=0).item(), rel=1e-5)
    assert found["b"] == pytest.approx((rows**2).mean().item(), rel=1e-5)
    assert found["top"] == rows.max().item() and found["low"] == 0


def test_what_is_not_finite_is_named_with_its_steps():
    stats, i = harness.Stats(["loss/total", "kl", "ratio"]), torch.tensor([4, 0, 7, 4])
    fine, broken = torch.ones(4), torch.tensor([1.0, 1.0, torch.inf, torch.nan])
    stats.add({"loss/total": fine, "kl": fine, "ratio": fine}, i)
    assert stats.broken() == "every logged quantity was finite: the backward pass was not"
    stats.add({"loss/total": broken, "kl": broken, "ratio": fine}, i)
    stats.add({"loss/total": fine, "kl": fine, "ratio": fine}, i)
    assert stats.broken() == "not finite: loss/total, kl at step 4, 7"


def test_stats_of_several_processes(monkeypatch):
    shares, sums = torch.randn(20).split([4, 16]), []

    def result():
        stats = harness.Stats(["x/mean"], ["top"], ("x/mean",))
        stats.add({"x/mean": shares[0]})
        stats.top("top", 1.0)
        return stats.result()

    def all_reduce(values, how="SUM"):
        if how == "MAX":
            return {"top": 2.5}
        sums.append(values)
        other = [len(shares[1]), shares[1].double().sum().item(), (shares[1].double() ** 2).sum().item()]
        return {key: value + other[key[1]] for key, value in values.items()}

    monkeypatch.setattr(harness, "all_reduce", all_reduce)
    found, whole = result(), torch.cat(shares)
    assert found["x/mean"] == pytest.approx(whole.mean().item(), abs=1e-6) and found["top"] == 2.5
    assert found["x/std"] == pytest.approx(whole.std(correction=0).item(), rel=1e-5)


def test_stats_take_no_part_in_the_graph():
    x = torch.ones(3, requires_grad=True)
    stats = harness.Stats(["x"])
    stats.add({"x": 2 * x})
    assert not stats.sums["x"][1].requires_grad


# ---- the recorder ---------------------------------------------------------------------------------------------------
class Failure(Exception):
    pass


@pytest.fixture
def recorder(tmp_path, monkeypatch):
    """Recorder of a run without a model: theta is one weight, the exported LoRA a text file of its value."""
    args = adam(ema_decay=0.5, ema_every=1, resume="", epochs=3, eval_images=4, eval_every=1, sample_every=0,
                save_every=9, wandb=None, keep=3, skip_failed=False, eval_kernel="ode",
                model="m", preset="", reward="shapes", seed=0, lora_rank=4, lora_alpha=8, init_lora="")  # fmt: skip
    run = make_run(tmp_path)
    run.method = "grpo"
    (tmp_path / "checkpoints").mkdir()
    theta = nn.Parameter(torch.zeros(2))
    opt = harness.make_optimiser(args, run, [theta])
    policy = SimpleNamespace(network_calls=0)
    reward = SimpleNamespace(terms=[SimpleNamespace(name="shapes")], grouped=False)
    (tmp_path / "command.txt").write_text("python grpo.py\n")
    (tmp_path / "versions.json").write_text('{"git": "1a2b"}')
    copy = lambda policy, folder, about: (folder / "lora.txt").write_text(str(theta.tolist()))  # noqa: E731
    monkeypatch.setattr(common, "export_lora", copy)
    modules, metrics = {"lag": common.EMA([theta], 0.0)}, harness.Metrics(["loss"])
    made = harness.Recorder(run, args, policy, opt, (reward, None), Failure, metrics, modules)
    return SimpleNamespace(made=made, args=args, theta=theta, opt=opt, run=run)


def one_epoch(parts, epoch):
    for _ in range(3):
        parts.made.phase()
    parts.opt.backward((parts.theta - 5).square().sum())
    parts.opt.step()
    parts.made.end_epoch(epoch, torch.tensor([1.0, 2.0]), {"shapes": torch.tensor([1.0, 2.0])}, {"loss": 0.5})


def test_a_reward_failing_in_an_evaluation_keeps_the_policys_own_weights(recorder, monkeypatch):
    """The evaluation runs with the averaged weights; the checkpoint it leaves behind must hold theta itself."""
    seen = []

    def held_out(policy, args, run, reward, more):
        seen.append(recorder.theta.detach().clone())
        if len(seen) > 1:
            raise Failure("server gone")
        return {"reward": torch.ones(4)}, torch.zeros(4, 3, 8, 8)

    monkeypatch.setattr(harness, "score_held_out", held_out)
    recorder.args.eval_prompt_list = numbered(4)
    epochs = recorder.made.epochs()
    next(epochs)
    with pytest.raises(SystemExit, match="stopped after epoch 1: server gone"):
        one_epoch(recorder, 0)
    own, averaged = recorder.theta.detach(), recorder.opt.ema.shadow[0]
    assert not torch.equal(own, averaged)
    assert torch.equal(seen[1], averaged)  # what was evaluated
    folder = recorder.run.dir / "checkpoints" / "last"
    kept = torch.load(folder / "state.pt", weights_only=True)
    assert kept["epoch"] == 1 and set(kept) == {"theta", "lag", "epoch"}
    assert torch.equal(kept["theta"]["lora"][0], own) and torch.equal(kept["theta"]["ema"]["shadow"][0], averaged)
    assert (folder / "lora.txt").read_text() == str(averaged.tolist())  # what is exported, as ever
    assert [row["epoch"] for row in recorder.made.logger.rows()] == [0, 1]


@pytest.mark.parametrize("dtype, usual", [(torch.float32, 1e-4), (torch.float16, 3e-4), (torch.bfloat16, 3e-3)])
def test_the_start_check_allows_for_the_networks_rounding(recorder, dtype, usual):
    """A log ratio of 8e-4 at the start stops a float16 run, which rounding does not explain, not a bfloat16 one."""
    recorder.run.dtype, recorder.args.ratio_tolerance = dtype, None
    stats = recorder.made.stats(0)
    assert stats.tolerance == usual
    stats.tops["ratio/start_deviation"] = 0.0
    moved, z = torch.full((1, 4), 8e-4), torch.ones(1, 4)
    if dtype == torch.bfloat16:
        stats.check_start(moved, z)
    else:
        with pytest.raises(SystemExit, match="--ratio-tolerance"):
            stats.check_start(moved, z)
    recorder.args.ratio_tolerance = 0.5
    assert recorder.made.stats(0).tolerance == 0.5


def test_a_failing_reward_before_the_first_epoch_leaves_no_checkpoint(recorder, monkeypatch):
    def held_out(*a):
        raise Failure("no server")

    monkeypatch.setattr(harness, "score_held_out", held_out)
    with pytest.raises(SystemExit, match="stopped after epoch 0: no server"):
        next(recorder.made.epochs())
    assert not list((recorder.run.dir / "checkpoints").iterdir())


def test_a_failing_reward_in_a_rollout_keeps_the_epochs_before(recorder, monkeypatch):
    recorder.args.eval_images = 0
    epochs = recorder.made.epochs()
    next(epochs)
    one_epoch(recorder, 0)
    next(epochs)
    with pytest.raises(SystemExit, match="stopped after epoch 1: bad image"), recorder.made.scoring(1):
        raise Failure("bad image")
    assert checkpoints.load(recorder.run.dir)["epoch"] == 1
    with pytest.raises(ZeroDivisionError), recorder.made.scoring(1):  # anything else is a bug and shows itself
        raise ZeroDivisionError


def test_the_end_of_a_run(recorder, monkeypatch, capsys):
    """Counts by hand, pictures of the images that the evaluations drew, and a log without control characters."""
    args, run, made = recorder.args, recorder.run, recorder.made
    args.eval_images, args.epochs, args.eval_every, args.sample_every = 30, 2, 2, 2
    vars(args).update(seed=0, eval_kernel="ode", steps=5, eval_steps=10, cfg=1.0, eval_cfg=1.0, eval_prompts="x")
    args.eval_prompt_list = numbered(10)
    (run.dir / "command.txt").write_text("python grpo.py\n")
    (run.dir / "samples").mkdir()
    shades = iter((0.0, 1.0))  # images before and after
    scores = iter((torch.zeros(30), torch.tensor([1.0] * 7 + [-1.0] * 4 + [0.0] * 19)))

    def held_out(*_):
        value = next(scores)
        return {"reward": value, "shapes": value}, torch.full((30, 3, 8, 8), next(shades))

    monkeypatch.setattr(harness, "score_held_out", held_out)
    monkeypatch.setattr(harness, "draw", None)  # nothing is drawn but by the evaluations
    for epoch in made.epochs():
        one_epoch(recorder, epoch)
    made.finish()
    found = json.loads((run.dir / "summary.json").read_text())
    assert found["improved"] == {"reward": 7, "shapes": 7} and found["worsened"] == {"reward": 4, "shapes": 4}
    assert found["gain"]["reward"] == pytest.approx(0.1)
    said, noise = capsys.readouterr()
    lines = said.splitlines()
    assert lines[0] == "epoch 0/2  held-out 0.000" and lines[1].startswith("epoch 1/2  reward 1.500")
    assert "held-out 0.100" in lines[2] and "\r" not in said + noise and "\x1b" not in said + noise
    assert "7 of 30 improved, 4 worsened" in said and str(run.dir / "gallery.html") in said
    assert "without the sampler's noise, in 10 steps (training: 5), from averaged weights, on other prompts" in said
    with Image.open(run.dir / "before_after.png") as sheet:  # 12 at random, the 11 that changed: four in a row
        assert sheet.size == (4 * 210, 2 * (34 + 3 * 150))
        assert sheet.getpixel((48, 112)) == (0, 0, 0) and sheet.getpixel((148, 112)) == (255, 255, 255)
        frames = [sheet.getpixel((1 + 210 * (n % 4), 484 + 94 + 150 * (n // 4))) for n in range(11)]
        assert [f[1] > f[0] for f in frames] == [True] * 7 + [False] * 4
    assert (run.dir / "gallery.html").read_text().count("data:image/png;base64,") == 60
    assert sorted(file.name for file in run.dir.glob("samples/*")) == ["epoch_0000.png", "epoch_0002.png"]


def test_every_process_keeps_its_own_held_out_images(tmp_path):
    """Five images, three a process: the second one's last is the first prompt again and is not kept."""
    for rank in (0, 1):
        run = harness.Run(tmp_path, torch.device("cpu"), torch.float32, rank, 2)
        assert harness.held_out_share(SimpleNamespace(eval_images=5), run) == 3
        harness.keep_images(torch.full((3, 3, 4, 4), rank / 2), SimpleNamespace(eval_images=5), run, 7)
    files = [harness.held_out_file(tmp_path, 7, n) for n in range(5)]
    assert sorted(tmp_path.rglob("*.png")) == files
    assert pictures.read_images(files)[:, 0, 0, 0].tolist() == pytest.approx([0, 0, 0, 0.5, 0.5], abs=2e-3)


def test_without_held_out_images_nothing_is_drawn(recorder, monkeypatch):
    args, run = recorder.args, recorder.run
    args.eval_images, args.epochs, args.sample_every = 0, 1, 1
    vars(args).update(seed=0, eval_kernel="same", steps=5, eval_steps=5, cfg=1.0, eval_cfg=1.0, eval_prompts="")
    (run.dir / "command.txt").write_text("python grpo.py\n")
    monkeypatch.setattr(harness, "draw", None)
    for epoch in recorder.made.epochs():
        one_epoch(recorder, epoch)
    recorder.made.finish()
    assert (run.dir / "summary.json").exists() and not (run.dir / "before_after.png").exists()


# ---- logs and pictures ----------------------------------------------------------------------------------------------
def read(path):
    with path.open(newline="") as f:
        return list(csv.reader(f))


def test_logger_columns_are_fixed_and_a_resumed_run_drops_what_came_after_its_checkpoint(tmp_path):
    args = SimpleNamespace(wandb=None)
    logger = harness.Logger(make_run(tmp_path), args, ["a", "b"])
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
    logger = harness.Logger(make_run(tmp_path, start_epoch=2), args, ["a", "b"])
    logger.log(3, {"a": 9.0, "b": 9.0})
    logger.close()
    assert read(table)[-2:] == [["2", "0.5", "-2"], ["3", "9.0", "9.0"]] and len(read(table)) == 5
    assert logger.rows()[0] == {"epoch": 0.0, "b": 0.5} and logger.rows()[-1] == {"epoch": 3.0, "a": 9.0, "b": 9.0}
    assert list(tmp_path.glob("events.out.tfevents*"))


def test_logger_of_another_process_writes_nothing(tmp_path):
    logger = harness.Logger(make_run(tmp_path, rank=1, world=2), SimpleNamespace(wandb=None), ["a"])
    logger.log(1, {"a": 1.0})
    logger.close()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("pixels,side", [(32, 96), (128, 128), (512, 256)])
def test_image_grid_has_a_tile_per_image(tmp_path, pixels, side):
    images = torch.zeros(5, 3, pixels, pixels)
    images[:, 0], images[4, 2] = 1.0, 1.0  # red; the fifth magenta
    pictures.image_grid(images, [f"a caption of many words {n}" for n in range(5)], tmp_path / "grid.png", columns=3)
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
    pictures.image_grid(images, ["a", "b"], tmp_path / "pairs.png", columns=2, pairs=True)
    with Image.open(tmp_path / "pairs.png") as sheet:
        assert sheet.size == (2 * (2 * 100 + 10), 96 + 54)
        assert sheet.getpixel((48, 78)) == (0, 0, 0) and sheet.getpixel((100 + 48, 78)) == (255, 255, 255)
        assert sheet.getpixel((210 + 48, 78)) == (0, 0, 0)
        under = [sheet.crop((x, 132, x + 96, 148)).convert("L") for x in (0, 100, 210, 310)]  # which side is which
        assert all(min(part.getdata()) < 100 for part in under)
        assert list(under[0].getdata()) != list(under[1].getdata())


def test_stacked_sheets(tmp_path):
    images, both = torch.zeros(4, 3, 32, 32), [(0.0, 1.0), (0.5, 0.25)]
    parts = [("two", images, ["a", "b"], both), ("one", images[:2] + 1, ["c"], [(1.0, 1.0)])]
    pictures.stacked_sheets(parts, tmp_path / "pairs.png", columns=2)
    with Image.open(tmp_path / "pairs.png") as sheet:
        assert sheet.size == (2 * (2 * 100 + 10), 2 * (34 + 96 + 54))
        rose, fell = sheet.getpixel((1, 94)), sheet.getpixel((211, 94))  # the frames
        assert rose[1] > max(rose[0], rose[2]) and fell[0] > max(fell[1:])
        assert sheet.getpixel((48, 112)) == (0, 0, 0) and sheet.getpixel((48, 184 + 112)) == (255, 255, 255)
        kept = sheet.getpixel((1, 184 + 94))
        assert kept[0] == kept[1] == kept[2] < 255


# ---- models ---------------------------------------------------------------------------------------------------------
def test_find_model_knows_its_names_and_folders(tmp_path):
    assert harness.find_model("sd15") == ("stable-diffusion-v1-5/stable-diffusion-v1-5", common.SD15)
    assert harness.find_model("tiny-sd35")[1].kind == "flow"
    for cls, backbone in common.BACKBONES.items():
        (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": cls}))
        assert harness.find_model(str(tmp_path)) == (str(tmp_path), backbone)


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
        harness.find_model(name)
    assert all(word in str(problem.value) for word in words)


def test_find_model_of_an_unsuitable_folder(tmp_path):
    with pytest.raises(common.UsageError, match="without model_index.json"):
        harness.find_model(str(tmp_path))
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "PixArtAlphaPipeline"}))
    with pytest.raises(common.UsageError, match="PixArtAlphaPipeline; supported are StableDiffusionPipeline"):
        harness.find_model(str(tmp_path))


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
    ("--train-fraction nan --steps 10", ["--train-fraction nan", "1 to 10"]),
    ("--cfg nan", ["--cfg nan", "finite"]),
    ("--lr inf", ["--lr inf", "finite"]),
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
    monkeypatch.setattr(arguments, "check_model", lambda args: None)
    monkeypatch.setattr(vmpo.rewards, "check", lambda *a: None)
    return vmpo.parse_args([*map(str, flags)])


def saved_run(folder, args, method="vmpo", complete=True):
    """A run folder as setup() and save() leave it."""
    skip = harness.DERIVED
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
    early = saved_run(tmp_path / "early", args, complete=False)  # it starts at epoch 0: tests/test_trust.py
    assert check_only(monkeypatch, "--resume", early).resume == str(early)
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
