#!/usr/bin/env python
"""The planner's training peak against the live-tensor peak of real training steps on the CPU.

A mid-size random FLUX trains for two steps in the way of the script: accelerate, the library's LoRA, AdamW. In the
second step, when the optimizer's state is there, the bytes of live tensors are counted and compared with the plan.

Example:
    OMP_NUM_THREADS=1 python benchmarks/planner_vs_measured.py
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from common import benchmark_parser, write_figures
from diffusers import FluxTransformer2DModel

from blockskip_hooks import BlockSkipConfig, DiTBlockSkipTransformer, PatchSamplingConfig, SpanResiduals
from blockskip_hooks.families import Family
from blockskip_hooks.lora import add_lora, lora_targets
from blockskip_hooks.losses import flow_matching_loss
from blockskip_hooks.planning.counters import Meter
from blockskip_hooks.planning.presets import preset_facts, preset_family
from blockskip_hooks.planning.request import PlanRequest
from blockskip_hooks.planning.stages import plan_run


TEXT_TOKENS = 64
RANK = 16


@dataclass(frozen=True)
class Setting:
    """One comparison: skipped spans, sizes and precision."""

    name: str
    leading: int
    trailing: int
    resolution: int
    batch_size: int = 1
    bf16: bool = False
    checkpointing: bool = False


def settings(num_blocks: int, resolution: int) -> list[Setting]:
    """Plain LoRA and three ways to need less, in float32 and bfloat16."""
    half = num_blocks // 2
    leading, trailing, small = half - half // 3, half // 3, resolution // 2
    return [
        Setting("plain, fp32", 0, 0, resolution),
        Setting("plain, bf16", 0, 0, resolution, bf16=True),
        Setting("plain, bf16, checkpointing", 0, 0, resolution, bf16=True, checkpointing=True),
        Setting("50 % skipped, fp32, batch 2", leading, trailing, small, batch_size=2),
        Setting("50 % skipped, bf16, batch 2", leading, trailing, small, batch_size=2, bf16=True),
        Setting("50 % skipped, bf16, checkpointing", leading, trailing, small, 4, bf16=True, checkpointing=True),
    ]


def measure(config: dict[str, Any], family: Family, setting: Setting, targets: list[str]) -> tuple[int, float]:
    """Peak bytes of live tensors in the second of two real training steps, and the seconds it took."""
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True, mixed_precision="bf16" if setting.bf16 else "no")
    dtype = torch.bfloat16 if setting.bf16 else torch.float32
    torch.manual_seed(0)
    transformer = torch.nn.Module.to(FluxTransformer2DModel.from_config(config), dtype)
    model = DiTBlockSkipTransformer(transformer, BlockSkipConfig(leading=setting.leading, trailing=setting.trailing))
    shape = (setting.batch_size, *family.latent_shape(setting.resolution, setting.resolution))
    embeds = {
        "prompt_embeds": torch.randn(setting.batch_size, TEXT_TOKENS, config["joint_attention_dim"], dtype=dtype),
        "pooled_prompt_embeds": torch.randn(setting.batch_size, config["pooled_projection_dim"], dtype=dtype),
    }
    latents, noise = torch.randn(shape, dtype=dtype), torch.randn(shape, dtype=dtype)
    sigmas = torch.rand(setting.batch_size, 1, 1, 1, dtype=dtype)
    timesteps = torch.rand(setting.batch_size) * 1000
    noisy = (1 - sigmas) * latents + sigmas * noise
    inputs = family.transformer_inputs(config, noisy, timesteps, embeds)
    residuals = model.capture_residuals(**inputs, return_dict=False)
    # As when they are never loaded.
    for block in model.spans.skipped:
        torch.nn.Module.to(block.module, "meta")

    parameters = add_lora(transformer, targets, rank=RANK, alpha=RANK, dropout=0.0, seed=0)
    if setting.checkpointing:
        transformer.enable_gradient_checkpointing()
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)
    wrapped, optimizer = accelerator.prepare(model, optimizer, device_placement=[False, True])
    wrapped.train()

    def step() -> None:
        batch = {name: tensor.clone() for name, tensor in {"latents": latents, "noise": noise}.items()}
        noisy = (1 - sigmas) * batch["latents"] + sigmas * batch["noise"]
        inputs = family.transformer_inputs(
            config, noisy, timesteps, {name: tensor.clone() for name, tensor in embeds.items()}
        )
        injected = SpanResiduals(**{name: tensor.clone() for name, tensor in residuals.tensors().items()})
        prediction = wrapped(**inputs, residuals=injected, return_dict=False)[0]
        prediction = family.prediction_to_latents(prediction, batch["latents"])
        loss = flow_matching_loss(prediction, batch["noise"] - batch["latents"], sigmas, "none").mean()
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()

    step()
    started = time.perf_counter()
    with Meter() as live:
        live.track(model.parameters())
        live.track(model.buffers())
        live.track(t for state in optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor))
        step()
    return live.peak, time.perf_counter() - started


def plan(config: dict[str, Any], family: Family, setting: Setting, targets: list[str]) -> int:
    """The planner's training peak of the same setting."""
    request = PlanRequest(
        family=family,
        transformer_config=config,
        config=BlockSkipConfig(leading=setting.leading, trailing=setting.trailing),
        patch=PatchSamplingConfig(
            min_size=setting.resolution, max_size=setting.resolution, multiple=family.latent_token_size
        ),
        rank=RANK,
        lora_targets=targets,
        batch_size=setting.batch_size,
        text_tokens=TEXT_TOKENS,
        weight_dtype=torch.bfloat16 if setting.bf16 else torch.float32,
        gradient_checkpointing=setting.checkpointing,
        cache_latents=True,
        precompute_batch_size=1,
    )
    stages = {stage["name"]: stage for stage in plan_run(request)["stages"]}
    return stages["train"]["peak_device_bytes"]


def main(argv: list[str] | None = None) -> int:
    """Print the table; the exit code is 1 if a plan is further from its measurement than ``--tolerance``."""
    parser = benchmark_parser(__doc__)
    parser.add_argument("--double_blocks", type=int, default=4, help="Double-stream blocks.")
    parser.add_argument("--single_blocks", type=int, default=8, help="Single-stream blocks.")
    parser.add_argument("--heads", type=int, default=4, help="Attention heads of 64 each.")
    parser.add_argument("--resolution", type=int, default=256, help="Image side of plain LoRA in pixels.")
    parser.add_argument("--tolerance", type=float, default=0.05, help="Largest relative error that passes.")
    args = parser.parse_args(argv)

    family = preset_family("flux.1-dev")
    config = {
        **preset_facts("flux.1-dev")["transformer"],
        "num_layers": args.double_blocks,
        "num_single_layers": args.single_blocks,
        "attention_head_dim": 64,
        "num_attention_heads": args.heads,
        "joint_attention_dim": 256,
        "pooled_projection_dim": 128,
        "axes_dims_rope": [16, 24, 24],
    }
    results = []
    print(f"{'setting':36}{'planned MiB':>13}{'measured MiB':>14}{'error':>9}{'step s':>8}")
    for setting in settings(args.double_blocks + args.single_blocks, args.resolution):
        spans = BlockSkipConfig(leading=setting.leading, trailing=setting.trailing)
        with torch.device("meta"):
            skeleton = DiTBlockSkipTransformer(FluxTransformer2DModel.from_config(config), spans)
        targets = lora_targets(skeleton, ["attn.to_q", "attn.to_k", "attn.to_v"], family.text_stream_layers)
        planned = plan(config, family, setting, targets)
        measured, seconds = measure(config, family, setting, targets)
        error = planned / measured - 1
        results.append({"setting": setting.name, "planned_bytes": planned, "measured_bytes": measured, "error": error})
        print(
            f"{setting.name:36}{planned / 2**20:13.2f}{measured / 2**20:14.2f}{error:9.2%}{seconds:8.2f}", flush=True
        )
    worst = max(abs(result["error"]) for result in results)
    print(f"largest error {worst:.2%}, allowed {args.tolerance:.0%}")
    write_figures(args.json, "planner_vs_measured", results=results)
    return 0 if worst <= args.tolerance else 1


if __name__ == "__main__":
    sys.exit(main())
