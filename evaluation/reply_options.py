"""The options of `empathic evaluate dialogue`, `ablation`, `contrast` and `emotion`."""

import argparse

DTYPES = ("auto", "float32", "bfloat16", "float16")
CLIPS = 200  # number of samples whose clips are saved
CLASSIFIER = "SamLowe/roberta-base-go_emotions"
CONDITIONS = ("full", "absent", "audio", "video", "silence", "gray", "blank")
METRICS = ("bertscore", "emotion_score", "reply_emotion", "dist1", "corpus_dist1", "bleu1", "bleu4")


def not_negative(text: str) -> int:
    """Parse an integer from 0 up."""
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{value} is below 0; give 0 or more")
    return value


def positive(text: str) -> int:
    """Parse an integer from 1 up."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is below 1; give 1 or more")
    return value


def add_generation_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that all four commands share."""
    add = parser.add_argument
    add("--split", default="test", help="split of DATA that was not trained on (%(default)s)")
    add("--max_samples", type=positive, metavar="N", help="use only the first N samples")
    add("--batch_size", type=positive, default=16, metavar="N", help="replies per batch (%(default)s)")
    add("--seed", type=int, default=0, help="seed of sampling and of the intervals (%(default)s)")
    add("--confidence", type=float, default=0.95, help="confidence level of the intervals (%(default)s)")
    add("--resamples", type=int, default=10000, metavar="N", help="draws for the intervals and tests (%(default)s)")
    add("--device", help="device such as cpu or cuda:0; by default a GPU if there is one")
    add("--dtype", choices=DTYPES, default="auto", help="dtype of the weights (%(default)s: as saved)")
    add("--accelerate_config", metavar="FILE", help="config of `accelerate launch`, for several processes")


def add_dialogue_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `dialogue` and `ablation` (Tables 1 and 2)."""
    add = parser.add_argument
    add("--data", nargs="+", required=True, metavar="DATA", help="prepared data sets, folders or Hub ids")
    add("--output", default="runs/evaluation", metavar="FOLDER", help="output folder (%(default)s)")
    add("--reply_speakers", nargs="+", metavar="NAME", help="speakers whose replies are predicted (all)")
    add("--baseline", metavar="NAME", help="system that the others are compared with (the first)")
    add(
        "--metrics", nargs="+", choices=METRICS, default=list(METRICS[:5]), metavar="METRIC",
        help=f"any of {', '.join(METRICS)} (all but BLEU)",
    )  # fmt: skip
    add("--classifier", default=CLASSIFIER, help="classifier of EmotionScore (%(default)s)")
    add("--pooling", default="mean", help="pooling of EmotionScore: mean, cls, head or probabilities (%(default)s)")
    add(
        "--references", metavar="FILE",
        help='further acceptable replies for EmotionScore, JSONL with {"id", "references": [...]}; the ids are those '
        "of the saved replies",
    )  # fmt: skip
    add("--bertscore_model", default="roberta-large", metavar="ID", help="model, Hub id or folder (%(default)s)")
    add("--bertscore_layer", type=int, metavar="N", help="layer of that model; needed if it is a folder")
    _add_decoding_options(add)
    add(
        "--clips", type=not_negative, default=CLIPS, metavar="N",
        help="if the data set stores clips as bytes (`prepare --embed`), save the clips of N samples next to the "
        "replies, for the report and studies (%(default)s)",
    )  # fmt: skip
    add_generation_options(parser)


def _add_decoding_options(add) -> None:
    add("--max_new_tokens", type=positive, default=64, metavar="N", help="maximum length of a reply (%(default)s)")
    add("--temperature", type=float, help="sampling temperature (greedy decoding)")
    add("--top_p", type=float, help="nucleus sampling with this probability; needs a temperature")


def add_contrast_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `contrast`."""
    add = parser.add_argument
    add("--data", nargs="+", required=True, metavar="DATA", help="prepared data sets, folders or Hub ids")
    add("--output", default="runs/evaluation", metavar="FOLDER", help="output folder (%(default)s)")
    add("--reply_speakers", nargs="+", metavar="NAME", help="speakers whose replies are predicted (all)")
    add("--baseline", metavar="NAME", help="system that the others are compared with (the first)")
    add(
        "--pairs", choices=("auto", "same", "swap"), default="auto",
        help="same: clips of the same words with different emotions, as in RAVDESS; swap: the clip of a turn is "
        "replaced by other clips of its speaker; auto: same where the data set has such clips",
    )  # fmt: skip
    add("--swaps", type=positive, default=2, metavar="N", help="swap: other clips of an utterance (%(default)s)")
    add(
        "--max_utterances", type=not_negative, default=100, metavar="N",
        help="maximum number of utterances of a data set, 0 for all (%(default)s)",
    )  # fmt: skip
    add(
        "--conditions", nargs="+", choices=CONDITIONS, default=list(CONDITIONS), metavar="CONDITION",
        help="what the systems get of a clip: full, absent (no clip), audio or video (one of the two), silence or gray "
        "(a blank sound or picture beside the other), blank (both); default: all that differ",
    )  # fmt: skip
    add(
        "--likelihood", choices=("auto", "reference", "probes", "none"), default="auto",
        help="replies whose likelihood under the right and the wrong clip is compared: reference, the true replies; "
        "probes, the replies in the table of appropriateness; auto: the true replies if there are any",
    )  # fmt: skip
    add("--classifier", default=CLASSIFIER, help="emotion classifier of the replies (%(default)s)")
    add("--appropriateness", metavar="FILE", help="JSON table of what fits which emotion (a default, see the docs)")
    add(
        "--cluster", choices=("utterance", "speaker"), default="utterance", help="what the intervals draw (%(default)s)"
    )
    _add_decoding_options(add)
    add(
        "--clips", type=not_negative, default=CLIPS, metavar="N",
        help="if the data set stores clips as bytes, save the clips of N utterances for the report (%(default)s)",
    )  # fmt: skip
    add_generation_options(parser)


def add_judge_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `judge`."""
    add = parser.add_argument
    add("--output", default="runs/evaluation", metavar="FOLDER", help="output folder (%(default)s)")
    add("--study", metavar="STUDY", help="study with people's ratings of the same replies, to compare the judge with")
    add("--baseline", metavar="NAME", help="system that the others are compared with (the first)")
    add("--reference", action="store_true", help="also judge the true replies")
    add(
        "--max_conversations", type=not_negative, default=50, metavar="N",
        help="maximum number of conversations, each judged twice; 0 for all (%(default)s)",
    )  # fmt: skip
    add("--attempts", type=positive, default=2, metavar="N", help="answers asked for if one is malformed (%(default)s)")
    add("--max_new_tokens", type=positive, default=800, metavar="N", help="maximum length of an answer (%(default)s)")
    add("--batch_size", type=positive, default=16, metavar="N", help="answers are saved after each N (%(default)s)")
    add("--seed", type=int, default=0, help="seed of the requests and of the intervals (%(default)s)")
    add("--confidence", type=float, default=0.95, help="confidence level of the intervals (%(default)s)")
    add("--resamples", type=int, default=10000, metavar="N", help="draws for the intervals and tests (%(default)s)")


def add_emotion_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `emotion` (Fig. 6)."""
    parser.add_argument(
        "--inputs",
        nargs="+",
        metavar="ROW",
        help="rows to evaluate: T, A, V, A+V, A+T, V+T, A+V+T (default: those of Fig. 6 whose inputs the data set has)",
    )
    parser.add_argument("--data", required=True, metavar="DATA", help="prepared data set, folder or Hub id")
    parser.add_argument("--output", default="runs/evaluation", metavar="FOLDER", help="output folder (%(default)s)")
    add_generation_options(parser)


def as_arguments(options: argparse.Namespace, add, positional: str) -> list[str]:
    """
    Convert parsed options back to command line arguments, without `--accelerate_config`.

    Args:
        options: the parsed options.
        add: function that added the options to their parser.
        positional: name of the positional argument before the options.
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
