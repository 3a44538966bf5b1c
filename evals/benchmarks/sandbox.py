"""Run a program that a model wrote, with limits on time, memory, files and processes. Limits are not a jail."""

import contextlib
import os
import re
import resource
import signal
import subprocess
import sys
import tempfile

from evals.judge_output import without_thinking


def program_of(
    prompt: str, answer: str, test: str | None = None, entry_point: str | None = None, test_list: list | None = None
) -> str | None:
    """The answer's code with its tests: HumanEval's `test` and `entry_point`, or MBPP's list of asserts. None without.

    The prompt's code stands before an answer that does not repeat the function's head.
    """
    if test_list is None and (test is None or entry_point is None):
        return None
    answer = without_thinking(answer) or ""
    blocks = re.findall(r"```(?:python)?\n(.*?)```", answer, flags=re.DOTALL)
    code = "\n".join(blocks) if blocks else answer
    if test_list is not None:
        return "\n".join([code, *test_list])
    code = code if f"def {entry_point}" in code else prompt + code
    return f"{code}\n{test}\ncheck({entry_point})\n"


def passes_tests(program: str, *, seconds: float, megabytes: int) -> bool:
    """Whether the Python program ends with exit code 0 within its limits.

    It runs in an empty folder, with an empty environment, isolated from site packages, without stdin. It can still read
    what its user can read: run it in a machine that you can lose.
    """

    def limit() -> None:
        size = megabytes * 2**20
        resource.setrlimit(resource.RLIMIT_AS, (size, size))
        resource.setrlimit(resource.RLIMIT_CPU, (int(seconds) + 1, int(seconds) + 1))
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_NOFILE, (32, 32))

    with tempfile.TemporaryDirectory() as folder:
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", program],
            cwd=folder,
            env={},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            preexec_fn=limit,
        )
        try:
            return process.wait(timeout=4 * seconds + 5) == 0  # wall time: the machine may be busy
        except subprocess.TimeoutExpired:
            return False
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # and whatever it started
            process.wait()
