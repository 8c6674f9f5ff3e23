"""The report page of a run that goes on, made at its checkpoints, and the charts on it."""

import re

import pytest

from blockskip_hooks.reporting.charts import HEIGHT, WIDTH, harm_chart, line_chart, loss_chart, timestep_chart
from tests.script import PROMPT, load_script, save_photos, train
from tests.test_report import PLAN, RUN, Page, report, words
from tests.tiny import save_tiny_flux


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """The pages of a run of three steps, one for each checkpoint, and that of its end."""
    root = tmp_path_factory.mktemp("run")
    model, photos = save_tiny_flux(root / "model"), save_photos(root / "photos", [(64, 64)] * 2)
    script, made = load_script(), []

    def spy(run, *args):
        write_progress(run, *args)
        made.append((run.output_dir / "report.html").read_text(encoding="utf-8"))

    write_progress = script.write_progress
    flags = ("--skip_blocks", "1,1", "--max_train_steps", "3", "--checkpointing_steps", "1")
    flags += ("--validation_prompt", PROMPT, "--num_validation_images", "2", "--validation_epochs", "2")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "write_progress", spy)
        output = train(model, photos, root / "out", *flags)
    return [Page(text) for text in (*made, (output / "report.html").read_text(encoding="utf-8"))]


def test_each_checkpoint_has_a_page_that_says_how_far_the_run_is(pages):
    *checkpoints, final = map(words, pages)
    assert len(checkpoints) == 3
    for step, text in enumerate(checkpoints, 1):
        assert re.search(rf"Step {step} of 3, \d{{4}}-\d\d-\d\d \d\d:\d\d\.", text)
        assert "so far" in text and "Whole run" not in text
        assert f'/checkpoint-{step}")' in text
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
    assert [len(page.of("path", "raw")) for page in pages] == [0, 1, 1, 1]


def test_the_curves_of_a_table_are_drawn_with_what_is_skipped(tmp_path):
    curves = {"leading": [0, 0.1, 0.2, 0.5], "trailing": [0, 0.0, 0.1, 0.1]}
    skip = {"skip": {"blocks": 4, "leading": 0, "trailing": 2, "source": "table"}}
    page = report(tmp_path, RUN | skip, curves=curves)
    assert len(page.of("path", "leading")) == len(page.of("path", "trailing")) == 1
    (mark,) = page.of("b", "trailing")
    left, top = map(float, re.findall(r"([\d.]+)%", mark["style"] or ""))
    assert left == pytest.approx(200 / 3) and top == pytest.approx(500 / 6)
    assert not page.of("b", "leading")
    for unknown in (None, {"leading": (), "trailing": ()}):
        assert not report(tmp_path, RUN | skip, curves=unknown).of("path", "leading")


def test_the_loss_by_timestep_is_drawn_where_it_is_known(tmp_path):
    gap = [[1, 0.2], [3, float("nan")], [4, 0.1]]
    ranges = {"0-250": [[1, 0.5], [2, 0.7]], "250-500": [[2, 0.4]], "500-1000": gap}
    page = report(tmp_path, RUN | {"train": RUN["train"] | {"loss_by_timestep": ranges}})
    assert [len(page.of("path", f"range-{number}")) for number in range(3)] == [1, 0, 1]
    assert "By timestep t = 0-250 t = 500-1000 0 0.2" in words(page)
    assert "By timestep" not in words(report(tmp_path))
    assert timestep_chart({"0-1": [(3, 0.5)]}) is None


def test_measured_device_memory_is_compared_with_the_plan(tmp_path):
    stages = [{"name": "train", "seconds": 1.0, "peak_rss_bytes": 1, "peak_device_bytes": 330 * 2**20}]
    assert "330 MiB 10 % above plan" in words(report(tmp_path, RUN | {"stages": stages}, PLAN))


def test_lines_stay_in_their_frame_and_axes_start_with_their_range():
    chart = line_chart({"a": [(0, -5.0), (10, 20.0)]}, x_range=(0, 10), y_range=(0, 10), marks={"a": (10, 20.0)})
    assert chart.paths["a"] == f"M0.0 {HEIGHT:.1f}L{WIDTH:.1f} 0.0"
    assert chart.marks == [("a", 100, 0)]
    assert chart.x_ticks[0] == ("0", 0) and chart.x_ticks[-1] == ("10", 100)
    assert chart.y_ticks[0] == ("0", 100) and chart.y_ticks[-1] == ("10", 0)


def test_charts_of_nothing_are_none():
    assert loss_chart([]) is None and loss_chart([1.0, None, float("nan")]) is None
    assert harm_chart({}, {}) is None and harm_chart({"leading": (), "trailing": ()}, {"leading": 1}) is None


def test_the_moving_average_is_over_the_last_steps():
    chart = loss_chart([4.0, 2.0] * 50)
    assert chart and chart.window == 5 and chart.missing == 0
    assert chart.first == pytest.approx(3.2) and chart.final == pytest.approx(2.8)
