"""Pages of the checks in a real browser: on a phone nothing but tables is wider than the screen."""

import shutil

import pytest
from text_samples import tiny_tokenizer

from data.records import Comparison
from data.view import show, trace
from runtime.report import bullets, heading, table, write_page

pytestmark = pytest.mark.slow
playwright = pytest.importorskip("playwright.sync_api", reason="the dev extra is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
LONG = "data/a_directory_with_a_rather_long_name/preferences_of_many_people_train.jsonl.gz:1234"


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine (Debian: apt-get install chromium)")
def test_pages_fit_a_phone_and_a_desk(tmp_path):
    rows = [["file", *(f"column {i}" for i in range(20))], [LONG, *range(20)]]
    write_page(tmp_path / "table.html", "Deduplicated", bullets([LONG]), heading(LONG), table(rows))
    pair = Comparison([{"role": "user", "content": LONG}], "word " * 30, "w" * 200)
    sides = trace(pair, tiny_tokenizer(), max_length=400, max_prompt_length=200)
    show(tmp_path, "view", "Training rows", [(LONG, sides)], [LONG])
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        for width in (360, 1200):
            for name in ("table", "view"):
                page = browser.new_page(viewport={"width": width, "height": 800})
                page.goto((tmp_path / f"{name}.html").as_uri())
                assert page.evaluate("document.documentElement.scrollWidth") == width, (name, width)
                page.screenshot(path=str(tmp_path / f"{name}_{width}.png"))
            across = page.evaluate("new Set([...document.querySelectorAll('.side')].map(s => s.offsetTop)).size")
            assert across == (2 if width == 360 else 1)  # below each other on a phone, beside each other on a desk
        browser.close()
