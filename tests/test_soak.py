"""A short soak (tests/soak.py) with a fixed seed; by hand it runs for hours."""

import pytest
from soak import BAD, PHASES, Soak


def soak(minutes):
    report = Soak(seed=1, phases=PHASES).run(minutes)
    assert not {name: report[name] for name in BAD if report[name]}, report
    # it did do something: each kind of fault, replays, comparisons, a run for its memory
    assert all(report[f'faults: {fault}'] for fault in ('term', 'kill', 'disk')), report
    assert report['losses compared'] > 100 and report['losses printed again'] and report['resumes'] > 2 and report['memory: steps'] > 100, report


def test_soak(work):
    soak(0.25)


@pytest.mark.full
def test_soak_for_two_minutes(work):
    soak(2)
