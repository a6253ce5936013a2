{{- define "thinkgate.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 63 | trimSuffix "-" }}
{{- end }}

{{- define "thinkgate.fullname" -}}
{{- if .Values.fullnameOverride }}
{{- .Values.fullnameOverride | trunc 63 | trimSuffix "-" }}
{{- else if contains (include "thinkgate.name" .) .Release.Name }}
{{- .Release.Name | trunc 63 | trimSuffix "-" }}
{{- else }}
{{- printf "%s-%s" .Release.Name (include "thinkgate.name" .) | trunc 63 | trimSuffix "-" }}
{{- end }}
{{- end }}

{{- define "thinkgate.selectorLabels" -}}
app.kubernetes.io/name: {{ include "thinkgate.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "thinkgate.labels" -}}
{{ include "thinkgate.selectorLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end }}

{{- define "thinkgate.secretName" -}}
{{- default (include "thinkgate.fullname" .) .Values.secret.existingSecret }}
{{- end }}

{{/* The configuration file: what the user wrote, with this chart's address, ports and drain time. */}}
{{- define "thinkgate.config" -}}
{{- $metrics := dict "host" "0.0.0.0" "port" (int .Values.ports.metrics) }}
{{- $timeouts := dict "drain_s" (int .Values.drainSeconds) }}
{{- $server := dict "host" "0.0.0.0" "port" (int .Values.ports.http) "metrics" $metrics "timeouts" $timeouts }}
{{- mergeOverwrite (deepCopy .Values.config) (dict "server" $server) | toYaml }}
{{- end }}

{{/* Refuse what would come up broken, and say the remedy. */}}
{{- define "thinkgate.validate" -}}
{{- $config := .Values.config }}
{{- if not $config.models }}
{{- fail "config.models is empty: name at least one model and its backends (docs/config.md)" }}
{{- end }}
{{- if not $config.keys }}
{{- fail "config.keys is empty: without keys the gateway binds only loopback, where no Service can reach it" }}
{{- end }}
{{- $store := dig "store" "kind" "memory" $config }}
{{- if and $config.limits (gt (int .Values.replicaCount) 1) (ne $store "redis") }}
{{- fail (printf "config.limits with replicaCount %d needs a shared store: the %s store counts per replica" (int .Values.replicaCount) $store) }}
{{- end }}
{{- if not .Values.secret.existingSecret }}
{{- range $key := $config.keys }}
{{- if and $key.secret_env (not (hasKey $.Values.secret.values $key.secret_env)) }}
{{- fail (printf "config.keys: %s names the variable %s: put it under secret.values or in secret.existingSecret" $key.id $key.secret_env) }}
{{- end }}
{{- end }}
{{- range $name, $model := $config.models }}
{{- range $backend := $model.backends }}
{{- if and $backend.api_key_env (not (hasKey $.Values.secret.values $backend.api_key_env)) }}
{{- fail (printf "config.models.%s: backend %s names the variable %s: put it under secret.values or in secret.existingSecret" $name $backend.id $backend.api_key_env) }}
{{- end }}
{{- end }}
{{- end }}
{{- end }}
{{- end }}
