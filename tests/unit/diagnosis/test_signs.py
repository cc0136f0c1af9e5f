"""Each sign trips on its own failure, and none on a healthy run, however noisy."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterator
from dataclasses import replace

import pytest

from nemo_opd.config import SIGNS as CONFIGURED
from nemo_opd.config import DiagnoseConfig, SignConfig
from nemo_opd.diagnosis.diagnosis import Diagnosis, Verdict
from nemo_opd.diagnosis.history import NOT_FINITE, History, standard_error
from nemo_opd.diagnosis.signs import SIGNS
from tests.helpers.histories import EXCUSED_BY_REWARD, FAILS_FROM, FAILURES, healthy, run, times, together, towards

ALLOWED_TOO = {
    "repetition": {"agreement_trap"},
    "agreement_trap": {"degradation"},
    "degradation": {"agreement_trap"},
}
"""Signs that truly belong to a failure besides its own: KL falls in a healthy run as well."""


def verdicts(steps: Iterator, config: DiagnoseConfig | None = None, **settings) -> list[Verdict]:
    diagnosis = Diagnosis(config or DiagnoseConfig(**settings), {})
    return [diagnosis.look(step, metrics) for step, metrics in steps]


def seen(found: list[Verdict]) -> dict[str, float]:
    return {name.removeprefix("diagnosis/"): count for name, count in found[-1].metrics.items() if count}


def test_schema_and_rules_know_the_same_signs():
    assert tuple(SIGNS) == CONFIGURED
    assert set(FAILURES) == set(SIGNS)
    assert all(isinstance(getattr(DiagnoseConfig(), name), SignConfig) for name in SIGNS)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    "curves",
    [{}, {"prompts": 4}, {"reward": 0.02, "gain": 0.0}, {"reward": 0.95, "gain": 0.0}, {"reward": 0.5, "gain": 0.0}],
    ids=["learning", "few prompts", "hopeless", "solved", "no progress"],
)
def test_a_healthy_run_trips_nothing(seed, curves):
    found = verdicts(run(healthy(seed, **curves), 600))
    assert seen(found) == {}
    assert set(found[-1].metrics) == {f"diagnosis/{name}" for name in SIGNS}, "all of them were judged"


@pytest.mark.parametrize("sign", FAILURES)
def test_each_sign_trips_on_its_failure_and_soon(sign):
    curves = {"gain": 0.0} if sign in EXCUSED_BY_REWARD else {}
    found = verdicts(run(healthy(1, **curves), 400, FAILURES[sign]), stop=False)
    assert sign in seen(found)
    assert set(seen(found)) <= {sign} | ALLOWED_TOO.get(sign, set())
    first = next(finding for verdict in found for finding in verdict.said if finding.sign == sign)
    assert FAILS_FROM < first.step <= FAILS_FROM + 80
    assert first.since == first.step
    assert first.action == "warn"


@pytest.mark.parametrize("sign", FAILURES)
def test_an_ignored_sign_says_nothing(sign):
    config = replace(
        DiagnoseConfig(stop=False), **{sign: SignConfig("ignore", getattr(DiagnoseConfig(), sign).threshold)}
    )
    found = verdicts(run(healthy(1), 400, FAILURES[sign]), config)
    assert f"diagnosis/{sign}" not in found[-1].metrics
    assert all(finding.sign != sign for verdict in found for finding in verdict.said)


def test_a_warning_says_what_where_since_when_and_what_helps():
    found = verdicts(run(healthy(1), 400, FAILURES["truncation"]))
    (text,) = {str(finding) for finding in found[-1].said} or {str(next(v.said[0] for v in found if v.said))}
    for part in ("truncation since step 2", "of the responses are cut off", "threshold 0.5", "arXiv 2604.08527",
                 "diagnose.truncation.action=ignore silences this"):  # fmt: skip
        assert part in text
    assert "\n" not in text


def test_a_sign_is_said_once_and_then_now_and_then_and_counted_always():
    found = verdicts(run(healthy(1), 500, FAILURES["truncation"]), repeat_every=60)
    steps = [number for number, verdict in enumerate(found, 1) if verdict.said]
    assert len(steps) >= 3
    assert {b - a for a, b in itertools.pairwise(steps)} == {60}
    assert {finding.since for verdict in found for finding in verdict.said} == {steps[0]}
    assert found[-1].metrics["diagnosis/truncation"] == 500 - steps[0] + 1


def test_a_sign_that_was_away_has_a_new_beginning():
    def fail(progress, metrics):
        return {"tokens/dropped_share": 0.0 if 0.5 < progress < 1 else 0.9}

    found = verdicts(run(healthy(1), 400, fail), repeat_every=1, stop=False)
    assert len({finding.since for verdict in found for finding in verdict.said}) == 2


@pytest.mark.parametrize(("stop", "action"), [(True, "stop"), (False, "warn")])
def test_a_sign_may_end_the_run(stop, action):
    found = verdicts(run(healthy(1), 400, FAILURES["repetition"]), stop=stop)
    verdict, finding = next((v, f) for v in found for f in v.said if f.sign == "repetition")
    assert finding.action == action
    assert verdict.stop == (finding if stop else None)


def test_nothing_is_said_before_the_warm_up_ends():
    def degenerate(number):
        return healthy()(number) | {"response/repeated_3grams": 0.1 if number <= 20 else 0.95}

    found = verdicts(run(degenerate, 120), warmup_steps=100)
    assert next(number for number, verdict in enumerate(found, 1) if verdict.said) == 100
    assert "diagnosis/repetition" not in found[98].metrics


def test_a_metric_that_a_run_does_not_have_is_not_judged():
    found = verdicts((step, {"loss/total": metrics["loss/total"]}) for step, metrics in run(healthy(), 100))
    assert set(found[-1].metrics) == {"diagnosis/divergence"}


def test_sft_from_random_weights_is_no_collapse():
    """The student does not write, and its entropy falls by a factor of thousands."""

    def sft(number):
        loss = 4.0 * 0.97**number + 1e-3
        return healthy()(number) | {"tokens/written": 0.0, "train/student_entropy": loss, "loss/total": loss}

    assert seen(verdicts(run(sft, 300))) == {}


def test_growth_that_the_reward_pays_for_is_none():
    longer = together(times("response/length", 8.0), towards("reward/mean", 0.95))
    assert seen(verdicts(run(healthy(2), 400, longer))) == {}


def test_without_a_verifier_growth_counts_where_it_ends_in_truncation():
    def unverified(number):
        metrics = healthy(number)(number)
        del metrics["reward/mean"]
        return metrics

    longer = times("response/length", 8.0)
    assert seen(verdicts(run(unverified, 400, longer))) == {}
    cut = together(longer, towards("response/truncated_share", 0.35))
    assert set(seen(verdicts(run(unverified, 400, cut)))) == {"length_inflation"}


def test_a_self_teacher_that_begins_without_kl_does_not_diverge():
    def own_teacher(number):
        drift = 0.03 * (1 - 0.99**number)
        return healthy()(number) | {"train/kl": drift, "train/sampled_kl": drift, "optimizer/grad_norm": 30 * drift}

    assert seen(verdicts(run(own_teacher, 400))) == {}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_none_are_a_divergence(value):
    found = verdicts(run(healthy(1), 300, lambda progress, metrics: {"optimizer/grad_norm": value}))
    finding = next(verdict.stop for verdict in found if verdict.stop)
    assert (finding.sign, finding.value) == ("divergence", NOT_FINITE)
    assert "the gradient norm is not a number" in finding.message
    assert finding.step <= FAILS_FROM + 11


def test_falling_kl_alone_is_no_trap():
    quick = together(*(times(name, 0.01) for name in ("train/kl", "train/sampled_kl", "loss/total")))
    assert seen(verdicts(run(healthy(1), 400, quick))) == {}


def test_without_a_teacher_a_falling_loss_is_no_agreement():
    """A policy gradient on rewards alone: the loss is about 0 and of either sign."""

    step = healthy(1)

    def rewarded(number):
        metrics = {name: value for name, value in step(number).items() if "kl" not in name}
        return metrics | {"loss/total": 0.05 if number < 20 else -0.05}

    signs = seen(verdicts(run(rewarded, 400, towards("reward/mean", 0.05))))
    assert "agreement_trap" not in signs and "degradation" in signs


def test_a_resumed_run_decides_the_same():
    steps = list(run(healthy(1), 400, FAILURES["agreement_trap"]))
    config, state = DiagnoseConfig(), {}
    whole = [str(Diagnosis(config, state).look(*step)) for step in steps]
    first: dict = {}
    parts = [str(Diagnosis(config, first).look(*step)) for step in steps[:230]]
    stored = json.loads(json.dumps(first, allow_nan=False))
    resumed = Diagnosis(config, stored)
    parts += [str(resumed.look(*step)) for step in steps[230:]]
    assert parts == whole
    assert any("agreement_trap" in verdict for verdict in whole[231:])


def test_a_trend_is_no_noise():
    rng = random.Random(0)
    noise = [rng.gauss(0, 1) for _ in range(4000)]
    assert standard_error(noise) == pytest.approx(4000**-0.5, rel=0.05)
    assert standard_error([value + number for number, value in enumerate(noise)]) < 1.5 * 4000**-0.5
    assert standard_error([1.0]) == standard_error([2.0, 2.0]) == 0.0


def test_a_steep_fall_is_seen_while_it_lasts():
    found = verdicts(
        run(healthy(1), 260, lambda progress, metrics: {"reward/mean": metrics["reward/mean"] * (1 - progress)})
    )
    first = next(finding for verdict in found for finding in verdict.said if finding.sign == "degradation")
    assert first.step < FAILS_FROM + 45


def test_windows_do_not_overlap_and_do_not_grow():
    state: dict = {}
    history = History(state, 3, 3)
    for number in range(1, 6):
        history.add({"x": float(number)})
    assert (history.start("x"), history.recent("x"), history.latest("x")) == ([1, 2, 3], None, [3, 4, 5])
    history.add({"x": 6.0})
    assert history.medians("x") == (2.0, 5.0)
    for number in range(7, 100):
        history.add({"x": float(number)})
    assert (history.start("x"), history.recent("x"), history.best("x")) == ([1, 2, 3], [97, 98, 99], 98.0)
    assert history.risen("x") and not history.fallen("x") and not history.risen("x", 1000)
