import subprocess
import sys

from benchmarks.bound.counters import Processes

SPIN = """
import time
while time.process_time() < 0.3:
    pass
print("spun", flush=True)
input()
"""


def test_each_process_is_counted_under_its_name_and_others_together() -> None:
    children = [
        subprocess.Popen([sys.executable, "-c", SPIN], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        for _ in range(2)
    ]
    try:
        for child in children:
            assert child.stdout is not None
            assert child.stdout.readline() == b"spun\n"
        spent = Processes({"rank": children[0].pid}).spent()
        assert set(spent) == {"rank", "driver", "ray", "others"}
        assert spent["rank"].cpu_s >= 0.2
        assert spent["others"].cpu_s >= 0.2
        assert all(one.delayed_s >= 0 for one in spent.values())
    finally:
        for child in children:
            child.communicate(b"\n")
