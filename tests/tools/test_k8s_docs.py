"""What docs/kubernetes.md tells people to type and to expect exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from kube import chart, kuberay

from k8s import __main__ as tool
from k8s import crd, sizing

TEXT = (chart.ROOT / "docs" / "kubernetes.md").read_text()


def test_commands_of_the_tool_exist() -> None:
    commands = set(re.findall(r"python -m k8s (\w[\w-]*)", TEXT))
    assert {"preflight", "rollout", "smoke", "sessions"} <= commands
    (choices,) = (action.choices for action in tool._parser()._actions if action.dest == "command")
    assert commands <= set(choices)


def test_values_that_are_named_exist() -> None:
    values = yaml.safe_load((chart.CHART / "values.yaml").read_text())
    roots = "|".join(values)
    named = set(re.findall(rf"`((?:{roots})\.[\w.]+)", TEXT))
    assert len(named) > 10
    for name in named - {"replicaGroups.*.minPods"}:
        place = values
        parts = name.split(".")
        if parts[0] == "settings":
            assert parts[1] in chart_settings(), name
            continue
        for part in parts:
            assert part in place, name
            place = place[part]


def chart_settings() -> set[str]:
    schema = yaml.safe_load((chart.CHART / "values.schema.json").read_text())
    return set(schema["$defs"]["settings"]["properties"])


def test_files_that_are_named_exist() -> None:
    for name in set(re.findall(r"(?:helm/personaplex|k8s|docs)/[\w./-]+\w", TEXT)):
        if "{" not in name:
            assert (chart.ROOT / name).exists(), name


def test_the_table_of_slots_is_what_is_computed() -> None:
    rows = dict(re.findall(r"^\| `(\w+)` \| [^|]* GB \| (\d+) \|$", TEXT, re.MULTILINE))
    assert {card: int(slots) for card, slots in rows.items()} == {
        card: sizing.slots(data) for card, data in sizing.CARDS.items()
    }


def test_alerts_and_exit_codes_that_are_named_exist() -> None:
    rules = (chart.CHART / "rules" / "personaplex.yaml").read_text()
    for alert in set(re.findall(r"`(Personaplex\w+)`", TEXT)):
        assert f"alert: {alert}\n" in rules


def _blocks() -> list[str]:
    """The YAML of the document."""
    return re.findall(r"^```yaml\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)


def _values() -> list[str]:
    """Those blocks that are values of the chart."""
    return [block for block in _blocks() if not block.startswith("apiVersion")]


@pytest.mark.parametrize("block", _values(), ids=lambda block: block.split(":")[0])
def test_values_that_are_shown_render(block: str, tmp_path: Path) -> None:
    """On top of a card's values, as a reader would use them."""
    path = tmp_path / "mine.yaml"
    path.write_text(block)
    # A card is a whole one, its parts have slots of their own.
    card = [] if "gpuResource" in block else ["--set", "card=h100"]
    options = [*card, "--values", str(path)]
    done = chart.helm("template", "talk", str(chart.CHART), "-n", "speech", "--set", chart.TOKEN, *options)
    assert done.returncode == 0, done.stderr
    documents = [document for document in yaml.safe_load_all(done.stdout) if document]
    pod = chart.pod_templates(documents)["gpu"]["spec"]
    if "gke-accelerator" in block:
        assert pod["nodeSelector"] == {"cloud.google.com/gke-accelerator": "nvidia-h100-80gb"}
    elif "podSpec" in block:
        assert pod["priorityClassName"] == "speech"
        assert [item["name"] for item in pod["containers"]] == ["ray", "agent"]
    elif "gpuResource" in block:
        assert pod["containers"][0]["resources"]["limits"]["nvidia.com/mig-3g.40gb"] == "1"
    elif block.startswith("weights"):
        assert "image" in next(item for item in pod["volumes"] if item["name"] == "weights")
    else:
        kind = "HTTPRoute" if block.startswith("httpRoute") else "Ingress"
        assert chart.only(documents, kind)


def test_timeouts_of_load_balancers_are_the_longest_session() -> None:
    documents = chart.render("ci/minimal-values.yaml")
    env = chart.pod_templates(documents)["head"]["spec"]["containers"][0]["env"]
    (longest,) = (
        int(item["value"]) for item in env if item["name"] == "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S"
    )
    service = chart.only(documents, "RayService")["spec"]["serveService"]
    (policies,) = (block for block in _blocks() if block.startswith("apiVersion"))
    backend, health = yaml.safe_load_all(policies)
    assert backend["spec"]["default"]["timeoutSec"] == longest
    assert backend["spec"]["targetRef"]["name"] == service["metadata"]["name"]
    assert health["spec"]["targetRef"] == backend["spec"]["targetRef"]
    check = health["spec"]["default"]["config"]["httpHealthCheck"]
    assert check["port"] == service["spec"]["ports"][0]["port"]
    (alb,) = (block for block in _values() if "alb" in block)
    assert set(re.findall(r"timeout_seconds=(\d+)", alb)) == {str(longest)}


def test_the_secret_of_the_overlays_is_the_documents() -> None:
    (name,) = re.findall(r"create secret generic (\w+) --from-literal=token", TEXT)
    for folder in ("base", "overlays/h100"):
        service = chart.only(chart.kustomize(chart.ROOT / "k8s" / folder), "RayService")
        pod = service["spec"]["rayClusterConfig"]["workerGroupSpecs"][1]["template"]["spec"]
        (download,) = pod["initContainers"]
        (token,) = (item for item in download["env"] if item["name"] == "HF_TOKEN")
        assert token["valueFrom"]["secretKeyRef"]["name"] == name


def test_the_operator_is_installed_by_a_command_of_a_tested_release() -> None:
    (version,) = re.findall(r"helm install kuberay-operator \S+ --version (\S+) ", TEXT)
    assert version in kuberay.RELEASES


def test_floors_of_kuberay_are_those_that_preflight_knows() -> None:
    section = TEXT.split("**KubeRay.**")[1].split("\n\n")[0]
    for version in crd.FLOORS.values():
        assert version in section


def test_what_was_not_shown_says_how_to_show_it() -> None:
    section = TEXT.split("## Not shown without a cluster")[1]
    rows = re.findall(r"^\| ([^|]+) \| ([^|]+) \|$", section, re.MULTILINE)[2:]
    assert len(rows) >= 8
    assert all(command.strip() for _, command in rows)
