"""Interrupts that wait until what belongs together is done."""

import contextlib
import signal
import threading
from collections.abc import Iterator


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """
    Hold Ctrl-C back until the block has ended. For a few quick statements that would leave a broken model half way.

    :return: Context manager
    :raises KeyboardInterrupt: at the end of the block, if Ctrl-C was pressed in it
    """
    handler = signal.getsignal(signal.SIGINT)
    # Other threads are never interrupted, and a handler that is not Python's cannot be put back
    if threading.current_thread() is not threading.main_thread() or handler is None:
        yield
        return
    pressed = threading.Event()
    signal.signal(signal.SIGINT, lambda *_: pressed.set())
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if pressed.is_set():
            signal.raise_signal(signal.SIGINT)
