"""Every shipped config and every command of the README runs, on a tiny model of the same family."""

import json
import re
import shlex
from pathlib import Path

import pytest
import yaml

from blockskip_hooks.loading.lora_files import WEIGHTS_NAME
from tests import script
from tests.loras import save_random_lora
from tests.script import ROOT, load_script, save_photos
from tests.test_image_encoders import save_vit
from tests.test_quantization import FLUX as WIDE_FLUX
from tests.tiny import TINY_FAMILIES


TINY = {tiny.name: tiny for tiny in TINY_FAMILIES}
# The tiny pipeline that stands in for each model that a recipe names.
STAND_INS = {
    "black-forest-labs/FLUX.1-dev": "flux-dev",
    "Efficient-Large-Model/Sana_1600M_1024px_BF16_diffusers": "sana",
    "stabilityai/stable-diffusion-3.5-large": "sd3.5",
    "black-forest-labs/FLUX.2-dev": "flux2-dev",
    "black-forest-labs/FLUX.2-klein-base-9B": "flux2-klein",
    "Qwen/Qwen-Image": "qwen-image",
    "Tongyi-MAI/Z-Image": "z-image",
    "Alpha-VLLM/Lumina-Image-2.0": "lumina2",
    "HiDream-ai/HiDream-I1-Full": "hidream",
    "krea/Krea-2-Raw": "krea2",
    "ideogram-ai/ideogram-v4": "ideogram4",
    "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS": "pixart-sigma",
}
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
README = (ROOT / "README.md").read_text()


def readme_commands():
    """Commands with our scripts in the code blocks of the README, as words from the script's name on."""
    blocks = re.findall(r"^```bash\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    blocks += re.findall(r"(?:^    .*\n)+", README, re.MULTILINE)
    found = []
    for block in blocks:
        for line in block.replace("\\\n", " ").splitlines():
            if not re.match(r" *(python|accelerate launch|pip install) ", line):
                continue
            for part in line.split("&&"):
                words = shlex.split(part, comments=True)
                at = next((n for n, word in enumerate(words) if word.endswith(".py")), None)
                if at is not None and (words[0] == "python" or words[:2] == ["accelerate", "launch"]):
                    found.append(tuple(words[at:]))
    return list(dict.fromkeys(found))


COMMANDS = readme_commands()
RUN = [words for words in COMMANDS if words[0].startswith("examples/")]


@pytest.fixture
def ground(tmp_path, monkeypatch):
    """A folder with the photos and files that recipes speak of."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    for name in ("dog", "my-photos"):
        save_photos(tmp_path / name, [(80, 64), (64, 64)])
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


def test_every_recipe_of_the_readme_is_a_config_with_the_same_settings():
    recipes = {
        words[words.index(MODEL) + 1]: words for words in RUN if MODEL in words and "train_dreambooth" in words[0]
    }
    assert set(recipes) == set(STAND_INS)
    shipped = [yaml.safe_load(path.read_text()) for path in CONFIGS]
    for model, words in recipes.items():
        flags = {name[2:]: yaml.safe_load(value) for name, value in zip(words[1::2], words[2::2])}
        assert flags in shipped, model


def test_each_gpu_size_has_a_config_that_says_what_it_needs():
    for size in (6, 8, 12, 16, 24):
        text = (ROOT / "configs" / f"flux-{size}gb.yaml").read_text().replace("\n# ", " ")
        peaks = [float(number) for number in re.findall(r"(\d+\.\d) GiB", text.partition("Simulated peaks")[2])]
        # A gigabyte of the box is 0.93 GiB; a context and an allocator's gaps need the rest.
        assert len(peaks) >= 4 and max(peaks) <= 0.9 * size * 1e9 / 2**30


@pytest.mark.slow
@pytest.mark.parametrize("words", RUN, ids=name_of)
def test_a_command_of_the_readme_runs(words, ground):
    path, *flags = words
    model = flags[flags.index(MODEL) + 1] if MODEL in flags else None
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
        common += ["--encoder", "offline", "--prompts", "a dog"]
    else:
        save_random_lora(tiny, ground / "flux-dog", alpha=1)
        save_vit(ground / "encoder")
        common += ["--encoders", str(ground / "encoder")]
    assert load_script(name).main(common) == 0


def test_other_commands_name_files_that_are_there():
    for path in re.findall(r"(?:python|launch) ((?:examples|benchmarks|tools)/[\w/]+\.py)", README):
        assert (ROOT / path).is_file()
    for path in re.findall(r"--config(?:_file)? ([\w./-]+\.yaml)", README):
        assert (ROOT / path).is_file()
