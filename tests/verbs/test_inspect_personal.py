"""`sdops inspect` answers for what personalisation leaves behind, too."""

from __future__ import annotations

import pytest
import torch

import sdops
from sdops.errors import FormatError
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
