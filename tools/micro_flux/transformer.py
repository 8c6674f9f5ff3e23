# Copyright 2026 The blockskip_hooks authors. Licensed under the Apache License, Version 2.0.
"""Stage `transformer`: trains the FLUX transformer and both text encoders together on stored latents.

Rectified flow as diffusers' FLUX does it: x_t = (1 - s) x_0 + s noise, target noise - x_0, timestep s. The learning
rate is constant unless `--anneal` is given; a killed run resumes from its last checkpoint. The batches are whole
pictures at 64 px and crops (64 tokens each), whole ones at 96 px (144 tokens) or at 128 px (256 tokens).
"""

import argparse
import json
import math
import os
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from catalogue import CLASS_NAMES
from diffusers import FluxPipeline, FluxTransformer2DModel
from optimizer import HybridOptimizer
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from settings import add_common_arguments, write_json
from text import T5_TOKENS, build_clip, build_t5, move_embeddings, write_clip_tokenizer, write_t5_tokenizer
from torch import nn
from transformers import CLIPTokenizer, T5TokenizerFast


# How often training draws each of data.py's kinds: icons of the classes more often than they were made.
KIND_SHARES = (0.5, 0.16, 0.14, 0.2)
# Classes that are learnt last are drawn this many times as often as the others: theirs are the least alike icons.
TIMES = {"cat": 2, "teapot": 2, "boot": 2}
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


def draw_sigmas(count: int, shift: float = 1.0) -> torch.Tensor:
    """Noise levels (B,): logit-normal, three in ten uniform, stratified over the batch, then shifted upwards."""
    uniform = ((torch.arange(count) + torch.rand(count)) / count).clamp(1e-4, 1 - 1e-4)[torch.randperm(count)]
    sigmas = torch.where(torch.rand(count) < 0.3, uniform, torch.sigmoid(torch.special.ndtri(uniform)))
    return shift * sigmas / (1 + (shift - 1) * sigmas)


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


@torch.no_grad()
def load_start(
    model: TextToLatent, folder: Path, clip_tokenizer: CLIPTokenizer, t5_tokenizer: T5TokenizerFast
) -> None:
    """Begins from a pipeline folder of the same sizes; embeddings move by token."""
    old = {}
    for part, file in (
        ("transformer", "diffusion_pytorch_model.safetensors"),
        ("text_encoder", "model.safetensors"),
        ("text_encoder_2", "model.safetensors"),
    ):
        old[part] = load_file(folder / part / file)
    model.transformer.load_state_dict(old["transformer"])
    torch.manual_seed(0)
    for module, part, prefix, tokenizer, tokenizer_type in (
        (model.clip, "text_encoder", "text_model.", clip_tokenizer, CLIPTokenizer),
        (model.t5, "text_encoder_2", "", t5_tokenizer, T5TokenizerFast),
    ):
        table = module.get_input_embeddings().weight
        known = tokenizer_type.from_pretrained(folder / part.replace("text_encoder", "tokenizer")).get_vocab()
        for name, value in module.state_dict().items():
            stored = old[part].get(prefix + name)
            if stored is None:
                print(f"{part}: {name} is not stored")
            elif value.data_ptr() == table.data_ptr():
                move_embeddings(table, tokenizer.get_vocab(), stored.float(), known)
            else:
                value.copy_(stored)


class Shards:
    """The latents and captions of `data.py` that are there by now, by row."""

    def __init__(self, folder: Path, clip_tokenizer: CLIPTokenizer, t5_tokenizer: T5TokenizerFast) -> None:
        self.folder, self.tokenizers = folder, (clip_tokenizer, t5_tokenizer)
        self.latents: list[dict[str, torch.Tensor]] = []
        self.rows: list[list[torch.Tensor]] = []  # of a shard, those of each of data.py's kinds
        self.tokens: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.nothing = self._tokens([""])

    def _tokens(self, captions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        padded = {"padding": "max_length", "max_length": T5_TOKENS, "truncation": True, "return_tensors": "pt"}
        lower = [caption.lower() for caption in captions]
        return tuple(tokenizer(lower, **padded).input_ids for tokenizer in self.tokenizers)

    def available(self) -> int:
        """How many shards are written, counted from 0 without a gap."""
        number = 0
        while (self.folder / f"{number:03d}.safetensors").exists():
            number += 1
        return number

    def open(self, count: int) -> None:
        """Reads shards until there are `count`."""
        for number in range(len(self.latents), count):
            with safe_open(self.folder / f"{number:03d}.safetensors", framework="pt") as file:
                self.latents.append({name: file.get_tensor(name) for name in KINDS})
                kinds, classes = file.get_tensor("kind"), file.get_tensor("class")
            times = torch.ones_like(classes)
            for name, factor in TIMES.items():
                times[classes == CLASS_NAMES.index(name)] = factor
            rows = torch.arange(len(kinds)).repeat_interleave(times)
            self.rows.append([rows[kinds[rows] == kind] for kind in range(len(KIND_SHARES))])
            captions = json.loads((self.folder / f"{number:03d}.json").read_text(encoding="utf-8"))
            clip, t5 = self._tokens([caption for several in captions for caption in several])
            shape = (len(captions), -1, T5_TOKENS)
            self.tokens.append((clip.view(shape), t5.view(shape)))

    def batch(self, kind: str, size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Packed latents (B, L, 32) of a size and their tokens (B, 16) each; one caption in ten is empty."""
        rows, clip, t5 = [], [], []
        for content in torch.multinomial(torch.tensor(KIND_SHARES), size, replacement=True).tolist():
            shard = int(torch.randint(len(self.latents), ()))
            of_kind = self.rows[shard][content]
            row = int(of_kind[int(torch.randint(len(of_kind), ()))])
            latent = self.latents[shard][kind][row]
            rows.append(latent if latent.ndim == 3 else latent[int(torch.randint(len(latent), ()))])
            if torch.rand(()) < 0.1:
                words = (self.nothing[0][0], self.nothing[1][0])
            else:
                which = int(torch.randint(self.tokens[shard][0].shape[1], ()))
                words = (self.tokens[shard][0][row, which], self.tokens[shard][1][row, which])
            clip.append(words[0])
            t5.append(words[1])
        return pack(torch.stack(rows).float()), torch.stack(clip), torch.stack(t5)


KINDS = ("half", "patch", "middle", "full")
# How the noise levels of each are shifted upwards, by the square root of their tokens against 64.
SHIFTS = {"half": 1.0, "patch": 1.0, "middle": 1.5, "full": 2.0}
# What a picture costs against one of 64 tokens.
COSTS = {"half": 1.0, "patch": 1.0, "middle": 2.0, "full": 3.6}


def build_model(args: argparse.Namespace) -> tuple[TextToLatent, CLIPTokenizer, T5TokenizerFast]:
    """The untrained modules and the tokenizers of a work folder."""
    clip_tokenizer = CLIPTokenizer.from_pretrained(args.work / "tokenizer")
    t5_tokenizer = T5TokenizerFast.from_pretrained(args.work / "tokenizer_2")
    transformer = build_transformer(args.double_blocks, args.single_blocks, args.heads, args.head_size)
    return TextToLatent(transformer, build_clip(clip_tokenizer), build_t5(t5_tokenizer)), clip_tokenizer, t5_tokenizer


def train(rank: int, args: argparse.Namespace, rendezvous: str) -> None:
    """One process, one thread and one share of every batch."""
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=args.threads)
    torch.set_num_threads(1)
    F.scaled_dot_product_attention = quick_attention
    torch.manual_seed(args.seed)
    model, clip_tokenizer, t5_tokenizer = build_model(args)
    if args.start:
        load_start(model, args.start, clip_tokenizer, t5_tokenizer)
    if args.compile:
        for block in (*model.transformer.transformer_blocks, *model.transformer.single_transformer_blocks):
            block.compile(dynamic=False)
    if rank == 0:
        print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters", flush=True)
    optimizer = HybridOptimizer(model, is_hidden_matrix, args.muon_rate, args.adam_rate)
    model.bfloat16()
    shards = Shards(args.work / "shards", clip_tokenizer, t5_tokenizer)
    folder = args.work / args.name
    checkpoint, progress = folder / "checkpoint.safetensors", folder / "progress.json"
    state = {"step": 0, "cpu_hours": 0.0, "wall_hours": 0.0, "seen": dict.fromkeys(KINDS, 0), "loss": {}}
    if progress.exists():
        state = json.loads(progress.read_text(encoding="utf-8"))
        state["seen"] = dict.fromkeys(KINDS, 0) | state["seen"]
        optimizer.load_state(load_file(checkpoint), state["step"])
    first_step = optimizer.step_number
    torch.manual_seed(1000 * (args.seed + first_step) + rank)
    start, start_cpu, before = time.monotonic(), time.process_time(), dict(state)
    last_print, last_save, seen_now = start, start, dict.fromkeys(KINDS, 0)

    def save() -> None:
        save_file(optimizer.state(), checkpoint.with_suffix(".part"))
        os.replace(checkpoint.with_suffix(".part"), checkpoint)
        write_json(progress, state)

    smaller = (args.half_share, args.patch_share, args.middle_share)
    shares = torch.tensor([*smaller, 1 - sum(smaller)])
    sizes = dict.fromkeys(KINDS, args.batch_size) | {"middle": args.batch_size // 2, "full": args.full_batch_size}
    while True:
        if (optimizer.step_number - first_step) % 200 == 0:
            shards.open(int(agree([shards.available()])[0]))
        cpu = (time.process_time() - start_cpu) * args.threads / 3600
        number, exact, cpu = agree([torch.multinomial(shares, 1).item(), torch.rand(()).item() < 0.5, cpu])
        if cpu >= args.cpu_hours:
            break
        kind = KINDS[int(number)]
        factor = min(1.0, (optimizer.step_number - first_step + 1) / 200)
        if args.anneal:
            factor *= 1 - cpu / args.cpu_hours
        clean, clip_tokens, t5_tokens = shards.batch(kind, sizes[kind] // args.threads)
        noise = torch.randn_like(clean)
        sigma = draw_sigmas(len(clean), SHIFTS[kind])
        noisy = torch.lerp(clean, noise, sigma[:, None, None])
        prediction = model(noisy, sigma, clip_tokens, t5_tokens, exact=bool(exact))
        loss = (prediction.float() - (noise - clean)).square().mean()
        loss.backward()
        optimizer.step(factor)
        seen_now[kind] += sizes[kind]
        old = state["loss"].get(kind, loss.item())
        state = {
            "step": optimizer.step_number,
            "cpu_hours": before["cpu_hours"] + cpu,
            "wall_hours": before["wall_hours"] + (time.monotonic() - start) / 3600,
            "seen": {name: before["seen"][name] + seen_now[name] for name in KINDS},
            "loss": state["loss"] | {kind: 0.99 * old + 0.01 * loss.item()},
        }
        if rank == 0 and time.monotonic() - last_print > 30:
            last_print = time.monotonic()
            losses = " ".join(f"{name} {value:.4f}" for name, value in state["loss"].items())
            rate = sum(COSTS[name] * seen_now[name] for name in KINDS) / (3600 * cpu / args.threads)
            print(
                f"step {state['step']} cpu hours {state['cpu_hours']:.3f} shards {len(shards.latents)} seen "
                f"{state['seen']} loss {losses}; {rate:.1f} images of 64 tokens/s of both cores",
                flush=True,
            )
        if rank == 0 and time.monotonic() - last_save > 60 * args.save_minutes:
            last_save = time.monotonic()
            save()
    if rank == 0:
        save()


def add_size_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds --name and the sizes of the transformer."""
    parser.add_argument("--name", default="transformer", help="folder of the run inside --work")
    parser.add_argument("--double_blocks", type=int, default=6)
    parser.add_argument("--single_blocks", type=int, default=12)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--head_size", type=int, default=32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_common_arguments(parser)
    add_size_arguments(parser)
    parser.add_argument("--start", type=Path, help="pipeline folder to begin from")
    parser.add_argument("--cpu_hours", type=float, default=20.0, help="processor time of this call, over all cores")
    parser.add_argument("--batch_size", type=int, default=64, help="pictures of 64 tokens in a batch")
    parser.add_argument("--full_batch_size", type=int, default=24, help="pictures of 256 tokens in a batch")
    parser.add_argument("--half_share", type=float, default=0.2, help="share of batches of whole pictures at 64 px")
    parser.add_argument("--patch_share", type=float, default=0.2, help="share of batches of crops at 64 px")
    parser.add_argument("--middle_share", type=float, default=0.2, help="share of batches of whole pictures at 96 px")
    parser.add_argument("--muon_rate", type=float, default=0.015)
    parser.add_argument("--adam_rate", type=float, default=1.5e-3)
    parser.add_argument("--save_minutes", type=float, default=8.0)
    parser.add_argument("--anneal", action="store_true", help="let the rates fall to zero over this call")
    parser.add_argument("--compile", action="store_true", help="torch.compile the blocks")
    args = parser.parse_args()
    (args.work / args.name).mkdir(parents=True, exist_ok=True)
    write_clip_tokenizer(args.work / "tokenizer")
    write_t5_tokenizer(args.work / "tokenizer_2")
    rendezvous = (args.work / args.name / "rendezvous").resolve()
    rendezvous.unlink(missing_ok=True)
    mp.spawn(train, (args, str(rendezvous)), nprocs=args.threads)


if __name__ == "__main__":
    main()
