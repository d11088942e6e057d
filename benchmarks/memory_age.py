"""
What the memory still knows: whether a fact is recalled, against its age in utterances.

    python -m empathic.benchmarks.memory_age runs/quickstart/model --ages 1 5 21 101 --budget 16 --recall 2

In each conversation a user tells a fact, other things are said, and then the user asks for it. Sentences are those of
the tiny preset's grammar, with facts that no model of the preset was trained on; the other things said have nothing in
common with the fact. A fact counts as recalled if the reply has the word that was asked for.

| way | the prompt has |
|---|---|
| `no limit` | the memory vectors of all utterances |
| `dropped` | the newest vectors within the budget, as with `max_memories` |
| `merged` | as many vectors: the newest half of the budget as they are, the older ones averaged in groups |
| `recalled` | the vectors within the budget, and the most similar utterances as text (`recall`) |
"""

import argparse
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ..chat import ChatSession, PromptWriter
from ..data_prep.messages import message_text
from ..evaluation.metrics import words_of
from ..evaluation.results import write_results
from ..modeling_empathic import EmpathicForConditionalGeneration
from ..processing_empathic import EmpathicProcessor
from ..sampling import plain_decoding
from ..thoughts import WrittenDecoder
from ..tiny.dialogues import ASSISTANT, PAIRS, make_dialogues
from .efficiency_options import positive
from .efficiency_report import table
from .machine import describe_machine

WAYS = ("no limit", "dropped", "merged", "recalled")
ONE_OF_A_KIND = ("name", "job")  # a person has one; a second one would contradict the first


def _values(context: dict) -> set[str]:
    return {context[slot] for slot in (*PAIRS[context["kind"]], "verb") if slot in context}


def _message(turn: dict) -> dict:
    return {"role": "assistant" if turn["speaker"] == ASSISTANT else "user", "content": turn["text"]}


def facts(count: int, seed: int = 0) -> Iterator[tuple[list[dict], dict, str, list[dict]]]:
    """
    Make conversations about a fact.

    Yields:
        the messages that tell it (the user's, and the reply), the turn that asks for it, the word that the reply should
        have, and an endless supply of other messages as a list of about a thousand.
    """
    rng, dialogues = random.Random(seed), make_dialogues(4 * count + 400, seed=1000 + seed, split="test")
    made = 0
    for dialogue in dialogues:
        for place, turn in enumerate(dialogue[:-1]):
            context = turn["context"]
            if turn["speaker"] == ASSISTANT or context["recall"] is None or made == count:
                continue
            told = [
                i for i, other in enumerate(dialogue[:place:2])
                if other["context"]["recall"] is None and _values(other["context"]) == _values(context)
            ]  # fmt: skip
            [answer] = dialogue[place + 1]["recall"]
            if not told or answer not in words_of(dialogue[2 * told[0]]["text"]) or answer in words_of(turn["text"]):
                continue
            others = []
            for other in rng.sample(dialogues, len(dialogues)):
                about = [each["context"] for each in other[::2]]
                if any(_values(each) & _values(context) for each in about):
                    continue
                if context["kind"] in ONE_OF_A_KIND and any(each["kind"] == context["kind"] for each in about):
                    continue
                others += [_message(each) for each in other]
                if len(others) > 1000:
                    break
            start = 2 * told[0]
            yield [_message(each) for each in dialogue[start : start + 2]], _message(turn), answer, others
            made += 1


def merge_oldest(vectors: torch.Tensor, budget: int) -> torch.Tensor:
    """
    Reduce memory vectors (n, width) to `budget`: the newest half of the budget stays, the older vectors are averaged in
    consecutive groups, scaled to the length that the vectors have on average.
    """
    if len(vectors) <= budget:
        return vectors
    kept = max(1, budget // 2)
    groups = vectors[:-kept].tensor_split(max(1, budget - kept))
    means = torch.stack([group.mean(0) for group in groups])
    scale = vectors.norm(dim=-1).mean() / means.norm(dim=-1, keepdim=True).clamp(min=1e-8)
    return torch.cat([means * scale, vectors[-kept:]])[-budget:]


@torch.inference_mode()
def reply_in(way: str, model, processor, messages: list[dict], turn: dict, budget: int, recall: int) -> str:
    """Reply to a turn after messages, with the memory of one of `WAYS`."""
    text = message_text(turn)
    if way != "merged":
        options: dict[str, Any] = {} if way == "no limit" else {"max_memories": budget}
        session = ChatSession(model, processor, recall=recall if way == "recalled" else 0, **options)
        session.remember(*messages)
        return session.reply(text, do_sample=False, max_new_tokens=32)
    session = ChatSession(model, processor)
    session.remember(*messages)
    vectors = merge_oldest(session.vectors, budget)
    writer = PromptWriter(processor, model.config.memory_token_id)
    sample = writer.write(None, messages, {"role": "user", "content": text}, len(vectors))
    inputs = processor.pad([{**sample, "memory_input_ids": []}]).to(model.device)
    output = model.generate(**inputs, memory_vectors=vectors[None], **plain_decoding(max_new_tokens=32))
    return WrittenDecoder(processor.tokenizer)(output[0, inputs["input_ids"].shape[1] :].tolist()).reply


def measure(model, processor, ages: list[int], samples: int, budget: int, recall: int, seed: int = 0) -> dict:
    """
    Measure the share of facts that are recalled.

    Args:
        ages: numbers of utterances between the fact and the question, the first reply included.
        samples: number of facts.
        budget: maximum number of memory vectors in all ways but `no limit`.
        recall: utterances as text in the way `recalled`.

    Returns:
        {way: {age: share of facts}}.
    """
    cases = list(facts(samples, seed))
    hits = {way: dict.fromkeys(ages, 0) for way in WAYS}
    with tqdm(total=len(WAYS) * len(ages) * len(cases), desc="facts") as bar:
        for told, turn, answer, others in cases:
            for age in ages:
                messages = [told[0], *[*told[1:], *others][:age]]
                for way in WAYS:
                    reply = reply_in(way, model, processor, messages, turn, budget, recall)
                    hits[way][age] += answer in words_of(reply)
                    bar.update()
    return {way: {str(age): found / len(cases) for age, found in row.items()} for way, row in hits.items()}


def plot(results: dict, path: Path) -> None:
    """Draw the shares against the age."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    for (way, row), marker in zip(results["recalled"].items(), "os^D", strict=True):
        axes.plot(list(map(int, row)), list(row.values()), marker=marker, label=way)
    ages = list(map(int, next(iter(results["recalled"].values()))))
    axes.set(xscale="log", ylim=(0, 1.02), xlabel="age of the fact (utterances)", ylabel="share of facts recalled")
    axes.set_xticks(ages, labels=[f"{age:,}" for age in ages])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(title=f"budget {results['budget']} vectors")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m empathic.benchmarks.memory_age",
        description="Whether a fact is recalled, against its age.",
        epilog="example:\n  python -m empathic.benchmarks.memory_age runs/quickstart/model --ages 1 5 21 --samples 20",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="MODEL", help="whole checkpoint, stage's folder or Hub id")
    parser.add_argument(
        "--ages", type=positive, nargs="+", default=[1, 5, 11, 21, 51, 101], metavar="N",
        help="utterances between a fact and its question (default: 1 5 11 21 51 101)",
    )  # fmt: skip
    parser.add_argument("--samples", type=positive, default=100, metavar="N", help="number of facts (%(default)s)")
    parser.add_argument("--budget", type=positive, default=16, metavar="N", help="memory vectors (%(default)s)")
    parser.add_argument("--recall", type=positive, default=2, metavar="N", help="utterances as text (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the facts (%(default)s)")
    parser.add_argument(
        "--output", default="runs/benchmarks/memory_age", metavar="FOLDER", help="folder to write (%(default)s)"
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> dict:
    """Measure, print and write the results; return them."""
    options = parse(argv)
    model = EmpathicForConditionalGeneration.from_pretrained(options.model).eval()
    processor = EmpathicProcessor.from_pretrained(options.model)
    ages = sorted(set(options.ages))
    found = measure(model, processor, ages, options.samples, options.budget, options.recall, options.seed)
    results = {**vars(options), "recalled": found, "machine": describe_machine()}
    folder = Path(options.output)
    write_results(folder / "memory_age.json", results)
    plot(results, folder / "memory_age.png")
    rows = [[way, *(f"{row[str(age)]:.2f}" for age in ages)] for way, row in found.items()]
    text = table(["recalled, by age in utterances", *map(str, ages)], rows)
    (folder / "memory_age.md").write_text(text + "\n", encoding="utf-8")
    print(text)
    print(f"All results are in {folder}.", file=sys.stderr)
    return results


if __name__ == "__main__":
    main()
