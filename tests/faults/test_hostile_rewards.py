"""A reward function that exits, fails, hangs or lies ends the run and is named; the run never ends with exit code 0."""

import pytest

from data import rewards
from data.rewards import call_reward, load_reward_function
from runtime.display import printable

BAD = {  # the body of rate(prompts, completions) -> what is said
    "import sys; sys.exit(0)": "raised SystemExit",
    "import sys; sys.exit('done')": "raised SystemExit: done",
    "raise SystemExit": "raised SystemExit",
    "quit()": "raised (SystemExit|NameError)",
    "raise KeyError('x')": "raised KeyError",
    "raise RecursionError": "raised RecursionError",
    "return rate(prompts, completions)": "raised RecursionError",
    "raise MemoryError": "raised MemoryError",
    "while True: pass": "raised TimeoutError: it took more than",
    "import time; time.sleep(100)": "raised TimeoutError",
    "return None": "raised TypeError",
    "return 1.0": "raised TypeError",
    "return []": "returned 0 rewards for 3",
    "return [1.0] * 4": "returned 4 rewards for 3",
    "return [float('nan')] * 3": "returned nan for row 0",
    "return [1.0, float('inf'), 1.0]": "returned inf for row 1",
    "return ['1', '2', '3']": "returned '1' for row 0",
    "return [None] * 3": "returned None for row 0",
    "return [1.0, [2.0], 3.0]": "for row 1",
    "return [1.0 if c != 'two' else 1 / 0 for c in completions]": "ZeroDivisionError.* on row 1 .*'two'",
}


@pytest.mark.parametrize("body", BAD)
def test_a_hostile_function_is_named(body, tmp_path, monkeypatch):
    monkeypatch.setattr(rewards, "SECONDS", 2.0)
    (tmp_path / "bad.py").write_text(f"def rate(prompts, completions):\n    {body}\n")
    function = load_reward_function(f"{tmp_path}/bad.py:rate")
    with pytest.raises(ValueError, match=f"reward function rate .*{BAD[body]}"):
        call_reward(function, ["p"] * 3, ["one", "two", "three"], {})


def test_a_file_that_exits_when_it_is_imported_is_named(tmp_path):
    (tmp_path / "bad.py").write_text("import sys\nsys.exit(0)\n")
    with pytest.raises(ValueError, match="cannot be imported: SystemExit"):
        load_reward_function(f"{tmp_path}/bad.py:rate")


def test_a_sample_moves_no_cursor_and_writes_no_clipboard():
    said = "\x1b]52;c;cm0gLXJm\x07 \x1b[2J\x9b1m \u202etxt\r\tfine\n"
    assert printable(said) == "\\x1b]52;c;cm0gLXJm\\x07 \\x1b[2J\\x9b1m \\u202etxt\\r\tfine\n"
