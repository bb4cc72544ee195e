"""From prompts to text, images and speech, through the KV cache and the depth heads."""

from longcat_model.generation.generate import Speech, generate_image, generate_speech, generate_text
from longcat_model.generation.sampling import GREEDY, IMAGE, SPEECH, TRANSCRIPT, Sampling

__all__ = [
    "GREEDY",
    "IMAGE",
    "SPEECH",
    "TRANSCRIPT",
    "Sampling",
    "Speech",
    "generate_image",
    "generate_speech",
    "generate_text",
]
