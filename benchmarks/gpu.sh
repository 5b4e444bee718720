#!/usr/bin/env bash
# What a GPU says of FastLM: builds it for the GPU that is here, measures for less than eight minutes, and leaves one
# file, benchmarks/results/gpu/<name of the GPU>.json, with a page and charts made from it.
#
#   benchmarks/gpu.sh [--tests] [--cpu] [--out DIR] [OPTION OF fastlm bench ...]
#
#   --tests    run the tests that need a GPU first; that time is not among the eight minutes
#   --cpu      try the script itself, without a GPU: installs nothing, measures a few tiny cases on the CPU
#   --out DIR  where the results go [benchmarks/results/gpu]
#
# PYTHON says which Python; without it .venv's, if there is one, or python3. Needs NVIDIA's driver and nvcc.
set -euo pipefail
cd "$(dirname "$0")/.."

BUDGET=6    # minutes, after which no case begins
LIMIT=450   # seconds, after which the case that runs is stopped; what was measured is kept
LIGER=0.8.5

tests=false
device=cuda
out=benchmarks/results/gpu
options=()
while (($#)); do
    case $1 in
        --tests) tests=true ;;
        --cpu) device=cpu ;;
        --out) out=${2:?--out needs a folder}; shift ;;
        *) options+=("$1") ;;
    esac
    shift
done

if [[ -z ${PYTHON:-} ]]; then
    PYTHON=python3
    [[ -x .venv/bin/python ]] && PYTHON=.venv/bin/python
fi

if [[ $device == cuda ]]; then
    if ! capability=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader --id=0 2>/dev/null); then
        echo "gpu.sh: nvidia-smi finds no NVIDIA GPU here; --cpu tries the script without one" >&2
        exit 2
    fi
    export CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES:-0}
    echo "Building FastLM for compute capability $capability"
    FASTLM_BUILD=cuda TORCH_CUDA_ARCH_LIST=$capability "$PYTHON" -m pip install --quiet --editable '.[train,hf]'
    "$PYTHON" -m pip install --quiet --no-deps "liger-kernel==$LIGER" ||
        echo "liger-kernel cannot be installed: it is left out"
    "$PYTHON" -m fastlm info
    measured=(--seconds 0.5 --budget "$BUDGET")
else
    measured=(layer_norm:64x64 attention:1x2x32x16,causal cross_entropy:16x100 --dtypes fp32)
    measured+=(--seconds 0.02 --budget 1 --no-compile)
fi

if $tests; then
    if [[ $device == cuda ]]; then
        "$PYTHON" -m pip install --quiet pytest pytest-xdist hypothesis
    fi
    "$PYTHON" -m pytest -q -m gpu tests || echo "Tests failed, see above; the measurements follow"
fi

start=$SECONDS
status=0
timeout --signal=INT --kill-after=20 "$LIMIT" \
    "$PYTHON" -m fastlm bench --device "$device" --out "$out" "${measured[@]}" ${options[@]+"${options[@]}"} || status=$?
echo "Measured in $(((SECONDS - start) / 60)) min $(((SECONDS - start) % 60)) s"
if ((status != 0 && status != 124)); then
    exit "$status"
fi
echo "To send us the results, see \"Sending results from your GPU\" in CONTRIBUTING.md"
