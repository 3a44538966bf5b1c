"""The arena behind a proxy and beside other pages: whom it answers, how much it reads, and what it tells browsers."""

import asyncio
from types import SimpleNamespace

import pytest
import uvicorn

from arena import serving
from arena.guard import LOGINS_PER_MINUTE, OVERHEAD, Guard
from arena.settings import allowed_names, check
from arena.store import Store
from data.records import write_jsonl

FOREIGN = "https://evil.example"


async def echo(scope, receive, send):
    """An application that reads the whole body, sets gradio's cookie, and lets every page read its answer."""
    while (await receive()).get("more_body"):
        pass
    headers = [(b"set-cookie", b"access-token-x=1; HttpOnly; Path=/; SameSite=none; Secure")]
    headers += [(b"access-control-allow-origin", b"*"), (b"access-control-allow-credentials", b"true")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": b"whole"})


@pytest.fixture
def ask():
    """ask(method, path, headers, body) -> (status, headers) of a page that is known as localhost and arena.example."""
    guard = Guard(echo, hosts=["localhost", "arena.example"], max_characters=100)

    def ask(method="GET", path="/", body=(b"",), client="10.0.0.1", **headers: str):
        headers = {"host": "arena.example"} | {name.replace("_", "-"): value for name, value in headers.items()}
        scope = {"type": "http", "method": method, "path": path, "client": (client, 1)}
        scope["headers"] = [(name.encode(), value.encode()) for name, value in headers.items()]
        pieces, sent = list(body), []

        async def receive():
            return {"type": "http.request", "body": pieces.pop(0), "more_body": bool(pieces)}

        async def send(message):
            sent.append(message)

        asyncio.run(guard(scope, receive, send))
        return sent[0]["status"], dict(sent[0]["headers"])

    return ask


@pytest.mark.parametrize(
    "host, status",
    [("arena.example", 200), ("ARENA.example:8443", 200), ("localhost:7860", 200), ("evil.example", 421), ("", 421)]
    + [("arena.example.evil.example", 421), ("127.0.0.1", 421), ("[", 421)],
)
def test_it_answers_under_its_own_names_only(ask, host, status):
    assert ask(host=host)[0] == status


@pytest.mark.parametrize(
    "headers, status",
    [
        ({}, 200),  # no browser
        ({"origin": "https://arena.example"}, 200),
        ({"origin": FOREIGN}, 403),
        ({"origin": "null"}, 403),
        ({"sec_fetch_site": "cross-site"}, 403),
        ({"sec_fetch_site": "same-origin", "origin": "https://arena.example"}, 200),
    ],
)
def test_no_other_page_votes_for_its_visitor(ask, headers, status):
    assert ask("POST", "/gradio_api/queue/join", **headers)[0] == status


def test_no_other_page_reads_or_frames_an_answer_and_cookies_stay_at_home(ask):
    status, headers = ask(origin=FOREIGN)
    assert status == 200 and not [name for name in headers if name.startswith(b"access-control")]
    assert headers[b"set-cookie"].endswith(b"SameSite=Lax") and b"none" not in headers[b"set-cookie"]
    assert headers[b"x-frame-options"] == b"DENY" and b"frame-ancestors 'none'" in headers[b"content-security-policy"]
    assert ask(host="evil.example")[1][b"x-frame-options"] == b"DENY"  # a refusal, too


def test_a_body_has_a_limit_whether_it_says_its_length_or_not(ask):
    most = OVERHEAD + 12 * 100
    assert ask("POST", content_length=str(most + 1))[0] == 413
    assert ask("POST", body=[b"x" * most])[0] == 200
    assert ask("POST", body=[b"x" * 1000] * (most // 1000 + 1))[0] == 413


def test_passwords_are_not_guessed_by_the_thousand(ask):
    tried = [ask("POST", "/login")[0] for _ in range(LOGINS_PER_MINUTE + 5)]
    assert tried == [200] * LOGINS_PER_MINUTE + [429] * 5
    assert ask("POST", "/login", client="10.0.0.2")[0] == 200 and ask("GET", "/login")[0] == 200


def test_a_page_for_others_has_a_login_whose_file_is_private(compose, tmp_path):
    accounts = tmp_path / "accounts"
    accounts.write_text("ann:secret\n")
    words = ["models={a:x,b:y}", "hosts=[arena.example]"]
    with pytest.raises(ValueError, match="without a login"):
        check(compose("arena", *words))
    accounts.chmod(0o644)
    with pytest.raises(ValueError, match="run chmod 600"):
        check(compose("arena", *words, f"auth={accounts}"))
    accounts.chmod(0o600)
    assert check(compose("arena", *words, f"auth={accounts}")) == [("ann", "secret")]
    cfg = compose("arena", *words)
    assert "arena.example" in allowed_names(cfg.host, cfg.hosts) and allowed_names("0.0.0.0", []) == []


def test_what_people_wrote_is_for_this_user_alone(tmp_path):
    store = Store(tmp_path / "arena.sqlite")
    store.begin_battle("b", "v", "x", "y")
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
    store.close()
    assert modes.keys() >= {"arena.sqlite", "arena.sqlite-wal"} and set(modes.values()) == {0o600}


def test_a_server_that_ends_by_itself_is_no_success(tmp_path, run_script, capfd, monkeypatch):
    """It was: the page was said to be open, the process exported nothing and ended with exit code 0."""
    monkeypatch.setattr(uvicorn.Server, "run", lambda server, sockets: None)
    write_jsonl(tmp_path / "items.jsonl", [{"prompt": "q", "chosen": "a", "rejected": "b"}])
    arena = SimpleNamespace(train=serving.serve, __name__="arena")
    words = [f"annotate=[{tmp_path}/items.jsonl]", "port=54321", f"hydra.run.dir={tmp_path}/arena"]
    assert run_script(arena, *words) == 1
    said = capfd.readouterr()
    assert "the page's server ended by itself" in said.err and "is open" not in said.out
