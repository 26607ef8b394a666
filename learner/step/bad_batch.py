"""The batch of a skipped learner step, kept for a human: its file, and the file as text (`launch.py
inspect-batch`).
"""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import msgspec

from core.errors import DataError
from core.records import Batch, Group, Sample, decode_batch
from core.staleness import sample_staleness

MAX_FILES = 5
SHOWN_CHARS = 240
SHOWN_GROUPS = 5
FORMAT = "agro-bad-batch-2"


class Skip(msgspec.Struct, frozen=True, kw_only=True):
    """Why a step was not done; equal on every rank.

    reasons        by group id: what of it was not finite; empty when only the gradient norm was not
    grad_norm      NaN when no gradient was taken
    mean_logprobs  by group id: mean log-probs of its samples by the policy, nats; None where it saw none
    """

    reasons: dict[int, str]
    grad_norm: float = math.nan
    mean_logprobs: dict[int, tuple[float | None, ...]] = {}

    def describe(self) -> str:
        """Returns a clause that names the groups."""
        if not self.reasons:
            return f"the gradient norm is {self.grad_norm}, with finite log-probs"
        groups = list(self.reasons.items())
        named = ", ".join(f"{what} of group {group_id}" for group_id, what in groups[:SHOWN_GROUPS])
        more = f" and {len(groups) - SHOWN_GROUPS} more groups" if len(groups) > SHOWN_GROUPS else ""
        return f"not finite: {named}{more}"


class BadBatch(msgspec.Struct, frozen=True, kw_only=True):
    """What the file holds: the step, why it was skipped, and its batch as the learner got it, encoded
    (core/records.py).
    """

    step: int
    skip: Skip
    batch: bytes
    format: str = FORMAT


def file_name(step: int) -> str:
    """Returns the name of the file for the batch of a learner step."""
    return f"step-{step:06d}.msgpack"


def write_bad_batch(path: Path, bad: BadBatch) -> None:
    """Writes the file whole or not at all; the newest `MAX_FILES` of the directory stay. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".tmp")
    aside.write_bytes(msgspec.msgpack.encode(bad))
    os.replace(aside, path)
    for old in sorted(path.parent.glob("step-*.msgpack"), key=lambda found: found.stat().st_mtime_ns)[
        :-MAX_FILES
    ]:
        old.unlink()


def read_bad_batch(path: Path) -> tuple[BadBatch, Batch]:
    """Returns the file's content, and the batch decoded.

    Raises DataError in one line for a file that is missing, torn, or something else.
    """
    try:
        bad = msgspec.msgpack.decode(path.read_bytes(), type=BadBatch)
        if bad.format != FORMAT:
            raise DataError(f"{path} has format {bad.format!r}; this version reads {FORMAT!r}")
        return bad, decode_batch(bad.batch)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
    except msgspec.MsgspecError as error:
        raise DataError(
            f"{path} is no batch kept by a learner (run_dir/bad-batches/step-*.msgpack), or torn: {error}"
        ) from None


def render(path: Path, decode: Callable[[Sequence[int]], str] | None = None) -> str:
    """Returns the file as text, with `!` before what is not finite.

    `decode` turns token ids into text, special tokens included; without it the sample's own text is shown.
    Raises DataError as `read_bad_batch` does.
    """
    bad, batch = read_bad_batch(path)
    num_samples = sum(len(group.samples) for group in batch.groups)
    lines = [
        f"learner step {bad.step}, skipped: {bad.skip.describe()}",
        f"{len(batch.groups)} groups, {num_samples} samples; gradient norm {_number(bad.skip.grad_norm)}",
    ]
    for group in batch.groups:
        reason = bad.skip.reasons.get(group.group_id)
        mark, why = ("!", f": {reason}") if reason else (" ", "")
        lines += ["", f"{mark} group {group.group_id}, row {group.source_row}, {group.uses} uses{why}"]
        lines.append(f"    prompt      {_short(group.prompt)}")
        lines += _sample_lines(bad, batch, group, decode)
    return "\n".join(lines)


def _sample_lines(
    bad: BadBatch, batch: Batch, group: Group, decode: Callable[[Sequence[int]], str] | None
) -> Iterator[str]:
    means = bad.skip.mean_logprobs.get(group.group_id, (None,) * len(group.samples))
    for index, (sample, policy_mean) in enumerate(zip(group.samples, means, strict=True)):
        values = [
            f"reward {'-' if sample.reward is None else _number(sample.reward)}",
            _age(sample, batch.step),
        ]
        behaviour = statistics.fmean(sample.logprobs.numpy().tolist()) if sample.logprobs else None
        values.append(f"mean log-prob {'unknown' if behaviour is None else _number(behaviour)} when sampled")
        if policy_mean is not None:
            values.append(f"{_number(policy_mean)} by the policy")
        if sample.ref_logprob is not None:
            values.append(f"reference sum {_number(sample.ref_logprob)}")
        values.append(f"{sample.num_sampled} tokens, {sample.finish_reason}")
        values += [f"error {_short(sample.error)}"] if sample.error is not None else []
        yield f"    sample {index:<4} {', '.join(values)}"
        yield f"                {_said(sample, decode)}"


def _said(sample: Sample, decode: Callable[[Sequence[int]], str] | None) -> str:
    if decode is not None:
        return _short(decode(sample.sampled_tokens.tolist()))
    if sample.text or not sample.num_sampled:
        return _short(sample.text)
    return f"tokens that begin {sample.sampled_tokens[:8].tolist()}; --tokenizer DIR reads them"


def _age(sample: Sample, step: int) -> str:
    if sample.oldest_version is None:
        return "offline"
    versions = sorted({span.version for span in sample.version_spans})
    of = f"version {versions[0]}" if len(versions) == 1 else f"versions {versions[0]}-{versions[-1]}"
    return f"{of} (staleness {sample_staleness(sample, step)})"


def _number(value: float) -> str:
    return f"{value:.4g}" if math.isfinite(value) else f"!{value}"


def _short(text: str) -> str:
    """Returns the text in one line, in quotes, its line ends and control characters written out."""
    return repr(text if len(text) <= SHOWN_CHARS else f"{text[:SHOWN_CHARS]} ...")
