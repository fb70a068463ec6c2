//! What Secrets hold for TLS with servers (DestinationRule `tls.credentialName`), and who may have it.
//!
//! A credential is a Secret of the waypoint's own namespace: whoever makes pods there may read it anyway, so that it tells
//! nobody anything. Only rules of that namespace and of the root namespace may name it: another namespace's could speak
//! in its name, to a server of their choice.

use std::{collections::BTreeMap, fmt, sync::Arc};

use k8s_openapi::api::core::v1 as core;
use mesh::{
    l7::backend::{ClientCertificate, Pem},
    names::Str,
};
use rustls_pki_types::{
    CertificateDer, CertificateRevocationListDer, PrivateKeyDer, pem::PemObject,
};

use crate::object::Name;

/// A second Secret may hold the roots, so that others may read it: its name ends so, as upstream.
const OF_ROOTS: &str = "-cacert";
/// Where upstream says that it means a Secret.
const SCHEME: &str = "kubernetes://";

/// What one Secret holds, PEM. Never shown.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Credential {
    chain: Option<Arc<[u8]>>,
    key: Option<Arc<[u8]>>,
    roots: Option<Arc<[u8]>>,
    revoked: Option<Arc<[u8]>>,
}

/// What came of reading a Secret.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Found {
    /// It is there.
    Is(Credential),
    /// It is not there.
    Absent,
    /// It cannot be read; why.
    Unreadable(Str),
}

/// Who asks for a credential.
#[derive(Clone, Copy, Debug)]
pub struct Asking<'a> {
    /// The Gateway of the waypoint that is to have it.
    pub waypoint: &'a Name,
    /// The DestinationRule that names it.
    pub rule: &'a Name,
    /// The mesh's root namespace.
    pub root: &'a str,
}

/// A credential, checked.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Parts {
    /// Certificate and key to be shown.
    pub client: Option<ClientCertificate>,
    /// Whom to believe.
    pub roots: Option<Pem>,
    /// Whom not to.
    pub revoked: Option<Pem>,
}

impl fmt::Debug for Credential {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let has = |pem: &Option<Arc<[u8]>>| pem.is_some();
        f.debug_struct("Credential")
            .field("chain", &has(&self.chain))
            .field("key", &has(&self.key))
            .field("roots", &has(&self.roots))
            .field("revoked", &has(&self.revoked))
            .finish()
    }
}

impl Credential {
    /// By the names of Kubernetes' own type, else by those of upstream's generic one.
    pub fn of(secret: &core::Secret) -> Self {
        let text = |data: &BTreeMap<String, String>, key: &str| {
            data.get(key).map(|text| Arc::from(text.as_bytes()))
        };
        let bytes = |key: &str| {
            let data = secret.data.as_ref();
            let inside = data.and_then(|data| data.get(key));
            let inside = inside.map(|it| Arc::from(&*it.0));
            // Written so by people; an API server gives it back as data.
            inside.or_else(|| text(secret.string_data.as_ref()?, key))
        };
        let either = |one: &str, other: &str| bytes(one).or_else(|| bytes(other));
        Self {
            chain: either("tls.crt", "cert"),
            key: either("tls.key", "key"),
            roots: either("ca.crt", "cacert"),
            revoked: either("ca.crl", "crl"),
        }
    }
}

/// The Secrets that a credential is looked for in, in a waypoint's namespace.
pub fn secrets(namespace: &str, credential: &str) -> [Name; 2] {
    let name = credential.strip_prefix(SCHEME).unwrap_or(credential);
    [
        Name::new(namespace, name),
        Name::new(namespace, format!("{name}{OF_ROOTS}").as_str()),
    ]
}

impl Asking<'_> {
    /// Whether the rule may name credentials of the waypoint; else why not.
    ///
    /// # Errors
    /// Why not.
    pub fn allowed(&self, credential: &str) -> Result<(), String> {
        let name = credential.strip_prefix(SCHEME).unwrap_or(credential);
        if name.contains(['/', ':']) {
            return Err(format!(
                "credentialName {credential:?}: only Secrets of the waypoint's own namespace are read, by their names"
            ));
        }
        let (home, own) = (&*self.waypoint.namespace, &*self.rule.namespace);
        match own == home || own == self.root {
            true => Ok(()),
            false => Err(format!(
                "credentialName {credential:?}: is for rules of {home}, where the waypoint is, and of {}",
                self.root
            )),
        }
    }

    /// What the credential holds; `found`: what came of reading a Secret, if it was tried.
    ///
    /// # Errors
    /// Why nothing of it may be used.
    pub fn resolve(
        &self,
        credential: &str,
        found: impl Fn(&Name) -> Option<Found>,
    ) -> Result<Parts, String> {
        self.allowed(credential)?;
        let [main, of_roots] = secrets(&self.waypoint.namespace, credential);
        let held = match (found(&main), found(&of_roots)) {
            (Some(Found::Is(mut held)), Some(Found::Is(other))) => {
                held.roots = other.roots.or(held.roots);
                held.revoked = other.revoked.or(held.revoked);
                Ok(held)
            }
            (Some(Found::Is(held)), _) => Ok(held),
            // Roots alone are enough where nothing is shown.
            (Some(Found::Absent) | None, Some(Found::Is(other))) => Ok(Credential {
                roots: other.roots,
                revoked: other.revoked,
                ..Credential::default()
            }),
            (Some(Found::Unreadable(why)), _) => Err(format!("Secret {main}: {why}")),
            (Some(Found::Absent) | None, _) => Err(format!("there is no Secret {main}")),
        };
        held?.checked(&main)
    }
}

impl Credential {
    fn checked(&self, secret: &Name) -> Result<Parts, String> {
        let wrong = |part: &str| format!("Secret {secret}: its {part} cannot be read as PEM");
        let pem = |pem: &Option<Arc<[u8]>>| pem.as_deref().map(|pem| Pem::Inline(pem.to_vec()));
        let client = match (&self.chain, &self.key) {
            (Some(chain), Some(key)) => {
                if !all_are::<CertificateDer<'_>>(chain) {
                    return Err(wrong("certificate"));
                }
                if PrivateKeyDer::from_pem_slice(key).is_err() {
                    return Err(wrong("private key"));
                }
                Some(ClientCertificate {
                    chain: Pem::Inline(chain.to_vec()),
                    key: Pem::Inline(key.to_vec()),
                })
            }
            (None, None) => None,
            _ => {
                return Err(format!(
                    "Secret {secret}: has only one of tls.crt and tls.key"
                ));
            }
        };
        let roots = self.roots.as_ref();
        if roots.is_some_and(|roots| !all_are::<CertificateDer<'_>>(roots)) {
            return Err(wrong("ca.crt"));
        }
        let revoked = self.revoked.as_ref();
        if revoked.is_some_and(|list| !all_are::<CertificateRevocationListDer<'_>>(list)) {
            return Err(wrong("ca.crl"));
        }
        Ok(Parts {
            client,
            roots: pem(&self.roots),
            revoked: pem(&self.revoked),
        })
    }
}

/// Whether there is at least one block of this kind, and none that cannot be read.
fn all_are<T: PemObject>(pem: &[u8]) -> bool {
    let mut blocks = T::pem_slice_iter(pem).peekable();
    blocks.peek().is_some() && blocks.all(|block| block.is_ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    const CHAIN: &str = "-----BEGIN CERTIFICATE-----\nMAA=\n-----END CERTIFICATE-----\n";
    const KEY: &str = "-----BEGIN PRIVATE KEY-----\nMAA=\n-----END PRIVATE KEY-----\n";
    const LIST: &str = "-----BEGIN X509 CRL-----\nMAA=\n-----END X509 CRL-----\n";

    fn secret(parts: &[(&str, &str)]) -> Found {
        let text = |(key, text): &(&str, &str)| ((*key).to_owned(), (*text).to_owned());
        Found::Is(Credential::of(&core::Secret {
            string_data: Some(parts.iter().map(text).collect()),
            ..core::Secret::default()
        }))
    }

    fn resolve(rule: &str, name: &str, secrets: &[(&str, Found)]) -> Result<Parts, String> {
        let (waypoint, rule) = (Name::new("shop", "way"), Name::new(rule, "rule"));
        let asking = Asking {
            waypoint: &waypoint,
            rule: &rule,
            root: "istio-system",
        };
        asking.resolve(name, |wanted| {
            let found = secrets.iter().find(|(name, _)| wanted.to_string() == *name);
            found.map(|(_, found)| found.clone())
        })
    }

    #[test]
    fn a_credential_is_read_by_the_names_of_both_kinds_of_secrets() {
        for (chain, key, roots, list) in [
            ("tls.crt", "tls.key", "ca.crt", "ca.crl"),
            ("cert", "key", "cacert", "crl"),
        ] {
            let all = secret(&[(chain, CHAIN), (key, KEY), (roots, CHAIN), (list, LIST)]);
            for name in ["client", "kubernetes://client"] {
                let parts = resolve("shop", name, &[("shop/client", all.clone())]).unwrap();
                let client = parts.client.unwrap();
                assert_eq!(client.key, Pem::Inline(KEY.as_bytes().to_vec()));
                assert_eq!(parts.roots, Some(Pem::Inline(CHAIN.as_bytes().to_vec())));
                assert_eq!(parts.revoked, Some(Pem::Inline(LIST.as_bytes().to_vec())));
            }
        }
    }

    #[test]
    fn roots_may_be_in_a_secret_of_their_own() {
        let client = secret(&[("tls.crt", CHAIN), ("tls.key", KEY)]);
        let roots = secret(&[("ca.crt", CHAIN)]);
        let both = [("shop/client", client), ("shop/client-cacert", roots)];
        let parts = resolve("istio-system", "client", &both).unwrap();
        assert!(parts.client.is_some() && parts.roots.is_some());
        let parts = resolve("shop", "client", &both[1..]).unwrap();
        assert!(parts.client.is_none() && parts.roots.is_some());
    }

    #[test]
    fn what_cannot_be_used_is_refused_by_name() {
        let forbidden = Found::Unreadable("forbidden".into());
        for (found, expected) in [
            (Found::Absent, "there is no Secret shop/client"),
            (forbidden, "Secret shop/client: forbidden"),
            (
                secret(&[("tls.crt", CHAIN)]),
                "Secret shop/client: has only one of tls.crt and tls.key",
            ),
            (
                secret(&[("tls.crt", "x"), ("tls.key", KEY)]),
                "Secret shop/client: its certificate cannot be read as PEM",
            ),
            (
                secret(&[("tls.crt", CHAIN), ("tls.key", CHAIN)]),
                "Secret shop/client: its private key cannot be read as PEM",
            ),
            (
                secret(&[("ca.crt", KEY)]),
                "Secret shop/client: its ca.crt cannot be read as PEM",
            ),
            (
                secret(&[("ca.crt", CHAIN), ("ca.crl", CHAIN)]),
                "Secret shop/client: its ca.crl cannot be read as PEM",
            ),
        ] {
            let refused = resolve("shop", "client", &[("shop/client", found)]);
            assert_eq!(refused.unwrap_err(), expected);
        }
    }

    #[test]
    fn a_rule_of_another_namespace_cannot_speak_in_a_waypoints_name() {
        let all = [(
            "shop/client",
            secret(&[("tls.crt", CHAIN), ("tls.key", KEY)]),
        )];
        let refused = resolve("other", "client", &all).unwrap_err();
        assert!(refused.contains("is for rules of shop"), "{refused}");
        for name in [
            "other/client",
            "kubernetes://other/client",
            "configmap://roots",
        ] {
            let refused = resolve("shop", name, &all).unwrap_err();
            assert!(
                refused.contains("the waypoint's own namespace"),
                "{refused}"
            );
        }
    }

    #[test]
    fn a_credential_shows_nothing_of_itself() {
        let shown = format!("{:?}", secret(&[("tls.crt", "hush"), ("tls.key", "hush")]));
        assert!(!shown.contains("hush") && !shown.contains("104"), "{shown}");
    }
}
