"""Trains with the biased top-k loss, which no recipe can name: `loss=stop_gradient` is replaced by it, k and all.

python recipes/reproductions/topk_bias/naive.py RECIPE loss=stop_gradient loss.k=5 key=value ...
"""

from __future__ import annotations

import sys
from pathlib import Path

from nemo_opd import assemble, worker
from nemo_opd.config import StopGradientLoss
from nemo_opd.configuration.load import load
from nemo_opd.losses.naive import NaiveTopK


def naive(slot: StopGradientLoss) -> NaiveTopK:
    assert slot.name == "stop_gradient", "start it with loss=stop_gradient, whose k and support it takes"
    return NaiveTopK(k=slot.k, support=slot.support)


if __name__ == "__main__":
    assemble.build_loss = naive  # type: ignore[assignment]
    sys.exit(worker.run(load(Path(sys.argv[1]), sys.argv[2:])))
