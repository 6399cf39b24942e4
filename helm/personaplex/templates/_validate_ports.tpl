{{/*
Ports of a Ray pod that Ray and its Serve take for themselves: (list first last what), by default settings.
*/}}
{{- define "personaplex.reservedPorts" -}}
- [6379, 6379, "Ray's GCS"]
- [8080, 8080, "Ray's metrics"]
- [8265, 8265, "Ray's dashboard"]
- [8500, 8500, "Serve's fallback proxy"]
- [9500, 9500, "Serve's fallback proxy"]
- [10001, 10001, "Ray's client server"]
- [10002, 19999, "Ray's workers"]
- [44217, 44217, "the autoscaler's metrics"]
- [44227, 44227, "the dashboard's metrics"]
- [52365, 52365, "Ray's dashboard agent"]
{{- if .Values.serve.haProxy }}
- [8404, 8404, "HAProxy's statistics"]
- [9101, 9101, "HAProxy's metrics"]
- [30000, 31000, "gateways behind HAProxy"]
- [40000, 41000, "gateways behind HAProxy"]
{{- end }}
{{- end -}}

{{- define "personaplex.validatePorts" -}}
{{- $first := default 0 .Values.settings.media_port_min | int -}}
{{- $last := default 0 .Values.settings.media_port_max | int -}}
{{- $port := int .Values.serve.port -}}
{{- if lt $last $first -}}{{- fail (printf "settings.media_port_max is %d, less than the media_port_min of %d" $last $first) -}}{{- end -}}
{{- if and (eq $first 0) (gt $last 0) -}}{{- fail "settings.media_port_max needs settings.media_port_min" -}}{{- end -}}
{{- if and (ge $port $first) (le $port $last) -}}
{{- fail (printf "serve.port is %d, one of the media ports %d to %d (settings.media_port_min, media_port_max)" $port $first $last) -}}
{{- end -}}
{{- range include "personaplex.reservedPorts" . | fromYamlArray -}}
{{- $low := index . 0 | int -}}{{- $high := index . 1 | int -}}{{- $what := index . 2 -}}
{{- if and (ge $port $low) (le $port $high) -}}{{- fail (printf "serve.port is %d, which belongs to %s" $port $what) -}}{{- end -}}
{{- if and (gt $first 0) (le $first $high) (ge $last $low) -}}
{{- fail (printf "settings.media_port_min to media_port_max (%d to %d) reach over %d to %d, which belong to %s" $first $last $low $high $what) -}}
{{- end -}}
{{- end -}}
{{- range $name, $group := .Values.replicaGroups -}}
{{- if and (gt $first 0) (lt (add (sub $last $first) 1 | int) (int $group.perPod)) -}}
{{- fail (printf "replicaGroups.%s: %d media ports for %v replicas in a pod" $name (add (sub $last $first) 1 | int) $group.perPod) -}}
{{- end -}}
{{- end -}}
{{- end -}}
