"""Chat templates for models that come without one (`data.template=chatml`), as the Jinja that an export carries."""

from pathlib import Path

from data.chat_template import ChatTemplate

_KNOWN = (
    "{% if message['role'] not in ['system', 'user', 'assistant', 'tool'] %}"
    "{{ raise_exception('it knows no role ' + message['role']) }}{% endif %}"
)
_EACH = "{% for message in messages %}" + _KNOWN
_CHATML = (
    _EACH + "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
_LLAMA3 = (
    "{{ bos_token }}" + _EACH + "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}"
    "{{ message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
_ZEPHYR = (
    _EACH + "{{ '<|' + message['role'] + '|>\\n' + message['content'] + eos_token + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)
_PLAIN = (
    "{{ bos_token }}" + _EACH + "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
# The system message joins the first user turn; `inside` is true while an exchange waits for its answer.
_TAKE_SYSTEM = (
    "{% set ns = namespace(system=none, inside=false) %}{% set turns = messages %}"
    "{% if messages and messages[0]['role'] == 'system' %}"
    "{% set ns.system = messages[0]['content'] %}{% set turns = messages[1:] %}"
    "{% if not turns or turns[0]['role'] not in ['user', 'tool'] %}"
    "{{ raise_exception('it writes the system message into the user turn that must follow it') }}{% endif %}{% endif %}"
)
_EACH_TURN = (
    "{% for message in turns %}" + _KNOWN + "{% if message['role'] == 'system' %}"
    "{{ raise_exception('it takes one system message, at the beginning') }}{% endif %}"
)
_LLAMA2 = (
    _TAKE_SYSTEM + _EACH_TURN + "{% if message['role'] == 'assistant' %}"
    "{% if not ns.inside %}{{ bos_token }}{% endif %}{{ ' ' + message['content'] | trim + ' ' + eos_token }}"
    "{% set ns.inside = false %}{% else %}{% set content = message['content'] %}{% if ns.system is not none %}"
    "{% set content = '<<SYS>>\\n' + ns.system + '\\n<</SYS>>\\n\\n' + content %}{% set ns.system = none %}{% endif %}"
    "{{ bos_token + '[INST] ' + content | trim + ' [/INST]' }}{% set ns.inside = true %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt and not ns.inside %}{{ bos_token }}{% endif %}"
)
_MISTRAL = (
    "{{ bos_token }}" + _TAKE_SYSTEM + _EACH_TURN + "{% if message['role'] == 'assistant' %}"
    "{{ ' ' + message['content'] + eos_token }}{% else %}{% set content = message['content'] %}"
    "{% if ns.system is not none %}{% set content = ns.system + '\\n\\n' + content %}"
    "{% set ns.system = none %}{% endif %}"
    "{{ '[INST] ' + content + ' [/INST]' }}{% endif %}{% endfor %}"
)
TEMPLATES = {
    "chatml": _CHATML,
    "llama2": _LLAMA2,
    "llama3": _LLAMA3,
    "zephyr": _ZEPHYR,
    "mistral": _MISTRAL,
    "plain": _PLAIN,
}
_NEEDS = {  # tokens that the tokenizer must have
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "llama3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "plain": ("<|system|>", "<|user|>", "<|assistant|>", "<|tool|>", "<|end|>"),
}
_NEEDS_EOS = ("llama2", "zephyr", "mistral")
REPLACE = "replace:"  # data.template=replace:NAME: also where the checkpoint's own template writes otherwise


def choose_template(wanted: str | None, vocabulary, *, date: str) -> ChatTemplate | None:
    """The checkpoint's own template, or the one that `wanted` names: one of TEMPLATES, or a file of Jinja text.

    Raises:
        ValueError: no such template, tokens that it needs and the tokenizer lacks, or a checkpoint whose own template
            writes conversations otherwise, unless `wanted` begins with "replace:".
    """
    own = ChatTemplate(vocabulary.templates, tokens=vocabulary.tokens, date=date) if vocabulary.templates else None
    if wanted is None:
        return own
    name = wanted.removeprefix(REPLACE)
    template = ChatTemplate({"default": _text(name, vocabulary)}, tokens=vocabulary.tokens, date=date)
    if own and wanted == name:
        difference = _difference(own, template)
        if difference is None:
            return own  # which knows of tools and more
        raise ValueError(
            f"data.template={name} writes conversations otherwise than the checkpoint's own template. Its own:\n"
            f"{difference[0]}\n{name}:\n{difference[1]}\nLeave data.template out to train with its own, or say "
            f"data.template={REPLACE}{name}"
        )
    return template


def _text(name: str, vocabulary) -> str:
    if name not in TEMPLATES:
        if Path(name).is_file():
            return Path(name).read_text(encoding="utf-8")
        raise ValueError(f"unknown chat template {name!r}; known: {', '.join(TEMPLATES)}, or a file of Jinja text")
    missing = [token for token in _NEEDS.get(name, ()) if vocabulary.backend.token_to_id(token) is None]
    missing += ["eos"] if name in _NEEDS_EOS and vocabulary.eos_token is None else []
    if missing:
        raise ValueError(
            f"the {name} template needs the special tokens {', '.join(missing)}, which this tokenizer lacks; set "
            "data.template to another (zephyr needs nothing but an end-of-text token)"
        )
    if name == "mistral" and "[INST]" in (t.content for t in vocabulary.backend.get_added_tokens_decoder().values()):
        raise ValueError(
            "[INST] is a token of its own in this tokenizer (Mistral-Instruct v0.3 and later), which data.template="
            "mistral (v0.1, v0.2) writes as text; leave data.template out, or give the file of another template"
        )
    return TEMPLATES[name]


def _difference(own: ChatTemplate, other: ChatTemplate) -> tuple[str, ...] | None:
    """Renderings of the first small conversation that the two write differently, None where they agree."""
    roles = ("system", "user", "assistant", "user", "assistant")
    said = [{"role": role, "content": f"{role} {i}"} for i, role in enumerate(roles)]
    for messages in (said, said[1:]):
        views = [(len(messages), False), (len(messages) - 1, True)]
        for ours, theirs in zip(*(t.render(messages, None, views) for t in (own, other)), strict=True):
            if ours != theirs:
                return tuple(repr(r.text if r.error is None else f"(refused: {r.error})") for r in (ours, theirs))
    return None
