"""Methods on inner products and sparse methods against their definitions, evaluated on the vectors in float64."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sdops.card import find
from sdops.core.noise import Noise
from sdops.errors import UsageError
from sdops.merges.dare_linear import dare_linear
from sdops.merges.della_linear import della_linear
from tests.merges.whole import gram, merge

quick = settings(deadline=None, max_examples=60)
SEEDS = st.integers(0, 2**31)
WEIGHTS = st.lists(st.floats(0.1, 4), min_size=3, max_size=3).map(tuple)
ALPHAS = st.floats(-0.5, 1.5)


def tensors(count: int, shape: tuple[int, ...] = (40,), seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) * (1 + i / 4) for i in range(count)]


def run(name: str, *inputs: Tensor, **knobs: Any) -> Tensor:
    return merge(find(name), inputs, knobs)


def vectors(inputs: tuple[Tensor, ...] | list[Tensor]) -> np.ndarray:
    return np.stack([x.flatten().double().numpy() for x in inputs])


def close(result: Tensor, expected: np.ndarray, tolerance: float = 3e-7) -> None:
    """Equal up to a few roundings to float32, relative to the largest element."""
    error = np.abs(result.flatten().double().numpy() - expected.reshape(-1)).max(initial=0)
    assert error <= tolerance * max(1, np.abs(expected).max(initial=0)), error


# --- spheres --------------------------------------------------------------------------------------------------------


def slerp_of_vectors(a: np.ndarray, b: np.ndarray, alpha: float) -> np.ndarray:
    """The textbook formula; the angle is 2 atan(|u - v| / |u + v|), exact for small ones."""
    u, v = a / np.linalg.norm(a), b / np.linalg.norm(b)
    angle = 2 * math.atan2(np.linalg.norm(u - v), np.linalg.norm(u + v))
    return (math.sin((1 - alpha) * angle) * a + math.sin(alpha * angle) * b) / math.sin(angle)


@quick
@given(SEEDS, ALPHAS, st.floats(-6, 0))
def test_slerp_is_its_formula_at_any_distance(seed: int, alpha: float, exponent: float) -> None:
    a, d = tensors(2, seed=seed)
    b = a + 10**exponent * d
    close(run("slerp", a, b, alpha=alpha), slerp_of_vectors(*vectors([a, b]), alpha))


@quick
@given(SEEDS, st.floats(0, 1))
def test_slerp_stays_on_the_sphere(seed: int, alpha: float) -> None:
    a, b = tensors(2, seed=seed)
    b = b * (a.norm() / b.norm())
    assert run("slerp", a, b, alpha=alpha).norm().item() == pytest.approx(a.norm().item(), rel=1e-6)


def test_slerp_ends_are_the_models() -> None:
    a, b = tensors(2)
    assert torch.equal(run("slerp", a, b, alpha=0.0), a)
    assert torch.equal(run("slerp", a, b, alpha=1.0), b)


@pytest.mark.parametrize("name", ["slerp", "nuslerp_rows"])
@pytest.mark.parametrize("factor", [0.0, 1.0, 2.5, -1.0, -3.0])
def test_slerp_without_an_arc_is_linear(name: str, factor: float) -> None:
    (a,) = tensors(1, (4, 10))
    knobs = {"alpha": 0.3} if name == "slerp" else {"weights": (0.7, 0.3)}
    close(run(name, a, factor * a, **knobs), (0.7 + 0.3 * factor) * vectors([a]))
    close(run(name, factor * a, a, **knobs), (0.7 * factor + 0.3) * vectors([a]))


def test_nuslerp_is_slerp_at_the_share_of_the_second_weight() -> None:
    a, b = tensors(2)
    assert torch.equal(run("nuslerp", a, b, weights=(3.0, 1.0)), run("slerp", a, b, alpha=0.25))
    assert torch.equal(run("nuslerp", a, b), run("slerp", a, b, alpha=0.5))


def test_nuslerp_task_is_slerp_of_the_deltas() -> None:
    base, a, b = tensors(3)
    x, y, z = vectors([base, a, b])
    close(run("nuslerp_task", base, a, b, weights=(1.0, 3.0)), x + slerp_of_vectors(y - x, z - x, 0.75))


def test_nuslerp_task_of_a_model_that_is_the_base_is_linear() -> None:
    base, b = tensors(2)
    close(run("nuslerp_task", base, base, b), vectors([base, b]).mean(0))


@pytest.mark.parametrize("shape", [(3, 8), (3, 2, 3, 3)])
def test_nuslerp_rows_is_slerp_of_every_row(shape: tuple[int, ...]) -> None:
    a, b = tensors(2, shape)
    result = run("nuslerp_rows", a, b, weights=(2.0, 1.0))
    for row, x, y in zip(result, a, b, strict=True):
        close(row, slerp_of_vectors(*vectors([x, y]), 1 / 3))


def multislerp_of_vectors(x: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """With the step through the tangent space, as published."""
    weights = weights / weights.sum()
    norms = np.linalg.norm(x, axis=1)
    units = x / norms[:, None]
    mean = weights @ units / np.linalg.norm(weights @ units)
    tangent = weights @ (units - np.outer(units @ mean, mean))
    length = np.linalg.norm(tangent) + 1e-30
    return (mean * math.cos(length) + tangent / length * math.sin(length)) * (weights @ norms)


@quick
@given(SEEDS, WEIGHTS)
def test_multislerp_is_its_formula(seed: int, weights: tuple[float, ...]) -> None:
    base, *models = tensors(4, seed=seed)
    close(run("multislerp", *models, weights=weights), multislerp_of_vectors(vectors(models), np.array(weights)))
    x = vectors([base])
    expected = x + multislerp_of_vectors(vectors(models) - x, np.array(weights))
    close(run("multislerp_task", base, *models, weights=weights), expected)


@pytest.mark.parametrize("name", ["multislerp", "karcher"])
def test_directions_that_cancel_out_or_do_not_exist(name: str) -> None:
    (a,) = tensors(1)
    zero = torch.zeros_like(a)
    assert run(name, a, -a).isfinite().all()
    assert run(name, a, -a).norm() <= a.norm() * 1.000001
    assert torch.equal(run(name, zero, zero), zero)
    close(run(name, a, zero, weights=(1.0, 3.0)), 0.25 * vectors([a]))
    close(run(name, a), vectors([a]))


def test_multislerp_of_opposite_models_is_their_mean() -> None:
    (a,) = tensors(1)
    close(run("multislerp", a, -a, weights=(3.0, 1.0)), multislerp_of_vectors(vectors([a, -a]), np.array([3, 1])))
    close(run("multislerp", a, -2 * a), -0.5 * vectors([a]))


@quick
@given(SEEDS, st.floats(0.05, 0.95))
def test_karcher_mean_of_two_is_on_their_arc(seed: int, alpha: float) -> None:
    a, b = tensors(2, seed=seed)
    x, y = vectors([a, b])
    norms = np.linalg.norm(x), np.linalg.norm(y)
    direction = slerp_of_vectors(x / norms[0], y / norms[1], alpha)
    expected = direction * ((1 - alpha) * norms[0] + alpha * norms[1])
    close(run("karcher", a, b, weights=(1 - alpha, alpha)), expected)


@quick
@given(SEEDS, WEIGHTS, st.floats(-3, 0))
def test_karcher_mean_is_pulled_equally_from_all_sides(seed: int, weights: tuple[float, ...], exponent: float) -> None:
    base, *deltas = [x.double() for x in tensors(4, seed=seed)]
    models = vectors([base + 10**exponent * d for d in deltas])
    result = run("karcher", *map(torch.from_numpy, models), weights=weights).numpy()
    centre = result / np.linalg.norm(result)
    pull = np.zeros_like(centre)
    for weight, x in zip(weights, models / np.linalg.norm(models, axis=1, keepdims=True), strict=True):
        across = x - (x @ centre) * centre
        pull += weight * math.atan2(np.linalg.norm(across), x @ centre) * across / np.linalg.norm(across)
    assert np.linalg.norm(pull) <= 1e-7 * sum(weights)
    shares = np.array(weights) / sum(weights)
    assert np.linalg.norm(result) == pytest.approx(shares @ np.linalg.norm(models, axis=1), rel=1e-9)


# --- centres --------------------------------------------------------------------------------------------------------


@quick
@given(SEEDS, WEIGHTS, st.integers(3, 30), st.floats(-4, 0))
def test_geometric_median_is_pulled_equally_from_all_sides(
    seed: int, weights: tuple[float, ...], numel: int, exponent: float
) -> None:
    base, *deltas = [x.double() for x in tensors(4, (numel,), seed=seed)]
    models = [base + 10**exponent * d for d in deltas]
    result = run("geometric_median", *models, weights=weights).numpy()
    towards = vectors(models) - result
    distances = np.linalg.norm(towards, axis=1)
    nearest = int(distances.argmin())
    if distances[nearest] == 0:  # a model is the median: the others do not pull harder than its own weight
        others = [w * t / d for w, t, d in zip(weights, towards, distances, strict=True) if d]
        assert np.linalg.norm(sum(others)) <= weights[nearest] * (1 + 1e-6)
    else:
        pull = np.array(weights) @ (towards / distances[:, None])
        assert np.linalg.norm(pull) <= 1e-7 * sum(weights)


@quick
@given(st.lists(st.integers(-5, 5), min_size=1, max_size=9).filter(lambda values: len(values) % 2 == 1))
def test_geometric_median_on_a_line_is_the_median(values: list[int]) -> None:
    base, direction = tensors(2)
    models = [base + value * direction for value in values]
    close(run("geometric_median", *models), vectors([base + float(np.median(values)) * direction]), 1e-6)


def test_geometric_median_of_one_model_is_the_model() -> None:
    (a,) = tensors(1)
    assert torch.equal(run("geometric_median", a), a)


def test_geometric_median_ignores_an_outlier_and_leaves_a_start_on_a_model() -> None:
    a, far = tensors(2)
    assert torch.equal(run("geometric_median", a, a, a, a + 1e6 * far), a)
    # The mean of these points is one of them, and not the median.
    points = [torch.tensor(p) for p in ([0.0, 0.0], [4.0, 0.0], [-1.0, 1.0], [-1.0, -1.0], [-2.0, 0.0])]
    x = vectors(points)
    result = run("geometric_median", *points).double().numpy()
    total = np.linalg.norm(x - result, axis=1).sum()
    grid = np.stack(np.meshgrid(np.linspace(-2, 1, 301), np.linspace(-1, 1, 201)), -1).reshape(-1, 1, 2)
    assert total <= np.linalg.norm(grid - x, axis=2).sum(1).min() + 1e-9


def test_geometric_median_refuses_negative_weights() -> None:
    with pytest.raises(UsageError, match="positive"):
        run("geometric_median", *tensors(2), weights=(2.0, -1.0))


def stock_of_vectors(base: np.ndarray, models: np.ndarray) -> np.ndarray:
    deltas = models - base
    count = len(models)
    cosines = [x @ y / (np.linalg.norm(x) * np.linalg.norm(y)) for i, x in enumerate(deltas) for y in deltas[:i]]
    cosine = max(0, np.mean(cosines))
    ratio = count * cosine / (1 + (count - 1) * cosine)
    return ratio * models.mean(0) + (1 - ratio) * base


@quick
@given(SEEDS, st.floats(0, 3), st.integers(2, 5))
def test_model_stock_is_its_formula(seed: int, common: float, count: int) -> None:
    base, shared, *own = tensors(2 + count, (6, 7), seed=seed)
    models = [base + 0.1 * (common * shared + x) for x in own]
    close(run("model_stock", base, *models), stock_of_vectors(vectors([base])[0], vectors(models)))
    rows = run("model_stock_rows", base, *models)
    for index, row in enumerate(rows):
        expected = stock_of_vectors(base[index].double().numpy(), vectors([model[index] for model in models]))
        close(row, expected, 1e-6)


@pytest.mark.parametrize("name", ["model_stock", "model_stock_rows"])
def test_model_stock_limits(name: str) -> None:
    base, d = tensors(2, (3, 4))
    close(run(name, base, base + d, base + d), vectors([base + d]), 1e-6)  # agreement: the models
    close(run(name, base, base + d, base - d), vectors([base]))  # opposition: the base
    close(run(name, base, base, base + d), vectors([base]))  # one has no direction
    with pytest.raises(UsageError, match="only one"):
        run(name, base, base + d)


@quick
@given(SEEDS, ALPHAS)
def test_perpendicular_parts_are_perpendicular(seed: int, alpha: float) -> None:
    a, b, c = (x.double() for x in tensors(3, seed=seed))
    part = run("perpendicular_component", a, b)
    assert abs(part @ b) <= 1e-12 * a.norm() * b.norm()
    x, y, z = vectors([a, b, c])
    close(part, x - y * (x @ y) / (y @ y), 1e-12)
    change = run("perpendicular", a, b, c, alpha=alpha) - a
    assert abs(change @ a) <= 1e-11 * a.norm() ** 2
    close(change, alpha * ((y - z) - x * (x @ (y - z)) / (x @ x)), 1e-11)


def test_perpendicular_to_zero_is_all() -> None:
    a, b = tensors(2)
    zero = torch.zeros_like(a)
    assert torch.equal(run("perpendicular_component", a, zero), a)
    close(run("perpendicular", zero, a, b, alpha=2.0), 2 * vectors([a - b]), 1e-6)


@pytest.mark.parametrize("name", ["nuslerp", "multislerp", "karcher", "geometric_median"])
def test_weights_must_fit(name: str) -> None:
    with pytest.raises(UsageError, match="3 numbers for 2 models"):
        run(name, *tensors(2), weights=(1.0, 1.0, 1.0))
    with pytest.raises(UsageError):
        run(name, *tensors(2), weights=(1.0, -1.0))


# --- sparse deltas --------------------------------------------------------------------------------------------------


def elected(base: list[float], deltas: list[list[float]], weights: list[float], normalize: bool) -> list[float]:
    """TIES's second half, element by element."""
    result = []
    for index, origin in enumerate(base):
        values = [(w, w * d[index]) for w, d in zip(weights, deltas, strict=True)]
        sign = 1 if sum(value for _, value in values) >= 0 else -1
        agreeing = [(w, value) for w, value in values if value * sign > 0]
        divisor = sum(w for w, _ in agreeing) or 1
        result.append(origin + sum(value for _, value in agreeing) / (divisor if normalize else 1))
    return result


def pruned(delta: list[float], first: int, last: int) -> list[float]:
    order = sorted(range(len(delta)), key=lambda index: (-abs(delta[index]), index))
    chosen = set(order[first:last])
    return [value if index in chosen else 0.0 for index, value in enumerate(delta)]


@quick
@given(
    SEEDS,
    st.integers(1, 30),
    st.floats(0.01, 1),
    st.floats(0, 0.5),
    st.lists(st.sampled_from([-1.0, 0.5, 1.0, 2.0]), min_size=3, max_size=3),
    st.booleans(),
)
def test_pruning_by_size(
    seed: int, numel: int, density: float, gamma: float, weights: list[float], normalize: bool
) -> None:
    base = torch.zeros(numel)
    # Few distinct sizes, so that the borders fall among equal ones.
    models = [(x * 4).round() / 4 for x in tensors(3, (numel,), seed=seed)]
    count = max(1, int(density * numel))
    largest = [pruned(x.tolist(), 0, count) for x in models]
    first = min(int(gamma * numel), numel - count)
    middle = [pruned(x.tolist(), first, first + count) for x in models]
    knobs = {"density": density, "weights": tuple(weights)}

    expected = np.array(elected(base.tolist(), largest, weights, normalize))
    close(run("ties", base, *models, **knobs, normalize=normalize), expected, 1e-6)
    expected = np.array(elected(base.tolist(), middle, weights, normalize))
    close(run("breadcrumbs_ties", base, *models, **knobs, gamma=gamma, normalize=normalize), expected, 1e-6)
    divisor = sum(weights) if normalize else 1.0
    if divisor:
        expected = np.array(weights) @ np.array(middle) / divisor
        close(run("breadcrumbs", base, *models, **knobs, gamma=gamma, normalize=normalize), expected, 1e-6)
        expected = np.array(weights) @ np.array(largest) / divisor
        close(run("sparse_topk", base, *models, **knobs, normalize=normalize), expected, 1e-6)


@pytest.mark.parametrize("name", ["ties", "sparse_topk", "breadcrumbs", "breadcrumbs_ties", "dare_linear", "dare_ties"])
def test_density_limits(name: str) -> None:
    base, a = tensors(2, (9,))
    assert torch.equal(run(name, base, a, density=0.0), base)
    close(run(name, base, a, density=1.0), vectors([a]))
    with pytest.raises(UsageError, match="density"):
        run(name, base, a, density=1.5)
    with pytest.raises(UsageError, match="2 numbers for 1 models"):
        run(name, base, a, weights=(1.0, 2.0))


@pytest.mark.parametrize("name", ["ties", "sparse_topk", "breadcrumbs", "breadcrumbs_ties"])
def test_small_tensors(name: str) -> None:
    base, a = torch.zeros(4), torch.tensor([1.0, -4.0, 3.0, 2.0])
    assert run(name, base, a, density=0.01).count_nonzero() == 1
    close(run(name, base, a, density=0.01, min_numel=5), vectors([a]))
    assert run(name, base, a, density=0.01, min_numel=4).count_nonzero() == 1


def test_ties_scale_and_election_by_weighted_values() -> None:
    base = torch.zeros(3)
    models = [torch.tensor([1.0, 1.0, 1.0]), torch.tensor([1.0, -3.0, -1.0]), torch.tensor([1.0, 1.0, 0.0])]
    result = run("ties", base, *models, density=1.0, scale=0.5)
    # Second: the one large value outweighs two small ones. Third: a draw counts as +, and 0 does not vote.
    assert result.tolist() == [0.5, -1.5, 0.5]


NOISY = ["dare_linear", "dare_ties", "della", "della_linear"]


@pytest.mark.parametrize("name", ["dare_linear", "della_linear"])
def test_dropping_keeps_the_expectation(name: str) -> None:
    base, a, b = tensors(3, (400, 500))
    change = (run(name, base, a, b, density=0.3, weights=(1.0, 0.5)) - base).double()
    wanted = ((a - base) + 0.5 * (b - base)).double()
    size = ((a - base).double() ** 2 + 0.25 * (b - base).double() ** 2).sum().sqrt()
    # Along the wanted change; the lowest probability of keeping is 0.15.
    shares = (change * wanted).sum() / (wanted**2).sum()
    assert abs(shares - 1) < 5 * math.sqrt(1 / 0.15) * size * wanted.abs().max() / (wanted**2).sum()


def test_dare_keeps_the_stated_share_and_rescales() -> None:
    base, a = torch.zeros(100_000), torch.ones(100_000)
    for density in (0.1, 0.9):
        result = run("dare_linear", base, a, density=density)
        assert set(result.tolist()) == {0.0, torch.tensor(1.0).div(density).item()}
        share = result.count_nonzero().item() / len(base)
        assert abs(share - density) < 5 * math.sqrt(density * (1 - density) / len(base))


def test_dare_ties_elects_after_dropping() -> None:
    base, a, b = torch.zeros(1000), torch.ones(1000), -torch.ones(1000) * 3
    linear = [dare_linear(base, x, base, noise=Noise(0, "k")) for x in (a, a)]
    assert torch.equal(*linear)
    result = run("dare_ties", base, a, b, density=0.5)
    # b wins wherever it was kept; a stands alone where only a was.
    assert set(result.tolist()) == {0.0, 2.0, -6.0}


@pytest.mark.parametrize("method", [dare_linear, della_linear])
def test_masks_of_models_and_tensors_differ(method: Any) -> None:
    base, a = torch.zeros(64, 64), torch.ones(64, 64)

    def mask(key: str, seed: int = 0, model: int = 0) -> Tensor:
        models = [base, base]
        models[model] = a
        return method(base, *models, noise=Noise(seed, key)) != 0

    masks = [mask("a"), mask("b"), mask("a", seed=1), mask("a", model=1)]
    for index, one in enumerate(masks):
        for other in masks[:index]:
            assert 0.4 < (one == other).double().mean() < 0.6


@pytest.mark.parametrize("method", [dare_linear, della_linear])
@quick
@given(cuts=st.sets(st.integers(1, 11)))
def test_masks_do_not_depend_on_chunks(method: Any, cuts: set[int]) -> None:
    base, a, b = tensors(3, (12, 7))
    noise = Noise(3, "k")
    whole = method(base, a, b, noise=noise)
    edges = [0, *sorted(cuts), 12]
    for low, high in pairwise(edges):
        part = method(base[low:high], a[low:high], b[low:high], noise=noise.at(7 * low))
        assert torch.equal(part, whole[low:high])


def test_della_keeps_large_changes_with_higher_probability() -> None:
    rows, width, density, epsilon = 20_000, 5, 0.5, 0.4
    base = torch.zeros(rows, width)
    a = torch.tensor([3.0, -1.0, 2.0, -5.0, 4.0]).expand(rows, width)
    result = run("della_linear", base, a, density=density, epsilon=epsilon)
    share = (result != 0).double().mean(0)
    expected = torch.tensor([0.5, 0.1, 0.3, 0.9, 0.7], dtype=torch.float64)
    assert ((share - expected).abs() < 5 * (expected * (1 - expected) / rows).sqrt()).all()
    kept = result != 0
    torch.testing.assert_close(result[kept], (a / expected.float())[kept])


@pytest.mark.parametrize("shape", [(), (1,), (6, 1), (6, 1, 1, 1)], ids=str)
@pytest.mark.parametrize("name", ["della", "della_linear"])
def test_della_of_one_element_rows_keeps_with_the_density(name: str, shape: tuple[int, ...]) -> None:
    result = run(name, torch.zeros(shape), torch.ones(shape), density=0.75, epsilon=0.2, normalize=False)
    kept = torch.tensor(1 / 0.75).item()
    assert set(result.flatten().tolist()) <= {0.0, kept}


def test_della_of_many_one_element_rows_keeps_the_density() -> None:
    count = 40_000
    result = run("della_linear", torch.zeros(count, 1), torch.ones(count, 1), density=0.75, epsilon=0.2)
    assert abs(result.count_nonzero().item() / count - 0.75) < 5 * math.sqrt(0.75 * 0.25 / count)


@pytest.mark.parametrize(("density", "epsilon"), [(0.1, 0.1), (0.95, 0.1), (0.5, 0.6), (0.5, -0.6), (math.nan, 0.1)])
@pytest.mark.parametrize("name", ["della", "della_linear"])
def test_della_refuses_what_is_no_probability(name: str, density: float, epsilon: float) -> None:
    with pytest.raises(UsageError, match="probability"):
        run(name, *tensors(2), density=density, epsilon=epsilon)


def test_della_at_density_one_is_everything() -> None:
    base, a = tensors(2)
    close(run("della_linear", base, a, density=1.0, epsilon=0.0), vectors([a]))


# --- whole tensors --------------------------------------------------------------------------------------------------


@quick
@given(SEEDS, st.floats(0, 1), st.integers(1, 4))
def test_sce_is_its_definition(seed: int, density: float, count: int) -> None:
    base, *models = tensors(1 + count, (5, 6), seed=seed)
    models = [model.where(model > -0.5, base) for model in models]  # some variances are zero
    x = vectors([base])[0]
    changes = np.stack([(m - base).flatten().double().numpy() for m in models])
    if density < 1:
        variance = changes.var(0)
        order = np.argsort(-variance, kind="stable")[: int((variance > 1e-15).sum() * density)]
        changes = changes * np.isin(np.arange(len(x)), order)
    squares = (changes**2).mean(1)
    weights = squares / squares.sum() if squares.any() else np.ones(count)
    sign = np.where(changes.sum(0) >= 0, 1, -1)
    agree = (np.sign(changes) == sign) * weights[:, None]
    divisor = agree.sum(0)
    expected = x + (agree * changes).sum(0) / np.where(divisor == 0, 1, divisor)
    close(run("sce", base, *models, density=density), expected, 1e-6)


def test_sce_does_not_depend_on_the_size_of_the_changes() -> None:
    base = torch.zeros(6, 6)
    models = tensors(2, (6, 6))
    small = run("sce", base, *[1e-6 * model for model in models], density=0.5)
    torch.testing.assert_close(small * 1e6, run("sce", base, *models, density=0.5))


def fusion_of_arrays(a: np.ndarray, base: np.ndarray) -> np.ndarray:
    def softmax(x: np.ndarray) -> np.ndarray:
        powers = np.exp(x - x.max(-1, keepdims=True))
        return powers / powers.sum(-1, keepdims=True) + 1e-8

    p, q = softmax(a), softmax(base)
    importance = np.abs(a - base) * (p * np.log(p / q)).sum(-1, keepdims=True)
    ordered = np.sort(importance.flatten())
    low, median, high = (ordered[int(q * (len(ordered) - 1))] for q in (0.25, 0.5, 0.75))
    return np.where(importance >= median + 1.5 * (high - low), a, base)


@quick
@given(SEEDS, st.sampled_from([(1,), (7,), (5, 6), (4, 2, 3, 3)]), st.floats(-4, 0))
def test_arcee_fusion_is_its_definition(seed: int, shape: tuple[int, ...], exponent: float) -> None:
    base, d = tensors(2, shape, seed=seed)
    a = base + 10**exponent * d
    expected = fusion_of_arrays(a.double().numpy(), base.double().numpy())
    close(run("arcee_fusion", base, a), expected, 1e-7)


def test_arcee_fusion_takes_few_large_changes() -> None:
    base, d = tensors(2, (64, 32))
    a = base + 1e-4 * d
    a[3] += torch.linspace(0, 1, 32)
    result = run("arcee_fusion", base, a)
    assert torch.equal(result[3, 16:], a[3, 16:])
    assert (result == base).double().mean() > 0.7


def test_gram_of_the_reference_runner_is_the_inner_products() -> None:
    inputs = tensors(3)
    np.testing.assert_allclose(gram(inputs), vectors(inputs) @ vectors(inputs).T)
