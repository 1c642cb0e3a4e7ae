# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Find the draft for a target: by exact checkpoint from the catalogue, or by architecture if the shape fits.

The catalogue, `drafts.json`, lists the drafts published on the Hugging Face Hub, with their commit if it is known.
A draft drafts well only for the checkpoint it was trained on. Other checkpoints can have the same architecture and
shape, so a match by these alone comes with a warning.
"""

import warnings
import weakref
from dataclasses import InitVar, dataclass, field, replace
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from .calls_dflash import PREPARED, Signature, check_direct_call
from .catalogue import (
    Published,
    check_folder,
    made_for,
    out_of_cache,
    read_entries,
    reason_of_exact,
)
from .checkpoints import Origin, TargetInfo, base_of_adapter, origin_of
from .compat_dflash import checkpoint_name, device_of, pinned
from .configuration_dflash import DFlashConfig, same_vocabulary
from .families import FAMILIES, siblings_of
from .findings_dflash import LOADING, explained, explained_for, raise_first
from .generate_dflash import SpeculativeGenerate
from .kinds import KINDS, SECOND_KIND, kind_named, kind_of
from .layouts import variant_of
from .layouts_dflash import shown
from .layouts_speculators import target_named
from .modeling_dflash import DFlashDraftModel, Qwen3DFlashDraftModel
from .qwen3_configs import build_target_layer_ids
from .support_dflash import check_target

# Field of a spec -> the class that it holds by default, and that any other must extend.
_DRAFT_CLASSES: dict[str, type[DFlashDraftModel]] = {
    "draft_cls": Qwen3DFlashDraftModel,
    "draft2_cls": KINDS[SECOND_KIND].model_class,
}


@dataclass(frozen=True)
class DFlashDraftSpec(Published):
    """Describe a draft and its target; or, without a repository, how to build one. Unknown fields are None.

    Repository and class come first, in either order: `DFlashDraftSpec("org/draft")` names a published draft, and
    `DFlashDraftSpec(Qwen3DFlashDraftModel)` the class of one that is yet to be built.

    Args:
        first, second: `repo_id` and `draft_cls` in either order, or `draft_cls` and `draft2_cls`.
        repo_id: the draft's repository on the Hub, or a local folder; None if `build` or `load(repo_id)` is to follow.
        draft_cls: the class that runs it, the model of one of the `KINDS`.
        draft2_cls: the class that `build` uses for a draft of the `SECOND_KIND`.
        revision: the commit to load; None for the newest.
        subfolder: the folder in the repository that holds it.
        targets: checkpoints it was made for, as Hub ids.
        architectures: of those checkpoints.
        hidden_size, num_target_layers, vocab_size: of those checkpoints.
        license: the draft's, as the Hub abbreviates it.
        gated: whether users must request access.
        unsupported: why this version cannot run it; None if it can.
        note: a remark for users.
        details: all other entries of `drafts.json`.
    """

    first: InitVar[str | Path | type[DFlashDraftModel] | None] = None
    second: InitVar[str | Path | type[DFlashDraftModel] | None] = None
    revision: str | None = None
    subfolder: str = ""
    targets: tuple[str, ...] = ()
    architectures: tuple[str, ...] = ()
    hidden_size: int | None = None
    num_target_layers: int | None = None
    vocab_size: int | None = None
    license: str | None = None
    gated: bool | None = None
    unsupported: str | None = None
    note: str = ""
    details: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)
    repo_id: str | None = field(default=None, kw_only=True)
    # Not given, they are set in __post_init__, which must tell a given class from a default.
    draft_cls: type[DFlashDraftModel] = field(default=None, kw_only=True)  # type: ignore[assignment]
    draft2_cls: type[DFlashDraftModel] = field(default=None, kw_only=True)  # type: ignore[assignment]

    def __post_init__(self, first: Any, second: Any) -> None:
        for value in (first, second):
            self._set_positional(value)
        for name, default in _DRAFT_CLASSES.items():
            if getattr(self, name) is None:
                self._set(name, default)
            _check_draft_class(name, getattr(self, name))
        if self.repo_id is not None:
            self._set("repo_id", _repository(self.repo_id))
        for name in ("targets", "architectures"):
            if not isinstance(getattr(self, name), tuple):
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}; it must be a tuple of names, such as ('org/model',)."
                )

    def _set_positional(self, value: Any) -> None:
        """Set the field that an argument without a name is meant for, by its type.

        Raises:
            ValueError: the field has a value already.
        """
        if value is None:
            return
        name = "repo_id"
        if isinstance(value, type):
            name = "draft_cls" if self.draft_cls is None else "draft2_cls"
        if getattr(self, name) is not None:
            raise ValueError(
                f"{name} is given twice, as {getattr(self, name)!r} and {value!r}; pass a repository and a class of a "
                "draft, or two classes of drafts."
            )
        self._set(name, value)

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)  # the spec is frozen

    @property
    def kind_name(self) -> str:
        return kind_of(self.draft_cls.config_class).name

    @property
    def class_name(self) -> str:
        """Name of the class that runs it."""
        return self.draft_cls.__name__

    @property
    def name(self) -> str:
        """The repository; without one, words for messages that name the class."""
        return self.repo_id or f"a {self.draft_cls.__name__} to be built"

    def load(
        self, repo_id: str | Path | None = None, **from_pretrained_kwargs: Any
    ) -> DFlashDraftModel:
        """Download the draft and load it with our class: no code of its repository runs, only safetensors are read.

        Args:
            repo_id: a repository or folder to load in place of the spec's own, at its newest commit.
            from_pretrained_kwargs: of `from_pretrained` (`dtype`, `device_map`, `token`, `block_size` ...).

        Raises:
            ValueError: this version cannot run the draft, its config or weights are invalid, or no repository is known.
            OSError: there is no such draft, no access or no connection; or a download is damaged.
        """
        if repo_id is not None and _repository(repo_id) != self.repo_id:
            other = DFlashDraftSpec(repo_id, self.draft_cls, targets=self.targets)
            return other.load(**from_pretrained_kwargs)
        if self.repo_id is None:
            raise ValueError(
                "This DFlashDraftSpec names no repository to load. Pass one, spec.load('org/draft'), or build an "
                "untrained draft, spec.build(target.config, mask_token_id=...)."
            )
        self.check_supported()
        where = {"revision": self.revision, "subfolder": self.subfolder, "use_safetensors": True}
        draft = self.draft_cls.from_pretrained(self.repo_id, **(where | from_pretrained_kwargs))
        known = {"base_model": list(self.targets), "license": self.license}
        draft.card_known = {key: value for key, value in known.items() if value}
        return draft

    def build(
        self, target_config: PretrainedConfig, variant: str | None = None, **overrides: Any
    ) -> DFlashDraftModel:
        """Return an untrained draft that fits a target.

        As published (arXiv 2602.06036), it has 5 layers, block size 16 and the target's own dimensions. Its 5 taps are
        spread evenly from the target's second to its third-last layer.

        Args:
            target_config: of the target, whole or its text part.
            variant: name of one of the `KINDS`; by default the kind of `draft_cls`.
            overrides: fields of the draft's config; `mask_token_id` must be among them. By default, its blocks are
                bidirectional, sliding layers too, as in the reference implementation's recipe.

        Raises:
            ValueError: no `mask_token_id`, a field that does not exist, or one that does not fit the target.
        """
        if "mask_token_id" not in overrides:
            raise ValueError(
                "mask_token_id must be given, such as 151669 for Qwen3: the id of a token that has a row in the "
                "target's embedding and does not occur in its text."
            )
        if not isinstance(target_config, PretrainedConfig):
            raise ValueError(
                f"target_config is {target_config!r}; pass the config of the target, `target.config`."
            )
        draft_cls = self._class_for(variant)
        config_cls: Any = draft_cls.config_class
        unknown = set(overrides) - {"rope_theta"} - set(config_cls.__dataclass_fields__)
        if unknown:
            raise ValueError(
                f"{', '.join(sorted(unknown))}: no such field in {config_cls.__name__}."
            )
        text = target_config.get_text_config(decoder=True)
        shape = _shape_for(text, overrides)
        if "rope_theta" in overrides:
            shape["rope_parameters"] = {
                "rope_type": "default",
                "rope_theta": overrides.pop("rope_theta"),
            }
        config = config_cls(**(shape | overrides))
        size = text.vocab_size
        raise_first(config.fit_findings(text.hidden_size, text.num_hidden_layers, size, size))
        draft = draft_cls(config).to(config.dtype)
        name = _name_of(target_config)
        draft.card_known = {} if name is None or Path(name).exists() else {"base_model": name}
        return draft

    def _class_for(self, variant: str | None) -> type[DFlashDraftModel]:
        """Return the class of a fresh draft: the spec's own if it has one of that kind.

        Raises:
            ValueError: there is no such kind.
        """
        if variant is None:
            return self.draft_cls
        kind = kind_named(variant)
        for own in (self.draft_cls, self.draft2_cls):
            if kind_of(own.config_class) is kind:
                return own
        return kind.model_class

    def matches_shape(self, text_config: PretrainedConfig) -> bool:
        """Return whether a target with this text config has the shape of the draft's own; False if that is unknown.

        Rows added at the end of the vocabulary, as for new tokens or padding, are no other shape.
        """
        if not isinstance(text_config, PretrainedConfig):
            raise ValueError(f"text_config is {text_config!r}; pass a config, `target.config`.")
        ours = (self.hidden_size, self.num_target_layers)
        same_size = ours == (text_config.hidden_size, text_config.num_hidden_layers)
        if self.vocab_size is None:
            return False
        return same_size and same_vocabulary(self.vocab_size, text_config.vocab_size)


def _repository(name: Any) -> str:
    """Return a repository's name or a folder as a string.

    Raises:
        ValueError: it is neither.
    """
    if not isinstance(name, str | Path):
        raise ValueError(
            f"repo_id is {name!r}; it must be a Hub id or a folder, such as 'org/draft'."
        )
    return str(name)


def _check_draft_class(name: str, given: Any) -> None:
    """Refuse anything but a class that can run the drafts of this field, `draft_cls` or `draft2_cls`."""
    expected = _DRAFT_CLASSES[name]
    if not isinstance(given, type) or not issubclass(given, expected):
        raise ValueError(
            f"{name} is {given!r}; it must be dflash_hub.{expected.__name__} or a class that extends it."
        )


def _shape_for(text: PretrainedConfig, overrides: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of an untrained draft for this target: its dimensions and rotary base, but no rope scaling."""
    heads = getattr(text, "num_attention_heads", None)
    if heads is None:
        raise ValueError(
            f"{text.model_type} has no num_attention_heads, so it is no target for a draft; pass the config of a "
            "model with attention layers."
        )
    rope = getattr(text, "rope_parameters", None) or {}
    rope = rope.get("full_attention", rope)  # targets that rotate by layer type
    theta = rope.get("rope_theta", DFlashConfig.default_theta)
    taps = overrides.get("target_layer_ids") or build_target_layer_ids(text.num_hidden_layers)
    return {
        "block_size": 16,
        "is_causal": False,
        "target_layer_ids": taps,
        "num_target_layers": text.num_hidden_layers,
        "vocab_size": text.vocab_size,
        "hidden_size": text.hidden_size,
        "intermediate_size": _dimension(text, "intermediate_size") or 3 * text.hidden_size,
        "num_attention_heads": heads,
        "num_key_value_heads": _dimension(text, "num_key_value_heads") or heads,
        "head_dim": _dimension(text, "head_dim") or text.hidden_size // heads,
        "rms_norm_eps": getattr(text, "rms_norm_eps", 1e-6),
        "max_position_embeddings": text.max_position_embeddings,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
    }


def _dimension(text: PretrainedConfig, name: str) -> int | None:
    """Return a dimension that is one number for all layers; None if it is missing or differs by layer."""
    try:
        value = getattr(text, name, None)
    except RuntimeError:  # transformers raises this if layers differ
        return None
    return value if isinstance(value, int) else None


spread_taps = build_target_layer_ids


def _read_catalogue() -> list[DFlashDraftSpec]:
    return [
        DFlashDraftSpec(
            draft_cls=kind_named(details["variant"]).model_class, details=details, **values
        )
        for values, details in read_entries()
    ]


CATALOGUE: list[DFlashDraftSpec] = _read_catalogue()


def _default_for(architecture: str) -> DFlashDraftSpec:
    """Return the first draft that runs, preferably for exactly this architecture.

    Where its checkpoint has several drafts, return the preferred one.
    """
    usable = [spec for spec in CATALOGUE if spec.serves(architecture) and not spec.unsupported]
    first = next((spec for spec in usable if architecture in spec.architectures), usable[0])
    return drafts_for(first.targets[0])[0] if first.targets else first


def drafts_for(target: str) -> list[DFlashDraftSpec]:
    """Return the drafts made for a checkpoint, by its Hub id: the preferred one first.

    Supported ones come first. Among them the order is: plain floats, a config.json that has been seen, not of the
    community, the later kind.
    """
    if not isinstance(target, str):
        raise ValueError(
            f"target is {target!r}; pass the Hub id of a checkpoint, such as 'org/model'."
        )
    return made_for(target, CATALOGUE)


def _served() -> dict[str, None]:
    """Return the architectures that have a supported draft: those in the catalogue, then those of their families."""
    named = [name for spec in CATALOGUE if not spec.unsupported for name in spec.architectures]
    siblings = [sibling for name in named for sibling in siblings_of(name)]
    return dict.fromkeys([*named, *siblings])


# Target architecture -> its default draft.
DFLASH_DRAFT_REGISTRY: dict[str, DFlashDraftSpec] = {name: _default_for(name) for name in _served()}


def register_dflash_draft(
    architecture: str, spec: DFlashDraftSpec, *, overwrite: bool = False
) -> None:
    """Make `spec` the default draft of a target architecture, and the draft of the checkpoints in `spec.targets`.

    Raises:
        ValueError: the architecture or a checkpoint has a draft already, and `overwrite` is not True.
    """
    if not isinstance(architecture, str) or not isinstance(spec, DFlashDraftSpec):
        raise ValueError(
            f"Pass an architecture's name and a DFlashDraftSpec, not {architecture!r} and {spec!r}."
        )
    registered = {architecture: DFLASH_DRAFT_REGISTRY.get(architecture)}
    registered |= {name: next(iter(drafts_for(name)), None) for name in spec.targets}
    for name, known in registered.items():
        if known is not None and not _same_draft(known, spec) and not overwrite:
            raise ValueError(
                f"{name} has a draft already, {known.name}. Pass overwrite=True to replace it by {spec.name}."
            )
    architectures = next(
        (known.architectures for known in CATALOGUE if _same_draft(known, spec)), ()
    )
    architectures = (*architectures, *spec.architectures, architecture)
    spec = replace(spec, architectures=tuple(dict.fromkeys(architectures)))
    CATALOGUE[:] = [spec, *(known for known in CATALOGUE if not _same_draft(known, spec))]
    DFLASH_DRAFT_REGISTRY[architecture] = spec


def _same_draft(one: DFlashDraftSpec, other: DFlashDraftSpec) -> bool:
    """Return whether two specs are equal but for the architectures that they are registered for."""
    return replace(one, architectures=()) == replace(other, architectures=())


def resolve_dflash_draft_spec(
    architectures: list[str] | None = None, target: str | PretrainedConfig | Any | None = None
) -> DFlashDraftSpec:
    """Return the draft for a target; it does not depend on how the target was loaded.

    Args:
        architectures: the target's, `target.config.architectures`; the first registered one wins. They may be None if
            `target` is passed, as they are in the text config of a composite checkpoint.
        target: a Hub id, a folder, a config or a model. With it, the draft made for exactly that checkpoint is found,
            or for the one that it is a copy of.

    Raises:
        ValueError: nothing is registered for these architectures, no draft fits the target's shape, or this version
            cannot run the drafts made for it.
        OSError: `target` is a Hub id that the catalogue does not know, and its config cannot be downloaded.
    """
    return explain_resolution(architectures, target)[0]


def explain_resolution(
    architectures: list[str] | None = None, target: str | PretrainedConfig | Any | None = None
) -> tuple[DFlashDraftSpec, str]:
    """Return the draft as `resolve_dflash_draft_spec` does, and the reason in a sentence."""
    target = str(target) if isinstance(target, Path) else target
    if isinstance(target, type) or target == "":
        raise ValueError(f"target is {target!r}; pass a Hub id, a folder, a config or a model.")
    if not isinstance(target, str):
        return _explain(architectures, target)
    with explained(f"The config of the target {target} could not be read", LOADING):
        return _explain(architectures, target)


def _explain(
    architectures: list[str] | None, target: str | PretrainedConfig | Any | None
) -> tuple[DFlashDraftSpec, str]:
    """Return the draft and the reason for a target, whose folder as a string."""
    if isinstance(target, str):
        check_folder(target)
    if not isinstance(target, str | PretrainedConfig | None) and not hasattr(target, "config"):
        raise ValueError(f"target is {target!r}; pass a Hub id, a folder, a config or a model.")
    _check_architectures(architectures, target)
    if target is None:
        architecture = _registered(architectures or [])
        spec = _spec_of(architecture)
        return spec, _reason_of_default(spec, architecture)
    name = target if isinstance(target, str) else _name_of(target)
    published = name and out_of_cache(name)
    exact = drafts_for(published) if published else []
    if published and exact:
        exact[0].check_supported()
        return exact[0], reason_of_exact(published)
    if isinstance(target, str) and (base := base_of_adapter(target)):
        spec, reason = _explain(architectures, base)
        return spec, f"{target} is an adapter for {base}. {reason}"
    known = TargetInfo(name, None if isinstance(target, str) else getattr(target, "config", target))
    origin = origin_of(known, CATALOGUE)
    if origin is not None and origin.is_copy:
        spec = drafts_for(origin.name)[0]
        spec.check_supported()
        return spec, origin.reason
    names = [*(architectures or ()), *(known.config.architectures or ())]
    if not isinstance(target, str | PretrainedConfig):
        names.append(type(target).__name__)
    family = FAMILIES.get(known.config.get_text_config(decoder=True).model_type, ())
    return _by_shape(_registered(names, family), known, origin)


def _registered(names: list[str], family: tuple[str, ...] = ()) -> str:
    """Return the first registered architecture among the names of a target, else among those of its family."""
    architecture = next(
        (known for known in (*names, *family) if known in DFLASH_DRAFT_REGISTRY), None
    )
    if architecture is None:
        named = [
            known
            for known, spec in DFLASH_DRAFT_REGISTRY.items()
            if not spec.architectures or known in spec.architectures
        ]
        raise ValueError(
            f"No DFlash draft is registered for {', '.join(dict.fromkeys(names))}. Supported architectures: "
            f"{', '.join(named)}, and others with the same text part. Add one with register_dflash_draft()."
        )
    return architecture


def _reason_of_default(spec: DFlashDraftSpec, architecture: str) -> str:
    """Return in a sentence why the default of an architecture was chosen, and what to do if it names no draft."""
    if spec.repo_id is None:
        return (
            f"It is registered for {architecture} and names no repository: build a draft with it, or load one, "
            "spec.load('org/draft')."
        )
    made_for = f"it was made for {spec.target}" if spec.target else "its target is not known"
    return f"It is the default for {architecture}; {made_for}."


def _spec_of(architecture: str) -> DFlashDraftSpec:
    """Return what the registry has for an architecture.

    Raises:
        ValueError: it is no spec.
    """
    spec = DFLASH_DRAFT_REGISTRY[architecture]
    if not isinstance(spec, DFlashDraftSpec):
        raise ValueError(
            f"DFLASH_DRAFT_REGISTRY[{architecture!r}] is {shown(spec)}; it must be a DFlashDraftSpec, such as "
            "DFlashDraftSpec(draft_cls=Qwen3DFlashDraftModel)."
        )
    return spec


def _by_shape(
    architecture: str, target: TargetInfo, origin: Origin | None
) -> tuple[DFlashDraftSpec, str]:
    """Return a draft whose own target has the shape of this one, and warn.

    The vocabulary nearest in size comes first. Among equals, a draft of the checkpoint that the target was trained from
    does, then the architecture's default. A default without a repository was registered to build drafts, which fit
    every shape. One of unknown shape is compared with the target when it is loaded.
    """
    default = _spec_of(architecture)
    if default.repo_id is None or default.hidden_size is None:
        return default, _reason_of_default(default, architecture)
    name = target.name or "this target"
    candidates = drafts_for(origin.name) if origin else []
    candidates += [default, *(spec for spec in CATALOGUE if spec.serves(architecture))]
    text = target.config.get_text_config(decoder=True)
    usable = [spec for spec in candidates if spec.matches_shape(text) and not spec.unsupported]
    if not usable:
        raise ValueError(
            f"The catalogue does not know {name}, and no draft for {architecture} fits its shape (hidden_size "
            f"{text.hidden_size}, {text.num_hidden_layers} layers, vocab_size {text.vocab_size}). The default, "
            f"{default.repo_id}, was made for {default.target} (hidden_size {default.hidden_size}, "
            f"{default.num_target_layers} layers, vocab_size {default.vocab_size}). Train one with "
            "spec.build(), or name a draft yourself: a repository or a folder."
        )
    spec = min(usable, key=lambda spec: abs((spec.vocab_size or 0) - text.vocab_size))
    rows = ""
    if spec.vocab_size != text.vocab_size:
        rows = f", but {spec.vocab_size} tokens where this one has {text.vocab_size}"
    reason = (
        f"The catalogue does not know {name}; {spec.repo_id} was made for {spec.target}, which has the same "
        f"architecture and shape{rows}. The text stays exact, but acceptance may be low: measure it."
    )
    warnings.warn(reason, UserWarning, stacklevel=4)
    return spec, reason


def _check_architectures(architectures: Any, target: Any) -> None:
    """Refuse anything but a list of names; with a target they may be missing."""
    if target is not None and (architectures is None or architectures == []):
        return
    advice = "pass the list in target.config.architectures, such as ['Qwen3ForCausalLM'], or target=target."
    if isinstance(architectures, str):
        raise ValueError(
            f"architectures is the string {architectures!r}, not a list of strings; {advice}"
        )
    is_list = isinstance(architectures, list | tuple)
    if not is_list or not all(isinstance(name, str) for name in architectures):
        raise ValueError(f"architectures is {architectures!r}, not a list of strings; {advice}")
    if not architectures:
        raise ValueError(f"architectures is empty; {advice}")


def _name_of(target: Any) -> str | None:
    """Return the Hub id or folder that a config or model was loaded from; None if unknown."""
    return checkpoint_name(getattr(target, "config", target))


@explained_for("name", "loaded", LOADING)
def load_draft(name: str | Path, **from_pretrained_kwargs: Any) -> DFlashDraftModel:
    """Load a draft of any kind and layout, from the Hub or a folder; no code of its repository runs.

    Args:
        name: Hub id or folder.
        from_pretrained_kwargs: of `from_pretrained` (`revision`, `dtype`, `token` ...).

    Raises:
        ValueError: this version cannot run the draft, or its config or weights are invalid.
        OSError: there is no such draft, no access or no connection; or a download is damaged.
    """
    check_folder(name)
    names = ("revision", "subfolder", "token", "cache_dir", "local_files_only", "force_download")
    where = {key: value for key, value in from_pretrained_kwargs.items() if key in names}
    files = {key: value for key, value in where.items() if not key.endswith(("only", "download"))}
    commit = pinned(name, files, where.get("local_files_only", False)).get("revision")
    if commit is not None:  # the kind and the weights are of one commit
        where["revision"] = from_pretrained_kwargs["revision"] = commit
    content, _ = DFlashConfig.get_config_dict(name, **where)
    draft = KINDS[variant_of(content)].model_class.from_pretrained(name, **from_pretrained_kwargs)
    target = target_named(content)
    if target is not None:
        draft.card_known = {"base_model": target}
    return draft


def read_config(name: str | Path, **where: Any) -> Any:
    """Return the config of a draft of any kind and layout, without its weights.

    Args:
        where: as in `from_pretrained` of transformers, such as `revision`.

    Raises:
        ValueError, OSError: as `load_draft` does.
    """
    content, _ = DFlashConfig.get_config_dict(name, **where)
    return KINDS[variant_of(content)].config_class.from_pretrained(name, **where)


class _Resolved(SpeculativeGenerate):
    """Find and load the draft of each target once, and decode with it.

    Args:
        draft: the draft to decode with; None for each target's own.
    """

    __signature__ = Signature(SpeculativeGenerate.__call__, "draft")

    def __init__(self, draft: Any = None) -> None:
        super().__init__(None)
        self.named = draft
        self.drafts: weakref.WeakKeyDictionary[Any, dict] = weakref.WeakKeyDictionary()
        """For each target, its drafts by what names them."""

    def __reduce__(self) -> tuple:
        return _Resolved, (self.named,)

    def __call__(self, model: Any = None, *args: Any, draft: Any = None, **kwargs: Any) -> Any:
        """Decode with `draft`, or the target's own; without a target, return a function that decodes with `draft`.

        Args:
            model: the target.
            args, kwargs: as in `SpeculativeGenerate`.
            draft: a loaded draft, a `DFlashDraftSpec`, a Hub id or a folder.
        """
        draft = self.named if draft is None else draft
        if model is None and draft is not None and not args and not kwargs:
            function = _Resolved(draft)
            function.drafts = self.drafts
            return function
        if not kwargs.keys() >= PREPARED:
            check_direct_call(model, args, kwargs)
            return model.generate(*args, custom_generate=self, draft=draft, **kwargs)
        return self._draft_for(model, draft).speculate(model, *args, **kwargs)

    def _draft_for(self, model: Any, draft: Any) -> Any:
        """Return the draft, loaded once for each target on its device and in its dtype."""
        if hasattr(draft, "speculate") and not isinstance(
            draft, type
        ):  # also one that was loaded by its repository's code
            return draft
        if not isinstance(draft, str | Path | DFlashDraftSpec | None):
            raise ValueError(
                f"draft is {shown(draft)}; pass a loaded draft, a DFlashDraftSpec, a Hub id or a folder."
            )
        loaded = self.drafts.setdefault(model, {})
        draft = str(draft) if isinstance(draft, Path) else draft
        if draft not in loaded:
            check_target(model)
            loaded[draft] = _load_for(model, draft).to(device_of(model)).eval()
        return loaded[draft]


def _load_for(model: Any, draft: str | DFlashDraftSpec | None) -> DFlashDraftModel:
    """Load a draft in the dtype of its target: this one, or the one that the catalogue knows."""
    if draft is None:
        draft = resolve_dflash_draft_spec(model.config.architectures, target=model)
    if isinstance(draft, DFlashDraftSpec):
        return draft.load(dtype=model.dtype)
    return load_draft(draft, dtype=model.dtype)


dflash_generate = _Resolved()
"""Decoding function for `target.generate(**inputs, custom_generate=dflash_generate)`.

The target's own draft is resolved and loaded once. `draft=` names another: beside `custom_generate`, or in
`custom_generate=dflash_generate(draft=...)`.

Raises:
    ValueError: no draft is known for this target, or as in `DFlashDraftModel.speculate`.
    OSError: the draft cannot be downloaded.
"""
