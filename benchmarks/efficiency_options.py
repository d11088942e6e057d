"""The options of the efficiency benchmark, apart from what it imports: `empathic evaluate efficiency` has them too."""

import argparse

PRESETS = ("tiny", "qwen2.5-0.5b", "qwen2.5-7b")
HISTORIES = (1, 10, 50, 200, 1000)
# Tokens of an utterance. As text it takes five positions more: of its role and its ends. So 20 utterances of 25 take
# 600 positions; in the paper's setting the whole prompt, system prompt included, took 606.
UTTERANCE, PAPER_UTTERANCE = 25, 20


def positive(text: str) -> int:
    """An integer from 1 up."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is less than 1")
    return number


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--model", metavar="PATH", help="whole checkpoint, stage's folder or Hub id")
    source.add_argument(
        "--preset", choices=PRESETS, default="tiny", help="without --model: random weights of these sizes (%(default)s)"
    )
    parser.add_argument(
        "--turns", type=positive, nargs="+", default=list(HISTORIES), metavar="N",
        help=f"utterances in the history (default: {' '.join(map(str, HISTORIES))})",
    )  # fmt: skip
    parser.add_argument(
        "--utterance", type=positive, metavar="TOKENS",
        help=f"tokens of an utterance (default: {UTTERANCE}; with --paper {PAPER_UTTERANCE})",
    )  # fmt: skip
    parser.add_argument("--reply", type=positive, default=20, metavar="TOKENS", help="of a whole turn (%(default)s)")
    parser.add_argument("--repeats", type=positive, default=5, help="timed runs of each, alternating (%(default)s)")
    parser.add_argument(
        "--paper", action="store_true",
        help="Table 3's setting instead: dialogues of 20 and more utterances, no reply, beside the published figures",
    )  # fmt: skip
    parser.add_argument("--data", metavar="DATA", help="with --paper: a prepared data set, instead of made dialogues")
    parser.add_argument("--split", default="test", help="of --data (%(default)s)")
    parser.add_argument("--dialogues", type=positive, default=8, help="with --paper: how many (%(default)s)")
    parser.add_argument(
        "--ratios", action=argparse.BooleanOptionalAction, default=True,
        help="whether to measure the scan and whole turns as well (default: --ratios)",
    )  # fmt: skip
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: a GPU if there is one")
    parser.add_argument(
        "--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="auto: bfloat16 on a GPU, else float32"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the dialogues (%(default)s)")
    parser.add_argument("--plan", action="store_true", help="print sizes and positions only")
    parser.add_argument(
        "--output", default="runs/benchmarks/efficiency", metavar="FOLDER",
        help="for efficiency.json, efficiency.md and the plots (%(default)s)",
    )  # fmt: skip
