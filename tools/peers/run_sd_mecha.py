"""sd-mecha with its defaults: merged in float32, stored as float16.

python run_sd_mecha.py A B OUT ALPHA
"""

from __future__ import annotations

import sys
from pathlib import Path

import sd_mecha

first, second, output, alpha = sys.argv[1:]
recipe = sd_mecha.weighted_sum(sd_mecha.model(Path(first)), sd_mecha.model(Path(second)), alpha=float(alpha))
sd_mecha.merge(recipe, output=Path(output))
