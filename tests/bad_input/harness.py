"""The good command, and what the tests of bad input look at after a run."""

import contextlib
import logging
import sys


@contextlib.contextmanager
def logging_as_in_a_terminal():
    """Let the script set up logging, and let the libraries' warnings reach the standard error of now."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    libraries = [
        handler
        for name in ("diffusers", "transformers")
        for handler in logging.getLogger(name).handlers
        if type(handler) is logging.StreamHandler
    ]
    streams = [handler.stream for handler in libraries]
    try:
        root.handlers[:] = []
        for handler in libraries:
            handler.stream = sys.stderr
        yield
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
        for handler, stream in zip(libraries, streams):
            handler.stream = stream


GOOD = {
    "--pretrained_model_name_or_path": "model",
    "--instance_data_dir": "photos",
    "--instance_prompt": "a photo of sks dog",
    "--resolution": "64",
    "--max_sequence_length": "12",
    "--skip_blocks": "1,1",
    "--train_batch_size": "1",
    "--max_train_steps": "1",
    "--seed": "0",
    "--report_to": "none",
    "--lr_warmup_steps": "0",
}


def command(output_dir, changes):
    """The good command with flags changed, added, or left out where the value is None."""
    flags = {**GOOD, "--output_dir": str(output_dir), **changes}
    return [
        word
        for flag, value in flags.items()
        if value is not None
        for word in ([flag] if value is True else [flag, value])
    ]


def assert_one_line(result, code, words):
    assert result.code == code, result.err
    assert result.err.startswith("error: ") and result.err.count("\n") == 1, result.err
    assert [word for word in words if word not in result.err] == [], result.err


def tree(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def error_lines(result):
    return [line for line in result.err.splitlines() if line.startswith("error: ")]


def assert_stopped(result, words):
    """Exit code 1 and one error line; progress bars may have been drawn before."""
    assert result.code == 1, result.err
    assert "Traceback" not in result.err and "WARNING" not in result.err
    assert len(error_lines(result)) == 1, result.err
    assert [word for word in words if word not in error_lines(result)[0]] == [], result.err
    assert result.err.rstrip("\n").splitlines()[-1] == error_lines(result)[0]
