"""Reward functions: what may be loaded, how they are called, what they must return."""

import pytest

from rollouts.reward_functions import call_reward, load_reward_function

CODE = """
import numpy
import torch

def length(prompts, completions):
    return [len(c) for c in completions]

def matches(prompts, completions, answer):
    return [float(a in c) for a, c in zip(answer, completions)]

def everything(prompts, completions, **columns):
    return [len(columns)] * len(prompts)

def in_numpy(prompts, completions):
    return numpy.array([len(c) for c in completions], dtype=numpy.float32)

def in_torch(prompts, completions):
    return torch.tensor([len(c) for c in completions])

def short(prompts, completions):
    return [1.0]

def broken(prompts, completions):
    return [1 / 0]

def not_a_number(prompts, completions):
    return [1.0, float("nan")]
"""


@pytest.fixture
def function(tmp_path):
    (tmp_path / "mine.py").write_text(CODE)
    return lambda name: load_reward_function(f"{tmp_path}/mine.py:{name}")


def test_columns_reach_the_parameters_that_ask_for_them(function):
    rows = (["a", "b"], ["x1", "yy2"], {"answer": ["1", "3"], "id": [7, 8]})
    assert call_reward(function("length"), *rows) == [2, 3]
    assert call_reward(function("matches"), *rows) == [1, 0]
    assert call_reward(function("everything"), *rows) == [2, 2]


@pytest.mark.parametrize("name", ["length", "in_numpy", "in_torch"])
def test_rewards_may_be_numpys_or_torchs(function, name):
    rewards = call_reward(function(name), ["a", "b"], ["x1", "yy2"], {})
    assert rewards == [2.0, 3.0] and all(type(reward) is float for reward in rewards)


@pytest.mark.parametrize("name, expected", [("length", [2, 3]), ("everything", [1, 1])])
def test_the_policys_completions_go_before_a_column_of_that_name(function, name, expected):
    columns = {"completions": [["old"], ["older"]], "ranks": [[0], [0]]}
    assert call_reward(function(name), ["a", "b"], ["x1", "yy2"], columns) == expected


@pytest.mark.parametrize(
    "name, message",
    [
        ("short", "returned 1 rewards for 2 completions"),
        ("broken", "raised ZeroDivisionError"),
        ("not_a_number", "returned nan for row 1"),
    ],
)
def test_a_function_that_misbehaves_is_named(function, name, message):
    with pytest.raises(ValueError, match=message):
        call_reward(function(name), ["a", "b"], ["x", "y"], {})


def test_only_the_projects_modules_and_files_named_by_path_are_loaded(tmp_path):
    assert load_reward_function("rollouts.reward_functions:load_reward_function") is load_reward_function
    with pytest.raises(ValueError, match="not a module of this project"):
        load_reward_function("os.path:join")
    with pytest.raises(ValueError, match="there is no file"):
        load_reward_function(f"{tmp_path}/absent.py:f")
    with pytest.raises(ValueError, match="must be NAME"):
        load_reward_function("rollouts.reward_functions")
    with pytest.raises(ValueError, match="has no function"):
        load_reward_function("rollouts.reward_functions:absent")
