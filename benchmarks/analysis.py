"""Seconds of the analysis in the trainer: most clipped tokens and share of loops.

    python benchmarks/analysis.py [--output FILE]

It prints two tables. The first is measured in a run of the toy, by clocks around each part. The
second is computed at the size of a real run, on the CPU of this machine: per step 1,024 responses
of 2,048 tokens, vocabulary 151,936, 128 responses truncated at 8,192 tokens.
"""

import argparse
import functools
import json
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import lite_ppo
from support import logs, metrics
from support.stats import is_looping


def add_clock(owner, name: str, spent: dict[str, float], part: str) -> None:
    """Replace owner.name by a function that adds its seconds to spent[part]."""
    inner = getattr(owner, name)

    @functools.wraps(inner)
    def timed(*args, **kwargs):
        began = time.perf_counter()
        try:
            return inner(*args, **kwargs)
        finally:
            spent[part] += time.perf_counter() - began

    setattr(owner, name, timed)


def toy_run(steps: int, more_flags: str = "") -> dict[str, float]:
    """Seconds of each part of the analysis in a run of the toy, and of its steps."""
    spent: dict[str, float] = defaultdict(float)
    add_clock(logs.Log, "clipped", spent, "clipped.jsonl")
    add_clock(metrics, "is_looping", spent, "looping share")
    add_clock(torch.Tensor, "index_add_", spent, "counts of clipped tokens")
    with tempfile.TemporaryDirectory() as folder:
        flags = f"--sampler transformers --steps {steps} --eval-every 0 --eval-size 8"
        flags += f" --output-dir {folder} {more_flags}"
        sys.argv = ["lite_ppo.py", *flags.split()]
        if code := lite_ppo.main():
            sys.exit(code)
        rows = logs.read_jsonl(Path(folder) / "metrics.jsonl")
    spent["steps"] = sum(row.get("time/step", 0) for row in rows)
    return dict(spent)


def real_size(
    vocabulary: int = 151_936,
    tokens: int = 2**21,
    micro_batch: int = 16_384,
    truncated: int = 128,
    length: int = 8192,
) -> dict[str, float]:
    """Seconds per step of each part, with the numbers of a real run."""
    seconds, generator = {}, torch.Generator().manual_seed(0)
    counts = torch.zeros(2, vocabulary)
    targets = torch.randint(vocabulary, (micro_batch,), generator=generator)
    masks = torch.rand(2, micro_batch, generator=generator) < 0.003
    began = time.perf_counter()
    for _ in range(tokens // micro_batch):
        for side, mask in zip(counts, masks, strict=True):
            side.index_add_(0, targets, mask.float())
    seconds["counts of clipped tokens"] = time.perf_counter() - began

    began = time.perf_counter()
    for side in counts:
        side.topk(20)
    seconds["clipped.jsonl"] = time.perf_counter() - began

    responses = torch.randint(vocabulary, (truncated, length), generator=generator)
    began = time.perf_counter()
    loops = sum(map(is_looping, responses))
    seconds["looping share"] = time.perf_counter() - began
    assert loops == 0  # the slow case: every period is tried
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--flags", default="", help="more flags of lite_ppo.py, in one string")
    parser.add_argument("--output", type=Path, help="JSON file")
    args = parser.parse_args()
    result = {"toy": toy_run(args.steps, args.flags), "real size": real_size()}
    for title, parts in result.items():
        print(title)
        for name, seconds in parts.items():
            print(f"  {name}: {1000 * seconds:.1f} ms")
    steps = result["toy"]["steps"]
    analysis = sum(result["toy"].values()) - steps
    print(f"share of the steps of the toy: {analysis / steps:.2%}")
    if args.output:
        args.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
