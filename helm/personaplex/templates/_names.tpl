{{/* Object names and labels. RayService names have at most 47 characters: longer ones are refused, not cut. */}}

{{- define "personaplex.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride -}}
{{- else -}}
{{- $name := default .Chart.Name .Values.nameOverride -}}
{{- if contains $name .Release.Name -}}{{ .Release.Name }}{{- else -}}{{ printf "%s-%s" .Release.Name $name }}{{- end -}}
{{- end -}}
{{- end -}}

{{/* The Service that KubeRay makes for the serving pods. */}}
{{- define "personaplex.serveService" -}}
{{ include "personaplex.fullname" . }}-serve-svc
{{- end -}}

{{/* What never changes between versions: fit for selectors and for Ray's pods. */}}
{{- define "personaplex.selectorLabels" -}}
app.kubernetes.io/name: {{ default .Chart.Name .Values.nameOverride }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "personaplex.labels" -}}
{{ include "personaplex.selectorLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- with .Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* The ServiceAccount of every pod but an autoscaling head; empty is the namespace's default. */}}
{{- define "personaplex.serviceAccount" -}}
{{- if .Values.serviceAccount.create -}}
{{- default (include "personaplex.fullname" .) .Values.serviceAccount.name -}}
{{- else -}}
{{- .Values.serviceAccount.name -}}
{{- end -}}
{{- end -}}

{{/* repository:tag or repository@digest of (list $ .Values.image). */}}
{{- define "personaplex.image" -}}
{{- $root := index . 0 -}}
{{- $image := index . 1 -}}
{{- if $image.digest -}}
{{ printf "%s@%s" $image.repository $image.digest }}
{{- else -}}
{{ printf "%s:%s" $image.repository (default $root.Chart.AppVersion $image.tag) }}
{{- end -}}
{{- end -}}
