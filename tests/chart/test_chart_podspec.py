"""podSpec: whatever a pod's spec may hold, on top of the chart's own, and what may not be changed by it."""

from __future__ import annotations

import json
from typing import Any

import pytest
from kube import chart, kuberay

VALUES, MINIMAL = "ci/podspec-values.yaml", "ci/minimal-values.yaml"


def _spec(pod: str, values: str = VALUES, sets: tuple[str, ...] = ()) -> Any:
    return chart.pod_templates(chart.render(values, sets))[pod]["spec"]


def _names(items: list[Any]) -> list[str]:
    return [item["name"] for item in items]


def test_maps_are_merged_and_lists_replaced() -> None:
    spec, plain = _spec("gateway"), _spec("gateway", "ci/minimal-values.yaml")
    assert spec["schedulerName"] == "volcano"
    assert spec["serviceAccountName"] == "vault"
    assert spec["automountServiceAccountToken"] is True
    assert spec["securityContext"] == {**plain["securityContext"], "fsGroup": 2000}
    assert plain["topologySpreadConstraints"]
    assert spec["topologySpreadConstraints"] == []  # an empty list takes the chart's away
    assert spec["terminationGracePeriodSeconds"] == plain["terminationGracePeriodSeconds"]


def test_the_ray_container_stays_first_and_keeps_what_it_had() -> None:
    """KubeRay takes the first container for Ray's, whatever its name."""
    spec, plain = _spec("gateway"), _spec("gateway", "ci/minimal-values.yaml")
    assert _names(spec["containers"]) == ["ray", "log-shipper"]
    ray, before = spec["containers"][0], plain["containers"][0]
    assert ray["env"] == [*before["env"], {"name": "FIRST", "value": "1"}, {"name": "SECOND", "value": "2"}]
    assert ray["volumeMounts"][:-1] == before["volumeMounts"]
    assert _names(ray["volumeMounts"])[-1] == "certificates"
    assert ray["securityContext"] == {**before["securityContext"], "readOnlyRootFilesystem": False}
    assert ray["livenessProbe"]["failureThreshold"] == 20
    for field in ("image", "ports", "resources"):
        assert ray[field] == before[field]
    assert _names(spec["volumes"]) == [*_names(plain["volumes"]), "certificates"]


def test_the_charts_init_containers_come_first() -> None:
    spec = _spec(
        "gpu",
        "ci/minimal-values.yaml",
        (
            "replicaGroups.gpu.podSpec.initContainers[0].name=own",
            "replicaGroups.gpu.podSpec.initContainers[0].image=b:1",
        ),
    )
    assert _names(spec["initContainers"]) == ["download-weights", "own"]


@pytest.mark.parametrize("pod", ["head", "gateway", "transcriber", "gpu"])
def test_every_kind_of_pod_has_it(pod: str) -> None:
    path = {"gpu": "replicaGroups.gpu"}.get(pod, pod)
    sets = (f"{path}.podSpec.priorityClassName=speech", f"{path}.podSpec.containers[0].name=ray")
    sets += (f"{path}.podSpec.containers[0].readinessProbe.periodSeconds=7", "settings.transcription=on")
    documents = chart.render(MINIMAL, sets)
    spec = chart.pod_templates(documents)[pod]["spec"]
    assert spec["priorityClassName"] == "speech"
    assert spec["containers"][0]["readinessProbe"] == {"periodSeconds": 7}
    others = {name: item["spec"] for name, item in chart.pod_templates(documents).items() if name != pod}
    assert not any("priorityClassName" in item for item in others.values())


def test_a_claimed_gpu_is_known_to_ray() -> None:
    """No resource of the container names it, so the group says how many there are."""
    documents = chart.render(VALUES)
    spec = chart.pod_templates(documents)["gpu"]["spec"]
    assert spec["resourceClaims"] == [{"name": "gpu", "resourceClaimTemplateName": "one-h100"}]
    resources = spec["containers"][0]["resources"]
    assert resources["claims"] == [{"name": "gpu"}]
    assert not any("nvidia" in name for side in ("requests", "limits") for name in resources[side])
    groups = chart.only(documents, "RayService")["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    assert groups[1]["resources"] == {"GPU": "1", "personaplex_replica": "1"}


def test_every_field_is_one_that_the_oldest_operator_keeps() -> None:
    """An unknown one would be dropped in silence."""
    cluster = kuberay.schema("1.5.0")["properties"]["spec"]["properties"]["rayClusterConfig"]["properties"]
    known = cluster["headGroupSpec"]["properties"]["template"]["properties"]["spec"]["properties"]
    assert _fields() <= set(known)
    assert {"containers", "volumes", "resourceClaims", "schedulerName", "tolerations"} <= _fields()


def _fields() -> set[str]:
    schema = json.loads((chart.CHART / "values.schema.json").read_text())
    return set(schema["$defs"]["podSpec"]["properties"])


def _ray(pod: str, *fields: str) -> tuple[str, ...]:
    """Values that change fields of a pod's Ray container."""
    container = f"{pod}.podSpec.containers[0]"
    return (f"{container}.name=ray", *(f"{container}.{field}" for field in fields))


# What must not render, and what is said.
REFUSED = {
    "mount without volume": (
        _ray("gateway", "volumeMounts[0].name=x", "volumeMounts[0].mountPath=/x"),
        "gateway.podSpec.containers[0].volumeMounts[0]: no volume x in podSpec.volumes",
    ),
    "weights on a gateway": (
        _ray("gateway", "volumeMounts[0].name=weights", "volumeMounts[0].mountPath=/x"),
        "gateway.podSpec.containers[0].volumeMounts[0]: no volume weights in podSpec.volumes",
    ),
    "two mounts at one path": (
        _ray("gateway", "volumeMounts[0].name=tmp", "volumeMounts[0].mountPath=/tmp/"),
        "gateway.podSpec.containers[0].volumeMounts[0]: something is mounted at /tmp already",
    ),
    "mount over the weights": (
        _ray("replicaGroups.gpu", "volumeMounts[0].name=tmp", "volumeMounts[0].mountPath=/models"),
        "replicaGroups.gpu.podSpec.containers[0].volumeMounts[0]: something is mounted at /models already",
    ),
    "mount without volume before the start": (
        (
            "gateway.podSpec.initContainers[0].name=a",
            "gateway.podSpec.initContainers[0].image=b:1",
            "gateway.podSpec.initContainers[0].volumeMounts[0].name=x",
        ),
        "gateway.podSpec.initContainers[0].volumeMounts[0]: no volume x in podSpec.volumes",
    ),
    "volume of the chart's name": (
        ("gateway.podSpec.volumes[0].name=tmp", "gateway.podSpec.volumes[0].emptyDir.medium=Memory"),
        "gateway.podSpec.volumes[0]: a volume tmp is there already",
    ),
    "init container of the chart's name": (
        ("gateway.podSpec.initContainers[0].name=ray", "gateway.podSpec.initContainers[0].image=b:1"),
        "gateway.podSpec.initContainers[0]: a container ray is there already",
    ),
    "sidecar of KubeRay's name": (
        ("head.podSpec.containers[0].name=autoscaler", "head.podSpec.containers[0].image=b:1"),
        "head.podSpec.containers[0]: a container autoscaler is there already",
    ),
    "sidecar twice": (
        (
            "head.podSpec.containers[0].name=a",
            "head.podSpec.containers[0].image=b:1",
            "head.podSpec.containers[1].name=a",
            "head.podSpec.containers[1].image=b:1",
        ),
        "head.podSpec.containers[1]: a container a is there already",
    ),
    "sidecar without image": (
        ("transcriber.podSpec.containers[0].name=a",),
        "transcriber.podSpec.containers[0]: a container beside ray needs an image",
    ),
    # What podSpec may not change
    "grace of one's own": (
        ("gateway.podSpec.terminationGracePeriodSeconds=30",),
        "gateway.podSpec.terminationGracePeriodSeconds cannot be changed: timeouts.",
    ),
    "pods that start again": (
        ("replicaGroups.gpu.podSpec.restartPolicy=Always",),
        "replicaGroups.gpu.podSpec.restartPolicy cannot be changed: Ray's autoscaler needs",
    ),
    "replicas that take sockets": (
        ("replicaGroups.gpu.podSpec.readinessGates[0].conditionType=a",),
        "replicaGroups.gpu.podSpec.readinessGates cannot be changed: they keep sockets off",
    ),
    "the node's network": (
        ("head.podSpec.hostNetwork=true",),
        "head.podSpec.hostNetwork cannot be changed: no network policy covers such a pod",
    ),
    "an autoscaler without a token": (
        ("head.podSpec.automountServiceAccountToken=false",),
        "head.podSpec.automountServiceAccountToken cannot be false with autoscaler.enabled",
    ),
    "image by the back door": (
        _ray("gateway", "image=b:1"),
        "gateway.podSpec.containers[0].image cannot be changed: image and gatewayImage set it",
    ),
    "command of Ray": (
        _ray("head", "command={sleep}"),
        "head.podSpec.containers[0].command cannot be changed: KubeRay writes the command",
    ),
    "ports of Ray": (
        _ray("head", "ports[0].containerPort=1"),
        "head.podSpec.containers[0].ports cannot be changed: Services, policies and monitors",
    ),
    "hook before Ray's drain": (
        _ray("replicaGroups.gpu", "lifecycle.preStop.sleep.seconds=5"),
        "replicaGroups.gpu.podSpec.containers[0].lifecycle cannot be changed: a hook would delay or replace",
    ),
    "resources by the back door": (
        _ray("gateway", "resources.limits.cpu=1"),
        "gateway.podSpec.containers[0].resources cannot be changed but for its claims: use gateway.resources",
    ),
    "variable of the chart by the back door": (
        _ray("gateway", "env[0].name=RAY_worker_niceness"),
        "gateway.podSpec.containers[0].env[0]: RAY_worker_niceness is set by the chart",
    ),
    "variable twice by the back door": (
        ("gateway.extraEnv[0].name=A", *_ray("gateway", "env[0].name=A")),
        "gateway.podSpec.containers[0].env[0]: A is there twice",
    ),
    "misspelt field of a pod": (
        ("gateway.podSpec.scheduler=volcano",),
        "'/gateway/podSpec': additional properties 'scheduler' not allowed",
    ),
    "toleration by the back door": (
        ("gateway.podSpec.tolerations[0].key=a", "gateway.podSpec.tolerations[0].tolerationSeconds=5"),
        "gateway.podSpec.tolerations[0]: tolerationSeconds belongs to the effect NoExecute",
    ),
    "spread without a rule": (
        ("gateway.podSpec.topologySpreadConstraints[0].maxSkew=1",),
        "'/gateway/podSpec/topologySpreadConstraints/0': missing properties",
    ),
}


@pytest.mark.parametrize(("sets", "message"), REFUSED.values(), ids=list(REFUSED))
def test_what_may_not_be_changed_is_refused_with_a_reason(sets: tuple[str, ...], message: str) -> None:
    assert message in chart.refused(*sets)
