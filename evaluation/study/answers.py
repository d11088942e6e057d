"""Store answers as they are given: one append-only file per rater, one JSON line per answer."""

import json
import os
import threading
from datetime import UTC, datetime
from pathlib import Path

from .replies import StudyError

FIELDS = {"rater", "item", "question", "score", "time", "seconds", "played"}


def read_answers(path: Path) -> tuple[list[dict], list[str]]:
    """Read the answers of a file, oldest first, and a message for each invalid line, such as a truncated line."""
    lines, problems = [], []
    for number, text in enumerate(path.read_text(encoding="utf-8", errors="replace").split("\n"), 1):
        if not text.strip():
            continue
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            line = None
        if isinstance(line, dict) and {"rater", "item", "question", "score"} <= set(line):
            lines.append(line)
        else:
            problems.append(f"{path}:{number}: not an answer: {text[:60]!r}")
    return lines, problems


class AnswerStore:
    """
    The store of all answers of a study.

    Args:
        folder: folder of the answers.
        studies: code of a rater -> data of the rater's page.
    """

    def __init__(self, folder: Path, studies: dict[str, dict]):
        self.folder = folder
        self.studies = studies
        self.items = {rater: {item["code"] for item in study["items"]} for rater, study in studies.items()}
        self.lock = threading.Lock()

    def add(self, rater: str, line) -> None:
        """
        Append an answer and flush it to disk.

        Raises:
            StudyError: if the answer is invalid or belongs to another rater.
        """
        study = self.studies[rater]
        if not isinstance(line, dict) or line.get("rater") != rater:
            raise StudyError("The answer is not from this rater.")
        if set(line) - FIELDS:
            raise StudyError(f"The answer has unknown fields: {', '.join(sorted(set(line) - FIELDS))[:80]}.")
        if not isinstance(line.get("item"), str) or line["item"] not in self.items[rater]:
            raise StudyError("The answer names a reply that this rater was not given.")
        if line.get("question") not in [question["name"] for question in study["questions"]]:
            raise StudyError("The answer names a question that was not asked.")
        if type(line.get("score")) is not int or line["score"] not in [step["score"] for step in study["scale"]]:
            raise StudyError("The answer's score is not on the scale.")
        for name in ("seconds", "played"):
            if type(line.get(name)) not in (int, float) or not 0 <= line[name] < 1e9:
                raise StudyError(f"The answer's {name} must be a number of seconds.")
        if not isinstance(line.get("time"), str) or len(line["time"]) > 40:
            raise StudyError("The answer has no time.")
        line = {**line, "received": datetime.now(UTC).isoformat(timespec="milliseconds")}
        path = self.folder / f"{rater}.jsonl"
        with self.lock, open(path, "a+b") as file:
            new = file.seek(0, os.SEEK_END) == 0
            if not new:
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":  # a crash truncated the last line; start a new line
                    file.write(b"\n")
            file.write(json.dumps(line).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
            if new:
                _sync_folder(self.folder)

    def latest(self, rater: str) -> dict[str, dict[str, int]]:
        """Return the last scores of a rater as {item: {question: score}}."""
        path, scores = self.folder / f"{rater}.jsonl", {}
        if path.is_file():
            for line in read_answers(path)[0]:
                scores.setdefault(line["item"], {})[line["question"]] = line["score"]
        return scores


def _sync_folder(folder: Path) -> None:
    """Flush a folder to disk, so that a new file in it survives a crash."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
