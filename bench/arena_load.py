"""Load test of the arena's page with fifty people: are all votes stored, none twice, and how long do answers take?

    python bench/arena_load.py models="{a:DIR,b:DIR}"             50 users, 2,000 votes, and a kill -9 half-way
    python bench/arena_load.py models="{a:DIR,b:DIR}" 5 60       the same with 5 users and 60 votes
    python bench/arena_load.py models="{a:DIR,b:DIR}" 50 2000 RUN_DIR   continues a run that was cut after the kill

It needs the arena extra. All traffic goes to 127.0.0.1, to a server that this script starts and stops.
"""

import json
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path

import numpy as np
from gradio_client import Client

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from arena.store import Store  # noqa: E402

LABELS = ("A is better", "B is better", "tie")
USERS, VOTES = (int(word) for word in sys.argv[2:4] or (50, 2000))
DIRECTORY = Path(sys.argv[4] if sys.argv[4:] else f"{tempfile.mkdtemp()}/arena")


def start(models: str, directory: Path, port: int, *more: str) -> subprocess.Popen:
    """The server process, once the page is open."""
    overrides = [models, f"port={port}", f"hydra.run.dir={directory}", "sampling.max_new_tokens=4"]
    limits = ["messages_per_minute=100000", "max_waiting=1000", "refresh_seconds=60"]
    command = [sys.executable, str(ROOT / "arena.py"), *overrides, *limits, *more]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT)
    for line in process.stdout:
        if "the arena is open" in line:
            threading.Thread(target=process.stdout.read, daemon=True).start()
            return process
    raise SystemExit("the arena did not open")


class Person(threading.Thread):
    """Sends messages and votes until stopped. Stores which votes were acknowledged and how long each answer took."""

    def __init__(self, address: str, votes: int):
        super().__init__(daemon=True)
        self.address, self.votes = address, votes
        self.thanked = 0
        self.seconds: list[float] = []
        self.page_seconds: list[float] = []

    def run(self) -> None:
        try:
            client = Client(self.address, verbose=False)
            for n in range(self.votes):
                client.predict(f"hello {n}", api_name="/say")
                began = time.perf_counter()
                reply = client.predict(LABELS[n % len(LABELS)], api_name="/vote")
                self.seconds.append(time.perf_counter() - began)
                self.thanked += "Thank you" in json.dumps(reply)
                began = time.perf_counter()
                urllib.request.urlopen(self.address, timeout=60).read()
                self.page_seconds.append(time.perf_counter() - began)
        except Exception as error:  # the server was killed during a request of this person
            self.broken = repr(error)


def crowd(address: str, votes_each: int) -> list[Person]:
    people = [Person(address, votes_each) for _ in range(USERS)]
    for person in people:
        person.start()
    return people


def kill_half_way(models: str, port: int) -> None:
    """Send SIGKILL while fifty people vote, and check that every acknowledged vote is stored."""
    server = start(models, DIRECTORY, port)
    people = crowd(f"http://127.0.0.1:{port}", VOTES // USERS)
    while sum(person.thanked for person in people) < VOTES // 2 and any(p.is_alive() for p in people):
        time.sleep(0.2)
    server.send_signal(signal.SIGKILL)
    server.wait()
    for person in people:
        person.join(timeout=120)
    thanked, kept = sum(person.thanked for person in people), len(votes())
    if not thanked:
        raise SystemExit(f"no vote was possible: {people[0].broken}")
    print(f"killed (-9) during the votes: {thanked} acknowledged, {kept} in the store, lost {max(thanked - kept, 0)}")
    show_seconds(people)


def go_on(models: str, port: int) -> None:
    """Send the remaining votes to a server on the store of the killed one."""
    kept = len(votes())
    server = start(models, DIRECTORY, port, "resume=true")
    people = crowd(f"http://127.0.0.1:{port}", -(-(VOTES - kept) // USERS))
    for person in people:
        person.join()
    server.send_signal(signal.SIGINT)
    server.wait()
    battles = votes()
    print(f"restarted: {sum(p.thanked for p in people)} acknowledged, {len(battles) - kept} new in the store")
    print(f"in all {len(battles)} votes on {len(set(battles))} battles")
    show_seconds(people)


def votes() -> list[str]:
    """The battle of every vote in the store."""
    store = Store(DIRECTORY / "arena.sqlite")
    battles = [battle["id"] for battle in store.battles()]
    store.close()
    return battles


def show_seconds(people: list[Person]) -> None:
    for name, attribute in (("vote", "seconds"), ("page", "page_seconds")):
        seconds = np.concatenate([getattr(person, attribute) for person in people])
        p50, p95 = np.quantile(seconds, [0.5, 0.95])
        print(f"{name}: {len(seconds)} answers, median {p50:.3f} s, 95th percentile {p95:.3f} s", flush=True)


def main() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    if not DIRECTORY.exists():
        kill_half_way(sys.argv[1], port)
    go_on(sys.argv[1], port)


if __name__ == "__main__":
    main()
