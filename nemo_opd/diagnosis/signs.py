"""The signs of failure: the rule that finds each, and what the literature says helps."""

from __future__ import annotations

from dataclasses import dataclass

from nemo_opd.diagnosis import rules
from nemo_opd.diagnosis.rules import Rule


@dataclass(frozen=True)
class Sign:
    """A sign that a run goes wrong. Its threshold and action stand in `diagnose.<name>`."""

    name: str
    rule: Rule
    advice: str
    """What helps, with the source."""
    from_start: bool = True
    """Is it judged against the run's first steps (and therefore only after `diagnose.warmup_steps`)?"""


SIGNS: dict[str, Sign] = {
    sign.name: sign
    for sign in (
        Sign(
            "length_inflation",
            rules.length_inflation,
            "mix in responses of another source and hold the student near its start (arXiv 2604.08527), or end "
            "rollouts that drift (KAT, arXiv 2606.09471)",
        ),
        Sign(
            "repetition",
            rules.repetition,
            "go back to a checkpoint from before; end rollouts that loop (KAT, arXiv 2606.09471), use a top-k loss "
            "with an unbiased gradient (arXiv 2605.11182), mix in responses of another source (arXiv 2604.08527)",
        ),
        Sign(
            "entropy_collapse",
            rules.entropy_collapse,
            "add forward KL where the teacher is uncertain (arXiv 2603.07079) or use a divergence that covers modes "
            "(GKD, arXiv 2306.13649); with policy gradients, restrain tokens whose advantage and probability are both "
            "high (arXiv 2505.22617)",
        ),
        Sign(
            "mass_collapse",
            rules.mass_collapse,
            "use a larger k, the union of both top sets, or the tail bucket (arXiv 2605.11182); warm the student up on "
            "the teacher's text when their top sets hardly overlap (arXiv 2604.13016)",
        ),
        Sign(
            "truncation",
            rules.truncation,
            "raise rollout.max_new_tokens if the texts are sound; otherwise mix in responses of another source (arXiv "
            "2604.08527), or do not train on what was cut off (arXiv 2503.14476)",
        ),
        Sign(
            "agreement_trap",
            rules.agreement_trap,
            "do not trust a falling KL: read the rollouts (nemo-opd report), end those whose KL stays low (KAT, arXiv "
            "2606.09471)",
        ),
        Sign(
            "divergence",
            rules.divergence,
            "go back to a checkpoint from before and pass over the batches at fault (arXiv 2204.02311), lower "
            "optimizer.lr or optimizer.clip_grad, bound what single tokens can do (TrOPD, arXiv 2606.01249)",
        ),
        Sign(
            "degradation",
            rules.degradation,
            "go back to the best checkpoint; lower optimizer.lr, bound what single tokens can do (TrOPD, arXiv "
            "2606.01249), start from a student nearer to its teacher (arXiv 2604.13016)",
        ),
        Sign(
            "dropped_scores",
            rules.dropped_scores,
            "find out why the teacher does not answer (log.txt; a served teacher's own log); a score that is missing "
            "is never replaced by a number",
            from_start=False,
        ),
        Sign(
            "importance_weights",
            rules.importance_weights,
            "correct for it (weight=tis or icepop), write and train at the same precision (arXiv 2510.26788), at "
            "rollout.temperature=1 and rollout.refit_every=1",
            from_start=False,
        ),
    )
}
