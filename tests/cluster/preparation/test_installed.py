"""A config's devices against the packages that are installed: refused before anything starts, with what to
type.
"""

import pytest

from cluster.preparation.installed import check_installed, installed_kind
from cluster.preparation.prepare import check_start
from core.errors import ConfigError
from tests.support.configs import make_config

GPU = {"num_gpus": 1}


@pytest.fixture
def install(monkeypatch):
    """Makes the packages seem to be those of a kind."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return lambda kind: monkeypatch.setattr("cluster.preparation.installed.installed_kind", lambda: kind)


def test_this_machine_has_the_packages_of_its_kind():
    assert installed_kind() == "cpu"
    check_installed(make_config({}))


def test_an_engine_for_gpus_is_not_asked_to_generate_on_a_cpu(install, monkeypatch):
    install("gpu")
    with pytest.raises(ConfigError, match=r"actors\.num_gpus = 0, .*such as 0\.25, .*make setup KIND=cpu"):
        check_installed(make_config({}))
    check_installed(make_config({"actors": {"num_gpus": 0.25}}))
    monkeypatch.setenv("RAY_ADDRESS", "auto")  # The nodes' own packages count.
    check_installed(make_config({}))


def test_gpus_are_not_asked_of_packages_for_cpus(install):
    install("cpu")
    expected = (
        r"actors\.num_gpus = 1 and learner\.num_gpus = 1, .* Set actors\.num_gpus=0 learner\.num_gpus=0, "
    )
    with pytest.raises(ConfigError, match=expected):
        check_installed(make_config({"actors": GPU, "learner": GPU}))
    with pytest.raises(ConfigError, match=r"^learner\.num_gpus = 1, .* Set learner\.num_gpus=0, or"):
        check_installed(make_config({"learner": GPU}))


def test_a_reward_model_is_asked_of_no_gpu_either(install):
    install("cpu")
    config = make_config({"rewards": {"functions": {"reward_model:judge?num_gpus=1": 1.0}}})
    with pytest.raises(
        ConfigError, match=r"'reward_model:judge\?num_gpus=1' asks for a GPU, .*num_gpus=0, or"
    ):
        check_installed(config)


def test_flash_attention_that_is_not_installed_is_refused(install, monkeypatch):
    install("gpu")
    config = make_config(
        {
            "model": {"attention": "flash_attention_2", "dtype": "bfloat16"},
            "actors": GPU,
            "learner": GPU,
        }
    )
    with pytest.raises(ConfigError, match=r"flash_attn or kernels, .* Set model\.attention=sdpa"):
        check_installed(config)
    monkeypatch.setattr("cluster.preparation.installed.FLASH_PACKAGES", ("flash_attn", "json"))
    check_installed(config)


@pytest.mark.parametrize(
    ("section", "settings", "expected"),
    [
        ("learner", {"num_gpus": 0.5, "ranks": 2}, r"learner\.num_gpus = 0\.5 .* NCCL .* learner\.ranks=1"),
        ("actors", {"num_gpus": 0.25, "engine_memory": 0.3}, r"engine_memory = 0\.3 .* at most 0\.25, for"),
    ],
)
def test_a_card_is_not_shared_in_ways_that_cannot_be(section, settings, expected):
    with pytest.raises(ConfigError, match=expected):
        make_config({section: settings})


def test_what_a_start_and_a_dry_run_check_first_is_this(install):
    install("gpu")
    with pytest.raises(ConfigError, match=r"actors\.num_gpus = 0"):
        check_start(make_config({}))
