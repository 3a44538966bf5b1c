"""Every command that README, CONTRIBUTING and docs/ print composes: its door, groups and keys exist."""

import re
import shlex
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
CONFIGS = {path.stem for path in (ROOT / "conf").glob("*.yaml")}


def commands(text: str) -> list[str]:
    """`python ...` commands of code blocks and of inline code, lines that go on with a backslash joined."""
    blocks = re.findall(r"^```\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    lines = [line.strip() for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    inline = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE))
    return [line.split("  #")[0].split("   # ")[0] for line in lines + inline if re.match(r"python \S+\.py\b", line)]


PRINTED = [
    (page.name, command)
    for page in PAGES
    for command in commands(page.read_text())
    if "task=NAME" not in command  # a form, not a command
]


def overrides(words: list[str]) -> list[str]:
    """What the door's config sees: no -m, nothing of Hydra's own, and of a list to sweep over its first value."""
    given = [word for word in words if "=" in word and not word.startswith(("hydra", "--", "-c"))]
    kept = []
    for one, word in zip(OverridesParser.create().parse_overrides(given), given, strict=True):
        if one.is_sweep_override():
            sign = "+" if word.startswith("+") else ""
            first = next(iter(one.sweep_string_iterator())) if not word.endswith("glob(*)") else "default"
            word = f"{sign}{one.get_key_element().lstrip('+')}={first}"
        kept.append(word)
    return kept


@pytest.mark.parametrize("page, command", PRINTED, ids=[f"{page}: {command[:60]}" for page, command in PRINTED])
def test_a_printed_command_composes(page, command, compose):
    words = shlex.split(command.removesuffix("...").strip())[1:]
    door, rest = Path(words[0]), words[1:]
    assert (ROOT / door).exists(), f"{page} prints {command}, but there is no {door}"
    if door.stem in CONFIGS and len(door.parts) == 1:
        compose(door.stem, *[word for word in overrides(rest) if word != "..."])


def test_pages_print_commands():
    assert len(PRINTED) > 40


def test_links_between_pages_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)", page.read_text()):
            assert target.startswith("http") or (page.parent / target).exists(), f"{page.name} links to {target}"
