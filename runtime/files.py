"""Files that are whole or not there, and checksums that say whether they still are what was written."""

import contextlib
import hashlib
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path

SUMS = "SHA256SUMS"  # as `sha256sum --check` reads it


def sync(path: Path) -> None:
    """Wait until the file, or the directory's list of names, is on the disk itself."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def named_in_errors(path: Path) -> Iterator[None]:
    """What the block writes is in this path: a full disk shows at a write, whose OSError names no file."""
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.strerror is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def write_whole(path: Path, content: str | bytes) -> None:
    """Write aside, wait for the disk, rename: after a crash at any moment the old file is there, or the new one."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with named_in_errors(path), open(aside, "wb") as file:
            file.write(content.encode("utf-8") if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        with contextlib.suppress(OSError):
            aside.unlink()
    sync(path.parent)


def remove(path: Path) -> None:
    """Delete the file, the link itself, or the directory with all that is in it; nothing where nothing is."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sha256_of(path: Path) -> str:
    """Hex digest of the file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_once(path: Path) -> str:
    """The same, read once a process as long as the file's size and time stay: several models may come from one file."""
    there = path.stat()
    return _sha256_of(path, there.st_size, there.st_mtime_ns, there.st_ino)


@lru_cache(maxsize=4096)
def _sha256_of(path: Path, *as_it_is: int) -> str:
    return sha256_of(path)


def write_sums(directory: Path, names: Iterable[str] | None = None) -> None:
    """SHA256SUMS of these files of the directory, or of all; every one of them is on the disk when this returns."""
    there = (str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file())
    names = sorted(set(there if names is None else names) - {SUMS})
    for name in names:
        sync(directory / name)
    write_whole(directory / SUMS, "".join(f"{sha256_of(directory / name)}  {name}\n" for name in names))


def read_sums(directory: Path) -> dict[str, str]:
    """{name: sha256} of the directory's SHA256SUMS; nothing where it has none. Raises ValueError if it is damaged."""
    path = directory / SUMS
    if not path.is_file():
        return {}
    lines = path.read_bytes().decode("utf-8", errors="replace").splitlines()
    found = [re.fullmatch(r"([0-9a-f]{64}) [ *](.+)", line) for line in lines]
    if not found or not all(found):
        raise ValueError(f"{path} is damaged: it must hold a sha256 and a name a line; copy the directory again")
    return {match[2]: match[1] for match in found}


def check_sums(directory: Path, names: Iterable[str] | None = None) -> None:
    """Compare the files (all, or these where listed) with the directory's SHA256SUMS, if it has one.

    Raises:
        ValueError: a file differs or is missing; it names each.
    """
    sums = read_sums(directory)
    wanted = sums.keys() if names is None else sums.keys() & set(names)
    missing = [name for name in wanted if not (directory / name).is_file()]
    differ = [name for name in wanted if name not in missing and sha256_once(directory / name) != sums[name]]
    if missing or differ:
        wrong = [f"{name} is missing" for name in missing] + [f"{name} differs" for name in differ]
        raise ValueError(
            f"{directory} is not what was written there, says its {SUMS}: {'; '.join(sorted(wrong))}; copy it again, "
            f"or, where you changed it on purpose, delete {SUMS}"
        )
