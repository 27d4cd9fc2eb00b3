"""How the update scales with response length, group size and ranks: measured here; and a paper model of what GPUs would do.

    python benchmarks/scaling.py [--output scaling.json]            # measured: torchrun on CPU cores of this machine
    python benchmarks/scaling.py --paper [--output paper.json]      # arithmetic: 8 to 256 GPUs, nothing is run

Measured: benchmarks/step.py --update-only in fresh processes, each rank pinned to one core with one thread; seconds are those
of the update phase, memory is the peak of a rank. The runs on 1 and on 2 ranks do the same update of the same responses; both
alternate, and after five optimizer steps from the same weights the results must agree.

Paper: each term and each assumption is printed. It has not been measured on any of these machines: use it to see which term
will dominate and what hybrid sharding would change, not to plan a budget.
"""

import json
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import common
import torch
import tyro


@dataclass
class Args:
    paper: bool = False
    shape: str = "small"
    lengths: tuple[int, ...] = (128, 256, 512, 1024)  # tokens of a sequence, at 2 x 4 sequences
    group_sizes: tuple[int, ...] = (4, 8, 16)  # at 2 prompts and the second of the lengths
    ranks: tuple[int, ...] = (1, 2)
    repeats: int = 3  # of the runs on 1 and 2 ranks
    micro_batch_tokens: int = 4096  # the default of the trainer is 16,384
    output: str = ""  # JSON file


# ---- measured --------------------------------------------------------------------------------------------------------


def measure(args: Args, folder: str, ranks: int, length: int, group_size: int, rounds: int, **flags) -> dict:
    """One process per rank; its update phase."""
    out = Path(folder, "result.json")
    flags = dict(shape=args.shape, update_only=length, prompt_length=min(32, length // 4), prompts_per_step=2, group_size=group_size, rounds=rounds,
                 micro_batch_tokens=args.micro_batch_tokens, keep_model=folder, output=out) | flags  # fmt: skip
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", str(common.ROOT / "benchmarks/step.py"),
               "--no-activation-checkpointing", "--pin", *(f"--{k.replace('_', '-')}={v}" for k, v in flags.items())]  # fmt: skip
    run = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if run.returncode:
        sys.exit(f"{' '.join(command)}\n{run.stdout}")
    result = json.loads(out.read_text())
    row = next(row for row in result["rows"] if row["phase"] == "update")
    return {"ranks": ranks, "tokens a sequence": length, "group size": group_size, "update s": row["seconds"], "tokens/s": row["tokens/s"],
            "peak GiB of a rank": row["peak GiB of a rank"], "model GFLOP": 1e3 * result["totals"]["model TFLOP"]}


def measured(args: Args) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        rows = [measure(args, folder, 1, length, 4, 2) for length in args.lengths]
        rows += [measure(args, folder, 1, args.lengths[1], size, 2) for size in args.group_sizes if size != 4]
        common.table(rows)
        print()
        runs: dict[int, list[dict]] = {ranks: [] for ranks in args.ranks}
        for i in range(args.repeats):
            for ranks in args.ranks:  # step.py warms up once: 5 optimizer steps
                weights = {"weights": Path(folder, f"weights-{ranks}.pt")} if i == 0 else {}
                runs[ranks].append(measure(args, folder, ranks, args.lengths[1], 8, 4, lr=1e-4, **weights))
        states = {ranks: torch.load(Path(folder, f"weights-{ranks}.pt")) for ranks in args.ranks}
        start = dict(item for file in Path(folder).glob("*/*.safetensors") for item in load(file).items())
    first = args.ranks[0]
    together = [dict(runs[ranks][0], **{key: median(run[key] for run in runs[ranks]) for key in ("update s", "tokens/s", "peak GiB of a rank")},
                     speedup=median(a["update s"] / b["update s"] for a, b in zip(runs[first], runs[ranks]))) for ranks in args.ranks]
    common.table(together)
    flat = {ranks: torch.cat([tensor.flatten() for _, tensor in sorted(state.items())]) for ranks, state in states.items()}
    before = torch.cat([start.get(name, start["model.embed_tokens.weight"]).float().flatten() for name in sorted(states[first])])
    error = max(float((flat[ranks] - flat[first]).norm() / flat[first].norm()) for ranks in args.ranks)
    moved = float((flat[first] - before).norm() / before.norm())
    print(f"\nfive updates moved the weights by {moved:.2g} of their norm")
    checks = [common.check(f"throughput of {args.ranks[-1]} ranks / {first}, a core each", together[-1]["speedup"], 1.6, above=True),
              common.check(f"weights after 5 updates, {args.ranks[-1]} ranks against {first}, relative", error, 1e-5)]
    return dict(rows=rows, ranks=together, runs=runs, moved=moved, checks=checks)


def load(file: Path) -> dict:
    from safetensors.torch import load_file

    return load_file(file)


# ---- on paper --------------------------------------------------------------------------------------------------------

GPUS = {"H100": (80e9, 3.35e12), "H200": (141e9, 4.8e12)}  # bytes of memory, bytes/s of it
ASSUMED = {
    "peak": (989e12, "FLOP/s of a GPU, dense bfloat16"),
    "mfu": (0.35, "of it in the update, under activation checkpointing, recomputation not counted"),
    "node": (8, "GPUs of a machine"),
    "nvlink": (300e9, "bytes/s that a GPU gets in a collective inside a machine"),
    "network": (40e9, "bytes/s of a GPU's own network adapter"),
    "hop": (5e-6, "seconds that a collective takes per rank, however small it is"),
    "prompts": (128, "a step"),
    "group": (8, "responses to each"),
    "prompt_length": (200, "tokens"),
    "mean_length": (3000, "tokens of a response"),
    "square": (1.5, "mean of the squared lengths / square of the mean length"),
    "longest": (8192, "tokens of the longest response: the rollout waits for it"),
    "micro_batch": (16_384, "tokens"),
    "concurrent": (256, "sequences that a GPU decodes at once, at most; its memory may allow fewer"),
    "sampler": (0.6, "share of a GPU's memory for the sampler, weights and cache"),
    "cache": (0.2, "share of it that must be left for the cache, else tensor parallelism doubles"),
    "decode": (0.6, "share of the memory bandwidth that decoding reaches"),
    "launch": (4e-3, "seconds of a decoding step beside memory traffic"),
}


def paper_row(model: str, gpu: str, gpus: int, hybrid: bool, a: SimpleNamespace) -> dict:
    """Seconds of a step, and whether the trainer's state fits beside the sampler (memory_plan.py knows the rest of the memory)."""
    s, (memory, bandwidth) = common.SHAPES[model], GPUS[gpu]
    D, layers, width, kv = s["hidden_size"], s["num_hidden_layers"], s["num_attention_heads"] * s["head_dim"], s["num_key_value_heads"] * s["head_dim"]
    block, head = 2 * D * (width + kv) + 3 * D * s["intermediate_size"], D * s["vocab_size"]
    weights = layers * block + head * (1 if s["tie_word_embeddings"] else 2)
    responses, length = a.prompts * a.group, a.prompt_length + a.mean_length
    # Update: the operations, shared evenly.
    flops = responses * (6 * (layers * block * length + head * a.mean_length) + 6 * layers * width * a.square * length**2)
    compute = flops / (gpus * a.peak * a.mfu)
    # A micro-batch gathers the bfloat16 weights in forward and in backward and reduce-scatters float32 gradients. Across machines all
    # adapters of a machine carry it together. Hybrid sharding keeps the three inside a machine; between machines it all-reduces the shard.
    shard = min(gpus, a.node) if hybrid else gpus
    speed, micro_batches = min(a.nvlink, a.network * a.node) if shard > a.node else a.nvlink, max(1, responses * length / a.micro_batch / gpus)
    traffic = micro_batches * ((2 + 2 + 4) * weights * (shard - 1) / shard / speed + 3 * (layers + 1) * (shard - 1) * a.hop)
    if (machines := gpus / shard) > 1:
        traffic += micro_batches * (2 * 4 * weights / shard * (machines - 1) / machines / a.network + 2 * (layers + 1) * (machines - 1) * a.hop)
    update = max(compute, traffic)  # at best they overlap
    sync = 2 * weights * (shard - 1) / shard / speed  # every parameter gathered once, in bfloat16
    # Rollout: a decoding step reads the weights and every live key and value, and there are at least as many as the longest response has tokens.
    parallel = 1
    while (room := (a.sampler * parallel * memory - 2 * weights)) < a.cache * a.sampler * parallel * memory:
        parallel *= 2
    mine, cache = responses * parallel / gpus, 4 * kv * layers  # responses of an engine; bytes of a token
    live = min(mine, a.concurrent * parallel, room / (cache * length))
    steps = max(a.longest, mine * a.mean_length / live)
    traffic_of_step = 2 * weights + mine * a.mean_length / steps * cache * (a.prompt_length + a.mean_length / 2)
    rollout = steps * (traffic_of_step / (bandwidth * a.decode * parallel) + a.launch)
    state, seconds = 16 * weights / shard, rollout + update + sync  # float32 weights, gradients and two moments
    return {"model": model, "GPUs": f"{gpus} {gpu}", "sharding": "hybrid" if hybrid else "full", "TP": parallel, "rollout s": rollout, "compute s": compute,
            "traffic s": traffic, "sync s": sync, "step s": seconds, "rollout": f"{rollout / seconds:.0%}", "tokens/s": responses * a.mean_length / seconds,
            "state GB": state / 1e9, "fits": "yes" if state + a.sampler * memory < 0.92 * memory else "NO"}  # fmt: skip


def paper() -> dict:
    print("NOT MEASURED: arithmetic from these assumptions.\n")
    print("\n".join(f"{key:15s}{value:<10.4g}{meaning}" for key, (value, meaning) in ASSUMED.items()))
    print("\n".join(f"{gpu:15s}{facts[0] / 1e9:g} GB of memory at {facts[1] / 1e12:g} TB/s" for gpu, facts in GPUS.items()), end="\n\n")
    a = SimpleNamespace(**{key: value for key, (value, _) in ASSUMED.items()})
    rows = [paper_row(model, gpu, gpus, hybrid, a) for model in ("qwen3-4b", "qwen3-8b", "qwen3-32b") for gpu in GPUS
            for gpus in (8, 16, 32, 64, 128, 256) for hybrid in (False, True) if gpus > a.node or not hybrid]  # fmt: skip
    common.table(rows)
    return dict(assumed=ASSUMED, gpus=GPUS, rows=rows)


def main(args: Args) -> None:
    results = paper() if args.paper else measured(args)
    common.finish(args.output, asdict(args), **results)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
