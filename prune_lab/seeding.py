"""Random draws by name: every generator is keyed, so nothing has to be saved and all processes draw alike."""

from __future__ import annotations

import hashlib
import random
import sys

import torch


def stable_hash(*keys: object) -> int:
    """Return 63 bits that depend on the printed form of `keys` only; Python's own hash is salted per process."""
    digest = hashlib.sha256(repr(keys).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def generator(seed: int, *keys: object, device: torch.device | str = "cpu") -> torch.Generator:
    """Return a fresh generator for the draw that `keys` name, for example ("order", epoch)."""
    return torch.Generator(device=device).manual_seed(stable_hash(seed, *keys))


def seed_everything(seed: int, *keys: object) -> None:
    """Set the global generators of Python, NumPy (if it is loaded) and torch."""
    value = stable_hash(seed, *keys)
    random.seed(value)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(value % 2**32)
    torch.manual_seed(value)
