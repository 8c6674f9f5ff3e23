"""Tables of bad input: what is wrong, in which flags or files, and the words that the one line of error must have.

A value of a flag that is a function makes the broken thing in a fresh folder and returns its path.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file


Make = Callable[[Path], Any]
Case = tuple[dict[str, Any], list[str]]

MODEL, PHOTOS, OUT = "--pretrained_model_name_or_path", "--instance_data_dir", "--output_dir"
TRANSFORMER = "diffusion_pytorch_model"


class Harmful:
    """Leaves a file behind when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, ("unpickled",))


# Photos


def photo(seed: int = 0, width: int = 64, height: int = 64) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def photos(make: Make) -> Make:
    """A folder with one good photo, changed."""

    def build(folder: Path) -> Path:
        photo().save(folder / "good.png")
        make(folder)
        return folder

    return build


def cut(name: str, part: float) -> Make:
    def make(folder: Path) -> None:
        photo().save(folder / name)
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: int(len(content) * part)])

    return photos(make)


def file(name: str, content: bytes) -> Make:
    return photos(lambda folder: (folder / name).write_bytes(content))


def picture(name: str, mode: str, size: tuple[int, int]) -> Make:
    return photos(lambda folder: Image.new(mode, size).save(folder / name))


def caption(content: bytes) -> Make:
    return file("good.txt", content)


def link(name: str, target: str) -> Make:
    """A link to a file that lies beside the folder, not in it."""

    def make(folder: Path) -> None:
        photo(1).save(folder.parent / "elsewhere.png")
        (folder.parent / "elsewhere.txt").write_text("a secret of this machine")
        (folder / name).symlink_to(folder.parent / target)

    return photos(make)


def only(*names: str) -> Make:
    """A folder with empty files of these names and nothing else; a name that ends with a slash is a folder."""

    def build(folder: Path) -> Path:
        for name in names:
            (folder / name).mkdir() if name.endswith("/") else (folder / name).write_bytes(b"\0stray")
        return folder

    return build


def bomb(folder: Path) -> None:
    """A PNG that says it is 30,000 pixels square, without them."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 30000, 30000, 8, 2, 0, 0, 0))
    (folder / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", b"") + chunk(b"IEND", b""))


def several(folder: Path) -> None:
    (folder / "a.jpg").touch()
    (folder / "b.png").write_text("<html>")
    Image.new("1", (30000, 1)).save(folder / "c.png")
    (folder / "d.png").symlink_to("nowhere.png")


def one_file(folder: Path) -> Path:
    (folder / "photo.png").touch()
    return folder / "photo.png"


def pipe(folder: Path) -> None:
    os.mkfifo(folder / "pipe.png")


PHOTO_CASES: dict[str, Case] = {
    "an empty folder": ({PHOTOS: only()}, ["no images found", "png"]),
    "stray files only": ({PHOTOS: only("Thumbs.db", ".DS_Store", "notes.txt", "sub/")}, ["no images found"]),
    "hidden pictures only": ({PHOTOS: only(".a.png")}, ["no images found"]),
    "HEIC only": ({PHOTOS: only("IMG_1.HEIC", "IMG_2.heic")}, ["no images found", "convert the heic files to jpg"]),
    "HEIC under another name": ({PHOTOS: file("a.jpg", b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")}, ["a.jpg (not an im"]),
    **{
        f"half a {name}": ({PHOTOS: cut(f"a.{name}", 0.5)}, [f"a.{name} ("])
        for name in ("jpg", "png", "webp", "gif", "tif", "bmp")
    },
    "a PNG cut in its header": ({PHOTOS: cut("a.png", 0.002)}, ["a.png ("]),
    "a file of no bytes": ({PHOTOS: file("a.jpg", b"")}, ["a.jpg (empty file)"]),
    "a web page": ({PHOTOS: file("a.png", b"<html>404</html>")}, ["a.png (not an image)"]),
    "a pointer of Git LFS": (
        {PHOTOS: file("a.png", b"version https://git-lfs.github.com/spec/v1\n")},
        ["a.png (not an image)"],
    ),
    "a tracking pixel": ({PHOTOS: picture("a.gif", "P", (1, 1))}, ["a.gif (a single pixel)"]),
    "30,000 pixels of nothing": ({PHOTOS: picture("a.png", "1", (30000, 1))}, ["30000 x 1 pixels is too narrow"]),
    "30,000 pixels square": ({PHOTOS: photos(bomb)}, ["a.png (too many pixels)"]),
    "several at once": ({PHOTOS: photos(several)}, ["4 images", "a.jpg (", "b.png (", "c.png (", "d.png ("]),
    "a pipe": ({PHOTOS: photos(pipe)}, ["pipe.png (not a file)"]),
    "a dead link": ({PHOTOS: link("a.png", "nothing.png")}, ["a.png (a link that leads out of the folder"]),
    "a link out of the folder": ({PHOTOS: link("a.png", "elsewhere.png")}, ["a.png (a link that leads out"]),
    "a caption that links out": ({PHOTOS: link("good.txt", "elsewhere.txt")}, ["good.txt is a link that leads out"]),
    "a line break in a name": ({PHOTOS: file("a\nb.png", b"")}, ["a b.png (empty file)"]),
    "colours in a name": ({PHOTOS: file("a\x1b[31m.png", b"")}, ["a\\x1b[31m.png (empty file)"]),
    "a caption in Latin-1": ({PHOTOS: caption("Hündchen".encode("latin-1"))}, ["good.txt is not UTF-8 text"]),
    "a caption in UTF-16": ({PHOTOS: caption("a dog".encode("utf-16"))}, ["good.txt is not UTF-8 text"]),
    "a caption in UTF-16 without a mark": ({PHOTOS: caption("a dog".encode("utf-16-le"))}, ["good.txt is not UTF-8"]),
    "a caption in Shift-JIS": ({PHOTOS: caption("犬の写真".encode("shift-jis"))}, ["good.txt is not UTF-8 text"]),
    "a caption that is a picture": ({PHOTOS: caption(b"\x89PNG\r\n\x1a\n\0\0")}, ["good.txt is not UTF-8 text"]),
    "a caption without end": ({PHOTOS: caption(b"dog " * 20000)}, ["good.txt is 80,000 bytes long"]),
    "a file": ({PHOTOS: one_file}, ["is a file, not a folder"]),
    "class pictures cut short": (
        {"--with_prior_preservation": True, "--class_prompt": "a dog", "--class_data_dir": cut("0.jpg", 0.4)},
        ["--class_data_dir", "0.jpg ("],
    ),
}


def image_folder(*rows: Any, text: str | None = None) -> Make:
    """A local dataset: one picture beside it, one in it, and metadata."""

    def build(folder: Path) -> Path:
        photo(1).save(folder.parent / "elsewhere.png")
        photo().save(folder / "a.png")
        (folder / "link.png").symlink_to(folder.parent / "elsewhere.png")
        (folder / "metadata.jsonl").write_text(text if text is not None else "\n".join(map(json.dumps, rows)))
        return folder

    return build


def dataset(make: Make, **flags: str) -> dict[str, Any]:
    return {
        PHOTOS: None,
        "--dataset_name": make,
        "--cache_dir": lambda folder: folder,
        **{f"--{name}": value for name, value in flags.items()},
    }


DATASET_CASES: dict[str, Case] = {
    "a dataset that is not there": (
        dataset(lambda folder: folder / "nothing"),
        ["--dataset_name", "cannot be loaded"],
    ),
    "an empty dataset": (dataset(only()), ["--dataset_name", "cannot be loaded"]),
    "metadata that lead up": (dataset(image_folder({"file_name": "../elsewhere.png"})), ["--dataset_name", "cannot"]),
    "metadata that link out": (dataset(image_folder({"file_name": "link.png"})), ["000000 (a path that leads out"]),
    "metadata of no file": (dataset(image_folder({"file_name": "b.png"})), ["--dataset_name", "000000 ("]),
    "metadata without names": (dataset(image_folder({"text": "a dog"})), ["--dataset_name"]),
    "metadata that are no JSON": (dataset(image_folder(text="{")), ["--dataset_name", "cannot be loaded"]),
    "no such column": (
        dataset(image_folder({"file_name": "a.png"}), image_column="photo"),
        ["--image_column 'photo'"],
    ),
    "no such captions": (
        dataset(image_folder({"file_name": "a.png"}), caption_column="text"),
        ["--caption_column 'text'"],
    ),
    "captions that are numbers": (
        dataset(image_folder({"file_name": "a.png", "text": 1}), caption_column="text"),
        ["--caption_column 'text'", "does not hold text"],
    ),
}


# The model


def without(name: str) -> Make:
    def make(folder: Path) -> None:
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return model(make)


def model(make: Make) -> Make:
    """A copy of the tiny pipeline, changed."""

    def build(folder: Path) -> Path:
        shutil.copytree("model", folder, dirs_exist_ok=True)
        make(folder)
        return folder

    return build


def weights(component: str, change: Callable[[bytes], bytes]) -> Make:
    def make(folder: Path) -> None:
        (path,) = (folder / component).glob("*.safetensors")
        path.write_bytes(change(path.read_bytes()))

    return model(make)


def long_header(content: bytes) -> bytes:
    return (10**12).to_bytes(8, "little") + content[8:]


def other_weights(component: str) -> Make:
    def make(folder: Path) -> None:
        (path,) = (folder / component).glob("*.safetensors")
        save_file({"x.weight": torch.zeros(2)}, path)

    return model(make)


def pickled(component: str) -> Make:
    """Weights as a pickle that would do harm."""

    def make(folder: Path) -> None:
        (path,) = (folder / component).glob("*.safetensors")
        path.unlink()
        (path.parent / "pytorch_model.bin").write_bytes(pickle.dumps(Harmful()))
        (path.parent / f"{TRANSFORMER}.bin").write_bytes(pickle.dumps(Harmful()))

    return model(make)


def setting(name: str, **values: Any) -> Make:
    """Values of a JSON file replaced."""

    def make(folder: Path) -> None:
        path = folder / name
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return model(make)


def text(name: str, content: str | bytes) -> Make:
    return model(
        lambda folder: (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    )


def shards(change: Callable[[Path, dict[str, str]], Any]) -> Make:
    """The transformer in two shards; ``change`` gets its folder and the index's map and may return another index."""

    def make(folder: Path) -> None:
        place = folder / "transformer"
        tensors = load_file(place / f"{TRANSFORMER}.safetensors")
        (place / f"{TRANSFORMER}.safetensors").unlink()
        weight_map = {}
        for number in (1, 2):
            part = dict(sorted(tensors.items())[number - 1 :: 2])
            save_file(part, place / f"{number}.safetensors")
            weight_map |= dict.fromkeys(part, f"{number}.safetensors")
        index = change(place, weight_map)
        index = {"weight_map": weight_map} if index is None else index
        (place / f"{TRANSFORMER}.safetensors.index.json").write_text(json.dumps(index))

    return model(make)


def cut_shard(place: Path, weight_map: dict[str, str]) -> None:
    path = place / "2.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def shard_elsewhere(place: Path, weight_map: dict[str, str]) -> None:
    shutil.copy(place / "2.safetensors", place.parent / "2.safetensors")
    weight_map.update({name: "../2.safetensors" for name, file in weight_map.items() if file == "2.safetensors"})


def remote_code(folder: Path) -> None:
    """A text encoder whose class comes with the model."""
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "text_encoder": ["evil", "Evil"]}))
    (folder / "text_encoder" / "evil.py").write_text("import os\nos.mkdir('unpickled')\nclass Evil: pass\n")


WEIGHTED = ("transformer", "vae", "text_encoder", "text_encoder_2")
SIZES = {
    "transformer": "attention_head_dim",
    "vae": "latent_channels",
    "text_encoder": "hidden_size",
    "text_encoder_2": "d_model",
}
DEFAULTS, INDEX, SCHEDULER = "blockskip_defaults.json", "model_index.json", "scheduler/scheduler_config.json"

MODEL_CASES: dict[str, Case] = {
    "a model that is a file": ({MODEL: "a file"}, [f"{MODEL} a file"]),
    "a model that is one component": ({MODEL: "model/transformer"}, [f"{MODEL} model/transformer", INDEX]),
    "a model that is a folder of photos": ({MODEL: "photos"}, [f"{MODEL} photos", INDEX]),
    **{
        f"no folder {name}": ({MODEL: without(name)}, [MODEL, name])
        for name in (*WEIGHTED, "tokenizer", "tokenizer_2", "scheduler")
    },
    **{f"no config of {name}": ({MODEL: without(f"{name}/config.json")}, [MODEL, name]) for name in WEIGHTED},
    **{
        f"empty weights of {name}": ({MODEL: weights(name, lambda _: b"")}, [MODEL, name, "it is empty"])
        for name in WEIGHTED
    },
    **{
        f"weights of {name} cut short": ({MODEL: weights(name, lambda b: b[:-1])}, [MODEL, name, "not a whole"])
        for name in WEIGHTED
    },
    **{
        f"weights of {name} cut in the header": (
            {MODEL: weights(name, lambda b: b[:100])},
            [MODEL, name, "not a whole"],
        )
        for name in WEIGHTED
    },
    **{
        f"bytes behind the weights of {name}": (
            {MODEL: weights(name, lambda b: b + b"xx")},
            [MODEL, name, "not a whole"],
        )
        for name in WEIGHTED
    },
    **{
        f"a header of a terabyte in {name}": ({MODEL: weights(name, long_header)}, [MODEL, name, "not a whole"])
        for name in WEIGHTED
    },
    **{
        f"a web page as {name}": ({MODEL: weights(name, lambda _: b"<html></html>")}, [MODEL, name, "not a whole"])
        for name in WEIGHTED
    },
    **{
        f"pickled weights of {name}": ({MODEL: pickled(name)}, [MODEL, name, "holds no safetensors weights"])
        for name in WEIGHTED
    },
    **{f"weights of another {name}": ({MODEL: other_weights(name)}, [MODEL, name]) for name in WEIGHTED},
    **{
        f"{SIZES[name]} of another {name}": (
            {MODEL: setting(f"{name}/config.json", **{SIZES[name]: 48})},
            [MODEL, name],
        )
        for name in WEIGHTED
    },
    **{
        f"{SIZES[name]} in words": ({MODEL: setting(f"{name}/config.json", **{SIZES[name]: "many"})}, [MODEL, name])
        for name in WEIGHTED
    },
    **{
        f"no {SIZES[name]}": ({MODEL: setting(f"{name}/config.json", **{SIZES[name]: None})}, [MODEL, name])
        for name in WEIGHTED
    },
    **{
        f"a list as config of {name}": ({MODEL: text(f"{name}/config.json", "[]")}, [MODEL, name]) for name in WEIGHTED
    },
    **{
        f"config of {name} in Latin-1": ({MODEL: text(f"{name}/config.json", b'{"a": "\xfc"}')}, [MODEL, name])
        for name in WEIGHTED
    },
    **{f"an empty config of {name}": ({MODEL: text(f"{name}/config.json", "{}")}, [MODEL]) for name in WEIGHTED},
    "more layers than weights": (
        {MODEL: setting("transformer/config.json", num_layers=3)},
        [MODEL, "lack 32 tensors"],
    ),
    "no layers": (
        {MODEL: setting("transformer/config.json", num_layers=0, num_single_layers=0)},
        ["no stack of blocks"],
    ),
    "a variant that only some have": ({"--variant": "bf16"}, ["--variant bf16", "vae"]),
    "a shard that is missing": (
        {MODEL: shards(lambda place, _: (place / "2.safetensors").unlink())},
        [MODEL, "2.safetensors"],
    ),
    "a shard cut short": ({MODEL: shards(cut_shard)}, [MODEL, "2.safetensors", "not a whole"]),
    "a shard without its tensors": (
        {MODEL: shards(lambda _, weight_map: weight_map.update(dict.fromkeys(weight_map, "1.safetensors")))},
        [MODEL, "1.safetensors lacks"],
    ),
    "a shard elsewhere": ({MODEL: shards(shard_elsewhere)}, [MODEL, "../2.safetensors"]),
    "a shard that is a number": (
        {MODEL: shards(lambda _, m: {"weight_map": dict.fromkeys(m, 1)})},
        [MODEL, "names 1"],
    ),
    "an index without a map": ({MODEL: shards(lambda *_: {"metadata": {}})}, [MODEL, "no index of weight files"]),
    "an index that is a list": ({MODEL: shards(lambda *_: [])}, [MODEL, "no index of weight files"]),
    **{
        f"{name} without {file}": ({MODEL: without(f"{name}/{file}")}, [MODEL, name, "lacks"])
        for name in ("tokenizer", "tokenizer_2")
        for file in ("tokenizer.json", "tokenizer_config.json")
    },
    **{
        f"{name} with a broken {file}": ({MODEL: text(f"{name}/{file}", "{")}, [MODEL, name])
        for name in ("tokenizer", "tokenizer_2")
        for file in ("tokenizer.json", "tokenizer_config.json")
    },
    "a scheduler that is no JSON": ({MODEL: text(SCHEDULER, "{")}, [MODEL, SCHEDULER]),
    "a scheduler that is a list": ({MODEL: text(SCHEDULER, "[]")}, [MODEL, SCHEDULER]),
    "a scheduler without a class": ({MODEL: text(SCHEDULER, "{}")}, [MODEL, SCHEDULER]),
    "a scheduler of an unknown class": ({MODEL: setting(SCHEDULER, _class_name="Nobody")}, [MODEL, SCHEDULER]),
    "a schedule in words": ({MODEL: setting(SCHEDULER, num_train_timesteps="many")}, [MODEL, SCHEDULER]),
    "a schedule of minus one": ({MODEL: setting(SCHEDULER, num_train_timesteps=-1)}, [MODEL, SCHEDULER]),
    "a shift in words": ({MODEL: setting(SCHEDULER, shift="far")}, [MODEL, SCHEDULER]),
    "a component of the system": ({MODEL: setting(INDEX, transformer=["os", "system"])}, [MODEL, "transformer is"]),
    "a component of code that comes along": ({MODEL: model(remote_code)}, [MODEL, "text_encoder is ['evil', 'Evil']"]),
    "a component in one word": ({MODEL: setting(INDEX, vae="AutoencoderKL")}, [MODEL, "vae is AutoencoderKL"]),
    "a component of nothing": ({MODEL: setting(INDEX, text_encoder=None)}, [MODEL, "text_encoder"]),
    "a tokenizer of an unknown class": (
        {MODEL: setting(INDEX, tokenizer=["transformers", "Nobody"])},
        [MODEL, "Nobody"],
    ),
    "a text encoder of an unknown class": (
        {MODEL: setting(INDEX, text_encoder=["transformers", "Nobody"])},
        [MODEL, "Nobody"],
    ),
    "a model that says where to write": ({MODEL: setting(DEFAULTS, output_dir="/")}, [DEFAULTS, "output_dir"]),
    "a model that wants to be uploaded": ({MODEL: setting(DEFAULTS, push_to_hub=True)}, [DEFAULTS, "push_to_hub"]),
    "a model's rank in words": ({MODEL: setting(DEFAULTS, rank="four")}, [DEFAULTS, "rank", "'four'"]),
    "a model's defaults as a list": ({MODEL: text(DEFAULTS, "[1]")}, [DEFAULTS, "no JSON object"]),
    "a model's defaults cut short": ({MODEL: text(DEFAULTS, "{")}, [DEFAULTS, "no JSON object"]),
    "an argument that the pipeline lacks": (
        {MODEL: setting(DEFAULTS, pipeline_kwargs={"x": 1})},
        [DEFAULTS, "takes no x"],
    ),
    "a pipeline's argument that is no value": (
        {MODEL: setting(DEFAULTS, pipeline_kwargs={"height": {}})},
        [DEFAULTS, "height"],
    ),
}


# Flags

_HUGE = "1" + "0" * 18
_COUNTS = [
    "resolution",
    "max_patch_size",
    "max_sequence_length",
    "rank",
    "lora_alpha",
    "train_batch_size",
    "gradient_accumulation_steps",
    "repeats",
    "precompute_batch_size",
    "dataloader_num_workers",
    "max_train_steps",
    "num_train_epochs",
    "lr_warmup_steps",
    "lr_num_cycles",
    "checkpointing_steps",
    "checkpoints_total_limit",
    "num_validation_images",
    "validation_epochs",
    "probe_steps",
    "seed",
]
_WHOLE = [
    "rank",
    "resolution",
    "seed",
    "max_train_steps",
    "train_batch_size",
    "checkpointing_steps",
    "dataloader_num_workers",
    "repeats",
]
_RATES = [
    "learning_rate",
    "guidance_scale",
    "prior_loss_weight",
    "adam_epsilon",
    "max_grad_norm",
    "logit_std",
    "mode_scale",
]
_TEXTS = [
    "output_dir",
    "instance_data_dir",
    "pretrained_model_name_or_path",
    "lora_layers",
    "lora_blocks",
    "resume_from_checkpoint",
    "variant",
    "revision",
    "cache_dir",
    "residual_dir",
    "residual_budget",
    "logging_dir",
    "report_to",
    "hub_model_id",
]

FLAG_CASES: dict[str, Case] = {
    **{f"{name} without bounds": ({f"--{name}": _HUGE}, [f"--{name} is"]) for name in _COUNTS},
    **{f"half a {name}": ({f"--{name}": "1.5"}, [f"--{name}", "1.5"]) for name in _WHOLE},
    **{
        f"{name} of {value}": ({f"--{name}": value}, [f"--{name} is"])
        for name in _RATES
        for value in ("nan", "inf", "1e300")
    },
    **{f"an empty {name}": ({f"--{name}": ""}, [f"--{name} is empty"]) for name in _TEXTS},
    **{
        f"--skip_blocks '{value}'": ({"--skip_blocks": value}, ["--skip_blocks"])
        for value in ("1;1", "1,", ",1", "1 1", "all", "9" * 30, "٣", "0x1", "4,4", "5", "0,5", "1,1,")
    },
    "a negative --skip_blocks": ({"--skip_blocks=-1": True, "--skip_blocks": None}, ["--skip_blocks is '-1'"]),
    "a comma as --lora_layers": ({"--lora_layers": ","}, ["--lora_layers ''"]),
    "a name too many": ({"--lora_layers": "attn.to_q,nothing"}, ["--lora_layers 'nothing'"]),
    "text layers that are skipped": (
        {"--skip_blocks": "2,1", "--lora_layers": "attn.add_k_proj,attn.add_q_proj"},
        ["--lora_layers", "no layer of a kept block"],
    ),
    "a repository with blanks": ({"--push_to_hub": True, "--hub_model_id": "my lora"}, ["--hub_model_id"]),
    "a repository of three parts": ({"--push_to_hub": True, "--hub_model_id": "a/b/c"}, ["--hub_model_id"]),
    "a token for a tracker": ({"--hub_token": "SECRET", "--report_to": "all"}, ["--hub_token", "--report_to all"]),
    "a path that is too long": ({PHOTOS: "x" * 300}, ["File name too long"]),
    "an output that is too long": ({OUT: "x" * 300}, ["File name too long"]),
    "an output that no one may write": ({OUT: "/proc/nothing"}, ["/proc/nothing"]),
    "too little memory": ({"--memory_budget": "1KB"}, ["--memory_budget 1KB", "--skip_blocks auto"]),
    "a word of memory": ({"--memory_budget": "much"}, ["--memory_budget is 'much'"]),
    "an unknown option": ({"--memory_budget": "1GB", "--memory_options": "magic"}, ["--memory_options", "magic"]),
    "two budgets": (
        {"--skip_blocks": "auto", "--skip_budget": "1KB", "--memory_budget": "1GB"},
        ["--skip_budget", "--memory_budget"],
    ),
    "a budget and a pair": ({"--skip_budget": "1KB"}, ["--skip_budget", "--skip_blocks"]),
    "a budget above the model": ({"--skip_blocks": "auto", "--skip_budget": "1TB"}, ["--skip_budget"]),
    "a table that is not there": (
        {"--skip_blocks": "auto", "--selection_table": "nothing"},
        ["--selection_table nothing"],
    ),
    "a table that is a photo": ({"--skip_blocks": "auto", "--selection_table": "photos/0.png"}, ["photos/0.png"]),
    "buckets in words": ({"--aspect_ratio_buckets": "wide"}, ["--aspect_ratio_buckets"]),
    "buckets without bounds": ({"--aspect_ratio_buckets": "64,640000000"}, ["--aspect_ratio_buckets"]),
    "half precision without a GPU": ({"--mixed_precision": "fp16"}, ["--mixed_precision fp16"]),
    "8-bit Adam of another optimizer": ({"--optimizer": "adagrad", "--use_8bit_adam": True}, ["--optimizer"]),
    "quantising twice": (
        {"--quantization": "nf4", "--bnb_quantization_config_path": "a file"},
        ["--bnb_quantization_config_path", "--quantization"],
    ),
    "a quantisation that is no JSON": (
        {"--bnb_quantization_config_path": "a file"},
        ["--bnb_quantization_config_path"],
    ),
    "prior preservation of a blank": (
        {"--with_prior_preservation": True, "--class_prompt": "a dog", "--class_data_dir": ""},
        ["--class_data_dir"],
    ),
    "text encoders that cannot train": ({"--train_text_encoder": "yes"}, ["unrecognized"]),
}


# Resuming


def checkpoint(change: Callable[[Path], Any]) -> Make:
    """A copy of the checkpoint of a finished run, changed."""

    def build(folder: Path) -> Path:
        shutil.copytree("finished/out/checkpoint-1", folder, dirs_exist_ok=True)
        change(folder)
        return folder

    return build


def state(**values: Any) -> Make:
    def change(folder: Path) -> None:
        path = folder / "training_state.json"
        content = {**json.loads(path.read_text()), **values}
        path.write_text(json.dumps({name: value for name, value in content.items() if value is not ...}))

    return checkpoint(change)


def damaged(name: str, content: bytes | None = None) -> Make:
    def change(folder: Path) -> None:
        path = folder / name
        path.write_bytes(path.read_bytes()[:-1] if content is None else content)

    return checkpoint(change)


RESUME, LORA = "--resume_from_checkpoint", "pytorch_lora_weights.safetensors"
_DONE = {RESUME: "finished/out/checkpoint-1", "--max_train_steps": "2"}

RESUME_CASES: dict[str, Case] = {
    "another rank": ({**_DONE, "--rank": "8"}, [RESUME, "another rank"]),
    "other layers": ({**_DONE, "--lora_layers": "attn.to_q"}, [RESUME, "other LoRA layers"]),
    "fewer blocks with LoRA": ({**_DONE, "--lora_blocks": "2"}, [RESUME, "other LoRA layers"]),
    "fewer skipped blocks": ({**_DONE, "--skip_blocks": "1,0"}, [RESUME, "other LoRA layers"]),
    "nothing skipped": ({**_DONE, "--skip_blocks": "none"}, [RESUME, "other LoRA layers"]),
    "another pair with the same layers": (
        {**_DONE, RESUME: state(made_with={"skip": [0, 1]})},
        [RESUME, "--skip_blocks 0,1", "skips 1,1"],
    ),
    "other weights": ({**_DONE, RESUME: state(made_with={"weights": "0"})}, [RESUME, "other weights"]),
    "a text encoder": ({**_DONE, "--train_text_encoder": True}, [RESUME, "without --train_text_encoder"]),
    "another seed": ({**_DONE, "--seed": "1"}, ["--seed 1"]),
    "another model": (
        {**_DONE, MODEL: model(lambda folder: _noise(folder / "transformer" / f"{TRANSFORMER}.safetensors"))},
        [RESUME, "other weights"],
    ),
    **{f"{name} cut short": ({**_DONE, RESUME: damaged(name)}, [RESUME]) for name in (LORA, "optimizer.safetensors")},
    **{
        f"an empty {name}": ({**_DONE, RESUME: damaged(name, b"")}, [RESUME])
        for name in (LORA, "optimizer.safetensors", "training_state.json")
    },
    "a state that is a list": ({**_DONE, RESUME: damaged("training_state.json", b"[]")}, [RESUME, "schema"]),
    "a state in Latin-1": ({**_DONE, RESUME: damaged("training_state.json", b'"\xfc"')}, [RESUME]),
    "a state of tomorrow": ({**_DONE, RESUME: state(schema=9)}, [RESUME, "schema"]),
    "a state without a seed": ({**_DONE, RESUME: state(seed=...)}, [RESUME, "seed"]),
    "a step in words": ({**_DONE, RESUME: state(step="one")}, [RESUME, "step"]),
    "a checkpoint without LoRA": ({**_DONE, RESUME: checkpoint(lambda folder: (folder / LORA).unlink())}, [RESUME]),
    "a folder of photos": ({**_DONE, RESUME: "photos"}, [f"{RESUME} photos", "complete"]),
}


def _noise(path: Path) -> None:
    save_file({name: tensor + 1 for name, tensor in load_file(path).items()}, path)


# The other scripts


def lora(
    layer: str | None, features: int = 32, change: Callable[[bytes], bytes] = bytes, name: str = "lora.safetensors"
) -> Make:
    def build(folder: Path) -> Path:
        tensors = {
            f"{layer}.lora_A.weight": torch.zeros(2, features),
            f"{layer}.lora_B.weight": torch.zeros(features, 2),
        }
        save_file(tensors if layer else {"unet.x": torch.zeros(1)}, folder / name)
        (folder / name).write_bytes(change((folder / name).read_bytes()))
        return folder / name

    return build


def pickled_lora(folder: Path) -> Path:
    (folder / "lora.bin").write_bytes(pickle.dumps(Harmful()))
    return folder / "lora.bin"


_LAYER = "transformer.transformer_blocks.0.attn.to_q"


def adapted(make: Make | str) -> dict[str, Any]:
    return {"--lora_weights": make, "--prompts": "a photo of sks dog"}


SELECT_CASES: dict[str, Case] = {
    **{
        f"{name} of {value}": ({f"--{name}": value}, [f"--{name}"])
        for name in ["max_sequence_length", "resolution", "num_inference_steps", "search_stride", "images_at_once"]
        for value in ("0", "-1", "1.5", _HUGE)
    },
    "no blocks to measure": ({"--search_stride": "5"}, ["--search_stride is 5", "5 blocks"]),
    "windows above the model": ({"--window_lengths": "9"}, ["--window_lengths is 9"]),
    "a size off the grid": ({"--resolution": "60"}, ["--resolution is 60"]),
    "a seed in words": ({"--seeds": "one"}, ["--seeds", "one"]),
    "a negative seed": ({"--seeds=-1": True}, ["--seeds has -1"]),
    "a blank prompt": ({"--prompts": " "}, ["--prompts"]),
    "a LoRA without a prompt": ({"--lora_weights": "photos"}, ["--lora_weights", "--prompts"]),
    "a LoRA that is not there": (adapted("nothing"), ["--lora_weights nothing"]),
    "a LoRA of another model": (adapted(lora("transformer.blocks.0.to_q")), ["--lora_weights", "another model"]),
    "a LoRA of other widths": (adapted(lora(_LAYER, 48)), ["--lora_weights", "takes 48 features", "has 32"]),
    "a LoRA cut short": (
        adapted(lora(_LAYER, change=lambda content: content[:-1])),
        ["--lora_weights", "not a whole"],
    ),
    "an empty LoRA": (adapted(lora(_LAYER, change=lambda _: b"")), ["--lora_weights", "it is empty"]),
    "weights that are no LoRA": (adapted(lora(None)), ["--lora_weights", "holds no LoRA"]),
    "a pickled LoRA": (adapted(pickled_lora), ["--lora_weights", "pickled weights are not read"]),
    "a LoRA of streamed blocks": (
        {**adapted("photos"), "--stream_blocks": True},
        ["--stream_blocks", "--lora_weights"],
    ),
    "an output that is a file": ({OUT: "a file"}, ["--output_dir a file", "is a file"]),
    "an output in no one's folder": ({OUT: "/proc/nothing"}, ["/proc/nothing"]),
    "a model of photos": ({MODEL: "photos"}, [f"{MODEL} photos"]),
    "a model cut short": ({MODEL: weights("vae", lambda content: content[:-1])}, [MODEL, "vae", "not a whole"]),
    "a model of pickles": ({MODEL: pickled("text_encoder")}, [MODEL, "text_encoder"]),
    "a flag of the other script": ({"--rank": "4"}, ["--rank"]),
    "an unknown precision": ({"--mixed_precision": "fp8"}, ["--mixed_precision", "fp8"]),
}

PLAN_CASES: dict[str, Case] = {
    "no preset": ({"--preset": None}, ["--preset"]),
    "an unknown preset": ({"--preset": "flux.9"}, ["--preset 'flux.9'", "flux.1-dev"]),
    "a preset that leads up": ({"--preset": "../flux.1-dev"}, ["--preset '../flux.1-dev'"]),
    **{
        f"{name} of {value}": ({f"--{name}": value}, [f"--{name}"])
        for name in [
            "resolution",
            "training_resolution",
            "rank",
            "train_batch_size",
            "precompute_batch_size",
            "max_sequence_length",
            "max_train_steps",
            "validation_resolution",
        ]
        for value in ("0", "-1", "1.5", _HUGE)
    },
    **{
        f"--skip_blocks '{value}'": ({"--skip_blocks": value}, ["--skip_blocks"])
        for value in ("half", "57", "30,27", "1,2,3", "")
    },
    **{
        f"--skip_ratio {value}": ({"--skip_ratio": value}, ["--skip_ratio is"])
        for value in ("0", "1", "2", "nan", "inf")
    },
    "layers that are not there": ({"--lora_layers": "nothing"}, ["--lora_layers 'nothing'"]),
    "a word of memory": ({"--memory_budget": "much"}, ["--memory_budget is 'much'"]),
    "a word of disk": ({"--residual_budget": "much"}, ["--residual_budget is 'much'"]),
    "a budget above the model": ({"--skip_budget": "1TB"}, ["--skip_budget"]),
    "a budget and a number": ({"--skip_budget": "1GB", "--skip_blocks": "2"}, ["--skip_budget", "--skip_blocks 2"]),
    "a table that is not there": ({"--selection_table": "nothing"}, ["--selection_table nothing"]),
    "a table that is a photo": ({"--selection_table": "photos/0.png"}, ["photos/0.png"]),
    "an unknown option": ({"--memory_options": "magic"}, ["--memory_options", "magic"]),
    "validation off the grid": ({"--validation_resolution": "500"}, ["--validation_resolution is 500", "496"]),
    "a flag that is cut off": ({"--skip": "2"}, ["--skip"]),
}

# Files of settings: what makes the file, and the words beside its name.


def words(content: str) -> Callable[[Path], Any]:
    return lambda path: path.write_text(content, encoding="utf-8")


CONFIG_CASES: dict[str, tuple[Callable[[Path], Any], list[str]]] = {
    "no file": (lambda path: None, ["cannot be read", "No such file"]),
    "a folder": (lambda path: path.mkdir(), ["cannot be read", "directory"]),
    "a picture": (lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\n"), ["not UTF-8"]),
    "Latin-1": (lambda path: path.write_bytes("instance_prompt: Hündchen".encode("latin-1")), ["not UTF-8"]),
    "zeros": (lambda path: path.write_bytes(bytes(8)), ["no YAML"]),
    "an empty file": (words(""), ["holds no settings"]),
    "a list": (words("- rank: 4"), ["holds no settings"]),
    "a word": (words("rank"), ["holds no settings"]),
    "an open bracket": (words("rank: 4\nmemory_options: ["), ["no YAML in line"]),
    "a colon too many": (words("rank: 4\nseed: 1: 2"), ["no YAML in line 2"]),
    "two documents": (words("rank: 4\n---\nrank: 8"), ["no YAML in line 2"]),
    "a Python object": (words("rank: !!python/object/apply:os.mkdir [unpickled]"), ["no YAML in line 1"]),
    "brackets without end": (words("[" * 5000), ["nested too deeply"]),
    "an unknown key": (words("ranks: 4"), ["ranks is no setting", "did you mean rank?"]),
    "an unknown word": (words("zzzzzz: 4"), ["zzzzzz is no setting", "flags without the dashes"]),
    "a key with dashes": (words("--rank: 4"), ["--rank is no setting", "did you mean rank?"]),
    "a number as a key": (words("4: rank"), ["4 is no setting"]),
    "a file in a file": (words("config: other.yaml"), ["config is no setting"]),
    "a dump in a file": (words("dump_config: true"), ["dump_config is no setting"]),
    "a config of accelerate": (
        words("distributed_type: MULTI_GPU\nnum_processes: 2"),
        ["accelerate", "--config_file"],
    ),
    "a number in words": (words("rank: four"), ["rank is 'four'", "a whole number"]),
    "a number in quotes": (words("rank: '4'"), ["rank is '4'", "a whole number"]),
    "half a number": (words("rank: 1.5"), ["rank is 1.5", "a whole number"]),
    "a switch as a number": (words("rank: true"), ["rank is True", "a whole number"]),
    "a rate in words": (words("learning_rate: fast"), ["learning_rate is 'fast'", "a number"]),
    "a rate as a list": (words("learning_rate: [1]"), ["learning_rate is [1]", "a number"]),
    "a switch in words": (words("center_crop: 'yes'"), ["center_crop is 'yes'", "true or false"]),
    "a switch in one": (words("center_crop: 1"), ["center_crop is 1", "true or false"]),
    "a word of two as text": (words("prodigy_decouple: 'no'"), ["prodigy_decouple is 'no'", "true or false"]),
    "a choice that is none": (words("residuals: later"), ["residuals is 'later'", "precomputed, online, none"]),
    "a truth as a text": (words("skip_blocks: off"), ["skip_blocks is False", "a text, in quotes"]),
    "a date as a text": (words("output_dir: 2026-01-01"), ["output_dir is", "a text, in quotes"]),
    "a mapping as a text": (words("instance_prompt: {a: dog}"), ["instance_prompt is {'a': 'dog'}", "a text"]),
    "options that are numbers": (words("memory_options: [8]"), ["memory_options is [8]", "a list of words"]),
}

TRAIN_CASES = {
    f"{kind}: {name}": case
    for kind, cases in (
        ("photos", PHOTO_CASES),
        ("dataset", DATASET_CASES),
        ("model", MODEL_CASES),
        ("flags", FLAG_CASES),
        ("resume", RESUME_CASES),
    )
    for name, case in cases.items()
}
