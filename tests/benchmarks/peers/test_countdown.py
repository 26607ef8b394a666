"""Tests of the job with a heavy tail of lengths."""

import json
import statistics

from benchmarks.peers.countdown import ROWS_PATH, counts_down, rows


def test_an_answer_is_right_only_with_all_numbers_in_order():
    prompts = ["3"] * 4 + ["0"]
    assert counts_down(prompts, ["2 1 0", "2 0", "2 1 0 0", "", ""]) == [1.0, 0.0, 0.0, 0.0, 1.0]


def test_the_committed_prompts_are_those_that_are_made_and_have_a_heavy_tail():
    written = [json.loads(line) for line in ROWS_PATH.read_text(encoding="utf-8").splitlines()]
    assert written == rows()
    lengths = sorted(int(row["prompt"]) + 1 for row in written)
    assert lengths[-1] == 128
    assert lengths[-10] > 4 * statistics.median(lengths)
