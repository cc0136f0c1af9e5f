"""What a batch script asks before it starts anything: python -m nemo_opd.cluster.prepare ... -- RECIPE [key=value ...]

Checks the recipe for the nodes of the job, deals them out, makes the folder of the attempt. Answers on stdout in words
that end with NUL, for `mapfile -d ''`:

    start  RUN_DIR PLAN STARTS  then ROLE COMPONENT NODE,NODE,... for each role that has nodes
    done   RUN_DIR              nothing is left to do
    held   RUN_DIR              nobody may start it; why stands on stderr
"""

from __future__ import annotations

import argparse
import shutil
import sys
from dataclasses import replace
from pathlib import Path

from nemo_opd.cluster.plan import ROLES, TEACHER, TRAINER, Plan, as_words, dealt, server_settings, write_key
from nemo_opd.config import Config
from nemo_opd.configuration.cluster_rules import served_teachers
from nemo_opd.configuration.load import load
from nemo_opd.errors import ConfigError
from nemo_opd.reliability.files import private_folder
from nemo_opd.reliability.lock import probe
from nemo_opd.reliability.outcome import EXIT_CODES, Status, read_outcome
from nemo_opd.reliability.requeue import begin


def main(words: list[str]) -> int:
    """Answer the batch script; returns its exit code, 0 also for `done` and `held`."""
    args = _arguments(words)
    try:
        answer = service(args) if args.service else run(args)
    except ConfigError as error:
        sys.stderr.write(f"error: {error}\n")
        return EXIT_CODES[Status.CONFIG_ERROR]
    sys.stdout.write("".join(f"{word}\0" for word in answer))
    return 0


def _arguments(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="nemo_opd.cluster.prepare", allow_abbrev=False)
    parser.add_argument("--attempt", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--per-node", type=int, required=True)
    parser.add_argument("--component", action="append", required=True, help="NODE=ADDRESS,... ; once per component")
    parser.add_argument("--service", action="store_true", help="all nodes serve the recipe's teachers")
    parser.add_argument("words", nargs="+")
    split = words.index("--")
    return parser.parse_args([*words[:split], "--", *words[split + 1 :]])


def run(args: argparse.Namespace) -> list[str]:
    """For a training. Raises ConfigError."""
    recipe, overrides = Path(args.words[0]), args.words[1:]
    wished = load(recipe, [*overrides, "train.processes=null"], checked=False)
    components = [[pair.partition("=")[0] for pair in part.split(",")] for part in args.component]
    nodes = dealt(wished, components)
    processes = f"train.processes={len(nodes[TRAINER]) * args.per_node}"
    config = load(recipe, [*overrides, processes])
    run_dir = Path(config.run.dir)
    outcome = read_outcome(run_dir)
    if outcome is not None and outcome.status is Status.DONE and (outcome.step or 0) >= config.train.steps:
        sys.stderr.write(f"{run_dir} is done, at step {outcome.step}\n")
        return ["done", str(run_dir)]
    probe(run_dir, "run")
    plan = _plan(args, config, nodes, (*args.words, processes))
    if reason := begin(run_dir, args.attempt, config.cluster.starts):
        sys.stderr.write(f"{run_dir} is held: {reason}\n")
        return ["held", str(run_dir)]
    _make(plan, config, plan.folder / "key")
    return _answer(plan, components, config.cluster.starts)


def service(args: argparse.Namespace) -> list[str]:
    """For servers of the recipe's teachers that outlive its runs. Raises ConfigError."""
    config = load(Path(args.words[0]), args.words[1:])
    if not served_teachers(config):
        got, expected = config.teacher.engine, "vllm, as this starts servers"
        raise ConfigError("teacher.engine", got, expected, "set teacher.engine=vllm")
    components = [[pair.partition("=")[0] for pair in part.split(",")] for part in args.component]
    every = tuple(name for names in components for name in names)
    if len(every) < len(served_teachers(config)):
        expected = f"at least {len(served_teachers(config))}, one for each teacher"
        raise ConfigError("--nodes", len(every), expected, "ask sbatch for more nodes")
    plan = _plan(args, config, {role: every if role == TEACHER else () for role in ROLES}, tuple(args.words))
    _make(plan, config, Path(plan.run_dir) / "key")
    return _answer(plan, components, config.cluster.starts)


def _plan(args: argparse.Namespace, config: Config, nodes: dict[str, tuple[str, ...]], words: tuple[str, ...]) -> Plan:
    pairs = [pair.partition("=") for part in args.component for pair in part.split(",")]
    addresses = {name: address for name, _, address in pairs}
    return Plan(args.attempt, config.run.dir, words, nodes, addresses, args.per_node, args.port)


def _make(plan: Plan, config: Config, key_file: Path) -> None:
    """The folder of the attempt, in the place of those of earlier ones that were killed, with the plan in it."""
    for earlier in (Path(plan.run_dir) / "control").glob("job-*"):
        shutil.rmtree(earlier, ignore_errors=True)
    private_folder(Path(plan.run_dir) / "control")
    private_folder(plan.folder)
    settings = server_settings(config, plan, key_file)
    if str(key_file) in settings.values():
        write_key(key_file)
    if (weights := settings.get("rollout.servers.weights_dir")) is not None:
        private_folder(Path(weights))
    replace(plan, words=(*plan.words, *as_words(settings))).write()


def _answer(plan: Plan, components: list[list[str]], starts: int) -> list[str]:
    answer = ["start", plan.run_dir, str(plan.path), str(starts)]
    for role, nodes in plan.nodes.items():
        if nodes:
            component = next(number for number, names in enumerate(components) if nodes[0] in names)
            answer += [role, str(component), ",".join(nodes)]
    return answer


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
