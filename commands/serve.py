"""`empathic serve`: the chatbot as a service that speaks OpenAI's chat completions protocol."""

import logging
import os
import sys

from ..benchmarks.efficiency_options import positive
from ..errors import loading
from . import add_command

KEY_VARIABLE, VLLM_KEY_VARIABLE = "EMPATHIC_API_KEY", "VLLM_API_KEY"


def run(arguments) -> int:
    from ..serve.app import Service, build_app
    from ..serve.server import address_of, listen, run_server

    listening = listen(arguments.host, arguments.port)  # before the model is loaded, which takes long
    import torch

    from ..hosts import host_names
    from ..modeling_empathic import EmpathicForConditionalGeneration
    from ..processing_empathic import EmpathicProcessor
    from ..serve.engine import Engine, LocalDecoder
    from ..serve.media_pool import MediaPool
    from ..serve.metrics import Metrics
    from ..serve.prefix_cache import PrefixCache
    from ..serve.prompts import FrontEnd
    from ..serve.protocol import Limits

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    key = arguments.api_key or os.environ.get(KEY_VARIABLE) or None
    if key is None and arguments.host not in ("127.0.0.1", "localhost", "::1"):
        logging.getLogger("empathic.serve").warning(
            "everybody who reaches %s can use this server; give --api_key, or set %s", arguments.host, KEY_VARIABLE
        )
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    with loading(arguments.model):
        model = EmpathicForConditionalGeneration.from_pretrained(arguments.model, dtype="auto").eval().to(device)
        processor = EmpathicProcessor.from_pretrained(arguments.model)
    metrics, cache = Metrics(), PrefixCache(int(arguments.cache_gib * 2**30))
    if arguments.backend == "vllm":
        from ..serve.vllm_backend import VllmDecoder, keep_embeddings_only

        decoder = VllmDecoder(
            arguments.vllm_url, arguments.vllm_model, arguments.max_batch, os.environ.get(VLLM_KEY_VARIABLE)
        )
        decoder.check()
        keep_embeddings_only(model)
    else:
        decoder = LocalDecoder(model, cache, arguments.max_batch)
    front = FrontEnd(model, processor, cache, arguments.max_memories, keeps_keys=arguments.backend == "local")
    limits = Limits(
        body_megabytes=arguments.max_body_mb,
        media_megabytes=arguments.max_media_mb,
        seconds=arguments.max_seconds,
        tokens=arguments.max_new_tokens,
        decode_seconds=arguments.decode_seconds,
    )
    pool = MediaPool(
        arguments.workers, limits.decode_seconds, processor.num_frames, limits.seconds, metrics.media_restarts.inc
    )
    service = Service(
        Engine(
            front,
            decoder,
            metrics,
            arguments.max_queue,
            # Its probabilities need the language model's logits.
            with_emotion=arguments.backend == "local" and not arguments.no_emotion,
        ),
        pool,
        arguments.name or arguments.model.rstrip("/").split("/")[-1],
        limits,
        api_key=key,
        allow_urls=arguments.allow_urls,
        # With a key, a web site that reaches the server cannot use it.
        hosts=None if key is not None else host_names(arguments.host, arguments.allowed_hosts),
    )
    print(f"Serving {service.model_name} at {address_of(listening)}/v1", flush=True)
    try:
        run_server(build_app(service, arguments.cors), service, listening, arguments.shutdown_seconds)
    finally:
        pool.close()
    return 0


def add(commands) -> None:
    """Add the command."""
    sub = add_command(
        commands,
        "serve",
        run,
        "serve a model to clients of OpenAI's chat completions protocol",
        "empathic serve runs/quickstart/model --port 8000",
    )
    sub.add_argument("model", metavar="MODEL", help="folder or Hub id")
    sub.add_argument("--name", help="name under which clients ask for the model (default: the last part of MODEL)")
    sub.add_argument(
        "--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 for all addresses (%(default)s)"
    )
    sub.add_argument("--port", type=int, default=8000, help="port to listen on; 0 for a free one (%(default)s)")
    sub.add_argument("--device", help="device of the model, such as cuda:1 (default: a GPU if there is one)")
    sub.add_argument(
        "--api_key", help=f"key that clients must send; better: set {KEY_VARIABLE}, which no process list shows"
    )
    sub.add_argument(
        "--allowed_hosts", nargs="+", default=[], metavar="NAME",
        help="without a key: further host names of this server, such as that of a proxy; '*' for any",
    )  # fmt: skip
    sub.add_argument(
        "--cors", nargs="+", default=[], metavar="ORIGIN", help="web pages that may use the server (default: none)"
    )
    sub.add_argument("--allow_urls", action="store_true", help="download clips from public http and https URLs")
    sub.add_argument(
        "--max_batch", type=positive, default=8, help="replies generated at once; 1 for one at a time (%(default)s)"
    )
    sub.add_argument(
        "--backend", choices=["local", "vllm"], default="local",
        help="what generates the replies: this process, or a vLLM server that gets prompts as embeddings (%(default)s)",
    )  # fmt: skip
    sub.add_argument(
        "--vllm_url", default="http://127.0.0.1:8001/v1", metavar="URL",
        help=f"the vLLM server; its key is read from {VLLM_KEY_VARIABLE} (%(default)s)",
    )  # fmt: skip
    sub.add_argument(
        "--vllm_model", default="language-model", metavar="NAME", help="the language model's name there (%(default)s)"
    )
    sub.add_argument("--max_queue", type=positive, default=64, help="requests that may wait (%(default)s)")
    sub.add_argument(
        "--cache_gib", type=float, default=2.0, help="size of what is kept of conversations, in GiB (%(default)s)"
    )
    sub.add_argument(
        "--max_memories", type=positive, help="maximum number of memory vectors in a prompt (default: no limit)"
    )
    sub.add_argument("--max_new_tokens", type=positive, default=512, help="maximum length of a reply (%(default)s)")
    sub.add_argument("--max_seconds", type=float, default=60, help="maximum length of a clip in seconds (%(default)s)")
    sub.add_argument("--max_media_mb", type=float, default=32, help="maximum size of a clip in MB (%(default)s)")
    sub.add_argument("--max_body_mb", type=float, default=64, help="maximum size of a request in MB (%(default)s)")
    sub.add_argument("--workers", type=positive, default=2, help="processes that decode clips (%(default)s)")
    sub.add_argument("--decode_seconds", type=float, default=30, help="maximum time to decode a clip (%(default)s)")
    sub.add_argument("--no_emotion", action="store_true", help="do not recognize the emotion of each turn with a clip")
    sub.add_argument(
        "--shutdown_seconds", type=float, default=30,
        help="time that replies in progress have left after a signal to stop (%(default)s)",
    )  # fmt: skip
