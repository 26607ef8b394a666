from pathlib import Path

from core.json_lines import read_json_lines


def test_records_share_the_texts_of_their_names_and_torn_lines_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        '{"progress/step": 1, "in": {"a": 2}}\n{"progress/st\n\n{"progress/step": 2, "in": {}}\n[1]\n'
    )

    records, num_torn = read_json_lines(path)

    assert (records, num_torn) == ([{"progress/step": 1, "in": {"a": 2}}, {"progress/step": 2, "in": {}}], 2)
    first, second = (list(record) for record in records)
    assert all(one is other for one, other in zip(first, second, strict=True))
