"""What the reply of an OpenAI-compatible endpoint says: tokens, log-probabilities, model, errors."""

import json
import math
import re
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

from generation.clients import MOST_TOKENS, Request, most_tokens

OPTIONAL = ("max_tokens", "max_completion_tokens", "temperature", "seed", "stop", "response_format")
UNKNOWN = re.compile(
    r"un(supported|recognized|known|expected)|not (supported|permitted|allowed|available)|does not support|forbidden"
    r"|extra inputs|only the default|at the same time|deprecated",
    re.IGNORECASE,
)
LONGEST_WAIT = 60.0  # seconds between two tries, whatever the server asks for


def first_logprobs(choice: dict) -> str:
    """JSON of {token: log-probability} of the likely first tokens of a choice; empty if the server returns none."""
    try:
        logprobs = {row["token"]: float(row["logprob"]) for row in choice["logprobs"]["content"][0]["top_logprobs"]}
        text = json.dumps({token: value for token, value in logprobs.items() if value <= 0})
        text.encode()
    except (LookupError, TypeError, ValueError):
        return ""
    return text if logprobs else ""


def count_tokens(usage: object, request: Request, text: str) -> tuple[int, int, bool]:
    """(prompt tokens, completion tokens, whether they are our estimates).

    They are the server's counts if these are plausible, else upper bounds (one per byte), so that the cost limit holds.
    """
    usage = usage if isinstance(usage, dict) else {}
    counts = [usage.get("prompt_tokens"), usage.get("completion_tokens")]
    if (
        all(type(count) is int and 0 <= count < MOST_TOKENS for count in counts)
        and counts[0]
        and (counts[1] or not text)
    ):
        return counts[0], counts[1], False
    return most_tokens(request.messages), min(request.max_tokens, len(text.encode("utf-8", "replace")) + 1), True


def same_model(served: str, asked: str) -> bool:
    """Whether a server's name means the requested model: a folder before it or a date after it may differ."""
    served, asked = (name.lower().rsplit("/", 1)[-1] for name in (served, asked))
    asked = re.sub(r"(-latest|:\w+)$", "", asked)
    return re.fullmatch(re.escape(asked) + r"(-latest|:\w+|[-@]\d{4}(-?\d\d){0,2}|[-@]\d{4})?", served) is not None


def unknown_parameter(body: bytes, payload: dict) -> str | None:
    """The optional parameter of the request that the server's error calls unknown, or None."""
    try:
        error = json.loads(body)
    except (ValueError, RecursionError):
        return None
    error = error.get("error", error) if isinstance(error, dict) else {}
    error = error if isinstance(error, dict) else {"message": error}
    message = json.dumps(error.get("message") or error.get("detail") or "")
    if not UNKNOWN.search(message) and error.get("code") not in ("unsupported_parameter", "unsupported_value"):
        return None
    names = [name for name in OPTIONAL if name in payload]
    if error.get("param") in names:
        return error["param"]
    places = {name: place.start() for name in names if (place := re.search(rf"\b{name}\b", message))}
    return min(places, key=places.get) if places else None


def retry_after(header: str) -> float | None:
    """Seconds that a Retry-After header asks for, as a number or a date."""
    try:
        seconds = float(header)
    except ValueError:
        try:
            seconds = (parsedate_to_datetime(header) - datetime.now(UTC)).total_seconds()
        except (ValueError, TypeError, OverflowError):
            return None
    return min(max(seconds, 0.0), LONGEST_WAIT) if math.isfinite(seconds) else None
