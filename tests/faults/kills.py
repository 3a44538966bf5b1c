"""Trainings that are killed (SIGKILL) and resumed until they are done, and what is left of them.

A script runs in a process of its own, forked from a server that has imported torch once: a start costs no import, and
the process that dies has done nothing but this training.
"""

import contextlib
import hashlib
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

SCRIPTS = ("train_sft", "train_rm", "train_dpo", "train_ppo")
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["torch.distributed.checkpoint", *SCRIPTS, "tests.faults.kills"])
LIMIT = 300  # seconds in which a tiny training is through on any machine
CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.symlink")  # as Python's audit events call them
OLD_RUN = re.compile("seed: 1 -> 0|holds a finished run without checkpoints")  # what a killed overwriting may leave
SAVING, EXPORTING = "checkpoints/.step_*.tmp", "model.writing"  # what is there only meanwhile


def die_before(change: int, inside: str | None = None) -> None:
    """This process kills itself (SIGKILL) before its `change`-th change of the disk.

    A change is an open for writing, a mkdir, rename, symlink, unlink or rmdir; with `inside`, only those made by the
    function of that name, or below it. The hook stays until the process ends.
    """
    left = change

    def watch(event: str, arguments: tuple) -> None:
        nonlocal left
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if (writes or event in CHANGES) and (inside is None or is_called(inside)):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)


def is_called(name: str) -> bool:
    """Whether a function of this name is under way in this thread."""
    frame = sys._getframe()
    while frame is not None and frame.f_code.co_name != name:
        frame = frame.f_back
    return frame is not None


def run_script(script: str, words: list[str], log: Path, change: int | None) -> None:
    """`python SCRIPT.py WORDS` in this process, its output added to `log`. Pictures are left out: a second each.

    With `change` it dies before its `change`-th change of the disk.
    """
    import torch

    import runtime.run

    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    torch.set_num_threads(1)
    runtime.run.plot_metrics = lambda rows, path: None
    sys.argv = [f"{script}.py", *words]
    if change is not None:
        die_before(change)
    runtime.run.main(import_module(script).train, script)


class Refused(Exception):
    """A training that would not begin, and its last words."""


class Training:
    """One script's training in `directory`: to the end in one go, or through kills."""

    def __init__(self, script: str, words: list[str], directory: Path):
        self.script, self.words, self.directory = script, words, directory
        self.log = directory.with_name(f"{directory.name}.log")
        self.started = 0.0  # when its latest process began, in seconds since 1970

    def start(self, *more: str, change: int | None = None) -> multiprocessing.Process:
        words = [*self.words, *more, f"hydra.run.dir={self.directory}"]
        process = PROCESSES.Process(target=run_script, args=(self.script, words, self.log, change))
        self.started = time.time()
        process.start()
        return process

    def saves_under_way(self) -> set[str]:
        """Temporary directories of this start; those that an earlier kill left are older."""
        found = set()
        with contextlib.suppress(FileNotFoundError):  # its directory was deleted, or it was renamed, meanwhile
            for path in self.directory.glob(SAVING):
                found |= {path.name} if path.stat().st_mtime > self.started else set()
        return found

    def finish(self, *more: str) -> float:
        """To the end; returns the seconds it took."""
        start = time.monotonic()
        process = self.start(*more)
        process.join(LIMIT)
        assert process.exitcode == 0, f"exit code {process.exitcode}: {self.log.read_text()[-2000:]}"
        return time.monotonic() - start

    def kill_once(self, moment: Callable[[], bool], *more: str, change: int | None = None) -> str | None:
        """Start, kill at the moment or before a change of the disk, and say where that was.

        None where the training was done before.

        Raises:
            Refused: it ended with exit code 2.
        """
        process = self.start(*more, change=change)
        while process.is_alive() and not moment():
            time.sleep(0.0005)
        process.kill()
        process.join()
        if process.exitcode == 2:
            raise Refused(self.log.read_text()[-2000:])
        assert process.exitcode in (0, -9), f"exit code {process.exitcode}: {self.log.read_text()[-2000:]}"
        if process.exitcode == 0:
            return None
        if change is not None:
            return "at a change of the disk"  # by itself, and only there
        if self.saves_under_way():
            return "inside a save, at some time"  # what this start put there is neither renamed nor gone
        if (self.directory / EXPORTING).exists():
            return "exporting"
        return "before the first step" if not self.rows() else "training"

    def rows(self) -> list[dict]:
        path = self.directory / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        rows = [json.loads(line) for line in lines if line.endswith("}")]
        return [{name: value for name, value in row.items() if not name.startswith("perf/")} for row in rows]

    def result(self) -> dict:
        """What must not depend on kills: metrics (perf/* aside), samples, and the sha256 of every file of the model."""
        model, samples = self.directory / "model", self.directory / "samples.jsonl"
        digests = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(model.iterdir())}
        left = sorted(path.name for path in self.directory.iterdir() if path.name != ".lock")
        return {
            "metrics": self.rows(),
            "model": digests,
            "left": left,
            "samples": samples.read_text() if samples.exists() else "",
        }


def kill_until(training: Training, kills: int, *, old: Path, seconds: float, seed: int) -> Counter:
    """Kill the training `kills` times at moments drawn from `seed`, resuming after each, and see it to the end.

    A third of the kills falls at a random time of what is left to do, a third some milliseconds into a save, a third
    before one of the process's first 60 changes of the disk: overwriting, or resuming, and some saves. A training that
    is done before its kill must have the uninterrupted result; it begins again, by overwriting `old`. A resume that is
    refused (the killed overwriting left the old run) begins again as well.

    Args:
        old: a finished run of another seed, which is what overwrite=true finds.
        seconds: of an uninterrupted training; kills at random times fall into as long a stretch.
    Returns:
        How many kills struck where.
    Raises:
        AssertionError: a script failed.
    """
    chance, places, results, resume = random.Random(seed), Counter(), [], False
    while places.total() < kills:
        start = begin_again(training, old) if not resume else "resume=true"
        try:
            if kind := chance.randrange(3):
                moment = (at_a_time if kind == 1 else in_a_save)(training, chance, seconds)
                place = training.kill_once(moment, start)
            else:
                place = training.kill_once(lambda: False, start, change=chance.randint(1, 60))
        except Refused as refused:
            assert resume and OLD_RUN.search(str(refused)), refused
            resume = False
            continue
        if place is None:
            results.append(training.result())
        else:
            places[place] += 1
        resume = place is not None
    if not (resume and resumes(training)):
        training.finish(begin_again(training, old))
    results.append(training.result())
    assert all(result == results[-1] for result in results), "two trainings with kills differ"
    return places


def resumes(training: Training) -> bool:
    """Whether the training goes on to its end; False where the killed overwriting left the old run."""
    process = training.start("resume=true")
    process.join(LIMIT)
    said = training.log.read_text()[-2000:]
    assert process.exitcode == 0 or (process.exitcode == 2 and OLD_RUN.search(said)), said
    return process.exitcode == 0


def begin_again(training: Training, old: Path) -> str:
    """Put the old run where the training will be; returns the word that overwrites it."""
    shutil.rmtree(training.directory, ignore_errors=True)
    shutil.copytree(old, training.directory, symlinks=True)
    return "overwrite=true"


def at_a_time(training: Training, chance: random.Random, seconds: float) -> Callable[[], bool]:
    """A random time after the start: while loading, resuming, training, saving, exporting."""
    stop = time.monotonic() + chance.uniform(0, seconds)
    return lambda: time.monotonic() > stop


def in_a_save(training: Training, chance: random.Random, seconds: float) -> Callable[[], bool]:
    """A few milliseconds after the temporary directory of the first to third save appears."""
    saves, seen, stop = chance.randint(1, 3), set(), None
    delay = chance.choice([0, chance.uniform(0, 0.03)])

    def moment() -> bool:
        nonlocal stop
        seen.update(training.saves_under_way())
        if stop is None and len(seen) >= saves:
            stop = time.monotonic() + delay
        return stop is not None and time.monotonic() >= stop

    return moment
