"""The job name of a run: python -m nemo_opd.cluster.name RECIPE [key=value ...]

It belongs to the run folder, so that `--dependency=singleton` lets one job of a run start at a time, whatever else the
user has submitted.
"""

from __future__ import annotations

import hashlib
import re
import sys
from pathlib import Path

from nemo_opd.configuration.load import load
from nemo_opd.errors import ConfigError
from nemo_opd.reliability.outcome import EXIT_CODES, Status


def job_name(run_dir: Path) -> str:
    """``opd-distil-1f3a9c02``: the folder's name in safe letters, and a digest of its whole path."""
    digest = hashlib.sha256(str(run_dir.resolve()).encode()).hexdigest()[:8]
    return f"opd-{re.sub(r'[^A-Za-z0-9_.-]+', '_', run_dir.name)[:40]}-{digest}"


def main(words: list[str]) -> int:
    try:
        config = load(Path(words[0]), words[1:], checked=False)
    except ConfigError as error:
        sys.stderr.write(f"error: {error}\n")
        return EXIT_CODES[Status.CONFIG_ERROR]
    sys.stdout.write(job_name(Path(config.run.dir)) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
