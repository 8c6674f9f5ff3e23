"""What a piece of work needs: bytes at its peak, by what they are, and FLOPs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from .allocator import Trace, reserved_bytes


@dataclass(frozen=True)
class Usage:
    """What a piece of work needs.

    Attributes:
        peak_bytes: Most live bytes at a time, parameters included.
        parameter_bytes: Of them, parameters of the model without LoRA, a streamed block included.
        lora_bytes: Of them, LoRA weights and their optimizer state.
        halted_bytes: What a forward that is halted before a streamed block holds, beside parameters.
        product_flops: FLOPs of matrix products and convolutions.
        attention_flops: FLOPs of attention.
        traces: The allocations of each part of the work that is done after another.
    """

    peak_bytes: int
    parameter_bytes: int
    lora_bytes: int = 0
    product_flops: int = 0
    attention_flops: int = 0
    halted_bytes: int = 0
    traces: tuple[Trace, ...] = field(default=(), compare=False, repr=False)

    @property
    def resident(self) -> tuple[int, ...]:
        """Bytes of each tensor that is there all the time; negative ones are on other devices."""
        return (*self.traces[0].resident, -self.traces[0].elsewhere) if self.traces else ()

    @cached_property
    def reserved_bytes(self) -> int:
        """Most bytes that are taken of the device: what CUDA's caching allocator reserves, elsewhere live bytes.

        What an earlier part left is given back.
        """
        return max(self.peak_bytes, *(reserved_bytes(trace) for trace in self.traces), 0)

    @property
    def activation_bytes(self) -> int:
        """The rest: inputs, activations, and gradients alive at the peak."""
        return max(0, self.peak_bytes - self.parameter_bytes - self.lora_bytes)

    def beside(self, *, parameter_bytes: int = 0, lora_bytes: int = 0, sizes: Sequence[int] | None = None) -> Usage:
        """The same work while other parameters, or LoRA weights and optimizer state, are resident.

        Args:
            parameter_bytes: Bytes of the parameters.
            lora_bytes: Bytes of LoRA weights and optimizer state.
            sizes: Bytes of each tensor of both; by default one of each.
        """
        more = (parameter_bytes, lora_bytes) if sizes is None else sizes
        return replace(
            self,
            peak_bytes=self.peak_bytes + parameter_bytes + lora_bytes,
            parameter_bytes=self.parameter_bytes + parameter_bytes,
            lora_bytes=self.lora_bytes + lora_bytes,
            traces=tuple(trace.beside(more) for trace in self.traces),
        )

    def in_step(self, wanted: int, limit: int) -> tuple[int, Usage]:
        """As many of these forwards in step as are wanted and reserve no more than ``limit``, and what they need."""
        each = max(self.halted_bytes, 1)
        count = max(1, min(wanted, 1 + (limit - self.reserved_bytes) // each))
        while True:
            halted = (count - 1) * self.halted_bytes
            traces = tuple(trace.beside([halted]) for trace in self.traces)
            usage = replace(self, peak_bytes=self.peak_bytes + halted, traces=traces)
            if count == 1 or usage.reserved_bytes <= limit:
                return count, usage
            # The allocator reserves whole segments.
            count = max(1, count - -(-(usage.reserved_bytes - limit) // each))

    def then(self, other: Usage) -> Usage:
        """This work and, after it, another: the bytes of the larger, the FLOPs of both."""
        return replace(
            max(self, other, key=lambda usage: usage.peak_bytes),
            product_flops=self.product_flops + other.product_flops,
            attention_flops=self.attention_flops + other.attention_flops,
            traces=self.traces + other.traces,
        )
