"""Limits for visitors: messages per minute and the length of a text."""

import threading
import time
from collections import deque


class Limits:
    """Checks the limits. Every method raises ValueError with a sentence for the visitor."""

    def __init__(self, *, messages_per_minute: int, max_characters: int):
        self.messages_per_minute, self.max_characters = messages_per_minute, max_characters
        self._recent: dict[str, deque[float]] = {}
        self._lock = threading.Lock()

    def check_text(self, text: str) -> str:
        """The text without white space around it."""
        text = text.strip()
        if not text:
            raise ValueError("Please write something first.")
        if len(text) > self.max_characters:
            raise ValueError(f"That is {len(text)} characters; at most {self.max_characters} are allowed.")
        return text

    def spend(self, visitor: str) -> None:
        """Count a message of this visitor."""
        now = time.monotonic()
        with self._lock:
            for name in [name for name, times in self._recent.items() if now - times[-1] > 60]:
                del self._recent[name]
            times = self._recent.setdefault(visitor, deque())
            while times and now - times[0] > 60:
                times.popleft()
            if len(times) >= self.messages_per_minute:
                wait = 60 - (now - times[0])
                raise ValueError(
                    f"At most {self.messages_per_minute} messages a minute; try again in {wait:.0f} seconds."
                )
            times.append(now)
