"""The script: what it refuses, and what it leaves."""

import json
from pathlib import Path

from tests.published_votes import SCRIPT, write_lines

ROWS = [{"model_a": "x", "model_b": "y", "winner": w} for w in ("model_a", "model_b", "tie")]


def test_no_task_and_unknown_keys_are_refused(tmp_path, run_script, capsys):
    assert run_script(SCRIPT, f"hydra.run.dir={tmp_path}/a") == 2 and "task=winrate" in capsys.readouterr().err
    assert run_script(SCRIPT, "task=ratings", "task.inputs=[x]", f"hydra.run.dir={tmp_path}/b") == 2
    assert run_script(SCRIPT, "task=ratings", f"hydra.run.dir={tmp_path}/c") == 2
    assert not (tmp_path / "b" / "result.json").exists()


def test_a_directory_with_a_trained_model_is_not_evaluated_into(tmp_path, run_script, capsys):
    (tmp_path / "run" / "model").mkdir(parents=True)
    file = write_lines(tmp_path / "b.jsonl", ROWS)
    words = f"task.input=[{file}]", f"hydra.run.dir={tmp_path}/run", "overwrite=true"
    assert run_script(SCRIPT, "task=ratings", *words) == 2
    assert "hydra.run.dir of its own" in capsys.readouterr().err and (tmp_path / "run" / "model").exists()


def test_a_result_is_whole_and_a_second_run_must_say_overwrite(tmp_path, run_script, capsys):
    words = f"task.input=[{write_lines(tmp_path / 'b.jsonl', ROWS)}]", f"hydra.run.dir={tmp_path}/out"
    assert run_script(SCRIPT, "task=ratings", *words) == 0
    before = json.loads(Path(tmp_path / "out/result.json").read_text())
    assert before["task"] == "ratings" and list(before["ratings"]) == ["x", "y"]
    assert run_script(SCRIPT, "task=ratings", *words) == 2 and "overwrite=true" in capsys.readouterr().err
    assert run_script(SCRIPT, "task=ratings", *words, "overwrite=true") == 0
    assert json.loads(Path(tmp_path / "out/result.json").read_text()) == before
