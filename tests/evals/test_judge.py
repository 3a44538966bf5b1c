"""The judge: published verdict texts, both orders, references, refusals, resumed runs, and warnings."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from omegaconf import OmegaConf

import evals.judge
from data.records import Verdict
from evals.answers import answer_questions, load_answers
from evals.asking import Judging
from evals.families import family_warnings
from evals.judge import judge_pairs
from evals.judge_items import choose_template, item_messages, make_items, pair_verdict
from evals.prompts import load_templates
from evals.published_parsers import fastchat_pair
from evals.questions import load_questions, load_references
from generation.clients import Answer
from generation.scripted_client import ScriptedClient
from tests.published_votes import SCRIPT, given, published, write_lines

TASK = OmegaConf.create({"mode": "pairwise", "models": None, "baseline": None, "turns": 2, "both_orders": True})
QUESTIONS = [
    {"question_id": "1", "category": "writing", "turns": ["Write a {line}.", "Shorter."]},
    {"question_id": "2", "category": "math", "turns": ["What is 1+1?", "And 2+2?"]},
]
ANSWERS = {m: {q["question_id"]: [f"{m} says {{{i}}}" for i in (1, 2)] for q in QUESTIONS} for m in ("x", "y", "z")}
REFERENCES = {"2": ["2", "4"]}


def items(**changes):
    return make_items(QUESTIONS, ANSWERS, REFERENCES, OmegaConf.merge(TASK, changes))


def test_a_reward_model_judges_each_pair_once(monkeypatch):
    """It sees one answer at a time, so the second order would only count each of its verdicts twice."""

    class First:
        def __init__(self, settings):
            self.name = "first"

        def compare(self, items, pair_verdict):
            return [pair_verdict(item, self.name, "", ("a", 1.0), None) for item in items]

    monkeypatch.setattr(evals.judge, "RewardJudge", First)
    both = items()
    verdicts, _, errors = judge_pairs(Judging(OmegaConf.create({"kind": "reward_model"}), None, "pairwise"), both)
    judged = {(one.question, one.turn, one.model_a, one.model_b) for one in verdicts}
    assert len(verdicts) == len(judged) == len(both) / 2 == 12 and not errors


def test_verdicts_of_150_published_judgements_are_read_by_fastchats_rule():
    (file,) = published("mtbench/phi3_dpo_gpt4_pair.jsonl")
    texts = [json.loads(line)[f"g{i}_judgment"] for line in Path(file).read_text().splitlines() for i in (1, 2)]
    counts = {"A": 0, "B": 0, "tie": 0, "error": 0}
    for text in texts:
        verdict = fastchat_pair(text).verdict
        counts[{"a": "A", "b": "B"}.get(verdict, verdict)] += 1
    assert counts == given("verdict_parsing")["phi3_dpo_150_texts"]["counts"]


def test_every_pair_is_asked_in_both_orders_and_both_turns():
    asked = items()
    assert len(asked) == 2 * 2 * 3 * 2 and {item.models for item in asked} == {("x", "y"), ("x", "z"), ("y", "z")}
    assert {item.models for item in items(baseline="y")} == {("y", "x"), ("y", "z")}
    assert len(items(turns=1, both_orders=False)) == 2 * 3


def test_the_prompt_shows_answers_in_the_order_asked_and_references_to_math():
    templates = load_templates("fastchat", "pairwise")
    first, swapped = items(models=["x", "y"], turns=1)[:2]
    texts = [item_messages(item, choose_template(item, templates))[-1]["content"] for item in (first, swapped)]
    assert texts[0].index("x says {1}") < texts[0].index("y says {1}") and texts[1].index("y says") < texts[1].index(
        "x says"
    )
    assert "Write a {line}." in texts[0] and "Reference" not in texts[0]
    math = items(models=["x", "y"])[4:]
    names = [choose_template(item, templates).name for item in math[::2]]
    assert names == ["pair-math-v1", "pair-math-v1-multi-turn"]
    second = item_messages(math[2], choose_template(math[2], templates))[-1]["content"]
    assert all(word in second for word in ("What is 1+1?", "And 2+2?", "x says {2}", "y says {2}", "4"))


def test_the_verdict_on_the_swapped_order_is_mapped_back():
    first, swapped = items(models=["x", "y"], turns=1)[:2]
    assert [pair_verdict(item, "j", "", ("a", 1.0), item.shown).verdict for item in (first, swapped)] == ["a", "b"]
    verdict = pair_verdict(swapped, "j", "text", ("error", 1.0), swapped.shown)
    assert isinstance(verdict, Verdict) and (verdict.verdict, verdict.shown, verdict.length_a) == ("error", "b", 10)


def test_an_answer_that_is_missing_is_named():
    with pytest.raises(ValueError, match="y has no answer to question 2, turn 2"):
        make_items(QUESTIONS, {"x": ANSWERS["x"], "y": {"1": ["a", "b"], "2": ["a"]}}, {}, TASK)
    with pytest.raises(ValueError, match="no answers of nobody"):
        items(models=["nobody"])


def test_mt_bench_and_vicuna_are_there_by_name():
    bench, vicuna = load_questions("mt_bench"), load_questions("vicuna")
    assert len(bench) == len(vicuna) == 80 and all(len(q["turns"]) == 2 for q in bench)
    needing = {q["question_id"] for q in bench if q["category"] in ("math", "reasoning", "coding")}
    assert set(load_references("mt_bench", None)) == needing and len(load_references("vicuna", None)) == 10


def test_a_second_turn_is_answered_after_the_models_own_first():
    client = ScriptedClient(lambda request: f"answer {len(request.messages)} at {request.temperature}")
    settings = {"model": "m", "temperatures": {"default": 0.7, "math": 0.0}, "max_tokens": 9, "seed": 0}
    rows, lacking = answer_questions(QUESTIONS, client, **settings)
    assert rows[0]["choices"][0]["turns"] == ["answer 1 at 0.7", "answer 3 at 0.7"] and not lacking
    assert rows[1]["choices"][0]["turns"] == ["answer 1 at 0.0", "answer 3 at 0.0"]

    class Refuses(ScriptedClient):
        def _answer(self, requests):
            for key, answer in super()._answer(requests):
                refused = answer.text == "answer 3 at 0.0"
                yield key, replace(answer, text="", finish_reason="refused", error="too long") if refused else answer

    rows, lacking = answer_questions(QUESTIONS, Refuses(client.reply), **settings)
    assert [row["question_id"] for row in rows] == [QUESTIONS[0]["question_id"]]  # no empty answer is judged
    assert lacking == {QUESTIONS[1]["question_id"]: "refused: too long"}


def test_completions_and_outputs_are_read_as_answers(tmp_path):
    folder = tmp_path / "my_run"
    folder.mkdir()
    own = write_lines(
        folder / "completions.jsonl", [{"prompt": [{"role": "user", "content": "Hi"}], "completion": "Ho"}]
    )
    alpaca = tmp_path / "outputs.json"
    alpaca.write_text(json.dumps([{"instruction": "Hi", "output": "Ha", "generator": "alpaca"}]))
    assert load_answers([own, str(alpaca)]) == {"my_run": {"Hi": ["Ho"]}, "alpaca": {"Hi": ["Ha"]}}


def files(tmp_path, script):
    rows = [{"question_id": q["question_id"], "category": q["category"], "turns": q["turns"]} for q in QUESTIONS]
    names = {"questions": write_lines(tmp_path / "q.jsonl", rows), "script": write_lines(tmp_path / "s.jsonl", script)}
    answers = [
        {"question_id": q, "model_id": m, "choices": [{"turns": t}]}
        for m, own in ANSWERS.items()
        for q, t in own.items()
    ]
    names["answers"] = write_lines(tmp_path / "a.jsonl", answers)
    return names


def judge_words(tmp_path, script, *words):
    names = files(tmp_path, script)
    return [
        "task=judge",
        "client=scripted",
        f"client.script={names['script']}",
        f"task.answers=[{names['answers']}]",
        f"task.questions={names['questions']}",
        "task.models=[x,y]",
        f"hydra.run.dir={tmp_path}/out",
        *words,
    ]


def test_the_script_judges_pairs_and_counts_what_it_cannot_read(tmp_path, run_script):
    script = [{"contains": "1+1", "answers": ["I like [[A]]"]}, {"contains": "", "answers": ["hm"]}]
    assert run_script(SCRIPT, *judge_words(tmp_path, script)) == 0
    result = json.loads(Path(tmp_path / "out/result.json").read_text())
    verdicts = [json.loads(line) for line in Path(tmp_path / "out/verdicts.jsonl").read_text().splitlines()]
    assert len(verdicts) == 8 and result["unreadable"] == 0.5
    figures = result["models"]["y"]["x"]
    assert (figures["n_draws"], figures["n_errors"], figures["win_rate"]) == (2, 2, 50)
    assert any("cannot be read" in warning for warning in result["warnings"])


def test_three_models_are_compared_in_pairs_and_the_order_is_measured_by_category(tmp_path, run_script, capsys):
    rng, models = np.random.default_rng(0), ("base", "good", "bad")
    questions = [{"question_id": str(i), "category": "ab"[i % 2], "turns": [f"Q{i}?"]} for i in range(40)]
    answers = [
        {"question_id": str(i), "model_id": m, "choices": [{"turns": [f"{m} {rng.integers(99)} Q{i}"]}]}
        for i in range(40)
        for m in models
    ]
    names = {name: write_lines(tmp_path / f"{name}.jsonl", rows) for name, rows in
             (("questions", questions), ("answers", answers), ("script", [
                 {"contains": "A's Answer]\ngood", "answers": ["[[A]]"]}, {"contains": "B's Answer]\ngood", "answers":
                 ["[[B]]"]}, {"contains": "", "answers": ["[[A]]", "[[B]]", "[[A]]"]}]))}  # fmt: skip
    words = ["task=judge", "client=scripted", "task.baseline=base", "task.turns=1", f"hydra.run.dir={tmp_path}/out"]
    words += [f"client.script={names['script']}", f"task.answers=[{names['answers']}]"]
    assert run_script(SCRIPT, *words, f"task.questions={names['questions']}") == 0
    result = json.loads((tmp_path / "out/result.json").read_text())
    (paired,) = result["paired"]["base"]
    assert paired["models"] == ["good", "bad"] and paired["significant"] and paired["lower"] > 20 and paired["n"] == 40
    orders = result["orders"]
    assert set(orders) == {"all", "a", "b"} and orders["all"]["flips"]["items"] == 80
    assert orders["a"]["flips"]["changed"]["n"] == 40 and orders["all"]["value"] > 0.5
    out = capsys.readouterr().out
    assert "effect of the order shown" in out and "paired differences" in out


def test_the_script_grades_single_answers(tmp_path, run_script):
    script = [{"contains": "x says", "answers": ["[[8]]"]}, {"contains": "", "answers": ["[[3]]"]}]
    assert run_script(SCRIPT, *judge_words(tmp_path, script, "task.mode=single")) == 0
    models = json.loads(Path(tmp_path / "out/result.json").read_text())["models"]
    assert json.loads(Path(tmp_path / "out/result.json").read_text())["paired"][0]["value"] == 5
    assert (models["x"]["value"], models["y"]["value"]) == (8, 3) and models["x"]["turns"]["2"]["value"] == 8
    assert models["x"]["turns"]["1"]["n"] == 2


def test_a_killed_run_asks_nothing_twice(tmp_path):
    """The first run dies in the middle; the second asks only what is not on disk."""
    asked = []

    def dies(request):
        asked.append(request.key)
        if len(asked) == 5:
            raise KeyboardInterrupt
        return "[[A]]"

    conversations = [
        item_messages(i, choose_template(i, load_templates("short", "pairwise"))) for i in items(models=["x", "y"])
    ]
    settings = {"temperature": 0, "max_tokens": 9, "seed": 0}
    with pytest.raises(KeyboardInterrupt):
        ScriptedClient(dies, cache=str(tmp_path / "answers")).ask(conversations, **settings)
    client = ScriptedClient(lambda request: asked.append(request.key) or "[[A]]", cache=str(tmp_path / "answers"))
    said = client.ask(conversations, **settings)
    assert all(isinstance(answer, Answer) for answer in said) and client.usage.from_cache == 4
    assert len(asked) == len(conversations) + 1  # the one that died is asked again


def test_an_unknown_template_or_mode_is_refused_before_anything_is_asked(tmp_path, run_script, capsys):
    script = [{"contains": "", "answers": ["[[A]]"]}]
    for words, message in (
        ("judge.template=nope", "judge.template='nope'"),
        ("task.mode=triple", "task.mode='triple'"),
    ):
        assert run_script(SCRIPT, *judge_words(tmp_path, script, words)) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out" / "result.json").exists()


def test_a_judge_of_the_models_family_is_warned_of(tmp_path):
    families = OmegaConf.load(Path(__file__).parents[2] / "conf" / "evaluate.yaml").families
    warnings = family_warnings("gpt-4", {"vicuna-13b": str(tmp_path / "a"), "dolly": str(tmp_path / "a")}, families)
    assert len(warnings) == 1 and "vicuna-13b are of one family (openai)" in warnings[0]
