"""SIGTERM and SIGINT: the first asks a run to finish its step and save, the second ends the process."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import BinaryIO

from runtime.display import complain
from runtime.script import INTERRUPTED

STOPS = (signal.SIGTERM, signal.SIGINT)
APART = 1.0  # seconds; signals within this time count as one, since Slurm, torchrun and recipes each forward it
PATIENCE = 5.0  # seconds after the second signal before the process is ended
WATCHER = Path(__file__).with_name("stop_watcher.py")


class StopSignals:
    """Handles stop signals from `start` to `close`. `asked` is True after one arrived.

    Python handles signals in its main thread, which C code may block: a collective whose other rank is gone, or a
    kernel that never ends. So another process counts signals too (runtime/stop_watcher.py), at the other end of the
    file descriptor to which the interpreter writes each signal. If this process does not end in time after the second
    one, a thread ends it at the watcher's request. If C code holds the interpreter's lock, the watcher kills it.
    """

    def start(self) -> None:
        """Called in the main thread."""
        self.asked, self._first = False, 0.0
        source, self._sink = os.pipe()
        os.set_blocking(self._sink, False)
        command = [sys.executable, "-I", "-S", str(WATCHER), str(os.getpid()), str(APART), str(PATIENCE)]
        command += [str(int(number)) for number in STOPS]
        self._watcher = subprocess.Popen(command, stdin=source, stdout=subprocess.PIPE, start_new_session=True)
        os.close(source)
        self._before = {number: signal.signal(number, self._on_signal) for number in STOPS}
        self._sink_before = signal.set_wakeup_fd(self._sink, warn_on_full_buffer=False)
        threading.Thread(target=end_on_request, args=(self._watcher.stdout,), daemon=True).start()

    def close(self) -> None:
        """Restore the previous handlers."""
        signal.set_wakeup_fd(self._sink_before)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        os.close(self._sink)
        self._watcher.kill()
        self._watcher.wait()

    def _on_signal(self, number: int, frame) -> None:
        name, now = signal.Signals(number).name, time.monotonic()
        if self.asked and now - self._first < APART:
            return
        if self.asked:
            complain(f"{name} again: stopped at once; resume=true continues from the last checkpoint, if there is one")
            raise SystemExit(INTERRUPTED)
        self.asked, self._first = True, now
        complain(f"{name}: finishing the step, then saving; a second one stops at once")


def end_on_request(watcher: BinaryIO) -> None:
    """End the process at the watcher's request. Return if the watcher ends without one."""
    with watcher:
        if watcher.read(1):
            os._exit(INTERRUPTED)
