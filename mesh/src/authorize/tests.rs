use super::*;
use crate::{
    fixture::{apply, identity, pod, socket, view},
    policy::{Clause, PolicyScope},
};

/// The wire's nesting in the JSON of a dump: `[[[{"principals":[{"Exact":"x"}]}]]]`.
fn policy(key: &str, scope: PolicyScope, action: Action, rules: &str) -> AuthorizationPolicy {
    AuthorizationPolicy {
        key: key.parse().unwrap(),
        scope,
        action,
        rules: serde_json::from_str(rules).unwrap(),
        dry_run: false,
        faults: Vec::new(),
    }
}

fn allow(rules: &str) -> AuthorizationPolicy {
    policy("a/allow", PolicyScope::Namespace, Action::Allow, rules)
}

fn deny(rules: &str) -> AuthorizationPolicy {
    policy("a/deny", PolicyScope::Namespace, Action::Deny, rules)
}

fn on_trial(policy: AuthorizationPolicy) -> AuthorizationPolicy {
    AuthorizationPolicy {
        dry_run: true,
        ..policy
    }
}

fn facts(peer: Option<Identity>) -> AuthorizationFacts {
    AuthorizationFacts::new(peer, socket("10.0.0.1:40000"), socket("10.0.0.2:8080"))
}

fn peer() -> Option<Identity> {
    Some(identity("b", "client"))
}

fn verdict(policies: &[AuthorizationPolicy], facts: &AuthorizationFacts) -> Verdict {
    let view = view(policies.iter().cloned().map(Into::into));
    authorize(&view, &pod("a/web", &["10.0.0.2"]), facts)
}

#[track_caller]
fn decides(policies: &[AuthorizationPolicy], peer: Option<Identity>, expected: &str) {
    let told = match verdict(policies, &facts(peer)).decision {
        Decision::Allow { by: None } => "allow".to_owned(),
        Decision::Allow { by: Some(by) } => format!("allow {} {}", by.policy, by.rule),
        Decision::Deny { refusal, by: None } => format!("deny: {refusal}"),
        Decision::Deny {
            refusal,
            by: Some(by),
        } => format!("deny {}: {refusal}", by.rule),
        Decision::Need(key) => format!("need {key}"),
    };
    assert_eq!(told, expected);
}

const ANY: &str = "[[]]";
const NEVER: &str = "[[[{}]]]";
const NOT_ALLOWED: &str = "deny: allow policies exist, but none allowed";

#[test]
fn deny_beats_allow_and_allow_beats_silence() {
    decides(&[], peer(), "allow");
    decides(&[allow(ANY)], peer(), "allow a/allow 0");
    decides(&[allow(NEVER)], peer(), NOT_ALLOWED);
    decides(&[deny(ANY)], peer(), "deny 0: explicitly denied by: a/deny");
    decides(&[deny(NEVER)], peer(), "allow");
    decides(
        &[allow(ANY), deny(ANY)],
        peer(),
        "deny 0: explicitly denied by: a/deny",
    );
    decides(&[allow(ANY), deny(NEVER)], peer(), "allow a/allow 0");
}

#[test]
fn each_level_of_emptiness_means_what_the_wire_says() {
    for (rules, matches) in [
        ("[]", false),
        ("[[]]", true),
        ("[[[]]]", true),
        ("[[[{}]]]", false),
    ] {
        let expected = if matches {
            "allow a/allow 0"
        } else {
            NOT_ALLOWED
        };
        decides(&[allow(rules)], peer(), expected);
        let expected = if matches {
            "deny 0: explicitly denied by: a/deny"
        } else {
            "allow"
        };
        decides(&[deny(rules)], peer(), expected);
    }
}

#[test]
fn the_rule_that_matched_is_named() {
    let rules = r#"[[[{"principals":[{"Exact":"x"}]}]],[[{"namespaces":[{"Exact":"b"}]}]]]"#;
    decides(&[allow(rules)], peer(), "allow a/allow 1");
}

/// Whether one match, as the only one of an ALLOW policy, lets the connection in.
#[track_caller]
fn matches(one: &str, peer: Option<Identity>, expected: bool) {
    let rules = format!("[[[{one}]]]");
    let told = verdict(&[allow(&rules)], &facts(peer)).decision.is_allow();
    assert_eq!(told, expected, "{one}");
}

#[test]
fn identities_are_compared() {
    let me = "cluster.local/ns/b/sa/client";
    for (field, exact, prefix, suffix) in [
        ("principals", me, "cluster.local/ns/b/", "/sa/client"),
        ("namespaces", "b", "b", "b"),
    ] {
        for (kind, text, expected) in [
            ("Exact", exact, true),
            ("Exact", "cluster.local/ns/B/sa/client", false),
            ("Exact", "spiffe://cluster.local/ns/b/sa/client", false),
            ("Prefix", prefix, true),
            ("Prefix", "x", false),
            ("Suffix", suffix, true),
            ("Suffix", "x", false),
        ] {
            let list = format!(r#"[{{"{kind}":"{text}"}}]"#);
            let not = format!("not{}{}", field[..1].to_uppercase(), &field[1..]);
            matches(&format!(r#"{{"{field}":{list}}}"#), peer(), expected);
            matches(&format!(r#"{{"{not}":{list}}}"#), peer(), !expected);
            matches(&format!(r#"{{"{field}":{list}}}"#), None, false);
            matches(&format!(r#"{{"{not}":{list}}}"#), None, true);
        }
        matches(
            &format!(r#"{{"{field}":[{{"Presence":[]}}]}}"#),
            peer(),
            true,
        );
        matches(
            &format!(r#"{{"{field}":[{{"Presence":[]}}]}}"#),
            None,
            false,
        );
    }
}

#[test]
fn service_accounts_are_compared_in_any_trust_domain() {
    let other: Identity = "spiffe://elsewhere/ns/b/sa/client".parse().unwrap();
    let one = r#"{"serviceAccounts":[{"namespace":"b","serviceAccount":"client"}]}"#;
    let not = r#"{"notServiceAccounts":[{"namespace":"b","serviceAccount":"client"}]}"#;
    matches(one, peer(), true);
    matches(one, Some(other), true);
    matches(one, Some(identity("b", "other")), false);
    matches(one, None, false);
    matches(not, peer(), false);
    matches(not, None, true);
}

#[test]
fn addresses_and_ports_are_those_of_the_pod() {
    for (one, expected) in [
        (r#"{"sourceIps":["10.0.0.0/8"]}"#, true),
        (r#"{"sourceIps":["10.0.0.2/32"]}"#, false),
        (r#"{"sourceIps":["::/0"]}"#, false),
        (r#"{"notSourceIps":["10.0.0.0/8"]}"#, false),
        (r#"{"destinationIps":["10.0.0.2/32"]}"#, true),
        (r#"{"destinationIps":["10.0.0.1/32"]}"#, false),
        (r#"{"notDestinationIps":["10.0.0.1/32"]}"#, true),
        (r#"{"destinationPorts":[80,8080]}"#, true),
        (r#"{"destinationPorts":[80]}"#, false),
        (r#"{"notDestinationPorts":[80]}"#, true),
        (r#"{"notDestinationPorts":[8080]}"#, false),
    ] {
        matches(one, peer(), expected);
        matches(one, None, expected);
    }
}

#[test]
fn kinds_are_anded_and_values_are_ored() {
    let both = r#"{"namespaces":[{"Exact":"x"},{"Exact":"b"}],"destinationPorts":[8080]}"#;
    matches(both, peer(), true);
    matches(both, Some(identity("c", "client")), false);
    matches(
        r#"{"namespaces":[{"Exact":"b"}],"destinationPorts":[1]}"#,
        peer(),
        false,
    );
    matches(
        r#"{"destinationPorts":[8080],"notDestinationPorts":[8080]}"#,
        peer(),
        false,
    );
    // Two clauses are ANDed, two matches of one clause are ORed.
    let port = r#"{"destinationPorts":[8080]}"#;
    let other = r#"{"destinationPorts":[1]}"#;
    decides(
        &[allow(&format!("[[[{port}],[{other}]]]"))],
        peer(),
        NOT_ALLOWED,
    );
    decides(
        &[allow(&format!("[[[{port},{other}]]]"))],
        peer(),
        "allow a/allow 0",
    );
}

#[test]
fn strict_mutual_tls_is_a_deny_of_who_has_no_identity() {
    let strict = deny(r#"[[[{"notPrincipals":[{"Presence":[]}]}]]]"#);
    let one = std::slice::from_ref(&strict);
    decides(one, None, "deny 0: explicitly denied by: a/deny");
    decides(one, peer(), "allow");
}

#[test]
fn an_ipv4_mapped_peer_is_an_ipv4_peer() {
    let mapped =
        AuthorizationFacts::new(None, socket("[::ffff:10.0.0.1]:1"), socket("10.0.0.2:80"));
    let rules = r#"[[[{"sourceIps":["10.0.0.1/32"]}]]]"#;
    assert!(verdict(&[allow(rules)], &mapped).decision.is_allow());
}

#[test]
fn policies_apply_by_scope() {
    let scoped = |key: &str, scope| policy(key, scope, Action::Deny, ANY);
    let other_namespace = scoped("b/deny", PolicyScope::Namespace);
    let global = scoped("b/deny", PolicyScope::Global);
    let selector = scoped("a/deny", PolicyScope::WorkloadSelector);
    decides(&[other_namespace], None, "allow");
    decides(&[global], None, "deny 0: explicitly denied by: b/deny");
    decides(&[selector], None, "allow");
}

fn naming(key: &str) -> Workload {
    {
        let mut it = pod("a/web", &["10.0.0.2"]);
        it.authorization_policies = vec![key.parse().unwrap()];
        it
    }
}

#[test]
fn a_policy_that_is_named_applies_once_it_is_known_and_denies_until_then() {
    let workload = naming("a/late");
    let mut view = view([]);
    let decide = |view: &MeshView| authorize(view, &workload, &facts(peer())).decision;
    let key: PolicyKey = "a/late".parse().unwrap();
    assert_eq!(decide(&view), Decision::Need(key.clone()));
    let Decision::Deny { refusal, .. } = decide(&view).unmet() else {
        panic!("an unknown policy allowed");
    };
    assert_eq!(
        refusal,
        Refusal::by(Reason::PolicyUnknown, Object::Policy(key))
    );
    let skipped = AuthorizationFacts {
        unknown_policies: UnknownPolicies::Skip,
        ..facts(peer())
    };
    assert!(authorize(&view, &workload, &skipped).decision.is_allow());
    let late = policy("a/late", PolicyScope::WorkloadSelector, Action::Allow, ANY);
    apply(&mut view, [late.into()]);
    assert!(decide(&view).is_allow());
}

#[test]
fn a_deny_does_not_wait_for_a_policy_that_is_not_known() {
    let view = view([deny(ANY).into()]);
    let decision = authorize(&view, &naming("a/late"), &facts(peer())).decision;
    assert!(
        matches!(decision, Decision::Deny { by: Some(_), .. }),
        "{decision:?}"
    );
}

#[test]
fn a_policy_on_trial_decides_nothing_and_is_told() {
    let told = |policies: &[AuthorizationPolicy]| {
        let verdict = verdict(policies, &facts(peer()));
        (verdict.decision.is_allow(), verdict.findings)
    };
    let rule = |key: &str| RuleRef {
        policy: key.parse().unwrap(),
        rule: 0,
    };
    assert_eq!(
        told(&[on_trial(deny(ANY))]),
        (true, vec![Finding::WouldDeny(rule("a/deny"))])
    );
    assert_eq!(
        told(&[on_trial(allow(ANY))]),
        (true, vec![Finding::WouldAllow(rule("a/allow"))])
    );
    assert_eq!(
        told(&[on_trial(allow(NEVER))]),
        (true, vec![Finding::WouldNotAllow])
    );
    let other = policy("a/enforced", PolicyScope::Namespace, Action::Allow, ANY);
    assert_eq!(told(&[on_trial(allow(NEVER)), other]), (true, vec![]));
}

/// Every set of policies drawn from a pool: a DENY that matches refuses whatever else there is, and adding a DENY
/// never lets anyone in.
#[test]
fn deny_beats_allow_in_every_combination() {
    let clauses = [
        "[]",
        "[[]]",
        "[[[{}]]]",
        r#"[[[{"namespaces":[{"Exact":"b"}]}]]]"#,
    ];
    let pool: Vec<_> = clauses
        .iter()
        .enumerate()
        .flat_map(|(at, rules)| {
            let key = |kind: &str| format!("a/{kind}-{at}");
            [
                policy(&key("allow"), PolicyScope::Namespace, Action::Allow, rules),
                policy(&key("deny"), PolicyScope::Global, Action::Deny, rules),
            ]
        })
        .collect();
    for set in 0..1_usize << pool.len() {
        let chosen = pool.iter().enumerate().filter(|(at, _)| set >> at & 1 == 1);
        let chosen: Vec<_> = chosen.map(|(_, it)| it.clone()).collect();
        for peer in [peer(), None] {
            let facts = facts(peer);
            let allowed = verdict(&chosen, &facts).decision.is_allow();
            let denied = chosen
                .iter()
                .any(|it| it.action == Action::Deny && matching_rule(it, &facts).is_some());
            assert!(!(allowed && denied), "{chosen:?}");
            let mut more = chosen.clone();
            more.push(policy(
                "a/more",
                PolicyScope::Global,
                Action::Deny,
                clauses[3],
            ));
            assert!(
                allowed || !verdict(&more, &facts).decision.is_allow(),
                "{more:?}"
            );
        }
    }
}

#[test]
fn a_rule_without_clauses_differs_from_one_with_an_empty_match() {
    let none = Rule {
        clauses: Vec::new(),
    };
    let empty = Rule {
        clauses: vec![Clause {
            matches: vec![Match::default()],
        }],
    };
    assert!(rule_matches(&none, &facts(None)));
    assert!(!rule_matches(&empty, &facts(None)));
}

#[test]
fn for_want_of_an_allow_the_policies_that_might_have_are_named() {
    let named = |names: &[&str]| {
        let policies: Vec<_> = names
            .iter()
            .map(|name| policy(name, PolicyScope::Namespace, Action::Allow, NEVER))
            .chain([deny(NEVER), on_trial(allow(NEVER))])
            .collect();
        match verdict(&policies, &facts(peer())).decision {
            Decision::Deny { refusal, .. } => {
                let object = refusal.object.expect("policies");
                crate::outcome::listed(object.policies())
            }
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(named(&["a/c", "a/b"]), "a/b,a/c");
    let many = [
        "a/8", "a/7", "a/6", "a/5", "a/4", "a/3", "a/2", "a/1", "a/9",
    ];
    assert_eq!(named(&many), "a/1,a/2,a/3,a/4,a/5,a/6,a/7,a/8");
}

#[test]
fn a_waypoint_is_judged_by_what_selects_it_alone() {
    let of_namespace = policy(
        "a/all",
        PolicyScope::Namespace,
        Action::Allow,
        r#"[[[{"principals": [{"Exact": "cluster.local/ns/b/sa/waypoint"}]}]]]"#,
    );
    let selecting = policy("a/own", PolicyScope::WorkloadSelector, Action::Allow, "[]");
    let view = view([of_namespace.into(), selecting.into()]);
    let mut workload = pod("a/wp", &["10.0.0.2"]);
    let decision = authorize_selected(&view, &workload, &facts(peer()));
    assert!(decision.is_allow(), "{decision:?}");
    workload.authorization_policies = vec!["a/own".parse().unwrap()];
    let decision = authorize_selected(&view, &workload, &facts(peer()));
    assert!(!decision.is_allow(), "{decision:?}");
    workload.authorization_policies = vec!["a/unknown".parse().unwrap()];
    let decision = authorize_selected(&view, &workload, &facts(peer()));
    assert!(matches!(decision, Decision::Need(_)), "{decision:?}");
}
