"""Votes while the arena is killed: every vote that was thanked for is stored, once, as it was given.

pytest -s -m slow tests/faults/test_votes.py     2,000 votes, until all are stored; prints the kills
"""

import os
import random
import signal
import threading
import time
from collections import Counter
from pathlib import Path

import pytest

from arena.store import Store

PEOPLE = 8


def vote_all(path: Path, thanks: int, first: int, count: int) -> None:
    """Eight people vote on `count` battles, begun or not; whoever is thanked says so on `thanks`, in one write."""
    store = Store(path)
    voted = {row["battle"] for row in store.read("SELECT battle FROM votes")}  # before a kill, thanked for or not

    def person(number: int) -> None:
        chance = random.Random(f"{number} {first}")
        for battle in range(number, count, PEOPLE):
            name, verdict = f"b{battle}", chance.choice(["a", "b", "tie"])
            if name in voted:
                continue
            if not store.read("SELECT 1 FROM battles WHERE id = ?", (name,)):
                store.begin_battle(name, f"v{number}", "x", "y")
            if not store.read("SELECT 1 FROM turns WHERE battle = ?", (name,)):
                store.add_turn(name, 0, "p", "one", "two")
            store.vote(name, f"v{number}", verdict)
            os.write(thanks, f"{name} {verdict}\n".encode())

    people = [threading.Thread(target=person, args=(number,)) for number in range(PEOPLE)]
    for thread in people:
        thread.start()
    for thread in people:
        thread.join()
    store.close()


def survives(home: Path, *, votes: int, apart: int) -> int:
    """Kill the arena at random moments, `apart` thanks apart on average, until all votes are stored; how many kills."""
    path, thanks = home / "arena.sqlite", home / "thanks"
    thanks.touch()
    chance, kills, ended = random.Random(0), 0, False
    while not ended:
        child = os.fork()
        if child == 0:
            code = 1
            try:
                vote_all(path, os.open(thanks, os.O_WRONLY | os.O_CREAT | os.O_APPEND), kills, votes)
                code = 0
            finally:
                os._exit(code)
        stop = thanks.read_text().count("\n") + chance.uniform(0, 2 * apart)
        while not (ended := os.waitpid(child, os.WNOHANG) != (0, 0)) and thanks.read_text().count("\n") < stop:
            pass
        if not ended:
            time.sleep(chance.uniform(0, 0.005))  # into the next votes: the thanks alone would mark one moment of each
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            kills += 1
    store = Store(path)
    stored = {battle["id"]: battle["verdict"] for battle in store.battles()}
    times = Counter(battle["id"] for battle in store.battles())
    store.close()
    thanked = dict(line.split() for line in thanks.read_text().splitlines())
    assert len(thanks.read_text().splitlines()) == len(thanked)  # nobody twice
    assert set(times.values()) == {1} and len(stored) == votes
    assert {name: stored[name] for name in thanked} == thanked
    print(f"{votes} votes, {kills} kills; {len(thanked)} were thanked for, every one is stored once, as it was given")
    return kills


def test_votes_that_were_thanked_for_survive_kills(tmp_path):
    assert survives(tmp_path, votes=200, apart=20) > 0


@pytest.mark.slow
def test_2000_votes_that_were_thanked_for_survive_kills(tmp_path):
    assert survives(tmp_path, votes=2000, apart=100) > 5
