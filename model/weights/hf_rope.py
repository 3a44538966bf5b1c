"""How far positions turn, in the several spellings of config.json."""

from model.config import ROPE_KEYS, ROPE_OPTIONS
from model.families import Family

ROPE_CHANGES_NOTHING = {"rope_type", "type", "rope_theta", "partial_rotary_factor", "finetuned"}
OF_PICTURES = {"mrope_section", "mrope_interleaved"}  # where text alone has one position, all its sections turn alike


def read_rope(
    left: dict, facts: Family, family: str, max_length: int
) -> tuple[float, dict | None, float | None, float]:
    """rope_theta, its scaling, the windowed layers' own base, and the share of a head that turns.

    As transformers 5 reads them: rope_scaling goes before rope_parameters, `original_max_position_embeddings` beside
    them before the one inside.
    """
    new, old = left.pop("rope_parameters", None) or {}, left.pop("rope_scaling", None) or {}
    outer = {key: left.pop(key) for key in ("rope_theta", "partial_rotary_factor") if key in left}
    original = left.pop("original_max_position_embeddings", None)
    rope, window_theta = dict(old or new), None
    if family == "gpt_oss" and not rope:
        raise ValueError("neither rope_scaling nor rope_parameters: transformers would take YaRN; say which")
    if facts.window_theta is not None:
        nested = isinstance(new.get("full_attention"), dict) or isinstance(new.get("sliding_attention"), dict)
        if "type" in old and "rope_type" not in old:
            raise ValueError(f"rope_scaling.type={old['type']!r} is ignored by transformers; write rope_type")
        if new and not nested:
            raise ValueError(f"rope_parameters={new} must be by kind of layer: full_attention, sliding_attention")
        local = dict(new.get("sliding_attention") or {}) if nested else {}
        rope = ((new.get("full_attention") or {}) if nested else {}) | old
        older = left.pop("rope_local_base_freq", None) if family == "gemma3_text" else None
        window_theta = float(local.pop("rope_theta", older or facts.window_theta))
        if local.pop("rope_type", local.pop("type", "default")) != "default" or any(
            v is not None for v in local.values()
        ):
            raise ValueError(f"rope_parameters of sliding_attention, {new['sliding_attention']}, must be unscaled")
    theta = rope.get("rope_theta") or outer.get("rope_theta", facts.theta)
    if isinstance(theta, bool) or not isinstance(theta, int | float):
        raise ValueError(f"rope_theta={theta!r} must be a number above 0")
    theta = float(theta)
    share = rope.get("partial_rotary_factor", outer.get("partial_rotary_factor"))
    share = facts.share if share is None else float(share)
    if not facts.partial_rotary and share != 1.0:
        raise ValueError(f"partial_rotary_factor={share} is not computed for family={family}, only 1")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if family == "phi3" and kind in ("su", "yarn"):
        kind = "longrope"  # earlier names of it
    if family == "phi3" and kind not in ("default", "longrope"):
        raise ValueError(f"rope_type {kind!r} is not one of a phi3 model, which has default and longrope")
    known = ROPE_KEYS.get(kind, set()) | ROPE_OPTIONS.get(kind, set())
    idle = ROPE_CHANGES_NOTHING | (OF_PICTURES if family.startswith("qwen3_5") else set())
    inside = {key: value for key, value in rope.items() if key not in idle and value is not None}
    if kind != "default" and kind not in ROPE_KEYS:
        raise ValueError(f"unknown rope_type {kind!r} in rope_scaling; known: {', '.join(ROPE_KEYS)}, or null for none")
    if unknown := inside.keys() - known - {"original_max_position_embeddings"}:
        raise ValueError(
            f"rope_scaling of type {kind} holds {', '.join(sorted(unknown))}, which this code does not know"
        )
    if kind == "default":
        return theta, None, window_theta, share
    if "original_max_position_embeddings" in known:
        default = 4096 if family == "phi3" else inside.get("original_max_position_embeddings") or max_length
        inside["original_max_position_embeddings"] = original or default
    if kind == "longrope":
        inside.setdefault("factor", max_length / inside["original_max_position_embeddings"])
    return theta, {"rope_type": kind} | inside, window_theta, share
