"""The templates of `data/chat.py` as Jinja, for the exported model: what transformers, vLLM and lm-eval render."""

from jinja2.sandbox import ImmutableSandboxedEnvironment

_EACH = "{% for message in messages %}"
_CHATML = (
    _EACH + "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
_DEFAULT_SYSTEM = (
    "{% if not messages or messages[0]['role'] != 'system' %}{{ '<|im_start|>system\\n%s<|im_end|>\\n' }}{% endif %}"
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
    "{% set ns.system = messages[0]['content'] %}{% set turns = messages[1:] %}{% endif %}"
)
_LLAMA2 = (
    _TAKE_SYSTEM + "{% for message in turns %}{% if message['role'] == 'assistant' %}"
    "{% if not ns.inside %}{{ bos_token }}{% endif %}{{ ' ' + message['content'] | trim + ' ' + eos_token }}"
    "{% set ns.inside = false %}{% else %}{% set content = message['content'] %}{% if ns.system is not none %}"
    "{% set content = '<<SYS>>\\n' + ns.system + '\\n<</SYS>>\\n\\n' + content %}{% set ns.system = none %}{% endif %}"
    "{{ bos_token + '[INST] ' + content | trim + ' [/INST]' }}{% set ns.inside = true %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt and not ns.inside %}{{ bos_token }}{% endif %}"
)
_MISTRAL = (
    "{{ bos_token }}" + _TAKE_SYSTEM + "{% for message in turns %}{% if message['role'] == 'assistant' %}"
    "{{ ' ' + message['content'] + eos_token }}{% else %}{% set content = message['content'] %}"
    "{% if ns.system is not none %}{% set content = ns.system + '\\n\\n' + content %}"
    "{% set ns.system = none %}{% endif %}"
    "{{ '[INST] ' + content + ' [/INST]' }}{% endif %}{% endfor %}"
)
_JINJA = {
    "chatml": _CHATML,
    "llama2": _LLAMA2,
    "llama3": _LLAMA3,
    "zephyr": _ZEPHYR,
    "mistral": _MISTRAL,
    "plain": _PLAIN,
}


def jinja_template(name: str, default_system: str | None) -> str:
    """Jinja text of the template `name`; ChatML models may add a system message of their own."""
    opening = _DEFAULT_SYSTEM.replace("%s", default_system) if name == "chatml" and default_system else ""
    return opening + _JINJA[name]


def recognise(jinja: str | None) -> str | None:
    """The name of our template that a model's own Jinja text spells, by the markers that it writes; None if none."""
    markers = {
        "<|im_start|>": "chatml",
        "<|start_header_id|>": "llama3",
        "<<SYS>>": "llama2",
        "[INST]": "mistral",
        "<|end|>": "plain",
        "<|assistant|>": "zephyr",
        "'<|' + message['role'] + '|>": "zephyr",
    }
    return next((name for marker, name in markers.items() if marker in (jinja or "")), None)


def agree(one: str, other: str, **tokens: str | None) -> bool:
    """Whether two templates say the same of a conversation with and without a system message, answered or not."""
    sandbox = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)  # as transformers renders
    roles = ("system", "user", "assistant", "user", "assistant")
    said = [{"role": role, "content": f"{role} {i}"} for i, role in enumerate(roles)]
    try:
        written, expected = (
            [
                sandbox.from_string(text).render(messages=messages, add_generation_prompt=waits, **tokens)
                for messages, waits in ((said, False), (said[1:], False), (said[:-1], True), (said[1:-1], True))
            ]
            for text in (one, other)
        )
    except Exception:  # noqa: BLE001 - somebody else's template may fail in any way: 1 / 0, too long a range
        return False
    return written == expected
