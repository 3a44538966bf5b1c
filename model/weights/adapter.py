"""Read a PEFT adapter and its base as the merged model: W + scale B A, computed when a weight is read."""

import math
from pathlib import Path

from torch import Tensor

from model.config import ModelConfig
from model.weights.gguf import GGUFReader
from model.weights.hf import NEUTRAL, HFReader, open_safetensors, read_json
from model.weights.names import parts_of
from model.weights.paths import find_model
from model.weights.text_part import has_other_parts, text_names
from runtime.files import check_sums

PREFIX = "base_model.model."
KINDS = {"CAUSAL_LM": "policy", None: "policy", "SEQ_CLS": "reward", "TOKEN_CLS": "value"}
# Keys of adapter_config.json that describe the training and have no effect on the forward pass.
CHANGES_NOTHING = {
    "peft_type", "task_type", "base_model_name_or_path", "r", "lora_alpha", "lora_dropout", "target_modules",
    "use_rslora", "inference_mode", "auto_mapping", "revision", "peft_version", "exclude_modules", "layers_pattern",
    "layers_to_transform", "loftq_config", "ephemeral_gpu_offload", "runtime_config", "megatron_core",
    "qalora_group_size", "target_parameters",
}  # fmt: skip
NEUTRAL_KEYS = {"bias": "none", "init_lora_weights": True}


def is_adapter(directory: Path) -> bool:
    """Whether the directory holds an adapter. Raises ValueError where it holds a whole model as well."""
    if not (directory / "adapter_config.json").exists():
        return False
    if (directory / "config.json").exists():
        raise ValueError(
            f"{directory} holds a whole model (config.json) and an adapter (adapter_config.json), and only one can be "
            "meant; move the adapter's two files into a directory of their own and pass that, or delete them"
        )
    return True


class AdapterReader:
    """The merged weights by Hugging Face name. Raises ValueError where the adapter is not plain LoRA."""

    config: ModelConfig

    def __init__(self, directory: Path, base: "HFReader | GGUFReader | AdapterReader"):
        check_sums(directory, ["adapter_config.json", *(path.name for path in directory.glob("*.safetensors"))])
        raw = read_json(directory / "adapter_config.json")
        check_adapter(raw, directory)
        self.path, self.base, self.config, self.kind = directory, base, base.config, KINDS[raw.get("task_type")]
        self.alpha, self.root = raw["lora_alpha"], bool(raw.get("use_rslora"))
        self.stored = open_files(directory)  # name without peft's prefix -> (open file, its key there)
        if has_other_parts(base.config):
            self.stored = {name: self.stored[there] for name, there in text_names(self.stored, directory).items()}
        if base.config.family == "mixtral":  # peft has transformers' module, its file the older name
            names = {name: name.replace(".mlp.gate.", ".block_sparse_moe.gate.") for name in self.stored}
            self.stored = {names[name]: place for name, place in self.stored.items()}
        places = {name.partition(".lora_")[0] for name in self.stored if ".lora_" in name}
        self.of_experts = of_stacks(places, raw, base.config, directory)
        self.adapted = {f"{place}.weight" for place in places if not is_stack(place)} | set(self.of_experts)
        self.saved = {name for name in self.stored if ".lora_" not in name}
        self.absent = {} if self.kind == "policy" else NEUTRAL
        if strange := (self.adapted - base.names()) | {name for name in self.saved if not name.startswith("score.")}:
            raise ValueError(
                f"{directory} holds weights for {min(strange)}, which its base {base.path} does not have; give the "
                "base of its training, or merge the adapter with peft's merge_and_unload and pass the merged model"
            )
        if lacking := {f"{place}.lora_{x}.weight" for place in places for x in "AB"} - set(self.stored):
            raise ValueError(f"{directory} lacks {min(lacking)}")
        self.check_shapes(raw["r"])

    def check_shapes(self, rank: int) -> None:
        """Raise ValueError where an adapter has another rank than its config, or other sizes than its base."""
        for name in sorted(self.adapted):
            place, _, shared = self.of_experts.get(name, (name.removesuffix(".weight"), 0, 1))
            shape, count = self.base.shape(name), self.config.num_experts if name in self.of_experts else 1
            out, inner = shape[-2:] if len(shape) == 2 else shape[:0:-1]
            needed = (count * rank, inner), (out * max(shared, 1), count * rank)
            found = tuple(
                tuple(file.get_slice(key).get_shape())
                for file, key in (self.stored[f"{place}.lora_{x}.weight"] for x in "AB")
            )
            if found != needed:
                raise ValueError(
                    f"{self.path}: {place} has matrices of shapes {found[0]} and {found[1]}, but r={rank} on "
                    f"{self.base.path} needs {needed[0]} and {needed[1]}; give the config and the base of its training"
                )

    def names(self) -> set[str]:
        return self.base.names() | self.saved | set(self.absent)

    def shape(self, name: str) -> tuple[int, ...]:
        if name in self.saved or name in self.absent:
            return tuple(self.read(name).shape)
        return self.base.shape(name)

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """The merged tensor, or these rows of it."""
        if name in self.saved:
            return self.tensor(name)
        if name in self.absent:
            return self.absent[name]
        weight = self.base.read(name, rows)
        if name not in self.adapted:
            return weight
        delta = self.delta(name)
        return weight.float() + (delta if rows is None else delta[rows])

    def delta(self, name: str) -> Tensor:
        """scale B A, in the shape of the weight."""
        place, *where = self.of_experts.get(name, (name.removesuffix(".weight"),))
        A, B = (self.tensor(f"{place}.lora_{x}.weight").float() for x in "AB")
        if where:
            A, B = expert_factors(A, B, *where, count=self.config.num_experts)
        rank = A.shape[-2]
        scale = self.alpha / (math.sqrt(rank) if self.root else rank)  # rsLoRA: arXiv:2312.03732; A (rank, in)
        delta = scale * B @ A
        return delta if delta.ndim == 2 else delta.transpose(1, 2)  # GPT-OSS: (E, in, out)

    def tensor(self, name: str) -> Tensor:
        file, key = self.stored[name]
        return file.get_tensor(key)


def is_stack(place: str) -> bool:
    """Whether peft has the adapter at `place` on a stacked parameter of all experts (target_parameters)."""
    return place.endswith((".experts", ".experts.base_layer"))


def of_stacks(places: set[str], raw: dict, config: ModelConfig, directory: Path) -> dict[str, tuple[str, int, int]]:
    """weight of the base -> (place of its adapter on stacked experts, its number in the stack, matrices per expert).

    peft wraps a module once for each parameter, and names no parameter: of two, gate_up_proj is the inner one.

    Raises:
        ValueError: target_parameters does not say which parameters the adapters are on.
    """
    found: dict[str, tuple[str, int, int]] = {}
    for experts in {place.removesuffix(".base_layer") for place in places if is_stack(place)}:
        kinds = {"gate_up_proj": "gate_up", "down_proj": "down"}
        targets = tuple(f".{target}" for target in raw.get("target_parameters") or ())
        named = [kind for kind in kinds if f".{experts}.{kind}".endswith(targets)]
        wrapped = [place for place in (f"{experts}.base_layer", experts) if place in places]
        if len(named) != len(wrapped) or not config.num_experts:
            raise ValueError(
                f"{directory} has {len(wrapped)} adapters on {experts}, but target_parameters names {named} of it; "
                "write target_parameters as peft saved it"
            )
        layer = experts.split(".")[2]
        for place, kind in zip(wrapped, named, strict=True):
            parts = parts_of(f"transformer.layers.{layer}.mlp.{kinds[kind]}.weight", config)
            shared = 0 if config.facts.expert_bias else len(parts) // config.num_experts  # GPT-OSS: one tensor
            found |= {part: (place, number, shared) for number, part in enumerate(parts)}
    return found


def expert_factors(A: Tensor, B: Tensor, number: int, shared: int, *, count: int) -> tuple[Tensor, Tensor]:
    """A (rank, in) and B (out, rank) of matrix `number` of the stack; (E, rank, in) and (E, out, rank) with shared=0.

    A: (E x rank, in). B: (out, rank x E). An expert has `shared` matrices, which share its A. 0: the base has all
    experts in one tensor.
    """
    A, B = A.unflatten(0, (count, -1)), B.unflatten(1, (-1, count)).permute(2, 0, 1)
    if not shared:
        return A, B
    expert, part = divmod(number, shared)
    return A[expert], B[expert].chunk(shared)[part]


def check_adapter(raw: dict, directory: Path) -> None:
    """Raise ValueError, naming the key, where the adapter is not plain LoRA."""
    if raw.get("peft_type") != "LORA" or raw.get("task_type") not in KINDS:
        got = f"peft_type={raw.get('peft_type')!r}, task_type={raw.get('task_type')!r}"
        raise ValueError(f"{directory}: {got} in adapter_config.json; only LORA for {', '.join(filter(None, KINDS))}")
    if not isinstance(raw.get("lora_alpha"), int | float) or not isinstance(raw.get("r"), int):
        raise ValueError(f"{directory}/adapter_config.json needs the numbers r and lora_alpha")
    for key, value in raw.items():
        head = key == "modules_to_save" and value == ["score"]
        neutral = not value or value == NEUTRAL_KEYS.get(key) or (key == "init_lora_weights" and value == "gaussian")
        if key not in CHANGES_NOTHING and not head and not neutral:
            raise ValueError(
                f"{directory}: {key}={value!r} in adapter_config.json is more than LoRA; "
                "merge the adapter with peft's merge_and_unload and pass the merged model"
            )


def open_files(directory: Path) -> dict:
    """name -> (open file, key) of the adapter's tensors, and of a head's bias and normalisation."""
    if not (directory / "adapter_model.safetensors").exists():
        pickled = "; it holds a pickle (.bin), which can run code: have peft save it as safetensors"
        raise ValueError(
            f"{directory} lacks adapter_model.safetensors{pickled if list(directory.glob('*.bin')) else ''}"
        )
    stored: dict[str, tuple] = {}
    for path in (directory / "adapter_model.safetensors", directory / "head.safetensors"):
        if path.exists():
            file = open_safetensors(path)
            stored |= {key.removeprefix(PREFIX): (file, key) for key in file.keys()}  # noqa: SIM118 - no dictionary
    return stored


def find_tokenizer(path: str | Path) -> Path:
    """The directory of the tokenizer for the model at `path`. An adapter without one uses its base's."""
    found = find_model(path)
    has_own = any(
        (found / name).exists() for name in ("tokenizer.json", "tokenizer.model", "vocab.json", "tekken.json")
    )
    return find_base(found) if found.is_dir() and not has_own and is_adapter(found) else found


def find_base(directory: Path) -> Path:
    """The path of the model that the adapter in this directory was trained on. Raises ValueError if it is missing."""
    base = read_json(directory / "adapter_config.json").get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise ValueError(f"{directory}/adapter_config.json needs base_model_name_or_path, the path of the base model")
    try:
        return find_model(base)
    except ValueError as error:
        raise ValueError(
            f"{directory} is an adapter to {base}, which is needed too: {error}. If the base is in another directory, "
            "set base_model_name_or_path in adapter_config.json to it"
        ) from None
