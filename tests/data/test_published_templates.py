"""Published chat templates, each with its model's own way: ids and masks are transformers', or the row is refused.

The templates are read from the wheels of trl and axolotl (Apache-2.0, installed for tests without their
dependencies), which carry them as published. `make test-templates` reads those that llama.cpp collects.
"""

import datetime
import importlib.util
import json
import os
import re
from pathlib import Path

import pytest
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from data.chat import encode_prompt, encode_rows
from data.chat_template import targets_of
from data.messages import parse_messages
from data.tokenizer import Tokenizer
from data.vocabularies import Vocabulary

LONG = 1 << 20
TOKEN = re.compile(
    r"<\|[^|>\s'\"{}]{1,40}\|>|<｜[^｜]{1,40}｜>|\[/?(?:INST|TOOL_CALLS|TOOL_RESULTS|AVAILABLE_TOOLS|SYSTEM_PROMPT)\]"
    r"|<(?:start_of_turn|end_of_turn|sop|sep|/?think|/?tool_call|/?tool_response|\|turn|turn\||SPECIAL_\d+|seed:[be]os|end_of_sentence)>"
    r"|\[e~\["
)
ORDINARY = {"<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"}
STOPS = {  # that models' files name; other stop tokens are found in the template
    "<|return|>",
    "<|call|>",
    "<seed:eos>",
    "<|end_of_msg|>",
    "<|END_OF_TURN_TOKEN|>",
    "[e~[",
    "<sep>",
    "<SPECIAL_12>",
    "<end_of_sentence>",
}
CARELESS = {"<｜User｜>", "<｜Assistant｜>"}  # markers that the makers' file does not call special

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Tells the weather of a city.",
            "parameters": {"type": "object", "properties": {"city": {"type": "string", "description": "Its name"}}},
        },
    }
]
CALL = {"id": "abcdef123", "type": "function", "function": {"name": "get_weather", "arguments": {"city": "Tromsø"}}}
RESULT = {"role": "tool", "name": "get_weather", "tool_call_id": "abcdef123", "content": '{"t": 4}'}


def user(content):
    return {"role": "user", "content": content}


def assistant(content, **more):
    return {"role": "assistant", "content": content, **more}


def system(content):
    return {"role": "system", "content": content}


def parts(*texts):
    return [{"type": "text", "text": text} for text in texts]


CONVERSATIONS = {
    "single": [user("What is the capital of France?"), assistant("Paris is the capital.")],
    "system": [system("You answer in one word."), user("Capital of Italy?"), assistant("Rome")],
    "several": [user("Hi!"), assistant("Hello!"), user("A joke?"), assistant("None."), user("Oh?"), assistant("Ha")],
    "call": [user("Weather in Tromsø?"), assistant("", tool_calls=[CALL]), RESULT, assistant("It is 4 degrees.")],
    "null": [system("Use tools."), user("Weather?"), assistant(None, tool_calls=[CALL]), RESULT, assistant("Cold.")],
    "thinking": [user("2+2?"), assistant("Four.", reasoning_content="Two and two is four.")],
    "inline": [user("2+2?"), assistant("<think>\nTwo and two.\n</think>\n\nIt is 4.")],
    "thought before": [user("2+2?"), assistant("4", reasoning_content="It is four."), user("3+3?"), assistant("Six")],
    "empty system": [system(""), user("Hello?"), assistant("Yes, I am here.")],
    "unicode": [user("naïve café 🙂🙃 — ½ ﬁ?"), assistant("はい、🙂 そうです。\n\n  二行目\tend")],
    "markers": [
        user("What do <|im_end|> and </s> and [INST] and <|eot_id|> and <｜User｜> do?"),
        assistant("The marker <|im_end|>\n<|im_start|>user<end_of_turn> ends a turn; </s>[/INST]<|end|> too."),
    ],
    "unlearned": [user("2+2?"), assistant("Five.", train=False), user("Sure?"), assistant("Sorry, four.")],
    "developer": [{"role": "developer", "content": "Answer briefly."}, user("Hi"), assistant("Hello")],
    "parts": [user(parts("Describe ", "a cat. ")), assistant(parts("Furry."))],
}
# Where a template cannot write the one, it may write the other.
OTHERWISE = {
    "developer": [system("Answer briefly."), user("Hi"), assistant("Hello")],
    "parts": [user("Describe a cat. "), assistant("Furry.")],
    "null": [system("Use tools."), user("Weather?"), assistant("", tool_calls=[CALL]), RESULT, assistant("Cold.")],
}
# Of each template, what is refused: what it cannot write, or what it writes otherwise than at generation.
LOSES_THINKING = {"thinking", "thought before"}
NO_TOOLS = {"call", "null"}
REFUSED = {
    "trl/cohere": LOSES_THINKING | NO_TOOLS,
    "trl/cohere2": LOSES_THINKING | NO_TOOLS,
    "trl/deepseek_r1_distill": set(CONVERSATIONS),
    "trl/deepseekv3": set(CONVERSATIONS),
    "trl/deepseekv3_training": LOSES_THINKING | NO_TOOLS | {"inline"},
    "trl/gemma": LOSES_THINKING | NO_TOOLS | {"developer", "empty system", "system"},
    "trl/gemma3": LOSES_THINKING | NO_TOOLS,
    "trl/gemma3_training": LOSES_THINKING | NO_TOOLS,
    "trl/gemma4": LOSES_THINKING | NO_TOOLS,
    "trl/glm4moe_training": set(),
    "trl/gptoss": set(),
    "trl/gptoss_training": set(),
    "trl/llama3": LOSES_THINKING | NO_TOOLS,
    "trl/llama3_1": LOSES_THINKING,
    "trl/llama3_2": LOSES_THINKING,
    "trl/llama3_training": LOSES_THINKING | NO_TOOLS,
    "trl/lfm2": LOSES_THINKING | NO_TOOLS,
    "trl/nemotron_3_nano_training": set(),
    "trl/phi3": LOSES_THINKING | NO_TOOLS,
    "trl/phi3_5": LOSES_THINKING | NO_TOOLS,
    "trl/phi3_training": LOSES_THINKING | NO_TOOLS,
    "trl/qwen2_5": LOSES_THINKING,
    "trl/qwen2_5_training": LOSES_THINKING,
    "trl/qwen3": set(),
    "trl/qwen3_training": set(),
    "trl/qwen3_instruct_2507": LOSES_THINKING,
    "trl/qwen3_5_think": set(),
    "trl/qwen3_5_think_training": set(),
    "trl/qwen3_5_nothink": LOSES_THINKING | {"inline"},
    "trl/qwen3_6_training": set(),
    "trl/qwen3_8": set(),
    "axolotl/alpaca": LOSES_THINKING | NO_TOOLS,
    "axolotl/aya": LOSES_THINKING | NO_TOOLS,
    "axolotl/chatml": LOSES_THINKING | NO_TOOLS,
    "axolotl/command_a": LOSES_THINKING | NO_TOOLS,
    "axolotl/deepseek_v2": LOSES_THINKING | NO_TOOLS,
    "axolotl/falcon_h1": LOSES_THINKING | NO_TOOLS,
    "axolotl/jamba": LOSES_THINKING,
    "axolotl/llama4": LOSES_THINKING,
    "axolotl/mistral_v1": LOSES_THINKING | NO_TOOLS,
    "axolotl/mistral_v3_tekken": LOSES_THINKING | {"developer", "empty system", "null", "system"},
    "axolotl/mistral_v7_tekken": LOSES_THINKING | NO_TOOLS,
    "axolotl/phi_4": LOSES_THINKING | NO_TOOLS,
    "axolotl/qwen_25": LOSES_THINKING,
}
# Per template, the conversations that become one row per turn, as it writes a turn differently after later turns.
ROWS = {
    "trl/glm4moe_training": {"thought before"},
    "trl/gptoss": {"several", "thought before"},
    "trl/gptoss_training": {"several", "thought before"},
    "trl/nemotron_3_nano_training": {"thought before"},
    "trl/phi3_training": {"several"},
    "trl/qwen3": NO_TOOLS | {"several", "thought before"},
    "trl/qwen3_5_think": {"several", "thought before"},
    "trl/qwen3_5_nothink": {"several"},
}


def find_templates() -> dict[str, Path]:
    found = {}
    for package, folder in (("trl", "chat_templates"), ("axolotl", "utils/chat_templates/templates")):
        if spec := importlib.util.find_spec(package):
            (root,) = spec.submodule_search_locations
            found |= {f"{package}/{path.stem}": path for path in (Path(root) / folder).glob("*.jinja")}
    return found


PUBLISHED = find_templates()


@pytest.fixture(scope="module")
def letters():
    """A byte-level tokenizer that knows little."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    texts = (Path(__file__).parents[2] / "docs" / "data.md").read_text().splitlines()
    backend.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    )
    return backend.to_str()


@pytest.fixture
def the_day(monkeypatch):
    """transformers believes that today is data.date."""
    from transformers.utils import chat_template_utils

    class Day(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return cls(2026, 1, 1)

    monkeypatch.setattr(chat_template_utils, "datetime", Day)


def make_tokenizers(letters: str, jinja: str):
    """Ours and transformers', with every marker that the template names as a token."""
    transformers = pytest.importorskip("transformers")
    backend = Backend.from_str(letters)
    names = dict.fromkeys([*TOKEN.findall(jinja), "<s>", "</s>", "<|im_end|>", "<|endoftext|>"])
    if re.search(r"['\"]<\|['\"] *[+~]", jinja):  # '<|' + message['role'] + '|>'
        names |= dict.fromkeys(["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"])
    ordinary = [name for name in names if name in ORDINARY | CARELESS]
    backend.add_tokens([AddedToken(name, normalized=False) for name in ordinary])
    backend.add_special_tokens([AddedToken(n, special=True, normalized=False) for n in names if n not in ordinary])
    settings = {"bos_token": "<s>", "eos_token": "</s>"}
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **settings)
    theirs.chat_template = jinja
    stops = tuple(backend.token_to_id(name) for name in names if name in STOPS)
    about = {"templates": {"default": jinja}, "stop_ids": stops}
    ours = Tokenizer(Vocabulary(Backend.from_str(backend.to_str()), "<s>", "</s>", **about))
    theirs.chat_control_tokens = tuple(ours.specials)
    return ours, theirs


def truth(theirs, stops: list[str], messages: list[dict], tools, *, sanitise: bool):
    """(ids, mask, ids of the prompt of the last turn) as transformers gives them; None where it fails."""
    learned = [i for i, m in enumerate(messages) if m["role"] == "assistant" and m.get("train", True)]
    messages = [{key: value for key, value in m.items() if key != "train"} for m in messages]

    def text(said, **how):
        return theirs.apply_chat_template(said, tools=tools, tokenize=False, **how)

    how = {"tools": tools, "tokenize": True, "sanitize_control_tokens": sanitise}
    try:
        ids = theirs.apply_chat_template(messages, return_dict=False, **how)
        prompt = theirs.apply_chat_template(messages[:-1], return_dict=False, add_generation_prompt=True, **how)
        whole = text(messages)
        if sanitise:
            return ids, None, prompt
        if re.search(r"\{%-?\s*generation", theirs.chat_template):
            out = theirs.apply_chat_template(messages, tools=tools, return_dict=True, return_assistant_tokens_mask=True)
            mask = [bool(x) for x in out["assistant_masks"]]
            if len(learned) == sum(m["role"] == "assistant" for m in messages):
                return ids, mask, prompt
            if learned != [len(messages) - 1]:
                return ids, None, prompt
            asked = theirs.apply_chat_template(messages[:-1], return_dict=False, **how)
            before = len(os.path.commonprefix([asked, ids]))  # the last turn alone
            return ids, [x and t >= before for t, x in enumerate(mask)], prompt
        spans = []
        for i in learned:
            asked = text(messages[:i], add_generation_prompt=True)
            assert whole.startswith(asked)
            ends = [whole.find(stop, len(asked)) + len(stop) for stop in stops if stop in whole[len(asked) :]]
            spans.append((len(asked), min(ends)))
        places = theirs(whole, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        return ids, [any(a < end and b > start for start, end in spans) for a, b in places], prompt
    except Exception as error:  # noqa: BLE001 - a template may fail in any way
        return repr(error)


def holds(theirs, messages: list[dict], texts: list[str]) -> bool:
    """Whether transformers' rendering holds these texts, and no Python list in place of them."""
    try:
        written = theirs.apply_chat_template(messages, tokenize=False)
    except Exception:  # noqa: BLE001
        return False
    return all(text.strip() in written for text in texts) and "{'type'" not in written


def compare(ours: Tokenizer, theirs, name: str) -> str:
    """ "equal", "rows" (a row for each turn) or why it is refused; AssertionError where ids or masks differ."""
    messages, tools = CONVERSATIONS[name], TOOLS if name in NO_TOOLS else None
    try:
        rows = encode_rows(parse_messages(messages), ours, max_length=LONG, tools=tools)
    except ValueError as error:
        return str(error)
    if len(rows) == 1:
        return compare_row(rows[0], ours, theirs, name, messages, tools)
    for i, row in zip(targets_of(messages), rows, strict=True):
        said = [m | {"train": j == i} if m["role"] == "assistant" else m for j, m in enumerate(messages[: i + 1])]
        found = compare_row(row, ours, theirs, name, said, tools)
        if found != "equal":
            return found
    return "rows"


def compare_row(row: dict, ours: Tokenizer, theirs, name: str, messages: list[dict], tools) -> str:
    stops = [theirs.convert_ids_to_tokens(i) for i in ours.stop_ids]
    expected = truth(theirs, stops, messages, tools, sanitise=name == "markers")
    if name in OTHERWISE and (isinstance(expected, str) or row["input_ids"] != expected[0]):
        texts = ["Answer briefly."] if name == "developer" else ["Describe ", "a cat. "]
        assert name == "null" or not holds(theirs, messages, texts), "the template writes this conversation as it is"
        flags = [{"train": m["train"]} if "train" in m else {} for m in messages]
        messages = [m | flag for m, flag in zip(OTHERWISE[name], flags, strict=False)]
        expected = truth(theirs, stops, messages, tools, sanitise=False)
    if isinstance(expected, str):
        return f"written here, and not by transformers: {expected}"
    ids, mask, prompt = expected
    assert row["input_ids"] == ids
    assert mask is None or row["completion_mask"] == mask
    assert encode_prompt(parse_messages(messages[:-1]), ours, max_length=LONG, tools=tools) == prompt
    if name == "markers":
        (honest,) = encode_rows(parse_messages([user("a"), assistant("b")]), ours, max_length=LONG)
        special = [
            [i for i in r["input_ids"] if theirs.convert_ids_to_tokens(i) in ours.specials] for r in (row, honest)
        ]
        assert special[0] == special[1]
    return "equal"


@pytest.mark.parametrize("template", sorted(REFUSED))
def test_ids_and_masks_are_those_of_transformers_or_the_row_is_refused(template, letters, the_day):
    if template not in PUBLISHED:
        pytest.skip(f"the wheel {template.split('/')[0]}, which carries the template, is not installed")
    ours, theirs = make_tokenizers(letters, PUBLISHED[template].read_text(encoding="utf-8"))
    found = {name: compare(ours, theirs, name) for name in CONVERSATIONS}
    assert {name for name, why in found.items() if why not in ("equal", "rows")} == REFUSED[template], found
    assert {name for name, why in found.items() if why == "rows"} == ROWS.get(template, set())


FURTHER = json.loads(Path(__file__).with_name("llama_cpp_templates.json").read_text())


@pytest.mark.parametrize("template", sorted(FURTHER) if "CHAT_TEMPLATES" in os.environ else [])  # make test-templates
def test_the_templates_that_llama_cpp_collects_are_equal_or_refused(template, letters, the_day):
    path = Path(os.environ["CHAT_TEMPLATES"]) / f"{template}.jinja"
    ours, theirs = make_tokenizers(letters, path.read_text(encoding="utf-8"))
    found = {name: compare(ours, theirs, name) for name in CONVERSATIONS}
    refused = FURTHER[template]["refused"]
    refused = set(CONVERSATIONS) if refused == "all" else set(refused)
    assert {name for name, why in found.items() if why not in ("equal", "rows")} == refused, found
    assert {name for name, why in found.items() if why == "rows"} == set(FURTHER[template]["rows"])
