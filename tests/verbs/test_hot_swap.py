"""LoRAs on a model in memory: what `sdops.apply` would write, any number of times, and nothing left behind."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import sdops
from fixtures import loras
from sdops.errors import FormatError, MismatchError, UsageError
from tests.verbs.test_apply import CLIP_L, CONV, DIFFUSION, FF, PROJ, Q_PROJ, SAYS_SDXL, SHAPES, TE, UNET, checkpoint
from tests.verbs.test_apply import lora_file as made_lora

STEMS = {DIFFUSION + module: SHAPES[f"{UNET}{module}.weight"] for module in (FF, CONV, PROJ)}


def as_module(tensors: Mapping[str, torch.Tensor]) -> torch.nn.Module:
    """A module whose parameters have these names."""
    root = torch.nn.Module()
    for key, tensor in tensors.items():
        module = root
        *path, last = key.split(".")
        for name in path:
            if name not in module._modules:
                module.add_module(name, torch.nn.Module())
            module = module.get_submodule(name)
        module.register_parameter(last, torch.nn.Parameter(tensor.clone()))
    return root


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().view({2: torch.int16, 4: torch.int32}[tensor.element_size()])


def different(module: torch.nn.Module, wanted: Mapping[str, torch.Tensor]) -> int:
    """Elements whose bits differ."""
    found = module.state_dict()
    assert found.keys() == wanted.keys()
    return sum(int((bits(found[key]) != bits(values)).sum()) for key, values in wanted.items())


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("models") / "half.safetensors", "F16")


@pytest.fixture
def module(path: Path) -> torch.nn.Module:
    return as_module(load_file(path))


def applied(path: Path, folder: Path, lora: list) -> dict[str, torch.Tensor]:
    sdops.apply(path, lora=lora, output=folder / "applied.safetensors", force=True)
    return load_file(folder / "applied.safetensors")


@pytest.mark.parametrize("family", loras.FAMILIES)
def test_every_family_gives_what_apply_writes(path, module, tmp_path, family):
    modules = {"lokr": [FF, PROJ], "glora": [FF, PROJ], "full": [FF, CONV], "boft": [CONV]}.get(family, [FF, CONV])
    stems = {DIFFUSION + name: SHAPES[f"{UNET}{name}.weight"] for name in modules}
    file = made_lora(tmp_path / "x.safetensors", stems, family, SAYS_SDXL)
    swap = sdops.hot_swap(module, [(file, 0.6)])
    wanted = applied(path, tmp_path, [(file, 0.6)])
    changed = {key for key, values in load_file(path).items() if not torch.equal(values, wanted[key])}
    assert set(swap.touched) == changed
    assert different(module, wanted) <= 2  # near-ties: sums in another order
    swap.restore()
    assert different(module, load_file(path)) == 0


def test_strengths_change_without_drift(path, module, tmp_path):
    files = [made_lora(tmp_path / f"{i}.safetensors", STEMS, "lora_alpha", SAYS_SDXL, seed=i) for i in range(2)]
    swap = sdops.hot_swap(module, [f"{files[0]}:0.8", files[1]])
    first = {key: tensor.detach().clone() for key, tensor in module.state_dict().items()}
    assert different(module, applied(path, tmp_path, [f"{files[0]}:0.8", files[1]])) <= 2
    addresses = [parameter.data_ptr() for parameter in module.parameters()]
    for step in range(20):
        swap.set_strengths(step / 7 - 1, "0.3, IN00-IN03=2")
    assert different(module, first) > 1000
    swap.set_strengths(0.8, 1)
    assert different(module, first) == 0
    swap.set_strengths(0, 0)
    assert different(module, load_file(path)) == 0
    assert [parameter.data_ptr() for parameter in module.parameters()] == addresses


def test_blocks_have_strengths_of_their_own(path, module, tmp_path):
    file = made_lora(tmp_path / "x.safetensors", STEMS, "lora_alpha", SAYS_SDXL)
    swap = sdops.hot_swap(module, [f"{file}:0.5, MID=0"])
    assert different(module, applied(path, tmp_path, [f"{file}:0.5, MID=0"])) <= 2
    swap.set_strengths("1:unet=0.3")
    assert different(module, applied(path, tmp_path, [f"{file}:1:unet=0.3"])) <= 2


def test_loras_are_swapped_from_the_pristine_weights(path, module, tmp_path):
    files = [
        made_lora(tmp_path / "a.safetensors", {DIFFUSION + FF: STEMS[DIFFUSION + FF]}, "dora", SAYS_SDXL, seed=1),
        made_lora(tmp_path / "b.safetensors", STEMS, "dora", SAYS_SDXL, seed=2),
    ]
    swap = sdops.hot_swap(module, [files[0]])
    for lora in ([files[1]], [files[0], files[1]], [(files[1], -0.5)]):
        swap.load(lora)
        assert different(module, applied(path, tmp_path, lora)) <= 4
    swap.load([])
    assert different(module, load_file(path)) == 0
    assert swap.touched == ()


def test_a_failed_load_leaves_everything_as_it_was(path, module, tmp_path):
    good = made_lora(tmp_path / "good.safetensors", STEMS, "lora_alpha", SAYS_SDXL)
    wrong = made_lora(tmp_path / "wrong.safetensors", {DIFFUSION + FF: (24, 12)}, "lora_alpha", SAYS_SDXL)
    nan = loras.save(tmp_path / "nan.safetensors", {key: v * float("nan") for key, v in load_arrays(good).items()})
    swap = sdops.hot_swap(module, [good])
    before = {key: tensor.detach().clone() for key, tensor in module.state_dict().items()}
    with pytest.raises(MismatchError):
        swap.load([wrong])
    with pytest.raises(FormatError):
        swap.load([nan])
    assert different(module, before) == 0
    assert [lora.name for lora in swap.loras] == ["good.safetensors"]
    swap.set_strengths(0)
    assert different(module, load_file(path)) == 0


def load_arrays(path: Path) -> dict:
    return {key: tensor.numpy() for key, tensor in load_file(path).items()}


def test_a_block_of_code_ends_with_the_pristine_weights(path, module, tmp_path):
    file = made_lora(tmp_path / "x.safetensors", STEMS, "lora_alpha", SAYS_SDXL)
    with sdops.hot_swap(module, [file]):
        assert different(module, load_file(path)) > 100
    assert different(module, load_file(path)) == 0


def test_layers_of_components_that_are_not_there_are_left_out(path, tmp_path):
    stems = {**STEMS, TE + Q_PROJ: SHAPES[f"{CLIP_L}{Q_PROJ}.weight"]}
    file = made_lora(tmp_path / "x.safetensors", stems, "lora_alpha", SAYS_SDXL)
    unet = as_module({key: tensor for key, tensor in load_file(path).items() if key.startswith(UNET)})
    swap = sdops.hot_swap(unet, [file])
    assert swap.left_out == (f"clip_l:{Q_PROJ}",)
    assert len(swap.touched) == len(STEMS)
    absent = made_lora(
        tmp_path / "y.safetensors", {DIFFUSION + "input_blocks.5.0.in_layers.2": (8, 8, 3, 3)}, metadata=SAYS_SDXL
    )
    with pytest.raises(MismatchError, match="does not have"):
        swap.load([absent, file])


def test_modules_as_diffusers_names_them(small_checkpoint, tmp_path):
    """A pipeline as a mapping of its modules, and its UNet alone."""
    folder = small_checkpoint("sd15-diffusers", dtype="F16")
    tensors = {part: load_file(next((folder / part).glob("*.safetensors"))) for part in ("unet", "text_encoder")}
    name = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    encoder = "text_model.encoder.layers.0.self_attn.q_proj"
    shapes = {
        "lora_unet_" + name.replace(".", "_"): tuple(tensors["unet"][f"{name}.weight"].shape),
        "lora_te_" + encoder.replace(".", "_"): tuple(tensors["text_encoder"][f"{encoder}.weight"].shape),
    }
    file = made_lora(tmp_path / "x.safetensors", shapes, "lora_alpha")
    modules = {part: as_module(own) for part, own in tensors.items()}
    swap = sdops.hot_swap(modules, [file])
    assert set(swap.touched) == {f"unet/{name}.weight", f"text_encoder/{encoder}.weight"}
    swap.restore()
    swap = sdops.hot_swap({"unet": modules["unet"]}, [file])
    assert swap.touched == (f"unet/{name}.weight",)
    assert swap.left_out == (f"clip_l:{encoder}",)
    parts, weight = load_file(file), tensors["unet"][f"{name}.weight"].float()
    stem = next(iter(shapes))
    delta = parts[f"{stem}.lora_up.weight"].float() @ parts[f"{stem}.lora_down.weight"].float()
    scale = float(parts[f"{stem}.alpha"]) / len(parts[f"{stem}.lora_down.weight"])
    found = dict(modules["unet"].named_parameters())[f"{name}.weight"].detach().float()
    assert torch.allclose(found, weight + scale * delta, atol=2e-4)


def test_what_cannot_be_done_is_told(module, tmp_path):
    file = made_lora(tmp_path / "x.safetensors", STEMS, "lora_alpha", SAYS_SDXL)
    swap = sdops.hot_swap(module, [file])
    with pytest.raises(UsageError, match="1 LoRAs are loaded, 2 strengths given"):
        swap.set_strengths(1, 2)
    with pytest.raises(UsageError, match="no torch module"):
        sdops.hot_swap("model.safetensors", [file])
    with pytest.raises(UsageError, match="meta device"):
        sdops.hot_swap(module.to("meta"), [file])


def test_half_precision_weights_keep_their_dtype(path, tmp_path):
    module = as_module(load_file(path)).to(torch.bfloat16)
    file = made_lora(tmp_path / "x.safetensors", STEMS, "lora_alpha", SAYS_SDXL)
    sdops.hot_swap(module, [file])
    assert {parameter.dtype for parameter in module.parameters()} == {torch.bfloat16}
