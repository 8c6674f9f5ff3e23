#!/usr/bin/env python
"""The training script on a checkpoint of FLUX.1-dev's size, 12 billion parameters, on a small machine.

Writes a checkpoint with FLUX.1-dev's configs and random weights in bfloat16 shards, text encoders and VAE among them,
trains four steps on it with half of the blocks skipped, and reads the resident memory of that process. ``--in_turn``
then makes the records again with each skipped block read when it runs, once per forward. Needs 35 GB of disk for the
time of the run, and minutes to write and read them.

Example:
    python benchmarks/full_size_flux.py --in_turn --json benchmarks/results/full_size_flux.json
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from common import benchmark_parser, flux_tokenizers
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from full_size import (
    GIB,
    Checkpoint,
    add_arguments,
    empty_model,
    end_on_termination,
    load_configs,
    run_benchmark,
)
from transformers import CLIPTextModel, T5EncoderModel


LIMIT = 11 * GIB
IN_TURN_LIMIT = 0.75
SMOKE: dict[str, dict[str, Any]] = {
    "transformer": {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "joint_attention_dim": 32,
        "pooled_projection_dim": 16,
        "axes_dims_rope": (4, 6, 6),
    },
    "vae": {"block_out_channels": (8, 8, 8, 8), "norm_num_groups": 4, "layers_per_block": 1},
    "clip": {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2},
    "t5": {"d_model": 32, "d_ff": 32, "d_kv": 8, "num_heads": 2, "vocab_size": 64},
}


def flux_checkpoint(args: argparse.Namespace) -> Checkpoint:
    """FLUX.1-dev with the given numbers of layers."""
    preset = load_configs("flux.1-dev")
    clip, t5 = preset["text_encoders"]
    # The tokenizers' own ids, which the encoders look for.
    clip = {**clip, "bos_token_id": 0, "eos_token_id": 1}
    configs = {"transformer": preset["transformer"], "vae": preset["vae"], "clip": clip, "t5": t5}
    if args.smoke:
        configs = {name: {**config, **SMOKE[name]} for name, config in configs.items()}
    layers = {"num_layers": args.double_blocks, "num_single_layers": args.single_blocks}
    return Checkpoint(
        name="FLUX.1-dev",
        pipeline_class=FluxPipeline,
        transformer=empty_model(FluxTransformer2DModel, {**configs["transformer"], **layers}),
        vae=empty_model(AutoencoderKL, configs["vae"]),
        text_encoders={
            "text_encoder": empty_model(CLIPTextModel, configs["clip"]),
            "text_encoder_2": empty_model(T5EncoderModel, {**configs["t5"], "num_layers": args.text_layers}),
        },
        scheduler=FlowMatchEulerDiscreteScheduler.from_config(preset["scheduler"]),
        save_tokenizers=save_tokenizers,
        skip_blocks=args.skip_blocks,
        resolution=64 if args.smoke else 512,
        limit=LIMIT,
        in_turn_limit=None if args.smoke else IN_TURN_LIMIT,
    )


def save_tokenizers(folder: Path) -> dict[str, str]:
    """Write tokenizers of the real classes."""
    words = dict(zip(("tokenizer", "tokenizer_2"), flux_tokenizers()))
    for name, tokenizer in words.items():
        tokenizer.save_pretrained(folder / name)
    return {name: type(tokenizer).__name__ for name, tokenizer in words.items()}


def main(argv: list[str] | None = None) -> int:
    """Measure and print; the exit code is 1 if the run fails or takes too much memory."""
    parser = benchmark_parser(__doc__)
    parser.add_argument("--double_blocks", type=int, default=19, help="Double-stream blocks.")
    parser.add_argument("--single_blocks", type=int, default=38, help="Single-stream blocks.")
    parser.add_argument("--skip_blocks", default="19,9", help="Leading and trailing blocks to skip.")
    parser.add_argument("--text_layers", type=int, default=24, help="Layers of the T5 encoder.")
    add_arguments(parser)
    args = parser.parse_args(argv)
    if args.smoke:
        vars(args).update(double_blocks=2, single_blocks=3, skip_blocks="2,1", text_layers=1)
    names = ("double_blocks", "single_blocks", "text_layers")
    return run_benchmark(
        "full_size_flux", args, [flux_checkpoint(args)], {name: getattr(args, name) for name in names}
    )


if __name__ == "__main__":
    end_on_termination()
    sys.exit(main())
