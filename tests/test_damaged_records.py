"""Records that go bad, before training or under it: found, said and made again, with the same weights in the end."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from blockskip_hooks.residuals.loader import read_ahead
from blockskip_hooks.residuals.store import DamagedRecord, ResidualStore, recorded_seed
from blockskip_hooks.training.history import History
from blockskip_hooks.training.records import RecordSource
from tests import script
from tests.script import assert_same_weights
from tests.tiers import fast_first, fast_rows


FLAGS = ("--skip_blocks", "1,2", "--precompute_batch_size", "2", "--upcast_before_saving", "--skip_final_inference")
STEPS = 4


@pytest.fixture(scope="module")
def whole(model: Path, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing happens to, its records kept in ``records`` beside its output."""
    folder = tmp_path_factory.mktemp("whole")
    return script.train(model, photos, folder / "out", *FLAGS, "--residual_dir", str(folder / "records"))


@pytest.fixture
def train(model: Path, photos: Path, tmp_path: Path):
    """Run the script on the records in ``records``."""

    def run(*flags: str, name: str = "out") -> Path:
        return script.train(
            model, photos, tmp_path / name, *FLAGS, "--residual_dir", str(tmp_path / "records"), *flags
        )

    return run


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("records-*.safetensors"))


def flip(path: Path) -> None:
    """Change one bit of the last tensor."""
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


DAMAGE = {"a bit": flip, "cut short": cut, "deleted": Path.unlink, "empty": lambda path: path.write_bytes(b"")}


def records_made(output: Path) -> int:
    return json.loads((output / "run_report.json").read_text())["residuals"]["records"]


@pytest.mark.parametrize("damage", fast_first(DAMAGE.values()), ids=DAMAGE)
def test_a_bad_shard_is_computed_again_and_no_other(train, whole: Path, tmp_path: Path, damage, caplog):
    records = shutil.copytree(whole.parent / "records", tmp_path / "records")
    bad = shards(records)[1]
    damage(bad)
    output = train()
    # Two samples to a forward, and no other record depends on these.
    assert records_made(output) == 2
    assert len(shards(records)) == STEPS
    assert_same_weights(output, whole)
    assert (bad.name in caplog.text) == (damage is flip)


@pytest.mark.parametrize("workers", fast_first(["0", "1"]))
@pytest.mark.parametrize("damage", fast_first(DAMAGE.values()), ids=DAMAGE)
def test_a_shard_that_goes_bad_in_training_is_computed_again(
    train, whole: Path, tmp_path: Path, damage, workers: str, monkeypatch: pytest.MonkeyPatch, caplog
):
    original = RecordSource.loader
    hit: list[str] = []

    def train_on_bad_records(self, steps):
        if not hit:
            for path in shards(tmp_path / "records")[::2]:
                damage(path)
                hit.append(path.name)
        return original(self, steps)

    monkeypatch.setattr(RecordSource, "loader", train_on_bad_records)
    output = train("--dataloader_num_workers", workers)
    assert len(hit) == STEPS // 2 and all(name in caplog.text for name in hit)
    assert records_made(output) == STEPS * 2 + len(hit) * 2
    assert_same_weights(output, whole)


@pytest.mark.slow
def test_a_disk_that_is_gone_is_one_line_that_names_the_file(
    train, whole: Path, model: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    records, output = tmp_path / "records", tmp_path / "out"
    original = History.end_step

    def lose_the_disk(self):
        step = original(self)
        if self.step == 1:
            shutil.rmtree(records)
            records.write_text("not a folder")
        return step

    monkeypatch.setattr(History, "end_step", lose_the_disk)
    flags = script.settings(
        model, photos, output, *FLAGS, "--residual_dir", str(records), "--checkpointing_steps", "1"
    )
    AcceleratorState._reset_state(reset_partial_state=True)
    assert script.load_script().main(flags) == 1
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error"))
    assert str(records) in line
    records.unlink()
    assert_same_weights(train("--resume_from_checkpoint", "latest"), whole)


def test_a_run_begun_again_computes_what_is_missing(train, whole: Path, tmp_path: Path):
    records = shutil.copytree(whole.parent / "records", tmp_path / "records")
    for path in shards(records)[:3]:
        path.unlink()
    assert records_made(train(name="first")) == 6
    assert records_made(train(name="second")) == 0
    assert_same_weights(tmp_path / "first", whole)
    assert_same_weights(tmp_path / "second", whole)


@pytest.mark.slow
def test_a_shard_with_part_of_a_forward_gives_the_same_weights(train, whole: Path, tmp_path: Path):
    """Another run's forwards may have held other samples: what is there is neither written again nor mixed up."""
    train("--precompute_batch_size", "3", name="threes")
    kept = "instance-00000000/latents"
    for path in shards(tmp_path / "records"):
        with safe_open(path, framework="pt") as file:
            if kept not in file.keys():  # noqa: SIM118
                path.unlink()
    again = train(name="pairs")
    assert records_made(again) == 8 - 3
    names = Counter(key for path in shards(tmp_path / "records") for key in load_file(path) if "latents" in key)
    assert len(names) == 8 and set(names.values()) == {1}
    for name, value in script.weights(whole).items():
        assert (script.weights(again)[name] - value).abs().max() < 1e-5, name


def test_nothing_but_its_own_files_is_deleted(train, whole: Path, tmp_path: Path):
    records = shutil.copytree(whole.parent / "records", tmp_path / "records")
    mine = [
        *(records / name for name in ("notes.txt", "records-1.safetensors", "photos.safetensors", "a.tmp")),
        *(
            tmp_path / "out" / name
            for name in ("checkpoint-best/x", "checkpoint-1.tmp.txt", "checkpoint-9-copy.tmp/x")
        ),
        *(tmp_path / "out" / name for name in ("residuals/records-2.safetensors", "my.tmp", "checkpoint-7/other")),
    ]
    for path in mine:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("kept")
    train("--overwrite_residuals", "--seed", "4", "--checkpointing_steps", "1", "--checkpoints_total_limit", "1")
    assert [path.read_text() for path in mine] == ["kept"] * len(mine)
    assert recorded_seed(records) == 4


def test_reading_a_record_checks_it(tmp_path: Path):
    store = ResidualStore(tmp_path / "records", {"a": 1})
    store.write({"x": {"latents": torch.arange(6.0), "half": torch.ones(3, dtype=torch.bfloat16)}})
    (path,) = shards(tmp_path / "records")
    again = ResidualStore(tmp_path / "records", {"a": 1})
    assert again.verify(["x", "y"]) == [] and "x" in again
    flip(path)
    assert store.verify(["x"]) == [], "what this process wrote is not read for checking"
    with pytest.raises(DamagedRecord, match=path.name):
        store.read("x")
    assert "wrong checksum" in again.verify(["x"])[0] and "x" not in again and not path.exists()


def test_batches_are_read_while_one_is_in_use():
    made: list[tuple[int, bool]] = []

    def batches():
        for number in range(3):
            made.append((number, threading.current_thread() is threading.main_thread()))
            yield number

    reading = read_ahead(batches())
    assert next(reading) == 0
    deadline = time.monotonic() + 10
    while len(made) < 2 and time.monotonic() < deadline:
        time.sleep(0.001)
    assert made == [(0, False), (1, False)]
    assert list(reading) == [1, 2]


def test_an_error_while_reading_ahead_arrives():
    def batches():
        yield 0
        raise OSError("gone")

    reading = read_ahead(batches())
    assert next(reading) == 0
    with pytest.raises(OSError, match="gone"):
        next(reading)


def recolour(photos: Path) -> None:
    """Change one photo's pixels; its name and size stay."""
    script.save_photos(photos / "other", [(80, 64), (80, 64)])
    shutil.copy(photos / "other" / "1.png", photos / "0.png")
    shutil.rmtree(photos / "other")


def reweigh(component: str):
    """Change one tensor of a component."""

    def change(model: Path) -> None:
        (path,) = (model / component).glob("*.safetensors")
        tensors = load_file(path)
        name = min(tensors)
        save_file({**tensors, name: tensors[name] + 1}, path, {"format": "pt"})

    return change


@pytest.mark.parametrize(
    ("change", "flags", "key"),
    fast_rows(
        [
            (None, ("--seed", "5"), "samples"),
            (None, ("--skip_blocks", "2,1"), "modulation, spans"),
            ("photos", (), "photos"),
            ("transformer", (), "weights"),
            (None, ("--instance_prompt", "a photo of sks cat"), "photos"),
            (None, ("--resolution", "32"), "photos, samples"),
            (None, ("--max_sequence_length", "10"), "max_sequence_length"),
            (None, ("--guidance_scale", "2"), "guidance_scale"),
            (None, ("--residual_dtype", "float8"), "residual_dtype"),
            (None, ("--mixed_precision", "bf16"), "dtype"),
            (None, ("--lora_layers", "norm.linear,attn.to_q"), "modulation"),
            (None, ("--image_interpolation_mode", "bicubic"), "interpolation"),
            ("text_encoder_2", (), "weights"),
            ("vae", (), "weights"),
        ],
        fast=4,
    ),
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_records_are_of_everything_that_they_depend_on(
    model: Path,
    photos: Path,
    whole: Path,
    tmp_path: Path,
    change: str | None,
    flags: tuple[str, ...],
    key: str,
    capsys,
):
    records = whole.parent / "records"
    if change == "photos":
        photos = shutil.copytree(photos, tmp_path / "photos")
        recolour(photos)
    elif change:
        model = shutil.copytree(model, tmp_path / "model")
        reweigh(change)(model)
    before = {path: path.read_bytes() for path in records.iterdir()}
    argv = script.settings(
        model, photos, tmp_path / "out", *FLAGS, "--residual_dir", str(records), *flags, "--max_train_steps", "1"
    )
    AcceleratorState._reset_state(reset_partial_state=True)
    assert script.load_script().main(argv) == 1
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error"))
    assert f"(it differs in {key})" in line and str(records) in line
    assert {path: path.read_bytes() for path in records.iterdir()} == before


def test_records_do_not_depend_on_what_is_learnt(train, whole: Path, tmp_path: Path):
    shutil.copytree(whole.parent / "records", tmp_path / "records")
    flags = ("--rank", "4", "--lora_layers", "attn.to_q", "--learning_rate", "1e-3", "--optimizer", "prodigy")
    assert records_made(train(*flags, "--checkpointing_steps", "1")) == 0
