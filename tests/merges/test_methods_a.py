"""Linear, difference, similarity and selection methods: laws, and references written again in numpy float64.

Also here: what other tools get wrong in these methods (double counting of weights, zero weights, NaN of real powers,
half-precision arithmetic, unseeded noise).
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from torch import Tensor

from sdops.card import find
from sdops.core.linear import coefficients
from sdops.core.noise import Noise
from sdops.errors import UsageError
from sdops.merges import _similarity, adjust, cosine_a, cosine_b
from sdops.merges.linear import linear
from sdops.merges.task_arithmetic import task_arithmetic
from sdops.merges.weighted_subtraction import weighted_subtraction
from sdops.merges.weighted_sum import weighted_sum
from tests.merges.whole import load, merge

Array = NDArray[np.float64]

WEIGHTS = st.floats(-4, 4, width=32, allow_subnormal=True)
ALPHAS = st.floats(0, 1, width=32)


def tensors(number: int) -> st.SearchStrategy[list[Tensor]]:
    """That many float32 vectors of one length, zeros, equal elements and subnormals included."""
    arrays = hnp.arrays(np.float32, st.integers(1, 8).map(lambda n: (number, n)), elements=WEIGHTS)
    return arrays.map(lambda array: list(torch.from_numpy(array.copy())))


def fine_tunes(number: int, shape: tuple[int, ...] = (6, 5), seed: int = 0, spread: float = 0.3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(shape, generator=generator)
    return [base + spread * torch.randn(shape, generator=generator) for _ in range(number)]


def check(result: Tensor, expected: Array, inputs: list[Tensor], ulps: float = 16) -> None:
    """Within some float32 ulps of the largest input or result."""
    size = max(1e-30, *(float(x.abs().max()) for x in inputs), float(np.abs(expected).max()))
    assert np.abs(result.double().numpy() - expected).max() <= ulps * 2.0**-24 * size


# --- references -----------------------------------------------------------------------------------------------------


def over(numerator: Array, denominator: Array, where_zero: float) -> Array:
    return np.divide(numerator, denominator, out=np.full_like(numerator, where_zero), where=denominator != 0)


def ref_similarity(a: Array, b: Array, c: Array, alpha: float, beta: float) -> Array:
    s = np.where(np.maximum(abs(a), abs(b)) == 0, beta, 0.0)
    t = np.maximum(abs(a), abs(b)) ** 2
    s = np.where(t > 0, beta * (over(a * b, t, 0.0) + 1) / 2, s)
    return (1 - s) * (a + alpha * (b - c)) + s * ((1 - alpha / 2) * a + alpha / 2 * b)


def ref_euclidean(a: Array, b: Array, c: Array, alpha: float) -> Array:
    u = (a - c) / np.linalg.norm(a - c)
    v = (b - c) / np.linalg.norm(b - c)
    lerp = (1 - alpha) * a + alpha * b - c
    d = np.copysign(np.sqrt((1 - alpha) * u**2 + alpha * v**2), lerp)
    return c + d / np.linalg.norm(d) * np.linalg.norm(lerp)


def ref_geometric(a: Array, b: Array, alpha: float) -> Array:
    return (a.astype(complex) ** (1 - alpha) * b.astype(complex) ** alpha).real


def ref_quotient(a: Array, b: Array, c: Array, alpha: float) -> Array:
    return (a * (b / c).astype(complex) ** alpha).real


def ref_multiply(a: Array, b: Array, c: Array, alpha: float, beta: float) -> Array:
    size = abs(a - c) ** (1 - alpha) * abs(b - c) ** alpha
    return c + np.copysign(size, (1 - beta) * a + beta * b - c)


def ref_ram(base: Array, *models: Array, epsilon: float, boost: Callable[[int, int], float] = lambda *_: 1.0) -> Array:
    result = base.copy()
    flat = [m.reshape(-1) - base.reshape(-1) for m in models]
    alone, shared = [0] * len(models), [0] * len(models)
    touching = [[i for i, d in enumerate(flat) if abs(d[e]) > epsilon] for e in range(base.size)]
    for who in touching:
        for i in who:
            (alone if len(who) == 1 else shared)[i] += 1
    for element, who in enumerate(touching):
        if len(who) == 1:
            result.flat[element] += flat[who[0]][element] * boost(alone[who[0]], shared[who[0]])
        elif who:
            result.flat[element] += sum(flat[i][element] for i in who) / len(who)
    return result


def ref_magmax(base: Array, *models: Array, scale: float) -> Array:
    result = base.copy()
    for element in np.ndindex(base.shape):
        deltas = [m[element] - base[element] for m in models]
        best = max(range(len(deltas)), key=lambda i: (abs(deltas[i]), i))
        result[element] += scale * deltas[best]
    return result


def ref_extract(a: Array, b: Array, c: Array, alpha: float, beta: float, gamma: float) -> Array:
    result = a.copy()
    for row in np.ndindex(a.shape[:-1]):
        x, y = b[row] - a[row], c[row] - a[row]
        d = ((x @ y / np.sqrt((x @ x) * (y @ y)) + 1) / 2) ** gamma
        result[row] += ((1 - alpha) * x + alpha * y) * ((1 - beta) * d + beta * (1 - d))
    return result


# Method, number of tensors, knobs, the same formula in float64.
REFERENCES: list[tuple[str, int, dict[str, object], Callable[..., Array]]] = [
    ("weighted_sum", 2, {"alpha": 0.3}, lambda a, b: (1 - 0.3) * a + 0.3 * b),
    ("weighted_sum", 2, {"alpha": -0.7}, lambda a, b: 1.7 * a - 0.7 * b),
    ("average", 3, {}, lambda a, b, c: (a + b + c) / 3),
    ("linear", 3, {"weights": (2.0, 1.0, 1.0)}, lambda a, b, c: (2 * a + b + c) / 4),
    ("linear", 3, {"weights": (0.0, 1.0, 3.0)}, lambda *x: (x[1] + 3 * x[2]) / 4),
    ("linear", 3, {"weights": (2.0, -1.0, 0.5), "normalize": False}, lambda a, b, c: 2 * a - b + c / 2),
    ("linear", 3, {"normalize": False}, lambda a, b, c: a + b + c),
    ("add_difference", 3, {"alpha": 0.8}, lambda a, b, c: a + 0.8 * (b - c)),
    ("sum_twice", 3, {"alpha": 0.2, "beta": 0.7}, lambda a, b, c: 0.3 * (0.8 * a + 0.2 * b) + 0.7 * c),
    ("triple_sum", 3, {"alpha": 0.2, "beta": 0.7}, lambda a, b, c: 0.1 * a + 0.2 * b + 0.7 * c),
    ("weighted_subtraction", 2, {"alpha": 0.4, "beta": 0.5}, lambda a, b: (a - 0.2 * b) / 0.8),
    (
        "task_arithmetic",
        3,
        {"weights": (0.5, -1.0), "scale": 2.0},
        lambda base, x, y: base + 2 * (0.5 * (x - base) - (y - base)),
    ),
    (
        "task_arithmetic",
        3,
        {"weights": (1.0, 3.0), "normalize": True},
        lambda base, x, y: base + ((x - base) + 3 * (y - base)) / 4,
    ),
    ("scale", 1, {"alpha": 0.9}, lambda a: 0.9 * a),
    (
        "train_difference",
        3,
        {"alpha": 0.7},
        lambda a, b, c: a + 1.8 * 0.7 * over(abs(b - a), abs(b - c) + abs(b - a), 0.0) * (b - c),
    ),
    (
        "add_opposite",
        3,
        {"alpha": 0.7},
        lambda a, b, c: a + 2 * 0.7 * over(abs(a - b), abs(a - b) + abs(a + b - 2 * c), 0.0) * (b - c),
    ),
    (
        "add_strict_opposite",
        3,
        {"alpha": 0.7},
        lambda a, b, c: (
            a + 2 * 0.7 * over(np.maximum(0, (c - a) * (b - c)), np.maximum(abs(a - c), abs(b - c)) ** 2, 0.0) * (b - c)
        ),
    ),
    ("multiply_difference", 3, {"alpha": 0.3, "beta": 0.9}, lambda a, b, c: ref_multiply(a, b, c, 0.3, 0.9)),
    ("similarity_add_difference", 3, {"alpha": 0.7, "beta": 0.6}, lambda *x: ref_similarity(*x, 0.7, 0.6)),
    ("euclidean_add_difference", 3, {"alpha": 0.3}, lambda *x: ref_euclidean(*x, 0.3)),
    ("geometric_sum", 2, {"alpha": 0.3}, lambda a, b: ref_geometric(a, b, 0.3)),
    ("multiply_quotient", 3, {"alpha": 0.4}, lambda *x: ref_quotient(*x, 0.4)),
    (
        "nearswap",
        2,
        {"t": 0.1},
        lambda a, b: a + np.clip(0.1 / np.maximum(abs(a - b), 1e-6), 0, 1) * (b - a),
    ),
    ("ram", 4, {"epsilon": 0.3}, lambda *x: ref_ram(*x, epsilon=0.3)),
    (
        "ram_plus_tl",
        4,
        {"epsilon": 0.5, "r": 0.4, "alpha": 2.0},
        lambda *x: ref_ram(*x, epsilon=0.5, boost=lambda u, s: 1 + 0.4 * min(max(s / max(u, 0.5), 0), 2.0)),
    ),
    ("magmax", 4, {"scale": 0.8}, lambda *x: ref_magmax(*x, scale=0.8)),
    (
        "clamp",
        4,
        {},
        lambda a, *bounds: np.clip(a, np.min(bounds, axis=0), np.max(bounds, axis=0)),
    ),
    ("extract_similar", 3, {"alpha": 0.3, "gamma": 2.0}, lambda *x: ref_extract(*x, 0.3, 0.0, 2.0)),
    ("extract_dissimilar", 3, {"alpha": 0.3, "gamma": 2.0}, lambda *x: ref_extract(*x, 0.3, 1.0, 2.0)),
]


@pytest.mark.parametrize("shape", [(6, 5), (4, 3, 3, 3)], ids=str)
@pytest.mark.parametrize(
    ("name", "number", "knobs", "reference"), REFERENCES, ids=lambda v: v if type(v) is str else ""
)
def test_against_float64(
    name: str, number: int, knobs: dict[str, object], reference: Callable[..., Array], shape: tuple[int, ...]
) -> None:
    for seed in range(5):
        inputs = fine_tunes(number, shape, seed, spread=0.5)
        expected = reference(*(x.double().numpy() for x in inputs))
        check(merge(find(name), inputs, knobs), expected, inputs)


# --- laws -----------------------------------------------------------------------------------------------------------

FROM_A = ["weighted_sum", "add_difference", "sum_twice", "triple_sum", "weighted_subtraction", "train_difference",
          "add_opposite", "add_strict_opposite", "similarity_add_difference", "geometric_sum", "multiply_quotient",
          "plus_random"]  # fmt: skip
TO_B = ["weighted_sum", "geometric_sum", "cosine_a", "cosine_b"]


@pytest.mark.parametrize("name", FROM_A)
@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_alpha_zero_is_a_bit_for_bit(name: str, data: st.DataObject) -> None:
    card = find(name)
    inputs = data.draw(tensors(len(card.inputs)))
    knobs = {"alpha": 0.0} | ({"beta": 0.0} if name in ("sum_twice", "triple_sum") else {})
    assert torch.equal(merge(card, inputs, knobs), inputs[0])


@pytest.mark.parametrize("name", TO_B)
@given(inputs=tensors(2))
@settings(max_examples=40, deadline=None)
def test_alpha_one_is_b(name: str, inputs: list[Tensor]) -> None:
    check(merge(find(name), inputs, {"alpha": 1.0}), inputs[1].double().numpy(), inputs, ulps=4)


@given(inputs=tensors(2), alpha=ALPHAS)
@settings(max_examples=100, deadline=None)
def test_weighted_sum_is_symmetric(inputs: list[Tensor], alpha: float) -> None:
    a, b = inputs
    check(weighted_sum(a, b, alpha=alpha), weighted_sum(b, a, alpha=1 - alpha).double().numpy(), inputs)


@given(inputs=tensors(2), alpha=st.floats(-1, 0.9))
@settings(max_examples=100, deadline=None)
def test_weighted_subtraction_undoes_weighted_sum(inputs: list[Tensor], alpha: float) -> None:
    a, b = inputs
    merged = weighted_sum(a, b, alpha=alpha)
    check(weighted_subtraction(merged, b, alpha=alpha), a.double().numpy(), inputs, ulps=8 / (1 - alpha) + 8)


# 1 - alpha is exact; 0^0 = 1 makes the ends special.
@given(inputs=tensors(2), alpha=st.integers(1, 15).map(lambda sixteenths: sixteenths / 16))
@settings(max_examples=50, deadline=None)
def test_geometric_sum_is_symmetric(inputs: list[Tensor], alpha: float) -> None:
    card = find("geometric_sum")
    swapped = merge(card, inputs[::-1], {"alpha": 1 - alpha})
    check(merge(card, inputs, {"alpha": alpha}), swapped.double().numpy(), inputs, ulps=64)


@pytest.mark.parametrize(("name", "fixed"), [("average", 0), ("task_arithmetic", 1), ("ram", 1), ("ram_plus_tl", 1),
                                             ("clamp", 1), ("linear", 0)])  # fmt: skip
@given(inputs=tensors(4), order=st.permutations(range(3)))
@settings(max_examples=40, deadline=None)
def test_the_order_of_the_models_does_not_matter(name: str, fixed: int, inputs: list[Tensor], order: list[int]) -> None:
    head, models = inputs[:fixed], inputs[fixed : fixed + 3]
    expected = merge(find(name), [*head, *models]).double().numpy()
    check(merge(find(name), [*head, *(models[i] for i in order)]), expected, inputs)


@given(inputs=tensors(3), alpha=ALPHAS, beta=ALPHAS)
@settings(max_examples=50, deadline=None)
def test_the_linear_family_agrees_with_itself(inputs: list[Tensor], alpha: float, beta: float) -> None:
    a, b, c = inputs
    knobs = {"alpha": alpha, "beta": beta}
    twice = weighted_sum(weighted_sum(a, b, alpha=alpha), c, alpha=beta)
    assert torch.equal(merge(find("sum_twice"), inputs, knobs), twice)
    weights = (1 - alpha - beta, alpha, beta)
    check(merge(find("triple_sum"), inputs, knobs), linear(a, b, c, weights=weights).double().numpy(), inputs)
    added = merge(find("add_difference"), inputs, {"alpha": alpha})
    check(added, task_arithmetic(a, b, c, weights=(alpha, -alpha)).double().numpy(), inputs)
    assert torch.equal(linear(a, b, c), merge(find("average"), inputs))


@given(inputs=tensors(3), alpha=st.floats(0, 2, width=32))
@settings(max_examples=50, deadline=None)
def test_masked_differences_add_at_most_their_factor(inputs: list[Tensor], alpha: float) -> None:
    a, b, c = inputs
    for name, factor in [("train_difference", 1.8), ("add_opposite", 2), ("add_strict_opposite", 2)]:
        change = (merge(find(name), inputs, {"alpha": alpha}) - a).double()
        allowed = factor * alpha * (b - c).abs().double()
        assert (change.abs() <= allowed + 1e-6 * (a.abs() + allowed) + 1e-30).all()


def test_opposite_masks_at_known_points() -> None:
    base = torch.zeros(4)
    a, b = torch.tensor([1.0, -1.0, 0.0, 2.0]), torch.tensor([1.0, 1.0, 1.0, -1.0])
    opposite = merge(find("add_opposite"), [a, b, base])
    strict = merge(find("add_strict_opposite"), [a, b, base])
    assert opposite.tolist() == pytest.approx([1, -1 + 2, 0 + 1, 2 - 1.5])
    assert strict.tolist() == pytest.approx([1, -1 + 2, 0, 2 - 1])


def test_tiny_weights_do_not_vanish_when_squared() -> None:
    a, b, c = torch.tensor([-1e-30]), torch.tensor([1e-30]), torch.tensor([0.0])
    assert merge(find("add_strict_opposite"), [a, b, c]).item() == pytest.approx(1e-30)
    assert merge(find("similarity_add_difference"), [a, -b, c]).item() == pytest.approx(-1e-30)


def test_euclidean_keeps_the_norm_of_the_average() -> None:
    a, b, c = fine_tunes(3, (40, 30))
    result = merge(find("euclidean_add_difference"), [a, b, c], {"alpha": 0.3})
    average = weighted_sum(a, b, alpha=0.3)
    assert (result - c).norm().item() == pytest.approx((average - c).norm().item(), rel=1e-5)
    assert torch.equal((result - c).sign(), (average - c).sign())


def test_euclidean_without_a_change_is_the_average() -> None:
    a, b = fine_tunes(2)
    for inputs in ([a, b, a], [b, a, a]):
        result = merge(find("euclidean_add_difference"), inputs, {"alpha": 0.25})
        check(result, weighted_sum(*inputs[:2], alpha=0.25).double().numpy(), inputs)


@pytest.mark.parametrize("name", ["geometric_sum", "multiply_difference", "euclidean_add_difference"])
@pytest.mark.parametrize("alpha", [-0.1, 1.5, float("nan")])
def test_powers_want_alpha_between_0_and_1(name: str, alpha: float) -> None:
    card = find(name)
    with pytest.raises(UsageError, match="`alpha` is") as caught:
        merge(card, fine_tunes(len(card.inputs)), {"alpha": alpha})
    assert "between 0 and 1" in str(caught.value.hint)


def test_multiply_quotient_without_a_quotient_is_a() -> None:
    a, b, c = (
        torch.tensor([3.0, 3.0, 0.0, 3.0]),
        torch.tensor([1.0, 0.0, 1.0, 1e30]),
        torch.tensor([0.0, 0.0, 0.0, 1e-30]),
    )
    assert torch.equal(merge(find("multiply_quotient"), [a, b, c]), a)


def test_nearswap_swaps_what_is_near() -> None:
    a, b = torch.tensor([1.0, 1.0, 1.0]), torch.tensor([1.05, 2.0, 1.0])
    result = merge(find("nearswap"), [a, b], {"t": 0.1})
    assert result[0] == b[0]
    assert result.tolist() == pytest.approx([1.05, 1.1, 1.0])


def test_magmax_later_wins_on_equal_sizes() -> None:
    base = torch.zeros(2)
    x, y = torch.tensor([1.0, -2.0]), torch.tensor([-1.0, 2.0])
    assert torch.equal(merge(find("magmax"), [base, x, y], {"scale": 1.0}), y)
    assert torch.equal(merge(find("magmax"), [base, y, x], {"scale": 1.0}), x)


def test_ram_keeps_the_size_of_a_single_change() -> None:
    base = torch.zeros(3)
    x, y = torch.tensor([2.0, 0.0, 1.0]), torch.tensor([0.0, 4.0, 3.0])
    assert merge(find("ram"), [base, x, y]).tolist() == [2.0, 4.0, 2.0]
    # each model has 1 element of its own and 1 shared: lambda = 1 + 0.5 min(1/1, 0.8)
    boosted = merge(find("ram_plus_tl"), [base, x, y], {"r": 0.5, "alpha": 0.8})
    assert boosted.tolist() == pytest.approx([2.0 * 1.4, 4.0 * 1.4, 2.0])


def test_clamp_with_stiffness_narrows_towards_the_mean() -> None:
    bounds = [torch.tensor([value]) for value in (0.0, 4.0, 5.0, 11.0)]  # mean 5
    for a, stiffness, expected in [(20.0, 0.0, 11.0), (20.0, 1.0, 5.0), (20.0, 0.5, 8.0), (-3.0, 0.5, 2.5)]:
        result = merge(find("clamp"), [torch.tensor([a]), *bounds], {"stiffness": stiffness})
        assert result.item() == expected
    with pytest.raises(UsageError, match="no bounds"):
        merge(find("clamp"), [torch.tensor([1.0])])


def test_extract_parts_add_up_to_the_average_change() -> None:
    a, b, c = inputs = fine_tunes(3)
    similar = merge(find("extract_similar"), inputs, {"alpha": 0.3})
    dissimilar = merge(find("extract_dissimilar"), inputs, {"alpha": 0.3})
    check(similar + dissimilar - a, (weighted_sum(b, c, alpha=0.3)).double().numpy(), inputs, ulps=32)


# --- coefficients ---------------------------------------------------------------------------------------------------


@given(weights=st.lists(st.floats(-8, 8, width=32), min_size=1, max_size=8))
@settings(max_examples=100, deadline=None)
def test_normalised_weights_add_up_to_exactly_one(weights: list[float]) -> None:
    if abs(sum(weights)) < 1e-3:
        return
    learnt = coefficients(linear, len(weights), {"weights": tuple(weights)})
    assert sum(learnt) == 1
    for coefficient, weight in zip(learnt, weights, strict=True):
        assert float(coefficient) == pytest.approx(weight / sum(weights), rel=1e-5, abs=1e-4 / abs(sum(weights)))


def test_a_zero_weight_is_a_weight() -> None:
    assert coefficients(linear, 3, {"weights": (1.0, 0.0, 1.0)}) == (Fraction(1, 2), 0, Fraction(1, 2))
    assert coefficients(task_arithmetic, 3, {"weights": (0.0, 1.0)}) == (0, 0, 1)


@pytest.mark.parametrize("method", [linear, task_arithmetic])
def test_weights_that_cannot_be_normalised(method: Callable[..., Tensor]) -> None:
    base = [torch.ones(2)] if method is task_arithmetic else []
    models = [torch.ones(2), torch.ones(2)]
    with pytest.raises(UsageError, match="sum to zero"):
        method(*base, *models, weights=(1.0, -1.0), normalize=True)
    with pytest.raises(UsageError, match="3 numbers for 2 models"):
        method(*base, *models, weights=(1.0, 1.0, 1.0))
    assert method(*base, *models, weights=(1.0, -1.0), normalize=False) is not None


@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 1.0), (0.5, 2.0), (0.99999, 1.0)])
def test_nothing_is_left_to_subtract_from(alpha: float, beta: float) -> None:
    with pytest.raises(UsageError, match="nothing else is left"):
        coefficients(weighted_subtraction, 2, {"alpha": alpha, "beta": beta})


# --- noise ----------------------------------------------------------------------------------------------------------


def test_plus_random_depends_on_seed_and_key_alone() -> None:
    function = load(find("plus_random")).plus_random
    a = torch.zeros(20_000)
    noise = Noise(seed=1, key="x")
    result = function(a, noise=noise, alpha=0.5)
    assert torch.equal(function(a, noise=noise, alpha=0.5), result)
    for other in (Noise(seed=2, key="x"), Noise(seed=1, key="y")):
        assert not torch.equal(function(a, noise=other, alpha=0.5), result)
    assert result.mean().abs() < 5 * 0.5 / 20_000**0.5
    assert result.std().item() == pytest.approx(0.5, rel=0.03)


# --- cosine A and B -------------------------------------------------------------------------------------------------


def ref_combined(a: Array, b: Array, normalize: bool) -> Array:
    columns = (a * b).sum(0) / np.sqrt((a * a).sum(0) * (b * b).sum(0))
    if normalize:
        a, b = a / np.sqrt((a * a).sum(0)), b / np.sqrt((b * b).sum(0))
    return (columns + (a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum())) / 2


@pytest.mark.parametrize("normalize", [True, False])
def test_cosine_over_a_model(normalize: bool) -> None:
    module, name = (cosine_a, "cosine_a") if normalize else (cosine_b, "cosine_b")
    shapes = {
        "w": (30, 20),
        "conv": (8, 6, 3, 3),
        "bias": (9,),
        "first_stage_model.w": (5, 5),
        "scalar": (),
        "no": (0, 3),
    }
    scale = torch.linspace(0.1, 3, 8)
    model = {key: fine_tunes(2, shape, seed=i, spread=float(scale[i])) for i, (key, shape) in enumerate(shapes.items())}
    low, high = module.prepare(list(model), model.__getitem__)

    doubles = {key: [x.double().numpy() for x in pair] for key, pair in model.items()}
    counted = [key for key in model if key not in ("first_stage_model.w", "no")]
    found = np.sort(np.concatenate([ref_combined(*doubles[key], normalize).reshape(-1) for key in counted]))
    found = found[found >= np.percentile(found, 1, method="midpoint")]
    found = found[found <= np.percentile(found, 99, method="midpoint")]
    assert (low, high) == pytest.approx((found[0], found[-1]))

    for key in counted:
        a, b = doubles[key]
        k = np.clip((ref_combined(a, b, normalize) - found[0]) / (found[-1] - found[0]) - 0.3, 0, 1)
        result = getattr(module, name)(*model[key], state=(low, high), key=key, alpha=0.3)
        assert result.shape == model[key][0].shape
        check(result, b * (1 - k) + a * k, model[key], ulps=64)


def test_cosine_leaves_the_autoencoder_alone() -> None:
    a, b = fine_tunes(2)
    assert cosine_a.cosine_a(a, b, state=(0.0, 1.0), key="first_stage_model.decoder.conv_in.weight") is a


def test_cosine_variants_differ() -> None:
    a, b = fine_tunes(2, (30, 20), spread=1.0)
    a = a * torch.linspace(0.01, 10, 20)
    assert not torch.allclose(_similarity.combined(a, b, normalize=True), _similarity.combined(a, b, normalize=False))


def test_cosine_without_a_range_is_the_weighted_sum() -> None:
    a, b = fine_tunes(2, (1,))
    result = merge(find("cosine_a"), [a, b], {"alpha": 0.3})
    check(result, weighted_sum(a, b, alpha=0.3).double().numpy(), [a, b])


# --- adjust ---------------------------------------------------------------------------------------------------------

UNET = "model.diffusion_model."
KNOBS = ("input_detail", "output_detail", "final_detail", "contrast", "brightness", "color1", "color2", "color3")


@pytest.mark.parametrize("xl", [False, True])
def test_adjust_is_the_closed_form(xl: bool) -> None:
    f = [1.5, -2.0, 3.0, 0.5, -1.0, 2.0, 4.0, -0.5]
    knobs = dict(zip(KNOBS, f, strict=True))
    shapes = {"input_blocks.0.0": (4, 4, 3, 3), "out.0": (4,), "out.2": (4, 4, 3, 3), "out.1": (4,)}
    keys = [f"{UNET}{layer}.{part}" for layer in shapes for part in ("weight", "bias")]
    marker = f"{UNET}input_blocks.4.1.transformer_blocks.1.norm1.weight" if xl else f"{UNET}x"
    state = adjust.prepare([*keys, marker], lambda _: [])
    assert state is xl
    rows = (
        [(0, 0, 1), (1, 0, 0), (-1, -1, 0), (-1, 1, 0)]
        if xl
        else [(-1, 1 / 3, 2 / 3), (1, 1, 0), (0, -1, -1), (1, 0, 1)]
    )
    shift = [0.02 * f[3]] + [sum(0.02 * f[4 + r] * rows[r][i] for r in range(4)) for i in range(3)]
    for layer, shape in shapes.items():
        weight, bias = torch.randn(shape), torch.randn(4)
        number = {"input_blocks.0.0": f[0], "out.0": f[1], "out.2": f[2], "out.1": 0.0}[layer]
        got = adjust.adjust(weight, state=state, key=f"{UNET}{layer}.weight", **knobs)
        check(got, weight.double().numpy() * (1 - 0.01 * number), [weight], ulps=4)
        got = adjust.adjust(bias, state=state, key=f"{UNET}{layer}.bias", **knobs)
        wanted = (
            bias.double().numpy() + np.array(shift) if layer == "out.2" else bias.double().numpy() * (1 + 0.02 * number)
        )
        check(got, wanted, [bias], ulps=4)


def test_adjust_refuses_a_model_without_its_tensors() -> None:
    with pytest.raises(UsageError, match="nothing to adjust"):
        adjust.prepare(["unet.conv_in.weight"], lambda _: [])
