"""One process of a preflight that measures.

python -m nemo_opd.doctor.worker FOLDER        as `nemo_opd.doctor.command` starts it (through torchrun)

The folder holds `recipe.yaml` and `options.json`; findings are appended to `findings.jsonl` as they come, so that what
was found before a process died is not lost.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from nemo_opd import worker
from nemo_opd.config import Config
from nemo_opd.configuration.load import load
from nemo_opd.doctor.finding import Finding, Verdict
from nemo_opd.doctor.options import Options
from nemo_opd.errors import ConfigError

log = logging.getLogger(__name__)

RECIPE, OPTIONS, FINDINGS = "recipe.yaml", "options.json", "findings.jsonl"


def run(config: Config, options: Options, folder: Path) -> bool:
    """Measure in this process, alone or as one of a launcher's; False where it came to no end."""

    def report(findings: Sequence[Finding]) -> None:
        text = "".join(finding.to_json() + "\n" for finding in findings)
        with (folder / FINDINGS).open("a", encoding="utf-8") as file:
            file.write(text)

    try:
        from nemo_opd.doctor.measure import measure  # late: torch, Megatron and NeMo take seconds to import

        measure(config, options, report)
    except ConfigError as error:
        report([Finding(f"models: {error.key}", Verdict.FAIL, str(error.got), error.expected, error.way_out)])
        return False
    except Exception as error:  # whatever it is, a run would have met it too
        log.exception("the models could not be built or asked")
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        report([Finding("models: built and asked", Verdict.FAIL, reason, "no error", "see the traceback above")])
        return False
    return True


def read_findings(folder: Path) -> list[Finding]:
    """What the processes wrote, in the order in which they did."""
    path = folder / FINDINGS
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [Finding.from_json(line) for line in lines]


def main() -> int:
    """A process of torchrun's; others than the first keep their words in `logs/rank-N.txt`."""
    folder = Path(sys.argv[1])
    rank = worker.join_launcher()
    if rank > 0:
        worker.write_output_to(folder / "logs" / f"rank-{rank}.txt")
    worker.configure_logging()
    config = load(folder / RECIPE)
    options = Options.from_json((folder / OPTIONS).read_text(encoding="utf-8"))
    return 0 if run(config, options, folder) else 1


if __name__ == "__main__":
    sys.exit(main())
