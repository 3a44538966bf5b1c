"""The row and the manifest that every method writes."""

from collections import Counter
from dataclasses import asdict, dataclass, field

from data.clients import Client, hash_json


@dataclass
class Made:
    """What a method returns: rows of our records, and what was dropped on the way, by reason."""

    rows: list[dict]
    drops: Counter = field(default_factory=Counter)
    facts: dict = field(default_factory=dict)  # what else belongs into the manifest


def provenance(method: str, prompts: list, model: str | list[str], seed: int, parents: list[str]) -> dict:
    """Where a row comes from. `prompts_hash`: sha256 of the messages that were asked; `parents`: ids it builds on."""
    return {"method": method, "prompts_hash": hash_json(prompts), "model": model, "seed": seed, "parents": parents}


def row_id(method: str, content) -> str:
    """The same content has the same id in every run."""
    return f"{method}/{hash_json(content)[:16]}"


def manifest(method: str, made: Made, clients: dict[str, Client], settings: dict, *, seed: int, licence: str) -> dict:
    """What the trainers and the judge read: how many rows, from which models, at what cost, under which licence."""
    return {
        "method": method,
        "rows": len(made.rows),
        "seed": seed,
        "models": {role: client.model for role, client in clients.items()},
        "license": licence,
        "drops": dict(sorted(made.drops.items())),
        "dropped": sum(made.drops.values()),
        **made.facts,
        "usage": {role: asdict(client.usage) for role, client in clients.items()},
        "cost": sum(client.usage.cost for client in clients.values()),
        "settings": settings,
    }
