"""accelerate's config: what its launcher passes on is honoured or refused by name."""

from __future__ import annotations

import argparse
import dataclasses
import os
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from accelerate.commands.config.config_args import ClusterConfig
from accelerate.commands.launch import launch_command_parser
from accelerate.utils import launch

from blockskip_hooks.utils.errors import UserError
from blockskip_hooks.utils.launcher import ENTRIES, FSDP_SWITCH, check_launcher, use_all_cores
from tests import script


pytestmark = pytest.mark.usefixtures("no_launcher")


def launched(**entries: Any) -> dict[str, str]:
    """Variables that accelerate's launcher would set, by its own code, in any of its ways to launch."""
    args = launch_command_parser().parse_args(["script.py"])
    for action in launch_command_parser()._actions:
        # Every entry has some value, so that each is passed on.
        if getattr(args, action.dest, "") is None and action.type in (None, str, int, float):
            setattr(args, action.dest, "1" if action.type in (None, str) else 1)
    for name, value in {
        "num_processes": 2,
        "num_machines": 1,
        "machine_rank": 0,
        "mixed_precision": "fp8",
        "dynamo_backend": "inductor",
        "gpu_ids": "0,1",
        "main_process_port": 29511,
        "mpirun_hostfile": None,
        "deepspeed_fields_from_accelerate_config": "zero_stage",
        "fp8_override_linear_precision": (False, False, False),
        "parallelism_config_cp_size": 2,
        "parallelism_config_sp_size": 2,
        "fsdp_sync_module_states": True,
        **dict.fromkeys(("use_cpu", "debug", "enable_cpu_affinity", "use_fsdp", "use_megatron_lm"), True),
        **dict.fromkeys(("use_parallelism_config", "use_deepspeed", "downcast_bf16"), True),
        **dict.fromkeys(("no_python", "module"), False),
        **entries,
    }.items():
        setattr(args, name, value)
    before, found = dict(os.environ), {}
    for part in (
        lambda: launch.prepare_simple_launcher_cmd_env(argparse.Namespace(**vars(args)))[1],
        lambda: launch.prepare_multi_gpu_env(argparse.Namespace(**vars(args))),
        lambda: launch.prepare_deepspeed_cmd_env(argparse.Namespace(**vars(args)))[1],
        lambda: launch.prepare_tpu(argparse.Namespace(**{**vars(args), "mixed_precision": "bf16"}), {})[1],
    ):
        found |= {name: value for name, value in part().items() if before.get(name) != value}
    return found


@pytest.fixture
def everything(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    monkeypatch.setattr(launch, "is_fp8_available", lambda: True)
    monkeypatch.setattr(launch, "is_torch_xla_available", lambda **_: True)
    for name in ("gradient_accumulation_steps", "gradient_clipping"):
        assert any(action.dest == name for action in launch_command_parser()._actions)
    return launched()


# Beginnings of further variables, by the one whose refusal is theirs.
REFUSED_AS_A_WHOLE = {
    "ACCELERATE_FP8_": "ACCELERATE_MIXED_PRECISION",
    "ACCELERATE_DEEPSPEED_": "ACCELERATE_USE_DEEPSPEED",
    "ACCELERATE_CONFIG_DS_FIELDS": "ACCELERATE_USE_DEEPSPEED",
    "MEGATRON_LM_": "ACCELERATE_USE_MEGATRON_LM",
    "PARALLELISM_CONFIG_": "ACCELERATE_USE_PARALLELISM_CONFIG",
}


def test_every_entry_that_the_launcher_passes_on_is_classified(everything: dict[str, str]):
    assert len(everything) > 80
    unknown = [
        name
        for name in everything
        if name not in ENTRIES and not name.startswith(tuple(REFUSED_AS_A_WHOLE)) and name != "PYTHONPATH"
    ]
    assert unknown == []
    # What is refused as a whole is so by an entry that is.
    assert {ENTRIES[switch].honoured is not None for switch in REFUSED_AS_A_WHOLE.values()} == {True}


def test_every_field_of_a_config_has_a_place():
    """Those of the launcher itself decide where processes start; the others arrive as variables."""
    of_the_launcher = """compute_environment distributed_type num_processes machine_rank num_machines rdzv_backend
        same_network main_training_function mpirun_config commands command_file tpu_name tpu_zone tpu_use_sudo tpu_vm
        tpu_env""".split()  # noqa: SIM905
    parts = """fp8_config deepspeed_config fsdp_config parallelism_config megatron_lm_config dynamo_config""".split()  # noqa: SIM905
    named = {entry.name.split(":")[0] for entry in ENTRIES.values()}
    fields = {field.name for field in dataclasses.fields(ClusterConfig)}
    assert fields - {*of_the_launcher, *parts} <= named


@pytest.mark.parametrize(
    ("launched", "threads", "used"), [(True, "1", "every core"), (True, "3", "as before"), (False, "1", "as before")]
)
def test_a_process_alone_on_a_cpu_uses_the_cores_there_are(
    launched: bool, threads: str, used: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("OMP_NUM_THREADS", threads)
    if launched:
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    set_to: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", set_to.append)
    monkeypatch.setattr(psutil, "cpu_count", lambda logical: 64)
    monkeypatch.setattr(psutil.Process, "cpu_affinity", lambda self: [0, 1, 5], raising=False)
    use_all_cores()
    assert set_to == ([3] if used == "every core" else [])


@pytest.mark.parametrize("variable", ENTRIES)
def test_an_entry_is_honoured_or_refused_by_name(variable: str, monkeypatch: pytest.MonkeyPatch):
    entry = ENTRIES[variable]
    if entry.switch is not None:
        # Without FSDP its entries mean nothing.
        monkeypatch.setenv(variable, "anything")
        check_launcher()
        monkeypatch.setenv(FSDP_SWITCH, "true")
        monkeypatch.setenv("FSDP_VERSION", "2")
    for value in entry.honoured or ():
        monkeypatch.setenv(variable, value.upper())
        check_launcher()
    monkeypatch.setenv(variable, "other")
    if entry.honoured is None:
        check_launcher()
        return
    with pytest.raises(UserError) as refused:
        check_launcher()
    assert str(refused.value).startswith(f"accelerate's config has {entry.name}") and entry.instead in str(
        refused.value
    )


def test_fsdp_of_the_first_version_is_refused_also_where_none_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(FSDP_SWITCH, "true")
    with pytest.raises(UserError, match="fsdp_version: 1, .* set fsdp_version: 2"):
        check_launcher()


def test_shipped_configs_ask_for_what_is_honoured(monkeypatch: pytest.MonkeyPatch):
    defaults = launch_command_parser().parse_args(["script.py"])
    fsdp = {name: value for name, value in vars(defaults).items() if name.startswith("fsdp_")}
    fsdp |= {"fsdp_version": 2, "fsdp_ignored_modules": None}
    plain = {"mixed_precision": "bf16", "use_megatron_lm": False, "use_parallelism_config": False}
    variables = launched(**plain, **fsdp)
    kept = {name: value for name, value in variables.items() if name.startswith("FSDP_")}
    for name, value in {**kept, FSDP_SWITCH: "true", "ACCELERATE_MIXED_PRECISION": "bf16"}.items():
        monkeypatch.setenv(name, value)
    assert len(kept) > 8
    check_launcher()


def test_fp8_is_refused_before_anything_is_read_and_gives_way_to_the_flag(
    model: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")
    assert script.load_script().main(script.settings(Path("no model"), photos, tmp_path / "out")) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: accelerate's config has mixed_precision: fp8, ") and "bf16" in line
    assert not (tmp_path / "out").exists()
    check_launcher("bf16")
