"""The operator's side of the service: raw manifests (`base/`, `overlays/`) and a tool, `python -m k8s`.

Knows the Kubernetes API, KubeRay's objects and the service's public HTTP endpoints; imports nothing of the
service itself, so that it runs on a laptop with only the `k8s` extra installed.
"""
