{{- /* 53 characters at most, so that "-<suffix>" of the objects below still fits a DNS label. */ -}}
{{- define "lockstep.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 53 | trimSuffix "-" -}}
{{- else -}}
{{- if contains .Chart.Name .Release.Name -}}
{{- .Release.Name | trunc 53 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name .Chart.Name | trunc 53 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- /* The rank pods' NetworkPolicies let in what carries this name and component, so neither can be set. */ -}}
{{- define "lockstep.selectorLabels" -}}
app.kubernetes.io/name: lockstep
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/component: operator
{{- end -}}

{{- define "lockstep.labels" -}}
{{ include "lockstep.selectorLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
app.kubernetes.io/part-of: lockstep
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end -}}

{{- define "lockstep.serviceAccountName" -}}
{{- if .Values.serviceAccount.create -}}
{{- default (include "lockstep.fullname" .) .Values.serviceAccount.name -}}
{{- else -}}
{{- default "default" .Values.serviceAccount.name -}}
{{- end -}}
{{- end -}}

{{- /* repository@digest, or repository:tag; given the values of the image, its name in values.yaml and the chart's version. */ -}}
{{- define "lockstep.reference" -}}
{{- $message := printf "%s.repository must be set: where you pushed the image built from images/%s.Dockerfile" .field .file -}}
{{- $repository := required $message .image.repository -}}
{{- if .image.digest -}}
{{- printf "%s@%s" $repository .image.digest -}}
{{- else -}}
{{- printf "%s:%s" $repository (default .version .image.tag) -}}
{{- end -}}
{{- end -}}

{{- define "lockstep.image" -}}
{{- include "lockstep.reference" (dict "image" .Values.image "field" "image" "file" "operator" "version" .Chart.AppVersion) -}}
{{- end -}}

{{- define "lockstep.runtimeImage" -}}
{{- include "lockstep.reference" (dict "image" .Values.runtimeImage "field" "runtimeImage" "file" "runtime" "version" .Chart.AppVersion) -}}
{{- end -}}

{{- /* The restricted Pod Security profile, and a read-only root besides. Ids that are null are the cluster's to choose. */ -}}
{{- define "lockstep.podSecurityContext" -}}
runAsNonRoot: true
{{- range $name, $id := .Values.podSecurityContext }}
{{- if not (kindIs "invalid" $id) }}
{{ $name }}: {{ int64 $id }}
{{- end }}
{{- end }}
seccompProfile:
  type: RuntimeDefault
{{- end -}}

{{- define "lockstep.securityContext" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop:
    - ALL
{{- end -}}
