"""sdops: operations on Stable Diffusion model files.

Every command is a function of the same name, with the same parameters, that returns a Report:

    import sdops
    print(sdops.inspect("model.safetensors"))

Names are resolved when they are used, so `import sdops` costs nothing.
"""

from __future__ import annotations

from typing import Any

__version__ = "0.1.0"

# public name -> module and name that it stands for; without a name, the module
_PUBLIC = {
    "Report": ("sdops.report", "Report"),
    "SdopsError": ("sdops.errors", "SdopsError"),
    "apply": ("sdops.verbs.apply", "apply"),
    "build": ("sdops.verbs.build", "build"),
    "convert": ("sdops.verbs.convert", "convert"),
    "compare": ("sdops.verbs.compare", "compare"),
    "custom": ("sdops.verbs.custom", ""),
    "dataset": ("sdops.verbs.dataset", ""),
    "diff": ("sdops.verbs.diff", "diff"),
    "embed": ("sdops.verbs.embed", ""),
    "env": ("sdops.verbs.env", "env"),
    "extract": ("sdops.verbs.extract", "extract"),
    "fix": ("sdops.verbs.fix", "fix"),
    "hash": ("sdops.verbs.hash", "hash_files"),
    "hypernet": ("sdops.verbs.hypernet", ""),
    "hot_swap": ("sdops.verbs.hot_swap", "hot_swap"),
    "inspect": ("sdops.verbs.inspect", "inspect"),
    "merge": ("sdops.verbs.merge", "merge"),
    "meta": ("sdops.verbs.meta", "meta"),
    "methods": ("sdops.verbs.methods", "methods"),
    "open": ("sdops.formats", "open_source"),
    "pull": ("sdops.verbs.pull", "pull"),
    "push": ("sdops.verbs.push", "push"),
    "presets": ("sdops.verbs.presets", "presets"),
    "recipe": ("sdops.verbs.recipe", ""),
    "resize": ("sdops.verbs.resize", "resize"),
    "streaming": ("sdops.hub", "streaming"),
    "train": ("sdops.verbs.train", ""),
    "verify": ("sdops.verbs.verify", "verify"),
}


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'sdops' has no attribute {name!r}")
    from importlib import import_module

    module, attribute = _PUBLIC[name]
    found = import_module(module)
    return getattr(found, attribute) if attribute else found


def __dir__() -> list[str]:
    return sorted(["__version__", *_PUBLIC])
