"""The report page, contact sheets and the model card: safe with any text, complete without network."""

import ast
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from PIL import Image

from blockskip_hooks.reporting.model_card import (
    License,
    code_block,
    code_span,
    is_hub_id,
    usage_snippet,
    write_model_card,
)
from blockskip_hooks.reporting.outputs import remove_pictures
from blockskip_hooks.reporting.page import ReportImages, write_report
from blockskip_hooks.utils.pictures import SheetRow, contact_sheet


HOSTILE = "<script>alert(1)</script> \"x\" 'y' `z` | [a](b) {{ 7 * 7 }}\n---\n# no"
RUN: dict[str, Any] = {
    "schema": 1,
    "model": "owner/tiny",
    "family": "flux",
    "base_revision": "abc123",
    "weights": "pytorch_lora_weights.safetensors",
    "skip": {"blocks": 12, "leading": 2, "trailing": 3, "ratio": 5 / 12, "source": "table", "table": "flux.json"},
    "patch": {"mode": "dynamic", "min": 32, "max": 64, "training_resolution": 32},
    "stages": [
        {"name": "encode", "seconds": 3.25, "peak_rss_bytes": 640 * 2**20, "peak_device_bytes": None},
        {"name": "train", "seconds": 118.0, "peak_rss_bytes": 1400 * 2**20, "peak_device_bytes": None},
    ],
    "train": {"steps": 150, "samples": 750, "step_seconds_median": 0.3, "loss": [1 / step for step in range(1, 151)]},
    "residuals": {"mode": "precomputed", "records": 750, "bytes": 2**27, "stretches": 2, "dtype": "bfloat16"},
    "versions": {"python": "3.11", "peft": None},
    "settings": {"instance_prompt": HOSTILE, "rank": 16, "resolution": 64, "class_data_dir": None},
}
PLAN: dict[str, Any] = {
    "schema": 1,
    "skip": RUN["skip"],
    "patch": RUN["patch"],
    "stages": [
        {
            "name": "train",
            "peak_device_bytes": 300 * 2**20,
            "parameter_bytes": 100 * 2**20,
            "activation_bytes": 200 * 2**20,
            "tflops_per_step": 0.5,
            "seconds": None,
        }
    ],
    "residuals": {"records": 750, "bytes": 2**27, "stretches": 2},
    "fits": {"budget_bytes": 2**32, "ok": True},
}


class Page(HTMLParser):
    """Elements of a page and its visible text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._in_style = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._in_style = tag == "style"

    def handle_endtag(self, tag: str) -> None:
        self._in_style = False

    def handle_data(self, data: str) -> None:
        if not self._in_style:
            self.text += data

    def of(self, tag: str, class_: str | None = None) -> list[dict[str, str | None]]:
        return [a for name, a in self.elements if name == tag and (class_ is None or a.get("class") == class_)]


def picture(size: int = 64, mode: str = "RGB") -> Image.Image:
    return Image.new(mode, (size, size), 120 if mode == "L" else "red")


def report(folder: Path, run: dict[str, Any] = RUN, plan: dict[str, Any] = PLAN, **overrides: Any) -> Page:
    arguments: dict[str, Any] = {
        "images": ReportImages(
            photos=[picture(), picture(600)],
            crops=[("t = 731, patch 56 px", picture(32))],
            prompts=[HOSTILE, "a photo of sks dog at night"],
            before=[[picture()], [picture()]],
            after=[[picture()], [picture(64, "RGBA")]],
        ),
        "command": "accelerate launch train.py --skip_blocks auto",
        "snippet": usage_snippet("owner/tiny", "out", HOSTILE),
    } | overrides
    return Page(write_report(folder, run, plan, **arguments).read_text(encoding="utf-8"))


def words(page: Page) -> str:
    return " ".join(page.text.split())


def test_text_from_outside_cannot_become_markup(tmp_path: Path):
    skip = RUN["skip"] | {"table": HOSTILE}
    run = RUN | {"model": HOSTILE, "base_revision": HOSTILE, "versions": {HOSTILE: HOSTILE}, "skip": skip}
    run["settings"] = {HOSTILE: HOSTILE}
    run["train"] = RUN["train"] | {"loss_by_timestep": {HOSTILE: [[1, 0.5], [2, 0.7]]}}
    images = ReportImages([picture()], [(HOSTILE, picture())], [HOSTILE], [[picture()]], [[picture()]])
    page = report(tmp_path, run, images=images, command=HOSTILE)
    assert not page.of("script")
    assert page.text.count("<script>alert(1)</script>") >= 8
    assert "{{ 7 * 7 }}" in page.text
    assert not any(key.startswith("on") for _, attributes in page.elements for key in attributes)
    assert any("<script>" in (image["alt"] or "") for image in page.of("img"))


def test_page_needs_no_network(tmp_path: Path):
    page = report(tmp_path)
    for tag, attributes in page.elements:
        for key in ("src", "href", "xlink:href", "srcset", "poster", "data"):
            assert (attributes.get(key) or "data:").startswith(("data:", "#")), (tag, attributes)
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "url(" not in text.replace("url(#", "") and "@import" not in text
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_images_have_alternatives_and_small_ones_keep_their_pixels(tmp_path: Path):
    images = report(tmp_path).of("img")
    assert len(images) == 7
    assert all((image["alt"] or "").strip() for image in images)
    for image in images:
        assert (image.get("class") == "pixelated") == (int(image["width"] or 0) <= 128)
        assert (image["src"] or "").startswith("data:image/png" if image["width"] == "64" else "data:image/")


def test_sections_carry_the_figures(tmp_path: Path):
    page = report(tmp_path)
    text = words(page)
    assert len(page.of("i", "kept")) == 7 + 1 and len(page.of("i", "skipped")) == 5 + 2  # bar and legend
    for expected in (
        "150 steps with 5 of 12 blocks skipped",
        "n = 2, m = 3, from the table flux.json",
        "7 kept, with LoRA blocks 2–8",
        "from 32 px at t = 0 to 64 px",
        "t = 731, patch 56 px",
        "1.37 GiB",
        "simulated",
        "300 MiB",
        "fits its memory budget of 4.00 GiB",
        "128 MiB",
        "bfloat16",
        "peft not installed",
        "load_lora_weights",
        "accelerate launch train.py --skip_blocks auto",
        "The 3 settings in use",
    ):
        assert expected in text, expected
    assert not page.of("details")[0]  # closed


@pytest.mark.parametrize("source", ["flag", "table", "rule"])
def test_block_numbers_say_where_they_come_from(tmp_path: Path, source: str):
    text = words(report(tmp_path, RUN | {"skip": RUN["skip"] | {"source": source}}))
    origin = {"flag": "--skip_blocks", "table": "table", "rule": "general rule"}[source]
    assert re.search(rf"n = 2, m = 3, [^)]*{origin}", text)


def test_missing_parts_are_left_out(tmp_path: Path):
    empty = report(tmp_path, {}, {}, images=ReportImages(), command="")
    assert not empty.of("img") and not empty.of("svg") and not empty.of("table")
    stages = [{"name": "train", "peak_device_bytes": None}]
    assert "Use the result" in empty.text
    page = report(
        tmp_path,
        RUN | {"train": RUN["train"] | {"loss": []}, "residuals": {"mode": "none"}},
        {"stages": stages},
        images=ReportImages(prompts=["a", "b"], after=[[picture(), picture()]]),
    )
    assert len(page.of("img")) == 2 and "Base model" not in page.text
    assert not page.of("svg") and "simulated" not in page.text and "None" not in page.text


@pytest.mark.parametrize(
    "losses",
    [
        [0.5] * 3,
        [0.0, 0.0],
        [1e-9, 2e-9],
        [math.nan, 0.4, None, 0.3, math.inf],
        [5e3, 1.0],
        [i % 7 for i in range(9999)],
    ],
)
def test_any_losses_make_a_page(tmp_path: Path, losses: list[float | None]):
    page = report(tmp_path, RUN | {"train": {"steps": len(losses), "loss": losses}})
    assert len(page.of("g", "raw")) == len(page.of("g", "average")) == 2
    missing = sum(loss is None or not math.isfinite(loss) for loss in losses)
    assert (f"{missing} steps without a finite loss" in words(page)) == bool(missing)


def test_tokens_never_reach_the_page(tmp_path: Path):
    token = "hf_" + "a" * 30
    settings = {"hub_token": "secret", "hub_model_id": "me/dog", "note": f"with {token}"}
    command = f"train.py --hub_token secret --hub_token={token}"
    page = report(tmp_path, RUN | {"settings": settings}, command=command)
    assert "secret" not in page.text and token not in page.text
    assert "--hub_token *** --hub_token=***" in words(page) and "me/dog" in page.text


def test_snippet_is_valid_python_with_the_pipeline_arguments(tmp_path: Path):
    snippet = usage_snippet("owner/tiny", tmp_path, "x", {"max_sequence_length": 32})
    page = report(tmp_path, snippet=snippet)
    assert "max_sequence_length=32" in page.text and "torch.bfloat16" in page.text
    code = usage_snippet("owner/tiny", tmp_path, HOSTILE, {"guidance_scale": 3.5, "negative_prompt": None})
    strings = [node.value for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Constant)]
    assert HOSTILE in strings and str(tmp_path) in strings and 3.5 in strings


def test_contact_sheet_enlarges_without_smoothing(tmp_path: Path):
    image = Image.new("RGB", (2, 1), "red")
    image.putpixel((1, 0), (0, 0, 255))
    file = tmp_path / "new" / "sheet.png"
    contact_sheet([SheetRow("", [image, image]), SheetRow("", [image])], file, side=20)
    sheet = Image.open(file)
    assert sheet.width == 2 * 20 + 3 * 8
    assert {colour for _, colour in sheet.getcolors()} == {(255, 255, 255), (255, 0, 0), (0, 0, 255)}
    assert [path.name for path in file.parent.iterdir()] == ["sheet.png"]


def test_contact_sheet_has_labels_captions_and_panels(tmp_path: Path):
    rows = [SheetRow("a very long prompt " * number, [picture(300)], ["seed 1"]) for number in range(4)]
    sizes = []
    for panels in (1, 2):
        contact_sheet(rows, tmp_path / "sheet.png", side=100, panels=panels)
        sizes.append(Image.open(tmp_path / "sheet.png").size)
    (narrow, high), (wide, low) = sizes
    assert wide == 2 * narrow and low < high


@pytest.mark.parametrize("rows", [[], [SheetRow("empty", [])]])
def test_contact_sheet_of_nothing_is_refused(tmp_path: Path, rows: list[SheetRow]):
    with pytest.raises(ValueError, match="no images"):
        contact_sheet(rows, tmp_path / "sheet.png", side=10)


def card(
    folder: Path, run: dict[str, Any] = RUN, prompt: str | None = "a photo of sks dog", **others: Any
) -> ModelCard:
    arguments: dict[str, Any] = {
        "images": [("a photo of sks dog at night", picture())] * 2,
        "repo_id": "me/sks-dog",
        "base_license": License("apache-2.0"),
        "tags": ["flux", "lora"],
        "snippet": usage_snippet("owner/tiny", "me/sks-dog", "a photo of sks dog"),
    } | others
    run = run | {"settings": {"instance_prompt": prompt, "rank": 16, "train_text_encoder": False}}
    return ModelCard.load(write_model_card(folder, run, **arguments))


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the Hub was asked")

    monkeypatch.setattr("huggingface_hub.repocard.hf_hub_download", refuse)


def test_card_has_the_front_matter_of_a_lora(tmp_path: Path):
    data = card(tmp_path).data
    assert data.tags == [
        *("text-to-image", "diffusers-training", "diffusers", "lora", "template:sd-lora", "blockskip", "flux")
    ]
    assert (data.base_model, data.license, data.library_name) == ("owner/tiny", "apache-2.0", "diffusers")
    assert data.instance_prompt == "a photo of sks dog"
    assert data.widget == [
        {"text": "a photo of sks dog at night", "output": {"url": f"image_{index}.png"}} for index in range(2)
    ]
    assert all((tmp_path / entry["output"]["url"]).is_file() for entry in data.widget)


def test_a_readme_of_somebody_is_kept_and_a_card_of_before_replaced(tmp_path: Path, caplog):
    (tmp_path / "README.md").write_text("---\ntags: [flux]\n---\nmine")
    caplog.set_level("WARNING", logger="blockskip_hooks")
    for _ in range(2):
        card(tmp_path)
    assert {path.name for path in tmp_path.glob("*.md")} == {"README.md", "README.earlier-1.md"}
    assert (tmp_path / "README.earlier-1.md").read_text().endswith("mine")
    (record,) = caplog.records
    assert "README.md is not a model card of an earlier run; it is kept as README.earlier-1.md" in record.message


def test_card_says_how_the_lora_was_trained_and_used(tmp_path: Path):
    text = card(tmp_path).text
    for expected in (
        "# me/sks-dog",
        "<Gallery />",
        "5 of the transformer's 12 blocks were skipped",
        "| Blocks kept, with LoRA | 7 of 12 |",
        "| Patch sampling | dynamic, 32 to 64 px, trained at 32 px |",
        "| Steps | 150, 750 samples |",
        "| Peak process memory | 1.37 GiB, measured in stage train |",
        "pipeline.load_lora_weights",
        "Use `a photo of sks dog`",
    ):
        assert expected in text, expected
    assert "TODO" not in text
    plain = card(tmp_path, {}, None, images=[], base_license=None)
    assert "DiT-BlockSkip" not in plain.text and "Gallery" not in plain.text and plain.data.license is None


def test_a_run_without_residuals_does_not_claim_them(tmp_path: Path):
    run = RUN | {"residuals": {"mode": "none"}}
    assert "replaced by" not in words(report(tmp_path, run)) and "replaced by" not in card(tmp_path, run).text
    assert "replaced by" in words(report(tmp_path)) and "replaced by" in card(tmp_path).text


def test_card_survives_hostile_prompts(tmp_path: Path):
    images = [(HOSTILE, picture()), ("b", picture())]
    result = card(tmp_path, prompt=HOSTILE, repo_id=HOSTILE, images=images)
    assert result.data.instance_prompt == HOSTILE
    assert [entry["text"] for entry in result.data.widget] == [HOSTILE, "b"]
    outside_code = re.sub(r"(`+).+?\1", "", result.text)
    assert not re.search(r"(?<!\\)<script", outside_code)
    assert len(re.findall(r"^#+ ", result.text, re.MULTILINE)) == 5


def test_card_metadata_holds_only_what_the_hub_accepts(tmp_path: Path):
    folder = tmp_path / "home" / "base"
    folder.mkdir(parents=True)
    result = card(tmp_path, RUN | {"model": str(folder)}, base_license=License("FLUX.1 [dev] Non-Commercial"))
    assert result.data.base_model is None and str(tmp_path) not in result.text.split("## How to use it")[0]
    assert result.data.license == "other" and result.data.license_name == "flux.1-dev-non-commercial"


@pytest.mark.parametrize("text", ["a", "`", "a `` b", "``` x"])
def test_code_cannot_be_closed_from_inside(text: str):
    span, block = code_span(text), code_block(text, "python")
    for fenced in (span, block):
        fence = re.match("`+", fenced)
        assert fence and fenced.endswith(fence.group()) and fence.group() not in fenced.strip("`")


@pytest.mark.parametrize(("name", "expected"), [("a/b", True), ("a", False), ("./a/b", False), ("/a/b", False)])
def test_hub_ids(name: str, expected: bool):
    assert is_hub_id(name) is expected


def test_pictures_of_an_earlier_run_go_and_those_of_other_folders_stay(tmp_path: Path):
    for folder in (tmp_path / "run", tmp_path / "photos"):
        folder.mkdir()
        for name in ("before_after.png", "image_0.png", "image_11.png", "image_of_mine.png"):
            Image.new("RGB", (4, 4)).save(folder / name)
    (tmp_path / "run" / "run_report.json").write_text("{}")
    for folder in (tmp_path / "run", tmp_path / "photos", tmp_path / "not there"):
        remove_pictures(folder)
    assert [path.name for path in (tmp_path / "run").glob("*.png")] == ["image_of_mine.png"]
    assert len(list((tmp_path / "photos").iterdir())) == 4
