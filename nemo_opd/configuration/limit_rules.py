"""Rules about `limits`, where what mends itself within a time of its own is given that time, and `straggler`."""

from __future__ import annotations

from operator import attrgetter

from nemo_opd.config import Config
from nemo_opd.errors import ConfigError

WITHIN: dict[str, tuple[str, ...]] = {
    "start_seconds": ("start",),
    "load_seconds": ("refit",),
    "stuck_seconds": ("rollout", "evaluate"),
}
"""Times of servers, and the sections in which they run out."""
TEACHERS_WITHIN: dict[str, tuple[str, ...]] = {"start_seconds": ("start",), "stuck_seconds": ("score",)}


def limit_rules(config: Config) -> None:
    """A server that is slow to start, to load or to answer is given up before the run is."""
    straggler = config.straggler
    if straggler.steps > straggler.window:
        expected = f"at most straggler.window ({straggler.window}), the steps that are looked at"
        raise ConfigError("straggler.steps", straggler.steps, expected, "lower it, or raise the window")
    servers = {}
    if config.rollout.engine == "vllm":
        servers["rollout.servers"] = (config.rollout.servers, WITHIN)
    for key, teacher in config.every_teacher().items():
        if teacher.engine == "vllm":
            servers[f"{key}.servers"] = (teacher.servers, TEACHERS_WITHIN)
    for key, (settings, within) in servers.items():
        for name, sections in within.items():
            for section in sections:
                limit, least = attrgetter(section)(config.limits), getattr(settings, name)
                if limit is not None and limit <= least:
                    expected = f"more than {key}.{name} ({least:g}), after which a server is given up, not the run"
                    raise ConfigError(f"limits.{section}", limit, expected, f"raise it, or lower {key}.{name}")
