"""What the methods share: few-shot chats, the rows and the manifest they write."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import NamedTuple

from generation.clients import Answer, Client, Conversation, hash_json

TRY = 7919  # between the seeds of two tries: far from those of neighbouring turns


@dataclass
class Drops:
    """The dropped texts with their reasons: the rows of dropped.jsonl."""

    rows: list[dict] = field(default_factory=list)

    def add(self, reason: str, text: str = "", **about) -> None:
        """Add a dropped text. `about`: further columns of the row, such as the prompt."""
        self.rows.append({"reason": reason, "text": text, **about})

    @property
    def counts(self) -> Counter:
        """By reason."""
        return Counter(row["reason"] for row in self.rows)


@dataclass
class GeneratedData:
    """The result of a method: data rows, dropped texts, and further facts for the manifest."""

    rows: list[dict]
    drops: Drops = field(default_factory=Drops)
    facts: dict = field(default_factory=dict)


class Fault(NamedTuple):
    """The reason why an answer cannot be used, and its text."""

    reason: str
    text: str


def provenance(method: str, prompts: list, model: str | list[str], seed: int, parents: list[str]) -> dict:
    """Where a row comes from. `prompts_hash`: sha256 of the messages that were asked; `parents`: ids it builds on."""
    return {"method": method, "prompts_hash": hash_json(prompts), "model": model, "seed": seed, "parents": parents}


def row_id(method: str, content) -> str:
    """An id that depends only on the method and the content, so it is the same in every run."""
    return f"{method}/{hash_json(content)[:16]}"


def manifest(
    method: str, made: GeneratedData, clients: dict[str, Client], settings: dict, *, seed: int, license: str
) -> dict:
    """The manifest: numbers of rows and drops, models, cost, license. Trainers and judges read it."""
    return {
        "method": method,
        "rows": len(made.rows),
        "seed": seed,
        "models": {role: client.model for role, client in clients.items()},
        "license": license,
        "drops": dict(sorted(made.drops.counts.items())),
        "dropped": len(made.drops.rows),
        **made.facts,
        "usage": {role: asdict(client.usage) for role, client in clients.items()},
        "cost": sum(client.usage.cost for client in clients.values()),
        "settings": settings,
    }


def few_shot(turns: list[tuple[str, str]], last: str) -> Conversation:
    """A chat whose earlier turns are the examples: small chat models follow it better than a list in one message."""
    messages = [message for user, assistant in turns for message in (("user", user), ("assistant", assistant))]
    return [{"role": role, "content": content} for role, content in [*messages, ("user", last)]]


class Asking(NamedTuple):
    """How `ask_until` asks."""

    temperature: float | None
    max_tokens: int  # of an answer
    max_tries: int = 1  # for an item
    whole: bool = True  # whether an answer that was cut at max_tokens is a fault


def ask_until(
    client: Client, items: Sequence, prompt: Callable, read: Callable, asking: Asking, *, seeds: Sequence[int]
) -> list[Fault | None]:
    """Ask `prompt(item)` for each item, with a new seed each time, until `read(item, answer)` returns None.

    `read` uses the answer and returns None, or it returns the reason why it cannot be used. Answers that were refused,
    filtered, empty or (with `asking.whole`) cut are not passed to it. Returns for each item None or the fault of its
    last try.
    """
    faults: list[Fault | None] = [None] * len(items)
    waiting = list(range(len(items)))
    for attempt in range(asking.max_tries):
        asked = [prompt(items[i]) for i in waiting]
        own = [seeds[i] + TRY * attempt for i in waiting]
        answers = client.ask(asked, temperature=asking.temperature, max_tokens=asking.max_tokens, seed=own)
        for i, answer in zip(waiting, answers, strict=True):
            reason = answer_fault(answer, whole=asking.whole) or read(items[i], answer)
            faults[i] = Fault(reason, answer.text or answer.error) if reason else None
        waiting = [i for i in waiting if faults[i]]
    return faults


def answer_fault(answer: Answer, *, whole: bool) -> str | None:
    """The reason why an answer cannot be used: refused, failed, filtered, cut or empty. None if it can be used."""
    if answer.missing or answer.finish_reason == "content_filter":
        reasons = {"refused": "refused_by_endpoint", "failed": "no_answer_from_endpoint"}
        return reasons.get(answer.finish_reason, "filtered_by_endpoint")
    if whole and answer.finish_reason == "length":
        return "answer_cut"
    return None if answer.text.strip() else "answer_empty"
