# Copyright 2026 The blockskip_hooks authors. Licensed under the Apache License, Version 2.0.
"""Stage `encoder`: trains the offline subject encoder.

The classifier learns class and background from the training pictures. The embedding learns, with the supervised
contrastive loss, to tell apart thousands of icons of the training vendors on any background and in any pose. The
held-out vendors' icons are never seen and measure it.
"""

import argparse
import json
import math
import time
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from backgrounds import draw_background
from catalogue import BACKGROUND_NAMES, CLASS_NAMES, HELD_OUT_VENDORS, TRAINING_VENDORS, held_out_icons
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from settings import add_common_arguments, to_signed, write_json
from sprites import load_icon_set, render_sprite

from blockskip_hooks.inference.subject_encoder import SubjectEncoder


SPRITE = 80


def is_variant(name: str) -> bool:
    """Skin tones of one drawing and flags: not identities of their own."""
    tones = ("-light", "-medium-light", "-medium", "-medium-dark", "-dark")
    return "skin-tone" in name or name.startswith("flag") or name.endswith(tones)


def _small_sprite(icons: Path, icon: tuple[str, str]) -> np.ndarray | None:
    try:
        image = Image.fromarray(render_sprite.__wrapped__(icons, *icon, SPRITE))
    except ValueError:
        return None
    return np.asarray(image.convert("RGBa"))


def load_sprites(icons: Path, work: Path, name: str, vendors: tuple[str, ...], threads: int) -> torch.Tensor:
    """Premultiplied RGBA sprites uint8 (I, 80, 80, 4) of every icon that is no skin-tone variant, cached in `work`."""
    cache, listing = work / f"{name}.safetensors", work / f"{name}.json"
    if not cache.exists():
        keys = [(vendor, icon) for vendor in vendors for icon in sorted(load_icon_set(icons, vendor)["icons"])]
        keys = [key for key in keys if not is_variant(key[1])]
        with get_context("spawn").Pool(threads) as pool:
            sprites = pool.map(partial(_small_sprite, icons), keys, chunksize=64)
        kept = [(key, sprite) for key, sprite in zip(keys, sprites) if sprite is not None]
        save_file({"sprites": torch.from_numpy(np.stack([sprite for _, sprite in kept]))}, cache)
        write_json(listing, [key for key, _ in kept])
    return load_file(cache)["sprites"]


def place(
    sprites: torch.Tensor, backgrounds: torch.Tensor, strength: float = 1.0, with_cover: bool = False
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Draws premultiplied sprites uint8 (B, 80, 80, 4) in random poses on pictures uint8 (B, 64, 64, 3).

    Returns signed pictures (B, 3, 64, 64), some of them blurred or noisy as generated ones are; with `with_cover` the
    object's cover (B, 1, 64, 64) in [0, 1] too.
    """
    count = len(sprites)
    rgba = sprites.permute(0, 3, 1, 2).float() / 255
    scale = torch.empty(count).uniform_(0.62, 1.0)
    angle = torch.empty(count).uniform_(-0.26, 0.26) * strength
    flip = torch.where(torch.rand(count) < 0.5, -1.0, 1.0)
    stretch = 1 + torch.empty(count).uniform_(-0.08, 0.08) * strength
    room = 1.1 - scale
    shift_x, shift_y = (torch.empty(2, count).uniform_(-1, 1) * room).unbind()
    cos, sin = angle.cos() / scale, angle.sin() / scale
    rows_x = torch.stack([flip * cos * stretch, flip * sin, -flip * (cos * stretch * shift_x + sin * shift_y)], 1)
    rows_y = torch.stack([-sin * stretch, cos, sin * stretch * shift_x - cos * shift_y], 1)
    grid = F.affine_grid(torch.stack([rows_x, rows_y], 1), [count, 4, 64, 64], align_corners=False)
    drawn = F.grid_sample(rgba, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    scene = backgrounds.permute(0, 3, 1, 2).float() / 255
    tint = 1 + torch.empty(count, 3, 1, 1).uniform_(-0.06, 0.06) * strength
    images = (scene * (1 - drawn[:, 3:]) + drawn[:, :3] * tint).clamp(0, 1)
    if torch.rand(()) < 0.5 * strength:
        side = int(torch.randint(24, 48, ()))
        small = F.interpolate(images, (side, side), mode="bilinear", antialias=True)
        images = F.interpolate(small, (64, 64), mode="bicubic").clamp(0, 1)
    images = images + 0.03 * strength * torch.rand(count, 1, 1, 1) * torch.randn_like(images)
    return (images * 2 - 1, drawn[:, 3:].clamp(0, 1)) if with_cover else images * 2 - 1


def processor_time() -> float:
    """Seconds of a thread so far: other work on the machine does not shorten a training."""
    return time.process_time() / torch.get_num_threads()


def contrastive_loss(embeddings: torch.Tensor, temperature: float = 0.08) -> torch.Tensor:
    """Supervised contrastive loss of (2, B, D): the two views of an identity attract, everything else repels."""
    flat = embeddings.flatten(0, 1)
    logits = flat @ flat.T / temperature
    logits.fill_diagonal_(-1e4)
    count = embeddings.shape[1]
    partner = torch.cat([torch.arange(count, 2 * count), torch.arange(count)])
    return F.cross_entropy(logits, partner)


def background_bank(seed: int, count: int) -> torch.Tensor:
    """Backgrounds uint8 (count, 64, 64, 3), names in turn."""
    rng = np.random.default_rng((seed, 11))
    names = [BACKGROUND_NAMES[i % len(BACKGROUND_NAMES)] for i in range(count)]
    return torch.from_numpy(np.stack([draw_background(rng, 64, name) for name in names]).astype(np.uint8))


def train_embedding(encoder: SubjectEncoder, sprites: torch.Tensor, scenes: torch.Tensor, minutes: float) -> None:
    """Trains `embedder` and `projection` for the given time with a cosine rate."""
    parameters = [*encoder.embedder.parameters(), *encoder.projection.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=3e-3, weight_decay=1e-3)
    start, step, last_print = processor_time(), 0, time.monotonic()
    encoder.train()
    while (done := (processor_time() - start) / (60 * minutes)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1, (step + 1) / 50) * (0.5 + 0.5 * math.cos(math.pi * done)) + 1e-5
        chosen = sprites[torch.randint(len(sprites), (192,))]
        views = [place(chosen, scenes[torch.randint(len(scenes), (192,))]) for _ in range(2)]
        embeddings = encoder.embed(torch.cat(views)).view(2, 192, -1)
        loss = contrastive_loss(embeddings)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        step += 1
        if time.monotonic() - last_print > 30:
            last_print = time.monotonic()
            print(f"embedding minutes {done * minutes:.1f} step {step} loss {loss.item():.4f}", flush=True)


def other_art(images: torch.Tensor) -> torch.Tensor:
    """Signed pictures (B, 3, H, W) in other colours, shaded, turned and zoomed: the class is told by its shape."""
    count = len(images)
    angle, zoom = torch.empty(count).uniform_(-0.2, 0.2), torch.empty(count).uniform_(0.8, 1.25)
    cos, sin, shift = zoom * angle.cos(), zoom * angle.sin(), torch.empty(2, count).uniform_(-0.1, 0.1)
    poses = torch.stack([torch.stack([cos, -sin, shift[0]], 1), torch.stack([sin, cos, shift[1]], 1)], 1)
    grid = F.affine_grid(poses, list(images.shape), align_corners=False)
    images = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    turned = torch.linalg.qr(torch.randn(count, 3, 3)).Q
    mixed = torch.lerp(torch.eye(3).expand(count, 3, 3), turned, torch.rand(count, 1, 1))
    light = F.interpolate(torch.empty(count, 3, 3, 3).uniform_(0.55, 1.35), images.shape[-2:], mode="bicubic")
    pictures = (torch.einsum("bij,bjhw->bihw", mixed, images) + 1) / 2
    return (pictures * light).clamp(0, 1) * 2 - 1


def train_classifier(encoder: SubjectEncoder, data: dict[str, torch.Tensor], minutes: float) -> None:
    """Trains the classifier on all pictures but the first 1000 (of classes only, at 64 px)."""
    parameters = [*encoder.classifier.parameters(), *encoder.class_head.parameters()]
    parameters += [*encoder.background_head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=3e-3, weight_decay=1e-3)
    start, step, last_print = processor_time(), 0, time.monotonic()
    encoder.train()
    while (done := (processor_time() - start) / (60 * minutes)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1, (step + 1) / 50) * (0.5 + 0.5 * math.cos(math.pi * done)) + 1e-5
        index = torch.randint(1000, len(data["images"]), (128,))
        images = to_signed(data["images"][index])
        if torch.rand(()) < 0.5:
            side = int(torch.randint(24, 60, ()))
            small = F.interpolate(images, (side, side), mode="bilinear", antialias=True)
            images = F.interpolate(small, (64, 64), mode="bicubic")
        images = images + 0.06 * torch.rand(len(images), 1, 1, 1) * torch.randn_like(images)
        images = images * (1 + torch.empty(len(images), 3, 1, 1).uniform_(-0.06, 0.06))
        shift_y, shift_x = torch.randint(-6, 7, (2,)).tolist()
        images = F.pad(images, (6, 6, 6, 6), mode="replicate")[:, :, 6 + shift_y :, 6 + shift_x :][:, :, :64, :64]
        plain = len(images) // 2
        images = torch.cat([images[:plain], other_art(images[plain:])])
        class_logits, background_logits = encoder.class_logits(images)
        loss = F.cross_entropy(class_logits, data["class"][index], label_smoothing=0.02)
        # Backgrounds are named by their colours.
        backgrounds = data["background"][index[:plain]]
        loss = loss + F.cross_entropy(background_logits[:plain], backgrounds, label_smoothing=0.02)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        step += 1
        if time.monotonic() - last_print > 30:
            last_print = time.monotonic()
            print(f"classifier minutes {done * minutes:.1f} step {step} loss {loss.item():.4f}", flush=True)


@torch.no_grad()
def measure(encoder: SubjectEncoder, data: dict, held_out: torch.Tensor, keys: list, scenes: torch.Tensor) -> dict:
    """Accuracies on pictures and identities that no training saw."""
    encoder.eval()
    class_logits, background_logits = encoder.class_logits(to_signed(data["images"][:1000]))
    flat_vendor = [i for i, (v, name) in enumerate(keys) if v == HELD_OUT_VENDORS[0] and not is_variant(name)]
    sprites, names = held_out[flat_vendor], [keys[i][1] for i in flat_vendor]

    def embed_all() -> torch.Tensor:
        parts = torch.arange(len(sprites)).split(256)
        drawn = [place(sprites[p], scenes[torch.randint(len(scenes), (len(p),))], strength=0.0) for p in parts]
        return torch.cat([encoder.embed(part) for part in drawn])

    gallery = F.normalize(sum(embed_all() for _ in range(5)), dim=1)
    queries = [embed_all() for _ in range(4)]
    rows = torch.tensor([names.index(icon.name) for icon in held_out_icons()])
    right_all = torch.cat([(q @ gallery.T).argmax(1) == torch.arange(len(gallery)) for q in queries])
    right_classes = torch.cat([(q[rows] @ gallery[rows].T).argmax(1) == torch.arange(len(rows)) for q in queries])
    return {
        "class_accuracy": (class_logits.argmax(1) == data["class"][:1000]).float().mean().item(),
        "background_accuracy": (background_logits.argmax(1) == data["background"][:1000]).float().mean().item(),
        "unseen_identities": len(gallery),
        "retrieval_among_all_unseen": right_all.float().mean().item(),
        "unseen_designs_of_the_classes": len(rows),
        "retrieval_among_designs_of_the_classes": right_classes.float().mean().item(),
    }


def class_pictures(work: Path) -> dict[str, torch.Tensor]:
    """The pictures of the classes in every shard at 64 px, uint8 (P, 64, 64, 3), with `class` and `background`."""
    parts: dict[str, list[torch.Tensor]] = {"images": [], "class": [], "background": []}
    for path in sorted((work / "shards").glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            rows = file.get_tensor("class") >= 0
            images = file.get_tensor("images")[rows].permute(0, 3, 1, 2).float()
            small = F.interpolate(images, (64, 64), mode="bicubic", antialias=True).clamp(0, 255).round().byte()
            parts["images"].append(small.permute(0, 2, 3, 1))
            parts["class"].append(file.get_tensor("class")[rows])
            parts["background"].append(file.get_tensor("background")[rows])
    return {name: torch.cat(values) for name, values in parts.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_common_arguments(parser)
    parser.add_argument("--target", type=Path, help="default: the folder `subject_encoder` of --work")
    parser.add_argument("--embedding_of", type=Path, help="encoder folder whose embedding is kept, not trained")
    parser.add_argument("--embedding_minutes", type=float, default=6.0)
    parser.add_argument("--classifier_minutes", type=float, default=12.0)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    data = class_pictures(args.work)
    sprites = load_sprites(args.icons, args.work, "sprites_training", TRAINING_VENDORS, args.threads)
    held_out = load_sprites(args.icons, args.work, "sprites_held_out", HELD_OUT_VENDORS, args.threads)
    keys = json.loads((args.work / "sprites_held_out.json").read_text(encoding="utf-8"))
    scenes = background_bank(args.seed, 2000)
    config = {
        "classes": list(CLASS_NAMES),
        "backgrounds": list(BACKGROUND_NAMES),
        "embedding_channels": [32, 64, 96, 160],
        "classifier_channels": [24, 32, 64, 96],
        "embedding_size": 96,
    }
    encoder = SubjectEncoder(**config)
    print(f"{len(sprites)} identities, {sum(p.numel() for p in encoder.parameters()) / 1e3:.0f} k parameters")
    train_classifier(encoder, data, args.classifier_minutes)
    if args.embedding_of:
        embedding = SubjectEncoder.from_pretrained(args.embedding_of)
        encoder.embedder, encoder.projection = embedding.embedder, embedding.projection
    else:
        train_embedding(encoder, sprites, scenes, args.embedding_minutes)
    measured = measure(encoder, data, held_out, keys, scenes) | {"training_identities": len(sprites)}
    folder = args.target or args.work / "subject_encoder"
    folder.mkdir(parents=True, exist_ok=True)
    weights = {n: v.half().contiguous() for n, v in encoder.state_dict().items() if v.is_floating_point()}
    save_file(weights, folder / "model.safetensors")
    write_json(folder / "config.json", {"schema": 1, **config, "measured": measured})
    print(json.dumps(measured, indent=2))


if __name__ == "__main__":
    main()
