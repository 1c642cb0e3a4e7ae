# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Find what an engine takes otherwise than a draft was trained. `engines.py` says which engine does what of this.

Each check takes a draft as it is stored and returns a finding, or None. Some are made by a function whose arguments say
what an engine knows.
"""

from collections.abc import Callable
from typing import Any

from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from ..findings_dflash import Finding
from ..kinds import KINDS
from ..layouts_dflash import BASE, SLIDING, shown
from .remarks import listed
from .stored import StoredDraft

Check = Callable[[StoredDraft], Finding | None]
ENGINES_LAYOUT = (
    "Write it in the layout for engines: dflash-hub convert DRAFT FOLDER --layout engines; or push it, which writes it "
    "to the branch engines too"
)
IN_FLOATS = "Store the draft in bfloat16"
NOT_HERE = "Serve it with another engine"
WINDOW = f"Write layer_types as {SLIDING!r}, sliding_window, use_sliding_window: true and dflash_config.use_swa: true"


def unregistered(draft: StoredDraft) -> Finding | None:
    """Find a model_type that AutoConfig does not know."""
    if draft.is_speculators or draft.model_type in CONFIG_MAPPING_NAMES:
        return None
    what = f"model_type is {shown(draft.model_type)}, which transformers does not register"
    return Finding(what, draft.model_type, "qwen3", ENGINES_LAYOUT)


def speculators(draft: StoredDraft) -> Finding | None:
    """Find the speculators layout, for readers that do not know it."""
    if not draft.is_speculators:
        return None
    what = (
        "The speculators layout has no model_type and other keys, which this reader does not know"
    )
    return Finding(what, "speculators", "a layout with model_type", "Serve it with vLLM")


def knows(*architectures: str) -> Check:
    """Find an architecture that is none of these."""

    def check(draft: StoredDraft) -> Finding | None:
        if draft.architecture in architectures or draft.is_speculators:
            return None
        what = f"architectures is {shown(draft.top('architectures'))}, and no class has that name"
        advice = NOT_HERE
        if draft.architecture.startswith("Qwen3DFlash"):
            advice = f'Write architectures: ["{draft.architecture.removeprefix("Qwen3")}"]'
        return Finding(what, draft.architecture, architectures, advice)

    return check


def needs(*keys: str, advice: str = ENGINES_LAYOUT, consequence: str = "") -> Check:
    """Find that none of these keys has a value; "dflash_config.x" is the key x inside."""

    def value(draft: StoredDraft, key: str) -> Any:
        name = key.removeprefix("dflash_config.")
        return draft.top(key) if name == key else draft.inner(name)

    def check(draft: StoredDraft) -> Finding | None:
        if draft.is_speculators or any(value(draft, key) is not None for key in keys):
            return None
        what = f"{' and '.join(keys)} {'is' if len(keys) == 1 else 'are'} missing{consequence}"
        return Finding(what, None, keys, advice)

    return check


def nulled_window(draft: StoredDraft) -> Finding | None:
    """Find sliding layers whose window Qwen3Config sets to None."""
    on = draft.top("use_sliding_window") is True
    if draft.model_type != "qwen3" or not draft.names_sliding_layers or on:
        return None
    what = (
        f"layer_types has sliding layers, but use_sliding_window is {shown(draft.top('use_sliding_window'))}, so "
        "Qwen3Config sets sliding_window to None"
    )
    return Finding(what, None, True, "Write use_sliding_window: true")


def nulled_window_alone(draft: StoredDraft) -> Finding | None:
    """Find the same, for readers that look for a window in dflash_config first."""
    return nulled_window(draft) if draft.inner("swa_window_size") is None else None


def window_unseen(draft: StoredDraft) -> Finding | None:
    """Find a window that only dflash_config names, for readers of layer_types."""
    if not draft.inner("use_swa") or draft.names_sliding_layers:
        return None
    what = "dflash_config.use_swa is on, but layer_types are all full, which counts here: no layer slides"
    return Finding(what, draft.layer_types, [SLIDING], WINDOW)


def expects_causal(of_engine: Callable[[StoredDraft], list[bool]]) -> Check:
    """Find layers whose causality an engine takes otherwise than the draft was trained."""

    def check(draft: StoredDraft) -> Finding | None:
        if draft.is_speculators:
            return None
        ours, theirs = draft.causal, of_engine(draft)
        if ours == theirs:
            return None
        words = {True: "causal", False: "bidirectional"}
        wrong = [
            index for index, one in enumerate(zip(ours, theirs, strict=False)) if one[0] != one[1]
        ]
        first = wrong[0] if wrong else 0
        what = f"Layer {first} would run {words[not ours[first]]}, and was trained {words[ours[first]]}"
        advice = "Write is_causal at the top and dflash_config.causal, both"
        if len(set(ours)) > 1 or theirs == [False] * len(theirs):
            advice = NOT_HERE
        return Finding(what, theirs, ours, advice)

    return check


def by_types(draft: StoredDraft, flag: Any) -> list[bool]:
    """Return a flag for every layer; without one, sliding layers are causal."""
    if isinstance(flag, bool):
        return [flag] * draft.layers
    if draft.is_muse:
        return [False] * draft.layers
    return [one == SLIDING for one in draft.layer_types] or [False] * draft.layers


def top_flag(draft: StoredDraft) -> list[bool]:
    """Return whether each layer is causal by the top alone."""
    return by_types(draft, draft.top("is_causal"))


def either_flag(draft: StoredDraft) -> list[bool]:
    """Return whether each layer is causal by the top, else by dflash_config."""
    top = draft.top("is_causal")
    return by_types(draft, draft.inner("causal") if top is None else top)


def by_types_alone(draft: StoredDraft) -> list[bool]:
    """Return whether each layer is causal by its type, whatever the file says."""
    return by_types(draft, None)


def inner_first(draft: StoredDraft) -> list[bool]:
    """Return whether each layer is causal by dflash_config, else by the top; bidirectional without either."""
    flags = (draft.inner("causal"), draft.top("dflash_query_causal"), draft.top("is_causal"))
    return [bool(next((flag for flag in flags if flag is not None), False))] * draft.layers


def never(draft: StoredDraft) -> list[bool]:
    """Return that no layer is causal."""
    return [False] * draft.layers


def unless_said(draft: StoredDraft) -> list[bool]:
    """Return whether each layer is causal by the top, else by dflash_config; bidirectional without either."""
    top, inner = draft.top("is_causal"), draft.inner("causal")
    flag = inner if top is None else top
    return [bool(flag)] * draft.layers


OF_HEADS = {
    "dflash2": ("attention_conv", "mlp_conv", "candidate_selector."),
    "dspark": ("markov_head.", "confidence_head."),
    "domino": ("prefix_gru.", "embed_proj."),
    "mask": ("mask_embedding",),
}
"""Head, or trained mask token -> parts of the names of its tensors that engines know."""


def strict(*heads: str, shipped: tuple[str, ...] = ()) -> Check:
    """Find tensors that a reader which takes no unknown ones does not know.

    Args:
        heads: whose tensors it knows besides those of the body.
        shipped: tensors of a vocabulary that it takes.
    """
    parts = [part for head in heads for part in OF_HEADS[head]]

    def known(name: str) -> bool:
        return any(part in name for part in parts)

    def check(draft: StoredDraft) -> Finding | None:
        unknown = [name for name in draft.further_tensors if not known(name)]
        unknown += [name for name in draft.ships if name not in shipped]
        if not unknown or draft.is_speculators:
            return None
        what = f"Tensors that this reader does not know are an error: {listed(unknown)}"
        return Finding(what, sorted(unknown), parts, _without(draft, heads))

    return check


def _without(draft: StoredDraft, heads: tuple[str, ...]) -> str:
    """Return what to do about tensors that a reader of these heads does not know."""
    if draft.head in KINDS and draft.head not in (BASE, *heads):
        return f"This engine does not run {KINDS[draft.head].title}"
    if draft.is_reduced:
        return NOT_HERE
    return "Leave them out if the draft does not need them"


def quantised(draft: StoredDraft) -> Finding | None:
    """Find tensors of quantised layers, for a loader that knows those of floats alone."""
    if not draft.quantised_tensors:
        return None
    what = f"Quantised tensors, which this reader does not know, are an error: {listed(draft.quantised_tensors)}"
    return Finding(what, draft.quantised_tensors, "floats", IN_FLOATS)


def unknown_quantisation(*methods: str) -> Check:
    """Find a quant_method that is none of these."""

    def check(draft: StoredDraft) -> Finding | None:
        config = draft.top("quantization_config")
        method = config.get("quant_method") if isinstance(config, dict) else None
        if method is None or method in methods:
            return None
        what = f"quantization_config has the quant_method {shown(method)}, which is not converted"
        return Finding(what, method, methods, IN_FLOATS)

    return check


def no_head(*heads: str, verb: str = "does not run") -> Check:
    """Find a kind of draft that an engine does not run."""

    def check(draft: StoredDraft) -> Finding | None:
        if draft.head not in heads:
            return None
        what = f"This is a draft of the kind {draft.head}, which this engine {verb}"
        return Finding(what, draft.head, "another kind", NOT_HERE)

    return check


def reduced(draft: StoredDraft) -> Finding | None:
    """Find a reduced vocabulary, for engines that ignore its tables of ids."""
    if not draft.is_reduced:
        return None
    what = "The draft predicts a reduced vocabulary; d2t and its own head are ignored, so ids mean other tokens"
    return Finding(what, draft.ships, "the target's whole vocabulary", "Serve it with vLLM")


def mask_embedding_unread(draft: StoredDraft) -> Finding | None:
    """Find a trained embedding of the mask token among the tensors, for engines that read it from a pickle or not."""
    if "mask_embedding" not in draft.further_tensors:
        return None
    what = "The tensor mask_embedding is dropped: the target's row of the mask token is used in its place"
    return Finding(what, "mask_embedding", None, "Decode it with dflash-hub")


def anchor_unread(draft: StoredDraft) -> Finding | None:
    """Find a draft that predicts from its anchor, of a kind whose anchor predicts nothing in engines."""
    nested = bool(draft.inner("sample_from_anchor"))
    if draft.is_speculators or draft.head not in ("dflash", "dflash2"):
        return None
    if not nested and not draft.top("sample_from_anchor"):
        return None
    what = "sample_from_anchor is true, and the anchor's position is taken to predict nothing"
    return Finding(what, True, False, "Decode it with dflash-hub")


def dangling(draft: StoredDraft) -> Finding | None:
    """Find an entry of auto_map whose file is not there."""
    for name, reference in draft.auto_map.items():
        file = f"{str(reference).rpartition('.')[0]}.py"
        if name and "--" not in str(reference) and draft.files and file not in draft.files:
            what = f"auto_map names {file} for {name}, and there is no such file"
            advice = "Load the draft with load_draft and save it, which writes the code too"
            return Finding(what, reference, file, advice)
    return None


def null_nested(draft: StoredDraft) -> Finding | None:
    """Find a dflash_config that is null."""
    if "dflash_config" not in draft.config or draft.top("dflash_config") is not None:
        return None
    return Finding("dflash_config is null, and its update fails", None, "a dict", "Remove the key")


def prefixed(draft: StoredDraft) -> Finding | None:
    """Find names of tensors that begin with `model.`, for loaders that add it or do not strip it."""
    found = [name for name in draft.tensors if name.startswith("model.")]
    if not found:
        return None
    what = (
        f"Names begin with `model.`, which the loader adds itself or does not know: {listed(found)}"
    )
    return Finding(
        what, sorted(found), "no prefix", "Load the draft with load_draft and save it again"
    )


def reduced_without_table(draft: StoredDraft) -> Finding | None:
    """Find a reduced vocabulary without its table of ids."""
    if not draft.is_reduced or not draft.tensors or "d2t" in draft.ships:
        return None
    what = f"draft_vocab_size is {draft.either('draft_vocab_size')}, and there is no tensor d2t"
    return Finding(what, draft.ships, "d2t", "Export the draft with its table of ids")


def dflash2_fields_elsewhere(draft: StoredDraft) -> Finding | None:
    """Find a DFlash 2 draft whose fields are not all in dflash_config."""
    keys = ("conv_kernel_size", "conv_group_size", "selector_rank", "selector_top_k")
    missing = [key for key in keys if draft.inner(key) is None]
    if draft.head != "dflash2" or draft.is_speculators or not missing:
        return None
    what = f"dflash_config lacks {listed(missing)}"
    return Finding(what, missing, keys, ENGINES_LAYOUT)


def speculators_causal(draft: StoredDraft) -> Finding | None:
    """Find a draft whose full layers would be causal because a key of sliding layers says so."""
    dflash = draft.top("speculators_model_type") == "dflash"
    all_slide = bool(draft.layer_types) and {*draft.layer_types} == {SLIDING}
    if not dflash or draft.top("sliding_window_non_causal") is not False or all_slide:
        return None
    what = (
        "sliding_window_non_causal is false, which 0.26 to 0.33 take for causal blocks in every layer; full layers of "
        "speculators are bidirectional"
    )
    advice = "Write sliding_window_non_causal: true (see vLLM pull request 56692)"
    return Finding(what, draft.top("sliding_window_non_causal"), True, advice)


def speculators_anchor(draft: StoredDraft) -> Finding | None:
    """Find a DFlash draft of speculators that predicts from its anchor."""
    dflash = draft.top("speculators_model_type") == "dflash"
    if not dflash or not draft.top("sample_from_anchor"):
        return None
    what = "sample_from_anchor is true, which is refused for dflash"
    return Finding(what, True, False, "Train it without, or as dspark")


def speculators_untyped(draft: StoredDraft) -> Finding | None:
    """Find a speculators file that does not name its kind."""
    if not draft.is_speculators or draft.top("speculators_model_type"):
        return None
    what = "speculators_config is there, and speculators_model_type is not"
    return Finding(what, None, "dflash", "Write speculators_model_type")


def speculators_lacking(draft: StoredDraft) -> Finding | None:
    """Find a speculators file without mask token or taps."""
    keys = ("mask_token_id", "aux_hidden_state_layer_ids")
    missing = [key for key in keys if draft.top(key) is None]
    if not draft.is_speculators or not missing:
        return None
    what = f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing"
    return Finding(what, None, keys, "Export the draft with a newer release of speculators")


def other_markov(draft: StoredDraft) -> Finding | None:
    """Find a Markov head that is not a plain table, for engines that run that one alone."""
    head = draft.either("markov_head_type")
    if head in (None, "vanilla") or not draft.uses("markov_rank"):
        return None
    what = f"markov_head_type is {shown(head)}, and only 'vanilla' runs here"
    return Finding(what, head, "vanilla", "Serve it with SGLang")


def flat_dspark(draft: StoredDraft) -> Finding | None:
    """Find Model Optimizer's names of DSpark tensors."""
    flat = [name for name in draft.tensors if name.startswith(("markov_w", "confidence_proj"))]
    if not flat:
        return None
    what = f"The DSpark head has names of its own: {listed(flat)}"
    return Finding(what, flat, "markov_head.*, confidence_head.*", "Rename the tensors")


def domino_prefix(draft: StoredDraft) -> Finding | None:
    """Find a Domino draft with another prefix without corrections than the one that an engine computes with."""
    length = draft.either("pure_draft_prefix_len")
    if draft.head != "domino" or length in (None, 1):
        return None
    what = (
        f"pure_draft_prefix_len is {shown(length)}, and 1 is computed with: other tokens are proposed, of which fewer "
        "are accepted"
    )
    return Finding(what, length, 1, "Decode it with dflash-hub")


def own_vocabulary_but_dspark(draft: StoredDraft) -> Finding | None:
    """Find a trained embedding or head, but not of DSpark drafts, whose files ship copies of the target's."""
    return None if draft.head == "dspark" else own_vocabulary(draft)


def other_width(draft: StoredDraft) -> Finding | None:
    """Find a width that is not the target's."""
    ours, theirs = draft.top("hidden_size"), draft.target_hidden_size
    if theirs is None or ours is None or ours == theirs:
        return None
    what = f"hidden_size is {ours}, and the target's is {theirs}"
    return Finding(what, ours, theirs, "Use the draft that was made for this target")


def unscaled(draft: StoredDraft) -> Finding | None:
    """Find a scale of the embeddings, for engines that read none."""
    scale = draft.either("input_embedding_scale")
    if scale in (None, 1, 1.0):
        return None
    what = f"input_embedding_scale is {scale:g}, which is not read: the draft runs on unscaled embeddings"
    return Finding(what, scale, 1, "Serve it with vLLM or llama.cpp")


def own_vocabulary(draft: StoredDraft) -> Finding | None:
    """Find a trained embedding or head of the draft's own, for engines that take the target's."""
    for key in ("has_own_lm_head", "has_lm_head", "train_embed_tokens"):
        if draft.uses(key):
            what = f"{key} is on, and the target's embedding and head are used all the same"
            return Finding(what, True, False, "Serve it with vLLM")
    return None


def ships_vocabulary(draft: StoredDraft) -> Finding | None:
    """Find an embedding, a head or a table of ids of the draft's own, for a loop that uses the target's."""
    flagged = own_vocabulary(draft)
    if flagged is not None or not draft.ships:
        return flagged
    what = f"The draft has {listed(draft.ships)}, and the target's embedding and head are used all the same"
    advice = "Use custom_generate=draft.speculate with dflash-hub"
    return Finding(what, draft.ships, [], advice)


def wide_taps(draft: StoredDraft) -> Finding | None:
    """Find taps of another width than the draft, for engines that read none."""
    ours, taps = draft.top("hidden_size"), draft.either("target_hidden_size")
    if taps in (None, ours) or draft.is_speculators:
        return None
    what = f"target_hidden_size is {taps}, and the feature projection is taken to be taps x hidden_size ({ours})"
    return Finding(what, taps, ours, "Serve it with vLLM")


def raw_taps_of_muse(draft: StoredDraft) -> Finding | None:
    """Find a draft for a Muse target whose taps would be shifted by one."""
    muse = str(draft.target_type or "").startswith("muse_glimmer")
    if not muse or draft.architecture != "DFlashDraftModel":
        return None
    what = (
        "For Muse targets the architecture DFlashDraftModel has its taps taken one layer too early"
    )
    advice = "Write it in the Muse layout, or as DFlash2DraftModel if it is one"
    return Finding(what, draft.architecture, "MuseGlimmerAssistantModel", advice)


def needs_both_windows(draft: StoredDraft) -> Finding | None:
    """Find a window that is not named in both places that must agree."""
    both = bool(draft.inner("use_swa")) and draft.names_sliding_layers
    if not draft.slides or both or draft.is_speculators:
        return None
    what = (
        "A layer slides only if dflash_config.use_swa is on and its entry of layer_types is "
        f"{SLIDING!r}. One of the two is missing, so all attention is full"
    )
    return Finding(what, draft.layer_types, [SLIDING], WINDOW)


def no_backbone(draft: StoredDraft) -> Finding | None:
    """Find a model type without a class, for an engine that goes by it."""
    if not draft.is_muse:
        return None
    what = f"There is no backbone for model_type {draft.model_type!r}"
    return Finding(what, draft.model_type, "qwen3", ENGINES_LAYOUT)


def speculators_but_dspark(draft: StoredDraft) -> Finding | None:
    """Find the speculators layout of any kind but DSpark."""
    if draft.top("speculators_model_type") == "dspark":
        return None
    return speculators(draft)


def needs_a_window_switch(draft: StoredDraft) -> Finding | None:
    """Find sliding layers that no switch turns on."""
    switched = draft.top("use_sliding_window") is True or bool(draft.inner("use_swa"))
    other_converter = draft.is_speculators or draft.is_muse
    if not draft.names_sliding_layers or switched or other_converter:
        return None
    what = "layer_types slide only if use_sliding_window or dflash_config.use_swa is true; all would be full"
    return Finding(what, False, True, WINDOW)


def full_layers_slide(draft: StoredDraft) -> Finding | None:
    """Find full layers beside sliding ones, for a reader whose `use_swa` is for all layers."""
    if not draft.inner("use_swa") or not draft.names_sliding_layers:
        return None
    if set(draft.layer_types) == {SLIDING}:
        return None
    what = "dflash_config.use_swa makes all layers slide, also those that layer_types name full"
    return Finding(what, True, None, "Leave it out; layer_types and use_sliding_window are enough")


def nested_mask(draft: StoredDraft) -> Finding | None:
    """Find a mask token that dflash_config does not name, for readers of that alone."""
    of_dflash = draft.architecture in ("DFlashDraftModel", "DFlash2DraftModel")
    if not of_dflash or "mask_embedding.pt" in draft.files:
        return None
    consequence = ", so no mask token is written for the draft"
    return needs("dflash_config.mask_token_id", consequence=consequence)(draft)


def llamacpp_tensors(draft: StoredDraft) -> Finding | None:
    """Find tensors that the converter does not map; it takes tables of ids for DSpark alone."""
    shipped = StoredDraft.vocabulary_tensors[: 4 if draft.head == "dspark" else 2]
    return strict("dflash2", "dspark", shipped=shipped)(draft)


def no_class(draft: StoredDraft) -> Finding | None:
    """Find that the Auto class takes the class of another model, silently."""
    native = draft.model_type in CONFIG_MAPPING_NAMES and not draft.is_muse
    if not native or "AutoModel" in draft.auto_map:
        return None
    what = (
        f"auto_map names no class, so AutoModel takes that of model_type {draft.model_type!r}: fc and hidden_norm are "
        "dropped, and the embedding is random"
    )
    return Finding(what, draft.auto_map, "AutoModel", "Load it with dflash_hub.load_draft")


def no_config_class(draft: StoredDraft) -> Finding | None:
    """Find a model type that neither transformers nor the repository has a config class for."""
    found = unregistered(draft)
    if found is None or "AutoConfig" in draft.auto_map:
        return None
    what = f"{found.what}, and config.json has no auto_map that names code for it"
    advice = "Write the code beside it: dflash-hub convert DRAFT FOLDER --layout hub"
    return Finding(what, found.found, found.expected, advice)


def no_code(draft: StoredDraft) -> Finding | None:
    """Find that the class of the draft does not have what `generate` calls."""
    if draft.is_muse or draft.is_speculators:
        return None
    reference = str(draft.auto_map.get("AutoModel") or "")
    if f"{reference.rpartition('.')[0]}.py" in draft.own_code:
        return None
    what = "The class of this draft is neither transformers' own nor dflash-hub's, so it lacks what generate calls"
    advice = (
        "Use custom_generate=draft.speculate with dflash-hub, or save the draft with dflash-hub"
    )
    return Finding(what, reference, "a class with noise_embeds", advice)


def needs_a_package(draft: StoredDraft) -> Finding | None:
    """Find a draft that the loader looks for another package for."""
    named = isinstance(draft.top("dflash_config"), dict)
    muse = draft.is_muse and not named
    own = draft.head in ("dspark", "dflash2") and named
    if draft.is_speculators or muse or own or (named and draft.model_type in ("qwen3", "gemma4")):
        return None
    package = f"{draft.model_type}_dflash" if named else draft.model_type
    what = f"A drafter {package!r} is looked for, and there is none"
    return Finding(what, draft.model_type, "qwen3, with a dflash_config", ENGINES_LAYOUT)


def needs_block_size_at_top(draft: StoredDraft) -> Finding | None:
    """Find a block size that only dflash_config names."""
    if draft.head != "dflash":  # whose drafters have configs of their own
        return None
    return needs("block_size", consequence=" at the top, so 16 is taken")(draft)
