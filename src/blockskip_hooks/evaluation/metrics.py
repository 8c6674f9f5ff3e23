"""How well images show a subject and their prompts: the measures of DreamBooth, and how much the images differ.

All measures are pure functions of images or of their embeddings; nothing here makes an image.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby

import torch
import torch.nn.functional as F
from PIL import Image

from ..embedded import embedded_photos, embedded_subjects
from ..inference.image_encoders import ENCODER_NAMES, ImageEncoder, SubjectImageEncoder
from ..utils.errors import UserError
from .prompt_fidelity import prompt_fidelity
from .statistics import bootstrap


DIVERSITY = "diversity"
_TITLES = {"dino": "DINO", "clip": "CLIP", "dinov2": "DINOv2"}


def subject_fidelity(images: torch.Tensor, photos: torch.Tensor) -> torch.Tensor:
    """Mean cosine of each image to the subject's photos, ``(N,)``: DreamBooth's DINO and CLIP-I.

    Args:
        images: Embeddings ``(N, D)`` of length 1.
        photos: Embeddings ``(P, D)`` of length 1.
    """
    return (images @ photos.T).mean(1)


def text_fidelity(images: torch.Tensor, prompts: torch.Tensor) -> torch.Tensor:
    """Cosine of each image to its own prompt, ``(N,)``: CLIP-T.

    Args:
        images: Embeddings ``(N, D)`` of length 1.
        prompts: Embeddings ``(N, D)`` of length 1.
    """
    return (images * prompts).sum(1)


def nearest_subjects(images: torch.Tensor, gallery: Mapping[str, torch.Tensor]) -> list[str]:
    """The subject whose photos each image is most alike, by :func:`subject_fidelity`.

    Args:
        images: Embeddings ``(N, D)`` of length 1.
        gallery: Embeddings ``(P, D)`` of the photos of each subject.
    """
    names = list(gallery)
    similarity = torch.stack([subject_fidelity(images, gallery[name]) for name in names])
    return [names[row] for row in similarity.argmax(0).tolist()]


def feature_distances(layers: Sequence[torch.Tensor]) -> torch.Tensor:
    """How far apart every two images look, ``(N, N)``, in the manner of LPIPS.

    At every place of every map the channels become a vector of length 1. The distance of two images is the squared
    length of the difference of these vectors, 2 - 2 cos, averaged over the places of a map and then over the maps: 0
    for the same image, 2 where vectors are at right angles. LPIPS' network and its learnt weights of channels are not
    used, so figures are comparable between runs with one encoder, not with those of LPIPS.

    Args:
        layers: Maps ``(N, C, H, W)``, each with its own C, H and W.
    """
    distances = []
    for layer in layers:
        # A place where every channel is zero has no direction: it differs by 1 from any other, and by 0 from its like.
        vectors = F.normalize(layer, dim=1).flatten(2).movedim(1, 2).flatten(1)
        distances.append(torch.cdist(vectors, vectors, compute_mode="donot_use_mm_for_euclid_dist").square())
        distances[-1] /= layer.shape[2] * layer.shape[3]
    return torch.stack(distances).mean(0)


def diversity(layers: Sequence[torch.Tensor]) -> float:
    """Mean of :func:`feature_distances` over all pairs of images of one prompt: low where a model knows one picture.

    Args:
        layers: Maps ``(N, C, H, W)`` of at least two images, from
            :meth:`~blockskip_hooks.inference.image_encoders.ImageEncoder.spatial_features`.

    Raises:
        UserError: if there are fewer than two images.
    """
    count = len(layers[0])
    if count < 2:
        raise UserError(f"Diversity is that of two or more images of a prompt, not of {count}.")
    first, second = torch.triu_indices(count, count, offset=1)
    return feature_distances(layers)[first, second].mean().item()


@dataclass
class Evaluation:
    """What was measured.

    Attributes:
        prompts: The prompt of each image.
        images: Values of each image by measure; ``None`` where a measure does not apply to it.
        diversity: That of the images of each prompt; empty with one image of each.
    """

    prompts: list[str] = field(default_factory=list)
    images: list[dict[str, float | None]] = field(default_factory=list)
    diversity: dict[str, float] = field(default_factory=dict)

    def aggregate(self) -> dict[str, dict[str, float]]:
        """Mean of every measure and its bootstrap 95 % interval, prompts drawn first and then images of each.

        Returns:
            By measure, ``mean``, ``low`` and ``high``, and ``values``: how many the mean is of.
        """
        columns: dict[str, dict[tuple[str, int], float]] = {}
        for index, (prompt, values) in enumerate(zip(self.prompts, self.images, strict=True)):
            for name, value in values.items():
                if value is not None:
                    columns.setdefault(name, {})[prompt, index] = value
        if self.diversity:
            columns[DIVERSITY] = {(prompt, 0): value for prompt, value in self.diversity.items()}
        return {
            name: dict(zip(("mean", "low", "high"), bootstrap(column), strict=True)) | {"values": len(column)}
            for name, column in columns.items()
        }


def encoder_label(source: str) -> str:
    """What an encoder is called in results: ``DINO``, ``CLIP``, ``DINOv2``, or the end of its name."""
    names = {hub_id: name for name, hub_id in ENCODER_NAMES.items()}
    name = names.get(source, source)
    return _TITLES.get(name, name.replace("\\", "/").rstrip("/").rpartition("/")[2])


def embedded_gallery(encoder: ImageEncoder) -> dict[str, torch.Tensor]:
    """Embeddings ``(P, D)`` of the photos of every embedded subject."""
    return {
        name: encoder.embed([Image.open(path) for path in sorted(embedded_photos(name).glob("*.png"))])
        for name in embedded_subjects()
    }


def evaluate_images(
    images: Iterable[Image.Image],
    photos: Sequence[Image.Image],
    encoders: ImageEncoder | Mapping[str, ImageEncoder],
    prompts: Sequence[str],
    *,
    descriptions: Mapping[str, str] | None = None,
    subject: str | None = None,
) -> Evaluation:
    """Measure images of one subject.

    Of every encoder, the similarity to the photos (``DINO``; ``CLIP-I`` of one that reads text) and, if it reads text,
    to the prompt (``CLIP-T``). Of the embedded encoder, ``background_right`` and ``class_right`` as well, and
    ``retrieved``: whether the image is nearest to the photos of its own subject among all embedded ones. The diversity
    of each prompt's images is by the first encoder.

    Args:
        images: Images, those of a prompt one after the other; they are read a prompt at a time.
        photos: The subject's photos.
        encoders: Encoders by label, or one.
        prompts: The prompt of each image.
        descriptions: What encoders read instead of a prompt.
        subject: Name of the embedded subject, if it is one.

    Raises:
        UserError: if a prompt's images are in two places.

    Example:
        >>> encoder = load_image_encoder("subject")
        >>> evaluate_images(images, photos, encoder, prompts, subject="dog").aggregate()["retrieved"]["mean"]
    """
    named = {encoder_label(encoders.name): encoders} if isinstance(encoders, ImageEncoder) else dict(encoders)
    known = {label: encoder.embed(photos) for label, encoder in named.items()}
    galleries = {
        label: embedded_gallery(encoder)
        for label, encoder in named.items()
        if subject is not None and isinstance(encoder, SubjectImageEncoder)
    }
    first = next(iter(named.values()))
    result = Evaluation()
    for prompt, group in groupby(zip(prompts, images, strict=True), key=lambda pair: pair[0]):
        if prompt in result.prompts:
            raise UserError(f'The images of "{prompt}" are in two places; put them one after the other.')
        pictures = [image for _, image in group]
        columns: dict[str, Sequence[float | None]] = {}
        for label, encoder in named.items():
            vectors = encoder.embed(pictures)
            name = f"{label}-I" if encoder.reads_text else label
            columns[name] = subject_fidelity(vectors, known[label]).tolist()
            if encoder.reads_text:
                text = encoder.embed_text([(descriptions or {}).get(prompt, prompt)])
                columns[f"{label}-T"] = text_fidelity(vectors, text.expand_as(vectors)).tolist()
            if label in galleries:
                columns["retrieved"] = [float(name == subject) for name in nearest_subjects(vectors, galleries[label])]
            if isinstance(encoder, SubjectImageEncoder):
                columns |= prompt_fidelity(pictures, [prompt] * len(pictures), encoder)
        result.prompts += [prompt] * len(pictures)
        result.images += [dict(zip(columns, row)) for row in zip(*columns.values(), strict=True)]
        if len(pictures) > 1:
            result.diversity[prompt] = diversity(first.spatial_features(pictures))
    return result
