"""The options of `empathic evaluate dialogue`, `ablation` and `emotion`."""

import argparse

DTYPES = ("auto", "float32", "bfloat16", "float16")
CLIPS = 200  # samples whose clips are kept
METRICS = ("bertscore", "emotion_score", "dist1", "corpus_dist1", "bleu1", "bleu4")


def not_negative(text: str) -> int:
    """A whole number from 0 up."""
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{value} is below 0")
    return value


def positive(text: str) -> int:
    """A whole number from 1 up."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is below 1")
    return value


def add_generation_options(parser: argparse.ArgumentParser) -> None:
    """How replies are made and where."""
    add = parser.add_argument
    add("--split", default="test", help="of DATA, one that was not trained on (%(default)s)")
    add("--max_samples", type=positive, metavar="N", help="only the first so many")
    add("--batch_size", type=positive, default=16, metavar="N", help="replies made at once (%(default)s)")
    add("--seed", type=int, default=0, help="of sampling and of the intervals (%(default)s)")
    add("--confidence", type=float, default=0.95, help="of the intervals (%(default)s)")
    add("--resamples", type=int, default=10000, metavar="N", help="draws of the intervals and tests (%(default)s)")
    add("--device", help="such as cpu or cuda:0; a GPU if there is one by default")
    add("--dtype", choices=DTYPES, default="auto", help="of the weights (%(default)s: as they were saved)")
    add("--accelerate_config", metavar="FILE", help="of `accelerate launch`, to use several processes")


def add_dialogue_options(parser: argparse.ArgumentParser) -> None:
    """Of Tables 1 and 2."""
    add = parser.add_argument
    add("--data", nargs="+", required=True, metavar="DATA", help="prepared data sets, folders or Hub ids")
    add("--output", default="runs/evaluation", metavar="FOLDER", help="folder to write (%(default)s)")
    add("--reply_speakers", nargs="+", metavar="NAME", help="whose replies, such as a corpus's assistant (everybody's)")
    add("--baseline", metavar="NAME", help="system that the others are compared with (the first)")
    add(
        "--metrics", nargs="+", choices=METRICS, default=list(METRICS[:4]), metavar="METRIC",
        help=f"of {', '.join(METRICS)} (without BLEU)",
    )  # fmt: skip
    add("--classifier", default="SamLowe/roberta-base-go_emotions", help="of EmotionScore (%(default)s)")
    add("--pooling", default="mean", help="of EmotionScore: mean, cls, head or probabilities (%(default)s)")
    add("--bertscore_model", default="roberta-large", metavar="ID", help="Hub id or folder (%(default)s)")
    add("--bertscore_layer", type=int, metavar="N", help="needed for a model in a folder")
    add("--max_new_tokens", type=positive, default=64, metavar="N", help="length of a reply at most (%(default)s)")
    add("--temperature", type=float, help="samples replies (the likeliest token each time)")
    add("--top_p", type=float, help="with a temperature, from the likeliest tokens of so much probability")
    add(
        "--clips", type=not_negative, default=CLIPS, metavar="N",
        help="of a data set that holds its clips inside itself (`prepare --embed`), those of so many samples are kept "
        "beside the replies, for the report and studies (%(default)s)",
    )  # fmt: skip
    add_generation_options(parser)


def add_emotion_options(parser: argparse.ArgumentParser) -> None:
    """Of Fig. 6."""
    parser.add_argument("--data", required=True, metavar="DATA", help="prepared data set, folder or Hub id")
    parser.add_argument("--output", default="runs/evaluation", metavar="FOLDER", help="folder to write (%(default)s)")
    add_generation_options(parser)


def as_arguments(options: argparse.Namespace, add, positional: str) -> list[str]:
    """
    The options as a command line that gives them again, without `--accelerate_config`.

    Args:
        options: parsed ones.
        add: function that added them to their parser.
        positional: the name of what stands before them.
    """
    parser = argparse.ArgumentParser()
    add(parser)
    before = getattr(options, positional)
    line = list(before) if isinstance(before, list) else [before]
    for name in vars(parser.parse_args(["--data="])):
        value = getattr(options, name)
        if isinstance(value, list):
            line += [f"--{name}", *value]
        elif value is not None and name != "accelerate_config":
            line.append(f"--{name}={value}")
    return line
