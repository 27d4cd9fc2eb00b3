"""What test_gpu.py measures in processes of their own. Each prints one line of JSON at its end.

    python -m tests.on_gpu NAME        # such as attention; the names are at the end of this file

They have processes of their own because the other tests hide the GPU, and because a fault of a
kernel ends all later work of its process. Without a GPU a measurement runs on the CPU, to try it.
"""

import dataclasses
import gc
import json
import math
import sys
import tempfile
from pathlib import Path

import lite_ppo  # first: it hides broken packages from transformers

# isort: split
import numpy as np
import torch
import torch.distributed as dist

import tricks
from support import launch
from support.logprobs import linear_logprobs
from support.packed import packed_attention
from support.util import compute_device, compute_dtype

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import common  # noqa: E402
import memory_formulas  # noqa: E402
import memory_plan  # noqa: E402

# ---- what the measurements share -----------------------------------------------------------------


def settings(path: str, **changes) -> lite_ppo.Config:
    """One optimizer step on responses that no sampler has drawn."""
    values = dict(
        model=path,
        train_data="-",
        minibatches=1,
        warmup_steps=0,
        max_grad_norm=1e9,
        max_logprob_gap=1e9,
        compile="off",
    )
    return lite_ppo.Config(**values | changes)


def make_responses(count: int, longest: int, vocabulary: int) -> list:
    """Responses of random tokens. Their lengths are 1 to `longest`."""
    lengths = np.random.default_rng(1).integers(1, longest + 1, count).tolist()
    return common.synthetic(lengths, prompt_length=20, vocabulary=vocabulary)


def update(policy, optimizer, responses, cfg: lite_ppo.Config) -> dict:
    """One optimizer step: log-probs before it, all gradients as one vector, and their norm."""
    advantages = torch.tensor([1.0 if r.score else -1.0 for r in responses])
    minibatches = lite_ppo.make_minibatches(responses, advantages, 1, cfg)
    recorder = Recorder(policy)
    hook = optimizer.register_step_pre_hook(recorder)
    stats = lite_ppo.update(policy, optimizer, minibatches, 1, cfg)
    hook.remove()
    return dict(
        logprobs=torch.cat([batch.old_logprobs for batch in minibatches[0]]),
        gradient=recorder.gradient,
        norm=stats.reduce(responses)["policy/grad_norm"],
        micro_batches=len(minibatches[0]),
    )


class Recorder:
    """A hook of an optimizer; keeps the gradient of its step."""

    def __init__(self, policy):
        self.policy = policy

    def __call__(self, *args) -> None:
        self.gradient = flat(parameter.grad for parameter in self.policy.parameters())


def flat(tensors) -> torch.Tensor:
    """Sharded tensors as one vector in host memory."""
    return torch.cat([x.detach().full_tensor().cpu().float().flatten() for x in tensors])


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """|found - expected| / |expected|, in float64; NaN if a number is not finite."""
    expected = expected.detach().double()
    difference = found.detach().to(expected.device).double() - expected
    return (difference.norm() / expected.norm()).item()


def peak_bytes(work, *args) -> int:
    """The highest memory during work(*args), beside what exists before."""
    gc.collect()
    if common.CUDA:
        torch.cuda.empty_cache()
    before, _ = common.memory(reset=True)
    work(*args)
    return common.memory()[1] - before


# ---- attention -----------------------------------------------------------------------------------

# No multiples of the 64 or 128 tokens of a tile, and a sequence of a single token.
LENGTHS = [130, 1, 257, 63, 701]
SCALING = 0.15  # not the default of any kernel
ATTENTION_CASES = {  # heads, heads of keys and values, width of a head, sliding window
    "width 64": (4, 4, 64, None),
    "width 64, grouped": (8, 2, 64, None),
    "width 64, grouped, window within a tile": (8, 2, 64, 33),
    "width 128": (4, 4, 128, None),
    "width 128, grouped": (8, 2, 128, None),
    "width 128, grouped, window over tiles": (8, 2, 128, 200),
    "width 128, one head of keys, window longer than a sequence": (8, 1, 128, 300),
}


def plain_attention(query, key, value, window: int | None) -> torch.Tensor:
    """The formula in float64 for one sequence. query [T, H, D]; key, value [T, H_kv, D]."""
    repeats = query.shape[1] // key.shape[1]
    key = key.repeat_interleave(repeats, 1)
    value = value.repeat_interleave(repeats, 1)
    scores = torch.einsum("ihd,jhd->hij", query, key) * SCALING
    positions = torch.arange(len(query), device=query.device)
    distance = positions[:, None] - positions
    hidden = distance < 0
    if window is not None:
        hidden = hidden | (distance >= window)
    weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
    return torch.einsum("hij,jhd->ihd", weights, value)


def error_of_sequences(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest error of a sequence: root mean square of the difference, over that of the truth.

    found, expected: [T, H, D]. The gradients of a single token are 0, so a sequence counts at least
    a tenth of the root mean square of all.
    """
    errors = []
    floor = 0.1 * root_mean_square(expected)
    for a, b in zip(found.double().split(LENGTHS), expected.split(LENGTHS)):
        errors.append(root_mean_square(a - b) / max(root_mean_square(b), floor))
    return math.nan if any(map(math.isnan, errors)) else max(errors)


def root_mean_square(x: torch.Tensor) -> float:
    return x.square().mean().sqrt().item()


def attention_errors(heads: int, kv_heads: int, width: int, window: int | None) -> dict:
    """Of the output and of the gradients, in bfloat16."""
    device = compute_device()
    generator = torch.Generator(device).manual_seed(0)
    responses = common.synthetic(LENGTHS, prompt_length=1, vocabulary=9)
    zeros = torch.zeros(len(LENGTHS) + 1)
    batch = lite_ppo.make_micro_batch(responses, range(len(LENGTHS)), zeros, zeros, device)
    assert batch.lengths == LENGTHS
    inputs = []
    for number in (heads, kv_heads, kv_heads):
        x = torch.randn(sum(LENGTHS), number, width, generator=generator, device=device)
        inputs.append(x.bfloat16().requires_grad_())
    weight = torch.randn(inputs[0].shape, generator=generator, device=device).bfloat16()

    # as transformers lays them out: [1, heads, T, width], a view of [1, T, heads, width]
    views = [x[None].transpose(1, 2) for x in inputs]
    options = dict(scaling=SCALING, sliding_window=window, micro_batch=batch)
    found = packed_attention(torch.nn.Module(), *views, None, **options)[0][0]
    gradients = torch.autograd.grad(found, inputs, weight)

    exact = [x.detach().double().requires_grad_() for x in inputs]
    sequences = zip(*(x.split(LENGTHS) for x in exact))
    expected = torch.cat([plain_attention(*sequence, window) for sequence in sequences])
    truth = torch.autograd.grad(expected, exact, weight.double())

    names = ("query", "key", "value")
    errors = {"output": error_of_sequences(found.detach(), expected.detach())}
    for name, gradient, right in zip(names, gradients, truth):
        errors[f"gradient of {name}"] = error_of_sequences(gradient, right)
    return errors


def attention() -> dict:
    """A case that raises an exception has the message in place of errors."""
    found = {}
    for name, case in ATTENTION_CASES.items():
        try:
            found[name] = attention_errors(*case)
        except Exception as error:  # the next case may work
            found[name] = {f"{type(error).__name__}: {error}": math.inf}
    return found


def attention_without_vllm() -> dict:
    """With the kernels of torch: vLLM brings others, and its import fails here."""
    sys.modules["vllm"] = None
    return attention()


# ---- log-probs -----------------------------------------------------------------------------------


def objective(logprobs: torch.Tensor, entropy: torch.Tensor) -> torch.Tensor:
    """A sum in which each token has another weight, so that mixed-up tokens show."""
    weights = torch.linspace(-1, 2, len(logprobs), dtype=logprobs.dtype, device=logprobs.device)
    return (weights * logprobs).sum() + (0.5 * weights.flip(0) * entropy).sum()


def plain_logprobs(hidden, weight, token_ids, temperature, bias):
    """What linear_logprobs computes, with all logits in memory."""
    logits = hidden @ weight.t() + bias
    logprobs = tricks.token_logprobs(logits, token_ids, temperature)
    return logprobs, tricks.entropy(logits, temperature)


def logprob_errors(inputs: list, token_ids, chunk: int, compiled: bool) -> dict:
    """inputs: hidden [T, D], weight [V, D], bias [V], all in one dtype."""
    hidden, weight, bias = (x.clone().requires_grad_() for x in inputs)
    found = linear_logprobs(hidden, weight, token_ids, 0.7, chunk, bias, compiled)
    gradients = torch.autograd.grad(objective(*found), (hidden, weight, bias))

    exact = [x.double().requires_grad_() for x in inputs]
    expected = plain_logprobs(exact[0], exact[1], token_ids, 0.7, exact[2])
    truth = torch.autograd.grad(objective(*expected), exact)
    errors = {
        "log-probs": (found[0] - expected[0]).abs().max().item(),
        "entropy": (found[1] - expected[1]).abs().max().item(),
    }
    names = ("hidden", "weight", "bias")
    for name, gradient, right in zip(names, gradients, truth):
        errors[f"gradient of {name}"] = relative(gradient, right)
    return errors


def forward_and_backward(function, inputs: list, *args) -> None:
    leaves = [x.detach().requires_grad_() for x in inputs[:2]]
    objective(*function(*leaves, *args)).backward()


def logprobs(vocabulary: int = 151_936, tokens: int = 1777, chunk: int = 100) -> dict:
    """Errors in both dtypes, and peak memory in bytes."""
    device = compute_device()
    generator = torch.Generator(device).manual_seed(0)
    width = 64
    hidden = torch.randn(tokens, width, generator=generator, device=device)
    weight = 0.3 * torch.randn(vocabulary, width, generator=generator, device=device)
    bias = torch.randn(vocabulary, generator=generator, device=device)
    ids = torch.randint(vocabulary, (tokens,), generator=generator, device=device)
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        inputs = [x.to(dtype) for x in (hidden, weight, bias)]
        for compiled in (False, True):
            name = f"{dtype}{' compiled' if compiled else ''}".removeprefix("torch.")
            found[name] = logprob_errors(inputs, ids, chunk, compiled)
    chunked = (linear_logprobs, inputs, ids, 0.7, chunk, inputs[2], True)
    plain = (plain_logprobs, inputs, ids, 0.7, inputs[2])
    found["peak"] = peak_bytes(forward_and_backward, *chunked)
    found["plain peak"] = peak_bytes(forward_and_backward, *plain)
    return found


# ---- compiled blocks -----------------------------------------------------------------------------

WHOLE = 16384  # tokens: the mini-batch is one micro-batch
SPLIT = 700  # several micro-batches of different sizes


def updates(path: str, responses, compile: str) -> dict[int, dict]:
    """The same update in one micro-batch and in several. The learning rate is 0."""
    cfg = settings(path, compile=compile, lr=0.0)
    policy = lite_ppo.build_policy(cfg, path, compute_device())
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.0)
    found = {}
    for tokens in (WHOLE, SPLIT):
        changed = dataclasses.replace(cfg, micro_batch_tokens=tokens)
        found[tokens] = update(policy, optimizer, responses, changed)
    return found


def compiled() -> dict:
    """Compiled blocks beside those that are not, and one micro-batch beside several."""
    common.start_ranks()
    with tempfile.TemporaryDirectory() as folder:
        # "small" has 4 layers, width 256 and 4,096 tokens; kernels like heads of 64
        shape = common.shape_of('{"head_dim": 64}')
        path = common.make_model(shape, Path(folder), compute_dtype("auto"))
        responses = make_responses(40, 300, shape["vocab_size"])
        eager = updates(path, responses, "off")
        compiled = updates(path, responses, "on")
    found = {"micro-batches": compiled[SPLIT]["micro_batches"]}
    for name, tokens in (("one micro-batch", WHOLE), ("several", SPLIT)):
        expected = eager[tokens]
        difference = compiled[tokens]["logprobs"] - expected["logprobs"]
        found[name] = {
            "log-probs": root_mean_square(difference) / expected["logprobs"].std().item(),
            "gradient": relative(compiled[tokens]["gradient"], expected["gradient"]),
            "norm": abs(compiled[tokens]["norm"] / expected["norm"] - 1),
        }
    for name, of_mode in (("eager split", eager), ("compiled split", compiled)):
        found[name] = relative(of_mode[SPLIT]["gradient"], of_mode[WHOLE]["gradient"])
    return found


# ---- parameters in host memory -------------------------------------------------------------------


def train_once(cfg: lite_ppo.Config, responses, found: dict) -> None:
    """One step of AdamW. Adds what update() returns and the parameters before and after it."""
    policy = lite_ppo.build_policy(cfg, cfg.model, compute_device())
    optimizer = torch.optim.AdamW(policy.parameters(), cfg.lr, weight_decay=0.0, fused=True)
    found["before"] = flat(policy.parameters())
    found |= update(policy, optimizer, responses, cfg)
    found["after"] = flat(policy.parameters())


def offloaded(hidden: int = 1024) -> dict:
    """One update with --cpu-offload and one without it."""
    common.start_ranks()
    shape = common.qwen3(hidden, 4, 16, 3 * hidden, True, head_dim=64, vocab_size=4096)
    runs = {}
    with tempfile.TemporaryDirectory() as folder:
        path = common.make_model(shape, Path(folder), compute_dtype("auto"))
        responses = make_responses(16, 100, shape["vocab_size"])
        for offload in (False, True):
            run = runs[offload] = {}
            # cfg.cpu_offload is refused without a GPU
            cfg = settings(path, lr=1e-3, cpu_offload=offload and common.CUDA)
            run["peak"] = peak_bytes(train_once, cfg, responses, run)
    parameters = len(runs[False]["before"])
    moved = (runs[False]["after"] - runs[False]["before"]).norm()
    return {
        "parameters": parameters,
        "moved": moved.item(),
        "difference": ((runs[True]["after"] - runs[False]["after"]).norm() / moved).item(),
        "gradient": relative(runs[True]["gradient"], runs[False]["gradient"]),
        "peak": runs[False]["peak"],
        "offloaded peak": runs[True]["peak"],
    }


# ---- memory: its plan, and its end ---------------------------------------------------------------

PLANNED = memory_formulas.Shape(1024, 3072, 4, 16, 8, tied=True, vocab=8192, head_dim=64)


def memory_plan_compiled() -> dict:
    return memory_of_phases("on")


def memory_plan_eager() -> dict:
    return memory_of_phases("off")


def memory_of_phases(compile: str) -> dict:
    """Planned and measured bytes of the phases, as `memory_plan.py --check` compares them."""
    import memory_trial  # it imports torch._dynamo, which takes seconds

    s = memory_formulas.Settings(
        sampler="transformers",
        prompts_per_step=16,
        group_size=4,
        max_prompt_tokens=8,
        max_new_tokens=248,
        micro_batch_tokens=8192,
        device_gib=80.0,
        cpu=not common.CUDA,
    )
    with tempfile.TemporaryDirectory() as folder:
        model = common.make_model(
            memory_plan.config_fields(PLANNED), Path(folder, "model"), compute_dtype("auto")
        )
        output = Path(folder, "measured.json")
        flags = [*memory_plan.trial_flags(s), f"--compile={compile}"]
        memory_trial.main(model, str(output), flags)
        measured = json.loads(output.read_text())
    tokens = min(s.micro_batch_tokens, measured["tokens"])
    s = dataclasses.replace(s, micro_batch_tokens=tokens)
    plan = memory_formulas.plan(PLANNED, s)
    return memory_plan.compare(plan, measured["peaks"], s) | {"moment": plan["update_moment"]}


def leave_no_memory(*args) -> None:
    """In place of add_logprobs: from now on, torch's allocator gets no more memory."""
    if not common.CUDA:
        raise torch.OutOfMemoryError("CUDA out of memory, on a machine without a GPU")
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(compute_device()).total_memory
    torch.cuda.set_per_process_memory_fraction(torch.cuda.memory_reserved() / total)


def out_of_memory() -> None:
    """A run of the script whose first update has too large micro-batches."""
    lite_ppo.add_logprobs = leave_no_memory
    sys.exit(lite_ppo.main())


# ---- process group -------------------------------------------------------------------------------


def process_group() -> dict:
    """The backend that the script uses for tensors of the GPU, and a sum over its only rank."""
    launch.connect(settings("toy"))
    numbers = torch.arange(3.0, device=compute_device())
    dist.all_reduce(numbers)
    backend = dist.group.WORLD._get_backend(compute_device()).name()
    return {"backend": backend, "device": numbers.device.type, "sum": numbers.tolist()}


MEASUREMENTS = [
    attention,
    attention_without_vllm,
    logprobs,
    compiled,
    offloaded,
    memory_plan_compiled,
    memory_plan_eager,
    out_of_memory,
    process_group,
]


def main() -> None:
    """Arguments: the name of a measurement, then flags of lite_ppo.py if it runs the script."""
    name = sys.argv.pop(1)
    found = {function.__name__: function for function in MEASUREMENTS}[name]()
    print(json.dumps(found), flush=True)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
