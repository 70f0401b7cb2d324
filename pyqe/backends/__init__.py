"""Implementations of the operations, and the registry that chooses among them."""

from pyqe.backends.registry import Backend, available_backends, select, use_backend

__all__ = ["Backend", "available_backends", "select", "use_backend"]
