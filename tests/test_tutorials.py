"""The pages for researchers: what they print is run."""
# ruff: noqa: F811 - fixtures of another test file

import re
from pathlib import Path

import advantages
from rollouts import ppo_settings
from tests.family_checkpoints import CASES as FAMILY_CASES
from tests.test_ppo_values import column, samples_of, stopping  # noqa: F401 - fixtures
from tests.test_train_ppo import inputs, ppo  # noqa: F401 - fixtures

DOCS = Path(__file__).parents[1] / "docs"


def blocks_of(page):
    return re.findall(r"^```python\n(.*?)^```", (DOCS / page).read_text(), re.DOTALL | re.MULTILINE)


def test_every_sentence_is_rewarded_as_the_page_says(ppo, stopping, tmp_path):
    (code,) = blocks_of("tutorial_rewards.md")
    (tmp_path / "sentences.py").write_text(code)
    words = [f"reward={tmp_path}/sentences.py:every_sentence", "reward_model=null", "kl_coef=0", "missing_eos=none"]
    assert ppo(stopping, *words, "num_steps=1", "num_samples=8") == 0
    exec(compile(code, "tutorial", "exec"), scope := {})
    for row in samples_of(tmp_path / "run"):
        (told,) = scope["every_sentence"]([""], [row["completion"]])
        expected = sum(reward for _, reward in told) if told else 0.0
        assert abs(column(row, "reward").sum().item() - expected) < 1e-5


def test_the_pages_estimator_runs_and_is_the_median(ppo, stopping, tmp_path, monkeypatch):
    function, table = blocks_of("tutorial_advantage.md")
    assert table.replace(', "median": median', "") in (Path(advantages.__file__).read_text())
    exec(compile(function, "tutorial", "exec"), scope := dict(vars(advantages)))
    monkeypatch.setitem(advantages.OF_GROUPS, "median", scope["median"])
    monkeypatch.setattr(ppo_settings, "ADVANTAGES", (*advantages.ADVANTAGES, "median"))
    words = [stopping, "advantage=median", "samples_per_prompt=4", "kl_coef=0", "missing_eos=none", "num_samples=32"]
    assert ppo(*words, "num_steps=1") == 0
    rows = samples_of(tmp_path / "run")
    for start in range(0, 32, 4):
        group = rows[start : start + 4]
        middle = sorted(row["score"] for row in group)[1]  # torch's median of four is the lower one
        for row in group:
            assert abs(column(row, "advantage")[0].item() - (row["score"] - middle)) < 1e-4


def test_every_line_that_adds_the_pages_family_is_in_the_file_that_it_names():
    page = (DOCS / "tutorial_family.md").read_text()
    lines = {"model": 0, "tests": 0}
    for text, code in re.findall(r"(.*?)^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE):
        named = re.findall(r"`((?:model|tests)/\S+\.py)`", text)
        file = named[-1] if named else file  # noqa: F821 - two blocks in a row are of one file
        assert code in (DOCS.parent / file).read_text(), code
        lines[file.split("/")[0]] += code.count("\n")
    assert [f"{lines['model']} lines in four files of `model/`" in page, f"{lines['tests']} lines" in page] == [
        True
    ] * 2
    assert "exaone4" in FAMILY_CASES  # tests/model/test_families.py compares every case with transformers
