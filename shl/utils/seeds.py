"""Random seeds as a function of (seed, round, stage, item), so that a resumed run repeats them."""

import hashlib

import torch


def seed_for(seed: int, *parts: int | str) -> int:
    """A 63-bit seed that depends on all parts, for `torch.Generator` or numpy.

    Example:
        >>> seed_for(42, "dream", 0) == seed_for(42, "dream", 0)
        True
        >>> seed_for(42, "dream", 0) == seed_for(42, "dream", 1)
        False
    """
    digest = hashlib.blake2b(repr((seed, *parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def generator_for(seed: int, *parts: int | str) -> torch.Generator:
    """A CPU generator seeded by `seed_for`."""
    return torch.Generator().manual_seed(seed_for(seed, *parts))
