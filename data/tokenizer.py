"""Convert text to token ids and back, with one class for all tokenizer files."""

import hashlib
import io
import json
import os
import threading
from collections.abc import Iterable
from datetime import datetime
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import tokenizers

from data.builtin_templates import TEMPLATES, choose_template
from data.chat_template import CLOSE, FIXED_DATE, MARKED, OPEN, ChatTemplate, Spelled
from data.vocabularies import read_vocabulary
from data.vocabularies.pieces import from_sentencepiece
from data.vocabularies.vocabulary import Vocabulary, encoder_of, reading_on, with_special
from model.weights.adapter import find_tokenizer
from runtime.files import named_in_errors

PLAIN_ROLES = ("system", "user", "assistant", "tool")


class Tokenizer:
    """`encode` never yields a special token: the spelling of one is encoded as text. `chat_template` writes
    conversations.

    `template` names a chat template that replaces the checkpoint's (`builtin_templates.choose_template`). `date` is the
    date that a template sees. Padding is marked by masks only; `pad_id` fills the gaps and never ends a turn.
    `stop_ids` are all ids that end a turn: the template's, the tokenizer's and those of generation_config.json.
    """

    def __init__(self, vocabulary: Vocabulary, template: str | None = None, *, date: str = FIXED_DATE):
        self.replaces = template is not None  # whether the checkpoint's own template is replaced
        self.date = _iso_date(date)
        self._template = choose_template(template, vocabulary, date=date)
        self.template = None if self._template is None else template or "own"
        self.bos_token, self.eos_token = vocabulary.bos_token, vocabulary.eos_token
        declared = [vocabulary.eos_token, *map(vocabulary.backend.id_to_token, vocabulary.stop_ids)]
        stop, markers = self._template.probe(_added(vocabulary.backend), declared) if self._template else (None, set())
        self.vocabulary = vocabulary = with_special(vocabulary, markers)
        self.backend = vocabulary.backend
        self.backend.no_truncation()
        self.backend.no_padding()
        self._reads_on, self._lock = reading_on(self.backend), threading.Lock()
        self._encoder = encoder_of(self.backend)
        self._encoder_on = self._encoder if self._reads_on is None else encoder_of(self._reads_on.backend)
        # The same system message or tools occur in many conversations, so their ids are cached.
        self._encode = lru_cache(1 << 14)(self._encode_text)
        self.vocab_size = self.backend.get_vocab_size(with_added_tokens=True)
        self.bos_id, self.eos_id = self._id(self.bos_token), self._id(self.eos_token)
        self.stop_id = self._id(stop)  # the stop token of the template
        self.stop_ids = sorted({self.stop_id, self.eos_id, *vocabulary.stop_ids} - {None})
        self.specials = _special_tokens(self.backend, reads_on=self._reads_on is not None)
        if self._template:
            stops = [token for i in self.stop_ids if (token := self.backend.id_to_token(i)) is not None]
            self._template.set_tokens(self.specials, stops)
        self.pad_token = self._choose_pad()
        self.pad_id = self._id(self.pad_token) if self.pad_token else 0

    def encode(self, text: str, *, after: str = "") -> list[int]:
        """Token ids of `text`, without special tokens. With `after`: the ids of `text` as a continuation of that text.

        `encode(a) + encode(b, after=a)` spells a + b without a SentencePiece space in between, and begins with
        `encode(a)`: the boundary is between tokens, as when a model continues a prompt.
        """
        if not text:
            return []
        for head in (after, "\n") if after else ():  # few texts merge with a line break
            start, whole = self._encode(head), self._encode(head + text)
            if whole[: len(start)] == start:
                return list(whole[len(start) :])
        return list(self._encode(text))

    def decode(self, ids: Iterable[int], *, specials: bool = False) -> str:
        """The text of ids. With `specials`, special tokens are shown too."""
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=not specials)

    def encode_spelled(self, spelled: Spelled) -> tuple[list[int], list[bool]]:
        """(ids of a conversation that `chat_template` wrote, whether each id is in a target).

        Special tokens that the template wrote are encoded as such. Text between the marks is encoded as text.
        """
        text, targets = spelled.text, spelled.targets
        ids: list[int] = []
        places: list[tuple[int, int]] = []  # (start, end) of each id in the text
        for at, end in pairwise([0, *(start for start, _ in targets if spelled.apart and start), len(text)]):
            new, found = self._encode_chat(text[at:end], reads_on=self._reads_on_at(text, at))
            ids += new
            places += [(at + first, at + last) for first, last in found]
        mask, spans = [], iter(targets)
        start, end = next(spans, (len(text), len(text)))
        for first, last in places:
            while first >= end and end < len(text):
                start, end = next(spans, (len(text), len(text)))
            mask.append(first < end and last > start)
        return ids, mask

    def special_id(self, token: str) -> int | None:
        """Id of a token. None if the vocabulary has no such token."""
        return self._id(token)

    @property
    def chat_template(self) -> ChatTemplate:
        if self._template is None:
            raise ValueError(f"this tokenizer has no chat template; set data.template to one of {', '.join(TEMPLATES)}")
        return self._template

    @property
    def generation_config(self) -> dict:
        """The checkpoint's generation_config.json, with every id that ends an answer."""
        ids = {"bos_token_id": self.bos_id, "pad_token_id": self.pad_id}
        given = self.vocabulary.stop_ids
        ends = [*given, *(i for i in self.stop_ids if i not in given)]
        return ids | self.vocabulary.generation | {"eos_token_id": ends}

    @property
    def fingerprint(self) -> str:
        """A digest that is equal for two tokenizers with the same ids: vocabulary, merges, template and its date."""
        written = None
        if self._template is not None:
            text = "".join(self._template.jinja.values())
            named = {name: token for name, token in self._template.tokens.items() if name in text}
            written = [self._template.jinja, named, self._template.date]
        return hashlib.sha256(json.dumps([self.backend.to_str(), written]).encode()).hexdigest()

    def _encode_text(self, text: str) -> tuple[int, ...]:
        with self._lock:  # "<|im_end|>" inside a message is encoded as letters and signs
            return tuple(self._encoder.encode_text(text))

    def _reads_on_at(self, text: str, at: int) -> bool:
        """Whether the text before this place continues there. After a special token a new text begins."""
        if at == 0 or self._reads_on is None:
            return False
        ended = any(text[at - n : at] in self.specials for n in {len(token) for token in self.specials} if n <= at)
        return not ended or self._reads_on.only_first

    def _encode_chat(self, text: str, *, reads_on: bool) -> tuple[list[int], list[tuple[int, int]]]:
        """(ids of rendered text, the place of each in it). `reads_on`: other text precedes it."""
        ids: list[int] = []
        places: list[tuple[int, int]] = []
        at = 0
        for number, piece in enumerate(MARKED.split(text) if OPEN in text or CLOSE in text else [text]):
            if number % 2:  # a special token in the data, or a single mark: the template split the text there
                at += 1
            if piece:
                encode = self._encode_as_text if number % 2 else self._encode_with_specials
                new, found = encode(piece, reads_on or number > 0)
                ids += new
                places += [(at + first, at + last) for first, last in found]
                at += len(piece) + number % 2
        return ids, places

    def _encode_with_specials(self, text: str, reads_on: bool) -> tuple[list[int], list[tuple[int, int]]]:
        if reads_on and self._reads_on is not None:  # without SentencePiece's space before the first part
            first = min((place for token in self.specials if (place := text.find(token)) >= 0), default=len(text))
            with self._lock:
                head, at = self._encoder_on.encode(text[:first], False)
            ids, places = self._encode_with_specials(text[first:], False) if text[first:] else ([], [])
            return head + ids, at + [(first + start, first + end) for start, end in places]
        with self._lock:
            return self._encoder.encode(text, True)

    def _encode_as_text(self, text: str, reads_on: bool) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids that spell a special token as letters and signs."""
        ids = (self._encoder_on if reads_on else self._encoder).encode_letters(text)
        if self._id(text) in ids:
            raise ValueError(f"this tokenizer can write {text!r} only as the special token")
        return ids, [(0, len(text))] * len(ids)

    def save(self, directory: str | Path) -> None:
        """Write the tokenizer's own files, or new ones if it has none or another template.

        transformers and vLLM can read the directory: tokenizer.json, tokenizer_config.json (with the Jinja template),
        special_tokens_map.json, and tokenizer.model if there was a SentencePiece model.
        """
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        as_they_are = self.vocabulary.files and not self.replaces
        for name, content in (self.vocabulary.files if as_they_are else self._own_files()).items():
            (directory / name).parent.mkdir(exist_ok=True)
            _write(directory / name, content)

    def _own_files(self) -> dict[str, bytes]:
        """The files with our chat template, whose stop token is the end-of-text token."""
        names = {"bos_token": self.bos_token, "eos_token": self.eos_token, "pad_token": self.pad_token}
        names = {name: token for name, token in (names | {"unk_token": self.vocabulary.unk_token}).items() if token}
        jinja = "" if self._template is None else "".join(self._template.jinja.values())
        # the template would write another stop token otherwise
        if self.stop_id is not None and "eos_token" not in jinja:
            names["eos_token"] = self.backend.id_to_token(self.stop_id)
        files = {name: content for name, content in self.vocabulary.files.items() if "chat_template" not in name}
        settings = json.loads(files.get("tokenizer_config.json", b"{}")) or {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
        }
        settings.pop("chat_template", None)
        if self._template is not None:
            given = self._template.jinja
            several = [{"name": name, "template": text} for name, text in given.items()]
            settings["chat_template"] = several if len(given) > 1 else given["default"]
        files["tokenizer_config.json"] = json.dumps(settings | names, indent=2, ensure_ascii=False).encode()
        files["special_tokens_map.json"] = json.dumps(names, indent=2, ensure_ascii=False).encode()
        if files.pop("tekken.json", None) or not self.vocabulary.files:
            files["tokenizer.json"] = self.backend.to_str(pretty=True).encode()
        if self.vocabulary.sentencepiece:
            files["tokenizer.model"] = self.vocabulary.sentencepiece
        return files

    def _id(self, token: str | None) -> int | None:
        return None if token is None else self.backend.token_to_id(token)

    def _choose_pad(self) -> str | None:
        """The declared padding token, unless it also ends turns; else another special token without a use here."""
        specials = [t.content for _, t in sorted(self.backend.get_added_tokens_decoder().items()) if t.special]
        candidates = [self.vocabulary.pad_token, self.vocabulary.unk_token, *specials]
        taken = {*self.stop_ids, self.bos_id, None}
        return next((token for token in candidates if token and self._id(token) not in taken), None)


def _special_tokens(backend: tokenizers.Tokenizer, *, reads_on: bool) -> set[str]:
    """The special tokens. Raises ValueError if `reads_on` and one depends on the text before it, which is cut there."""
    tokens = [token for token in backend.get_added_tokens_decoder().values() if token.special]
    if odd := [token.content for token in tokens if reads_on and (token.lstrip or token.single_word)]:
        raise ValueError(
            f"special tokens with lstrip or single_word ({', '.join(odd)}) are not supported in a tokenizer that puts "
            "a space before texts: ids would differ"
        )
    return {token.content for token in tokens}


def _added(backend: tokenizers.Tokenizer) -> list[str]:
    return [token.content for token in backend.get_added_tokens_decoder().values()]


def _iso_date(text: str) -> str:
    try:
        datetime.fromisoformat(text)
    except (TypeError, ValueError):
        raise ValueError(f"data.date={text} must be a date such as {FIXED_DATE}, for chat templates that ask") from None
    return text


def load_tokenizer(path: str | Path, *, template: str | None = None, date: str = FIXED_DATE) -> Tokenizer:
    """The tokenizer in a Hugging Face directory, a SentencePiece .model file, a .gguf file, or `package:name/file`.

    `template` names a chat template for a base model, which has none. `date` is today's date for templates that use
    it.

    Raises:
        ValueError: there is no tokenizer, its kind is unknown, or see `builtin_templates.choose_template`.
    """
    is_model_file = ".model" in Path(path).suffixes and Path(path).is_file()
    vocabulary = read_vocabulary(Path(path) if is_model_file else find_tokenizer(path))
    return Tokenizer(vocabulary, template, date=date)


def train_sentencepiece(texts: Iterable[str], vocab_size: int, directory: str | Path) -> Tokenizer:
    """Train byte-fallback BPE with one special token per role (template `plain`), save it and return it.

    Raises:
        ValueError: `vocab_size` does not fit the texts.
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
            control_symbols=[f"<|{role}|>" for role in PLAIN_ROLES],
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
    tmp_path = path.with_name(path.name + ".tmp")
    with named_in_errors(path):
        tmp_path.write_bytes(content)
    os.replace(tmp_path, path)


def check_same_tokenizer(path: str, tokenizer, key: str = "reward_model") -> None:
    """Raise ValueError unless the model at `path` uses this tokenizer. Otherwise ids would mean other tokens."""
    other = load_tokenizer(path, date=tokenizer.date)
    if other.fingerprint != tokenizer.fingerprint:
        raise ValueError(
            f"{key}={path} has another tokenizer or chat template than the policy ({other.vocab_size} ids, "
            f"template {other.template}, against {tokenizer.vocab_size}, {tokenizer.template}); take a model that was "
            "trained from this policy or beside it (a reward model: train_rm.py policy=...)"
        )
