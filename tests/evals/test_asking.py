"""What judging costs is said before, paid once, and summed after."""

import json

import pytest

from tests.published_votes import SCRIPT, write_lines

QUESTIONS = [{"question_id": str(i), "category": "a", "turns": [f"Q{i}?"]} for i in range(5)]


@pytest.fixture
def judged(tmp_path, run_script):
    """judged(models, name, *words) -> result.json of task=judge over these models, all judges' answers in one place."""
    files = {"q": write_lines(tmp_path / "q.jsonl", QUESTIONS)}
    files["s"] = write_lines(tmp_path / "s.jsonl", [{"contains": "", "answers": ["[[A]]", "[[B]]"]}])

    def judged(models, name, *words):
        answers = [
            {"question_id": q["question_id"], "model_id": m, "choices": [{"turns": [f"{m} {q['question_id']}"]}]}
            for m in models
            for q in QUESTIONS
        ]
        files["a"] = write_lines(tmp_path / f"{name}.jsonl", answers)
        common = ["task=judge", "client=scripted", "task.turns=1", f"client.cache={tmp_path}/cache"]
        common += [f"client.script={files['s']}", f"task.questions={files['q']}", f"task.answers=[{files['a']}]"]
        common += ["client.prompt_price=1", "client.completion_price=1"]
        assert run_script(SCRIPT, *common, *words, f"hydra.run.dir={tmp_path}/{name}") == 0
        return json.loads((tmp_path / name / "result.json").read_text())

    return judged


def test_a_new_model_pays_for_its_own_pairs_alone(judged):
    """The cache knows a question by its content, whatever run it belonged to."""
    plan = judged("xy", "before", "task.plan=true")
    assert (plan["questions"], plan["to_ask"]) == (10, 10) and "models" not in plan
    first = judged("xy", "two")["usage"]
    assert (first["asked"], first["from_cache"]) == (10, 0)
    assert 0 < first["cost"] <= plan["cost_bound"] == first["cost_bound"]
    plan = judged("xyz", "third", "task.plan=true")
    assert (plan["questions"], plan["to_ask"]) == (30, 20)  # x against z and y against z, in both orders
    usage = judged("xyz", "three")["usage"]
    assert (usage["asked"], usage["from_cache"], usage["to_ask"]) == (20, 10, 20) and usage["cost_bound"] == plan[
        "cost_bound"
    ]
    again = judged("xyz", "again", "judge.temperature=1")["usage"]
    assert again["asked"] == 30  # another setting is another question


def test_a_jury_sums_what_its_judges_cost(judged, tmp_path, run_script, capsys):
    spent = [judged("xyz", name, f"judge.template={name}")["usage"] for name in ("fastchat", "short")]
    inputs = []
    for name in ("fastchat", "short"):
        rows = [json.loads(row) for row in (tmp_path / name / "verdicts.jsonl").read_text().splitlines()]
        write_lines(tmp_path / name / "verdicts.jsonl", [row | {"judge": name} for row in rows])
        inputs.append(f"{tmp_path}/{name}/verdicts.jsonl")
    words = ("task=jury", f"task.input=[{','.join(inputs)}]", "task.rounds=5", f"hydra.run.dir={tmp_path}/jury")
    assert run_script(SCRIPT, *words) == 0
    total = json.loads((tmp_path / "jury/result.json").read_text())["spent"]
    assert total["runs"] == 2 and total["asked"] == 60 and total["seconds"] > 0
    assert total["cost"] == pytest.approx(sum(usage["cost"] for usage in spent))
    assert "the verdicts took 60 requests" in capsys.readouterr().out
