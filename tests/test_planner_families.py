"""The planner against live tensors of real training steps, for every family."""

from __future__ import annotations

import pytest
import torch

from blockskip_hooks.blocks import modulation_layers
from blockskip_hooks.config import BlockSkipConfig, PatchSamplingConfig
from blockskip_hooks.families.facts import CONDITION_FLAGS
from blockskip_hooks.loading.component_config import load_config
from blockskip_hooks.lora import add_lora, lora_targets
from blockskip_hooks.losses import flow_matching_loss
from blockskip_hooks.planning.counters import Meter
from blockskip_hooks.planning.request import PlanRequest
from blockskip_hooks.planning.stages import plan_run
from blockskip_hooks.state import SpanResiduals
from blockskip_hooks.transformer import DiTBlockSkipTransformer
from tests.tiny import TinyFamily


# Of the five blocks of a tiny model with two kinds of them, the first two are of one kind.
SETTINGS = {
    "plain": (0, 0, False),
    "trailing span over the border": (0, 4, False),
    "leading span over the border with checkpointing": (3, 1, True),
}


def constants(model: torch.nn.Module) -> list[torch.Tensor]:
    """Tensors in plain attributes of modules, such as tables of rotary embeddings."""
    values = [value for module in model.modules() for value in vars(module).values()]
    return [value for value in values if isinstance(value, torch.Tensor)]


def live_peak(tiny: TinyFamily, request: PlanRequest) -> int:
    """Peak bytes of live tensors in the second of two real training steps."""
    family, batch_size = request.family, request.batch_size
    transformer = tiny.make_transformer()
    model = DiTBlockSkipTransformer(
        transformer, request.config, family.block_stacks, recorded_layers=request.recorded_layers
    )

    def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, dict]:
        latents = torch.randn(batch_size, *family.latent_shape(*request.training_size))
        noise, sigmas = torch.randn_like(latents), torch.rand(batch_size, 1, 1, 1)
        noisy = (1 - sigmas) * latents + sigmas * noise
        prompt = family.empty_embeds(request.transformer_config, request.text_tokens, torch.float32)
        prompt = {name: torch.zeros_like(t) if t.is_floating_point() else t for name, t in prompt.items()}
        timesteps = family.scheduler.timesteps[torch.arange(batch_size)]
        embeds = family.collate_embeds([prompt] * batch_size)
        inputs = family.transformer_inputs(request.transformer_config, noisy, timesteps, embeds)
        condition = None
        if request.has_condition:
            condition, tokens = torch.randn_like(noisy), inputs["hidden_states"].shape[1]
            inputs = {**family.with_condition(inputs, condition), "condition_tokens": tokens}
        # The trainer's batch keeps the embeddings beside what the family made of them.
        return latents, noise, noisy, sigmas, {**inputs, "kept": (embeds, condition)}

    first = batch()[-1]
    first.pop("kept")
    residuals = model.capture_residuals(**first, return_dict=False)
    del first
    for module in model.streamed_modules.values():
        torch.nn.Module.to(module, "meta")
    parameters = add_lora(transformer, request.lora_targets, rank=request.rank, alpha=1, dropout=0.0, seed=0)
    if request.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    model.train()
    optimizer = torch.optim.AdamW(parameters)

    def step() -> None:
        latents, noise, noisy, sigmas, inputs = batch()
        kept = inputs.pop("kept")
        injected = SpanResiduals(**{name: tensor.clone() for name, tensor in residuals.tensors().items()})
        prediction = model(**inputs, residuals=injected, return_dict=False)[0]
        prediction, target = family.loss_terms(
            family.prediction_to_latents(prediction, latents), latents, noise, noisy, sigmas
        )
        flow_matching_loss(prediction, target, sigmas, "none").mean().backward()
        del kept
        optimizer.step()
        optimizer.zero_grad()

    step()
    with Meter() as live:
        live.track(model.parameters())
        live.track(model.buffers())
        live.track(constants(model))
        live.track(t for state in optimizer.state.values() for t in state.values())
        step()
    return live.peak


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.fast_for("flux-dev", "sana")
def test_training_peak_is_that_of_live_tensors(tiny: TinyFamily, setting: str):
    """Families that take condition images have one wherever blocks are skipped."""
    leading, trailing, checkpointing = SETTINGS[setting]
    # One block is kept.
    trailing = min(trailing, tiny.num_blocks - leading - 1)
    family = tiny.make_family()
    config = BlockSkipConfig(leading=leading, trailing=trailing)
    skeleton = DiTBlockSkipTransformer(tiny.make_transformer(), config, family.block_stacks)
    transformer_config = load_config(tiny.folder / "transformer")
    side = tiny.resolution // 2 if config.num_skipped else tiny.resolution
    request = PlanRequest(
        family=family,
        device="cpu",
        transformer_config=transformer_config,
        config=config,
        patch=PatchSamplingConfig(min_size=side, max_size=side, multiple=family.latent_token_size),
        rank=2,
        lora_targets=lora_targets(skeleton, family.lora_layers, family.text_stream_layers),
        recorded_layers=modulation_layers(skeleton.spans, family.modulation_layers) if config.num_skipped else (),
        batch_size=2,
        text_tokens=tiny.text_tokens,
        weight_dtype=torch.float32,
        gradient_checkpointing=checkpointing,
        has_condition=config.num_skipped > 0 and CONDITION_FLAGS[0] in family.own_flags,
        cache_latents=True,
        num_samples=8,
    )
    planned = next(stage for stage in plan_run(request)["stages"] if stage["name"] == "train")
    assert planned["peak_device_bytes"] == pytest.approx(live_peak(tiny, request), rel=0.05)
