"""Battles, votes and annotations in SQLite. One thread writes; a vote is confirmed only when it is on disk."""

import json
import os
import queue
import sqlite3
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from pathlib import Path

# Step k takes a database from version k to k + 1 (PRAGMA user_version). Never edit a step that was released: add one.
MIGRATIONS = (
    """
    CREATE TABLE battles (
        id TEXT PRIMARY KEY, visitor TEXT NOT NULL, model_a TEXT NOT NULL, model_b TEXT NOT NULL, began REAL NOT NULL);
    CREATE TABLE turns (
        battle TEXT NOT NULL REFERENCES battles(id), turn INTEGER NOT NULL, prompt TEXT NOT NULL,
        answer_a TEXT NOT NULL, answer_b TEXT NOT NULL, PRIMARY KEY (battle, turn));
    CREATE TABLE votes (
        battle TEXT PRIMARY KEY REFERENCES battles(id), at REAL NOT NULL,
        verdict TEXT NOT NULL CHECK (verdict IN ('a', 'b', 'tie', 'both_bad')));
    CREATE TABLE items (id TEXT PRIMARY KEY, prompt TEXT NOT NULL, answers TEXT NOT NULL, readers INTEGER NOT NULL);
    CREATE TABLE annotations (
        item TEXT NOT NULL REFERENCES items(id), annotator TEXT NOT NULL, ranks TEXT NOT NULL,
        acceptable INTEGER NOT NULL, reason TEXT NOT NULL, shown TEXT NOT NULL, at REAL NOT NULL,
        PRIMARY KEY (item, annotator));
    CREATE INDEX battles_by_pair ON battles (model_a, model_b);
    """,
)
TABLES = {"battles", "turns", "votes", "items", "annotations"}
GROUP = 256  # at most so many writes share a commit


class Store:
    """The database. One thread does all writes and may group them; a write returns when its transaction is on disk.

    model_a is the model on the left. Each reader has its own connection and never waits for the writer (WAL).
    """

    def __init__(self, path: Path):
        self.path = path
        self._writes: queue.SimpleQueue = queue.SimpleQueue()
        self._local = threading.local()
        _migrate(path)
        self._writer = threading.Thread(target=self._write_forever, daemon=True)
        self._writer.start()

    def close(self) -> None:
        """Finish the waiting writes."""
        self._writes.put(None)
        self._writer.join()

    # ---- battles

    def begin_battle(self, battle: str, visitor: str, model_a: str, model_b: str) -> None:
        self._write("INSERT INTO battles VALUES (?, ?, ?, ?, ?)", (battle, visitor, model_a, model_b, time.time()))

    def add_turn(self, battle: str, turn: int, prompt: str, answer_a: str, answer_b: str) -> None:
        """Raises ValueError if the battle has a vote already, as the vote does not count for later turns."""
        sql = "INSERT INTO turns SELECT ?, ?, ?, ?, ? WHERE NOT EXISTS (SELECT 1 FROM votes WHERE battle = ?)"
        if self._write(sql, (battle, turn, prompt, answer_a, answer_b, battle)) != 1:
            raise ValueError("You have voted on this battle; your next message begins a new one.")

    def vote(self, battle: str, visitor: str, verdict: str) -> None:
        """The visitor's vote on a battle of theirs.

        Raises:
            ValueError: the battle is not theirs, has no answers yet, or has a vote.
        """
        sql = (
            "INSERT INTO votes (verdict, at, battle) SELECT ?, ?, id FROM battles WHERE id = ? AND visitor = ? "
            "AND EXISTS (SELECT 1 FROM turns WHERE battle = id)"
        )
        try:
            rows = self._write(sql, (verdict, time.time(), battle, visitor))
        except sqlite3.IntegrityError as error:
            raise ValueError(f"battle {battle} has a vote already") from error
        if rows != 1:
            raise ValueError(f"battle {battle} is not this visitor's, or has no answers to vote on yet")

    def battles(self) -> list[dict]:
        """Every battle with a vote, with its turns, in the order of the votes."""
        turns: dict[str, list[dict]] = {}
        for row in self.read("SELECT * FROM turns ORDER BY battle, turn"):
            turns.setdefault(row["battle"], []).append(row)
        voted = self.read(
            "SELECT b.*, v.verdict, v.at FROM battles b JOIN votes v ON v.battle = b.id ORDER BY v.at, b.id"
        )
        return [battle | {"turns": turns[battle["id"]]} for battle in voted]

    # ---- annotation

    def add_items(self, items: list[dict]) -> int:
        """Add items {id, prompt, answers, readers}. Existing ones stay as they are. Returns the number of new ones."""
        rows = [(i["id"], json.dumps(i["prompt"]), json.dumps(i["answers"]), i["readers"]) for i in items]
        return sum(self._write("INSERT OR IGNORE INTO items VALUES (?, ?, ?, ?)", row) for row in rows)

    def next_item(self, annotator: str, lent: dict[str, int]) -> dict | None:
        """The next item for this annotator, or None. Items with an annotation come first, and no item comes twice.

        `lent`: for each item id, the number of other people who are reading it now.
        """
        sql = (
            "SELECT i.*, count(a.item) AS done FROM items i LEFT JOIN annotations a ON a.item = i.id GROUP BY i.id "
            "HAVING done + ifnull((SELECT value FROM json_each(?) WHERE key = i.id), 0) < i.readers "
            "AND total(a.annotator = ?) = 0 ORDER BY done DESC, i.rowid LIMIT 1"
        )
        rows = self.read(sql, (json.dumps(lent), annotator))
        return _item(rows[0]) if rows else None

    def annotate(
        self, item: str, annotator: str, *, ranks: list[int], acceptable: bool, reason: str, shown: list[int]
    ) -> None:
        """Store an annotator's ranks in the original order of the answers (1 = best, equal = tie).

        `shown` is the order on the page. Raises ValueError if this annotator has ranked the item already.
        """
        row = (item, annotator, json.dumps(ranks), acceptable, reason, json.dumps(shown), time.time())
        try:
            self._write("INSERT INTO annotations VALUES (?, ?, ?, ?, ?, ?, ?)", row)
        except sqlite3.IntegrityError as error:
            raise ValueError(f"{annotator} ranked item {item} already, or there is no such item") from error

    def annotations(self) -> list[dict]:
        """Every annotation with its item, in the order of their times."""
        rows = self.read("SELECT i.*, a.* FROM annotations a JOIN items i ON i.id = a.item ORDER BY a.at")
        return [_item(row) | {"ranks": json.loads(row["ranks"]), "shown": json.loads(row["shown"])} for row in rows]

    # ---- connections

    def read(self, sql: str, values: tuple = ()) -> list[dict]:
        """The rows of a query, on this thread's own connection."""
        if not hasattr(self._local, "connection"):
            self._local.connection = _connect(self.path)
            self._local.connection.row_factory = sqlite3.Row
        return [dict(row) for row in self._local.connection.execute(sql, values)]

    def _write(self, sql: str, values: tuple) -> int:
        """The number of changed rows. It returns when they are on disk."""
        future: Future = Future()
        self._writes.put((sql, values, future))
        return future.result()

    def _write_forever(self) -> None:
        connection = _connect(self.path)
        while (first := self._writes.get()) is not None:
            group, stop = [first], False
            while len(group) < GROUP and not self._writes.empty():
                item = self._writes.get()
                if item is None:
                    stop = True
                    break
                group.append(item)
            _commit(connection, group)
            if stop:
                break
        connection.close()


def _commit(connection: sqlite3.Connection, group: list[tuple[str, tuple, Future]]) -> None:
    """Each statement succeeds or fails by itself. The results are set when the commit is on disk."""
    answers: list[Callable[[], None]] = []
    try:
        connection.execute("BEGIN IMMEDIATE")
        for sql, values, future in group:
            try:
                changed = connection.execute(sql, values).rowcount  # a failed statement undoes only itself
                answers.append(partial(future.set_result, changed))
            except sqlite3.Error as error:
                answers.append(partial(future.set_exception, error))
        connection.execute("COMMIT")
    except sqlite3.Error as error:  # the disk is full or the file is gone: every write fails
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        answers = [partial(future.set_exception, error) for _, _, future in group]
    for answer in answers:
        answer()


def _connect(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(path, isolation_level=None, timeout=30)
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")  # a commit is on disk when it returns, power cut or not
    connection.execute("PRAGMA foreign_keys = ON")
    return connection


def _migrate(path: Path) -> None:
    os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))  # only this user may read people's texts
    try:
        connection = _connect(path)
        version = connection.execute("PRAGMA user_version").fetchone()[0]
        faults = [row[0] for row in connection.execute("PRAGMA quick_check(3)")]
        known = {row[0] for row in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        if faults != ["ok"]:
            raise sqlite3.DatabaseError(f"damaged: {'; '.join(map(str, faults))}")
        if 0 < version <= len(MIGRATIONS) and not known >= TABLES:
            raise sqlite3.DatabaseError(f"it lacks the tables {', '.join(sorted(TABLES - known))}")
        for table in sorted(TABLES & known):
            for _ in connection.execute(f"SELECT * FROM {table}"):
                pass  # an invalid text is noticed only when it is read
    except (sqlite3.DatabaseError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path} is no database of an arena, or a damaged one ({error}); save what is left with "
            f"`sqlite3 {path} .recover`, move it away, or choose another hydra.run.dir"
        ) from error
    if version > len(MIGRATIONS):
        raise ValueError(f"{path} has schema {version}, this program knows {len(MIGRATIONS)}: update the program")
    for number, step in enumerate(MIGRATIONS[version:], start=version + 1):
        connection.executescript(f"BEGIN; {step} PRAGMA user_version = {number}; COMMIT;")
    connection.close()


def _item(row: dict) -> dict:
    return row | {"prompt": json.loads(row["prompt"]), "answers": json.loads(row["answers"])}
