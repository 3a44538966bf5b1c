"""One page of many results: every figure with its interval and n, and the pictures that a reader looks for."""

import json

import pytest

from tests.published_votes import DOOR, write_lines

MODELS = ("old", "new")
CATEGORIES = ("writing", "math", "coding", "roleplay")


@pytest.fixture
def runs(tmp_path, door):
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
        assert door(DOOR, *common, *words, *(["task.mode=single"] if name == "grades" else [])) == 0
    return [f"{tmp_path}/{name}" for name in says]


def test_the_pages_show_every_figure_with_its_interval_and_n(tmp_path, door, runs, capsys):
    words = ("task=report", f"task.input=[{','.join(runs)}]", "task.title=Old and new")
    assert door(DOOR, *words, f"hydra.run.dir={tmp_path}/out") == 0
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
    assert door(DOOR, "task=report", f"task.input=[{tmp_path}]", f"hydra.run.dir={tmp_path}/bad") == 2
    assert "holds no result.json" in capsys.readouterr().err
