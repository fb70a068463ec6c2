{{- /* Called first in each template: puts `pilot` over `istiod`, and fills in what a platform decides. Emits nothing. */ -}}
{{- define "leyline.defaults" -}}
{{- $values := .Values -}}
{{- if $values.pilot -}}
{{- $_ := set $values "istiod" (mergeOverwrite $values.istiod $values.pilot) -}}
{{- $_ := unset $values "pilot" -}}
{{- end -}}
{{- $platform := index (include "leyline.platforms" . | fromYaml) $values.global.platform | default dict -}}
{{- range $name, $usual := dict "cniBinDir" "/opt/cni/bin" "cniConfDir" "/etc/cni/net.d" "cniNetnsDir" "/var/run/netns" -}}
{{- $_ := set $values.cni $name (coalesce (index $values.cni $name) (index $platform $name) $usual) -}}
{{- end -}}
{{- if $platform.resourceQuotas -}}
{{- $_ := set $values.cni.resourceQuotas "enabled" true -}}
{{- $_ := set $values.ztunnel.resourceQuotas "enabled" true -}}
{{- end -}}
{{- if eq $values.revision "default" -}}
{{- $_ := set $values "revision" "" -}}
{{- end -}}
{{- end -}}

{{- /* Where platforms keep what is elsewhere on other nodes. */ -}}
{{- define "leyline.platforms" -}}
gke:
  cniBinDir: /home/kubernetes/bin
  resourceQuotas: true
k3s:
  cniBinDir: /var/lib/rancher/k3s/data/cni
  cniConfDir: /var/lib/rancher/k3s/agent/etc/cni/net.d
k3d:
  cniBinDir: /bin
  cniConfDir: /var/lib/rancher/k3s/agent/etc/cni/net.d
microk8s:
  cniBinDir: /var/snap/microk8s/current/opt/cni/bin
  cniConfDir: /var/snap/microk8s/current/args/cni-network
minikube:
  cniNetnsDir: /var/run/docker/netns
{{- end -}}

{{- /* "" or "-REVISION". */ -}}
{{- define "leyline.suffix" -}}
{{- with .Values.revision }}-{{ . }}{{ end -}}
{{- end -}}

{{- /* The revision as labels say it. */ -}}
{{- define "leyline.rev" -}}
{{- .Values.revision | default "default" -}}
{{- end -}}

{{- /* Whether this control plane is the one for objects without `istio.io/rev`. */ -}}
{{- define "leyline.isDefaultRevision" -}}
{{- if eq (.Values.defaultRevision | default "default") (include "leyline.rev" .) }}true{{ end -}}
{{- end -}}

{{- /* Labels of every object, after upstream's own. Takes (dict "root" $ "component" NAME). */ -}}
{{- define "leyline.labels" -}}
app.kubernetes.io/name: {{ .component }}
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
app.kubernetes.io/part-of: leyline
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version }}
{{- end -}}

{{- /* An image's full name. Takes (dict "root" $ "of" COMPONENT_VALUES "name" IMAGE). */ -}}
{{- define "leyline.image" -}}
{{- if .of.image -}}
{{- .of.image -}}
{{- else -}}
{{- $global := .root.Values.global -}}
{{- printf "%s/%s:%s" (.of.hub | default $global.hub) .name (coalesce .of.tag $global.tag .root.Chart.AppVersion | toString) -}}
{{- end -}}
{{- end -}}

{{- define "leyline.pullSecrets" -}}
{{- with .Values.global.imagePullSecrets }}
imagePullSecrets:
{{- range . }}
  - name: {{ . }}
{{- end }}
{{- end }}
{{- end -}}

{{- define "leyline.clusterId" -}}
{{- .Values.global.multiCluster.clusterName | default "Kubernetes" -}}
{{- end -}}

{{- /* HOST:PORT of the control plane of a revision. Takes (dict "root" $ "revision" REVISION). */ -}}
{{- define "leyline.discoveryAddress" -}}
{{- $revision := .revision -}}
{{- if eq $revision "default" }}{{ $revision = "" }}{{ end -}}
{{- if .root.Values.global.remotePilotAddress -}}
{{- .root.Values.global.remotePilotAddress -}}{{ if not (contains ":" .root.Values.global.remotePilotAddress) }}:15012{{ end -}}
{{- else -}}
istiod{{ with $revision }}-{{ . }}{{ end }}.{{ .root.Release.Namespace }}.svc:15012
{{- end -}}
{{- end -}}

{{- /* Environment variables, sorted by name: texts as they are, whole numbers in full, objects as `valueFrom`. The user's stand in place of the
chart's own. Takes (dict "own" YAML "user" MAP). */ -}}
{{- define "leyline.env" -}}
{{- $all := .own | fromYaml -}}
{{- range $name, $value := .user }}{{ $_ := set $all $name $value }}{{ end -}}
{{- range $name, $value := $all }}
- name: {{ $name }}
  {{- if kindIs "map" $value }}
  valueFrom: {{- toYaml $value | nindent 4 }}
  {{- else if and (kindIs "float64" $value) (eq $value (floor $value)) }}
  value: {{ printf "%.0f" $value | quote }}
  {{- else }}
  value: {{ $value | toString | quote }}
  {{- end }}
{{- end }}
{{- end -}}

{{- /* MeshConfig: what the chart says, and the user's over it. */ -}}
{{- define "leyline.meshConfig" -}}
{{- $own := dict
  "defaultConfig" (dict "discoveryAddress" (include "leyline.discoveryAddress" (dict "root" . "revision" .Values.revision)))
  "defaultProviders" (dict "metrics" (list "prometheus"))
  "rootNamespace" .Release.Namespace
  "trustDomain" "cluster.local"
  "serviceScopeConfigs" (list (dict
    "servicesSelector" (dict "matchExpressions" (list (dict "key" "istio.io/global" "operator" "In" "values" (list "true"))))
    "scope" "GLOBAL"))
-}}
{{- toYaml (mergeOverwrite $own (deepCopy .Values.meshConfig)) -}}
{{- end -}}

{{- define "leyline.ztunnelName" -}}
{{- .Values.ztunnel.resourceName | default "ztunnel" -}}
{{- end -}}
