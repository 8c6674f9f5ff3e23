"""What a piece of work needs: bytes at its peak, by what they are, and FLOPs."""

from __future__ import annotations

from dataclasses import dataclass, replace


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
    """

    peak_bytes: int
    parameter_bytes: int
    lora_bytes: int = 0
    product_flops: int = 0
    attention_flops: int = 0
    halted_bytes: int = 0

    @property
    def activation_bytes(self) -> int:
        """The rest: inputs, activations, and gradients alive at the peak."""
        return max(0, self.peak_bytes - self.parameter_bytes - self.lora_bytes)

    def beside(self, *, parameter_bytes: int = 0, lora_bytes: int = 0) -> Usage:
        """The same work while other parameters, or LoRA weights and optimizer state, are resident."""
        return replace(
            self,
            peak_bytes=self.peak_bytes + parameter_bytes + lora_bytes,
            parameter_bytes=self.parameter_bytes + parameter_bytes,
            lora_bytes=self.lora_bytes + lora_bytes,
        )

    def in_step(self, wanted: int, limit: int) -> tuple[int, Usage]:
        """As many of these forwards in step as are wanted and need no more than ``limit``, and what they need."""
        count = max(1, min(wanted, 1 + (limit - self.peak_bytes) // max(self.halted_bytes, 1)))
        return count, replace(self, peak_bytes=self.peak_bytes + (count - 1) * self.halted_bytes)

    def then(self, other: Usage) -> Usage:
        """This work and, after it, another: the bytes of the larger, the FLOPs of both."""
        return replace(
            max(self, other, key=lambda usage: usage.peak_bytes),
            product_flops=self.product_flops + other.product_flops,
            attention_flops=self.attention_flops + other.attention_flops,
        )
