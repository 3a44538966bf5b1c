"""RewardBench 2: the best of four, the composite of Ties, and judges that grade."""

import json
import math

import pytest

from evals.benchmarks.reward_accuracy import read_pairs, talk_of
from evals.benchmarks.rewardbench2 import best_share, read_groups, score_table, ties_score
from tests.published_votes import SCRIPT, write_lines


def row(name, subset, scores, num_correct=1):
    texts = [f"{name} {i}" for i in range(len(scores))]
    about = {"id": name, "subset": subset, "prompt": f"p {name}", "num_correct": num_correct, "scores": scores}
    return about | {"chosen": texts[:num_correct], "rejected": texts[num_correct:]}


def test_a_tie_at_the_top_counts_its_share():
    assert [best_share(scores) for scores in ([3, 1, 1, 1], [3, 3, 1, 1], [2, 3, 1, 1], [1, 1, 1, 1])] == [
        1,
        0.5,
        0,
        0.25,
    ]


def test_the_composite_of_ties_is_the_published_one():
    groups = [
        {"id": "tied:1", "num_correct": 2, "scores": [5.0, 4.0, 1.0]},  # right, spread 1, gap 3
        {"id": "ref:1", "num_correct": 1, "scores": [3.0, 1.5]},  # right, gap 1.5
        {"id": "tied:2", "num_correct": 2, "scores": [5.0, 2.0, 3.0]},  # wrong, spread 3, gap -1
        {"id": "ref:2", "num_correct": 1, "scores": [1.0, 2.0]},  # wrong, gap -1
    ]
    margin = (math.tanh(1.5 - 1) + math.tanh(-1 / 3 - 1)) / 2
    result = ties_score(groups)
    assert result["score"] == pytest.approx(0.3 * 0.5 + 0.3 * 0.5 + 0.2 * 0.5 + 0.2 * 0.5 + 0.01 * margin)
    assert result["lower"] <= result["score"] <= result["upper"] and result["n"] == 2
    assert score_table([group | {"subset": "Ties"} for group in groups])["score"] == result["score"]


def test_the_command_reads_scores_or_asks_a_judge_for_grades(tmp_path, run_script):
    rows = [row("a", "Math", [3, 1, 1, 1]), row("b", "Math", [1, 1, 1, 1]), row("c", "Focus", [0, 1, 0, 0])]
    rows += [row("tied:1", "Ties", [5, 4, 1], 2), row("ref:1", "Ties", [3, 1])]
    words = ("task=rm_accuracy", f"task.input=[{write_lines(tmp_path / 'v2.jsonl', rows)}]")
    assert run_script(SCRIPT, *words, f"hydra.run.dir={tmp_path}/out") == 0
    result = json.loads((tmp_path / "out/result.json").read_text())
    subsets = {name: figure["score"] for name, figure in result["subsets"].items()}
    assert subsets == {"Math": 0.625, "Focus": 0, "Ties": pytest.approx(1 + 0.01 * math.tanh(1))}
    assert result["score"] == pytest.approx(sum(subsets.values()) / 3)
    for asked in rows:
        asked.pop("scores")
    script = [{"contains": "\na 0\n", "answers": ["Rating: [[9]]"]}, {"contains": "", "answers": ["Rating: [[4]]"]}]
    asked = (
        f"task.input=[{write_lines(tmp_path / 'v2.jsonl', rows[:2])}]",
        "client=scripted",
        "judge=llm",
        f"client.script={write_lines(tmp_path / 's.jsonl', script)}",
    )
    assert run_script(SCRIPT, words[0], *asked, f"hydra.run.dir={tmp_path}/judged") == 0
    result = json.loads((tmp_path / "judged/result.json").read_text())
    assert result["subsets"]["Math"]["score"] == pytest.approx((1 + 0.25) / 2)
    wrong = write_lines(tmp_path / "bad.jsonl", [row("a", "Math", [1, 2]) | {"num_correct": 2}])
    assert run_script(SCRIPT, words[0], f"task.input=[{wrong}]", f"hydra.run.dir={tmp_path}/bad") == 2


def test_scores_that_cannot_be_compared_are_refused(tmp_path):
    """The maximum of nan and 1 depends on their order."""
    file = tmp_path / "v2.jsonl"
    for bad in (math.nan, math.inf, None, "3"):
        write_lines(file, [row("a", "Math", [bad, 1, 1, 1])])
        with pytest.raises(ValueError, match=r"v2.jsonl:1: scores must be finite numbers, got"):
            read_groups(str(file))
        write_lines(file, [{"chosen_score": bad, "rejected_score": 1.0, "subset": "hep-go"}])
        with pytest.raises(ValueError, match=r"v2.jsonl:1: chosen_score must be finite numbers, got"):
            read_pairs(str(file))
    twice = [{"id": "tied:1", "num_correct": 2, "scores": [5.0, 4.0, 1.0]}] * 2
    with pytest.raises(ValueError, match="two rows with the id 'tied:1'"):
        ties_score(twice)


def test_a_judge_sees_who_said_what():
    said = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Ho"},
        {"role": "user", "content": "So?"},
    ]
    assert talk_of(said) == "[user]\nHi\n\n[assistant]\nHo\n\n[user]\nSo?" and talk_of(said[:1]) == "Hi"


def test_pairs_of_rewardbench_1_can_be_judged_by_a_model(tmp_path, run_script):
    pairs = [{"prompt": f"q{i}", "chosen": f"good {i}", "rejected": f"bad {i}", "subset": "hep-go"} for i in range(6)]
    script = [{"contains": "", "answers": ["[[A]]"]}]
    words = (
        "task=rm_accuracy",
        f"task.input=[{write_lines(tmp_path / 'p.jsonl', pairs)}]",
        "client=scripted",
        f"client.script={write_lines(tmp_path / 's.jsonl', script)}",
        "judge=llm",
    )
    assert run_script(SCRIPT, *words, f"hydra.run.dir={tmp_path}/out") == 0
    result = json.loads((tmp_path / "out/result.json").read_text())
    assert 0 < result["accuracy"] < 1 and result["errors"] == 0  # it names the place, and places are drawn
    assert result["sections"]["Reasoning"]["lower"] < result["sections"]["Reasoning"]["accuracy"]
