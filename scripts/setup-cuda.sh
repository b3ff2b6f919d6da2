#!/usr/bin/env bash
# Installs nvcc 13.0 and the CUTLASS headers from PyPI: no GPU, no root, no system CUDA. Idempotent.
#
#   eval "$(scripts/setup-cuda.sh)"        # into target/cuda
#   eval "$(scripts/setup-cuda.sh DIR)"    # into DIR
#
# Prints the two exports that `cargo build --features cuda` reads. A system toolkit does as well:
# CUDA_HOME=/usr/local/cuda, and CUTLASS_HOME= a checkout of CUTLASS 4.2 or newer.
set -euo pipefail
cd "$(dirname "$0")/.."

venv="${1:-target/cuda}"
packages=(
    nvidia-cuda-nvcc==13.0.88 nvidia-nvvm==13.0.88 nvidia-cuda-crt==13.0.88 nvidia-cuda-runtime==13.0.96
    nvidia-cuda-cccl==13.0.85 nvidia-cutlass==4.2.0.0 nvidia-cuda-cuobjdump==13.2.86
    nvidia-cuda-nvdisasm==13.2.86
)

command -v python3 >/dev/null || { echo "setup-cuda.sh: python3 with venv is needed" >&2; exit 1; }
[ -x "$venv/bin/pip" ] || python3 -m venv "$venv" >&2
venv="$(cd "$venv" && pwd)"
stamp="$venv/installed"
if [ "$(cat "$stamp" 2>/dev/null)" != "${packages[*]}" ]; then
    # Without --no-deps pip would add the newest runtime beside the one that matches the compiler.
    "$venv/bin/pip" install --quiet --disable-pip-version-check --no-deps "${packages[@]}" >&2
    echo "${packages[*]}" >"$stamp"
fi
site="$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')"
ln -sfn lib "$site/nvidia/cu13/lib64"
printf 'export CUDA_HOME=%q CUTLASS_HOME=%q\n' "$site/nvidia/cu13" "$site/cutlass_library/source"
