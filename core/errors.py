"""The errors users meet, one root, each also the standard type it specialises.

    AgroError
    |-- ConfigError     (ValueError)    a config file, an override or a combination of them
    |-- DataError       (ValueError)    rows of a dataset
    |-- RewardError     (RuntimeError)  a reward function that cannot be found, or fails too often
    |-- PlacementError  (RuntimeError)  resources asked for that the cluster does not have
    |-- SnapshotError   (ValueError)    weights that arrived torn, or of another model
    |-- CheckpointError (RuntimeError)  a checkpoint that is missing, damaged, of another model, or not finite
    |-- StalenessError  (RuntimeError)  a sample older than `buffer.max_staleness` reached the learner
    |-- TrainingError   (RuntimeError)  non-finite numbers, a dead learner: the run cannot go on
    `-- PeerTimeout     (TimeoutError)  another process did not answer in time

A message says what is wrong, which value, and what to do, in a few lines: `launch.py` prints it without a
traceback. Every error takes its message as its only argument, so that it survives pickling between processes.
"""


class AgroError(Exception):
    """Root of every error this project raises on purpose."""


class ConfigError(AgroError, ValueError):
    """A config value is unknown, out of range, or contradicts another."""


class DataError(AgroError, ValueError):
    """Dataset rows are missing, malformed or too long."""


class RewardError(AgroError, RuntimeError):
    """A reward function cannot be loaded, breaks its contract, or fails too often."""


class PlacementError(AgroError, RuntimeError):
    """The cluster lacks the resources that a part of the run asks for."""


class SnapshotError(AgroError, ValueError):
    """A weight snapshot failed its checksum or does not fit the model."""


class CheckpointError(AgroError, RuntimeError):
    """A checkpoint cannot be used, or would hold what must not be in one."""


class StalenessError(AgroError, RuntimeError):
    """A sample older than the configured bound got through to the learner."""


class TrainingError(AgroError, RuntimeError):
    """The learner cannot go on: non-finite numbers, or a rank died."""


class PeerTimeout(AgroError, TimeoutError):
    """Another process did not answer in time; the message names it and the wait."""
