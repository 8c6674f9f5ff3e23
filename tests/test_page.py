"""The report page of a run that goes on, made at its checkpoints, and the charts on it."""

import re

import pytest

from blockskip_hooks.reporting.charts import draw_harm, draw_losses, draw_losses_by_timestep, loss_curve
from blockskip_hooks.reporting.outputs import RunOutputs
from tests.script import PROMPT, save_photos, train
from tests.test_report import PLAN, RUN, Page, report, words
from tests.tiny import save_tiny_flux


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """The pages of a run of three steps, one for each checkpoint, and that of its end."""
    root = tmp_path_factory.mktemp("run")
    model, photos = save_tiny_flux(root / "model"), save_photos(root / "photos", [(64, 64)] * 2)
    made: list[str] = []

    def spy(outputs, *args):
        write_so_far(outputs, *args)
        made.append((outputs.run.output_dir / "report.html").read_text(encoding="utf-8"))

    write_so_far = RunOutputs.write_so_far
    flags = ("--skip_blocks", "1,1", "--max_train_steps", "3", "--checkpointing_steps", "1")
    flags += ("--validation_prompt", PROMPT, "--num_validation_images", "2", "--validation_epochs", "2")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunOutputs, "write_so_far", spy)
        output = train(model, photos, root / "out", *flags)
    return [Page(text) for text in (*made, (output / "report.html").read_text(encoding="utf-8"))]


def test_each_checkpoint_has_a_page_that_says_how_far_the_run_is(pages):
    *checkpoints, final = map(words, pages)
    assert len(checkpoints) == 3
    for step, text in enumerate(checkpoints, 1):
        assert re.search(rf"Step {step} of 3, \d{{4}}-\d\d-\d\d \d\d:\d\d\.", text)
        assert "so far" in text and "Whole run" not in text
        assert f'("checkpoint-{step}")' in text
    assert "of 3," not in final and "so far" not in final and "Whole run" in final and "written 20" in final


def test_a_page_shows_the_images_that_are_there_and_makes_none(pages):
    first, second, third, final = pages
    drawn = [[image["alt"] or "" for image in page.of("img")] for page in pages]
    for alts in drawn:
        assert sum(alt.startswith("Training photo") for alt in alts) == 2
        assert any(alt.startswith("Training sample, t = ") for alt in alts)
    with_lora = [sum(alt.startswith("With LoRA") for alt in alts) for alts in drawn]
    assert with_lora == [0, 0, 2, 2]
    assert "Images after step 2" in words(third) and "Before and after" in words(final)
    assert [sum(alt.startswith("Base model") for alt in alts) for alts in drawn] == [0, 0, 0, 2]


def test_a_page_has_the_stages_and_the_loss_so_far(pages):
    first, second, third, _ = map(words, pages)
    assert re.search(r"validate\s*–", first) and not re.search(r"validate\s*–", third)
    for page in pages[:3]:
        text = words(page)
        seconds = re.search(r"train ([\d.]+)\s(s|min)", text.partition("Time and memory by stage")[2])
        assert seconds and float(seconds[1]) > 0
    assert [len(page.of("g", "raw")) for page in pages] == [0, 2, 2, 2]  # for wide and for narrow screens


def test_the_curves_of_a_table_are_drawn_with_what_is_skipped(tmp_path):
    curves = {"leading": [0, 0.1, 0.2, 0.5], "trailing": [0, 0.0, 0.1, 0.1]}
    skip = {"skip": {"blocks": 4, "leading": 0, "trailing": 2, "source": "table"}}
    page = report(tmp_path, RUN | skip, curves=curves)
    assert len(page.of("g", "leading")) == len(page.of("g", "trailing")) == 2
    assert len(page.of("g", "trailing-dot")) == 2 and not page.of("g", "leading-dot")
    for unknown in (None, {"leading": (), "trailing": ()}):
        assert not report(tmp_path, RUN | skip, curves=unknown).of("g", "leading")


def test_the_loss_by_timestep_is_drawn_where_it_is_known(tmp_path):
    gap = [[1, 0.2], [3, float("nan")], [4, 0.1]]
    ranges = {"0-250": [[1, 0.5], [2, 0.7]], "250-500": [[2, 0.4]], "500-1000": gap}
    page = report(tmp_path, RUN | {"train": RUN["train"] | {"loss_by_timestep": ranges}})
    assert [len(page.of("g", name)) for name in ranges] == [2, 0, 2]
    assert "By timestep t = 0-250 t = 500-1000" in words(page)
    assert "By timestep" not in words(report(tmp_path))


def test_measured_device_memory_is_compared_with_the_plan(tmp_path):
    stages = [{"name": "train", "seconds": 1.0, "peak_rss_bytes": 1, "peak_device_bytes": 330 * 2**20}]
    assert "330 MiB 10 % above plan" in words(report(tmp_path, RUN | {"stages": stages}, PLAN))


def drawn(svg: str, line: str) -> tuple[list[float], list[float]]:
    """Heights in pixels of the points of a line in the wide drawing, and the values that its axis gives them."""
    wide = svg.partition("</svg>")[0]
    path = re.search(rf'<g class="{line}">\s*<path d="([^"]*)"', wide)
    assert path
    heights = [float(height) for height in re.findall(r"[ML] [\d.]+ ([\d.]+)", path[1])]
    # A label stands at the height of its line of the grid.
    (low, at_low), *_, (high, at_high) = (
        (float(label), float(height))
        for height, label in re.findall(
            r'<g class="ytick_.*?<path d="M [\d.]+ ([\d.]+) .*?<text[^>]*>([^<]*)<', wide, re.DOTALL
        )
    )
    return heights, [low + (height - at_low) / (at_high - at_low) * (high - low) for height in heights]


@pytest.mark.parametrize("losses", [[0.51, 0.83, 0.62, 0.7], [0.5123, 0.5126, 0.5124, 0.5125], [5000.0, 1.0, 20.0]])
def test_the_axis_tells_the_values_of_the_line(losses):
    curve = loss_curve(losses)
    assert curve
    _, values = drawn(draw_losses(curve), "raw")
    assert values == pytest.approx(losses, abs=0.005 * (max(losses) - min(losses)))


def test_a_long_run_has_a_small_drawing_that_a_spike_does_not_flatten():
    losses = [0.4 + 0.2 * (step % 7) / 7 for step in range(9999)]
    losses[50] = 90.0
    curve = loss_curve(losses)
    assert curve
    svg = draw_losses(curve)
    heights, _ = drawn(svg, "raw")
    assert len(svg) < 200_000 and max(heights) - sorted(heights)[len(heights) // 20] > 100


def test_equal_charts_are_equal_bytes():
    curves, chosen = {"leading": [0, 0.1, 0.2], "trailing": [0, 0.0, 0.3]}, {"leading": 1, "trailing": 2}
    svg = draw_harm(curves, chosen)
    assert svg == draw_harm(curves, chosen) and "20" not in re.findall(r"<dc:date>(.*?)<", svg)
    identifiers = re.findall(r' id="([^"]*)"', svg)
    assert len(identifiers) == len(set(identifiers))


def test_charts_of_nothing_are_empty():
    assert loss_curve([]) is None and loss_curve([1.0, None, float("nan")]) is None
    assert draw_harm({}, {}) == "" and draw_harm({"leading": (), "trailing": ()}, {"leading": 1}) == ""
    assert draw_losses_by_timestep({"0-1": [(3, 0.5)]}) == ("", {})
    of_two = [(1, 0.5), (2, 0.4)]
    assert list(draw_losses_by_timestep({"500-750": of_two, "1000-2000": of_two, "0-250": of_two})[1]) == [
        "0-250",
        "500-750",
        "1000-2000",
    ]


def test_the_moving_average_is_over_the_last_steps():
    curve = loss_curve([4.0, 2.0] * 50)
    assert curve and curve.window == 5 and curve.missing == 0
    assert curve.average[:2] == [4.0, 3.0]
    assert curve.first == pytest.approx(3.2) and curve.final == pytest.approx(2.8)
