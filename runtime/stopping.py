"""SIGTERM and SIGINT: the first asks a run to finish its step and save, the second ends the process."""

import os
import signal
import threading
import time

from runtime.display import complain
from runtime.door import INTERRUPTED

STOPS = (signal.SIGTERM, signal.SIGINT)
APART = 1.0  # seconds: Slurm and the terminal signal every process, and torchrun and recipes pass it on; that is one
PATIENCE = 5.0  # seconds that the process has to end by itself after the second


class StopSignals:
    """Listens from `start` to `close`; `asked` says whether one came.

    Python hands a signal to its main thread, which a call into C may hold for ever: a collective whose other rank is
    gone, a kernel that never ends. So a thread counts them too, through the file descriptor to which the interpreter
    writes each signal as it arrives, and ends the process where the main thread does not.
    """

    def start(self) -> None:
        """Called in the main thread."""
        self.asked, self._first = False, 0.0
        source, self._sink = os.pipe()
        os.set_blocking(self._sink, False)
        self._before = {number: signal.signal(number, self._on_signal) for number in STOPS}
        self._sink_before = signal.set_wakeup_fd(self._sink, warn_on_full_buffer=False)
        threading.Thread(target=end_at_the_second, args=(source,), daemon=True).start()

    def close(self) -> None:
        """Put back what was there before."""
        signal.set_wakeup_fd(self._sink_before)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        os.close(self._sink)

    def _on_signal(self, number: int, frame) -> None:
        name, now = signal.Signals(number).name, time.monotonic()
        if self.asked and now - self._first < APART:
            return
        if self.asked:
            complain(f"{name} again: stopped at once; resume=true goes on from the last checkpoint, if there is one")
            raise SystemExit(INTERRUPTED)
        self.asked, self._first = True, now
        complain(f"{name}: finishing the step, then saving; a second one stops at once")


def end_at_the_second(source: int) -> None:
    """Read signal numbers until the other end is closed; end the process PATIENCE seconds after the second of STOPS."""
    first = None
    with open(source, "rb", buffering=0) as arriving:
        while numbers := arriving.read(64):
            if not set(numbers) & set(STOPS):
                continue
            first = first or time.monotonic()
            if time.monotonic() - first >= APART:
                time.sleep(PATIENCE)
                os._exit(INTERRUPTED)
