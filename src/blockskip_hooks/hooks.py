"""Placeholders: hooks that stand in for skipped blocks.

A skipped block keeps its place, its class, its signature and its parameter names; only its ``forward`` is replaced.
Everything else of the diffusers model stays as it is, so LoRA keys, configs and pipelines keep working. A placeholder
has three modes:

- *inject*: one placeholder of a span supplies what the span would have computed, the others pass their input
  through. Used in training; no weight of the span is touched.
- *capture*: the real block runs, and the leading span's output or the trailing span's residual is kept. Used when
  residuals are precomputed.
- *run*: the real block runs. Used for validation images.

A leading span's output is supplied by its last placeholder and a trailing span's residual by its first, so that spans
may cross the border between two stacks where the model joins its text and image streams into one sequence. Where
blocks see the image or the text alone, this holds for each kind of tokens.

In training hooks only read the shared state, they never count calls: under gradient checkpointing a block's forward
runs again during backward and must give the same result. Only a capture, which has no backward, writes to the state.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from accelerate.hooks import remove_hook_from_module
from diffusers.hooks import HookRegistry, ModelHook

from .blocks import Block, list_blocks, split_blocks
from .config import BlockSkipConfig
from .loading.streaming import StreamHook
from .state import BlockSkipState, SkipMode
from .utils.errors import UserError
from .utils.norms import free_norm_dtypes


PLACEHOLDER_HOOK = "blockskip_placeholder"
RECORDED_HOOK = "blockskip_recorded"


class Bound:
    """A mixin of what cannot be copied or pickled: hooks stay with the blocks that they were put on."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise UserError(
            "A transformer with placeholders can be neither copied nor pickled: its hooks stay with the blocks they "
            "were put on. Copy the transformer before, or after remove(), and wrap the copy."
        )


class PlaceholderHook(Bound, ModelHook):
    """Replaces the forward of one block of a span.

    Args:
        block: The skipped block.
        span: All blocks of its span, in execution order.
        is_leading: Whether the span is the leading one.
        state: The transformer's shared state.
    """

    def __init__(self, block: Block, span: Sequence[Block], is_leading: bool, state: BlockSkipState) -> None:
        super().__init__()
        self.block_name = block.name
        self.metadata = block.metadata
        self.only = block.only
        self._text_place = block.metadata.return_encoder_hidden_states_index or 0
        self.is_last = block.index == span[-1].index
        self.is_leading = is_leading
        beyond = [other for other in span if (other.index > block.index if is_leading else other.index < block.index)]
        # The kinds of tokens that this placeholder stands in for: the last of a leading span, the first of a trailing
        # one, that sees them.
        self.supplies = block.kinds.difference(*(other.kinds for other in beyond))
        self.state = state

    def new_forward(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        if self.state.mode is SkipMode.INJECT:
            self._check_lora(module)
            return self._inject(*args, **kwargs)
        if self.state.mode is SkipMode.CAPTURE:
            return self._capture(*args, **kwargs)
        return self.fn_ref.original_forward(*args, **kwargs)

    def _inputs(self, args: tuple, kwargs: dict[str, Any]) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """The image and the text of a positional or keyword call, where the block returns it.

        Blocks of one class may run with and without encoder hidden states; without, they return hidden states only.
        Where these hold image and text in one sequence, they count as the image.
        """
        read = self.metadata._get_parameter_from_args_kwargs
        hidden_states = read(self.metadata.hidden_states_argument_name, args, kwargs)
        if self.only == "text":
            return None, hidden_states
        if self.metadata.return_encoder_hidden_states_index is None:
            return hidden_states, None
        return hidden_states, read(self.metadata.encoder_hidden_states_argument_name, args, kwargs)

    def _output(self, image: torch.Tensor | None, text: torch.Tensor | None) -> Any:
        """Arrange the streams as the real block returns them."""
        if image is None or text is None:
            return text if image is None else image
        output: list[torch.Tensor | None] = [None, None]
        output[self.metadata.return_hidden_states_index] = image
        output[self.metadata.return_encoder_hidden_states_index] = text
        return tuple(output)

    def _inject(self, *args: Any, **kwargs: Any) -> Any:
        image, text = self._inputs(args, kwargs)
        if self.state.config.residuals != "none":
            residuals = self.state.residuals
            if image is not None and "image" in self.supplies:
                if self.is_leading:
                    image = self._checked(residuals.leading_hidden_states, image)
                else:
                    image = self._with_residual(image, residuals.trailing_hidden_states)
            if text is not None and "text" in self.supplies and self.is_leading:
                text = self._checked(residuals.leading_encoder_hidden_states, text)
        return self._output(image, text)

    def _with_residual(self, hidden_states: torch.Tensor, residual: torch.Tensor | None) -> torch.Tensor:
        """Add a trailing residual to the tokens that it has; those of a condition image are behind them."""
        sizes = [self._own_tokens(hidden_states), self.state.condition_tokens]
        image, condition = hidden_states.split(sizes, dim=1)
        image = image + self._checked(residual, image).to(image.dtype)
        return torch.cat([image, condition], dim=1) if self.state.condition_tokens else image

    def _own_tokens(self, hidden_states: torch.Tensor) -> int:
        """How many tokens a trailing residual has: those of a condition image are behind them."""
        tokens = hidden_states.shape[1]
        if not 0 <= self.state.condition_tokens < tokens:
            raise UserError(
                f"condition_tokens is {self.state.condition_tokens}, but {self.block_name} receives {tokens} tokens; "
                "give how many of these are the condition image's."
            )
        return tokens - self.state.condition_tokens

    def _check_lora(self, module: torch.nn.Module) -> None:
        if torch.is_grad_enabled() and any(p.requires_grad for n, p in module.named_parameters() if ".lora_" in n):
            raise UserError(
                f"The LoRA of {self.block_name} would never learn: the block is skipped. Add LoRA to the layers of "
                "lora_targets, or freeze this one."
            )

    def _checked(self, residual: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
        span = "leading" if self.is_leading else "trailing"
        what = f"residual of the {span} span"
        return to_like(check_residual(residual, what, self.block_name, like.shape), like)

    def _capture(self, *args: Any, **kwargs: Any) -> Any:
        span_input, span_text = self._inputs(args, kwargs)
        output = self.fn_ref.original_forward(*args, **kwargs)
        streams = output if isinstance(output, tuple) else (output,)
        hidden_states = streams[self.metadata.return_hidden_states_index]
        if self.is_leading:
            residuals = self.state._capture.residuals
            if span_input is not None and "image" in self.supplies:
                residuals.leading_hidden_states = hidden_states.detach()
            if span_text is not None and "text" in self.supplies:
                residuals.leading_encoder_hidden_states = streams[self._text_place].detach()
            self.state._capture.has_leading |= self.is_last
        elif span_input is not None:
            self._capture_trailing(span_input, hidden_states)
        self.state._end_capture()
        return output

    def _capture_trailing(self, hidden_states: torch.Tensor, output: torch.Tensor) -> None:
        # Kept on the state: the placeholders of a span are different hooks.
        capture = self.state._capture
        if "image" in self.supplies:
            capture.span_input = hidden_states
        elif capture.span_output is not None and hidden_states.shape[1] > capture.span_output.shape[1]:
            capture.span_tokens = self._find_tokens(capture.span_output, hidden_states)
        capture.span_output = output
        if self.is_last:
            assert capture.span_input is not None
            residual = output[:, capture.span_tokens].float() - capture.span_input.float()
            residual = residual[:, : self._own_tokens(residual)]
            capture.residuals.trailing_hidden_states = residual.to(output.dtype).detach()
            capture.span_input = capture.span_output = None

    def _find_tokens(self, part: torch.Tensor, whole: torch.Tensor) -> slice:
        """Where the tokens ``part`` are in ``whole``, which the model made by joining them with the text."""
        length = part.shape[1]
        for place in (slice(0, length), slice(-length, None)):
            if torch.equal(whole[:, place], part):
                return place
        raise UserError(
            f"{self.block_name} receives {whole.shape[1]} tokens after a block that returned {length}, and these are "
            "neither its first nor its last; choose spans that do not cross this border."
        )


def check_residual(residual: torch.Tensor | None, what: str, where: str, shape: Sequence[int]) -> torch.Tensor:
    """A recorded tensor that is as it is needed.

    Raises:
        ValueError: if it is missing, or is not of this shape and floating point.
    """
    if residual is None:
        raise UserError(f"No {what} at {where}: pass `residuals=` to the forward.")
    if residual.shape != torch.Size(shape):
        raise UserError(
            f"The {what} has shape {tuple(residual.shape)} but {where} needs {tuple(shape)}: it belongs to another "
            "batch, or was captured with another config."
        )
    if not residual.is_floating_point():
        raise UserError(f"The {what} has the dtype {residual.dtype}; give floating point.")
    return residual


def to_like(residual: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A recorded tensor with the device and dtype of ``like``."""
    # Under autocast layers cast what they read; a leading span's output may be wider than its input there.
    autocast = torch.is_autocast_enabled(like.device.type)
    return residual.to(like.device, residual.dtype if autocast else like.dtype)


class RecordedLayerHook(Bound, ModelHook):
    """Replaces the forward of a linear layer of a kept block whose input no LoRA can change.

    Layers that turn the timestep's and the prompt's embedding into a block's modulation are such: a large part of a
    block's weights, whose outputs are small. In *inject* mode the recorded output stands in for the layer.

    Args:
        name: Qualified name of the layer.
        place: Where its output lies in :attr:`SpanResiduals.modulation`.
        state: The transformer's shared state.
    """

    def __init__(self, name: str, place: slice, state: BlockSkipState) -> None:
        super().__init__()
        self.name = name
        self.place = place
        self.state = state

    def new_forward(self, module: torch.nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
        if self.state.mode is SkipMode.INJECT:
            shape = (hidden_states.shape[0], self.state._recorded_width)
            recorded = check_residual(self.state.residuals.modulation, "recorded output", self.name, shape)
            return to_like(recorded[:, self.place], hidden_states).reshape(*hidden_states.shape[:-1], -1)
        output = self.fn_ref.original_forward(hidden_states)
        if self.state.mode is SkipMode.CAPTURE:
            self.state._capture.recorded[self.name] = output.flatten(1).detach()
            self.state._end_capture()
        return output


def record_layers(transformer: torch.nn.Module, names: Sequence[str], state: BlockSkipState) -> None:
    """Record the outputs of linear layers with the residuals; see :class:`RecordedLayerHook`."""
    state._recorded_layers = tuple(names)
    start = 0
    for name in names:
        layer: Any = transformer.get_submodule(name)
        hook = RecordedLayerHook(name, slice(start, start + layer.out_features), state)
        HookRegistry.check_if_exists_or_initialize(layer).register_hook(hook, RECORDED_HOOK)
        start += layer.out_features
    state._recorded_width = start


def apply_block_skip(
    transformer: torch.nn.Module, config: BlockSkipConfig, stacks: str | Sequence[str] | None = None
) -> BlockSkipState:
    """Put placeholders on the skipped blocks of any loaded diffusers transformer.

    The placeholders start in *run* mode, so the model computes what it did before. A forward in *capture* mode, under
    ``torch.no_grad()``, leaves the residuals in the returned state's ``captured``; in *inject* mode the spans are
    replaced by its ``residuals``. :class:`~blockskip_hooks.transformer.DiTBlockSkipTransformer` does this per call.
    Weights are not moved. :func:`remove_block_skip` restores the model exactly.

    Args:
        transformer: A diffusers transformer whose blocks :func:`~blockskip_hooks.blocks.list_blocks` finds.
        config: The spans to skip.
        stacks: See :func:`~blockskip_hooks.blocks.list_blocks`.

    Returns:
        The state shared by the placeholders.

    Raises:
        ValueError: if placeholders are on the model already, or no block would be kept.

    Example:
        >>> state = apply_block_skip(transformer, BlockSkipConfig(leading=7, trailing=10))
        >>> state.mode = SkipMode.CAPTURE
        >>> with torch.no_grad():
        ...     transformer(**inputs)
        >>> state.mode, state.residuals = SkipMode.INJECT, state.captured
        >>> prediction = transformer(**inputs)  # kept blocks only
        >>> remove_block_skip(transformer)
    """
    check_bare(transformer)
    spans = split_blocks(list_blocks(transformer, stacks), config)
    state = BlockSkipState(config)
    for span, is_leading in ((spans.leading, True), (spans.trailing, False)):
        for block in span:
            registry = HookRegistry.check_if_exists_or_initialize(block.module)
            registry.register_hook(PlaceholderHook(block, span, is_leading, state), PLACEHOLDER_HOOK)
    if spans.skipped:
        state._watch(transformer, state._begin_forward)
    return state


def check_bare(transformer: torch.nn.Module) -> None:
    """Check that no placeholders are on a transformer, or on what it wraps.

    Raises:
        ValueError: if there are some.
    """
    modules = transformer.modules() if isinstance(transformer, torch.nn.Module) else ()
    if any(_hooks(module) for module in modules):
        raise UserError("Block skipping is applied to this transformer already; call remove_block_skip first.")


def remove_block_skip(transformer: torch.nn.Module, stacks: Sequence[str] | None = None) -> None:
    """Take every placeholder off ``transformer``; its blocks run as before, bit for bit.

    What a wrapper put on beside them goes too, as by its
    :meth:`~blockskip_hooks.transformer.DiTBlockSkipTransformer.remove`.

    Args:
        transformer: The transformer.
        stacks: Has no effect: placeholders are found wherever they are.
    """
    for module in transformer.modules():
        for name, hook in _hooks(module):
            hook.state._detach()
            module._diffusers_hook.remove_hook(name, recurse=False)  # type: ignore[union-attr, operator]
        if isinstance(getattr(module, "_hf_hook", None), StreamHook):
            remove_hook_from_module(module)
    free_norm_dtypes(transformer)


def _hooks(module: torch.nn.Module) -> list[tuple[str, Any]]:
    """The hooks of this file that are on a module, by name."""
    registry = getattr(module, "_diffusers_hook", None)
    if registry is None:
        return []
    names = (PLACEHOLDER_HOOK, RECORDED_HOOK)
    return [(name, hook) for name in names if (hook := registry.get_hook(name)) is not None]
