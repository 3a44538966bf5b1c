"""A client whose answers come from a file or a function: for tests, dry runs and judges with known verdicts."""

from collections.abc import Callable, Iterator

from data.records import read_jsonl
from generation.clients import Answer, Client, Request


class ScriptedClient(Client):
    """Answers each request with `reply(request)`, a text."""

    def __init__(self, reply: Callable[[Request], str], *, model: str = "scripted", cache: str | None = None, **limits):
        super().__init__(model, cache=cache, **limits)
        self.reply = reply

    def _answer(self, requests: dict[str, Request]) -> Iterator[tuple[str, Answer]]:
        for key, request in requests.items():
            text = self.reply(request)
            words = sum(len((m["content"] or "").split()) for m in request.messages)
            yield key, Answer(text, "stop", words, len(text.split()))


def scripted_replies(path: str) -> Callable[[Request], str]:
    """Replies from JSONL rows `{"contains": TEXT, "answers": [..]}`. The first row whose TEXT is in the conversation
    answers. The request's hash selects one of its answers, so equal requests get equal answers.
    """
    rules = read_jsonl(path)
    if any(not {"contains", "answers"} <= set(rule) or not rule["answers"] for rule in rules) or not rules:
        raise ValueError(f'{path}: each line must be {{"contains": TEXT, "answers": [TEXT, ..]}} with an answer')

    def reply(request: Request) -> str:
        text = "\n".join(message["content"] or "" for message in request.messages)
        rule = next((rule for rule in rules if rule["contains"] in text), None)
        if rule is None:
            raise ValueError(f'{path} has no line whose "contains" is in: {text[-200:]!r}; end it with "contains": ""')
        return rule["answers"][int(request.key[:12], 16) % len(rule["answers"])]

    return reply
