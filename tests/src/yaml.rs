//! Objects that the suites' folders are made of.

/// A pod that only waits for `exec`.
pub fn idle_pod(namespace: &str, name: &str, node: &str) -> String {
    pod(namespace, name, node, "[sleep, infinity]")
}

/// A headless service `db`, whose one pod has a name of its own: `db-0.db`.
pub fn database(namespace: &str) -> String {
    let pod = idle_pod(namespace, "db-0", "node2");
    let own = "  hostname: db-0\n  subdomain: db\n  nodeName:";
    let service = format!(
        "---
apiVersion: v1
kind: Service
metadata: {{ name: db, namespace: {namespace} }}
spec: {{ clusterIP: None, selector: {{ app: db-0 }}, ports: [{{ name: sql, port: 9000, targetPort: 9001 }}] }}
"
    );
    pod.replace("  nodeName:", own) + &service
}

/// A pod with a service account of its name, on a node.
pub fn pod(namespace: &str, name: &str, node: &str, command: &str) -> String {
    format!(
        "---
apiVersion: v1
kind: ServiceAccount
metadata: {{ name: {name}, namespace: {namespace} }}
---
apiVersion: v1
kind: Pod
metadata:
  name: {name}
  namespace: {namespace}
  labels: {{ app: {name} }}
spec:
  serviceAccountName: {name}
  nodeName: {node}
  containers:
    - name: main
      command: {command}
"
    )
}

/// A service over the pods called `app`, with one port.
pub fn service_of(namespace: &str, name: &str, app: &str, port: &str) -> String {
    format!(
        "---
apiVersion: v1
kind: Service
metadata: {{ name: {name}, namespace: {namespace} }}
spec:
  selector: {{ app: {app} }}
  ports: [{{ {port} }}]
"
    )
}

/// A service on port 9000 over the pods of its name, which listen on 9001.
pub fn service(namespace: &str, name: &str) -> String {
    let port = "name: tcp, port: 9000, targetPort: 9001";
    service_of(namespace, name, name, port) + "  ipFamilyPolicy: PreferDualStack\n"
}
