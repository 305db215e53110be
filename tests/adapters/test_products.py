"""LoHa, LoKr and GLoRA against their definitions, element by element."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sdops.adapters import family
from sdops.errors import FormatError
from tests.adapters.examples import relative, tolerance
from tests.adapters.test_lora import random

loha, lokr, glora = family("loha"), family("lokr"), family("glora")
sizes = st.integers(1, 4)


def kron_by_loops(w1: Tensor, w2: Tensor) -> Tensor:
    (a, c), (b, d) = w1.shape, w2.shape
    out = torch.empty(a * b, c * d, dtype=w1.dtype)
    for p, q, r, s in product(range(a), range(b), range(c), range(d)):
        out[p * b + q, r * d + s] = w1[p, r] * w2[q, s]
    return out


@given(o=sizes, i=sizes, r=sizes, k=sizes)
def test_loha_is_a_product_of_elements(o: int, i: int, r: int, k: int) -> None:
    parts = {"w1_a": random(o, r), "w1_b": random(r, i * k), "w2_a": random(o, r, seed=1), "w2_b": random(r, i * k)}
    wanted = torch.zeros(o, i * k, dtype=torch.float64)
    for row, column in product(range(o), range(i * k)):
        first = sum(parts["w1_a"][row, n] * parts["w1_b"][n, column] for n in range(r))
        second = sum(parts["w2_a"][row, n] * parts["w2_b"][n, column] for n in range(r))
        wanted[row, column] = 0.5 / r * first * second
    found = loha.delta(parts | {"lora_alpha": torch.tensor(0.5)}, (o, i, k))
    assert relative(found, wanted.reshape(o, i, k)) < tolerance(torch.float64, r * r)


def test_tucker_loha_is_its_sum() -> None:
    parts = {"t1": random(2, 2, 3, 3), "w1_a": random(2, 5), "w1_b": random(2, 4, seed=1)}
    parts |= {"t2": random(2, 2, 3, 3, seed=2), "w2_a": random(2, 5, seed=3), "w2_b": random(2, 4, seed=4)}
    first, second = (
        torch.einsum("mnhw,mo,ni->oihw", parts[f"t{side}"], parts[f"w{side}_a"], parts[f"w{side}_b"]) for side in "12"
    )
    assert relative(loha.delta(parts, (5, 4, 3, 3)), first * second) < tolerance(torch.float64, 16)
    factors = loha.factors(parts, (5, 4, 3, 3))
    assert factors is not None
    assert factors[0].shape == (5, 4)


def test_loha_needs_both_cores() -> None:
    shapes = {"w1_a": (2, 6), "w1_b": (2, 4), "w2_a": (2, 6), "w2_b": (2, 4), "t1": (2, 2, 3, 3)}
    with pytest.raises(FormatError, match="`t2` is missing"):
        loha.check(shapes, (6, 4, 3, 3))


@given(a=sizes, b=sizes, c=sizes, d=sizes, k=st.integers(1, 2))
@settings(deadline=None)
def test_lokr_is_a_kronecker_product(a: int, b: int, c: int, d: int, k: int) -> None:
    w1, w2 = random(a, c), random(b, d, k, k, seed=1)
    wanted = torch.stack([kron_by_loops(w1, w2[:, :, y, x]) for y in range(k) for x in range(k)], dim=2)
    shape = (a * b, c * d, k, k)
    assert relative(lokr.delta({"w1": w1, "w2": w2}, shape), wanted.reshape(shape)) < 1e-15


def test_early_lokr_divides_the_flattened_matrix() -> None:
    w1, up, down = random(16, 20), random(20, 4, seed=1), random(4, 144, seed=2)
    shape = (320, 320, 3, 3)
    parts = {"w1": w1, "w2_a": up, "w2_b": down, "lora_alpha": torch.tensor(4.0)}
    lokr.check({name: tuple(part.shape) for name, part in parts.items()}, shape)
    assert relative(lokr.delta(parts, shape), torch.kron(w1, up @ down).reshape(shape)) < 1e-15


def test_lokr_scales_only_what_is_factored() -> None:
    w1, w2, alpha = random(2, 3), random(4, 5, seed=1), {"lora_alpha": torch.tensor(6.0)}
    whole = lokr.delta({"w1": w1, "w2": w2}, (8, 15))
    assert torch.equal(lokr.delta({"w1": w1, "w2": w2} | alpha, (8, 15)), whole)
    assert relative(lokr.delta({"w1": w1, "w2": w2} | alpha, (8, 15), rank=3), 2 * whole) < 1e-15
    factored = {"w1_a": random(2, 2), "w1_b": random(2, 3, seed=1), "w2": w2}
    wanted = 3 * torch.kron(factored["w1_a"] @ factored["w1_b"], w2)
    assert relative(lokr.delta(factored | alpha, (8, 15)), wanted) < tolerance(torch.float64, 2)


@given(rank=st.integers(1, 30), factored=st.booleans())
@settings(deadline=None)
def test_lokr_fit_is_the_best_lora_of_a_rank(rank: int, factored: bool) -> None:
    second = {"w2_a": random(6, 2, seed=1), "w2_b": random(2, 14, seed=2)} if factored else {"w2": random(6, 7, 2)}
    parts = {"w1": random(3, 4), **second, "lora_alpha": torch.tensor(3.0)}
    shape = (18, 28, 2)
    dense = lokr.delta(parts, shape).flatten(1)
    fitted = lokr.fit(parts, shape, rank)
    assert fitted is not None
    up, down, captured = fitted
    spectrum = torch.linalg.svdvals(dense)
    tail = float(spectrum[rank:].square().sum())
    assert len(down) == min(rank, 3 * 6)
    assert float((dense - up @ down).square().sum()) == pytest.approx(tail, rel=1e-9, abs=1e-20)
    assert captured == pytest.approx(1 - tail / float(spectrum.square().sum()), abs=1e-12)
    assert (up.norm(dim=0) - down.norm(dim=1)).abs().max() < 1e-12  # balanced


def test_lokr_fit_with_the_size_of_real_layers() -> None:
    parts = {"w1": random(16, 16).float(), "w2": random(20, 20, 3, 3, seed=1).float()}
    fitted = lokr.fit(parts, (320, 320, 3, 3), 32)
    assert fitted is not None
    up, down, captured = fitted
    assert up.dtype == torch.float32
    dense = lokr.delta(parts, (320, 320, 3, 3)).flatten(1)
    error = relative(up @ down, dense)
    assert error == pytest.approx((1 - captured) ** 0.5, rel=1e-5)


@pytest.mark.parametrize(
    ("shapes", "part"),
    [
        ({"w2": (3, 4)}, "w1"),
        ({"w1": (2, 2)}, "w2"),
        ({"w1": (2, 2), "w2_a": (3, 2)}, "w2_b"),
        ({"w1": (2, 2), "w1_a": (2, 1), "w2": (3, 4)}, "w1"),
        ({"w1": (2, 2), "w2_a": (3, 2), "w2_b": (3, 4)}, "w2_a"),
        ({"w1": (4,), "w2": (3, 4)}, "w1"),
        ({"w1": (2, 2), "w2_a": (2, 3), "w2_b": (2, 4), "t2": (2, 3, 3, 3)}, "t2"),
    ],
)
def test_lokr_parts_that_cannot_be_are_named(shapes: dict[str, tuple[int, ...]], part: str) -> None:
    with pytest.raises(FormatError, match=f"`{part}`"):
        lokr.check(shapes, None)


# --- GLoRA ----------------------------------------------------------------------------------------------------------


@given(o=sizes, i=sizes, r=sizes)
def test_glora_is_its_formula_in_both_orientations(o: int, i: int, r: int) -> None:
    a1, a2, b1, b2 = random(i, r), random(r, i, seed=1), random(o, r, seed=2), random(r, i, seed=3)
    weight, alpha = random(o, i, seed=4), {"lora_alpha": torch.tensor(3.0)}
    wanted = 3 / r * (weight @ a1 @ a2 + b1 @ b2)
    new = {"a1": a1, "a2": a2, "b1": b1, "b2": b2}
    assert relative(glora.delta(new | alpha, (o, i), weight), wanted) < tolerance(torch.float64, i * r)
    if o != r or i != r:  # there, the two cannot be told apart
        old = {"a1": a2, "a2": a1, "b1": b2, "b2": b1}  # W a2 a1 + b2 b1
        shapes = {name: tuple(part.shape) for name, part in old.items()}
        assert glora.check(shapes, (o, i)).rank == r
        if r < min(o, i):
            assert glora.check(shapes, None).rank == r
        assert torch.equal(glora.delta(old | alpha, (o, i), weight), glora.delta(new | alpha, (o, i), weight))


def test_glora_of_a_convolution_acts_on_input_channels() -> None:
    a1, a2 = random(4, 2, 1, 1), random(2, 4, 1, 1, seed=1)
    b1, b2 = random(5, 2, 1, 1, seed=2), random(2, 4, 3, 3, seed=3)
    weight = random(5, 4, 3, 3, seed=4)
    wanted = torch.zeros_like(weight)
    for y, x in product(range(3), range(3)):
        wanted[:, :, y, x] = weight[:, :, y, x] @ a1[:, :, 0, 0] @ a2[:, :, 0, 0] + b1[:, :, 0, 0] @ b2[:, :, y, x]
    parts = {"a1": a1, "a2": a2, "b1": b1, "b2": b2}
    assert relative(glora.delta(parts, (5, 4, 3, 3), weight), wanted) < tolerance(torch.float64, 8)
    factors = glora.factors(parts, (5, 4, 3, 3), weight)
    assert factors is not None
    assert factors[0].shape == (5, 2 * (9 + 1))
