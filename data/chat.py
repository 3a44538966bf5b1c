"""From messages to token ids and the mask of the assistant's tokens. `data/chat_template.py` renders the text."""

from typing import Any

from data.chat_template import Message, Spelled, targets_of

ROLES = ("system", "developer", "user", "assistant", "tool")


def encode_chat(messages: list[Message], tokenizer, *, max_length: int, tools: list[dict] | None = None) -> dict:
    """Tokens of one conversation and the mask of the tokens that the model must learn to emit.

        <s> <|user|> Hi <|end|> <|assistant|> Hello <|end|>
         0     0     0     0          0         1      1      <- completion_mask

    The mask includes the stop token of an assistant turn, because a model must learn to stop. Conversations are cut on
    the right at `max_length` tokens. Special tokens in the content are encoded as text, so no content can forge a turn.

    Header and content of an assistant turn are tokenised separately, as at generation. So the ids equal those of
    transformers' apply_chat_template, unless the tokenizer would merge the end of the header with the beginning of the
    answer, as where one is a space.

    Raises:
        ValueError: there is no assistant turn, or an empty one; the template cannot write the conversation; or the cut
            leaves no target.
    """
    _check_teaches(messages)
    spelled = tokenizer.chat_template.conversation(messages, tools)
    return _rows([tokenizer.encode_spelled(spelled)], max_length)[0]


def encode_rows(
    messages: list[Message], tokenizer, *, max_length: int, tools: list[dict] | None = None
) -> list[dict[str, Any]]:
    """The training rows of a conversation: one row as in `encode_chat`, or one row per target.

    The templates of Qwen3, GPT-OSS and others write earlier turns differently from the last one: without thinking,
    or with another end token. Then each assistant turn gets its own row, which ends with it and is written as at
    generation. Each target token is in one row. Turns that begin after `max_length` tokens are lost and counted.

    Raises:
        ValueError: see `encode_chat`.
    """
    _check_teaches(messages)
    return _rows(list(map(tokenizer.encode_spelled, tokenizer.chat_template.rows(messages, tools))), max_length)


def encode_prompt(messages: list[Message], tokenizer, *, max_length: int, tools: list[dict] | None = None) -> list[int]:
    """Token ids of a conversation and of the header of the next assistant turn.

    A prompt longer than `max_length` tokens is cut at its beginning. A leading <s> stays.
    """
    ids, _ = tokenizer.encode_spelled(Spelled(tokenizer.chat_template.prompt(messages, tools), []))
    return cut_prompt(ids, tokenizer, max_length=max_length)


def encode_completion(
    messages, completion: str, tokenizer, *, max_length: int, max_prompt_length: int, tools: list[dict] | None = None
) -> dict[str, Any]:
    """Prompt, completion and stop token. The mask covers completion and stop token. See `encode_completions`."""
    lengths = {"max_length": max_length, "max_prompt_length": max_prompt_length}
    return encode_completions(messages, [completion], tokenizer, **lengths, tools=tools)[0]


def encode_completions(
    messages: list[Message],
    completions: list[str],
    tokenizer,
    *,
    max_length: int,
    max_prompt_length: int,
    tools: list[dict] | None = None,
) -> list[dict[str, Any]]:
    """K completions of one prompt. All rows have the same prompt tokens.

    Where the longest row is too long, the prompt is cut at its beginning, to `max_prompt_length` tokens at least. Then
    completions are cut at their end. A cut completion has no stop token.

    Raises:
        ValueError: the template cannot write the conversation, or there is no room for a completion token.
    """
    answers = []
    for completion in completions:
        conversation = [*messages, {"role": "assistant", "content": completion}]
        text, [span], _ = tokenizer.chat_template.answer(conversation, tools)
        ids, mask = tokenizer.encode_spelled(Spelled(text[: span[1]], [span]))
        answers.append(ids[mask.index(True) :])
        prompt = ids[: mask.index(True)]
    room = max(max_prompt_length, max_length - max(len(answer) for answer in answers))
    whole, prompt = prompt, cut_prompt(prompt, tokenizer, max_length=min(room, len(prompt)))
    if len(prompt) >= max_length:
        raise ValueError(
            f"no completion token fits in max_length={max_length}: the prompt takes {len(prompt)} tokens "
            f"(max_prompt_length={max_prompt_length}); raise data.max_length or lower data.max_prompt_length"
        )
    rows = []
    for answer in answers:
        mask = [False] * len(prompt) + [True] * len(answer)
        num_cut = len(whole) - len(prompt) + max(len(mask) - max_length, 0)
        rows.append(_row(prompt + answer, mask, max_length, num_cut=num_cut))
    return rows


def cut_prompt(prompt: list[int], tokenizer, *, max_length: int) -> list[int]:
    """The last `max_length` ids. A leading <s> is kept."""
    if len(prompt) <= max_length:
        return prompt
    if prompt[0] == tokenizer.bos_id and max_length > 1:
        return prompt[:1] + prompt[len(prompt) - max_length + 1 :]
    return prompt[len(prompt) - max_length :]


def has_content(message: Message) -> bool:
    """Whether a message has text, thinking or a call that is more than white space."""
    content = message.get("content") or ""
    text = content if isinstance(content, str) else "".join(part["text"] for part in content)
    return bool(text.strip() or (message.get("reasoning_content") or "").strip() or message.get("tool_calls"))


def _check_teaches(messages: list[Message]) -> None:
    targets, roles = targets_of(messages), ", ".join(dict.fromkeys(m["role"] for m in messages)) or "none"
    if not targets and any(m["role"] == "assistant" for m in messages):
        raise ValueError('no assistant turn of the conversation is learned: each has "train": false or "weight": 0')
    if not targets:
        raise ValueError(f"a conversation without an assistant turn has nothing to learn (its roles: {roles})")
    for i in targets:
        if not has_content(messages[i]):
            raise ValueError(
                f'messages[{i}] is an empty assistant turn, which would teach empty answers; give it "train": false, '
                "or leave such rows out with data.on_bad_row=skip"
            )


def _rows(encoded: list[tuple[list[int], list[bool]]], max_length: int) -> list[dict[str, Any]]:
    """The rows of one conversation that still have targets. The last row counts the tokens of lost later turns."""
    rows, lost = [], 0
    for ids, mask in encoded:
        if any(mask[:max_length]):
            rows.append(_row(ids, mask, max_length, num_cut=max(len(ids) - max_length, 0)))
        else:
            lost += sum(mask)
    if not rows:
        raise ValueError(
            f"no assistant token fits in max_length={max_length}: the first one comes after "
            f"{encoded[0][1].index(True)} "
            "tokens; raise data.max_length, or leave such rows out with data.on_bad_row=skip"
        )
    rows[-1]["num_cut"] += lost
    return rows


def _row(input_ids: list[int], completion_mask: list[bool], max_length: int, *, num_cut: int) -> dict[str, Any]:
    """One row, cut on the right. `num_cut` is the number of tokens that were lost at both ends."""
    return {
        "input_ids": input_ids[:max_length],
        "completion_mask": completion_mask[:max_length],
        "num_cut": num_cut,
    }
