#!/bin/sh
# Installs the service from the folder above this script: docker/install.sh TARGET PREFIX [PART]
#   gateway  the web door, Ray's head and jobs: no torch
#   gpu      all of that and the model
#   cpu      the same with PyTorch's build for the CPU, which is gigabytes smaller
# PART is `dependencies`, which needs pyproject.toml and docker/ only, or `package`, the service itself into what the
# former made; without it both. The Dockerfile and the tests run this same script. PREFIX becomes a virtual environment
# without pip. Versions are those of docker/constraints.txt, or of the file that CONSTRAINTS names.
set -eu

target=$1 prefix=$2 part=${3:-all}
case $target in
  gateway) extras=serve,client,transcribe ;;
  gpu) extras=serve,client,model,transcribe ;;
  cpu) extras=serve,client,model,transcribe ;;
  *) echo "install.sh: no target '$target': gateway, gpu or cpu" >&2; exit 2 ;;
esac
case $part in
  all|dependencies|package) ;;
  *) echo "install.sh: no part '$part': dependencies or package" >&2; exit 2 ;;
esac

cd "$(dirname "$0")/.."
constraints=${CONSTRAINTS:-docker/constraints.txt}
install="python3 -m pip --python $prefix/bin/python --disable-pip-version-check install --quiet --no-cache-dir"

if [ "$part" != package ]; then
  python3 -m venv --without-pip "$prefix"
  if [ "$target" = cpu ]; then
    $install --no-deps --constraint "$constraints" --index-url https://download.pytorch.org/whl/cpu torch
  fi
  wanted=$(mktemp)
  python3 docker/requirements.py "$extras" > "$wanted"
  $install --constraint "$constraints" --requirement "$wanted"
  rm "$wanted"
fi
if [ "$part" != dependencies ]; then
  $install --no-deps .
  python3 -m pip --python "$prefix/bin/python" --disable-pip-version-check check
  if [ "$target" != gateway ]; then
    "$prefix/bin/python" -c 'import personaplex.kernels.numba_codec' # for this CPU; another model compiles as it starts
  fi
fi
