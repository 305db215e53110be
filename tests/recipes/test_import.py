"""Recipes of mergekit, supermerger and the A1111 web UI; and what a wrong recipe is told."""

from __future__ import annotations

import json
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest

import sdops
from sdops.errors import FormatError, SdopsError, UsageError
from sdops.verbs import recipe
from sdops.verbs._recipe_check import check_recipe
from sdops.verbs._recipe_text import Recipe, parse_recipe
from tests import tiny

TIES = """
models:
  - model: org/one
    parameters: {weight: 0.5, density: 0.3}
  - model: org/two.safetensors
    parameters: {weight: 3e-1, density: 0.3}
merge_method: ties
base_model: org/base
parameters: {normalize: true, int8_mask: true}
dtype: bfloat16
"""


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_mergekit(tmp_path: Path) -> None:
    Path("m.yaml").write_text(TIES)
    found, _ = recipe.read_any(Path("m.yaml"))
    (step,) = found.steps
    assert step.arguments["method"] == "ties"
    assert step.arguments["models"] == ["one", "two_safetensors"]
    assert step.arguments["base"] == "base"
    assert step.arguments["weights"] == [0.5, 0.3]
    assert step.arguments["density"] == 0.3
    assert step.arguments["dtype"] == "bf16"
    check_recipe(found)


@pytest.mark.parametrize(
    "text", ["a: &x [1]\nb: *x", "!!python/object/apply:os.system ['x']", "[", "- 1", "models: 3", "slices: []", "x: y"]
)
def test_strange_yaml_is_refused(text: str) -> None:
    Path("m.yml").write_text(text)
    with pytest.raises((FormatError, UsageError)):
        recipe.read_any(Path("m.yml"))


# -------------------------------------------------------------------------------------------- mergekit, as published

MERGEKIT = {
    "examples/linear.yml": (
        """
models:
  - model: psmathur/orca_mini_v3_13b
    parameters:
      weight: 1.0
  - model: WizardLM/WizardLM-13B-V1.2
    parameters:
      weight: 0.3
  - model: garage-bAInd/Platypus2-13B
    parameters:
      weight: 0.5
merge_method: linear
dtype: float16
""",
        {"method": "linear", "models": ["orca_mini_v3_13b", "wizardlm_13b_v1_2", "platypus2_13b"],
         "weights": [1.0, 0.3, 0.5], "normalize": True, "dtype": "fp16"},
        [],
    ),
    "examples/ties.yml": (
        """
models:
  - model: psmathur/orca_mini_v3_13b
    parameters:
      density: [1, 0.7, 0.1] # density gradient
      weight: 1.0
  - model: garage-bAInd/Platypus2-13B
    parameters:
      density: 0.5
      weight: [0, 0.3, 0.7, 1] # weight gradient
  - model: WizardLM/WizardMath-13B-V1.0
    parameters:
      density: 0.33
      weight:
        - filter: mlp
          value: 0.5
        - value: 0
merge_method: ties
base_model: TheBloke/Llama-2-13B-fp16
parameters:
  normalize: true
  int8_mask: true
dtype: float16
""",
        {"method": "ties", "models": ["orca_mini_v3_13b", "platypus2_13b", "wizardmath_13b_v1_0"],
         "base": "llama_2_13b_fp16", "weights": [1.0, 0.5, 0.0], "density": 0.6, "normalize": True, "dtype": "fp16"},
        ["gradient", "filters", "differs between the models"],
    ),
    "examples/gradient-slerp.yml": (
        """
slices:
  - sources:
      - model: psmathur/orca_mini_v3_13b
        layer_range: [0, 40]
      - model: garage-bAInd/Platypus2-13B
        layer_range: [0, 40]
merge_method: slerp
base_model: psmathur/orca_mini_v3_13b
parameters:
  t:
    - filter: self_attn
      value: [0, 0.5, 0.3, 0.7, 1]
    - filter: mlp
      value: [1, 0.5, 0.7, 0.3, 0]
    - value: 0.5 # fallback for rest of tensors
dtype: float16
""",
        {"method": "slerp", "models": ["orca_mini_v3_13b", "platypus2_13b"], "alpha": 0.5, "dtype": "fp16"},
        ["layer_range", "filters"],
    ),
    "examples/arcee_fusion.yml": (
        """
models:
  - model: model_a
  - model: model_b
merge_method: arcee_fusion
base_model: model_a
dtype: bfloat16
""",
        {"method": "arcee-fusion", "models": ["model_b"], "base": "model_a", "dtype": "bf16"},
        [],
    ),
    "mlabonne/Daredevil-7B": (
        """
models:
  - model: mistralai/Mistral-7B-v0.1
    # No parameters necessary for base model
  - model: samir-fama/SamirGPT-v1
    parameters:
      density: 0.53
      weight: 0.4
  - model: abacusai/Slerp-CM-mist-dpo
    parameters:
      density: 0.53
      weight: 0.3
  - model: EmbeddedLLM/Mistral-7B-Merge-14-v0.2
    parameters:
      density: 0.53
      weight: 0.3
merge_method: dare_ties
base_model: mistralai/Mistral-7B-v0.1
parameters:
  int8_mask: true
dtype: bfloat16
""",
        {"method": "dare-ties", "models": ["samirgpt_v1", "slerp_cm_mist_dpo", "mistral_7b_merge_14_v0_2"],
         "base": "mistral_7b_v0_1", "weights": [0.4, 0.3, 0.3], "density": 0.53, "normalize": False, "dtype": "bf16"},
        [],
    ),
    "a card that mergekit writes, local paths": (
        """
models:
  - model: "D:/Uni/finetuned_models/meta_llama_full_colab_remerge_2"
    parameters:
      weight: 1.0
      density: 0.7
      epsilon: 0.2
  - model: "D:/Huggingface/hub/models--org--name/snapshots/221e5f92f9dc5fedaf4556b1be6b20642638643c"
    parameters:
      weight: 0.8
      density: 0.8
      epsilon: 0.1
base_model: "unsloth/Meta-Llama-3.1-8B-Instruct"
merge_method: della
dtype: bfloat16
parameters:
  lambda: 1.0
chat_template: auto
tokenizer_source: base
""",
        {"method": "della",
         "models": ["meta_llama_full_colab_remerge_2", "model_221e5f92f9dc5fedaf4556b1be6b20642638643c"],
         "base": "meta_llama_3_1_8b_instruct", "weights": [1.0, 0.8], "density": 0.7, "epsilon": 0.2, "scale": 1.0,
         "normalize": True, "dtype": "bf16"},
        ["chat_template", "tokenizer_source", "`density` differs", "`epsilon` differs"],
    ),
    "nuslerp against a base, in rows": (
        """
merge_method: nuslerp
base_model: org/base
models: [{model: org/one, parameters: {weight: 0.4}}, {model: org/output, parameters: {weight: 0.6}}]
""",
        {"method": "nuslerp-task", "models": ["one", "output_2"], "base": "base", "weights": [0.4, 0.6]},
        [],
    ),
    "sce": (
        """
merge_method: sce
base_model: org/base
models: [{model: org/one}, {model: org/two}]
parameters: {select_topk: 0.2}
""",
        {"method": "sce", "models": ["one", "two"], "base": "base", "density": 0.2},
        [],
    ),
    "nearswap": (
        "{merge_method: nearswap, base_model: o/one, models: [{model: o/one}, {model: o/two}], parameters: {t: 0.002}}",
        {"method": "nearswap", "models": ["one", "two"], "t": 0.002},
        [],
    ),
    "breadcrumbs, nothing said": (
        "{merge_method: breadcrumbs, base_model: b, models: [{model: one, parameters: {weight: 1}}, {model: two}]}",
        {"method": "breadcrumbs", "models": ["one", "two"], "base": "b", "weights": [1.0, 1.0], "density": 1.0,
         "gamma": 0.01, "normalize": False},
        [],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", MERGEKIT)
def test_published_recipes_of_mergekit(case: str) -> None:
    text, expected, told = MERGEKIT[case]
    Path("m.yml").write_text(text)
    found, warnings = recipe.read_any(Path("m.yml"))
    (step,) = found.steps
    assert step.arguments == expected
    check_recipe(found)
    assert len(warnings) >= 1 + len(told)
    for word in told:
        assert word in " ".join(warnings)
    assert told or len(warnings) == 1


def test_stacked_layers_are_refused() -> None:
    text = "slices: [{sources: [{model: a, layer_range: [0, 24]}]}, {sources: [{model: b, layer_range: [20, 40]}]}]"
    Path("m.yml").write_text(text + "\nmerge_method: passthrough\n")
    with pytest.raises(FormatError, match="stacks slices"):
        recipe.read_any(Path("m.yml"))


# ------------------------------------------------------------------------- the A1111 web UI, supermerger and the like

A, B, C, D = (sign * 64 for sign in "abcd")


def webui(**changes: object) -> dict[str, object]:
    """The recipe that A1111's modules/extras.py writes, all of it."""
    made = {
        "type": "webui",
        "primary_model_hash": A,
        "secondary_model_hash": B,
        "tertiary_model_hash": None,
        "interp_method": "Weighted sum",
        "multiplier": 0.3,
        "save_as_half": False,
        "custom_name": "",
        "config_source": 0,
        "bake_in_vae": "None",
        "discard_weights": "",
        "is_inpainting": False,
        "is_instruct_pix2pix": False,
    }
    return made | changes


def supermerger(**changes: object) -> dict[str, object]:
    """The recipe that supermerger's scripts/mergers/mergers.py writes, all of it."""
    made = {
        "type": "sd-webui-supermerger",
        "weights_alpha": None,
        "weights_beta": None,
        "weights_alpha_orig": None,
        "weights_beta_orig": None,
        "model_a": A,
        "model_b": B,
        "model_c": A,  # what stands in where none is chosen
        "base_alpha": 0.5,
        "base_beta": 0.25,
        "mode": "Weight sum",
        "mbw": False,
        "elemental_merge": "",
        "calcmode": "normal",
        "Off": [""],
    }
    return made | changes


def chattiori(**changes: object) -> dict[str, object]:
    """The recipe that Chattiori's merge.py writes."""
    made = {
        "type": "merge-model-chattiori",
        "primary_model_hash": A,
        "secondary_model_hash": B,
        "tertiary_model_hash": None,
        "merge_method": "WS",
        "block_weights": False,
        "alpha": 0.4,
        "alphas": None,
        "beta": None,
        "betas": None,
        "calculation": None,
        "save_as_half": True,
        "output_name": "merged",
        "bake_in_vae": False,
        "pruned": True,
    }
    return made | changes


WEIGHTS = [round(n / 24, 3) for n in range(25)]
XL = [0.1] * 19 + [0]
TWO, THREE = {"models": ["a", "b"]}, {"models": ["a", "b", "c"]}
WEBUI = {
    "webui": (webui(), TWO | {"method": "weighted-sum", "alpha": 0.3}),
    "difference": (
        webui(interp_method="Add difference", tertiary_model_hash=C, multiplier=1, save_as_half=True, custom_name="x",
              is_inpainting=True),
        THREE | {"method": "add-difference", "alpha": 1.0, "dtype": "fp16"},
    ),
    "vae": (
        webui(interp_method="No interpolation", secondary_model_hash=None, bake_in_vae="kl-f8-anime2.ckpt",
              discard_weights="^model_ema"),
        {"models": ["a"], "method": "average", "vae": "vae", "prune": True},
    ),
    "supermerger": (supermerger(), TWO | {"method": "weighted-sum", "alpha": 0.5}),
    "supermerger-old": (
        supermerger(mode="Add difference:A+(B-C)*alpha", model_c=C, base_alpha=0.7),
        THREE | {"method": "add-difference", "alpha": 0.7},
    ),
    "mbw": (
        supermerger(mbw=True, base_alpha=0.25, weights_alpha=WEIGHTS, weights_alpha_orig="GRAD_V"),
        TWO | {"method": "weighted-sum", "alpha": [0.25, *WEIGHTS]},
    ),
    "mbw-xl": (supermerger(mbw=True, weights_alpha=XL), TWO | {"method": "weighted-sum", "alpha": [0.5, *XL]}),
    "twice": (
        supermerger(mode="sum Twice", model_c=C, mbw=True, weights_alpha=WEIGHTS, weights_beta=WEIGHTS),
        THREE | {"method": "sum-twice", "alpha": [0.5, *WEIGHTS], "beta": [0.25, *WEIGHTS]},
    ),
    "triple": (
        supermerger(mode="Triple sum", model_c=C), THREE | {"method": "triple-sum", "alpha": 0.5, "beta": 0.25},
    ),
    "cosine": (supermerger(calcmode="cosineB"), TWO | {"method": "cosine-b", "alpha": 0.5}),
    "train": (
        supermerger(mode="Add", calcmode="trainDifference", model_c=C),
        THREE | {"method": "train-difference", "alpha": 0.5},
    ),
    "smooth": (
        supermerger(mode="Add difference", calcmode="smoothAdd MT", model_c=C),
        THREE | {"method": "smooth-add", "alpha": 0.5},
    ),
    "elemental": (
        supermerger(elemental_merge=["IN00-IN05:attn2:0.6", ""], Exclude=["IN07", "VAE", ""]),
        TWO | {"method": "weighted-sum", "alpha": "0.5, IN00-IN05:attn2:0.6, IN07=0, vae=0"},
    ),
    "chattiori": (chattiori(), TWO | {"method": "weighted-sum", "alpha": 0.4, "dtype": "fp16", "prune": True}),
    "chattiori-cosine": (
        chattiori(calculation="cosine_1", alphas=WEIGHTS, save_as_half=False, pruned=False),
        TWO | {"method": "cosine-b", "alpha": [0.4, *WEIGHTS]},
    ),
}  # fmt: skip


def read_webui(made: object, models: object) -> tuple[Recipe, list[str]]:
    metadata = {"format": "pt", "sd_merge_recipe": json.dumps(made), "sd_merge_models": json.dumps(models)}
    return recipe.read_any(tiny.write(Path("merged.safetensors"), tiny.checkpoint(1), metadata))


@pytest.mark.parametrize("case", WEBUI)
def test_what_web_uis_write(case: str) -> None:
    made, expected = WEBUI[case]
    models = {
        A: {"name": "first.safetensors", "legacy_hash": "7460a6fa", "sd_merge_recipe": None},
        B: {"name": "sub\\second.safetensors [1a189f0be6]", "legacy_hash": "8d7f8e2b"},
    }
    found, warnings = read_webui(made, models)
    (step,) = found.steps
    assert step.arguments == expected
    assert (found.inputs["a"].file, found.inputs["a"].sha256) == ("first.safetensors", A)
    assert found.inputs["a"].about == "first.safetensors"
    if "b" in found.inputs:
        assert (found.inputs["b"].file, found.inputs["b"].sha256) == ("sub/second.safetensors", B)
    if "vae" in found.inputs:
        assert (found.inputs["vae"].file, found.inputs["vae"].sha256) == ("kl-f8-anime2.ckpt", "")
    assert len(warnings) == 1
    check_recipe(found)


@pytest.mark.parametrize("as_text", [False, True])
def test_a_merge_of_merges_becomes_steps(as_text: bool) -> None:
    """The web UI adds what the merged models say of themselves, its own recipe as a table or as the text of one."""
    inner = webui(primary_model_hash=C, secondary_model_hash=D, multiplier=0.2)
    models = {
        A: {
            "name": "mixed.safetensors",
            "legacy_hash": "x",
            "sd_merge_recipe": json.dumps(inner) if as_text else inner,
        },
        B: {"name": "b.safetensors", "legacy_hash": "x", "sd_merge_recipe": webui(interp_method="Magic")},
        C: {"name": "c.safetensors", "legacy_hash": "x", "sd_merge_recipe": None},
        D: {"name": "d.safetensors", "legacy_hash": "x", "sd_merge_recipe": None},
    }
    found, warnings = read_webui(supermerger(), models)
    assert [(step.id, step.arguments["models"], step.arguments["alpha"]) for step in found.steps] == [
        ("a", ["b", "c"], 0.2),
        ("merged", ["a", "d"], 0.5),
    ]
    assert {name: one.about for name, one in found.inputs.items()} == {
        "b": "c.safetensors",
        "c": "d.safetensors",
        "d": "b.safetensors",
    }
    assert any("`mixed.safetensors` is a merge, too, and is made again" in text for text in warnings)
    assert any("`b.safetensors` is a merge, too, but has to be given" in text for text in warnings)
    check_recipe(found)


def test_a_merge_of_itself_is_refused() -> None:
    found, _ = read_webui(webui(), {A: {"name": "a", "sd_merge_recipe": webui(secondary_model_hash=A)}})
    with pytest.raises(UsageError, match="a circle"):
        check_recipe(found)


@pytest.mark.parametrize(
    "made",
    [
        {}, {"interp_method": "Magic"}, webui(secondary_model_hash=None), webui(multiplier="much"),
        supermerger(calcmode="tensor"), supermerger(calcmode="cosineA", mode="Triple sum"), "no table",
        {"type": "sd-webui-model-mixer", "model_a": "x.safetensors", "mode": ["Sum"], "calcmode": ["Normal"],
         "alpha": [0.5], "blocks": [], "mbw": True, "weights_alpha": [], "weights_alpha_orig": []},
    ],
    ids=range(8),
)  # fmt: skip
def test_merges_that_are_not_understood_are_refused(made: object) -> None:
    with pytest.raises(FormatError):
        read_webui(made, {})


def test_a_recipe_of_a_web_ui_is_built(tmp_path: Path) -> None:
    """Given the models under their names, with nothing but a folder to look in."""
    models = {}
    folder = tmp_path / "models"
    folder.mkdir()
    for name, seed in (("first", 1), ("second", 2)):
        path = tiny.write(folder / f"{name}.safetensors", tiny.checkpoint(seed))
        models[sha256(path.read_bytes()).hexdigest()] = {"name": path.name, "legacy_hash": "x"}
    a, b = models
    made = supermerger(model_a=a, model_b=b, mbw=True, base_alpha=0.25, weights_alpha=WEIGHTS)
    found, _ = read_webui(made, models)
    sdops.build(found, output="again.safetensors", root=[folder])
    sdops.merge(
        folder / "first.safetensors", folder / "second.safetensors", alpha=[0.25, *WEIGHTS], output="x.safetensors"
    )
    again, expected = (tiny.load(Path(name)) for name in ("again.safetensors", "x.safetensors"))
    assert all(np.array_equal(again[key][1], expected[key][1]) for key in expected)


MERGE = '[inputs]\na = "a.safetensors"\nb = "b.safetensors"\n[[steps]]\nverb = "merge"\nmodels = ["a", "b"]\n'


@pytest.mark.parametrize(
    ("text", "path", "hint"),
    [
        (MERGE + "alhpa = 0.3", "steps.1.alhpa", "alpha"),
        (MERGE.replace('"merge"', '"mrege"'), "steps.1.verb", "merge"),
        (MERGE + 'method = "weighted-smu"', "steps.1.method", ""),
        (MERGE + 'missing = "kepe"', "steps.1.missing", "keep"),
        (MERGE + "prune = 1", "steps.1.prune", ""),
        (MERGE + "jobs = 4", "steps.1.jobs", "build"),
        (MERGE.replace('["a", "b"]', '["a", "bb"]'), "steps.1.models.2", "b"),
        (MERGE.replace('["a", "b"]', '["a"]') + '\nmethod = "slerp"', "steps.1.models", "slerp"),
        (MERGE + 'method = "ties"', "steps.1.base", "base"),
        (MERGE + 'method = "truncate-rank"\nrank = 0.5', "steps.1", ""),
        (MERGE + 'alpha = "$alhpa"\n[parameters]\nalpha = 0.5', "steps.1.alpha", "alpha"),
        (MERGE + 'output = "../x"', "steps.1.output", ""),
        (MERGE + '[[steps]]\nverb = "merge"\nmodels = ["a", "b"]', "steps.1", "output"),
        (MERGE + '[inputz]\na = "x"', "inputz", "inputs"),
        ('[inputs]\nset = "x"\n' + MERGE.partition("\n")[2], "inputs.set", ""),
        (MERGE + "[parameters]\nx = { default = 2, range = [0, 1] }", "parameters.x.default", ""),
    ],
)
def test_wrong_recipes_are_told_where_and_what_was_meant(text: str, path: str, hint: str) -> None:
    with pytest.raises(UsageError) as caught:
        check_recipe(parse_recipe(text, name="r"))
    assert str(caught.value.data["path"]).startswith(path)
    assert hint in f"{caught.value.message} {caught.value.hint}"


def test_circles_and_endless_records_are_refused() -> None:
    circle = '[[steps]]\nid = "x"\nverb = "merge"\nmodels = ["y", "y"]\n'
    circle += '[[steps]]\nid = "y"\nverb = "merge"\nmodels = ["x", "x"]\n'
    with pytest.raises(UsageError, match="a circle"):
        check_recipe(parse_recipe(circle, name="r"))
    deep = '[inputs]\ns0 = "a"\n' + "".join(
        f'[[steps]]\nid = "s{n}"\nverb = "merge"\nmodels = ["s{n - 1}", "s{n - 1}"]\n' for n in range(1, 60)
    )
    with pytest.raises(UsageError, match="times over"):
        check_recipe(parse_recipe(deep, name="r"))


def test_nothing_is_imported_to_check_a_recipe(tmp_path: Path) -> None:
    import subprocess
    import sys

    Path("r.toml").write_text(MERGE + "alhpa = 0.3")
    code = "import sys; from sdops.commands.main import main; main(sys.argv[1:]); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, "build", "r.toml"], check=True, capture_output=True, text=True)
    assert "steps.1.alhpa" in done.stderr
    assert not {"torch", "numpy", "sdops.verbs.merge"} & set(done.stdout.split())


def test_what_is_no_recipe_is_told() -> None:
    for name, text in (("x.toml", "not toml"), ("y.toml", ""), ("z.toml", "steps = 3")):
        Path(name).write_text(text)
        with pytest.raises(SdopsError):
            recipe.check(name)
    with pytest.raises(SdopsError, match="neither a recipe file nor a preset `inpaintng`") as caught:
        recipe.check("inpaintng")
    assert "inpainting" in str(caught.value.hint)
