"""What goes wrong while a run is under way: values that are not numbers, memory, disks, and bugs."""

import errno
import json
import shutil

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from blockskip_hooks.loading.lora_files import WEIGHTS_NAME
from blockskip_hooks.losses import flow_matching_loss
from blockskip_hooks.training import prompts
from tests.bad_input.harness import assert_one_line, assert_stopped, command
from tests.script import load_script


NOT_A_NUMBER = float("nan")


def with_nan(path, name):
    """Put a NaN into a tensor of a safetensors file."""
    tensors = load_file(path)
    tensors[name].view(-1)[0] = NOT_A_NUMBER
    save_file(tensors, path)


def fresh_model(tmp_path):
    return shutil.copytree("model", tmp_path / "model")


@pytest.mark.parametrize("residuals", ["precomputed", "online"])
def test_latents_that_are_not_numbers_stop_the_run_and_name_the_photo(begin, tmp_path, residuals):
    model = fresh_model(tmp_path)
    with_nan(model / "vae" / "diffusion_pytorch_model.safetensors", "encoder.conv_out.bias")
    changes = {"--pretrained_model_name_or_path": str(model), "--residuals": residuals}
    result = begin(command(tmp_path / "out", changes))
    assert_stopped(
        result, ["not finite" if residuals == "precomputed" else "loss of step 1 is nan", "sample 0 (", ".png)"]
    )
    assert not (tmp_path / "out" / WEIGHTS_NAME).exists()


def test_residuals_that_are_not_numbers_stop_the_run_before_it_trains(begin, tmp_path):
    model = fresh_model(tmp_path)
    with_nan(model / "transformer" / "diffusion_pytorch_model.safetensors", "transformer_blocks.0.attn.to_q.weight")
    changes = {"--pretrained_model_name_or_path": str(model), "--skip_blocks": "1,1"}
    result = begin(command(tmp_path / "out", changes))
    assert_stopped(result, ["The transformer makes residuals that are not finite", "sample 0 (", ".png)"])


def test_embeddings_that_are_not_numbers_stop_the_run_and_name_the_prompt(begin, tmp_path):
    model = fresh_model(tmp_path)
    with_nan(model / "text_encoder_2" / "model.safetensors", "encoder.final_layer_norm.weight")
    result = begin(command(tmp_path / "out", {"--pretrained_model_name_or_path": str(model)}))
    assert_stopped(result, ["text encoders", "not finite", "'a photo of sks dog'"])


@pytest.mark.parametrize("name", ["tokenizer/tokenizer.json", "tokenizer_2/tokenizer_config.json"])
@pytest.mark.parametrize("content", ["{", "[]"])
def test_a_broken_tokenizer_is_said_in_one_line_when_it_is_loaded(begin, tmp_path, name, content):
    model = fresh_model(tmp_path)
    (model / name).write_text(content)
    result = begin(command(tmp_path / "out", {"--pretrained_model_name_or_path": str(model)}))
    assert_stopped(result, ["--pretrained_model_name_or_path", "cannot be loaded"])


def test_parts_of_different_models_are_found_before_the_transformer_loads(begin, tmp_path, monkeypatch, script):
    from transformers import T5Config, T5EncoderModel

    model = fresh_model(tmp_path)
    shutil.rmtree(model / "text_encoder_2")
    config = T5Config(vocab_size=64, d_model=16, d_ff=32, d_kv=12, num_layers=2, num_heads=2)
    T5EncoderModel(config).save_pretrained(model / "text_encoder_2")
    monkeypatch.setattr(
        script.DiTBlockSkipTransformer, "from_pretrained", lambda *args, **kwargs: pytest.fail("loaded")
    )
    result = begin(command(tmp_path / "out", {"--pretrained_model_name_or_path": str(model)}))
    assert_stopped(result, ["--pretrained_model_name_or_path", "prompt_embeds", "different models"])


def test_a_vae_of_another_model_is_found_by_the_plan(run, tmp_path):
    from diffusers import AutoencoderKL

    model = fresh_model(tmp_path)
    shutil.rmtree(model / "vae")
    config = {
        name: value for name, value in AutoencoderKL.load_config("model", subfolder="vae").items() if name[0] != "_"
    }
    AutoencoderKL(**{**config, "latent_channels": 8}).save_pretrained(model / "vae")
    result = run(command(tmp_path / "out", {"--pretrained_model_name_or_path": str(model)}))
    assert_one_line(result, 2, ["--pretrained_model_name_or_path", "different models"])


def spoil_loss(monkeypatch, step, sample):
    """Let the loss of one sample of a batch be NaN in a step."""
    steps = []

    def spoilt(*args):
        losses = flow_matching_loss(*args)
        steps.append(len(steps) + 1)
        return losses * torch.tensor(
            [NOT_A_NUMBER if (steps[-1], n) == (step, sample) else 1.0 for n in range(len(losses))]
        )

    monkeypatch.setattr(load_script(), "flow_matching_loss", spoilt)


def test_a_loss_that_is_not_a_number_stops_at_its_step_and_names_the_sample(begin, tmp_path, monkeypatch):
    spoil_loss(monkeypatch, step=3, sample=1)
    changes = {"--train_batch_size": "2", "--max_train_steps": "5", "--checkpointing_steps": "1"}
    result = begin(command(tmp_path / "out", changes))
    # The third step's second sample; only that one is named.
    assert_stopped(result, ["loss of step 3 is nan", "by instance sample 5 (", ".png);", "Checkpoints", "intact"])
    assert result.err.count("instance sample") == 1
    assert sorted(path.name for path in (tmp_path / "out").glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]
    assert not (tmp_path / "out" / WEIGHTS_NAME).exists()
    assert all(
        tensor.isfinite().all() for tensor in load_file(tmp_path / "out" / "checkpoint-2" / WEIGHTS_NAME).values()
    )


def test_with_accumulated_batches_every_batch_is_looked_at(begin, tmp_path, monkeypatch):
    spoil_loss(monkeypatch, step=1, sample=0)
    changes = {"--gradient_accumulation_steps": "2", "--train_batch_size": "2"}
    assert_stopped(begin(command(tmp_path / "out", changes)), ["loss of step 1 is nan", "by instance sample 0 ("])


def test_weights_that_are_not_numbers_never_replace_the_last_good_checkpoint(begin, tmp_path, monkeypatch):
    step = torch.optim.AdamW.step
    calls = []

    def spoilt(optimizer, *args, **kwargs):
        result = step(optimizer, *args, **kwargs)
        calls.append(None)
        if len(calls) == 2:
            optimizer.param_groups[0]["params"][0].data.view(-1)[0] = NOT_A_NUMBER
        return result

    monkeypatch.setattr(torch.optim.AdamW, "step", spoilt)
    changes = {"--max_train_steps": "4", "--checkpointing_steps": "1", "--checkpoints_total_limit": "1"}
    result = begin(command(tmp_path / "out", changes))
    assert_stopped(result, ["The LoRA of", "not finite", "intact"])
    (kept,) = (tmp_path / "out").glob("checkpoint-*")
    assert kept.name == "checkpoint-1"
    assert all(tensor.isfinite().all() for tensor in load_file(kept / WEIGHTS_NAME).values())


def raises(error):
    def call(*args, **kwargs):
        raise error

    return call


ENVIRONMENT = {
    "a full GPU": (
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nSee the docs."),
        ["Memory ran out in stage load", "Tried to allocate 2.00 GiB", "--memory_budget"],
    ),
    "a GPU that others fill": (
        RuntimeError("CUDA error: out of memory\nCompile with"),
        ["Memory ran out in stage load"],
    ),
    "no batch that fits": (
        RuntimeError("No executable batch size found, reached zero."),
        ["Memory ran out in stage load", "--memory_budget"],
    ),
    "full host memory": (
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."),
        ["Memory ran out in stage load", "--memory_budget"],
    ),
    "no memory for a BLAS library": (
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        ["Memory ran out in stage load", "--memory_budget"],
    ),
    "no memory for Python": (MemoryError(), ["Memory ran out in stage load (MemoryError)"]),
    "a full disk": (OSError(errno.ENOSPC, "No space left on device", "x"), ["The disk is full", "--residual_budget"]),
    "a full disk below safetensors": (
        SafetensorError("Error while serializing: IoError(Os { code: 28, kind: StorageFull })"),
        ["The disk is full"],
    ),
    "a file that went away": (
        FileNotFoundError(errno.ENOENT, "No such file or directory", "x.bin"),
        ["x.bin: No such"],
    ),
    "a shard that broke": (SafetensorError("Error while deserializing header"), ["A safetensors file cannot be read"]),
    "a worker that was killed": (
        RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "),
        ["--dataloader_num_workers"],
    ),
}


@pytest.mark.parametrize("case", ENVIRONMENT)
def test_what_the_environment_does_is_said_in_one_line(begin, script, tmp_path, monkeypatch, case):
    error, words = ENVIRONMENT[case]
    monkeypatch.setattr(prompts, "encode_prompts", lambda *args, **kwargs: ({}, None))
    monkeypatch.setattr(script.DiTBlockSkipTransformer, "from_pretrained", raises(error))
    assert_stopped(begin(command(tmp_path / "out", {})), words)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        KeyError("hidden_states"),
        TypeError("'NoneType' object is not callable"),
        AssertionError("never"),
        IndexError("list index out of range"),
        NotImplementedError("no"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_bugs_keep_their_traceback(begin, tmp_path, monkeypatch, error):
    monkeypatch.setattr(prompts, "encode_prompts", raises(error))
    with pytest.raises(type(error)) as caught:
        begin(command(tmp_path / "out", {}))
    assert caught.value is error


def test_a_value_error_of_a_library_is_a_bug_too(begin, tmp_path, monkeypatch):
    monkeypatch.setattr(prompts, "encode_prompts", lambda *args, **kwargs: json.loads("{"))
    with pytest.raises(json.JSONDecodeError):
        begin(command(tmp_path / "out", {}))


def test_a_plan_that_cannot_be_written_is_said_in_one_line(begin, tmp_path):
    (tmp_path / "out" / "plan.json").mkdir(parents=True)
    result = begin(command(tmp_path / "out", {"--plan_only": True}))
    assert_one_line(result, 1, ["plan.json"])
