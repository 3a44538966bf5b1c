"""Sampling from a policy: prompts in, completions out.

Equal prompts are prefilled once. Up to `slots` rows are decoded together. When a row stops, the last active row moves
into its slot and waiting prompts enter. So nothing is computed for finished rows.
"""

import math
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from model.decode_graphs import DecodeGraphs, can_capture
from model.heads import Policy
from model.kv_cache import KVCache
from model.linear import Linear
from model.next_token import next_token, uniforms
from model.packing import Rows, make_rows
from runtime.devices import widest

# Prompt tokens of one forward. On a CPU the activations of more tokens do not fit its cache, and matmuls lose 15 %.
PREFILL = {"cpu": 1024, "gpu": 16384}


class Generation(NamedTuple):
    """The result of `generate`."""

    rows: Rows  # (B, T) prompt, completion with its stop token, padding on the right; in the order of the prompts
    finish_reasons: list[str]  # per row: "stop" (a stop token was drawn) or "length"
    logprobs: list[list[float]]  # per row: log-probs in nats of its completion's tokens, without top-k and top-p


@dataclass
class DecodingRow:
    """A row that is being decoded. Its index in the list of active rows is its slot in the cache."""

    index: int  # number of its prompt
    prompt: list[int]
    seed: int
    limit: int  # tokens
    completion: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finished: bool = False

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.completion)


def generate(
    policy: Policy, prompts: list[list[int]], *, max_new_tokens: int | list[int], temperature: float, top_k: int,
    top_p: float, slots: int, stop_ids: list[int], seeds: list[int], pad_id: int,
    on_token: Callable[[int, int, bool], None] | None = None,
) -> Generation:  # fmt: skip
    """One completion for every prompt.

    A row's random numbers depend only on its seed. So in float32 its text does not depend on the other rows.

    Args:
        prompts: token ids, including the generation header of the template. Equal prompts are computed once: for K
            samples of a prompt, pass it K times with K seeds.
        max_new_tokens: the largest length of a completion, one number or one per prompt.
        slots: number of rows that are decoded together.
        stop_ids: ids that end a completion. The sampled one is kept as the last token.
        seeds: one per prompt.
        on_token: called as on_token(index of the prompt, token id, whether it is the last) for every sampled token.
    Raises:
        ValueError: a prompt is empty, a prompt and max_new_tokens exceed the window, a setting is out of range, or
            logits are not finite.
    """
    check(
        policy, prompts, max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, slots=slots
    )
    if len(seeds) != len(prompts):
        raise ValueError(f"generate needs one seed per prompt; got {len(seeds)} seeds for {len(prompts)} prompts")
    limits = limits_of(max_new_tokens, prompts)
    device = policy.lm_head.weight.device
    waiting = [DecodingRow(i, *row) for i, row in enumerate(zip(prompts, seeds, limits, strict=True))]
    longest = max(row.length + row.limit for row in waiting)
    waiting.sort(key=lambda row: (len(row.prompt), row.prompt, row.index), reverse=True)  # taken from the end
    slots, done, stops = min(slots, len(prompts)), [], set(stop_ids)
    active: list[DecodingRow] = []
    with torch.inference_mode(), decoding(policy, slots) as dtype:
        cache = KVCache(policy.config, slots=slots, length=longest, dtype=dtype, device=device)
        draw = partial(draw_tokens, temperature=temperature, top_k=top_k, top_p=top_p)
        step = decoder(policy, cache, draw)
        while waiting or active:
            if waiting and len(active) <= slots * 3 // 4:
                first, entering = len(active), take(waiting, slots - len(active))
                active += entering
                drawn = draw(prefill(policy, entering, cache, first), decode_columns(entering, device))
            else:
                entering, drawn = active, step(decode_columns(active, device), [row.length for row in active])
            drawn = drawn.tolist()  # one host read for the whole batch
            for row, (token, logprob) in zip(entering, drawn, strict=True):
                if not math.isfinite(logprob):
                    raise ValueError(
                        f"the model's logits after token {row.length} of prompt {row.index} are not finite: a weight "
                        "of the checkpoint is NaN or infinite, or an activation overflows; take an earlier checkpoint"
                    )
                token = int(token)
                row.completion.append(token)
                row.logprobs.append(logprob)
                row.finished = token in stops or len(row.completion) == row.limit
                if on_token:
                    on_token(row.index, token, row.finished)
            done += retire(active, cache)
    rows = sorted(done, key=lambda row: row.index)
    examples = [
        {"input_ids": r.prompt + r.completion, "completion_mask": [False] * len(r.prompt) + [True] * len(r.completion)}
        for r in rows
    ]
    reasons = ["stop" if row.completion[-1] in stops else "length" for row in rows]
    return Generation(make_rows(examples, pad_id).to(device), reasons, [row.logprobs for row in rows])


def take(waiting: list[DecodingRow], room: int) -> list[DecodingRow]:
    """Remove and return the next rows to decode: shortest prompts first, equal prompts together."""
    entering = waiting[: -room - 1 : -1]
    del waiting[-len(entering) :]
    return entering


def prefill(policy: Policy, rows: list[DecodingRow], cache: KVCache, first: int) -> Tensor:
    """(B, V) float32 logits after each row's prompt. Keys and values are written into the slots from `first` on."""
    prompts: list[list[int]] = []  # distinct ones
    slots: list[list[int]] = []  # of each prompt
    for slot, row in enumerate(rows, start=first):
        if prompts and prompts[-1] == row.prompt:
            slots[-1].append(slot)
        else:
            prompts.append(row.prompt)
            slots.append([slot])
    most = PREFILL["cpu" if policy.lm_head.weight.device.type == "cpu" else "gpu"]
    tokens = most
    pieces: list[tuple[list[list[int]], list[list[int]]]] = []
    for prompt, wanted in zip(prompts, slots, strict=True):
        tokens += len(prompt)
        if tokens > most:
            pieces.append(([], []))
            tokens = len(prompt)
        pieces[-1][0].append(prompt)
        pieces[-1][1].append(wanted)
    logits = torch.cat([after_prompts(policy, some, wanted, cache) for some, wanted in pieces])
    return logits.repeat_interleave(torch.tensor([len(s) for s in slots], device=logits.device), dim=0)


def after_prompts(policy: Policy, prompts: list[list[int]], slots: list[list[int]], cache: KVCache) -> Tensor:
    """(P, V) float32 logits after each of P prompts, as one packed stream."""
    batch = make_rows([{"input_ids": p, "completion_mask": [False] * len(p)} for p in prompts], pad_id=0)
    stream = batch.to(policy.lm_head.weight.device).stream
    return policy(stream.tokens, stream.positions, stream.blocks, stream.last, cache.prefill(slots))


def decoder(policy: Policy, cache: KVCache, draw: Callable) -> Callable[[Tensor, list[int]], Tensor]:
    """A function step(columns, lengths) -> (B, 2) the next token of each active row, as `draw_tokens` returns it.

    columns: (4, B) from `decode_columns`. lengths: those of the rows, on the host.
    """

    def step(columns: Tensor, pieces: list[tuple[slice, int]]) -> Tensor:
        tokens, positions, *_ = columns
        return draw(policy(tokens, positions, None, None, cache.decode(positions, pieces)), columns)

    if can_capture(policy):
        return DecodeGraphs(step, cache)
    return lambda columns, lengths: step(columns, cache.pieces(lengths))


def decode_columns(rows: list[DecodingRow], device: torch.device) -> Tensor:
    """(4, B) int64: each row's last token, the token's position, the row's seed, the number of sampled tokens."""
    columns = [[(r.completion or r.prompt)[-1], r.length - 1, r.seed, len(r.completion)] for r in rows]
    return torch.tensor(columns, device=device).T


def draw_tokens(logits: Tensor, columns: Tensor, **choice) -> Tensor:
    """(B, 2) of dtype `widest`: each row's next token and its log-prob, from (B, V) logits and `decode_columns`.

    One tensor holds both, so that the host reads only once. Token ids are exact in floats, being far below 2^24.
    """
    _, _, seeds, steps = columns
    tokens = next_token(logits, uniforms(seeds, steps), **choice)
    scaled = logits.float() / (choice["temperature"] or 1.0)  # at temperature 0: the log-prob at temperature 1
    logprobs = scaled.gather(1, tokens[:, None])[:, 0] - scaled.logsumexp(1)
    return torch.stack([tokens.to(widest(logits.device)), logprobs.to(widest(logits.device))], dim=1)


def retire(active: list[DecodingRow], cache: KVCache) -> list[DecodingRow]:
    """Remove and return finished rows. The last active row moves into the empty slot."""
    done = []
    for slot in reversed(range(len(active))):
        if active[slot].finished:
            done.append(active[slot])
            last = active.pop()
            if slot < len(active):
                cache.move(len(active), slot, last.length)
                active[slot] = last
    return done


@contextmanager
def decoding(policy: Policy, batch: int):
    """A context with dropout off and weights prepared for decoding `batch` rows. Yields the dtype of matmuls."""
    linears = [module for module in policy.modules() if isinstance(module, Linear)]
    dtype, training = policy.transformer.compute_dtype or policy.lm_head.weight.dtype, policy.training
    policy.eval()
    try:
        for linear in linears:
            linear.prepare(dtype, batch, policy.adapted)
        yield dtype
    finally:
        for linear in linears:
            linear.prepared = None
        policy.train(training)


def limits_of(max_new_tokens: int | list[int], prompts: list[list[int]]) -> list[int]:
    """The largest length of each prompt's completion."""
    return [max_new_tokens] * len(prompts) if isinstance(max_new_tokens, int) else max_new_tokens


def check(
    policy: Policy, prompts: list[list[int]], *, max_new_tokens: int | list[int], temperature: float, top_k: int,
    top_p: float, slots: int,
) -> None:  # fmt: skip
    """Raise ValueError where `generate` would refuse these prompts or settings."""
    if not prompts or not all(prompts):
        raise ValueError("generate needs at least one prompt, and at least one token in each; got an empty one")
    limits = limits_of(max_new_tokens, prompts)
    if len(limits) != len(prompts):
        counts = f"{len(limits)} for {len(prompts)} prompts"
        raise ValueError(f"generate needs one max_new_tokens, or one per prompt; got {counts}")
    if min(limits) < 1 or slots < 1:
        raise ValueError(f"need sampling.max_new_tokens >= 1 and sampling.slots >= 1, got {min(limits)}, {slots}")
    if not 0 <= temperature < math.inf or top_k < 0 or not 0 < top_p <= 1:
        raise ValueError(
            f"need a finite temperature >= 0, top_k >= 0 and 0 < top_p <= 1, got {temperature=}, {top_k=}, {top_p=}"
        )
    window = policy.config.max_length
    prompt, limit = max(((len(p), n) for p, n in zip(prompts, limits, strict=True)), key=sum)
    if prompt + limit > window:
        raise ValueError(
            f"a prompt of {prompt} tokens and sampling.max_new_tokens={limit} exceed the model's window of {window}; "
            "lower sampling.max_new_tokens or shorten the prompt (data.max_prompt_length)"
        )
