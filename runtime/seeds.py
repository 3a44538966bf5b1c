"""Seeds of random draws: the run's seed and the place of the draw, hashed to 63 bits."""

import hashlib

LARGEST = 2**32 - 1  # NumPy's limit; larger seeds would have to be folded, and two seeds could be equivalent


def seed_of(seed: int, *place: int | str) -> int:
    """A number in [0, 2**63) that depends on every part: seed_of(cfg.seed, "rollout", step, row)."""
    place_of_draw = repr((seed, *place)).encode()
    return int.from_bytes(hashlib.blake2b(place_of_draw, digest_size=8).digest(), "big") >> 1
