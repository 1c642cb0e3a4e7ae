"""A thousand published configs with something wrong in them: each is read as it is written, or refused by name."""

import copy
import json
import math
import random
import string
from dataclasses import MISSING, dataclass
from typing import Any

from dflash_hub import DFlash2Config, DFlashConfig
from dflash_hub.layouts_dflash import FULL, SLIDING
from paths import DATA

SEED = 20261125
CASES = 1000
FILES = {path.stem: json.loads(path.read_text()) for path in sorted((DATA / "published_configs").glob("*.json"))}
NEMOTRON = "nvidia__NVIDIA-Nemotron-3.5-Lightning-30B-A3B-NVFP4-DFlash"
GIVEN = {NEMOTRON: {"block_size": 8}}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 10240, "rope_theta": 1000000}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 1000000}
LONG = {"rope_type": "longrope", "short_factor": [1.0] * 64, "long_factor": [4.0] * 64, "rope_theta": 1000000}
WINDOW = {"use_swa": True, "swa_window_size": 512, "causal": False}


def dialect(**changes: Any) -> dict[str, Any]:
    """The Qwen3-4B draft as another writer has it."""
    content = copy.deepcopy(FILES["z-lab__Qwen3-4B-DFlash-b16"])
    content["dflash_config"] |= changes.pop("dflash_config", {})
    return content | changes


FILES |= {
    "NeMo": dialect(dflash_config={"block_size": 16, "output_multiplier": 1.0}, rope_parameters=YARN),
    "SpecForge": dialect(rope_scaling=YARN | {"type": "yarn"}, rope_parameters=YARN),
    "ModelOpt": dialect(sliding_window=512, dflash_config=WINDOW, use_sliding_window=None),
    "JetSpec": dialect(dflash_config={"causal_head": True, "target_hidden_size": 2560}),
    "copies": dialect(
        mask_token_id=151669, pard_token=151669, draft_vocab_size=151936, is_causal=False, v_head_dim=128
    ),
    "llama3": dialect(rope_parameters=LLAMA3),
    "longrope": dialect(rope_parameters=LONG),
}
REFUSED = ("speculator", "speculators", "MiMo", "Qwen3.6-35B")
ODD = (
    None,
    True,
    False,
    0,
    -1,
    1,
    2,
    3,
    7,
    10**9,
    10**40,
    -(10**12),
    0.0,
    0.5,
    1.0,
    16.0,
    -2.5,
    1e300,
    math.nan,
    math.inf,
)
ODD += (-math.inf, "", "16", "true", "banana", "sliding_attention", "bfloat16", [], [0], [1, 2], [2, 1], [1, 1], [None])
ODD += (
    [1, "2"],
    [True, False],
    [[1, 9]],
    [[[]]],
    [1.5],
    ["full_attention"],
    ["DFlashDraftModel"],
    [10**9],
    list(range(3000)),
)
ODD += (
    {},
    {"a": 1},
    {"rope_type": "yarn"},
    {"AutoConfig": 5},
    {"": {}},
    {"rope_theta": [1]},
    "x" * 5000,
    [[[[[[[[[[1]]]]]]]]]],
)
EXTRA = (
    "is_causal",
    "causal",
    "causal_head",
    "use_swa",
    "swa_window_size",
    "sliding_window",
    "draft_vocab_size",
    "dtype",
)
EXTRA += (
    "torch_dtype",
    "rope_scaling",
    "rope_parameters",
    "rope_theta",
    "markov_rank",
    "attention_sink_bias",
    "v_head_dim",
)
EXTRA += ("pard_token", "eagle_aux_hidden_state_layer_ids", "hidden_dim_adapter", "projector_type", "conv_kernel_size")
EXTRA += (
    "quantization_config",
    "auto_map",
    "final_logit_softcapping",
    "model_type",
    "id2label",
    "num_labels",
    "use_cache",
)
EXTRA += (
    "tie_word_embeddings",
    "_name_or_path",
    "transformers_version",
    "output_hidden_states",
    "problem_type",
    "layer_types",
)
EXTRA += (
    "configuration_files",
    "per_layer_config",
    "attn_implementation",
    "return_dict",
    "speculators_config",
    "kv_lora_rank",
)
ROPE = ("rope_parameters", "rope_scaling")
RIGHT = ("must", "supply it", "say which holds", "refused", "Pass the draft's")

# What no reader of a draft needs, at the top.
IGNORED = {
    "tie_word_embeddings",
    "transformers_version",
    "return_dict",
    "output_hidden_states",
    "problem_type",
    "id2label",
}
IGNORED |= {"num_labels", "use_swa", "swa_window_size", "causal", "causal_head", "_name_or_path"}

# Key -> fields it bears on, where that is not the field of its own name.
CAUSAL = dict.fromkeys(("is_causal", "causal", "causal_head", "dflash_query_causal"), ("is_causal",))
LAYERS = ("layer_types", "is_causal", "sliding_window")
BEARS_ON = CAUSAL | {
    "layer_types": LAYERS,
    "use_swa": LAYERS,
    "swa_window_size": ("sliding_window",),
    "num_hidden_layers": ("num_hidden_layers", "layer_types", "is_causal"),
    "hidden_size": ("hidden_size", "target_hidden_size"),
    "pard_token": ("mask_token_id",),
    "ptd_token_id": ("mask_token_id",),
    "eagle_aux_hidden_state_layer_ids": ("target_layer_ids",),
    "torch_dtype": ("dtype",),
    "rope_theta": ("rope_parameters",),
    "rope_scaling": ("rope_parameters",),
    "max_position_embeddings": ("max_position_embeddings", "rope_parameters"),
    "dflash_config": (
        "final_logit_softcapping",
        "target_hidden_size",
        "output_multiplier",
        "num_target_layers",
        *LAYERS,
    ),
}


@dataclass
class Case:
    """A config.json and what was done to it: at `path`, `was` became `value`; MISSING where there is no such key."""

    name: str
    content: Any
    path: tuple[str, ...]
    was: Any
    value: Any
    renamed: str | None = None

    def __str__(self) -> str:
        return f"{self.name}: {'.'.join(self.path)} was {self.was!r:.60}, is {self.value!r:.60}, renamed {self.renamed}"


def typo(draw: random.Random, key: str) -> str:
    at = draw.randrange(len(key))
    letter = draw.choice(string.ascii_lowercase)
    return draw.choice(
        (key[:at] + key[at + 1 :], key[:at] + letter + key[at:], key[:at] + letter + key[at + 1 :], key + "s")
    )


def places(content: dict[str, Any]) -> list[tuple[str, ...]]:
    inner = [(outer, key) for outer in ("dflash_config", *ROPE) for key in content.get(outer) or ()]
    return [(key,) for key in content] + 3 * inner


def mutated(draw: random.Random) -> Case:
    """One published config with one thing changed."""
    name = draw.choice(sorted(FILES))
    content = copy.deepcopy(FILES[name])
    kind = draw.choice(("replace", "replace", "replace", "wrap", "near", "delete", "rename", "add", "add", "whole"))
    path = draw.choice(places(content))
    if kind == "whole" and draw.random() < 0.2:
        value = draw.choice([one for one in ODD if not isinstance(one, dict)])
        return Case(name, value, (), content, value)
    if kind == "add":
        path = draw.choice(((draw.choice(EXTRA),), ("dflash_config", draw.choice(EXTRA))))
    holder = content
    for key in path[:-1]:
        holder = holder.setdefault(key, {})
    key = path[-1]
    was = holder.get(key, MISSING)
    if kind in ("delete", "rename"):
        del holder[key]
        renamed = typo(draw, key) if kind == "rename" else None
        if renamed and renamed not in holder:
            holder[renamed] = was
        return Case(name, content, path, was, MISSING, renamed)
    holder[key] = draw.choice(ODD)
    if kind == "wrap" and was is not MISSING:
        holder[key] = draw.choice((str(was), [was], {"value": was}, (was,)))
    if kind == "near" and isinstance(was, int | float):
        holder[key] = draw.choice((was + 1, was * 2, float(was), -was, was // 2, was * 10**6))
    return Case(name, content, path, was, holder[key])


def reader(name: str) -> Any:
    return DFlash2Config if "DFlash2" in name else DFlashConfig


def read(name: str, content: Any) -> Any:
    return reader(name).from_dict(content, **GIVEN.get(name, {}))


def fields(config: Any) -> dict[str, Any]:
    return {name: value for name, value in config.to_dict().items() if name not in ("auto_map", "quantization_config")}


def same(one: Any, other: Any) -> bool:
    """Equal, and of the same type all the way down."""
    return json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)


def check_read(case: Case, config: Any, plain: dict[str, Any]) -> None:
    """The config says what the file says, and of everything else what the file says without the mutation."""
    found, key = fields(config), case.path[-1]
    concerned = BEARS_ON.get(case.path[0] if case.path[0] in ROPE else key, (key,))
    concerned = ("rope_parameters",) if case.path[0] in ROPE else concerned
    if len(case.path) == 1 and key in IGNORED:
        assert same(found, plain), found
        return
    for name in {*found, *plain} - {*concerned}:
        assert same(found.get(name), plain.get(name)), f"{name} is {found.get(name)!r}, not {plain.get(name)!r}"
    value = list(case.value) if isinstance(case.value, tuple) else case.value
    if value in (None, MISSING) or key not in found or case.path[0] in ROPE or key in ("model_type", "architectures"):
        check_meaning(case, config, value)
    elif key != "sliding_window" or SLIDING in config.layer_types:
        assert same(json.loads(json.dumps(found[key], default=str)), value), f"{key} is {found[key]!r}"


def check_meaning(case: Case, config: Any, value: Any) -> None:
    """What a key means whose name is not a field's, and what holds where nothing is said."""
    key, default = case.path[-1], reader(case.name).__dataclass_fields__.get(case.path[-1])
    if (
        case.path[0] in ROPE
        and len(case.path) == 2
        and value not in (None, MISSING)
        and key not in ("type", "partial_rotary_factor")
    ):
        assert config.rope_parameters[key] == value
    elif key == "rope_theta" and value not in (None, MISSING):
        assert config.rope_parameters["rope_theta"] == value
    elif key in CAUSAL and value not in (None, MISSING):
        assert config.is_causal == value
    elif key == "swa_window_size" and SLIDING in config.layer_types and value not in (None, MISSING):
        assert config.sliding_window == value
    elif key == "use_swa" and value is True:
        assert SLIDING in config.layer_types
    elif key == "is_causal" and value in (None, MISSING) and "is_causal" not in str(FILES[case.name]["dflash_config"]):
        assert config.causal_layers == [kind == SLIDING for kind in config.layer_types] or "causal" in str(case.content)
    elif value in (None, MISSING) and key in (
        "hidden_act",
        "initializer_range",
        "attention_bias",
        "attention_dropout",
        "use_cache",
    ):
        assert same(getattr(config, key), default.default)
    assert set(config.layer_types) <= {FULL, SLIDING}


def named(value: Any, message: str) -> bool:
    """Whether an error shows a value, or what is wrong inside it."""
    if repr(value)[:60] in message or (isinstance(value, tuple) and repr(list(value))[:60] in message):
        return True
    return isinstance(value, dict) and (any(str(key) in message for key in value) or not value)


def check_refused(case: Case, error: BaseException) -> None:
    message = str(error)
    assert type(error) is ValueError, f"{type(error).__name__}: {message}"
    assert any(words in message for words in RIGHT) or " meant?" in message, message
    assert len(message) < 2000, len(message)
    if any(part in case.name for part in REFUSED) or not case.path:
        return
    assert case.path[-1] in message or (case.renamed and case.renamed in message), message
    if case.value is not MISSING:
        assert named(case.value, message), message


def check(case: Case, plain: dict[str, dict[str, Any]]) -> None:
    try:
        config = read(case.name, copy.deepcopy(case.content))
    except Exception as error:
        check_refused(case, error)
    else:
        check_read(case, config, plain[case.name])


def readable() -> dict[str, dict[str, Any]]:
    """What the files give as they are, where they are read."""
    return {
        name: fields(read(name, content))
        for name, content in FILES.items()
        if not any(part in name for part in REFUSED)
    }


def run(seed: int, cases: int) -> list[str]:
    """Seeds and cases -> what was found wrong."""
    draw, plain, wrong = random.Random(seed), readable(), []
    for _ in range(cases):
        case = mutated(draw)
        try:
            check(case, plain)
        except AssertionError as error:
            wrong.append(f"{case}\n    {error}")
        except Exception as error:
            wrong.append(f"{case}\n    the check: {type(error).__name__}: {error}")
    return wrong


def test_a_thousand_mutated_configs_are_read_as_written_or_refused_by_name():
    wrong = run(SEED, CASES)
    assert not wrong, f"{len(wrong)} of {CASES}:\n" + "\n".join(wrong[:10])
