"""The progress bar: the numbers that tell at a glance whether a run goes well."""

from __future__ import annotations

import sys

from tqdm import tqdm

from nemo_opd.types import StepReport

_SHOWN = (
    ("loss", "loss/total", "{:.4f}"),
    ("KL", "train/kl", "{:.4f}"),
    ("reward", "reward/mean", "{:.3f}"),
    ("length", "response/length", "{:.0f}"),
    ("tok/s", "speed/tokens_per_second", "{:.0f}"),
)


class Progress:
    """A bar over the run's steps on a terminal; on a file, one line now and then."""

    def __init__(self, total: int, done: int, enabled: bool, name: str) -> None:
        interval = 0.2 if sys.stderr.isatty() else 15.0
        self._bar = tqdm(total=total, initial=done, disable=not enabled, desc=name, unit="step", mininterval=interval,
                         dynamic_ncols=True, smoothing=0.1)  # fmt: skip

    def advance(self, report: StepReport) -> None:
        shown = {label: form.format(report.metrics[key]) for label, key, form in _SHOWN if key in report.metrics}
        self._bar.set_postfix(shown, refresh=False)
        self._bar.update()

    def close(self) -> None:
        self._bar.close()
