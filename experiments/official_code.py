"""Functions of official scorers, taken by name from the source of packages that cannot be installed here."""

import ast
import math
import re
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.special import logsumexp


def in_wheel(wheels: Path, package: str, module: str) -> str:
    """The source of a module in a package's wheel."""
    (wheel,) = wheels.glob(f"{package}-*.whl")
    return zipfile.ZipFile(wheel).read(module).decode()


def taken(source: str, names: tuple[str, ...], **needs) -> dict:
    """The functions and constants with these names in a module's source, with their requirements from other modules."""
    wanted = [node for node in ast.parse(source).body if _name(node) in names]
    space = {"np": np, "pd": pd, "math": math, "re": re, "logsumexp": logsumexp, **needs}
    source = "from __future__ import annotations\n" + "\n".join(map(ast.unparse, wanted))
    exec(compile(source, names[0], "exec"), space)
    return space


def _name(node: ast.stmt) -> str | None:
    if isinstance(node, ast.Assign):
        return getattr(node.targets[0], "id", None)
    return getattr(node, "name", None)


def largest(benchmark: str, source: str, pairs: list[tuple]) -> tuple:
    """The row with the largest difference of many."""
    values = np.array(pairs, float)
    values = values[~np.isnan(values).all(axis=1)]  # both sides have no verdict
    worst = int(np.abs(values[:, 0] - values[:, 1]).argmax())
    return f"{benchmark} ({len(values)} values, the largest difference)", source, *values[worst]
