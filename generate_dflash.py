# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Make the callable that a target's `generate` takes: `target.generate(..., custom_generate=draft.speculate)`.

This file travels with every pushed draft. `generate` prepares everything as for plain decoding. Options that have no
meaning with a draft are refused (`support_dflash`).

Shapes: B rows, P prompt tokens, T tokens of the longest text, V vocabulary.
"""

import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
)
from transformers.cache_utils import Cache
from transformers.generation import GenerateDecoderOnlyOutput
from transformers.utils import ModelOutput

from .acceptance_dflash import (
    Acceptance,
    BlockAcceptance,
    StepwiseAcceptance,
    foreign_objects,
)
from .adaptive_dflash import AutoProposer, mode_of_costs
from .calls_dflash import Signature, also_for_users, check_ids, check_loaded
from .compat_dflash import (
    arrangement,
    attention_name,
    cache_field,
    is_offloaded,
    local_of_generate,
    padding_token,
)
from .drafter_dflash import Drafter
from .execution_dflash import CAPTURE, resolve_mode, turns
from .findings_dflash import raise_first
from .generation_dflash import DecodeState, DecodeStatistics, Recorder, decode, prefill
from .layouts_dflash import shown
from .lookup_dflash import LookupProposer
from .outputs_dflash import StepOutputs
from .past_key_values_dflash import (
    cache_findings,
    export_past_key_values,
    import_past_key_values,
    lay_out,
)
from .proposals_dflash import ChainProposer, PlainProposer, Proposer, TreeProposer
from .sampling_dflash import PositionNoise, Sampler
from .selfcheck_dflash import check_alone, circumstances
from .sequences_dflash import UNLIMITED, Prompt, Sequences, StopConditions
from .support_dflash import (
    IGNORED,
    base_model,
    check_arguments,
    check_options,
    check_target,
    draft_findings,
    warn_of_length,
    warn_of_new_family,
)
from .target_dflash import (
    LAYER_OUTPUTS,
    Target,
    TargetState,
    attention_windows,
    is_recurrent,
)

DRAFT_SAMPLING = ("greedy", "coupled")
PROPOSALS = ("auto", "chain", "tree", "lookup", "plain")
WITHOUT_WIDTH = ("auto", "plain")
STATISTICS = (
    "add_cycle",
    *("prefill_seconds", "draft_seconds", "verify_seconds", "rest_seconds", "rollback_seconds"),
)
PROPOSER = ("append_context", "propose", "commit")

CHECKED_SIZE = 16
"""Positions of the blocks with which a target is checked that decodes without a draft."""

CHECKED: weakref.WeakKeyDictionary[Any, set] = weakref.WeakKeyDictionary()
"""For each target, what a self-check has passed for, see `DecoderSession`: no other draft repeats it."""

ProposerFactory = Callable[[Any], Proposer]
"""Makes the proposer of a decode from the draft's own, a `ChainProposer`; without a draft, from a `LookupProposer`."""


def own_proposer(own: Proposer) -> Proposer:
    """Return the draft's own proposer."""
    return own


@dataclass(frozen=True)
class SpeculateOptions:
    """Hold what a call asks of the draft; `SpeculativeGenerate` explains the names."""

    draft_sampling: str
    capture: str
    proposal: str
    width: int | None
    proposer: ProposerFactory | None

    def check(self) -> None:
        """Refuse values that keywords of these names cannot have, and those that contradict each other.

        Raises:
            ValueError: naming the keyword.
        """
        _check_choice("draft_sampling", self.draft_sampling, DRAFT_SAMPLING)
        _check_choice("capture", self.capture, CAPTURE)
        _check_function("proposer", self.proposer, "a function of the draft's proposer")
        _check_proposal(self.proposal, self.width, self.proposer)

    def sampler(self, processors: LogitsProcessorList, config: GenerationConfig) -> Sampler:
        """Return what chooses the target's tokens, and the draft's."""
        noise = PositionNoise() if config.do_sample else None
        return Sampler(processors, noise, coupled=self.draft_sampling == "coupled")

    def mode(self, model: Any, new_tokens: int) -> str:
        """Return how the blocks of a text of at most so many new tokens run."""
        # Another's proposer may propose other sizes in every cycle, and a recording of each costs more than it saves.
        repeated = 0 if self.proposer else new_tokens
        return resolve_mode(self.capture, model, is_recurrent(model), repeated)


class SpeculativeGenerate:
    """Make a draft the decoding function of its target's `generate`.

    Besides all that `generate` takes, it takes seven keywords, none of which changes the text:

    statistics: a `DecodeStatistics` to fill.
    proposal: what a cycle verifies. "auto" chooses in every cycle what brings the most tokens per second. That is a
        tree, the chain or a part of it, what followed the same tokens before, or nothing. "chain", "tree", "lookup" and
        "plain" ask for one of these.
    width: how many tokens of a chain, a tree or a look-up are verified, at most.
    draft_sampling: how the draft chooses tokens when text is sampled. "coupled": with the same noise as the target.
        "greedy": always the likeliest, which are accepted less often.
    capture: how blocks run. "auto" records those of dense targets on a GPU. On a CPU it records where the text is long
        enough, with `proposal="auto"` those that come often; elsewhere it is eager. "graphs" and
        "compile" (torch.compile, with a warm-up of about 30 s) ask for one; "eager" is neither.
    strict: refuse a target whose family the tests do not decode. Otherwise its self-check decides.
    proposer: a function that is called with the draft's `ChainProposer` and returns the `Proposer` to decode with.
    """

    def __init__(self, draft: Any):
        self.draft = draft
        self.compiled_session: DecoderSession | None = None
        """The last session, if it was compiled: the next decode can use the compiled code."""
        self.experiences: weakref.WeakKeyDictionary[Any, dict] = weakref.WeakKeyDictionary()
        """For each target, what decoding has shown, see `AutoProposer`."""
        self.statistics = DecodeStatistics()
        """Of the last call: counts alone, unless it was given `statistics=` to fill."""

    def __reduce__(self) -> tuple:
        return SpeculativeGenerate, (self.draft,)

    def check_target(self, model: Any, strict: bool) -> None:
        """Refuse a target that this draft does not fit, or that cannot be decoded exactly."""
        check_compatible(self.draft.config, model, strict)

    def session(self, model: Any) -> "DecoderSession":
        """Return a session for this target, the compiled one where it still fits."""
        with turns(*_present(self.draft, model)):
            session = self.compiled_session
            if (
                session is not None
                and session.target.model is model
                and session.key == session_key(self.draft, model)
            ):
                return session
            return DecoderSession(self.draft, model)

    def proposer_factory(
        self, model: Any, mode: str, proposal: str, width: int | None
    ) -> ProposerFactory:
        """Return what makes the proposer that was asked for.

        Raises:
            ValueError: it needs a draft, and there is none.
        """
        if self.draft is None and proposal in ("chain", "tree"):
            raise ValueError(
                f"proposal is {proposal!r}, which a draft makes; without one, it must be auto, lookup or plain."
            )
        if proposal == "plain":
            return lambda own: PlainProposer()
        if proposal == "lookup" or self.draft is None:
            return lambda own: LookupProposer(width)
        if proposal == "tree" and width is not None:
            return partial(_fixed_tree, width=width)
        # What is compiled takes half a minute for each size of a block.
        if proposal == "chain" or mode == "compile":
            return partial(_chain, width=width)
        known = self.experiences.setdefault(model, {})
        if proposal == "tree":
            return lambda own: AutoProposer(own, known, mode, ("tree",), measured_from=0)
        return lambda own: AutoProposer(own, known, mode)

    @also_for_users
    def __call__(
        self,
        model: Any,
        input_ids: torch.Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        streamer: Any = None,
        tokenizer: Any = None,
        statistics: DecodeStatistics | None = None,
        draft_sampling: str = "coupled",
        capture: str = "auto",
        strict: bool = False,
        proposal: str = "auto",
        width: int | None = None,
        proposer: ProposerFactory | None = None,
        **inputs: Any,
    ) -> torch.Tensor | ModelOutput:
        """Decode `input_ids [B, P]`. `generate` reads the names of these arguments, `tokenizer` among them.

        Called by users, `draft.speculate(target, input_ids, max_new_tokens=64)` is `target.generate` with this draft.

        Returns:
            What `generate` returns: `[B, T]`, or a dict with `sequences`.

        Raises:
            ValueError: the draft does not fit the target, the target cannot be decoded exactly, or an option has no
                meaning with a draft.
        """
        frame = sys._getframe(1)
        config = generation_config
        options = SpeculateOptions(draft_sampling, capture, proposal, width, proposer)
        _check_choice("strict", strict, (True, False))
        self.check_target(model, strict)
        self._check_call(frame, model, input_ids, config, inputs)
        _check_object("statistics", statistics, STATISTICS, "a DecodeStatistics()")
        options.check()
        names = _requested_outputs(config)
        prompt = _laid_out(model, input_ids, inputs, config)
        sampler = options.sampler(logits_processor, config)
        padding = padding_token(config)
        found = choose_acceptance(sampler, stopping_criteria, input_ids, padding, names)
        acceptance, stop_conditions = found
        streamer = streamer or local_of_generate("streamer", frame)
        mode = options.mode(model, config.max_length - input_ids.shape[1])
        request = DecodeRequest(
            prompt,
            Sequences(input_ids, stop_conditions, padding, streamer),
            acceptance,
            _step_outputs(model, names, len(input_ids)),
            mode,
            proposer or self.proposer_factory(model, mode, proposal, width),
        )
        session, counted = self._begin(model, mode, statistics)
        cache = session.decode(request, counted, is_timing=statistics is not None)
        self._add_plain_seconds(model, request)
        return request.output(cache) if config.return_dict_in_generate else request.output_ids()

    __signature__ = Signature(__call__)

    def _check_call(
        self,
        frame: Any,
        model: Any,
        input_ids: torch.Tensor,
        config: GenerationConfig,
        inputs: dict[str, Any],
    ) -> None:
        """Refuse what a call asks of `generate` that has no meaning with a draft.

        Args:
            frame: of the caller, that of `generate`.
            input_ids `[B, P]`.
        """
        asked = {name: local_of_generate(name, frame) for name in IGNORED}
        check_arguments(self.draft, asked, local_of_generate("kwargs", frame) or {})
        check_options(model, config, input_ids, inputs)

    def _begin(
        self, model: Any, mode: str, statistics: DecodeStatistics | None
    ) -> tuple["DecoderSession", DecodeStatistics]:
        """Return the session to decode in, and the statistics to fill."""
        session = self.session(model)
        self.compiled_session = session if mode == "compile" else None
        self.statistics = DecodeStatistics() if statistics is None else statistics
        return session, self.statistics

    def _add_plain_seconds(self, model: Any, request: "DecodeRequest") -> None:
        """Add to the statistics what a plain step is known to take."""
        mode = mode_of_costs(request.mode, request.prompt.device)
        experiences = self.experiences.get(model, {})
        known = experiences.get((len(request.prompt.input_ids), mode))
        if known is not None:
            self.statistics.plain_seconds = known.cycle_seconds("plain", 0)


class LookupGenerate(SpeculativeGenerate):
    """Decode without a draft: tokens are proposed that followed the same tokens before, in the prompt or the text.

    It takes the keywords of `SpeculativeGenerate`; there is no draft that `draft_sampling` could tell how to choose.
    Code that `capture="compile"` compiled stays with it, and with the target, until its next call.
    """

    def __init__(self) -> None:
        super().__init__(None)

    def __reduce__(self) -> tuple:
        return LookupGenerate, ()

    def check_target(self, model: Any, strict: bool) -> None:
        check_target(model, strict)


lookup_generate = LookupGenerate()
"""Decoding function for `target.generate(**inputs, custom_generate=lookup_generate)`, without any draft.

Raises:
    ValueError: the target cannot be decoded exactly, or an option has no meaning here.
"""


def _chain(own: ChainProposer, width: int | None) -> ChainProposer:
    return ChainProposer(own.drafter, own.draft_state, own.sampler, width)


def _fixed_tree(own: ChainProposer, width: int) -> Proposer:
    return TreeProposer(own.drafter, own.draft_state, own.sampler, width)


def choose_acceptance(
    sampler: Sampler,
    criteria: StoppingCriteriaList,
    input_ids: torch.Tensor,
    pad_token_id: int,
    names: tuple[str, ...],
) -> tuple[Acceptance, StopConditions]:
    """Return how tokens are accepted, and what else ends a row.

    Tokens are accepted by block, or step by step where an object or an output needs it. Then all criteria are asked in
    these steps, and of the stop conditions the length alone is left. Outputs of several rows need it: those of a row
    that has ended are the outputs of its padding.

    Args:
        input_ids `[B, P]`.
        names: of the outputs that are returned for every step.
    """
    pads_ended_rows = any(hasattr(one, "eos_token_id") for one in criteria)
    reasons = foreign_objects(sampler.processors, criteria)
    if pads_ended_rows and len(input_ids) > 1:
        reasons += [f"output_{name}" for name in names]
    stop_conditions = StopConditions.from_criteria(criteria)
    if not reasons:
        return BlockAcceptance(sampler), stop_conditions
    padding = pad_token_id if pads_ended_rows else None
    acceptance = StepwiseAcceptance(sampler, criteria, input_ids, padding, reasons)
    return acceptance, StopConditions(stop_conditions.max_length, are_all=False)


def _step_outputs(model: Any, names: tuple[str, ...], rows: int) -> StepOutputs:
    """Return what collects these outputs; the windows, whose reading makes a cache, are for attentions alone."""
    return StepOutputs(names, rows, attention_windows(model) if "attentions" in names else [])


@dataclass
class DecodeRequest:
    """Hold one decode, as it was asked for.

    Args:
        mode: "eager", "graphs" or "compile".
        proposer: makes the proposer from the draft's own, or from that of look-ups.
    """

    prompt: Prompt
    sequences: Sequences
    acceptance: Acceptance
    step_outputs: StepOutputs
    mode: str
    proposer: ProposerFactory = own_proposer

    def state(self, target: Target, target_state: TargetState) -> DecodeState:
        """Return the state of this decode, before the prefill."""
        return DecodeState(
            target, target_state, self.prompt, self.sequences, self.acceptance, self.step_outputs
        )

    @property
    def last_slot(self) -> torch.Tensor | None:
        """The slot of the last token that plain decoding would feed, a tensor; None if nothing limits the length."""
        limit = self.sequences.stop_conditions.max_length
        if limit >= UNLIMITED:
            return None
        last = self.prompt.first_id_slot + limit - 2
        return torch.tensor(max(last, self.prompt.width - 1), device=self.prompt.device)

    def output_ids(self) -> torch.Tensor:
        """Return prompts and generated tokens, `[B, T]`."""
        text = self.acceptance.input_ids
        return self.sequences.output_ids() if text is None else text

    def output(self, cache: Cache | None) -> ModelOutput:
        """Return the dict that `generate` returns."""
        longest = self.sequences.longest
        return GenerateDecoderOnlyOutput(
            sequences=self.output_ids(),
            scores=self.step_outputs.per_step("scores", longest),
            logits=self.step_outputs.per_step("logits", longest),
            hidden_states=self.step_outputs.layers_per_step("hidden_states"),
            attentions=self.step_outputs.layers_per_step("attentions"),
            **{cache_field(GenerateDecoderOnlyOutput): cache},
        )


class DecoderSession:
    """Hold a target and a draft that decode together; or a target alone, whose tokens are looked up.

    Args:
        draft: None for none.

    Raises:
        ValueError: the draft has no weights in place.
    """

    def __init__(self, draft: Any, model: Any):
        if draft is not None and is_offloaded(draft):
            raise ValueError(
                "Weights of the draft are on the meta device; it runs in every cycle, so load it onto one device."
            )
        self.checked = CHECKED.setdefault(model, set())
        taps = () if draft is None else tuple(draft.config.target_layer_ids)
        self.target = Target(model, taps)
        self.drafter = None if draft is None else Drafter(draft, model)
        self.models = _present(draft, model)
        """The draft, where there is one, and the target."""
        self.key = session_key(draft, model)
        self.check_key = (*self.key[-2:], taps)  # of the key what is the target's

    def decode(
        self,
        request: DecodeRequest,
        statistics: DecodeStatistics,
        is_timing: bool = False,
    ) -> Cache | None:
        """Decode to the end, in turns with others of this target or draft; both are left as they were found.

        Args:
            statistics: to fill.
            is_timing: whether with times too, for which a GPU has to be waited for.

        Returns:
            The cache to return, if one was asked for.
        """
        prompt, target = request.prompt, self.target
        device = prompt.device if self.drafter is None else self.drafter.draft.device
        recorder = Recorder(statistics, device, is_timing)
        recorder.record_stepwise(request.acceptance.reasons)
        raise_first(cache_findings(prompt, target, request.sequences.stop_conditions))
        with turns(*self.models):
            self._check_alone(prompt)
            with (
                target.decoding(prompt, request.mode, request.last_slot) as target_state,
                self._drafting(request) as chain,
            ):
                state = request.state(target, target_state)
                proposer = request.proposer(chain or LookupProposer())
                _check_object("what proposer= returned", proposer, PROPOSER, "a Proposer")
                with recorder.phase("prefill"):
                    first_slot = import_past_key_values(prompt.cache, target_state, chain)
                    check_size = self._prompt_check_size(target_state, prompt)
                    checked = prefill(state, proposer, first_slot, check_size)
                decode(state, proposer, recorder)
                cache = export_past_key_values(state, chain)
            if checked:
                self.checked.add(self._circumstances(prompt))
        if request.sequences.streamer is not None:
            request.sequences.streamer.end()
        return cache

    @contextmanager
    def _drafting(self, request: DecodeRequest) -> Iterator[ChainProposer | None]:
        """Make the draft's own proposer for one decode; None without a draft."""
        if self.drafter is None:
            yield None
            return
        with self.drafter.decoding(request.prompt.padding_mask, request.mode) as draft_state:
            yield ChainProposer(self.drafter, draft_state, request.acceptance.sampler)

    @property
    def checked_size(self) -> int:
        """Positions of the blocks with which the target is checked."""
        return CHECKED_SIZE if self.drafter is None else self.drafter.verified_size

    def _prompt_check_size(self, target_state: TargetState, prompt: Prompt) -> int:
        """Return the block with which the end of the prompt is checked; 0 if that is done, or has no meaning."""
        if target_state.recurrent.states or self._circumstances(prompt) in self.checked:
            return 0
        return self.checked_size

    def _check_alone(self, prompt: Prompt) -> None:
        """Check the block path on a short text, unless that was done for such prompts."""
        alone = ("alone", *self._circumstances(prompt)[:-1])
        if alone not in self.checked:
            check_alone(self.target, self.checked_size, prompt)
            self.checked.add(alone)
            warn_of_new_family(self.target.model)

    def _circumstances(self, prompt: Prompt) -> tuple:
        """Return what a check of `prompt` holds for, with any draft of these taps and this size; its windows last."""
        return (*self.check_key, self.checked_size, *circumstances(self.target, prompt))


def session_key(draft: Any, model: Any) -> tuple:
    """Return what a session was made for, and may have changed since; `draft` may be None."""
    found = []
    for one in _present(draft, model):
        found.append(
            (one.dtype, one.device, attention_name(one.config.get_text_config(decoder=True)))
        )
    return (*found, arrangement(model))


def _present(*models: Any) -> list[Any]:
    """Return these models without None, which stands for no draft."""
    return [model for model in models if model is not None]


def _check_proposal(proposal: Any, width: Any, proposer: Any) -> None:
    """Refuse a kind of proposals that is not known, and a width or a proposer that has no meaning beside it."""
    _check_choice("proposal", proposal, PROPOSALS)
    if proposer is not None and (proposal != "auto" or width is not None):
        raise ValueError(
            "proposer= proposes in place of proposal= and width=; pass one or the others."
        )
    if width is None:
        return
    if not isinstance(width, int) or isinstance(width, bool) or width < 1:
        raise ValueError(f"width is {shown(width)}; it must be a number of tokens, 1 or more.")
    if proposal in WITHOUT_WIDTH:
        raise ValueError(
            f"width is {width}, but proposal={proposal!r} has no width to set; "
            "pass proposal='chain', 'tree' or 'lookup'."
        )


def _check_choice(name: str, value: Any, known: tuple) -> None:
    if type(value) is not type(known[0]) or value not in known:
        choices = ", ".join(map(str, known))
        raise ValueError(f"{name} is {shown(value)}; it must be one of {choices}.")


def _check_object(name: str, value: Any, members: tuple[str, ...], expected: str) -> None:
    """Refuse what lacks the members by which it is used, and a class in the place of an object."""
    if value is None:
        return
    if isinstance(value, type):
        raise ValueError(f"{name} is the class {value.__name__}; pass an object: {expected}.")
    for member in members:
        if not hasattr(value, member):
            raise ValueError(f"{name} is {shown(value)}; it must be {expected}.")


def _check_function(name: str, value: Any, expected: str) -> None:
    if value is not None and not callable(value):
        raise ValueError(f"{name} is {shown(value)}; it must be {expected}.")


def _laid_out(
    model: Any, input_ids: torch.Tensor, inputs: dict[str, Any], config: GenerationConfig
) -> Prompt:
    """Return the prompt `input_ids [B, P]` by slot; warn of a text that may become too long for the target."""
    layer_outputs = tuple(name for name in _requested_outputs(config) if name in LAYER_OUTPUTS)
    inputs = lay_out(input_ids, inputs, config)
    prompt = Prompt(input_ids, inputs, config.return_dict_in_generate, layer_outputs)
    warn_of_length(model, prompt.width + config.max_length - input_ids.shape[1])
    return prompt


def _requested_outputs(config: GenerationConfig) -> tuple[str, ...]:
    """Return what a returned dict is to hold for every token."""
    if not config.return_dict_in_generate:
        return ()
    asked = {
        "scores": config.output_scores,
        "logits": config.output_logits,
        "hidden_states": config.output_hidden_states,
        "attentions": config.output_attentions,
    }
    return tuple(name for name, wanted in asked.items() if wanted)


def check_compatible(config: Any, target: Any, strict: bool = False) -> None:
    """Refuse a target that a draft with this config was not made for, or that no draft can decode.

    Args:
        config: the draft's.

    Raises:
        ValueError: with both numbers.
    """
    raise_first(draft_findings(config, target, strict))


def spec_generate(
    self: Any,
    target: Any,
    input_ids: torch.Tensor,
    max_new_tokens: int = 256,
    stop_token_ids: list[int] | int | None = None,
    temperature: float = 0.0,
) -> torch.Tensor:
    """Generate with `target`, sped up by this draft; the same call as z-lab/dflash's.

    It ignores the target's own generation config: no penalties, no top-k. `target.generate(...,
    custom_generate=draft.speculate)` honours it.

    Args:
        target: a causal language model of transformers.
        input_ids `[B, P]`: the prompts, without padding.
        max_new_tokens: maximum number of new tokens.
        stop_token_ids: a text ends right after the first of these; None to use the whole budget.
        temperature: 0 for exactly the target's greedy text; above, exactly its distribution.

    Returns:
        `[B, T]`: prompts and new tokens.

    Raises:
        ValueError: the target does not fit this draft, cannot be decoded exactly, or an argument is out of range.
    """
    _check_arguments(target, input_ids, max_new_tokens, temperature)
    ends = frozenset(_token_ids(stop_token_ids))
    check_compatible(self.config, target)
    target = base_model(target)
    if max_new_tokens == 0:
        return input_ids
    warn_of_length(target, input_ids.shape[1] + max_new_tokens)
    sampled = temperature > 0
    warpers = LogitsProcessorList([TemperatureLogitsWarper(float(temperature))] if sampled else [])
    request = DecodeRequest(
        Prompt(input_ids, {"attention_mask": torch.ones_like(input_ids), "use_cache": True}),
        Sequences(
            input_ids,
            StopConditions(input_ids.shape[1] + max_new_tokens, ends, pads_ended_rows=True),
        ),
        BlockAcceptance(Sampler(warpers, PositionNoise() if sampled else None)),
        StepOutputs((), len(input_ids), []),
        resolve_mode("auto", target, is_recurrent(target), max_new_tokens),
    )
    with torch.no_grad():
        self.speculate.statistics = DecodeStatistics()
        self.speculate.session(target).decode(request, self.speculate.statistics)
    return request.sequences.output_ids()


def _token_ids(tokens: Any) -> tuple[int, ...]:
    """Return one id, several, a tensor of them, or None, as a tuple."""
    if tokens is None:
        return ()
    found = tokens.flatten().tolist() if isinstance(tokens, torch.Tensor) else tokens
    found = [found] if isinstance(found, int) else found
    if isinstance(found, str) or not all(isinstance(token, int) for token in found):
        raise ValueError(
            f"stop_token_ids is {tokens!r}; it must be token ids, such as [tokenizer.eos_token_id]."
        )
    return tuple(found)


def _check_arguments(
    target: Any, input_ids: torch.Tensor, max_new_tokens: int, temperature: float
) -> None:
    check_loaded("target", target)
    check_ids(input_ids)
    rows = target.get_input_embeddings().weight.shape[0]
    if input_ids.min() < 0 or input_ids.max() >= rows:
        raise ValueError(
            f"input_ids has ids from {input_ids.min()} to {input_ids.max()}; the target has {rows} tokens. Use its own "
            "tokenizer."
        )
    if not isinstance(max_new_tokens, int) or max_new_tokens < 0:
        raise ValueError(f"max_new_tokens is {max_new_tokens!r}; it must be an int, 0 or more.")
    if not isinstance(temperature, int | float) or not (
        temperature == 0 or 1e-5 <= temperature < float("inf")
    ):
        raise ValueError(
            f"temperature is {temperature}; it must be 0 (greedy) or a number from 1e-5 up."
        )
