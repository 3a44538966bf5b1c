"""make_data.py and check_data.py from the command line: files, exit codes, going on after a kill."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("httpx")
import check_data  # noqa: E402
import make_data  # noqa: E402

ROOT = Path(__file__).parents[1]
MAKE_DATA = SimpleNamespace(train=make_data.make_data, __name__="make_data")  # what the fixture `run_script` opens
CHECK_DATA = SimpleNamespace(train=check_data.check_data, __name__="check_data")
RULES = [
    {"contains": "Name a fitting profession", "answers": ["Assistant: Chemist\nUser: Tea Trader"]},
    {"contains": "Make it one specific task", "answers": ["Blend a tea for a rainy day.", "Name a new tea."]},
    {
        "contains": "you instruct",
        "answers": ["Instruction: choose the leaves.", "Instruction: name the price.", "TASK_DONE"],
    },
    {"contains": "", "answers": ["Solution: take two parts of black tea.", "Solution: three crowns a cup."]},
]


def start(script: str, *words: str) -> subprocess.Popen:
    command = [sys.executable, script, *map(str, words)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def call(script: str, *words: str) -> tuple[int, str, str]:
    process = start(script, *words)
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


@pytest.fixture
def script(tmp_path) -> Path:
    path = tmp_path / "script.jsonl"
    path.write_text("\n".join(map(json.dumps, RULES)))
    return path


def camel_words(script: Path, home: Path) -> list:
    return ["method=camel", "client=scripted", f"client.script={script}", "method.num=6", f"hydra.run.dir={home}"]


def test_make_data_writes_rows_and_a_manifest_and_refuses_to_write_over_them(script, tmp_path, run_script, capsys):
    assert run_script(MAKE_DATA, *camel_words(script, tmp_path / "a")) == 0
    rows = [json.loads(line) for line in (tmp_path / "a/data.jsonl").read_text().splitlines()]
    facts = json.loads((tmp_path / "a/manifest.json").read_text())
    assert facts["rows"] == len(rows) > 0 and facts["method"] == "camel" and facts["settings"]["num"] == 6
    assert all(row["license"] == facts["license"] and row["messages"] for row in rows)
    assert f"{len(rows)} rows" in capsys.readouterr().out
    before = (tmp_path / "a/data.jsonl").read_bytes()
    code, err = run_script(MAKE_DATA, *camel_words(script, tmp_path / "a")), capsys.readouterr().err
    assert code == 2 and "resume=true" in err and "Traceback" not in err
    assert (tmp_path / "a/data.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    "words, message",
    [
        (["method=camel"], "client=openai"),
        (["method=camel", "client=openai", "client.model=m", "client.base_url=nonsense"], "nonsense"),
    ],
)
def test_make_data_refuses_bad_settings_with_exit_code_2(words, message, tmp_path):
    code, _, err = call("make_data.py", *words, f"hydra.run.dir={tmp_path / 'a'}")
    assert code == 2 and message in err and "Traceback" not in err
    assert not (tmp_path / "a/data.jsonl").exists()


def test_check_data_writes_its_result_and_names_a_bad_row(tmp_path, run_script, capsys):
    votes = tmp_path / "votes.jsonl"
    rows = [{"item": i, "annotator": a, "label": "xy"[i % 2]} for i in range(30) for a in "pq"]
    votes.write_text("\n".join(map(json.dumps, rows)))
    words = ["check=agreement", f"check.input=[{votes}]"]
    assert run_script(CHECK_DATA, *words, f"hydra.run.dir={tmp_path}/a") == 0
    result = json.loads((tmp_path / "a/result.json").read_text())
    assert result["passed"] and result["krippendorff_alpha"]["value"] == 1.0
    assert "passed" in capsys.readouterr().out
    votes.write_text(votes.read_text() + '\n{"item": 1')
    code, err = run_script(CHECK_DATA, *words, f"hydra.run.dir={tmp_path}/b"), capsys.readouterr().err
    assert code == 2 and "votes.jsonl:61" in err and "Traceback" not in err


def test_a_killed_script_goes_on_to_the_same_rows(tmp_path):
    """Against a slow endpoint on loopback, killed with SIGKILL in the middle."""
    server = subprocess.Popen(
        [sys.executable, "-c", SLOW_SERVER],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    try:
        url = server.stdout.readline().strip()
        words = [
            "method=camel",
            "client=openai",
            f"client.base_url={url}",
            "client.model=m",
            "method.num=4",
            "client.max_parallel=2",
            "method.max_turns=4",
        ]
        first = start("make_data.py", *words, f"hydra.run.dir={tmp_path / 'a'}")
        while _asked(url) < 12:
            assert first.poll() is None, first.stderr.read()
            time.sleep(0.02)
        first.send_signal(signal.SIGKILL)
        first.wait()
        code, _, err = call("make_data.py", *words, f"hydra.run.dir={tmp_path / 'a'}", "resume=true")
        assert code == 0, err
        whole_before = _asked(url)
        code, _, err = call("make_data.py", *words, f"hydra.run.dir={tmp_path / 'b'}")
        assert code == 0, err
        assert (tmp_path / "a/data.jsonl").read_bytes() == (tmp_path / "b/data.jsonl").read_bytes()
        whole = _asked(url) - whole_before
        assert whole <= whole_before <= whole + 4  # in flight at the kill, or on their way to the disk; no other
        facts = [json.loads((tmp_path / f"{run}/manifest.json").read_text()) for run in "ab"]
        assert facts[0]["usage"]["client"]["from_cache"] > 0
        assert facts[0]["usage"]["client"]["prompt_tokens"] == facts[1]["usage"]["client"]["prompt_tokens"]
    finally:
        server.kill()
        server.wait()


def _asked(url: str) -> int:
    import urllib.request

    with urllib.request.urlopen(url + "/count") as reply:
        return int(reply.read())


SLOW_SERVER = """
import hashlib, json, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from tests.test_data_scripts import RULES
asked = 0
class Handler(BaseHTTPRequestHandler):
    def log_message(self, *args): pass
    def send(self, body):
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def do_GET(self):
        self.send(str(asked).encode())
    def do_POST(self):
        global asked
        asked += 1
        raw = self.rfile.read(int(self.headers["Content-Length"]))
        body = json.loads(raw)
        text = "\\n".join(m["content"] for m in body["messages"])
        rule = next(rule for rule in RULES if rule["contains"] in text)
        answer = rule["answers"][int(hashlib.sha256(raw).hexdigest(), 16) % len(rule["answers"])]
        time.sleep(0.03)
        choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": answer}}
        usage = {"prompt_tokens": len(text), "completion_tokens": 3, "total_tokens": 0}
        reply = {"id": "", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice], "usage": usage}
        self.send(json.dumps(reply).encode())
server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
print(f"http://127.0.0.1:{server.server_port}", flush=True)
server.serve_forever()
"""


REWARD = """
def gold(prompts, completions, answer, **columns):
    assert len(answer) == len(completions) == len(prompts)
    return [float(right in said) - 0.01 * len(said) for right, said in zip(answer, completions)]
"""
ASKED = [("Name a bird.", "crow"), ("Name a fish.", "pike"), ("Name a tree.", "larch"), ("Name a stone.", "opal")]
SAID = ["Surely a crow.", "A pike it is, I should say.", "A pike.", "One is the larch.", "I cannot say."]


def test_a_reward_that_needs_what_no_prompt_has_is_refused_before_anything_is_asked(
    script, tmp_path, run_script, capsys
):
    """reward=length counts tokens, which PPO has and a client has not."""
    words = ["method=best_of", "client=scripted", f"client.script={script}", "method.reward_fn=length"]
    assert run_script(MAKE_DATA, *words, f"client.cache={tmp_path}/cache", f"hydra.run.dir={tmp_path}/made") == 2
    assert "method.reward_fn: reward function length needs tokens, which is not given here" in capsys.readouterr().err
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("pairs", ["best", "best_worst"])
def test_best_of_judges_a_completion_by_the_columns_of_its_own_prompt(tmp_path, pairs):
    """Through make_data.py: each prompt's `answer` reaches the reward beside its own completions, and no other's."""
    from data import formats

    (tmp_path / "reward.py").write_text(REWARD)
    rows = [{"id": str(i), "prompt": asked, "answer": answer} for i, (asked, answer) in enumerate(ASKED)]
    for name, lines in (("prompts", rows), ("script", [{"contains": "", "answers": SAID}])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    code, _, err = call(
        "make_data.py",
        "method=best_of",
        "client=scripted",
        f"client.script={tmp_path}/script.jsonl",
        "method.num=4",
        f"method.prompts=[{tmp_path}/prompts.jsonl]",
        f"method.reward_fn={tmp_path}/reward.py:gold",
        "method.num_completions=64",
        f"method.pairs={pairs}",
        "method.min_margin=0.5",
        f"hydra.run.dir={tmp_path}/made",
    )
    assert code == 0, err
    made = [json.loads(line) for line in (tmp_path / "made/data.jsonl").read_text().splitlines()]
    best = [
        "Surely a crow.",
        "A pike.",
        "One is the larch.",
    ]  # of the two with a pike the shorter; nobody named the opal
    if pairs == "best":
        assert [row["completion"] for row in made] == best
        assert [row["score"] for row in made] == pytest.approx([1 - 0.01 * len(text) for text in best])
        examples = [formats.examples(row)[0].messages for row in made]
        assert [[m["content"] for m in said] for said in examples] == [
            [asked, text] for (asked, _), text in zip(ASKED, best, strict=False)
        ]
    else:
        records = [formats.preferences(row)[0] for row in made]
        assert [record.chosen for record in records] == best
        worst = ["A pike it is, I should say.", "One is the larch.", "A pike it is, I should say."]
        assert [record.rejected for record in records] == worst
    dropped = [json.loads(line) for line in (tmp_path / "made/dropped.jsonl").read_text().splitlines()]
    ties = [row for row in dropped if row["reason"] == "tie"]
    assert len(ties) == 1 and "stone" in json.dumps(ties)
