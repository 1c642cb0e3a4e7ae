# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""What a DFlash draft is: typed fields, and the translation of what is on disk into them.

This file travels with every pushed draft. Layouts are translated once, in `DFlashConfig.from_dict`; the model
only ever sees the typed fields. Sources: DFlash (arXiv 2602.06036) and its reference code, z-lab/dflash.
"""

import json
from collections.abc import Callable
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

from .layouts_dflash import (  # noqa: E402
    FIELDS,
    FULL,
    SLIDING,
    check_content,
    check_field,
    check_rope,
    engines_layout,
    modern_rope,
    read_own_layout,
    shown,
)


@dataclass
class Extensions:
    """What importing dflash_hub adds to this code; the copies of it in repositories do without.

    Args:
        read_layout: reads a config.json of any published layout; a copy reads the hub and the engines layout.
        write_card: writes a model card from the package's template; a copy passes on the card that it found.
    """

    read_layout: Callable[[dict[str, Any], dict[str, Any], str], dict[str, Any]] = read_own_layout
    write_card: Callable[..., None] | None = None


EXTENSIONS = Extensions()


class DFlashConfig(PretrainedConfig):
    """Configuration of a DFlash draft model.

    Args:
        block_size: positions in a block, the anchor included; `block_size - 1` tokens are drafted per cycle.
        mask_token_id: the token whose embedding fills the block after the anchor; a row of the target's embedding.
        target_layer_ids: 0-based decoder layers of the target whose *output* is tapped, ascending.
        num_target_layers: decoder layers of the target, where it is known.
        target_hidden_size: width of one tap; the draft's own `hidden_size` unless said.
        is_causal: whether a query sees later positions of its own block (False) or not (True); a list says it
            layer by layer. Not said: sliding layers are causal, full layers bidirectional, as serving engines do.
        layer_types: `full_attention` or `sliding_attention` per layer; all full unless said.
        sliding_window: a query of a sliding layer sees keys at a distance below this.
        rope_parameters: `{"rope_type": ..., "rope_theta": ..., ...}`; `rope_theta=` alone may be given instead.
        vocab_size: the target's, where it is known; the draft has neither embedding nor head of its own.
        final_logit_softcapping: the target's soft cap, kept for engines that read it; it changes no argmax here.

    The other fields are Qwen3's. With dflash_hub imported, `from_pretrained` and `from_dict` read every published
    DFlash 1 layout, and refuse by name what this model cannot run. Contradicting or missing fields, and values that a
    field cannot have, raise `ValueError`, also where a field is set later; `layouts_dflash.FIELDS` has the bounds.
    """

    model_type = "dflash"
    architecture = "DFlashDraftModel"
    _auto_class = "AutoConfig"
    default_theta = 1_000_000.0
    # The version 5.15 of transformers builds a default config to shorten what it writes, unless told that it cannot.
    has_no_defaults_at_init = True

    block_size: int
    mask_token_id: int
    target_layer_ids: list[int]
    num_target_layers: int | None = None
    target_hidden_size: int | None = None
    is_causal: bool | list[bool] | None = None
    layer_types: list[str] | None = None
    sliding_window: int | None = None
    rope_parameters: dict | None = None
    vocab_size: int | None = None
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

    def __setattr__(self, name: str, value: Any) -> None:
        field = self.__dataclass_fields__.get(name)
        if field is not None and name in FIELDS and not (value is None and field.default is None):
            check_field(name, value)
        try:
            super().__setattr__(name, value)
        except StrictDataclassFieldValidationError:  # the fields of transformers' own
            kind = self.__dataclass_fields__[name].type
            words = kind.__name__ if isinstance(kind, type) else kind
            raise ValueError(f"{name} is {shown(value)}; it must be {words}.") from None

    def __post_init__(self, **kwargs: Any) -> None:
        for name in {"num_labels", "rope_theta", "rope_scaling"} & set(kwargs):
            if kwargs[name] is not None:
                check_field(name, kwargs[name])
        self._settle_dtype(kwargs)
        self._settle_rope(kwargs)
        self.architectures = [self.architecture]
        if self.target_hidden_size is None:
            self.target_hidden_size = self.hidden_size
        if self.layer_types is None:
            self.layer_types = [FULL] * self.num_hidden_layers
        if SLIDING not in self.layer_types:
            self.sliding_window = None
        self._check_block()
        self._check_taps()
        self._check_layers()
        self._settle_causality()
        super().__post_init__(**kwargs)

    @property
    def causal_layers(self) -> list[bool]:
        """Per layer: is the block's attention causal? `is_causal`, spelled out."""
        if isinstance(self.is_causal, list):
            return self.is_causal
        return [bool(self.is_causal)] * self.num_hidden_layers

    def _settle_dtype(self, kwargs: dict[str, Any]) -> None:
        """One of torch's own, from whichever keyword and however it is written."""
        older, dtype = kwargs.pop("torch_dtype", None), vars(self)["dtype"]
        if older is not None:
            check_field("torch_dtype", older, kind=FIELDS["dtype"])
        dtype = older if dtype is None else dtype
        self.dtype = (
            getattr(torch, dtype.removeprefix("torch.")) if isinstance(dtype, str) else dtype
        )

    def _settle_rope(self, kwargs: dict[str, Any]) -> None:
        """A dict of our own, since transformers fills it in place, without what says nothing."""
        said = kwargs.pop("rope_scaling", None) or self.rope_parameters or {}
        partial = {key: kwargs.pop(key) for key in ("partial_rotary_factor",) if key in kwargs}
        rope = modern_rope("rope_parameters", said | partial)
        theta = kwargs.get("rope_theta")
        if theta is not None and rope.get("rope_theta", theta) != theta:
            raise ValueError(
                f"rope_theta is {theta}, but rope_parameters has {rope['rope_theta']}; say one of them."
            )
        check_rope(rope, self.head_dim)
        self.rope_parameters = rope or None

    def _settle_causality(self) -> None:
        """Turn what was said, or not, into one bool, or one bool per layer where the layers differ."""
        if self.is_causal is None:
            self.is_causal = [layer_type == SLIDING for layer_type in self.layer_types or []]
        if isinstance(self.is_causal, list):
            if len(self.is_causal) != self.num_hidden_layers:
                raise ValueError(
                    f"is_causal has {len(self.is_causal)} entries, {shown(self.is_causal)}, but num_hidden_layers is "
                    f"{self.num_hidden_layers}; it must hold one bool per layer, or be a single bool for all."
                )
            if len(set(self.is_causal)) == 1:
                self.is_causal = self.is_causal[0]

    def _check_block(self) -> None:
        if self.vocab_size is not None and self.mask_token_id >= self.vocab_size:
            raise ValueError(
                f"mask_token_id is {self.mask_token_id}, but vocab_size is {self.vocab_size}; it must be a token id "
                "that the target's embedding has a row for."
            )

    def _check_taps(self) -> None:
        taps, layers = self.target_layer_ids, self.num_target_layers
        if layers is not None and taps[-1] >= layers:
            raise ValueError(
                f"target_layer_ids is {taps} and asks for layer {taps[-1]}, but the target has {layers} layers "
                f"(num_target_layers); they must be from 0 to {layers - 1}."
            )

    def _check_layers(self) -> None:
        types = self.layer_types or []
        if len(types) != self.num_hidden_layers:
            raise ValueError(
                f"layer_types is {shown(types)}; it must hold {self.num_hidden_layers} entries (num_hidden_layers), "
                f"each {FULL!r} or {SLIDING!r}."
            )
        if SLIDING in types and self.sliding_window is None:
            raise ValueError(
                f"layer_types has sliding layers, but sliding_window is {self.sliding_window}; pass sliding_window=."
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads ({self.num_attention_heads}) must be a multiple of num_key_value_heads "
                f"({self.num_key_value_heads})."
            )

    def check_target(
        self, hidden_size: int, num_layers: int, vocab_size: int, embedding_rows: int
    ) -> None:
        """Refuse a target that this draft was not made for; a misfit would draft nonsense, or fail far from its cause.

        Args:
            hidden_size: width of the target's embeddings and hidden states.
            num_layers: decoder layers of the target.
            vocab_size: the target's `vocab_size`.
            embedding_rows: rows of the target's embedding, which may be padded beyond `vocab_size`.

        Raises:
            ValueError: with the draft's number and the target's, for the first thing that does not fit.
        """
        fc = len(self.target_layer_ids)
        misfits = [
            (hidden_size != self.hidden_size, "hidden_size", self.hidden_size, hidden_size),
            (
                hidden_size * fc != self.fc_width,
                "fc width (taps x tap width)",
                self.fc_width,
                hidden_size * fc,
            ),
            (
                self.num_target_layers not in (None, num_layers),
                "num_target_layers",
                self.num_target_layers,
                num_layers,
            ),
            (
                self.target_layer_ids[-1] >= num_layers,
                "last tapped layer",
                self.target_layer_ids[-1],
                num_layers,
            ),
            (
                self.mask_token_id >= embedding_rows,
                "mask_token_id",
                self.mask_token_id,
                embedding_rows,
            ),
            (
                self.vocab_size not in (None, vocab_size, embedding_rows),
                "vocab_size",
                self.vocab_size,
                vocab_size,
            ),
        ]
        units = {
            "last tapped layer": "layers, counted from 0",
            "mask_token_id": "embedding rows",
            "num_target_layers": "layers",
        }
        for misfit, name, ours, theirs in misfits:
            if misfit:
                raise ValueError(
                    f"This draft does not fit this target: {name} is {ours} in the draft, but the target has {theirs}"
                    f"{' ' + units[name] if name in units else ''}. Use the draft that was made for this target "
                    "(`dflash-hub resolve` finds it)."
                )

    @property
    def fc_width(self) -> int:
        """Input width of the feature projection: taps x tap width."""
        return len(self.target_layer_ids) * int(self.target_hidden_size or self.hidden_size)

    @classmethod
    def own_fields(cls) -> list[str]:
        """The fields that are a draft's, and not every model's."""
        return [
            name
            for one in cls.__mro__
            if issubclass(one, DFlashConfig)
            for name in one.__annotations__
        ]

    # Reading ---------------------------------------------------------------------------------------------------

    @classmethod
    def _dict_from_json_file(cls, json_file: Any) -> dict[str, Any]:
        """As in transformers, of a file that must hold a dict; another file that it may point to is not read."""
        try:
            content = super()._dict_from_json_file(json_file)
        except (json.JSONDecodeError, UnicodeDecodeError):
            raise  # transformers says that it is no JSON
        except (RecursionError, ValueError):
            raise ValueError(
                f"{json_file} holds a list or a number too large to be read; it must not."
            ) from None
        if content == {}:
            raise ValueError(f"{json_file} is {{}}; it must be a dict of fields.")
        return {
            key: value
            for key, value in check_content(content).items()
            if key != "configuration_files"
        }

    @classmethod
    def from_json_file(cls, json_file: Any) -> Any:
        """As `from_dict`, of a file."""
        return cls.from_dict(cls._dict_from_json_file(json_file))

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: Any, **kwargs: Any
    ) -> tuple[dict, dict]:
        """As in transformers. Every layout is translated on purpose, so its `model_type` is no cause for a warning."""
        config_dict, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        if not config_dict:
            raise OSError(
                f"{pretrained_model_name_or_path} has no config.json; pass the folder or repository of a draft."
            )
        foreign = {"foreign_model_type": config_dict.get("model_type")}
        return config_dict | foreign | {"model_type": cls.model_type}, kwargs

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Build from a config.json of any published layout.

        Keywords that name a field (`block_size=8`, `rope_theta=1e6`) replace what the file says, or lacks.

        Raises:
            ValueError: something is missing (the message names the keyword that supplies it), contradicts itself
                (both places are named), holds what it cannot, is not known (inside dflash_config), or needs a feature
                that this model does not have.
        """
        names = {*cls.__dataclass_fields__, "rope_theta"} - {"dtype"}
        given = {name: kwargs.pop(name) for name in list(kwargs) if name in names}
        for name in ("torch_dtype", "dtype"):
            dtype = kwargs.pop(name, None)
            if dtype is not None and not (isinstance(dtype, str) and dtype == "auto"):
                check_field(name, dtype, kind=FIELDS["dtype"])
                given["dtype"] = dtype
        return super().from_dict(
            EXTENSIONS.read_layout(config_dict, given, cls.model_type), **kwargs
        )

    # Writing ---------------------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """The hub layout: the typed fields, and the version of dflash-hub that wrote them."""
        return super().to_dict() | {"dflash_hub_version": __version__}

    def save_pretrained(
        self, save_directory: Any, push_to_hub: bool = False, layout: str = "hub", **kwargs: Any
    ):
        """Write config.json in the hub layout, or with `layout="engines"` in the one that serving engines load."""
        if check_layout(layout) == "engines":
            if push_to_hub:
                raise ValueError(
                    "A config alone is not pushed in the engines layout; push the draft: draft.push_to_hub()."
                )
            content = engines_layout(self)
            Path(save_directory).mkdir(parents=True, exist_ok=True)
            text = json.dumps(content, indent=2, sort_keys=True) + "\n"
            (Path(save_directory) / "config.json").write_text(text, encoding="utf-8")
        else:
            super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)

    def __eq__(self, other: object) -> bool:
        """Two configs are equal when they describe the same draft, wherever each was read from."""
        return getattr(other, "model_type", None) == self.model_type and _content(self) == _content(
            other
        )


def check_layout(layout: str) -> str:
    """`layout`, or a ValueError that names the two there are."""
    if layout not in ("hub", "engines"):
        raise ValueError(f"layout is {layout!r}; it must be 'hub' (the default) or 'engines'.")
    return layout


def _content(config: Any) -> dict[str, Any]:
    """What a config says of its draft, without what saving and loading leave on it."""
    bookkeeping = ("transformers_version", "dflash_hub_version", "auto_map", "_name_or_path")
    return {name: value for name, value in config.to_dict().items() if name not in bookkeeping}
