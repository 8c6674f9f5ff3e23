"""The LoRA of a run: on the transformer, and on the text encoders that train along."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from ..families import Family, PromptEmbeds
from ..families.prompts import TrainedText
from ..loading.lora_files import load_lora, save_lora
from ..residuals.batches import Batch


class Adapters:
    """The LoRA of a run, in place in the models that carry it.

    Args:
        family: The model's family.
        transformer: The diffusers transformer, LoRA added.
        text: The text encoders that train along, LoRA added and not wrapped yet; ``None`` if none do.
        parameters: Every parameter of the LoRA.
        device: Where the models run.

    Attributes:
        parameters: Every parameter of the LoRA.
        text_encoders: The text encoders that train along, by pipeline component.
    """

    def __init__(
        self,
        family: Family,
        transformer: torch.nn.Module,
        text: TrainedText | None,
        parameters: Sequence[torch.nn.Parameter],
        device: torch.device,
    ) -> None:
        self.parameters = list(parameters)
        self._family, self._transformer, self._text, self._device = family, transformer, text, device
        # As they were made: what accelerate wraps is not what is saved.
        self.text_encoders = dict(text.encoders) if text else {}

    @property
    def modules(self) -> list[torch.nn.Module]:
        """The models that carry the LoRA."""
        return [self._transformer, *self.text_encoders.values()]

    def values(self) -> dict[str, torch.Tensor]:
        """A copy of every parameter on the CPU, by its number."""
        return {str(number): p.detach().cpu().clone() for number, p in enumerate(self.parameters)}

    @contextmanager
    def held_at(self, values: Mapping[str, torch.Tensor]) -> Iterator[None]:
        """Within this context the LoRA has values from :meth:`values`, and afterwards its own again."""
        now = self.values()
        self._set(values)
        try:
            yield
        finally:
            self._set(now)

    @torch.no_grad()
    def _set(self, values: Mapping[str, torch.Tensor]) -> None:
        for number, parameter in enumerate(self.parameters):
            parameter.copy_(values[str(number)])

    def refresh(self, batch: Batch) -> None:
        """Put the embeddings that text encoders make now, with gradients, in place of a batch's, if some train."""
        if self._text is not None:
            tokens = self._text.batch_tokens(batch.prompts, self._device)
            batch.embeds = self._family.refresh_embeds(self._text.encoders, tokens, batch.embeds)

    @torch.no_grad()
    def current(self, embeds: Mapping[str, PromptEmbeds], prompts: Iterable[str]) -> dict[str, PromptEmbeds]:
        """Embeddings by prompt, those of ``prompts`` as the text encoders make them now."""
        now = dict(embeds)
        if self._text is not None:
            with self.without_dropout():
                for prompt in prompts:
                    tokens = self._text.batch_tokens([prompt], self._device)
                    batched = {name: tensor[None] for name, tensor in embeds[prompt].items()}
                    fresh = self._family.refresh_embeds(self._text.encoders, tokens, batched)
                    now[prompt] = {name: tensor[0].cpu() for name, tensor in fresh.items()}
        return now

    @contextmanager
    def without_dropout(self) -> Iterator[None]:
        """Within this context text encoders that train make the embeddings that they make of a prompt each time."""
        encoders = list(self._text.encoders.values()) if self._text else []
        modes = [encoder.training for encoder in encoders]
        for encoder in encoders:
            encoder.eval()
        try:
            yield
        finally:
            for encoder, mode in zip(encoders, modes, strict=True):
                encoder.train(mode)

    def save(self, folder: Path, dtype: torch.dtype | None = None) -> None:
        """Write ``pytorch_lora_weights.safetensors``, in another dtype if one is given."""
        save_lora(folder, type(self._family), self._transformer, self.text_encoders, dtype=dtype)

    def load(self, folder: Path) -> None:
        """Read what :meth:`save` wrote.

        Raises:
            UserError: if the file is of other layers.
        """
        load_lora(folder, type(self._family), self._transformer, self.text_encoders)
