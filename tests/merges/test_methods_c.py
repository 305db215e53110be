"""Methods that need whole tensors or the whole model: against plain float64 numpy, and their own laws."""

from __future__ import annotations

from itertools import permutations, product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from sdops.errors import UsageError
from sdops.merges._assignment import assign
from sdops.merges._rotation import Rotation, fractional_power
from sdops.merges.crossover import crossover
from sdops.merges.distribution_crossover import distribution_crossover
from sdops.merges.iso_c import iso_c
from sdops.merges.rotate import rotate
from sdops.merges.smooth_add import smooth_add
from sdops.merges.tensor_sum import tensor_sum
from sdops.merges.top_k_tensor_sum import top_k_tensor_sum
from sdops.merges.truncate_rank import truncate_rank
from sdops.merges.tsv_m import tsv_m
from sdops.merges.weight_matching import Matching, prepare, weight_matching

ENDS = [crossover, tensor_sum]
SHAPES = [(), (1,), (7,), (8,), (5, 6), (3, 4, 3, 3), (4, 3, 1, 1), (0,), (0, 3)]


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def pair(*shape: int) -> tuple[Tensor, Tensor]:
    return randn(*shape, seed=1), randn(*shape, seed=2)


def double(x: Tensor) -> np.ndarray:
    return x.double().numpy()


def close(x: Tensor, expected: np.ndarray | Tensor, tolerance: float = 2e-6) -> None:
    torch.testing.assert_close(x.double(), torch.as_tensor(expected).double(), rtol=tolerance, atol=tolerance)


# --- ends -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("knob", [0.0, 0.3, 1.0, 1.6, 2.0, 3.2])
def test_alpha_0_is_a_and_1_is_b(shape: tuple[int, ...], knob: float) -> None:
    a, b = pair(*shape)
    c = randn(*shape, seed=3)
    for alpha, expected in ((0.0, a), (1.0, b)):
        assert torch.equal(crossover(a, b, alpha=alpha, tilt=knob), expected)
        assert torch.equal(distribution_crossover(a, b, c, alpha=alpha, tilt=knob), expected)
        assert torch.equal(tensor_sum(a, b, alpha=alpha, beta=knob), expected)
        assert torch.equal(rotate(a, b, alignment=alpha, alpha=alpha), expected)
    assert torch.equal(top_k_tensor_sum(a, b, alpha=0.0, beta=knob), a)


@pytest.mark.parametrize("method", [crossover, tensor_sum, top_k_tensor_sum])
@pytest.mark.parametrize("alpha", [-0.1, 1.1, float("nan")])
def test_shares_outside_0_to_1_are_refused(method: object, alpha: float) -> None:
    with pytest.raises(UsageError, match="alpha"):
        method(*pair(4, 4), alpha=alpha)  # type: ignore[operator]


# --- crossover --------------------------------------------------------------------------------------------------------


def slow_share(f: float, alpha: float, tilt: float) -> float:
    """The four cases written out one by one, as sd-mecha has them."""
    reverse = tilt > 2
    alpha = 1 - alpha if reverse else alpha
    if tilt in (0, 4):
        share = float(f > 1 - alpha)
    else:
        cot = 1 / np.tan(np.pi * tilt / 2)
        moved = alpha - 1 if tilt <= 1 or 2 < tilt <= 3 else -alpha
        share = min(max(f * cot + moved * cot + alpha, 0.0), 1.0)
    return 1 - share if reverse else share


@pytest.mark.parametrize("shape", [(7,), (8,), (5, 6), (6, 5), (4, 3, 3, 3)], ids=str)
@pytest.mark.parametrize("tilt", [0.0, 0.25, 0.9, 1.5, 2.5, 3.3])
@pytest.mark.parametrize("alpha", [0.2, 0.55])
def test_crossover_against_full_spectra(shape: tuple[int, ...], alpha: float, tilt: float) -> None:
    a, b = pair(*shape)
    x, y = np.fft.fftn(double(a)), np.fft.fftn(double(b))
    for index in product(*map(range, shape)):
        g = [min(k, n - k) / (n // 2) for k, n in zip(index, shape, strict=True)]
        share = slow_share(float(np.sqrt(np.mean(np.square(g)))), alpha, tilt)
        x[index] += share * (y[index] - x[index])
    expected = np.fft.ifftn(x)
    assert np.abs(expected.imag).max() < 1e-12
    close(crossover(a, b, alpha=alpha, tilt=tilt), expected.real)


def test_crossover_tilt_1_is_the_weighted_sum() -> None:
    a, b = pair(6, 5)
    close(crossover(a, b, alpha=0.3, tilt=1.0), torch.lerp(a, b, 0.3))
    close(crossover(a, b, alpha=0.3, tilt=1.0 - 1e-7), torch.lerp(a, b, 0.3))


@given(st.floats(0.01, 0.99), st.sampled_from([0.0, 1.0, 2.0, 3.0]))
def test_crossover_is_continuous_in_tilt(alpha: float, tilt: float) -> None:
    from sdops.merges._spectrum import share_of_second

    f = torch.linspace(0, 1, 40, dtype=torch.float64) + 1e-4  # clear of the jump
    f = f[(f - alpha).abs() > 1e-3][:-1]
    f = f[(f - 1 + alpha).abs() > 1e-3]
    at = share_of_second(f, alpha, tilt)
    torch.testing.assert_close(share_of_second(f, alpha, tilt + 1e-6), at, atol=1e-3, rtol=0)
    torch.testing.assert_close(share_of_second(f, alpha, tilt - 1e-6), at, atol=1e-3, rtol=0)


def test_crossover_of_a_1x1_convolution_is_that_of_the_linear_layer() -> None:
    a, b = pair(6, 5)
    conv = crossover(a[..., None, None], b[..., None, None], alpha=0.2)
    assert torch.equal(conv.squeeze(), crossover(a, b, alpha=0.2))


@pytest.mark.parametrize(("size", "tilt"), [(12, 0.0), (13, 0.0), (13, 0.5)])
def test_distribution_crossover_against_sorting_by_hand(size: int, tilt: float) -> None:
    a, b = pair(size, 2)
    c = randn(size, 2, seed=3).round(decimals=1)  # with ties
    order = sorted(range(2 * size), key=lambda i: double(c).ravel()[i])
    x, y = (np.fft.fft(double(t).ravel()[order]) for t in (a, b))
    shares = [slow_share(min(k, 2 * size - k) / size, 0.4, tilt) for k in range(2 * size)]
    merged = np.fft.ifft(x + np.array(shares) * (y - x)).real
    expected = np.empty(2 * size)
    expected[order] = merged
    close(distribution_crossover(a, b, c, alpha=0.4, tilt=tilt), expected.reshape(size, 2))


# --- smooth add -------------------------------------------------------------------------------------------------------


def slow_smooth(x: np.ndarray) -> np.ndarray:
    """Median and Gaussian with an explicit mirrored border, element by element."""
    padded = np.pad(x, 1, mode="symmetric")
    middle = np.empty_like(x)
    for index in np.ndindex(x.shape):
        middle[index] = np.median(padded[tuple(slice(i, i + 3) for i in index)])
    weights = np.exp(-np.square(np.arange(-4.0, 5.0)) / 2)
    weights /= weights.sum()
    for dim in range(x.ndim):
        padded = np.pad(middle, [(4, 4) if d == dim else (0, 0) for d in range(x.ndim)], mode="symmetric")
        middle = sum(w * padded.take(range(s, s + x.shape[dim]), axis=dim) for s, w in enumerate(weights))
    return middle


@pytest.mark.parametrize("shape", [(1,), (3,), (12,), (5, 6), (1, 7), (2, 4, 3, 3), (4, 3, 1, 1)], ids=str)
def test_smooth_add_against_plain_numpy(shape: tuple[int, ...]) -> None:
    a, b = pair(*shape)
    c = randn(*shape, seed=3)
    expected = double(a) + 0.7 * slow_smooth(double(b - c))
    close(smooth_add(a, b, c, alpha=0.7), expected)


def test_smooth_add_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = pair(11, 4)
    whole = smooth_add(a, b, a)
    monkeypatch.setattr("sdops.merges.smooth_add.BLOCK", 4 * 9 * 3)
    assert torch.equal(smooth_add(a, b, a), whole)


def test_smooth_add_removes_outliers_and_keeps_constants() -> None:
    zero = torch.zeros(9, 9)
    outlier = zero.clone()
    outlier[4, 4] = 100
    assert not smooth_add(zero, outlier, zero).any()
    close(smooth_add(zero, zero + 3, zero), zero + 3)


# --- exchange ---------------------------------------------------------------------------------------------------------


@given(st.integers(1, 40), st.integers(0, 20), st.integers(-30, 30), st.sampled_from([0, 1]))
@settings(deadline=None)
def test_tensor_sum_takes_a_circular_range(rows: int, width: int, offset: int, dim: int) -> None:
    # rows * 20 of them, so that shares of a twentieth are whole numbers
    n = rows * 20
    a, b = torch.zeros(n, 2), torch.ones(n, 2)
    if dim == 1:
        a, b = torch.zeros(2, n), torch.ones(2, n)
    merged = tensor_sum(a, b, alpha=width / 20, beta=offset / 20, dim=dim)
    if dim == 1 and n <= 100:
        dim, n, rows = 0, 2, 0  # too few columns: goes by rows
    if rows:
        expected = {(offset * rows + i) % n for i in range(width * rows)}
        line = merged[:, 0] if dim == 0 else merged[0]
        assert set(line.nonzero().flatten().tolist()) == expected
    assert ((merged == 0) | (merged == 1)).all()


def test_tensor_sum_of_single_numbers() -> None:
    a, b = torch.tensor(1.0), torch.tensor(2.0)
    assert tensor_sum(a, b, alpha=0.5) == 1
    assert tensor_sum(a, b, alpha=0.6) == 2
    with pytest.raises(UsageError, match="dim"):
        tensor_sum(a, b, dim=2)


@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 0.0), (0.5, 0.25), (0.5, 0.75), (0.3, 1.1), (0.0, 0.5)])
def test_top_k_tensor_sum_element_by_element(alpha: float, beta: float) -> None:
    a, b = (x.round(decimals=1) for x in pair(4, 5))  # with ties
    x, y = double(a).ravel(), double(b).ravel()
    n = len(x)
    by_value, by_size = np.argsort(x, kind="stable"), np.argsort(np.abs(x), kind="stable")
    first = round((beta % 1) * n)
    window = {by_size[i % n] for i in range(first, round((beta % 1 + alpha) * n))}
    expected = x.copy()
    for rank, i in enumerate(np.argsort(y, kind="stable")):
        if by_value[rank] in window:
            expected[i] = x[by_value[rank]]
    close(top_k_tensor_sum(a, b, alpha=alpha, beta=beta), expected.reshape(4, 5), 0)


@given(st.integers(0, 1000))
def test_top_k_tensor_sum_has_a_values_in_b_order(seed: int) -> None:
    a, b = randn(30, seed=seed), randn(30, seed=seed + 1)
    merged = top_k_tensor_sum(a, b)
    assert torch.equal(merged.sort().values, a.sort().values)
    assert torch.equal(merged.argsort(), b.argsort())


# --- rotate -----------------------------------------------------------------------------------------------------------


def orthogonal(n: int, seed: int = 0, sign: int = 1) -> Tensor:
    q = torch.linalg.qr(randn(n, n, seed=seed).double()).Q
    if torch.linalg.det(q) * sign < 0:
        q[:, 0] *= -1
    return q


@pytest.mark.parametrize("shape", [(40, 9), (9, 9), (30, 12)], ids=str)
def test_rotate_finds_the_rotation_that_was_applied(shape: tuple[int, int]) -> None:
    a = randn(*shape).double()
    b = a @ orthogonal(shape[1], 5)
    close(rotate(a, b), b, 1e-10)


@pytest.mark.parametrize("shape", [(6, 20), (15, 20), (20, 20), (30, 20)], ids=str)
def test_rotate_is_nearer_than_any_other_rotation(shape: tuple[int, int]) -> None:
    a, b = pair(*shape)
    found = (rotate(a, b, centralization=0.0) - b).norm()
    sizes = np.linalg.svd(double(a).T @ double(b), compute_uv=False).sum()
    # min |a Q - b|^2 = |a|^2 + |b|^2 - 2 (sum of the singular values of a^T b)
    assert float(found) == pytest.approx(float((a.norm() ** 2 + b.norm() ** 2 - 2 * sizes).sqrt()), rel=1e-5)
    assert found < (a - b).norm()


@pytest.mark.parametrize("shape", [(6, 20), (15, 20), (20, 20), (30, 20), (4, 3, 3, 3), (6, 9, 1, 1)], ids=str)
@pytest.mark.parametrize("alignment", [0.25, 0.5, 1.0])
def test_rotate_keeps_lengths_and_angles(shape: tuple[int, ...], alignment: float) -> None:
    a, b = pair(*shape)
    turned = rotate(a, b, alignment=alignment, centralization=0.0)
    flat = (lambda x: x.reshape(-1, 9)) if len(shape) == 4 and shape[-1] == 3 else (lambda x: x.flatten(1))
    close(flat(turned) @ flat(turned).T, flat(a) @ flat(a).T, 2e-5)


@pytest.mark.parametrize("shape", [(6, 20), (20, 20), (30, 20)], ids=str)
def test_rotate_by_parts_goes_all_the_way(shape: tuple[int, int]) -> None:
    """Half of the way twice is the whole way, where b is a turned."""
    a = randn(*shape).double()
    rotation = Rotation.between(a, a @ orthogonal(shape[1], 7))
    half = rotation.apply(a, 0.5)
    quarter = rotation.apply(a, 0.25)
    assert (a - quarter).norm() < (a - half).norm() < (a - rotation.apply(a, 1.0)).norm()
    if shape[0] >= shape[1]:
        close(rotation.apply(half, 0.5), rotation.apply(a, 1.0), 1e-9)


def test_rotate_moves_the_mean_row_straight() -> None:
    a, b = pair(10, 4)
    close(rotate(a, b, alignment=0.3).mean(0), torch.lerp(a.mean(0), b.mean(0), 0.3), 1e-5)


def test_rotate_leaves_vectors_to_the_weighted_sum() -> None:
    a, b = pair(8)
    assert torch.equal(rotate(a, b), a)
    close(rotate(a, b, alpha=0.25), torch.lerp(a, b, 0.25))
    with pytest.raises(UsageError, match="alignment"):
        rotate(a, b, alignment=1.5)


@pytest.mark.parametrize("size", [1, 2, 3, 8, 21])
@pytest.mark.parametrize("padding", [0, 4])
def test_fractional_powers_of_rotations(size: int, padding: int) -> None:
    q = torch.block_diag(orthogonal(size, size), torch.eye(padding, dtype=torch.float64))
    third = fractional_power(q, 1 / 3)
    close(third @ third @ third, q, 1e-12)
    close(third @ third.T, torch.eye(len(q)), 1e-12)
    assert torch.linalg.det(third) > 0


# --- singular values --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(12, 7), (7, 12), (6, 4, 3, 3), (9, 9)], ids=str)
@pytest.mark.parametrize("rank", [0, 1, 3, 6, 100])
def test_truncate_rank_is_the_nearest_of_its_rank(shape: tuple[int, ...], rank: int) -> None:
    base, a = pair(*shape)
    kept = double(truncate_rank(base.double(), a.double(), rank=rank) - base).reshape(shape[0], -1)
    delta = double(a - base).reshape(shape[0], -1)
    sizes = np.linalg.svd(double(a).reshape(shape[0], -1) - double(base).reshape(shape[0], -1), compute_uv=False)
    assert np.linalg.matrix_rank(kept, tol=1e-6) == min(rank, len(sizes))
    # Eckart and Young: the distance is that of the singular values left out
    assert np.linalg.norm(kept - delta) == pytest.approx(np.sqrt((sizes[rank:] ** 2).sum()), rel=1e-5, abs=1e-5)
    if 0 < rank < len(sizes):
        u, s, vh = np.linalg.svd(delta, full_matrices=False)
        close(torch.from_numpy(kept), (u[:, :rank] * s[:rank]) @ vh[:rank], 1e-5)


def test_truncate_rank_keeps_vectors_and_full_rank() -> None:
    base, a = pair(9)
    assert torch.equal(truncate_rank(base, a, rank=1), a)
    base, a = pair(9, 5)
    assert torch.equal(truncate_rank(base, a, rank=5), a)
    assert torch.equal(truncate_rank(base, a, rank=0), base)
    with pytest.raises(UsageError, match="rank"):
        truncate_rank(base, a, rank=-1)


def slow_tsv_m(base: np.ndarray, models: list[np.ndarray], alpha: float) -> np.ndarray:
    shape, count = base.shape, len(models)
    us, ss, vs = [], [], []
    for model in models:
        u, s, vh = np.linalg.svd((model - base).reshape(shape[0], -1), full_matrices=False)
        k = max(1, len(s) // count)
        us.append(u[:, :k])
        ss.extend(s[:k])
        vs.append(vh[:k])
    left, right = np.hstack(us), np.vstack(vs)

    def polar(x: np.ndarray) -> np.ndarray:
        """x (x^T x)^-1/2 for independent columns."""
        w, e = np.linalg.eigh(x.T @ x)
        return x @ (e / np.sqrt(w)) @ e.T

    return base + alpha * (polar(left) @ np.diag(ss) @ polar(right.T).T).reshape(shape)


@pytest.mark.parametrize("shape", [(12, 8), (8, 12), (6, 2, 3, 3)], ids=str)
@pytest.mark.parametrize("count", [1, 2, 3])
def test_tsv_m_against_another_orthogonalisation(shape: tuple[int, ...], count: int) -> None:
    base, *models = (randn(*shape, seed=i) for i in range(count + 1))
    expected = slow_tsv_m(double(base), [double(m) for m in models], 0.8)
    close(tsv_m(base, *models, alpha=0.8), expected, 1e-5)


def test_tsv_m_of_one_model_is_that_model() -> None:
    base, a = pair(7, 5)
    close(tsv_m(base, a), a, 1e-6)


def test_tsv_m_does_not_let_separate_tasks_interfere() -> None:
    """Tasks in orthogonal subspaces of half the rank add up."""
    base = randn(8, 8)
    first, second = torch.zeros(8, 8), torch.zeros(8, 8)
    first[:4, :4], second[4:, 4:] = randn(4, 4, seed=1), randn(4, 4, seed=2)
    close(tsv_m(base, base + first, base + second), base + first + second, 1e-5)


def test_vectors_take_the_mean_change() -> None:
    base, a, b = (randn(6, seed=i) for i in range(3))
    for method in (tsv_m, iso_c):
        close(method(base, a, b, alpha=0.5), base + 0.5 * ((a + b) / 2 - base))
        with pytest.raises(UsageError, match="no model"):
            method(base)


@pytest.mark.parametrize("shape", [(12, 8), (8, 12), (6, 2, 3, 3)], ids=str)
def test_iso_c_makes_all_directions_equal(shape: tuple[int, ...]) -> None:
    base, a, b = (randn(*shape, seed=i) for i in range(3))
    total = double(a + b - 2 * base).reshape(shape[0], -1)
    u, s, vh = np.linalg.svd(total, full_matrices=False)
    change = double(iso_c(base.double(), a.double(), b.double()) - base).reshape(shape[0], -1)
    np.testing.assert_allclose(np.linalg.svd(change, compute_uv=False), np.full(len(s), s.mean()), rtol=1e-5)
    np.testing.assert_allclose(change, s.mean() * u @ vh, rtol=1e-4, atol=1e-4)


def test_iso_c_adds_nothing_where_nothing_changed() -> None:
    base = randn(8, 6)
    change = torch.outer(randn(8, seed=1), randn(6, seed=2))
    close(iso_c(base, base + change), base + change, 1e-5)  # one direction, the mean of one value
    assert torch.equal(iso_c(base, base, base), base)


# --- weight matching --------------------------------------------------------------------------------------------------


@given(st.integers(1, 5), st.integers(0, 10_000), st.booleans())
def test_assignment_against_all_permutations(size: int, seed: int, ties: bool) -> None:
    random = np.random.default_rng(seed)
    gains = random.integers(-2, 3, (size, size)).astype(float) if ties else random.normal(size=(size, size))
    found = assign(gains)
    assert sorted(found) == list(range(size))
    best = max(gains[range(size), p].sum() for p in permutations(range(size)))
    assert gains[range(size), found].sum() == pytest.approx(best)


def test_assignment_of_a_larger_matrix_has_a_certificate() -> None:
    """No cycle of two or three exchanges improves it."""
    gains = np.random.default_rng(0).normal(size=(60, 60))
    found = assign(gains)
    placed = gains[:, found]  # placed[i, j]: row i in the column of row j
    own = placed.diagonal()
    two = placed + placed.T - own[:, None] - own[None, :]
    three = (
        placed[:, :, None] + placed[None, :, :] + placed.T[:, None, :] - own[:, None, None] - own[None, :, None] - own
    )
    assert two.max() <= 1e-12
    assert three.max() <= 1e-12


CHANNELS, CONTEXT, HEADS = 64, 768, 8


class Attention(nn.Module):
    def __init__(self, context: int) -> None:
        super().__init__()
        self.to_q = nn.Linear(CHANNELS, CHANNELS, bias=False)
        self.to_k = nn.Linear(context, CHANNELS, bias=False)
        self.to_v = nn.Linear(context, CHANNELS, bias=False)
        self.to_out = nn.Sequential(nn.Linear(CHANNELS, CHANNELS))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        q, k, v = (
            y.unflatten(-1, (HEADS, -1)).transpose(-2, -3)
            for y in (self.to_q(x), self.to_k(context), self.to_v(context))
        )
        mixed = (q @ k.transpose(-1, -2)).softmax(-1) @ v
        return self.to_out(mixed.transpose(-2, -3).flatten(-2))


class FeedForward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.ModuleDict({"proj": nn.Linear(CHANNELS, 96)}), nn.Identity(), nn.Linear(48, CHANNELS)
        )

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.net[0]["proj"](x).chunk(2, dim=-1)  # type: ignore[index]
        return self.net[2](value * nn.functional.gelu(gate))


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.in_layers = nn.Sequential(nn.GroupNorm(32, CHANNELS), nn.SiLU(), nn.Conv2d(CHANNELS, 128, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(10, 128))
        self.out_layers = nn.Sequential(
            nn.GroupNorm(32, 128), nn.SiLU(), nn.Identity(), nn.Conv2d(128, CHANNELS, 3, padding=1)
        )

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        return x + self.out_layers(self.in_layers(x) + self.emb_layers(emb)[..., None, None])


class Toy(nn.Module):
    """The parts of an SD1 UNet whose units can be renumbered, and the feed-forward of a text encoder."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.res = Residual()
        self.attn1, self.attn2, self.ff = Attention(CHANNELS), Attention(CONTEXT), FeedForward()
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(CHANNELS, 40), "fc2": nn.Linear(40, CHANNELS)})
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.2)

    def forward(self, x: Tensor, emb: Tensor, context: Tensor) -> Tensor:
        y = self.res(x, emb).flatten(2).transpose(1, 2)
        y = y + self.attn1(y, y)
        y = y + self.attn2(y, context)
        y = y + self.ff(y)
        return y + self.mlp["fc2"](self.mlp["fc1"](y).relu())


def weights(seed: int) -> dict[str, Tensor]:
    return {f"model.{key}": value.double() for key, value in Toy(seed).state_dict().items()}


def answer(state: dict[str, Tensor]) -> Tensor:
    toy = Toy(0).double()
    toy.load_state_dict({key.removeprefix("model."): value for key, value in state.items()})
    with torch.no_grad():
        return toy(randn(2, CHANNELS, 5, 5).double(), randn(2, 10).double(), randn(2, 7, CONTEXT).double())


def match(a: dict[str, Tensor], b: dict[str, Tensor]) -> Matching:
    return prepare(list(a), lambda key: [a[key], b[key]])


def merged(a: dict[str, Tensor], b: dict[str, Tensor], alpha: float) -> dict[str, Tensor]:
    state = match(a, b)
    return {key: weight_matching(a[key], b[key], state=state, key=key, alpha=alpha) for key in a}


def test_weight_matching_preserves_what_b_computes() -> None:
    a, b = weights(1), weights(2)
    matched = merged(a, b, 1.0)
    assert match(a, b).groups == match(a, b).moved == 5
    moved = {key for key in b if not torch.equal(matched[key], b[key])}
    assert len(moved) == 4 + 4 + 3 + 3 + 7
    close(answer(matched), answer(b), 1e-9)
    before = sum(float((a[key] - b[key]).square().sum()) for key in a)
    after = sum(float((a[key] - matched[key]).square().sum()) for key in a)
    assert after < before


def test_weight_matching_with_a_renumbered_copy_gives_a_back() -> None:
    a = weights(1)
    copy = merged(weights(2), a, 1.0)  # a renumbered, as far as it may be
    assert match(a, copy).moved == 5
    for alpha in (0.5, 1.0):
        for key, value in merged(a, copy, alpha).items():
            torch.testing.assert_close(value, a[key], rtol=1e-12, atol=1e-12)


def test_weight_matching_of_fine_tunes_is_the_weighted_sum_and_says_so() -> None:
    a = weights(1)
    b = {key: value + 0.01 * torch.randn_like(value) for key, value in a.items()}
    state = match(a, b)
    assert (state.groups, state.moved) == (5, 0)
    assert "match already" in str(state)
    for key, value in merged(a, b, 0.3).items():
        assert torch.equal(value, torch.lerp(a[key], b[key], 0.3))


@pytest.mark.parametrize(
    ("extra", "left"),
    [
        ("model.attn1.norm_q.weight", {"attn1"}),  # q and k are normalised: their dimensions are not free
        ("model.attn2.to_q.bias", {"attn2"}),
    ],
)
def test_attention_of_other_families_is_left_alone(extra: str, left: set[str]) -> None:
    a, b = weights(1), weights(2)
    a[extra] = b[extra] = torch.zeros(CHANNELS)
    moved = {key.split(".")[1] for key in match(a, b).orders}
    assert moved == {"res", "attn1", "attn2", "ff", "mlp"} - left


def test_nothing_to_match_is_the_weighted_sum() -> None:
    a, b = {"x": randn(3)}, {"x": randn(3, seed=1)}
    assert "no hidden units" in str(match(a, b))
    close(merged(a, b, 0.5)["x"], (a["x"] + b["x"]) / 2)
