"""Runs as functions that return a full config: the released model, the demo, and a tiny one for tests."""

from __future__ import annotations

from longcat_model import config as c


def longcat_next() -> c.Model:
    """The sizes of the released LongCat-Next: 74 B parameters with its tokenizers.

    The pixel decoder, which the released checkpoint keeps in a file of its own, counts here too, and both refiners are
    this project's own architecture at the released widths, so a total over all parts is larger.
    """
    visual_sizes = (16_384,) * 8
    audio_sizes = (8192, 4096, 2048, 1024, 1024, 1024, 1024, 1024)
    return c.Model(
        vocabulary=c.Vocabulary(text_size=131_072, audio_sizes=audio_sizes, visual_sizes=visual_sizes, padding=970),
        backbone=c.Backbone(),
        pre_buffer_width=8192,
        visual_head=c.DepthHead(dim=2048, heads=16),
        audio_head=c.DepthHead(dim=3072, heads=24),
        vision=c.VisionTokenizer(
            encoder=c.VisionEncoder(),
            quantizer=c.Quantizer(sizes=visual_sizes, dim=3584, shared=True),
            decoder=c.PixelDecoder(),
            refiner=c.Refiner(width=2520, depth=32, heads=21),
        ),
        audio=c.AudioTokenizer(
            encoder=c.AudioEncoder(),
            quantizer=c.Quantizer(sizes=audio_sizes, dim=5120),
            decoder=c.AudioDecoder(),
            refiner=c.MelRefiner(),
        ),
    )


def demo() -> c.Model:
    """The model `make demo` trains on two CPU cores: handwritten numbers and spoken digits."""
    visual_sizes = (128,) * 3
    audio_sizes = (128, 64, 32, 32, 32, 32, 32, 32)
    return c.Model(
        vocabulary=c.Vocabulary(text_size=260, audio_sizes=audio_sizes, visual_sizes=visual_sizes),
        backbone=c.Backbone(
            hidden=128,
            layers=2,
            ffn_width=256,
            attention=c.Attention(
                heads=4, q_rank=64, kv_rank=32, nope_dim=32, rope_dim=16, value_dim=32, rope_theta=1e4
            ),
            experts=c.Experts(real=8, zero=4, top_k=3, width=64, scale=3.0, target_real=2.0),
            ngram=c.NGram(neighbors=3, splits=2, rows=1021),
        ),
        pre_buffer_width=256,
        visual_head=c.DepthHead(dim=128, heads=4, layers=2, ffn_scale=6),
        audio_head=c.DepthHead(dim=128, heads=4, layers=2, ffn_scale=8),
        vision=c.VisionTokenizer(
            encoder=c.VisionEncoder(
                patch=4,
                merge=2,
                width=64,
                depth=3,
                heads=4,
                mlp_width=192,
                window=16,
                full_attention=(2,),
                bridge_width=64,
            ),
            quantizer=c.Quantizer(sizes=visual_sizes, dim=32, decay=0.95),
            decoder=c.PixelDecoder(width=64, depth=2, heads=4, mlp_width=192),
            refiner=c.Refiner(width=64, depth=2, heads=4, steps=8, temperature=0.3),
        ),
        audio=c.AudioTokenizer(
            encoder=c.AudioEncoder(
                mels=80, log_range=6.5, width=128, depth=2, heads=4, mlp_width=256, max_positions=250
            ),
            quantizer=c.Quantizer(sizes=audio_sizes, dim=512, restart_threshold=0.2),
            decoder=c.AudioDecoder(width=128, depth=2, heads=4, mlp_width=256),
            refiner=c.MelRefiner(width=96, depth=2, heads=4, steps=6, guidance=0.3, temperature=0.3),
        ),
    )


def tiny() -> c.Model:
    """The smallest model with every part: for tests."""
    visual_sizes, audio_sizes = (8, 8, 8), (8, 6, 4, 4)
    return c.Model(
        vocabulary=c.Vocabulary(text_size=260, audio_sizes=audio_sizes, visual_sizes=visual_sizes),
        backbone=c.Backbone(
            hidden=32,
            layers=2,
            ffn_width=48,
            attention=c.Attention(heads=2, q_rank=16, kv_rank=8, nope_dim=8, rope_dim=4, value_dim=8, rope_theta=1e4),
            experts=c.Experts(real=4, zero=2, top_k=2, width=16, scale=2.0, target_real=4 / 3),
            ngram=c.NGram(neighbors=3, splits=2, rows=101),
        ),
        pre_buffer_width=48,
        visual_head=c.DepthHead(dim=16, heads=2, layers=2, ffn_scale=6),
        audio_head=c.DepthHead(dim=16, heads=2, layers=2, ffn_scale=8),
        vision=c.VisionTokenizer(
            encoder=c.VisionEncoder(
                patch=4,
                merge=2,
                width=32,
                depth=2,
                heads=2,
                mlp_width=48,
                window=16,
                full_attention=(1,),
                bridge_width=24,
            ),
            quantizer=c.Quantizer(sizes=visual_sizes, dim=16, shared=True),
            decoder=c.PixelDecoder(width=32, depth=1, heads=2, mlp_width=48),
            refiner=c.Refiner(width=32, depth=1, heads=2, steps=2),
        ),
        audio=c.AudioTokenizer(
            encoder=c.AudioEncoder(mels=16, width=32, depth=1, heads=2, mlp_width=48, max_positions=100),
            quantizer=c.Quantizer(sizes=audio_sizes, dim=128),
            decoder=c.AudioDecoder(width=32, depth=1, heads=2, mlp_width=48),
            refiner=c.MelRefiner(width=32, depth=1, heads=2, steps=2),
        ),
    )
