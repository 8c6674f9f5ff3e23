#!/usr/bin/env python
"""Build sdist and wheel, install the wheel in a fresh environment, and run the embedded model with it, elsewhere.

Needs ``pip install build``. The wheel is built from the sdist, so both are proven. By default the fresh environment
gets the package's dependencies from the package index; ``--reuse_dependencies`` lets it see those of the environment
that this script runs in, which spares gigabytes. The package itself is always the wheel's.

Example:
    python tools/check_build.py --reuse_dependencies
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import zipfile
from pathlib import Path


ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "blockskip_hooks"
SCRIPT = Path("examples") / "dreambooth_blockskip" / "train_dreambooth_blockskip.py"
SETTINGS = ("--skip_blocks", "auto", "--max_train_steps", "2", "--num_validation_images", "0", "--report_to", "none")


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    """Run a command; what it prints. A failure shows what it said.

    Raises:
        SystemExit: if it fails.
    """
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(list(map(str, command)), cwd=cwd, env=clean | environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}")
    return done.stdout


def build(folder: Path) -> tuple[Path, Path]:
    """The sdist, and the wheel made of it; from a copy, because setuptools writes beside what it builds."""
    copy = folder.parent / "copy"
    left_out = shutil.ignore_patterns(
        ".git", "build", "dist", "*.egg-info", "__pycache__", "venv", ".venv", ".*_cache"
    )
    shutil.copytree(ROOT, copy, ignore=left_out)
    run(sys.executable, "-m", "build", "--outdir", folder, copy, cwd=folder)
    (sdist,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    return sdist, wheel


def check_contents(sdist: Path, wheel: Path) -> None:
    """Every file of the package is in both, and what else is needed in the sdist.

    Raises:
        SystemExit: naming what is missing.
    """
    files = {path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*") if path.is_file()}
    files = {name for name in files if "__pycache__" not in name}
    packed = set(zipfile.ZipFile(wheel).namelist())
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    missing = sorted(name for name in files if f"blockskip_hooks/{name}" not in packed)
    missing += sorted(name for name in files if f"src/blockskip_hooks/{name}" not in names)
    beside = (
        "README.md",
        "CHANGELOG.md",
        "LICENSE",
        "Makefile",
        str(SCRIPT),
        "tests/conftest.py",
        "docs/reference.md",
    )
    missing += [name for name in beside if name not in names]
    shipped = (f"share/blockskip_hooks/{name}" for name in (SCRIPT.as_posix(), "configs/flux.yaml"))
    missing += [name for name in shipped if not any(packed_name.endswith(name) for packed_name in packed)]
    if missing:
        sys.exit(f"missing in the distributions: {', '.join(missing)}")
    print(f"{wheel.name}: {len(packed)} files, {wheel.stat().st_size / 1e6:.1f} MB; all {len(files)} of the package")


def make_environment(folder: Path, wheel: Path, reuse: bool) -> Path:
    """A fresh environment with the wheel; its Python."""
    run(sys.executable, "-m", "venv", folder, cwd=folder.parent)
    python = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
    if reuse:
        places = sysconfig.get_paths(vars={"base": str(folder), "platbase": str(folder)})
        # Behind the environment's own packages on the path.
        (Path(places["purelib"]) / "reused.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    run(python, "-m", "pip", "install", "--quiet", *(("--no-deps",) if reuse else ()), wheel, cwd=folder.parent)
    return python


def main(argv: list[str] | None = None) -> int:
    """Build, install, run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reuse_dependencies", action="store_true", help="Use this environment's dependencies.")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="blockskip-build-") as name:
        folder = Path(name)
        (folder / "dist").mkdir()
        (folder / "elsewhere").mkdir()
        sdist, wheel = build(folder / "dist")
        check_contents(sdist, wheel)
        python = make_environment(folder / "environment", wheel, args.reuse_dependencies)
        elsewhere, settings = folder / "elsewhere", {"HF_HUB_OFFLINE": "1"}
        where = run(python, "-c", "import blockskip_hooks as b; print(b.__file__)", cwd=elsewhere, **settings).strip()
        if folder / "environment" not in Path(where).parents:
            sys.exit(f"the package comes from {where}, not from the wheel")
        # Beside Python; it runs the script that the wheel brings along.
        command = python.with_name("blockskip")
        run(command, "train", *SETTINGS, "--output_dir", elsewhere / "out", cwd=elsewhere, **settings)
        run(command, "doctor", cwd=elsewhere, **settings)
        made = sorted(path.name for path in (elsewhere / "out").iterdir())
        if "pytorch_lora_weights.safetensors" not in made:
            sys.exit(f"the run left only {', '.join(made)}")
        print(f"the command of the installed wheel left {', '.join(made)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
