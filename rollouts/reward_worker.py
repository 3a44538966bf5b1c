"""The process that runs a reward function. `rollouts/own_process.py` starts it, sends requests, and kills it in time.

Torch is not loaded here unless the function loads it.
"""

import ctypes
import json
import os
import random
import signal
import socket
import struct
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedRWPair

from rollouts.reward_functions import call_function, columns_read, first_bad_row, is_cheap, make_reward

KILL_WITH_PARENT = 1  # PR_SET_PDEATHSIG


def serve(spec: str, key: str, settings: str, directory: str, descriptor: str, parent: str) -> None:
    """Load the function with its settings (JSON), and answer calls until the other end is closed."""
    with connected(descriptor, parent) as pipe:
        try:
            function = make_reward(spec, key, json.loads(settings), directory)
        except ValueError as error:
            write(pipe, {"refused": str(error)})
            return
        write(pipe, {"modules": loaded_modules(), "columns": columns_read(function), "cheap": is_cheap(function)})
        for request in requests(pipe):
            answer(function, pipe, request["prompts"], request["completions"], request["columns"])


@contextmanager
def connected(descriptor: str, parent: str) -> Iterator[BufferedRWPair]:
    """This end of the channel, in a process that ends with its parent."""
    end_with(int(parent))
    with socket.socket(fileno=int(descriptor)) as channel, channel.makefile("rwb") as pipe:
        yield pipe


def loaded_modules() -> list[str]:
    """The files of this process's modules."""
    return [getattr(module, "__file__", None) or "" for module in list(sys.modules.values())]


def requests(pipe: BufferedRWPair) -> Iterator[dict]:
    """The requests until the other end is closed. All random generators are seeded as the request states."""
    while head := pipe.read(8):
        request = json.loads(pipe.read(*struct.unpack("<Q", head)))
        seed_all(request["seed"])
        yield request


def answer(function, pipe, prompts: list[str], completions: list[str], columns: dict[str, list]) -> None:
    """Send the function's result; or its failure and then, because this may hang, the row on which it fails."""
    try:
        write(pipe, {"rewards": call_function(function, prompts, completions, columns)})
    except (Exception, SystemExit) as error:
        write(pipe, {"failed": f"raised {type(error).__name__}: {error}"})
        write(pipe, {"at": first_bad_row(function, prompts, completions, columns)})


def write(pipe, reply: dict) -> None:
    """Send a reply as JSON after its length in 8 bytes."""
    body = json.dumps(reply, default=plain).encode()
    pipe.write(struct.pack("<Q", len(body)) + body)
    pipe.flush()


def plain(value):
    """A tensor's or an array's numbers as Python's."""
    if not hasattr(value, "tolist"):
        raise TypeError(f"it returned {str(value)[:80]} ({type(value).__name__}), neither a number nor text")
    return value.tolist()


def seed_all(seed: int) -> None:
    """Seed the generators that the function may use; NumPy's and torch's only if it has loaded them."""
    random.seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(seed)


def end_with(parent: int) -> None:
    """On Linux this process is killed when its parent dies. Elsewhere it ends at its next read."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(KILL_WITH_PARENT, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:  # the parent died in the meantime
            os._exit(1)
