"""
The host names of a server.

Without such a list, any web site could use a server that runs locally without a key: the site lets its own name point
to 127.0.0.1 (DNS rebinding), and the browser takes both for the same site. IP addresses need no list, because they
cannot be pointed elsewhere.
"""

import os
import socket
from collections.abc import Iterable
from fnmatch import fnmatchcase
from ipaddress import ip_address
from urllib.parse import urlsplit


def host_names(server_name: str | None, more: Iterable[str] = ()) -> set[str]:
    """
    Return the names under which browsers may reach a server, as patterns.

    Args:
        server_name: the address that the server listens on.
        more: further names, such as that of a proxy before the page.
    """
    names = {"localhost", "*.localhost", socket.gethostname(), f"{socket.gethostname()}.local", server_name, *more}
    if os.environ.get("SPACE_ID"):  # set in a Space of the Hub
        names |= {"*.hf.space", "huggingface.co", *os.environ.get("SPACE_HOST", "").split(",")}
    return {name.strip().lower() for name in names if name and name.strip()}


def is_known_host(host: str, names: Iterable[str]) -> bool:
    """Whether the Host header of a request is an IP address or matches one of the names (patterns, in lower case)."""
    try:
        name = (urlsplit(f"//{host}").hostname or "").rstrip(".")
    except ValueError:
        return False
    try:
        ip_address(name)
        return True
    except ValueError:
        return any(fnmatchcase(name, pattern) for pattern in names)
