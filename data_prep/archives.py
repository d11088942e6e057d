"""Unpack the untrusted archives of corpora: tar, compressed tar and zip.

Only regular files are written, one at a time, and only below the folder of the archive. Members with an absolute path,
members that leave the folder with `..`, links to targets outside and devices are refused and reported. From a damaged
archive, all readable files are unpacked.
"""

from __future__ import annotations

import calendar
import errno
import json
import lzma
import os
import shutil
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO

from tqdm import tqdm

from ..media_empathic import LFS_HEAD
from .corpora.base import LayoutError, Report

ENDINGS = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar", ".zip")
DAMAGE = (
    tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, NotImplementedError, RuntimeError,
    IndexError, ValueError,  # from a damaged index, such as names that are not UTF-8
)  # fmt: skip
AGAIN = "Copy or download it again."
# Errors for a member that cannot be written: its name is too long, or its path conflicts with another member.
BAD_PLACES = (errno.ENAMETOOLONG, errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.EINVAL)
CHUNK = 2**20


@dataclass
class _Member:
    """A file of an archive. `open` returns its content; `link` is the name of the member with its content."""

    name: str
    seconds: float  # modification time
    open: Callable[[], IO[bytes]] | None = None
    link: str | None = None
    refused: str | None = None


class _TarInfo(tarfile.TarInfo):
    """Records whether the end marker was read, because tarfile silently treats a damaged header as the end."""

    @classmethod
    def fromtarfile(cls, tar):
        try:
            return super().fromtarfile(tar)
        except tarfile.EOFHeaderError:
            tar.saw_end = True
            raise


def archive_stem(archive: Path) -> str:
    """The name of an archive without the ending of its format, such as `train` for `train.tar.gz`."""
    for ending in ENDINGS:
        if archive.name.lower().endswith(ending):
            return archive.name[: -len(ending)] or archive.name
    return archive.stem


def _is_macos(name: str) -> bool:
    parts = PurePosixPath(name).parts
    return "__MACOSX" in parts or (bool(parts) and (parts[-1].startswith("._") or parts[-1] == ".DS_Store"))


def _inside(name: str) -> PurePosixPath | None:
    """The path of a member below the archive's folder; None if it is outside of the folder."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\0" in name or not path.parts:
        return None
    return path


def _link_target(member: tarfile.TarInfo) -> str | None:
    """The name of the member that a link points to; None if the target is outside. A hard link has the full name of its
    target, a symbolic link a path relative to its own folder."""
    if member.islnk():
        return member.linkname
    if member.linkname.startswith("/"):
        return None
    parts: list[str] = []
    for part in (PurePosixPath(member.name).parent / member.linkname).parts:
        if part != "..":
            parts.append(part)
        elif parts:
            parts.pop()
        else:
            return None
    return "/".join(parts)


def _tar_members(archive: Path) -> Iterator[_Member]:
    with tarfile.open(archive, "r:*", tarinfo=_TarInfo) as tar:
        tar.saw_end = False
        while (member := tar.next()) is not None:
            tar.members = []  # otherwise tarfile keeps all members
            found = _Member(member.name, member.mtime)
            if member.isdir():
                continue
            if member.isreg():
                found.open = partial(tar.extractfile, member)
            elif member.issym() or member.islnk():
                found.link = _link_target(member)
                if found.link is None or _inside(found.link) is None:
                    found.refused = f"it is a link to {member.linkname}, outside of the archive; it was not unpacked."
            else:
                found.refused = "it is a device or the like, not a file; it was not unpacked."
            yield found
        if not tar.saw_end:
            raise tarfile.ReadError("its end is missing or damaged")


def _zip_members(archive: Path) -> Iterator[_Member]:
    with zipfile.ZipFile(archive) as packed:
        for member in packed.infolist():
            if member.filename.endswith("/"):  # not is_dir(), which fails on an empty name
                continue
            # Windows programs may write backslashes.
            found = _Member(member.filename.replace("\\", "/"), _seconds(member.date_time))
            mode = member.external_attr >> 16
            if stat.S_IFMT(mode) not in (0, stat.S_IFREG):
                found.refused = "it is a link, a device or the like, not a file; it was not unpacked."
            else:
                found.open = partial(packed.open, member)
            yield found


def _seconds(date_time: tuple[int, ...]) -> float:
    try:
        return float(calendar.timegm((*date_time, 0, 0, 0)))
    except ValueError:
        return 0.0


def _members(archive: Path) -> Iterator[_Member]:
    with open(archive, "rb") as file:
        is_zip = file.read(2) == b"PK"
    yield from _zip_members(archive) if is_zip else _tar_members(archive)


def _write(member: _Member, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with member.open() as content, open(target, "wb") as file:
        shutil.copyfileobj(content, file, CHUNK)
    _set_time(target, member.seconds)


def _set_time(target: Path, seconds: float) -> None:
    """Set the modification time to that of the member, so that unpacking again gives identical files."""
    try:
        os.utime(target, (seconds, seconds))
    except (OverflowError, OSError, ValueError):
        os.utime(target, (0, 0))


def _extract(archive: Path, folder: Path, ignore) -> None:
    """Write the members of an archive below `folder`."""
    links: list[_Member] = []
    written = macos = 0
    progress = tqdm(desc=f"Unpacking {archive.name}", unit=" files", disable=None, leave=False)
    with progress:
        members = _members(archive)
        while True:
            try:
                member = next(members, None)
            except (*DAMAGE, OSError) as error:
                if isinstance(error, OSError) and error.errno is not None:
                    raise  # an error of the disk, not of the archive
                what = str(error).partition("\n")[0].rstrip(":")
                ignore(archive.name, f"it is damaged or cut short ({what}); {written} files were read. {AGAIN}")
                break
            if member is None:
                break
            name, place = f"{archive.name}: {member.name}", _inside(member.name)
            if _is_macos(member.name):
                macos += 1
            elif place is None:
                ignore(name, "its path leads out of the archive's folder; it was not unpacked.")
            elif member.refused:
                ignore(name, member.refused)
            elif member.link is not None:
                links.append(member)
            else:
                target = folder / place
                try:
                    _write(member, target)
                    written += 1
                    progress.update()
                except (*DAMAGE, OSError) as error:
                    if isinstance(error, OSError) and error.errno is not None and error.errno not in BAD_PLACES:
                        raise
                    if os.path.isfile(target):
                        os.unlink(target)
                    what = error.strerror if isinstance(error, OSError) and error.strerror else error
                    ignore(name, f"it cannot be unpacked ({what}).")
    for member in links:  # links are never created: each becomes a copy of its target
        source, target = folder / _inside(member.link), folder / _inside(member.name)
        if not os.path.isfile(source) or os.path.lexists(target):
            ignore(f"{archive.name}: {member.name}", f"it is a link to {member.link}, not a file of the archive.")
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source, target)
    if macos:
        ignore(archive.name, f"{macos} files that macOS puts into archives were skipped.")


def unpack(archive: Path, into: Path, report: Report) -> Path:
    """
    Unpack an archive, one file at a time. Archives inside the archive stay packed.

    After a run that was killed, unpacking starts again; an archive that was unpacked before and has not changed is not
    unpacked again. Members that were not unpacked are listed in `report.ignored`, on every call.

    Args:
        archive: a tar, compressed tar or zip file.
        into: the folder to unpack into.
        report: the report.

    Returns:
        `into/<name without .tar.gz, .zip ...>`; an empty folder if nothing could be read.

    Raises:
        FileNotFoundError: if there is no such file.
        LayoutError: if the file is a Git-LFS pointer, or another archive with the same name is unpacked in `into`.
    """
    archive, into = Path(archive), Path(into)
    found = archive.stat()
    with open(archive, "rb") as file:
        if file.read(len(LFS_HEAD)) == LFS_HEAD:
            raise LayoutError(f"{archive}: is a Git-LFS pointer, not the archive itself. Fetch it with `git lfs pull`.")
    stem = archive_stem(archive)
    folder, marker = into / stem, into / f".{stem}.unpacked"
    content = {"archive": os.path.abspath(archive), "size": found.st_size, "time": found.st_mtime_ns}
    known = json.loads(marker.read_bytes()) if marker.is_file() and folder.is_dir() else {}
    if known.get("archive", content["archive"]) != content["archive"] and os.path.exists(known["archive"]):
        raise LayoutError(f"{archive} and {known['archive']}: have the same name and would mix. Rename one of them.")
    if any(known.get(key) != content[key] for key in ("size", "time")):
        into.mkdir(parents=True, exist_ok=True)
        marker.unlink(missing_ok=True)
        part, lines = into / f".{stem}.part", []
        for old in (part, folder):
            if old.exists():
                shutil.rmtree(old)
        part.mkdir()
        _extract(archive, part, lambda item, reason: lines.append({"item": item, "reason": reason}))
        part.rename(folder)
        known = {**content, "ignored": lines}
        text = json.dumps(known)
        (into / f".{stem}.marker").write_text(text, encoding="utf-8")
        os.replace(into / f".{stem}.marker", marker)
    for entry in known["ignored"]:
        report.ignore(entry["item"], entry["reason"])
    return folder
