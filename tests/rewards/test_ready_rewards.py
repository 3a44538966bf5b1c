"""The ready rewards on published examples and real rows, by themselves and through train_ppo.py."""
# ruff: noqa: F811 - fixtures of another test file

import gzip
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from data.chat import encode_completion
from data.tokenizer import load_tokenizer
from rollouts.monitor import repeated_share, unique_share
from rollouts.reward_functions import call_rows, load_reward_function, make_reward
from tests.published_votes import SCRIPT
from tests.test_train_ppo import inputs, ppo  # noqa: F401 - fixtures

REFERENCE = Path(__file__).parents[3] / "shared" / "reference"
FIB = "def fib(n):\n    return n if n < 2 else fib(n - 1) + fib(n - 2)"


def paid(entry, completions, prompts=None, directory=None, **columns):
    """What a ready reward, or {name, its settings}, says of the completions."""
    entry = {"name": entry} if isinstance(entry, str) else entry
    settings = {name: value for name, value in entry.items() if name != "name"}
    function = make_reward(entry["name"], "reward", settings, directory and directory / entry["name"])
    return call_rows(function, prompts or ["?"] * len(completions), completions, columns)


def test_math_reads_the_number_as_gsm8k_asks():
    gold = "Janet sells 16 - 3 - 4 = <<16-3-4=9>>9 duck eggs a day.\nShe makes 9 * 2 = $<<9*2=18>>18.\n#### 18"
    said = ["#### 18", "so \\boxed{18}", "The answer is $18.00.", "9 * 2 = 18", "17", "", "<think>18"]
    assert paid("math", said, answer=[gold] * 7) == [1, 1, 1, 1, 0, 0, 0]
    assert paid("math", ["18"], answer=[None]) == [None]
    for expression in ("x + y", "3\\pi"):
        with pytest.raises(ValueError, match="not one number; use {name: math, symbolic: true}"):
            paid("math", ["3"], answer=[expression])


def test_math_compares_expressions_where_asked():
    pytest.importorskip("math_verify")
    entry = {"name": "math", "symbolic": True}
    # math-verify's README: {1,3} \cup {2,4} against {1,2,3,4}; the others are of MATH (Hendrycks et al. 2021)
    gold = ["${1,3} \\cup {2,4}$", "\\boxed{\\frac{1}{2}}", "$x^2+2x+1$", "#### 72", "\\frac{\\sqrt{2}}{2}"]
    said = ["${1,2,3,4}$", "It is $0.5$.", "$(x+1)^2$", "so 72", "$\\boxed{\\frac{1}{\\sqrt{2}}}$"]
    assert paid(entry, said, answer=gold) == [1] * 5
    assert paid(entry, [*said[1:], said[0]], answer=gold) == [0] * 5


def test_ifeval_pays_the_official_verdicts():
    columns = {
        "instruction_id_list": [["punctuation:no_comma", "length_constraints:number_words"]] * 3 + [None],
        "kwargs": [[{}, {"relation": "at least", "num_words": 3}]] * 3 + [None],
    }
    said = ["one two three", "one, two", "*one, two* three four", "no instruction"]
    assert paid("ifeval", said, **columns) == [1, 0, 0, None]
    assert paid({"name": "ifeval", "partial": True}, said, **columns) == [1, 0, 0.5, None]
    title = {"instruction_id_list": [["startend:quotation"]], "kwargs": [[{}]]}
    assert paid("ifeval", ['Sure:\n"quoted"'], **title) == [0]
    assert paid({"name": "ifeval", "strict": False}, ['Sure:\n"quoted"'], **title) == [1]


def test_followed_pays_only_for_answers():
    columns = {"instruction_id_list": [["punctuation:no_comma"]] * 5 + [None], "kwargs": [[{}]] * 5 + [None]}
    completions = [
        "Pears ripen slowly in cool cellars.",
        "Pears, in a cool and dark cellar.",
        "Pears ripen slowly in cellars.",  # five words
        "DO not use any commas! do not use: pears",  # four of seven runs are in the prompt
        "Pears ripen well. Pears ripen well. Pears ripen well.",  # four of seven runs stood before
        "No record of an instruction is here.",
    ]
    prompts = ["Where do pears ripen?\nDo not use any commas."] * 6
    assert paid("followed", completions, prompts, **columns) == [1, 0, 0, 0, 0, None]


def test_code_runs_the_tests_of_humaneval_and_mbpp():
    """HumanEval/55, its prompt as published."""
    entry = {"name": "code", "run_code": True}
    prompt = (
        'def fib(n: int):\n    """Return n-th Fibonacci number.\n    >>> fib(10)\n    55\n    """\n'  # HumanEval/55
    )
    columns = {"test": ["def check(candidate):\n    assert candidate(10) == 55\n"] * 3, "entry_point": ["fib"] * 3}
    body = "    a, b = 0, 1\n    for _ in range(n):\n        a, b = b, a + b\n    return a\n"
    said = [f"```python\n{FIB}\n```", "    return 0\n", body]
    assert paid(entry, said, [prompt] * 3, **columns) == [1, 0, 1]
    assert paid(entry, [FIB, "fib = abs"], test_list=[["assert fib(2) == 1", "assert fib(7) == 13"]] * 2) == [1, 0]
    with pytest.raises(ValueError, match="set run_code: true"):
        paid("code", ["x"])
    with pytest.raises(ValueError, match="no prompt has the columns"):
        paid(entry, ["x"])


def test_exact_format_length_repetition_and_language():
    assert paid("exact", [" Paris\n", "paris", "<think>so</think>Paris"], answer=["Paris"] * 3) == [1, 0, 1]
    assert paid({"name": "exact", "ignore_case": True}, ["PARIS"], answer=["Paris"]) == [1]
    right = "<think>2 + 2\nis 4</think>\n<answer>4</answer>"  # the form of DeepSeek-R1's template
    assert paid("format", [right, right + " so", "<answer>4</answer>"]) == [1, 0, 0]
    assert paid({"name": "format", "pattern": r"\d+"}, [" 42 ", "42."]) == [1, 0]
    tokens = [[7] * n for n in (0, 5, 10, 20, 30)]
    entry = {"name": "length", "least": 5, "most": 10}
    assert paid(entry, ["x"] * 5, tokens=tokens) == [-1, 0, 0, -1, -2]
    # 7 pairs of words, of which 4 differ
    assert paid({"name": "repetition", "n": 2}, ["this is a test this is a test"]) == [pytest.approx(-3 / 7)]
    assert repeated_share("one two") == 0 and unique_share("The the cat") == pytest.approx(2 / 3)
    pytest.importorskip("langdetect")
    said = ["Dies ist ein deutscher Satz über das Wetter.", "This sentence is about the weather.", "42"]
    assert paid({"name": "language", "code": "de"}, said) == [1, 0, 0]
    for code in ("zh", "EN", "english"):  # langdetect says zh-cn, zh-tw, en
        with pytest.raises(ValueError, match=f"'{code}' is none of langdetect's codes; use one of .*zh-cn, zh-tw"):
            paid({"name": "language", "code": code}, ["今天天气很好。"])


@pytest.mark.parametrize(
    "entry, column, problem",
    [
        ("exact", [["a", "b"]], "must be one text or number, got list"),
        ("exact", [True], "must be one text or number, got bool"),
        ("math", [["3", "7"]], "must be one text or number, got list"),
        ("math", [float("nan")], "must be one text or number, got float"),
        ({"name": "length", "least": 300}, None, "needs 0 <= least <= most"),
        ({"name": "length", "most": 0}, None, "most >= 1, got least=0 and most=0"),
        ({"name": "repetition", "n": 0}, None, "n >= 1 words, got n=0"),
    ],
)
def test_values_that_give_every_completion_the_same_reward_are_refused(entry, column, problem):
    with pytest.raises(ValueError, match=problem):
        print(paid(entry, ["7"], tokens=[[1]], **({"answer": column} if column else {})))


def scripted(path, *rules):
    path.write_text("".join(json.dumps({"contains": text, "answers": [answer]}) + "\n" for text, answer in rules))
    return {"kind": "scripted", "script": str(path)}


def test_a_judge_grades_or_compares_in_both_orders_and_its_verdicts_can_be_audited(run_script, tmp_path):
    client = scripted(tmp_path / "grades.jsonl", ("good", "Rating: [[8]]"), ("cut", "Rating:"), ("", "Rating: [[3]]"))
    entry = {"name": "judge", "client": client, "template": "short"}
    assert paid(entry, ["good", "cut", "bad"], directory=tmp_path) == [8, None, 3]

    rules = [("Answer A:\ngood", "[[A]]"), ("Answer B:\ngood", "[[B]]"), ("", "[[A]]")]
    first = scripted(tmp_path / "pairs.jsonl", *rules)
    entry = {"name": "judge", "client": first, "template": "short", "mode": "pairwise"}
    prompts, said = [f"question {i}" for i in range(8)], ["good"] * 5 + ["bad", "even", "alone"]
    against = ["poor"] * 5 + ["good", "poor", None]
    rewards = paid(entry, said, prompts, tmp_path, baseline=against)
    assert rewards == [1] * 5 + [0, 0.5, None]  # `even`: whoever is shown first wins, so it is a tie
    words = [f"task.input=[{tmp_path}/judge/verdicts.jsonl]", "task.format=verdicts", "task.rounds=20"]
    assert run_script(SCRIPT, "task=audit", *words, "task.questions=null", f"hydra.run.dir={tmp_path}/audit") == 0
    result = json.loads((tmp_path / "audit" / "result.json").read_text())
    assert result["position"]["flips"]["items"] == 7


def test_a_rubric_pays_the_points_that_are_reached(tmp_path):
    met = '{"explanation": "it {does}", "criteria_met": true, "parts": {}}'
    rules = [("Mentions water", met), ("Invents", '{"criteria_met": true}')]
    rules += [("Is polite", 'So: {"criteria_met": false}'), ("", "I cannot tell")]
    entry = {"name": "rubric", "client": scripted(tmp_path / "rubric.jsonl", *rules)}
    rubric = [{"criterion": "Mentions water", "points": 5}, {"criterion": "Is polite", "points": 3}]
    worse = [*rubric, {"criterion": "Invents a fact", "points": -7}]
    unread = [*rubric, {"criterion": "Unreadable", "points": 1}]
    rewards = paid(entry, ["x"] * 4, directory=tmp_path, rubrics=[rubric, worse, unread, None])
    assert rewards == [pytest.approx(5 / 8), pytest.approx(-2 / 8), None, None]
    with pytest.raises(ValueError, match="is not a criterion"):
        paid(entry, ["x"], directory=tmp_path, rubrics=[[{"criterion": "a", "weight": 1}]])


@pytest.fixture
def server():
    """vLLM's two shapes and the plain one; a reward is the completion's length, and /down fails once."""
    seen = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            seen.append(body)
            code, reply = 200, {}
            if self.path == "/plain":
                reply = {"rewards": [len(text) for text in body["completions"]]}
            else:
                score = float(len(body["messages"][-1]["content"])) if "messages" in body else 0.0
                reply = {
                    "/classify": {"data": [{"probs": [score], "num_classes": 1}]},
                    "/pooling": {"data": [{"data": [[0.0], [score]]}]},
                    "/two": {"data": [{"probs": [0.1, 0.9]}]},
                }.get(self.path, {})
            if self.path == "/down" and len(seen) == 1:
                code = 503
            self.send_response(code)
            self.end_headers()
            self.wfile.write(json.dumps(reply or {"data": [{"probs": [1.0]}]}).encode())

        def log_message(self, *words):
            pass

    server = ThreadingHTTPServer(("localhost", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://localhost:{server.server_port}", seen
    server.shutdown()


@pytest.mark.parametrize("api", ["classify", "pooling", "plain"])
def test_a_reward_model_behind_http(server, api):
    url, seen = server
    messages = [[{"role": "user", "content": "hi"}], [{"role": "user", "content": "ho"}]]
    entry = {"name": "reward_server", "url": f"{url}/{api}", "api": api, "model": "rm", "max_parallel": 1}
    assert paid(entry, ["four", "sixsix"], messages=messages) == [4, 6]
    if api != "plain":
        talk = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "four"}]
        assert seen[0] == {"messages": talk, "model": "rm", "use_activation": False}


def test_ids_of_our_own_tokenizer_are_what_training_reads(server, inputs):
    url, seen = server
    talk, said = [{"role": "user", "content": "hi there"}], "it is so"
    entry = {"name": "reward_server", "url": f"{url}/down", "tokenizer": str(inputs / "policy")}
    assert paid(entry, [said], messages=[talk]) == [1]
    row = encode_completion(talk, said, load_tokenizer(inputs / "policy"), max_length=99, max_prompt_length=99)
    assert seen[-1] == {"input": row["input_ids"], "use_activation": False}
    with pytest.raises(ValueError, match="api=plain sends texts"):
        paid(entry | {"api": "plain"}, [said], messages=[talk])


def test_a_server_that_is_busy_is_asked_again_and_another_shape_is_named(server):
    url, seen = server
    one = {"messages": [[{"role": "user", "content": "hi"}]]}
    assert paid({"name": "reward_server", "url": f"{url}/down"}, ["x"], **one) == [1] and len(seen) == 2
    with pytest.raises(ValueError, match="returned 2 numbers for a completion, so it is not a reward model"):
        paid({"name": "reward_server", "url": f"{url}/two"}, ["x"], **one)
    with pytest.raises(ValueError, match="which is not a reply of api=plain"):
        paid({"name": "reward_server", "url": f"{url}/classify", "api": "plain"}, ["x"], **one)


def test_math_trains_on_gsm8ks_own_rows(ppo, inputs, tmp_path, read_metrics):
    file = REFERENCE / "gsm8k" / "train.jsonl.gz"
    if not file.exists():
        pytest.skip(f"{file} is not there")
    with gzip.open(file, "rt", encoding="utf-8") as rows:
        lines = sorted((next(rows) for _ in range(400)), key=len)[:16]
    (tmp_path / "gsm8k.jsonl").write_text("".join(lines))
    words = ["reward=math", "reward_model=null", f"data.prompts=[{tmp_path}/gsm8k.jsonl]", "num_steps=1"]
    assert ppo(*words, "data.on_bad_row=skip") == 0
    (row,) = read_metrics(tmp_path / "run")
    assert row["objective/unjudged"] == 0 and 0 <= row["objective/score"] <= 1
    assert 0 <= row["objective/repetition"] <= 1 and 0 < row["objective/unique_words"] <= 1


@pytest.mark.parametrize("place", ["data.prompts", "data.eval"])
def test_an_answer_that_is_no_number_is_found_before_the_first_step(ppo, tmp_path, capsys, place):
    """The row is not in the first rollout, and its answer would end the run in the middle."""
    rows = [{"prompt": f"What is {i}?", "answer": str(i)} for i in range(1, 40)]
    for name, more in (("right", []), ("wrong", [{"prompt": "Which set?", "answer": "the even ones"}])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows + more))
    files = {"data.prompts": "right", "data.eval": "right"} | {place: "wrong"}
    words = [f"{key}=[{tmp_path}/{file}.jsonl]" for key, file in files.items()]
    assert ppo("reward=math", "reward_model=null", "num_prompts=2", "data.shuffle=false", *words) == 2
    error = capsys.readouterr().err
    assert "the even ones" in error and "Which set?" in error and "symbolic: true" in error
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize("name", ["code", "exact", "followed", "format", "ifeval", "judge", "language", "length",
                                  "math", "repetition", "reward_server", "rubric"])  # fmt: skip
def test_every_ready_reward_is_found_by_its_name(name):
    assert callable(load_reward_function(name))
