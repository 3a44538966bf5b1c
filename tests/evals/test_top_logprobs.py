"""AlpacaEval 2's verdict from a served judge's log-probabilities, through the whole command."""

import json
import math
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from scipy.special import logsumexp

from tests.published_votes import SCRIPT, write_lines

QUALITY = {"good": 2.0, "base": 0.0}
FIRST = 0.7  # the judge's liking of what is shown first


class Judge:
    """An endpoint that names likely first tokens by the quality of the answers; some questions are odd."""

    def __init__(self):
        self.bodies, judge = [], self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *args):
                pass

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                judge.bodies.append(body)
                payload = json.dumps(judge.reply(body)).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(payload)))
                self.end_headers()
                self.wfile.write(payload)

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        self.tells = True
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def reply(self, body):
        text = body["messages"][-1]["content"]
        first, second = sorted(QUALITY, key=lambda model: text.index(f"{model} answers"))
        gap = QUALITY[first] - QUALITY[second] + FIRST
        likely = {"m": -2.0, "M": -2.0 - gap, "The": -5.0}
        if "Q3?" in text:
            likely = {"M": -0.01, "The": -5.0}  # the other identifier is not among them: it counts 0
        if "Q4?" in text:
            likely = {"The": -0.1, "Both": -3.0}
        top = [{"token": token, "logprob": value, "bytes": None} for token, value in likely.items()]
        token = max(likely, key=likely.get)
        choice = {"index": 0, "finish_reason": "length", "message": {"role": "assistant", "content": token}}
        if self.tells:
            choice["logprobs"] = {"content": [{"token": token, "logprob": likely[token], "top_logprobs": top}]}
        usage = {"prompt_tokens": 9, "completion_tokens": 1, "total_tokens": 10}
        return {"object": "chat.completion", "model": body["model"], "choices": [choice], "usage": usage}


@pytest.fixture
def judge():
    running = Judge()
    yield running
    running.http.shutdown()
    running.http.server_close()


def test_the_preference_is_alpaca_evals_share_of_two_identifiers(tmp_path, run_script, judge, capsys):
    questions = [{"question_id": str(i), "category": "a", "turns": [f"Q{i}?"]} for i in range(6)]
    answers = [
        {"question_id": str(i), "model_id": m, "choices": [{"turns": [f"{m} answers {i}" + "!" * i]}]}
        for m in ("base", "good")
        for i in range(6)
    ]
    files = [write_lines(tmp_path / f"{name}.jsonl", rows) for name, rows in (("q", questions), ("a", answers))]
    words = [
        "task=judge",
        "judge=alpaca_eval2",
        f"task.questions={files[0]}",
        f"task.answers=[{files[1]}]",
        "task.turns=1",
    ]
    served = ["client=openai", f"client.base_url={judge.url}", "client.model=gpt"]
    assert run_script(SCRIPT, *words, *served, f"hydra.run.dir={tmp_path}/out") == 0
    assert all(
        (b["logprobs"], b["top_logprobs"], b["max_tokens"], b["temperature"]) == (True, 5, 1, 1.0) for b in judge.bodies
    )
    rows = [json.loads(line) for line in (tmp_path / "out/verdicts.jsonl").read_text().splitlines()]
    found = {(row["question"], row["shown"]): row["preference"] for row in rows}
    for shown, gap in (("a", -2.0 + FIRST), ("b", 2.0 + FIRST)):  # of the answer shown first over the other
        m, M = -2.0, -2.0 - gap
        official = 2 - math.exp(m - logsumexp([m, M]))  # in [1, 2], of the second one shown
        expected = official - 1 if shown == "a" else 2 - official
        assert found["0", shown] == pytest.approx(expected)
    assert (found["3", "a"], found["3", "b"]) == (1.0, 0.0)
    assert found["4", "a"] is None
    result = json.loads((tmp_path / "out/result.json").read_text())
    assert result["errors"] == {"neither m nor M is among the likely tokens": 2} and result["judge"] == "gpt"
    asked = len(judge.bodies)
    assert run_script(SCRIPT, *words, *served, f"hydra.run.dir={tmp_path}/out", "overwrite=true") == 0
    assert len(judge.bodies) == asked  # what was told is kept
    rates = ("task=winrate", f"task.input=[{tmp_path}/out/verdicts.jsonl]", "task.format=verdicts")
    assert run_script(SCRIPT, *rates, f"hydra.run.dir={tmp_path}/rate") == 0
    rate = json.loads((tmp_path / "rate/result.json").read_text())
    known = [(found[q, "a"] + found[q, "b"]) / 2 for q in "01235"]
    assert rate["win_rate"] == pytest.approx(100 * sum(known) / 5) and rate["n_errors"] == 1


def test_a_server_without_log_probabilities_and_other_clients_are_refused(tmp_path, run_script, judge, capsys):
    judge.tells = False
    questions = [{"question_id": "0", "category": "a", "turns": ["Q0?"]}]
    answers = [{"question_id": "0", "model_id": m, "choices": [{"turns": [f"{m} answers"]}]} for m in ("base", "good")]
    files = [write_lines(tmp_path / f"{name}.jsonl", rows) for name, rows in (("q", questions), ("a", answers))]
    words = ["task=judge", "judge=alpaca_eval2", f"task.questions={files[0]}", f"task.answers=[{files[1]}]"]
    served = ["client=openai", f"client.base_url={judge.url}", "client.model=gpt"]
    assert run_script(SCRIPT, *words, *served, f"hydra.run.dir={tmp_path}/out") == 2
    assert "names no log-probabilities" in capsys.readouterr().err
    script = write_lines(tmp_path / "s.jsonl", [{"contains": "", "answers": ["m"]}])
    assert (
        run_script(SCRIPT, *words, "client=scripted", f"client.script={script}", f"hydra.run.dir={tmp_path}/bad") == 2
    )
    assert "client=scripted has none" in capsys.readouterr().err
    assert run_script(SCRIPT, *words, *served, "task.mode=single", f"hydra.run.dir={tmp_path}/bad") == 2
    assert "chooses between two answers" in capsys.readouterr().err
    assert run_script(SCRIPT, *words, *served, "judge.template=fastchat", f"hydra.run.dir={tmp_path}/bad") == 2
    assert "use alpaca_eval_clf" in capsys.readouterr().err
