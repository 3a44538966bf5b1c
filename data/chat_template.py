"""A model's chat template: its own Jinja, rendered as transformers does, with the spans of what the assistant says.

Three things are known of a rendering that the text alone does not tell. What people wrote: tokens that the template
uses as markers are wrapped in noncharacters wherever a message holds them, so that they stay text. What must be
learned: from the end of each generation prompt to the stop token, or what the template's `{% generation %}` tags hold.
And that nothing was lost: once per kind of conversation it is rendered with a mark in place of every text.
"""

import itertools
import json
import os
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from data.sandbox import Rendering, render

Message = dict[str, Any]  # {"role", "content"} and what data/records.py lets through
OPEN, CLOSE = "\ufdd0", "\ufdd1"  # noncharacters: no text may hold them
FIXED_DATE = "2026-01-01"  # what a template that asks for today's date is told where no config does
MARKED = re.compile(f"{OPEN}([^{OPEN}{CLOSE}]*){CLOSE}|[{OPEN}{CLOSE}]")  # what somebody wrote, or a lone mark
_MARK = re.compile(f"{OPEN}(\\d+){CLOSE}")
_REASONING = ("reasoning_content", "thinking", "reasoning")
_PLUMBING = ("weight", "train", "written")


class Spelled(NamedTuple):
    """A conversation as text. `targets` are (start, end) of what is to be learned.

    `apart`: a target begins where a generation prompt ends, so that its first token must begin there too.
    """

    text: str
    targets: list[tuple[int, int]]
    apart: bool = True


class ChatTemplate:
    """Jinja texts by name ("default", and "tool_use" where a model has one for tools), and how to read them.

    `tokens` are the special tokens that Jinja may name (bos_token, ...), `date` is the day that it is told. Every
    method raises ValueError where a conversation cannot be written without loss.
    """

    def __init__(self, jinja: dict[str, str], *, tokens: dict[str, str], date: str):
        self.jinja, self.tokens, self.date = jinja, tokens, date
        self.control: set[str] = set()
        self.stops: list[str] = []
        self.header = ""  # what the assistant's turn begins with
        self.checked: dict[str, list[int]] = {}  # kinds of conversation that lose nothing -> whose each span is
        self.tagged = {name: bool(_GENERATION.search(text)) for name, text in jinja.items()}

    def prompt(self, messages: list[Message], tools: list[dict] | None = None) -> str:
        """The conversation and the header of the assistant turn to come."""
        return self._spell(messages, tools, None).text

    def conversation(self, messages: list[Message], tools: list[dict] | None = None) -> Spelled:
        """The whole conversation and its targets: assistant turns but those of weight 0 or train false."""
        targets = [i for i, message in enumerate(messages) if is_target(message)]
        return self._spell(messages, tools, targets, tagged=self.tagged[self._name(tools)])

    def answer(self, messages: list[Message], tools: list[dict] | None = None) -> Spelled:
        """The conversation with one target, its last turn, which begins where `prompt` of the others ends."""
        return self._spell(messages, tools, [len(messages) - 1])

    def mark(self, text: str) -> str:
        """The text with every control token in it between OPEN and CLOSE."""
        if OPEN in text or CLOSE in text:
            raise ValueError("a text holds U+FDD0 or U+FDD1, which are no characters; take them out")
        if not self.control:
            return text
        pieces, start = [], 0
        for at in (found.start() for found in self._first.finditer(text)):
            found = at >= start and next((n for n in self._lengths if text[at : at + n] in self.control), 0)
            if found:
                pieces += [text[start:at], OPEN, text[at : at + found], CLOSE]
                start = at + found
        return "".join([*pieces, text[start:]]) if pieces else text

    def set_tokens(self, control: set[str], stops: list[str]) -> None:
        """What no text may become, and what ends a turn."""
        self.control, self.stops = control, stops
        self._lengths = sorted({len(token) for token in control}, reverse=True)
        self._first = re.compile("[" + "".join(map(re.escape, sorted({token[0] for token in control}))) + "]")
        marked = f"{OPEN}[^{OPEN}{CLOSE}]*{CLOSE}"
        self._stop = re.compile("|".join([marked, *(f"({re.escape(s)})" for s in sorted(stops, key=len)[::-1])]))

    def probe(self, added: list[str]) -> tuple[str | None, set[str]]:
        """(the token that ends an assistant turn, the tokens that open and close turns), of the added ones.

        Some files do not call these special. The first added token after an answer ends it; the ones beside what a user
        says and at the beginning of the assistant's header are markers. Thinking is a part of answers, so its tags are
        none.
        """
        written = [name for name in added if name.strip(" \n\t\r▁") and "think" not in name.lower()]
        token = re.compile("|".join(map(re.escape, sorted(written, key=len)[::-1])) or "(?!)")
        for first in ([], [{"role": "system", "content": "system"}]):  # some templates ask for a system message
            said = [*first, {"role": "user", "content": f"{OPEN}0{CLOSE}"}]
            said.append({"role": "assistant", "content": f"{OPEN}1{CLOSE}"})
            views = [(len(said) - 1, False), (len(said) - 1, True), (len(said), False)]
            asked, header, whole = self.render(said, None, views)
            if not (asked.error or header.error or whole.error) and f"{OPEN}0{CLOSE}" in header.text:
                break
        else:
            return None, set()
        self.header = header.text.removeprefix(os.path.commonprefix([asked.text, header.text]))
        before, after = header.text.split(f"{OPEN}0{CLOSE}", 1)
        answered = whole.text.partition(f"{OPEN}1{CLOSE}")[2]
        stop = next(iter(token.findall(answered)), None)
        found = [*token.findall(before)[-1:], *token.findall(after)[:1], *token.findall(self.header)[:1]]
        return stop, {*found, *([stop] if stop else [])}

    def render(self, messages, tools: list[dict] | None, views: list[tuple[int, bool]]) -> list[Rendering]:
        """One Rendering per (number of messages, whether the assistant's header follows)."""
        return render(self.jinja[self._name(tools)], messages, tools, views, tokens=self.tokens, date=self.date)

    def _name(self, tools: list[dict] | None) -> str:
        return "tool_use" if tools and "tool_use" in self.jinja else "default"

    def _spell(self, messages, tools, targets: list[int] | None, *, tagged: bool = False) -> Spelled:
        """The first way of writing the messages that loses nothing. Without targets the assistant's turn is to come."""
        problem = None
        for taken in _ways([_for_template(message) for message in messages]):
            try:
                return self._write(taken, tools, targets, tagged)
            except ValueError as error:
                problem = problem or error
        raise problem

    def _write(self, messages, tools, targets: list[int] | None, tagged: bool) -> Spelled:
        kind = json.dumps([_shape(messages), _shape(tools), targets, tagged])
        if kind not in self.checked:
            self.checked[kind] = self._check_nothing_is_lost(messages, tools, targets, tagged)
        marked, marked_tools = _leaves(messages, self.mark), _leaves(tools, self.mark)
        spelled = self._spans(marked, marked_tools, targets, tagged)
        if len(spelled.targets) != len(self.checked[kind]):
            raise ValueError(f"the chat template's generation tags depend on what is said; {_OTHER}")
        for i in targets or []:
            own = [span for span, owner in zip(spelled.targets, self.checked[kind], strict=True) if owner == i]
            span = _dense("".join(spelled.text[max(start - len(self.header), 0) : end] for start, end in own))
            for name, text in _said(marked[i]):
                forms = (text, json.dumps(text, ensure_ascii=False)[1:-1]) if name == "tool_calls" else (text,)
                if not any(_dense(form) in span for form in forms):
                    raise ValueError(_lost(i, messages, name))
        learned = zip(spelled.targets, self.checked[kind], strict=True)
        return Spelled(spelled.text, [span for span, owner in learned if owner in (targets or [])], not tagged)

    def _spans(self, messages, tools, targets: list[int] | None, tagged: bool) -> Spelled:
        """The rendering and the span of each target, or of each generation tag; or ValueError."""
        views = [(len(messages), targets is None)] + [(i, True) for i in targets or [] if not tagged]
        whole, *heads = self.render(messages, tools, views)
        for rendering, (end, _) in zip((whole, *heads), views, strict=True):
            if rendering.error and end:
                raise ValueError(f"the model's chat template refuses this conversation: {rendering.error}")
        if tagged:
            return Spelled(whole.text, [span for span in whole.spans if span[0] < span[1]])
        return Spelled(whole.text, [self._span(whole, head, i) for i, head in zip(targets or [], heads, strict=True)])

    def _span(self, whole: Rendering, head: Rendering, i: int) -> tuple[int, int]:
        """From where the generation prompt ends to the first stop token."""
        start = len(head.text or "")
        if i == 0 and self.header in whole.text and self.header:  # nothing was asked: no prompt to compare with
            start = whole.text.index(self.header) + len(self.header)
        elif head.error or not whole.text.startswith(head.text):
            same = len(os.path.commonprefix([whole.text, head.text or ""]))
            raise ValueError(
                f"the chat template writes what comes before messages[{i}] otherwise once it has been said: at "
                f"generation {(head.text or '')[same : same + 60]!r} stands where the whole conversation has "
                f"{whole.text[same : same + 60]!r}; {_WAY_OUT}"
            )
        end = next((m.end() for m in self._stop.finditer(whole.text, start) if m.lastindex), None)
        if end is None:
            stops = ", ".join(self.stops) or "none is known"
            raise ValueError(
                f"the chat template ends messages[{i}] without a stop token ({stops}): a model that learns from it "
                f"would never stop; {_WAY_OUT}"
            )
        return start, end

    def _check_nothing_is_lost(self, messages, tools, targets: list[int] | None, tagged: bool) -> list[int]:
        """The message that each span belongs to. Raises ValueError unless every text is written, those to learn inside.

        An answer's span holds its own texts and no other's.
        """
        places: list[tuple[int, str]] = []  # of each mark: message and field; the tools' are those of message -1

        def mark(i: int, field: str) -> str:
            places.append((i, field))
            return f"{OPEN}{len(places) - 1}{CLOSE}"

        changed = [_with_said(message, lambda name, _, i=i: mark(i, name)) for i, message in enumerate(messages)]
        changed_tools = tools and [_with_described(tool, lambda name, _: mark(-1, name)) for tool in tools]
        spelled, targets = self._spans(changed, changed_tools, targets, tagged), targets or []
        seen = set(map(int, _MARK.findall(spelled.text)))
        for number, (i, field) in enumerate(places):
            forgotten = field in _REASONING and i not in targets  # as at inference: earlier thinking is not shown again
            if number not in seen and not forgotten:
                raise ValueError(_lost(i, messages, field))
        owners: list[int] = []
        inside = set()
        for number, (start, end) in enumerate(spelled.targets):
            numbers = set(map(int, _MARK.findall(spelled.text[start:end])))
            within = {places[n][0] for n in numbers}
            owner = min(within, default=owners[-1] if owners else -1) if tagged else targets[number]
            if within - {owner}:
                raise ValueError(
                    f"the chat template writes no stop token ({', '.join(self.stops)}) between messages[{owner}] and "
                    f"messages[{max(within - {owner})}]; {_WAY_OUT}"
                )
            owners.append(owner)
            inside |= numbers
        for number, (i, field) in enumerate(places):
            if i in targets and number not in inside:
                raise ValueError(_lost(i, messages, field))
        return owners


_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_OTHER = "give data.template another template"
_WAY_OUT = (
    'say "train": false at the assistant turns before the last one (give each turn a row of its own to learn them '
    f"all), or {_OTHER}"
)


def is_target(message: Message) -> bool:
    """Whether the turn is learned: the assistant's, unless it says `weight: 0` or `train: false`."""
    return message["role"] == "assistant" and message.get("weight", 1) != 0 and message.get("train", True)


def _lost(i: int, messages: list[Message], field: str) -> str:
    if i < 0:
        return f"the chat template does not write the {field} of tools; leave them out, or {_OTHER}"
    last = max(j for j, message in enumerate(messages) if message["role"] != "tool")
    way_out = _WAY_OUT if field in _REASONING and i < last else f"leave it out, or {_OTHER}"
    return f"the chat template drops or rewrites the {field} of messages[{i}] ({messages[i]['role']}); {way_out}"


def _for_template(message: Message) -> Message:
    """What transformers would hand to the template: no null fields, thinking under each of its names."""
    message = message | {"content": message.get("written", message.get("content"))}
    taken = {name: value for name, value in message.items() if value is not None and name not in _PLUMBING}
    thought = next((taken[name] for name in _REASONING if name in taken), None)
    return taken if thought is None else {"thinking": thought, **taken, "reasoning_content": thought}


def _ways(messages: list[Message]) -> Iterator[list[Message]]:
    """The messages as they are; then, where a template cannot read them so, in the other forms that it may know.

    No content as an empty text, text parts as one text, `developer` as `system`, a call's arguments as JSON text.
    """
    others = [(_filled, any("content" not in m for m in messages))]
    others.append((_joined, any(isinstance(m.get("content"), list) for m in messages)))
    others.append((_as_system, any(m["role"] == "developer" for m in messages)))
    others.append((_as_json, any(m.get("tool_calls") for m in messages)))
    for chosen in itertools.product((False, True), repeat=sum(applies for _, applies in others)):
        changes = [change for change, applies in others if applies]
        taken = messages
        for change in itertools.compress(changes, chosen):
            taken = [change(message) for message in taken]
        yield taken


def _filled(message: Message) -> Message:
    return {"content": ""} | message


def _joined(message: Message) -> Message:
    parts = message.get("content")
    return message | {"content": "".join(part["text"] for part in parts)} if isinstance(parts, list) else message


def _as_system(message: Message) -> Message:
    return message | {"role": "system"} if message["role"] == "developer" else message


def _as_json(message: Message) -> Message:
    if "tool_calls" not in message:
        return message
    calls = [
        call | {"function": call["function"] | {"arguments": _json(call["function"].get("arguments", {}))}}
        for call in message["tool_calls"]
    ]
    return message | {"tool_calls": calls}


def _json(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _said(message: Message) -> list[tuple[str, str]]:
    """(field, text) of every text of the message."""
    found: list[tuple[str, str]] = []
    _with_said(message, lambda name, text: found.append((name, text)) or text)
    return found


def _with_said(message: Message, change) -> Message:
    """The message with `change(field, text)` in place of every text that is not blank: content, thinking, calls."""

    def changed(name: str, text: Any) -> Any:
        return change(name, text) if isinstance(text, str) and text.strip() else text

    taken = dict(message)
    content = message.get("content")
    if isinstance(content, list):
        taken["content"] = [part | {"text": changed("content", part["text"])} for part in content]
    elif content is not None:
        taken["content"] = changed("content", content)
    if "reasoning_content" in message:
        thought = changed("reasoning_content", message["reasoning_content"])
        taken |= {name: thought for name in _REASONING if name in message}
    if "tool_calls" in message:
        taken["tool_calls"] = [_with_call(call, changed) for call in message["tool_calls"]]
    return taken


def _with_call(call: dict, changed) -> dict:
    function = dict(call["function"])
    function["name"] = changed("tool_calls", function["name"])
    if isinstance(function.get("arguments"), str):
        function["arguments"] = _json(_leaves(json.loads(function["arguments"]), lambda t: changed("tool_calls", t)))
    elif "arguments" in function:
        function["arguments"] = _leaves(function["arguments"], lambda t: changed("tool_calls", t))
    return call | {"function": function}


def _with_described(tool: dict, change) -> dict:
    """A tool with its name and description changed."""
    function = dict(tool.get("function", tool))
    for name in ("name", "description"):
        if isinstance(function.get(name), str) and function[name].strip():
            function[name] = change(name, function[name])
    return tool | {"function": function} if "function" in tool else function


def _leaves(value: Any, change) -> Any:
    """The value with `change` applied to every text that is not blank."""
    if isinstance(value, dict):
        return {name: _leaves(part, change) for name, part in value.items()}
    if isinstance(value, list):
        return [_leaves(part, change) for part in value]
    return change(value) if isinstance(value, str) and value.strip() else value


def _shape(value: Any, name: str = "") -> Any:
    """The value without its texts, but for roles: what decides how a template writes it."""
    if isinstance(value, dict):
        return {key: _shape(part, key) for key, part in value.items()}
    if isinstance(value, list):
        return [_shape(part) for part in value]
    if isinstance(value, str) and name not in ("role", "type"):
        return bool(value.strip())
    return value


def _dense(text: str) -> str:
    """The text without white space, which templates may trim."""
    return "".join(text.split())
