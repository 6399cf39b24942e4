#!/bin/sh
# Installs the service from the folder it is run in: docker/install.sh TARGET PREFIX
#   gateway  the web door, Ray's head and jobs: no torch
#   gpu      all of that and the model
# The Dockerfile and the tests run this same script. PREFIX becomes a virtual environment without pip.
set -eu

target=$1 prefix=$2
case $target in
  gateway) extras=serve,client ;;
  gpu) extras=serve,client,model ;;
  *) echo "install.sh: no target '$target': gateway or gpu" >&2; exit 2 ;;
esac

python3 -m venv --without-pip "$prefix"
pip="python3 -m pip --python $prefix/bin/python --disable-pip-version-check"
$pip install --quiet ".[$extras]"
$pip check
