"""A thousand published configs with something wrong in them: each is read as it is written, or refused by name."""

import copy
import json
import math
import random
import string
from dataclasses import dataclass
from typing import Any

from dflash_hub import DFlash2Config, DFlashConfig, DominoConfig, DSparkConfig
from dflash_hub.layouts import _KEYS, _NESTED, _RULES
from dflash_hub.layouts_dflash import SLIDING
from dflash_hub.layouts_speculators import BODY, IN_BODY, NON_CAUSAL, TAPS, TYPE
from paths import DATA

SEED = 20261125
CASES = 1000
FILES = {path.stem: json.loads(path.read_text()) for path in sorted((DATA / "published_configs").glob("*.json"))}
NEMOTRON = "nvidia__NVIDIA-Nemotron-3.5-Lightning-30B-A3B-NVFP4-DFlash"
EARLY = "early_speculators_test_repo"
GIVEN = {NEMOTRON: {"block_size": 8}, EARLY: {"mask_token_id": 9, "target_layer_ids": [1, 17, 33]}}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 10240, "rope_theta": 1000000}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 1000000}
LONG = {"rope_type": "longrope", "short_factor": [1.0] * 64, "long_factor": [4.0] * 64, "rope_theta": 1000000}
MARKOV = {"markov_rank": 256, "markov_head_type": "gated", "enable_confidence_head": True}
MARKOV["confidence_head_with_markov"] = False
DOMINO = {"projector_type": "domino", "emb_dim": 256, "gru_hidden_dim": 1024, "pure_draft_prefix_len": 1}
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
    "DSpark": dialect(
        architectures=["DSparkDraftModel"], dflash_config=MARKOV | {"projector_type": "dspark"}, **MARKOV
    ),
    "Domino": dialect(dflash_config=DOMINO | {"shift_label": True}, emb_dim=256),
}
REFUSED = ("MiMo",)  # in the names of files that are refused anyway
NUMBERS = (0, -1, 1, 2, 3, 7, 10**9, 10**40, -(10**12), 0.0, 0.5, 1.0, 16.0, -2.5, 1e300, math.nan, math.inf, -math.inf)
TEXTS = ("", "16", "true", "banana", "sliding_attention", "bfloat16", "x" * 5000)
LISTS = ([], [0], [1, 2], [2, 1], [1, 1], [None], [1, "2"], [True, False], [[1, 9]], [[[]]], [1.5], ["full_attention"])
LISTS += (["DFlashDraftModel"], [10**9], list(range(3000)), [[[[[[[[[[1]]]]]]]]]])
DICTS = ({}, {"a": 1}, {"rope_type": "yarn"}, {"AutoConfig": 5}, {"": {}}, {"rope_theta": [1]})
ODD = (None, True, False, *NUMBERS, *TEXTS, *LISTS, *DICTS)
KNOWN = {*_RULES, *_NESTED, *(key for keys in _KEYS.values() for key in keys if "." not in key)}
TAKEN = ("output_hidden_states", "problem_type", "per_layer_config", "return_dict", "configuration_files")  # elsewhere
ADDED = [
    *sorted(KNOWN),
    *TAKEN,
    "_name_or_path",
    "transformers_version",
    "speculators_config",
    "kv_lora_rank",
    "casual",
]
ROPE = ("rope_parameters", "rope_scaling")
RIGHT = ("must", "supply it", "choose a value", "refused", "Pass the draft's")  # what tells what would be right
ABSENT = object()

# Keys that no reader of a draft needs, or not at the top, though a config has attributes of these names.
IGNORED = {
    *TAKEN,
    "tie_word_embeddings",
    "transformers_version",
    "id2label",
    "num_labels",
    "use_swa",
    "swa_window_size",
}
IGNORED |= {"causal", "causal_head", "_name_or_path"}
OTHER_NAMES = {
    **dict.fromkeys(("causal", "causal_head", "dflash_query_causal"), "is_causal"),
    **dict.fromkeys(("pard_token", "ptd_token_id"), "mask_token_id"),
    "eagle_aux_hidden_state_layer_ids": "target_layer_ids",
    "swa_window_size": "sliding_window",
    "torch_dtype": "dtype",
    "shift_label": "sample_from_anchor",
    "use_confidence_head": "enable_confidence_head",
    TAPS: "target_layer_ids",
    "has_embed_tokens": "has_own_embed_tokens",
    "has_lm_head": "has_own_lm_head",
}
# Key -> the fields that it bears on, where it is more than the one of its name.
LAYERS = ("layer_types", "is_causal", "sliding_window")
BEARS_ON = {
    "layer_types": LAYERS,
    "use_swa": LAYERS,
    "num_hidden_layers": ("num_hidden_layers", *LAYERS),
    "hidden_size": ("hidden_size", "target_hidden_size"),
    "rope_theta": ("rope_parameters",),
    "rope_scaling": ("rope_parameters",),
    "max_position_embeddings": ("max_position_embeddings", "rope_parameters"),
    "draft_vocab_size": ("draft_vocab_size", "has_own_lm_head"),
    "vocab_size": ("vocab_size", "draft_vocab_size", "has_own_lm_head"),
    "dflash_config": ("final_logit_softcapping", "target_hidden_size", "num_target_layers", *LAYERS),
}
DEFAULTS = {
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "use_cache": True,
}


@dataclass
class Case:
    """A config.json in which `path` was given a value, or taken away (ABSENT), perhaps to stand under another name."""

    name: str
    content: Any
    path: tuple[str, ...]
    value: Any
    renamed: str | None = None

    def __str__(self) -> str:
        return f"{self.name}: {'.'.join(self.path)} is {self.value!r:.60}, or its name is {self.renamed}"


def typo(draw: random.Random, key: str) -> str:
    at, letter = draw.randrange(len(key)), draw.choice(string.ascii_lowercase)
    before, after = key[:at], key[at + 1 :]
    return draw.choice((before + after, before + letter + key[at:], before + letter + after, key + "s"))


def mutated(draw: random.Random) -> Case:
    """One config with one thing changed."""
    name = draw.choice(sorted(FILES))
    content = copy.deepcopy(FILES[name])
    kind = draw.choice(["replace"] * 3 + ["add"] * 2 + ["wrap", "near", "delete", "rename", "whole"])
    if kind == "whole" and draw.random() < 0.2:
        value = draw.choice([one for one in ODD if not isinstance(one, dict)])
        return Case(name, value, (), value)
    inner = [(outer, key) for outer in ("dflash_config", BODY, *ROPE) for key in content.get(outer) or ()]
    body = content.get(BODY) or {}
    inner += [(BODY, outer, key) for outer in ROPE for key in body.get(outer) or ()]
    path = draw.choice([(key,) for key in content] + 3 * inner)
    if kind == "add":
        path = (*draw.choice(((), ("dflash_config",), *[(BODY,) for _ in body][:1])), draw.choice(ADDED))
    holder = content
    for outer in path[:-1]:
        holder = holder.setdefault(outer, {})
    was = holder.pop(path[-1], ABSENT)
    if kind in ("delete", "rename"):
        renamed = typo(draw, path[-1]) if kind == "rename" else None
        holder |= {renamed: was} if renamed else {}
        return Case(name, content, path, ABSENT, renamed)
    value = draw.choice(ODD)
    if kind == "wrap":
        value = draw.choice((str(was), [was], {"value": was}, (was,)))
    elif kind == "near" and isinstance(was, int | float):
        value = draw.choice((was + 1, was * 2, float(was), -was, was // 2, was * 10**6))
    holder[path[-1]] = value
    return Case(name, content, path, value)


def reader(name: str) -> Any:
    if name == "DSpark":
        return DSparkConfig
    if name == "Domino":
        return DominoConfig
    return DFlash2Config if "DFlash2" in name else DFlashConfig


def read(name: str, content: Any) -> Any:
    return reader(name).from_dict(content, **GIVEN.get(name, {}))


def fields(config: Any) -> dict[str, Any]:
    return {name: value for name, value in config.to_dict().items() if name not in ("auto_map", "quantization_config")}


def same(one: Any, other: Any) -> bool:
    """Equal, and of the same type all the way down."""
    return json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)


def is_ignored(case: Case) -> bool:
    """Whether no reader of a draft needs this key where it stands."""
    key, outer = case.path[-1], case.path[:-1]
    if TYPE not in FILES[case.name]:
        return not outer and key in IGNORED
    if outer == (BODY,):
        return key not in IN_BODY
    elsewhere = {*IN_BODY, *OTHER_NAMES, *IGNORED, "target_layer_ids", NON_CAUSAL, "speculators_config"} - {TAPS}
    return outer == ("dflash_config",) or (not outer and key in elsewhere)


def check_read(case: Case, config: Any, plain: dict[str, Any]) -> None:
    """The config says what the file says, and of everything else what the file says without the mutation."""
    found, key = fields(config), case.path[-1]
    field = OTHER_NAMES.get(key, key)
    concerned = ("rope_parameters",) if in_rope(case) else BEARS_ON.get(key, (field,))
    if is_ignored(case) or field in GIVEN.get(case.name, {}):
        concerned = ()
    for name in {*found, *plain} - {*concerned}:
        assert same(found.get(name), plain.get(name)), f"{name} is {found.get(name)!r}, not {plain.get(name)!r}"
    if concerned and case.value in (None, ABSENT):
        assert key not in DEFAULTS or same(found[key], DEFAULTS[key]), f"{key} is {found[key]!r}, not its default"
    elif concerned:
        check_meaning(case, config, found.get(field))


def in_rope(case: Case) -> bool:
    return any(outer in ROPE for outer in case.path)


def check_meaning(case: Case, config: Any, found: Any) -> None:
    key = case.path[-1]
    value = list(case.value) if isinstance(case.value, tuple) else case.value
    if in_rope(case):
        rope = value if key in ROPE else {key: value}
        assert config.rope_parameters | {one: rope[one] for one in rope if one != "type"} == config.rope_parameters
    elif key == "rope_theta":
        assert config.rope_parameters["rope_theta"] == value
    elif key == "use_swa":
        assert SLIDING in config.layer_types or value is False
    elif key in ("eagle_aux_hidden_state_layer_ids", TAPS):
        assert found == [index - 1 for index in value]
    elif found is not None and key not in ("model_type", "architectures"):
        assert same(json.loads(json.dumps(found)), value), f"it is {found!r}"


def named(value: Any, message: str) -> bool:
    """Whether an error shows a value, or names what is wrong inside it."""
    said = [repr(value), repr(list(value))] if isinstance(value, tuple) else [repr(value)]
    return any(text[:60] in message for text in said) or (
        isinstance(value, dict) and any(key in message for key in value)
    )


def check_refused(case: Case, error: BaseException) -> None:
    message = str(error)
    assert type(error) is ValueError, f"{type(error).__name__}: {message}"
    assert any(words in message for words in RIGHT) or " meant?" in message, message
    assert len(message) < 2000, len(message)
    if case.path and not any(part in case.name for part in REFUSED):
        assert case.path[-1] in message or (case.renamed and case.renamed in message), message
        assert case.value is ABSENT or BODY in case.path[-1:] or named(case.value, message), message


def check(case: Case, plain: dict[str, dict[str, Any]]) -> None:
    try:
        config = read(case.name, copy.deepcopy(case.content))
    except Exception as error:
        check_refused(case, error)
    else:
        check_read(case, config, plain[case.name])


def run(seed: int, cases: int) -> list[str]:
    """What was found wrong with that many mutated configs."""
    draw, wrong = random.Random(seed), []
    runs = [name for name in FILES if not any(part in name for part in REFUSED)]
    plain = {name: fields(read(name, FILES[name])) for name in runs}
    for _ in range(cases):
        case = mutated(draw)
        try:
            check(case, plain)
        except Exception as error:
            wrong.append(f"{case}\n    {type(error).__name__}: {error}")
    return wrong


def test_a_thousand_mutated_configs_are_read_as_written_or_refused_by_name():
    wrong = run(SEED, CASES)
    assert not wrong, f"{len(wrong)} of {CASES}:\n" + "\n".join(wrong[:10])
