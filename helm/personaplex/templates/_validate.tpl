{{/*
What a schema cannot say: rules between values. Each message names the value to change.
*/}}
{{- define "personaplex.validate" -}}
{{- $name := include "personaplex.fullname" . -}}
{{- if gt (len $name) 47 -}}
{{- fail (printf "the name %q has %d characters; KubeRay allows 47: set fullnameOverride" $name (len $name)) -}}
{{- end -}}
{{- if not (regexMatch "^[a-z]([-a-z0-9]*[a-z0-9])?$" $name) -}}
{{- fail (printf "the name %q must begin with a letter and hold only a-z, 0-9 and -: set fullnameOverride" $name) -}}
{{- end -}}
{{- include "personaplex.validateSettings" . -}}
{{- include "personaplex.validateTimeouts" . -}}
{{- include "personaplex.validateGroups" . -}}
{{- include "personaplex.validateWeights" . -}}
{{- include "personaplex.validateNetwork" . -}}
{{- if eq .Values.upgrade.strategy "NewClusterWithIncrementalUpgrade" -}}
{{- if not .Values.autoscaler.enabled -}}{{- fail "upgrade.strategy NewClusterWithIncrementalUpgrade needs autoscaler.enabled" -}}{{- end -}}
{{- if not .Values.upgrade.incremental.gatewayClassName -}}{{- fail "upgrade.strategy NewClusterWithIncrementalUpgrade needs upgrade.incremental.gatewayClassName" -}}{{- end -}}
{{- if gt (int .Values.upgrade.incremental.stepSizePercent) (int .Values.upgrade.incremental.maxSurgePercent) -}}
{{- fail "upgrade.incremental.stepSizePercent is more than maxSurgePercent" -}}
{{- end -}}
{{- end -}}
{{- if and .Values.redis.existingSecret (not .Values.redis.address) -}}{{- fail "redis.existingSecret is set without redis.address" -}}{{- end -}}
{{- if and .Values.rayAuth.existingSecret (not .Values.rayAuth.enabled) -}}{{- fail "rayAuth.existingSecret is set without rayAuth.enabled" -}}{{- end -}}
{{- end -}}

{{- define "personaplex.validateSettings" -}}
{{- $derived := dict
  "replicas_min" "replicaGroups.*.minPods" "replicas_max" "replicaGroups.*.maxPods"
  "gateways_min" "gateway.minPods" "gateways_max" "gateway.maxPods"
  "replica_resources" "serve.dedicatedNodes" "gateway_resources" "serve.dedicatedNodes"
  "api_keys" "apiKeys.existingSecret" "api_keys_file" "apiKeys.existingSecret" -}}
{{- range $key, $instead := $derived -}}
{{- if hasKey $.Values.settings $key -}}{{- fail (printf "settings.%s is derived: use %s" $key $instead) -}}{{- end -}}
{{- end -}}
{{- range $image := list .Values.image .Values.gatewayImage -}}
{{- if and (eq $image.tag "latest") (not $image.digest) -}}
{{- fail (printf "%s: the tag latest names no version: pin one" $image.repository) -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "personaplex.validateTimeouts" -}}
{{- $t := include "personaplex.timeouts" . | fromJson -}}
{{- if le (int $t.drain) (int $t.graceful) -}}
{{- fail (printf "timeouts.nodeDrainSeconds is %d, but Serve's graceful shutdown (longest session, its wait and 5 s) takes %d" (int $t.drain) (int $t.graceful)) -}}
{{- end -}}
{{- if le (int $t.grace) (int $t.drain) -}}
{{- fail (printf "timeouts.terminationGraceSeconds is %d, not more than the node drain of %d" (int $t.grace) (int $t.drain)) -}}
{{- end -}}
{{- if lt (int $t.deletion) (int $t.session) -}}
{{- fail (printf "timeouts.clusterDeletionDelaySeconds is %d, less than the longest session of %d" (int $t.deletion) (int $t.session)) -}}
{{- end -}}
{{- end -}}

{{- define "personaplex.validateGroups" -}}
{{- if not .Values.replicaGroups -}}{{- fail "replicaGroups is empty: nothing would run the model" -}}{{- end -}}
{{- range $name, $group := merge (dict "gateway" .Values.gateway) .Values.replicaGroups -}}
{{- if gt (int $group.minPods) (int $group.maxPods) -}}{{- fail (printf "%s: minPods is more than maxPods" $name) -}}{{- end -}}
{{- if and (not $.Values.autoscaler.enabled) (ne (int $group.minPods) (int $group.maxPods)) -}}
{{- fail (printf "%s: without autoscaler.enabled minPods must equal maxPods" $name) -}}
{{- end -}}
{{- end -}}
{{- if hasKey .Values.replicaGroups "gateway" -}}{{- fail "replicaGroups.gateway: the name belongs to the gateways" -}}{{- end -}}
{{- $wanted := default 0 .Values.settings.replica_num_gpus | float64 -}}
{{- range $name, $group := .Values.replicaGroups -}}
{{- if gt (mulf $wanted (float64 $group.perPod)) (float64 $group.gpusPerPod) -}}
{{- fail (printf "replicaGroups.%s: %v replicas of %v GPUs do not fit in %v" $name $group.perPod $wanted $group.gpusPerPod) -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "personaplex.validateWeights" -}}
{{- $weights := .Values.weights -}}
{{- $model := toString .Values.settings.model -}}
{{- if and (eq $weights.source "claim") (not $weights.claim.existingClaim) -}}{{- fail "weights.source claim needs weights.claim.existingClaim" -}}{{- end -}}
{{- if and $weights.prefetch.enabled (ne $weights.source "claim") -}}{{- fail "weights.prefetch.enabled needs weights.source claim" -}}{{- end -}}
{{- if and (eq $weights.source "node") (not .Values.huggingFace.existingSecret) (eq $model "7b") -}}
{{- fail "settings.model 7b is gated: put a Hugging Face token in a Secret and name it in huggingFace.existingSecret, or use weights.source claim" -}}
{{- end -}}
{{- if and $weights.prefetch.enabled (not .Values.huggingFace.existingSecret) (eq $model "7b") -}}
{{- fail "weights.prefetch.enabled downloads a gated model: name a token's Secret in huggingFace.existingSecret" -}}
{{- end -}}
{{- if and (eq $weights.source "none") (eq $model "7b") -}}{{- fail "settings.model 7b needs weights.source node or claim" -}}{{- end -}}
{{- if eq $model "auto" -}}{{- fail "settings.model auto could serve noise when weights are missing: name the model" -}}{{- end -}}
{{- end -}}

{{- define "personaplex.validateNetwork" -}}
{{- if and .Values.ingress.enabled (not .Values.ingress.hosts) -}}{{- fail "ingress.enabled needs ingress.hosts" -}}{{- end -}}
{{- if and .Values.httpRoute.enabled (not .Values.httpRoute.parentRefs) -}}{{- fail "httpRoute.enabled needs httpRoute.parentRefs" -}}{{- end -}}
{{- if and .Values.httpRoute.enabled (not (.Capabilities.APIVersions.Has "gateway.networking.k8s.io/v1")) -}}
{{- fail "httpRoute.enabled needs the Gateway API (gateway.networking.k8s.io/v1) in the cluster" -}}
{{- end -}}
{{- if and (or .Values.monitoring.podMonitor.enabled .Values.monitoring.rules.enabled) (not (.Capabilities.APIVersions.Has "monitoring.coreos.com/v1")) -}}
{{- fail "monitoring.podMonitor and monitoring.rules need the Prometheus operator (monitoring.coreos.com/v1) in the cluster" -}}
{{- end -}}
{{- $first := default 0 .Values.settings.media_port_min | int -}}
{{- $last := default 0 .Values.settings.media_port_max | int -}}
{{- range $name, $group := .Values.replicaGroups -}}
{{- if and (gt $first 0) (lt (add (sub $last $first) 1 | int) (int $group.perPod)) -}}
{{- fail (printf "replicaGroups.%s: %d media ports for %v replicas in a pod" $name (add (sub $last $first) 1 | int) $group.perPod) -}}
{{- end -}}
{{- end -}}
{{- end -}}
