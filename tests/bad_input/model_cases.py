"""Bad input of the training script: models that are incomplete, damaged, of other parts or not to be trusted."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.bad_input.cases import MODEL, TRANSFORMER, Case, Harmful, Make


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
        ["transformer holds", "config and weights are of different models"],
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
