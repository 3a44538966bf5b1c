"""Text <-> token ids behind one small face, whatever file the tokenizer came in."""

import hashlib
import io
import json
import logging
import os
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

from data.chat import ROLES, TEMPLATES, Template
from data.jinja import agree, jinja_template, recognise
from data.vocabularies import Vocabulary, from_sentencepiece, read_vocabulary
from model.weights.adapter import find_tokenizer

log = logging.getLogger(__name__)


class Tokenizer:
    """`encode` never yields a special token: text that spells one stays text. `template` names the chat template.

    Padding is told by masks alone; `pad_id` fills the gaps and is never a token that ends a turn.
    """

    def __init__(self, vocabulary: Vocabulary, template: str | None):
        self.vocabulary, self.template = vocabulary, template
        self.default_system = vocabulary.default_system
        self.backend = vocabulary.backend
        self.backend.encode_special_tokens = True  # "<|im_end|>" inside a message is eight letters and signs
        self.backend.no_truncation()
        self.backend.no_padding()
        # A system message or a menu comes in a thousand conversations: remember its ids.
        self._encode = lru_cache(1 << 14)(lambda text: tuple(self.backend.encode(text, add_special_tokens=False).ids))
        self.vocab_size = self.backend.get_vocab_size(with_added_tokens=True)
        self.bos_token, self.eos_token = vocabulary.bos_token, vocabulary.eos_token
        if template is not None:
            self._check_template()
            self.stop_id = self.special_id(TEMPLATES[template].stop)
        self.bos_id, self.eos_id = self._id(self.bos_token), self._id(self.eos_token)
        ends = [self.stop_id if template else None, self.eos_id]
        self.stop_ids = sorted({i for i in ends if i is not None})
        self.pad_token = self._choose_pad()
        self.pad_id = self._id(self.pad_token) if self.pad_token else 0

    def encode(self, text: str, *, after: str = "") -> list[int]:
        """Token ids of `text`, no special ones added. With `after`: as it reads on from that text.

        `encode(a) + encode(b, after=a)` spells a + b without a SentencePiece space in between, and begins with
        `encode(a)`: the boundary lies between tokens, as it does when a model goes on from a prompt.
        """
        if not text:
            return []
        for head in (after, "\n") if after else ():  # a line break merges with less than most texts
            start, whole = self._encode(head), self._encode(head + text)
            if whole[: len(start)] == start:
                return list(whole[len(start) :])
        return list(self._encode(text))

    def decode(self, ids: Iterable[int], *, specials: bool = False) -> str:
        """Text of ids; `specials` shows special tokens too."""
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=not specials)

    def special_id(self, name: str) -> int:
        """Id of a special token; "bos" and "eos" stand for the tokenizer's own."""
        token = {"bos": self.bos_token, "eos": self.eos_token}.get(name, name)
        return self._id(token)

    @property
    def chat_template(self) -> Template:
        if self.template is None:
            raise ValueError(
                f"this tokenizer comes without a chat template; set data.template to one of {', '.join(TEMPLATES)}"
            )
        return TEMPLATES[self.template]

    @property
    def fingerprint(self) -> str:
        """Equal for two tokenizers that give the same ids: vocabulary, merges, template and default system message."""
        spelled = json.dumps([self.backend.to_str(), self.template, self.default_system])
        return hashlib.sha256(spelled.encode()).hexdigest()

    def save(self, directory: str | Path) -> None:
        """Writes tokenizer.json, tokenizer_config.json (with the Jinja template), special_tokens_map.json.

        A tokenizer that came from SentencePiece leaves its tokenizer.model as well. transformers loads the directory.
        """
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        names = {"bos_token": self.bos_token, "eos_token": self.eos_token, "pad_token": self.pad_token}
        names = {name: token for name, token in (names | {"unk_token": self.vocabulary.unk_token}).items() if token}
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **names}
        if self.template:
            settings["eos_token"] = names["eos_token"] = self.backend.id_to_token(self.stop_id)
            settings["chat_template"] = jinja_template(self.template, self.default_system)
        _write(directory / "tokenizer.json", self.backend.to_str(pretty=True).encode())
        _write(directory / "tokenizer_config.json", json.dumps(settings, indent=2, ensure_ascii=False).encode())
        _write(directory / "special_tokens_map.json", json.dumps(names, indent=2, ensure_ascii=False).encode())
        if self.vocabulary.sentencepiece:
            _write(directory / "tokenizer.model", self.vocabulary.sentencepiece)

    def _id(self, token: str | None) -> int | None:
        return None if token is None else self.backend.token_to_id(token)

    def _check_template(self) -> None:
        if self.template not in TEMPLATES:
            raise ValueError(f"unknown chat template {self.template!r}; known: {', '.join(TEMPLATES)}")
        if self.template == "mistral" and "[INST]" in (
            t.content for t in self.backend.get_added_tokens_decoder().values()
        ):
            raise ValueError(
                "[INST] is a token of its own in this tokenizer (Mistral-Instruct v0.3); v0.1 and v0.2 are read"
            )
        missing = [name for name in TEMPLATES[self.template].needs if self.special_id(name) is None]
        if missing:
            raise ValueError(
                f"the {self.template} template needs the special tokens {', '.join(missing)}, which this tokenizer "
                "lacks; set data.template to another (zephyr needs nothing but an end-of-text token)"
            )

    def _choose_pad(self) -> str | None:
        """The declared padding token, unless it ends turns too; else another special token that means nothing here."""
        specials = [t.content for _, t in sorted(self.backend.get_added_tokens_decoder().items()) if t.special]
        candidates = [self.vocabulary.pad_token, self.vocabulary.unk_token, *specials]
        taken = {*self.stop_ids, self.bos_id, None}
        return next((token for token in candidates if token and self._id(token) not in taken), None)


def load_tokenizer(path: str | Path, *, template: str | None = None) -> Tokenizer:
    """The tokenizer in a Hugging Face directory, a SentencePiece .model file, a .gguf file, or `package:name/file`.

    `template` overrides the chat template that the file names; a base model's file names none.

    Raises:
        ValueError: nothing there, an unknown kind of tokenizer or template, or special tokens that are missing.
    """
    is_model_file = ".model" in Path(path).suffixes and Path(path).is_file()
    vocabulary = read_vocabulary(Path(path) if is_model_file else find_tokenizer(path))
    tokenizer = Tokenizer(vocabulary, template or recognise(vocabulary.chat_template))
    if vocabulary.chat_template and tokenizer.template:
        ours = jinja_template(tokenizer.template, tokenizer.default_system)
        if not agree(vocabulary.chat_template, ours, bos_token=tokenizer.bos_token, eos_token=tokenizer.eos_token):
            log.warning("%s: its own chat template differs from %s, which is used", path, tokenizer.template)
    return tokenizer


def train_sentencepiece(texts: Iterable[str], vocab_size: int, directory: str | Path) -> Tokenizer:
    """Trains byte-fallback BPE with one special token per role (template `plain`), saves it and returns it.

    Raises:
        ValueError: `vocab_size` does not suit the texts.
    """
    import sentencepiece

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            character_coverage=1.0,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            split_digits=True,
            max_sentence_length=1 << 20,
            control_symbols=[f"<|{role}|>" for role in ROLES],
            eos_piece="<|end|>",
            pad_id=3,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise ValueError(f"cannot train a tokenizer of {vocab_size} pieces on these texts: {error}") from error
    tokenizer = Tokenizer(from_sentencepiece(model.getvalue()), "plain")
    tokenizer.save(directory)
    return tokenizer


def _write(path: Path, content: bytes) -> None:
    aside = path.with_name(path.name + ".tmp")
    aside.write_bytes(content)
    os.replace(aside, path)
