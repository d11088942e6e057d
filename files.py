"""
Files that are always complete, folders that one program writes at a time, fingerprints of JSON values, and paths as
people write them.

What is written goes to a temporary name first and is then moved into place.
"""

import hashlib
import json
import logging
import os
import re
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None

logger = logging.getLogger(__name__)

LOCK_FILE = ".lock"


@contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[Path]:
    """
    Within, write to the path that is given: at the end it replaces `path`. After an error, `path` is as it was.

    The folder of `path` must exist. Several processes may write the same file; the last one wins.
    """
    path = Path(path)
    partial = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write a UTF-8 file atomically."""
    with atomic_path(path) as partial, open(partial, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def write_json(path: str | os.PathLike, content, **options) -> None:
    """Write a JSON file atomically; `options` are those of `json.dumps`, with `indent=2` by default."""
    write_text(path, json.dumps(content, **{"indent": 2, **options}) + "\n")


# ------------------------------------------------------------------------------------------------------------ folders


# Folders of the package whose files are named by their path in it.
PACKAGED_FOLDERS = (("recipes",), ("accelerate_configs",))


class FolderInUseError(OSError):
    """Another program is writing to the folder; the message says which."""


_held: set[int] = set()  # descriptors of the locks of this process


def _release_in_child() -> None:
    # A forked process, such as a worker of a data loader, would keep the lock after its parent was killed.
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_release_in_child)


@contextmanager
def held_folder(folder: str | os.PathLike, program: str, name: str = LOCK_FILE) -> Iterator[None]:
    """
    Within, this process alone writes to the folder, which is created if needed. Of several processes that write to it
    together, such as those of one launch, the first holds it for all.

    The system releases the lock when the process ends, however it ends. The file of the lock names the process; a file
    that is left by a killed process holds nothing.

    Args:
        folder: the folder.
        program: name of the program in the error of another one, such as `empathic train`.
        name: name of the lock, for programs that can share a folder.

    Raises:
        FolderInUseError: if another process holds the folder; the message names the process.
        OSError: if the folder cannot be created or written.
    """
    folder = Path(folder)
    created = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise NotADirectoryError(f"{folder} is a file. Choose another folder.") from error
    path = folder / name
    descriptor = _lock(path, program)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)  # while it is still locked, so that the lock of the next process stays
        if descriptor in _held:
            _held.remove(descriptor)
            os.close(descriptor)
        for folder in created:
            try:
                folder.rmdir()  # nothing was written
            except OSError:
                break


def _lock(path: Path, program: str) -> int:
    """Lock a file and write into it who holds it; return its descriptor."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            if fcntl is not None:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(descriptor, 4096).decode(errors="replace")
            os.close(descriptor)
            raise FolderInUseError(
                f"{path.parent} is in use by {_name_of(holder)}. Wait until it has ended, or choose another folder."
            ) from None
        except OSError as error:
            logger.warning("%s cannot be locked (%s). Do not run two programs on this folder.", path.parent, error)
        if _is_current(path, descriptor):
            break
        os.close(descriptor)  # the process before us removed this file between our two calls
    _held.add(descriptor)
    about = {"pid": os.getpid(), "host": socket.gethostname(), "program": program}
    os.ftruncate(descriptor, 0)
    os.write(descriptor, json.dumps({**about, "since": time.strftime("%Y-%m-%d %H:%M:%S")}).encode())
    return descriptor


def _is_current(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _name_of(holder: str) -> str:
    try:
        found = json.loads(holder)
        return f"process {found['pid']} on {found['host']} ({found['program']}, since {found['since']})"
    except (ValueError, KeyError, TypeError):  # it has just started
        return "another process"


# ------------------------------------------------------------------------------------------------------------- digests


def fingerprint(content) -> str:
    """Return a fingerprint of a JSON value, 64 hexadecimal digits; the order of keys does not matter."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def clean_path(text: str) -> str:
    """
    Return the path that a person means: without white space and quotes around it, as a terminal adds them to a file
    that is dropped on it, with `~` as the home folder, and with `\\ ` as a space unless there is such a file.
    """
    path = text.strip()
    if len(path) > 1 and path[0] == path[-1] and path[0] in "'\"" and not os.path.exists(path):
        path = path[1:-1]
    path = os.path.expanduser(path)
    if os.sep == "/" and "\\" in path and not os.path.exists(path):
        plain = re.sub(r"\\(.)", r"\1", path)
        path = plain if os.path.exists(plain) else path
    return path


def packaged(path: str) -> str:
    """
    Return the path of a file that comes with this package, such as `recipes/tiny/epo.yaml` or
    `accelerate_configs/zero3.yaml`, if it is not a file here: an installed package has no copy in the current folder.
    """
    if os.path.exists(path) or Path(path).parts[:1] not in PACKAGED_FOLDERS:
        return path
    own = Path(__file__).parent / path
    return str(own) if own.is_file() else path
