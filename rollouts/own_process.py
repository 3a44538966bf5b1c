"""The user's code, such as a reward function or an environment, in a separate process that can be killed.

The code may hang in C, crash, exit, reseed generators or change torch's settings without an effect on the training. The
process lives as long as its `OwnProcess`, so the code may keep a model, a GPU or a connection. It prints to the same
terminal. Requests and replies are JSON after their length in 8 bytes.
"""

import contextlib
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import time
import weakref
from pathlib import Path

from rollouts.reward_functions import RewardFailed
from runtime.inputs import also_runs

ROOT = Path(__file__).resolve().parents[1]
START = "import sys; sys.path[0] = sys.argv[1]; from {} import serve; serve(*sys.argv[2:])"


class OwnProcess:
    """A process that answers requests.

    Args:
            called: name of the code in errors. worker: the module of this project whose `serve` runs there. It is
                called with `words` and then, as texts, the descriptor of its end of the channel and the number of this
                process.
            seconds: time limit for its start, and for each reply.
        Raises:
            ValueError: the worker refuses its words. RewardFailed: no reply came in time, or the process ended.
    """

    def __init__(self, called: str, worker: str, *words: str, seconds: float):
        self.called, self.seconds = called, seconds
        self.channel, end = socket.socketpair()
        command = [sys.executable, "-c", START.format(worker), str(ROOT), *words, str(end.fileno()), str(os.getpid())]
        with end:
            self.child = subprocess.Popen(command, pass_fds=[end.fileno()], start_new_session=True)
        weakref.finalize(self, stop, self.child, self.channel)
        self.loaded = self.reply("while it was loaded")
        if "refused" in self.loaded:
            raise ValueError(self.loaded["refused"])
        also_runs(self.loaded["modules"])

    def send(self, request: dict) -> None:
        body = json.dumps(request).encode()
        self.channel.settimeout(self.seconds)
        # a process that does not read does not reply either, and `reply` reports that
        with contextlib.suppress(OSError):
            self.channel.sendall(struct.pack("<Q", len(body)) + body)

    def reply(self, when: str) -> dict:
        deadline = time.monotonic() + self.seconds
        try:
            size = struct.unpack("<Q", self._read(8, deadline))[0]
            return json.loads(self._read(size, deadline))
        except TimeoutError:
            self.child.kill()
            took = f"took more than reward_timeout={self.seconds:g} seconds{when and f' {when}'}"
            raise RewardFailed(f"{self.called} {took} and was killed") from None
        except (EOFError, ConnectionError):
            raise RewardFailed(f"{self.called} ended its process {self._end()}") from None
        except BaseException:  # after an interrupt, a reply that was not read may be in the channel
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
    """Kill the process and all processes that it started in its session."""
    channel.close()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()
