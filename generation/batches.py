"""The batch interface of OpenAI-compatible servers: cheaper requests, with the answers some hours later.

Submitted requests are stored beside the answers. So a killed run continues to wait for the same batch, and pays for
nothing twice.
"""

import json
import time
from collections.abc import Iterator
from typing import Any

import httpx

from generation.clients import Answer, Request
from generation.endpoint_errors import GiveUp, TryAgain

MOST_REQUESTS = 50_000  # per batch, OpenAI's limit
MOST_BYTES = 150 * 2**20  # per file; OpenAI's limit is 200 MB
LONGEST_RESULT = 2 * 2**30  # bytes
OVER = ("completed", "failed", "expired", "cancelled")
FIRST_PAUSE = 5.0  # seconds between the first two status requests; later pauses are longer


def answer_batch(client: Any, requests: dict[str, Request]) -> Iterator[tuple[str, Answer]]:
    """(key, answer) of every request, a batch at a time. client: an OpenAIClient, whose module imports this one.

    Raises:
        ValueError: the cost limit would not cover all requests, or the server refuses a batch.
    """
    bound = sum(client._bound(request.messages, request.max_tokens) for request in requests.values())
    if client.max_cost is not None and client.usage.cost + bound > client.max_cost:
        raise ValueError(
            f"{len(requests)} requests may cost {bound:.4f} and pass max_cost={client.max_cost} "
            f"({client.usage.cost:.4f} is spent); raise client.max_cost"
        )
    server = _Server(client)
    waiting: dict[str, list[str]] = {}
    new = dict(requests)
    for key in requests:
        if (entry := client.remembered(f"batch:{key}")) is not None:
            waiting.setdefault(str(entry.get("id")), []).append(key)
            del new[key]
    for part in _parts(client, new):
        batch = server.submit(part)
        for key in part:
            client.remember(f"batch:{key}", {"id": batch})
        waiting[batch] = list(part)
    for batch, keys in waiting.items():
        found = server.results(batch)
        for key in keys:
            client.remember(f"batch:{key}", None)
        if found is None:
            raise ValueError(f"{client.base_url} gave up batch {batch}; run again with resume=true to hand it in anew")
        for key in keys:
            yield key, _read(client, found.get(key), requests[key])


def _parts(client: Any, requests: dict[str, Request]) -> Iterator[dict[str, str]]:
    """{key: line} of each batch."""
    part: dict[str, str] = {}
    size = 0
    for key, request in requests.items():
        body = client._payload(request)
        url = "/v1/completions" if "prompt" in body else "/v1/chat/completions"
        line = json.dumps({"custom_id": key, "method": "POST", "url": url, "body": body}) + "\n"
        if part and (len(part) == MOST_REQUESTS or size + len(line) > MOST_BYTES):
            yield part
            part, size = {}, 0
        part[key], size = line, size + len(line)
    if part:
        yield part


def _read(client: Any, row: dict | None, request: Request) -> Answer:
    if row is None:
        return Answer("", "failed", 0, 0, error="the batch came back without this request")
    response = row.get("response")
    status = response.get("status_code") if isinstance(response, dict) else None
    if status != 200:
        problem = client._clean(str((response or {}).get("body") or row.get("error"))[:500])
        return Answer("", "refused", 0, 0, error=f"HTTP {status}: {problem}")
    try:
        return client._read(json.dumps(response.get("body")).encode(), request)
    except TryAgain as error:
        return Answer("", "failed", 0, 0, error=client._clean(error))
    except GiveUp as error:
        raise ValueError(client._explain(error, "")) from error


class _Server:
    """`/files` and `/batches` of one endpoint."""

    def __init__(self, client: Any):
        self.client = client
        self.http = httpx.Client(headers={"Authorization": f"Bearer {client._key}"}, timeout=client.timeout)

    def submit(self, part: dict[str, str]) -> str:
        """The id of a new batch."""
        lines = "".join(part.values()).encode()
        url = json.loads(next(iter(part.values())))["url"]
        file = self._call("POST", "files", data={"purpose": "batch"}, files={"file": ("requests.jsonl", lines)})
        asked = {"input_file_id": file.get("id"), "endpoint": url, "completion_window": "24h"}
        return str(self._call("POST", "batches", json=asked).get("id"))

    def results(self, batch: str) -> dict[str, dict] | None:
        """{custom_id: line} once the batch is over; None where it ended without any."""
        pause = FIRST_PAUSE
        while True:
            state = self._call("GET", f"batches/{batch}")
            if state.get("status") in OVER:
                break
            time.sleep(pause)
            pause = min(pause * 1.5, 60.0)
        files = [state[name] for name in ("output_file_id", "error_file_id") if isinstance(state.get(name), str)]
        rows = {}
        for name in files:
            for line in self._download(f"files/{name}/content").splitlines():
                row = json.loads(line)
                rows[str(row.get("custom_id"))] = row
        return rows if files else None

    def _call(self, method: str, path: str, **what) -> dict:
        """The JSON object in the server's reply, with a few tries."""
        for attempt in range(self.client.max_tries):
            try:
                reply = self.http.request(method, f"{self.client.base_url}/{path}", **what)
                if reply.status_code < 300:
                    return reply.json()
                problem = f"HTTP {reply.status_code}: {reply.text[:500]}"
                if reply.status_code < 500 and reply.status_code != 429:
                    break
            except (httpx.HTTPError, ValueError) as error:
                problem = f"{type(error).__name__}: {error}"
            if method == "POST" and path == "batches":
                break  # it may have been accepted: asking again could pay twice
            time.sleep(min(0.5 * 2**attempt, 20.0))
        raise ValueError(
            f"{self.client.base_url}/{path} gave no answer ({self.client._clean(problem)}); answers so far are kept: "
            "mend it and run again with resume=true"
        )

    def _download(self, path: str) -> str:
        body = bytearray()
        with self.http.stream("GET", f"{self.client.base_url}/{path}") as reply:
            for chunk in reply.iter_bytes():
                body += chunk
                if len(body) > LONGEST_RESULT:
                    raise ValueError(f"{path} is longer than {LONGEST_RESULT:,} bytes")
        if reply.status_code >= 300:
            raise ValueError(f"{path}: HTTP {reply.status_code}; run again with resume=true")
        return body.decode("utf-8", "replace")
