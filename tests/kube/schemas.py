"""Strict validation of Kubernetes documents: an unknown kind is an error, and so is an unknown field.

Built-in kinds use the schemas of kubernetes-validate, loaded once per version. Kinds of custom resources have
schemas here, written from their API references; the parts of a RayService that are built-in kinds (pod
templates, a Service) refer to those; its own structure is checked against KubeRay's schemas in kuberay.py.
"""

from __future__ import annotations

import functools
import importlib.resources
import json
import re
from typing import Any

import jsonschema
from referencing import Registry, Resource

_FOLDER = importlib.resources.files("kubernetes_validate") / "kubernetes-json-schema"
_CORE = "/api/_definitions.json#/$defs/io.k8s.api.core.v1."
_META = "/api/_definitions.json#/$defs/io.k8s.apimachinery.pkg.apis.meta.v1."
_STRING = {"type": "string"}
_COUNT = {"type": "integer", "minimum": 0, "maximum": 2**31 - 1}
_STRINGS = {"type": "object", "additionalProperties": _STRING}


def _object(required: tuple[str, ...] = (), **properties: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "additionalProperties": False,
        "properties": properties,
        "required": list(required),
    }


def _core(name: str) -> dict[str, str]:
    return {"$ref": _CORE + name}


def _list(item: Any, least: int = 0) -> dict[str, Any]:
    return {"type": "array", "items": item, "minItems": least}


def _resource(spec: Any) -> dict[str, Any]:
    metadata = {"$ref": _META + "ObjectMeta"}
    return _object(
        ("apiVersion", "kind", "metadata", "spec"),
        apiVersion=_STRING,
        kind=_STRING,
        metadata=metadata,
        spec=spec,
    )


_POD = {"properties": {"template": _core("PodTemplateSpec")}}
_RAY_SERVICE = {  # what Kubernetes says of its parts; its own structure is in KubeRay's schema (kuberay.py)
    "properties": {
        "serveService": _core("Service"),
        "rayClusterConfig": {
            "properties": {
                "autoscalerOptions": {
                    "properties": {
                        "resources": _core("ResourceRequirements"),
                        "securityContext": _core("SecurityContext"),
                    }
                },
                "headGroupSpec": _POD,
                "workerGroupSpecs": _list(_POD),
            }
        },
    }
}
_DURATION = {"type": "string", "pattern": r"^([0-9]{1,5}(h|m|s|ms)){1,4}$"}
_HTTP_ROUTE = _object(
    parentRefs=_list(
        _object(
            ("name",),
            name=_STRING,
            namespace=_STRING,
            sectionName=_STRING,
            port=_COUNT,
            group=_STRING,
            kind=_STRING,
        )
    ),
    hostnames=_list(_STRING),
    rules=_list(
        _object(
            matches=_list(_object(path=_object(type={"enum": ["Exact", "PathPrefix"]}, value=_STRING))),
            timeouts=_object(request=_DURATION, backendRequest=_DURATION),
            backendRefs=_list(
                _object(("name", "port"), name=_STRING, namespace=_STRING, port=_COUNT, weight=_COUNT), 1
            ),
        ),
        1,
    ),
)
_POD_MONITOR = _object(
    ("selector", "podMetricsEndpoints"),
    jobLabel=_STRING,
    selector={"$ref": _META + "LabelSelector"},
    podMetricsEndpoints=_list(
        _object(
            ("port",),
            port=_STRING,
            path=_STRING,
            interval=_DURATION,
            relabelings=_list(
                _object(sourceLabels=_list(_STRING), targetLabel=_STRING, regex=_STRING, action=_STRING)
            ),
        ),
        1,
    ),
)
_PROMETHEUS_RULE = _object(
    ("groups",),
    groups=_list(
        _object(
            ("name", "rules"),
            name=_STRING,
            interval=_DURATION,
            rules=_list(
                {
                    **_object(
                        ("expr",),
                        alert=_STRING,
                        record=_STRING,
                        expr=_STRING,
                        labels=_STRINGS,
                        annotations=_STRINGS,
                    )
                    | {"oneOf": [{"required": ["alert"]}, {"required": ["record"]}]}
                },
                1,
            ),
        ),
        1,
    ),
)
_PROMETHEUS_RULE["properties"]["groups"]["items"]["properties"]["rules"]["items"]["properties"]["for"] = (
    _DURATION
)
CUSTOM = {
    ("ray.io/v1", "RayService"): _resource(_RAY_SERVICE),
    ("gateway.networking.k8s.io/v1", "HTTPRoute"): _resource(_HTTP_ROUTE),
    ("monitoring.coreos.com/v1", "PodMonitor"): _resource(_POD_MONITOR),
    ("monitoring.coreos.com/v1", "PrometheusRule"): _resource(_PROMETHEUS_RULE),
}


class UnknownKind(Exception):
    """No schema for this apiVersion and kind."""


def validate(document: Any, version: str) -> None:
    """Raises UnknownKind or jsonschema.ValidationError."""
    _validator(document["apiVersion"], document["kind"], version).validate(document)


@functools.cache
def _folder(version: str) -> Any:
    (folder,) = (
        item
        for item in _FOLDER.iterdir()
        if re.fullmatch(rf"v{re.escape(version)}\.\d+-local-strict", item.name)
    )
    return folder


@functools.cache
def _registry(version: str) -> Registry[Any]:
    definitions = json.loads((_folder(version) / "_definitions.json").read_text())
    return Registry().with_resource(
        "https://kubernetes.io/api/_definitions.json", Resource.from_contents(definitions)
    )


@functools.cache
def _validator(api: str, kind: str, version: str) -> jsonschema.Draft202012Validator:
    if (api, kind) in CUSTOM:
        schema = {"$id": f"https://kubernetes.io/api/{kind}", **CUSTOM[api, kind]}
    else:
        group = re.sub(r"^([^./]*)(?:\.[^/]*)?/", r"\1-", api)
        path = _folder(version) / f"{kind.lower()}-{group}.json"
        if not path.is_file():
            raise UnknownKind(f"{api} {kind} in Kubernetes {version}")
        schema = json.loads(path.read_text())
    return jsonschema.Draft202012Validator(schema, registry=_registry(version))
