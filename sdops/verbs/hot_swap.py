"""LoRAs on a model in memory: put on, changed in strength, swapped and taken off, always from the pristine weights.

swap = sdops.hot_swap(pipe.unet, ["style.safetensors:0.8"])        a module, or a whole pipeline
swap.set_strengths(0.5)                                            the same LoRAs, other strengths
swap.load(["face.safetensors", "detail.safetensors:0.3"])          other LoRAs
swap.restore()                                                     the weights as they were, bit for bit

Nothing is ever subtracted, so nothing drifts. No module is replaced or wrapped: weights are written in place, at the
addresses that compiled and captured graphs know.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sdops.core import accel
from sdops.core.dial import DialValue
from sdops.core.spec import Spec
from sdops.core.stream import TORCH_DTYPES
from sdops.errors import MismatchError, UsageError
from sdops.verbs._adapter_source import check_finite
from sdops.verbs._apply_base import check_architectures, check_matched, open_base
from sdops.verbs._apply_changes import Changes
from sdops.verbs._apply_loras import Lora, Wish, open_loras, read_strength
from sdops.verbs._hot_changes import changes_of

if TYPE_CHECKING:
    from types import TracebackType

_DTYPES = {dtype: name for name, dtype in TORCH_DTYPES.items()}


def hot_swap(model: Any, loras: Sequence[Wish] = (), *, allow_unmatched: bool = False) -> HotSwap:
    """Put LoRAs on a model in memory: W' = round(W + sum_l t_l b_l delta_l), rounded once, W being the pristine weight.

    On a GPU one launch changes all layers; strengths cost milliseconds. Touched weights are kept a second time.

    Args:
        model: A torch module; several by name, `{"unet": ..., "text_encoder": ...}`; or a pipeline of diffusers.
        loras: As `sdops.apply` takes them: a path, `"PATH:STRENGTH"`, or a pair of path and strength.
        allow_unmatched: Leave out layers that the model does not have. Layers of components that were not given, such
            as the text encoders beside a bare UNet, are always left out.

    Returns:
        A handle, also for `with`: at the end of the block the weights are as they were.

    Raises:
        UsageError: the model is of no known family, or a strength is malformed.
        MismatchError: a LoRA is for another architecture, or does not fit.
        FormatError: a file is damaged, or no adapter.
    """
    swap = HotSwap(model, allow_unmatched=allow_unmatched)
    swap.load(loras)
    return swap


class HotSwap:
    """A model whose LoRAs can be changed. Made by `hot_swap`.

    Attributes:
        loras: What is on it, in order.
        left_out: Layers of the LoRAs that the model does not have.
    """

    def __init__(self, model: Any, *, allow_unmatched: bool = False) -> None:
        self.loras: list[Lora] = []
        self.left_out: tuple[str, ...] = ()
        self._parameters = dict(_parameters(model))
        self._opened = open_base(_InMemory(type(model).__name__, self._parameters))
        self._allow_unmatched = allow_unmatched
        self._pristine: dict[str, Tensor] = {}
        self._bake: Any = None
        self._places: list[tuple[int, str]] = []  # LoRA and parameter of each slot of the plan

    def __enter__(self) -> HotSwap:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.restore()

    @property
    def touched(self) -> tuple[str, ...]:
        """The parameters that the LoRAs change."""
        return tuple(self._pristine)

    def load(self, loras: Sequence[Wish]) -> None:
        """Replace all LoRAs. If that fails, the model and its LoRAs are as before.

        Raises:
            As `hot_swap`.
        """
        opened = open_loras(loras, self._opened, allow_unknown=False)
        units = [replace(lora, strength=read_strength(1.0, self._opened, lora.name)) for lora in opened]
        found, left_out = self._match(units)
        for lora in opened:
            check_finite(lora.adapter)
        slots: dict[tuple[int, str], int] = {}
        changes = [
            [replace(change, slot=slots.setdefault((lora, key), len(slots))) for lora, change in own]
            for key, own in changes_of(found, units, self._pristine_or_live).items()
        ]
        self.restore()
        self._pristine = {key: self._parameters[key].detach().clone() for key in found.terms}
        live = [self._parameters[key] for key in self._pristine]
        self._bake = accel.kernels().Bake(list(self._pristine.values()), live, changes)
        self.loras, self.left_out, self._places = opened, left_out, list(slots)
        self._run()

    def set_strengths(self, *strengths: DialValue) -> None:
        """Change how strongly the LoRAs act, one strength (a number or a dial) for each.

        Raises:
            UsageError: their number is wrong, or one is malformed.
        """
        if len(strengths) != len(self.loras):
            raise UsageError(
                f"{len(self.loras)} LoRAs are loaded, {len(strengths)} strengths given",
                hint=f"in the order of {', '.join(lora.name for lora in self.loras) or 'none'}",
            )
        read = [
            read_strength(given, self._opened, lora.name) for given, lora in zip(strengths, self.loras, strict=True)
        ]
        self.loras = [replace(lora, strength=strength) for lora, strength in zip(self.loras, read, strict=True)]
        self._run()

    def restore(self) -> None:
        """Take all LoRAs off: the weights get their pristine bits."""
        with torch.no_grad():
            for key, weight in self._pristine.items():
                self._parameters[key].copy_(weight)
        self.loras, self.left_out, self._pristine, self._bake = [], (), {}, None

    def _pristine_or_live(self, key: str) -> Tensor:
        return self._pristine.get(key, self._parameters[key]).detach()

    def _run(self) -> None:
        """Write all touched weights."""
        strengths = [self.loras[lora].strength.of(self._opened, key) for lora, key in self._places]
        if self._pristine:
            with torch.no_grad():
                self._bake.run(strengths)

    def _match(self, loras: list[Lora]) -> tuple[Changes, tuple[str, ...]]:
        """What the LoRAs change, and what they would change in components that are not here."""
        try:
            found = Changes(self._opened, loras, peft_dora=False)
        except MismatchError as error:
            check_architectures(loras, self._opened, error.message)
            raise
        components = {part.name for part in self._opened.detection.components}
        left_out: list[str] = []
        for matched in found.matched:
            absent = [name for name in matched.unmatched if name.partition(":")[0] not in components]
            left_out += absent
            if matched.keys:
                matched.unmatched = [name for name in matched.unmatched if name not in absent]
        check_matched(loras, found, self._opened, allowed=self._allow_unmatched)
        if found.shapes:
            raise MismatchError(
                f"a LoRA makes `{next(iter(found.shapes))}` larger, which cannot be done in place",
                hint="`sdops apply` writes such a model to a file",
            )
        return found, (*left_out, *(name for matched in found.matched for name in matched.unmatched))


class _InMemory:
    """Parameters of modules as a Source."""

    def __init__(self, name: str, parameters: Mapping[str, Tensor]) -> None:
        self.name = name
        self.specs: Mapping[str, Spec] = {
            key: Spec(_DTYPES[tensor.dtype], tuple(tensor.shape)) for key, tensor in parameters.items()
        }
        self.metadata: Mapping[str, str] = {}
        self._parameters = parameters

    def read_into(self, key: str, start: int, buffer: memoryview) -> None:
        """Copy bytes of a parameter."""
        flat = self._parameters[key].detach().to("cpu").contiguous().view(-1).view(torch.uint8)
        buffer[:] = flat[start : start + len(buffer)].numpy().tobytes()

    def close(self) -> None:
        """Nothing to release."""


def _parameters(model: Any) -> Iterator[tuple[str, Tensor]]:
    """Floating parameters by name; those of a pipeline are called `COMPONENT/NAME`.

    Raises:
        UsageError: it is no model, or its weights are not there.
    """
    modules: Mapping[str, Any] = {"": model}
    if isinstance(model, Mapping):
        modules = model
    elif not isinstance(model, torch.nn.Module):
        modules = getattr(model, "components", {})
    modules = {name: module for name, module in modules.items() if isinstance(module, torch.nn.Module)}
    if not modules:
        raise UsageError(
            f"`{type(model).__name__}` is no torch module, mapping of modules or pipeline",
            hint="e.g. `sdops.hot_swap(pipe.unet, [...])`",
        )
    for name, module in modules.items():
        for key, tensor in module.state_dict(keep_vars=True).items():
            if tensor.dtype not in _DTYPES:
                continue
            if tensor.is_meta:
                raise UsageError(f"`{key}` has no values (meta device)", hint="load the weights first")
            yield (f"{name}/{key}" if name else key), tensor
