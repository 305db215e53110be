"""LoRA, its Tucker form, its scale, DoRA, and plain differences, against their definitions."""

from __future__ import annotations

from math import sqrt

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sdops.adapters import family
from sdops.errors import FormatError, MismatchError, UsageError
from tests.adapters.examples import relative, tolerance

lora, full = family("lora"), family("full")
sizes = st.integers(1, 7)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(o=sizes, i=sizes, r=sizes, k=st.integers(1, 3), lora_alpha=st.floats(-9, 9).filter(lambda x: abs(x) > 1e-3))
def test_a_lora_is_a_product(o: int, i: int, r: int, k: int, lora_alpha: float) -> None:
    up, down = random(o, r, 1, 1), random(r, i, k, k, seed=1)
    parts = {"up": up, "down": down, "lora_alpha": torch.tensor(lora_alpha, dtype=torch.float64)}
    facts = lora.check({name: tuple(part.shape) for name, part in parts.items()}, (o, i, k, k))
    wanted = lora_alpha / r * torch.einsum("or,rihw->oihw", up[:, :, 0, 0], down)
    assert (facts.rank, facts.rows, facts.columns) == (r, o, i * k * k)
    assert relative(lora.delta(parts, (o, i, k, k)), wanted) < tolerance(torch.float64, r)


@given(o=sizes, i=sizes, m=sizes, n=sizes, k=st.integers(1, 3))
def test_tucker_is_its_sum(o: int, i: int, m: int, n: int, k: int) -> None:
    up, mid, down = random(o, m, 1, 1), random(m, n, k, 2, seed=1), random(n, i, 1, 1, seed=2)
    shape = (o, i, k, 2)
    parts = {"up": up, "mid": mid, "down": down, "lora_alpha": torch.tensor(3.0)}
    lora.check({name: tuple(part.shape) for name, part in parts.items()}, shape)
    wanted = 3.0 / n * torch.einsum("om,mnhw,ni->oihw", up[:, :, 0, 0], mid, down[:, :, 0, 0])
    assert relative(lora.delta(parts, shape), wanted) < tolerance(torch.float64, m * n)
    factors = lora.factors(parts, shape)
    assert factors is not None
    assert factors[0].shape == (o, m)  # no more than the core's ranks


@pytest.mark.parametrize("stored", [torch.tensor(4), torch.tensor([4.0]).half(), torch.tensor([[4.0]])])
def test_alpha_may_have_any_dtype_and_shape(stored: Tensor) -> None:
    parts = {"up": random(5, 2), "down": random(2, 3, seed=1)}
    assert torch.equal(lora.delta(parts | {"lora_alpha": stored}, (5, 3)), 2 * lora.delta(parts, (5, 3)))


def test_settings_go_before_the_part_and_rslora_takes_the_root() -> None:
    parts = {"up": random(5, 4), "down": random(4, 3, seed=1), "lora_alpha": torch.tensor(100.0)}
    plain = lora.delta({name: parts[name] for name in ("up", "down")}, (5, 3))
    assert relative(lora.delta(parts, (5, 3), lora_alpha=8.0), 2 * plain) < 1e-15
    assert relative(lora.delta(parts, (5, 3), lora_alpha=8.0, use_rslora=True), 8 / sqrt(4) * plain) < 1e-15


def test_the_first_ranks_are_a_lora_of_their_own() -> None:
    parts = {"up": random(5, 4), "down": random(4, 3, seed=1), "lora_alpha": torch.tensor(6.0)}
    first = {"up": parts["up"][:, :2], "down": parts["down"][:2], "lora_alpha": torch.tensor(6.0)}
    assert torch.equal(lora.delta(parts, (5, 3), rank=2), lora.delta(first, (5, 3)))
    for rank in (0, 5):
        with pytest.raises(UsageError, match=f"`rank` {rank}"):
            lora.delta(parts, (5, 3), rank=rank)


def test_the_bias_is_scaled_as_the_weight() -> None:
    parts = {"up": random(5, 4), "down": random(4, 3), "up_bias": random(5), "lora_alpha": torch.tensor(2.0)}
    found = lora.bias_delta(parts, (5, 3))
    assert found is not None
    assert torch.equal(found, parts["up_bias"] / 2)


@pytest.mark.parametrize(
    ("shapes", "part"),
    [
        ({"up": (6, 0), "down": (0, 8)}, "up"),
        ({"up": (6,), "down": (3, 8)}, "up"),
        ({"up": (6, 3), "down": (3,)}, "down"),
        ({"up": (6, 4), "down": (3, 8)}, "up"),
        ({"up": (6, 3, 3, 3), "down": (3, 8)}, "up"),
        ({"up": (6, 3), "down": (3, 8), "lora_alpha": (2,)}, "lora_alpha"),
        ({"up": (6, 3), "down": (3, 8), "up_bias": (5,)}, "up_bias"),
        ({"up": (6, 3), "down": (3, 8), "dora_scale": (6, 8)}, "dora_scale"),
        ({"up": (6, 3), "down": (3, 8), "dora_scale": (8, 1)}, "dora_scale"),
        ({"up": (6, 3), "down": (3, 8), "magnitude": (8,)}, "magnitude"),
        ({"up": (6, 3), "down": (3, 8), "magnitude": (6,), "dora_scale": (6, 1)}, "magnitude"),
        ({"up": (6, 3), "down": (3, 8), "mid": (3, 3)}, "mid"),
    ],
)
def test_parts_that_cannot_be_are_named(shapes: dict[str, tuple[int, ...]], part: str) -> None:
    with pytest.raises(FormatError, match=f"`{part}`") as caught:
        lora.check(shapes, (6, 8))
    assert caught.value.data["part"] == part


def test_a_kernel_of_another_form_is_a_mismatch() -> None:
    with pytest.raises(MismatchError, match="`down`"):
        lora.check({"up": (6, 3), "down": (3, 8, 1, 9)}, (6, 8, 3, 3))
    with pytest.raises(MismatchError, match="`dora_scale`"):
        lora.check({"up": (6, 3), "down": (3, 8), "dora_scale": (1, 7)}, (6, 8))


# --- DoRA -----------------------------------------------------------------------------------------------------------


def dora_by_loops(weight: Tensor, change: Tensor, magnitude: Tensor, axis: int) -> Tensor:
    directed = weight + change
    out = torch.empty_like(directed)
    for index in range(weight.shape[axis]):
        vector = directed.select(axis, index)
        out.select(axis, index).copy_(magnitude.flatten()[index] * vector / vector.square().sum().sqrt())
    return out - weight


@pytest.mark.parametrize("kernel", [(), (1, 1), (3, 3)], ids=str)
@pytest.mark.parametrize(
    ("part", "form", "axis"),
    [
        ("dora_scale", "column", 0),
        ("dora_scale", "vector", 0),
        ("dora_scale", "row", 1),
        ("magnitude", "vector", 0),
        ("magnitude", "row", 0),  # PEFT's (1, o, 1, 1) is per output
    ],
)
def test_dora_is_its_formula(kernel: tuple[int, ...], part: str, form: str, axis: int) -> None:
    shape = (5, 4, *kernel)
    count = shape[axis]
    form_of = {"column": (count, *[1] * (len(shape) - 1)), "vector": (count,), "row": (1, count, *[1] * len(kernel))}
    parts = {"up": random(5, 2), "down": random(2, 4, *kernel, seed=1), "lora_alpha": torch.tensor(1.0)}
    magnitude, weight = random(*form_of[form], seed=2).abs(), random(*shape, seed=3)
    lora.check({name: tuple(x.shape) for name, x in (parts | {part: magnitude}).items()}, shape)
    found = lora.delta(parts | {part: magnitude}, shape, weight)
    wanted = dora_by_loops(weight, lora.delta(parts, shape), magnitude, axis)
    assert relative(found, wanted) < tolerance(torch.float64, weight.numel())


@pytest.mark.parametrize(
    ("shape", "form", "axis"),
    [((1, 4), (1, 4), 1), ((1, 4), (1, 1), 0), ((4, 1), (1, 1), 1), ((4, 1), (4, 1), 0)],
    ids=str,
)
def test_dora_of_one_output_or_one_input(shape: tuple[int, int], form: tuple[int, int], axis: int) -> None:
    parts = {"up": random(shape[0], 1), "down": random(1, shape[1]), "dora_scale": random(*form).abs()}
    lora.check({name: tuple(x.shape) for name, x in parts.items()}, shape)
    weight = random(*shape, seed=3)
    wanted = dora_by_loops(weight, parts["up"] @ parts["down"], parts["dora_scale"], axis)
    assert relative(lora.delta(parts, shape, weight), wanted) < 1e-14


def test_dora_as_trained_from_the_start_changes_nothing() -> None:
    weight = random(5, 4, 3, 3)
    norm = weight.flatten(1).norm(dim=1)
    parts = {"up": torch.zeros(5, 2, dtype=torch.float64), "down": random(2, 36), "magnitude": norm}
    assert lora.delta(parts, (5, 4, 3, 3), weight).abs().max() < 1e-14


def test_pefts_strength_scales_before_the_norm() -> None:
    parts = {"up": random(5, 2), "down": random(2, 4, seed=1), "magnitude": random(5, seed=2).abs()}
    weight = random(5, 4, seed=3)
    half = {"up": parts["up"] / 2, "down": parts["down"], "magnitude": parts["magnitude"]}
    assert torch.equal(lora.delta(parts, (5, 4), weight, strength=0.5), lora.delta(half, (5, 4), weight))
    plain = {"up": parts["up"], "down": parts["down"]}
    assert relative(lora.delta(plain, (5, 4), strength=0.5), lora.delta(plain, (5, 4)) / 2) < 1e-15


# --- plain differences ----------------------------------------------------------------------------------------------


def test_set_replaces_and_diff_adds() -> None:
    weight, bias, new = random(5, 4), random(5, seed=1), random(5, 6, seed=2)
    delta = full.delta({"set": new}, (5, 6), weight)
    assert torch.equal(delta[:, :4], new[:, :4] - weight)
    assert torch.equal(delta[:, 4:], new[:, 4:])  # the base had no such columns
    assert torch.equal(full.delta({"diff": new}, (5, 6)), new)
    assert full.bias_delta({"diff": new}, (5, 6), bias) is None
    found = full.bias_delta({"set_b": new[:, 0]}, (5, 6), bias)
    assert found is not None
    assert torch.equal(found, new[:, 0] - bias)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({}, "`diff` is missing"),
        ({"reshape": (2,)}, "`diff` is missing"),
        ({"diff": (5, 4), "set": (5, 4)}, "`set`"),
        ({"diff_b": (5,), "set_b": (5,)}, "`set_b`"),
    ],
)
def test_full_parts_that_cannot_be(shapes: dict[str, tuple[int, ...]], message: str) -> None:
    with pytest.raises(FormatError, match=message):
        full.check(shapes, (5, 4))


# --- what LyCORIS' extraction may keep beside the factors -----------------------------------------------------------


def test_sparse_numbers_are_added_before_the_scale() -> None:
    parts = {"up": random(5, 2), "down": random(2, 3, seed=1), "lora_alpha": torch.tensor(4.0)}
    sparse = {
        "sparse_indices": torch.tensor([[0, 4], [2, 1]], dtype=torch.int16),
        "sparse_values": torch.tensor([0.5, -3.0], dtype=torch.float64),
        "sparse_size": torch.tensor([5, 3], dtype=torch.int16),
    }
    more = lora.delta(parts | sparse, (5, 3)) - lora.delta(parts, (5, 3))
    wanted = torch.zeros(5, 3, dtype=torch.float64)
    wanted[0, 2], wanted[4, 1] = 1.0, -6.0
    assert relative(more, wanted) < 1e-14


def test_sparse_indices_above_int16_have_wrapped_around() -> None:
    parts = {"up": random(1, 1), "down": random(1, 40_000, seed=1)}
    sparse = {
        "sparse_indices": torch.tensor([[0], [39_999 - 65_536]], dtype=torch.int16),
        "sparse_values": torch.tensor([1.0], dtype=torch.float64),
        "sparse_size": torch.tensor([1, 40_000 - 65_536], dtype=torch.int16),
    }
    more = lora.delta(parts | sparse, (1, 40_000)) - lora.delta(parts, (1, 40_000))
    assert float(more[0, 39_999]) == pytest.approx(1.0)
    assert int((more != 0).sum()) == 1


@pytest.mark.parametrize("size", [[5, 4], [4, 3]])
def test_sparse_numbers_for_another_matrix_are_refused(size: list[int]) -> None:
    sparse = {
        "sparse_indices": torch.tensor([[0], [2]]),
        "sparse_values": torch.tensor([1.0]),
        "sparse_size": torch.tensor(size),
    }
    with pytest.raises(FormatError, match="`sparse_size`"):
        lora.delta({"up": random(5, 2), "down": random(2, 3)} | sparse, (5, 3))
