"""The process in which a reward function runs: `rollouts/own_process.py` starts it, talks to it, and kills it in time.

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
from typing import BinaryIO

from rollouts.reward_functions import call_function, columns_read, first_bad_row, make_reward

KILL_WITH_PARENT = 1  # PR_SET_PDEATHSIG


def serve(spec: str, key: str, settings: str, directory: str, descriptor: str, parent: str) -> None:
    """Load the function with its settings (JSON) and answer calls until the other end is closed."""
    with connected(descriptor, parent) as pipe:
        try:
            function = make_reward(spec, key, json.loads(settings), directory)
        except ValueError as error:
            write(pipe, {"refused": str(error)})
            return
        write(pipe, {"modules": loaded_modules(), "columns": columns_read(function)})
        for request in requests(pipe):
            answer(function, pipe, request["prompts"], request["completions"], request["columns"])


@contextmanager
def connected(descriptor: str, parent: str) -> Iterator[BinaryIO]:
    """This end of the channel, in a process that ends with its parent."""
    end_with(int(parent))
    with socket.socket(fileno=int(descriptor)) as channel, channel.makefile("rwb") as pipe:
        yield pipe


def loaded_modules() -> list[str]:
    """The files of this process's modules."""
    return [getattr(module, "__file__", None) or "" for module in list(sys.modules.values())]


def requests(pipe: BinaryIO) -> Iterator[dict]:
    """What is asked, until the other end is closed; everything that draws is seeded as the request says."""
    while head := pipe.read(8):
        request = json.loads(pipe.read(*struct.unpack("<Q", head)))
        seed_all(request["seed"])
        yield request


def answer(function, pipe, prompts: list[str], completions: list[str], columns: dict[str, list]) -> None:
    """Write what the function returned; or how it failed and then, as that may hang, on which row."""
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
    """A tensor's or an array's numbers."""
    if not hasattr(value, "tolist"):
        raise TypeError(f"it returned {str(value)[:80]} ({type(value).__name__}), neither a number nor text")
    return value.tolist()


def seed_all(seed: int) -> None:
    """Seed what the function may draw from; NumPy and torch only where it has loaded them."""
    random.seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(seed)


def end_with(parent: int) -> None:
    """Linux kills this process when its parent dies, whatever it is doing; elsewhere it ends when it next reads."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(KILL_WITH_PARENT, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:  # which died meanwhile
            os._exit(1)
