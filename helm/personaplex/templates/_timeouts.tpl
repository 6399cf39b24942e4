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
