"""The operator's side of the service: raw manifests (`base/`, `overlays/`) and a tool, `python -m k8s`.

Knows the Kubernetes API, KubeRay's objects and the service's public endpoints. The tool imports nothing of
the service, so that it runs on a laptop with only the `k8s` extra installed; `conversation.py` and
`fetch_weights.py` run inside the images, as jobs of the chart.
"""
