"""Latents on the disk, so that the next run with these pictures and this VAE need not make them.

One file per picture, size and side, named by what they depend on: the picture's bytes, the VAE's weights, the box. A
file appears when it is complete. One that is damaged is made again.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from torch import Tensor

from sdops.core.sink import SafetensorsSink
from sdops.core.source import read
from sdops.core.spec import Spec
from sdops.errors import SdopsError
from sdops.formats import open_file
from sdops.training.batches import Sample
from sdops.training.model import Model

_WAY = "1"  # changes with the way in which pictures become latents
_NAMES = ("mean", "deviation")

Posterior = tuple[Tensor, Tensor]  # mean and deviation, [4, h, w] float32, scaled


class LatentStore:
    """A folder of latents.

    Args:
        folder: Made if it is not there.
        model: Whose VAE makes them.
    """

    def __init__(self, folder: Path, model: Model) -> None:
        self._folder, self._vae = folder, _digest_of(model)

    def load(self, picture: str, sample: Sample) -> Posterior | None:
        """What was kept of a picture with this digest of its bytes; None if that is nothing, or damaged."""
        path = self._path(picture, sample)
        try:
            source = open_file(path)
        except SdopsError:
            return None
        try:
            if set(source.specs) != set(_NAMES) or any(spec.dtype != "F32" for spec in source.specs.values()):
                return None
            data = {name: read(source, name) for name in _NAMES}
            if source.metadata.get("sha256") != _sha256(*data.values()):
                return None
            mean, deviation = (torch.frombuffer(data[name], dtype=torch.float32) for name in _NAMES)
            shape = source.specs["mean"].shape
            return mean.reshape(shape), deviation.reshape(shape)
        except SdopsError:
            return None
        finally:
            source.close()

    def keep(self, picture: str, sample: Sample, posterior: Posterior) -> None:
        """Keep the latents of a picture.

        Raises:
            OutputError: they cannot be written.
        """
        path = self._path(picture, sample)
        path.parent.mkdir(parents=True, exist_ok=True)
        data = {name: _bytes(values) for name, values in zip(_NAMES, posterior, strict=True)}
        specs = {name: Spec("F32", tuple(values.shape)) for name, values in zip(_NAMES, posterior, strict=True)}
        with SafetensorsSink(path, specs, {"sha256": _sha256(*data.values())}, force=True) as sink:
            for name, content in data.items():
                sink.write(name, 0, content)
            sink.commit()

    def _path(self, picture: str, sample: Sample) -> Path:
        width, height = sample.box
        text = f"{_WAY} {self._vae} {picture} {width}x{height} {sample.mirrored}"
        name = hashlib.sha256(text.encode()).hexdigest()[:40]
        return self._folder / name[:2] / f"{name}.safetensors"


def _digest_of(model: Model) -> str:
    """Of everything in the VAE that latents depend on."""
    found = hashlib.sha256(f"{model.scale}".encode())
    for name, weight in sorted(model.vae.state_dict().items()):
        found.update(name.encode())
        found.update(_bytes(weight.float()))
    return found.hexdigest()


def _bytes(values: Tensor) -> memoryview:
    return values.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _sha256(*data: bytes | bytearray | memoryview) -> str:
    found = hashlib.sha256()
    for each in data:
        found.update(each)
    return found.hexdigest()
