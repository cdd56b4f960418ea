"""The lock of a run folder, where its holders come and go."""

from __future__ import annotations

import errno
import fcntl
from pathlib import Path

import pytest

from maml_rl.errors import InputError, RunWarning
from maml_rl.locks import NAME, FolderLock, holder


def test_one_holds_a_folder_at_a_time_also_within_a_process(tmp_path: Path) -> None:
    """Two threads must not train in one folder either; released, it is free and leaves no file."""
    assert holder(tmp_path) == ""
    first = FolderLock(tmp_path)
    with pytest.raises(InputError, match=r"is in use by process \d+ on "):
        FolderLock(tmp_path)
    assert holder(tmp_path).startswith("process ")
    first.release()
    assert list(tmp_path.iterdir()) == []
    FolderLock(tmp_path).release()


def test_a_file_that_was_left_behind_locks_nothing(tmp_path: Path) -> None:
    """A process that was killed leaves its file, not its lock."""
    (tmp_path / NAME).write_text("elsewhere 12\n")
    assert holder(tmp_path) == ""
    FolderLock(tmp_path).release()


def test_a_lock_on_a_file_that_was_just_removed_is_not_enough(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The holder before removes the file between opening and locking it: the new one is locked."""
    real = fcntl.flock
    calls = 0

    def flock(handle: int, operation: int) -> None:
        nonlocal calls
        calls += 1
        if calls == 1:
            (tmp_path / NAME).unlink()
        real(handle, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    lock = FolderLock(tmp_path)
    with pytest.raises(InputError, match="is in use"):
        FolderLock(tmp_path)
    lock.release()


def test_a_file_system_without_locks_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training goes on, with a warning that the user must see to it alone."""

    def flock(handle: int, operation: int) -> None:
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.warns(RunWarning, match="without locks"):
        FolderLock(tmp_path).release()
