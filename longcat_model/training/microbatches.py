"""A batch cut into microbatches."""

from __future__ import annotations

from dataclasses import fields
from typing import NamedTuple

import torch

from longcat_model.sequence import IGNORE, NONE, Batch, Inputs, Targets


def cut(batch: Batch, most: int) -> list[Batch]:
    """Rows in at most `most` microbatches of nearly as many rows, each as long as its longest row."""
    rows = len(batch.inputs.documents)
    count = min(most, rows)
    return [_rows(batch, slice(rows * i // count, rows * (i + 1) // count)) for i in range(count)]


class Size(NamedTuple):
    """What a microbatch costs."""

    positions: int  # padding too: what the backbone and the text head compute on
    labels: int  # positions with a label of images or speech, which the depth heads compute on


def size(part: Batch) -> Size:
    labelled = (part.targets.visual[..., 0] != IGNORE) | (part.targets.audio[..., 0] != IGNORE)
    return Size(part.inputs.text.numel(), int(labelled.sum()))


def padding(like: Batch) -> Batch:
    """One row of one position that is padding: nothing is read or predicted."""
    tensors = (
        {field.name: torch.full_like(getattr(part, field.name)[:1, :1], fill) for field in fields(part)}
        for part, fill in ((like.inputs, NONE), (like.targets, IGNORE))
    )
    inputs, targets = tensors
    return Batch(Inputs(**inputs), Targets(**targets))


def _rows(batch: Batch, rows: slice) -> Batch:
    used_S = (batch.inputs.documents[rows] >= 0).any(0)
    length = int(used_S.nonzero().max()) + 1 if used_S.any() else 1
    inputs, targets = (
        {field.name: getattr(part, field.name)[rows, :length] for field in fields(part)}
        for part in (batch.inputs, batch.targets)
    )
    return Batch(Inputs(**inputs), Targets(**targets))
