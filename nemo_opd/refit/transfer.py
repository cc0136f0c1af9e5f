"""Moves the trainer's weights into a generator that lives in the same process."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from nemo_opd.engines.protocols import Generator, NamedTensor, Trainer
from nemo_opd.processes import Processes
from nemo_opd.refit.manifest import Manifest, TensorSpec


class RefitError(RuntimeError):
    """Some rank's generator did not take the weights. Raised on every rank; generators that failed refuse to write."""


class _Stream:
    """The trainer's weights, remembering what went by and whether it was the trainer that broke the stream off."""

    def __init__(self, weights: Iterator[NamedTensor]) -> None:
        self._weights = weights
        self.specs: list[TensorSpec] = []
        self.broke = False

    def __iter__(self) -> Iterator[NamedTensor]:
        return self

    def __next__(self) -> NamedTensor:
        try:
            name, tensor = next(self._weights)
            self.specs.append(TensorSpec.of(name, tensor))
            return name, tensor
        except StopIteration:
            raise
        except BaseException:
            self.broke = True
            raise


def refit(
    trainer: Trainer,
    generator: Generator | None,
    version: int,
    processes: Processes | None = None,
    expected: Manifest | None = None,
) -> Manifest:
    """Stream ``trainer.export_weights()`` into `generator` as policy `version`, or fail on every rank. Collective.

    A rank whose generator fails goes on taking part in the export, for the other ranks are waiting in its
    collectives; then all ranks agree on the outcome with one small gather.

    Args:
        generator: None on a rank that does not generate; it only takes part in the export.
        version: must be larger than the generator's.
        processes: the ranks that export together; None: those of the default process group.
        expected: what an earlier refit of the run moved. Other names, shapes or dtypes are refused.

    Returns:
        What was moved, with its version.

    Raises:
        RefitError: a generator failed, here (its error is the cause) or on a rank that the message names.
        Whatever the trainer's export raises, at once: its collectives cannot be completed after that.
    """
    processes = processes or Processes.current()
    stream = _Stream(trainer.export_weights())
    failure: Exception | None = None
    if generator is not None:
        try:
            generator.load_weights(expected.check(stream) if expected else stream, version)
        except Exception as error:  # whatever it is, the other ranks must hear of it before it is raised
            if stream.broke:
                raise
            failure = error
    for _ in stream:
        pass
    flags = torch.cat(processes.gather(torch.tensor([failure is not None], dtype=torch.uint8)))
    if failed := flags.nonzero().flatten().tolist():
        reason = failure if failure is not None else "see there"
        raise RefitError(f"refit to policy version {version} failed on ranks {failed}: {reason}") from failure
    return Manifest(version, tuple(stream.specs))
