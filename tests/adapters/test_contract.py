"""One contract for every family on the shelf: see `sdops/adapters/__init__.py`."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from itertools import product
from math import prod
from pathlib import Path

import pytest
import torch

import sdops.adapters
from sdops.adapters import FAMILIES, Shape, family, padded
from sdops.errors import FormatError, MismatchError, SdopsError, UsageError
from tests.adapters.examples import EXAMPLES, Example, relative, tolerance

each = pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.name)
every = pytest.mark.parametrize("name", FAMILIES)


def test_the_shelf_lists_its_files() -> None:
    files = {path.stem for path in Path(sdops.adapters.__file__).parent.glob("[!_]*.py")}
    assert files == set(FAMILIES)
    assert {example.family for example in EXAMPLES} == files - {"tlora"}


@every
def test_the_docstring_names_every_part(name: str) -> None:
    code, words = family(name), (sdops.adapters.__doc__ or "").split()
    assert {*code.required, *code.optional} <= {word.strip("(),;") for word in words}
    assert set(code.needs_weight_for) <= {*code.required, *code.optional}
    assert not set(code.required) & set(code.optional)


@every
def test_every_part_has_an_example(name: str) -> None:
    if name == "tlora":
        return
    shown = {part for example in EXAMPLES if example.family == name for part in example.all_shapes()}
    assert {*family(name).required, *family(name).optional} - shown <= {"reshape"} | (
        {"magnitude"} if name in ("loha", "lokr") else set()
    )


def test_shapes_are_checked_without_torch() -> None:
    code = (
        "import sys; from sdops.adapters import FAMILIES, family\n"
        "for name in FAMILIES: family(name)\n"
        "family('lora').check({'up': (6, 3), 'down': (3, 8)}, (6, 8))\n"
        "assert not {'torch', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_unknown_family_is_refused() -> None:
    with pytest.raises(UsageError, match="`lora2`"):
        family("lora2")


@each
def test_the_facts_fit_the_weight(example: Example) -> None:
    for shape in (example.shape, None):
        facts = example.code.check(example.all_shapes(), shape)
        assert facts.rows in (None, example.shape[0])
        assert facts.columns in (None, prod(example.shape[1:])) or not facts.weight
        moved = example.code.bias_delta(example.parts(), example.shape, torch.zeros(6), **example.settings)
        assert (facts.bias, moved is not None) in ((False, False), (True, True), (False, facts.bias_if_any))


@each
def test_another_weight_is_a_mismatch(example: Example) -> None:
    rows, *rest = example.shape
    wrong = [(7 * rows + 1, 11, *rest[1:])]
    if example.family in ("lora", "lora_embedding", "loha", "lokr", "glora"):
        wrong += [(rows + 1, *rest), (rows, rest[0] + 1, *rest[1:])]
    for shape in wrong:
        with pytest.raises(MismatchError) as caught:
            example.code.check(example.all_shapes(), shape)
        assert caught.value.data["part"] in example.all_shapes()
        assert caught.value.hint


@each
def test_a_strange_part_is_refused_by_name(example: Example) -> None:
    with pytest.raises(FormatError, match="`strange`"):
        example.code.check(example.all_shapes() | {"strange": (1,)}, example.shape)


@each
def test_parts_that_do_not_fit_each_other_are_refused(example: Example) -> None:
    """Every dimension of every part is bound by another part or by the weight; if not, it is free in the formula."""
    shapes = example.all_shapes()
    for part, shape in shapes.items():
        with pytest.raises(FormatError, match=f"`{part}`"):
            example.code.check(shapes | {part: (*shape, 0)}, None)
        for dim in range(len(shape)):
            larger = (*shape[:dim], shape[dim] + 1, *shape[dim + 1 :])
            with pytest.raises(SdopsError, match="part `"):
                example.code.check(shapes | {part: larger}, example.shape)


@each
def test_a_missing_required_part_is_named(example: Example) -> None:
    shapes = example.all_shapes()
    for part in example.code.required:
        with pytest.raises(FormatError, match=f"`{part}` is missing"):
            example.code.check({name: shape for name, shape in shapes.items() if name != part}, example.shape)


@each
def test_a_delta_has_the_shape_of_the_weight_and_the_wider_dtype(example: Example) -> None:
    weight = example.weight()
    wide = example.code.delta(example.parts(), example.shape, weight, **example.settings)
    assert wide.shape == example.shape
    assert wide.dtype == torch.float64
    small = example.parts(dtype=torch.float32)
    narrow = example.code.delta(small, example.shape, weight.float(), **example.settings)
    assert narrow.dtype == torch.float32
    assert torch.isfinite(narrow).all()
    if float(wide.norm()) > 0:
        scale = float(wide.norm() + weight.norm()) / float(wide.norm())  # W' - W cancels
        assert relative(narrow, wide) < scale * tolerance(torch.float32, prod(example.shape))


@each
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_parts_are_computed_in_single(example: Example, dtype: torch.dtype) -> None:
    parts, weight = example.parts(dtype=dtype), example.weight(dtype=dtype)
    found = example.code.delta(parts, example.shape, weight, **example.settings)
    exact = {name: part.float() for name, part in parts.items()}
    assert found.dtype == torch.float32
    assert torch.equal(found, example.code.delta(exact, example.shape, weight.float(), **example.settings))


@each
def test_a_delta_can_be_differentiated(example: Example) -> None:
    if "diff_b" in example.shapes and len(example.shapes) == 1:
        return  # the weight does not change
    parts = {name: part.requires_grad_() if part.ndim else part for name, part in example.parts().items()}
    example.code.delta(parts, example.shape, example.weight(), **example.settings).square().sum().backward()
    learned = [name for name, part in parts.items() if part.grad is not None and part.grad.abs().sum() > 0]
    assert set(learned) == {name for name in example.shapes if name not in ("up_bias", "diff_b", "set_b")}


@each
def test_factors_are_exact(example: Example) -> None:
    found = example.code.factors(example.parts(), example.shape, example.weight(), **example.settings)
    assert (found is not None) == example.exact
    if found is not None:
        up, down = found
        wanted = example.code.delta(example.parts(), example.shape, example.weight(), **example.settings)
        assert up.shape == (example.shape[0], len(down))
        assert relative((up @ down).reshape(example.shape), wanted) < tolerance(torch.float64, len(down))


@each
def test_a_family_that_needs_the_weight_says_so(example: Example) -> None:
    parts = example.parts()
    if example.code.needs_weight(parts):
        with pytest.raises(SdopsError, match="depends on the weights"):
            example.code.delta(parts, example.shape, None, **example.settings)
    else:
        a, b = (example.code.delta(parts, example.shape, w, **example.settings) for w in (None, example.weight()))
        assert torch.equal(a, b)


@each
def test_an_unknown_setting_is_refused(example: Example) -> None:
    if example.settings or example.family == "full":
        return
    with pytest.raises(TypeError, match="lora_alhpa"):
        example.code.delta(example.parts(), example.shape, example.weight(), lora_alhpa=1.0)


@each
@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_an_alpha_that_means_nothing_is_refused(example: Example, value: float) -> None:
    if "lora_alpha" not in example.numbers or {"w1", "w2"} <= set(example.shapes):
        return  # full Kronecker factors are not scaled
    parts = example.parts() | {"lora_alpha": torch.tensor([value], dtype=torch.float16)}
    with pytest.raises(FormatError, match="`lora_alpha`"):
        example.code.delta(parts, example.shape, example.weight(), **example.settings)


def test_t_lora_is_refused_by_name() -> None:
    with pytest.raises(FormatError, match="T-LoRA"):
        family("tlora").check({"q_layer": (2, 8), "p_layer": (6, 2), "lambda_layer": (1, 2)}, (6, 8))
    with pytest.raises(FormatError, match="T-LoRA"):
        family("tlora").delta({}, (6, 8))


def test_a_weight_is_padded_with_zeros() -> None:
    weight = torch.arange(1.0, 7.0).reshape(2, 3)
    wide = padded(weight, (3, 5))
    assert torch.equal(wide[:2, :3], weight)
    assert wide.sum() == weight.sum()
    assert padded(weight, (2, 3, 1, 1)).shape == (2, 3, 1, 1)
    with pytest.raises(MismatchError):
        padded(weight, (2, 2))


WEIGHTS = [(6, 8), (6, 4, 3, 3), (6, 8, 1, 1), (6,), (8,), (6, 36), (4, 8), (6, 4, 9)]
CHANGES: list[Callable[[Shape, int], Shape]] = [
    lambda shape, axis: (*shape[:axis], 8 if shape[axis] == 6 else 6, *shape[axis + 1 :]),
    lambda shape, _axis: (*shape, 1),
    lambda shape, _axis: shape[::-1],
    lambda shape, _axis: (*shape[:-2], prod(shape[-2:])),
]


@each
def test_wrong_shapes_never_end_in_a_traceback(example: Example) -> None:
    """What `check` lets pass for a weight can be computed, or is refused with a message for people."""
    parts = example.parts(dtype=torch.float32)
    for key, part in parts.items():
        for change, axis in product(CHANGES, range(part.ndim)):
            wrong = parts | {key: torch.rand(change(tuple(part.shape), axis))}
            for shape in WEIGHTS:
                with suppress(FormatError, MismatchError):
                    example.code.check({name: tuple(value.shape) for name, value in wrong.items()}, shape)
                    delta = example.code.delta(wrong, shape, torch.rand(shape), **example.settings)
                    assert delta.shape == shape
                    example.code.bias_delta(wrong, shape, torch.rand(shape[:1]), **example.settings)
                    found = example.code.factors(wrong, shape, torch.rand(shape), **example.settings)
                    assert found is None or (len(found[0]), found[1].shape[1]) == (shape[0], prod(shape[1:]))
                    example.code.fit(wrong, shape, 2, **example.settings)
