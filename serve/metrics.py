"""What the server counts, for Prometheus."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics:
    """The metrics of one server, with a registry of their own."""

    def __init__(self):
        self.registry = registry = CollectorRegistry()
        self.requests = Counter("empathic_requests", "Chat requests by their outcome.", ["outcome"], registry=registry)
        self.prompt_positions = Counter(
            "empathic_prompt_positions", "Prompt positions that the language model processed.", registry=registry
        )
        self.cached_positions = Counter(
            "empathic_cached_positions", "Prompt positions reused from earlier turns.", registry=registry
        )
        self.memory_tokens = Counter(
            "empathic_memory_tokens", "Tokens that the memory encoder has read.", registry=registry
        )
        self.completion_tokens = Counter("empathic_completion_tokens", "Generated tokens.", registry=registry)
        self.running = Gauge("empathic_running", "Replies that are being generated.", registry=registry)
        self.waiting = Gauge("empathic_waiting", "Requests that wait for the model.", registry=registry)
        self.cache_bytes = Gauge("empathic_cache_bytes", "Size of the kept pieces of conversations.", registry=registry)
        self.cache_pieces = Gauge("empathic_cache_pieces", "Number of kept pieces.", registry=registry)
        self.evictions = Gauge("empathic_cache_evictions", "Pieces evicted so far.", registry=registry)
        self.media_restarts = Counter(
            "empathic_media_restarts", "Decoding processes that were ended or died.", registry=registry
        )
        self.first_token_seconds = Histogram(
            "empathic_first_token_seconds", "Time to the first text of a reply.", buckets=SECONDS, registry=registry
        )
        self.request_seconds = Histogram(
            "empathic_request_seconds", "Time of a whole request.", buckets=SECONDS, registry=registry
        )

    def text(self) -> bytes:
        """Return all metrics in Prometheus's text format."""
        return generate_latest(self.registry)
