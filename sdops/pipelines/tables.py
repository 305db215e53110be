"""The tables of this folder: read, with what a variant of the family has different."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from sdops.core.toml_tables import read_toml

FOLDER = Path(__file__).parent


@dataclass(frozen=True, slots=True)
class Component:
    """A component in a folder of diffusers, and in a single file.

    Attributes:
        name: As in archs.
        folder: Its folder in the pipeline.
        class_name: diffusers' or transformers' class.
        layout, prefix: How its keys are spelled in a file of the original layout, and what stands before them.
        drop: Patterns of names, as diffusers would call them, that the class has no place for.
        projection: Whether the class needs a projection that the file may lack: then it is the identity.
        config: What sizes do not tell.
    """

    name: str
    folder: str
    class_name: str
    layout: str
    prefix: str
    drop: tuple[str, ...] = ()
    projection: bool = False
    config: dict[str, Any] = field(default_factory=dict)

    @property
    def library(self) -> str:
        """Where the class is."""
        return "transformers" if self.class_name.startswith(("CLIP", "T5", "UMT5")) else "diffusers"

    @property
    def stem(self) -> str:
        """Name of the weights' file, without `.safetensors`."""
        return "model" if self.library == "transformers" else "diffusion_pytorch_model"


@dataclass(frozen=True, slots=True)
class Pipeline:
    """What a family is as a folder; without `class_name` only its components are known.

    Attributes:
        components: By name.
        tokenizers: Tables `folder`, `class`, `kind`, `pad`.
        scheduler: Class and configuration.
        absent: Parts that the pipeline can do without.
        options: Further entries of model_index.json.
    """

    family: str
    class_name: str
    components: Mapping[str, Component]
    tokenizers: tuple[dict[str, str], ...]
    scheduler: dict[str, Any]
    absent: tuple[str, ...]
    options: dict[str, Any]


def pipeline(family: str, variants: Iterable[str] = ()) -> Pipeline | None:
    """The folder of a family in these variants, or None."""
    rows = _file(family)
    return None if rows is None else _pipeline(family, rows, set(variants))


def _pipeline(family: str, rows: dict[str, Any], variants: set[str]) -> Pipeline:
    merged = dict(rows)
    config: dict[str, dict[str, Any]] = {}
    for variant in (row for row in rows.get("variant", ()) if row["name"] in variants):
        scheduler = merged.get("scheduler", {}) | variant.get("scheduler", {})
        merged |= {key: value for key, value in variant.items() if key not in ("name", "config")}
        merged["scheduler"] = scheduler
        for name, entries in variant.get("config", {}).items():
            config[name] = config.get(name, {}) | entries
    return Pipeline(
        family,
        merged.get("class", ""),
        {row["name"]: _component(row, config.get(row["name"], {})) for row in rows["component"]},
        tuple(merged.get("tokenizer", ())),
        merged.get("scheduler", {}),
        tuple(merged.get("absent", ())),
        merged.get("options", {}),
    )


def _component(row: dict[str, Any], config: dict[str, Any]) -> Component:
    fields = {key: value for key, value in row.items() if key not in ("class", "config", "drop")}
    return Component(
        **fields,
        class_name=row["class"],
        drop=tuple(row.get("drop", ())),
        config=row.get("config", {}) | config,
    )


@cache
def _file(family: str) -> dict[str, Any] | None:
    path = FOLDER / f"{family}.toml"
    return read_toml(path) if path.is_file() else None
