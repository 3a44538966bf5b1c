"""The rows of the checks: user and assistant texts, each with its FILE:LINE."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from data import formats
from data.adapters import Layout
from data.chat_template import Message
from data.records import BadRows, Comparison, Example, Prompt, Ranking, Rated, Record, read_records


@dataclass(frozen=True)
class TextRow(Record):
    """A conversation. The last answer may be missing (a prompt). `raw` is the row as the trainers read it.

    `weaker` is the answer that lost, or the last one of a ranking. None without a comparison.
    """

    messages: list[Message]
    raw: dict = field(default_factory=dict)
    weaker: str | None = None

    @property
    def asked(self) -> list[str]:
        """The user's messages."""
        return [m["content"] for m in self.messages if m["role"] == "user"]

    @property
    def answered(self) -> list[str]:
        """The assistant's messages."""
        return [m["content"] for m in self.messages if m["role"] == "assistant"]

    @property
    def prompt(self) -> str:
        """All user messages as one text."""
        return "\n".join(self.asked)

    @property
    def later_turns(self) -> list[str]:
        """The later turns of a benchmark's question (MT-Bench's second turn)."""
        return self.raw.get("later_turns") or []

    def questions(self, min_words: int) -> list[str]:
        """The texts to compare: the prompt, and each user message or later turn of at least `min_words` words."""
        alone = [text for text in (*self.asked, *self.later_turns) if len(text.split()) >= min_words]
        return list(dict.fromkeys([self.prompt, *alone]))


def parse_row(row: dict) -> list[TextRow]:
    """Any row that the trainers or generate.py read: of a comparison the better side, of a ranking the best one."""
    rows = [TextRow(_said(record), formats.as_row(record), _weaker(record)) for record in formats.any_record(row)]
    for found in rows:
        if not any(text.strip() for text in found.asked):
            raise ValueError("no user message with text in it")
    return rows


def read_texts(files: Sequence[str], bad_rows: BadRows, layout: Layout | None = None) -> list[TextRow]:
    """The rows of all files, in order."""
    rows = [row for file in files for row in read_records(file, parse_row, bad_rows, layout)]
    if not rows:
        raise ValueError(f"no row of {', '.join(files)} can be used: {bad_rows.why}")
    return rows


def _said(record: Record) -> list[Message]:
    if isinstance(record, Example):
        return record.messages
    if isinstance(record, Comparison):
        answer = record.chosen
    elif isinstance(record, Ranking):
        answer = record.completions[record.ranks.index(min(record.ranks))]
    elif isinstance(record, Rated):
        answer = record.completion
    else:
        assert isinstance(record, Prompt)
        return record.prompt
    return [*record.prompt, {"role": "assistant", "content": answer}]


def _weaker(record: Record) -> str | None:
    if isinstance(record, Comparison):
        return record.rejected
    return record.completions[record.ranks.index(max(record.ranks))] if isinstance(record, Ranking) else None
