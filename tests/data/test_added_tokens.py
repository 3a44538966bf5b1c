"""Tokens that a checkpoint's settings add: ids are transformers', or the file is refused by name."""

import json

import pytest
from text_samples import said

from data.chat import encode_chat, encode_prompt
from data.tokenizer import load_tokenizer
from tests.data.test_tokenizer import byte_level_file
from tests.data.test_vocabulary_files import train

MARKS = ["<|im_start|>", "<|im_end|>"]
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture(params=["tokenizer.model", "tokenizer.json"])
def directory(request, tmp_path):
    """A base model's tokenizer and the settings of a chat model."""
    if request.param == "tokenizer.model":
        (tmp_path / request.param).write_bytes(train(control_symbols=[], user_defined_symbols=[]))
        kind = "LlamaTokenizer"
    else:
        byte_level_file(tmp_path, ["<unk>", "<s>", "</s>"])
        kind = "PreTrainedTokenizerFast"
    return configure(tmp_path, tokenizer_class=kind, bos_token="<s>", eos_token="</s>", chat_template=CHATML)


def configure(directory, **settings):
    path = directory / "tokenizer_config.json"
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | settings))
    return directory


@pytest.mark.parametrize("place", ["added_tokens.json", "added_tokens_decoder"])
def test_added_tokens_that_the_vocabulary_lacks_are_added(place, directory):
    transformers = pytest.importorskip("transformers")
    first = load_tokenizer(directory, template="replace:zephyr").vocab_size
    if place == "added_tokens.json":
        (directory / place).write_text(json.dumps({token: first + i for i, token in enumerate(MARKS)}))
    else:
        flags = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False, "special": True}
        configure(directory, **{place: {first + i: {"content": token} | flags for i, token in enumerate(MARKS)}})
    ours, theirs = load_tokenizer(directory), transformers.AutoTokenizer.from_pretrained(directory)
    talk = said("Hello  there", "Well, hi.", "<|im_end|>", "y")
    ids = encode_chat(talk[:2], ours, max_length=512)["input_ids"]
    assert ids == theirs.apply_chat_template(talk[:2], return_dict=False)
    assert ids.count(first) == ids.count(first + 1) == 2 and ours.stop_id == first + 1
    assert encode_chat(talk, ours, max_length=512)["input_ids"].count(first + 1) == 4  # a message's is letters


def test_an_added_token_with_another_id_is_refused(directory):
    (directory / "added_tokens.json").write_text(json.dumps({"<|im_start|>": 5000}))
    with pytest.raises(ValueError, match=r"added token '<\|im_start\|>' has the id 5000, but would get"):
        load_tokenizer(directory)


@pytest.mark.parametrize(
    "settings",
    [
        {"eos_token": "<|im_end|>"},
        {"extra_special_tokens": {"end_token": "<|im_end|>"}},
        {"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]},
        {"bos_token": "<begin>", "chat_template": "{{ bos_token }}" + CHATML},
    ],
)
def test_a_special_token_that_the_template_writes_and_the_vocabulary_lacks_is_refused(settings, directory):
    with pytest.raises(ValueError, match="the chat template writes .* which tokenizer_config.json names and the"):
        load_tokenizer(configure(directory, **settings))
    configure(directory, chat_template="{% for m in messages %}{{ m.content }}</s>{% endfor %}")
    assert load_tokenizer(directory).encode("a")  # it is not written, so it changes nothing


def test_templates_may_name_extra_special_tokens(tmp_path):
    transformers = pytest.importorskip("transformers")
    byte_level_file(tmp_path, ["</s>", *MARKS])
    jinja = CHATML.replace("'<|im_end|>\n'", "end_token + '\n'")
    configure(tmp_path, eos_token="</s>", chat_template=jinja, extra_special_tokens={"end_token": "<|im_end|>"})
    ours, theirs = load_tokenizer(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    ids = encode_chat(said("a", "b"), ours, max_length=512)["input_ids"]
    assert ids == theirs.apply_chat_template(said("a", "b"), return_dict=False)
    assert ids.count(ours.special_id("<|im_end|>")) == 2


@pytest.mark.parametrize("flag", ["lstrip", "single_word", "rstrip", "normalized"])
def test_flags_of_special_tokens_are_kept_or_refused(flag, tmp_path):
    transformers = pytest.importorskip("transformers")
    (tmp_path / "tokenizer.model").write_bytes(train(control_symbols=[], user_defined_symbols=[]))
    configure(tmp_path, tokenizer_class="LlamaTokenizer", bos_token="<s>", eos_token="</s>", chat_template=CHATML)
    first = load_tokenizer(tmp_path, template="replace:zephyr").vocab_size
    marks = {first + i: {"content": token, "special": True, flag: True} for i, token in enumerate(MARKS)}
    configure(tmp_path, added_tokens_decoder=marks)
    if flag in ("lstrip", "single_word"):
        with pytest.raises(ValueError, match="special tokens with lstrip or single_word"):
            load_tokenizer(tmp_path)
        return
    ours, theirs = load_tokenizer(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    talk = said(" Hello \n ", "Well, hi. ", "x", "y")
    ids = encode_chat(talk, ours, max_length=512)["input_ids"]
    assert ids == theirs.apply_chat_template(talk, return_dict=False)


def test_split_special_tokens_is_refused(directory):
    configure(directory, split_special_tokens=True)
    with pytest.raises(ValueError, match="split_special_tokens=true"):
        load_tokenizer(directory, template="replace:zephyr")


@pytest.mark.parametrize("drawn", ["{{ [1, 2] | random }}", "{{ lipsum() }}"])
def test_a_template_that_draws_random_numbers_is_refused(drawn, tmp_path):
    byte_level_file(tmp_path, ["<s>", "</s>", *MARKS])
    configure(tmp_path, bos_token="<s>", eos_token="</s>", chat_template=CHATML + drawn)
    with pytest.raises(ValueError, match="random|lipsum"):
        encode_prompt([{"role": "user", "content": "a"}], load_tokenizer(tmp_path), max_length=50)
