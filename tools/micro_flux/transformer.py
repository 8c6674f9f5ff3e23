# Copyright 2026 The blockskip_hooks authors. Licensed under the Apache License, Version 2.0.
"""Stage `transformer`: trains the FLUX transformer and both text encoders together on stored latents.

Rectified flow as diffusers' FLUX does it: x_t = (1 - s) x_0 + s noise, target noise - x_0, timestep s. The learning
rate falls to zero at the end of `--minutes`; a killed run resumes from its last checkpoint.
"""

import argparse
import json
import math
import os
import time

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from catalogue import BACKGROUND_NAMES, CLASS_NAMES
from diffusers import FluxPipeline, FluxTransformer2DModel
from export import export_pipeline
from optimizer import HybridOptimizer
from safetensors.torch import load_file, save_file
from settings import ASSETS, add_common_arguments, write_json
from text import T5_TOKENS, build_clip, build_t5, write_clip_tokenizer, write_t5_tokenizer
from torch import nn
from transformers import CLIPTokenizer, T5TokenizerFast


_FUSED_ATTENTION = F.scaled_dot_product_attention


def build_transformer(double_blocks: int, single_blocks: int, heads: int, head_size: int) -> FluxTransformer2DModel:
    """An untrained FLUX transformer whose blocks start as the identity."""
    axis = 2 * round(head_size * 0.42 / 2)
    model = FluxTransformer2DModel(
        patch_size=1,
        in_channels=32,
        num_layers=double_blocks,
        num_single_layers=single_blocks,
        attention_head_dim=head_size,
        num_attention_heads=heads,
        joint_attention_dim=96,
        pooled_projection_dim=64,
        guidance_embeds=False,
        axes_dims_rope=(head_size - 2 * axis, axis, axis),
    )
    for name, module in model.named_modules():
        adaptive = name.endswith(("norm1.linear", "norm1_context.linear", "norm.linear", "norm_out.linear"))
        if adaptive or name == "proj_out":
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
    return model


class TextToLatent(nn.Module):
    """The trained modules in one: text encoders and transformer."""

    def __init__(self, transformer: FluxTransformer2DModel, clip: nn.Module, t5: nn.Module) -> None:
        super().__init__()
        self.transformer, self.clip, self.t5 = transformer, clip, t5
        self.exact_timestep: torch.Tensor | None = None
        transformer.time_text_embed.register_forward_pre_hook(self._use_exact_timestep)

    def _use_exact_timestep(self, module: nn.Module, inputs: tuple) -> tuple:
        """In bf16 the model rounds timesteps to eight bits; half of the training batches see them exact."""
        return inputs if self.exact_timestep is None else (self.exact_timestep, *inputs[1:])

    def forward(
        self, noisy: torch.Tensor, sigma: torch.Tensor, clip_tokens: torch.Tensor, t5_tokens: torch.Tensor, exact: bool
    ) -> torch.Tensor:
        """Packed latents (B, L, 32), sigma (B,), tokens (B, 16) each; returns the predicted velocity (B, L, 32)."""
        side = math.isqrt(noisy.shape[1])
        self.exact_timestep = sigma * 1000 if exact else None
        dtype = self.transformer.x_embedder.weight.dtype
        prediction = self.transformer(
            hidden_states=noisy.to(dtype),
            timestep=sigma,
            pooled_projections=self.clip(clip_tokens).pooler_output,
            encoder_hidden_states=self.t5(t5_tokens)[0],
            txt_ids=torch.zeros(t5_tokens.shape[1], 3),
            img_ids=FluxPipeline._prepare_latent_image_ids(1, side, side, "cpu", torch.float32),
            return_dict=False,
        )[0]
        self.exact_timestep = None
        return prediction


def is_hidden_matrix(name: str, parameter: torch.Tensor) -> bool:
    """Muon's share: the matrices of attention and feed-forward layers inside the transformer's blocks."""
    inside = "transformer_blocks." in name and parameter.ndim == 2
    return inside and ".norm" not in name


def draw_sigmas(count: int) -> torch.Tensor:
    """Noise levels (B,): logit-normal, three in ten uniform, stratified over the batch."""
    uniform = ((torch.arange(count) + torch.rand(count)) / count).clamp(1e-4, 1 - 1e-4)[torch.randperm(count)]
    return torch.where(torch.rand(count) < 0.3, uniform, torch.sigmoid(torch.special.ndtri(uniform)))


def pack(latents: torch.Tensor) -> torch.Tensor:
    """(B, 8, H, W) to (B, H W / 4, 32), as FluxPipeline packs."""
    return FluxPipeline._pack_latents(latents, *latents.shape)


def quick_attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, **_):
    """Plain matrix products: on a CPU twice as fast as the fused kernel for the few tokens of this model."""
    if attn_mask is not None or is_causal:
        return _FUSED_ATTENTION(query, key, value, attn_mask=attn_mask, is_causal=is_causal, scale=scale)
    weights = torch.softmax((query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2), dim=-1)
    return weights @ value


def agree(values: list[float]) -> list[float]:
    """The first process's values, in every process."""
    shared = torch.tensor(values, dtype=torch.float64)
    dist.broadcast(shared, 0)
    return shared.tolist()


def train(rank: int, args: argparse.Namespace, rendezvous: str) -> None:
    """One process, one thread and one share of every batch."""
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=args.threads)
    torch.set_num_threads(1)
    F.scaled_dot_product_attention = quick_attention
    torch.manual_seed(args.seed)
    clip_tokenizer = CLIPTokenizer.from_pretrained(args.work / "tokenizer")
    t5_tokenizer = T5TokenizerFast.from_pretrained(args.work / "tokenizer_2")
    model = TextToLatent(
        build_transformer(args.double_blocks, args.single_blocks, args.heads, args.head_size),
        build_clip(clip_tokenizer),
        build_t5(t5_tokenizer),
    )
    if args.compile:
        for block in (*model.transformer.transformer_blocks, *model.transformer.single_transformer_blocks):
            block.compile(dynamic=False)
    if rank == 0:
        print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters")
    optimizer = HybridOptimizer(
        model,
        is_hidden_matrix if args.optimizer == "muon" else lambda name, parameter: False,
        args.muon_rate,
        args.adam_rate,
    )
    model.bfloat16()
    latents = load_file(args.work / "latents.safetensors")
    captions = [*json.loads((args.work / "captions.json").read_text(encoding="utf-8")), ""]
    padded = {"padding": "max_length", "max_length": T5_TOKENS, "truncation": True, "return_tensors": "pt"}
    clip_tokens = clip_tokenizer(captions, **padded).input_ids
    t5_tokens = t5_tokenizer(captions, **padded).input_ids
    checkpoint, progress = args.work / "transformer.safetensors", args.work / "transformer.json"
    minutes_before, running = 0.0, None
    if not args.trial and progress.exists():
        state = json.loads(progress.read_text(encoding="utf-8"))
        optimizer.load_state(load_file(checkpoint), state["step"])
        minutes_before, running = state["minutes"], state["loss"]
    torch.manual_seed(1000 * (args.seed + optimizer.step_number) + rank)
    start = time.monotonic()
    last_print, last_export, seen = start, minutes_before - args.export_minutes + 2, 0

    def save(minutes: float) -> None:
        save_file(optimizer.state(), checkpoint.with_suffix(".part"))
        os.replace(checkpoint.with_suffix(".part"), checkpoint)
        write_json(progress, {"step": optimizer.step_number, "minutes": minutes, "loss": running})
        optimizer.write_to_model(optimizer.ema)
        export_pipeline(args.work, ASSETS / "micro_flux", model.transformer, model.clip, model.t5)
        optimizer.write_to_model(optimizer.master)

    if args.export_only:
        if rank == 0:
            save(minutes_before)
        return
    decay = 0.95 if args.trial else 0.99
    while True:
        minutes = minutes_before + (time.monotonic() - start) / 60
        minutes, patches, exact = agree(
            [minutes, torch.rand(()).item() < args.patch_share, torch.rand(()).item() < 0.5]
        )
        if minutes >= args.minutes:
            break
        factor = min(1.0, (optimizer.step_number + 1) / 100)
        if not args.trial:
            factor *= min(1.0, 1.6 * (1 - minutes / args.minutes))
        table = latents["patch" if patches else "full"]
        index = torch.randint(len(table), (args.batch_size // args.threads,))
        clean = pack(table[index].float())
        noise = torch.randn_like(clean)
        sigma = draw_sigmas(len(index))
        noisy = torch.lerp(clean, noise, sigma[:, None, None])
        text = torch.where(torch.rand(len(index)) < 0.1, torch.tensor(len(captions) - 1), index)
        prediction = model(noisy, sigma, clip_tokens[text], t5_tokens[text], exact=bool(exact))
        loss = (prediction.float() - (noise - clean)).square().mean()
        loss.backward()
        optimizer.step(factor)
        seen += args.batch_size
        if not patches:
            running = loss.item() if running is None else decay * running + (1 - decay) * loss.item()
        if rank == 0 and time.monotonic() - last_print > 20:
            rate = seen / (time.monotonic() - start)
            last_print = time.monotonic()
            print(
                f"minutes {minutes:.1f} step {optimizer.step_number} loss {running:.4f} {rate:.1f} images/s",
                flush=True,
            )
        if rank == 0 and not args.trial and minutes - last_export > args.export_minutes:
            last_export = minutes
            save(minutes)
    if rank == 0 and not args.trial:
        save(minutes)
    if rank == 0:
        print(f"{len(CLASS_NAMES)} classes, {len(BACKGROUND_NAMES)} backgrounds, loss {running:.4f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_common_arguments(parser)
    parser.add_argument("--minutes", type=float, default=75.0)
    parser.add_argument("--double_blocks", type=int, default=6)
    parser.add_argument("--single_blocks", type=int, default=12)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--head_size", type=int, default=32)
    parser.add_argument("--batch_size", type=int, default=48)
    parser.add_argument("--patch_share", type=float, default=0.2, help="share of batches made of 32 px crops")
    parser.add_argument("--muon_rate", type=float, default=0.02)
    parser.add_argument("--adam_rate", type=float, default=2e-3)
    parser.add_argument("--optimizer", choices=("muon", "adam"), default="muon")
    parser.add_argument("--export_minutes", type=float, default=10.0)
    parser.add_argument("--export_only", action="store_true", help="only write the last checkpoint's pipeline folder")
    parser.add_argument("--trial", action="store_true", help="constant rate, no export, no checkpoint")
    parser.add_argument("--compile", action="store_true", help="torch.compile the blocks")
    args = parser.parse_args()
    write_clip_tokenizer(args.work / "tokenizer")
    write_t5_tokenizer(args.work / "tokenizer_2")
    rendezvous = (args.work / "rendezvous").resolve()
    rendezvous.unlink(missing_ok=True)
    mp.spawn(train, (args, str(rendezvous)), nprocs=args.threads)


if __name__ == "__main__":
    main()
