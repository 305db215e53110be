"""Uploads in one commit, with a model card."""

from __future__ import annotations

import json
import pickle
import re
import shlex

import pytest

from fixtures import make
from sdops.archs.detect import detect
from sdops.core.spec import Spec
from sdops.verbs._model_card import Published, base_models, card, relation
from tests.hub.server import Blob, Fault

WRITER = {"HF_TOKEN": "hf_writer"}


_made: dict[str, bytes] = {}  # the merge is made once: what it is made of has the same commits in every test


@pytest.fixture
def merged(hub, sdops, tmp_path, model, tuned):
    """A merge of two models of the Hub."""
    hub.add("ann/a", {"a.safetensors": model})
    hub.add("bob/b", {"b.safetensors": tuned})
    path = tmp_path / "mix.safetensors"
    if not _made:
        assert sdops("merge", "hf://ann/a", "hf://bob/b", "-o", "mix.safetensors").code == 0
        _made["mix"] = path.read_bytes()
    path.write_bytes(_made["mix"])
    hub.forget()
    return path


def at(hub, repo: str, branch: str = "main") -> dict[str, Blob]:
    found = hub.repositories[repo]
    return found.commits[found.branches[branch]]


def test_a_push_is_one_commit_with_a_card(hub, sdops, merged):
    done = sdops("push", merged, "ann/mix", "--license", "apache-2.0", "-q", **WRITER)
    assert done.code == 0, done.err
    commit = hub.repositories["ann/mix"].branches["main"]
    assert done.lines == [f"{hub.url}/ann/mix/commit/{commit}"]
    files = at(hub, "ann/mix")
    assert files["mix.safetensors"].data == merged.read_bytes()
    assert len(hub.requests("POST /api/models/ann/mix/commit/")) == 1
    text = files["README.md"].data.decode()
    front = text.split("---")[1]
    assert 'base_model:\n- "ann/a"\n- "bob/b"\nbase_model_relation: merge\n' in front
    assert 'license: "apache-2.0"' in front
    assert '- "stable-diffusion"' in front
    assert Blob(merged.read_bytes()).sha256 in text
    record = json.loads(re.search(r"```json\n(.*?)\n```", text, re.DOTALL)[1])
    assert record["inputs"][0]["hub"].startswith("hf://ann/a@")
    yaml = pytest.importorskip("yaml")
    assert yaml.safe_load(front)["base_model"] == ["ann/a", "bob/b"]
    hub.forget()
    again = sdops("push", merged, "ann/mix", "--license", "apache-2.0", **WRITER)
    assert again.code == 0
    assert "there already" in again.out
    assert not hub.requests("POST")  # nothing changed, nothing is written


def test_a_card_that_the_hub_refuses_makes_nothing(hub, sdops, merged):
    assert sdops("push", merged, "ann/mix", "--license", "My licence", **WRITER).code == 2
    hub.faults.append(Fault("POST /api/validate-yaml", status=400))
    done = sdops("push", merged, "ann/mix", "--license", "no-such-licence", **WRITER)
    assert done.code == 1
    assert "does not accept the front matter" in done.err
    assert "ann/mix" not in hub.repositories
    hub.add("ann/mix", {})
    hub.faults.append(Fault("POST /api/validate-yaml", status=400))
    again = sdops("push", merged, "ann/mix", "--license", "no-such-licence", **WRITER)
    assert (again.code, again.err) == (1, done.err)
    assert not at(hub, "ann/mix")


def test_what_is_on_the_hub_is_brought_and_pushed(hub, sdops, small_checkpoint):
    folder = small_checkpoint("sd15-diffusers")
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    hub.add("bob/pipe", files)
    for _ in range(2):  # not in the cache, then there
        done = sdops("push", "hf://bob/pipe", "ann/copy", "--base", "bob/pipe", **WRITER)
        assert done.code == 0, done.err
        there = at(hub, "ann/copy")
        assert {name: there[name].data for name in files} == files
    assert 'base_model:\n- "bob/pipe"' in there["README.md"].data.decode()


def test_nothing_is_written_to_a_reference(sdops, merged):
    done = sdops("merge", merged, merged, "-o", "hf://ann/out/m.safetensors")
    assert done.code == 1
    assert "outputs are written to this disk" in done.err
    assert "sdops push" in done.err


def test_a_dry_run_writes_nothing(hub, sdops, merged):
    done = sdops("push", merged, "ann/mix", "--private", "--dry-run")
    assert done.code == 0, done.err
    assert "(new, private)" in done.out
    assert "base_model_relation: merge" in done.out
    assert not hub.requests("POST|PUT")


def test_private_and_pull_request(hub, sdops, merged):
    assert sdops("push", merged, "ann/mix", "--private", **WRITER).code == 0
    assert hub.repositories["ann/mix"].private
    before = at(hub, "bob/b")
    done = sdops("push", merged, "bob/b", "--pr", "-q", **WRITER)
    assert done.lines == [f"{hub.url}/bob/b/discussions/1"], done.err
    assert at(hub, "bob/b") == before
    assert at(hub, "bob/b", "refs/pr/1")["mix.safetensors"].data == merged.read_bytes()


def test_a_card_that_somebody_wrote_is_kept(hub, sdops, merged, model):
    hub.add("ann/old", {"a.safetensors": model, "README.md": b"# mine"})
    assert sdops("push", merged, "ann/old", **WRITER).code == 0
    assert at(hub, "ann/old")["README.md"].data == b"# mine"
    assert at(hub, "ann/old")["a.safetensors"].data == model


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (Fault("PUT /", times=99, status=403), "your token is not allowed"),
        (Fault("PUT /", times=99, status=418), "refuses the request for `hf://ann/mix` (418)"),
    ],
    ids=["forbidden", "refused"],
)
def test_contents_that_are_not_taken_leave_nothing(hub, sdops, merged, fault, message):
    hub.contents.clear()
    hub.faults.append(fault)
    done = sdops("push", merged, "ann/mix", "--private", **WRITER)
    assert done.code == 1
    assert message in done.err
    assert list(at(hub, "ann/mix")) == [".gitattributes"]
    hub.faults.clear()
    assert sdops("push", merged, "ann/mix", "--private", **WRITER).code == 0


def test_tokens_are_not_published(hub, sdops, tmp_path, model):
    token = f"hf_{'aB3' * 12}"
    size = int.from_bytes(model[:8], "little")
    header = json.loads(model[8 : 8 + size])
    header["__metadata__"] = {"note": f"wget https://u:{token}@huggingface.co"}
    text = json.dumps(header).encode()
    (tmp_path / "m.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + model[8 + size :])
    for words in ((), ("--dry-run",)):
        done = sdops("push", "m.safetensors", "ann/m", *words, **WRITER)
        assert done.code == 1
        assert "the metadata `note` hold what looks like a token" in done.err
    assert not hub.requests()


def test_nothing_is_published_that_was_not_asked_for(hub, sdops, merged):
    hub.add("ann/open", {"x.txt": b"x"})
    refused = {
        ("ann/open", "--private"): "is there and public",
        ("ann/typo", "--pr"): "no repository `ann/typo` that a pull request could go to",
        ("ann/new", "--revision", "dev"): "a new one has no branch `dev`",
    }
    for words, message in refused.items():
        done = sdops("push", merged, *words, **WRITER)
        assert done.code == 1
        assert message in done.err
    assert set(hub.repositories) == {"ann/a", "bob/b", "ann/open"}
    assert not hub.requests("POST|PUT")
    for _ in range(2):
        assert sdops("push", merged, "ann/closed", "--private", **WRITER).code == 0


def test_pickles_are_refused_unless_they_are_wanted(hub, sdops, tmp_path):
    class Evil:
        def __reduce__(self):
            return (print, ("never",))

    (tmp_path / "m.ckpt").write_bytes(pickle.dumps(Evil()))
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "weights").write_bytes(pickle.dumps(Evil()))
    for name in ("m.ckpt", "folder"):
        done = sdops("push", name, "ann/m", **WRITER)
        assert done.code == 1
        assert "is a pickle" in done.err
        assert "--to safetensors" in done.err
    assert not hub.requests("POST")
    assert sdops("push", "m.ckpt", "ann/m", "--allow-pickles", **WRITER).code == 0


def test_damaged_models_and_secrets_stay_here(hub, sdops, tmp_path, model):
    (tmp_path / "m.safetensors").write_bytes(model[:-5])
    assert "cut short" in sdops("push", "m.safetensors", "ann/m", **WRITER).err
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "m.safetensors").write_bytes(model)
    (folder / ".env").write_text("SECRET")
    (folder / "outside").symlink_to("/etc/hostname")
    assert sdops("push", "folder", "ann/m", **WRITER).code == 1
    (folder / "outside").unlink()
    assert sdops("push", "folder", "ann/m", **WRITER).code == 0
    assert sorted(at(hub, "ann/m")) == [".gitattributes", "README.md", "m.safetensors"]


def test_a_lost_answer_is_looked_up(hub, sdops, merged):
    assert sdops("push", merged, "ann/mix", "--no-card", "--dry-run").code == 0
    hub.faults.append(Fault("POST /api/models/ann/mix/commit", lose=True))
    done = sdops("push", merged, "ann/mix", "-q", **WRITER)
    assert done.code == 0, done.err
    assert done.lines == [f"{hub.url}/ann/mix/commit/{hub.repositories['ann/mix'].branches['main']}"]
    assert len(hub.repositories["ann/mix"].commits) == 2  # the first, empty, and ours


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({}, "needs a token"),
        ({"HF_TOKEN": "hf_reader"}, "not allowed"),
        ({"HF_TOKEN": "hf_expired"}, "not accept your"),
    ],
)
def test_who_may_not_write_is_told(sdops, merged, environment, message):
    done = sdops("push", merged, "ann/mix", **environment)
    assert done.code == 1
    assert message in done.err


# ------------------------------------------------------------------------------------------------------- the card alone


def published(keys: dict[str, Spec], recipe: dict, **attributes) -> Published:
    metadata = {"sdops": json.dumps(recipe)}
    return Published("me/m", {"m.safetensors": (10, "0" * 64)}, "m.safetensors", detect(keys), metadata, **attributes)


def file(role: str, repo: str) -> dict:
    return {"role": role, "file": "x.safetensors", "hub": f"hf://{repo}@{'a' * 40}/x.safetensors"}


LORA = {
    "lora_unet_mid_block_attentions_0_proj_in.lora_down.weight": Spec("F16", (4, 320)),
    "lora_unet_mid_block_attentions_0_proj_in.lora_up.weight": Spec("F16", (320, 4)),
}
FP8 = {"model.diffusion_model.input_blocks.0.0.weight": Spec("F8_E4M3", (320, 4, 3, 3))}
SD15 = {key: Spec(*spec) for key, spec in make.specs("sd15-ldm").items()}
PLAIN = {"model.diffusion_model.input_blocks.0.0.weight": Spec("F16", (320, 4, 3, 3))}


def test_relations():
    lora = published(LORA, {"verb": "extract", "inputs": [file("tuned", "a/tuned"), file("base", "b/base")]})
    assert (relation(lora), base_models(lora)) == ("adapter", ["b/base"])
    assert relation(published(FP8, {"verb": "convert", "inputs": [file("a", "a/a")]})) == "quantized"
    assert relation(published(PLAIN, {})) == "finetune"
    inner = {"verb": "merge", "inputs": [file("a", "a/a"), file("b", "b/b")]}
    outer = published(
        PLAIN, {"verb": "merge", "inputs": [{"role": "a", "file": "y", "recipe": inner}, file("b", "a/a")]}
    )
    assert (relation(outer), base_models(outer)) == ("merge", ["a/a", "b/b"])
    assert relation(published(PLAIN, {"verb": "convert", "inputs": [file("a", "a/a")]})) == "quantized"
    made = published(PLAIN, {"verb": "convert", "inputs": [{"role": "a", "file": "y", "made": json.dumps(inner)}]})
    assert (relation(made), base_models(made)) == ("merge", ["a/a", "b/b"])
    resized = {"verb": "resize", "inputs": [file("a", "a/lora")]}
    assert base_models(published(LORA, resized)) == ["a/lora"]
    assert base_models(published(LORA, resized, bases=["b/base"])) == ["b/base"]


def front(model: Published) -> dict:
    return pytest.importorskip("yaml").safe_load(card(model).split("---")[1])


def test_what_the_hub_offers_to_do_with_it():
    """Its names of libraries, and the tags by which it chooses the code that it shows."""
    one = front(published(SD15, {"verb": "merge"}))
    assert (one["library_name"], one["pipeline_tag"]) == ("diffusion-single-file", "text-to-image")
    lora = published(LORA, {})
    lora.metadata = {**lora.metadata, "modelspec.architecture": "stable-diffusion-xl-v1-base/lora"}
    assert front(lora)["library_name"] == "diffusers"
    assert front(lora)["tags"] == ["text-to-image", "stable-diffusion-xl", "lora", "sdops"]
    words = front(published({"clip_l": Spec("F32", (2, 768)), "clip_g": Spec("F32", (2, 1280))}, {}, bases=["a/xl"]))
    assert (words["library_name"], words["base_model_relation"]) == ("diffusers", "adapter")
    assert words["tags"] == ["text-to-image", "stable-diffusion-xl", "textual_inversion", "sdops"]
    vae = published({key: spec for key, spec in SD15.items() if key.startswith("first_stage_model.")}, {})
    assert vae.kind == "vae"
    assert "pipeline_tag" not in front(vae)


def test_rebuilding_is_promised_only_where_recipes_can():
    merge = published(PLAIN, {"verb": "merge", "method": "weighted-sum", "inputs": [file("a", "a/a"),
                              {"role": "b", "file": "mine.safetensors"}]})  # fmt: skip
    assert "sdops build recipe.toml -o m.safetensors" in card(merge)
    assert "must lie beside recipe.toml: `mine.safetensors`" in card(merge)
    trained = published(LORA, {"verb": "train", "method": "lora", "settings": {"rank": 8}})
    assert "sdops build" not in card(trained)
    assert "- rank: `8`" in card(trained)


def test_a_folder_of_results_tells_what_they_differ_in():
    recipes = [{"verb": "merge", "method": "weighted-sum", "knobs": {"alpha": alpha}} for alpha in (0.1, 0.2)]
    model = published(PLAIN, recipes[0])
    model.models = {f"{i}.safetensors": {"sdops": json.dumps(each)} for i, each in enumerate(recipes)}
    model.files = dict.fromkeys(model.models, (10, "0" * 64))
    model.main = "0.safetensors"
    text = card(model)
    assert "| file | alpha | size | SHA-256 |" in text
    assert "| `1.safetensors` | 0.2 | 10 B |" in text
    assert "One of 2 models" in text


def test_names_that_need_quotes():
    place = f"hf://ann/a@{'a' * 40}/my model (v1) [x].safetensors"
    model = published(PLAIN, {"verb": "merge", "method": "soup", "inputs": [{"role": "a", "file": "x", "hub": place}]})
    model.main = "it's `mine` $(x).safetensors"
    model.tags = ['🎨 ti"t: le', "a\u0085b\u2028\ud800", "no", "- x"]
    text = card(model)
    assert f"(https://huggingface.co/ann/a/blob/{'a' * 40}/my%20model%20%28v1%29%20%5Bx%5D.safetensors)" in text
    commands = [line for line in text.splitlines() if line.startswith("sdops ")]
    assert [shlex.split(line)[2] for line in commands[:2]] == [f"hf://me/m/{model.main}"] * 2
    assert shlex.split(commands[-1])[-1] == model.main
    assert front(model)["tags"][-4:] == ['🎨 ti"t: le', "a\u0085b\u2028?", "no", "- x"]


JUNK = [5, None, "abc", [1, None, {"role": None, "sha256": {}}], [{"hub": "no reference"}], [{"hub": "hf://datasets/a/b"}],
        [{"recipe": {"inputs": 5}}], [{"made": "["}], [{"role": "\ud800"}]]  # fmt: skip


@pytest.mark.parametrize("inputs", JUNK)
def test_a_record_of_a_stranger_makes_a_card(inputs):
    model = published(PLAIN, {"verb": ["merge"], "inputs": inputs, "a`b\n# owned": 1, "fence": "````\n# owned"})
    text = card(model)
    assert text.encode()
    assert "base_model" not in front(model)
    assert "\n# owned" not in text
    assert text.endswith("}\n`````\n")


def test_a_card_cannot_be_broken_out_of():
    recipe = {"verb": "merge", "method": "x`\n# owned", "inputs": [{"role": "a|b", "file": "](http://evil)<script>"}]}
    model = published(PLAIN, recipe)
    model.metadata = {
        **model.metadata,
        "modelspec.title": "t\n---\nlicense: mit\n",
        "modelspec.description": "<b>\n# x",
    }
    text = card(model)
    outside = text.partition("```json")[0]
    assert "\n# owned" not in outside
    assert "<script>" not in outside
    assert "\n# x" not in outside
    assert outside.count("\n---\n") == 1
