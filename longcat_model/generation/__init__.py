"""From a prompt to text, an image or speech, through the KV cache and the depth heads."""
