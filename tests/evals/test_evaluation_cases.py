"""Small inputs that public bug reports named, through the whole command: what a user expects of each."""

import json

import pytest

from evals.readers import read_votes
from tests.published_votes import SCRIPT, write_lines

QUESTIONS = [{"question_id": str(i), "category": "writing", "turns": [f"Question number {i}?"]} for i in range(6)]


def answers_of(model, n=6):
    return [
        {"question_id": str(i), "model_id": model, "choices": [{"turns": [f"{model} answer {i}"]}]} for i in range(n)
    ]


@pytest.fixture
def judge(tmp_path, run_script, capsys):
    """judge(said, *words, questions, answers) -> (exit code, result.json or what was printed as the error)."""

    def judge(said, *words, questions=QUESTIONS, answers=None):
        script = write_lines(tmp_path / "s.jsonl", [{"contains": "", "answers": [said]}])
        files = {"q": questions, "a": answers or answers_of("old") + answers_of("new")}
        paths = {name: write_lines(tmp_path / f"{name}.jsonl", rows) for name, rows in files.items()}
        asked = [
            "task=judge",
            "client=scripted",
            f"client.script={script}",
            f"task.questions={paths['q']}",
            f"task.answers=[{paths['a']}]",
            f"hydra.run.dir={tmp_path}/out",
            "overwrite=true",
            *words,
        ]
        code = run_script(SCRIPT, *asked)
        return code, json.loads((tmp_path / "out/result.json").read_text()) if code == 0 else capsys.readouterr().err

    return judge


@pytest.mark.parametrize(
    "said, grade",
    [
        ("If it were vague I would give [[3]], but it is complete and right. Rating: [[9]]", 9),
        ("It cites a source [1] and is right. **Rating: 9/10**", 9),
        ("It cites a source [1] and is right.", None),
    ],
)
def test_the_last_grade_counts_and_a_citation_is_none(judge, said, grade):
    code, result = judge(said, "task.mode=single")
    assert code == 0 and result["models"]["new"]["value"] == grade
    assert result["unreadable"] == (grade is None)


def test_braces_of_a_template_are_text(judge, tmp_path):
    text = (
        'Question: {question}\nA: {answer_a}\nB: {answer_b}\nReply as JSON like {"why": "..."} and then [[A]] or [[B]].'
    )
    row = {"name": "pair", "type": "pairwise", "system_prompt": "", "prompt_template": text, "output_format": "[[A]]"}
    file = write_lines(tmp_path / "t.jsonl", [row])
    code, result = judge('{"why": "x"} [[A]]', f"judge.template={file}")
    assert code == 0 and result["unreadable"] == 0
    row["prompt_template"] = text.replace("{answer_b}", "{anwser_b}")
    assert (
        "does not contain {answer_b}" in judge("[[A]]", f"judge.template={write_lines(tmp_path / 't.jsonl', [row])}")[1]
    )


@pytest.mark.parametrize(
    "turns", ["Write a haiku.", [{"content": "Write a haiku."}], [{"role": "user", "content": "Write a haiku."}]]
)
def test_a_text_is_one_turn_and_a_content_is_its_text(turns, tmp_path):
    from evals.questions import load_questions

    file = write_lines(tmp_path / "q.jsonl", [{"question_id": "1", "category": "writing", "turns": turns}])
    assert load_questions(file)[0]["turns"] == ["Write a haiku."]
    arena_hard = write_lines(tmp_path / "v2.jsonl", [{"uid": "u", "category": "coding", "prompt": "Write a haiku."}])
    assert load_questions(arena_hard) == [{"question_id": "u", "category": "coding", "turns": ["Write a haiku."]}]
    for bad in (7, [None], [], [["a"]]):
        with pytest.raises(ValueError, match=r"q.jsonl:1"):
            load_questions(write_lines(tmp_path / "q.jsonl", [{"question_id": "1", "turns": bad}]))


def test_an_answer_without_text_is_refused_before_anything_is_asked(judge, tmp_path):
    code, error = judge("[[A]]", answers=[{"instruction": "Hi", "generator": "new", "output": None}])
    assert code == 2 and "a.jsonl:1: output must be a text, got null" in error
    assert not (tmp_path / "out" / "answers").exists()


def test_a_judgement_that_was_cut_or_refused_is_no_vote():
    from evals.judge import read_answer
    from evals.judge_output import read_pair
    from generation.clients import Answer

    assert read_answer(Answer("[[A]]", "stop", 1, 1), read_pair).verdict == "a"
    for reason, why in (("length", "cut by judge.max_tokens"), ("content_filter", "filtered"), ("refused", "refused")):
        assert tuple(read_answer(Answer("[[A]]", reason, 1, 1), read_pair)) == ("error", 1.0, why)


def test_errors_are_counted_by_their_reason_and_a_judge_of_places_is_warned_of(judge):
    code, result = judge("[[B]]")
    figures = result["models"]["new"]["old"]
    assert code == 0 and figures["win_rate"] == 50 and figures["lower"] < 40 and figures["upper"] > 60
    assert figures["order"]["value"] == 0 and figures["order"]["flips"]["to_second"] == 6
    assert any("names the answer shown second in 100 %" in warning for warning in result["warnings"])
    code, result = judge("I'm sorry, I can't compare these.")
    assert result["errors"] == {"refused": 12} and any("12 refused" in warning for warning in result["warnings"])


def test_with_one_order_the_order_is_drawn_and_recorded(judge, tmp_path):
    assert judge("[[A]]", "task.both_orders=false", "task.seed=1")[0] == 0
    rows = [json.loads(line) for line in (tmp_path / "out/verdicts.jsonl").read_text().splitlines()]
    assert {row["shown"] for row in rows} == {"a", "b"} and len(rows) == 6
    assert all(row["verdict"] == row["shown"] for row in rows)  # the judge always names the one shown first


def win_rates(run_script, tmp_path, capsys, rows, *words, format="arena"):
    words = ("task=winrate", f"task.input=[{write_lines(tmp_path / 'v.jsonl', rows)}]", f"task.format={format}", *words)
    code = run_script(SCRIPT, *words, f"hydra.run.dir={tmp_path}/out", "overwrite=true")
    said = capsys.readouterr()
    return (json.loads((tmp_path / "out/result.json").read_text()), said.out) if code == 0 else (code, said.err)


def test_battles_of_both_sides_are_one_result(tmp_path, run_script, capsys):
    rows = [{"question_id": f"q{i}", "model_a": "base", "model_b": "new", "winner": "model_b"} for i in range(9)]
    rows += [{"question_id": f"r{i}", "model_a": "new", "model_b": "base", "winner": "model_b"} for i in range(3)]
    for words in (["task.baseline=base"], []):
        result, _ = win_rates(run_script, tmp_path, capsys, rows, *words)
        assert (result["model"], result["baseline"], result["win_rate"], result["n_total"]) == ("new", "base", 75, 12)
    assert win_rates(run_script, tmp_path, capsys, rows, "task.baseline=nobody")[0] == 2


def test_an_answer_without_text_is_named_and_the_other_battles_count(tmp_path, run_script, capsys):
    def talk(text):
        return [{"role": "user", "content": "q"}, {"role": "assistant", "content": text}]

    rows = [
        {"model_a": "m1", "model_b": "m2", "winner": w, "conversation_a": talk(t), "conversation_b": talk("b")}
        for w, t in (("model_a", "x"), ("model_b", None), ("model_b", [{"type": "text", "text": "four"}]))
    ]
    result, said = win_rates(run_script, tmp_path, capsys, rows)
    assert (result["n_total"], result["n_errors"], result["win_rate"]) == (2, 1, 50)
    assert "v.jsonl:2: an answer of m1" in said.replace("\n", "")
    votes = read_votes([str(tmp_path / "v.jsonl")], "arena")
    assert votes["length_a"].tolist()[::2] == [1, 4]


def alpaca(model, preferences):
    return [
        {"instruction": f"i{i}", "generator_1": "b", "generator_2": model, "preference": p}
        | {"output_1": "x" * i, "output_2": "y"}
        for i, p in enumerate(preferences)
    ]


def test_one_model_without_verdicts_does_not_hide_the_others(tmp_path, run_script, capsys):
    rows = alpaca("good", [1.0, 2.0, 1.2]) + alpaca("allnull", [None] * 3)
    result, said = win_rates(run_script, tmp_path, capsys, rows, format="alpaca_eval")
    assert result["models"]["good"]["b"]["win_rate"] == pytest.approx(40)
    assert result["models"]["allnull"]["b"]["win_rate"] is None and "allnull against b: none of the 3" in said


def test_ten_verdicts_have_a_standard_error_that_is_none_of_nothing(tmp_path, run_script, capsys):
    rows = alpaca("m", [2.0] * 9 + [1.0])
    result, _ = win_rates(run_script, tmp_path, capsys, rows, format="alpaca_eval")
    assert result["length_controlled_standard_error"] > 1 and "few" in result["length_control"]["estimator"]
    assert "does not distinguish" in result["length_control"]["without_difficulty"]


@pytest.mark.parametrize("wins, ties", [(6, 0), (5, 1), (0, 0)])
def test_intervals_never_pass_100_and_six_of_six_are_not_certain(tmp_path, run_script, capsys, wins, ties):
    rows = alpaca("m", [2.0] * wins + [1.5] * ties + [1.0] * (6 - wins - ties))
    result, _ = win_rates(run_script, tmp_path, capsys, rows, format="alpaca_eval")
    assert 0 <= result["lower"] < result["upper"] <= 100 and result["upper"] - result["lower"] > 15


def test_labels_of_lmsys_and_pandalm_are_read(tmp_path):
    rows = [{"model_a": "x", "model_b": "y", "winner": w} for w in ("both_bad", "tie (bothbad)", "tie")]
    votes = read_votes([write_lines(tmp_path / "b.jsonl", rows)], "arena")
    assert votes["verdict"].tolist() == ["tie"] * 3 and votes["both_bad"].tolist() == [True, True, False]
    rows = [
        {"model_a": "x", "model_b": "y", "winner_model_a": a, "winner_model_b": b, "winner_tie": t}
        for a, b, t in ((1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0, 0))
    ]
    assert read_votes([write_lines(tmp_path / "b.jsonl", rows)], "arena")["verdict"].tolist() == [
        "a",
        "b",
        "tie",
        "error",
    ]
    rows = [
        {"idx": i, "cmp_key": "x_y", "gpt": word, "response1": "a", "response2": "b"}
        for i, word in enumerate(("Tie", "1", "2", "0", "what"))
    ]
    votes = read_votes([write_lines(tmp_path / "p.jsonl", rows)], "pandalm")
    assert votes["verdict"].tolist() == ["tie", "a", "b", "tie", "error"]


def test_parquet_and_big_cells_are_read(tmp_path):
    import pyarrow
    import pyarrow.parquet

    rows = [{"model_a": "x", "model_b": "y", "winner": "model_a", "conversation_a": [{"role": "user", "content": "q"}]}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "b.parquet")
    assert read_votes([str(tmp_path / "b.parquet")], "arena")["verdict"].tolist() == ["a"]
    (tmp_path / "b.csv").write_text(f"model_a,model_b,winner,text\nx,y,model_b,{'z' * 200_000}\n")
    assert read_votes([str(tmp_path / "b.csv")], "arena")["verdict"].tolist() == ["b"]
