"""The tensors of our adapters as `peft` names and lays them out."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from model.config import ModelConfig
from model.weights.names import parts_of, shape_of
from runtime.distributed import whole


def peft_tensors(adapters: Mapping[str, Any], config: ModelConfig) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(name in the file -> tensor, the keys of adapter_config.json that say what is adapted).

    adapters: name of our layer -> its Lora. All ranks must call this.

    With experts, all matrices of MLPs are parameters for peft (target_parameters): a module called gate_proj would be
    one of an expert in older files, and peft ignores the adapters on other modules of that name.
    """
    weights: dict[str, Tensor] = {}
    modules, parameters = set(), set()
    for name, lora in adapters.items():
        A, B = (whole(x).detach().cpu() for x in (lora.A, lora.B))
        if lora.on_experts:
            place, parameter = place_of_experts(name, adapters)
            weights |= named(place, A, B.unflatten(0, (lora.count, -1)).permute(1, 2, 0).flatten(1))
            parameters.add(parameter)
            continue
        parts = [part.removesuffix(".weight") for part in parts_of(name + ".weight", config)]
        pieces = B.split([shape_of(part + ".weight", config)[0] for part in parts])
        for part, piece in zip(parts, pieces, strict=True):
            weights |= named(part, A, piece)
            _, inside, matrix = part.partition(".mlp.")
            if config.num_experts and inside:
                parameters.add(f"mlp.{matrix}.weight")
            else:
                modules.add(part.rpartition(".")[2])
    return weights, {"target_modules": sorted(modules), "target_parameters": sorted(parameters) or None}


def named(place: str, A: Tensor, B: Tensor) -> dict[str, Tensor]:
    """The two matrices of the adapter on a module of transformers, by their names in the file."""
    pair = {"A": A.clone(), "B": B.contiguous()}
    return {f"base_model.model.{place}.lora_{side}.weight": tensor for side, tensor in pair.items()}


def place_of_experts(name: str, adapters: Mapping[str, Any]) -> tuple[str, str]:
    """(module in transformers, its parameter with all experts' matrices) of our Stack `name`.

    peft has one adapter on all experts, A (E x rank, in) and B (out, rank x E), and wraps the module once for each
    parameter: first for gate_up_proj, then for down_proj.
    """
    place, _, kind = name.removeprefix("transformer").rpartition(".")
    inner = ".base_layer" if kind == "gate_up" and f"transformer{place}.down" in adapters else ""
    return f"model{place}.experts{inner}", f"mlp.experts.{kind}_proj"
