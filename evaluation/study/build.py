"""
Write the folder of a study.

    raters/CODE.json    data of a rater's page, without names of systems
    media/              the clips of the conversations, under random names
    links.txt           the raters' links
    key.json            maps codes to replies; never served, and only needed for the analysis
    answers/CODE.jsonl  the answers of a rater
    static/CODE.html    with `static`: each rater's page as a file
"""

import json
import os
import random
import secrets
import shutil
import tempfile
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path

from ...data_prep.messages import message_text
from ...files import write_json, write_text
from ...media_empathic import MediaError
from ..saved_clips import changed_clip
from .clips import playable
from .design import Item, plan
from .pages import static_page
from .replies import Conversation, StudyError, has_lost_clip, media_of, read_replies, spoken

KEY, RATERS, MEDIA, ANSWERS, LINKS, STATIC = "key.json", "raters", "media", "answers", "links.txt", "static"

# The two questions of Sec. 5.2 in our own words: does the reply continue the conversation semantically, and does it
# show empathy with the final statement?
QUESTIONS = (
    {"name": "semantics", "text": "How well does this reply make sense as the next line of the conversation?"},
    {"name": "empathy", "text": "How well does this reply show feeling for what was said last?"},
)
SCALE = ({"score": 1, "label": "bad"}, {"score": 2, "label": "medium"}, {"score": 3, "label": "good"})
CHECK = 'This is an attention check, not a reply: please answer "{label}" to both questions.'
LOST = (
    "its clip is stored in the data set, and not in the folder clips next to the replies; rerun `empathic evaluate "
    "dialogue` with a larger --clips, which reuses all replies"
)
CHANGED = "{path}: was replaced after the replies; rerun `empathic evaluate dialogue`, which replies to the new clip"
INTRODUCTION = (
    "You will see short conversations. Each conversation ends with a sentence and a reply to it; you judge the reply.",
    "Play the clip with the sound on, and read what was said before. Then answer two questions about the reply: how "
    "well it makes sense there, and how well it shows feeling for what was said last and how it was said.",
    "Judge each reply on its own. There is no right or wrong; we want your own impression.",
    "Each answer is saved as soon as you give it. You can close this page at any time and continue later with the same "
    "link.",
)


@dataclass
class Exclusion:
    """
    Rules to exclude a rater from the analysis, stated before the study begins.

    Args:
        complete: minimum share of questions that the rater must answer.
        failed_checks: maximum number of failed attention checks.
        median_seconds: minimum of the median time per reply, for both questions together.
        played: minimum share of clips, among the judged conversations, that must be played for at least a second.
    """

    complete: float = 1.0
    failed_checks: int = 0
    median_seconds: float = 2.0
    played: float = 0.5

    def __post_init__(self):
        for name in ("complete", "played"):
            if not 0 <= getattr(self, name) <= 1:
                raise StudyError(f"The exclusion rule {name} is {getattr(self, name)}; it must be from 0 to 1.")
        for name in ("failed_checks", "median_seconds"):
            if getattr(self, name) < 0:
                raise StudyError(f"The exclusion rule {name} is {getattr(self, name)}; it must be 0 or more.")


@dataclass
class StudyOptions:
    """
    The options of a study.

    Args:
        conversations: number of conversations to draw; None for all. The paper has 10.
        raters: number of raters, each with a link. The paper has 10.
        ratings: number of ratings per reply; None for all raters (`within`), or for the maximum (`between`).
        design: `within` or `between`, see `design.plan`.
        checks: number of attention checks per rater.
        seed: seed of the draw and of all orders. The codes do not depend on it, so that they cannot be guessed.
        reference: whether the true replies are also rated, as a further system.
        title, thanks: first and last text on the page; `thanks` may contain a completion code.
        exclusion: exclusion rules of the analysis.
    """

    conversations: int | None = 10
    raters: int = 10
    ratings: int | None = None
    design: str = "within"
    checks: int = 2
    seed: int = 0
    reference: bool = False
    title: str = "Which reply fits?"
    thanks: str = "That was the last reply. Thank you!"
    exclusion: Exclusion = field(default_factory=Exclusion)


def build(sources: list[str], output: Path, options: StudyOptions, static: bool = False) -> dict:
    """
    Write a study.

    Args:
        sources: files of replies, see `replies.read_replies`.
        output: output folder; it must not exist, or be empty.
        options: see `StudyOptions`.
        static: also write each rater's page as a file that needs no server.

    Returns:
        The content of key.json.

    Raises:
        StudyError: if the replies, an option or the folder is invalid.
    """
    output = Path(output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise StudyError(f"{output}: exists already. A study is never overwritten; give another folder.")
    found, left_out = read_replies(sources, options.reference)
    systems = list(found[0].replies)
    wanted = options.conversations
    if wanted is not None and wanted < 1:
        raise StudyError(f"conversations is {wanted}; it must be 1 or more, or None for all.")
    draw = random.Random(options.seed)
    output.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f"{output.name}.", suffix=".part", dir=output.parent))  # of this run alone
    try:
        part.chmod(0o755)
        (part / MEDIA).mkdir()
        chosen, shown = [], []
        for conversation in draw.sample(found, len(found)):
            if len(chosen) == wanted:
                break
            try:
                shown.append(_shown(conversation, part / MEDIA))
                chosen.append(conversation)
            except MediaError as error:
                left_out.append({"id": conversation.id, "reason": str(error)})
        if len(chosen) < (wanted or 1):
            raise StudyError(
                f"There are only {len(chosen)} conversations for a study of {wanted or 1}; {len(left_out)} are left "
                f"out, such as {left_out[0]['id']} ({left_out[0]['reason']}). Use fewer conversations or more replies."
                if left_out
                else f"There are only {len(chosen)} conversations for a study of {wanted or 1}. Use fewer."
            )
        ratings = options.ratings
        if ratings is None:
            ratings = options.raters if options.design == "within" else max(options.raters // len(systems), 1)
        try:
            items = plan(
                len(chosen), len(systems), options.raters, ratings, options.design, options.checks, options.seed
            )
        except ValueError as error:
            raise StudyError(str(error)) from None
        key = _write(part, chosen, shown, systems, items, options, ratings, left_out, static)
        if output.exists():
            output.rmdir()
        os.replace(part, output)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return key


def _code() -> str:
    return secrets.token_hex(8)


def _shown(conversation: Conversation, folder: Path) -> list[dict]:
    """Write the clips of a conversation; return its messages in the format of the page."""
    messages, written = [], []
    changed = changed_clip(conversation.prompt, list(conversation.rows.values()))
    if changed is not None:
        raise MediaError(CHANGED.format(path=changed))
    try:
        for message in spoken(conversation.prompt):
            media, clip = media_of(message), None
            if has_lost_clip(message):
                raise MediaError(LOST)
            if media:
                paths = [Path(media[kind]) if kind in media else None for kind in ("video", "audio")]
                target, kind = playable(*paths, folder / _code())
                written.append(target)
                clip = {"file": target.name, "kind": kind}
            mine = message.get("role") == "assistant"
            name = message.get("name") or ("Replying speaker" if mine else "Speaker")
            messages.append({"name": str(name), "mine": mine, "text": message_text(message), "clip": clip})
    except MediaError:
        for target in written:
            target.unlink(missing_ok=True)
        raise
    return messages


def _write(
    folder: Path,
    chosen: list[Conversation],
    shown: list[list[dict]],
    systems: list[str],
    plans: list[list[Item]],
    options: StudyOptions,
    ratings: int,
    left_out: list[dict],
    static: bool,
) -> dict:
    labels = {step["score"]: step["label"] for step in SCALE}
    codes = [_code() for _ in chosen]
    raters, items = {}, {}
    for theirs in plans:
        rater = _code()
        raters[rater] = []
        page = {
            "rater": rater,
            "title": options.title,
            "thanks": options.thanks,
            "introduction": INTRODUCTION,
            "questions": QUESTIONS,
            "scale": SCALE,
            "conversations": {codes[item.conversation]: shown[item.conversation] for item in theirs},
            "items": [],
        }
        places = Counter()
        for item in theirs:
            code = _code()
            conversation = chosen[item.conversation]
            if item.system is None:
                reply = CHECK.format(label=labels[item.expected])
                items[code] = {"conversation": conversation.id, "check": item.expected}
            else:
                reply = conversation.replies[systems[item.system]]
                place = places[item.conversation]
                items[code] = {"conversation": conversation.id, "system": systems[item.system], "place": place}
                places[item.conversation] += 1
            raters[rater].append(code)
            page["items"].append({"code": code, "conversation": codes[item.conversation], "reply": reply})
        (folder / RATERS).mkdir(parents=True, exist_ok=True)
        write_json(folder / RATERS / f"{rater}.json", page, ensure_ascii=False)
        if static:
            (folder / STATIC).mkdir(exist_ok=True)
            write_text(folder / STATIC / f"{rater}.html", static_page(page))
    if static:
        shutil.copytree(folder / MEDIA, folder / STATIC / MEDIA)
    links = "".join(
        f"{number}\t{f'{STATIC}/{rater}.html' if static else f'/r/{rater}'}\n" for number, rater in enumerate(raters, 1)
    )
    write_text(folder / LINKS, links)
    (folder / ANSWERS).mkdir()
    key = {
        "format": 1,
        "settings": {**asdict(options), "conversations": len(chosen), "ratings": ratings},
        "systems": systems,
        "questions": QUESTIONS,
        "scale": SCALE,
        "conversations": {
            conversation.id: {
                "clip": any(message["clip"] for message in messages),
                "prompt": conversation.prompt,
                "replies": conversation.replies,
                "rows": conversation.rows,
            }
            for conversation, messages in zip(chosen, shown, strict=True)
        },
        "raters": raters,
        "items": items,
        "left_out": left_out,
    }
    write_json(folder / KEY, key, ensure_ascii=False)
    return json.loads(json.dumps(key))
