"""Judges that are read, not quoted: the probabilities of a served vision-language model's first word.

vqascore: P(yes) / (P(yes) + P(no)) that the picture shows the prompt (Lin et al. 2404.01291: P(yes)).  soft-tifa,
soft-tifa-gm: mean of P(right answer) over the prompt's questions, the score of GenEval 2 (2512.16853).  dpg:
DPG-Bench's share of questions that are answered yes (2403.05135).  winrate: how often a picture is preferred to the
others of its prompt (Pref-GRPO, 2508.20751, counts wins; here their probabilities).
Questions: prompts from a .jsonl file, {"prompt": ..., "vqa_list": [[question, answer], ...], "dependency": ...}.

    python -m judges.questions dpg_bench.csv dpg_bench.jsonl      # DPG-Bench's own file as such a list
"""

import csv
import functools
import json
import math
import sys

from judges.vlm import Unanswered, connect, first_choice, message, scores
from rewards import need, pixels

ONE_TOKEN = {"max_tokens": 1, "logprobs": True, "top_logprobs": 20}  # OpenAI's and vLLM's limit
SHOWN = "Is this a picture of the following? {prompt}\nAnswer in one word, yes or no."
BETTER = (
    "Both pictures were drawn for this caption: {prompt}\nWhich of the two is better, in what it shows and in how it "
    "looks? Answer in one word, first or second."
)
NUMBERS = "zero one two three four five six seven eight nine ten".split()


# ---- answers -----------------------------------------------------------------
def mass(answer, *words: str) -> float:
    """Probability that the answer's first token is one of these words, whatever its case and space."""
    try:
        tops = first_choice(answer)["logprobs"]["content"][0]["top_logprobs"]
        pairs = [(top["token"].strip(" \n\u2581\u0120").lower(), math.exp(top["logprob"])) for top in tops]
    except (LookupError, TypeError, AttributeError, OverflowError) as e:
        advice = "start it so that it does (vLLM: --max-logprobs 20)"
        raise ValueError(f"the server's answer has no logprobs ({str(answer)[:200]!r}); {advice}") from e
    return min(1.0, sum(p for token, p in pairs if token in words))


def preference(answer, one: str, other: str) -> float:
    """P(one) / (P(one) + P(other))."""
    a, b = mass(answer, one), mass(answer, other)
    if not a + b > 0:
        raise Unanswered(f"neither {one!r} nor {other!r} is among the answer's likeliest words: {str(answer)[:200]!r}")
    return a / (a + b)


def spellings(answer: str) -> list[str]:
    """Of a right answer: "four" is also 4."""
    word = answer.strip().lower()
    return [word, str(NUMBERS.index(word))] if word in NUMBERS else [word]


# ---- questions of a prompt ---------------------------------------------------
def check_questions(metadata: dict) -> None:
    """UsageError unless it has vqa_list, and perhaps the questions on which each depends (from 1; 0: none)."""
    listed = isinstance(metadata, dict) and metadata.get("vqa_list")
    advice = "use a .jsonl prompt file like GenEval 2's geneval2_data.jsonl, or see docs/rewards.md"
    need(isinstance(listed, list) and listed, f"it has no questions ('vqa_list'); {advice}")
    for i, pair in enumerate(listed):
        right = isinstance(pair, list) and len(pair) == 2 and all(isinstance(x, str) and x.strip() for x in pair)
        need(right, f"vqa_list[{i}] is {pair!r}; expected [question, answer]")
    parents = metadata.get("dependency", [[0]] * len(listed))
    right = isinstance(parents, list) and len(parents) == len(listed)
    right = right and all(isinstance(p, list) and all(type(n) is int for n in p) for p in parents)
    right = right and all(0 <= n <= len(listed) for p in parents for n in p)
    need(right, f"dependency is {parents!r}; expected for each question a list of numbers of questions, or [0]")


def combine(name: str, values: list[float], parents: list[list[int]] | None) -> float:
    """The probabilities of a prompt's questions -> its score."""
    if name == "soft-tifa":
        return sum(values) / len(values)
    if name == "soft-tifa-gm":
        return math.exp(sum(map(math.log, values)) / len(values)) if all(values) else 0.0
    yes = [float(p > 0.5) for p in values]  # dpg; where a parent is no, so is its child, in the file's order
    for i, numbers in enumerate(parents or ()):
        if any(n and not yes[n - 1] for n in numbers):
            yes[i] = 0.0
    return sum(yes) / len(yes)


# ---- the rewards -------------------------------------------------------------
def vqascore(name, device, dtype, places):
    ask, settings = connect(name, places)
    asked, read = settings["question"] or SHOWN, functools.partial(preference, one="yes", other="no")

    def fn(images, prompts, metadata):
        pairs = zip(pixels(images), prompts)
        messages = [message(asked.replace("{prompt}", p), x) for x, p in pairs]
        return scores(ask(messages, read, **ONE_TOKEN), prompts)

    return fn


def soft_tifa(name, device, dtype, places):
    """One request for each question.  dpg compares yes with no; GenEval 2 takes the right word's probability."""
    ask, _ = connect(name, places)

    def read(answer):  # all that any question of the batch may need
        return answer

    def value(answer, right: str) -> float:
        if name == "dpg":
            return mass(answer, "yes") - mass(answer, "no") > 0
        return mass(answer, *spellings(right))

    def fn(images, prompts, metadata):
        metadata = metadata or [{}] * len(prompts)
        for prompt, extra in zip(prompts, metadata):
            try:
                check_questions(extra)
            except ValueError as e:
                raise ValueError(f"prompt {prompt!r}: {e}") from e
        asked = [(x, q) for x, extra in zip(pixels(images), metadata) for q, _ in extra["vqa_list"]]
        answers = iter(ask([message(f"{q} Answer in one word.", x) for x, q in asked], read, **ONE_TOKEN))
        values = [[value(next(answers), right) for _, right in extra["vqa_list"]] for extra in metadata]
        return [combine(name, v, extra.get("dependency")) for v, extra in zip(values, metadata)]

    return fn


def winrate(name, device, dtype, places):
    """Of K pictures of a prompt: mean over the others of P(this is preferred), each pair asked both ways round."""
    ask, settings = connect(name, places)
    asked, read = settings["question"] or BETTER, functools.partial(preference, one="first", other="second")

    def fn(images, prompts, metadata):
        pictures, K = pixels(images), len(prompts)
        pairs = [(i, j) for i in range(K) for j in range(K) if i != j]
        question = asked.replace("{prompt}", prompts[0])
        found = ask([message(question, pictures[i], pictures[j]) for i, j in pairs], read, **ONE_TOKEN)
        first = dict(zip(pairs, scores(found, [prompts[0]] * len(pairs))))
        wins = [[(first[i, j] + 1 - first[j, i]) / 2 for j in range(K) if j != i] for i in range(K)]
        return [sum(row) / len(row) for row in wins]

    return fn


# ---- DPG-Bench's file --------------------------------------------------------
def read_dpg(path: str) -> list[dict]:
    """dpg_bench.csv (a question a row) -> the objects of a .jsonl prompt list, one a prompt.

    ref-code: the authors' script drops the file's first question; here it counts.
    """
    columns, found = {"item_id", "text", "proposition_id", "dependency", "question_natural_language"}, {}
    with open(path, newline="", encoding="utf-8-sig") as f:
        rows = csv.DictReader(f)
        absent = ", ".join(sorted(columns - set(rows.fieldnames or ())))
        need(not absent, f"{path} has no column {absent}; expected DPG-Bench's dpg_bench.csv")
        for row in rows:
            text, empty = " ".join(row["text"].split()), {"vqa_list": [], "dependency": [], "order": []}
            item = found.setdefault(row["item_id"], {"prompt": text, "item_id": row["item_id"], **empty})
            item["vqa_list"].append([row["question_natural_language"], "yes"])
            item["dependency"].append([int(n) for n in row["dependency"].split(",")])
            item["order"].append(int(row["proposition_id"]))
    for item in found.values():  # the questions' numbers, should some be missing
        place = {number: i + 1 for i, number in enumerate(item.pop("order"))} | {0: 0}
        item["dependency"] = [[place.get(n, 0) for n in parents] for parents in item["dependency"]]
    return list(found.values())


if __name__ == "__main__":
    source, target = sys.argv[1:]
    with open(target, "w", encoding="utf-8") as f:
        f.writelines(json.dumps(item, ensure_ascii=False) + "\n" for item in read_dpg(source))
