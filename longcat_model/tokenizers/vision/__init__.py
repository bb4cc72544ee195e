"""dNaViT: native-resolution images to residual codes and back."""

from longcat_model.tokenizers.vision.tokenizer import VisionTokenizer

__all__ = ["VisionTokenizer"]
