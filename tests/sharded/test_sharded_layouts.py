"""Are the pieces of a tensor found where they are, and is what cannot be seen refused by name?"""

from __future__ import annotations

import itertools

import pytest
import torch
from sharded_cases import refusal_case
from torch import nn

from pylo_integrations import ShardingError, SmallFCLOpt
from pylo_integrations.sharding.pieces import FlatSlice, Held, Piece, locate, span_boxes

SHAPES = [(7,), (1,), (3, 4), (4, 1), (1, 5), (2, 3, 4), (2, 1, 3), (2, 3, 2, 2)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_run_of_elements_is_a_few_boxes_in_order(shape):
    indices = torch.arange(torch.Size(shape).numel())
    whole = indices.view(shape)
    origin = (0,) * len(shape)
    for start, stop in itertools.combinations_with_replacement(range(len(indices) + 1), 2):
        boxes = list(span_boxes(shape, start, stop))
        assert len(boxes) <= 2 * len(shape) - 1
        found = [whole[box.slices(origin)].reshape(-1) for box in boxes]
        assert torch.equal(torch.cat([indices[:0], *found]), indices[start:stop])


def test_a_flat_slice_is_seen_as_pieces_of_its_parameter():
    whole = torch.arange(24.0).view(2, 3, 4)
    param = nn.Parameter(whole.reshape(-1)[5:19].clone())
    param._fsdp_flattened = True
    shape, held = locate(param, {param: FlatSlice("w", (2, 3, 4), 5, 2)}, 2)
    assert shape == (2, 3, 4) and held.parts == 2 and held.numel == 14
    for piece in held.pieces:
        assert torch.equal(piece.view(param.data), whole[piece.box.slices((0, 0, 0))])


def test_a_scalar_is_one_element():
    shape, held = locate(nn.Parameter(torch.tensor(3.0)), {}, 1)
    assert shape == () and held.numel == 1
    assert isinstance(held, Held) and isinstance(held.pieces[0], Piece)


def stepping(param: nn.Parameter, group=None) -> None:
    optimizer = SmallFCLOpt([param])
    if group is not None:
        optimizer.param_groups[0]["params"] = group
    for p in optimizer.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    before = [p.detach().clone() for p in optimizer.param_groups[0]["params"]]
    try:
        optimizer.step()
    finally:
        after = optimizer.param_groups[0]["params"]
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True)) and not optimizer.state


def test_an_unbound_slice_is_refused():
    param = nn.Parameter(torch.zeros(12))
    param._fsdp_flattened = True
    with pytest.raises(ShardingError, match="bind_model"):
        stepping(param)


def test_zero_partitions_are_refused():
    param = nn.Parameter(torch.zeros(0))
    param.ds_id = 0
    with pytest.raises(ShardingError, match="DeepSpeed"):
        stepping(param)
    with pytest.raises(ShardingError, match=r"flattened.*deepspeed\.attach"):
        stepping(nn.Parameter(torch.zeros(3, 4)), [nn.Parameter(torch.zeros(12))])


def test_a_partition_of_vectors_is_refused_where_a_vector_is_not():
    vectors = [nn.Parameter(torch.zeros(4)), nn.Parameter(torch.zeros(3))]
    for vector in vectors:
        vector.grad = torch.ones_like(vector)
    flat = torch.zeros(7, requires_grad=True)
    flat.grad = torch.ones(7)
    optimizer = SmallFCLOpt(vectors)
    optimizer.param_groups[0]["params"] = [flat]
    with pytest.raises(ShardingError, match="2 parameters of up to 1 axes"):
        optimizer.step()
    assert not flat.any() and not optimizer.state
    optimizer.param_groups[0]["params"] = vectors[:1]
    optimizer.step()
    assert vectors[0].all()


def test_a_vector_may_be_replaced_by_another():
    param = nn.Parameter(torch.zeros(4))
    optimizer = SmallFCLOpt([nn.Parameter(torch.zeros(3, 4)), nn.Parameter(torch.zeros(4))])
    optimizer.param_groups[0]["params"][1] = param
    param.grad = torch.ones(4)
    optimizer.step()
    assert param.abs().max() > 0


@pytest.mark.dist
@pytest.mark.parametrize(
    ("what", "remedy"),
    [
        ("fsdp1_melted", "use_orig_params=True"),
        ("fsdp1_unbound", "bind_model"),
        ("partial", "redistribute"),
        ("outside_mesh", "process_group"),
        ("odd_mesh", "process_group"),
    ],
)
def test_what_hides_whole_tensors_is_refused_on_every_rank(workers, what, remedy):
    for message in workers.run(3, refusal_case, what=what):
        assert remedy in message
