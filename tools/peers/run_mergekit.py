"""mergekit-pytorch: linear in float32, stored as float16.

python run_mergekit.py A B OUT ALPHA
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

from mergekit.scripts.merge_raw_pytorch import main

first, second, output, alpha = sys.argv[1:]
config = {
    "merge_method": "linear",
    "dtype": "float32",
    "out_dtype": "float16",
    "models": [
        {"model": first, "parameters": {"weight": 1 - float(alpha)}},
        {"model": second, "parameters": {"weight": float(alpha)}},
    ],
}
with tempfile.TemporaryDirectory(dir=Path(output).parent) as folder:
    recipe = Path(folder) / "recipe.yml"
    recipe.write_text(json.dumps(config))  # JSON is YAML
    result = Path(folder) / "result"
    main([str(recipe), str(result), "--quiet", "--out-shard-size", "1000B"], standalone_mode=False)
    (written,) = result.glob("*.safetensors")
    written.rename(output)
