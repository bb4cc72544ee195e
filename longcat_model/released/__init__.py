"""The released LongCat-Next checkpoint: read, check, write, place."""
