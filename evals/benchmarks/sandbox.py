"""Run a program that a model wrote, with limits on time, memory, files and processes.

The limits alone do not isolate it. On Linux, if the machine lets users create namespaces, the program sees no network
and no processes but its own, and none of its children outlives it. It can read and write all files of
its user: run it in a machine that you can lose (docs/resilience.md).
"""

import contextlib
import functools
import json
import os
import resource
import secrets
import signal
import subprocess
import sys
import tempfile

from evals.benchmarks.code_blocks import code_of, defines, needs_of
from evals.judge_text import without_thinking

NAMESPACES = ["unshare", "--user", "--map-current-user", "--pid", "--fork", "--kill-child", "--net", "--ipc", "--mount"]
NAMESPACES += ["--mount-proc", "--"]
# Runs the program as __main__ and writes the word only after its last line: exit code 0 or os._exit do not pass.
DRIVER = """
import json, os, resource, sys
word, program = json.load(sys.stdin)
os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
exec(compile(program, "program", "exec"), {"__name__": "__main__"})
os.write(int(sys.argv[1]), word.encode())
"""


def program_of(
    prompt: str, answer: str, test: str | None = None, entry_point: str | None = None, test_list: list | None = None
) -> str | None:
    """The answer's code with its tests: HumanEval's `test` and `entry_point`, or MBPP's list of asserts.

    None if the row has no tests. The prompt is put before an answer that does not repeat the function's head, and its
    imports and helpers before one that does (`evals/benchmarks/code_blocks.py`).
    """
    if test_list is None and (test is None or entry_point is None):
        return None
    code = code_of(without_thinking(answer) or "")
    if test_list is not None:
        return "\n".join([code, *test_list])
    code = (needs_of(prompt, entry_point) if defines(code, entry_point) else prompt) + code
    return f"{code}\n{test}\ncheck({entry_point})\n"


def passes_tests(program: str, *, seconds: float, megabytes: int) -> bool:
    """Whether the Python program runs to its last line within the limits.

    It runs in an empty folder, with an empty environment, isolated from site packages, and without stdin. It cannot
    start processes or threads, except as root, for whom Linux does not apply this limit.
    """

    def limit() -> None:
        size = megabytes * 2**20
        resource.setrlimit(resource.RLIMIT_AS, (size, size))
        resource.setrlimit(resource.RLIMIT_CPU, (int(seconds) + 1, int(seconds) + 1))
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_NOFILE, (32, 32))

    word, (source, sink) = secrets.token_hex(), os.pipe()
    with tempfile.TemporaryDirectory() as folder, open(source, "rb") as reader:
        with open(sink, "wb"):
            process = subprocess.Popen(
                [*namespaces(), sys.executable, "-I", "-S", "-c", DRIVER, str(sink)],
                cwd=folder,
                env={},
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=[sink],
                start_new_session=True,
                preexec_fn=limit,
            )
        try:
            message = json.dumps([word, program]).encode()
            process.communicate(message, timeout=4 * seconds + 5)  # wall time, because the machine may be busy
        except subprocess.TimeoutExpired:
            return False
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # also ends all processes that it started
            process.wait()
        os.set_blocking(source, False)  # a process that inherited the other end may still have it open
        return process.returncode == 0 and reader.read(len(word)) == word.encode()


@functools.cache
def namespaces() -> list[str]:
    """The command that starts another in its own namespaces. Empty if users cannot create namespaces here."""
    try:
        works = subprocess.run([*NAMESPACES, "true"], capture_output=True).returncode == 0
    except OSError:
        works = False
    return NAMESPACES if works else []
