from __future__ import annotations

import pytest

from personaplex.allowance import Allowance


def test_an_allowance_is_a_burst_and_then_a_rate() -> None:
    allowance = Allowance(rate=10.0, burst=5.0)
    assert allowance.wait(100.0) == 0
    allowance.spend(7.0)
    assert allowance.wait(100.0) == pytest.approx(0.2)
    assert allowance.wait(100.1) == pytest.approx(0.1)
    assert allowance.wait(100.2) == pytest.approx(0.0)
    assert allowance.wait(99.0) == pytest.approx(0.0), "a clock that goes back gives nothing"
    allowance.wait(1_000.0)
    allowance.spend(5.0)
    assert allowance.wait(1_000.0) == 0, "no more than the burst was saved"
    allowance.spend(1.0)
    assert allowance.wait(1_000.0) == pytest.approx(0.1)


def test_an_account_opened_with_less_than_the_burst_saves_up_to_it() -> None:
    allowance = Allowance(rate=2.0, burst=30.0, now=100.0, start=10.0)
    assert allowance.spend(10.0, 100.0)
    assert not allowance.spend(1.0, 100.0)
    assert allowance.spend(30.0, 1_000.0)
    assert not allowance.spend(1.0)
