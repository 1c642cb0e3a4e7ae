# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Collect what `generate` returns besides the text: scores, logits, hidden states and attentions of every step.

This file travels with every pushed draft. Hidden states and attentions come from the forwards of blocks. They are cut
into the steps of plain `generate`: one for the prompt, then one for each committed token but the last.

Shapes: B rows, P prompt slots, Q block positions, T slots so far, V vocabulary, H heads, D hidden size.
"""

import torch

from .acceptance_dflash import Accepted
from .compat_dflash import difference
from .target_dflash import LAYER_OUTPUTS, TargetOutput

LayerValues = tuple[torch.Tensor, ...]
"""One tensor for each layer."""


class StepOutputs:
    """Collect what the dict of `generate` holds for every committed token, for those who asked for it.

    Args:
        names: of "scores", "logits" and `LAYER_OUTPUTS`, those to collect.
        windows: the sliding window of each of the target's layers, None where it sees everything.
    """

    def __init__(self, names: tuple[str, ...], rows: int, windows: list[int | None]):
        self.collected: dict[str, list[list[torch.Tensor]]] = {}
        self.whole_steps: dict[str, list[torch.Tensor]] = {}
        """`[B, V]` for each step, where acceptance goes step by step."""
        self.layers: dict[str, list[list[LayerValues]]] = {}
        self.windows = windows
        for name in names:
            if name in LAYER_OUTPUTS:
                self.layers[name] = [[] for _ in range(rows)]
            else:
                self.collected[name] = [[] for _ in range(rows)]
                self.whole_steps[name] = []

    def collect(self, scores: torch.Tensor, logits: torch.Tensor, counts: list[int]) -> None:
        """Append the first `counts[row]` positions of each row of `scores, logits [B, Q, V]`, if collected."""
        for name, values in (("scores", scores), ("logits", logits)):
            for row, collected in enumerate(self.collected.get(name, [])):
                committed = values[row, : counts[row]].to(torch.float32, copy=True)
                collected.extend(committed.unbind())

    def collect_step(self, scores: torch.Tensor, logits: torch.Tensor) -> None:
        """Append a step of the whole batch, `scores, logits [B, V]`, if collected."""
        for name, values in (("scores", scores), ("logits", logits)):
            if name in self.whole_steps:
                self.whole_steps[name].append(values)

    def steps(self, name: str) -> tuple[torch.Tensor, ...] | None:
        """Return what `collect_step` collected; None if it is not collected."""
        return tuple(self.whole_steps[name]) if name in self.whole_steps else None

    def per_step(self, name: str, longest: int) -> tuple[torch.Tensor, ...] | None:
        """Return `[B, V]` for each of the `longest` new slots, zeros where a row had ended; None if not collected."""
        if name not in self.collected or self.whole_steps[name]:
            return self.steps(name)
        rows = self.collected[name]
        reference = max(rows, key=len)
        steps = []
        for step in range(min(len(reference), longest)):
            empty = torch.zeros_like(reference[step])
            steps.append(empty.repeat(len(rows), 1))
            for row, collected in enumerate(rows):
                if step < len(collected):
                    steps[-1][row] = collected[step]
        return tuple(steps)

    def collect_prompt(self, output: TargetOutput, first: int, width: int) -> None:
        """Append the hidden states and attentions of a prompt's slots from `first` to before `width`, if collected.

        Hidden states are `[B, N, D]`, attentions `[B, H, N, width or more]`; a sliding layer shows what it had cached
        before `first` and the new slots.
        """
        for name, rows in self.layers.items():
            layers = getattr(output, name)
            if name == "attentions" and first > 0:
                layers = [
                    layer[..., _first_cached(window, first) : width]
                    for layer, window in zip(layers, self.windows, strict=bool(layers))
                ]
            for row, steps in enumerate(rows):
                steps.append(tuple(layer[row : row + 1] for layer in layers))

    def collect_layers(self, output: TargetOutput, accepted: Accepted, slots: torch.Tensor) -> None:
        """Append the hidden states and attentions of a block's committed positions, if collected.

        Args:
            output: of a block, hidden states `[B, Q, D]` and attentions `[B, H, Q, T or more]`.
            slots `[B]`: of each row's anchor.
        """
        for name, rows in self.layers.items():
            for row, steps in enumerate(rows):
                path = accepted.path[row, : accepted.committed[row]]
                values = getattr(output, name)
                if name == "hidden_states":
                    steps += _hidden_steps(values, row, path)
                else:
                    steps += self._attention_steps(values, row, path, int(slots[row]))

    def _attention_steps(
        self, layers: LayerValues, row: int, path: torch.Tensor, anchor: int
    ) -> list[LayerValues]:
        """Cut attentions `[B, H, Q, T or more]` of one row into steps: `[1, H, 1, T]` for each position of `path`.

        A sliding layer shows the slots of its window only.
        """
        if not layers:  # an attention function that gives no weights
            return [()] * len(path)
        if len(layers) != len(self.windows):
            raise difference(
                f"The target gave attentions of {len(layers)} layers where {len(self.windows)} have attention"
            )
        context = torch.arange(anchor, device=path.device)
        slots = torch.cat([context, anchor + path])
        steps = []
        for depth, position in enumerate(path.tolist()):
            seen = slots[: anchor + depth + 1]
            step = []
            for layer, window in zip(layers, self.windows, strict=True):
                shown = seen if window is None else seen[-window:]
                own = layer[row : row + 1]
                weights = own[:, :, position : position + 1]
                step.append(weights[..., shown.to(layer.device)])
            steps.append(tuple(step))
        return steps

    def layers_per_step(self, name: str) -> tuple[LayerValues, ...] | None:
        """Return for each step one `[B, ...]` for each layer; None if not collected."""
        if name not in self.layers:
            return None
        steps = []
        for rows in zip(*self.layers[name], strict=False):
            merged = []
            for values in zip(*rows, strict=True):
                merged.append(torch.cat(values))
            steps.append(tuple(merged))
        return tuple(steps)


def _first_cached(window: int | None, first: int) -> int:
    """Return the first slot that a layer holds of those before `first`."""
    return 0 if window is None else max(0, first - window + 1)


def _hidden_steps(layers: LayerValues, row: int, path: torch.Tensor) -> list[LayerValues]:
    """Cut hidden states `[B, Q, D]` of one row into steps: `[1, 1, D]` for each position of `path`."""
    steps = []
    for position in path.tolist():
        values = []
        for layer in layers:
            own = layer[row : row + 1]
            values.append(own[:, position : position + 1].clone())
        steps.append(tuple(values))
    return steps
