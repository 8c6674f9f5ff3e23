"""Compiled kept blocks: the same numbers, and no step that compiles again."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch._dynamo
from torch._dynamo.exc import TorchDynamoException
from torch._dynamo.utils import counters

from blockskip_hooks import BlockSkipConfig, DiTBlockSkipTransformer, SpanResiduals
from blockskip_hooks.cli.arguments import parse_args
from blockskip_hooks.cli.errors import explain
from blockskip_hooks.cli.preparation import prepare_run
from blockskip_hooks.lora import add_lora
from blockskip_hooks.training import compiling
from blockskip_hooks.training.compiling import check_compiler, compile_kept_blocks
from blockskip_hooks.utils.errors import UserError
from tests import script
from tests.tiny import TINY_FAMILIES


FLUX = TINY_FAMILIES[0]


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    with torch._dynamo.config.patch(recompile_limit=8):
        yield
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize("records_modulation", [True, False])
def test_steps_with_other_records_compile_nothing_and_change_nothing(records_modulation: bool) -> None:
    transformer = FLUX.make_transformer()
    kept = ("transformer_blocks.1.", "single_transformer_blocks.0.", "single_transformer_blocks.1.")
    modulation = [name for name, _ in transformer.named_modules() if name.endswith(("norm.linear", "norm1.linear"))]
    recorded = [name for name in modulation if records_modulation and name.startswith(kept)]
    model = DiTBlockSkipTransformer(transformer, BlockSkipConfig(leading=1, trailing=1), recorded_layers=recorded)
    targets = [f"{block.name}.attn.to_q" for block in model.spans.kept]
    parameters = add_lora(transformer, targets, rank=2, alpha=2, dropout=0.0, seed=0)
    inputs = FLUX.make_inputs(2)
    residuals = model.capture_residuals(**inputs, return_dict=False)

    def step(number: int) -> torch.Tensor:
        records = SpanResiduals(**{name: tensor + number / 10 for name, tensor in residuals.tensors().items()})
        output = model(**inputs, residuals=records, return_dict=False)[0]
        output.square().mean().backward()
        return output.detach()

    model.train()
    expected = [step(number) for number in range(3)]
    gradients = [parameter.grad.clone() for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None

    assert compile_kept_blocks(model, backend="eager") == 3
    first = step(0)
    compiled = counters["stats"]["unique_graphs"]
    assert 2 <= compiled <= 3 and not counters["graph_break"]
    later = [step(number) for number in (1, 2)]
    assert counters["stats"]["unique_graphs"] == compiled
    assert all(map(torch.equal, [first, *later], expected))
    assert all(torch.equal(parameter.grad, gradient) for parameter, gradient in zip(parameters, gradients))
    # Another precompute, then training as before.
    again = model.capture_residuals(**inputs, return_dict=False)
    assert all(map(torch.equal, again.tensors().values(), residuals.tensors().values()))
    after = counters["stats"]["unique_graphs"]
    step(1)
    assert counters["stats"]["unique_graphs"] == after


@pytest.mark.slow
def test_a_run_of_the_script_is_the_same_compiled(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, model: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Precompute, steps, a resumed run and images; without code generation, whose last bits would differ."""
    flags = ("--skip_blocks", "1,2", "--checkpointing_steps", "2", "--validation_prompt", "a dog")
    flags += ("--num_validation_images", "1", "--gradient_checkpointing")
    plain = script.train(model, photos, tmp_path / "plain", *flags)
    without_code = functools.partial(compile_kept_blocks, backend="eager")
    monkeypatch.setattr(script.load_script(), "compile_kept_blocks", without_code)
    compiled = script.train(model, photos, tmp_path / "compiled", *flags, "--compile")
    assert "Compiling 2 kept blocks for cpu" in capsys.readouterr().out
    assert counters["stats"]["unique_graphs"] > 0
    assert script.losses(compiled) == script.losses(plain)
    script.assert_same_weights(compiled, plain)
    script.train(model, photos, compiled, *flags, "--compile", "--resume_from_checkpoint", "checkpoint-2")
    assert script.losses(compiled) == script.losses(plain)
    script.assert_same_weights(compiled, plain)


def test_what_compiling_lacks_or_cannot_do_is_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, model: Path, photos: Path
) -> None:
    monkeypatch.setattr(compiling.shutil, "which", lambda name: None)
    with pytest.raises(UserError, match="--compile needs a C\\+\\+ compiler"):
        check_compiler(torch.device("cpu"))
    monkeypatch.setattr(compiling.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="--compile needs the package triton"):
        check_compiler(torch.device("cuda"))
    flags = script.settings(
        model, photos, tmp_path, "--compile", "--memory_budget", "1GiB", "--memory_options", "int8"
    )
    with pytest.raises(UserError, match="--compile goes neither with --quantization"):
        prepare_run(parse_args(flags))


def test_a_compiler_that_fails_under_way_is_one_line() -> None:
    line = explain(TorchDynamoException("no lowering for this device\nand much more"), "train")
    assert line is not None and "no lowering for this device" in line and "leave out --compile" in line
    assert "much more" not in line
    assert "Memory ran out in stage train" in (explain(TorchDynamoException("CUDA out of memory."), "train") or "")
