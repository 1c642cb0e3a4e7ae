# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Define the config of a Domino draft, which corrects the logits of a block by the tokens chosen before.

This file travels with every pushed Domino draft. Source: Domino (arXiv 2605.29707).
"""

from collections.abc import Iterator

from .configuration_dflash import DFlashConfig
from .findings_dflash import Finding, must


class DominoConfig(DFlashConfig):
    """Configure a Domino draft model. It requires `vocab_size`, and adds these fields to `DFlashConfig`.

    Args:
        emb_dim: width between the two matrices of the correction.
        gru_hidden_dim: width of the state that reads the tokens chosen so far.
        pure_draft_prefix_len: drafted tokens at the beginning of a block whose logits are not corrected.
        sample_from_anchor: as in `DFlashConfig`, but True by default; Domino's own name for it is `shift_label`.
    """

    model_type = "domino"
    architecture = "DominoDraftModel"
    has_usual_head = False

    emb_dim: int = 256
    gru_hidden_dim: int = 1024
    pure_draft_prefix_len: int = 1
    sample_from_anchor: bool = True

    def consistency_findings(self) -> Iterator[Finding]:
        """Yield every contradiction between fields that are valid alone."""
        vocab, reduced = self.vocab_size, self.draft_vocab_size
        if vocab is None:
            right = "the target's, because a Domino draft corrects the logits of its tokens"
            yield must("vocab_size is None", None, right)
        elif reduced is not None:
            right = f"vocab_size, {vocab}, because the logits of all tokens are corrected"
            yield must(f"draft_vocab_size is {reduced}", reduced, right)
        yield from super().consistency_findings()

    @property
    def engines_remarks(self) -> list[str]:
        """What engines compute otherwise than here, a sentence each."""
        remarks = [
            "Of the serving engines, SGLang (0.5.20 or newer) runs Domino drafts; vLLM and llama.cpp cannot load them."
        ]
        if self.sample_from_anchor:
            remarks.append(
                f"sample_from_anchor (shift_label) is True: SGLang (0.5.23) drafts {self.block_size - 1} tokens per "
                f"cycle, and not {self.num_drafted} as here."
            )
        if self.pure_draft_prefix_len != 1:
            remarks.append(
                f"pure_draft_prefix_len is {self.pure_draft_prefix_len}, but SGLang (0.5.23) computes with 1: it "
                "proposes other tokens there, of which fewer are accepted."
            )
        return remarks
