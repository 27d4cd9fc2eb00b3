"""The watchdog: ends a process that makes no progress, and names the rank that is behind."""

import atexit
import faulthandler
import os
import sys
import threading
import time
from pathlib import Path

from support.clock import clock
from support.host import read_fields


def bytes_moved() -> int:
    """Bytes that this process has read and written, also through mapped files. 0 if unknown."""
    try:
        fields = read_fields(Path("/proc/self/io"))
        return fields["rchar"] + fields["wchar"] + fields["read_bytes"]
    except (OSError, ValueError, KeyError):  # no Linux
        return 0


class Watchdog(threading.Thread):
    """A thread that ends this process, with its stack, after `minutes` without a sign of life.

    Each rank writes its ticks and signs of life (clock.py) to the store. So the message can name
    the rank that is behind: it has fewer ticks. While a rank that is behind shows signs of life,
    the ranks that wait for it count as alive. If it shows none, they wait GRACE seconds longer, so
    that it can end first, with its own stack. A frozen process cannot do that.

    In start-up a rank waits for downloads and disks. Then every BLOCK bytes that it reads or writes
    are a sign of life, and a rank also waits for ranks with as many ticks.
    """

    GRACE = 10.0
    LOOKS = 50  # how often the other ranks are read in `minutes`
    BLOCK = 2**20  # more than the watchdog itself reads and writes

    def __init__(self, minutes: float, rank: int, world: int, store=None):
        super().__init__(daemon=True)
        self.minutes = minutes
        self.rank = rank
        self.world = world
        self.store = store  # None with one rank, or after the store was closed
        self.ended = threading.Event()
        self.seen: dict[int, int] = {}  # signs of life of the ranks behind, when last read
        self.moved = 0  # bytes_moved() at the last sign of life that came from it

    def run(self) -> None:
        """The thread: report own progress, look at others, end the process if it is late."""
        reported = None  # signs of life of this rank, as last written
        looked = 0.0  # when the other ranks were last read
        while not self.ended.wait(0.25):
            self.look_at_bytes()
            if clock.signs != reported:
                reported = clock.signs
                self.report()
            now = time.monotonic()
            if now - max(looked, clock.since) > 60 * self.minutes / self.LOOKS:
                looked = now
                self.look_at_ranks_behind()
            late = time.monotonic() - clock.since - 60 * self.minutes
            if late <= 0:
                continue
            others = self.describe_ranks_behind()
            if late > self.GRACE or not others:
                self.end_process(others)

    def report(self) -> None:
        """Write the progress of this rank to the store."""
        if self.store is None:
            return
        try:
            self.store.set(f"lite_ppo/{self.rank}", f"{clock.ticks} {clock.signs} {clock.where()}")
        except RuntimeError:  # the store is closed, because the run has ended
            self.store = None

    def look_at_bytes(self) -> None:
        """In start-up, BLOCK bytes that were read or written are a sign of life."""
        if clock.phase == "start" and (moved := bytes_moved()) - self.moved >= self.BLOCK:
            self.moved = moved
            clock.alive()

    def look_at_ranks_behind(self) -> None:
        """Wait longer if a rank behind has shown a new sign of life: waiting for it is healthy.

        This is no sign of life of this rank. So two ranks never keep each other alive.
        """
        try:
            found = self.ranks_behind(clock.ticks + (clock.phase == "start"))
        except RuntimeError:
            return
        signs = {rank: signs for rank, (signs, _) in found.items()}
        if any(signs[rank] != self.seen.get(rank, signs[rank]) for rank in signs):
            clock.since = time.monotonic()
        self.seen = signs

    def describe_ranks_behind(self) -> str:
        """The ranks that have made less progress than this one, for the message."""
        try:
            behind = self.ranks_behind(clock.ticks)
        except RuntimeError:
            return "; the other ranks cannot be reached"
        places = [f"; rank {rank} is behind, in {where}" for rank, (_, where) in behind.items()]
        return "".join(places)

    def ranks_behind(self, limit: int) -> dict[int, tuple[int, str]]:
        """Signs of life and place of each other rank with fewer ticks than `limit`.

        RuntimeError without the store.
        """
        if self.store is None:
            return {}
        behind = {}
        for rank in set(range(self.world)) - {self.rank}:
            if self.store.check([f"lite_ppo/{rank}"]):
                report = self.store.get(f"lite_ppo/{rank}").decode()
                ticks, signs, where = report.split(" ", 2)
                if int(ticks) < limit:
                    behind[rank] = (int(signs), where)
        return behind

    def end_process(self, others: str) -> None:
        """Print the message and the stack of every thread, and exit. others: the ranks behind."""
        print(
            f"error: rank {self.rank}, {clock.where()}: no progress for --timeout-minutes "
            f"{self.minutes:g}{others}. The stack of this rank:",
            file=sys.stderr,
            flush=True,
        )
        faulthandler.dump_traceback(all_threads=True)
        sys.stdout.flush()
        os._exit(1)

    def stop(self) -> None:
        """End the thread."""
        self.ended.set()
        self.join(10)


def watch(minutes: float, rank: int, world: int, store=None) -> None:
    """Start the watchdog of this process."""
    watchdog = Watchdog(minutes, rank, world, store)
    clock.tick()  # start now: this process may be a fork of one that is hours old
    watchdog.start()
    # Stop the thread before the interpreter exits: a daemon thread that is killed inside a C++
    # store call aborts the process (exit code -6).
    atexit.register(watchdog.stop)
