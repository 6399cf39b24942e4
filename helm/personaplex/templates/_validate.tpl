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
{{- include "personaplex.validatePods" . -}}
{{- include "personaplex.validateWeights" . -}}
{{- include "personaplex.validateNetwork" . -}}
{{- include "personaplex.validatePorts" . -}}
{{- if and .Values.redis.existingSecret (not .Values.redis.address) -}}{{- fail "redis.existingSecret is set without redis.address" -}}{{- end -}}
{{- if and .Values.rayAuth.existingSecret (not .Values.rayAuth.enabled) -}}{{- fail "rayAuth.existingSecret is set without rayAuth.enabled" -}}{{- end -}}
{{- end -}}

{{- define "personaplex.validateSettings" -}}
{{- $derived := dict
  "replicas_min" "replicaGroups.*.minPods" "replicas_max" "replicaGroups.*.maxPods"
  "gateways_min" "gateway.minPods" "gateways_max" "gateway.maxPods"
  "transcribers_min" "transcriber.minPods" "transcribers_max" "transcriber.maxPods" "transcriber_resources" "serve.dedicatedNodes"
  "replica_resources" "serve.dedicatedNodes" "gateway_resources" "serve.dedicatedNodes"
  "api_keys" "apiKeys.existingSecret" "api_keys_file" "apiKeys.existingSecret"
  "twilio_token_file" "twilio.existingSecret" "admin_keys_file" "adminKeys.existingSecret" -}}
{{- range $key, $instead := $derived -}}
{{- if hasKey $.Values.settings $key -}}{{- fail (printf "settings.%s is derived: use %s" $key $instead) -}}{{- end -}}
{{- end -}}
{{- $calls := has "twilio" (default list .Values.settings.protocols) -}}
{{- if and $calls (or (not .Values.twilio.existingSecret) (not .Values.settings.public_url)) -}}
{{- fail "settings.protocols has twilio, which needs settings.public_url and, in twilio.existingSecret, the Secret with the account's auth token" -}}
{{- end -}}
{{- if and .Values.twilio.existingSecret (not $calls) -}}
{{- fail "twilio.existingSecret is set, but settings.protocols does not have twilio" -}}
{{- end -}}
{{- if hasKey .Values.settings "replicas_initial" -}}
{{- $derived := include "personaplex.settings" . | fromYaml -}}
{{- $initial := .Values.settings.replicas_initial -}}
{{- if and (not (kindIs "invalid" $initial)) (or (lt (int $initial) (int $derived.replicas_min)) (gt (int $initial) (int $derived.replicas_max))) -}}
{{- fail (printf "settings.replicas_initial is %v, not between the %v and %v replicas of replicaGroups" $initial $derived.replicas_min $derived.replicas_max) -}}
{{- end -}}
{{- end -}}
{{- $proxies := include "personaplex.proxies" . | int -}}
{{- $trusted := $proxies -}}
{{- if hasKey .Values.settings "trusted_proxies" -}}{{- $trusted = int .Values.settings.trusted_proxies -}}{{- end -}}
{{- $limited := ne "0" (toString (get .Values.settings "sessions_per_address")) -}}
{{- if and $limited (lt $trusted $proxies) -}}
{{- fail (printf "settings.trusted_proxies is %d, but %d proxies append to X-Forwarded-For: all clients would count as one address. Leave it out, or set settings.sessions_per_address to 0" $trusted $proxies) -}}
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

{{- define "personaplex.validateWeights" -}}
{{- $weights := .Values.weights -}}
{{- $model := toString .Values.settings.model -}}
{{- $places := dict "claim" (list "existingClaim" $weights.claim.existingClaim) "image" (list "reference" $weights.image.reference) "hostPath" (list "path" $weights.hostPath.path) -}}
{{- range $source, $place := $places -}}
{{- $value := printf "weights.%s.%s" $source (first $place) -}}
{{- if and (eq $weights.source $source) (not (last $place)) -}}{{- fail (printf "weights.source %s needs %s" $source $value) -}}{{- end -}}
{{- if and (ne $weights.source $source) (last $place) -}}{{- fail (printf "%s is set, but weights.source is %s" $value $weights.source) -}}{{- end -}}
{{- end -}}
{{- if and $weights.image.reference (not (regexMatch "(@sha256:[0-9a-f]{64}|:[A-Za-z0-9_][A-Za-z0-9_.-]*)$" $weights.image.reference)) -}}
{{- fail (printf "weights.image.reference %s has no tag and no digest: pin one" $weights.image.reference) -}}
{{- end -}}
{{- if hasSuffix ":latest" $weights.image.reference -}}{{- fail (printf "weights.image.reference %s: the tag latest names no version: pin one" $weights.image.reference) -}}{{- end -}}
{{- if and $weights.prefetch.enabled (ne $weights.source "claim") -}}{{- fail "weights.prefetch.enabled needs weights.source claim" -}}{{- end -}}
{{- if and (eq $weights.source "node") (not .Values.huggingFace.existingSecret) (eq $model "7b") -}}
{{- fail "settings.model 7b is gated: put a Hugging Face token in a Secret and name it in huggingFace.existingSecret, or use another weights.source" -}}
{{- end -}}
{{- if and $weights.prefetch.enabled (not .Values.huggingFace.existingSecret) (eq $model "7b") -}}
{{- fail "weights.prefetch.enabled downloads a gated model: name a token's Secret in huggingFace.existingSecret" -}}
{{- end -}}
{{- if and (eq $weights.source "none") (eq $model "7b") -}}{{- fail "settings.model 7b needs weights: weights.source none has no volume for them" -}}{{- end -}}
{{- $least := 18 -}}{{- /* GB: the files of 7b and their voices */ -}}
{{- if and (eq $weights.source "node") (eq $model "7b") (lt (include "personaplex.quantity" $weights.node.sizeLimit | float64) (mulf $least 1e9)) -}}
{{- fail (printf "weights.node.sizeLimit is %v, but the weights of settings.model 7b take %d GB" $weights.node.sizeLimit $least) -}}
{{- end -}}
{{- if eq $model "auto" -}}{{- fail "settings.model auto could serve noise when weights are missing: name the model" -}}{{- end -}}
{{- end -}}

{{- define "personaplex.validateNetwork" -}}
{{- if and (eq .Values.service.type "LoadBalancer") (not .Values.apiKeys.existingSecret) (not .Values.networkPolicy.clients) -}}
{{- fail "service.type LoadBalancer opens the service to everyone: set apiKeys.existingSecret, or networkPolicy.clients" -}}
{{- end -}}
{{- if and .Values.ingress.enabled (not .Values.ingress.hosts) -}}{{- fail "ingress.enabled needs ingress.hosts" -}}{{- end -}}
{{- if and .Values.httpRoute.enabled (not .Values.httpRoute.parentRefs) -}}{{- fail "httpRoute.enabled needs httpRoute.parentRefs" -}}{{- end -}}
{{- end -}}

{{/*
Ports of a Ray pod that Ray and its Serve take for themselves: (list first last what), by default settings.
*/}}
{{- define "personaplex.reservedPorts" -}}
- [6379, 6379, "Ray's GCS"]
- [8080, 8080, "Ray's metrics"]
- [8265, 8265, "Ray's dashboard"]
- [8500, 8500, "Serve's fallback proxy"]
- [9000, 9000, "Serve's gRPC proxy"]
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
