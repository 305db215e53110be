"""What is refused, and that it is refused before anything is trained: no output, no log, no modules built."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest

from sdops.core import files
from sdops.errors import FormatError, MismatchError, OutputError, SdopsError, UsageError
from sdops.training.config import Config, read
from sdops.verbs import _train_run


@pytest.fixture(autouse=True)
def nothing_is_trained(monkeypatch):
    def train(*_):
        raise AssertionError("training began")

    monkeypatch.setattr(_train_run, "train", train)


def refused(train, tmp_path, error, match, hint="", **given):
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(error, match=match) as caught:
        train(given.pop("method", "lora"), **{"force": False, **given})
    assert hint in (caught.value.hint or "")
    assert sorted(tmp_path.rglob("*")) == before


def test_pictures(train, tmp_path, circles):
    folder = tmp_path / "pictures"
    shutil.copytree(circles, folder)
    (folder / "yellow_circle_1.txt").unlink()
    refused(train, tmp_path, UsageError, "1 picture in .* no caption: `yellow_circle_1.png`", images=str(folder))
    (folder / "yellow_circle_3.png").write_bytes((folder / "yellow_circle_3.png").read_bytes()[:60])
    (folder / "yellow_circle_4.png").write_text("no picture")
    hint = "sdops dataset check"
    refused(train, tmp_path, FormatError, "2 pictures .* cannot be read: `yellow_circle_3", hint, images=str(folder))
    refused(train, tmp_path, SdopsError, "is no folder", images=str(tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    refused(train, tmp_path, UsageError, "no pictures", images=str(tmp_path / "empty"))
    refused(train, tmp_path, UsageError, "8 pictures have no mask", masks=str(tmp_path / "empty"))


def test_words(train, tmp_path):
    refused(train, tmp_path, UsageError, "no new word", method="ti")
    refused(train, tmp_path, UsageError, "no caption has the new word `it`", method="ti", tokens="it")
    refused(train, tmp_path, UsageError, "`it:0` is no new word", method="ti", tokens="it:0")


def test_models(train, tmp_path, small_checkpoint):
    refused(train, tmp_path, UsageError, "model to train on is not named", model="")
    refused(train, tmp_path, SdopsError, "no-such", model=str(tmp_path / "no-such.safetensors"))
    refused(train, tmp_path, MismatchError, "Flux", model=str(small_checkpoint("flux1-dev")))
    refused(train, tmp_path, MismatchError, "is Stable Diffusion 3, and", model=str(small_checkpoint("sd3-medium")))
    folder = small_checkpoint("sd3-medium-diffusers")
    refused(train, tmp_path, MismatchError, "has no UNet", f"sdops inspect {folder}", model=str(folder))
    refused(train, tmp_path, MismatchError, "9 channels", model=str(small_checkpoint("sd15-inpainting")))


def test_settings(train, tmp_path):
    refused(train, tmp_path, UsageError, "no key `lrr`", "`lr`", lrr=1)
    refused(train, tmp_path, UsageError, "`tokens` is not for `lora`", "ti", tokens="it")
    refused(train, tmp_path, UsageError, "`batch` cannot be 0", "from 1", batch=0)
    refused(train, tmp_path, UsageError, "`schedule` cannot be `cosin`", "`cosine`", schedule="cosin")
    refused(train, tmp_path, UsageError, "`steps` is `'many'`, not a whole number", steps="many")
    refused(train, tmp_path, UsageError, "kind of layers `atention`", "`attention`", ranks="atention=4")
    refused(train, tmp_path, UsageError, "nothing to go on with", resume=True)
    (tmp_path / "out.safetensors").write_bytes(b"")
    refused(train, tmp_path, OutputError, "exists already")


def test_settings_that_contradict_each_other_or_the_model(train, tmp_path):
    refused(train, tmp_path, UsageError, "no noise step is left", least_step=500, most_step=100)
    refused(train, tmp_path, UsageError, "no prompts", "--sample-prompts", sample_every=5)
    refused(train, tmp_path, UsageError, "predicts noise", "--prediction v", zero_terminal_snr=True)
    refused(train, tmp_path, UsageError, "`clip_skip` is 2, of this model's at most 1", clip_skip=2)
    refused(train, tmp_path, UsageError, "`resolution` is 33", "multiple of 2", resolution=33, buckets=False)
    refused(train, tmp_path, UsageError, "multiples of 64, more than", "--bucket-step 8", bucket_step=64)
    refused(train, tmp_path, UsageError, "not as `out.ckpt`", "out.safetensors", output=str(tmp_path / "out.ckpt"))
    refused(train, tmp_path, UsageError, "PEFT's adapters are folders", f"`-o {tmp_path / 'out'}`", to="peft")
    (tmp_path / "file").write_text("")
    refused(train, tmp_path, OutputError, "is no folder", "--latents", latents=str(tmp_path / "file"))


def test_a_dialect_that_cannot_hold_it_is_refused_before_the_first_step(train, tmp_path, monkeypatch):
    monkeypatch.undo()
    refused(train, tmp_path, MismatchError, "`diffusers` cannot hold", "--to kohya", family="lokr", to="diffusers")
    out = str(tmp_path / "out")
    refused(train, tmp_path, MismatchError, "`peft` cannot hold", method="dreambooth", to="peft", output=out)


def test_no_room(train, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "free_space", lambda _: 1000)
    refused(train, tmp_path, OutputError, "1.00 kB free")


def test_a_device_that_is_not_there_is_refused_before_anything_is_told(train, tmp_path, monkeypatch):
    told: list[str] = []
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    refused(train, tmp_path, UsageError, "no CUDA device", "--device cpu", device="cuda", say=told.append)
    assert not told


def test_a_file_of_settings(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text('model = "m"\nsteps = 5\n[loss]\nmin-snr = 5\n[output]\noutput = "/x/y.safetensors"\n')
    found = read("lora", file, {"steps": 7})
    assert (found.steps, found.min_snr, found.output) == (7, 5.0, "/x/y.safetensors")
    assert found.model == str(tmp_path / "m")  # paths are the file's
    file.write_text('latents = "kept"\nmasks = "alpha"\n')
    assert (read("lora", file, {}).latents, read("lora", file, {}).masks) == (str(tmp_path / "kept"), "alpha")
    for text, match in (
        ("[los]\nmin_snr = 5", r"no table `\[los\]`"),
        ("[loss]\nmin_snrr = 5", r"run.toml`, \[loss\]: there is no key `min_snrr`"),
        ("steps = 5\n[train]\nsteps = 6", "given twice"),
        ("steps = ", "no TOML"),
    ):
        file.write_text(text)
        with pytest.raises(UsageError, match=match):
            read("lora", file, {})


@pytest.mark.parametrize(
    ("method", "key"),
    [("custom-diffusion", "text_encoder"), ("custom-diffusion", "text_lr"), ("null-text", "most_tokens")],
)
def test_a_setting_that_would_do_nothing_is_refused(method, key):
    with pytest.raises(UsageError, match=f"`{key}` is not for `{method}`"):
        read(method, None, {key: True})


def test_every_setting_has_help_and_a_sound_default():
    for name, each in Config.__dataclass_fields__.items():
        assert each.metadata["help"], name
        assert not each.metadata["choices"] or each.default in each.metadata["choices"], name


@pytest.mark.parametrize("arguments", ["train --help", "train lora --help", "train ti --steps x"])
def test_help_and_mistakes_cost_no_torch(arguments):
    code = "import sys; from sdops.commands.main import main; main(sys.argv[1:]); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, *arguments.split()], check=True, capture_output=True, text=True)
    assert not {"torch", "numpy", "diffusers", "transformers"} & set(done.stdout.splitlines()[-1].split())


def test_what_is_missing_is_named_with_its_command(train, tmp_path, monkeypatch):
    import importlib.util

    plain = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "diffusers" else plain(name))
    refused(train, tmp_path, SdopsError, "diffusers, which is not installed", "pip install 'sdops[train]'")
