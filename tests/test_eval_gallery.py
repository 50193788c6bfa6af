"""gallery.html in a real headless browser: sort, filter, keyboard, large view, phone, dark, no request leaves it.

The browser is Chromium or a relative of it (from $BROWSER or the PATH), driven over its own debugging pipe: nothing
to install beside it.  Without one the browser tests are skipped; what is computed in Python is tested anyway.
"""

import base64
import fcntl
import io
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

import common
import eval as evaluation
import pictures

TEXTS = ["a red circle", "two blue squares", "a <b>green</b> triangle </script> & more", 'a sign that says "Été"']
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "headless_shell")
BROWSER = os.environ.get("BROWSER") or next(filter(None, map(shutil.which, NAMES)), None)
needs_browser = pytest.mark.skipif(not BROWSER, reason=f"no browser: none of {', '.join(NAMES)} on the PATH")


class Page:
    """One tab of a headless Chromium: JSON messages, each ended by a zero byte, through file descriptors 3 and 4."""

    def __init__(self, profile: Path):
        (to_read, self.write), (self.read, to_write) = os.pipe(), os.pipe()
        ours = [fcntl.fcntl(fd, fcntl.F_DUPFD, 20) for fd in (to_read, to_write)]  # clear of 3 and 4

        def place():
            os.dup2(ours[0], 3), os.dup2(ours[1], 4)

        flags = ["--headless=new", "--remote-debugging-pipe", f"--user-data-dir={profile}", "--no-first-run"]
        flags += ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars", "about:blank"]
        quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self.process = subprocess.Popen([BROWSER, *flags], preexec_fn=place, pass_fds=(3, 4), **quiet)
        for fd in (to_read, to_write, *ours):
            os.close(fd)
        self.buffer, self.count, self.events, self.session = b"", 0, [], None
        deadline = time.monotonic() + 60
        target = None
        while target is None and time.monotonic() < deadline:
            found = self.call("Target.getTargets")["targetInfos"]
            target = next((t["targetId"] for t in found if t["type"] == "page"), None)
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def message(self, seconds=60) -> dict:
        deadline = time.monotonic() + seconds
        while b"\0" not in self.buffer:
            if not select.select([self.read], [], [], max(0, deadline - time.monotonic()))[0]:
                raise TimeoutError("the browser does not answer")
            chunk = os.read(self.read, 1 << 20)
            if not chunk:
                raise EOFError("the browser is gone")
            self.buffer += chunk
        first, self.buffer = self.buffer.split(b"\0", 1)
        return json.loads(first)

    def call(self, method, **parameters) -> dict:
        self.count += 1
        request = {"id": self.count, "method": method, "params": parameters}
        if self.session:
            request["sessionId"] = self.session
        os.write(self.write, json.dumps(request).encode() + b"\0")
        while True:
            answer = self.message()
            if answer.get("id") == self.count:
                assert "error" not in answer, (method, answer["error"])
                return answer["result"]
            self.events.append(answer)

    def open(self, path: Path, width=1280, height=900, phone=False, dark=False):
        scale = 2 if phone else 1
        size = dict(width=width, height=height, deviceScaleFactor=scale, mobile=phone)
        self.call("Emulation.setDeviceMetricsOverride", **size)
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.call("Emulation.setEmulatedMedia", features=scheme)
        self.events.clear()
        self.call("Page.navigate", url=path.as_uri())
        while not any(e.get("method") == "Page.loadEventFired" for e in self.events):
            self.events.append(self.message())

    def run(self, code: str):
        """The value of a JavaScript expression; a promise is awaited."""
        answer = self.call("Runtime.evaluate", expression=code, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def press(self, key: str):
        arrows = {"ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40}
        code = (arrows | {"Enter": 13, "Escape": 27}).get(key, 0)
        text = {"Enter": "\r"}.get(key, key if len(key) == 1 else "")
        for kind in ("keyDown", "keyUp"):
            extra = dict(text=text) if text and kind == "keyDown" else {}
            self.call("Input.dispatchKeyEvent", type=kind, key=key, windowsVirtualKeyCode=code, **extra)
        self.settle()

    def settle(self):
        self.run("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => done(1))))")

    def screenshot(self, path: Path | None = None) -> Image.Image:
        self.settle()
        data = base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"])
        if path is not None:
            path.write_bytes(data)
        return Image.open(io.BytesIO(data)).convert("RGB")

    def problems(self) -> list:
        """Everything that was requested besides the page and its data: images, and errors in the console."""
        found = []
        for event in self.events:
            if event.get("method") == "Network.requestWillBeSent":
                url = event["params"]["request"]["url"]
                found += [url] if not url.startswith(("file:", "data:", "about:")) else []
            if event.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded"):
                found.append(event["params"])
        return found

    def close(self):
        try:
            self.session = None
            self.call("Browser.close")
            self.process.wait(10)
        except (OSError, EOFError, TimeoutError, subprocess.TimeoutExpired):
            self.process.kill()
        finally:
            os.close(self.read), os.close(self.write)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    if not BROWSER:
        pytest.skip("no browser")
    opened = Page(tmp_path_factory.mktemp("profile"))
    yield opened
    opened.close()


def folder(root: Path, models: list[str], size=32, texts=TEXTS, per_prompt=2):
    """An evaluation's folder with made-up images and scores, and its gallery.  Scores: see score()."""
    prompts = [common.Prompt(i, text, {"tag": "colors"} if i == 0 else {}) for i, text in enumerate(texts)]
    files = {m: [] for m in models}
    generator = torch.Generator().manual_seed(0)
    empty = torch.zeros(len(texts), per_prompt, dtype=torch.float64)
    scores = {m: {r: empty.clone() for r in ("alpha", "beta")} for m in models}
    for i, model in enumerate(models):
        for p in range(len(prompts)):
            for k in range(per_prompt):
                small = torch.randint(0, 256, (3, 4, 4), generator=generator, dtype=torch.uint8)
                pixels = small.repeat_interleave(size // 4, 1).repeat_interleave(size // 4, 2)
                files[model].append(root / "images" / model / f"{p:05d}-{k:02d}.png")
                pictures.save_image(pixels.permute(1, 2, 0).numpy(), files[model][-1])
                scores[model]["alpha"][p, k], scores[model]["beta"][p, k] = score(i, p, k)
    head = dict(title="tiny", note="4 prompts x 2 images", command="python eval.py --preset tiny")
    head |= dict(rewards=["alpha", "beta"], summary=evaluation.summarise(scores))
    pictures.write_gallery(root / "gallery.html", head, prompts, files, scores, 24)
    return root / "gallery.html"


def score(model: int, prompt: int, image: int) -> tuple[float, float]:
    """alpha: prompts 0, 1 improve, 2 worsens, 3 stays; beta: everything worsens by 1."""
    return prompt / 8 + image / 64 + model * (0.5, 0.25, -0.125, 0.0)[prompt], prompt - model


SHOWN = "[...document.querySelectorAll('.card')].map(c => c.querySelector('.foot span').textContent)"
FOCUS = "document.activeElement.querySelector('.foot span')?.textContent"


def choose(page, name, value):
    event = "input" if name == "filter" else "change"
    page.run(f"$({name!r}).value = {json.dumps(value)}; $({name!r}).dispatchEvent(new Event({event!r}))")


def order(page):
    """[(prompt, image)] as shown."""
    return [tuple(int(word) for word in text.split() if word.isdigit()) for text in page.run(SHOWN)]


@needs_browser
def test_sort_and_filter(page, tmp_path):
    page.open(folder(tmp_path, ["base", "run"]))
    assert order(page) == [(0, 0), (0, 1), (1, 0), (1, 1), (3, 0), (3, 1), (2, 0), (2, 1)]  # largest gain first
    assert page.run("$('count').textContent") == "8 of 8"
    page.run("$('order').click()")
    assert order(page)[:2] == [(2, 0), (2, 1)]
    choose(page, "sort", "before")
    assert order(page) == [(p, k) for p in (3, 2, 1, 0) for k in (1, 0)]
    choose(page, "sort", "score")
    assert order(page)[:3] == [(0, 1), (0, 0), (1, 1)]
    choose(page, "sort", "prompt")
    assert [text for text, _ in order(page)] == [2, 2, 0, 0, 3, 3, 1, 1]
    choose(page, "sort", "number")
    for show, prompts in (("up", {0, 1}), ("down", {2}), ("same", {3}), ("all", {0, 1, 2, 3})):
        choose(page, "show", show)
        assert {p for p, _ in order(page)} == prompts
    choose(page, "reward", "1")
    choose(page, "show", "up")
    assert order(page) == [] and not page.run("$('none').hidden")  # beta worsens everywhere
    choose(page, "show", "all")
    choose(page, "filter", "BLUE two")
    assert order(page) == [(1, 0), (1, 1)] and page.run("$('count').textContent") == "2 of 8"
    choose(page, "filter", "été")
    assert [p for p, _ in order(page)] == [3, 3]
    assert not page.problems()


@needs_browser
def test_keyboard_and_large_view(page, tmp_path):
    page.open(folder(tmp_path, ["base", "run"]))
    places = page.run(SHOWN)
    columns = page.run("getComputedStyle($('list')).gridTemplateColumns.split(' ').length")
    assert columns > 1
    page.press("ArrowRight")
    assert page.run(FOCUS) == places[0]  # the first key takes the first card
    page.press("ArrowRight")
    assert page.run(FOCUS) == places[1]
    page.press("ArrowLeft")
    page.press("ArrowLeft")
    assert page.run(FOCUS) == places[0]  # no card before the first
    page.press("ArrowDown")
    assert page.run(FOCUS) == places[columns]
    page.press("ArrowUp")
    page.press("Enter")
    assert page.run("$('view').open") and page.run("$('prompt').textContent") == TEXTS[0]
    assert page.run("$('scores').rows.length") == 3 and "+0.5" in page.run("$('scores').textContent")
    assert page.run("[...$('pictures').querySelectorAll('img')].every(i => i.naturalWidth === 32)")
    page.press("ArrowRight")
    page.press("ArrowRight")
    assert page.run("$('prompt').textContent") == TEXTS[1] and page.run("$('place').textContent").startswith("3 of 8")
    page.press("ArrowLeft")
    page.press("Escape")
    assert not page.run("$('view').open") and page.run(FOCUS) == places[1]  # back at the card that was viewed
    page.press("/")
    assert page.run("document.activeElement.id") == "filter"
    page.press("r")  # a letter, not a command
    assert page.run("$('filter').value") == "r"
    page.press("Escape")
    assert page.run("$('count').textContent") == "8 of 8" and not page.problems()


@needs_browser
def test_markup_in_a_prompt_is_text(page, tmp_path):
    page.open(folder(tmp_path, ["base", "run"]))
    assert page.run("document.querySelectorAll('.card b, .card script').length") == 16  # two scores a card, no <b>
    assert TEXTS[2] in page.run("[...document.querySelectorAll('.text')].map(t => t.textContent)")


@needs_browser
@pytest.mark.parametrize("models", [["base"], ["base", "run"], ["base", "run/epoch_0010", "run/epoch_0020", "other"]])
@pytest.mark.parametrize("width, phone, dark", [(1280, False, False), (360, True, True)])
def test_pictures_of_it(page, tmp_path, models, width, phone, dark):
    """Right width, nothing sticks out, the images are decoded and shown, dark where asked."""
    shots = Path(os.environ.get("SCREENSHOTS", tmp_path))  # to look at them: SCREENSHOTS=folder
    path = folder(tmp_path, models, size=96)
    page.open(path, width, 740 if phone else 900, phone, dark)
    name = f"{len(models)}_{width}"
    wide = "[document.documentElement.scrollWidth, document.documentElement.clientWidth]"
    for view in ("list", "large"):
        if view == "large":
            page.run("document.querySelector('.card').click()")
        page.run("Promise.all([...document.images].filter(i => i.src).map(i => i.decode()))")
        assert len(set(page.run(wide))) == 1, view  # no horizontal scrolling
        picture = page.screenshot(shots / f"{name}_{view}.png")
        assert picture.size[0] == width * (2 if phone else 1)
        back = sum(picture.getpixel((2, 2))) / 3
        assert view == "large" or (back < 60 if dark else back > 200)
        assert len(picture.getcolors(1 << 24)) > 300
    page.run("$('about').open = true")
    assert len(set(page.run(wide))) == 1
    assert page.run("$('means').rows.length") == len(models) + 1
    assert page.run("$('show-label').hidden") == (len(models) == 1)
    assert page.run("$('model-label').hidden") == (len(models) < 3)
    assert not page.problems()


@needs_browser
def test_compare_with_another_lora(page, tmp_path):
    page.open(folder(tmp_path, ["base", "one", "two"]))
    gains = "[...document.querySelectorAll('.gain')].slice(0, 2).map(g => g.textContent)"
    assert page.run(gains) == ["+1", "+1"]  # the last LoRA: 2 x 0.5
    choose(page, "model", "1")
    assert page.run(gains) == ["+0.5", "+0.5"]


# ---- without a browser ----------------------------------------------------------------------------------------------
def test_one_file_without_links(tmp_path):
    text = folder(tmp_path, ["base", "run"]).read_text(encoding="utf-8")
    assert "__DATA__" not in text and text.count("</script>") == 2
    links = ("http://", "https://", 'src="', 'href="/', "url(", "@import", "fetch(")
    assert not any(link in text for link in links) and "default-src 'none'" in text
    assert text.count("data:image/png;base64,") == 16  # 8 small pairs, as they are


def test_size_of_the_gallery(tmp_path):
    sizes = {512: 40e3, 384: 25e3, 256: 12e3, 192: 7e3, 128: 4e3}
    fit = pictures.fit_gallery
    assert fit(sizes, 100, 2, 2, 24e6) == (512, 2, 100)  # 16 MB
    assert fit(sizes, 100, 4, 2, 24e6) == (384, 4, 100)  # 20 MB
    assert fit(sizes, 100, 10, 2, 24e6) == (256, 10, 100)  # 24 MB
    assert fit(sizes, 553, 4, 2, 24e6) == (256, 1, 553)  # 2 of them would be 26.5 MB
    assert fit(sizes, 1018, 1, 2, 12e6) == (128, 1, 1018)
    assert fit(sizes, 1018, 1, 2, 4e6) == (128, 1, 500)
    assert fit({32: 2e3}, 300, 4, 2, 3e6) == (32, 2, 300)  # never smaller than small images are
    assert fit({32: 2e3}, 300, 4, 2, 1e3) == (32, 1, 1)


def test_thumbnails_keep_their_shape(tmp_path):
    pictures.save_image(torch.full((256, 128, 3), 77, dtype=torch.uint8).numpy(), tmp_path / "a.png")
    kind, data = pictures.data_uri(tmp_path / "a.png", 64).split(",")
    image = Image.open(io.BytesIO(base64.b64decode(data)))
    assert image.size == (32, 64) and kind.startswith("data:image/")
    assert abs(image.convert("RGB").getpixel((9, 9))[0] - 77) < 3
