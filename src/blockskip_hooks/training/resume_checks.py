"""Whether a checkpoint is whole and belongs to a run: from its header and numbers, before any model loads."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..loading.checkpoint_index import tensor_shapes
from ..loading.checks import lora_layers
from ..loading.lora_files import WEIGHTS_NAME
from ..utils.digests import component_digests, folder_digest
from ..utils.errors import UserError, one_line
from ..utils.formatting import fit_lines
from .checkpoints import OPTIMIZER_NAME, SCHEMA, find_checkpoint, list_checkpoints, read_state, summary
from .resume_flags import kept_flags
from .run import Run


_FIELDS: dict[str, type | tuple[type, ...]] = {
    "step": int,
    "seed": int,
    "loss": list,
    "optimizer": dict,
    "scheduler": dict,
    "stretch_steps": int,
}


ADVICE = "use the settings it was made with, or start anew in another --output_dir."


def made_with(run: Run) -> dict[str, Any]:
    """What decides a run's weights, and so what it must share with a checkpoint that it goes on from."""
    path = run.family.model_path
    return {
        "skip": [run.config.leading, run.config.trailing],
        "layers": hashlib.sha256("\n".join(run.targets).encode()).hexdigest(),
        "optimizer": run.settings.optimizer.lower() + (" of 8 bits" if run.settings.use_8bit_adam else ""),
        # Checkpoints of before have a digest under "weights" that most tensors were no part of.
        "base_weights": folder_digest(path / "transformer"),
        "components": component_digests(path, ("vae", *run.family.text_components)),
        "assistant": run.assistant and run.assistant.digest,
        "photos": [photo.digest for photo in run.photos],
        "prompts": [photo.caption or run.settings.instance_prompt or "" for photo in run.photos],
        "flags": kept_flags(run),
    }


def choose_checkpoint(run: Run) -> Path | None:
    """The checkpoint that ``--resume_from_checkpoint`` means, or ``None`` to start anew.

    Of ``latest`` the one that a run like this wrote last; where there are others only, the last of them, which
    :func:`check_checkpoint` refuses.

    Raises:
        UserError: if a named checkpoint is not a complete one.
    """
    named = find_checkpoint(run.output_dir, run.settings.resume_from_checkpoint)
    if named is None or run.settings.resume_from_checkpoint != "latest":
        return named
    found, now = list_checkpoints(run.output_dir), made_with(run)
    own = [path for path in found if not differences(summary(path).get("made_with", {}), now)]
    return _saved_last(own or found)


def _saved_last(checkpoints: Sequence[Path]) -> Path:
    return max(checkpoints, key=lambda path: summary(path).get("saved_at", 0))


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """In words how what a checkpoint was made with differs from :func:`made_with` of a run.

    Older checkpoints know less; what one does not know is not compared.
    """
    # Those of before there were assistants had none.
    then = {**now, "assistant": None, **then} if then else dict(now)
    found = []
    was, is_now = ({"transformer": made["base_weights"], **made["components"]} for made in (then, now))
    if parts := sorted(name for name in {**was, **is_now} if was.get(name) != is_now.get(name)):
        found.append(f"on other weights of {' and '.join(parts)}")
    if then["photos"] != now["photos"]:
        found.append(f"on other photos ({len(then['photos'])}, now {len(now['photos'])})")
    prompts = zip(then["prompts"], now["prompts"])
    if other := next(((one_line(old), one_line(new)) for old, new in prompts if old != new), None):
        found.append("with the prompt '{}' (now '{}')".format(*other))
    if then["skip"] != now["skip"]:
        found.append("with --skip_blocks {},{} (now {},{})".format(*then["skip"], *now["skip"]))
    elif then["layers"] != now["layers"]:
        found.append("with other LoRA layers")
    if then["assistant"] != now["assistant"]:
        way = "with" if then["assistant"] is None else "another" if now["assistant"] else "without"
        found.append(f"{'without' if way == 'with' else 'with'} --assistant_lora (now {way})")
    if then["optimizer"] != now["optimizer"]:
        found.append(f"with the optimizer {then['optimizer']} (now {now['optimizer']})")
    # Patches of before had no other positions.
    flags = {**now["flags"], "patch_positions": "patch", **then["flags"]}
    return found + [_flag(name, flags[name], value) for name, value in now["flags"].items() if flags[name] != value]


def _flag(name: str, then: Any, now: Any) -> str:
    """A flag's two values in words."""
    is_now = "without" if now in (None, False) else "with" if now is True else now
    if then in (None, False):
        return f"without --{name} (now {is_now})"
    return f"with --{name}{'' if then is True else f' {then}'} (now {is_now})"


def describe_output(run: Run, checkpoint: Path | None, num_steps: int) -> str:
    """What earlier runs left in ``--output_dir``, for the first screen; empty where that is nothing.

    Args:
        run: The run.
        checkpoint: What it goes on from; ``None`` if it begins.
        num_steps: Steps of the whole run.
    """
    found = list_checkpoints(run.output_dir)
    # Digests of a large model take seconds, which a folder without checkpoints need not cost.
    now, own = made_with(run) if found else {}, summary(checkpoint).get("run") if checkpoint else None
    like, other = list[Path](), list[Path]()
    differing: list[str] = []
    for path in found:
        state = summary(path)
        if checkpoint is not None and state.get("run") == own:
            continue
        here = differences(state.get("made_with", {}), now)
        differing = here or differing
        (other if here else like).append(path)
    lines = []
    if like:
        fits = checkpoint is None and summary(_saved_last(like)).get("step", 0) <= num_steps
        advice = "; --resume_from_checkpoint latest goes on with it" if fits else ""
        lines.append(f"holds {', '.join(path.name for path in like)} of an earlier run like this one{advice}")
    if other:
        lines.append(f"holds {', '.join(path.name for path in other)} of another run, made {', '.join(differing)}")
    if lines:
        lines.append(
            "they are not counted, and one whose name is needed becomes checkpoint-N.earlier-1; give another "
            "--output_dir to keep the LoRA and the report too"
        )
    elif checkpoint is None and (run.output_dir / WEIGHTS_NAME).is_file():
        lines.append("holds the LoRA of an earlier run, which this one replaces; give another --output_dir to keep it")
    return fit_lines(f"Output   {run.output_dir} {'; '.join(lines)}.") if lines else ""


def check_checkpoint(checkpoint: Path, run: Run, num_steps: int) -> None:
    """Check that a checkpoint can be read, and that it is one of this run or of one like it.

    Args:
        checkpoint: Its folder.
        run: The run that is to continue it, with the blocks that it will skip.
        num_steps: Steps of the whole run.

    Raises:
        UserError: one line that says what differs, or which file is damaged.
    """
    where = f"--resume_from_checkpoint {checkpoint}"
    state = read_state(checkpoint)
    if not isinstance(state, dict) or state.get("schema") != SCHEMA:
        raise UserError(f"{where} holds no state of schema {SCHEMA}; name another one.")
    damaged = [name for name, kind in _FIELDS.items() if not isinstance(state.get(name, ...), kind)]
    if damaged:
        raise UserError(f"{where} is damaged: its state lacks {', '.join(damaged)}; name another one.")
    try:
        lora = tensor_shapes(checkpoint / WEIGHTS_NAME)
        tensor_shapes(checkpoint / OPTIMIZER_NAME)
    except ValueError as error:
        raise UserError(f"{where} cannot be read ({error}); name another one.") from error
    if differing := differences(state.get("made_with", {}), made_with(run)):
        raise UserError(f"{where} is of another run, made {', '.join(differing)}; {ADVICE}")
    _check_lora(lora, run, where)
    if state["step"] > num_steps:
        settings = run.settings
        flag = "max_train_steps" if settings.max_train_steps else "num_train_epochs"
        raise UserError(
            f"{where} has {state['step']} steps done, and --{flag} {settings.flags()[flag]} is a run of {num_steps}; "
            "raise it, or name an earlier checkpoint."
        )


def _check_lora(found: dict[str, tuple[int, ...]], run: Run, where: str) -> None:
    """Compare the layers and the rank of a checkpoint's LoRA to those of the run."""
    layers = lora_layers(found)
    if layers.keys() != set(run.targets):
        differing = sorted(layers.keys() ^ set(run.targets))
        raise UserError(
            f"{where} was made with other LoRA layers than this run ({len(differing)} differ, first {differing[0]}); "
            f"{ADVICE}"
        )
    for name, shape in layers.items():
        wanted = (run.settings.rank, run.skeleton.transformer.get_submodule(name).in_features)
        if shape != wanted:
            raise UserError(
                f"{where} was made with another rank or model: its LoRA of {name} has the shape {shape}, and this "
                f"run's {wanted}; {ADVICE}"
            )
    trains_text = any(name.startswith("text_encoder") for name in found)
    if trains_text != bool(run.settings.train_text_encoder):
        was = "with" if trains_text else "without"
        raise UserError(f"{where} was made {was} --train_text_encoder; {ADVICE}")
