{{/*
The settings of the service: .Values.settings plus what the chart derives. Numbers of replicas and gateways
follow from the pod groups, so that Serve never asks for more than the autoscaler may give.
*/}}
{{- define "personaplex.settings" -}}
{{- $settings := deepCopy .Values.settings -}}
{{- $min := 0 -}}{{- $max := 0 -}}
{{- range .Values.replicaGroups -}}
{{- $min = add $min (mul .minPods .perPod) -}}
{{- $max = add $max (mul .maxPods .perPod) -}}
{{- end -}}
{{- $_ := set $settings "replicas_min" $min -}}
{{- $_ := set $settings "replicas_max" $max -}}
{{- $_ := set $settings "gateways_min" (mul .Values.gateway.minPods .Values.gateway.perPod) -}}
{{- $_ := set $settings "gateways_max" (mul .Values.gateway.maxPods .Values.gateway.perPod) -}}
{{- if .Values.serve.dedicatedNodes -}}
{{- $_ := set $settings "replica_resources" (dict "personaplex_replica" 1) -}}
{{- $_ := set $settings "gateway_resources" (dict "personaplex_gateway" 1) -}}
{{- end -}}
{{- if .Values.apiKeys.existingSecret -}}
{{- $_ := set $settings "api_keys_file" "/etc/personaplex/keys" -}}
{{- end -}}
{{- toYaml $settings -}}
{{- end -}}

{{/* serveConfigV2: one application; everything else is in its settings. */}}
{{- define "personaplex.serveConfig" -}}
proxy_location: EveryNode
http_options:
  host: 0.0.0.0
  port: {{ .Values.serve.port }}
applications:
  - name: personaplex
    route_prefix: {{ default "/" .Values.settings.route_prefix }}
    import_path: deployments:build
    args:
      {{- include "personaplex.settings" . | nindent 6 }}
{{- end -}}
