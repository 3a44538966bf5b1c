"""The small chain of each recipe with +tiny=, by the commands that its head gives. Minutes: they are marked slow."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TINY = sorted(path.stem for path in (ROOT / "conf/tiny").glob("*.yaml"))


@pytest.mark.slow
@pytest.mark.parametrize("recipe", TINY)
def test_the_small_chain_of_a_recipe_runs_to_its_report(recipe, tmp_path):
    words = [f"recipe={recipe}", f"+tiny={recipe}", f"dir={tmp_path}/out", "all.log.wandb=disabled"]
    run = subprocess.run([sys.executable, "run_recipe.py", *words], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]
    assert (tmp_path / "out/report.html").is_file()


def test_the_checkable_prompts_are_those_that_the_script_makes_and_no_question_is_in_both_files():
    from data.files import read_rows
    from experiments.checkable_prompts import NUM_TEST, both_files

    files = [
        [row for _, row in read_rows(f"{ROOT}/data/embedded/prompts_checkable_{part}.jsonl.gz")]
        for part in ("test", "train")
    ]
    assert files == list(both_files())
    asked = [{row["prompt"].split("\n")[0] for row in part} for part in files]
    assert not asked[0] & asked[1] and len(asked[0]) == NUM_TEST
