"""Every shipped config and every command of README and docs runs, on a tiny model of the same family."""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import yaml

from blockskip_hooks.cli import console
from blockskip_hooks.cli.arguments import parse_args
from blockskip_hooks.loading.lora_files import WEIGHTS_NAME
from tests import script
from tests.loras import save_random_lora
from tests.quantized import FLUX as WIDE_FLUX
from tests.script import ROOT, load_script, save_photos
from tests.test_image_encoders import save_vit
from tests.tiny import TINY_FAMILIES


TINY = {tiny.name: tiny for tiny in TINY_FAMILIES}
# The tiny pipeline that stands in for each model that a recipe names.
STAND_INS = {
    "black-forest-labs/FLUX.1-dev": "flux-dev",
    "black-forest-labs/FLUX.1-Kontext-dev": "flux-kontext",
    "Efficient-Large-Model/Sana_1600M_1024px_BF16_diffusers": "sana",
    "stabilityai/stable-diffusion-3.5-large": "sd3.5",
    "black-forest-labs/FLUX.2-dev": "flux2-dev",
    "black-forest-labs/FLUX.2-klein-base-9B": "flux2-klein",
    "black-forest-labs/flux-3-image-klein-base": "flux3",
    "Qwen/Qwen-Image": "qwen-image",
    "Qwen/Qwen-Image-2.1": "qwen-image-2.1",
    "Tongyi-MAI/Z-Image": "z-image",
    "Alpha-VLLM/Lumina-Image-2.0": "lumina2",
    "HiDream-ai/HiDream-I1-Full": "hidream",
    "krea/Krea-2-Raw": "krea2",
    "ideogram-ai/ideogram-v4": "ideogram4",
    "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS": "pixart-sigma",
}
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SCRIPTS = {name: f"examples/dreambooth_blockskip/{script}" for name, (script, _) in console.SCRIPTS.items()}


def our_words(command):
    """A command's words from the script's name on, with ``blockskip train`` as its script; None for other commands."""
    words = shlex.split(command, comments=True)
    if words[:1] == ["blockskip"] and words[1] in SCRIPTS:
        return (SCRIPTS[words[1]], *words[2:])
    at = next((n for n, word in enumerate(words) if word.endswith(".py")), None)
    started = words[:1] == ["python"] or words[:2] == ["accelerate", "launch"]
    return tuple(words[at:]) if started and at is not None else None


def commands():
    """Commands in the code blocks of all pages, and those in a line of text that begin with ``blockskip``."""
    blocks, inline = [], []
    for text in (page.read_text() for page in PAGES):
        blocks += re.findall(r"^```bash\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
        blocks += re.findall(r"(?:^    .*\n)+", text, re.MULTILINE)
        without = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
        inline += [" ".join(code.split()) for code in re.findall(r"`(blockskip \w[^`]*)`", without)]
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    parts = [
        part
        for line in lines
        if re.match(r" *(python|accelerate launch|pip install|blockskip) ", line)
        for part in line.split("&&")
    ]
    in_blocks = [words for part in parts if (words := our_words(part))]
    in_text = [words for code in inline if (words := our_words(code))]
    return list(dict.fromkeys(in_blocks)), list(dict.fromkeys(in_text))


COMMANDS, MENTIONED = commands()
RUN = [words for words in COMMANDS if words[0].startswith("examples/dreambooth_blockskip/")]


@pytest.mark.parametrize("words", [*RUN, *MENTIONED], ids=" ".join)
def test_the_flags_of_every_command_are_read(words, monkeypatch):
    path, *flags = words
    # What a page leaves for the reader to fill in.
    flags = ["configs/flux.yaml" if flag.endswith("configs/FILE") else flag for flag in flags]
    flags = ["flux.1-dev" if flag == "NAME" else flag for flag in flags if flag != "..."]
    monkeypatch.chdir(ROOT)
    if "--help" in flags:
        assert (ROOT / path).is_file()
    elif "train_dreambooth" in path:
        assert parse_args(flags).given >= {flag[2:] for flag in flags if flag.startswith("--")} - {"config"}
    elif flags:
        load_script(Path(path).stem).build_parser().parse_args(flags)


def test_the_pages_have_commands():
    assert len(RUN) >= 8 and len(MENTIONED) >= 8
    assert {Path(words[0]).stem for words in RUN} == {Path(script).stem for script in SCRIPTS.values()}


@pytest.fixture
def ground(tmp_path, monkeypatch):
    """A folder with the photos and files that recipes speak of."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    for name in ("dog", "my-photos"):
        save_photos(tmp_path / name, [(80, 64), (64, 64)])
    for path in sorted(save_photos(tmp_path / "pairs", [(80, 64), (64, 64)]).iterdir()):
        shutil.copy(path, path.with_name(f"{path.stem}_cond.png"))
    shutil.copy(tmp_path / "dog" / "0.png", tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def name_of(words):
    model = words[words.index("--pretrained_model_name_or_path") + 1] if len(words) > 4 and MODEL in words else ""
    return f"{Path(words[0]).stem}-{model.rpartition('/')[2]}"


MODEL = "--pretrained_model_name_or_path"
# The only recipes with numbers of blocks are FLUX.1's.
FLUX_BLOCKS = 57


def smaller(model, settings):
    """Flags that put the tiny pipeline in the model's place; behind a recipe's own they win."""
    # A 4-bit layer has a least width.
    tiny = WIDE_FLUX if "quantization" in settings else TINY[STAND_INS[model]]
    flags = {
        MODEL.removeprefix("--"): tiny.folder,
        "resolution": tiny.resolution,
        "max_sequence_length": tiny.text_tokens,
        "max_train_steps": 1,
        "num_validation_images": 1,
        "seed": 0,
        "report_to": "none",
        **tiny.flags,
        **scaled(settings.get("skip_blocks", ""), tiny.num_blocks),
        **({"validation_resolution": tiny.resolution} if "validation_resolution" in settings else {}),
    }
    return [str(part) for name, value in flags.items() for part in (f"--{name}", value)]


def scaled(skip_blocks, num_blocks):
    """A pair of numbers of blocks, as the same part of the tiny model's; at least one of a span that there is."""
    if "," not in skip_blocks:
        return {}
    pair = [int(number) for number in skip_blocks.split(",")]
    return {"skip_blocks": ",".join(str(number and max(1, number * num_blocks // FLUX_BLOCKS)) for number in pair)}


def train(words):
    script.AcceleratorState._reset_state(reset_partial_state=True)
    assert load_script().main([str(word) for word in words]) == 0


@pytest.mark.slow
@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_a_shipped_config_runs(config, ground):
    settings = yaml.safe_load(config.read_text())
    flags = smaller(settings["pretrained_model_name_or_path"], settings)
    train(["--config", config, *flags])
    output = ground / settings["output_dir"]
    assert (output / WEIGHTS_NAME).is_file()
    skip = json.loads((output / "plan.json").read_text())["skip"]
    assert skip["ratio"] > 0
    if "," in settings["skip_blocks"]:
        assert f"{skip['leading']},{skip['trailing']}" == flags[flags.index("--skip_blocks") + 1]


def test_the_table_of_models_is_what_the_recipes_say():
    section = README.split("\n## Models\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| `(.+?)` \| (\d+) \| (\S+) \| (\S+\.yaml) \|$", section, re.MULTILINE)
    assert {model for model, *_ in rows} == set(STAND_INS)
    for model, pixels, output, file in rows:
        settings = yaml.safe_load((ROOT / "configs" / file).read_text())
        found = (settings["pretrained_model_name_or_path"], settings["resolution"], settings["output_dir"])
        assert found == (model, int(pixels), output)


def test_recipes_set_what_their_page_says():
    """Of upstream's defaults those that a person would not have chosen; see docs/choosing_settings.md."""
    for path in CONFIGS:
        settings = yaml.safe_load(path.read_text())
        assert settings.get("lora_alpha", 4) == settings.get("rank", 4), path
        assert settings["seed"] == 0 and settings["checkpointing_steps"] == 100 and settings["lr_warmup_steps"] == 0
        assert (settings["skip_blocks"] == "auto" or "gb" in path.stem) and settings["train_batch_size"] == 1


def test_each_gpu_size_has_a_config_that_says_what_it_needs():
    for size in (6, 8, 12, 16, 24):
        text = (ROOT / "configs" / f"flux-{size}gb.yaml").read_text().replace("\n# ", " ")
        peaks = [float(number) for number in re.findall(r"(\d+\.\d) GiB", text.partition("Simulated memory")[2])]
        # A gigabyte of the box is 0.93 GiB; a display needs the rest.
        assert len(peaks) >= 4 and max(peaks) <= 0.95 * size * 1e9 / 2**30


@pytest.mark.slow
@pytest.mark.parametrize("words", RUN, ids=name_of)
def test_a_command_of_the_pages_runs(words, ground):
    path, *flags = words
    model = flags[flags.index(MODEL) + 1] if MODEL in flags else None
    model = "black-forest-labs/FLUX.1-dev" if model == "MODEL" else model
    settings = {}
    if "--config" in flags:
        settings = yaml.safe_load((ROOT / flags[flags.index("--config") + 1]).read_text())
        model = settings["pretrained_model_name_or_path"]
    name = Path(path).stem
    assert (ROOT / path).is_file()
    if name == "train_dreambooth_blockskip":
        small = ["--max_train_steps", "1", "--skip_final_inference", "--report_to", "none"]
        train([*flags, *(smaller(model, settings) if model else small)])
        return
    if name == "plan_memory":
        # Its parser and its checks; the simulation of the model itself is that of tests/test_presets.py.
        module = load_script(name)
        module.check_args(module.build_parser().parse_args(flags))
        return
    script.AcceleratorState._reset_state(reset_partial_state=True)
    assert name in ("select_blocks", "evaluate")
    tiny = TINY[STAND_INS[model]]
    common = [*flags, MODEL, str(tiny.folder), "--resolution", str(tiny.resolution), "--max_sequence_length", "12"]
    common += ["--num_inference_steps", "1", "--seeds", "0"]
    if name == "select_blocks":
        common += ["--encoder", "offline"]
        if "--lora_weights" in flags:
            for lora in ("flux-dog", "flux-cat"):
                save_random_lora(tiny, ground / lora, alpha=1)
        else:
            common += ["--prompts", "a dog"]
    else:
        save_random_lora(tiny, ground / "flux-dog", alpha=1)
        save_vit(ground / "encoder")
        common += ["--encoders", str(ground / "encoder")]
    assert load_script(name).main(common) == 0


def test_other_commands_name_files_that_are_there():
    text = "".join(page.read_text() for page in PAGES)
    for path in re.findall(r"(?:python|launch) ((?:examples|benchmarks|tools)/[\w/]+\.py)", text):
        assert (ROOT / path).is_file()
    for path in re.findall(r"--config(?:_file)? ([\w./-]+\.yaml)", text):
        assert (ROOT / path).is_file()
