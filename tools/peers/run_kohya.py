"""tools/merge_models.py of kohya-ss/sd-scripts: merged in float32, stored as float16.

    KOHYA_MERGE=path/to/merge_models.py python run_kohya.py A B OUT ALPHA

The script wants sd-scripts' own library for nothing but its log, which brings diffusers and OpenCV along; it gets an
empty one, which is in its favour.
"""

from __future__ import annotations

import os
import runpy
import sys
from types import ModuleType

first, second, output, alpha = sys.argv[1:]
utils = ModuleType("library.utils")
utils.setup_logging = lambda: None  # type: ignore[attr-defined]
sys.modules |= {"library": ModuleType("library"), "library.utils": utils}
ratios = [str(1 - float(alpha)), alpha]
sys.argv = ["merge_models.py", "--models", first, second, "--ratios", *ratios, "--output", output]
sys.argv += ["--precision", "float", "--saving_precision", "fp16"]
runpy.run_path(os.environ["KOHYA_MERGE"], run_name="__main__")
