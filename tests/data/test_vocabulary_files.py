"""SentencePiece's options and GGUF's flags: ids are sentencepiece's own under each, or the file is refused by name."""

import io
import random

import pytest
import sentencepiece
from gguf import GGUFWriter
from sentencepiece import sentencepiece_model_pb2
from text_samples import STRANGE, conversations

from data.chat import encode_prompt
from data.tokenizer import load_tokenizer

TEXTS = STRANGE + [message["content"] for talk in conversations(most=12) for message in talk]
GEMMA = (
    "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ m.role }}\n{{ m.content }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>assistant\n{% endif %}"
)


def train(**options) -> bytes:
    """A SentencePiece model of real text under options; as Gemma's, it has pieces for runs of spaces and lines."""
    model = io.BytesIO()
    texts = (message["content"] for talk in conversations(most=60) for message in talk)
    settings = {
        "model_type": "bpe",
        "vocab_size": 700,
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "user_defined_symbols": ["▁▁", "▁▁▁▁", "\n\n"],
        "num_threads": 1,
        "control_symbols": ["<start_of_turn>", "<end_of_turn>"],
        "minloglevel": 2,
        "max_sentence_length": 1 << 16,
    } | options
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=texts, model_writer=model, **settings)
    return model.getvalue()


def texts() -> list[str]:
    dice = random.Random(0)
    letters = ["a ", "etaoin shrdlu ETA", "  \n\t.,x", "日本 é🙂a", "01239 .,"]
    drawn = ["".join(dice.choices(kind, k=dice.randrange(1, 60))) for kind in letters * 60]
    return [text for text in TEXTS + drawn if "\x00" not in text]  # SentencePiece ends a text there


def write_gguf(path, model: bytes, **flags) -> None:
    """The tokenizer part of a GGUF, as llama.cpp's converter writes it: a user's pieces with spaces as spaces."""
    spec = sentencepiece_model_pb2.ModelProto.FromString(model)
    writer = GGUFWriter(path, "llama")
    writer.add_tokenizer_model("llama")
    writer.add_token_list([p.piece.replace("▁", " ") if p.type == 4 else p.piece for p in spec.pieces])
    writer.add_token_scores([p.score for p in spec.pieces])
    writer.add_token_types([p.type for p in spec.pieces])
    writer.add_bos_token_id(spec.trainer_spec.bos_id)
    writer.add_eos_token_id(spec.trainer_spec.eos_id)
    writer.add_chat_template(GEMMA)
    for name, value in flags.items():
        writer.add_bool(f"tokenizer.ggml.{name}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()


@pytest.mark.parametrize("dummy", [True, False])
def test_a_model_with_or_without_a_first_space_gives_sentencepieces_ids(dummy, tmp_path):
    model = train(add_dummy_prefix=dummy, **({"user_defined_symbols": []} if dummy else {}))
    (tmp_path / "tokenizer.model").write_bytes(model)
    ours, truth = load_tokenizer(tmp_path), sentencepiece.SentencePieceProcessor(model_proto=model)
    for text in texts():
        assert ours.encode(text) == truth.encode(text), repr(text)
        assert ours.decode(ours.encode(text)) == truth.decode(truth.encode(text))


@pytest.mark.parametrize("flag", [True, False, None])
def test_a_gguf_says_whether_a_space_goes_first(flag, tmp_path):
    """llama.cpp puts one where the file does not say."""
    model = train(add_dummy_prefix=flag is not False, **({} if flag is False else {"user_defined_symbols": []}))
    write_gguf(tmp_path / "model.gguf", model, **({} if flag is None else {"add_space_prefix": flag}))
    ours, truth = load_tokenizer(tmp_path / "model.gguf"), sentencepiece.SentencePieceProcessor(model_proto=model)
    for text in texts():
        assert ours.encode(text) == truth.encode(text), repr(text)
    begins, ends = truth.piece_to_id("<start_of_turn>"), truth.piece_to_id("<end_of_turn>")
    said = [{"role": "user", "content": "Hi  there\n\n"}]
    asked, header = truth.encode("user\nHi  there\n\n"), truth.encode("assistant\n")
    rest = truth.encode("\n")
    expected = [truth.bos_id(), begins, *asked, ends, *rest, begins, *header]
    assert encode_prompt(said, ours, max_length=1 << 20) == expected


@pytest.mark.parametrize(
    "option, said",
    [
        ({"add_dummy_prefix": True}, "user-defined pieces"),
        ({"remove_extra_whitespaces": True}, "remove_extra_whitespaces=true"),
        ({"treat_whitespace_as_suffix": True}, "treat_whitespace_as_suffix=true"),
        ({"byte_fallback": False}, "byte_fallback=false"),
        ({"normalization_rule_name": "nmt_nfkc"}, "without text normalisation"),
        ({"model_type": "unigram"}, "only SentencePiece BPE"),
    ],
)
def test_options_that_are_not_computed_are_refused_by_name(option, said, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(train(**option))
    with pytest.raises(ValueError, match=said):
        load_tokenizer(tmp_path)


def test_flags_of_a_gguf_that_are_not_computed_are_refused(tmp_path):
    write_gguf(tmp_path / "model.gguf", train(), remove_extra_whitespaces=True)
    with pytest.raises(ValueError, match="normalises text before it splits it"):
        load_tokenizer(tmp_path / "model.gguf")
