"""Bad input of the script that plans memory."""

from __future__ import annotations

from tests.bad_input.cases import Case


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
            "shared_by",
        ]
        for value in ("0", "-1", "1.5")
    },
    **{
        f"--skip_blocks '{value}'": ({"--skip_blocks": value}, ["--skip_blocks"])
        for value in ("half", "57", "30,27", "1,2,3", "")
    },
    **{
        f"--skip_ratio {value}": ({"--skip_ratio": value}, ["--skip_ratio is"])
        for value in ("0", "1", "2", "nan", "inf")
    },
    "a percentage": ({"--skip_ratio": "30"}, ["--skip_ratio is 30.0", "0.3 is 30 %"]),
    "layers that are not there": ({"--lora_layers": "nothing"}, ["--lora_layers 'nothing' is"]),
    "a GPU without a unit": ({"--gpu": "12"}, ["--gpu: '12' is 12 bytes; write 12GB"]),
    "a GPU of mebibytes without a unit": ({"--gpu": "24564"}, ["--gpu 24564 is 24.0 KiB; write it like 12GB"]),
    "memory without a unit": ({"--memory_budget": "12"}, ["--memory_budget: '12' is 12 bytes; write 12GB"]),
    "a word of memory": ({"--memory_budget": "much"}, ["--memory_budget: 'much' is not"]),
    "a word of disk": ({"--residual_budget": "much"}, ["--residual_budget: 'much' is not"]),
    "a budget above the model": ({"--skip_budget": "1TB"}, ["--skip_budget"]),
    "a budget and a number": ({"--skip_budget": "1GB", "--skip_blocks": "2"}, ["--skip_budget", "--skip_blocks 2"]),
    "a table that is not there": ({"--selection_table": "nothing"}, ["--selection_table nothing"]),
    "a table that is a photo": ({"--selection_table": "photos/0.png"}, ["photos/0.png"]),
    "an unknown option": ({"--memory_options": "magic"}, ["--memory_options", "magic"]),
    "validation off the grid": ({"--validation_resolution": "500"}, ["--validation_resolution is 500", "496"]),
    "shared quantised weights": ({"--shared_by": "2", "--quantization": "nf4"}, ["--shared_by 2: quantised weights"]),
    "a flag that is cut off": ({"--skip": "2"}, ["--skip"]),
}
