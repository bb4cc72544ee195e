"""What the released decoders do that their names do not say, behind one switch.

    quirk                 "released"                                        "none"
    --------------------  ------------------------------------------------  ------------------------------------------
    attention scale of    queries times C^-0.5 before attention, which      C^-0.5 once
    the pixel decoder     multiplies by C^-0.5 again: 1 / C in all
    its precision         queries, keys and values rounded to float16       the input's own
    its positions         row and column of vector j in raster order,       row and column where vector j's pixels go
                          though vectors come in groups of 2 x 2
    time shift of the     configured, never applied: equal steps            t / (m - m t + t), m = sqrt(tokens) / 40
    refiner
    length of the audio   4 L - 1 frames of L positions (kernel 3, stride   4 L frames
    decoder               4)
    position table of     stored, never added                               added
    the flow's prenet
    joint of two speech   first, cross-fade, second: the overlap is heard   the cross-fade in place of the overlap
    segments              three times

Weights that were trained with a quirk need it: "none" is for weights of one's own. Frames 3, 7, 11, ... of the audio
decoder hold the convolution's bias alone either way, as its kernel is shorter than its stride. The depth heads' stored
`linear1.bias` and `linear2.bias` are unused in either, see `longcat_kernels.depth_decode`.
"""

from __future__ import annotations

from typing import Literal, get_args

Quirks = Literal["released", "none"]


def has_quirks(quirks: Quirks) -> bool:
    """Whether to do as the released code does.

    Raises:
        ValueError: neither "released" nor "none".
    """
    if quirks not in get_args(Quirks):
        raise ValueError(f"released: quirks must be 'released' or 'none', got {quirks!r}")
    return quirks == "released"
