"""What the benchmarks share: a random pipeline of the real classes, photos, the scripts, and files of figures."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import json
import os
import platform
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any


# Everything is local; a look-up on the hub would only add noise.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import numpy as np
import psutil
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import Unigram
from tokenizers.pre_tokenizers import Metaspace
from tokenizers.processors import TemplateProcessing
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    GemmaTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from blockskip_hooks.cli.arguments import parse_args
from blockskip_hooks.cli.preparation import prepare_run
from blockskip_hooks.planning.plan import PlannedStage
from blockskip_hooks.reporting.trackers import Tracking
from blockskip_hooks.residuals.batches import SampleMaker
from blockskip_hooks.residuals.store import ResidualStore
from blockskip_hooks.residuals.stretches import Stretches
from blockskip_hooks.training.checkpointer import Checkpointer
from blockskip_hooks.training.context import Context
from blockskip_hooks.training.history import History
from blockskip_hooks.training.records import RecordSource
from blockskip_hooks.training.run import Run
from blockskip_hooks.training.samples import schedule
from blockskip_hooks.utils.files import write_json
from blockskip_hooks.utils.machine import versions


LETTERS = "abcdefghijklmnopqrstuvwxyz"
PROMPT = "a photo of sks dog"
REPOSITORY = Path(__file__).resolve().parents[1]
SCRIPT = "examples/dreambooth_blockskip/train_dreambooth_blockskip.py"


@dataclass(frozen=True)
class FluxSize:
    """Size of a random FLUX pipeline: real classes, VAE factor 8, so a token is 16 px of the image.

    Attributes:
        double_blocks: Double-stream blocks.
        single_blocks: Single-stream blocks.
        heads: Attention heads of 64 each.
        text_dim: Width of the T5 embeddings.
    """

    double_blocks: int = 19
    single_blocks: int = 38
    heads: int = 8
    text_dim: int = 256

    @property
    def blocks(self) -> int:
        return self.double_blocks + self.single_blocks

    @property
    def dim(self) -> int:
        return 64 * self.heads


def save_random_flux(folder: Path, size: FluxSize, dtype: torch.dtype) -> Path:
    """Write a whole FLUX pipeline with random weights; only the transformer is of any size."""
    torch.manual_seed(0)
    clip_tokenizer, t5_tokenizer = flux_tokenizers()
    clip = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(clip_tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=2,
            projection_dim=64,
            bos_token_id=0,
            eos_token_id=1,
        )
    )
    t5 = T5EncoderModel(
        T5Config(vocab_size=len(t5_tokenizer), d_model=size.text_dim, d_ff=256, d_kv=32, num_layers=2, num_heads=2)
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 16, 16),
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=4,
        scaling_factor=0.8,
        shift_factor=0.1,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    transformer = FluxTransformer2DModel(
        in_channels=64,
        num_layers=size.double_blocks,
        num_single_layers=size.single_blocks,
        attention_head_dim=64,
        num_attention_heads=size.heads,
        joint_attention_dim=size.text_dim,
        pooled_projection_dim=64,
        guidance_embeds=True,
        axes_dims_rope=(16, 24, 24),
    )
    FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae,
        text_encoder=clip.eval(),
        tokenizer=clip_tokenizer,
        text_encoder_2=t5.eval(),
        tokenizer_2=t5_tokenizer,
        transformer=torch.nn.Module.to(transformer, dtype),
    ).save_pretrained(folder)
    return folder


def flux_tokenizers() -> tuple[CLIPTokenizer, T5TokenizerFast]:
    """Tokenizers of the real classes that spell words by letters."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -100.0), ("▁", -20.0), *((letter, -20.0) for letter in LETTERS)]
    words = Tokenizer(Unigram(pieces, unk_id=2))
    words.pre_tokenizer = Metaspace(replacement="▁", prepend_scheme="always")
    words.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    names = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>", "extra_ids": 0, "model_max_length": 512}
    tokens = ["<|startoftext|>", "<|endoftext|>", *LETTERS, *(f"{letter}</w>" for letter in LETTERS)]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
        (folder / "merges.txt").write_text("#version: 0.2\n")
        words.save(str(folder / "tokenizer.json"))
        (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "T5TokenizerFast", **names}))
        clip = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=77)
        return clip, T5TokenizerFast.from_pretrained(folder)


def gemma_tokenizer() -> GemmaTokenizer:
    """Tokenizer of the real class that spells words by letters, and other characters by bytes."""
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *LETTERS]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    return GemmaTokenizer(vocab=vocabulary, merges=[], model_max_length=512, add_bos_token=True)


def save_photos(folder: Path, count: int, side: int) -> Path:
    """Write photos of random smooth colours, not square, so that crops have room."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    for number in range(count):
        colours = generator.integers(0, 256, (8, 10, 3), dtype=np.uint8)
        image = Image.fromarray(colours).resize((side * 5 // 4, side), Image.Resampling.BICUBIC)
        image.save(folder / f"{number}.png")
    return folder


def load_script(name: str) -> ModuleType:
    """A script of ``examples/dreambooth_blockskip`` as a module."""
    path = REPOSITORY / "examples" / "dreambooth_blockskip" / f"{name}.py"
    specification = importlib.util.spec_from_file_location(name, path)
    assert specification is not None and specification.loader is not None
    script = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(script)
    return script


def run_in_process(script: ModuleType, argv: Sequence[str]) -> None:
    """Run a script's ``main`` in this process, without what it prints.

    Raises:
        RuntimeError: with the end of what it printed, if it fails.
    """
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        code = script.main(list(argv))
    if code != 0:
        raise RuntimeError(f"{script.__name__}.py {' '.join(argv)} ended with {code}: {said.getvalue()[-500:]}")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep progress bars off the screen: interleaved settings would print one for every step."""
    with contextlib.redirect_stderr(io.StringIO()):
        yield


@dataclass
class OpenRun:
    """A run of the training script before its first precompute or step, to be taken on step by step.

    Attributes:
        run: Its settings and what follows from them.
        context: Its surroundings.
        maker: Builds batches.
        store: Takes records, or ``None``.
        learner: The model, its LoRA and the optimiser, as the script makes them.
        records: Makes records, and batches of them.
        history: The steps so far.
    """

    run: Run
    context: Context
    maker: SampleMaker
    store: ResidualStore | None
    learner: Any
    records: RecordSource
    history: History
    _script: ModuleType

    def precompute(self, steps: range, batch_size: int) -> None:
        """Make the records of these steps."""
        self.records.precompute(steps, steps.start, PlannedStage(batch_size))

    def train(self, steps: range) -> None:
        """Train these steps by the script's loop."""
        run, context, learner, history = self.run, self.context, self.learner, self.history
        tracking = Tracking(context.accelerator, context.monitor, learner.model)
        checkpointer = Checkpointer(
            run,
            context,
            learner.adapters,
            learner.optimizer,
            learner.lr_scheduler,
            history,
            self.records,
        )
        self._script.train_steps(steps, run, context, learner, self.records, history, tracking, checkpointer)


def open_run(argv: Sequence[str]) -> OpenRun:
    """Everything the training script does with these flags before its first precompute or step."""
    script = load_script("train_dreambooth_blockskip")
    run = prepare_run(parse_args([*argv, "--report_to", "none", "--seed", "0", "--lr_warmup_steps", "0"]))
    context = Context(script.make_accelerator(run.settings))
    with quiet():
        maker, text, store, _ = script.load_data(run, context, streamed=False)
    _, steps = schedule(run, maker.plan, 1)
    learner = script.make_learner(run, context.accelerator, text, steps)
    stretches = Stretches(num_steps=steps, length=steps)
    records = RecordSource(run, context, maker, learner.model, learner.adapters, store, stretches)
    return OpenRun(run, context, maker, store, learner, records, History(context.accelerator, maker), script)


def tree_rss(process: psutil.Process) -> int:
    """Resident bytes of a process and all its children."""
    total = 0
    for member in (process, *process.children(recursive=True)):
        try:
            total += member.memory_info().rss
        except psutil.NoSuchProcess:
            # It ended between the listing and the reading.
            continue
    return total


def machine() -> dict[str, Any]:
    """What figures depend on, without anything that names the machine."""
    return {
        "system": platform.system(),
        "architecture": platform.machine(),
        "cores": psutil.cpu_count(logical=False) or os.cpu_count(),
        "threads": torch.get_num_threads(),
        "ram_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "device": "cuda" if torch.cuda.is_available() else "cpu",
        "versions": versions(),
    }


def command() -> str:
    """The command line, with the script's path as in the repository."""
    return " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])


def benchmark_parser(description: str | None, **settings: Any) -> argparse.ArgumentParser:
    """A parser with the flag that all benchmarks have."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=description, formatter_class=formatter, **settings)
    parser.add_argument("--json", type=Path, help="Write the figures to this file as well.")
    return parser


def write_figures(path: Path | None, benchmark: str, **figures: Any) -> None:
    """Write ``figures`` as JSON with the command and the machine that they come from; nothing without a path."""
    if path is not None:
        write_json(path, {"benchmark": benchmark, "command": command(), "machine": machine(), **figures})


def target(name: str, value: float, limit: float, aim: float | None = None) -> dict[str, Any]:
    """A figure and the most it may be."""
    return {"name": name, "value": value, "limit": limit, "aim": aim, "met": value <= limit}


def print_targets(targets: Sequence[dict[str, Any]]) -> None:
    """One line per target."""
    for item in targets:
        aim = "" if item["aim"] is None else f", aim {item['aim']:g}"
        verdict = "met" if item["met"] else "MISSED"
        print(f"{item['name']:52}{item['value']:10.4g}   limit {item['limit']:g}{aim}: {verdict}")
