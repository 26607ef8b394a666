"""The garbage collector rests while libraries load, and is as it was afterwards."""

import gc

import pytest

from actors.engine_settings import without_collections


def test_nothing_is_collected_while_libraries_load_and_what_is_there_is_left_out_afterwards():
    before = gc.get_freeze_count()
    with without_collections():
        assert not gc.isenabled()
        loaded = [[] for _ in range(1000)]
    assert gc.isenabled()
    assert gc.get_freeze_count() >= before + len(loaded)


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
