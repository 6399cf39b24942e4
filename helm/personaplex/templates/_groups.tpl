{{/*
One worker group without its name. `replicas` is left out when the autoscaler owns it, so that an upgrade never
resets what it has scaled.
*/}}
{{- define "personaplex.group" -}}
minReplicas: {{ .pod.minPods }}
maxReplicas: {{ add .pod.maxPods (default 0 .pod.surgePods) }}
{{- if .root.Values.autoscaler.enabled }}
idleTimeoutSeconds: {{ .pod.idleTimeoutSeconds }}
{{- else }}
replicas: {{ add .pod.minPods (default 0 .pod.surgePods) }}
{{- end }}
{{- if .root.Values.serve.dedicatedNodes }}
resources:
  personaplex_{{ .role }}: {{ .pod.perPod | quote }}
labels:
  personaplex.io/role: {{ .role }}
{{- end }}
rayStartParams:
  object-store-memory: {{ .pod.objectStoreBytes | quote }}
template:
  {{- include "personaplex.podTemplate" . | nindent 2 }}
{{- end -}}
