"""Sample conversations of a report: what was said, the clip, and what each system replied."""

import base64
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import quote

from empathic.evaluation.report_parts import Clip, Exchange, Missing, Part
from empathic.evaluation.saved_clips import order_of
from empathic.evaluation.study.clips import playable
from empathic.evaluation.study.replies import (
    Conversation,
    StudyError,
    has_lost_clip,
    media_of,
    read_replies,
    spoken,
    text_of,
)
from empathic.media_empathic import MediaError

EARLIER = 4  # messages shown before the last one
CLIP_BYTES, ALL_BYTES = 3 * 2**20, 24 * 2**20  # of one clip inside the page, and of all
TYPES = {".mp4": "mp4", ".webm": "webm"}


class Clips:
    """Clips as a page shows them: inside it as long as they are small, else by a link relative to `folder`."""

    def __init__(self, folder: Path, each: int = CLIP_BYTES, together: int = ALL_BYTES):
        self.folder, self.each, self.left = folder, each, together
        self._made: dict[tuple, Clip] = {}

    def show(self, message: Mapping) -> Clip | None:
        """The clip of a message; None where it has none."""
        files = media_of(message)
        if not files:
            note = "The clip is inside the data set, and not beside the replies: see --clips of the evaluation."
            return Clip("video", None, note) if has_lost_clip(message) else None
        key = tuple(sorted(files.items()))
        if key not in self._made:
            self._made[key] = self._make(*(Path(files[kind]) if kind in files else None for kind in ("video", "audio")))
        return self._made[key]

    def _make(self, video: Path | None, audio: Path | None) -> Clip:
        with tempfile.TemporaryDirectory() as scratch:
            try:
                file, kind = playable(video, audio, Path(scratch) / "clip")
            except MediaError as error:
                return Clip("video", None, f"The clip is not shown: {error}")
            size = file.stat().st_size
            if size <= min(self.each, self.left):
                self.left -= size
                content = base64.b64encode(file.read_bytes()).decode()
                return Clip(kind, f"data:{kind}/{TYPES[file.suffix]};base64,{content}")
        link = quote(Path(os.path.relpath(video or audio, self.folder)).as_posix())
        note = f"A file outside of this page ({size / 2**20:.1f} MiB): {link}"
        return Clip(kind, link, note)


def exchanges(sources: Mapping[str, Path], count: int, clips: Clips) -> list[Part]:
    """
    Some conversations that all systems answered, always the same ones: those whose ids have the least hashes.

    Args:
        sources: {system: file of its saved replies}.
        count: how many.
        clips: shows their clips.
    """
    there = {name: path for name, path in sources.items() if path.is_file()}
    gone = {name: path for name, path in sources.items() if name not in there}
    parts: list[Part] = []
    if gone:
        files = ", ".join(map(str, gone.values()))
        parts.append(Missing(f"Replies of {', '.join(gone)}: not there are {files}. Copy them beside the results."))
    if not there:
        return parts
    try:
        found, _ = read_replies([f"{name}={path}" for name, path in there.items()])
    except StudyError as error:
        return [*parts, Missing(f"Sample conversations: {error}")]
    chosen = sorted(found, key=lambda each: order_of(each.id))[:count]
    return [*parts, *(_exchange(each, clips) for each in chosen)]


def _exchange(conversation: Conversation, clips: Clips) -> Exchange:
    messages = spoken(conversation.prompt)
    shown = [(message.get("name") or message["role"], text_of(message)) for message in messages[-EARLIER - 1 :]]
    if len(messages) > len(shown):
        shown.insert(0, ("", f"… {len(messages) - len(shown)} earlier utterances are left out here …"))
    row = next(iter(conversation.rows.values()))
    replies = [("true reply", row["reference"])] if row.get("reference") else []
    emotion = f"labelled {row['emotion']}" if row.get("emotion") else None
    return Exchange(
        id=conversation.id,
        emotion=emotion,
        messages=shown,
        clip=clips.show(messages[-1]) if messages else None,
        replies=[*replies, *conversation.replies.items()],
    )
