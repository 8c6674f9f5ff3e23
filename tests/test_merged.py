"""The merged transformer: peft's weights, everything else bit for bit, in little memory, whole or absent."""

import errno
import json

import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from safetensors.torch import load_file, save_file

from blockskip_hooks.cli.argument_checks import validate_args
from blockskip_hooks.cli.arguments import apply_defaults, parse_args
from blockskip_hooks.loading.checkpoint_index import index_safetensors
from blockskip_hooks.loading.lora_files import WEIGHTS_NAME
from blockskip_hooks.planning.counters import Meter
from blockskip_hooks.training import merged
from blockskip_hooks.training.merged import MERGED_NAME, export_merged
from tests import script
from tests.loras import save_random_lora
from tests.script import PROMPT
from tests.tiny import TINY_FAMILIES


TINY = TINY_FAMILIES[0]


def read(folder):
    return {name: load_file(path)[name] for name, path in index_safetensors(folder).items()}


def fused(tiny, transformer, lora):
    """The stock way, with the whole model in memory."""
    state, metadata = tiny.family.pipeline_class.lora_state_dict(str(lora), return_lora_metadata=True)
    transformer.load_lora_adapter(state, prefix="transformer", metadata=metadata)
    transformer.fuse_lora()
    transformer.unload_lora()
    return transformer.state_dict()


@pytest.mark.parametrize("shard_bytes", [2**30, 4096], ids=["one file", "shards"])
def test_the_weights_are_those_of_fuse_lora_and_the_rest_is_copied(tiny, shard_bytes, tmp_path):
    lora = save_random_lora(tiny, tmp_path, alpha=3)
    folder = export_merged(tiny.folder / "transformer", lora, tmp_path, shard_bytes=shard_bytes)
    changed = {name.partition(".lora_")[0].removeprefix("transformer.") for name in load_file(lora)}
    base, found, expected = read(tiny.folder / "transformer"), read(folder), fused(tiny, tiny.make_transformer(), lora)
    assert found.keys() == base.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name]), name
        assert torch.equal(tensor, base[name]) != (name.removesuffix(".weight") in changed), name
    assert (len(list(folder.glob("*.safetensors"))) == 1) == (shard_bytes == 2**30)
    loaded = type(tiny.make_transformer()).from_pretrained(folder).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in loaded.items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_checkpoint_keeps_its_dtype(dtype, tmp_path):
    transformer = TINY.make_transformer().to(dtype)
    transformer.save_pretrained(tmp_path / "half")
    lora = save_random_lora(TINY, tmp_path, alpha=4, dtype=dtype)
    found = read(export_merged(tmp_path / "half", lora, tmp_path))
    expected = fused(TINY, FluxTransformer2DModel.from_pretrained(tmp_path / "half", dtype=dtype), lora)
    assert all(tensor.dtype == dtype and torch.equal(tensor, expected[name]) for name, tensor in found.items())


def test_images_are_those_of_the_model_with_the_lora(tmp_path, capsys):
    """A whole run: the folder takes the transformer's place in the stock pipeline."""
    photos = script.save_photos(tmp_path / "photos", [(64, 64)])
    flags = ("--export_merged", "--skip_blocks", "1,1", "--quantization", "int8", "--upcast_before_saving")
    output = script.train(TINY.folder, photos, tmp_path / "out", *flags)
    assert f"Merged   {output / MERGED_NAME}" in capsys.readouterr().out

    def image(lora=None, **components):
        pipeline = FluxPipeline.from_pretrained(TINY.folder, **components)
        pipeline.set_progress_bar_config(disable=True)
        if lora:
            pipeline.load_lora_weights(lora)
        generator = torch.Generator().manual_seed(0)
        size = {"height": 32, "width": 32, "num_inference_steps": 2, "max_sequence_length": 12}
        return torch.from_numpy(pipeline(PROMPT, **size, generator=generator, output_type="np").images)

    with_lora = image(output)
    one = image(transformer=FluxTransformer2DModel.from_pretrained(output / MERGED_NAME))
    torch.testing.assert_close(one, with_lora, rtol=0, atol=1e-4)
    assert (image() - with_lora).abs().max() > 1e-3
    stages = [stage["name"] for stage in json.loads((output / "run_report.json").read_text())["stages"]]
    assert "merge" in stages


def test_the_whole_is_never_in_memory(tmp_path):
    """Of a checkpoint that is mostly skipped blocks hardly more than one shard is alive at a time."""
    folder = tmp_path / "transformer"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    shard, size = 2**20, 0
    layers = {f"transformer_blocks.{i}.attn.to_q": torch.randn(256, 256) for i in range(64)}
    for number in range(8):
        part = {f"{name}.weight": w for name, w in list(layers.items())[number * 8 : number * 8 + 8]}
        size += sum(tensor.nbytes for tensor in part.values())
        save_file(part, folder / f"part-{number}.safetensors")
    weight_map = {f"{name}.weight": f"part-{i // 8}.safetensors" for i, name in enumerate(layers)}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    kept = "transformer.transformer_blocks.30.attn.to_q"
    lora = {f"{kept}.lora_A.weight": torch.randn(4, 256), f"{kept}.lora_B.weight": torch.randn(256, 4)}
    settings = json.dumps({"transformer.r": 4, "transformer.lora_alpha": 4})
    save_file(lora, tmp_path / WEIGHTS_NAME, metadata={merged.LORA_ADAPTER_METADATA_KEY: settings})
    del part, layers
    with Meter() as live:
        output = export_merged(folder, tmp_path / WEIGHTS_NAME, tmp_path, shard_bytes=shard)
    assert len(list(output.glob("*.safetensors"))) == size / shard == 16
    assert live.peak < size / 8


def test_a_merge_that_fails_leaves_the_last_one_alone(tmp_path, monkeypatch):
    lora = save_random_lora(TINY, tmp_path, alpha=4)
    folder = export_merged(TINY.folder / "transformer", lora, tmp_path)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(merged, "save_file", full)
        with pytest.raises(OSError, match=f"No room for .*{MERGED_NAME}"):
            export_merged(TINY.folder / "transformer", lora, tmp_path)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert {path.name for path in tmp_path.iterdir()} == {MERGED_NAME, WEIGHTS_NAME}
    # A killed one left its folder; the next one takes its place.
    (tmp_path / f".{MERGED_NAME}.tmp").mkdir()
    (folder / "stray").touch()
    export_merged(TINY.folder / "transformer", lora, tmp_path)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert {path.name for path in tmp_path.iterdir()} == {MERGED_NAME, WEIGHTS_NAME}


def test_a_lora_of_another_model_is_refused(tmp_path):
    other = next(tiny for tiny in TINY_FAMILIES if tiny.name == "z-image")
    lora = save_random_lora(other, tmp_path, alpha=4)
    with pytest.raises(ValueError, match="which .* lacks"):
        export_merged(TINY.folder / "transformer", lora, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {WEIGHTS_NAME}


def test_trained_text_encoders_are_refused(tmp_path):
    argv = ["--export_merged", "--train_text_encoder", "--output_dir", str(tmp_path)]
    args = parse_args(argv)
    args = apply_defaults(args, TINY.family.flag_defaults)
    with pytest.raises(ValueError, match="--export_merged .* --train_text_encoder"):
        validate_args(args)
