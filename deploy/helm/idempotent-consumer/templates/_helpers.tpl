{{- define "consumer.name" -}}
{{ .Release.Name | trunc 50 | trimSuffix "-" }}
{{- end }}

{{- /* What selects pods. Called with the chart's root and a component. */}}
{{- define "consumer.selector" -}}
app.kubernetes.io/name: consumer
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- end }}

{{- define "consumer.labels" -}}
{{ include "consumer.selector" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ .root.Chart.Name }}-{{ .root.Chart.Version | replace "+" "_" }}
{{- end }}

{{- define "consumer.image" -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end }}

{{- /* A value as text: numbers without the exponent that Go writes. */}}
{{- define "consumer.text" -}}
{{ if kindIs "string" . }}{{ . | quote }}{{ else }}{{ toJson . | quote }}{{ end }}
{{- end }}

{{- /* Settings, and where the files of a Secret are. */}}
{{- define "consumer.env" -}}
{{- range $name, $value := omit .root.Values.settings "allow_insecure" }}
- name: CONSUMER_{{ $name | upper }}
  value: {{ include "consumer.text" $value }}
{{- end }}
{{- range $setting, $key := .secret.keys }}
- name: CONSUMER_{{ $setting | upper }}_FILE
  value: /run/consumer/{{ $key }}
{{- end }}
{{- with .root.Values.env }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{- /* What the pods of the workers and of the migration share. */}}
{{- define "consumer.pod" -}}
enableServiceLinks: false            # they would be CONSUMER_… for a Service whose name begins with "consumer"
automountServiceAccountToken: false
securityContext:
  runAsNonRoot: true
  seccompProfile: {type: RuntimeDefault}
volumes:
  - name: secret
    secret:
      secretName: {{ .secret.name }}
      items:
        {{- range .secret.keys }}
        - {key: {{ . }}, path: {{ . }}}
        {{- end }}
  {{- with .root.Values.volumes }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- with .root.Values.image.pullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- range $name := list "nodeSelector" "tolerations" "affinity" }}
{{- with index $.root.Values $name }}
{{ $name }}:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}
{{- end }}

{{- define "consumer.container" -}}
image: {{ include "consumer.image" .root }}
imagePullPolicy: {{ .root.Values.image.pullPolicy }}
volumeMounts:
  - {name: secret, mountPath: /run/consumer, readOnly: true}
  {{- with .root.Values.volumeMounts }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
securityContext:
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  capabilities: {drop: [ALL]}
{{- end }}
