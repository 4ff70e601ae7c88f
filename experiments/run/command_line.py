"""How every program of the experiments ends when it cannot go on: with one line, and no traceback."""

from __future__ import annotations

import contextlib
import inspect
import logging
import signal
import sys
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def one_line() -> Iterator[None]:
    """Ends the program with one line if its user made a mistake, or asked it to stop.

    Raises:
      SystemExit: with code 2, like a wrong option, instead of ValueError, OSError (a full disk, a file that may not
        be read) and FloatingPointError (training that diverges); with code 1 for SIGINT and SIGTERM.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    # If a checkpoint cannot be written or read, orbax logs tracebacks beside the error that it raises. It also leaves
    # coroutines behind, and tensorstore reports many arrays to an event loop that is closed.
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    sys.unraisablehook = _report
    try:
        yield
    except KeyboardInterrupt as error:
        _end(str(error) or "interrupted; the same command goes on from the last checkpoint", 1)
    except (ValueError, OSError, FloatingPointError) as error:
        _end(f"error: {str(error) or type(error).__name__}", 2)


def _report(unraisable):
    if not inspect.iscoroutine(unraisable.object) and str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)


def _end(words, code):
    sys.unraisablehook = lambda _: None  # the interpreter ends, and coroutines that did not finish do not matter
    print(" ".join(words.split()), file=sys.stderr)
    raise SystemExit(code)


def option(field: str) -> str:
    """The option of a field, as its user types it: "max_steps" -> "--max-steps"."""
    return "--" + field.replace("_", "-")


def check_at_least(config: Any, **least: float):
    """Checks numbers, or tuples of numbers, of a program's options; None is not checked.

    Args:
      config: an object with the fields.
      least: the smallest number that each field may be, by its name.

    Raises:
      ValueError: a smaller number; the message names the option.
    """
    for field, smallest in least.items():
        value = getattr(config, field)
        for number in value if isinstance(value, tuple) else (value,):
            if number is not None and not number >= smallest:
                raise ValueError(f"{option(field)} must be at least {smallest}, got {number}")


def in_short(error: Exception) -> str:
    """The type of an error and the first line of its message, at most 300 characters of it."""
    words = (str(error) or "no message").strip().splitlines()[0]
    words = words if len(words) <= 300 else f"{words[:80]} … {words[-200:]}"  # tensorstore's cause is at the end
    return f"{type(error).__name__}: {words}"
