"""Aesthetic gradients (Gallego 2022, arXiv:2209.12330): the text encoder pulled towards what pictures look like.

    e = mean of CLIP's embeddings of the pictures        loss = -cos(text, e)

text is the projected output of the first text encoder for a caption, e a vector of the same CLIP (`image_encoder`). The
web UIs load e and take a few such steps for every prompt, which they forget afterwards. So e is saved, not normalised,
as their files have it; and beside it the change of the encoder that the captions here led to, which `sdops apply` adds
to a model. With 0 steps there is only the vector.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn import functional

from sdops.errors import MismatchError
from sdops.trainers._cards import is_of_text
from sdops.trainers._weights import Weights
from sdops.training import method
from sdops.training.config import Config
from sdops.training.feeder import Batch
from sdops.training.method import Beginning
from sdops.training.model import Model
from sdops.training.parameters import Parameter
from sdops.training.product import Product
from sdops.training.tokens import LENGTH

# Of CLIP's pictures, by channel.
_MEAN, _DEVIATION = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class Method(method.Method):
    """The first text encoder."""

    encodes = trains_text = True
    rate = 1e-4
    measured = "minus cosine of texts and pictures"

    def __init__(self, model: Model, config: Config) -> None:
        super().__init__(model, config)
        self._encoder = model.encoders[0]
        self._weights = Weights(model, lambda part, name: part == self._encoder.name and is_of_text(name))

    def parameters(self) -> list[Parameter]:
        """The weights."""
        return self._weights.parameters(lambda _: self.lr, self.weight_decay)

    def begin(self, beginning: Beginning) -> None:
        """Look at the pictures."""
        clip = _clip(Path(self.config.image_encoder), self._encoder.module.config)
        self._vector = _mean(clip, beginning.pictures)
        self._projection = clip.text_projection.weight.detach().to(self.model.device, self.model.dtype)

    def use(self, parts: Mapping[str, Tensor]) -> None:
        """Let the encoder compute with them."""
        self._weights.use(parts)

    def loss(self, batch: Batch) -> Tensor:
        """Minus the cosine, [B]; of long captions the first 75 tokens count."""
        out = self._encoder.module(batch.ids[self._encoder.name][:, :LENGTH])
        text = functional.linear(out.pooler_output, self._projection).float()
        return -functional.cosine_similarity(text, self._vector.to(text.device))

    def product(self, values: Mapping[str, Tensor]) -> Product:
        """The vector, and the layers that changed."""
        layers = [
            layer for layer in self._weights.layers(values) if any(bool(part.any()) for part in layer.parts.values())
        ]
        return Product(layers, vector=self._vector)


def _clip(folder: Path, text: Any) -> Any:
    """CLIP with both encoders.

    Raises:
        MismatchError: its text encoder is another one than the model's.
    """
    import transformers

    library: Any = transformers
    library.utils.logging.disable_progress_bar()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    try:
        clip = library.CLIPModel.from_pretrained(folder, local_files_only=True).eval()
    except (OSError, ValueError) as error:
        raise MismatchError(
            f"`{folder}` is no CLIP with image and text encoder: {str(error).splitlines()[0]}",
            hint="a copy of openai/clip-vit-large-patch14 for SD1 and SDXL",
        ) from error
    own = clip.config.text_config
    for name in ("hidden_size", "num_hidden_layers"):
        if getattr(own, name) != getattr(text, name):
            raise MismatchError(
                f"the text encoder in `{folder}` has {getattr(own, name)} ({name}), the model's {getattr(text, name)}",
                hint="the CLIP that the model was made with: openai/clip-vit-large-patch14 for SD1 and SDXL",
            )
    return clip


@torch.no_grad()
def _mean(clip: Any, pictures: Sequence[Path]) -> Tensor:
    """Mean of the pictures' projected embeddings, not normalised, float32 [1, d]."""
    size = int(clip.config.vision_config.image_size)
    found = [clip.visual_projection(clip.vision_model(_pixels(path, size)).pooler_output) for path in pictures]
    return torch.cat(found).float().mean(0, keepdim=True)


def _pixels(path: Path, size: int) -> Tensor:
    """A picture as CLIP sees it, [1, 3, size, size]: the short side scaled to `size`, cropped in the middle."""
    with Image.open(path) as opened:
        image = ImageOps.exif_transpose(opened).convert("RGB")
    image = ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)
    values = torch.from_numpy(np.array(image)).float() / 255
    return ((values - torch.tensor(_MEAN)) / torch.tensor(_DEVIATION)).permute(2, 0, 1).unsqueeze(0)
