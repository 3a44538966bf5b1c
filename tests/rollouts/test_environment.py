"""Several turns: what an environment says is no action, what it pays reaches the turns before it."""
# ruff: noqa: F811 - fixtures of another test file

import json

import pytest

from data.builtin_templates import TEMPLATES
from data.chat import encode_chat
from data.tokenizer import load_tokenizer
from rollouts.calculator import Calculator, calculate
from rollouts.environment import Dialogue, begin
from rollouts.environment_worker import Environments
from rollouts.trajectory import Turn
from tests.data.test_chat import tokenizers  # noqa: F401 - fixtures
from tests.data.test_tokenizer import byte_level_file
from tests.test_ppo_values import column, samples_of, stopping  # noqa: F401 - fixtures
from tests.test_train_ppo import inputs, ppo  # noqa: F401 - fixtures

ENVIRONMENTS = """
class Twice:
    def reset(self, record):
        self.turns = 0
        return [{"role": "user", "content": "order " + record["id"]}]

    def step(self, messages):
        assert messages[-1]["role"] == "assistant" and messages[0]["content"].startswith("order ")
        self.turns += 1
        return [{"role": "user", "content": "and then?"}], float(self.turns), self.turns == 2

class Silent(Twice):
    def step(self, messages):
        return [], 0.0, False

class Assistant(Twice):
    def step(self, messages):
        return [{"role": "assistant", "content": "I said so"}], 0.0, False

class Unpaid(Twice):
    def step(self, messages):
        return [{"role": "user", "content": "?"}], None, False

class Long(Twice):
    def reset(self, record):
        return [{"role": "user", "content": "espresso " * 200}]

def function(prompts, completions):
    return [0.0] * len(prompts)
"""


@pytest.fixture
def env(tmp_path):
    (tmp_path / "env.py").write_text(ENVIRONMENTS)
    return lambda name: f"env={tmp_path}/env.py:{name}"


ALONE = ["reward_model=null", "kl_coef=0", "missing_eos=none", "num_steps=1", "whiten_advantages=false"]


def test_values_and_gae_run_over_the_whole_dialogue(ppo, stopping, env, tmp_path, read_metrics):
    words = [stopping, *ALONE, env("Twice"), "gae_lambda=1", "num_samples=8", "sampling.max_new_tokens=12"]
    assert ppo(*words) == 0
    rows = samples_of(tmp_path / "run")
    two = [row for row in rows if row["score"] == 3]  # 1 for the first turn, 2 for the second
    assert two and any(row["score"] == 1 for row in rows)  # a turn that is cut ends the dialogue
    for row in two:
        assert "and then?" in row["completion"] and "and then?" not in row["prompt"] and "order " in row["prompt"]
        rewards, returns = column(row, "reward"), column(row, "advantage") + column(row, "value")
        first = int(rewards.nonzero()[0])  # the last token of the first turn
        assert rewards[first] == 1 and rewards[-1] == 2 and "".join(row["tokens"]).count("and then?") == 0
        expected = [3.0] * (first + 1) + [2.0] * (len(rewards) - first - 1)
        assert returns.tolist() == pytest.approx(expected, abs=1e-4)
    (metrics,) = read_metrics(tmp_path / "run")
    assert metrics["policy/ratio_first"] == pytest.approx(1, abs=1e-5)
    assert abs(metrics["policy/sampler_kl"]) < 1e-5  # what was sampled is what is trained on, turn by turn


def test_a_reward_function_and_the_environment_are_added_and_logged_apart(
    ppo, inputs, stopping, env, tmp_path, read_metrics
):
    words = [
        stopping,
        *ALONE,
        env("Twice"),
        f"reward=[{{name:'{inputs}/rewards.py:length',weight:0.1}},{{name:environment,weight:10}}]",
    ]
    assert ppo(*words, f"data.eval=[{inputs}/rows.jsonl]", "num_prompts=3", "eval_every=1") == 0
    before, row = read_metrics(tmp_path / "run")
    expected = 0.1 * row["objective/reward/length"] + 10 * row["objective/reward/environment"]
    assert row["objective/score"] == pytest.approx(expected, rel=1e-5)
    assert -1 <= row["objective/correlation/length/environment"] <= 1
    assert before["step"] == 0 and before["eval/score"] > 1  # evaluated with the environment that trains


@pytest.mark.parametrize(
    "name, message",
    [
        ("Silent", "env=Silent: step() returned no message and done=False"),
        ("Assistant", "is not a message"),
        ("Unpaid", "step() returned the reward None"),
        ("Long", "env=Long: reset() of"),
        ("function", "must name a class with reset(record) and step(messages)"),
        ("Missing", "has no function 'Missing'"),
    ],
)
def test_an_environment_that_cannot_be_used_is_named(ppo, stopping, env, capsys, name, message):
    assert ppo(stopping, *ALONE, env(name)) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("template", ["plain", "chatml", "llama3", "zephyr", "llama2", "mistral"])
def test_the_tokens_of_a_dialogue_are_those_of_its_template(tokenizers, template):
    """Turn by turn or at once: the same ids, where what the policy said is tokenised as its text is."""
    tokenizer = tokenizers[template]

    class Echo:
        def reset(self, record):
            return [{"role": "user", "content": "a latte"}]

        def step(self, messages):
            return [{"role": "user", "content": "more"}], 0.0, len(messages) > 3

    dialogue = Dialogue(Environments(Echo), tokenizer, name="Echo", window=512, max_new_tokens=8, max_turns=4)
    (episode,) = dialogue.begin([{"messages": [], "columns": {}, "where": "f:1"}])
    answers, said = ["one coffee", "two teas"], []
    while not episode.over:
        said.append({"role": "assistant", "content": answers[len(said)]})
        row = encode_chat([{"role": "user", "content": "a"}, said[-1]], tokenizer, max_length=512)
        ids = [i for i, mask in zip(row["input_ids"], row["completion_mask"], strict=True) if mask]
        episode.add(Turn(list(map(int, ids)), [0.0] * len(ids), True))
        dialogue.speak([episode])
    told = [message["content"].strip() for message in episode.messages if message["role"] == "assistant"]
    assert told == answers  # what the environment reads is the turn's own text
    whole = encode_chat(episode.messages, tokenizer, max_length=512)
    assert episode.ids == list(map(int, whole["input_ids"]))[: len(episode.ids)]
    assert [turn >= 0 for turn in episode.turns] == list(map(bool, whole["completion_mask"]))[: len(episode.ids)]


def test_what_follows_a_turn_is_the_same_where_the_template_rewrites_it(tmp_path):
    """As Qwen3's: the last answer has a thinking block, which goes once more was said, so that the rest moves."""
    jinja = TEMPLATES["chatml"].replace(
        "message['content'] +",
        "('<think></think>' if loop.last and message['role'] == 'assistant' else '') + message['content'] +",
    )
    byte_level_file(tmp_path, ["<|im_start|>", "<|im_end|>"], eos_token="<|im_end|>", chat_template=jinja)
    tokenizer = load_tokenizer(tmp_path)

    class Two:
        def reset(self, record):
            return [{"role": "user", "content": "a latte"}]

        def step(self, messages):
            return [{"role": "user", "content": "more <|im_end|>"}], 0.0, len(messages) > 3

    dialogue = Dialogue(Environments(Two), tokenizer, name="Two", window=512, max_new_tokens=8, max_turns=4)
    (episode,) = dialogue.begin([{"messages": [], "columns": {}, "where": "f:1"}])
    for answer in ("one coffee", "two"):
        before = len(episode.ids)
        ids = [*tokenizer.encode(answer), tokenizer.stop_id]
        episode.add(Turn(ids, [0.0] * len(ids), True))
        dialogue.speak([episode])
        said = tokenizer.decode(episode.ids[before + len(ids) :], specials=True)
        more = "\n<|im_start|>user\nmore <|im_end|><|im_end|>\n<|im_start|>assistant\n"
        assert said == ("" if episode.over else more)
    assert episode.ids.count(tokenizer.stop_id) == 4  # of two users and two answers


def test_the_calculator_calculates_and_executes_nothing():
    assert [calculate(text) for text in ("3 * (4 + 5)", "-7 / 2", "2 - -2", "1e3")] == ["27", "-3.5", "4", "1000"]
    for bad in ("__import__('os')", "1 / 0", "9 ** 9 ** 9", "a + 1", "(" * 200, "1" * 80 + "*" * 3):
        assert calculate(bad) == "error"


def test_the_calculators_episode_is_paid_by_its_answer():
    calculator = Calculator()
    messages = calculator.reset({"answer": "27", "messages": [{"role": "user", "content": "3 * 9?"}]})
    said, paid, done = calculator.step([*messages, {"role": "assistant", "content": "Let me see: <calc>3*9</calc>"}])
    assert said == [{"role": "tool", "content": "27"}] and paid < 0 and not done
    for answer, expected in (("It is 27.", 1.0), ("It is 26.", 0.0), ("I do not know", 0.0)):
        assert calculator.step([*messages, {"role": "assistant", "content": answer}]) == ([], expected, True)


def test_a_dialogue_stops_at_the_window_and_counts_as_cut(inputs):
    tokenizer = load_tokenizer(inputs / "policy")

    class Chatty:
        def reset(self, record):
            return [{"role": "user", "content": "hi"}]

        def step(self, messages):
            return [{"role": "user", "content": "more " * 10}], 0.0, False

    dialogue = Dialogue(Environments(Chatty), tokenizer, name="Chatty", window=40, max_new_tokens=8, max_turns=9)
    (episode,) = dialogue.begin([{"messages": [], "columns": {}, "where": "f:1"}])
    while not episode.over:
        episode.add(Turn([tokenizer.stop_ids[0]], [0.0], True))
        dialogue.speak([episode])
        assert len(episode.ids) <= 40 - 8 or episode.over
    assert not episode.finished and len(episode.ids) <= 40
    assert begin({"messages": []}, [1, 2]).turns == [-1, -1]


def test_a_second_model_as_the_user_talks_and_rates(ppo, inputs, stopping, tmp_path, read_metrics):
    """The scripted user goes on twice at most, ends some talks with <done>, and rates what it saw."""
    rules = [("The talk is over", "Rating: [[4]]"), ("Your goal: a latte", "<done>"), ("", "And the milk?")]
    script = "".join(json.dumps({"contains": text, "answers": [answer]}) + "\n" for text, answer in rules)
    (tmp_path / "user.jsonl").write_text(script)
    rows = [json.loads(line) for line in (inputs / "rows.jsonl").read_text().splitlines()]
    rows = [row | {"goal": "a latte" if i % 2 else "oat milk"} for i, row in enumerate(rows)]
    (tmp_path / "goals.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    client = f"client:{{kind:scripted,script:'{tmp_path}/user.jsonl'}}"
    words = [stopping, *ALONE, f"env={{name:rollouts/simulated_user.py:SimulatedUser,{client}}}", "num_samples=8"]
    words += [
        f"data.prompts=[{tmp_path}/goals.jsonl]",
        "sampling.max_new_tokens=12",
        "max_turns=2",
        "data.shuffle=false",
    ]
    assert ppo(*words) == 0
    rows, talks = samples_of(tmp_path / "run"), 0
    for i, row in enumerate(rows):
        if row["finish_reason"] == "length":
            assert row["score"] in (0, 0.75)  # a turn that is cut ends the talk, rated if the user ends it too
            continue
        assert row["score"] == 0.75
        talks += ("And the milk?" in row["completion"]) == (i % 2 == 0)
    assert talks == sum(row["finish_reason"] == "stop" for row in rows) > 0
    assert (tmp_path / "run" / "env" / "answers").exists()


def test_what_an_environment_needs_is_named(ppo, capsys):
    assert ppo("env=rollouts/simulated_user.py:SimulatedUser", "reward_model=null") == 2
    assert "missing a required argument: 'client'; write {name: FILE.py:SimulatedUser" in capsys.readouterr().err
