"""Does a benchmark order models as a reference does?"""

import json

import pytest

from tests.published_votes import SCRIPT, published, write_lines


def test_length_control_raises_the_correlation_with_arena_as_published(tmp_path, run_script):
    """Dubois et al. 2024: Spearman .94 without and .98 with length control, on a few more models than the table has."""
    (file,) = published("alpaca_eval/benchmarks_arena_elo.csv")
    found = {}
    for number, score in enumerate(("AlpacaEval 2.0", "LC AlpacaEval 2.0")):
        words = (
            f"task.input={file}",
            f"task.reference={file}",
            f"task.score='{score}'",
            f"hydra.run.dir={tmp_path}/{number}",
        )
        assert (
            run_script(SCRIPT, "task=rank_correlation", "task.reference_score='Arena Elo [Feb 2, 2024]'", *words) == 0
        )
        found[score] = json.loads((tmp_path / f"{number}/result.json").read_text())["spearman"]
    raw, controlled = found["AlpacaEval 2.0"], found["LC AlpacaEval 2.0"]
    assert raw["value"] == pytest.approx(0.94, abs=0.015) and controlled["value"] == pytest.approx(0.98, abs=0.015)
    assert controlled["lower"] < controlled["value"] < controlled["upper"] < 1 and controlled["n"] == 37


def test_results_are_read_names_are_matched_and_few_models_have_no_figure(tmp_path, run_script, capsys):
    models = "abcdef"
    battles = [
        {"model_a": a, "model_b": b, "winner": "model_a" if (i + n) % 5 else "model_b", "question_id": f"q{n}"}
        for i, a in enumerate(models)
        for b in models[i + 1 :]
        for n in range(9)
    ]
    rows = write_lines(tmp_path / "b.jsonl", battles)
    assert run_script(SCRIPT, "task=ratings", f"task.input=[{rows}]", f"hydra.run.dir={tmp_path}/rated") == 0
    table = tmp_path / "elo.csv"
    table.write_text("name,elo,other\n" + "".join(f"{m.upper()},{1000 - 10 * i},\n" for i, m in enumerate(models)))
    names = "task.names={" + ",".join(f"{m}:{m.upper()}" for m in models) + "}"
    words = ("task=rank_correlation", f"task.input={tmp_path}/rated/result.json", f"task.reference={table}")
    assert run_script(SCRIPT, *words, "task.reference_score=elo", names, f"hydra.run.dir={tmp_path}/out") == 0
    result = json.loads((tmp_path / "out/result.json").read_text())
    assert result["spearman"]["n"] == 6 and result["spearman"]["value"] > 0.8 and result["only_here"] == []
    assert run_script(SCRIPT, *words, "task.reference_score=elo", f"hydra.run.dir={tmp_path}/none") == 0
    nothing = json.loads((tmp_path / "none/result.json").read_text())
    assert nothing["spearman"]["value"] is None and "0 models in common" in nothing["spearman"]["reason"]
    assert run_script(SCRIPT, *words, f"hydra.run.dir={tmp_path}/bad") == 2
    assert "choose a score, got None; it has elo; other" in capsys.readouterr().err
