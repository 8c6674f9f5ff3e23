"""Frozen weights that processes share: divided among them, and the same results bit for bit."""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator, DistributedType
from torch.nn.parallel import DistributedDataParallel

from blockskip_hooks import BlockSkipConfig, DiTBlockSkipTransformer
from blockskip_hooks.cli.arguments import parse_args
from blockskip_hooks.cli.preparation import prepare_run
from blockskip_hooks.cli.run_plan import plan_for
from blockskip_hooks.loading.component_config import load_config
from blockskip_hooks.lora import add_lora, lora_targets
from blockskip_hooks.training.sharding import asks_for_sharding, prepare_model, shard
from tests import script
from tests.test_several_processes import SHARED
from tests.tiny import TINY_FAMILIES


def measure(rank: int, address: dict[str, str], models: list[tuple[str, str, list[str]]], results: Path) -> None:
    """Body of a process: each model whole and shared, and what is different."""
    os.environ.update(address, RANK=str(rank), WORLD_SIZE="2")
    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True)
    # As on GPUs, where accelerate looks for divided weights.
    accelerator.state.distributed_type = DistributedType.MULTI_GPU
    lines = {}
    for name, folder, layers in models:
        (tiny,) = (tiny for tiny in TINY_FAMILIES if tiny.name == name)
        # Written once, by the test.
        vars(tiny)["folder"] = Path(folder)
        config = BlockSkipConfig(leading=1, trailing=1)
        transformer_class = tiny.make_family().transformer_class(load_config(tiny.folder / "transformer"))
        inputs, outputs, bytes_held = tiny.make_inputs(2), [], []
        for shared in (False, True):
            model = DiTBlockSkipTransformer.from_pretrained(
                tiny.folder,
                config,
                stacks=tiny.family.block_stacks,
                transformer_class=transformer_class,
                shard=shard if shared else None,
            )
            kept = [f"transformer.{block.name}." for block in model.spans.kept]
            bytes_held.append(
                sum(
                    (p.to_local() if shared else p).nbytes  # type: ignore[attr-defined]
                    for key, p in model.named_parameters()
                    if key.startswith(tuple(kept))
                )
            )
            add_lora(model.transformer, layers, rank=2, alpha=2, dropout=0.0, seed=0)
            if shared:
                assert isinstance(prepare_model(accelerator, model), DistributedDataParallel)
            residuals = model.capture_residuals(**inputs, return_dict=False)
            prediction = model(**inputs, residuals=residuals, return_dict=False)[0]
            prediction = torch.stack(prediction) if isinstance(prediction, list) else prediction
            prediction.square().mean().backward()
            gradients = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
            outputs.append({**residuals.tensors(), "prediction": prediction.detach(), **gradients})
        whole, shared = outputs
        differing = [key for key in whole.keys() | shared.keys() if not torch.equal(whole[key], shared[key])]
        lines[name] = {"differing": differing, "gradients": len(gradients), "held": bytes_held[1] / bytes_held[0]}
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    results.with_name(f"{rank}.json").write_text(json.dumps(lines))


@pytest.mark.slow
def test_every_family_computes_the_same_with_shared_weights(tmp_path: Path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free.getsockname()[1])}
    models = []
    for tiny in TINY_FAMILIES:
        spans = BlockSkipConfig(leading=1, trailing=1)
        model = DiTBlockSkipTransformer(tiny.make_transformer(), spans, tiny.family.block_stacks)
        layers = lora_targets(model, tiny.family.lora_layers, tiny.family.text_stream_layers)
        models.append((tiny.name, str(tiny.folder), layers))
    context = multiprocessing.get_context("forkserver")
    ranks = [
        context.Process(target=measure, args=(rank, address, models, tmp_path / "results.json")) for rank in range(2)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    assert [process.exitcode for process in ranks] == [0, 0]
    for rank in range(2):
        lines = json.loads((tmp_path / f"{rank}.json").read_text())
        assert lines.keys() == {tiny.name for tiny in TINY_FAMILIES}
        for name, line in lines.items():
            assert line["differing"] == [], name
            assert line["gradients"] > 0, name
            # Matrices of few rows are divided unevenly.
            assert 0.4 < line["held"] < 0.65, name


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "distributed_type: DEEPSPEED, which no run can follow"),
        ({"ACCELERATE_USE_FSDP": "true"}, "fsdp_version: 1, which no run can follow: set fsdp_version: 2"),
        ({**SHARED, "FSDP_ACTIVATION_CHECKPOINTING": "true"}, "give --gradient_checkpointing"),
        ({**SHARED, "FSDP_OFFLOAD_PARAMS": "true"}, "skip more blocks"),
        ({**SHARED, "FSDP_RESHARD_AFTER_FORWARD": "false"}, "needs more memory than whole weights"),
    ],
    ids=["DeepSpeed", "FSDP1", "its checkpointing", "offloading", "no resharding"],
)
def test_what_is_not_supported_is_refused_in_one_line(
    variables: dict[str, str], said: str, model: Path, photos: Path, tmp_path: Path, monkeypatch, capsys
):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert script.load_script().main(script.settings(model, photos, tmp_path / "out")) == 2
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error"))
    assert said in line
    assert not (tmp_path / "out" / "plan.json").exists()


@pytest.mark.parametrize(
    "flags", [("--quantization", "int8"), ("--memory_budget", "1GB", "--memory_options", "checkpointing", "nf4")]
)
def test_quantised_weights_are_not_divided(
    flags: tuple[str, ...], model: Path, photos: Path, tmp_path: Path, monkeypatch, capsys
):
    for name, value in {**SHARED, "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    assert script.load_script().main(script.settings(model, photos, tmp_path, *flags)) == 2
    assert "--quantization, also as one of --memory_options, and accelerate's FSDP" in capsys.readouterr().err


def test_one_process_shares_nothing(monkeypatch):
    for name, value in SHARED.items():
        monkeypatch.setenv(name, value)
    assert not asks_for_sharding()
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert asks_for_sharding()
    # Otherwise transformers finds nothing to stream of large text encoders.
    assert os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] == "False"


PRIOR = ("--with_prior_preservation", "--class_prompt", "a dog", "--class_data_dir", "no photos yet")


def test_the_plan_leaves_out_what_other_processes_hold(model: Path, photos: Path, tmp_path: Path):
    args = parse_args(script.settings(model, photos, tmp_path, "--skip_blocks", "1,1", "--keep_modulation", *PRIOR))
    run = prepare_run(args)
    assert len(run.skeleton.spans.kept) == 3
    whole = plan_for(run, torch.float32, 16)
    shared = plan_for(replace(run, shares_weights=True), torch.float32, 16)
    blocks = [sum(p.numel() for p in block.module.parameters()) * 4 for block in run.skeleton.spans.kept]
    # A sixteenth of all, the block that runs and the next.
    elsewhere = sum(blocks) - sum(blocks) // 16 - sum(sorted(blocks)[-2:])
    assert elsewhere > 0
    saved = {
        stage["name"]: stage["parameter_bytes"] - other["parameter_bytes"]
        for stage, other in zip(whole["stages"], shared["stages"], strict=True)
    }
    assert (saved["encode"], saved["train"]) == (0, elsewhere)
    # Made by processes that have all of the weights, the second streamed block where there is room for it.
    second = min(sum(p.numel() for p in block.module.parameters()) * 4 for block in run.skeleton.spans.skipped)
    sent = [plan["stages"][0]["sends_ahead"] for plan in (whole, shared)]
    assert whole["stages"][0]["name"] == "class_images" and saved["class_images"] == second * (sent[0] - sent[1])
    assert not any(stage.get("vae_alone") for stage in shared["stages"] if stage["name"] != "class_images")
    # Its peak may be in another phase than before.
    assert 0 < saved["precompute"] <= elsewhere + second * (sent[0] - sent[1])
