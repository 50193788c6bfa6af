"""Wrong command lines and files, of every script: one sentence, exit code 2, no folder, no model loaded."""

import json
import shutil
import sys

import pytest

import harness
from torture import report
from torture.trials import SCRIPTS, flags_of

TEXT = {"init_lora": ["nowhere", ".", "x" * 300, "\x00"],
        "lora_targets": ["", ",", "nowhere"], "device": ["cuda:9", "gpu", "cuda:x"], "name": ["../x", "..", "x" * 300],
        "kernel": ["none"], "dtype": ["int8"], "preset": ["none", "Tiny"], "reward": ["", "shaps", "a:b:c", "a=nan",
        "shapes=1,shapes=2", "shapes=inf", "no_module:f", "os:nothing", "shapes,"], "eval_rewards": ["shaps", "a:"],
        "model": ["nowhere", "no/where", "a/b/c", "", "\x00"], "eval_kernel": ["flow_sde"]}  # fmt: skip
FILES = {  # name: bytes of a prompt file
    "empty.txt": b"", "blank.txt": b"\n \n\n", "binary.txt": bytes(range(256)), "wide.txt": "ein".encode("utf-16"),
    "list.jsonl": b"[1, 2]\n", "number.jsonl": b"3\n", "no.jsonl": b'{"text": "a"}\n', "torn.jsonl": b'{"prompt": "a',
    "null.jsonl": b'{"prompt": null}\n', "surrogate.jsonl": b'{"prompt": "a \\ud800 b"}\n', "deep.jsonl": b"[" * 5000,
}  # fmt: skip
MODELS = {  # content of model_index.json
    "empty": "", "list": "[]", "number": "3", "no class": "{}", "another": '{"_class_name": "PixArtAlphaPipeline"}',
    "custom": '{"_class_name": ["mine", "MyPipeline"]}', "null": '{"_class_name": null}', "binary": "\x00\x01",
}  # fmt: skip
MODULES = {
    "broken": "def f(:\n", "raises": "raise RuntimeError('at import')\n", "exits": "import sys\nsys.exit(3)\n",
    "nothing": "", "no_function": "f = 3\n",
}  # fmt: skip


def wrong_numbers(script, monkeypatch):
    """(flag, value) for what the table of limits refuses, of every number of the script."""
    found = {}
    monkeypatch.setattr(harness, "parse", lambda parser, *a: found.setdefault("parser", parser))
    script.parse_args([])
    parser = found["parser"]
    for action in parser._actions:
        if action.type not in (int, float):
            continue
        limit, flag = parser.limits.get(action.dest, ""), action.option_strings[0]
        values = ["abc", "", "1e", "0x10"] + ([] if "inf" in limit else ["inf"]) + (["nan", "-inf"])
        values += ["-1"] * (limit.startswith(">") or "[0" in limit or "(0" in limit) + ["0"] * (
            limit in (">= 1", "> 0")
        )
        values += ["1.5"] * (action.type is int)
        count = action.nargs if isinstance(action.nargs, int) else 1
        yield from ([f"{flag}={value}"] if count == 1 else [flag, *[value] * count] for value in values)


def texts(tmp_path):
    for dest, values in TEXT.items():
        yield from ([f"--{dest.replace('_', '-')}={value}"] for value in values)
    for name, content in FILES.items():
        (tmp_path / name).write_bytes(content)
        yield from ([f"{flag}={tmp_path / name}"] for flag in ("--prompts", "--eval-prompts"))
    for name, content in MODELS.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "model_index.json").write_text(content)
        yield ["--model", str(tmp_path / name)]
    for name, content in MODULES.items():
        (tmp_path / f"{name}.py").write_text(content)
        yield ["--reward", f"{name}:f"]
    for flag in ("--resume", "--prompts", "--eval-prompts", "--runs"):
        yield [flag, str(tmp_path / "binary.txt" / "x")]
    for content in ("", "{}", "[]", json.dumps({"method": "ddpo", "args": {}}), json.dumps({"method": 3, "args": 4})):
        folder = tmp_path / f"run{len(content)}"
        folder.mkdir(exist_ok=True)
        (folder / "args.json").write_text(content)
        yield ["--resume", str(folder)]
    yield from (["--nothing"], ["--lr"], ["stray"], ["--resume-or-start", "a", "--name", "b"])


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_wrong_input_is_one_sentence_and_leaves_no_folder(name, tmp_path, monkeypatch, capsys):
    script, runs = SCRIPTS[name], tmp_path / "runs"
    with pytest.MonkeyPatch.context() as patch:
        cases = list(wrong_numbers(script, patch))
    cases += list(texts(tmp_path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    monkeypatch.setattr(harness, "load_policy", lambda *a: pytest.fail("a model was loaded"))
    wrong = []
    for case in cases:
        given = [f for f in flags_of(script, runs) if f not in case]
        if any(part.startswith(("--resume", "--name")) for part in case):
            given = []
        try:
            script.main(script.parse_args([*given, *case]))
            code = 0
        except SystemExit as stop:
            code = stop.code
        except BaseException as problem:  # what would be a traceback
            code = repr(problem)[:200]
        said = capsys.readouterr().err.strip().splitlines()
        clean = code == 2 and said and said[-1].startswith(f"{name}.py: error: ") and len(said[-1]) < 700
        if not clean or runs.exists():
            wrong.append((case, code, said[-1:], "left a folder" if runs.exists() else ""))
            shutil.rmtree(runs, ignore_errors=True)
    report.add(f"{name}: wrong flags and files", len(cases), len(wrong))
    assert len(cases) > 300 and not wrong, "\n".join(map(str, wrong))
