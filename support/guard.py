"""What keeps a run from hanging or getting lost: watchdog, signals, memory, error messages."""

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
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from support.clock import Clock
from support.errors import RunError, Stopped
from support.util import gather

# ---- memory --------------------------------------------------------------------------------------


def tidy() -> None:
    """Every tenth step, run the garbage collector and return free heap to the operating system.

    Each step leaves about 1,000 objects in reference cycles. Python's collector runs less often as
    the heap grows, so long-lived objects are excluded (gc.freeze). glibc does not return fragmented
    memory by itself: the heap grows although usage is constant, and malloc_trim fixes that
    (benchmarks/README.md). Returned memory must be mapped again: after every step this costs the
    toy 8 % of its CPU time, after every tenth step nothing measurable.
    """
    tidy.calls += 1
    if tidy.calls > 2 and tidy.calls % 10:
        return
    gc.collect()
    if tidy.calls <= 2:
        gc.freeze()  # safe here: no checkpoint is being written
        atexit.register(gc.unfreeze)  # else libraries report leaked objects at exit
    with contextlib.suppress(AttributeError, OSError):  # no glibc (macOS, musl)
        ctypes.CDLL(None).malloc_trim(0)


tidy.calls = 0  # in this process


# ---- error messages ------------------------------------------------------------------------------

REMEDIES = {  # phase: what reduces its memory
    "start": "more ranks, --cpu-offload, or a lower --gpu-memory-utilization",
    "rollout": "a lower --max-num-seqs or --gpu-memory-utilization",
    "logprobs": "a lower --micro-batch-tokens",
    "update": "a lower --micro-batch-tokens, --activation-checkpointing, more ranks, "
    "or --cpu-offload",
    "sync": "a lower --gpu-memory-utilization, more ranks, or --cpu-offload",
    "save": "more free host memory, or more machines",
}
OUT_OF_MEMORY = (  # parts of messages, from torch, the operating system and vLLM
    "out of memory",
    "can't allocate memory",
    "Cannot allocate memory",
    "No available memory for the cache blocks",
    "desired GPU memory utilization",
)
GPU_IS_SHARED = (  # parts of messages of vLLM, which expects that it is alone on the GPU
    "Error in memory profiling",
    "Memory usage increased after sleeping",
)
RANK_HAS_ENDED = (  # parts of messages, from gloo and nccl
    "onnection closed by peer",
    "onnection reset by peer",
    "Broken pipe",
    "remote process exited",
    "communicator was aborted",
)


def out_of_memory(error: BaseException) -> str:
    """A message with the remedy if this error means that memory ran out; otherwise ""."""
    is_memory_error = isinstance(error, (MemoryError, torch.OutOfMemoryError))
    if not is_memory_error and not any(part in str(error) for part in OUT_OF_MEMORY):
        return ""
    remedy = REMEDIES.get(Clock.phase, "a lower --micro-batch-tokens")
    detail = (str(error).strip() or "MemoryError").splitlines()[0]
    return f"out of memory; {remedy} helps. benchmarks/memory_plan.py shows what fits. ({detail})"


def rank_has_ended(error: BaseException) -> bool:
    """Whether this error means that another rank has died."""
    return any(part in str(error) for part in RANK_HAS_ENDED)


def describe(error: BaseException, rank: int) -> str:
    """One message for a failure: where, what, and the remedy or the stack."""
    where = f"error: rank {rank}, {Clock.where()}"
    text = f"{type(error).__name__}: {error}"
    if memory := out_of_memory(error):
        return f"{where}: {memory}"
    if any(part in str(error) for part in GPU_IS_SHARED):
        return (
            f"{where}: another process on this GPU changed its memory while vLLM measured it; "
            f"LITE_PPO_KV_CACHE_GIB lets runs share a GPU ({text.splitlines()[0][:200]})"
        )
    if rank_has_ended(error):
        return f"{where}: another rank has ended ({text.splitlines()[0][:200]})"
    if isinstance(error, OSError):  # a full disk, a lost mount
        return (
            f"{where}: {text}; checkpoints are unchanged, "
            "and the same command resumes from the newest one"
        )
    stack = "".join(traceback.format_exception(error))
    if "torch._dynamo" in type(error).__module__ or "torch._inductor" in type(error).__module__:
        return f"{stack}{where}: {text}; --compile off trains without compilation, slower on GPUs"
    return f"{stack}{where}: {text}"


# ---- rendezvous after a restart ------------------------------------------------------------------


def fresh_store(store, rank: int, world: int, limit: timedelta) -> tuple[Any, int, int]:
    """The launcher's store under a fresh prefix; returns (store, rank, world).

    torchrun keeps one store across restarts (pytorch issue 135712), so ranks would dial dead
    addresses. Rank 0 picks a random prefix. Every other rank asks for it with a random token.
    RunError if a rank does not join within `limit`.
    """
    token = secrets.token_hex(8)
    try:
        if rank == 0:
            prefix = token
            answer_ranks(store, prefix, world, limit)
        else:
            store.set(f"ask/{rank}", token)
            store.wait([f"answer/{token}"], limit)
            prefix = store.get(f"answer/{token}").decode()
            store.set(f"{prefix}/joined/{rank}", "")
    except dist.DistError as error:
        reason = str(error).splitlines()[0][:200]
        raise RunError(
            f"rank {rank} of {world} did not find the others within {limit}: {reason}"
        ) from None
    return dist.PrefixStore(prefix, store), rank, world


def answer_ranks(store, prefix: str, world: int, limit: timedelta) -> None:
    """Rank 0: answer the token of each other rank with the prefix, until all have joined.

    The token of a dead rank gets an answer too. That is harmless: its successor has a new token.
    """
    end = time.monotonic() + limit.total_seconds()
    absent = set(range(1, world))
    while absent:
        for rank in absent:
            if store.check([f"ask/{rank}"]):
                store.set("answer/" + store.get(f"ask/{rank}").decode(), prefix)
        absent = {rank for rank in absent if not store.check([f"{prefix}/joined/{rank}"])}
        if time.monotonic() > end:
            raise RunError(
                f"ranks {sorted(absent)} of {world} did not join within {limit}. "
                "Check that all machines are up and can reach each other"
            )
        time.sleep(0.01)


# ---- watchdog ------------------------------------------------------------------------------------


class Watchdog(threading.Thread):
    """A thread that ends this process, with its stack, after `minutes` without a sign of life.

    Ranks exchange their progress through the store, so that the message names the rank that is
    behind. The signs of life of a rank that is behind count for the ranks that wait for it. A rank
    that waits for one without them grants it GRACE seconds to report by itself; a frozen rank
    cannot.
    """

    GRACE = 10.0
    LOOKS = 50  # at the other ranks, in `minutes` of waiting

    def __init__(self, minutes: float, rank: int, world: int, store=None):
        super().__init__(daemon=True)
        self.minutes = minutes
        self.rank = rank
        self.world = world
        self.store = store  # None with one rank, or after the store has gone
        self.ended = threading.Event()
        self.seen: dict[int, int] = {}  # signs of life of the ranks behind, at the last look

    def run(self) -> None:
        reported = None  # signs of life
        looked = 0.0
        while not self.ended.wait(0.25):
            if Clock.signs != reported:
                reported = Clock.signs
                self.report()
            now = time.monotonic()
            if now - max(looked, Clock.since) > 60 * self.minutes / self.LOOKS:
                looked = now
                self.look_at_ranks_behind()
            late = time.monotonic() - Clock.since - 60 * self.minutes
            if late <= 0:
                continue
            others = self.describe_ranks_behind()
            if late > self.GRACE or not others:
                self.end_process(others)

    def report(self) -> None:
        if self.store is None:
            return
        try:
            self.store.set(f"lite_ppo/{self.rank}", f"{Clock.ticks} {Clock.signs} {Clock.where()}")
        except RuntimeError:  # the store has gone, and the run with it
            self.store = None

    def look_at_ranks_behind(self) -> None:
        """If one of them has shown a sign of life since the last look, waiting for it is healthy.

        This rank is then alive too. A rank that waits has more ticks than one that it waits for,
        so two ranks never count for each other.
        """
        try:
            signs = {rank: signs for rank, (signs, _) in self.ranks_behind().items()}
        except RuntimeError:
            return
        if any(signs[rank] != self.seen.get(rank, signs[rank]) for rank in signs):
            Clock.alive()
        self.seen = signs

    def describe_ranks_behind(self) -> str:
        """The ranks that have made less progress than this one, for the message."""
        try:
            behind = self.ranks_behind()
        except RuntimeError:
            return "; the other ranks cannot be reached"
        places = [f"; rank {rank} is behind, in {where}" for rank, (_, where) in behind.items()]
        return "".join(places)

    def ranks_behind(self) -> dict[int, tuple[int, str]]:
        """Signs of life and place of each rank with fewer ticks. RuntimeError without the store."""
        if self.store is None:
            return {}
        behind = {}
        for rank in range(self.world):
            if self.store.check([f"lite_ppo/{rank}"]):
                report = self.store.get(f"lite_ppo/{rank}").decode()
                ticks, signs, where = report.split(" ", 2)
                if int(ticks) < Clock.ticks:
                    behind[rank] = (int(signs), where)
        return behind

    def end_process(self, others: str) -> None:
        print(
            f"error: rank {self.rank}, {Clock.where()}: no progress for --timeout-minutes "
            f"{self.minutes:g}{others}. The stack of this rank:",
            file=sys.stderr,
            flush=True,
        )
        faulthandler.dump_traceback(all_threads=True)
        sys.stdout.flush()
        os._exit(1)

    def stop(self) -> None:
        self.ended.set()
        self.join(10)


def watch(minutes: float, rank: int, world: int, store=None) -> None:
    """Start the watchdog of this process."""
    watchdog = Watchdog(minutes, rank, world, store)
    Clock.tick()  # start now: this process may be a fork of one that is hours old
    watchdog.start()
    # Stop the thread before the interpreter exits: a daemon thread that is killed inside a C++
    # store call aborts the process (exit code -6).
    atexit.register(watchdog.stop)


# ---- signals -------------------------------------------------------------------------------------


class Signals:
    received = 0  # the first SIGTERM or SIGINT; launchers repeat them
    interruptible = False  # whether the current block may be left at any moment


def install_signals(resources: contextlib.ExitStack) -> None:
    """Until `resources` closes, SIGTERM and SIGINT end the run where all ranks can leave.

    See interruptible() and leave_together(). Outside the main thread this does nothing, because
    Python has no signal handlers there.
    """
    if threading.current_thread() is not threading.main_thread():
        return
    for number in (signal.SIGTERM, signal.SIGINT):
        previous = signal.signal(number, note_signal)
        resources.callback(signal.signal, number, previous)


def note_signal(number: int, frame) -> None:
    Signals.received = Signals.received or number
    if Signals.interruptible:
        Signals.interruptible = False
        raise Stopped


def interruptible(work: Callable, *args) -> Any:
    """work(*args), or [] as soon as a signal arrives. Only for work without collectives.

    The signal may have reached one rank only, so leave_together() must follow.
    """
    try:
        Signals.interruptible = True
        return [] if Signals.received else work(*args)
    except Stopped:
        return []
    finally:
        Signals.interruptible = False


def leave_together() -> None:
    """Raise Stopped on every rank if a signal has reached any of them."""
    if any(gather([Signals.received])):
        raise Stopped
