"""What trackers get: read back from the files of tensorboard and of wandb offline; the rest with a tracker of ours."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import tracking as accelerate_tracking
from accelerate.state import AcceleratorState
from accelerate.tracking import GeneralTracker
from PIL import Image

from blockskip_hooks.cli.argument_checks import validate_args
from blockskip_hooks.cli.arguments import parse_args
from blockskip_hooks.config import BlockSkipConfig
from blockskip_hooks.lora import add_lora
from blockskip_hooks.reporting.trackers import Tracking, block_norms, start_trackers
from blockskip_hooks.training.flags.types import parse_trackers
from blockskip_hooks.training.history import quarter_means
from blockskip_hooks.transformer import DiTBlockSkipTransformer
from tests import script


BEACH = "a photo of sks dog on the beach"
STEPS = 10
FLAGS = [
    *("--skip_blocks", "1,2", "--max_train_steps", str(STEPS), "--learning_rate", "0.03", "--lr_scheduler", "linear"),
    # Three photos in batches of two: a validation every other epoch is one after step 4 and one after step 8.
    *("--validation_prompt", BEACH, "--num_validation_images", "2", "--validation_epochs", "2"),
]


@pytest.fixture(scope="module")
def tracked(model: Path, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that two trackers follow."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("WANDB_SILENT", "true")
        output = tmp_path_factory.mktemp("tracked")
        return script.train(model, photos, output, *FLAGS, "--report_to", "tensorboard,wandb")


@pytest.fixture(scope="module")
def events(tracked: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(tracked / "logs" / "dreambooth-flux-lora"), size_guidance={"images": 0})
    return accumulator.Reload()


@pytest.fixture(scope="module")
def history(tracked: Path) -> dict[int, dict[str, Any]]:
    """What wandb wrote, by step."""
    (file,) = tracked.glob("logs/wandb/offline-run-*/run-*.wandb")
    steps: dict[int, dict[str, Any]] = {}
    for record in wandb_records(file):
        if record.WhichOneof("record_type") == "history":
            row = steps.setdefault(record.history.step.num, {})
            for item in record.history.item:
                row[".".join(item.nested_key) or item.key] = json.loads(item.value_json)
    return steps


def wandb_records(file: Path) -> Iterator[Any]:
    """Records of a log of wandb: protobuf messages in frames, in blocks of 32 KiB, behind seven bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, message = file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if (room := 2**15 - at % 2**15) < 7:
            at += room
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        message += data[at + 7 : at + 7 + length]
        at += 7 + length
        # A whole message, or the last part of one.
        if kind in (1, 4):
            yield Record.FromString(message)
            message = b""


def of_steps(events: Any, tag: str) -> dict[int, float]:
    return {event.step: event.value for event in events.Scalars(tag)}


def test_tensorboard_has_loss_rate_and_gradient_norm_of_every_step(tracked: Path, events):
    losses = of_steps(events, "loss")
    assert list(losses) == list(range(1, STEPS + 1))
    assert list(losses.values()) == pytest.approx(script.losses(tracked))
    assert of_steps(events, "lr")[1] > of_steps(events, "lr")[9] > 0
    assert all(norm > 0 for norm in of_steps(events, "grad_norm").values())
    assert len(of_steps(events, "grad_norm")) == STEPS


def test_tensorboard_has_the_loss_by_quarter_of_the_timesteps(tracked: Path, events):
    quarters = [tag for tag in events.Tags()["scalars"] if tag.startswith("loss_by_timestep/")]
    assert set(quarters) <= {f"loss_by_timestep/{low}-{low + 250}" for low in (0, 250, 500, 750)} and len(quarters) > 1
    by_step: dict[int, list[float]] = {}
    for tag in quarters:
        for step, value in of_steps(events, tag).items():
            by_step.setdefault(step, []).append(value)
    # With two samples per step, of one quarter or of two, the mean of the quarters is the loss.
    assert {step: sum(values) / len(values) for step, values in by_step.items()} == pytest.approx(
        dict(enumerate(script.losses(tracked), start=1)), rel=1e-5
    )


def test_tensorboard_has_the_lora_of_each_kept_block_memory_and_stages(tracked: Path, events):
    tags = set(events.Tags()["scalars"])
    kept = {"transformer_blocks.1", "single_transformer_blocks.0"}
    assert {tag for tag in tags if tag.startswith("lora_norm/")} == {f"lora_norm/{name}" for name in kept}
    assert all(of_steps(events, f"lora_norm/{name}")[STEPS] > 0 for name in kept)
    assert 0 < of_steps(events, "memory/now")[STEPS] <= of_steps(events, "memory/peak")[STEPS]
    stages = {stage["name"]: stage for stage in json.loads((tracked / "run_report.json").read_text())["stages"]}
    assert of_steps(events, "stage_seconds/train")[STEPS] == pytest.approx(stages["train"]["seconds"])
    # Of the device where there is one.
    peak = stages["encode"]["peak_device_bytes"] or stages["encode"]["peak_rss_bytes"]
    assert of_steps(events, "stage_peak_bytes/encode")[STEPS] == pytest.approx(peak)
    assert events.Histograms("patch_size")[0].histogram_value.num == 2 * STEPS


def test_tensorboard_has_the_trailing_error(events):
    errors = of_steps(events, "trailing_error")
    assert list(errors) == [STEPS] and 0 < errors[STEPS] < 1


def test_tensorboard_has_images_beside_those_of_the_base_model(tracked: Path, events):
    tag, final = f"validation/0 {BEACH}", f"test/0 {BEACH}"
    pairs = [f"{phase}/seed {seed}" for phase in (final, tag) for seed in (3, 4)]
    assert sorted(events.Tags()["images"]) == sorted(["test", "validation", *pairs])
    first, second = ([*events.Images(f"{tag}/seed {seed}"), *events.Images(f"{final}/seed {seed}")] for seed in (3, 4))
    assert [event.step for event in first] == [event.step for event in second] == [4, 8, STEPS]
    pictures = [Image.open(io.BytesIO(event.encoded_image_string)) for event in first]
    width = pictures[0].width // 2
    base, trained = (
        [picture.crop((left, 0, left + width, picture.height)).tobytes() for picture in pictures]
        for left in (0, width)
    )
    # The same seeds each time: the base model's image stays, the trained model's changes.
    assert len(set(base)) == 1 and len(set(trained)) == 3 and base[0] not in trained
    (caption,) = {event.tensor_proto.string_val[0].decode() for event in tensors(events, f"{final}/caption", STEPS)}
    assert BEACH in caption and "seed 3" in caption and "seed 4" in caption and f"step {STEPS}" in caption
    final = Image.open(tracked / "image_0.png").convert("RGB")
    assert trained[-1] == final.tobytes()


def tensors(events: Any, tag: str, step: int) -> list[Any]:
    return [event for event in events.Tensors(f"{tag}/text_summary") if event.step == step]


def test_wandb_offline_has_the_same_figures(tracked: Path, events, history):
    assert sorted(history) == list(range(1, STEPS + 1))
    assert [history[step]["loss"] for step in sorted(history)] == pytest.approx(script.losses(tracked))
    last = history[STEPS]
    for name in ("lr", "grad_norm", "lora_norm/transformer_blocks.1", "memory/peak", "trailing_error"):
        assert last[name] == pytest.approx(of_steps(events, name)[STEPS], rel=1e-6)
    assert last["stage_seconds/train"] > 0
    assert last["patch_size._type"] == "histogram" and sum(last["patch_size.values"]) == 2 * STEPS


def test_images_have_the_tags_and_steps_of_upstreams_scripts(tracked: Path, events, history):
    """Tensorboard's steps are epochs, of two steps here: that after which a validation came, and the last."""
    assert [event.step for event in events.Images("validation")] == [1, 3]
    assert [event.step for event in events.Images("test")] == [4]
    for phase, steps in (("validation", [4, 8]), ("test", [STEPS])):
        assert [step for step, row in sorted(history.items()) if f"{phase}.captions" in row] == steps
        assert history[steps[0]][f"{phase}.captions"] == [f"0: {BEACH}", f"1: {BEACH}"]
    assert history[STEPS]["test._type"] == "images/separated"


def test_wandb_offline_has_images_with_prompts_and_seeds(tracked: Path, history):
    shown = {}
    for step, row in history.items():
        for name in (f"validation/0 {BEACH}", f"test/0 {BEACH}"):
            if f"{name}.captions" in row:
                shown[step] = name, row
    assert sorted(shown) == [4, 8, STEPS] and shown[STEPS][0].startswith("test/")
    for step, (name, row) in shown.items():
        assert row[f"{name}.captions"] == [f"{BEACH} (seed {seed}: base model, step {step})" for seed in (3, 4)]
        for file in row[f"{name}.filenames"]:
            (picture,) = tracked.glob(f"logs/wandb/offline-run-*/files/{file}")
            assert Image.open(picture).width == 2 * row[f"{name}.height"]


def test_settings_go_to_wandb_without_a_token(tracked: Path):
    (file,) = tracked.glob("logs/wandb/offline-run-*/run-*.wandb")
    config = {
        update.key: json.loads(update.value_json)
        for record in wandb_records(file)
        if record.WhichOneof("record_type") == "config"
        for update in record.config.update
    }
    assert config["max_train_steps"] == STEPS and config["skip_blocks"] == "1,2"
    assert "hub_token" not in config


def test_being_followed_changes_nothing(tracked: Path, model: Path, photos: Path, tmp_path: Path):
    """The trailing error and the further images leave no trace in losses and weights."""
    alone = script.train(model, photos, tmp_path / "alone", *FLAGS)
    assert script.losses(alone) == script.losses(tracked)
    script.assert_same_weights(alone, tracked)
    assert not (alone / "logs").exists()


# With a tracker of ours


class Memory(GeneralTracker):
    """Keeps what it is given."""

    name = "memory"
    requires_logging_directory = False

    def __init__(self, run_name: str) -> None:
        super().__init__()
        self.rows: list[tuple[int | None, dict[str, Any]]] = []

    @property
    def tracker(self) -> Memory:
        return self

    def log(self, values: dict, step: int | None = None, **_: Any) -> None:
        self.rows.append((step, values))

    def of(self, name: str) -> dict[int | None, Any]:
        return {step: values[name] for step, values in self.rows if name in values}


@pytest.fixture
def follow(model: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Train with a tracker of ours and return it."""

    def run(*flags: str) -> Memory:
        from blockskip_hooks.reporting import trackers as tracking

        memory = Memory("run")
        module = script.load_script()
        monkeypatch.setattr(module, "start_trackers", lambda run, accelerator: accelerator.trackers.append(memory))
        script.train(model, photos, tmp_path / "out", *flags)
        assert tracking.EVERY == 10
        return memory

    return run


def test_a_refreshed_record_is_nearer_to_the_truth(follow):
    flags = ("--skip_blocks", "1,2", "--learning_rate", "0.03", "--max_train_steps", "20")
    base = follow(*flags, "--stretch_steps", "10", "--no-refresh_residuals").of("trailing_error")
    fresh = follow(*flags, "--stretch_steps", "10", "--refresh_residuals").of("trailing_error")
    assert list(base) == list(fresh) == [10, 20]
    assert fresh[10] == pytest.approx(base[10], rel=1e-3)
    assert 0 < fresh[20] < base[20]


def test_a_lora_that_learns_nothing_leaves_the_records_true(follow):
    flags = (
        "--skip_blocks",
        "1,2",
        "--lr_scheduler",
        "constant_with_warmup",
        "--lr_warmup_steps",
        "9",
        "--max_train_steps",
        "1",
    )
    assert follow(*flags).of("trailing_error")[1] < 1e-6


@pytest.mark.parametrize(
    "flags",
    [("--skip_blocks", "none"), ("--skip_blocks", "3,0"), ("--skip_blocks", "1,2", "--residuals", "online")],
    ids=["nothing skipped", "no trailing span", "online"],
)
def test_what_is_not_approximated_has_no_error(follow, flags):
    assert follow(*flags).of("trailing_error") == {}


def test_short_stretches_are_not_looked_at_each_time(follow):
    assert list(follow("--skip_blocks", "1,2", "--stretch_steps", "1").of("trailing_error")) == [4]


def test_a_tracker_without_histograms_gets_shares_and_images_are_left_out(follow):
    memory = follow("--skip_blocks", "1,2", "--max_train_steps", "10", "--validation_prompt", BEACH)
    shares = [
        value for step, row in memory.rows for name, value in row.items() if name.startswith("patch_size/") if step
    ]
    assert sum(shares) == pytest.approx(1.0)
    assert not any(name.startswith("validation") for _, row in memory.rows for name in row)


def test_where_trackers_write_is_for_their_variables_to_say(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    settings = SimpleNamespace(logging_dir="logs", plain=lambda: {"rank": 4, "hub_token": "secret"})
    run: Any = SimpleNamespace(output_dir=tmp_path, settings=settings, family=SimpleNamespace(name="flux"))
    started: list[tuple] = []
    accelerator: Any = SimpleNamespace(log_with=["wandb"], init_trackers=lambda *given: started.append(given))
    for name in ("WANDB_DIR", "SWANLAB_LOG_DIR"):
        monkeypatch.delenv(name, raising=False)
    start_trackers(run, accelerator)
    monkeypatch.setenv("WANDB_DIR", "elsewhere")
    start_trackers(run, accelerator)
    (_, given, ours), (_, _, theirs) = started
    assert given == {"rank": 4}
    assert ours["wandb"] == {"dir": str(tmp_path / "logs")} and theirs.keys() == {"swanlab"}


def test_comet_and_swanlab_get_images_by_their_own_means(monkeypatch):
    import sys

    logged: list[tuple] = []
    monkeypatch.setitem(sys.modules, "swanlab", SimpleNamespace(Image=lambda image, caption: (image.size, caption)))
    comet = SimpleNamespace(
        name="comet_ml",
        tracker=SimpleNamespace(log_image=lambda image, name, step: logged.append((image.size, name, step))),
    )
    swanlab = SimpleNamespace(name="swanlab", log=lambda values, step: logged.append((values, step)))
    accelerator: Any = SimpleNamespace(trackers=[comet, swanlab])
    model: Any = None
    image = Image.new("RGB", (8, 8))
    Tracking(accelerator, model, model).log_images("validation", 7, 1, ["a dog, läuft!"], [3], [[image]], [[image]])
    caption, size = "a dog, läuft! (seed 3: base model, step 7)", (16, 8)
    assert logged == [
        (size, caption, 7),
        ({"validation/0 a dog_ l_uft_": [(size, caption)]}, 7),
    ]


def test_norm_of_a_block_is_that_of_its_weights_updates(model: Path):
    transformer = DiTBlockSkipTransformer.from_pretrained(model, BlockSkipConfig(leading=1, trailing=2))
    layers = [
        "transformer_blocks.1.attn.to_q",
        "transformer_blocks.1.attn.to_k",
        "single_transformer_blocks.0.proj_out",
    ]
    add_lora(transformer.transformer, layers, rank=2, alpha=6, dropout=0.0, seed=0)
    updates: dict[str, list[torch.Tensor]] = {}
    for name in layers:
        layer = transformer.transformer.get_submodule(name)
        torch.nn.init.normal_(layer.lora_B["default"].weight)
        block = ".".join(name.split(".")[:2])
        updates.setdefault(block, []).append(layer.get_delta_weight("default").flatten())
    expected = {name: torch.cat(parts).norm().item() for name, parts in updates.items()}
    assert block_norms(transformer) == pytest.approx(expected, rel=1e-5)


def test_quarters_without_samples_are_left_out():
    sums = torch.tensor([3.0, 0.0, 0.0, 1.0, 2.0, 0.0, 0.0, 4.0])
    assert quarter_means(sums, torch.arange(1000, 0, -1)) == {"0-250": 1.5, "750-1000": 0.25}


# Which trackers


@pytest.mark.parametrize(
    ("text", "names"),
    [("none", []), ("wandb", ["wandb"]), ("tensorboard, wandb,wandb", ["tensorboard", "wandb"]), ("all", ["all"])],
)
def test_names_of_trackers(text, names):
    assert list(parse_trackers(text)) == names


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("tensorboard,swanlab", "--report_to swanlab is not installed; run: pip install swanlab"),
        ("tensorboard,excel", "--report_to is 'tensorboard,excel'; choose"),
        ("tensorboard,", "--report_to is 'tensorboard,'; choose"),
        ("none,tensorboard", "--report_to is 'none,tensorboard'; choose"),
    ],
)
def test_trackers_that_cannot_be_are_one_line(text, words, monkeypatch):
    kinds = [accelerate_tracking.LoggerType.TENSORBOARD]
    monkeypatch.setattr("accelerate.tracking.get_available_trackers", lambda: kinds)
    with pytest.raises(ValueError, match=words):
        validate_args(parse_args(["--report_to", text]))


def test_the_level_debug_tells_the_whole_of_an_error(model, photos, tmp_path, capsys, caplog):
    flags = script.settings(model, photos, tmp_path / "out", "--skip_blocks", "9,9", "--log_level", "debug")
    AcceleratorState._reset_state(reset_partial_state=True)
    package = logging.getLogger("blockskip_hooks")
    try:
        assert script.load_script().main(flags) == 2
    finally:
        package.setLevel(logging.NOTSET)
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: --skip_blocks 9,9")
    (record,) = [record for record in caplog.records if record.message.startswith("The error in full:")]
    assert "Traceback" in record.message and record.levelno == logging.DEBUG


def test_a_tracker_that_does_not_start_is_one_line_before_any_model(model, photos, tmp_path, monkeypatch, capsys):
    def start(self: Any) -> None:
        raise RuntimeError("no API key\nmore")

    monkeypatch.setattr(accelerate_tracking.WandBTracker, "start", start)
    AcceleratorState._reset_state(reset_partial_state=True)
    flags = script.settings(model, photos, tmp_path / "out", "--skip_blocks", "1,2", "--report_to", "wandb")
    assert script.load_script().main(flags) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: --report_to wandb: a tracker does not start (no API key)")
    assert "wandb login" in line and "--report_to none" in line
