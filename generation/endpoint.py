"""A client of OpenAI-compatible endpoints: parallel requests with retries, and limits on time, size, rate and cost.

The handling of server errors:

* 429, 5xx, a cut connection, or something that is no chat completion: the request is tried again, and after
  `max_tries` it counts as failed. When `MAX_FAILURES` fail one after the other, requests in flight finish, no new one
  starts, and the run ends: what was answered is already on disk.
* 400, 403, 413, 422 (too long, or forbidden content): this request alone comes back as refused. Where the server says
  that it does not know a parameter, it is asked once more without it, and so is every later request.
* a wrong key, an unknown model, a reply from another model than the one that was asked: the run ends at once.
"""

import asyncio
import json
import logging
import queue
import threading
import time
from collections.abc import Iterator

import httpx
import tenacity

from generation.batches import answer_batch
from generation.clients import Answer, Client, Conversation, Request
from generation.endpoint_access import check_url, read_key, redact
from generation.endpoint_errors import GiveUp, TryAgain
from generation.endpoint_reply import OPTIONAL, count_tokens, first_logprobs, retry_after, same_model, unknown_parameter

logging.getLogger("httpx").setLevel(logging.WARNING)  # it reports every request
OPENAI = "https://api.openai.com/v1"
REFUSED = (400, 403, 413, 422)  # this request is at fault, not the endpoint
TRY_AGAIN = (408, 409, 425, 429)  # and every 5xx
FINISH_REASONS = {
    "stop": "stop",
    "eos": "stop",
    "eos_token": "stop",
    "end_turn": "stop",
    "stop_sequence": "stop",
    "length": "length",
    "max_tokens": "length",
    "content_filter": "content_filter",
}
MAX_FAILURES = 3  # requests in a row that failed for good
MAX_REPLY = 16 * 2**20  # bytes


class OpenAIClient(Client):
    """An endpoint with `/chat/completions` (and `/completions` to sample a user's turn, see `Conversation`).

    Args:
        base_url: the endpoint, up to and without `/chat/completions`; None = OpenAI's.
        api_key_env: name of the environment variable with the key. The key itself is in no config, log or file.
        max_parallel: requests in flight. requests_per_minute: None = no limit. timeout: seconds for a whole try.
        served_as: the server's name of the model in its replies, if it is another one; None: the requested name.
        reasoning_effort: for models that think; None: the server's default. extra_body: further fields of all requests.
        pre_query: the text of the model's template before a user's message.
        batch: whether requests go through `/batches`, which is cheaper and takes hours; see `generation/batches.py`.
    """

    def __init__(
        self, model: str, *, base_url: str | None, api_key_env: str, max_parallel: int,
        requests_per_minute: float | None, timeout: float, max_tries: int, served_as: str | None = None,
        reasoning_effort: str | None = None, extra_body: dict | None = None, pre_query: str | None = None,
        batch: bool = False, **settings,
    ):  # fmt: skip
        super().__init__(model, **settings)
        self.base_url = (check_url(base_url) or OPENAI).rstrip("/")
        self.timeout, self.served_as = timeout, served_as
        self._key = read_key(base_url, api_key_env)
        if max_parallel < 1 or max_tries < 1 or timeout <= 0 or (requests_per_minute or 1) <= 0:
            raise ValueError(
                f"need max_parallel, max_tries >= 1, timeout and requests_per_minute > 0, "
                f"got {max_parallel=} {max_tries=} {timeout=} {requests_per_minute=}"
            )
        extra = dict(extra_body or {}) | ({"reasoning_effort": reasoning_effort} if reasoning_effort else {})
        if known := {"model", "messages", "prompt", "response_format", "n", "stream", *OPTIONAL} & set(extra):
            raise ValueError(f"client.extra_body sets {', '.join(sorted(known))}, which this client sets itself")
        self.options = {"base_url": self.base_url, "extra": extra}  # two servers may call two models by one name
        self.pre_query, self.batch = pre_query, batch
        self.max_parallel, self.max_tries = max_parallel, max_tries
        self.interval = 60.0 / requests_per_minute if requests_per_minute else 0.0
        self._next_start, self._failures = 0.0, 0
        self._failure: str | None = None

    def _answer(self, requests: dict[str, Request]) -> Iterator[tuple[str, Answer]]:
        """The event loop runs in a thread, so that `ask` also works inside another one (a notebook, a web server)."""
        if self.pre_query is None and any(r.messages[-1]["content"] is None for r in requests.values()):
            raise ValueError("a model behind an endpoint writes a user's message only after client.pre_query")
        if self.batch:
            yield from answer_batch(self, requests)
            return
        done: queue.SimpleQueue = queue.SimpleQueue()
        self._failure, self._spent = None, self.usage.cost
        self._aside = self._wasted = (
            0.0  # the most that those in flight cost, and that replies cost that were no answer
        )
        worker = threading.Thread(target=lambda: asyncio.run(self._ask_all(requests, done)), daemon=True)
        worker.start()
        missing = []
        while (item := done.get()) is not None:
            missing += [item[1]] if item[1].missing else []
            yield item
        worker.join()
        self.usage.cost += self._wasted
        if self._failure is not None:
            raise ValueError(self._failure)
        if len(missing) == len(requests) and self.usage.answers == self.usage.from_cache:  # it never answered at all
            did = "refused" if missing[0].finish_reason == "refused" else "failed on"
            raise ValueError(
                f"{self.base_url} gave no answer: it {did} all {len(missing)} requests to {self.model} "
                f"({missing[0].error}); mend it and run again with resume=true"
            )

    async def _ask_all(self, requests: dict[str, Request], done: queue.SimpleQueue) -> None:
        waiting, self._money = iter(requests.items()), asyncio.Condition()
        headers = {"Authorization": f"Bearer {self._key}", "Accept": "application/json", "Accept-Encoding": "identity"}
        limits = httpx.Limits(max_connections=self.max_parallel, max_keepalive_connections=self.max_parallel)
        try:
            async with httpx.AsyncClient(headers=headers, timeout=self.timeout, limits=limits) as http:
                workers = [self._worker(http, waiting, done) for _ in range(min(self.max_parallel, len(requests)))]
                await asyncio.gather(*workers)
        except Exception as error:  # a bug in a worker must reach the caller, not hang it
            self._failure = self._failure or f"asking {self.base_url} failed: {redact(self._key, repr(error))}"
        finally:
            done.put(None)

    async def _worker(self, http: httpx.AsyncClient, waiting: Iterator[tuple[str, Request]], done) -> None:
        for key, request in waiting:  # the workers share the iterator
            if self._failure is not None:
                return
            bound = self._bound(request.messages, request.max_tokens)
            if not await self._afford(bound):
                return
            try:
                answer = await self._try(http, request)
                self._failures = 0
            except TryAgain as error:
                answer = Answer("", "failed", 0, 0, error=self._clean(error))
                self._failures += 1
                if self._failures >= MAX_FAILURES:
                    self._failure = self._failure or self._explain(error, f" after {self.max_tries} tries")
            except GiveUp as error:
                self._failure = self._failure or self._explain(error, "")
                await self._settle(bound, 0.0)
                return
            done.put((key, answer))
            await self._settle(bound, self._price(answer))

    async def _afford(self, bound: float) -> bool:
        """Reserve the largest cost of a request. If the budget is too small, wait for requests in flight."""
        if self.max_cost is None:
            return True
        async with self._money:
            await self._money.wait_for(lambda: self._spent + self._aside + bound <= self.max_cost or not self._aside)
            if self._spent + bound > self.max_cost:
                self._failure = (
                    f"the next request may cost {bound:.4f} and pass max_cost={self.max_cost} ({self._spent:.4f} is "
                    "spent); raise client.max_cost and run again with resume=true"
                )
                return False
            self._aside += bound
            return True

    async def _settle(self, bound: float, price: float) -> None:
        if self.max_cost is not None:
            async with self._money:
                self._aside, self._spent = self._aside - bound, self._spent + price
                self._aside = self._aside if self._aside > 1e-12 else 0.0  # what rounding left of nothing
                self._money.notify_all()

    async def _try(self, http: httpx.AsyncClient, request: Request) -> Answer:
        retrying = tenacity.AsyncRetrying(
            stop=tenacity.stop_after_attempt(self.max_tries),
            wait=_wait,
            retry=tenacity.retry_if_exception_type(TryAgain),
            before_sleep=self._count_retry,
            reraise=True,
        )
        return await retrying(self._once, http, request)

    async def _once(self, http: httpx.AsyncClient, request: Request) -> Answer:
        """One try: the answer, or `refused`. Raises TryAgain or GiveUp."""
        await self._turn()
        while True:
            payload = self._payload(request)
            path = "completions" if "prompt" in payload else "chat/completions"
            status, headers, body = await self._post(http, f"{self.base_url}/{path}", payload)
            if 200 <= status < 300:
                return self._read_or_count(body, request)
            reason = self._clean(body[:2000].decode("utf-8", "replace"))
            if status in TRY_AGAIN or status >= 500:
                raise TryAgain(f"HTTP {status}: {reason}", retry_after(headers.get("retry-after", "")))
            if status not in REFUSED:
                raise GiveUp(f"HTTP {status}: {reason}")
            unknown = unknown_parameter(body, payload)
            if unknown is None or not self._can_leave_out(unknown):
                return Answer("", "refused", 0, 0, error=f"HTTP {status}: {reason}")
            if unknown not in self.usage.left_out:
                self.usage.left_out.append(unknown)

    def _read_or_count(self, body: bytes, request: Request) -> Answer:
        """The answer in a reply. The cost of an unreadable reply is counted, as it may have to be paid."""
        try:
            return self._read(body, request)
        except TryAgain:
            bound = self._bound(request.messages, request.max_tokens)
            self._wasted, self._spent = self._wasted + bound, self._spent + bound
            raise

    def _payload(self, request: Request) -> dict:
        """The JSON body. It has both names of the token limit. One that the server does not know is left out later."""
        payload = {
            "model": request.model,
            **self._asked(request.messages),
            "temperature": request.temperature,
            "max_tokens": request.max_tokens,
            "max_completion_tokens": request.max_tokens,
            "seed": request.seed,
            "stop": list(request.stop) or None,
            "response_format": request.schema
            and {
                "type": "json_schema",
                "json_schema": {"name": "answer", "strict": True, "schema": request.schema},
            },
            **(
                {"logprobs": True, "top_logprobs": request.options["top_logprobs"]}
                if "top_logprobs" in request.options
                else {}
            ),
            **request.options["extra"],
        }
        return {k: value for k, value in payload.items() if value is not None and k not in self.usage.left_out}

    def _asked(self, messages: Conversation) -> dict:
        if messages[-1]["content"] is not None:
            return {"messages": messages}
        return {"prompt": self.pre_query}

    def _can_leave_out(self, name: str) -> bool:
        """Whether a parameter may be left out. The last token limit may not, as the cost would have no bound."""
        limits = {"max_tokens", "max_completion_tokens"}
        return name not in limits or not (limits - {name}) & set(self.usage.left_out)

    async def _post(self, http: httpx.AsyncClient, url: str, payload: dict) -> tuple[int, httpx.Headers, bytes]:
        """(status, headers, body) of one request. The timeout is for the whole reply, of at most MAX_REPLY bytes."""
        body = bytearray()
        try:
            async with asyncio.timeout(self.timeout), http.stream("POST", url, json=payload) as reply:
                async for chunk in reply.aiter_raw():  # raw: a few bytes may unpack to gigabytes
                    body += chunk
                    if len(body) > MAX_REPLY:
                        raise TryAgain(f"the reply is longer than {MAX_REPLY:,} bytes")
        except TimeoutError:
            raise TryAgain(f"no whole reply within timeout={self.timeout:g} seconds") from None
        except (httpx.HTTPError, httpx.StreamError, OSError) as error:
            raise TryAgain(f"{type(error).__name__}: {error}") from error
        return reply.status_code, reply.headers, bytes(body)

    def _read(self, body: bytes, request: Request) -> Answer:
        """The answer in a chat completion. Raises TryAgain if it is not valid, GiveUp if it is from another model."""
        try:
            reply = json.loads(body)
            choice = reply["choices"][0]
            message, reason = choice.get("message") or {"content": choice["text"]}, choice.get("finish_reason")
            text, thought = message.get("content"), message.get("reasoning_content") or message.get("reasoning") or ""
        except (ValueError, RecursionError, LookupError, TypeError, AttributeError):
            raise TryAgain(f"the reply is no chat completion: {self._clean(str(body[:200]))}") from None
        answered_by = reply.get("model")
        answered_by = answered_by if isinstance(answered_by, str) else ""
        if answered_by and not same_model(answered_by, self.served_as or request.model):
            raise GiveUp(
                f"a request to {request.model} was answered by {self._clean(answered_by)!r}; if that is the model you "
                "mean, set client.served_as to that name"
            )
        if text is None and (isinstance(message.get("refusal"), str) or reason in ("length", "content_filter")):
            text, reason = "", "length" if reason == "length" else "content_filter"
        if not isinstance(text, str) or not isinstance(thought, str):
            raise TryAgain(f"the message has no text: {self._clean(str(message)[:200])}")
        if not isinstance(reason, str) or reason not in FINISH_REASONS:
            raise TryAgain(f"the reply does not say whether the text is whole: finish_reason={str(reason)[:50]!r}")
        likely = first_logprobs(choice) if "top_logprobs" in request.options else ""
        if "top_logprobs" in request.options and text and not likely:
            raise GiveUp("the reply names no log-probabilities, which were asked for (logprobs, top_logprobs)")
        prompt_tokens, completion_tokens, counted = count_tokens(reply.get("usage"), request, text + thought)
        return Answer(
            text,
            FINISH_REASONS[reason],
            prompt_tokens,
            completion_tokens,
            reasoning=thought,
            model=self._clean(answered_by),
            counted_by_us=counted,
            top_logprobs=likely,
        )

    async def _turn(self) -> None:
        """Wait until the rate limit allows one more request."""
        start = max(time.monotonic(), self._next_start)
        self._next_start = start + self.interval
        await asyncio.sleep(max(0.0, start - time.monotonic()))

    def _count_retry(self, state: tenacity.RetryCallState) -> None:
        self.usage.retries += 1

    def _clean(self, what: object) -> str:
        """A text of the server, fit for a message: shortened, without the key, without control characters."""
        return redact(self._key, str(what))[:500]

    def _explain(self, error: Exception, tries: str) -> str:
        return (
            f"{self.base_url} gave no answer for model {self.model}{tries} ({self._clean(error)}); "
            "answers so far are kept: mend it and run again with resume=true"
        )


def _wait(state: tenacity.RetryCallState) -> float:
    """Seconds until the next try: those of Retry-After, else 0.5 * 2^n up to 20, with jitter."""
    asked = state.outcome.exception().wait
    return tenacity.wait_random_exponential(multiplier=0.5, max=20)(state) if asked is None else asked
