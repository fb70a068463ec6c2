use std::{
    fs::{self, File},
    io,
    os::unix::fs::PermissionsExt as _,
    path::Path,
    sync::Arc,
    time::Duration,
};

use mesh::identity::{Identity, TrustDomain};
use rcgen::{
    BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair, KeyUsagePurpose,
    PKCS_ECDSA_P384_SHA384, PKCS_ED25519, SanType,
};
use rustls::server::WebPkiClientVerifier;
use rustls_pki_types::{CertificateDer, UnixTime};
use time::OffsetDateTime;
use tonic::Code;
use x509_parser::{
    extensions::GeneralName,
    prelude::{FromDer as _, X509Certificate},
};

use super::{
    authority::Authority,
    csr::Csr,
    disk::{self, CA_FILE, ROOT_FILE, create},
    pem, plug_in,
};
use crate::testing::{Plane, claims, csr, texts};

const DAY: i64 = 24 * 3600;

fn identity() -> Identity {
    "spiffe://cluster.local/ns/shop/sa/web".parse().unwrap()
}

fn own_root(dir: &Path) -> Authority {
    disk::load_or_create(dir, &TrustDomain::default()).unwrap()
}

fn mode(path: &Path) -> u32 {
    fs::metadata(path).unwrap().permissions().mode() & 0o777
}

fn files(dir: &Path) -> Vec<String> {
    let entries = fs::read_dir(dir).unwrap();
    let mut names: Vec<_> = entries
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

/// Fails unless a response's chain verifies against its own roots, as a peer would.
fn verify(authority: &Authority, chain: &[String]) {
    let blocks: Vec<CertificateDer<'static>> = chain[..chain.len() - 1]
        .iter()
        .map(|text| pem::certificates(text.as_bytes()).unwrap().remove(0))
        .collect();
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let roots = Arc::new(authority.root_store().unwrap());
    let verifier = WebPkiClientVerifier::builder_with_provider(roots, provider)
        .build()
        .unwrap();
    verifier
        .verify_client_cert(&blocks[0], &blocks[1..], UnixTime::now())
        .unwrap();
}

/// A certificate of `authority` for a new key.
fn issue(authority: &Authority) -> Vec<String> {
    let csr = Csr::parse(&csr(None).csr).unwrap();
    let now = OffsetDateTime::now_utc();
    let issued = authority.workload(&csr, &identity(), None, now).unwrap();
    authority.response(&issued)
}

#[test]
fn a_workload_certificate_is_a_spiffe_certificate_and_no_more() {
    let dir = tempfile::tempdir().unwrap();
    let authority = own_root(dir.path());
    let key = KeyPair::generate().unwrap();
    let mut params = CertificateParams::new(vec!["admin.example".to_owned()]).unwrap();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.distinguished_name.push(DnType::CommonName, "root");
    let other = "spiffe://cluster.local/ns/kube-system/sa/admin"
        .try_into()
        .unwrap();
    params.subject_alt_names.push(SanType::URI(other));
    let csr = params.serialize_request(&key).unwrap().pem().unwrap();
    let now =
        OffsetDateTime::from_unix_timestamp(OffsetDateTime::now_utc().unix_timestamp()).unwrap();
    let csr = Csr::parse(&csr).unwrap();
    let issued = authority.workload(&csr, &identity(), None, now).unwrap();

    let (rest, leaf) = X509Certificate::from_der(&issued.leaf).unwrap();
    assert!(rest.is_empty());
    assert_eq!(leaf.subject().iter().count(), 0);
    let names = leaf.subject_alternative_name().unwrap().unwrap();
    assert!(names.critical, "the subject is empty");
    let expected = identity().to_string();
    assert_eq!(names.value.general_names, [GeneralName::URI(&expected)]);
    assert!(!leaf.is_ca());
    let usage = leaf.key_usage().unwrap().unwrap().value;
    assert!(usage.digital_signature() && usage.key_encipherment() && !usage.key_cert_sign());
    let extended = leaf.extended_key_usage().unwrap().unwrap().value;
    assert!(extended.server_auth && extended.client_auth && !extended.any);
    let validity = leaf.validity();
    assert_eq!(validity.not_before.timestamp(), now.unix_timestamp() - 120);
    assert_eq!(validity.not_after.timestamp(), now.unix_timestamp() + DAY);
    assert!(leaf.serial.bits() > 100);
    verify(&authority, &authority.response(&issued));
}

#[test]
fn a_lifetime_is_the_asked_one_up_to_the_longest_and_never_past_the_signer() {
    let dir = tempfile::tempdir().unwrap();
    let authority = own_root(dir.path());
    let request = Csr::parse(&csr(None).csr).unwrap();
    let now = OffsetDateTime::now_utc();
    let ends = |ttl: u64, now| {
        let ttl = Some(Duration::from_secs(ttl));
        let issued = authority.workload(&request, &identity(), ttl, now);
        issued.map(|issued| (issued.not_after - now).whole_seconds())
    };
    assert_eq!(ends(0, now).unwrap(), DAY);
    assert_eq!(ends(3600, now).unwrap(), 3600);
    assert_eq!(ends(90 * 24 * 3600, now).unwrap(), 90 * DAY);
    assert!(ends(90 * 24 * 3600 + 1, now).is_err());
    let (root_ends, _) = authority.expiries();
    let late = OffsetDateTime::from_unix_timestamp(root_ends - 60).unwrap();
    assert_eq!(ends(3600, late).unwrap(), 60);
    assert!(ends(3600, late + Duration::from_secs(61)).is_err());
}

#[test]
fn the_own_root_is_made_once_private_and_kept() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path().join("not/yet/there");
    let first = own_root(&dir);
    assert_eq!(files(&dir), [CA_FILE, ROOT_FILE]);
    assert_eq!(mode(&dir.join(CA_FILE)), 0o600);
    let roots = fs::read_to_string(dir.join(ROOT_FILE)).unwrap();
    assert_eq!(roots, first.roots_pem());
    assert!(!roots.contains("PRIVATE"));
    let before = issue(&first);
    let again = own_root(&dir);
    assert_eq!(again.roots_pem(), roots);
    verify(&again, &before);
    verify(&first, &issue(&again));
}

#[test]
fn two_control_planes_that_start_at_once_agree_on_one_root() {
    let dir = tempfile::tempdir().unwrap();
    let roots: Vec<String> = std::thread::scope(|scope| {
        let start = || scope.spawn(|| own_root(dir.path()).roots_pem());
        let threads: Vec<_> = (0..8).map(|_| start()).collect();
        threads
            .into_iter()
            .map(|thread| thread.join().unwrap())
            .collect()
    });
    assert!(roots.iter().all(|root| *root == roots[0]));
    assert_eq!(files(dir.path()), [CA_FILE, ROOT_FILE]);
}

#[test]
fn a_root_is_replaced_in_three_starts_and_what_both_sign_is_believed_meanwhile() {
    let (dir, next) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (old, new) = (own_root(dir.path()), own_root(next.path()));
    let file = |dir: &Path| fs::read_to_string(dir.join(CA_FILE)).unwrap();
    let (old_file, new_file) = (file(dir.path()), file(next.path()));
    for (content, signer) in [
        (format!("{old_file}{}", new.roots_pem()), &old),
        (format!("{new_file}{}", old.roots_pem()), &new),
    ] {
        fs::write(dir.path().join(CA_FILE), content).unwrap();
        let both = own_root(dir.path());
        verify(signer, &issue(&both));
        verify(&both, &issue(&old));
        verify(&both, &issue(&new));
        let roots = fs::read_to_string(dir.path().join(ROOT_FILE)).unwrap();
        assert_eq!(roots, both.roots_pem());
    }
    fs::write(dir.path().join(CA_FILE), new_file).unwrap();
    assert_eq!(own_root(dir.path()).roots_pem(), new.roots_pem());
}

#[test]
fn a_lost_root_file_for_clients_is_written_again() {
    let dir = tempfile::tempdir().unwrap();
    let first = own_root(dir.path());
    fs::remove_file(dir.path().join(ROOT_FILE)).unwrap();
    own_root(dir.path());
    let roots = fs::read_to_string(dir.path().join(ROOT_FILE)).unwrap();
    assert_eq!(roots, first.roots_pem());
}

#[test]
fn a_full_disk_is_an_error_and_leaves_nothing_behind() {
    let dir = tempfile::tempdir().unwrap();
    let on_a_full_disk = |staged: &Path, _mode: u32| {
        File::create(staged)?;
        File::options().write(true).open("/dev/full")
    };
    let path = dir.path().join(CA_FILE);
    let error = create(&path, 0o600, b"key", on_a_full_disk).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::StorageFull);
    assert_eq!(files(dir.path()), [""; 0]);
    own_root(dir.path());
}

#[test]
fn a_key_that_others_can_read_is_not_used() {
    let dir = tempfile::tempdir().unwrap();
    own_root(dir.path());
    let path = dir.path().join(CA_FILE);
    for exposed in [0o640, 0o604, 0o660] {
        fs::set_permissions(&path, fs::Permissions::from_mode(exposed)).unwrap();
        let error = disk::load_or_create(dir.path(), &TrustDomain::default()).unwrap_err();
        assert!(matches!(error, disk::DiskError::Exposed { mode, .. } if mode == exposed));
    }
}

#[test]
fn a_damaged_ca_file_is_an_error_and_is_not_replaced() {
    let dir = tempfile::tempdir().unwrap();
    own_root(dir.path());
    let path = dir.path().join(CA_FILE);
    let whole = fs::read_to_string(&path).unwrap();
    let certificate = whole.find("-----BEGIN CERTIFICATE").unwrap();
    let other_key = KeyPair::generate().unwrap().serialize_pem();
    for damaged in [
        "",
        "nonsense",
        &whole[..certificate],
        &whole[certificate..],
        &whole[..whole.len() - 100],
        &format!("{other_key}{}", &whole[certificate..]),
    ] {
        fs::write(&path, damaged).unwrap();
        assert!(disk::load_or_create(dir.path(), &TrustDomain::default()).is_err());
        assert_eq!(fs::read_to_string(&path).unwrap(), damaged);
    }
}

/// A certificate authority of others: root and intermediate.
struct Others {
    root: rcgen::Certificate,
    key: KeyPair,
    intermediate: rcgen::Certificate,
}

impl Others {
    fn new(lifetime: time::Duration, is_ca: IsCa) -> Self {
        let params = |name: &str| {
            let mut params = CertificateParams::default();
            params.distinguished_name.push(DnType::CommonName, name);
            params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
            params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
            params
        };
        let root_key = KeyPair::generate().unwrap();
        let root_params = params("their root");
        let root = root_params.self_signed(&root_key).unwrap();
        let key = KeyPair::generate_for(&PKCS_ECDSA_P384_SHA384).unwrap();
        let mut own = params("their intermediate");
        own.is_ca = is_ca;
        own.not_before = OffsetDateTime::now_utc() - time::Duration::days(10);
        own.not_after = OffsetDateTime::now_utc() + lifetime;
        let issuer = Issuer::from_params(&root_params, &root_key);
        let intermediate = own.signed_by(&key, &issuer).unwrap();
        Self {
            root,
            key,
            intermediate,
        }
    }

    fn valid() -> Self {
        Self::new(
            time::Duration::days(30),
            IsCa::Ca(BasicConstraints::Constrained(0)),
        )
    }

    fn write(&self, dir: &Path) {
        let chain = format!("{}{}", self.intermediate.pem(), self.root.pem());
        for (file, text) in [
            ("ca-cert.pem", self.intermediate.pem()),
            ("ca-key.pem", self.key.serialize_pem()),
            ("root-cert.pem", self.root.pem()),
            ("cert-chain.pem", chain),
        ] {
            fs::write(dir.join(file), text).unwrap();
        }
    }
}

#[test]
fn a_plug_in_intermediate_signs_in_either_layout() {
    let dir = tempfile::tempdir().unwrap();
    let others = Others::valid();
    others.write(dir.path());
    let authority = plug_in::load(dir.path()).unwrap();
    let chain = issue(&authority);
    assert_eq!(chain.len(), 3, "leaf, intermediate, roots");
    assert_eq!(
        pem::certificates(chain[1].as_bytes()).unwrap()[0],
        *others.intermediate.der()
    );
    assert_eq!(
        pem::certificates(chain[2].as_bytes()).unwrap(),
        [others.root.der().clone()]
    );
    verify(&authority, &chain);

    let other = tempfile::tempdir().unwrap();
    for (from, to) in [
        ("ca-cert.pem", "tls.crt"),
        ("ca-key.pem", "tls.key"),
        ("root-cert.pem", "ca.crt"),
    ] {
        fs::copy(dir.path().join(from), other.path().join(to)).unwrap();
    }
    let authority = plug_in::load(other.path()).unwrap();
    verify(&authority, &issue(&authority));
}

#[test]
fn a_plug_in_may_have_a_list_of_revoked_certificates_which_must_be_one() {
    let dir = tempfile::tempdir().unwrap();
    let others = Others::valid();
    others.write(dir.path());
    assert_eq!(plug_in::load(dir.path()).unwrap().revoked_pem(), None);

    let now = OffsetDateTime::now_utc();
    let list = rcgen::CertificateRevocationListParams {
        this_update: now,
        next_update: now + time::Duration::days(30),
        crl_number: 1_u64.into(),
        issuing_distribution_point: None,
        revoked_certs: Vec::new(),
        key_identifier_method: rcgen::KeyIdMethod::Sha256,
    };
    let mut signer = CertificateParams::default();
    signer.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    signer.key_usages = vec![KeyUsagePurpose::CrlSign];
    let key = KeyPair::generate().unwrap();
    let list = list.signed_by(&Issuer::from_params(&signer, &key)).unwrap();
    let text = list.pem().unwrap();
    fs::write(dir.path().join("ca-crl.pem"), &text).unwrap();
    let authority = plug_in::load(dir.path()).unwrap();
    assert_eq!(authority.revoked_pem().as_deref(), Some(text.as_str()));
    let block = "-----BEGIN X509 CRL-----\nAAAA\n-----END X509 CRL-----\n";
    for text in [others.root.pem(), block.to_owned(), String::new()] {
        let write = |dir: &Path| fs::write(dir.join("ca-crl.pem"), &text).unwrap();
        plug_in_fails(&others, write, "ca-crl.pem holds no PEM list");
    }
}

/// The error of a plug-in folder that was spoilt.
#[track_caller]
fn plug_in_fails(others: &Others, spoil: impl Fn(&Path), message: &str) {
    let dir = tempfile::tempdir().unwrap();
    others.write(dir.path());
    spoil(dir.path());
    let error = anyhow::Error::from(plug_in::load(dir.path()).unwrap_err());
    let chain = format!("{error:#}");
    assert!(chain.contains(message), "{chain}");
}

#[test]
fn a_plug_in_that_would_not_work_ends_the_start() {
    let valid = Others::valid();
    let write = |file: &'static str, text: String| {
        move |dir: &Path| fs::write(dir.join(file), &text).unwrap()
    };
    let remove = |file: &'static str| move |dir: &Path| fs::remove_file(dir.join(file)).unwrap();
    plug_in_fails(&valid, remove("ca-key.pem"), "missing: ca-key.pem");
    plug_in_fails(&valid, remove("cert-chain.pem"), "missing: cert-chain.pem");
    plug_in_fails(
        &valid,
        write("ca-key.pem", "x".to_owned()),
        "ca-key.pem holds no usable",
    );
    plug_in_fails(
        &valid,
        write("root-cert.pem", String::new()),
        "root-cert.pem holds no PEM",
    );
    let other_key = KeyPair::generate().unwrap().serialize_pem();
    plug_in_fails(
        &valid,
        write("ca-key.pem", other_key),
        "not that of the signing certificate",
    );
    let other_root = Others::valid().root.pem();
    plug_in_fails(
        &valid,
        write("root-cert.pem", other_root),
        "does not verify against the roots",
    );
    let expired = Others::new(
        time::Duration::days(-1),
        IsCa::Ca(BasicConstraints::Unconstrained),
    );
    plug_in_fails(&expired, |_| {}, "ended at");
    let leaf = Others::new(time::Duration::days(1), IsCa::ExplicitNoCa);
    plug_in_fails(&leaf, |_| {}, "not a CA certificate");
}

#[test]
fn only_requests_of_good_keys_are_taken() {
    let request = |key: &KeyPair| {
        let csr = CertificateParams::default().serialize_request(key).unwrap();
        csr.pem().unwrap()
    };
    for key in [
        KeyPair::generate(),
        KeyPair::generate_for(&PKCS_ECDSA_P384_SHA384),
    ] {
        Csr::parse(&request(&key.unwrap())).unwrap();
    }
    let good = request(&KeyPair::generate().unwrap());
    let ed25519 = request(&KeyPair::generate_for(&PKCS_ED25519).unwrap());
    let mut lines: Vec<_> = good.lines().collect();
    let swapped = lines[2].chars().rev().collect::<String>();
    lines[2] = &swapped;
    for (bad, message) in [
        ("", "read the PEM"),
        ("nonsense", "read the PEM"),
        (
            &*good.replace("CERTIFICATE REQUEST", "CERTIFICATE"),
            "read the PEM",
        ),
        (
            "-----BEGIN CERTIFICATE REQUEST-----\nAAAA\n-----END CERTIFICATE REQUEST-----\n",
            "parse",
        ),
        (&lines.join("\n"), ""),
        (&ed25519, "neither EC nor RSA"),
        (&" ".repeat(40_000), "no request"),
    ] {
        let error = Csr::parse(bad).unwrap_err().to_string();
        assert!(error.contains(message), "{bad:?}: {error}");
    }
}

#[test]
fn a_request_not_signed_by_its_key_is_refused() {
    let der = |key: &KeyPair| {
        let csr = CertificateParams::default().serialize_request(key).unwrap();
        csr.der().to_vec()
    };
    let (one, two) = (KeyPair::generate().unwrap(), KeyPair::generate().unwrap());
    let mut forged = der(&one);
    let key = one.public_key_raw();
    let at = forged
        .windows(key.len())
        .position(|window| window == key)
        .unwrap();
    forged[at..at + key.len()].copy_from_slice(two.public_key_raw());
    let text = pem::certificate(&forged).replace("CERTIFICATE", "CERTIFICATE REQUEST");
    let error = Csr::parse(&text).unwrap_err();
    assert!(
        matches!(error, super::csr::CsrError::Signature(_)),
        "{error}"
    );
}

/// RSA requests come from outside: nothing here makes RSA keys.
#[test]
fn rsa_keys_are_taken_from_2048_bits_on() {
    use aws_lc_rs::rsa::KeySize;
    let pair = aws_lc_rs::rsa::KeyPair::generate(KeySize::Rsa2048).unwrap();
    let der = aws_lc_rs::encoding::AsDer::<aws_lc_rs::encoding::Pkcs8V1Der<'_>>::as_der(&pair);
    let key = KeyPair::try_from(der.unwrap().as_ref()).unwrap();
    let csr = CertificateParams::default()
        .serialize_request(&key)
        .unwrap();
    let csr = Csr::parse(&csr.pem().unwrap()).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let authority = own_root(dir.path());
    let issued = authority.workload(&csr, &identity(), None, OffsetDateTime::now_utc());
    verify(&authority, &authority.response(&issued.unwrap()));
}

#[test]
fn rsa_keys_below_2048_bits_are_refused() {
    let error = Csr::parse(include_str!("testdata/rsa-1024.csr.pem")).unwrap_err();
    assert_eq!(
        error.to_string().split(';').next(),
        Some("a key of kind RSA with 1024 bits")
    );
}

const WEB: &str = "spiffe://cluster.local/ns/shop/sa/web";

/// `ztunnel-1` and a pod of `shop/web` on node-1; a pod of `shop/far` on node-2.
async fn plane() -> Plane {
    let plane = Plane::start().await;
    plane
        .pods
        .put("istio-system", "ztunnel-1", "ztunnel", "node-1");
    plane.pods.put("shop", "web-1", "web", "node-1");
    plane.pods.put("shop", "far-1", "far", "node-2");
    plane
}

fn name_of(chain: &[String]) -> String {
    let leaf = pem::certificates(chain[0].as_bytes()).unwrap().remove(0);
    let (_, leaf) = X509Certificate::from_der(&leaf).unwrap();
    let names = leaf.subject_alternative_name().unwrap().unwrap();
    match &names.value.general_names[..] {
        [GeneralName::URI(uri)] => (*uri).to_owned(),
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn a_node_tunnel_gets_certificates_for_its_pods_and_a_pod_for_itself() {
    let plane = plane().await;
    let chain = plane
        .certificate(&plane.node_token(), csr(Some(WEB)))
        .await
        .unwrap();
    assert_eq!(name_of(&chain), WEB);
    assert_eq!(chain.len(), 2, "leaf and roots");
    verify(&plane.authority.load(), &chain);
    let token = plane.issuer.token("shop", "cart", "cart-1");
    let chain = plane.certificate(&token, csr(None)).await.unwrap();
    assert_eq!(name_of(&chain), "spiffe://cluster.local/ns/shop/sa/cart");
    let text = plane.metrics.text();
    assert!(text.contains("citadel_server_success_cert_issuance_count 2"));
}

#[tokio::test]
async fn impersonation_is_refused_without_a_reason_the_peer_could_use() {
    let plane = plane().await;
    let issuer = &plane.issuer;
    let spoilt = |change: &dyn Fn(&mut serde_json::Value)| {
        let mut claims = claims("istio-system", "ztunnel", "ztunnel-1");
        change(&mut claims["kubernetes.io"]);
        issuer.sign(&claims)
    };
    let node = plane.node_token();
    let rows: &[(&str, String, &str)] = &[
        (
            "not a node account",
            issuer.token("shop", "web", "web-1"),
            WEB,
        ),
        (
            "a token of no pod",
            spoilt(&|k| k["pod"] = serde_json::Value::Null),
            WEB,
        ),
        (
            "an unknown pod",
            issuer.token("istio-system", "ztunnel", "gone"),
            WEB,
        ),
        (
            "another pod's uid",
            spoilt(&|k| k["pod"]["uid"] = "web-1-uid".into()),
            WEB,
        ),
        (
            "another pod's name",
            spoilt(&|k| k["pod"]["name"] = "web-1".into()),
            WEB,
        ),
        (
            "another node",
            spoilt(&|k| k["node"] = serde_json::json!({"name": "node-2"})),
            WEB,
        ),
        (
            "not on the node",
            node.clone(),
            "spiffe://cluster.local/ns/shop/sa/far",
        ),
        (
            "runs nowhere",
            node.clone(),
            "spiffe://cluster.local/ns/shop/sa/none",
        ),
        (
            "another namespace",
            node.clone(),
            "spiffe://cluster.local/ns/other/sa/web",
        ),
        (
            "another trust domain",
            node.clone(),
            "spiffe://evil.example/ns/shop/sa/web",
        ),
        ("no identity", node.clone(), "web"),
        (
            "no identity either",
            node.clone(),
            "spiffe://cluster.local/ns/shop/sa/web/x",
        ),
    ];
    for (what, token, identity) in rows {
        let refused = plane
            .certificate(token, csr(Some(identity)))
            .await
            .expect_err(what);
        assert_eq!(refused.code(), Code::Unauthenticated, "{what}");
        assert_eq!(
            refused.message(),
            "request impersonation authentication failure",
            "{what}"
        );
    }
    let count = format!("citadel_server_id_extraction_err_count {}", rows.len());
    assert!(plane.metrics.text().contains(&count));
}

#[tokio::test]
async fn a_pod_that_ends_takes_its_identity_off_the_node() {
    let plane = plane().await;
    plane
        .certificate(&plane.node_token(), csr(Some(WEB)))
        .await
        .unwrap();
    plane.pods.0.lock().remove("web-1-uid");
    let refused = plane.certificate(&plane.node_token(), csr(Some(WEB))).await;
    assert_eq!(refused.unwrap_err().code(), Code::Unauthenticated);
}

#[tokio::test]
async fn a_request_that_is_ahead_of_its_pods_event_is_not_refused() {
    let plane = Plane::start().await;
    plane
        .pods
        .put("istio-system", "ztunnel-1", "ztunnel", "node-1");
    let token = plane.node_token();
    let asking = plane.certificate(&token, csr(Some(WEB)));
    let arriving = async {
        // One that waits has looked at the pods.
        let waiting = || plane.pods.1.receiver_count() > 0;
        let end = tokio::time::Instant::now() + crate::testing::DEADLINE;
        while !waiting() {
            assert!(tokio::time::Instant::now() < end, "nobody waits");
            tokio::task::yield_now().await;
        }
        plane.pods.put("shop", "web-1", "web", "node-1");
    };
    let (answer, ()) = tokio::join!(asking, arriving);
    assert_eq!(name_of(&answer.unwrap()), WEB);
}

#[tokio::test]
async fn a_bad_request_is_told_so() {
    let plane = plane().await;
    let node = plane.node_token();
    let with = |change: &dyn Fn(&mut proto::ca::IstioCertificateRequest)| {
        let mut request = csr(Some(WEB));
        change(&mut request);
        request
    };
    for (what, request) in [
        ("nonsense", with(&|it| it.csr = "nonsense".to_owned())),
        ("too long", with(&|it| it.validity_duration = 91 * DAY)),
        (
            "a named signer",
            with(&|it| {
                it.metadata = Some(texts(&[("ImpersonatedIdentity", WEB), ("CertSigner", "x")]));
            }),
        ),
    ] {
        let refused = plane.certificate(&node, request).await.expect_err(what);
        assert_eq!(refused.code(), Code::InvalidArgument, "{what}: {refused}");
    }
    let negative = with(&|it| it.validity_duration = -1);
    plane
        .certificate(&node, negative)
        .await
        .expect("the default lifetime");
}

#[tokio::test]
async fn callers_without_proof_get_no_certificate() {
    let plane = plane().await;
    let refused = plane.certificate("", csr(None)).await.unwrap_err();
    assert_eq!(refused.code(), Code::Unauthenticated);
    let refused = plane.certificate("a.b.c", csr(None)).await.unwrap_err();
    assert_eq!(refused.code(), Code::Unauthenticated);
    let text = plane.metrics.text();
    assert!(text.contains("citadel_server_authentication_failure_count 2"));
}

#[tokio::test]
async fn certificates_outlive_the_control_plane_that_issued_them() {
    let first = plane().await;
    let chain = first
        .certificate(&first.node_token(), csr(Some(WEB)))
        .await
        .unwrap();
    first.drain.start(net::drain::Mode::Immediate);
    let second = Plane::with(first.ca_dir).await;
    verify(&second.authority.load(), &chain);
}

#[tokio::test]
async fn another_authority_in_force_signs_the_next_certificate_and_is_shown_to_the_next_connection()
{
    let plane = plane().await;
    let before = plane
        .certificate(&plane.node_token(), csr(Some(WEB)))
        .await
        .unwrap();
    let other = tempfile::tempdir().unwrap();
    plane.authority.replace(own_root(other.path()));
    let token = plane.node_token();
    // The serving certificate is renewed by a task that this test does not run: the old root still vouches for it.
    let old = pem::certificates(before[1].as_bytes()).unwrap();
    let mut roots = rustls::RootCertStore::empty();
    roots.add(old[0].clone()).unwrap();
    let channel = crate::testing::channel(plane.address, roots, None)
        .await
        .unwrap();
    let mut client =
        proto::ca::istio_certificate_service_client::IstioCertificateServiceClient::new(channel);
    let request = crate::testing::bearer(csr(Some(WEB)), &token);
    let after = client.create_certificate(request).await.unwrap();
    let after = after.into_inner().cert_chain;
    assert_ne!(after[1], before[1], "the new root goes with it");
    verify(&plane.authority.load(), &after);
}
