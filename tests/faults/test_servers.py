"""What an endpoint can do wrong, 47 times. Each costs what it must: a retry, one answer, or the run with a reason."""

import json
import re
import socket
import threading
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache

import pytest

pytest.importorskip("httpx")
from generation import endpoint, endpoint_reply  # noqa: E402
from generation.endpoint import OpenAIClient  # noqa: E402

KEY = "sk-secret-4242"
OTHERS = [f"q{i}" for i in range(6)]
USAGE = {"prompt_tokens": 3, "completion_tokens": 2}


def completion(content="bad", reason="stop", usage=USAGE, model="m", **message) -> dict:
    choice = {"index": 0, "finish_reason": reason, "message": {"role": "assistant", "content": content, **message}}
    return {"object": "chat.completion", "model": model, "choices": [choice], "usage": usage}


def http(body: bytes, status: str = "200 OK", *headers: str) -> bytes:
    lines = [f"HTTP/1.1 {status}", "Content-Type: application/json", f"Content-Length: {len(body)}"]
    lines += ["Connection: close", *headers, "", ""]
    return "\r\n".join(lines).encode("latin-1") + body


def sends(body, status: str = "200 OK", *headers: str) -> Callable:
    """What a server does that sends this body (JSON unless it is bytes) and closes."""
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    return lambda connection: connection.sendall(http(raw, status, *headers))


def error(status: str, said="no", *headers: str, **more) -> Callable:
    return sends({"error": {"message": said, **more}}, status, *headers)


def drip(connection: socket.socket, head: bytes) -> None:
    """A byte now and then, for ever: each read is quick."""
    connection.sendall(head)
    while True:
        connection.sendall(b" ")
        time.sleep(0.05)


def flood(connection: socket.socket, head: bytes) -> None:
    connection.sendall(head)
    while True:
        connection.sendall(b"x" * 65536)


def chunks_without_end(connection: socket.socket) -> None:
    connection.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    while True:
        connection.sendall(b"10000\r\n" + b" " * 65536 + b"\r\n")


@cache
def bomb() -> bytes:
    packer = zlib.compressobj(1, zlib.DEFLATED, 31)
    return packer.compress(b" " * 100_000_000) + packer.flush()


def gzip_bomb(connection: socket.socket) -> None:
    connection.sendall(http(bomb(), "200 OK", "Content-Encoding: gzip"))


def half(connection: socket.socket) -> None:
    raw = http(json.dumps(completion()).encode())
    connection.sendall(raw[:-30])


HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
DEEP = b'{"choices": ' + b"[" * 200_000


@dataclass
class Fault:
    """`once`: the server does it once and then behaves. `says`: what the answer's error, or the run's, matches."""

    name: str
    does: Callable[[socket.socket], None]
    costs: str  # "nothing" | "one answer" | "the run"
    says: str = ""
    once: bool = False
    text: str = "echo bad"  # of the answer, where it costs nothing
    settings: dict = field(default_factory=dict)


QUICK = {"timeout": 0.6}
FAULTS = [
    Fault("429, with a wait", error("429 Too Many", "slow down", "Retry-After: 0.01"), "nothing", once=True),
    Fault("429, to wait a year", error("429 Too Many", "no", "Retry-After: 31536000"), "nothing", once=True),
    Fault("429, to wait nan", error("429 Too Many", "no", "Retry-After: nan"), "nothing", once=True),
    Fault("429, to wait a superscript", error("429 Too Many", "no", "Retry-After: \u00b2"), "nothing", once=True),
    Fault("429, to wait until a date", error("429 No", "no", "Retry-After: Mon, 01 Jan 2001 00:00:00 GMT"), "nothing",
          once=True),
    Fault("500 for one question", error("500 Oops"), "one answer", "HTTP 500"),
    Fault("503 with 30 MB of words", sends(b"x" * 30_000_000, "503 Busy"), "one answer", "longer than"),
    Fault("cut in the middle", half, "one answer", "incomplete|peer closed"),
    Fault("hangs up without a word", lambda c: None, "one answer", "disconnected"),
    Fault("never answers", lambda c: time.sleep(30), "one answer", "no whole reply within", settings=QUICK),
    Fault("drips its body", lambda c: drip(c, HEAD + b"Content-Length: 999999\r\n\r\n"), "one answer",
          "no whole reply within", settings=QUICK),
    Fault("drips its headers", lambda c: drip(c, HEAD + b"X: "), "one answer", "no whole reply within", settings=QUICK),
    Fault("headers without end", lambda c: flood(c, HEAD + b"X: "), "one answer", "Protocol|header"),
    Fault("400 MB promised and sent", lambda c: flood(c, HEAD + b"Content-Length: 400000000\r\n\r\n"), "one answer",
          "longer than"),
    Fault("chunks without end", chunks_without_end, "one answer", "longer than"),
    Fault("100 MB in a small gzip", gzip_bomb, "one answer", "no chat completion"),
    Fault("no HTTP", lambda c: c.sendall(b"\x00\xffSSH-2.0\r\n\r\n"), "one answer", "Protocol"),
    Fault("HTML", sends(b"<html>\x00\xff"), "one answer", "no chat completion"),
    Fault("nothing in the body", sends(b""), "one answer", "no chat completion"),
    Fault("bytes that are no UTF-8", sends(b'{"choices": [{"message": {"content": "\xff"}}]}'), "one answer",
          "no chat completion"),
    Fault("JSON that is a list", sends([]), "one answer", "no chat completion"),
    Fault("JSON nested without end", sends(DEEP), "one answer", "no chat completion"),
    Fault("a number of 100,000 digits", sends(b'{"choices": ' + b"9" * 100_000 + b"}"), "one answer",
          "no chat completion"),
    Fault("no choice", sends({"choices": []}), "one answer", "no chat completion"),
    Fault("choices that are text", sends({"choices": "bad"}), "one answer", "no chat completion"),
    Fault("no text and no reason", sends(completion(None)), "one answer", "no text"),
    Fault("a text that is a number", sends(completion(7)), "one answer", "no text"),
    Fault("half a surrogate pair", sends(completion("a\ud83d")), "one answer", "no Unicode"),
    Fault("thoughts with half a surrogate pair", sends(completion("a", reasoning_content="\udc00")), "one answer",
          "no Unicode"),
    Fault("an unknown reason to stop", sends(completion(reason="abort")), "one answer", "finish_reason='abort'"),
    Fault("no reason to stop", sends(completion(reason=None)), "one answer", "finish_reason='None'"),
    Fault("a refusal in place of a text", sends(completion(None, refusal="I won't")), "nothing", text=""),
    Fault("usage as text", sends(completion(usage={"prompt_tokens": "3", "completion_tokens": "2"})), "nothing",
          text="bad"),
    Fault("usage below zero", sends(completion(usage={"prompt_tokens": -3, "completion_tokens": -2})), "nothing",
          text="bad"),
    Fault("usage that is a list", sends(completion(usage=[1, 2])), "nothing", text="bad"),
    Fault("no usage", sends(completion(usage=None)), "nothing", text="bad"),
    Fault("usage of 1e300", sends(completion(usage={"prompt_tokens": 10**300, "completion_tokens": 1})), "nothing",
          text="bad"),
    Fault("another model", sends(completion(model="m-mini")), "the run", "answered by 'm-mini'.*client.served_as"),
    Fault("another model with an escape", sends(completion(model="\x1b]52;c;AAAA\x07")), "the run", r"' \]52"),
    Fault("sends us elsewhere", sends(b"", "307 Gone", "Location: http://127.0.0.1:9/v1"), "the run", "HTTP 307"),
    Fault("does not know the key, and repeats it", error("401 No", f"bad key {KEY}"), "the run", r"\[key\]"),
    Fault("does not know the model", error("404 No", "no such model"), "the run", "no such model"),
    Fault("wants money", error("402 Pay", "no credit"), "the run", "no credit"),
    Fault("forbids one question", error("403 No", "flagged"), "one answer", "flagged"),
    Fault("finds one question too long", error("400 No", "'max_tokens' is too large: 20"), "one answer", "too large"),
    Fault("an error that is a number", sends(b"7", "400 No"), "one answer", "HTTP 400"),
    Fault("does not know a parameter", error("400 No", "Unsupported parameter", param="seed"), "nothing", once=True),
]  # fmt: skip


class Server:
    """Answers on loopback with an echo; a question that holds "bad" meets the fault."""

    def __init__(self, fault: Fault):
        self.fault, self.met, self.good = fault, 0, []
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}/v1"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self.listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        try:
            with connection, connection.makefile("rb") as reader:
                length = 0
                while (line := reader.readline().strip()) and b":" in line or line.startswith(b"POST"):
                    name, _, value = line.partition(b":")
                    length = int(value) if name.lower() == b"content-length" else length
                text = json.loads(reader.read(length))["messages"][-1]["content"]
                if "bad" in text and not (self.fault.once and self.met):
                    self.met += 1
                    self.fault.does(connection)
                else:
                    self.good.append(text)
                    sends(completion(f"echo {text}"))(connection)
        except (OSError, ValueError):
            pass  # the client hung up, as it should

    def stop(self) -> None:
        self.listener.close()


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_server_that_misbehaves_costs_what_it_must(fault, tmp_path, monkeypatch):
    monkeypatch.setattr(endpoint.tenacity, "wait_random_exponential", lambda **_: lambda state: 0.01)
    monkeypatch.setattr(endpoint_reply, "LONGEST_WAIT", 0.1)
    monkeypatch.setenv("FAULTY_KEY", KEY)
    server = Server(fault)
    settings = {"timeout": 20.0, "max_tries": 2} | fault.settings
    client = OpenAIClient(
        "m",
        base_url=server.url,
        api_key_env="FAULTY_KEY",
        max_parallel=2,
        requests_per_minute=None,
        cache=str(tmp_path),
        prompt_price=1e6,
        completion_price=1e6,
        max_cost=1e6,
        **settings,
    )
    texts = [*OTHERS[:3], "bad", *OTHERS[3:]]
    ask = {"temperature": 0.5, "max_tokens": 20, "seed": 0}
    conversations = [[{"role": "user", "content": text}] for text in texts]
    try:
        if fault.costs == "the run":
            with pytest.raises(ValueError, match=fault.says) as caught:
                client.ask(conversations, **ask)
            assert KEY not in str(caught.value) and str(caught.value).isprintable()
            return
        answers = dict(zip(texts, client.ask(conversations, **ask), strict=True))
    finally:
        server.stop()
        client.close()
    assert server.met >= 1
    assert [answers[text].text for text in OTHERS] == [f"echo {text}" for text in OTHERS]
    assert sorted(text for text in server.good if text != "bad") == OTHERS  # nobody is asked twice
    bad = answers["bad"]
    if fault.costs == "one answer":
        assert bad.missing and bad.text == "" and re.search(fault.says, bad.error), bad
    else:
        assert not bad.missing and bad.text == fault.text, bad
    assert min(bad.prompt_tokens, bad.completion_tokens, client.usage.cost) >= 0 and client.usage.cost < 1e6
    kept = (tmp_path / "answers.sqlite").read_bytes()
    assert KEY.encode() not in kept
