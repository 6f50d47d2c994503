"""The published shapes have the published numbers of parameters."""

from math import prod

import pytest

from outdraft.bench.shapes import SHAPES, Shape, find_shape
from outdraft.errors import OutdraftError
from outdraft.models import gemma4, gemma4_assistant
from outdraft.weights.load import ExpectedTensor


def n_params(expected: dict[str, ExpectedTensor]) -> int:
    """Without what the published numbers leave out: scalars, and the order of tokens."""
    return sum(
        prod(tensor.shape)
        for name, tensor in expected.items()
        if not name.endswith(("layer_scalar", "token_ordering"))
    )


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_parameters_are_as_many_as_published(shape: Shape) -> None:
    assert n_params(gemma4.expected_tensors(shape.target)) == shape.n_params
    assistant = gemma4_assistant.expected_tensors(shape.assistant)
    assert n_params(assistant) == shape.n_assistant_params


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_assistant_fits_its_target(shape: Shape) -> None:
    gemma4_assistant.check_pair(shape.target, shape.assistant)


def test_an_unknown_shape_is_refused_with_the_known_ones() -> None:
    with pytest.raises(OutdraftError) as refused:
        find_shape("gemma-4-70b")
    assert "gemma-4-e2b" in refused.value.hint
