"""Where the tests of bad input run, how they run a script, and a finished run to resume from."""

import json
import shutil
from types import SimpleNamespace

import pytest
from PIL import Image

from blockskip_hooks.loading.lora_files import WEIGHTS_NAME
from tests.bad_input.harness import GOOD, command, logging_as_in_a_terminal
from tests.script import load_script
from tests.tiny import save_tiny_flux


@pytest.fixture(scope="package")
def script():
    return load_script()


@pytest.fixture(scope="package")
def ground(tmp_path_factory):
    """A folder with a tiny model, photos, and folders that are wrong in one way each."""
    root = tmp_path_factory.mktemp("ground")
    model = save_tiny_flux(root / "model")
    (root / "photos").mkdir()
    for number in range(2):
        Image.new("RGB", (80, 64), (90 * number, 120, 40)).save(root / "photos" / f"{number}.png")

    (root / "no photos").mkdir()
    (root / "no photos" / "notes.txt").write_text("no image")
    (root / "broken").mkdir()
    Image.new("RGB", (64, 64)).save(root / "broken" / "good.png")
    (root / "broken" / "empty.jpg").touch()
    (root / "broken" / "page.png").write_text("<html>\nnot found\n</html>")
    (root / "broken" / "cut.png").write_bytes((root / "photos" / "1.png").read_bytes()[:60])
    (root / "a file").write_text("kept")

    (root / "no index").mkdir()
    for name, index in (
        ("damaged index", "{"),
        ("list index", "[]"),
        ("other pipeline", json.dumps({"_class_name": "StableDiffusionPipeline"})),
        ("no class", "{}"),
    ):
        (root / name).mkdir()
        (root / name / "model_index.json").write_text(index)
    for name, without in (
        ("no transformer", "transformer"),
        ("no vae", "vae"),
        ("no text_encoder", "text_encoder"),
        ("no tokenizer_2", "tokenizer_2"),
        ("no transformer config", "transformer/config.json"),
        ("no weights", "transformer/diffusion_pytorch_model.safetensors"),
        ("no vae weights", "vae/diffusion_pytorch_model.safetensors"),
        ("no scheduler config", "scheduler/scheduler_config.json"),
    ):
        shutil.copytree(model, root / name)
        path = root / name / without
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    for name, config in (
        ("damaged config", '{"_class_name":'),
        ("unknown class", '{"_class_name": "NoSuchTransformer2DModel"}'),
    ):
        shutil.copytree(model, root / name)
        (root / name / "transformer" / "config.json").write_text(config)
    return root


@pytest.fixture(autouse=True)
def in_the_ground_folder(monkeypatch, ground):
    monkeypatch.chdir(ground)
    monkeypatch.delenv("LOCAL_RANK", raising=False)


@pytest.fixture
def run(script, capfd):
    """Run a script's main and return its exit code, standard output and standard error."""

    def call(argv, module=script):
        capfd.readouterr()
        with logging_as_in_a_terminal():
            try:
                code = module.main(argv)
            except SystemExit as stop:  # from the argument parser
                code = stop.code
        out, err = capfd.readouterr()
        return SimpleNamespace(code=code, out=out, err=err)

    return call


@pytest.fixture(scope="package")
def earlier(tmp_path_factory):
    """What an earlier run left in the output folder."""
    folder = tmp_path_factory.mktemp("earlier")
    for name in ("plan.json", "run_report.json", "report.html", "selection.json", WEIGHTS_NAME):
        (folder / name).write_text("from an earlier run")
    (folder / "checkpoint-7").mkdir()
    (folder / "checkpoint-7" / "training_state.json").write_text("{}")
    return folder


@pytest.fixture(scope="package")
def finished(script, ground):
    """A short run with records and a checkpoint that stay."""
    folder = ground / "finished"
    changes = {"--residual_dir": str(folder / "records"), "--checkpointing_steps": "1", "--skip_final_inference": True}
    changes |= {name: str(ground / GOOD[name]) for name in ("--pretrained_model_name_or_path", "--instance_data_dir")}
    assert script.main(command(folder / "out", changes)) == 0
    assert (folder / "out" / WEIGHTS_NAME).is_file() and any((folder / "records").glob("records-*.safetensors"))
    return folder


@pytest.fixture
def begin(run, script, finished, monkeypatch):
    """Run with the plan of the finished run: making one takes longer than all the rest."""
    plan = json.loads((finished / "out" / "plan.json").read_text())
    monkeypatch.setattr(script, "make_plan", lambda run, *args: (run, plan))
    return run
