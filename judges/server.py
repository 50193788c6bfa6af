"""A reward server: copy this one file beside your model, into whatever environment it needs (Python 3.8, Pillow).

    python server.py my_model:score 8000                # then --reward http --reward-path http=http://HOST:8000

my_model.score(images, prompts, metadata): lists of PIL images, texts and JSON objects -> a number for each image,
larger is better.  Recipes for HPSv3, DeQA-Score and Flow-GRPO's servers: docs/rewards.md.
"""

import base64
import http.server
import importlib
import io
import json
import os
import sys
import threading
import traceback

from PIL import Image

ONE = threading.Lock()  # requests come side by side, a model computes one after the other


def answer(score, body):
    """What came as JSON -> what goes back: the ids tie each score to the image it is of."""
    images = [Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB") for data in body["images"]]
    with ONE:
        scores = [float(v) for v in score(images, body["prompts"], body["metadata"])]
    if len(scores) != len(images):
        raise ValueError(f"{len(scores)} scores for {len(images)} images")
    return {"scores": scores, "ids": body.get("ids", [])}


def handler(score, key):
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body, status = self.rfile.read(int(self.headers["Content-Length"])), 200
            try:
                if key and self.headers.get("Authorization") != "Bearer " + key:
                    status, content = 401, b"wrong REWARD_API_KEY"
                else:
                    content = json.dumps(answer(score, json.loads(body))).encode()
            except Exception as problem:  # the trainer shows it; 400: asking again would not help
                traceback.print_exc()
                status, content = 400, repr(problem).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *args):
            pass

    return Handler


def main():
    place, port = sys.argv[1:]
    module, _, function = place.partition(":")
    sys.path.insert(0, os.getcwd())
    score = getattr(importlib.import_module(module), function)
    server = http.server.ThreadingHTTPServer(("", int(port)), handler(score, os.environ.get("REWARD_API_KEY")))
    print("serving", place, "on port", server.server_port, flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
