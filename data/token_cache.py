"""The token cache. The first process that needs tokens computes them, for all ranks, restarts and sweep jobs.

    CACHE/<key>/         a store (data/token_store.py)
    CACHE/<key>.lock     the process that writes the store holds this lock

<key> is the sha256 of everything that determines the tokens: content, part and layout of the files, the tokenizer with
its chat template, the settings, and the code. File names are not part of it, so a moved file finds its tokens. A store
is written to a temporary directory and renamed, so it is complete or absent. Checksums find later damage, and then the
store is written again.
"""

import fcntl
import json
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from hashlib import sha256
from importlib.metadata import version
from itertools import chain, islice
from pathlib import Path
from typing import Any

from data.adapters import Unjoined
from data.encoder import Job, chunked, in_processes, num_processes
from data.files import each_row, find_files
from data.records import BadRows, counted, read_records, split_name
from data.token_store import Encodings, Store, Writer
from runtime.display import RowProgress
from runtime.files import remove, sha256_of, sha256_once, sync

log = logging.getLogger(__name__)
ALONE = 8  # files of up to this many chunks are encoded without further processes
ENGINES = ("tokenizers", "jinja2", "numpy")  # distributions whose versions may change tokens


def open_store(name: str, file: str, job: Job, cache: str) -> Store:
    """The encoded rows of a file (a value of the config key `name`), computed here if the cache does not have them.

    Raises:
        ValueError: a row is bad with on_bad_row=error, the file is damaged, or the cache cannot be written.
    """
    files = find_files(split_name(file)[0])
    made_from = _made_from(files, job)
    home = Path(cache) / sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()[:32]
    if (store := _opened(home, files)) is not None:
        return store
    try:
        home.parent.mkdir(parents=True, exist_ok=True)
        with _locked(home.with_suffix(".lock"), f"{name}: {file}"):
            store = _opened(home, files)
            return store if store is not None else _make(name, file, files, job, home, made_from)
    except OSError as error:
        raise ValueError(
            f"cannot write the tokens of {file} to {cache}: {error.strerror or error}; free some space there, or "
            "name another "
            "directory (data.cache=DIR)"
        ) from error


def _made_from(files: list[Path], job: Job) -> dict[str, Any]:
    """Everything that determines the tokens, as JSON."""
    tokenizer, layout = job.encoder.tokenizer, job.layout
    return {
        "files": [["".join(path.suffixes[-2:]), sha256_once(path)] for path in files],
        "part": job.part,
        "kind": type(job.encoder).__name__,
        "settings": job.encoder.settings(),
        "tokenizer": [tokenizer.fingerprint, tokenizer.bos_id, tokenizer.stop_ids],
        "layout": [layout.format, dict(layout.columns), layout.languages],
        "on_bad_row": job.on_bad_row,
        "code": code_digest(),
        "versions": [f"{name} {version(name)}" for name in ENGINES],
    }


@lru_cache(1)
def code_digest() -> str:
    """sha256 of the code that computes tokens."""
    here = Path(__file__).parent
    files = sorted(path for pattern in ("*.py", "adapters/*.py", "vocabularies/*.py") for path in here.glob(pattern))
    return sha256("".join(f"{path.name} {sha256_of(path)}\n" for path in files).encode()).hexdigest()


def _opened(home: Path, files: list[Path]) -> Store | None:
    """The store. None if there is no complete store."""
    if not home.exists():
        return None
    try:
        return Store(home, files)
    except (ValueError, KeyError, OSError) as error:
        if home.exists():  # otherwise another process has just removed it, to write it again
            log.warning("the cached tokens are damaged and are computed again: %s", error)
        return None


@contextmanager
def _locked(path: Path, what: str) -> Iterator[None]:
    """Hold the lock. Other processes wait for it and log this."""
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("%s: another process is computing the tokens; waiting for it", what)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _make(name: str, file: str, files: list[Path], job: Job, home: Path, made_from: dict[str, Any]) -> Store:
    started, tmp_path = time.monotonic(), home.with_suffix(".making")
    remove(tmp_path)  # left by a process that was killed
    tmp_path.mkdir()
    try:
        writer = Writer(tmp_path, files)
        try:
            processes = _write_rows(name, file, job, writer)
        except Unjoined:
            writer = Writer(tmp_path, files)
            processes = _write_records(name, file, job, writer)
        if [sha256_of(path) for path in files] != [digest for _, digest in made_from["files"]]:
            raise ValueError(f"{file} changed while it was read; start again when it is complete")
        writer.close(made_from)
        remove(home)  # a damaged store
        os.replace(tmp_path, home)
        sync(home.parent)
    finally:
        remove(tmp_path)
    tokens, seconds = writer.ends["tokens"], time.monotonic() - started
    log.info(
        "%s: computed %s tokens of %s in %.1f s with %d processes: %s",
        name,
        f"{tokens:,}",
        file,
        seconds,
        processes,
        home,
    )
    return Store(home, files)


def _write_rows(name: str, file: str, job: Job, writer: Writer) -> int:
    """Encode the rows while they are read. Returns the number of processes that did it."""
    if job.encoder.regroup is not None:
        raise Unjoined
    path = split_name(file)[0]
    chunks = chunked(counted(each_row(path), path))
    head = list(islice(chunks, ALONE + 1))
    if len(head) <= ALONE:
        return _write(map(job.encode_rows, head), writer)
    total, processes = sum(1 for _ in each_row(path)), num_processes()
    with RowProgress(f"{name}: computing tokens", total) as progress:
        return _write(in_processes(job.encode_rows, chain(head, chunks), processes), writer, progress, processes)


def _write_records(name: str, file: str, job: Job, writer: Writer) -> int:
    """The same for files that must be read completely first: parts of trees, or pairs that become rankings."""
    bad_rows = BadRows(job.on_bad_row)
    records = read_records(file, job.encoder.parse, bad_rows, job.layout)
    records = job.encoder.regroup(records) if job.encoder.regroup else records
    for problem in bad_rows.problems:
        writer.skip(*problem)
    for where in bad_rows.left_out:
        writer.mark("language", where)
    chunks = list(chunked(records))
    if len(chunks) <= ALONE:
        return _write(map(job.encode_records, chunks), writer)
    processes = num_processes()
    with RowProgress(f"{name}: computing tokens", len(records)) as progress:
        return _write(in_processes(job.encode_records, chunks, processes), writer, progress, processes)


def _write(
    encodings: Iterator[Encodings], writer: Writer, progress: RowProgress | None = None, processes: int = 1
) -> int:
    for encoded in encodings:
        writer.add(encoded)
        if progress is not None:
            progress.advance(encoded.num_rows, len(encoded.tokens))
    return processes
