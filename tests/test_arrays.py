"""Numbers from wherever they come."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from pyqe._arrays import as_array, class_labels, group_names, matrix, present, vector


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0, 1], np.int64),
        ([True, False], np.bool_),
        ([0.5, 1], np.float64),
        ((0.5, None), np.float64),
        (np.array([1], dtype=np.uint8), np.int64),
        (np.array([0.5], dtype=np.float16), np.float64),
        (np.array([0.5, None], dtype=object), np.float64),
        (torch.tensor([0.5], dtype=torch.bfloat16, requires_grad=True), np.float64),
        (torch.tensor([True]), np.bool_),
        (torch.arange(6)[::2], np.int64),
        ([], np.float64),
    ],
)
def test_three_dtypes_come_out(values: Any, expected: Any) -> None:
    assert as_array(values, "x").dtype == expected


def test_float32_keeps_its_value() -> None:
    assert vector(np.float32([0.1]), "x")[0] == float(np.float32(0.1))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (["a"], "x: expected numbers, got <U1"),
        (["0.5"], "x: expected numbers"),
        ([0.5, "1"], "x: expected numbers"),
        (np.array([0.5, "1"], dtype=object), "x: expected numbers in rows of one length, got ndarray .a string"),
        ([[1], [1, 2]], "x: expected numbers in rows of one length, got list"),
        ([1j], "x: expected numbers, got complex128"),
        ({"a": 1}, "x: expected numbers in rows of one length, got dict"),
        ([torch.tensor(0.5, requires_grad=True)], "x: expected numbers in rows of one length, got list"),
        (np.array(["2020-01-01"], dtype="datetime64[D]"), "x: expected numbers, got datetime64"),
    ],
)
def test_what_is_no_number(values: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        as_array(values, "x")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([[1.0]], r"x: expected shape \[N\], got \[1, 1\]"),
        (0.5, r"x: expected shape \[N\], got \[\]"),
        ([0.5, np.nan], r"x: expected numbers in \[0, 1\], got nan in row 1$"),
        ([0.5, None], r"x: expected numbers in \[0, 1\], got nan in row 1$"),
        ([0.5, np.inf], "got inf in row 1"),
        ([2, 0.5, -1], r"got 2.0 in row 0 \(2 such rows\)"),
        ([0.5], "x: expected 2 rows, as the other arguments have, got 1"),
    ],
)
def test_vector_names_what_is_wrong(values: Any, message: str) -> None:
    length = 2 if message.startswith("x: expected 2") else None
    with pytest.raises(ValueError, match=message):
        vector(values, "x", low=0, high=1, length=length)


def test_missing_values_go_through_where_that_is_said() -> None:
    x = vector([0.5, None, 1], "x", missing="omit")
    y = matrix([[1, 1], [1, 1], [np.nan, 1]], "y", missing="omit")
    np.testing.assert_array_equal(present(x, y, None), [True, False, False])
    with pytest.raises(ValueError, match="inf"):
        vector([np.inf], "x", missing="omit")
    with pytest.raises(ValueError, match="missing: expected 'raise' or 'omit', got 'drop'"):
        vector([1.0], "x", missing="drop")  # type: ignore[arg-type]


def test_matrix() -> None:
    with pytest.raises(ValueError, match="expected finite numbers, got inf in row 1"):
        matrix([[1, 2], [np.inf, 1]], "x")
    for wrong in ([1.0], np.zeros((2, 0)), np.zeros((1, 1, 1))):
        with pytest.raises(ValueError, match="with K > 0"):
            matrix(wrong, "x")
    assert matrix(np.zeros((0, 2)), "x").shape == (0, 2)


def test_class_labels() -> None:
    np.testing.assert_array_equal(class_labels([0.0, 2.0], "x", classes=3), [0, 2])
    for wrong, error, message in (
        ([0.5], TypeError, "got 0.5"),
        ([np.nan], TypeError, "got nan"),
        ([3], ValueError, "from 0 to 2, got 3 to 3"),
        ([-1, 0], ValueError, "got -1 to 0"),
        ([[0]], ValueError, "shape"),
    ):
        with pytest.raises(error, match=message):
            class_labels(wrong, "x", classes=3)


def test_group_names() -> None:
    names, numbers = group_names(["b", "a", "b"], "groups", length=3)
    assert (list(names), numbers.tolist()) == (["a", "b"], [1, 0, 1])
    assert group_names(np.array(["b", 1], dtype=object), "groups", length=2)[1].tolist() == [1, 0]
    with pytest.raises(ValueError, match="a group in every row"):
        group_names([1, np.nan], "groups", length=2)
    with pytest.raises(ValueError, match="expected 2 rows"):
        group_names(["a"], "groups", length=2)
