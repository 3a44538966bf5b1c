"""Build models from files or from a seed, frozen or not, and export them.

In a process group (dist=fsdp, hsdp) loading a model from a file gives shapes only. `run.shard` reads the weights later:
each rank reads its own rows, so no rank ever holds the whole model. Heads are small and needed before that, so they are
read immediately.
"""

import json
import math
import os
from collections.abc import Collection, Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from model.config import ModelConfig
from model.gated_delta import GatedDeltaNet
from model.heads import Policy, RewardModel, ValueModel
from model.linear import Linear
from model.quantized import NF4Linear
from model.weights.adapter import AdapterReader, find_base, is_adapter
from model.weights.gguf import GGUFReader
from model.weights.hf import HFReader
from model.weights.hf_config import make_config_json
from model.weights.names import parts_of, shape_of
from model.weights.paths import find_model
from model.weights.shards import ShardWriter
from runtime.distributed import own_rows, split, whole
from runtime.files import named_in_errors, remove, sync, write_sums

Reader = HFReader | GGUFReader | AdapterReader
LARGE = ("transformer", "lm_head")  # modules whose weights are read after sharding
HEAD_PARTS = {"score.weight", "score.bias", "score.gain", "score.shift"}


def load_policy(path: str | Path, *, precision: str = "fp32", frozen: bool = False) -> Policy:
    """The policy in a Hugging Face directory, a .gguf file or `package:NAME/FILE`.

    precision "bf16": matmuls in bf16 on fp32 master weights. A frozen model stores its matrices in bf16, with the same
    results. Raises ValueError where the path holds no policy or a damaged one.
    """
    reader = open_weights(path)
    if reader.kind != "policy":
        raise ValueError(f"{path} holds a {reader.kind} model, not a policy; give the directory that SFT or DPO wrote")
    return frozen_or_not(fill(Policy, reader, precision, frozen), frozen)


def load_reward_model(
    path: str | Path, *, precision: str, frozen: bool = False, seed: int | None = None
) -> RewardModel:
    """A reward model with its head. With a `seed`, a policy is accepted too and gets a new head drawn from the seed.

    Raises ValueError where the head is missing and there is no seed: the scores would be noise.
    """
    reader = open_weights(path)
    if reader.kind == "policy" and seed is None:
        raise ValueError(f"{path} holds a policy, not a reward model; give the directory that train_rm.py wrote")
    if reader.kind == "value":
        raise ValueError(f"{path} holds a value model; a reward model starts from a policy or a reward model")
    model = fill(RewardModel, reader, precision, frozen)
    if reader.kind == "policy":
        reset_head(model.head, seed)
    return frozen_or_not(model, frozen)


def load_value_model(path: str | Path, *, precision: str, frozen: bool = False, seed: int = 0) -> ValueModel:
    """A value model with its head, or one that starts from another model.

    From a reward model it takes the head, multiplied by the normalisation, so that the first values are scores. On a
    policy it puts a new head drawn from `seed`.
    """
    reader = open_weights(path)
    model = fill(ValueModel, reader, precision, frozen)
    if reader.kind == "policy":
        reset_head(model.head, seed)
    if reader.kind == "reward":
        gain, shift = reader.read("score.gain"), reader.read("score.shift")
        with torch.no_grad():
            model.head.weight.mul_(gain)
            model.head.bias.mul_(gain).add_(shift)
    return frozen_or_not(model, frozen)


def new_policy(config: ModelConfig, *, seed: int, precision: str = "fp32") -> Policy:
    """A policy with random weights drawn from `seed`."""
    return init_weights(empty(Policy, config, precision, False), seed)


def new_reward_model(config: ModelConfig, *, seed: int, precision: str) -> RewardModel:
    """A reward model with random weights drawn from `seed`."""
    return init_weights(empty(RewardModel, config, precision, False), seed)


def open_weights(path: str | Path) -> Reader:
    """A reader of the weights at the path: a Hugging Face directory, a directory with an adapter, or a GGUF file."""
    found = find_model(path)
    if found.is_dir() and is_adapter(found):
        return AdapterReader(found, open_weights(find_base(found)))
    return HFReader(found) if found.is_dir() else GGUFReader(found)


def empty(kind: type, config: ModelConfig, precision: str, frozen: bool, *, later: bool = False) -> nn.Module:
    """A model with allocated, uninitialised weights. With `later`, LARGE modules stay on the meta device."""
    if precision not in ("fp32", "bf16"):
        raise ValueError(f"precision={precision!r} must be fp32 or bf16")
    with torch.device("meta"):
        model = kind(config, torch.bfloat16 if precision == "bf16" else None)
    if precision == "bf16" and frozen:  # only weights that enter matmuls, so that the results are equal
        for module in model.modules():
            if isinstance(module, Linear):
                module.to(torch.bfloat16)
        model.transformer.embed.to(torch.float32)  # a tied lm_head becomes float32 with it
    for name, module in model.named_children():
        if not (later and name in LARGE):
            module.to_empty(device="cpu")
    for name, buffer in model.named_buffers(recurse=False):
        model.register_buffer(name, torch.empty_like(buffer, device="cpu"))
    if isinstance(model, Policy):
        model.tie()
    return model


def frozen_or_not(model: nn.Module, frozen: bool) -> nn.Module:
    """The model; if frozen, in eval mode and without gradients."""
    return model.eval().requires_grad_(False) if frozen else model


@torch.no_grad()
def fill(kind: type, reader: Reader, precision: str, frozen: bool) -> nn.Module:
    """The model in a file. Raises ValueError where weights are missing, unknown or have a wrong shape."""
    check_sizes(reader)
    model = empty(kind, reader.config, precision, frozen, later=dist.is_initialized())
    names = reader.names()
    wanted = {name: parts_of(name, reader.config) for name, _ in tensors(model)}
    if reader.kind != model.kind:  # the head comes from another kind of model, or is new
        wanted = {name: parts for name, parts in wanted.items() if reader.kind == "reward" or "score" not in parts[0]}
    missing = [part for parts in wanted.values() for part in parts if part not in names]
    if missing:
        raise ValueError(f"{reader.path} lacks {len(missing)} weights that its config asks for: {shorten(missing)}")
    check_tied(reader, names)
    output = parts_of("lm_head.weight", reader.config)
    left = names - {part for parts in wanted.values() for part in parts} - set(output) - HEAD_PARTS
    if left:
        raise ValueError(f"{reader.path} holds {len(left)} weights that its config does not know: {shorten(left)}")
    for parts in wanted.values():
        for part in parts:
            shape, expected = reader.shape(part), shape_of(part, reader.config)
            if shape != expected:
                raise ValueError(f"{reader.path}: {part} has shape {shape}, but its config asks for {expected}")
    large = [name for name, tensor in tensors(model) if tensor.is_meta]
    rounded = precision == "bf16" and frozen  # export_model reads those again, quantize_layers those not read yet
    model.source = reader if large else None
    read_into(model, reader, wanted.keys() - set(large))
    if large:
        model.read_weights = lambda: read_into(model, reader, large)  # shard_model calls it once
    elif rounded:
        model.source = open_weights(reader.path)  # opened again: a reader keeps the pages of the file that it has read
    if isinstance(model, RewardModel) and reader.kind == "policy":
        model.gain.fill_(1.0)
        model.shift.fill_(0.0)
    return model


def check_tied(reader: Reader, names: set[str]) -> None:
    """Raise ValueError where the config ties the output matrix to the embedding and the file stores another one."""
    output, embedding = (parts_of(name, reader.config)[0] for name in ("lm_head.weight", "transformer.embed.weight"))
    if not reader.config.tie_embeddings or output not in names or embedding not in names:
        return
    if not torch.equal(reader.read(output), reader.read(embedding)):
        raise ValueError(
            f"{reader.path}: its config says tie_word_embeddings=true, but it stores an lm_head.weight that differs "
            "from the embedding; set tie_word_embeddings=false there to use the stored lm_head, as transformers does"
        )


def check_sizes(reader: Reader) -> None:
    """Raise ValueError unless the weights in the file have the sizes of its config. It runs before a model is built."""
    names, config = reader.names(), reader.config
    layers = len({name.split(".")[2] for name in names if name.startswith(("model.layers.", "gpt_neox.layers."))})
    experts = config.num_experts if any(config.expert_layers or (True,)) else 0
    if config.family != "gpt_oss" and experts > len(names):  # gpt_oss stores all experts in one tensor
        raise ValueError(f"{reader.path} holds {len(names)} weights, too few for num_experts={config.num_experts}")
    if config.num_layers > layers:
        other = "" if layers else f"; {min(names)} is a name of another class: save_pretrained its language model"
        raise ValueError(f"{reader.path} holds {layers} layers, but its config asks for {config.num_layers}{other}")
    first = ("layers.0.attention.qkv", "layers.0.mlp.gate_up")
    for name in ("embed", *first):
        for part in parts_of(f"transformer.{name}.weight", config):
            if part not in names:
                raise ValueError(f"{reader.path} lacks 1 weights that its config asks for: {part}")
            shape, expected = reader.shape(part), shape_of(part, config)
            if shape != expected:
                raise ValueError(f"{reader.path}: {part} has shape {shape}, but its config asks for {expected}")


@torch.no_grad()
def read_into(model: nn.Module, reader: Reader, names: Collection[str]) -> None:
    """Copy the file's weights into the tensors of these names. Of a sharded tensor each rank reads its own rows."""
    if isinstance(model, Policy):
        model.tie()
    for name, tensor in tensors(model):
        if name not in names:
            continue
        own, start = own_rows(tensor)
        rows, end = 0, start + len(own) if own.ndim else 1
        for part in parts_of(name, reader.config):  # its rows in our stacked tensor are rows .. rows + size
            size = (reader.shape(part) or (1,))[0]
            low, high = max(start, rows), min(end, rows + size)
            if low < high:
                piece = reader.read(part, slice(low - rows, high - rows))
                (own[low - start : high - start] if own.ndim else own).copy_(piece)
            rows += size


def tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    """(name, tensor) of parameters and buffers, each once: a tied lm_head is listed as the embedding."""
    return [*model.named_parameters(), *model.named_buffers()]


def shorten(names) -> str:
    """The first five names, for an error message."""
    names = sorted(names)
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


@torch.no_grad()
def init_weights(model: nn.Module, seed: int) -> nn.Module:
    """Initialise all weights: N(0, 0.02), divided by sqrt(2 layers) where a matrix writes to the residual stream.

    Norms start at 1 and biases at 0.
    """
    generator = torch.Generator().manual_seed(seed)
    residual = 0.02 / math.sqrt(2 * model.config.num_layers)
    for name, tensor in model.named_parameters():
        if name.endswith("norm.weight"):
            tensor.fill_(1.0 - model.config.facts.norm_offset)
        elif name.endswith("bias"):
            tensor.zero_()
        else:
            std = residual if name.endswith(("out.weight", "down.weight")) else 0.02
            tensor.normal_(0.0, std, generator=generator)
    for module in model.modules():
        if isinstance(module, GatedDeltaNet):
            module.reset(generator)
    if hasattr(model, "head"):
        reset_head(model.head, seed)
    if isinstance(model, RewardModel):
        model.gain.fill_(1.0)
        model.shift.fill_(0.0)
    return model


@torch.no_grad()
def reset_head(head: nn.Linear, seed: int) -> None:
    """Initialise a head: weights with variance 1 / (D + 1), bias 0 (Stiennon et al. 2020, appendix B)."""
    generator = torch.Generator().manual_seed(seed)
    head.weight.normal_(0.0, 1 / math.sqrt(head.in_features + 1), generator=generator)
    head.bias.zero_()


def export_model(
    model: Policy | RewardModel | ValueModel,
    directory: str | Path,
    tokenizer,
    *,
    durable: bool = True,
    matrices: torch.dtype = torch.float32,
) -> None:
    """Write a Hugging Face directory. transformers computes the same logits from it.

    It is written to a temporary directory and then renamed. Every weight is float32 unless `matrices` says otherwise.
    Weights are gathered and written one at a time: rank 0 holds at most one file's worth (model/weights/shards.py).
    Adapters are merged in float32 into the weights of the base's file, or into the dequantised weights of an NF4 base.

    A reward model becomes `...ForSequenceClassification` with the normalisation multiplied into score.weight and
    score.bias: vLLM reads both, transformers ignores the bias. A value model becomes `...ForTokenClassification`. With
    sharded weights every rank must call this, and rank 0 writes.

    Args:
        durable: write checksums and wait for the disk. A server that reads the files immediately needs neither.
        matrices: their dtype, for a server that would round them to it. Vectors, convolutions and the routers of
            experts, which some servers keep in float32, stay in float32.
    """
    writes = not dist.is_initialized() or dist.get_rank() == 0
    directory, dtype = Path(directory), str(matrices).removeprefix("torch.")
    tmp_path = directory.with_name(directory.name + ".writing")
    if writes:
        remove(tmp_path)
        tmp_path.mkdir(parents=True)
    writer, head = ShardWriter(tmp_path), {}
    with split(model):  # gathered weights would be rounded
        for name, tensor in merged_weights(model, writes):
            if name in HEAD_PARTS:
                head[name] = tensor
                continue
            rounded = tensor.ndim == 2 and not name.endswith(".gate.weight")
            writer.add(name, tensor.to(matrices) if rounded else tensor)
    if not writes:
        return
    if "score.gain" in head:  # a server that finds the normalisation in the file refuses it
        gain, shift = head.pop("score.gain"), head.pop("score.shift")
        head = {"score.weight": head["score.weight"] * gain, "score.bias": head["score.bias"] * gain + shift}
    for name, tensor in head.items():
        writer.add(name, tensor)
    writer.close()
    ids = {"bos_id": tokenizer.bos_id, "eos_id": tokenizer.eos_id, "pad_id": tokenizer.pad_id}
    config = make_config_json(model.config, model.kind, dtype, **ids)
    with named_in_errors(tmp_path):
        (tmp_path / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        (tmp_path / "generation_config.json").write_text(json.dumps(tokenizer.generation_config, indent=2) + "\n")
    tokenizer.save(tmp_path)
    if durable:
        write_sums(tmp_path)
    replace_directory(tmp_path, directory)


@torch.no_grad()
def merged_weights(model: nn.Module, writes: bool) -> Iterator[tuple[str, Tensor]]:
    """(name in the file, float32 weight on the CPU), one at a time. A rank that does not write gets none, but must
    iterate to the end: every weight is gathered from all ranks."""
    modules = dict(model.named_modules())
    adapters = {f"{name}.weight": m.lora for name, m in modules.items() if getattr(m, "lora", None) is not None}
    quantized = {name: m for name, m in modules.items() if isinstance(m, NF4Linear)}
    codes = {f"{name}.{buffer}" for name, m in quantized.items() for buffer, _ in m.named_buffers(recurse=False)}
    stored = [(name, tensor) for name, tensor in tensors(model) if ".lora." not in name and name not in codes]
    for name, tensor in (*stored, *((f"{name}.weight", m) for name, m in quantized.items())):
        tensor = tensor.weight if isinstance(tensor, NF4Linear) else whole(tensor.detach())
        delta = adapters[name].delta().detach() if name in adapters else None
        if not writes:  # this rank only takes part in gathering
            continue
        if tensor.dtype == torch.bfloat16:  # frozen and rounded when it was read: the file has the exact weight
            pieces = [model.source.read(part) for part in parts_of(name, model.config)]
            tensor = torch.cat(pieces).to(tensor.device, torch.float32) if pieces[0].ndim else pieces[0].float()
        tensor = tensor if delta is None else tensor + delta
        sizes = [shape_of(part, model.config)[:1] for part in parts_of(name, model.config)]
        tensor = tensor.detach().cpu()
        pieces = tensor.split([size[0] for size in sizes]) if len(sizes) > 1 else [tensor]
        for part, piece in zip(parts_of(name, model.config), pieces, strict=True):
            yield part, piece.contiguous()


def replace_directory(new: Path, directory: Path) -> None:
    """Move `new`, whose files are on the disk, to `directory`. The old directory is deleted only after that."""
    old = directory.with_name(directory.name + ".old")
    remove(old)
    if directory.exists():
        os.replace(directory, old)
    os.replace(new, directory)
    sync(directory.parent)
    remove(old)
