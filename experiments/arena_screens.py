"""The screenshots of docs/arena.md: the three tabs in a real browser, in the sizes of a desktop and of a telephone.

    python experiments/arena_screens.py models="{sft:runs/coffee/sft/model,ppo:runs/coffee/ppo/model}" docs

It needs the arena and dev extras and Chromium (Debian: apt-get install chromium). The leaderboard shows simulated
votes.
"""

import argparse
import random
import signal
import socket
import subprocess
import sys
import tempfile
import uuid
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from playwright.sync_api import Page, sync_playwright  # noqa: E402

from arena.store import Store  # noqa: E402
from data.records import write_jsonl  # noqa: E402

FLAGS = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-sync"]
ITEM = {
    "prompt": [
        {"role": "user", "content": "Could I get an iced latte with oat milk?"},
        {"role": "assistant", "content": "Sure. Does the order on the screen look right?"},
        {"role": "user", "content": "Yes, thank you."},
    ],
    "completions": [
        "Great, your order will be ready at the coffee bar in a few minutes.",
        "OK.",
        "Okay, thank you. Your iced latte with oat milk will be waiting at the coffee bar.",
    ],
    "ranks": [1, 1, 1],
}


def add_votes(path: Path, names: list[str], count: int = 120) -> None:
    """Add votes of simulated people who prefer the later one of the names two times out of three."""
    store, rng = Store(path), random.Random(0)
    for n in range(count):
        pair = rng.sample(names, 2)
        battle = uuid.uuid4().hex
        store.begin_battle(battle, f"person_{n}", *pair)
        store.add_turn(battle, 1, "A latte, please", "Sure.", "Okay.")
        better = "b" if names.index(pair[1]) > names.index(pair[0]) else "a"
        worse = "a" if better == "b" else "b"
        verdict = rng.choices([better, worse, "tie"], [6, 3, 1])[0]
        store.vote(battle, f"person_{n}", verdict)
    store.close()


def take_screenshots(page: Page, address: str, out: Path, tag: str) -> None:
    """Take a screenshot of every tab."""
    page.goto(address)
    page.fill("#message textarea", "Hi, can I get a chai latte please?")
    page.click("#send")
    page.wait_for_selector("#vote-a:enabled")
    page.wait_for_timeout(500)
    page.screenshot(path=out / f"arena_battle{tag}.png")
    page.get_by_role("tab", name="Annotate").click()
    page.wait_for_timeout(800)
    page.screenshot(path=out / f"arena_annotate{tag}.png")
    page.get_by_role("tab", name="Board").click()
    page.wait_for_timeout(4000)
    page.screenshot(path=out / f"arena_board{tag}.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", help="as for arena.py: models={NAME:PATH,NAME:PATH}")
    parser.add_argument("out", type=Path, help="directory of the pictures")
    given = parser.parse_args()
    models, out = given.models, given.out
    names = [pair.split(":", 1)[0] for pair in models.partition("=")[2].strip("{}").split(",")]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as home:
        add_votes(Path(home) / "arena.sqlite", names)
        write_jsonl(Path(home) / "items.jsonl", [ITEM])
        overrides = [models, f"annotate=[{home}/items.jsonl]", f"port={port}", "sampling.max_new_tokens=40"]
        command = [sys.executable, "arena.py", *overrides, "resume=true", "refresh_seconds=2", f"hydra.run.dir={home}"]
        server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
        for line in server.stdout:
            if "the arena is open" in line:
                break
        try:
            with sync_playwright() as started:
                browser = started.chromium.launch(executable_path="/usr/bin/chromium", args=FLAGS)
                for tag, size in (("", (1200, 800)), ("_phone", (390, 844))):
                    page = browser.new_page(viewport={"width": size[0], "height": size[1]})
                    page.set_default_timeout(300_000)  # on a busy machine the page opens slowly
                    take_screenshots(page, f"http://127.0.0.1:{port}", out, tag)
                browser.close()
        finally:
            server.send_signal(signal.SIGINT)
            server.wait(timeout=60)


if __name__ == "__main__":
    main()
