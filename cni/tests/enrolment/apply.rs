//! Writing, reading back and removing rules.

use cni::{
    apply::Nft,
    rules::{Family, PodRules, Stage, iptables, nft},
};

use crate::rig::{Rig, picture, run, run_with_input};

fn nft_tool() -> Nft {
    Nft::find().expect("nft, as the rig has found it")
}

#[tokio::test]
async fn applying_twice_changes_nothing_and_removing_leaves_nothing() {
    let Some(rig) = Rig::new() else { return };
    let (nft, rules) = (nft_tool(), PodRules::default());
    let before = picture(&rig.pod);
    nft.apply(&rig.pod, &rules, Stage::Redirect)
        .await
        .expect("apply");
    let once = picture(&rig.pod);
    assert_ne!(before, once);
    assert!(once.contains("fwmark 0x111/0xfff lookup 100"), "{once}");
    assert!(once.contains("local default dev lo table 100"), "{once}");
    nft.apply(&rig.pod, &rules, Stage::Redirect)
        .await
        .expect("apply again");
    assert_eq!(once, picture(&rig.pod));
    assert!(
        nft.state(&rig.pod)
            .await
            .expect("state")
            .is(&rules, Stage::Redirect)
    );
    nft.apply(&rig.pod, &rules, Stage::Leaving)
        .await
        .expect("leave");
    assert_eq!(
        nft.state(&rig.pod).await.expect("state").stage(),
        Some(Stage::Leaving)
    );
    nft.remove(&rig.pod).await.expect("remove");
    assert_eq!(before, picture(&rig.pod));
    nft.remove(&rig.pod).await.expect("remove again");
    assert_eq!(before, picture(&rig.pod));
}

#[tokio::test]
async fn a_changed_plan_replaces_the_rules() {
    let Some(rig) = Rig::new() else { return };
    let nft = nft_tool();
    let before = picture(&rig.pod);
    let variants = [
        PodRules::default(),
        PodRules {
            dns_capture: false,
            ..PodRules::default()
        },
        PodRules {
            ingress_mode: true,
            ..PodRules::default()
        },
        PodRules {
            virtual_interfaces: vec!["tap0".parse().expect("a name")],
            ..PodRules::default()
        },
        PodRules {
            ipv6: false,
            ..PodRules::default()
        },
    ];
    for rules in &variants {
        nft.apply(&rig.pod, rules, Stage::Redirect)
            .await
            .expect("apply");
        let state = nft.state(&rig.pod).await.expect("state");
        for other in &variants {
            assert_eq!(
                state.is(other, Stage::Redirect),
                other == rules,
                "{other:?} for {rules:?}"
            );
        }
    }
    nft.remove(&rig.pod).await.expect("remove");
    assert_eq!(before, picture(&rig.pod));
}

#[tokio::test]
async fn a_rule_that_someone_deleted_is_noticed_and_restored() {
    let Some(rig) = Rig::new() else { return };
    let (nft, rules) = (nft_tool(), PodRules::default());
    nft.apply(&rig.pod, &rules, Stage::Redirect)
        .await
        .expect("apply");
    let whole = picture(&rig.pod);
    run(
        &rig.pod,
        "nft flush chain inet istio-ambient-nat istio-output",
    )
    .expect("someone's flush");
    let state = nft.state(&rig.pod).await.expect("state");
    assert!(state.touched() && !state.is(&rules, Stage::Redirect));
    nft.apply(&rig.pod, &rules, Stage::Redirect)
        .await
        .expect("apply");
    assert_eq!(whole, picture(&rig.pod));
}

#[tokio::test]
async fn no_ipv6_rule_where_the_pod_has_no_ipv6() {
    let Some(rig) = Rig::new() else { return };
    let (nft, rules) = (nft_tool(), PodRules::default());
    run(&rig.pod, "sysctl -qw net.ipv6.conf.all.disable_ipv6=1").expect("switch it off");
    let before = picture(&rig.pod);
    nft.apply(&rig.pod, &rules, Stage::Redirect)
        .await
        .expect("apply");
    assert!(!picture(&rig.pod).contains("ip6 "));
    assert!(
        nft.state(&rig.pod)
            .await
            .expect("state")
            .is(&rules, Stage::Redirect)
    );
    nft.remove(&rig.pod).await.expect("remove");
    assert_eq!(before, picture(&rig.pod));
}

#[tokio::test]
async fn an_iptables_agents_pod_is_taken_over() {
    let Some(rig) = Rig::new() else { return };
    if run(&rig.pod, "iptables-restore --version").is_err() {
        println!("skipped: iptables is not installed");
        return;
    }
    let (nft, rules) = (nft_tool(), PodRules::default());
    for (family, program) in [
        (Family::V4, "iptables-restore"),
        (Family::V6, "ip6tables-restore"),
    ] {
        let text = iptables::install(&rules, Stage::Redirect, family);
        run_with_input(&rig.pod, &format!("{program} --noflush"), &text);
    }
    run(&rig.pod, "iptables -t nat -A OUTPUT -d 192.0.2.1 -j ACCEPT")
        .expect("a rule of the pod's own");
    assert!(nft.state(&rig.pod).await.expect("state").foreign());
    nft.apply(&rig.pod, &rules, Stage::Redirect)
        .await
        .expect("take over");
    let state = nft.state(&rig.pod).await.expect("state");
    assert!(state.is(&rules, Stage::Redirect), "{state:?}");
    let left = run(&rig.pod, "iptables-save").expect("list");
    assert!(!left.contains("ISTIO"), "{left}");
    assert!(
        left.contains("192.0.2.1"),
        "the pod's own rule stays: {left}"
    );
}

#[tokio::test]
async fn the_iptables_undo_leaves_nothing_of_ours() {
    let Some(rig) = Rig::new() else { return };
    if run(&rig.pod, "iptables-restore --version").is_err() {
        println!("skipped: iptables is not installed");
        return;
    }
    let text = iptables::install(&PodRules::default(), Stage::Redirect, Family::V4);
    run_with_input(&rig.pod, "iptables-restore --noflush", &text);
    for line in iptables::remove(Family::V4) {
        run(&rig.pod, &line).expect("undo");
    }
    assert!(
        !run(&rig.pod, "iptables-save")
            .expect("list")
            .contains("ISTIO")
    );
}

#[tokio::test]
async fn a_sidecars_rules_are_not_another_agents() {
    let Some(rig) = Rig::new() else { return };
    if run(&rig.pod, "iptables-restore --version").is_err() {
        println!("skipped: iptables is not installed");
        return;
    }
    let text = "*nat\n:ISTIO_OUTPUT - [0:0]\n-A OUTPUT -p tcp -j ISTIO_OUTPUT\n\
                -A ISTIO_OUTPUT -j RETURN\nCOMMIT\n";
    run_with_input(&rig.pod, "iptables-restore --noflush", text);
    assert!(!nft_tool().state(&rig.pod).await.expect("state").touched());
}

#[tokio::test]
async fn upstreams_nft_tables_are_taken_over() {
    let Some(rig) = Rig::new() else { return };
    let (nft, rules) = (nft_tool(), PodRules::default());
    let mut theirs = nft::install(&rules, Stage::Redirect, Vec::new());
    for command in theirs["nftables"].as_array_mut().expect("commands") {
        if let Some(rule) = command
            .pointer_mut("/add/rule")
            .and_then(|rule| rule.as_object_mut())
        {
            rule.remove("comment");
        }
    }
    run_with_input(&rig.pod, "nft -j -f -", &theirs.to_string());
    let state = nft.state(&rig.pod).await.expect("state");
    assert!(state.foreign() && state.installed.is_none());
    nft.apply(&rig.pod, &rules, Stage::Redirect)
        .await
        .expect("take over");
    assert!(
        nft.state(&rig.pod)
            .await
            .expect("state")
            .is(&rules, Stage::Redirect)
    );
}

/// What upstream's agent hands to nftables when it enrols a pod: each table is made, emptied and filled in one transaction.
const THEIRS: &str = "
add table inet istio-ambient-nat
flush table inet istio-ambient-nat
add table inet istio-ambient-mangle
flush table inet istio-ambient-mangle
add table inet istio-ambient-raw
flush table inet istio-ambient-raw
add chain inet istio-ambient-nat prerouting { type nat hook prerouting priority dstnat; }
add chain inet istio-ambient-nat output { type nat hook output priority -100; }
add chain inet istio-ambient-mangle prerouting { type filter hook prerouting priority mangle; }
add chain inet istio-ambient-mangle output { type route hook output priority mangle; }
add chain inet istio-ambient-raw prerouting { type filter hook prerouting priority raw; }
add chain inet istio-ambient-raw output { type filter hook output priority raw; }
add chain inet istio-ambient-nat istio-prerouting
add chain inet istio-ambient-nat istio-output
add chain inet istio-ambient-mangle istio-prerouting
add chain inet istio-ambient-mangle istio-output
add rule inet istio-ambient-nat prerouting counter jump istio-prerouting
add rule inet istio-ambient-nat output counter jump istio-output
add rule inet istio-ambient-mangle prerouting counter jump istio-prerouting
add rule inet istio-ambient-mangle output counter jump istio-output
add rule inet istio-ambient-mangle istio-prerouting meta mark & 0xfff == 0x539 counter ct mark set ct mark & 0xfffff000 | 0x111
add rule inet istio-ambient-nat istio-prerouting ip daddr != 127.0.0.1 tcp dport != 15008 meta mark & 0xfff != 0x539 counter redirect to :15006
add rule inet istio-ambient-mangle istio-output ct mark & 0xfff == 0x111 counter meta mark set ct mark
add rule inet istio-ambient-nat istio-output meta l4proto tcp ip daddr != 127.0.0.1 meta mark & 0xfff != 0x539 counter redirect to :15001
";

#[tokio::test]
async fn upstreams_agent_takes_our_pods_over_and_gives_them_back() {
    let Some(rig) = Rig::new() else { return };
    let (nft, rules) = (nft_tool(), PodRules::default());
    nft.apply(&rig.pod, &rules, Stage::Redirect)
        .await
        .expect("ours");
    run_with_input(&rig.pod, "nft -f -", THEIRS);
    let listed = run(&rig.pod, "nft list ruleset").expect("list");
    assert!(
        !listed.contains("comment"),
        "none of ours is left: {listed}"
    );
    assert_eq!(listed.matches("counter").count(), 8, "{listed}");
    let state = nft.state(&rig.pod).await.expect("state");
    assert!(state.foreign() && !state.is(&rules, Stage::Redirect));
    // And back again.
    nft.apply(&rig.pod, &rules, Stage::Redirect)
        .await
        .expect("take over");
    let state = nft.state(&rig.pod).await.expect("state");
    assert!(state.is(&rules, Stage::Redirect), "{state:?}");
    nft.remove(&rig.pod).await.expect("remove");
    let left = run(&rig.pod, "nft list ruleset").expect("list");
    assert!(!left.contains("istio"), "{left}");
}
