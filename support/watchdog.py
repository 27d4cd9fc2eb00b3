"""The watchdog: ends a process that makes no progress, and names the rank that is behind."""

import atexit
import faulthandler
import os
import sys
import threading
import time

from support.clock import Clock


class Watchdog(threading.Thread):
    """A thread that ends this process, with its stack, after `minutes` without a sign of life.

    Each rank writes its ticks and signs of life (clock.py) to the store. So the message can name
    the rank that is behind: it has fewer ticks. While a rank that is behind shows signs of life,
    the ranks that wait for it count as alive. If it shows none, they wait GRACE seconds longer, so
    that it can end first, with its own stack. A frozen process cannot do that.
    """

    GRACE = 10.0
    LOOKS = 50  # how often the other ranks are read in `minutes`

    def __init__(self, minutes: float, rank: int, world: int, store=None):
        super().__init__(daemon=True)
        self.minutes = minutes
        self.rank = rank
        self.world = world
        self.store = store  # None with one rank, or after the store was closed
        self.ended = threading.Event()
        self.seen: dict[int, int] = {}  # signs of life of the ranks behind, when last read

    def run(self) -> None:
        reported = None  # signs of life of this rank, as last written
        looked = 0.0  # when the other ranks were last read
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
        """Write the progress of this rank to the store."""
        if self.store is None:
            return
        try:
            self.store.set(f"lite_ppo/{self.rank}", f"{Clock.ticks} {Clock.signs} {Clock.where()}")
        except RuntimeError:  # the store is closed, because the run has ended
            self.store = None

    def look_at_ranks_behind(self) -> None:
        """Count as alive if a rank behind has shown a new sign of life: waiting for it is healthy.

        A rank that waits has more ticks than the rank that it waits for. So two ranks never keep
        each other alive.
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
        """Print the message and the stack of every thread, and exit. others: the ranks behind."""
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
        """End the thread."""
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
