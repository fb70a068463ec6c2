use super::*;

const POLICY: &str = "\
apiVersion: v1
kind: Namespace
metadata: {name: shop, labels: {istio.io/dataplane-mode: ambient}}
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: typo, namespace: shop}
spec:
  action: ALLOW
  rules: [{form: [{source: {namespaces: [shop]}}]}]
---
apiVersion: v1
kind: Service
metadata: {name: orders, namespace: shop, labels: {istio.io/use-waypoint: missing}}
spec:
  clusterIP: 10.96.0.7
  selector: {app: orders}
  ports: [{name: tcp, port: 7000}]
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: paths, namespace: shop}
spec:
  action: ALLOW
  rules: [{to: [{operation: {paths: [/x]}}]}]
";

fn of_files(files: &[(&str, &str)], objects: &[Value]) -> Vec<Finding> {
    let texts = files
        .iter()
        .map(|(name, text)| ((*name).to_owned(), (*text).to_owned()))
        .collect();
    let mesh = mesh_config::written(None, &texts, objects, "istio-system");
    let settings = mesh_config::settings(&mesh, "istio-system");
    let statuses = statuses(&texts, objects, settings).unwrap();
    let selecting = selectors::findings(&texts, objects, "istio-system");
    findings(&statuses, selecting, None, &suppressed(&texts, objects))
}

fn codes(found: &[Finding]) -> Vec<(&str, &str)> {
    found
        .iter()
        .map(|it| (it.code, it.origin.as_str()))
        .collect()
}

#[test]
fn the_control_planes_own_word_is_told_with_istioctls_codes() {
    let found = of_files(&[("shop/policy.yaml", POLICY)], &[]);
    let told = codes(&found);
    for expected in [
        ("IST0106", "AuthorizationPolicy typo.shop"),
        ("IST0101", "Service orders.shop"),
    ] {
        assert!(told.contains(&expected), "{expected:?} not in {found:#?}");
    }
    let about_paths = found
        .iter()
        .find(|it| it.origin == "AuthorizationPolicy paths.shop");
    assert!(
        about_paths.is_some_and(|it| it.level == Level::Warning),
        "{found:#?}"
    );
    let typo = found.iter().find(|it| it.code == "IST0106").unwrap();
    assert_eq!(typo.reference.as_deref(), Some("shop/policy.yaml:5"));
    assert!(
        typo.message.contains("shop/policy.yaml:10") && typo.message.contains("form"),
        "{}",
        typo.message
    );
}

#[test]
fn sound_files_have_no_findings() {
    for (name, text) in [
        (
            "web.yaml",
            include_str!("../../../../deploy/samples/shop/web.yaml"),
        ),
        (
            "clients.yaml",
            include_str!("../../../../deploy/samples/shop/clients.yaml"),
        ),
        (
            "policy.yaml",
            include_str!("../../../../deploy/samples/shop/policy.yaml"),
        ),
    ] {
        let found = of_files(&[(name, text)], &[]);
        assert_eq!(codes(&found), [], "{name}: {found:#?}");
    }
}

#[test]
fn a_file_stands_in_place_of_the_clusters_object() {
    let broken = json!({
        "apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy",
        "metadata": {"name": "p", "namespace": "shop"}, "spec": {"action": "NONSENSE"}
    });
    let found = of_files(&[], std::slice::from_ref(&broken));
    let policy = "AuthorizationPolicy p.shop";
    assert_eq!(codes(&found), [("IST0106", policy), ("IST0171", policy)]);
    assert_eq!(found[0].reference, None);
    let mended = "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: p, namespace: shop}\n\
                  spec: {action: DENY, rules: [{to: [{operation: {ports: ['1']}}]}]}\n";
    let found = of_files(&[("p.yaml", mended)], &[broken]);
    assert!(
        found.iter().all(|it| it.level != Level::Error),
        "{found:#?}"
    );
}

#[test]
fn findings_can_be_suppressed() {
    let annotated = POLICY.replace(
        "{name: typo, namespace: shop}",
        "{name: typo, namespace: shop, annotations: {galley.istio.io/analyze-suppress: 'IST0133,IST0106'}}",
    );
    let found = of_files(&[("p.yaml", &annotated)], &[]);
    assert!(
        !codes(&found).contains(&("IST0106", "AuthorizationPolicy typo.shop")),
        "{found:#?}"
    );
    let wish: Suppression = "IST0101=Service *.shop".parse().unwrap();
    let covered: Vec<_> = found.iter().filter(|it| wish.covers(it)).collect();
    assert_eq!(covered.len(), 1);
    assert!("IST0101".parse::<Suppression>().is_err());
    assert!("IST9999=Service x.y".parse::<Suppression>().is_err());
}

#[test]
fn a_finding_is_a_line_as_istioctl_writes_it() {
    let finding = Finding {
        level: Level::Error,
        code: "IST0106",
        message: "spec.rules[0].form: unknown field".to_owned(),
        origin: "AuthorizationPolicy typo.shop".to_owned(),
        reference: Some("p.yaml:5".to_owned()),
    };
    let expected = "Error [IST0106] (AuthorizationPolicy typo.shop p.yaml:5) spec.rules[0].form: unknown field";
    assert_eq!(finding.to_string(), expected);
}

#[test]
fn routes_are_told_of_at_each_parent() {
    let route = "\
apiVersion: v1
kind: Service
metadata: {name: web, namespace: shop}
spec:
  clusterIP: 10.96.0.8
  ports: [{name: http, port: 80}]
---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: web, namespace: shop}
spec:
  parentRefs:
  - {group: '', kind: Service, name: web, port: 80}
  - {group: '', kind: Service, name: wep}
  rules: [{backendRefs: [{name: nowhere, port: 80}]}]
";
    let found = of_files(&[("shop/route.yaml", route)], &[]);
    let told: Vec<_> = found
        .iter()
        .filter(|it| it.origin == "HTTPRoute web.shop")
        .map(|it| (it.code, it.message.as_str()))
        .collect();
    let missing = "ResolvedRefs: BackendNotFound: there is no Service shop/nowhere; answered 500";
    let expected = [
        ("IST0171", "Service web port 80: Accepted: NoWaypoint: not enforced: no waypoint serves web (label istio.io/use-waypoint)".to_owned()),
        ("IST0101", format!("Service web port 80: {missing}")),
        ("IST0101", "Service wep: Accepted: NoMatchingParent: there is no Service shop/wep".to_owned()),
        ("IST0101", format!("Service wep: {missing}")),
    ];
    for (code, message) in &expected {
        assert!(
            told.contains(&(code, message)),
            "{message:?} not in {told:#?}"
        );
    }
}

#[test]
fn what_is_looked_for_is_named_by_code_or_name() {
    #[derive(clap::Parser)]
    struct Line {
        #[command(flatten)]
        analyze: Analyze,
    }
    let line = |arguments: &[&str]| {
        let all = ["analyze"].iter().chain(arguments).copied();
        <Line as clap::Parser>::try_parse_from(all)
    };
    let found = of_files(&[("shop/policy.yaml", POLICY)], &[]);
    let left = |arguments: &[&str]| -> BTreeSet<&str> {
        let asked = line(arguments).expect("an option").analyze;
        let left = found.iter().filter(|it| asked.asks_for(it));
        left.map(|it| it.code).collect()
    };
    assert!(left(&[]).len() > 2);
    let wanted = [
        "--analyzer",
        "ist0101",
        "--analyzer",
        "SchemaValidationError",
    ];
    assert_eq!(left(&wanted), ["IST0101", "IST0106"].into());
    assert!(line(&["--analyzer", "IST9999"]).is_err());
}
