"""The ``blockskip`` command: it runs the example scripts with their flags and exit codes, and knows the machine."""

from __future__ import annotations

import configparser
import re
import shlex
import sys
from importlib import metadata
from pathlib import Path

import pytest

from blockskip_hooks.cli import console, doctor
from blockskip_hooks.cli.arguments import build_parser, parse_args
from blockskip_hooks.cli.startup import CALLED_AS
from blockskip_hooks.utils.errors import UserError
from tests.script import load_script
from tests.tiers import fast_first


ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def no_config(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """As where nobody ran ``accelerate config``; words and path of this process come back afterwards."""
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.setattr(sys, "path", list(sys.path))
    file = tmp_path / "default_config.yaml"
    monkeypatch.setattr("accelerate.commands.config.config_args.default_config_file", str(file))
    return file


def test_the_command_is_installed():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    assert config["options.entry_points"]["console_scripts"].split(" = ")[-1] == "blockskip_hooks.cli.console:main"
    named = config["options.data_files"]
    for script, _ in console.SCRIPTS.values():
        assert console.shipped(f"examples/dreambooth_blockskip/{script}").is_file()
    assert {place.removeprefix("share/blockskip_hooks/") for place in named} == {
        "examples/dreambooth_blockskip",
        "configs",
    }


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"]], ids=str)
def test_alone_it_says_what_it_can_do(words: list[str], capsys: pytest.CaptureFixture[str]):
    assert console.main(words) == 0
    said = capsys.readouterr().out
    assert [f"blockskip {name} " in said for name in console.COMMANDS] == [True] * 5
    assert max(map(len, said.splitlines())) <= 80


def test_a_word_that_is_no_command_is_refused(capsys: pytest.CaptureFixture[str]):
    assert console.main(["trian"]) == 2
    said = capsys.readouterr()
    assert said.err == "error: 'trian' is none of train, plan, select, evaluate, doctor; did you mean train?\n"
    assert said.out == ""


@pytest.mark.parametrize("name", fast_first(console.SCRIPTS, 2))
def test_help_is_that_of_the_script_by_the_name_that_was_typed(name: str, capsys: pytest.CaptureFixture[str]):
    assert console.main([name, "--help"]) == 0
    said = capsys.readouterr().out
    # Usage in one line, then what it does.
    assert said.startswith(f"usage: blockskip {name} [flags]\n\n") and ".py --" not in said and "``" not in said
    (example,) = re.findall(r"^Example:\n((?:    .*\n)+)", said, re.MULTILINE)
    assert all(len(line) <= 119 for line in example.splitlines())
    parser = build_parser() if name == "train" else load_script(Path(console.SCRIPTS[name][0]).stem).build_parser()
    for line in example.replace("\\\n", " ").splitlines():
        words = shlex.split(line)
        assert words[:2] == ["blockskip", name]
        parser.parse_args(words[2:])
    assert CALLED_AS.get() is None


def test_an_example_over_several_lines_reads_as_meant(capsys: pytest.CaptureFixture[str]):
    assert console.main(["evaluate", "--help"]) == 0
    (example,) = re.findall(r"^Example:\n((?:    .*\n)+)", capsys.readouterr().out, re.MULTILINE)
    assert example.count("\\\n") >= 1
    args = load_script("evaluate").build_parser().parse_args(shlex.split(example.replace("\\\n", " "))[2:])
    assert args.class_phrase == "a dog" and str(args.output_dir) == "flux-dog-evaluation"


def test_help_of_a_script_has_its_own_name():
    said = load_script("plan_memory").build_parser().format_help()
    assert "\n    python plan_memory.py --gpu 12GB\n" in said and "blockskip plan" not in said


def test_exit_codes_are_those_of_the_script(capsys: pytest.CaptureFixture[str]):
    assert console.main(["train", "--rank", "0", "--plan_only"]) == 2
    assert capsys.readouterr().err.startswith("error: --rank is 0")
    assert console.main(["train", "--dump_config", "--rank", "8"]) == 0
    assert "\nrank: 8\n" in capsys.readouterr().out


def test_what_accelerate_was_told_is_followed(no_config: Path, monkeypatch: pytest.MonkeyPatch):
    no_config.write_text("num_processes: 2\n")
    started = []
    monkeypatch.setattr("accelerate.commands.launch.launch_command", started.append)
    assert console.main(["train", "--rank", "8"]) == 0
    (args,) = started
    assert args.training_script.endswith("examples/dreambooth_blockskip/train_dreambooth_blockskip.py")
    assert args.training_script_args == ["--rank", "8"] and args.quiet


def test_a_wheel_has_the_scripts_below_share(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(console, "__file__", str(tmp_path / "lib" / "python3" / "site-packages" / "x" / "console.py"))
    file = metadata.PackagePath("../../../share/blockskip_hooks/configs/flux.yaml")
    file.dist = type("Installed", (), {"locate_file": lambda self, path: tmp_path / "a" / "b" / "c" / path})()
    monkeypatch.setattr(metadata, "files", lambda name: [file])
    assert console.shipped("configs/flux.yaml") == (tmp_path / "share/blockskip_hooks/configs/flux.yaml").resolve()
    with pytest.raises(UserError, match="configs/other.yaml is not part of this installation"):
        console.shipped("configs/other.yaml")


# doctor


def test_doctor_tells_of_the_machine(capsys: pytest.CaptureFixture[str]):
    assert console.main(["doctor"]) == 0
    said = capsys.readouterr().out
    titles = [line for line in said.splitlines() if not line.startswith(" ")]
    assert titles == ["Machine", "Packages", "Tested", "Fits"]
    assert re.search(r"^  memory    \d.* GiB, of which .* are free$", said, re.MULTILINE)
    assert re.search(r"^  torch           \S+ +(as tested|tested with 2\.13)$", said, re.MULTILINE)
    assert "on a GPU: nothing yet" in said and "blockskip train --skip_blocks auto" in said


def test_versions_of_doctor_are_those_of_the_readme():
    said = re.sub(r"\s+", " ", (ROOT / "docs" / "contributing.md").read_text())
    assert ", ".join(f"{name} {version}" for name, version in doctor.TESTED.items()) in said


@pytest.mark.parametrize(
    ("memory", "recipe"), [(6_200_000_000, 6), (12_600_000_000, 12), (15_800_000_000, 16), (85_000_000_000, 24)]
)
def test_doctor_names_the_recipe_of_the_card(memory: int, recipe: int):
    said = "\n".join(doctor.fitting_lines(memory))
    assert f"configs/flux-{recipe}gb.yaml" in said and "FLUX.1-dev on a GPU" in said and "Simulated" in said
    assert all((ROOT / "configs" / f"flux-{size}gb.yaml").is_file() for size in doctor.SIZES)


def test_without_a_card_no_recipe_is_named():
    said = "\n".join(doctor.fitting_lines(None))
    assert "gb.yaml" not in said and "blockskip plan --preset flux.1-dev --gpu 12GB" in said


@pytest.mark.parametrize(("memory", "bf16"), [(None, True), (12_600_000_000, True), (15_800_000_000, False)])
def test_lines_of_doctor_can_be_copied_whole(memory: int | None, bf16: bool):
    for line in doctor.fitting_lines(memory, bf16):
        if not line.startswith("blockskip "):
            continue
        command, *words = shlex.split(line, comments=True)[1:]
        if command == "train":
            precision = parse_args(words).mixed_precision
            assert precision == (("bf16" if bf16 else "fp16") if "--config" in words else None)
        else:
            load_script("plan_memory").check_args(load_script("plan_memory").build_parser().parse_args(words))


def test_a_stored_token_is_told_of_and_not_shown(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(doctor, "get_token", lambda: "hf_secret")
    said = "\n".join(doctor.machine_lines())
    assert "a token is stored" in said and "hf_secret" not in said
    monkeypatch.setattr(doctor, "get_token", lambda: None)
    assert "hf auth login" in "\n".join(doctor.machine_lines())
