"""Plans: what goes into the steps comes out again, though those that are alike are kept once."""

import numpy as np
import pytest

from sdops.core.plan import Input, Inputs, Plan, Step, Steps
from sdops.core.spec import Spec
from tests.tiny import Memory

SMALL = Spec("F16", (2,))
KNOBS = {"alpha": 0.5}


def source() -> Memory:
    small, large = np.zeros(2, np.float16), np.zeros((3, 4), np.float32)
    return Memory({"w": ("F16", small), "v": ("F16", small), "u": ("F32", large)})


def test_steps_that_are_kept_once_are_each_of_their_own_tensor() -> None:
    sources = source(), source()
    steps = Steps({})
    for key, spec in sources[0].specs.items():
        steps[key] = Step(spec, "merge", Inputs(sources, key), KNOBS)
    steps["own"] = Step(SMALL, "copy", (Input(sources[0], "w", 0),), reason="for fun")
    assert list(steps) == ["w", "v", "u", "own"]
    assert len(steps) == 4
    for key in ("w", "v", "u"):
        assert steps[key].spec == sources[0].specs[key]
        assert [(item.source, item.key, item.model) for item in steps[key].inputs] == [
            (sources[0], key, 0),
            (sources[1], key, 1),
        ]
        assert steps[key].knobs is KNOBS
    assert steps["own"].reason == "for fun"
    assert steps["own"].inputs[0].key == "w"


def test_steps_that_differ_in_anything_are_not_taken_for_each_other() -> None:
    sources = source(), source()
    other = sources[0], source()
    steps = Steps(
        {
            "w": Step(SMALL, "merge", Inputs(sources, "w"), KNOBS),
            "v": Step(SMALL, "merge", Inputs(other, "v"), KNOBS),
            "u": Step(SMALL, "merge", Inputs(sources, "u"), dict(KNOBS, alpha=0.25)),
        }
    )
    assert steps["v"].inputs[1].source is other[1]
    assert steps["w"].knobs == KNOBS
    assert steps["u"].knobs == {"alpha": 0.25}


def test_what_a_plan_tells_counts_every_tensor() -> None:
    first, second = source(), source()
    plan = Plan("out")
    for key, spec in first.specs.items():
        plan.steps[key] = Step(spec, "merge", Inputs((first, second), key), KNOBS)
    plan.steps["copied"] = Step(SMALL, "copy", (Input(first, "w", 0),))
    assert plan.count("merge") == 3
    assert plan.count("copy") == 1
    assert plan.steps.keys_of("merge") == ["w", "v", "u"]
    assert plan.write_bytes == 4 + 4 + 48 + 4
    assert plan.read_bytes == 2 * (4 + 4 + 48) + 4
    assert list(plan.steps.sources) == [first, second]
    del plan.steps["u"]
    assert "u" not in plan.steps
    assert plan.write_bytes == 12


def test_a_step_reads_tensors_of_its_own_name() -> None:
    with pytest.raises(ValueError, match="`v` would be made of tensors named `w`"):
        Steps({"v": Step(SMALL, "merge", Inputs((source(),), "w"))})
