"""The page in a real browser, with two real checkpoints."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest

import train_sft
from arena.store import Store
from data.records import write_jsonl

pytestmark = pytest.mark.slow
playwright = pytest.importorskip("playwright.sync_api", reason="the dev extra is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
FLAGS = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-sync"]
NASTY = "<script>document.title = 'broken'</script> <b>bold</b> & {x}"


@pytest.fixture(scope="module")
def models(tmp_path_factory, sft_words):
    """Two tiny chatbots that differ in their seed."""
    directory = tmp_path_factory.mktemp("models")
    for seed in ("0", "1"):
        words = [*sft_words, f"seed={seed}", "num_steps=2", f"hydra.run.dir={directory}/{seed}"]
        subprocess.run([sys.executable, train_sft.__file__, *words], check=True, capture_output=True)
    return {f"model{seed}": directory / seed / "model" for seed in ("0", "1")}


@pytest.fixture
def arena(models, tmp_path):
    """An arena of the two, with ten items to annotate; yields (address, directory, process)."""
    rows = [{"prompt": f"question {n} {NASTY}", "chosen": f"yes {n}", "rejected": f"no {n}"} for n in range(10)]
    write_jsonl(tmp_path / "items.jsonl", rows)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    names = ",".join(f"{name}:{path}" for name, path in models.items())
    command = [
        sys.executable,
        "arena.py",
        f"models={{{names}}}",
        f"annotate=[{tmp_path}/items.jsonl]",
        f"port={port}",
        f"hydra.run.dir={tmp_path}/arena",
        "sampling.max_new_tokens=8",
        "refresh_seconds=1",
    ]
    root = os.path.dirname(train_sft.__file__)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=root)
    said = []
    for line in process.stdout:
        said.append(line)
        if "the arena is open" in line:
            break
    else:
        raise AssertionError("".join(said))
    yield f"http://127.0.0.1:{port}", tmp_path / "arena", process
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)


@pytest.fixture
def page():
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine (Debian: apt-get install chromium)")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_page()
        page.outside = []
        page.on("request", lambda r: "//127.0.0.1" in r.url or r.url.startswith("data:") or page.outside.append(r.url))
        yield page
        browser.close()


def value(page, where: str) -> str:
    return page.input_value(f"{where} textarea, {where} input")


def wait_for(check, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not check():
        assert time.monotonic() < end, "the page did not get there"
        time.sleep(0.1)


def test_a_blind_battle_is_voted_on_revealed_and_counted(arena, page):
    address, directory, _ = arena
    page.goto(address)
    page.fill("#message textarea", f"Hello {NASTY}")
    page.click("#send")
    wait_for(lambda: page.is_enabled("#vote-a"))
    assert NASTY in page.inner_text("#chat-A") and NASTY in page.inner_text("#chat-B")  # markup shows as text
    assert page.title() != "broken" and "model0" not in page.content() and "model1" not in page.content()  # blind
    page.click("#vote-a")
    wait_for(lambda: "Thank you" in value(page, "#notice"))
    assert "model0" in value(page, "#notice") and "model1" in value(page, "#notice")
    assert page.is_disabled("#vote-a")
    page.get_by_role("tab", name="Board").click()
    wait_for(lambda: "1 of 1 decided" in page.inner_text("body"))
    assert not page.outside, f"the page asked other hosts: {page.outside}"
    (battle,) = Store(directory / "arena.sqlite").battles()
    assert battle["verdict"] == "a" and battle["turns"][0]["prompt"] == f"Hello {NASTY}"


def test_ten_items_are_annotated_by_keys_alone(arena, page):
    address, directory, _ = arena
    page.goto(address)
    page.get_by_role("tab", name="Annotate").click()
    for number in range(10):
        wait_for(lambda number=number: NASTY in value(page, "#prompt") and value(page, "#ranking") == "")
        seen = value(page, "#prompt")
        page.click("h1, h2, body")  # no text field has the focus
        page.keyboard.press("2")
        if number == 3:
            page.keyboard.press("=")
        page.keyboard.press("1")
        wait_for(lambda number=number: value(page, "#ranking") == ("2=1" if number == 3 else "2 > 1"))
        page.keyboard.press("Enter")
        wait_for(lambda seen=seen: value(page, "#prompt") != seen)
    rows = Store(directory / "arena.sqlite").annotations()
    assert len(rows) == len({row["item"] for row in rows}) == 10
    assert sorted(map(tuple, (sorted(row["ranks"]) for row in rows))) == [(1, 1), *[(1, 2)] * 9]


def test_the_page_fits_a_telephone(arena, page):
    page.set_viewport_size({"width": 390, "height": 844})
    page.goto(arena[0])
    page.wait_for_selector("#send")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert page.is_visible("#message textarea") and page.is_visible("#send")


def test_an_open_address_wants_a_login(tmp_path):
    root = os.path.dirname(train_sft.__file__)
    words = ["models={a:x,b:y}", "host=0.0.0.0", f"hydra.run.dir={tmp_path}/arena"]
    done = subprocess.run([sys.executable, "arena.py", *words], cwd=root, capture_output=True, text=True)
    assert done.returncode == 2 and "without a login" in done.stderr and "Traceback" not in done.stderr
