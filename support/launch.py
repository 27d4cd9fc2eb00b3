"""From the command line to a running process, and from its end to an exit code."""

import argparse
import dataclasses
import os
import signal
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import tyro

from support import toy
from support.clock import Clock
from support.errors import RunError, Stopped, UserError
from support.failures import describe
from support.prompts import parse_template_kwargs
from support.rendezvous import fresh_store
from support.rewards import load_reward
from support.signals import Signals
from support.util import compute_device, env
from support.watchdog import watch

# Defaults for a model of half a million parameters. They apply when --model is a toy.
TOY_DEFAULTS: dict[str, Any] = dict(
    train_data="toy:medium",
    eval_data=("toy:medium:test",),
    system_prompt="",  # its chat template has no place for one
    prompts_per_step=32,
    max_prompt_tokens=64,
    max_new_tokens=96,
    steps=60,
    minibatches=2,
    lr=5e-4,
    warmup_steps=5,
    eval_size=200,
    compile="off",
    activation_checkpointing=False,
)

# ---- command line --------------------------------------------------------------------------------


def parse_config(Config: type, presets: dict[str, dict], args: list[str] | None = None):
    """Command line to Config. A flag wins over the preset, the preset over the toy's defaults."""
    args = sys.argv[1:] if args is None else args
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--model", nargs="?", default="toy")
    early.add_argument("--preset", nargs="?", default="lite_ppo")
    known, _ = early.parse_known_args(args)
    settings = presets.get(known.preset, {})
    asks_for_help = "-h" in args or "--help" in args  # help shows the defaults of real models
    if toy.is_toy(known.model or "") and not asks_for_help:
        settings = TOY_DEFAULTS | settings
    cfg = parse_groups(Config, Config(**settings), args)
    check_config(cfg, env("WORLD_SIZE", 1))
    return cfg


def parse_groups(Config: type, default: Any, args: list[str]):
    """Parse the flags. --help shows one box for each base class of Config."""
    groups = [(base.__name__.lower(), base) for base in Config.__bases__]
    grouped = dataclasses.make_dataclass("Config", groups)
    values = dataclasses.asdict(default)
    defaults = {name: base(**take(base, values)) for name, base in groups}
    parsed = tyro.cli(
        tyro.conf.OmitArgPrefixes[grouped],
        args=args,
        default=grouped(**defaults),
        prog="lite_ppo.py",
        description=f"{Config.__doc__}\n\n{describe_toy()}",
        console_outputs=env("RANK", 0) == 0,  # rank 0 speaks for all ranks
    )
    flags = {}
    for name, base in groups:
        flags |= take(base, vars(getattr(parsed, name)))
    return Config(**flags)


def take(base: type, values: dict[str, Any]) -> dict[str, Any]:
    """The values of the fields of a dataclass."""
    return {field.name: values[field.name] for field in dataclasses.fields(base)}


def describe_toy() -> str:
    flags = []
    for name, value in TOY_DEFAULTS.items():
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            flags.append(flag if value else flag.replace("--", "--no-", 1))
        else:
            text = " ".join(value) if isinstance(value, tuple) else str(value)
            flags.append(f"{flag} {text or repr(text)}")
    return (
        "A flag wins over the preset, the preset over the defaults. Without --model an embedded "
        "toy model is trained, with these defaults: " + ", ".join(flags) + "."
    )


LOWEST = {  # lowest legal value: flags
    1: (
        *("prompts_per_step", "group_size", "max_prompt_tokens", "max_new_tokens", "steps"),
        *("minibatches", "micro_batch_tokens", "max_num_seqs", "eval_samples"),
    ),
    0: (
        *("seed", "top_k", "lr", "warmup_steps", "kl_coef", "tis_cap"),
        *("clip_low", "clip_high", "dual_clip", "overlong_buffer", "max_logprob_gap"),
        *("eval_every", "eval_size", "eval_temperature", "save_every", "samples_per_step"),
        *("reward_workers", "reward_memory_gib", "shard_ranks"),
    ),
}
POSITIVE = (
    *("temperature", "top_p", "max_grad_norm", "reward_timeout", "timeout_minutes"),
    "gpu_memory_utilization",
)
AT_MOST_ONE = ("top_p", "clip_low", "overlong_buffer", "gpu_memory_utilization")
LARGEST = 2**31  # of any number
MOST_RESPONSES = 2**20  # per step


def need(ok: bool, cfg, flag: str, remedy: str) -> None:
    """UserError that names a flag, its value and the remedy, unless ok."""
    if not ok:
        raise UserError(f"--{flag.replace('_', '-')} {getattr(cfg, flag)}: {remedy}")


def check_config(cfg, world: int) -> None:
    """Reject impossible values and contradictions before anything is loaded."""
    check_bounds(cfg)
    responses = cfg.prompts_per_step * cfg.group_size
    need(cfg.dual_clip == 0 or cfg.dual_clip > 1, cfg, "dual_clip", "must be above 1, or 0 = off")
    need(cfg.reward_low < 1, cfg, "reward_low", "must be below 1, the reward of a correct response")
    grouped = cfg.advantage_mean in ("group", "leave_one_out") or cfg.advantage_std == "group"
    text = "a group mean or std needs at least 2 responses per prompt"
    need(cfg.group_size > 1 or not grouped, cfg, "group_size", text)
    text = (
        "--dynamic-sampling keeps groups with right and wrong responses, so a group needs at least "
        "2; raise it, or leave --dynamic-sampling out"
    )
    need(cfg.group_size > 1 or not cfg.dynamic_sampling, cfg, "group_size", text)
    leave_one_out = cfg.advantage_mean == "leave_one_out"
    text = "--advantage-mean leave_one_out needs none"
    need(cfg.advantage_std == "none" or not leave_one_out, cfg, "advantage_std", text)
    text = f"needs at least as many responses per step (now {responses})"
    need(responses >= max(2, cfg.minibatches), cfg, "minibatches", text)
    text = f"must divide the number of ranks, {world}"
    need(cfg.shard_ranks == 0 or world % cfg.shard_ranks == 0, cfg, "shard_ranks", text)
    text = f"times --group-size {cfg.group_size} is more than 2^20 responses per step"
    need(responses <= MOST_RESPONSES, cfg, "prompts_per_step", text)
    text = "there is no GPU to offload; leave it out"
    need(torch.cuda.is_available() or not cfg.cpu_offload, cfg, "cpu_offload", text)
    text = (
        "missing; give a JSONL file with a problem and an answer per line, "
        "easy, medium, hard, or a hub data set"
    )
    need(cfg.train_data != "", cfg, "train_data", text)
    parse_template_kwargs(cfg.chat_template_kwargs)
    load_reward(cfg.reward)


def check_bounds(cfg) -> None:
    for field in dataclasses.fields(cfg):
        value = getattr(cfg, field.name)
        in_range = not isinstance(value, (int, float)) or abs(value) <= LARGEST
        need(in_range, cfg, field.name, "must be a finite number of at most 2^31 in size")
    for bound, flags in LOWEST.items():
        for flag in flags:
            need(getattr(cfg, flag) >= bound, cfg, flag, f"must be at least {bound}")
    for flag in POSITIVE:
        need(getattr(cfg, flag) > 0, cfg, flag, "must be positive")
    for flag in AT_MOST_ONE:
        need(getattr(cfg, flag) <= 1, cfg, flag, "must be at most 1")


# ---- start and end of the process ----------------------------------------------------------------


def connect(cfg) -> None:
    """Start torch.distributed and the watchdog. A process without a launcher is one rank."""
    for name, value in ONE_RANK.items():
        os.environ.setdefault(name, value)
    if torch.cuda.is_available():
        check_gpus(env("LOCAL_WORLD_SIZE", 1), torch.cuda.device_count())
        torch.cuda.set_device(compute_device())
    limit = timedelta(minutes=cfg.timeout_minutes + 2)  # for ranks that do not join
    store = dist.HashStore()
    rank = 0
    world = 1
    if "MASTER_ADDR" in os.environ:
        try:
            rendezvous = next(dist.rendezvous("env://", timeout=limit))
            store, rank, world = fresh_store(*rendezvous, limit)
        except (dist.DistNetworkError, ValueError) as error:
            address = os.environ["MASTER_ADDR"]
            port = os.environ.get("MASTER_PORT")
            raise UserError(
                f"MASTER_ADDR {address}, MASTER_PORT {port}: {error}; is another run using the "
                "port? torchrun --master-port sets another"
            ) from None
    # gloo beside nccl: objects, checkpoints and offloaded gradients travel through host memory.
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    # A healthy rank may keep the others waiting for longer. The watchdog finds one that hangs.
    patience = limit + timedelta(days=1)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=patience)
    watch(cfg.timeout_minutes, rank, world, store.clone() if world > 1 else None)


def check_gpus(ranks: int, gpus: int) -> None:
    """UserError if ranks of this machine would share a GPU, which nccl refuses."""
    if ranks > gpus:
        raise UserError(
            f"--nproc-per-node {ranks}: torch finds {gpus} GPU(s) on this machine, and each rank "
            f"needs its own; give torchrun --nproc-per-node {gpus}, or make more GPUs visible "
            "(CUDA_VISIBLE_DEVICES)"
        )


SECONDS_TO_PRINT = 3  # that the other ranks give the one that prints the message
ONE_RANK = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}


def main(Config: type, presets: dict[str, dict], train: Callable) -> int:
    """Exit code: 0 done, 1 failed, 2 a mistake of the user, 128 + signal stopped."""
    # Until the loop installs its own handlers, Ctrl-C exits without a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    message = ""
    code = 0
    try:
        cfg = parse_config(Config, presets)
        connect(cfg)
        train(cfg)
    except Stopped:
        code = 128 + (Signals.received or signal.SIGTERM)
    except UserError as error:
        code = 2
        message = str(error)
    except RunError as error:
        code = 1
        message = f"{Clock.where()}: {error}"
    except (Exception, dcp.api.CheckpointException) as error:  # torch's is not an Exception
        code = 1
        print(describe(error, env("RANK", 0)), file=sys.stderr, flush=True)
    if message and env("LOCAL_RANK", 0) == 0:  # every rank has the same message
        print(f"error: {message}", file=sys.stderr, flush=True)
    elif code == 2:  # the launcher ends all ranks as soon as one ends
        time.sleep(SECONDS_TO_PRINT)
    if code and env("WORLD_SIZE", 1) > 1:
        # Other ranks may be waiting in a collective. The launcher ends them.
        sys.stdout.flush()
        os._exit(code)
    if dist.is_initialized() and code == 0:  # after a failure, vLLM still needs it when it exits
        dist.destroy_process_group()
    return code
