"""Files that are there whole or not at all."""

import contextlib
import io
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[io.BufferedWriter]:
    """
    Open a file for writing that takes the place of the one at ``path`` when it is complete and on the disk. Until then, and if
    the writing fails or is interrupted, the old one stays as it is.

    :param path: File to write; folders that are missing are made
    :return: Context manager of a binary file
    :raises OSError: if the file cannot be written, for instance because the disk is full; the message names it
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None and error.errno is not None:
            raise OSError(error.errno, f"{error.strerror}; what was there before is kept", str(path)) from error
        raise
    # The rename itself lives in the folder
    if hasattr(os, "O_DIRECTORY"):
        descriptor = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def own_errors() -> Iterator[None]:
    """
    PyTorch's writer covers an interrupt or a full disk with an error of its own about the file's structure; raise what it was.

    :return: Context manager for calls of ``torch.save``
    :raises KeyboardInterrupt: if that was the cause
    :raises OSError: if that was the cause
    """
    try:
        yield
    except RuntimeError as error:
        cause = error.__context__
        if isinstance(cause, (KeyboardInterrupt, OSError)):
            raise cause from None
        raise
