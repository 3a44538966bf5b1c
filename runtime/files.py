"""Atomic writes, so that a file is complete or absent, and checksums that detect later changes."""

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path

SUMS = "SHA256SUMS"  # as `sha256sum --check` reads it


def sync(path: Path) -> None:
    """Wait until the file, or the directory's list of names, is on the disk (fsync)."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def named_in_errors(path: Path) -> Iterator[None]:
    """Add this path to an OSError in the block. A failed write, as on a full disk, does not name its file."""
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.strerror is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a temporary file, sync it, rename it. After a crash either the old or the new file is complete."""
    tmp_path = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with named_in_errors(path), open(tmp_path, "wb") as file:
            file.write(content.encode("utf-8") if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(tmp_path, path)
    finally:
        with contextlib.suppress(OSError):
            tmp_path.unlink()
    sync(path.parent)


def read_object(path: Path, suggestion: str) -> dict:
    """The JSON object in the file, empty if there is none. Raises ValueError with the suggestion if it is damaged."""
    try:
        read = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error}); {suggestion}") from None
    if not isinstance(read, dict):
        raise ValueError(f"{path} is damaged (no object); {suggestion}")
    return read


def remove(path: Path) -> None:
    """Delete a file, a link (not its target), or a directory with its content. Do nothing if there is none."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sha256_of(path: Path) -> str:
    """Hex digest of the file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_once(path: Path) -> str:
    """The same, cached for this process while the file's size and time do not change."""
    there = path.stat()
    return _sha256_of(path, there.st_size, there.st_mtime_ns, there.st_ino)


@lru_cache(maxsize=4096)
def _sha256_of(path: Path, *as_it_is: int) -> str:
    return sha256_of(path)


def write_sums(directory: Path, names: Iterable[str] | None = None) -> None:
    """Write SHA256SUMS of these files of the directory, or of all. All of them are on the disk when this returns."""
    there = (str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file())
    names = sorted(set(there if names is None else names) - {SUMS})
    for name in names:
        sync(directory / name)
    write_whole(directory / SUMS, "".join(f"{sha256_of(directory / name)}  {name}\n" for name in names))


def read_sums(directory: Path) -> dict[str, str]:
    """{name: sha256} of the directory's SHA256SUMS, empty if it has none. Raises ValueError if it is damaged."""
    path = directory / SUMS
    if not path.is_file():
        return {}
    lines = path.read_bytes().decode("utf-8", errors="replace").splitlines()
    found = [re.fullmatch(r"([0-9a-f]{64}) [ *](.+)", line) for line in lines]
    if not found or not all(found):
        raise ValueError(f"{path} is damaged: it must have a sha256 and a name on each line; copy the directory again")
    return {match[2]: match[1] for match in found}


def check_sums(directory: Path, names: Iterable[str] | None = None) -> None:
    """Compare the files (all, or these where listed) with the directory's SHA256SUMS, if it has one.

    Raises:
        ValueError: a file differs or is missing. The message names each.
    """
    sums = read_sums(directory)
    wanted = sums.keys() if names is None else sums.keys() & set(names)
    missing = [name for name in wanted if not (directory / name).is_file()]
    differ = [name for name in wanted if name not in missing and sha256_once(directory / name) != sums[name]]
    if missing or differ:
        wrong = [f"{name} is missing" for name in missing] + [f"{name} differs" for name in differ]
        raise ValueError(
            f"{directory} does not match its {SUMS}: {'; '.join(sorted(wrong))}; copy the directory again, "
            f"or delete {SUMS} if the change was intended"
        )
