"""Hypernetworks merged, baked into models, turned into LoRAs: against the forward pass with the network in it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import sdops
from sdops.errors import MismatchError, UsageError
from sdops.verbs._hypernet_open import open_network
from tests import examples
from tests.hypernetworks import files

hypernet = sdops.hypernet


def outputs(path, width: int, x: torch.Tensor) -> list[torch.Tensor]:
    """What a file's chains for keys and values add to contexts, by torch's modules."""
    tree = torch.load(path, weights_only=True)
    found = []
    for state in tree[width]:
        chain = files.sequential(width, tree["layer_structure"], tree["activation_func"])
        chain.load_state_dict({key.removeprefix("linear."): value for key, value in state.items()})
        with torch.no_grad():
            found.append(chain(x))
    return found


@pytest.mark.parametrize("activation", ["linear", "relu", "mish"])
@pytest.mark.parametrize("structures", [([1, 2, 1], [1, 3, 1]), ([1, 1.3, 2, 1], [1, 0.7, 1.1, 1])])
def test_a_merge_does_what_the_weighted_sum_does(activation, structures, tmp_path):
    x = {width: torch.randn(40, width) for width in (32, 48)}
    inputs, added = [], {}
    for number, (structure, widths) in enumerate(zip(structures, [(32, 48), (48,)], strict=True)):
        made = files.modules(widths, number, structure=structure, activation=activation)
        path = files.write(tmp_path / f"{number}.pt", made, layer_structure=structure, activation_func=activation)
        inputs.append(path)
        for width, pair in made.items():
            for side, module in enumerate(pair):
                part = (0.7, -0.4)[number] * module.linear(x[width]).detach()
                added[width, side] = added.get((width, side), 0) + part
    hypernet.merge(*inputs, weights=[0.7, -0.4], output=tmp_path / "sum.pt")
    for (width, side), expected in added.items():
        torch.testing.assert_close(outputs(tmp_path / "sum.pt", width, x[width])[side], expected, rtol=1e-4, atol=1e-5)


def test_linear_networks_of_any_depth_are_merged(tmp_path):
    made = [files.modules((32,), n, structure=s) for n, s in enumerate([[1, 2, 1], [1, 2, 2, 1]])]
    paths = [
        files.write(tmp_path / f"{n}.pt", m, layer_structure=s)
        for n, (m, s) in enumerate(zip(made, [[1, 2, 1], [1, 2, 2, 1]], strict=True))
    ]
    hypernet.merge(*paths, output=tmp_path / "sum.pt")
    x = torch.randn(20, 32)
    expected = sum(m[32][0].linear(x) for m in made).detach()
    torch.testing.assert_close(outputs(tmp_path / "sum.pt", 32, x)[0], expected, rtol=1e-4, atol=1e-5)


def test_hidden_units_keep_their_bits(tmp_path):
    path, made = files.relu(tmp_path)
    hypernet.merge(path, path, weights=[0.25, 0.75], output=tmp_path / "sum.pt")
    weight = torch.load(tmp_path / "sum.pt", weights_only=True)[32][0]["linear.0.weight"]
    assert torch.equal(weight[:64], made[32][0].linear[0].weight)
    assert torch.equal(weight[64:], weight[:64])


def test_strengths_stand_behind_files_or_are_weights(tmp_path):
    path, _ = files.relu(tmp_path)
    hypernet.merge(f"{path}:0.25", (path, -2), path, output=tmp_path / "a.pt", name="sum")
    hypernet.merge(path, path, path, weights=[0.25, -2, 1], output=tmp_path / "b.pt", name="sum")
    one, other = (torch.load(tmp_path / name, weights_only=True) for name in ("a.pt", "b.pt"))
    for width in open_network(path).network.pairs:
        for state, same in zip(one[width], other[width], strict=True):
            assert all(torch.equal(state[key], same[key]) for key in state)
    report = hypernet.merge(f"{path}:0.25", output=tmp_path / "c.pt", dry_run=True)
    assert report.data["weights"] == [0.25]


def test_merges_that_are_no_network_are_refused(tmp_path):
    relu, linear, deep, active = (w(tmp_path)[0] for w in (files.relu, files.linear, files.everything, files.activated))
    for pair, error in (((relu, linear), "has the activation"), ((deep, deep), "layer norms"),
                        ((active, active), "activated output")):  # fmt: skip
        with pytest.raises(MismatchError, match=error):
            hypernet.merge(*pair, output=tmp_path / "x.pt")
    with pytest.raises(UsageError, match="1 weights"):
        hypernet.merge(relu, relu, weights=[1.0], output=tmp_path / "x.pt")
    with pytest.raises(UsageError, match="given twice"):
        hypernet.merge(f"{relu}:0.5", relu, weights=[1.0, 2.0], output=tmp_path / "x.pt")
    assert not (tmp_path / "x.pt").exists()


# ------------------------------------------------------------------------------------------------ attention by itself

WIDTHS = {"attn1": 48, "attn2": 32}  # of the contexts; queries are 48 wide
HEADS = 4


def unet(folder, dtype=torch.float32) -> dict[str, torch.Tensor]:
    """Two transformer blocks' attention, with the names of the U-Nets."""
    generator = torch.Generator().manual_seed(5)
    state = {}
    for block in ("input_blocks.1.1", "middle_block.1"):
        name = f"model.diffusion_model.{block}.transformer_blocks.0"
        for attention, width in WIDTHS.items():
            for part, columns in (("to_q", 48), ("to_k", width), ("to_v", width), ("to_out.0", 48)):
                state[f"{name}.{attention}.{part}.weight"] = torch.randn(48, columns, generator=generator) / 7
            state[f"{name}.{attention}.to_out.0.bias"] = torch.randn(48, generator=generator) / 7
        state[f"{name}.norm1.weight"] = 1 + 0.2 * torch.randn(48, generator=generator)
        state[f"{name}.norm1.bias"] = 0.2 * torch.randn(48, generator=generator)
    state = {key: value.to(dtype) for key, value in state.items()}
    save_file(state, folder / "unet.safetensors")
    return state


def attend(state, name: str, x, context, modules=None, strength: float = 1.0) -> torch.Tensor:
    """One attention, with a hypernetwork in front of its keys and values."""
    k = v = context
    if modules is not None and context.shape[-1] in modules:
        k, v = (module(context, strength) for module in modules[context.shape[-1]])
    heads = [
        (inner @ state[f"{name}.{part}.weight"].T).reshape(len(x), -1, HEADS, 12).transpose(1, 2)
        for part, inner in (("to_q", x), ("to_k", k), ("to_v", v))
    ]
    mixed = torch.nn.functional.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
    return mixed @ state[f"{name}.to_out.0.weight"].T + state[f"{name}.to_out.0.bias"]


def attentions(state) -> list[str]:
    return sorted({key.removesuffix(".to_k.weight") for key in state if key.endswith(".to_k.weight")})


def cases(state):
    generator = torch.Generator().manual_seed(9)
    for name in attentions(state):
        width = WIDTHS[name[-5:]]
        x = torch.randn(2, 9, 48, generator=generator)
        yield name, x, x if name.endswith("attn1") else torch.randn(2, 11, width, generator=generator)


@torch.no_grad()
def test_a_linear_network_is_baked_in_exactly(tmp_path):
    state = unet(tmp_path)
    made = files.modules((32, 48), structure=[1, 2, 1.5, 1])
    path = files.write(tmp_path / "h.pt", made, layer_structure=[1, 2, 1.5, 1])
    hypernet.apply(tmp_path / "unet.safetensors", f"{path}:0.6", output=tmp_path / "baked.safetensors")
    baked = load_file(tmp_path / "baked.safetensors")
    for name, x, context in cases(state):
        hooked = attend(state, name, x, context, made, 0.6)
        assert (hooked - attend(state, name, x, context)).abs().max() > 1e-2
        torch.testing.assert_close(attend(baked, name, x, context), hooked, rtol=0, atol=2e-6)
    untouched = [key for key in state if "to_q" in key or "norm" in key or "to_out.0.weight" in key]
    assert all(torch.equal(state[key], baked[key]) for key in untouched)


@torch.no_grad()
def test_several_networks_act_one_behind_the_other(tmp_path):
    state = unet(tmp_path)
    first, second = files.modules((32,), 1), files.modules((32, 48), 2)
    a, b = files.write(tmp_path / "a.pt", first), files.write(tmp_path / "b.pt", second)
    hypernet.apply(tmp_path / "unet.safetensors", (a, 0.5), (b, 2.0), output=tmp_path / "baked.safetensors")
    baked = load_file(tmp_path / "baked.safetensors")
    for name, x, context in cases(state):
        both = {
            w: tuple(
                (lambda c, _strength, i=i, w=w: second[w][i](first[w][i](c, 0.5) if w in first else c, 2.0))
                for i in (0, 1)
            )
            for w in (32, 48)
        }
        expected = attend(state, name, x, context, both)
        torch.testing.assert_close(attend(baked, name, x, context), expected, rtol=0, atol=5e-6)


def test_the_bias_of_the_keys_needs_no_place_and_that_of_the_values_has_one(tmp_path):
    state = unet(tmp_path)
    files.write(tmp_path / "h.pt", files.modules((32,)))
    hypernet.apply(tmp_path / "unet.safetensors", tmp_path / "h.pt", output=tmp_path / "baked.safetensors")
    baked = load_file(tmp_path / "baked.safetensors")
    assert set(baked) == set(state)
    changed = {key for key in state if not torch.equal(state[key], baked[key])}
    assert changed == {
        f"{name}.{part}" for name in attentions(state) if name.endswith("attn2")
        for part in ("to_k.weight", "to_v.weight", "to_out.0.bias")
    }  # fmt: skip
    without = {key: value for key, value in state.items() if not key.endswith("to_out.0.bias")}
    save_file(without, tmp_path / "bare.safetensors")
    with pytest.raises(MismatchError, match="has no bias for it"):
        hypernet.apply(tmp_path / "bare.safetensors", tmp_path / "h.pt", output=tmp_path / "x.safetensors")


def test_curved_networks_are_only_fitted_on_request(tmp_path):
    state = unet(tmp_path)
    made = files.modules((48,), activation="relu", spread=0.15)
    path = files.write(tmp_path / "h.pt", made, activation_func="relu")
    with pytest.raises(MismatchError, match="is not linear") as caught:
        hypernet.apply(tmp_path / "unet.safetensors", path, output=tmp_path / "baked.safetensors")
    assert "--fit" in (caught.value.hint or "")
    report = hypernet.apply(tmp_path / "unet.safetensors", path, output=tmp_path / "baked.safetensors", fit=True)
    (facts,) = report.data["contexts"]
    assert not facts["exact"]
    assert 0.5 < facts["explained"]["k"] < 0.99
    assert any("nearest linear map" in text for text in report.warnings)
    baked = load_file(tmp_path / "baked.safetensors")
    name = attentions(state)[0]
    scale, shift = (state[f"{name[:-6]}.norm1.{part}"] for part in ("weight", "bias"))
    context = torch.randn(5000, 48) * scale + shift
    wanted = (made[48][1](context) - context).detach() @ state[f"{name}.to_v.weight"].T
    given = context @ (baked[f"{name}.to_v.weight"] - state[f"{name}.to_v.weight"]).T
    left = wanted - given - (wanted - given).mean(dim=0)
    assert float(left.square().sum() / (wanted - wanted.mean(dim=0)).square().sum()) < 0.5


def test_networks_of_other_widths_are_refused_or_told(tmp_path):
    unet(tmp_path)
    files.write(tmp_path / "h.pt", files.modules((32, 64)))
    report = hypernet.apply(tmp_path / "unet.safetensors", tmp_path / "h.pt", output=tmp_path / "x", dry_run=True)
    assert "64, which this model has no contexts of" in report.warnings[0]
    files.write(tmp_path / "o.pt", files.modules((64,)))
    with pytest.raises(MismatchError, match="contexts of 64"):
        hypernet.apply(tmp_path / "unet.safetensors", tmp_path / "o.pt", output=tmp_path / "x")
    save_file({"layer.weight": torch.zeros(2, 2)}, tmp_path / "other.safetensors")
    with pytest.raises(MismatchError, match="no attention that hypernetworks act on"):
        hypernet.apply(tmp_path / "other.safetensors", tmp_path / "h.pt", output=tmp_path / "x")


@pytest.mark.parametrize(("part", "shape"), [("to_v", (48, 33)), ("to_out.0", (48, 47))])
def test_a_model_whose_layers_do_not_fit_each_other_is_refused(part, shape, tmp_path):
    path, _ = files.linear(tmp_path)
    name = next(key for key in unet(tmp_path) if key.endswith(f"attn2.{part}.weight"))
    save_file(unet(tmp_path) | {name: torch.zeros(shape)}, tmp_path / "unet.safetensors")
    with pytest.raises(MismatchError, match=rf"`{name}` \[{shape[0]}, {shape[1]}\]"):
        hypernet.apply(tmp_path / "unet.safetensors", path, output=tmp_path / "x.safetensors")
    assert not (tmp_path / "x.safetensors").exists()


# ------------------------------------------------------------------------------------------------------------- LoRAs


@pytest.fixture
def sd1(tmp_path):
    """Enough of an SD1 to be recognised, with one block's attention whole."""
    from tests import tiny

    name = f"{tiny.UNET}input_blocks.1.1.transformer_blocks.0"
    model = tiny.checkpoint(dtype="F32", clip=False, vae=False)
    generator = np.random.default_rng(3)
    for attention, width in (("attn1", 320), ("attn2", 768)):
        for part, columns in (("to_k", width), ("to_v", width), ("to_out.0", 320)):
            model[f"{name}.{attention}.{part}.weight"] = ("F32", generator.standard_normal((320, columns), "f4") / 18)
        model[f"{name}.{attention}.to_out.0.bias"] = ("F32", generator.standard_normal(320, "f4"))
    return tiny.write(tmp_path / "sd1.safetensors", model)


def test_a_lora_of_a_linear_network_changes_a_model_as_baking_does(sd1, tmp_path):
    path = files.write(tmp_path / "h.pt", files.modules((768,), structure=[1, 0.1, 1]), layer_structure=[1, 0.1, 1])
    hypernet.apply(sd1, path, output=tmp_path / "baked.safetensors")
    report = hypernet.to_lora(path, model=sd1, output=tmp_path / "lora.safetensors", dtype="fp32")
    assert {layer["rank"] for layer in report.data["layers"]} == {76}
    assert report.data["captured"] == pytest.approx(1, abs=1e-9)
    assert any(key.endswith("to_out_0.diff_b") for key in load_file(tmp_path / "lora.safetensors"))
    sdops.apply(sd1, lora=[tmp_path / "lora.safetensors"], output=tmp_path / "applied.safetensors")
    baked, applied = load_file(tmp_path / "baked.safetensors"), load_file(tmp_path / "applied.safetensors")
    for key, value in load_file(sd1).items():
        change = baked[key] - value
        torch.testing.assert_close(applied[key] - value, change, rtol=0, atol=2e-6 * max(1, float(change.abs().max())))


def test_a_lora_may_be_cut_to_a_rank_and_says_what_that_costs(sd1, tmp_path):
    path = files.write(tmp_path / "h.pt", files.modules((768, 320)))
    whole = hypernet.to_lora(path, model=sd1, output=tmp_path / "whole.safetensors")
    assert {layer["rank"] for layer in whole.data["layers"]} == {0}  # factors would be larger
    report = hypernet.to_lora(path, model=sd1, rank=16, output=tmp_path / "cut.safetensors")
    assert {layer["rank"] for layer in report.data["layers"]} == {16}
    assert 0.05 < report.data["captured"] < 0.9
    found = load_file(tmp_path / "cut.safetensors")
    up = found["lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k.lora_up.weight"]
    assert up.shape == (320, 16)


def test_the_examples_of_the_documentation_run(sd1, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for number, name in enumerate(("style", "other")):
        made = files.modules((768,), number, structure=[1, 0.05, 1])
        files.write(tmp_path / f"{name}.pt", made, layer_structure=[1, 0.05, 1])
    sd1.rename("sd15.safetensors")
    examples.run(hypernet)
    width, inner, last = open_network("both.pt").network.structure
    assert (width, int(768 * inner), last) == (1, 2 * int(768 * 0.05), 1)  # hidden units side by side
