"""What stops a command as Ctrl-C does: the moment of `--until`, a scheduler's SIGTERM."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta

from harness.spec import UserError

AGAIN_SECONDS = 0.05
SIGTERM_SECONDS = 20.0  # Slurm and Kubernetes kill 30 s after it
_UNITS = {"d": 86_400, "h": 3_600, "m": 60, "s": 1}
_DURATION = re.compile("".join(rf"(?:(\d+(?:\.\d+)?){unit})?" for unit in _UNITS))
_CLOCK = re.compile(r"(\d{1,2}):(\d{2})(?::(\d{2}))?")


class TimeUp(KeyboardInterrupt):
    """The moment of `--until`; the message says so."""


def parse_until(text: str, now: datetime | None = None) -> datetime:
    """A duration from now ("9m", "2h30m", "90s", "1d") or the next occurrence of a time of day ("18:00", "18:00:30"), in
    local time. It is right over a change of the clocks. Raises UserError for anything else."""
    words, now = text.strip(), now or datetime.now()
    with contextlib.suppress(OverflowError, ValueError, OSError):  # 24:00, or beyond the year 9999
        if clock := _CLOCK.fullmatch(words):
            hour, minute, second = (int(part or 0) for part in clock.groups())
            moment = now.replace(hour=hour, minute=minute, second=second, microsecond=0)
            return moment if moment > now else moment + timedelta(days=1)
        if duration := _DURATION.fullmatch(words):
            parts = (float(part or 0) for part in duration.groups())
            if seconds := sum(part * unit for part, unit in zip(parts, _UNITS.values(), strict=True)):
                return datetime.fromtimestamp(now.timestamp() + seconds)
    raise UserError("expected a duration, as in 9m, 2h30m or 90s, or a time of day, as in 18:00")


def format_moment(moment: datetime) -> str:
    """ "18:00", with seconds where it has some."""
    return f"{moment:%H:%M:%S}" if moment.second else f"{moment:%H:%M}"


@contextlib.contextmanager
def stopping_at(moment: datetime | None) -> Iterator[None]:
    """Raise TimeUp in the body at the moment, if there is one. For the main thread: it uses the process's alarm, which
    interrupts calls that wait; an alarm set before continues afterwards.

    Where Python drops the exception, as in a callback of fork, the alarm rings again; where a library makes a plain
    KeyboardInterrupt of it, as Ray does, it is TimeUp again at the end of the body.
    """
    if moment is None:
        yield
        return
    if threading.current_thread() is not threading.main_thread():
        raise UserError("--until needs the main thread of its process, whose signals it uses")

    up, rang = TimeUp(f"stopped at {format_moment(moment)} as --until said"), threading.Event()
    report = sys.unraisablehook

    def ring(number: int, frame: types.FrameType | None) -> None:
        rang.set()
        raise up

    def dropped(error: sys.UnraisableHookArgs) -> None:
        if error.exc_value is up:
            signal.setitimer(signal.ITIMER_REAL, AGAIN_SECONDS)
        else:
            report(error)

    seconds = max(moment.timestamp() - time.time(), 1e-3)
    handler, sys.unraisablehook = signal.signal(signal.SIGALRM, ring), dropped
    before = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    except KeyboardInterrupt as stop:
        raise (up if rang.is_set() else stop) from None
    finally:
        sys.unraisablehook = report
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, *before)


@contextlib.contextmanager
def stopping_on_sigterm(seconds: float = 0.0) -> Iterator[Callable[[], bool]]:
    """Treat a scheduler's SIGTERM as Ctrl-C: so many seconds after it, or when another comes. Yields whether one came."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # it gets no signals
        yield asked.is_set
        return
    again = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGTERM))
    again.daemon = True

    def stop(number: int, frame: types.FrameType | None) -> None:
        if asked.is_set() or not seconds:
            raise KeyboardInterrupt
        asked.set()
        again.start()

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield asked.is_set
    finally:
        again.cancel()
        signal.signal(signal.SIGTERM, before)
