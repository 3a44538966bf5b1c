"""Ask a language model: requests, answers, and the client that caches every answer on disk.

An answer is a function of (model, conversation, settings, seed), and their hash is the key of the cache. Each answer is
stored when it arrives, so a killed run can be resumed and asks nothing twice.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, replace

from generation.answer_store import AnswerStore
from runtime.config import check_whole

Conversation = list[
    dict[str, str]
]  # a last user message whose content is None is the user's turn to come: it is asked for
MOST_TOKENS = 2**31  # no text has more
FINISH_REASONS = ("stop", "length", "content_filter", "refused", "failed")
_TAG = r"think|thinking|reasoning"
_THOUGHT = re.compile(rf"\s*<({_TAG})>(.*?)(?:</\1>|\Z)", re.DOTALL | re.IGNORECASE)
_THOUGHT_OPENED_BY_TEMPLATE = re.compile(rf"(.*?)</(?:{_TAG})>[ \t]*(?:\n|\Z)", re.DOTALL | re.IGNORECASE)


@dataclass(frozen=True)
class Answer:
    """An answer of a model.

    `finish_reason`: stop, length, content_filter, refused (the endpoint rejected this request) or failed (no usable
    reply arrived). The last two have no text and count as missing. The next run asks these requests again.
    """

    text: str
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int
    error: str = ""  # the endpoint's message when it refused or failed
    reasoning: str = ""  # the model's thinking before the answer; not part of `text`
    model: str = ""  # the server's name of the model
    counted_by_us: bool = False  # the server returned no token counts, and these are upper bounds
    top_logprobs: str = ""  # JSON of {token: log-probability} of the likely first tokens, if requested

    @property
    def missing(self) -> bool:
        """Whether there is no answer."""
        return self.finish_reason in ("refused", "failed")


@dataclass(frozen=True)
class Request:
    """One request, with everything that the answer depends on."""

    model: str
    messages: Conversation
    temperature: float | None  # None: the server's own
    max_tokens: int  # thinking included
    seed: int
    stop: tuple[str, ...]
    schema: dict | None = None  # JSON schema of the answer, for servers that hold to one
    options: dict = field(default_factory=dict)  # of the client: the endpoint's address, its own parameters

    @property
    def key(self) -> str:
        """sha256 of the canonical JSON: the name of the answer on disk."""
        return hash_json(asdict(self))


@dataclass
class Usage:
    """The usage of a run. Cached answers count in tokens and cost, so a resumed run reports the total."""

    answers: int = 0
    from_cache: int = 0
    asked: int = 0
    retries: int = 0
    refused: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    counted_by_us: int = 0  # answers without token counts: one token per byte is assumed
    cost: float = 0.0
    left_out: list[str] = field(default_factory=list)  # parameters that the server refused and that were left out then
    served_by: dict[str, int] = field(default_factory=dict)  # the server's name of the model -> number of answers


class Client:
    """The interface that methods, checks and judges use. A subclass answers the requests that are not in the cache.

    Args:
        model: name under which answers are cached; another model must have another name.
        cache: directory of the answers, or None to keep none.
        prompt_price, completion_price: currency units per million tokens.
        max_cost: the run stops before a request that could pass it; None = no limit.
        thinking_tokens: added to every `max_tokens`, for models that think before they answer.
    """

    def __init__(
        self, model: str, *, cache: str | None, prompt_price=0.0, completion_price=0.0, max_cost=None, thinking_tokens=0
    ):
        check_whole(0, client__thinking_tokens=thinking_tokens)
        if min(prompt_price, completion_price) < 0 or (max_cost is not None and max_cost <= 0):
            raise ValueError(
                f"prices must be >= 0 and max_cost > 0, got {prompt_price=} {completion_price=} {max_cost=}"
            )
        self.model, self.usage, self.max_cost = model, Usage(), max_cost
        self.prices = (prompt_price / 1e6, completion_price / 1e6)
        self.thinking_tokens = thinking_tokens
        self.options: dict = {}  # what a subclass adds to every request
        self.on_answer: Callable[[int, int], None] = lambda number, total: None  # called for each answer of an `ask`
        self._counted: set[str] = set()
        self._store = AnswerStore(cache) if cache is not None else None

    def ask(
        self,
        conversations: Sequence[Conversation],
        *,
        temperature: float | None,
        max_tokens: int,
        seed: int | Sequence[int],
        stop: Sequence[str] = (),
        schema: dict | None = None,
        top_logprobs: int = 0,
    ) -> list[Answer]:
        """One answer per conversation, in order. Equal requests share an answer.

        Args:
            seed: one for all, or one per conversation.
            schema: request JSON that fits it. A server that does not support this may answer any text.
            top_logprobs: request the log-probabilities of so many likely first tokens.
        Raises:
            ValueError: a setting is wrong, the cost limit is reached, or the endpoint stays unreachable. Answers that
                arrived are kept.
        """
        requests = self._requests(
            conversations, temperature=temperature, max_tokens=max_tokens, seed=seed, stop=stop, schema=schema,
            top_logprobs=top_logprobs,
        )  # fmt: skip
        keys = [request.key for request in requests]
        answers = {key: answer for key in dict.fromkeys(keys) if (answer := self._recall(key)) is not None}
        missing = {key: request for key, request in zip(keys, requests, strict=True) if key not in answers}
        for key in answers:
            self._count(key, answers[key], fresh=False)
        for key, raw in self._answer(missing) if missing else ():
            answers[key] = answer = tidy(raw)
            if not answer.missing and self._store is not None:
                self._store.put(key, asdict(answer))
            self._count(key, answer, fresh=True)
            self.on_answer(len(answers), len(set(keys)))
        return [answers[key] for key in keys]

    def not_answered(self, conversations: Sequence[Conversation], **settings) -> list[Conversation]:
        """The conversations without a cached answer, each once: those that `ask` with these settings would pay for."""
        requests = {request.key: request for request in self._requests(conversations, **settings)}
        return [request.messages for key, request in requests.items() if self._recall(key) is None]

    def _requests(
        self,
        conversations: Sequence[Conversation],
        *,
        temperature: float | None,
        max_tokens: int,
        seed: int | Sequence[int],
        stop: Sequence[str] = (),
        schema: dict | None = None,
        top_logprobs: int = 0,
    ) -> list[Request]:
        if (temperature is not None and temperature < 0) or max_tokens < 1:
            raise ValueError(f"need temperature >= 0 and max_tokens >= 1, got {temperature=}, {max_tokens=}")
        seeds = [seed] * len(conversations) if isinstance(seed, int) else seed
        temperature = None if temperature is None else float(temperature)
        budget = int(max_tokens) + self.thinking_tokens
        options = self.options | ({"top_logprobs": int(top_logprobs)} if top_logprobs else {})
        return [
            Request(self.model, list(messages), temperature, budget, int(own), tuple(stop), schema, options)
            for messages, own in zip(conversations, seeds, strict=True)
        ]

    def cost_bound(self, conversations: Sequence[Conversation], *, max_tokens: int) -> float:
        """An upper bound of the cost of asking these once, as a token has at least one byte."""
        return sum(self._bound(messages, max_tokens + self.thinking_tokens) for messages in conversations)

    def remember(self, name: str, value: dict | None) -> None:
        """Store a note of the client beside the answers. None deletes it."""
        if self._store is not None:
            self._store.put(name, value)

    def remembered(self, name: str) -> dict | None:
        """The note of that name, or None."""
        return self._store.get(name) if self._store is not None else None

    def close(self) -> None:
        """Close the cache file. The next request opens it again."""
        if self._store is not None:
            self._store.close()

    def _answer(self, requests: dict[str, Request]) -> Iterator[tuple[str, Answer]]:
        """Yield (key, answer) as they arrive. Subclasses implement only this method."""
        raise TypeError("Client is an interface; use OpenAIClient, LocalClient or ScriptedClient")

    def _recall(self, key: str) -> Answer | None:
        found = self._store.get(key) if self._store is not None else None
        if found is None:
            return None
        if not _is_answer(found):
            raise ValueError(f"{self._store.path}: the entry {key[:16]} is no answer; move the file away")
        return Answer(**found)

    def _count(self, key: str, answer: Answer, *, fresh: bool) -> None:
        self.usage.asked += fresh
        self.usage.refused += answer.finish_reason == "refused"
        self.usage.failed += answer.finish_reason == "failed"
        if key in self._counted:  # the same request in a later call costs nothing
            return
        if not answer.missing:
            self._counted.add(key)
            self.usage.answers += 1
            self.usage.from_cache += not fresh
            name = answer.model or "unknown"
            self.usage.served_by[name] = self.usage.served_by.get(name, 0) + 1
        self.usage.counted_by_us += answer.counted_by_us
        self.usage.prompt_tokens += answer.prompt_tokens
        self.usage.completion_tokens += answer.completion_tokens
        self.usage.cost += self._price(answer)

    def _price(self, answer: Answer) -> float:
        return answer.prompt_tokens * self.prices[0] + answer.completion_tokens * self.prices[1]

    def _bound(self, messages: Conversation, max_tokens: int) -> float:
        return most_tokens(messages) * self.prices[0] + max_tokens * self.prices[1]


def tidy(answer: Answer) -> Answer:
    """The answer with its thinking moved into `reasoning`. It is `failed` if its text is not valid Unicode."""
    try:
        f"{answer.text}{answer.reasoning}".encode()
    except UnicodeEncodeError as error:  # JSON may hold half a surrogate pair, a file may not
        return replace(answer, text="", reasoning="", finish_reason="failed", error=f"the text is no Unicode: {error}")
    thought, text = split_reasoning(answer.text)
    return replace(answer, text=text, reasoning=answer.reasoning or thought) if thought is not None else answer


def split_reasoning(text: str) -> tuple[str | None, str]:
    """(the text in <think> tags at the beginning, the rest). The first is None if there are no tags.

    Some templates open the tag in the prompt, so the text may have only the closing tag. If the thinking was cut, the
    rest is empty.
    """
    found = _THOUGHT.match(text)
    if found:
        return found.group(2).strip(), text[found.end() :].strip()
    found = _THOUGHT_OPENED_BY_TEMPLATE.match(text)
    return (found.group(1).strip(), text[found.end() :].strip()) if found else (None, text)


def most_tokens(messages: Conversation) -> int:
    """An upper bound of the tokens of a prompt: one per byte, and those of a template."""
    return sum(len((m["content"] or "").encode()) + 16 for m in messages) + 16


def _is_answer(row: object) -> bool:
    """Whether a stored object has the fields of an answer with the right types, as the file may come from elsewhere."""
    kinds = {one.name: one.type for one in fields(Answer)}
    return (
        isinstance(row, dict)
        and row.keys() | {"top_logprobs"} == kinds.keys()  # answers that were kept without being asked for them
        and all(type(value) is kinds[name] for name, value in row.items())
        and row["finish_reason"] in FINISH_REASONS
        and min(row["prompt_tokens"], row["completion_tokens"]) >= 0
        and max(row["prompt_tokens"], row["completion_tokens"]) < MOST_TOKENS
        and not any(
            re.search("[\ud800-\udfff]", row[name]) for name, kind in kinds.items() if kind is str and name in row
        )
    )


def hash_json(value) -> str:
    """sha256 of the canonical JSON of a value: the same on every machine and in every run."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()
