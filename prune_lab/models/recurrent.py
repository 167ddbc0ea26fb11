"""Recurrent language models: embedding, GRU or LSTM, readout, and the embedding once more as output matrix."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from prune_lab.models.configs import RecurrentConfig

_KINDS = {"gru_lm": nn.GRU, "lstm_lm": nn.LSTM}


class RecurrentLM(nn.Module):
    """Maps symbols [rows, time] and a state to logits [rows, time, symbols] and the state after them.

    `model.tied`: the output matrix is the embedding, so the last readout has its width.
    """

    def __init__(self, config: RecurrentConfig, num_symbols: int) -> None:
        super().__init__()
        embedding, hidden, *readout = (
            round(config.width * size) for size in (config.embedding, config.hidden, *config.readout)
        )
        self.embedding = nn.Embedding(num_symbols, embedding)
        self.rnn = _KINDS[config.name](embedding, hidden, config.layers, batch_first=True, dropout=_between(config))
        sizes = [hidden, *readout]
        self.readout = nn.ModuleList(nn.Linear(*pair) for pair in zip(sizes, sizes[1:], strict=False))
        self.dropout = nn.Dropout(config.dropout)
        self.decoder = None if config.tied else nn.Linear(sizes[-1], num_symbols)
        self.bias = nn.Parameter(torch.zeros(num_symbols)) if config.tied else None
        nn.init.uniform_(self.embedding.weight, -0.1, 0.1)

    def forward(self, symbols: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        values, state = self.rnn(self.dropout(self.embedding(symbols)), state)
        values = self.dropout(values)
        for index, layer in enumerate(self.readout):
            values = layer(values if index == 0 else values.relu())
        if self.decoder is None:
            return nn.functional.linear(values, self.embedding.weight, self.bias), state
        return self.decoder(values), state

    @staticmethod
    def example_input(device: str) -> Tensor:
        """Return one symbol: costs are per symbol."""
        return torch.zeros(1, 1, dtype=torch.int64, device=device)


def _between(config: RecurrentConfig) -> float:
    return config.dropout if config.layers > 1 else 0.0


def build(config: RecurrentConfig, *, num_classes: int, image_size: int) -> nn.Module:
    """Return the network of `config` for `num_classes` symbols."""
    return RecurrentLM(config, num_classes)
