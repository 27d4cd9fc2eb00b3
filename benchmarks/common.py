"""What the benchmarks share: models with random weights, peak memory, ranks, synthetic responses, a table and a JSON file."""

import contextlib
import ctypes
import json
import os
import platform
import resource
import shutil
import sys
import tempfile
import zlib
from datetime import datetime, timedelta
from pathlib import Path
from typing import Iterator

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

CUDA = torch.cuda.is_available()


def qwen3(hidden, layers, heads, inner, tied, key_value_heads=8, head_dim=128, vocabulary=151_936):
    return dict(hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=key_value_heads, head_dim=head_dim,
                intermediate_size=inner, vocab_size=vocabulary, tie_word_embeddings=tied, max_position_embeddings=40_960)


SHAPES = {
    "toy": qwen3(128, 3, 4, 256, True, 2, 32, 21),
    "small": qwen3(256, 4, 8, 768, True, 4, 32, 4096),  # for CPUs; the head has a quarter of the weights, as in qwen3-0.6b
    "qwen3-0.6b": qwen3(1024, 28, 16, 3072, True),
    "qwen3-1.7b": qwen3(2048, 28, 16, 6144, True),
    "qwen3-4b": qwen3(2560, 36, 32, 9728, True),
    "qwen3-8b": qwen3(4096, 36, 32, 12_288, False),
    "qwen3-32b": qwen3(5120, 64, 64, 25_600, False),
}


def shape_of(name: str) -> dict:
    """A name above, or the fields of one as JSON text."""
    return SHAPES[name] if name in SHAPES else SHAPES["small"] | json.loads(name)


def make_model(shape: dict, folder: Path, dtype: torch.dtype) -> str:
    """A Qwen3 model folder: random weights, the toy's tokenizer. Written layer by layer, so that no second copy is ever in memory."""
    import samplers  # noqa: F401  before transformers: it puts broken companions of torch out of the way
    import toy
    from safetensors.torch import save_file
    from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM

    if (folder / "tokenizer.json").exists():  # written last
        return str(folder)
    tokenizer = toy.make_tokenizer()
    ends = dict(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    config = Qwen3Config(**shape, **ends, bos_token_id=None, architectures=["Qwen3ForCausalLM"], dtype=str(dtype).removeprefix("torch."))
    with torch.device("meta"):
        state = Qwen3ForCausalLM(config).state_dict()
    if config.tie_word_embeddings:
        del state["lm_head.weight"]
    files: dict[str, list[str]] = {}
    for name in state:
        files.setdefault(".".join(name.split(".")[:3]), []).append(name)  # model.layers.7, model.embed_tokens.weight, ...
    folder.mkdir(parents=True, exist_ok=True)
    device, index = "cuda" if CUDA else "cpu", {}
    generator = torch.Generator(device).manual_seed(0)
    for i, names in enumerate(files.values(), 1):
        tensors = {n: torch.empty(state[n].shape, dtype=dtype, device=device) for n in names}
        for tensor in tensors.values():
            tensor.fill_(1) if tensor.dim() == 1 else tensor.normal_(0, 0.02, generator=generator)
        file = f"model-{i:05d}-of-{len(files):05d}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(names, file)
    size = sum(tensor.numel() for tensor in state.values()) * dtype.itemsize
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": size}, "weight_map": index}))
    config.save_pretrained(folder)
    GenerationConfig(**ends).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@contextlib.contextmanager
def model_folder(name: str, kept: str = "") -> Iterator[str]:
    """The folder of a shape's model, in `kept`, or made now and deleted after use; one per machine, made by its first rank."""
    parent = [kept or tempfile.mkdtemp(prefix="lite-ppo-") if dist.get_rank() == 0 else ""]
    dist.broadcast_object_list(parent)
    folder, first = Path(parent[0], name if name in SHAPES else f"custom-{zlib.crc32(name.encode()):08x}"), os.environ["LOCAL_RANK"] == "0"
    if first:
        make_model(shape_of(name), folder, torch.bfloat16 if CUDA else torch.float32)
    dist.barrier()
    yield str(folder)
    dist.barrier()
    if first and not kept:
        shutil.rmtree(parent[0])


def synthetic(lengths: list[int], prompt_length: int, vocabulary: int, seed: int = 0) -> list:
    """Responses of these lengths, random tokens."""
    from data import Problem
    from lite_ppo import Response

    rng = np.random.default_rng(seed)
    prompts = [Problem({"problem": "", "answer": ""}, rng.integers(vocabulary, size=prompt_length).tolist()) for _ in lengths]
    return [Response(p, rng.integers(vocabulary, size=n, dtype=np.int32), np.zeros(n, np.float32), False, "", float(i % 2), "")
            for i, (p, n) in enumerate(zip(prompts, lengths))]


def start_ranks() -> tuple[int, int]:
    """torch.distributed as the trainer starts it, under torchrun or alone -> (rank, world)."""
    from lite_ppo import compute_device

    for name, value in dict(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_WORLD_SIZE="1").items():
        os.environ.setdefault(name, value)
    if CUDA:
        torch.cuda.set_device(compute_device())
    alone = {} if "MASTER_ADDR" in os.environ else dict(store=dist.HashStore(), rank=0, world_size=1)
    dist.init_process_group("cpu:gloo,cuda:nccl" if CUDA else "gloo", timeout=timedelta(minutes=30), **alone)
    return dist.get_rank(), dist.get_world_size()


def memory(reset: bool = False) -> tuple[int, int]:
    """(bytes in use, most bytes in use since the last reset): of the GPU's allocator, or resident in this process.

    Where the kernel lets nobody reset the mark, or there is no /proc, it stays the process's highest so far.
    """
    if CUDA:
        torch.cuda.synchronize()
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
    if reset:
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)  # glibc keeps what was freed
            Path("/proc/self/clear_refs").write_text("5")
    try:
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return tuple(int(status[key].split()[0]) * 1024 for key in ("VmRSS", "VmHWM"))
    except OSError:
        return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024),) * 2


def machine() -> dict[str, str]:
    try:
        cpu = next(line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name"))
    except (OSError, StopIteration):
        cpu = platform.processor() or platform.machine()
    gpu = {"gpu": f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"} if CUDA else {}
    return gpu | {"cpu": f"{os.cpu_count()} cores, {cpu}", "threads": str(torch.get_num_threads()), "torch": torch.__version__}


def table(rows: list[dict]) -> None:
    """Rows of one kind; numbers with four digits."""
    names = list(rows[0])
    cells = [names] + [[f"{v:.4g}" if isinstance(v, float) else f"{v:,}" if isinstance(v, int) else str(v) for v in row.values()] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells)]
    for cell in cells:
        print("  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(cell, widths))), flush=True)


def finish(output: str, settings: dict, **results) -> None:
    """Machine, date, command, settings and results as JSON, if a file is wanted."""
    command = " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    record = dict(command=command, date=f"{datetime.now():%Y-%m-%d %H:%M}", machine=machine(), settings=settings) | results
    print("\n" + ", ".join(f"{key} {value}" for key, value in record["machine"].items()))
    if output:
        Path(output).write_text(json.dumps(record, indent=1) + "\n")


def check(text: str, value: float, bound: float, above: bool = False) -> dict:
    """Print and return a verdict: value at most (or at least) bound."""
    ok = bool(value >= bound if above else value <= bound)  # NaN fails
    print(f"{'PASS' if ok else 'FAIL'}  {text}: {value:.4g} ({'at least' if above else 'at most'} {bound:g})")
    return {"what": text, "value": value, "bound": bound, "pass": ok}
