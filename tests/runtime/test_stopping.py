"""Two signals end every run, whatever it is in; two copies of one signal are one."""

import ctypes
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable

import pytest

from runtime import stopping


def in_python(listening) -> None:
    while True:
        time.sleep(0.01)


def in_python_that_catches_all(listening) -> None:
    while True:
        try:
            time.sleep(0.01)
        except BaseException:  # noqa: BLE001 - as bad code does
            continue


def in_c(listening) -> None:
    """A mutex that the thread itself holds: no signal interrupts it, and no handler runs."""
    mutex, library = ctypes.create_string_buffer(64), ctypes.CDLL(None)
    while True:
        library.pthread_mutex_lock(mutex)


def in_c_with_the_lock(listening) -> None:
    """As a tokenizer's slow pattern does: no thread of Python's runs."""
    mutex, library = ctypes.create_string_buffer(64), ctypes.PyDLL(None)
    while True:
        library.pthread_mutex_lock(mutex)


def until_asked(listening) -> None:
    while not listening.asked:
        time.sleep(0.001)
    time.sleep(0.2)  # it saves


def exit_code(work: Callable, *, signals: list[int], apart: float) -> int:
    """Of a fork that listens and works, and is sent these signals `apart` seconds from each other."""
    source, sink = os.pipe()
    child = os.fork()
    if child == 0:
        code = 0
        try:
            stopping.APART, stopping.PATIENCE = 0.3, 0.1
            listening = stopping.StopSignals()
            listening.start()
            os.write(sink, b".")
            work(listening)
        except SystemExit as exit:
            code = exit.code
        finally:
            os._exit(code)
    os.read(source, 1)
    time.sleep(0.05)
    for number in signals:
        os.kill(child, number)
        time.sleep(apart)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("work", [in_python, in_python_that_catches_all, in_c])
def test_two_signals_end_it(work, number):
    assert exit_code(work, signals=[number] * 2, apart=0.4) == 75


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_two_signals_end_what_holds_the_interpreter(number, capfd):
    """Nobody in the process can say which exit code it has: the watcher kills it."""
    assert exit_code(in_c_with_the_lock, signals=[number] * 2, apart=0.4) == -signal.SIGKILL
    assert "a call into C held the interpreter; resume=true continues" in capfd.readouterr().err


def test_a_run_that_ends_takes_its_watcher_along(monkeypatch):
    started, start = [], subprocess.Popen
    monkeypatch.setattr(stopping.subprocess, "Popen", lambda *a, **k: started.append(start(*a, **k)) or started[-1])
    listening = stopping.StopSignals()
    before, threads = set(os.listdir("/proc/self/fd")), threading.active_count()
    listening.start()
    listening.close()
    assert started[0].returncode == -signal.SIGKILL
    while threading.active_count() > threads:
        time.sleep(0.001)
    assert set(os.listdir("/proc/self/fd")) == before


def test_copies_of_one_signal_are_one():
    assert exit_code(until_asked, signals=[signal.SIGTERM, signal.SIGINT, signal.SIGTERM], apart=0.01) == 0
