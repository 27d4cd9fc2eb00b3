"""lite_ppo.py with a fault. The last rank has the fault, the others work."""

import os
import signal
import sys
import time
from pathlib import Path

import torch

import lite_ppo
from support import models
from support.clock import clock
from support.transformers_sampler import TransformersSampler
from tests import forks
from tests.world import command_line

clip_grad_norm = torch.nn.utils.clip_grad_norm_
compute_advantages = lite_ppo.compute_advantages
generate = TransformersSampler.generate


def hang(sampler, prompts, *args):
    """In step 1: this rank has no prompts in the evaluation of step 0."""
    if prompts:
        time.sleep(9999)
    return []


def crawl(sampler, prompts, *args):
    """In step 1, longer than --timeout-minutes and Watchdog.GRACE, with signs of life."""
    for _ in range(84 * (clock.step == 1)):
        time.sleep(0.25)
        clock.alive()
    return generate(sampler, prompts, *args)


def die(*args):
    os._exit(7)


def freeze(*args):
    os.kill(os.getpid(), signal.SIGSTOP)


def fail(*args):
    raise ZeroDivisionError("division by zero")


def run_out_of_memory(*args):
    torch.empty(2**46)


def overflow(parameters, limit):
    """A gradient that is not finite, although every loss is."""
    parameters = list(parameters)
    parameters[0].grad.to_local().fill_(torch.nan)
    return clip_grad_norm(parameters, limit)


def die_in_step_3(*args):
    """Only until the launcher has restarted the ranks."""
    if clock.step == 3 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)
    return compute_advantages(*args)


def load_slowly(name):
    print("loading", flush=True)
    time.sleep(99)


FAULTS = {  # name: the function that is replaced, and by what
    "hung": (TransformersSampler, "generate", hang),
    "frozen": (TransformersSampler, "generate", freeze),
    "slow": (TransformersSampler, "generate", crawl),
    "dead": (lite_ppo, "make_micro_batch", die),
    "failing": (lite_ppo, "make_micro_batch", fail),
    "memory": (lite_ppo, "check_gap", run_out_of_memory),
    "overflow": (torch.nn.utils, "clip_grad_norm_", overflow),
    "dead once": (lite_ppo, "compute_advantages", die_in_step_3),
    "slow start": (models, "resolve_model", load_slowly),
}


def main(fault: str) -> int:
    owner, name, faulty = FAULTS[fault]
    if int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1:
        setattr(owner, name, faulty)
    return lite_ppo.main()


def main_without_vllm() -> int:
    sys.modules["vllm"] = None  # its import fails
    return lite_ppo.main()


# ---- every fault on two ranks --------------------------------------------------------------------

WAITING = {"--timeout-minutes": "0.3"}
FLAGS = {  # fault: flags of the run
    "hung": WAITING,
    "frozen": WAITING,
    "slow": {"--timeout-minutes": "0.15", "--steps": "1"},
    "dead": {},
    "failing": {},
    "memory": {},
    "overflow": {},
    "dead once": {"--steps": "4", "--save-every": "1"},
}


def start_all(root: Path) -> dict[str, forks.Fork]:
    """A run for each fault, one after the other; three of them only wait, at the same time."""
    turn = forks.SERVER.Lock()
    runs = {}
    for fault, flags in FLAGS.items():
        argv = command_line(root, **{"--output-dir": f"{root}/{fault}"} | flags)
        own_turn = None if "--timeout-minutes" in flags else turn
        restarts = int(fault == "dead once")
        runs[fault] = forks.two_ranks(main, fault, argv=argv, restarts=restarts, turn=own_turn)
    return runs
