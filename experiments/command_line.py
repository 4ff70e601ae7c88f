"""What every program of the experiments says when it cannot go on: one line, and no traceback."""

from __future__ import annotations

import contextlib
import inspect
import logging
import signal
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def one_line() -> Iterator[None]:
    """Ends the program with one line for what its user can mend, or has asked for.

    Raises:
      SystemExit: with code 2, as of a wrong option, in the place of ValueError, OSError (a full disk, a file that may
        not be read) and FloatingPointError (training that diverges); with code 1 for SIGINT and SIGTERM.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    # Of a checkpoint that cannot be written or read, orbax logs tracebacks beside the error that it raises, leaves
    # coroutines behind, and tensorstore reports every other array to an event loop that is closed.
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
    sys.unraisablehook = lambda _: None  # what was begun and not finished is left to the end of the interpreter
    print(" ".join(words.split()), file=sys.stderr)
    raise SystemExit(code)
