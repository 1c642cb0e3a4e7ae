# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Which draft for which target: by exact checkpoint from the catalogue, by architecture where the shapes allow it.

The catalogue, `drafts.json`, lists the drafts published on the Hugging Face Hub, with their commit where it is known.
A draft drafts well for the checkpoint it was trained on and no other: siblings of equal shape exist, so an
architecture alone never settles it.
"""

import json
import sys
import warnings
import weakref
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from .checkpoints import Origin, Target, base_of_adapter, origin_of, out_of_cache
from .compat_dflash import checkpoint_name, local_of_generate
from .configuration_dflash import DFlashConfig
from .families import FAMILIES, families_of, siblings_of
from .generate_dflash import SpeculativeGenerate
from .kinds import KINDS, kind_named, kind_of
from .layouts import variant_of
from .modeling_dflash import DFlashDraftModel, Qwen3DFlashDraftModel
from .support_dflash import check_target

# Families whose drafts load and can be published, but do not decode here: indexer caches, compressed ones, Kimi K3.
NOT_DECODED = frozenset({"deepseek_v4", "glm5_next_text", "glm_moe_dsa", "kimi_linear"})


@dataclass(frozen=True)
class DFlashDraftSpec:
    """A draft and the target it was made for. Fields are None where nothing is known.

    Args:
        repo_id: the draft's repository on the Hub, or a local folder.
        draft_cls: the class that runs it, the model of one of the `KINDS`.
        revision: the commit to load; the newest where it is None.
        subfolder: where in the repository it lies.
        targets: checkpoints it was made for, as Hub ids.
        architectures: of those checkpoints.
        hidden_size, num_target_layers, vocab_size: of those checkpoints.
        license: the draft's, as the Hub abbreviates it.
        gated: whether access must be asked for.
        unsupported: why this version cannot run it.
        note: what else is worth knowing.
    """

    repo_id: str
    draft_cls: type[DFlashDraftModel] = Qwen3DFlashDraftModel
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

    def __post_init__(self) -> None:
        for name in ("targets", "architectures"):
            if not isinstance(getattr(self, name), tuple):
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}; it must be a tuple of names, such as ('org/model',)."
                )

    @property
    def target_state(self) -> str | None:
        """What keeps this version from decoding its target, though the draft itself loads and can be published."""
        families = frozenset[str]().union(*map(families_of, self.architectures))
        return (
            "targets of its family are not decoded here"
            if families and families <= NOT_DECODED
            else None
        )

    @property
    def target(self) -> str | None:
        """The first of `targets`."""
        return self.targets[0] if self.targets else None

    def serves(self, architecture: str) -> bool:
        """Whether it was made for a target with the text part that targets of this architecture have."""
        return any(architecture in siblings_of(own) for own in self.architectures)

    def load(self, **from_pretrained_kwargs: Any) -> DFlashDraftModel:
        """Download and instantiate with our class: code of the repository never runs, and only safetensors are read.

        Keywords go to `from_pretrained` (`dtype`, `device_map`, `cache_dir`, `token`, `block_size` ...).

        Raises:
            ValueError: this version cannot run the draft, or its config or weights are not sound.
            OSError: nothing there, no access, no connection, or a damaged download.
        """
        self.refuse_unsupported()
        where = {"revision": self.revision, "subfolder": self.subfolder, "use_safetensors": True}
        draft = self.draft_cls.from_pretrained(self.repo_id, **(where | from_pretrained_kwargs))
        known = {"base_model": list(self.targets), "license": self.license}
        draft.card_known = {key: value for key, value in known.items() if value}
        return draft

    def build(
        self, target_config: PretrainedConfig, variant: str | None = None, **overrides: Any
    ) -> DFlashDraftModel:
        """A fresh draft of the right shape for a target, to be trained.

        5 layers, 5 taps spread evenly from the target's second to its third-last layer, block size 16, and the
        target's own dimensions, as published (arXiv 2602.06036).

        Args:
            target_config: of the target, whole or its text part.
            variant: name of one of the `KINDS`; the one that `draft_cls` runs where it is None.
            overrides: fields of the draft's config; `mask_token_id` must be among them.

        Raises:
            ValueError: no `mask_token_id`, a field that does not exist, or one that does not fit the target.
        """
        if "mask_token_id" not in overrides:
            raise ValueError(
                "mask_token_id must be given: the id of a token that has a row in the target's embedding and does not "
                "occur in its text, such as 151669 for Qwen3."
            )
        draft_cls = self.draft_cls if variant is None else kind_named(variant).model_class
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
        config.check_fits(
            text.hidden_size, text.num_hidden_layers, text.vocab_size, text.vocab_size
        )
        draft = draft_cls(config).to(config.dtype)
        name = _name_of(target_config)
        draft.card_known = {} if name is None or Path(name).exists() else {"base_model": name}
        return draft

    def refuse_unsupported(self) -> None:
        if self.unsupported:
            raise ValueError(
                f"{self.repo_id} cannot be run by this version of dflash-hub: {self.unsupported}."
            )

    def fits(self, text_config: PretrainedConfig) -> bool:
        """Whether a target of this shape is possible; a shape that is not known fits nothing."""
        ours = (self.hidden_size, self.num_target_layers, self.vocab_size)
        return ours == (
            text_config.hidden_size,
            text_config.num_hidden_layers,
            text_config.vocab_size,
        )


def _shape_for(text: PretrainedConfig, overrides: dict[str, Any]) -> dict[str, Any]:
    """The fields of a fresh draft for a target with this text config; its rotary base, and nothing of its scaling."""
    heads = text.num_attention_heads
    rope = getattr(text, "rope_parameters", None) or {}
    rope = rope.get("full_attention", rope)  # targets that rotate by layer type
    return {
        "block_size": 16,
        "target_layer_ids": overrides.get("target_layer_ids")
        or spread_taps(text.num_hidden_layers),
        "num_target_layers": text.num_hidden_layers,
        "vocab_size": text.vocab_size,
        "hidden_size": text.hidden_size,
        "intermediate_size": _dimension(text, "intermediate_size") or 3 * text.hidden_size,
        "num_attention_heads": heads,
        "num_key_value_heads": _dimension(text, "num_key_value_heads") or heads,
        "head_dim": _dimension(text, "head_dim") or text.hidden_size // heads,
        "rms_norm_eps": getattr(text, "rms_norm_eps", 1e-6),
        "max_position_embeddings": text.max_position_embeddings,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": rope.get("rope_theta", DFlashConfig.default_theta),
        },
    }


def _dimension(text: PretrainedConfig, name: str) -> int | None:
    """A dimension that is one number for all layers; None where it is not said or differs by layer."""
    try:
        value = getattr(text, name, None)
    except RuntimeError:  # how transformers refuses to name one where layers differ
        return None
    return value if isinstance(value, int) else None


def spread_taps(num_target_layers: int, taps: int = 5) -> list[int]:
    """`taps` layer ids spread evenly from the second layer to the third-last, as z-lab/dflash spreads them.

    Raises:
        ValueError: the target is too shallow for that many.
    """
    first, last = 1, num_target_layers - 3
    if taps < 2:
        raise ValueError(
            f"{taps} taps cannot be spread; name the layer yourself: target_layer_ids=[...]."
        )
    if last - first + 1 < taps:
        raise ValueError(
            f"The target has {num_target_layers} layers, too few to spread {taps} taps from the second to the "
            "third-last; choose them yourself: target_layer_ids=[...]."
        )
    return [round(first + index * (last - first) / (taps - 1)) for index in range(taps)]


def _read_catalogue() -> list[DFlashDraftSpec]:
    entries = json.loads((Path(__file__).parent / "drafts.json").read_text(encoding="utf-8"))
    names = set(DFlashDraftSpec.__dataclass_fields__)
    specs = []
    for entry in entries:
        values: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value
            for key, value in entry.items()
            if key in names
        }
        details = {key: entry[key] for key in entry if key not in names}
        if entry["variant"] not in KINDS:
            known = ", ".join(KINDS)
            raise ValueError(
                f"{entry['repo_id']}: variant is {entry['variant']!r} in drafts.json, not one of {known}."
            )
        specs.append(
            DFlashDraftSpec(
                draft_cls=KINDS[entry["variant"]].model_class, **values, details=details
            )
        )
    return specs


CATALOGUE: list[DFlashDraftSpec] = _read_catalogue()


def _default_for(architecture: str) -> DFlashDraftSpec:
    """The first draft that runs, or the better one for the same checkpoint; one for this very architecture first."""
    runs = [spec for spec in CATALOGUE if spec.serves(architecture) and not spec.unsupported]
    first = next((spec for spec in runs if architecture in spec.architectures), runs[0])
    return drafts_for(first.targets[0])[0] if first.targets else first


def drafts_for(target: str) -> list[DFlashDraftSpec]:
    """Return the drafts made for a checkpoint, by its Hub id: those that run first, and of those the later kind."""
    made_for = [
        spec
        for spec in CATALOGUE
        if target.casefold() in (name.casefold() for name in spec.targets)
    ]
    order = list(KINDS)

    def rank(spec: DFlashDraftSpec) -> tuple[bool, int]:
        return spec.unsupported is not None, -order.index(kind_of(spec.draft_cls.config_class).name)

    return sorted(made_for, key=rank)


def _served() -> dict[str, None]:
    """The architectures that the catalogue has drafts for which run: those it names, then those of their families."""
    named = [name for spec in CATALOGUE if not spec.unsupported for name in spec.architectures]
    return dict.fromkeys([*named, *(sibling for name in named for sibling in siblings_of(name))])


# Target architecture -> its default draft: the first in the catalogue that runs.
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
    taken = {architecture: DFLASH_DRAFT_REGISTRY.get(architecture)}
    taken |= {name: next(iter(drafts_for(name)), None) for name in spec.targets}
    for place, known in taken.items():
        if known is not None and not _same_draft(known, spec) and not overwrite:
            raise ValueError(
                f"{place} has a draft already, {known.repo_id}. Pass overwrite=True to put {spec.repo_id} there."
            )
    known_for = next((known.architectures for known in CATALOGUE if _same_draft(known, spec)), ())
    spec = replace(
        spec, architectures=tuple(dict.fromkeys([*known_for, *spec.architectures, architecture]))
    )
    CATALOGUE[:] = [spec, *(known for known in CATALOGUE if not _same_draft(known, spec))]
    DFLASH_DRAFT_REGISTRY[architecture] = spec


def _same_draft(one: DFlashDraftSpec, other: DFlashDraftSpec) -> bool:
    """The same draft, for whichever architectures it is registered."""
    return replace(one, architectures=()) == replace(other, architectures=())


def resolve_dflash_draft_spec(
    architectures: list[str] | None = None, target: str | PretrainedConfig | Any | None = None
) -> DFlashDraftSpec:
    """The draft for a target, the same one however the target was loaded.

    Args:
        architectures: the target's, `target.config.architectures`; the first registered one wins. With a target they
            may be None, as they are in the text config of a composite checkpoint.
        target: the target itself, to find the draft made for that very checkpoint or for the one it is a copy of: a
            Hub id, a folder, a config or a model.

    Raises:
        ValueError: nothing is registered for these architectures, no draft fits the target's shape, or those made for
            it cannot be run by this version.
        OSError: `target` is a Hub id that the catalogue does not know, and its config cannot be had.
    """
    return explain_resolution(architectures, target)[0]


def explain_resolution(
    architectures: list[str] | None = None, target: str | PretrainedConfig | Any | None = None
) -> tuple[DFlashDraftSpec, str]:
    """As `resolve_dflash_draft_spec`, with the reason in a sentence."""
    target = str(target) if isinstance(target, Path) else target
    if (
        target is not None
        and not isinstance(target, str | PretrainedConfig)
        and not hasattr(target, "config")
    ):
        raise ValueError(f"target is {target!r}; pass a Hub id, a folder, a config or a model.")
    _check_architectures(architectures, target)
    if target is None:
        architecture = _registered(architectures or [])
        spec = DFLASH_DRAFT_REGISTRY[architecture]
        return spec, f"It is the default for {architecture}; it was made for {spec.target}."
    name = target if isinstance(target, str) else _name_of(target)
    published = name and out_of_cache(name)
    made_for = drafts_for(published) if published else []
    if made_for:
        made_for[0].refuse_unsupported()
        return made_for[0], f"It was made for {published}."
    if isinstance(target, str) and (base := base_of_adapter(target)):
        spec, why = explain_resolution(architectures, base)
        return spec, f"{target} is an adapter for {base}. {why}"
    known = Target(name, None if isinstance(target, str) else getattr(target, "config", target))
    origin = origin_of(known, CATALOGUE)
    if origin is not None and origin.same:
        spec = drafts_for(origin.name)[0]
        spec.refuse_unsupported()
        return spec, origin.reason
    names = [*(architectures or ()), *(known.config.architectures or ())]
    names += [] if isinstance(target, str | PretrainedConfig) else [type(target).__name__]
    family = FAMILIES.get(known.config.get_text_config(decoder=True).model_type, ())
    return _by_shape(_registered(names, family), known, origin)


def _registered(names: list[str], family: tuple[str, ...] = ()) -> str:
    """The first registered architecture: of the names by which a target goes, else of its family."""
    architecture = next(
        (known for known in (*names, *family) if known in DFLASH_DRAFT_REGISTRY), None
    )
    if architecture is None:
        named = [
            known for known, spec in DFLASH_DRAFT_REGISTRY.items() if known in spec.architectures
        ]
        raise ValueError(
            f"No DFlash draft is registered for {', '.join(dict.fromkeys(names))}. Supported architectures: "
            f"{', '.join(named)}, and others with the same text part. Add one with register_dflash_draft()."
        )
    return architecture


def _by_shape(
    architecture: str, target: Target, origin: Origin | None
) -> tuple[DFlashDraftSpec, str]:
    """A draft whose own target has the shape of this one; never without a warning.

    That of the checkpoint it was trained from comes first, then the architecture's default.
    """
    default, name = DFLASH_DRAFT_REGISTRY[architecture], target.name or "this target"
    first = drafts_for(origin.name) if origin else []
    others = [*first, default, *(spec for spec in CATALOGUE if spec.serves(architecture))]
    text = target.config.get_text_config(decoder=True)
    spec = next((spec for spec in others if spec.fits(text) and not spec.unsupported), None)
    if spec is None:
        raise ValueError(
            f"The catalogue does not know {name}, and no draft for {architecture} fits its shape (hidden_size "
            f"{text.hidden_size}, {text.num_hidden_layers} layers, vocab_size {text.vocab_size}); the default, "
            f"{default.repo_id}, was made for {default.target} (hidden_size {default.hidden_size}, "
            f"{default.num_target_layers} layers, vocab_size {default.vocab_size}). Train one with spec.build(), or "
            "name a draft yourself."
        )
    why = (
        f"The catalogue does not know {name}; {spec.repo_id} was made for {spec.target}, which has the same "
        "architecture and shape. The text stays exact, but acceptance may be low: measure it."
    )
    warnings.warn(why, UserWarning, stacklevel=4)
    return spec, why


def _check_architectures(architectures: Any, target: Any) -> None:
    if target is not None and (architectures is None or architectures == []):
        return
    advice = "pass the list in target.config.architectures, such as ['Qwen3ForCausalLM'], or target=target."
    if isinstance(architectures, str):
        raise ValueError(
            f"architectures is the string {architectures!r}, not a list of strings; {advice}"
        )
    if not isinstance(architectures, list | tuple) or not all(
        isinstance(name, str) for name in architectures
    ):
        raise ValueError(f"architectures is {architectures!r}, not a list of strings; {advice}")
    if not architectures:
        raise ValueError(f"architectures is empty; {advice}")


def _name_of(target: Any) -> str | None:
    """What a config or model was loaded from, a Hub id or a folder; None if nothing tells."""
    return checkpoint_name(getattr(target, "config", target))


def load_draft(name: str | Path, **from_pretrained_kwargs: Any) -> DFlashDraftModel:
    """Load a draft of either kind, in whatever layout it is, from the Hub or a folder; no code of its repository runs.

    Args:
        name: Hub id or folder.
        from_pretrained_kwargs: of `from_pretrained` (`revision`, `dtype`, `token` ...).

    Raises:
        ValueError: this version cannot run the draft, or its config or weights are not sound.
        OSError: nothing there, no access, no connection, or a damaged download.
    """
    places = ("revision", "subfolder", "token", "cache_dir", "local_files_only", "force_download")
    where = {key: value for key, value in from_pretrained_kwargs.items() if key in places}
    content, _ = DFlashConfig.get_config_dict(name, **where)
    return KINDS[variant_of(content)].model_class.from_pretrained(name, **from_pretrained_kwargs)


class _Resolved(SpeculativeGenerate):
    """The decoding function that finds the draft of whatever target calls it, once for each."""

    def __init__(self) -> None:
        super().__init__(None)
        self.drafts: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()

    def __call__(
        self, model: Any, input_ids: Any, *args: Any, streamer: Any = None, **kwargs: Any
    ) -> Any:
        streamer = streamer or local_of_generate("streamer", sys._getframe(1))
        if model not in self.drafts:
            check_target(model)
            spec = resolve_dflash_draft_spec(model.config.architectures, target=model)
            self.drafts[model] = spec.load(dtype=model.dtype).to(model.device).eval()
        return self.drafts[model].speculate(model, input_ids, *args, streamer=streamer, **kwargs)


dflash_generate = _Resolved()
"""`target.generate(**inputs, custom_generate=dflash_generate)`: the target's own draft, resolved and loaded once.

Raises:
    ValueError: no draft is known for this target, or as in `DFlashDraftModel.speculate`.
    OSError: the draft cannot be downloaded.
"""
