"""Run a program that a model wrote, with limits on time, memory, files and processes. Limits are not a jail."""

import contextlib
import os
import resource
import signal
import subprocess
import sys
import tempfile


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
