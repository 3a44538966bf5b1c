"""A client asks everything once, keeps what it heard, and survives a server that does not behave."""

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from generation.local_client import LocalClient
from generation.scripted_client import ScriptedClient, scripted_replies

pytest.importorskip("httpx")
from generation import endpoint  # noqa: E402
from generation.endpoint import OpenAIClient  # noqa: E402

ROOT = Path(__file__).parents[2]
ASK = {"temperature": 0.5, "max_tokens": 20, "seed": 0}


def question(text: str) -> list[dict]:
    return [{"role": "user", "content": text}]


def hang_up(http) -> None:
    http.wfile.flush()
    http.connection.shutdown(socket.SHUT_RDWR)
    http.close_connection = True


class Server:
    """An endpoint on loopback that answers each question with its echo, after the faults that a test lists.

    `faults[question]` is a list used up front to back: a status, "cut", "garbage", "not json", "die" or "slow".
    """

    def __init__(self, port: int = 0):
        self.faults: dict[str, list] = {}
        self.answered, self.received, self.starts = Counter(), Counter(), []
        self.headers: list[str] = []
        self.in_flight = self.most_in_flight = 0
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args):
                pass

            def do_POST(self):
                server.in_flight += 1
                server.most_in_flight = max(server.most_in_flight, server.in_flight)
                try:
                    server.handle(self)
                finally:
                    server.in_flight -= 1

        self.http = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def handle(self, http) -> None:
        body = json.loads(http.rfile.read(int(http.headers["Content-Length"])))
        text = body["messages"][-1]["content"]
        self.starts.append(time.monotonic())
        self.received[text] += 1
        self.headers.append(http.headers["Authorization"])
        fault = self.faults[text].pop(0) if self.faults.get(text) else None
        message = {"role": "assistant", "content": f"echo {text}"}
        reply = {
            "id": "1",
            "object": "chat.completion",
            "created": 0,
            "model": body["model"],
            "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
            "usage": {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5},
        }
        if fault == "garbage":
            reply = {"detail": "\u0000\ufffd garbage"}
        payload = b"<html>\x00\xff" if fault == "not json" else json.dumps(reply).encode()
        if isinstance(fault, int):
            http.send_response(fault)
            if fault == 429:
                http.send_header("Retry-After", "0.05")
            payload = json.dumps({"error": {"message": f"no: {http.headers['Authorization']}"}}).encode()
        elif fault == "die":
            hang_up(http)
            return
        else:
            http.send_response(200)
        http.send_header("Content-Type", "application/json")
        http.send_header("Content-Length", str(len(payload)))
        http.end_headers()
        if fault == "slow":
            time.sleep(2.5)
        http.wfile.write(payload[: len(payload) // 2] if fault == "cut" else payload)
        if fault == "cut":
            hang_up(http)
        elif fault is None:
            self.answered[text] += 1

    def stop(self) -> None:
        self.http.shutdown()
        self.http.server_close()


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(endpoint.tenacity, "wait_random_exponential", lambda **_: lambda state: 0.01)
    running = Server()
    yield running
    running.stop()


def client_of(server: Server, cache, **changed) -> OpenAIClient:
    settings = {
        "base_url": server.url,
        "api_key_env": "TEST_KEY",
        "max_parallel": 8,
        "requests_per_minute": None,
        "timeout": 20,
        "max_tries": 4,
        "cache": str(cache),
    }
    return OpenAIClient("some-model", **settings | changed)


@pytest.mark.parametrize("fault", [429, 500, 502, 503, 408, "cut", "garbage", "not json", "die", "slow"], ids=str)
def test_a_fault_that_passes_loses_no_row_and_repeats_only_itself(server, tmp_path, fault):
    texts = [f"q{i}" for i in range(12)]
    server.faults = {"q3": [fault, fault], "q7": [fault]}
    client = client_of(server, tmp_path, timeout=1.5 if fault == "slow" else 20)
    answers = client.ask([question(text) for text in texts], **ASK)
    assert [answer.text for answer in answers] == [f"echo {text}" for text in texts]
    assert server.answered == Counter(texts)
    assert sum(server.received.values()) == 12 + 3 and client.usage.retries == 3


def test_a_server_that_dies_half_way_is_asked_only_for_the_rest(server, tmp_path):
    texts = [f"q{i}" for i in range(30)]
    server.faults = {f"q{i}": [500] * 99 for i in range(15, 30)}
    with pytest.raises(ValueError, match="resume=true"):
        client_of(server, tmp_path, max_tries=2).ask([question(text) for text in texts], **ASK)
    kept = set(server.answered)
    assert len(kept) >= 15
    server.faults = {}
    client = client_of(server, tmp_path)
    answers = client.ask([question(text) for text in texts], **ASK)
    assert [answer.text for answer in answers] == [f"echo {text}" for text in texts]
    assert set(server.answered.values()) == {1}
    assert client.usage.from_cache == len(kept) and client.usage.asked == 30 - len(kept)


def test_no_request_starts_after_the_endpoint_was_given_up(server, tmp_path):
    server.faults = {f"q{i}": [500] * 99 for i in range(400)}
    with pytest.raises(ValueError, match="after 2 tries"):
        client_of(server, tmp_path, max_tries=2, max_parallel=4).ask([question(f"q{i}") for i in range(400)], **ASK)
    assert server.received["q0"] == 2 and len(server.received) <= 3 + 4


def test_one_question_that_the_endpoint_cannot_answer_costs_one_answer(server, tmp_path):
    server.faults = {"q7": [500] * 99}
    client = client_of(server, tmp_path, max_tries=2, max_parallel=1)
    answers = client.ask([question(f"q{i}") for i in range(20)], **ASK)
    assert [i for i, answer in enumerate(answers) if answer.missing] == [7]
    assert answers[7].finish_reason == "failed" and "HTTP 500" in answers[7].error and client.usage.failed == 1
    server.faults = {}
    assert client_of(server, tmp_path).ask([question("q7")], **ASK)[0].text == "echo q7"


def test_an_endpoint_that_is_not_there_says_so(server, tmp_path):
    server.stop()
    with pytest.raises(ValueError, match="gave no answer"):
        client_of(server, tmp_path, max_tries=2).ask([question("q")], **ASK)


def test_a_refused_request_is_an_answer_of_its_own_and_is_not_kept(server, tmp_path):
    server.faults = {"long": [400]}
    client = client_of(server, tmp_path)
    answers = client.ask([question("long"), question("short")], **ASK)
    assert [answer.finish_reason for answer in answers] == ["refused", "stop"] and answers[0].text == ""
    assert client_of(server, tmp_path).ask([question("long")], **ASK)[0].text == "echo long"


def test_an_endpoint_that_refuses_everything_is_an_error(server, tmp_path):
    server.faults = {"a": [422], "b": [422]}
    with pytest.raises(ValueError, match="refused all 2"):
        client_of(server, tmp_path).ask([question("a"), question("b")], **ASK)


def test_a_wrong_key_is_not_tried_again(server, tmp_path):
    server.faults = {"q": [401]}
    with pytest.raises(ValueError, match="HTTP 401"):
        client_of(server, tmp_path).ask([question("q")], **ASK)
    assert server.received["q"] == 1


def test_the_key_reaches_the_server_and_no_message_or_file(server, tmp_path, monkeypatch):
    monkeypatch.setenv("TEST_KEY", "sk-secret-123")
    server.faults = {"q": [401], "bad": [400]}
    client = client_of(server, tmp_path)
    with pytest.raises(ValueError) as caught:
        client.ask([question("q")], **ASK)
    refused = client.ask([question("bad"), question("good")], **ASK)[0]
    assert server.headers[0] == "Bearer sk-secret-123"  # and the server's error repeats it
    client.close()
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert b"sk-secret" not in written and "sk-secret" not in str(caught.value) + refused.error


def test_a_remote_endpoint_without_a_key_is_refused_and_names_the_variable(monkeypatch):
    monkeypatch.delenv("TEST_KEY", raising=False)
    settings = {"max_parallel": 1, "requests_per_minute": None, "timeout": 1, "max_tries": 1, "cache": None}
    with pytest.raises(ValueError, match="TEST_KEY"):
        OpenAIClient("m", base_url="https://llm.example/v1", api_key_env="TEST_KEY", **settings)
    with pytest.raises(ValueError, match="name, password or query"):
        OpenAIClient("m", base_url="http://me:secret@127.0.0.1/v1", api_key_env="TEST_KEY", **settings)


def test_equal_questions_are_asked_once_and_other_settings_are_other_questions(server, tmp_path):
    client = client_of(server, tmp_path)
    client.ask([question("a"), question("a"), question("b")], **ASK)
    client.ask([question("a")], **ASK)
    assert server.received == Counter(a=1, b=1)
    client.ask([question("a")], **ASK | {"seed": 1})
    client.ask([question("a")], **ASK | {"temperature": 0.9})
    client.ask([question("a")], stop=["x"], **ASK)
    client.ask([question("a")] * 2, **ASK | {"seed": [0, 2]})
    assert server.received["a"] == 5


def test_requests_in_flight_and_per_minute_stay_under_their_limits(server, tmp_path):
    client_of(server, tmp_path, max_parallel=3).ask([question(f"q{i}") for i in range(20)], **ASK)
    assert server.most_in_flight <= 3
    server.starts.clear()
    client_of(server, tmp_path, requests_per_minute=1200).ask([question(f"r{i}") for i in range(8)], **ASK)
    assert max(server.starts) - min(server.starts) >= 0.2  # 7 x 0.05 s, but a busy machine may hear the first one late


def test_the_cost_limit_is_never_passed_and_a_higher_one_goes_on(server, tmp_path):
    questions = [question(f"q{i}") for i in range(10)]
    prices = {"prompt_price": 1e6, "completion_price": 1e6}  # one unit a token: an answer costs 5
    client = client_of(server, tmp_path, **prices, max_cost=80.0)
    assert client.cost_bound(questions, max_tokens=20) == 10 * (2 + 32 + 20)
    with pytest.raises(ValueError, match="client.max_cost"):
        client.ask(questions, **ASK)
    assert 0 < client.usage.cost <= 80.0 and client.usage.cost == 5 * len(server.answered)
    client = client_of(server, tmp_path, **prices, max_cost=200.0)
    client.ask(questions, **ASK)
    assert client.usage.cost == 50 and set(server.answered.values()) == {1}


def test_a_killed_process_asks_nothing_twice(server, tmp_path):
    code = f"""
from generation.endpoint import OpenAIClient
c = OpenAIClient("m", base_url={server.url!r}, api_key_env="X", max_parallel=1, requests_per_minute=None, timeout=60,
                 max_tries=1, cache={str(tmp_path)!r})
c.ask([[{{"role": "user", "content": f"q{{i}}"}}] for i in range(40)], temperature=0.0, max_tokens=5, seed=0)
"""
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    server.faults = {"q20": ["slow"]}
    first = subprocess.Popen([sys.executable, "-c", code], env=env)
    while server.received["q20"] == 0:
        assert first.poll() is None
        time.sleep(0.01)
    first.kill()
    first.wait()
    subprocess.run([sys.executable, "-c", code], env=env, check=True)
    asked_again = {text for text, count in server.received.items() if count > 1}
    assert asked_again <= {"q19", "q20"}  # in flight, or not yet on disk, when the process died
    assert len(server.received) == 40


def test_scripted_answers_are_a_function_of_question_and_seed(tmp_path):
    rules = [{"contains": "colour", "answers": ["red", "blue", "green"]}, {"contains": "", "answers": ["yes"]}]
    script = tmp_path / "script.jsonl"
    script.write_text("\n".join(map(json.dumps, rules)))
    ask = [question(f"colour {i}") for i in range(30)] + [question("else")]
    first = ScriptedClient(scripted_replies(str(script))).ask(ask, **ASK)
    again = ScriptedClient(scripted_replies(str(script))).ask(ask, **ASK)
    other = ScriptedClient(scripted_replies(str(script))).ask(ask, **ASK | {"seed": 5})
    assert (
        first == again != other and first[-1].text == "yes" and {a.text for a in first[:-1]} == {"red", "blue", "green"}
    )


def test_bad_settings_are_named():
    client = ScriptedClient(lambda request: "x")
    with pytest.raises(ValueError, match="max_tokens"):
        client.ask([question("a")], temperature=0.0, max_tokens=0, seed=0)
    with pytest.raises(ValueError, match="max_cost"):
        ScriptedClient(lambda request: "x", max_cost=-1)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    from data.tokenizer import train_sentencepiece
    from model.build import export_model, new_policy
    from tests.tiny_models import tiny_config

    home = tmp_path_factory.mktemp("checkpoint")
    texts = [f"question number {i}: {word} and tea" for i in range(50) for word in ("coffee", "milk", "water")]
    tokenizer = train_sentencepiece(texts, 320, home / "tokenizer")
    policy = new_policy(tiny_config(vocab_size=tokenizer.vocab_size, max_length=64), seed=0)
    export_model(policy, home / "model", tokenizer)
    return str(home / "model")


def test_a_checkpoints_answer_depends_on_its_request_and_not_on_the_batch(checkpoint, tmp_path):
    settings = {"top_k": 0, "top_p": 1.0, "precision": "fp32"}
    asked = [question(f"question number {i} " + "tea " * i) for i in range(7)]
    whole = LocalClient(checkpoint, batch_size=4, cache=str(tmp_path), **settings)
    answers = whole.ask(asked, **ASK)
    alone = LocalClient(checkpoint, batch_size=1, cache=None, **settings).ask(asked[3:4], **ASK)
    assert alone == answers[3:4]
    again = LocalClient(checkpoint, batch_size=2, cache=str(tmp_path), **settings)
    assert again.ask(asked, **ASK) == answers and again.usage.asked == 0
    copy = shutil.copytree(checkpoint, tmp_path / "trained_again")  # another path, other times
    repeated = LocalClient(str(copy), batch_size=4, cache=str(tmp_path), **settings)
    assert repeated.ask(asked, **ASK) == answers and repeated.usage.asked == 7
    assert whole.ask(asked, **ASK | {"seed": 9}) != answers
    assert all(0 < answer.completion_tokens <= 20 and answer.finish_reason in ("stop", "length") for answer in answers)
    with pytest.raises(ValueError, match="window of 64"):
        whole.ask(asked, **ASK | {"max_tokens": 64})
