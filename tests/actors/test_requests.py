"""What is kept of a running request: tokens, log-probs, and which version sampled which of them."""

from types import SimpleNamespace

import numpy as np

from actors.requests import RunningRequest
from core.records import VersionSpan


def output(*tokens: int, reason: str | None = None) -> SimpleNamespace:
    """What a step gave: tokens, with the log-prob -token each, beside that of another column."""
    logprobs = np.array([[-float(token), 0.0] for token in tokens], np.float32).reshape(len(tokens), 2)
    return SimpleNamespace(
        new_token_ids=list(tokens), finish_reason=reason, new_logprobs=SimpleNamespace(logprobs=logprobs)
    )


class Stops:
    """Finds a stop text with the token 9."""

    def update(self, tokens: list[int], stop_terminated: bool) -> str | None:
        assert not stop_terminated
        return "nine" if 9 in tokens else None


def test_a_request_is_what_its_steps_gave_and_versions_span_their_tokens():
    request = RunningRequest("a")
    assert [request.take(output(5), 3), request.take(output(6, 7), 4), request.take(output(1), 4)] == [""] * 3
    assert request.take(output(2, reason="stop"), 6) == "stop"
    generation = request.generation("stop", "text")
    assert generation.tokens.numpy().tolist() == [5, 6, 7, 1, 2]
    assert generation.logprobs.numpy().tolist() == [-5, -6, -7, -1, -2]
    assert generation.version_spans == (VersionSpan(3, 0, 1), VersionSpan(4, 1, 4), VersionSpan(6, 4, 5))
    assert (generation.finish_reason, generation.text) == ("stop", "text")


def test_a_step_without_a_token_ends_it_or_changes_nothing():
    request = RunningRequest("a")
    assert request.take(output(), 1) == ""
    assert request.take(output(reason="error"), 2) == "error"
    assert request.generation("error", "").version_spans == ()


def test_a_stop_text_ends_it_with_the_token_that_said_it():
    request = RunningRequest("a", Stops())
    assert request.take(output(8), 0) == ""
    assert request.take(output(9), 0) == "stop"
    assert request.tokens == [8, 9]
