#!/usr/bin/env bash
# Everything that needs a GPU, in one command, from the root of a checkout: kernel parity and speed,
# conversion speed, and the real vLLM on the converted fixtures. Results land in OUT (a folder).
#
#     benchmarks/h200.sh OUT VLLM_PYTHON
#
# Needs python3 with torch, triton, pytest, numpy, ml_dtypes, safetensors, click, pydantic, rich, yaml,
# a C compiler, and 40 GB of memory for the 16 GB checkpoint in /dev/shm.
set -uo pipefail
out=$1 vllm=$2
export PYTHONPATH=$PWD/schema:$PWD/kernels:$PWD/convert:$PWD/validate${PYTHONPATH:+:$PYTHONPATH}
mkdir -p "$out"
status=0

step() {
    echo "== $1"
    shift
    "$@" || { echo "FAILED: $*"; status=1; }
}

step "native kernels" python3 hatch_build.py
step "kernel parity" python3 -m pytest -q -p no:cacheprovider tests/kernels tests/convert/test_gpu.py
step "kernel speed" python3 benchmarks/kernels_gpu.py --csv "$out/kernels_gpu.csv"
step "conversion" python3 benchmarks/convert_gpu.py --work /dev/shm/qconvert --csv "$out/convert_gpu.csv"
rm -rf /dev/shm/qconvert
step "vLLM" python3 validate/evidence/collect.py "$out" --python "$vllm" --device cpu -j 10
exit $status
