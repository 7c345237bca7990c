#!/usr/bin/env bash
# The engine's fuzzer for 64-bit ARM, under QEMU where this machine is another: tools/neon.sh [ROUNDS [SEED]]
# Needs aarch64-linux-gnu-g++ and qemu-aarch64-static (Debian: g++-aarch64-linux-gnu, qemu-user-static).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
mkdir -p build/neon
find csrc/bpe tests/tokenizer/cpp -name '*.cpp' -print0 | xargs -0 -n 1 -P 2 bash -c '
    aarch64-linux-gnu-g++ -std=c++20 -O1 -Wall -Wextra -Werror -Icsrc -c "$0" -o "build/neon/$(basename "$0" .cpp).o"'
aarch64-linux-gnu-g++ -static -pthread build/neon/*.o -o build/neon/fuzz
qemu-aarch64-static build/neon/fuzz "${1:-20}" "${2:-1}"
