#!/usr/bin/env bash
# The stages of `make test`, all of them or those named: tools/test.sh [STAGE...]. Stops at the first that fails.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=.venv/bin/python
# Processes share the machine's cores between them; PyTorch would take all of them in each.
workers=2
export PYTHONUNBUFFERED=1

build() {
    FASTFORMER_WERROR=1 $python setup.py --quiet build_ext --inplace --build-temp build/werror
}

lint() {
    $python -m ruff check .
    $python -m ruff format --check .
}

types() {
    $python -m mypy -p fastformer
}

unit() {
    OMP_NUM_THREADS=1 $python -m pytest -n $workers --dist worksteal tests \
        --ignore=tests/gpu --ignore=tests/downstream --ignore=tests/interpreter --ignore=tests/test_package.py
}

# The newest transformers is in .venv; its oldest supported one, with what it needs, lies beside it.
oldest() {
    bash tools/overlay.sh build/transformers-4.57.6 $python transformers==4.57.6 huggingface_hub==0.36.2 tokenizers==0.22.2
    local tests=() name
    for name in bert families losses collating; do tests+=("tests/integrations/test_$name.py"); done
    PYTHONPATH=build/transformers-4.57.6 OMP_NUM_THREADS=1 $python -m pytest -n $workers --dist worksteal "${tests[@]}"
}

# The interpreter replaces Triton's compiler when kernels are decorated, so it has a process of its own.
interpreter() {
    local folders=(tests/ops)
    [ ! -e tests/interpreter ] || folders+=(tests/interpreter)
    TRITON_INTERPRET=1 FASTFORMER_BACKEND=triton OMP_NUM_THREADS=1 \
        $python -m pytest -n $workers --dist worksteal "${folders[@]}"
}

gate() {
    $python -m tests.gate --quiet
    bash tools/triton.sh 3.6.0 $python
    # Every case on the pinned Triton; a fifth of them a target, all of them over the five, on the oldest one supported.
    $python -m tests.gate --quiet --triton 3.6.0 --share "${GATE_SHARE:-5}"
    # Gluon's names change from version to version: its kernels on the newest one too.
    bash tools/triton.sh 3.9.0 $python
    $python -m tests.gate --quiet --triton 3.9.0 --target sm_90 -k hopper/ --share "${GATE_SHARE:-3}"
}

rehearsal() {
    $python -m bench.gpu --rehearse
}

package() {
    $python -m pytest tests/test_package.py
}

title() {
    case $1 in
        build) echo "C++ build, warnings as errors" ;;
        lint) echo "ruff: lint and format" ;;
        types) echo "mypy" ;;
        unit) echo "unit tests on the CPU" ;;
        oldest) echo "Hugging Face models on transformers 4.57, the oldest supported" ;;
        interpreter) echo "kernels in Triton's interpreter, opcheck" ;;
        gate) echo "ahead-of-time compilation for five GPUs, two Tritons" ;;
        rehearsal) echo "rehearsal of make gpu" ;;
        package) echo "wheel: built, audited, installed, used" ;;
        *) echo "unknown stage $1; one of: ${all[*]}" >&2; exit 2 ;;
    esac
}

all=(build lint types unit oldest interpreter gate rehearsal package)
stages=("$@")
[ $# -gt 0 ] || stages=("${all[@]}")
current=""
trap '[ $? -eq 0 ] || echo "FAILED: ${current:-$0}" >&2' EXIT
for stage in "${stages[@]}"; do
    heading=$(title "$stage")
    current="$heading (make $stage)"
    echo
    echo "== $heading"
    started=$SECONDS
    "$stage"
    echo "-- $stage: $((SECONDS - started)) s"
done
echo
echo "All passed: ${stages[*]} (${SECONDS} s)"
