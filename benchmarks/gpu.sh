#!/usr/bin/env bash
# Builds pyqe for the GPU of this machine, proves it and measures it: bash benchmarks/gpu.sh OUT [--help]
# The interpreter is python3, or what the variable PYTHON names; it has torch, pytest, pybind11, cmake and ninja.
set -euo pipefail
exec "${PYTHON:-python3}" "$(dirname "${BASH_SOURCE[0]}")/gpu.py" "$@"
