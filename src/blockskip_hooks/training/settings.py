"""The settings of a training run: one frozen object, which the command line and its files are turned into."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from ..config import PatchMode
from ..selection import parse_skip_blocks
from ..utils.errors import UserError
from .flags.model import MachineFlags, ModelFlags, SettingsFlags
from .flags.photos import PhotoFlags, PriorPreservationFlags
from .flags.results import OutputFlags, ValidationFlags
from .flags.skipping import BlockSkippingFlags, PatchSamplingFlags
from .flags.training import LoopFlags, LoraFlags, OptimizerFlags


@dataclass(frozen=True, kw_only=True)
class TrainSettings(
    SettingsFlags,
    ModelFlags,
    PhotoFlags,
    BlockSkippingFlags,
    PatchSamplingFlags,
    PriorPreservationFlags,
    LoraFlags,
    LoopFlags,
    OptimizerFlags,
    ValidationFlags,
    OutputFlags,
    MachineFlags,
):
    """Value of every flag of the training script, under the flag's name; what each one means says its help text.

    Amounts of memory and disk are numbers of bytes. ``skip_blocks`` is a text of one of the forms that
    :func:`~blockskip_hooks.selection.parse_skip_blocks` reads. Values do not change: a run that needs others makes a
    new object by :meth:`with_values`.

    Attributes:
        given: Names of the flags that the command line or a file held, whether or not their value is the default.
        family_flags: Values of the flags that only some model families have.
    """

    given: frozenset[str]
    family_flags: Mapping[str, Any]

    def flags(self) -> dict[str, Any]:
        """Every flag's value by name, those of some families among them."""
        own = {field.name: getattr(self, field.name) for field in fields(self)}
        del own["given"], own["family_flags"]
        return {**own, **self.family_flags}

    def plain(self) -> dict[str, Any]:
        """Every flag by name, as a file or a tracker holds it: numbers, words, and lists as they are typed."""
        return {name: plain_value(name, value) for name, value in self.flags().items()}

    def with_values(self, values: Mapping[str, Any]) -> TrainSettings:
        """These settings with other values of some flags.

        Raises:
            UserError: if a name is not a flag's.
        """
        unknown = sorted(values.keys() - self.flags().keys())
        if unknown:
            raise UserError(f"Defaults for unknown flags: {', '.join(unknown)}; remove them or correct the names.")
        families = {name: values.get(name, value) for name, value in self.family_flags.items()}
        own = {name: value for name, value in values.items() if name not in families}
        return replace(self, family_flags=families, **own)

    @property
    def output_folder(self) -> Path:
        return Path(self.output_dir)

    @property
    def class_folder(self) -> Path:
        """Folder of the class images; with prior preservation it is always given."""
        return Path(self.class_data_dir or "")

    @property
    def condition_flag(self) -> str | None:
        """The flag that says where condition images are; ``None`` for training without them."""
        named = (name for name in ("cond_image_column", "cond_data_dir") if self.family_flags.get(name) is not None)
        return next(named, None)

    @property
    def looks_up_blocks(self) -> bool:
        """Whether a selection table or the rule decides which blocks are skipped."""
        choice = parse_skip_blocks(self.skip_blocks)
        # A memory budget chooses by itself unless the flag was typed.
        chosen_by_budget = self.memory_budget is not None and "skip_blocks" not in self.given
        return choice == "auto" or isinstance(choice, int) or chosen_by_budget

    @property
    def skips(self) -> bool:
        """Whether blocks are skipped, as far as the flags alone tell."""
        return parse_skip_blocks(self.skip_blocks) not in ("none", 0, (0, 0))

    @property
    def patch_mode(self) -> PatchMode:
        """What ``--patch_sampling`` comes to, as far as the flags alone tell."""
        if self.patch_sampling != "auto":
            return self.patch_sampling
        return "dynamic" if self.skips else "none"

    @property
    def samples_per_process_step(self) -> int:
        """Samples of a kind that a process trains on in an optimiser step."""
        return self.train_batch_size * self.gradient_accumulation_steps


def plain_value(name: str, value: Any) -> Any:
    """A flag's value as it is typed: texts stay texts, and lists with separators become one."""
    if name == "aspect_ratio_buckets" and value is not None:
        return ";".join(f"{height},{width}" for height, width in value)
    if name == "validation_prompt" and value is not None:
        # One is a text, as upstream's scripts have it.
        return value[0] if len(value) == 1 else list(value)
    if name == "report_to":
        return ",".join(value) or "none"
    if isinstance(value, tuple):
        return ",".join(value)
    # A number of bytes says how it was typed.
    return value if type(value) in (bool, int, float, str, list, type(None)) else str(value)
