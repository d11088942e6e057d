"""
A folder for the files of one server. It is deleted when the server ends; the folders of servers that were killed are
deleted when the next server starts.
"""

import fcntl
import os
import shutil
import stat
import tempfile
import weakref
from pathlib import Path

PREFIX = "empathic-demo-"


class ServerFolder:
    """
    A new folder that exists as long as this object, at most until the process ends.

    The process holds a lock on the folder. The kernel releases the lock however the process ends, so that a later
    server knows that nobody uses the folder, also if its process id is in use again.

    Args:
        base: where to create the folder.

    Attributes:
        path: the folder.
    """

    def __init__(self, base: Path):
        base.mkdir(parents=True, exist_ok=True)
        held = None
        while held is None:  # a server that starts at the same time may sweep the folder before it is locked
            self.path = Path(tempfile.mkdtemp(prefix=PREFIX, dir=base))
            held = _lock(self.path, wait=True)
        self.delete = weakref.finalize(self, _delete, self.path, held)


def sweep(base: Path) -> None:
    """Delete the folders in `base` whose servers have ended; folders of running servers and of other users stay."""
    for path in base.glob(f"{PREFIX}*"):
        try:
            found = path.lstat()
        except OSError:
            continue
        if stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid():
            held = _lock(path, wait=False)
            if held is not None:
                _delete(path, held)


def _lock(path: Path, wait: bool) -> int | None:
    """Lock a folder; return the open file descriptor that holds the lock, or None if the folder is in use or gone."""
    try:
        held = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        fcntl.flock(held, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(held), path.lstat()):
            return held
    except OSError:
        pass
    os.close(held)
    return None


def _delete(path: Path, held: int) -> None:
    shutil.rmtree(path, ignore_errors=True)
    os.close(held)
