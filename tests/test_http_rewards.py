"""judges/served.py, rewards of a server, against real servers on 127.0.0.1: protocol, failures, retries, a restart."""

import base64
import http.server
import io
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import rewards
from judges import served
from rewards import RewardError, UsageError, check, load

DOCS = (Path(rewards.__file__).parent / "docs" / "rewards.md").read_text()
QUICK = "#wait=0.05&tries=4&timeout=5"
PROMPTS = [f"prompt {i}" for i in range(10)]


def images(n=10, h=12, w=20):
    return (torch.rand(n, 3, h, w) * 255).round() / 255


def decode(text):
    """Base64 PNG -> (3, H, W) float in [0, 1]."""
    image = Image.open(io.BytesIO(base64.b64decode(text)))
    assert image.format == "PNG" and image.mode == "RGB"
    return torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255


def mean_scores(body):
    return {"scores": [decode(text).mean().item() for text in body["images"]]}


class Server:
    """answer(path, body, headers) -> (status, bytes or JSON), in a thread of its own per request; `seen` requests."""

    def __init__(self, answer):
        seen, lock = [], threading.Lock()
        self.seen, self.busy, self.most_busy = seen, 0, 0

        class Handler(http.server.BaseHTTPRequestHandler):
            def reply(handler):
                length = int(handler.headers.get("Content-Length") or 0)
                body = json.loads(handler.rfile.read(length)) if length else None
                with lock:
                    seen.append((handler.command, handler.path, body, dict(handler.headers)))
                    self.busy += 1
                    self.most_busy = max(self.busy, self.most_busy)
                try:
                    status, content = answer(len(seen), handler.path, body)
                finally:
                    with lock:
                        self.busy -= 1
                if status is None:  # cut the connection
                    return handler.connection.close()
                content = content if isinstance(content, bytes) else json.dumps(content).encode()
                handler.send_response(status)
                handler.send_header("Content-Length", str(len(content)))
                handler.end_headers()
                handler.wfile.write(content)

            do_GET = do_POST = reply

            def log_message(self, *args):
                pass

        class Quiet(http.server.ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *args):
                pass

        self.http = Quiet(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.delenv("REWARD_API_KEY", raising=False)


@pytest.fixture
def serve():
    servers = []

    def start(answer):
        servers.append(Server(answer))
        return servers[-1]

    yield start
    for server in servers:
        server.http.shutdown()
        server.http.server_close()


# ---- the protocol ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["http", "deqa"])
def test_scores_arrive_in_order_with_prompts_and_metadata(name, serve):
    server = serve(lambda n, path, body: (time.sleep(0.02 * (4 - n)) if n < 4 else None, (200, mean_scores(body)))[1])
    x, extra = images(), [{"n": i} for i in range(10)]
    check(name, f"{server.url}/score", PROMPTS)
    reward = load(name, paths={name: f"{server.url}/score#batch=3&workers=4"})
    total, _ = reward(x, PROMPTS, extra)
    assert torch.allclose(total, x.mean((1, 2, 3)), atol=1e-6) and total.std() > 1e-3
    sent = sorted((body for _, _, body, _ in server.seen), key=lambda b: b["metadata"][0]["n"])
    assert [len(body["images"]) for body in sent] == [3, 3, 3, 1]
    assert sum((body["prompts"] for body in sent), []) == PROMPTS
    assert sum((body["metadata"] for body in sent), []) == extra
    assert all(set(body) == {"images", "prompts", "metadata", "ids"} for body in sent)
    assert len({name for body in sent for name in body["ids"]}) == 10
    assert torch.allclose(decode(sent[0]["images"][0]), x[0])  # lossless
    assert {(command, path) for command, path, _, _ in server.seen} == {("POST", "/score")}
    assert not reward.differentiable
    reward(x[:1], PROMPTS[:1])
    assert server.seen[-1][2]["metadata"] == [{}] and "Authorization" not in server.seen[-1][3]


def test_requests_run_side_by_side_up_to_workers(serve):
    def slow(n, path, body):
        time.sleep(0.2)
        return 200, mean_scores(body)

    server = serve(slow)
    load("http", paths=f"{server.url}#batch=1&workers=3")(images(6), PROMPTS[:6])
    assert server.most_busy == 3 and len(server.seen) == 6


def test_key_of_the_server(serve, monkeypatch, tmp_path):
    server = serve(lambda n, path, body: (200, mean_scores(body)))
    monkeypatch.setenv("REWARD_API_KEY", "abc")
    load("http", paths=server.url)(images(1), PROMPTS[:1])
    assert server.seen[0][3]["Authorization"] == "Bearer abc"
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login somebody password else\n")
    monkeypatch.setenv("NETRC", str(netrc))
    load("http", paths=server.url + "/other")(images(1), PROMPTS[:1])
    assert server.seen[1][3]["Authorization"] == "Bearer abc"


def failing(answer, serve, name="http", settings=QUICK, n=3):
    """The message of the RewardError, the number of requests."""
    server = serve(answer)
    with pytest.raises(RewardError, match=f"reward '{name}' ") as e:
        load(name, paths=server.url + settings)(images(n), PROMPTS[:n])
    return str(e.value), len(server.seen)


@pytest.mark.parametrize(
    "answer, words",
    [
        (b"<html>welcome</html>", "no JSON: '<html>welcome"),
        (b"", "no JSON"),
        ({"score": [1, 2, 3]}, "no list of scores"),
        ([1, 2, 3], "no list of scores"),
        ({"scores": [1, 2]}, "2 scores; expected"),
        ({"scores": [1, 2, 3, 4]}, "4 scores; expected"),
        ({"scores": [1, None, 3]}, "None as score 1"),
        ({"scores": [1, "2", 3]}, "'2' as score 1"),
        ({"scores": [1, True, 3]}, "True as score 1"),
        (
            b'{"scores": [1, NaN, 3]}',
            "returned nan; expected finite numbers (of float32) (sample 1: prompt 'prompt 1')",
        ),
        (
            b'{"scores": [1, 2, Infinity]}',
            "returned inf; expected finite numbers (of float32) (sample 2: prompt 'prompt 2')",
        ),
        ({"scores": "123"}, "no list of scores"),
    ],
)
def test_a_wrong_answer_stops_the_run_at_once(answer, words, serve):
    message, requests = failing(lambda n, path, body: (200, answer), serve)
    assert words in message and requests == 1


@pytest.mark.parametrize(
    "status, tries", [(400, 1), (404, 1), (422, 1), (501, 1), (408, 4), (429, 4), (500, 4), (503, 4)]
)
def test_status_codes(status, tries, serve):
    message, requests = failing(lambda n, path, body: (status, b"the reason"), serve)
    assert f"HTTP {status}" in message and "the reason" in message and requests == tries
    assert ("4 tries" in message) == (tries == 4)


def test_time_out(serve):
    release = threading.Event()
    start = time.monotonic()
    message, requests = failing(lambda n, path, body: (release.wait(20), (200, mean_scores(body)))[1], serve,
                                settings="#timeout=0.3&tries=2&wait=0.01")  # fmt: skip
    release.set()
    assert "timed out" in message and "2 tries, 0.3 s each" in message and requests == 2
    assert time.monotonic() - start < 5


@pytest.mark.parametrize("fault", [(None, b""), (503, b"loading"), (200, "short")])
def test_what_passes_is_tried_again(fault, serve):
    """A cut connection, a busy server, an answer that breaks off: the third try succeeds, with growing pauses."""
    times = []

    def answer(n, path, body):
        times.append(time.monotonic())
        return (200, mean_scores(body)) if n == 3 else fault

    server = serve(answer)
    if fault[1] == "short":  # announce more than is sent
        handler = server.http.RequestHandlerClass
        original = handler.send_header
        handler.send_header = lambda self, key, value: original(
            self, key, "500" if key == "Content-Length" and len(times) < 3 else value
        )
    x = images(2)
    total, _ = load("http", paths=f"{server.url}#wait=0.1&tries=3&timeout=2")(x, PROMPTS[:2])
    assert torch.allclose(total, x.mean((1, 2, 3)), atol=1e-6)
    first, second = times[1] - times[0], times[2] - times[1]
    assert first >= 0.1 and second >= 0.2


def test_a_failure_ends_the_waiting_of_the_others(serve):
    """One request is refused for good while others are in their pauses."""

    def answer(n, path, body):
        if body["prompts"] == ["prompt 0"]:
            time.sleep(0.3)
            return 400, b"no"
        return 503, b"busy"

    start = time.monotonic()
    before = {t for t in threading.enumerate() if t.name.endswith("(worker)")}  # those of a ThreadPool
    failing(answer, serve, settings="#batch=1&workers=4&wait=10&tries=5", n=4)
    while {t for t in threading.enumerate() if t.name.endswith("(worker)")} - before:
        time.sleep(0.02)
        assert time.monotonic() - start < 5


def test_redirects_are_not_followed(serve, monkeypatch):
    """Neither the key nor the images go to another address, and its answer is not taken for scores."""
    other = serve(lambda n, path, body: (200, mean_scores(body)))
    monkeypatch.setenv("REWARD_API_KEY", "abc")
    for status in (301, 302, 307, 308):
        server = serve(lambda n, path, body, status=status: (status, b"elsewhere"))
        handler = server.http.RequestHandlerClass
        original = handler.end_headers
        handler.end_headers = lambda self, original=original: (
            self.send_header("Location", other.url), original(self))  # fmt: skip
        with pytest.raises(RewardError, match=f"answered HTTP {status}"):
            load("http", paths=server.url + QUICK)(images(1), PROMPTS[:1])
        assert len(server.seen) == 1 and not other.seen


def test_an_answer_has_a_size_and_a_time(serve, monkeypatch):
    """More bytes than any scores need stop the run; a trickle that never pauses is timed out like silence."""
    message, requests = failing(lambda n, path, body: (200, b"[" * (served.LARGEST + 1)), serve)
    assert f"more than {served.LARGEST} bytes" in message and requests == 1
    server = serve(lambda n, path, body: (200, b"x" * 1000))

    class Slowly:
        def __init__(self, file):
            self.file = file

        def write(self, data):
            for i in range(len(data) if len(data) == 1000 else 0):
                self.file.write(data[i : i + 1]), self.file.flush(), time.sleep(0.05)
            return len(data) if len(data) == 1000 else self.file.write(data)

        def __getattr__(self, name):
            return getattr(self.file, name)

    handler = server.http.RequestHandlerClass
    original = handler.setup
    handler.setup = lambda self: (original(self), setattr(self, "wfile", Slowly(self.wfile)))
    start = time.monotonic()
    with pytest.raises(RewardError, match="timed out.*2 tries, 0.5 s each"):
        load("http", paths=f"{server.url}#timeout=0.5&tries=2&wait=0.01")(images(1), PROMPTS[:1])
    assert time.monotonic() - start < 5


def test_ctrl_c_does_not_wait_for_the_server(serve):
    release = threading.Event()
    server = serve(lambda n, path, body: (release.wait(30), (200, mean_scores(body)))[1])
    code = (
        "import sys, torch, rewards\n"
        f"reward = rewards.load('http', paths='{server.url}#timeout=60&workers=4&batch=1')\n"
        "reward(torch.rand(4, 3, 8, 8), ['a'] * 4)\n"
    )
    root = Path(rewards.__file__).parent
    heed = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731  (a background job inherits "ignore")
    command = [sys.executable, "-c", code]
    process = subprocess.Popen(command, cwd=root, stderr=subprocess.PIPE, text=True, preexec_fn=heed)
    try:
        while len(server.seen) < 4:
            time.sleep(0.05)
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        start = time.monotonic()
        assert "KeyboardInterrupt" in process.communicate(timeout=20)[1]
        assert time.monotonic() - start < 5
    finally:
        release.set(), process.kill(), process.wait()


SERVER = """
import http.server, json, sys, os
port, answers = int(sys.argv[1]), int(sys.argv[2])
class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        global answers
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if answers == 0:
            os._exit(1)                                     # in the middle of a request
        answers -= 1
        content = json.dumps({"scores": [m["n"] / 4 for m in body["metadata"]]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)
    def log_message(self, *args):
        pass
server = http.server.HTTPServer(("127.0.0.1", port), Handler)
print(server.server_port, flush=True)
server.serve_forever()
"""


def start_server(port, answers):
    process = subprocess.Popen(
        [sys.executable, "-c", SERVER, str(port), str(answers)], stdout=subprocess.PIPE, text=True
    )
    return process, int(process.stdout.readline())


@pytest.mark.parametrize("name", ["deqa", "http"])
def test_a_server_that_dies_in_the_middle_of_an_epoch_and_comes_back(name):
    first, port = start_server(0, 5)
    found = {}

    def restart():
        first.wait()
        time.sleep(0.4)  # nothing listens for a while
        found["second"], found["port"] = start_server(port, -1)

    watcher = threading.Thread(target=restart, daemon=True)
    watcher.start()
    try:
        reward = load(name, paths=f"http://127.0.0.1:{port}/#batch=2&workers=2&wait=0.2&tries=6")
        extra = [{"n": i} for i in range(24)]
        total, _ = reward(images(24), ["a"] * 24, extra, chunk=8)
        assert total.tolist() == [i / 4 for i in range(24)]
        assert first.poll() == 1 and found["port"] == port
    finally:
        first.kill(), first.wait(), watcher.join(10)
        if "second" in found:
            found["second"].kill(), found["second"].wait()


SCORE = """
def score(images, prompts, metadata):
    return [image.convert("L").resize((1, 1)).getpixel((0, 0)) / 255 for image in images]

def wrong(images, prompts, metadata):
    return [1]
"""


@pytest.fixture(scope="module")
def own_server(tmp_path_factory):
    """judges/server.py, copied into a folder of its own: start(function, key) -> URL."""
    folder, processes = tmp_path_factory.mktemp("server"), []
    (folder / "my_model.py").write_text(SCORE)
    (folder / "server.py").write_text((Path(served.__file__).parent / "server.py").read_text())

    def start(function="my_model:score", key=""):
        command = [sys.executable, "server.py", function, "0"]
        env = {"PATH": "/usr/bin:/bin", "REWARD_API_KEY": key}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
        processes.append(subprocess.Popen(command, cwd=folder, env=env, **pipes))
        return f"http://127.0.0.1:{processes[-1].stdout.readline().split()[-1]}"

    yield start
    for process in processes:
        process.kill(), process.wait(), process.stdout.close()


def test_the_server_that_is_copied_to_a_model(own_server, monkeypatch):
    x, url = torch.rand(3, 1, 1, 1).expand(3, 3, 16, 16), own_server()
    scores = load("http", paths=f"{url}/score#batch=2")(x, PROMPTS[:3])[0]
    assert torch.allclose(scores, x[:, 0, 0, 0], atol=0.51 / 255)
    with pytest.raises(RewardError, match="HTTP 400 .*1 scores for 3 images"):
        load("http", paths=f"{own_server('my_model:wrong')}{QUICK}")(x, PROMPTS[:3])
    guarded = own_server(key="abc")
    with pytest.raises(RewardError, match="HTTP 401 .*wrong REWARD_API_KEY"):
        load("http", paths=guarded + QUICK)(x, PROMPTS[:3])
    monkeypatch.setenv("REWARD_API_KEY", "abc")
    assert torch.equal(load("http", paths=guarded)(x, PROMPTS[:3])[0], scores)


def test_scores_of_other_images_are_refused(serve):
    """A cache or a queue that mixes up two requests: the ids say so."""
    kept = {}

    def answer(n, path, body):
        kept.setdefault("ids", body["ids"])
        return 200, mean_scores(body) | kept

    reward = load("http", paths=serve(answer).url + QUICK)
    assert reward(images(2), PROMPTS[:2])[0].shape == (2,)
    with pytest.raises(RewardError, match="of other images than were sent"):
        reward(images(2), PROMPTS[:2])


def test_a_trainer_that_waits_for_a_server_ends_within_five_seconds(serve, tmp_path):
    release = threading.Event()
    server = serve(lambda n, path, body: (release.wait(60), (200, mean_scores(body)))[1])
    root = Path(rewards.__file__).parent
    flags = f"--preset tiny --num-prompts 2 --group-size 2 --steps 2 --eval-images 0 --runs {tmp_path} --reward http"
    command = [sys.executable, "grpo.py", *flags.split(), "--reward-path", f"http={server.url}#batch=1&timeout=60"]
    process = subprocess.Popen(command, cwd=root, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        while len(server.seen) < 4:
            time.sleep(0.05)
            assert process.poll() is None, process.stderr.read()
        start = time.monotonic()
        process.send_signal(signal.SIGTERM)
        said = next(line for line in process.stderr if "stopped by" in line or "Traceback" in line)
        assert time.monotonic() - start < 5 and "Traceback" not in said  # what follows is Python's own end
        process.communicate(timeout=60)
        assert process.returncode == 128 + signal.SIGTERM
    finally:
        release.set(), process.kill(), process.wait()


def test_the_documentation_names_every_reward_and_setting():
    for name in (*rewards.REWARDS, *rewards.DIVERSITY):
        assert any(f"`{name}`" in line.split("|")[1] for line in DOCS.splitlines() if line.startswith("| ")), name
    for key, value in served.HTTP.items():
        assert f"`{key}={value:g}`" in DOCS
    for key in {key for options in served.OPTIONS.values() for key in options}:
        assert f"`{key}=" in DOCS, key


# ---- start-up -------------------------------------------------------------------------------------------------------
def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.mark.parametrize("name", ["deqa", "http", "rubric"])
def test_bad_urls_and_absent_servers_are_found_at_start_up(name):
    for path, words in ((None, f"give --reward-path {name}=http://HOST:PORT/PATH"), ("localhost:8000", "is no URL"),
                        ("ftp://host/x", "is no URL"), ("http:///x", "is no URL"), ("http://host:99999/", "is no URL"),
                        ("http://host/#again=3", "again=3 is no setting; these are: .*tries=8"),
                        ("http://host/#tries=0", "tries=0 is no setting"),
                        ("http://host/#timeout=nan", "timeout=nan"), ("http://host/#batch=2.5", "batch=2.5"),
                        (f"http://127.0.0.1:{free_port()}/", "no server at .*refused.*; start it")):  # fmt: skip
        start = time.monotonic()
        with pytest.raises(UsageError, match=words) as e:
            check(name, {name: path} if path else None)
        assert "\n" not in str(e.value) and time.monotonic() - start < 6


def test_urls_are_paths_like_the_others():
    found = rewards.parse_paths(["deqa=http://h:1/a?b=c#tries=2", "http=https://h/x"])
    assert found == {"deqa": "http://h:1/a?b=c#tries=2", "http": "https://h/x"}
    assert rewards.parse_paths("http://h:1/?a=b") == {"": "http://h:1/?a=b"}
    url, settings = served.read_url("deqa", "https://h/x?y=1#timeout=60&workers=2")
    assert url == "https://h/x?y=1" and settings == served.HTTP | {"timeout": 60.0, "workers": 2}


PICKLE_SERVER = """
import http.server, io, pickle
from PIL import Image
class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        asked = pickle.loads(self.rfile.read(int(self.headers["Content-Length"])))
        images = [Image.open(io.BytesIO(data), formats=["jpeg"]) for data in asked["images"]]
        scores = [image.convert("L").resize((1, 1)).getpixel((0, 0)) / 255 for image in images]
        geneval = any(asked["meta_datas"])
        content = pickle.dumps({"scores": [0] * len(scores), "rewards": scores} if geneval else {"outputs": scores})
        self.send_response(200)
        self.end_headers()
        self.wfile.write(content)
    def log_message(self, *args):
        pass
server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
print(server.server_port, flush=True)
server.serve_forever()
"""


def test_the_shim_of_the_documentation_before_a_server_that_speaks_pickle(tmp_path):
    """Flow-GRPO's protocol, in two processes: that server, and ours with the shim."""
    shim = next(block for block in DOCS.split("```") if "# shim.py" in block).removeprefix("python\n")
    (tmp_path / "shim.py").write_text(shim)
    (tmp_path / "server.py").write_text((Path(served.__file__).parent / "server.py").read_text())
    theirs = subprocess.Popen([sys.executable, "-c", PICKLE_SERVER], stdout=subprocess.PIPE, text=True)
    port = int(theirs.stdout.readline())
    env = {"PATH": "/usr/bin:/bin", "SERVER": f"http://127.0.0.1:{port}", "no_proxy": "127.0.0.1"}
    command = [sys.executable, "server.py", "shim:score", "0"]
    ours = subprocess.Popen(command, cwd=tmp_path, env=env, stdout=subprocess.PIPE, text=True)
    try:
        x = torch.tensor([0.2, 0.6, 1]).view(3, 1, 1, 1).expand(3, 3, 16, 16)
        reward = load("http", paths=f"http://127.0.0.1:{ours.stdout.readline().split()[-1]}{QUICK}")
        for extra in (None, [{"tag": "colors"}] * 3):
            assert torch.allclose(reward(x, PROMPTS[:3], extra)[0], x[:, 0, 0, 0], atol=2.1 / 255)
    finally:
        for process in (theirs, ours):
            process.kill(), process.wait(), process.stdout.close()


def test_nothing_of_ours_reads_a_pickle():
    root = Path(rewards.__file__).parent
    for file in (root / "rewards.py", root / "eval.py", root / "harness.py", *root.glob("judges/*.py")):
        assert "import pickle" not in file.read_text(), file
