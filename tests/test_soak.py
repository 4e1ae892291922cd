"""A short soak (tests/soak.py) with a fixed seed; by hand it runs for hours."""

import pytest

from soak import BAD, PHASES, SEEN, Soak


def soak(minutes):
    report = Soak(seed=1, phases=PHASES).run(minutes)
    assert not {name: report[name] for name in BAD if report[name]}, report
    assert all(report[name] for name in SEEN), report


def test_soak(work):
    soak(0.25)


@pytest.mark.full
def test_soak_for_two_minutes(work):
    soak(2)
