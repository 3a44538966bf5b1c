"""JSON requests to servers over HTTP, repeated while a server is down, and many at the same time."""

import json
import queue
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from http.client import HTTPException
from typing import Any

SERVER_DOWN = (408, 429, 500, 502, 503, 504)
MOST = 1 << 28  # limit in bytes of a reply; a completion of 100,000 tokens has a hundredth of it


class Refused(ValueError):
    """The server refused the request. `code` is the HTTP status."""

    def __init__(self, message: str, code: int):
        super().__init__(message)
        self.code = code


def ask(
    url: str, body: dict | None = None, *, timeout: float, max_tries: int, who: str, read: Callable = json.loads
) -> Any:
    """A server's reply to JSON (or to GET, without a body), parsed from its bytes by `read`.

    Raises:
        Refused: the server refuses. ConnectionError: it stays down. Both messages begin with `who`.
    """
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    for attempt in range(1, max_tries + 1):
        try:
            with urllib.request.urlopen(request, timeout=timeout) as response:
                reply = response.read(MOST + 1)
                if len(reply) > MOST:
                    raise ValueError(f"the answer is longer than {MOST:,} bytes")
                if len(reply) < int(response.headers.get("Content-Length", 0)):  # read(n) does not report a short body
                    raise OSError(f"the answer was cut after {len(reply)} bytes")
                return read(reply or b"{}")
        except urllib.error.HTTPError as error:
            problem = f"HTTP {error.code}: {error.read(300).decode(errors='replace')}"
            if error.code not in SERVER_DOWN:
                raise Refused(f"{who}: {url} refuses ({problem})", error.code) from None
        # connection refused, timeout, a cut reply, or invalid JSON
        except (OSError, ValueError, HTTPException) as error:
            problem = f"{type(error).__name__}: {error}"
        if attempt < max_tries:
            time.sleep(min(30.0, 2.0 ** (attempt - 1)))
    raise ConnectionError(f"{who}: {url} failed after {max_tries} tries ({problem})")


def in_parallel(call: Callable, rows: Sequence[tuple], most: int) -> list:
    """[call(*row) for row in rows], at most `most` at a time.

    No further row begins after the first error. The threads end with the process, so a run that fails elsewhere does
    not wait for a server.
    """
    waiting: queue.SimpleQueue = queue.SimpleQueue()
    for place in enumerate(rows):
        waiting.put(place)
    done = [None] * len(rows)
    errors: list[Exception] = []

    def work() -> None:
        while not errors:
            try:
                place, row = waiting.get_nowait()
            except queue.Empty:
                return
            try:
                done[place] = call(*row)
            except Exception as error:
                errors.append(error)

    threads = [threading.Thread(target=work, daemon=True) for _ in range(min(most, len(rows)))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return done
