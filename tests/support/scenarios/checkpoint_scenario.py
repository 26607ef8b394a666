"""Processes of tests/learner/checkpoints/test_checkpoint.py and test_checkpoint_resume.py beside it, which
work in DIR and write what they found there.

    checkpoint_scenario.py kills DIR COUNT   ranks that save without end, COUNT times killed (kills.json)
    checkpoint_scenario.py stopped DIR       one of two ranks is stopped, SIGSTOP, while it saves (stopped.json)

`train` is a process of tests/learner/checkpoints/test_checkpoint_resume.py's own.
"""

import asyncio
import itertools
import json
import os
import random
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))
os.environ["OMP_NUM_THREADS"] = "1"

import torch

from core.json_lines import JsonLines, Redactor
from core.records import Group, Sample, StoredGroup, VersionSpan, encode_batch
from learner.checkpoints.checkpoint import Checkpoint, TensorPart, latest_checkpoint, partition
from learner.checkpoints.writer import CheckpointWriter

VOCABULARY = 16
LIMIT_BYTES = 256 * 2**10
WORLD_SIZE = 2
TENSORS = {f"master/{index}": (1000 + index, 501) for index in range(4)}  # 8 MB, in parts of unlike size.


def groups_of(step: int) -> list[Group]:
    """The groups of a step's batch, a pure function of it, as the buffer's is: mixed sizes, lengths and ages.

    None is fresh: nobody drew them, so that their log-probs are no policy's.
    """
    rng = random.Random(step)
    groups = []
    for number in range(5):
        drawn = []
        for _ in range(rng.choice([2, 3, 8])):
            length = rng.randint(1, 8)
            answer = [rng.randrange(VOCABULARY - 1) for _ in range(length)]
            logprobs = [-rng.uniform(1, 4) for _ in range(length)]
            spans = (VersionSpan(step - rng.randint(1, 4), 0, length),)
            drawn.append((answer, logprobs, spans, float(rng.random() < 0.5)))
        prompt = [rng.randrange(3, VOCABULARY - 1) for _ in range(rng.randint(3, 12))]
        samples = tuple(
            Sample.one_turn(
                prompt, answer, logprobs, version_spans=spans, finish_reason="stop", reward=reward
            )
            for answer, logprobs, spans, reward in drawn
        )
        groups.append(
            Group(
                group_id=100 * step + number,
                prompt_index=number,
                source_row=number,
                prompt="",
                samples=samples,
            )
        )
    return groups


class World:
    """Buffer, board and monitor of a rank: what is asked of them goes into a log.

    `script`: `limited` [first, last] are the steps in which files cannot grow beyond LIMIT_BYTES, at `stop`
    the run is asked to end, with `target` as at its target, and the batch of `hold` does
    not come: the process is killed before.
    """

    def __init__(self, log: Path, script: dict[str, Any], request_stop: Callable[..., None]) -> None:
        self._log, self._request_stop = JsonLines(log, Redactor({})), request_stop
        self._limited, self._stop = script.get("limited", [1, 0]), script.get("stop")
        self._hold, self._is_target_reached = script.get("hold"), script.get("target", False)

    def note(self, **record: Any) -> None:
        self._log.append(record)

    async def sample(self, step: int, num_groups: int, timeout_s: float) -> bytes | None:
        if step == self._stop:
            self._request_stop(is_target_reached=self._is_target_reached)
            return None
        first, last = self._limited
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT_BYTES if first <= step <= last else hard, hard))
        self.note(sampled=step)
        if step == self._hold:
            await asyncio.sleep(600)
        return encode_batch(step, [StoredGroup.of(group)._replace(uses=1) for group in groups_of(step)])

    def stats(self) -> dict[str, float]:
        return dict.fromkeys(("buffer/inserted", "buffer/wait_admission_s", "buffer/wait_batch_s"), 0.0)

    def next_step(self) -> int:
        return 0

    def generation(self) -> dict[str, Any]:
        return {}

    def set_watermark(self, step: int) -> None:
        self.note(watermark=step)

    def publish(self, manifest: bytes, buckets: list, version: int, *, evaluate: Any) -> Any:
        self.note(published=version, evaluate=list(evaluate))
        return "board", [version]

    def log_step(self, row: dict[str, float]) -> None:
        self.note(row={name: repr(value) for name, value in row.items()})

    def log_samples(self, step: int, samples: list) -> None:
        pass

    def event(self, text: str) -> None:
        self.note(event=text)


def plant_death(policy: Any, where: str) -> None:
    """The process dies within the second or a later call of that part of a learner step."""
    calls = itertools.count()

    def die(*_: Any) -> None:
        if next(calls):
            os.kill(os.getpid(), signal.SIGKILL)

    backward, named_weights = policy.backward, policy.named_weights

    def dying_backward(loss: Any, *, last: bool) -> None:
        loss.register_hook(die)
        backward(loss, last=last)

    def dying_gather(bucket_bytes: int, *, adapters_alone: bool) -> Iterator[Any]:
        for weight in named_weights(bucket_bytes, adapters_alone=adapters_alone):
            yield weight
            die()

    match where:
        case "forward":
            policy.module.model.layers[-1].register_forward_pre_hook(die)
        case "backward":
            policy.backward = dying_backward
        case "step":
            policy._engine.optimizer.optimizer.register_step_post_hook(die)
        case "gather":
            policy.named_weights = dying_gather


def train(directory: Path, resume_from: str | None, rank: int) -> None:
    """A real LearnerRank, as a process of its own; its buffer, board and monitor only note, in
    log-RANK.jsonl.

    `script`: as World's; `dies`: where rank 1 dies.
    """
    with (directory / f"stderr-{rank}.txt").open("w") as errors:
        os.dup2(errors.fileno(), sys.stderr.fileno())
    import ray

    from buffer.client import connect_buffer
    from core.calls import Local
    from core.monitor_client import MONITOR, MonitorClient
    from core.weights.board import BOARD, BoardClient
    from learner.catalogue import parse_config
    from learner.checkpoints import writer
    from learner.worker import LearnerRank
    from tests.support.scenarios.zero_scenario import meet

    writer.KEPT_CHECKPOINTS = 10  # Those of a whole run are there to be looked at.
    ray.put = lambda value: value  # type: ignore[assignment, misc]  # No cluster is needed to train.
    config = parse_config(json.loads((directory / "config.json").read_text()))
    learner = LearnerRank(rank, config, pad_id=0)
    learner.start(("127.0.0.1", meet(directory, rank)))
    script = json.loads((directory / "script.json").read_text())
    if rank == 1 and "dies" in script:
        plant_death(learner._policy, script["dies"])
    world = Local(World(directory / f"log-{rank}.jsonl", script, learner.request_stop))
    buffer, board = connect_buffer([world]), BoardClient(world, BOARD)
    totals = learner.train(
        buffer, board, MonitorClient(world, MONITOR), str(directory / "policy"), resume_from
    )
    if rank == 0:
        (directory / "totals.json").write_text(json.dumps(totals))


# --- ranks without a model ---


def value_of(step: int, key: str) -> float:
    return step + float(key.rpartition("/")[2]) / 8


def parts_of(step: int, rank: int) -> Iterator[TensorPart]:
    for key, shape in TENSORS.items():
        start, stop = partition(shape[0] * shape[1], WORLD_SIZE, rank)
        yield TensorPart(key, shape, torch.full((stop - start,), value_of(step, key)))


def save_without_end(
    directory: Path, rank: int, session: str, first_step: int, timeout_s: float = 60.0
) -> None:
    """Save step after step; rank 0 notes each that is durable in DIR/acknowledged."""
    acknowledged = os.open(directory / "acknowledged", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    writer = CheckpointWriter(directory, rank, WORLD_SIZE, session=session, timeout_s=timeout_s)
    for step in range(first_step, first_step + 10**6):
        writer.save(step, parts_of(step, rank), {"step": step})
        writer.wait()
        if rank == 0 and writer.metrics()["checkpoint/saved"] == step - first_step + 1:
            os.write(acknowledged, f"{step}\n".encode())


def fork(work: Any, *arguments: Any) -> int:
    """A child that runs `work` and ends; its process id. Cheaper than a process that has to import torch."""
    if pid := os.fork():
        return pid
    try:
        work(*arguments)
        os._exit(0)
    except BaseException:  # noqa: BLE001 -- a forked child must not go on as its parent
        sys.excepthook(*sys.exc_info())
        os._exit(1)


def kills(directory: Path, count: int) -> None:
    """Each time: two ranks save on, are killed at a random moment of the first saves, however long these
    take here, and the newest checkpoint is looked at.
    """
    rng, results, save_s = random.Random(0), [], 0.1
    for number in range(count):
        found = latest_checkpoint(directory)
        first = found[1].step + 1 if found else 1
        (directory / "acknowledged").unlink(missing_ok=True)
        ranks = [
            fork(save_without_end, directory, rank, f"session{number}", first) for rank in range(WORLD_SIZE)
        ]
        start_s, num_saves = time.monotonic(), rng.randrange(3)
        while len(acknowledged(directory)) < num_saves:
            assert time.monotonic() - start_s < 60, f"no {num_saves} saves within a minute"
            time.sleep(0.001)
        if num_saves:
            save_s = (time.monotonic() - start_s) / num_saves
        time.sleep(rng.uniform(0.0, 1.5 * save_s))
        rng.shuffle(ranks)
        for pid in ranks:
            os.kill(pid, signal.SIGKILL)
        for pid in ranks:
            os.waitpid(pid, 0)
        results.append(looked_at(directory))
    (directory / "kills.json").write_text(json.dumps(results))


def acknowledged(directory: Path) -> list[int]:
    """The steps that were noted as durable since the file was removed."""
    path = directory / "acknowledged"
    return [int(line) for line in path.read_text().split("\n")[:-1]] if path.exists() else []


def looked_at(directory: Path) -> dict[str, Any]:
    """What a run started now would find."""
    problems: list[str] = []
    found = latest_checkpoint(directory, problems.append)
    result: dict[str, Any] = {
        "step": found and found[1].step,
        "acknowledged": max(acknowledged(directory), default=0),
        "problems": problems,
        "aside": len(list((directory / "checkpoints").glob(".step-*"))),
        "kept": len(list((directory / "checkpoints").glob("step-*"))),
    }
    if found:
        checkpoint = Checkpoint(*found)
        whole = {key: checkpoint.read(key) for key in TENSORS}
        result["right"] = all(
            bool((values == value_of(found[1].step, key)).all()) for key, values in whole.items()
        )
    return result


def stopped(directory: Path) -> None:
    """Rank 1 is stopped while it writes; rank 0 gives up on it; then rank 1 goes on."""
    events: list[str] = []
    writer = CheckpointWriter(directory, 0, WORLD_SIZE, session="s", timeout_s=60.0, on_event=events.append)
    save_beside(directory, writer, 1)
    rank_1 = fork(save_as_rank_1, directory, 2, True)
    os.waitpid(rank_1, os.WUNTRACED)
    writer._timeout_s = 1.0
    save_beside(directory, writer, 2, rank_1)
    writer._timeout_s = 60.0
    results = {"events": [*events], "while_stopped": looked_at(directory), "metrics": writer.metrics()}
    os.kill(rank_1, signal.SIGCONT)
    os.waitpid(rank_1, 0)
    results["after"] = looked_at(directory)
    save_beside(directory, writer, 3)
    results["next"] = looked_at(directory)
    (directory / "stopped.json").write_text(json.dumps(results))


def save_beside(directory: Path, writer: CheckpointWriter, step: int, rank_1: int = 0) -> None:
    """A checkpoint by `writer`, rank 0's, and a process for rank 1 unless there is one."""
    other = rank_1 or fork(save_as_rank_1, directory, step, False)
    writer.save(step, parts_of(step, 0), {"step": step})
    writer.close()
    if not rank_1:
        os.waitpid(other, 0)


def save_as_rank_1(directory: Path, step: int, stops: bool) -> None:
    """Saves; `stops`: this process is stopped where its file is written, and not yet on disk."""
    import learner.checkpoints.checkpoint

    sync = learner.checkpoints.checkpoint._sync

    def sync_late(file: Any) -> None:
        if stops:
            os.kill(os.getpid(), signal.SIGSTOP)
        sync(file)

    learner.checkpoints.checkpoint._sync = sync_late
    writer = CheckpointWriter(directory, 1, WORLD_SIZE, session="s", timeout_s=60.0)
    writer.save(step, parts_of(step, 1), {})
    writer.close()


if __name__ == "__main__":
    torch.set_num_threads(1)
    what, where, *more = sys.argv[1:]
    if what == "kills":
        kills(Path(where), int(more[0]))
    else:
        stopped(Path(where))
