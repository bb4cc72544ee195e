"""The released LongCat-Next checkpoint: read, check, write, place; its tokenizers and decoders."""
