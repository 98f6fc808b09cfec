#!/usr/bin/env bash
# Everything that needs a GPU, in one command, from the root of a checkout: kernel parity and speed,
# conversion speed, and the real vLLM on the converted fixtures (support.json, vllm/). Results land in OUT (a folder).
#
#     benchmarks/h200.sh OUT VLLM_PYTHON [kernels] [conversion] [engine] [multi]
#
# The first three parts unless some are named (about 4, 8 and 4 minutes). `multi` is for machines
# with several GPUs: conversions on one of them and on all. Needs python3 with torch, triton, pytest,
# numpy, ml_dtypes, safetensors, click, pydantic, rich, yaml, a C compiler, and a tmpfs of 64 GB or
# more at /dev/shm for a source of 35 to 40 GB and its output; with less the source is smaller.
set -uo pipefail
out=$1 vllm=$2
shift 2
parts=" ${*:-kernels conversion engine} "
export PYTHONPATH=$PWD/schema:$PWD/kernels:$PWD/convert:$PWD/validate${PYTHONPATH:+:$PYTHONPATH}
mkdir -p "$out"
status=0

step() {
    case $parts in *" $1 "*) ;; *) return ;; esac
    echo "== $2"
    shift 2
    "$@" || { echo "FAILED: $*"; status=1; }
}

python3 hatch_build.py || status=1
# the torch and native halves of these tests run on any machine
step kernels "parity" python3 -m pytest -q -p no:cacheprovider -k "triton or gpu" \
    tests/kernels tests/convert/test_gpu.py
step kernels "kernel speed" python3 benchmarks/kernels_gpu.py --csv "$out/kernels_gpu.csv"
# first, while most of the machine's memory was never used
step conversion "conversion, fresh pages" python3 benchmarks/convert_gpu.py --gb 30 --pages fresh \
    --work /dev/shm/qconvert --devices cpu cuda:0 --algos FP8_PB_WO --csv "$out/convert_gpu.csv"
step conversion "conversion, recycled pages" python3 benchmarks/convert_gpu.py --gb 30 --rounds 2 \
    --work /dev/shm/qconvert --devices cpu cuda:0 --csv "$out/convert_gpu.csv"
step multi "several GPUs give the same bytes" python3 -m pytest -q -p no:cacheprovider \
    tests/convert/test_gpu.py -k "several or process"
step multi "conversion on all GPUs" python3 benchmarks/convert_gpu.py --gb 30 --rounds 2 \
    --work /dev/shm/qconvert --devices cuda:0 cuda --csv "$out/convert_gpu.csv"
rm -rf /dev/shm/qconvert
cp validate/qvalidate/matrix/support.json "$out"
step engine "vLLM" python3 -m qvalidate matrix --engine vllm --gpu sm_90 --python "$vllm" -j 12 \
    --data "$out/support.json" --keep "$out/vllm"
exit $status
