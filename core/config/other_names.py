"""What people type for a setting that has another name here, and what to type instead.

A name that is merely misspelt is found by its spelling; these are names that other systems use, or that read
as if they were right, and whose nearest spelling would be another setting.
"""

from __future__ import annotations

_SCHEDULE = "write learner.schedule: [10, cosine], warm-up steps and decay"
_STRAGGLERS = "write actors.straggler_timeouts_s: [sample, group], seconds"
_EQUAL = "write buffer.skip_equal_rewards: true"
_TEMPLATE = "write data.template_options: {enable_thinking: false}"
_WANDB = "set WANDB_MODE (online, offline, disabled) and WANDB_PROJECT in the environment"

INSTEAD: dict[str, str] = {
    "agro": "write objective: {name: agro, beta: 0.03}",
    "rivals": "knobs belong to the objective: objective: {name: grpo, clip_low: 0.2}",
    "algorithm": "write objective: {name: agro, beta: 0.03}",
    "trainer": "the section is named learner",
    "rollout": "the section is named actors",
    "wandb": _WANDB,
    "objective.kl_coef": "write objective.beta",
    "objective.lr_coef": "write objective.on_policy_coef",
    "learner.objective": "write objective.name",
    "learner.learning_rate": "write learner.lr",
    "learner.batch_size": "write learner.groups_per_step: groups of actors.group_size samples each",
    "learner.warmup_steps": _SCHEDULE,
    "learner.decay": _SCHEDULE,
    "learner.lora_alpha": "it is 32, whatever the rank is; learner.lr has the same effect",
    "actors.min": "write actors.count: [1, 8], the fewest and the most",
    "actors.max": "write actors.count: [1, 8], the fewest and the most",
    "actors.max_tokens": "write actors.max_new_tokens",
    "actors.max_model_len": "write actors.max_sequence_tokens",
    "actors.max_steps": "write actors.max_turns",
    "actors.max_tool_calling_iterations": "write actors.max_turns",
    "actors.max_assistant_turns": "write actors.max_turns",
    "actors.step_timeout_s": "write actors.turn_timeout_s",
    "actors.n": "write actors.group_size",
    "actors.kv_cache_gib": "write actors.engine_memory, GiB on a CPU and a share of the card on a GPU",
    "actors.gpu_memory_utilization": "write actors.engine_memory, a share of the card",
    "actors.sample_timeout_s": _STRAGGLERS,
    "actors.group_timeout_s": _STRAGGLERS,
    "buffer.max_uses": "write buffer.uses_per_group",
    "buffer.filter_groups": _EQUAL,
    "actors.dynamic_sampling": _EQUAL,
    "actors.dynamic_filtering": _EQUAL,
    "learner.filter_groups": _EQUAL,
    "objective.filter_groups": _EQUAL,
    "buffer.mix": "write buffer.sampler: {stratified: {0-1: 0.5, 2-7: 0.3, 8+: 0.2}}",
    "buffer.min_staleness": "an enforced lag is an experiment: benchmarks/studies/lagged_replay.py",
    "data.apply_chat_template_kwargs": _TEMPLATE,
    "data.chat_template_kwargs": _TEMPLATE,
    "data.answer_key": "write data.columns: {answer: KEY}",
    "data.label_key": "write data.columns: {answer: KEY}",
    "data.input_key": "write data.columns: {prompt: KEY}",
    "data.prompt_key": "write data.columns: {prompt: KEY}",
    "data.train_files": "write data.path, or data.path: {PATH: share} for several",
    "data.prompt_data_probs": "write data.path: {PATH: share}",
    "data.val_files": "write data.eval_path",
    "data.split": "write data.path: PATH?split=NAME",
    "data.eval_split": "write data.eval_path: PATH?split=NAME",
    "data.offline_share": "write data.offline: LOG?share=0.5",
    "weights.every": "write weights.publish_every",
    "weights.adapters": "write weights.transport: adapters",
    "checkpoint.keep": "the newest two are kept",
    "rewards.num_workers": "write rewards.workers",
    "rewards.reward_funcs": "write rewards.functions: {exact_match: 1.0}, names and weights",
    "rewards.reward_weights": "write rewards.functions: {exact_match: 1.0}, names and weights",
    "rewards.limit": "write rewards.concurrency, or give a judge calls_per_minute",
    "eval.samples": "write eval.sampling: [4, 1.0], samples and temperature",
    "eval.temperature": "write eval.sampling: [4, 1.0], samples and temperature",
    "eval.rows": "write data.eval_rows",
    "eval.source": "write eval.suites: {math: {path: ..., samples: 8}}",
    "eval.sources": "write eval.suites: {math: {path: ..., samples: 8}}",
    "eval.datasets": "write eval.suites: {math: {path: ..., samples: 8}}",
    "eval.interval": "write eval.every, learner steps",
    "eval.metric_for_best_model": "write eval.keep_best: held_out/avg@4",
    "checkpoint.metric_for_best_model": "write eval.keep_best: held_out/avg@4",
    "checkpoint.save_best": "write eval.keep_best: held_out/avg@4",
}
