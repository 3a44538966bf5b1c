"""An environment that hangs, exits, crashes, fails or lies ends the run and is named; nothing of it reaches the run."""

import random
import signal

import pytest

import train_ppo
from rollouts.environment import Dialogue, EnvironmentProcess
from rollouts.environment_worker import Environments
from rollouts.reward_functions import RewardFailed
from rollouts.trajectory import Turn
from tests.faults.test_same_inputs import models, place, words_of  # noqa: F401 - fixtures
from tests.text_samples import tiny_tokenizer

CODE = """
import ctypes, os, random, signal, time

class Bad:
    def reset(self, record):
        self.record = record
        return record["messages"]

    def step(self, messages):
        {}
"""
ASKED = {"messages": [{"role": "user", "content": "hi"}], "n": 1}
BAD = {  # the body of step -> what is said
    "import sys; sys.exit(0)": r"step\(\) raised SystemExit: 0 \(episode 1 of the rollout\)",
    "os._exit(0)": "ended its process with exit code 0",
    "ctypes.string_at(0)": "ended its process by SIGSEGV",
    "while True: pass": "took more than reward_timeout=1.5 seconds and was killed",
    "ctypes.PyDLL(None).pause()": "took more than reward_timeout",  # in C, holding the interpreter's lock
    "signal.pthread_sigmask(0, range(1, 65)); time.sleep(100)": "took more than reward_timeout",
    "raise KeyError('x')": "raised KeyError: 'x'",
    "return self.step(messages)": "raised RecursionError",
    "return [], object(), True": "it returned <object",
    "return [], 1.0, {1, 2}": "neither a number nor text",
}


def process(tmp_path, body: str, seconds: float = 1.5) -> EnvironmentProcess:
    (tmp_path / "bad.py").write_text(CODE.format(body))
    return EnvironmentProcess(f"{tmp_path}/bad.py:Bad", {}, {"directory": str(tmp_path)}, seconds=seconds)


@pytest.mark.parametrize("body", BAD)
def test_a_hostile_environment_is_named(body, tmp_path):
    environments = process(tmp_path, body)
    assert environments.reset([ASKED] * 3) == [ASKED["messages"]] * 3
    with pytest.raises(RewardFailed, match=f"^env=Bad.* {BAD[body]}"):
        environments.step([(1, ASKED["messages"])])


def test_each_episode_has_an_object_and_draws_are_decided_by_the_runs_own_state(tmp_path):
    body = (
        "signal.signal(signal.SIGTERM, signal.SIG_IGN); self.turns = getattr(self, 'turns', 0) + 1\n"
        "        return [], self.turns + random.random(), self.record['n'] == 2"
    )
    before, environments, said = signal.getsignal(signal.SIGTERM), process(tmp_path, body, seconds=60), []
    for seed in (1, 1, 2):
        random.seed(seed)
        environments.reset([ASKED, ASKED | {"n": 2}])
        environments.step([(1, [])])
        said.append(environments.step([(0, []), (1, [])]))
    assert [[int(paid) for _, paid, _ in answers] for answers in said] == [[1, 2]] * 3
    assert [done for _, _, done in said[0]] == [False, True]
    assert said[0] == said[1] != said[2] and signal.getsignal(signal.SIGTERM) == before


def test_what_it_says_that_cannot_be_written_is_named_with_the_prompt():
    class Says:
        def reset(self, record):
            return [{"role": "user", "content": record["first"]}]

        def step(self, messages):
            return [{"role": "user", "content": "\ufdd1"}], 0.0, False

    dialogue = Dialogue(Environments(Says), tiny_tokenizer(), name="Says", window=64, max_new_tokens=8, max_turns=4)
    prompt = {"messages": [], "where": "f.jsonl:7"}
    with pytest.raises(ValueError, match="env=Says, f.jsonl:7: a text holds U"):
        dialogue.begin([prompt | {"columns": {"first": "\ufdd0"}}])
    (episode,) = dialogue.begin([prompt | {"columns": {"first": "a latte"}}])
    episode.add(Turn([tiny_tokenizer().stop_id], [0.0], True))
    with pytest.raises(ValueError, match="env=Says, f.jsonl:7: a text holds U"):
        dialogue.speak([episode])


@pytest.mark.parametrize(
    "body, told",
    [
        ("return ctypes.PyDLL(None).pause()", "env=Bad took more than reward_timeout=3 seconds and was killed"),
        ("raise OSError('gone')", "env=Bad: step() raised OSError: gone (episode 0 of the rollout)"),
    ],
    ids=["hangs", "raises"],
)
def test_an_environment_that_fails_later_ends_the_run_by_a_sentence(body, told, run_script, place, capfd):  # noqa: F811
    counts = "Bad.calls = getattr(Bad, 'calls', 0) + 1\n        "
    (place / "bad.py").write_text(CODE.format(f"{counts}if Bad.calls <= 2: return [], 1.0, True\n        {body}"))
    words = [*words_of("train_ppo", place), "reward=null", f"env={place}/bad.py:Bad", "num_steps=3", "reward_timeout=3"]
    assert run_script(train_ppo, *words, "batch_size=2") == 1
    said = capfd.readouterr().err
    assert f"after step 1: {told}" in said
    assert "the last good checkpoint is step_000001; the same command with resume=true continues" in said
