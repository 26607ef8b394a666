"""Offline data is completions that others generated: read and checked before anything starts, then fed to the
buffer.

    data.offline --load_offline--> PromptRows with Samples --+--> OfflineActor --> buffer   all samples offline
                                                             `--> RolloutActor --> buffer   some of each group

A logged completion has no behaviour log-probs and no policy version: mu is whoever wrote it, which AGRO need
not know. It is taken as finished, and ends as the policy's own do, unless its row says `truncated: true`.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import msgspec
import numpy as np

from actors.dataset.rows import PROMPT_COLUMNS
from actors.exchange import RETRY_S
from actors.heartbeat import Heartbeat
from actors.messages import text_problems
from actors.prompts import PromptRow, PromptSet, render_rows
from actors.reward_model import RewardModelClient
from actors.reward_model.asked import ModelRewards
from actors.scored import group_of, with_scores
from actors.scoring import Scorer
from actors.sources import TRAIN_SPLIT, kind_of, read_source, report_bad_rows
from buffer.client import BufferClient
from buffer.store import DiskFullError
from core.arrays import Int32s
from core.calls import Calls
from core.config import Config
from core.errors import DataError
from core.monitor_client import MonitorClient
from core.records import Group, Sample, WorkItem, encode
from core.tokenizer import (
    Detokenizer,
    closing_ids,
    end_token_ids,
    is_unknown,
    split_at_end,
    tokenise,
)
from core.weights.board import BoardClient, Directive

OWN_COLUMNS = ("completion", "reward", "truncated", "group")
LEASE_S = 1.0


# --- Loading ---


def load_offline(
    config: Config, tokenizer: Any, training: PromptSet | None = None
) -> tuple[PromptSet, list[str]]:
    """Returns the prompts of `data.offline` with their samples, and, in sentences, what was found and left
    out.

    A row has a prompt (rendered and tokenised as training prompts are), `completion` (text) and, optionally,
    `reward` (a finite number; true and false are 1 and 0; without one, or null, the reward functions score
    it), `group` (which rows of a prompt belong together; without it all do) and `truncated`. The other
    columns go to the reward functions, of the rows of a prompt the first one's. A group needs two different
    completions.

    With `training` (samples are mixed) these prompts come back, each with the samples of all rows that have
    its text; groups and other columns do not matter then.

    Raises DataError for nothing readable, for bad rows, with number, value and reason (`data.on_bad_row`),
    and for nothing that can be used.
    """
    source = read_source("data.offline", config.data.offline_source, TRAIN_SPLIT)
    rows, bad, read = render_rows(source, config.data, tokenizer)
    samples = _read_samples(rows, bad, config, tokenizer)
    _refuse_strangers(rows, samples, bad, training, source.unit)
    report_bad_rows(source, bad, num_usable=len(samples), on_bad_row=config.data.on_bad_row)
    notes = list(read)
    if bad:
        notes.append(f"data.offline: {len(bad)} bad rows of {source.name} skipped")
    if unknown := [
        index for index, sample in samples.items() if tokenizer.unk_token_id in sample.sampled_tokens
    ]:
        first = f"{source.unit} {unknown[0] + 1}"
        notes.append(
            f"warning: data.offline: {len(unknown)} completions hold something that the tokenizer does not "
            f"know (the first: {first})"
        )
    if training is not None:
        mixed, found = _mix(training, rows, samples, config.offline_samples)
        num_bad = training.num_bad_rows + len(bad)
        return dataclasses.replace(training, rows=mixed, num_bad_rows=num_bad, notes=()), [*notes, *found]
    prompts, found = _by_prompt(rows, samples, source.name, *config.objective.fewest_samples)
    return PromptSet(prompts, len(bad), source.name), [*notes, *found]


def _read_samples(
    rows: dict[int, PromptRow], bad: dict[int, str], config: Config, tokenizer: Any
) -> dict[int, Sample]:
    """Returns the samples of the rows that have a usable one; the others' reasons go to `bad`."""
    reasons = {index: next(_problems(row.columns), None) for index, row in rows.items()}
    bad.update((index, reason) for index, reason in reasons.items() if reason is not None)
    usable = {index: row.columns for index, row in rows.items() if reasons[index] is None}
    end_ids = end_token_ids(config.model, tokenizer)
    if not end_ids and not all(columns.get("truncated") for columns in usable.values()):
        raise DataError(
            "data.offline: the tokenizer has no EOS token to end a finished completion with. "
            "Give it one (eos_token)."
        )
    closing = closing_ids(tokenizer, end_ids, chat_template=config.data.chat_template)
    detokenizer = Detokenizer(tokenizer, end_ids, skip_special_tokens=config.rewards.skip_special_tokens)
    split = {
        index: split_at_end(tokenizer, end_ids, columns["completion"]) for index, columns in usable.items()
    }
    found, failed = tokenise(tokenizer, {index: text for index, (text, _, _) in split.items()})
    bad |= failed
    samples = {}
    for index, token_ids in found.items():
        text, end, rest = split[index]
        is_cut, reward = bool(usable[index].get("truncated")), usable[index].get("reward")
        ended = token_ids if is_cut else (*token_ids, *(end or closing))
        if is_cut and end:
            bad[index] = (
                "'truncated' is true, but the completion holds the end token "
                f"{tokenizer.convert_ids_to_tokens(end[0])!r}"
            )
        elif rest:
            bad[index] = (
                f"the completion goes on after the end token {tokenizer.convert_ids_to_tokens(end[0])!r}: "
                f"{rest[:40]!r}"
            )
        elif is_unknown(tokenizer, text, token_ids):
            bad[index] = (
                f"the tokenizer knows no part of the completion {text[:40]!r}: all of it is "
                f"{tokenizer.unk_token}"
            )
        elif not 1 <= len(ended) <= config.actors.max_new_tokens:
            limit = config.actors.max_new_tokens
            bad[index] = (
                f"the completion is {len(ended)} tokens long, EOS included; actors.max_new_tokens is {limit}"
            )
        else:
            finish_reason = "length" if is_cut else "stop"
            samples[index] = Sample.one_turn(
                rows[index].token_ids,
                ended,
                version_spans=(),
                finish_reason=finish_reason,
                text=detokenizer.text(ended),
                reward=None if reward is None else float(reward),
            )
    return samples


def _problems(columns: dict[str, Any]) -> Iterator[str]:
    """Yields what is wrong with a row besides its prompt."""
    if "completion" not in columns:
        yield f"no column 'completion'; it has {', '.join(map(repr, columns))}"
        return
    completion, reward, truncated, group = (columns.get(name) for name in OWN_COLUMNS)
    if isinstance(completion, str):
        yield from text_problems("'completion'", completion)
    else:
        yield f"'completion' is {kind_of(completion)}, expected text"
    if not isinstance(reward, int | float | None):
        found = f"{kind_of(reward)} ({str(reward)[:40]!r})"
        yield f"'reward' is {found}, expected a finite number, or null to have it computed"
    elif reward is not None and not abs(reward) <= sys.float_info.max:  # As NaN is not.
        yield f"'reward' is {str(reward)[:40]}, expected a finite number, or null to have it computed"
    if not isinstance(truncated, bool | None):
        yield f"'truncated' is {kind_of(truncated)}, expected true or false"
    if not isinstance(group, str | int | None):
        yield f"'group' is {kind_of(group)}, expected text or a whole number"


def _refuse_strangers(
    rows: dict[int, PromptRow],
    samples: dict[int, Sample],
    bad: dict[int, str],
    training: PromptSet | None,
    unit: str,
) -> None:
    """Moves to `bad` the rows whose prompt is none of `training`; without it, rows with another answer than
    the first of their prompt.
    """
    known = {row.text for row in training.rows} if training is not None else set()
    first: dict[str, PromptRow] = {}
    for index in list(samples):
        row = rows[index]
        before = first.setdefault(row.text, row)
        if training is not None and row.text not in known:
            bad[index] = (
                f"its prompt {row.text[:60]!r} is no training prompt (data.path), so that nothing could be "
                "mixed with it"
            )
        elif training is None and row.columns.get("answer") != before.columns.get("answer"):
            answers = [str(found.columns.get("answer"))[:40] for found in (row, before)]
            bad[index] = (
                f"its 'answer' is {answers[0]!r}, but {answers[1]!r} in {unit} {before.source_row + 1}, "
                "which has "
                "the same prompt"
            )
        else:
            continue
        del samples[index]


def _by_prompt(
    rows: dict[int, PromptRow], samples: dict[int, Sample], source: str, least: int, setting: str
) -> tuple[list[PromptRow], list[str]]:
    """Returns a PromptRow for each prompt and group with `least` different completions, and what to tell."""
    members: dict[tuple[str, Any], list[int]] = {}
    for index in samples:
        members.setdefault((rows[index].text, rows[index].columns.get("group")), []).append(index)
    prompts, differing = [], set()
    for indices in members.values():
        found = _different([samples[index] for index in indices])
        columns, *others = [_reward_columns(rows[index]) for index in indices]
        names = set(columns).union(*others) - set(PROMPT_COLUMNS)
        differing |= {name for other in others for name in names if columns.get(name) != other.get(name)}
        if len(found) >= least:
            prompts.append(dataclasses.replace(rows[indices[0]], columns=columns, offline=found))
    num_different = sum(len({samples[index].tokens for index in indices}) for indices in members.values())
    num_equal = len(samples) - num_different
    told = f"{len(samples)} samples of {len(members)} prompts, {num_equal} of them exact duplicates"
    if not prompts:
        raise DataError(
            f"data.offline = {source}: no prompt has {least} different completions ({told}). AGRO compares "
            "the completions of one prompt"
            f"{f', {least} at a time with {setting}' if setting else ''}: log "
            "at least so many of it."
        )
    notes = [f"data.offline: {told}, which are left out"]
    if num_alone := len(members) - len(prompts):
        notes.append(
            f"data.offline: {num_alone} prompts left out: fewer than {least} different completions "
            "carry no signal"
        )
    if differing:
        notes.append(
            f"data.offline: rows of one prompt differ in {', '.join(sorted(differing))}; reward "
            "functions get the first row's"
        )
    return prompts, notes


def _mix(
    training: PromptSet, rows: dict[int, PromptRow], samples: dict[int, Sample], per_group: int
) -> tuple[list[PromptRow], list[str]]:
    """Returns the training prompts with what is there of each, and what to tell."""
    members: dict[str, list[Sample]] = {}
    for index, sample in samples.items():
        members.setdefault(rows[index].text, []).append(sample)
    mixed = [dataclasses.replace(row, offline=_different(members.get(row.text, []))) for row in training.rows]
    num_different = sum(len(_different(found)) for found in members.values())
    num_enough = sum(len(row.offline) >= per_group for row in mixed)
    num_some = sum(0 < len(row.offline) < per_group for row in mixed)
    return mixed, [
        f"data.offline: {len(samples)} samples of {len(members)} prompts, {len(samples) - num_different} "
        "exact duplicates left out",
        f"offline samples for {num_enough} of {len(mixed)} prompts ({per_group} of each group); "
        f"{num_some} have fewer: what is missing is generated",
    ]


def _different(samples: Sequence[Sample]) -> tuple[Sample, ...]:
    """Returns the samples without those whose tokens an earlier one has; the earlier one's reward stays."""
    different: dict[Int32s, Sample] = {}
    for sample in samples:
        different.setdefault(sample.tokens, sample)
    return tuple(different.values())


def _reward_columns(row: PromptRow) -> dict[str, Any]:
    return {name: value for name, value in row.columns.items() if name not in OWN_COLUMNS}


# --- Using ---


def choose_samples(row: PromptRow, count: int, seed: int) -> list[Sample]:
    """Returns `count` of the row's offline samples (all when there are fewer), in a random order that `seed`
    alone decides.

    They come without log-probs and versions, with the reward they were given or None.
    """
    if not row.offline:
        return []  # Most rows have none, and a generator takes longer to make than a group.
    keys = np.random.PCG64([seed, len(row.offline)]).random_raw(len(row.offline))
    return [row.offline[index] for index in np.argsort(keys, kind="stable")[:count]]


class OfflineActor(Heartbeat):
    """Leases prompts and inserts groups of their offline samples; `cluster.supervisor` makes it a Ray actor
    beside the rollout actors.
    """

    def __init__(
        self,
        name: str,
        config: Config,
        prompts: PromptSet,
        buffer: BufferClient,
        board: BoardClient,
        monitor: MonitorClient,
        models: Mapping[str, RewardModelClient] | None = None,
        *,
        scores_all: bool = False,
    ) -> None:
        """Takes its peers, and the hosted reward models; `scores_all` scores what has a reward too: a vote
        needs the answers of all.
        """
        self._name, self._config, self._prompts = name, config, prompts
        self._buffer, self._board, self._monitor = buffer, board, monitor
        self._calls = Calls(config.run.timeout_s, monitor.event, name=name)
        self._scorer = Scorer(
            config.rewards,
            partial(
                ModelRewards, clients=models or {}, calls=self._calls, system_prompt=config.data.system_prompt
            ),
        )
        self._scores_all = scores_all
        self._version = -1
        self._counters = dict.fromkeys(
            ("groups", "samples", "errors", "insert_retries", "leases_refused", "wait_admission_s"), 0.0
        )

    async def run(self) -> dict[str, float]:
        """Feeds until retired and returns the final counters. Raises PeerTimeout when buffer or board does
        not answer.
        """
        with contextlib.closing(self._scorer):
            while not await self._poll_board():
                self._beat()
                await self._feed()
                report = self._monitor.log_actor(self._name, {**self._counters, "version": self._version})
                self._calls.post(report, "an actor's counters")
            with contextlib.suppress(DiskFullError):  # Told before; the leases run out.
                await self._calls.start(self._buffer.release_actor(self._name))
        return dict(self._counters)

    async def _feed(self) -> None:
        """Takes one lease of at most a batch to its insertion; does nothing when the buffer admits none."""
        start_s = time.perf_counter()
        try:
            # Nothing is held from one turn to the next.
            lease = self._buffer.lease(self._name, self._config.learner.groups_per_step, LEASE_S, holding=[])
            payloads = await self._calls.start(lease) or ()
        except DiskFullError:  # The driver tells of it (cluster/health.py).
            self._counters["leases_refused"] += 1
            await asyncio.sleep(RETRY_S)
            return
        self._counters["wait_admission_s"] += time.perf_counter() - start_s
        items = [msgspec.msgpack.decode(payload, type=WorkItem) for payload in payloads]
        groups = await self._scored(items)
        if not groups or not await self._insert(groups):
            return
        self._counters["groups"] += len(groups)
        self._counters["samples"] += sum(len(group.samples) for group in groups)
        self._counters["errors"] += sum(
            sample.error is not None for group in groups for sample in group.samples
        )

    async def _scored(self, items: Sequence[WorkItem]) -> Sequence[Group]:
        """Returns the groups of the items when their rewards are there, which may take long: the leases are
        renewed meanwhile. None when retired before.
        """
        ordinals = [item.ordinal for item in items]
        scoring = asyncio.gather(*map(self._group, items))
        while not (await asyncio.wait([scoring], timeout=RETRY_S))[0]:
            self._beat()
            if await self._poll_board():
                scoring.cancel()
                return ()
            with contextlib.suppress(DiskFullError):  # The driver tells of it (cluster/health.py).
                await self._calls.start(self._buffer.renew(self._name, ordinals))
        return scoring.result()

    async def _insert(self, groups: Sequence[Group]) -> bool:
        """Sends the groups, again every second while the buffer's disk is full; False when retired
        before they were taken.
        """
        payloads = [encode(group) for group in groups]
        while True:
            with contextlib.suppress(DiskFullError):  # The driver tells of it (cluster/health.py).
                await self._calls.start(self._buffer.renew(self._name, [group.group_id for group in groups]))
                await self._calls.start(self._buffer.insert(self._name, payloads))
                return True
            await asyncio.sleep(RETRY_S)
            self._beat()
            if await self._poll_board():
                break
            self._counters["insert_retries"] += 1
        return False

    async def _group(self, item: WorkItem) -> Group:
        row = self._prompts[item.prompt_index]
        samples = choose_samples(row, self._config.actors.group_size, item.seed)
        to_score = [
            index for index, sample in enumerate(samples) if sample.reward is None or self._scores_all
        ]
        if to_score:
            unscored = [samples[index] for index in to_score]
            # The pool answers within its own limit, whatever a reward function does.
            scores = await asyncio.wrap_future(self._scorer.score(row, unscored))
            for index, sample in zip(to_score, with_scores(unscored, scores), strict=True):
                samples[index] = sample
        return group_of(item, row, samples, self._name)

    async def _poll_board(self) -> bool:
        """Asks the board whether to end, and takes note of the newest version for the monitor."""
        payload, _ = await self._calls.start(self._board.poll(self._name, self._version, 0, 0.0))
        directive = msgspec.msgpack.decode(payload, type=Directive)
        self._version = directive.version
        return bool(directive.retire)
