"""Convolution that merges input channels at run time: those similar on a tile share the sum of their kernels.

On each tile of the output plane the channels of the input window are hashed. The signs of their products with a few
sparse random hyperplanes are the code, and channels with the same code fall into one bucket. With x_c the channels and
W_c their kernels, sum_c W_c * x_c becomes sum_b (sum of W_c over b) * (mean of x_c over b). This is exact where the
members of a bucket are equal, and close where they are similar.

Idea: Meiner, Mehnert, Condurache 2023, arXiv 2309.17211. No code and no full text were at hand: tiles without overlap
in the output, halo and centring are reconstructed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prune_lab.pruning.dynamic.merging_cost import Operations, Tally, count_operations

Pair = tuple[int, int]

MAX_HYPERPLANES = 62
"""bits of a code, which is a signed 64-bit integer"""
_WINDOW_VALUES = 2**22
"""approximate limit of values in all windows at once; batches are split to stay below it (one image may exceed it)"""
_KERNEL_VALUES = 2**20
"""values of merged kernels and columns at once; larger chunks were no faster on a CPU"""


def draw_hyperplanes(num: int, window: Pair, *, zero_fraction: float, seed: int) -> Tensor:
    """Return `num` sparse random hyperplanes, int8 [num, height, width].

    Entries are independent: 0 with probability `zero_fraction`, +1 and -1 with half of the rest each.
    """
    source = torch.Generator("cpu").manual_seed(seed)  # the same draws for every device
    draws = torch.rand(num, *window, generator=source, dtype=torch.float64, device="cpu")
    signs = torch.where(draws < (1 + zero_fraction) / 2, 1, -1)
    return torch.where(draws < zero_fraction, 0, signs).to(torch.int8)


def hash_codes(windows: Tensor, hyperplanes: Tensor) -> Tensor:
    """Return the code of every channel, int64 [tiles, channels]: bit i is the side of hyperplane i.

    Channels are centred. A product of zero gives bit 0, so constant channels have code 0.

    Args:
        windows: [tiles, channels, height, width].
        hyperplanes: [num, height, width], num <= 62.
    """
    flat, planes = windows.flatten(2), hyperplanes.flatten(1).to(windows.dtype)
    # The product of a centred channel with a hyperplane is that of any shifted one with the centred hyperplane: exactly
    # zero, regardless of rounding, if one of the two is constant.
    shifted = flat - flat[..., :1]
    bits = shifted @ (planes - planes.mean(dim=1, keepdim=True)).t() > 0
    return (bits.long() << torch.arange(len(hyperplanes), device=bits.device)).sum(dim=-1)


@dataclass(frozen=True)
class Buckets:
    """Channels of every tile, bucket after bucket."""

    order: Tensor
    """int64 [tiles, channels]: channels in ascending order of code, then of index"""
    first: Tensor
    """bool [tiles, channels]: whether the channel at that position of `order` is the first of its bucket"""
    count: Tensor
    """int64 [tiles]: number of buckets"""


def find_buckets(codes: Tensor) -> Buckets:
    """Return which channels share a code; codes are int64 [tiles, channels]."""
    codes, order = codes.sort(dim=1, stable=True)
    first = torch.ones_like(codes, dtype=torch.bool)
    first[:, 1:] = codes[:, 1:] != codes[:, :-1]
    return Buckets(order, first, first.sum(dim=1))


@dataclass(frozen=True)
class Geometry:
    """Height and width of kernel, stride and dilation."""

    kernel: Pair
    stride: Pair
    dilation: Pair

    def window(self, tile: Pair) -> Pair:
        """Return height and width of the input window, halo included, of a tile of output positions."""
        sizes = zip(tile, self.kernel, self.stride, self.dilation, strict=True)
        height, width = ((length - 1) * stride + dilation * (kernel - 1) + 1
                         for length, kernel, stride, dilation in sizes)
        return height, width

    def columns(self, windows: Tensor) -> Tensor:
        """Return the kernel's input at each position: [n, c * kernel values, positions] of [n, c, height, width]."""
        views = windows
        for axis in (0, 1):
            reach = self.dilation[axis] * (self.kernel[axis] - 1) + 1
            views = views.unfold(2 + axis, reach, self.stride[axis])[..., :: self.dilation[axis]]
        n, c, rows, cols = views.shape[:4]
        return views.permute(0, 1, 4, 5, 2, 3).reshape(n, c * prod(self.kernel), rows * cols)


def merged_convolution(
    windows: Tensor, kernels: Tensor, order: Tensor, first: Tensor, geometry: Geometry
) -> Tensor:
    """Return the convolution of each tile's merged channels, [n, outputs, positions], without bias.

    Args:
        windows: [n, channels, height, width], not centred.
        kernels: [channels, kernel values * outputs].
        order, first: [n, channels] as in `Buckets`; every tile has the same number of buckets.
    """
    n, channels, *window = windows.shape
    begins = first.flatten().nonzero().flatten()
    buckets, values = len(begins) // n, prod(geometry.kernel)
    rows = order + channels * torch.arange(n, device=order.device)[:, None]
    # embedding_bag sums rows of a table per bag: all tiles in one call, without copies of the kernels.
    means = F.embedding_bag(rows.flatten(), windows.reshape(n * channels, -1), begins, mode="mean")
    sums = F.embedding_bag(order.flatten(), kernels, begins, mode="sum")
    columns = geometry.columns(means.view(n, buckets, *window))
    return torch.bmm(sums.view(n, buckets * values, -1).transpose(1, 2), columns)


def tile_spans(size: int, tile: int) -> Iterator[tuple[int, int, int]]:
    """Yield (start, length, number) of the equal tiles along one side of a map; a smaller one may remain at the end."""
    tile = min(tile, size)
    whole, rest = divmod(size, tile)
    yield 0, tile, whole
    if rest:
        yield whole * tile, rest, 1


def _pair(values: tuple[int, ...]) -> Pair:
    height, width = values
    return height, width


class HashedConv2d(nn.Conv2d):
    """A convolution for inference that merges similar input channels tile by tile; the weights do not change."""

    export_refusal = (
        "the number of merged channels depends on the image, so that a static graph cannot hold a HashedConv2d"
    )

    hyperplanes: Tensor

    def __init__(
        self, *args: Any, num_hyperplanes: int, zero_fraction: float = 2 / 3, tile: int = 8, seed: int = 0,
        **kwargs: Any,
    ) -> None:
        """Options of nn.Conv2d, and those of merging.

        Args:
            num_hyperplanes: bits of a code, 0 to 62; more bits merge less.
            zero_fraction: probability of a zero in a hyperplane, in [0, 1).
            tile: side of the square tiles of the output plane; at the border, and on small maps, they are cut.
            seed: of the hyperplanes.

        Raises:
            ValueError: a value out of range, or groups other than 1.
        """
        super().__init__(*args, **kwargs)
        if self.groups != 1:
            raise ValueError(f"groups must be 1 to merge input channels, got {self.groups}")
        if not 0 <= num_hyperplanes <= MAX_HYPERPLANES:
            raise ValueError(f"num_hyperplanes must lie in [0, {MAX_HYPERPLANES}], got {num_hyperplanes}")
        if not 0 <= zero_fraction < 1:
            raise ValueError(f"zero_fraction must lie in [0, 1), got {zero_fraction}")
        if tile < 1:
            raise ValueError(f"tile must be at least 1, got {tile}")
        self.zero_fraction, self.tile = zero_fraction, tile
        self.geometry = Geometry(_pair(self.kernel_size), _pair(self.stride), _pair(self.dilation))
        window = self.geometry.window((tile, tile))
        drawn = draw_hyperplanes(num_hyperplanes, window, zero_fraction=zero_fraction, seed=seed)
        self.register_buffer("hyperplanes", drawn.to(self.weight.device))
        self.tally = Tally()
        self.merges = True
        """False: computes the plain convolution, for comparison"""

    @classmethod
    def of(cls, conv: nn.Conv2d, **options: Any) -> HashedConv2d:
        """Return a replacement of `conv`, in its mode and with the same parameter objects; `options` as above.

        Raises:
            TypeError: not an nn.Conv2d itself; the behaviour of a derived class would be lost.
            ValueError: see above.
        """
        if type(conv) is not nn.Conv2d:
            raise TypeError(f"only an nn.Conv2d can be hashed, not a {type(conv).__name__}")
        shape = ("stride", "padding", "dilation", "groups", "padding_mode")
        with torch.device(conv.weight.device):
            made = cls(conv.in_channels, conv.out_channels, conv.kernel_size, bias=conv.bias is not None,
                       **{name: getattr(conv, name) for name in shape}, **options)
        made.weight, made.bias = conv.weight, conv.bias
        return made.train(conv.training)

    @property
    def num_hyperplanes(self) -> int:
        return len(self.hyperplanes)

    def options(self) -> dict[str, Any]:
        """Return the arguments of `of`, besides the tensors, that rebuild the module."""
        return {"num_hyperplanes": self.num_hyperplanes, "zero_fraction": self.zero_fraction, "tile": self.tile}

    def redraw(self, seed: int) -> None:
        """Draw other hyperplanes."""
        height, width = self.hyperplanes.shape[1:]
        drawn = draw_hyperplanes(
            self.num_hyperplanes, (height, width), zero_fraction=self.zero_fraction, seed=seed
        )
        self.hyperplanes.copy_(drawn)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, " + ", ".join(f"{key}={value:g}" for key, value in self.options().items())

    def operations(self) -> Operations:
        """Return the operations of all images since `tally` was last reset."""
        return count_operations(
            self.tally, channels=self.in_channels, outputs=self.out_channels, kernel=_pair(self.kernel_size),
            num_hyperplanes=self.num_hyperplanes, zero_fraction=self.zero_fraction,
        )  # fmt: skip

    def forward(self, images: Tensor) -> Tensor:
        """Return [n, outputs, height, width] of [n, channels, height, width], or the same without n.

        Raises:
            RuntimeError: in training mode; buckets have no gradient.
        """
        if self.training:
            raise RuntimeError("a HashedConv2d is for inference only: call eval() first (train the plain network)")
        if not self.merges or images.is_meta or images.numel() == 0:  # no values to hash
            return super().forward(images)
        if images.dim() == 3:
            return self.forward(images[None])[0]
        mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
        padded = F.pad(images, self._reversed_padding_repeated_twice, mode=mode)
        # [channels, kernel values * outputs], so that one row holds all values of a channel
        kernels = self.weight.permute(1, 2, 3, 0).reshape(self.in_channels, -1)
        overlap = prod(self.geometry.window((self.tile, self.tile))) / (self.tile**2 * prod(self.stride))
        per_chunk = max(1, int(_WINDOW_VALUES / (overlap * padded[0].numel())))
        output = torch.cat([self._merged(chunk, kernels) for chunk in padded.split(per_chunk)])
        return output if self.bias is None else output + self.bias[:, None, None]

    def _merged(self, padded: Tensor, kernels: Tensor) -> Tensor:
        """Return the output of padded images, without bias."""
        reach = self.geometry.window((1, 1))
        height, width = ((size - need) // stride + 1
                         for size, need, stride in zip(padded.shape[2:], reach, self.stride, strict=True))
        output = padded.new_empty(len(padded), self.out_channels, height, width)
        for top, rows, num_down in tile_spans(height, self.tile):
            for left, cols, num_right in tile_spans(width, self.tile):
                windows = self._windows(padded, (top, left), (rows, cols), (num_down, num_right))
                tiles = self._tiles(windows, kernels, rows * cols)
                tiles = tiles.view(len(padded), num_down, num_right, self.out_channels, rows, cols)
                place = output[:, :, top : top + num_down * rows, left : left + num_right * cols]
                place.copy_(tiles.permute(0, 3, 1, 4, 2, 5).reshape(place.shape))
        return output

    def _windows(self, padded: Tensor, start: Pair, tile: Pair, number: Pair) -> Tensor:
        """Return the input windows of equal tiles, [n * tiles, channels, height, width], row by row of tiles."""
        views, window = padded, self.geometry.window(tile)
        for axis in (0, 1):
            first, step = start[axis] * self.stride[axis], tile[axis] * self.stride[axis]
            length = (number[axis] - 1) * step + window[axis]
            views = views.narrow(2 + axis, first, length).unfold(2 + axis, window[axis], step)
        return views.permute(0, 2, 3, 1, 4, 5).reshape(-1, self.in_channels, *window)

    def _tiles(self, windows: Tensor, kernels: Tensor, positions: int) -> Tensor:
        """Return the output of each tile, [tiles, outputs, positions], and count its operations.

        Tiles with equally many buckets are convolved together, so that none needs padding with zeros.
        """
        num, channels, height, width = windows.shape
        hashed = height * width > 1  # a single centred value is zero in every channel: all are equal
        if hashed:
            codes = hash_codes(windows, self.hyperplanes[:, :height, :width])
        else:
            codes = torch.arange(channels, device=windows.device).expand(num, -1)
        buckets = find_buckets(codes)
        output = windows.new_empty(num, self.out_channels, positions)
        for count in buckets.count.unique().tolist():
            equal = (buckets.count == count).nonzero().flatten()
            self._count(len(equal), count, positions, height * width if hashed else 0)
            per_tile = count * prod(self.kernel_size) * (self.out_channels + positions)
            for chosen in equal.split(max(1, _KERNEL_VALUES // per_tile)):
                output[chosen] = merged_convolution(
                    windows[chosen], kernels, buckets.order[chosen], buckets.first[chosen], self.geometry
                ).to(output.dtype)
        return output

    def _count(self, tiles: int, buckets: int, positions: int, values: int) -> None:
        self.tally += Tally(
            tiles=tiles,
            values=tiles * values,
            positions=tiles * positions,
            buckets=tiles * buckets,
            bucket_positions=tiles * buckets * positions,
        )


def hashed_layers(model: nn.Module) -> dict[str, HashedConv2d]:
    """Return the hashed convolutions of a network by path; a module under several paths is listed once."""
    return {path: module for path, module in model.named_modules() if isinstance(module, HashedConv2d)}


@contextmanager
def plain(model: nn.Module) -> Iterator[None]:
    """Make the network's hashed convolutions work as plain ones inside a `with` block."""
    layers = hashed_layers(model).values()
    before = [layer.merges for layer in layers]
    try:
        for layer in layers:
            layer.merges = False
        yield
    finally:
        for layer, merges in zip(layers, before, strict=True):
            layer.merges = merges
