"""docs/port.md: its blocks run in empty folders that have nothing beside them but what the page says to copy."""

import ast
import base64
import builtins
import csv
import io
import json
import os
import re
import shutil
import subprocess
import symtable
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import rewards
from tiny import shapes

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "port.md").read_text()
# a block: a paragraph that begins with the file's name and says what is beside it, then the file
FOUND = re.findall(r"`(port_\w+\.py)`, with ([^#]*?):\n```python\n(.*?)^```", PAGE, re.M | re.S)
BLOCKS = {name: text for name, _, text in FOUND}
BESIDE = {name: what for name, what, _ in FOUND}
# the table: {"a": [cells]}, each cell the names in it
TABLE = {m[1]: [re.findall(r"`([^`]+)`", cell) for cell in m[2].split("|")]
         for m in re.finditer(r"^\| \((\w)\)[^|]*\|(.*)\|$", PAGE, re.M)}  # fmt: skip
SCRIPTS = ["vmpo", "awm", "grpo", "tempflow_rsm", "first_order_rsm"]
MODELS = ["sd15", "sd35"]
ENV = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}
ENV.pop("PYTHONPATH", None)
# Runs scripts one after the other, each as if alone: the installed packages are imported once, ours for each folder.
DRIVER = """
import contextlib, json, os, pathlib, runpy, sys, traceback
root, jobs = json.load(sys.stdin)
for folder, *argv in jobs:
    os.chdir(folder)
    sys.argv, path = argv, list(sys.path)
    sys.path[0] = folder
    with open("out.txt", "a") as out, contextlib.redirect_stdout(out):
        try:
            runpy.run_path(argv[0], run_name="__main__")
        except BaseException:
            pathlib.Path("error.txt").write_text(traceback.format_exc())
    sys.path[:] = path
    for name, module in list(sys.modules.items()):
        place = getattr(module, "__file__", None) or next(iter(getattr(module, "__path__", [])), "")
        if place.startswith(folder + os.sep):
            del sys.modules[name]
        elif place.startswith(root + os.sep) and "site-packages" not in place:
            pathlib.Path("error.txt").write_text(f"{name} came from the repository: {place}")
"""


def run_all(jobs) -> None:
    """jobs: [(folder, script, argument, ...)]; leaves out.txt and, where it fails, error.txt in each folder."""
    told = json.dumps([str(ROOT), [[str(part) for part in job] for job in jobs]])
    command = [sys.executable, "-c", DRIVER]
    done = subprocess.run(command, input=told, cwd=jobs[0][0], env=ENV, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]


def printed(folder) -> str:
    error = folder / "error.txt"
    assert not error.exists(), error.read_text()[-3000:]
    return (folder / "out.txt").read_text()


def copy(names, folder) -> Path:
    """Files, folders and patterns of the repository to the same place in `folder`."""
    for name in names:
        found = sorted(ROOT.glob(name.rstrip("/")))
        assert found, name
        for source in found:
            target = folder / source.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            (shutil.copytree if source.is_dir() else shutil.copy)(source, target)
    return folder


def set_up(name, folder) -> Path:
    """A block of the page in an empty folder with what its paragraph names."""
    files, _, functions = BESIDE[name].partition(" and, in ")
    copy([n for n in re.findall(r"`([^`]+)`", files)], folder)
    if functions:
        target, top, *names, script = re.findall(r"`([^`]+)`", functions)
        source = (ROOT / script).read_text()
        parts = {node.name: ast.get_source_segment(source, node) for node in functions_of(source)}
        (folder / target).write_text("\n\n\n".join([top, *(parts[n] for n in names)]) + "\n")
    (folder / name).write_text(BLOCKS[name])
    return folder


def functions_of(source: str) -> list[ast.FunctionDef]:
    return [node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)]


def progress(text: str) -> list[tuple[float, float, float]]:
    """Each epoch's reward, and its first and last log ratio to the rollout's policy."""
    lines = re.findall(r"epoch \d+ reward (\S+) log ratio (\S+) to (\S+)", text)
    return [tuple(map(float, line)) for line in lines]


# ---- the page -------------------------------------------------------------------------------------------------------
def test_the_blocks_are_short_and_clean(tmp_path):
    assert list(BLOCKS) == ["port_vmpo.py", "port_reload.py", "port_awm.py", "port_reward.py"] == list(BESIDE)
    for name, text in BLOCKS.items():
        lines = [line for line in text.splitlines() if line.strip()]
        assert len(lines) <= 50, name
        (tmp_path / name).write_text(text)
    assert max(map(len, PAGE.splitlines())) <= 119
    select = ["--isolated", "--select", "E,F,W,B,UP", "--line-length", "119", "--ignore", "B905"]
    done = subprocess.run([sys.executable, "-m", "ruff", "check", *select, tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_functions_in_the_first_block_are_those_of_vmpo():
    def bodies(source):
        found = {}
        for node in functions_of(source):
            statements = node.body[1:] if ast.get_docstring(node) else node.body
            found[node.name] = [a.arg for a in node.args.args], [ast.dump(s) for s in statements]
        return found

    ours, theirs = bodies((ROOT / "vmpo.py").read_text()), bodies(BLOCKS["port_vmpo.py"])
    named = ["diff_potential", "log_weights", "vmpo_loss"]
    assert [theirs[name] for name in named] == [ours[name] for name in named]
    listed = re.search(r"^Port:.*?(?=;)", (ROOT / "vmpo.py").read_text(), re.M | re.S)[0]
    assert re.findall(r"(\w+)\(\)", listed) == named


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_method_stands_on_tensors_and_common_alone(script):
    source = (ROOT / f"{script}.py").read_text()
    section = re.search(r"^# ---- method.*?(?=^def main)", source, re.M | re.S)[0]
    imported = {"nn": "torch"}
    for node in ast.parse(source).body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            for alias in node.names:
                imported[alias.asname or alias.name] = getattr(node, "module", None) or alias.name
    table = symtable.symtable(section, script, "exec")
    own = {s.get_name() for s in table.get_symbols() if s.is_assigned() or s.is_namespace()}
    tables, used = [table], set()
    while tables:
        inner = tables.pop()
        tables += inner.get_children()
        used |= {s.get_name() for s in inner.get_symbols() if s.is_global() or inner is table}
        assert not {"args", "policy", "run"} & {s.get_name() for s in inner.get_symbols() if s.is_parameter()}
    for name in used - own - set(dir(builtins)):
        module = imported.get(name, f"{script}.py")
        top = module.split(".")[0]
        assert module != f"{script}.py" and (top in ("torch", "common") or top in sys.stdlib_module_names), name


# ---- (a) a trainer elsewhere ----------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def trainers(tmp_path_factory):
    """{script: a folder in which it ran an epoch of the embedded task}."""
    flags = "--preset tiny --num-prompts 2 --epochs 1 --eval-images 2 --sample-every 0 --runs runs --name run"
    sizes = dict.fromkeys(SCRIPTS, "--steps 3 --group-size 2")
    sizes |= {"tempflow_rsm": "--steps 4 --profile 3,2,2", "first_order_rsm": "--steps 3 --group-size 1"}
    files, embedded = TABLE["a"]
    folders, jobs = {}, []
    for name in SCRIPTS:
        names = [f"{name}.py" if n == "SCRIPT.py" else n for n in files] + embedded
        folders[name] = copy(names, tmp_path_factory.mktemp(name))
        jobs.append((folders[name], f"{name}.py", *flags.split(), *sizes[name].split()))
    run_all(jobs)
    return folders


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_trainer_runs_elsewhere(trainers, script):
    folder = trainers[script]
    assert "load_lora_weights" in printed(folder)
    rows = list(csv.DictReader((folder / "runs" / "run" / "metrics.csv").open(newline="")))
    assert [row["epoch"] for row in rows] == ["0", "1"] and float(rows[1]["grad/norm"]) > 0
    weights = load_file(folder / "runs" / "run" / "checkpoints" / "last" / "pytorch_lora_weights.safetensors")
    assert max(w.abs().max() for name, w in weights.items() if "lora_B" in name) > 0


# ---- (b) a method: ports 1 and 2 ------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def vmpo_runs(tmp_path_factory):
    """{model: (folder of port_vmpo.py, folder of port_reload.py)}."""
    runs, jobs = {}, []
    for model in MODELS:
        runs[model] = [tmp_path_factory.mktemp(f"{name}_{model}") for name in ("vmpo", "reload")]
        train, plain = set_up("port_vmpo.py", runs[model][0]), runs[model][1]
        (plain / "port_reload.py").write_text(BLOCKS["port_reload.py"])
        weights = ROOT / "tiny" / model
        jobs += [(train, "port_vmpo.py", weights, "lora"), (plain, "port_reload.py", weights, train / "lora")]
    run_all(jobs)
    return runs


def test_a_method_needs_common_alone():
    assert TABLE["b"] == [["common.py"], []] and BESIDE["port_vmpo.py"] == "`common.py` beside it"


@pytest.mark.parametrize("model", MODELS)
def test_port_1_doubles_its_reward(vmpo_runs, model):
    epochs = progress(printed(vmpo_runs[model][0]))
    assert len(epochs) == 6
    assert all(first < 1e-5 < last for _, first, last in epochs)  # theta is theta_old at the first micro-batch only
    assert epochs[-1][0] > 2 * epochs[0][0]


@pytest.mark.parametrize("model", MODELS)
def test_port_1_exports_a_lora_that_plain_diffusers_draws_with(vmpo_runs, model):
    before, after = map(float, re.search(r"red (\S+) to (\S+)", printed(vmpo_runs[model][1])).groups())
    assert after > 1.5 * before > 0


def launch(folder, *launcher):
    command = [sys.executable, "-m", *launcher, "port_awm.py", str(ROOT / "tiny" / "sd35"), "lora"]
    env = ENV | {"ACCELERATE_USE_CPU": "1"}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return progress(done.stdout)


@pytest.fixture(scope="module")
def awm_run(tmp_path_factory):
    folder = set_up("port_awm.py", tmp_path_factory.mktemp("awm"))
    return folder, launch(folder, "accelerate.commands.launch", "--cpu", "--num_processes", "1")


def test_port_2_doubles_its_reward(awm_run):
    folder, epochs = awm_run
    assert len(epochs) == 6
    assert all(first < 1e-6 < 1e-4 < last for _, first, last in epochs)  # the first ratio is 1, the last is not
    assert epochs[-1][0] > 2 * epochs[0][0]
    weights = load_file(folder / "lora" / "pytorch_lora_weights.safetensors")
    assert max(w.abs().max() for name, w in weights.items() if "lora_B" in name) > 1e-3


def test_port_2_on_two_processes_is_port_2_on_one(awm_run, tmp_path):
    set_up("port_awm.py", tmp_path)
    text = BLOCKS["port_awm.py"].replace("8, 5, 1.0, 6, 2, 2,", "8, 5, 1.0, 2, 2, 2,")  # two epochs
    assert text != BLOCKS["port_awm.py"]
    # accelerate launch --cpu starts one process whatever it is told
    text += 'assert accelerator.num_processes == 2, "one process"\n'
    (tmp_path / "port_awm.py").write_text(text)
    two = launch(tmp_path, "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    assert [epoch[0] for epoch in two] == pytest.approx([epoch[0] for epoch in awm_run[1][:2]], abs=3e-4)
    assert two[1][1] < 1e-6


# ---- (c) a reward: port 3 and a judge -------------------------------------------------------------------------------
CAPTIONS = ["a red circle", "a blue square", "two green circles", "a circle and a square"]
DRAWN = ["a red circle", "a yellow square", "two green circles", "a circle and a square"]
PORT_3_CALLER = """
import json
import numpy as np, torch
from PIL import Image
import port_reward
prompts, metadata = tuple(json.load(open("prompts.json"))), ({}, {}, {}, {})
pictures = [Image.open(f"{n}.png") for n in range(4)]
arrays = np.stack([np.asarray(p, np.float32) / 255 for p in pictures])
images = torch.from_numpy(arrays).permute(0, 3, 1, 2)
found = {"grpo": port_reward.grpo_reward(prompts=list(prompts), completions=pictures, seed=[0, 1, 2, 3])}
for name, given in (("pil", pictures), ("array", arrays), ("tensor", images), ("half", images.half())):
    score, parts = port_reward.ddpo_reward(given, prompts, metadata)
    found[name] = {"avg": score.tolist()} | {k: v.tolist() for k, v in parts.items()}
score, _ = port_reward.flow_grpo_reward(images, prompts, metadata, only_strict=True)
found["flow_grpo"] = {k: v.tolist() for k, v in score.items()}
x = (0.1 + 0.8 * images).requires_grad_()
with torch.autocast("cpu", torch.bfloat16):  # as AlignProp calls it
    score = port_reward.alignprop_reward(x, prompts, metadata)[0]
(10 - score.mean()).backward()
found["smooth"], found["gradient"] = score.tolist(), x.grad.flatten(1).norm(dim=1).tolist()
stepped = (x - 0.1 * x.grad / x.grad.flatten(1).norm(dim=1)[:, None, None, None]).detach().clamp(0, 1)
found["ascended"] = port_reward.alignprop_reward(stepped, prompts, metadata)[0].tolist()
try:
    port_reward.ddpo_reward(2 * images - 1, prompts, metadata)
except port_reward.rewards.RewardError as problem:
    found["refused"] = str(problem)
print(json.dumps(found))
"""
JUDGE_CALLER = """
import json, sys
import numpy as np, torch
from PIL import Image
import rewards
images = torch.stack([torch.from_numpy(np.asarray(Image.open(f"{n}.png"))) for n in range(4)])
images = images.permute(0, 3, 1, 2) / 255
try:
    reward = rewards.load(sys.argv[1], paths={"http": sys.argv[2]})
    total, parts = reward(images, json.load(open("prompts.json")))
    print(json.dumps([total.tolist(), {k: v.tolist() for k, v in parts.items()}]))
except rewards.UsageError as problem:
    print(json.dumps(str(problem)))
"""


class RedServer(BaseHTTPRequestHandler):
    """Scores an image by the mean of its red channel."""

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        pictures = [Image.open(io.BytesIO(base64.b64decode(png))) for png in asked["images"]]
        answer = json.dumps({"scores": [float(np.asarray(p)[..., 0].mean()) / 255 for p in pictures]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    """The four captions' pictures as a tensor, and folders in which rewards scored them: port, judge, no judge."""
    rng = np.random.default_rng(0)
    pictures = [shapes.render(caption, rng) for caption in DRAWN]
    server = ThreadingHTTPServer(("127.0.0.1", 0), RedServer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    folders = [tmp_path_factory.mktemp(name) for name in ("reward", "judge", "bare")]
    set_up("port_reward.py", folders[0])
    copy(["tiny/clip"], folders[0])
    needed, embedded = TABLE["c"]
    copy([*needed, *embedded, "judges/served.py"], folders[1])
    copy(needed, folders[2])
    for folder in folders:
        (folder / "prompts.json").write_text(json.dumps(CAPTIONS))
        (folder / "caller.py").write_text(PORT_3_CALLER if folder is folders[0] else JUDGE_CALLER)
        for n, picture in enumerate(pictures):
            Image.fromarray(picture).save(folder / f"{n}.png")
    spec = "shapes=1,http=0.5"
    run_all([(folders[0], "caller.py"), (folders[1], "caller.py", spec, url), (folders[2], "caller.py", "http", url)])
    server.shutdown()
    images = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2) / 255
    return images, *(json.loads(printed(folder)) for folder in folders)


def test_port_3_gives_the_numbers_of_the_repository(scored):
    images, found, _, _ = scored
    paths = {"clipscore": str(ROOT / "tiny" / "clip")}
    total, parts = rewards.load("clipscore=1,jpeg=0.1", paths=paths)(images, CAPTIONS)
    wanted = {"avg": total.tolist()} | {k: v.tolist() for k, v in parts.items()}
    for way in ("pil", "array", "tensor", "flow_grpo"):
        for key, values in wanted.items():
            assert found[way][key] == pytest.approx(values, abs=1e-6), (way, key)
    assert found["grpo"] == pytest.approx(wanted["avg"], abs=1e-6)
    assert found["half"]["avg"] == pytest.approx(wanted["avg"], abs=1e-6)  # half holds 8-bit pixels to rounding
    assert len({round(v, 3) for v in wanted["avg"]}) == 4  # four different scores
    x = (0.1 + 0.8 * images).requires_grad_()
    smooth = rewards.load("clipscore", paths=paths)(x, CAPTIONS, grad=True)[0]
    (10 - smooth.mean()).backward()
    assert found["smooth"] == pytest.approx(smooth.tolist(), abs=1e-6)
    assert found["gradient"] == pytest.approx(x.grad.flatten(1).norm(dim=1).tolist(), rel=1e-3)
    assert all(after > before for before, after in zip(found["smooth"], found["ascended"]))
    assert "[0, 1]" in found["refused"]


def test_a_reward_with_a_judge_needs_that_judge(scored):
    images, _, (total, parts), problem = scored
    right, red = shapes.score(images.numpy(), CAPTIONS)[0].tolist(), images[:, 0].mean((1, 2)).tolist()
    assert parts["shapes"] == pytest.approx(right) and min(right) < max(right) == 1
    assert parts["http"] == pytest.approx(red, abs=1e-6)
    assert total == pytest.approx([a + b / 2 for a, b in zip(right, red)], abs=1e-6)
    assert "judges" in problem and "\n" not in problem
