"""Processes that run a checkpoint's template and tokenizer with limits on time and output: `data/template_process.py`
and `data/tokenizer_process.py`.
"""

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

# limit for one request; a real template takes about a millisecond, a text of a megabyte one or two seconds
SECONDS = 20.0
MOST_BYTES = 1 << 28  # limit for one reply
HERE = Path(__file__).parent


class Stopped(ValueError):
    """The work did not end in time, its output was too large, or its process ended."""


class Rendering(NamedTuple):
    """`text` is None if the template failed with `error`. `spans` (start, end) are those of its generation tags."""

    text: str | None
    spans: list[tuple[int, int]]
    error: str | None


class _Process:
    """One helper process at a time. It starts at the first request, and again after it had to be stopped.

    Args:
        program: a file of this folder. what: its task, for error messages.
    """

    def __init__(self, program: str, what: str):
        self.program, self.what = HERE / program, what
        self.lock = threading.Lock()
        self.child: subprocess.Popen[bytes] | None = None
        self.owner: int | None = None
        self.known: dict[str, int] = {}  # texts that the process has -> their numbers there

    def ask(self, request: dict, text: str):
        """The reply, from JSON, to a request about `text`, a template or a tokenizer, which is sent once.

        Raises Stopped if the reply is late or too long.
        """
        with self.lock:
            if self.child is None or self.owner != os.getpid():  # a forked process needs its own helper process
                self.child = subprocess.Popen(
                    [sys.executable, "-I", str(self.program)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={}
                )
                self.owner = os.getpid()
                os.set_blocking(self.child.stdin.fileno(), False)
                self.known = {}
            try:
                if text not in self.known:
                    self._exchange({"text": text})
                    self.known[text] = len(self.known)
                return self._exchange(request | {"about": self.known[text]})
            except (TimeoutError, EOFError, BrokenPipeError) as error:
                self.stop()
                raise Stopped(f"the {self.what} was stopped: {error or 'its process ended'}") from None
            except BaseException:  # after an interrupt, a reply that was not read may be in the pipe
                self.stop()
                raise

    def stop(self) -> None:
        self.child.kill()
        self.child.wait()
        self.child.stdin.close()
        self.child.stdout.close()
        self.child = None

    def _exchange(self, request: dict):
        """Sends the request and returns the reply, both within SECONDS."""
        ends, body = time.monotonic() + SECONDS, json.dumps(request).encode()
        message = struct.pack("<Q", len(body)) + body
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
                        raise EOFError("its process ended, because memory ran out or it crashed")
                    reply += piece
                    if size == 8 and len(reply) >= 8:
                        size += struct.unpack("<Q", reply[:8])[0]
                        if size > MOST_BYTES:
                            raise TimeoutError(f"its reply has more than {MOST_BYTES:,} bytes")
        return json.loads(reply[8:])


_templates = _Process("template_process.py", "chat template")


def render(
    template: str,
    messages: list[dict[str, Any]],
    tools: list[dict] | None,
    views: list[tuple[int, bool]],
    *,
    tokens: dict[str, str],
    date: str,
) -> list[Rendering]:
    """Renderings of the first n messages, for (n, asks) of `views`: with the assistant's header at the end if `asks`.

    `tokens` are the special tokens that the template may use (bos_token, ...). `date` is today's date for the template
    (YYYY-MM-DD). Raises Stopped if the template had to be stopped.
    """
    request = {"messages": messages, "tools": tools, "views": views, "tokens": tokens, "date": date}
    replies = _templates.ask(request, template)
    return [Rendering(text, [tuple(span) for span in spans or []], error) for text, spans, error in replies]


class BoundedTokenizer:
    """A tokenizer's encoding in its own process, for tokenizers whose patterns may take very long on some texts."""

    def __init__(self, backend):
        self.process, self.text = _Process("tokenizer_process.py", "tokenizer"), backend.to_str()

    def encode(self, text: str, specials: bool) -> tuple[list[int], list[tuple[int, int]]]:
        """As `tokenizer_process.encode`.

        Raises Stopped if the text takes too long, ValueError if the encoding fails.
        """
        ids, places = self._ask("encode", text, specials)
        return ids, [tuple(place) for place in places]

    def encode_text(self, text: str) -> list[int]:
        """As `tokenizer_process.encode_text`, with the same errors."""
        return self._ask("encode_text", text)

    def encode_letters(self, text: str) -> list[int]:
        """As `tokenizer_process.encode_letters`, with the same errors."""
        return self._ask("encode_letters", text)

    def _ask(self, name: str, *words):
        found, error = self.process.ask({"name": name, "words": words}, self.text)
        if error:
            raise ValueError(f"the tokenizer failed on a text: {error}")
        return found
