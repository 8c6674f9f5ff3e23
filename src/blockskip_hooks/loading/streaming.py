"""Modules without weights of their own: each gets them when it runs, and lets go of them afterwards.

While one module runs, a thread reads the next one's weights: into one buffer on a CPU, into pinned memory for an
accelerator. From there they are sent when the module runs or, where the device has room for two modules, as soon as
they are read, on a stream of their own.
"""

from __future__ import annotations

import contextvars
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from accelerate.utils import set_module_tensor_to_device
from greenlet import getcurrent, greenlet

from ..utils.errors import UserError
from .checkpoint_index import CheckpointWeights
from .host_buffers import buffer_for, name_in_checkpoint, num_bytes, own_parameters, read_buffer
from .quantization import follow_weight, move_weight


T = TypeVar("T")
Weights = Mapping[str, torch.Tensor]


class StreamHook(AlignDevicesHook):
    """accelerate's offloading, with weights that a :class:`Streamer` has at hand.

    ``.to(device, dtype)`` of a model around the module is followed.
    """

    def __init__(self, streamer: Streamer, weights: Weights | None, idle: bool) -> None:
        super().__init__(execution_device=streamer.device, offload=True, weights_map=weights, place_submodules=True)
        self.streamer, self.idle = streamer, idle

    def init_hook(self, module: torch.nn.Module) -> torch.nn.Module:
        module = super().init_hook(module)
        self.streamer.add(module, self.weights_map, self.idle)
        module._apply = functools.partial(self._convert, module)  # type: ignore[method-assign]
        return module

    def _convert(self, module: torch.nn.Module, convert: Callable[..., Any], recurse: bool = True) -> torch.nn.Module:
        """In place of ``torch.nn.Module._apply``, which cannot move what is not there: weights come as asked for."""
        for parameter in module.parameters():
            like = convert(torch.empty(0, dtype=parameter.dtype, device=self.streamer.device))
            self.streamer.move(like.device, forget=like.dtype != parameter.dtype)
            parameter.data = parameter.data.to(like.dtype)
        for part in module.modules():
            part._buffers.update({n: b if b is None else convert(b) for n, b in part._buffers.items()})
        return module

    def pre_forward(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        self.streamer.enter(module)
        return args, kwargs

    def post_forward(self, module: torch.nn.Module, output: Any) -> Any:
        self.streamer.leave(module)
        return output

    def detach_hook(self, module: torch.nn.Module) -> torch.nn.Module:
        del module._apply
        self.streamer.remove(module)
        return super().detach_hook(module)


class Fetched(NamedTuple):
    """Weights of a module, ready or on their way.

    Attributes:
        tensors: By name.
        buffer: What they lie in on the device, if they were sent there.
        arrival: Comes once all of them are there.
    """

    tensors: Weights
    buffer: torch.Tensor | None = None
    arrival: torch.Event | None = None


class Streamer:
    """Hands weights to modules that run one after the other, in about the same order every time.

    Args:
        device: Where they run.
        cache_bytes: Host memory in which weights that were read from a checkpoint may stay, those read first.
        reads_ahead: Whether the next module's weights are read while one runs.
        sends_ahead: Whether what was read is sent to an accelerator at once, which then holds two modules.
    """

    def __init__(
        self,
        device: torch.device | str,
        cache_bytes: int = 0,
        *,
        reads_ahead: bool = True,
        sends_ahead: bool = False,
    ) -> None:
        self.device = plain_device(device)
        self._reads_ahead, self._sends_ahead = reads_ahead, sends_ahead
        self._cache_bytes = self._room = cache_bytes
        self._weights: dict[torch.nn.Module, Weights] = {}
        self._cached: dict[torch.nn.Module, Weights] = {}
        self._adapters: dict[torch.nn.Module, Weights] = {}
        self._idle: set[torch.nn.Module] = set()
        self._order: list[torch.nn.Module] = []
        self._pass: list[torch.nn.Module] = []
        self._ahead: dict[torch.nn.Module, Future[Fetched]] = {}
        self._present: torch.nn.Module | None = None
        self._largest: int | None = None
        self._repeats = self._takes_turns = False
        self._keep: Callable[[], Callable[[], None]] = lambda: lambda: None
        self._stream: torch.Stream | None = None
        self._left: torch.Event | None = None
        self._pool: ThreadPoolExecutor | None = None

    @property
    def _pins(self) -> bool:
        # Apple's devices share the host's memory, and have no streams.
        return self._reads_ahead and self.device.type not in ("cpu", "mps", "meta")

    def move(self, device: torch.device, *, forget: bool) -> None:
        """Hand out weights on another device from now on; ``forget`` what is in host memory in another dtype."""
        if device.type != "meta" and device != self.device:
            self.release()
            self.device, self._stream, self._left = plain_device(device), None, None
        if forget:
            self.release()
            self._cached, self._room, self._largest = {}, self._cache_bytes, None

    def add(self, module: torch.nn.Module, weights: Weights, idle: bool) -> None:
        """Take up a module, which is expected to run after those before it or, if it is idle, not at all."""
        self._weights[module] = weights
        if idle:
            self._idle.add(module)
        else:
            self._order.append(module)
        self._largest = None

    def add_adapter(self, module: torch.nn.Module, weights: Weights) -> None:
        """Let the parameters of a frozen adapter come with a module's own; they stay in host memory."""
        self._adapters[module] = weights

    def remove(self, module: torch.nn.Module) -> None:
        """Forget a module."""
        self.release()
        self._adapters.pop(module, None)
        self._weights.pop(module, None)
        self._cached.pop(module, None)
        self._idle.discard(module)
        self._order = [other for other in self._order if other is not module]
        self._pass, self._largest = [], None

    def enter(self, module: torch.nn.Module) -> None:
        """Give a module its weights, and begin to read those of the next."""
        if self._takes_turns and self._present is not module:
            # The others come to where they need it too, before it is there.
            self._halt()
        if self._present is not module:
            self._load(module)

    @torch.inference_mode(False)  # What is loaded serves forwards of other modes too.
    def _load(self, module: torch.nn.Module) -> None:
        self._unload()
        self._note(module)
        if module not in self._ahead:
            self._forget_ahead()
        fetched = self._ahead.pop(module).result() if module in self._ahead else self._fetch(module, None)
        if fetched.arrival is not None:
            assert fetched.buffer is not None
            current = torch.accelerator.current_stream(self.device)
            current.wait_event(fetched.arrival)
            # Its memory is not given to another before what runs on it now has been computed.
            fetched.buffer.record_stream(current)
        weights = {**fetched.tensors, **self._adapters.get(module, {})}
        names = {name: name_in_checkpoint(name) for name, _ in module.named_parameters()}
        if absent := [name for name, source in names.items() if source not in weights]:
            raise UserError(
                f"{absent[0]} of a skipped block has no weights to stream; add adapters to the layers of lora_targets "
                "only, or load them before the model is wrapped and leave offload_device out."
            )
        for name, source in names.items():
            value = weights[source].to(self.device, non_blocking=self._pins)
            set_module_tensor_to_device(module, name, self.device, value=value, clear_cache=False)
        self._present = module
        del fetched, weights
        if self._reads_ahead:
            self._look_ahead(module)

    def leave(self, module: torch.nn.Module) -> None:
        """Take a module its weights, unless another forward that takes turns with this one comes to use them."""
        if not self._takes_turns:
            self._unload()

    def make_room(self) -> None:
        """Take the present module its weights once all forwards in step have used it: what runs now needs none."""
        if self._takes_turns and self._present is not None:
            self._halt()
            self._unload()

    def end_pass(self) -> None:
        """Let go of what was read ahead, where no other forward follows at once."""
        if not (self._repeats or self._takes_turns):
            self.release()

    def release(self) -> None:
        """Let go of all weights but those that stay in host memory."""
        self._unload()
        self._forget_ahead()
        self._pass = []

    @contextmanager
    def repeated(self) -> Iterator[None]:
        """Within this context the first module is read again while the last one runs: forward follows forward."""
        before, self._repeats = self._repeats, True
        try:
            yield
        finally:
            self._repeats = before
            if not before:
                self.release()

    def together(
        self,
        tasks: Sequence[Callable[[], T]],
        keep: Callable[[], Callable[[], None]],
        between: Callable[[], None] | None = None,
    ) -> list[T]:
        """Call functions that run the same forwards so that each module's weights are fetched once for all of them.

        Each function is halted where it needs a module that is not there, and goes on when all the others need it too.
        One of them runs at a time, in the order given, so no result depends on the others. Gradients must be
        disabled outside of this call: what is switched on inside of a function stays on for the others.

        Args:
            tasks: The functions.
            keep: Called where one is halted; returns what restores the state that the others change.
            between: Called while all are halted; may raise to end them.
        """
        if len(tasks) < 2 or not self._weights or self._takes_turns:
            return [task() for task in tasks]
        lanes = [greenlet(task) for task in tasks]
        for lane in lanes:
            lane.gr_context = contextvars.copy_context()
        results: dict[greenlet, T] = {}
        self._keep, self._takes_turns = keep, True
        try:
            while len(results) < len(lanes):
                for lane in lanes:
                    if lane not in results:
                        if between is not None:
                            between()
                        result = lane.switch()
                        if lane.dead:
                            results[lane] = result
        finally:
            for lane in lanes:
                lane.throw()
            self._takes_turns = False
            self._unload()
            self.end_pass()
        return [results[lane] for lane in lanes]

    def _halt(self) -> None:
        """Let the other forwards in step come as far as this one."""
        restore = self._keep()
        getcurrent().parent.switch()
        restore()

    def _note(self, module: torch.nn.Module) -> None:
        """Learn the order in which modules run."""
        if module in self._pass:
            self._order, self._pass = self._pass, []
        self._pass.append(module)

    def _look_ahead(self, module: torch.nn.Module) -> None:
        """Begin to read what follows ``module``, not more than the largest module."""
        place = self._order.index(module) + 1 if module in self._order else len(self._order)
        following = self._order[place:] + (self._order[: place - 1] if self._repeats else [])
        if self._largest is None:
            self._largest = max(map(num_bytes, self._weights.keys() - self._idle), default=0)
        room = self._largest
        for other in following:
            room -= num_bytes(other)
            if room < 0:
                return
            if other not in self._ahead:
                if self._pool is None:
                    self._pool = ThreadPoolExecutor(1, thread_name_prefix="read-ahead")
                self._ahead[other] = self._pool.submit(self._fetch, other, self._left)

    def _forget_ahead(self) -> None:
        futures, self._ahead = list(self._ahead.values()), {}
        wait([future for future in futures if not future.cancel()])

    @torch.inference_mode(False)
    def _unload(self) -> None:
        module, self._present = self._present, None
        if module is None:
            return
        for name, _ in module.named_parameters():
            set_module_tensor_to_device(module, name, "meta", clear_cache=False)
        if self._pins:
            self._left = torch.accelerator.current_stream(self.device).record_event()

    def _fetch(self, module: torch.nn.Module, left: torch.Event | None) -> Fetched:
        """The weights of a module, in host memory or on their way to the device.

        Args:
            module: The module.
            left: When the modules before the one that runs now are done with their memory.
        """
        weights = self._cached.get(module, self._weights[module])
        if not isinstance(weights, CheckpointWeights):
            # Those of text encoders are read here, the others are in memory.
            weights = {name: weights[name] for name, _ in own_parameters(module)}
        elif (size := num_bytes(module)) <= self._room:
            self._room -= size
            self._cached[module] = weights = read_buffer(module, weights)
        if self._pins:
            return self._pin(module, weights, left)
        return Fetched(read_buffer(module, weights) if isinstance(weights, CheckpointWeights) else weights)

    def _pin(self, module: torch.nn.Module, weights: Weights, left: torch.Event | None) -> Fetched:
        """Bring weights into pinned memory tensor by tensor and, if they are sent ahead, from there to the device.

        The pinned memory is the allocator's, which gives none away before the copies from it are done.
        """
        if left is not None:
            # A host that is ahead of its device would fill memory with modules that wait for their turn.
            left.synchronize()
        if self.device.index is not None:
            # Threads begin at the first device.
            torch.accelerator.set_device_index(self.device.index)
        if self._stream is None:
            self._stream = torch.Stream(self.device)
        with self._stream:
            buffer, views = buffer_for(module, self.device, {}) if self._sends_ahead else (None, {})
            pinned: dict[str, torch.Tensor] = {}
            for name, parameter in own_parameters(module):
                part = pinned[name] = torch.empty(parameter.shape, dtype=parameter.dtype, pin_memory=True)
                if isinstance(weights, CheckpointWeights):
                    weights.read(name, part)
                else:
                    part.copy_(weights[name])
                if buffer is not None:
                    views[name].copy_(pinned.pop(name), non_blocking=True)
            return Fetched(pinned) if buffer is None else Fetched(views, buffer, self._stream.record_event())


def stream(module: torch.nn.Module, streamer: Streamer, weights: Weights | None = None, *, idle: bool = False) -> None:
    """Let a module hold its weights only while it runs.

    Args:
        module: A block, or a layer.
        streamer: Of this and other modules.
        weights: Its tensors by name, read at every forward; by default a host copy of what the module holds now.
        idle: Whether it hardly ever runs, so that it is not read ahead.
    """
    add_hook_to_module(module, StreamHook(streamer, weights, idle))


def check_plain(modules: Mapping[str, torch.nn.Module]) -> None:
    """Check that modules, by name, hold weights that can be in host memory and come one module at a time.

    Raises:
        UserError: naming the first weight that cannot.
    """
    for name, parameter in (item for prefix, module in modules.items() for item in module.named_parameters(prefix)):
        is_quantized = type(parameter).__module__.startswith("bitsandbytes")
        if parameter.is_meta or ".lora_" in name or is_quantized:
            what = "not in memory" if parameter.is_meta else "bitsandbytes' own" if is_quantized else "an adapter's"
            raise UserError(
                f"offload_device takes plain weights, but {name} is {what}; leave offload_device out, or wrap the "
                "model before."
            )


@contextmanager
def frozen_weights_on_host(model: torch.nn.Module) -> Iterator[None]:
    """Within this context the frozen weights of ``model`` that are resident are in host memory; nothing may run."""
    frozen = [(p, p.device) for p in model.parameters() if not p.requires_grad and not p.is_meta]
    int8_layers = [module for module in model.modules() if hasattr(getattr(module, "state", None), "SCB")]

    def move(device: Callable[[torch.device], torch.device]) -> None:
        for parameter, home in frozen:
            move_weight(parameter, device(home))
        for layer in int8_layers:
            follow_weight(layer)

    move(lambda home: torch.device("cpu"))
    try:
        yield
    finally:
        move(lambda home: home)


def plain_device(device: torch.device | str) -> torch.device:
    """``device``, without the number that processes on the CPU are given: ``.to("cpu:0")`` would copy parameters."""
    device = torch.device(device)
    return torch.device("cpu") if device.type == "cpu" else device
