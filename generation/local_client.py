"""A client that samples the answers from a local checkpoint."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from data.chat import encode_prompt
from data.chat_template import TextMarkerSaid
from data.tokenizer import load_tokenizer
from generation.clients import Answer, Client, Conversation, Request, hash_json
from model.reading import read_policy
from model.sampling import generate
from runtime.config import check_choice, check_whole
from runtime.devices import PRECISIONS, choose_precision, own_device


class LocalClient(Client):
    """Samples with `model/sampling.py`. An answer depends on its request alone, not on the other rows of its batch.

    Args:
        policy: path of the checkpoint.
    """

    def __init__(self, policy: str, *, batch_size: int, top_k: int, top_p: float, precision: str, **limits):
        check_whole(1, client__batch_size=batch_size)
        check_choice("client.precision", precision, PRECISIONS)
        precision = choose_precision(precision, own_device())
        self.tokenizer = load_tokenizer(policy)
        self.policy = read_policy(policy, precision=precision)
        self.batch_size, self.top_k, self.top_p = batch_size, top_k, top_p
        super().__init__(f"{policy}@{_fingerprint(policy)} {precision} top_k={top_k} top_p={top_p}", **limits)

    def _answer(self, requests: dict[str, Request]) -> Iterator[tuple[str, Answer]]:
        keys = sorted(requests, key=lambda key: sum(len(m["content"] or "") for m in requests[key].messages))
        for start in range(0, len(keys), self.batch_size):
            yield from self._batch({key: requests[key] for key in keys[start : start + self.batch_size]})

    def _batch(self, requests: dict[str, Request]) -> Iterator[tuple[str, Answer]]:
        settings = next(iter(requests.values()))  # all come from one call of ask, so these settings are equal
        room = self.policy.config.max_length - settings.max_tokens
        if room < 1:
            raise ValueError(
                f"max_tokens={settings.max_tokens} leaves no room for a prompt in a window of "
                f"{self.policy.config.max_length} tokens; ask for fewer"
            )
        encode = partial(encode_prompt, tokenizer=self.tokenizer, max_length=room)
        prompts, asked = [], {}
        for key, r in requests.items():
            try:
                ids = encode(r.messages) if r.messages[-1]["content"] is not None else before_user(r.messages, encode)
            except TextMarkerSaid as error:  # only this request fails
                yield key, Answer("", "refused", 0, 0, error=str(error))
                continue
            prompts.append(ids)
            asked[key] = r
        if not asked:
            return
        made = generate(
            self.policy,
            prompts,
            max_new_tokens=settings.max_tokens,
            temperature=settings.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            slots=self.batch_size,
            stop_ids=self.tokenizer.stop_ids,
            seeds=[draws_from(request) for request in asked.values()],
            pad_id=self.tokenizer.pad_id,
        )
        rows = zip(asked, prompts, made.rows.input_ids, made.rows.completion_mask, made.finish_reasons, strict=True)
        for key, prompt, ids, mask, finish_reason in rows:
            tokens = ids[mask].tolist()
            text = self.tokenizer.decode([i for i in tokens if i not in self.tokenizer.stop_ids]).strip()
            cut = min((at for s in settings.stop if (at := text.find(s)) >= 0), default=None)
            finish_reason = finish_reason if cut is None else "stop"
            yield key, Answer(text[:cut], finish_reason, len(prompt), len(tokens))


def before_user(messages: Conversation, encode: Callable[[Conversation], list[int]]) -> list[int]:
    """The ids before the content of the last user message: the common prefix of two prompts that differ only in it."""
    one, other = (encode([*messages[:-1], {"role": "user", "content": text}]) for text in ("apple", "Zebra!"))
    return one[: next(i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)]


def draws_from(request: Request) -> int:
    """The seed of a sampled answer. It depends on the request and not on the model's path, so that a repeated recipe
    gets the same answers."""
    asked = {name: getattr(request, name) for name in ("messages", "temperature", "max_tokens", "seed", "stop")}
    return int(hash_json(asked | {"model": ""})[:12], 16)


def _fingerprint(policy: str) -> str:
    """A text that differs for a retrained checkpoint at the same path, computed without reading gigabytes."""
    path = Path(policy)
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path] if path.is_file() else []
    return hash_json([[f.name, f.stat().st_size, f.stat().st_mtime_ns] for f in files])[:8]
