"""From the backbone's hidden state to text logits and to codes of every quantizer level."""

from longcat_model.heads.depth import depth_head
from longcat_model.heads.text import TextHead

__all__ = ["TextHead", "depth_head"]
