"""The configuration: one pydantic model per room, one YAML file, `section.key=value` overrides.

Unknown keys are rejected with the nearest valid name. Values derived from others are properties that show the formula.
`docs/config.md` is generated from the descriptions here (`launch.py config-reference`).
"""

from __future__ import annotations

import difflib
import math
import re
from pathlib import Path
from typing import Any, Literal

import pydantic
import yaml
from pydantic import BaseModel, ConfigDict, Field

from cluster.errors import ConfigError

# What PyYAML's constructors raise besides YAMLError: on a date that is none, a bad tag, or nesting without end.
_NOT_YAML = (yaml.YAMLError, ValueError, KeyError, AttributeError, TypeError, OverflowError, RecursionError)
_EXPECTED = {  # By pydantic's type of problem; its own message where none is here.
    "model_type": "expected a mapping of keys, one a line below it; remove the line to take the defaults",
    "tuple_type": "expected a list, for example [{name: exact_match}]",
    "too_short": "expected a list of at least one entry, for example [{name: exact_match}]",
    "string_type": "expected text; if it is meant as text, put it in quotes in the file",
    "bool_type": "expected true or false",
    "int_type": "expected a whole number",
}
MAX_VOTE_SUBSETS = 20_000
"""Votes of `majority@k` are counted subset by subset."""
_EXPONENT = re.compile(r"^[+-]?\d+(\.\d*)?[eE][+-]?\d+$")


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

    count: int = Field(1, ge=0, description="Number of rollout actors; 0 only where all samples are offline (nothing is evaluated then).")
    num_cpus: float = Field(1.0, ge=0, description="CPUs of one actor (Ray's logical CPUs, fractions allowed).")
    num_gpus: float = Field(0.0, ge=0, description="GPUs of one actor: vLLM tensor parallelism over so many; a fraction shares one.")
    group_size: int = Field(8, ge=2, description="Samples per prompt (n; AGRO needs at least 2).")
    slots: int = Field(128, ge=1, description="Sequences an engine generates at once (vLLM max_num_seqs).")
    max_new_tokens: int = Field(256, ge=1, description="Completion limit; a completion cut here is kept as truncated.")
    temperature: float = Field(1.0, gt=0, description="Sampling temperature, also of the learner's log-probs.")
    top_p: float = Field(1.0, gt=0, le=1, description="Nucleus; below 1 breaks coverage (a warning says so).")
    kv_cache_gib: float = Field(1.0, gt=0, description="KV cache of a CPU engine, GiB.")
    gpu_memory_utilization: float = Field(0.85, gt=0, le=1, description="Share of GPU memory a GPU engine may take.")


class BufferConfig(Section):
    """The shared replay buffer."""

    sampler: Literal["uniform", "fresh", "oldest"] = Field("uniform", description="Which stored groups a batch takes.")
    max_uses: int = Field(1, ge=1, description="How often a group is trained on before it leaves.")
    min_staleness: int = Field(
        0, ge=0, description="Learner steps; a batch takes no group younger than this while it can be had: an enforced lag, for studies."
    )
    max_staleness: int = Field(16, ge=0, description="Learner steps; groups with an older token are evicted and counted.")
    capacity: int = Field(
        256, ge=1, description="Groups not yet trained on that may exist, stored or being generated: backpressure on actors."
    )


class LearnerConfig(Section):
    """The learner: DeepSpeed ZeRO-3 ranks."""

    ranks: int = Field(1, ge=1, description="ZeRO-3 ranks.")
    num_cpus: float = Field(1.0, ge=0, description="CPUs of one rank.")
    num_gpus: float = Field(0.0, ge=0, description="GPUs of one rank: 0 trains on the CPU, 1 on a GPU, a fraction shares one.")
    objective: str = Field("agro", description="File name under learner/objectives/.")
    groups_per_step: int = Field(32, ge=1, description="Groups of one optimizer step (P).")
    lr: float = Field(1e-6, gt=0, description="Peak learning rate (AdamW).")
    warmup_steps: int = Field(0, ge=0, description="Steps of linear warm-up.")
    decay: Literal["constant", "linear", "cosine"] = Field(
        "constant", description="After the warm-up: constant, or down to 10 % of the peak at the last step."
    )
    weight_decay: float = Field(0.0, ge=0, description="AdamW weight decay.")
    grad_clip: float = Field(1.0, gt=0, description="Gradient norm limit.")
    micro_batch_tokens: int = Field(8192, ge=16, description="Token budget of one forward pass of one rank, padding included.")
    layout: Literal["padded", "packed"] = Field("padded", description="`packed` joins sequences without padding (position ids).")
    offload: bool = Field(False, description="Parameters and optimizer in CPU memory.")
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


class WeightsConfig(Section):
    """Weight snapshots from the learner to the actors."""

    publish_every: int = Field(2, ge=1, description="Learner steps between snapshots.")
    bucket_mib: float = Field(64.0, gt=0, description="Size of one gathered bucket, MiB: bounds the memory of a publication.")


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
    eval: EvalConfig = EvalConfig()
    monitor: MonitorConfig = MonitorConfig()

    @property
    def admitted_groups(self) -> int:
        """Groups that may exist untrained: `min(capacity, (max_staleness + 1) * groups_per_step)`.

        A group started when this many are ahead of it is trained at most `max_staleness` steps later, so that nothing
        is born too stale (publication lag excepted, which eviction counts).
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
    def _lag_can_be_held(self) -> Config:
        buffer = self.buffer
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
        if actors.num_gpus > 1 and actors.num_gpus % 1:
            raise ValueError(f"actors.num_gpus = {actors.num_gpus}: above 1 only whole GPUs can be given to an actor. Round it.")
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
        if self.learner.offload and self.learner.num_gpus == 0:
            found.append("learner.offload = true with learner.num_gpus = 0: everything is in CPU memory anyway.")
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


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML in which a key given twice is an error: PyYAML would keep the last one and say nothing."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if str(key.value) in seen:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key.value!r} is there twice", key.start_mark)
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


def load_config(path: str | Path, overrides: list[str] | None = None) -> Config:
    """The Config in the YAML file `path` with `section.key=value` overrides applied (values are YAML).

    Raises ConfigError that lists every problem: the field, the value found, what is accepted, the nearest valid name.
    """
    path = Path(path)
    if not path.is_file():
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.yaml")], n=1)
        raise ConfigError(
            f"no config file {path}" + (f"; did you mean {path.parent / near[0]}?" if near else "; see configs/ for examples.")
        )
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), Loader=_UniqueKeyLoader)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
    except _NOT_YAML as error:
        raise ConfigError(f"{path} is not YAML: {_first_lines(error)}") from None
    if not isinstance(tree, dict):
        found = "nothing" if tree is None else f"a {type(tree).__name__}"
        raise ConfigError(f"{path} holds {found}, expected sections such as `model:` and `data:`; see configs/quickstart.yaml.")
    for override in overrides or []:
        _apply_override(tree, override)
    return parse_config(tree, source=str(path))


def parse_config(tree: dict[str, Any], source: str = "config") -> Config:
    """The Config that a mapping of sections describes; raises ConfigError (see `load_config`)."""
    try:
        return Config.model_validate(_lists_as_tuples(tree))
    except RecursionError:
        raise ConfigError(f"{source}: a list or mapping contains itself (YAML anchors), or is nested without end.") from None
    except pydantic.ValidationError as error:
        problems = [_explain(problem) for problem in error.errors()]
        shown = "\n".join(f"  - {line}" for line in problems[:10])
        more = f"\n  ... and {len(problems) - 10} more" if len(problems) > 10 else ""
        raise ConfigError(f"{source}: {len(problems)} problem{'s' if len(problems) > 1 else ''}\n{shown}{more}") from None


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    names = key.split(".")
    if not equals or len(names) != 2 or not all(names):
        raise ConfigError(f"override {_short(override)} is not section.key=value, for example learner.lr=1e-5")
    try:
        value = yaml.safe_load(text)
    except _NOT_YAML as error:
        raise ConfigError(f"override {_short(override)}: the value is not YAML: {_first_lines(error)}") from None
    section, name = names
    if tree.get(section) is None:
        tree[section] = {}
    if not isinstance(tree[section], dict):
        found = f"the file holds {_short(tree[section])} there"
        raise ConfigError(f"override {_short(override)}: {section!r} is no section; {found}. Write its keys below `{section}:`.")
    tree[section][name] = value


def _lists_as_tuples(value: Any) -> Any:
    """YAML lists as tuples, and YAML's `1e-5` (a string to PyYAML) as the number it means: strict models want both."""
    if isinstance(value, dict):
        return {key: _lists_as_tuples(item) for key, item in value.items()}
    if isinstance(value, list):
        return tuple(_lists_as_tuples(item) for item in value)
    if isinstance(value, str) and _EXPONENT.match(value):
        return float(value)
    return value


def _explain(problem: Any) -> str:
    """One line for one pydantic problem: field, value, what to do."""
    kind, location = problem["type"], problem["loc"]
    names = [str(part) for part in location]
    where = ".".join(name if name.isprintable() and len(name) <= 40 else _short(name) for name in names)
    if kind in ("extra_forbidden", "invalid_key"):
        return f"{where} is not a known key; {_nearest(location)}"
    if kind == "missing":
        how = f"set it in the file or with {where}=<value>" if len(names) == 2 else f"write {names[-1]}: in the file"
        return f"{where} is missing; {how}"
    if kind == "value_error":
        return problem["msg"].removeprefix("Value error, ")
    expected = _EXPECTED.get(kind, problem["msg"][0].lower() + problem["msg"][1:])
    if kind == "string_pattern_mismatch":
        expected += f"; {_description(location)}"
    return f"{where} = {_short(problem['input'])}: {expected}"


def _nearest(location: tuple[Any, ...]) -> str:
    """What may be meant by a key that is not known: one spelt alike here, or one of this name in another section."""
    key, valid = str(location[-1]), _valid_names(location[:-1])
    if near := difflib.get_close_matches(key, valid, n=1, cutoff=0.6):
        return f"did you mean {near[0]!r}?"
    homes = [name for name, field in Config.model_fields.items() if key in getattr(field.annotation, "model_fields", {})]
    if homes:
        return "did you mean " + " or ".join(f"{home}.{key}" for home in homes) + "?"
    return f"valid here: {', '.join(sorted(valid))}"


def _description(location: tuple[Any, ...]) -> str:
    section, name = str(location[0]), str(location[1])
    annotation: Any = Config.model_fields[section].annotation
    return annotation.model_fields[name].description


def _valid_names(location: tuple[Any, ...]) -> list[str]:
    model: Any = Config
    for part in location:
        if isinstance(part, int):
            model = RewardFunction
        else:
            annotation = model.model_fields[part].annotation
            model = annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else model
    return list(model.model_fields)


def _short(value: Any) -> str:
    """`repr` of at most 80 characters, on one line."""
    shown = repr(value)
    return shown if len(shown) <= 80 else shown[:77] + "..."


def _first_lines(error: Exception, count: int = 3) -> str:
    return " ".join(str(error).splitlines()[:count])


def dump_config(config: Config) -> str:
    """The resolved config as YAML, in the order of the sections. Holds no secret: secrets come from the environment only."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, width=120)
