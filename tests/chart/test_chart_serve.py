"""What the chart hands to Ray: the Serve config, the autoscaler's view, timeouts, placement and secrets."""

from __future__ import annotations

import functools
import mmap
import re
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml
from kube import chart
from ray.autoscaler._private.kuberay import autoscaling_config
from ray.serve import Application
from ray.serve.schema import ServeDeploySchema

import deployments
from deployments import ingress
from deployments.settings import Settings

CASES = [pytest.param(values, sets, id=values) for values, sets in chart.CASES.items()]
EVERYTHING = "ci/everything-values.yaml"


def _service(values: str, sets: tuple[str, ...] = ()) -> Any:
    return chart.only(chart.render(values, sets), "RayService")["spec"]


def _settings(values: str, sets: tuple[str, ...] = ()) -> Settings:
    config = yaml.safe_load(_service(values, sets)["serveConfigV2"])
    return Settings(**config["applications"][0]["args"])


def _environment(template: Any) -> dict[str, str]:
    return {item["name"]: item.get("value", "") for item in template["spec"]["containers"][0].get("env", [])}


@pytest.mark.parametrize(("values", "sets"), CASES)
def test_serve_config_is_accepted_by_ray_and_by_the_service(values: str, sets: tuple[str, ...]) -> None:
    config = yaml.safe_load(_service(values, sets)["serveConfigV2"])
    parsed = ServeDeploySchema.model_validate(config)
    assert [application.import_path for application in parsed.applications] == ["deployments:build"]
    assert set(config) == {"proxy_location", "http_options", "applications"}
    settings = _settings(values, sets)
    assert settings.replicas_max >= settings.replicas_min
    assert settings.model not in ("auto", "")


@pytest.mark.parametrize(("values", "sets"), CASES)
def test_the_application_of_these_settings_builds(values: str, sets: tuple[str, ...]) -> None:
    """What `import_path` names makes an application of `args`, without a cluster."""
    assert isinstance(deployments.build(_settings(values, sets)), Application)


@pytest.mark.parametrize(("values", "sets"), CASES)
def test_timeouts_are_in_order(values: str, sets: tuple[str, ...]) -> None:
    """termination grace > node drain > graceful shutdown >= longest session, on every pod."""
    service, settings = _service(values, sets), _settings(values, sets)
    graceful = settings.drain_timeout_s
    assert graceful >= settings.session_limit_s
    assert service["rayClusterDeletionDelaySeconds"] >= graceful
    for name, template in chart.pod_templates(chart.render(values, sets)).items():
        if "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S" not in _environment(template):
            continue
        drain = float(_environment(template)["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"])
        assert template["spec"]["terminationGracePeriodSeconds"] > drain > graceful, name
        assert "lifecycle" not in template["spec"]["containers"][0], name  # no preStop that stops Ray at once


def test_fractions_of_a_second_round_up(tmp_path: Path) -> None:
    values = tmp_path / "values.yaml"
    values.write_text("settings: {session_limit_s: 100.25, queue_timeout_s: 0.5}")
    service = _service(str(values), (chart.TOKEN,))
    assert _settings(str(values), (chart.TOKEN,)).drain_timeout_s == 105.75
    assert service["rayClusterDeletionDelaySeconds"] == 106 + 30 + 60


@pytest.mark.parametrize(("values", "sets"), CASES)
def test_every_pod_has_the_limits_of_the_first_reader(values: str, sets: tuple[str, ...]) -> None:
    for name, template in chart.pod_templates(chart.render(values, sets)).items():
        environment = _environment(template)
        if "RAY_worker_niceness" in environment:  # runs Ray
            assert environment[ingress.VARIABLE] == ingress.CALLBACK, name
            assert "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER" not in environment, (
                "a cluster is more than one machine"
            )


@pytest.mark.parametrize(("values", "sets"), CASES)
def test_haproxy_outlives_the_longest_session(values: str, sets: tuple[str, ...]) -> None:
    graceful = _settings(values, sets).drain_timeout_s
    on = values not in ("values-dev.yaml", "ci/static-values.yaml")
    templates = chart.pod_templates(chart.render(values, sets))
    for name in ("head", "gateway"):
        environment = _environment(templates[name])
        assert (environment.get("RAY_SERVE_ENABLE_HA_PROXY") == "1") is on
        if on:
            stop = float(environment["RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S"])
            assert stop >= graceful
            assert float(environment["RAY_SERVE_PORT_QUARANTINE_S"]) > stop
            assert float(environment["RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S"]) >= graceful


@functools.cache
def _names_in_ray() -> frozenset[str]:
    """Every environment variable that Ray's Python sources name."""
    root = Path(ray.__file__).parent
    sources = [root / "serve/_private/constants.py", root / "_private/ray_constants.py"]
    sources.append(root / "_common/usage/usage_constants.py")
    return frozenset(re.findall(r"\bRAY_[A-Z_]+\b", "".join(path.read_text() for path in sources)))


def test_environment_variables_exist_in_ray() -> None:
    """A renamed variable would be ignored in silence."""
    templates = chart.pod_templates(chart.render(EVERYTHING))
    names = {
        name for template in templates.values() for name in _environment(template) if name.startswith("RAY_")
    }
    assert len(names) >= 10
    names.discard("RAY_worker_niceness")
    assert names <= _names_in_ray()
    raylet = Path(ray.__file__).parent / "core/src/ray/raylet/raylet"
    with open(raylet, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as binary:
        assert binary.find(b"worker_niceness") >= 0


def test_gateways_run_on_one_event_loop_and_others_do_not() -> None:
    templates = chart.pod_templates(chart.render("ci/minimal-values.yaml"))
    single = {
        name
        for name, template in templates.items()
        if "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP" in _environment(template)
    }
    assert single == {"gateway"}


@pytest.mark.parametrize(("values", "sets"), CASES)
def test_ray_sees_room_for_everything_serve_may_ask_for(values: str, sets: tuple[str, ...]) -> None:
    """As Ray's own autoscaler reads the cluster: the most replicas and gateways fit its largest size, the
    fewest its smallest, and neither ever lands on the head."""
    service, settings = _service(values, sets), _settings(values, sets)
    spec = service["rayClusterConfig"]
    resource = {"metadata": {"name": "c", "namespace": "speech"}, "spec": spec}
    types = autoscaling_config._derive_autoscaling_config_from_ray_cr(resource)["available_node_types"]
    replica = {
        "CPU": settings.replica_num_cpus,
        "GPU": settings.replica_num_gpus or 0,
        **settings.replica_resources,
    }
    gateway = {"CPU": settings.gateway_num_cpus, **settings.gateway_resources}
    assert types["headgroup"]["resources"]["CPU"] == 0
    groups = {name: kind for name, kind in types.items() if name != "headgroup"}
    for bound, replicas, gateways in (
        ("min_workers", settings.replicas_min, settings.gateways_min),
        ("max_workers", settings.replicas_max, settings.gateways_max),
    ):
        room = {name: (kind[bound], kind["resources"]) for name, kind in groups.items()}
        assert (
            sum(pods * _fits(offer, replica) for name, (pods, offer) in room.items() if name != "gateway")
            >= replicas
        )
        assert room["gateway"][0] * _fits(room["gateway"][1], gateway) >= gateways
    if settings.replica_resources:
        assert _fits(types["gateway"]["resources"], replica) == 0
        assert all(
            _fits(kind["resources"], gateway) == 0 for name, kind in groups.items() if name != "gateway"
        )


def _fits(offer: dict[str, float], wanted: dict[str, float]) -> int:
    """How many actors of `wanted` one node holds."""
    return int(min(offer.get(name, 0) / amount for name, amount in wanted.items() if amount))


def test_gateways_hold_every_session_of_the_replicas() -> None:
    for card in chart.CARDS:
        settings = _settings("ci/minimal-values.yaml", (f"card={card}",))
        assert settings.gateways_max * settings.sessions_per_gateway >= settings.replicas_max * settings.slots


@pytest.mark.parametrize(("values", "sets"), CASES)
def test_every_container_is_restricted(values: str, sets: tuple[str, ...]) -> None:
    """The `restricted` Pod Security Standard, and no environment of neighbouring Services."""
    documents = chart.render(values, sets)
    for name, template in chart.pod_templates(documents).items():
        spec = template["spec"]
        assert spec["securityContext"]["runAsNonRoot"], name
        assert spec["securityContext"]["runAsUser"] >= 1_000, name
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, name
        assert spec["enableServiceLinks"] is False, name
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(spec), name
        own = (values, name) == ("ci/podspec-values.yaml", "gateway")  # whose values ask for it
        assert name == "head" or spec["automountServiceAccountToken"] is own, name
        for volume in spec.get("volumes", []):
            kind = set(volume) - {"name"}
            allowed = {"emptyDir", "secret", "persistentVolumeClaim", "configMap", "image"}
            if values == "ci/podspec-values.yaml" and volume["name"] == "weights":
                allowed = {"hostPath"}  # the one value that the standard forbids
            assert kind <= allowed, (name, volume)
        containers = [*spec.get("initContainers", []), *spec["containers"]]
        for container in containers:
            context = container["securityContext"]
            assert context["allowPrivilegeEscalation"] is False, (name, container["name"])
            assert context["capabilities"] == {"drop": ["ALL"]}, (name, container["name"])
            assert not container["image"].endswith(":latest")
            assert {"name", "image"} <= set(container)
    options = chart.only(documents, "RayService")["spec"]["rayClusterConfig"].get("autoscalerOptions")
    assert options is None or options["securityContext"]["allowPrivilegeEscalation"] is False


def _users_of(secret: str, values: str) -> set[str]:
    """`pod/container` of every container that sees a Secret."""
    users = set()
    for name, template in chart.pod_templates(chart.render(values)).items():
        spec = template["spec"]
        volumes = {
            item["name"]
            for item in spec.get("volumes", [])
            if item.get("secret", {}).get("secretName") == secret
        }
        for container in [*spec.get("initContainers", []), *spec["containers"]]:
            references = [
                item.get("valueFrom", {}).get("secretKeyRef", {}) for item in container.get("env", [])
            ]
            mounts = {mount["name"] for mount in container.get("volumeMounts", [])}
            if volumes & mounts or secret in {reference.get("name") for reference in references}:
                users.add(f"{name}/{container['name']}")
    return users


def test_secrets_are_seen_only_where_they_are_used() -> None:
    (job,) = (d["metadata"]["name"] for d in chart.render(EVERYTHING) if d["kind"] == "Job")
    assert _users_of("hf", EVERYTHING) == {f"{job}/prefetch"}
    assert _users_of("keys", EVERYTHING) == {"gateway/ray", "talk-personaplex-test/conversation"}
    assert _users_of("hf", "ci/minimal-values.yaml") == {"gpu/download-weights"}
    assert _settings(EVERYTHING).api_keys_file == Path("/etc/personaplex/keys")


WEIGHTS = {
    EVERYTHING: {"persistentVolumeClaim": {"claimName": "weights"}},
    "ci/minimal-values.yaml": {"emptyDir": {"sizeLimit": "30Gi"}},
    "ci/static-values.yaml": {"persistentVolumeClaim": {"claimName": "weights"}},
    "ci/mig-values.yaml": {
        "image": {"reference": "registry.example/personaplex-weights:7b-v1", "pullPolicy": "IfNotPresent"}
    },
    "ci/podspec-values.yaml": {"hostPath": {"path": "/var/lib/personaplex", "type": "Directory"}},
}


@pytest.mark.parametrize("values", WEIGHTS)
def test_replicas_read_weights_and_never_download(values: str) -> None:
    template = chart.pod_templates(chart.render(values))["gpu"]
    environment = _environment(template)
    assert environment["HF_HUB_OFFLINE"] == "1"
    assert environment["HF_HOME"].startswith("/models/")
    (mount,) = (m for m in template["spec"]["containers"][0]["volumeMounts"] if m["name"] == "weights")
    assert mount["readOnly"] is True
    (volume,) = (item for item in template["spec"]["volumes"] if item["name"] == "weights")
    assert volume == {"name": "weights", **WEIGHTS[values]}
    if "emptyDir" not in volume and values != EVERYTHING:  # filled beforehand
        assert "initContainers" not in template["spec"]


def test_replicas_wait_for_the_job_that_fills_their_claim() -> None:
    documents = chart.render(EVERYTHING)
    (job,) = (d for d in documents if d["kind"] == "Job")
    arguments = job["spec"]["template"]["spec"]["containers"][0]["args"]
    written = re.search(r"--marker=(\S+)", " ".join(arguments))
    waiting = chart.pod_templates(documents)["gpu"]["spec"]["initContainers"][0]
    assert written is not None
    assert {"name": "MARKER", "value": written[1]} in waiting["env"]


def test_ray_and_media_ports_are_open_to_this_release_only() -> None:
    policies = {
        d["metadata"]["name"]: d["spec"] for d in chart.render(EVERYTHING) if d["kind"] == "NetworkPolicy"
    }
    rules = policies["talk-personaplex-ray"]["ingress"]
    settings = _settings(EVERYTHING)
    assert settings.media_port_min > 0
    for rule in rules:
        ports = {port["port"] for port in rule.get("ports", [])}
        if not ports:  # every port
            (peer,) = rule["from"]
            assert peer["podSelector"]["matchLabels"]["app.kubernetes.io/instance"] == "talk"
            assert "namespaceSelector" not in peer
        assert not ports & {6379, 10001, settings.media_port_min, settings.media_port_max}
    assert not any("ingress" in policy for name, policy in policies.items() if name.endswith("-jobs"))


def test_operators_may_do_little() -> None:
    role = next(d for d in chart.render(EVERYTHING) if d["kind"] == "Role")
    granted = {
        (resource, verb) for rule in role["rules"] for resource in rule["resources"] for verb in rule["verbs"]
    }
    writes = {pair for pair in granted if pair[1] not in ("get", "list", "watch")}
    assert writes == {
        ("rayclusters", "delete"),
        ("pods/eviction", "create"),
        ("pods/portforward", "create"),
    }
    assert not any("*" in rule["verbs"] + rule["resources"] + rule["apiGroups"] for rule in role["rules"])
    (secrets,) = (rule for rule in role["rules"] if rule["resources"] == ["secrets"])
    assert set(secrets["resourceNames"]) == {"hf", "keys", "operators", "redis", "registry", "twilio"}


def test_notes_warn_about_what_cuts_sessions() -> None:
    sets = ["--set", chart.TOKEN, "--set", "ingress.enabled=true", "--set", "ingress.hosts[0]=talk.example"]
    done = chart.helm("install", "talk", str(chart.CHART), "--dry-run=client", "-n", "speech", *sets)
    assert "worker-shutdown-timeout" in done.stdout, done.stderr
    assert "python -m k8s rollout talk-personaplex -n speech" in done.stdout
