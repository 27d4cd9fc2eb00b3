"""The update over response lengths, group sizes and ranks: measured here, and on paper for GPUs.

    python benchmarks/scaling.py [--output scaling.json]         # measured: torchrun on CPU cores
    python benchmarks/scaling.py --paper [--output paper.json]   # arithmetic: 8 to 256 GPUs

Measured: benchmarks/step.py --update-only in new processes. Each rank has one core and one thread.
Seconds are those of the update, memory is the peak of a rank. The runs on 1 and on 2 ranks do the
same update of the same responses and alternate. After five optimizer steps from the same weights
the results must agree.

Paper: every term and every assumption is printed. Nothing has been measured on these GPUs. It shows
which term will dominate and what hybrid sharding would change; it is no budget.
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


# ---- measured ------------------------------------------------------------------------------------


@dataclass
class Job:
    """One call of step.py."""

    ranks: int
    length: int  # tokens of a sequence
    group_size: int
    rounds: int
    lr: float = 1e-6
    weights: str = ""  # file for the trained weights


def measure(args: Args, folder: str, job: Job) -> dict:
    """One process per rank. Returns the numbers of the update."""
    out = Path(folder, "result.json")
    flags = dict(
        shape=args.shape,
        update_only=job.length,
        prompt_length=min(32, job.length // 4),
        prompts_per_step=2,
        group_size=job.group_size,
        rounds=job.rounds,
        lr=job.lr,
        micro_batch_tokens=args.micro_batch_tokens,
        keep_model=folder,
        weights=job.weights,
        output=out,
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={job.ranks}", str(common.ROOT / "benchmarks/step.py")]
    command += ["--no-activation-checkpointing", "--pin"]
    command += [f"--{name.replace('_', '-')}={value}" for name, value in flags.items()]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stdout}")
    result = json.loads(out.read_text())
    update = next(row for row in result["rows"] if row["phase"] == "update")
    return {
        "ranks": job.ranks,
        "tokens a sequence": job.length,
        "group size": job.group_size,
        "update s": update["seconds"],
        "tokens/s": update["tokens/s"],
        "peak GiB of a rank": update["peak GiB of a rank"],
        "model GFLOP": 1e3 * result["totals"]["model TFLOP"],
    }


def measure_ranks(args: Args, folder: str) -> dict[int, list[dict]]:
    """The same update on each number of ranks, in alternation; the first repeat saves weights."""
    runs: dict[int, list[dict]] = {ranks: [] for ranks in args.ranks}
    for i in range(args.repeats):
        for ranks in args.ranks:
            job = Job(ranks, args.lengths[1], 8, rounds=4, lr=1e-4)  # 5 steps with the warm-up
            if i == 0:
                job.weights = weights_file(folder, ranks)
            runs[ranks].append(measure(args, folder, job))
    return runs


def weights_file(folder: str, ranks: int) -> str:
    return str(Path(folder, f"weights-{ranks}.pt"))


def summarize_ranks(args: Args, runs: dict[int, list[dict]]) -> list[dict]:
    base, rows = runs[args.ranks[0]], []
    for ranks in args.ranks:
        row = dict(runs[ranks][0])
        for key in ("update s", "tokens/s", "peak GiB of a rank"):
            row[key] = median(run[key] for run in runs[ranks])
        pairs = zip(base, runs[ranks], strict=True)
        row["speedup"] = median(a["update s"] / b["update s"] for a, b in pairs)
        rows.append(row)
    return rows


def compare_weights(args: Args, folder: str) -> tuple[float, float]:
    """(largest relative difference between numbers of ranks, relative length of the way)"""
    from safetensors.torch import load_file

    flat = {}
    for ranks in args.ranks:
        state = torch.load(weights_file(folder, ranks))
        names = sorted(state)
        flat[ranks] = torch.cat([state[name].flatten() for name in names])
    start = {}
    for file in Path(folder).glob("*/*.safetensors"):
        start |= load_file(file)
    tied = start["model.embed_tokens.weight"]  # in place of a head that is not stored
    before = torch.cat([start.get(name, tied).float().flatten() for name in names])
    first = flat[args.ranks[0]]
    errors = [float((other - first).norm() / first.norm()) for other in flat.values()]
    return max(errors), float((first - before).norm() / before.norm())


def measured(args: Args) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        jobs = [Job(1, length, 4, rounds=2) for length in args.lengths]
        sizes = [size for size in args.group_sizes if size != 4]
        jobs += [Job(1, args.lengths[1], size, rounds=2) for size in sizes]
        rows = [measure(args, folder, job) for job in jobs]
        common.table(rows)
        print()
        runs = measure_ranks(args, folder)
        error, moved = compare_weights(args, folder)
    together = summarize_ranks(args, runs)
    common.table(together)
    print(f"\nfive updates moved the weights by {moved:.2g} of their norm")
    first, last = args.ranks[0], args.ranks[-1]
    speedup, throughput = together[-1]["speedup"], f"throughput of {last} ranks / {first}"
    weights = f"weights after 5 updates, {last} ranks against {first}, relative"
    checks = [
        common.check(f"{throughput}, a core each", speedup, 1.6, above=True),
        common.check(weights, error, 1e-5),
    ]
    return dict(rows=rows, ranks=together, runs=runs, moved=moved, checks=checks)


# ---- on paper ------------------------------------------------------------------------------------

GPUS = {"H100": (80e9, 3.35e12), "H200": (141e9, 4.8e12)}  # bytes of memory, bytes/s of it
ASSUMED = {
    "peak": (989e12, "FLOP/s of a GPU, dense bfloat16"),
    "mfu": (0.35, "of it in the update, with activation checkpointing, recomputation not counted"),
    "node": (8, "GPUs of a machine"),
    "nvlink": (300e9, "bytes/s that a GPU gets in a collective inside a machine"),
    "network": (40e9, "bytes/s of a GPU's own network adapter"),
    "hop": (5e-6, "seconds per rank of the smallest collective"),
    "prompts": (128, "a step"),
    "group": (8, "responses to each"),
    "prompt_length": (200, "tokens"),
    "mean_length": (3000, "tokens of a response"),
    "square": (1.5, "mean of the squared lengths / square of the mean length"),
    "longest": (8192, "tokens of the longest response: the rollout waits for it"),
    "micro_batch": (16_384, "tokens"),
    "concurrent": (256, "sequences that a GPU decodes at once, at most; memory may allow fewer"),
    "sampler": (0.6, "share of a GPU's memory for the sampler, weights and cache"),
    "cache": (0.2, "least share of it for the cache; below, an engine takes twice the GPUs"),
    "decode": (0.6, "share of the memory bandwidth that decoding reaches"),
    "launch": (4e-3, "seconds of a decoding step beside memory traffic"),
}


class PaperModel:
    """Seconds of a step and memory, for one model on one set of GPUs, from the assumptions `a`."""

    def __init__(self, model: str, gpu: str, gpus: int, hybrid: bool, a: SimpleNamespace):
        self.a, self.gpus = a, gpus
        self.memory, self.bandwidth = GPUS[gpu]
        self.shard = min(gpus, a.node) if hybrid else gpus  # GPUs that share a copy of the state
        shape = common.SHAPES[model]
        D, self.layers = shape["hidden_size"], shape["num_hidden_layers"]
        self.width = shape["num_attention_heads"] * shape["head_dim"]
        self.kv = shape["num_key_value_heads"] * shape["head_dim"]
        self.head = D * shape["vocab_size"]
        self.block = 2 * D * (self.width + self.kv) + 3 * D * shape["intermediate_size"]
        heads = 1 if shape["tie_word_embeddings"] else 2
        self.weights = self.layers * self.block + self.head * heads
        self.responses, self.length = a.prompts * a.group, a.prompt_length + a.mean_length

    def compute(self) -> float:
        """Seconds of the operations of the update, which all GPUs share."""
        a = self.a
        linear = self.layers * self.block * self.length + self.head * a.mean_length
        attention = self.layers * self.width * a.square * self.length**2
        return self.responses * 6 * (linear + attention) / (self.gpus * a.peak * a.mfu)

    def shard_speed(self) -> float:
        """Bytes/s of a GPU in a collective of the shard; a machine has one adapter per GPU."""
        across_machines = self.shard > self.a.node
        return (
            min(self.a.nvlink, self.a.network * self.a.node) if across_machines else self.a.nvlink
        )

    def traffic(self) -> float:
        """Seconds of the collectives of the update.

        A micro-batch gathers the bfloat16 weights forward and backward, and reduce-scatters
        float32 gradients. Hybrid sharding does so within a machine, and all-reduces the shards
        between machines.
        """
        a, others = self.a, (self.shard - 1) / self.shard
        seconds = (2 + 2 + 4) * self.weights * others / self.shard_speed()
        seconds += 3 * (self.layers + 1) * (self.shard - 1) * a.hop
        machines = self.gpus / self.shard
        if machines > 1:
            seconds += 2 * 4 * self.weights / self.shard * (machines - 1) / machines / a.network
            seconds += 2 * (self.layers + 1) * (machines - 1) * a.hop
        return max(1, self.responses * self.length / a.micro_batch / self.gpus) * seconds

    def sync(self) -> float:
        """Seconds to gather every parameter once, in bfloat16."""
        return 2 * self.weights * (self.shard - 1) / self.shard / self.shard_speed()

    def engine_gpus(self) -> int:
        """GPUs of one engine: twice as many until the cache has room."""
        parallel = 1
        while True:
            share = self.a.sampler * parallel * self.memory
            if share - 2 * self.weights >= self.a.cache * share:
                return parallel
            parallel *= 2

    def rollout(self) -> float:
        """Seconds of decoding.

        Each step reads the weights and all live keys and values. There are at least as many
        steps as tokens in the longest response.
        """
        a, parallel = self.a, self.engine_gpus()
        room = a.sampler * parallel * self.memory - 2 * self.weights
        mine = self.responses * parallel / self.gpus  # responses of an engine
        cache = 4 * self.kv * self.layers  # bytes of a token
        live = min(mine, a.concurrent * parallel, room / (cache * self.length))
        steps = max(a.longest, mine * a.mean_length / live)
        tokens = a.prompt_length + a.mean_length / 2  # of a sequence, on average
        traffic = 2 * self.weights + mine * a.mean_length / steps * cache * tokens
        return steps * (traffic / (self.bandwidth * a.decode * parallel) + a.launch)

    def state(self) -> float:
        """Bytes per GPU: float32 weights, gradients and two moments."""
        return 16 * self.weights / self.shard

    def fits(self) -> bool:
        """Beside the sampler, on GPUs with an engine each; memory_plan.py counts the rest."""
        room = 0.92 * self.memory - self.a.sampler * self.memory
        return self.engine_gpus() == 1 and self.state() < room


def paper_row(model: str, gpu: str, gpus: int, hybrid: bool, a: SimpleNamespace) -> dict:
    paper = PaperModel(model, gpu, gpus, hybrid, a)
    rollout, sync = paper.rollout(), paper.sync()
    compute, traffic = paper.compute(), paper.traffic()
    step = rollout + max(compute, traffic) + sync  # at best, compute and traffic overlap
    return {
        "model": model,
        "GPUs": f"{gpus} {gpu}",
        "sharding": "hybrid" if hybrid else "full",
        "GPUs of an engine": paper.engine_gpus(),
        "rollout s": rollout,
        "compute s": compute,
        "traffic s": traffic,
        "sync s": sync,
        "step s": step,
        "rollout": f"{rollout / step:.0%}",
        "tokens/s": paper.responses * a.mean_length / step,
        "state GB": paper.state() / 1e9,
        "fits": "yes" if paper.fits() else "NO",
    }


def paper() -> dict:
    print("NOT MEASURED: arithmetic from these assumptions.\n")
    for key, (value, meaning) in ASSUMED.items():
        print(f"{key:15s}{value:<10.4g}{meaning}")
    for gpu, (memory, bandwidth) in GPUS.items():
        print(f"{gpu:15s}{memory / 1e9:g} GB of memory at {bandwidth / 1e12:g} TB/s")
    print()
    a = SimpleNamespace(**{key: value for key, (value, _) in ASSUMED.items()})
    rows = []
    for model in ("qwen3-4b", "qwen3-8b", "qwen3-32b"):
        for gpu in GPUS:
            for gpus in (8, 16, 32, 64, 128, 256):
                rows.append(paper_row(model, gpu, gpus, False, a))
                if gpus > a.node:
                    rows.append(paper_row(model, gpu, gpus, True, a))
    common.table(rows)
    return dict(assumed=ASSUMED, gpus=GPUS, rows=rows)


def main(args: Args) -> None:
    results = paper() if args.paper else measured(args)
    common.finish(args.output, asdict(args), **results)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
