"""The wrapper's tensors: out as copies, in after checks, and their hash."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from fedclip.errors import UsageError
from fedclip.models.clip import CLIPLoRAWrapper, adapter_sha256, create_clip_model
from tests.support.models import NAMES, shaken


@pytest.fixture
def model() -> CLIPLoRAWrapper:
    return create_clip_model({"lora": {"r": 4}}, class_names=NAMES)


def test_parameters_are_copies(model: CLIPLoRAWrapper) -> None:
    state = model.get_parameters()
    for value in state.values():
        value.fill_(9.0)
    assert not any((value == 9.0).any() for value in model.get_parameters().values())
    assert {value.dtype for value in state.values()} == {torch.float32}
    assert not any(value.requires_grad for value in state.values())


@pytest.mark.parametrize("kind", ["torch", "numpy", "read-only numpy", "float64", "bfloat16"])
def test_set_parameters_takes(model: CLIPLoRAWrapper, kind: str) -> None:
    state = shaken(model)
    given: dict[str, object] = dict(state)
    if "numpy" in kind:
        arrays = {name: value.numpy() for name, value in state.items()}
        for array in arrays.values():
            array.flags.writeable = False
        given = arrays if "read" in kind else {n: a.copy() for n, a in arrays.items()}
    elif kind != "torch":
        dtype = getattr(torch, kind)
        given = {name: value.to(dtype) for name, value in state.items()}
        state = {name: value.to(dtype).float() for name, value in state.items()}
    model.set_parameters(given)
    found = model.get_parameters()
    assert all(torch.equal(found[name], value) for name, value in state.items())


def bad_states() -> Iterator[tuple[str, object, str]]:
    good = {"r": 4}
    state = shaken(create_clip_model({"lora": good}))
    first, *_, last = state
    without = {name: value for name, value in state.items() if name != last}
    yield "a missing tensor", without, f"lacks 1 tensors of this model .*{last}"
    yield "an unknown tensor", state | {"x": state[first]}, r"has 1 that this model does not train"
    other = create_clip_model({"lora": {"r": 2}}).get_parameters()
    yield "another rank", other, "the adapter has rank 2, the model rank 4"
    fc = {"r": 4, "target_modules": {"vision_encoder": ["fc1"]}}
    yield "other targets", create_clip_model({"lora": fc}).get_parameters(), "target_modules"
    yield "a wrong shape", state | {last: state[last].T}, rf"{last} has shape \[4, 128\]"
    nan = state[last].clone()
    nan[0, 0] = float("nan")
    yield "NaN", state | {last: nan}, "not finite"
    yield "too large", state | {last: state[last].double() * 1e300}, "not finite"
    yield "integers", state | {last: state[last].int()}, "floating-point"
    yield "no tensor", state | {last: [1.0]}, "is a list, not a tensor"
    yield "no mapping", list(state.values()), "expected tensors by name, got list"


@pytest.mark.parametrize(("what", "state", "message"), [*bad_states()], ids=lambda v: str(v)[:20])
def test_set_parameters_refuses(
    model: CLIPLoRAWrapper, what: str, state: object, message: str
) -> None:
    before = adapter_sha256(model.get_parameters())
    with pytest.raises(UsageError, match=message):
        model.set_parameters(state)
    assert adapter_sha256(model.get_parameters()) == before, what


def test_sha256_depends_on_names_dtypes_shapes_and_values() -> None:
    value = torch.arange(6, dtype=torch.float32)
    digests = [
        adapter_sha256(state)
        for state in (
            {"a": value},
            {"b": value},
            {"a": value.view(2, 3)},
            {"a": value.double()},
            {"a": value + 1},
            {"a": value, "b": torch.tensor(1.0)},
        )
    ]
    assert len(set(digests)) == len(digests)
    assert adapter_sha256({"b": value, "a": value}) == adapter_sha256({"a": value, "b": value})
