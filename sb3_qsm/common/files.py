"""Files that are there whole or not at all."""

import contextlib
import glob
import io
import os
import re
import secrets
import socket
import stat
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

#: What :mod:`zipfile` raises for a file that is no archive, or a damaged one
BAD_ZIP = (zipfile.BadZipFile, zlib.error, EOFError, KeyError, ValueError, NotImplementedError, RuntimeError, OSError)
_HOST = re.sub(r"\W", "_", socket.gethostname())[:40]


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[io.BufferedWriter]:
    """
    Open a file for writing that takes the place of the one at ``path`` when it is complete and on the disk. Until then, and if
    the writing fails or is interrupted, the old one stays as it is. Where ``path`` is a link, the file it leads to is
    replaced; a device or a pipe is written as it is.

    :param path: File to write; folders that are missing are made
    :return: Context manager of a binary file
    :raises OSError: if the file cannot be written, for instance because the disk is full; the message names it
    """
    temporary: Path | None = None
    try:
        if path.exists() and not path.is_file():
            with open(path, "wb") as file:
                yield file
            return
        target = Path(os.path.realpath(path))
        target.parent.mkdir(parents=True, exist_ok=True)
        # Two that write the same file do not write into each other's; a name may be as long as a name can be
        start = f".{os.fsencode(target.name)[:100].decode(errors='ignore')}.{_HOST}-"
        _remove_left(target.parent, start)
        temporary = target.with_name(f"{start}{os.getpid()}-{secrets.token_hex(4)}.tmp")
        with open(temporary, "xb") as file:
            if target.exists():
                # Not on every file system
                with contextlib.suppress(OSError):
                    os.chmod(temporary, stat.S_IMODE(target.stat().st_mode))
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException as error:
        if temporary is not None:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None and error.errno is not None:
            raise OSError(error.errno, f"{error.strerror}; what was there before is kept", str(path)) from error
        raise
    # The rename itself lives in the folder; the file is in its place also where the folder cannot be flushed
    if hasattr(os, "O_DIRECTORY"):
        with contextlib.suppress(OSError):
            descriptor = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def _remove_left(folder: Path, start: str) -> None:
    """Remove what killed processes of this machine left half written."""
    if os.name != "posix":
        return
    for left in folder.glob(f"{glob.escape(start)}*.tmp"):
        process = left.name.removeprefix(start).partition("-")[0]
        if process.isdecimal():
            try:
                os.kill(int(process), 0)
            except (ProcessLookupError, OverflowError):
                with contextlib.suppress(OSError):
                    left.unlink()
            except OSError:
                pass


@contextlib.contextmanager
def own_errors() -> Iterator[None]:
    """
    Raise what it was, where a writer covers it with an error of its own: PyTorch's and :mod:`zipfile` do so with an interrupt
    or a full disk.

    :return: Context manager for writing archives
    :raises KeyboardInterrupt: if that was the cause
    :raises OSError: if that was the cause
    """
    try:
        yield
    except (RuntimeError, ValueError) as error:
        cause = error.__context__
        if isinstance(cause, (KeyboardInterrupt, OSError)):
            raise cause from None
        raise
