"""The scripts as a user starts them: help, wrong flags, missing weights, Ctrl-C, a kill and a resume, a fork."""

import importlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import arguments
import awm
import eval as evaluation
import export
import first_order_rsm
import grpo
import harness
import tempflow_rsm
import vmpo

ROOT = Path(__file__).resolve().parent.parent
ENV = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
SCRIPTS = [vmpo, grpo, awm]
EACH = pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
SMALL = (
    "--preset tiny --num-prompts 2 --group-size 2 --steps 3 --eval-images 4 --sample-every 0 --save-every 1".split()
)


@pytest.mark.parametrize("name", ["vmpo", "awm", "grpo", "tempflow_rsm", "first_order_rsm", "eval"])
def test_waiting_threads_sleep(name):
    """OpenMP reads the variable when torch is loaded: it is set before, unless the user has set it."""
    lines = (ROOT / f"{name}.py").read_text().splitlines()
    imports = [line for line in lines if line.startswith(("import ", "from ", "os.environ"))]
    assert imports[0] == "import os" and imports[1].startswith('os.environ.setdefault("GOMP_SPINCOUNT", "10000")')


def call(*flags, script="vmpo.py", cwd=ROOT, **env):
    return subprocess.run(
        [sys.executable, str(script), *map(str, flags)],
        cwd=cwd,
        env=ENV | env,
        capture_output=True,
        text=True,
        timeout=300,
    )


@EACH
def test_help_is_light_grouped_and_complete(script):
    name = script.__name__
    probe = f"import sys, {name}\ntry: {name}.parse_args(['--help'])\nexcept SystemExit: pass\n"
    probe += "print('HEAVY', [m for m in ('diffusers', 'transformers', 'peft', 'matplotlib') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", probe], cwd=ROOT, env=ENV, capture_output=True, text=True)
    assert "HEAVY []" in done.stdout, done.stderr
    for group in ("method", "reward", "sampling", "optimisation", "model", "performance", "run"):
        assert f"\n{group}:" in done.stdout
    flags = re.findall(r"^  (--[a-z0-9-]+)", done.stdout, re.M)
    assert len(flags) > 50


def parser_of(script, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(harness, "parse", lambda parser, *a: parser)
        return script.parse_args([])


@EACH
def test_every_flag_is_explained(script, monkeypatch):
    parser = parser_of(script, monkeypatch)
    for action in parser._actions:
        assert action.help and len(action.help) > 8, action.dest
    groups = {group.title: {action.dest for action in group._group_actions} for group in parser._action_groups}
    method = groups["method"]
    assert len(method) >= 10
    for action in parser._actions:  # the value of a paper or of its code, or what the flag is if neither has it
        if action.dest in method and isinstance(action.default, float):
            assert "(" in action.help, action.dest
    used = Path(script.__file__).read_text()
    assert all(re.search(rf"args\.{flag}\b|\"{flag}\"", used) for flag in method)  # no flag without effect


def test_one_flag_means_the_same_in_every_script(monkeypatch):
    """Shared flags have one help text; a method's flag of the same name takes the same type."""
    parsers = [{a.dest: a for a in parser_of(script, monkeypatch)._actions} for script in SCRIPTS]
    for one in parsers:
        for two in parsers:
            for name in one.keys() & two.keys():
                assert one[name].type == two[name].type and one[name].nargs == two[name].nargs, name


SIZES = [  # the papers' experiments: what --dry-run must say
    ("vmpo", "--preset sd15-hpsv2", ["128 = 128 prompts x 1", "6400, 3200 per update",  # 128 x 50 steps (App. D)
                                     "6528 images"]),  # 128 x (50 + 1): Diff scores every step and the end
    ("grpo", "--preset vmpo-baseline-sd15-hpsv2", ["128 = 16 prompts x 8", "6400, 3200 per update", "all 50",
                                                   "128 images", "12800 in the rollout, 64 of the reference, 12800"]),
    ("grpo", "--preset ddpo-sd15", ["256 = 256 prompts x 1", "12800, 6400 per update", "2 per epoch, 400 in all"]),
    ("grpo", "--preset flowgrpo-sd35-ocr --prompts prompts/ocr_test.txt",
     ["1152 = 48 prompts x 24", "10368, 5184 per update", "23040 in the rollout, 20736 of the reference, 20736 with"]),
    ("grpo", "--preset flowgrpo-fast --prompts prompts/ocr_test.txt",
     ["3 of 10, random", "11520 in the rollout, 32 of the reference, 3456 with gradient", "3456, 1728 per update"]),
    ("grpo", "--preset pcpo-sd15", ["128 = 8 prompts x 16", "6272, 3136 per update"]),
    ("awm", "--preset awm-ocr --prompts prompts/ocr_test.txt",
     ["1152 = 48 prompts x 24", "4 per image, law discrete", "2 per epoch",
      "23040 in the rollout, 4608 with gradient, 4608 of the reference, 2304 of the old policy"]),
    ("awm", "--preset release-ocr --prompts prompts/ocr_test.txt",
     ["1728 = 72 prompts x 24", "6 per image", "1 per epoch",
      "24192 in the rollout, 10368 with gradient, 10368 of the reference, 10368 of the old"]),
    ("awm", "--preset nft-ocr --prompts prompts/ocr_test.txt",
     ["9 per image", "11520 in the rollout, 10368 with gradient"]),
]  # fmt: skip


@pytest.mark.parametrize("name, flags, lines", SIZES)
def test_dry_run_prints_the_sizes_of_the_papers_experiments(name, flags, lines, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(harness, "load_policy", lambda *a: pytest.fail("a model was loaded"))
    with pytest.raises(SystemExit) as stop:
        {s.__name__: s for s in SCRIPTS}[name].parse_args([*flags.split(), "--dry-run"])
    printed = capsys.readouterr().out
    assert stop.value.code == 0
    assert all(line in printed for line in lines), printed


@EACH
def test_missing_weights_end_in_one_sentence_within_ten_seconds(script):
    start = time.time()
    done = call(
        "--reward",
        "hpsv2",
        "--prompts",
        "prompts/hpdv2_photo.txt",
        "--eval-prompts",
        "",
        script=f"{script.__name__}.py",
    )
    assert done.returncode == 2 and time.time() - start < 10
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(f"{script.__name__}.py: error:") and "tiny" in last
    assert "HPS_v2.1" in last or "stable-diffusion" in last


WRONG = [  # what any script refuses
    ("--model nowhere", "nowhere"), ("--model /tmp", "model_index.json"), ("--reward shaps", "shapes"),
    ("--preset tinny", "tinny"), ("--steps 1", "at least 2"), ("--group-size 1", "--group-size"),
    ("--updates-per-epoch 5", "does not divide"), ("--prompts none.txt", "none.txt"), ("--lora-targets to_x", "to_x"),
    ("--kernel ddim", "ddim"), ("--runs README.md/x", "README.md"), ("--resume tiny", "tiny"),
    ("--reward no_module:f", "no_module"), ("--noise-level 0", "noise"), ("--lr 0", "--lr"), ("--beta nan", "--beta"),
    ("--beta -1", "--beta"), ("--reward shapes --prompts prompts/simple_animals.txt", "grammar"),
]  # fmt: skip
WRONG_VMPO = [
    ("--beta 0", "above 0"), ("--objective mc --mean time", "--mean"), ("--objective gradient", "differentiable"),
    ("--model tiny-sd15 --kl-denom g2", "g2"),
]  # fmt: skip
WRONG_GRPO = [
    ("--loss ddpo", "--kl"), ("--loss reinforce --updates-per-epoch 2", "--updates-per-epoch 1"),
    ("--loss reinforce --inner-epochs 2", "epg"), ("--model tiny-sd15 --kl mean-nodt", "mean-nodt"),
    ("--loss guard --fair-clip sigma2", "--fair-clip"), ("--loss epg --fair-clip guard", "--fair-clip"),
    ("--loss pcpo --pcpo-weights public", "public"), ("--loss pcpo --pcpo-weights zeta --model tiny-sd15", "zeta"),
    ("--clip-range 0", "--clip-range"), ("--clip-range nan", "--clip-range"), ("--adv-clip 0", "--adv-clip"),
    ("--pcpo-w 0", "--pcpo-w"), ("--sde-window -1", "--sde-window"), ("--sde-window 2 --sde-window-every 0", "every"),
    ("--sde-window 4", "does not fit"), ("--sde-window 1 --sde-window-range 1 1", "does not fit"),
    ("--sde-window 1 --sde-window-range 0 9", "does not fit"), ("--loss ppo", "reinforce"), ("--kl-anchor x", "ref"),
    ("--adv-norm group --group-size 1 --num-prompts 4", "raw"),
]  # fmt: skip
WRONG_AWM = [
    ("--objective nft", "lagged"), ("--objective nft --offpolicy lagged --adv-scale 5", "--adv-scale"),
    ("--train-timesteps 0", "--train-timesteps"), ("--adv-scale 0", "--adv-scale"), ("--nft-beta 0", "--nft-beta"),
    ("--huber-power 0", "--huber-power"), ("--lag-coef -1", "--lag-coef"), ("--clip-range -1", "--clip-range"),
    ("--clip-range nan", "--clip-range"), ("--lag-coef nan", "--lag-coef"), ("--lag-decay-max 1", "--lag-decay-max"),
    ("--t-min 0", "--t-min"), ("--model tiny-sd15 --kl-weight elbo", "elbo"),
    ("--steps 2 --train-fraction 0.5 --skip-first", "leaves no step"),
    ("--skip-first --train-fraction 0.4", "--skip-first"),
    ("--sampler nonsense", "nonsense"),
    ("--sampler DDIMScheduler", "DDIMScheduler"),
    ("--weight snr", "uniform"), ("--adv-norm rloo --group-size 1 --num-prompts 4", "raw"),
    ("--sampler ode --shared-noise", "--shared-noise"),  # the images of a group would all be the same
]  # fmt: skip
CASES = [(s, *c) for s in SCRIPTS for c in WRONG]
CASES += [(s, *c) for s, own in ((vmpo, WRONG_VMPO), (grpo, WRONG_GRPO), (awm, WRONG_AWM)) for c in own]


@pytest.mark.parametrize("script, flags, word", CASES, ids=lambda x: x if isinstance(x, str) else x.__name__)
def test_bad_input_is_one_sentence_before_any_model_is_loaded(script, flags, word, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(harness, "load_policy", lambda *a: pytest.fail("a model was loaded"))
    with pytest.raises(SystemExit) as stop:
        script.main(script.parse_args([*SMALL, "--runs", str(tmp_path), *flags.split()]))
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 2 and word in message and len(message) < 600
    assert message.startswith(f"{script.__name__}.py: error: ")


def test_sum_reduction_with_a_clip_range_for_means_is_warned_of(capsys):
    vmpo.parse_args([*SMALL, "--objective", "ppo", "--logprob-reduce", "sum"])
    assert "0.0256 (times the latent's 256 scalars)" in capsys.readouterr().out
    for loss in ("grpo", "pcpo", "ddpo --kl none"):
        grpo.parse_args([*SMALL, "--logprob-reduce", "sum", "--loss", *loss.split()])
        assert "0.0256 (times the latent's 256 scalars)" in capsys.readouterr().out
    grpo.parse_args([*SMALL, "--logprob-reduce", "sum", "--clip-range", "0.1"])
    assert "warning" not in capsys.readouterr().out


def long_run(folder):
    flags = [*SMALL, "--epochs", "500", "--runs", str(folder), "--name", "run"]
    return [sys.executable, str(ROOT / "vmpo.py"), *flags]


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_keeps_the_checkpoint_and_resume_goes_on(tmp_path, sent):
    heed = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731  (a background job inherits "ignore")
    process = subprocess.Popen(
        long_run(tmp_path), cwd=ROOT, env=ENV, stderr=subprocess.PIPE, text=True, preexec_fn=heed
    )
    last = tmp_path / "run" / "checkpoints" / "last" / "state.pt"
    while not last.exists() and process.poll() is None:
        time.sleep(0.2)
    process.send_signal(sent)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + sent and "--resume" in err, err[-2000:]
    lines = len((tmp_path / "run" / "metrics.csv").read_text().splitlines())
    done = call("--resume", tmp_path / "run", "--epochs", lines + 1)
    assert done.returncode == 0, done.stderr[-2000:]
    assert len((tmp_path / "run" / "metrics.csv").read_text().splitlines()) == lines + 3  # header, evaluation, epochs


def test_killed_run_resumes_from_a_valid_checkpoint(tmp_path):
    process = subprocess.Popen(long_run(tmp_path), cwd=ROOT, env=ENV, stderr=subprocess.DEVNULL)
    while not (tmp_path / "run" / "checkpoints" / "epoch_0003").exists() and process.poll() is None:
        time.sleep(0.05)
    process.kill()
    process.wait()
    vmpo.main(vmpo.parse_args(["--resume", str(tmp_path / "run"), "--epochs", "30"]))
    vmpo.main(vmpo.parse_args([*SMALL, "--epochs", "30", "--runs", str(tmp_path), "--name", "whole"]))
    rows = []
    for name in ("run", "whole"):
        text = (tmp_path / name / "metrics.csv").read_text().splitlines()
        columns = [j for j, key in enumerate(text[0].split(",")) if not key.startswith(("time/", "calls/"))]
        rows.append([[line.split(",")[j] for j in columns] for line in text])
    assert rows[0] == rows[1]


def test_fork_runs_in_another_folder(tmp_path):
    for name in ("vmpo.py", *harness.SHARED):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "my_module.py").write_text(
        "def my_reward(images, prompts, metadata):\n    return images[:, 0].mean((1, 2))\n"
    )
    (tmp_path / "my.txt").write_text("a red circle\nsomething else\n")
    flags = "--reward my_module:my_reward --prompts my.txt --cfg 1 --steps 3 --num-prompts 2 --epochs 1".split()
    flags += "--max-sequence-length 10 --eval-images 4 --micro-batch-size 4".split()
    done = call(*flags, "--model", ROOT / "tiny" / "sd35", script=tmp_path / "vmpo.py", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert list((tmp_path / "runs").glob("vmpo_*/before_after.png"))


TRAINERS = {script.__name__: script for script in (*SCRIPTS, tempflow_rsm, first_order_rsm)}


def documented(names):
    """(script, flags) of the commands in README, docs and docstrings."""
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
    text = "\n".join(page.read_text() for page in pages if page.exists())
    text += "\n".join(script.__doc__.replace("Run:  ", "") for script in TRAINERS.values())
    start = r"python|torchrun (?:--\S+ +\S+ +)+|accelerate launch (?:--\S+ +)+"
    return sorted(set(re.findall(rf"^ *(?:{start}) *({'|'.join(names)})\.py (.*?)(?:\s+#.*)?$", text, re.M)))


def readme_commands():
    return [line for line in documented(TRAINERS) if not re.search(r"runs/NAME|OUT|\.\.\.|--help", line[1])]


def parsed(script, flags, monkeypatch, folder=ROOT):
    monkeypatch.chdir(folder)
    with pytest.raises(SystemExit) as stop:
        script.parse_args([*flags, "--dry-run"])
    return stop.value.code


@pytest.mark.parametrize("name, flags", readme_commands())
def test_commands_in_the_documentation_parse(name, flags, monkeypatch, capsys, tmp_path):
    flags = shlex.split(flags)
    (tmp_path / "mine.jsonl").write_text('{"prompt": "a file of the reader"}\n')
    (tmp_path / "mine.txt").write_text("a file of the reader\n")
    (tmp_path / "my_module.py").write_text(
        "def my_reward(images, prompts, metadata):\n    return images.mean((1, 2, 3))\n"
    )
    (tmp_path / "my_sd15").symlink_to(ROOT / "tiny" / "sd15")
    assert parsed(TRAINERS[name], flags, monkeypatch, tmp_path) == 0, capsys.readouterr().err


def test_flags_in_the_documentation_exist(monkeypatch, capsys):
    known = {
        name: {f for a in parser_of(s, monkeypatch)._actions for f in a.option_strings} for name, s in TRAINERS.items()
    }
    for script, name in ((evaluation, "eval"), (export, "export")):
        with pytest.raises(SystemExit):
            (script.parse_args if name == "eval" else script.main)(["--help"])
        known[name] = set(re.findall(r"--[a-z0-9-]+", capsys.readouterr().out))
    commands = documented(known)
    assert {name for name, _ in commands} == set(known)
    for name, flags in commands:
        assert not set(re.findall(r"(?<!\S)--[a-z0-9-]+", flags)) - known[name], (name, flags)


PRESETS = [(script, preset) for script in TRAINERS.values() for preset in script.PRESETS]
NAMED = pytest.mark.parametrize("script, preset", PRESETS, ids=lambda x: x if isinstance(x, str) else x.__name__)


def not_here(script, preset, monkeypatch):
    """The prompt lists of a preset that are not in this repository."""
    seen = []
    with monkeypatch.context() as patch:
        patch.setattr(arguments, "check_limits", lambda parser, args: seen.append(args) or arguments.need(False, ""))
        with pytest.raises(SystemExit):
            script.parse_args(["--preset", preset])
    args = seen[0]
    names = {name for flag in (args.prompts, args.eval_prompts) for name in flag.split(",") if name}
    return {name for name in names if not (ROOT / name).exists()}


@NAMED
def test_presets_dry_run_and_name_the_prompt_lists_that_cannot_be_shipped(script, preset, monkeypatch, capsys):
    absent = not_here(script, preset, monkeypatch)
    assert parsed(script, ["--preset", preset], monkeypatch) == 0
    missing = [line for line in capsys.readouterr().out.splitlines() if line.startswith("missing here")]
    assert {name for name in absent if any(name in line for line in missing)} == absent
    assert bool(absent) == any("prompts/README.md" in line for line in missing)
    page = (ROOT / "prompts" / "README.md").read_text()
    for name in absent:  # the real run names the first, and the page has its line
        assert re.search(rf"^curl .*{name}$", page, re.M)
    if absent:
        with pytest.raises(SystemExit) as stop:
            script.parse_args(["--preset", preset])
        message = capsys.readouterr().err
        assert stop.value.code == 2 and any(name in message for name in absent)


def test_a_dry_run_checks_rewards_and_model(monkeypatch, capsys, tmp_path):
    (tmp_path / "plain.py").write_text("def r(images, prompts, metadata):\n    return images.mean((1, 2, 3))\n")
    tiny = ["--preset", "tiny", "--group-size", "2"]
    for wrong, word in (
        ("--reward hpsv3", "unknown reward"), ("--prompts none.txt", "none.txt"), ("--reward plain:s", "plain"),
        ("--prompts prompts/simple_animals.txt", "(--prompts)"),
        ("--eval-prompts prompts/simple_animals.txt", "(--eval-prompts)"),
    ):  # fmt: skip
        assert parsed(vmpo, [*tiny, *wrong.split()], monkeypatch, tmp_path) == 2
        assert word in capsys.readouterr().err, wrong
    assert parsed(vmpo, [*tiny, "--reward", "hpsv2", "--model", "sd15"], monkeypatch, tmp_path) == 0
    missing = [line for line in capsys.readouterr().out.splitlines() if line.startswith("missing here")]
    assert len(missing) == 2 and "HPS_v2.1" in missing[0] and "stable-diffusion-v1-5" in missing[1]
    assert parsed(vmpo, tiny, monkeypatch, tmp_path) == 0
    assert "missing here" not in capsys.readouterr().out


def test_advice_is_right_when_followed(monkeypatch, capsys, tmp_path):
    """The missing reward's --preset tiny runs; a custom reward without a gradient is told how to say that it has."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        vmpo.parse_args(["--preset", "sd15-hpsv2"])
    advice = re.search(r"embedded task, (--preset \w+)", capsys.readouterr().err)[1].split()
    assert vmpo.parse_args([*advice, "--runs", str(tmp_path)]).reward == "shapes"
    text = "def r(images, prompts, metadata):\n    return images.mean((1, 2, 3))\n"
    for script, flags in ((first_order_rsm, ["--reward-path"]), (vmpo, ["--objective", "gradient"])):
        module = f"graded_{script.__name__}"
        (tmp_path / f"{module}.py").write_text(text)
        assert parsed(script, ["--preset", "tiny", "--reward", f"{module}:r", *flags], monkeypatch, tmp_path) == 2
        assert "set r.differentiable = True in its module" in capsys.readouterr().err
        (tmp_path / f"{module}.py").write_text(text + "r.differentiable = True\n")
        sys.modules.pop(module), importlib.invalidate_caches()
        assert parsed(script, ["--preset", "tiny", "--reward", f"{module}:r", *flags], monkeypatch, tmp_path) == 0


@pytest.mark.parametrize("script", TRAINERS.values(), ids=lambda script: script.__name__)
def test_help_says_what_each_preset_is(script, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        script.parse_args(["--help"])
    end = re.sub(r"\n {6}", " ", capsys.readouterr().out.split("\npresets:\n")[1])
    lines = [line.split(": ", 1) for line in end.splitlines() if line.startswith("  ")]
    assert [name for names, _ in lines for name in names.strip().split(", ")] == list(script.PRESETS)
    assert all(len(what) > 20 for _, what in lines)


def anchors(page):
    """The anchors that GitHub makes of a page's headings."""
    heads = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", page, flags=re.S), re.M)
    plain = [re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", head).lower() for head in heads]
    return {re.sub(r"[^\w\- ]", "", head).strip().replace(" ", "-") for head in plain}


def test_links_in_the_documentation_lead_somewhere():
    for page in [*ROOT.glob("*.md"), *ROOT.glob("*/*.md")]:
        text = re.sub(r"```.*?```", "", page.read_text(), flags=re.S)
        for link in re.findall(r"\]\(([^)\s]+)\)", text):
            place, _, anchor = link.partition("#")
            if place.startswith(("http", "mailto")):
                continue
            target = page.parent / place if place else page
            assert target.exists(), (page.name, link)
            assert not anchor or target.suffix != ".md" or anchor in anchors(target.read_text()), (page.name, link)
