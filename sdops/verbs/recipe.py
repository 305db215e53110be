"""Everything about recipes but building them: `sdops.recipe.show("r.toml")`, one function per subcommand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from sdops import hub, standin
from sdops.core.sink import check_parent
from sdops.errors import FormatError, OutputError
from sdops.report import Progress, Report, Section, silent
from sdops.text import count
from sdops.verbs._recipe_check import check_recipe
from sdops.verbs._recipe_inputs import FilePath
from sdops.verbs._recipe_report import in_words
from sdops.verbs._recipe_text import Recipe
from sdops.verbs._recipe_toml import to_toml
from sdops.verbs.build import find_recipe


def check(recipe: FilePath | Recipe, *, set_: Mapping[str, object] | None = None) -> Report:
    """Check a recipe without looking at its files.

    Args:
        recipe: A TOML file, or the name of a preset.
        set_: Parameter -> value.

    Raises:
        UsageError: it makes no sense, with the path of what is wrong.
    """
    text = recipe if isinstance(recipe, Recipe) else find_recipe(recipe)
    checked = check_recipe(text, set_)
    report = Report("recipe check", result=[text.name])
    report.data = {
        "recipe": text.name,
        "inputs": {name: one.file for name, one in text.inputs.items()},
        "parameters": dict(checked.values),
        "steps": [{"id": step.id, "verb": step.step.verb, "uses": list(step.uses)} for step in checked.steps],
    }
    roles = [name for name, one in text.inputs.items() if not one.file]
    rows = [("recipe", text.name + (f": {text.about}" if text.about else "")), ("result", "in order")]
    if roles:
        rows.append(("to give", ", ".join(f"--{name.replace('_', '-')} FILE" for name in roles)))
    report.sections = [
        Section("", rows),
        Section("Steps", [(step.id, in_words(step)) for step in checked.steps]),
    ]
    report.warnings = list(checked.warnings)
    return report


def show(recipe: FilePath) -> Report:
    """The text of a recipe, as it is.

    Args:
        recipe: A TOML file, or the name of a preset.

    Raises:
        SdopsError: there is none.
        UsageError: it is no recipe.
    """
    from sdops.verbs.build import recipe_file

    find_recipe(recipe)
    return _text_report("recipe show", standin.real(recipe_file(recipe)).read_text(encoding="utf-8"))


def cp(recipe: FilePath, output: FilePath | None = None, *, force: bool = False) -> Report:
    """Copy a recipe, to be changed.

    Args:
        recipe: The name of a preset, or a TOML file.
        output: Where to; default: `NAME.toml` in this folder.
        force: Replace what is there.

    Raises:
        SdopsError: there is no such recipe.
        OutputError: the output exists.
    """
    from sdops.verbs.build import recipe_file

    text = find_recipe(recipe)
    path = Path(output) if output is not None else Path(f"{text.name}.toml")
    _write(path, standin.real(recipe_file(recipe)).read_text(encoding="utf-8"), force=force)
    report = Report("recipe cp", {"recipe": text.name, "output": str(path)}, result=[str(path)])
    report.sections = [Section("", [("wrote", str(path))])]
    report.hints = [f"change it, then `sdops recipe check {path}` and `sdops build {path}`"]
    return report


def ls(folder: FilePath = ".") -> Report:
    """The recipes in a folder, and the presets.

    Args:
        folder: Where to look for TOML files.
    """
    from sdops.errors import SdopsError
    from sdops.presets import names, preset_file

    rows, data, broken = [], [], []
    files = [*sorted(hub.located(folder).glob("*.toml")), *(preset_file(name) for name in names())]
    for file in files:
        is_preset = file.parent == preset_file("x").parent
        try:
            one = find_recipe(file)
        except SdopsError as error:
            broken.append(f"`{file}` is left out: {error.message}")
            continue
        name = one.name if is_preset else str(file)
        roles = [f"--{key.replace('_', '-')}" for key, each in one.inputs.items() if not each.file]
        rows.append((name, one.about, " ".join(roles)))
        data.append({"recipe": name, "about": one.about, "inputs": list(one.inputs), "preset": is_preset})
    report = Report("recipe ls", {"recipes": data}, result=[row[0] for row in rows])
    report.warnings = broken
    report.sections = [Section("", rows, ("recipe", "what it is for", "to give"))]
    return report


def from_(
    file: FilePath,
    *,
    output: FilePath | None = None,
    verify: bool = False,
    inputs: Mapping[str, FilePath] | None = None,
    root: Sequence[FilePath] = (),
    jobs: int | None = None,
    force: bool = False,
    progress: Progress = silent,
) -> Report:
    """The recipe of a model, out of what it says about how it was made; or of what other programs write.

    Args:
        file: A model that sdops, supermerger or the A1111 web UI has made, or a YAML file of mergekit.
        output: Write the recipe here; default: only show it.
        verify: Build it again and compare; the inputs are looked for by name beside the file, here, and in `root`.
        inputs: With `verify`: input -> file.
        root: With `verify`: folders to look in.
        jobs: Threads.
        force: Replace an existing output.
        progress: Called as `progress(label, total_bytes)`.

    Raises:
        FormatError: the file does not say how it was made.
        UsageError: what it says makes no recipe.
        OutputError: the output exists.
    """
    path = hub.located(file)
    recipe, warnings = read_any(path)
    text = to_toml(recipe, f"Made by `sdops recipe from {path.name}`.")
    report = _text_report("recipe from", text)
    report.data |= {"file": str(file), "steps": len(recipe.steps), "inputs": list(recipe.inputs)}
    report.warnings = [*warnings, *check_recipe(recipe).warnings]
    if output is not None:
        _write(Path(output), text, force=force)
        report.data["output"] = str(output)
        report.result = [str(output)]
        report.sections = [
            Section(
                "", [("wrote", f"{output}: {count(len(recipe.steps), 'step')}, {count(len(recipe.inputs), 'input')}")]
            )
        ]
        report.hints = [f"`sdops build {output}` makes it again"]
    if verify:
        from sdops.verbs._recipe_verify import verify_rebuilt

        verify_rebuilt(report, recipe, path, inputs=inputs or {}, root=root, jobs=jobs, progress=progress)
    return report


def read_any(path: Path) -> tuple[Recipe, list[str]]:
    """A recipe of whatever a file says, and what could not be taken over.

    Raises:
        FormatError: it says nothing.
        UsageError: it makes no recipe.
    """
    if path.suffix.lower() == ".toml":
        return find_recipe(path), []
    if path.suffix.lower() in (".yaml", ".yml"):
        from sdops.verbs._recipe_mergekit import from_mergekit

        return from_mergekit(path)
    from sdops.formats import open_source
    from sdops.verbs._adapter_peek import is_adapter, open_adapter_file
    from sdops.verbs._provenance import RECIPE

    source = open_adapter_file(path) if is_adapter(path) else open_source(path)
    metadata = dict(source.metadata)
    source.close()
    if RECIPE in metadata:
        from sdops.verbs._recipe_from import from_provenance

        return from_provenance(metadata[RECIPE], name=recipe_name(path), file=path.name), []
    if "sd_merge_recipe" in metadata or "sd_merge_models" in metadata:
        from sdops.verbs._recipe_webui import from_webui

        return from_webui(metadata, name=recipe_name(path), file=path.name)
    raise FormatError(
        f"`{path}` does not say how it was made",
        hint="merges, LoRAs and other dtypes that sdops makes say it, as do merges of web UIs; `sdops meta` shows it",
        path=path,
    )


def recipe_name(path: Path) -> str:
    """What a recipe is called whose result is a file; the result gets the file's name back."""
    name = path.name.removesuffix(".safetensors").lstrip(".") or "recipe"
    return "".join(sign if sign.isprintable() and sign not in "/\\" else "_" for sign in name)[:100]


def _text_report(verb: str, text: str) -> Report:
    lines = text.rstrip("\n").split("\n")
    return Report(verb, {"toml": text}, [Section("", [[line] for line in lines])], result=lines)


def _write(path: Path, text: str, *, force: bool) -> None:
    if path.exists() and not force:
        raise OutputError(f"`{path}` exists already", hint="`--force` replaces it; `-o` names another file", path=path)
    check_parent(path)
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise OutputError(f"`{path}` cannot be written: {reason}", hint="`-o` names another file", path=path) from None
