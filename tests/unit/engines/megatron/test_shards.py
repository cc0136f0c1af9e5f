"""Copies that saves in the background are written from."""

from __future__ import annotations

import torch

from nemo_opd.engines.megatron.shards import Copies, _alone


def test_a_copy_is_made_in_the_memory_of_the_one_before() -> None:
    copies, tensor = Copies(), torch.arange(6.0)
    first = copies.of("a", tensor)
    place = first.data_ptr()
    tensor += 1
    assert first.tolist() == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    other = copies.of("b", tensor)
    second = copies.of("a", tensor)
    assert second.data_ptr() == place != other.data_ptr()
    assert second.tolist() == other.tolist() == tensor.tolist()


def test_another_shape_or_dtype_has_memory_of_its_own() -> None:
    copies = Copies()
    places = [copies.of("a", tensor) for tensor in (torch.zeros(4), torch.zeros(2, 2), torch.zeros(4).bfloat16())]
    assert [place.shape for place in places] == [(4,), (2, 2), (4,)]
    assert len({place.data_ptr() for place in places}) == 3


def test_what_is_written_holds_nothing_else() -> None:
    whole = torch.arange(12.0).reshape(3, 4)
    assert _alone(whole) is whole
    part = _alone(whole[1:2])
    assert part.untyped_storage().nbytes() == 16
    assert part.tolist() == [[4.0, 5.0, 6.0, 7.0]]
