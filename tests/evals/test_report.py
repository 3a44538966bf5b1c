"""One page of many results: every figure with its interval and n, and the pictures that a reader looks for."""

import json
from shutil import copytree

import numpy as np
import pytest

from evals.intervals import mean_estimate, t_interval
from evals.pages.report import names_of
from evals.seeds import Figure, over_seeds
from tests.published_votes import SCRIPT, write_lines

MODELS = ("old", "new")
CATEGORIES = ("writing", "math", "coding", "roleplay")


@pytest.fixture
def runs(tmp_path, run_script):
    questions = [{"question_id": str(i), "category": CATEGORIES[i % 4], "turns": [f"Q{i}?"]} for i in range(12)]
    answers = []
    for model in MODELS:
        for i in range(12):
            text = f"{model} says " + "word " * (i if model == "new" else 0)
            answers.append({"question_id": str(i), "model_id": model, "choices": [{"turns": [text]}]})
    files = {"q": write_lines(tmp_path / "q.jsonl", questions), "a": write_lines(tmp_path / "a.jsonl", answers)}
    common = ["task=judge", "client=scripted", f"task.questions={files['q']}", f"task.answers=[{files['a']}]"]
    says = {
        "one": [{"contains": "Answer]\nnew", "answers": ["[[A]]"]}, {"contains": "", "answers": ["[[A]]"]}],
        "two": [{"contains": "A's Answer]\nnew", "answers": ["[[B]]"]}, {"contains": "", "answers": ["[[A]]"]}],
        "three": [{"contains": "A's Answer]\nnew", "answers": ["[[A]]"]}, {"contains": "", "answers": ["[[B]]"]}],
        "grades": [{"contains": "new says", "answers": ["[[8]]"]}, {"contains": "", "answers": ["[[5]]", "[[6]]"]}],
    }
    for name, script in says.items():
        words = [f"client.script={write_lines(tmp_path / f'{name}.jsonl', script)}", f"hydra.run.dir={tmp_path}/{name}"]
        assert run_script(SCRIPT, *common, *words, *(["task.mode=single"] if name == "grades" else [])) == 0
    return [f"{tmp_path}/{name}" for name in says]


def test_the_pages_show_every_figure_with_its_interval_and_n(tmp_path, run_script, runs, capsys):
    words = ("task=report", f"task.input=[{','.join(runs)}]", "task.title=Old and new")
    assert run_script(SCRIPT, *words, f"hydra.run.dir={tmp_path}/out") == 0
    page, board = ((tmp_path / "out" / name).read_text() for name in ("report.html", "leaderboard.html"))
    result = json.loads((tmp_path / "out/result.json").read_text())
    for figure in result["figures"]:
        assert figure["n"] and (figure["lower"] is not None or figure["note"]), figure
    assert {figure["model"] for figure in result["figures"]} == {"old", "new"}
    assert page.count("data:image/png;base64") == 2 and "Grades by category" in page
    assert "Where judges disagree" in page and "scripted" in page.split("Where judges disagree")[1]
    for text in (page, board):  # on a phone, a wide table scrolls by itself and the page does not
        assert "width=device-width" in text and text.count('<div class="scrolls"><table>') == text.count("<table>") > 0
    assert "<td" in board and "n 12" in board and "<script" not in page + board
    words = ("task=report", f"task.input=[{','.join([*runs, str(copytree(runs[0], tmp_path / 'again' / 'one'))])}]")
    assert run_script(SCRIPT, *words, f"hydra.run.dir={tmp_path}/both") == 0
    figures = json.loads((tmp_path / "both/result.json").read_text())["figures"]
    assert len({(figure["model"], figure["benchmark"]) for figure in figures}) == len(figures)  # none hides another
    board = (tmp_path / "both/leaderboard.html").read_text()
    assert "judge scripted:one.jsonl (run again/one)" in board and str(tmp_path) not in page + board
    assert run_script(SCRIPT, "task=report", f"task.input=[{tmp_path}]", f"hydra.run.dir={tmp_path}/bad") == 2
    assert "has no result.json" in capsys.readouterr().err


def test_folders_are_called_by_what_tells_them_apart():
    assert names_of(["x/a/out", "x/b/out", "x/c"]) == {"x/a/out": "a/out", "x/b/out": "b/out", "x/c": "c"}


def test_means_over_seeds_hold_for_other_seeds_and_other_questions():
    """Three seeds, 40 questions that all answer: intervals over seeds alone leave out what other questions change."""
    rng, held, alone = np.random.default_rng(0), 0, 0
    for _ in range(300):
        question, figures = rng.normal(0, 1, 40), []
        for seed, luck in enumerate(rng.normal(0, 0.1, 3)):
            row = mean_estimate(
                luck + question + rng.normal(0, 0.3, 40), range(40), null=0, level=0.95, max_deviation=3
            )
            figures.append(Figure("b", f"m_{seed}", row["value"], row["lower"], row["upper"], 40))
        (mean,) = over_seeds(figures, ["m"])
        _, low, high = t_interval([figure.value for figure in figures])
        held += mean.lower <= 0 <= mean.upper
        alone += low <= 0 <= high
    assert held / 300 >= 0.94 and alone / 300 < 0.9, (held, alone)


def test_a_mean_over_seeds_stays_a_share_and_wants_two_seeds():
    seeds = [Figure("b", f"m_{i}", value, value - 0.1, 1.0, 20, "", 0.0, 1.0) for i, value in enumerate((0.99, 0.9))]
    (mean,) = over_seeds([*seeds, Figure("b", "m_x", 0.0, 0.0, 0.1, 20)], ["m"])
    assert (mean.model, mean.n, mean.upper) == ("m, mean of 2 seeds", 20, 1.0) and mean.lower < 0.84
    with pytest.raises(ValueError, match="two or more models called m_0, m_1, ...; there are m_0$"):
        over_seeds(seeds[:1], ["m"])
