"""The package as a library: what importing it costs, what it says of itself, the examples of loops of one's own."""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import re
import subprocess
import sys
from pathlib import Path

import diffusers
import pytest
import torch

import blockskip_hooks
from blockskip_hooks import BlockSkipConfig, DiTBlockSkipTransformer, PatchSamplingConfig, UserError, lora_targets
from blockskip_hooks.cli.arguments import build_parser
from blockskip_hooks.cli.errors import explain
from blockskip_hooks.families import FAMILIES, detect_family
from tests.tiny import TINY_FAMILIES, UNAVAILABLE, TinyFamily


ROOT = Path(__file__).parents[1]
PUBLIC = [name for name in blockskip_hooks.__all__ if name != "__version__"]
# A family whose blocks diffusers registers, one whose blocks we register, one with image and text streams throughout.
LOOPS = [tiny for tiny in TINY_FAMILIES if tiny.name in ("flux-dev", "sana", "sd3")]


def in_new_process(code: str) -> str:
    """What Python code prints in a process of its own."""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=600)
    return run.stdout.splitlines()[-1]


def test_importing_loads_nothing_heavy():
    code = "import json, sys, time; start = time.perf_counter(); import blockskip_hooks; "
    code += "print(json.dumps([time.perf_counter() - start, sorted({m.split('.')[0] for m in sys.modules})]))"
    seconds, modules = json.loads(in_new_process(code))
    assert not {"torch", "diffusers", "transformers", "peft", "accelerate", "datasets"} & set(modules)
    # A second is what it may take beyond torch; it takes hundredths, and this leaves room for a busy machine.
    assert seconds < 1


def test_settings_need_no_model_library():
    """Settings can be made and checked before the seconds that diffusers takes."""
    code = "import sys; from blockskip_hooks import BlockSkipConfig, PatchSamplingConfig, patch_size_for; "
    code += "config = PatchSamplingConfig(mode='dynamic', min_size=256, max_size=512, multiple=16); "
    code += "print(BlockSkipConfig(leading=2).num_skipped, patch_size_for(config, 0.5), 'torch' in sys.modules)"
    assert in_new_process(code) == "2 384 False"


def test_every_public_name_is_there_and_documented():
    assert sorted(blockskip_hooks.__all__, key=str.lower) == sorted(set(blockskip_hooks.__all__), key=str.lower)
    assert set(blockskip_hooks.__all__) <= set(dir(blockskip_hooks))
    for name in PUBLIC:
        thing = getattr(blockskip_hooks, name)
        assert inspect.getdoc(thing), name
        for member, value in vars(thing).items() if inspect.isclass(thing) else ():
            if not member.startswith("_") and (callable(value) or isinstance(value, (property, classmethod))):
                assert inspect.getdoc(getattr(thing, member)), f"{name}.{member}"
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        blockskip_hooks.nothing  # noqa: B018
    with pytest.raises(ImportError):
        from blockskip_hooks import nothing  # noqa: F401


def sizes(**settings):
    return PatchSamplingConfig(**{"mode": "dynamic", "min_size": 32, "max_size": 64, "multiple": 16, **settings})


def targets(*layers, skip=(1, 1), **settings):
    (tiny,) = (tiny for tiny in TINY_FAMILIES if tiny.name == "flux-dev")
    model = DiTBlockSkipTransformer(tiny.make_transformer(), BlockSkipConfig(leading=skip[0], trailing=skip[1]))
    return lora_targets(model, layers, **settings)


@pytest.mark.parametrize(
    ("call", "says", "flag"),
    [
        (lambda: BlockSkipConfig(residuals="x"), "BlockSkipConfig.residuals is 'x'", "--residuals is 'x'"),
        (lambda: targets("to_q", skip=(2, 3)), "BlockSkipConfig(leading=2, trailing=3) skips", "--skip_blocks 2,3"),
        (lambda: sizes(mode="big"), "PatchSamplingConfig.mode is 'big'", "--patch_sampling is 'big'"),
        (lambda: sizes(min_size=30), "PatchSamplingConfig.min_size is 30", "--min_patch_size is 30"),
        (lambda: sizes(max_size=60), "PatchSamplingConfig.max_size is 60", "--max_patch_size is 60"),
        (
            lambda: sizes(min_size=96),
            "PatchSamplingConfig.min_size 96 is above",
            "--min_patch_size 96 is above --max_p",
        ),
        (lambda: sizes(buckets=((64, 60),)), "PatchSamplingConfig.buckets has 64,60", "--aspect_ratio_buckets has"),
        (lambda: targets("to_x"), "lora_targets.layers 'to_x' is the name of no", "--lora_layers 'to_x' is"),
        (
            lambda: targets("proj_out", skip=(1, 3)),
            "lora_targets.layers 'proj_out' matches",
            "--lora_layers 'proj_out'",
        ),
        (lambda: targets("to_q", blocks=["x"]), "lora_targets.blocks: none of x has", "--lora_blocks: none of x has"),
    ],
)
def test_errors_name_arguments_here_and_flags_in_scripts(call, says: str, flag: str):
    with pytest.raises(UserError) as raised:
        call()
    line = str(raised.value)
    assert line.startswith(says) and "--" not in line
    shown = explain(raised.value)
    assert shown.startswith(flag) and not any(name in shown for name in ("Config", "lora_targets"))


def test_type_checkers_see_what_is_loaded_lazily():
    tree = ast.parse((ROOT / "src" / "blockskip_hooks" / "__init__.py").read_text())
    (block,) = (n for n in tree.body if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING")
    typed = {alias.name: node.module for node in block.body for alias in node.names}  # type: ignore[attr-defined]
    assert typed == blockskip_hooks._MODULES and sorted(typed) == sorted(PUBLIC)
    assert (ROOT / "src" / "blockskip_hooks" / "py.typed").is_file()


def test_blocks_are_found_without_naming_a_family():
    """In a new process: nothing has imported the families that know these blocks and which stacks are refiners."""
    tiny = {t.name: t for t in TINY_FAMILIES}
    classes = {"sana": "SanaTransformer2DModel", "z-image": "ZImageTransformer2DModel"}
    code = "import diffusers, json; from blockskip_hooks import list_blocks\nfound = []\n"
    for name, model in classes.items():
        code += f"model = diffusers.{model}.from_pretrained({str(tiny[name].folder)!r}, subfolder='transformer')\n"
        code += "found.append([block.name for block in list_blocks(model)])\n"
    sana, z_image = json.loads(in_new_process(code + "print(json.dumps(found))"))
    assert sana == [f"transformer_blocks.{number}" for number in range(tiny["sana"].num_blocks)]
    assert z_image == [f"layers.{number}" for number in range(tiny["z-image"].num_blocks)]


def test_listing_blocks_loads_no_other_family_and_no_pipeline():
    """Beyond what importing diffusers' transformer loads by itself."""
    folder = next(tiny for tiny in TINY_FAMILIES if tiny.name == "flux-dev").folder
    code = "import json, sys; from diffusers import FluxTransformer2DModel\n"
    code += f"model = FluxTransformer2DModel.from_pretrained({str(folder)!r}, subfolder='transformer')\n"
    code += "before = set(sys.modules); import blockskip_hooks; blocks = blockskip_hooks.list_blocks(model)\n"
    code += "print(json.dumps([len(blocks), sorted(set(sys.modules) - before)]))"
    count, loaded = json.loads(in_new_process(code))
    assert count == 5
    families = {name.removeprefix("blockskip_hooks.families.") for name in loaded if ".families." in name}
    assert families == {"base", "facts", "flux"}
    heavy = ("transformers", "peft", "accelerate", "torchao", "bitsandbytes", "diffusers.pipelines")
    assert [name for name in loaded if name.startswith(heavy)] == []


def test_flags_are_known_without_the_models_libraries():
    code = (
        "import json, sys; from blockskip_hooks.cli.arguments import build_parser; text = build_parser().format_help()"
    )
    code += "; names = 'transformers', 'peft', 'accelerate', 'diffusers.models', 'diffusers.pipelines';"
    code += "print(json.dumps(['--system_prompt' in text, [name for name in names if name in sys.modules]]))"
    assert json.loads(in_new_process(code)) == [True, []]


# Classes that diffusers renamed


def test_every_family_is_tested():
    assert UNAVAILABLE == {}
    assert {tiny.family for tiny in TINY_FAMILIES} == set(FAMILIES.values())


def test_a_missing_class_is_one_line_of_its_own_family_only():
    """Choosing the family names the class and the version; every other one is there, and so are all flags."""
    folders = {name: next(t for t in TINY_FAMILIES if t.family is FAMILIES[name]).folder for name in FAMILIES}
    for pipeline in FAMILIES:
        with pytest.MonkeyPatch.context() as patch:
            patch.delitem(diffusers._class_to_module, pipeline)
            patch.delattr(diffusers, pipeline, raising=False)
            with pytest.raises(
                ValueError, match=rf"needs {pipeline}, which diffusers {diffusers.__version__} does not"
            ):
                detect_family(folders[pipeline])
            for name in set(FAMILIES) - {pipeline}:
                assert detect_family(folders[name]) is FAMILIES[name]
            text = build_parser().format_help()
            assert all(f"--{flag.name}" in text for family in FAMILIES.values() for flag in family.own_flags)


def test_with_a_family_gone_the_script_and_the_tests_of_the_others_work(tmp_path: Path):
    """From the start of a process: no pipeline and no transformer of the family."""
    tiny = next(tiny for tiny in TINY_FAMILIES if tiny.name == "lumina2")
    flags = ["--pretrained_model_name_or_path", str(tiny.folder), "--instance_data_dir", str(tmp_path)]
    flags += ["--instance_prompt", "a dog", "--resolution", str(tiny.resolution), "--plan_only"]
    code = f"""
import contextlib, io, json, sys
import diffusers
for name in ("Lumina2Pipeline", "Lumina2Transformer2DModel"):
    del diffusers._class_to_module[name]
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "examples" / "dreambooth_blockskip")!r}]
from blockskip_hooks import list_blocks
from tests.tiny import TINY_FAMILIES, UNAVAILABLE
from train_dreambooth_blockskip import main

def outcome(*argv):
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            code = main(list(argv))
        except SystemExit as end:
            code = end.code
    return code, said.getvalue()

sana = next(tiny for tiny in TINY_FAMILIES if tiny.name == "sana")
works = len(list_blocks(sana.make_transformer())) == sana.num_blocks
names = [tiny.name for tiny in TINY_FAMILIES]
print(json.dumps([list(UNAVAILABLE), names, works, outcome("--help"), outcome(*{flags!r})]))
"""
    unavailable, names, works, shown, chosen = json.loads(in_new_process(code))
    assert unavailable == ["lumina2"] and names == [t.name for t in TINY_FAMILIES if t is not tiny] and works
    assert shown[0] == 0 and "--system_prompt" in shown[1]
    lines = [line for line in chosen[1].splitlines() if "Lumina2Pipeline" in line]
    assert chosen[0] == 2 and len(lines) == 1 and diffusers.__version__ in lines[0]


# Examples


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch):
    """Import a module of the library examples, as running it would."""
    monkeypatch.syspath_prepend(str(ROOT / "examples" / "library"))
    for name in ("flux_samples", "own_loop", "trainer_loop"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return importlib.import_module


def assert_restored(transformer: torch.nn.Module, before: dict[str, torch.Tensor]) -> None:
    after = transformer.state_dict()
    assert before.keys() == after.keys()
    # A trainer leaves the model where it trained.
    assert all(torch.equal(before[name].cpu(), tensor.cpu()) for name, tensor in after.items())


def copied(transformer: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in transformer.state_dict().items()}


@pytest.mark.parametrize("tiny", LOOPS, ids=lambda tiny: tiny.name)
def test_own_loop_on_any_transformer(tiny: TinyFamily, load):
    # Frozen as the example leaves it: on some CPUs torch rounds layers otherwise whose weights ask for gradients.
    transformer = tiny.make_transformer().requires_grad_(False)
    before, inputs = copied(transformer), tiny.make_inputs(2)
    with torch.no_grad():
        expected = transformer(**inputs, return_dict=False)[0]
    torch.manual_seed(0)
    samples = [(inputs, torch.randn(expected.shape, generator=torch.Generator().manual_seed(2)))]
    losses = load("own_loop").train_lora(transformer, samples, BlockSkipConfig(leading=1, trailing=1), epochs=10)
    assert losses[-1] < losses[0]
    with torch.no_grad():
        assert not torch.equal(transformer(**inputs, return_dict=False)[0], expected)
        transformer.unload_lora()
        assert torch.equal(transformer(**inputs, return_dict=False)[0], expected)
    assert_restored(transformer, before)


def test_own_loop_of_the_embedded_model(load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    """The example as a person runs it, and its loop is as short as the documentation says."""
    monkeypatch.chdir(tmp_path)
    module = load("own_loop")
    assert len(inspect.getsource(module.train_lora).splitlines()) <= 30
    pipeline = load("flux_samples").load_pipeline()
    before = copied(pipeline.transformer)
    monkeypatch.setattr(module, "load_pipeline", lambda: pipeline)
    torch.manual_seed(0)
    module.main()
    losses = [float(word) for word in capsys.readouterr().out.split(":")[1].split()]
    assert losses[-1] < 0.95 * losses[0]
    assert_restored(pipeline.transformer, before)
    pipeline.transformer.load_lora_adapter(
        tmp_path / "own-loop-lora", weight_name="pytorch_lora_weights.safetensors", prefix=None
    )
    names = [name for name, _ in pipeline.transformer.named_parameters() if "lora_B" in name]
    kept = {f"transformer_blocks.{n}." for n in range(3, 6)} | {f"single_transformer_blocks.{n}." for n in range(7)}
    assert names and all(any(name.startswith(block) for block in kept) for name in names)


def test_trainer_loop_of_the_embedded_model(load, tmp_path: Path):
    pipeline = load("flux_samples").load_pipeline()
    samples = load("flux_samples").make_samples(pipeline)
    before = copied(pipeline.transformer)
    torch.manual_seed(0)
    losses = load("trainer_loop").train(
        pipeline.transformer, samples, BlockSkipConfig(leading=3, trailing=5), str(tmp_path)
    )
    assert losses[-1] < 0.95 * losses[0]
    pipeline.transformer.unload_lora()
    assert_restored(pipeline.transformer, before)


def test_the_example_of_the_readme_runs_and_is_short(load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    section = (ROOT / "README.md").read_text().split("\n## As a library\n")[1].split("\n## ")[0]
    (code,) = re.findall(r"^```python\n(.*?)^```", section, re.MULTILINE | re.DOTALL)
    assert len([line for line in code.splitlines() if line and not line.strip().startswith("#")]) <= 12
    samples = load("flux_samples")
    pipeline = samples.load_pipeline()
    names = {"transformer": pipeline.transformer, "samples": samples.make_samples(pipeline)}
    before = copied(pipeline.transformer)
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), names)
    assert (tmp_path / "my-lora" / "pytorch_lora_weights.safetensors").is_file()
    assert all(torch.isfinite(p).all() for p in pipeline.transformer.parameters())
    assert any(p.abs().max() > 0 for n, p in pipeline.transformer.named_parameters() if "lora_B" in n)
    pipeline.transformer.unload_lora()
    assert_restored(pipeline.transformer, before)
