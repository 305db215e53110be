"""Methods that are not linear, in portions: the same as the function on whole tensors, in any range and order.

core.taped and core.gram make no difference to core.stream here: what elementwise methods do is compared both ways.
"""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sdops.card import Card, cards
from sdops.core import gram, native, taped
from sdops.core import stream as module
from sdops.core.budget import Budget
from sdops.core.merged import Merged
from sdops.core.method import Method, load
from sdops.core.noise import Noise
from sdops.core.plan import Input, Plan, Step, Steps
from sdops.core.source import read
from sdops.core.spec import Spec
from sdops.errors import FormatError, UsageError
from tests.merges import whole
from tests.tiny import Memory, Model, encoded, numbers

CARDS = {name: card for name, card in cards().items() if card.execution != "linear"}
ROWWISE = ["nuslerp_rows", "della", "extract_similar", "model_stock_rows"]
ONE_OF_EACH = ["train_difference", "dare_ties", "euclidean_add_difference", "slerp", "ties", "della", "rotate"]


def models(shape: tuple[int, ...], count: int, dtype: str = "F32", seed: int = 0) -> list[Model]:
    rng = np.random.default_rng(seed)
    base = rng.standard_normal(shape)
    return [{"w": encoded(base + 0.1 * rng.standard_normal(shape), dtype)} for _ in range(count)]


def tied(given: list[Model]) -> list[Model]:
    """The same in steps of 1/8: many changes are of one size, and their order matters."""
    return [{"w": encoded(np.round(numbers(model["w"]) * 8) / 8, model["w"][0])} for model in given]


def count(card: Card) -> int:
    return int(card.base) + (3 if card.inputs == ["*models"] else len(card.inputs))


def streamed(card: Card, given: list[Model], dtype: str = "F32", seed: int = 7, **knobs: Any) -> Merged:
    sources = [Memory(model, name) for model, name in zip(given, "abcdef", strict=False)]
    steps = {}
    for key, spec in sources[0].specs.items():
        inputs = tuple(Input(source, key, index) for index, source in enumerate(sources))
        steps[key] = Step(Spec(dtype, spec.shape), "merge", inputs, knobs)
    method = load(f"sdops.merges.{card.name}", card.execution, card.needs)
    return Merged(Plan("out", Steps(steps)), method, seed=seed)


def expected(card: Card, given: list[Model], monkeypatch: pytest.MonkeyPatch, **knobs: Any) -> Any:
    monkeypatch.setattr(whole, "Noise", lambda offset, **_: Noise(7, "w", offset))
    inputs = [torch.from_numpy(numbers(model["w"])).float() for model in given]
    return whole.merge(card, inputs, knobs).numpy()


@pytest.fixture
def portions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Portions of 64 elements, so that small tensors have many."""
    small_portions(monkeypatch)


def small_portions(patch: pytest.MonkeyPatch) -> None:
    for part, name in ((module, "PORTION"), (taped, "PORTION"), (gram, "PIECE")):
        patch.setattr(part, name, 64)


@pytest.fixture(params=["compiled", "torch"])
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With compiled code and without."""
    if request.param == "torch":
        monkeypatch.setattr(native, "library", lambda: None)
    return str(request.param)


IN_PORTIONS = [
    (name, engine)
    for name, card in CARDS.items()
    for engine in ("compiled", "torch")
    if card.execution in ("elementwise", "gram") or (card.execution in ("ranked", "rows") and engine == "torch")
]


@pytest.mark.parametrize("shape", [(41, 37), (3, 700), (1000,), (50, 2, 3, 3), (1,), ()], ids=str)
@pytest.mark.parametrize(("name", "engine"), IN_PORTIONS, indirect=["engine"])
def test_portions_make_up_the_whole(
    name: str, shape: tuple[int, ...], engine: str, portions: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = CARDS[name]
    given = models(shape, count(card))
    out = np.frombuffer(read(streamed(card, given), "w"), "f4").reshape(shape)
    if card.execution in ("elementwise", "ranked") and "gram" not in card.needs:
        assert np.array_equal(out, expected(card, given, monkeypatch))
    else:
        np.testing.assert_allclose(out, expected(card, given, monkeypatch), rtol=3e-6, atol=3e-6)


@pytest.mark.parametrize("name", ONE_OF_EACH)
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_any_ranges_in_any_order(name: str, data: st.DataObject) -> None:
    """A merge of this merge reads as it likes."""
    with pytest.MonkeyPatch.context() as patch:
        small_portions(patch)
        card = CARDS[name]
        given_models = tied(models((29, 17), count(card), "F16"))
        all_bytes = bytes(read(streamed(card, given_models, "F16"), "w"))
        source = streamed(card, given_models, "F16")
        for _ in range(4):
            first = data.draw(st.integers(0, 29 * 17 - 1))
            length = data.draw(st.integers(1, 29 * 17 - first))
            buffer = bytearray(2 * length)
            source.read_into("w", 2 * first, memoryview(buffer))
            assert buffer == all_bytes[2 * first : 2 * (first + length)]


@pytest.mark.parametrize("name", ROWWISE)
def test_portions_of_row_methods_are_whole_rows(name: str, portions: None) -> None:
    source = streamed(CARDS[name], models((10, 20), count(CARDS[name])))
    assert source.piece_bytes("w") == 3 * 20 * 4
    wide = streamed(CARDS[name], models((2, 100), count(CARDS[name])))
    assert wide.piece_bytes("w") == 100 * 4


@pytest.mark.parametrize("name", [name for name, card in CARDS.items() if card.execution == "ranked"])
def test_held_scores_and_histograms_keep_the_same(name: str, portions: None, monkeypatch: pytest.MonkeyPatch) -> None:
    given_models = tied(models((30, 30), count(CARDS[name])))
    results = []
    for held in (0, 1 << 23):
        monkeypatch.setattr(module, "HELD_SCORES", held)
        results.append(bytes(read(streamed(CARDS[name], given_models, density=0.3), "w")))
    assert results[0] == results[1]


def test_tensors_that_need_a_first_pass_belong_to_one_thread() -> None:
    for name, card in CARDS.items():
        alone = card.execution != "elementwise" or "gram" in card.needs
        assert streamed(card, models((2, 2), count(card))).splits("w") != alone, name


def test_what_is_made_of_such_tensors_belongs_to_one_thread_as_well() -> None:
    from sdops.core.views import Renamed

    inner = streamed(CARDS["ties"], models((2, 2), 4))
    renamed = Renamed(inner, {"new": "w"})
    steps = Steps({"new": Step(inner.specs["w"], "copy", (Input(renamed, "new", 0),))})
    assert not Merged(Plan("outer", steps), load("sdops.merges.weighted_sum", "linear", frozenset())).splits("new")


@pytest.mark.parametrize("held", [0, 1 << 23])
@pytest.mark.parametrize("name", ["slerp", "ties", "model_stock", "breadcrumbs"])
def test_passes_are_made_once_and_forgotten(
    name: str, held: int, portions: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "HELD_SCORES", held)
    card = CARDS[name]
    source = streamed(card, models((30, 30), count(card)))
    read(source, "w")
    nbytes = 30 * 30 * 4
    sources = [item.source for item in source.plan.steps["w"].inputs]
    passes = {"gram": 2, "ranked": 2 if held else 3}[card.execution]
    samples = nbytes if card.execution == "gram" else 0  # the first piece is read again to measure what is retained
    assert all(passes * nbytes <= s.reads["w"] <= passes * nbytes + samples for s in sources)
    assert not len(source.engine("w").passes)


@pytest.mark.parametrize("name", ["slerp", "nuslerp", "karcher", "geometric_median", "model_stock", "nuslerp_task"])
def test_averages_of_equal_models_are_exact(name: str) -> None:
    given = models((40, 5), 1, "F64") * count(CARDS[name])
    assert bytes(read(streamed(CARDS[name], given, "F64"), "w")) == given[0]["w"][1].tobytes()
    uneven = {"weights": (0.1, 0.2, 0.3)} if name in ("karcher", "geometric_median") else {}
    assert bytes(read(streamed(CARDS[name], given, "F64", **uneven), "w")) == given[0]["w"][1].tobytes()


def test_a_float64_input_makes_all_of_them_float64() -> None:
    given = [*models((9, 9), 1, "F64", seed=1), *models((9, 9), 1, "F16", seed=2)]
    for name in ("nearswap", "tensor_sum", "nuslerp_rows", "crossover"):
        assert np.isfinite(np.frombuffer(read(streamed(CARDS[name], given, "F64"), "w"), "f8")).all()


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_nan_is_named(name: str, engine: str) -> None:
    given = models((9, 9), count(CARDS[name]))
    given[1]["w"][1][3, 3] = np.nan
    with pytest.raises(FormatError, match="`w` of `b` holds 1 NaN value"):
        read(streamed(CARDS[name], given), "w")


def _division(a: torch.Tensor, b: torch.Tensor, *, alpha: float = 1.0) -> torch.Tensor:
    return alpha * a / b


def division(given: list[Model], dtype: str) -> Merged:
    plan = streamed(CARDS["nearswap"], given, dtype).plan
    return Merged(plan, Method("division", "elementwise", frozenset(), _division))


def test_results_that_are_no_numbers_are_refused(engine: str) -> None:
    given: list[Model] = [{"w": encoded([1.0, 2.0], "F16")}, {"w": encoded([0.0, 1.0], "F16")}]
    with pytest.raises(FormatError, match="`division` made values of `w` that are not finite"):
        read(division(given, "F32"), "w")


def test_overflow_is_clamped_and_counted(engine: str) -> None:
    given: list[Model] = [{"w": encoded([6e4, -6e4, 1.0], "F16")}, {"w": encoded([0.5, 0.5, 1.0], "F16")}]
    source = division(given, "F16")
    assert np.frombuffer(read(source, "w"), "f2").tolist() == [65504.0, -65504.0, 1.0]
    assert source.overflows == {"w": 2}


def test_knobs_are_tried_on_nothing() -> None:
    for name, card in CARDS.items():
        source = streamed(card, models((4, 4), count(card)))
        source.check_knobs()
        assert not any(item.source.reads for item in source.plan.steps["w"].inputs), name
    with pytest.raises(UsageError, match="`density` is 2"):
        streamed(CARDS["ties"], models((4, 4), 3), density=2.0).check_knobs()
    with pytest.raises(UsageError, match="5 numbers for 3 models"):
        streamed(CARDS["karcher"], models((4, 4), 3), weights=(1.0,) * 5).check_knobs()


def test_the_budget_lets_in_what_fits_and_always_one() -> None:
    budget, order = Budget(100), []
    entered = threading.Event()

    def second() -> None:
        with budget.hold(60):
            order.append("second")
        entered.set()

    with budget.hold(1000):  # alone, however large
        pass
    with budget.hold(60):
        thread = threading.Thread(target=second)
        thread.start()
        with budget.hold(40):
            assert not entered.wait(0.05)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]
