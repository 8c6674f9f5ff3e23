"""A diffusion transformer that trains with its kept blocks only, and can load no others."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate.utils import set_module_tensor_to_device
from diffusers import ModelMixin
from peft.tuners.tuners_utils import BaseTunerLayer
from torch.distributed.fsdp import FSDPModule

from .blocks import BlockSpans, as_names, idle_modules, list_blocks, split_blocks
from .config import BlockSkipConfig
from .hooks import Bound, apply_block_skip, check_bare, record_layers, remove_block_skip
from .loading.download import resolve_component
from .loading.models import Checkpoint
from .loading.quantization import QuantizationConfig
from .loading.streaming import Streamer, check_plain, frozen_weights_on_host, plain_device, stream
from .positions import positions_by_sample
from .state import Capture, CaptureDone, SkipMode, SpanResiduals
from .utils.errors import UserError
from .utils.norms import keep_norm_dtypes


T = TypeVar("T")


class DiTBlockSkipTransformer(Bound, torch.nn.Module):
    """A diffusers transformer whose leading and trailing spans are placeholders (DiT-BlockSkip, section 3.3).

    The wrapped model keeps its class, parameter names and block numbers, so adapters, LoRA files and pipelines work
    on :attr:`transformer` as on the full model. Skipped blocks either stay where they are, or hold no weights and
    stream them one block at a time when the whole model is needed (:meth:`from_pretrained`, ``offload_device``).
    What this class lacks is looked up in the wrapped model: ``.config`` is the diffusers config.

    Args:
        transformer: A loaded diffusers transformer.
        config: The spans to skip.
        stacks: See :func:`~blockskip_hooks.blocks.list_blocks`.
        offload_device: Move the weights of skipped blocks to host memory and stream them, block by block, to this
            device when they run. By default they stay where they are.
        recorded_layers: Names of linear layers of kept blocks whose outputs are part of the residuals, so that
            training needs no weights of theirs; see :class:`~blockskip_hooks.hooks.RecordedLayerHook`.

    Attributes:
        transformer: The wrapped model.
        spans: Its blocks: leading, kept, trailing.
        skip_state: What its placeholders share, with the :class:`~blockskip_hooks.config.BlockSkipConfig`.
        recorded_layers: As given.
        is_sharded: Whether processes share the kept weights, so that all of them must run the model equally often.

    Raises:
        ValueError: if no block would be kept or placeholders are on the model already.

    Example:
        >>> model = DiTBlockSkipTransformer.from_pretrained(folder, BlockSkipConfig(leading=19, trailing=9))
        >>> residuals = model.capture_residuals(**inputs)
        >>> prediction = model(**inputs, residuals=residuals, return_dict=False)[0]
    """

    def __init__(
        self,
        transformer: ModelMixin,
        config: BlockSkipConfig,
        stacks: str | Sequence[str] | None = None,
        *,
        offload_device: torch.device | str | None = None,
        recorded_layers: str | Sequence[str] = (),
    ) -> None:
        check_bare(transformer)
        super().__init__()
        self.transformer: ModelMixin = transformer
        self.is_sharded = isinstance(transformer, FSDPModule)
        self.spans: BlockSpans = split_blocks(list_blocks(transformer, stacks), config)
        self.recorded_layers = as_names(recorded_layers)
        self._streamer = Streamer(offload_device or "cpu")
        streamed = self.streamed_modules
        if offload_device is not None:
            check_plain(streamed)
            idle = idle_modules(transformer)
            for name, module in streamed.items():
                stream(module, self._streamer, idle=name in idle)
        keep_norm_dtypes(transformer)
        self.skip_state = apply_block_skip(transformer, config, stacks)
        # A forward that is broken off would leave gathered weights behind, and other processes waiting.
        self.skip_state.stops_early = not self.is_sharded
        self.skip_state.is_driven = True
        # Kept blocks run without the last block of the leading span beside them.
        self.skip_state._watch(self.spans.kept[0].module, lambda *_: self._streamer.make_room())
        record_layers(transformer, self.recorded_layers, self.skip_state)
        self.skip_state._handles.append(transformer.register_load_state_dict_pre_hook(_check_loaded))

    @property
    def streamed_modules(self) -> dict[str, torch.nn.Module]:
        """What training needs no weights of, by name: skipped blocks, recorded layers, what only references need."""
        return _streamed_modules(self.transformer, self.spans, self.recorded_layers)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_path: str | Path,
        config: BlockSkipConfig,
        *,
        subfolder: str | None = "transformer",
        torch_dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        variant: str | None = None,
        revision: str | None = None,
        stacks: str | Sequence[str] | None = None,
        transformer_class: type[ModelMixin] | None = None,
        recorded_layers: str | Sequence[str] = (),
        quantization: QuantizationConfig | None = None,
        shard: Callable[[torch.nn.Module, torch.device | str], None] | None = None,
        stream_cache: int = 0,
        sends_ahead: bool = False,
    ) -> DiTBlockSkipTransformer:
        """Load the kept blocks only; skipped blocks are read from the checkpoint when the whole model runs.

        The checkpoint is never whole in memory: kept weights are read tensor by tensor, skipped ones block by block,
        the next while one runs.

        Args:
            pretrained_model_path: Folder of a pipeline (or of a transformer, with ``subfolder=None``), or its id on
                the hub, from which no more than the transformer is downloaded.
            config: The spans to skip.
            subfolder: The transformer's folder inside the pipeline's.
            torch_dtype: Dtype of all weights, but for modules the model class keeps in float32.
            device: Where kept weights live and every block runs.
            variant: Weight variant in the file names, such as ``"fp16"``.
            revision: Branch, tag or commit on the hub.
            stacks: See :func:`~blockskip_hooks.blocks.list_blocks`.
            transformer_class: Class of the model, by default the one that its config names.
            recorded_layers: See the class; their weights are streamed like those of skipped blocks.
            quantization: How the linear layers of kept blocks are held; ``None`` keeps them in ``torch_dtype``.
            shard: Divides the weights of a module that is loaded on a device among processes, such as
                :func:`~blockskip_hooks.training.sharding.shard`; called for every kept block and then for the model.
                ``None`` keeps them whole. Not for quantised layers.
            stream_cache: Bytes of host memory in which skipped blocks stay once they have been read.
            sends_ahead: Whether an accelerator gets the next skipped block while one runs, so that it holds two.

        Raises:
            ValueError: if the model is not there, or weights are missing, have other shapes than the config says, or
                are not safetensors.
        """
        if not isinstance(torch_dtype, torch.dtype):
            raise UserError(f"torch_dtype is {torch_dtype!r}; give a dtype of torch, such as torch.bfloat16.")
        if not isinstance(quantization, QuantizationConfig | None):
            raise UserError(
                f"quantization is {quantization!r}; give a config, such as QuantizationConfig.named('nf4')."
            )
        device, recorded_layers = plain_device(device), as_names(recorded_layers)
        folder = resolve_component(pretrained_model_path, subfolder, variant=variant, revision=revision)
        checkpoint = Checkpoint(folder, torch_dtype, variant, transformer_class)
        transformer = checkpoint.model
        spans = split_blocks(list_blocks(transformer, stacks), config)
        streamed = _streamed_modules(transformer, spans, recorded_layers)
        kept = [block.name for block in spans.kept]
        checkpoint.load(
            device,
            without=list(streamed),
            blocks=kept,
            quantized=quantization.layers(transformer, kept, recorded_layers) if quantization else (),
            quantization=quantization,
            shard=shard,
        )
        streamer, idle = Streamer(device, stream_cache, sends_ahead=sends_ahead), idle_modules(transformer)
        for name, module in streamed.items():
            stream(module, streamer, checkpoint.weights_of(f"{name}."), idle=name in idle)
        model = cls(transformer, config, stacks, recorded_layers=recorded_layers)
        model._streamer = streamer
        return model

    def place_frozen_adapter(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Give the parameters of an adapter that is there by name, but has no gradients, their values.

        Those in skipped blocks stay in host memory and come with the block's own weights.

        Args:
            weights: The values by the parameters' full names, in the dtype that they are to have.
        """
        streamed = {
            f"{b.name}.": b.module for b in self.spans.skipped if any(p.is_meta for p in b.module.parameters())
        }
        for prefix, block in streamed.items():
            inside = {name.removeprefix(prefix): w for name, w in weights.items() if name.startswith(prefix)}
            for name, weight in inside.items():
                set_module_tensor_to_device(block, name, "meta", weight, weight.dtype)
            self._streamer.add_adapter(block, inside)
        for name, weight in weights.items():
            if not name.startswith(tuple(streamed)):
                set_module_tensor_to_device(self.transformer, name, self._streamer.device, weight, weight.dtype)

    def remove(self) -> ModelMixin:
        """Take the placeholders and the streaming off and return the model.

        Weights that were in memory are put back; blocks read from a checkpoint by :meth:`from_pretrained` are left
        without weights. A second call does nothing.
        """
        if self.skip_state._attached:
            remove_block_skip(self.transformer)
            self.skip_state._detach()
        return self.transformer

    def forward(
        self,
        *args: Any,
        residuals: SpanResiduals | None = None,
        condition_tokens: int = 0,
        img_ids_by_sample: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Run the transformer with the spans replaced by ``residuals``, or whole without them.

        Arguments and result are the wrapped model's. Gradient checkpointing, which runs blocks again during backward,
        meets these residuals again, also after other calls. With ``residuals="none"`` in the config skipped spans are
        the identity in every call; :meth:`full_model` runs them. One call runs at a time.

        Args:
            *args: As for the wrapped model.
            residuals: What stands in for the spans.
            condition_tokens: How many of the last image tokens belong to a condition image; trailing residuals do
                not have them, because the prediction is not read there.
            img_ids_by_sample: Positions of the image tokens, sample by sample, ``(B, tokens, axes)``, in place of the
                ``img_ids`` that a whole batch shares; see :func:`~blockskip_hooks.positions.positions_by_sample`.
            **kwargs: As for the wrapped model.

        Raises:
            ValueError: if ``residuals`` is something else, is not what the spans need, or has what nothing reads; if
                there are none at all in training mode with gradients; if a skipped block has LoRA that trains; if the
                placeholders were removed; if another call is running.
        """
        whole = residuals is None and self.skip_state.config.residuals != "none"
        skips = self.skip_state._attached and bool(self.spans.skipped or self.recorded_layers)
        if whole and skips and self.training and torch.is_grad_enabled():
            raise UserError(
                "A training step got no residuals, so it would run and differentiate the whole model; pass "
                "`residuals=`, or call the model under torch.no_grad() or, to train the whole of it, in full_model()."
            )
        with self.skip_state._one_call():
            self.skip_state.residuals = residuals
            self.skip_state.mode = SkipMode.RUN if whole else SkipMode.INJECT
            self.skip_state.condition_tokens = condition_tokens
            try:
                with positions_by_sample(self.transformer, img_ids_by_sample):
                    output = self.transformer(*args, **kwargs)
            except BaseException:
                self._streamer.end_pass()
                raise
        if torch.is_grad_enabled() and getattr(self.transformer, "is_gradient_checkpointing", False):
            self.skip_state._keep_for_backward(output)
        return output

    @torch.no_grad()
    def capture_residuals(
        self, *args: Any, condition_tokens: int = 0, img_ids_by_sample: torch.Tensor | None = None, **kwargs: Any
    ) -> SpanResiduals:
        """Run the model as far as needed without gradients and return what its spans contribute (Eq. 3).

        Adapters take part as they are: with LoRA at zero these are the base model's residuals.

        Args:
            *args: As for the wrapped model.
            condition_tokens: As for :meth:`forward`.
            img_ids_by_sample: As for :meth:`forward`.
            **kwargs: As for the wrapped model.

        Returns:
            The batch's residuals, in the dtype of the hidden states.

        Raises:
            ValueError: if the placeholders were removed, or another call is running.
        """
        state = self.skip_state
        if not self.spans.skipped and not self.recorded_layers:
            return SpanResiduals()
        with state._one_call():
            state.mode, state.condition_tokens = SkipMode.CAPTURE, condition_tokens
            try:
                with positions_by_sample(self.transformer, img_ids_by_sample):
                    self.transformer(*args, **kwargs)
            except CaptureDone:
                pass
            finally:
                # Nothing of it stays in memory with the state.
                capture, state._capture = state._capture, Capture()
                state.mode = SkipMode.RUN
                self._streamer.end_pass()
        if self.recorded_layers:
            outputs = [capture.recorded[name] for name in self.recorded_layers]
            capture.residuals.modulation = torch.cat(outputs, dim=1)
        return capture.residuals

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As of any module; a ``ValueError`` if the weights of skipped blocks are not in memory."""
        _check_weights(self.transformer)
        return super().state_dict(*args, **kwargs)

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Save the wrapped model, skipped blocks and all, as its own ``save_pretrained`` does.

        Raises:
            ValueError: if the weights of skipped blocks are not in memory.
        """
        _check_weights(self.transformer)
        self.transformer.save_pretrained(*args, **kwargs)

    def on_host(self) -> AbstractContextManager[None]:
        """Within this context what is resident of the frozen weights is in host memory; nothing may run.

        Raises:
            ValueError: if processes share the weights: torch knows where its parts of them are.
        """
        if self.is_sharded:
            raise UserError("Weights that processes share cannot be in host memory; leave them on the device.")
        self.free_streamed()
        return frozen_weights_on_host(self)

    def free_streamed(self) -> None:
        """Let go of streamed weights once all forwards in step have come as far: what follows needs the room."""
        self._streamer.make_room()
        self._streamer.release()

    @contextmanager
    def full_model(self) -> Iterator[ModelMixin]:
        """Let the wrapped model compute every block, streamed where needed; for forwards that follow each other."""
        self.skip_state._check_free()
        restore = self.skip_state._keep()
        self.skip_state.mode = SkipMode.RUN
        try:
            with self._streamer.repeated():
                yield self.transformer
        finally:
            restore()

    def together(self, tasks: Sequence[Callable[[], T]], between: Callable[[], None] | None = None) -> list[T]:
        """Call functions that each run this model, in step: a skipped block is read once for all of them.

        Each is halted before a block that holds no weights, and goes on once all have come to it. One of them runs at
        a time, in the order given, so each result has the bits that it would have alone; all of them have their hidden
        states in memory, and one its activations. Where processes share weights, or nothing is streamed, they are
        called one after the other.

        Args:
            tasks: The functions; they run without gradients and must not change the model.
            between: Called while all are halted; may raise to end them.

        Returns:
            What each of them returns.
        """
        streamer, keep = self._streamer, self.skip_state._keep
        with torch.no_grad():
            return [task() for task in tasks] if self.is_sharded else streamer.together(tasks, keep, between)

    @property
    def frozen_parameter_names(self) -> list[str]:
        """Names, in this module's state dict, of the parameters that do not train, whether they are there or not."""
        return [name for name, parameter in self.named_parameters() if not parameter.requires_grad]

    # torch's DDP reads it: every process has these weights, and those of skipped blocks cannot be sent.
    _ddp_params_and_buffers_to_ignore = frozen_parameter_names

    def __getattr__(self, name: str) -> Any:
        # Only called for what torch.nn.Module and this class do not have.
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("transformer"), name)


def _streamed_modules(
    transformer: torch.nn.Module, spans: BlockSpans, recorded_layers: Sequence[str]
) -> dict[str, torch.nn.Module]:
    modules = dict(transformer.named_modules())
    for name in recorded_layers:
        in_kept = any(name.startswith(f"{block.name}.") for block in spans.kept)
        if not in_kept or not isinstance(modules.get(name), torch.nn.Linear):
            raise UserError(f"recorded_layers has '{name}', which is no linear layer of a kept block; take it out.")
    # In the model's order, which is about the one that they run in.
    names = {block.name for block in spans.skipped} | set(recorded_layers) | set(idle_modules(transformer))
    return {name: module for name, module in modules.items() if name in names}


def _check_loaded(transformer: torch.nn.Module, state_dict: Mapping[str, Any], prefix: str, *_: Any) -> None:
    tuners = (module for module in transformer.modules() if isinstance(module, BaseTunerLayer))
    adapters = {part for tuner in tuners for part in tuner.adapter_layer_names}
    absent = [n for n, p in transformer.named_parameters() if p.is_meta and adapters.isdisjoint(n.split("."))]
    if given := [name for name in absent if f"{prefix}{name}" in state_dict]:
        raise UserError(
            f"{given[0]} is streamed whenever its block runs, so load_state_dict cannot change it; load the weights "
            "into the model before it is wrapped, or save them as the checkpoint that it is read from."
        )


def _check_weights(transformer: torch.nn.Module) -> None:
    if absent := sorted({name.rpartition(".")[0] for name, p in transformer.named_parameters() if p.is_meta}):
        raise UserError(
            f"The weights of skipped blocks are not in memory ({absent[0]}, say), so the whole model cannot be saved; "
            "save the LoRA by `.transformer.save_lora_adapter(folder)`: the other weights are as they were."
        )
