"""Command-line options of `empathic counter` and `accelerate launch -m empathic.data_prep.counter.build`."""

import argparse

DTYPES = ("auto", "float32", "bfloat16", "float16")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options to a parser."""
    who = parser.add_mutually_exclusive_group(required=True)
    who.add_argument("--model", help="the model that will be trained; generates with its adapters disabled")
    who.add_argument("--generator", help="Hub id or folder of any causal language model to use instead")
    add = parser.add_argument
    add("--data", required=True, help="folder written by `empathic prepare`, or Hub id")
    add("--out", required=True, help="output folder; the dataset of stage epo")
    add("--splits", nargs="+", default=["train"], help="splits to process (%(default)s)")
    add("--speakers", nargs="+", help="speakers whose replies are used, such as a corpus's assistant (all)")
    add("--max_samples", type=int, help="maximum number of samples per split, taken from the start (all)")
    add("--classifier", default="SamLowe/roberta-base-go_emotions", help="text emotion classifier (%(default)s)")
    add("--pooling", default="mean", help="classifier features: mean, cls, head or probabilities (%(default)s)")
    add("--threshold", type=float, default=0.1, help="upper bound of a pair's similarity, exclusive (%(default)s)")
    add("--negatives", default="lowest", help="rejected replies of a row: lowest, all or their number N (%(default)s)")
    add("--fitting_only", action="store_true", help="leave out true replies that miss the emotion of the sentence")
    add("--near_duplicate", type=float, default=0.9, help="overlap at which replies are duplicates (%(default)s)")
    add("--emotions", nargs="+", help="emotions to generate replies for, out of the seven (all)")
    add("--history", choices=("memory", "text", "none"), help="history in the prompt (memory; text for --generator)")
    add("--use_adapter", action="store_true", help="enable the adapters of --model")
    add("--backend", choices=("transformers", "vllm"), default="transformers", help="for --generator (%(default)s)")
    add("--tensor_parallel_size", type=int, default=1, help="GPUs that share the model with vllm (%(default)s)")
    add("--batch_size", type=int, default=32, help="prompts per batch (%(default)s)")
    add("--chunk_size", type=int, default=64, help="samples per chunk of resumable work (%(default)s)")
    add("--max_new_tokens", type=int, default=64, help="maximum length of a reply (%(default)s)")
    add("--temperature", type=float, help="sampling temperature (from the model's generation config, else 1)")
    add("--top_p", type=float, help="nucleus sampling probability (from the generation config, else 1)")
    add("--top_k", type=int, help="number of tokens to sample from (from the generation config, else 0: all)")
    add("--greedy", action="store_true", help="greedy decoding instead of sampling")
    add("--seed", type=int, default=0, help="sampling seed; each sample has its own random stream (%(default)s)")
    add("--plain_text", action="store_true", help="prompts as strings without clips, for trainers of text models")
    add("--device", help="cuda or cpu (a GPU if available)")
    add("--dtype", choices=DTYPES, default="auto", help="dtype of the model (%(default)s: as it was saved)")


def as_arguments(options: argparse.Namespace) -> list[str]:
    """Convert parsed options back to command-line arguments."""
    parser = argparse.ArgumentParser()
    add_options(parser)
    known = vars(parser.parse_args(["--model=", "--data=", "--out="]))
    line = []
    for name in known:
        value = getattr(options, name)
        if value is True:
            line.append(f"--{name}")
        elif isinstance(value, list):
            line += [f"--{name}", *value]
        elif value is not None and value is not False:
            line.append(f"--{name}={value}")
    return line
