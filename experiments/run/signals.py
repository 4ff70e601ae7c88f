"""SIGINT and SIGTERM as a request to stop after the current step."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator

NOTE = b"\nstopping after this step; a second Ctrl-C stops sooner, and loses the steps since the last checkpoint\n"


@contextlib.contextmanager
def stop_request() -> Iterator[threading.Event]:
    """An event that the first SIGINT or SIGTERM sets; a second one interrupts as usual.

    A thread says so immediately. Python calls a handler only after the current call of the main thread, which may be a
    compilation of a minute.
    """
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # only the main thread may set handlers
        yield event
        return

    def handle(number, frame):
        if event.is_set():
            raise KeyboardInterrupt
        event.set()

    numbers = (signal.SIGINT, signal.SIGTERM)
    received, sent = os.pipe()
    os.set_blocking(sent, False)
    threading.Thread(target=_announce, args=(received, numbers), daemon=True).start()
    wakeup = signal.set_wakeup_fd(sent)
    handlers = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield event
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(wakeup)
        os.close(sent)  # ends the thread


def _announce(received, numbers):
    """Writes the note for the first of the signals; their numbers come as bytes."""
    while number := os.read(received, 1):
        if number[0] in numbers:
            os.write(2, NOTE)
            break
    while os.read(received, 1):
        pass
    os.close(received)
