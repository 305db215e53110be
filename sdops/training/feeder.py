"""What a step computes with: latents, noise, noise steps, weights and texts, all from the seed and the step's number.

Every random number of a sample is keyed by the sample's own number in the run, so a run on two processes draws what a
run on one draws, and a continuation draws what it would have drawn. The numbers are made on the CPU.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace

import numpy as np
import torch
from torch import Tensor

from sdops.core.noise import Noise
from sdops.training import diffusion
from sdops.training.batches import Box, Plan, Sample, varied
from sdops.training.config import Config
from sdops.training.latents import Latent
from sdops.training.model import Model
from sdops.training.tokens import LENGTH, Tokens

_POSTERIOR, _NOISE, _STEP, _OFFSET, _DROPOUT = range(5)  # streams of random numbers
_CACHED = 4096  # texts whose outputs are kept


@dataclass(slots=True)
class Batch:
    """Tensors of one batch, B samples.

    Attributes:
        latents: [B, 4, h, w], float32, drawn from the cached distributions.
        noise: As the latents.
        steps: [B], noise steps.
        abar: [B], of these.
        weights: [B], of the loss, by noise step.
        shares: [B], of a sample in the loss of the batch: 1 / B; times `prior_weight` for pictures of the class.
        mask: [B, 1, h, w] or None.
        sizes: [B, 6], what SDXL is told, else None.
        ids: Encoder -> [B, 77 c] for c chunks of text; empty where the text is cached.
        context: [B, 77 c, width]; None where the text is encoded in the step.
        pooled: [B, width] or None.
    """

    latents: Tensor
    noise: Tensor
    steps: Tensor
    abar: Tensor
    weights: Tensor
    shares: Tensor
    mask: Tensor | None
    sizes: Tensor | None
    ids: dict[str, Tensor]
    context: Tensor | None = None
    pooled: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        """All of them by name."""
        found = {each.name: getattr(self, each.name) for each in fields(self) if each.name != "ids"}
        named = {f"ids.{name}": ids for name, ids in self.ids.items()}
        return {name: value for name, value in found.items() if value is not None} | named

    def to(self, device: torch.device) -> Batch:
        """The same on a device."""
        found = self.tensors()
        if device.type == "cuda":  # from other memory the copy would wait for all launched work
            found = {name: value.pin_memory() for name, value in found.items()}
        return self._with({name: value.to(device, non_blocking=True) for name, value in found.items()})

    def copied(self) -> Batch:
        """The same in memory of its own."""
        return self._with({name: value.clone() for name, value in self.tensors().items()})

    def _with(self, values: dict[str, Tensor]) -> Batch:
        ids = {name: values.pop(f"ids.{name}") for name in self.ids}
        return replace(self, **values, ids=ids)


@dataclass(eq=False)
class Feeder:
    """Makes batches.

    Attributes:
        model: Whose noise schedule and encoders count.
        config: The settings.
        plan: Which samples when.
        latents: Of every sample.
        captions: Of every picture; `{}` stands for the new words.
        tokens: Texts to tokens.
        encodes: Whether steps encode the text themselves, because an encoder or a word learns.
        rank, ranks: Number of this process, and of all.
        class_latents: Sample -> latents of pictures of the class, to preserve it; empty without.
    """

    model: Model
    config: Config
    plan: Plan
    latents: Mapping[Sample, Latent]
    captions: Sequence[str]
    tokens: Tokens
    encodes: bool
    rank: int = 0
    ranks: int = 1
    class_latents: Mapping[Sample, Latent] = field(default_factory=dict)

    def __post_init__(self) -> None:
        config, model = self.config, self.model
        self._abar = model.abar.float()
        self._weights = diffusion.weights_of(
            model.abar, model.prediction, min_snr=config.min_snr, debiased=config.debiased
        ).float()
        self._of_size: dict[Box, list[Latent]] = {}
        for sample, latent in self.class_latents.items():
            self._of_size.setdefault(sample.box, []).append(latent)
        self._cache: dict[str, tuple[Tensor, Tensor | None]] = {}

    def batch(self, number: int) -> Batch:
        """This process' part of batch `number` of the run, on the model's device."""
        whole = self.plan.at(number)
        own = len(whole) // self.ranks
        first = number * len(whole) + self.rank * own
        samples = whole[self.rank * own : (self.rank + 1) * own]
        pairs = [(first + position, sample) for position, sample in enumerate(samples)]
        drawn = [self._drawn(f"{index}", self.latents[sample]) for index, sample in pairs]
        texts = [self._text(index, sample) for index, sample in pairs]
        shares = [1 / own] * own
        if self.class_latents:
            drawn += [self._drawn(f"class {index}", self._of_class(index, sample)) for index, sample in pairs]
            texts += [self.config.class_prompt] * own
            shares += [self.config.prior_weight / own] * own
        return self._joined(drawn, texts, shares)

    def fixed(self, samples: Sequence[Sample], step: int, first: int = 0) -> Batch:
        """Samples with noise that is the same in every run of a seed, all at one noise step, for validation.

        Args:
            samples: Which.
            step: The noise step.
            first: Number of the first sample; the others count on.
        """
        drawn = [
            self._drawn(f"fixed {first + index} {step}", self.latents[sample], step=step)
            for index, sample in enumerate(samples)
        ]
        texts = [self.captions[sample.picture] for sample in samples]
        batch = self._joined(drawn, texts, [1 / len(samples)] * len(samples))
        batch.weights.fill_(1.0)
        return batch

    def _joined(self, drawn: list[dict[str, Tensor]], texts: list[str], shares: list[float]) -> Batch:
        steps = torch.stack([each["step"] for each in drawn])
        masks = [each["mask"] for each in drawn if "mask" in each]
        sizes = torch.stack([each["sizes"] for each in drawn]) if self.model.family == "sdxl" else None
        batch = Batch(
            torch.stack([each["latents"] for each in drawn]),
            torch.stack([each["noise"] for each in drawn]),
            steps,
            self._abar[steps],
            self._weights[steps],
            torch.tensor(shares),
            self._masks(drawn) if masks else None,
            None if sizes is None else sizes.to(self.model.dtype),
            self._ids(texts) if self.encodes else {},
        )
        if not self.encodes:
            batch.context, batch.pooled = self._encoded(texts)
        return batch.to(self.model.device)

    def _masks(self, drawn: list[dict[str, Tensor]]) -> Tensor:
        whole = torch.ones(1, *drawn[0]["latents"].shape[1:])
        return torch.stack([each.get("mask", whole) for each in drawn])

    def _drawn(self, key: str, latent: Latent, step: int | None = None) -> dict[str, Tensor]:
        """A sample's latents, noise and noise step."""
        noise, config = Noise(self.config.seed, f"sample {key}"), self.config
        found = {"latents": latent.mean + latent.deviation * noise.normal(0, latent.mean, _POSTERIOR)}
        found["noise"] = noise.normal(0, latent.mean, _NOISE)
        if config.noise_offset:
            channels = noise.normal(0, latent.mean[:, :1, :1], _OFFSET)
            found["noise"] = found["noise"] + config.noise_offset * channels
        if step is None:
            choices = config.most_step - config.least_step + 1
            step = config.least_step + int(noise.words(0, 1, _STEP).astype(np.uint64)[0] * choices >> 32)
        found["step"] = torch.tensor(step)
        found["sizes"] = torch.tensor(latent.sizes, dtype=torch.float32)
        if latent.mask is not None:
            found["mask"] = latent.mask
        return found

    def _of_class(self, index: int, like: Sample) -> Latent:
        """The class picture that goes with sample `index`, in the same size."""
        fitting = self._of_size[like.box]
        return fitting[index % len(fitting)]

    def _text(self, index: int, sample: Sample) -> str:
        config = self.config
        chance = random.Random(f"{config.seed} {index} {_DROPOUT}")  # noqa: S311 -- no secret
        return varied(
            self.captions[sample.picture],
            chance,
            dropout=config.caption_dropout,
            shuffle=config.shuffle_tags,
            keep=config.keep_tags,
        )

    def encode_texts(self) -> bool:
        """Encode every text of the run, so that no step has to; whether the encoders are not needed any more."""
        config = self.config
        empty = [""] if config.caption_dropout or config.chunks > 1 else []
        texts = [*dict.fromkeys([*self.captions, *empty, *([config.class_prompt] if self.class_latents else [])])]
        if self.encodes or config.shuffle_tags or len(texts) > _CACHED:
            return False
        for text in texts:
            self._encoded([text])
        return True

    def _ids(self, texts: Sequence[str]) -> dict[str, Tensor]:
        chunks = self.config.chunks
        return {
            encoder.name: torch.tensor(self.tokens.rows(texts, encoder.pad, chunks)) for encoder in self.model.encoders
        }

    @torch.no_grad()
    def _encoded(self, texts: Sequence[str]) -> tuple[Tensor, Tensor | None]:
        """The outputs of the text encoders, from the cache where they are known, on the CPU.

        Beside longer texts, one of few chunks has empty chunks at its end.
        """
        found = [self._output(text) for text in texts]
        longest = max(context.shape[1] for context, _ in found)
        contexts = []
        for context, _ in found:
            missing = (longest - context.shape[1]) // LENGTH
            contexts.append(torch.cat([context, *[self._output("")[0]] * missing], dim=1) if missing else context)
        pooled = [each for _, each in found if each is not None]
        return torch.cat(contexts), torch.cat(pooled) if pooled else None

    def _output(self, text: str) -> tuple[Tensor, Tensor | None]:
        """Of one text."""
        if text not in self._cache:
            if len(self._cache) >= _CACHED:
                self._cache.pop(next(iter(self._cache)))
            ids = {name: rows.to(self.model.device) for name, rows in self._ids([text]).items()}
            context, pooled = self.model.text(ids)
            self._cache[text] = context.cpu(), None if pooled is None else pooled.cpu()
        return self._cache[text]
