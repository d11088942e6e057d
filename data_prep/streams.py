"""Find out which streams of a media file can be decoded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..media_empathic import MediaError, probe, read_audio, read_video


@dataclass(frozen=True)
class UsableStreams:
    """The usable streams of a media file, and the error if a stream is broken."""

    has_audio: bool
    has_video: bool
    duration: float | None = None
    channels: int | None = None  # of the sound, according to the header; None if a stream is broken
    error: str | None = None

    def holds(self, kind: str) -> bool:
        """Whether the file has a usable stream of this kind, `audio` or `video`."""
        return self.has_audio if kind == "audio" else self.has_video


def usable_streams(path: Path) -> UsableStreams:
    """Open a clip and decode its first frames. An unreadable file gives an `error`, not an exception."""
    try:
        info = probe(path, decode=True)
        return UsableStreams(info.has_audio, info.has_video, info.duration, info.channels)
    except MediaError as error:
        message = str(error)
    usable = []
    for read in (read_audio, read_video):  # one of the two streams may be intact
        try:
            read(path)
            usable.append(True)
        except MediaError:
            usable.append(False)
    return UsableStreams(*usable, error=message)
