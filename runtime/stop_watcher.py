"""A separate program that ends a process which two signals did not end. `runtime/stopping.py` starts it.

    python stop_watcher.py PID APART PATIENCE SIGNAL...

It reads the numbers of the signals to process PID from stdin, one byte each. PATIENCE seconds after the second signal,
which came at least APART seconds after the first one, it writes a byte to stdout. If this does not end PID within a
second, it kills PID.
"""

import os
import signal
import sys
import time


def main(pid: int, apart: float, patience: float, stops: set[int]) -> None:
    """Wait for the second of the signals, or for the end of stdin."""
    first = None
    while numbers := os.read(0, 64):
        if not set(numbers) & stops:
            continue
        first = first or time.monotonic()
        if time.monotonic() - first >= apart:
            break
    else:
        return
    time.sleep(patience)
    os.write(1, b".")
    time.sleep(1)
    if os.getppid() == pid:
        print("killed: a call into C held the interpreter; resume=true continues", file=sys.stderr)
        os.kill(pid, signal.SIGKILL)


if __name__ == "__main__":
    main(int(sys.argv[1]), float(sys.argv[2]), float(sys.argv[3]), set(map(int, sys.argv[4:])))
