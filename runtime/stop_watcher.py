"""Ends a process that two signals did not end: a program of its own, which `runtime/stopping.py` starts.

    python stop_watcher.py PID APART PATIENCE SIGNAL...

On stdin come the numbers of the signals that process PID got, a byte each. PATIENCE seconds after the second that came
APART seconds after the first, it writes a byte to stdout, and kills PID where that does not end it within a second.
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
        print("killed: a call into C held the interpreter; resume=true goes on", file=sys.stderr)
        os.kill(pid, signal.SIGKILL)


if __name__ == "__main__":
    main(int(sys.argv[1]), float(sys.argv[2]), float(sys.argv[3]), set(map(int, sys.argv[4:])))
