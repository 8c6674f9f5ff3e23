#!/usr/bin/env python
"""Install the package with the oldest and with the newest versions that setup.cfg admits, and test both.

Each set gets a virtual environment of its own in a temporary folder, made with the Python that runs this script (3.10
to 3.12 for the oldest set, whose numpy has no wheel for later ones). In it run the tests of block skipping for every
family (the full model reproduced, gradients, streaming), of embeddings and images against the stock pipelines, of
quantisation, page and model card, and then the training script on the embedded model.

The oldest set pins every lower bound of what users install: the requirements and all extras but those for
development. What these packages need in turn is the newest that fits. pip's own settings hold (PIP_CONSTRAINT,
PIP_INDEX_URL), for a torch without GPU libraries, say.

Example:
    python tools/check_versions.py            # both sets
    python tools/check_versions.py oldest
"""

from __future__ import annotations

import argparse
import configparser
import os
import re
import subprocess
import sys
import tempfile
import venv
from pathlib import Path


ROOT = Path(__file__).parents[1]
SCRIPT = Path("examples") / "dreambooth_blockskip" / "train_dreambooth_blockskip.py"
SETS = ("oldest", "newest")
FOR_DEVELOPMENT = {"test", "dev", "docs"}
TEST_TOOLS = ("pytest", "pytest-xdist")
TESTS = (
    "tests/test_block_skip.py",
    "tests/test_placeholders.py",
    "tests/test_model_files.py",
    "tests/test_pipelines.py",
    "tests/test_quantization.py::test_every_method_works_on_the_cpu",
    "tests/test_quantization.py::test_e1_holds_in_bfloat16",
    "tests/test_report.py",
)
SETTINGS = ("--skip_blocks", "2,2", "--max_train_steps", "2", "--num_validation_images", "0")
PRINT_VERSIONS = (
    "import sys; from importlib.metadata import version; "
    "print(sys.version.split()[0], *(f'{name}=={version(name)}' for name in sys.argv[1:]), flush=True)"
)
MADE = ("pytorch_lora_weights.safetensors", "report.html", "README.md", "run_report.json")


def requirements() -> list[str]:
    """What setup.cfg asks for: the package's requirements and those of the extras that users install."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    extras = config["options.extras_require"]
    texts = [config["options"]["install_requires"], *(extras[name] for name in extras if name not in FOR_DEVELOPMENT)]
    lines = (line.strip() for text in texts for line in text.splitlines())
    return list(dict.fromkeys(line for line in lines if line and not line.startswith("#")))


def at_lower_bound(requirement: str) -> str:
    """``"name>=1.2,<3"`` as ``"name==1.2"``.

    Raises:
        ValueError: if it has no lower bound.
    """
    match = re.fullmatch(r"([\w.-]+)>=([\w.]+)(,.*)?", requirement)
    if match is None:
        raise ValueError(f"setup.cfg: {requirement} is not of the form name>=version.")
    return f"{match[1]}=={match[2]}"


def run(*command: str | Path) -> None:
    """Run a command in the repository's root, offline for models.

    Raises:
        SystemExit: if it fails.
    """
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_HUB_OFFLINE": "1"}
    if code := subprocess.run(list(map(str, command)), cwd=ROOT, env=environment).returncode:
        sys.exit(f"{' '.join(map(str, command))} ended with {code}")


def check(name: str, folder: Path) -> None:
    """Make the environment of one set in ``folder`` and run tests and script in it.

    Raises:
        SystemExit: if anything fails.
    """
    print(f"== {name}: installing", flush=True)
    asked = [at_lower_bound(line) for line in requirements()] if name == "oldest" else requirements()
    venv.create(folder, with_pip=True)
    python = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
    run(python, "-m", "pip", "install", "--quiet", "--upgrade", "pip")
    run(python, "-m", "pip", "install", "--quiet", *asked, *TEST_TOOLS, "-e", ".")
    names = [re.split("[<>=]", line)[0] for line in requirements()]
    run(python, "-c", PRINT_VERSIONS, *names)
    print(f"== {name}: testing", flush=True)
    run(python, "-m", "pytest", "-q", "-m", "not gpu", *TESTS)
    output = folder / "run"
    run(python, SCRIPT, *SETTINGS, "--output_dir", output)
    missing = [file for file in MADE if not (output / file).is_file()]
    if missing:
        sys.exit(f"{name}: the run left no {', '.join(missing)}")
    print(f"== {name}: passed", flush=True)


def main(argv: list[str] | None = None) -> int:
    """Check the sets that are named, by default both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sets", nargs="*", metavar="oldest|newest", help="Which sets; by default both.")
    args = parser.parse_args(argv)
    if unknown := set(args.sets) - set(SETS):
        parser.error(f"no such set: {', '.join(sorted(unknown))}")
    for name in args.sets or SETS:
        with tempfile.TemporaryDirectory(prefix=f"blockskip-{name}-") as folder:
            check(name, Path(folder))
    return 0


if __name__ == "__main__":
    sys.exit(main())
