"""A reward function that exits, crashes, fails, hangs or lies ends the run and is named; the run never ends with exit
code 0, and nothing that the function does to its process reaches the training."""

import os
import random
import signal
import time
from pathlib import Path

import pytest

import train_ppo
from rollouts.reward_functions import call_reward
from rollouts.reward_process import RewardProcess
from runtime.display import printable
from tests.faults.test_same_inputs import models, place, words_of  # noqa: F401 - fixtures

SECONDS = 1.5
BAD = {  # the body of rate(prompts, completions) -> what is said
    "import sys; sys.exit(0)": "raised SystemExit",
    "import sys; sys.exit('done')": "raised SystemExit: done",
    "quit()": "raised SystemExit",
    "os._exit(0)": "ended its process with exit code 0",
    "os.kill(os.getpid(), 9)": "ended its process by SIGKILL",
    "ctypes.string_at(0)": "ended its process by SIGSEGV",
    "os.closerange(3, 1 << 20)": "ended its process",
    "raise KeyError('x')": "raised KeyError",
    "return rate(prompts, completions)": "raised RecursionError",
    "raise MemoryError": "raised MemoryError",
    "while True: pass": "took more than reward_timeout=1.5 seconds and was killed",
    "ctypes.PyDLL(None).pause()": "took more than reward_timeout",  # in C, holding the interpreter's lock
    "signal.pthread_sigmask(0, range(1, 65)); time.sleep(100)": "took more than reward_timeout",
    "time.sleep(100 if len(completions) == 1 else 0); 1 / 0": "raised ZeroDivisionError",  # hangs on a row
    "return None": "raised TypeError",
    "return 1.0": "raised TypeError",
    "return [object()] * 3": "raised TypeError: it returned <object",
    "return []": "returned 0 rewards for 3",
    "return [1.0] * 4": "returned 4 rewards for 3",
    "return [float('nan')] * 3": "returned nan for row 0",
    "return [1.0, 10**400, 1.0]": "returned 1000.* for row 1",
    "return ['1', '2', '3']": "returned '1' for row 0",
    "return [None] * 3": "returned None for row 0",
    "return [1.0, [2.0], 3.0]": "for row 1",
    "return [1.0 if c != 'two' else 1 / 0 for c in completions]": "ZeroDivisionError.* on row 1 .*'two'",
}


def process(tmp_path: Path, body: str, seconds: float = SECONDS) -> RewardProcess:
    code = f"import ctypes, os, random, signal, time\n\ndef rate(prompts, completions):\n    {body}\n"
    (tmp_path / "bad.py").write_text(code)
    return RewardProcess(f"{tmp_path}/bad.py:rate", seconds=seconds)


@pytest.mark.parametrize("body", BAD)
def test_a_hostile_function_is_named(body, tmp_path):
    function = process(tmp_path, body)
    with pytest.raises(ValueError, match=f"reward function rate .*{BAD[body]}"):
        call_reward(function, ["p"] * 3, ["one", "two", "three"], {})


@pytest.mark.parametrize(
    "first_line, said",
    [
        ("import sys; sys.exit(0)", "cannot be imported: SystemExit"),
        ("import os; os._exit(0)", "ended its process with exit code 0"),
        ("import time; time.sleep(100)", "took more than reward_timeout=1.5 seconds while it was loaded"),
    ],
)
def test_a_file_that_does_not_load_is_named(first_line, said, tmp_path):
    (tmp_path / "bad.py").write_text(f"{first_line}\n")
    with pytest.raises(ValueError, match=said):
        RewardProcess(f"{tmp_path}/bad.py:rate", seconds=SECONDS)


def test_nothing_that_it_does_reaches_the_training_and_it_keeps_what_it_knows(tmp_path, capfd):
    """It changes directory, the environment and signals, reseeds, prints; its second call finds what its first left."""
    body = (
        "import numpy; random.seed(0); signal.signal(signal.SIGTERM, signal.SIG_IGN); os.chdir('/')\n"
        "    os.environ['OWNED'] = '1'; print('it says', flush=True)\n"
        "    rate.calls = getattr(rate, 'calls', 0) + 1; return numpy.array([float(rate.calls)] * len(prompts))"
    )
    function, before = process(tmp_path, body, seconds=60), (Path.cwd(), signal.getsignal(signal.SIGTERM))
    assert [call_reward(function, ["p"], ["c"], {}) for _ in range(2)] == [[1.0], [2.0]]
    assert (Path.cwd(), signal.getsignal(signal.SIGTERM)) == before and "OWNED" not in os.environ
    assert "it says" in capfd.readouterr().out


def test_what_it_draws_is_decided_by_the_runs_own_state(tmp_path):
    function, drawn = process(tmp_path, "return [random.random() for _ in prompts]", seconds=60), []
    for seed in (1, 1, 2):
        random.seed(seed)
        drawn += [call_reward(function, ["p"] * 2, ["c"] * 2, {})]
    assert drawn[0] == drawn[1] != drawn[2]


def test_neither_it_nor_what_it_started_outlives_the_run(tmp_path):
    body = (
        f"child = os.fork()\n    child or time.sleep(60)\n    open('{tmp_path}/pid', 'w').write(str(child)); return [0]"
    )
    function = process(tmp_path, body, seconds=60)
    call_reward(function, ["p"], ["c"], {})
    pids = [function.child.pid, int((tmp_path / "pid").read_text())]
    del function
    deadline = time.monotonic() + 20
    while any(is_alive(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not any(map(is_alive, pids))


def is_alive(pid: int) -> bool:
    """Whether the process runs: a zombie that nobody waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_function_that_hangs_in_a_later_step_ends_the_run_by_a_sentence(run_script, place, capfd):  # noqa: F811
    (place / "rate.py").write_text(
        "import ctypes\ncalls = []\ndef rate(prompts, completions):\n    calls.append(1)\n"
        "    len(calls) > 1 and ctypes.PyDLL(None).pause()\n    return [1.0] * len(prompts)\n"
    )
    assert run_script(train_ppo, *words_of("train_ppo", place), "num_steps=3", "reward_timeout=3") == 1
    told = capfd.readouterr().err
    assert "after step 1: reward function rate took more than reward_timeout=3 seconds and was killed" in told
    assert "the last good checkpoint is step_000001; the same command with resume=true continues" in told
    assert not (place / "run/model").exists()


def test_a_sample_moves_no_cursor_and_writes_no_clipboard():
    said = "\x1b]52;c;cm0gLXJm\x07 \x1b[2J\x9b1m \u202etxt\r\tfine\n"
    assert printable(said) == "\\x1b]52;c;cm0gLXJm\\x07 \\x1b[2J\\x9b1m \\u202etxt\\r\tfine\n"
