# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Define the config of a DFlash 2 draft, which adds convolutions around every sublayer and a selector of paths.

This file travels with every pushed DFlash 2 draft. Source: DFlash 2 (inco.ai/blog/dflash2) and z-lab/dflash.
"""

from collections.abc import Iterator

from .configuration_dflash import DFlashConfig
from .findings_dflash import Finding, must


class DFlash2Config(DFlashConfig):
    """Configure a DFlash 2 draft model. It requires `vocab_size`, and adds these fields to `DFlashConfig`.

    Args:
        conv_kernel_size: positions of the block that a convolution reads: the position itself and those before it.
        conv_group_size: channels that share one correction of the convolution kernel; divides `hidden_size`.
        selector_rank: width of the selector's codebooks.
        selector_top_k: candidates that the selector chooses from at each position.
        output_multiplier: factor of the logits, before their soft cap.
        final_logit_softcapping: soft cap of the logits; 0 or None for none.
        input_embedding_scale: factor of the target's embeddings.
    """

    model_type = "dflash2"
    architecture = "DFlash2DraftModel"

    conv_kernel_size: int = 2
    conv_group_size: int = 16
    selector_rank: int = 256
    selector_top_k: int = 16
    output_multiplier: float | int = 1.0
    input_embedding_scale: float | int = 1.0

    def consistency_findings(self) -> Iterator[Finding]:
        """Yield every contradiction between fields that are valid alone."""
        group, top_k = self.conv_group_size, self.selector_top_k
        vocab = self.vocab_size
        if self.hidden_size % group:
            right = f"hidden_size, {self.hidden_size}"
            yield must(f"conv_group_size is {group}", group, right, "divide")
        if vocab is None:
            right = "the target's, because a DFlash 2 draft has codebooks of its tokens"
            yield must("vocab_size is None", None, right)
        elif self.draft_vocab_size is not None:
            right = (
                f"vocab_size, {vocab}, because the selector chooses among all tokens of the target"
            )
            yield must(f"draft_vocab_size is {self.draft_vocab_size}", self.draft_vocab_size, right)
        elif top_k > vocab:
            right = f"from 1 to vocab_size, {vocab}"
            yield must(f"selector_top_k is {top_k}", top_k, right)
        yield from super().consistency_findings()
