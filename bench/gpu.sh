#!/usr/bin/env bash
# What only a GPU can show, on a bare machine: bench/gpu.py, which says the rest (bench/gpu.sh --help). PYTHON=... chooses the interpreter.
cd "$(dirname "$0")/.." && PYTHONPATH=.types exec "${PYTHON:-python3}" bench/gpu.py "$@"
