"""The VAE's part of a plan: crops to latents and latents to images, beside the transformer or in turn with it."""

from __future__ import annotations

from copy import copy
from dataclasses import replace

from .components import simulate_vae
from .request import PlanRequest
from .usage import Usage


class Vae:
    """The VAE's phases, each simulated at most once per batch size.

    Where one of VAE and transformer beside the other would need more than a training step, they take turns on the
    device, if processes do not share the transformer. On a CPU they never do: host memory is all that there is.
    """

    def __init__(self, request: PlanRequest, training: Usage, base: Usage | None = None) -> None:
        self._request = request
        self.training = training
        self.base = training if base is None else base
        """What is on the device beside the VAE."""
        self.limit = training.peak_bytes
        self._encodes = {1: self._simulate(1, request.training_size, decode=False)}
        self._decodes: dict[tuple[tuple[int, int], bool], Usage] = {}
        self.parameter_bytes = self._encodes[1].parameter_bytes

    def before_lora(self) -> Vae:
        """The same where LoRA and its optimizer are not there yet."""
        vae = copy(self)
        vae.base = replace(self.base, lora_bytes=0, traces=())
        return vae

    def encode(self, batch_size: int) -> tuple[Usage, bool]:
        """Crops at the training resolution to latents, and whether alone."""
        if batch_size not in self._encodes:
            self._encodes[batch_size] = self._simulate(batch_size, self._request.training_size, decode=False)
        return self._placed(self._encodes[batch_size])

    def beside_transformer(self, batch_size: int) -> Usage:
        """Crops to latents with the transformer resident, as in training without records."""
        return self._beside(self._simulate(batch_size, self._request.training_size, decode=False))

    def decode(self, size: tuple[int, int], *, tiled: bool = False) -> Usage:
        """Latents to one image, whatever is beside it."""
        if (size, tiled) not in self._decodes:
            self._decodes[size, tiled] = self._simulate(1, size, decode=True, tiled=tiled)
        return self._decodes[size, tiled]

    def decode_after(self, denoising: Usage, size: tuple[int, int]) -> tuple[Usage, dict[str, bool]]:
        """The transformer's work, then latents to one image; whether they take turns, and whether in tiles."""
        decode, alone = self._placed(self.decode(size))
        beside = denoising.beside(parameter_bytes=self.parameter_bytes)
        if not alone and beside.peak_bytes <= self.limit:
            return beside.then(decode), {"vae_alone": False, "vae_tiled": False}
        alone = not self._transformer_stays
        whole, tiled = (
            self._alone(decoded) if alone else self._beside(decoded)
            for decoded in (self.decode(size), self.decode(size, tiled=True))
        )
        # Tiles are blended where they meet, so they are for where nothing else helps.
        in_tiles = whole.peak_bytes > self.limit and tiled.peak_bytes < whole.peak_bytes
        first = denoising if alone else beside
        return first.then(tiled if in_tiles else whole), {"vae_alone": alone, "vae_tiled": in_tiles}

    @property
    def _transformer_stays(self) -> bool:
        return self._request.bytes_elsewhere is not None or self._request.device == "cpu"

    def _simulate(self, batch_size: int, size: tuple[int, int], *, decode: bool, tiled: bool = False) -> Usage:
        family, dtype, device = self._request.family, self._request.weight_dtype, self._request.device
        usage = simulate_vae(family, batch_size, size, dtype, decode=decode, tiled=tiled, device=device)
        # The photos of a batch, then their condition images.
        return usage.then(usage) if self._request.has_condition and not decode else usage

    def _beside(self, usage: Usage) -> Usage:
        base = self.base
        # Steps have some of them for a while only, such as streamed blocks; those make no difference here.
        return usage.beside(
            parameter_bytes=base.parameter_bytes, lora_bytes=base.lora_bytes, sizes=base.resident or None
        )

    def _placed(self, usage: Usage) -> tuple[Usage, bool]:
        beside = self._beside(usage)
        if beside.peak_bytes <= self.limit or self._transformer_stays:
            return beside, False
        return self._alone(usage), True

    def _alone(self, usage: Usage) -> Usage:
        return usage.beside(lora_bytes=self.base.lora_bytes)
