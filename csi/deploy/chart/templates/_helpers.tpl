{{- define "phfs.image" -}}
{{ .Values.image.repository }}{{ if .Values.image.digest }}@{{ .Values.image.digest }}{{ else }}:{{ .Values.image.tag | default .Chart.AppVersion }}{{ end }}
{{- end }}

{{- /* of (dict "root" . "component" NAME) */ -}}
{{- define "phfs.labels" -}}
app.kubernetes.io/name: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- end }}

{{- define "phfs.stateDir" -}}
{{ .Values.node.stateDir | default (printf "/var/lib/%s" .Values.driverName) }}
{{- end }}

{{- define "phfs.cacheDir" -}}
{{ .Values.node.cacheDir | default (printf "/var/cache/%s" .Values.driverName) }}
{{- end }}

{{- define "phfs.pluginDir" -}}
{{ .Values.kubeletDir }}/plugins/{{ .Values.driverName }}
{{- end }}

{{- /* As the sidecars name their leases. */ -}}
{{- define "phfs.leaseName" -}}
{{ regexReplaceAll "[^a-zA-Z0-9-]" .Values.driverName "-" }}
{{- end }}

{{- define "phfs.restricted" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end }}
