"""What an engine sampled, beside what transformers computes of it with the weights of a version."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from tests.support.scenarios.engine_scenario import SLOTS, Generated, weights

TOLERANCE_NATS = 1e-4


class Parity:
    """Samples by phase, and transformers on the same weights to compare them with."""

    def __init__(self, model_dir: Path, phases: Mapping[str, Sequence[Generated]]) -> None:
        self.phases = phases
        self._model_dir = model_dir
        self._model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
        self.tied = self._model.config.tie_word_embeddings

    def phase(self, name: str) -> list[Generated]:
        return [*self.phases[name]]

    @torch.no_grad()
    def reference(self, generated: Generated, version: int) -> torch.Tensor:
        """Log-probs [tokens, V] by transformers with the weights of `version` at the sample's temperature."""
        self._model.load_state_dict(weights(self._model_dir, version), strict=not self.tied)
        ids = (*generated.prompt_ids, *generated.sample.token_ids)
        logits = self._model(torch.tensor([ids])).logits[0, len(generated.prompt_ids) - 1 : -1]
        return (logits / (generated.temperature or 1.0)).log_softmax(-1)

    def errors_nats(self, generated: Generated, version: int) -> torch.Tensor:
        """|transformers - engine| of every sampled token."""
        return self.differences_nats(generated, version).abs()

    def differences_nats(self, generated: Generated, version: int) -> torch.Tensor:
        token_ids = torch.tensor(generated.sample.token_ids)
        reference = self.reference(generated, version).gather(1, token_ids[:, None])[:, 0]
        return reference - torch.tensor(generated.sample.logprobs)

    def worst_nats(self, phase: str, version: int) -> float:
        return max(self.errors_nats(generated, version).max().item() for generated in self.phase(phase))

    def check_fresh(self, version: int) -> None:
        """Fresh samples have the log-probs of their version, and of no other, or this would show nothing."""
        phase = f"version {version}"
        samples = self.phase(phase)
        assert {generated.temperature for generated in samples} == {1.0, 0.7}
        assert {span.version for generated in samples for span in generated.sample.version_spans} == {version}
        assert self.worst_nats(phase, version) < TOLERANCE_NATS
        if version:
            assert self.worst_nats(phase, version - 1) > 1.0

    def check_in_flight(self) -> None:
        """Samples under way at an update finish and name both versions; later ones share no prefix."""
        samples = self.phase("in flight")
        crossing = [generated for generated in samples if len(generated.sample.version_spans) == 2]
        assert len(samples) == 2 * SLOTS
        assert crossing
        for generated in crossing:
            before, after = generated.sample.version_spans
            assert (before.version, after.version) == (0, 1)
            assert self.errors_nats(generated, 0)[: before.end].max() < TOLERANCE_NATS
        later = self.phase("after an update in flight")
        assert all(generated.version == 1 for generated in later)
        assert self.worst_nats("after an update in flight", 1) < TOLERANCE_NATS
