//! One event of a tunnel's `/flows` as a line for people. Pure, and lenient: what is missing is left out.

use serde_json::Value;

use crate::{operator::cluster::PodName, screen::Screen};

/// Which events are shown.
#[derive(Clone, Debug, Default)]
pub(super) struct Filter {
    /// With an end in it.
    pub namespace: Option<String>,
    /// Of which it is an end.
    pub pod: Option<PodName>,
}

impl Filter {
    /// What a tunnel says of itself is always wanted, but for its signs of life.
    pub(super) fn wants(&self, event: &Value) -> bool {
        match kind(event) {
            "alive" => false,
            "missed" => true,
            _ => self.is_of_namespace(event) && self.is_of_pod(event),
        }
    }

    fn is_of_namespace(&self, event: &Value) -> bool {
        let wanted = self.namespace.as_deref();
        wanted.is_none_or(|it| ENDS.iter().any(|end| namespace(&event[end]) == Some(it)))
    }

    fn is_of_pod(&self, event: &Value) -> bool {
        let is = |pod: &PodName, end: &Value| {
            end["pod"] == pod.name.as_str() && namespace(end) == Some(&pod.namespace)
        };
        let wanted = self.pod.as_ref();
        wanted.is_none_or(|pod| ENDS.iter().any(|end| is(pod, &event[end])))
    }
}

const ENDS: [&str; 2] = ["source", "destination"];

fn kind(event: &Value) -> &str {
    event["event"].as_str().unwrap_or_default()
}

fn namespace(end: &Value) -> Option<&str> {
    end["labels"]["namespace"].as_str()
}

/// The line, with its end. `node`: whose tunnel tells it, where several do.
pub(super) fn render(event: &Value, node: Option<&str>, screen: Screen) -> String {
    let mut words = Vec::new();
    let time = event["time"].as_str();
    words.extend(time.map(|it| screen.quiet(it)));
    words.extend(node.map(str::to_owned));
    match kind(event) {
        "missed" => words.push(screen.bad(&missed(event))),
        kind => {
            words.push(marked(kind, screen));
            words.extend(flow(event));
        }
    }
    words.join("  ") + "\n"
}

fn marked(kind: &str, screen: Screen) -> String {
    let padded = format!("{kind:<7}");
    match kind {
        "opened" => screen.good(&padded),
        "refused" | "failed" => screen.bad(&padded),
        _ => padded,
    }
}

fn missed(event: &Value) -> String {
    let failures = event["failures"].as_object();
    let failures = failures.into_iter().flatten();
    let failures: Vec<_> = failures
        .map(|(reason, count)| format!("{count} x {reason}"))
        .collect();
    let mut text = format!("missed {} events of traffic", event["traffic"]);
    if !failures.is_empty() {
        text.push_str(&format!(", and refusals: {}", failures.join(", ")));
    }
    text
}

fn flow(event: &Value) -> Vec<String> {
    let mut words = vec![
        format!("{:<8}", event["direction"].as_str().unwrap_or_default()),
        format!("{} -> {}", end(event, "source"), end(event, "destination")),
    ];
    let service = event["service"]["hostname"].as_str();
    words.extend(service.map(|it| format!("({it})")));
    if event["security"] != "mutual_tls" {
        let security = event["security"].as_str().unwrap_or_default();
        words.push(security.replace('_', " "));
    }
    let bytes = |key: &str| event[key].as_u64().unwrap_or(0);
    if matches!(kind(event), "closed" | "failed") {
        let (sent, received) = (bytes("received_bytes"), bytes("sent_bytes"));
        words.push(format!("{sent} B there, {received} B back"));
    }
    let error = event["error"].as_str().or(event["reason"].as_str());
    words.extend(error.filter(|it| *it != "complete").map(str::to_owned));
    let policies = event["policies"].as_array().into_iter().flatten();
    let policies: Vec<_> = policies.filter_map(Value::as_str).collect();
    if !policies.is_empty() {
        words.push(format!("by {}", policies.join(",")));
    }
    let count = event["count"].as_u64().unwrap_or(1);
    if count > 1 {
        let first = event["first"].as_str().unwrap_or_default();
        words.push(format!("{count} times since {first}"));
    }
    words
}

/// A pod by its name, with its identity's account where that was proven, or just an address.
fn end(event: &Value, which: &str) -> String {
    let party = &event[which];
    let address = event[format!("{which}_addr")].as_str().unwrap_or("?");
    match (party["pod"].as_str(), namespace(party)) {
        (Some(pod), Some(namespace)) if which == "destination" => {
            let port = address.rsplit_once(':').map_or("", |it| it.1);
            format!("{pod}.{namespace}:{port}")
        }
        (Some(pod), Some(namespace)) => format!("{pod}.{namespace}"),
        _ => address.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn event() -> Value {
        json!({
            "event": "refused", "time": "2026-01-02T03:04:05.000Z", "count": 3,
            "first": "2026-01-02T03:04:04.000Z", "reason": "explicitly denied",
            "error": "explicitly denied by: shop/deny-all (rule 0)",
            "policies": ["shop/deny-all"], "direction": "inbound", "security": "mutual_tls",
            "source": {"pod": "client-1", "labels": {"namespace": "shop"}},
            "source_addr": "10.1.0.5:40000",
            "destination": {"pod": "web-1", "labels": {"namespace": "shop"}},
            "destination_addr": "10.1.1.9:15008",
            "service": {"hostname": "web.shop.svc.cluster.local"},
        })
    }

    fn plain(event: &Value, node: Option<&str>) -> String {
        render(event, node, crate::screen::plain())
    }

    #[test]
    fn a_denial_says_who_whom_why_and_how_often() {
        assert_eq!(
            plain(&event(), Some("n1")),
            "2026-01-02T03:04:05.000Z  n1  refused  inbound   client-1.shop -> web-1.shop:15008  \
             (web.shop.svc.cluster.local)  explicitly denied by: shop/deny-all (rule 0)  by shop/deny-all  \
             3 times since 2026-01-02T03:04:04.000Z\n"
        );
    }

    #[test]
    fn a_connection_that_closed_tells_its_bytes_and_an_unknown_end_its_address() {
        let event = json!({
            "event": "closed", "time": "T", "count": 1, "reason": "complete", "direction": "outbound",
            "security": "plaintext", "source": {"pod": null, "labels": {}}, "source_addr": "10.1.0.5:40000",
            "destination": {}, "destination_addr": "192.0.2.1:443", "received_bytes": 12, "sent_bytes": 345,
        });
        let expected = "T  closed   outbound  10.1.0.5:40000 -> 192.0.2.1:443  plaintext  12 B there, 345 B back\n";
        assert_eq!(plain(&event, None), expected);
    }

    #[test]
    fn what_was_missed_is_said_with_its_reasons() {
        let event = json!({"event": "missed", "traffic": 7, "failures": {"explicitly denied": 2}});
        let expected = "missed 7 events of traffic, and refusals: 2 x explicitly denied\n";
        assert_eq!(plain(&event, None), expected);
    }

    #[test]
    fn a_filter_takes_either_end() {
        let of = |namespace: Option<&str>, pod: Option<&str>| Filter {
            namespace: namespace.map(str::to_owned),
            pod: pod.map(|name| PodName {
                namespace: "shop".into(),
                name: name.into(),
            }),
        };
        for (filter, wanted) in [
            (Filter::default(), true),
            (of(Some("shop"), None), true),
            (of(Some("other"), None), false),
            (of(None, Some("web-1")), true),
            (of(None, Some("client-1")), true),
            (of(None, Some("web-2")), false),
        ] {
            assert_eq!(filter.wants(&event()), wanted, "{filter:?}");
        }
        assert!(!Filter::default().wants(&json!({"event": "alive"})));
        assert!(of(Some("other"), None).wants(&json!({"event": "missed"})));
    }
}
