"""Selection tables: read, refused in one line, found by weights or by name, and the shipped ones."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from blockskip_hooks.embedded import embedded_model
from blockskip_hooks.search.tables import cache_file, find_table, read_table, shipped_tables
from blockskip_hooks.selection import best_pairs
from blockskip_hooks.utils.digests import folder_digest


MEASURED: dict[str, Any] = {
    "schema": 1,
    "model": "mine",
    "num_blocks": 3,
    "source": "measured",
    "about": "by hand",
    "weights": "ab" * 32,
    "date": "2026-01-01",
    "curves": {"leading": {"mean": [0, 0.1, 0.2]}, "trailing": {"mean": [0, 0.3, 0.3]}},
    "pairs": {"1": [1, 0], "2": [2, 0]},
}


def save(path: Path, changes: dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**MEASURED, **changes}))
    return path


def test_the_pairs_are_the_least_sum_of_the_curves():
    leading, trailing = [0.0, 0.3, 0.35, 0.9], [0.0, 0.1, 0.4, 0.41]
    pairs = best_pairs(leading, trailing)
    for skipped, (n, m) in pairs.items():
        every = [leading[i] + trailing[skipped - i] for i in range(skipped + 1)]
        assert n + m == skipped and leading[n] + trailing[m] == min(every)
    assert sorted(pairs) == [1, 2, 3]


def test_of_equal_pairs_the_one_with_more_leading_blocks_is_chosen():
    assert best_pairs([0.0, 0.0, 0.0], [0.0, 0.0, 0.0]) == {1: (1, 0), 2: (2, 0)}


def test_the_trade_off_holds_every_pair_that_no_other_beats(tmp_path: Path):
    table = read_table(save(tmp_path / "t.json", {}))
    sizes = [5, 1, 2]
    every = [
        (table.leading[n] + table.trailing[m], sum(sizes[:n]) + sum(sizes[3 - m :]))
        for n, m in itertools.product(range(3), range(3))
        if n + m < 3
    ]
    best = {
        (harm, freed)
        for harm, freed in every
        if not any(h <= harm and f >= freed and (h, f) != (harm, freed) for h, f in every)
    }
    points = table.trade_off(sizes)
    assert {(point.harm, point.freed_bytes) for point in points} == best
    assert [point.freed_bytes for point in points] == sorted(point.freed_bytes for point in points)


@pytest.mark.parametrize(
    "changes",
    [
        {"schema": 2},
        {"pairs": {"1": [1, 1]}, "curves": {"leading": {"mean": []}, "trailing": {"mean": []}}, "source": "inferred"},
        {"curves": {"leading": {"mean": [0, 0.1]}, "trailing": {"mean": [0, 0.3, 0.3]}}},
        {"curves": 3},
        {"source": "inferred"},
        {"source": "guessed"},
        {"weights": None},
        {"num_blocks": "three"},
        {"pairs": {"one": [1, 0]}},
        {"pairs": {"1": [1]}},
    ],
)
def test_a_table_that_cannot_be_used_is_one_line(tmp_path: Path, changes: dict[str, Any]):
    with pytest.raises(ValueError, match=r"t\.json is not a selection table of schema 1 \(") as error:
        read_table(save(tmp_path / "t.json", changes))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["", "[]", "{}", "not json", "null"])
def test_a_file_that_is_no_table_is_one_line(tmp_path: Path, text: str):
    (tmp_path / "t.json").write_text(text)
    with pytest.raises(ValueError, match=r"t\.json is not a selection table"):
        read_table(tmp_path / "t.json")


def test_a_measured_table_is_found_by_the_weights_alone():
    weights = MEASURED["weights"]
    save(cache_file(weights), {})
    found = find_table(3, (), weights)
    assert found is not None and found.model == "mine" and "2026-01-01" in found.describe()
    assert find_table(3, ("mine",), "cd" * 32) is None
    # The same file under other weights' name would be another model's.
    save(cache_file("cd" * 32), {})
    assert find_table(3, (), "cd" * 32) is None


def test_the_shipped_table_of_the_embedded_model_is_about_its_weights():
    weights = folder_digest(embedded_model() / "transformer")
    table = find_table(18, (), weights)
    assert table is not None and table.source == "measured" and "base model" in table.about
    contents = json.loads(
        (Path(__file__).parents[1] / "src/blockskip_hooks/tables/embedded_micro_flux.json").read_text()
    )
    assert contents["command"] == "select_blocks.py" and contents["weights"] == weights
    assert {int(k): tuple(pair) for k, pair in contents["pairs"].items()} == table.pairs


@pytest.mark.parametrize("table", shipped_tables(), ids=lambda table: table.model)
def test_shipped_tables_hold_pairs_that_add_up(table):
    assert table.names and table.about and table.pairs
    for skipped, (leading, trailing) in table.pairs.items():
        assert leading >= 0 and trailing >= 0 and leading + trailing == skipped < table.num_blocks
