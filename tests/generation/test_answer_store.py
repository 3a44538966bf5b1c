"""Answers on disk are JSON with a checksum: damage is refused by name, and nothing that lies there can run."""

import json
import multiprocessing
import random
import sqlite3

import pytest

from generation.answer_store import FILE, AnswerStore, _digest
from generation.clients import Answer
from generation.scripted_client import ScriptedClient

ASK = {"temperature": 0.0, "max_tokens": 9, "seed": 0}
QUESTIONS = [[{"role": "user", "content": f"q{i}"}] for i in range(40)]


@pytest.fixture
def kept(tmp_path):
    """A directory with forty answers, and the answers."""
    client = ScriptedClient(
        lambda r: f"answer to {r.messages[0]['content']} \u00e9\U0001f600\x00" * 9, cache=str(tmp_path)
    )
    answers = client.ask(QUESTIONS, **ASK)
    client.close()
    return tmp_path, answers


def reread(directory) -> list[Answer]:
    client = ScriptedClient(lambda r: "asked again", cache=str(directory))
    try:
        return client.ask(QUESTIONS, **ASK)
    finally:
        client.close()


def test_an_answer_comes_back_as_it_was(kept):
    directory, answers = kept
    assert reread(directory) == answers


def test_every_damage_is_noticed_or_harmless(kept):
    """A bit turned, a block lost, the end cut off: refused with the file's name, or the answers are right, or (the key
    was hit) the question is asked again."""
    directory, answers = kept
    path, dice = directory / FILE, random.Random(0)
    whole = path.read_bytes()
    refused = 0
    for trial in range(150):
        damaged, at = bytearray(whole), dice.randrange(len(whole))
        if trial % 3 == 0:
            damaged[at] ^= 1 << dice.randrange(8)
        elif trial % 3 == 1:
            damaged[at : at + 512] = bytes(len(damaged[at : at + 512]))
        else:
            del damaged[at:]
        path.write_bytes(damaged)
        try:
            found = reread(directory)
        except ValueError as error:
            assert str(path) in str(error)
            refused += 1
        else:
            assert all(a == b or a.text == "asked again" for a, b in zip(found, answers, strict=True))
    assert refused > 75


def test_a_changed_text_is_refused_though_the_pages_are_sound(kept):
    directory, _ = kept
    with sqlite3.connect(directory / FILE) as connection:
        connection.execute("UPDATE answers SET text = replace(text, 'answer', 'ANSWER')")
    with pytest.raises(ValueError, match="checksum.*move it away.*recover"):
        reread(directory)


@pytest.mark.parametrize(
    "sql",
    [
        "CREATE TABLE Cache (rowid INTEGER PRIMARY KEY, key BLOB, raw INTEGER, mode INTEGER, value BLOB)",
        "CREATE TRIGGER t AFTER INSERT ON answers BEGIN DELETE FROM answers; END",
        "CREATE VIEW v AS SELECT load_extension('/tmp/x.so')",
        "CREATE INDEX i ON answers (hex(text))",
    ],
)
def test_a_file_with_anything_but_our_table_is_refused(kept, sql):
    directory, _ = kept
    with sqlite3.connect(directory / FILE) as connection:
        connection.execute(sql)
    with pytest.raises(ValueError, match="not an answer cache of this version"):
        reread(directory)


def test_a_file_that_is_no_database_is_refused(tmp_path):
    (tmp_path / FILE).write_bytes(b"\x80\x04cposix\nsystem\n" * 300)
    with pytest.raises(ValueError, match="is damaged"):
        AnswerStore(tmp_path)


GOOD = {
    "text": "t",
    "finish_reason": "stop",
    "prompt_tokens": 1,
    "completion_tokens": 1,
    "error": "",
    "reasoning": "",
    "model": "",
    "counted_by_us": False,
}


@pytest.mark.parametrize(
    "text",
    [
        json.dumps(GOOD | {"text": 7}),
        json.dumps(GOOD | {"more": 1}),
        json.dumps(GOOD | {"prompt_tokens": -1}),
        json.dumps(GOOD | {"completion_tokens": 10**20}),
        json.dumps(GOOD | {"finish_reason": "won"}),
        json.dumps(GOOD | {"counted_by_us": 1}),
        json.dumps(GOOD | {"text": "\ud83d"}),
        "[]",
        "null",
        "{",
        "[" * 99999,
    ],
)
def test_an_entry_with_a_good_checksum_that_is_no_answer_is_refused(text, tmp_path):
    asked = []
    client = ScriptedClient(lambda r: asked.append(r.key) or "x", cache=str(tmp_path))
    client.ask(QUESTIONS[:1], **ASK)
    client.close()
    with sqlite3.connect(tmp_path / FILE) as connection:
        connection.execute("UPDATE answers SET text = ?, sha256 = ?", (text, _digest(asked[0], text)))
    with pytest.raises(ValueError, match=FILE):
        reread(tmp_path)


def write_many(directory: str, start: int) -> None:
    store = AnswerStore(directory)
    for i in range(start, start + 40):
        store.put(f"key{i}", {"n": i})


def test_processes_share_a_directory(tmp_path):
    started = [
        multiprocessing.get_context("fork").Process(target=write_many, args=(str(tmp_path), 20 * k)) for k in range(4)
    ]
    for process in started:
        process.start()
    for process in started:
        process.join(60)
        assert process.exitcode == 0
    store = AnswerStore(tmp_path)
    assert [store.get(f"key{i}") for i in range(100)] == [{"n": i} for i in range(100)]
    assert store.get("key100") is None
