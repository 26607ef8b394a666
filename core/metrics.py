"""The metrics of a run, by name.

`METRICS` is the one list: the monitor puts every name into every row (null while unknown), report and docs
read the descriptions. Rows may hold more. Fractions are in [0, 1], times in seconds, KL in nats, staleness in
learner steps. What holds for any objective is `objective/*`; a metric of one alone would be named after it,
as `agro/*`.
"""

from __future__ import annotations

import math

from core.staleness import STALENESS_BUCKETS

SOLVE_RATE_BUCKETS: dict[str, tuple[float, float]] = {
    "none": (-math.inf, 0.0),
    "few": (0.0, 0.25),
    "some": (0.25, 0.75),
    "most": (0.75, 1.0),
    "all": (1.0, math.inf),
}
"""Open below, closed above; "most" ends before 1."""

SAMPLES_EVERY_STEPS = 20
"""Steps between tables of samples (samples.jsonl, W&B, report): a run of thousands of steps has hundreds of
them, which a file and a page hold, and a short one still shows how its answers change.
"""


def shows_samples(step: int) -> bool:
    """Says whether samples of this learner step's batch are shown: of the first, and every so many."""
    return step == 1 or step % SAMPLES_EVERY_STEPS == 0


def bucket_metrics() -> dict[str, str]:
    """Returns name and description of the metrics per bucket."""
    described = {}
    for what, buckets, unit in (
        ("staleness", STALENESS_BUCKETS, "learner steps"),
        ("solve_rate", SOLVE_RATE_BUCKETS, "of the group's samples solved"),
    ):
        for name in buckets:
            described[f"by_{what}/loss_{name}"] = (
                f"Mean of -weight * advantage * log pi of the samples with {what} {name} ({unit})."
            )
            described[f"by_{what}/advantage_{name}"] = (
                f"Mean size of their advantages: {what} {name} ({unit})."
            )
    return described


METRICS: dict[str, str] = {
    "progress/step": "Optimizer steps done; the x axis of everything.",
    "progress/samples": "Samples trained on so far.",
    "progress/sampled_tokens": "Sampled tokens trained on so far.",
    "time/wall_s": "Seconds since this start of the run (a continued run starts at 0 again).",
    "time/learner_busy_fraction": "Share of wall time in which the learner trained rather than waited.",
    "time/actor_busy_fraction": "Share of wall time in which the actors generated, mean over the actors that "
    "report.",
    "reward/mean": "Mean reward of the batch, over the samples that have one.",
    "reward/std": "Standard deviation of the rewards of the batch.",
    "reward/error_fraction": "Share of the samples whose reward function failed; they are not reward 0.",
    "reward/timeouts": "Completions so far without a reward because a function did not answer in time.",
    "reward/crashes": "Completions so far without a reward because a function's process died, did not start or took "
    "more memory than it may.",
    "reward/queue_s": "Mean time that groups waited for a reward worker, of those taken up since the row before.",
    "reward/busy_share": "Share of time in which reward workers had something to do, of all that may run "
    "(`rewards.workers`); of the actors' own time, where no function needs a worker.",
    "reward/wait_s": "Time so far that actors had nothing to generate and waited for rewards, all together.",
    "reward/zero_std_fraction": "Share of the groups whose rewards are all equal: no reward signal, only the "
    "KL pull.",
    "eval/solve_rate": "Mean reward on held-out prompts at the newest evaluation of the suite `held_out`. Of any suite "
    "rows hold `eval/SUITE/...` besides: avg@n, pass@k, majority@k, each with its standard error.",
    "eval/policy_version": "Policy version which that evaluation measured.",
    "staleness/mean": "Token-weighted mean age of the batch: learner step minus policy version.",
    "staleness/offline_fraction": "Share of the samples that are offline: they have no age.",
    "staleness/fresh_fraction": "Share of the samples that are wholly of the current policy: staleness 0.",
    "staleness/mixed_version_fraction": "Share of the groups whose tokens come from more than one policy "
    "version.",
    "staleness/max": "Largest token-weighted age of a sample in the batch.",
    "staleness/oldest_token": "Age of the oldest token in the batch; what `buffer.max_staleness` bounds.",
    "weights/version": "Newest published policy version.",
    "weights/publish_s": "Time the learner spent on the newest publication.",
    "weights/apply_s": "Time an actor spent on its newest update; the slowest of the actors.",
    "objective/residual_mean": "Mean residual R = r - beta * log(pi/pi_ref); estimates beta log Z near the "
    "optimum.",
    "objective/residual_std": "Standard deviation of the residual within groups; 0 at the optimum.",
    "objective/reward_std": "Standard deviation of the rewards within groups.",
    "objective/kl_std": "Standard deviation of beta * log(pi/pi_ref) within groups: the pull that the rewards are "
    "up against.",
    "objective/brake_share": "Sum of |beta (ell - group mean)| over the sum of |r - group mean|: how much of its "
    "push the KL takes back.",
    "objective/kl_policy": "KL of policy to reference: the mean log-ratio with the samples weighted by pi/mu, as "
    "if the policy had drawn them.",
    "objective/log_ratio_min": "Smallest sequence log-ratio of policy to reference in the batch: the most "
    "suppressed sample.",
    "objective/importance_weight_mean": "Mean weight on the samples (objective.importance_weight, or the objective's "
    "own ratio).",
    "objective/advantage_abs_mean": "Mean size of the advantages.",
    "objective/ess_fraction": "Effective sample size of the ratios pi/mu over the samples, as a share of their "
    "number.",
    "objective/kl_ref": "Mean sequence log-ratio of policy to reference on the batch.",
    **bucket_metrics(),
    "mismatch/tokens": "Tokens compared: of samples wholly of the learner's own version. Without such "
    "samples mismatch/* are null.",
    "mismatch/mean": "Mean |log pi - log mu| of them, learner and actors, nats; at actors.top_p below 1, "
    "beyond what the cut explains.",
    "mismatch/standard_error": "Standard error of that mean; it counts as above its bound by three of these.",
    "mismatch/max": "The largest of these.",
    "mismatch/share_above_0.1": "Share of them above 0.1 nats.",
    "mismatch/k1": "Mean of -d, d = log pi - log mu: an estimate of KL(mu, pi), by tokens that the actors "
    "drew.",
    "mismatch/k3": "Mean of exp(d) - 1 - d: the same, never negative.",
    "optim/grad_norm": "Gradient norm before clipping.",
    "optim/lr": "Learning rate.",
    "guard/skipped_steps": "Learner steps skipped so far because a number was not finite; events.jsonl names "
    "the groups.",
    "guard/alarms": "Alarms so far: loss, KL or mismatch above what is usual or bound. They stop nothing; "
    "see events.jsonl.",
    "buffer/groups": "Groups stored and ready to be sampled.",
    "buffer/evicted_stale": "Groups evicted so far because a token was older than `buffer.max_staleness`.",
    "buffer/evicted_used": "Groups that left so far after `buffer.uses_per_group` uses.",
    "buffer/evicted_capacity": "Groups evicted so far because the buffer was full.",
    "buffer/evicted_surplus": "Groups that left so far, used at least once, because more than `uses_per_group * "
    "capacity` were stored.",
    "buffer/evicted_equal": "Groups left out so far because all their samples have the same reward "
    "(`buffer.skip_equal_rewards`).",
    "buffer/equal_let_through": "Groups of equal rewards stored so far all the same, because too many had been left out.",
    "buffer/resting": "Prompts that rest now, being solved (`data.curriculum`).",
    "buffer/rested": "Prompts passed over so far because they rested.",
    "buffer/starts": "Starts of buffer processes so far, the shards together: above their number, some were "
    "killed and came back.",
    "buffer/disk_errors": "Writes that a full disk refused so far: above 0 is an alarm; nothing acknowledged "
    "is lost.",
    "buffer/wait_admission_s": "Time that actors have waited for admission so far, all together.",
    "buffer/wait_batch_s": "Time that the learner has waited for groups so far.",
    "checkpoint/saved": "Checkpoints saved since the learner started.",
    "checkpoint/failed": "Checkpoints given up since the learner started (full disk, late rank); see "
    "events.jsonl.",
    "checkpoint/stall_s": "Time the newest checkpoint held up training, waiting for the one before included.",
    "checkpoint/write_s": "Time the newest finished checkpoint took to be durable, beside training.",
    "perf/sampled_tokens_per_s": "Tokens per second sampled by all actors together.",
    "perf/trained_all_tokens_per_s": "Tokens per second trained on, those that were not sampled (prompts) included.",
    "perf/learner_threads": "Threads that the learner's first rank computed with.",
    "completions/mean_length": "Mean number of tokens that a sample of the batch said, in all its turns.",
    "completions/truncated_fraction": "Share of the samples of the batch that a limit cut: of tokens, of turns, "
    "or a deadline.",
    "completions/turns": "Mean number of turns of the policy in a sample of the batch.",
    "completions/tool_calls": "Mean number of tool calls in a sample of the batch.",
    "environment/errors": "Episodes so far whose environment raised or broke its contract; null, as all "
    "environment/*, without environments.",
    "environment/timeouts": "Episodes so far whose environment did not answer within `actors.turn_timeout_s`.",
    "environment/crashes": "Episodes so far whose environment died, or used more memory than it may.",
    "environment/tool_errors": "Tool calls so far that gave no result: not to be read, unknown, with wrong "
    "arguments, or the tool raised. The policy was told.",
    "environment/cut_at_max_turns": "Episodes so far that `actors.max_turns` cut.",
    "environment/cut_at_max_new_tokens": "Episodes so far whose last turn was cut at `actors.max_new_tokens`.",
    "environment/cut_at_max_sequence_tokens": "Episodes so far that the longest sequence cut.",
    "environment/answer_s": "Mean time that an environment took to answer, since the row before.",
    "environment/wait_s": "Time that actors have waited so far because all their episodes waited for "
    "environments, all together.",
    "monitor/null_values": "Values so far that were no finite number; written as null.",
    "monitor/write_errors": "Failed writes to the run directory so far; the lines are kept and tried again.",
    "monitor/lines_lost": "Lines lost so far because the disk was full for too long: of each file the newest "
    "20,000 are kept.",
    "monitor/warnings": "Warnings so far that processes of this run logged; each text is an event when it first comes.",
    "monitor/wandb_dropped": "W&B calls lost so far; metrics.jsonl has them all.",
}
