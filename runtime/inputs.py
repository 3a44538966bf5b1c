"""Digests of the inputs of a run: of every file that the config names, and of the code.

Checkpoints contain these digests (runtime/checkpoint.py, meta.json), so a resume can report what has changed.
"""

import glob
import importlib.util
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from runtime.config import FREE_TO_CHANGE
from runtime.files import sha256_once

ROOT = Path(__file__).resolve().parents[1]
NO_INPUTS = ("lora", "ref_cache", "cache")  # keys that name layers, or caches to which other runs add
NO_NUMBERS = ("tests", "bench", "experiments", "docs", ".venv")  # code without influence on the results of runs
_elsewhere: set[str] = set()


def input_digests(cfg: DictConfig) -> dict[str, str]:
    """{"policy: runs/sft/model/model.safetensors": sha256, ...} of every file that the config names.

    A directory stands for all its files, a pattern for all matching files, an adapter also for its base. Texts that are
    no file names are left out.
    """
    digests: dict[str, str] = {}
    for key, text in _texts(OmegaConf.to_container(cfg, resolve=True, throw_on_missing=False)):
        found = file_named_by(text)
        places = [found, _base_of_adapter(found)] if found else [Path(name) for name in sorted(matches_of(text))]
        files = [file for place in places if place and place.resolve() != ROOT for file in _files_in(place)]
        digests |= {f"{key}: {file}": sha256_once(file) for file in files}
    return digests


def also_runs(modules: list[str]) -> None:
    """Add modules that another process of this run has loaded to the code of the run."""
    _elsewhere.update(modules)


def code_digests() -> dict[str, str]:
    """{"losses.py": sha256, ...} of the project's modules that are loaded, and of the script itself."""
    loaded = [getattr(module, "__file__", None) or "" for module in list(sys.modules.values())] + list(_elsewhere)
    root = f"{ROOT}{os.sep}"
    ours = sorted({file.removeprefix(root) for file in loaded if file.startswith(root) and file.endswith(".py")})
    return {name: sha256_once(ROOT / name) for name in ours if name.split(os.sep)[0] not in NO_NUMBERS}


def changed_inputs(before: dict[str, Any], cfg: DictConfig) -> list[str]:
    """The changes since a checkpoint's `inputs` and `code` were written, each in a few words."""
    old, new = before["inputs"], input_digests(cfg)
    changed = [f"{name} has other content" for name in sorted(old.keys() & new.keys()) if old[name] != new[name]]
    changed += [f"{name} is gone" for name in sorted(old.keys() - new.keys())]
    changed += [f"{name} is new" for name in sorted(new.keys() - old.keys())]
    for name, digest in before["code"].items():
        path = ROOT / name
        if not path.is_file() or sha256_once(path) != digest:
            changed.append(f"the code {name} has changed")
    return changed


def file_named_by(text: str) -> Path | None:
    """The file or directory that a setting names, if there is one.

    FILE@train is a part of FILE, FILE.py:function is in FILE.py, package:NAME/FILE is in an installed package.
    """
    if text.startswith("package:"):
        package, _, inside = text.removeprefix("package:").partition("/")
        spec = importlib.util.find_spec(package) if package.isidentifier() else None
        places = [Path(root) / inside for root in (spec and spec.submodule_search_locations) or []]
    else:
        text = text.rpartition(":")[0] if ".py:" in text else text
        places = [Path(text.split("@")[0])] if text.split("@")[0] else []
    try:
        return next((place for place in places if place.exists()), None)
    except (OSError, ValueError):  # too long for a path, or with a NUL in it
        return None


def _files_in(place: Path) -> list[Path]:
    return sorted(path for path in place.rglob("*") if path.is_file()) if place.is_dir() else [place]


def matches_of(text: str) -> list[str]:
    """The files that a pattern matches. Empty if the text is not a pattern."""
    return glob.glob(text.split("@")[0], recursive=True) if glob.has_magic(text) else []


def _base_of_adapter(place: Path) -> Path | None:
    """The model for which the adapter in this directory was trained. None if there is no adapter or no such model."""
    path = place / "adapter_config.json"
    try:
        base = json.loads(path.read_bytes())["base_model_name_or_path"] if path.is_file() else None
        return file_named_by(base) if isinstance(base, str) else None
    except (ValueError, KeyError, TypeError, RecursionError):  # the reader of the adapter reports this error
        return None


def _texts(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """(dotted key, text) of all texts in a nested config, without settings that have no influence on results."""
    if isinstance(value, dict):
        for name, item in value.items():
            if name not in NO_INPUTS and (key or name not in FREE_TO_CHANGE):
                yield from _texts(item, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item, key)
    elif isinstance(value, str):
        yield key, value
