{{/*
What a schema cannot say about pods: numbers that do not fit each other, names that are taken. Each message begins
with the path of the value to change.
*/}}

{{- define "personaplex.validateGroups" -}}
{{- if not .Values.replicaGroups -}}{{- fail "replicaGroups is empty: nothing would run the model" -}}{{- end -}}
{{- $needed := list "minPods" "maxPods" "perPod" "gpusPerPod" "idleTimeoutSeconds" "objectStoreBytes" "shmSize" "resources" -}}
{{- range $name, $group := .Values.replicaGroups -}}
{{- with get (dict "gateway" "gateways" "transcriber" "transcribers" "head" "head" "headgroup" "head") $name -}}{{- fail (printf "replicaGroups.%s: the name belongs to the %s" $name .) -}}{{- end -}}
{{- if not (regexMatch "^[a-z]([-a-z0-9]{0,18}[a-z0-9])?$" $name) -}}
{{- fail (printf "replicaGroups.%s: a group's name has at most 20 of a-z, 0-9 and -, and begins with a letter" $name) -}}
{{- end -}}
{{- range $needed -}}
{{- if not (hasKey $group .) -}}{{- fail (printf "replicaGroups.%s.%s is missing" $name .) -}}{{- end -}}
{{- end -}}
{{- end -}}
{{- include "personaplex.validatePodCounts" (dict "root" . "path" "gateway" "group" .Values.gateway) -}}
{{- if include "personaplex.transcribes" . -}}
{{- include "personaplex.validatePodCounts" (dict "root" . "path" "transcriber" "group" .Values.transcriber) -}}
{{- end -}}
{{- $wanted := default 0 .Values.settings.replica_num_gpus | float64 -}}
{{- range $name, $group := .Values.replicaGroups -}}
{{- include "personaplex.validatePodCounts" (dict "root" $ "path" (printf "replicaGroups.%s" $name) "group" $group) -}}
{{- if gt (mulf $wanted (float64 $group.perPod)) (float64 $group.gpusPerPod) -}}
{{- fail (printf "replicaGroups.%s: %v replicas of %v GPUs do not fit in %v" $name $group.perPod $wanted $group.gpusPerPod) -}}
{{- end -}}
{{- $resource := include "personaplex.gpuResource" $group -}}
{{- if hasPrefix "nvidia.com/mig-" $resource -}}
{{- if gt (int $group.gpusPerPod) 1 -}}{{- fail (printf "replicaGroups.%s.gpusPerPod is %v: a process sees one %s at a time" $name $group.gpusPerPod $resource) -}}{{- end -}}
{{- if $.Values.card -}}{{- fail (printf "card %s is a whole card, replicaGroups.%s.gpuResource a part of one: leave card out and set settings.slots (python -m k8s slots)" $.Values.card $name) -}}{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "personaplex.validatePodCounts" -}}
{{- if gt (int .group.minPods) (int .group.maxPods) -}}{{- fail (printf "%s.minPods is %v, more than the maxPods of %v" .path .group.minPods .group.maxPods) -}}{{- end -}}
{{- if and (not .root.Values.autoscaler.enabled) (ne (int .group.minPods) (int .group.maxPods)) -}}
{{- fail (printf "%s: without autoscaler.enabled minPods must equal maxPods" .path) -}}
{{- end -}}
{{- end -}}

{{- define "personaplex.validatePods" -}}
{{- include "personaplex.validatePod" (dict "root" . "path" "head" "pod" .Values.head "cpus" 0.0 "volumes" list) -}}
{{- $keys := empty .Values.apiKeys.existingSecret | not | ternary (list "api-keys") list -}}
{{- $keys = empty .Values.adminKeys.existingSecret | ternary $keys (append $keys "admin-keys") -}}
{{- $keys = empty .Values.twilio.existingSecret | ternary $keys (append $keys "twilio") -}}
{{- $each := hasKey .Values.settings "gateway_num_cpus" | ternary .Values.settings.gateway_num_cpus 1 -}}
{{- $asks := printf "%v gateways of settings.gateway_num_cpus %v" .Values.gateway.perPod $each -}}
{{- include "personaplex.validatePod" (dict "root" . "path" "gateway" "pod" .Values.gateway "cpus" (mulf (float64 .Values.gateway.perPod) (float64 $each)) "asks" $asks "volumes" $keys) -}}
{{- $each = hasKey .Values.settings "transcriber_num_cpus" | ternary .Values.settings.transcriber_num_cpus 1 -}}
{{- $asks = printf "%v transcribers of settings.transcriber_num_cpus %v" .Values.transcriber.perPod $each -}}
{{- include "personaplex.validatePod" (dict "root" . "path" "transcriber" "pod" .Values.transcriber "cpus" (mulf (float64 .Values.transcriber.perPod) (float64 $each)) "asks" $asks "volumes" list) -}}
{{- $weights := ne .Values.weights.source "none" | ternary (list "weights") list -}}
{{- range $name, $group := .Values.replicaGroups -}}
{{- $each := hasKey $.Values.settings "replica_num_cpus" | ternary $.Values.settings.replica_num_cpus 1 -}}
{{- $asks := printf "%v replicas of settings.replica_num_cpus %v" $group.perPod $each -}}
{{- include "personaplex.validatePod" (dict "root" $ "path" (printf "replicaGroups.%s" $name) "pod" $group "cpus" (mulf (float64 $group.perPod) (float64 $each)) "asks" $asks "volumes" $weights) -}}
{{- end -}}
{{- include "personaplex.validateTolerations" (dict "path" "weights.prefetch" "tolerations" .Values.weights.prefetch.tolerations) -}}
{{- range $path, $resources := dict "autoscaler.resources" .Values.autoscaler.resources "weights.prefetch.resources" .Values.weights.prefetch.resources "test.resources" .Values.test.resources -}}
{{- include "personaplex.validateResources" (dict "path" $path "resources" $resources) -}}
{{- end -}}
{{- end -}}

{{- define "personaplex.validatePod" -}}
{{- include "personaplex.validateResources" (dict "path" (printf "%s.resources" .path) "resources" .pod.resources) -}}
{{- $requests := default dict .pod.resources.requests -}}{{- $limits := default dict .pod.resources.limits -}}
{{- range list "cpu" "memory" -}}
{{- if not (or (hasKey $requests .) (hasKey $limits .)) -}}
{{- fail (printf "%s.resources names no %s: Ray's autoscaler has to know what a pod offers" $.path .) -}}
{{- end -}}
{{- end -}}
{{- $offer := include "personaplex.quantity" (default $requests.cpu $limits.cpu) | float64 | ceil -}}
{{- if gt (float64 .cpus) (float64 $offer) -}}
{{- fail (printf "%s.resources: %s need %v CPUs, the pod has %v: Ray would never place them" .path .asks .cpus $offer) -}}
{{- end -}}
{{- $store := float64 .pod.objectStoreBytes -}}
{{- if gt $store (include "personaplex.quantity" .pod.shmSize | float64) -}}
{{- fail (printf "%s.shmSize is %v, less than the objectStoreBytes of %s that lie in it" .path .pod.shmSize .pod.objectStoreBytes) -}}
{{- end -}}
{{- if ge $store (include "personaplex.quantity" (default $limits.memory $requests.memory) | float64) -}}
{{- fail (printf "%s.objectStoreBytes is %s, all of the pod's memory or more" .path .pod.objectStoreBytes) -}}
{{- end -}}
{{- include "personaplex.validateEnv" (dict "path" (printf "%s.extraEnv" .path) "env" .pod.extraEnv "seen" dict) -}}
{{- include "personaplex.validatePodSpec" . -}}
{{- include "personaplex.validateTolerations" (dict "path" .path "tolerations" .pod.tolerations) -}}
{{- range $label, $_ := default dict .pod.podLabels -}}
{{- if or (hasPrefix "ray.io/" $label) (has $label (list "app.kubernetes.io/name" "app.kubernetes.io/instance" "app.kubernetes.io/component")) -}}
{{- fail (printf "%s.podLabels.%s: Services and policies select pods by it" $.path $label) -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "personaplex.validateResources" -}}
{{- $limits := default dict .resources.limits -}}
{{- range $name, $request := default dict .resources.requests -}}
{{- if hasKey $limits $name -}}
{{- $limit := get $limits $name -}}
{{- if gt (include "personaplex.quantity" $request | float64) (include "personaplex.quantity" $limit | float64) -}}
{{- fail (printf "%s.limits.%s is %v, less than the request of %v" $.path $name $limit $request) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* Variables that extraEnv may not set: those of the chart, whatever the values, and those of KubeRay. */}}
{{- define "personaplex.ownVariables" -}}
RAY_USAGE_STATS_ENABLED RAY_worker_niceness WEBSOCKETS_MAX_LINE_LENGTH
RAY_SERVE_MAX_QUEUE_LENGTH_RESPONSE_DEADLINE_S RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S
RAY_SERVE_HANDLE_AUTOSCALING_METRIC_PUSH_INTERVAL_S RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S
RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S RAY_SERVE_ENABLE_HA_PROXY RAY_SERVE_HAPROXY_BINARY_PATH
RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S RAY_SERVE_PORT_QUARANTINE_S RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S
RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH
HF_HOME HF_HUB_OFFLINE HF_TOKEN
RAY_ADDRESS RAY_CLUSTER_NAME RAY_CLOUD_INSTANCE_ID RAY_NODE_TYPE_NAME RAY_IP FQ_RAY_IP RAY_PORT RAY_AUTH_MODE RAY_AUTH_TOKEN
RAY_REDIS_ADDRESS REDIS_PASSWORD REDIS_USERNAME RAY_enable_autoscaler_v2 KUBERAY_GEN_RAY_START_CMD
{{- end -}}

{{/* (dict "path" "env" "seen" names so far) */}}
{{- define "personaplex.validateEnv" -}}
{{- $taken := include "personaplex.ownVariables" . | replace "\n" " " | splitList " " -}}
{{- range $index, $variable := default list .env -}}
{{- if has $variable.name $taken -}}
{{- fail (printf "%s[%d]: %s is set by the chart or by KubeRay; a second value would silently win" $.path $index $variable.name) -}}
{{- end -}}
{{- if hasKey $.seen $variable.name -}}{{- fail (printf "%s[%d]: %s is there twice" $.path $index $variable.name) -}}{{- end -}}
{{- $_ := set $.seen $variable.name true -}}
{{- end -}}
{{- end -}}

{{- define "personaplex.validateTolerations" -}}
{{- range $index, $toleration := default list .tolerations -}}
{{- $path := printf "%s.tolerations[%d]" $.path $index -}}
{{- if eq (default "Equal" $toleration.operator) "Exists" -}}
{{- if $toleration.value -}}{{- fail (printf "%s: operator Exists takes no value" $path) -}}{{- end -}}
{{- else if not $toleration.key -}}
{{- fail (printf "%s: operator Equal needs a key" $path) -}}
{{- end -}}
{{- if and (hasKey $toleration "tolerationSeconds") (ne (default "" $toleration.effect) "NoExecute") -}}
{{- fail (printf "%s: tolerationSeconds belongs to the effect NoExecute" $path) -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* What podSpec may not change, and why; `ray.` is a field of the Ray container. */}}
{{- define "personaplex.ownFields" -}}
terminationGracePeriodSeconds: timeouts.terminationGraceSeconds sets it, in order with the other timeouts
restartPolicy: Ray's autoscaler needs pods that are not started again
readinessGates: they keep sockets off the pods that take none
hostNetwork: no network policy covers such a pod, and Ray's ports would be open to everyone
ray.image: image and gatewayImage set it
ray.imagePullPolicy: image.pullPolicy and gatewayImage.pullPolicy set it
ray.command: KubeRay writes the command that starts Ray
ray.args: KubeRay writes the command that starts Ray
ray.ports: Services, policies and monitors know its ports
ray.lifecycle: a hook would delay or replace Ray's own drain, in which sessions end
{{- end -}}

{{- define "personaplex.validatePodSpec" -}}
{{- $over := default dict .pod.podSpec -}}
{{- range $field, $why := include "personaplex.ownFields" . | fromYaml -}}
{{- if hasKey $over $field -}}{{- fail (printf "%s.podSpec.%s cannot be changed: %s" $.path $field $why) -}}{{- end -}}
{{- end -}}
{{- if and (eq .path "head") .root.Values.autoscaler.enabled (eq "false" (toString (get $over "automountServiceAccountToken"))) -}}
{{- fail "head.podSpec.automountServiceAccountToken cannot be false with autoscaler.enabled: the autoscaler speaks to the API server" -}}
{{- end -}}
{{- $ray := dict -}}
{{- range $index, $container := default list $over.containers -}}
{{- $path := printf "%s.podSpec.containers[%d]" $.path $index -}}
{{- if eq $container.name "ray" -}}
{{- $ray = $container -}}
{{- range $field, $why := include "personaplex.ownFields" $ | fromYaml -}}
{{- if and (hasPrefix "ray." $field) (hasKey $container (trimPrefix "ray." $field)) -}}{{- fail (printf "%s.%s cannot be changed: %s" $path (trimPrefix "ray." $field) $why) -}}{{- end -}}
{{- end -}}
{{- if omit (default dict $container.resources) "claims" -}}{{- fail (printf "%s.resources cannot be changed but for its claims: use %s.resources" $path $.path) -}}{{- end -}}
{{- $seen := dict -}}
{{- range default list $.pod.extraEnv -}}{{- $_ := set $seen .name true -}}{{- end -}}
{{- include "personaplex.validateEnv" (dict "path" (printf "%s.env" $path) "env" $container.env "seen" $seen) -}}
{{- else if not $container.image -}}
{{- fail (printf "%s: a container beside ray needs an image" $path) -}}
{{- end -}}
{{- end -}}
{{- $claimed := and (hasKey .pod "gpuResource") (not .pod.gpuResource) (gt (int .pod.gpusPerPod) 0) -}}
{{- if and $claimed (not (and $over.resourceClaims (dig "resources" "claims" list $ray))) -}}
{{- fail (printf "%s.gpuResource is empty: name a claim in podSpec.resourceClaims, and in resources.claims of the container ray there" .path) -}}
{{- end -}}
{{- include "personaplex.validateTolerations" (dict "path" (printf "%s.podSpec" .path) "tolerations" $over.tolerations) -}}
{{- include "personaplex.validateVolumes" . -}}
{{- end -}}

{{- define "personaplex.validateVolumes" -}}
{{- $over := default dict .pod.podSpec -}}
{{- $names := concat (list "tmp" "shared-memory") .volumes -}}
{{- range $index, $volume := default list $over.volumes -}}
{{- if has $volume.name $names -}}{{- fail (printf "%s.podSpec.volumes[%d]: a volume %s is there already" $.path $index $volume.name) -}}{{- end -}}
{{- $names = append $names $volume.name -}}
{{- end -}}
{{- $mounted := list "/tmp" "/dev/shm" -}}
{{- if has "weights" .volumes -}}{{- $mounted = append $mounted (trimSuffix "/" .root.Values.weights.mountPath) -}}{{- end -}}
{{- if has "api-keys" .volumes -}}{{- $mounted = append $mounted "/etc/personaplex" -}}{{- end -}}
{{- if has "admin-keys" .volumes -}}{{- $mounted = append $mounted "/etc/personaplex-admin" -}}{{- end -}}
{{- if has "twilio" .volumes -}}{{- $mounted = append $mounted "/etc/personaplex-twilio" -}}{{- end -}}
{{- $taken := list "download-weights" "wait-for-weights" "wait-gcs-ready" "autoscaler" -}}
{{- range $list := list "containers" "initContainers" -}}
{{- range $index, $container := default list (get $over $list) -}}
{{- $path := printf "%s.podSpec.%s[%d]" $.path $list $index -}}
{{- if or (has $container.name $taken) (and (eq $container.name "ray") (eq $list "initContainers")) -}}{{- fail (printf "%s: a container %s is there already" $path $container.name) -}}{{- end -}}
{{- $taken = append $taken $container.name -}}
{{- $paths := eq $container.name "ray" | ternary $mounted list -}}
{{- range $number, $mount := default list $container.volumeMounts -}}
{{- if not (has $mount.name $names) -}}{{- fail (printf "%s.volumeMounts[%d]: no volume %s in podSpec.volumes" $path $number $mount.name) -}}{{- end -}}
{{- $place := trimSuffix "/" $mount.mountPath -}}
{{- if has $place $paths -}}{{- fail (printf "%s.volumeMounts[%d]: something is mounted at %s already" $path $number $place) -}}{{- end -}}
{{- $paths = append $paths $place -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* A Kubernetes quantity ("500m", "8Gi", 2) as a plain number, so that two can be compared. */}}
{{- define "personaplex.quantity" -}}
{{- if kindIs "string" . -}}
{{- $factors := dict "" 1.0 "m" 1e-3 "k" 1e3 "M" 1e6 "G" 1e9 "T" 1e12
  "Ki" 1024.0 "Mi" 1048576.0 "Gi" 1073741824.0 "Ti" 1099511627776.0 -}}
{{- $number := regexFind "^[0-9]+([.][0-9]+)?" . -}}
{{- mulf (float64 $number) (get $factors (trimPrefix $number .)) -}}
{{- else -}}
{{- float64 . -}}
{{- end -}}
{{- end -}}
