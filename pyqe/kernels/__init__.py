"""Triton kernels, one family a file; :mod:`pyqe.backends.triton` offers them as operations.

Importing a file of this package imports Triton. With ``TRITON_INTERPRET=1`` set before that, the kernels run on CPU
tensors in Triton's interpreter, slowly, for tests.
"""
