"""Judges that are asked in words: a served vision-language model looks at the picture and writes a mark.

unifiedreward, unifiedreward2 (2503.05236) and rubric (any model, any question).  Address: http://HOST:PORT/v1 of an
OpenAI-compatible server (vLLM, sglang).  An answer without a mark is asked for again, warmer, `retries` times; if
there still is none, NoScore: the run stops, or with --skip-failed goes on without that prompt.
"""

import math
import re
from collections.abc import Callable

from judges.served import ask_all, png, read_url
from rewards import NoScore, pixels

# ours, all of them; a score depends on the wording.  The models' own: #question=FILE, docs/rewards.md
UNIFIED_QUESTION = (
    "<image>\nThe picture above was drawn for a caption. Judge two things: whether it shows what the caption asks "
    "for (objects, their number, attributes and relations), and how good it looks (sharpness, detail, colours, "
    "composition). Give one mark from 1 (worst) to 5 (best) and end your answer with it, written as 'Final Score: ' "
    "and the number.\nText Caption: [{prompt}]"
)
UNIFIED2_QUESTION = (
    "The picture was drawn for a caption. Give it three marks from 1 (worst) to 5 (best): alignment, whether it "
    "shows what the caption asks for; coherence, whether it is free of glitches and of distorted objects; style, how "
    "good it looks, whatever the caption says. Answer in three lines and nothing else:\nAlignment Score (1-5): X\n"
    "Coherence Score (1-5): Y\nStyle Score (1-5): Z\nText Caption: [{prompt}]"
)
RUBRIC = (
    "The picture was drawn for this caption: {prompt}\nMark it from 0 to 10. 10: all that the caption asks for is "
    "there, and the picture is free of flaws. 5: half of it, or clear flaws. 0: nothing of it. Give your reason in "
    "one sentence and end with 'Score: ' and the number."
)


class Unanswered(ValueError):
    """The answer is one, but holds no score."""


# ---- requests ----------------------------------------------------------------
def message(question: str, *images, size=None) -> dict:
    """Pictures (H, W, 3) uint8 and a question as the user's message of a chat completion."""
    urls = ["data:image/png;base64," + png(image, size) for image in images]
    pictures = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return {"role": "user", "content": [*pictures, {"type": "text", "text": question}]}


def connect(name: str, places: dict) -> tuple[Callable, dict]:
    """(ask, settings of the address); ask(messages, read, options) -> [what read finds in each answer, or an
    Unanswered]."""
    url, settings = read_url(name, places["url"])
    url, models = url.rstrip("/").removesuffix("/chat/completions"), []

    def ask(messages: list[dict], read: Callable, **options) -> list:
        if not models:  # vLLM wants the name under which it serves the model
            answer = ask_all(f"{url}/models", [None], settings)[0]
            try:
                models.append(answer["data"][0]["id"])
            except (LookupError, TypeError) as e:
                raise ValueError(f"{url}/models lists no model: {str(answer)[:200]!r}") from e
        found, left = [None] * len(messages), range(len(messages))
        for attempt in range(settings["retries"] + 1):
            again = {"temperature": min(0.4 * attempt, 1.0)} | ({"seed": attempt} if attempt else {})
            bodies = [{"model": models[0], "messages": [messages[i]]} | again | options for i in left]
            for i, answer in zip(left, ask_all(f"{url}/chat/completions", bodies, settings)):
                try:
                    found[i] = read(answer)
                except Unanswered as problem:
                    found[i] = problem
            left = [i for i in left if isinstance(found[i], Unanswered)]
            if not left:
                break
        return found

    return ask, settings


def scores(found: list, prompts: list[str]) -> list[float]:
    """The numbers, or NoScore with the first answer that has none."""
    for prompt, value in zip(prompts, found):
        if isinstance(value, Unanswered):
            values = [math.nan if isinstance(v, Unanswered) else v for v in found]
            raise NoScore(f"prompt {prompt!r}: {value}", values)
    return found


# ---- answers -----------------------------------------------------------------
def first_choice(answer) -> dict:
    try:
        return answer["choices"][0]
    except (LookupError, TypeError) as e:
        raise ValueError(f"the answer is no chat completion: {str(answer)[:200]!r}") from e


def text_of(answer) -> str:
    try:
        return first_choice(answer)["message"]["content"] + ""
    except (LookupError, TypeError) as e:
        raise ValueError(f"the answer is no chat completion: {str(answer)[:200]!r}") from e


def mark(answer, words: str, low: float, high: float) -> float:
    """The number after the last "Words:" of an answer, with or without asterisks around it."""
    text = text_of(answer)
    found = re.findall(re.escape(words) + r"[\s*_]*(-?\d+(?:\.\d+)?)", text)
    if not found or not low <= float(found[-1]) <= high:
        raise Unanswered(f"the answer has no {words!r} from {low:g} to {high:g}: {text[-200:]!r}")
    return float(found[-1])


# ---- the rewards -------------------------------------------------------------
def unifiedreward(name, device, dtype, places):
    """v1 and v1.5: one mark, the picture at 512 x 512; 2.0: three marks (#axes: which are averaged), as it is."""
    ask, settings = connect(name, places)
    asked = settings["question"] or (UNIFIED_QUESTION if name == "unifiedreward" else UNIFIED2_QUESTION)
    size = (512, 512) if name == "unifiedreward" else None
    words = ["Final Score:"]
    if name == "unifiedreward2":
        words = [f"{axis.capitalize()} Score (1-5):" for axis in settings["axes"].split(",")]

    def read(answer):
        return sum(mark(answer, each, 1, 5) for each in words) / len(words)

    def fn(images, prompts, metadata):
        pairs = zip(pixels(images), prompts)
        return scores(ask([message(asked.replace("{prompt}", p), x, size=size) for x, p in pairs], read), prompts)

    return fn


def rubric(name, device, dtype, places):
    """A mark from #low to #high, as a share of that range: 0..1."""
    ask, settings = connect(name, places)
    asked, low, high = settings["question"] or RUBRIC, settings["low"], settings["high"]

    def read(answer):
        return (mark(answer, "Score:", low, high) - low) / (high - low)

    def fn(images, prompts, metadata):
        pairs = zip(pixels(images), prompts)
        return scores(ask([message(asked.replace("{prompt}", p), x) for x, p in pairs], read), prompts)

    return fn
