"""``--push_to_hub`` against a hub on loopback: what arrives there, what does not, and what is said when it fails."""

import json
import re

import pytest
import yaml
from accelerate.state import AcceleratorState

from blockskip_hooks.loading import download as model_files
from blockskip_hooks.reporting.model_card import License, read_license
from tests.fake_hub import USER, FakeHub, fake_hub
from tests.script import PROMPT, WEIGHTS, load_script, save_photos, settings
from tests.tiers import fast_first, fast_rows
from tests.tiny import save_tiny_flux


TOKEN = "Sesame0pen7"
LICENSE = {"license": "other", "license_name": "tiny-license", "license_link": "https://example.org/LICENSE.md"}
UPLOADED = {WEIGHTS, "README.md", "plan.json", "run_report.json", "image_0.png"}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = save_tiny_flux(tmp_path_factory.mktemp("secret-place") / "tiny-flux")
    (folder / "README.md").write_text(f"---\n{yaml.safe_dump(LICENSE)}---\n# Tiny\n")
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return save_photos(tmp_path_factory.mktemp("secret-photos"), [(64, 64)] * 2)


@pytest.fixture(scope="module")
def module_patch():
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.fixture(scope="module")
def hub(module_patch):
    with fake_hub(TOKEN) as hub:
        module_patch.setattr("huggingface_hub.constants.ENDPOINT", hub.endpoint)
        module_patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        # The client waits between the times it tries again.
        module_patch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
        yield hub


@pytest.fixture(autouse=True)
def sound(request):
    if "hub" in request.fixturenames:
        request.getfixturevalue("hub").failing = {}


def push(model, photos, output, *flags):
    AcceleratorState._reset_state(reset_partial_state=True)
    flags = ("--max_train_steps", "2", "--checkpointing_steps", "1", "--push_to_hub", "--hub_token", TOKEN, *flags)
    return load_script().main(settings(model, photos, output, *flags, "--skip_blocks", "1,1"))


@pytest.fixture(scope="module")
def pushed(hub: FakeHub, model, photos, tmp_path_factory):
    """The output folder of a run that was uploaded under the folder's name."""
    output = tmp_path_factory.mktemp("out") / "sks-dog"
    (output / "selection").mkdir(parents=True)
    for stray in ("image_7.png", "notes.txt", "selection/selection.png", "other.safetensors"):
        (output / stray).write_bytes(b"not of this run")
    flags = ("--validation_prompt", PROMPT, "--num_validation_images", "1", "--report_to", "tensorboard")
    assert push(model, photos, output, *flags) == 0
    return output


def test_the_results_arrive_and_nothing_else(hub, pushed):
    files = hub.files[f"{USER}/sks-dog"]
    assert set(files) == UPLOADED
    for name, content in files.items():
        assert content == (pushed / name).read_bytes() or name in ("plan.json", "run_report.json"), name
    report, uploaded = json.loads((pushed / "run_report.json").read_text()), json.loads(files["run_report.json"])
    assert uploaded["settings"]["output_dir"] == "sks-dog"
    assert {**report, "model": "tiny-flux", "settings": uploaded["settings"]} == uploaded
    here = {path.name for path in pushed.iterdir()}
    assert here > {"report.html", "before_after.png", "checkpoint-1", "checkpoint-2", "logs"}


def test_the_token_goes_to_the_hub_in_one_header_and_nowhere_else(hub, pushed):
    asked = [request for request in hub.requests if "/api/models/" in request.path or "/repos/" in request.path]
    assert len(asked) >= 3
    for request in hub.requests:
        assert TOKEN not in request.path and TOKEN.encode() not in request.body
        assert {name for name, value in request.headers.items() if TOKEN in value} <= {"authorization"}
    assert all(request.headers["authorization"] == f"Bearer {TOKEN}" for request in asked)
    files = [path for path in pushed.rglob("*") if path.is_file()]
    assert len(files) > len(UPLOADED)
    assert [path for path in files if TOKEN.encode() in path.read_bytes()] == []


def test_nothing_uploaded_tells_of_folders_here(hub, pushed, model, photos):
    for name, content in hub.files[f"{USER}/sks-dog"].items():
        for folder in (model.parent, photos, pushed.parent):
            assert str(folder).encode() not in content, (name, folder)


def test_the_card_is_of_the_repository(hub, pushed):
    text = hub.files[f"{USER}/sks-dog"]["README.md"].decode()
    front, body = re.fullmatch(r"---\n(.*?)\n---\n(.*)", text, re.DOTALL).groups()
    data = yaml.safe_load(front)
    assert {key: data[key] for key in LICENSE} == LICENSE
    assert data["instance_prompt"] == PROMPT
    assert data["widget"] == [{"text": PROMPT, "output": {"url": "image_0.png"}}]
    assert {"text-to-image", "diffusers", "lora", "template:sd-lora", "flux"} <= set(data["tags"])
    assert body.lstrip().startswith(f"# {USER}/sks-dog\n")
    assert f'pipeline.load_lora_weights("{USER}/sks-dog")' in body and '"tiny-flux"' in body
    for row in ("| Steps | 2, 4 samples |", "| LoRA rank | 2 |", "| Learning rate | 0.01 |", "| Seed | 3 |"):
        assert row in body, row
    assert "[`tiny-license`](https://example.org/LICENSE.md)" in body


def test_a_repository_that_is_there_is_used(hub, model, photos, tmp_path, capsys):
    hub.repositories.append("club/dog")
    assert push(model, photos, tmp_path / "out", "--hub_model_id", "club/dog") == 0
    assert set(hub.files["club/dog"]) == UPLOADED - {"image_0.png"}
    assert "Uploaded to club/dog." in capsys.readouterr().out


@pytest.mark.parametrize("status", fast_first([401, 403, 500]))
def test_a_repository_that_cannot_be_opened_ends_the_run_before_it_begins(
    hub, model, photos, tmp_path, capsys, status
):
    hub.failing = {"/repos/create": status, "/api/models/": 404}
    assert push(model, photos, tmp_path / "out") == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert line.startswith("error: --push_to_hub cannot open the repository out (")
    assert str(status) in line and "the disk of the hub is full" in line and "hf auth login" in line
    assert TOKEN not in line and not (tmp_path / "out" / WEIGHTS).exists()


def test_no_network_ends_the_run_before_it_begins(hub, model, photos, tmp_path, capsys):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        assert push(model, photos, tmp_path / "out") == 1
    assert "error: --push_to_hub cannot open the repository out (" in capsys.readouterr().err
    assert not (tmp_path / "out" / WEIGHTS).exists()


@pytest.mark.parametrize(("route", "status"), fast_rows([("/preupload/", 503), ("/commit/", 500), ("/commit/", 403)]))
def test_an_upload_that_fails_says_where_the_results_are(hub, model, photos, tmp_path, capsys, route, status):
    hub.failing = {route: status}
    assert push(model, photos, tmp_path / "out", "--hub_model_id", f"{USER}/lora{status}") == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert line.startswith(f"error: The upload to {USER}/lora{status} failed (") and str(status) in line
    assert f"hf upload {USER}/lora{status} {tmp_path / 'out'} --include {WEIGHTS} README.md" in line
    assert TOKEN not in line and (tmp_path / "out" / WEIGHTS).is_file()
    assert f"{USER}/lora{status}" not in hub.files


# The licence of the base model


@pytest.mark.parametrize(
    ("front", "expected"),
    [
        ("license: apache-2.0", License("apache-2.0")),
        (
            "license: other\nlicense_name: x\nlicense_link: LICENSE.md",
            License("other", "x", "https://huggingface.co/owner/tiny/blob/main/LICENSE.md"),
        ),
        ("license: other\nlicense_link: https://example.org/a", License("other", None, "https://example.org/a")),
        ("license: other\nlicense_link: javascript:alert(1)", License("other")),
        ("license: other\nlicense_link: https://example.org/)<b>", License("other")),
        ("license: [a, b]", None),
        ("language: en", None),
        ("license: {", None),
        ("- a", None),
    ],
)
def test_the_licence_is_read_from_the_card_of_the_base_model(tmp_path, front, expected):
    (tmp_path / "README.md").write_text(f"---\n{front}\n---\n")
    assert read_license(tmp_path, "owner/tiny") == expected


def test_a_base_model_without_a_card_has_no_licence(tmp_path):
    assert read_license(tmp_path, "owner/tiny") is None


@pytest.mark.parametrize("error", [None, OSError("no network")])
def test_the_card_of_a_model_from_the_hub_is_fetched_beside_its_files(monkeypatch, tmp_path, error):
    """The pipeline's own download leaves it out."""
    commit = "a" * 40
    asked = []

    def download(*args, **kwargs):
        asked.append((args, kwargs["revision"], kwargs["token"]))
        if error:
            raise error

    monkeypatch.setattr(model_files.DiffusionPipeline, "download", lambda *args, **kwargs: str(tmp_path / commit))
    monkeypatch.setattr(model_files, "hf_hub_download", download)
    assert model_files.resolve_model("owner/tiny", token=TOKEN) == tmp_path / commit
    assert asked == [(("owner/tiny", "README.md"), commit, TOKEN)]
