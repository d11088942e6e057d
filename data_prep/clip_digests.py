"""
Content hashes of clips: whatever is kept between runs and depends on a clip is kept under the clip's content, not under
its name. A file is read only if its size or its times changed since it was hashed.
"""

import hashlib
import os
from collections.abc import Callable

from ..media_empathic import MediaError, existing_path

MEDIA_KINDS = ("audio", "video")


def short_hash(data: bytes = b""):
    """The hash of the feature cache: BLAKE2b of 128 bits."""
    return hashlib.blake2b(data, digest_size=16)


def file_state(path: str | os.PathLike) -> list[int]:
    """
    Size, modification time and change time of a file, in ns. A file that is replaced gets a new change time even if the
    copy keeps the modification time, as `cp -p`, `rsync -t` and archives do.
    """
    found = os.stat(path)
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns]


class Digests:
    """
    Content hashes of clips. A file that was hashed before is not read again if its size and times are unchanged.

    Args:
        files: {absolute path: [size, modification time in ns, hash, change time in ns]} from earlier runs. Entries
            without a change time, of earlier versions, are not used.
        new_hash: a constructor of `hashlib`.
    """

    def __init__(self, files: dict[str, list] | None = None, new_hash: Callable = short_hash):
        self.files, self.new_hash = dict(files or {}), new_hash

    def of(self, item: dict) -> str:
        """
        Return the hash of a clip `{"path", "bytes"}`; bytes take precedence over the path, as in decoding.

        Raises:
            MediaError: if the file cannot be read, or the clip is already decoded and has no file.
        """
        if item.get("bytes") is not None:
            return self.new_hash(item["bytes"]).hexdigest()
        if item.get("path") is None:
            raise MediaError(
                f"A clip in a data set needs a path or bytes; this one has {sorted(k for k, v in item.items() if v)}."
            )
        path = os.path.abspath(existing_path(item["path"]))
        try:
            size, modified, changed = file_state(path)
            known = self.files.get(path)
            if known is None or [*known[:2], *known[3:]] != [size, modified, changed]:
                with open(path, "rb") as file:
                    digest = hashlib.file_digest(file, self.new_hash).hexdigest()
                self.files[path] = known = [size, modified, digest, changed]
        except OSError as error:
            raise MediaError(
                f"{path}: cannot be read ({error.strerror}). Check the path and its permissions."
            ) from None
        return known[2]
