"""`sdops inspect` answers for what personalisation leaves behind, too."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

import sdops
from sdops.errors import FormatError
from sdops.verbs._personal_files import verb_for
from tests.commands.test_imports import modules
from tests.custom_diffusion import files as custom
from tests.embeddings import files as embeddings
from tests.hypernetworks import files as hypernetworks


@pytest.mark.parametrize(
    ("write", "verb"),
    [
        (lambda folder: hypernetworks.linear(folder)[0], "hypernet inspect"),
        (lambda folder: hypernetworks.novelai(folder)[0], "hypernet inspect"),
        (custom.adobe, "custom inspect"),
        (custom.webui_factors, "custom inspect"),
        (lambda folder: embeddings.a1111(folder)[0], "embed inspect"),
        (lambda folder: embeddings.bare_t5(folder)[0], "embed inspect"),
        (lambda folder: embeddings.null_text_list(folder)[0], "embed inspect"),
        (lambda folder: embeddings.png_chunk(folder)[0], "embed inspect"),
    ],
)
def test_inspect_knows_them(write, verb, tmp_path):
    report = sdops.inspect(write(tmp_path))
    assert report.data["files"][0]["personal"]["verb"] == verb
    assert len(report.sections) >= 1


def test_what_nobody_knows_keeps_its_error(tmp_path):
    torch.save([1, 2, 3], tmp_path / "x.pt")
    with pytest.raises(FormatError, match="holds"):
        sdops.inspect(tmp_path / "x.pt")


def test_a_damaged_one_is_told(tmp_path):
    made = hypernetworks.modules((32,))
    made[32][0].linear[0].weight.data[0, 0] = float("nan")
    with pytest.raises(FormatError, match="NaN or infinite"):
        sdops.inspect(hypernetworks.write(tmp_path / "nan.pt", made))


def test_nothing_heavy_is_imported_for_what_nobody_knows(tmp_path):
    save_file({f"layer.{number}.weight": torch.zeros(8, 8) for number in range(3)}, tmp_path / "x.safetensors")
    assert not {"torch", "numpy"} & modules("inspect", str(tmp_path / "x.safetensors"))


@pytest.mark.parametrize("writers", [embeddings.WRITERS, hypernetworks.WRITERS, custom.WRITERS])
def test_the_verb_for_every_file_is_told_by_its_structure(writers, tmp_path):
    verb = {id(embeddings.WRITERS): "embed", id(hypernetworks.WRITERS): "hypernet", id(custom.WRITERS): "custom"}
    for number, writer in enumerate(writers):
        (tmp_path / str(number)).mkdir()
        made = writer(tmp_path / str(number))
        path = made[0] if isinstance(made, tuple) else made
        moved = path.rename(path.with_name(f"{number}.bin"))
        expected = "custom" if writer.__name__.startswith("custom_diffusion") else verb[id(writers)]
        assert verb_for(moved) == expected
