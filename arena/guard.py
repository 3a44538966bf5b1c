"""Checks of requests before gradio sees them: host name, origin, size, login rate. It also adds security headers.

It is an ASGI middleware around gradio's application. Behind a proxy on this machine, uvicorn takes the visitor's
address from X-Forwarded-For.
"""

import threading
import time
from collections import deque
from urllib.parse import urlsplit

HEADERS = {
    b"content-security-policy": b"frame-ancestors 'none'; object-src 'none'; base-uri 'self'; form-action 'self'",
    b"x-frame-options": b"DENY",
    b"x-content-type-options": b"nosniff",
    b"referrer-policy": b"same-origin",
}
LOGINS_PER_MINUTE = 10  # of one address
OVERHEAD = 1 << 16  # bytes of a request beside the text that a visitor may write


class TooLarge(Exception):
    """The body of a request is longer than its limit."""


class Guard:
    """Refuses requests that the arena's page does not send, and adds HEADERS to every reply.

    Args:
        hosts: the page's allowed host names, without port; empty = any name (then a login is required).
        max_characters: limit of a text. A character has at most 4 bytes in UTF-8, and 12 in JSON's escapes.
    """

    def __init__(self, app, *, hosts: list[str], max_characters: int):
        self.app, self.hosts, self.most = app, {host.lower() for host in hosts}, OVERHEAD + 12 * max_characters
        self.logins: dict[str, deque[float]] = {}
        self.lock = threading.Lock()

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        if refusal := self.refusal(scope, headers):
            await answer(send, *refusal)
            return
        begun, read = False, 0

        async def counted():
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > self.most:
                raise TooLarge
            return message

        async def guarded(message):
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                message = message | {"headers": safe_headers(message["headers"])}
            await send(message)

        try:
            await self.app(scope, counted, guarded)
        except TooLarge:
            if not begun:
                await answer(send, 413, f"At most {self.most} bytes.")

    def refusal(self, scope: dict, headers: dict[str, str]) -> tuple[int, str] | None:
        """(status, sentence) for a refused request, or None."""
        host = host_of(f"//{headers.get('host', '')}")
        if self.hosts and host not in self.hosts:
            return 421, f"This page is not {host!r}; hosts=[{host}] allows that name."
        changes = scope["method"] not in ("GET", "HEAD", "OPTIONS")
        origin = headers.get("origin")
        foreign = origin is not None and host_of(origin) != host
        if changes and (foreign or headers.get("sec-fetch-site") == "cross-site"):
            return 403, "This request comes from another page."
        if int(headers.get("content-length", "0") or 0) > self.most:
            return 413, f"At most {self.most} bytes."
        if scope["method"] == "POST" and scope["path"].rstrip("/").endswith("/login") and not self.may_log_in(scope):
            return 429, "Too many logins; try again in a minute."
        return None

    def may_log_in(self, scope: dict) -> bool:
        """Count a login from this address. Returns whether it is allowed."""
        address, now = (scope.get("client") or ("",))[0], time.monotonic()
        with self.lock:
            for name in [name for name, times in self.logins.items() if now - times[-1] > 60]:
                del self.logins[name]
            times = self.logins.setdefault(address, deque(maxlen=LOGINS_PER_MINUTE + 1))
            times.append(now)
            return len(times) <= LOGINS_PER_MINUTE or now - times[0] > 60


def host_of(url: str) -> str:
    """The host name in a URL, without port, in lower case; empty if there is none."""
    try:
        return (urlsplit(url).hostname or "").lower()
    except ValueError:
        return ""


def safe_headers(headers: list) -> list:
    """The headers of a reply with HEADERS. No other page may read the reply, or make a browser send its cookies."""
    kept = [(name, value) for name, value in headers if not name.lower().startswith(b"access-control-allow-")]
    kept = [(name, same_site(value) if name.lower() == b"set-cookie" else value) for name, value in kept]
    return [(name, value) for name, value in kept if name.lower() not in HEADERS] + list(HEADERS.items())


def same_site(cookie: bytes) -> bytes:
    """The cookie with SameSite=Lax instead of its own SameSite."""
    parts = [part for part in cookie.split(b";") if not part.strip().lower().startswith(b"samesite")]
    return b";".join([*parts, b" SameSite=Lax"])


async def answer(send, status: int, sentence: str) -> None:
    """Send a short plain text instead of the page."""
    headers = [(b"content-type", b"text/plain; charset=utf-8"), *HEADERS.items()]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": sentence.encode()})
