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
{{- if .Values.adminKeys.existingSecret -}}
{{- $_ := set $settings "admin_keys_file" "/etc/personaplex-admin/keys" -}}
{{- end -}}
{{- if .Values.twilio.existingSecret -}}
{{- $_ := set $settings "twilio_token_file" "/etc/personaplex-twilio/token" -}}
{{- end -}}
{{- if .Values.card -}}
{{- range $key, $value := omit (get (include "personaplex.cards" . | fromYaml) .Values.card) "label" -}}
{{- if not (hasKey $settings $key) -}}{{- $_ := set $settings $key (int $value) -}}{{- end -}}
{{- end -}}
{{- end -}}
{{- if not (hasKey $settings "trusted_proxies") -}}
{{- $_ := set $settings "trusted_proxies" (include "personaplex.proxies" . | int) -}}
{{- end -}}
{{- toYaml $settings -}}
{{- end -}}

{{/*
What `card` stands for: settings unless they are given, and the label by which NVIDIA's GPU feature discovery names the
card. Slots are computed by k8s/sizing.py from the model's shapes and the card's data sheet; they have not been measured.
*/}}
{{- define "personaplex.cards" -}}
l40s: {slots: 12, spare_slots: 4, label: NVIDIA-L40S}
a100: {slots: 32, spare_slots: 8, label: NVIDIA-A100-SXM4-80GB}
h100: {slots: 32, spare_slots: 8, label: NVIDIA-H100-80GB-HBM3}
h200: {slots: 72, spare_slots: 16, label: NVIDIA-H200}
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

{{/*
The four timeouts, in whole seconds, as JSON:

    termination grace > node drain > graceful shutdown >= longest session

A pod that is to go gets SIGTERM; Ray drains its node; Serve waits for the replica's sessions; only then may
Kubernetes kill it. The graceful shutdown time is the service's own (Settings.drain_timeout_s: the longest
session, its wait for a slot and 5 s for the close); the other two follow. An old cluster after an upgrade is
kept for as long as its pods would be given.
*/}}
{{- define "personaplex.timeouts" -}}
{{- $session := default 1800 .Values.settings.session_limit_s | float64 -}}
{{- $queue := default 60 .Values.settings.queue_timeout_s | float64 -}}
{{- $graceful := addf $session $queue 5 | ceil | int -}}
{{- $drain := add $graceful 30 | int -}}
{{- if kindIs "invalid" .Values.timeouts.nodeDrainSeconds | not -}}{{- $drain = int .Values.timeouts.nodeDrainSeconds -}}{{- end -}}
{{- $grace := add $drain 60 | int -}}
{{- if kindIs "invalid" .Values.timeouts.terminationGraceSeconds | not -}}{{- $grace = int .Values.timeouts.terminationGraceSeconds -}}{{- end -}}
{{- $deletion := $grace -}}
{{- if kindIs "invalid" .Values.timeouts.clusterDeletionDelaySeconds | not -}}{{- $deletion = int .Values.timeouts.clusterDeletionDelaySeconds -}}{{- end -}}
{{- dict "session" ($session | ceil | int) "graceful" $graceful "drain" $drain "grace" $grace "deletion" $deletion | toJson -}}
{{- end -}}
