"""The requests to a judge: which replies it gets in which order; asked, saved and read through `write_replies`."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..replies import read_replies, write_replies
from ..saved_clips import changed_clip, order_of
from ..study.design import williams
from ..study.replies import Conversation, has_lost_clip, media_of, spoken
from .rubric import AGAIN, LABELS, Judgement, MalformedAnswer, RefusedAnswer, judge_messages, read_answer

ORDERS = ("forward", "backward")


@dataclass
class Asked:
    """
    A request: a conversation with the replies of all systems in an order, and what became of it.

    Args:
        conversation: the conversation.
        systems: the systems in the order of their replies.
        direction: one of `ORDERS`; the two requests of a conversation have opposite orders.
        outcome: `valid`, `refused`, `malformed` or `failed`.
        problem: why there is no judgement.
        judgements: {system: judgement}; empty unless the outcome is `valid`.
        rows: the saved rows of all answers, the last one last.
    """

    conversation: Conversation
    systems: list[str]
    direction: str
    outcome: str = "failed"
    problem: str = ""
    judgements: dict[str, Judgement] = field(default_factory=dict)
    rows: list[dict] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The id of the request."""
        return f"{self.conversation.id}/{self.direction}"

    def sample(self, attempt: int) -> dict:
        """The request as a sample of `write_replies`; a later attempt says what was wrong with the last answer."""
        messages = judge_messages(self.conversation, self.systems)
        if attempt:
            system, user = messages
            answered = {"role": "assistant", "content": self.rows[-1]["reply"] or "(nothing)"}
            # The clip stays in the last message, which is the one that an endpoint gets a clip of.
            *media, text = user["content"]
            again = {"type": "text", "text": AGAIN.format(problem=self.problem)}
            messages = [
                system,
                {"role": "user", "content": [text]},
                answered,
                {"role": "user", "content": [*media, again]},
            ]
        corpus, _, rest = self.conversation.id.partition("/")
        return {
            "prompt": messages,
            "reply": "",
            "emotion": None,
            "corpus": corpus,
            "dialogue_id": rest,
            "turn": self.direction,
        }

    def read(self, row: dict) -> None:
        """Read the answer in a saved row."""
        self.rows.append(row)
        if row.get("finish_reason") == "failed":
            self.outcome, self.problem = "failed", row.get("note", "")
            return
        reason, note = row.get("finish_reason"), row.get("note", "")
        if reason == "content_filter" or (not row["reply"] and "gave no text" in note and reason != "length"):
            self.outcome, self.problem = "refused", row.get("note", "")
            return
        try:
            found = read_answer(row["reply"], len(self.systems))
        except RefusedAnswer as error:
            self.outcome, self.problem = "refused", str(error)
        except MalformedAnswer as error:
            cut = " (it was cut off: raise --max_new_tokens)" if reason == "length" else ""
            self.outcome, self.problem = "malformed", f"{error}{cut}"
        else:
            self.outcome, self.problem = "valid", ""
            self.judgements = dict(zip(self.systems, found, strict=True))


def plan_requests(
    conversations: Sequence[Conversation], systems: Sequence[str], limit: int | None
) -> tuple[list[Asked], list[dict]]:
    """
    Plan two requests for each conversation, with the replies in opposite orders.

    The orders are the rows of a Williams square, in turn: over the conversations, each system is equally often in each
    place, and follows each other system equally often.

    Args:
        conversations: conversations with the replies of all systems.
        systems: the systems.
        limit: maximum number of conversations, chosen reproducibly; None for no limit.

    Returns:
        The requests, and the conversations left out: {"id", "reason"}.

    Raises:
        ValueError: if there are more systems than labels.
    """
    if len(systems) > len(LABELS):
        raise ValueError(f"There are {len(systems)} systems; a judge can compare {len(LABELS)} at once.")
    usable, left_out = [], []
    for each in sorted(conversations, key=lambda each: order_of(each.id)):
        reason = _why_not(each)
        if reason:
            left_out.append({"id": each.id, "reason": reason})
        else:
            usable.append(each)
    rows, requests = williams(len(systems)), []
    for number, conversation in enumerate(usable[:limit]):
        order = [systems[place] for place in rows[number % len(rows)]]
        requests.append(Asked(conversation, order, ORDERS[0]))
        requests.append(Asked(conversation, order[::-1], ORDERS[1]))
    return requests, left_out


def _why_not(conversation: Conversation) -> str | None:
    changed = changed_clip(conversation.prompt, list(conversation.rows.values()))
    if changed is not None:
        return f"its clip {changed} was replaced after the replies"
    messages = spoken(conversation.prompt)
    if messages and not media_of(messages[-1]) and has_lost_clip(messages[-1]):
        return "its clip was not saved with the replies; evaluate again with a larger --clips"
    return None


def ask(judge, requests: Sequence[Asked], folder: Path, *, attempts: int, seed: int, progress: bool) -> Counter:
    """
    Send the requests and read the answers; a malformed answer is asked for again. All prompts and answers are saved in
    FOLDER/NAME.jsonl, those of later attempts in FOLDER/NAME.again1.jsonl and so on; saved answers are not asked again.

    Args:
        judge: an `EndpointSystem`.
        requests: the requests; their outcomes are set.
        attempts: maximum number of answers to a request.

    Returns:
        The number of requests sent in each attempt.
    """
    name, waiting, sent = judge.name, list(requests), Counter()
    try:
        for attempt in range(attempts):
            if not waiting:
                break
            judge.name = f"{name}.again{attempt}" if attempt else name
            samples = [each.sample(attempt) for each in waiting]
            path = write_replies(judge, samples, folder, seed=seed + attempt, progress=progress)
            for each, row in zip(waiting, read_replies(path), strict=True):
                each.read(row)
            sent[attempt] = len(waiting)
            waiting = [each for each in waiting if each.outcome == "malformed"]
    finally:
        judge.name = name
    return sent
