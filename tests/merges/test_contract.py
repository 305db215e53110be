"""One contract for every file on the shelf of merge methods: see `sdops/merges/__init__.py`."""

from __future__ import annotations

import ast
import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from sdops.card import SHELF, SUPPLIED, Card, Knob, cards, method_name
from sdops.core.linear import coefficients
from sdops.core.noise import Noise
from tests.merges.whole import KEY, gram, load, merge

CARDS = list(cards().values())
EXECUTIONS = ("linear", "elementwise", "gram", "ranked", "rows", "tensor", "model")
SHAPES = [(), (0,), (0, 3), (1,), (7,), (5, 3), (4, 1), (1, 6), (3, 2, 3, 3), (2, 1, 1, 1)]

# Values that break naive arithmetic: signed zeros, the smallest subnormal, squares that underflow, fp16's largest.
NASTY = [0.0, -0.0, 1e-45, -1e-45, 1e-30, -1e-30, 6e-8, 1.0, -1.0, 65504.0, -65504.0]

# merge(a, a, ..., a) with all knobs at their defaults is a, up to rounding; but for these, which say why not.
NOT_IDEMPOTENT = {
    "perpendicular_component": "nothing of a tensor is perpendicular to itself",
    "plus_random": "adds noise to whatever it is given",
}

each = pytest.mark.parametrize("card", CARDS, ids=lambda card: card.name)


def of(*executions: str) -> pytest.MarkDecorator:
    chosen = [card for card in CARDS if card.execution in executions]
    return pytest.mark.parametrize("card", chosen, ids=lambda card: card.name)


def count(card: Card, many: int = 3) -> int:
    """How many tensors a call takes, the base included."""
    return int(card.base) + (many if card.inputs == ["*models"] else len(card.inputs))


def random_inputs(card: Card, shape: tuple[int, ...], *, spread: float = 0.1, seed: int = 0) -> list[Tensor]:
    """A base of size 1 and fine-tunes that differ from it by `spread`."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(shape, generator=generator)
    return [base + spread * torch.randn(shape, generator=generator) for _ in range(count(card))]


# --- what the file says ---------------------------------------------------------------------------------------------


@each
def test_the_card_is_complete(card: Card) -> None:
    assert card.execution in EXECUTIONS
    assert card.inputs in (["a"], ["a", "b"], ["a", "b", "c"], ["*models"])
    assert card.summary
    assert "\n\n" in card.doc, "a formula and notes are expected"
    assert set("=+/^") & set(card.doc.partition("Source:")[0]), "a formula is expected"
    assert "Source:" in card.doc
    assert ("kept" in card.needs) == (card.execution == "ranked")
    assert ("state" in card.needs) == (card.execution == "model")
    if "gram" in card.needs or "noise" in card.needs:
        assert card.execution != "linear"
    for knob in card.knobs:
        assert knob.help.endswith("."), f"`{knob.name}` has no sentence under Args:"


@each
def test_args_name_knobs_only(card: Card) -> None:
    from sdops.card import _docstring, _split_args

    module = ast.parse((SHELF / f"{card.name}.py").read_text(encoding="utf-8"))
    described = set()
    for node in module.body:
        if isinstance(node, ast.FunctionDef) and node.name in (card.name, "window", "prepare"):
            described |= set(_split_args(_docstring(node))[1])
    assert {knob.name for knob in card.knobs} == described - SUPPLIED - {"numel", "keys", "read"}


@each
def test_the_module_agrees_with_its_card(card: Card) -> None:
    module = load(card)
    assert card.execution == module.EXECUTION
    assert callable(getattr(module, card.name))
    assert method_name(card.name) == card.name
    if card.execution == "ranked":
        assert callable(module.scores)
        assert callable(module.window)
    if card.execution == "model":
        assert callable(module.prepare)
    for knob in card.knobs:
        assert _fits(knob), knob


def _fits(knob: Knob) -> bool:
    """Whether the default is of the knob's type."""
    if knob.type == "floats":
        return knob.default == ()
    if knob.type == "float":
        return isinstance(knob.default, float)
    if knob.type == "int":
        return isinstance(knob.default, int) and not isinstance(knob.default, bool)
    return isinstance(knob.default, {"bool": bool, "str": str}[knob.type]) and (
        not knob.choices or knob.default in knob.choices
    )


def test_linear_methods_import_neither_torch_nor_numpy() -> None:
    names = [f"sdops.merges.{card.name}" for card in CARDS if card.execution == "linear"]
    code = f"import sys, {', '.join(names)}; sys.exit(any(m in sys.modules for m in ('torch', 'numpy')))"
    subprocess.run([sys.executable, "-c", code], check=True)


# --- what the function does -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@each
def test_any_shape_gives_a_finite_tensor_of_that_shape(card: Card, shape: tuple[int, ...]) -> None:
    inputs = random_inputs(card, shape)
    copies = [x.clone() for x in inputs]
    result = merge(card, inputs)
    assert result.shape == shape
    assert result.dtype == torch.float32
    assert result.isfinite().all()
    for x, copy in zip(inputs, copies, strict=True):
        assert torch.equal(x, copy), "an input was changed"
    assert torch.equal(merge(card, inputs), result), "a second run gives something else"


@each
def test_nasty_values_give_finite_results(card: Card) -> None:
    columns = np.stack(np.meshgrid(*[NASTY] * min(3, count(card))), axis=-1).reshape(-1, min(3, count(card)))
    inputs = [torch.from_numpy(np.float32(columns[:, i % columns.shape[1]])) for i in range(count(card))]
    assert merge(card, inputs).isfinite().all()
    square = [x[: 11 * (len(x) // 11)].reshape(-1, 11) for x in inputs]
    assert merge(card, square).isfinite().all()


@each
def test_zeros_give_zeros(card: Card) -> None:
    result = merge(card, [torch.zeros(4, 3)] * count(card))
    assert result.isfinite().all()
    if card.name not in NOT_IDEMPOTENT:
        assert not result.any()


@each
def test_double_inputs_stay_double(card: Card) -> None:
    inputs = random_inputs(card, (5, 4))
    result = merge(card, [x.double() for x in inputs])
    assert result.dtype == torch.float64
    torch.testing.assert_close(result.float(), merge(card, inputs), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("shape", [(), (1,), (40,), (8, 6), (3, 2, 3, 3)], ids=str)
@each
def test_equal_models_give_themselves(card: Card, shape: tuple[int, ...]) -> None:
    if card.name in NOT_IDEMPOTENT:
        pytest.skip(NOT_IDEMPOTENT[card.name])
    a = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(merge(card, [a] * count(card)), a, rtol=2e-6, atol=2e-6)


@of("linear")
def test_linear_equal_models_give_themselves_exactly(card: Card) -> None:
    learnt = coefficients(getattr(load(card), card.name), count(card), {})
    assert sum(learnt) == 1
    a = torch.randn(100)
    assert torch.equal(merge(card, [a] * count(card)), a)


@of("linear")
def test_linear_learnt_coefficients_are_the_formula(card: Card) -> None:
    function = getattr(load(card), card.name)
    inputs = [x.double() for x in random_inputs(card, (50,))]
    learnt = [float(c) for c in coefficients(function, count(card), {})]
    expected = sum(c * x for c, x in zip(learnt, inputs, strict=True))
    size = sum(abs(c) * x.abs() for c, x in zip(learnt, inputs, strict=True))
    assert ((function(*inputs) - expected).abs() <= 2.0**-22 * size).all()


@of("elementwise", "ranked")
@pytest.mark.parametrize("cuts", [(1, 2, 3), (7, 64, 65), (33,)])
def test_elementwise_chunks_make_up_the_whole(card: Card, cuts: tuple[int, ...]) -> None:
    if card.execution == "ranked":
        pytest.skip("the window needs all scores")
    function = getattr(load(card), card.name)
    inputs = random_inputs(card, (100,))
    edges = [0, *cuts, 100]
    parts = []
    for start, end in pairwise(edges):
        extras = {"gram": gram(inputs), "noise": Noise(seed=0, key=KEY).at(start)}
        parts.append(function(*(x[start:end] for x in inputs), **{k: v for k, v in extras.items() if k in card.needs}))
    assert torch.equal(torch.cat(parts), merge(card, inputs))


@of("ranked")
def test_ranked_scores_are_elementwise_and_ordered_as_bits(card: Card) -> None:
    inputs = random_inputs(card, (64,))
    scores = load(card).scores(*inputs)
    assert scores.dtype == torch.float32
    assert scores.dim() == 2
    assert scores.shape[1] == 64
    assert (scores >= 0).all()
    parts = [load(card).scores(*(x[s : s + 16] for x in inputs)) for s in range(0, 64, 16)]
    assert torch.equal(torch.cat(parts, dim=1), scores)


@of("ranked")
@pytest.mark.parametrize("numel", [1, 2, 3, 10, 1001])
def test_ranked_windows_lie_in_the_tensor(card: Card, numel: int) -> None:
    first, last = load(card).window(numel)
    assert 0 <= first <= last <= numel


@of("rows")
@pytest.mark.parametrize("shape", [(6, 5), (6, 2, 3, 3)], ids=str)
def test_rows_on_their_own_make_up_the_whole(card: Card, shape: tuple[int, ...]) -> None:
    inputs = random_inputs(card, shape)
    size = inputs[0][0].numel()
    rows = [merge(card, [x[i : i + 1] for x in inputs], offset=i * size) for i in range(shape[0])]
    torch.testing.assert_close(torch.cat(rows), merge(card, inputs), rtol=1e-6, atol=1e-6)


@of("gram")
def test_gram_coefficients_are_one_double_per_input(card: Card) -> None:
    inputs = random_inputs(card, (30,))
    found = getattr(load(card), card.name)(gram(inputs))
    assert found.shape == (count(card),)
    assert found.dtype == np.float64
