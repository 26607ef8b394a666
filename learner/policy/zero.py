"""The policy under DeepSpeed ZeRO-3. Every call into deepspeed is in this file; CPU (gloo) and GPU (NCCL) run
the same code.

ZeRO-3 cuts every weight, its gradient and Adam's state into one part a rank, and gathers a layer's weights
when the layer is used. What surprises about it:

- Outside a gather a parameter has `numel() == 0`; its size is `ds_numel`, its shape `ds_shape`, this rank's
  part `ds_tensor`.
- Every rank must call `logprobs`, `backward`, `step` and `named_weights` equally often and in one order,
  since each of them gathers.
- A gather with `modifier_rank` set broadcasts everything back; for reading it stays None.
- Small parameters are kept whole after their first gather: `forget_gathered` before their parts are changed.
"""

from __future__ import annotations

import collections
import datetime
import math
import os
import warnings
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from core.config import LearnerConfig, ModelConfig
from learner.checkpoints.checkpoint import TensorPart, partition
from learner.checkpoints.export import write_model
from learner.network import speak_where
from learner.policy.file_weights import Unit, buckets, file_units, plain_units, wider_first
from learner.policy.function_check import check_function
from learner.policy.lora import adapters_of, add_adapters, persistent_buffers, weights_of
from learner.policy.partitions import Read, held, padded, trained
from learner.policy.row_shards import connect, connected
from learner.step.packing import ModelInputs, TokenLogprobs

PREFETCHED_PARAMETERS = 50_000_000
"""DeepSpeed's default (`stage3_prefetch_bucket_size`)."""
CPU_BUCKET_ELEMENTS = 4_000_000
"""Of gradients that are handed on together; DeepSpeed's default is 500 million."""


def init_process_group(
    rank: int,
    world_size: int,
    address: str,
    port: int,
    *,
    use_gpu: bool,
    timeout_s: float,
    sequence_parallel: int = 1,
) -> torch.device:
    """Joins the ranks, and those that share their rows, and returns the device of this one.

    The connections' own limit is a minute beyond `timeout_s`. Raises torch's DistStoreError when a rank is
    missing by then.
    """
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK="0", MASTER_ADDR=address, MASTER_PORT=str(port)
    )
    speak_where(address)
    if use_gpu:
        # It is torch's first choice on new GPUs, and makes a plan for every shape: about a second each time.
        torch.backends.cuda.enable_cudnn_sdp(False)
    else:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        # Else DeepSpeed starts a process, numactl, at every reduction, to count the machine's nodes.
        os.environ.setdefault("LOCAL_SIZE", "1")
    deepspeed = _import_deepspeed()  # Before torch's threads start, which read the environment.
    backend = "cpu:gloo,cuda:nccl" if use_gpu else "gloo"
    # Longer than a wait for a batch: rank 0, which knows what it waits for, is the one to give up first.
    timeout = datetime.timedelta(seconds=timeout_s + 60)
    dist.init_process_group(
        backend, init_method=f"tcp://{address}:{port}", rank=rank, world_size=world_size, timeout=timeout
    )
    # Of DeepSpeed's collectives; torch would print it again at every one of them.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    # DeepSpeed would compile a shared-memory all-reduce now, which ZeRO-3 does not use: half a minute, a
    # compiler, and a lock file which, left by a killed process, every later run waits for without end.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    connect(sequence_parallel, timeout)
    deepspeed.init_distributed(dist_backend="nccl" if use_gpu else "gloo", verbose=False)
    return torch.device("cuda", 0) if use_gpu else torch.device("cpu")


def _import_deepspeed() -> Any:
    """Imports DeepSpeed without torch.compile, which it would load for an optimizer that we do not use: two
    seconds.
    """
    before = os.environ.get("TORCHDYNAMO_DISABLE")
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    import deepspeed.runtime.zero.muon.muon_optimizer

    if before is None:
        del os.environ["TORCHDYNAMO_DISABLE"]
    else:
        os.environ["TORCHDYNAMO_DISABLE"] = before
    return deepspeed


def _deepspeed_config(learner: LearnerConfig, dtype: str, *, training: bool) -> dict[str, Any]:
    # A frozen model's partitions wait in CPU memory; each layer is copied to the GPU when it is gathered.
    is_offloaded = learner.offload == "all" or (
        learner.offload == "reference" and not training and learner.num_gpus > 0
    )
    offload = {"device": "cpu" if is_offloaded else "none"}
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "zero_optimization": {"stage": 3, "offload_param": offload},
        "bf16": {"enabled": dtype == "bfloat16"},
        # Over micro-batches; in bfloat16 the later ones of many would be rounded away.
        "data_types": {"grad_accum_dtype": "fp32"},
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }
    if training:
        config["zero_optimization"]["offload_optimizer"] = offload
        config["gradient_clipping"] = learner.grad_clip
        config["optimizer"] = {
            "type": "AdamW",
            "params": {
                "lr": learner.lr,
                "betas": [0.9, 0.99],
                "eps": 1e-8,
                "weight_decay": learner.weight_decay,
                "torch_adam": True,
                # A sixth of the time of the default on a CPU, and the same weights but for their last bits.
                "fused": True,
            },
        }
    return config


def _on_a_cpu(learner: LearnerConfig) -> dict[str, int]:
    """Returns what ZeRO-3 is told where ranks compute on a CPU.

    Its bucket of gradients is small: one of all gradients is allocated anew at each step, and half a step's
    page faults are its. A rank alone does without two things more. A gathered weight is then a view of the
    rank's part, so that to keep it until the backward pass, as torch's own linear layer does and DeepSpeed's
    in Python does not, takes no memory. Nor do gradients fragment any, which DeepSpeed would copy into a
    bucket before it copies them into another.
    """
    if learner.num_gpus:
        return {}
    alone = {"memory_efficient_linear": False, "contiguous_gradients": False}
    return {"reduce_bucket_size": CPU_BUCKET_ELEMENTS} | (alone if dist.get_world_size() == 1 else {})


def _load(
    model: ModelConfig, learner: LearnerConfig, *, training: bool, seed: int = 0
) -> tuple[Any, TokenLogprobs]:
    """Returns a Hugging Face causal LM as a DeepSpeed engine, partitioned by ZeRO-3, and the way to log-probs
    through it.

    `seed` draws the adapters, where they are what is trained.
    """
    import deepspeed

    config = _deepspeed_config(learner, model.dtype, training=training)
    module = _from_pretrained(model, config)
    module.config.use_cache = False
    if training and learner.lora_rank:
        add_adapters(module, learner, seed)
    _still(module)
    if training and learner.gradient_checkpointing:
        module.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if not training:
        module.requires_grad_(False).eval()
    token_logprobs = TokenLogprobs(module, learner.layout, model.attention, connected())
    config["zero_optimization"] |= _prefetch(learner, _gather_by_layer(module)) | _on_a_cpu(learner)
    parameters = [p for p in module.parameters() if p.requires_grad] or None
    engine, *_ = deepspeed.initialize(model=module, model_parameters=parameters, config=config)
    return engine, token_logprobs


def _still(module: Any) -> None:
    """Turns dropout and router jitter off: pi and pi_ref are then the same function of their weights, and
    both passes of an update give one value.
    """
    for layer in module.modules():
        noisy = [
            name
            for name, value in vars(layer).items()
            if isinstance(value, float) and ("drop" in name or "jitter" in name)
        ]
        for name in [*noisy, "p"] if isinstance(layer, torch.nn.Dropout) else noisy:
            setattr(layer, name, 0.0)


def _gather_by_layer(module: Any) -> int:
    """Lets ZeRO-3 gather and release whole layers: its hooks on every submodule cost a tiny model a third of
    its time. Returns the parameters of the largest layer.

    Models that are frozen in part are left alone: DeepSpeed takes the gradients of such a layer when its
    input has one, and for zero if that is before they are there, as in a first layer whose input needs none.
    """
    from deepspeed.utils import set_z3_leaf_modules
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = [layer for layer in module.modules() if isinstance(layer, GradientCheckpointingLayer)]
    if len({parameter.requires_grad for parameter in module.parameters()}) == 1:
        set_z3_leaf_modules(module, list({type(layer) for layer in layers}), raise_if_not_found=False)
    # With several ranks a parameter is in parts already, and has no elements of its own.
    return max((sum(map(_num_elements, layer.parameters())) for layer in layers), default=0)


def _prefetch(learner: LearnerConfig, largest_layer: int) -> dict[str, int]:
    """Returns what ZeRO-3 gathers ahead on a GPU: while a layer computes, the next one comes whole.
    DeepSpeed's own bucket is a quarter of a large one.
    """
    most = max(PREFETCHED_PARAMETERS, largest_layer)
    return {"stage3_prefetch_bucket_size": most} if learner.num_gpus else {}


def _num_elements(parameter: Any) -> int:
    return int(getattr(parameter, "ds_numel", None) or parameter.numel())


def _from_pretrained(model: ModelConfig, config: dict[str, Any]) -> Any:
    """Loads the Hugging Face model. With several ranks each weight is partitioned as soon as it is made, so
    that no rank ever holds all.
    """
    from transformers import AutoModelForCausalLM
    from transformers.integrations import HfDeepSpeedConfig

    # As long as it lives, transformers builds models under deepspeed.zero.Init. One rank alone would only
    # load more slowly.
    partitioning = HfDeepSpeedConfig(config) if dist.get_world_size() > 1 else None
    module = AutoModelForCausalLM.from_pretrained(
        model.path,
        dtype=getattr(torch, model.dtype),
        attn_implementation=model.attention,
        trust_remote_code=model.trust_remote_code,
    )
    del partitioning
    return module


class ZeroFrozen:
    """A policy that is not trained, partitioned like the one that is: the reference, or the proximal policy.

    reference = ZeroFrozen(config.model, config.learner)          the base model
    reference.load(policy.own_weights(bucket_bytes))              now a copy of the policy
    """

    def __init__(self, model: ModelConfig, learner: LearnerConfig) -> None:
        self._engine, self._token_logprobs = _load(model, learner, training=False)
        self._engine.eval()

    @torch.no_grad()
    def logprobs(self, inputs: ModelInputs, temperature: float) -> torch.Tensor:
        """Returns [T] log-probs of the sampled tokens, nats. Collective."""
        return self._token_logprobs(self._engine, inputs, temperature)

    def load(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Takes over `weights`, all that `ZeroPolicy.own_weights` yields. Collective."""
        import deepspeed

        parameters = dict(self._engine.module.named_parameters())
        for name, tensor in weights:
            if name not in parameters:
                self._engine.module.get_buffer(name).copy_(tensor)
                continue
            # Rank 0's value is partitioned anew over the ranks when the gather ends.
            with deepspeed.zero.GatheredParameters([parameters[name]], modifier_rank=0), torch.no_grad():
                parameters[name].copy_(tensor)

    def parts(self, kind: str) -> Iterator[TensorPart]:
        """Yields this rank's part of each weight, named `<kind>/<parameter>`. They are views, to be copied.
        Not collective.
        """
        for name, parameter in self._engine.module.named_parameters():
            first, last = held(parameter)
            yield TensorPart(
                f"{kind}/{name}", tuple(parameter.ds_shape), parameter.ds_tensor.data[: last - first]
            )

    @torch.no_grad()
    def restore(self, kind: str, read: Read) -> None:
        """Takes over weights saved by `parts(kind)`; `read` is `Checkpoint.read`. Not collective."""
        self._engine.empty_partition_cache()  # Small parameters are kept whole: they would stay as they were.
        for name, parameter in self._engine.module.named_parameters():
            parameter.ds_tensor.copy_(padded(parameter, read, f"{kind}/{name}", parameter.ds_tensor.dtype))


class ZeroPolicy:
    """The policy that is trained: its log-probs, gradients and optimizer steps, and its weights one bucket at
    a time.

        policy = ZeroPolicy(config.model, config.learner, seed)
        loss = -policy.logprobs(inputs, temperature).mean()
        policy.backward(loss, last=True)
        grad_norm = policy.step(lr)
    """

    def __init__(self, model: ModelConfig, learner: LearnerConfig, seed: int = 0) -> None:
        """`seed` draws the adapters (`learner.lora_rank`) and must be equal on all ranks.

        Raises ConfigError when the model, as configured, computes something else than by its own definition
        (function_check.py). Collective.
        """
        self._model, self._learner = model, learner
        self._engine, self._token_logprobs = _load(model, learner, training=True, seed=seed)
        self.module: Any = self._engine.module
        with torch.no_grad():
            device = self._engine.device  # Offloaded weights lie elsewhere.
            check_function(
                self._logprobs_as,
                self.module,
                learner.layout,
                device,
                longest=learner.micro_batch_tokens,
                shares_beginnings=self.shares_beginnings,
            )

    @property
    def shares_beginnings(self) -> bool:
        """True where it takes once what several packed sequences begin with (`collate`)."""
        return self._token_logprobs.shares_beginnings

    def logprobs(self, inputs: ModelInputs, temperature: float) -> torch.Tensor:
        """Returns [T] log-probs of the sampled tokens, nats, differentiable unless under `torch.no_grad`.
        Collective.
        """
        self._engine.train(torch.is_grad_enabled())
        return self._token_logprobs(self._engine, inputs, temperature)

    def _logprobs_as(self, inputs: ModelInputs, *, training: bool) -> torch.Tensor:
        self._engine.train(training)
        return self._token_logprobs(self._engine, inputs, 1.0)

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        """Accumulates the gradient of this rank's share of the loss; `last` marks the step's last call.
        Collective.

        The gradient is the SUM over ranks and calls: DeepSpeed averages over ranks, which the factor undoes.
        """
        self._engine.set_gradient_accumulation_boundary(last)
        self._engine.backward(loss * dist.get_world_size(), scale_wrt_gas=False)

    def step(self, lr: float) -> float:
        """Takes one AdamW step at learning rate `lr` with clipping, and returns the gradient norm before
        clipping. Collective.

        The norm is inf on every rank when a gradient of any is not finite: DeepSpeed then drops the
        gradients, and weights, moments and Adam's count stay as they were.
        """
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr
        self._engine.step()
        return float(self._engine.get_global_grad_norm()) if self._engine.was_step_applied() else math.inf

    def named_weights(
        self, bucket_bytes: int, *, adapters_alone: bool = False
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Yields (name, whole tensor) of all that the base's files have, by the names there, adapters merged
        into the weights they belong to.

        Tied weights come once; `adapters_alone` yields the adapters and nothing else. Weights are gathered in
        buckets of about `bucket_bytes`, so that a tensor is valid only until the next is asked for.
        Collective: every rank must iterate to the end.
        """
        return _gathered(
            plain_units(adapters_of(self.module)) if adapters_alone else self._units, bucket_bytes
        )

    @cached_property
    def _units(self) -> list[Unit]:
        return file_units(self.module)

    def own_weights(self, bucket_bytes: int) -> Iterator[tuple[str, torch.Tensor]]:
        """Yields what `named_weights` yields, by the names and in the shapes of the module, for another
        module like it. Collective.
        """
        return _gathered(plain_units(weights_of(self.module)), bucket_bytes)

    def save_pretrained(self, directory: str, bucket_bytes: int) -> None:
        """Writes a Hugging Face directory (safetensors, tokenizer, generation config) from rank 0, with one
        bucket in memory. Collective.

        Raises OSError and ConfigError on rank 0, for a full disk or a base whose files are gone.
        """
        units = wider_first(self._units)
        weights = _gathered(units, bucket_bytes)
        try:
            if dist.get_rank() == 0:
                entries = [entry for unit in units for entry in unit.entries]
                write_model(Path(directory), self._model, entries, (tensor for _, tensor in weights))
        finally:
            # To the end, also where the disk was full: the other ranks gather with us.
            collections.deque(weights, maxlen=0)
            dist.barrier()

    def forget_gathered(self) -> None:
        """Drops the small parameters that ZeRO-3 keeps whole, before parts are changed: they would stay as
        they were. Not collective.
        """
        self._engine.empty_partition_cache()

    @property
    def adam_steps(self) -> int:
        """How many steps Adam has counted."""
        return max((int(state["step"]) for state in self._engine.optimizer.state.values()), default=0)

    def parts(self) -> Iterator[TensorPart]:
        """Yields this rank's part of the fp32 weights, of Adam's moments once it has taken a step, and of the
        buffers.

        They are views, to be copied. Not collective.
        """
        from deepspeed.utils import safe_get_local_fp32_param, safe_get_local_optimizer_state

        moments = ("exp_avg", "exp_avg_sq") if self.adam_steps else ()
        for name, parameter in trained(self.module):
            first, last = held(parameter)
            yield TensorPart(
                f"master/{name}",
                tuple(parameter.ds_shape),
                safe_get_local_fp32_param(parameter).detach()[: last - first],
            )
            for moment in moments:
                values = safe_get_local_optimizer_state(parameter, moment)
                yield TensorPart(f"{moment}/{name}", tuple(parameter.ds_shape), values[: last - first])
        for name, buffer in persistent_buffers(self.module):
            first, last = partition(buffer.numel(), dist.get_world_size(), dist.get_rank())
            yield TensorPart(f"buffer/{name}", tuple(buffer.shape), buffer.flatten()[first:last])

    @torch.no_grad()
    def restore(self, read: Read, adam_steps: int) -> None:
        """Takes over fp32 weights and Adam's state after `adam_steps` steps; the model's weights become their
        cast.

        `read` is `Checkpoint.read`. Not collective.
        """
        from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

        self.forget_gathered()
        self._make_moments(adam_steps)
        for name, parameter in trained(self.module):
            master = padded(parameter, read, f"master/{name}", torch.float32)
            safe_set_local_fp32_param(parameter, master)
            parameter.ds_tensor.copy_(master)
            for moment in ("exp_avg", "exp_avg_sq") if adam_steps else ():
                safe_set_local_optimizer_state(
                    parameter, padded(parameter, read, f"{moment}/{name}", torch.float32), moment
                )
        for name, buffer in persistent_buffers(self.module):
            buffer.copy_(read(f"buffer/{name}", 0, buffer.numel()).view(buffer.shape))

    def _make_moments(self, adam_steps: int) -> None:
        """Makes Adam's state as its first step would make it, and sets its count of steps."""
        optimizer = self._engine.optimizer
        # DeepSpeed's own for the CPU counts in an int.
        is_torch = isinstance(optimizer.optimizer, torch.optim.AdamW)
        for flat in optimizer.fp32_partitioned_groups_flat if adam_steps else ():
            count = torch.tensor(float(adam_steps), device=flat.device) if is_torch else adam_steps
            moments = {
                name: torch.zeros_like(flat, requires_grad=False) for name in ("exp_avg", "exp_avg_sq")
            }
            optimizer.state[flat] = {"step": count, **moments}


def _gathered(units: Iterable[Unit], bucket_bytes: int) -> Iterator[tuple[str, torch.Tensor]]:
    import deepspeed

    for bucket in buckets(units, bucket_bytes):
        with deepspeed.zero.GatheredParameters(
            [parameter for unit in bucket for parameter in unit.parameters]
        ):
            for unit in bucket:
                yield from unit.tensors()
