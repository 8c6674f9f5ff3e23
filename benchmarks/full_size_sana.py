#!/usr/bin/env python
"""The training script on checkpoints of SANA's sizes, 0.6 and 1.6 billion parameters.

Writes checkpoints with SANA's configs and random weights in bfloat16, the Gemma encoder and the f32c32 VAE among them,
trains four steps at 512 px with half of the blocks skipped, and reads the resident memory of that process. Needs 18 GB
of disk for the time of the run, 9 GB for the smaller one alone.

Example:
    python benchmarks/full_size_sana.py --json benchmarks/results/full_size_sana.json
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from common import benchmark_parser, gemma_tokenizer
from diffusers import AutoencoderDC, DPMSolverMultistepScheduler, SanaPipeline, SanaTransformer2DModel
from full_size import (
    GIB,
    Checkpoint,
    add_arguments,
    empty_model,
    end_on_termination,
    load_configs,
    run_benchmark,
)
from transformers import Gemma2Model


PRESETS = {"0.6B": "sana-0.6b", "1.6B": "sana-1.6b"}
LIMITS = {"0.6B": 4 * GIB}
SMOKE: dict[str, dict[str, Any]] = {
    "transformer": {
        "num_layers": 5,
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "num_cross_attention_heads": 2,
        "cross_attention_head_dim": 12,
        "cross_attention_dim": 24,
        "caption_channels": 24,
    },
    "vae": {
        "attention_head_dim": 4,
        "encoder_block_out_channels": [8] * 5 + [32],
        "decoder_block_out_channels": [8] * 5 + [32],
        "encoder_layers_per_block": [1] * 6,
        "decoder_layers_per_block": [1] * 6,
    },
    "text_encoder": {
        "vocab_size": 512,
        "hidden_size": 24,
        "intermediate_size": 32,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 12,
    },
}


def sana_checkpoint(size: str, args: argparse.Namespace) -> Checkpoint:
    """SANA of one of the sizes in :data:`PRESETS`."""
    preset = load_configs(PRESETS[size])
    configs = {name: preset[name] for name in ("transformer", "vae")}
    configs["text_encoder"] = {**preset["text_encoders"][0], "num_hidden_layers": args.text_layers}
    if args.smoke:
        configs = {name: {**config, **SMOKE[name]} for name, config in configs.items()}
    transformer = empty_model(SanaTransformer2DModel, configs["transformer"])
    # The leading span is the longer one, because its residuals are exact.
    skipped = len(transformer.transformer_blocks) // 2
    leading = -(-3 * skipped // 5)
    return Checkpoint(
        name=f"SANA-{size}",
        pipeline_class=SanaPipeline,
        transformer=transformer,
        vae=empty_model(AutoencoderDC, configs["vae"]),
        text_encoders={"text_encoder": empty_model(Gemma2Model, configs["text_encoder"])},
        scheduler=DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
        save_tokenizers=save_tokenizers,
        skip_blocks=f"{leading},{skipped - leading}",
        resolution=128 if args.smoke else 512,
        limit=LIMITS.get(size),
    )


def save_tokenizers(folder: Path) -> dict[str, str]:
    """Write a tokenizer of the real class."""
    words = gemma_tokenizer()
    words.save_pretrained(folder / "tokenizer")
    return {"tokenizer": type(words).__name__}


def main(argv: list[str] | None = None) -> int:
    """Measure and print; the exit code is 1 if a run fails or takes too much memory."""
    parser = benchmark_parser(__doc__)
    parser.add_argument("--sizes", nargs="+", choices=tuple(PRESETS), default=list(PRESETS), help="Which to run.")
    parser.add_argument("--text_layers", type=int, default=26, help="Layers of the text encoder.")
    add_arguments(parser)
    args = parser.parse_args(argv)
    if args.smoke:
        args.sizes, args.text_layers = args.sizes[:1], 1
    checkpoints = [sana_checkpoint(size, args) for size in args.sizes]
    return run_benchmark("full_size_sana", args, checkpoints, {"sizes": args.sizes, "text_layers": args.text_layers})


if __name__ == "__main__":
    end_on_termination()
    sys.exit(main())
