"""
Throughput and time per turn of `empathic serve`, measured from outside a real server process.

    python -m empathic.benchmarks.serve --output runs/benchmarks/serve.json

Throughput: several clients talk at once, each in its own conversation, with a server that generates up to 16 replies
together and with one that generates them one at a time. Turns: the time to the first token of turn 10, 200 and 1,000 of
a conversation whose history the server has heard, and the time to rebuild such a conversation from nothing.

By default the model has the tiny preset's sizes and random weights: speed does not depend on the weights.
"""

import argparse
import http.client
import json
import random
import re
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from statistics import median

import psutil
import torch

from ..files import write_json
from .efficiency_arms import preset_parts
from .machine import describe_machine

CLIENTS, TURNS = (1, 4, 16), (10, 200, 1000)
WORDS = "hello there how are you i am fine thanks what did he say about the old dog".split()


class Server:
    """
    A server process.

    Args:
        model: folder of a model.
        options: options of `empathic serve`.
    """

    def __init__(self, model: str, *options: str):
        command = [sys.executable, "-m", "empathic.cli", "serve", model, "--name", "model", "--port", "0", *options]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        first = self.process.stdout.readline() if self.process.stdout is not None else ""
        found = re.search(r"http://([\d.]+):(\d+)", first)
        if found is None:
            raise RuntimeError("The server did not start; its errors are above.")
        self.address = found[1], int(found[2])
        self.ask([{"role": "user", "content": "hello"}], 1)  # the first pass allocates memory

    def ask(self, messages: list[dict], tokens: int) -> dict:
        """Return the response to a chat request."""
        connection = http.client.HTTPConnection(*self.address, timeout=3600)
        body = {"model": "model", "messages": messages, "temperature": 0, "max_tokens": tokens}
        connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        answer = json.loads(response.read())
        connection.close()
        if response.status != 200:
            raise RuntimeError(f"The server answered with the status {response.status}: {answer}")
        return answer

    def cpu_seconds(self) -> float:
        """Return the CPU time that the process has used, without its workers: the load of the machine has no effect."""
        times = psutil.Process(self.process.pid).cpu_times()
        return times.user + times.system

    def close(self) -> None:
        """End the process."""
        self.process.terminate()
        self.process.wait()


def talk(turns: int, seed: int) -> list[dict]:
    """Make the history of a conversation, the same for the same seed."""
    rng = random.Random(seed)
    texts = (" ".join(rng.choices(WORDS, k=rng.randint(4, 12))) for _ in range(2 * turns))
    return [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]


def throughput(server: Server, clients: int, turns: int, tokens: int) -> dict:
    """
    Let clients talk at once, each for some turns; return the generated tokens a second, also of the CPU time, and
    the median time of a turn.
    """
    counts, seconds = [0] * clients, []

    def run(number: int) -> None:
        messages = talk(1, seed=number)
        for turn in range(turns):
            messages = [*messages, {"role": "user", "content": f"{WORDS[turn]} {WORDS[number % len(WORDS)]}"}]
            start = time.perf_counter()
            answer = server.ask(messages, tokens)
            seconds.append(time.perf_counter() - start)
            counts[number] += answer["usage"]["completion_tokens"]
            messages.append({"role": "assistant", "content": answer["choices"][0]["message"]["content"]})

    threads = [threading.Thread(target=run, args=(number,)) for number in range(clients)]
    start, cpu = time.perf_counter(), server.cpu_seconds()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return {
        "tokens": sum(counts),
        "tokens_per_second": sum(counts) / (time.perf_counter() - start),
        "tokens_per_cpu_second": sum(counts) / (server.cpu_seconds() - cpu),
        "seconds_per_turn": median(seconds),
    }


def late_turns(server: Server, turns: int, repeats: int) -> dict:
    """Return the costs of a turn after `turns` - 1 others, and of rebuilding the conversation."""
    messages = talk(turns - 1 - repeats, seed=turns)
    start = time.perf_counter()
    server.ask([*messages, {"role": "user", "content": "hello"}], 1)
    found: dict = {"rebuild_seconds": time.perf_counter() - start}
    seconds, positions, cpus = [], [], []
    for repeat in range(repeats + 1):
        messages = [*messages, {"role": "user", "content": f"how are you {WORDS[repeat]}"}]
        time.sleep(1)  # the turn before is read into the memory
        start, cpu = time.perf_counter(), server.cpu_seconds()
        answer = server.ask(messages, 1)
        seconds.append(time.perf_counter() - start)
        time.sleep(1)
        cpus.append(server.cpu_seconds() - cpu)  # with the reading of the turn into the memory
        usage = answer["usage"]
        positions.append(usage["prompt_tokens"] - usage["prompt_tokens_details"]["cached_tokens"])
        messages.append({"role": "assistant", "content": answer["choices"][0]["message"]["content"]})
    # The first turn may still have to process what the rebuild has not kept.
    return {
        **found,
        "prompt_positions": usage["prompt_tokens"],
        "new_positions": median(positions[1:]),
        "first_token_seconds": median(seconds[1:]),
        "cpu_seconds": median(cpus[1:]),
    }


def main(argv: list[str] | None = None) -> dict:
    """Measure, print and write the results; return them."""
    parser = argparse.ArgumentParser(
        description="Throughput and time per turn of `empathic serve`.",
        epilog="example:\n  python -m empathic.benchmarks.serve --output runs/benchmarks/serve.json",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output", default="runs/benchmarks/serve.json", help="JSON file (%(default)s)")
    parser.add_argument("--model", help="folder of a model (default: random weights)")
    parser.add_argument(
        "--preset", default="tiny", help="sizes of the random weights: tiny, qwen2.5-0.5b (%(default)s)"
    )
    parser.add_argument("--clients", type=int, nargs="+", default=CLIENTS, help="clients at once (%(default)s)")
    parser.add_argument("--turns", type=int, nargs="+", default=TURNS, help="turns that are timed (%(default)s)")
    parser.add_argument("--tokens", type=int, default=64, help="length of a reply (%(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="turns of each client, and late turns (%(default)s)")
    options = parser.parse_args(argv)
    result: dict = {"throughput": [], "turns": [], "tokens": options.tokens, "repeats": options.repeats}
    with tempfile.TemporaryDirectory() as folder:
        model = options.model
        if model is None:
            model = str(Path(folder) / "model")
            parts = preset_parts(options.preset, torch.float32, "cpu")
            ends = parts[0].generation_config
            ends.eos_token_id = None  # replies of full length
            for part in parts:
                part.save_pretrained(model)
            del parts
        for batch in (1, max(options.clients)):
            server = Server(model, "--max_batch", str(batch))
            try:
                for clients in options.clients:
                    found = throughput(server, clients, options.repeats, options.tokens)
                    result["throughput"].append({"clients": clients, "max_batch": batch, **found})
                    print(
                        f"{clients} clients, up to {batch} replies at once: {found['tokens_per_second']:.0f} tokens/s, "
                        f"{found['tokens_per_cpu_second']:.0f} tokens per CPU second, "
                        f"{found['seconds_per_turn']:.2f} s a turn",
                        flush=True,
                    )
                for turns in options.turns if batch > 1 or max(options.clients) == 1 else ():
                    found = late_turns(server, turns, options.repeats)
                    result["turns"].append({"turn": turns, **found})
                    print(
                        f"turn {turns}: {found['new_positions']:.0f} of {found['prompt_positions']} positions new, "
                        f"first token after {1000 * found['first_token_seconds']:.0f} ms, "
                        f"{1000 * found['cpu_seconds']:.0f} ms of CPU time; rebuilt in "
                        f"{found['rebuild_seconds']:.2f} s",
                        flush=True,
                    )
            finally:
                server.close()
    result["model"] = options.model or options.preset
    result["machine"] = describe_machine()
    Path(options.output).parent.mkdir(parents=True, exist_ok=True)
    write_json(options.output, result)
    return result


if __name__ == "__main__":
    main()
