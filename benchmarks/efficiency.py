"""
Table 3: the cost of a conversation's history as text, as text with a cached prefix, compressed, and streaming.

    python -m empathic.benchmarks.efficiency --preset tiny
    python -m empathic.benchmarks.efficiency --preset qwen2.5-7b --paper

The report has, by the number of earlier utterances, the input positions, time and memory of processing a prompt without
a reply. It also has ratios from the same run: the memory encoder's scan against transformers' default path, and whole
turns of a session. `--paper` uses dialogues of 20 or more utterances, as in the paper. Full-size presets have random
weights; without a GPU the benchmark only prints their sizes and positions.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

import torch
from transformers.utils import logging

from ..data_prep.messages import message_text
from .efficiency_arms import (
    ARMS,
    checkpoint_parts,
    count_positions,
    count_vectors,
    make_conversation,
    measure_arms,
    preset_parts,
)
from .efficiency_options import PAPER_UTTERANCE, UTTERANCE, add_options
from .efficiency_report import markdown, plot
from .efficiency_turns import measure_turns
from .machine import describe_machine
from .memory_plan import weight_bytes
from .scan import measure_scan

TURN_PAIR = (10, 200)  # number of utterances before the two compared turns
SCAN_LENGTHS = (128, 512)
SCAN_REPEATS = 3  # maximum repeats: the default path takes seconds, and the difference is large
PAPER_POSITIONS = 600  # positions of the history as text at which positions are compared
PAPER_TURNS = range(20, 24)  # utterances of the history in synthetic dialogues of the paper's setting


def row(what: str, measured: float, bound: str = "", wanted: float | None = None) -> dict:
    """Return a row of the ratios; `bound` is >= or <=."""
    holds = None if wanted is None else measured >= wanted if bound == ">=" else measured <= wanted
    return {"what": what, "measured": measured, "bound": bound, "wanted": wanted, "holds": holds}


def position_rows(processor, tokens: int, seed: int) -> list[dict]:
    """Ratios of positions at the paper's history length; their bounds are those of one vector per utterance."""
    is_papers = (processor.memory_tokens, processor.memory_rate) == (1, None)
    turns = range(2, 200)
    one = count_positions(processor, make_conversation(processor, 20, tokens, seed))["text"]["history"] / 20
    nearest = min(turns, key=lambda count: abs(count * one - PAPER_POSITIONS))
    counts = count_positions(processor, make_conversation(processor, nearest, tokens, seed))
    text, memory = counts["text"], counts["memory"]
    where = f"at {nearest} utterances, {text['history']} positions of text"
    return [
        row(
            f"input positions without media, with the system prompt, {memory['whole']} / {text['whole']}, {where} "
            "(paper: 0.184)",
            memory["whole"] / text["whole"],
            *(("<=", 0.20) if is_papers else ()),
        ),
        row(f"history positions alone, {memory['history']} / {text['history']}",
            memory["history"] / text["history"], *(("<=", 0.06) if is_papers else ())),
        row(f"input positions with media, {memory['with_media']} / {text['with_media']}",
            memory["with_media"] / text["with_media"]),
    ]  # fmt: skip


def scan_rows(scan: dict) -> list[dict]:
    """Ratios of the scan to transformers' default path."""
    short, long = (str(length) for length in SCAN_LENGTHS)
    encoder, alone, rows = scan["encoder"], scan["scan"], []
    for length, wanted in ((short, 5.0), (long, 20.0)):
        what = f"encoder of one layer, forward + backward, length {length}: speedup over transformers' default"
        rows.append(row(what, encoder[length]["speedup"], ">=", wanted))
    rows.append(row(f"encoder of one layer, length {long}: peak memory / default", encoder[long]["memory"], "<=", 0.35))
    rows += [row(f"scan alone, length {length}: speedup", alone[length]["speedup"]) for length in alone]
    return [*rows, row(f"scan alone, length {long}: peak memory / default", alone[long]["memory"])]


def turn_rows(turns: dict, arms: dict, reply: int) -> list[dict]:
    """Ratios of a late streaming turn to an early turn, and to encoding the history again."""
    early, late = TURN_PAIR
    streaming, compressed = arms["streaming"]["seconds"], arms["compressed"]["seconds"]
    return [
        row(f"whole streaming turn at {late} utterances / at {early} utterances",
            turns[late]["streaming"] / turns[early]["streaming"], "<=", 1.5),
        row(f"prompt of a streaming turn at {late} utterances / encoding the whole history again (compressed)",
            streaming / compressed, "<=", 0.05),
        row("memory encoder alone: the last two utterances / the whole history",
            turns[late]["reading"] / turns[late]["encoding"]),
        row(f"whole streaming turn with a reply of {reply} tokens / turn of a new session",
            turns[late]["streaming"] / turns[late]["anew"]),
        row(f"whole streaming turn at {late} utterances with a reply of {reply} tokens / the language model alone over "
            "the same positions", turns[late]["streaming"] / turns[late]["model"]),
    ]  # fmt: skip


def paper_conversations(options: argparse.Namespace, processor) -> tuple[list[list[dict]], str]:
    """Return conversations with 20 or more utterances before the turn, and a description of them."""
    if options.data is None:
        counts = [PAPER_TURNS[i % len(PAPER_TURNS)] for i in range(options.dialogues)]
        made = [
            make_conversation(processor, count, options.utterance, options.seed + place)
            for place, count in enumerate(counts)
        ]
        return made, (
            f"{len(made)} synthetic dialogues with {PAPER_TURNS[0]} to {PAPER_TURNS[-1]} utterances before the turn, "
            f"{options.utterance} tokens each: with the default, a prompt is about as long as the paper's."
        )
    from datasets import load_dataset

    from ..data_prep.views import dialogue_samples

    found = []
    columns = ["corpus", "split", "dialogue_id", "turn", "utterance_id", "speaker", "text", "emotion"]
    rows = load_dataset(options.data, split=options.split).select_columns(columns)
    for sample in dialogue_samples({**line, "audio": None, "video": None} for line in rows):
        if len(sample["prompt"]) > PAPER_TURNS[0] and len(found) < options.dialogues:
            found.append([{**m, "content": message_text(m)} for m in sample["prompt"]])
    if not found:
        raise SystemExit(
            f"{options.data}, split {options.split}: no turn has {PAPER_TURNS[0]} utterances before it. "
            "Give a data set with longer dialogues, or remove --data."
        )
    return found, f"{len(found)} turns of {options.data}, split {options.split}, after {PAPER_TURNS[0]}+ utterances."


def measure_paper(model, processor, options: argparse.Namespace) -> dict:
    """Measure all arms and average over the dialogues (Sec. 5.5)."""
    conversations, about = paper_conversations(options, processor)
    found = [measure_arms(model, processor, messages, options.repeats) for messages in conversations]
    weights = weight_bytes(model)
    keys = ("positions", "new_positions", "memory_tokens", "seconds", "peak_bytes", "peak_bytes_all_logits")
    means = {arm: {key: statistics.mean(entry[arm][key] for entry in found) for key in keys} for arm in ARMS}
    for values in means.values():
        values["total_bytes"] = weights + values["peak_bytes"]
        values["total_bytes_all_logits"] = weights + values["peak_bytes_all_logits"]
    positions = [count_positions(processor, messages) for messages in conversations]
    media = {kind: statistics.mean(counts[kind]["with_media"] for counts in positions) for kind in ("text", "memory")}
    about += (
        f" With media a prompt has {media['text']:.1f} positions as text and {media['memory']:.1f} compressed. The "
        "paper does not say whether its memory includes the logits of all positions. Its times and sizes come from "
        "another machine and other dialogues, so compare only the changes. BERTScore needs replies and is left out."
    )
    return {"about": about, "dialogues": len(found), "means": means, "with_media": media, "weight_bytes": weights}


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m empathic.benchmarks.efficiency",
        description="Table 3: the cost of a conversation's history.",
        epilog="example:\n  python -m empathic.benchmarks.efficiency --preset tiny --turns 1 10 200",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_options(parser)
    return parser.parse_args(argv)


def settle(options: argparse.Namespace) -> argparse.Namespace:
    """Fill in defaults that depend on other options and on the machine."""
    options.utterance = options.utterance or (PAPER_UTTERANCE if options.paper else UTTERANCE)
    has_gpu = torch.cuda.is_available()
    if options.device == "cuda" and not has_gpu:
        raise SystemExit("--device cuda: there is no GPU here. Remove it to print the plan, or give --device cpu.")
    is_large = options.model is None and options.preset != "tiny"
    if is_large and options.device == "auto" and not has_gpu:
        options.plan = True
    if options.device == "auto":
        options.device = "cuda" if has_gpu else "cpu"
    if options.dtype == "auto":
        options.dtype = "bfloat16" if options.device == "cuda" or options.plan else "float32"
    options.turns = sorted(set(options.turns))
    if options.model is not None and (options.memory_tokens, options.memory_rate) != (1, None):
        raise SystemExit("--memory_tokens and --memory_rate: a checkpoint has its own. Remove them, or --model.")
    return options


def describe_plan(model, processor, options: argparse.Namespace) -> str:
    """Describe the sizes of a model that is not measured."""
    text = model.config.text_config
    width = 2 if options.dtype == "bfloat16" else 4
    head = text.hidden_size // text.num_attention_heads
    cache = 2 * width * head * text.num_key_value_heads * text.num_hidden_layers
    return (
        f"Nothing was measured. The weights take {weight_bytes(model) / 1e9:.2f} GB in {options.dtype}; each "
        f"position takes {cache / 1024:.1f} KiB in the KV cache, and {width * text.vocab_size / 1024:.0f} KiB if "
        "the logits of all positions are computed."
    )


def run(options: argparse.Namespace) -> dict:
    """Measure, print and write the results; return them."""
    options = settle(options)
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    torch.manual_seed(options.seed)
    dtype, device = getattr(torch, options.dtype), "meta" if options.plan else options.device
    if options.model is None:
        size = options.memory_tokens, options.memory_rate
        model, processor = preset_parts(options.preset, dtype, device, *size)
        name = f"Preset {options.preset}, random weights"
    else:
        model, processor = checkpoint_parts(options.model, dtype, device)
        name = str(options.model)
    vectors = count_vectors(processor, make_conversation(processor, 100, options.utterance, options.seed))
    results = {
        "command": f"python -m empathic.benchmarks.efficiency {' '.join(as_arguments(options))}".strip(),
        "name": name,
        "settings": {key: value for key, value in vars(options).items() if key not in ("run", "command", "table")},
        "text": f"An utterance has {options.utterance} tokens of the language model and {vectors['vectors']:.3g} "
        f"memory vector{'s' * (vectors['vectors'] != 1)}, one for {vectors['tokens']:.3g} tokens.",
        "memory": {"memory_tokens": processor.memory_tokens, "memory_rate": processor.memory_rate, **vectors},
        "machine": describe_machine(options.device),
        "histories": {},
    }
    if options.plan:
        results["not_measured"] = describe_plan(model, processor, options)
    if options.paper and not options.plan:
        results["paper"] = measure_paper(model, processor, options)
    if options.plan or not options.paper:
        late = TURN_PAIR[1]
        lengths = options.turns if options.plan or not options.ratios else sorted({*options.turns, late})
        lengths = list(PAPER_TURNS) if options.paper else lengths
        for turns in lengths:
            messages = make_conversation(processor, turns, options.utterance, options.seed)
            arms = None if options.plan else measure_arms(model, processor, messages, options.repeats)
            entry = {"positions": count_positions(processor, messages), "arms": arms}
            results["histories"][str(turns)] = entry
            print(f"{turns} utterances: done", file=sys.stderr, flush=True)
        results["ratios"] = position_rows(processor, options.utterance, options.seed)
        if options.ratios and not options.plan:
            pair = {n: make_conversation(processor, n, options.utterance, options.seed) for n in TURN_PAIR}
            whole = measure_turns(model, processor, pair, options.reply, options.repeats)
            results["scan"] = measure_scan(min(options.repeats, SCAN_REPEATS), lengths=SCAN_LENGTHS)
            results["turns"] = {str(turns): values for turns, values in whole.items()}
            more = turn_rows(whole, results["histories"][str(late)]["arms"], options.reply)
            results["ratios"] = [*scan_rows(results["scan"]), *more, *results["ratios"]]
    folder = Path(options.output)
    folder.mkdir(parents=True, exist_ok=True)
    report = markdown(results, plot(results, folder))
    (folder / "efficiency.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    (folder / "efficiency.md").write_text(report, encoding="utf-8")
    print(report)
    print(f"All results are in {folder}.")
    return results


def as_arguments(options: argparse.Namespace) -> list[str]:
    """The options that affect the results, as command-line arguments."""
    given = ["--model", str(options.model)] if options.model else ["--preset", options.preset]
    given += [] if options.memory_tokens == 1 else ["--memory_tokens", str(options.memory_tokens)]
    given += [] if options.memory_rate is None else ["--memory_rate", str(options.memory_rate)]
    given += ["--paper"] if options.paper else ["--turns", *map(str, options.turns)]
    given += ["--data", options.data, "--split", options.split] if options.data else []
    given += ["--dialogues", str(options.dialogues)] if options.paper else ["--reply", str(options.reply)]
    given += [] if options.ratios else ["--no-ratios"]
    for name in ("utterance", "repeats", "seed", "device", "dtype"):
        given += [f"--{name}", str(getattr(options, name))]
    return given


def main(argv: list[str] | None = None) -> dict:
    """Run the benchmark with command-line arguments."""
    return run(parse(argv))


if __name__ == "__main__":
    main()
