r"""One step of the trainer, phase by phase: seconds, tokens per second, peak memory, MFU on GPUs.

    python benchmarks/step.py                    # toy shape, any machine
    python benchmarks/step.py --shape qwen3-0.6b --prompts-per-step 2 --group-size 2 \
        --max-new-tokens 16                      # without a GPU, 24 GiB of memory
    python benchmarks/step.py --shape qwen3-1.7b --prompts-per-step 2 --group-size 4 \
        --update-only 16384                      # a GPU, 8 x 16k tokens
    torchrun --nproc-per-node 8 benchmarks/step.py --shape qwen3-8b ...

It runs the functions of lite_ppo.py on a model of the given shape with random weights: rollout,
reward, old log-probs, update, sync. All flags of lite_ppo.py count, except those of evaluation.
Rewards are random, because random weights solve nothing. With a large vocabulary random weights
never end a response either, so every response has --max-new-tokens. With --update-only N only the
update runs, on random sequences of N tokens, --prompt-length of them prompt. The first step warms
up and does not count. Medians of the other steps are printed.

FLOPs are counted by hand from the shape: 2 per weight and token forward, 4 backward; weights of the
head only where a response token is predicted; attention 2 L^2 width per layer forward (causal: half
of all pairs), twice that backward. MFU counts these alone. HFU adds what is computed twice: the
blocks under activation checkpointing and the logits in backward (linear_logprobs). Both are over
the seconds of the update and the dense bfloat16 peak of the data sheets.
"""

import os
import time
from dataclasses import asdict, dataclass, field
from statistics import median

import common  # first: it makes lite_ppo importable
import torch
import torch.distributed as dist
import tyro

import lite_ppo
from support import samplers
from support.actor import Actor
from support.clock import clock
from support.data import load_sets
from support.grader import Grader
from support.metrics import peak_flops, train_flops
from support.models import load_tokenizer
from support.util import compute_device, compute_dtype


def default_config() -> lite_ppo.Config:
    return lite_ppo.Config(
        prompts_per_step=8,
        group_size=4,
        max_prompt_tokens=64,
        max_new_tokens=64,
        reward="exact",
        reward_workers=1,
        train_data="toy:medium",
        warmup_steps=0,
    )


@dataclass
class Args:
    config: tyro.conf.OmitArgPrefixes[lite_ppo.Config] = field(default_factory=default_config)
    shape: str = "toy"  # a name in common.SHAPES, or JSON text with fields of a Qwen3 config
    rounds: int = 3  # steps that count
    update_only: int = 0  # tokens of each sequence; only the update runs
    prompt_length: int = 128  # of these tokens
    peak_tflops: float = 0.0  # of one device; 0: by the name of the GPU
    keep_model: str = ""  # folder in which the random model stays for the next time
    pin: bool = False  # each rank on its own CPU core, with one thread
    weights: str = ""  # file for the trained weights
    output: str = ""  # JSON file


# ---- FLOPs ---------------------------------------------------------------------------------------


def count_flops(config, prompt: int, response: int, recompute: bool) -> tuple[float, float]:
    """(model, hardware) operations of forward and backward over one sequence.

    The last token of the sequence is not an input.
    """
    D, layers, length = config.hidden_size, config.num_hidden_layers, prompt + response - 1
    head_dim = getattr(config, "head_dim", None) or D // config.num_attention_heads
    width = config.num_attention_heads * head_dim
    kv_width = config.num_key_value_heads * head_dim
    projections = D * width + 2 * D * kv_width + width * D  # q; k and v; o
    weights = projections + 3 * D * config.intermediate_size
    # scores and values: length^2 / 2 pairs, 2 products, 2 operations each
    blocks = layers * (2 * length * weights + 2 * length**2 * width)
    head = 2 * response * D * config.vocab_size
    return 3 * (blocks + head), (4 if recompute else 3) * blocks + 4 * head


def device_flops(args: Args) -> float:
    """Peak operations per second of one device; 0 where it is not known."""
    return args.peak_tflops * 1e12 or peak_flops()


def count_step_flops(args: Args, config, lengths: list[tuple[int, int]]) -> dict[str, float]:
    """Of all sequences of a step; lengths: (prompt, response) of each."""
    recompute = args.config.activation_checkpointing
    counts = [count_flops(config, *pair, recompute) for pair in lengths]
    return {
        "model": sum(model for model, _ in counts),
        "hardware": sum(hardware for _, hardware in counts),
        "train_flops": sum(train_flops(config, sum(pair), pair[1]) for pair in lengths),
    }


# ---- steps ---------------------------------------------------------------------------------------


@dataclass
class Step:
    seconds: dict[str, float]  # of each phase
    memory: dict[str, float]  # GiB, peak of each phase
    responses: list
    metrics: dict[str, float]


class Bench:
    """The parts of the trainer: policy, optimizer and, for whole steps, sampler and grader."""

    def __init__(self, args: Args, folder: str, sampler: str):
        self.args, cfg = args, args.config
        self.device, self.dtype = compute_device(), compute_dtype(cfg.dtype)
        self.sampler = self.grader = self.reference = None
        self.cursor = 0
        if sampler:
            room = cfg.max_prompt_tokens + cfg.max_new_tokens
            self.tokenizer, eos_ids = load_tokenizer(folder, room)
            self.train_set, _ = load_sets(self.tokenizer, cfg)
            self.grader = Grader(cfg)
            self.sampler = samplers.make(sampler, cfg, folder, eos_ids, self.device, self.dtype)
        self.policy = lite_ppo.build_policy(cfg, folder, self.device)
        if cfg.kl_coef:
            self.reference = lite_ppo.build_policy(cfg, folder, self.device, trainable=False)
        self.optimizer = torch.optim.AdamW(
            self.policy.parameters(), lr=cfg.lr, weight_decay=0.0, fused=True
        )
        if self.sampler:
            lite_ppo.sync_weights(self.sampler, self.policy, self.dtype)

    def responses(self, step: int) -> list:
        cfg, args = self.args.config, self.args
        if self.sampler:
            actor = Actor(self.sampler, self.tokenizer, self.grader)
            responses, _, self.cursor = lite_ppo.rollout(actor, self.train_set, self.cursor, cfg)
            self.sampler.sleep()
            return responses
        lengths = [args.update_only - args.prompt_length] * (cfg.prompts_per_step * cfg.group_size)
        return common.synthetic(lengths, args.prompt_length, self.policy.config.vocab_size, step)

    def run_step(self, step: int) -> Step:
        cfg = self.args.config
        clock.start(step)
        began = time.perf_counter()
        responses = self.responses(step)
        generator = torch.Generator().manual_seed(step)
        rewards = torch.rand(cfg.prompts_per_step, cfg.group_size, generator=generator)
        advantages = lite_ppo.compute_advantages(rewards, cfg)
        minibatches = lite_ppo.make_minibatches(responses, advantages, step, cfg)
        lite_ppo.add_logprobs(self.policy, self.reference, minibatches, cfg)
        stats = lite_ppo.update(self.policy, self.optimizer, minibatches, step, cfg)
        if self.sampler:
            lite_ppo.sync_weights(self.sampler, self.policy, self.dtype)
        clock.seconds["step"] = time.perf_counter() - began
        return Step(clock.seconds, clock.memory, responses, stats.reduce(responses))

    def save_weights(self, file: str) -> None:
        """Every rank must call this."""
        weights = lite_ppo.full_weights(self.policy, torch.float32)
        state = {name: tensor.cpu() for name, tensor in weights}
        if dist.get_rank() == 0:
            torch.save(state, file)

    def close(self) -> None:
        if self.sampler:
            self.grader.close()
            self.sampler.close()  # vLLM ends torch.distributed as well
        if dist.is_initialized():
            dist.destroy_process_group()


# ---- report --------------------------------------------------------------------------------------


def phase_rows(args: Args, steps: list[Step], lengths: list[tuple[int, int]]) -> list[dict]:
    cfg, total = args.config, sum(map(sum, lengths))
    # the first mini-batch needs no old log-probs
    passes = (cfg.minibatches - 1) / cfg.minibatches + (cfg.kl_coef > 0)
    tokens = {
        "rollout": sum(response for _, response in lengths),
        "logprobs": passes * total,
        "update": total,
        "step": total,
    }
    rows = []
    for phase in ("rollout", "reward", "logprobs", "update", "sync", "step"):
        seconds = median(step.seconds[phase] for step in steps)
        peaks = [0.0] * dist.get_world_size()
        dist.all_gather_object(peaks, max(step.memory[phase] for step in steps))
        if seconds > 1e-3:
            row = {"phase": phase, "seconds": seconds}
            row["tokens/s"] = tokens[phase] / seconds if phase in tokens else ""
            row["peak GiB of a rank"] = max(peaks) or ""  # not measured for the whole step
            rows.append(row)
    return rows


def totals(args: Args, bench: Bench, last: Step, update: float, lengths) -> dict:
    """Numbers of a whole step; `update` is the median of its seconds."""
    flops = count_step_flops(args, bench.policy.config, lengths)
    per_rank, peak = update * dist.get_world_size(), device_flops(args)
    return {
        "sequences": len(lengths),
        "tokens": sum(map(sum, lengths)),
        "parameters": sum(p.numel() for p in bench.policy.parameters()),
        "model TFLOP": flops["model"] / 1e12,
        "TFLOP/s per rank": flops["model"] / per_rank / 1e12,
        "MFU": flops["model"] / per_rank / peak if peak else None,
        "HFU": flops["hardware"] / per_rank / peak if peak else None,
        "train_flops / model": flops["train_flops"] / flops["model"],
        "loss": last.metrics["policy/loss"],
        "grad_norm": last.metrics["policy/grad_norm"],
        "logprob gap": last.metrics["rollout/logprob_gap_mean"] if bench.sampler else None,
    }


def report(args: Args, bench: Bench, steps: list[Step]) -> None:
    pairs = [(r.problem.prompt_ids, r.token_ids) for r in steps[-1].responses]
    lengths = [(len(prompt), len(response)) for prompt, response in pairs]
    rows = phase_rows(args, steps, lengths)
    update = next(row["seconds"] for row in rows if row["phase"] == "update")
    found = totals(args, bench, steps[-1], update, lengths)
    if dist.get_rank() > 0:
        return
    common.table(rows)
    print()
    for key, value in found.items():
        if value is not None:
            print(f"{key:28s}{value if isinstance(value, int) else f'{value:.4g}'}")
    common.finish(
        args.output,
        asdict(args),
        world=dist.get_world_size(),
        rows=rows,
        totals=found,
        seconds=[dict(step.seconds) for step in steps],
    )


def pin_to_core() -> None:
    cores = sorted(os.sched_getaffinity(0))
    rank = int(os.environ.get("LOCAL_RANK", "0"))
    os.sched_setaffinity(0, {cores[rank % len(cores)]})
    torch.set_num_threads(1)


def main(args: Args) -> None:
    if args.pin:
        pin_to_core()
    sampler = ""
    if args.update_only:
        args.config.max_logprob_gap = 1e9  # the sampler did not make these responses
    else:
        sampler, _ = samplers.choose_sampler(args.config.sampler)
    rank, world = common.start_ranks()
    if rank == 0:
        kind = f"sampler {sampler}" if sampler else "update only"
        where = f"{compute_device().type}, {compute_dtype(args.config.dtype)}"
        print(f"{args.shape}, {world} rank(s), {where}, {kind}", flush=True)
    with common.model_folder(args.shape, args.keep_model) as folder:
        bench = Bench(args, folder, sampler)
    steps = [bench.run_step(step) for step in range(1, args.rounds + 2)]
    report(args, bench, steps[1:])
    if args.weights:
        bench.save_weights(args.weights)
    bench.close()


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
