"""Before the first step: does the server read text as we do, and draw from the policy that it was given?"""

import logging

import torch
from torch import Tensor

from data.chat import encode_prompt
from model.heads import Policy
from model.packing import make_rows
from runtime.distributed import from_main

log = logging.getLogger(__name__)
TEXT = "naïve café — ½ of 1,234 cups?\n\n  def f(x):\treturn x**2  # 🙂 Ελληνικά 中文\n"
TALK = [{"role": "user", "content": "Which coffee would you choose on a rainy day, and why?"}]
PROBES = 8  # completions of the conversation that both sides score
PROBE_TOKENS = 32  # of each, at most


def check_tokens(api, tokenizer) -> None:
    """Raise ValueError where the server's tokenizer or chat template is another one than ours.

    Prompts are sent as token ids, so a server without a template is as good as any.
    """
    pairs = [("tokenizer", tokenizer.encode(TEXT), api.tokenize(prompt=TEXT))]
    if tokenizer.template is not None:
        ours = encode_prompt(TALK, tokenizer, max_length=1 << 30)
        pairs.append(("chat template", ours, api.tokenize(messages=TALK)))
    for what, ours, theirs in pairs:
        if theirs is not None and ours != theirs:
            same = [a == b for a, b in zip(ours, theirs, strict=False)]
            where = same.index(False) if False in same else len(same)
            ours, theirs = ours[where:][:6], theirs[where:][:6]
            raise ValueError(
                f"engine: {api.url} has another {what} than the policy: from token {where} on {theirs} where we have "
                f"{ours} ({tokenizer.decode(ours, specials=True)!r}); start it with the policy's own directory"
            )


@torch.no_grad()
def check_logprobs(server, policy: Policy, tokenizer, *, temperature: float, max_gap: float) -> None:
    """Raise ValueError where the server's log-probs of a few completions are not those of the policy.

    All ranks call it, with whole weights. `max_gap` bounds the mean absolute difference in nats.
    """
    prompt = encode_prompt(TALK, tokenizer, max_length=1 << 30) if tokenizer.template else tokenizer.encode(TEXT)
    turns = server.answer(policy, [prompt] * PROBES, list(range(PROBES))) if server.is_main else None
    turns = from_main(turns)  # all ranks score the same rows: sharded forwards are collective
    rows = [(turn.ids[:PROBE_TOKENS], turn.logprobs[:PROBE_TOKENS]) for turn in turns]
    theirs = torch.tensor([x for _, logprobs in rows for x in logprobs])
    gap, raw = ((theirs - ours_at(policy, prompt, rows, t, tokenizer.pad_id)).abs() for t in (temperature, 1.0))
    found = (
        f"engine: over {len(gap)} tokens the log-probs of {server.api.url} are {gap.mean():.4f} nats from the policy's"
    )
    if temperature != 1 and raw.mean() < gap.mean() / 2:
        raise ValueError(
            f"{found} at sampling.temperature={temperature} and {raw.mean():.4f} from those before the temperature, "
            f"which it was not drawn with: {server.api.raw_logprobs}"
        )
    if gap.mean() > max_gap:
        raise ValueError(
            f"{found} on average, {gap.max():.3f} at most, and engine.max_gap={max_gap} allows less: are "
            "its weights quantised, or did it not load them? A larger engine.max_gap takes it as it is"
        )
    if server.is_main:
        kept = str(server.api.matrices).removeprefix("torch.")
        log.info("%s on average; window %d, weights sent in %s", found, server.window, kept)


def ours_at(policy: Policy, prompt: list[int], rows: list, temperature: float, pad_id: int) -> Tensor:
    """The policy's log-probs of the rows' tokens, one after the other, on the CPU."""
    examples = [
        {"input_ids": prompt + ids, "completion_mask": [False] * len(prompt) + [True] * len(ids)} for ids, _ in rows
    ]
    batch = make_rows(examples, pad_id).to(policy.lm_head.weight.device)
    return policy.logprobs(*batch, temperature=temperature)[batch.completion_mask].float().cpu()
