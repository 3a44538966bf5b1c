"""Sixty files that somebody else made to hang, to take all memory, or to run code, and what reads each of them.

Each is written into a directory of its own by a function of that directory.
"""

import gzip
import json
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from safetensors.torch import save_file

from data import sandbox
from data.formats import examples
from data.records import BadRows, read_records
from data.tokenizer import load_tokenizer
from model.build import load_policy
from model.weights.hf_config import parse_config
from model.weights.names import parts_of, shape_of
from runtime.checkpoint import load_checkpoint, save_checkpoint

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "vocab_size": 3, "hidden_size": 8, "intermediate_size": 8,
    "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 4, "rope_theta": 1e4,
    "max_position_embeddings": 16, "rms_norm_eps": 1e-5, "rope_scaling": None, "tie_word_embeddings": True,
}  # fmt: skip
DEEP = "[" * 100_000
HUGE = 2**60
INDEX = "model.safetensors.index.json"


def hf_model(directory: Path, **changes) -> None:
    """A whole tiny model; `changes` to its config.json only."""
    config, _ = parse_config(CONFIG, directory)
    names = ["attention_norm", "attention.qkv", "attention.out", "mlp_norm", "mlp.gate_up", "mlp.down"]
    ours = ["transformer.embed.weight", "transformer.norm.weight"]
    ours += [f"transformer.layers.0.{name}.weight" for name in names]
    parts = [part for name in ours for part in parts_of(name, config)]
    save_file({part: torch.ones(shape_of(part, config)) for part in parts}, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(CONFIG | changes))


def with_config(**changes) -> Callable:
    return lambda directory: hf_model(directory, **changes)


def with_file(name: str, content: bytes | str) -> Callable:
    """The whole tiny model with one file replaced."""

    def write(directory: Path) -> None:
        hf_model(directory)
        if name == INDEX:
            (directory / "model.safetensors").unlink()  # it would go before the index
        (directory / name).write_bytes(content.encode() if isinstance(content, str) else content)

    return write


def safetensors(header: dict | bytes, length: int | None = None, data: bytes = bytes(64)) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def tensor(shape: list, offsets: list, dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


# ---- GGUF


def text(value: str | bytes) -> bytes:
    value = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(value)) + value


def field(name: str, kind: int, content: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + content


def array(kind: int, count: int, content: bytes = b"") -> bytes:
    return struct.pack("<IQ", kind, count) + content


def gguf(*fields: bytes, tensors: bytes = b"", counts: tuple = (), version: int = 3) -> Callable:
    head = b"GGUF" + struct.pack("<IQQ", version, *(counts or (0, len(fields))))
    return lambda directory: (directory / "model.gguf").write_bytes(head + b"".join(fields) + tensors + bytes(64))


def whole_gguf(change: Callable) -> Callable:
    """A model as llama.cpp writes it, but for what `change(writer)` adds or the values that it gives."""

    def write(directory: Path) -> None:
        import gguf as library

        writer = library.GGUFWriter(directory / "model.gguf", "llama")
        values = {"block_count": 1, "context_length": 16, "embedding_length": 8, "feed_forward_length": 8}
        values |= {"head_count": 2, "head_count_kv": 2, "layer_norm_rms_eps": 1e-5, "token_list": ["a", "b", "c"]}
        values |= change(writer) or {}
        for name, value in values.items():
            getattr(writer, f"add_{name}")(value)
        for name in ("token_embd", "blk.0.attn_q", "blk.0.attn_k", "blk.0.ffn_gate"):
            rows = 3 if name == "token_embd" else 8
            writer.add_tensor(f"{name}.weight", np.ones((rows, 8), dtype=np.float32))
        for step in ("write_header_to_file", "write_kv_data_to_file", "write_tensors_to_file", "close"):
            getattr(writer, step)()

    return write


def info(name: str, dimensions: list[int], kind: int = 0, offset: int = 0) -> bytes:
    shape = b"".join(struct.pack("<Q", size) for size in dimensions)
    return text(name) + struct.pack("<I", len(dimensions)) + shape + struct.pack("<IQ", kind, offset)


def words(writer, kind: str, *, types: int = 0, scores: int = 0) -> None:
    """The tokenizer's fields: its kind, and as many types and scores of tokens."""
    writer.add_tokenizer_model(kind)
    if types:
        writer.add_token_types([1] * types)
    if scores:
        writer.add_token_scores([0.0] * scores)


# ---- tokenizers


def sentencepiece(pieces: list[str], kind: int = 2) -> Callable:
    def write(directory: Path) -> None:
        from sentencepiece import sentencepiece_model_pb2

        proto = sentencepiece_model_pb2.ModelProto()
        proto.trainer_spec.model_type = kind
        for piece in pieces:
            proto.pieces.add(piece=piece, score=0.0, type=1)
        (directory / "tokenizer.model").write_bytes(proto.SerializeToString())

    return write


def tokenizer_json(**changes) -> Callable:
    plain = {"version": "1.0", "added_tokens": [], "model": {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": []}}
    return lambda directory: (directory / "tokenizer.json").write_text(json.dumps(plain | changes))


def split_by(pattern: str) -> Callable:
    pre = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return tokenizer_json(pre_tokenizer=pre)


def beside_tokenizer(name: str, content: str) -> Callable:
    def write(directory: Path) -> None:
        tokenizer_json()(directory)
        (directory / name).write_text(content)

    return write


# ---- data and checkpoints


def rows(content: bytes, name: str = "rows.jsonl") -> Callable:
    return lambda directory: (directory / name).write_bytes(content)


def one_row_of_a_gigabyte(directory: Path) -> None:
    with gzip.open(directory / "rows.jsonl.gz", "wb", compresslevel=1) as file:
        for _ in range(1024):
            file.write(bytes(2**20))


class Attack:
    def __reduce__(self):
        return (os.mkdir, ("owned",))


def checkpoint(change: Callable) -> Callable:
    def write(directory: Path) -> None:
        save_checkpoint(directory, 1, {"a": torch.ones(4)}, {}, rank=0)
        step = directory / "step_000001"
        index = json.loads((step / "index.json").read_text())
        (step / "index.json").write_text(json.dumps(change(index) or index))
        (step / ".metadata").write_bytes(pickle.dumps(Attack()))

    return write


def chunk(index: dict) -> dict:
    return index["/a"]["chunks"][0]


# ---- who reads what


def read_gguf(directory: Path) -> None:
    load_policy(directory / "model.gguf")


def read_gguf_tokenizer(directory: Path) -> None:
    load_tokenizer(directory / "model.gguf")


def template(text: str) -> Callable:
    return lambda directory: (directory / "chat_template.jinja").write_text(text)


def read_template(directory: Path) -> None:
    text, said = (directory / "chat_template.jinja").read_text(), [{"role": "user", "content": "a"}]
    with mock.patch.object(sandbox, "SECONDS", 2.0):  # 20 without a test
        written = sandbox.render(text, said, None, [(1, True)], tokens={"bos_token": "<s>"}, date="2026-01-01")
    if written[0].error:
        raise ValueError(written[0].error)


def read_rows(directory: Path) -> None:
    read_records(next(directory.iterdir()), examples, BadRows("error"))


def read_checkpoint(directory: Path) -> None:
    load_checkpoint(directory / "step_000001", {"a": torch.zeros(4)}, rank=0)


NAME = "model.embed_tokens.weight"
HOSTILE: dict[str, tuple[Callable, Callable]] = {
    "gguf: array of 2^60": (gguf(field("a", 9, array(4, HUGE))), read_gguf),
    "gguf: array of 2^60 texts": (gguf(field("a", 9, array(8, HUGE))), read_gguf),
    "gguf: text of 2^60": (gguf(field("a", 8, struct.pack("<Q", HUGE))), read_gguf),
    "gguf: name of 2^60": (gguf(struct.pack("<Q", HUGE)), read_gguf),
    "gguf: 2^60 fields": (gguf(counts=(0, HUGE)), read_gguf),
    "gguf: 2^60 tensors": (gguf(counts=(HUGE, 0)), read_gguf),
    "gguf: array of arrays": (gguf(field("a", 9, array(9, 1, array(4, 1, bytes(4))))), read_gguf),
    "gguf: unknown kind": (gguf(field("a", 77, bytes(8))), read_gguf),
    "gguf: version 99": (gguf(version=99), read_gguf),
    "gguf: 2^31 dimensions": (gguf(tensors=text("t") + struct.pack("<I", 2**31), counts=(1, 0)), read_gguf),
    "gguf: 2^64 elements": (gguf(tensors=info("t", [2**32, 2**32]), counts=(1, 0)), read_gguf),
    "gguf: elements past the end": (gguf(tensors=info("t", [2**20]), counts=(1, 0)), read_gguf),
    "gguf: no field": (gguf(), read_gguf),
    "gguf: architecture is a number": (gguf(field("general.architecture", 4, bytes(4))), read_gguf),
    "gguf: alignment 0": (gguf(field("general.alignment", 4, bytes(4))), read_gguf),
    "gguf: a name that is no text": (gguf(field(b"\xff\xfe", 4, bytes(4))), read_gguf),
    "gguf: 10^9 layers": (whole_gguf(lambda w: {"block_count": 10**9}), read_gguf),
    "gguf: width 10^9": (whole_gguf(lambda w: {"embedding_length": 10**9}), read_gguf),
    "gguf: no heads": (whole_gguf(lambda w: {"head_count": 0}), read_gguf),
    "gguf: token of 1 MB": (
        whole_gguf(lambda w: words(w, "llama", types=3, scores=3) or {"token_list": ["a" * 2**20, "b", "c"]}),
        read_gguf_tokenizer,
    ),
    "gguf: tokenizer without kinds": (whole_gguf(lambda w: words(w, "llama")), read_gguf_tokenizer),
    "gguf: fewer kinds than tokens": (
        whole_gguf(lambda w: words(w, "llama", types=1, scores=3)), read_gguf_tokenizer,
    ),
    "gguf: merges of one part": (
        whole_gguf(lambda w: words(w, "gpt2", types=3) or w.add_token_merges(["ab"])), read_gguf_tokenizer,
    ),
    "gguf: end token past the vocabulary": (
        whole_gguf(lambda w: words(w, "llama", types=3, scores=3) or w.add_eos_token_id(10**6)), read_gguf_tokenizer,
    ),
    "config: 10^9 layers": (with_config(num_hidden_layers=10**9), load_policy),
    "config: 10^18 ids": (with_config(vocab_size=10**18), load_policy),
    "config: width 10^9": (with_config(hidden_size=10**9), load_policy),
    "config: width 2^63": (with_config(hidden_size=2**63), load_policy),
    "config: inner width 10^12": (with_config(intermediate_size=10**12), load_policy),
    "config: 10^9 heads": (with_config(num_attention_heads=10**9, num_key_value_heads=10**9), load_policy),
    "config: heads of 10^12": (with_config(head_dim=10**12), load_policy),
    "config: no heads": (with_config(num_attention_heads=0), load_policy),
    "config: epsilon nan": (with_config(rms_norm_eps=float("nan")), load_policy),
    "config: rope of a list": (with_config(rope_scaling=[1]), load_policy),
    "config: nested": (with_file("config.json", DEEP), load_policy),
    "config: 100 MB": (with_file("config.json", '{"a": "' + "a" * 10**8 + '"}'), load_policy),
    "config: a number of 10^5 digits": (with_file("config.json", '{"vocab_size": ' + "9" * 10**5 + "}"), load_policy),
    "config: no text": (with_file("config.json", b"\xff\xfe{}"), load_policy),
    "safetensors: header of 2^60": (with_file("model.safetensors", safetensors({}, HUGE)), load_policy),
    "safetensors: nested header": (with_file("model.safetensors", safetensors(DEEP.encode())), load_policy),
    "safetensors: 2^60 elements": (
        with_file("model.safetensors", safetensors({NAME: tensor([HUGE], [0, 4 * HUGE])})), load_policy,
    ),
    "safetensors: shared bytes": (
        with_file("model.safetensors", safetensors({name: tensor([16], [0, 64]) for name in "ab"})), load_policy,
    ),
    "safetensors: unknown dtype": (
        with_file("model.safetensors", safetensors({NAME: tensor([16], [0, 64], "OBJECT")})), load_policy,
    ),
    "index: a file outside": (
        with_file(INDEX, '{"weight_map": {"a": "../../../etc/passwd"}}'), load_policy,
    ),
    "index: 10^5 files": (
        with_file(INDEX, json.dumps({"weight_map": {f"a{i}": f"{i}.s" for i in range(10**5)}})), load_policy,
    ),
    "index: no files": (with_file(INDEX, '{"weight_map": [1]}'), load_policy),
    "tokenizer: piece of 1 MB": (sentencepiece(["a", "b", "a" * 2**20]), load_tokenizer),
    "tokenizer: unigram pieces": (sentencepiece(["a"], kind=1), load_tokenizer),
    "tokenizer: no SentencePiece": (lambda d: (d / "tokenizer.model").write_bytes(os.urandom(4096)), load_tokenizer),
    "tokenizer: a pattern that is none": (split_by("("), load_tokenizer),
    "tokenizer: a pattern that never ends": (split_by("(a+)+$"), load_tokenizer),
    "tokenizer: a pattern of many ways": (split_by("(a|a)*$"), load_tokenizer),
    "tokenizer: nested": (lambda d: (d / "tokenizer.json").write_text(DEEP), load_tokenizer),
    "tokenizer: unknown model": (tokenizer_json(model={"type": "Exec"}), load_tokenizer),
    "tokenizer: added token without content": (tokenizer_json(added_tokens=[{"id": 0}]), load_tokenizer),
    "tokenizer: settings cut": (beside_tokenizer("tokenizer_config.json", '{"bos_token": '), load_tokenizer),
    "tokenizer: bos is a list": (beside_tokenizer("tokenizer_config.json", '{"bos_token": [1]}'), load_tokenizer),
    "tokenizer: special tokens are a list": (beside_tokenizer("special_tokens_map.json", "[]"), load_tokenizer),
    "template: loops in loops": (
        template("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"), read_template,
    ),
    "template: 4 GB of spaces": (template("{{ 'a'.ljust(4000000000) }}"), read_template),
    "template: a list of 10^9": (template("{{ range(10 ** 9) | list }}"), read_template),
    "template: a text that doubles": (
        template("{% set n = namespace(x='a') %}{% for i in range(99) %}{% set n.x = n.x ~ n.x %}{% endfor %}"),
        read_template,
    ),
    "template: a number of 10^9 digits": (template("{{ 10 ** (10 ** 9) }}"), read_template),
    "template: calls itself": (template("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}"), read_template),
    "template: into the interpreter": (template("{{ ''.__class__.__mro__[1].__subclasses__() }}"), read_template),
    "template: a file": (template("{% include '/etc/passwd' %}"), read_template),
    "template: nested brackets": (template("{{ " + "(" * 10**5 + ")" * 10**5 + " }}"), read_template),
    "data: nested": (rows(DEEP.encode()), read_rows),
    "data: a row of a gigabyte in 5 MB": (one_row_of_a_gigabyte, read_rows),
    "data: half a surrogate": (rows(b'{"prompt": "\\ud800", "completion": "a"}\n'), read_rows),
    "data: no gzip": (rows(b"\x1f\x8b\x08\0" + bytes(64), "rows.jsonl.gz"), read_rows),
    "data: no parquet": (rows(b"PAR1" + b"\xff" * 64 + b"PAR1", "rows.parquet"), read_rows),
    "checkpoint: 2^47 elements": (
        checkpoint(lambda i: i["/a"].update(size=[2**47]) or chunk(i).update(sizes=[2**47])), read_checkpoint,
    ),
    "checkpoint: a file outside": (
        checkpoint(lambda i: chunk(i).update(file="../../../../etc/passwd")), read_checkpoint,
    ),
    "checkpoint: a device": (checkpoint(lambda i: chunk(i).update(file="/dev/zero")), read_checkpoint),
    "checkpoint: no index": (checkpoint(lambda i: [1]), read_checkpoint),
}  # fmt: skip
