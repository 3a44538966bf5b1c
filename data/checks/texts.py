"""The rows that a check reads: what people ask and what is answered, each with its FILE:LINE."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from data import formats
from data.chat_template import Message
from data.records import BadRows, Record, read_records


@dataclass(frozen=True)
class Row(Record):
    """A conversation; the last answer may be missing (a prompt)."""

    messages: list[Message]
    raw: dict = field(default_factory=dict)

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
        """All that the user says, as one text."""
        return "\n".join(self.asked)


def parse_row(row: dict) -> list[Row]:
    """Any row that the trainers or generate.py read: demonstrations, comparisons (the better side), prompts.

    A Self-Instruct seed task (`instruction`, `instances`) counts with its first instance; a plain `instruction` row
    (AlpacaEval, PandaLM) with its `input` and `output`.
    """
    if "instruction" in row:
        messages = _instruction(row)
    elif "messages" in row or ("prompt" in row and "completion" in row and "reward" not in row):
        messages = formats.examples(row)[0].messages
    else:
        messages = formats.prompts(row)[0].prompt
        answer = row.get("chosen")
        messages = [*messages, {"role": "assistant", "content": answer}] if isinstance(answer, str) else messages
    if not any(m["role"] == "user" and m["content"].strip() for m in messages):
        raise ValueError("no user message with text in it")
    return [Row(messages, row)]


def read_rows(files: Sequence[str], bad_rows: BadRows) -> list[Row]:
    """The rows of all files, in order."""
    rows = [row for file in files for row in read_records(file, parse_row, bad_rows)]
    if not rows:
        raise ValueError(f"no row of {', '.join(files)} can be used; the first was skipped for: {bad_rows.skipped[0]}")
    return rows


def _instruction(row: dict) -> list[Message]:
    instances = row.get("instances") or [row]
    if not isinstance(instances, list) or not isinstance(instances[0], dict):
        raise ValueError("instances must be a list of {input, output}")
    first = instances[0]
    given, output = first.get("input") or "", first.get("output") or ""
    if not all(isinstance(text, str) for text in (row["instruction"], given, output)):
        raise ValueError("instruction, input and output must be text")
    user = f"{row['instruction']}\n\n{given}" if given else row["instruction"]
    messages = [{"role": "user", "content": user}]
    return [*messages, {"role": "assistant", "content": output}] if output else messages
