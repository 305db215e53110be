"""Runs the command line once per line of stdin, each in a process of its own that has imported everything.

huggingface_hub reads its environment when it is imported: it is imported here if the environment names a Hub, else by
every run.
"""

from __future__ import annotations

import json
import os
import sys
from importlib import import_module

VERBS = ("apply", "build", "convert", "inspect", "merge", "pull", "push", "recipe")
CLIENT = ("huggingface_hub", "huggingface_hub.hf_api", "huggingface_hub.file_download", "huggingface_hub.utils")

for name in ("click", "fsspec", "numpy", "yaml"):
    import_module(name)
for verb in VERBS:
    import_module(f"sdops.commands.{verb}")
    import_module(f"sdops.verbs.{verb}")
for name in ("download", "mount", "upload"):
    import_module(f"sdops.hub.{name}")
try:
    import_module("httpx2")
except ImportError:
    import_module("httpx")
if "HF_ENDPOINT" in os.environ:
    for name in CLIENT:
        import_module(name)

from fixtures import make  # noqa: E402
from sdops.archs.detect import detect  # noqa: E402
from sdops.commands.main import main  # noqa: E402
from sdops.core.spec import Spec  # noqa: E402

detect({key: Spec(*spec) for key, spec in make.specs("sd15-ldm").items()})  # reads the tables of architectures

for line in sys.stdin:
    wish = json.loads(line)
    child = os.fork()
    if child == 0:
        for number, name in ((0, os.devnull), (1, wish["out"]), (2, wish["err"])):
            os.dup2(os.open(name, os.O_RDWR | os.O_CREAT), number)
        os.environ.clear()
        os.environ.update(wish["environment"])
        os.chdir(wish["folder"])
        sys.exit(main(wish["arguments"]))
    sys.stdout.write(f"{os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}\n")
    sys.stdout.flush()
