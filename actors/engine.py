"""The inference engine: every call into vLLM is in this file, but for what is done where the model is
(actors/engine_worker.py) and what its CPU engine is given (actors/engine_cpu.py).

vLLM's engine runs inside this process (no engine-core process), so that weights can be swapped between two
steps while unfinished generations go on; of one over several GPUs (`actors.tensor_parallel`) only the model
is elsewhere, a part of it in each of its worker processes. Each sample is a request of its own; those of a
group, which come one after another, are prepared once, and vLLM's prefix cache shares their prompt.

Weights arrive through vLLM's layerwise reload, the lifecycle of its own transfer engines.

Weights that the learner pushes (`weights.transport` nccl or ipc) arrive through vLLM's own transfer engines,
in a session of start, updates and finish in which the model is in pieces: no step may come between. vLLM's
own checksums are not used to confirm them: they hash all of its fused parameters on the host, seconds for
each GB, and the learner has nothing to compare them with.

Where adapters come alone (`weights.transport` adapters), the model stays as it was loaded, and one LoRA
request, whose content is exchanged between two steps, serves everything, also what is under way. vLLM reads
adapters from a directory: it gets one that lives for that moment."""

from __future__ import annotations

import collections
import copy
import itertools
import json
import os
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from actors.engine_cpu import SEED, keep_small_linears
from actors.engine_settings import (
    Adapters,
    check_device,
    engine_arguments,
    lora_arguments,
    set_engine_environment,
    without_collections,
    without_lowering,
)
from actors.episode import Generation
from actors.requests import Options, RunningRequest, WaitingRequest
from core.children import describe_exit
from core.config import ActorsConfig, ModelConfig
from core.errors import AgroError, SnapshotError
from core.tokenizer import Detokenizer, end_token_ids, load_tokenizer
from core.weights.shared import SharedWeights, share

_ADAPTER = "policy"
_PEFT_PREFIX = "base_model.model."
_NOWHERE = "/nonexistent/agro-policy"
"""Of requests: vLLM has the adapter in memory. No relative path: vLLM would look for it on the hub."""


class PromptRefused(AgroError, ValueError):
    """vLLM does not take the prompt of request `request_id`: too long for it, empty, or with token ids
    it does not know.
    """

    request_id = ""


class WorkerLost(RuntimeError):
    """A worker process of an engine over several GPUs has ended, and the engine with it. No error of ours
    that would end the run: it is the death of one actor.
    """


class Engine:
    """One vLLM engine that speaks token ids in, Generations out.

    engine = Engine(config.model, config.actors, max_model_len=512)
    engine.submit("a", [4, 13, 5], seed=0)
    while engine.num_unfinished:
        for request_id, generation in engine.step(): ...
    """

    def __init__(
        self,
        model: ModelConfig,
        config: ActorsConfig,
        *,
        max_model_len: int,
        seed: int = 0,
        version: int = 0,
        transport: str = "snapshot",
        adapters: Adapters | None = None,
        skip_special_tokens: bool = False,
    ) -> None:
        """Builds the engine; it has its base's weights, which are called `version`. With a `version` below 0
        weights that count are yet to come, and the base's are not read, unless adapters need them.

        With any other `transport` (the carrier of `weights.transport`) than snapshot, weights can be pushed
        too. With `adapters`, what `load_weights` gets are adapters of that kind for the model's own weights.
        `skip_special_tokens` (`rewards.skip_special_tokens`) is about the texts.
        """
        set_engine_environment(config)
        with without_collections(), without_lowering(config):
            from vllm import EngineArgs, LLMEngine
            from vllm.platforms import current_platform

        check_device(config, current_platform)
        if config.num_gpus == 0:
            keep_small_linears()
        self._config, self._adapters = config, adapters
        tokenizer = load_tokenizer(model)
        end_ids = end_token_ids(model, tokenizer)
        self._detokenizer = Detokenizer(tokenizer, end_ids, skip_special_tokens=skip_special_tokens)
        is_shared = 0 < config.num_gpus < 1
        card_bytes = torch.cuda.get_device_properties(0).total_memory if is_shared else 0
        arguments = engine_arguments(
            model, config, max_model_len=max_model_len, seed=seed, card_bytes=card_bytes
        )
        if adapters is not None:
            arguments |= lora_arguments(model, adapters)
        elif version < 0:
            arguments["load_format"] = "dummy"
        if transport != "snapshot":
            arguments["weight_transfer_config"] = {"backend": transport}
        self._engine: Any = LLMEngine.from_engine_args(EngineArgs(**arguments))
        self._engine.collective_rpc("agro_prepare", args=(os.getpid(), config.num_gpus == 0))
        self._waiting: collections.deque[WaitingRequest] = collections.deque()
        self._running: dict[str, RunningRequest] = {}  # By vLLM's names for them; the oldest first.
        self._drained: list[tuple[str, Generation]] = []  # They finished while weights were awaited.
        self._names: dict[str, str] = {}  # Those, by ours.
        self._num_started = 0
        self._prepared: tuple[Any, Any] = (None, None)  # The newest request, and what vLLM made of it.
        self._num_updates = 0
        self._lora_request: Any = None
        self._transfer: Literal["", "started", "arriving", "failed", "arrived"] = ""
        self.version = version
        self._engine.set_weight_version(str(version))
        self._vocabulary = size = self._engine.vllm_config.model_config.get_vocab_size()
        # vLLM refuses requests with others.
        self._stop_ids = [token_id for token_id in end_ids if token_id < size]

    @property
    def num_unfinished(self) -> int:
        """Returns the number of requests that are submitted and that `step` has not returned."""
        return len(self._waiting) + len(self._running) + len(self._drained)

    @property
    def num_tokens_under_way(self) -> int:
        """Returns the number of tokens generated so far by the requests that are not finished."""
        return sum(len(request.tokens) for request in self._running.values())

    def submit(
        self,
        request_id: str,
        tokens: Sequence[int],
        *,
        seed: int | None = None,
        temperature: float | None = None,
        max_tokens: int | None = None,
        stop: Sequence[str] = (),
    ) -> None:
        """Queues one request to go on from `tokens`.

        With `temperature` None the configured one counts; 0 is greedy. With `seed` None the engine's own
        generator draws. At most `max_tokens` are sampled; None: `actors.max_new_tokens`. A request also ends
        with the first of the texts `stop` that it has said, which is part of what it said.
        """
        config = self._config
        temperature = config.temperature if temperature is None else temperature
        limit = config.max_new_tokens if max_tokens is None else max_tokens
        options = Options(temperature, config.top_p, limit, tuple(stop))
        self._waiting.append(WaitingRequest(request_id, tuple(tokens), seed, options))

    def step(self) -> list[tuple[str, Generation]]:
        """Makes one forward pass of everything running, and returns what was generated by the requests that
        finished with it.

        A request waits here until it has a slot, so that it takes up the prefix cache of the weights it
        starts with. Raises PromptRefused, before the pass, when vLLM does not take such a request: that one
        is gone, the others are as before.
        """
        while self._waiting and len(self._running) < self._config.slots:
            waiting = self._waiting.popleft()
            try:
                self._start(waiting)
            except PromptRefused as refused:
                refused.request_id = waiting.request_id
                raise
        finished, self._drained = self._drained, []
        if self._running:
            finished += self._advance()
        return finished

    def _advance(self) -> list[tuple[str, Generation]]:
        """Lets vLLM make a step, and returns what finished with the tokens that came of it: on a GPU those of
        the step before, while the new one is under way.
        """
        try:
            outputs = self._engine.engine_core.get_output()
        except RuntimeError as error:
            self._raise_if_lost(error)
            raise
        finished: list[tuple[str, Generation]] = []
        for output in outputs.outputs:
            if (request := self._running.get(output.request_id)) is None:
                continue  # It was aborted while the step was under way.
            if reason := request.take(output, int(outputs.weight_version)):
                if not output.finished:  # A stop text ended it, of which vLLM's core knows nothing.
                    self._engine.engine_core.abort_requests([output.request_id])
                self._forget(output.request_id)
                finished.append((request.request_id, self._generation(request, reason)))
        return finished

    def _drain(self) -> None:
        """Waits for the pass that is under way on a GPU: new weights must not meet it, nor may its tokens be
        taken for theirs. Its tokens count now, and `step` returns what finished with them.

        vLLM notes the version when a pass has ended, and says that it changes only while generation pauses.
        """
        core = self._engine.engine_core.engine_core
        if core.batch_queue is None:
            return  # A CPU's passes are over when `step` returns.
        core.pause_scheduler("keep", clear_cache=False)  # This also waits for the device.
        try:
            # While vLLM pauses, each step adds an empty pass to the queue.
            while any(scheduled.total_num_scheduled_tokens for _, scheduled, *_ in core.batch_queue):
                self._drained += self._advance()
        finally:
            core.resume_scheduler()

    def overdue(self, timeout_s: float) -> list[str]:
        """Returns the requests that have had a slot for longer than `timeout_s` seconds."""
        deadline_s = time.monotonic() - timeout_s
        return [
            request.request_id
            for request in itertools.takewhile(
                lambda request: request.started_s < deadline_s, self._running.values()
            )
        ]

    def truncate(self, request_ids: list[str]) -> list[tuple[str, Generation]]:
        """Ends requests now, so that their slots are free; returns what those that have a token generated,
        with finish reason "length", and what those that `step` has yet to return had finished with.
        """
        asked = set(request_ids)
        ended = [each for each in self._drained if each[0] in asked]
        started = [self._running[self._names[name]] for name in request_ids if name in self._names]
        ended += [
            (request.request_id, self._generation(request, "length")) for request in started if request.tokens
        ]
        self.abort(request_ids)
        return ended

    def abort(self, request_ids: list[str]) -> None:
        """Drops requests, started or not, and what `step` has yet to return of them: their ids may be
        submitted again.
        """
        dropped = set(request_ids)
        self._drained = [each for each in self._drained if each[0] not in dropped]
        self._waiting = collections.deque(
            request for request in self._waiting if request.request_id not in dropped
        )
        names = [self._names[request_id] for request_id in request_ids if request_id in self._names]
        self._engine.engine_core.abort_requests(names)
        for name in names:
            self._forget(name)

    def load_weights(self, version: int, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Swaps in the weights of `version`; unfinished generations continue with them, on the old keys and
        values.

        Requests started later share no prefix with earlier ones. That is done by a salt in the cache's keys,
        since vLLM refuses to reset its prefix cache (returns False, no error) while anything is in flight.
        An engine over several GPUs reads them from shared memory: `share` them beforehand, beside generation.
        Raises SnapshotError when parameters of the model are missing from `weights`, or vLLM does not apply
        the adapters: the engine is then unusable.
        """
        self._drain()
        if self._adapters is not None:
            self._load_adapters(version, list(weights), self._adapters)
            self._take_over(version)
            return
        if self._config.tensor_parallel > 1 and not isinstance(weights, SharedWeights):
            weights = share(weights)
        workers = self._engine.collective_rpc("agro_load", args=(weights,))
        # Of a vocabulary that is divided, a worker may have but padding: lacking is what nobody got any of.
        if missing := sorted(set.intersection(*map(set, workers))):
            raise SnapshotError(
                f"weights of version {version} lack {len(missing)} parameters of the model: "
                f"{', '.join(missing[:5])}"
            )
        self._take_over(version)

    def _raise_if_lost(self, error: RuntimeError) -> None:
        """Raises WorkerLost from `error` where a worker process of the engine is gone: vLLM ends the others
        then, and says of that nothing but "cancelled".
        """
        if self._config.tensor_parallel == 1:
            return
        workers = self._engine.engine_core.engine_core.model_executor.workers
        ends = [describe_exit(code) for worker in workers if (code := worker.proc.exitcode) is not None]
        if ends:
            raise WorkerLost(
                f"of the {len(workers)} worker processes of the engine one is gone, and with it all of it: "
                f"{'; '.join(ends)}"
            ) from error

    def _generation(self, request: RunningRequest, reason: str) -> Generation:
        return request.generation(reason, self._detokenizer.text(request.tokens))

    def _forget(self, name: str) -> None:
        del self._names[self._running.pop(name).request_id]

    def _load_adapters(
        self, version: int, tensors: list[tuple[str, torch.Tensor]], adapters: Adapters
    ) -> None:
        """Exchanges the content of vLLM's one adapter."""
        from safetensors.torch import save_file
        from vllm.lora.request import LoRARequest

        layers = sorted({name.removeprefix(_PEFT_PREFIX).rpartition(".lora_")[0] for name, _ in tensors})
        settings = {
            "peft_type": "LORA",
            "r": adapters.rank,
            "lora_alpha": adapters.alpha,
            "target_modules": layers,
            "bias": "none",
        }
        try:
            with tempfile.TemporaryDirectory(prefix="agro-adapters-") as directory:
                save_file(dict(tensors), Path(directory, "adapter_model.safetensors"))
                Path(directory, "adapter_config.json").write_text(json.dumps(settings), encoding="utf-8")
                self._engine.add_lora(LoRARequest(_ADAPTER, 1, directory, load_inplace=True))
        except Exception as error:  # vLLM raises whatever it runs into, a KeyError or an assertion too.
            raise SnapshotError(
                f"vLLM does not take the adapters of version {version}: {type(error).__name__}: "
                f"{str(error)[:300]}"
            ) from error
        # vLLM passes over adapters of layers that it does not know by that name, or could not adapt.
        if unused := sorted(set().union(*self._engine.collective_rpc("agro_unused_adapters"))):
            raise SnapshotError(
                f"vLLM does not apply {len(unused)} adapters of version {version}: {', '.join(unused[:5])}"
            )
        self._lora_request = LoRARequest(_ADAPTER, 1, _NOWHERE)

    # --- weights that the learner pushes (actors/receiver.py) ---

    def connect_transfer(self, init_info: dict[str, Any]) -> list[Any]:
        """Meets the learner and the group's other actors, from any thread, while steps go on; returns when
        all have met.

        The connection is for `use_connection` or `drop_connection`.
        """
        connected: list[Any] = self._engine.collective_rpc("agro_connect", args=(init_info,))
        return connected

    def use_connection(self, connection: list[Any]) -> None:
        """Lets the next transfers arrive over this connection; the group before it is left."""
        # vLLM itself would leave the old group's communicator behind.
        self._engine.collective_rpc("shutdown_weight_transfer_engine")
        self._engine.collective_rpc("agro_use", args=(connection,))

    def drop_connection(self, connection: list[Any]) -> None:
        """Leaves a group that will not be used."""
        for engine in connection:
            engine.shutdown()

    def start_transfer(self) -> None:
        """Takes the model apart: no `step` may come before `finish_transfer` or `undo_transfer`."""
        self._drain()
        self._engine.collective_rpc("start_weight_update")
        self._transfer = "started"

    def update_transfer(self, update_info: dict[str, Any]) -> None:
        """Receives what `update_info` describes. Raises what vLLM, NCCL or CUDA raise."""
        self._transfer = "failed"
        self._engine.collective_rpc("update_weights", kwargs={"update_info": update_info})
        self._transfer = "arriving"

    def finish_transfer(self, version: int, probes: Mapping[str, str]) -> int:
        """Puts the new weights in place, as `load_weights` does; returns how many of `probes` vLLM's model
        confirms.

        `probes` are checksums by parameter. Raises SnapshotError when one of them differs: `undo_transfer`
        then.
        """
        self._engine.collective_rpc("finish_weight_update")
        self._transfer = "arrived"
        found: list[dict[str, str]] = self._engine.collective_rpc("agro_mend_update", args=(probes,))
        for name, value in probes.items():
            if any(worker.get(name, value) != value for worker in found):
                raise SnapshotError(f"version {version} arrived damaged: {name} is not what the learner sent")
        self._transfer = ""
        self._take_over(version)
        return min(map(len, found))

    def undo_transfer(self) -> None:
        """Puts the model together again: as it was if nothing had arrived, else without weights that count
        (version -1).
        """
        state, self._transfer = self._transfer, ""
        if state in ("started", "arriving"):
            self._engine.collective_rpc("finish_weight_update")  # Layers that got nothing keep what they had.
        elif state == "failed":  # vLLM has closed its session, but not the reload.
            self._engine.collective_rpc("agro_finalize")
        self._engine.collective_rpc("agro_mend_update", args=({},))
        if state != "started":
            self.version = -1
            self._engine.set_weight_version("-1")

    def abort_transfer(self) -> None:
        """Ends a broadcast that nobody sends any more; from any thread."""
        self._engine.collective_rpc("agro_abort_transfer")

    def _take_over(self, version: int) -> None:
        """Notes that the weights in place are those of `version`, for all that starts from here on."""
        self._num_updates += 1
        self._engine.set_weight_version(str(version))
        self.version = version

    def _start(self, waiting: WaitingRequest) -> None:
        """Gives a request to vLLM's core, past its output processor: see actors/requests.py."""
        request = copy.copy(self._prepare(waiting.tokens, waiting.options))
        self._num_started += 1
        # A name of its own: nothing of an aborted request is taken for what is asked again by its name.
        request.request_id = request.external_req_id = f"{waiting.request_id}-{self._num_started}"
        request.sampling_params = params = copy.copy(request.sampling_params)
        if self._config.num_gpus:
            params.seed = waiting.seed
        elif waiting.seed is not None:
            params.extra_args = {SEED: waiting.seed % 2**63}
        stops = None
        if waiting.options.stop:
            from vllm.v1.engine.detokenizer import IncrementalDetokenizer

            stops = IncrementalDetokenizer.from_new_request(self._engine.get_tokenizer(), request)
        self._engine.engine_core.add_request(request)
        self._names[waiting.request_id] = request.request_id
        self._running[request.request_id] = RunningRequest(waiting.request_id, stops)

    def _prepare(self, tokens: Sequence[int], options: Options) -> Any:
        """Returns vLLM's request for these tokens, to be copied: it is made, and checked, once for those that
        follow one another and differ in nothing but their seed. Raises PromptRefused.
        """
        wanted = list(tokens), options, self._num_updates
        if self._prepared[0] != wanted:
            self._prepared = wanted, self._made(wanted[0], options)
        return self._prepared[1]

    def _made(self, tokens: list[int], options: Options) -> Any:
        from vllm import SamplingParams
        from vllm.exceptions import VLLMValidationError
        from vllm.inputs.engine import tokens_input

        params = SamplingParams(
            temperature=options.temperature,
            top_p=options.top_p,
            max_tokens=options.max_tokens,
            stop=list(options.stop),
            logprobs=0,
            ignore_eos=True,  # vLLM would add what it takes for end tokens itself.
            stop_token_ids=self._stop_ids,
            # `Detokenizer` does, at the end: the same text as everywhere. vLLM's own finds stop texts alone.
            detokenize=bool(options.stop),
            skip_special_tokens=False,
            include_stop_str_in_output=True,
            skip_clone=True,  # It is made for this alone.
        )
        try:
            # vLLM asks the tokenizer too: an id that only the tokenizer has meets a row of zeros in its
            # padded embedding.
            if (largest := max(tokens, default=0)) >= self._vocabulary:
                raise VLLMValidationError(
                    f"Token id {largest} is out of vocabulary: the model has {self._vocabulary} tokens"
                )
            prompt = tokens_input(tokens, cache_salt=f"update-{self._num_updates}")
            return self._engine.input_processor.process_inputs(
                "", prompt, params, self._engine.get_supported_tasks(), lora_request=self._lora_request
            )
        except VLLMValidationError as error:
            raise PromptRefused(
                f"vLLM does not take the prompt of {len(tokens)} tokens: {str(error)[:300]}"
            ) from error
