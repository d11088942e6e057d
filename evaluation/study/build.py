"""
Writes the folder of a study.

    raters/CODE.json    what one rater's page is given; no name of a system is in it
    media/              the conversations' clips, under names that tell nothing
    links.txt           the raters' links
    key.json            which code is which reply; never served, not needed until the analysis
    answers/CODE.jsonl  what the raters answered
    static/CODE.html    with `static`: each rater's page as a file
"""

import json
import os
import random
import secrets
import shutil
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path

from empathic.evaluation.study.clips import playable
from empathic.evaluation.study.design import Item, plan
from empathic.evaluation.study.pages import static_page
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

KEY, RATERS, MEDIA, ANSWERS, LINKS, STATIC = "key.json", "raters", "media", "answers", "links.txt", "static"

# The two questions of Sec. 5.2 in other words: the sentence as a continuation of the conversation in its meaning, and
# its empathy with the final statement.
QUESTIONS = (
    {"name": "semantics", "text": "How well does this reply make sense as the next line of the conversation?"},
    {"name": "empathy", "text": "How well does this reply show feeling for what was said last?"},
)
SCALE = ({"score": 1, "label": "bad"}, {"score": 2, "label": "medium"}, {"score": 3, "label": "good"})
CHECK = 'This is no reply, but shows that you are reading: please answer "{label}" to both questions.'
LOST = (
    "its clip is inside the data set, and not in the folder clips beside the replies; run `empathic evaluate dialogue` "
    "again with a larger --clips, which makes no reply anew"
)
INTRODUCTION = (
    "You will see short conversations. Each one ends with a sentence that somebody answers; you judge the answers.",
    "Play the clip with the sound on, and read what was said before. Then answer two questions about the reply: how "
    "well it makes sense there, and how well it shows feeling for what was said last and how it was said.",
    "Judge each reply for itself. There is no right or wrong; we want your own impression.",
    "Each answer is saved as soon as you give it. You can close this page at any time and go on later with the same "
    "link.",
)


@dataclass
class Exclusion:
    """
    When a rater is left out of the analysis, stated before the study begins.

    Args:
        complete: share of the rater's answers that must be there.
        failed_checks: attention checks that may be answered otherwise than they ask.
        median_seconds: the median time for a reply, both questions, must not be below this.
        played: share of the judged conversations with a clip of which a second or more must have been played.
    """

    complete: float = 1.0
    failed_checks: int = 0
    median_seconds: float = 2.0
    played: float = 0.5

    def __post_init__(self):
        for name in ("complete", "played"):
            if not 0 <= getattr(self, name) <= 1:
                raise StudyError(f"The exclusion rule {name} is {getattr(self, name)} and must be from 0 to 1.")
        for name in ("failed_checks", "median_seconds"):
            if getattr(self, name) < 0:
                raise StudyError(f"The exclusion rule {name} is {getattr(self, name)} and must be 0 or more.")


@dataclass
class StudyOptions:
    """
    The study's size and order.

    Args:
        conversations: how many are drawn; None takes all. The paper has 10.
        raters: how many links there are. The paper has 10.
        ratings: of each reply; None takes all raters (`within`), or as many as there can be (`between`).
        design: `within` or `between`, see `design.plan`.
        checks: attention checks of each rater.
        seed: of the draw and of all orders. The codes are new each time: nobody can work them out from the seed.
        reference: whether the true replies are rated too, as one more system.
        title, thanks: first and last words of the page; `thanks` may hold a code of completion.
        exclusion: of the analysis.
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
    Writes a study.

    Args:
        sources: files of replies, see `replies.read_replies`.
        output: a folder that is not there, or is empty.
        options: see `StudyOptions`.
        static: also write each rater's page as a file that needs no server.

    Returns:
        The key.

    Raises:
        StudyError: for replies, numbers or a folder that do not do.
    """
    output = Path(output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise StudyError(f"{output}: is there already. A study is never written over; give another folder.")
    found, left_out = read_replies(sources, options.reference)
    systems = list(found[0].replies)
    wanted = options.conversations
    if wanted is not None and wanted < 1:
        raise StudyError(f"conversations is {wanted} and must be 1 or more, or None for all.")
    draw = random.Random(options.seed)
    part = output.with_name(f"{output.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    (part / MEDIA).mkdir(parents=True)
    try:
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
                f"out, such as {left_out[0]['id']} ({left_out[0]['reason']}). Take fewer conversations or more replies."
                if left_out
                else f"There are only {len(chosen)} conversations for a study of {wanted or 1}. Take fewer."
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
        output.parent.mkdir(parents=True, exist_ok=True)
        if output.exists():
            output.rmdir()
        os.replace(part, output)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return key


def _code() -> str:
    return secrets.token_hex(8)


def _shown(conversation: Conversation, folder: Path) -> list[dict]:
    """The messages as the page is given them, with their clips written."""
    messages, written = [], []
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
            name = message.get("name") or ("The one who replies" if mine else "Speaker")
            messages.append({"name": str(name), "mine": mine, "text": text_of(message), "clip": clip})
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
        _write_json(folder / RATERS / f"{rater}.json", page)
        if static:
            _write_text(folder / STATIC / f"{rater}.html", static_page(page))
    if static:
        shutil.copytree(folder / MEDIA, folder / STATIC / MEDIA)
    links = "".join(
        f"{number}\t{f'{STATIC}/{rater}.html' if static else f'/r/{rater}'}\n" for number, rater in enumerate(raters, 1)
    )
    _write_text(folder / LINKS, links)
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
    _write_json(folder / KEY, key)
    return json.loads(json.dumps(key))


def _write_json(path: Path, content) -> None:
    _write_text(path, json.dumps(content, ensure_ascii=False, indent=1) + "\n")


def _write_text(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
