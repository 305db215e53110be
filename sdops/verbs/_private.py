"""Metadata that tell more than their owner may want: whole workflows, tag lists of data sets, folders of a machine."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

# Whole graphs and prompts that user interfaces save along.
WORKFLOW = ("prompt", "workflow", "parameters", "extra_pnginfo", "generation_data", "invokeai_metadata")

# Of the trainer's `ss_*` keys: what says how a file is to be used. All others go with `--strip-training`.
KEPT = frozenset({
    "ss_base_model_version", "ss_network_module", "ss_network_dim", "ss_network_alpha", "ss_network_args", "ss_v2",
    "ss_v_parameterization", "ss_zero_terminal_snr", "ss_clip_skip", "ss_resolution", "ss_output_name",
    "ss_mixed_precision",
})  # fmt: skip

_TRAINING = re.compile(r"ss_|ot_config$|ot_branch$|ot_revision$|training_info$|simpletuner_config$|ai_toolkit_config$")
_PATH = re.compile(r"(?:^|[\s\"'=(\[])(?:/(?:home|Users|mnt|media|root|workspace|content)/|[A-Za-z]:\\{1,2}[^\s\\])")
_TAGS = ("ss_tag_frequency", "ss_datasets", "ss_dataset_dirs")


def training_keys(metadata: Iterable[str]) -> list[str]:
    """Keys of training that nobody needs to use the file."""
    return [key for key in metadata if _TRAINING.match(key) and key not in KEPT]


def workflow_keys(metadata: Iterable[str]) -> list[str]:
    """Keys that hold workflows and prompts."""
    return [key for key in metadata if key in WORKFLOW]


def findings(metadata: Mapping[str, str]) -> dict[str, str]:
    """Key -> what it gives away."""
    found = dict.fromkeys(workflow_keys(metadata), "a whole workflow or prompt")
    found |= {
        key: "folders and tags of the training data" for key in _TAGS if metadata.get(key, "{}") not in ("", "{}")
    }
    found |= {key: "folders of a machine" for key, text in metadata.items() if key not in found and _PATH.search(text)}
    return found
