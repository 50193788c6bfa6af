"""Time and memory of each reward per image, at the published sizes, with random weights: no download.

    python benchmarks/rewards.py                          # CPU, one thread, one 512 x 512 image a call; minutes
    python benchmarks/rewards.py --device cuda --batch 16 --names hpsv2 imagereward

Random weights cost what trained ones cost.  Each reward runs in a process of its own, so that its memory is its own:
"weights" are the parameters, "score" and "gradient" the highest mark above the loaded model's during a call without
and with the gradient with respect to the image (resident set on a CPU, Linux only; allocated on a GPU).  Seconds are
the process's on a CPU, so that other work on the machine counts little, and the clock's on a GPU.  GenEval's colour
step is measured by itself (it depends on what is found), unifiedreward, deqa and http on your server.
"""

import argparse
import functools
import json
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import rewards  # noqa: E402
from judges import clip as clip_judge  # noqa: E402
from judges import geneval  # noqa: E402
from judges import imagereward as blip  # noqa: E402

WORDS = 20  # tokens of a prompt


class Tokenizer:
    """Random ids in place of words."""

    eos_token_id = 49407

    def __call__(self, prompt, **options):
        ids = torch.randint(1, 49000, (1, WORDS))
        ids[0, -1] = self.eos_token_id
        return SimpleNamespace(input_ids=ids)


def clip(size: str, mode="crop"):
    """A CLIPModel of this published size behind clip_judge.Clip; gelu only for the open_clip ones (h14)."""
    from transformers import CLIPConfig, CLIPModel

    widths = {"b32": (768, 12, 12, 32, 512, 8), "l14": (1024, 24, 16, 14, 768, 12)}
    if size == "h14":
        vision, text = clip_judge.HPS_VISION, clip_judge.HPS_TEXT
    else:
        width, layers, heads, patch, text_width, text_heads = widths[size]
        vision = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers,
                  "num_attention_heads": heads, "patch_size": patch, "image_size": 224}  # fmt: skip
        text = {"hidden_size": text_width, "intermediate_size": 4 * text_width, "num_hidden_layers": 12,
                "num_attention_heads": text_heads, "vocab_size": 49408, "eos_token_id": 49407}  # fmt: skip
    config = CLIPConfig(vision_config=vision, text_config=text, projection_dim=text["hidden_size"])
    return CLIPModel(config), lambda model: clip_judge.Clip(model, Tokenizer(), mode)


def clip_type(size, mode="crop"):
    model, wrap = clip(size, mode)
    return model, lambda x: wrap(model).cosine(x, ["a prompt"] * len(x))  # a new Clip: its texts are not yet known


def aesthetic():
    model, wrap = clip("l14")
    weight = torch.randn(768)
    return model, lambda x: wrap(model).images(x) @ weight.to(x.device)


def imagereward():
    model = blip.ImageReward(blip.BLIP_VISION, blip.BLIP_TEXT)
    ids, length = torch.randint(1, 30000, (1, blip.REWARD_TOKENS)), blip.BLIP_VISION["image_size"]

    def score(x):
        pixels = clip_judge.clip_input(x, length)
        text = ids.to(x.device).expand(len(x), -1)
        return model(pixels, text, torch.ones_like(text))

    return model, score


def detector():
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig

    names = dict(enumerate(geneval.NAMES))
    swin = SwinConfig(embed_dim=96, depths=[2, 2, 18, 2], num_heads=[3, 6, 12, 24], window_size=7, image_size=224,
                      out_features=["stage1", "stage2", "stage3", "stage4"])  # fmt: skip
    model = Mask2FormerForUniversalSegmentation(
        Mask2FormerConfig(backbone_config=swin, id2label=names, label2id={v: k for k, v in names.items()})
    )
    return model, lambda x: torch.tensor([float(len(found)) for found in geneval.Detector(model)(x)])


def colors():
    model, wrap = clip("l14")
    wrapped = []

    def score(x):
        wrapped[:] = wrapped or [wrap(model)]  # its 30 texts a class are encoded once, in the first call
        things = [(i, geneval.Found("car", 1.0, (100, 100, 400, 300))) for i in range(len(x))]
        geneval.name_colors(wrapped[0], x, things)
        return torch.zeros(len(x))

    return model, score


def black_box(name):
    reward = rewards.load(name)
    prompts = {"ocr": 'a sign that says "Hello"', "shapes": "a red circle"}
    return torch.nn.Identity(), lambda x: reward(x, [prompts.get(name, "a prompt")] * len(x))[0]


CASES = {  # name: (its function, differentiable, side of the image)
    "clipscore": (functools.partial(clip_type, "l14"), True, 512),
    "clipscore-hessel": (functools.partial(clip_type, "b32"), True, 512),
    "aesthetic": (aesthetic, True, 512),
    "hpsv2, pickscore": (functools.partial(clip_type, "h14", "pad"), True, 512),
    "imagereward": (imagereward, True, 512),
    "geneval, detector": (detector, False, 512),
    "geneval, colour of one object": (colors, False, 512),
    "ocr": (functools.partial(black_box, "ocr"), False, 512),
    "jpeg": (functools.partial(black_box, "jpeg"), False, 512),
    "shapes": (functools.partial(black_box, "shapes"), False, 32),
}


def measure(name, device, batch, repeats) -> dict:
    """Seconds per image and MB of one reward."""
    torch.manual_seed(0)
    make, differentiable, side = CASES[name]
    cuda = torch.device(device).type == "cuda"

    def memory(peak):
        """MB now, or the most since the last reset."""
        if cuda:
            torch.cuda.synchronize()
            return (torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()) / 1e6
        lines = Path("/proc/self/status").read_text().splitlines()
        key = "VmHWM:" if peak else "VmRSS:"
        return next(int(line.split()[1]) for line in lines if line.startswith(key)) * 1024 / 1e6

    def reset():
        torch.cuda.reset_peak_memory_stats() if cuda else Path("/proc/self/clear_refs").write_text("5")

    model, score = make()
    model.to(device).eval().requires_grad_(False)
    weights = sum(p.numel() * p.element_size() for p in model.parameters()) / 1e6
    x = torch.rand(batch, 3, side, side, device=device)
    found = {"reward": name, "weights MB": weights}

    def timed(call):
        reset()
        before = memory(peak=False)
        call()  # the first one is slower
        clock = time.perf_counter if cuda else time.process_time
        start = clock()
        for _ in range(repeats):
            call()
        peak = memory(peak=True)  # on a GPU this waits for the work
        return (clock() - start) / repeats / batch, peak - before

    def with_gradient():
        y = x.clone().requires_grad_()
        return torch.autograd.grad(score(y).sum(), y)[0]

    with torch.no_grad():
        found["score s"], found["score MB"] = timed(lambda: score(x))
    if differentiable:
        found["gradient s"], found["gradient MB"] = timed(with_gradient)
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--names", nargs="*", default=list(CASES), choices=list(CASES), metavar="NAME", help="which")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, default=1, help="images a call")
    parser.add_argument("--repeats", type=int, default=1, help="timed calls, after one that is not")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--one", action="store_true", help="measure in this process and print JSON (used internally)")
    args = parser.parse_args()
    if args.one:
        torch.set_num_threads(args.threads)
        print(json.dumps(measure(args.names[0], args.device, args.batch, args.repeats)))
        return
    columns = ["score s", "gradient s", "weights MB", "score MB", "gradient MB"]
    print(f"| reward | {' | '.join(columns)} |\n|{'---|' * (len(columns) + 1)}")
    for name in args.names:
        options = [
            "--device",
            args.device,
            "--batch",
            args.batch,
            "--repeats",
            args.repeats,
            "--threads",
            args.threads,
        ]
        command = [sys.executable, __file__, "--one", "--names", name, *map(str, options)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            print(f"| {name} | {(done.stderr.strip().splitlines() or ['failed'])[-1]} |", flush=True)
            continue
        found = json.loads(done.stdout.splitlines()[-1])
        cells = [f"{found[c]:.{2 if c.endswith(' s') else 0}f}" if c in found else "-" for c in columns]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
