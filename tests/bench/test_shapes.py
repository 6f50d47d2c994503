"""The published shapes have the published numbers of parameters."""

from math import prod

import pytest

from outdraft.bench.shapes import SHAPES, Shape, find_shape
from outdraft.errors import OutdraftError
from outdraft.models import gemma4_assistant
from outdraft.models.gemma4_config import AssistantConfig
from outdraft.models.heads import head_family
from outdraft.weights.load import ExpectedTensor


def n_params(expected: dict[str, ExpectedTensor]) -> int:
    """Without what the published numbers leave out: scalars, the order of tokens, and the biases
    of routers, which are not of the type of the weights."""
    return sum(
        prod(tensor.shape)
        for name, tensor in expected.items()
        if not name.endswith(("layer_scalar", "token_ordering", "correction_bias"))
    )


def drafter_tensors(shape: Shape) -> dict[str, ExpectedTensor]:
    if isinstance(shape.drafter, AssistantConfig):
        return gemma4_assistant.expected_tensors(shape.drafter)
    if shape.drafter is shape.target:
        return head_family(shape.drafter).expected_tensors(shape.drafter)
    return shape.family.expected_tensors(shape.drafter)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_parameters_are_as_many_as_published(shape: Shape) -> None:
    assert n_params(shape.family.expected_tensors(shape.target)) == shape.n_params
    assert n_params(drafter_tensors(shape)) == shape.n_drafter_params


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_drafter_fits_its_target(shape: Shape) -> None:
    if isinstance(shape.drafter, AssistantConfig):
        gemma4_assistant.check_pair(shape.target, shape.drafter)
    else:
        assert shape.drafter.vocab_size == shape.target.vocab_size


def test_an_unknown_shape_is_refused_with_the_known_ones() -> None:
    with pytest.raises(OutdraftError) as refused:
        find_shape("gemma-4-70b")
    assert "gemma-4-e2b" in refused.value.hint
