"""Go along the arc between two models instead of the chord."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from sdops.merges._geometry import arc_weights

if TYPE_CHECKING:
    from sdops.merges._geometry import Coefficients, Gram

EXECUTION = "gram"
INPUTS = "a, b"


def slerp(gram: Gram, *, alpha: float = 0.5) -> Coefficients:
    """sin((1 - alpha) t) / sin t a + sin(alpha t) / sin t b,   t = angle between a and b as flat vectors.

    The weights apply to the raw tensors. A zero tensor, parallel ones (sin t < 1e-6, where both agree) and opposite
    ones (cos t < -0.9995, where the arc is not defined) are interpolated linearly. mergekit goes linear from
    |cos t| > 0.9995 on, as nearly all pairs of fine-tunes are. sd-mecha normalises both and scales the result to
    the interpolated norm.

    Source: Shoemake, Animating Rotation with Quaternion Curves, 1985; arcee-ai/mergekit, `slerp`.

    Args:
        alpha: Position on the arc, 0 is a, 1 is b.
    """
    (aa, ab), (_, bb) = gram.tolist()
    return np.array(arc_weights(aa, ab, bb, alpha))
