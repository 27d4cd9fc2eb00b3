"""Two steps of the trainer, with the peak memory of each phase; memory_plan.py --check runs it.

    python benchmarks/memory_trial.py MODEL OUTPUT.json [flags of lite_ppo.py]

Two steps, because the moments of Adam exist from the second step on. Prompts are random tokens.
"""

import contextlib
import json
import sys
import time
from collections import defaultdict
from pathlib import Path

import common  # first: it makes lite_ppo importable
import numpy as np
import torch
import torch._dynamo  # noqa: F401  the optimizer imports it
import torch.distributed as dist

import lite_ppo
from support import cli, samplers
from support.data import Problem
from support.models import load_tokenizer
from support.sampling import Sampling
from support.util import compute_device, compute_dtype, seed_for

SPECIAL = 5  # tokens at the start of the toy's vocabulary


class Memory:
    """`with memory("update"):` keeps the highest memory of each phase, in bytes.

    CPU: the peak of the resident set. CUDA: what torch's allocator gave out beside the engine.
    """

    def __init__(self):
        self.peaks: dict[str, int] = defaultdict(int)
        self.engine = 0

    @contextlib.contextmanager
    def __call__(self, phase: str):
        common.memory(reset=True)
        yield
        peak = common.memory()[1] - self.engine
        self.peaks[phase] = max(self.peaks[phase], peak)

    def note(self, name: str) -> None:
        """Keep the memory in use now."""
        self.peaks[name] = common.memory()[0]


class Trial:
    """The parts of a run, loaded under observation."""

    def __init__(self, cfg, path: str):
        self.cfg, self.memory, self.seconds = cfg, Memory(), {}
        self.kind, _ = samplers.choose_sampler(cfg.sampler)
        room = cfg.max_prompt_tokens + cfg.max_new_tokens
        self.tokenizer, eos_ids = load_tokenizer(path, room)
        device, self.dtype = compute_device(), compute_dtype(cfg.dtype)
        import transformers.models.qwen3.modeling_qwen3  # noqa: F401  part of the process

        self.memory.note("process")
        began = time.perf_counter()
        with self.memory("load"):
            self.engine = samplers.make(self.kind, cfg, path, eos_ids, device, self.dtype)
        self.memory.note("engine")
        if common.CUDA:
            self.memory.engine = self.memory.peaks["engine"]
        with self.memory("load"):
            self.load_policy(path, device)
        self.memory.note("policy")
        self.seconds["load"] = time.perf_counter() - began
        self.sync()

    def load_policy(self, path: str, device) -> None:
        cfg, self.reference = self.cfg, None
        self.policy = lite_ppo.build_policy(cfg, path, device)
        if cfg.kl_coef:
            self.reference = lite_ppo.build_policy(cfg, path, device, trainable=False)
        self.optimizer = torch.optim.AdamW(
            self.policy.parameters(), lr=cfg.lr, weight_decay=0.0, fused=True
        )

    def sync(self) -> None:
        with self.memory("sync"):
            lite_ppo.sync_weights(self.engine, self.policy, self.dtype)

    def rollout(self, problems: list[Problem], step: int) -> list:
        cfg = self.cfg
        sampling = Sampling(cfg.group_size, cfg.max_new_tokens, cfg.temperature)
        seeds = [seed_for(step, i) for i in range(len(problems))]
        with self.memory("rollout"):
            groups = self.engine.generate([p.prompt_ids for p in problems], seeds, sampling)
        responses = []
        for problem, group in zip(problems, groups, strict=True):
            for k, sample in enumerate(group):
                responses.append(lite_ppo.Response(problem, *sample, "", score=float(k % 2)))
        self.engine.sleep()
        return responses

    def run_step(self, problems: list[Problem], step: int) -> list:
        """Returns the responses."""
        cfg, began = self.cfg, time.perf_counter()
        responses = self.rollout(problems, step)
        advantages = torch.tensor([1.0 if r.score else -1.0 for r in responses])
        minibatches = lite_ppo.make_minibatches(responses, advantages, step, cfg)
        with self.memory("logprobs"):
            lite_ppo.add_logprobs(self.policy, self.reference, minibatches, cfg)
        with self.memory("update"):
            lite_ppo.update(self.policy, self.optimizer, minibatches, step, cfg)
        self.sync()
        self.seconds[f"step {step}"] = time.perf_counter() - began
        return responses


def make_problems(cfg, vocabulary: int) -> list[Problem]:
    generator, problems = np.random.default_rng(0), []
    for i in range(cfg.prompts_per_step):
        length = max(1, cfg.max_prompt_tokens - i % 4)
        prompt_ids = generator.integers(SPECIAL, vocabulary, length).tolist()
        problems.append(Problem({"problem": "?", "answer": "0"}, prompt_ids))
    return problems


def largest_micro_batch(responses: list, cfg) -> int:
    """Its tokens."""
    sizes = [len(r.problem.prompt_ids) + len(r.token_ids) - 1 for r in responses]
    first = sizes[: -(-len(sizes) // cfg.minibatches)]
    plan = lite_ppo.plan_micro_batches(first, cfg.micro_batch_tokens, 1)[0]
    return max(sum(sizes[i] for i in members) for members in plan if members)


def main(path: str, output: str, flags: list[str]) -> None:
    command_line = ["--model", path, "--train-data", "-", *flags]
    cfg = cli.parse_config(lite_ppo.Config, lite_ppo.PRESETS, command_line)
    common.start_ranks()
    trial = Trial(cfg, path)
    problems = make_problems(cfg, len(trial.tokenizer))
    tokens = 0
    for step in (1, 2):
        responses = trial.run_step(problems, step)
        tokens = max(tokens, largest_micro_batch(responses, cfg))
    measured = dict(peaks=trial.memory.peaks, seconds=trial.seconds, tokens=tokens, kind=trial.kind)
    Path(output).write_text(json.dumps(measured))
    trial.engine.close()
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
