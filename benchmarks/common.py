"""What the benchmarks share: random models, synthetic responses, ranks, memory, tables, files."""

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
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # whoever imports this module can import lite_ppo afterwards

CUDA = torch.cuda.is_available()


# ---- models with random weights ------------------------------------------------------------------


def qwen3(hidden, layers, heads, inner, tied, **changes) -> dict:
    """The fields of a Qwen3 config."""
    shape = dict(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        head_dim=128,
        intermediate_size=inner,
        vocab_size=151_936,
        tie_word_embeddings=tied,
        max_position_embeddings=40_960,
    )
    return shape | changes


SHAPES = {
    "toy": qwen3(128, 3, 4, 256, True, num_key_value_heads=2, head_dim=32, vocab_size=21),
    # for CPUs; the head has a quarter of the weights, as in qwen3-0.6b
    "small": qwen3(256, 4, 8, 768, True, num_key_value_heads=4, head_dim=32, vocab_size=4096),
    "qwen3-0.6b": qwen3(1024, 28, 16, 3072, True),
    "qwen3-1.7b": qwen3(2048, 28, 16, 6144, True),
    "qwen3-4b": qwen3(2560, 36, 32, 9728, True),
    "qwen3-8b": qwen3(4096, 36, 32, 12_288, False),
    "qwen3-32b": qwen3(5120, 64, 64, 25_600, False),
}


def shape_of(name: str) -> dict:
    """A shape by its name; JSON text gives the fields in which it differs from "small"."""
    if name in SHAPES:
        return SHAPES[name]
    return SHAPES["small"] | json.loads(name)


def make_model(shape: dict, folder: Path, dtype: torch.dtype) -> str:
    """A folder with a Qwen3 model: random weights and the tokenizer of the toy."""
    from support import toy

    if (folder / "tokenizer.json").exists():  # the file that is written last
        return str(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = toy.make_tokenizer()
    ends = dict(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    config = write_config(shape, ends, folder, dtype)
    write_weights(config, folder, dtype)
    tokenizer.save_pretrained(folder)
    return str(folder)


def write_config(shape: dict, ends: dict, folder: Path, dtype: torch.dtype):
    from transformers import GenerationConfig, Qwen3Config

    config = Qwen3Config(
        **shape,
        **ends,
        bos_token_id=None,
        architectures=["Qwen3ForCausalLM"],
        dtype=str(dtype).removeprefix("torch."),
    )
    config.save_pretrained(folder)
    GenerationConfig(**ends).save_pretrained(folder)
    return config


def write_weights(config, folder: Path, dtype: torch.dtype) -> None:
    """One safetensors file per layer, so that one layer is in memory at a time."""
    from safetensors.torch import save_file
    from transformers import Qwen3ForCausalLM

    with torch.device("meta"):
        state = Qwen3ForCausalLM(config).state_dict()
    if config.tie_word_embeddings:
        del state["lm_head.weight"]
    layers: dict[str, list[str]] = {}
    for name in state:
        layer = ".".join(name.split(".")[:3])  # model.layers.7, model.embed_tokens.weight, ...
        layers.setdefault(layer, []).append(name)
    device = "cuda" if CUDA else "cpu"
    generator = torch.Generator(device).manual_seed(0)
    file_of = {}
    for i, names in enumerate(layers.values(), 1):
        file = f"model-{i:05d}-of-{len(layers):05d}.safetensors"
        tensors = {n: torch.empty(state[n].shape, dtype=dtype, device=device) for n in names}
        for tensor in tensors.values():
            if tensor.dim() == 1:  # norms
                tensor.fill_(1)
            else:
                tensor.normal_(0, 0.02, generator=generator)
        save_file(tensors, folder / file, metadata={"format": "pt"})
        file_of |= dict.fromkeys(names, file)
    size = sum(tensor.numel() for tensor in state.values()) * dtype.itemsize
    index = {"metadata": {"total_size": size}, "weight_map": file_of}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@contextlib.contextmanager
def model_folder(name: str, kept: str = "") -> Iterator[str]:
    """The folder of a random model. The first rank of each machine makes it.

    It stays in the folder `kept`; without one, it is temporary.
    """
    parent = [kept]
    if dist.get_rank() == 0 and not kept:
        parent = [tempfile.mkdtemp(prefix="lite-ppo-")]
    dist.broadcast_object_list(parent)
    label = name if name in SHAPES else f"custom-{zlib.crc32(name.encode()):08x}"
    folder = Path(parent[0], label)
    first = os.environ["LOCAL_RANK"] == "0"
    if first:
        make_model(shape_of(name), folder, torch.bfloat16 if CUDA else torch.float32)
    dist.barrier()
    yield str(folder)
    dist.barrier()
    if first and not kept:
        shutil.rmtree(parent[0])


def synthetic(lengths: list[int], prompt_length: int, vocabulary: int, seed: int = 0) -> list:
    """Responses of these lengths, of random tokens."""
    from lite_ppo import Response
    from support.data import Problem

    rng = np.random.default_rng(seed)
    prompts = [rng.integers(vocabulary, size=prompt_length).tolist() for _ in lengths]
    responses = []
    for i, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
        response = Response(
            problem=Problem({"problem": "", "answer": ""}, prompt),
            token_ids=rng.integers(vocabulary, size=length, dtype=np.int32),
            logprobs=np.zeros(length, np.float32),
            truncated=False,
            text="",
            score=float(i % 2),
        )
        responses.append(response)
    return responses


# ---- ranks and memory ----------------------------------------------------------------------------


def start_ranks() -> tuple[int, int]:
    """Start torch.distributed, under torchrun or without it. Returns (rank, world size)."""
    from support.util import compute_device

    alone = dict(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_WORLD_SIZE="1")
    for name, value in alone.items():
        os.environ.setdefault(name, value)
    if CUDA:
        torch.cuda.set_device(compute_device())
    options: dict = dict(timeout=timedelta(minutes=30))
    if "MASTER_ADDR" not in os.environ:
        options |= dict(store=dist.HashStore(), rank=0, world_size=1)
    dist.init_process_group("cpu:gloo,cuda:nccl" if CUDA else "gloo", **options)
    return dist.get_rank(), dist.get_world_size()


def memory(reset: bool = False) -> tuple[int, int]:
    """(bytes in use, peak since the last reset): of the GPU's allocator, or resident on a CPU.

    Without /proc, or where the kernel allows no reset, the peak is that of the whole process.
    """
    if CUDA:
        torch.cuda.synchronize()
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
    if reset:
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)  # glibc keeps freed memory
            Path("/proc/self/clear_refs").write_text("5")
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        unit = 1 if sys.platform == "darwin" else 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        return peak, peak
    status = dict(line.split(":", 1) for line in lines)
    now, peak = (int(status[key].split()[0]) * 1024 for key in ("VmRSS", "VmHWM"))
    return now, peak


# ---- reports -------------------------------------------------------------------------------------


def cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":")[1].strip()
    return platform.processor() or platform.machine()


def machine() -> dict[str, str]:
    facts = {}
    if CUDA:
        facts["gpu"] = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    facts["cpu"] = f"{os.cpu_count()} cores, {cpu_name()}"
    facts["threads"] = str(torch.get_num_threads())
    facts["torch"] = torch.__version__
    return facts


def to_cell(value) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, int):
        return f"{value:,}"
    return str(value)


def table(rows: list[dict]) -> None:
    """Print rows with the same keys; numbers have four digits."""
    lines = [list(rows[0])] + [[to_cell(value) for value in row.values()] for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for first, *others in lines:
        padded = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        print("  ".join([first.ljust(widths[0]), *padded]), flush=True)


def command() -> str:
    """The command line of this process, as documented."""
    return " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])


def finish(output: str, settings: dict, **results) -> None:
    """Print the machine; write it, the command, the settings and the results to a JSON file."""
    record = dict(
        command=command(),
        date=f"{datetime.now():%Y-%m-%d %H:%M}",
        machine=machine(),
        settings=settings,
    )
    print("\n" + ", ".join(f"{key} {value}" for key, value in record["machine"].items()))
    if output:
        Path(output).write_text(json.dumps(record | results, indent=1) + "\n")


def check(text: str, value: float, bound: float, above: bool = False) -> dict:
    """Print and return a verdict: value at most (or, with `above`, at least) bound."""
    passed = bool(value >= bound if above else value <= bound)  # NaN fails
    relation = "at least" if above else "at most"
    print(f"{'PASS' if passed else 'FAIL'}  {text}: {value:.4g} ({relation} {bound:g})")
    return {"what": text, "value": value, "bound": bound, "pass": passed}
