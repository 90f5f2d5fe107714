import pytest

from headrace.sim.success import check_rule, read_success, stops_early


@pytest.mark.parametrize(
    ("flags", "once", "at_end", "first"),
    [
        ([], False, False, None),
        ([False, True, False], True, False, 2),
        ([True, True], True, True, 1),
        ([False], False, False, None),
    ],
)
def test_both_readings(flags, once, at_end, first):
    reading = read_success(flags)
    assert (reading.once, reading.at_end, reading.first_step) == (once, at_end, first)
    assert reading.under("once") == once and reading.under("at_end") == at_end


def test_only_once_stops_early():
    assert stops_early("once") and not stops_early("at_end")


def test_unknown_rules_are_named():
    with pytest.raises(ValueError, match=r"unknown success rule 'twice' \(known: once, at_end\)"):
        check_rule("twice")
