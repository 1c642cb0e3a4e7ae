# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Define the config of a DSpark draft, which adds a bias by the token before, and an estimate of acceptance.

This file travels with every pushed DSpark draft. Source: DSpark (arXiv 2607.05147) and its reference code,
deepseek-ai/DeepSpec.
"""

from collections.abc import Iterator
from typing import Any

from .configuration_dflash import DFlashConfig
from .findings_dflash import Finding, must


class DSparkConfig(DFlashConfig):
    """Configure a DSpark draft model. It adds these fields to `DFlashConfig`.

    Args:
        sample_from_anchor: as in `DFlashConfig`, but True by default: position k predicts the token at anchor + k + 1.
        markov_rank: width of the two factors of the Markov bias; 0 for none. With one, `vocab_size` is required.
        markov_head_type: "vanilla", a bias by the token before alone; "gated", by the hidden state too; or "rnn", by
            all tokens of the block so far.
        enable_confidence_head: whether the draft estimates the chance that a token is accepted.
        confidence_head_with_markov: whether it reads the token before too. By default it does where there is a bias.
    """

    model_type = "dspark"
    architecture = "DSparkDraftModel"

    sample_from_anchor: bool = True
    markov_rank: int = 256
    markov_head_type: str = "vanilla"
    enable_confidence_head: bool = False
    confidence_head_with_markov: bool | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.confidence_head_with_markov is None:
            self.confidence_head_with_markov = self.enable_confidence_head and self.markov_rank > 0
        super().__post_init__(**kwargs)

    @property
    def confidence_width(self) -> int:
        """Input width of the confidence head."""
        return self.hidden_size + (self.markov_rank if self.confidence_head_with_markov else 0)

    @property
    def engines_remarks(self) -> list[str]:
        """What engines compute otherwise than here, a sentence each."""
        remarks = []
        if not self.markov_rank:
            remarks.append("markov_rank is 0: SGLang (0.5.23) refuses such a draft.")
        elif self.markov_head_type != "vanilla":
            remarks.append(
                f"markov_head_type is {self.markov_head_type!r}: SGLang (0.5.23) runs it, "
                "vLLM (0.33) and llama.cpp run vanilla alone."
            )
        return remarks

    def consistency_findings(self) -> Iterator[Finding]:
        """Yield every contradiction between fields that are valid alone."""
        rank, head_type = self.markov_rank, self.markov_head_type
        if rank and self.vocab_size is None:
            right = f"the target's, because markov_rank is {rank}"
            yield must("vocab_size is None", None, right)
        if self.enable_confidence_head and self.confidence_head_with_markov and not rank:
            right = "above 0, because confidence_head_with_markov is True"
            yield must("markov_rank is 0", 0, right)
        if rank and head_type == "rnn" and not self.sample_from_anchor:
            right = "True for markov_head_type 'rnn', whose memory begins with the anchor"
            yield must("sample_from_anchor is False", False, right)
        yield from super().consistency_findings()
