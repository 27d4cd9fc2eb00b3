"""The command line: from flags to a Config, and the checks of their values."""

import argparse
import dataclasses
import sys
from typing import Any, NoReturn

import torch
import tyro

from support import toy
from support.errors import UserError
from support.prompts import parse_template_kwargs
from support.rewards import load_reward
from support.util import env

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

# ---- from flags to a Config ----------------------------------------------------------------------


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
    """The order of defaults, presets and flags, and the toy's defaults, for --help."""
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


# ---- the checks ----------------------------------------------------------------------------------

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


def refuse(cfg, flag: str, remedy: str) -> NoReturn:
    """Raise a UserError that names a flag, its value and the remedy."""
    raise UserError(f"--{flag.replace('_', '-')} {getattr(cfg, flag)}: {remedy}")


def check_config(cfg, world: int) -> None:
    """UserError for impossible values and contradictions, before anything is loaded.

    world: number of ranks.
    """
    check_bounds(cfg)
    if 0 < cfg.dual_clip <= 1:
        refuse(cfg, "dual_clip", "must be above 1, or 0 = off")
    if cfg.reward_low >= 1:
        refuse(cfg, "reward_low", "must be below 1, the reward of a correct response")
    if cfg.advantage_mean == "leave_one_out" and cfg.advantage_std != "none":
        refuse(cfg, "advantage_std", "--advantage-mean leave_one_out needs none")
    check_sizes(cfg)
    if cfg.shard_ranks and world % cfg.shard_ranks != 0:
        refuse(cfg, "shard_ranks", f"must divide the number of ranks, {world}")
    if cfg.cpu_offload and not torch.cuda.is_available():
        refuse(cfg, "cpu_offload", "there is no GPU to offload; leave it out")
    if not cfg.train_data:
        remedy = (
            "missing; give a JSONL file with a problem and an answer per line, "
            "easy, medium, hard, or a hub data set"
        )
        refuse(cfg, "train_data", remedy)
    parse_template_kwargs(cfg.chat_template_kwargs)
    load_reward(cfg.reward)


def check_sizes(cfg) -> None:
    """UserError if a step or a group has too few responses for the other flags, or too many."""
    responses = cfg.prompts_per_step * cfg.group_size
    needs_group = cfg.advantage_mean in ("group", "leave_one_out") or cfg.advantage_std == "group"
    if cfg.group_size == 1 and needs_group:
        refuse(cfg, "group_size", "a group mean or std needs at least 2 responses per prompt")
    if cfg.group_size == 1 and cfg.dynamic_sampling:
        remedy = (
            "--dynamic-sampling keeps groups with right and wrong responses, so a group needs at "
            "least 2; raise it, or leave --dynamic-sampling out"
        )
        refuse(cfg, "group_size", remedy)
    if responses < max(2, cfg.minibatches):
        remedy = f"needs at least as many responses per step (now {responses})"
        refuse(cfg, "minibatches", remedy)
    if responses > MOST_RESPONSES:
        remedy = f"times --group-size {cfg.group_size} is more than 2^20 responses per step"
        refuse(cfg, "prompts_per_step", remedy)


def check_bounds(cfg) -> None:
    """UserError for a number that is out of the range of its flag."""
    for field in dataclasses.fields(cfg):
        value = getattr(cfg, field.name)
        if isinstance(value, (int, float)) and not abs(value) <= LARGEST:  # also true for NaN
            refuse(cfg, field.name, "must be a finite number of at most 2^31 in size")
    for bound, flags in LOWEST.items():
        for flag in flags:
            if getattr(cfg, flag) < bound:
                refuse(cfg, flag, f"must be at least {bound}")
    for flag in POSITIVE:
        if getattr(cfg, flag) <= 0:
            refuse(cfg, flag, "must be positive")
    for flag in AT_MOST_ONE:
        if getattr(cfg, flag) > 1:
            refuse(cfg, flag, "must be at most 1")
