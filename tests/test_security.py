"""Nothing runs that came with data, nothing leaves its folder, and no token or markup gets where it is shown."""

import ast
import html.parser
import json
import logging
import os
import re
import shlex

import pytest
import yaml
from PIL import Image

from blockskip_hooks.cli.arguments import printable_command
from blockskip_hooks.cli.errors import explain, one_line
from blockskip_hooks.data.dataset import load_dataset_photos
from blockskip_hooks.data.folder import check_inside
from blockskip_hooks.data.photos import scan_photos
from blockskip_hooks.inference.image_encoders import load_image_encoder
from tests.script import ROOT, load_script, save_photos, train
from tests.tiny import save_tiny_flux


SECRET = "Sesame0pen7"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny_flux(tmp_path_factory.mktemp("model") / "model")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return save_photos(tmp_path_factory.mktemp("photos"), [(64, 64)] * 2)


# The code


def calls(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}


def imports(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""


SOURCES = [
    path for folder in ("src", "examples", "tools", "benchmarks") for path in sorted((ROOT / folder).rglob("*.py"))
]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_code_unpickles_evaluates_or_starts_a_shell(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    unpicklers = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
    assert not unpicklers & {name.split(".")[0] for name in imports(tree)}
    for name, keywords in calls(tree):
        assert name not in ("eval", "exec", "os.system", "os.popen", "yaml.load", "yaml.unsafe_load"), name
        assert keywords.get("shell", "False") == "False", name
        assert keywords.get("trust_remote_code", "False") == "False", name
        assert keywords.get("allow_pickle", "False") == "False", name
        if name == "torch.load":
            assert keywords.get("weights_only") == "True"
        assert name != "torch.save"


def test_classes_that_could_bring_code_are_told_not_to():
    """transformers asks on the terminal where nothing is said, and waits."""
    for path in (ROOT / "src").rglob("*.py"):
        for name, keywords in calls(ast.parse(path.read_text(encoding="utf-8"))):
            if re.fullmatch(r"(AutoTokenizer|AutoConfig|AutoImageProcessor|AutoModel)\.from_pretrained", name):
                diffusers_has_it = path.name == "base.py"
                assert diffusers_has_it or keywords.get("trust_remote_code") == "False", path.name


# Code in data


def leaves_a_trace(folder):
    return f"import os\nos.mkdir({str(folder / 'ran')!r})\nclass Evil: pass\n"


def test_code_beside_an_image_encoder_is_not_run(tmp_path):
    folder = tmp_path / "encoder"
    folder.mkdir()
    (folder / "evil.py").write_text(leaves_a_trace(tmp_path))
    auto = {"AutoConfig": "evil.Evil", "AutoModel": "evil.Evil", "AutoImageProcessor": "evil.Evil"}
    (folder / "config.json").write_text(json.dumps({"model_type": "evil", "auto_map": auto}))
    (folder / "preprocessor_config.json").write_text(json.dumps({"auto_map": auto}))
    with pytest.raises(ValueError, match="cannot be loaded"):
        load_image_encoder(folder)
    assert not (tmp_path / "ran").exists()


def test_the_script_of_a_dataset_is_not_run(tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "set.py").write_text(leaves_a_trace(tmp_path))
    with pytest.raises(ValueError, match="^--dataset_name .* cannot be loaded"):
        load_dataset_photos(str(folder), cache_dir=str(tmp_path / "cache"))
    assert not (tmp_path / "ran").exists()


# Paths


def test_links_within_a_folder_and_of_the_hubs_cache_are_followed(tmp_path):
    save_photos(tmp_path / "photos" / "more", [(64, 64)])
    (tmp_path / "photos" / "a.png").symlink_to("more/0.png")
    blob = save_photos(tmp_path / "datasets--someone--dog" / "blobs", [(64, 64)]) / "0.png"
    snapshot = tmp_path / "datasets--someone--dog" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "a.png").symlink_to(os.path.relpath(blob, snapshot))
    (tmp_path / "link").symlink_to(tmp_path / "photos")
    for folder in (tmp_path / "photos", snapshot, tmp_path / "link"):
        (photo,) = scan_photos(folder)
        assert photo.size == (64, 64)


@pytest.mark.parametrize("target", ["../secret.png", "../photos-of-others/a.png", "../blobs/a.png"])
def test_links_that_lead_out_of_a_folder_are_not_followed(tmp_path, target):
    (tmp_path / "photos").mkdir()
    path = tmp_path / "photos" / target
    path.parent.resolve().mkdir(exist_ok=True)
    Image.new("RGB", (8, 8)).save(path.parent.resolve() / path.name)
    (tmp_path / "photos" / "a.png").symlink_to(target)
    with pytest.raises(ValueError, match="leads out of the folder"):
        check_inside(tmp_path / "photos" / "a.png")
    with pytest.raises(ValueError, match=r"a\.png \(a link that leads out of the folder"):
        scan_photos(tmp_path / "photos")


def test_a_table_cannot_name_files_of_this_machine(tmp_path):
    import pyarrow
    import pyarrow.parquet

    Image.new("RGB", (8, 8)).save(tmp_path / "secret.png")
    (tmp_path / "set").mkdir()
    kind = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    rows = pyarrow.array([{"bytes": None, "path": str(tmp_path / "secret.png")}], kind)
    features = {"info": {"features": {"image": {"_type": "Image"}}}}
    table = pyarrow.table({"image": rows}).replace_schema_metadata({"huggingface": json.dumps(features)})
    pyarrow.parquet.write_table(table, tmp_path / "set" / "train.parquet")
    with pytest.raises(ValueError, match=r"000000 \(a path that leads out of the dataset"):
        load_dataset_photos(str(tmp_path / "set"), cache_dir=str(tmp_path / "cache"))


# Tokens


def assert_not_in_files(secret, *folders):
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    assert files
    assert [path for path in files if secret.encode() in path.read_bytes()] == []
    assert [path for path in files if secret in path.name] == []


def test_the_token_is_in_nothing_that_a_run_leaves_or_says(model, photos, tmp_path, monkeypatch, capfd, caplog):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    caplog.set_level(logging.DEBUG, logger="blockskip_hooks")
    flags = ("--skip_blocks", "auto")
    flags += ("--report_to", "tensorboard", "--checkpointing_steps", "1", "--max_train_steps", "2")
    flags += (
        "--validation_prompt",
        "a dog",
        "--num_validation_images",
        "1",
        "--residual_dir",
        str(tmp_path / "records"),
    )
    output = train(model, photos, tmp_path / "out", *flags, f"--hub_token={SECRET}")
    assert (output / "logs").is_dir()
    assert "***" in (output / "report.html").read_text()
    assert_not_in_files(SECRET, tmp_path)
    said = "".join(capfd.readouterr()) + caplog.text
    assert "Trained 2 steps" in said and SECRET not in said


def test_the_token_is_in_nothing_that_a_search_leaves_or_says(model, tmp_path, capfd):
    argv = ["--pretrained_model_name_or_path", str(model), "--max_sequence_length", "12", "--encoder", "offline"]
    argv += ["--no_cache", "--num_inference_steps", "1", "--prompts", "a dog", "--seeds", "0", "--search_stride", "4"]
    argv += ["--window_lengths", "4", "--resolution", "32", "--output_dir", str(tmp_path), "--hub_token", SECRET]
    assert load_script("select_blocks").main(argv) == 0
    assert "--hub_token" in json.loads((tmp_path / "selection.json").read_text())["command"]
    assert_not_in_files(SECRET, tmp_path)
    assert SECRET not in "".join(capfd.readouterr())


def test_the_token_is_not_in_errors(tmp_path, capfd, photos):
    error = OSError(f"cannot reach https://user:{SECRET}@example.org\nat all")
    assert explain(error, "plan", SECRET) == "cannot reach https://user:***@example.org at all"
    argv = ["--pretrained_model_name_or_path", "nobody/nothing", "--instance_data_dir", str(photos)]
    argv += ["--instance_prompt", "a dog", "--output_dir", str(tmp_path / "out"), "--hub_token", SECRET]
    capfd.readouterr()
    assert load_script().main(argv) == 2
    assert SECRET not in "".join(capfd.readouterr())


@pytest.mark.parametrize(
    "words",
    [
        ["x.py", "--hub_token", SECRET],
        ["x.py", f"--hub_token={SECRET}", "--rank", "4"],
        ["--hub_token", f"{SECRET} b c"],
    ],
)
def test_command_lines_are_shown_without_the_token(words):
    shown = printable_command(words)
    assert SECRET not in shown and "b c" not in shown and "***" in shown
    assert [word for word in shlex.split(shown) if "***" not in word] == [word for word in words if SECRET not in word]


# Markup


HOSTILE = (
    'a photo of <script>alert("1")</script> | `x` ``` \n---\n# sks [dog](javascript:alert(2)) {{ 7 * 7 }} </style>'
)


class Page(html.parser.HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.text = set(), set(), ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attributes}

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def hostile(model, tmp_path_factory):
    """The output of a run whose prompts, folder and photos have names that are markup."""
    root = tmp_path_factory.mktemp("hostile")
    folder = save_photos(root / "<b>photos</b>", [(64, 64)])
    (folder / "0.png").rename(folder / "a`|<img src=x onerror=alert(3)>\n.png")
    output = root / "out <script>alert(4)<|script> `|`"
    flags = ("--instance_prompt", HOSTILE, "--validation_prompt", HOSTILE, "--num_validation_images", "1")
    return train(model, folder, output, *flags, "--skip_blocks", "1,1", "--max_train_steps", "2")


def test_the_page_shows_hostile_names_as_text(hostile):
    page = Page((hostile / "report.html").read_text(encoding="utf-8"))
    assert "script" not in page.tags
    assert not {name for name in page.attributes if name.startswith("on")}
    assert (
        '<script>alert("1")</script> | `x` ```' in page.text
        and "{{ 7 * 7 }}" in page.text
        and "49 }}" not in page.text
    )


def test_the_card_shows_hostile_names_as_text(hostile):
    text = (hostile / "README.md").read_text(encoding="utf-8")
    front, body = re.fullmatch(r"---\n(.*?)\n---\n(.*)", text, re.DOTALL).groups()
    data = yaml.safe_load(front)
    assert data["instance_prompt"] == HOSTILE and [entry["text"] for entry in data["widget"]] == [HOSTILE]
    # What is left without code, in which nothing is markup.
    fence = re.search(r"^(`{3,})python$", body, re.MULTILINE)[1]
    assert body.count(f"\n{fence}\n") == 1
    prose = re.sub(rf"^{fence}python\n.*?^{fence}$", "", body, flags=re.DOTALL | re.MULTILINE)
    prose = re.sub(r"(?<![\\`])(`+)(?!`).*?(?<!`)\1(?!`)", "", prose)
    assert "<Gallery />" in prose
    assert re.findall(r"(?<!\\)<(?!Gallery)", prose) == [] and "](javascript" not in prose
    headings = re.findall("^#+ .*", prose, re.MULTILINE)
    assert headings[0].startswith("# out \\<script\\>alert(4)\\<\\|script\\> \\`\\|\\`") and headings[1:] == [
        *("## Trigger words", "## How to use it", "## How it was trained", "## Limits and licence")
    ]
    rows = [line for line in prose.splitlines() if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {3}


def test_the_snippet_of_the_card_is_python_whatever_the_prompt(hostile):
    body = (hostile / "README.md").read_text(encoding="utf-8")
    code = re.search(r"^(`{3,})python\n(.*?)^\1$", body, re.DOTALL | re.MULTILINE)[2]
    strings = [node.value for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Constant)]
    # The card may be shared: no folder of the machine is in it.
    assert HOSTILE in strings and hostile.name in strings and str(hostile) not in strings


def test_a_run_leaves_no_pickle(hostile):
    for path in hostile.rglob("*"):
        if path.is_file():
            head = path.read_bytes()[:2]
            assert head not in (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"), path.name
            assert path.suffix in (".json", ".html", ".md", ".png", ".safetensors"), path.name


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\nb\r\n c", "a b c"),
        ("\x1b[31mred", "\\x1b[31mred"),
        ("a\u202egnp.exe", "a\\u202egnp.exe"),
        ("Hündchen 犬", "Hündchen 犬"),
    ],
)
def test_errors_show_what_would_break_or_colour_a_line(text, shown):
    assert one_line(text) == shown
