"""The audit names the judge that says A, the one that likes length, the one that writes garbage, and no honest one."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from omegaconf import OmegaConf

from evals import biases
from evals.audit import TESTED, audit
from evals.families import families_of, family_warnings
from evals.intervals import holm, share_estimate
from evals.readers import read_votes
from evals.verdicts import sort_pairs, votes_table
from tests.published_votes import SCRIPT, given, published

CONF = Path(__file__).parents[2] / "conf"
MODELS = {"vicuna-s": 0.9, "llama-s": 0.0, "claude-s": 1.4, "oasst-s": 0.4}


@pytest.fixture(scope="module")
def task():
    families = OmegaConf.load(CONF / "evaluate.yaml").families
    settings = OmegaConf.load(CONF / "task" / "audit.yaml")
    settings.families, settings.rounds, settings.input, settings.format = families, 100, [], "verdicts"
    return settings


def made(judge, *, questions=80, seed=0, name="judge", people=3, error=0.0):
    """Votes of people and of a judge on the same answers: people prefer by quality, the judge as `judge` says.

    judge(gap in quality of a over b, gap in characters, a's and b's model, rng) -> log odds that a is better, for the
    answer shown first as "a"; a string is the verdict itself.
    """
    rng = np.random.default_rng(seed)
    rows, answers = [], {model: {} for model in MODELS}
    for q in range(questions):
        category = ("writing", "math", "coding", "roleplay")[q % 4]
        for model in MODELS:
            words = rng.integers(20, 200)
            answers[model][f"q{q}"] = [" ".join(f"w{i}" for i in rng.integers(0, 500, words))]
        names = list(MODELS)
        for i, a in enumerate(names):
            for b in names[i + 1 :]:
                gap = 2 * (MODELS[a] - MODELS[b]) + rng.normal(0, 0.7)
                pair = {"question": f"q{q}", "category": category, "model_a": a, "model_b": b}
                for person in range(people):
                    wins = rng.random() < 1 / (1 + np.exp(-gap))
                    rows.append(pair | {"judge": f"person_{person}", "human": True, "verdict": "a" if wins else "b"})
                longer = (len(answers[a][f"q{q}"][0]) - len(answers[b][f"q{q}"][0])) / 500
                for shown in "ab":
                    sign = 1 if shown == "a" else -1
                    first, second = (a, b) if shown == "a" else (b, a)
                    said = judge(sign * gap, sign * longer, first, second, rng)
                    if rng.random() < error:
                        verdict = "error"
                    elif isinstance(said, str):
                        verdict = said if said == "error" or shown == "a" else {"a": "b", "b": "a"}[said]
                    else:
                        verdict = "a" if (rng.random() < 1 / (1 + np.exp(-said))) == (shown == "a") else "b"
                    rows.append(pair | {"judge": name, "shown": shown, "verdict": verdict})
    return votes_table(rows), answers


def honest(gap, longer, first, second, rng):
    return 3 * gap  # sharper than people, and nothing else


def test_an_honest_judge_is_named_for_nothing(task):
    result = audit(*made(honest), task)
    assert result["named"] == []
    assert result["self_preference"]["value"] is None  # "judge" has no family
    assert result["agreement"]["value"] > 0.7 and result["position"]["flips"]["items"] == 480


def test_a_judge_that_always_says_a_is_named_for_position(task):
    result = audit(*made(lambda *_: "a"), task)
    assert result["position"]["value"] == 1 and "position" in result["named"]
    assert result["position"]["flips"]["consistent"] == 0 and "shown first (100 %" in result["position"]["verdict"]
    assert "length" not in result["named"]


def test_a_judge_that_prefers_the_longer_is_named_for_length(task):
    result = audit(*made(lambda gap, longer, *_: "a" if longer > 0 else "b"), task)
    assert "length" in result["named"] and result["length"]["lower"] > 0.2
    assert "longer answers" in result["length"]["verdict"] and "on the same pairs" in result["length"]["verdict"]
    assert "position" not in result["named"]


def test_length_that_people_like_as_well_is_no_bias(task):
    votes, answers = made(honest)
    people = votes[votes["human"]]
    judge = people[people["judge"] == "person_0"].assign(judge="judge", human=False)
    result = audit(pd.concat([people[people["judge"] != "person_0"], judge]), answers, task)
    assert "length" not in result["named"] and abs(result["length"]["value"]) < 0.1


@pytest.mark.parametrize("share", [0.3, 1.0])
def test_a_judge_that_writes_garbage_is_named_and_its_errors_are_no_ties(share, task):
    result = audit(*made(honest, error=share), task)
    assert "unreadable" in result["named"] and result["unreadable"]["value"] == pytest.approx(share, abs=0.05)
    assert "cannot be read" in result["unreadable"]["verdict"]
    if share == 1.0:
        assert result["position"]["value"] is None and result["agreement"]["value"] is None


def test_a_judge_that_throws_coins_agrees_no_more_than_chance_does(task):
    result = audit(*made(lambda *_: 0.0), task)
    assert "agreement" in result["named"] and "chance" in result["agreement"]["verdict"]
    assert "position" not in result["named"] and "length" not in result["named"]


def test_a_doped_judge_is_named_and_a_sharp_one_is_not(task):
    def doped(gap, longer, first, second, rng):
        return 3 * gap + 3 * (("vicuna" in first) - ("vicuna" in second))

    result = audit(*made(doped, name="gpt-4"), task)
    assert "self_preference" in result["named"] and result["self_preference"]["family"] == ["vicuna-s"]
    sharp = audit(*made(honest, name="gpt-4"), task)["self_preference"]
    assert "none seen" in sharp["verdict"] and sharp["sharpness"] > 1.5
    assert abs(sharp["value"]) < 60 < result["self_preference"]["value"]


def test_one_constant_answer_is_named_as_degenerate(task):
    votes, answers = made(honest)
    answers["llama-s"] = {question: ["always this"] for question in answers["llama-s"]}
    result = audit(votes, answers, task)
    assert "degenerate" in result["named"] and result["degenerate"]["model"] == "llama-s"
    assert result["degenerate"]["value"] == 1 and result["degenerate"]["same_answers"] == 80


def test_votes_that_are_all_ties_cannot_be_told_from_chance(task):
    votes, answers = made(honest, questions=20)
    result = audit(votes.assign(verdict="tie"), answers, task)
    assert result["agreement"]["value"] == 1 and "vary too little" in result["agreement"]["verdict"]
    assert result["named"] == []


def test_a_judge_without_people_and_people_without_a_judge(task):
    votes, answers = made(honest, questions=8)
    with pytest.raises(ValueError, match="no judge's verdict"):
        audit(votes[votes["human"]], answers, task)
    alone = audit(votes[~votes["human"]], answers, task)
    assert alone["position"]["value"] is not None and alone["agreement"]["value"] is None


def test_figures_that_cannot_be_had_are_null_with_a_reason(task):
    votes, _ = made(honest, questions=20)
    result = audit(votes[~votes["human"]].drop(columns=["category"]).assign(category=None), {}, task)
    for name in ("length", "unique_tokens", "self_preference", "agreement", "degenerate", "low_entropy"):
        assert result[name]["value"] is None and result[name]["reason"], name
        assert result[name]["verdict"].startswith("not known")


def test_position_bias_of_gpt_4_on_real_votes_is_the_published_one(task):
    votes = read_votes(published("mtbench/phi3_dpo_gpt4_pair.jsonl"), "mtbench")
    expected, figure = given("position_bias_phi3_dpo")["all_75"], biases.position(votes, level=0.95)
    assert figure["value"] == pytest.approx(expected["first_share_of_decisive"])
    assert figure["n"] == expected["first_position_votes"] + expected["second_position_votes"]
    flips = figure["flips"]
    assert (flips["to_first"], flips["to_second"]) == (expected["flip_to_first"], expected["flip_to_second"])
    assert flips["consistent"] == pytest.approx(expected["consistent_incl_tie"])
    assert figure["lower"] > 0.5


def test_gpt_4s_share_of_longer_answers_on_alpaca_eval_is_published(tmp_path):
    from tests.published_votes import annotations

    for model, expected in list(given("ae2_length_per_model").items())[:3]:
        (tmp_path / "a.json").write_text(json.dumps(annotations(model)))
        votes = read_votes([str(tmp_path / "a.json")], "alpaca_eval")
        figure = biases.preference_for_more(votes[:0], votes, "length", min_gap=30, level=0.95)
        assert (figure["n"], figure["judge"]) == pytest.approx((expected["n"], expected["p"])), model


def test_gpt_4_picks_the_left_answer_less_often_than_the_crowd_does(task):
    """llmfao showed each pair in one order only: the share alone would mix the order with the answers."""
    votes = read_votes(published("llmfao/crowd-comparisons.csv", "llmfao/gpt4-crowd-comparisons.csv"), "llmfao")
    figure = biases.left_share(votes[votes["human"]], votes[~votes["human"]], level=0.95)
    expected = given("llmfao")["gpt4_vs_crowd"]
    assert figure["judge"] == pytest.approx(expected["left_share"]) and figure["compared_with"].startswith("people")
    assert figure["value"] < 0 < figure["upper"]  # 13 prompts do not tell
    assert figure["people"] == pytest.approx(expected["human_left_share"], abs=0.02)
    swapped = biases.left_share(votes[votes["human"]], sort_pairs(votes[~votes["human"]]), level=0.95)
    assert swapped["judge"] == figure["judge"] and swapped["value"] == pytest.approx(figure["value"])
    alone = biases.left_share(votes[:0], votes[~votes["human"]], level=0.95)
    assert alone["value"] == pytest.approx(expected["left_share"] - 0.5) and alone["compared_with"] == "one half"


def test_what_the_order_does_is_shown_by_category(task):
    votes, answers = made(lambda gap, longer, a, b, rng: "a" if rng.random() < 0.7 else gap)
    result = audit(votes, answers, task)
    assert set(result["position_by_category"]) == {"writing", "math", "coding", "roleplay"}
    for figure in result["position_by_category"].values():
        changed = figure["flips"]["changed"]
        assert figure["lower"] > 0.5 and changed["lower"] < changed["value"] < changed["upper"] and changed["n"] == 120
    assert result["left_share"]["value"] is None and "one order only" in result["left_share"]["reason"]


def test_agreement_on_math_and_coding_is_measured_on_mt_bench_and_not_assumed(task):
    from evals.questions import add_categories

    files = published("mtbench/human.jsonl", "mtbench/gpt4_pair.jsonl")
    settings = OmegaConf.merge(task, {"format": "mtbench"})
    result = audit(add_categories(read_votes(files, "mtbench"), "mt_bench"), {}, settings)
    figure = result["low_entropy"]
    assert figure["lower"] < 0 < figure["upper"] and "none seen" in figure["verdict"]
    assert result["position"]["value"] is None and result["position"]["inconsistent"] == pytest.approx(380 / 2400)
    assert len(result["categories"]) == 8 and result["categories"]["math"]["people"]["agreement"] > 0.5


def test_intervals_hold_together_and_p_values_are_holms(task):
    result = audit(*made(honest, questions=30), task)
    assert result["level"] == 1 - 0.05 / len(TESTED)
    figures = [{"p_value": p} for p in (0.01, 0.04, 0.03, None)]
    holm(figures, alpha=0.05)
    assert [f["p_adjusted"] for f in figures[:3]] == pytest.approx([0.03, 0.06, 0.06])
    assert [f["significant"] for f in figures[:3]] == [True, False, False] and "significant" not in figures[3]


def test_the_share_of_a_judge_that_is_always_right_has_the_spread_of_its_questions():
    once = share_estimate(np.ones(50), np.arange(50), null=0.5, level=0.95)
    often = share_estimate(np.ones(500), np.repeat(np.arange(50), 10), null=0.5, level=0.95)
    assert (once["lower"], once["upper"]) == (often["lower"], often["upper"]) and 0.9 < once["lower"] < 1


def test_two_questions_that_contradict_themselves_know_nothing():
    figure = share_estimate([1, 0, 1, 0], ["q0", "q0", "q1", "q1"], null=0.5, level=0.998)
    assert (figure["lower"], figure["upper"]) == pytest.approx((0, 1), abs=0.01) and figure["p_value"] == 1


def test_detectable_departures_shrink_with_the_root_of_the_votes(task):
    few, many = (audit(*made(honest, questions=n, seed=5), task)["position"]["detectable"] for n in (20, 80))
    assert few / many == pytest.approx(2, rel=0.35)


def test_families_are_found_by_name_and_by_ancestry(tmp_path, task):
    assert families_of("gpt4_pair", task.families) == {"openai"} == families_of("runs/vicuna-13b", task.families)
    data, run = tmp_path / "data", tmp_path / "run"
    data.mkdir()
    run.mkdir()
    (data / "manifest.json").write_text(json.dumps({"clients": [{"model": "gpt-4o"}]}))
    config = OmegaConf.create({"data": {"train": [f"{data}/data.jsonl"]}, "task": {"families": task.families}})
    OmegaConf.save(config, run / "config.yaml")  # the globs it was asked with are no ancestors
    (data / "data.jsonl").write_text("")
    warnings = family_warnings("gpt-4", {"mine": str(run / "completions.jsonl")}, task.families)
    assert len(warnings) == 1 and "mine descends" in warnings[0] and "gpt-4o" in warnings[0]
    assert family_warnings("claude-3", {"mine": str(run / "completions.jsonl")}, task.families) == []


def test_the_script_writes_json_a_page_and_pictures(tmp_path, run_script):
    votes, answers = made(lambda *_: "a", questions=24)
    rows = [{k: v for k, v in row.items() if v is not None and v == v} for row in votes.to_dict("records")]
    (tmp_path / "v.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = [
        {"question_id": q, "model_id": m, "choices": [{"turns": t}]}
        for m, own in answers.items()
        for q, t in own.items()
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = [
        f"task.input=[{tmp_path}/v.jsonl]",
        f"task.answers=[{tmp_path}/a.jsonl]",
        "task.format=verdicts",
        "task.rounds=20",
    ]
    assert run_script(SCRIPT, "task=audit", *words, f"hydra.run.dir={tmp_path}/out") == 0
    result, page = (Path(tmp_path / "out" / name).read_text() for name in ("result.json", "audit.html"))
    for name in ("position", "length", "self_preference", "agreement", "degenerate"):
        assert {"value", "lower", "upper", "n", "verdict"} <= set(json.loads(result)[name])
    assert "favours the answer shown first" in page and page.count("data:image/png;base64") == 2
