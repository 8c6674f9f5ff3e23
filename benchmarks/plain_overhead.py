#!/usr/bin/env python
"""Plain LoRA by the training script against a straightforward diffusers training loop.

With ``--skip_blocks none --patch_sampling none`` the script must cost what a short loop costs and train alike. Both
train the same random FLUX from the same LoRA on the same samples, in one process, in turns. The loop gets its crops
and noise ready-made; the script makes them in each step. The losses of both must be the same.

Example:
    python benchmarks/plain_overhead.py --json benchmarks/results/plain_overhead.json
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import torch
from common import (
    PROMPT,
    FluxSize,
    OpenRun,
    benchmark_parser,
    open_run,
    print_targets,
    quiet,
    save_photos,
    save_random_flux,
    target,
    write_figures,
)
from diffusers import AutoencoderKL, FluxPipeline, FluxTransformer2DModel
from peft import LoraConfig, set_peft_model_state_dict
from peft.utils import get_peft_model_state_dict

from blockskip_hooks.utils.seeds import derived_seed


RANK = 16
LEARNING_RATE = 1e-3
SMOKE = {"double_blocks": 2, "single_blocks": 3, "heads": 1, "resolution": 64, "steps": 3}


class PlainLoop:
    """A LoRA training loop as a diffusers example would write it; only what a step needs.

    Args:
        folder: The pipeline.
        ours: The script's run, which gives the settings, the text embeddings and the LoRA to start from.
    """

    def __init__(self, folder: Path, ours: OpenRun) -> None:
        settings = ours.run.settings
        self.vae = AutoencoderKL.from_pretrained(folder, subfolder="vae").requires_grad_(False)
        self.transformer = FluxTransformer2DModel.from_pretrained(folder, subfolder="transformer")
        self.transformer.requires_grad_(False)
        self.transformer.add_adapter(
            LoraConfig(r=RANK, lora_alpha=RANK, init_lora_weights="gaussian", target_modules=ours.run.targets)
        )
        set_peft_model_state_dict(self.transformer, get_peft_model_state_dict(ours.learner.model.transformer))
        self.transformer.train()
        self.parameters = [p for p in self.transformer.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            lr=settings.learning_rate,
            betas=(settings.adam_beta1, settings.adam_beta2),
            weight_decay=settings.adam_weight_decay,
            eps=settings.adam_epsilon,
        )
        self.scheduler = ours.run.family.scheduler
        self.guidance, self.max_grad_norm = ours.run.family.flags["guidance_scale"], settings.max_grad_norm
        embeds = ours.maker.embeds[PROMPT]
        batch = settings.train_batch_size
        self.prompt_embeds = embeds["prompt_embeds"].expand(batch, -1, -1)
        self.pooled_embeds = embeds["pooled_prompt_embeds"].expand(batch, -1)
        self.losses: list[float] = []
        self.step_seconds: list[float] = []

    def step(self, pixels: torch.Tensor, posterior: torch.Tensor, noise: torch.Tensor, indices: list[int]) -> None:
        """One optimiser step on crops, with the noise of the VAE's posterior, of the sample and its noise level."""
        started = time.perf_counter()
        with torch.no_grad():
            distribution = self.vae.encode(pixels).latent_dist
            latents = distribution.mean + distribution.std * posterior
            latents = (latents - self.vae.config.shift_factor) * self.vae.config.scaling_factor
        sigmas = self.scheduler.sigmas[indices].view(-1, 1, 1, 1)
        noisy = (1.0 - sigmas) * latents + sigmas * noise
        batch, channels, height, width = noisy.shape
        prediction = self.transformer(
            hidden_states=FluxPipeline._pack_latents(noisy, batch, channels, height, width),
            timestep=self.scheduler.timesteps[indices] / 1000,
            guidance=torch.full((batch,), self.guidance),
            pooled_projections=self.pooled_embeds,
            encoder_hidden_states=self.prompt_embeds,
            txt_ids=torch.zeros(self.prompt_embeds.shape[1], 3),
            img_ids=FluxPipeline._prepare_latent_image_ids(batch, height // 2, width // 2, "cpu", torch.float32),
            return_dict=False,
        )[0]
        prediction = FluxPipeline._unpack_latents(prediction, height * 8, width * 8, 8)
        loss = ((prediction.float() - (noise - latents).float()) ** 2).reshape(batch, -1).mean(1).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, self.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.losses.append(loss.item())
        self.step_seconds.append(time.perf_counter() - started)


def draws(ours: OpenRun, number: int) -> dict[str, Any]:
    """What the loop trains on in step ``number``: the samples of the run's plan."""
    maker, per_step = ours.maker, ours.run.samples_per_step(1)
    samples = maker.samples(range(number * per_step, (number + 1) * per_step))
    side = maker.plan.patch.training_resolution // 8

    def noise(seed: int) -> torch.Tensor:
        return torch.randn(16, side, side, generator=torch.Generator().manual_seed(seed))

    return {
        "pixels": torch.stack([maker.crop(sample) for sample in samples]),
        "posterior": torch.stack([noise(derived_seed(sample.noise_seed, "posterior")) for sample in samples]),
        "noise": torch.stack([noise(sample.noise_seed) for sample in samples]),
        "indices": [sample.timestep_index for sample in samples],
    }


def measure(args: argparse.Namespace, folder: Path) -> tuple[OpenRun, PlainLoop]:
    """Train both in turns."""
    flux = save_random_flux(
        folder / "flux", FluxSize(args.double_blocks, args.single_blocks, args.heads), torch.float32
    )
    argv = {
        "--pretrained_model_name_or_path": flux,
        "--instance_data_dir": save_photos(folder / "photos", 4, args.resolution),
        "--instance_prompt": PROMPT,
        "--output_dir": folder / "output",
        "--skip_blocks": "none",
        "--patch_sampling": "none",
        "--resolution": args.resolution,
        "--max_sequence_length": args.text_tokens,
        "--train_batch_size": args.batch_size,
        "--max_train_steps": args.steps + 1,
        "--learning_rate": LEARNING_RATE,
        "--rank": RANK,
        "--lora_alpha": RANK,
        "--mixed_precision": "no",
    }
    ours = open_run([str(item) for pair in argv.items() for item in pair])
    loop = PlainLoop(flux, ours)
    for number in range(args.steps + 1):
        inputs = draws(ours, number)
        # Who goes second finds warm caches; so they take turns at it.
        for is_ours in (True, False) if number % 2 else (False, True):
            if is_ours:
                with quiet():
                    ours.train(range(number, number + 1))
            else:
                loop.step(**inputs)
        print(
            f"step {number}: {ours.history.step_seconds[-1]:.2f} s against {loop.step_seconds[-1]:.2f} s", flush=True
        )
    return ours, loop


def main(argv: list[str] | None = None) -> int:
    """Measure and print; the exit code is 1 if the losses differ or, unless in a smoke run, the target is missed."""
    parser = benchmark_parser(__doc__)
    parser.add_argument("--double_blocks", type=int, default=19, help="Double-stream blocks.")
    parser.add_argument("--single_blocks", type=int, default=38, help="Single-stream blocks.")
    parser.add_argument("--heads", type=int, default=6, help="Attention heads of 64 each.")
    parser.add_argument("--resolution", type=int, default=256, help="Image side.")
    parser.add_argument("--text_tokens", type=int, default=64, help="Tokens of the prompt.")
    parser.add_argument("--batch_size", type=int, default=1, help="Samples per step.")
    parser.add_argument("--steps", type=int, default=20, help="Timed steps of each.")
    parser.add_argument(
        "--clock",
        choices=("wall", "cpu"),
        default="wall",
        help="cpu counts processor seconds, for a machine that other work slows; set OMP_NUM_THREADS=1 with it.",
    )
    parser.add_argument("--smoke", action="store_true", help="A tiny model and three steps.")
    args = parser.parse_args(argv)
    if args.smoke:
        vars(args).update(SMOKE)

    # The history times steps with perf_counter too.
    clock = time.process_time if args.clock == "cpu" else time.perf_counter
    with tempfile.TemporaryDirectory() as folder, mock.patch("time.perf_counter", clock):
        run, loop = measure(args, Path(folder))
    # The first step of each allocates memory and prepares kernels.
    ours, theirs = run.history.step_seconds[1:], loop.step_seconds[1:]
    error = max(abs(a - b) / abs(b) for a, b in zip(run.history.losses, loop.losses, strict=True))
    targets = [
        target("plain step / step of a straightforward loop", median(ours) / median(theirs), 1.05),
        target("largest relative difference of the losses", error, 1e-6),
    ]
    print_targets(targets)
    settings = {name: value for name, value in vars(args).items() if name != "json"}
    settings |= {"rank": RANK, "mixed_precision": "no"}
    results = {
        "trainer_step_seconds_median": median(ours),
        "loop_step_seconds_median": median(theirs),
        "trainer_step_seconds": ours,
        "loop_step_seconds": theirs,
        "losses": run.history.losses,
    }
    write_figures(args.json, "plain_overhead", settings=settings, results=results, targets=targets)
    time_met, losses_met = (item["met"] for item in targets)
    return 0 if losses_met and (time_met or args.smoke) else 1


if __name__ == "__main__":
    sys.exit(main())
