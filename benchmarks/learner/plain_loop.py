"""What the learner is measured against: plain PyTorch."""

from __future__ import annotations

from typing import Any

from benchmarks.learner.cases import load_model


class PlainLoop:
    """The shortest loop that takes the same optimizer steps."""

    def __init__(self, config: Any, device: str, *, autocast: bool = False) -> None:
        import torch

        from learner.objectives import load_objective
        from learner.policy.attention import install_packed_sdpa

        self._config, self._device, self._autocast = config, device, autocast
        self._objective = load_objective(config.objective)
        self.module: Any = load_model(config, device)
        install_packed_sdpa(self.module)
        self._optimizer = torch.optim.AdamW(
            self.module.parameters(), lr=config.learner.lr, betas=(0.9, 0.99), weight_decay=0.0, fused=True
        )

    def step(self, batch: Any) -> None:
        """Takes one optimizer step."""
        import torch

        from learner.objectives import TokenBatch
        from learner.step.packing import collate, plan_micro_batches
        from learner.step.samples import sequences_of

        rows = [(group, sample) for group in batch.groups for sample in group.samples]
        sequences = [sequences_of(sample)[0] for _, sample in rows]  # One segment each.
        budget, layout = self._config.learner.micro_batch_tokens, self._config.learner.layout
        plan = plan_micro_batches(
            [s.num_tokens for s in sequences], [group.group_id for group, _ in rows], budget, layout
        )
        for micro in plan:
            mine = [sequences[i] for i in micro.indices]
            inputs = collate(mine, layout, 0, self._device, shares_beginnings=True)
            with torch.autocast(torch.device(self._device).type, torch.bfloat16, enabled=self._autocast):
                logits = self.module(**inputs.model_kwargs(), packing=inputs.packing).logits[0].float()
            logprobs_T = logits.log_softmax(-1).gather(-1, inputs.targets_T[:, None])[:, 0]
            members = [rows[i] for i in micro.indices]
            token_batch = TokenBatch(
                logprobs_T=logprobs_T,
                behaviour_logprobs_T=torch.zeros_like(logprobs_T),
                sequence_T=inputs.sequence_T,
                rewards_N=torch.tensor([sample.reward for _, sample in members], device=self._device),
                ref_logprobs_N=torch.tensor(
                    [sample.ref_logprob for _, sample in members], device=self._device
                ),
                groups_N=torch.tensor([group.group_id for group, _ in members], device=self._device),
                staleness_N=torch.zeros(len(members), device=self._device),
                num_groups=len(batch.groups),
            )
            self._objective.loss(token_batch)[0].backward()
        torch.nn.utils.clip_grad_norm_(self.module.parameters(), self._config.learner.grad_clip)
        self._optimizer.step()
        self._optimizer.zero_grad()
