"""Download a clip from a URL that a client gives: bounded, and never from a private address."""

import http.client
import ipaddress
import socket
import ssl
import threading
import time
from urllib.parse import urljoin, urlsplit

MOST_REDIRECTS = 3


class FetchError(ValueError):
    """A URL from which nothing can be downloaded. The message is for the client."""


def _public_address(host: str, port: int) -> str:
    """Return an address of a host. All its addresses must be public, so that a name cannot lead into our network."""
    try:
        found = {info[4][0] for info in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)}
    except (OSError, UnicodeError):
        raise FetchError(f"The host {host[:100]!r} is not known. Check the URL.") from None
    for address in found:
        if not _is_public(ipaddress.ip_address(str(address).split("%")[0])):
            raise FetchError(f"The host {host[:100]!r} is not a public address. Send the clip as a data URL.")
    return str(min(found))


def _is_public(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_global and not (mapped or address).is_multicast


def _connect(scheme: str, host: str, port: int, timeout: float) -> http.client.HTTPConnection:
    """Connect to the address that was checked: a second look-up of the name could give another one."""
    address = _public_address(host, port)
    opened = socket.create_connection((address, port), timeout=timeout)
    connection = http.client.HTTPConnection(host, port, timeout=timeout)
    if scheme == "https":
        opened = ssl.create_default_context().wrap_socket(opened, server_hostname=host)
    connection.sock = opened
    return connection


def fetch(url: str, most: int, seconds: float) -> bytes:
    """
    Download a file.

    Args:
        url: an http or https URL.
        most: the maximum size in bytes.
        seconds: the maximum time.

    Raises:
        FetchError: if the URL is invalid, leads to a private address, or the file is too large or too slow.
    """
    until = time.monotonic() + seconds
    for _ in range(MOST_REDIRECTS + 1):
        try:
            parts = urlsplit(url)
            host, port = parts.hostname, parts.port or (443 if parts.scheme == "https" else 80)
        except ValueError:
            raise FetchError(f"{url[:100]!r} is no URL. Check it.") from None
        if parts.scheme not in ("http", "https") or not host:
            raise FetchError(f"{url[:100]!r} is no http or https URL. Send the clip as a data URL.")
        if parts.username is not None:
            raise FetchError("A URL with a user name is not accepted. Send the clip as a data URL.")
        try:
            left = max(0.1, until - time.monotonic())
            connection = _connect(parts.scheme, host, port, left)
            # A server may send one byte at a time, so that no single wait is too long.
            timer = threading.Timer(left, connection.sock.shutdown, (socket.SHUT_RDWR,))
            timer.start()
            try:
                path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
                connection.request("GET", path, headers={"Accept": "*/*", "User-Agent": "empathic"})
                response = connection.getresponse()
                if response.status in (301, 302, 303, 307, 308):
                    url = urljoin(url, response.headers.get("location", ""))
                    continue
                if response.status != 200:
                    raise FetchError(f"{url[:100]!r} answered with the status {response.status}. Check the URL.")
                return _read(response, url, most, until)
            finally:
                timer.cancel()
                connection.close()
        except (OSError, http.client.HTTPException, ValueError) as error:
            if isinstance(error, FetchError):
                raise
            raise FetchError(
                f"{url[:100]!r} could not be downloaded ({type(error).__name__}). Check the URL."
            ) from None
    raise FetchError(f"{url[:100]!r} is redirected too often. Give the final URL.")


def _read(response: http.client.HTTPResponse, url: str, most: int, until: float) -> bytes:
    content = bytearray()
    while chunk := response.read1(1 << 16):
        content += chunk
        if len(content) > most:
            raise FetchError(f"{url[:100]!r} has more than {most / 1e6:g} MB, the limit. Send a smaller clip.")
        if time.monotonic() > until:
            raise FetchError(f"{url[:100]!r} is downloaded too slowly. Send the clip as a data URL.")
    return bytes(content)
