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
{{- if include "personaplex.transcribes" . -}}
{{- $_ := set $settings "transcribers_min" (mul .Values.transcriber.minPods .Values.transcriber.perPod) -}}
{{- $_ := set $settings "transcribers_max" (mul .Values.transcriber.maxPods .Values.transcriber.perPod) -}}
{{- if .Values.serve.dedicatedNodes -}}
{{- $_ := set $settings "transcriber_resources" (dict "personaplex_transcriber" 1) -}}
{{- end -}}
{{- end -}}
{{- if .Values.apiKeys.existingSecret -}}
{{- $_ := set $settings "api_keys_file" "/etc/personaplex/keys" -}}
{{- end -}}
{{- if .Values.twilio.existingSecret -}}
{{- $_ := set $settings "twilio_token_file" "/etc/personaplex-twilio/token" -}}
{{- end -}}
{{- if not (hasKey $settings "trusted_proxies") -}}
{{- $_ := set $settings "trusted_proxies" (include "personaplex.proxies" . | int) -}}
{{- end -}}
{{- toYaml $settings -}}
{{- end -}}

{{/* Not empty where users' speech is transcribed: then there is a group of pods for it. */}}
{{- define "personaplex.transcribes" -}}
{{- if eq "on" (toString (get .Values.settings "transcription")) -}}true{{- end -}}
{{- end -}}

{{/* Proxies that append the client's address to X-Forwarded-For: HAProxy, and what ends https in front of it. */}}
{{- define "personaplex.proxies" -}}
{{- add (ternary 1 0 .Values.serve.haProxy) (ternary 1 0 (or .Values.ingress.enabled .Values.httpRoute.enabled)) -}}
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
    {{- with include "personaplex.surge" . }}
    # A replacement starts before what it replaces stops: the groups' surgePods are room for it.
    deployments:
      {{- . | trim | nindent 6 }}
    {{- end }}
    args:
      {{- include "personaplex.settings" . | nindent 6 }}
{{- end -}}

{{/*
Serve's overrides for the deployments that have room to surge. The percentage is the largest whose share of the most
replicas, rounded up as Serve does, fits the surge pods; without room there is none, as old replicas would then go on
serving and the update never end.
*/}}
{{- define "personaplex.surge" -}}
{{- $settings := include "personaplex.settings" . | fromYaml -}}
{{- $room := dict "gateway" (mul (default 0 .Values.gateway.surgePods) .Values.gateway.perPod) "replica" 0 -}}
{{- range .Values.replicaGroups -}}
{{- $_ := set $room "replica" (add $room.replica (mul (default 0 .surgePods) .perPod)) -}}
{{- end -}}
{{- range $name, $most := dict "gateway" $settings.gateways_max "replica" $settings.replicas_max -}}
{{- $percent := min 100 (div (mul 100 (get $room $name)) $most) -}}
{{- if and (gt (int (get $room $name)) 0) (lt (int $percent) 1) -}}
{{- fail (printf "%s: room for %v more is less than 1 %% of %v, the least Serve can surge by: raise surgePods or set it to 0" (eq $name "gateway" | ternary "gateway.surgePods" "replicaGroups.*.surgePods") (get $room $name) $most) -}}
{{- end -}}
{{- if gt (int $percent) 0 }}
- name: {{ $name }}
  max_surge_percent: {{ $percent }}
{{- end -}}
{{- end -}}
{{- end -}}
