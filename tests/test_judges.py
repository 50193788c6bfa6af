"""judges/vlm.py and judges/questions.py against a served model: a process that speaks OpenAI's protocol and judges a
picture by its brightness, so that every score is known; its failures, too."""

import json
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
import torch

import rewards
from judges import questions, served, vlm
from rewards import NoScore, RewardError, UsageError, check, load

SERVER = """
import base64, http.server, io, json, math, sys
from PIL import Image
seen = []

def brightness(url):
    return Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))).resize((1, 1)).getpixel((0, 0))[0] / 255

def tokens(**mass):
    return [{"token": t, "logprob": math.log(p)} for t, p in sorted(mass.items(), key=lambda x: -x[1]) if p > 0]

def judge(body):
    *pictures, question = body["messages"][0]["content"]
    asked, again = question["text"], body["temperature"] > 0
    b = [brightness(p["image_url"]["url"]) for p in pictures]
    text, tops = "", None
    if "error" in asked:
        return {"error": "out of memory"}
    if "blind" in asked or "shy" in asked and not again:
        text, tops = "I cannot say.", tokens(I=0.9, Sorry=0.1)
    elif "first or second" in asked:
        tops = tokens(First=b[0] / sum(b), second=b[1] / sum(b))
    elif "How many" in asked:
        tops = tokens(**{"4": 0.5 * b[0], " four": 0.25 * b[0], "Three": 1 - 0.75 * b[0]})
    elif body.get("logprobs"):
        tops = tokens(**{"Yes": 0.6 * b[0], " yes": 0.2 * b[0], "No": 0.8 * (1 - b[0]), "Maybe": 0.2})
    elif "Alignment" in asked:
        marks = zip(("Alignment", "Coherence", "Style"), (1 + 4 * b[0], 3, 5 - 4 * b[0]))
        text = "\\n".join(f"{name} Score (1-5): {mark:.4f}" for name, mark in marks)
    elif "Final Score:" in asked:
        text = f"Score: 9 at first sight. **Final Score:** {1 + 4 * b[0]:.4f}"
    else:
        text = f"Score: 3? No. Score: {10 * b[0]:.4f}"
    logprobs = {"content": [{"token": "?", "logprob": 0.0, "top_logprobs": tops}]} if tops else None
    return {"choices": [{"message": {"role": "assistant", "content": text}, "logprobs": logprobs}]}

class Handler(http.server.BaseHTTPRequestHandler):
    def reply(self, content):
        content = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def do_GET(self):
        self.reply({"data": [{"id": "judge-7b"}]} if self.path == "/v1/models" else seen)

    def do_POST(self):
        seen.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.reply(judge(seen[-1]))

    def log_message(self, *args):
        pass

server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
print(server.server_port, flush=True)
server.serve_forever()
"""
B = torch.tensor([51, 153, 255, 102]) / 255  # brightness of the pictures
X = B.view(4, 1, 1, 1).expand(4, 3, 16, 24)
P = ["a red circle", "two squares", "a sign", "a dog"]
ASKED = {"vqa_list": [["How many dogs are there?", "four"], ["Are the dogs white?", "Yes"]]}


@pytest.fixture(scope="module")
def url():
    process = subprocess.Popen([sys.executable, "-c", SERVER], stdout=subprocess.PIPE, text=True)
    yield f"http://127.0.0.1:{process.stdout.readline().strip()}/v1"
    process.kill(), process.wait(), process.stdout.close()


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    rewards._load_term.cache_clear()


def seen(url):
    return json.load(urllib.request.urlopen(url.removesuffix("/v1") + "/seen"))


def score(name, url, prompts=P, metadata=None, settings="", **options):
    return load(name, paths={name: url + settings}, **options)(X, prompts, metadata)[0]


# ---- scores ---------------------------------------------------------------------------------------------------------
def test_marks_in_words(url):
    before = len(seen(url))
    assert torch.allclose(score("unifiedreward", url), 1 + 4 * B, atol=1e-4)
    assert torch.allclose(
        score("unifiedreward2", url), torch.full((4,), 3.0), atol=1e-4
    )  # (1 + 4 b + 3 + 5 - 4 b) / 3
    assert torch.allclose(score("unifiedreward2", url, settings="#axes=alignment,coherence"), 2 + 2 * B, atol=1e-4)
    assert torch.allclose(score("rubric", url), B, atol=1e-5)  # the last mark of the answer counts
    requests = seen(url)[before:]
    assert len(requests) == 16 and {r["model"] for r in requests} == {"judge-7b"}
    assert {r["temperature"] for r in requests} == {0} and all("seed" not in r for r in requests)
    texts = [r["messages"][0]["content"][-1]["text"] for r in requests]
    assert all(sum(p in text for text in texts) == 4 for p in P)


def test_a_question_and_a_range_of_ones_own(url, tmp_path):
    file = tmp_path / "question.txt"
    file.write_text("{prompt}: from -5 to 20, Score:")
    found = score("rubric", url, settings=f"#question={file}&low=-5&high=20")
    assert torch.allclose(found, (10 * B + 5) / 25, atol=1e-5)
    assert seen(url)[-1]["messages"][0]["content"][-1]["text"] in [f"{p}: from -5 to 20, Score:" for p in P]


def test_vqascore_is_the_share_of_yes(url):
    yes, no = 0.8 * B, 0.8 * (1 - B)
    assert torch.allclose(score("vqascore", url), yes / (yes + no), atol=1e-6)
    request = seen(url)[-1]
    assert request["logprobs"] is True and request["top_logprobs"] == 20 and request["max_tokens"] == 1


def test_soft_tifa_is_the_mean_probability_of_the_right_answers(url):
    """Both spellings of a number count; arithmetic mean per atom, geometric mean per prompt (GenEval 2)."""
    answers = torch.stack([0.75 * B, 0.8 * B], 1)
    assert torch.allclose(score("soft-tifa", url, metadata=[ASKED] * 4), answers.mean(1), atol=1e-6)
    assert torch.allclose(score("soft-tifa-gm", url, metadata=[ASKED] * 4), answers.log().mean(1).exp(), atol=1e-6)
    different = [ASKED, {"vqa_list": [["Is it?", "no"]]}, ASKED, {"vqa_list": [["Is it?", "yes"]] * 3}]
    found = score("soft-tifa", url, metadata=different)
    assert torch.allclose(found, torch.tensor([0.775 * B[0], 0.8 * (1 - B[1]), 0.775 * B[2], 0.8 * B[3]]), atol=1e-6)


def test_dpg_counts_a_child_as_no_where_its_parent_is(url):
    asked = {"vqa_list": [["Is it?", "yes"]] * 3, "dependency": [[0], [1], [2]]}
    assert score("dpg", url, metadata=[asked] * 4).tolist() == [0, 1, 1, 0]  # brightness above or below 1/2
    values = [0.9, 0.1, 0.9, 0.9]
    for parents, expected in ((None, 0.75), ([[0]] * 4, 0.75), ([[0], [0], [2], [0]], 0.5),
                              ([[0], [1], [2], [3]], 0.25),
                              ([[0], [0], [0], [1, 2]], 0.5), ([[2], [0], [0], [0]], 0.5)):  # fmt: skip
        assert questions.combine("dpg", values, parents) == expected, parents


def test_winrate_sees_the_group_and_no_other(url):
    """P(i over j) = b_i / (b_i + b_j), the same both ways round; the mean over the others of the prompt."""
    before = len(seen(url))
    reward = load("winrate", paths=url, group_size=2)
    total, _ = reward(X, [P[0]] * 2 + [P[1]] * 2, chunk=3)  # the chunk is not the group
    expected = [B[0] / (B[0] + B[1]), B[1] / (B[0] + B[1]), B[2] / (B[2] + B[3]), B[3] / (B[2] + B[3])]
    assert torch.allclose(total, torch.stack(expected), atol=1e-6)
    assert len(seen(url)) - before == 4 and reward.grouped and not load("vqascore", paths=url).grouped
    total, _ = load("winrate", paths=url, group_size=4)(X, [P[0]] * 4)
    expected = [sum(B[i] / (B[i] + B[j]) for j in range(4) if j != i) / 3 for i in range(4)]
    assert torch.allclose(total, torch.stack(expected), atol=1e-6)
    for size in (0, 1, 3):
        with pytest.raises(ValueError, match="'winrate' compares the images of a prompt"):
            load("winrate", paths=url, group_size=size)(X, P)


def test_a_grouped_function_of_ones_own_is_called_once_a_prompt(tmp_path, monkeypatch):
    code = "def best(images, prompts, metadata):\n    assert len(set(prompts)) == 1\n" \
           "    b = images.mean((1, 2, 3))\n    return (b == b.max()).float()\nbest.grouped = True\n"  # fmt: skip
    (tmp_path / "my_group.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert rewards.is_grouped("jpeg,my_group:best=2") and not rewards.is_grouped("jpeg")
    total, parts = load("my_group:best,jpeg=0", group_size=2)(X, ["a", "a", "b", "b"], chunk=1)
    assert parts["my_group:best"].tolist() == [0, 1, 1, 0] == total.tolist()


# ---- what goes wrong ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["unifiedreward", "unifiedreward2", "rubric", "vqascore"])
def test_an_answer_without_a_score_is_asked_for_again_and_warmer(name, url):
    before, shy = len(seen(url)), [P[0], "a shy dog", *P[2:]]
    found = score(name, url, prompts=shy)
    assert torch.allclose(found, score(name, url), atol=1e-6)
    requests = seen(url)[before:]
    again = [r for r in requests if r["temperature"]]
    assert len(requests) == 4 + 1 + 4 and len(again) == 1 and again[0]["seed"] == 1 and again[0]["temperature"] == 0.4


@pytest.mark.parametrize("name, words", [("rubric", "no 'Score:' from 0 to 10: 'I cannot say.'"),
                                         ("unifiedreward", "no 'Final Score:'"),
                                         ("vqascore", "neither 'yes' nor 'no'")])  # fmt: skip
def test_a_judge_that_never_says_stops_the_run_or_leaves_a_gap(name, words, url):
    before, blind = len(seen(url)), [P[0], P[1], "blind", P[3]]
    with pytest.raises(
        RewardError, match=f"'{name}' has no score: prompt 'blind'.*{words}.*.sample 2: prompt 'blind'"
    ):
        score(name, url, prompts=blind, settings="#retries=3")
    assert len(seen(url)) - before == 4 + 3
    found = score(name, url, prompts=blind, settings="#retries=0", skip_failed=True)
    assert len(seen(url)) - before == 4 + 3 + 4
    assert found.isnan().tolist() == [False, False, True, False]
    assert torch.allclose(found[[0, 1, 3]], score(name, url)[[0, 1, 3]], atol=1e-6)


def test_a_pair_without_a_winner_is_no_score_of_its_group(url):
    reward = load("winrate", paths=url, group_size=2, skip_failed=True)
    total, _ = reward(X, ["blind"] * 2 + [P[1]] * 2)
    assert total.isnan().tolist() == [True, True, False, False]


def test_a_server_that_fails_is_not_skipped(url):
    for name in ("rubric", "vqascore"):
        with pytest.raises(RewardError, match="no chat completion: .*out of memory"):
            score(name, url, prompts=["error", *P[1:]], skip_failed=True)
    with pytest.raises(ValueError, match="has no logprobs.*--max-logprobs 20"):
        questions.mass({"choices": [{"message": {"content": "yes"}, "logprobs": None}]}, "yes")


@pytest.mark.parametrize(
    "answer", [{}, [], {"choices": []}, {"choices": [{}]}, {"choices": [{"message": None}]}, None]
)
def test_what_is_no_chat_completion(answer):
    with pytest.raises(ValueError, match="no chat completion"):
        vlm.text_of(answer)


@pytest.mark.parametrize("text, found", [("Score: 4", 4), ("**Score:** 4.5/10", 4.5), ("Score: 3 ... Score:\n7", 7),
                                         ("Score: 11", None), ("Score: -1", None), ("Score: good", None), ("", None),
                                         ("Score: 3, then Score: 12", None)])  # fmt: skip
def test_the_mark_in_an_answer(text, found):
    answer = {"choices": [{"message": {"content": text}}]}
    if found is None:
        with pytest.raises(vlm.Unanswered, match="no 'Score:' from 0 to 10"):
            vlm.mark(answer, "Score:", 0, 10)
    else:
        assert vlm.mark(answer, "Score:", 0, 10) == found


def test_no_score_names_the_first():
    with pytest.raises(NoScore, match="prompt 'b': why") as problem:
        vlm.scores([1.0, vlm.Unanswered("why"), vlm.Unanswered("2")], ["a", "b", "c"])
    assert str(problem.value.scores) == "[1.0, nan, nan]"


# ---- start-up -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("change, words", [
    ({"vqa_list": None}, "no questions .'vqa_list'."), ({"vqa_list": []}, "no questions"),
    ({"vqa_list": [["How many?"]]}, "vqa_list.0. is ..How many.*expected .question, answer."),
    ({"vqa_list": [["a", 4]]}, "vqa_list.0."), ({"dependency": [[0]]}, "dependency is"),
    ({"dependency": [[0], [3]]}, "dependency is"), ({"dependency": [0, 1]}, "dependency is"),
])  # fmt: skip
def test_questions_are_checked_before_anything_is_asked(change, words, url):
    questions.check_questions(ASKED)
    with pytest.raises(UsageError, match=f"cannot score line 2 of the prompts: .*{words}"):
        check("soft-tifa", {"soft-tifa": url}, P[:2], [ASKED, ASKED | change])


def test_settings_of_a_judge():
    for name, item, words in (("rubric", "low=11", "low=11.0 is not below high=10.0"),
                              ("rubric", "high=nan", "high=nan"),
                              ("rubric", "axes=style", "is no setting"), ("deqa", "question=x", "is no setting"),
                              ("unifiedreward2", "axes=style,beauty", "known are alignment,coherence,style"),
                              ("rubric", "retries=-1", "is no setting"),
                              ("vqascore", "question=absent", "question=")):  # fmt: skip
        with pytest.raises(UsageError, match=words):
            served.read_url(name, f"http://h:1/v1#{item}")
    assert served.read_url("rubric", "http://h:1/v1#low=1&high=5&retries=0")[1]["retries"] == 0


def test_questions_of_a_file(tmp_path):
    file = tmp_path / "question.txt"
    file.write_text("<image> How good is {prompt}? Final Score: 1 to 5")
    _, settings = served.read_url("unifiedreward", f"http://h:1/v1#timeout=3&question={file}")
    assert settings["question"] == file.read_text() and settings["timeout"] == 3
    for text in ("no slot. Final Score: x", "{prompt} without the words", "{prompt} {prompt} Final Score: x"):
        file.write_text(text)
        with pytest.raises(UsageError, match="question="):
            served.read_url("unifiedreward", f"http://h:1/v1#question={file}")


DPG = """item_id,text,keywords,proposition_id,dependency,category_broad,category_detailed,tuple,\
question_natural_language
10,"A red dog,
on grass.",,1,0,entity,whole,entity - whole (dog),Is there a dog?
10,"A red dog,
on grass.",,2,1,attribute,color,"attribute - color (dog, red)",Is the dog red?
10,"A red dog,
on grass.",,4,"1,2",relation,spatial,"relation - spatial (dog, grass, on)",Is the dog on grass?
7,A cup.,,1,0,entity,whole,entity - whole (cup),Is there a cup?
"""


def test_dpg_benchs_file_becomes_a_prompt_list(tmp_path, url):
    (tmp_path / "dpg.csv").write_text(DPG)
    command = [sys.executable, "-m", "judges.questions", str(tmp_path / "dpg.csv"), str(tmp_path / "dpg.jsonl")]
    subprocess.run(command, cwd=Path(rewards.__file__).parent, check=True)
    import harness

    prompts = harness.load_prompts(str(tmp_path / "dpg.jsonl"))
    assert [p.text for p in prompts] == ["A red dog, on grass.", "A cup."]
    assert prompts[0].metadata["dependency"] == [[0], [1], [1, 2]]
    assert (
        prompts[0].metadata["vqa_list"][2] == ["Is the dog on grass?", "yes"] and prompts[1].metadata["item_id"] == "7"
    )
    check("dpg", {"dpg": url}, [p.text for p in prompts], [p.metadata for p in prompts])
    (tmp_path / "dpg.csv").write_text("a,b\n1,2\n")
    with pytest.raises(UsageError, match="no column dependency, item_id"):
        questions.read_dpg(str(tmp_path / "dpg.csv"))


# ---- a run --------------------------------------------------------------------------------------------------------
def test_a_run_whose_judge_says_nothing_of_one_prompt(url, tmp_path, capsys):
    """Asked again as often as the flag says, then the run stops, or goes on without that prompt and counts it."""
    import csv

    import grpo

    (tmp_path / "prompts.txt").write_text("a red circle\na blind cat\n")
    argv = "--preset tiny --num-prompts 2 --group-size 2 --steps 2 --epochs 1 --eval-images 0 --sample-every 0".split()
    argv += ["--prompts", str(tmp_path / "prompts.txt"), "--runs", str(tmp_path), "--reward", "rubric",
             "--reward-path", f"rubric={url}", "--reward-retries", "1"]  # fmt: skip
    before = len(seen(url))
    with pytest.raises(SystemExit, match="'rubric' has no score: prompt 'a blind cat'"):
        grpo.main(grpo.parse_args([*argv, "--name", "stops"]))
    assert len(seen(url)) - before == 4 + 2  # both images of the prompt once more
    grpo.main(grpo.parse_args([*argv, "--name", "goes_on", "--skip-failed"]))
    with (tmp_path / "goes_on" / "metrics.csv").open(newline="") as f:
        (row,) = csv.DictReader(f)
    assert row["reward/skipped"] == "1" and 0 < float(row["reward/mean"]) < 1 and float(row["grad/norm"]) > 0
