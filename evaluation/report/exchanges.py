"""Sample conversations of a report: the messages, the clip, and the reply of each system."""

import base64
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import quote

from ...data_prep.messages import message_text
from ...media_empathic import MediaError
from ..saved_clips import changed_clip, order_of
from ..study.clips import playable
from ..study.replies import Conversation, StudyError, has_lost_clip, media_of, read_replies, spoken
from .parts import Exchange, Missing, Part, ReportClip

EARLIER = 4  # messages shown before the last message
CLIP_BYTES, ALL_BYTES = 3 * 2**20, 24 * 2**20  # maximum size of one embedded clip, and of all
TYPES = {".mp4": "mp4", ".webm": "webm"}


class ReportClips:
    """Prepare clips for a page: small clips are embedded, others are links relative to `folder`."""

    def __init__(self, folder: Path, each: int = CLIP_BYTES, together: int = ALL_BYTES):
        self.folder, self.each, self.left = folder, each, together
        self._made: dict[tuple, ReportClip] = {}

    def show(self, message: Mapping) -> ReportClip | None:
        """The clip of a message, or None."""
        files = media_of(message)
        if not files:
            note = (
                "The clip is stored in the data set and was not saved with the replies; see --clips of the evaluation."
            )
            return ReportClip("video", None, note) if has_lost_clip(message) else None
        key = tuple(sorted(files.items()))
        if key not in self._made:
            self._made[key] = self._make(*(Path(files[kind]) if kind in files else None for kind in ("video", "audio")))
        return self._made[key]

    def _make(self, video: Path | None, audio: Path | None) -> ReportClip:
        with tempfile.TemporaryDirectory() as scratch:
            try:
                file, kind = playable(video, audio, Path(scratch) / "clip")
            except MediaError as error:
                return ReportClip("video", None, f"The clip is not shown: {error}")
            size = file.stat().st_size
            if size <= min(self.each, self.left):
                self.left -= size
                content = base64.b64encode(file.read_bytes()).decode()
                return ReportClip(kind, f"data:{kind}/{TYPES[file.suffix]};base64,{content}")
        link = quote(Path(os.path.relpath(video or audio, self.folder)).as_posix())
        note = f"The clip is a separate file ({size / 2**20:.1f} MiB): {link}"
        return ReportClip(kind, link, note)


def exchanges(sources: Mapping[str, Path], count: int, clips: ReportClips) -> list[Part]:
    """
    Choose sample conversations that all systems answered, reproducibly: those whose ids have the lowest hashes.

    Args:
        sources: {system: file of its saved replies}.
        count: number of conversations.
        clips: prepares their clips.
    """
    there = {name: path for name, path in sources.items() if path.is_file()}
    gone = {name: path for name, path in sources.items() if name not in there}
    parts: list[Part] = []
    if gone:
        files = ", ".join(map(str, gone.values()))
        parts.append(Missing(f"Replies of {', '.join(gone)}: not found: {files}. Copy them next to the results."))
    if not there:
        return parts
    try:
        found, _ = read_replies([f"{name}={path}" for name, path in there.items()])
    except StudyError as error:
        return [*parts, Missing(f"Sample conversations: {error}")]
    chosen = sorted(found, key=lambda each: order_of(each.id))[:count]
    return [*parts, *(_exchange(each, clips) for each in chosen)]


def _exchange(conversation: Conversation, clips: ReportClips) -> Exchange:
    messages = spoken(conversation.prompt)
    shown = [(message.get("name") or message["role"], message_text(message)) for message in messages[-EARLIER - 1 :]]
    if len(messages) > len(shown):
        shown.insert(0, ("", f"… {len(messages) - len(shown)} earlier utterances are omitted …"))
    changed, lost = changed_clip(conversation.prompt, list(conversation.rows.values())), None
    if changed is not None:
        lost = ReportClip("video", None, f"The clip is not shown: {changed} was replaced after the replies.")
    row = next(iter(conversation.rows.values()))
    replies = [("true reply", row["reference"])] if row.get("reference") else []
    emotion = f"labeled {row['emotion']}" if row.get("emotion") else None
    return Exchange(
        id=conversation.id,
        emotion=emotion,
        messages=shown,
        clip=clips.show(messages[-1]) if messages and changed is None else lost,
        replies=[*replies, *conversation.replies.items()],
    )
