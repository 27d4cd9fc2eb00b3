"""From the command line to a running process, and from its end to an exit code."""

import argparse
import dataclasses
import os
import signal
import sys
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import tyro

from support import guard
from support.clock import Clock
from support.errors import RunError, Stopped, UserError
from support.guard import Signals
from support.rewards import load_reward
from support.util import compute_device, env

# What suits a model of half a million parameters; replaces the defaults above when --model is a toy.
TOY: dict[str, Any] = dict(
    train_data="toy:medium", eval_data=("toy:medium:test",), prompts_per_step=32, max_prompt_tokens=64, max_new_tokens=96, steps=60, minibatches=2,
    lr=5e-4, warmup_steps=5, eval_size=200, activation_checkpointing=False, samples_per_step=2,
)  # fmt: skip

AT_LEAST = {  # lowest legal value of each number
    1: "prompts_per_step max_prompt_tokens max_new_tokens steps minibatches micro_batch_tokens max_num_seqs eval_samples eval_pass_k dynamic_rounds "
       "keep_checkpoints group_size max_skipped_steps",
    0: "seed top_k lr warmup_steps weight_decay kl_coef tis_cap clip_low clip_high advantage_eps eval_every eval_size save_every samples_per_step "
       "reward_workers eval_temperature max_logprob_gap overlong_buffer shard_ranks reward_memory_gib max_failed_rewards dual_clip",
    1e-9: "temperature top_p max_grad_norm reward_timeout timeout_minutes gpu_memory_utilization",
}  # fmt: skip


def parse_config(Config, presets, args: list[str] | None = None):
    """Command line -> Config: defaults < settings of the toy (if --model is one) < preset < flags."""
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--model", nargs="?", default="toy")
    early.add_argument("--preset", nargs="?", default="lite_ppo")
    known, _ = early.parse_known_args(args)
    settings = (TOY if (known.model or "").split(":")[0] == "toy" else {}) | presets.get(known.preset, {})
    # Rank 0 speaks for all of them.
    cfg = tyro.cli(Config, args=args, default=Config(**settings), prog="lite_ppo.py", console_outputs=env("RANK", 0) == 0)
    check_config(cfg, env("WORLD_SIZE", 1))
    return cfg


def check_config(cfg, world: int) -> None:
    """Impossible values and contradictions end here, before anything is loaded."""

    def need(ok: bool, flag: str, remedy: str) -> None:
        if not ok:
            raise UserError(f"--{flag.replace('_', '-')} {getattr(cfg, flag)}: {remedy}")

    for field in dataclasses.fields(cfg):
        value = getattr(cfg, field.name)
        need(not isinstance(value, (int, float)) or abs(value) <= 2**31, field.name, "must be a finite number, at most 2^31 in size")
    for bound, flags in AT_LEAST.items():
        for flag in flags.split():
            need(getattr(cfg, flag) >= bound, flag, "must be positive" if 0 < bound < 1 else f"must be at least {bound}")
    for flag in ("top_p", "clip_low", "overlong_buffer", "gpu_memory_utilization"):
        need(getattr(cfg, flag) <= 1, flag, "must be at most 1")
    need(cfg.dual_clip == 0 or cfg.dual_clip > 1, "dual_clip", "must be above 1, or 0 = off")
    need(cfg.reward_high > cfg.reward_low, "reward_high", f"must be above --reward-low {cfg.reward_low}")
    grouped = cfg.advantage_mean in ("group", "leave_one_out") or cfg.advantage_std == "group"
    need(cfg.group_size > 1 or not grouped, "group_size", "a group mean or std needs at least 2 responses per prompt")
    need(cfg.advantage_mean != "leave_one_out" or cfg.advantage_std == "none", "advantage_std", "--advantage-mean leave_one_out takes none")
    need(cfg.prompts_per_step * cfg.group_size >= max(2, cfg.minibatches), "minibatches", "more of them than responses per step")
    need(cfg.eval_pass_k <= cfg.eval_samples, "eval_pass_k", f"needs at least as many --eval-samples (now {cfg.eval_samples})")
    need(cfg.shard_ranks == 0 or world % cfg.shard_ranks == 0, "shard_ranks", f"must divide the number of ranks, {world}")
    need(cfg.prompts_per_step * cfg.group_size <= 2**20, "prompts_per_step", f"times --group-size {cfg.group_size} is more than 2^20 responses per step")
    need(torch.cuda.is_available() or not cfg.cpu_offload, "cpu_offload", "there is no GPU to unload; leave it out")
    need(cfg.train_data != "", "train_data", "missing; give a JSONL file with a problem and an answer per line, easy, medium, hard, or a hub set")
    load_reward(cfg.reward)


# ---- start and end of the process ------------------------------------------------------------------------------------


def connect(cfg) -> None:
    """torch.distributed and the watchdog; a process without a launcher is one rank."""
    for name, value in dict(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_WORLD_SIZE="1").items():
        os.environ.setdefault(name, value)
    if torch.cuda.is_available():
        torch.cuda.set_device(compute_device())
    limit, store, rank, world = timedelta(minutes=cfg.timeout_minutes + 2), dist.HashStore(), 0, 1  # the watchdog speaks first
    if "MASTER_ADDR" in os.environ:
        try:
            store, rank, world = guard.fresh_store(*next(dist.rendezvous("env://", timeout=limit)), limit)
        except (dist.DistNetworkError, ValueError) as error:
            where = f"MASTER_ADDR {os.environ['MASTER_ADDR']}, MASTER_PORT {os.environ.get('MASTER_PORT')}"
            raise UserError(f"{where}: {error}; is another run using the port? torchrun --master-port takes another") from None
    # gloo beside nccl: objects, checkpoints and offloaded gradients travel through host memory.
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", store=store, rank=rank, world_size=world, timeout=limit)
    guard.watch(cfg.timeout_minutes, rank, world, store.clone() if world > 1 else None)


def main(Config, presets, train) -> int:
    """Exit code: 0 done, 1 failed, 2 a mistake of the caller's, 128 + signal stopped."""
    try:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        cfg = parse_config(Config, presets)
        connect(cfg)
        train(cfg)
        code, message = 0, ""
    except Stopped:
        code, message = 128 + (Signals.received or signal.SIGTERM), ""
    except UserError as error:
        code, message = 2, str(error)
    except RunError as error:
        code, message = 1, f"{Clock.where()}: {error}"
    except (Exception, dcp.api.CheckpointException) as error:  # torch's report about all ranks is no Exception
        code, message = 1, ""
        print(guard.describe(error, env("RANK", 0)), file=sys.stderr, flush=True)
    if message and env("LOCAL_RANK", 0) == 0:  # every rank finds the same
        print(f"error: {message}", file=sys.stderr, flush=True)
    if code and env("WORLD_SIZE", 1) > 1:
        sys.stdout.flush()
        os._exit(code)  # other ranks may be waiting in a collective: do not wait for them; the launcher ends them
    if dist.is_initialized():
        dist.destroy_process_group()
    return code
