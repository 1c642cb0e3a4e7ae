# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Convert a draft from any layout into another. Its weights are never in memory: files are mapped, and copied.

The model is built without weights, and saved with the tensors of the mapped files. Names change, bits do not.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoConfig

from ..compat_dflash import find_file, pinned
from ..configuration_dflash import LAYOUTS, DFlashConfig, check_layout
from ..findings_dflash import LOADING, check_path, explained, raise_first
from ..kinds import KINDS, MUSE, kind_of
from ..layouts import variant_of
from ..layouts_dflash import engines_layout, engines_remarks, model_type_of
from ..layouts_speculators import target_named
from ..modeling_dflash import DFlashDraftModel
from ..registry import check_folder
from ..repository_dflash import check_repo_id
from ..weights_dflash import OWN_PARTS, check_stored, check_values, own_name, stored_files
from .layouts import OTHER_LAYOUTS, base_model_of, layout_findings
from .layouts import renamed as renamed_for
from .pickles import pickles_in, without_pickles

ALL_LAYOUTS = (*LAYOUTS, *OTHER_LAYOUTS)
_PARTS = ("embed_tokens.weight", "lm_head.weight")
PICKLES = ("pytorch_model.bin", "mask_embedding.pt")
"""Names of the pickles that a draft on the Hub may need."""


@dataclass
class OpenedDraft:
    """Hold a draft as it lies on disk.

    Args:
        name: Hub id or folder.
        model: without weights.
        tensors: by the model's names; they lie in mapped files.
        layout: of its config.json.
        stored_names: name of each tensor in the files.
        left_out: names of stored tensors that no draft needs.
    """

    name: str
    model: DFlashDraftModel
    tensors: dict[str, torch.Tensor]
    layout: str
    stored_names: dict[str, str]
    left_out: list[str]


@dataclass(frozen=True)
class Conversion:
    """Hold what a conversion changes.

    Args:
        title: of the kind of draft.
        source_layout, layout: read and written.
        config: that is written; None for the hub layout, whose fields are those of the draft's config.
        renamed: name of each tensor before -> after, where they differ.
        left_out: names of stored tensors that are not written.
        size: of all tensors that are written, in bytes.
        remarks: what readers of the layout compute otherwise.
    """

    title: str
    source_layout: str
    layout: str
    config: dict[str, Any] | None
    renamed: dict[str, str]
    left_out: list[str]
    size: int
    remarks: list[str]


@dataclass(frozen=True)
class ConvertOptions:
    """Hold the options of a conversion.

    Args:
        revision: of a Hub repository.
        base_model: Hub id of the target, for the card and for layouts that name it.
        target: Hub id or folder of the target. It supplies what the draft's config.json does not say of it. An
            embedding and a head that equal the target's are left out.
    """

    revision: str | None = None
    base_model: str | None = None
    target: str | None = None


@contextmanager
def opened(source: Any, options: ConvertOptions) -> Iterator[OpenedDraft]:
    """Read the config of a draft, and map its weights into memory inside the context.

    Pickles of weights, or of a mask embedding, are copied as safetensors first. No code in them runs.

    Args:
        source: Hub id or folder, in any layout that this package reads.

    Raises:
        ValueError: the config is invalid, or the tensors are not those of such a draft.
        OSError: there is no such draft, or it has no weights.
    """
    check_path("source", source)
    check_folder(source)
    if options.revision is not None and Path(source).is_dir():
        raise ValueError(
            f"revision is {options.revision!r}, but {source} is a folder, which has none; leave it out."
        )
    where = pinned(source, {"revision": options.revision}, False)
    with TemporaryDirectory() as staged:
        with explained(f"{source} could not be read", LOADING):
            pickled = _folder_with_pickles(source, where)
            if pickled is not None:
                source, where = without_pickles(pickled, Path(staged)), {}
            stored = _open(source, where, options.target)
        yield stored


def _folder_with_pickles(source: Any, where: dict[str, Any]) -> Path | None:
    """Return the folder of a draft that has pickles which it needs, downloaded if necessary; None without them."""
    folder = Path(source)
    if not folder.is_dir():
        found = [find_file(source, name, **where) for name in PICKLES]
        index = find_file(source, f"{PICKLES[0]}.index.json", **where)
        if index is not None:
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            found += [find_file(source, name, **where) for name in sorted(names)]
        here = [path for path in found if path is not None]
        if not here:
            return None
        folder = here[0].parent
        stored_files(source, where)
        for name in ("config.json", "README.md"):
            find_file(source, name, **where)
    return folder if pickles_in(folder) else None


def _open(source: Any, where: dict[str, Any], target: str | None) -> OpenedDraft:
    """Return the draft of a folder or repository without pickles."""
    content, _ = DFlashConfig.get_config_dict(source, **where)
    model_class: Any = KINDS[variant_of(content)].model_class
    config = model_class.config_class.from_pretrained(source, **where)
    config = check_stored(model_class, config, source, where)
    files = stored_files(source, where)
    if not files:
        raise OSError(f"{source} has no weights in safetensors, model.safetensors or shards of it.")
    tensors: dict[str, torch.Tensor] = {}
    stored_names, left_out = {}, []
    found: dict[str, torch.Tensor] = {}
    for path in files:
        found |= load_file(path)
    if target is not None:
        complete(config, target)
        left_out = drop_copies(config, found, target)
    with torch.device("meta"):
        model = model_class(config)
    expected = model.state_dict().keys()
    quantised = getattr(config, "quantization_config", None) is not None
    for stored, tensor in found.items():
        name = own_name(stored)
        if stored not in left_out:
            if name in expected or quantised:
                tensors[name], stored_names[name] = tensor, stored
            else:
                left_out.append(stored)
    model.to(_dtype(tensors))
    model.card_source = (source, where)
    if (named := target_named(content)) is not None:
        model.card_known = {"base_model": named}
    return OpenedDraft(str(source), model, tensors, layout_name(content), stored_names, left_out)


def convert(
    source: Any,
    destination: Any,
    layout: str = "hub",
    options: ConvertOptions | None = None,
) -> Conversion:
    """Write the draft `source` into the folder `destination`, in another layout, with every tensor bit-equal.

    If it is interrupted, the folder holds what it held before.

    Args:
        layout: one of `ALL_LAYOUTS`.

    Raises:
        ValueError: the draft is invalid, or the layout cannot say one of its fields; names it.
        OSError: it cannot be read or written.
    """
    check_path("destination", destination)
    check_layout(layout, ALL_LAYOUTS)
    options = options or ConvertOptions()
    with opened(source, options) as stored:
        conversion = _plan(stored, layout, options)
        stored.model.save_pretrained(destination, layout=layout, state_dict=dict(stored.tensors))
    return conversion


def plan_conversion(
    source: Any, layout: str = "hub", options: ConvertOptions | None = None
) -> Conversion:
    """Return what `convert` would do, and write nothing. It raises what `convert` raises before it writes."""
    check_layout(layout, ALL_LAYOUTS)
    options = options or ConvertOptions()
    with opened(source, options) as stored:
        return _plan(stored, layout, options)


def complete(config: DFlashConfig, target: str) -> None:
    """Set the fields of a draft's config that only its target has, where they are None.

    Raises:
        ValueError: the draft does not fit the target.
    """
    check_folder(target)
    with explained(f"The config of the target {target} could not be read", LOADING):
        text = AutoConfig.from_pretrained(target).get_text_config(decoder=True)
    if config.num_target_layers is None:
        config.num_target_layers = text.num_hidden_layers
    if config.vocab_size is None:
        config.vocab_size = text.vocab_size
    size = text.vocab_size
    raise_first(config.fit_findings(text.hidden_size, text.num_hidden_layers, size, size))


def drop_copies(config: Any, tensors: dict[str, torch.Tensor], target: str) -> list[str]:
    """Turn off the parts of a draft that are its target's, and return the names of their tensors."""
    own = {stored: own_name(stored) for stored in tensors if own_name(stored) in OWN_PARTS}
    if not own or config.draft_vocab_size is not None:
        return []
    parts, dropped = _target_parts(target), []
    for stored, name in own.items():
        tensor = tensors[stored]
        theirs = parts.get(name.partition(".")[0], parts.get("embed_tokens"))
        if theirs is not None and theirs.shape == tensor.shape and torch.equal(theirs, tensor):
            setattr(config, OWN_PARTS[name], False)
            dropped.append(stored)
    return dropped


def _target_parts(target: str) -> dict[str, torch.Tensor]:
    """Return embed_tokens and lm_head of a target, mapped into memory; the first alone where they are tied."""
    where = pinned(target, {}, False)
    index = find_file(target, "model.safetensors.index.json", **where)
    files = ["model.safetensors"]
    if index is not None:
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = sorted({shard for key, shard in names.items() if key.endswith(_PARTS)})
    found: dict[str, torch.Tensor] = {}
    for file in files:
        path = find_file(target, file, **where)
        if path is not None:
            for key, tensor in load_file(path).items():
                if key.endswith(_PARTS):
                    found[key.rpartition(".")[0].rpartition(".")[2]] = tensor
    return found


def _plan(stored: OpenedDraft, layout: str, options: ConvertOptions) -> Conversion:
    """Check that the layout can hold the draft, and return what would change."""
    base_model = options.base_model
    if base_model is None and options.target is not None and not Path(options.target).exists():
        base_model = options.target
    if base_model is not None:
        check_repo_id(base_model)
        stored.model.card_metadata = {"base_model": base_model}
    check_values(stored.model, stored.name, stored.tensors)
    config, rules = stored.model.config, OTHER_LAYOUTS.get(layout)
    content: dict[str, Any] | None = None
    patterns: dict[str, str] = {}
    remarks: list[str] = []
    if rules is not None:
        raise_first(layout_findings(config, layout))
        content, patterns = rules.config(config, base_model_of(stored.model)), rules.renamed
        remarks = rules.remarks(config)
    elif layout == "engines" and None in (config.num_target_layers, config.vocab_size):
        raise ValueError(
            "The engines layout needs num_target_layers and vocab_size, and this draft's config.json does not say "
            "both: pass target=, a Hub id or folder, which has them."
        )
    elif layout == "engines":
        content, remarks = engines_layout(config), engines_remarks(config)
    names = renamed_for(dict(stored.stored_names), patterns)
    changed = {old: new for new, old in names.items() if old != new}
    size = sum(tensor.nbytes for tensor in stored.tensors.values())
    title = kind_of(config).title
    return Conversion(
        title, stored.layout, layout, content, changed, stored.left_out, size, remarks
    )


def layout_name(content: dict[str, Any]) -> str:
    """Return the name of the layout of a config.json, or of who writes such files."""
    if content.get("speculators_model_type"):
        return "speculators"
    if model_type_of(content) in KINDS:
        return "hub"
    names = content.get("architectures") or [""]
    if names[0] == MUSE:
        return "muse"
    return "engines" if content.get("dflash_config") else "flat"


def _dtype(tensors: dict[str, torch.Tensor]) -> torch.dtype:
    """Return the type of the first tensor of floats."""
    floats = (tensor.dtype for tensor in tensors.values() if tensor.is_floating_point())
    return next(floats, torch.float32)
