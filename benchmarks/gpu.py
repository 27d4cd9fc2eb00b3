r"""The trainer on one GPU: what each change of the update gains, and what a whole step takes.

    python benchmarks/gpu.py update --output FILE
    python benchmarks/gpu.py step --model FOLDER --train-data FILE.jsonl --output FILE

update: seconds, tokens/s, MFU and peak memory of lite_ppo.update() for models with random weights,
sequences of 4,096 tokens and activation checkpointing. Each row adds one of --changes to the last:

    before           eager blocks, recomputed whole; FlashAttention 2; 2^26 logits at a time
    blocks           blocks are compiled
    kept             the output of attention is kept, not recomputed
    flash            FlashAttention 4
    logits           the passes over a chunk of logits are compiled
    chunks           a 128th of the memory for a chunk
    last             the last linear layer of a block is not recomputed

The last rows vary the size of the micro-batch and the checkpointing. The kernels of the last change
are listed by their time. The first update of each row compiles and does not count.

step: a model and its prompts, with vLLM, also on a CPU: each phase of a step; the rollout, with
rewards, against vLLM.generate alone with the same prompts, seeds and log-probs, and vLLM without
seeds or log-probs; the time of vLLM's own Python. MFU is that of benchmarks/step.py.
"""

import contextlib
import functools
import gc
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Literal, get_args
from unittest import mock

import common  # first: it makes lite_ppo importable
import step as one_step
import torch
import torch.distributed as dist
import tyro

import lite_ppo
from support import flash, models, packed, samplers
from support.actor import Actor
from support.clock import clock
from support.sampling import Sampling

TOKENS = 4096  # of a sequence
Change = Literal["blocks", "kept", "flash", "logits", "chunks", "last"]
CHANGES = get_args(Change)
USUAL = 32_768  # tokens of a micro-batch


@dataclass
class Args:
    part: tyro.conf.Positional[Literal["update", "step"]]
    shapes: tuple[str, ...] = ("qwen3-0.6b", "qwen3-1.7b", "qwen3-4b")  # update: of common.SHAPES
    changes: tuple[Change, ...] = CHANGES  # update
    sequences: int = 16  # update: per optimizer step
    tokens: int = TOKENS  # update: of each sequence
    rounds: int = 2  # updates or steps that count
    model: str = ""  # step: folder of a real model
    train_data: str = ""  # step: problems, as lite_ppo.py takes them
    prompts: int = 64  # step: prompts, with 8 responses each
    max_new_tokens: int = 512  # step: of a response
    max_num_seqs: int = 512  # step: sequences that vLLM decodes at once
    output: str = ""  # JSON file
    rows: list = field(default_factory=list, init=False)


# ---- update --------------------------------------------------------------------------------------


@contextlib.contextmanager
def only(changes: tuple[str, ...]):
    """lite_ppo with some of the CHANGES, and as it was before in all others."""
    linear_logprobs = lite_ppo.linear_logprobs
    recompute_all = {"use_reentrant": False}
    old = {
        "kept": mock.patch.object(
            packed,
            "checkpoint_blocks",
            lambda model: model.gradient_checkpointing_enable(
                gradient_checkpointing_kwargs=recompute_all
            ),
        ),
        "flash": mock.patch.object(flash, "choose", lambda *args: "FlashAttention 2"),
        "logits": mock.patch.object(
            lite_ppo,
            "linear_logprobs",
            lambda *args, **kwargs: linear_logprobs(*args, **(kwargs | {"compiled": False})),
        ),
        "chunks": mock.patch.object(lite_ppo, "logits_at_a_time", lambda device: 2**26),
        "last": mock.patch.object(packed, "separate_last_product", lambda block: None),
    }
    with contextlib.ExitStack() as stack:
        for name, patch in old.items():
            if name not in changes:
                stack.enter_context(patch)
        yield


def random_weights(model, path: str) -> None:
    """In place of models.load_weights: no file has to be written and read."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        local = parameter.to_local()
        torch.nn.init.ones_(local) if local.dim() == 1 else torch.nn.init.normal_(local, 0, 0.02)


def update_bench(args: Args, shape: str, micro_batch: int, checkpointing: bool, compiled: bool):
    """The Bench of step.py for updates only."""
    cfg = one_step.default_config()
    cfg.prompts_per_step = args.sequences // 4
    cfg.micro_batch_tokens = micro_batch
    cfg.activation_checkpointing = checkpointing
    cfg.compile = "on" if compiled else "off"
    cfg.max_logprob_gap = 1e9  # the sampler did not make these responses
    settings = one_step.Args(config=cfg, shape=shape, update_only=args.tokens)
    with tempfile.TemporaryDirectory() as folder:
        common.write_config(common.shape_of(shape), {}, Path(folder), torch.bfloat16)
        with mock.patch.object(models, "load_weights", random_weights):
            return one_step.Bench(settings, folder, "")


def measure(args: Args, shape: str, changes, micro_batch: int, checkpointing: bool = True) -> dict:
    """One row of the table, and the kernels of one update."""
    row = dict(shape=shape, changes=changes[-1] if changes else "before", micro_batch=micro_batch)
    row |= dict(checkpointing="yes" if checkpointing else "no")
    torch._dynamo.reset()
    try:
        with only(changes):
            bench = update_bench(args, shape, micro_batch, checkpointing, "blocks" in changes)
            steps = [bench.run_step(i + 1) for i in range(args.rounds + 1)]
            kernels = kernel_times(bench) if changes == args.changes and common.CUDA else []
            flops = one_step.count_step_flops(
                bench.args,
                bench.policy.config,
                [(len(r.problem.prompt_ids), len(r.token_ids)) for r in steps[-1].responses],
            )
            peak = one_step.device_flops(bench.args)
    except Exception as error:  # the other rows still count
        return row | dict(error=f"{type(error).__name__}: {error}"[:2000])
    finally:
        bench = None
        gc.collect()
        torch.cuda.empty_cache()
    seconds = median(step.seconds["update"] for step in steps[1:])
    return row | {
        "seconds": seconds,
        "tokens/s": args.sequences * args.tokens / seconds,
        "MFU": flops["model"] / seconds / peak if peak else 0.0,
        "peak GiB": max(step.memory["update"] for step in steps),
        "first s": steps[0].seconds["update"],
        "grad_norm": steps[1].metrics["policy/grad_norm"],
        "kernels": kernels,
    }


def kernel_times(bench, longest: int = 30) -> list[dict]:
    """The kernels of one more update with the largest share of its time, in ms."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as found:
        bench.run_step(9)
        torch.cuda.synchronize()
    events = sorted(found.key_averages(), key=lambda event: -event.self_device_time_total)
    return [
        dict(name=e.key[:160], ms=e.self_device_time_total / 1e3, calls=e.count)
        for e in events[:longest]
    ]


def measure_updates(args: Args) -> None:
    for shape in args.shapes:
        for count in range(len(args.changes) + 1):
            report(args, measure(args, shape, args.changes[:count], USUAL))
        for micro_batch in (USUAL // 2, USUAL * 2):
            report(args, measure(args, shape, args.changes, micro_batch))
        report(args, measure(args, shape, args.changes, USUAL // 2, checkpointing=False))


def report(args: Args, row: dict) -> None:
    args.rows.append(row)
    common.table([{key: value for key, value in row.items() if key != "kernels"}])
    common.finish(args.output, {}, rows=args.rows)  # after each row: a killed run keeps them


# ---- step ----------------------------------------------------------------------------------------


def timed(function) -> float:
    common.memory()  # it waits for the GPU
    start = time.perf_counter()
    function()
    common.memory()
    return time.perf_counter() - start


def measure_step(args: Args) -> Iterator[dict]:
    """The row as far as it is measured, after the steps and after each round of the rollout."""
    cfg = one_step.default_config()
    cfg.prompts_per_step, cfg.group_size = args.prompts, 8
    cfg.max_prompt_tokens, cfg.max_new_tokens = 512, args.max_new_tokens
    cfg.train_data, cfg.reward, cfg.reward_workers = args.train_data, "math", 8
    cfg.minibatches, cfg.micro_batch_tokens = 2, 32_768
    cfg.max_num_seqs, cfg.gpu_memory_utilization = args.max_num_seqs, 0.4
    settings = one_step.Args(config=cfg)
    began = time.perf_counter()
    bench = one_step.Bench(settings, models.resolve_model(args.model), "vllm")
    start = time.perf_counter() - began
    steps = [bench.run_step(i + 1) for i in range(args.rounds + 1)]
    generated = sum(len(r.token_ids) for r in steps[-1].responses)
    phases = ("rollout", "reward", "logprobs", "update", "sync", "step")
    row = {p: median(step.seconds[p] for step in steps[1:]) for p in phases}
    lengths = [(len(r.problem.prompt_ids), len(r.token_ids)) for r in steps[-1].responses]
    totals = one_step.totals(settings, bench, steps[-1], row["update"], lengths)
    row |= {"start s": start, "tokens": generated}
    row |= {"MFU": totals["MFU"], "gap": totals["logprob gap"]}
    yield row
    for found in compare_rollouts(args, bench, cfg):
        row |= found
        yield row
    bench.close()


def compare_rollouts(args: Args, bench, cfg) -> Iterator[dict]:
    """The rollout beside vLLM alone with fewer demands, on the same prompts, after each round.

    A round times every form once; the order of the forms alternates. Ratios are medians over the
    rounds.
    """
    problems = [bench.train_set.problems[i] for i in range(cfg.prompts_per_step)]
    forms = rollout_forms(bench, cfg, problems)
    llm = bench.sampler.llm
    config = llm.llm_engine.vllm_config
    yield {
        "async scheduling": bool(config.scheduler_config.async_scheduling),
        "model runner 2": bool(getattr(config, "use_v2_model_runner", False)),
    }
    seconds: dict[str, list[float]] = {name: [] for name in forms}
    for i in range(args.rounds):
        for name in list(forms)[:: -1 if i % 2 else 1]:
            seconds[name].append(timed(forms[name]))
        plain = seconds["vLLM"]
        ratios = {
            f"{name} / vLLM": median(a / b for a, b in zip(times, plain))
            for name, times in seconds.items()
            if name != "vLLM"
        }
        yield {"vLLM s": median(plain), "rounds": len(plain)} | ratios
    yield bookkeeping(llm, forms["vLLM"])


def rollout_forms(bench, cfg, problems: list) -> dict[str, Callable[[], list]]:
    """Ways to sample responses to the same problems. Each returns lists of outputs."""
    from vllm import SamplingParams, TokensPrompt

    actor = Actor(bench.sampler, bench.tokenizer, bench.grader)
    prompts = [problem.prompt_ids for problem in problems]
    seeds = list(range(len(problems)))
    sampling = Sampling(cfg.group_size, cfg.max_new_tokens, 1.0)
    inputs = [TokensPrompt(prompt_token_ids=prompt) for prompt in prompts]
    common_options = dict(n=cfg.group_size, max_tokens=cfg.max_new_tokens, detokenize=False)
    common_options |= dict(stop_token_ids=bench.sampler.eos_ids, ignore_eos=True)

    def vllm(seeded: bool, **options):
        params = [
            SamplingParams(seed=seed if seeded else None, **common_options, **options)
            for seed in seeds
        ]
        return bench.sampler.llm.generate(inputs, params, use_tqdm=False)

    logprobs = dict(logprobs=0, flat_logprobs=True)
    return {
        "rollout": lambda: actor.sample(problems, seeds, sampling),
        "sampler": lambda: bench.sampler.generate(prompts, seeds, sampling),
        "vLLM": functools.partial(vllm, True, **logprobs),
        "no log-probs": functools.partial(vllm, True),
        "no seeds": functools.partial(vllm, False, **logprobs),
    }


def bookkeeping(llm, form: Callable[[], list]) -> dict[str, float]:
    """What vLLM's Python does for each token of each request, in microseconds per token.

    All of it runs in this thread, whatever the model. Sampling takes at least the sum.
    """
    engine = llm.llm_engine
    scheduler = engine.engine_core.engine_core.scheduler
    parts = {
        "schedule": (scheduler, "schedule"),
        "update requests": (scheduler, "update_from_output"),
        "outputs": (engine.output_processor, "process_outputs"),
    }
    seconds = dict.fromkeys(parts, 0.0)
    with contextlib.ExitStack() as stack:
        for name, (owner, method) in parts.items():
            wrapped = add_seconds(getattr(owner, method), seconds, name)
            stack.enter_context(mock.patch.object(owner, method, wrapped))
        start = time.perf_counter()
        found = form()
        total = time.perf_counter() - start
    tokens = sum(len(output.token_ids) for request in found for output in request.outputs)
    row = {f"{name} us/token": 1e6 * value / tokens for name, value in seconds.items()}
    return row | {"all us/token": 1e6 * total / tokens, "vLLM tokens": tokens}


def add_seconds(function, seconds: dict[str, float], name: str):
    """The function, which then adds the time of each call to seconds[name]."""

    @functools.wraps(function)
    def timed_call(*args, **kwargs):
        start = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            seconds[name] += time.perf_counter() - start

    return timed_call


def main(args: Args) -> None:
    common.start_ranks()
    clock.start(0)
    if args.part == "update":
        measure_updates(args)
    else:
        samplers.choose_sampler("vllm")  # it sets vLLM's environment
        for row in measure_step(args):
            args.rows.clear()
            report(args, row)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
