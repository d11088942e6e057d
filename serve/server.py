"""Run the application with uvicorn, and end it gracefully."""

import logging
import socket
import threading

import uvicorn
from fastapi import FastAPI

from .app import Service

logger = logging.getLogger("empathic.serve")


class _Server(uvicorn.Server):
    """A server that ends the replies in progress some time after the signal to stop."""

    def __init__(self, config: uvicorn.Config, service: Service, seconds: float):
        super().__init__(config)
        self.service, self.seconds = service, seconds

    def handle_exit(self, sig, frame) -> None:
        """Take no new requests; replies in progress go on for `seconds`. A second signal ends them at once."""
        if self.should_exit:
            threading.Thread(target=self.service.stop, daemon=True).start()
        else:
            logger.warning("shutting down: %d requests are in progress", self.service.in_progress)
            timer = threading.Timer(self.seconds, self.service.stop)
            timer.daemon = True
            timer.start()
        super().handle_exit(sig, frame)
        self.force_exit = False


def listen(host: str, port: int) -> socket.socket:
    """
    Return a socket that listens on an address; port 0 takes a free one.

    Raises:
        OSError: if the address cannot be used.
    """
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise OSError(f"{host}:{port} cannot be used: {reason}. Give another --host or --port.") from error


def address_of(listening: socket.socket) -> str:
    """Return the URL of a socket from `listen`."""
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def run_server(app: FastAPI, service: Service, listening: socket.socket, shutdown_seconds: float = 30) -> None:
    """
    Serve until a signal to stop.

    Args:
        app: from `build_app`.
        service: what its routes share.
        listening: from `listen`.
        shutdown_seconds: how long replies in progress may go on after the signal.
    """
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=int(shutdown_seconds) + 5,
    )
    _Server(config, service, shutdown_seconds).run(sockets=[listening])
