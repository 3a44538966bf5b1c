"""A checkpoint's own chat template: what is learned, what is refused, its bounds, and what an export keeps of it."""

import copy
import json

import pytest
from text_samples import data_config, said, write_rows

from data import sandbox
from data.builtin_templates import TEMPLATES
from data.chat import encode_chat, encode_completions, encode_prompt, encode_rows
from data.messages import parse_messages
from data.sft import encode_demonstrations
from data.tokenizer import load_tokenizer
from tests.data.test_tokenizer import byte_level_file

LONG = 1 << 20
SPECIALS = ["<|im_start|>", "<|im_end|>", "<|endoftext|>"]
# Tools, calls, thinking of the last answer only, and a date: what real templates do, in one of ours.
WHOLE = (
    "{%- set ns = namespace(last=-1) %}"
    "{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "<|im_start|>system\n{{ strftime_now('%d %b %Y') }}"
    "{%- if tools %}\n# Tools{% for tool in tools %}\n{{ tool | tojson }}{% endfor %}{% endif %}<|im_end|>\n"
    "{%- for m in messages %}<|im_start|>{{ m.role + '\n' }}"
    "{%- if m.reasoning_content and loop.index0 > ns.last %}<think>{{ m.reasoning_content }}</think>{% endif %}"
    "{{- m.content }}{% for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}"
    "<|im_end|>\n{% endfor %}"
    "{%- if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TOOL = {"type": "function", "function": {"name": "get_weather", "description": "Tells the weather."}}
CALLS = [{"type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Oslo"}'}}]


def speaker(directory, jinja=WHOLE, generation=None, **settings):
    byte_level_file(directory, SPECIALS, **({"eos_token": "<|im_end|>", "chat_template": jinja} | settings))
    if generation:
        (directory / "generation_config.json").write_text(json.dumps(generation))
    return load_tokenizer(directory)


def learned(tokenizer, messages, **how) -> list[str]:
    """The stretches of text that are targets, special tokens shown."""
    row = encode_chat(parse_messages(messages), tokenizer, max_length=LONG, **how)
    stretches, inside = [], False
    for token, target in zip(row["input_ids"], row["completion_mask"], strict=True):
        if target and not inside:
            stretches.append([])
        if target:
            stretches[-1].append(token)
        inside = target
    return [tokenizer.decode(ids, specials=True) for ids in stretches]


def test_calls_and_thinking_are_learned_as_the_template_writes_them(tmp_path):
    tokenizer = speaker(tmp_path)
    call = '<tool_call>{"name": "get_weather", "arguments": {"city": "Oslo"}}</tool_call>'
    for content in ("", None):  # arguments come as JSON text, as from OpenAI
        talk = [*said("Weather?"), {"role": "assistant", "content": content, "tool_calls": CALLS}]
        talk += [{"role": "tool", "content": "4"}, {"role": "assistant", "content": "4 degrees."}]
        assert learned(tokenizer, talk, tools=[TOOL]) == [f"{call}<|im_end|>", "4 degrees.<|im_end|>"]
    old = [*said("Weather?"), {"role": "assistant", "content": "", "function_call": CALLS[0]["function"]}]
    assert learned(tokenizer, old) == [f"{call}<|im_end|>"]
    for name in ("reasoning_content", "reasoning", "thinking"):
        talk = [*said("2+2?"), {"role": "assistant", "content": "4", name: "Two and two."}]
        assert learned(tokenizer, talk) == ["<think>Two and two.</think>4<|im_end|>"]


THOUGHT = [*said("2+2?"), {"role": "assistant", "content": "4", "reasoning_content": "It is."}, *said("3+3?", "6")]
# Ends the last turn with another token than those before it, as GPT-OSS, and puts tags around what is learned.
TAGGED = (
    "{%- for m in messages %}<|im_start|>{{ m.role + '\n' }}{% if m.role == 'assistant' %}{% generation %}"
    "{{- m.content }}{{ '<|endoftext|>' if loop.last else '<|im_end|>' }}{% endgeneration %}{% else %}"
    "{{- m.content }}<|im_end|>{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_one_row_cannot_hold_a_turn_that_the_template_rewrites(tmp_path):
    tokenizer = speaker(tmp_path)
    with pytest.raises(ValueError, match=r"drops or rewrites the reasoning_content of messages\[1\]"):
        encode_chat(THOUGHT, tokenizer, max_length=LONG)
    unlearned = [THOUGHT[0], THOUGHT[1] | {"train": False}, *THOUGHT[2:]]
    assert learned(tokenizer, unlearned) == ["6<|im_end|>"]


@pytest.mark.parametrize("kind", ["strips thinking", "ends otherwise", "has tags"])
def test_a_turn_that_the_template_rewrites_has_a_row_of_its_own_as_at_generation(kind, tmp_path):
    """Each row: transformers' ids of the conversation that ends there, learned from where its prompt ends."""
    transformers = pytest.importorskip("transformers")
    untagged = TAGGED.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    jinja = {"strips thinking": WHOLE, "ends otherwise": untagged, "has tags": TAGGED}[kind]
    jinja = jinja.replace("strftime_now('%d %b %Y')", "'Thursday'")
    stops = ["<|im_end|>", "<|endoftext|>"][kind == "ends otherwise" :]
    tokenizer = speaker(tmp_path, jinja, eos_token="<|endoftext|>")
    tokenizer = speaker(tmp_path, jinja, {"eos_token_id": list(map(tokenizer.special_id, stops))}, eos_token=stops[-1])
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    talk = [{"role": "system", "content": "Add."}, *copy.deepcopy(THOUGHT), *said("5+5?", "10")]
    if kind != "strips thinking":
        talk[2].pop("reasoning_content")
    rows = encode_rows(talk, tokenizer, max_length=LONG)
    for i, row in zip((2, 4, 6), rows, strict=True):
        whole, prompt = (
            theirs.apply_chat_template(talk[:end], return_dict=False, add_generation_prompt=asks)
            for end, asks in ((i + 1, False), (i, True))
        )
        assert row["input_ids"] == whole and whole[: len(prompt)] == prompt
        last = max(at for at, token in enumerate(whole) if token in tokenizer.stop_ids)
        assert row["completion_mask"] == [len(prompt) <= at <= last for at in range(len(whole))]


def test_turns_beyond_max_length_are_lost_and_counted(tmp_path):
    tokenizer = speaker(tmp_path)
    first, last = encode_rows(THOUGHT, tokenizer, max_length=LONG)
    begins = last["completion_mask"].index(True)
    (left,) = encode_rows(THOUGHT, tokenizer, max_length=begins)
    assert left == first | {"num_cut": sum(last["completion_mask"])}
    both = encode_rows(THOUGHT, tokenizer, max_length=begins + 1)
    assert [row["num_cut"] for row in both] == [0, len(last["input_ids"]) - begins - 1]
    with pytest.raises(ValueError, match="no assistant token fits in max_length=3"):
        encode_rows(THOUGHT, tokenizer, max_length=3)


def test_a_template_that_rewrites_nothing_keeps_a_conversation_in_one_row(tmp_path):
    tokenizer = speaker(tmp_path, TEMPLATES["chatml"])
    talk = said("a", "b", "c", "d", "e", "f")
    assert encode_rows(talk, tokenizer, max_length=LONG) == [encode_chat(talk, tokenizer, max_length=LONG)]


def test_a_call_keeps_the_order_of_its_fields_and_unknown_ones_are_refused(tmp_path):
    tokenizer = speaker(tmp_path, WHOLE.replace("c.function | tojson", "c | tojson"))
    call = {"id": "a1", "type": "function", "function": {"arguments": {"city": "Oslo"}, "name": "f"}}
    talk = [*said("Weather?"), {"role": "assistant", "content": None, "tool_calls": [call]}]
    assert learned(tokenizer, talk) == [f"<tool_call>{json.dumps(call)}</tool_call><|im_end|>"]
    for wrong in ({"function": {"name": "f", "parameters": {}}}, {"name": "f", "parameters": {}}):
        with pytest.raises(ValueError, match=r"tool_calls\[0\].function has parameters; the fields .* are name, arg"):
            parse_messages([talk[1] | {"tool_calls": [wrong]}])
    with pytest.raises(ValueError, match=r"tool_calls\[0\] has result; the fields"):
        parse_messages([talk[1] | {"tool_calls": [call | {"result": "4"}]}])


def test_turns_of_weight_0_are_no_targets(tmp_path):
    talk = said("2+2?", "Five.", "Sure?", "Four.")
    talk[1]["weight"], talk[3]["weight"] = 0, 1
    assert learned(speaker(tmp_path), talk) == ["Four.<|im_end|>"]
    with pytest.raises(ValueError, match='no assistant turn .* is learned: each has "train": false or "weight": 0'):
        learned(speaker(tmp_path), talk[:2])


@pytest.mark.parametrize(
    "message, problem",
    [
        ({"role": "assistant", "content": ""}, "empty assistant turn"),
        ({"role": "assistant", "content": " \n"}, "empty assistant turn"),
        ({"role": "assistant", "content": "a", "weight": 0.5}, "weight must be 0 or 1, got 0.5"),
        ({"role": "assistant", "content": "a", "train": "no"}, "train must be false or true"),
        ({"role": "assistant", "content": "a", "refusal": "no"}, "has refusal, which is not supported"),
        ({"role": "assistant", "content": [{"type": "image_url"}]}, "content part of type 'image_url'"),
        ({"role": "assistant", "content": None}, "needs a text"),
        ({"role": "assistant", "content": "", "tool_calls": [{"function": {}}]}, "needs a function with a name"),
        ({"role": "assistant", "content": "", "function_call": {"name": "f", "arguments": "{"}}, "is not JSON"),
        ({"role": "assistant", "content": "a\ufdd0"}, "U.FDD0"),
    ],
)
def test_what_cannot_be_written_is_refused_by_file_and_line(message, problem, tmp_path):
    tokenizer = speaker(tmp_path)
    path = write_rows(tmp_path / "a.jsonl", {"messages": said("a", "b")}, {"messages": [*said("a"), message]})
    with pytest.raises(ValueError, match=f"a.jsonl:2: .*{problem}"):
        encode_demonstrations("data.train", [path], data_config(), tokenizer)


@pytest.mark.parametrize("name", TEMPLATES)
def test_builtin_templates_refuse_what_they_have_no_place_for(name, tmp_path):
    tokens = ["<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<s>", "</s>"]
    tokens += ["<|system|>", "<|user|>", "<|assistant|>", "<|tool|>", "<|end|>"]
    byte_level_file(tmp_path, tokens, bos_token="<s>", eos_token="</s>")
    tokenizer = load_tokenizer(tmp_path, template=name)
    for more in (
        {"tool_calls": parse_messages([{"role": "assistant", "tool_calls": CALLS}])[0]["tool_calls"]},
        {"reasoning_content": "Hm."},
    ):
        with pytest.raises(ValueError, match=f"drops or rewrites the {next(iter(more))}"):
            encode_chat([*said("a"), {"role": "assistant", "content": "b", **more}], tokenizer, max_length=LONG)
    called = parse_messages([{"role": "assistant", "content": None, "tool_calls": CALLS}])
    with pytest.raises(ValueError, match="drops or rewrites the tool_calls"):  # not that it failed on a lack of content
        encode_chat([*said("a"), *called], tokenizer, max_length=LONG)
    with pytest.raises(ValueError, match="does not write the name of tools"):
        encode_chat(said("a", "b"), tokenizer, max_length=LONG, tools=[TOOL])
    developer, system = ([{"role": role, "content": "Be kind."}, *said("a", "b")] for role in ("developer", "system"))
    assert encode_chat(developer, tokenizer, max_length=LONG) == encode_chat(system, tokenizer, max_length=LONG)


def test_a_template_without_a_stop_token_or_with_another_header_cannot_be_learned(tmp_path):
    lines = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    with pytest.raises(ValueError, match="without a stop token"):
        encode_chat(said("a", "b"), speaker(tmp_path, lines), max_length=LONG)
    header = TEMPLATES["chatml"].replace("assistant\\n' }}{% endif %}", "assistant\\n<think>' }}{% endif %}")
    with pytest.raises(ValueError, match="at generation '<think>' stands where the whole conversation has '..."):
        encode_chat(said("a", "b"), speaker(tmp_path, header), max_length=LONG)
    last = TEMPLATES["chatml"].replace("'<|im_end|>\\n'", "('<|im_end|>' if loop.last or m.role == 'user' else '')")
    with pytest.raises(ValueError, match=r"no stop token .* between messages\[1\] and messages\[2\]"):
        encode_chat(
            said("a", "b", "c", "d"), speaker(tmp_path, last.replace("m.role", "message.role")), max_length=LONG
        )


def test_an_excerpt_for_an_error_message_does_not_begin_inside_a_text(tmp_path):
    tokenizer = speaker(tmp_path, "<|im_start|>{{ messages[-1].content }}" + WHOLE)
    with pytest.raises(ValueError, match=r"at generation '\.\.\..* the whole conversation has '\.\.\."):
        encode_chat(said("a", "b"), tokenizer, max_length=LONG)


def test_generation_tags_around_other_roles_are_refused(tmp_path):
    body = "message['content'] + '<|im_end|>\\n'"
    jinja = TEMPLATES["chatml"].replace(f" + {body}", "}}{% generation %}{{ " + body + "}}{% endgeneration %}{{ ''")
    assert "endgeneration" in jinja
    with pytest.raises(ValueError, match=r"generation tags hold texts of messages\[0\] \(user\)"):
        encode_chat(said("a", "b"), speaker(tmp_path, jinja), max_length=LONG)


def test_a_template_that_prints_whole_messages_is_refused_when_it_is_used_and_not_before(tmp_path):
    tokenizer = speaker(tmp_path, "{% for m in messages %}{{ m | string + eos_token }}{% endfor %}")
    with pytest.raises(ValueError, match="chat template"):
        encode_chat(said("a", "b"), tokenizer, max_length=LONG)


def test_ids_do_not_change_overnight(tmp_path):
    tokenizer = speaker(tmp_path)
    assert "01 Jan 2026" in tokenizer.chat_template.prompt(said("a"))
    later = load_tokenizer(tmp_path, date="2027-03-04")
    assert "04 Mar 2027" in later.chat_template.prompt(said("a"))
    assert later.fingerprint != tokenizer.fingerprint


@pytest.mark.parametrize(
    "jinja",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{{ 'a'.ljust(4000000000) }}",
        "{{ '%4000000000d' % 1 }}",
        "{% for i in range(99999) %}{{ 'a' * 99999 }}{% endfor %}",
        "{% set ns = namespace(x='a') %}{% for i in range(99) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    ],
)
def test_a_template_that_does_not_end_is_stopped_and_the_next_one_is_rendered(jinja, tmp_path, monkeypatch):
    monkeypatch.setattr(sandbox, "SECONDS", 2.0)
    with pytest.raises(
        ValueError, match="was stopped: it did not end within 2 seconds|takes more than|writes more than"
    ):
        encode_prompt(said("a"), speaker(tmp_path, jinja), max_length=LONG)
    monkeypatch.undo()
    assert encode_prompt(said("a"), speaker(tmp_path), max_length=LONG)


def test_a_row_that_does_not_end_is_stopped_once_and_the_other_rows_are_kept(tmp_path, monkeypatch):
    long = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    jinja = WHOLE.replace("{{- m.content }}", "{% if m.content == 'long' %}" + long + "{% endif %}{{- m.content }}")
    tokenizer = speaker(tmp_path, jinja)
    rows = [said("a", "b", "c", "d"), said("a", "b", "long", "d"), said("e", "f")]
    rows[1][0] |= {"role": "developer", "content": [{"type": "text", "text": "a"}]}  # so it has several forms
    stops, stop = [], sandbox._Process.stop
    monkeypatch.setattr(sandbox._Process, "stop", lambda process: (stops.append(1), stop(process)))
    monkeypatch.setattr(sandbox, "SECONDS", 2.0)
    path = write_rows(tmp_path / "a.jsonl", *({"messages": row} for row in rows))
    encoded = encode_demonstrations("data.train", [path], data_config(on_bad_row="skip"), tokenizer)
    assert len(encoded.items) == 2 and len(stops) == 1
    assert encoded.skipped == [f"{path}:2: the chat template was stopped: it did not end within 2 seconds"]


def test_completions_go_on_where_their_prompt_ends(tmp_path):
    tokenizer = speaker(tmp_path)
    talk = [*said("1+1?"), {"role": "assistant", "content": "2", "reasoning_content": "Hm."}, *said("2+2?")]
    rows = encode_completions(talk, ["four", "\n4"], tokenizer, max_length=LONG, max_prompt_length=LONG)
    prompt = encode_prompt(talk, tokenizer, max_length=LONG)
    assert [row["input_ids"][: len(prompt)] for row in rows] == [prompt, prompt]
    assert [tokenizer.decode(row["input_ids"][len(prompt) :], specials=True) for row in rows] == [
        "four<|im_end|>",
        "\n4<|im_end|>",
    ]


def test_every_id_that_ends_an_answer_is_known_and_exported_with_the_rest(tmp_path):
    generation = {"temperature": 0.6, "top_p": 0.9}
    (tmp_path / "in").mkdir()
    tokenizer = speaker(tmp_path / "in")
    end, text = tokenizer.special_id("<|im_end|>"), tokenizer.special_id("<|endoftext|>")
    generation["eos_token_id"] = [text, end]
    tokenizer = speaker(tmp_path / "in", generation=generation)
    assert tokenizer.stop_ids == sorted([end, text])
    assert tokenizer.generation_config.items() >= generation.items()
    (tmp_path / "in" / "generation_config.json").unlink()
    (tmp_path / "in" / "config.json").write_text(json.dumps({"eos_token_id": text}))
    assert load_tokenizer(tmp_path / "in").stop_ids == sorted([end, text])
    assert load_tokenizer(tmp_path / "in").generation_config["eos_token_id"] == [text, end]


def test_a_token_inside_an_answer_does_not_end_it_where_the_files_name_the_one_that_does(tmp_path):
    """Command A's answers end with <|END_RESPONSE|><|END_OF_TURN_TOKEN|>, Kimi K3's have two more tokens inside."""
    end, inside = "<|im_end|>", "<|endoftext|>"
    jinja = TEMPLATES["chatml"].replace("<|im_end|>", f"{inside}{end}")
    tokenizer = speaker(tmp_path, jinja)
    assert tokenizer.stop_ids == [tokenizer.special_id(end)]
    assert learned(tokenizer, said("a", "b", "c", "d")) == [f"b{inside}{end}", f"d{inside}{end}"]
    # Phi-3 writes the end of text once, after the last turn: it is not what ends a turn.
    jinja = TEMPLATES["chatml"] + "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}"
    tokenizer = speaker(tmp_path, jinja, eos_token=inside)
    assert tokenizer.stop_id == tokenizer.special_id(end)
    assert learned(tokenizer, said("a", "b", "c", "d")) == [f"b{end}", f"d{end}"]


def test_an_export_renders_tools_and_thinking_as_before(tmp_path):
    transformers = pytest.importorskip("transformers")
    (tmp_path / "in").mkdir()
    tokenizer = speaker(tmp_path / "in")
    tokenizer.save(tmp_path / "out")
    before, after = (transformers.AutoTokenizer.from_pretrained(tmp_path / name) for name in ("in", "out"))
    talk = [*said("Weather?"), {"role": "assistant", "content": "4", "reasoning_content": "Hm.", "tool_calls": CALLS}]
    how = {"tools": [TOOL], "tokenize": False}
    assert after.apply_chat_template(talk, **how) == before.apply_chat_template(talk, **how)
    assert load_tokenizer(tmp_path / "out").fingerprint == tokenizer.fingerprint


def test_a_template_for_tools_is_used_where_there_are_tools(tmp_path):
    several = [{"name": "default", "template": TEMPLATES["chatml"]}, {"name": "tool_use", "template": WHOLE}]
    tokenizer = speaker(tmp_path, several)
    assert "# Tools" in tokenizer.chat_template.prompt(said("a"), [TOOL])
    assert "Jan" not in tokenizer.chat_template.prompt(said("a"))


def test_markers_that_a_file_does_not_call_special_are_no_text_all_the_same(tmp_path):
    byte_level_file(tmp_path, SPECIALS, eos_token="<|im_end|>", chat_template=TEMPLATES["chatml"])
    settings = json.loads((tmp_path / "tokenizer.json").read_text())
    for token in settings["added_tokens"]:
        token["special"] = False
    (tmp_path / "tokenizer.json").write_text(json.dumps(settings))
    tokenizer = load_tokenizer(tmp_path)
    row = encode_chat(said("a<|im_end|>", "b<|im_start|>"), tokenizer, max_length=LONG)
    assert [row["input_ids"].count(tokenizer.special_id(name)) for name in SPECIALS] == [2, 2, 0]
