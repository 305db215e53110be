"""PEFT folders as the output of every verb: complete or not there, and read again with the same alphas."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import sdops
from fixtures import loras
from sdops.core.sink_shards import BytesSink
from sdops.errors import OutputError, UsageError
from sdops.verbs._adapters import open_adapter
from tests.dialects.helpers import assert_same_deltas

STEM = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"


def lora(folder: Path, alpha: float = 3.0) -> Path:
    """Rank 2 and another alpha, which a folder of PEFT has in its configuration alone."""
    rng = np.random.default_rng(0)
    arrays = {
        f"{STEM}.lora_up.weight": rng.standard_normal((320, 2)).astype(np.float16),
        f"{STEM}.lora_down.weight": rng.standard_normal((2, 768)).astype(np.float16),
        f"{STEM}.alpha": np.array(alpha, np.float32),
    }
    return loras.save(folder / "x.safetensors", arrays)


def make(verb: str, file: Path, output: Path | None, **options: bool) -> str:
    """The output as the report names it."""
    if verb == "convert":
        report = sdops.convert(file, to="peft", output=output, **options)
    elif verb == "resize":
        report = sdops.resize(file, to="peft", output=output, **options)
    else:
        half = {"weights": (0.5, 0.5), "dtype": "fp32"}
        report = sdops.merge(file, file, method="concat", to="peft", output=output, **half, **options)
    return report.result[0]


@pytest.mark.parametrize("verb", ["convert", "resize", "merge"])
def test_a_folder_holds_both_files_and_the_alpha(verb, tmp_path):
    file, folder = lora(tmp_path), tmp_path / "made"
    assert make(verb, file, folder) == str(folder)
    assert sorted(path.name for path in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    assert_same_deltas(open_adapter(file), open_adapter(folder))
    with pytest.raises(OutputError, match="exists already"):
        make(verb, file, folder)
    make(verb, file, folder, force=True)
    with pytest.raises(UsageError, match="are folders"):
        make(verb, file, tmp_path / "made.safetensors")


@pytest.mark.parametrize("new", [True, False])
def test_a_failure_leaves_nothing_behind(new, tmp_path, monkeypatch):
    file, folder = lora(tmp_path), tmp_path / "made"
    if not new:
        folder.mkdir()

    def fails(_self: BytesSink) -> Path:
        raise OutputError("no", hint="none")

    monkeypatch.setattr(BytesSink, "publish", fails)
    with pytest.raises(OutputError):
        make("convert", file, folder)
    assert list(folder.iterdir()) == [] if not new else not folder.exists()


def test_weights_never_come_without_their_configuration(tmp_path, monkeypatch):
    file, folder = lora(tmp_path), tmp_path / "made"
    monkeypatch.setattr("sdops.core.sink.SafetensorsSink.publish", lambda _self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        make("convert", file, folder)
    assert not folder.exists()
