use std::{collections::BTreeMap, fs, net::SocketAddr, path::PathBuf};

use serde_json::Value;

use super::{
    Family, InterfaceName, PodRules, ProbeAddresses, Stage,
    host::{self, ProbeSource},
    iptables,
    nft::{self, Installed},
};

/// Compares with `tests/golden/<name>`; `UPDATE_GOLDENS=1` writes it instead.
#[track_caller]
fn golden(name: &str, text: &str) {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("tests/golden")
        .join(name);
    if std::env::var_os("UPDATE_GOLDENS").is_some() {
        fs::write(&path, text).expect("write the golden");
    }
    let expected = fs::read_to_string(&path).unwrap_or_default();
    assert!(
        expected == text,
        "{name} differs; review, then UPDATE_GOLDENS=1\n{text}"
    );
}

/// One command on each line: a diff of a golden shows one rule.
fn lines(transaction: &Value) -> String {
    let commands = transaction["nftables"]
        .as_array()
        .expect("a list of commands");
    commands
        .iter()
        .map(|command| format!("{command}\n"))
        .collect()
}

fn variants() -> BTreeMap<&'static str, PodRules> {
    let base = PodRules::default();
    let interfaces = ["vmtap0", "kubevirt.1"].map(|name| name.parse().expect("a name"));
    BTreeMap::from([
        ("default", base.clone()),
        (
            "no-dns",
            PodRules {
                dns_capture: false,
                ..base.clone()
            },
        ),
        (
            "ingress",
            PodRules {
                ingress_mode: true,
                ..base.clone()
            },
        ),
        (
            "virtual-interfaces",
            PodRules {
                virtual_interfaces: interfaces.to_vec(),
                ..base.clone()
            },
        ),
        (
            "no-ipv6",
            PodRules {
                ipv6: false,
                ..base
            },
        ),
    ])
}

#[test]
fn nft_text_of_every_variant() {
    for (name, rules) in variants() {
        golden(
            &format!("{name}.nft.json"),
            &lines(&nft::install(&rules, Stage::Redirect, Vec::new())),
        );
        golden(
            &format!("{name}.leaving.nft.json"),
            &lines(&nft::install(&rules, Stage::Leaving, Vec::new())),
        );
    }
    golden("remove.nft.json", &lines(&nft::remove()));
}

#[test]
fn iptables_text_of_every_variant() {
    for (name, rules) in variants() {
        for stage in [Stage::Redirect, Stage::Leaving] {
            let text: String = rules
                .families()
                .iter()
                .map(|family| {
                    format!(
                        "# {family:?}\n{}",
                        iptables::install(&rules, stage, *family)
                    )
                })
                .collect();
            golden(&format!("{name}.{stage}.iptables"), &text);
        }
    }
    let undo: Vec<String> = [Family::V4, Family::V6]
        .into_iter()
        .flat_map(iptables::remove)
        .collect();
    golden("remove.iptables", &(undo.join("\n") + "\n"));
}

#[test]
fn host_text_of_every_probe_source() {
    let sources = [
        (
            "cgroup",
            ProbeSource::Cgroup {
                path: "unified/kubelet".into(),
                level: 1,
            },
        ),
        ("uid", ProbeSource::Uid(0)),
        ("mark", ProbeSource::Mark(0x2000)),
    ];
    for (name, source) in sources {
        golden(
            &format!("host-{name}.nft"),
            &host::install(&source, &ProbeAddresses::default()),
        );
    }
}

#[test]
fn every_tcp_redirect_matches_connection_attempts_only() {
    for (name, rules) in variants() {
        for rule in rules.rules(Stage::Redirect) {
            let tcp = super::Match::Syn;
            let udp = rule
                .matches
                .iter()
                .any(|m| matches!(m, super::Match::UdpTo(_)));
            let redirect = matches!(rule.action, super::Action::Redirect(_));
            assert_eq!(
                redirect && !udp,
                rule.matches.contains(&tcp),
                "{name}: {rule:?}"
            );
        }
    }
}

#[test]
fn leaving_redirects_nothing_and_keeps_the_marks() {
    for (name, rules) in variants() {
        let leaving = rules.rules(Stage::Leaving);
        assert!(
            !leaving
                .iter()
                .any(|rule| matches!(rule.action, super::Action::Redirect(_))),
            "{name}"
        );
        let marks = |stage| -> Vec<_> {
            rules
                .rules(stage)
                .into_iter()
                .filter(|it| it.table != super::Table::Nat || it.action == super::Action::Tag)
                .collect()
        };
        assert_eq!(marks(Stage::Leaving), marks(Stage::Redirect), "{name}");
    }
}

#[test]
fn no_rule_of_ipv6_without_ipv6() {
    let rules = PodRules {
        ipv6: false,
        ..PodRules::default()
    };
    let text = nft::install(&rules, Stage::Redirect, Vec::new()).to_string();
    assert!(!text.contains("ip6"), "{text}");
}

#[test]
fn comment_is_read_back_and_tells_variants_and_stages_apart() {
    let mut seen = Vec::new();
    for rules in variants().values() {
        for stage in [Stage::Redirect, Stage::Leaving] {
            let installed = Installed::of(rules, stage);
            assert_eq!(
                Installed::parse(&installed.comment()),
                Some(installed.clone())
            );
            assert!(installed.comment().len() < 128);
            if stage == Stage::Redirect {
                assert!(!seen.contains(&installed.fingerprint));
                seen.push(installed.fingerprint);
            }
        }
    }
    for foreign in [
        "",
        "leyline",
        "kube redirect rules=1 0",
        "leyline resting rules=1 0",
        "leyline redirect rules=x 0",
    ] {
        assert_eq!(Installed::parse(foreign), None, "{foreign}");
    }
}

#[test]
fn interface_names_that_could_be_syntax_are_refused() {
    for bad in [
        "",
        "..",
        "a b",
        "a\"b",
        "eth0;",
        "-i",
        "sixteen-letters-",
        "{x}",
    ] {
        assert!(bad.parse::<InterfaceName>().is_err(), "{bad}");
    }
}

#[test]
fn host_set_changes_add_first_and_delete_later() {
    let entry = |address: &str, uid: &str| {
        (
            address.parse::<SocketAddr>().expect("address"),
            uid.to_owned(),
        )
    };
    let now = BTreeMap::from([
        entry("10.0.0.1:80", "a"),
        entry("10.0.0.2:80", "b"),
        entry("[fd00::1]:80", "a"),
    ]);
    let wanted = BTreeMap::from([
        entry("10.0.0.1:80", "a"),
        entry("10.0.0.2:80", "c"),
        entry("10.0.0.3:81", "c"),
    ]);
    let text = host::change(&now, &wanted).expect("a change");
    let expected = "delete element inet istio-ambient-nat istio-inpod-probe-ports-v4 { 10.0.0.2 . 80 }\n\
        add element inet istio-ambient-nat istio-inpod-probe-ports-v4 { 10.0.0.2 . 80 comment \"c\" }\n\
        add element inet istio-ambient-nat istio-inpod-probe-ports-v4 { 10.0.0.3 . 81 comment \"c\" }\n\
        delete element inet istio-ambient-nat istio-inpod-probe-ports-v6 { fd00::1 . 80 }\n";
    assert_eq!(text, expected);
    assert_eq!(host::change(&wanted, &wanted), None);
}

#[test]
fn a_uid_cannot_end_its_comment() {
    assert_eq!(host::comment("a\" } ; flush ruleset ; {"), "aflushruleset");
}
