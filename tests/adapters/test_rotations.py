"""OFT, BOFT and (IA)^3: what multiplies the weight."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sdops.adapters import Settings, family
from sdops.adapters._rotation import rotations
from sdops.errors import FormatError, MismatchError, UsageError
from tests.adapters.examples import relative, tolerance
from tests.adapters.test_lora import random

oft, boft, ia3 = family("oft"), family("boft"), family("ia3")


def skew_of(blocks: Tensor) -> Tensor:
    return blocks - blocks.mT


def cayley_of(skew: Tensor) -> Tensor:
    identity = torch.eye(skew.shape[-1], dtype=skew.dtype)
    return (identity + skew) @ torch.linalg.inv(identity - skew)


@given(n=st.integers(1, 4), b=st.integers(1, 6), seed=st.integers(0, 99))
@settings(deadline=None)
def test_rotations_are_orthogonal(n: int, b: int, seed: int) -> None:
    rotation = rotations({"blocks": random(n, b, b, seed=seed)}, n * b, Settings())
    identity = torch.eye(b, dtype=torch.float64).expand(n, b, b)
    assert relative(rotation @ rotation.mT, identity) < 10 * tolerance(torch.float64, b)
    assert torch.linalg.det(rotation) == pytest.approx(1.0)


@pytest.mark.parametrize("limit", [None, 0.0, 0.01])
def test_zero_blocks_change_nothing(limit: float | None) -> None:
    extra = {} if limit is None else {"constraint": torch.tensor(limit)}
    weight = random(8, 5, 3, 3)
    for code, shape in ((oft, (2, 4, 4)), (boft, (2, 2, 4, 4))):
        assert not code.delta({"blocks": torch.zeros(shape)} | extra, (8, 5, 3, 3), weight).any()
    assert not oft.delta({"vectors": torch.zeros(9, 10)}, (8, 5, 3, 3), weight).any()


def test_oft_rotates_output_channels_back() -> None:
    blocks, weight = random(2, 3, 3), random(6, 5, seed=1)
    rotation = torch.block_diag(*cayley_of(skew_of(blocks)))
    found = oft.delta({"blocks": blocks}, (6, 5), weight)
    assert relative(found, rotation.T @ weight - weight) < tolerance(torch.float64, 12)
    assert relative((weight + found).norm(dim=0), weight.norm(dim=0)) < tolerance(torch.float64, 6)


def test_oft_rescales_afterwards() -> None:
    blocks, rescale, weight = random(2, 3, 3), random(6, 1, 1, 1, seed=2), random(6, 2, 3, 3, seed=1)
    plain = weight + oft.delta({"blocks": blocks}, weight.shape, weight)
    found = weight + oft.delta({"blocks": blocks, "rescale": rescale}, weight.shape, weight)
    assert relative(found, rescale * plain) < tolerance(torch.float64, 6)


@pytest.mark.parametrize("per_channel", [True, False])
def test_the_constraint_shrinks_all_blocks_together(per_channel: bool) -> None:
    blocks, weight = random(2, 3, 3), random(6, 5, seed=1)
    limit = 0.05 * (6 if per_channel else 1)
    skew = skew_of(blocks)
    assert skew.norm() > limit
    rotation = torch.block_diag(*cayley_of(skew * limit / skew.norm()))
    parts = {"blocks": blocks, "constraint": torch.tensor(0.05, dtype=torch.float64)}
    found = oft.delta(parts, (6, 5), weight, constraint_per_channel=per_channel)
    assert relative(found, rotation.T @ weight - weight) < tolerance(torch.float64, 100)
    loose = {"blocks": blocks, "constraint": torch.tensor(1000.0)}
    assert torch.equal(oft.delta(loose, (6, 5), weight), oft.delta({"blocks": blocks}, (6, 5), weight))


def upper(vectors: Tensor, size: int) -> Tensor:
    out = torch.zeros(len(vectors), size, size, dtype=vectors.dtype)
    for block, vector in enumerate(vectors):
        numbers = iter(vector)
        for row in range(size):
            for column in range(row + 1, size):
                out[block, row, column] = next(numbers)
    return skew_of(out)


def series(skew: Tensor, terms: int) -> Tensor:
    powers = [torch.linalg.matrix_power(skew, n) for n in range(terms)]
    return powers[0] + 2 * sum(powers[1:-1]) + powers[-1]


@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("terms", [4, 5, 8])
def test_vectors_rotate_input_channels(terms: int, scaled: bool) -> None:
    vectors, weight = random(2, 6) / 3, random(5, 8, seed=1)
    skew = upper(vectors, 4) / (2 * 3**0.5 if scaled else 1)
    rotation = torch.block_diag(*series(skew, terms))
    parts = {"vectors": vectors} | ({"scaled": torch.tensor(True)} if scaled else {})
    found = oft.delta(parts, (5, 8), weight, neumann_terms=terms)
    assert relative(found, weight @ rotation.T - weight) < tolerance(torch.float64, 8)


def test_a_long_series_is_the_inverse_of_the_exact_transform() -> None:
    vectors, weight = random(2, 6) / 20, random(5, 8, seed=1)
    series_rotation = (weight + oft.delta({"vectors": vectors}, (5, 8), weight, neumann_terms=60)).reshape(5, 2, 4)
    back = oft.delta({"vectors": vectors}, (5, 8), series_rotation.reshape(5, 8), neumann_terms=0)
    assert relative(series_rotation.reshape(5, 8) + back, weight) < 1e-13


def test_convolutions_turn_the_other_way_in_peft() -> None:
    vectors, weight = random(9, 6) / 3, random(5, 4, 3, 3, seed=1)
    rotation = torch.block_diag(*series(upper(vectors, 4), 5))
    flat = weight.flatten(1)
    onetrainer = oft.delta({"vectors": vectors}, weight.shape, weight)
    peft = oft.delta({"vectors": vectors}, weight.shape, weight, rotates_input=True)
    assert relative(onetrainer.flatten(1), flat @ rotation - flat) < tolerance(torch.float64, 8)
    assert relative(peft.flatten(1), flat @ rotation.T - flat) < tolerance(torch.float64, 8)


def test_one_vector_serves_all_blocks() -> None:
    vector, weight = random(1, 6) / 3, random(5, 8, seed=1)
    shared = oft.delta({"vectors": vector}, (5, 8), weight)
    assert torch.equal(shared, oft.delta({"vectors": vector.expand(2, 6)}, (5, 8), weight))
    oft.check({"vectors": (1, 6)}, (5, 8))
    with pytest.raises(MismatchError, match="`vectors`"):
        oft.check({"vectors": (1, 6)}, (5, 7))


@pytest.mark.parametrize(
    ("shapes", "part"),
    [
        ({}, "blocks"),
        ({"blocks": (2, 3, 4)}, "blocks"),
        ({"blocks": (6, 3)}, "blocks"),
        ({"vectors": (2, 7)}, "vectors"),
        ({"vectors": (2, 6), "rescale": (5, 1)}, "rescale"),
        ({"blocks": (2, 3, 3), "scaled": ()}, "scaled"),
        ({"blocks": (2, 3, 3), "rescale": (5, 1)}, "rescale"),
    ],
)
def test_oft_parts_that_cannot_be_are_named(shapes: dict[str, tuple[int, ...]], part: str) -> None:
    with pytest.raises(FormatError, match=f"`{part}`"):
        oft.check(shapes, None)


def test_a_series_of_two_terms_is_refused() -> None:
    with pytest.raises(UsageError, match="`neumann_terms` is 2"):
        oft.delta({"vectors": random(2, 6)}, (5, 8), random(5, 8), neumann_terms=2)


# --- BOFT -----------------------------------------------------------------------------------------------------------


def butterfly_by_loops(blocks: Tensor, weight: Tensor) -> Tensor:
    """Each stage as a dense matrix, made of the pairs that it turns."""
    size = blocks.shape[-1]
    for stage, rotation in enumerate(cayley_of(skew_of(blocks))):
        half = 2**stage * size // 2
        order = [
            run + side * half + position
            for run in range(0, len(weight), 2 * half)
            for position in range(half)
            for side in range(2)
        ]
        turn = torch.zeros(len(weight), len(weight), dtype=weight.dtype)
        dense = torch.block_diag(*rotation)
        for row, source in enumerate(order):
            for column, target in enumerate(order):
                turn[source, target] = dense[row, column]
        assert relative(turn @ turn.T, torch.eye(len(weight))) < 1e-13
        weight = (turn @ weight.flatten(1)).reshape(weight.shape)
    return weight


@pytest.mark.parametrize("form", [(1, 4, 2, 2), (3, 4, 2, 2), (2, 2, 4, 4), (1, 1, 6, 6), (2, 6, 2, 2)], ids=str)
def test_boft_is_a_product_of_butterflies(form: tuple[int, int, int, int]) -> None:
    shape = (form[1] * form[2], 3, 3, 3)
    blocks, weight = random(*form), random(*shape, seed=1)
    boft.check({"blocks": form}, shape)
    found = boft.delta({"blocks": blocks}, shape, weight)
    assert relative(found, butterfly_by_loops(blocks, weight) - weight) < tolerance(torch.float64, 100)


@pytest.mark.parametrize("form", [(2, 4, 3, 3), (3, 2, 4, 4), (2, 4, 4, 2), (4, 4, 4)], ids=str)
def test_boft_blocks_that_cannot_be_are_named(form: tuple[int, ...]) -> None:
    with pytest.raises(FormatError, match="`blocks`"):
        boft.check({"blocks": form}, None)


# --- (IA)^3 ---------------------------------------------------------------------------------------------------------


def test_ia3_multiplies_channels() -> None:
    weight, rows, columns = random(6, 4, 3, 3), random(6, seed=1), random(1, 4, 1, 1, seed=2)
    out = ia3.delta({"weight": rows, "on_input": torch.tensor(0)}, weight.shape, weight)
    into = ia3.delta({"weight": columns, "on_input": torch.tensor([1])}, weight.shape, weight)
    assert torch.equal(out, torch.einsum("oihw,o->oihw", weight, rows))
    assert torch.equal(into, torch.einsum("oihw,i->oihw", weight, columns.flatten()))


def test_ia3_of_a_square_weight_obeys_on_input() -> None:
    weight, vector = random(4, 4), random(4, seed=1)
    out, into = (ia3.delta({"weight": vector, "on_input": torch.tensor(x)}, (4, 4), weight) for x in (0, 1))
    assert torch.equal(out, weight * vector[:, None])
    assert torch.equal(into, weight * vector)


def test_ia3_for_the_other_axis_is_a_mismatch() -> None:
    with pytest.raises(MismatchError, match="`weight`"):
        ia3.delta({"weight": random(4), "on_input": torch.tensor(0)}, (6, 4), random(6, 4))
    with pytest.raises(FormatError, match="`weight`"):
        ia3.check({"weight": (6, 4), "on_input": ()}, (6, 4))


def test_ia3_of_peft_multiplies_by_one_more_and_the_bias_with_the_outputs() -> None:
    weight, bias, rows = random(6, 4), random(6, seed=1), random(6, 1, seed=2)
    assert relative(ia3.delta({"multiplier": rows}, (6, 4), weight), weight * rows - weight) < 1e-15
    moved = ia3.bias_delta({"multiplier": rows}, (6, 4), bias)
    assert moved is not None
    assert relative(moved, bias * rows.flatten() - bias) < 1e-15
    assert ia3.bias_delta({"multiplier": rows}, (6, 4), None) is None  # the layer has none
    assert ia3.bias_delta({"multiplier": random(1, 4)}, (6, 4), bias) is None
    assert ia3.bias_delta({"weight": random(6), "on_input": torch.tensor(0)}, (6, 4), bias) is None


def test_ia3_of_a_convolution_in_peft_needs_the_configuration() -> None:
    weight, vector = random(4, 4, 3, 3), random(1, 4, 1, 1, seed=1)
    with pytest.raises(FormatError, match="inputs or outputs"):
        ia3.delta({"multiplier": vector}, weight.shape, weight)
    out = ia3.delta({"multiplier": vector}, weight.shape, weight, on_input=False)
    assert relative(out, torch.einsum("oihw,o->oihw", weight, vector.flatten() - 1)) < 1e-15
