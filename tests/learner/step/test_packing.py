"""Invariant 7: the gradient does not depend on how samples are packed, ordered, split or sharded. A
real tiny Llama.
"""

import copy
import dataclasses

import numpy as np
import pytest
import torch

from core.errors import ConfigError, DataError
from learner.objectives import TokenBatch, agro, load_objective, token_gradients
from learner.step.packing import (
    MicroBatch,
    TokenLogprobs,
    TokenSequence,
    assign_groups,
    collate,
    plan_micro_batches,
    token_logprobs,
)
from tests.support.learning.rollouts import (
    TEMPERATURE,
    VOCABULARY,
    assert_same_gradient,
    flat,
    make_rollouts,
    plain_logprobs,
    tiny_llama,
    with_other_prompt,
)


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


OBJECTIVE = load_objective(
    agro.Config(beta=0.3, importance_weight="truncated", importance_cap=2.0, on_policy_coef=0.1)
)
NUM_GROUPS = 5


def token_batch(rollouts, indices, logprobs):
    """The TokenBatch of `indices`, given the flat log-probs in that order."""
    sizes = torch.tensor([int(rollouts.sequences[i].is_sampled.sum()) for i in indices])
    return TokenBatch(
        logprobs_T=logprobs,
        behaviour_logprobs_T=torch.cat([rollouts.behaviours[i] for i in indices]),
        sequence_T=torch.arange(len(indices)).repeat_interleave(sizes),
        rewards_N=rollouts.rewards[list(indices)],
        ref_logprobs_N=rollouts.references[list(indices)],
        groups_N=torch.tensor([rollouts.groups[i] for i in indices]),
        staleness_N=rollouts.staleness[list(indices)],
        num_groups=NUM_GROUPS,
    )


def plain_gradient(model, rollouts):
    """One loss over all sequences, each passed alone."""
    logprobs = torch.cat([plain_logprobs(model, sequence) for sequence in rollouts.sequences])
    loss, _ = OBJECTIVE.loss(token_batch(rollouts, range(len(rollouts.sequences)), logprobs))
    return flat(torch.autograd.grad(loss, list(model.parameters())))


def logprobs_of(model, rollouts, indices, layout):
    inputs = collate([rollouts.sequences[i] for i in indices], layout, pad_id=0)
    return token_logprobs(model(**inputs.model_kwargs()).logits, inputs, TEMPERATURE)


def accumulated_gradient(model, rollouts, *, layout, budget, num_ranks=1):
    """What the worker does: groups to ranks, micro-batches, one pass for whole groups, two for split
    ones, all added up.
    """
    lengths = [sequence.num_tokens for sequence in rollouts.sequences]
    ids = sorted(set(rollouts.groups))
    tokens = [
        sum(length for length, group in zip(lengths, rollouts.groups, strict=True) if group == one)
        for one in ids
    ]
    model.zero_grad()
    kinds = set()
    for rank in assign_groups(tokens, num_ranks):
        mine = [i for i, group in enumerate(rollouts.groups) if group in {ids[index] for index in rank}]
        plan = plan_micro_batches(
            [lengths[i] for i in mine], [rollouts.groups[i] for i in mine], budget, layout
        )
        plan = [MicroBatch(tuple(mine[i] for i in batch.indices), batch.whole) for batch in plan]
        kinds |= {batch.whole for batch in plan}
        for batch in plan:
            if batch.whole:
                logprobs = logprobs_of(model, rollouts, batch.indices, layout)
                OBJECTIVE.loss(token_batch(rollouts, batch.indices, logprobs))[0].backward()
        accumulate_split(model, rollouts, [batch.indices for batch in plan if not batch.whole], layout)
    return flat([parameter.grad for parameter in model.parameters()]), kinds


def accumulate_split(model, rollouts, pieces, layout):
    """Two passes over the pieces of split groups."""
    if not pieces:
        return
    with torch.no_grad():
        first_pass = torch.cat([logprobs_of(model, rollouts, indices, layout) for indices in pieces])
    order = [i for indices in pieces for i in indices]
    coefficients = token_gradients(OBJECTIVE, token_batch(rollouts, order, first_pass))
    sizes = [sum(int(rollouts.sequences[i].is_sampled.sum()) for i in indices) for indices in pieces]
    for indices, coefficient in zip(pieces, coefficients.split(sizes), strict=True):
        (coefficient * logprobs_of(model, rollouts, indices, layout)).sum().backward()


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize(("budget", "kinds"), [(10_000, {True}), (40, {True, False}), (22, {True, False})])
def test_gradient_does_not_depend_on_the_micro_batches(model, layout, budget, kinds):
    rollouts = make_rollouts()
    found, seen = accumulated_gradient(model, rollouts, layout=layout, budget=budget)
    assert seen == kinds
    assert_same_gradient(found, plain_gradient(model, rollouts))


def with_turns(rollouts):
    """The same tokens, of which those in the middle of long completions were observed, not sampled."""
    sequences, behaviours = [], []
    for sequence, behaviour in zip(rollouts.sequences, rollouts.behaviours, strict=True):
        is_sampled = sequence.is_sampled.copy()
        (places,) = is_sampled.nonzero()
        is_sampled[places[len(places) // 3 : len(places) // 2]] = False
        sequences.append(TokenSequence(sequence.tokens, is_sampled))
        behaviours.append(behaviour[torch.from_numpy(is_sampled[places])])
    return dataclasses.replace(rollouts, sequences=sequences, behaviours=behaviours)


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize(("budget", "kinds"), [(10_000, {True}), (40, {True, False})])
def test_gradient_of_turns_with_observations_is_that_of_the_sampled_tokens_alone(
    model, layout, budget, kinds
):
    rollouts = with_turns(make_rollouts())
    assert sum(len(np.unique(np.diff(s.is_sampled.nonzero()[0]))) > 1 for s in rollouts.sequences) > 5
    found, seen = accumulated_gradient(model, rollouts, layout=layout, budget=budget)
    assert seen == kinds
    assert_same_gradient(found, plain_gradient(model, rollouts))


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 7])
def test_gradient_does_not_depend_on_the_ranks_nor_on_the_order(model, layout, num_ranks):
    rollouts = make_rollouts()
    order = torch.randperm(
        len(rollouts.sequences), generator=torch.Generator().manual_seed(num_ranks)
    ).tolist()
    found, _ = accumulated_gradient(
        model, rollouts.permuted(order), layout=layout, budget=40, num_ranks=num_ranks
    )
    assert_same_gradient(found, plain_gradient(model, rollouts))


def test_splitting_a_group_without_the_first_pass_would_change_the_gradient(model):
    rollouts = make_rollouts()
    model.zero_grad()
    for indices in (range(3), range(3, 6), range(6, 16)):  # group 11 in two pieces, each centred on its own
        OBJECTIVE.loss(token_batch(rollouts, indices, logprobs_of(model, rollouts, indices, "padded")))[
            0
        ].backward()
    found, exact = flat([parameter.grad for parameter in model.parameters()]), plain_gradient(model, rollouts)
    assert (found - exact).norm() / exact.norm() > 0.01


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize(("attention", "tied"), [("sdpa", True), ("eager", False)])
def test_logprobs_are_those_of_each_sequence_alone_in_float32(layout, attention, tied):
    model, rollouts = tiny_llama(torch.float32, attention, tied), make_rollouts()
    found = logprobs_of(model, rollouts, range(16), layout)
    expected = torch.cat([plain_logprobs(model, sequence) for sequence in rollouts.sequences])
    torch.testing.assert_close(found, expected, rtol=0, atol=5e-5)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_packed_sequences_do_not_see_each_other(attention, training, checkpointing):
    model = tiny_llama(torch.float32, attention).train(training)
    if checkpointing:
        model.gradient_checkpointing_enable()
    sequences = make_rollouts().sequences[:4]
    changed = [*sequences]
    changed[1] = with_other_prompt(sequences[1])
    found = []
    for case in (sequences, changed):
        inputs = collate(case, "packed", pad_id=0)
        assert inputs.attention_mask is None
        found.append(token_logprobs(model(**inputs.model_kwargs()).logits, inputs, 1.0))
    others = inputs.sequence_T != 1
    assert torch.equal(found[0][others], found[1][others])
    assert (found[0][~others] - found[1][~others]).abs().max() > 0.01


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_collate_lays_out_ids_positions_and_targets(layout):
    sequences = [
        TokenSequence.of_turn((5, 6, 7), (8, 9)),
        TokenSequence.of_turn([1, 2], []),
        TokenSequence.of_turn([3, 4], [10, 11, 12, 13]),
    ]
    inputs = collate(sequences, layout, pad_id=99)
    if layout == "padded":
        assert inputs.input_ids.tolist() == [
            [5, 6, 7, 8, 9, 99],
            [1, 2, 99, 99, 99, 99],
            [3, 4, 10, 11, 12, 13],
        ]
        assert inputs.attention_mask is not None
        assert inputs.attention_mask.tolist() == [[1, 1, 1, 1, 1, 0], [1, 1, 0, 0, 0, 0], [1] * 6]
        # from the shortest prompt on, without the last
        assert inputs.logits_to_keep_K.tolist() == [1, 2, 3, 4]
    else:
        assert inputs.input_ids.tolist() == [[5, 6, 7, 8, 9, 1, 2, 3, 4, 10, 11, 12, 13]]
        assert inputs.position_ids.tolist() == [[0, 1, 2, 3, 4, 0, 1, 0, 1, 2, 3, 4, 5]]
        assert inputs.logits_to_keep_K.tolist() == [2, 3, 8, 9, 10, 11]  # exactly those that predict
    assert inputs.targets_T.tolist() == [8, 9, 10, 11, 12, 13]
    assert inputs.sequence_T.tolist() == [0, 0, 2, 2, 2, 2]
    next_ids = inputs.input_ids[inputs.rows_T, inputs.logits_to_keep_K[inputs.columns_T] + 1]
    assert torch.equal(next_ids, inputs.targets_T)


def test_what_several_sequences_begin_with_is_in_the_row_once_and_nothing_that_predicts_nothing_is():
    sequences = [
        TokenSequence.of_turn((5, 6, 7), (8, 9)),
        TokenSequence.of_turn((5, 6), (7, 10)),
        TokenSequence.of_turn((5, 6, 7), (11, 12, 13)),
        TokenSequence.of_turn((5, 6, 7), (11, 12, 14)),
        TokenSequence.of_turn((5, 6, 7), ()),
        TokenSequence(np.array([5, 6, 7, 1, 2, 3]), np.array([0, 0, 0, 1, 0, 0], dtype=bool)),
    ]
    inputs = collate(sequences, "packed", pad_id=0, shares_beginnings=True)
    assert inputs.input_ids.tolist() == [[5, 6, 7, 8, 11, 12]]
    assert inputs.position_ids.tolist() == [[0, 1, 2, 3, 3, 4]]
    assert inputs.logits_to_keep_K.tolist() == [2, 3, 1, 2, 2, 4, 5, 2, 4, 5, 2]
    assert inputs.targets_T.tolist() == [8, 9, 7, 10, 11, 12, 13, 11, 12, 14, 1]
    assert inputs.sequence_T.tolist() == [0, 0, 1, 1, 2, 2, 2, 3, 3, 3, 5]
    assert inputs.packing is not None
    row, buckets = torch.arange(6.0)[:, None, None], inputs.packing.buckets
    assert torch.equal(buckets.pack([bucket.transpose(1, 2) for bucket in buckets.unpack(row)]), row)


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_sequences_that_generated_nothing_have_no_tokens_and_a_zero_gradient(layout):
    model = tiny_llama()
    inputs = collate([TokenSequence.of_turn([1, 2], []), TokenSequence.of_turn([3], [])], layout, pad_id=0)
    logprobs = token_logprobs(model(**inputs.model_kwargs()).logits, inputs, 1.0)
    assert logprobs.shape == (0,)
    logprobs.sum().backward()
    assert all(parameter.grad is None or not parameter.grad.any() for parameter in model.parameters())


def test_only_the_needed_logits_are_computed(model):
    sequences = [TokenSequence.of_turn([1] * 50, [2, 3]), TokenSequence.of_turn([4] * 40, [5])]
    shapes = {
        layout: model(**collate(sequences, layout, 0).model_kwargs()).logits.shape
        for layout in ("padded", "packed")
    }
    assert shapes == {"padded": (2, 12, VOCABULARY), "packed": (1, 3, VOCABULARY)}


def test_collate_refuses_an_empty_prompt_and_an_empty_batch():
    with pytest.raises(DataError, match="sequence 1 has an empty prompt"):
        collate([TokenSequence.of_turn([1], [2]), TokenSequence.of_turn([], [2])], "padded", 0)
    with pytest.raises(ValueError, match="sequences is empty"):
        collate([], "packed", 0)


def cost(lengths, layout):
    return sum(lengths) if layout == "packed" else len(lengths) * max(lengths)


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("seed", range(20))
def test_micro_batches_hold_each_sequence_once_within_the_budget_and_split_only_what_does_not_fit(
    layout, seed
):
    random = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 60, (40,), generator=random).tolist()
    group_of = torch.randint(-5, 7, (40,), generator=random).tolist()
    budget = int(torch.randint(60, 600, (1,), generator=random))
    plan = plan_micro_batches(lengths, group_of, budget, layout)
    assert sorted(i for batch in plan for i in batch.indices) == list(range(40))
    members = {group: [i for i in range(40) if group_of[i] == group] for group in group_of}
    for batch in plan:
        assert cost([lengths[i] for i in batch.indices], layout) <= budget
        for group in {group_of[i] for i in batch.indices}:
            fits = cost([lengths[i] for i in members[group]], layout) <= budget
            assert batch.whole == fits
            assert not fits or set(members[group]) <= set(batch.indices)
    assert plan == plan_micro_batches(copy.copy(lengths), copy.copy(group_of), budget, layout)


def test_padded_micro_batches_join_sequences_of_like_length():
    lengths = [10, 100, 11, 98, 9, 99, 12, 97]
    plan = plan_micro_batches(lengths, list(range(8)), budget_tokens=400, layout="padded")
    assert [batch.indices for batch in plan] == [(1, 3, 5, 7), (0, 2, 4, 6)]


def test_a_sequence_longer_than_the_budget_is_an_error_that_names_the_lengths():
    with pytest.raises(
        ConfigError,
        match=r"2 of 4 sequences exceed learner.micro_batch_tokens = 64.*80, "
        r"99.*at least 99",
    ):
        plan_micro_batches([64, 99, 3, 80], [0, 0, 1, 1], 64, "padded")
    with pytest.raises(ValueError, match="group_of has 1"):
        plan_micro_batches([1, 2], [0], 64, "packed")


def test_no_sequences_make_no_micro_batches():
    assert plan_micro_batches([], [], 64, "padded") == []


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 8])
def test_groups_are_assigned_once_balanced_and_the_same_every_time(num_ranks):
    tokens = torch.randint(100, 1000, (30,), generator=torch.Generator().manual_seed(0)).tolist()
    ranks = assign_groups(tokens, num_ranks)
    assert sorted(index for rank in ranks for index in rank) == list(range(30))
    loads = [sum(tokens[index] for index in rank) for rank in ranks]
    assert max(loads) - min(loads) <= max(tokens)
    # the bound of longest-first scheduling
    assert max(loads) <= 4 / 3 * max(sum(tokens) / num_ranks, max(tokens))
    assert ranks == assign_groups([*tokens], num_ranks)


def test_a_rank_may_get_no_group():
    assert assign_groups([5, 7], 4) == [[1], [0], [], []]
    with pytest.raises(ValueError, match="num_ranks is 0"):
        assign_groups([5], 0)


def test_beginnings_are_one_by_their_tokens_however_they_are_stored():
    answer = np.array([False, True])
    wide = TokenSequence(np.array([5, 1], dtype=np.int64), answer)
    narrow = TokenSequence(np.array([5, 0, 1], dtype=np.int32), np.array([False, False, True]))
    again = TokenSequence(np.array([5, 2], dtype=np.int32), answer)
    inputs = collate([wide, narrow, again], "packed", 0, shares_beginnings=True)
    assert inputs.input_ids.tolist() == [[5, 0]]


def test_what_shares_beginnings_is_refused_where_attention_does_not_know(model):
    answer = np.array([False, True])
    sequences = [TokenSequence(np.array([5, token]), answer) for token in (1, 2)]
    inputs = collate(sequences, "packed", 0, shares_beginnings=True)
    padded = TokenLogprobs(copy.deepcopy(model), "padded", "sdpa")
    with pytest.raises(ValueError, match="share tokens"):
        padded(model, inputs, TEMPERATURE)
