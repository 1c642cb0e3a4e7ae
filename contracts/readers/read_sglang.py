"""SGLang: what its functions read from a config. They are taken out of their files, whose imports need a GPU.

Its model is not built, so names and shapes of tensors are not checked here.
"""

import __future__

import ast
import dataclasses
import importlib.util
import json
import sys
import types
import typing
from pathlib import Path
from typing import Any

import msgspec
from transformers import AutoConfig

from answers import JOB, answer

SRT = Path(importlib.util.find_spec("sglang").submodule_search_locations[0]) / "srt"


def taken(path: str, *names: str, **given: Any) -> Any:
    """The constants, classes and functions of these names, out of a file; `given` is what the file imports."""
    source = ast.parse((SRT / path).read_text())
    source.body = [node for node in source.body if names_of(node) & set(names)]
    missing = set(names) - {name for node in source.body for name in names_of(node)}
    if missing:
        raise LookupError(f"{path} has no {missing}")
    module = types.ModuleType(f"taken_{Path(path).stem}")
    sys.modules[module.__name__] = module  # where a class looks for the types of its fields
    vars(module).update({name: getattr(typing, name) for name in typing.__all__}, **given)
    exec(compile(source, path, "exec", flags=__future__.annotations.compiler_flag), vars(module))
    return module


def names_of(node: ast.stmt) -> set[str]:
    """What a statement defines."""
    if isinstance(node, ast.Assign):
        return {ast.unparse(target) for target in node.targets}
    return {node.name} if hasattr(node, "name") else set()


def entries() -> dict[str, str]:
    """The architectures that SGLang knows -> the file of their class."""
    found = {}
    for path in (SRT / "models").glob("*.py"):
        for node in ast.parse(path.read_text()).body:
            if "EntryClass" in names_of(node):
                names = node.value.elts if isinstance(node.value, ast.List) else [node.value]
                found |= {ast.unparse(name): path.name for name in names}
    return found


DFLASH = taken(
    "speculative/dflash_utils.py",
    "DEFAULT_DFLASH_MASK_TOKEN",
    "build_target_layer_ids",
    "get_dflash_layer_types",
    "get_dflash_attention_sliding_window_size",
    "_cfg_get",
    "_get_text_config",
    "_get_dflash_config",
    "is_nemotron_35_draft_config",
    "_parse_optional_int",
    "DFlashDraftConfig",
    "parse_dflash_draft_config",
    dataclass=dataclasses.dataclass,
    Integral=int,
    Sequence=list,
)
DSPARK = taken(
    "speculative/dspark_components/dspark_config.py",
    "SUPPORTED_DSPARK_MARKOV_HEAD_TYPES",
    "get_dspark_sample_from_anchor",
    "DSparkDraftConfig",
    "DSparkRuntimeConfig",
    "resolve_runtime_config",
    "_cfg_get",
    "_get_text_config",
    "_get_nested_config",
    "_get_dspark_config",
    "parse_dspark_draft_config",
    msgspec=msgspec,
    parse_dflash_draft_config=DFLASH.parse_dflash_draft_config,
)
ATTENTION = taken("layers/radix_attention.py", "AttentionType", Enum=__import__("enum").Enum)
MODEL = taken(
    "models/dflash.py",
    "_get_dflash_attention_type",
    "_get_dflash_layer_attention_params",
    AttentionType=ATTENTION.AttentionType,
    get_dflash_layer_types=DFLASH.get_dflash_layer_types,
    get_dflash_attention_sliding_window_size=DFLASH.get_dflash_attention_sliding_window_size,
)
ROPE = taken("utils/hf_transformers/common.py", "get_rope_config")
ENTRIES = entries()
TARGET = json.loads((JOB / "target" / "config.json").read_text())


def read(folder: Path) -> dict:
    """What SGLang reads from a draft's config."""
    config = AutoConfig.from_pretrained(folder)
    fields = DFLASH.parse_dflash_draft_config(draft_hf_config=config)
    theta, _ = ROPE.get_rope_config(config)
    layers = [MODEL._get_dflash_layer_attention_params(config, layer) for layer in range(config.num_hidden_layers)]
    layer_ids = fields.resolve_target_layer_ids(target_num_layers=TARGET["num_hidden_layers"])
    found = {
        "file": ENTRIES.get(config.architectures[0]),
        "layer_ids": layer_ids,
        "rope_theta": theta,
        "causal": [kind.name == "DECODER" for _, kind in layers],
    }
    found["windows"] = [left + 1 or None for left, _ in layers]  # the token itself is not counted there
    if "DSpark" in config.architectures[0]:
        runtime = DSPARK.resolve_runtime_config(
            draft_hf_config=config, speculative_num_draft_tokens=None, target_vocab_size=TARGET["vocab_size"]
        )
        head = DSPARK.parse_dspark_draft_config(draft_hf_config=config)
        found["proposed"] = runtime.gamma
        found["sample_from_anchor"] = DSPARK.get_dspark_sample_from_anchor(config)
        return found | {"mask_token_id": runtime.mask_token_id} | msgspec.structs.asdict(head)
    return dataclasses.asdict(fields) | found


answer(read)
