"""Rewards that a server computes: the transport of all of them, and deqa and http (three lines of JSON).

    POST URL   {"images": [PNG in base64, ...], "prompts": [text, ...], "metadata": [object, ...], "ids": [text, ...]}
    200        {"scores": [number, ...], "ids": [text, ...]}     one for each image, larger is better; ids: as sent
    408, 429, 5xx, a time-out, a broken connection: asked again after 1, 2, 4, .. 30 s; anything else stops the run

--reward-path NAME=http://HOST:PORT/PATH#timeout=60&tries=20; what follows the # is not sent.  REWARD_API_KEY
of the environment goes along as a bearer token, to this address only: no redirect is followed.  An id is a digest of
the image and its prompt: a server that repeats them (judges/server.py does) cannot mix up its answers unnoticed.
"""

import base64
import hashlib
import io
import json
import math
import os
import socket
import threading
import time
from multiprocessing.pool import ThreadPool
from pathlib import Path
from urllib.parse import urlsplit

import requests
import urllib3

from rewards import Missing, UsageError, need, pixels, within

# seconds, times, seconds, requests at a time, images of a request, times that an answer without a score is asked again
HTTP = {"timeout": 120.0, "tries": 8, "wait": 1.0, "workers": 8, "batch": 8, "retries": 2}
LARGEST = 2**20  # bytes of an answer
# what a judge takes besides, by its reward's name; a question is a file (judges/vlm.py, judges/questions.py)
OPTIONS = {
    "unifiedreward": {"question": ""},
    "unifiedreward2": {"question": "", "axes": "alignment,coherence,style"},
    "rubric": {"question": "", "low": 0.0, "high": 10.0},
    "vqascore": {"question": ""},
    "winrate": {"question": ""},
}
WORDS = {"unifiedreward": "Final Score:", "rubric": "Score:"}  # that answers are to repeat


# ---- the address ------------------------------------------------------------
def read_url(name: str, path: str) -> tuple[str, dict]:
    """ "http://host:port/path#timeout=60&tries=20" -> the URL, the settings; UsageError if it is none."""
    form = f"--reward-path {name}=http://HOST:PORT/PATH"
    try:
        parts = urlsplit(path)
        right = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:  # a port above 65535
        right = False
    need(right, f"reward {name!r} is scored by a server of yours, {path!r} is no URL; give {form}")
    known = HTTP | OPTIONS.get(name, {})
    settings, listed = dict(known), "&".join(f"{k}={v}" for k, v in known.items())
    for item in filter(None, parts.fragment.split("&")):
        key, _, value = item.partition("=")
        try:
            settings[key] = read_question(name, value) if key == "question" in known else type(known[key])(value)
            number = key in HTTP and (key != "retries" or settings[key])
            right = not number or 0 < settings[key] < math.inf  # NaN is neither
        except (KeyError, ValueError) as problem:
            need(not isinstance(problem, UsageError), str(problem))
            right = False
        need(right, f"--reward-path {name}=...#{item} is no setting; these are: {form}#{listed}")
    low, high = settings.get("low", 0), settings.get("high", 1)
    need(-math.inf < low < high < math.inf, f"--reward-path {name}=...: low={low} is not below high={high}")
    axes, wrong = known.get("axes", ""), f"axes={settings.get('axes')}: known are {known.get('axes')}"
    need(set(settings.get("axes", "").split(",")) <= set(axes.split(",")), wrong)
    return path.partition("#")[0], settings


def read_question(name: str, file: str) -> str:
    """The text asked about every image, with {prompt} where the caption goes."""
    try:
        text = Path(file).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as e:
        raise UsageError(f"question={file}: {e}; give a text file with {{prompt}} where the caption goes") from None
    words = WORDS.get(name, "")
    right = text.count("{prompt}") == 1 and words in text
    also = f" and the words {words!r}, which answers repeat" if words else ""
    need(right, f"question={file} needs {{prompt}} once{also}")
    return text


def check_url(name: str, path: str) -> None:
    """UsageError unless something listens where the URL points; what, shows at the first request."""
    url, _ = read_url(name, path)
    if requests.utils.select_proxy(url, requests.utils.get_environ_proxies(url)):
        return  # the proxy connects, not we
    parts = urlsplit(url)
    address = parts.hostname, parts.port or {"http": 80, "https": 443}[parts.scheme]
    # no request: a server that is busy with another run's images accepts, but would not answer in time
    problem = within(4, lambda: socket.create_connection(address, timeout=4).close())
    absent = f"reward {name!r}: no server at {path} ({problem}); start it, or correct --reward-path"
    need(not problem, absent, Missing)


# ---- transport --------------------------------------------------------------
def send(url: str, body: dict | None, seconds: float) -> tuple[int, str, str]:
    """One request, GET where there is no body -> status code, reason, text."""
    key, method = os.environ.get("REWARD_API_KEY"), "GET" if body is None else "POST"
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    headers["Accept-Encoding"] = "identity"  # the limit is of bytes as they come
    options = {"headers": headers, "timeout": seconds, "allow_redirects": False, "stream": True}
    options["auth"] = lambda request: request  # or a ~/.netrc would take the key's place
    end, data = time.monotonic() + seconds, b""
    with requests.request(method, url, json=body, **options) as answer:
        while part := answer.raw.read1(2**16):  # what there is, hence a trickle meets the limits, too
            data += part
            need(len(data) <= LARGEST, f"{url} answered more than {LARGEST} bytes", ValueError)
            need(time.monotonic() <= end, "the answer timed out", requests.Timeout)
        return answer.status_code, answer.reason, data.decode(errors="replace")


def ask(url: str, body: dict | None, settings: dict, stop: threading.Event):
    """The answer's JSON, asked for with growing pauses while that may help; ValueError if it does not."""
    tries, seconds = settings["tries"], settings["timeout"]
    for attempt in range(1, tries + 1):
        try:
            code, reason, text = send(url, body, seconds)
        except (OSError, urllib3.exceptions.HTTPError) as e:  # refused, reset, timed out, cut short
            need(not isinstance(e, ValueError), f"{url}: {e}", ValueError)  # a key that is no header
            problem = f"{url} failed: {e}"
        else:
            problem = f"{url} answered HTTP {code} {reason}: {text[:200]!r}"
            if 200 <= code < 300:
                break
            need(code in (408, 429) or code >= 500 and code != 501, problem, ValueError)
        if attempt == tries or stop.wait(settings["wait"] * min(2 ** (attempt - 1), 30)):
            times = f"{attempt} tries" if attempt > 1 else "1 try"
            raise ValueError(f"{problem} ({times}, {seconds:g} s each)")
    try:
        return json.loads(text)
    except ValueError as e:
        raise ValueError(f"{url} answered what is no JSON: {text[:200]!r}") from e


def ask_all(url: str, bodies: list, settings: dict) -> list:
    """The answers to all bodies, in order, `workers` requests at a time; a failure ends the others' waiting."""
    stop = threading.Event()
    pool = ThreadPool(min(settings["workers"], len(bodies)))  # daemons: Ctrl-C does not wait for a server
    try:
        return list(pool.imap(lambda body: ask(url, body, settings, stop), bodies))
    finally:
        stop.set()
        pool.terminate()


def png(image, size=None) -> str:
    """(H, W, 3) uint8 -> PNG in base64; size: (width, height) to resize to, bicubic."""
    from PIL import Image

    picture, buffer = Image.fromarray(image), io.BytesIO()
    (picture.resize(size, Image.BICUBIC) if size else picture).save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode()


# ---- the rewards ------------------------------------------------------------
def http_reward(name, device, dtype, places):
    url, settings = read_url(name, places["url"])

    def fn(images, prompts, metadata):
        encoded, extra = [png(image) for image in pixels(images)], list(metadata or [{}] * len(prompts))
        parts = [slice(i, i + settings["batch"]) for i in range(0, len(encoded), settings["batch"])]
        ids = [hashlib.sha256(f"{x} {p}".encode()).hexdigest()[:16] for x, p in zip(encoded, prompts)]
        columns = {"images": encoded, "prompts": prompts, "metadata": extra, "ids": ids}
        bodies = [{key: values[part] for key, values in columns.items()} for part in parts]
        answers = ask_all(url, bodies, settings)
        return [v for answer, body in zip(answers, bodies) for v in http_scores(answer, body["ids"])]

    return fn


def http_scores(answer, ids: list[str]) -> list[float]:
    """The scores in a server's answer; ValueError unless it is {"scores": [n numbers]}, of these ids if it has any."""
    n = len(ids)
    scores = answer.get("scores") if isinstance(answer, dict) else None
    listed = isinstance(scores, list)
    what = f"{len(scores)} scores" if listed else f"no list of scores: {str(answer)[:200]!r}"
    expected = f'expected {{"scores": [...]}} with {n} numbers'
    need(listed and len(scores) == n, f"the server answered {what}; {expected}", ValueError)
    same = answer.get("ids", ids) == ids
    need(same, f"the server's scores are of other images than were sent (ids {answer.get('ids')!r})", ValueError)
    for i, score in enumerate(scores):
        number = isinstance(score, int | float) and not isinstance(score, bool)
        need(number, f"the server answered {score!r} as score {i}; expected a number", ValueError)
    return [float(score) for score in scores]
