"""Which blocks are skipped: by the flag, by a shipped table, or by the written rule."""

import math

import pytest

from blockskip_hooks import selection as selections
from blockskip_hooks.planning.selections import select_by_bytes, selections_by_bytes
from blockskip_hooks.search.tables import SelectionTable, find_table
from blockskip_hooks.selection import RULE, Selection


FLUX_DEV = ("black-forest-labs/FLUX.1-dev", None)
CURVED = SelectionTable(
    model="curved",
    num_blocks=5,
    source="measured",
    about="by hand",
    weights="0" * 64,
    leading=(0.0, 0.1, 0.2, 0.9, 1.0),
    trailing=(0.0, 0.05, 0.5, 0.6, 0.7),
)


def select_blocks(skip_blocks, skip_ratio, num_blocks, names=()):
    """As a run does it: with the table that is known by name."""
    return selections.select_blocks(skip_blocks, skip_ratio, num_blocks, find_table(num_blocks, names, None))


def spans(selection):
    return selection.leading, selection.trailing


def test_none_skips_nothing():
    selection = select_blocks("none", 0.3, 57, FLUX_DEV)
    assert spans(selection) == (0, 0) and selection.source == "flag" and selection.table is None
    assert selection.as_dict() == {
        "blocks": 57,
        "leading": 0,
        "trailing": 0,
        "source": "flag",
        "table": None,
        "harm": None,
        "ratio": 0.0,
    }


@pytest.mark.parametrize("text", ["0,0", "3,0", "0,4", "2,3", "11,0", "0,11"])
def test_a_pair_is_taken_as_it_is_even_where_a_table_knows_the_model(text):
    selection = select_blocks(text, 0.3, 12, FLUX_DEV)
    assert spans(selection) == tuple(map(int, text.split(","))) and selection.source == "flag"


@pytest.mark.parametrize(("ratio", "pair"), [(0.3, (7, 10)), (0.5, (19, 9))])
def test_auto_finds_flux_dev_in_the_table_and_says_that_it_is_inferred(ratio, pair):
    selection = select_blocks("auto", ratio, 57, FLUX_DEV)
    assert spans(selection) == pair and selection.source == "table"
    assert "FLUX.1-dev" in selection.table and "inferred" in selection.table and "not measured" in selection.table
    assert selection.as_dict()["ratio"] == round(sum(pair) / 57, 4)


@pytest.mark.parametrize("number", [17, 28])
def test_a_number_uses_the_table_too(number):
    selection = select_blocks(str(number), 0.9, 57, FLUX_DEV)
    assert selection.source == "table" and sum(spans(selection)) == number


@pytest.mark.parametrize("names", [(None, "black-forest-labs/FLUX.1-dev"), ("a-copy", "black-forest-labs/FLUX.1-dev")])
def test_the_table_is_found_by_any_of_the_models_names(names):
    assert select_blocks("auto", 0.3, 57, names).source == "table"


@pytest.mark.parametrize(
    ("ratio", "blocks", "names"),
    [
        (0.4, 57, FLUX_DEV),
        (0.3, 56, FLUX_DEV),
        (0.3, 57, ("someone/else", None)),
        (0.3, 57, ()),
        (0.3, 57, ("FLUX.1-dev-but-mine",)),
    ],
    ids=["another ratio", "another depth", "another model", "no name", "a longer name"],
)
def test_what_no_table_knows_goes_by_the_rule_and_says_so(ratio, blocks, names):
    selection = select_blocks("auto", ratio, blocks, names)
    skipped = round(ratio * blocks)
    assert spans(selection) == (math.ceil(0.6 * skipped), skipped - math.ceil(0.6 * skipped))
    assert selection.source == "rule" and selection.table == RULE and "inferred" not in RULE


@pytest.mark.parametrize(
    ("number", "pair"), [(1, (1, 0)), (2, (2, 0)), (4, (3, 1)), (5, (3, 2)), (6, (4, 2)), (11, (7, 4))]
)
def test_a_number_is_divided_by_the_rule(number, pair):
    selection = select_blocks(str(number), 0.3, 12)
    assert spans(selection) == pair and selection.source == "rule"


@pytest.mark.parametrize("blocks", [2, 3, 5, 12, 57])
@pytest.mark.parametrize("ratio", [0.01, 0.3, 0.5, 0.99])
def test_auto_always_skips_a_block_and_keeps_a_block(ratio, blocks):
    selection = select_blocks("auto", ratio, blocks)
    assert 1 <= selection.leading + selection.trailing <= blocks - 1
    assert min(spans(selection)) >= 0


def test_zero_skips_nothing():
    assert spans(select_blocks("0", 0.3, 12)) == (0, 0)


@pytest.mark.parametrize("text", ["12", "13", "99", "6,6", "12,0", "0,30"])
def test_too_many_blocks_are_refused_with_the_most_that_works(text):
    with pytest.raises(
        ValueError, match=r"^(BlockSkipConfig\(leading=|select_blocks\.skip_blocks ).*at most 11"
    ) as error:
        select_blocks(text, 0.3, 12)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["half", "-3", "1,2,3", "2;3", "50%", ""])
def test_other_forms_are_refused_with_the_ones_that_work(text):
    with pytest.raises(ValueError, match="select_blocks.skip_blocks is .*none, auto, a number"):
        select_blocks(text, 0.3, 12)


@pytest.mark.parametrize(
    ("skipped", "pair", "harm"), [(1, (0, 1), 0.05), (2, (1, 1), 0.15), (3, (2, 1), 0.25), (4, (2, 2), 0.7)]
)
def test_curves_give_the_least_harmful_pair_of_every_size(skipped, pair, harm):
    selection = selections.select_blocks(str(skipped), 0.3, 5, CURVED)
    assert spans(selection) == pair and selection.harm == pytest.approx(harm) and selection.source == "table"


def test_a_byte_budget_takes_the_least_harm_that_frees_enough():
    """Double blocks weigh more: of two pairs the one of fewer blocks may free more."""
    sizes = [300, 300, 100, 100, 100]
    freed = [(spans(selection), number) for selection, number in selections_by_bytes(sizes, CURVED)]
    assert freed == [
        ((0, 0), 0),
        ((0, 1), 100),
        ((1, 0), 300),
        ((1, 1), 400),
        ((2, 0), 600),
        ((2, 1), 700),
        ((2, 2), 800),
    ]
    assert spans(select_by_bytes(1, sizes, CURVED)) == (0, 1)
    assert spans(select_by_bytes(101, sizes, CURVED)) == (1, 0)
    assert spans(select_by_bytes(600, sizes, CURVED)) == (2, 0)
    with pytest.raises(ValueError, match="--skip_budget 900 B is more than .*2 leading and 2 trailing .* frees 800 B"):
        select_by_bytes(900, sizes, CURVED)


def test_without_curves_a_byte_budget_skips_as_few_blocks_as_it_can():
    sizes = [300, 300, 100, 100, 100]
    assert select_by_bytes(301, sizes) == Selection(5, 2, 0, "rule", RULE)
    assert [number for _, number in selections_by_bytes(sizes)] == [0, 300, 600, 700, 800]
