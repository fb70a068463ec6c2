//! The configuration files of a cluster's parts, as text.

use super::plan::{MAX_PODS, ProxyMode, Settings};

/// A kubeconfig whose files stand in `folder`, for the certificate `user`.
pub fn kubeconfig(server: &str, folder: &str, user: &str) -> String {
    format!(
        "apiVersion: v1
kind: Config
clusters:
- name: rig
  cluster: {{server: \"{server}\", certificate-authority: {folder}/ca.crt}}
users:
- name: {user}
  user: {{client-certificate: {folder}/{user}.crt, client-key: {folder}/{user}.key}}
contexts:
- name: rig
  context: {{cluster: rig, user: {user}}}
current-context: rig
"
    )
}

/// The kubelet's own. Its cgroup folders are below `cgroup_root`: kubelets that share one take each other's pods for orphans.
/// Pods' cgroups are nested by class, which is how an agent finds a pod by a process.
pub fn kubelet(settings: &Settings, cgroup_root: &str) -> String {
    let dns = settings.dns_address();
    format!(
        "apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
authentication:
  anonymous: {{enabled: false}}
  webhook: {{enabled: true}}
  x509: {{clientCAFile: /node/pki/ca.crt}}
authorization: {{mode: Webhook}}
tlsCertFile: /node/pki/kubelet.crt
tlsPrivateKeyFile: /node/pki/kubelet.key
containerRuntimeEndpoint: unix:///run/containerd/containerd.sock
cgroupDriver: cgroupfs
cgroupsPerQOS: true
cgroupRoot: {cgroup_root}
enforceNodeAllocatable: []
failCgroupV1: false
failSwapOn: false
localStorageCapacityIsolation: false
clusterDNS: [\"{dns}\"]
clusterDomain: cluster.local
resolvConf: /node/resolv.conf
maxPods: {MAX_PODS}
kubeAPIQPS: 200
kubeAPIBurst: 400
imageGCHighThresholdPercent: 100
evictionHard: {{nodefs.available: \"0%\", imagefs.available: \"0%\", memory.available: 1Mi}}
# Where the rig itself has few capabilities, limits cannot be raised.
featureGates: {{KubeletInUserNamespace: true}}
podLogsDir: /var/log/pods
"
    )
}

/// containerd's own. `snapshotter` is `native` where the node's folder is on an overlay, on which no other overlay can be.
pub fn containerd(snapshotter: &str, pause: &str) -> String {
    format!(
        "version = 3
root = '/node/containerd'
state = '/run/containerd/state'
[grpc]
address = '/run/containerd/containerd.sock'
[ttrpc]
address = '/run/containerd/containerd.sock.ttrpc'
[plugins.'io.containerd.cri.v1.images']
snapshotter = '{snapshotter}'
[plugins.'io.containerd.cri.v1.images'.pinned_images]
sandbox = '{pause}'
[plugins.'io.containerd.cri.v1.runtime']
restrict_oom_score_adj = true
enable_selinux = false
[plugins.'io.containerd.cri.v1.runtime'.cni]
bin_dirs = ['/opt/cni/bin']
conf_dir = '/etc/cni/net.d'
[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc]
runtime_type = 'io.containerd.runc.v2'
[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc.options]
SystemdCgroup = false
"
    )
}

/// kube-proxy's own.
pub fn kube_proxy(settings: &Settings, node: &str) -> String {
    let mode = match settings.proxy {
        ProxyMode::Nftables => "nftables",
        ProxyMode::Iptables => "iptables",
    };
    let cluster = settings.cluster_networks();
    format!(
        "apiVersion: kubeproxy.config.k8s.io/v1alpha1
kind: KubeProxyConfiguration
mode: {mode}
clusterCIDR: {cluster}
hostnameOverride: {node}
clientConnection: {{kubeconfig: /node/kube-proxy.conf}}
conntrack: {{maxPerCore: 0}}
nftables: {{minSyncPeriod: 100ms}}
iptables: {{minSyncPeriod: 100ms}}
"
    )
}

/// The CNI configuration that a node has before a mesh is installed.
pub fn cni(settings: &Settings, node: u8) -> String {
    let networks = settings.pod_networks(node);
    let ranges: Vec<String> = networks
        .iter()
        .map(|network| format!(r#"[{{"subnet": "{network}"}}]"#))
        .collect();
    let routes: Vec<&str> = networks
        .iter()
        .map(|network| match network.contains(':') {
            true => r#"{"dst": "::/0"}"#,
            false => r#"{"dst": "0.0.0.0/0"}"#,
        })
        .collect();
    format!(
        r#"{{
  "cniVersion": "1.0.0",
  "name": "rig",
  "plugins": [
    {{
      "type": "bridge", "bridge": "cni0", "isGateway": true, "hairpinMode": true,
      "ipam": {{"type": "host-local", "ranges": [{}], "routes": [{}]}}
    }},
    {{"type": "portmap", "capabilities": {{"portMappings": true}}}}
  ]
}}
"#,
        ranges.join(", "),
        routes.join(", ")
    )
}

/// The cluster's DNS: Services, and the names in `hosts`, which stand for hosts outside the cluster.
pub fn dns(settings: &Settings, image: &str, hosts: &str) -> String {
    let address = settings.dns_address();
    format!(
        r#"apiVersion: v1
kind: ServiceAccount
metadata: {{name: coredns, namespace: kube-system}}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata: {{name: "system:coredns"}}
rules:
- {{apiGroups: [""], resources: [services, pods, namespaces], verbs: [list, watch]}}
- {{apiGroups: [discovery.k8s.io], resources: [endpointslices], verbs: [list, watch]}}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata: {{name: "system:coredns"}}
roleRef: {{apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: "system:coredns"}}
subjects: [{{kind: ServiceAccount, name: coredns, namespace: kube-system}}]
---
apiVersion: v1
kind: ConfigMap
metadata: {{name: coredns, namespace: kube-system}}
data:
  Corefile: |
    .:53 {{
      errors
      health
      ready
      hosts {{
        {hosts}
        fallthrough
      }}
      kubernetes cluster.local in-addr.arpa ip6.arpa
      cache 5
    }}
---
apiVersion: apps/v1
kind: Deployment
metadata: {{name: coredns, namespace: kube-system, labels: {{k8s-app: kube-dns}}}}
spec:
  selector: {{matchLabels: {{k8s-app: kube-dns}}}}
  template:
    metadata: {{labels: {{k8s-app: kube-dns}}}}
    spec:
      serviceAccountName: coredns
      priorityClassName: system-cluster-critical
      dnsPolicy: Default
      tolerations: [{{operator: Exists}}]
      containers:
      - name: coredns
        image: {image}
        args: [-conf, /etc/coredns/Corefile]
        readinessProbe: {{httpGet: {{path: /ready, port: 8181}}, periodSeconds: 1}}
        volumeMounts: [{{name: corefile, mountPath: /etc/coredns}}]
      volumes: [{{name: corefile, configMap: {{name: coredns}}}}]
---
apiVersion: v1
kind: Service
metadata: {{name: kube-dns, namespace: kube-system, labels: {{k8s-app: kube-dns}}}}
spec:
  clusterIP: "{address}"
  ipFamilyPolicy: PreferDualStack
  selector: {{k8s-app: kube-dns}}
  ports: [{{name: dns, port: 53, protocol: UDP}}, {{name: dns-tcp, port: 53, protocol: TCP}}]
"#
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cni_configuration_is_json_with_a_range_for_each_family() {
        let text = cni(&Settings::default(), 2);
        let value: serde_json::Value = serde_json::from_str(&text).expect("JSON");
        let ranges = &value["plugins"][0]["ipam"]["ranges"];
        assert_eq!(ranges[0][0]["subnet"], "10.244.8.0/22");
        assert_eq!(ranges[1][0]["subnet"], "fd00:10:244:2::/64");
    }
}
