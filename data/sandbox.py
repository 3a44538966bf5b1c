"""The process in which chat templates are rendered (`data/template_process.py`), and its bounds in time and output."""

import json
import os
import selectors
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

SECONDS = 20.0  # for one request; a real template takes a thousandth of a second
MOST_BYTES = 1 << 28  # of one reply
_PROGRAM = Path(__file__).with_name("template_process.py")


class Stopped(ValueError):
    """The template did not end in time, answers too much, or took its process with it."""


class Rendering(NamedTuple):
    """`text` is None where the template failed with `error`; `spans` (start, end) are those of its generation tags."""

    text: str | None
    spans: list[tuple[int, int]]
    error: str | None


class _Process:
    """One helper process at a time, started at the first request and again after it had to be stopped."""

    def __init__(self):
        self.lock, self.child, self.owner = threading.Lock(), None, None

    def ask(self, request: dict) -> list[Rendering]:
        """Raises Stopped where the template does not end in time or answers too much."""
        body = json.dumps(request).encode()
        with self.lock:
            if self.child is None or self.owner != os.getpid():  # a forked process needs one of its own
                self.child = subprocess.Popen(
                    [sys.executable, "-I", str(_PROGRAM)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={}
                )
                self.owner = os.getpid()
                os.set_blocking(self.child.stdin.fileno(), False)
            try:
                replies = json.loads(self._exchange(struct.pack("<Q", len(body)) + body))
            except (TimeoutError, EOFError, BrokenPipeError) as error:
                self.stop()
                raise Stopped(f"the chat template was stopped: {error or 'its process ended'}") from None
            except BaseException:  # an interrupt halfway leaves a reply that nobody reads
                self.stop()
                raise
        return [Rendering(text, [tuple(span) for span in spans or []], error) for text, spans, error in replies]

    def stop(self) -> None:
        self.child.kill()
        self.child.wait()
        self.child.stdin.close()
        self.child.stdout.close()
        self.child = None

    def _exchange(self, message: bytes) -> bytes:
        """Sends the message and returns the reply, both within SECONDS."""
        ends = time.monotonic() + SECONDS
        sink, source = self.child.stdin.fileno(), self.child.stdout.fileno()
        left, reply, size = memoryview(message), bytearray(), 8
        with selectors.PollSelector() as selector:
            selector.register(sink, selectors.EVENT_WRITE)
            selector.register(source, selectors.EVENT_READ)
            while len(reply) < size:
                ready = selector.select(max(ends - time.monotonic(), 0))
                if not ready:
                    raise TimeoutError(f"it did not end within {SECONDS:g} seconds")
                for key, _ in ready:
                    if key.fd == sink:
                        left = left[os.write(sink, left[: 1 << 16]) :]
                        if not left:
                            selector.unregister(sink)
                        continue
                    piece = os.read(source, 1 << 20)
                    if not piece:
                        raise EOFError("its process ended, for want of memory or by its own fault")
                    reply += piece
                    if size == 8 and len(reply) >= 8:
                        size += struct.unpack("<Q", reply[:8])[0]
                        if size > MOST_BYTES:
                            raise TimeoutError(f"it answers with more than {MOST_BYTES:,} bytes")
        return bytes(reply[8:])


_process = _Process()


def render(
    template: str,
    messages: list[dict[str, Any]],
    tools: list[dict] | None,
    views: list[tuple[int, bool]],
    *,
    tokens: dict[str, str],
    date: str,
) -> list[Rendering]:
    """Renderings of the first n messages, with or without the assistant's header after them, for (n, asks) of `views`.

    `tokens` are the special tokens that the template may name (bos_token, ...), `date` the day (YYYY-MM-DD) that it is
    told. Raises Stopped where the template had to be stopped.
    """
    request = {"template": template, "messages": messages, "tools": tools, "views": views}
    return _process.ask(request | {"tokens": tokens, "date": date})
