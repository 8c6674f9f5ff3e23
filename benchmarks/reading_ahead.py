#!/usr/bin/env python
"""What do forwards that stream half of a FLUX's blocks cost beside the forward of the same model in memory?

A disk is imitated that takes a share of the bare forward's time to read all skipped blocks: an NVMe disk beside a GPU,
scaled to this machine. Blocks are read in turn, as each is needed; ahead, while the one before runs; and ahead for
several forwards in step, as precompute and validation images do.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from common import FluxSize, benchmark_parser, print_targets, save_random_flux, target, write_figures

from blockskip_hooks import BlockSkipConfig, DiTBlockSkipTransformer
from blockskip_hooks.loading import checkpoint_index


SHARES = (0.4, 0.8)


def main(argv: list[str] | None = None) -> int:
    """Measure; 0 if reading hides behind the forwards."""
    parser = benchmark_parser(__doc__)
    parser.add_argument("--double_blocks", type=int, default=6, help="Double-stream blocks; all are skipped.")
    parser.add_argument("--single_blocks", type=int, default=12, help="Single-stream blocks; a quarter is skipped.")
    parser.add_argument("--heads", type=int, default=8, help="Attention heads of 64 each.")
    parser.add_argument("--tokens", type=int, default=256, help="Tokens of an image.")
    parser.add_argument("--forwards", type=int, default=8, help="Forwards in step.")
    parser.add_argument("--rounds", type=int, default=5, help="Times each is measured.")
    args = parser.parse_args(argv)
    size = FluxSize(double_blocks=args.double_blocks, single_blocks=args.single_blocks, heads=args.heads)
    with tempfile.TemporaryDirectory() as name:
        folder = save_random_flux(Path(name), size, torch.float32)
        results = measure(folder, size, args)
    targets = [
        target(
            f"precompute / bare forward, reading {share:.0%} of it",
            results[f"{share:.0%}"]["in_step"] / results["bare_seconds"],
            1.15,
        )
        for share in SHARES
    ]
    print_targets(targets)
    names = ("double_blocks", "single_blocks", "heads", "tokens", "forwards", "rounds")
    settings = {name: getattr(args, name) for name in names}
    write_figures(args.json, "reading_ahead", settings=settings, results=results, targets=targets)
    return 0 if all(item["met"] for item in targets) else 1


def measure(folder: Path, size: FluxSize, args: Any) -> dict[str, Any]:
    """Median seconds of a forward of each kind; all kinds in every round, so that other work slows all of them."""
    whole = DiTBlockSkipTransformer.from_pretrained(folder, BlockSkipConfig())
    model = DiTBlockSkipTransformer.from_pretrained(
        folder, BlockSkipConfig(leading=size.double_blocks, trailing=size.single_blocks // 4)
    )
    num_bytes = sum(p.nbytes for module in model.streamed_modules.values() for p in module.parameters())
    inputs = flux_inputs(size, args.tokens)

    def forward(of: DiTBlockSkipTransformer = model) -> torch.Tensor:
        with torch.no_grad():
            return of.transformer(**inputs, return_dict=False)[0]

    def in_step() -> None:
        assert all(torch.equal(output, expected) for output in model.together([forward] * args.forwards))

    expected = forward(whole)
    bare: list[float] = []
    seconds: dict[str, dict[str, list[float]]] = {}
    read = checkpoint_index.read_bytes
    for _ in range(args.rounds):
        bare.append(timed(lambda: forward(whole)))
        for share in SHARES:
            rate = num_bytes / (share * median(bare))

            def throttled(path: Path, start: int, out: Any, rate: float = rate) -> None:
                until = time.perf_counter() + out.nbytes / rate
                read(path, start, out)
                time.sleep(max(until - time.perf_counter(), 0.0))

            checkpoint_index.read_bytes = throttled
            kinds = seconds.setdefault(f"{share:.0%}", {"in_turn": [], "ahead": [], "in_step": []})
            model._streamer._reads_ahead = False
            kinds["in_turn"].append(timed(forward))
            model._streamer._reads_ahead = True
            kinds["ahead"].append(timed(forward))
            kinds["in_step"].append(timed(in_step) / args.forwards)
            checkpoint_index.read_bytes = read
    results: dict[str, Any] = {"skipped_bytes": num_bytes, "bare_seconds": median(bare)}
    print(f"bare forward {median(bare):.2f} s, {num_bytes / 2**20:.0f} MiB skipped; beside it:")
    for share, kinds in seconds.items():
        results[share] = {kind: median(times) for kind, times in kinds.items()}
        ratios = ", ".join(f"{kind.replace('_', ' ')} {median(t) / median(bare):.2f}" for kind, t in kinds.items())
        print(f"  reading takes {share} of it: {ratios}")
    return results


def flux_inputs(size: FluxSize, tokens: int) -> dict[str, torch.Tensor]:
    """Random inputs of one sample."""
    generator = torch.Generator().manual_seed(0)
    text_tokens = max(tokens // 4, 1)
    return {
        "hidden_states": torch.randn(1, tokens, 64, generator=generator),
        "encoder_hidden_states": torch.randn(1, text_tokens, size.text_dim, generator=generator),
        "pooled_projections": torch.randn(1, 64, generator=generator),
        "timestep": torch.tensor([0.5]),
        "guidance": torch.tensor([3.5]),
        "img_ids": torch.zeros(tokens, 3),
        "txt_ids": torch.zeros(text_tokens, 3),
    }


def timed(call: Callable[[], object]) -> float:
    """Seconds of a call."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


if __name__ == "__main__":
    sys.exit(main())
