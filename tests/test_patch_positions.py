"""Positions of patches: where their tokens lie in the photo, sample by sample, and that runs train on them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch._dynamo
from torch._dynamo.utils import counters

from blockskip_hooks import BlockSkipConfig, DiTBlockSkipTransformer, PatchSamplingConfig, UserError
from blockskip_hooks.cli.arguments import build_parser, parse_args
from blockskip_hooks.cli.preparation import prepare_run
from blockskip_hooks.data.sample_plan import Sample, SamplePlan
from blockskip_hooks.embedded import embedded_model
from blockskip_hooks.families import detect_family
from blockskip_hooks.loading.model_defaults import model_defaults
from blockskip_hooks.lora import add_lora
from blockskip_hooks.positions import patch_positions
from blockskip_hooks.residuals.batches import SampleMaker
from blockskip_hooks.training.compiling import compile_kept_blocks
from blockskip_hooks.training.resume_checks import differences, summary
from tests import script
from tests.tiny import TINY_FAMILIES, TinyFamily
from tests.tiny.base import forward


FLUX = TINY_FAMILIES[0]
PATCHES = PatchSamplingConfig(mode="dynamic", min_size=64, max_size=128, multiple=8, positions="photo")
PHOTO = ("--patch_sampling", "dynamic", "--patch_positions", "photo")
WITHOUT = [tiny for tiny in TINY_FAMILIES if not tiny.family.places_patches]


# Where tokens lie


def grid(positions: torch.Tensor, columns: int) -> tuple[list[float], list[float]]:
    """Rows and columns of positions that are a grid."""
    table = positions.unflatten(0, (-1, columns))
    assert torch.equal(table[..., 0], table[:, :1, 0].expand(table.shape[:2]))
    assert torch.equal(table[..., 1], table[:1, :, 1].expand(table.shape[:2]))
    return table[:, 0, 0].tolist(), table[0, :, 1].tolist()


def test_a_patch_that_is_not_resized_has_the_tokens_it_was_cut_from():
    assert grid(patch_positions(PATCHES, 64, 0.0, 1.0), 8) == (list(range(8)), list(range(8, 16)))


def test_the_whole_crop_has_tokens_twice_as_far_apart_in_the_middle_of_what_they_stand_for():
    every_second = [0.5 + 2 * number for number in range(8)]
    for place in (0.0, 0.3, 1.0):
        assert grid(patch_positions(PATCHES, 128, place, place), 8) == (every_second, every_second)


@pytest.mark.parametrize("size", range(64, 129, 8))
@pytest.mark.parametrize("place", [0.0, 0.25, 0.999])
def test_tokens_fill_the_patch_evenly_and_stay_in_the_photo(size: int, place: float):
    rows, _ = grid(patch_positions(PATCHES, size, place, 0.5), 8)
    apart = torch.tensor(rows).diff()
    assert torch.allclose(apart, torch.full_like(apart, size / 64))
    # The middle of the tokens is that of the patch, on the grid whose tokens begin half a token before their number.
    middle = (place * (128 - size) + size / 2) / 8 - 0.5
    assert sum(rows) / 8 == pytest.approx(middle, abs=1e-4)
    assert rows[0] >= 0 and rows[-1] <= 15


def test_buckets_have_positions_of_their_shape():
    wide = replace(PATCHES, buckets=((96, 160),))
    rows, columns = grid(patch_positions(wide, 128, 0.5, 0.5), 10)
    assert rows == [0.5 + 2 * number for number in range(6)] and columns == [0.5 + 2 * number for number in range(10)]


def sample_of(**changes) -> Sample:
    settings = {"kind": "instance", "index": 0, "image": 0, "flip": False, "patch_size": 88, "top": 0.25, "left": 0.25}
    return Sample(**{**settings, "timestep_index": 0, "noise_seed": 0, "is_placed": True, **changes})


def plan_of(**changes) -> SamplePlan:
    settings = {"seed": 0, "num_images": {"instance": 1}, "timesteps": torch.arange(1000, 0, -1), "patch": PATCHES}
    return SamplePlan(**{**settings, **changes})


def maker_of(plan: SamplePlan) -> SampleMaker:
    maker = SampleMaker.__new__(SampleMaker)
    maker.plan = plan
    return maker


@pytest.mark.parametrize(
    ("changes", "center", "place"),
    [({}, False, (0.25, 0.25)), ({"flip": True}, False, (0.25, 0.75)), ({"top": 0.9}, True, (0.5, 0.5))],
)
def test_a_sample_lies_where_it_was_cut(changes, center, place):
    found = maker_of(plan_of(center_crop=center)).positions(sample_of(**changes))
    assert torch.equal(found, patch_positions(PATCHES, 88, *place))


def test_half_of_the_samples_have_positions_of_their_own_at_every_noise_level():
    plan = plan_of()
    samples = [plan.sample(index) for index in range(2000)]
    noisy, clean = ([s.is_placed for s in samples if (s.timestep_index < 500) is first] for first in (True, False))
    # Five standard errors of a thousand draws are 0.08.
    assert all(0.42 < sum(placed) / len(placed) < 0.58 for placed in (noisy, clean))
    own = next(sample for sample in samples if not sample.is_placed)
    assert grid(maker_of(plan).positions(own), 8) == (list(range(8)), list(range(8)))
    assert not any(plan_of(patch=replace(PATCHES, positions="patch")).sample(i).is_placed for i in range(50))


def test_other_positions_change_nothing_else_of_a_sample():
    plans = [plan_of(patch=replace(PATCHES, positions=positions)) for positions in ("photo", "patch")]
    for index in range(20):
        placed, own = (replace(plan.sample(index), is_placed=False) for plan in plans)
        assert placed == own


# The model


def placed(batch_size: int) -> tuple[dict, torch.Tensor]:
    """Inputs of a forward, and positions of each sample, which differ and lie between tokens."""
    inputs = FLUX.make_inputs(batch_size)
    own = inputs["img_ids"][:, 1:]
    spread = torch.linspace(1.0, 2.0, batch_size + 1)[1:, None, None]
    return inputs, own * spread + 0.5 * (spread - 1)


def row_of(inputs: dict, row: int) -> dict:
    """Inputs of one sample; ids have no batch dimension."""
    return {
        name: value if value is None or name.endswith("_ids") else value[row : row + 1]
        for name, value in inputs.items()
    }


@pytest.fixture
def wrapped() -> DiTBlockSkipTransformer:
    return DiTBlockSkipTransformer(FLUX.make_transformer(), BlockSkipConfig(leading=1, trailing=1))


@pytest.mark.parametrize("training", [False, True])
def test_a_batch_is_as_its_samples_alone_with_the_stock_model(wrapped: DiTBlockSkipTransformer, training: bool):
    """One sample needs nothing but other ``img_ids``, so the stock model says what a batch has to come to."""
    family, (inputs, positions) = FLUX.make_family(), placed(2)
    stock = FLUX.make_transformer()
    together = family.with_positions(inputs, positions)
    residuals = wrapped.capture_residuals(**together, return_dict=False)
    with torch.no_grad():
        found = forward(wrapped, together, residuals=residuals if training else None)
        own = forward(wrapped, inputs)
        for row in range(2):
            alone = family.with_positions(row_of(inputs, row), positions[row : row + 1])
            assert "img_ids_by_sample" not in alone
            expected = forward(stock, alone)
            assert torch.allclose(found[row : row + 1], expected, atol=1e-5)
            assert not torch.allclose(own[row : row + 1], expected, atol=1e-3)


def test_the_next_call_has_the_positions_of_its_own(wrapped: DiTBlockSkipTransformer):
    family, (inputs, positions) = FLUX.make_family(), placed(2)
    with torch.no_grad():
        before = forward(wrapped, inputs)
        forward(wrapped, family.with_positions(inputs, positions))
        assert torch.equal(forward(wrapped, inputs), before)
        with pytest.raises(RuntimeError):
            forward(wrapped, family.with_positions(inputs, positions) | {"hidden_states": torch.zeros(2, 4, 3)})
        assert torch.equal(forward(wrapped, inputs), before)


def test_calls_in_step_have_positions_of_their_own(wrapped: DiTBlockSkipTransformer, tmp_path: Path):
    family, (inputs, positions) = FLUX.make_family(), placed(2)
    streamed = DiTBlockSkipTransformer.from_pretrained(FLUX.folder, BlockSkipConfig(leading=1, trailing=1))
    calls = [family.with_positions(inputs, positions), family.with_positions(inputs, positions.flip(0))]
    alone = [wrapped.capture_residuals(**call, return_dict=False).tensors() for call in calls]
    found = streamed.together([lambda c=call: streamed.capture_residuals(**c, return_dict=False) for call in calls])
    for records, expected in zip(found, alone, strict=True):
        assert all(torch.equal(tensor, expected[name]) for name, tensor in records.tensors().items())
    assert not torch.equal(*(call["leading_hidden_states"] for call in alone))


def gradients(model: DiTBlockSkipTransformer, inputs: dict) -> list[torch.Tensor]:
    """Of the LoRA, of one step with residuals."""
    residuals = model.capture_residuals(**inputs, return_dict=False)
    model.train()
    forward(model, inputs, residuals=residuals).square().mean().backward()
    found = [p.grad.clone() for p in model.parameters() if p.requires_grad]
    model.zero_grad()
    return found


def with_lora(model: DiTBlockSkipTransformer) -> DiTBlockSkipTransformer:
    targets = [f"{block.name}.attn.to_q" for block in model.spans.kept]
    for number, parameter in enumerate(add_lora(model.transformer, targets, rank=2, alpha=2, dropout=0.0, seed=0)):
        torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(number))
    return model


def test_checkpointing_runs_blocks_again_with_the_same_positions(wrapped: DiTBlockSkipTransformer):
    inputs, positions = placed(2)
    inputs = FLUX.make_family().with_positions(inputs, positions)
    expected = gradients(with_lora(wrapped), inputs)
    wrapped.transformer.enable_gradient_checkpointing()
    assert all(map(torch.equal, gradients(wrapped, inputs), expected))
    assert any(gradient.abs().max() > 0 for gradient in expected)


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.mark.slow
def test_compiled_blocks_take_them(wrapped: DiTBlockSkipTransformer, fresh_dynamo: None):
    family, (inputs, positions) = FLUX.make_family(), placed(2)
    calls = [family.with_positions(inputs, positions), family.with_positions(inputs, positions.flip(0))]
    expected = [gradients(with_lora(wrapped) if number == 0 else wrapped, call) for number, call in enumerate(calls)]
    compile_kept_blocks(wrapped, backend="eager")
    found = [gradients(wrapped, call) for call in calls]
    assert not counters["graph_break"]
    for these, those in zip(found, expected, strict=True):
        assert all(map(torch.equal, these, those))


def test_a_model_without_rotary_tables_takes_none():
    other = next(tiny for tiny in TINY_FAMILIES if tiny.name == "sana")
    model = DiTBlockSkipTransformer(other.make_transformer(), BlockSkipConfig(leading=1, trailing=0))
    with torch.no_grad(), pytest.raises(UserError, match="leave out img_ids_by_sample"):
        model(**other.make_inputs(2), img_ids_by_sample=torch.zeros(2, 4, 3))


# Runs


def report_of(output: Path) -> dict:
    return json.loads((output / "run_report.json").read_text())


def test_runs_train_on_them_and_say_so(photos: Path, tmp_path: Path, capsys):
    own = script.train(FLUX.folder, photos, tmp_path / "own", "--skip_blocks", "1,1")
    assert "half placed as in the photo" not in capsys.readouterr().out
    output = script.train(FLUX.folder, photos, tmp_path / "photo", "--skip_blocks", "1,1", *PHOTO)
    assert "trained at 32 px, half placed as in the photo" in " ".join(capsys.readouterr().out.split())
    assert script.losses(output) != script.losses(own)
    assert report_of(output)["patch"]["positions"] == "photo" and report_of(own)["patch"]["positions"] == "patch"
    assert "Half of them have the positions of the photo." in (output / "report.html").read_text()
    assert "positions of the photo" not in (own / "report.html").read_text()
    assert "trained at 32 px, half placed as in the photo |" in (output / "README.md").read_text()
    # Records hold what spans make of these positions: those of the step are the same.
    online = script.train(
        FLUX.folder, photos, tmp_path / "online", "--skip_blocks", "1,1", "--residuals", "online", *PHOTO
    )
    assert script.losses(online)[0] == pytest.approx(script.losses(output)[0], rel=1e-5)


def test_batches_of_one_are_as_batches_of_two(photos: Path, tmp_path: Path):
    """The loss of a step is that of its samples, whether they share a forward or not."""
    flags = ("--skip_blocks", "1,1", "--max_train_steps", "1", *PHOTO)
    pair = script.train(FLUX.folder, photos, tmp_path / "pair", *flags)
    one = script.train(
        *(FLUX.folder, photos, tmp_path / "one", *flags),
        *("--train_batch_size", "1", "--gradient_accumulation_steps", "2"),
    )
    assert script.losses(one) == pytest.approx(script.losses(pair), rel=1e-5)


def test_whole_crops_have_one_place(photos: Path, tmp_path: Path):
    flags = ("--patch_sampling", "none", "--max_train_steps", "2")
    own = script.train(FLUX.folder, photos, tmp_path / "own", *flags)
    output = script.train(FLUX.folder, photos, tmp_path / "photo", *flags, "--patch_positions", "photo")
    script.assert_same_weights(output, own)
    assert report_of(output)["patch"]["positions"] == "patch"


def test_a_run_goes_on_with_the_same_positions_only(photos: Path, tmp_path: Path, capsys):
    script.train(FLUX.folder, photos, tmp_path, "--skip_blocks", "1,1", "--checkpointing_steps", "2", *PHOTO)
    argv = script.settings(
        *(FLUX.folder, photos, tmp_path, "--skip_blocks", "1,1", "--max_train_steps", "6"),
        *("--resume_from_checkpoint", "checkpoint-2"),
    )
    assert script.load_script().main(argv) == 2
    assert "with --patch_positions photo (now patch)" in capsys.readouterr().err
    # Checkpoints of before there was a choice had the patch's.
    now = summary(tmp_path / "checkpoint-2")["made_with"]
    before = {**now, "flags": {name: value for name, value in now["flags"].items() if name != "patch_positions"}}
    assert differences(now, now) == []
    assert differences(before, now) == ["with --patch_positions patch (now photo)"]


@pytest.mark.parametrize("tiny", WITHOUT, ids=lambda tiny: tiny.name)
def test_families_that_place_no_patches_say_so(tiny: TinyFamily, photos: Path, tmp_path: Path):
    argv = script.settings(tiny.folder, photos, tmp_path, *PHOTO, *map(str, sum(tiny.flags.items(), ())))
    with pytest.raises(UserError, match=f"--patch_positions photo is not available for {tiny.make_family().name};"):
        prepare_run(parse_args([*argv[: argv.index("--resolution")], "--resolution", str(tiny.resolution), *PHOTO]))


def test_the_embedded_model_asks_for_them():
    folder = embedded_model()
    assert detect_family(folder).places_patches and model_defaults(folder)[0]["patch_positions"] == "photo"
    assert build_parser().get_default("patch_positions") == "patch"
