"""Text rendering: reads the text between the first two double quotes of the prompt off the image.

The rule of Flow-GRPO (github.com/yifan123/flow_grpo) and AWM, with rapidocr in place of PaddleOCR, which
brings a framework of its own.  Letters need about 15 pixels.
"""

import torch

from rewards import need, pixels


def ocr_target(prompt: str) -> str:
    """The text between the first two double quotes; UsageError if there is none."""
    parts = prompt.split('"')
    there = len(parts) > 2 and parts[1].strip()
    need(there, f'{prompt!r} has no text between two double quotes; write e.g. a sign that says "Hello"')
    return parts[1]


def ocr_score(text: str, target: str) -> float:
    """1 if target is in text, else 1 - min(edit distance, n) / n, n = len(target); no case, no spaces."""
    text, target = (s.lower().replace(" ", "") for s in (text, target))
    if target in text:
        return 1.0
    row = list(range(len(target) + 1))  # distance of what was read so far to each beginning of the target
    for i, a in enumerate(text, 1):
        above, row = row, [i]
        for j, b in enumerate(target, 1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (a != b)))
    return 1 - min(row[-1], len(target)) / len(target)  # other text is no worse than none


def ocr(name, device, dtype, places):
    from rapidocr import RapidOCR

    params = {  # all here: arguments of a call persist in the engine
        "Global.log_level": "critical",
        "Global.use_cls": False,
        "Det.limit_side_len": 960,  # with max: PaddleOCR's own detector size
        "Det.limit_type": "max",
        # by default every process takes all cores and spins on them: with torchrun cores x processes
        "EngineConfig.onnxruntime.intra_op_num_threads": torch.get_num_threads(),
    }
    engine = RapidOCR(params=params)

    def fn(images, prompts, metadata):
        read = ["".join(engine(image[..., ::-1]).txts or ()) for image in pixels(images)]  # BGR
        return torch.tensor([ocr_score(text, ocr_target(p)) for text, p in zip(read, prompts)])

    return fn
