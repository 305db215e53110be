"""What the header of an adapter says: trigger words, tags, what it was trained on; carried over, joined, stripped."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sdops.core.patch import Adapter
from sdops.verbs._private import training_keys
from sdops.verbs._provenance import RECIPE

_TRIGGERS = ("modelspec.trigger_phrase", "trigger_words", "trigger_word", "trainedWords", "instance_prompt")
_TAGS = "ss_tag_frequency"
_REPEATED = re.compile(r"\d+_(.+)")  # a folder of pictures: repetitions and words
_STALE = ("sshs_", "modelspec.hash_sha256")  # hashes of what the tensors were
_LYCORIS_ARGS = ("algo", "factor", "decompose_both", "use_tucker", "full_matrix", "use_scalar", "bypass_mode")
_COMMON = ("ss_base_model_version", "ss_v2", "ss_v_parameterization", "ss_zero_terminal_snr", "ss_clip_skip")
_JOINED = ("modelspec.tags", "modelspec.usage_hint", "modelspec.license", "modelspec.author")


def trigger_words(metadata: Mapping[str, str]) -> list[str]:
    """The words that the author says bring the adapter out, each once."""
    found: dict[str, None] = {}
    for key in _TRIGGERS:
        text = metadata.get(key, "").strip()
        words = _parsed(text) if text[:1] == "[" else text.split(",")
        if isinstance(words, list):
            found |= dict.fromkeys(word.strip() for word in map(str, words) if word.strip())
    return list(found)


def trained_words(metadata: Mapping[str, str]) -> list[str]:
    """What kohya's trainer put in front of pictures without captions, each once: from the names of their folders."""
    found: dict[str, None] = {}
    for data_set in _list(_parsed(metadata.get("ss_datasets", ""))):
        for subset in _list(data_set.get("subsets")) if isinstance(data_set, dict) else []:
            word = subset.get("class_tokens") if isinstance(subset, dict) else None
            found |= {str(word).strip(): None} if word else {}
    folders = _parsed(metadata.get("ss_dataset_dirs", ""))
    for folder in folders if isinstance(folders, dict) else ():
        if named := _REPEATED.fullmatch(str(folder)):
            found[named[1].strip()] = None
    return [word for word in found if word]


def _list(document: Any) -> list[Any]:
    return document if isinstance(document, list) else []


def tags(metadata: Mapping[str, str]) -> Counter[str]:
    """How often the training captions had each tag, over all data sets."""
    found: Counter[str] = Counter()
    for counts in _data_sets(metadata).values():
        for tag, number in counts.items():
            found[tag.strip()] += number
    return found


def _data_sets(metadata: Mapping[str, str]) -> dict[str, dict[str, int]]:
    """Data set -> tag -> how often, of what trainers write; anything else is passed over."""
    document = _parsed(metadata.get(_TAGS, ""))
    if not isinstance(document, dict):
        return {}
    return {
        str(name): {str(tag): number for tag, number in counts.items() if isinstance(number, int)}
        for name, counts in document.items()
        if isinstance(counts, dict)
    }


def carried(adapter: Adapter, ranks: Iterable[int], conv_ranks: Iterable[int], *, strip: bool) -> dict[str, str]:
    """The header of an adapter that was changed: its own, with ranks as they are now and without hashes that no
    longer hold.

    Args:
        adapter: The original.
        ranks: Of the result's layers.
        conv_ranks: Of its convolutions larger than 1x1.
        strip: Leave out what trainers note beyond what is needed to use the file.
    """
    header = {key: text for key, text in adapter.source.metadata.items() if not key.startswith(_STALE)}
    if any(patch.family in ("loha", "lokr") for patch in adapter.patches) and "ss_network_module" in header:
        header["ss_network_module"] = "networks.lora"
    return stripped(_with_ranks(header, ranks, conv_ranks), strip)


def union(
    adapters: Sequence[Adapter], ranks: Iterable[int], conv_ranks: Iterable[int], title: str, *, strip: bool
) -> dict[str, str]:
    """The header of several adapters as one: what all agree on, all trigger words, the sum of the tags."""
    headers = [adapter.source.metadata for adapter in adapters]
    header = {
        "format": "pt",
        "ss_network_module": "networks.lora",
        "ss_output_name": title,
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.title": title,
        "modelspec.merged_from": ", ".join(adapter.source.name for adapter in adapters),
    }
    for key in (*_COMMON, "modelspec.architecture", "modelspec.implementation", "modelspec.prediction_type"):
        said = {text for one in headers if (text := one.get(key))}
        if len(said) == 1:
            header[key] = said.pop()
    for key in _JOINED:
        parts = dict.fromkeys(part.strip() for one in headers for part in one.get(key, "").split(",") if part.strip())
        if parts:
            header[key] = ", ".join(parts)
    words = dict.fromkeys(word for one in headers for word in trigger_words(one))
    if words:
        header["modelspec.trigger_phrase"] = ", ".join(words)
    if data_sets := _joined_data_sets(headers):
        header[_TAGS] = json.dumps(data_sets, ensure_ascii=False)
    return stripped(_with_ranks(header, ranks, conv_ranks), strip)


def _joined_data_sets(headers: Sequence[Mapping[str, str]]) -> dict[str, dict[str, int]]:
    joined: dict[str, dict[str, int]] = {}
    for header in headers:
        for name, counts in _data_sets(header).items():
            mine = joined.setdefault(name, {})
            for tag, number in counts.items():
                mine[tag] = mine.get(tag, 0) + number
    return joined


def stripped(header: Mapping[str, str], strip: bool) -> dict[str, str]:
    """Without tags, folders and settings of the training, if so wished."""
    gone = set(training_keys(header)) if strip else set()
    return {key: text for key, text in header.items() if key not in gone}


def _with_ranks(header: Mapping[str, str], ranks: Iterable[int], conv_ranks: Iterable[int]) -> dict[str, str]:
    """Ranks as trainers write them; alpha is the rank in all that sdops writes."""
    said, conv = _one(ranks), _one(conv_ranks)
    found = dict(header) | ({"ss_network_dim": said, "ss_network_alpha": said} if said else {})
    given = _parsed(found.get("ss_network_args", ""))
    args: dict[str, Any] = dict(given) if isinstance(given, dict) else {}
    args = {key: value for key, value in args.items() if key not in (*_LYCORIS_ARGS, "conv_dim", "conv_alpha")}
    if conv:
        args |= {"conv_dim": conv, "conv_alpha": conv}
    if args:
        found["ss_network_args"] = json.dumps(args)
    else:
        found.pop("ss_network_args", None)
    return found


def _one(ranks: Iterable[int]) -> str:
    each = set(ranks)
    return "" if not each else str(each.pop()) if len(each) == 1 else "Dynamic"


def _parsed(text: str) -> Any:
    """JSON, or None where it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def with_recipe(header: Mapping[str, str], made: Mapping[str, Any]) -> dict[str, str]:
    """The header with how the file was made."""
    return {**header, RECIPE: json.dumps(made, ensure_ascii=False, separators=(",", ":"))}
