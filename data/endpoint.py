"""The OpenAI-compatible endpoint: many requests in flight, retried, limited in rate and cost.

A request that the server answered with 429, 5xx, a cut connection or something that is no chat completion is tried
again; one that it refused for what it is (400, 413, 422: too long, say) comes back as `refused`. When an endpoint
stays down, requests in flight finish, no new one starts, and the run ends: what was answered is already on disk.
"""

import asyncio
import logging
import os
import queue
import threading
import time
from collections.abc import Iterator
from urllib.parse import urlsplit

import openai
import tenacity

from data.clients import Answer, Client, Request

REFUSED = (400, 413, 422)  # this request is at fault, not the endpoint
TRY_AGAIN = (408, 409, 425, 429)  # and every 5xx
for _name in ("httpx", "httpx2"):  # the library's transport tells every request
    logging.getLogger(_name).setLevel(logging.WARNING)
FINISH_REASONS = ("stop", "length", "content_filter")


class _Garbage(Exception):
    """HTTP 200 with something that is no chat completion."""


class OpenAIClient(Client):
    """Any endpoint that speaks `/chat/completions`.

    Args:
        base_url: the endpoint, up to and without `/chat/completions`; None = the library's own.
        api_key_env: name of the environment variable with the key. The key itself is in no config, log or file.
        max_parallel: requests in flight. requests_per_minute: None = no limit. timeout: seconds per try.
    """

    def __init__(
        self, model: str, *, base_url: str | None, api_key_env: str, max_parallel: int,
        requests_per_minute: float | None, timeout: float, max_tries: int, **settings,
    ):  # fmt: skip
        super().__init__(model, **settings)
        self.base_url, self.timeout = check_url(base_url), timeout
        self._key = read_key(base_url, api_key_env)
        if max_parallel < 1 or max_tries < 1 or timeout <= 0 or (requests_per_minute or 1) <= 0:
            raise ValueError(
                f"need max_parallel, max_tries >= 1, timeout and requests_per_minute > 0, "
                f"got {max_parallel=} {max_tries=} {timeout=} {requests_per_minute=}"
            )
        self.max_parallel, self.max_tries = max_parallel, max_tries
        self.interval = 60.0 / requests_per_minute if requests_per_minute else 0.0
        self._next_start, self._failure = 0.0, None

    def _answer(self, requests: dict[str, Request]) -> Iterator[tuple[str, Answer]]:
        """A thread runs the event loop, so `ask` also works where one runs already (a notebook, a web page)."""
        done: queue.SimpleQueue = queue.SimpleQueue()
        self._failure, self._spent, self._aside = (
            None,
            self.usage.cost,
            0.0,
        )  # aside: the most that those in flight cost
        worker = threading.Thread(target=lambda: asyncio.run(self._ask_all(requests, done)), daemon=True)
        worker.start()
        refused = []
        while (item := done.get()) is not None:
            refused += [item[1]] if item[1].finish_reason == "refused" else []
            yield item
        worker.join()
        if self._failure is not None:
            raise ValueError(self._failure)
        if len(refused) == len(requests):
            raise ValueError(f"{self.base_url} refused all {len(refused)} requests to {self.model}: {refused[0].error}")

    async def _ask_all(self, requests: dict[str, Request], done: queue.SimpleQueue) -> None:
        waiting, self._money = iter(requests.items()), asyncio.Condition()
        try:
            async with openai.AsyncOpenAI(
                api_key=self._key, base_url=self.base_url, timeout=self.timeout, max_retries=0
            ) as api:
                workers = [self._worker(api, waiting, done) for _ in range(min(self.max_parallel, len(requests)))]
                await asyncio.gather(*workers)
        except Exception as error:  # a bug in a worker must reach the caller, not hang it
            self._failure = self._failure or f"asking {self.base_url} failed: {redact(self._key, repr(error))}"
        finally:
            done.put(None)

    async def _worker(self, api, waiting: Iterator[tuple[str, Request]], done: queue.SimpleQueue) -> None:
        for key, request in waiting:  # the workers share the iterator
            if self._failure is not None:
                return
            bound = self._bound(request.messages, request.max_tokens)
            if not await self._afford(bound):
                return
            try:
                answer = await self._try(api, request)
            except (openai.APIError, _Garbage) as error:
                self._failure = self._failure or self._explain(error)
                await self._settle(bound, 0.0)
                return
            done.put((key, answer))
            await self._settle(bound, self._price(answer))

    async def _afford(self, bound: float) -> bool:
        """Sets the most that a request can cost aside; waits for those in flight where the rest is too little."""
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

    async def _try(self, api, request: Request) -> Answer:
        retrying = tenacity.AsyncRetrying(
            stop=tenacity.stop_after_attempt(self.max_tries),
            wait=_wait,
            retry=tenacity.retry_if_exception(_passes),
            before_sleep=self._count_retry,
            reraise=True,
        )
        return await retrying(self._once, api, request)

    async def _once(self, api, request: Request) -> Answer:
        await self._turn()
        try:
            reply = await api.chat.completions.create(
                model=request.model,
                messages=request.messages,
                temperature=request.temperature,
                max_tokens=request.max_tokens,
                seed=request.seed,
                stop=list(request.stop) or openai.omit,
            )
        except openai.APIStatusError as error:
            if error.status_code not in REFUSED:
                raise
            return Answer("", "refused", 0, 0, error=redact(self._key, str(error))[:500])
        except ValueError as error:  # a body that claims to be JSON and is not
            raise _Garbage(f"{type(error).__name__}: {error}") from error
        return _read(reply)

    async def _turn(self) -> None:
        """Waits until the rate limit allows one more start."""
        start = max(time.monotonic(), self._next_start)
        self._next_start = start + self.interval
        await asyncio.sleep(max(0.0, start - time.monotonic()))

    def _count_retry(self, state: tenacity.RetryCallState) -> None:
        self.usage.retries += 1

    def _explain(self, error: Exception) -> str:
        what = redact(self._key, f"{type(error).__name__}: {error}")[:500]
        tries = f" after {self.max_tries} tries" if _passes(error) else ""
        return (
            f"{self.base_url or 'the endpoint'} gave no answer for model {self.model}{tries} ({what}); "
            "answers so far are kept: mend it and run again with resume=true"
        )


def _read(reply) -> Answer:
    """Check what the server sent, which the library does not."""
    try:
        choice, usage = reply.choices[0], reply.usage
        text, finish_reason = choice.message.content, choice.finish_reason
    except (AttributeError, TypeError, IndexError) as error:
        raise _Garbage(f"no chat completion: {str(reply)[:200]!r}") from error
    finish_reason = finish_reason if finish_reason in FINISH_REASONS else "stop"
    if text is None and finish_reason != "stop":
        text = ""  # cut, or filtered, before the first visible token
    if not isinstance(text, str):
        raise _Garbage(f"the message has no text: {str(reply)[:200]!r}")
    counts = (getattr(usage, "prompt_tokens", None) or 0, getattr(usage, "completion_tokens", None) or 0)
    return Answer(text, finish_reason, *counts)


def _passes(error: BaseException) -> bool:
    """Whether the same request may succeed later."""
    if isinstance(error, openai.APIStatusError):
        return error.status_code in TRY_AGAIN or error.status_code >= 500
    return isinstance(error, openai.APIConnectionError | openai.APIResponseValidationError | _Garbage)


def _wait(state: tenacity.RetryCallState) -> float:
    """Seconds: what the server asks for (Retry-After, at most 60), else 0.5 * 2^n up to 20, with jitter."""
    error = state.outcome.exception()
    asked = error.response.headers.get("retry-after", "") if isinstance(error, openai.APIStatusError) else ""
    if asked.replace(".", "", 1).isdigit():
        return min(float(asked), 60.0)
    return tenacity.wait_random_exponential(multiplier=0.5, max=20)(state)


def redact(key: str, text: str) -> str:
    """The text without the key: a server may repeat it in what it says of an error."""
    return text.replace(key, "[key]") if len(key) > 3 else text


def check_url(base_url: str | None) -> str | None:
    """The address of an endpoint; one with a secret in it is refused."""
    if base_url is None:
        return None
    parts = urlsplit(str(base_url))
    try:
        good = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0  # port: ValueError over 65535
    except ValueError:
        good = False
    if not good:
        raise ValueError(f"base_url={base_url!r} is no address; write it like http://127.0.0.1:8000/v1")
    if parts.username or parts.password or parts.query:
        raise ValueError("base_url carries a name, password or query; put the key into the environment instead")
    return base_url


def read_key(base_url: str | None, api_key_env: str) -> str:
    """The key in the environment; a server on this machine may do without."""
    key = os.environ.get(api_key_env, "")
    local = base_url is not None and urlsplit(base_url).hostname in ("127.0.0.1", "localhost", "::1")
    if not key and not local:
        raise ValueError(f"no API key: set the environment variable {api_key_env} (api_key_env names it)")
    return key or "-"  # a server on this machine asks for none; the library wants a word
