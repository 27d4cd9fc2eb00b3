"""What the analysis in the trainer costs: most clipped tokens, looping share, reward spread.

    python benchmarks/analysis.py [--output FILE]

Two tables: the share of a toy run's steps that goes into it, measured by clocks around it; and seconds per step at the size of a real run (1,024 responses of
2,048 tokens, of which 128 are cut at 8,192; vocabulary 151,936), on this machine's CPU.
"""

import argparse
import json
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import lite_ppo
import rundir
import torch
import tricks


def toy_run(steps: int) -> dict[str, float]:
    """Seconds in the analysis, by part, and of the steps."""
    spent = defaultdict(float)

    def clocked(owner, name: str, part: str) -> None:
        inner = getattr(owner, name)

        def outer(*args, **kwargs):
            began = time.perf_counter()
            try:
                return inner(*args, **kwargs)
            finally:
                spent[part] += time.perf_counter() - began

        setattr(owner, name, outer)

    clocked(rundir.Log, "clipped", "clipped.jsonl")
    clocked(tricks, "is_looping", "looping share")
    clocked(torch.Tensor, "index_add_", "counts of clipped tokens")
    with tempfile.TemporaryDirectory() as folder:
        sys.argv = ["lite_ppo.py", "--sampler", "transformers", "--steps", str(steps), "--eval-every", "0", "--eval-size", "8", "--output-dir", folder]
        assert lite_ppo.main() == 0
        spent["steps"] = sum(row.get("time/step", 0) for row in rundir.read_jsonl(Path(folder) / "metrics.jsonl"))
    return dict(spent)


def real_size(vocabulary: int = 151_936, tokens: int = 2**21, pack: int = 16_384, cut: int = 128, length: int = 8192) -> dict[str, float]:
    """Seconds per step of each part, with the numbers of a real run."""
    found, draw = {}, torch.Generator().manual_seed(0)
    counts, targets = torch.zeros(2, vocabulary), torch.randint(vocabulary, (pack,), generator=draw)
    masks = torch.rand(2, pack, generator=draw) < 0.003
    began = time.perf_counter()
    for _ in range(tokens // pack):
        for side, mask in zip(counts, masks):
            side.index_add_(0, targets, mask.float())
    found["counts of clipped tokens"] = time.perf_counter() - began
    began = time.perf_counter()
    for side in counts:
        side.topk(20)
    found["clipped.jsonl"] = time.perf_counter() - began
    responses = torch.randint(vocabulary, (cut, length), generator=draw)
    began = time.perf_counter()
    assert not any(map(tricks.is_looping, responses))  # none of them is the slow case: all periods are tried
    found["looping share"] = time.perf_counter() - began
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    result = {"toy": toy_run(args.steps), "real size": real_size()}
    for title, parts in result.items():
        print(title, *(f"  {name}: {1000 * seconds:.1f} ms" for name, seconds in parts.items()), sep="\n")
    analysis = sum(seconds for name, seconds in result["toy"].items() if name != "steps")
    print(f"of the toy's steps: {analysis / result['toy']['steps']:.2%}")
    if args.output:
        args.output.write_text(json.dumps(result, indent=2) + "\n")
