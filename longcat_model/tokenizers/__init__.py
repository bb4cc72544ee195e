"""Tokenizers of each modality; import the one you need."""
