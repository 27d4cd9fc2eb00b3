"""What keeps a run from hanging or getting lost: memory, a watchdog, signals, descriptions of errors."""

import atexit
import contextlib
import ctypes
import faulthandler
import gc
import os
import secrets
import signal
import sys
import threading
import time
import traceback
from datetime import timedelta
from typing import Any, Callable

import torch
import torch.distributed as dist

from support.clock import Clock
from support.errors import RunError, Stopped
from support.util import gather


def tidy() -> None:
    """Between two steps, every tenth time: collect what only cycles hold, and give the system back what is free, so that long runs stay as large as short ones.

    A step leaves about a thousand objects in cycles, which Python looks for ever more rarely the more other objects there are; those that the first steps
    have brought are therefore counted out (gc.freeze). And glibc keeps what it has once got: tensors of other sizes at every step leave holes in its heap
    that nothing fits into, so that it grows while what is in use stands still (benchmarks/README.md). Both take milliseconds, but the memory has to
    be touched anew: after every step that costs the toy 8 % of its CPU time, after every tenth nothing that could be measured.
    """
    tidy.calls += 1
    if tidy.calls > 2 and tidy.calls % 10:
        return
    gc.collect()
    if tidy.calls <= 2:
        gc.freeze()  # no checkpoint is on its way here that would have to be collected later
        atexit.register(gc.unfreeze)  # or libraries (triton's nanobind) complain at the end about all that is left
    with contextlib.suppress(AttributeError, OSError):  # no glibc (macOS, musl)
        ctypes.CDLL(None).malloc_trim(0)


tidy.calls = 0  # of this process


REMEDIES = {
    "start": "more ranks, --cpu-offload, or a lower --gpu-memory-utilization",
    "rollout": "a lower --max-num-seqs or --gpu-memory-utilization",
    "logprobs": "a lower --micro-batch-tokens",
    "update": "a lower --micro-batch-tokens, --activation-checkpointing, more ranks, or --cpu-offload",
    "sync": "a lower --gpu-memory-utilization, more ranks, or --cpu-offload",
    "save": "--no-background-save",
}


def out_of_memory(error: BaseException) -> str:
    """What to change, if this error means that memory ran out; else nothing."""
    words = ("out of memory", "can't allocate memory", "Cannot allocate memory", "No available memory for the cache blocks", "desired GPU memory utilization")
    if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and not any(word in str(error) for word in words):
        return ""
    remedy = REMEDIES.get(Clock.phase, "a lower --micro-batch-tokens")
    return f"out of memory; {remedy} helps. benchmarks/memory_plan.py tells what fits. ({(str(error).strip() or 'MemoryError').splitlines()[0]})"


def rank_has_ended(error: BaseException) -> bool:
    """Whether this is what a rank sees when another one is no more."""
    gone = ("onnection closed by peer", "onnection reset by peer", "Broken pipe", "remote process exited", "communicator was aborted")
    return any(words in str(error) for words in gone)


def describe(error: BaseException, rank: int) -> str:
    """A failure in one message: where, what, and the remedy or the stack."""
    where, text = f"error: rank {rank}, {Clock.where()}", f"{type(error).__name__}: {error}"
    if memory := out_of_memory(error):
        return f"{where}: {memory}"
    if rank_has_ended(error):
        return f"{where}: another rank has ended ({text.splitlines()[0][:200]})"
    if isinstance(error, OSError):  # a full disk, a lost mount
        return f"{where}: {text}; checkpoints are as they were, and the same command goes on from the newest one"
    return "".join(traceback.format_exception(error)) + f"{where}: {text}"


# ---- ranks that find each other --------------------------------------------------------------------------------------


def fresh_store(store, rank: int, world: int, limit: timedelta) -> tuple[Any, int, int]:
    """The launcher's store without what an earlier life of this run has left there; (store, rank, world).

    torchrun keeps one store over its restarts (pytorch issue 135712): ranks would call at addresses of the dead. No number that it gives
    them is the same on all machines, so rank 0 draws a name for this life, and each other rank asks for it with a word that is new.
    """
    life, end, absent = secrets.token_hex(8), time.monotonic() + limit.total_seconds(), set(range(1, world))
    try:
        if rank:
            store.set(f"ask/{rank}", life)
            store.wait([f"answer/{life}"], limit)
            life = store.get(f"answer/{life}").decode()
            store.set(f"{life}/joined/{rank}", "")
        while rank == 0 and absent:  # an answer to the word of a dead rank harms nobody: its successor has a new one
            for other in [other for other in absent if store.check([f"ask/{other}"])]:
                store.set("answer/" + store.get(f"ask/{other}").decode(), life)
            absent = {other for other in absent if not store.check([f"{life}/joined/{other}"])}
            if time.monotonic() > end:
                raise RunError(f"ranks {sorted(absent)} of {world} have not come within {limit}; are all machines up, and can they reach each other?")
            time.sleep(0.01)
    except dist.DistError as error:
        raise RunError(f"rank {rank} of {world} does not find the others within {limit}: {str(error).splitlines()[0][:200]}") from None
    return dist.PrefixStore(life, store), rank, world


# ---- a rank that hangs -----------------------------------------------------------------------------------------------


def watch(minutes: float, rank: int, world: int, store=None) -> None:
    """Start a thread that ends this process, with its stack, when it has not ticked for so many minutes.

    Through the store the ranks tell each other where they are: the message names who is behind. Those that only wait
    for it give it ten seconds to speak for itself; a frozen one cannot.
    """

    def read(other: int) -> tuple[int, str]:
        ticks, where = store.get(f"lite_ppo/{other}").decode().split(" ", 1)
        return int(ticks), where

    def tell() -> str:
        if store is None:
            return ""
        try:
            ranks = {other: read(other) for other in range(world) if store.check([f"lite_ppo/{other}"])}
        except RuntimeError:
            return "; the other ranks cannot be asked"
        behind = {other: where for other, (ticks, where) in ranks.items() if ticks < ranks.get(rank, (Clock.ticks, ""))[0]}
        return "".join(f"; rank {other} is behind, in {where}" for other, where in behind.items())

    def loop() -> None:
        nonlocal store
        said = None
        while not over.wait(0.25):
            if store is not None and Clock.ticks != said:
                try:
                    store.set(f"lite_ppo/{rank}", f"{Clock.ticks} {Clock.where()}")
                    said = Clock.ticks
                except RuntimeError:  # the store is gone, and with it the run
                    store = None
            late = time.monotonic() - Clock.since - 60 * minutes
            others = tell() if late > 0 else ""
            if late > 0 and (late > 10 or not others):
                print(f"error: rank {rank}, {Clock.where()}: no progress for --timeout-minutes {minutes:g}{others}. Where it is:", file=sys.stderr, flush=True)
                faulthandler.dump_traceback(all_threads=True)
                sys.stdout.flush()
                os._exit(1)

    over, thread = threading.Event(), threading.Thread(target=loop, daemon=True)
    Clock.tick()  # the time before does not count: this may be a fork of a process that is hours old
    thread.start()
    # Python ends its daemon threads as they come back from C++, here from the store; C++ then aborts the whole process, whose work is done.
    atexit.register(lambda: (over.set(), thread.join(10)))


# ---- signals ---------------------------------------------------------------------------------------------------------


class Signals:
    received = 0  # the first SIGTERM or SIGINT; later ones change nothing (launchers repeat them)
    interruptible = False  # in a block that may be left at any moment


def install_signals(held: contextlib.ExitStack) -> None:
    """Until `held` ends, SIGTERM and SIGINT end the run at the next place where every rank can leave: see `interruptible`."""

    def note(number, frame) -> None:
        Signals.received = Signals.received or number
        if Signals.interruptible:
            Signals.interruptible = False
            raise Stopped

    for number in (signal.SIGTERM, signal.SIGINT) if threading.current_thread() is threading.main_thread() else ():  # elsewhere Python has no handlers
        held.callback(signal.signal, number, signal.signal(number, note))


def interruptible(work: Callable, *args) -> Any:
    """work(*args), or nothing ([]) as soon as a signal arrives. Only for work without collectives.

    The signal may have reached one rank only: leave_together() comes next.
    """
    try:
        Signals.interruptible = True
        return [] if Signals.received else work(*args)
    except Stopped:
        return []
    finally:
        Signals.interruptible = False


def leave_together() -> None:
    """Ends the run on every rank if a signal has reached any of them."""
    if any(gather([Signals.received])):
        raise Stopped


def check_failures(responses: list, most: float) -> None:
    failures = [r.failure for r in responses if r.failure]
    if len(failures) > most * len(responses):
        raise RunError(
            f"{len(failures)} of {len(responses)} responses got no verdict, more than --max-failed-rewards {most:g}; "
            f"most often: {max(set(failures), key=failures.count)}"
        )
