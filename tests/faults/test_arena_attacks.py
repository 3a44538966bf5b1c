"""A battle is one conversation with one vote: whatever comes at once or late, what is stored is what was voted on."""

import contextlib
import random
import sqlite3
import threading

import pytest

from arena.battle import Arena
from arena.limits import Limits
from arena.store import Store


class Slow:
    """A speaker that says one word, and waits for leave to say the second."""

    def __init__(self):
        self.leave = threading.Event()
        self.leave.set()

    def stream(self, messages, seed):
        said = f"to {messages[-1]['content']}:"
        yield said
        self.leave.wait(10)
        yield f"{said} whole"


@pytest.fixture
def arena(tmp_path):
    store = Store(tmp_path / "arena.sqlite")
    limits = Limits(messages_per_minute=1000, max_characters=100)
    yield Arena(store, {"x": Slow(), "y": Slow()}, limits, seed=0, max_turns=5)
    store.close()


def hold(arena, holding: bool) -> None:
    for speaker in arena.speakers.values():
        (speaker.leave.clear if holding else speaker.leave.set)()


def begun(arena):
    *_, battle = arena.say("one", None, "v")
    return battle


def test_no_vote_while_a_turn_streams(arena):
    battle = begun(arena)
    hold(arena, True)
    second = arena.say("two", battle, "v")
    next(second)
    with pytest.raises(ValueError, match="still answering"):
        arena.vote(battle, "v", "a")
    hold(arena, False)
    list(second)
    assert arena.vote(battle, "v", "a").startswith("Thank you")
    turns = arena.store.battles()[0]["turns"]
    assert [turn["answer_a"] for turn in turns] == ["to one: whole", "to two: whole"]


def test_two_messages_at_once_are_one_turn(arena):
    battle = begun(arena)
    hold(arena, True)
    second = arena.say("two", battle, "v")
    next(second)
    with pytest.raises(ValueError, match="still answering"):
        next(arena.say("two again", battle, "v"))
    hold(arena, False)
    list(second)
    assert [len(talk) for talk in battle.talks] == [4, 4] and battle.turns == 2


def test_a_turn_that_was_left_frees_its_battle_and_stores_nothing(arena):
    battle = begun(arena)
    second = arena.say("two", battle, "v")
    next(second)
    second.close()  # the browser went away
    arena.vote(battle, "v", "b")
    assert len(arena.store.battles()[0]["turns"]) == 1


def test_no_turn_after_the_vote(arena):
    battle = begun(arena)
    arena.vote(battle, "v", "a")
    with pytest.raises(ValueError, match="You have voted"):
        arena.store.add_turn(battle.id, 2, "late", "p", "q")
    *_, other = arena.say("three", battle, "v")
    assert other.id != battle.id and len(arena.store.battles()[0]["turns"]) == 1


def test_a_damaged_database_is_named_with_the_way_out_or_harmless(tmp_path):
    """40 damaged files of one that holds votes: noticed at the start, or every row is as it was."""
    store = Store(tmp_path / "good.sqlite")
    for i in range(60):
        store.begin_battle(f"b{i}", "v", "x", "y")
        store.add_turn(f"b{i}", 1, "question " * 20, f"answer {i} " * 20, "other " * 20)
        store.vote(f"b{i}", "v", "a")
    rows = store.battles()
    store.close()
    with contextlib.closing(sqlite3.connect(tmp_path / "good.sqlite")) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    good, chance, noticed = (tmp_path / "good.sqlite").read_bytes(), random.Random(0), 0
    for trial in range(40):
        path, hurt = tmp_path / f"{trial}.sqlite", bytearray(good)
        if trial % 4 == 0:
            hurt = hurt[: chance.randrange(1, len(hurt))]
        else:
            place = chance.randrange(0, len(hurt) - 64) if trial % 2 else chance.randrange(0, 4096)
            hurt[place : place + 64] = chance.randbytes(64)
        path.write_bytes(hurt)
        try:
            damaged = Store(path)
        except ValueError as error:
            assert ".recover" in str(error) or "schema" in str(error)
            noticed += 1
            continue
        found = damaged.battles()
        damaged.close()
        assert len(found) == len(rows)  # a changed letter stays: SQLite has no checksum of texts
    assert noticed > 20
