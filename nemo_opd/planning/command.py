"""`nemo-opd plan`: the arithmetic first, then every distinct rank built on the meta device, and both compared."""

from __future__ import annotations

import argparse
import os
import sys
import time

from nemo_opd.planning.alternatives import suggestion, sweep
from nemo_opd.planning.catalogue import model_values
from nemo_opd.planning.plan import Options, Plan, make_setting, plan, read_recipe
from nemo_opd.planning.text import as_json, text

NO_FIT = 1
"""Exit code of a recipe that does not fit."""
_BEST = 5


class WrongPlan(RuntimeError):
    """What Megatron builds is not what was calculated: a fault of ours."""


def main(args: argparse.Namespace) -> int:
    """Plan one recipe. Raises ConfigError for one that cannot work, before Megatron is imported."""
    config = read_recipe(args.recipe, args.overrides)
    options = Options(args.gpu, args.nodes, args.gpus_per_node, Options().assumptions.with_words(args.assume))
    found = plan(make_setting(config, options))
    suggested = suggestion(config, options) if found.problems else None
    best = sweep(config, options, _BEST) if args.sweep else []
    checked = "" if args.arithmetic else build_ranks(found)
    written = as_json(found, suggested, best) if args.json else text(found, checked, suggested, best)
    sys.stdout.write(written + "\n")
    return NO_FIT if found.problems else 0


def build_ranks(found: Plan) -> str:
    """Build what was planned, rank by rank, and say so.

    Raises:
        WrongPlan: parameters that differ, or gradient buffers that are smaller or a percent larger than planned.
    """
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # nothing of it may touch a GPU, or take Transformer Engine's modules
    from nemo_opd.engines.megatron.blueprint import blueprints

    begin, built = time.perf_counter(), 0
    setting = found.setting
    config, student = setting.config, setting.student
    values, where = model_values("student.model", config.student.model)
    multiple = config.student.vocab_padding_multiple
    for rank in blueprints(
        values, where, config.student, setting.processes, config.student.dtype, multiple, True, setting.distributed
    ):
        expected = student.shape.stage(student.spread, rank.stage, multiple)
        _compare("student", rank.stage, (rank.dense, rank.expert), (expected.dense, expected.expert))
        planned = expected.total * max(4, student.width)
        if not planned <= rank.gradient_bytes < 1.01 * planned + 2**20:
            raise WrongPlan(f"student, stage {rank.stage}: {rank.gradient_bytes} bytes of gradients, planned {planned}")
        built += 1
    for model, teacher in setting.teachers():
        if teacher.source != "external":
            continue
        folder = teacher.base_model if model.key.endswith("base_model") else teacher.model
        values, where = model_values(f"{model.key}", str(folder))
        for rank in blueprints(values, where, teacher, setting.processes, teacher.dtype, trained=False):
            expected = model.shape.stage(model.spread, rank.stage)
            _compare(model.key, rank.stage, (rank.dense, rank.expert), (expected.dense, expected.expert))
            built += 1
    seconds = time.perf_counter() - begin
    return f"built on the meta device: {built} distinct rank(s) of {setting.processes}, as calculated ({seconds:.1f} s)"


def _compare(who: str, stage: int, built: tuple[int, int], planned: tuple[int, int]) -> None:
    if built != planned:
        raise WrongPlan(f"{who}, stage {stage}: Megatron built {built} parameters (shared, experts), planned {planned}")
