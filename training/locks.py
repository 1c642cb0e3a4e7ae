# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Let one run at a time write an output.

The operating system holds the lock and drops it when the process ends, however that happens. A lock file that was left
behind refuses nothing.
"""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

from filelock import FileLock, Timeout


@contextmanager
def sole_writer(output: Path, lock_file: Path, option: str) -> Iterator[None]:
    """Hold `lock_file` in this context. The same thread may enter it again.

    Args:
        output: the file or folder that is written; for the message.
        option: the option that chooses another one; for the message.

    Raises:
        ValueError: another run holds it; names that run.
    """
    lock_file.parent.mkdir(parents=True, exist_ok=True)
    record = lock_file.with_name(f"{lock_file.name}-holder")
    lock = FileLock(lock_file, timeout=0, is_singleton=True)
    try:
        lock.acquire()
    except Timeout as error:
        raise ValueError(
            f"{output} is being written by another run: {_holder(record)}. Wait for it or stop it, and run the same "
            f"command again; or choose another {option}."
        ) from error
    try:
        if lock.lock_counter == 1:
            record.write_text(_this_process(), encoding="utf-8")
        yield
    finally:
        if lock.lock_counter == 1:
            for path in (record, lock_file):
                with suppress(OSError):  # Windows removes no file that is open
                    path.unlink()
        lock.release()


def is_held(lock_file: Path) -> bool:
    """Return whether a run holds `lock_file`."""
    if not lock_file.exists():
        return False
    probe = FileLock(lock_file, timeout=0)
    try:
        probe.acquire()
    except Timeout:
        return True
    probe.release()
    return False


def _this_process() -> str:
    """Return what the message says of this process."""
    since = datetime.now().astimezone().isoformat(" ", "seconds")
    return f"process {os.getpid()} on {socket.gethostname()}, since {since}"


def _holder(record: Path) -> str:
    """Return what the run that holds the lock wrote of itself."""
    try:
        return record.read_text(encoding="utf-8") or "one that has just begun"
    except OSError:
        return "one that has just begun"
