"""Many builds at once: the same bytes as one after the other, shared steps once, killed workers replaced."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

from sdops.core.sink import tag
from sdops.errors import OutputError, SdopsError, UsageError
from sdops.report import Report
from sdops.verbs import _many
from sdops.verbs._many import build_many
from sdops.verbs._many_jobs import Build
from sdops.verbs._recipe_text import parse_recipe
from sdops.verbs.build import build

HEAD = """
[inputs]
a = { about = "a model" }
b = { about = "another" }
[parameters]
alpha = { default = 0.5 }
[[steps]]
id = "both"
verb = "merge"
models = ["a", "b"]
method = "slerp"
alpha = 0.3
"""
SWEEP = (
    HEAD
    + """
[[steps]]
id = "lora"
verb = "extract"
tuned = "b"
base = "a"
rank = 2
[[steps]]
id = "last"
verb = "merge"
models = ["both", "b"]
alpha = "$alpha"
lora = ["lora:$alpha"]
"""
)
SHARED = (
    HEAD
    + """
[[steps]]
verb = "merge"
models = ["both", "b"]
alpha = "$alpha"
"""
)
SIMPLE = """
[inputs]
a = { about = "a model" }
b = { about = "another" }
[parameters]
alpha = { default = 0.5 }
[[steps]]
verb = "merge"
models = ["a", "b"]
alpha = "$alpha"
"""


@pytest.fixture
def models(small_checkpoint) -> dict[str, str]:
    return {"a": str(small_checkpoint("sd15")), "b": str(small_checkpoint("sd15", tuned=1))}


def sweep(text: str, models: dict[str, str], folder: Path, number: int) -> list[Build]:
    recipe = parse_recipe(text, name="sweep")
    return [Build(recipe, {"alpha": i / 8}, models, str(folder / f"{i}.safetensors")) for i in range(1, number + 1)]


def alone(builds: list[Build], folder: Path) -> list[bytes]:
    """What `build` makes of them, one by one."""
    folder.mkdir()
    made = []
    for one in builds:
        path = folder / Path(one.output).name
        build(one.recipe, set_=one.settings, inputs=one.inputs, output=path)
        made.append(path.read_bytes())
    return made


def outputs(builds: list[Build]) -> list[bytes]:
    return [Path(one.output).read_bytes() for one in builds]


def test_shared_steps_are_made_once_and_change_no_byte(models, tmp_path, monkeypatch):
    builds = sweep(SWEEP, models, tmp_path, 2)
    done: list[str] = []
    real = _many.guarded
    monkeypatch.setattr(_many, "guarded", lambda kind, *arguments: done.append(kind) or real(kind, *arguments))
    reports = build_many(builds, workers=1)
    assert [type(one) for one in reports] == [Report, Report], reports
    assert done == ["store", "store", "build", "build"]
    assert outputs(builds) == alone(builds, tmp_path / "alone")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1.safetensors", "2.safetensors", "alone"]


def test_steps_are_shared_across_recipes_whatever_they_are_called(models, tmp_path):
    other = re.sub(r"\bboth\b", "mixture", SWEEP).replace('id = "last"', 'id = "end"')
    recipes = [parse_recipe(SWEEP, name="one"), parse_recipe(other, name="two")]
    builds = [Build(one, {}, models, str(tmp_path / f"{one.name}.safetensors")) for one in recipes]
    changed = Build(parse_recipe(SWEEP.replace("0.3", "0.4"), name="x"), {}, models, str(tmp_path / "x.safetensors"))
    assert len(_many._shared_steps([builds[0], changed])) == 1  # the LoRA alone
    assert len(_many._shared_steps([builds[0], builds[1], changed])) >= 2


def test_a_build_that_fails_leaves_the_others_alone(models, tmp_path):
    builds = sweep(SIMPLE, models, tmp_path, 3)
    hostile = parse_recipe(SIMPLE.replace('about = "another"', f'about = "x", sha256 = "{"0" * 64}"'), name="x")
    builds[1] = Build(hostile, {}, models, builds[1].output)
    results = build_many(builds, workers=1)
    assert [isinstance(one, SdopsError) for one in results] == [False, True, False]
    assert "is not the file that the recipe was written for" in results[1].message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1.safetensors", "3.safetensors"]


def test_what_is_wrong_is_told_before_anything_is_done(models, tmp_path):
    builds = sweep(SIMPLE, models, tmp_path, 2)
    Path(builds[1].output).write_bytes(b"mine")
    with pytest.raises(OutputError, match="exists already"):
        build_many(builds, workers=1)
    assert [path.name for path in tmp_path.iterdir()] == ["2.safetensors"]
    with pytest.raises(OutputError, match="written by 2 builds"):
        build_many([builds[0], builds[0]], workers=1)


def test_what_is_finished_is_kept(models, tmp_path, monkeypatch):
    builds = sweep(SHARED, models, tmp_path, 3)
    build_many(builds, workers=1)
    paths = [Path(one.output) for one in builds]
    whole, marks = outputs(builds), [path.stat().st_mtime_ns for path in paths]
    paths[1].unlink()
    (tmp_path / ".sdops-shared-killed").mkdir()  # as a killed run leaves them
    (tmp_path / ".sdops-shared-killed" / "lock").touch()
    (tmp_path / f".sdops-{tag(paths[0])}-12345678.tmp").touch()
    done: list[str] = []
    real = _many.guarded
    monkeypatch.setattr(_many, "guarded", lambda kind, *arguments: done.append(kind) or real(kind, *arguments))
    reports = build_many(builds, workers=1)
    assert [one.data["kept"] for one in reports] == [True, False, True]
    assert done == ["build"] * 3  # nothing is shared any more
    assert [one.result for one in reports] == [[one.output] for one in builds]
    assert outputs(builds) == whole
    now = [path.stat().st_mtime_ns for path in paths]
    assert [new == old for new, old in zip(now, marks, strict=True)] == [True, False, True]
    assert sorted(tmp_path.iterdir()) == paths


@pytest.mark.parametrize("other", ["parameter", "input", "no hashes", "no record", "no model"])
def test_an_output_that_may_be_another_one_is_not_kept(models, tmp_path, other, small_checkpoint):
    one = sweep(SIMPLE, models, tmp_path, 1)[0]
    path = Path(one.output)
    if other == "parameter":
        build_many([replace(one, settings={"alpha": 0.126})])
    elif other == "input":
        build_many([one])
        shutil.copy(small_checkpoint("sd15", tuned=2), tmp_path / Path(models["b"]).name)
        one = replace(one, inputs={**models, "b": str(tmp_path / Path(models["b"]).name)})
    elif other == "no hashes":
        build_many([replace(one, hash_inputs=False)])
    else:
        shutil.copy(models["a"], path) if other == "no record" else path.write_bytes(b"mine")
    before = path.read_bytes()
    with pytest.raises(OutputError, match="exists already"):
        build_many([one])
    assert path.read_bytes() == before
    assert not build_many([replace(one, force=True)])[0].data["kept"]


def test_without_the_engine_several_workers_are_refused(models, tmp_path, monkeypatch):
    monkeypatch.setattr(_many, "find_spec", lambda _: None)
    builds = sweep(SIMPLE, models, tmp_path, 2)
    with pytest.raises(UsageError, match=r"dask.distributed, which is not installed") as caught:
        build_many(builds, workers=2)
    assert "sdops[cluster]" in caught.value.hint
    assert all(isinstance(one, Report) for one in build_many(builds))  # nobody asked for several


# ------------------------------------------------------------------------------------------- the engine, in processes

PATIENCE = 240  # seconds for what is a matter of two on an idle machine
RUN = """
import json, sys
from sdops.verbs._many import build_many
from sdops.verbs._many_jobs import Build
from sdops.verbs._recipe_text import parse_recipe
if __name__ == "__main__":
    wish = json.load(open(sys.argv[1]))
    recipe = parse_recipe(wish["recipe"], name="sweep")
    builds = [Build(recipe, one["settings"], wish["inputs"], one["output"]) for one in wish["builds"]]
    try:
        for one in build_many(builds, workers=wish["workers"], cluster=wish["cluster"]):
            print(type(one).__name__, one)
    except Exception as error:
        print("refused", type(error).__name__, error, getattr(error, "hint", ""))
"""


def start(folder: Path, text: str, builds: list[Build], *, workers: int | None = None, cluster: str | None = None):
    """Do builds as a program of its own."""
    each = [{"settings": dict(one.settings), "output": one.output} for one in builds]
    wish = {"recipe": text, "inputs": dict(builds[0].inputs), "builds": each, "workers": workers, "cluster": cluster}
    (folder / "run.py").write_text(RUN)
    (folder / "wish.json").write_text(json.dumps(wish))
    return subprocess.Popen([sys.executable, "run.py", "wish.json"], cwd=folder, stdout=subprocess.PIPE, text=True)


def test_processes_of_this_machine(models, tmp_path):
    pytest.importorskip("distributed", reason="the extra `cluster` is not installed")
    builds = sweep(SWEEP, models, tmp_path, 2)
    text, _ = start(tmp_path, SWEEP, builds, workers=2).communicate(timeout=PATIENCE)
    assert [line.split()[0] for line in text.splitlines() if line.startswith("Report")] == ["Report", "Report"], text
    assert outputs(builds) == alone(builds, tmp_path / "alone")
    assert not list(tmp_path.glob(".sdops*"))


HOLD = """
import pathlib, time
from sdops.core.sink import FileSink
go = pathlib.Path({go!r})
def held(self, *arguments):
    while not go.exists():
        time.sleep(0.02)
    return FileSink.usual(self, *arguments)
if not hasattr(FileSink, "usual"):  # dask imports this more than once
    FileSink.usual, FileSink.commit = FileSink.commit, held
"""


def wait_for(what, log: Path):
    """What a call gives, as soon as it is something."""
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until:
        if found := what():
            return found
        time.sleep(0.02)
    raise AssertionError(log.read_text())


@pytest.fixture
def cluster(tmp_path):
    """A scheduler and two workers, as users start them on their machines; gives the address.

    Workers finish no output before there is a file `go`.
    """
    pytest.importorskip("distributed", reason="the extra `cluster` is not installed")
    (tmp_path / "hold.py").write_text(HOLD.format(go=str(tmp_path / "go")))
    (tmp_path / "elsewhere").mkdir()
    log = tmp_path / "log"
    processes = []

    def start_one(program: str, *words: str) -> None:
        command = [sys.executable, "-m", f"distributed.cli.{program}", *words, "--no-dashboard"]
        with log.open("a") as talk:
            processes.append(subprocess.Popen(command, cwd=tmp_path / "elsewhere", stdout=talk, stderr=talk))

    try:
        start_one("dask_scheduler", "--host", "127.0.0.1", "--port", "0")
        address = wait_for(lambda: re.search(r"Scheduler at: +(tcp://\S+)\n", log.read_text()), log)[1]
        for number in range(2):
            place = tmp_path / f"worker{number}"
            start_one(
                "dask_worker",
                address,
                "--nthreads",
                "1",
                "--local-directory",
                str(place),
                "--preload",
                str(tmp_path / "hold.py"),
            )
        wait_for(lambda: log.read_text().count("Registered to:") == 2, log)
        yield address
    finally:
        (tmp_path / "go").touch()
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait(PATIENCE)


def writers(folder: Path) -> list[int]:
    """The processes that have an unfinished output open."""
    drafts = {str(path) for path in folder.glob(".sdops-*.tmp")}
    found = []
    for link in Path("/proc").glob("[0-9]*/fd/*") if drafts else ():
        with suppress(OSError):
            if os.readlink(link) in drafts:
                found.append(int(link.parts[2]))
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_a_cluster_survives_a_killed_worker(cluster, models, tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    builds = sweep(SIMPLE, models, folder, 5)
    running = start(tmp_path, SIMPLE, builds, cluster=cluster)
    victim = wait_for(lambda: writers(folder), tmp_path / "log")[0]
    assert victim != running.pid
    os.kill(victim, signal.SIGKILL)
    (tmp_path / "go").touch()
    text, _ = running.communicate(timeout=PATIENCE)
    assert sum(line.startswith("Report") for line in text.splitlines()) == 5, text
    assert outputs(builds) == alone(builds, tmp_path / "alone")
    assert not list(folder.glob(".sdops*"))


def test_nobody_at_the_address(models, tmp_path, monkeypatch):
    pytest.importorskip("distributed", reason="the extra `cluster` is not installed")
    monkeypatch.chdir(tmp_path)
    script = RUN.replace(
        "import json, sys", "import json, sys\nfrom sdops.verbs import _many_dask\n_many_dask._PATIENCE = 0.5"
    )
    builds = sweep(SIMPLE, models, tmp_path, 2)
    process = start(tmp_path, SIMPLE, builds, cluster="tcp://127.0.0.1:9")
    process.kill()
    process.communicate()
    (tmp_path / "run.py").write_text(script)
    command = [sys.executable, "run.py", "wish.json"]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
    assert "refused SdopsError no scheduler answers at `tcp://127.0.0.1:9`" in done.stdout
    assert "dask scheduler" in done.stdout


def test_a_folder_of_recipes(models, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "recipes"
    folder.mkdir()
    (folder / "one.toml").write_text(SIMPLE)
    (folder / "two.toml").write_text(SIMPLE.replace("[inputs]", 'name = "second"\n[inputs]', 1))
    report = build(folder, inputs=models, set_={"alpha": 0.25})
    stem = Path(models["a"]).stem
    names = [f"{stem}.one.alpha0.25.safetensors", f"{stem}.second.alpha0.25.safetensors"]
    assert report.result == names
    assert not report.failed
    build(folder / "one.toml", inputs=models, set_={"alpha": 0.25}, output=tmp_path / "alone.safetensors")
    assert (tmp_path / names[0]).read_bytes() == (tmp_path / "alone.safetensors").read_bytes()
    with pytest.raises(UsageError, match=r"no recipe in .* has the parameter `alpah`"):
        build(folder, inputs=models, set_={"alpah": 0.25})
    with pytest.raises(SdopsError, match="holds no recipes"):
        build(tmp_path / "recipes" / "..", inputs=models)


@pytest.mark.parametrize(("to", "ending"), [("diffusers", ""), ("ckpt", ".ckpt"), ("gguf", ".gguf")])
def test_a_sweep_of_conversions(models, tmp_path, monkeypatch, to, ending):
    """Results are named as their containers are, and are those of single builds."""
    monkeypatch.chdir(tmp_path)
    Path("r.toml").write_text(
        SIMPLE.replace('verb = "merge"', 'id = "m"\nverb = "merge"')
        + f'[[steps]]\nverb = "convert"\nfile = "m"\nto = "{to}"\n'
    )
    report = build("r.toml", inputs=models, set_={"alpha": [0.1, 0.2]}, output="out")
    stem = Path(models["a"]).stem
    assert report.result == [f"out/{stem}.r.alpha{alpha}{ending}" for alpha in (0.1, 0.2)]
    assert any("no distances" in hint for hint in report.hints) == (to == "diffusers")
    (alone,) = build("r.toml", inputs=models, set_={"alpha": 0.2}).result
    made = Path(report.result[1])
    pairs = (
        [(made, Path(alone))]
        if made.is_file()
        else [(one, Path(alone) / one.relative_to(made)) for one in made.rglob("*.*")]
    )
    assert pairs
    assert all(one.read_bytes() == other.read_bytes() for one, other in pairs)
