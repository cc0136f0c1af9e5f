"""One pure function per sign of failure: from the history and a threshold to what was measured.

A rule answers None where it cannot judge: its metric is not there, or its windows are not full. Most compare the last
window with the run's first one, since what is normal depends on task, model and tokenizer; a step's own noise does not
trip them (medians, or means that differ by `NOISE` standard errors). The numbers below are judgement, not measurement,
as are the default thresholds; docs/diagnosis.md says which of them were seen to hold on which runs.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass

from nemo_opd.diagnosis.history import NOT_FINITE, History, standard_error

LEAST_RISE = 0.1
"""A share (of 3-grams, of truncated responses) that rises by less is never a sign."""
LEAST_DROP = 0.1
"""A reward that falls by less is never a sign."""
NOISE_OF_BEST = 6.0
"""Standard errors by which a reward must be below its best, which is the luckiest of very many windows."""
NOISE_OF_GAIN = 2.0
"""Standard errors from which a reward counts as risen where that excuses another change."""
LEAST_ENTROPY = 1e-3
"""Nats. Below this a model is certain of everything it says, and ratios of entropies say nothing."""
TRAP_REPETITION = 0.25
"""Share of the distinct 3-grams that must be gone for a falling KL to look like agreement on degraded text."""
LEAST_KL = 0.1
"""Nats per token: a smaller KL at the start counts as this, since a self-teacher begins at 0."""
LEAST_GRAD_NORM = 1.0
"""A smaller gradient norm at the start counts as this: losses are means per token."""

REWARD = "reward/mean"
LENGTH = "response/length"
TRUNCATED = "response/truncated_share"
REPEATED = "response/repeated_3grams"
STUDENT_ENTROPY, TEACHER_ENTROPY = "train/student_entropy", "train/teacher_entropy"
WRITTEN = "tokens/written"
MASSES = ("train/student_mass", "train/teacher_mass")
KL = ("train/kl", "train/sampled_kl")
"""The first that a run reports stands for its distance from the teacher."""
LOSS = "loss/total"
"""May be any objective: it tells that a run blows up, and nothing about a teacher."""
GRAD_NORM = "optimizer/grad_norm"
DROPPED = "tokens/dropped_share"
OUT_OF_BOUNDS = "train/importance_out_of_bounds"

WATCHED = frozenset(
    {REWARD, LENGTH, TRUNCATED, REPEATED, STUDENT_ENTROPY, TEACHER_ENTROPY, WRITTEN, GRAD_NORM, DROPPED, OUT_OF_BOUNDS}
    | {*MASSES, *KL, LOSS}
)
"""Metrics that the rules read."""


@dataclass(frozen=True)
class Measured:
    """What a rule saw."""

    value: float
    trips: bool
    text: str
    """The value in words."""


Rule = Callable[[History, float], Measured | None]


def length_inflation(history: History, threshold: float) -> Measured | None:
    """Responses grow, and nothing is gained by it: the reward has not risen or, where nothing is verified, more of
    them than before are cut off."""
    lengths = history.medians(LENGTH)
    if lengths is None or lengths[0] <= 0.0:
        return None
    growth = lengths[1] / lengths[0]
    gained = _gained(history) if history.start(REWARD) else not history.risen(TRUNCATED, LEAST_RISE)
    text = f"responses are {growth:.1f} times as long as at the start ({lengths[0]:.0f} tokens then)"
    return Measured(growth, growth > threshold and not gained, text)


def _gained(history: History) -> bool:
    return history.risen(REWARD, noise=NOISE_OF_GAIN)


def repetition(history: History, threshold: float) -> Measured | None:
    """3-grams that used to be distinct within a response now repeat."""
    shares = history.means(REPEATED)
    if shares is None or shares[0] >= 1.0:
        return None
    lost = (shares[1] - shares[0]) / (1.0 - shares[0])
    text = f"{shares[1]:.0%} of all 3-grams repeat within their response, {shares[0]:.0%} did at the start"
    return Measured(lost, lost > threshold and history.risen(REPEATED, LEAST_RISE), text)


def truncation(history: History, threshold: float) -> Measured | None:
    """Responses that used to end no longer do."""
    shares = history.means(TRUNCATED)
    if shares is None or shares[0] >= 1.0:
        return None
    lost = (shares[1] - shares[0]) / (1.0 - shares[0])
    text = f"{shares[1]:.0%} of the responses are cut off at rollout.max_new_tokens, {shares[0]:.0%} were at the start"
    return Measured(lost, lost > threshold and history.risen(TRUNCATED, LEAST_RISE), text)


def entropy_collapse(history: History, threshold: float) -> Measured | None:
    """The student that writes becomes certain of everything: far more than it was, and than its teacher was of the
    student's first texts. A student that becomes certain while its reward rises is learning."""
    student, written = history.medians(STUDENT_ENTROPY), history.medians(WRITTEN)
    if student is None or written is None or written[1] == 0.0:
        return None
    teacher = history.medians(TEACHER_ENTROPY)
    reference = student[0] if teacher is None else min(student[0], teacher[0])
    if reference < LEAST_ENTROPY:
        return None
    share = student[1] / reference
    text = f"the student's entropy is {student[1]:.2g} nats, {share:.2g} of what it or its teacher began with"
    return Measured(share, share < threshold and not _gained(history), text)


def mass_collapse(history: History, threshold: float) -> Measured | None:
    """The support that a top-k loss looks at holds ever less of one model's probability: the loss no longer sees
    what that model does."""
    found = [(pair[1] / pair[0], name, pair) for name in MASSES if (pair := history.medians(name)) and pair[0] > 0.0]
    if not found:
        return None
    share, name, (before, now) = min(found)
    who = "student" if name == MASSES[0] else "teacher"
    text = f"the support of the loss holds {now:.2g} of the {who}'s probability, {before:.2g} at the start"
    return Measured(share, share < threshold, text)


def agreement_trap(history: History, threshold: float) -> Measured | None:
    """KL falls while the text gets worse: the teacher agrees with what it is given to read (arXiv 2606.09471)."""
    pair = next((pair for name in KL if (pair := history.medians(name)) is not None), None)
    if pair is None or pair[0] <= 0.0:
        return None
    share, repeats = pair[1] / pair[0], repetition(history, TRAP_REPETITION)
    worse = []
    if history.fallen(REWARD, LEAST_DROP) and (rewards := history.means(REWARD)):
        worse.append(f"the reward fell from {rewards[0]:.2g} to {rewards[1]:.2g}")
    if repeats is not None and repeats.trips:
        worse.append(repeats.text)
    text = f"the KL fell to {share:.2g} of what it was, while {' and '.join(worse) or 'the text got no worse'}"
    return Measured(share, share < threshold and bool(worse), text)


def divergence(history: History, threshold: float) -> Measured | None:
    """KL (where there is none, the loss) or gradient norm blow up, or are no numbers, in most steps of the window."""
    found = []
    distance = next((name for name in (*KL, LOSS) if history.latest(name)), LOSS)
    for name, least in ((distance, LEAST_KL), (GRAD_NORM, LEAST_GRAD_NORM)):
        latest, start = history.latest(name), history.start(name)
        if latest is None or start is None:
            continue
        now, before = statistics.median(latest), statistics.median(start)
        what = "the gradient norm" if name == GRAD_NORM else "the loss" if name == LOSS else "the KL"
        if now > NOT_FINITE / 4:  # the median of an even number of steps is a mean of two
            found.append((NOT_FINITE, f"{what} is not a number"))
        elif before < NOT_FINITE:
            found.append((now / max(before, least), f"{what} is {now:.3g}, {before:.3g} at the start"))
    if not found:
        return None
    growth, text = max(found)
    return Measured(growth, growth > threshold, text)


def degradation(history: History, threshold: float) -> Measured | None:
    """The reward is well below the best that it was."""
    latest, best = history.latest(REWARD), history.best(REWARD)
    if latest is None or best is None or best <= 0.0:
        return None
    now = statistics.fmean(latest)
    beyond_noise = best - now > max(LEAST_DROP, NOISE_OF_BEST * 2**0.5 * standard_error(latest))
    text = f"the reward is {now:.2g}, {best:.2g} at its best"
    return Measured(now / best, now / best < threshold and beyond_noise, text)


def dropped_scores(history: History, threshold: float) -> Measured | None:
    """Teacher scores that did not arrive."""
    latest = history.latest(DROPPED)
    if latest is None:
        return None
    share = statistics.fmean(latest)
    return Measured(share, share > threshold, f"{share:.0%} of the tokens have no teacher score and train nothing")


def importance_weights(history: History, threshold: float) -> Measured | None:
    """The sampler is not the policy that is trained."""
    latest = history.latest(OUT_OF_BOUNDS)
    if latest is None:
        return None
    share = statistics.fmean(latest)
    return Measured(share, share > threshold, f"the importance ratio of {share:.0%} of the tokens is out of bounds")
