"""The configuration: one pydantic model per room, one YAML file, `section.key=value` overrides.

Unknown keys are rejected with the nearest valid name. Values derived from others are properties that show the
formula. `docs/config.md` is generated from the descriptions here (`launch.py config-reference`).
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any, Literal

import pydantic
from pydantic import Field, SerializeAsAny

from core.config import checks as config_checks
from core.config.actors import ActorsConfig
from core.config.buffer import BufferConfig
from core.config.data import DataConfig as DataConfig
from core.config.environments import EnvironmentsField, all_paths
from core.config.evaluation import HELD_OUT, NO_ENVIRONMENT, Suite, SuiteConfig
from core.config.evaluation import EvalConfig as EvalConfig
from core.config.monitor import MonitorConfig
from core.config.rewards import ENVIRONMENT
from core.config.rewards import RewardsConfig as RewardsConfig
from core.config.section import MAX_NUMBER, MAX_PROCESSES, MAX_TIMEOUT_S, MAX_TOKENS, Section, shown
from core.staleness import StalenessBound

DEFAULT_OBJECTIVE = "agro"
"""What a file that names no objective trains with."""
CPU_BUCKET_BYTES, GPU_BUCKET_BYTES = 64 * 2**20, 512 * 2**20
"""Weights are gathered and published in pieces that bound the memory it takes; from a GPU small ones cost
time.
"""
LORA_ALPHA = 32
"""The scale of adapters is this by their rank, so that the same learning rate fits any rank; another scale is
another learner.lr.
"""


class RunConfig(Section):
    """The run as a whole."""

    name: str = Field(
        "agro",
        pattern=r"^[A-Za-z0-9._-]+$",
        max_length=100,
        description="Name of the run, also of its W&B run: letters, digits, `.`, `_` and `-`.",
    )
    dir: str | None = Field(
        None,
        min_length=1,
        description="Run directory, new or of a run to go on with; None: `runs/<name>-<time>`.",
    )
    seed: int = Field(
        0, ge=0, description="Seed of the prompt stream, the sampling and the learner; below 2^32."
    )
    steps: int = Field(100, ge=1, description="Optimizer steps.")
    timeout_s: float = Field(
        600.0,
        gt=0,
        le=MAX_TIMEOUT_S,
        description="Limit of every wait on another process; its error names who did not answer.",
    )
    placement_timeout_s: float | None = Field(
        None,
        gt=0,
        le=MAX_TIMEOUT_S,
        description="On a cluster that adds nodes on demand: how long the learner waits for its place, and the run for nodes "
        "that are not there yet. None: a run for which they are too few does not start, and what others hold is waited for "
        "180 s.",
    )
    deterministic: bool = Field(
        False,
        description="The learner gives the same parameters bit for bit from the same batches (CPU), "
        "also through kills; slower.",
    )


class ModelConfig(Section):
    """The policy: any Hugging Face causal language model."""

    path: str = Field(..., min_length=1, description="Local Hugging Face directory, or a hub id.")
    make: str | None = Field(
        None,
        pattern=r"^[\w.]+:\w+$",
        description="`module:function` that makes the directory `path` while there is none. It belongs to "
        "the path beside it: where the "
        "command line gives another `path`, it must give `make` too.",
    )
    dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="Precision of weights in learner and actors."
    )
    attention: Literal["sdpa", "eager", "flash_attention_2"] = Field(
        "sdpa", description="Attention of the learner."
    )
    trust_remote_code: bool = Field(
        False, description="Run Python code that comes with the model. Off unless you read it."
    )


class LearnerConfig(Section):
    """The learner: DeepSpeed ZeRO-3 ranks."""

    ranks: int = Field(1, ge=1, le=MAX_PROCESSES, description="ZeRO-3 ranks.")
    num_cpus: float | Literal["auto"] = Field(
        1.0,
        description="CPUs of one rank, as many threads. `auto` asks for one, and on a CPU takes beside it "
        "the cores that nobody on its node uses at the time (none with `run.deterministic`, nor on one node alone that "
        "has no more cores than actors and ranks).",
    )
    num_gpus: float = Field(
        0.0, ge=0, description="GPUs of one rank: 0 trains on the CPU, 1 on a GPU, a fraction shares one."
    )
    sequence_parallel: int = Field(
        1,
        ge=1,
        le=MAX_PROCESSES,
        description="Ranks that share each row: every one of them holds a part of its tokens, and of them in attention a part of the "
        "heads. For sequences whose activations one GPU does not hold; it divides `ranks` and the model's heads.",
    )
    groups_per_step: int = Field(32, ge=1, description="Groups of one optimizer step (P).")
    lora_rank: int = Field(
        0,
        ge=0,
        le=65_536,
        description="Train low-rank adapters of this rank (peft) instead of all weights; 0: all weights.",
    )
    lr: float = Field(1e-6, gt=0, description="Peak learning rate (AdamW).")
    schedule: tuple[int, Literal["constant", "linear", "cosine"]] = Field(
        (0, "constant"),
        description="Steps of linear warm-up, then the course of the learning rate: constant, or down to 10 % of the peak at "
        "the last step, linear or cosine. For example `[10, cosine]`.",
    )
    weight_decay: float = Field(0.0, ge=0, description="AdamW weight decay.")
    grad_clip: float = Field(1.0, gt=0, description="Gradient norm limit.")
    micro_batch_tokens: int = Field(
        8192,
        ge=16,
        le=MAX_TOKENS,
        description="Token budget of one forward pass of one rank, or of those that share their rows; padding included.",
    )
    layout: Literal["packed", "padded"] = Field(
        "packed",
        description="`packed` joins sequences without padding; models that cannot keep them apart want "
        "`padded`.",
    )
    offload: Literal["none", "reference", "all"] = Field(
        "reference",
        description="From a GPU into CPU memory between uses: models that are not trained (reference, "
        "proximal policy), or all.",
    )
    gradient_checkpointing: bool = Field(False, description="Recompute activations in the backward pass.")

    @property
    def reserved_cpus(self) -> float:
        """The CPUs that a rank asks Ray for."""
        return 1.0 if self.num_cpus == "auto" else self.num_cpus

    @property
    def bucket_bytes(self) -> int:
        """The size of one gathered bucket of weights: on ranks with a GPU `GPU_BUCKET_BYTES`."""
        return GPU_BUCKET_BYTES if self.num_gpus else CPU_BUCKET_BYTES

    @property
    def lora_scale(self) -> float:
        """Scale of the adapters' product: `LORA_ALPHA / lora_rank`."""
        return LORA_ALPHA / self.lora_rank

    @pydantic.field_validator("num_cpus", mode="before")
    @classmethod
    def _num_cpus_is_a_number_or_auto(cls, value: Any) -> Any:
        if value == "auto" or (type(value) in (int, float) and 0 <= value <= MAX_PROCESSES):
            return value
        raise ValueError(
            f"learner.num_cpus = {shown(value)}: expected a number from 0 to {MAX_PROCESSES}, or auto for one "
            "and whatever is free"
        )

    @pydantic.field_validator("schedule", mode="before")
    @classmethod
    def _schedule_is_warm_up_and_course(cls, value: Any) -> Any:
        steps, course = value if isinstance(value, tuple) and len(value) == 2 else (None, None)
        if type(steps) is int and 0 <= steps < MAX_NUMBER and course in ("constant", "linear", "cosine"):
            return value
        raise ValueError(
            f"learner.schedule = {shown(value)}: expected steps of warm-up and constant, linear or cosine, for example "
            "[10, cosine]"
        )


class ObjectiveConfig(Section):
    """Base of the knobs of an objective: each file under learner/objectives/ has its own, with its own
    defaults.

    The file of a run says `objective: {name: gspo, beta: 0.0, clip_low: 0.2}`. Which class that is says the
    mapping from names to classes that files are read with (core/config/files.py, learner/catalogue.py): core
    knows no objective.
    """

    name: str = Field(DEFAULT_OBJECTIVE, description="File name under learner/objectives/.")
    beta: float = Field(0.0, ge=0, description="Strength of the KL term; 0: there is none.")

    @property
    def reference_moves_every(self) -> int:
        """Learner steps between moves of the reference to the policy; 0: it never moves."""
        return 0

    @property
    def proximal_moves_every(self) -> int:
        """Learner steps between copies of the policy that serve as the proximal one; 0: there is none."""
        return 0

    @property
    def fewest_samples(self) -> tuple[int, str]:
        """The fewest samples of a prompt to learn from, and the setting that says so ("": none)."""
        return 2, ""

    @property
    def compares_answers(self) -> bool:
        """Says whether the samples of a prompt vote, so that the answer of each must be known."""
        return False

    def check(self, config: Config) -> None:
        """Raises ValueError when other sections do not go with these knobs."""

    def warnings(self, config: Config) -> list[str]:
        """What is allowed but probably not meant, one sentence each."""
        return []


class WeightsConfig(Section):
    """Weight snapshots from the learner to the actors."""

    publish_every: int = Field(2, ge=1, description="Learner steps between snapshots.")
    transport: Literal["snapshot", "adapters", "nccl", "ipc"] = Field(
        "snapshot",
        description="`snapshot`: pulled through host memory; `adapters`: the same of learner.lora_rank's adapters alone, which "
        "vLLM applies; `nccl`: broadcast to a fixed set of GPU actors; `ipc`: within one GPU.",
    )

    full_every: int = Field(
        1,
        ge=1,
        description="Snapshots from one that is whole to the next; those between hold what has changed since. For "
        "weights of 16 bits and small steps, where few elements change; costs rank 0 host memory for the weights. "
        "1: all are whole.",
    )

    @property
    def is_pulled(self) -> bool:
        """Says whether actors fetch weights from host memory, rather than being pushed to."""
        return self.carrier == "snapshot"

    @property
    def carrier(self) -> str:
        """The file of core/weights/transports/ that carries the weights, or the adapters alone."""
        return "snapshot" if self.transport == "adapters" else self.transport


class CheckpointConfig(Section):
    """Checkpoints of the learner; buffer and prompt stream are durable by themselves and tied to them."""

    every: int = Field(
        50, ge=0, description="Learner steps between checkpoints; 0: none, and a run that dies starts again."
    )


class Config(EnvironmentsField):
    """Everything a run needs."""

    run: RunConfig = RunConfig()
    model: ModelConfig
    data: DataConfig
    rewards: RewardsConfig
    actors: ActorsConfig = ActorsConfig()
    buffer: BufferConfig = BufferConfig()
    learner: LearnerConfig = LearnerConfig()
    objective: SerializeAsAny[ObjectiveConfig]
    weights: WeightsConfig = WeightsConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    eval: EvalConfig = EvalConfig()
    monitor: MonitorConfig = MonitorConfig()

    @property
    def admitted_groups(self) -> int:
        """Groups that may exist untrained: `min(capacity, (max_staleness + 1) * groups_per_step)`.

        A group started when this many are ahead of it can be trained at most `max_staleness` steps later, so
        that nothing is born too stale (publication lag excepted). The sampler `oldest` does so; others leave
        some groups until they are stale, counted.
        """
        bound = StalenessBound(self.buffer.max_staleness)
        return min(self.buffer.capacity, bound.max_untrained(self.learner.groups_per_step))

    @property
    def is_offline(self) -> bool:
        """Says whether every sample comes from `data.offline`: the rollout actors, if any, only evaluate."""
        return self.data.offline is not None and self.data.offline_share == 1

    @property
    def offline_samples(self) -> int:
        """Offline samples of each group: `round(share * group_size)`; 0 without `data.offline`."""
        return round(self.data.offline_share * self.actors.group_size) if self.data.offline is not None else 0

    @property
    def max_sequence_tokens(self) -> int:
        """Longest sequence: `actors.max_sequence_tokens`, or `max_prompt_tokens + max_new_tokens`, the second
        `max_turns` times where there are environments.
        """
        actors = self.actors
        if actors.max_sequence_tokens is not None:
            return actors.max_sequence_tokens
        turns = actors.max_turns if all_paths(self) else 1
        return self.data.max_prompt_tokens + turns * actors.max_new_tokens

    @property
    def suites(self) -> tuple[Suite, ...]:
        """What is evaluated: `held_out` (data.eval_path, data.eval_rows, eval.sampling), then `eval.suites`.

        `held_out` is left out with `data.eval_rows` = 0, and, where there are suites, without
        `data.eval_path`.
        """
        data = self.data
        has_held_out = data.eval_rows > 0 and (data.eval_path is not None or not self.eval.suites)
        held_out = [self._suite(HELD_OUT, SuiteConfig(path=data.eval_path or "."), data.eval_path)]
        named = [self._suite(name, suite, suite.path) for name, suite in self.eval.suites.items()]
        return (*(held_out if has_held_out else ()), *named)

    def _suite(self, name: str, own: SuiteConfig, path: str | None) -> Suite:
        settings: dict[str, Any] = {
            "rows": self.data.eval_rows,
            "samples": self.eval.samples,
            "temperature": self.eval.temperature,
            "functions": self.rewards.functions,
            "environments": self.environments,
            "every": self.eval.every,
        }
        settings |= {key: value for key, value in own if key in settings and value is not None}
        if settings["environments"] == NO_ENVIRONMENT:
            settings["environments"] = None
        return Suite(name=name, path=path, has_own_functions=own.functions is not None, **settings)

    def without_knobs(self) -> Config:
        """Returns the same with no more of its objective than the name, for processes that do not train.

        The class of an objective's knobs stands beside its loss, and would bring torch into them.
        """
        return self.model_copy(update={"objective": ObjectiveConfig(name=self.objective.name)})

    @pydantic.model_validator(mode="before")
    @classmethod
    def _environments_give_rewards(cls, tree: Any) -> Any:
        """Lets the environment's own reward be the reward where no function is named."""
        rewards = tree.get("rewards") or {} if isinstance(tree, dict) and tree.get("environments") else None
        if isinstance(rewards, dict) and not rewards.get("functions"):
            return {**tree, "rewards": {**rewards, "functions": {ENVIRONMENT: 1.0}}}
        return tree

    @pydantic.field_validator("objective", mode="wrap")
    @classmethod
    def _objective_has_its_own_knobs(cls, value: Any, validate: Any, info: pydantic.ValidationInfo) -> Any:
        """Makes of a mapping the class of the objective that it names, of those in the context."""
        if isinstance(value, dict) and info.context is not None:
            return objective_class(value, info.context).model_validate(value)
        return validate(value)

    @pydantic.model_validator(mode="after")
    def _sections_fit_together(self) -> Config:
        config_checks.check(self)
        return self

    def warnings(self) -> list[str]:
        """What is allowed but probably not meant, one sentence each."""
        return config_checks.warnings(self)


def objective_class(
    tree: Mapping[str, Any], objectives: Mapping[str, type[ObjectiveConfig]]
) -> type[ObjectiveConfig]:
    """The class of the knobs of the objective that the section `objective` names.

    Raises ValueError that gives the nearest name, and all of them.
    """
    name = tree.get("name", DEFAULT_OBJECTIVE)
    if isinstance(name, str) and name in objectives:
        return objectives[name]
    near = difflib.get_close_matches(str(name), objectives, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise ValueError(
        f"objective.name = {shown(name)} is no file under learner/objectives/; {hint}valid here: {', '.join(objectives)}"
    )
