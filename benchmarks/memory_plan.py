"""The memory of a run, per rank and phase, before the run starts; and whether it fits.

    python benchmarks/memory_plan.py qwen3-4b --ranks 8 --device-gib 80
    python benchmarks/memory_plan.py FOLDER --device-gib cpu --check      # measured beside planned

MODEL is a shape (qwen3-0.6b ... qwen3-32b), a folder with a config.json, or a hub id. The flags are
those of lite_ppo.py; --ranks is the number of processes that torchrun starts. The formulas are in
memory_formulas.py. --check runs the sampler and the trainer of lite_ppo.py (memory_trial.py, in a
new process) and compares the peak of each phase with the plan.
"""

import argparse
import dataclasses
import itertools
import json
import os
import subprocess
import sys
import tempfile
from datetime import datetime
from pathlib import Path

from memory_formulas import GIB, PHASES, PROCESS, SHAPES, Settings, Shape, plan

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path.insert(0, str(ROOT))
BOUND = 1.25  # of --check
MOST_TOKENS = 2**22  # the largest --micro-batch-tokens that is tried

# ---- the model -----------------------------------------------------------------------------------


def read_shape(name: str) -> Shape:
    """A shape by name, or from the config of a folder or of a model on the hub."""
    if name.lower() in SHAPES:
        return SHAPES[name.lower()]
    from support.util import mask_broken_packages  # imports torch

    mask_broken_packages()
    config = load_config(name)
    kind = config.model_type
    if kind not in ("qwen2", "qwen3", "llama", "mistral"):
        known = "qwen2, qwen3, llama and mistral"
        raise SystemExit(f"error: {name}: the formulas are for {known}, not for {kind}")
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return Shape(
        hidden=config.hidden_size,
        intermediate=config.intermediate_size,
        layers=config.num_hidden_layers,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        tied=bool(config.tie_word_embeddings),
        vocab=config.vocab_size,
        head_dim=head_dim,
        qk_norm=kind == "qwen3",
        qkv_bias=kind == "qwen2",
    )


def load_config(name: str):
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(name)


# ---- what would fit ------------------------------------------------------------------------------


def solve_micro_batch(shape: Shape, s: Settings, most: int = MOST_TOKENS) -> int:
    """The largest --micro-batch-tokens that fits, by bisection in the same formulas; 0 if none."""

    def fits(tokens: int) -> bool:
        return plan(shape, dataclasses.replace(s, micro_batch_tokens=tokens))["fits"]

    if not fits(1):
        return 0
    low, high = 1, most + 1
    while high - low > 1:
        middle = (low + high) // 2
        if fits(middle):
            low = middle
        else:
            high = middle
    return low


Change = tuple[str, dict]  # a flag, and the same as fields of Settings


def possible_changes(s: Settings) -> list[list[Change]]:
    """Flags that save memory, by kind; the mildest change of a kind comes first."""
    kinds: list[list[Change]] = []
    if not s.activation_checkpointing:
        kinds.append([("--activation-checkpointing", dict(activation_checkpointing=True))])
    if s.vllm_gpu:
        shares = [percent / 100 for percent in range(95, 9, -5)]
        shares.sort(key=lambda share: abs(share - s.gpu_memory_utilization))
        kind = []
        for share in shares:
            if share != s.gpu_memory_utilization:
                change = dict(gpu_memory_utilization=share)
                kind.append((f"--gpu-memory-utilization {share:g}", change))
        kinds.append(kind)
    else:
        sizes = [n for n in (128, 64, 32, 16, 8) if n < s.live]
        kinds.append([(f"--max-num-seqs {n}", dict(max_num_seqs=n)) for n in sizes])
    if s.cpu:
        return kinds
    if s.shard_ranks:
        kinds.append([("--shard-ranks 0", dict(shard_ranks=0))])
    more = [n for n in (2, 4, 8, 16, 32, 64) if n > s.ranks]
    kinds.append([(f"--ranks {n}", dict(ranks=n, shard_ranks=0)) for n in more])
    if not s.cpu_offload:
        kinds.append([("--cpu-offload", dict(cpu_offload=True))])
    return kinds


def settle(shape: Shape, s: Settings) -> list[str] | None:
    """The missing flags: [] if it fits, smaller micro-batches if they fit, else None."""
    if plan(shape, s)["fits"]:
        return []
    tokens = solve_micro_batch(shape, s)
    return [f"--micro-batch-tokens {tokens}"] if tokens else None


def first_way(shape: Shape, s: Settings, combinations) -> list[str] | None:
    """The flags of the first combination of changes that fits."""
    for changes in combinations:
        fields = {}
        for _, change in changes:
            fields |= change
        missing = settle(shape, dataclasses.replace(s, **fields))
        if missing is not None:
            return [flag for flag, _ in changes] + missing
    return None


def remedies(shape: Shape, s: Settings) -> list[list[str]]:
    """Ways to make the run fit, the cheapest first, each a list of flags.

    A way is one change of a kind, perhaps with smaller micro-batches; if none fits, two changes.
    """
    micro_batch = settle(shape, s)
    if micro_batch:
        return [micro_batch]
    kinds = possible_changes(s)
    for number in (1, 2):
        ways = []
        for chosen in itertools.combinations(kinds, number):
            way = first_way(shape, s, itertools.product(*chosen))
            if way:
                ways.append(way)
        if ways:
            return ways
    return []


# ---- report --------------------------------------------------------------------------------------


def gib(size: float) -> str:
    return f"{size / GIB:.2f}"


def table(result: dict) -> str:
    names = dict.fromkeys(part for phase in PHASES for part in result["phases"][phase])
    lines = [f"{'GiB per rank':<20}" + "".join(f"{phase:>10}" for phase in PHASES)]
    for name in names:
        line = f"{name:<20}"
        for phase in PHASES:
            size = result["phases"][phase].get(name)
            line += f"{'' if size is None else gib(size):>10}"
        lines.append(line)
    total = "".join(f"{gib(result['totals'][phase]):>10}" for phase in PHASES)
    lines.append(f"{'total':<20}{total}")
    return "\n".join(lines)


def describe_run(name: str, shape: Shape, s: Settings) -> str:
    dtype = "float32" if s.bytes == 4 else "bfloat16"
    longest = " (the longest sequence)" if s.tokens > s.micro_batch_tokens else ""
    return (
        f"{name}: {shape.parameters:,} parameters; {s.ranks} rank(s), state shared by {s.shards}; "
        f"{dtype}; micro-batches of {s.tokens} tokens{longest}"
    )


def verdict(shape: Shape, s: Settings, result: dict) -> str:
    if result["fits"]:
        most = solve_micro_batch(shape, s)
        more = " or more" if most == MOST_TOKENS else ""
        return f"fits; the largest --micro-batch-tokens that fits: {most}{more}"
    text = "does not fit"
    if not result["cache_room"]:
        text += " (the share of the sampler has no room for the cache of one sequence)"
    ways = [" ".join(way) for way in remedies(shape, s)]
    if not ways:
        return f"{text}; none of these flags is enough"
    return f"{text}; these flags would fit: " + "; or ".join(ways)


def report(name: str, shape: Shape, s: Settings) -> tuple[str, dict]:
    result = plan(shape, s)
    device = "machine" if s.cpu else "GPU"
    sequences = result["cache_tokens"] / s.full_length
    lines = [
        describe_run(name, shape, s),
        table(result),
        "",
        f"peak: {gib(result['peak'])} GiB in {result['peak_phase']}, of {s.device_gib:g} GiB "
        f"on this {device}; highest moment of the update: {result['update_moment']}",
        f"KV cache: room for {result['cache_tokens']:,} tokens = {sequences:.1f} sequences "
        "of full length",
    ]
    if result["host"]:
        host = ", ".join(f"{part} {gib(size)} GiB" for part, size in result["host"].items())
        lines.append(f"host memory per rank: {host}")
    save = gib((4 + s.bytes) * shape.parameters)
    lines.append(f"saving: rank 0 gathers the model in host memory, up to {save} GiB more")
    lines.append(verdict(shape, s, result))
    return "\n".join(lines), result


# ---- measured beside planned ---------------------------------------------------------------------


def config_fields(shape: Shape) -> dict:
    """The shape as the fields of a Qwen3 config, for common.make_model."""
    if not shape.qk_norm or shape.qkv_bias:
        raise SystemExit("error: a random model is a Qwen3; give a folder to check another family")
    return dict(
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        tie_word_embeddings=shape.tied,
        vocab_size=shape.vocab,
        max_position_embeddings=32768,
    )


def trial_flags(s: Settings) -> list[str]:
    """The settings as flags of lite_ppo.py."""
    flags = []
    for name, value in dataclasses.asdict(s).items():
        flag = name.replace("_", "-")
        if name in ("ranks", "shard_ranks", "device_gib", "cpu", "process_bytes"):
            continue
        if isinstance(value, bool):
            flags.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            flags.append(f"--{flag}={value}")
    return flags


def run_trial(path: str, s: Settings, threads: int) -> dict:
    """Two real steps in a new process; what they took."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder, "measured.json")
        command = [sys.executable, str(HERE / "memory_trial.py"), path, str(output)]
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        subprocess.run([*command, *trial_flags(s)], check=True, env=environment)
        return json.loads(output.read_text())


def compare(result: dict, peaks: dict[str, float], s: Settings) -> dict[str, dict]:
    """Planned and measured bytes of each phase, and of the highest one."""
    rows = {}
    for phase in PHASES:
        planned, measured = result["totals"][phase], peaks[phase]
        if not s.cpu:
            # The allocator counts neither the context nor, beside the trainer, the engine.
            if phase in ("load", "rollout", "sync"):
                continue
            for part, size in result["phases"][phase].items():
                if part.startswith("engine") or part in ("process", "slack"):
                    planned -= size
        rows[phase] = dict(planned=planned, measured=measured, ratio=planned / measured)
    planned = max(row["planned"] for row in rows.values())
    measured = max(row["measured"] for row in rows.values())
    rows["peak"] = dict(planned=planned, measured=measured, ratio=planned / measured)
    return rows


def check(name: str, path: str, shape: Shape, s: Settings, threads: int) -> dict:
    """Measure a run and plan the same run. Imports and tokens of the plan are those of the run."""
    measured = run_trial(path, s, threads)
    peaks = measured["peaks"]
    s = dataclasses.replace(
        s,
        micro_batch_tokens=min(s.micro_batch_tokens, measured["tokens"]),
        process_bytes=peaks["process"] if s.cpu else 0,
    )
    text, result = report(name, shape, s)
    print(text + "\n")
    print(f"{'GiB':<20}{'planned':>10}{'measured':>10}{'ratio':>10}")
    rows = compare(result, peaks, s)
    for phase, row in rows.items():
        sizes = f"{gib(row['planned']):>10}{gib(row['measured']):>10}"
        print(f"{phase:<20}{sizes}{row['ratio']:>10.2f}")
    resident = ", ".join(gib(peaks[key]) for key in ("process", "engine", "policy"))
    seconds = ", ".join(f"{phase} {value:.0f} s" for phase, value in measured["seconds"].items())
    print(f"resident after imports, sampler, policy: {resident} GiB; {seconds}")
    ratio = rows["peak"]["ratio"]
    word = "PASS" if max(ratio, 1 / ratio) <= BOUND else "FAIL"
    print(f"{word}  planned / measured peak: {ratio:.2f} (within a factor of {BOUND})")
    return dict(phases=rows, seconds=measured["seconds"])


def check_model(name: str, shape: Shape, s: Settings, threads: int) -> dict:
    """Check a folder as it is, or a random model of a shape."""
    if s.ranks > 1:
        raise SystemExit("error: --check takes one rank")
    if name.lower() not in SHAPES:
        return check(name, name, shape, s, threads)
    with tempfile.TemporaryDirectory() as folder:
        # in a new process, so that its memory is not counted
        make = f"common.make_model({config_fields(shape)!r}, Path({folder!r}), torch.bfloat16)"
        code = f"import common, torch\nfrom pathlib import Path\n{make}"
        subprocess.run([sys.executable, "-c", code], check=True, cwd=HERE)
        return check(name, folder, shape, s, threads)


def import_bytes(sampler: str) -> int:
    """Resident memory of a new process after the imports of a run."""
    code = f"""
import lite_ppo, torch._dynamo, transformers.models.qwen3.modeling_qwen3
from support import samplers
samplers.choose_sampler({sampler!r})
for line in open("/proc/self/status"):
    if line.startswith("VmRSS"):
        print(line.split()[1])
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return int(done.stdout.split()[-1]) * 1024 if done.returncode == 0 else PROCESS[sampler]


# ---- command line --------------------------------------------------------------------------------


def parse(arguments: list[str] | None = None) -> tuple[argparse.Namespace, Settings]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="a shape, a folder with a config.json, or a hub id")
    flags = []
    for field in dataclasses.fields(Settings):
        if field.name in ("cpu", "process_bytes", "device_gib"):
            continue
        flags.append(field.name)
        kind: dict = dict(type=type(field.default))
        if isinstance(field.default, bool):
            kind = dict(action=argparse.BooleanOptionalAction)
        parser.add_argument("--" + field.name.replace("_", "-"), default=field.default, **kind)
    parser.add_argument("--device-gib", default="80", help="of a GPU; or cpu: this machine")
    parser.add_argument("--check", action="store_true", help="run two steps here and compare")
    parser.add_argument("--threads", type=int, default=2, help="of --check")
    parser.add_argument("--output", help="JSON file")
    args = parser.parse_args(arguments)
    settings = {name: getattr(args, name) for name in flags}
    if args.device_gib == "cpu":
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / args.ranks
        return args, Settings(**settings, cpu=True, device_gib=round(total / GIB, 1))
    return args, Settings(**settings, device_gib=float(args.device_gib))


def main() -> None:
    args, s = parse()
    shape = read_shape(args.model)
    if args.check:
        result = check_model(args.model, shape, s, args.threads)
    else:
        if s.cpu:
            s = dataclasses.replace(s, process_bytes=import_bytes(s.sampler))
        text, result = report(args.model, shape, s)
        print(text)
    if args.output:
        record = dict(
            model=Path(args.model).name,
            date=f"{datetime.now():%Y-%m-%d %H:%M}",
            shape=dataclasses.asdict(shape),
            settings=dataclasses.asdict(s),
            result=result,
            command=" ".join(["python", "benchmarks/memory_plan.py", *sys.argv[1:]]),
        )
        Path(args.output).write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
