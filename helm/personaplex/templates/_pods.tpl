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

{{/* A node selector; a label set to null in a later values file is none, so that one can replace a card's. */}}
{{- define "personaplex.nodeSelector" -}}
{{- range $label, $value := . }}
{{- if not (kindIs "invalid" $value) }}
{{ $label }}: {{ $value | quote }}
{{- end }}
{{- end }}
{{- end -}}

{{/* What the kubelet calls a GPU of a replica group; empty where a claim of podSpec.resourceClaims brings it. */}}
{{- define "personaplex.gpuResource" -}}
{{- hasKey . "gpuResource" | ternary .gpuResource "nvidia.com/gpu" -}}
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
dict root, role (head | gateway | transcriber | replica), pod (the values of the role), image, gpus -> a pod template.
*/}}
{{- define "personaplex.podTemplate" -}}
{{- $root := .root -}}{{- $role := .role -}}{{- $pod := .pod -}}
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
{{- $spec := include "personaplex.podSpec" . -}}
{{- with $pod.podSpec -}}{{- $spec = include "personaplex.withPodSpec" (dict "spec" $spec "over" .) -}}{{- end }}
spec:
  {{- $spec | trim | nindent 2 }}
{{- end -}}

{{/* The spec of a pod by the chart's own values; takes the same as podTemplate. */}}
{{- define "personaplex.podSpec" -}}
{{- $root := .root -}}{{- $role := .role -}}{{- $pod := .pod -}}{{- $image := .image -}}
{{- $timeouts := include "personaplex.timeouts" $root | fromJson -}}
{{- $weights := and (eq $role "replica") (ne $root.Values.weights.source "none") -}}
{{- $keys := and (eq $role "gateway") $root.Values.apiKeys.existingSecret -}}
{{- $admin := and (eq $role "gateway") $root.Values.adminKeys.existingSecret -}}
{{- $twilio := and (eq $role "gateway") $root.Values.twilio.existingSecret -}}
{{- if and (has $role (list "replica" "transcriber")) $root.Values.serve.dedicatedNodes }}
# KubeRay labels every worker as serving and leaves it to readiness which of them take sockets. Nothing ever sets
# this condition, so a replica's pod is no endpoint of the Service: its loss ends no session but its own.
readinessGates:
  - conditionType: personaplex.io/takes-sockets
{{- end }}
enableServiceLinks: false
{{- /* Only Ray's autoscaler speaks to the API server: KubeRay makes its account, and binds the role to any other. */}}
{{- if not (and (eq $role "head") $root.Values.autoscaler.enabled) }}
automountServiceAccountToken: false
{{- with include "personaplex.serviceAccount" $root }}
serviceAccountName: {{ . }}
{{- end }}
{{- end }}
terminationGracePeriodSeconds: {{ $timeouts.grace }}
securityContext:
  {{- toYaml $root.Values.podSecurityContext | nindent 2 }}
{{- with $root.Values.imagePullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- $selector := $pod.nodeSelector }}
{{- if and $root.Values.card (gt (int .gpus) 0) (not (hasKey $pod "nodeSelector")) }}
{{- $card := get (include "personaplex.cards" $root | fromYaml) $root.Values.card }}
{{- $selector = dict "nvidia.com/gpu.product" $card.label }}
{{- end }}
{{- with include "personaplex.nodeSelector" $selector | trim }}
nodeSelector:
  {{- . | nindent 2 }}
{{- end }}
{{- with $pod.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- if eq $role "gateway" }}
# A wish, not a rule: the loss of one node or zone should not take every gateway.
topologySpreadConstraints:
  {{- range list "kubernetes.io/hostname" "topology.kubernetes.io/zone" }}
  - maxSkew: 1
    topologyKey: {{ . }}
    whenUnsatisfiable: ScheduleAnyway
    labelSelector:
      matchLabels:
        {{- include "personaplex.selectorLabels" $root | nindent 8 }}
        app.kubernetes.io/component: gateway
    # Each Ray cluster by itself: while an upgrade lasts there are two.
    matchLabelKeys: [ray.io/cluster]
  {{- end }}
{{- end }}
{{- if and $weights (include "personaplex.weightsInit" $root) }}
initContainers:
  {{- include "personaplex.weightsInit" $root | nindent 2 }}
{{- end }}
containers:
  - name: ray
    image: {{ include "personaplex.image" (list $root $image) }}
    imagePullPolicy: {{ $image.pullPolicy }}
    ports:
      {{- include "personaplex.ports" (list $root $role) | nindent 6 }}
    env:
      {{- include "personaplex.env" (list $root $role) | nindent 6 }}
      {{- with $pod.extraEnv }}
      {{- toYaml . | nindent 6 }}
      {{- end }}
    resources:
      {{- $resources := deepCopy $pod.resources }}
      {{- $gpu := include "personaplex.gpuResource" $pod }}
      {{- if and $gpu (gt (int .gpus) 0) }}
      {{- range $key := list "requests" "limits" }}
      {{- $_ := set $resources $key (set (default dict (get $resources $key)) $gpu (toString (int $.gpus))) }}
      {{- end }}
      {{- end }}
      {{- /* Logs and Ray's spilled objects; without a request, a full disk evicts this pod first. */}}
      {{- $_ := set $resources "requests" (merge (default dict $resources.requests) (dict "ephemeral-storage" "4Gi")) }}
      {{- toYaml $resources | nindent 6 }}
    securityContext:
      {{- toYaml $root.Values.securityContext | nindent 6 }}
    volumeMounts:
      - {name: tmp, mountPath: /tmp}
      - {name: shared-memory, mountPath: /dev/shm}
      {{- if $weights }}
      {{- include "personaplex.weightsMount" (list $root true) | nindent 6 }}
      {{- end }}
      {{- if $keys }}
      - {name: api-keys, mountPath: /etc/personaplex, readOnly: true}
      {{- end }}
      {{- if $admin }}
      - {name: admin-keys, mountPath: /etc/personaplex-admin, readOnly: true}
      {{- end }}
      {{- if $twilio }}
      - {name: twilio, mountPath: /etc/personaplex-twilio, readOnly: true}
      {{- end }}
volumes:
  - name: tmp
    emptyDir: {}
  - name: shared-memory
    emptyDir: {medium: Memory, sizeLimit: {{ $pod.shmSize }}}
  {{- if $weights }}
  {{- include "personaplex.weightsVolume" $root | nindent 2 }}
  {{- end }}
  {{- if $keys }}
  - name: api-keys
    secret:
      secretName: {{ $root.Values.apiKeys.existingSecret }}
      items: [{key: {{ $root.Values.apiKeys.key }}, path: keys}]
  {{- end }}
  {{- if $admin }}
  - name: admin-keys
    secret:
      secretName: {{ $root.Values.adminKeys.existingSecret }}
      items: [{key: {{ $root.Values.adminKeys.key }}, path: keys}]
  {{- end }}
  {{- if $twilio }}
  - name: twilio
    secret:
      secretName: {{ $root.Values.twilio.existingSecret }}
      items: [{key: {{ $root.Values.twilio.key }}, path: token}]
  {{- end }}
{{- end -}}

{{/*
(dict "spec" a pod's spec as YAML, "over" the values' podSpec) -> the spec with podSpec on top. Containers, init
containers and volumes are added, except for `ray`, into which its namesake is merged.
*/}}
{{- define "personaplex.withPodSpec" -}}
{{- $spec := fromYaml .spec -}}{{- $over := deepCopy .over -}}
{{- $ray := first $spec.containers -}}{{- $sidecars := list -}}
{{- range $over.containers -}}
{{- if eq .name "ray" -}}
{{- $changes := . -}}
{{- range $key := list "env" "envFrom" "volumeMounts" -}}
{{- with get $changes $key -}}{{- $_ := set $changes $key (concat (default list (get $ray $key)) .) -}}{{- end -}}
{{- end -}}
{{- $ray = include "personaplex.merge" (dict "old" $ray "new" $changes) | fromJson -}}
{{- else -}}
{{- $sidecars = append $sidecars . -}}
{{- end -}}
{{- end -}}
{{- $_ := set $over "containers" (prepend $sidecars $ray) -}}
{{- range $key := list "initContainers" "volumes" -}}
{{- with get $over $key -}}{{- $_ := set $over $key (concat (default list (get $spec $key)) .) -}}{{- end -}}
{{- end -}}
{{- include "personaplex.merge" (dict "old" $spec "new" $over) | fromJson | toYaml -}}
{{- end -}}

{{/*
(dict "old" MAP "new" MAP) -> JSON of both: maps are merged, null removes, everything else of `new` replaces what
was there. Not Sprig's mergeOverwrite, for which false, 0 and an empty list are nothing.
*/}}
{{- define "personaplex.merge" -}}
{{- $merged := deepCopy .old -}}
{{- range $key, $value := .new -}}
{{- $there := get $merged $key -}}
{{- if and (kindIs "map" $value) (kindIs "map" $there) -}}
{{- $_ := set $merged $key (include "personaplex.merge" (dict "old" $there "new" $value) | fromJson) -}}
{{- else if kindIs "invalid" $value -}}
{{- $_ := unset $merged $key -}}
{{- else -}}
{{- $_ := set $merged $key $value -}}
{{- end -}}
{{- end -}}
{{- toJson $merged -}}
{{- end -}}

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
{{- $resources := dict }}
{{- if .root.Values.serve.dedicatedNodes }}
{{- $_ := set $resources (printf "personaplex_%s" .role) (toString .pod.perPod) }}
{{- end }}
{{- /* Ray knows a GPU by a name that ends with `gpu`; a part of a card and a claimed device it has to be told. */}}
{{- if and (gt (int .gpus) 0) (ne "nvidia.com/gpu" (include "personaplex.gpuResource" .pod)) }}
{{- $_ := set $resources "GPU" (toString .gpus) }}
{{- end }}
{{- with $resources }}
resources:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- if .root.Values.serve.dedicatedNodes }}
labels:
  personaplex.io/role: {{ .role }}
{{- end }}
rayStartParams:
  object-store-memory: {{ .pod.objectStoreBytes | quote }}
template:
  {{- include "personaplex.podTemplate" . | nindent 2 }}
{{- end -}}
