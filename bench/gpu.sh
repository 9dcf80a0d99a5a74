#!/usr/bin/env bash
# What only a GPU can show, on a bare machine: nothing is installed, each step ends within ten minutes.
#
#   bench/gpu.sh [tests | kernels | edit | all]       default all; PYTHON=... chooses the interpreter
#
# tests: everything marked gpu. kernels: the roofline. edit: whole edits at 512x512. Rows go to bench/results.csv.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
export PYTHONPATH=.types TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
step=${1:-all}
case $step in tests | kernels | edit | all) ;; *)
    echo "gpu.sh: $step is not a step; give tests, kernels, edit or all" >&2
    exit 2
    ;;
esac

if command -v nvidia-smi > /dev/null; then nvidia-smi; else echo "nvidia-smi: not found"; fi
"$PYTHON" - << 'EOF'
import importlib.metadata as metadata, platform

print("python", platform.python_version())
for name in ("torch", "triton", "diffusers", "transformers", "onnx", "onnxruntime-gpu", "tensorrt", "xformers"):
    try:
        print(name, metadata.version(name))
    except metadata.PackageNotFoundError:
        print(name, "is not installed")
import torch

print("CUDA device:", torch.cuda.get_device_name() if torch.cuda.is_available() else "none")
EOF

wanted() { [[ $step == all || $step == "$1" ]]; }

if wanted tests; then
    timeout 600 "$PYTHON" -m pytest -m gpu -q tests
fi
if wanted kernels; then
    timeout 600 "$PYTHON" bench/kernels.py --device cuda
fi
if wanted edit; then
    timeout 600 "$PYTHON" bench/edit.py --model sd15-random --device cuda --dtype bfloat16 --size 512 --edits 2 --rounds 3 \
        --backends torch,xformers,compile --skip-missing --output bench/results.csv
fi
