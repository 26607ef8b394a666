"""What an engine is started with, and the garbage collector that rests while libraries load."""

import gc
import sys
from types import SimpleNamespace

import pytest

from actors.engine_settings import (
    CONTEXT_BYTES,
    check_device,
    engine_arguments,
    without_collections,
    without_lowering,
)
from core.config import ActorsConfig, ModelConfig
from core.errors import ConfigError


@pytest.mark.parametrize(
    ("num_gpus", "slots", "max_model_len", "expected"),
    [
        (0, 128, 512, 2048),
        (0, 8, 200, 1600),  # No pass can have more.
        (0, 4096, 512, 4096),
        (0, 128, 3000, 3000),  # A prompt comes in one piece.
        (1, 128, 32_768, 8192),
        (1, 10_000, 32_768, 10_000),
    ],
)
def test_a_pass_has_room_for_all_slots_and_for_long_prompts(
    tiny_models, num_gpus, slots, max_model_len, expected
):
    model = ModelConfig(path=str(tiny_models["tied"]))
    config = ActorsConfig(num_gpus=num_gpus, slots=slots)
    arguments = engine_arguments(model, config, max_model_len=max_model_len, seed=0)
    assert arguments["max_num_batched_tokens"] == expected


def test_engines_that_share_a_gpu_share_its_memory():
    assert [ActorsConfig(num_gpus=gpus).gpu_memory_share for gpus in (1, 0.5, 0.25)] == [0.85, 0.425, 0.2125]
    assert ActorsConfig(num_gpus=0.5, engine_memory=0.4).gpu_memory_share == 0.4


def test_an_engine_that_shares_a_card_does_not_measure_what_others_take(tiny_models):
    """vLLM counts as its own what another process has taken of the card since it began."""
    model, card_bytes = ModelConfig(path=str(tiny_models["tied"])), 80 * 2**30

    def arguments(**settings):
        config = ActorsConfig(**settings)
        return engine_arguments(model, config, max_model_len=512, seed=0, card_bytes=card_bytes)

    quarter = arguments(num_gpus=0.25, engine_memory=0.2)["kv_cache_memory_bytes"]
    assert 13 * 2**30 < quarter < 0.2 * card_bytes - CONTEXT_BYTES
    assert arguments(num_gpus=0.25, engine_memory=0.2, slots=256)["kv_cache_memory_bytes"] < quarter
    assert "kv_cache_memory_bytes" not in arguments(num_gpus=1)
    with pytest.raises(
        ConfigError, match=r"actors\.engine_memory = 0\.02 is 1\.6 GiB of this card: .* Raise"
    ):
        arguments(num_gpus=0.25, engine_memory=0.02)


def test_an_engine_for_gpus_takes_none_that_it_was_not_given():
    gpus = SimpleNamespace(is_cuda_alike=lambda: True, is_cpu=lambda: False)
    with pytest.raises(ConfigError, match=r"actors\.num_gpus = 0, .* Set actors\.num_gpus=1"):
        check_device(ActorsConfig(), gpus)
    check_device(ActorsConfig(num_gpus=0.5), gpus)
    cpu = SimpleNamespace(is_cuda_alike=lambda: False, is_cpu=lambda: True)
    with pytest.raises(ConfigError, match=r"actors\.num_gpus = 0\.5, .* Set actors\.num_gpus=0"):
        check_device(ActorsConfig(num_gpus=0.5), cpu)
    check_device(ActorsConfig(), cpu)


def test_nothing_is_collected_while_libraries_load_and_what_is_there_is_left_out_afterwards(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delitem(sys.modules, "vllm", raising=False)  # Another test of this process may have it.
    before = gc.get_freeze_count()
    with without_collections():
        assert not gc.isenabled()
        loaded = [[] for _ in range(1000)]
    assert gc.isenabled()
    assert gc.get_freeze_count() >= before + len(loaded)


def test_torchs_lowering_is_left_out_of_an_import_for_a_cpu_alone():
    name = "torch._inductor.lowering"
    known = name in sys.modules
    with without_lowering(ActorsConfig(num_gpus=1)):
        assert (name in sys.modules) is known
    before = sys.modules.pop(name, None)
    try:
        with without_lowering(ActorsConfig()):
            assert sys.modules[name] is None, "an import of it fails"  # type: ignore[comparison-overlap]
        assert name not in sys.modules, "whoever needs it later has it"
    finally:
        if before is not None:
            sys.modules[name] = before


def test_the_collector_is_as_it_was_also_after_an_import_that_fails():
    with pytest.raises(ImportError), without_collections():
        raise ImportError
    assert gc.isenabled()
    gc.disable()
    try:
        with without_collections():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
