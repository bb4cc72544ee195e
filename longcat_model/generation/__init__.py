"""From prompts to text, images and speech, through the KV cache and the depth heads.

`generate_text`, `generate_image` and `generate_speech` take documents; `longcat_model.generate` takes messages.
"""

from longcat_model.generation.answers import Answer, Event, Painted, Spoken
from longcat_model.generation.generate import Speech, generate_image, generate_speech, generate_text
from longcat_model.generation.prefill import Prefixes
from longcat_model.generation.sampling import GREEDY, HEAR, IMAGE, SEE, SPEECH, TRANSCRIPT, Sampling
from longcat_model.generation.settings import Settings

__all__ = [
    "GREEDY",
    "HEAR",
    "IMAGE",
    "SEE",
    "SPEECH",
    "TRANSCRIPT",
    "Answer",
    "Event",
    "Painted",
    "Prefixes",
    "Sampling",
    "Settings",
    "Speech",
    "Spoken",
    "generate_image",
    "generate_speech",
    "generate_text",
]
