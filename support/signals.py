"""Signals: SIGTERM and SIGINT end a run where all ranks can leave together."""

import contextlib
import signal
import threading
from collections.abc import Callable
from typing import Any

from support.errors import Stopped
from support.util import gather


class Signals:
    """The state of the signals in this process."""

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
        previous = signal.signal(number, record_signal)
        resources.callback(signal.signal, number, previous)


def record_signal(number: int, frame) -> None:
    """The handler. It records the signal, and raises Stopped inside interruptible()."""
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
