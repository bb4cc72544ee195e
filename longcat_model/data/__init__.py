"""Documents on disk: JSON lines, tokenized once into shards, packed into rows of alike cost, drawn step by step."""
