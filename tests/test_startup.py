"""What the scripts share: nothing is printed before their own first word, errors are one line with an exit code."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from blockskip_hooks.cli import startup
from blockskip_hooks.cli.arguments import parse_args
from blockskip_hooks.cli.startup import errors_in_one_line, make_parser, returns_exit_code
from tests.tiers import fast_first


ROOT = Path(__file__).parents[1]
FIRST_WORDS = {
    "train_dreambooth_blockskip": (
        ["--plan_only", "--output_dir"],
        "Model    embedded micro-FLUX (flux), as no other was named",
    ),
    "plan_memory": (["--preset", "sana-0.6b", "--selection_table"], "error: --selection_table"),
    "evaluate": (["--encoders", "offline", "--output_dir"], "error: --encoders offline"),
    "select_blocks": (["--prompts", "", "--output_dir"], "error: --prompts has an empty prompt"),
}


@pytest.mark.parametrize("script", fast_first(FIRST_WORDS))
def test_the_first_word_is_ours(script: str, tmp_path: Path):
    """As a new user runs it: warnings of packages that are missing, or there, come from imports in a new process."""
    flags, first = FIRST_WORDS[script]
    file = ROOT / "examples" / "dreambooth_blockskip" / f"{script}.py"
    environment = {k: v for k, v in os.environ.items() if k != "TRANSFORMERS_VERBOSITY"}
    done = subprocess.run(
        [sys.executable, str(file), *flags, str(tmp_path / "out")],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment | {"PYTHONPATH": str(ROOT / "src")},
    )
    assert done.stdout.startswith(first), done.stdout


def test_segments_grow_unless_the_user_sets_the_allocator(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(startup.sys, "platform", "linux")
    monkeypatch.delenv("PYTORCH_ALLOC_CONF", raising=False)
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:512")
    startup.keep_memory_whole()
    assert "PYTORCH_ALLOC_CONF" not in os.environ
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF")
    startup.keep_memory_whole()
    assert os.environ["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
    # torch reads it once, when it is imported.
    code = "import sys, blockskip_hooks.cli.startup; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"PYTHONPATH": str(ROOT / "src")})


def test_what_a_person_can_mend_is_one_line(capsys: pytest.CaptureFixture[str]):
    @returns_exit_code
    def main(argv: list[str] | None = None) -> None:
        with errors_in_one_line(2, secret="Sesame0pen7"):
            Path("/nowhere/Sesame0pen7").read_text()

    assert main([]) == 2
    assert capsys.readouterr().err == "error: /nowhere/***: No such file or directory.\n"


def test_a_bug_keeps_its_traceback_and_success_is_zero():
    @returns_exit_code
    def main(argv: list[str] | None = None) -> None:
        with errors_in_one_line(2):
            assert argv, "a bug"

    assert main(["something"]) == 0
    with pytest.raises(AssertionError, match="a bug"):
        main([])


def test_parsers_take_no_shortened_flags(capsys: pytest.CaptureFixture[str]):
    parser = make_parser("What it does.")
    parser.add_argument("--steps")
    with pytest.raises(SystemExit, match="2"):
        parser.parse_args(["--ste", "3"])
    assert capsys.readouterr().err.startswith("error: unrecognized arguments: --ste 3")


def test_a_text_without_quotes_is_told_apart_from_a_misspelt_flag(capsys: pytest.CaptureFixture[str]):
    for words, hint in (
        (["--instance_prompt", "a", "photo", "of"], "arguments: photo of; a text of several words needs quotes"),
        (["--train_text_encoder", "yes"], "arguments: yes; a text of several words needs quotes, a value its flag"),
        (["--instance_promt", "a photo"], "arguments: --instance_promt a photo; did you mean --instance_prompt?"),
    ):
        with pytest.raises(SystemExit):
            parse_args(words)
        assert hint in capsys.readouterr().err
