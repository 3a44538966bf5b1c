"""Every command that the docs, docstrings and conf/'s comments print is one that runs.

A script composes with every value of a sweep, lacks no required key and passes its own checks; a script with argparse
parses its arguments; make targets, test files and files of the project exist.
"""

import argparse
import ast
import re
import shlex
from pathlib import Path

import hydra
import pytest
import torch
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

import losses
import train_dpo
import train_ppo
from run_recipe import compose as compose_step
from runtime.config import check_policy_or_model, check_training

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
MODULES = [*sorted(ROOT.glob("*.py")), *sorted((ROOT / "bench").glob("*.py")), *sorted((ROOT / "kernels").glob("*.py"))]
SCRIPTS = {path.stem for path in (ROOT / "conf").glob("*.yaml")}
CHECKS = {
    "train_sft": lambda cfg: (check_training(cfg, 1), check_policy_or_model(cfg)),
    "train_rm": lambda cfg: (check_training(cfg, 1), check_policy_or_model(cfg)),
    "train_ppo": lambda cfg: train_ppo.check_ppo(cfg, 1),
    "train_dpo": lambda cfg: train_dpo.check_dpo(cfg, 1),
}
CHECKED: set[str] = set()  # steps of recipes, which many pages name
COMMAND = re.compile(r"(?:\w+=\S+ )*(?:\S*/)?(?:python|torchrun|pytest|make) [\w.-]|\w+\.py [\w+]+=")


def text_of(path: Path) -> str:
    """What a reader of the file may type: a page, a module's docstring, a config's comments."""
    if path.suffix == ".py":
        return ast.get_docstring(ast.parse(path.read_text())) or ""
    if path.suffix == ".yaml":  # of a comment, the line or what follows a colon
        comments = re.findall(r"# ?(.*)", path.read_text())
        return "\n".join("    " + line.split(": ")[-1].split(";")[0].strip() for line in comments)
    return path.read_text()


def commands(text: str) -> list[str]:
    """Commands of fenced and indented blocks and of inline code, each on one line without the remark after it."""
    fenced = re.findall(r"^```\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    rest = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    inline = [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", rest)]
    indented = [line[4:] for line in re.sub(r"\\\n\s*", "", rest).splitlines() if line.startswith("    ")]
    blocks = [line for block in fenced for line in re.sub(r"\\\n\s*", "", block).splitlines()]
    lines = [re.split(r"\s{3,}", line.strip())[0] for line in blocks + indented]
    return [line for line in lines + inline if COMMAND.match(line)]


PRINTED = [
    (str(path.relative_to(ROOT)), command)
    for path in [*PAGES, *MODULES, *sorted((ROOT / "conf").rglob("*.yaml"))]
    for command in commands(text_of(path))
    if not re.search(r"task=NAME|\||squared_hinge", command)  # forms, and an example that is still to be written
]


@pytest.mark.parametrize("page, command", PRINTED, ids=[f"{page}: {command[:60]}" for page, command in PRINTED])
def test_a_printed_command_runs(page, command, compose):
    words = shlex.split(command)
    while re.match(r"\w+=\S+$", words[0]):
        words.pop(0)  # environment
    for file in re.findall(r"(?:data/embedded|evals/sets)/[\w./]+", command):
        assert (ROOT / file).exists(), f"no {file}"
    program, rest = Path(words[0]).name, words[1:]
    if program == "make":
        assert set(rest) <= targets() or any("=" in word for word in rest), f"the Makefile lacks one of {rest}"
    elif program == "pytest":
        assert all((ROOT / word).exists() for word in rest if word.startswith("tests/"))
    else:
        check_program(words if program.endswith(".py") else rest, compose, whole=not program.endswith(".py"))


def check_program(words: list[str], compose, *, whole: bool) -> None:
    """The script or -m module of a command: a script composes, others parse their words."""
    at = next(i for i, word in enumerate(words) if word.endswith(".py") or words[i - 1] == "-m")
    name, rest = words[at].removesuffix(".py"), words[at + 1 :]
    path = ROOT / (name if "/" in name else name.replace(".", "/"))
    assert path.with_suffix(".py").exists() or "/" not in name and name in SCRIPTS, f"there is no {name}"
    if path.stem in SCRIPTS:
        check_script(path.stem, rest, compose, whole=whole and not any("..." in word for word in rest))
    elif rest != ["--help"] and "argparse" in path.with_suffix(".py").read_text():
        parser_of(path.with_suffix(".py")).parse_args([word for word in rest if word != "..."])


def targets() -> set[str]:
    """What make can make."""
    heads = re.findall(r"^([\w./ -]+):(?!=)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    return {target for head in heads for target in head.split()}


def parser_of(path: Path) -> argparse.ArgumentParser:
    """The script's parser, read from its source: a peer's script cannot be imported here."""
    parser = argparse.ArgumentParser(path.name, exit_on_error=False)
    for call in ast.walk(ast.parse(path.read_text())):
        if isinstance(call, ast.Call) and getattr(call.func, "attr", None) == "add_argument":
            names = [ast.literal_eval(name) for name in call.args if isinstance(name, ast.Constant)]
            given = {word.arg: word.value for word in call.keywords if word.arg in ("nargs", "action", "required")}
            parser.add_argument(*names, **{key: ast.literal_eval(value) for key, value in given.items()})
    return parser


def check_script(script: str, words: list[str], compose, *, whole: bool) -> None:
    """The script composes for every value of every sweep; where nothing is left out, it misses no key."""
    for overrides in each_value([word for word in words if "..." not in word]):
        cfg = compose(script, *overrides)
        if script == "run_recipe":
            check_steps(cfg)
        if whole:
            check_values(script, cfg)


def check_values(script: str, cfg) -> None:
    """No required key is left open, and the script's own checks pass."""
    assert not (open_keys := unset(OmegaConf.to_container(cfg, resolve=False))), f"{open_keys} have no value"
    CHECKS.get(script, lambda cfg: None)(cfg)


def unset(value, name: str = "") -> list[str]:
    """Names of the keys that still say ???."""
    if isinstance(value, dict):
        return [key for part in value for key in unset(value[part], f"{name}.{part}".strip("."))]
    return [name] if value == "???" else []


def each_value(words: list[str]) -> list[list[str]]:
    """The overrides once for every value of every swept key, the other keys at their first; nothing of Hydra's own."""
    words = [word for word in words if "=" in word and not word.startswith(("hydra", "--", "-c"))]
    parsed = OverridesParser.create().parse_overrides(words)
    values = [
        list(one.sweep_string_iterator()) if one.is_sweep_override() and one.is_choice_sweep() else [] for one in parsed
    ]
    kept = [
        (word, [word.split("=", 1)[0] + "=" + str(value) for value in found])
        for word, one, found in zip(words, parsed, values, strict=True)
        if found or not one.is_sweep_override()  # an interval is the sweeper's to draw from
    ]
    usual = [options[0] if options else word for word, options in kept]
    return [usual] + [
        usual[:i] + [option] + usual[i + 1 :] for i, (_, options) in enumerate(kept) for option in options[1:]
    ]


def check_steps(recipe) -> None:
    """Every step of a recipe, composed and checked as its script would; once where only numbers differ."""
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(ROOT / "conf"), version_base=None):
        for step in recipe.steps:
            alike = re.sub(r"\d+", "0", f"{step.run} {recipe.get('all')}".replace(recipe.dir, "DIR"))
            if alike not in CHECKED:
                check_values(step.run.split(".py")[0], compose_step(step, recipe))
                CHECKED.add(alike)


def test_pages_print_commands():
    assert len(PRINTED) > 100


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_pictures_of_a_page_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)", page.read_text()):
        assert target.startswith("http") or (page.parent / target).exists(), f"links to {target}"


def test_every_picture_of_the_docs_is_on_a_page():
    pages = "".join(page.read_text() for page in PAGES)
    for picture in (ROOT / "docs").glob("*.png"):
        assert f"({picture.name})" in pages, f"no page shows {picture.name}"


def test_the_loss_of_contributing_is_what_it_says():
    definition, row = re.findall(
        r"^```python\n(.*?)^```", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL | re.MULTILINE
    )
    exec(definition, names := dict(vars(losses)))
    chosen, none = torch.tensor([1.0, -0.5]), torch.zeros(2)
    assert names["squared_hinge_loss"](chosen, none, none, none, beta=1.0)[0].item() == 1.125
    source = Path(train_dpo.__file__).read_text()
    assert row.replace("squared_hinge", "hinge") in source and '"hinge": (),' in source


def test_the_line_of_the_tutorial_is_in_the_loss():
    before, after = re.findall(
        r"^```python\n(.*?)^```", (ROOT / "docs/tutorial.md").read_text(), re.DOTALL | re.MULTILINE
    )
    assert before in Path(losses.__file__).read_text() and after != before
