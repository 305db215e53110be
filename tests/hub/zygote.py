"""Runs the command line once per line of stdin, each in a process of its own that has imported all but the client.

huggingface_hub reads its environment when it is imported, so every run imports it afresh; what it needs is there.
"""

from __future__ import annotations

import json
import os
import sys

import click  # noqa: F401
import fsspec  # noqa: F401
import numpy as np  # noqa: F401
import yaml  # noqa: F401

from sdops.commands import apply, convert, inspect, merge, pull, push  # noqa: F401
from sdops.commands.main import main
from sdops.verbs import inspect as inspecting  # noqa: F401
from sdops.verbs import merge as merging  # noqa: F401
from sdops.verbs import pull as pulling  # noqa: F401
from sdops.verbs import push as pushing  # noqa: F401

try:
    import httpx2  # noqa: F401
except ImportError:
    import httpx  # noqa: F401

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
