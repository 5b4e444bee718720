"""Generation against transformers' with the same weights and its own cache: GPT-2 small's shape, 128 new tokens.

What a step must read is every weight of the linear layers once (the embedding as the last layer's); the last columns
say how much of that the memory delivers, as a share of the fastest plain read.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

import torch

from fastlm.bench.cases import NAMES
from fastlm.bench.harness import Comparison, compare, read_bandwidth, write_results
from fastlm.models import GPT

THEIRS, OURS, INT8 = "transformers", "FastLM", "FastLM, int8"
PROMPT, NEW = 32, 128
CASES = {"batch 1": (1, 1), "batch 8": (8, 1), "5 beams": (1, 5)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=30.0, help="for each case")
    parser.add_argument("--only", default="", help="cases whose name has this in it")
    arguments = parser.parse_args()
    try:
        import transformers
    except ImportError:
        print("bench_generate: transformers is not installed: pip install fastlm[hf]")
        return 0
    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    results: list[Comparison] = []
    bandwidth = read_bandwidth()
    print(f"reading memory: {bandwidth / 1e9:.1f} GB/s")
    for dtype in (torch.float32, torch.bfloat16):
        theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config()).to(dtype).eval()
        theirs.generation_config = transformers.GenerationConfig()
        ours = GPT.from_pretrained(theirs).eval()
        layers = [p for name, p in ours.named_parameters() if p.dim() == 2 and "position" not in name]
        for name, (batch, beams) in CASES.items():
            title = f"{name}, {NAMES[dtype]}"
            if arguments.only not in title:
                continue
            ids = torch.randint(50257, (batch, PROMPT))
            sides: dict[str, Callable[[], object]] = {
                THEIRS: lambda ids=ids, beams=beams, theirs=theirs: theirs.generate(
                    ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False, num_beams=beams
                ),
                OURS: lambda ids=ids, beams=beams, ours=ours: ours.generate(ids, NEW, num_beams=beams),
                INT8: lambda ids=ids, beams=beams, ours=ours: ours.generate(ids, NEW, num_beams=beams, quantize="int8"),
            }
            bytes = NEW * sum(p.nbytes for p in layers)
            results.append(compare(title, sides, bytes=bytes, seconds=arguments.seconds, least=3))

    def share(side: str) -> Callable[[Comparison], str]:
        return lambda c: f"{c.bytes / c.median(side) / bandwidth:.0%}"

    columns = [
        ("int8 / transformers, speed", lambda c: f"{c.ratio(INT8, THEIRS):.2f}"),
        *((f"{side}, share of {bandwidth / 1e9:.1f} GB/s", share(side)) for side in (THEIRS, OURS)),
    ]
    title = f"GPT-2 small's shape, {PROMPT} tokens of prompt, {NEW} new ones: transformers and FastLM"
    write_results("generate", title, results, columns, lambda c: c.ratio(OURS, THEIRS), "FastLM / transformers, speed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
