"""Views against torch and against what they promise."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sdops.core.fp8 import fp8_values
from sdops.core.source import read
from sdops.core.spec import Spec
from sdops.core.views import Dequantised, Renamed, WithChannels
from sdops.errors import FormatError


class Memory:
    """Tensors in memory as a Source."""

    def __init__(self, tensors: dict[str, torch.Tensor], name: str = "memory") -> None:
        names = {torch.float32: "F32", torch.float16: "F16", torch.float8_e4m3fn: "F8_E4M3", torch.uint8: "U8"}
        self.name = name
        self.metadata: dict[str, str] = {}
        self.specs = {k: Spec(names[t.dtype], tuple(t.shape)) for k, t in tensors.items()}
        self._data = {k: t.contiguous().view(-1).view(torch.uint8).numpy().tobytes() for k, t in tensors.items()}

    def read_into(self, key: str, start: int, buffer: memoryview) -> None:
        buffer[:] = self._data[key][start : start + len(buffer)]

    def close(self) -> None:
        pass


def values(source: object, key: str, dtype: type = np.float32) -> np.ndarray:
    return np.frombuffer(read(source, key), dtype).reshape(source.specs[key].shape)  # type: ignore[attr-defined,arg-type]


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("F8_E4M3", torch.float8_e4m3fn),
        ("F8_E5M2", torch.float8_e5m2),
        ("F8_E4M3FNUZ", torch.float8_e4m3fnuz),
        ("F8_E5M2FNUZ", torch.float8_e5m2fnuz),
    ],
)
def test_every_fp8_code(name: str, dtype: torch.dtype) -> None:
    expected = torch.arange(256, dtype=torch.uint8).view(dtype).float().numpy()
    np.testing.assert_array_equal(fp8_values(name), expected)


def test_renamed_hides_what_is_not_named() -> None:
    source = Memory({"a": torch.arange(4.0), "b": torch.zeros(2)})
    view = Renamed(source, {"x": "a"})
    assert list(view.specs) == ["x"]
    assert values(view, "x").tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("channels", [4, 9])
def test_channels_are_cut_or_borrowed(channels: int) -> None:
    own, other = torch.rand(3, 13 - channels, 2, 2), torch.rand(3, channels, 2, 2)
    view = WithChannels(Memory({"w": own}), "w", Memory({"w": other}))
    expected = torch.cat([own[:, :channels], other[:, own.shape[1] :]], 1).numpy()
    np.testing.assert_array_equal(values(view, "w"), expected)


@pytest.mark.parametrize("spelling", ["scale_weight", "weight_scale"])
@pytest.mark.parametrize("shape", [(), (1,), (6, 1)])
def test_fp8_is_multiplied_by_its_scale(spelling: str, shape: tuple[int, ...]) -> None:
    weight = torch.randn(6, 5).to(torch.float8_e4m3fn)
    scale = torch.rand(shape) + 0.5
    source = Memory(
        {"l.weight": weight, f"l.{spelling}": scale, "scaled_fp8": weight[:0, 0].clone(), "l.bias": torch.ones(6)}
    )
    view = Dequantised(source)
    assert set(view.specs) == {"l.weight", "l.bias"}
    np.testing.assert_array_equal(values(view, "l.weight"), (weight.float() * scale).numpy())
    part = bytearray(8)
    view.read_into("l.weight", 4 * 7, memoryview(part))
    np.testing.assert_array_equal(np.frombuffer(part, np.float32), (weight.float() * scale).flatten()[7:9].numpy())


def test_a_scale_of_another_shape_is_refused() -> None:
    source = Memory({"l.weight": torch.zeros(6, 4).to(torch.float8_e4m3fn), "l.scale_weight": torch.ones(3, 2)[:2]})
    with pytest.raises(FormatError, match=r"l\.scale_weight"):
        Dequantised(source)
