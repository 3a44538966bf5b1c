"""A reward function in a process of its own, which can be killed (data/reward_worker.py).

Somebody's function may hang in C, crash, exit, reseed the generators or change torch's settings: none of that reaches
the training. The process lives as long as its `RewardProcess`, so the function may keep a model, a GPU or a connection;
it prints to the same terminal. Requests and replies are JSON after their length in 8 bytes.
"""

import contextlib
import json
import os
import random
import signal
import socket
import struct
import subprocess
import sys
import time
import weakref
from pathlib import Path

from data.rewards import RewardFailed
from runtime.inputs import also_runs

ROOT = Path(__file__).resolve().parents[1]
START = "import sys; sys.path[0] = sys.argv[1]; from data.reward_worker import serve; serve(*sys.argv[2:])"


class RewardProcess:
    """The function that `spec` names, called as `function(prompts, completions, **columns)` as it would be here.

    Args:
        spec, key, settings, directory: as make_reward takes them. seconds: for loading it, and for each call.
    Raises:
        ValueError: it cannot be loaded. RewardFailed: a call failed, or did not end in time and was killed.
    """

    def __init__(
        self, spec: str, *, seconds: float, key: str = "reward_fn", settings: dict | None = None, directory: Path = ROOT
    ):
        self.__name__, self.seconds = spec.rpartition(":")[2], seconds
        self.channel, end = socket.socketpair()
        command = [sys.executable, "-c", START, str(ROOT), spec, key, json.dumps(settings or {}), str(directory)]
        command += [str(end.fileno()), str(os.getpid())]
        with end:
            self.child = subprocess.Popen(command, pass_fds=[end.fileno()], start_new_session=True)
        weakref.finalize(self, stop, self.child, self.channel)
        loaded = self._reply("while it was loaded")
        if "refused" in loaded:
            raise ValueError(loaded["refused"])
        also_runs(loaded["modules"])
        self.columns = loaded["columns"]  # those that it cannot be called without

    def __call__(self, prompts: list[str], completions: list[str], **columns: list) -> list:
        """What the function returned, a number of NumPy or torch as Python's, a tuple as a list."""
        seed = random.getrandbits(32)  # of the run's own state: a resumed run draws the same
        self._send({"seed": seed, "prompts": prompts, "completions": completions, "columns": columns})
        reply = self._reply("")
        if "failed" in reply:
            with contextlib.suppress(RewardFailed):  # the search for the row may hang where the call did not
                reply["failed"] += self._reply("")["at"]
            raise RewardFailed(f"reward function {self.__name__} {reply['failed']}")
        return reply["rewards"]

    def _send(self, request: dict) -> None:
        body = json.dumps(request).encode()
        self.channel.settimeout(self.seconds)
        with contextlib.suppress(OSError):  # whoever does not read does not reply either: what to say of it is there
            self.channel.sendall(struct.pack("<Q", len(body)) + body)

    def _reply(self, when: str) -> dict:
        deadline = time.monotonic() + self.seconds
        try:
            size = struct.unpack("<Q", self._read(8, deadline))[0]
            return json.loads(self._read(size, deadline))
        except TimeoutError:
            self.child.kill()
            what = f"took more than reward_timeout={self.seconds:g} seconds{when and f' {when}'} and was killed"
            raise RewardFailed(f"reward function {self.__name__} {what}") from None
        except (EOFError, ConnectionError):
            raise RewardFailed(f"reward function {self.__name__} ended its process {self._end()}") from None
        except BaseException:  # an interrupt halfway leaves a reply that nobody reads
            stop(self.child, self.channel)
            raise

    def _read(self, size: int, deadline: float) -> bytes:
        found = bytearray()
        while len(found) < size:
            self.channel.settimeout(max(deadline - time.monotonic(), 1e-3))
            piece = self.channel.recv(min(size - len(found), 1 << 20))
            if not piece:
                raise EOFError
            found += piece
        return bytes(found)

    def _end(self) -> str:
        try:
            code = self.child.wait(timeout=5)
        except subprocess.TimeoutExpired:
            return "'s connection to the training"
        if code >= 0:
            return f"with exit code {code}"
        hint = " (out of memory?)" if code == -signal.SIGKILL else ""
        return f"by {signal.Signals(-code).name}{hint}"


def stop(child: subprocess.Popen, channel: socket.socket) -> None:
    """Kill the process and whatever it started in its session."""
    channel.close()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()
