"""A client that says what a file or a function says: for tests, dry runs and judges that are known."""

from collections.abc import Callable, Iterator

from data.records import read_jsonl
from generation.clients import Answer, Client, Request


class ScriptedClient(Client):
    """For tests and dry runs: `reply(request) -> text`."""

    def __init__(self, reply: Callable[[Request], str], *, model: str = "scripted", cache: str | None = None, **limits):
        super().__init__(model, cache=cache, **limits)
        self.reply = reply

    def _answer(self, requests: dict[str, Request]) -> Iterator[tuple[str, Answer]]:
        for key, request in requests.items():
            text = self.reply(request)
            words = sum(len((m["content"] or "").split()) for m in request.messages)
            yield key, Answer(text, "stop", words, len(text.split()))


def scripted_replies(path: str) -> Callable[[Request], str]:
    """Replies from JSONL rows `{"contains": TEXT, "answers": [..]}`: the first row whose text is in the conversation.

    Which of its answers is a function of the request's hash, so the same seed gives the same set.
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
