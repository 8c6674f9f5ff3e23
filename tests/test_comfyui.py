"""ComfyUI's LoRA file: its keys and scale, and that diffusers reads it back as the same LoRA."""

import pytest
import torch
from safetensors.torch import load_file

from blockskip_hooks.cli.argument_checks import check_family_flags
from blockskip_hooks.cli.arguments import parse_args
from blockskip_hooks.families import FAMILIES
from blockskip_hooks.loading.lora_files import WEIGHTS_NAME
from blockskip_hooks.training.comfyui import COMFYUI_NAME, write_comfyui
from tests import script
from tests.loras import RANK, save_random_lora
from tests.tiny import TINY_FAMILIES


READ = [tiny for tiny in TINY_FAMILIES if tiny.family.comfyui]
# A file of the rank's alpha, of half its strength, and of a strength that is no power of two.
ALPHAS = [4, 2, 3]


def save(tiny, folder, alpha, dtype=None):
    """A LoRA in both formats: the original tensors."""
    lora = save_random_lora(tiny, folder, alpha, dtype)
    write_comfyui(folder, tiny.family)
    return load_file(lora)


def read_back(tiny, folder):
    """What diffusers' loader of the family makes of the file: tensors, and alphas where it keeps them apart."""
    kwargs = {"return_alphas": True} if tiny.family.name in ("flux", "flux-kontext") else {}
    found = tiny.family.pipeline_class.lora_state_dict(str(folder), weight_name=COMFYUI_NAME, **kwargs)
    return found if kwargs else (found, {})


def products(tensors, scale=1.0):
    layers = {name.partition(".lora_")[0] for name in tensors}
    return {n: tensors[f"{n}.lora_B.weight"] @ tensors[f"{n}.lora_A.weight"] * scale for n in layers}


def loaded_deltas(tiny, folder, weight_name):
    """What each layer's LoRA adds in the stock pipeline."""
    pipeline = tiny.family.pipeline_class.from_pretrained(tiny.folder)
    pipeline.load_lora_weights(folder, weight_name=weight_name)
    layers = dict(pipeline.transformer.named_modules())
    return {
        name: layer.get_delta_weight(layer.active_adapters[0])
        for name, layer in layers.items()
        if hasattr(layer, "get_delta_weight")
    }


@pytest.mark.parametrize("tiny", READ, ids=lambda tiny: tiny.name)
def test_diffusers_reads_back_equal_tensors(tiny, tmp_path):
    expected = save(tiny, tmp_path, alpha=RANK)
    found, alphas = read_back(tiny, tmp_path)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert {float(alpha) for alpha in alphas.values()} <= {float(RANK)}


@pytest.mark.parametrize("alpha", ALPHAS[1:])
@pytest.mark.parametrize("tiny", READ, ids=lambda tiny: tiny.name)
def test_the_scale_survives(tiny, alpha, tmp_path):
    expected = save(tiny, tmp_path, alpha)
    found, alphas = read_back(tiny, tmp_path)
    assert found.keys() == expected.keys()
    scale = alpha / RANK if alphas else 1.0
    assert not alphas or {float(value) for value in alphas.values()} == {float(alpha)}
    torch.testing.assert_close(products(found, scale), products(expected, alpha / RANK))


@pytest.mark.parametrize("tiny", READ, ids=lambda tiny: tiny.name)
def test_the_stock_pipeline_makes_the_same_model_of_both_files(tiny, tmp_path):
    save(tiny, tmp_path, alpha=2)
    expected = loaded_deltas(tiny, tmp_path, WEIGHTS_NAME)
    found = loaded_deltas(tiny, tmp_path, COMFYUI_NAME)
    assert expected and found.keys() == expected.keys()
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("tiny", READ, ids=lambda tiny: tiny.name)
def test_comfyui_computes_the_same_update(tiny, alpha, tmp_path):
    """Its rule: ``alpha / rank`` of ``lora_B @ lora_A``, or the product as it is where a layer has no alpha."""
    expected = products(save(tiny, tmp_path, alpha), alpha / RANK)
    tensors, form = load_file(tmp_path / COMFYUI_NAME), tiny.family.comfyui
    assert all(name.startswith(form.prefix) for name in tensors)
    updates = {}
    for name in {name.partition(".lora_")[0] for name in tensors if not name.endswith(".alpha")}:
        down, up = tensors.pop(f"{name}.lora_A.weight"), tensors.pop(f"{name}.lora_B.weight")
        own = tensors.pop(f"{name}.alpha", None)
        assert (own is not None) == form.writes_alpha
        updates[f"transformer.{name.removeprefix(form.prefix)}"] = (
            up @ down * (1 if own is None else own.item() / RANK)
        )
    assert not tensors
    torch.testing.assert_close(updates, expected)


def test_a_file_in_half_precision_stays_so(tmp_path):
    save(READ[0], tmp_path, alpha=2, dtype=torch.bfloat16)
    tensors = load_file(tmp_path / COMFYUI_NAME)
    assert {t.dtype for name, t in tensors.items() if not name.endswith("alpha")} == {torch.bfloat16}


def test_a_run_leaves_both_files_and_diffusers_takes_its_own(tmp_path, capsys):
    tiny = TINY_FAMILIES[0]
    photos = script.save_photos(tmp_path / "photos", [(64, 64)])
    output = script.train(tiny.folder, photos, tmp_path / "out", "--save_format", "comfyui", "--skip_blocks", "1,1")
    assert (output / WEIGHTS_NAME).is_file() and (output / COMFYUI_NAME).is_file()
    assert f"ComfyUI  {output / COMFYUI_NAME}" in capsys.readouterr().out
    assert f"ComfyUI reads `{COMFYUI_NAME}`." in (output / "README.md").read_text()
    assert all("alpha" not in name for name in tiny.family.pipeline_class.lora_state_dict(str(output)))


@pytest.mark.parametrize("family", FAMILIES.values(), ids=lambda family: family.__name__)
def test_families_without_the_format_refuse_it_in_one_line(family):
    args = parse_args(["--save_format", "comfyui"])
    if family.comfyui:
        check_family_flags(args, family)
    else:
        with pytest.raises(ValueError, match=f"--save_format comfyui is not available for {family.name}"):
            check_family_flags(args, family)


def test_which_families_have_the_format():
    assert {family.name for family in FAMILIES.values() if family.comfyui is None} == {
        *("sana", "sana-sprint", "lumina2", "ideogram4", "pixart-sigma", "flux3", "qwen-image-2.1")
    }


def test_trained_text_encoders_are_refused():
    with pytest.raises(ValueError, match="--train_text_encoder"):
        check_family_flags(parse_args(["--save_format", "comfyui", "--train_text_encoder"]), READ[0].family)
