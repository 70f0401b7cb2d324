"""Numbers from wherever they come (lists, NumPy, torch, pandas) as float64 or int64 NumPy arrays, checked."""

from __future__ import annotations

import sys
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
Missing = Literal["raise", "omit"]
Inputs = Literal["probs", "logits"]

ABOVE_ONE = 1e-3  # by which rounding, to 16 bits or by an API, may take a probability beyond 1


def as_array(values: Any, name: str) -> NDArray[Any]:
    """An array of bool, int64 or float64 with the shape that ``values`` has. None counts as NaN.

    Args:
        values: (nested) numbers: a list, a NumPy array, a torch tensor of any dtype and device, a pandas column. The
            result may share its memory: never change it in place.
        name: of the argument, for errors.

    Raises:
        TypeError: not numbers, or rows of different length.

    Example:
        >>> as_array([1, None], "x")
        array([ 1., nan])
    """
    torch = sys.modules.get("torch")  # where nobody has imported it, nothing is a tensor
    if torch is not None and isinstance(values, torch.Tensor):
        tensor = values.detach().cpu()
        values = (tensor.double() if tensor.is_floating_point() else tensor).numpy()
    try:
        array = np.asarray(values)
        if array.dtype == object:
            if any(isinstance(value, (str, bytes)) for value in array.ravel()):
                raise TypeError("a string among them")
            array = array.astype(np.float64)
    except (TypeError, ValueError, RuntimeError) as error:  # the last: a tensor with a gradient in a list
        raise TypeError(
            f"{name}: expected numbers in rows of one length, got {type(values).__name__} ({error})"
        ) from None
    if array.dtype == bool:
        return array
    if array.dtype.kind in "iu":
        return array.astype(np.int64, copy=False)
    if array.dtype.kind == "f":
        return array.astype(np.float64, copy=False)
    raise TypeError(f"{name}: expected numbers, got {array.dtype}")


def vector(
    values: Any,
    name: str,
    *,
    low: float = -np.inf,
    high: float = np.inf,
    length: int | None = None,
    missing: Missing = "raise",
) -> Floats:
    """float64 [N] of finite numbers in [low, high].

    Args:
        values: as for :func:`as_array`.
        name: of the argument, for errors.
        low: smallest number that is allowed.
        high: largest one.
        length: N, where another argument fixes it.
        missing: "raise": NaN is an error; "omit": NaN is let through, for the caller to leave out (:func:`present`).

    Raises:
        TypeError: not numbers.
        ValueError: wrong shape or range, NaN or infinite; names the first such row.
    """
    _check_missing(missing)
    array = as_array(values, name).astype(np.float64, copy=False)
    if array.ndim != 1:
        raise ValueError(f"{name}: expected shape [N], got {list(array.shape)}")
    _check_length(array, name, length)
    _check_range(array, name, low, high, missing)
    return array


def present(*arrays: Floats | None) -> NDArray[np.bool_]:
    """bool [N]: rows without a NaN in any of the arrays [N] or [N, K]; None stands for an argument not given."""
    given = [array for array in arrays if array is not None]
    rows = np.ones(len(given[0]), dtype=bool)
    for array in given:
        rows &= ~np.isnan(array).any(axis=tuple(range(1, array.ndim)))
    return rows


def matrix(values: Any, name: str, *, low: float = -np.inf, high: float = np.inf, missing: Missing = "raise") -> Floats:
    """float64 [N, K] with K > 0 of finite numbers in [low, high]; as :func:`vector`, whose arguments these are."""
    _check_missing(missing)
    array = as_array(values, name).astype(np.float64, copy=False)
    if array.ndim != 2 or array.shape[1] == 0:
        raise ValueError(f"{name}: expected shape [N, K] with K > 0, got {list(array.shape)}")
    _check_range(array, name, low, high, missing)
    return array


def class_labels(values: Any, name: str, *, classes: int, length: int | None = None) -> Integers:
    """int64 [N] of class numbers from 0 to ``classes`` - 1; whole numbers in a float dtype will do.

    Raises:
        TypeError: not whole numbers.
        ValueError: wrong shape or range.
    """
    array = as_array(values, name)
    if array.ndim != 1:
        raise ValueError(f"{name}: expected shape [N], got {list(array.shape)}")
    _check_length(array, name, length)
    if array.dtype.kind == "f" and not (array == np.floor(array)).all():
        raise TypeError(f"{name}: expected class numbers, got {array[array != np.floor(array)][0]}")
    if array.size and not (array.min() >= 0 and array.max() < classes):
        raise ValueError(f"{name}: expected numbers from 0 to {classes - 1}, got {array.min():g} to {array.max():g}")
    return array.astype(np.int64)


def group_names(values: Any, name: str, *, length: int) -> tuple[NDArray[Any], Integers]:
    """The distinct groups, sorted, and the number of each row's group, int64 [N].

    Args:
        values: [N], strings or numbers.
        name: of the argument, for errors.
        length: N.

    Raises:
        ValueError: wrong shape, or NaN.
    """
    array = np.asarray(values)
    if array.ndim != 1:
        raise ValueError(f"{name}: expected shape [N], got {list(array.shape)}")
    _check_length(array, name, length)
    if array.dtype == object:
        array = array.astype(str)
    if array.dtype.kind == "f" and np.isnan(array).any():
        raise ValueError(f"{name}: expected a group in every row, got nan")
    names, numbers = np.unique(array, return_inverse=True)
    return names, numbers.astype(np.int64, copy=False)


def _check_missing(missing: str) -> None:
    if missing not in ("raise", "omit"):
        raise ValueError(f"missing: expected 'raise' or 'omit', got {missing!r}")


def _check_range(array: Floats, name: str, low: float, high: float, missing: Missing) -> None:
    wrong = ~(np.isfinite(array) & (array >= low) & (array <= high))
    if missing == "omit":
        wrong &= ~np.isnan(array)
    if wrong.any():
        allowed = "finite numbers" if np.isinf([low, high]).all() else f"numbers in [{low:g}, {high:g}]"
        rows = np.flatnonzero(wrong.reshape(len(array), -1).any(axis=1))
        more = f" ({len(rows)} such rows)" if len(rows) > 1 else ""
        raise ValueError(f"{name}: expected {allowed}, got {array[wrong][0]} in row {rows[0]}{more}")


def _check_length(array: NDArray[Any], name: str, length: int | None) -> None:
    if length is not None and len(array) != length:
        raise ValueError(f"{name}: expected {length} rows, as the other arguments have, got {len(array)}")
