"""A judge by the OpenAI API against a server on loopback that is slow, wrong, busy, and down."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import time

import pytest

from core.config import RewardsConfig
from core.errors import RewardError
from rewards import judge
from rewards.pool import RewardPool
from tests.support.clocks.machine import machine_s
from tests.support.clocks.waits import until
from tests.support.pages import examples
from tests.support.rewards.judge_server import Say, judge_server, port_of_nobody

pytestmark = pytest.mark.timed

LIMIT_S = 60.0
KEY = "sk-very-secret-0123456789"


@pytest.fixture
def pool_for(tmp_path, monkeypatch):
    """A pool whose judge is made in a module of the user's, with more arguments, for a server's address."""
    monkeypatch.chdir(tmp_path)
    pools, count = contextlib.ExitStack(), iter(range(100))

    def make(url, arguments="", **settings):
        name = f"judge_of_mine_{next(count)}"
        lines = f'helpful = Judge(rubric="Is it helpful?", model="m", base_url={url!r}, {arguments})'
        (tmp_path / f"{name}.py").write_text(f"from rewards.judge import Judge\n\n{lines}\n")
        config = RewardsConfig(functions={f"{name}:helpful": 1.0}, **settings)
        return pools.enter_context(RewardPool(config))

    with pools:
        yield make


def ask(pool, *completions, **columns):
    return pool.submit("q", completions, {"question": "2+2=", **columns})


def score(pool, *completions, **columns):
    return ask(pool, *completions, **columns).result(LIMIT_S)


@pytest.mark.slow
@pytest.mark.alone  # Its clock counts what else runs.
def test_32_calls_of_a_second_take_two_at_most_by_default(pool_for):
    with judge_server(lambda number, request: Say(delay_s=1.0 if number else 0.0)) as server:
        pool = pool_for(server.url)
        score(pool, "the first one, by which the client is set up")
        start_s = machine_s()
        futures = [ask(pool, *"abcdefgh") for _ in range(4)]
        assert all(scored.reward == 1.0 for future in futures for scored in future.result(LIMIT_S))
        assert machine_s() - start_s < 2.0
        assert len(server.asked) == 33


def test_the_judge_of_the_documentation_runs(tmp_path, monkeypatch):
    with judge_server(lambda number, request: Say("Score: 5.5")) as server:
        text = examples()["my_judge.py"].replace("http://localhost:8000/v1", server.url)
        assert len(text.splitlines()) <= 11
        (tmp_path / "my_judge.py").write_text(text)
        monkeypatch.chdir(tmp_path)
        with RewardPool(RewardsConfig(functions={"my_judge:helpful": 1.0})) as pool:
            assert score(pool, "a")[0].reward == 0.5


def test_the_judge_sees_task_answer_and_columns_and_its_score_is_put_into_0_to_1(pool_for):
    def script(number, request):
        shown = request["messages"][1]["content"]
        return Say(f"The answer has no score: 9 of its own.\n**Score:** {4 if 'five' in shown else 7}")

    with judge_server(script) as server:
        pool = pool_for(server.url, 'shows=["solution"], scale=(1, 7), extra={"seed": 3}')
        assert pool.columns == {next(iter(pool.columns)): ("solution",)}
        assert [scored.reward for scored in score(pool, "four", "five", solution="It is 4.")] == [1.0, 0.5]
    asked = server.asked[0]
    assert (asked["model"], asked["temperature"], asked["seed"]) == ("m", 0.0, 3)
    system, user = (message["content"] for message in asked["messages"])
    assert system.startswith("Is it helpful?")
    assert "from 1 (worst) to 7 (best)" in system
    assert user.split("\n\n")[:4] == ["# Task", "2+2=", "# solution", "It is 4."]


@pytest.mark.parametrize(
    ("reply", "error"),
    [
        ("I like it very much.", "the judge m gave no score: 'I like it very much.'"),
        ("Score: 11", "the judge m gave 11, outside 1 to 10: 'Score: 11'"),
        ("", "the judge m gave no score: ''"),
    ],
)
def test_nonsense_is_the_error_of_its_sample_with_the_text(pool_for, reply, error):
    def script(number, request):
        return Say(reply if "bad" in request["messages"][1]["content"] else "10")

    with judge_server(script) as server:
        found = score(pool_for(server.url), "good", "bad")
        assert found[0].reward == 1.0, "a bare number is a score"
        assert error in found[1].error
        assert len(server.asked) == 2, "the same question would get the same answer"


def test_what_is_no_chat_completion_is_said(pool_for):
    with judge_server(
        lambda number, request: Say(body="<html>Log in</html>", headers=(("content-type", "text/html"),))
    ) as server:
        assert "sent no chat completion: '<html>Log in</html>'" in score(pool_for(server.url), "a")[0].error


def test_a_refusal_is_told_at_once_and_never_shows_the_key(pool_for, monkeypatch):
    monkeypatch.setenv("MY_KEY", KEY)
    body = json.dumps({"error": {"message": f"Incorrect API key provided: {KEY}", "code": "invalid_api_key"}})
    with judge_server(lambda number, request: Say(status=401, body=body)) as server:
        error = score(pool_for(server.url, 'api_key_env="MY_KEY"'), "a")[0].error
        assert server.keys == [f"Bearer {KEY}"]
    assert "the judge m refused: AuthenticationError" in error
    assert "***" in error
    assert KEY not in error


def test_a_key_that_is_not_set_is_found_before_anything_starts(pool_for):
    with pytest.raises(RewardError, match="from the environment variable NO_SUCH_KEY, which is not set"):
        pool_for("http://127.0.0.1:9/v1", 'api_key_env="NO_SUCH_KEY"')
    with pytest.raises(RewardError, match=r"Judge\(scale=\(10, 1\)\): expected the worst and the best"):
        pool_for("http://127.0.0.1:9/v1", "scale=(10, 1)")


def test_a_busy_service_is_asked_again_after_the_pause_that_it_wants(pool_for):
    def script(number, request):
        return Say(status=429, headers=(("retry-after", "1.5"),), body="{}") if number == 0 else Say()

    with judge_server(script) as server:
        pool = pool_for(server.url)
        start_s = machine_s()
        assert score(pool, "a")[0].reward == 1.0
        assert machine_s() - start_s < 4.0
        first_s, second_s = server.asked_at_s
        assert second_s - first_s > 1.4


def test_a_quota_that_is_used_up_is_no_reason_to_wait(pool_for):
    body = json.dumps({"error": {"message": "You exceeded your quota", "code": "insufficient_quota"}})
    with judge_server(lambda number, request: Say(status=429, body=body)) as server:
        assert "refused: RateLimitError" in score(pool_for(server.url), "a")[0].error
        assert len(server.asked) == 1


def test_slow_and_failing_answers_are_asked_for_again(pool_for):
    def script(number, request):
        return [Say(delay_s=6.0), Say(status=503, body="{}"), Say()][min(number, 2)]

    with judge_server(script) as server:
        assert score(pool_for(server.url, "request_timeout_s=2.0"), "a")[0].reward == 1.0
        assert len(server.asked) == 3


def test_a_judge_that_is_down_is_waited_for_longer_than_the_limit_of_a_call(pool_for, caplog):
    with port_of_nobody() as port:
        pool = pool_for(f"http://127.0.0.1:{port}/v1", timeout_s=1.0)
        future = ask(pool, "a", "b")
        until(lambda: caplog.messages)
        time.sleep(2.5)
        assert not future.done()
        told = f"the judge m at http://127.0.0.1:{port}/v1/: APIConnectionError: 'Connection error.'; asked again for up to 600 s"
        assert caplog.messages == [told], "the actor's log, of which events are made, has it once"
        with judge_server(lambda number, request: Say("Score: 10"), port):
            assert [scored.reward for scored in future.result(LIMIT_S)] == [1.0, 1.0]
    assert (pool.num_timeouts, pool.num_crashes, pool.num_errors) == (0, 0, 0)


def test_that_a_judge_is_down_is_told_again_while_it_lasts_and_without_passwords(monkeypatch, caplog):
    monkeypatch.setattr(judge, "WARN_EVERY_S", 1.0)
    monkeypatch.setattr(judge, "MAX_PAUSE_S", 0.2)  # Else two attempts fit into its patience, or three.
    with port_of_nobody() as port:
        down = judge.Judge("Good?", "m", f"http://me:secret@127.0.0.1:{port}/v1", patience_s=3)
        (error,) = asyncio.run(down([[]], [[]]))
    assert isinstance(error, judge.JudgeError)
    first, *others = caplog.messages
    assert others
    assert "(no answer" not in first
    assert all(re.search(r"\(no answer for \d s by now, since \d\d:\d\d\)$", text) for text in others)
    assert "secret" not in caplog.text


def test_patience_ends(pool_for):
    with judge_server(lambda number, request: Say(status=500, body="{}")) as server:
        error = score(pool_for(server.url, "patience_s=1"), "a")[0].error
    assert "the judge m did not answer for 1 s; at last: InternalServerError" in error


def test_calls_keep_their_pace_over_all_processes(pool_for):
    with judge_server(lambda number, request: Say()) as server:
        pools = [pool_for(server.url, "calls_per_minute=240") for _ in range(2)]
        start_s = time.monotonic()
        futures = [ask(pool, *"abcd") for pool in pools]
        assert all(scored.reward == 1.0 for future in futures for scored in future.result(LIMIT_S))
        # Since they were asked, not since the first call arrived: on a busy machine that one may be late.
        assert server.asked_at_s[-1] - start_s > 7 * 0.25 - 0.05
