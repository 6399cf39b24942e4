{{/*
Where replicas find the weights: a volume of one of five kinds, filled beforehand or by a download.
*/}}

{{/* Downloads the weights into HF_HOME; the only container that holds the token. (list $ name marker) */}}
{{- define "personaplex.downloader" -}}
{{- $root := index . 0 -}}
- name: {{ index . 1 }}
  image: {{ include "personaplex.image" (list $root $root.Values.image) }}
  imagePullPolicy: {{ $root.Values.image.pullPolicy }}
  command: [python, -m, k8s.fetch_weights]
  args:
    - --repo={{ default "nvidia/personaplex-7b-v1" $root.Values.settings.hf_repo }}
    - --revision={{ default "main" $root.Values.settings.hf_revision }}
    {{- with index . 2 }}
    - --marker={{ . }}
    {{- end }}
  env:
    - {name: HF_HOME, value: {{ $root.Values.weights.mountPath }}/huggingface}
    {{- if $root.Values.huggingFace.existingSecret }}
    - name: HF_TOKEN
      valueFrom:
        secretKeyRef:
          name: {{ $root.Values.huggingFace.existingSecret }}
          key: {{ $root.Values.huggingFace.tokenKey }}
    {{- end }}
  # The reason of a failure, such as a token that may not read the weights, is then in the pod's status.
  terminationMessagePolicy: FallbackToLogsOnError
  resources:
    {{- $resources := deepCopy $root.Values.weights.prefetch.resources }}
    {{- if eq $root.Values.weights.source "node" }}
    {{- /* The cache lies on the node's disk: the scheduler has to know. */}}
    {{- $storage := dict "ephemeral-storage" $root.Values.weights.node.sizeLimit }}
    {{- $_ := set $resources "requests" (merge (default dict $resources.requests) $storage) }}
    {{- end }}
    {{- toYaml $resources | nindent 4 }}
  securityContext:
    {{- toYaml (merge (dict "readOnlyRootFilesystem" true) $root.Values.securityContext) | nindent 4 }}
  volumeMounts:
    - {name: tmp, mountPath: /tmp}
    {{- include "personaplex.weightsMount" (list $root false) | nindent 4 }}
{{- end -}}

{{/* Ten characters that name these weights. */}}
{{- define "personaplex.weightsHash" -}}
{{- $repo := default "nvidia/personaplex-7b-v1" .Values.settings.hf_repo -}}
{{- $revision := default "main" .Values.settings.hf_revision -}}
{{ printf "%s@%s" $repo $revision | sha256sum | trunc 10 }}
{{- end -}}

{{/* The file that says a claim holds these weights. */}}
{{- define "personaplex.weightsMarker" -}}
{{ .Values.weights.mountPath }}/ready-{{ include "personaplex.weightsHash" . }}
{{- end -}}

{{/* (list $ readOnly) */}}
{{- define "personaplex.weightsMount" -}}
{{- $weights := (index . 0).Values.weights -}}
- name: weights
  mountPath: {{ $weights.mountPath }}
  {{- if and (eq $weights.source "claim") $weights.claim.subPath }}
  subPath: {{ $weights.claim.subPath }}
  {{- end }}
  {{- if index . 1 }}
  readOnly: true
  {{- end }}
{{- end -}}

{{- define "personaplex.weightsVolume" -}}
- name: weights
  {{- if eq .Values.weights.source "claim" }}
  persistentVolumeClaim:
    claimName: {{ .Values.weights.claim.existingClaim }}
  {{- else if eq .Values.weights.source "image" }}
  image:
    {{- toYaml .Values.weights.image | nindent 4 }}
  {{- else if eq .Values.weights.source "hostPath" }}
  hostPath:
    path: {{ .Values.weights.hostPath.path }}
    type: Directory
  {{- else }}
  emptyDir:
    sizeLimit: {{ .Values.weights.node.sizeLimit }}
  {{- end }}
{{- end -}}

{{/* Init containers that a replica's weights need. */}}
{{- define "personaplex.weightsInit" -}}
{{- if eq .Values.weights.source "node" -}}
{{- include "personaplex.downloader" (list . "download-weights" "") }}
{{- else if and (eq .Values.weights.source "claim") .Values.weights.prefetch.enabled -}}
- name: wait-for-weights
  image: {{ include "personaplex.image" (list . .Values.image) }}
  imagePullPolicy: {{ .Values.image.pullPolicy }}
  command: [bash, -ec]
  args:
    - until [ -e "$MARKER" ]; do echo "waiting for $MARKER"; sleep 5; done
  env:
    - {name: MARKER, value: {{ include "personaplex.weightsMarker" . }}}
  resources:
    requests: {cpu: 10m, memory: 16Mi}
    limits: {memory: 64Mi}
  securityContext:
    {{- toYaml (merge (dict "readOnlyRootFilesystem" true) .Values.securityContext) | nindent 4 }}
  volumeMounts:
    {{- include "personaplex.weightsMount" (list . true) | nindent 4 }}
{{- end -}}
{{- end -}}
