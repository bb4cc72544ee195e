"""The whole of LongCat-Next: tokenizers, language model, training, generation, and a demo. Begin with `model.py`."""
