"""lite_ppo.py with a fault: python -m tests.faulty FAULT [flags of lite_ppo.py]

test_faults.py starts this as processes of their own. The last rank has the fault, the others work.
"""

import os
import signal
import sys
import time

import torch

import lite_ppo
from support import models
from support.clock import clock
from support.samplers import TransformersSampler

clip_grad_norm = torch.nn.utils.clip_grad_norm_
compute_advantages = lite_ppo.compute_advantages


def hang(sampler, prompts, *args):
    """In step 1: this rank has no prompts in the evaluation of step 0."""
    if prompts:
        time.sleep(9999)
    return []


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
    "dead": (lite_ppo, "make_micro_batch", die),
    "failing": (lite_ppo, "make_micro_batch", fail),
    "memory": (lite_ppo, "check_gap", run_out_of_memory),
    "overflow": (torch.nn.utils, "clip_grad_norm_", overflow),
    "dead once": (lite_ppo, "compute_advantages", die_in_step_3),
    "slow start": (models, "resolve_model", load_slowly),
}


def main() -> int:
    owner, name, faulty = FAULTS[sys.argv.pop(1)]
    if int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1:
        setattr(owner, name, faulty)
    return lite_ppo.main()


if __name__ == "__main__":
    raise SystemExit(main())
