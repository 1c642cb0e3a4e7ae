# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Test which target families decode exactly: every causal language model of transformers, tiny and random.

    python benchmarks/families.py                    # all of them, a line each
    python benchmarks/families.py --only olmo2 phi   # some
    python benchmarks/families.py --write            # and the table of docs/decoding.md

Each model decodes greedily with its own `generate`, and with a draft whose proposals are scripted. In each row a random
number of tokens is right and the next one wrong, so every run has both. There are prompts of 1, 7 and 40 tokens with
blocks of 16, 2 and 5, which cross windows of 12. A left-padded batch of four follows, unless the model's own `generate`
gives a row another text in that batch than alone.
"""

import argparse
import contextlib
import os
import re
import signal
import sys
import warnings
from collections import defaultdict
from pathlib import Path

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import torch  # noqa: E402
import transformers  # noqa: E402
from transformers import AutoConfig, AutoModelForCausalLM  # noqa: E402
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES  # noqa: E402

import tiny  # noqa: E402
from dflash_hub.support_dflash import check_target  # noqa: E402

# The outcomes, as the table names them.
EXACT = "exact"
EXACT_ALONE = "exact, one row at a time"
REFUSED = "refused"
CAUGHT = "stopped by the self-check"
DIFFERENT = "ANOTHER TEXT"
FOREIGN = "FOREIGN ERROR"
NOT_BUILT = "not built"

SECONDS = 120
ROWS = ((1, 16), (7, 2), (40, 5))
"""Lengths of prompts that are decoded alone, and the block of each."""
BATCH_BLOCKS = (2, 6, 16)
MARKS = ("<!-- families -->", "<!-- /families -->")

# Values that make a model small; a family takes those whose names its config has.
SMALL = tiny.SMALL | {
    "n_embd": 32,
    "d_model": 32,
    "n_layer": 4,
    "n_layers": 4,
    "n_head": 4,
    "n_heads": 4,
    "n_positions": 512,
    "ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "decoder_layers": 4,
    "decoder_attention_heads": 4,
    "ffn_hidden_size": 64,
    "num_experts": 4,
    "n_routed_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_topk": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "n_group": 1,
    "topk_group": 1,
    "moe_num_experts": 4,
    "moe_k": 2,
    "first_k_dense_replace": 1,
    "n_shared_experts": 1,
    "sliding_window": 12,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_d_state": 8,
    "mamba_n_groups": 2,
    "mamba_chunk_size": 16,
    "mamba_num_heads": 4,
    "mamba_head_dim": 16,
    "ssm_state_size": 8,
    "n_groups": 2,
    "chunk_size": 16,
    "mamba_d_ssm": 64,
    "mamba_expand": 2,
    "n_mamba_heads": 4,
    "mamba_headdim": 16,
    "mamba_ngroups": 1,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "word_embed_proj_dim": 32,
    "rotary_dim": 4,
    "global_head_dim": 16,
    "dim": 32,
    "max_seq_len": 512,
    "vocab_size_per_layer_input": tiny.VOCAB,
    "hidden_size_per_layer_input": 8,
    "query_pre_attn_scalar": 8,
    "expert_ffn_hidden_size": 32,
    "zero_expert_num": 1,
    "mlp_layer_types": None,
    "num_kv_heads": 2,
}
# Values of single families that the above do not build.
EXTRA = {
    "bamba": {"attn_layer_indices": [1, 3]},
    "falcon_h1": {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8},
    "jamba": {
        "attn_layer_offset": 1,
        "attn_layer_period": 2,
        "expert_layer_offset": 1,
        "expert_layer_period": 2,
    },
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "num_layers": 4, "window_size": 12},
    "zamba2": {
        "layers_block_type": ["mamba", "hybrid"] * 2,
        "mamba_ngroups": 1,
        "num_mem_blocks": 1,
    },
    # As in published checkpoints.
    "minimax_m3_vl_text": {"layer_types": ["full_attention", "minimax_m3_sparse"] * 2},
}


class TooLong(Exception):
    """Raised when a model takes too long."""


@contextlib.contextmanager
def time_limit(seconds):
    """Raise TooLong in this context after so many seconds."""

    def ring(*_):
        raise TooLong(f"longer than {seconds} seconds")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def settable(config, name):
    """Return whether a config has this field and allows setting it."""
    try:
        setattr(config, name, getattr(config, name))
    except (AttributeError, TypeError, RuntimeError):
        return False
    return True


def fields_for(family):
    """Return the fields of a tiny config: those of the tests, or the small values that the family's config has."""
    if family in tiny.FAMILIES and "model_type" not in tiny.FAMILIES[family]:
        return tiny.SMALL | tiny.FAMILIES[family]
    default = AutoConfig.for_model(family)
    known = {name for name in SMALL if settable(default, name)}
    known |= {"pad_token_id", "eos_token_id", "bos_token_id"}
    fields = {name: value for name, value in SMALL.items() if name in known}
    if settable(default, "layer_types") and default.layer_types is not None:
        kinds = list(dict.fromkeys(default.layer_types))
        fields["layer_types"] = (kinds * 4)[:4] if len(kinds) > 1 else kinds * 4
    if "kv_lora_rank" in fields:  # one latent serves the keys of all heads
        fields["num_key_value_heads"] = fields["num_attention_heads"]
    return fields | EXTRA.get(family, {})


def build(family):
    """Return a tiny random model of the family."""
    config = AutoConfig.for_model(family, **fields_for(family))
    for name in ("is_decoder", "use_cache"):
        if hasattr(config, name):
            setattr(config, name, True)
    with torch.device("meta"):
        size = sum(
            weight.numel() for weight in AutoModelForCausalLM.from_config(config).parameters()
        )
    if size > 2e7:
        raise ValueError(f"by these rules it has {size:,} parameters, too many to build here")
    torch.manual_seed(tiny.SEEDS.get(family, 0))
    return tiny.scaled(AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval(), family)


def decode_both(model, inputs, block, new=24):
    """Return the model's own text, and the text with a scripted draft."""
    plain = model.generate(**inputs, max_new_tokens=new, do_sample=False)
    draft, proposer = tiny.draft(model, block_size=block), tiny.partly_right(plain, seed=block)
    generate_kwargs = {"custom_generate": draft.speculate, "proposer": proposer}
    ours = model.generate(**inputs, max_new_tokens=new, do_sample=False, **generate_kwargs)
    return plain, ours


def batch_is_sound(model, inputs, new=24):
    """Return whether the model's own `generate` gives every row of a padded batch the text that it has alone."""
    whole = model.generate(**inputs, max_new_tokens=new, do_sample=False)
    for row, mask in enumerate(inputs["attention_mask"].bool()):
        ids = inputs["input_ids"][row][mask][None]
        alone = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False
        )
        if not torch.equal(alone[0, ids.shape[1] :], whole[row, len(mask) :]):
            return False
    return True


def decode_all(model):
    """Return the outcome for one model, and a remark for the table."""
    for length, block in ROWS:
        ids = tiny.prompt(length, seed=length)
        row = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        plain, ours = decode_both(model, row, block)
        if not torch.equal(plain, ours):
            return DIFFERENT, f"prompt of {length}, block of {block}"
    inputs = tiny.batch(20, pads=(0, 19, 7, 13))
    if not batch_is_sound(model, inputs):
        return EXACT_ALONE, "its own padded batch gives rows another text than alone"
    for block in BATCH_BLOCKS:
        plain, ours = decode_both(model, inputs, block)
        if not torch.equal(plain, ours):
            return DIFFERENT, f"padded batch, block of {block}"
    return EXACT, ""


def first_line(error):
    """Return the beginning of an error's message."""
    return (str(error).splitlines() or [""])[0][:160]


def outcome(family):
    """Return the outcome for a family, one of the constants above, and the reason."""
    try:
        with time_limit(SECONDS):
            model = build(family)
            ids = tiny.prompt(6)
            model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False
            )
    except Exception as error:  # families built by rule raise errors of any class
        return NOT_BUILT, f"{type(error).__name__}: {first_line(error)}"
    try:
        check_target(model)
    except ValueError as error:
        return REFUSED, first_line(error)
    except Exception as error:
        return FOREIGN, f"check_target: {type(error).__name__}: {first_line(error)}"
    try:
        with time_limit(SECONDS):
            return decode_all(model)
    except ValueError as error:
        caught = "is not written" in str(error)
        return (CAUGHT if caught else FOREIGN), first_line(error)
    except Exception as error:
        return FOREIGN, f"{type(error).__name__}: {first_line(error)}"


def shortened(why):
    """Return a reason without names of models and versions, so that equal reasons share a row of the table."""
    why = re.sub(r"\b[A-Z]\w+(ForCausalLM|LMHeadModel)(\.forward)?( \(it\))?", "it", why)
    why = re.split(r" \(transformers| \(cache, |, so |; a draft|: at column", why)[0]
    return re.sub(r"0x\w+|dflash_columns_\w+|Layer \d+ of ", "", why).replace("|", "/")


def table(results):
    """Return the counts and the families by outcome, in Markdown."""
    groups = defaultdict(list)
    for family, (word, why) in results.items():
        groups[word].append((family, why))
    built = sum(len(found) for word, found in groups.items() if word != NOT_BUILT)
    counts = ", ".join(
        f"{len(found)} {word}" for word, found in groups.items() if word != NOT_BUILT
    )
    lines = [
        f"`python benchmarks/families.py --write`, transformers {transformers.__version__}: of {len(results)} names, "
        f"{built} were built; {counts}.",
        "",
        "| outcome | families |",
        "|---|---|",
    ]
    for word in (EXACT, EXACT_ALONE, DIFFERENT, FOREIGN):
        if groups[word]:
            lines.append(f"| {word} | {', '.join(family for family, _ in groups[word])} |")
    for word in (REFUSED, CAUGHT):
        reasons = defaultdict(list)
        for family, why in groups[word]:
            reasons[shortened(why.replace(family, "it"))].append(family)
        lines += [f"| {word}: {why} | {', '.join(families)} |" for why, families in reasons.items()]
    if groups[NOT_BUILT]:
        lines.append(
            f"| not built tiny by the benchmark | {', '.join(family for family, _ in groups[NOT_BUILT])} |"
        )
    return "\n".join(lines)


def write(text):
    """Replace the table in docs/decoding.md."""
    path = ROOT / "docs" / "decoding.md"
    content = path.read_text(encoding="utf-8")
    before, rest = content.split(MARKS[0])
    path.write_text(
        f"{before}{MARKS[0]}\n{text}\n{MARKS[1]}{rest.split(MARKS[1])[1]}", encoding="utf-8"
    )


def main():
    """Run the whole script."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="*", help="model types to test (default: all)")
    parser.add_argument(
        "--write", action="store_true", help="write the table into docs/decoding.md"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    results = {}
    for family in options.only or sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        results[family] = outcome(family)
        print(f"{family:28} {results[family][0]:26} {results[family][1]}", flush=True)
    print()
    print(table(results))
    if options.write:
        write(table(results))


if __name__ == "__main__":
    main()
