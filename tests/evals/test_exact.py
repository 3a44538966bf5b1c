"""What needs no judge: numbers, verifiable instructions, tested code in a process with limits."""

import json
import os
import socket
import time
from decimal import Decimal
from pathlib import Path

import pytest

from evals.benchmarks import sandbox
from evals.benchmarks.gsm8k import gold_number, harness_matches, last_number, majority, pass_at_k
from evals.benchmarks.ifeval import check_answer, follows
from evals.benchmarks.sandbox import passes_tests, program_of
from tests.published_votes import SCRIPT, write_lines


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
        ("10-15", 15),
        ("5 - 3 = 2; 7-4", 4),
        ("x = −5", -5),
        ("answer: -$1,200.50", Decimal("-1200.5")),
        ("So the answer is \\boxed{42}. That was 3 steps of work in 2025.", 42),
        ("\\boxed{\\frac{3}{4}}", Decimal("0.75")),
        ("**Answer: 7**\n\nStep count: 3 (of 3).", 7),
        ("The answer is 1/2.", Decimal("0.5")),
        ("<think>5+5=10</think> The answer is ten.", 10),
        ("<think>so 7", None),
        ("twenty-one", 21),
        ("one hundred and five, or two thousand five hundred and six", 2506),
        ("No one knows", None),
        ("#### Step 1\n5\n#### Step 2: add\n5 + 6 = 11\nThe answer is 11, not 12.", 11),
        ("#### 12. Add\n5 + 6 = 11", 11),
        ("#### The total is 5 of 9", 5),
        ("#### 18. Good luck", 18),
        ("The answer is 2 1/2 hours", Decimal("2.5")),
        ("\\boxed{2\\frac{1}{2}}", Decimal("2.5")),
        ("\\boxed{-\\dfrac12}", Decimal("-0.5")),
        ("\\boxed{\\frac{-1}{2}}", Decimal("-0.5")),
        ("half: ½", Decimal("0.5")),
        ("x = 1,2,3", 3),
        ("1,00,000", 100_000),  # India's groups
        ("The answer is $10,\\!000$, 10 of them", 10_000),
        ("The answer is 1\u202f000", 1000),
        ("The answer is 1 000 000.", 1_000_000),
        ("it costs $1 234.50", Decimal("1234.50")),
        ("\\boxed{10\\ 000}", 10_000),
        ("so 1'000'000 francs", 1_000_000),
        ("The answer is 0,5.", Decimal("0.5")),
        ("(0,5)", 5),  # a pair
        ("0,5,6", 6),  # a list
        ("in 2023 100 people", 100),
        ("2 100/3", Decimal(2) + Decimal(100) / 3),
        ("The answer is 3 \\times 10^{5}.", 300_000),
        ("The answer is 1e-05", Decimal("0.00001")),
        ("<answer>12</answer> Checked in 3 ways.", 12),
    ],
)
def test_the_last_number_of_an_answer(text, number):
    assert last_number(text) == number


def test_a_solution_is_one_number_or_refused():
    read = {"so 3\n#### 1,234": 1234, "\\boxed{42 \\text{ cm}}": 42, "$18": 18, "x = -5.": -5, "18 apples": 18,
            "50\\%": 50, "$\\frac{3}{4}$": Decimal("0.75"), "1e+22": 10**22,
            "10 000": 10_000, "x = 0,5": Decimal("0.5")}  # fmt: skip
    for text, number in read.items():
        assert gold_number(text) == number, text
    for text in ("3\\pi", "2\\sqrt{3}", "x + 1", "(3, 4)", "3,4", "7 or 8", "2^3", "10:30", "nan", "True"):
        with pytest.raises(ValueError, match="is not one number"):
            print(text, gold_number(text))


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
        ("change_case:english_lowercase", {}, "this is all in lower case and english", "This is not in lower case"),
        ("change_case:english_capital", {}, "THIS IS AN ENGLISH SENTENCE WITH CAPITALS", "Not up"),
        ("startend:quotation", {}, '"so"', "so"),
        ("startend:end_checker", {"end_phrase": "The end."}, "Well. the END.", "The end. Or not"),
        ("detectable_content:postscript", {"postscript_marker": "P.S."}, "a\nP.S. b", "a"),
        ("combination:two_responses", {}, "a\n******\nb", "a\n******\na"),
    ],
)
def test_instructions_that_are_followed_and_that_are_not(name, given, good, bad):
    assert follows(name, good, given) and not follows(name, bad, given) and not follows(name, "  ", given)


def test_an_instruction_that_is_none_of_the_25_is_refused():
    with pytest.raises(ValueError, match="length_constraints:rhymes"):
        follows("length_constraints:rhymes", "hallo", {})
    with pytest.raises(ValueError, match="lacks its setting 'num_words'"):
        follows("length_constraints:number_words", "hallo", {})


@pytest.mark.parametrize(
    "name, given, problem",
    [
        (
            "length_constraints:number_paragraphs",
            {"num_paragraphs": "1"},
            "num_paragraphs must be a whole number of at",
        ),
        ("length_constraints:nth_paragraph_first_word", {"nth_paragraph": 0}, "nth_paragraph .* at least 1, got 0"),
        ("length_constraints:number_words", {"num_words": 1.5}, "num_words must be a whole number .* got 1.5"),
        ("length_constraints:number_words", {"num_words": float("nan")}, "lacks its setting 'num_words'"),
        (
            "length_constraints:number_words",
            {"num_words": 1, "relation": "at most"},
            "must be 'at least' or 'less than'",
        ),
        ("keywords:existence", {"keywords": "cat"}, "keywords must be a list with a text or more, got 'cat'"),
        ("keywords:forbidden_words", {"forbidden_words": []}, "forbidden_words must be a list with a text or more"),
        ("keywords:letter_frequency", {"letter": "", "let_frequency": 1}, "letter must be a text, got ''"),
    ],
)
def test_a_setting_of_an_instruction_with_a_wrong_value_is_refused(name, given, problem):
    with pytest.raises(ValueError, match=problem):
        print(follows(name, "a cat", given))


def test_settings_that_do_not_belong_to_the_instructions_are_refused():
    comma = "punctuation:no_comma"
    for names, settings in (([comma, comma], [{}]), (comma, {}), (f'["{comma}"]', [{}]), ([comma], ["{}"])):
        with pytest.raises(ValueError, match="must be lists of the same length|must hold an object"):
            print(check_answer(names, settings, "a cat"))
    paragraph = {"num_paragraphs": 2.0, "nth_paragraph": 2.0, "first_word": "on"}  # numbers of a table with gaps
    assert follows("length_constraints:nth_paragraph_first_word", "A cat\n\non a mat", paragraph)


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
        ("import os\nos._exit(0)", False),
        ("raise SystemExit(0)", False),
        (
            "import os\nfor n in range(32):\n    try: os.write(n, b'0' * 64)\n    except OSError: pass\nos._exit(0)",
            False,
        ),
        ("import sys\nassert sys.stdin.read() == '' and __name__ == '__main__'", True),
        ("assert '\u2028' != '' and '\0' != ''", False),  # a NUL is no source
        ("assert '\ud800' != ''", False),  # nor is half a surrogate
    ],
)
@pytest.mark.parametrize("namespaces", [True, False])
def test_programs_run_within_limits(program, passes, namespaces, monkeypatch):
    if not namespaces:
        monkeypatch.setattr(sandbox, "namespaces", list)
    assert passes_tests(program, **LIMITS) is passes


@pytest.mark.skipif(not sandbox.namespaces(), reason="this machine has no namespaces for its users")
def test_a_program_in_namespaces_leaves_no_process_and_sees_no_other_and_no_network(tmp_path):
    """Its child has a session of its own, and would write for ever."""
    program = f"""
import os, socket, time
assert [name for name in os.listdir("/proc") if name.isdigit()] == [str(os.getpid())]
try:
    socket.create_connection(("127.0.0.1", {free_port()}), timeout=1)
except OSError as error:
    assert error.errno == 101, error  # no network, not even this machine's
if os.fork() == 0:
    os.setsid()
    while True:
        open("{tmp_path}/beat", "w").write(str(time.monotonic_ns()))
while not os.path.exists("{tmp_path}/beat"):
    time.sleep(0.01)
"""
    passed = passes_tests(program, **LIMITS)
    if passed:  # only root may start the child
        before = (tmp_path / "beat").read_text()
        time.sleep(0.1)
        assert (tmp_path / "beat").read_text() == before
    assert passed == (os.getuid() == 0)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def scored(run_script, tmp_path, questions, completions, *words):
    answers = [
        {"question_id": str(i), "model_id": "m", "choices": [{"turns": [text]}]} for i, text in enumerate(completions)
    ]
    asked = [row | {"question_id": str(i)} for i, row in enumerate(questions)]
    paths = (
        f"task.questions={write_lines(tmp_path / 'q.jsonl', asked)}",
        f"task.input=[{write_lines(tmp_path / 'a.jsonl', answers)}]",
    )
    code = run_script(SCRIPT, "task=exact", *paths, f"hydra.run.dir={tmp_path}/out", *words)
    return code, json.loads(Path(tmp_path / "out/result.json").read_text())["models"]["m"] if code == 0 else None


def test_the_script_scores_gsm8k_and_counts_missing_answers_as_wrong(tmp_path, run_script):
    questions = [{"question": f"q{i}", "answer": f"well\n#### {i}"} for i in range(4)]
    code, result = scored(run_script, tmp_path, questions, ["it is 0", "it is 1.0", "it is 5"], "task.format=gsm8k")
    assert code == 0 and result["value"] == 0.5 and (result["n"], result["unanswered"]) == (4, 1)


def test_answers_to_other_questions_are_not_all_wrong(tmp_path, run_script, capsys):
    questions = [{"question": "q", "answer": "#### 7", "question_id": "gsm8k-0"}]
    asked = write_lines(tmp_path / "q.jsonl", questions)
    answers = write_lines(tmp_path / "a.jsonl", [{"question_id": "0", "model_id": "m", "choices": [{"turns": ["7"]}]}])
    words = ("task=exact", "task.format=gsm8k", f"task.questions={asked}", f"task.input=[{answers}]")
    assert run_script(SCRIPT, *words, f"hydra.run.dir={tmp_path}/out") == 2
    assert "none of the 1 questions has an answer: task.questions has 'gsm8k-0'" in capsys.readouterr().err


def test_the_script_scores_instructions_by_prompt_and_one_by_one(tmp_path, run_script):
    ids = ["punctuation:no_comma", "change_case:english_lowercase"]
    questions = [{"prompt": "p", "instruction_id_list": ids, "kwargs": [{}, {}]}] * 2
    code, result = scored(
        run_script, tmp_path, questions, ["this is good and in english", "Half"], "task.format=ifeval"
    )
    assert code == 0 and result["value"] == 0.5 and result["instruction_level"]["value"] == 0.75
    assert result["instructions"]["punctuation:no_comma"]["value"] == 1


CODE = [{"prompt": "def add(a, b):\n", "test": "def check(f):\n    assert f(1, 2) == 3", "entry_point": "add"}]


def test_code_runs_only_where_it_was_asked_for(tmp_path, run_script, capsys):
    answer = ["```python\ndef add(a, b):\n    return a + b\n```"]
    assert scored(run_script, tmp_path, CODE, answer, "task.format=code")[0] == 2
    assert "task.run_code=true" in capsys.readouterr().err
    assert scored(run_script, tmp_path, CODE, answer, "task.format=code", "task.run_code=true")[1]["value"] == 1


ADD = "def add(a, b):\n    return a + b\n"
TYPED = "def add(a: List[int], b):\n    return twice(a + b) // 2\n"
BLOCK = f"```python\n{ADD}```"
GIVEN = (
    "from typing import List\n\ndef twice(x):\n    return 2 * x\n\ndef add(a: int, b: int) -> int:\n    'The sum.'\n"
)


@pytest.mark.parametrize(
    "answer",
    [
        "    return a + b",
        BLOCK,
        BLOCK.replace("python", "Python"),
        BLOCK.replace("python", "py"),
        BLOCK.replace("python", " python3 "),
        BLOCK.replace("python", ""),
        BLOCK.replace("```", "~~~"),
        BLOCK.replace("\n", "\r\n"),
        BLOCK.removesuffix("```"),
        "1. So:\n   " + BLOCK.replace("\n", "\n   "),
        f"```bash\npip install numpy\n```\nThen\n{BLOCK}",
        f"{BLOCK}\nIt prints:\n```\n3 is the sum\n```",
        f"{BLOCK}\nFor example\n```python\n>>> add(1, 2)\n3\n```",
        f"```\n{ADD}```\nprints\n```\n3 is the sum\n```",
        f"```python\n{TYPED}```",  # it needs the prompt's import and helper
        f"```python\ndef add_all(*x):\n    return sum(x)\n```\n{BLOCK}",
    ],
)
@pytest.mark.parametrize("before", ["", "Complete this function:\n\n"])
def test_the_code_of_an_answer_is_found_in_every_common_form(answer, before):
    if before and answer.startswith(" "):
        pytest.skip("a function body after prose is no program")
    program = program_of(before + GIVEN, answer, "def check(f):\n    assert f(1, 2) == 3", "add")
    exec(program, {"__name__": "__main__"})
    with pytest.raises(AssertionError):
        exec(program.replace("== 3", "== 4"), {"__name__": "__main__"})


def test_samples_of_one_question_give_pass_at_k_and_the_majority(tmp_path, run_script):
    said = [["4", "5", "4", "5"], ["1", "2", "2", "3"], ["9", "9", "9", "8"]]  # gold 0 + 4, 1, 9
    asked = [{"question_id": str(i), "question": f"q{i}", "answer": f"#### {n}"} for i, n in enumerate((4, 1, 9))]
    rows = [
        {"question_id": str(i), "model_id": "m", "choices": [{"index": j, "turns": [t]} for j, t in enumerate(texts)]}
        for i, texts in enumerate(said)
    ]
    words = (
        f"task.questions={write_lines(tmp_path / 'q.jsonl', asked)}",
        f"task.input=[{write_lines(tmp_path / 'a.jsonl', rows)}]",
        f"hydra.run.dir={tmp_path}/out",
    )
    assert run_script(SCRIPT, "task=exact", *words) == 0
    result = json.loads((tmp_path / "out/result.json").read_text())["models"]["m"]
    assert result["value"] == pytest.approx((2 + 1 + 3) / 12) and result["samples"] == [4]
    assert result["pass_at_k"]["1"]["value"] == pytest.approx(0.5)
    assert result["pass_at_k"]["2"]["value"] == pytest.approx((1 - 1 / 6 + 1 - 3 / 6 + 1) / 3)
    assert result["pass_at_k"]["4"]["value"] == 1
    assert result["majority"]["value"] == pytest.approx(2 / 3)  # of 4, 5, 4, 5 what was said first
    assert pass_at_k(5, 0, 3) == 0 and majority([None, None]) is None and majority([2, 1, 1]) == 1


def test_lm_evals_matches_are_strings():
    gold = "so\n#### 1,234"
    assert harness_matches("it is $1,234.", gold) == (False, True)
    assert harness_matches("#### 1234", gold) == (True, True)
    assert harness_matches("#### 1,234.00 in 3 steps", gold) == (False, False) == harness_matches("none", gold)
