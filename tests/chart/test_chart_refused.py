"""Values that cannot work are refused when the chart renders, by path and reason."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from kube import chart
from ray._private import ray_constants
from ray.serve._private import constants

# What must not render, and what is said.
REFUSED = {
    "misspelt value": (("gatway.minPods=3",), "additional properties 'gatway' not allowed"),
    "misspelt setting": (("settings.slotz=3",), "additional properties 'slotz' not allowed"),
    "setting out of range": (("settings.slots=0",), "/settings/slots"),
    "derived setting": (
        ("settings.replicas_max=3",),
        "settings.replicas_max is derived: use replicaGroups.*.maxPods",
    ),
    "key in values": (("settings.api_keys={a}",), "settings.api_keys is derived: use apiKeys.existingSecret"),
    "operators' keys by a file of one's own": (
        ("settings.admin_keys_file=/keys",),
        "settings.admin_keys_file is derived: use adminKeys.existingSecret",
    ),
    "twilio without its token": (
        ("settings.protocols={twilio}", "settings.public_url=https://talk.example"),
        "twilio, which needs settings.public_url and, in twilio.existingSecret",
    ),
    "twilio without its address": (
        ("settings.protocols={twilio}", "twilio.existingSecret=t"),
        "twilio, which needs settings.public_url",
    ),
    "a token nobody needs": (("twilio.existingSecret=t",), "settings.protocols does not have twilio"),
    "token's file in values": (
        ("settings.twilio_token_file=/t",),
        "settings.twilio_token_file is derived: use twilio.existingSecret",
    ),
    "tag latest": (("image.tag=latest",), "the tag latest names no version"),
    "bad digest": (("image.digest=sha256:12",), "/image/digest"),
    "long name": (("fullnameOverride=" + "a" * 48,), "has 48 characters; KubeRay allows 47"),
    "name with capitals": (("fullnameOverride=Talk",), "must begin with a letter"),
    "drain too short": (
        ("timeouts.nodeDrainSeconds=60",),
        "graceful shutdown (longest session, its wait and 5 s) takes 1865",
    ),
    "grace too short": (("timeouts.terminationGraceSeconds=1895",), "not more than the node drain of 1895"),
    "old cluster gone too soon": (
        ("timeouts.clusterDeletionDelaySeconds=60",),
        "less than the longest session of 1800",
    ),
    "no replica group": (("replicaGroups.gpu=null",), "nothing would run the model"),
    "more than the most": (("gateway.minPods=9",), "gateway.minPods is 9, more than the maxPods of 4"),
    "static but elastic": (
        ("autoscaler.enabled=false",),
        "without autoscaler.enabled minPods must equal maxPods",
    ),
    "group called gateway": (
        ("replicaGroups.gateway.minPods=1",),
        "replicaGroups.gateway: the name belongs to the gateways",
    ),
    "group called as Ray calls the head": (
        ("replicaGroups.headgroup.minPods=1",),
        "replicaGroups.headgroup: the name belongs to the head",
    ),
    "group in capitals": (
        ("replicaGroups.GPU.minPods=1",),
        "replicaGroups.GPU: a group's name has at most 20 of a-z, 0-9 and -",
    ),
    "half a group": (("replicaGroups.spot.minPods=1",), "replicaGroups.spot.maxPods is missing"),
    "too few GPUs": (("replicaGroups.gpu.perPod=2",), "2 replicas of 1 GPUs do not fit in 1"),
    "too few ports": (
        ("settings.media_port_max=21000", "replicaGroups.gpu.perPod=2", "replicaGroups.gpu.gpusPerPod=2"),
        "1 media ports for 2 replicas",
    ),
    "unquoted bytes": (("replicaGroups.gpu.objectStoreBytes=500000000",), "objectStoreBytes"),
    "claim without a name": (
        ("weights.source=claim",),
        "weights.source claim needs weights.claim.existingClaim",
    ),
    "prefetch into nothing": (
        ("weights.prefetch.enabled=true",),
        "weights.prefetch.enabled needs weights.source claim",
    ),
    "no token": (("huggingFace.existingSecret=",), "settings.model 7b is gated"),
    "no weights": (
        ("weights.source=none",),
        "settings.model 7b needs weights",
    ),
    "model auto": (("settings.model=auto",), "settings.model auto could serve noise"),
    "limit of an address that is a proxy's": (
        ("settings.trusted_proxies=0",),
        "1 proxies append to X-Forwarded-For: all clients would count as one address",
    ),
    "fewer trusted than there are": (
        ("settings.trusted_proxies=1", "settings.sessions_per_address=4", "ingress.enabled=true"),
        "settings.trusted_proxies is 1, but 2 proxies append",
    ),
    "ingress without host": (("ingress.enabled=true",), "ingress.enabled needs ingress.hosts"),
    "route without gateway": (("httpRoute.enabled=true",), "httpRoute.enabled needs httpRoute.parentRefs"),
    "redis secret alone": (
        ("redis.existingSecret=redis",),
        "redis.existingSecret is set without redis.address",
    ),
    "ray token alone": (
        ("rayAuth.existingSecret=t",),
        "rayAuth.existingSecret is set without rayAuth.enabled",
    ),
    "another Ray": (("rayVersion=2.9.0",), "/rayVersion"),
    "a Service of no such type": (
        ("service.type=External",),
        "'/service/type': value must be one of 'ClusterIP', 'NodePort', 'LoadBalancer'",
    ),
    "a load balancer without keys": (
        ("service.type=LoadBalancer",),
        "service.type LoadBalancer opens the service to everyone: set apiKeys.existingSecret",
    ),
    "privileged port": (("serve.port=80",), "/serve/port"),
    "incremental upgrade": (
        ("upgrade.strategy=NewClusterWithIncrementalUpgrade",),
        "'/upgrade/strategy': value must be one of 'NewCluster', 'None'",
    ),
    "more replicas at the start than at the most": (
        ("settings.replicas_initial=9",),
        "settings.replicas_initial is 9, not between the 1 and 4 replicas",
    ),
    "surge of less than Serve can": (
        ("replicaGroups.gpu.maxPods=200", "replicaGroups.gpu.surgePods=1"),
        "replicaGroups.*.surgePods: room for 1 more is less than 1 % of 200",
    ),
    # Resources
    "limit below request": (
        ("gateway.resources.limits.cpu=1500m",),
        "gateway.resources.limits.cpu is 1500m, less than the request of 4",
    ),
    "limit of a group below request": (
        ("replicaGroups.gpu.resources.limits.memory=1Gi",),
        "replicaGroups.gpu.resources.limits.memory is 1Gi, less than the request of 48Gi",
    ),
    "limit of the autoscaler below request": (
        ("autoscaler.resources.limits.memory=1M",),
        "autoscaler.resources.limits.memory is 1M, less than the request of 512Mi",
    ),
    "limit of the download below request": (
        ("weights.prefetch.resources.limits.memory=1024",),
        "weights.prefetch.resources.limits.memory is 1024, less than the request of 2Gi",
    ),
    "replica larger than its pod": (
        ("settings.replica_num_cpus=16",),
        "replicaGroups.gpu.resources: 1 replicas of settings.replica_num_cpus 16 need 16 CPUs, the pod has 8",
    ),
    "gateways larger than their pod": (
        ("gateway.perPod=9",),
        "gateway.resources: 9 gateways of settings.gateway_num_cpus 1 need 9 CPUs, the pod has 4",
    ),
    "pod that names no CPU": (
        ("gateway.resources.requests.cpu=null", "gateway.resources.limits.cpu=null"),
        "gateway.resources names no cpu",
    ),
    "object store larger than its memory file system": (
        ("head.shmSize=64Mi",),
        "head.shmSize is 64Mi, less than the objectStoreBytes of 500000000",
    ),
    "object store as large as the pod": (
        ("head.shmSize=9Gi", "head.resources.requests.memory=400M", "head.resources.limits.memory=400M"),
        "head.objectStoreBytes is 500000000, all of the pod's memory or more",
    ),
    "cache smaller than the weights": (
        ("weights.node.sizeLimit=10Gi",),
        "weights.node.sizeLimit is 10Gi, but the weights of settings.model 7b take 18 GB",
    ),
    # Ports
    "dashboard's port": (("serve.port=8265",), "serve.port is 8265, which belongs to Ray's dashboard"),
    "metrics' port": (("serve.port=8080",), "serve.port is 8080, which belongs to Ray's metrics"),
    "media over the serve port": (
        ("serve.port=21003",),
        "serve.port is 21003, one of the media ports 21000 to 21015",
    ),
    "media over Ray's workers": (
        ("settings.media_port_min=18000",),
        "(18000 to 21015) reach over 10002 to 19999, which belong to Ray's workers",
    ),
    "media ports upside down": (
        ("settings.media_port_max=20000",),
        "settings.media_port_max is 20000, less than the media_port_min of 21000",
    ),
    "media ports without a first": (
        ("settings.media_port_min=0",),
        "settings.media_port_max needs settings.media_port_min",
    ),
    # Environment, tolerations, volumes, labels
    "variable of the chart": (
        ("gateway.extraEnv[0].name=RAY_worker_niceness",),
        "gateway.extraEnv[0]: RAY_worker_niceness is set by the chart or by KubeRay",
    ),
    "variable of a value": (
        ("replicaGroups.gpu.extraEnv[0].name=RAY_SERVE_ENABLE_HA_PROXY",),
        "replicaGroups.gpu.extraEnv[0]: RAY_SERVE_ENABLE_HA_PROXY is set by the chart or by KubeRay",
    ),
    "variable twice": (
        ("head.extraEnv[0].name=A", "head.extraEnv[1].name=A"),
        "head.extraEnv[1]: A is there twice",
    ),
    "misspelt field of a variable": (
        ("head.extraEnv[0].name=A", "head.extraEnv[0].valu=b"),
        "'/head/extraEnv/0': additional properties 'valu' not allowed",
    ),
    "operator of a toleration": (
        ("head.tolerations[0].operator=Exist",),
        "'/head/tolerations/0/operator': value must be one of 'Exists', 'Equal'",
    ),
    "effect of a toleration": (
        ("weights.prefetch.tolerations[0].effect=NoRun",),
        "'/weights/prefetch/tolerations/0/effect': value must be one of",
    ),
    "toleration of a value that exists": (
        ("head.tolerations[0].key=a", "head.tolerations[0].operator=Exists", "head.tolerations[0].value=b"),
        "head.tolerations[0]: operator Exists takes no value",
    ),
    "toleration without a key": (
        ("replicaGroups.gpu.tolerations[0].key=", "replicaGroups.gpu.tolerations[0].operator=Equal"),
        "replicaGroups.gpu.tolerations[0]: operator Equal needs a key",
    ),
    "toleration for a while of what does not evict": (
        ("head.tolerations[0].key=a", "head.tolerations[0].tolerationSeconds=5"),
        "head.tolerations[0]: tolerationSeconds belongs to the effect NoExecute",
    ),
    # GPUs by other names
    "GPU that is none": (
        ("replicaGroups.gpu.gpuResource=nvidia.com/mig-3g",),
        "'/replicaGroups/gpu/gpuResource': 'nvidia.com/mig-3g' does not match",
    ),
    "two parts of cards for one pod": (
        (
            "replicaGroups.gpu.gpuResource=nvidia.com/mig-3g.40gb",
            "replicaGroups.gpu.gpusPerPod=2",
            "replicaGroups.gpu.perPod=2",
        ),
        "replicaGroups.gpu.gpusPerPod is 2: a process sees one nvidia.com/mig-3g.40gb at a time",
    ),
    "slots of a card for a part of it": (
        ("card=h100", "replicaGroups.gpu.gpuResource=nvidia.com/mig-3g.40gb"),
        "card h100 is a whole card, replicaGroups.gpu.gpuResource a part of one",
    ),
    "no GPU at all": (
        ("replicaGroups.gpu.gpuResource=",),
        "replicaGroups.gpu.gpuResource is empty: name a claim in podSpec.resourceClaims",
    ),
    "a claim that no container makes": (
        ("replicaGroups.gpu.gpuResource=", "replicaGroups.gpu.podSpec.resourceClaims[0].name=gpu"),
        "and in resources.claims of the container ray there",
    ),
    "a card that nobody knows": (("card=b200",), "'/card': value must be one of '', 'l40s'"),
    # Weights
    "image without a name": (("weights.source=image",), "weights.source image needs weights.image.reference"),
    "directory without a name": (
        ("weights.source=hostPath",),
        "weights.source hostPath needs weights.hostPath.path",
    ),
    "image that is not asked for": (
        ("weights.image.reference=a:1",),
        "weights.image.reference is set, but weights.source is node",
    ),
    "claim that is not asked for": (
        ("weights.source=hostPath", "weights.hostPath.path=/w", "weights.claim.existingClaim=w"),
        "weights.claim.existingClaim is set, but weights.source is hostPath",
    ),
    "image of no version": (
        ("weights.source=image", "weights.image.reference=localhost:5000/weights"),
        "weights.image.reference localhost:5000/weights has no tag and no digest: pin one",
    ),
    "image of the latest version": (
        ("weights.source=image", "weights.image.reference=weights:latest"),
        "weights.image.reference weights:latest: the tag latest names no version",
    ),
    "the whole node": (("weights.source=hostPath", "weights.hostPath.path=/"), "'/weights/hostPath/path'"),
    "out of the directory": (
        ("weights.source=hostPath", "weights.hostPath.path=/var/../etc"),
        "'/weights/hostPath/path'",
    ),
    "download into an image": (
        ("weights.source=image", "weights.image.reference=a:1", "weights.prefetch.enabled=true"),
        "weights.prefetch.enabled needs weights.source claim",
    ),
    "account in capitals": (("serviceAccount.name=Speech",), "'/serviceAccount/name'"),
    "label by which policies select": (
        ("gateway.podLabels.app\\.kubernetes\\.io/component=x",),
        "gateway.podLabels.app.kubernetes.io/component: Services and policies select pods by it",
    ),
    "label that is none": (
        ("gateway.nodeSelector.zone=a b",),
        "'/gateway/nodeSelector/zone': 'a b' does not match",
    ),
}


@pytest.mark.parametrize(("sets", "message"), REFUSED.values(), ids=list(REFUSED))
def test_wrong_values_are_refused_with_a_reason(sets: tuple[str, ...], message: str) -> None:
    assert message in chart.refused(*sets)


def test_every_variable_of_the_chart_is_refused_in_extra_env() -> None:
    """A second value would win in silence; which there are depends on other values."""
    names = {
        item["name"]
        for template in chart.pod_templates(chart.render("ci/everything-values.yaml")).values()
        for container in [*template["spec"].get("initContainers", []), *template["spec"]["containers"]]
        for item in container.get("env", [])
    } - {"EXTRA", "MARKER"}
    helper = (chart.CHART / "templates" / "_validate_pods.tpl").read_text()
    own = helper.split('define "personaplex.ownVariables" -}}')[1].split("{{- end -}}")[0].split()
    assert len(names) > 12
    assert names <= set(own)


def test_ports_that_ray_and_serve_take_are_reserved() -> None:
    """Their numbers are Ray's own defaults."""
    helper = (chart.CHART / "templates" / "_validate.tpl").read_text()
    rows: list[Any] = yaml.safe_load(
        "\n".join(line for line in helper.splitlines() if line.startswith("- ["))
    )
    reserved = {(first, last) for first, last, _ in rows}
    for port in (
        constants.DEFAULT_GRPC_PORT,
        constants.RAY_SERVE_FALLBACK_PROXY_HTTP_PORT,
        constants.RAY_SERVE_FALLBACK_PROXY_GRPC_PORT,
        constants.RAY_SERVE_HAPROXY_METRICS_PORT,
        constants.RAY_SERVE_HAPROXY_STATS_PORT,
        ray_constants.DEFAULT_DASHBOARD_AGENT_LISTEN_PORT,
        ray_constants.DEFAULT_DASHBOARD_PORT,
        ray_constants.DEFAULT_PORT,
    ):
        assert (port, port) in reserved, port
    http = (
        constants.RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT,
        constants.RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT,
    )
    grpc = (
        constants.RAY_SERVE_DIRECT_INGRESS_MIN_GRPC_PORT,
        constants.RAY_SERVE_DIRECT_INGRESS_MAX_GRPC_PORT,
    )
    assert {http, grpc} <= reserved
    declared = {
        port["containerPort"]
        for template in chart.pod_templates(chart.render("ci/minimal-values.yaml")).values()
        for port in template["spec"]["containers"][0].get("ports", [])
    }
    assert {port for port in declared if (port, port) not in reserved} == {8000}
