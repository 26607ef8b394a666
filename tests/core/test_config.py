"""Configs: every bad one is one short ConfigError that names field, value and remedy; the shipped ones
load and are documented.
"""

from __future__ import annotations

import pytest
import yaml

from cluster.cli.reference import config_reference, num_fields
from core.config.files import dump_config
from core.errors import AgroError, ConfigError
from learner.catalogue import OBJECTIVES, load_config, parse_config
from tests.support import ROOT
from tests.support.configs import EXAMPLE, MAX_LINES, SECTION_MODELS

SHIPPED = sorted((ROOT / "configs").glob("*.yaml"))


@pytest.fixture
def example(tmp_path):
    path = tmp_path / "example.yaml"
    path.write_text(yaml.safe_dump(EXAMPLE))
    return path


def message_of(path, *overrides: str) -> str:
    """The ConfigError's message; fails on no error, another error, or a message that is not short."""
    with pytest.raises(ConfigError) as caught:
        load_config(path, list(overrides))
    message = str(caught.value)
    assert len(message.splitlines()) <= MAX_LINES
    assert "Traceback" not in message
    assert "pydantic" not in message
    assert isinstance(caught.value, AgroError)
    return message


# Overrides: change -> what the message must contain.
BAD_OVERRIDES = [
    # Unknown names, with the nearest valid one
    ("learner.lrr=1e-5", ["learner.lrr", "not a known key", "did you mean 'lr'"]),
    ("learnr.lr=1e-5", ["learnr", "did you mean 'learner'"]),
    ("actors.groupsize=4", ["actors.groupsize", "did you mean 'group_size'"]),
    ("buffer.max_stalenes=4", ["did you mean 'max_staleness'"]),
    ("model.torch_dtype=float32", ["model.torch_dtype", "did you mean 'dtype'"]),
    ("actors.lr=1e-5", ["actors.lr", "did you mean learner.lr"]),
    ("learner.seed=3", ["learner.seed", "did you mean run.seed"]),
    ("learner.temperature=1.0", ["did you mean actors.temperature?"]),
    ("objective.zzzzzz=1", ["objective.zzzzzz", "valid here", "beta", "on_policy_coef"]),
    ("objective.importance_weigth=none", ["objective.importance_weigth", "did you mean 'importance_weight'"]),
    ("learner.beta=0.1", ["learner.beta", "did you mean objective.beta?"]),
    (
        "objective.clip_low=0.1",
        ["objective.clip_low is not", "agro is without it, dr_grpo, grpo, gspo, ppo_decoupled have it"],
    ),
    ("objective.name=grop", ["objective.name = 'grop'", "did you mean 'grpo'", "valid here: agro, asymre"]),
    ("objective.name=3", ["objective.name = '3'", "valid here: agro, asymre"]),
    ("objective.name=grpo objective.clip_low=2.0", ["objective.clip_low = 2.0", "less than 1"]),
    # Types
    ("run.steps=ten", ["run.steps", "'ten'", "whole number"]),
    ("run.steps=1.5", ["run.steps", "1.5", "whole number"]),
    ("run.steps=true", ["run.steps", "True", "whole number"]),
    ("run.steps=", ["run.steps", "None", "whole number"]),
    ("run.steps='100'", ["run.steps", "'100'", "whole number"]),
    ("learner.lr=fast", ["learner.lr", "'fast'", "number"]),
    ("learner.lr=true", ["learner.lr", "True", "number"]),
    ("learner.lr=[1e-5]", ["learner.lr", "number"]),
    ("model.trust_remote_code=1", ["model.trust_remote_code", "true or false"]),
    ("model.trust_remote_code='yes'", ["model.trust_remote_code", "'yes'", "true or false"]),
    ("learner.offload=2", ["learner.offload", "none", "reference", "all"]),
    ("learner.offload='yes'", ["learner.offload", "yes", "none", "reference", "all"]),
    ("model.path=", ["model.path = ''", "not empty"]),
    ("run.dir=", ["run.dir = ''", "not empty"]),
    ("data.path=a\nb", ["data.path = 'a\\nb'", "line break (U+000A)", "single quotes"]),
    (
        "data.system_prompt=\x08oxed",
        ["data.system_prompt = '\\x08oxed'", "a backspace (U+0008)", "single quotes"],
    ),
    ("data.system_prompt=\x1b[0m", ["an escape (U+001B)"]),
    ("data.system_prompt=a\x85", ["a control character (U+0085)"]),
    ("data.system_prompt=a\udcff", ["no character", "not UTF-8"]),
    ("run.steps=1:30", ["run.steps = '1:30'", "whole number"]),
    ("run.steps=1_000", ["run.steps = '1_000'", "whole number"]),
    ("run.steps=1e3", ["run.steps = 1000.0", "whole number"]),
    ("learner.lr=2024-01-31", ["learner.lr = '2024-01-31'", "number"]),
    ("model.trust_remote_code=yes", ["model.trust_remote_code = 'yes'", "true or false"]),
    (
        "rewards.functions=math_verify",
        ["rewards.functions", "'math_verify'", "expected names and their weights", "{exact_match: 1.0}"],
    ),
    ("rewards.functions=[math_verify]", ["rewards.functions", "'math_verify'", "names and their weights"]),
    ("rewards.functions=[{name: exact_match}]", ["rewards.functions", "names and their weights"]),
    ("rewards.functions={}", ["rewards.functions", "at least one"]),
    ("rewards.functions={exact_match: }", ["rewards.functions.exact_match = None", "number"]),
    ("rewards.functions={exact_match: much}", ["rewards.functions.exact_match = 'much'", "number"]),
    ("rewards.functions={a: 1, mine:f?messages: 1}", ["not YAML", "question mark wants quotes"]),
    # Ranges and choices
    ("run.steps=0", ["run.steps = 0", "greater than or equal to 1"]),
    ("run.seed=-1", ["run.seed = -1", "greater than or equal to 0"]),
    ("run.timeout_s=0", ["run.timeout_s = 0", "greater than 0"]),
    ("run.name=my/run", ["run.name = 'my/run'", "letters, digits"]),
    ("run.name=my\n", ["run.name = 'my\\n'"]),
    ("run.name=" + "x" * 101, ["run.name", "at most 100 characters"]),
    # What some library, or no cluster, takes
    ("run.seed=4294967296", ["run.seed = 4294967296", "below 4,294,967,296"]),
    ("run.timeout_s=1e9", ["run.timeout_s = 1000000000.0", "less than or equal to 2000000"]),
    ("rewards.timeout_s=1e300", ["rewards.timeout_s = 1e+300", "less than or equal to 2000000"]),
    ("run.timeout_s=.inf", ["run.timeout_s = inf", "finite"]),
    (
        "actors.straggler_timeouts_s=[1e7, null]",
        ["actors.straggler_timeouts_s = (10000000.0, None)", "2,000,000"],
    ),
    ("actors.straggler_timeouts_s=[null, 0]", ["actors.straggler_timeouts_s = (None, 0)", "seconds above 0"]),
    (
        "actors.straggler_timeouts_s=60",
        ["actors.straggler_timeouts_s = 60", "expected [sample, group]", "[null, 60]"],
    ),
    ("actors.count=1000000000", ["actors.count = 1000000000", "from 0 to 10000"]),
    ("learner.ranks=1000000", ["learner.ranks = 1000000", "less than or equal to 10000"]),
    ("actors.num_cpus=1e9", ["actors.num_cpus", "less than or equal to 10000"]),
    ("actors.slots=10000000", ["actors.slots = 10000000", "less than or equal to 65536"]),
    ("actors.max_new_tokens=1000000000", ["actors.max_new_tokens", "less than or equal to"]),
    ("run.steps=100000000000", ["run.steps = 100000000000", "below 4,294,967,296"]),
    ("checkpoint.every=1" + "0" * 30, ["checkpoint.every", "below 4,294,967,296"]),
    ("learner.lr=1e300", ["learner.lr = 1e+300", "below 4,294,967,296"]),
    ("learner.lr=1e400", ["learner.lr = inf", "finite"]),
    ("learner.lr=" + "9" * 5000, ["a number of 5000 characters"]),
    ("model.make=recipes.smollm2", ["model.make = 'recipes.smollm2'", "module:function"]),
    ("model.dtype=float16", ["model.dtype = 'float16'", "'float32' or 'bfloat16'"]),
    ("learner.lr=-1e-5", ["learner.lr = -1e-05", "greater than 0"]),
    ("learner.lr=.nan", ["learner.lr = nan", "finite"]),
    ("learner.lr=.inf", ["learner.lr = inf", "finite"]),
    ("actors.group_size=1", ["actors.group_size = 1", "greater than or equal to 2"]),
    ("actors.top_p=1.5", ["actors.top_p = 1.5", "less than or equal to 1"]),
    (
        "actors.temperature=0",
        ["actors.temperature = 0", "vLLM would sample instead", "Set it to 0.01 or more"],
    ),
    ("actors.temperature=0.0099", ["actors.temperature = 0.0099", "below 0.01"]),
    ("actors.temperature=-1.0", ["actors.temperature = -1", "below 0.01"]),
    (
        "eval.sampling=[4, 0.005]",
        ["eval.sampling = [4, 0.005]", "greedily at a temperature of 0", "or to 0.01 or more"],
    ),
    ("eval.sampling=[4, -0.5]", ["eval.sampling = [4, -0.5]", "greedily at a temperature of 0"]),
    ("eval.sampling=4", ["eval.sampling = 4", "completions per prompt", "[4, 1.0]"]),
    ("eval.sampling=[0, 1.0]", ["eval.sampling = (0, 1.0)", "from 1 to 65536"]),
    ("eval.sampling=[1, .nan]", ["eval.sampling = (1, nan)"]),
    (
        "actors.engine_memory=90 actors.num_gpus=1",
        ["actors.engine_memory = 90", "a share of the card's memory, not GiB", "at most 1"],
    ),
    ("actors.engine_memory=0", ["actors.engine_memory = 0", "greater than 0"]),
    ("buffer.sampler={stratified: {0-1: 0.5, 1-2: 0.5}}", ["buffer.sampler", "from 0 is empty or overlaps"]),
    (
        "buffer.sampler={stratified: {young: 1.0}}",
        ["buffer.sampler: stratified: 'young' is no range of staleness"],
    ),
    ("buffer.sampler={stratified: {0-1: 0.5, 2: 0.4}}", ["the shares are [0.5, 0.4]", "sum is 1"]),
    (
        "buffer.samples_per_insert=[1.0, 2.0]",
        ["buffer.samples_per_insert = [1, 2]", "buffer.uses_per_group = 1"],
    ),
    ("actors.count=[3, 2]", ["actors.count = (3, 2)", "the fewest and the most", "[1, 8]"]),
    ("actors.count=[0, 2]", ["actors.count = (0, 2)", "the fewest and the most"]),
    ("actors.count=true", ["actors.count = True", "whole number from 0"]),
    ("learner.schedule=cosine", ["learner.schedule = 'cosine'", "steps of warm-up", "[10, cosine]"]),
    ("learner.schedule=[-1, cosine]", ["learner.schedule = (-1, 'cosine')"]),
    ("learner.schedule=[10, exponential]", ["constant, linear or cosine"]),
    ("buffer.sampler={oldest: {0-1: 1.0}}", ["buffer.sampler = {'oldest'", "expected 'uniform'"]),
    ("buffer.sampler={stratified: 3}", ["stratified = 3", "shares by staleness"]),
    (
        "buffer.sampler=newest",
        [
            "buffer.sampler = 'newest'",
            "'uniform', 'fresh', 'oldest', 'stratified' or 'priority'",
            "{stratified: {0-1: 0.5",
        ],
    ),
    ("objective.beta=-0.1", ["objective.beta = -0.1", "greater than or equal to 0"]),
    ("rewards.max_error_fraction=2", ["rewards.max_error_fraction = 2", "less than or equal to 1"]),
    ("learner.offload=yes please", ["learner.offload = 'yes please'", "'none', 'reference' or 'all'"]),
    # What does not fit together
    ("buffer.capacity=31", ["buffer.capacity = 31", "learner.groups_per_step = 32", "Raise buffer.capacity"]),
    (
        "learner.micro_batch_tokens=16 actors.max_new_tokens=100",
        ["learner.micro_batch_tokens = 16", "= 108", "Raise"],
    ),
    ("objective.on_policy_coef=0.1 objective.beta=0", ["objective.on_policy_coef > 0", "objective.beta > 0"]),
    ("objective.on_policy_coef=1.5", ["objective.on_policy_coef = 1.5", "less than or equal to 1"]),
    (
        "objective.beta=0 objective.ref_update_every=5",
        ["objective.ref_update_every = 5", "no reference to move"],
    ),
    (
        "objective.importance_weight=tis_token",
        ["objective.importance_weight = 'tis_token'", "'none', 'truncated', 'token' or 'geometric'"],
    ),
    ("objective.target=pass@9", ["objective.target = pass@9", "actors.group_size = 8", "lower k"]),
    ("objective.target=pass", ["objective.target = 'pass'", "majority@k"]),
    ("objective.target=majority@10 actors.group_size=20", ["184756 subsets", "more than 20000", "smaller k"]),
    (
        "objective.target=pass@2 objective.on_policy_coef=0.01",
        ["objective.target = pass@2", "Set objective.on_policy_coef=0"],
    ),
    (
        "objective.target=pass@2 objective.name=grpo",
        ["objective.target is not a known key", "grpo is without it, agro has it", "clip_low"],
    ),
    ("data.path=null", ["data.path is missing", "data.offline"]),
    ("actors.count=0", ["actors.count = 0", "data.offline alone"]),
    (
        "data.offline_share=0.5",
        ["data.offline_share is not a known key", "write data.offline: LOG?share=0.5"],
    ),
    (
        "data.offline=x.jsonl?share=0.5 data.path=null",
        ["data.offline = x.jsonl?share=0.5", "set data.path"],
    ),
    ("data.offline=x.jsonl?share=0.01", ["data.offline = x.jsonl?share=0.01", "rounds to 0 samples"]),
    ("data.offline=x.jsonl?share=half", ["data.offline = 'x.jsonl?share=half'", "above 0 and at most 1"]),
    ("data.offline=x.jsonl?share=1.5", ["data.offline = 'x.jsonl?share=1.5'", "above 0 and at most 1"]),
    ("data.offline=?share=0.5", ["data.offline = '?share=0.5'", "a log and a share"]),
    ("data.offline=x.jsonl?share=0", ["data.offline = 'x.jsonl?share=0'", "above 0 and at most 1"]),
    (
        "data.system_prompt=Think.",
        ["data.system_prompt", "data.chat_template = false", "Set data.chat_template=true"],
    ),
    ("actors.num_gpus=2", ["actors.num_gpus = 2", "raise actors.count", "actors.tensor_parallel=2"]),
    ("learner.num_gpus=4", ["learner.num_gpus = 4", "raise learner.ranks"]),
    (
        "model.attention=flash_attention_2",
        ["model.attention = flash_attention_2", "learner.num_gpus > 0", "sdpa"],
    ),
    ("model.attention=flash_attention_2 learner.num_gpus=1", ["model.dtype = bfloat16", "here float32"]),
    # Overrides that are none
    ("learner.lr", ["'learner.lr'", "not section.key=value", "learner.lr=1e-5"]),
    ("lr=1e-5", ["'lr=1e-5'", "not section.key=value"]),
    ("=1", ["'=1'", "not section.key=value"]),
    (".lr=1", ["'.lr=1'", "not section.key=value"]),
    ("rewards.functions.0=1", ["not section.key=value"]),
    ("--lr=3", ["'--lr=3'", "not section.key=value"]),
    ("learner.lr=[1", ["'learner.lr=[1'", "not YAML"]),
    ("learner.lr=- -", ["learner.lr", "number"]),
    ("actors.count=!!python/object/apply:os.system [id]", ["'actors.count=!!python", "is a tag"]),
    ("actors.count=&a [*a]", ["&a is an anchor"]),
    ("actors.count=*a", ["*a is an alias"]),
    ("actors.count=2 # or 3", ["'actors.count=2 # or 3'", "`# or 3` would be a comment"]),
    ("rewards.functions={a: 1, a: 2}", ["'a' is there twice"]),
    ("rewards.functions=" + "[" * 5000, ["nested too deeply"]),
]


@pytest.mark.parametrize(("change", "words"), BAD_OVERRIDES, ids=[change[:60] for change, _ in BAD_OVERRIDES])
def test_a_bad_override_is_explained(example, change, words):
    overrides = (
        change.split(" ")
        if change.count(".") > 1 and change.count("=") > 1 and "[" not in change
        else [change]
    )
    message = message_of(example, *overrides)
    for word in words:
        assert word in message, message


BAD_FILES = [
    ("", ["nothing", "expected sections", "quickstart.yaml"]),
    ("# only a comment\n", ["nothing", "expected sections"]),
    ("- a\n- b\n", ["a list", "expected sections"]),
    ("hello", ["holds text", "expected sections"]),
    ("model: {path: x", ["not YAML"]),
    ("model:\n\tpath: x\n", ["not YAML"]),
    ("model: !!timestamp noon\n", ["line 1, column 8", "is a tag"]),
    (b"model: \xff\xfe\n", ["not UTF-8", "byte 8"]),
    ("model: {path: x}\n".encode("utf-16"), ["is UTF-16", "save it as UTF-8"]),
    (b"\x7fELF\x02\x00\x00", ["not YAML", "character 1 (U+007F)"]),
    (b"#" * (1 << 18) + b"#", ["no config", "262,145 bytes"]),
    ("a: 1\n---\nb: 2\n", ["not YAML", "line 2", "single document"]),
    ("model: {path: x}\nmodel: {path: y}\n", ["line 2", "'model' is there twice"]),
    ("[a]: 2\n", ["no key"]),
    ("a: &a [x, x]\nb: &b [*a, *a]\n", ["line 1", "&a is an anchor", "quotes"]),
    ("<<: {model: 1}\n", ["<< is not a known key"]),
    ("{}", ["3 problems", "model is missing", "data is missing", "rewards is missing"]),
    ("model: &m {path: *m}\n", ["&m is an anchor"]),
    ("model: &m\n  path: x\n  more: *m\n", ["&m is an anchor"]),
    ("model: x\n", ["model = 'x'", "expected a mapping"]),
    ("actors:\n", ["actors = None", "expected a mapping", "remove the line"]),
    ("1: 2\n", ["1 is not a known key", "valid here: actors"]),
    ("[" * 1200, ["nested too deeply"]),
    ("{a: " * 60_000, ["nested too deeply"]),
]


@pytest.mark.parametrize(("content", "words"), BAD_FILES, ids=range(len(BAD_FILES)))
def test_a_bad_file_is_explained(tmp_path, content, words):
    path = tmp_path / "bad.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    message = message_of(path)
    assert str(path) in message
    for word in words:
        assert word in message, message


def test_a_missing_file_names_the_nearest(example):
    assert f"did you mean {example}" in message_of(example.with_name("exampel.yaml"))
    assert "see configs/" in message_of(example.with_name("zzz"))
    assert "no config file" in message_of(example.parent)


def test_a_config_of_another_system_is_ten_problems_and_a_count(example):
    tree = {**EXAMPLE, "learner": {f"made_up_{number}": number for number in range(25)}}
    example.write_text(yaml.safe_dump(tree))
    message = message_of(example)
    assert "25 problems" in message
    assert "and 15 more" in message


def test_long_and_multi_line_values_are_cut():
    tree = {**EXAMPLE, "run": {"name": "x\n" * 500}, "x\ny" * 200: 1}
    with pytest.raises(ConfigError) as caught:
        parse_config(tree)
    assert len(str(caught.value).splitlines()) == 3
    assert all(len(line) < 400 for line in str(caught.value).splitlines())


def test_an_override_below_something_that_is_no_section_is_explained(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("model: some/path\n")
    message = message_of(path, "model.path=x")
    assert "'model' is no section" in message
    assert "'some/path'" in message


def test_overrides_are_yaml_and_the_last_one_counts(example):
    config = load_config(
        example,
        [
            "learner.lr=1e-5",
            "learner.lr=2E-6",
            "run.steps=7",
            "learner.offload=all",
            "run.dir=null",
            "objective.beta=0",
            "eval.every=3",
            "run.name=7",
            "rewards.functions={math_verify: 1, exact_match: 2, 'mine:style?messages': 0.5}",
        ],
    )
    assert config.learner.lr == 2e-6
    assert config.run.steps == 7
    assert config.learner.offload == "all"
    assert config.run.dir is None
    assert config.objective.beta == 0
    assert config.eval.every == 3
    assert config.run.name == "7"
    assert [*config.rewards.functions.items()] == [
        ("math_verify", 1.0),
        ("exact_match", 2.0),
        ("mine:style?messages", 0.5),
    ]


def test_a_value_may_hold_an_equals_sign(example):
    assert load_config(example, ["data.path=a=b.jsonl"]).data.path == "a=b.jsonl"


def test_off_needs_no_quotes(example):
    assert load_config(example, ["run.name=off"]).run.name == "off"
    assert "learner.offload = 'on'" in message_of(example, "learner.offload=on")
    example.write_text(example.read_text().replace("name: example", "name: off"))
    assert load_config(example).run.name == "off"


def test_derived_values_follow_their_formulas(example):
    config = load_config(example)
    assert config.admitted_groups == min(96, 17 * 32)
    assert load_config(example, ["buffer.max_staleness=1"]).admitted_groups == 64
    assert config.max_sequence_tokens == 12


WARNINGS = [
    ("actors.top_p=0.9", "does not cover the reference"),
    ("objective.on_policy_coef=0.5 & weights.publish_every=1", "hazard"),
    ("objective.on_policy_coef=0.01", "few samples are ever of the current policy"),
    ("objective.target=pass@8", "nothing is left to centre with"),
    ("buffer.max_staleness=1", "evicted as stale"),
    ("learner.schedule=[10,constant]", "peak learning rate"),
    ("learner.offload=all", "in CPU memory anyway"),
    ("run.timeout_s=0.1", "tokens per second, longer than run.timeout_s = 0.1"),
    ("learner.num_gpus=1", "Set model.dtype=bfloat16"),
    ("actors.num_gpus=0.5 & actors.engine_memory=0.4", "float32 with actors.num_gpus = 0.5: GPUs"),
    ("rewards.functions={exact_match: 0.0}", "nothing is rewarded"),
]


def test_a_buffer_without_lag_is_no_reason_to_warn_of_evictions(example):
    changes = [
        ["buffer.max_staleness=0", "weights.publish_every=1"],
        ["buffer.max_staleness=2", "weights.publish_every=2"],
    ]
    assert [load_config(example, change).warnings() for change in changes] == [[], []]


@pytest.mark.parametrize(("change", "words"), WARNINGS)
def test_what_is_allowed_but_not_meant_is_a_warning(example, change, words):
    assert load_config(example).warnings() == []
    (warning,) = load_config(example, change.split(" & ")).warnings()
    assert words in warning
    assert change.partition("=")[0].removesuffix("[") in warning


@pytest.mark.parametrize("path", SHIPPED, ids=[path.name for path in SHIPPED])
def test_a_shipped_config_loads_without_warning_and_round_trips(path, tmp_path):
    config = load_config(path)
    assert config.warnings() == []
    dumped = tmp_path / "dumped.yaml"
    dumped.write_text(dump_config(config))
    assert load_config(dumped) == config


def test_the_papers_setting_is_in_its_config():
    config = load_config(ROOT / "configs" / "llama3_8b_math.yaml")
    assert config.objective.beta == 0.001
    assert config.eval.every == 100
    assert config.objective.importance_weight == "none"
    assert config.objective.on_policy_coef == 0


def test_a_share_is_read_off_the_log_and_leaves_its_path_and_split(example):
    config = load_config(example, ["data.offline=a/x.jsonl?split=dev&share=0.25"])
    assert (config.data.offline_source, config.offline_samples) == ("a/x.jsonl?split=dev", 2)
    assert not config.is_offline
    whole = load_config(example, ["data.offline=a/x.jsonl"])
    assert (whole.data.offline_source, whole.is_offline) == ("a/x.jsonl", True)
    assert load_config(example).data.offline_source is None


def test_the_memory_of_an_engine_is_gib_on_a_cpu_and_a_share_on_a_gpu(example):
    assert load_config(example).actors.kv_cache_gib == 1.0
    assert load_config(example, ["actors.engine_memory=2.5"]).actors.kv_cache_gib == 2.5
    given = ["actors.num_gpus=1", "actors.engine_memory=0.4"]
    assert [load_config(example, given[:n]).actors.gpu_memory_share for n in (1, 2)] == [0.85, 0.4]


def test_stragglers_have_two_limits_either_of_which_may_be_none(example):
    def limits(*overrides):
        actors = load_config(example, overrides).actors
        return actors.sample_timeout_s, actors.group_timeout_s

    assert limits() == (None, None)
    assert limits("actors.straggler_timeouts_s=[null, 60]") == (None, 60)
    assert limits("actors.straggler_timeouts_s=[2.5, null]") == (2.5, None)
    assert limits("actors.straggler_timeouts_s=null") == (None, None)


def test_a_config_cannot_be_changed(example):
    with pytest.raises(ValueError, match="frozen"):
        load_config(example).run.steps = 5  # type: ignore[misc]


FIELDS_OF_TASKS = {
    "run": {"placement_timeout_s"},
    "actors": {"tensor_parallel", "max_turns", "max_sequence_tokens", "turn_timeout_s", "endpoint_host"},
    "learner": {"sequence_parallel"},
    "rewards": {"workers", "concurrency", "max_pending"},
    "data": {"columns", "template_options", "curriculum"},
    "eval": {"suites", "keep_best", "stop_at"},
    "buffer": {"skip_equal_rewards"},
    "monitor": {"backends"},
    "weights": {"full_every"},
}
"""What tasks of several turns, networks, suites, dashboards, clusters and large models ask for."""


def test_there_are_at_most_60_fields_beside_those_of_tasks_and_of_the_objectives():
    of_tasks = sum(
        len(names & SECTION_MODELS[section].model_fields.keys()) for section, names in FIELDS_OF_TASKS.items()
    )
    assert num_fields() - of_tasks <= 60
    assert max(len(knobs.model_fields) for knobs in OBJECTIVES.values()) <= 11


def test_the_committed_reference_is_current_and_complete():
    committed = (ROOT / "docs" / "config.md").read_text(encoding="utf-8")
    assert committed == config_reference(), "run: python launch.py config-reference > docs/config.md"
    for section, model in SECTION_MODELS.items():
        assert f"## {section}\n" in committed
        for name, inner in model.model_fields.items():
            assert f"| `{name}` |" in committed
            assert inner.description, f"{section}.{name} has no description"
    for objective, knobs in OBJECTIVES.items():
        _, _, table = committed.partition(f"### objective: {{name: {objective}}}\n")
        assert [f"| `{knob}` |" in table.partition("\n#")[0] for knob in knobs.model_fields if knob != "name"]


def test_a_mapping_with_a_wrong_entry_is_not_called_too_short():
    with pytest.raises(ConfigError, match=r"rewards\.functions\.math_verify = 'x'") as refused:
        load_config("configs/quickstart.yaml", ["rewards.functions={exact_match: 1, math_verify: x}"])
    assert "at least one entry" not in str(refused.value)
