"""The configuration: one pydantic model per room, one YAML file, `section.key=value` overrides.

Unknown keys are rejected with the nearest valid name. Values derived from others are properties that show the formula.
`docs/config.md` is generated from the descriptions here (`launch.py config-reference`).
"""

from __future__ import annotations

import math
import re
from typing import Any, Literal

import pydantic
from pydantic import BaseModel, ConfigDict, Field

MAX_VOTE_SUBSETS = 20_000
"""Votes of `majority@k` are counted subset by subset."""


class Section(BaseModel):
    """Base of all sections: frozen, unknown keys forbidden, numbers not guessed from strings."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class RunConfig(Section):
    """The run as a whole."""

    name: str = Field("agro", pattern=r"^[A-Za-z0-9._-]+$", description="Name of the run; also of its W&B run.")
    dir: str | None = Field(None, description="Run directory; None: `runs/<name>-<time>`.")
    seed: int = Field(0, ge=0, description="Seed of the prompt stream, the sampling and the learner.")
    steps: int = Field(100, ge=1, description="Optimizer steps.")
    timeout_s: float = Field(600.0, gt=0, description="Limit of every wait on another process; its error names who did not answer.")
    deterministic: bool = Field(
        False, description="The learner gives the same parameters bit for bit from the same batches (CPU), also through kills; slower."
    )


class ModelConfig(Section):
    """The policy: any Hugging Face causal language model."""

    path: str = Field(..., description="Local Hugging Face directory, or a hub id.")
    make: str | None = Field(
        None, pattern=r"^[\w.]+:\w+$", description="`module:function` called with the path when the directory does not exist yet."
    )
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="Precision of weights in learner and actors.")
    attention: Literal["sdpa", "eager", "flash_attention_2"] = Field("sdpa", description="Attention of the learner.")
    trust_remote_code: bool = Field(False, description="Run Python code that comes with the model. Off unless you read it.")


class DataConfig(Section):
    """Prompts: local jsonl or parquet (file or directory) or a hub id, read by `datasets`."""

    path: str | None = Field(
        None,
        description="Training prompts: a jsonl/parquet file, a directory with `<split>.jsonl`/`.parquet`, or a hub id (`id:subset`). "
        "Needed unless all samples come from `offline`.",
    )
    split: str = Field("train", description="Split to train on (directories and hub ids).")
    eval_path: str | None = Field(None, description="Held-out prompts; None: the same `path`, at `eval_split`.")
    eval_split: str = Field("test", description="Split to evaluate on (directories and hub ids).")
    eval_rows: int = Field(128, ge=0, description="Held-out rows evaluated, the first so many; 0 switches evaluation off.")
    chat_template: bool = Field(True, description="Render prompts with the tokenizer's chat template; off: the text as it is.")
    system_prompt: str | None = Field(None, description="System message put before every prompt (chat template only).")
    max_prompt_tokens: int = Field(512, ge=1, description="Longer prompts are bad rows: reported, never cut.")
    on_bad_row: Literal["stop", "skip"] = Field("stop", description="`skip` leaves bad rows out and counts them.")
    offline: str | None = Field(
        None, description="Generations of anybody to train on: jsonl/parquet with prompt, completion and, if given, reward and group."
    )
    offline_share: float = Field(1.0, gt=0, le=1, description="Share of each group that comes from `offline`; 1: no sample is generated.")


class RewardFunction(Section):
    """One reward function and its weight in the sum."""

    name: str = Field(..., description="Built-in name (`exact_match`, `math_verify`) or `module:function`.")
    weight: float = Field(1.0, description="Weight in the sum of all functions.")


class RewardsConfig(Section):
    """Reward functions, run in killable worker processes."""

    functions: tuple[RewardFunction, ...] = Field(..., min_length=1, description="The functions; the reward is their weighted sum.")
    timeout_s: float = Field(10.0, gt=0, description="A group not scored within this is killed and marked `error`.")
    max_error_fraction: float = Field(0.2, ge=0, le=1, description="The run stops when more than this share of samples fails.")


class ActorsConfig(Section):
    """Rollout actors: one vLLM engine each."""

    count: int = Field(
        1, ge=0, description="Rollout actors at the start; 0 only where all samples are offline (nothing is evaluated then)."
    )
    min: int = Field(1, ge=1, description="Autoscaling keeps at least so many.")
    max: int | None = Field(None, ge=1, description="Autoscaling adds actors up to so many while the learner waits; None: no autoscaling.")
    num_cpus: float = Field(1.0, ge=0, description="CPUs of one actor (Ray's logical CPUs, fractions allowed).")
    num_gpus: float = Field(0.0, ge=0, description="GPUs of one actor: 0 generates on the CPU, 1 on a GPU, a fraction shares one.")
    group_size: int = Field(8, ge=2, description="Samples per prompt (n; AGRO needs at least 2).")
    slots: int = Field(128, ge=1, description="Sequences an engine generates at once (vLLM max_num_seqs).")
    max_new_tokens: int = Field(256, ge=1, description="Completion limit; a completion cut here is kept as truncated.")
    temperature: float = Field(1.0, gt=0, description="Sampling temperature, also of the learner's log-probs.")
    top_p: float = Field(1.0, gt=0, le=1, description="Nucleus; below 1 breaks coverage (a warning says so).")
    kv_cache_gib: float = Field(1.0, gt=0, description="KV cache of a CPU engine, GiB.")
    gpu_memory_utilization: float = Field(0.85, gt=0, le=1, description="Share of GPU memory a GPU engine may take.")
    on_update: Literal["continue", "drain", "abort"] = Field(
        "continue", description="Unfinished generations at new weights: go on with them, finish on the old ones first, or start again."
    )
    sample_timeout_s: float | None = Field(None, gt=0, description="A sample generated for longer than this ends as truncated.")
    group_timeout_s: float | None = Field(
        None, gt=0, description="A group does not wait longer than this for its last samples: it goes in with those it has."
    )


class BufferConfig(Section):
    """The shared replay buffer."""

    sampler: Literal["uniform", "fresh", "oldest", "stratified", "priority"] = Field(
        "uniform", description="Which stored groups a batch takes (buffer/sampling.py)."
    )
    mix: dict[str, float] = Field(
        {"0-1": 0.5, "2-7": 0.3, "8+": 0.2}, description="Share of a batch by staleness in learner steps, for sampler `stratified`."
    )
    samples_per_insert: tuple[float, float] | None = Field(
        None, description="Band of batch entries per inserted group: above it the learner waits, below it the actors; None: no band."
    )
    max_uses: int = Field(1, ge=1, description="How often a group is trained on before it leaves.")
    min_staleness: int = Field(
        0, ge=0, description="Learner steps; a batch takes no group younger than this while it can be had: an enforced lag, for studies."
    )
    max_staleness: int = Field(16, ge=0, description="Learner steps; groups with an older token are evicted and counted.")
    capacity: int = Field(
        256, ge=1, description="Groups not yet trained on that may exist, stored or being generated: backpressure on actors."
    )
    fsync: Literal["normal", "full"] = Field(
        "normal", description="`normal`: what was acknowledged survives any process; `full`: a power cut too, at a third of the speed."
    )
    num_shards: int = Field(1, ge=1, le=64, description="Buffer processes; more than one where one cannot take in what the actors make.")

    @property
    def mix_ranges(self) -> tuple[tuple[int, int | None, float], ...]:
        """`mix` as (first, last, share), learner steps, youngest first; last None: without end."""
        ranges = []
        for name, share in self.mix.items():
            first, _, last = name.rstrip("+").partition("-")
            ranges.append((int(first), None if name.endswith("+") else int(last or first), share))
        return tuple(sorted(ranges, key=lambda entry: entry[0]))

    @pydantic.model_validator(mode="after")
    def _mix_is_a_partition(self) -> BufferConfig:
        if bad := [name for name in self.mix if not re.fullmatch(r"\d{1,9}(-\d{1,9}|\+)?", name)]:
            raise ValueError(f"buffer.mix: {bad[0][:40]!r} is no range of staleness; write for example {{0-1: 0.5, 2-7: 0.3, 8+: 0.2}}.")
        total, ranges = sum(self.mix.values()), self.mix_ranges
        if any(share <= 0 for share in self.mix.values()) or abs(total - 1) > 1e-6:
            raise ValueError(f"buffer.mix: the shares are {list(self.mix.values())}; expected positive numbers whose sum is 1.")
        for (first, last, _), after in zip(ranges, [*ranges[1:], None], strict=True):
            if (last is not None and last < first) or (after is not None and (last is None or last >= after[0])):
                raise ValueError(f"buffer.mix: {list(self.mix)}: the range from {first} is empty or overlaps another one.")
        return self


class LearnerConfig(Section):
    """The learner: DeepSpeed ZeRO-3 ranks."""

    ranks: int = Field(1, ge=1, description="ZeRO-3 ranks.")
    num_cpus: float = Field(1.0, ge=0, description="CPUs of one rank.")
    num_gpus: float = Field(0.0, ge=0, description="GPUs of one rank: 0 trains on the CPU, 1 on a GPU, a fraction shares one.")
    objective: str = Field("agro", description="File name under learner/objectives/.")
    groups_per_step: int = Field(32, ge=1, description="Groups of one optimizer step (P).")
    lora_rank: int = Field(0, ge=0, description="Train low-rank adapters of this rank (peft) instead of all weights; 0: all weights.")
    lora_alpha: float = Field(32.0, gt=0, description="Scale of the adapters: alpha / rank.")
    lr: float = Field(1e-6, gt=0, description="Peak learning rate (AdamW).")
    warmup_steps: int = Field(0, ge=0, description="Steps of linear warm-up.")
    decay: Literal["constant", "linear", "cosine"] = Field(
        "constant", description="After the warm-up: constant, or down to 10 % of the peak at the last step."
    )
    weight_decay: float = Field(0.0, ge=0, description="AdamW weight decay.")
    grad_clip: float = Field(1.0, gt=0, description="Gradient norm limit.")
    micro_batch_tokens: int = Field(8192, ge=16, description="Token budget of one forward pass of one rank, padding included.")
    layout: Literal["packed", "padded"] = Field(
        "packed",
        description="`packed` joins sequences without padding; models that cannot keep them apart want `padded`.",
    )
    offload: Literal["none", "reference", "all"] = Field(
        "reference",
        description="From a GPU into CPU memory between uses: models that are not trained (reference, proximal policy), or all.",
    )
    gradient_checkpointing: bool = Field(False, description="Recompute activations in the backward pass.")


class AgroConfig(Section):
    """The objective (learner/objectives/agro.py; docs/objectives.md gives formulas and reasons)."""

    beta: float = Field(0.03, ge=0, description="Strength of the pull towards the reference; 0: leave-one-out REINFORCE.")
    weight: Literal["none", "truncated", "token", "geometric"] = Field(
        "token",
        description="Weight after centring, for lagged data: min(cap, pi/mu) of the sequence, of each token, or of the mean token.",
    )
    weight_cap: float = Field(5.0, gt=0, description="Cap of the weight; docs/objectives.md says what a lower one costs.")
    lr_coef: float = Field(0.0, ge=0, le=1, description="On-policy term's coefficient; 0: off-policy AGRO, 1: its literal on-policy form.")
    lr_baseline: Literal["none", "loo", "running"] = Field(
        "loo", description="Baseline of the on-policy term; `running`: the prompt's variance in earlier steps."
    )
    lr_gate: Literal["fresh", "weighted"] = Field(
        "fresh", description="The on-policy term acts on samples of staleness 0 only, or on all, times min(weight_cap, pi/mu)."
    )
    zero_std: Literal["keep", "drop"] = Field("keep", description="Groups whose rewards are all equal still carry the KL pull.")
    duplicates: Literal["keep", "drop"] = Field(
        "keep", description="`drop` counts equal completions of a group once; independent samples may be equal, replayed ones should not."
    )
    target: str = Field(
        "mean",
        pattern=r"^(mean|(pass|majority)@[1-9][0-9]*)$",
        description="What a prompt's samples are trained for: `mean` reward, `pass@k` (best of k) or `majority@k` (vote of k).",
    )
    ref_update_every: int = Field(0, ge=0, description="Learner steps between moves of the reference to the policy; 0: it never moves.")

    @property
    def target_k(self) -> int:
        """k of `pass@k` and `majority@k`; 1 for `mean`."""
        return int(self.target.partition("@")[2] or 1)


class RivalsConfig(Section):
    """What the other objectives under learner/objectives/ take besides `agro.beta`, their KL coefficient."""

    clip_low: float = Field(0.2, gt=0, lt=1, description="Ratios below 1 - clip_low are clipped (PPO's epsilon).")
    clip_high: float = Field(0.2, gt=0, description="Ratios above 1 + clip_high are clipped.")
    is_correction: Literal["none", "tis_token", "tis_sequence", "mis_token", "mis_sequence"] = Field(
        "none", description="Importance weights against stale data: truncated at `is_cap` (tis) or masked above it (mis)."
    )
    is_cap: float = Field(2.0, gt=0, description="Cap of the importance weights.")
    proximal_every: int = Field(4, ge=1, description="Steps between copies of the policy that serve as its proximal policy.")
    baseline_shift: float = Field(0.1, ge=0, description="How far asymre's baseline lies below the group's mean reward.")


MAX_ADAPTER_RANK = 512


class WeightsConfig(Section):
    """Weight snapshots from the learner to the actors."""

    publish_every: int = Field(2, ge=1, description="Learner steps between snapshots.")
    transport: Literal["snapshot", "nccl", "ipc"] = Field(
        "snapshot",
        description="`snapshot`: pulled through host memory; `nccl`: broadcast to a fixed set of GPU actors; `ipc`: within one GPU.",
    )
    adapters: Literal["merged", "alone"] = Field(
        "merged",
        description="With learner.lora_rank: `merged` into the weights, or `alone`, for vLLM to apply: little to send, and no rounding.",
    )
    bucket_mib: float = Field(64.0, gt=0, description="Size of one gathered bucket, MiB: bounds the memory of a publication.")


class CheckpointConfig(Section):
    """Checkpoints of the learner; buffer and prompt stream are durable by themselves and tied to them."""

    every: int = Field(50, ge=0, description="Learner steps between checkpoints; 0: none, and a run that dies starts again.")
    keep: int = Field(2, ge=1, description="Newest checkpoints kept; the older of them is used when the newest does not verify.")


class EvalConfig(Section):
    """Held-out evaluation, by the actors, at a named policy version."""

    every: int = Field(50, ge=1, description="Learner steps between evaluations (rounded up to the next publication).")
    samples: int = Field(4, ge=1, description="Completions per held-out prompt.")
    temperature: float = Field(1.0, ge=0, description="Sampling temperature of evaluations; 0: greedy.")


class MonitorConfig(Section):
    """metrics.jsonl always; W&B when it can; the terminal."""

    wandb: Literal["auto", "online", "offline", "off"] = Field("auto", description="`auto`: online if an API key is present, else offline.")
    project: str = Field("agro", description="W&B project.")
    samples_every: int = Field(20, ge=1, description="Steps between sample tables (samples.jsonl, W&B, report).")

    @pydantic.field_validator("wandb", mode="before")
    @classmethod
    def _off_without_quotes(cls, value: Any) -> Any:
        return "off" if value is False else value  # YAML reads a bare `off` as false.


class Config(Section):
    """Everything a run needs."""

    run: RunConfig = RunConfig()
    model: ModelConfig
    data: DataConfig
    rewards: RewardsConfig
    actors: ActorsConfig = ActorsConfig()
    buffer: BufferConfig = BufferConfig()
    learner: LearnerConfig = LearnerConfig()
    agro: AgroConfig = AgroConfig()
    rivals: RivalsConfig = RivalsConfig()
    weights: WeightsConfig = WeightsConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    eval: EvalConfig = EvalConfig()
    monitor: MonitorConfig = MonitorConfig()

    @property
    def admitted_groups(self) -> int:
        """Groups that may exist untrained: `min(capacity, (max_staleness + 1) * groups_per_step)`.

        A group started when this many are ahead of it can be trained at most `max_staleness` steps later, so that nothing is born
        too stale (publication lag excepted). The sampler `oldest` does so; others leave some groups until they are stale, counted.
        """
        return min(self.buffer.capacity, (self.buffer.max_staleness + 1) * self.learner.groups_per_step)

    @property
    def is_offline(self) -> bool:
        """Whether every sample comes from `data.offline`: the rollout actors, if any, only evaluate."""
        return self.data.offline is not None and self.data.offline_share == 1

    @property
    def offline_samples(self) -> int:
        """Offline samples of each group: `round(offline_share * group_size)`; 0 without `data.offline`."""
        return round(self.data.offline_share * self.actors.group_size) if self.data.offline is not None else 0

    @property
    def max_sequence_tokens(self) -> int:
        """Longest sequence: `max_prompt_tokens + max_new_tokens`."""
        return self.data.max_prompt_tokens + self.actors.max_new_tokens

    @pydantic.model_validator(mode="after")
    def _rooms_fit_together(self) -> Config:
        if self.buffer.capacity < self.learner.groups_per_step:
            raise ValueError(
                f"buffer.capacity = {self.buffer.capacity} is below learner.groups_per_step = {self.learner.groups_per_step}: "
                "a batch could never be filled. Raise buffer.capacity or lower learner.groups_per_step."
            )
        if self.admitted_groups < self.buffer.num_shards:
            raise ValueError(
                f"buffer.num_shards = {self.buffer.num_shards} is above the {self.admitted_groups} groups that may be under way, "
                "min(buffer.capacity, (buffer.max_staleness + 1) * learner.groups_per_step): some shards would never lease. Lower it."
            )
        if self.learner.micro_batch_tokens < self.max_sequence_tokens:
            raise ValueError(
                f"learner.micro_batch_tokens = {self.learner.micro_batch_tokens} is below the longest sequence, "
                f"data.max_prompt_tokens + actors.max_new_tokens = {self.max_sequence_tokens}. Raise it to at least that."
            )
        if self.data.system_prompt is not None and not self.data.chat_template:
            raise ValueError(
                "data.system_prompt is set but data.chat_template = false: nothing would put it before the prompts. "
                "Set data.chat_template=true or remove data.system_prompt."
            )
        return self

    @pydantic.model_validator(mode="after")
    def _objective_fits(self) -> Config:
        agro, n = self.agro, self.actors.group_size
        if agro.lr_coef > 0 and agro.beta == 0:
            raise ValueError("agro.lr_coef > 0 needs agro.beta > 0: the on-policy term is divided by beta.")
        if agro.ref_update_every and agro.beta == 0:
            raise ValueError(f"agro.ref_update_every = {agro.ref_update_every} with agro.beta = 0: there is no reference to move.")
        if self.learner.objective == "agro" and self.rivals.is_correction != "none":
            raise ValueError(
                f"rivals.is_correction = {self.rivals.is_correction} is for the other objectives; AGRO's weights are agro.weight and "
                "agro.weight_cap. Remove it, or choose another learner.objective."
            )
        if agro.target_k > n:
            raise ValueError(f"agro.target = {agro.target} needs k <= actors.group_size = {n}. Raise actors.group_size or lower k.")
        if agro.target.startswith("majority") and math.comb(n, agro.target_k) > MAX_VOTE_SUBSETS:
            raise ValueError(
                f"agro.target = {agro.target} of actors.group_size = {n}: {math.comb(n, agro.target_k)} subsets to vote in each group, "
                f"more than {MAX_VOTE_SUBSETS}. Choose a smaller k or group_size."
            )
        if agro.target != "mean" and agro.lr_coef > 0:
            raise ValueError(f"agro.target = {agro.target} and agro.lr_coef = {agro.lr_coef} do not go together. Set agro.lr_coef=0.")
        if agro.target != "mean" and self.learner.objective != "agro":
            raise ValueError(
                f"agro.target = {agro.target}: objective {self.learner.objective} knows the mean only. Set learner.objective=agro."
            )
        return self

    @pydantic.model_validator(mode="after")
    def _samples_come_from_somewhere(self) -> Config:
        data = self.data
        if data.offline is None and data.path is None:
            raise ValueError("data.path is missing; give training prompts, or data.offline for generations to train on")
        if not self.is_offline and data.path is None:
            raise ValueError(f"data.offline_share = {data.offline_share}: the other samples are generated, from prompts: set data.path.")
        if not self.is_offline and self.actors.count == 0:
            raise ValueError("actors.count = 0: nothing would generate. Set it to 1 or more, or train on data.offline alone.")
        if data.offline is not None and not self.is_offline and not 0 < self.offline_samples < self.actors.group_size:
            raise ValueError(
                f"data.offline_share = {data.offline_share} of actors.group_size = {self.actors.group_size} rounds to "
                f"{self.offline_samples} samples. Choose a share that leaves at least one offline and one fresh sample."
            )
        if data.offline is None and data.offline_share < 1:
            raise ValueError(f"data.offline_share = {data.offline_share} without data.offline: there is nothing to take a share of.")
        return self

    @pydantic.model_validator(mode="after")
    def _actors_can_scale(self) -> Config:
        actors = self.actors
        if actors.max is not None and not actors.min <= actors.count <= actors.max:
            raise ValueError(
                f"actors.count = {actors.count} is not within actors.min = {actors.min} and actors.max = {actors.max}. "
                "Autoscaling starts with actors.count."
            )
        return self

    @pydantic.model_validator(mode="after")
    def _band_can_be_held(self) -> Config:
        buffer, size = self.buffer, self.learner.groups_per_step
        if buffer.samples_per_insert is None:
            return self
        low, high = buffer.samples_per_insert
        if not 0 <= low <= high or high < 1:
            raise ValueError(f"buffer.samples_per_insert = [{low:g}, {high:g}]: expected 0 <= low <= high and high >= 1.")
        if high > buffer.max_uses:
            raise ValueError(
                f"buffer.samples_per_insert = [{low:g}, {high:g}]: no group is used more than buffer.max_uses = {buffer.max_uses} times. "
                "Raise buffer.max_uses or lower the band."
            )
        if buffer.num_shards > 1 or buffer.min_staleness:
            raise ValueError("buffer.samples_per_insert goes with neither buffer.num_shards > 1 nor buffer.min_staleness. Remove it.")
        if self.admitted_groups < size:
            raise ValueError(f"buffer.samples_per_insert needs min(capacity, ...) = {self.admitted_groups} >= groups_per_step = {size}.")
        return self

    @pydantic.model_validator(mode="after")
    def _lag_can_be_held(self) -> Config:
        buffer = self.buffer
        if buffer.min_staleness and buffer.num_shards > 1:
            raise ValueError(
                f"buffer.min_staleness = {buffer.min_staleness} with buffer.num_shards = {buffer.num_shards}: a lag is held by one shard "
                "only. Set buffer.num_shards=1."
            )
        if not buffer.min_staleness:
            return self
        if self.is_offline:
            raise ValueError(f"buffer.min_staleness = {buffer.min_staleness}: offline samples have no age. Remove it.")
        # A version is published every so many steps: what is old enough comes in strides.
        oldest = buffer.min_staleness + self.weights.publish_every - 1
        groups = (buffer.min_staleness + 1) * self.learner.groups_per_step
        if buffer.max_staleness < oldest or buffer.capacity < groups:
            raise ValueError(
                f"buffer.min_staleness = {buffer.min_staleness} needs buffer.max_staleness >= min_staleness + weights.publish_every - 1 = "
                f"{oldest} (here {buffer.max_staleness}) and buffer.capacity >= (min_staleness + 1) * learner.groups_per_step = {groups} "
                f"(here {buffer.capacity})."
            )
        return self

    @pydantic.model_validator(mode="after")
    def _devices_fit(self) -> Config:
        actors, learner = self.actors, self.learner
        if actors.num_gpus > 1:
            # vLLM wants a bundle for each GPU, and calls that can be pickled; neither is built, and no machine was there to try it on.
            raise ValueError(
                f"actors.num_gpus = {actors.num_gpus:g}: an engine over several GPUs is not supported. Set actors.num_gpus=1 and raise "
                "actors.count instead."
            )
        if learner.num_gpus > 1:
            raise ValueError(
                f"learner.num_gpus = {learner.num_gpus}: one rank uses one GPU. Set learner.num_gpus=1 and raise learner.ranks instead."
            )
        if self.model.attention == "flash_attention_2" and (learner.num_gpus == 0 or self.model.dtype != "bfloat16"):
            raise ValueError(
                f"model.attention = flash_attention_2 needs learner.num_gpus > 0 (here {learner.num_gpus:g}) and model.dtype = bfloat16 "
                f"(here {self.model.dtype}). Use model.attention=sdpa otherwise."
            )
        return self

    @pydantic.model_validator(mode="after")
    def _weights_can_travel(self) -> Config:
        actors, learner, transport = self.actors, self.learner, self.weights.transport
        name = f"weights.transport = {transport}"
        if self.weights.adapters == "alone" and not 0 < learner.lora_rank <= MAX_ADAPTER_RANK:
            raise ValueError(
                f"weights.adapters = alone needs learner.lora_rank from 1 to {MAX_ADAPTER_RANK}, which is what vLLM applies; it is "
                f"{learner.lora_rank}. Set it, or weights.adapters=merged."
            )
        if transport == "snapshot":
            return self
        if self.weights.adapters == "alone":
            raise ValueError(f"{name} pushes whole models, but weights.adapters = alone. Set one of them to snapshot or merged.")
        if actors.num_gpus == 0 or learner.num_gpus == 0:
            raise ValueError(
                f"{name} goes from GPU to GPU, but actors.num_gpus = {actors.num_gpus:g} and learner.num_gpus = {learner.num_gpus:g}. "
                "Give both a GPU, or set weights.transport=snapshot, which needs none."
            )
        if actors.on_update == "drain":
            raise ValueError(
                f"{name} with actors.on_update = drain: the learner would wait for the longest generation of any actor. "
                "Set actors.on_update=continue or abort, or weights.transport=snapshot."
            )
        gpus = learner.num_gpus + (actors.max or actors.count) * actors.num_gpus
        if transport == "ipc" and (learner.ranks > 1 or gpus > 1):
            raise ValueError(
                f"{name} stays within one GPU, but {learner.ranks} learner ranks and {actors.max or actors.count} actors ask for {gpus:g}. "
                "Set learner.ranks=1 and fractions that add up to 1, such as learner.num_gpus=0.5 actors.num_gpus=0.5, "
                "or weights.transport=nccl."
            )
        if transport == "nccl" and (actors.num_gpus < 1 or learner.num_gpus < 1):
            raise ValueError(
                f"{name} takes no two processes on one GPU, but actors.num_gpus = {actors.num_gpus:g} and learner.num_gpus = "
                f"{learner.num_gpus:g}. Give each a whole one, or set weights.transport=ipc or snapshot."
            )
        return self

    def warnings(self) -> list[str]:
        """What is allowed but probably not meant, one sentence each."""
        found = []
        if self.actors.top_p < 1:
            found.append(
                f"actors.top_p = {self.actors.top_p}: truncated sampling does not cover the reference: the optimum is another one."
            )
        if self.agro.lr_coef > 2 * self.agro.beta:
            found.append(
                f"agro.lr_coef = {self.agro.lr_coef} > 2 * beta = {2 * self.agro.beta}: for prompts solved less than half the time "
                "the on-policy term pushes correct answers down (docs/objectives.md, hazard)."
            )
        found += self._unused_knobs()
        if self.agro.lr_coef > 0 and self.agro.lr_gate == "fresh" and self.weights.publish_every > 1:
            found.append(
                f"agro.lr_coef = {self.agro.lr_coef} with agro.lr_gate = fresh and weights.publish_every = {self.weights.publish_every}: "
                "few samples are ever of the current policy (staleness/fresh_fraction); on the others the on-policy term does nothing."
            )
        if self.agro.target != "mean" and self.agro.target_k == self.actors.group_size:
            found.append(
                f"agro.target = {self.agro.target} with actors.group_size = {self.actors.group_size}: with k = n nothing is left to "
                "centre with on off-policy data. Raise actors.group_size."
            )
        if self.buffer.max_staleness < self.weights.publish_every:
            found.append(
                f"buffer.max_staleness = {self.buffer.max_staleness} < weights.publish_every = {self.weights.publish_every}: "
                "most groups will be evicted as stale."
            )
        if self.learner.warmup_steps >= self.run.steps:
            found.append(
                f"learner.warmup_steps = {self.learner.warmup_steps} >= run.steps = {self.run.steps}: the peak learning rate is not passed."
            )
        if self.learner.offload == "all" and self.learner.num_gpus == 0:
            found.append("learner.offload = all with learner.num_gpus = 0: everything is in CPU memory anyway.")
        if not any(function.weight for function in self.rewards.functions):
            found.append("rewards.functions: every weight is 0, so that nothing is rewarded.")
        return found

    def _unused_knobs(self) -> list[str]:
        """Settings other than the default that the chosen objective does not look at."""
        is_agro = self.learner.objective == "agro"
        section, of_section = ("rivals", self.rivals) if is_agro else ("agro", self.agro)
        names = RivalsConfig.model_fields if is_agro else _OWN_KNOBS_OF_AGRO
        changed = [name for name in names if getattr(of_section, name) != type(of_section).model_fields[name].default]
        unused = ", ".join(f"{section}.{name} = {getattr(of_section, name)}" for name in changed)
        return [f"{unused}: learner.objective = {self.learner.objective} does not use that."] if unused else []


_OWN_KNOBS_OF_AGRO = ("weight", "weight_cap", "lr_coef", "lr_baseline", "lr_gate", "zero_std", "duplicates")
