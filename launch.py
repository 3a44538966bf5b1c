"""Start a script on several ranks. It takes torchrun's arguments, and its exit code says how the ranks ended.

    python launch.py --nproc-per-node 8 train_dpo.py dist=fsdp policy=... data.train=[...]

SIGTERM and Ctrl-C are passed to every rank. Each rank finishes its step and saves, without a time limit. The exit code
is then 75, and resume=true continues. torchrun itself would kill the ranks after 30 seconds and exit with 1. Otherwise
the exit code is that of the rank that failed first (2: bad input).
"""

import signal
import sys

import psutil
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.run import parse_args, run

from runtime.display import complain
from runtime.script import FAILED, INTERRUPTED


def main() -> None:
    """Run `torchrun` with the arguments of the command line."""
    arguments = parse_args(sys.argv[1:])
    arguments.signals_to_handle = "SIGHUP,SIGQUIT"  # torchrun handles these, and this script the two below
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, pass_on)
    try:
        run(arguments)
    except ChildFailedError as error:
        raise SystemExit(exit_code(error.failures)) from None


def pass_on(number: int, frame) -> None:
    """Pass the signal to the ranks. Where no rank exists yet, nothing has started, and the launcher exits."""
    ranks = psutil.Process().children()
    for rank in ranks:
        rank.send_signal(number)
    if not ranks:
        raise SystemExit(INTERRUPTED)


def exit_code(failures: dict[int, ProcessFailure]) -> int:
    """The exit code of the first rank that failed; 75 also if it was stopped before it could handle the signal."""
    rank = min(failures, key=lambda rank: failures[rank].timestamp)
    code = failures[rank].exitcode
    if code > 0:
        return code
    complain(f"rank {rank} of this machine was ended by {signal.Signals(-code).name}")
    return INTERRUPTED if code == -signal.SIGTERM else FAILED


if __name__ == "__main__":
    main()
