"""What the report shows, section by section."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from matplotlib.figure import Figure
from torch import Tensor

from longcat_model.demo import digits
from longcat_model.demo.evaluate import Result
from longcat_model.demo.language import Pool, training_batches
from longcat_model.demo.report import Sample, Section, bars, loss_curves, overview, spectrograms
from longcat_model.demo.speech import Clip
from longcat_model.demo.tasks import Tasks
from longcat_model.system import System
from longcat_model.tokenizers.vision.metrics import psnr
from longcat_model.training.balance import MODALITIES, expert_usage
from longcat_model.training.loop import Row

Goals = dict[str, tuple[str, float | None]]  # score name -> what it measures, what it must reach (None: shown only)

GOALS: Goals = {
    "see_digits": ("single digits from held-out scans read right", 0.95),
    "see_numbers": ("numbers of one to three digits from held-out scans, every digit right", 0.85),
    "paint_digits": ("painted digits recognised by a classifier trained on real scans", 0.90),
    "hear_digits": ("spoken digits of unseen takes transcribed right", 0.95),
    "talk_serial": (
        "spoken digits recognised by a classifier trained on clips of the data set; text first, then speech",
        0.85,
    ),
    "talk_parallel": ("the same, text and speech together", 0.85),
}
REAL_SPEECH_GOALS: Goals = {"hear_digits": ("spoken digits of unseen takes, real recordings, transcribed right", 0.90)}
SHOWN_TOO: Goals = {
    "paint_numbers": ("painted numbers of two and three digits, every digit recognised", None),
    "hear_numbers": ("numbers of one to three digits composed of unseen takes, every digit right", None),
    "hear_new_voices": ("digits spoken by voices never heard in training", None),
}


def sections(
    system: System,
    scans: digits.Scans,
    clips: Sequence[Clip],
    pools: dict[str, Pool],
    curves: dict[str, list[Row]],
    results: dict[str, Result],
) -> list[Section]:
    return [
        Section("It sees", "Held-out handwriting in, text out.", [_pictures(results["see_numbers"], "reads")]),
        Section(
            "It paints",
            "Text in, image out.",
            [_pictures(results[name], "looks like") for name in ("paint_digits", "paint_numbers")],
        ),
        Section("It hears", "Unseen takes in, text out.", [_speech(results["hear_numbers"], "hears")]),
        Section("It talks", "Text first, then speech.", [_speech(results["talk_serial"], "sounds like")]),
        Section(
            "It talks in parallel", "Text and speech together.", [_speech(results["talk_parallel"], "sounds like")]
        ),
        picture_levels(system, scans),
        speech_levels(system, clips),
        Section(
            "Losses",
            "Every stage of training, smoothed.",
            figures=[loss_curves(curves, ("text_loss", "visual_loss", "audio_loss"))],
        ),
        codebook_use(system, pools),
        expert_routing(system, pools),
    ]


def _pictures(result: Result, verb: str) -> list[Sample]:
    shown = zip(result.expected, result.got, result.right, result.images, strict=False)
    return [Sample(f"{want}: {verb}", _printable(got), right, image=image) for want, got, right, image in shown]


def _speech(result: Result, verb: str) -> list[Sample]:
    shown = zip(result.expected, result.got, result.right, result.speech, strict=False)
    return [Sample(f"{want}: {verb}", _printable(got), right, speech=speech) for want, got, right, speech in shown]


def _printable(text: str) -> str:
    """An untrained model may answer with control characters."""
    return "".join(c if c.isprintable() else "\ufffd" for c in text)


def picture(results: dict[str, Result], count: int = 6) -> Figure:
    """The four tasks at a glance."""
    return overview(
        {
            "sees": _pictures(results["see_numbers"], "reads")[:count],
            "paints": _pictures(results["paint_digits"], "looks like")[:count],
            "hears": _speech(results["hear_numbers"], "hears")[:count],
            "talks": _speech(results["talk_serial"], "sounds like")[:count],
        }
    )


def _prefixes(levels: int) -> dict[str, int]:
    return {"1 level": 1, "2 levels": 2, "all levels": levels}


def picture_levels(system: System, scans: digits.Scans, count: int = 6) -> Section:
    """Held-out pictures rebuilt from the first levels of their codes."""
    numbers = digits.plain_numbers(scans, count=count, seed=1)
    codes = system.vision.encode(numbers.images)
    rows = [[Sample(text, "original", None, image=x) for text, x in zip(numbers.texts, numbers.images, strict=True)]]
    for name, levels in _prefixes(system.vision.levels).items():
        images = system.vision.decode(codes, levels=levels)
        shown = zip(images, numbers.images, strict=True)
        rows.append(
            [Sample(f"{name},", f"{psnr([image], [original]):.1f} dB", None, image=image) for image, original in shown]
        )
    text = "Held-out pictures, then rebuilt from the first levels of their codes (peak signal-to-noise ratio)."
    return Section("Images through the tokenizer", text, rows)


def speech_levels(system: System, clips: Sequence[Clip], count: int = 3) -> Section:
    """Held-out clips rebuilt from the first levels of their codes."""
    chosen = clips[:: max(1, len(clips) // count)][:count]
    waveforms = [clip.waveform for clip in chosen]
    codes = system.audio.encode(waveforms)
    rows = [[Sample(f"{clip.digit}:", "original", None, speech=clip.waveform) for clip in chosen]]
    mels = {"original": system.audio.mels(waveforms[:1]).log_mel[0]}
    for name, levels in _prefixes(len(system.sizes.audio.quantizer.sizes)).items():
        spoken = system.audio.decode(codes, levels=levels)
        rows.append([Sample(f"{c.digit}:", name, None, speech=s) for c, s in zip(chosen, spoken, strict=True)])
        mels[name] = system.audio.decode_mel(codes[:1], levels=levels)[0]
    text = (
        "Unseen takes rebuilt from the first levels of their codes; the pictures show the first clip's mel spectrogram."
    )
    return Section("Speech through the tokenizer", text, rows, [spectrograms(mels)])


def codebook_use(system: System, pools: dict[str, Pool]) -> Section:
    figures = []
    for name, sizes in (("pictures", system.model.ids.visual_sizes), ("utterances", system.model.ids.audio_sizes)):
        codes_NL = torch.cat([codes.flatten(0, -2) for codes in pools[name].codes])
        shares = [
            torch.bincount(codes, minlength=n).double() / len(codes) for codes, n in zip(codes_NL.T, sizes, strict=True)
        ]
        used = [float((share > 0).double().mean()) for share in shares]
        perplexity = [float(torch.special.entr(share).sum().exp()) / n for share, n in zip(shares, sizes, strict=True)]
        figures.append(bars({"used": used, "perplexity": perplexity}, title=name, x="level", y="share of the entries"))
    text = "Share of each level's entries that the training data use, and the perplexity of their use as a share."
    return Section("Codebooks", text, figures=figures)


@torch.no_grad()
def expert_routing(system: System, pools: dict[str, Pool], batches: int = 4) -> Section:
    """Which experts each modality's positions choose."""
    experts = system.sizes.backbone.experts
    tasks = Tasks.of(system.model.ids, system.text)
    batch = training_batches(tasks, pools["pictures"], pools["utterances"], documents=64, row_length=128, seed=9)
    counts = sum(
        expert_usage(system.model(rows.inputs).expert_ids, rows.inputs, experts) for rows in map(batch, range(batches))
    )
    assert isinstance(counts, Tensor)
    shares = counts.double() / counts.sum(-1, keepdim=True).clamp(min=1)
    figures: list[Figure] = [
        bars(
            {name: shares[layer, i].tolist() for i, name in enumerate(MODALITIES)},
            title=f"layer {layer}: experts 0-{experts.real - 1} are real, the rest identity",
            x="expert",
            y="share of choices",
        )
        for layer in range(shares.shape[0])
    ]
    return Section("Experts by modality", "Share of a modality's choices that goes to each expert.", figures=figures)
