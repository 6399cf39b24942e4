{{/*
Pod templates of the head, the gateways and the replicas.

KubeRay starts a whole new cluster when anything here changes, which takes a second set of GPUs: chart version,
app version and checksums must never appear in this file.
*/}}

{{/* Environment of every Ray container: (list $ role), role one of head, gateway, replica. */}}
{{- define "personaplex.env" -}}
{{- $root := index . 0 -}}{{- $role := index . 1 -}}
{{- $timeouts := include "personaplex.timeouts" $root | fromJson -}}
- {name: RAY_USAGE_STATS_ENABLED, value: "0"}
# Ray lowers the priority of its workers by default, which costs a busy node tens of milliseconds.
- {name: RAY_worker_niceness, value: "0"}
# A role text of 1000 Chinese characters makes a request line of 9 KB.
- {name: WEBSOCKETS_MAX_LINE_LENGTH, value: "32768"}
# Limits in whatever process reads a client's bytes first, proxy or gateway.
- {name: RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH, value: deployments.ingress.configure}
# A busy gateway answers a proxy late; at Serve's 1 s it is asked again and again, and nobody new gets in.
- {name: RAY_SERVE_MAX_QUEUE_LENGTH_RESPONSE_DEADLINE_S, value: "10"}
- {name: RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S, value: {{ $timeouts.drain | quote }}}
# Serve learns of new sessions every 10 s by default: too late for people who wait.
- {name: RAY_SERVE_HANDLE_AUTOSCALING_METRIC_PUSH_INTERVAL_S, value: "1"}
- {name: RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S, value: "1"}
- {name: RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S, value: {{ $root.Values.serve.proxyHealthCheckPeriodSeconds | quote }}}
{{- if $root.Values.serve.haProxy }}
# A reload of HAProxy leaves old sockets to the old process: it must outlive the longest session.
- {name: RAY_SERVE_ENABLE_HA_PROXY, value: "1"}
# HAProxy that goes with the actor it is a child of; Serve's own stays and holds the ports.
- {name: RAY_SERVE_HAPROXY_BINARY_PATH, value: /opt/personaplex/bin/personaplex-haproxy}
- {name: RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S, value: {{ $timeouts.graceful | quote }}}
- {name: RAY_SERVE_PORT_QUARANTINE_S, value: {{ add $timeouts.graceful 30 | quote }}}
- {name: RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S, value: {{ $timeouts.graceful | quote }}}
{{- end }}
{{- if eq $role "gateway" }}
# A gateway's own event loop carries its sockets: one thread less on each frame's way.
- {name: RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD, value: "0"}
- {name: RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP, value: "0"}
{{- end }}
{{- if and (eq $role "replica") (ne $root.Values.weights.source "none") }}
- {name: HF_HOME, value: {{ $root.Values.weights.mountPath }}/huggingface}
- {name: HF_HUB_OFFLINE, value: "1"}
{{- end }}
{{- end -}}

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

{{/* A node selector; a label set to null in a later values file is none, so that one can replace a card's. */}}
{{- define "personaplex.nodeSelector" -}}
{{- range $label, $value := . }}
{{- if not (kindIs "invalid" $value) }}
{{ $label }}: {{ $value | quote }}
{{- end }}
{{- end }}
{{- end -}}

{{/* Ports of the Ray container: (list $ role). */}}
{{- define "personaplex.ports" -}}
{{- $root := index . 0 -}}
{{- if eq (index . 1) "head" -}}
- {name: gcs-server, containerPort: 6379}
- {name: dashboard, containerPort: 8265}
- {name: client, containerPort: 10001}
- {name: as-metrics, containerPort: 44217}
- {name: dash-metrics, containerPort: 44227}
{{ end -}}
- {name: serve, containerPort: {{ $root.Values.serve.port }}}
- {name: metrics, containerPort: 8080}
{{- end -}}

{{/*
dict root, role (head | gateway | replica), pod (the values of the role), image, gpus -> a pod template.
*/}}
{{- define "personaplex.podTemplate" -}}
{{- $root := .root -}}{{- $role := .role -}}{{- $pod := .pod -}}{{- $image := .image -}}
{{- $timeouts := include "personaplex.timeouts" $root | fromJson -}}
{{- $weights := and (eq $role "replica") (ne $root.Values.weights.source "none") -}}
{{- $keys := and (eq $role "gateway") $root.Values.apiKeys.existingSecret -}}
{{- $twilio := and (eq $role "gateway") $root.Values.twilio.existingSecret -}}
metadata:
  labels:
    {{- include "personaplex.selectorLabels" $root | nindent 4 }}
    app.kubernetes.io/component: {{ $role }}
    {{- with $pod.podLabels }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  annotations:
    {{- $annotations := dict
      "cluster-autoscaler.kubernetes.io/safe-to-evict" "false"
      "karpenter.sh/do-not-disrupt" "true"
      "kubectl.kubernetes.io/default-container" "ray" }}
    {{- merge (deepCopy (default dict $pod.podAnnotations)) $annotations | toYaml | nindent 4 }}
spec:
  {{- if and (has $role (list "replica" "transcriber")) $root.Values.serve.dedicatedNodes }}
  # KubeRay labels every worker as serving and leaves it to readiness which of them take sockets. Nothing ever sets
  # this condition, so a replica's pod is no endpoint of the Service: its loss ends no session but its own.
  readinessGates:
    - conditionType: personaplex.io/takes-sockets
  {{- end }}
  enableServiceLinks: false
  {{- if not (and (eq $role "head") $root.Values.autoscaler.enabled) }}
  automountServiceAccountToken: false
  {{- end }}
  {{- with $pod.serviceAccountName }}
  serviceAccountName: {{ . }}
  {{- end }}
  terminationGracePeriodSeconds: {{ $timeouts.grace }}
  securityContext:
    {{- toYaml $root.Values.podSecurityContext | nindent 4 }}
  {{- with $root.Values.imagePullSecrets }}
  imagePullSecrets:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with include "personaplex.nodeSelector" $pod.nodeSelector | trim }}
  nodeSelector:
    {{- . | nindent 4 }}
  {{- end }}
  {{- range $key := list "tolerations" "affinity" "topologySpreadConstraints" "priorityClassName" "runtimeClassName" }}
  {{- with get $pod $key }}
  {{ $key }}:
    {{- if kindIs "string" . }} {{ . }}{{ else }}{{ toYaml . | nindent 4 }}{{ end }}
  {{- end }}
  {{- end }}
  {{- if or $pod.initContainers (and $weights (include "personaplex.weightsInit" $root)) }}
  initContainers:
    {{- if $weights }}
    {{- include "personaplex.weightsInit" $root | nindent 4 }}
    {{- end }}
    {{- with $pod.initContainers }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  {{- end }}
  containers:
    - name: ray
      image: {{ include "personaplex.image" (list $root $image) }}
      imagePullPolicy: {{ $image.pullPolicy }}
      ports:
        {{- include "personaplex.ports" (list $root $role) | nindent 8 }}
      env:
        {{- include "personaplex.env" (list $root $role) | nindent 8 }}
        {{- with $pod.extraEnv }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
      {{- with $pod.extraEnvFrom }}
      envFrom:
        {{- toYaml . | nindent 8 }}
      {{- end }}
      resources:
        {{- $resources := deepCopy $pod.resources }}
        {{- if gt (int .gpus) 0 }}
        {{- range $key := list "requests" "limits" }}
        {{- $_ := set $resources $key (set (default dict (get $resources $key)) "nvidia.com/gpu" (toString (int $.gpus))) }}
        {{- end }}
        {{- end }}
        {{- /* Logs and Ray's spilled objects; without a request, a full disk evicts this pod first. */}}
        {{- $_ := set $resources "requests" (merge (default dict $resources.requests) (dict "ephemeral-storage" "4Gi")) }}
        {{- toYaml $resources | nindent 8 }}
      securityContext:
        {{- toYaml $root.Values.securityContext | nindent 8 }}
      volumeMounts:
        - {name: tmp, mountPath: /tmp}
        - {name: shared-memory, mountPath: /dev/shm}
        {{- if $weights }}
        {{- include "personaplex.weightsMount" (list $root true) | nindent 8 }}
        {{- end }}
        {{- if $keys }}
        - {name: api-keys, mountPath: /etc/personaplex, readOnly: true}
        {{- end }}
        {{- if $twilio }}
        - {name: twilio, mountPath: /etc/personaplex-twilio, readOnly: true}
        {{- end }}
        {{- with $pod.extraVolumeMounts }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
  volumes:
    - name: tmp
      emptyDir: {}
    - name: shared-memory
      emptyDir: {medium: Memory, sizeLimit: {{ $pod.shmSize }}}
    {{- if $weights }}
    {{- include "personaplex.weightsVolume" $root | nindent 4 }}
    {{- end }}
    {{- if $keys }}
    - name: api-keys
      secret:
        secretName: {{ $root.Values.apiKeys.existingSecret }}
        items: [{key: {{ $root.Values.apiKeys.key }}, path: keys}]
    {{- end }}
    {{- if $twilio }}
    - name: twilio
      secret:
        secretName: {{ $root.Values.twilio.existingSecret }}
        items: [{key: {{ $root.Values.twilio.key }}, path: token}]
    {{- end }}
    {{- with $pod.extraVolumes }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
{{- end -}}
