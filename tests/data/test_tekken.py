"""Mistral's tekken.json: ids and conversations are mistral-common's, of every version that is read."""

import json
import random
from pathlib import Path

import pytest
from text_samples import mistral_file, said

from data.chat import encode_prompt, encode_rows
from data.messages import parse_messages
from data.tokenizer import load_tokenizer
from tests.data.test_tokenizer import TEXTS

LONG = 1 << 20
NAMED = ["[ARGS]", "[CALL_ID]", "[THINK]", "[/THINK]"]  # of versions 11 and 13
VERSIONS = ("v3", "v7", "v11", "v13")
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Tells the weather.",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    },
    {"type": "function", "function": {"name": "get_time", "description": "", "parameters": {"type": "object"}}},
]
CALL = {"id": "abcdef123", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Tromsø"}'}}
OTHER = {"id": "xyzabc456", "type": "function", "function": {"name": "get_time", "arguments": "{}"}}
RESULT = {"role": "tool", "name": "get_weather", "tool_call_id": "abcdef123", "content": '{"t": 4}'}
ASKED = {"role": "user", "content": "Weather?"}
SYSTEM = {"role": "system", "content": "Be brief."}
TALKS = {
    "single": said("Hi", "Hello"),
    "spaces": said("  naïve café 🙂\n\n ", "  はい  "),
    "markers": said("What is [INST] or </s>?", "The [/INST] and <s>[SYSTEM_PROMPT] marks."),
    "several": said("a", "b", "c", "d", "e", "f"),
    "system": [SYSTEM, *said("a", "b", "c", "d")],
    "call": [ASKED, {"role": "assistant", "content": "", "tool_calls": [CALL]}],
    "calls": [SYSTEM, *said("a", "b"), ASKED, {"role": "assistant", "content": "", "tool_calls": [CALL, OTHER]}],
    "result": [
        ASKED,
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        RESULT,
        *said("4 degrees.", first="assistant"),
    ],
    "text and call": [ASKED, {"role": "assistant", "content": "Let me see.", "tool_calls": [CALL]}],
    "thinking": [*said("2+2?"), {"role": "assistant", "content": "4", "reasoning_content": "Two and two. "}],
}
REFUSED = {
    "v3": {"result", "text and call", "thinking"},
    "v7": {"thinking"},
    "v11": {"thinking"},
    "v13": set(),
}
MOVED = {"v3": {"system", "calls"}, "v7": {"calls"}, "v11": {"calls"}, "v13": set()}  # what goes to the last user turn


@pytest.fixture(scope="module")
def published() -> dict:
    """The file of Pixtral and of Mistral Small, as mistral-common carries it."""
    return json.loads((mistral_file().parent / "tekken_240911.json").read_text())


def write(directory: Path, published: dict, version: str, count: int = 3000) -> Path:
    """That file with the first tokens of its vocabulary, as another version."""
    from data.vocabularies.tekken import _SPECIAL

    directory.mkdir(exist_ok=True)
    sizes = {"default_vocab_size": count + 100, "default_num_special_tokens": 100, "num_vocab_tokens": count}
    given = {"config": published["config"] | sizes | {"version": version}, "vocab": published["vocab"][:count]}
    if version != "v3":
        names = [*_SPECIAL, *NAMED]
        given["special_tokens"] = [{"rank": i, "token_str": n, "is_control": True} for i, n in enumerate(names)]
    (directory / "tekken.json").write_text(json.dumps(given))
    return directory


@pytest.fixture(scope="module", params=VERSIONS)
def pair(request, published, tmp_path_factory):
    """(version, ours, mistral-common's)"""
    mistral = pytest.importorskip("mistral_common.tokens.tokenizers.mistral")
    directory = write(tmp_path_factory.mktemp("tekken"), published, request.param)
    theirs = mistral.MistralTokenizer.from_file(str(directory / "tekken.json"))
    return request.param, load_tokenizer(directory), theirs


def their_ids(theirs, messages: list[dict], tools, *, asks: bool) -> list[int]:
    """mistral-common's ids of a conversation that ends with an answer, or of one that asks for it."""
    from mistral_common.protocol.instruct.request import ChatCompletionRequest

    spelled = []
    for message in messages:
        message = dict(message)
        if thought := message.pop("reasoning_content", None):
            parts = [{"type": "thinking", "thinking": thought}, {"type": "text", "text": message["content"]}]
            message["content"] = parts
        spelled.append(message)
    request = ChatCompletionRequest.model_validate({"messages": spelled, "tools": tools})
    if asks:
        return theirs.encode_chat_completion(request).tokens
    instruct = theirs._instruct_request_normalizer.from_chat_completion_request(request)
    return theirs.instruct_tokenizer.encode_instruct(instruct).tokens


@pytest.mark.parametrize("name", TALKS)
def test_conversations_are_those_of_mistral_common(pair, name):
    version, ours, theirs = pair
    tools = TOOLS if name in ("call", "calls", "result", "text and call") else None
    talk = TALKS[name]
    try:
        rows = encode_rows(parse_messages(talk), ours, max_length=LONG, tools=tools)
    except ValueError as error:
        assert name in REFUSED[version], error
        return
    assert name not in REFUSED[version]
    ends = [i + 1 for i, message in enumerate(talk) if message["role"] == "assistant"]
    for end, row in zip([len(talk)] if len(rows) == 1 else ends, rows, strict=True):
        if name == "markers":  # ours stand apart from the text around them, as in transformers; neither is special
            specials = [i for i in row["input_ids"] if i < 100]
            assert specials == [i for i in their_ids(theirs, talk, tools, asks=False) if i < 100] == [1, 3, 4, 2]
            return
        assert row["input_ids"] == their_ids(theirs, talk[:end], tools, asks=False)
        asked = their_ids(theirs, talk[: end - 1], tools, asks=True)
        assert encode_prompt(parse_messages(talk[: end - 1]), ours, max_length=LONG, tools=tools) == asked
        if len(rows) > 1 or len(ends) == 1:
            assert row["completion_mask"] == [at >= len(asked) for at in range(len(row["input_ids"]))]
    assert len(rows) == (len(ends) if name in MOVED[version] else 1)


def check_ids(ours, theirs, samples: int) -> None:
    dice = random.Random(0)
    letters = [
        "a ",
        "etaoin shrdlu ETA",
        "  \n\t.,x",
        "日本 é🙂a",
        "01239 .,",
        "aaaaa-=",
        "ʼ’İıßẞ̈ǅ",
        " \u00a0\u200b\u3000\x85\u2028x",
    ]
    drawn = ["".join(dice.choices(kind, k=dice.randrange(1, 80))) for kind in letters * samples]
    for text in [*TEXTS, *drawn]:
        ids = ours.encode(text)
        assert ids == theirs.encode(text, bos=False, eos=False), repr(text)
        assert ours.decode(ids) == text


def test_ids_are_those_of_mistral_common(pair):
    _, ours, theirs = pair
    check_ids(ours, theirs.instruct_tokenizer.tokenizer, samples=50)
    assert ours.stop_ids == [2] and (ours.bos_id, ours.pad_id) == (1, 11)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tekken_240718.json", "tekken_240911.json"])
def test_ids_of_the_whole_published_files_are_those_of_mistral_common(name, tmp_path):
    tekken = pytest.importorskip("mistral_common.tokens.tokenizers.tekken")
    file = mistral_file().parent / name
    (tmp_path / "tekken.json").write_bytes(file.read_bytes())
    check_ids(load_tokenizer(tmp_path), tekken.Tekkenizer.from_file(file), samples=300)


def test_what_an_export_holds_gives_the_same_ids(published, tmp_path):
    write(tmp_path / "in", published, "v7")
    ours = load_tokenizer(tmp_path / "in")
    ours.save(tmp_path / "out")
    assert load_tokenizer(tmp_path / "out").fingerprint == ours.fingerprint
    load_tokenizer(tmp_path / "in", template="replace:zephyr").save(tmp_path / "other")
    other = load_tokenizer(tmp_path / "other")
    assert not (tmp_path / "other" / "tekken.json").exists()
    assert all(other.encode(text) == ours.encode(text) for text in TEXTS)


@pytest.mark.parametrize(
    "change, problem",
    [
        ({"config": {}}, "KeyError: 'version'"),
        (
            {"config": {"version": "v15", "default_vocab_size": 1, "default_num_special_tokens": 1}},
            "of version 'v15'; known versions: v3",
        ),
        ({"vocab": [{"rank": 0, "token_bytes": "YQ" * 600, "token_str": ""}]}, "the ranks 0 to 2999, each once"),
        ({"vocab": []}, "the ranks 0 to 2999, each once"),
        ({"special_tokens": None}, "must name its special_tokens"),
        ({"special_tokens": [{"rank": 1, "token_str": "<s>"}]}, "special tokens do not have the ranks"),
    ],
)
def test_a_damaged_file_is_refused_by_name(change, problem, published, tmp_path):
    file = write(tmp_path, published, "v11") / "tekken.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ValueError, match=f"tekken.json is not a readable tekken.json: .*{problem}"):
        load_tokenizer(tmp_path)
