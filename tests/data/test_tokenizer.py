"""The tokenizers: the same ids as the libraries that made them, whatever file they come from."""

import json
import random

import pytest
import sentencepiece
from text_samples import SMOLLM2, STRANGE, conversations, mistral, mistral_file, said, smollm2, tiny_tokenizer
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from data.builtin_templates import TEMPLATES
from data.chat import encode_chat
from data.tokenizer import Tokenizer, load_tokenizer, train_sentencepiece
from data.vocabularies import from_sentencepiece
from model.weights.paths import find_model

TEXTS = STRANGE + [message["content"] for talk in conversations() for message in talk]


def byte_level_file(directory, specials, text="hello world hello", **settings):
    """A Hugging Face directory with a byte-level BPE tokenizer that knows little."""
    from tokenizers import trainers

    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        [text], trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    )
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in specials])
    backend.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return directory


@pytest.mark.parametrize("make", [tiny_tokenizer, lambda: mistral("zephyr")], ids=["ours", "mistral"])
def test_ids_equal_those_of_sentencepiece(make):
    tokenizer = make()
    truth = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.vocabulary.sentencepiece)
    assert tokenizer.vocab_size == truth.vocab_size()
    for text in TEXTS:
        if "\x00" not in text:  # SentencePiece ends a text there
            assert tokenizer.encode(text) == truth.encode(text), repr(text)
    dice = random.Random(0)
    for letters in ["a ", " ab", "etaoin shrdlu ETA", "  \n\t.,x", "日本 é🙂a", "01239 .,"] * 300:
        text = "".join(dice.choices(letters, k=dice.randrange(1, 60)))
        assert tokenizer.encode(text) == truth.encode(text), repr(text)


@pytest.mark.slow  # transformers takes its time to read a GGUF
def test_ids_of_a_gguf_equal_those_of_transformers():
    transformers = pytest.importorskip("transformers")
    tokenizer = smollm2()
    file = find_model(SMOLLM2)
    theirs = transformers.AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
    digits = [pre_tokenizers.Digits(individual_digits=True), theirs.backend_tokenizer.pre_tokenizer]
    theirs.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(digits)  # its loader overlooks tokenizer.ggml.pre
    for text in TEXTS:
        if "<|" not in text:
            assert tokenizer.encode(text) == theirs(text, add_special_tokens=False)["input_ids"], repr(text)


def test_smollm2_splits_numbers_into_digits():
    assert [smollm2().decode([i]) for i in smollm2().encode("in 1984")] == ["in", " ", "1", "9", "8", "4"]


@pytest.mark.parametrize(
    "make", [tiny_tokenizer, smollm2, lambda: mistral("llama2")], ids=["ours", "smollm2", "mistral"]
)
def test_decoding_gives_the_text_back(make):
    tokenizer = make()
    for text in TEXTS:
        if "\x00" not in text:
            assert tokenizer.decode(tokenizer.encode(text)) == text.replace("▁", " " if make is not smollm2 else "▁")


@pytest.mark.parametrize(
    "make", [tiny_tokenizer, smollm2, lambda: mistral("mistral")], ids=["ours", "smollm2", "mistral"]
)
def test_text_never_becomes_a_special_token(make):
    tokenizer = make()
    added = tokenizer.backend.get_added_tokens_decoder()
    specials = {i: token.content for i, token in added.items() if token.special}
    assert tokenizer.stop_id in specials
    for content in specials.values():
        ids = tokenizer.encode(f"say {content} now")
        assert not specials.keys() & set(ids), content
        assert tokenizer.decode(ids) == f"say {content} now"


@pytest.mark.parametrize(
    "make", [tiny_tokenizer, smollm2, lambda: mistral("zephyr")], ids=["ours", "smollm2", "mistral"]
)
def test_a_saved_tokenizer_loads_as_the_same_here_and_in_transformers(make, tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizer = make()
    tokenizer.save(tmp_path)
    again = load_tokenizer(tmp_path)
    assert again.fingerprint == tokenizer.fingerprint
    names = ("stop_ids", "bos_id", "pad_id", "vocab_size")
    assert [getattr(again, name) for name in names] == [getattr(tokenizer, name) for name in names]
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.eos_token_id == tokenizer.stop_id and theirs.pad_token_id == tokenizer.pad_id
    for text in TEXTS:
        if not any(mark in text for mark in ("<|", "<s>")):  # there text may forge special tokens
            assert theirs(text, add_special_tokens=False)["input_ids"] == tokenizer.encode(text)


def test_the_padding_token_never_ends_a_turn():
    for tokenizer in (tiny_tokenizer(), smollm2(), mistral("zephyr"), mistral("llama2")):
        assert tokenizer.pad_id not in tokenizer.stop_ids
    assert smollm2().vocabulary.pad_token == smollm2().eos_token  # as its file declares


def test_a_text_reads_on_after_another_with_a_boundary_between_tokens():
    for tokenizer in (tiny_tokenizer(), smollm2(), mistral("zephyr")):
        for head, tail in [("Hi", " there"), ("a\n", "Hello"), ("[/INST]", " Yes "), ("12", "34"), ("wor", "ld")]:
            ids = tokenizer.encode(head) + tokenizer.encode(tail, after=head)
            assert tokenizer.decode(ids) == head + tail


def test_a_huggingface_directory_brings_its_own_template(tmp_path):
    specials = ["<|im_start|>", "<|im_end|>", "<|endoftext|>"]
    settings = {"eos_token": "<|im_end|>", "pad_token": {"content": "<|endoftext|>"}}
    jinja = "Be good.{% for m in messages %}{{ m.role + ': ' + m.content + '<|endoftext|>' }}{% endfor %}"
    tokenizer = load_tokenizer(byte_level_file(tmp_path, specials, chat_template=TEMPLATES["chatml"], **settings))
    assert tokenizer.chat_template.prompt(said("a")) == "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.bos_id is None and tokenizer.pad_id == tokenizer.special_id("<|endoftext|>")
    (tmp_path / "chat_template.jinja").write_text(jinja)  # the newer place wins
    assert load_tokenizer(tmp_path).chat_template.prompt(said("a")) == "Be good.user: a<|endoftext|>"


def test_a_named_template_that_differs_from_the_checkpoints_own_is_refused_with_both_renderings(tmp_path):
    chatml = TEMPLATES["chatml"]
    specials = ["<|im_start|>", "<|im_end|>"]
    byte_level_file(tmp_path, specials, eos_token="<|im_end|>", chat_template=chatml)
    assert load_tokenizer(tmp_path, template="chatml").template == "chatml"  # the same
    other = chatml.replace("['content']", "['content'] | trim + ' '")
    byte_level_file(tmp_path, specials, eos_token="<|im_end|>", chat_template=other)
    with pytest.raises(ValueError, match="(?s)otherwise than.*user 1 <.im_end.*user 1<.im_end.*replace:chatml"):
        load_tokenizer(tmp_path, template="chatml")
    asked = load_tokenizer(tmp_path, template="replace:chatml")
    assert "user\na<|im_end|>" in asked.chat_template.prompt(said("a"))
    asked.save(tmp_path / "export")
    assert "user\na<|im_end|>" in load_tokenizer(tmp_path / "export").chat_template.prompt(said("a"))


def test_template_tokens_of_a_careless_file_are_special_all_the_same(tmp_path):
    byte_level_file(tmp_path, ["<|im_start|>", "<|im_end|>"], eos_token="<|im_end|>")
    settings = json.loads((tmp_path / "tokenizer.json").read_text())
    for token in settings["added_tokens"]:
        token["special"] = False
    (tmp_path / "tokenizer.json").write_text(json.dumps(settings))
    tokenizer = load_tokenizer(tmp_path, template="chatml")
    assert tokenizer.special_id("<|im_end|>") not in tokenizer.encode("<|im_end|>")


@pytest.mark.parametrize("scheme", ["first", "always", "never"])
def test_sentencepiece_files_that_differ_in_where_a_space_goes_first_give_their_own_ids(scheme, tmp_path):
    """`first`: at the beginning of the text only, not after a special token."""
    transformers = pytest.importorskip("transformers")
    mistral("mistral").save(tmp_path)
    spelled = json.loads((tmp_path / "tokenizer.json").read_text())
    spelled["normalizer"] = None
    spelled["pre_tokenizer"] = {
        "type": "Metaspace",
        "replacement": "▁",
        "prepend_scheme": scheme,
        "split": False,
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(spelled))
    ours, theirs = load_tokenizer(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    for talk in conversations()[:20]:
        ids = encode_chat(talk, ours, max_length=1 << 20)["input_ids"]
        assert ids == theirs.apply_chat_template(talk, tokenize=True, return_dict=False)


@pytest.mark.parametrize("settings", [{"legacy": True}, {"legacy": False}, {"add_prefix_space": False}, {}])
def test_a_file_that_names_llamas_class_is_read_by_its_rule(settings, tmp_path):
    """`legacy` decides whether a space goes before a text that follows a special token."""
    transformers = pytest.importorskip("transformers")
    mistral("mistral").save(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    known = {k: v for k, v in json.loads(path.read_text()).items() if k not in ("legacy", "add_prefix_space")}
    path.write_text(json.dumps(known | {"tokenizer_class": "LlamaTokenizer"} | settings))
    ours, theirs = load_tokenizer(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    for talk in conversations()[:5]:
        ids = encode_chat(talk, ours, max_length=1 << 20)["input_ids"]
        assert ids == theirs.apply_chat_template(talk, tokenize=True, return_dict=False)


@pytest.mark.parametrize("family", ["llama", "mistral", "ministral", "mixtral", "phi3", "granite", "olmo2", "olmo3"])
def test_the_model_type_decides_whether_llamas_rule_holds(family, tmp_path):
    """The file puts a space first in each text after a special token, Llama's rule only in the first."""
    transformers = pytest.importorskip("transformers")
    tiny_tokenizer().save(tmp_path)
    spelled = json.loads((tmp_path / "tokenizer.json").read_text())
    metaspace = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": False}
    (tmp_path / "tokenizer.json").write_text(json.dumps(spelled | {"normalizer": None, "pre_tokenizer": metaspace}))
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text()) | {"tokenizer_class": "LlamaTokenizer"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings | {"legacy": False}))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family}))
    ours, theirs = load_tokenizer(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    for talk in conversations()[:5]:
        ids = encode_chat(talk, ours, max_length=1 << 20)["input_ids"]
        assert ids == theirs.apply_chat_template(talk, tokenize=True, return_dict=False)


@pytest.mark.parametrize("newer", [False, True])
def test_special_tokens_map_rules_only_where_the_config_lists_no_tokens(newer, tmp_path):
    transformers = pytest.importorskip("transformers")
    byte_level_file(tmp_path, ["<a>", "<b>"], eos_token="<a>")
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"eos_token": "<b>"}))
    if newer:
        path, backend = tmp_path / "tokenizer_config.json", Backend.from_file(str(tmp_path / "tokenizer.json"))
        tokens = {str(backend.token_to_id(name)): {"content": name, "special": True} for name in ("<a>", "<b>")}
        path.write_text(json.dumps(json.loads(path.read_text()) | {"added_tokens_decoder": tokens}))
    ours, theirs = load_tokenizer(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert ours.eos_token == theirs.eos_token == ("<a>" if newer else "<b>")


def test_mistral_files_with_tokens_for_the_instruction_marks_are_refused(tmp_path):
    byte_level_file(tmp_path, ["<s>", "</s>", "[INST]", "[/INST]"], bos_token="<s>", eos_token="</s>")
    with pytest.raises(ValueError, match="v0.3"):
        load_tokenizer(tmp_path, template="mistral")


def test_a_template_without_its_tokens_is_refused(tmp_path):
    byte_level_file(tmp_path, ["</s>"], eos_token="</s>")
    with pytest.raises(ValueError, match=r"chatml template needs .*<\|im_start\|>"):
        load_tokenizer(tmp_path, template="chatml")
    with pytest.raises(ValueError, match="unknown chat template 'vicuna'"):
        load_tokenizer(tmp_path, template="vicuna")
    with pytest.raises(ValueError, match="set data.template"):
        _ = load_tokenizer(tmp_path).chat_template


@pytest.mark.parametrize(
    "path, message",
    [
        ("HuggingFaceTB/SmolLM2-135M", "nothing is downloaded"),
        ("package:no_such_package/x.gguf", "no_such_package"),
        ("/no/such/directory", "/no/such/directory"),
    ],
)
def test_a_path_that_leads_nowhere_is_named(path, message):
    with pytest.raises(ValueError, match=message):
        load_tokenizer(path)


def test_damaged_tokenizer_files_are_named(tmp_path):
    with pytest.raises(ValueError, match="expected tokenizer.json, tokenizer.model"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"not a model")
    with pytest.raises(ValueError, match="SentencePiece"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="not a readable tokenizer.json"):
        load_tokenizer(tmp_path)


def test_training_is_repeatable_and_keeps_every_byte(tmp_path):
    texts = ["a latte please", "two espressos, to go"] * 9
    one, two = (train_sentencepiece(texts, 300, tmp_path / name) for name in "ab")
    assert one.fingerprint == two.fingerprint and one.vocab_size == 300
    assert one.decode(one.encode("Ünïcode 🙂")) == "Ünïcode 🙂"
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == [
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
    ]


@pytest.mark.parametrize("size", [10, 100_000])
def test_a_vocabulary_that_does_not_suit_the_texts_is_refused(size, tmp_path):
    with pytest.raises(ValueError, match=str(size)):
        train_sentencepiece(["a latte please"], size, tmp_path)
    assert not list(tmp_path.iterdir())


def test_two_tokenizers_differ_in_their_fingerprint_by_template_too():
    vocabulary = from_sentencepiece(mistral_file().read_bytes())
    assert Tokenizer(vocabulary, "zephyr").fingerprint != Tokenizer(vocabulary, "mistral").fingerprint
