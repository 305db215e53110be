"""Merges on a GPU. What is too small to pay for the way there is computed by the CPU.

Linear merges have the same bits on both, so it does not matter who does which.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction
from functools import partial
from inspect import signature
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sdops.core.gram import exact_coefficients
from sdops.core.inputs import nonfinite, read_raw
from sdops.core.linear import coefficients
from sdops.core.merged import Merged
from sdops.core.method import Method
from sdops.core.noise import key_words
from sdops.core.plan import Input, Plan, Step
from sdops.core.precision import FORMATS, count_nonfinite
from sdops.core.retained import SAMPLE
from sdops.core.stream import TORCH_DTYPES
from sdops.core.transfer import Transfer
from sdops.errors import FormatError, UsageError

SPARSE = ("dare_linear", "dare_ties", "ties")  # beside the linear ones and those of inner products


def check_method(method: str, execution: str) -> None:
    """Refuse methods that have no kernel.

    Raises:
        UsageError: the method is one of them.
    """
    if execution not in ("linear", "gram") and method not in SPARSE:
        raise UsageError(
            f"`{method.replace('_', '-')}` has no kernel for the GPU",
            hint="leave out `--device`; kernels are there for linear methods, slerp and others of inner products, and "
            + ", ".join(name.replace("_", "-") for name in SPARSE),
        )


class MergedOnDevice(Merged):
    """As Merged, with large tensors merged on a device.

    Args:
        plan, method, seed, memory: As for Merged.
        device: `cuda`, or `cpu` to test the way through it.

    Attributes:
        transfer: The way there and back.
    """

    def __init__(self, plan: Plan, method: Method, *, device: str, seed: int = 0, memory: int = 1 << 30) -> None:
        super().__init__(plan, method, seed=seed, memory=memory)
        check_method(method.name, method.execution)
        self.transfer = Transfer(device)

    @property
    def forks(self) -> bool:
        """A device belongs to one process."""
        return False

    def piece_bytes(self, key: str) -> int:
        """Portions that are sent; all but linear methods need whole tensors."""
        step = self.plan.steps[key]
        if not self._is_sent(step):
            return super().piece_bytes(key)
        if self.method.execution != "linear":
            return step.spec.nbytes
        return self.transfer.portion * (step.spec.nbytes // step.spec.numel)

    def splits(self, key: str) -> bool:
        """Whether threads may share the tensor."""
        if self._is_sent(self.plan.steps[key]) and self.method.execution != "linear":
            return False
        return super().splits(key)

    def read_into(self, key: str, start: int, buffer: memoryview) -> None:
        """Compute bytes `[start, start + len(buffer))` of a tensor.

        Raises:
            FormatError: an input holds NaN or infinity.
        """
        step = self.plan.steps[key]
        whole = self.method.execution == "linear" or len(buffer) == step.spec.nbytes
        if not self._is_sent(step) or not whole:
            super().read_into(key, start, buffer)
            return
        size = np.dtype(FORMATS[step.spec.dtype].raw).itemsize
        first, count = start // size, len(buffer) // size
        with self.transfer.stream():
            inputs = [self._send(place, item, first, count) for place, item in enumerate(step.inputs)]
            try:
                merge = self._merge_sparse if self.method.name in SPARSE else self._merge_exactly
                self.transfer.fetch(merge(key, step, inputs, sample=start == 0 and self.retained.wants(key)), buffer)
            except ValueError:
                self._explain(key, step, first, count)
                raise

    def pour(self, key: str, start: int, stop: int, file: int, position: int) -> bool:
        """As Merged, but for what goes to the device."""
        return not self._is_sent(self.plan.steps[key]) and super().pour(key, start, stop, file, position)

    def _is_sent(self, step: Step) -> bool:
        narrow = step.spec.dtype in TORCH_DTYPES and all(item.spec.dtype in TORCH_DTYPES for item in step.inputs)
        doubles = "F64" in (step.spec.dtype, *(item.spec.dtype for item in step.inputs))
        one = self.method.execution == "linear" or len({item.spec.dtype for item in step.inputs}) == 1
        return step.action == "merge" and step.spec.numel >= self.transfer.small and narrow and not doubles and one

    def _send(self, place: int, item: Input, first: int, count: int) -> Tensor:
        """Elements [first, first + count) of an input, on the device."""
        dtype = TORCH_DTYPES[item.spec.dtype]
        read = partial(item.source.read_into, item.key, first * dtype.itemsize)
        return self.transfer.send(f"in{place}", dtype, count, read)

    def _merge_exactly(self, key: str, step: Step, inputs: list[Tensor], *, sample: bool) -> Tensor:
        """A sum, whose coefficients are known or made of inner products; ValueError for NaN and infinity."""
        if self.method.execution == "linear":
            exact: Sequence[Fraction] = coefficients(self.method.function, len(inputs), step.knobs)
        else:
            gram = self.transfer.kernels.inner_products([[x] for x in inputs])[0].numpy()
            if not np.isfinite(gram).all():
                raise ValueError("an input holds NaN or infinity")
            exact = exact_coefficients(self.method, gram, step.knobs)
        out = torch.empty_like(inputs[0], dtype=TORCH_DTYPES[step.spec.dtype])
        merged = self.transfer.kernels.LinearMerge([[x] for x in inputs], [out], exact).run()
        self._count(key, sum(merged.clamped.values()))
        if sample:
            weights: Mapping[int, Fraction] = {place: weight for place, weight in enumerate(exact) if weight}
            raws = [_bits(x, item.spec.dtype) for x, item in zip(inputs, step.inputs, strict=True)]
            self.retained.sample_linear(step, raws, weights, _bits(out, step.spec.dtype))
        return out

    def _merge_sparse(self, key: str, step: Step, inputs: list[Tensor], *, sample: bool) -> Tensor:
        """DARE or TIES in float32, rounded as the CPU does it; ValueError for NaN and infinity."""
        base, models = inputs[0], inputs[1:]
        knobs = _defaults(self.method) | dict(step.knobs)
        wide = torch.empty_like(base, dtype=torch.float32)
        self.transfer.kernels.SparseMerge(
            self.method.name,
            [base],
            [[x] for x in models],
            [wide],
            density=1.0 if base.numel() < knobs.get("min_numel", 0) else knobs["density"],
            weights=knobs["weights"],
            scale=knobs["scale"],
            normalize=knobs["normalize"],
            keys=[[key_words(self._seed, key, model, 0) for model in range(len(models))]],
        ).run()
        out = wide.to(TORCH_DTYPES[step.spec.dtype])
        self._count(key, int(torch.isinf(out).sum()))
        out.clamp_(-FORMATS[step.spec.dtype].largest, FORMATS[step.spec.dtype].largest)
        if sample:
            self.retained.sample(*(x[:SAMPLE].cpu().double().numpy() for x in (base, wide, out)))
        return out

    def _explain(self, key: str, step: Step, first: int, count: int) -> None:
        """Raises FormatError for the input that holds NaN or infinity, or for the result that does."""
        for item in step.inputs:
            nan, infinite = count_nonfinite(read_raw(item, first, count), item.spec.dtype)
            if nan or infinite:
                raise nonfinite(item, nan, infinite)
        raise FormatError(f"`{self.method.name}` made values of `{key}` that are not finite", hint="change the knobs")


def _defaults(method: Method) -> dict[str, Any]:
    """The knobs of a method, as its functions have them."""
    functions = [function for function in (method.function, method.window) if function is not None]
    parameters = [each for function in functions for each in signature(function).parameters.values()]
    return {each.name: each.default for each in parameters if each.default is not each.empty}


def _bits(values: Tensor, dtype: str) -> np.ndarray[Any, Any]:
    """The first elements' bit patterns."""
    leading = values[:SAMPLE].cpu()
    return leading.view(torch.uint8).numpy().view(FORMATS[dtype].raw)
