"""The way from sequences to one log-prob per sampled token: rank, forward pass, tensors, model.

    groups --assign_groups--> ranks --plan_micro_batches--> passes --collate--> ModelInputs
    ModelInputs --TokenLogprobs--> log-probs

Two layouts. `padded` is one row per sequence, padding on the right. `packed` is one row for all, without
padding; positions restart at 0, and attention stays within sequences by learner/policy/attention.py, which
also lets what several sequences begin with be in the row once. For
other attentions than sdpa, transformers derives a block-diagonal causal mask from the positions, only when
there is neither an attention mask nor a key-value cache: a model called without `use_cache=False` lets packed
sequences see each other, silently. Call models with `ModelInputs.model_kwargs()`, which holds all of that.
Models with recurrent layers know no such mask, nor do those that count positions by themselves: these are
refused, and want `padded`.

Tensor letters: N sequences, S tokens of all of them, R those that a packed row has, T those that were
sampled, B rows, L row length, K positions whose logits are computed, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import inspect
import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from core.errors import ConfigError, DataError
from learner.policy.attention import Packing, install_packed_sdpa
from learner.policy.row_shards import ROW_SHARDS, RowShards, install_row_shards
from learner.step.logprobs import install_logprob_head, selective_log_softmax

Layout: TypeAlias = Literal["padded", "packed"]


class TokenSequence(NamedTuple):
    """The tokens of one segment of a trajectory in order, and which of them the policy sampled: those have
    log-probs.

    `TokenSequence.of_turn([5, 6], [7])` is one turn: a prompt, and what was sampled for it.

    tokens      int [S]
    is_sampled  bool [S]; not the first token, which nothing predicts
    """

    tokens: npt.NDArray[np.integer[Any]]
    is_sampled: npt.NDArray[np.bool_]

    @classmethod
    def of_turn(cls, prompt_ids: Sequence[int], completion_ids: Sequence[int]) -> TokenSequence:
        """Makes the sequence of a prompt and the completion sampled for it. The completion may be empty, the
        prompt may not.
        """
        tokens = np.array([*prompt_ids, *completion_ids], dtype=np.int64)
        return cls(tokens, np.arange(len(tokens)) >= len(prompt_ids))

    @property
    def num_tokens(self) -> int:
        """How many tokens it has, sampled or not."""
        return len(self.tokens)

    @property
    def sampled_tokens(self) -> npt.NDArray[np.integer[Any]]:
        """The sampled tokens alone, int [T]."""
        return self.tokens[self.is_sampled]


@dataclass(frozen=True)
class MicroBatch:
    """The sequences of one forward pass: their indices, ascending. `whole` says that every group among them
    is complete. Where it is not, the pass holds whole samples, or part of a single one.
    """

    indices: tuple[int, ...]
    whole: bool


@dataclass(frozen=True)
class ModelInputs:
    """What one forward pass takes, and where in its logits the sampled tokens are predicted.

    input_ids, position_ids  int64 [B, L]
    attention_mask           int64 [B, L], or None when packed
    logits_to_keep_K         int64 [K], positions whose logits the model computes: its logits are [B, K, V]
    rows_T, columns_T        int64 [T], the logits (row, index into K) that predict each sampled token
    targets_T                int64 [T], the sampled tokens, by sequence, then position
    sequence_T               int64 [T], sorted: the index of each token's sequence among those collated
    packing                  where the sequences lie in a packed row; None when padded
    """

    input_ids: Tensor
    position_ids: Tensor
    attention_mask: Tensor | None
    logits_to_keep_K: Tensor
    rows_T: Tensor
    columns_T: Tensor
    targets_T: Tensor
    sequence_T: Tensor
    packing: Packing | None = None

    def to(self, device: torch.device | str) -> ModelInputs:
        """Returns the same inputs on another device; `packing` stays where it is."""
        moved: dict[str, Any] = {
            name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        return dataclasses.replace(self, **moved)

    def model_kwargs(self) -> dict[str, Any]:
        """Returns the keyword arguments for a Hugging Face causal language model."""
        return {
            "input_ids": self.input_ids,
            "position_ids": self.position_ids,
            "attention_mask": self.attention_mask,
            "logits_to_keep": self.logits_to_keep_K,
            "use_cache": False,  # With a cache, transformers does not look for packed sequences.
        }


def assign_groups(group_tokens: list[int], num_ranks: int) -> list[list[int]]:
    """Shares whole groups out to `num_ranks` ranks, balanced by tokens: the largest first, to the least
    loaded.

    Returns the indices of each rank's groups, ascending; a rank may get none. Deterministic. Raises
    ValueError without ranks.
    """
    if num_ranks < 1:
        raise ValueError(f"num_ranks is {num_ranks}; expected at least 1")
    ranks: list[list[int]] = [[] for _ in range(num_ranks)]
    loads = [0] * num_ranks
    for index in sorted(range(len(group_tokens)), key=lambda i: (-group_tokens[i], i)):
        rank = loads.index(min(loads))
        ranks[rank].append(index)
        loads[rank] += group_tokens[index]
    return [sorted(indices) for indices in ranks]


def plan_micro_batches(
    lengths: list[int],
    group_of: list[int],
    budget_tokens: int,
    layout: Layout,
    sample_of: list[int] | None = None,
) -> list[MicroBatch]:
    """Plans forward passes of at most `budget_tokens` that hold every sequence once; deterministic.

    `lengths` are tokens per sequence, `group_of` its group, `sample_of` its sample, ascending, where samples
    have several sequences (None: each is a sample). A pass costs rows * longest (padded) or the sum (packed).
    Groups that fit stay whole. Those that do not are split into samples, which share passes of their own
    (`whole` False). A sample that no pass can hold comes last, alone, in passes one after another. Longest
    first otherwise, so that rows of like length meet and a pass too large for the memory fails at once.

    Raises ConfigError that names the lengths when a sequence alone exceeds the budget, ValueError for lists
    of unlike length.
    """
    if len(lengths) != len(group_of):
        raise ValueError(
            f"group_of has {len(group_of)} entries, lengths {len(lengths)}; expected one per sequence each"
        )
    if too_long := sorted(length for length in lengths if length > budget_tokens):
        shown = ", ".join(map(str, too_long[-5:]))
        raise ConfigError(
            f"{len(too_long)} of {len(lengths)} sequences exceed learner.micro_batch_tokens = "
            f"{budget_tokens}; "
            f"the longest have {shown} tokens. Raise it to at least {too_long[-1]}."
        )

    def fits(unit: tuple[int, ...]) -> bool:
        return _cost([lengths[index] for index in unit], layout) <= budget_tokens

    groups = _units(range(len(lengths)), group_of)
    whole = [members for members in groups if fits(members)]
    samples = [
        unit
        for members in groups
        if not fits(members)
        for unit in _units(members, range(len(lengths)) if sample_of is None else sample_of)
    ]
    pieces = [unit for unit in samples if fits(unit)]
    parts = [part for unit in samples if not fits(unit) for part in _cut(unit, fits)]
    return [
        *(MicroBatch(indices, True) for indices in _fill(whole, lengths, budget_tokens, layout)),
        *(MicroBatch(indices, False) for indices in _fill(pieces, lengths, budget_tokens, layout)),
        *(MicroBatch(indices, False) for indices in parts),
    ]


def _units(indices: Iterable[int], unit_of: Sequence[int]) -> list[tuple[int, ...]]:
    """Returns the indices that stay together, those of each unit, by the unit's first."""
    units: dict[int, list[int]] = {}
    for index in indices:
        units.setdefault(unit_of[index], []).append(index)
    return [tuple(members) for members in units.values()]


def _cut(unit: tuple[int, ...], fits: Callable[[tuple[int, ...]], bool]) -> list[tuple[int, ...]]:
    """Returns the sequences of one sample in passes of consecutive ones, as many in each as fit."""
    parts: list[tuple[int, ...]] = []
    for index in unit:
        if parts and fits((*parts[-1], index)):
            parts[-1] += (index,)
        else:
            parts.append((index,))
    return parts


def _cost(lengths: list[int], layout: Layout) -> int:
    return sum(lengths) if layout == "packed" else len(lengths) * max(lengths)


def _fill(
    units: list[tuple[int, ...]], lengths: list[int], budget_tokens: int, layout: Layout
) -> list[tuple[int, ...]]:
    """Joins units, which are indices that stay together, within the budget; the one with the longest sequence
    comes first.
    """
    batches: list[list[int]] = []
    for unit in sorted(units, key=lambda unit: (-max(lengths[i] for i in unit), unit)):
        # Padded: only the last batch, the one of like length; a short row among long ones would be mostly
        # padding.
        for batch in batches if layout == "packed" else batches[-1:]:
            if _cost([lengths[i] for i in (*batch, *unit)], layout) <= budget_tokens:
                batch.extend(unit)
                break
        else:
            batches.append(list(unit))
    return [tuple(sorted(batch)) for batch in batches]


def collate(
    sequences: Sequence[TokenSequence],
    layout: Layout,
    pad_id: int,
    device: torch.device | str = "cpu",
    *,
    shares_beginnings: bool = False,
) -> ModelInputs:
    """Makes the tensors of one forward pass over `sequences`, on `device`.

    With `shares_beginnings`, a packed row has once what several sequences begin with, a prompt or an answer
    as far as they say the same, and nothing from a sequence's last sampled token on, whose logits nobody
    asks for: the log-probs and their gradient are the same, for a model that attends by `packing`.

    Raises ValueError without sequences, DataError for a sequence whose first token was sampled, or that has
    no token.
    """
    if not sequences:
        raise ValueError("sequences is empty; expected at least one per forward pass")
    lengths = [sequence.num_tokens for sequence in sequences]
    lengths_N = np.array(lengths)
    sequence_S = np.arange(len(sequences)).repeat(lengths_N)
    position_S = np.arange(len(sequence_S)) - (lengths_N.cumsum() - lengths_N)[sequence_S]
    tokens_S = np.concatenate([sequence.tokens for sequence in sequences]).astype(np.int64)
    sampled_T = np.concatenate([sequence.is_sampled for sequence in sequences]).nonzero()[0]
    sequence_T = sequence_S[sampled_T]
    _check_predictable(lengths, sequence_T[position_S[sampled_T] == 0].tolist())
    attention_mask, packing = None, None
    # A token is predicted by the logits at the place before its own.
    if layout == "packed":
        row = _Row.of(sequences, tokens_S, shares_beginnings=shares_beginnings)
        input_ids, position_ids = tokens_S[row.kept_R][None], position_S[row.kept_R][None]
        keep_K = row.place_S[sampled_T - 1]
        rows_T, columns_T = np.zeros_like(sampled_T), np.arange(len(sampled_T))
        packing = Packing(row.lengths, device, row.place_S[row.place_S >= 0])
    else:
        input_ids = np.full((len(sequences), max(lengths)), pad_id)
        input_ids[sequence_S, position_S] = tokens_S
        position_ids = np.broadcast_to(np.arange(max(lengths)), input_ids.shape).copy()
        attention_mask = torch.from_numpy((position_ids < lengths_N[:, None]).astype(np.int64))
        predictor_T = position_S[sampled_T] - 1
        first, last = (int(predictor_T.min()), int(predictor_T.max())) if len(predictor_T) else (0, -1)
        keep_K = np.arange(first, last + 1)
        rows_T, columns_T = sequence_T, predictor_T - first
    return ModelInputs(
        input_ids=torch.from_numpy(input_ids),
        position_ids=torch.from_numpy(position_ids),
        attention_mask=attention_mask,
        logits_to_keep_K=torch.from_numpy(keep_K),
        rows_T=torch.from_numpy(rows_T),
        columns_T=torch.from_numpy(columns_T),
        targets_T=torch.from_numpy(tokens_S[sampled_T]),
        sequence_T=torch.from_numpy(sequence_T),
        packing=packing,
    ).to(device)


class _Row(NamedTuple):
    """Which tokens of the sequences, S one after another, a packed row has: R of them.

    kept_R   int64 [R], the token at each place of the row
    place_S  int64 [S], the place of each token; -1 for one that is left out
    lengths  how many tokens of each sequence have a place
    """

    kept_R: npt.NDArray[np.int64]
    place_S: npt.NDArray[np.int64]
    lengths: list[int]

    @classmethod
    def of(
        cls, sequences: Sequence[TokenSequence], tokens_S: npt.NDArray[np.int64], *, shares_beginnings: bool
    ) -> _Row:
        """Makes the row of all tokens, or of those that `collate` says with `shares_beginnings`; `tokens_S`
        are the sequences' one after another.
        """
        lengths = [sequence.num_tokens for sequence in sequences]
        all_S = np.arange(sum(lengths))
        if not shares_beginnings:
            return cls(all_S, all_S, lengths)
        is_kept_S = np.zeros(len(all_S), dtype=bool)
        starts = [0, *np.cumsum(lengths[:-1]).tolist()]
        for number, sequence in enumerate(sequences):
            sampled = sequence.is_sampled.nonzero()[0]
            lengths[number] = int(sampled[-1]) if len(sampled) else 1
            is_kept_S[starts[number] : starts[number] + lengths[number]] = True
        like_S = _first_alike(tokens_S, starts, lengths)
        is_own_S = is_kept_S & (like_S == all_S)
        place_S = np.where(is_kept_S, (is_own_S.cumsum() - 1)[like_S], -1)
        return cls(is_own_S.nonzero()[0], place_S, lengths)


def _first_alike(
    tokens_S: npt.NDArray[np.int64], starts: Sequence[int], lengths: Sequence[int]
) -> npt.NDArray[np.int64]:
    """Returns for each token the first that has the same tokens before it in its sequence, and is the same;
    of each sequence `lengths` tokens from `starts` on count.

    In the order of their tokens a sequence has the longest beginning in common with the one before it.
    """
    like_S, ordered_S = np.arange(len(tokens_S)), tokens_S.astype(">i8")
    pieces = [ordered_S[start : start + length] for start, length in zip(starts, lengths, strict=True)]
    order = sorted(range(len(pieces)), key=lambda number: pieces[number].tobytes())
    for before, number in itertools.pairwise(order):
        shorter = min(lengths[before], lengths[number])
        differ = (pieces[before][:shorter] != pieces[number][:shorter]).nonzero()[0]
        common = int(differ[0]) if len(differ) else shorter
        like_S[starts[number] : starts[number] + common] = like_S[starts[before] : starts[before] + common]
    _, first, alike_S = np.unique(like_S, return_index=True, return_inverse=True)
    return first[alike_S]


def _check_predictable(lengths: Sequence[int], begin_sampled: Sequence[int]) -> None:
    """Raises DataError for sequences without tokens, and for those in `begin_sampled`, whose first token was
    sampled.
    """
    refused = [*begin_sampled, *(index for index, length in enumerate(lengths) if not length)]
    if refused:
        raise DataError(
            f"sequence {min(refused)} has an empty prompt: nothing predicts its first token; "
            "prompts need at least one token"
        )


def token_logprobs(logits: Tensor, inputs: ModelInputs, temperature: float) -> Tensor:
    """Returns [T] log-probs of the sampled tokens, by sequence, then position, from the model's logits [B, K,
    V].

    They are float32 (float64 for float64 logits). The logits are taken as they are: positions that predict
    nothing are computed with a dummy target and left out, which is cheaper than a copy of those that do.
    """
    targets_BK = inputs.targets_T.new_zeros(logits.shape[:-1])
    targets_BK[inputs.rows_T, inputs.columns_T] = inputs.targets_T
    return selective_log_softmax(logits, targets_BK, temperature)[inputs.rows_T, inputs.columns_T]


def refuse_packing(module: Any, reason: str) -> None:
    """Raises ConfigError: with this model, packed sequences would see each other."""
    raise ConfigError(
        f"{type(module).__name__} {reason}: packed sequences would see each other. Use "
        "learner.layout = padded."
    )


def _check_packable(module: Any) -> None:
    """Refuses what the model's class and config show; learner/policy/function_check.py looks at what it
    computes.
    """
    kinds = {*(getattr(module.config.get_text_config(), "layer_types", None) or ())}
    # So transformers marks models that carry a state along the row.
    if getattr(module, "_is_stateful", False):
        refuse_packing(module, "carries a state from one token to the next")
    if others := kinds - {"full_attention", "sliding_attention"}:
        refuse_packing(module, f"has layers of {', '.join(sorted(others))}")
    if "position_ids" not in inspect.signature(module.forward).parameters:
        refuse_packing(module, "takes no position ids")


class TokenLogprobs:
    """The learner's way through a Hugging Face causal LM: attention within packed sequences, log-probs
    without the logits.

        token_logprobs = TokenLogprobs(module, "packed", "sdpa")
        engine, *_ = deepspeed.initialize(model=module, ...)
        logprobs_T = token_logprobs(engine, inputs, temperature)

    It is made of the bare module, which it changes, before DeepSpeed wraps it.

    Raises ConfigError for a model whose packed sequences would see each other.
    """

    def __init__(self, module: Any, layout: Layout, attention: str, shards: RowShards | None = None) -> None:
        """`shards` divides a packed row among ranks, each of which gets all of its log-probs."""
        if layout == "packed":
            _check_packable(module)
        self._module, self._shards = module, shards
        self._head = install_logprob_head(module)
        self._packs = layout == "packed" and attention == "sdpa"
        if self._packs and not install_packed_sdpa(module):
            refuse_packing(module, "does not let its attention be exchanged (model.attention = sdpa)")
        if shards is not None:
            install_row_shards(module, shards)

    @property
    def shares_beginnings(self) -> bool:
        """True where it takes what `collate` makes with `shares_beginnings`."""
        return self._packs

    def __call__(self, model: Any, inputs: ModelInputs, temperature: float) -> Tensor:
        """Returns [T] log-probs of the sampled tokens, by sequence, then position; float32 (float64 for a
        float64 model). With shards collective.

        `model` is whatever stands for the module by now. Raises ConfigError for models whose attention or
        head turns out to be of another kind than it looked, ValueError for inputs that share tokens where
        attention does not go by `packing`.
        """
        if not self._packs and inputs.packing is not None and inputs.packing.shares_tokens:
            raise ValueError("inputs share tokens, which only a model that attends by `packing` can read")
        # By another attention, which check_function compares with, every rank computes the whole row.
        if self._shards is not None and self._module.config._attn_implementation == ROW_SHARDS:
            part = self._shards.cut(inputs)
            mine = self._asked(model, part.inputs, part.model_kwargs(), temperature)
            return self._shards.joined(mine, part)
        kwargs = inputs.model_kwargs() | ({"packing": inputs.packing} if self._packs else {})
        return self._asked(model, inputs, kwargs, temperature)

    def _asked(self, model: Any, inputs: ModelInputs, kwargs: dict[str, Any], temperature: float) -> Tensor:
        if self._head is None:
            return token_logprobs(model(**kwargs).logits, inputs, temperature)
        with self._head.asked(inputs.rows_T, inputs.columns_T, inputs.targets_T, temperature):
            logprobs_T: Tensor = model(**kwargs).logits
            self._head.check_unchanged(logprobs_T)
        return logprobs_T
