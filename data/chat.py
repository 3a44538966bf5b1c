"""Messages -> token ids and the mask of what the assistant says. The only chat templates in the house.

A template is written twice, as a generator of parts (ours: it knows the mask) and as Jinja (`data/jinja.py`, for the
exported model); tests hold both against each other and against published templates, id by id.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

ROLES = ("system", "user", "assistant", "tool")
Message = dict[str, str]  # {"role": one of ROLES, "content": text}


class Part(NamedTuple):
    """A special token or a stretch of text; `target` marks what the model must learn to emit."""

    text: str
    special: bool = False
    target: bool = False


class Template(NamedTuple):
    """`parts` spells messages; an assistant message whose content is None stands for the turn to come: its header."""

    parts: Callable[[list[Message], str | None], Iterator[Part]]  # of messages, default system message
    stop: str  # the token that ends an assistant turn; "eos" and "bos" stand for the tokenizer's own
    needs: tuple[str, ...]  # special tokens that the tokenizer must have


def _chatml(messages: list[Message], default_system: str | None) -> Iterator[Part]:
    if default_system and (not messages or messages[0]["role"] != "system"):
        messages = [{"role": "system", "content": default_system}, *messages]
    for role, content in _turns(messages):
        yield Part("<|im_start|>", special=True)
        yield Part(f"{role}\n")
        yield from _said(role, content, "<|im_end|>", "\n")


def _llama3(messages: list[Message], _: str | None) -> Iterator[Part]:
    yield Part("bos", special=True)
    for role, content in _turns(messages):
        yield Part("<|start_header_id|>", special=True)
        yield Part(role)
        yield Part("<|end_header_id|>", special=True)
        yield Part("\n\n")
        yield from _said(role, content and content.strip(), "<|eot_id|>")


def _zephyr(messages: list[Message], _: str | None) -> Iterator[Part]:
    for role, content in _turns(messages):
        yield Part(f"<|{role}|>\n")  # text, not a token: Zephyr kept Mistral's vocabulary
        yield from _said(role, content, "eos", "\n")


def _plain(messages: list[Message], _: str | None) -> Iterator[Part]:
    yield Part("bos", special=True)
    for role, content in _turns(messages):
        yield Part(f"<|{role}|>", special=True)
        yield from _said(role, content, "<|end|>")


def _llama2(messages: list[Message], _: str | None) -> Iterator[Part]:
    system, messages = _leading_system(messages)
    inside = False  # of an exchange that a <s> has opened
    for role, content in _turns(messages):
        if role == "assistant":
            if not inside:
                yield Part("bos", special=True)
            if content is not None:
                yield Part(f" {content.strip()} ", target=True)
                yield Part("eos", special=True, target=True)
        else:
            if system is not None:
                content, system = f"<<SYS>>\n{system}\n<</SYS>>\n\n{content}", None
            yield Part("bos", special=True)
            yield Part(f"[INST] {content.strip()} [/INST]")
        inside = role != "assistant"


def _mistral(messages: list[Message], _: str | None) -> Iterator[Part]:
    system, messages = _leading_system(messages)
    yield Part("bos", special=True)
    for role, content in _turns(messages):
        if role == "assistant":
            if content is not None:
                yield Part(f" {content}", target=True)
                yield Part("eos", special=True, target=True)
        else:
            if system is not None:
                content, system = f"{system}\n\n{content}", None
            yield Part(f"[INST] {content} [/INST]")


TEMPLATES = {
    "chatml": Template(_chatml, "<|im_end|>", ("<|im_start|>", "<|im_end|>")),
    "llama2": Template(_llama2, "eos", ("bos", "eos")),
    "llama3": Template(_llama3, "<|eot_id|>", ("bos", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")),
    "zephyr": Template(_zephyr, "eos", ("eos",)),
    "mistral": Template(_mistral, "eos", ("bos", "eos")),
    "plain": Template(_plain, "<|end|>", ("bos", *(f"<|{role}|>" for role in ROLES), "<|end|>")),
}


def encode_chat(messages: list[Message], tokenizer, *, max_length: int) -> dict[str, Any]:
    """Tokens of one conversation and the mask of the tokens that the model must learn to emit.

        <s> <|user|> Hi <|end|> <|assistant|> Hello <|end|>
         0     0     0     0          0         1      1      <- completion_mask

    The stop token of an assistant turn is inside the mask: a model never trained to stop never stops. Text is cut on
    the right at `max_length` tokens. Content that spells a special token stays text, so nobody can forge a turn.

    Where an assistant turn begins, its tokens begin: header and content are tokenised apart, as at generation. So ids
    equal those of the model's own Jinja template unless an assistant's content begins with a line break that the
    tokenizer would fuse with the header's.

    Raises:
        ValueError: unknown role, no assistant turn, or nothing left to learn from after the cut.
    """
    input_ids, completion_mask = _encode(messages, tokenizer)
    if not any(completion_mask):
        roles = ", ".join(dict.fromkeys(m["role"] for m in messages)) or "none"
        raise ValueError(f"a conversation without an assistant turn teaches nothing (its roles: {roles})")
    if not any(completion_mask[:max_length]):
        raise ValueError(
            f"no assistant token within max_length={max_length}: the first comes after {completion_mask.index(True)} "
            "tokens; raise data.max_length, or leave such rows out with data.on_bad_row=skip"
        )
    return _row(input_ids, completion_mask, max_length, num_cut=max(len(input_ids) - max_length, 0))


def encode_prompt(messages: list[Message], tokenizer, *, max_length: int) -> list[int]:
    """Token ids of a conversation, ending with the header of the assistant turn to come.

    A prompt over `max_length` tokens loses its beginning; a <s> at its very start stays.
    """
    return cut_prompt(_prompt_ids(messages, tokenizer), tokenizer, max_length=max_length)


def encode_completion(
    messages, completion: str, tokenizer, *, max_length: int, max_prompt_length: int
) -> dict[str, Any]:
    """Prompt, completion and stop token; only the last two are inside the mask. See `encode_completions`."""
    return encode_completions(
        messages, [completion], tokenizer, max_length=max_length, max_prompt_length=max_prompt_length
    )[0]


def encode_completions(
    messages: list[Message], completions: list[str], tokenizer, *, max_length: int, max_prompt_length: int
) -> list[dict[str, Any]]:
    """K completions of one prompt, whose rows share the prompt's tokens exactly.

    Where the longest does not fit, the prompt loses its beginning (down to `max_prompt_length` tokens at most), then
    every completion its end: a completion that was cut has no stop token, for it has not ended.

    Raises:
        ValueError: unknown role, or no room for a completion token.
    """
    prompt = _prompt_ids(messages, tokenizer)
    answers = []
    for completion in completions:
        ids, mask = _encode([*messages, {"role": "assistant", "content": completion}], tokenizer)
        stop = len(mask) - 1 - mask[::-1].index(True)  # what follows the stop token belongs to the next turn
        assert ids[: len(prompt)] == prompt and ids[stop] == tokenizer.stop_id
        answers.append(ids[len(prompt) : stop + 1])
    room = max(max_prompt_length, max_length - max(len(answer) for answer in answers))
    whole, prompt = prompt, cut_prompt(prompt, tokenizer, max_length=min(room, len(prompt)))
    if len(prompt) >= max_length:
        raise ValueError(
            f"no completion token within max_length={max_length}: the prompt takes {len(prompt)} tokens "
            f"(max_prompt_length={max_prompt_length}); raise data.max_length or lower data.max_prompt_length"
        )
    rows = []
    for answer in answers:
        mask = [False] * len(prompt) + [True] * len(answer)
        num_cut = len(whole) - len(prompt) + max(len(mask) - max_length, 0)
        rows.append(_row(prompt + answer, mask, max_length, num_cut=num_cut))
    return rows


def _row(input_ids: list[int], completion_mask: list[bool], max_length: int, *, num_cut: int) -> dict[str, Any]:
    """One row, cut on the right; `num_cut` tells how many tokens were lost at either end."""
    return {
        "input_ids": input_ids[:max_length],
        "completion_mask": completion_mask[:max_length],
        "num_cut": num_cut,
    }


def cut_prompt(prompt: list[int], tokenizer, *, max_length: int) -> list[int]:
    """The last `max_length` ids, a leading <s> kept."""
    if len(prompt) <= max_length:
        return prompt
    if prompt[0] == tokenizer.bos_id and max_length > 1:
        return prompt[:1] + prompt[len(prompt) - max_length + 1 :]
    return prompt[len(prompt) - max_length :]


def _prompt_ids(messages: list[Message], tokenizer) -> list[int]:
    return _encode([*messages, {"role": "assistant", "content": None}], tokenizer)[0]


def _encode(messages: list[Message], tokenizer) -> tuple[list[int], list[bool]]:
    """Ids and mask of the parts. Text between two special tokens is tokenised in one go, except where targets begin."""
    input_ids: list[int] = []
    completion_mask: list[bool] = []

    def add(ids: list[int], target: bool) -> None:
        input_ids.extend(ids)
        completion_mask.extend([target] * len(ids))

    text = ""  # not yet tokenised
    for part in tokenizer.chat_template.parts(messages, tokenizer.default_system):
        if not part.special and not part.target:
            text += part.text
            continue
        add(tokenizer.encode(text), False)
        if part.special:
            add([tokenizer.special_id(part.text)], part.target)
        else:
            add(tokenizer.encode(part.text, after=text), True)
        text = ""
    add(tokenizer.encode(text), False)
    return input_ids, completion_mask


def _turns(messages: list[Message]) -> Iterator[tuple[str, str | None]]:
    for i, message in enumerate(messages):
        if message["role"] not in ROLES:
            raise ValueError(f"messages[{i}] has role {message['role']!r}; known roles: {', '.join(ROLES)}")
        yield message["role"], message["content"]
        if message["content"] is None:
            return


def _said(role: str, content: str | None, stop: str, between: str = "") -> Iterator[Part]:
    """A turn after its header: text, stop token, and what stands between turns. Nothing for the turn to come."""
    if content is not None:
        yield Part(content, target=role == "assistant")
        yield Part(stop, special=True, target=role == "assistant")
        yield Part(between)


def _leading_system(messages: list[Message]) -> tuple[str | None, list[Message]]:
    """These templates have no place of their own for a system message: it joins the first user turn."""
    first = messages[0]["role"] == "system" if messages else False
    system, rest = (messages[0]["content"], messages[1:]) if first else (None, messages)
    if any(m["role"] == "system" for m in rest):
        raise ValueError("this template takes one system message, at the beginning")
    if first and (not rest or rest[0]["role"] not in ("user", "tool")):
        raise ValueError("this template writes the system message into the user turn that must follow it")
    return system, rest
