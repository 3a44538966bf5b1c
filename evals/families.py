"""Model families: a judge may favour its own family, so models that share a family with the judge are reported."""

import json
from collections.abc import Iterator, Mapping
from fnmatch import fnmatch
from pathlib import Path

import yaml

RECORDS = ("manifest.json", "run.json", "config.yaml")  # files that data methods and runs write beside their output


def families_of(name: str, families: Mapping) -> set[str]:
    """The families with a glob that matches the name, or the last part of its path, in lower case."""
    names = {name.lower(), Path(name).name.lower()}
    return {family for family, globs in families.items() if any(fnmatch(n, glob) for n in names for glob in globs)}


def short(judge: str) -> str:
    """A judge's name without the folders of a path in it."""
    kind, colon, path = judge.partition(":")
    return f"{kind}:{Path(path).name}" if colon and "/" in path else judge


def shared_families(judge: str, model: str, families: Mapping) -> set[str]:
    """The families that a judge and a model share by their names."""
    return families_of(judge, families) & families_of(model, families)


def ancestry_families(file: str, families: Mapping) -> dict[str, str]:
    """{family: the name that shows it}, found in the records beside a file and beside the files that they mention."""
    found: dict[str, str] = {}
    for name in ancestry(Path(file).absolute().parent, set()):
        for family in families_of(name, families):
            found.setdefault(family, name)
    return found


def ancestry(folder: Path, seen: set[Path]) -> Iterator[str]:
    """All text values of the records in a folder, then of those in the folders that they mention."""
    if folder in seen or len(seen) > 100:
        return
    seen.add(folder)
    for record in RECORDS:
        if not (folder / record).is_file():
            continue
        text = (folder / record).read_text(encoding="utf-8")
        for value in _texts(json.loads(text) if record.endswith(".json") else yaml.safe_load(text)):
            yield value
            path = Path(value)
            if "/" in value and path.exists():
                for parent in (path, path.parent):
                    yield from ancestry(parent.absolute(), seen)


def _texts(value) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            if key != "families":  # the globs in a config mention all families
                yield from _texts(item)
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)


def family_warnings(judge: str, files: Mapping[str, str], families: Mapping) -> list[str]:
    """A warning for each model that shares a family with the judge, by its name or by its training data and parents.

    Args:
        files: {model: the file that holds its answers}.
    """
    own, warnings = families_of(judge, families), []
    for model, file in files.items():
        named = families_of(model, families) & own
        ancestors = {family: name for family, name in ancestry_families(file, families).items() if family in own}
        if named:
            warnings.append(f"judge {short(judge)} and {model} are of one family ({', '.join(sorted(named))})")
        elif ancestors:
            names = ", ".join(f"{family}: {name}" for family, name in sorted(ancestors.items()))
            warnings.append(f"{model} descends from the judge's family ({names}); judge {short(judge)} may favour it")
    return warnings
