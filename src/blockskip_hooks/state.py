"""What the placeholders of one transformer share: their mode, the residuals to inject, the residuals captured."""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from .config import BlockSkipConfig
from .utils.errors import UserError


class SkipMode(enum.Enum):
    """What the placeholders of a transformer do in a forward.

    Attributes:
        INJECT: Skipped blocks do not run; the state's ``residuals`` stand in for them. For training.
        CAPTURE: Every block runs, and what the spans contribute is left in the state's ``captured``.
        RUN: Every block runs as if there were no placeholders. For validation images.
    """

    INJECT = "inject"
    CAPTURE = "capture"
    RUN = "run"


@dataclass
class SpanResiduals:
    """What the skipped spans contribute to one batch (DiT-BlockSkip, Eq. 3). No tensor carries a gradient.

    Attributes:
        leading_hidden_states: Image tokens after the leading span, ``(batch, image_tokens, dim)``. The span's input
            does not depend on the LoRA, so its output itself is stored: the same as adding the residual, but exact
            in every dtype. ``None`` if no block of the span sees the image.
        leading_encoder_hidden_states: Text tokens after the leading span, ``(batch, text_tokens, dim)``; ``None``
            for models whose blocks do not update the text. Where the span's blocks see the text alone, they are the
            same for all samples of a prompt.
        trailing_hidden_states: Residual of the image tokens over the trailing span, ``(batch, image_tokens, dim)``.
            After the last block only the image tokens are read, so the text is not needed, nor are the tokens of a
            condition image. In models that run text and image as one sequence, the tokens are those of that
            sequence, here and in the leading span.
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

    @classmethod
    def cat(cls, records: Sequence[SpanResiduals]) -> SpanResiduals:
        """Join the residuals of several samples or batches to those of one batch, in their order.

        Raises:
            ValueError: if they are no list of residuals, of different spans, or of other shapes than another's.

        Example:
            >>> residuals = SpanResiduals.cat([records[3], records[7]])
        """
        if isinstance(records, SpanResiduals) or not all(isinstance(one, SpanResiduals) for one in records):
            raise UserError("SpanResiduals.cat takes a list of SpanResiduals, such as capture_residuals returns.")
        tensors = [record.tensors() for record in records]
        if not tensors or any(one.keys() != tensors[0].keys() for one in tensors):
            raise UserError("Residuals of one batch must be some, and of the same spans; capture them with one model.")
        for name in tensors[0]:
            shapes = {tuple(one[name].shape[1:]) for one in tensors}
            if len(shapes) > 1:
                raise UserError(
                    f"{name} of the residuals have the shapes {' and '.join(map(str, sorted(shapes)))} behind the "
                    "batch; samples of one batch need one image size and one length of text."
                )
        return cls(**{name: torch.cat([one[name] for one in tensors]) for name in tensors[0]})

    def to(self, device: torch.device | str) -> SpanResiduals:
        """Copy to ``device``; dtypes are kept."""
        # A host would read what has not arrived yet.
        waits = torch.device(device).type == "cpu"
        return SpanResiduals(**{name: t.to(device, non_blocking=not waits) for name, t in self.tensors().items()})


class CaptureDone(Exception):
    """Raised inside a capture forward that stops early, to spare the blocks behind the last residual."""

    def __init__(self) -> None:
        super().__init__("Every residual is captured; set the state's stops_early to False to finish the forward.")


@dataclass
class Capture:
    """What one capture forward has so far.

    Attributes:
        residuals: What is complete.
        has_leading: Whether the leading span has run.
        recorded: Outputs of recorded layers, by name.
        span_input: Image tokens that the trailing span received.
        span_output: Image tokens, or all, after the last of its blocks that ran.
        span_tokens: Where the tokens of the span's input are in ``span_output``.
    """

    residuals: SpanResiduals = field(default_factory=SpanResiduals)
    has_leading: bool = False
    recorded: dict[str, torch.Tensor] = field(default_factory=dict)
    span_input: torch.Tensor | None = None
    span_output: torch.Tensor | None = None
    span_tokens: slice = field(default_factory=lambda: slice(None))


class BlockSkipState:
    """Shared by all placeholders of one transformer: the mode, the residuals to inject, the residuals captured.

    Args:
        config: The spans.

    Attributes:
        config: The spans.
        condition_tokens: Tokens at the end of the image's that belong to a condition image, in the next forward.
        stops_early: Whether a capture forward ends with :class:`CaptureDone` once everything is captured.
        is_driven: Whether a wrapper begins all forwards in *inject* mode, so that one begun otherwise is a mistake.
    """

    def __init__(self, config: BlockSkipConfig) -> None:
        self.config = config
        self.condition_tokens = 0
        self.stops_early = False
        self.is_driven = False
        self._mode = SkipMode.RUN
        self._residuals = SpanResiduals()
        self._capture = Capture()
        self._recorded_layers: tuple[str, ...] = ()
        self._recorded_width = 0
        self._attached = True
        self._in_wrapper = False
        self._handles: list[RemovableHandle] = []

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
        if mode is SkipMode.CAPTURE:
            self._capture = Capture()

    @property
    def residuals(self) -> SpanResiduals:
        """What placeholders inject; ``None`` stands for nothing.

        Raises:
            ValueError: if it is set to what is no residuals, or to some that nothing of this config reads.
        """
        return self._residuals

    @residuals.setter
    def residuals(self, residuals: SpanResiduals | None) -> None:
        if not isinstance(residuals, SpanResiduals | None):
            raise UserError(
                f"`residuals=` is a {type(residuals).__name__}; give what capture_residuals returned, and for records "
                "of several samples SpanResiduals.cat(records)."
            )
        residuals = residuals or SpanResiduals()
        read = {"leading": self.config.leading, "trailing": self.config.trailing, "modulation": self._recorded_layers}
        surplus = [name for name in residuals.tensors() if not read[name.partition("_")[0]]]
        if surplus and self._attached:
            raise UserError(
                f"The residuals have {surplus[0]}, which nothing reads with leading={self.config.leading}, "
                f"trailing={self.config.trailing}: they are of another config; capture them again."
            )
        self._residuals = residuals

    @property
    def captured(self) -> SpanResiduals:
        """What the last forward in capture mode captured; every such forward makes a new object."""
        return self._capture.residuals

    def _check_free(self) -> None:
        """Check that no call of the wrapper is running: what placeholders read here is for one at a time.

        Raises:
            ValueError: if one is.
        """
        if self._in_wrapper:
            raise UserError(
                "Another call of this model is running, in another thread say, and its placeholders serve one at a "
                "time; let calls wait for each other."
            )

    @contextmanager
    def _one_call(self) -> Iterator[None]:
        """Around a call of the wrapper, which is the only one."""
        self._check_free()
        self._in_wrapper = True
        try:
            yield
        finally:
            self._in_wrapper = False

    def _watch(self, module: torch.nn.Module, look: Callable[..., None]) -> None:
        """Call something before every forward of ``module`` until the placeholders are removed."""
        self._handles.append(module.register_forward_pre_hook(look))

    def _begin_forward(self, module: torch.nn.Module, args: tuple[Any, ...]) -> None:
        if self._mode is SkipMode.CAPTURE:
            self._capture = Capture()
        elif self._mode is SkipMode.INJECT and self.is_driven and not self._in_wrapper:
            raise UserError(
                "The transformer was called without the model around it, whose last call left residuals of its own in "
                "place; call it inside model.full_model() to run every block, or call the model itself."
            )

    def _keep(self) -> Callable[[], None]:
        """Keep the state of a forward that is halted, or comes again; returns what restores it."""
        kept = self._mode, self._capture, self._residuals, self.condition_tokens, self._in_wrapper
        self._in_wrapper = False

        def restore() -> None:
            if self._attached:
                self._mode, self._capture, self._residuals, self.condition_tokens, self._in_wrapper = kept

        return restore

    def _keep_for_backward(self, output: Any) -> None:
        """Let the backward of a forward meet its state, whatever came between: checkpointing runs blocks again."""
        restore = self._keep()

        def begin(gradient: torch.Tensor) -> None:
            restore()
            for handle in handles:
                # The residuals are not held any longer: the loss may be, until the next batch is there.
                handle.remove()

        tensors = [leaf for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor) and leaf.requires_grad]
        handles = [tensor.register_hook(begin) for tensor in tensors]

    def _detach(self) -> None:
        """Note that the placeholders were removed."""
        self._mode, self._residuals, self._attached = SkipMode.RUN, SpanResiduals(), False
        self._recorded_layers = ()
        for handle in self._handles:
            handle.remove()

    def _end_capture(self) -> None:
        """End a capture forward early that has everything it is for, if ``stops_early``.

        Raises:
            CaptureDone: if it ends.
        """
        capture = self._capture
        if (
            self.stops_early
            and not torch.compiler.is_compiling()  # No exception leaves what is compiled.
            and (capture.has_leading or not self.config.leading)
            and (not self.config.trailing or capture.residuals.trailing_hidden_states is not None)
            and len(capture.recorded) == len(self._recorded_layers)
        ):
            raise CaptureDone
