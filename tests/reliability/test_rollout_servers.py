"""Servers that die, hang, or are asked for what they must not do: real processes, real signals, the real vLLM."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
import torch
from safetensors.torch import load_file

from nemo_opd.engines.hf.generator import HFGenerator
from nemo_opd.engines.vllm.calls import Servers
from nemo_opd.engines.vllm.client import ServerGone, ServerRefused
from nemo_opd.engines.vllm.generator import VLLMGenerator
from nemo_opd.engines.vllm.wire import Generate, WireRequest, WireSampling
from nemo_opd.refit.folder import write_folder
from nemo_opd.rollout.seeds import derive_seed
from nemo_opd.types import GenerateRequest, Prompt, Rollout, Sampling
from tests.helpers.figures import record
from tests.helpers.megatron import recipe
from tests.helpers.ranks import RankPool
from tests.helpers.servers import KEY, Fleet
from tests.helpers.tiny import tiny_checkpoint
from tests.reliability.refit_by_ranks import digest, train_and_refit

pytestmark = pytest.mark.slow

LONG = Sampling(200)


class Writers(Fleet):
    """With generators that ask them; each is a session of its own."""

    attached = 0

    def generator(self, *numbers: int, slots: int = 64, silence: float = 30.0) -> VLLMGenerator:
        self.attached += 1
        urls = [self.url(number) for number in numbers]
        servers = Servers(urls, f"session {self.attached}", self.scratch, KEY, slots, silence_seconds=silence)
        return VLLMGenerator(servers, self.model)


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Writers]:
    model = tiny_checkpoint(tmp_path_factory.mktemp("student"), vocab_size=40, head_dim=32)
    with Writers(model, tmp_path_factory.mktemp("fleet")) as fleet:
        yield fleet


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    other = tiny_checkpoint(tmp_path_factory.mktemp("other"), vocab_size=40, head_dim=32, seed=1)
    return load_file(other / "model.safetensors")


def requests(count: int) -> list[GenerateRequest]:
    prompts = [Prompt(index, 0, (), (2 + index % 30, 5, 7)) for index in range(count)]
    return [GenerateRequest(prompt, 0, derive_seed(3, 0, prompt.index, 0)) for prompt in prompts]


def never() -> bool:
    return False


def tokens(rollouts: list[Rollout]) -> dict[int, list[int]]:
    return {rollout.prompt.index: rollout.response_ids.tolist() for rollout in rollouts}


@pytest.fixture(scope="module")
def expected(fleet: Writers) -> dict[int, list[int]]:
    """What the requests' seeds and the folder's weights say, whoever writes."""
    return tokens(list(HFGenerator(fleet.model, eos_ids=()).generate(requests(24), LONG, never)))


def test_every_tensor_of_a_split_trainer_reaches_the_server(fleet: Writers, ranks4: RankPool) -> None:
    """Trainer at TP 2 x PP 2. Each tensor that vLLM's own loader reads from the folder that the server took has the
    hash of the trainer's, and what the server writes is what these weights write."""
    from vllm.model_executor.model_loader.weight_utils import safetensors_weights_iterator

    layout = {"student__tensor_model_parallel_size": 2, "student__pipeline_model_parallel_size": 2}
    config = recipe(fleet.model, optimizer__lr=1e-2, **layout)
    servers = Servers([fleet.url(0)], "tp2 pp2", fleet.scratch, KEY)
    kept = fleet.scratch / "kept"
    watcher = Keeper(fleet.scratch, kept)
    hashes = ranks4.run(train_and_refit, config, servers, timeout=480.0)
    watcher.end()
    assert all(other == hashes[0] for other in hashes)
    files = sorted(map(str, kept.glob("*.safetensors")))
    read = {name: tensor.clone() for name, tensor in safetensors_weights_iterator(files, use_tqdm_on_load=False)}
    assert {name: digest(tensor) for name, tensor in read.items()} == hashes[0]
    record("R12", "tensors of a trainer at TP 2 x PP 2 that reach a server with another hash", f"0 / {len(read)}")
    start = load_file(fleet.model / "model.safetensors")
    assert all(not torch.equal(start[name], read[name]) for name in start), "the step moved every tensor"
    hf = HFGenerator(fleet.model, eos_ids=())
    hf.load_weights(read.items(), 1)
    wanted = tokens(list(hf.generate(requests(8), LONG, never)))
    answer = httpx.post(
        fleet.url(0) + "/generate",
        json=generate_message("tp2 pp2", requests(8)),
        headers={"authorization": f"Bearer {KEY}"},
        timeout=60.0,
    )
    lines = [json.loads(line) for line in answer.text.splitlines()]
    assert {line["key"]: line["ids"] for line in lines if "ids" in line} == wanted
    assert all(line["versions"] == [[1, 0]] for line in lines if "ids" in line)


def test_a_server_killed_while_it_writes_costs_nothing_but_time(
    fleet: Writers, weights: dict[str, torch.Tensor], expected: dict[int, list[int]]
) -> None:
    """Its requests are written by the other, the same tokens; it comes back with the next refit."""
    generator = fleet.generator(0, 1, slots=4)
    found = []
    for rollout in generator.generate(requests(24), LONG, never):
        if not found:
            fleet.kill(1)
        found.append(rollout)
    assert tokens(found) == expected
    assert len(found) == 24
    assert generator.resent > 0
    generator.load_weights(iter(weights.items()), version=1)  # by the one that is left
    fleet.start(1)
    generator.load_weights(iter(weights.items()), version=2)
    fleet.kill(0)  # the one that came back holds the weights
    rollouts = list(generator.generate(requests(8), Sampling(8), never))
    assert all(bool((rollout.policy_version == 2).all()) for rollout in rollouts)
    fresh = HFGenerator(fleet.model, eos_ids=())
    fresh.load_weights(iter(weights.items()), version=0)
    assert tokens(rollouts) == tokens(list(fresh.generate(requests(8), Sampling(8), never)))
    wrong = sum(int((rollout.policy_version != 2).sum()) for rollout in rollouts)
    record("R12", "tokens with a wrong version after a server died and came back", str(wrong))
    fleet.start(0)
    generator.close()


def test_a_server_killed_while_weights_are_on_their_way(fleet: Writers, weights: dict[str, torch.Tensor]) -> None:
    generator = fleet.generator(0, 1)

    def killing() -> Iterator[tuple[str, torch.Tensor]]:
        for number, item in enumerate(weights.items()):
            if number == 3:
                fleet.kill(1)
            yield item

    generator.load_weights(killing(), version=1)
    assert generator.version == 1
    rollouts = list(generator.generate(requests(4), Sampling(8), never))
    assert all(bool((rollout.policy_version == 1).all()) for rollout in rollouts)
    alone = fleet.generator(0)
    fleet.kill(0)
    with pytest.raises(ServerGone):
        alone.load_weights(iter(weights.items()), version=1)
    assert alone.version == -1
    with pytest.raises(RuntimeError, match="refuses"):
        list(alone.generate(requests(1), Sampling(4), never))
    with pytest.raises(ServerGone, match="no server is left"):
        list(generator.generate(requests(1), Sampling(4), never))
    fleet.start(0, 1)
    for one in (generator, alone):
        one.close()


def test_a_server_that_hangs_is_given_up(fleet: Writers, expected: dict[int, list[int]]) -> None:
    generator = fleet.generator(0, 1, slots=4, silence=4.0)
    found = []
    try:
        for rollout in generator.generate(requests(24), LONG, never):
            if not found:
                fleet.signal(1, signal.SIGSTOP)
            found.append(rollout)
    finally:
        fleet.signal(1, signal.SIGCONT)
    assert tokens(found) == expected
    generator.close()


def test_a_stop_request_is_heard_while_nothing_finishes(fleet: Writers) -> None:
    generator = fleet.generator(0)
    begin = time.monotonic()
    rollouts = generator.generate(requests(24), LONG, lambda: time.monotonic() > begin + 0.2)
    assert len(list(rollouts)) < 24
    deadline = time.monotonic() + 20
    while health(fleet, 0)["running"] and time.monotonic() < deadline:
        time.sleep(0.05)
    assert health(fleet, 0)["running"] == 0, "the server goes on writing what nobody waits for"
    generator.close()


def health(fleet: Writers, number: int) -> dict[str, int]:
    answer = httpx.get(f"{fleet.url(number)}/health", headers={"authorization": f"Bearer {KEY}"}, timeout=30)
    return dict(answer.json())


def test_a_successor_takes_the_servers_and_the_predecessor_is_refused(
    fleet: Writers, weights: dict[str, torch.Tensor]
) -> None:
    first = fleet.generator(0)
    first.load_weights(iter(weights.items()), version=7)
    second = fleet.generator(0)
    with pytest.raises(ServerRefused, match="another session"):
        list(first.generate(requests(1), Sampling(4), never))
    with pytest.raises(ServerRefused, match="another session"):
        first.load_weights(iter(weights.items()), version=8)
    (rollout,) = second.generate(requests(1), Sampling(4), never)
    assert rollout.policy_version.tolist() == [-1] * 4
    for one in (first, second):
        one.close()


def test_weights_that_are_not_what_they_should_be_change_nothing(
    fleet: Writers, weights: dict[str, torch.Tensor], expected: dict[int, list[int]], tmp_path: Path
) -> None:
    """Each folder is refused before the old weights are touched: the server goes on writing with these."""
    generator = fleet.generator(0)
    session = generator._servers.session
    fine, flipped, half, other = (fleet.scratch / name for name in ("fine", "flipped", "half", "other"))
    write_folder(weights.items(), fine, version=1)
    shutil.copytree(fine, flipped)
    damage(flipped / "model-00001.safetensors")
    shutil.copytree(fine, half)
    (half / "manifest.json").unlink()
    write_folder(list(weights.items())[1:], other, version=1)
    outside = tmp_path / "outside"
    shutil.copytree(fine, outside)
    (fleet.scratch / "link").symlink_to(outside)
    for name in ("flipped", "half", "other", "link", "../fine", str(outside), "absent"):
        assert post(fleet, "/refit", {"session": session, "version": 1, "name": name}) == 400, name
    assert post(fleet, "/refit", {"session": session, "version": 2, "name": "fine"}) == 400  # the folder says 1
    assert post(fleet, "/refit", {"session": "another", "version": 1, "name": "fine"}) == 409
    assert tokens(list(generator.generate(requests(24), LONG, never))) == expected
    record("R12", "sets of weights that were damaged, half, another's or outside: taken by a server", "0 / 9")
    assert post(fleet, "/refit", {"session": session, "version": 1, "name": "fine"}) == 200
    assert post(fleet, "/refit", {"session": session, "version": 1, "name": "fine"}) == 409  # versions only grow
    generator.close()


def damage(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)


def post(fleet: Writers, path: str, values: object, key: str = KEY) -> int:
    headers = {"authorization": f"Bearer {key}"}
    return httpx.post(f"{fleet.url(0)}{path}", json=values, headers=headers, timeout=60).status_code


def test_only_our_routes_exist_and_all_want_the_key(fleet: Writers) -> None:
    assert httpx.get(f"{fleet.url(0)}/health").status_code == 401
    for path in ("/attach", "/generate", "/refit", "/transfer", "/sleep"):
        assert httpx.post(f"{fleet.url(0)}{path}", json={}).status_code == 401
        assert post(fleet, path, {}, key="another") == 401
        assert post(fleet, path, {}) == 400
    for path in (
        "/",
        "/docs",
        "/openapi.json",
        "/v1/models",
        "/v1/completions",
        "/collective_rpc",
        "/wake_up",
        "/score",
        "/metrics",
    ):
        assert post(fleet, path, {}) == 404, path
    for values in ([], {"session": 1}, "text", {"requests": [[]]}):
        assert post(fleet, "/generate", values) == 400


def test_a_server_of_another_model_is_refused(fleet: Writers, tmp_path: Path) -> None:
    model = tiny_checkpoint(tmp_path, vocab_size=48, head_dim=32)
    servers = Servers([fleet.url(0)], "session of another", fleet.scratch, KEY)
    with pytest.raises(ValueError, match="vocabulary of 40; expected the student's 48"):
        VLLMGenerator(servers, model)
    with pytest.raises(ServerRefused, match="key"):
        VLLMGenerator(replace(servers, key="another"), fleet.model)


def test_servers_end_with_the_process_that_started_them(fleet: Writers) -> None:
    """Last: it ends them."""
    pids = [fleet.local.process(name).pid for name in ("0", "1")]
    fleet.close()
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


class Keeper:
    """Keeps a copy (by hard links) of the set of weights that comes to lie in a folder of weights."""

    def __init__(self, weights_dir: Path, kept: Path) -> None:
        self._known, self._dir, self._kept = set(weights_dir.glob("version-*")), weights_dir, kept
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look)
        self._thread.start()

    def _look(self) -> None:
        while not self._over.wait(0.001):
            for folder in set(self._dir.glob("version-*")) - self._known:
                if (folder / "manifest.json").exists():
                    shutil.copytree(folder, self._kept, copy_function=os.link)
                    return

    def end(self) -> None:
        self._over.set()
        self._thread.join()


def generate_message(session: str, some: list[GenerateRequest]) -> dict[str, object]:
    """As `VLLMGenerator` sends it."""
    wire = tuple(WireRequest(r.prompt.index, r.prompt.token_ids, (), r.seed, LONG.max_new_tokens) for r in some)
    return Generate(wire, session, WireSampling.of(LONG), ()).to_dict()
