"""The inference engine: every call into vLLM is in this file.

vLLM's engine runs inside this process (no engine-core process), so that weights can be swapped between two
steps while unfinished generations go on. Each sample is a request of its own; vLLM's prefix cache shares the
prompt of a group.

Weights arrive through vLLM's layerwise reload, the lifecycle of its own transfer engines. Surprises handled
here: on a CPU vLLM packs the linear layers and drops the originals, so a bare `load_weights` fails; and after
a reload a tied `lm_head` and all mixtures of experts keep what was packed of the OLD weights, silently wrong.
`tests/actors/test_engine.py` and `tests/system/test_families.py` hold them to account.

Weights that the learner pushes (`weights.transport` nccl or ipc) arrive through vLLM's own transfer engines,
in a session of start, updates and finish in which the model is in pieces: no step may come between. vLLM's
own checksums are not used to confirm them: they hash all of its fused parameters on the host, seconds for
each GB, and the learner has nothing to compare them with.

Where adapters come alone (`weights.transport` adapters), the model stays as it was loaded, and one LoRA
request, whose content is exchanged between two steps, serves everything, also what is under way. vLLM reads
adapters from a directory: it gets one that lives for that moment."""

from __future__ import annotations

import collections
import contextlib
import copy
import itertools
import json
import logging
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from actors.engine_settings import Adapters, engine_arguments, lora_arguments, set_engine_environment
from actors.episode import Generation
from core.arrays import Float32s, Int32s
from core.config import ActorsConfig, ModelConfig
from core.errors import AgroError, SnapshotError
from core.records import VersionSpan
from core.tokenizer import Detokenizer, end_token_ids, load_tokenizer
from core.weights.snapshots import checksum

_ADAPTER = "policy"
_PEFT_PREFIX = "base_model.model."
_NOWHERE = "/nonexistent/agro-policy"
"""Of requests: vLLM has the adapter in memory. No relative path: vLLM would look for it on the hub."""


class PromptRefused(AgroError, ValueError):
    """vLLM does not take the prompt of request `request_id`: too long for it, empty, or with token ids
    it does not know.
    """

    request_id = ""


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
        """Builds the engine; it has its base's weights, which are called `version`.

        With any other `transport` (the carrier of `weights.transport`) than snapshot, weights can be pushed
        too. With `adapters`, what `load_weights` gets are adapters of that kind for the model's own weights.
        `skip_special_tokens` (`rewards.skip_special_tokens`) is about the texts.
        """
        set_engine_environment(config)
        from vllm import EngineArgs, LLMEngine

        self._config, self._adapters = config, adapters
        tokenizer = load_tokenizer(model)
        end_ids = end_token_ids(model, tokenizer)
        self._detokenizer = Detokenizer(tokenizer, end_ids, skip_special_tokens=skip_special_tokens)
        arguments = engine_arguments(model, config, max_model_len=max_model_len, seed=seed)
        if adapters is not None:
            arguments |= lora_arguments(model, adapters)
        if transport != "snapshot":
            arguments["weight_transfer_config"] = {"backend": transport}
        self._engine: Any = LLMEngine.from_engine_args(EngineArgs(**arguments))
        if config.num_gpus == 0:
            self._engine.apply_model(_mend_for_cpu)
        # `_reload` checks itself what a snapshot leaves out; vLLM names layers that have nothing to load, at
        # every update.
        logging.getLogger("vllm.model_executor.model_loader.reload.layerwise").setLevel(logging.ERROR)
        self._waiting: collections.deque[tuple[str, list[int], Any]] = collections.deque()
        self._started_s: dict[str, float] = {}  # When each running request got its slot; the oldest first.
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
        """Returns the number of requests that are submitted and not finished."""
        return len(self._waiting) + self._engine.get_num_unfinished_requests()

    @property
    def num_tokens_under_way(self) -> int:
        """Returns the number of tokens generated so far by the requests that are not finished."""
        return sum(
            state.detokenizer.num_output_tokens()
            for state in self._engine.output_processor.request_states.values()
        )

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
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        config = self._config
        limit = config.max_new_tokens if max_tokens is None else max_tokens
        params = SamplingParams(
            temperature=config.temperature if temperature is None else temperature,
            top_p=config.top_p,
            max_tokens=limit,
            seed=seed,
            stop=list(stop),
            logprobs=0,
            ignore_eos=True,  # vLLM would add what it takes for end tokens itself.
            stop_token_ids=self._stop_ids,
            # `Detokenizer` does, at the end: the same text as everywhere. vLLM's own finds stop texts alone.
            detokenize=bool(stop),
            skip_special_tokens=False,
            include_stop_str_in_output=True,
            output_kind=RequestOutputKind.FINAL_ONLY,
            # Made for this request alone; a deep copy of it is a tenth of a short generation's time.
            skip_clone=True,
        )
        self._waiting.append((request_id, list(tokens), params))

    def step(self) -> list[tuple[str, Generation]]:
        """Makes one forward pass of everything running, and returns what was generated by the requests that
        finished with it.

        A request waits here until it has a slot, so that it takes up the prefix cache of the weights it
        starts with. Raises PromptRefused, before the pass, when vLLM does not take such a request: that one
        is gone, the others are as before.
        """
        while self._waiting and self._engine.get_num_unfinished_requests() < self._config.slots:
            self._start(*self._waiting.popleft())
        finished = [
            (output.request_id, self._generation(output.outputs[0]))
            for output in self._engine.step()
            if output.finished
        ]
        for request_id, _ in finished:
            del self._started_s[request_id]
        return finished

    def overdue(self, timeout_s: float) -> list[str]:
        """Returns the requests that have had a slot for longer than `timeout_s` seconds."""
        deadline_s = time.monotonic() - timeout_s
        return [
            request_id
            for request_id, _ in itertools.takewhile(
                lambda started: started[1] < deadline_s, self._started_s.items()
            )
        ]

    def truncate(self, request_ids: list[str]) -> list[tuple[str, Generation]]:
        """Ends requests now, so that their slots are free; returns what those that have a token generated,
        with finish reason "length".

        vLLM drops what an aborted request has: it is taken out of the request's state before.
        """
        from vllm.v1.engine import FinishReason

        processor = self._engine.output_processor
        ended = []
        for request_id in request_ids:
            for internal_id in processor.external_req_ids.get(request_id, ()):
                output = (
                    processor.request_states[internal_id]
                    .make_request_output([], None, FinishReason.LENGTH, None)
                    .outputs[0]
                )
                if output.token_ids:
                    ended.append((request_id, self._generation(output)))
        self.abort(request_ids)
        return ended

    def abort(self, request_ids: list[str]) -> None:
        """Drops requests, started or not."""
        dropped = set(request_ids)
        self._waiting = collections.deque(request for request in self._waiting if request[0] not in dropped)
        self._engine.abort_request(request_ids)
        for request_id in dropped:
            self._started_s.pop(request_id, None)

    def load_weights(self, version: int, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Swaps in the weights of `version`; unfinished generations continue with them, on the old keys and
        values.

        Requests started later share no prefix with earlier ones. That is done by a salt in the cache's keys,
        since vLLM refuses to reset its prefix cache (returns False, no error) while anything is in flight.
        Raises SnapshotError when parameters of the model are missing from `weights`, or vLLM does not apply
        the adapters: the engine is then unusable.
        """
        tensors = list(weights)
        if self._adapters is not None:
            self._load_adapters(version, tensors, self._adapters)
            self._take_over(version)
            return
        workers = self._engine.apply_model(
            lambda model: _reload(model, tensors, self._engine.vllm_config.model_config)
        )
        if missing := sorted(set().union(*workers)):
            raise SnapshotError(
                f"weights of version {version} lack {len(missing)} parameters of the model: "
                f"{', '.join(missing[:5])}"
            )
        self._take_over(version)

    def _generation(self, output: Any) -> Generation:
        token_ids = list(output.token_ids)
        logprobs = [step[token].logprob for step, token in zip(output.logprobs, token_ids, strict=True)]
        return Generation(
            tokens=Int32s.of(token_ids),
            logprobs=Float32s.of(logprobs),
            version_spans=tuple(
                VersionSpan(int(span.version), span.start, span.end) for span in output.weight_versions
            ),
            finish_reason=output.finish_reason,
            text=self._detokenizer.text(token_ids),
        )

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
        if unused := sorted(set().union(*self._engine.apply_model(_unused_adapters))):
            raise SnapshotError(
                f"vLLM does not apply {len(unused)} adapters of version {version}: {', '.join(unused[:5])}"
            )
        self._lora_request = LoRARequest(_ADAPTER, 1, _NOWHERE)

    # --- weights that the learner pushes (actors/receiver.py) ---

    def connect_transfer(self, init_info: dict[str, Any]) -> list[Any]:
        """Meets the learner and the group's other actors, from any thread, while steps go on; returns when
        all have met.

        The connection is for `use_connection` or `drop_connection`. Each worker connects a copy of vLLM's
        engine: a meeting that comes about after it was given up cannot take the place of a newer one.
        """

        def connect(worker: Any) -> Any:
            engine = copy.copy(worker.weight_transfer_engine)
            # A stream of its own: generation does not wait for the others, as it would on the default one.
            on_gpu = worker.device.type == "cuda"
            with torch.cuda.stream(torch.cuda.Stream(worker.device)) if on_gpu else contextlib.nullcontext():
                engine.init_transfer_engine(engine.parse_init_info(init_info))
            return engine

        connected: list[Any] = self._engine.collective_rpc(connect)
        return connected

    def use_connection(self, connection: list[Any]) -> None:
        """Lets the next transfers arrive over this connection; the group before it is left."""
        # vLLM itself would leave the old group's communicator behind.
        self._engine.collective_rpc("shutdown_weight_transfer_engine")
        # What `collective_rpc` hands out is vLLM's wrapper of the worker, which passes on what is read but
        # not what is set.
        self._engine.collective_rpc(
            lambda wrapper: setattr(wrapper.worker, "weight_transfer_engine", connection[wrapper.rank])
        )

    def drop_connection(self, connection: list[Any]) -> None:
        """Leaves a group that will not be used."""
        for engine in connection:
            engine.shutdown()

    def start_transfer(self) -> None:
        """Takes the model apart: no `step` may come before `finish_transfer` or `undo_transfer`."""
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
        model_config = self._engine.vllm_config.model_config
        found: list[dict[str, str]] = self._engine.apply_model(
            lambda model: _mended(model, model_config, probes)
        )
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
        model_config = self._engine.vllm_config.model_config
        if state in ("started", "arriving"):
            self._engine.collective_rpc("finish_weight_update")  # Layers that got nothing keep what they had.
        elif state == "failed":  # vLLM has closed its session, but not the reload.
            self._engine.apply_model(lambda model: _finalize(model, model_config))
        self._engine.apply_model(lambda model: _mended(model, model_config, {}))
        if state != "started":
            self.version = -1
            self._engine.set_weight_version("-1")

    def abort_transfer(self) -> None:
        """Ends a broadcast that nobody sends any more; from any thread."""
        self._engine.collective_rpc(lambda worker: worker.weight_transfer_engine.shutdown())

    def _take_over(self, version: int) -> None:
        """Notes that the weights in place are those of `version`, for all that starts from here on."""
        self._num_updates += 1
        self._engine.set_weight_version(str(version))
        self.version = version

    def _start(self, request_id: str, tokens: list[int], params: Any) -> None:
        from vllm.exceptions import VLLMValidationError
        from vllm.inputs.engine import tokens_input

        try:
            # vLLM asks the tokenizer too: an id that only the tokenizer has meets a row of zeros in its
            # padded embedding.
            if (largest := max(tokens, default=0)) >= self._vocabulary:
                raise VLLMValidationError(
                    f"Token id {largest} is out of vocabulary: the model has {self._vocabulary} tokens"
                )
            prompt = tokens_input(tokens, cache_salt=f"update-{self._num_updates}")
            self._engine.add_request(request_id, prompt, params, lora_request=self._lora_request)
        except VLLMValidationError as error:
            refused = PromptRefused(
                f"vLLM does not take the prompt of {len(tokens)} tokens: {str(error)[:300]}"
            )
            refused.request_id = request_id
            raise refused from error
        self._started_s[request_id] = time.monotonic()


def _unused_adapters(model: Any) -> set[str]:
    """Returns the layers of vLLM's one adapter that are none of the layers it applies adapters to."""
    manager = model.lora_manager
    return set(manager.get_adapter(1).loras) - set(manager.modules)


def _reload(model: Any, tensors: list[tuple[str, torch.Tensor]], model_config: Any) -> list[str]:
    """Loads `tensors` into `model` and returns the names, as vLLM has them, of parameters that got nothing.

    Among them are those that a model's own loader wrote past the reload (gpt-oss its experts): loaded, it
    says, but they would be the old ones.
    """
    from vllm.model_executor.model_loader.reload import initialize_layerwise_reload
    from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

    # Of each parameter: a router's gate, for example, is part of two modules.
    names = collections.defaultdict[int, set[str]](set)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names[id(parameter)].add(name)
    initialize_layerwise_reload(model)
    loaded = model.load_weights(tensors)
    for prefix, layer in model.named_modules():
        if (info := get_layerwise_info(layer)).can_load() and info.load_numel <= 0:
            loaded -= {f"{prefix}.{name}" for name, _ in layer.named_parameters(recurse=False)}
    _finalize(model, model_config)
    _mended(model, model_config, {})
    loaded |= {"lm_head.weight"} if model_config.hf_text_config.tie_word_embeddings else set()
    return sorted(min(aliases) for aliases in names.values() if not aliases & loaded)


def _finalize(model: Any, model_config: Any) -> None:
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

    finalize_layerwise_reload(model, model_config)


def _mended(model: Any, model_config: Any, probes: Mapping[str, str]) -> dict[str, str]:
    """Does what vLLM leaves to do after a reload; returns the checksums of those `probes` that are parameters
    of the model.
    """
    if model_config.hf_text_config.tie_word_embeddings:
        _repack_head(getattr(model, "lm_head", None))
    for layer in model.modules():
        _repack_experts(layer)
    return {name: checksum(parameter) for name, parameter in model.named_parameters() if name in probes}


def _mend_for_cpu(model: Any) -> None:
    """Mends, once when the model is loaded, where vLLM's CPU code computes another function than its GPU code
    and the learner.

    Its kernel for rotary embeddings of interleaved pairs takes the heads of a [tokens, heads, size] query for
    one (DeepSeek). Its router knows corrections of the scores, and sigmoids, only in groups of experts: all
    experts are one group then (Ernie 4.5, MiniMax).
    """
    from vllm.model_executor.layers.fused_moe.router.cpu_router import CPURouter

    for layer in model.modules():
        if getattr(layer, "is_neox_style", True) is False and hasattr(layer, "_forward_method"):
            layer._forward_method = layer.forward_native
        router = getattr(layer, "router", None)
        if isinstance(router, CPURouter) and not router.use_grouped_topk:
            is_corrected = router.e_score_correction_bias is not None and router.scoring_func == "softmax"
            if is_corrected or router.scoring_func == "sigmoid":
                router.use_grouped_topk, router.num_expert_group, router.topk_group = True, 1, 1


def _repack_experts(layer: Any) -> None:
    """Lets a layer's experts be prepared anew (CPU only): vLLM does so once, and would go on with those of
    the first weights.
    """
    kernel = getattr(getattr(layer, "quant_method", None), "moe_kernel", None)
    if kernel is not None and layer.w13_weight.device.type == "cpu":
        kernel.fused_experts.process_weights_after_loading(layer)


def _repack_head(head: Any) -> None:
    """Packs a tied `lm_head` anew (CPU only): a reload brings back the matrix packed of the old weights."""
    from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

    if getattr(head, "cpu_linear", None) is not None:
        dispatch_cpu_unquantized_gemm(head, remove_weight=False)
