"""
`empathic evaluate memory`: answer the questions of a benchmark about long conversations in several arms.

    empathic evaluate memory runs/quickstart/model locomo10.json --max_questions 50

Writes `memory.json`, `memory.md` and `answers.jsonl`. A run that was stopped continues: an answer is used again while
the model, the data and its settings are the same.
"""

import argparse
import json
import random
import statistics
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from tqdm import tqdm

from ...data_prep.counter.build import identity_of
from ...evaluation.results import held_table, versions, write_results
from ...files import fingerprint
from ...modeling_empathic import EmpathicForConditionalGeneration
from ...processing_empathic import EmpathicProcessor
from ..efficiency_report import number, table
from ..machine import describe_machine
from .arms import AFTER, BEFORE, SYSTEM, Answered, Arms, Settings, ask, read_choice, without_name
from .scoring import SCORES
from .sources import Benchmark, Conversation, Question, load_benchmark

OWN_VECTORS = "memory"  # the retriever that compares memory vectors
TITLES = {
    "full": "full text",
    "last": "last turns",
    "retrieval": "retrieved turns",
    "memory": "memory",
    "memory_retrieval": "memory + retrieved turns",
}
ALL = "all"


def choose(benchmark: Benchmark, count: int | None, seed: int) -> list[tuple[Conversation, list[Question]]]:
    """Choose questions at random, at most `count`, and return them by their conversations, in the file's order."""
    asked = [(c, question) for c in benchmark.conversations for question in c.questions]
    if count is not None and count < len(asked):
        places = sorted(random.Random(seed).sample(range(len(asked)), count))
        asked = [asked[place] for place in places]
    groups: dict[str, tuple[Conversation, list[Question]]] = {}
    for conversation, question in asked:
        groups.setdefault(conversation.id, (conversation, []))[1].append(question)
    return list(groups.values())


def sentence_embedder(name: str, device: str) -> Callable[[list[str]], torch.Tensor]:
    """Return a function that embeds texts with a model of sentence-transformers, each text once."""
    from sentence_transformers import SentenceTransformer

    model, known = SentenceTransformer(name, device=device), {}

    def embed(texts: list[str]) -> torch.Tensor:
        new = list(dict.fromkeys(text for text in texts if text not in known))
        if new:
            found = model.encode(new, convert_to_tensor=True, show_progress_bar=False).cpu()
            known.update(zip(new, found, strict=True))
        return torch.stack([known[text] for text in texts])

    return embed


class AnswerFile:
    """
    The answers so far, one JSON object a line. A line that a stopped run has left half written is ignored.

    Args:
        path: the file.
    """

    def __init__(self, path: Path):
        self.path, self._lines = path, {}
        for text in path.read_text(encoding="utf-8").split("\n") if path.is_file() else []:
            try:
                line = json.loads(text)
            except ValueError:
                continue
            self._lines[line["arm"], line["question_id"], line["key"]] = line

    def find(self, arm: str, question_id: str, key: str) -> dict | None:
        """Return the answer that was given with these settings, or None."""
        return self._lines.get((arm, question_id, key))

    def add(self, line: dict) -> None:
        """Append an answer."""
        self._lines[line["arm"], line["question_id"], line["key"]] = line
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")

    def keep(self, lines: list[dict]) -> None:
        """Replace the file by these answers."""
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        partial = self.path.with_suffix(".part")
        partial.write_text(text, encoding="utf-8")
        partial.replace(self.path)


def summarize(lines: list[dict]) -> dict:
    """
    Compute the figures of an arm from its answers.

    Returns:
        `f1`, `evidence_recall` and `questions` by category and for `all`; the mean `positions`, `new_positions`,
        `seconds` and `held_bytes` of a question, and the mean `reading_seconds` of a conversation. The recall of a
        category whose questions name no evidence is None.
    """
    by_category: dict[str, list[dict]] = {ALL: lines}
    for line in lines:
        by_category.setdefault(line["category"], []).append(line)
    found: dict = {"f1": {}, "evidence_recall": {}, "questions": {}}
    for category, part in sorted(by_category.items()):
        recalls = [line["evidence_recall"] for line in part if line["evidence_recall"] is not None]
        found["f1"][category] = statistics.mean(line["score"] for line in part)
        found["evidence_recall"][category] = statistics.mean(recalls) if recalls else None
        found["questions"][category] = len(part)
    for name in ("positions", "new_positions", "seconds", "held_bytes"):
        found[name] = statistics.mean(line[name] for line in lines)
    reading = {line["conversation"]: line["reading_seconds"] for line in lines}
    return {**found, "reading_seconds": statistics.mean(reading.values())}


def markdown(results: dict) -> str:
    """Format the results as tables."""
    arms, categories = results["arms"], sorted(next(iter(results["arms"].values()))["questions"])
    counts = next(iter(arms.values()))["questions"]
    columns = [ALL, *(category for category in categories if category != ALL)]
    header = ["arm", *(f"{category} ({counts[category]})" for category in columns)]

    def rows(name: str) -> list[list[str]]:
        values = {arm: [row[name][category] for category in columns] for arm, row in arms.items()}
        return [[TITLES[arm], *("" if v is None else f"{v:.3f}" for v in row)] for arm, row in values.items()]

    costs = [
        [
            TITLES[arm],
            number(row["positions"]),
            number(row["new_positions"]),
            number(row["seconds"]),
            number(row["reading_seconds"]),
            number(row["held_bytes"] / 2**20),
        ]
        for arm, row in arms.items()
    ]
    cost_header = ["arm", "prompt positions", "processed for a question", "seconds a question"]
    cost_header += ["seconds to read a conversation", "held, MiB"]
    asked = f"{counts[ALL]} of {results['all_questions']} questions about {results['conversations']} conversations"
    lines = [
        "# Questions about long conversations",
        f"{results['model']} on {results['data']} ({results['benchmark']}): {asked}. "
        f"Retrieval: {results['retriever']}.",
        f"F1 as the benchmark defines it, by category (questions):\n\n{table(header, rows('f1'))}",
        "Share of the evidence that is in the prompt, as text or as vectors:\n\n"
        + table(header, rows("evidence_recall")),
        f"Costs:\n\n{table(cost_header, costs)}",
        "*Held* are the keys and values of the prompt, the memory vectors and the state of the memory encoder. What "
        "does not depend on the question is processed once for a conversation.",
    ]
    if results["left_out"]:
        items = "\n".join(f"- {item}: {reason}" for item, reason in results["left_out"])
        lines.append(f"Left out, or without a part of their evidence:\n\n{items}")
    return "\n\n".join(lines) + "\n"


def run(options: argparse.Namespace) -> dict:
    """Evaluate a checkpoint with command-line options; write the files and return the results."""
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    benchmark = load_benchmark(options.data, options.corrections)
    settings = Settings(
        options.last, options.top_k, options.max_new_tokens, options.max_positions, options.max_memories
    )
    with held_table(options.output, "memory"):
        return _answer_all(options, benchmark, settings, device)


def _answer_all(options: argparse.Namespace, benchmark: Benchmark, settings: Settings, device: str) -> dict:
    about = {
        "model": identity_of(options.model),
        "settings": asdict(settings),
        "retriever": options.retriever,
        "dtype": options.dtype,
        "prompt": [SYSTEM, BEFORE, AFTER],
    }
    model = EmpathicForConditionalGeneration.from_pretrained(options.model, dtype=options.dtype).to(device).eval()
    processor = EmpathicProcessor.from_pretrained(options.model)
    embed = None
    if options.retriever != OWN_VECTORS and any("retrieval" in arm for arm in options.arms):
        embed = sentence_embedder(options.retriever, device)
    chosen = choose(benchmark, options.max_questions, options.seed)
    file = AnswerFile(Path(options.output) / "answers.jsonl")
    total = len(options.arms) * sum(len(questions) for _, questions in chosen)
    used: dict[str, list[dict]] = {arm: [] for arm in options.arms}
    with tqdm(total=total, desc="answers") as bar:
        for conversation, questions in chosen:
            asked = {question.id: ask(benchmark.name, question) for question in questions}
            every = [ask(benchmark.name, question)[0] for question in conversation.questions]
            arms = Arms(model, processor, conversation.said, every, settings, embed)
            key = fingerprint([about, [asdict(said) for said in conversation.said]])
            for arm in options.arms:
                keys = {question.id: fingerprint([key, asked[question.id][0]]) for question in questions}
                missing = [question for question in questions if file.find(arm, question.id, keys[question.id]) is None]
                for start in range(0, len(missing), options.batch_size):
                    batch = missing[start : start + options.batch_size]
                    answered = arms.answer(arm, [asked[question.id][0] for question in batch])
                    for question, answer in zip(batch, answered, strict=True):
                        line = _line(arms, arm, conversation, question, asked[question.id], answer)
                        file.add({"arm": arm, "key": keys[question.id], "batch": len(batch), **line})
                        bar.update()
                bar.update(len(questions) - len(missing))
                for question in questions:
                    line = file.find(arm, question.id, keys[question.id])
                    assert line is not None
                    # The key of an answer may have been corrected since.
                    line["score"] = SCORES[benchmark.name](question, line["hypothesis"])
                    line["answer"] = question.answer
                    line["evidence_recall"] = _recall(question, set(line["shown_evidence"]))
                    used[arm].append(line)
    file.keep([line for lines in used.values() for line in lines])
    results = {
        "model": options.model,
        "data": str(options.data),
        "benchmark": benchmark.name,
        "corrections": options.corrections,
        "retriever": "the memory's own vectors" if options.retriever == OWN_VECTORS else options.retriever,
        "conversations": len(chosen),
        "all_questions": sum(len(conversation.questions) for conversation in benchmark.conversations),
        "arms": {arm: summarize(lines) for arm, lines in used.items()},
        "left_out": benchmark.left_out,
        "settings": {**asdict(settings), "dtype": options.dtype, "seed": options.seed, "questions": total},
        "machine": describe_machine(device),
        "versions": versions(),
    }
    folder = Path(options.output)
    write_results(folder / "memory.json", results)
    (folder / "memory.md").write_text(markdown(results), encoding="utf-8")
    return results


def _line(
    arms: Arms, arm: str, conversation: Conversation, question: Question, asked: tuple[str, dict], answered: Answered
) -> dict:
    """The line of the file for an answer, without its key."""
    text, choices = asked
    hypothesis = without_name(answered.text, {said.name for said in conversation.said})
    return {
        "conversation": conversation.id,
        "question_id": question.id,
        "category": question.category,
        "question": text,
        "hypothesis": read_choice(hypothesis, choices),
        # Whether the evidence of other keys was there can be told as well.
        "shown_evidence": sorted(set(_all_evidence(conversation)) & answered.shown),
        "positions": answered.positions,
        "new_positions": answered.new_positions,
        "seconds": answered.seconds,
        "held_bytes": answered.held_bytes,
        "reading_seconds": arms.reading_seconds[arm],
    }


def _all_evidence(conversation: Conversation) -> list[str]:
    return [one for question in conversation.questions for one in question.evidence]


def _recall(question: Question, shown: set[str]) -> float | None:
    """The share of a question's evidence that was in the prompt; None without evidence."""
    if not question.evidence:
        return None
    return sum(one in shown for one in question.evidence) / len(question.evidence)
