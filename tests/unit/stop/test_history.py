"""The list of lowest windows and the threshold that it gives."""

from __future__ import annotations

import json

import numpy as np

from nemo_opd.config import KatStop
from nemo_opd.stop.history import History, quantile


def test_the_threshold_is_numpys_quantile() -> None:
    rng = np.random.default_rng(0)
    for count in (1, 2, 7, 100):
        values = sorted(rng.random(count).tolist())
        for share in (0.0, 0.3, 0.7, 1.0):
            assert abs(quantile(values, share) - np.quantile(values, share)) < 1e-15


def test_the_rule_is_active_after_enough_samples_and_enough_steps() -> None:
    history = History(KatStop(warmup_samples=4, warmup_steps=2))
    history.push([0.1, None, 0.3])
    assert history.threshold() is None, "two samples, one step"
    history.push([0.5])
    assert history.threshold() is None, "three samples, two steps"
    history.push([0.7])
    assert abs(history.threshold() - 0.52) < 1e-15
    early = History(KatStop(warmup_samples=1, warmup_steps=2))
    early.push([0.1, 0.2])
    assert early.threshold() is None, "samples enough, one step"
    empty = History(KatStop(warmup_samples=0, warmup_steps=0))
    assert empty.threshold() is None, "no quantile of nothing"


def test_the_oldest_leave_first() -> None:
    history = History(KatStop(history=3, warmup_samples=1, warmup_steps=0, threshold_quantile=0.0))
    history.push([0.1, 0.2, 0.3, 0.4])
    assert history.threshold() == 0.2


def test_the_state_goes_through_json_bit_for_bit() -> None:
    slot = KatStop(warmup_samples=1, warmup_steps=0)
    history, other = History(slot), History(slot)
    history.push(np.random.default_rng(1).random(50).tolist())
    other.load_state(json.loads(json.dumps(history.state())))
    assert other.threshold() == history.threshold()
    assert other.steps == 1
    short = History(KatStop(history=10))
    short.load_state(history.state())
    assert short.state()["lowest"] == history.state()["lowest"][-10:]
