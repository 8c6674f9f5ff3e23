"""The training objective: conditional flow matching, unchanged by block skipping."""

from __future__ import annotations

import torch
from diffusers.training_utils import compute_loss_weighting_for_sd3


def flow_matching_loss(
    prediction: torch.Tensor, target: torch.Tensor, sigmas: torch.Tensor, weighting_scheme: str
) -> torch.Tensor:
    """Weighted squared error of the velocity, in float32.

    Args:
        prediction: ``(B, C, H, W)``.
        target: What it should be, the same shape: ``noise - x``, unless the family's objective is another.
        sigmas: Noise levels, ``(B, 1, 1, 1)``.
        weighting_scheme: As the upstream flag.

    Returns:
        Loss of each sample, ``(B,)``.
    """
    weighting = compute_loss_weighting_for_sd3(weighting_scheme, sigmas=sigmas).float()
    return (weighting * (prediction.float() - target.float()).square()).flatten(1).mean(1)


def combine_losses(losses: torch.Tensor, with_prior_preservation: bool, prior_loss_weight: float) -> torch.Tensor:
    """Mean over the batch; with prior preservation the mean of its first half, the instance samples, plus
    ``prior_loss_weight`` times the mean of its second half, the class samples.
    """
    if not with_prior_preservation:
        return losses.mean()
    instance, prior = losses.chunk(2)
    return instance.mean() + prior_loss_weight * prior.mean()
