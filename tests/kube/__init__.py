"""What the chart and manifest tests stand on: renders, schemas, KubeRay's rules, an API server."""
