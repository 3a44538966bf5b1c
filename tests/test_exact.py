"""What needs no judge: numbers, verifiable instructions, tested code in a process with limits."""

import json
from decimal import Decimal
from pathlib import Path

import pytest

from evals.exact import last_number
from evals.instructions import follows
from evals.sandbox import passes_tests
from tests.published_votes import DOOR, write_lines


@pytest.mark.parametrize(
    "text, number",
    [
        ("so 3 + 4 = 7", 7),
        ("#### 1,234", 1234),
        ("It costs $18.00.", 18),
        ("#### 5 apples of 9", 5),
        ("-3", -3),
        ("no number", None),
        ("3.50 or .5", Decimal("0.5")),
    ],
)
def test_the_last_number_of_an_answer(text, number):
    assert last_number(text) == number


@pytest.mark.parametrize(
    "name, given, good, bad",
    [
        ("punctuation:no_comma", {}, "a b", "a, b"),
        ("length_constraints:number_words", {"num_words": 3, "relation": "at least"}, "one two three", "one two"),
        ("length_constraints:number_words", {"num_words": 3, "relation": "less than"}, "one two", "one two three"),
        ("length_constraints:number_sentences", {"num_sentences": 2, "relation": "at least"}, "A b. C d!", "A b, c d."),
        ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "a\n***\nb", "a\n\nb"),
        ("keywords:existence", {"keywords": ["Cat", "dog"]}, "a cat, a dog", "a cat"),
        ("keywords:forbidden_words", {"forbidden_words": ["cat"]}, "concatenate", "The Cat."),
        ("keywords:letter_frequency", {"letter": "q", "let_frequency": 2, "let_relation": "at least"}, "Qq", "q"),
        ("detectable_format:number_bullet_lists", {"num_bullets": 2}, "* a\n* b", "* a"),
        ("detectable_format:number_highlighted_sections", {"num_highlights": 1}, "so *here*", "so here"),
        ("detectable_format:title", {}, "<<Poem>> x", "Poem"),
        ("detectable_format:json_format", {}, '```json\n{"a": 1}\n```', "{a: 1}"),
        ("change_case:english_lowercase", {}, "all low", "Not low"),
        ("change_case:english_capital", {}, "ALL UP", "Not up"),
        ("startend:quotation", {}, '"so"', "so"),
        ("startend:end_checker", {"end_phrase": "The end."}, "Well. the END.", "The end. Or not"),
        ("detectable_content:postscript", {"postscript_marker": "P.S."}, "a\nP.S. b", "a"),
        ("combination:two_responses", {}, "a\n******\nb", "a\n******\na"),
    ],
)
def test_instructions_that_are_followed_and_that_are_not(name, given, good, bad):
    assert follows(name, good, given) and not follows(name, bad, given) and not follows(name, "  ", given)


def test_an_instruction_that_nobody_can_verify_is_refused():
    with pytest.raises(ValueError, match="language:response_language"):
        follows("language:response_language", "hallo", {"language": "de"})


LIMITS = {"seconds": 1, "megabytes": 256}


@pytest.mark.parametrize(
    "program, passes",
    [
        ("assert 1 + 1 == 2", True),
        ("assert 1 + 1 == 3", False),
        ("while True: pass", False),
        ("x = 'a' * 10**9", False),
        ("open('big', 'w').write('a' * 10**7)", False),
        ("import os\nassert not os.environ.get('HOME') and not os.listdir('.')", True),
        ("import torch", False),
    ],
)
def test_programs_run_within_limits(program, passes):
    assert passes_tests(program, **LIMITS) is passes


def run_door(door, tmp_path, questions, completions, *words):
    answers = [
        {"question_id": str(i), "model_id": "m", "choices": [{"turns": [text]}]} for i, text in enumerate(completions)
    ]
    asked = [row | {"question_id": str(i)} for i, row in enumerate(questions)]
    paths = (
        f"task.questions={write_lines(tmp_path / 'q.jsonl', asked)}",
        f"task.input=[{write_lines(tmp_path / 'a.jsonl', answers)}]",
    )
    code = door(DOOR, "task=exact", *paths, f"hydra.run.dir={tmp_path}/out", *words)
    return code, json.loads(Path(tmp_path / "out/result.json").read_text())["models"]["m"] if code == 0 else None


def test_the_door_scores_gsm8k_and_counts_missing_answers_as_wrong(tmp_path, door):
    questions = [{"question": f"q{i}", "answer": f"well\n#### {i}"} for i in range(4)]
    code, result = run_door(door, tmp_path, questions, ["it is 0", "it is 1.0", "it is 5"], "task.format=gsm8k")
    assert code == 0 and result["value"] == 0.5 and (result["n"], result["unanswered"]) == (4, 1)


def test_the_door_scores_instructions_by_prompt_and_one_by_one(tmp_path, door):
    ids = ["punctuation:no_comma", "change_case:english_lowercase"]
    questions = [{"prompt": "p", "instruction_id_list": ids, "kwargs": [{}, {}]}] * 2
    code, result = run_door(door, tmp_path, questions, ["good", "Half"], "task.format=ifeval")
    assert code == 0 and result["value"] == 0.5 and result["instruction_level"]["value"] == 0.75
    assert result["instructions"]["punctuation:no_comma"]["value"] == 1


CODE = [{"prompt": "def add(a, b):\n", "test": "def check(f):\n    assert f(1, 2) == 3", "entry_point": "add"}]


def test_code_runs_only_where_it_was_asked_for(tmp_path, door, capsys):
    answer = ["```python\ndef add(a, b):\n    return a + b\n```"]
    assert run_door(door, tmp_path, CODE, answer, "task.format=code")[0] == 2
    assert "task.run_code=true" in capsys.readouterr().err
    assert run_door(door, tmp_path, CODE, answer, "task.format=code", "task.run_code=true")[1]["value"] == 1
