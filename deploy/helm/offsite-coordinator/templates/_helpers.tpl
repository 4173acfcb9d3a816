{{- define "offsite.labels" -}}
{{ include "offsite.members" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- end }}

{{- /* What all pods of a release have. Not their name: KubeRay gives its pods one. */ -}}
{{- define "offsite.members" -}}
app.kubernetes.io/part-of: offsite
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "offsite.image" -}}
{{- with .Values.image -}}
{{ .repository }}{{ if .digest }}@{{ .digest }}{{ else }}:{{ .tag | default $.Chart.AppVersion }}{{ end }}
{{- end }}
{{- end }}

{{- define "offsite.podSecurity" -}}
runAsNonRoot: true
runAsUser: 10001
runAsGroup: 10001
fsGroup: 10001
fsGroupChangePolicy: OnRootMismatch
seccompProfile: {type: RuntimeDefault}
{{- end }}

{{- define "offsite.security" -}}
readOnlyRootFilesystem: true
allowPrivilegeEscalation: false
capabilities: {drop: [ALL]}
{{- end }}

{{- /* Quantities of Kubernetes (500Mi, 2Gi) in bytes, as Ray takes them. */ -}}
{{- define "offsite.bytes" -}}
{{- if hasSuffix "Gi" . }}{{ mul (trimSuffix "Gi" . | int64) 1073741824 }}
{{- else if hasSuffix "Mi" . }}{{ mul (trimSuffix "Mi" . | int64) 1048576 }}
{{- else }}{{ fail (printf "ray.objectStore: %s: say it in Mi or Gi" .) }}
{{- end }}
{{- end }}

{{- /* Stores and Ray's token. The journal's URL goes to gateways alone. */ -}}
{{- define "offsite.environment" -}}
{{- $values := .root.Values -}}
env:
  - {name: OMP_WAIT_POLICY, value: PASSIVE}
  {{- if $values.ray.enabled }}
  - {name: RAY_AUTH_MODE, value: token}
  - name: RAY_AUTH_TOKEN
    valueFrom:
      secretKeyRef: {name: {{ $values.ray.tokenSecret | default .root.Release.Name }}, key: auth_token}
  {{- end }}
  {{- if and .journal $values.ray.enabled $values.ray.redis.address }}
  - {name: RAY_gcs_rpc_server_reconnect_timeout_s, value: "600"}  # as KubeRay has workers wait for the head
  {{- end }}
  {{- with $values.env }}{{ toYaml . | nindent 2 }}{{ end }}
{{- $secrets := list $values.stores.blobsSecret }}
{{- if .journal }}{{ $secrets = prepend $secrets $values.stores.journalSecret }}{{ end }}
{{- if compact $secrets }}
envFrom:
  {{- range compact $secrets }}
  - secretRef: {name: {{ . }}}
  {{- end }}
{{- end }}
{{- end }}

{{- /* What a node of Ray and a process that speaks to it write to, and what the owner's policy names. */ -}}
{{- define "offsite.nodeMounts" -}}
- {name: tmp, mountPath: /tmp}
{{- if .Values.ray.enabled }}
- {name: shm, mountPath: /dev/shm}
{{- end }}
{{- with .Values.volumeMounts }}{{ toYaml . | nindent 0 }}{{ end }}
{{- end }}

{{- define "offsite.nodeVolumes" -}}
- name: tmp
  emptyDir: {}
{{- if .Values.ray.enabled }}
- name: shm
  emptyDir: {medium: Memory}
{{- end }}
{{- with .Values.volumes }}{{ toYaml . | nindent 0 }}{{ end }}
{{- end }}

{{- /* By this label of Ray's a node says which Offsite it has; no step goes to one that has another. */ -}}
{{- define "offsite.nodeLabels" -}}
offsite-version: {{ .Values.image.version | default .Chart.AppVersion | quote }}
{{- end }}
