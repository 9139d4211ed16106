"""The HTTP that a WebSocket connection begins with (RFC 6455, section 4), and CONNECT before it."""

import hashlib
import io
from base64 import b64encode
from http.client import HTTPException, HTTPMessage, parse_headers

from builder_orch.tunnel.machine import Malformed

HEAD_LIMIT = 16 << 10
_GUID = "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
_END = b"\r\n\r\n"


class Head:
    """Collects the head of an HTTP message; what follows it is `rest`."""

    def __init__(self) -> None:
        self._octets = b""
        self.start = ""
        self.fields = HTTPMessage()
        self.rest = b""

    def receive(self, octets: bytes) -> bool:
        """Whether the head is whole; Malformed for what is none, or longer than it may be."""
        self._octets += octets
        found = self._octets.find(_END, 0, HEAD_LIMIT)
        if found < 0:
            if len(self._octets) >= HEAD_LIMIT:
                raise Malformed("an HTTP head without an end")
            return False
        head, self.rest = self._octets[: found + 4], self._octets[found + 4 :]
        start, _, fields = head.partition(b"\r\n")
        self.start = start.decode("latin-1")
        try:
            self.fields = parse_headers(io.BytesIO(fields))
        except HTTPException as error:
            raise Malformed(f"no HTTP head: {error}") from None
        return True

    def has(self, name: str, token: str) -> bool:
        """Whether a field that is a list names this token."""
        values = ",".join(self.fields.get_all(name, []))
        return token in {value.strip().lower() for value in values.split(",")}

    def status(self) -> tuple[int, str]:
        """Code and reason of an answer; Malformed when it is none."""
        version, _, rest = self.start.partition(" ")
        code, _, reason = rest.partition(" ")
        if not version.startswith("HTTP/1.") or len(code) != 3 or not code.isdecimal():
            raise Malformed("no HTTP answer")
        return int(code), reason.strip()


def authority(host: str, port: int) -> str:
    """`host:port`, as URLs and the Host field have it."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def accept_key(key: str) -> str:
    """What a server answers to a client's key."""
    return b64encode(hashlib.sha1((key + _GUID).encode("latin-1")).digest()).decode()  # noqa: S324


def request(host: str, port: int, key: str) -> bytes:
    """A client's first words: path /, an Origin as the public client sends it, no subprotocol."""
    where = authority(host, port)
    lines = [
        "GET / HTTP/1.1",
        f"Host: {where}",
        "Upgrade: websocket",
        "Connection: Upgrade",
        f"Sec-WebSocket-Key: {key}",
        "Sec-WebSocket-Version: 13",
        f"Origin: wss://{where}/",
    ]
    return "\r\n".join([*lines, "", ""]).encode("latin-1")


def check_answer(head: Head, key: str) -> None:
    """Malformed, with the cause, unless the server agreed to speak WebSocket."""
    code, reason = head.status()
    if code != 101:
        raise Malformed(f"answered {code} {reason}".rstrip())
    if not head.has("Upgrade", "websocket") or not head.has("Connection", "upgrade"):
        raise Malformed("answered without an upgrade")
    if head.fields.get("Sec-WebSocket-Accept", "").strip() != accept_key(key):
        raise Malformed("answered with a wrong accept key")
    if "Sec-WebSocket-Extensions" in head.fields or "Sec-WebSocket-Protocol" in head.fields:
        raise Malformed("answered with an extension that was not asked for")


def answer(head: Head) -> tuple[bytes, bool]:
    """A server's answer to a request, and whether it agrees."""
    method, _, rest = head.start.partition(" ")
    path, _, version = rest.partition(" ")
    key = head.fields.get("Sec-WebSocket-Key", "").strip()
    if method != "GET" or version != "HTTP/1.1":
        return _refusal("400 Bad Request"), False
    if path != "/":
        return _refusal("404 Not Found"), False
    if not key or not head.has("Upgrade", "websocket") or not head.has("Connection", "upgrade"):
        return _refusal("426 Upgrade Required", "Upgrade: websocket"), False
    if head.fields.get("Sec-WebSocket-Version", "").strip() != "13":
        return _refusal("426 Upgrade Required", "Sec-WebSocket-Version: 13"), False
    lines = [
        "HTTP/1.1 101 Switching Protocols",
        "Upgrade: websocket",
        "Connection: Upgrade",
        f"Sec-WebSocket-Accept: {accept_key(key)}",
    ]
    return "\r\n".join([*lines, "", ""]).encode("latin-1"), True


def _refusal(status: str, *fields: str) -> bytes:
    lines = [f"HTTP/1.1 {status}", *fields, "Content-Length: 0", "Connection: close"]
    return "\r\n".join([*lines, "", ""]).encode("latin-1")


def connect_request(host: str, port: int, credentials: str) -> bytes:
    """What a proxy is asked for; `credentials` is `user:password`, or empty."""
    where = authority(host, port)
    lines = [f"CONNECT {where} HTTP/1.1", f"Host: {where}"]
    if credentials:
        lines.append(f"Proxy-Authorization: Basic {b64encode(credentials.encode()).decode()}")
    return "\r\n".join([*lines, "", ""]).encode("latin-1")
