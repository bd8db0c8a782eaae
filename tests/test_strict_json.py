"""Strict JSON: infinite values and NaN are replaced, everything else comes back as it was."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3.strict_json import finite, read_json

LEAVES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
VALUES = st.recursive(LEAVES, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=20)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(VALUES)
def test_what_is_json_already_stays(value):
    assert finite(value) == value
    assert json.dumps(finite(value)) == json.dumps(value)


def test_numbers_that_are_not_finite_become_null_or_their_names():
    value = {"losses": [1.5, math.nan, (math.inf, 2)], "worst": -math.inf}
    assert finite(value) == {"losses": [1.5, None, [None, 2]], "worst": None}
    assert finite(value, instead=str) == {"losses": [1.5, "nan", ["inf", 2]], "worst": "-inf"}


def test_scalars_of_numpy_and_torch_and_other_keys():
    value = {1: np.int64(3), "a": np.float32(0.5), "b": np.float64("nan"), "c": torch.tensor(math.inf)}
    assert json.loads(json.dumps(finite(value), allow_nan=False)) == {"1": 3, "a": 0.5, "b": None, "c": None}


@pytest.mark.parametrize("content", [b'{"a"', b"", b"\xff{}"])
def test_a_damaged_file_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "run_info.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"run_info\.json cannot be read as JSON \(.*restore it from a copy"):
        read_json(path)
    path.write_text('{"a": [1]}')
    assert read_json(path) == {"a": [1]}
