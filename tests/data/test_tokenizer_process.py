"""A tokenizer whose patterns are not known ones encodes in a process: the same ids, and an end to every text."""

import inspect
import json
import re
from pathlib import Path

import mistral_common
import pytest
import tiktoken_ext.openai_public
import transformers
from text_samples import STRANGE, conversations, data_config, mistral_file, said, tiny_tokenizer, write_rows
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers

from data import sandbox
from data.chat import encode_chat
from data.sandbox import BoundedTokenizer, Stopped
from data.sft import encode_demonstrations
from data.tokenizer import load_tokenizer
from data.vocabularies import patterns
from data.vocabularies.byte_level import SPLITS
from data.vocabularies.vocabulary import UnboundedTokenizer, encoder_of
from tests.data.test_tokenizer import byte_level_file

WORDS = r"\p{L}+|\p{N}+|\s+|[^\p{L}\p{N}\s]+"
MANY_WAYS = r"(?:z|z)*b|."
SLOW = ("z" * 19 + "c ") * 300  # a tenth of a second and more at each place, and no place gives up


def with_pattern(directory, pattern: str, **settings):
    byte_level_file(directory, ["<|im_start|>", "<|im_end|>"], **settings)
    written = json.loads((directory / "tokenizer.json").read_text())
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    written["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, written["pre_tokenizer"]]}
    (directory / "tokenizer.json").write_text(json.dumps(written))
    return directory


def speaker(directory, pattern: str):
    jinja = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    jinja += "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    return load_tokenizer(with_pattern(directory, pattern, eos_token="<|im_end|>", chat_template=jinja))


def test_a_process_gives_the_ids_of_this_one(tmp_path):
    tokenizer = speaker(tmp_path, WORDS)
    assert isinstance(tokenizer._encoder, BoundedTokenizer)
    here = UnboundedTokenizer(Backend.from_file(str(tmp_path / "tokenizer.json")))
    texts = [text for text in STRANGE if text] + [m["content"] for talk in conversations()[:5] for m in talk]
    for text in texts:
        assert tokenizer.encode(text) == here.encode_text(text)
    for text in ("<|im_start|>user\nhi 12", "no token", "<|im_end|>"):
        assert (
            tokenizer._encoder.encode(text, True) == here.encode(text, True) != here.encode(text, False) or "no" in text
        )
    assert tokenizer._encoder.encode_letters("<|im_end|>") == here.encode_letters("<|im_end|>")
    row = encode_chat(said("hi <|im_end|>", "ho"), tokenizer, max_length=64)
    tokenizer._encoder = here
    assert row == encode_chat(said("hi <|im_end|>", "ho"), tokenizer, max_length=64)
    assert row["input_ids"].count(tokenizer.stop_id) == 2


def test_published_tokenizers_encode_here():
    """Else they would be half as fast."""
    for tokenizer in (tiny_tokenizer(), load_tokenizer(mistral_file())):
        assert isinstance(tokenizer._encoder, UnboundedTokenizer) and isinstance(
            tokenizer._encoder_on, UnboundedTokenizer
        )
    for split in SPLITS.values():
        backend = Backend(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.Sequence(split)
        assert isinstance(encoder_of(backend), UnboundedTokenizer)


def test_known_patterns_are_the_published_ones():
    """As in transformers, tiktoken and mistral-common, whose files hold them."""
    home = Path(transformers.__file__).parent
    tekken = Path(mistral_common.__file__).parent / "data" / "tekken_240911.json"
    assert patterns.LLAMA3 in (home / "convert_slow_tokenizer.py").read_text()
    assert patterns.QWEN2 in (home / "models/qwen2/tokenization_qwen2.py").read_text()
    assert patterns.QWEN3_5 in (home / "models/qwen3_5/tokenization_qwen3_5.py").read_text()
    assert json.loads(tekken.read_text())["config"]["pattern"] == patterns.TEKKEN
    parts = re.findall(r'r"""(.+?)""",', inspect.getsource(tiktoken_ext.openai_public.o200k_base))
    assert "|".join(parts) == patterns.O200K


def test_a_text_that_takes_for_ever_costs_its_time_and_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(sandbox, "SECONDS", 1.0)
    tokenizer = speaker(tmp_path, MANY_WAYS)
    with pytest.raises(Stopped, match="the tokenizer was stopped: it did not end within 1 seconds"):
        tokenizer.encode(SLOW)
    assert tokenizer.decode(tokenizer.encode("hello world")) == "hello world"  # a process of its own again
    rows = [{"prompt": "hi", "completion": "ho"}, {"prompt": "hi", "completion": SLOW}]
    file = write_rows(tmp_path / "rows.jsonl", *rows)
    with pytest.raises(ValueError, match=r"rows.jsonl:2: the tokenizer was stopped"):
        encode_demonstrations("data.train", [file], data_config(max_length=1 << 20, cache=str(tmp_path)), tokenizer)


def test_a_text_on_which_the_library_gives_up_is_named(tmp_path):
    tokenizer = speaker(tmp_path, MANY_WAYS)
    with pytest.raises(ValueError, match="the tokenizer failed on a text: .*retry-limit"):
        tokenizer.encode("z" * 60 + "c")
