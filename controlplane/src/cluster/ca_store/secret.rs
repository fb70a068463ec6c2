//! The Secret of the self-signed root: what stands in it, how it changes when the root is replaced, who follows it.

use std::{collections::BTreeMap, time::Duration};

use futures_util::TryStreamExt as _;
use k8s_openapi::{ByteString, api::core::v1::Secret};
use kube::{
    Api,
    api::PostParams,
    runtime::{WatchStreamExt as _, watcher},
};
use mesh::identity::TrustDomain;
use rcgen::KeyPair;
use rustls_pki_types::CertificateDer;
use time::{OffsetDateTime, format_description::well_known::Rfc3339};
use x509_parser::prelude::{FromDer as _, X509Certificate};

use super::{CaStore, SECRET};
use crate::{
    ca::{
        Authority,
        authority::{Material, MaterialError},
        pem, root,
    },
    cluster::rotation::{self, Facts, Step},
    metrics::Metrics,
};

/// Its type (control-plane.md 12).
const TYPE: &str = "istio.io/ca-root";

const CERTIFICATE: &str = "ca-cert.pem";
const KEY: &str = "ca-key.pem";
/// All trusted roots; upstream leaves it empty and means the signing one.
const ROOTS: &str = "root-cert.pem";
/// The root that will sign next, while it only is trusted.
const NEXT_CERTIFICATE: &str = "next-ca-cert.pem";
const NEXT_KEY: &str = "next-ca-key.pem";

/// When roots that sign no more may be forgotten.
const RETIRED: &str = "leyline.dev/old-roots-until";
/// Set by an operator who wants a new root now; taken away when it is published.
const ROTATE: &str = "leyline.dev/rotate-root";

/// How often the leader looks whether a root comes to its end; a change of the Secret makes it look at once.
const LOOK: Duration = Duration::from_secs(3600);

/// Why the Secret holds no authority.
#[derive(Debug, thiserror::Error)]
pub enum ContentError {
    /// A key of the Secret is absent or empty.
    #[error("it has no {0}")]
    Missing(&'static str),
    /// Not PEM.
    #[error("{0} holds no PEM certificates")]
    Certificates(&'static str),
    /// No key.
    #[error("{KEY} holds no usable PEM private key")]
    Key(#[source] rcgen::Error),
    /// They do not work together.
    #[error("use its key and certificates together")]
    Material(#[from] MaterialError),
}

/// The Secret of a new root.
pub(super) fn new(trust_domain: &TrustDomain, now: OffsetDateTime) -> Result<Secret, rcgen::Error> {
    let made = root::generate(trust_domain, now)?;
    let data = [
        (CERTIFICATE, made.certificate.clone()),
        (ROOTS, made.certificate),
        (KEY, made.key),
    ];
    let mut secret = Secret {
        type_: Some(TYPE.to_owned()),
        ..Secret::default()
    };
    secret.metadata.name = Some(SECRET.to_owned());
    for (key, text) in data {
        put(&mut secret, key, text);
    }
    Ok(secret)
}

/// The authority of a Secret, checked.
pub(super) fn read(secret: &Secret) -> Result<Authority, ContentError> {
    let signer = certificates(secret, CERTIFICATE)?;
    let certificate = signer.first().cloned();
    let certificate = certificate.ok_or(ContentError::Certificates(CERTIFICATE))?;
    let key = text(secret, KEY).ok_or(ContentError::Missing(KEY))?;
    let key = KeyPair::from_pem(key).map_err(ContentError::Key)?;
    let roots = match text(secret, ROOTS) {
        Some(_) => certificates(secret, ROOTS)?,
        None => vec![certificate.clone()],
    };
    let chain = Vec::new();
    let material = Material {
        key,
        certificate,
        chain,
        roots,
    };
    Ok(Authority::new(material)?)
}

impl CaStore {
    /// Takes over what the Secret holds whenever it changes. A Secret that is deleted is written again by the leader.
    pub(super) async fn follow_secret(&self, metrics: &Metrics) {
        let config = watcher::Config::default().fields(&format!("metadata.name={SECRET}"));
        let events = watcher(self.secrets(), config).default_backoff();
        let mut events = std::pin::pin!(events);
        loop {
            match events.try_next().await {
                Ok(Some(watcher::Event::Apply(secret) | watcher::Event::InitApply(secret))) => {
                    self.take(&secret, metrics);
                }
                Ok(Some(watcher::Event::Delete(_))) => {
                    tracing::error!(
                        secret = SECRET,
                        "the root's Secret was deleted; the root stays in force, and the leader writes it again"
                    );
                    self.changed.notify_one();
                }
                Ok(Some(_)) => {}
                Ok(None) => return,
                Err(error) => {
                    let error = &error as &dyn std::error::Error;
                    tracing::warn!(error, "the root's Secret is not followed at the moment");
                }
            }
        }
    }

    fn take(&self, secret: &Secret, metrics: &Metrics) {
        self.changed.notify_one();
        let now = self.current.load();
        let next = match read(secret) {
            Ok(next) => next,
            Err(error) => {
                let error = &error as &dyn std::error::Error;
                tracing::error!(
                    error,
                    "the root's Secret cannot be used; the last good root stays in force"
                );
                return;
            }
        };
        if !now.has_ended(OffsetDateTime::now_utc()) && !next.vouches_for(&now) {
            tracing::error!(
                "the root's Secret does not contain the root in force any more: certificates in use would not be believed; the last good root stays in force until a restart"
            );
            return;
        }
        *self.secret.lock() = Some(secret.clone());
        if next.roots() != now.roots() || next.expiries() != now.expiries() {
            tracing::info!(roots = next.roots().len(), "the root's Secret changed");
            self.replace(next, metrics);
        }
    }

    /// Looks from time to time what is to be done, and does it.
    pub(super) async fn rotate(&self) {
        loop {
            let pause = match self.rotate_once().await {
                Ok(Step::Rest) => LOOK.mul_f64(rand::random_range(0.9..=1.0)),
                Ok(step) => {
                    tracing::info!(?step, "the root is being replaced");
                    Duration::from_secs(1)
                }
                Err(error) => {
                    let error = &error as &dyn std::error::Error;
                    tracing::warn!(error, "the root's Secret could not be looked after");
                    Duration::from_secs(60)
                }
            };
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                () = self.changed.notified() => {}
            }
        }
    }

    /// One step. Written only over the version that was read: two that do this at once cannot mix.
    pub(super) async fn rotate_once(&self) -> Result<Step, kube::Error> {
        let secrets = self.secrets();
        let Some(mut secret) = secrets.get_opt(SECRET).await? else {
            self.restore(&secrets).await?;
            return Ok(Step::Rest);
        };
        let now = OffsetDateTime::now_utc();
        let Some(facts) = facts(&secret, now, self.settings.max_ttl) else {
            return Ok(Step::Rest);
        };
        let step = rotation::step(&facts);
        if step != Step::Rest && advance(&mut secret, step, &self.settings, now).is_some() {
            secrets
                .replace(SECRET, &PostParams::default(), &secret)
                .await?;
        }
        Ok(step)
    }
}

impl CaStore {
    /// Writes the last good Secret again: a start without it would make a root that nobody trusts.
    async fn restore(&self, secrets: &Api<Secret>) -> Result<(), kube::Error> {
        let Some(mut secret) = self.secret.lock().clone() else {
            return Ok(());
        };
        let metadata = std::mem::take(&mut secret.metadata);
        secret.metadata.name = metadata.name;
        secret.metadata.annotations = metadata.annotations;
        secret.metadata.labels = metadata.labels;
        secrets.create(&PostParams::default(), &secret).await?;
        tracing::warn!(secret = SECRET, "the root's Secret was written again");
        Ok(())
    }
}

/// `None` where the Secret holds no certificate: then there is nothing to rotate, and following it has told why.
fn facts(secret: &Secret, now: OffsetDateTime, longest: Duration) -> Option<Facts> {
    let certificates = certificates(secret, CERTIFICATE).ok()?;
    let (_, signer) = X509Certificate::from_der(certificates.first()?).ok()?;
    let time =
        |key| annotation(secret, key).and_then(|text| OffsetDateTime::parse(text, &Rfc3339).ok());
    let next = self::certificates(secret, NEXT_CERTIFICATE).ok();
    let next = next
        .as_ref()
        .and_then(|next| X509Certificate::from_der(next.first()?).ok());
    Some(Facts {
        now,
        not_before: signer.validity().not_before.to_datetime(),
        not_after: signer.validity().not_after.to_datetime(),
        // It is published when it is made.
        next: next.map(|(_, next)| next.validity().not_before.to_datetime()),
        retired: time(RETIRED),
        asked: annotation(secret, ROTATE).is_some(),
        longest,
    })
}

/// Writes a step into the Secret. `None`: it cannot be done.
fn advance(
    secret: &mut Secret,
    step: Step,
    settings: &super::CaSettings,
    now: OffsetDateTime,
) -> Option<()> {
    let signer = certificates(secret, CERTIFICATE).ok()?;
    let mut roots = certificates(secret, ROOTS).unwrap_or_else(|_| signer.clone());
    let written = |time: OffsetDateTime| time.format(&Rfc3339).ok();
    match step {
        Step::Rest => return None,
        Step::Publish => {
            let made = root::generate(&settings.trust_domain, now).ok()?;
            roots.extend(pem::certificates(made.certificate.as_bytes()).ok()?);
            put(secret, NEXT_CERTIFICATE, made.certificate);
            put(secret, NEXT_KEY, made.key);
            annotate(secret, ROTATE, None);
        }
        Step::Promote => {
            let data = secret.data.get_or_insert_default();
            let (certificate, key) = (data.remove(NEXT_CERTIFICATE)?, data.remove(NEXT_KEY)?);
            data.insert(CERTIFICATE.to_owned(), certificate);
            data.insert(KEY.to_owned(), key);
            annotate(secret, RETIRED, written(now + settings.max_ttl));
        }
        Step::Retire => {
            // Roots that others have put into the bundle stay: they are not known here.
            roots.retain(|root| signer.contains(root) || !is_ours(root, &settings.trust_domain));
            annotate(secret, RETIRED, None);
        }
    }
    put(secret, ROOTS, pem::bundle(&roots));
    Some(())
}

/// Whether it is a root as [`root::generate`] or upstream makes them for this trust domain.
fn is_ours(root: &CertificateDer<'_>, trust_domain: &TrustDomain) -> bool {
    let Ok((_, root)) = X509Certificate::from_der(root) else {
        return false;
    };
    let names: Vec<_> = root.subject().iter_organization().collect();
    names.len() == 1
        && names[0]
            .as_str()
            .is_ok_and(|name| name == trust_domain.as_str())
}

fn text<'s>(secret: &'s Secret, key: &str) -> Option<&'s str> {
    let bytes = &secret.data.as_ref()?.get(key)?.0;
    let text = std::str::from_utf8(bytes).ok()?;
    (!text.trim().is_empty()).then_some(text)
}

fn certificates(
    secret: &Secret,
    key: &'static str,
) -> Result<Vec<CertificateDer<'static>>, ContentError> {
    let text = text(secret, key).ok_or(ContentError::Missing(key))?;
    match pem::certificates(text.as_bytes()) {
        Ok(certificates) if !certificates.is_empty() => Ok(certificates),
        _ => Err(ContentError::Certificates(key)),
    }
}

fn put(secret: &mut Secret, key: &str, text: String) {
    let data: &mut BTreeMap<_, _> = secret.data.get_or_insert_default();
    data.insert(key.to_owned(), ByteString(text.into_bytes()));
}

fn annotation<'s>(secret: &'s Secret, key: &str) -> Option<&'s str> {
    let annotations = secret.metadata.annotations.as_ref()?;
    annotations.get(key).map(String::as_str)
}

fn annotate(secret: &mut Secret, key: &str, value: Option<String>) {
    let annotations = secret.metadata.annotations.get_or_insert_default();
    match value {
        Some(value) => annotations.insert(key.to_owned(), value),
        None => annotations.remove(key),
    };
}
