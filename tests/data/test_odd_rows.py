"""Odd rows of every published format: each is read as it stands, or refused with its place and the reason."""

import copy
import json
import re

import pytest
from published_rows import ASK, BAD, GOOD, ROWS, SAID, TALK, USER
from text_samples import data_config, said, tiny_tokenizer, write_rows

from data import formats
from data.adapters import Layout
from data.records import BadRows, parse_rows, read_records
from data.sft import encode_demonstrations

SYSTEM = {"role": "system", "content": "Be brief."}
WRONG = (None, [], {}, 7, True, ["x"], {"a": 1})  # none of them is a text
OPTIONAL = {  # fields that a row may lack: null is read as no value
    "alpaca": "input", "dolly": "context", "self_instruct": "input", "openorca": "system_prompt", "math_500": "answer",
    "orca_dpo": "system", "distilabel_orca": "system", "llama_factory_dpo": "input",
    "alpaca_farm": "input",
}  # fmt: skip
IN_A_FORM = ("taskmaster_4_reward", "arena_55k", "hh_raw")  # JSON or marks, so that no other text is one of theirs


def parser(expected: dict):
    if "messages" in expected:
        return formats.examples
    return formats.preferences if {"chosen", "completions", "completion"} & set(expected) else formats.prompts


def read(rows: list, name: str) -> list:
    """The records that a trainer reads from a file with these rows. Raises ValueError."""
    _, expected, recognised, *settings = ROWS[name]
    layout = Layout((settings[0] if settings else {}).get("format") or recognised or "ours")
    places = ((f"odd.jsonl:{i}", row) for i, row in enumerate(rows, 1))
    return list(parse_rows(places, parser(expected), BadRows("error"), layout, None))


def taught(records: list) -> str:
    """What the records teach, without the columns that only ride along."""
    return json.dumps([{**vars(record), "columns": {}, "where": ""} for record in records], ensure_ascii=False)


def leaves(value, path=()):
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in parts:
        yield (*path, key), part
        yield from leaves(part, (*path, key))


def changed(rows: list, path: tuple, value) -> list:
    rows = json.loads(json.dumps(rows))  # a copy in which no two places share a value
    inside = rows
    for key in path[:-1]:
        inside = inside[key]
    inside[path[-1]] = value
    return rows


@pytest.mark.parametrize("name", ROWS)
def test_a_text_that_is_learned_is_read_letter_by_letter_and_no_other_value_takes_its_place(name):
    rows, learned = ROWS[name][0], 0
    for path, value in leaves(rows):
        if not isinstance(value, str) or "apis" in path:  # arguments and results of a call are any JSON
            continue
        strange = "Grüße, 世界 🙂"
        try:
            found = taught(read(changed(rows, path, strange), name))
        except ValueError as error:
            assert re.match(r"odd\.jsonl:\d+: ", str(error)), error
            continue
        if strange not in found:
            continue
        learned += 1
        for wrong in WRONG:
            if wrong is None and OPTIONAL.get(name) == path[-1]:
                assert read(changed(rows, path, None), name)
                continue
            with pytest.raises(ValueError, match=r"^odd\.jsonl:\d+: "):
                print(path, wrong, taught(read(changed(rows, path, wrong), name)))
    assert learned or name in IN_A_FORM


@pytest.mark.parametrize("name", ROWS)
def test_no_odd_value_ends_in_a_traceback_and_a_field_that_nobody_knows_changes_nothing(name):
    rows = ROWS[name][0]
    for path, _ in leaves(rows):
        for wrong in (*WRONG, "", "7"):
            try:
                read(changed(rows, path, wrong), name)
            except ValueError as error:
                assert re.match(r"odd\.jsonl:\d+: .", str(error)), error
    assert taught(read([row | {"zz_unknown": ["x"]} for row in rows], name)) == taught(read(rows, name))


def one(name: str, **fields) -> list:
    """The first published row of a format with other values. A value of `...` takes the field away."""
    row = ROWS[name][0][0] | fields
    return [{key: value for key, value in row.items() if value is not ...}]


def inside(name: str, *path, value) -> list:
    return changed(ROWS[name][0], (0, *path), value)


TURNS = [{"from": "human", "value": ASK}, {"from": "gpt", "value": GOOD}]
REFUSED = [
    ("alpaca", one("alpaca", input=0), "input must be text, got int"),
    ("alpaca", one("alpaca", input=[]), "input must be text, got list"),
    ("alpaca", one("alpaca", instruction=None), "instruction must be text, got NoneType"),
    ("alpaca", one("alpaca", output=...), "format=alpaca needs output"),
    ("alpaca", one("alpaca", history=[[ASK]]), r"history must be a list of \[question, answer\]"),
    ("alpaca", one("alpaca", images=["cat.png"]), "the row has images, and only text is read"),
    ("alpaca", one("alpaca", kto_tag=False), "rated bad"),
    ("dolly", one("dolly", context={}), "context must be text, got dict"),
    ("self_instruct", one("self_instruct", instances=[]), "instances must be a list with an element or more"),
    ("sharegpt", one("sharegpt", conversations=[]), "conversations must be a list with an element or more"),
    ("sharegpt", one("sharegpt", conversations=TURNS, kto_tag=False), "rated bad"),
    ("sharegpt", one("sharegpt", conversations=TURNS[:1], kto_tag=True), "rates the last turn.*not of user"),
    ("sharegpt", one("sharegpt", conversations=["hi"]), r"conversations\[0\] must be an object, got str"),
    ("lima", one("lima", conversations="Hello"), "conversations must be a list .* got str"),
    ("ultrachat", one("ultrachat", data="Hello"), "data must be a list .* got str"),
    ("capybara", one("capybara", conversation=None), "conversation must be a list .* got null"),
    ("math_500", one("math_500", answer=4), "answer must be text, got int"),
    ("mbpp", one("mbpp", test_list=[None]), r"test_list\[0\] must be text, got NoneType"),
    ("mt_bench", one("mt_bench", turns=[""]), "prompt has no text"),
    ("taskmaster_3", inside("taskmaster_3", "utterances", 1, "apis", 0, "name", value=None), "name must be text"),
    (
        "taskmaster_4",
        inside("taskmaster_4", "utterances", 0, "annotations", 3, "name", value="reply"),
        "annotations must have api_call, request, api_response, response in this order, got 'reply'",
    ),
    ("oasst_flat", [{**ROWS["oasst_flat"][0][0], "message_id": None}], "message_id must be text"),
    ("oasst_flat", [*ROWS["oasst_flat"][0], ROWS["oasst_flat"][0][2]], "message g is twice in the file"),
    ("openai_preference", inside("openai_preference", "input", "messages", value=[]), "messages must be a list with"),
    ("openai_preference", inside("openai_preference", "input", "messages", 0, "content", value=""), "has no text"),
    ("shp", one("shp", labels=True), "labels must be one of 0, 1, got True"),
    ("helpsteer2", one("helpsteer2", helpfulness="very"), "helpfulness must be one of 0, 1, 2, 3, 4, got 'very'"),
    ("nectar", one("nectar", answers="a"), "answers must be a list"),
    ("arena_33k", one("arena_33k", conversation_a=["x"]), "conversation_a and conversation_b must be lists of mess"),
    ("arena_55k", one("arena_55k", response_a="[null]"), r"response_a\[0\] must be text, got NoneType"),
    ("webgpt", one("webgpt", score_0=None), "score_0 must be a number, got None"),
    ("summarize_from_feedback", inside("summarize_from_feedback", "info", "post", value=...), "article must be text"),
    ("argilla_2", inside("argilla_2", "responses", "preference", 0, "value", value=4), "a response must rank fields"),
    (
        "argilla_2",  # a label, or a better answer: nothing in the row says which
        inside("argilla_2", "responses", "preference", 0, "value", value="good"),
        "in a record that has only a prompt",
    ),
    (
        "label_studio",
        inside("label_studio", "annotations", 0, "result", 0, "value", "selected", value="both"),
        "selected must be left or right, got 'both'",
    ),
    ("label_studio_text", inside("label_studio_text", "data", "prompt", value=[]), "no prompt"),
    ("kto_mix", one("kto_mix", prompt=[]), "prompt has no text"),
    ("hh_raw", one("hh_raw", chosen="Hi"), 'not of the form "'),
    ("openai_chat", one("openai_chat", messages=[USER | {"content": []}, SAID]), "an empty list as content"),
    # lists that a table or a second json.dumps made into texts
    (
        "hh_processed",
        one("hh_processed", chosen=json.dumps(TALK)),
        "chosen is a text that lists messages: .*give the list",
    ),
    ("hh_processed", one("hh_processed", rejected=f" {TALK}"), "rejected is a text that lists messages"),
    ("kto_mix", one("kto_mix", prompt=json.dumps([USER])), "the prompt is a text that lists messages"),
    ("kto_mix", one("kto_mix", completion=str([{"content": GOOD, "role": "assistant"}])), "completion is a text that"),
    ("kto_mix", one("kto_mix", completion=42), "completion must be text or one assistant message, got int"),
    # columns that would take the place of what the row says
    ("sharegpt", one("sharegpt", messages=[USER, SAID | {"content": BAD}]), "messages is a column and also a field"),
    ("shp", one("shp", chosen=BAD), "chosen is a column and also a field.*data.columns={other: chosen}"),
    ("taskmaster_4_reward", one("taskmaster_4_reward", question=ASK, context="Teas."), "context is not JSON"),
    ("kto_mix", one("kto_mix", prompt=..., context="Teas.", query=ASK), "context and query are both texts"),
    ("ultrafeedback", one("ultrafeedback", completions=[]), "completions must be a list .* got an empty list"),
    (
        "ultrafeedback",
        inside("ultrafeedback", "completions", 0, "annotations", "honesty", "Rating", value="10"),
        "got '10'",
    ),
    ("hh_processed", one("hh_processed", margin=-2), "margin must be 0 or more"),
    ("alpaca", one("alpaca", instruction=" ", input=""), "instruction has no text"),
    ("dolly", one("dolly", instruction="", context=None), "instruction has no text"),
    ("tulu3", one("tulu3", messages={"role": ["user"], "content": []}), "messages must be a list"),
    ("label_studio", one("label_studio", annotations=None), "no annotation that was submitted"),
    ("alpaca_farm", one("alpaca_farm", preference=0), "preference must be one of 1, 1.5, 2, got 0"),
    (
        "label_studio",
        [{"prompt": ASK, "answer1": GOOD, "annotation_id": 1, "lead_time": 2}],
        "export the project as JSON",
    ),
    ("openai_chat", one("openai_chat", messages=[USER | {"content": [{"type": "text"}]}]), "text whose text is NoneT"),
]


@pytest.mark.parametrize("name, rows, problem", REFUSED)
def test_what_a_format_does_not_say_is_refused_and_not_guessed(name, rows, problem):
    rows = [{key: value for key, value in row.items() if value is not ...} for row in rows]
    if name == "summarize_from_feedback":
        del rows[0]["info"]["post"]
    with pytest.raises(ValueError, match=rf"^odd\.jsonl:\d+: .*{problem}"):
        read(rows, name)


@pytest.mark.parametrize(
    "turns, messages",
    [
        ([SAID, USER, SAID], [SAID, USER, SAID]),  # the assistant begins
        ([USER, USER, SAID], [USER, USER, SAID]),
        ([USER, SAID, USER], [USER, SAID, USER]),
        ([SYSTEM], [SYSTEM]),
    ],
)
def test_turns_in_an_unusual_order_stay_in_their_order(turns, messages, tmp_path):
    sharegpt = [{"from": turn["role"], "value": turn["content"]} for turn in turns]
    as_published = [("sharegpt", {"conversations": sharegpt}), ("lmsys_chat_1m", {"conversation": turns})]
    for name, fields in [*as_published, ("tulu3", {"messages": turns})]:
        (record,) = read(one(name, **fields), name)
        assert record.messages == messages
    path = write_rows(tmp_path / "odd.jsonl", {"messages": turns})
    data = data_config(cache=str(tmp_path / "cache"))
    if turns == [SYSTEM]:
        with pytest.raises(ValueError, match=r"odd.jsonl:1: a conversation without an assistant turn"):
            encode_demonstrations("data.train", [path], data, tiny_tokenizer())
    else:
        assert len(encode_demonstrations("data.train", [path], data, tiny_tokenizer()).items) == 1


@pytest.mark.parametrize(
    "row, messages",
    [
        ({"messages": json.dumps(TALK)}, TALK),
        ({"conversations": json.dumps(TURNS)}, TALK),
        ({"messages": None, "conversations": TURNS}, TALK),
        ({"messages": {"role": ["user", "assistant"], "content": [ASK, GOOD]}}, TALK),  # as datasets stores a Sequence
        ({"conversations": {"from": ["human", "gpt"], "value": [ASK, GOOD]}}, TALK),
        ({"instruction": "", "input": ASK, "output": GOOD}, TALK),
        ({"messages": TALK, "conversations": None}, TALK),
        ({"instruction": ASK, "output": GOOD, "prompt": "### Instruction: ..."}, TALK),
        ({"messages": [USER, SAID | {"content": '[{"role": "x", "content": "y"}]'}]}, None),
        ({"prompt": ASK, "completion": '{"role": 1}'}, [USER, SAID | {"content": '{"role": 1}'}]),
    ],
)
def test_a_conversation_is_found_where_it_is(row, messages, tmp_path):
    file = write_rows(tmp_path / "odd.jsonl", row)
    (record,) = read_records(file, formats.examples, BadRows("error"))
    assert record.messages == (messages or row["messages"])
    if "instruction" in row:
        (prompt,) = read_records(file, formats.prompts, BadRows("error"))
        assert prompt.prompt == [USER]


def test_earlier_rounds_and_ratings_of_llama_factory_are_read():
    before = [["Hi", "Hello"]]
    (record,) = read(one("alpaca", history=before), "alpaca")
    assert record.messages == [*said("Hi", "Hello"), *TALK]
    (pair,) = read(one("llama_factory_dpo", history=before), "llama_factory_dpo")
    assert (pair.prompt, pair.chosen, pair.rejected) == ([*said("Hi", "Hello"), USER], GOOD, BAD)
    for row in (
        {"conversations": TURNS, "kto_tag": False},
        {"instruction": ASK, "input": "", "output": GOOD, "kto_tag": False},
        {"messages": TALK, "label": False},
    ):
        (rated,) = formats.preferences(*Layout().adapt(row))
        assert (rated.prompt, rated.completion, rated.reward) == ([USER], GOOD, 0.0)


def test_a_call_without_arguments_in_taskmaster_4_has_no_request_and_is_read():
    row = copy.deepcopy(ROWS["taskmaster_4"][0][0])
    notes = row["utterances"][0]["annotations"]
    row["utterances"][0]["annotations"] = [*notes, *(note for note in notes if note["name"] != "request")]
    (record,) = read([row], "taskmaster_4")
    calls = [message["content"] for message in record.messages if message["content"].startswith("call")]
    assert calls == ['call get_menu {"query": "tea"}', "call get_menu {}"]
