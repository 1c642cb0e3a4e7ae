"""Training sees what decoding sees, and its loss is the plain one."""

from dataclasses import replace

import pytest
import torch
from torch.nn.functional import cross_entropy, kl_div, log_softmax

import tiny
from dflash_hub import DecodeStatistics, load_draft
from dflash_hub.drafter_dflash import Drafter
from dflash_hub.sequences_dflash import Prompt
from dflash_hub.target_dflash import Target
from dflash_hub.training import loss as loss_module
from dflash_hub.training.attention import GroupedMask, grouped_attention
from dflash_hub.training.blocks import Blocks, PackedBatch, default_gamma, draw_anchors, draw_given
from dflash_hub.training.heads import HeadInputs
from dflash_hub.training.loss import LossInputs, weighted_loss
from dflash_hub.training.metrics import Counts, Metrics
from dflash_hub.training.mix import Mix
from dflash_hub.training.objective import Objective, Recipe
from dflash_hub.training.weights import FixedWeights
from paths import TINY

SLIDING = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 7}
KINDS = {
    "full": {},
    "full and causal": {"is_causal": True},
    "sliding and causal": SLIDING,
    "sliding, not causal": SLIDING | {"is_causal": False},
    "sliding from the anchor": SLIDING | {"window_from_anchor": True},
    "sliding from the anchor, not causal": SLIDING | {"is_causal": False, "window_from_anchor": True},
    "one layer causal": {"is_causal": [True, False]},
    "dflash2": tiny.SECOND,
    "dflash2, sliding": tiny.SECOND | SLIDING | {"is_causal": False, "input_embedding_scale": 1.5},
}


def packed(*lengths: tuple[int, ...], seed: int = 0) -> PackedBatch:
    """Rows of random documents with these lengths, everything supervised."""
    width = max(map(sum, lengths))
    ids = torch.randint(0, tiny.VOCAB, (len(lengths), width), generator=torch.Generator().manual_seed(seed))
    documents = torch.zeros(len(lengths), width, dtype=torch.long)
    for row, sizes in enumerate(lengths):
        documents[row, : sum(sizes)] = torch.arange(1, len(sizes) + 1).repeat_interleave(torch.tensor(sizes))
    return PackedBatch(ids, documents > 0, documents)


@torch.no_grad()
def decoded_states(draft, target, ids: torch.Tensor, block: int) -> torch.Tensor:
    """The decode path's states `[Q, H]` of a block: its anchor is the last of `ids [1, P]`; a cache has the others."""
    seen: list[torch.Tensor] = []
    hook = draft.register_forward_hook(lambda module, inputs, output: seen.append(output.last_hidden_state[0]))
    drafter, engine = Drafter(draft, target), Target(target, tuple(draft.config.target_layer_ids))
    prompt = Prompt(ids, {})
    with (
        engine.decoding(prompt, "eager") as target_state,
        drafter.decoding(prompt.padding_mask, "eager") as draft_state,
    ):
        if ids.shape[1] > 1:
            drafter.cache_context(draft_state, engine.prefill(target_state, {"input_ids": ids[:, :-1]}).features, 0)
        slots = torch.tensor([ids.shape[1] - 1])
        drafter.draft_block(draft_state, ids[:, -1:], slots, ids.shape[1] + block)
    hook.remove()
    return seen[0]


@torch.no_grad()
def trained_states(draft, target, rows: PackedBatch, anchors: torch.Tensor) -> torch.Tensor:
    """The training forward's `[B, A, Q, H]`."""
    objective = Objective(draft.config, target, Recipe(attention="dense"))
    blocks = objective.blocks(rows, anchors)
    features = objective.target.run(rows, last_hidden_state=False).features
    return objective.states(draft, blocks, objective.noise_embeds(blocks), features).unflatten(
        1, (-1, draft.config.block_size)
    )


def assert_same_as_decoding(draft, target, rows: PackedBatch, anchors: torch.Tensor) -> float:
    """Compare every block, within 1e-5 of the largest state; how far they are apart at most."""
    trained = trained_states(draft, target, rows, anchors)
    furthest = 0.0
    for row, columns in enumerate(anchors.tolist()):
        for number, column in enumerate(columns):
            first = column - int(rows.positions[row, column])
            decoded = decoded_states(
                draft, target, rows.input_ids[row : row + 1, first : column + 1], draft.config.block_size
            )
            furthest = max(furthest, float((trained[row, number] - decoded).abs().max()))
    assert furthest < 1e-5 * max(1.0, float(trained.abs().max()))
    assert float(trained.std()) > 0.1
    return furthest


@pytest.mark.parametrize("kind", KINDS)
def test_training_and_decoding_give_the_same_states(kind):
    """Full, sliding, causal and bidirectional layers; documents alone and packed, anchors at their ends too."""
    target = tiny.target("qwen3")
    draft = tiny.draft(target, **KINDS[kind])
    rows = packed((40,), (9, 21, 10))
    anchors = torch.tensor([[0, 1, 13, 37, 39], [0, 8, 9, 25, 32]])
    assert_same_as_decoding(draft, target, rows, anchors)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_training_and_decoding_give_the_same_states_for_every_family(family):
    """Packed: recurrent layers and sliding windows of the target know nothing of the neighbours either."""
    target = tiny.target(family)
    draft = tiny.draft(target, **SLIDING)
    assert_same_as_decoding(draft, target, packed((17, 20), (5, 30)), torch.tensor([[3, 30], [4, 33]]))


def test_a_block_sees_its_own_document_before_its_anchor_and_itself():
    rows = packed((3, 4))
    mask = Blocks(rows, torch.tensor([[1, 5, -1]]), 3).dense_mask(None, False)[0, 0]
    context, blocks = mask[:, :7].int().tolist(), mask[:, 7:]
    assert context[0] == context[2] == [1, 0, 0, 0, 0, 0, 0]
    assert context[3] == [0, 0, 0, 1, 1, 0, 0]
    assert context[6] == [0] * 7
    assert torch.equal(blocks, torch.block_diag(*[torch.ones(3, 3)] * 3).bool())


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize(
    "kind", [(None, False), (None, True), (4, False), (4, True), (3, False, True), (3, True, True)]
)
def test_flex_attention_the_dense_mask_and_its_groups_give_the_same(kind):
    from torch.nn.attention.flex_attention import flex_attention

    rows = packed((30, 14), (44,))
    blocks = Blocks(rows, draw_anchors(rows, 9, 0, 0), 4)
    queries = blocks.anchors.shape[1] * 4
    torch.manual_seed(0)
    query = torch.randn(2, 2, queries, 8)
    key, value = torch.randn(2, 2, 2, 44 + queries, 8)
    dense = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=blocks.dense_mask(*kind))
    flex = flex_attention(query, key, value, block_mask=blocks.flex_mask(*kind))
    torch.testing.assert_close(flex, dense)
    grouped, _ = grouped_attention(None, query, key, value, GroupedMask.of(blocks, torch.float32, *kind))
    torch.testing.assert_close(grouped.transpose(1, 2), dense)


# The loss ------------------------------------------------------------------------------------------------------


def counted_places(rows: PackedBatch, anchors: torch.Tensor, size: int):
    """Row, number of the block, step in the block and column of every position that counts, one by one."""
    for row, columns in enumerate(anchors.tolist()):
        for number, column in enumerate(columns):
            for step in range(1, size):
                place = column + step
                if column < 0 or place >= rows.input_ids.shape[1]:
                    continue
                if rows.documents[row, place] == rows.documents[row, column] and rows.loss_mask[row, place]:
                    yield row, number, step, place


def plain_loss(states: torch.Tensor, rows: PackedBatch, anchors: torch.Tensor, target, gamma: float, mix: Mix):
    """The sum and the weights, position by position, as one would write them without a thought for cost."""
    total, weights = 0.0, 0.0
    final = target.get_decoder()(input_ids=rows.input_ids).last_hidden_state
    for row, number, step, place in counted_places(rows, anchors, states.shape[2]):
        weight = torch.exp(torch.tensor(-(step - 1) / gamma))
        logits = target.lm_head(states[row, number, step]).float()
        loss = cross_entropy(logits[None], rows.input_ids[row, place][None])
        own = log_softmax(target.lm_head(final[row, place - 1]).float(), dim=-1)
        divergence = kl_div(log_softmax(logits, dim=-1), own, reduction="sum", log_target=True)
        variation = (logits.softmax(-1) - own.exp()).abs().sum() / 2
        total = total + weight * (mix.ce * loss + mix.kl * divergence + mix.tv * variation)
        weights += weight
    return total, weights


@pytest.mark.quick
@pytest.mark.parametrize("mix", ["ce", "ce=0.7,kl=0.3", "kl", "tv", "ce=0.1,tv=0.9"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_and_gradient_are_those_of_the_plain_reference(dtype, mix, monkeypatch):
    """With an empty block, a short row, unsupervised tokens, and chunks smaller than the positions."""
    monkeypatch.setattr(loss_module, "CHUNK_LOGITS", 5 * tiny.VOCAB)
    target = tiny.target("qwen3").to(dtype)
    draft = tiny.draft(target).to(dtype)
    rows = packed((30,), (12,))
    rows.loss_mask[0, 20:24] = False
    anchors = torch.tensor([[2, 18, 28], [8, 10, -1]])
    objective = Objective(draft.config, target, Recipe(Mix.parse(mix), gamma=3.0, attention="dense"))
    blocks = objective.blocks(rows, anchors)
    output = objective.target.run(rows, last_hidden_state=True)
    states = objective.states(draft, blocks, objective.noise_embeds(blocks), output.features).detach()
    ours, theirs = states.clone().requires_grad_(), states.clone().requires_grad_()
    with_loss = ours[blocks.block_loss_mask.flatten(1)]
    last_hidden_state = output.last_hidden_state if objective.needs_target else None
    inputs = objective.loss_inputs(draft, blocks, HeadInputs(), last_hidden_state)
    loss = weighted_loss(with_loss, inputs, 12).total
    expected, weights = plain_loss(theirs.unflatten(1, (-1, 5)), rows, anchors, target, 3.0, objective.mix)
    (loss / weights).backward()
    (expected / weights).backward()
    close = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 1e-3}
    torch.testing.assert_close(loss, torch.as_tensor(expected), **close)
    torch.testing.assert_close(ours.grad, theirs.grad, **close)
    assert float(blocks.weights(3.0).sum()) == pytest.approx(float(weights))


def plain_dpace(states, rows: PackedBatch, anchors: torch.Tensor, target, alpha: float, mix: Mix):
    """The sum over all blocks, each position by the accepted lengths that depend on it; and the number of blocks."""
    chances: dict[tuple[int, int], list[float]] = {}
    losses: dict[tuple[int, int], list[torch.Tensor]] = {}
    final = target.get_decoder()(input_ids=rows.input_ids).last_hidden_state
    for row, number, step, place in counted_places(rows, anchors, states.shape[2]):
        logits = target.lm_head(states[row, number, step])
        loss = -log_softmax(logits, dim=-1)[rows.input_ids[row, place]]
        own = target.lm_head(final[row, place - 1]).softmax(-1)
        chances.setdefault((row, number), []).append(float((1 - alpha) * torch.exp(-loss.detach()) + alpha))
        mixed = mix.ce * loss + mix.tv * (logits.softmax(-1) - own).abs().sum() / 2
        losses.setdefault((row, number), []).append(mixed)
    total = 0.0
    for block, found in losses.items():
        reached = torch.tensor(chances[block]).cumprod(0)
        for step, loss in enumerate(found):
            total = total + reached[step:].sum() * loss
    return total, len(losses)


@pytest.mark.parametrize(("mix", "alpha"), [("ce", 0.5), ("ce=0.1,tv=0.9", 0.2)])
def test_dpace_weighs_a_position_by_the_lengths_that_depend_on_it(mix, alpha, monkeypatch):
    """Chunks hold one or two blocks; some blocks are short, have a gap or are empty. Weights have no gradient."""
    monkeypatch.setattr(loss_module, "CHUNK_LOGITS", 5 * tiny.VOCAB)
    target = tiny.target("qwen3")
    draft = tiny.draft(target)
    rows = packed((30,), (12,))
    rows.loss_mask[0, 20:21] = False
    anchors = torch.tensor([[2, 18, 28], [8, 10, -1]])
    objective = Objective(draft.config, target, Recipe(Mix.parse(mix), "dpace", dpace_alpha=alpha, attention="dense"))
    blocks = objective.blocks(rows, anchors)
    output = objective.target.run(rows, last_hidden_state=True)
    states = objective.states(draft, blocks, objective.noise_embeds(blocks), output.features).detach()
    ours, theirs = states.clone().requires_grad_(), states.clone().requires_grad_()
    last_hidden_state = output.last_hidden_state if objective.needs_target else None
    inputs = objective.loss_inputs(draft, blocks, HeadInputs(), last_hidden_state)
    loss = weighted_loss(ours[blocks.block_loss_mask.flatten(1)], inputs, tiny.VOCAB)
    expected, count = plain_dpace(theirs.unflatten(1, (-1, 5)), rows, anchors, target, alpha, objective.mix)
    (loss.total / objective.divisor(blocks)).backward()
    (expected / count).backward()
    torch.testing.assert_close(loss.total, expected)
    torch.testing.assert_close(ours.grad, theirs.grad)
    assert len(inputs.weights.chunks(5)) == 3
    assert len(inputs.weights.chunks(1)) == count
    assert loss.weights.unique().numel() > 4


def test_given_tokens_stand_in_the_block_have_no_loss_and_move_what_is_counted():
    """Blocks of five after two anchors, the first with two tokens given, the second with one."""
    rows = packed((12,))
    ids, given = rows.input_ids[0], torch.tensor([[2, 1]])
    for from_anchor, first in ((False, [3, 2]), (True, [2, 1])):
        blocks = Blocks(rows, torch.tensor([[1, 9]]), 5, from_anchor, given)
        noise = blocks.noise_ids(99).view(2, 5)
        assert noise[0].tolist() == [*ids[1:4].tolist(), 99, 99]
        assert noise[1].tolist() == [*ids[9:11].tolist(), 99, 99, 99]
        weights = torch.zeros(2, 5)
        weights[0, first[0] :] = torch.exp(-torch.arange(5 - first[0]) / 2)
        weights[1, first[1]] = 1  # the text ends there
        torch.testing.assert_close(blocks.weights(2.0)[0], weights)
    wrong_then_right = torch.tensor([0, 1, 1, 1]).bool()
    mask = blocks.block_loss_mask
    counts = Counts.of(mask, wrong_then_right, wrong_then_right & False, given=given).over_rows()
    assert counts.total.tolist() == [2, 1, 1, 0, 0]
    assert counts.correct.tolist() == [1, 1, 1, 0, 0]
    assert counts.accepted.tolist() == [1, 0, 0, 0, 0]


def test_the_number_of_given_tokens_depends_on_the_row_the_seed_and_the_step_alone():
    rows, anchors = packed((50,), (50,)), torch.arange(40).expand(2, -1)
    drawn = draw_given(rows, anchors, 8, 0.5, (1, 5))
    assert set(drawn.flatten().tolist()) <= set(range(1, 7))
    assert (drawn == 1).sum() > (drawn == 3).sum() > 0
    assert torch.equal(drawn, draw_given(rows, anchors, 8, 0.5, (1, 5)))
    assert not torch.equal(drawn, draw_given(rows, anchors, 8, 0.5, (1, 6)))


def test_weights_fall_as_published_for_long_blocks_and_as_measured_best_for_short_ones():
    assert [default_gamma(size) for size in (16, 10, 8, 2)] == [7, 5, 1.6, 1.6]
    assert 1.6 < default_gamma(9) < 5


def test_a_chunk_is_forgotten_before_the_next(monkeypatch):
    monkeypatch.setattr(loss_module, "CHUNK_LOGITS", 100 * 7)
    sizes = []
    head = torch.nn.Linear(4, 100)
    inputs = LossInputs(
        lambda states: sizes.append(len(states)) or head(states),
        torch.arange(20),
        FixedWeights(torch.ones(20)),
        Mix(ce=1),
    )
    weighted_loss(torch.randn(20, 4, requires_grad=True), inputs, 100).total.backward()
    assert sizes == [7, 7, 6]


def test_anchors_depend_on_the_row_the_seed_and_the_step_alone():
    rows = packed((50,), (50,), (30,))
    drawn = draw_anchors(rows, 8, seed=1, step=5)
    alone = draw_anchors(PackedBatch(rows.input_ids[1:2], rows.loss_mask[1:2], rows.documents[1:2]), 8, 1, 5)
    assert torch.equal(drawn[1:2], alone)
    assert not torch.equal(drawn, draw_anchors(rows, 8, seed=1, step=6))
    assert not torch.equal(drawn, draw_anchors(rows, 8, seed=2, step=5))
    assert (drawn.diff() > 0).all()


def test_anchors_are_supervised_tokens_with_one_to_predict():
    rows = packed((4, 4))
    some = torch.tensor([[0, 1, 1, 1, 1, 0, 1, 1]]).bool()
    assert draw_anchors(replace(rows, loss_mask=some), 99, 0, 0).tolist() == [[1, 2, 6]]
    assert draw_anchors(replace(rows, loss_mask=~some & some), 99, 0, 0).tolist() == [[-1]]


def test_expected_acceptance_is_that_of_whole_prefixes_and_blocks_cut_short_do_not_weigh_it_down():
    counted = torch.tensor([[[1, 1, 1], [1, 1, 1], [1, 0, 0]]]).bool()
    correct = torch.tensor([1, 1, 0, 0, 1, 1, 1]).bool()  # two of three, none, and one of one
    counts = Counts.of(counted, correct, correct & False)
    assert counts.total.tolist() == [[3, 2, 2]]
    assert counts.correct.tolist() == [[2, 2, 1]]
    assert counts.reached.tolist() == [[3, 1, 1]]
    assert counts.accepted.tolist() == [[2, 1, 0]]
    metrics = Metrics.of(counts.over_rows())
    assert Metrics.of((counts + counts).over_rows()) == metrics
    assert metrics.by_position == pytest.approx((2 / 3, 1.0, 0.5))
    assert metrics.acceptance_length == pytest.approx(1 + 2 / 3 + 2 / 3 * 1 + 0)
    assert metrics.accuracy == pytest.approx(5 / 7)


@pytest.mark.parametrize("folder", ["draft", "draft2"])
@torch.no_grad()
def test_what_training_counts_as_right_is_what_decoding_accepts(folder, tiny_target):
    """On the trained pair: leaping from anchor to anchor by what training counts gives the cycles of decoding."""
    draft, statistics = load_draft(TINY / folder).eval(), DecodeStatistics()
    ids = torch.arange(40, 80)[None]
    asked = {"attention_mask": torch.ones_like(ids), "do_sample": False, "eos_token_id": None}
    text = tiny_target.generate(ids, **asked, max_new_tokens=60)
    ways = {"custom_generate": draft.speculate, "statistics": statistics, "proposer": lambda chain: chain}
    tiny_target.generate(ids, **asked, max_new_tokens=40, **ways)
    every = torch.ones_like(text)
    objective = Objective(draft.config, tiny_target, Recipe(attention="dense"))
    blocks = objective.blocks(PackedBatch(text, every.bool(), every), torch.arange(40, 80)[None])
    features = objective.target.run(blocks.batch, last_hidden_state=False).features
    states = objective.states(draft, blocks, objective.noise_embeds(blocks), features)
    with_loss = states[blocks.block_loss_mask.flatten(1)]
    inputs = objective.loss_inputs(draft, blocks, objective.head_inputs(draft, blocks, states), None)
    right = torch.zeros_like(blocks.block_loss_mask)
    right[blocks.block_loss_mask] = weighted_loss(with_loss, inputs, 512).correct
    accepted = right[0, :, 1:].int().cumprod(-1).sum(-1).tolist()
    committed, place = [], 0
    while place < 39:
        committed.append(min(accepted[place] + 1, 39 - place))
        place += accepted[place] + 1
    assert statistics.committed == committed
    assert len(set(committed)) > 1
