"""Resolve a model path such as `policy=PATH` to a file or directory on this machine. Nothing is downloaded."""

import importlib.util
import re
from pathlib import Path


def find_model(path: str | Path) -> Path:
    """The Hugging Face directory or .gguf file at `path`, or at `package:NAME/FILE` inside an installed package.

    Raises ValueError where there is none. The message says how to get it.
    """
    if str(path).startswith("package:"):
        return find_in_package(str(path).removeprefix("package:"))
    found = Path(path)
    if not (found / "config.json").exists() and (found / "model" / "config.json").exists():
        raise ValueError(f"{found} is the directory of a run; its model is {found / 'model'}")
    if found.is_dir() or (found.is_file() and found.suffix == ".gguf"):
        return found
    if found.is_file():
        raise ValueError(f"{found} is neither a directory in Hugging Face layout nor a .gguf file")
    if re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)):
        raise ValueError(
            f"{path} does not exist here. If it is a name on the Hugging Face hub: nothing is downloaded at run time; "
            f"get the files first with `hf download {path} --local-dir DIRECTORY` and pass that directory"
        )
    raise ValueError(f"{path} does not exist; give a Hugging Face directory, a .gguf file or package:NAME/FILE")


def find_in_package(name: str) -> Path:
    """The path of a file inside an installed top-level package, found without importing it."""
    package, _, inside = name.partition("/")
    if not package.isidentifier() or not inside:
        raise ValueError(f"package:{name} must read package:NAME/FILE, NAME being an installed Python package")
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(f"package:{name}: no package {package} is installed here; install it with pip")
    for root in map(Path, spec.submodule_search_locations):
        found = (root / inside).resolve()
        if not found.is_relative_to(root.resolve()):
            raise ValueError(f"package:{name} leads out of the package; the file must lie inside {package}")
        if found.exists():
            return found
    raise ValueError(f"package:{name}: {package} is installed but holds no {inside}")
