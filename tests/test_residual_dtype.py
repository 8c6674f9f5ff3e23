"""Records in float8: half the disk, a bounded error, and a budget that holds."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from blockskip_hooks import BlockSkipConfig, DiTBlockSkipTransformer, SpanResiduals
from blockskip_hooks.config import PatchSamplingConfig
from blockskip_hooks.planning.request import PlanRequest
from blockskip_hooks.planning.stages import RECORD_OVERHEAD, plan_run
from blockskip_hooks.residuals.dtype import PACKED, pack_record, packed_bytes, unpack_record
from blockskip_hooks.residuals.store import ResidualStore
from blockskip_hooks.training.flags.types import parse_bytes
from tests import script
from tests.plans import load_preset
from tests.tiers import fast_first
from tests.tiny import TINY_FAMILIES, TinyFamily


SPANS = "1,2"
LARGEST_ERROR = 0.04
"""Relative error that a prediction with residuals in float8 may have; measured are 1.4 to 3.0 %, see the README."""


def record_of(tokens: int = 6, width: int = 40, dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    # Tokens of very different magnitude, as the residual streams of large models have.
    sizes = torch.logspace(-4, 4, tokens)[:, None]
    names = ("latents", "modulation", *PACKED)
    return {name: (torch.randn(tokens, width, generator=generator) * sizes).to(dtype) for name in names}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_each_token_keeps_three_significant_bits(dtype: torch.dtype):
    record = {name: tensor.to(dtype) for name, tensor in record_of(dtype=torch.float32).items()}
    restored = unpack_record(pack_record(record), dtype)
    assert restored.keys() == record.keys()
    for name in PACKED:
        assert restored[name].dtype == dtype
        largest = record[name].float().abs().amax(dim=-1, keepdim=True)
        error = (restored[name].float() - record[name].float()).abs()
        # Half a unit in the last of three places, or of the smallest steps of the format.
        assert (error <= record[name].float().abs() / 15 + largest * 2**-16).all()
    assert all(torch.equal(restored[name], record[name]) for name in ("latents", "modulation"))


def test_a_packed_record_has_float8_values_and_a_scale_per_token():
    record = record_of()
    packed = pack_record(record)
    for name in PACKED:
        assert packed[name].dtype == torch.float8_e4m3fn and packed[name].shape == record[name].shape
        scale = packed[f"{name}_scale"]
        assert scale.dtype == torch.float32 and scale.shape == (len(record[name]), 1)
        stored = sum(t.numel() * t.element_size() for t in (packed[name], scale))
        assert stored == packed_bytes(record[name])
    assert packed["latents"] is record["latents"] and packed["modulation"] is record["modulation"]


def test_tokens_of_zeros_and_of_the_largest_numbers_stay_finite():
    values = torch.stack([torch.zeros(4), torch.full((4,), 3e38), torch.full((4,), -1e-30)])
    restored = unpack_record(pack_record({"trailing_hidden_states": values}), torch.float32)["trailing_hidden_states"]
    assert torch.equal(restored[0], values[0])
    assert torch.allclose(restored[1:], values[1:], rtol=0.01, atol=0)


def test_plain_records_are_read_as_they_are():
    record = record_of()
    restored = unpack_record(record, torch.float32)
    assert all(restored[name] is tensor for name, tensor in record.items())


def test_float8_records_survive_the_disk(tmp_path: Path):
    packed = pack_record(record_of())
    ResidualStore(tmp_path, {"seed": 0}).write({"instance-00000000": packed})
    read = ResidualStore(tmp_path, {"seed": 0}).read("instance-00000000")
    assert read.keys() == packed.keys()
    assert all(torch.equal(read[name].view(torch.uint8), packed[name].view(torch.uint8)) for name in PACKED)


def test_predictions_with_float8_residuals_are_close(tiny: TinyFamily):
    """E1 within a tolerance: a full forward against one whose residuals went through float8."""
    config = BlockSkipConfig(leading=1, trailing=2)
    model = DiTBlockSkipTransformer(tiny.make_transformer(), config, tiny.family.block_stacks)
    inputs = tiny.make_inputs(2)
    exact = model.capture_residuals(**inputs).tensors()
    rows = [pack_record({name: tensor[row] for name, tensor in exact.items()}) for row in range(2)]
    restored = [unpack_record(row, torch.float32) for row in rows]
    residuals = SpanResiduals(**{name: torch.stack([row[name] for row in restored]) for name in exact})
    with torch.no_grad():
        full, close = (model(**inputs, residuals=r, return_dict=False)[0] for r in (None, residuals))
    full, close = (torch.cat([part.flatten() for part in p]) if isinstance(p, list) else p for p in (full, close))
    error = float((close - full).norm() / full.norm())
    assert 1e-4 < error < LARGEST_ERROR


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return script.save_photos(tmp_path_factory.mktemp("photos"), [(128, 128), (128, 96)])


Run = Callable[..., Path]


def runner(tiny: TinyFamily, photos: Path, folder: Path) -> Run:
    extra = [part for flag, value in tiny.flags.items() for part in (f"--{flag}", str(value))]

    def run(name: str, *flags: str) -> Path:
        settings = {"resolution": tiny.resolution, "text_tokens": tiny.text_tokens}
        return script.train(tiny.folder, photos, folder / name, "--skip_blocks", SPANS, *extra, *flags, **settings)

    return run


def shard_tensors(store: Path) -> dict[str, torch.Tensor]:
    tensors = {}
    for shard in store.glob("*.safetensors"):
        with safe_open(shard, framework="pt") as file:
            tensors |= {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    return tensors


@pytest.fixture(scope="module")
def finished(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs that keep their records, plain and in float8."""
    folder = tmp_path_factory.mktemp("runs")
    run = runner(TINY_FAMILIES[0], photos, folder)
    for kind in ("auto", "float8"):
        run(kind, "--residual_dtype", kind, "--residual_dir", str(folder / f"{kind}-records"))
    return folder


def test_a_run_stores_residuals_in_float8_and_the_rest_as_before(finished: Path):
    plain, packed = (shard_tensors(finished / f"{kind}-records") for kind in ("auto", "float8"))
    assert set(plain) == {key for key in packed if not key.endswith("_scale")}
    for key, tensor in plain.items():
        if key.rpartition("/")[2] in PACKED:
            assert packed[key].dtype == torch.float8_e4m3fn
            restored = packed[key].float() * packed[f"{key}_scale"]
            assert (restored - tensor).norm() < 0.05 * tensor.norm()
        else:
            assert torch.equal(packed[key], tensor)


def test_plan_and_report_say_what_float8_takes(finished: Path):
    for kind in ("auto", "float8"):
        planned = json.loads((finished / kind / "plan.json").read_text())["residuals"]
        report = json.loads((finished / kind / "run_report.json").read_text())["residuals"]
        sizes: dict[str, int] = {}
        for key, tensor in shard_tensors(finished / f"{kind}-records").items():
            sample = key.partition("/")[0]
            sizes[sample] = sizes.get(sample, 0) + tensor.numel() * tensor.element_size()
        records = {size for sample, size in sizes.items() if not sample.startswith("modulation")}
        assert records == {planned["record_bytes"]}
        assert report["dtype"] == {"auto": "float32", "float8": "float8_e4m3fn"}[kind]
    plain, packed = (json.loads((finished / k / "plan.json").read_text())["residuals"] for k in ("auto", "float8"))
    assert packed["record_bytes"] < 0.45 * plain["record_bytes"]


def test_training_on_float8_records_is_training_nearly_the_same(finished: Path):
    plain, packed = (script.losses(finished / kind) for kind in ("auto", "float8"))
    assert packed != plain
    assert packed == pytest.approx(plain, rel=0.05)


def test_records_of_another_dtype_are_not_reused(finished: Path, photos: Path, capsys: pytest.CaptureFixture):
    run = runner(TINY_FAMILIES[0], photos, finished)
    with pytest.raises(AssertionError, match="ended with 1"):
        run("other", "--residual_dtype", "float8", "--residual_dir", str(finished / "auto-records"))
    assert "residual_dtype" in capsys.readouterr().err


def folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


@pytest.mark.parametrize("kind", fast_first(["auto", "float8"]))
def test_the_residual_budget_is_never_exceeded_on_disk(
    kind: str, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """After each write, with several stretches and prior preservation."""
    run = runner(TINY_FAMILIES[0], photos, tmp_path)
    sizes: list[int] = []
    original = ResidualStore.write

    def spy(store: ResidualStore, records: Any) -> None:
        original(store, records)
        sizes.append(folder_bytes(store.directory))

    monkeypatch.setattr(ResidualStore, "write", spy)
    script.save_photos(tmp_path / "classes", [(128, 128)] * 2)
    flags = ("--residual_dtype", kind, "--residual_dir", str(tmp_path / "records"), "--max_train_steps", "5")
    flags += ("--with_prior_preservation", "--num_class_images", "2", "--class_prompt", "a cat")
    flags += ("--class_data_dir", str(tmp_path / "classes"))
    budget = {"auto": "85KB", "float8": "55KB"}[kind]
    run("out", *flags, "--residual_budget", budget)
    planned = json.loads((tmp_path / "out" / "plan.json").read_text())["residuals"]
    assert planned["stretches"] > 1 and len(sizes) > 1
    assert max(sizes) <= parse_bytes(budget)
    # Nor is it wasted.
    assert max(sizes) > parse_bytes(budget) / 2


@pytest.mark.slow
def test_records_behind_the_checkpoint_do_not_add_to_the_disk(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A run that is killed in its second stretch and resumes in its first drops what the second has made."""
    run = runner(TINY_FAMILIES[0], photos, tmp_path)
    flags = ("--residual_dir", str(tmp_path / "records"), "--checkpointing_steps", "1", "--max_train_steps", "4")
    budget = ("--residual_budget", "45KB")
    run("out", *flags, *budget)
    assert json.loads((tmp_path / "out" / "plan.json").read_text())["residuals"]["stretches"] == 2
    left = {path.name for path in (tmp_path / "records").glob("*.safetensors")}
    assert left
    for number in (2, 3, 4):
        (tmp_path / "out" / f"checkpoint-{number}").rename(tmp_path / f"later-{number}")
    seen: list[tuple[set[str], int]] = []
    original = ResidualStore.write

    def spy(store: ResidualStore, records: Any) -> None:
        original(store, records)
        seen.append(({path.name for path in store.directory.iterdir()}, folder_bytes(store.directory)))

    monkeypatch.setattr(ResidualStore, "write", spy)
    run("out", *flags, *budget, "--resume_from_checkpoint", "latest")
    assert not left & seen[0][0]
    assert max(size for _, size in seen) <= parse_bytes("45KB")


def flux_plan(residual_dtype: Any) -> dict[str, Any]:
    preset = load_preset("flux.1-dev")
    config = BlockSkipConfig(leading=19, trailing=9)
    targets = preset.lora_targets(config)
    request = PlanRequest(
        family=preset.family,
        transformer_config=preset.transformer_config,
        config=config,
        patch=PatchSamplingConfig(min_size=256, max_size=512, multiple=16, mode="dynamic"),
        rank=16,
        lora_targets=targets,
        recorded_layers=preset.recorded_layers(config, targets),
        text_tokens=512,
        precompute_batch_size=1,
        num_samples=500,
        residual_dtype=residual_dtype,
    )
    return plan_run(request)


@pytest.mark.parametrize(("residual_dtype", "largest"), [("auto", 6.4e6), ("float8", 3.3e6)])
def test_a_record_of_flux_at_256_px_is_small(residual_dtype: str, largest: float):
    """Simulated; the modulation, which all samples of a timestep share, apart."""
    residuals = flux_plan(residual_dtype)["residuals"]
    assert 0.9 * largest < residuals["record_bytes"] <= largest
    each = residuals["record_bytes"] + residuals["modulation_bytes"] + RECORD_OVERHEAD
    assert residuals["bytes"] == 500 * each
