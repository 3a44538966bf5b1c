"""AlpacaEval 2's verdict through the log-probabilities of real servers."""

import json
import math

from tests.published_votes import SCRIPT, write_lines


def test_log_probabilities_of_a_real_server_become_preferences(served, tmp_path, run_script):
    questions = [{"question_id": str(i), "category": "a", "turns": [f"What is {i} and {i}?"]} for i in range(3)]
    said = {"right": "The sum is {}.", "odd": "Bananas, {}."}
    answers = [
        {"question_id": str(i), "model_id": model, "choices": [{"turns": [text.format(2 * i)]}]}
        for i in range(3)
        for model, text in said.items()
    ]
    files = [write_lines(tmp_path / f"{name}.jsonl", rows) for name, rows in (("q", questions), ("a", answers))]
    words = ["task=judge", "judge=alpaca_eval2", "judge.top_logprobs=20", "task.turns=1", "client=openai"]
    words += [f"task.questions={files[0]}", f"task.answers=[{files[1]}]"]
    words += [f"client.base_url={served.url}", f"client.model={served.model}"]
    assert run_script(SCRIPT, *words, f"hydra.run.dir={tmp_path}/out") == 0
    rows = [json.loads(line) for line in (tmp_path / "out/verdicts.jsonl").read_text().splitlines()]
    known = [row["preference"] for row in rows if row["preference"] is not None]
    assert len(rows) == 6 and all(0 <= p <= 1 and math.isfinite(p) for p in known)
    # a model of 135 M need not think of m or M: each verdict is one, or has that reason
    errors = json.loads((tmp_path / "out/result.json").read_text())["errors"]
    assert len(known) + errors.get("neither m nor M is among the likely tokens", 0) == 6
