"""What the rendered pods mean to the rest of a cluster: Services, autoscalers, disks, policies, budgets."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from kube import chart
from ray.serve import Application
from ray.serve._private.application_state import override_deployment_info
from ray.serve._private.deployment_info import DeploymentInfo
from ray.serve.schema import ServeApplicationSchema

import deployments
from deployments.settings import Settings

EVERYTHING, MINIMAL = "ci/everything-values.yaml", "ci/minimal-values.yaml"
CASES = [pytest.param(values, sets, id=values) for values, sets in chart.CASES.items()]


def _ray_pods(values: str, sets: tuple[str, ...] = ()) -> dict[str, Any]:
    """Group -> pod template of every Ray pod."""
    found = chart.pod_templates(chart.render(values, sets))
    return {
        name: pod for name, pod in found.items() if pod["spec"].get("containers", [{}])[0]["name"] == "ray"
    }


def _service(values: str, sets: tuple[str, ...] = ()) -> Any:
    return chart.only(chart.render(values, sets), "RayService")


def _endpoints(pods: dict[str, Any]) -> set[str]:
    """Groups whose pods KubeRay's Service would send sockets to.

    KubeRay puts `ray.io/serve: "true"` on every worker, whatever its template says, and lets readiness
    decide; a pod with a readiness gate that nobody sets is never Ready.
    """
    return {name for name, pod in pods.items() if name != "head" and not pod["spec"].get("readinessGates")}


@pytest.mark.parametrize(("values", "sets"), CASES)
def test_sockets_enter_through_gateways_only(values: str, sets: tuple[str, ...]) -> None:
    """A proxy on a GPU node would make its loss end sessions that are nowhere near that node."""
    pods = _ray_pods(values, sets)
    dedicated = values != "values-dev.yaml"
    assert _endpoints(pods) == ({"gateway"} if dedicated else {"gateway", "cpu"})
    assert _service(values, sets)["spec"]["excludeHeadPodFromServeSvc"] is True
    for name, pod in pods.items():  # no template pretends to a choice that KubeRay overrides
        assert not any(label.startswith("ray.io/") for label in pod["metadata"]["labels"]), name


@pytest.mark.parametrize(("values", "sets"), CASES)
def test_the_service_says_nothing_that_kuberay_drops(values: str, sets: tuple[str, ...]) -> None:
    """It rewrites the Service's ports to the name and number of the head's port `serve`, and the selector."""
    service = _service(values, sets)["spec"]["serveService"]
    (port,) = (
        port
        for port in _ray_pods(values, sets)["head"]["spec"]["containers"][0]["ports"]
        if port["name"] == "serve"
    )
    assert service["spec"] == {"ports": [{"name": "serve", "port": port["containerPort"]}]}


def test_the_type_and_annotations_of_the_service_are_ones_own() -> None:
    """And nothing else changes with them: no new Ray cluster."""
    balancer = "service.annotations.cloud\\.example/balancer=internal"
    given = ("service.type=LoadBalancer", balancer, "apiKeys.existingSecret=keys")
    before, after = (
        _service(MINIMAL, ("apiKeys.existingSecret=keys",))["spec"],
        _service(MINIMAL, given)["spec"],
    )
    service = after.pop("serveService")
    assert service["spec"] == {"type": "LoadBalancer", "ports": [{"name": "serve", "port": 8000}]}
    assert service["metadata"]["annotations"] == {"cloud.example/balancer": "internal"}
    del before["serveService"]
    assert after == before


def test_one_pod_that_may_hold_everything_takes_sockets() -> None:
    assert _endpoints(_ray_pods(MINIMAL, ("serve.dedicatedNodes=false",))) == {"gateway", "gpu"}


@pytest.mark.parametrize(("values", "sets"), CASES)
def test_node_autoscalers_leave_ray_pods_alone(values: str, sets: tuple[str, ...]) -> None:
    """The cluster autoscaler waits 600 s for a pod, a session is longer; Karpenter has its own annotation."""
    for name, pod in _ray_pods(values, sets).items():
        annotations = pod["metadata"]["annotations"]
        assert annotations["cluster-autoscaler.kubernetes.io/safe-to-evict"] == "false", name
        own = (values, name) == (EVERYTHING, "gateway")  # whose values say otherwise
        assert annotations["karpenter.sh/do-not-disrupt"] == ("false" if own else "true"), name


@pytest.mark.parametrize(("values", "sets"), CASES)
def test_every_ray_pod_asks_for_disk(values: str, sets: tuple[str, ...]) -> None:
    for name, pod in _ray_pods(values, sets).items():
        assert pod["spec"]["containers"][0]["resources"]["requests"]["ephemeral-storage"] == "4Gi", name
    given = "gateway.resources.requests.ephemeral-storage=9Gi"
    gateway = _ray_pods(MINIMAL, (given,))["gateway"]["spec"]["containers"][0]
    assert gateway["resources"]["requests"]["ephemeral-storage"] == "9Gi"


def test_the_scheduler_knows_of_the_weights_on_a_nodes_disk() -> None:
    spec = _ray_pods(MINIMAL)["gpu"]["spec"]
    (volume,) = (item for item in spec["volumes"] if item["name"] == "weights")
    (download,) = spec["initContainers"]
    assert download["resources"]["requests"]["ephemeral-storage"] == volume["emptyDir"]["sizeLimit"] == "30Gi"
    job = chart.only(chart.render(EVERYTHING), "Job")["spec"]["template"]["spec"]["containers"][0]
    assert "ephemeral-storage" not in job["resources"]["requests"]  # a claim lies elsewhere


def test_a_failed_download_says_why_in_the_pods_status() -> None:
    (download,) = _ray_pods(MINIMAL)["gpu"]["spec"]["initContainers"]
    job = chart.only(chart.render(EVERYTHING), "Job")["spec"]["template"]["spec"]["containers"][0]
    assert download["terminationMessagePolicy"] == job["terminationMessagePolicy"] == "FallbackToLogsOnError"


def test_no_timeout_ends_a_first_install_for_good() -> None:
    name = "ray.io/initializing-timeout"
    assert name not in _service(MINIMAL)["metadata"]["annotations"]
    given = _service(MINIMAL, ("timeouts.initializing=2h",))
    assert given["metadata"]["annotations"][name] == "2h"


def test_the_operator_gets_in_however_it_was_installed() -> None:
    """Its chart and its kustomization give its pod different names; the component is the same."""
    policies = {
        d["metadata"]["name"]: d["spec"] for d in chart.render(EVERYTHING) if d["kind"] == "NetworkPolicy"
    }
    (rule,) = (
        rule
        for rule in policies["talk-personaplex-ray"]["ingress"]
        if {port["port"] for port in rule.get("ports", [])} == {8265, 8000}
    )
    by_label, further = rule["from"]
    for name in ("kuberay-operator", "kuberay"):
        pod = {"app.kubernetes.io/name": name, "app.kubernetes.io/component": "kuberay-operator"}
        assert by_label["podSelector"]["matchLabels"].items() <= pod.items()
    assert by_label["namespaceSelector"] == {}
    assert further == {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "ray-system"}}}


def test_disruption_budgets_count_pods_that_can_be_ready() -> None:
    """A budget for pods that are never Ready says nothing, and one without a pod to spare blocks a drain."""
    for values in (MINIMAL, EVERYTHING):
        (budget,) = (d for d in chart.render(values) if d["kind"] == "PodDisruptionBudget")
        assert budget["spec"]["selector"]["matchLabels"]["app.kubernetes.io/component"] == "gateway"
        assert isinstance(budget["spec"]["minAvailable"], int)
        assert "maxUnavailable" not in budget["spec"]
    none = chart.render(MINIMAL, ("gateway.minPods=1",))
    assert not [d for d in none if d["kind"] == "PodDisruptionBudget"]


# In-place changes


def _surges(values: str, sets: tuple[str, ...] = ()) -> dict[str, int]:
    (application,) = yaml.safe_load(_service(values, sets)["spec"]["serveConfigV2"])["applications"]
    return {item["name"]: item["max_surge_percent"] for item in application.get("deployments", [])}


def _most(values: str, sets: tuple[str, ...] = ()) -> dict[str, int]:
    groups = _service(values, sets)["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    return {group["groupName"]: group["maxReplicas"] for group in groups}


def test_a_surge_has_room() -> None:
    """Serve rounds a share of the replicas up; what it may start at most is what the surge pods hold."""
    assert _surges(MINIMAL) == {"gateway": 25}  # of 12 gateways 3, as many as one pod holds
    assert _most(MINIMAL) == {"gateway": 5, "gpu": 4}
    assert _surges(EVERYTHING) == {"gateway": 25, "replica": 7}  # of 6 + 4 * 2 replicas 1
    assert _most(EVERYTHING) == {"gateway": 5, "gpu": 7, "spot": 4, "transcriber": 2}
    many = ("replicaGroups.gpu.maxPods=7", "replicaGroups.gpu.surgePods=3")
    percent = _surges(MINIMAL, many)["replica"]
    assert [-(-percent * count // 100) for count in range(1, 8)][-1] == 3
    assert -(-(percent + 1) * 7 // 100) > 3


def test_transcribers_have_pods_only_where_there_are_any() -> None:
    assert "transcriber" in _most(EVERYTHING)
    assert "transcriber" not in _most(MINIMAL)
    settings = yaml.safe_load(_service(EVERYTHING)["spec"]["serveConfigV2"])["applications"][0]["args"]
    assert (settings["transcribers_min"], settings["transcribers_max"]) == (3, 6)
    assert settings["transcriber_resources"] == {"personaplex_transcriber": 1}


def test_without_room_there_is_no_surge() -> None:
    """Old replicas would go on serving, and the change never end."""
    assert _surges("values-dev.yaml") == _surges("ci/static-values.yaml") == {}
    assert _surges(MINIMAL, ("gateway.surgePods=0",)) == {}


def test_room_for_a_surge_is_there_without_the_autoscaler() -> None:
    values = ("gateway.surgePods=1",)
    groups = _service("ci/static-values.yaml", values)["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    assert groups[0]["replicas"] == groups[0]["maxReplicas"] == 3
    assert _surges("ci/static-values.yaml", values) == {"gateway": 50}


def _deployments(application: Application) -> dict[str, Any]:
    """Name -> deployment of an application and of whatever it is bound to."""
    deployment = application._bound_deployment
    found = {deployment.name: deployment}
    for argument in (*deployment.init_args, *deployment.init_kwargs.values()):
        if isinstance(argument, Application):
            found |= _deployments(argument)
    return found


def test_an_override_changes_the_surge_and_nothing_else() -> None:
    """Serve makes an overridden deployment anew from its public fields: what the code set must survive."""
    (application,) = yaml.safe_load(_service(EVERYTHING)["spec"]["serveConfigV2"])["applications"]
    infos = {
        name: DeploymentInfo(
            deployment_config=deployment._deployment_config,
            replica_config=deployment._replica_config,
            start_time_ms=0,
            deployer_job_id="",
        )
        for name, deployment in _deployments(deployments.build(Settings(**application["args"]))).items()
    }
    changed = override_deployment_info(infos, ServeApplicationSchema.model_validate(application))
    assert {"gateway", "replica"} < set(changed)
    for name, info in infos.items():
        before, after = info.deployment_config.model_dump(), changed[name].deployment_config.model_dump()
        assert after["max_surge_percent"] == _surges(EVERYTHING).get(name, 0), name
        for side in (before, after):
            del side["max_surge_percent"], side["user_configured_option_names"]
        assert before == after, name
        assert changed[name].replica_config.ray_actor_options == info.replica_config.ray_actor_options, name


# Accounts, parts of cards, spread


def _accounts(values: str, sets: tuple[str, ...] = ()) -> dict[str, str]:
    pods = chart.pod_templates(chart.render(values, sets))
    return {name: pod["spec"].get("serviceAccountName", "") for name, pod in pods.items()}


def test_a_service_account_of_the_release_has_no_role_and_gives_no_token() -> None:
    """Only the head's autoscaler speaks to the API server, with the account that KubeRay makes for it."""
    documents = chart.render("ci/mig-values.yaml")
    account = chart.only(documents, "ServiceAccount")
    assert account["metadata"]["name"] == "talk-personaplex"
    assert account["metadata"]["annotations"] == {"cloud.example/identity": "speech"}
    assert account["automountServiceAccountToken"] is False
    assert not [item for item in documents if item["kind"] == "RoleBinding"]
    assert _accounts("ci/mig-values.yaml") == {
        "head": "",
        "gateway": "talk-personaplex",
        "gpu": "talk-personaplex",
        "talk-personaplex-test": "talk-personaplex",
    }
    for name, pod in chart.pod_templates(documents).items():
        assert ("automountServiceAccountToken" in pod["spec"]) is (name != "head")


def test_an_account_that_is_there_already_is_only_named() -> None:
    sets = ("serviceAccount.name=speech",)
    assert not [item for item in chart.render(EVERYTHING, sets) if item["kind"] == "ServiceAccount"]
    accounts = _accounts(EVERYTHING, sets)
    assert accounts.pop("head") == ""
    assert set(accounts.values()) == {"speech"}
    assert len(accounts) >= 5  # the download Job and the test among them
    assert (
        _accounts("ci/static-values.yaml", sets)["head"] == "speech"
    )  # no autoscaler, no account of KubeRay's
    named = chart.render(MINIMAL, (*sets, "serviceAccount.create=true"))
    assert chart.only(named, "ServiceAccount")["metadata"]["name"] == "speech"
    assert set(_accounts(MINIMAL).values()) == {""}


def test_a_part_of_a_card_is_asked_for_by_its_name_and_a_gpu_to_ray() -> None:
    group = _service("ci/mig-values.yaml")["spec"]["rayClusterConfig"]["workerGroupSpecs"][1]
    resources = group["template"]["spec"]["containers"][0]["resources"]
    for side in ("requests", "limits"):
        assert resources[side]["nvidia.com/mig-3g.40gb"] == "1"
        assert "nvidia.com/gpu" not in resources[side]
    assert group["resources"]["GPU"] == "1"
    whole = _service(MINIMAL)["spec"]["rayClusterConfig"]["workerGroupSpecs"][1]
    assert "GPU" not in whole["resources"]  # KubeRay and Ray count nvidia.com/gpu themselves


@pytest.mark.parametrize("values", [MINIMAL, EVERYTHING])
def test_gateways_are_spread_where_there_is_a_choice(values: str) -> None:
    """Softly, and each Ray cluster by itself: an upgrade's new gateways do not count the old ones."""
    pods = _ray_pods(values)
    constraints = pods["gateway"]["spec"]["topologySpreadConstraints"]
    assert [item["topologyKey"] for item in constraints] == [
        "kubernetes.io/hostname",
        "topology.kubernetes.io/zone",
    ]
    for item in constraints:
        assert item["whenUnsatisfiable"] == "ScheduleAnyway"
        assert item["matchLabelKeys"] == ["ray.io/cluster"]
        selector = item["labelSelector"]["matchLabels"]
        assert selector.items() <= pods["gateway"]["metadata"]["labels"].items()
        assert not selector.items() <= pods["gpu"]["metadata"]["labels"].items()
    spread = {name for name, pod in pods.items() if "topologySpreadConstraints" in pod["spec"]}
    assert spread == {"gateway"}
