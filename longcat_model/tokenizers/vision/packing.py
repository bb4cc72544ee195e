"""Images of any size as one packed run of patches that attend only within their image, or window of it.

Patch order is that of Qwen2.5-VL: positions of an image row by row, and the `merge` x `merge` patches of a position
together, so that every `merge`^2 rows of the run are one position.

Dimension key
    I images    T patches of all images    N segments of one length    S patches of a segment
    P numbers of a patch    H heads    C head channels
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


@dataclass(frozen=True)
class Segments:
    """A partition of the packed patches into runs that attend within themselves, grouped by length.

    Example: patches of segments ``0 0 1 2 2`` give ``order [2, 0, 1, 3, 4]`` and ``shapes ((1, 1), (2, 2))``: one
    segment of one patch, then two of two.
    """

    order: Tensor | None  # [T] packed rows, shorter segments first; None: they lie so already
    inverse: Tensor | None  # [T] undoes `order`
    shapes: tuple[tuple[int, int], ...]  # (segments, patches of each), ascending in the second

    @classmethod
    def of(cls, segment_T: Tensor) -> Segments:
        """Groups patches by segment id, int64 [T]."""
        _, dense_T, counts_N = torch.unique(segment_T, return_inverse=True, return_counts=True)
        order_T = torch.argsort(counts_N[dense_T] * counts_N.numel() + dense_T, stable=True)
        lengths, numbers = torch.unique(counts_N, return_counts=True)
        shapes = tuple(zip(numbers.tolist(), lengths.tolist(), strict=True))
        if torch.equal(order_T, torch.arange(len(order_T), device=order_T.device)):
            return cls(None, None, shapes)
        return cls(order_T, torch.argsort(order_T), shapes)


@dataclass(frozen=True)
class Layout:
    """Where the packed patches lie: everything about a batch of images that is not pixels."""

    grids: tuple[tuple[int, int], ...]  # (rows, columns) of positions of each image
    merge: int  # patches a side of a position
    image: Tensor  # [T] int64 number of the image
    row: Tensor  # [T] int64 row of the patch in its image
    column: Tensor  # [T] int64

    @classmethod
    def of(cls, grids: Sequence[tuple[int, int]], merge: int, device: torch.device | None = None) -> Layout:
        """Lays out images of `grids` positions.

        Raises:
            ValueError: no image, or one without positions.
        """
        if not grids or any(h < 1 or w < 1 for h, w in grids):
            raise ValueError(f"Layout: grids must be non-empty and hold at least 1 x 1 positions, got {list(grids)}")
        local = {grid: _patch_coordinates(*grid, merge) for grid in set(grids)}
        row_T, column_T = torch.cat([local[grid] for grid in grids], dim=1).unbind()
        patches_I = torch.tensor([h * w * merge * merge for h, w in grids])
        image_T = torch.arange(len(grids)).repeat_interleave(patches_I)
        return cls(tuple(grids), merge, image_T.to(device), row_T.to(device), column_T.to(device))

    @property
    def positions(self) -> list[int]:
        """Positions of each image."""
        return [h * w for h, w in self.grids]

    @property
    def cu_seqlens(self) -> Tensor:
        """Cumulative patches, [I + 1] int32: the borders of the images in the run."""
        patches_I = torch.tensor([0, *self.positions], device=self.image.device) * self.merge**2
        return patches_I.cumsum(0).to(torch.int32)

    @property
    def position_image(self) -> Tensor:
        """Number of the image of each position, int64 [T / merge^2]."""
        return self.image[:: self.merge**2]

    def images(self) -> Segments:
        """Segments of attention over whole images."""
        return Segments.of(self.image)

    def windows(self, side: int) -> Segments:
        """Segments of attention in windows of `side` x `side` patches, cut off at the right and lower borders."""
        rows, columns = (int(x.max()) // side + 1 for x in (self.row, self.column))
        return Segments.of((self.image * rows + self.row // side) * columns + self.column // side)


def _patch_coordinates(rows: int, columns: int, merge: int) -> Tensor:
    """Row and column of each patch of one image in packed order, [2, patches]."""
    row, column = torch.meshgrid(torch.arange(rows * merge), torch.arange(columns * merge), indexing="ij")
    grid = torch.stack([row, column]).view(2, rows, merge, columns, merge)
    return grid.transpose(2, 3).reshape(2, -1)


def patchify(images: Sequence[Tensor], patch: int, merge: int) -> tuple[Tensor, Layout]:
    """Cuts images into packed patches.

    Args:
        images: each [channels, height, width]; sides any multiple of `patch` * `merge`.
        patch: pixels a side of a patch.
        merge: patches a side of a position.

    Returns:
        patches [T, channels * patch * patch], channels outermost, and their layout.

    Raises:
        ValueError: an image has another rank or sides that are no multiples.
    """
    cell = patch * merge
    for image in images:
        if image.ndim != 3 or image.shape[1] % cell or image.shape[2] % cell or 0 in image.shape:
            raise ValueError(
                f"patchify: images must be [channels, height, width] with sides multiples of {cell}, "
                f"got {list(image.shape)}"
            )
    layout = Layout.of([(x.shape[1] // cell, x.shape[2] // cell) for x in images], merge, images[0].device)
    return torch.cat([_cut(x, patch, merge) for x in images]), layout


def _cut(image: Tensor, patch: int, merge: int) -> Tensor:
    channels, height, width = image.shape
    cell = patch * merge
    blocks = image.reshape(channels, height // cell, merge, patch, width // cell, merge, patch)
    return blocks.permute(1, 4, 2, 5, 0, 3, 6).reshape(-1, channels * patch * patch)


def unpatchify(patches: Tensor, layout: Layout, patch: int) -> list[Tensor]:
    """Undoes `patchify`: [T, channels * patch * patch] to a list of [channels, height, width]."""
    merge, channels = layout.merge, patches.shape[1] // patch**2
    images = []
    runs = patches.split([n * merge**2 for n in layout.positions])
    for (rows, columns), run in zip(layout.grids, runs, strict=True):
        blocks = run.view(rows, columns, merge, merge, channels, patch, patch).permute(4, 0, 2, 5, 1, 3, 6)
        images.append(blocks.reshape(channels, rows * merge * patch, columns * merge * patch))
    return images


def rotary(layout: Layout, channels: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines of 2-D rotary positions: a quarter of the frequencies turn with rows, a quarter with columns.

    Returns:
        two float32 [T, 1, 1, channels] for the rotate-half form (Qwen2.5-VL's vision tower); the sines carry its signs.
    """
    half = channels // 2
    frequency = theta ** -(torch.arange(0, half, 2, device=layout.row.device, dtype=torch.float32) / half)
    angles = torch.cat([x[:, None].float() * frequency for x in (layout.row, layout.column)], dim=1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([cos, cos], dim=1)[:, None, None], torch.cat([-sin, sin], dim=1)[:, None, None]


def attend(qkv: Tensor, segments: Segments, cos: Tensor, sin: Tensor) -> Tensor:
    """Bidirectional attention within segments: exact, no mask, one call for each distinct segment length.

    Args:
        qkv: [T, 3, H, C].
        segments: which patches see each other.
        cos: float32 [T, 1, 1, C] of `rotary`.
        sin: likewise.

    Returns:
        [T, H, C].
    """
    qk_T2HC, v_THC = qkv[:, :2].float(), qkv[:, 2]
    turned_T2HC = (qk_T2HC * cos + qk_T2HC.roll(qkv.shape[-1] // 2, -1) * sin).to(qkv.dtype)
    parts = [*turned_T2HC.unbind(1), v_THC]
    if segments.order is not None:
        parts = [part_THC.index_select(0, segments.order) for part_THC in parts]
    outputs, start = [], 0
    for number, length in segments.shapes:
        runs = [part[start : start + number * length].unflatten(0, (number, length)).transpose(1, 2) for part in parts]
        outputs.append(scaled_dot_product_attention(*runs).transpose(1, 2).flatten(0, 1))
        start += number * length
    out_THC = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    return out_THC if segments.inverse is None else out_THC.index_select(0, segments.inverse)
