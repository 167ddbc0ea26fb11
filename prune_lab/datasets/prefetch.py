"""Batches on the training device; on a GPU they are copied while the previous step is computed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

Batch = tuple[Tensor, ...]


def on_device(batches: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    """Yield `batches` in order with their tensors on `device`.

    With CUDA one batch is fetched and copied ahead on a separate stream. The copy overlaps with computation if the
    tensors are in pinned memory.
    """
    if device.type != "cuda":
        for batch in batches:
            yield tuple(tensor.to(device) for tensor in batch)
        return
    stream = torch.cuda.Stream(device)
    ahead = None
    for batch in batches:
        with torch.cuda.stream(stream):
            copied = tuple(tensor.to(device, non_blocking=True) for tensor in batch)
            arrived = stream.record_event()
        if ahead is not None:
            yield _ready(*ahead)
        ahead = copied, arrived
    if ahead is not None:
        yield _ready(*ahead)


def _ready(batch: Batch, arrived: torch.cuda.Event) -> Batch:
    """Make the current stream wait for `batch` and keep its memory until that stream has used it; return it."""
    current = torch.cuda.current_stream(batch[0].device)
    current.wait_event(arrived)
    for tensor in batch:
        tensor.record_stream(current)
    return batch
