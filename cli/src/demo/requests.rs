//! The claims about requests: a namespace with a waypoint.

use std::collections::BTreeMap;

use anyhow::{Context, Result, ensure};

use super::{stage::Stage, steps::LIMIT};
use crate::local::rig::{Rig, until};

const CATALOG: &str = "http://catalog.store/";
const PRICES: &str = "http://prices.store/";
/// Requests for the shares of a canary: of a tenth, 40 are expected, and less than 15 or more than 70 once in 10,000 runs.
const MANY: u32 = 400;

/// All of them.
pub(super) fn all(stage: &Stage, rig: &Rig) -> Result<()> {
    opts_in(stage, rig)?;
    splits(stage, rig)?;
    denies(stage, rig)?;
    fails_on_purpose_and_tries_again(stage, rig)
}

fn opts_in(stage: &Stage, rig: &Rig) -> Result<()> {
    stage.claim(
        'i',
        "Another namespace opts in to L7: a Gateway and one label, no restart",
    );
    let before = answers(rig, CATALOG, 1, &[])?;
    stage.check(
        before[0].status == 200,
        "before it, the catalogue is served",
    );
    rig.write("waypoint.yaml", include_str!("waypoint.yaml"))?;
    stage.quote(
        "waypoint.yaml: a Gateway of class leyline-waypoint, and a log line for each request",
    );
    rig.label("store", &["istio.io/use-waypoint=waypoint"])?;
    stage.quote("leyline local label store istio.io/use-waypoint=waypoint");
    let line = stage.during("requests passing the waypoint", || {
        until("a request in the waypoint's log", LIMIT, || {
            let _ = answers(rig, CATALOG, 1, &[]);
            Ok((!waypoint_log(rig)?.contains("GET / HTTP/1.1")).then(String::new))
        })
    });
    stage.check(
        line.is_ok(),
        "a buyer's request passes the waypoint, which logs it",
    );
    let after = answers(rig, CATALOG, 10, &[])?;
    let served = after.iter().all(|answer| answer.status == 200);
    stage.check(served, "and ten more are served");
    Ok(())
}

fn splits(stage: &Stage, rig: &Rig) -> Result<()> {
    stage.claim(
        'j',
        "An HTTPRoute sends a tenth of the requests to the new version, and who asks for it by header",
    );
    let before = shares(&answers(rig, CATALOG, 40, &[])?);
    stage.evidence(&format!("before it: {}", told(&before)));
    rig.write("canary.yaml", include_str!("canary.yaml"))?;
    let asked = stage.during("the route landing", || {
        until("the canary by header", LIMIT, || {
            let found = shares(&answers(rig, CATALOG, 20, &["x-canary: yes"])?);
            Ok((found.keys().ne(["v2"])).then(|| told(&found)))
        })
    });
    stage.check(asked.is_ok(), "with x-canary: yes, 20 of 20 are v2's");
    let found = shares(&answers(rig, CATALOG, MANY, &[])?);
    let canary = found.get("v2").copied().unwrap_or_default();
    let text = format!("of {MANY} others, {}", told(&found));
    stage.check((15..=70).contains(&canary), &text);
    Ok(())
}

fn denies(stage: &Stage, rig: &Rig) -> Result<()> {
    stage.claim(
        'k',
        "An AuthorizationPolicy denies paths, and the log says which policy it was",
    );
    let admin = format!("{CATALOG}admin/users");
    let before = answers(rig, &admin, 1, &[])?;
    stage.check(before[0].status == 200, "before it, /admin/users is served");
    rig.write("no-admin.yaml", include_str!("no-admin.yaml"))?;
    let mut last = String::new();
    let denied = stage.during("the policy landing", || {
        until("a denial", LIMIT, || {
            let answer = answers(rig, &admin, 1, &[])?.remove(0);
            last = format!("{} {}", answer.status, answer.body);
            Ok((answer.status != 403).then(|| last.clone()))
        })
    });
    stage.check(denied.is_ok(), &format!("/admin/users: {last}"));
    let other = answers(rig, CATALOG, 1, &[])?;
    stage.check(other[0].status == 200, "/ is served");
    let reason = "rbac_access_denied_matched_policy[ns[store]-policy[no-admin]-rule[0]]";
    let told = until("the policy in the log", LIMIT, || {
        Ok((!waypoint_log(rig)?.contains(reason)).then(String::new))
    });
    stage.check(told.is_ok(), "the waypoint's log names the policy");
    stage.quote(reason);
    Ok(())
}

fn fails_on_purpose_and_tries_again(stage: &Stage, rig: &Rig) -> Result<()> {
    // One in eight fails: fewer than the fifth that may be tried again.
    const COUNT: u32 = 40;
    stage.claim(
        'l',
        "A VirtualService tries again what fails, and fails on purpose where it is asked to",
    );
    let failed = |found: &[Answer]| found.iter().filter(|it| it.status == 503).count();
    let before = failed(&answers(rig, PRICES, COUNT, &[])?);
    stage.check(
        before > 0,
        &format!("before it, {before} of {COUNT} answers are 503"),
    );
    rig.write("prices.yaml", include_str!("prices.yaml"))?;
    let mut fault = Answer::default();
    let landed = stage.during("the VirtualService landing", || {
        until("the fault", LIMIT, || {
            fault = answers(rig, PRICES, 1, &["x-fault: yes"])?.remove(0);
            Ok((fault.status != 418).then(|| fault.status.to_string()))
        })
    });
    let text = format!(
        "with x-fault: yes, {} after {} ms",
        fault.status, fault.milliseconds
    );
    stage.check(landed.is_ok() && fault.milliseconds >= 200, &text);
    let after = failed(&answers(rig, PRICES, COUNT, &[])?);
    stage.check(after == 0, &format!("without, {after} of {COUNT} are 503"));
    Ok(())
}

/// What the waypoint's pod has logged; empty until there is one.
fn waypoint_log(rig: &Rig) -> Result<String> {
    let pods = rig.status()?.pods;
    let mut waypoints = pods
        .iter()
        .filter(|pod| &*pod.namespace == "store" && pod.name.starts_with("waypoint-"));
    let logs = waypoints
        .next()
        .map(|pod| rig.pod_log("store", &pod.name, "istio-proxy"));
    Ok(logs.unwrap_or_default())
}

/// One answer, as `leyline tool get` tells it.
#[derive(Clone, Debug, Default)]
struct Answer {
    status: u16,
    milliseconds: u64,
    body: String,
}

fn answers(rig: &Rig, url: &str, count: u32, headers: &[&str]) -> Result<Vec<Answer>> {
    let count = count.to_string();
    let mut line = vec!["leyline", "tool", "get", url, "--count", &count];
    for header in headers {
        line.extend(["--header", header]);
    }
    let output = rig.exec("store/buyer", &line)?;
    ensure!(output.succeeded(), "{}", output.stderr.trim());
    output.stdout.lines().map(parse).collect()
}

fn parse(line: &str) -> Result<Answer> {
    let mut parts = line.splitn(3, ' ');
    let mut next = || parts.next().with_context(|| format!("read {line:?}"));
    Ok(Answer {
        status: next()?.parse()?,
        milliseconds: next()?.parse()?,
        body: next()?.to_owned(),
    })
}

/// How many answers each server gave.
fn shares(found: &[Answer]) -> BTreeMap<String, u32> {
    let mut shares = BTreeMap::new();
    for answer in found {
        let name = answer.body.split(' ').next().unwrap_or_default();
        *shares.entry(name.to_owned()).or_default() += 1;
    }
    shares
}

fn told(shares: &BTreeMap<String, u32>) -> String {
    let texts = shares
        .iter()
        .map(|(name, count)| format!("{count} are {name}'s"));
    texts.collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_counted_by_server() {
        let lines = [
            "200 3 v1 GET /",
            "200 1 v2 GET /",
            "403 0 RBAC: access denied",
            "200 0 v1 GET /",
        ];
        let found: Vec<_> = lines.map(|line| parse(line).unwrap()).to_vec();
        assert_eq!(told(&shares(&found[..2])), "1 are v1's, 1 are v2's");
        assert_eq!(shares(&found)["v1"], 2);
        assert_eq!(
            (found[2].status, found[2].body.as_str()),
            (403, "RBAC: access denied")
        );
        assert!(parse("nonsense").is_err());
    }
}
