# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Define the config of a DFlash draft: typed fields, read from any layout of config.json.

This file travels with every pushed draft. `DFlashConfig.from_dict` translates layouts, so the model only ever sees
the typed fields. Sources: DFlash (arXiv 2602.06036) and its reference code, z-lab/dflash.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from packaging.version import Version

__version__ = "0.1.0"
OLDEST_TRANSFORMERS = "5.15.1"

if Version(transformers.__version__) < Version(OLDEST_TRANSFORMERS):
    raise ImportError(
        f"This DFlash draft needs transformers >= {OLDEST_TRANSFORMERS}, but {transformers.__version__} is installed. "
        "Upgrade it: pip install --upgrade transformers"
    )

from huggingface_hub.errors import StrictDataclassFieldValidationError  # noqa: E402 (after the clearer message)
from transformers.configuration_utils import PretrainedConfig  # noqa: E402

from .findings_dflash import (  # noqa: E402
    LOADING,
    ONE_SENTENCE,
    SAVING,
    Finding,
    explained_for,
    must,
    raise_first,
)
from .layouts_dflash import (  # noqa: E402
    FIELDS,
    FULL,
    SLIDING,
    check_content,
    check_field,
    engines_layout,
    modern_rope,
    read_own_layout,
    rope_findings,
    shown,
)


@dataclass
class Extensions:
    """Hold functions that importing dflash_hub replaces; the copies of this code in repositories use the defaults.

    Args:
        read_layout: reads a config.json. The default reads the hub and the engines layout, the package's any layout.
        write_card: writes a model card from the package's template. With None, the existing card is passed on.
        other_layouts: names of the layouts of other projects that `write_layout` writes.
        write_layout: writes config and weights of a draft into a folder, in one of them; returns remarks.
        read_qwen3: makes a config of a class of drafts from a `Qwen3Config`. With None, a model is built from a config
            of its own only.
    """

    read_layout: Callable[[dict[str, Any], dict[str, Any], str], dict[str, Any]] = read_own_layout
    write_card: Callable[..., None] | None = None
    other_layouts: tuple[str, ...] = ()
    write_layout: Callable[..., list[str]] | None = None
    read_qwen3: Callable[[Any, PretrainedConfig], Any] | None = None


EXTENSIONS = Extensions()


def same_vocabulary(known: int, found: int) -> bool:
    """Return whether `found` rows may be a vocabulary of `known` with rows added at its end, or padding taken away.

    Tokens keep their ids then. A vocabulary that lacks more than a quarter of the rows is another one.
    """
    return 4 * found >= 3 * known


class DFlashConfig(PretrainedConfig):
    """Configure a DFlash draft model.

    Args:
        block_size: positions in a block, the anchor included; `num_drafted` tokens are drafted per cycle.
        mask_token_id: the token that fills the block after the anchor; the target's embedding must have its row.
        target_layer_ids: 0-based decoder layers of the target whose *output* is tapped, ascending.
        num_target_layers: decoder layers of the target; None if unknown.
        target_hidden_size: width of one tap; by default `hidden_size`.
        is_causal: whether later positions of the block are hidden from a query; a list has one value per layer. By
            default, sliding layers are causal and full layers bidirectional, as in serving engines.
        layer_types: `full_attention` or `sliding_attention` per layer; by default all are full.
        sliding_window: a query of a sliding layer sees keys at a distance below this.
        window_from_anchor: whether the window is instead the `sliding_window` tokens before the anchor, for every
            position of the block, and hides nothing inside the block. The speculators package trains so.
        rope_parameters: `{"rope_type": ..., "rope_theta": ..., ...}`; `rope_theta=` alone may be passed instead.
        sample_from_anchor: whether the anchor's position predicts the first token, so that a block drafts `block_size`
            tokens. By default position k predicts the token at anchor + k, and the anchor's predicts nothing.
        vocab_size: the target's; None if unknown.
        draft_vocab_size: tokens that the draft knows, if fewer than the target's. It has a head of its own then, and
            `d2t` leads from its tokens to the target's.
        has_own_embed_tokens: whether the draft has an embedding. By default it uses the target's.
        has_own_lm_head: whether the draft has a head. By default it uses the target's.
        unscaled_embeddings: whether a block is embedded by the bare rows of an embedding that scales them, as Gemma's
            does. The speculators package trains so.
        has_own_mask_embedding: whether the draft has an embedding of the mask token, in place of the row of one.
        final_logit_softcapping: the target's soft cap, stored for engines that read it; it changes no argmax here.

    The other fields are Qwen3's. With dflash_hub imported, `from_pretrained` and `from_dict` read every published
    DFlash 1 layout, and refuse by name the features that this model cannot run. Contradicting or missing fields raise
    `ValueError`. So do values that a field cannot have, also where it is set later; for bounds see
    `layouts_dflash.FIELDS`.
    """

    model_type = "dflash"
    architecture = "DFlashDraftModel"
    _auto_class = "AutoConfig"
    default_theta = 1_000_000.0
    # Whether the fields of its head have values that may be guessed; else whoever trains one writes them.
    has_usual_head = True
    # Without this, transformers 5.15 builds a default config when it saves one, and three fields have no default.
    has_no_defaults_at_init = True

    block_size: int
    mask_token_id: int
    target_layer_ids: list[int]
    num_target_layers: int | None = None
    target_hidden_size: int | None = None
    is_causal: bool | list[bool] | None = None
    layer_types: list[str] | None = None
    sliding_window: int | None = None
    window_from_anchor: bool = False
    rope_parameters: dict | None = None
    sample_from_anchor: bool = False
    vocab_size: int | None = None
    draft_vocab_size: int | None = None
    has_own_embed_tokens: bool = False
    has_own_lm_head: bool = False
    unscaled_embeddings: bool = False
    has_own_mask_embedding: bool = False
    hidden_size: int = 4096
    intermediate_size: int = 12288
    num_hidden_layers: int = 5
    num_attention_heads: int = 32
    num_key_value_heads: int = 8
    head_dim: int = 128
    hidden_act: str = "silu"
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 40960
    initializer_range: float = 0.02
    attention_bias: bool = False
    attention_dropout: float | int = 0.0
    final_logit_softcapping: float | int | None = None
    tie_word_embeddings: bool = False
    use_cache: bool = True

    def __init_subclass__(cls, *args: Any, **kwargs: Any) -> None:
        """Let other kinds be compared as this one is; transformers makes dataclasses of them, with another `__eq__`."""
        super().__init_subclass__(*args, **kwargs)
        cls.__eq__ = DFlashConfig.__eq__  # type: ignore[method-assign]

    def __setattr__(self, name: str, value: Any) -> None:
        field = self.__dataclass_fields__.get(name)
        if field is not None and name in FIELDS and not (value is None and field.default is None):
            check_field(name, value)
        try:
            super().__setattr__(name, value)
        except StrictDataclassFieldValidationError:  # transformers' own fields
            expected = self.__dataclass_fields__[name].type
            words = expected.__name__ if isinstance(expected, type) else expected
            raise ValueError(f"{name} is {shown(value)}; it must be {words}.") from None

    def __post_init__(self, **kwargs: Any) -> None:
        for name in {"num_labels", "rope_theta", "rope_scaling"} & set(kwargs):
            if kwargs[name] is not None:
                check_field(name, kwargs[name])
        self._normalize_dtype(kwargs)
        self._normalize_rope(kwargs)
        self.architectures = [self.architecture]
        if self.target_hidden_size is None:
            self.target_hidden_size = self.hidden_size
        if self.layer_types is None:
            self.layer_types = [FULL] * self.num_hidden_layers
        if SLIDING not in self.layer_types:
            self.sliding_window, self.window_from_anchor = None, False
        if self.draft_vocab_size == self.vocab_size:
            self.draft_vocab_size = None
        if self.draft_vocab_size is not None:
            self.has_own_lm_head = True
        raise_first(self.consistency_findings())
        self._resolve_is_causal()
        super().__post_init__(**kwargs)

    @property
    def num_drafted(self) -> int:
        """Tokens that a block drafts."""
        return self.block_size - 1 + self.sample_from_anchor

    @property
    def engines_remarks(self) -> list[str]:
        """What engines compute otherwise than here because of the kind of the draft, a sentence each."""
        return []

    @property
    def needs_own_loop(self) -> list[str]:
        """Names of the fields in use that transformers' own DFlash loop does not read."""
        names = ("sample_from_anchor", "has_own_embed_tokens", "has_own_lm_head")
        return [name for name in (*names, "unscaled_embeddings") if getattr(self, name)]

    @property
    def causal_layers(self) -> list[bool]:
        """`is_causal` as a list with one value per layer."""
        if isinstance(self.is_causal, list):
            return self.is_causal
        return [bool(self.is_causal)] * self.num_hidden_layers

    def _normalize_dtype(self, kwargs: dict[str, Any]) -> None:
        """Set `dtype` to a torch.dtype, also from its name or from the older keyword `torch_dtype`."""
        older = kwargs.pop("torch_dtype", None)
        if older is not None:
            check_field("torch_dtype", older, rule=FIELDS["dtype"])
        dtype = vars(self)["dtype"]
        dtype = older if dtype is None else dtype
        if isinstance(dtype, str):
            dtype = getattr(torch, dtype.removeprefix("torch."))
        self.dtype = dtype

    def _normalize_rope(self, kwargs: dict[str, Any]) -> None:
        """Set `rope_parameters` to a copy without None entries, because transformers changes it in place."""
        rope = kwargs.pop("rope_scaling", None) or self.rope_parameters or {}
        if "partial_rotary_factor" in kwargs:
            rope = rope | {"partial_rotary_factor": kwargs.pop("partial_rotary_factor")}
        rope = modern_rope("rope_parameters", rope)
        theta = kwargs.get("rope_theta")
        if theta is not None and rope.get("rope_theta", theta) != theta:
            raise ValueError(
                f"rope_theta is {theta}, but rope_parameters has {rope['rope_theta']}; pass one of them."
            )
        self.rope_parameters = rope or None

    def _resolve_is_causal(self) -> None:
        """Set `is_causal` to one bool, or to one per layer where the layers differ."""
        if self.is_causal is None:
            self.is_causal = [layer_type == SLIDING for layer_type in self.layer_types or []]
        if isinstance(self.is_causal, list) and len(set(self.is_causal)) == 1:
            self.is_causal = self.is_causal[0]

    def consistency_findings(self) -> Iterator[Finding]:
        """Yield every contradiction between fields that are valid alone."""
        yield from rope_findings(self.rope_parameters or {}, self.head_dim)
        mask, vocab = self.mask_token_id, self.vocab_size
        if vocab is not None and mask >= vocab:
            what = f"mask_token_id is {mask}, but vocab_size is {vocab}"
            yield must(what, mask, "a token id that the target's embedding has a row for")
        last_tap, layers = self.target_layer_ids[-1], self.num_target_layers
        if layers is not None and last_tap >= layers:
            what = (
                f"target_layer_ids is {self.target_layer_ids} and asks for layer {last_tap}, but the target has "
                f"{layers} layers (num_target_layers)"
            )
            right = f"they must be from 0 to {layers - 1}"
            yield Finding(what, last_tap, layers, right, ONE_SENTENCE)
        yield from self._vocabulary_findings()
        yield from self._layer_findings()

    def _vocabulary_findings(self) -> Iterator[Finding]:
        """Yield that the rows of an embedding or head of the draft's own are not known, or too many."""
        vocab, reduced = self.vocab_size, self.draft_vocab_size
        own = [name for name in ("has_own_embed_tokens", "has_own_lm_head") if getattr(self, name)]
        if vocab is None and own:
            right = f"the target's, because {own[0]} is True"
            yield must("vocab_size is None", None, right)
        elif reduced is not None and vocab is not None and reduced > vocab:
            right = f"at most vocab_size, {vocab}"
            yield must(f"draft_vocab_size is {reduced}", reduced, right)

    def _layer_findings(self) -> Iterator[Finding]:
        """Yield every contradiction about the layers of the draft and their heads."""
        types, layers = self.layer_types or [], self.num_hidden_layers
        if len(types) != layers:
            right = f"{layers} entries (num_hidden_layers), each {FULL!r} or {SLIDING!r}"
            yield must(f"layer_types is {shown(types)}", types, right, "hold")
        if SLIDING in types and self.sliding_window is None:
            what = "layer_types has sliding layers, but sliding_window is None"
            yield Finding(what, None, "an int", "pass sliding_window=", ONE_SENTENCE)
        heads, groups = self.num_attention_heads, self.num_key_value_heads
        if heads % groups:
            what = f"num_attention_heads ({heads})"
            advice = f"must be a multiple of num_key_value_heads ({groups})"
            yield Finding(what, heads, f"a multiple of {groups}", advice, "{what} {advice}.")
        causal = self.is_causal
        if isinstance(causal, list) and len(causal) != layers:
            what = f"is_causal has {len(causal)} entries, {shown(causal)}, but num_hidden_layers is {layers}"
            yield must(what, causal, "one bool per layer, or be a single bool for all", "hold")

    def fit_findings(
        self, hidden_size: int, num_layers: int, vocab_size: int, embedding_rows: int
    ) -> Iterator[Finding]:
        """Yield every misfit with a target: with one, this draft would draft nonsense, or fail far from the cause.

        Args:
            hidden_size: width of the target's embeddings and hidden states.
            num_layers: decoder layers of the target.
            vocab_size: the target's `vocab_size`.
            embedding_rows: rows of the target's embedding, which may be padded beyond `vocab_size`.
        """
        tap, mask = self.target_layer_ids[-1], self.mask_token_id
        own_fc = self.fc_width
        fc_width = hidden_size * len(self.target_layer_ids)
        layers = self.num_target_layers or num_layers
        vocab = self.vocab_size or vocab_size
        # Rows added at the end are nothing to a draft, whosever embedding and head it uses.
        known = same_vocabulary(vocab, max(vocab_size, embedding_rows))
        advice = "Use the draft that was made for this target (`dflash-hub resolve` finds it)"
        checks = (
            (hidden_size == self.hidden_size, "hidden_size", self.hidden_size, f"{hidden_size}"),
            (fc_width == own_fc, "fc width (taps x tap width)", own_fc, f"{fc_width}"),
            (layers == num_layers, "num_target_layers", layers, f"{num_layers} layers"),
            (tap < num_layers, "last tapped layer", tap, f"{num_layers} layers, counted from 0"),
            (mask < embedding_rows, "mask_token_id", mask, f"{embedding_rows} embedding rows"),
            (known, "vocab_size", vocab, f"{vocab_size}"),
        )
        for fits, name, found, expected in checks:
            if not fits:
                what = f"{name} is {found} in the draft, but the target has {expected}"
                yield Finding(
                    f"This draft does not fit this target: {what}", found, expected, advice
                )

    @property
    def fc_width(self) -> int:
        """Input width of the feature projection: taps x tap width."""
        return len(self.target_layer_ids) * int(self.target_hidden_size or self.hidden_size)

    @classmethod
    def own_fields(cls) -> list[str]:
        """Return the fields that this class and `DFlashConfig` add to those of every config."""
        names: list[str] = []
        for base in cls.__mro__:
            if issubclass(base, DFlashConfig):
                names += base.__annotations__
        return names

    # Reading ---------------------------------------------------------------------------------------------------

    @classmethod
    def _dict_from_json_file(cls, json_file: Any) -> dict[str, Any]:
        """Read a file as transformers does, but refuse anything but a dict, and read no other file it points to."""
        try:
            content = super()._dict_from_json_file(json_file)
        except (json.JSONDecodeError, UnicodeDecodeError):
            raise  # transformers reports invalid JSON itself
        except (RecursionError, ValueError):
            raise ValueError(
                f"{json_file} holds a list or a number too large to be read; it must not."
            ) from None
        if content == {}:
            raise ValueError(f"{json_file} is {{}}; it must be a dict of fields.")
        _check_no_key_twice(json_file)
        check_content(content).pop("configuration_files", None)
        return content

    @classmethod
    def from_json_file(cls, json_file: Any) -> Any:
        """Build from a file, as `from_dict` does from its content."""
        return cls.from_dict(cls._dict_from_json_file(json_file))

    @classmethod
    @explained_for("pretrained_model_name_or_path", "read", LOADING)
    def get_config_dict(
        cls, pretrained_model_name_or_path: Any, **kwargs: Any
    ) -> tuple[dict, dict]:
        """Read config.json as transformers does; move the file's `model_type` to `source_model_type`.

        A draft of another layout has another `model_type`, of which transformers would warn.
        """
        config_dict, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        if not config_dict:
            raise OSError(
                f"{pretrained_model_name_or_path} has no config.json; pass the folder or repository of a draft."
            )
        config_dict["source_model_type"] = config_dict.get("model_type")
        config_dict["model_type"] = cls.model_type
        return config_dict, kwargs

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Build from a config.json of any published layout.

        Keywords that name a field (`block_size=8`, `rope_theta=1e6`) replace the file's value, or supply a missing one.

        Raises:
            ValueError: a field is missing (the message names the keyword that supplies it), contradicts itself (both
                keys are named) or has an invalid value. Or a key inside dflash_config is not known, or the draft
                needs a feature that this model does not have.
        """
        names = {*cls.__dataclass_fields__, "rope_theta"} - {"dtype"}
        overrides = {name: kwargs.pop(name) for name in list(kwargs) if name in names}
        for name in ("torch_dtype", "dtype"):
            dtype = kwargs.pop(name, None)
            if dtype is not None and not (isinstance(dtype, str) and dtype == "auto"):
                check_field(name, dtype, rule=FIELDS["dtype"])
                overrides["dtype"] = dtype
        fields = EXTENSIONS.read_layout(config_dict, overrides, cls.model_type)
        return super().from_dict(fields, **kwargs)

    # Writing ---------------------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """Return the hub layout: the typed fields, and the version of dflash-hub that wrote them."""
        return super().to_dict() | {"dflash_hub_version": __version__}

    @explained_for("save_directory", "written", SAVING)
    def save_pretrained(
        self, save_directory: Any, push_to_hub: bool = False, layout: str = "hub", **kwargs: Any
    ):
        """Write config.json in the hub layout, or with `layout="engines"` in the layout that serving engines load."""
        if check_layout(layout, LAYOUTS) == "engines":
            if push_to_hub:
                raise ValueError(
                    "A config alone is not pushed in the engines layout; push the draft: draft.push_to_hub()."
                )
            write_config(Path(save_directory), engines_layout(self))
        else:
            super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)

    def __eq__(self, other: object) -> bool:
        """Return whether two configs describe the same draft, wherever each was read from."""
        same_kind = getattr(other, "model_type", None) == self.model_type
        return same_kind and _content(self) == _content(other)


def write_config(folder: Path, content: dict[str, Any]) -> None:
    """Write a config.json as transformers writes one."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(content, indent=2, sort_keys=True) + "\n"
    (folder / "config.json").write_text(text, encoding="utf-8")


def _check_no_key_twice(json_file: Any) -> None:
    """Refuse a file in which a key stands twice with different values: readers would take different ones.

    Raises:
        ValueError: naming the key and both values.
    """

    def collect(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found and found[key] != value:
                raise ValueError(
                    f"{json_file} contradicts itself about {key}: it is {shown(found[key])} and, further down, "
                    f"{shown(value)}. Correct the file."
                )
            found[key] = value
        return found

    json.loads(Path(json_file).read_text(encoding="utf-8"), object_pairs_hook=collect)


LAYOUTS = ("hub", "engines")
"""The layouts in which a repository is complete: with code, and a card."""


def check_layout(layout: str, layouts: tuple[str, ...]) -> str:
    """Return `layout`; raise a ValueError if it is not one of `layouts`, which can be written here."""
    if layout not in list(layouts):
        more = ""
        if not EXTENSIONS.other_layouts:
            more = " Importing dflash_hub, where it is installed, adds those of other projects."
        names = ", ".join(map(repr, layouts))
        raise ValueError(f"layout is {layout!r}; it must be one of {names}.{more}")
    return layout


def _content(config: Any) -> dict[str, Any]:
    """Return the fields of a config without those that saving and loading add."""
    bookkeeping = ("transformers_version", "dflash_hub_version", "auto_map", "_name_or_path")
    return {name: value for name, value in config.to_dict().items() if name not in bookkeeping}
