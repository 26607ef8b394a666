"""Makes prompts of a dataset: every row is read, checked and tokenised before anything starts.

jsonl, parquet, hub id, reasoning-gym  --read-->  rows  --check-->  text  --tokenise-->  PromptSet
actors/sources.py                                 actors/dataset/   actors/messages.py, core/tokenizer.py
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple, TypeAlias

from actors.dataset.forms import Conversation, conversation_of
from actors.dataset.rows import PROMPT_COLUMNS, Asked, RowReader
from actors.messages import clean_messages, render, text_problems
from actors.sources import EVAL_SPLIT, TRAIN_SPLIT, Bad, Source, read_source, report_bad_rows, split_of
from buffer.sources import Part, locate
from core.config import DataConfig
from core.config.evaluation import HELD_OUT, Suite
from core.errors import DataError
from core.records import Sample
from core.text import user_path
from core.tokenizer import has_chat_template, is_unknown, text_prefix, tokenise, with_prefix

Tools: TypeAlias = Mapping[str, Sequence[dict[str, Any]]]
"""The environments of a run by name, and the JSON schemas of the tools that each shows to the policy."""
NO_ENVIRONMENTS: Tools = MappingProxyType({})


@dataclass(frozen=True)
class PromptRow:
    """One usable prompt.

    source_row   index in the source, from 0 (for jsonl: the line)
    text         what is tokenised: the rendered chat template, or the text as it is; empty where an
                 environment's `reset` shows the first thing
    token_ids    the tokens of `text`, special tokens once; an end token that the tokenizer appends is left out
    columns      every column of the row, for the rewards; the answer is in `answer`, whatever its column was
    offline      what others generated for it (`data.offline`), no completion twice
    messages     with environments, what the policy is told before what `reset` shows: clean messages, the
                 system prompt first; None where there is neither prompt nor system prompt, and without
                 environments
    environment  the name of its environment; None without environments
    """

    source_row: int
    text: str
    token_ids: tuple[int, ...]
    columns: dict[str, Any]
    offline: tuple[Sample, ...] = ()
    messages: tuple[dict[str, Any], ...] | None = None
    environment: str | None = None


@dataclass(frozen=True)
class PromptSet:
    """The usable prompts of a dataset, in its order; `num_bad_rows` were left out
    (`data.on_bad_row=skip`); `notes` are to be told.

    Those of several sources (`data.path: {PATH: share}`) lie one after the other: `members` says which is
    which.
    """

    rows: list[PromptRow]
    num_bad_rows: int
    source: str
    notes: tuple[str, ...] = ()
    members: tuple[Member, ...] = ()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> PromptRow:
        return self.rows[index]

    @property
    def parts(self) -> tuple[Part, ...]:
        """Returns what the prompt stream must know of several sources; empty where there is one."""
        return tuple(Part(member.num_prompts, member.share) for member in self.members)

    def split(self) -> list[PromptSet]:
        """Returns the prompts of each source by themselves."""
        if not self.members:
            return [self]
        ends = itertools.accumulate(member.num_prompts for member in self.members)
        return [
            PromptSet(self.rows[end - member.num_prompts : end], member.num_bad_rows, member.name)
            for member, end in zip(self.members, ends, strict=True)
        ]


def row_messages(prompt: PromptRow) -> list[dict[str, Any]]:
    """Returns the prompt as messages, as its row says it, in whatever form, and not as the policy's template
    writes it.
    """
    column = next((column for column in PROMPT_COLUMNS if column in prompt.columns), "")
    found = prompt.columns.get(column, prompt.text)
    found = found.tolist() if hasattr(found, "tolist") else found  # An array of messages (numpy).
    talk = conversation_of(column, found) if isinstance(found, list) else None
    return (
        clean_messages(talk.messages)
        if isinstance(talk, Conversation)
        else [{"role": "user", "content": found}]
    )


class Member(NamedTuple):
    """One of the sources of a PromptSet: its name, how many prompts are its own, and its share of them all, a
    whole number.
    """

    name: str
    num_prompts: int
    num_bad_rows: int
    share: int


def joined(sets: Sequence[PromptSet], shares: Sequence[int]) -> PromptSet:
    """Returns the prompts of several sources as one set, one source after the other; a single one as it
    is.
    """
    if len(sets) == 1:
        return sets[0]
    return PromptSet(
        rows=[row for prompts in sets for row in prompts.rows],
        num_bad_rows=sum(prompts.num_bad_rows for prompts in sets),
        source=" and ".join(prompts.source for prompts in sets),
        notes=tuple(dict.fromkeys(note for prompts in sets for note in prompts.notes)),
        members=tuple(
            Member(prompts.source, len(prompts), prompts.num_bad_rows, share)
            for prompts, share in zip(sets, shares, strict=True)
        ),
    )


class Rendered(NamedTuple):
    """The rows of a source as prompts: the usable ones by row index, why the others are bad, and what to tell
    of how they were read.
    """

    rows: dict[int, PromptRow]
    bad: dict[int, str]
    notes: tuple[str, ...]


def load_prompts(
    data: DataConfig, tokenizer: Any, *, evaluation: bool = False, environments: Tools = NO_ENVIRONMENTS
) -> PromptSet:
    """Returns the training prompts of `data`, or with `evaluation` the first `eval_rows` held-out ones.

    With `environments` a row needs no prompt, and prompts are rendered with the tools of their environment:
    their length counts these.

    Raises DataError for nothing readable at the path (with what was tried and what is accepted), for bad rows
    (the first five with number and reason, unless they are skipped), for no usable row, and for a tokenizer
    without chat template when one is asked for.
    """
    if evaluation and data.eval_rows == 0:
        return PromptSet([], 0, "no evaluation (data.eval_rows = 0)")
    sources, shares = _held_out(data) if evaluation else _training(data)
    sets = []
    for source in sources:
        rows, bad, notes = render_rows(source, data, tokenizer, environments)
        report_bad_rows(source, bad, num_usable=len(rows), on_bad_row=data.on_bad_row)
        notes = () if evaluation else (*_notes(source, rows, tokenizer), *notes)
        sets.append(PromptSet(list(rows.values()), len(bad), source.name, notes))
    return joined(sets, shares)


def load_suite(
    suite: Suite, data: DataConfig, tokenizer: Any, environments: Tools = NO_ENVIRONMENTS
) -> PromptSet:
    """Returns the prompts of a suite; `data` says how rows become prompts. Raises as `load_prompts`."""
    if suite.name == HELD_OUT:
        return load_prompts(data, tokenizer, evaluation=True, environments=environments)
    source = read_source(suite.key("path"), suite.path, EVAL_SPLIT, suite.rows, trained=[*data.sources])
    rows, bad, _ = render_rows(source, data, tokenizer, environments)
    report_bad_rows(source, bad, num_usable=len(rows), on_bad_row=data.on_bad_row)
    return PromptSet(list(rows.values()), len(bad), source.name)


def render_rows(
    source: Source, data: DataConfig, tokenizer: Any, environments: Tools = NO_ENVIRONMENTS
) -> Rendered:
    """Returns the usable prompts of `source`. Raises DataError when there is no chat template."""
    if data.chat_template and not has_chat_template(tokenizer):
        raise DataError(
            "the tokenizer has no chat template. Set data.chat_template=false to use prompts as they are, "
            "or use an instruction-tuned model."
        )
    reader = RowReader(source.rows, data, environments)
    asked: dict[int, Asked] = {}
    bad: dict[int, str] = {}
    texts: dict[int, str] = {}
    made: dict[int, tuple[int, ...]] = {}
    for index, row in source.rows.items():
        found = row if isinstance(row, Bad) else reader.read(row)
        if isinstance(found, Bad):
            bad[index] = found.reason
            continue
        rendered = _render(found, data, tokenizer, environments)
        if isinstance(rendered, Bad):
            bad[index] = rendered.reason
            continue
        asked[index] = found
        texts[index], token_ids = rendered
        if token_ids is not None:
            made[index] = token_ids
    found_ids, failed = tokenise(
        tokenizer, {index: text for index, text in texts.items() if index not in made}
    )
    bad |= failed
    prefix = () if data.chat_template else text_prefix(tokenizer, texts, found_ids)
    rows = {}
    for index, token_ids in sorted({**made, **found_ids}.items()):
        one = asked[index]
        if one.prompt is not None:
            token_ids = with_prefix(tokenizer, prefix, token_ids)
            if reason := _token_problem(one.said, token_ids, len(prefix), data, tokenizer):
                bad[index] = reason
                continue
        messages = _messages(one, data) if environments else []
        rows[index] = PromptRow(
            source_row=index,
            text=texts[index],
            token_ids=token_ids,
            columns=one.columns,
            messages=tuple(messages) or None,
            environment=one.environment,
        )
    return Rendered(rows, bad, tuple(reader.notes(source.name)))


def _render(
    asked: Asked, data: DataConfig, tokenizer: Any, environments: Tools
) -> tuple[str, tuple[int, ...] | None] | Bad:
    """Returns the text to tokenise, or what is wrong with it as the chat template renders it.

    Tokens come along where the tokenizer made them from messages. Without a prompt there is no text yet.
    """
    if asked.prompt is None:
        return "", ()
    if not data.chat_template:
        assert isinstance(asked.prompt, str)
        return asked.prompt, None
    tools = environments[asked.environment] if asked.environment is not None else ()
    rendered = render(tokenizer, _messages(asked, data), tools, data.template_options)
    if isinstance(rendered, Bad):
        return rendered
    reason = next(text_problems("what the chat template renders", rendered[0]), None)
    return rendered if reason is None else Bad(reason)


def _messages(asked: Asked, data: DataConfig) -> list[dict[str, Any]]:
    """Returns what the policy is told as messages: the system prompt, then the row's prompt."""
    found: list[dict[str, Any]] = []
    if data.system_prompt is not None:
        found.append({"role": "system", "content": data.system_prompt})
    if isinstance(asked.prompt, str):
        found.append({"role": "user", "content": asked.prompt})
    return [*found, *asked.prompt] if isinstance(asked.prompt, list) else found


def _token_problem(
    said: str, token_ids: tuple[int, ...], num_added: int, data: DataConfig, tokenizer: Any
) -> str:
    """Returns what is wrong with a prompt as tokens; empty when nothing is. `said` is what its row says,
    without template.
    """
    if len(token_ids) <= num_added:
        return "the prompt has no tokens"
    if len(token_ids) > data.max_prompt_tokens:
        return (
            f"the prompt is {len(token_ids)} tokens long, data.max_prompt_tokens is {data.max_prompt_tokens}"
        )
    if tokenizer.unk_token_id in token_ids:
        spoken, _ = tokenise(tokenizer, {0: said})
        if is_unknown(tokenizer, said, spoken.get(0, ())):
            return f"the tokenizer knows no part of {said[:40]!r}: all of it is {tokenizer.unk_token}"
    return ""


def _notes(source: Source, rows: dict[int, PromptRow], tokenizer: Any) -> Iterator[str]:
    unknown = [
        index
        for index, row in rows.items()
        if tokenizer.unk_token_id in row.token_ids and tokenizer.unk_token not in row.text
    ]
    if unknown:
        yield (
            f"warning: {len(unknown)} of {len(rows)} prompts hold something that the tokenizer does not know "
            "and the policy sees as "
            f"{tokenizer.unk_token} (the first: {source.unit} {unknown[0] + 1})"
        )
    ended = sum(row.token_ids[-1:] == (tokenizer.eos_token_id,) for row in rows.values())
    if ended:
        yield (
            f"warning: {ended} of {len(rows)} prompts end in {tokenizer.eos_token}: the answer begins "
            "after what ends one"
        )


# --- Sources ---


def _training(data: DataConfig) -> tuple[list[Source], list[int]]:
    """Returns the rows to train on, source by source, and the sources' shares."""
    if data.path is None:
        return [read_source("data.path", None, TRAIN_SPLIT)], [1]
    return [read_source("data.path", name, TRAIN_SPLIT) for name in data.sources], [*data.sources.values()]


def _held_out(data: DataConfig) -> tuple[list[Source], list[int]]:
    """Returns the held-out rows, of several sources each one's share of them, and the shares."""
    if data.eval_path is not None:
        source = read_source(
            "data.eval_path", data.eval_path, EVAL_SPLIT, data.eval_rows, trained=[*data.sources]
        )
        return [source], [1]
    if data.path is None:
        raise DataError(
            "there are no held-out prompts: set data.eval_path, or data.eval_rows=0 to switch evaluation off."
        )
    shares = tuple(data.sources.values())
    counts = Counter(locate(number, shares)[0] for number in range(data.eval_rows))
    found = []
    for number, name in enumerate(data.sources):
        place, _ = split_of(name, TRAIN_SPLIT)
        if user_path("data.path", place).is_file():
            raise DataError(
                f"data.path = {name} is one file: it has no split {EVAL_SPLIT!r} to evaluate on, and "
                "its rows are trained on. "
                "Set data.eval_path, or data.eval_rows=0 to switch evaluation off."
            )
        if not counts[number]:
            raise DataError(
                f"data.path: {name} has {shares[number]} of {sum(shares)} shares, which is none of "
                f"data.eval_rows = {data.eval_rows} held-out rows. Raise data.eval_rows, or set data.eval_path."
            )
        found.append(read_source("data.path", place, EVAL_SPLIT, counts[number], trained=[*data.sources]))
    return found, [*shares]
