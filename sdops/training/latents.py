"""Pictures as latents: means and deviations of the VAE, made once, from which every step draws anew."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from sdops.errors import FormatError
from sdops.training.batches import Box, Sample
from sdops.training.latent_store import LatentStore, Posterior
from sdops.training.model import Model
from sdops.training.pictures import Picture, covered


@dataclass(frozen=True, slots=True)
class Latent:
    """A picture as the UNet knows it, on the CPU.

    Attributes:
        mean, deviation: [4, h, w], scaled.
        mask: [1, h, w] from 0 to 1, or None.
        sizes: Original height and width, top and left of the crop, height and width (what SDXL is told).
    """

    mean: Tensor
    deviation: Tensor
    mask: Tensor | None
    sizes: tuple[int, int, int, int, int, int]


def make(
    model: Model,
    pictures: list[Picture],
    samples: Iterable[Sample],
    store: LatentStore | None = None,
) -> dict[Sample, Latent]:
    """The latents of all samples, some maybe from a store.

    Raises:
        FormatError: a VAE gives numbers that are not finite.
        OutputError: the store cannot be written.
    """
    return {sample: _one(model, pictures[sample.picture], sample, store) for sample in dict.fromkeys(samples)}


def _one(model: Model, picture: Picture, sample: Sample, store: LatentStore | None) -> Latent:
    found = store.load(picture.digest, sample) if store is not None else None
    if found is None:
        found = _encoded(model, picture, sample)
        if store is not None:
            store.keep(picture.digest, sample, found)
    _, corner = covered(picture.size, sample.box)
    mask = None
    if picture.mask is not None:
        mask = mask_of(
            picture.mask, sample.box, model.cell, alpha=picture.mask == picture.path, mirrored=sample.mirrored
        )
    width, height = sample.box
    sizes = (picture.size[1], picture.size[0], corner[1], corner[0], height, width)
    return Latent(*found, mask, sizes)


def _encoded(model: Model, picture: Picture, sample: Sample) -> Posterior:
    mean, deviation = model.encode(pixels_of(picture.path, sample.box, mirrored=sample.mirrored).unsqueeze(0))
    if not bool(torch.isfinite(mean).all() and torch.isfinite(deviation).all()):
        raise FormatError(
            f"the VAE of `{model.name}` gives NaN for `{picture.path}`",
            hint="the VAE is damaged: `sdops convert --vae` takes another one",
        )
    return mean[0].cpu(), deviation[0].cpu()


def pixels_of(path: Path, box: Box, *, mirrored: bool = False) -> Tensor:
    """A picture [3, H, W] from -1 to 1, scaled to cover the box and cropped in the middle.

    What is transparent becomes white.
    """
    with Image.open(path) as opened:
        turned = ImageOps.exif_transpose(opened)
        if "A" in turned.getbands() or "transparency" in turned.info:
            layer = turned.convert("RGBA")
            turned = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
        image = turned.convert("RGB")
    values = torch.from_numpy(np.array(_fitted(image, box))).permute(2, 0, 1).float() / 127.5 - 1
    return values.flip(-1) if mirrored else values


def mask_of(path: Path, box: Box, cell: int, *, alpha: bool, mirrored: bool) -> Tensor:
    """A mask [1, h, w] in the grid of the latents, from 0 to 1.

    Raises:
        FormatError: everything is masked.
    """
    with Image.open(path) as opened:
        turned = ImageOps.exif_transpose(opened)
        image = turned.convert("RGBA").getchannel("A") if alpha else turned.convert("L")
    image = _fitted(image, box)
    values = torch.from_numpy(np.array(image)).float().unsqueeze(0) / 255
    found = torch.nn.functional.avg_pool2d(values, cell)
    if not bool(found.max() > 0):
        raise FormatError(f"the mask `{path}` is black all over", hint="white is what counts", path=path)
    return found.flip(-1) if mirrored else found


def _fitted(image: Image.Image, box: Box) -> Image.Image:
    size, corner = covered(image.size, box)
    if size != image.size:
        image = image.resize(size, Image.Resampling.LANCZOS)
    return image.crop((*corner, corner[0] + box[0], corner[1] + box[1]))
