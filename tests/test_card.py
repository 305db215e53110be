"""sdops.card: a method's card comes from its text, without importing it."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from textwrap import dedent

import pytest

from sdops import card as module
from sdops.card import Knob, card, cards, find, method_name
from sdops.errors import UsageError


def write(folder: Path, text: str, name: str = "blend") -> Path:
    path = folder / f"{name}.py"
    path.write_text(dedent(text), encoding="utf-8")
    return path


FULL = '''
    """Blend them."""
    import does_not_exist
    EXECUTION = "ranked"

    def window(numel, *, density: float = 0.2, alpha: float = 9.0):
        """Ranks.

        Args:
            density: Share kept.
        """

    def blend(
        base, *models, kept, key,
        alpha: float = 0.5, steps: int = -3, exact: bool = True, mode: Literal["row", "column"] = "row",
        weights: tuple[float, ...] = (), tag: str = "x",
    ):
        """base + alpha stuff.

        Source: nobody.

        Args:
            alpha: How much,
                and more: of it.
            steps (-3 or more): Count.
            mode: Direction.

        Raises:
            UsageError: never.
        """
'''


def test_a_whole_card(tmp_path: Path) -> None:
    found = card(write(tmp_path, FULL))
    assert (found.name, found.summary, found.execution) == ("blend", "Blend them", "ranked")
    assert (found.base, found.inputs, found.needs) == (True, ["*models"], {"kept", "key"})
    assert {knob.name: knob for knob in found.knobs} == {
        "alpha": Knob("alpha", "float", 0.5, (), "How much, and more: of it."),
        "steps": Knob("steps", "int", -3, (), "Count.", "-3 or more"),
        "exact": Knob("exact", "bool", True, (), ""),
        "mode": Knob("mode", "str", "row", ("row", "column"), "Direction."),
        "weights": Knob("weights", "floats", (), (), ""),
        "tag": Knob("tag", "str", "x", (), ""),
        "density": Knob("density", "float", 0.2, (), "Share kept."),
    }
    assert found.doc.startswith("base + alpha stuff.\n\nSource: nobody.")
    assert "How much" not in found.doc
    assert "UsageError: never." in found.doc


def test_gram_methods_name_their_inputs_in_a_literal(tmp_path: Path) -> None:
    text = '"""S."""\nEXECUTION = "gram"\nINPUTS = "base, a, b"\ndef blend(gram):\n    "f"\n'
    found = card(write(tmp_path, text))
    assert (found.base, found.inputs, found.needs) == (True, ["a", "b"], set())


@pytest.mark.parametrize(
    ("signature", "complaint"),
    [
        ("def other(a): ...", "defines no function `blend`"),
        ("def blend(a, *, alpha: float): ...", "`alpha` needs an annotation and a literal default"),
        ("def blend(a, *, alpha=1.0): ...", "`alpha` needs an annotation and a literal default"),
        ("def blend(a, *, alpha: list[int] = 1): ...", "no option can express"),
        ("def blend(a, *, alpha: float = pi): ...", "malformed"),
        (
            "def blend(a, *, n: int = 1):\n    '''F.\n\n    Args:\n        n (positive): N.\n    '''",
            "`positive`; write",
        ),
    ],
)
def test_a_broken_file_is_named(tmp_path: Path, signature: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        card(write(tmp_path, signature))


def test_a_range_includes_its_ends() -> None:
    knob = Knob("alpha", "float", 0.5, range="-0.5 to 1")
    assert [knob.allows(value) for value in (-0.51, -0.5, 1, 1.01, float("nan"))] == [False, True, True, False, False]
    knob = Knob("rank", "int", 5, range="0 or more")
    assert [knob.allows(value) for value in (-1, 0, 10**9)] == [False, True, True]
    assert Knob("alpha", "float", 0.5).allows(-1e300)


def test_names_are_normalised() -> None:
    assert method_name("weighted-sum") == method_name("Weighted_Sum ") == "weighted_sum"
    assert find("weighted-sum") == cards()["weighted_sum"]


@pytest.mark.parametrize("name", ["weigthed-sum", "zzzzzz", "../card", "__init__", ""])
def test_an_unknown_method_is_a_usage_error(name: str) -> None:
    with pytest.raises(UsageError) as caught:
        find(name)
    assert f"`{name}`" in caught.value.message
    assert caught.value.hint == "`sdops methods` lists them"
    assert caught.value.data == {"method": name}
    assert ("did you mean `weighted-sum`" in caught.value.message) == (name == "weigthed-sum")


def test_the_whole_shelf_is_read_in_a_blink() -> None:
    best = min(_seconds() for _ in range(3))
    assert best < 0.06 * max(1, len(module.names()) / 45) * 4  # four times the aim: shared test machines


def _seconds() -> float:
    module.card.cache_clear()
    module.cards.cache_clear()
    start = time.perf_counter()
    cards()
    return time.perf_counter() - start


def test_no_torch_and_no_numpy() -> None:
    code = "import sys, sdops.card as c; c.cards(); sys.exit(any(m in sys.modules for m in ('torch', 'numpy')))"
    subprocess.run([sys.executable, "-c", code], check=True)
