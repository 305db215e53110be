"""A good file cut anywhere or with any byte changed is read, or refused with an error that users understand."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sdops.core.source import read
from sdops.errors import SdopsError
from sdops.formats import open_source
from tests.formats.writers import WRITERS, sample

fuzz = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@pytest.fixture(scope="module", params=list(WRITERS))
def sound(request, tmp_path_factory):
    """What to open, the file to damage, and its sound content."""
    path = WRITERS[request.param](tmp_path_factory.mktemp("model"), sample())
    victims = [file for file in path.parent.rglob("*") if file.suffix in (".safetensors", ".ckpt", ".json")]
    return path, [(file, file.read_bytes()) for file in sorted(victims)]


def attempt(path: Path, victim: Path, content: bytes, damaged: bytes) -> None:
    victim.write_bytes(damaged)
    refusal = SdopsError("none", hint="none")
    try:
        read_all(path)
    except SdopsError as error:
        refusal = error
    finally:
        victim.write_bytes(content)
    assert refusal.message
    assert refusal.hint


def read_all(path: Path) -> None:
    source = open_source(path)
    try:
        for key in source.specs:
            read(source, key)
        source.check_unchanged()
    finally:
        source.close()


@fuzz
@given(data=st.data())
def test_cut_anywhere(sound, data):
    path, victims = sound
    victim, content = data.draw(st.sampled_from(victims))
    attempt(path, victim, content, content[: data.draw(st.integers(0, len(content) - 1))])


@fuzz
@given(data=st.data())
def test_bytes_changed(sound, data):
    path, victims = sound
    victim, content = data.draw(st.sampled_from(victims))
    damaged = bytearray(content)
    for position, value in data.draw(
        st.lists(st.tuples(st.integers(0, len(content) - 1), st.integers(0, 255)), min_size=1, max_size=4)
    ):
        damaged[position] = value
    attempt(path, victim, content, bytes(damaged))


@fuzz
@given(data=st.data())
def test_a_part_moved(sound, data):
    """A piece of the file copied over another: headers and pickles with sound words in wrong places."""
    path, victims = sound
    victim, content = data.draw(st.sampled_from(victims))
    length = data.draw(st.integers(1, 40))
    source, target = (data.draw(st.integers(0, max(len(content) - length, 0))) for _ in range(2))
    damaged = content[:target] + content[source : source + length] + content[target + length :]
    attempt(path, victim, content, damaged)
