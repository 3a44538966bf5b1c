"""Progress lines of data generation: the share done, the time left, rows kept and dropped, and the cost so far."""

import time
from collections import Counter
from collections.abc import Callable, Sequence

EVERY = 10.0  # seconds between two lines


class Progress:
    """Prints a line every EVERY seconds. Methods report their steps, and clients their answers.

    Args:
        say: prints a line; None prints nothing. clients: their answers, tokens and cost are counted.
    """

    def __init__(self, say: Callable[[str], None] | None = None, clients: Sequence = ()):
        self.say, self.clients = say, clients
        self.kept, self.done, self.step = 0, 0.0, 1.0
        self.drops: Counter[str] = Counter()
        self._start = self._last = time.monotonic()
        for client in clients:
            client.on_answer = self.answered

    def at(self, done: float, total: float, *, kept: int, drops: Counter) -> None:
        """Report that `done` of `total` steps are complete, with `kept` rows and `drops` by reason so far."""
        self.done, self.step, self.kept, self.drops = done / total, 1 / total, kept, drops
        self._due(self.done)

    def answered(self, number: int, total: int) -> None:
        """Report that answer `number` of the `total` of the current step has arrived."""
        self._due(min(1.0, self.done + self.step * number / total))

    def _due(self, share: float) -> None:
        now = time.monotonic()
        if self.say is None or now - self._last < EVERY:
            return
        self._last = now
        self.say(self.line(share, now - self._start))

    def line(self, share: float, seconds: float) -> str:
        """`34% done, about 2:10 left: 12 rows kept, 5 dropped (too_similar 4, refusal 1), 96 answers, cost 0.0213`."""
        left = f", about {_clock(seconds * (1 - share) / share)} left" if share > 0 else ""
        reasons = ", ".join(f"{reason} {count}" for reason, count in self.drops.most_common(4))
        dropped = f"{self.drops.total()} dropped" + (f" ({reasons})" if reasons else "")
        used = [client.usage for client in self.clients]
        answers, cost = sum(one.answers for one in used), sum(one.cost for one in used)
        missing = sum(one.refused + one.failed for one in used)
        without = f", {missing} requests without an answer" if missing else ""
        return f"{share:.0%} done{left}: {self.kept} rows kept, {dropped}, {answers} answers{without}, cost {cost:.4f}"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
