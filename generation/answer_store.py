"""The cache of answers: one SQLite file of JSON texts, each with a checksum. It cannot contain code that is run.

The file may come from somebody else, or from a damaged disk. A foreign schema (views and triggers run SQL), a damaged
page and a changed text are refused by name. None of them is skipped.
"""

import hashlib
import json
import sqlite3
import threading
from pathlib import Path

FILE = "answers.sqlite"
SCHEMA = "CREATE TABLE answers (key TEXT PRIMARY KEY, text TEXT NOT NULL, sha256 TEXT NOT NULL) WITHOUT ROWID"
LONGEST = 64 * 2**20  # bytes of one stored text


class AnswerStore:
    """A mapping of key to JSON object. Many processes may share the directory; an entry is on disk when `put` returns.

    Raises:
        ValueError: (when it is opened or read) the file is damaged or not one of ours. The message says what to do.
    """

    def __init__(self, directory: str | Path):
        self.path = Path(directory) / FILE
        self._lock = threading.Lock()  # `ask` may be called from several threads of one process
        self._connection: sqlite3.Connection | None = None
        if self.path.exists():  # otherwise the first `put` creates it
            self._open()

    def get(self, key: str) -> dict | None:
        """The entry, or None where there is none."""
        with self._lock:
            if self._connection is None and not self.path.exists():
                return None
            try:
                row = self._open().execute("SELECT text, sha256 FROM answers WHERE key = ?", (key,)).fetchone()
            except (sqlite3.DatabaseError, UnicodeError) as error:
                raise self._damaged(error) from error
        if row is None:
            return None
        text, digest = row
        if not isinstance(text, str) or digest != _digest(key, text):
            raise self._damaged(f"the entry {key[:16]} does not have its checksum")
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            value = None
        if not isinstance(value, dict):
            raise self._damaged(f"the entry {key[:16]} is no JSON object")
        return value

    def put(self, key: str, value: dict | None) -> None:
        """Store or replace an entry. None removes it."""
        text = json.dumps(value, ensure_ascii=True)
        with self._lock:
            try:
                with self._open() as connection:
                    connection.execute("DELETE FROM answers WHERE key = ?", (key,))
                    if value is not None:
                        connection.execute("INSERT INTO answers VALUES (?, ?, ?)", (key, text, _digest(key, text)))
            except sqlite3.OperationalError as error:  # disk full, no permission, another process holds it for long
                raise OSError(f"cannot write {self.path}: {error}; answers so far are kept") from error
            except sqlite3.DatabaseError as error:
                raise self._damaged(error) from error

    def close(self) -> None:
        """Close the file; the next call opens it again."""
        with self._lock:
            if self._connection is not None:
                self._connection.close()
            self._connection = None

    def _open(self) -> sqlite3.Connection:
        if self._connection is not None:
            return self._connection
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            connection = sqlite3.connect(self.path, timeout=60, check_same_thread=False)
        except (OSError, sqlite3.OperationalError) as error:
            raise ValueError(f"cannot open {self.path}: {error}; name another directory as client.cache") from error
        try:
            connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, LONGEST)
            connection.execute("PRAGMA trusted_schema = OFF")  # a foreign schema cannot call functions
            connection.execute("PRAGMA cell_size_check = ON")
            connection.execute("PRAGMA synchronous = NORMAL")
            with connection:
                if not connection.execute("SELECT 1 FROM sqlite_schema").fetchone():
                    connection.execute(SCHEMA.replace("TABLE", "TABLE IF NOT EXISTS", 1))
            self._check(connection)
        except sqlite3.OperationalError as error:
            connection.close()
            raise OSError(f"cannot open {self.path}: {error}") from error
        except (sqlite3.DatabaseError, UnicodeError) as error:
            connection.close()
            raise self._damaged(error) from error
        except ValueError:
            connection.close()
            raise
        self._connection = connection
        return connection

    def _check(self, connection: sqlite3.Connection) -> None:
        schema = [sql for (sql,) in connection.execute("SELECT sql FROM sqlite_schema")]
        if schema != [SCHEMA]:
            raise ValueError(
                f"{self.path} is not an answer cache of this version (its schema is {str(schema)[:200]}); move it "
                "away, or set client.cache to another directory"
            )
        if (found := connection.execute("PRAGMA quick_check(1)").fetchone()[0]) != "ok":
            raise self._damaged(found)

    def _damaged(self, what) -> ValueError:
        return ValueError(
            f"{self.path} is damaged ({what}); move it away and the questions are asked again, or save what can still "
            f"be read: sqlite3 {self.path} .recover | sqlite3 rescued.sqlite"
        )


def _digest(key: str, text: str) -> str:
    return hashlib.sha256(f"{key}\n{text}".encode()).hexdigest()
