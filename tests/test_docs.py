"""The pages: links lead somewhere, quoted lines and flags exist, made pages are fresh, the notebook runs."""

from __future__ import annotations

import ast
import functools
import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import nbformat
import pytest
import yaml
from nbclient import NotebookClient

from blockskip_hooks.cli.arguments import build_parser, family_flags
from blockskip_hooks.cli.flag_names import with_flags
from blockskip_hooks.families.base import Family
from blockskip_hooks.families.facts import FamilyFacts
from blockskip_hooks.version import __version__
from tests.script import load_module, load_script


ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted({*ROOT.glob("*.md"), *DOCS.glob("*.md"), *ROOT.glob("benchmarks/*.md"), *ROOT.glob("tools/*/*.md")})
NOTEBOOK = ROOT / "examples" / "dreambooth_blockskip" / "blockskip_colab.ipynb"
# Flags of other commands: accelerate, torchrun, pip, .ci/run and the like.
FOREIGN = {"--config_file", "--num_processes", "--num_machines", "--machine_rank", "--main_process_ip"}
FOREIGN |= {"--check", "--fast", "--quiet"}


def load_tool(name: str) -> ModuleType:
    return load_module(ROOT / "tools" / f"{name}.py")


def without_blocks(page: Path) -> str:
    return re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)


@functools.cache
def anchors(page: Path) -> set[str]:
    """Names that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", without_blocks(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def wrong_links(page: Path) -> list[str]:
    """Relative links of a page whose file or heading is not there."""
    wrong = []
    for link in re.findall(r"\]\(([^)\s]+)\)", without_blocks(page)):
        if "://" in link or link.startswith("mailto:"):
            continue
        file, _, anchor = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        if not target.exists() or (anchor and target.suffix == ".md" and anchor not in anchors(target)):
            wrong.append(link)
    return wrong


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path):
    assert wrong_links(page) == []


def test_a_wrong_link_would_be_found(tmp_path: Path):
    page = tmp_path / "page.md"
    page.write_text("# A heading\n[a](#a-heading) [b](#nothing) [c](nowhere.md) [d](page.md#a-heading)\n")
    assert wrong_links(page) == ["#nothing", "nowhere.md"]


def known_flags() -> set[str]:
    parsers = [build_parser()]
    parsers += [load_script(name).build_parser() for name in ("plan_memory", "select_blocks", "evaluate")]
    known = {option for parser in parsers for action in parser._actions for option in action.option_strings}
    return known | {f"--{name}" for name in family_flags()}


def flags_of(text: str) -> set[str]:
    return set(re.findall(r"(?<![\w-])--(?:no-)?[a-z][a-z0-9_]+", text))


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=lambda page: page.stem)
def test_flags_in_pages_exist(page: Path):
    text = page.read_text()
    if page.stem == "migrating":
        # Of the table only the first column is ours; below it other projects' flags are named as such.
        text = "\n".join(line.split("|")[1] for line in text.splitlines() if line.startswith("|"))
    tool_flags = set(re.findall(r"--[a-z_]+", "".join(p.read_text() for p in (ROOT / "tools").glob("*.py"))))
    assert flags_of(text) - known_flags() - FOREIGN - (tool_flags if page.stem == "contributing" else set()) == set()


def test_files_named_in_pages_exist():
    for page in sorted(DOCS.glob("*.md")):
        text = page.read_text()
        if page.stem == "migrating":
            text = text.partition("Habits that change")[2]
        for name in re.findall(r"`((?:src|tests|tools|examples|benchmarks|docs)/[\w./-]+)`", text):
            assert "NAME" in name or (ROOT / name).exists(), f"{page.name}: {name}"


def test_the_architecture_names_every_room_and_files_that_exist():
    text, package = (DOCS / "architecture.md").read_text(), ROOT / "src" / "blockskip_hooks"
    for name in re.findall(r"`((?:[a-z_]+/)?[a-z_0-9]+\.py|[a-z]+/)`", text):
        assert (package / name).exists() or (ROOT / name).exists(), name
    method = {path.name for path in package.glob("*.py")} - {"__init__.py", "version.py"}
    rooms = {f"{path.parent.name}/" for path in package.glob("*/__init__.py")}
    assert {name for name in method | rooms if f"`{name}`" not in text} == set()


def test_commands_in_pages_name_scripts_that_exist():
    for page in PAGES:
        for script in re.findall(r"python ((?:examples|tools|benchmarks)/[\w/]+\.py)", page.read_text()):
            assert (ROOT / script).is_file(), f"{page.name}: {script}"


def test_commands_in_pages_print_no_lines_of_accelerate():
    """Without a config it names its default values first, and after an error it adds its own traceback."""
    for page in (*PAGES, NOTEBOOK, *sorted((ROOT / "configs").glob("*.yaml"))):
        text = page.read_text()
        assert not re.findall(r"accelerate launch(?! --quiet)[^`]* (?:examples|configs)/\S+\.py", text), page


def test_page_lists_what_a_family_may_override():
    """All of it, in two tables, and the file that a row names overrides something of the row."""
    defines, overrides = (DOCS / "adding_a_family.md").read_text().split("## What a family defines")[1].split("\n## ")
    listed = []
    for required, table in ((True, defines), (False, overrides)):
        for line in re.findall(r"^\| `.+ \|$", table, flags=re.MULTILINE):
            names, *_, last = (re.findall(r"`([\w.]+)`", cell) for cell in line.strip("|").split("|"))
            listed += names
            if required:
                assert all(name in Family.__abstractmethods__ or not getattr(Family, name, None) for name in names), (
                    line
                )
            else:
                assert set(names) & overridden(*last), line
    classes = (Family, FamilyFacts)
    public = {name for cls in classes for name in {**vars(cls), **cls.__annotations__} if not name.startswith("_")}
    assert sorted(listed) == sorted(public)


def overridden(file: str) -> set[str]:
    """Names that a class in a family's file sets or defines."""
    tree = ast.parse((ROOT / "src" / "blockskip_hooks" / "families" / file).read_text())
    found: set[str] = set()
    for node in (node for cls in tree.body if isinstance(cls, ast.ClassDef) for node in cls.body):
        if isinstance(node, ast.FunctionDef):
            found.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {ast.unparse(target) for target in targets}
    return found


# Troubleshooting


@functools.cache
def messages() -> frozenset[str]:
    """Texts of the package and the script, with an ellipsis for each value that is filled in."""

    def text(node: ast.expr) -> str:
        if isinstance(node, ast.JoinedStr):
            return "".join(text(part) for part in node.values)
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            return text(node.left) + text(node.right)
        return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else "…"

    files = [*(ROOT / "src").rglob("*.py"), *(ROOT / "examples" / "dreambooth_blockskip").glob("*.py")]
    trees = [ast.walk(ast.parse(file.read_text())) for file in files]
    kinds = (ast.JoinedStr, ast.Constant, ast.BinOp)
    return frozenset(with_flags(text(node)) for tree in trees for node in tree if isinstance(node, kinds))


LINES = [
    line
    for block in re.findall(
        r"^```text\n(.*?)^```", (DOCS / "troubleshooting.md").read_text(), re.MULTILINE | re.DOTALL
    )
    for line in block.splitlines()
]


def is_quoted(line: str) -> bool:
    """Whether a line is of the code: its fixed parts, in their order, in one text."""
    parts = line.split("…")
    # What a page shows as one value may be several in the code, and the other way round.
    pattern = re.compile(".*?".join(map(re.escape, parts)), re.DOTALL)
    return any(all(part in message for part in parts) and pattern.search(message) for message in messages())


@pytest.mark.parametrize("line", LINES, ids=range(len(LINES)))
def test_quoted_errors_are_those_of_the_code(line: str):
    assert any(len(part.strip()) > 10 for part in line.split("…")), "values alone would be found anywhere"
    assert is_quoted(line)


def test_there_are_errors_to_quote_and_others_are_not_found():
    assert len(LINES) >= 15
    assert not is_quoted(LINES[0].replace("Memory ran out", "Memory run out"))
    assert not is_quoted("--skip_blocks … leaves none of … blocks to train; give at least ….")


# Made pages


def test_reference_is_fresh(capsys: pytest.CaptureFixture[str]):
    assert load_tool("make_reference").main(["--check"]) == 0, capsys.readouterr().out


def test_the_page_of_models_is_fresh(capsys: pytest.CaptureFixture[str]):
    assert load_tool("make_models").main(["--check"]) == 0, capsys.readouterr().out


def test_every_flag_has_a_row_with_its_default():
    page = (DOCS / "flags.md").read_text()
    for action in build_parser()._actions:
        (row,) = [line for line in page.splitlines() if line.startswith(f"| `{action.option_strings[0]}`")] or [""]
        assert action.dest == "help" or row, action.dest
        if action.nargs != 0 and action.dest != "help" and "Refused" not in row:
            assert "efault" in row, action.dest
    assert "| ours |" in page and "| diffusers |" in page


def test_the_site_has_every_page():
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    site = {
        page for entry in config["nav"] for page in ([entry] if isinstance(entry, str) else next(iter(entry.values())))
    }
    assert site == {page.name for page in DOCS.glob("*.md")}


def test_links_out_of_the_pages_are_plain_on_the_site_without_an_address(monkeypatch: pytest.MonkeyPatch):
    tool, text = load_tool("site_links"), "[a](../README.md#x) ![b](../c.png) [d](faq.md)"
    monkeypatch.delenv("REPOSITORY", raising=False)
    assert tool.on_page_markdown(text) == "a ![b](../c.png) [d](faq.md)"
    monkeypatch.setenv("REPOSITORY", "https://example.org/x/")
    assert tool.on_page_markdown(text).startswith("[a](https://example.org/x/blob/HEAD/README.md#x) ")


def test_questions_are_answered():
    questions = re.findall(r"^## (.+)$", (DOCS / "faq.md").read_text(), flags=re.MULTILINE)
    assert len(questions) >= 15 and all(question.endswith("?") for question in questions)


def test_changelog_is_of_this_version():
    changelog = (ROOT / "CHANGELOG.md").read_text()
    assert re.fullmatch(r"\d+\.\d+\.\d+", __version__)
    assert "## [Unreleased]" in changelog and __version__ in changelog
    sections = set(re.findall(r"^### (\w+)$", changelog, flags=re.MULTILINE))
    assert sections and sections <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


def test_contributors_find_the_targets():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    assert targets == set(re.findall(r"`make ([a-z-]+)`", (DOCS / "contributing.md").read_text()))
    for script in re.findall(r"python ([\w/]+\.py)", (ROOT / "Makefile").read_text()):
        assert (ROOT / script).is_file()


def test_figures_are_drawn(tmp_path: Path):
    assert load_tool("draw_figures").main(["--output_dir", str(tmp_path)]) == 0
    names = {path.name for path in tmp_path.iterdir()}
    shown = set(re.findall(r"images/(how_\w+\.png)", (DOCS / "how_it_works.md").read_text()))
    assert names == shown and all((DOCS / "images" / name).is_file() for name in names)


# The notebook


def test_the_notebook_installs_what_its_recipe_needs():
    text = NOTEBOOK.read_text()
    (recipe,) = re.findall(r"shipped\(.\"(configs/[a-z0-9-]+\.yaml)", text)
    assert yaml.safe_load((ROOT / recipe).read_text())["use_8bit_adam"] and "{CLONE}[quantization]" in text


@pytest.mark.slow
def test_notebook_runs_from_top_to_bottom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """As Jupyter would, with the parameters cell replaced by that of a short run."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "src"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    assert not any(cell.get("outputs") for cell in notebook.cells)
    (parameters,) = (cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", []))
    parameters.source = (
        f"PRESET, STEPS, IMAGES, OUTPUT = 'sana-0.6b', 1, 1, Path({str(tmp_path / 'out')!r})\n"
        # Most of the time would go into images of three prompts.
        "FLAGS = ('--final_validation_prompt', 'a photo of sks dog')"
    )
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(NOTEBOOK.parent)}}).execute()
    assert (tmp_path / "out" / "pytorch_lora_weights.safetensors").is_file()
    printed = "".join(o.get("text", "") for c in notebook.cells if c.cell_type == "code" for o in c.outputs)
    assert "architecture only" in printed and "embedded micro-FLUX" in printed and "skipped: " in printed
    pictures = [
        o for c in notebook.cells if c.cell_type == "code" for o in c.outputs if "image/png" in o.get("data", {})
    ]
    assert len(pictures) == 3


def others_measurements() -> dict[str, Any]:
    return json.loads((ROOT / "benchmarks" / "others_measurements.json").read_text())


def rows_beside_others() -> list[list[str]]:
    """The cells of the table of others' measurements, row by row."""
    page = (DOCS / "benchmarks.md").read_text()
    section = page.split("\n## The planner beside others' measurements\n")[1].split("\n## ")[0]
    return [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("| ")][1:]


def test_others_measurements_have_their_flags_and_differences():
    others = others_measurements()
    rows = rows_beside_others()
    assert [row[0] for row in rows] == [other["setting"] for other in others["rows"]]
    for (_, live, _, _, theirs, difference), other in zip(rows, others["rows"], strict=True):
        assert theirs.startswith(f"{other['theirs_gib']:.2f}") and f"[{other['source']}]" in theirs
        assert round(100 * (float(live) / other["theirs_gib"] - 1)) == int(difference.removesuffix(" %"))
        load_script("plan_memory").build_parser().parse_args(other["flags"].split())


# Slow


@pytest.mark.slow
def test_the_memory_table_is_what_its_command_prints(capsys: pytest.CaptureFixture[str]):
    section = (DOCS / "benchmarks.md").read_text().split("\n## Memory\n")[1].split("\n## ")[0]
    (command,) = re.findall(r"^    python \S+/plan_memory\.py ((?:[^\\\n]|\\\n)+)$", section, flags=re.MULTILINE)
    (last,) = re.findall(r"^    # last row: (.+)$", section, flags=re.MULTILINE)
    rows = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("| ")][1:7]
    plain, checkpointed = ["--skip_blocks", "none"], ["--gradient_checkpointing"]
    changes = [plain, [*plain, *checkpointed], ["--skip_blocks", "7,10"], [], checkpointed, last.split()]
    for (_, *shown, needed, tflops), more in zip(rows, changes, strict=True):
        assert load_script("plan_memory").main([*command.replace("\\\n", " ").split(), *more, "--json"]) == 0
        stages = {stage["name"]: stage for stage in json.loads(capsys.readouterr().out)["stages"]}
        most = max(stage["needed_bytes"] for stage in stages.values()) / 2**30
        assert most == pytest.approx(float(needed.removesuffix(" GiB")), abs=0.06), more
        for name, figure in zip(("encode", "precompute", "train", "validate"), shown, strict=True):
            planned = stages[name]["peak_device_bytes"] / 2**30
            assert planned == pytest.approx(float(figure.removesuffix(" GiB")), abs=0.06), (name, more)
        assert stages["train"]["tflops_per_step"] == pytest.approx(float(tflops), abs=0.06), more
    (figures,) = re.findall(
        r"^    # .*training in (\S+) or (\S+) GiB each: --shared_by 2, 4$", section, flags=re.MULTILINE
    )
    for processes, figure in zip(("2", "4"), figures, strict=True):
        words = [*command.replace("\\\n", " ").split(), "--shared_by", processes, "--json"]
        assert load_script("plan_memory").main(words) == 0
        (train,) = (s for s in json.loads(capsys.readouterr().out)["stages"] if s["name"] == "train")
        assert train["peak_device_bytes"] / 2**30 == pytest.approx(float(figure), abs=0.06)


@pytest.mark.slow
def test_figures_beside_others_measurements_are_the_planners(capsys: pytest.CaptureFixture[str]):
    table = {row[0]: [float(cell.split()[0].rstrip(",")) for cell in row[1:5]] for row in rows_beside_others()}
    for other in others_measurements()["rows"]:
        if other["flags"].startswith(("--preset sd3.5-medium", "--preset flux.2-klein-4b --resolution 512")):
            words = ["--skip_blocks", "none", "--json", *other["flags"].split()]
            assert load_script("plan_memory").main(words) == 0
            (train,) = (s for s in json.loads(capsys.readouterr().out)["stages"] if s["name"] == "train")
            planned = [train[f"{name}_bytes"] / 2**30 for name in ("peak_device", "peak_reserved", "needed")]
            assert planned == pytest.approx(table[other["setting"]][:3], abs=0.02), other["setting"]


@pytest.mark.slow
def test_distributions_build_and_work_elsewhere():
    command = [sys.executable, str(ROOT / "tools" / "check_build.py"), "--reuse_dependencies"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "pytorch_lora_weights.safetensors" in done.stdout
