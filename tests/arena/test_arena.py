import json
import random
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from types import SimpleNamespace

import pytest
from omegaconf import OmegaConf

pytest.importorskip("gradio", reason="the arena extra is not installed")

from arena.annotate import LOAN, Desk, load_items, parse_ranking  # noqa: E402
from arena.battle import Arena, Battle, talks  # noqa: E402
from arena.board import standing  # noqa: E402
from arena.export import export  # noqa: E402
from arena.limits import Limits  # noqa: E402
from arena.pairs import choose_pair, tally  # noqa: E402
from arena.speakers import EndpointSpeaker, LocalSpeaker, SpeakerError  # noqa: E402
from arena.store import MIGRATIONS, Store  # noqa: E402
from data import formats  # noqa: E402
from data.chat_template import TextMarkerSaid  # noqa: E402
from data.records import BadRows, read_records, write_jsonl  # noqa: E402
from evals.readers import read_votes

LIMITS = Limits(messages_per_minute=1_000_000, max_characters=100)


class Echo:
    """A model that says its own name after what it heard; dumb ones raise."""

    def __init__(self, name: str, dumb: bool = False):
        self.name, self.dumb = name, dumb

    def stream(self, messages, seed):
        if self.dumb:
            raise SpeakerError("secret name of the model")
        yield messages[-1]["content"]
        yield f"{messages[-1]['content']} ({len(messages)}{self.name})"


@pytest.fixture
def store(tmp_path):
    store = Store(tmp_path / "arena.sqlite")
    yield store
    store.close()


def arena_of(store, *names, dumb=()):
    return Arena(store, {name: Echo(name, name in dumb) for name in names}, LIMITS, seed=0, max_turns=3)


def play(arena, visitor, verdict, text="hello"):
    battle = list(arena.say(text, None, visitor))[-1]
    arena.vote(battle, visitor, verdict)
    return battle


def test_a_vote_counts_once_and_only_from_the_visitor_of_the_battle(store):
    arena = arena_of(store, "x", "y")
    battle = list(arena.say("hello", None, "ann"))[-1]
    with pytest.raises(ValueError, match="not this visitor's"):
        store.vote(battle.id, "bob", "a")
    assert "A was" in arena.vote(battle, "ann", "a")
    with pytest.raises(ValueError, match="has a vote already"):
        arena.vote(battle, "ann", "b")
    assert [row["verdict"] for row in store.battles()] == ["a"]


def test_a_marker_of_a_template_in_a_message_is_named_and_the_battle_goes_on(store, monkeypatch):
    def refuse(messages, tokenizer, **settings):
        raise TextMarkerSaid("messages[2] (user) holds '[/INST]'")

    monkeypatch.setattr("data.chat.encode_prompt", refuse)
    local = LocalSpeaker.__new__(LocalSpeaker)
    local.policy, local.tokenizer = SimpleNamespace(config=SimpleNamespace(max_length=64)), None
    local.sampling = SimpleNamespace(max_new_tokens=8)
    arena = arena_of(store, "x", "y")
    battle = list(arena.say("hello", None, "ann"))[-1]
    answering = arena.speakers.pop("x")
    arena.speakers["x"] = local
    with pytest.raises(ValueError, match=r"One of the models .* such as \[/INST\]\. Write your message without it"):
        list(arena.say("a [/INST] b", battle, "ann"))
    assert not battle.over and [len(talk) for talk in battle.talks] == [2, 2]
    arena.speakers["x"] = answering
    assert list(arena.say("again", battle, "ann"))[-1] is battle and battle.turns == 2


def test_nothing_is_voted_on_before_it_is_answered(store):
    with pytest.raises(ValueError, match="nothing to vote on"):
        arena_of(store, "x", "y").vote(None, "ann", "a")
    store.begin_battle("b", "ann", "x", "y")
    with pytest.raises(ValueError, match="no answers"):
        store.vote("b", "ann", "a")
    with pytest.raises(sqlite3.IntegrityError):
        store.add_turn("no such battle", 1, "p", "a", "b")


def test_simultaneous_votes_are_all_there_and_none_twice(store):
    refused, arena = [], arena_of(store, "x", "y", "z")

    def person(number):
        for i in range(20):
            battle = play(arena, f"v{number}", ("a", "b", "tie", "both_bad")[i % 4])
            try:
                store.vote(battle.id, f"v{number}", "a")
            except ValueError:
                refused.append(battle.id)

    people = [threading.Thread(target=person, args=(n,)) for n in range(20)]
    for thread in people:
        thread.start()
    for thread in people:
        thread.join()
    battles = store.battles()
    assert len(battles) == len({battle["id"] for battle in battles}) == len(refused) == 400


VOTER = """
import sys
from pathlib import Path
from arena.store import Store
store = Store(Path(sys.argv[1]))
for n in range(10_000):
    store.begin_battle(f"{n}", "v", "x", "y")
    store.add_turn(f"{n}", 1, "p", "a", "b")
    store.vote(f"{n}", "v", "a")
    print(n, flush=True)
"""


def test_every_acknowledged_vote_survives_kill_9(tmp_path):
    path = tmp_path / "arena.sqlite"
    process = subprocess.Popen([sys.executable, "-c", VOTER, str(path)], stdout=subprocess.PIPE, text=True)
    acknowledged = [int(process.stdout.readline()) for _ in range(50)]
    process.send_signal(signal.SIGKILL)
    acknowledged += [int(line) for line in process.communicate()[0].split()]
    store = Store(path)
    assert {int(battle["id"]) for battle in store.battles()} >= set(acknowledged)
    store.close()


def test_pairs_are_chosen_where_the_interval_is_widest_and_sides_by_a_coin(store):
    rng, models = random.Random(0), ["x", "y", "z"]
    for n in range(12):
        store.begin_battle(f"{n}", "v", "x", "y")
        store.add_turn(f"{n}", 1, "p", "a", "b")
        store.vote(f"{n}", "v", "ab"[n % 2])
    assert {frozenset(choose_pair(store, models, rng)) for _ in range(20)} == {frozenset("xz"), frozenset("yz")}
    left = sum(choose_pair(store, ["x", "y"], rng)[0] == "x" for _ in range(400))
    assert 160 < left < 240
    assert tally(store, models)["x", "y"] == {"battles": 12, "votes": 12, "wins": 6.0, "left": 12}


def test_a_win_is_the_winners_on_whichever_side_it_stood(store):
    for n, (left, right) in enumerate((("x", "y"), ("y", "x"), ("y", "x"))):
        store.begin_battle(f"{n}", "v", left, right)
        store.add_turn(f"{n}", 1, "p", "a", "b")
        store.vote(f"{n}", "v", "a")
    assert tally(store, ["x", "y"])["x", "y"] == {"battles": 3, "votes": 3, "wins": 1.0, "left": 1}


def test_an_item_that_somebody_began_is_read_before_a_new_one(store):
    store.add_items([{"id": n, "prompt": [], "answers": ["p", "q"], "readers": 2} for n in ("new", "begun")])
    store.annotate("begun", "ann", ranks=[1, 2], acceptable=True, reason="", shown=[0, 1])
    assert store.next_item("bob", {})["id"] == "begun" and store.next_item("ann", {})["id"] == "new"


def test_battles_that_wait_for_their_vote_count_as_half(store):
    for n in range(4):
        store.begin_battle(f"{n}", "v", "x", "y")
    rng = random.Random(0)
    assert {frozenset(choose_pair(store, ["x", "y", "z"], rng)) for _ in range(20)} == {
        frozenset("xz"),
        frozenset("yz"),
    }


def test_votes_of_people_with_known_tastes_recover_the_order(store):
    strength, rng = {"poor": 0.0, "fair": 1.0, "good": 2.0, "best": 3.0}, random.Random(1)
    arena = arena_of(store, *strength)
    for n in range(400):
        battle = list(arena.say("hello", None, f"v{n}"))[-1]
        a, b = battle.models
        wins = rng.random() < 1 / (1 + 2.718281828 ** (strength[b] - strength[a]))
        arena.vote(battle, f"v{n}", "a" if wins else "b")
    table, _ = standing(store, list(strength))
    assert table["model"].tolist() == ["best", "good", "fair", "poor"]
    assert ((table["lower"] < table["rating"]) & (table["rating"] < table["upper"])).all()


def test_what_is_exported_reads_back_as_comparisons_rankings_and_labels(store, tmp_path):
    arena = arena_of(store, "x", "y")
    first = list(arena.say("one", None, "ann"))[-1]
    two_turns = list(arena.say("two", first, "ann"))[-1]
    arena.vote(two_turns, "ann", "b")
    play(arena, "bob", "both_bad")
    store.begin_battle("alike", "cy", "x", "y")
    store.add_turn("alike", 1, "p", "one and the same", "one and the same ")
    store.vote("alike", "cy", "a")  # a verdict, and no comparison: there is nothing to prefer
    store.add_items(
        [{"id": "i", "prompt": [{"role": "user", "content": "q"}], "answers": ["p", "q", "r"], "readers": 2}]
    )
    store.annotate("i", "ann", ranks=[2, 1, 2], acceptable=True, reason="", shown=[0, 1, 2])
    store.annotate("i", "bob", ranks=[1, 2, 3], acceptable=False, reason="bad", shown=[2, 1, 0])
    assert export(store, tmp_path) == {
        "verdicts.jsonl": 3,
        "comparisons.jsonl": 1,
        "rankings.jsonl": 1,
        "labels.jsonl": 6,
    }
    (pair,) = read_records(tmp_path / "comparisons.jsonl", formats.preferences, BadRows("error"))
    winner, loser = two_turns.models[1], two_turns.models[0]  # the vote was "b"
    assert [m["content"] for m in pair.prompt] == ["one", f"one (1{winner})", "two"]
    assert (pair.chosen, pair.rejected) == (f"two (3{winner})", f"two (3{loser})")
    (rank,) = read_records(tmp_path / "rankings.jsonl", formats.preferences, BadRows("error"))
    assert list(rank.ranks) == [2, 1, 2] and rank.completions == ["p", "q", "r"]
    verdicts = read_votes([str(tmp_path / "verdicts.jsonl")], "verdicts").to_dict("records")
    assert [(v["verdict"], v["both_bad"], v["turn"]) for v in verdicts] == [
        ("b", False, 2),
        ("tie", True, 1),
        ("a", False, 1),
    ]
    labels = [json.loads(line)["label"] for line in (tmp_path / "labels.jsonl").read_text().splitlines()]
    assert labels == ["second", "tie", "first", "first", "first", "first"]


def test_an_item_goes_to_as_many_annotators_as_it_wants_and_to_none_twice(tmp_path, store):
    rows = [{"prompt": f"q{n}", "completions": ["p", "q"], "ranks": [1, 2]} for n in range(40)]
    write_jsonl(tmp_path / "items.jsonl", rows)
    items = load_items([str(tmp_path / "items.jsonl")], double_share=0.5, seed=0)
    store.add_items(items)
    assert store.add_items(items) == 0  # a restart adds nothing
    desk, read = Desk(store, LIMITS, seed=0), {}
    for annotator in ("ann", "bob", "cat"):
        while (item := desk.next(annotator)) is not None:
            desk.submit(item, annotator, "1 > 2", False, "")
            read.setdefault(item["id"], []).append(annotator)
    assert all(len(set(who)) == len(who) for who in read.values())
    assert sorted(map(len, read.values())) == sorted(item["readers"] for item in items)
    assert 10 < sum(item["readers"] == 2 for item in items) < 30


def test_readers_at_the_same_time_get_different_items_until_one_of_them_leaves(store, monkeypatch):
    store.add_items([{"id": f"{n}", "prompt": [], "answers": ["p", "q"], "readers": 1 + (n == 0)} for n in range(3)])
    desk = Desk(store, LIMITS, seed=0)
    names = [desk.next(who)["id"] for who in ("ann", "bob", "cat", "dan")]
    assert names == ["0", "0", "1", "2"] and desk.next("eve") is None  # item 0 wants two readers
    assert desk.next("cat")["id"] == "1"  # who loads the page again goes on with the same item
    now = time.monotonic() + LOAN
    monkeypatch.setattr(time, "monotonic", lambda: now)
    assert desk.next("eve")["id"] == "0"


def test_ranks_are_stored_in_the_answers_own_order(store):
    store.add_items([{"id": "i", "prompt": [], "answers": ["p", "q", "r"], "readers": 1}])
    desk = Desk(store, LIMITS, seed=3)
    item = desk.next("ann")
    desk.submit(item, "ann", "3 > 1=2", False, "")
    (row,) = store.annotations()
    assert row["ranks"][item["shown"][2]] == 1 and sorted(row["ranks"]) == [1, 2, 2]
    with pytest.raises(ValueError, match="ranked item i already"):
        desk.submit(item, "ann", "1 > 2 > 3", False, "")


@pytest.mark.parametrize("text, ranks", [("2 > 1=3", [2, 1, 2]), ("1=2=3", [1, 1, 1]), (" 3>2>1 ", [3, 2, 1])])
def test_rankings_are_read_as_people_write_them(text, ranks):
    assert parse_ranking(text, 3) == ranks


@pytest.mark.parametrize("text", ["", "1", "1 > 2", "1 > 2 > 2", "1 > 2 > 4", "a > b", "1 >> 2 > 3", "> 1 2 3"])
def test_an_incomplete_ranking_is_refused(text):
    with pytest.raises(ValueError):
        parse_ranking(text, 3)


def test_text_from_people_and_models_is_shown_as_text():
    battle = Battle(talks=([{"role": "user", "content": "<script>alert(1)</script>"}], []))
    assert talks(battle)[0][0]["content"] == "&lt;script&gt;alert(1)&lt;/script&gt;"


def test_a_model_that_fails_ends_the_battle_without_telling_its_name(store):
    arena = arena_of(store, "x", "y", dumb=("x",))
    battle = list(arena.say("hello", None, "ann"))[-1]
    assert battle.over and store.battles() == []
    assert "secret" not in repr(battle.talks)


@pytest.mark.parametrize("body", [b"", b"data: {half", b"data: [1]\n\n", b'data: {"choices": [{"delta": null}]}\n\n'])
def test_whatever_an_endpoint_streams_the_visitor_is_told_and_the_key_is_not(body, monkeypatch):
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args):
            pass

        def do_POST(self):
            sent = body or json.dumps({"error": {"message": self.headers["Authorization"]}}).encode()
            self.send_response(200 if body else 401)
            self.send_header("Content-Type", "text/event-stream" if body else "application/json")
            self.send_header("Content-Length", str(len(sent) + 100 * bool(body)))  # promised, and cut
            self.end_headers()
            self.wfile.write(sent)

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("ARENA_KEY", "secret-key")
    sampling = OmegaConf.create({"temperature": 1.0, "top_p": 1.0, "max_new_tokens": 4})
    address = f"http://127.0.0.1:{server.server_address[1]}/v1"
    speaker = EndpointSpeaker(base_url=address, model="m", api_key_env="ARENA_KEY", sampling=sampling)
    with pytest.raises(SpeakerError) as told:
        list(speaker.stream([{"role": "user", "content": "hello"}], 0))
    server.shutdown()
    assert "secret-key" not in str(told.value) and told.value.__cause__ is None


def test_limits_speak_to_the_visitor():
    limits = Limits(messages_per_minute=2, max_characters=10)
    for text, message in (("  ", "write something"), ("x" * 11, "at most 10")):
        with pytest.raises(ValueError, match=message):
            limits.check_text(text)
    limits.spend("ann"), limits.spend("ann"), limits.spend("bob")
    with pytest.raises(ValueError, match="At most 2 messages a minute"):
        limits.spend("ann")


def test_a_newer_or_foreign_database_is_refused(tmp_path):
    connection = sqlite3.connect(tmp_path / "new.sqlite")
    connection.execute(f"PRAGMA user_version = {len(MIGRATIONS) + 1}")
    connection.close()
    with pytest.raises(ValueError, match="update the program"):
        Store(tmp_path / "new.sqlite")
    (tmp_path / "text.sqlite").write_text("this is no database, but it is long enough to be looked at" * 20)
    with pytest.raises(ValueError, match="no database of an arena"):
        Store(tmp_path / "text.sqlite")
