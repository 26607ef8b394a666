"""What an engine generated as plain tuples, which a scenario in a process of its own writes down as JSON."""

from __future__ import annotations

import msgspec

from actors.episode import Generation
from core.arrays import Float32s, Int32s
from core.records import Sample, VersionSpan


class Said(msgspec.Struct, frozen=True):
    """The tokens of one turn, with their log-probs and versions."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    version_spans: tuple[VersionSpan, ...]
    finish_reason: str
    text: str

    @classmethod
    def of(cls, found: Generation | Sample) -> Said:
        """What was generated, or the sampled tokens of a sample."""
        tokens = found.sampled_tokens if isinstance(found, Sample) else found.tokens.numpy()
        logprobs = found.logprobs.numpy().tolist()
        return cls(
            tuple(tokens.tolist()), tuple(logprobs), found.version_spans, found.finish_reason, found.text
        )


def generated(*tokens: int, version: int = 0, finish_reason: str = "stop", text: str = "x") -> Generation:
    """What an engine might say, with log-probs that are -0.5 times the tokens."""
    spans = (VersionSpan(version, 0, len(tokens)),) if tokens else ()
    logprobs = Float32s.of([-0.5 * token for token in tokens])
    return Generation(Int32s.of(tokens), logprobs, spans, finish_reason, text)
