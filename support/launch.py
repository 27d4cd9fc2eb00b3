"""The start of the process, and its end with an exit code."""

import os
import signal
import sys
import time
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from support.cli import parse_config
from support.clock import clock
from support.errors import RunError, Stopped, UserError
from support.failures import describe, rank_has_ended
from support.rendezvous import meet_ranks
from support.signals import Signals
from support.util import compute_device, env
from support.watchdog import watch

SECONDS_TO_WAIT = 3  # for the rank that prints the message, or that ended first
ONE_RANK = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}


def connect(cfg) -> None:
    """Start torch.distributed and the watchdog. A process without a launcher is the only rank."""
    for name, value in ONE_RANK.items():
        os.environ.setdefault(name, value)
    if torch.cuda.is_available():
        check_gpus(env("LOCAL_WORLD_SIZE", 1), torch.cuda.device_count())
        torch.cuda.set_device(compute_device())
    limit = timedelta(minutes=cfg.timeout_minutes + 2)  # for ranks that do not join
    store, rank, world = meet_ranks(limit)
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
        message = f"{clock.where()}: {error}"
    except (Exception, dcp.api.CheckpointException) as error:  # torch's is not an Exception
        code = 1
        print(describe(error, env("RANK", 0)), file=sys.stderr, flush=True)
        if rank_has_ended(error):  # the launcher names the first rank that it sees end
            time.sleep(SECONDS_TO_WAIT)
    if message and env("LOCAL_RANK", 0) == 0:  # every rank has the same message
        print(f"error: {message}", file=sys.stderr, flush=True)
    elif code == 2:  # the launcher ends all ranks as soon as one ends
        time.sleep(SECONDS_TO_WAIT)
    if code and env("WORLD_SIZE", 1) > 1:
        # Other ranks may be waiting in a collective. The launcher ends them.
        sys.stdout.flush()
        os._exit(code)
    if dist.is_initialized() and code == 0:  # after a failure, vLLM still needs it when it exits
        dist.destroy_process_group()
    return code
