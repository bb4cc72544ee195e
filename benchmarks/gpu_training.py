"""A short training run of the demo model on a device: the vision tokenizer's stages, then the language model.

    python gpu_training.py [DEVICE]

Fails where the first loss is not the CPU's, or where the loss does not fall. Speech is left out: what makes it for the
demo is a package of its own.
"""

from __future__ import annotations

import copy
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import mean

import torch
from torch import Tensor

from longcat_model import presets
from longcat_model.demo import digits
from longcat_model.demo.tasks import Tasks
from longcat_model.model import LongcatNext
from longcat_model.sequence import Batch, pack
from longcat_model.tokenizers.text import ByteTokenizer
from longcat_model.tokenizers.vision import VisionTokenizer
from longcat_model.training.loop import Row, train
from longcat_model.training.loss import loss
from longcat_model.training.model_stages import joint
from longcat_model.training.vision_stages import Settings, vision_stages

STEPS = 40
SETTINGS = Settings(sae_steps=STEPS, quantizer_steps=20, decoder_steps=20, refiner_steps=20, images=32)
DOCUMENTS, ROW_LENGTH = 32, 128
CLOSE = 1e-3  # relative, of a loss whose sums are added in another order
FALLS_TO = 0.9  # of the first losses


def train_vision(device: str, folder: Path, settings: Settings = SETTINGS) -> tuple[VisionTokenizer, list[Row]]:
    """The trained tokenizer, and the rows of its first stage."""
    tokenizer = VisionTokenizer(presets.demo().vision).to(device)
    answerer = digits.answerer(tokenizer.encoder.sizes.bridge_width).to(device)
    source = digits.training_pictures(digits.load_scans()[0])
    rows = {s.name: train(s, folder, quiet=True) for s in vision_stages(tokenizer, answerer, source, settings)}
    for name, found in rows.items():
        print(f"{name}: loss {found[0]['loss']:.3f} -> {found[-1]['loss']:.3f}", flush=True)
    return tokenizer, rows["vision_sae"]


def documents(tokenizer: VisionTokenizer, model: LongcatNext) -> Callable[[int], Batch]:
    """Batches of numbers to be read and painted, as a pure function of the step."""
    scans, _ = digits.load_scans()
    numbers = digits.training_numbers(scans, count=256, seed=0, step=0)
    tokenizer.eval()
    codes = tokenizer.encode(numbers.images)
    return partial(_batch, Tasks.of(model.ids, ByteTokenizer()), numbers.texts, codes)


def _batch(tasks: Tasks, texts: list[str], codes: list[Tensor], step: int) -> Batch:
    generator = torch.Generator().manual_seed(step)
    chosen = torch.randint(len(texts), (DOCUMENTS,), generator=generator).tolist()
    made = [
        tasks.see(codes[i], texts[i]) if place % 2 else tasks.paint(codes[i], texts[i], generator)
        for place, i in enumerate(chosen)
    ]
    return pack(made, ROW_LENGTH)


def wrong(rows: list[Row], name: str) -> str | None:
    """Why these losses are none of a model that learns, or None."""
    first, last = (mean(row["loss"] for row in part) for part in (rows[:5], rows[-5:]))
    print(f"{name}: loss {first:.3f} -> {last:.3f}", flush=True)
    return None if last < FALLS_TO * first else f"{name}: the loss must fall, got {first:.3f} -> {last:.3f}"


def run(device: str, *, settings: Settings = SETTINGS, steps: int = STEPS) -> str | None:
    """None, or what is wrong."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer, sae = train_vision(device, Path(folder), settings)
        model = LongcatNext(presets.demo())
        batch = documents(tokenizer, model)
        here = copy.deepcopy(model).to(device)
        want, got = (loss(m, batch(0))[0].item() for m in (model, here))
        print(f"first loss {got:.6f}, on the CPU {want:.6f}", flush=True)
        if not abs(got - want) <= CLOSE * abs(want):
            return f"the first loss must be the CPU's, got {got} and {want}"
        rows = train(joint(here, batch, steps=steps, learning_rate=2e-3), Path(folder), quiet=True)
    return wrong(sae, "vision_sae") or wrong(rows, "language_joint")


if __name__ == "__main__":
    message = run(sys.argv[1] if len(sys.argv) > 1 else "cuda")
    if message is not None:
        sys.exit(f"gpu_training: {message}")
