"""The options of the efficiency benchmark. `empathic evaluate efficiency` shares them without importing torch."""

import argparse

PRESETS = ("tiny", "qwen2.5-0.5b", "qwen2.5-7b")
HISTORY_LENGTHS = (1, 10, 50, 200, 1000)
# Tokens of an utterance. As text an utterance takes five more positions, for its role and its turn markers. So 20
# utterances of 25 tokens take 600 positions; in the paper the whole prompt, system prompt included, took 606.
UTTERANCE, PAPER_UTTERANCE = 25, 20


def positive(text: str) -> int:
    """Parse an integer from 1 up."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is less than 1; give a number from 1 up")
    return number


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options to a parser."""
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--model", metavar="PATH", help="whole checkpoint, stage's folder or Hub id")
    source.add_argument(
        "--preset", choices=PRESETS, default="tiny", help="without --model: random weights of these sizes (%(default)s)"
    )
    parser.add_argument(
        "--turns", type=positive, nargs="+", default=list(HISTORY_LENGTHS), metavar="N",
        help=f"numbers of utterances in the history (default: {' '.join(map(str, HISTORY_LENGTHS))})",
    )  # fmt: skip
    parser.add_argument(
        "--utterance", type=positive, metavar="TOKENS",
        help=f"tokens of an utterance (default: {UTTERANCE}; with --paper {PAPER_UTTERANCE})",
    )  # fmt: skip
    parser.add_argument(
        "--memory_tokens", type=positive, default=1, metavar="N",
        help="of a preset: memory vectors of an utterance (%(default)s); a checkpoint has its own",
    )  # fmt: skip
    parser.add_argument(
        "--memory_rate", type=positive, metavar="TOKENS",
        help="of a preset: one memory vector for every so many tokens of an utterance",
    )  # fmt: skip
    parser.add_argument(
        "--reply", type=positive, default=20, metavar="TOKENS", help="tokens of a whole turn's reply (%(default)s)"
    )
    parser.add_argument("--repeats", type=positive, default=5, help="timed runs of each arm, alternating (%(default)s)")
    parser.add_argument(
        "--paper", action="store_true",
        help="use Table 3's setting instead: dialogues of 20 or more utterances, no reply, with the published figures",
    )  # fmt: skip
    parser.add_argument("--data", metavar="DATA", help="with --paper: a prepared data set for the dialogues")
    parser.add_argument("--split", default="test", help="split of --data (%(default)s)")
    parser.add_argument("--dialogues", type=positive, default=8, help="with --paper: number of dialogues (%(default)s)")
    parser.add_argument(
        "--ratios", action=argparse.BooleanOptionalAction, default=True,
        help="also measure the scan and whole turns (default: --ratios)",
    )  # fmt: skip
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: a GPU if there is one")
    parser.add_argument(
        "--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="auto: bfloat16 on a GPU, else float32"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights and the dialogues (%(default)s)")
    parser.add_argument("--plan", action="store_true", help="only print sizes and positions")
    parser.add_argument(
        "--output", default="runs/benchmarks/efficiency", metavar="FOLDER",
        help="folder for efficiency.json, efficiency.md and the plots (%(default)s)",
    )  # fmt: skip
