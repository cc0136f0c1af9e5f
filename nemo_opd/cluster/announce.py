"""Says how runs find a standing teacher service: python -m nemo_opd.cluster.announce PLAN

Waits until its servers listen, then writes FOLDER/settings: overrides, one per line.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from nemo_opd.cluster.plan import Plan, as_words, found_urls, servers_of
from nemo_opd.configuration.load import load
from nemo_opd.reliability.files import replace_private

_LOOK_SECONDS = 0.5


def main(words: list[str]) -> int:
    plan = Plan.read(Path(words[0]))
    config = load(Path(plan.words[0]), plan.words[1:])
    while (urls := found_urls(plan, config)) is None:
        if not plan.path.exists():  # the service has ended
            return 1
        time.sleep(_LOOK_SECONDS)
    keys = {
        f"{section}.servers.key_file": str(servers_of(config, section).key_file) for section in plan.servers(config)
    }
    replace_private(Path(plan.run_dir) / "settings", "".join(f"{word}\n" for word in as_words({**urls, **keys})))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
