"""A model's own chat template (Jinja), rendered as in transformers, with the spans of the assistant's texts.

Besides the text, a rendering gives three things:
    User text. Where a message contains a token that the template uses as a marker, it is wrapped in noncharacters, so
        that it stays text.
    Targets. They go from the end of each generation prompt to the stop token, or the `{% generation %}` tags give them.
    Completeness. Once per kind of conversation it is rendered with a mark in place of every text, to see that no text
        is lost.
"""

import json
import os
import re
from typing import NamedTuple

from data.message_texts import (
    THINKING,
    Message,
    change_texts,
    dense,
    for_template,
    map_texts,
    shape,
    texts_of,
    ways_to_write,
    with_described,
)
from data.sandbox import Rendering, Stopped, render

OPEN, CLOSE = "\ufdd0", "\ufdd1"  # noncharacters: no text may hold them
FIXED_DATE = "2026-01-01"  # today's date for templates that ask for it, where no config sets it
MARKED = re.compile(f"{OPEN}([^{OPEN}{CLOSE}]*){CLOSE}|[{OPEN}{CLOSE}]")  # what somebody wrote, or a lone mark
_MARK = re.compile(f"{OPEN}(\\d+){CLOSE}")


class TextMarkerSaid(ValueError):
    """A message contains plain text that the template uses as a marker between turns, which cannot be escaped."""


class Spelled(NamedTuple):
    """A conversation as text. `targets` are the (start, end) of the texts to learn.

    `apart`: a target begins where a generation prompt ends, so a token must begin there too.
    """

    text: str
    targets: list[tuple[int, int]]
    apart: bool = True


class ChatTemplate:
    """Jinja texts by name ("default", and "tool_use" where a model has one for tools), and how to read them.

    `tokens` are the special tokens that Jinja may use (bos_token, ...), `date` is today's date for the template. Every
    method raises ValueError where a conversation cannot be written without loss.
    """

    def __init__(self, jinja: dict[str, str], *, tokens: dict[str, str], date: str):
        self.jinja, self.tokens, self.date = jinja, tokens, date
        self.control: set[str] = set()
        self.stops: list[str] = []
        self.header = ""  # the text before an assistant's turn
        self.text_markers: dict[bool, re.Pattern] = {}  # no text of the assistant's (True), of others (False), has them
        # the last request: messages, tools, what came of each view
        self.rendered: tuple[list, list | None, dict[tuple[int, bool], Rendering]] = [], None, {}
        self.checked: dict[str, list[int] | str] = {}  # kind of conversation -> whose each span is, or what is lost
        self.tagged = {name: bool(_GENERATION.search(text)) for name, text in jinja.items()}

    def prompt(self, messages: list[Message], tools: list[dict] | None = None) -> str:
        """The conversation and the header of the next assistant turn."""
        return self._spell(messages, tools, None).text

    def conversation(self, messages: list[Message], tools: list[dict] | None = None) -> Spelled:
        """The whole conversation and its targets: all assistant turns without weight 0 or train false."""
        return self._spell(messages, tools, targets_of(messages), tagged=self.tagged[self._name(tools)])

    def rows(self, messages: list[Message], tools: list[dict] | None = None) -> list[Spelled]:
        """The training rows of the conversation: one row, or one row per target, which ends with it.

        It is one row if every target and all text before it are written as when that turn was the last. Many templates
        write earlier turns differently: they strip the thinking, or end the turn with another token.
        """
        targets, tagged = targets_of(messages), self.tagged[self._name(tools)]
        try:
            return [self._spell(messages, tools, targets, tagged=tagged, unchanged=True)]
        except ValueError as error:
            if targets == [len(messages) - 1] or isinstance(error, Stopped):
                raise
        return [self._spell(messages[: i + 1], tools, [i], tagged=tagged) for i in targets]

    def answer(self, messages: list[Message], tools: list[dict] | None = None) -> Spelled:
        """The conversation with one target, its last turn. It begins where `prompt` of the other messages ends."""
        return self._spell(messages, tools, [len(messages) - 1])

    def after_answer(self, messages: list[Message], more: list[Message]) -> Spelled:
        """The prompt of `messages`, which end with an assistant turn, and `more`.

        Its target goes from the end of that turn to the end, also if the template rewrites the turn.
        """
        said = [*messages[:-1], {"role": "assistant", "content": "x"}]
        self.prompt([*said, *more])  # or it says what is lost
        for taken in ways_to_write([for_template(message) for message in [*said, *more]]):
            marked = change_texts(taken, self.mark)
            marked[len(said) - 1]["content"] = f"{OPEN}x{CLOSE}"
            (whole,) = self.render(marked, None, [(len(marked), True)])
            if whole.error or f"{OPEN}x{CLOSE}" not in whole.text:
                continue
            text = whole.text.replace(f"{OPEN}x{CLOSE}", "x")
            end = self._end_of_turn(text, whole.text.index(f"{OPEN}x{CLOSE}"), len(said) - 1)
            return Spelled(text, [(end, len(text))])
        raise ValueError(f"the chat template does not write an assistant turn before other messages; {_OTHER}")

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
        """Set the control tokens, which message texts must not become, and the stop tokens."""
        self.control, self.stops = control, stops
        self._lengths = sorted({len(token) for token in control}, reverse=True)
        self._first = re.compile("[" + "".join(map(re.escape, sorted({token[0] for token in control}))) + "]")
        marked = f"{OPEN}[^{OPEN}{CLOSE}]*{CLOSE}"
        self._stop = re.compile("|".join([marked, *(f"({re.escape(s)})" for s in sorted(stops, key=len)[::-1])]))
        self.text_markers = self._find_text_markers()

    def probe(self, added: list[str], declared: list[str]) -> tuple[str | None, set[str]]:
        """(the added token that ends an assistant turn, the added tokens that open and close turns).

        `declared` are the stop tokens that the checkpoint's files name. If the template writes one of them between an
        answer and the next user turn, it ends the turn: other tokens before it are part of the answer. Otherwise the
        first added token after the answer ends it.

        Some files do not mark these tokens as special. Added tokens beside a user's text, and at the beginning of the
        assistant's header, are markers. Tags of thinking are not, because thinking is part of an answer.
        """
        written = [name for name in added if name.strip(" \n\t\r▁") and "think" not in name.lower()]
        token = re.compile("|".join(map(re.escape, sorted(written, key=len)[::-1])) or "(?!)")
        for first in ([], [{"role": "system", "content": "system"}]):  # some templates ask for a system message
            said = [*first, {"role": "user", "content": f"{OPEN}0{CLOSE}"}]
            said.append({"role": "assistant", "content": f"{OPEN}1{CLOSE}"})
            said.append({"role": "user", "content": f"{OPEN}2{CLOSE}"})
            asked, header, whole, more = self.render(
                said, None, [(len(said) - 2, False), (len(said) - 2, True), (len(said) - 1, False), (len(said), False)]
            )
            if not (asked.error or header.error or whole.error) and f"{OPEN}0{CLOSE}" in header.text:
                break
        else:
            return None, set()
        self.header = header.text.removeprefix(os.path.commonprefix([asked.text, header.text]))
        before, after = header.text.split(f"{OPEN}0{CLOSE}", 1)
        answered = token.findall(whole.text.partition(f"{OPEN}1{CLOSE}")[2])
        between = (more.text or "").partition(f"{OPEN}1{CLOSE}")[2].partition(f"{OPEN}2{CLOSE}")[0]
        ends = [name for name in token.findall(between) if name in declared]
        stop = next(iter([*ends, *answered]), None)
        found = [*token.findall(before)[-1:], *token.findall(after)[:1], *token.findall(self.header)[:1]]
        return stop, {*found, *answered[:1], *([stop] if stop else [])}

    def _find_text_markers(self) -> dict[bool, re.Pattern]:
        """Patterns of plain text that ends a turn, such as `[/INST]` and `### Response:`, line by line.

        Also the text that begins a system message, such as `<<SYS>>`, if the first user turn could begin with it.
        """
        found: dict[bool, set[str]] = {False: set(), True: set()}
        starts = []
        for roles in (("user", "assistant", "user"), ("system", "user", "assistant", "user")):
            said = [{"role": role, "content": f"{OPEN}{i}{CLOSE}"} for i, role in enumerate(roles)]
            (whole,) = self.render(said, None, [(len(said), True)])
            marks = [] if whole.error else list(_MARK.finditer(whole.text))
            if not marks:
                continue
            for mark, following in zip(marks, [*marks[1:], None], strict=True):
                between = whole.text[mark.end() : following.start() if following else None]
                if not any(token in between for token in self.control):
                    found[roles[int(mark[1])] == "assistant"] |= set(map(_as_pattern, _lines_after_text(between)))
            starts.append(self._without_tokens(whole.text[: marks[0].start()]))
        if len(starts) == 2 and starts[1].startswith(starts[0]) and (first := starts[1][len(starts[0]) :].strip()):
            found[False] |= set(map(_as_pattern, first.splitlines()))
        return {who: re.compile("|".join(sorted(patterns))) for who, patterns in found.items() if patterns}

    def _without_tokens(self, text: str) -> str:
        for token in self.control:
            text = text.replace(token, "")
        return text.strip()

    def _check_text_markers(self, messages: list[Message]) -> None:
        """Raise TextMarkerSaid where a message text would end its turn or begin another one."""
        for i, message in enumerate(messages):
            pattern = self.text_markers.get(message["role"] == "assistant")
            for _, text in texts_of(message) if pattern else ():
                if found := pattern.search(text):
                    raise TextMarkerSaid(
                        f"messages[{i}] ({message['role']}) holds {found[0]!r}, which the chat template writes between "
                        f"turns as plain text: a turn would end there. Take it out, or {_OTHER}, whose marks are "
                        "special tokens"
                    )

    def render(self, messages, tools: list[dict] | None, views: list[tuple[int, bool]]) -> list[Rendering]:
        """One Rendering per (number of messages, whether the assistant's header follows)."""
        before, beside, known = self.rendered
        if tools != beside or before[: len(messages)] != messages or not known.keys() >= set(views):
            template = self.jinja[self._name(tools)]
            written = render(template, messages, tools, views, tokens=self.tokens, date=self.date)
            known = dict(zip(views, written, strict=True))
            self.rendered = messages, tools, known
        return [known[view] for view in views]

    def _name(self, tools: list[dict] | None) -> str:
        return "tool_use" if tools and "tool_use" in self.jinja else "default"

    def _spell(self, messages, tools, targets: list[int] | None, *, tagged=False, unchanged=False) -> Spelled:
        """The messages, written in the first form that loses nothing. targets=None: the assistant's turn comes next."""
        given, problems = [for_template(message) for message in messages], []
        self._check_text_markers(given)
        for taken in ways_to_write(given):
            try:
                return self._write(taken, tools, targets, tagged, unchanged)
            except Stopped:  # each further form would take as long
                raise
            except ValueError as error:
                problems.append(error)
        raise min(problems, key=lambda error: _REFUSED in str(error))  # prefer the message about a lost text

    def _write(self, messages, tools, targets: list[int] | None, tagged: bool, unchanged: bool) -> Spelled:
        kind = json.dumps([shape(messages), shape(tools), targets, tagged])
        if kind not in self.checked:
            try:
                self.checked[kind] = self._check_nothing_is_lost(messages, tools, targets, tagged)
            except Stopped:
                raise
            except ValueError as error:
                self.checked[kind] = str(error)
        owners = self.checked[kind]
        if isinstance(owners, str):
            raise ValueError(owners)
        marked, marked_tools = change_texts(messages, self.mark), change_texts(tools, self.mark)
        spelled = self._spans(marked, marked_tools, targets, tagged, unchanged)
        if len(spelled.targets) != len(owners):
            raise ValueError(f"the chat template's generation tags depend on what is said; {_OTHER}")
        for i in targets or []:
            own = [span for span, owner in zip(spelled.targets, owners, strict=True) if owner == i]
            span = dense("".join(spelled.text[max(start - len(self.header), 0) : end] for start, end in own))
            for name, text in texts_of(marked[i]):
                forms = (text, json.dumps(text, ensure_ascii=False)[1:-1]) if name == "tool_calls" else (text,)
                if not any(dense(form) in span for form in forms):
                    raise ValueError(_lost(i, messages, name))
        learned = zip(spelled.targets, owners, strict=True)
        return Spelled(spelled.text, [span for span, owner in learned if owner in (targets or [])], not tagged)

    def _spans(self, messages, tools, targets: list[int] | None, tagged: bool, unchanged: bool = False) -> Spelled:
        """The rendering with the span of each target, or of each generation tag. Raises ValueError.

        `unchanged`: also refuse a target that is written differently than when it was the last turn.
        """
        asked = [i for i in targets or [] if not tagged]
        earlier = [i for i in targets or [] if unchanged and i + 1 < len(messages)]
        views = [(len(messages), targets is None), *((i, True) for i in asked), *((i + 1, False) for i in earlier)]
        whole, *others = self.render(messages, tools, views)
        for rendering, (end, _) in zip((whole, *others), views, strict=True):
            if rendering.error and end:
                raise ValueError(f"{_REFUSED}: {rendering.error}")
        if tagged:
            spans = [span for span in whole.spans if span[0] < span[1]]
        else:
            spans = [self._span(whole, head, i) for i, head in zip(asked, others, strict=False)]
        for i, alone in zip(earlier, others[len(asked) :], strict=True):
            end = max((last for _, last in alone.spans), default=0) if tagged else spans[asked.index(i)][1]
            if alone.text[:end] != whole.text[:end]:
                raise ValueError(f"the chat template writes messages[{i}] otherwise once more was said; {_OTHER}")
        return Spelled(whole.text, spans)

    def _span(self, whole: Rendering, head: Rendering, i: int) -> tuple[int, int]:
        """The span from the end of the generation prompt to the first stop token."""
        start = len(head.text or "")
        if (
            i == 0 and self.header in whole.text and self.header
        ):  # the conversation begins with this turn: there is no prompt to compare with
            start = whole.text.index(self.header) + len(self.header)
        elif head.error or not whole.text.startswith(head.text):
            same = len(os.path.commonprefix([whole.text, head.text or ""]))
            raise ValueError(
                f"the chat template writes what comes before messages[{i}] otherwise once it has been said: at "
                f"generation {_shown(head.text or '', same)} stands where the whole conversation has "
                f"{_shown(whole.text, same)}; {_OTHER}"
            )
        return start, self._end_of_turn(whole.text, start, i)

    def _end_of_turn(self, text: str, start: int, i: int) -> int:
        """The end of the template's first stop token after `start`."""
        if text.find(OPEN, start) < 0:  # the usual case, and much faster than the pattern
            places = [(at, -len(stop)) for stop in self.stops if (at := text.find(stop, start)) >= 0]
            end = min(places)[0] - min(places)[1] if places else None  # of the first, and of the longest there
        else:
            end = next((m.end() for m in self._stop.finditer(text, start) if m.lastindex), None)
        if end is None:
            stops = ", ".join(self.stops) or "none is known"
            raise ValueError(
                f"the chat template ends messages[{i}] without a stop token ({stops}): a model that learns from it "
                f"would never stop; {_OTHER}"
            )
        return end

    def _check_nothing_is_lost(self, messages, tools, targets: list[int] | None, tagged: bool) -> list[int]:
        """The number of the message of each span. Raises ValueError unless every text is written, and targets in spans.

        The span of an answer contains all of its texts and no other text.
        """
        places: list[tuple[int, str]] = []  # of each mark: message and field; the tools' are those of message -1

        def mark(i: int, field: str) -> str:
            places.append((i, field))
            return f"{OPEN}{len(places) - 1}{CLOSE}"

        changed = [map_texts(message, lambda name, _, i=i: mark(i, name)) for i, message in enumerate(messages)]
        changed_tools = tools and [with_described(tool, lambda name, _: mark(-1, name)) for tool in tools]
        spelled, targets = self._spans(changed, changed_tools, targets, tagged), targets or []
        seen = set(map(int, _MARK.findall(spelled.text)))
        for number, (i, field) in enumerate(places):
            forgotten = field in THINKING and i not in targets  # earlier thinking is left out, as at inference
            if number not in seen and not forgotten:
                raise ValueError(_lost(i, messages, field))
        owners: list[int] = []
        inside = set()
        for number, (start, end) in enumerate(spelled.targets):
            numbers = set(map(int, _MARK.findall(spelled.text[start:end])))
            within = {places[n][0] for n in numbers}
            if tagged and (others := [i for i in within if i < 0 or messages[i]["role"] != "assistant"]):
                whose = "the tools" if others[0] < 0 else f"messages[{others[0]}] ({messages[others[0]]['role']})"
                raise ValueError(f"the chat template's generation tags hold texts of {whose}; {_OTHER}")
            owner = min(within, default=owners[-1] if owners else -1) if tagged else targets[number]
            if within - {owner}:
                raise ValueError(
                    f"the chat template writes no stop token ({', '.join(self.stops)}) between messages[{owner}] and "
                    f"messages[{max(within - {owner})}]; {_OTHER}"
                )
            owners.append(owner)
            inside |= numbers
        for number, (i, field) in enumerate(places):
            if i in targets and number not in inside:
                raise ValueError(_lost(i, messages, field))
        return owners


_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_OTHER = "give data.template another template"
_REFUSED = "the model's chat template refuses this conversation"


def _lines_after_text(between: str) -> list[str]:
    """The lines, but for blank ones; each that begins a line has its line break before it."""
    first, *others = between.split("\n")
    return [line for line in (first.strip(), *("\n" + other.strip() for other in others)) if line.strip()]


def _as_pattern(line: str) -> str:
    """Matches the marker: in brackets anywhere; else whole words, and at a line's beginning where it has that."""
    word = line.strip()
    if word[0] in "<[{|":
        return re.escape(word)
    before = r"(?m:^[^\S\n]*)" if line.startswith("\n") else r"(?<!\w)" if word[0].isalnum() else ""
    return before + re.escape(word) + (r"(?!\w)" if word[-1].isalnum() else "")


def targets_of(messages: list[Message]) -> list[int]:
    """Indices of the messages to learn: the assistant's, without those with `weight: 0` or `train: false`."""
    learned = (m["role"] == "assistant" and m.get("weight", 1) != 0 and m.get("train", True) for m in messages)
    return [i for i, taken in enumerate(learned) if taken]


def _shown(text: str, start: int, length: int = 60) -> str:
    """An excerpt of a rendering for an error message, with dots in place of message texts."""
    opened = text.rfind(OPEN, 0, start)
    start = opened if opened > text.rfind(CLOSE, 0, start) else start  # not in the middle of a mark
    return repr(MARKED.sub("...", text[start : start + length]))


def _lost(i: int, messages: list[Message], field: str) -> str:
    if i < 0:
        return f"the chat template does not write the {field} of tools; leave them out, or {_OTHER}"
    role = messages[i]["role"]
    return f"the chat template drops or rewrites the {field} of messages[{i}] ({role}); leave it out, or {_OTHER}"
