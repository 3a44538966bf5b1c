"""The output of a run in the terminal: progress, main metrics, errors."""

import logging
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

log = logging.getLogger(__name__)
SHOWN = ("objective/loss", "objective/score", "objective/kl", "rewards/accuracy", "eval/loss", "eval/accuracy")
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")  # all but tab and line feed


class Terminal:
    """A progress bar if stdout is a terminal, otherwise one line per step."""

    def __init__(self, name: str, num_steps: int, *, quiet: bool):
        self.console = Console(quiet=quiet, highlight=False)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self.progress = Progress(*columns, TextColumn("{task.fields[figures]}"), console=self.console)
        self.task = self.progress.add_task(name, total=num_steps, figures="")
        self.has_bar, self.live = self.console.is_terminal and num_steps > 0, False

    def show(self, step: int, figures: dict[str, float]) -> None:
        """Show the step's main metrics. The first call creates the bar: work before the first step has other bars."""
        if self.has_bar and not self.live:
            self.progress.start()
            self.live = True
        text = "  ".join(f"{name} {figures[name]:.4g}" for name in SHOWN if name in figures)
        if "perf/tokens_per_second" in figures:
            text += f"  {figures['perf/tokens_per_second']:.0f} tokens/s"
        self.progress.update(self.task, completed=step, figures=text)
        if text and not self.live:
            self.say(f"step {step}  {text}")

    @contextmanager
    def track(self, what: str, *, total: int) -> Iterator[Callable[..., None]]:
        """A progress bar for other long work of a run. Yields advance(n)."""
        task = self.progress.add_task(what, total=total, figures="")
        if self.console.is_terminal and not self.live:
            self.progress.start()
        try:
            yield lambda n=1: self.progress.advance(task, n)
        finally:
            if self.console.is_terminal and not self.live:
                self.progress.stop()
            self.progress.remove_task(task)

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        self.console.print(printable(text), markup=False, soft_wrap=True)

    def close(self) -> None:
        """Stop the bar and leave it on the screen."""
        if self.live:
            self.progress.stop()


class Output:
    """stdout whose reader may stop reading, as `| head` does: then nothing more is printed, and the run goes on."""

    def __init__(self, stream: TextIO):
        self.stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        try:
            return self.stream.write(text)
        except BrokenPipeError:
            self._discard()
        return len(text)

    def flush(self) -> None:
        try:
            self.stream.flush()
        except BrokenPipeError:
            self._discard()

    def _discard(self) -> None:
        """Send what is still buffered, and all that follows, to nowhere."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.stream.fileno())
        os.close(nowhere)


class RowProgress:
    """Progress over the rows of a data set: a bar on a terminal, else a line every EVERY seconds."""

    EVERY = 10.0  # seconds between two lines

    def __init__(self, what: str, total: int):
        self.what, self.total, self.rows, self.tokens = what, total, 0, 0
        console = Console(highlight=False)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("rows"))
        self.bar = Progress(*columns, TextColumn("{task.fields[speed]}"), TimeRemainingColumn(), console=console)
        self.task = self.bar.add_task(what, total=total, speed="")
        self.live = console.is_terminal
        self.started = self.last_print = time.monotonic()

    def __enter__(self) -> "RowProgress":
        if self.live:
            self.bar.start()
        return self

    def __exit__(self, *error) -> None:
        if self.live:
            self.bar.stop()

    def advance(self, rows: int, tokens: int) -> None:
        """Count `rows` more rows, which have `tokens` tokens."""
        self.rows, self.tokens, now = self.rows + rows, self.tokens + tokens, time.monotonic()
        per_second = self.tokens / max(now - self.started, 1e-9)
        self.bar.update(self.task, completed=self.rows, speed=f"{per_second:,.0f} tokens/s")
        if not self.live and now - self.last_print >= self.EVERY:
            self.last_print = now
            left = (now - self.started) * (self.total - self.rows) / self.rows
            log.info(
                "%s: %s of %s rows, %s tokens/s, %d s left",
                self.what,
                f"{self.rows:,}",
                f"{self.total:,}",
                f"{per_second:,.0f}",
                left,
            )


def complain(text: str) -> None:
    """Print a line on stderr."""
    print(printable(text), file=sys.stderr, flush=True)


def printable(text: str) -> str:
    """The text with control characters escaped, so that a sample cannot move the cursor or write to the clipboard."""
    return CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)
