"""The one rule of what is drawn from: a run's seed and where the draw stands, mixed into 63 bits."""

import hashlib

LARGEST = 2**32 - 1  # NumPy's own limit: above it, seeds would have to be folded and two would mean the same


def seed_of(seed: int, *place: int | str) -> int:
    """A number in [0, 2**63) that depends on every part: seed_of(cfg.seed, "rollout", step, row)."""
    place_of_draw = repr((seed, *place)).encode()
    return int.from_bytes(hashlib.blake2b(place_of_draw, digest_size=8).digest(), "big") >> 1
