"""What servers of 2026 ask of a client: other names of parameters, thinking, schemas, batches."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

pytest.importorskip("httpx")
from generation import batches  # noqa: E402
from generation.clients import split_reasoning  # noqa: E402
from generation.endpoint import OpenAIClient  # noqa: E402
from generation.endpoint_reply import same_model, unknown_parameter  # noqa: E402
from generation.scripted_client import ScriptedClient  # noqa: E402

ASK = {"temperature": 0.5, "max_tokens": 20, "seed": 0}
USAGE = {"prompt_tokens": 3, "completion_tokens": 2}


def talk(*texts: str) -> list:
    return [[{"role": "user", "content": text}] for text in texts]


class Server:
    """`answer(path, body) -> (status, object or text)` on loopback; `asked` holds every (path, body)."""

    def __init__(self, answer):
        self.asked, server = [], self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *args):
                pass

            def do_GET(self):
                raw = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                body = json.loads(raw) if raw[:1] == b"{" else raw.decode()
                server.asked.append((self.path, body))
                status, said = answer(self.path, body)
                sent = said.encode() if isinstance(said, str) else json.dumps(said).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(sent)))
                self.end_headers()
                self.wfile.write(sent)

            do_POST = do_GET

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()


@pytest.fixture
def serve():
    servers = []

    def start(answer) -> Server:
        servers.append(Server(answer))
        return servers[-1]

    yield start
    for server in servers:
        server.http.shutdown()
        server.http.server_close()


def client_of(server: Server, cache=None, **changed) -> OpenAIClient:
    settings = {
        "api_key_env": "TEST_KEY",
        "max_parallel": 1,
        "requests_per_minute": None,
        "timeout": 20,
        "max_tries": 2,
    }
    return OpenAIClient("m", base_url=server.url, cache=cache and str(cache), **settings | changed)


def reply(text: str | None, **message) -> dict:
    return {
        "model": "m",
        "usage": USAGE,
        "choices": [{"finish_reason": "stop", "message": {"content": text, **message}}],
    }


def test_a_parameter_that_the_server_does_not_know_is_left_out_once_and_for_all(serve):
    def answer(path, body):
        if "max_tokens" in body:
            said = "Unsupported parameter: 'max_tokens' is not supported here. Use 'max_completion_tokens' instead."
            return 400, {"error": {"message": said, "param": "max_tokens", "code": "unsupported_parameter"}}
        if "temperature" in body:
            return 400, {
                "error": {"message": "Only the default (1) value of 'temperature' is supported.", "param": None}
            }
        return 200, reply("yes")

    server = serve(answer)
    client = client_of(server)
    answers = client.ask(talk("a", "b", "c"), **ASK)
    assert [a.text for a in answers] == ["yes"] * 3 and len(server.asked) == 2 + 3
    assert client.usage.left_out == ["max_tokens", "temperature"] and client.usage.refused == 0
    assert server.asked[-1][1]["max_completion_tokens"] == 20


def test_the_limit_of_an_answer_is_never_left_out_altogether(serve):
    def answer(path, body):
        return 400, {
            "error": {
                "message": f"unknown parameter: {'max_tokens' if 'max_tokens' in body else 'max_completion_tokens'}"
            }
        }

    server = serve(answer)
    with pytest.raises(ValueError, match="refused all 1"):
        client_of(server).ask(talk("a"), **ASK)
    assert len(server.asked) == 2


@pytest.mark.parametrize(
    "said, name",
    [
        ({"error": {"message": "Unrecognized request argument supplied: seed"}}, "seed"),
        (
            {"detail": [{"type": "extra_forbidden", "loc": ["body", "seed"], "msg": "Extra inputs are not permitted"}]},
            "seed",
        ),
        ({"object": "error", "message": "`response_format` is not supported by this server"}, "response_format"),
        ({"error": {"message": "'max_tokens' is too large: 600. The context length is 512 tokens"}}, None),
        ({"error": {"message": "temperature must be below 2"}}, None),
        ({"error": {"message": "unknown field top_k"}}, None),
        ("nonsense", None),
    ],
)
def test_which_parameter_a_server_does_not_know(said, name):
    payload = {"seed": 1, "max_tokens": 2, "max_completion_tokens": 2, "temperature": 0.1, "response_format": {}}
    assert unknown_parameter(json.dumps(said).encode(), payload) == name


def test_temperature_none_further_fields_effort_and_schema_reach_the_server(serve):
    server = serve(lambda path, body: (200, reply('{"a": 1}')))
    client = client_of(server, extra_body={"top_k": 7}, reasoning_effort="low", thinking_tokens=100)
    client.ask(talk("q"), **ASK | {"temperature": None}, schema={"type": "object"})
    body = server.asked[0][1]
    assert "temperature" not in body and body["top_k"] == 7 and body["reasoning_effort"] == "low"
    assert body["max_tokens"] == body["max_completion_tokens"] == 120
    assert body["response_format"]["json_schema"]["schema"] == {"type": "object"}
    with pytest.raises(ValueError, match="extra_body sets seed"):
        client_of(server, extra_body={"seed": 7})


def test_other_options_and_another_address_are_other_questions(serve, tmp_path):
    servers = [serve(lambda path, body: (200, reply("one"))), serve(lambda path, body: (200, reply("two")))]
    texts = [client_of(server, tmp_path).ask(talk("q"), **ASK)[0].text for server in servers]
    assert texts == ["one", "two"]  # under one name of a model
    client_of(servers[0], tmp_path, reasoning_effort="high").ask(talk("q"), **ASK)
    assert len(servers[0].asked) == 2


@pytest.mark.parametrize(
    "text, thought, rest",
    [
        ("<think>\nhm\n</think>\n\nyes", "hm", "yes"),
        ("hm</think>\n\nyes", "hm", "yes"),
        ("<think>never ends", "never ends", ""),
        ("<Thinking>a</Thinking>b", "a", "b"),
        ("<think></think>yes", "", "yes"),
        ("The tag </think> closes it.", None, "The tag </think> closes it."),
        ("Write <think> and </think> around it.", None, "Write <think> and </think> around it."),
        ("yes", None, "yes"),
    ],
)
def test_thinking_is_told_from_the_answer(text, thought, rest):
    assert split_reasoning(text) == (thought, rest)


def test_thinking_is_kept_aside_by_every_client(serve, tmp_path):
    server = serve(lambda path, body: (200, reply("yes", reasoning_content="hm")))
    for client in (client_of(server, tmp_path), ScriptedClient(lambda r: "<think>hm</think>yes", cache=str(tmp_path))):
        for _ in range(2):  # the second time from the disk
            answer = client.ask(talk("q"), **ASK)[0]
            assert (answer.text, answer.reasoning) == ("yes", "hm")


@pytest.mark.parametrize(
    "said, asked, same",
    [
        ("gpt-4o-2024-08-06", "gpt-4o", True),
        ("gpt-4o-mini", "gpt-4o", False),
        ("openai/gpt-4o", "gpt-4o", True),
        ("gpt-4-0613", "gpt-4", True),
        ("Qwen3-8B", "qwen/qwen3-8b:free", True),
        ("llama-3-70b", "llama-3-8b", False),
        ("claude-x-20260101", "claude-x-latest", True),
        ("m2", "m", False),
    ],
)
def test_whose_answer_it_is(said, asked, same):
    assert same_model(said, asked) is same


class BatchServer:
    """`/files` and `/batches` that finish after two looks; a question "bad" comes back as an error."""

    def __init__(self):
        self.lines, self.batches, self.looks = {}, 0, 0

    def __call__(self, path, body):
        if path == "/v1/files":
            self.lines = [json.loads(line) for line in body.splitlines() if line.startswith("{")]
            return 200, {"id": "file-1"}
        if path == "/v1/batches":
            self.batches += 1
            return 200, {"id": f"batch-{self.batches}", "status": "validating"}
        if path.startswith("/v1/batches/"):
            self.looks += 1
            done = self.looks > 2
            more = {"output_file_id": "out", "error_file_id": "err"} if done else {}
            return 200, {"status": "completed" if done else "in_progress", **more}
        good = [line for line in self.lines if line["body"]["messages"][0]["content"] != "bad"]
        if path == "/v1/files/out/content":
            rows = [(line["custom_id"], 200, reply("echo " + line["body"]["messages"][0]["content"])) for line in good]
        else:
            bad = [line for line in self.lines if line not in good]
            rows = [(line["custom_id"], 400, {"error": {"message": "too long"}}) for line in bad]
        shaped = [{"custom_id": i, "response": {"status_code": s, "body": b}, "error": None} for i, s, b in rows]
        return 200, "\n".join(map(json.dumps, reversed(shaped)))


def test_a_batch_is_handed_in_once_and_its_answers_come_back_in_order(serve, tmp_path, monkeypatch):
    monkeypatch.setattr(batches, "FIRST_PAUSE", 0.01)
    behind = BatchServer()
    server = serve(behind)
    answers = client_of(server, tmp_path, batch=True).ask(talk("a", "bad", "b"), **ASK)
    assert [a.text for a in answers] == ["echo a", "", "echo b"] and answers[1].finish_reason == "refused"
    assert "too long" in answers[1].error and behind.batches == 1
    assert client_of(server, tmp_path, batch=True).ask(talk("a"), **ASK)[0].text == "echo a" and behind.batches == 1


def test_a_killed_run_goes_on_waiting_for_its_batch(serve, tmp_path, monkeypatch):
    monkeypatch.setattr(batches, "FIRST_PAUSE", 0.01)
    behind = BatchServer()
    server = serve(behind)
    monkeypatch.setattr(batches._Server, "results", lambda self, batch: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        client_of(server, tmp_path, batch=True).ask(talk("a", "b"), **ASK)
    monkeypatch.undo()
    monkeypatch.setattr(batches, "FIRST_PAUSE", 0.01)
    answers = client_of(server, tmp_path, batch=True).ask(talk("a", "b"), **ASK)
    assert [a.text for a in answers] == ["echo a", "echo b"] and behind.batches == 1


def test_a_batch_that_could_cost_too_much_is_not_handed_in(serve):
    behind = BatchServer()
    with pytest.raises(ValueError, match="max_cost"):
        client_of(serve(behind), batch=True, completion_price=1e6, max_cost=39.0).ask(talk("a", "b"), **ASK)
    assert behind.batches == 0
