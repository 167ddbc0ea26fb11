"""Keyed randomness: every draw names what it is for, so there is no generator state to save or restore.

A generator is made from the run's seed and a few keys ("augment", epoch, batch). The same keys give the same numbers
in every process, on every platform and after a resume, and two different keys give independent streams.
"""

from __future__ import annotations

import hashlib
import random
import sys

from prune_lab.foundations.lazy import torch

HASH_BITS = 63  # torch and numpy take non-negative seeds that fit a signed 64-bit integer


def stable_hash(*keys: object) -> int:
    """Return a 63-bit integer from the keys' `repr`; unlike `hash`, it is the same in every process.

    Keys should be strings, integers, floats, booleans, None or tuples of them: their `repr` is stable.
    """
    digest = hashlib.sha256(repr(keys).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> (64 - HASH_BITS)


def generator(seed: int, *keys: object, device: torch.device | str = "cpu") -> torch.Generator:
    """Return a fresh torch generator on `device` whose stream depends on `seed` and `keys` only."""
    return torch.Generator(device=device).manual_seed(stable_hash(seed, *keys))


def seed_device(device: torch.device, *keys: object) -> None:
    """Seed torch's own generators for work on `device`, which dropout draws from.

    `torch.manual_seed` does more: it also seeds devices that are not in use, which takes a millisecond on a CPU.
    """
    value = stable_hash(*keys)
    torch.default_generator.manual_seed(value)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(value)
    elif device.type == "mps":
        torch.mps.manual_seed(value)


def seed_everything(seed: int, *keys: object) -> None:
    """Seed the global generators of Python, torch (all devices) and, where it is imported, numpy."""
    value = stable_hash(seed, *keys)
    random.seed(value)
    torch.manual_seed(value)
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        numpy.random.seed(value % 2**32)  # numpy's legacy generator takes 32 bits
