"""The images: the Dockerfile is sound, its context is minimal, and its install steps work elsewhere."""

from __future__ import annotations

import fnmatch
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml
from closure import furnish, needed
from kube import chart
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from deployments.settings import Settings
from personaplex import server

ROOT = chart.ROOT
DOCKERFILE = (ROOT / "Dockerfile").read_text()
INSTRUCTIONS = re.findall(r"^([A-Z]+) (.*)$", re.sub(r"\\\n\s*", "", DOCKERFILE), re.MULTILINE)


def _stages() -> dict[str, list[tuple[str, str]]]:
    """Stage -> its instructions."""
    found: dict[str, list[tuple[str, str]]] = {}
    name = ""
    for instruction, rest in INSTRUCTIONS:
        if instruction == "FROM":
            base, _, name = rest.partition(" AS ")
            found[name] = [("FROM", base)]
        elif name:
            found[name].append((instruction, rest))
    return found


def _copied() -> list[str]:
    """What the Dockerfile takes from the build context."""
    copies = [
        rest.split() for instruction, rest in INSTRUCTIONS if instruction == "COPY" and "--from" not in rest
    ]
    return [source for words in copies for source in words[:-1]]


def _admitted(path: str) -> bool:
    """Whether .dockerignore lets a path into the context; the last pattern that matches decides."""
    admitted = True
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        pattern = line.strip().removeprefix("!")
        if not pattern or pattern.startswith("#"):
            continue
        names = ["/".join(path.split("/")[:depth]) for depth in range(1, path.count("/") + 2)]
        loose = pattern.removeprefix("**/")
        hit = any(
            fnmatch.fnmatchcase(name, pattern) or (loose != pattern and Path(name).match(loose))
            for name in names
        )
        if hit:
            admitted = line.strip().startswith("!")
    return admitted


def _files() -> list[str]:
    """What is or may become part of the repository."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return [path for path in done.stdout.splitlines() if (ROOT / path).is_file()]


def test_hadolint_finds_nothing() -> None:
    hadolint = Path(sys.executable).parent / "hadolint"
    done = subprocess.run([hadolint, "Dockerfile"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_bases_are_pinned_by_digest() -> None:
    (image,) = re.findall(r"^ARG PYTHON_IMAGE=(\S+)$", DOCKERFILE, re.MULTILINE)
    assert re.fullmatch(r"python:3\.\d+-slim-\w+@sha256:[0-9a-f]{64}", image)
    stages = _stages()
    for name, instructions in stages.items():
        assert instructions[0][1] in {"${PYTHON_IMAGE}", *stages}, name


@pytest.mark.parametrize("target", ["gateway", "gpu", "cpu"])
def test_images_run_as_an_ordinary_user_and_say_how_they_are(target: str) -> None:
    stage = dict(_stages()[target])
    user = re.match(r"\d+", stage["USER"])
    assert user is not None
    assert (
        int(user[0])
        == chart.pod_templates(chart.render("values-dev.yaml"))["head"]["spec"]["securityContext"][
            "runAsUser"
        ]
    )
    assert "HEALTHCHECK" in stage
    runtime = " ".join(rest for _, rest in _stages()["runtime"])
    assert {"bash", "libopus0", "wget"} <= set(runtime.split())


def test_build_tools_stay_out() -> None:
    """Packages come from stages that are thrown away; the one compiler is Triton's, in the GPU image."""
    installed = {
        name: {word for instruction, rest in stage if instruction == "RUN" for word in rest.split()}
        for name, stage in _stages().items()
    }
    tools = {"gcc", "g++", "make", "build-essential", "git", "curl", "libc6-dev"}
    assert not (installed["runtime"] | installed["gateway"] | installed["cpu"]) & tools
    assert installed["gpu"] & tools == {"gcc", "libc6-dev"}


@pytest.mark.parametrize("target", ["gateway", "gpu", "cpu"])
def test_a_change_of_the_source_adds_one_small_layer(target: str) -> None:
    """Gigabytes of wheels are a layer of their own, made from nothing that changes daily; ours is last."""
    stages = _stages()
    steps = [(instruction, rest) for instruction, rest in stages[target] if instruction in ("COPY", "RUN")]
    dependencies, package = steps[-2:]
    assert dependencies == ("COPY", f"--from={target}-dependencies /opt/personaplex /opt/personaplex")
    assert package[0] == "RUN"
    assert package[1].endswith(f"docker/install.sh {target} /opt/personaplex package")
    assert stages[f"{target}-dependencies"] == [
        ("FROM", "dependencies"),
        ("RUN", f"docker/install.sh {target} /opt/personaplex dependencies"),
    ]
    before = {word for step, rest in stages["dependencies"] if step == "COPY" for word in rest.split()[:-1]}
    assert all(path == "pyproject.toml" or path.startswith("docker/") for path in before)


def _pins() -> dict[str, str]:
    """Package -> version in docker/constraints.txt."""
    lines = (ROOT / "docker/constraints.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def test_whatever_the_project_asks_for_is_pinned() -> None:
    """And to a version that it allows: what floats in pyproject.toml must not float in an image."""
    pins = _pins()
    program = [sys.executable, "docker/requirements.py", "serve,client,model"]
    done = subprocess.run(program, cwd=ROOT, capture_output=True, text=True, check=True)
    for requirement in map(Requirement, done.stdout.splitlines()):
        assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)]), requirement


def test_the_driver_that_nodes_need_follows_from_the_pinned_torch() -> None:
    text = (ROOT / "docs/kubernetes.md").read_text()
    rows = re.findall(r"^\| (2\.\d+) to (2\.\d+) \| (\d+)\.\d+ \| (\d+) \|", text, re.MULTILINE)
    minor = int(_pins()["torch"].split(".")[1])
    (driver,) = (
        driver
        for first, last, _, driver in rows
        if int(first.split(".")[1]) <= minor <= int(last.split(".")[1])
    )
    described = yaml.safe_load((chart.CHART / "Chart.yaml").read_text())
    assert described["annotations"]["personaplex.io/gpu-driver"] == driver
    service = chart.only(chart.render("ci/minimal-values.yaml"), "RayService")
    assert service["metadata"]["annotations"]["personaplex.io/gpu-driver"] == driver


def test_the_context_holds_what_is_copied_and_nothing_else() -> None:
    copied = _copied()
    for source in copied:
        assert list(ROOT.glob(source)), f"{source} is not there"
    for path in _files():
        wanted = any(
            path == source or path.startswith(f"{source}/") or fnmatch.fnmatch(path, source)
            for source in copied
        )
        assert _admitted(path) is wanted, path
    for path in (".venv/bin/python", ".git/config", "personaplex/__pycache__/x.pyc", ".cache/tools/helm"):
        assert not _admitted(path), path


def test_the_chart_and_the_package_agree_on_versions() -> None:
    (version,) = re.findall(r'^version = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    described = yaml.safe_load((chart.CHART / "Chart.yaml").read_text())
    values = yaml.safe_load((chart.CHART / "values.yaml").read_text())
    assert described["appVersion"] == version
    assert values["rayVersion"] == ray.__version__
    for service in _compose()["services"].values():
        assert service["image"].endswith(f":{version}")


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The gateway image's /opt/personaplex, from the same script over the same files; packages are linked."""
    source, prefix = tmp_path_factory.mktemp("src"), tmp_path_factory.mktemp("opt") / "personaplex"
    for path in _files():
        if _admitted(path):
            (source / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / path, source / path)
    environment = {
        name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")
    }
    environment |= {
        "PIP_NO_COMPILE": "1",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    furnish(prefix, {"serve", "client"})
    here = source / "here.txt"  # versions of this environment, so that nothing is fetched
    here.write_text("".join(f"{name}=={one.version}\n" for name, one in needed({"serve", "client"}).items()))
    environment["CONSTRAINTS"] = str(here)
    command = ["sh", "docker/install.sh", "gateway", str(prefix)]
    done = subprocess.run(command, cwd=source, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return prefix


def _run(prefix: Path, *arguments: str) -> str:
    """A command in the installed image, away from the repository."""
    environment = {
        "PATH": f"{prefix}/bin:/usr/bin:/bin",
        "HOME": str(prefix.parent),
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    done = subprocess.run(
        [f"{prefix}/bin/{arguments[0]}", *arguments[1:]],
        cwd=prefix.parent,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_gateway_image_holds_no_torch_and_can_be_a_gateway(installed: Path) -> None:
    program = (
        "import importlib.util, sys\n"
        "import deployments.application, deployments.gateway.app, personaplex.client, personaplex.server\n"
        "from deployments.gateway.app import PAGE\n"
        "assert importlib.util.find_spec('torch') is None\n"
        "assert (PAGE / 'index.html').is_file()\n"
        "print(sys.modules['deployments'].__file__)\n"
    )
    assert str(installed) in _run(installed, "python", "-c", program)


def test_commands_of_the_chart_and_of_kuberay_are_there(installed: Path) -> None:
    assert ray.__version__ in _run(installed, "ray", "--version")
    assert "kuberay" in _run(installed, "ray", "kuberay-autoscaler", "--help").lower()
    assert "usage: python -m k8s.conversation" in _run(
        installed, "python", "-m", "k8s.conversation", "--help"
    )
    assert not (installed / "bin" / "pip").exists()


def test_modules_the_chart_starts_are_in_the_package() -> None:
    modules = {
        container["command"][2]
        for values in ("ci/everything-values.yaml", "ci/minimal-values.yaml")
        for template in chart.pod_templates(chart.render(values)).values()
        for container in [*template["spec"].get("initContainers", []), *template["spec"]["containers"]]
        if container.get("command", [""])[0] == "python"
    }
    assert modules == {"k8s.conversation", "k8s.fetch_weights"}
    for module in modules:
        assert (ROOT / f"{module.replace('.', '/')}.py").is_file()


def test_extras_of_each_target_exist() -> None:
    """The GPU target adds the model to the gateway; together they are what runs the service, on a CPU too."""
    script = (ROOT / "docker/install.sh").read_text()
    targets = {
        name: set(extras.split(",")) for name, extras in re.findall(r"(\w+)\) extras=([\w,]+)", script)
    }
    assert targets["gpu"] - targets["gateway"] == {"model"}
    assert targets["cpu"] == targets["gpu"]
    declared = re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert set().union(*targets.values()) <= set(declared)


def test_install_refuses_an_unknown_target(tmp_path: Path) -> None:
    script = ROOT / "docker/install.sh"
    done = subprocess.run(["sh", script, "tpu", tmp_path], capture_output=True, text=True)
    assert done.returncode == 2
    assert "no target 'tpu'" in done.stderr
    done = subprocess.run(["sh", script, "gpu", tmp_path, "half"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "no part 'half'" in done.stderr


def _asked(folder: Path, *arguments: str) -> list[str]:
    """What install.sh asks of pip, in order, with a python3 that only writes it down."""
    log, python = folder / "log", folder / "python3"
    python.write_text(
        f'#!/bin/sh\n[ "$1" = docker/requirements.py ] && exec {sys.executable} "$@"\n'
        f'echo "$@" >> {log}\nfor last; do :; done\n[ ! -f "$last" ] || cat "$last" >> {log}\n'
    )
    python.chmod(0o755)
    environment = {"PATH": f"{folder}:/usr/bin:/bin", "CONSTRAINTS": "pins.txt"}
    command = ["sh", ROOT / "docker/install.sh", *arguments]
    subprocess.run(command, env=environment, cwd=folder, check=True)
    return log.read_text().splitlines()


def test_the_cpu_image_takes_torch_without_cuda(tmp_path: Path) -> None:
    venv, torch, rest, *names = _asked(tmp_path, "cpu", "/opt/x", "dependencies")
    assert venv == "-m venv --without-pip /opt/x"
    assert torch.endswith(
        "--no-deps --constraint pins.txt --index-url https://download.pytorch.org/whl/cpu torch"
    )
    assert "--constraint pins.txt --requirement" in rest
    assert any(name.startswith("torch>=") for name in names)
    (tmp_path / "log").unlink()
    assert not any("--index-url" in line for line in _asked(tmp_path, "gpu", "/opt/x", "dependencies"))


def test_the_package_is_installed_apart_from_its_dependencies(tmp_path: Path) -> None:
    package, check = _asked(tmp_path, "gateway", "/opt/x", "package")
    assert package.endswith("--no-deps .")
    assert check.endswith(" check")


def _compose() -> Any:
    return yaml.safe_load((ROOT / "docker-compose.yaml").read_text())


def test_compose_serves_the_page_on_8998_and_the_gpu_by_profile() -> None:
    services = _compose()["services"]
    assert {name for name, service in services.items() if "profiles" not in service} == {"talk"}
    assert services["gpu"]["profiles"] == ["gpu"]
    assert services["gpu"]["deploy"]["resources"]["reservations"]["devices"][0]["capabilities"] == ["gpu"]
    assert services["gpu"]["build"]["target"] == "gpu"
    assert services["talk"]["build"]["target"] == "cpu"  # no gigabytes of CUDA for a toy on the CPU
    for service in services.values():
        assert service["build"]["context"] == "."
        (port,) = service["ports"]
        assert port.endswith(":8998")
        options = server._parser().parse_args(service["command"][3:])
        assert (options.host, options.port) == ("0.0.0.0", 8998)
        assert service["cap_drop"] == ["ALL"]


def test_compose_waits_for_live_sessions() -> None:
    for service in _compose()["services"].values():
        minutes = re.fullmatch(r"(\d+)m", service["stop_grace_period"])
        assert minutes is not None
        assert int(minutes[1]) * 60 > Settings.model_fields["session_limit_s"].default + 60 + 5


def test_the_operators_tool_runs_with_its_own_extra_alone() -> None:
    """`pip install .[k8s]` is all a laptop has: no torch, no Ray, but the client that `smoke` talks with."""
    allowed = set(needed({"k8s", "client"})) | {"personaplex-serve"}
    elsewhere = {
        module
        for module, owners in importlib.metadata.packages_distributions().items()
        if not {canonicalize_name(owner) for owner in owners} & allowed
    }
    assert {"torch", "ray", "pydantic_settings"} <= elsewhere
    program = (
        "import sys\n"
        "class Absent:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name in sys.argv[1:]:\n"
        "            raise ModuleNotFoundError(name, name=name)\n"
        "sys.meta_path.insert(0, Absent())\n"
        "import k8s.__main__, personaplex.client, websockets.sync.client\n"
        "k8s.__main__.main(['verify', '--help'])\n"
    )
    command = [sys.executable, "-c", program, *sorted(elsewhere)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert "usage: python -m k8s verify" in done.stdout, done.stderr
    declared = subprocess.run(
        [sys.executable, "docker/requirements.py", "k8s"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    names = {canonicalize_name(Requirement(line).name) for line in declared.stdout.splitlines()}
    assert {"websockets", "kubernetes", "pyyaml", "numpy"} <= names
