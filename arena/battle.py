"""The tab where a visitor talks to two anonymous models at once and votes for the better one."""

import contextlib
import html
import logging
import random
import threading
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field

import gradio as gr

from arena.limits import Limits
from arena.pairs import choose_pair
from arena.speakers import SpeakerError, TextRefused
from arena.store import Store

log = logging.getLogger(__name__)
VERDICTS = {"A is better": "a", "B is better": "b", "tie": "tie", "both are bad": "both_bad"}
APOLOGY = "(this model could not answer; the battle is over)"


@dataclass
class Battle:
    """A visitor's battle. It stays on the server; the browser never sees it."""

    id: str = ""
    models: tuple[str, str] = ("", "")
    talks: tuple[list, list] = field(default_factory=lambda: ([], []))  # messages with each model
    turns: int = 0  # number of messages that both models have answered
    over: bool = False


class Arena:
    """Battles of all visitors."""

    def __init__(self, store: Store, speakers: dict, limits: Limits, *, seed: int, max_turns: int):
        self.store, self.speakers, self.limits, self.max_turns = store, speakers, limits, max_turns
        self.rng = random.Random(seed)
        self._busy: set[str] = set()  # battles that are being answered or voted on
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def alone(self, battle: Battle) -> Iterator[None]:
        """Lock a battle. Raises ValueError if it is locked already."""
        with self._lock:
            if battle.id in self._busy:
                raise ValueError("The models are still answering; please wait for both.")
            self._busy.add(battle.id)
        try:
            yield
        finally:
            with self._lock:
                self._busy.discard(battle.id)

    def say(self, text: str, battle: Battle | None, visitor: str) -> Iterator[Battle]:
        """One turn: both models answer at the same time. Yields the battle whenever an answer has grown.

        Raises:
            ValueError: with a sentence for the visitor.
        """
        text = self.limits.check_text(text)
        self.limits.spend(visitor)
        battle = battle if battle is not None and not battle.over else self._begin(visitor)
        with self.alone(battle):
            if battle.over:  # a vote was stored in the meantime
                raise ValueError("You have voted on this battle; your next message begins a new one.")
            yield from self._turn(text, battle)

    def _turn(self, text: str, battle: Battle) -> Iterator[Battle]:
        if battle.turns == self.max_turns:
            raise ValueError(f"A battle has at most {self.max_turns} turns; please vote.")
        for talk in battle.talks:
            del talk[2 * battle.turns :]  # an interrupted turn
            talk += [{"role": "user", "content": text}, {"role": "assistant", "content": ""}]
        try:
            seed = self.rng.getrandbits(31)
            streams = [
                self.speakers[model].stream(talk[:-1], seed + side)
                for side, (model, talk) in enumerate(zip(battle.models, battle.talks, strict=True))
            ]
            yield from self._grow(battle, streams)
        except TextRefused:
            for talk in battle.talks:
                del talk[2 * battle.turns :]
            raise
        except SpeakerError:
            log.exception("battle %s ended: a model could not answer", battle.id)
            battle.over = True
            for talk in battle.talks:
                talk[-1]["content"] = talk[-1]["content"] or APOLOGY
            yield battle
            return
        answers = [talk[-1]["content"] for talk in battle.talks]
        self.store.add_turn(battle.id, battle.turns + 1, text, *answers)
        battle.turns += 1
        yield battle

    def vote(self, battle: Battle | None, visitor: str, verdict: str) -> str:
        """Store the vote, and then return a sentence with the names of the models.

        Raises:
            ValueError: with a sentence for the visitor.
        """
        if battle is None or not battle.turns:
            raise ValueError("There is nothing to vote on yet: write a message first.")
        with self.alone(battle):
            self.store.vote(battle.id, visitor, verdict)
            battle.over = True
        return f"Thank you. A was {battle.models[0]}, B was {battle.models[1]}."

    def _begin(self, visitor: str) -> Battle:
        battle = Battle(uuid.uuid4().hex, choose_pair(self.store, list(self.speakers), self.rng))
        self.store.begin_battle(battle.id, visitor, *battle.models)
        return battle

    def _grow(self, battle: Battle, streams: list[Iterator[str]]) -> Iterator[Battle]:
        growing = list(zip(battle.talks, streams, strict=True))
        while growing:
            for pair in list(growing):
                text = next(pair[1], None)
                if text is None:
                    growing.remove(pair)
                else:
                    pair[0][-1]["content"] = text
            yield battle


def visitor_of(request: gr.Request) -> str:
    """The visitor's name from the login, or else the browser's session."""
    return request.username or request.session_hash


def battle_tab(arena: Arena, *, parallel: int) -> None:
    """Build the tab inside an open `gr.Blocks`."""
    state = gr.State(None)
    gr.Markdown("Write to two models at once. You see their names after your vote.")
    with gr.Row():
        plain = {"render_markdown": False, "buttons": [], "feedback_options": None, "height": 420}
        chats = [gr.Chatbot(label=f"Model {side}", elem_id=f"chat-{side}", **plain) for side in "AB"]
    notice = gr.Textbox(label="", show_label=False, interactive=False, container=False, elem_id="notice")
    with gr.Row():
        votes = [
            gr.Button(label, interactive=False, min_width=80, elem_id=f"vote-{v}") for label, v in VERDICTS.items()
        ]
    with gr.Row():
        limit = arena.limits.max_characters
        box = gr.Textbox(
            placeholder="your message", show_label=False, scale=8, lines=2, max_length=limit, elem_id="message"
        )
        send = gr.Button("Send", variant="primary", scale=1, min_width=80, elem_id="send")
    shown = [box, *chats, notice, *votes, state]

    def on_send(text: str, battle: Battle | None, request: gr.Request):
        kept = text
        try:
            for grown in arena.say(text or "", battle, visitor_of(request)):
                kept, battle = "", grown
                yield "", *talks(battle), "", *buttons(False), battle
        except ValueError as error:
            yield kept, *talks(battle), str(error), *buttons(can_vote(battle)), battle
            return
        over = "One of the models could not answer. Your next message begins a new battle." if battle.over else ""
        yield "", *talks(battle), over, *buttons(not battle.over), battle

    def on_vote(label: str, battle: Battle | None, request: gr.Request):
        try:
            if label not in list(VERDICTS):  # a browser may send any text
                raise ValueError(f"A vote is one of: {', '.join(VERDICTS)}.")
            names = arena.vote(battle, visitor_of(request), VERDICTS[label])
        except ValueError as error:
            return gr.skip(), *talks(battle), str(error), *buttons(can_vote(battle)), battle
        return gr.skip(), *talks(battle), f"{names} Your next message begins a new battle.", *buttons(False), battle

    for start in (send.click, box.submit):
        start(on_send, [box, state], shown, concurrency_limit=parallel, concurrency_id="models", api_name="say")
    for button in votes:
        button.click(on_vote, [button, state], shown, queue=False, api_name="vote")


def talks(battle: Battle | None) -> list[list[dict]]:
    """The messages of the two chat boxes. The boxes render HTML, so tags in the texts are escaped."""
    if battle is None:
        return [[], []]
    return [[m | {"content": html.escape(m["content"], quote=False)} for m in talk] for talk in battle.talks]


def can_vote(battle: Battle | None) -> bool:
    """Whether the battle has an answered message and no vote yet."""
    return battle is not None and battle.turns > 0 and not battle.over


def buttons(interactive: bool) -> list:
    """An update for each vote button."""
    return [gr.update(interactive=interactive) for _ in VERDICTS]
