import pytest

from headrace.training.schedule import Schedule


def test_warmup_is_linear_and_never_zero():
    schedule = Schedule(warmup=4)
    assert [schedule.factor(k) for k in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_cosine_has_its_known_values():
    schedule = Schedule(kind="cosine", warmup=2, steps=12, floor=0.1)
    assert schedule.factor(2) == pytest.approx(1.0)
    assert schedule.factor(7) == pytest.approx(0.1 + 0.9 * 0.5)
    assert schedule.factor(12) == schedule.factor(500) == pytest.approx(0.1)


@pytest.mark.parametrize(
    "options",
    [{"kind": "linear"}, {"warmup": -1}, {"kind": "cosine"}, {"steps": 5}, {"floor": 0.5}, {"floor": 2.0},
     {"kind": "cosine", "steps": 3, "warmup": 3}],
)  # fmt: skip
def test_schedules_that_mean_nothing_are_refused(options):
    with pytest.raises(ValueError, match=r"schedule|warmup|floor"):
        Schedule(**options)
