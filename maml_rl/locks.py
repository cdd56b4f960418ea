"""One process at a time on a run folder.

An operating-system lock (flock) on RUN/.lock, which dies with its process: none is ever stale. The
file's text only tells others whom to blame.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import warnings
import weakref
from pathlib import Path

from maml_rl.errors import InputError, RunWarning

NAME = ".lock"
_UNSUPPORTED = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)
_held: weakref.WeakSet[FolderLock] = weakref.WeakSet()


class FolderLock:
    """Holds a folder until released, or until this process ends in whatever way."""

    def __init__(self, folder: Path) -> None:
        """Take the lock.

        Raises:
            InputError: if another has it, naming host and process.
            OSError: if the folder cannot be written.
        """
        self._path = folder / NAME
        self._handle = -1
        while self._handle < 0:
            handle = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                os.close(handle)
                user = holder(folder)
                if not user:
                    continue  # somebody only looked who has it
                raise InputError(f"{folder} is in use by {user}") from error
            except OSError as error:
                if error.errno not in _UNSUPPORTED:
                    os.close(handle)
                    raise
                warnings.warn(
                    f"{folder} lies on a file system without locks: see to it yourself that no "
                    "other process trains in it",
                    RunWarning,
                    stacklevel=2,
                )
            # The holder before may have removed the file between the two calls.
            if self._is_at_path(handle):
                self._handle = handle
            else:
                os.close(handle)
        with contextlib.suppress(OSError):  # a full disk; the lock holds without a name
            os.truncate(handle, 0)
            os.write(handle, f"{socket.gethostname()} {os.getpid()}\n".encode())
        _held.add(self)

    def _is_at_path(self, handle: int) -> bool:
        try:
            return os.path.samestat(os.fstat(handle), os.stat(self._path))
        except FileNotFoundError:
            return False

    def release(self) -> None:
        """Let others have the folder."""
        if self._handle >= 0:
            self._path.unlink(missing_ok=True)
            os.close(self._handle)
            self._handle = -1

    def forget(self) -> None:
        """Close the handle that a forked child has inherited; the parent's lock stays."""
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1


def _forget_all() -> None:
    for lock in list(_held):
        lock.forget()


# A child would keep its parent's lock alive after the parent's death.
os.register_at_fork(after_in_child=_forget_all)


def holder(folder: Path) -> str:
    """Return who has a folder's lock, "process 12 on host", or "" if nobody has."""
    try:
        handle = os.open(folder / NAME, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return ""
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        words = os.read(handle, 300).decode(errors="replace").split()
        return f"process {words[1]} on {words[0]}" if len(words) == 2 else "another process"
    except OSError:
        return ""
    finally:
        os.close(handle)
    return ""
