"""What the placeholders of one transformer share: their mode, the residuals to inject, the residuals captured."""

from __future__ import annotations

import enum
from dataclasses import dataclass, fields

import torch

from .config import BlockSkipConfig
from .utils.errors import UserError


class SkipMode(enum.Enum):
    """What the placeholders of a transformer do; see :mod:`~blockskip_hooks.hooks`."""

    INJECT = "inject"
    CAPTURE = "capture"
    RUN = "run"


@dataclass
class SpanResiduals:
    """What the skipped spans contribute to one batch (DiT-BlockSkip, Eq. 3). No tensor carries a gradient.

    Attributes:
        leading_hidden_states: Image tokens after the leading span, ``(batch, image_tokens, dim)``. The span's input
            does not depend on the LoRA, so its output itself is stored: the same as adding the residual, but exact
            in every dtype.
        leading_encoder_hidden_states: Text tokens after the leading span, ``(batch, text_tokens, dim)``; ``None``
            for models whose blocks do not update the text.
        trailing_hidden_states: Residual of the image tokens over the trailing span, ``(batch, image_tokens, dim)``.
            After the last block only the image tokens are read, so the text is not needed. In models that run text
            and image as one sequence, the tokens are those of that sequence, here and in the leading span.
        modulation: Outputs of the kept blocks' recorded layers side by side, ``(batch, sum of their widths)``;
            ``None`` if no layer is recorded.
    """

    leading_hidden_states: torch.Tensor | None = None
    leading_encoder_hidden_states: torch.Tensor | None = None
    trailing_hidden_states: torch.Tensor | None = None
    modulation: torch.Tensor | None = None

    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors that are present, by attribute name."""
        return {f.name: value for f in fields(self) if (value := getattr(self, f.name)) is not None}

    def to(self, device: torch.device | str) -> SpanResiduals:
        """Copy to ``device``; dtypes are kept."""
        return SpanResiduals(**{name: t.to(device, non_blocking=True) for name, t in self.tensors().items()})


class CaptureDone(Exception):
    """Raised inside a capture forward that stops early, to spare the blocks behind the last residual."""

    def __init__(self) -> None:
        super().__init__("Every residual is captured; set the state's stops_early to False to finish the forward.")


class BlockSkipState:
    """Shared by all placeholders of one transformer: the mode, the residuals to inject, the residuals captured.

    Attributes:
        mode: What the placeholders do in the next forward.
        residuals: What they inject.
        captured: What they captured in the last forward of that mode.
        stops_early: Whether a capture forward ends with :class:`CaptureDone` once everything is captured.
    """

    def __init__(self, config: BlockSkipConfig) -> None:
        self.config = config
        self._attached = True
        self._mode = SkipMode.RUN
        self.residuals = SpanResiduals()
        self.captured = SpanResiduals()
        # Of a trailing span that is being captured: the last block's output so far, and where the tokens of the
        # span's input are in the sequence.
        self.span_output: torch.Tensor | None = None
        self.span_tokens = slice(None)
        # Outputs of recorded layers so far, by name.
        self.recorded: dict[str, torch.Tensor] = {}
        self.recorded_layers: tuple[str, ...] = ()
        self.stops_early = False

    @property
    def mode(self) -> SkipMode:
        """What the placeholders do in the next forward.

        Raises:
            ValueError: if it is set to what is no mode, or to one that needs placeholders after these were removed.
        """
        return self._mode

    @mode.setter
    def mode(self, mode: SkipMode) -> None:
        if not isinstance(mode, SkipMode):
            raise UserError(f"{mode!r} is no mode of placeholders; set one of {', '.join(map(str, SkipMode))}.")
        if mode is not SkipMode.RUN and not self._attached:
            raise UserError(f"{mode} needs the placeholders, which were removed; call apply_block_skip again.")
        self._mode = mode

    def detach(self) -> None:
        """Note that the placeholders were removed."""
        self._mode, self._attached = SkipMode.RUN, False

    @property
    def all_captured(self) -> bool:
        """Whether a capture forward has everything it is for."""
        captured = self.captured
        return (
            (not self.config.leading or captured.leading_hidden_states is not None)
            and (
                not self.config.trailing or (captured.trailing_hidden_states is not None and self.span_output is None)
            )
            and len(self.recorded) == len(self.recorded_layers)
        )

    def end_capture(self) -> None:
        """Break a capture forward off that has everything it is for, where it may be.

        Raises:
            CaptureDone: then.
        """
        if self.stops_early and self.all_captured:
            raise CaptureDone
