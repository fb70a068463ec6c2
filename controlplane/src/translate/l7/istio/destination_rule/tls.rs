//! TLS with servers: what is shown to them, and how they are believed.

use mesh::{
    l7::backend::{BackendTls, ClientCertificate, Pem, SubjectAltName},
    names::Str,
};

use super::Credentials;
use crate::{
    crd::istio::{self as crd, TlsMode},
    translate::l7::credential::Parts,
    validate::Findings,
};

/// Upstream's word for the system's roots.
const SYSTEM: &str = "system";

/// `tls`. `ISTIO_MUTUAL` is what the mesh does anyway: the hop is HBONE. What cannot be kept refuses the traffic.
pub(super) fn tls(
    it: &crd::ClientTlsSettings,
    path: &str,
    credentials: &Credentials<'_>,
    found: &mut Findings,
) -> Option<BackendTls> {
    let is_mutual = match it.mode {
        TlsMode::Disable | TlsMode::IstioMutual => {
            let given = given(it);
            if !given.is_empty() {
                let given = given.join(", ");
                found.error(path, format!("{given} cannot be set with this mode"));
            }
            return None;
        }
        TlsMode::Simple => false,
        TlsMode::Mutual => true,
    };
    // A mistake in what is written is told with its place; what is not there yet is no mistake.
    let asked = written(it, is_mutual);
    if let Err(problem) = &asked {
        found.error(path, problem.clone());
    }
    let parts = asked.and_then(|parts| match parts {
        Some(parts) => Ok(parts),
        None => of_credential(&it.credential_name, is_mutual, credentials),
    });
    let parts = match parts {
        Ok(parts) => parts,
        Err(problem) => return Some(BackendTls::Invalid(format!("{path}: {problem}").into())),
    };
    let sni = (!it.sni.is_empty()).then(|| Str::from(it.sni.as_str()));
    if it.insecure_skip_verify == Some(true) {
        let path = format!("{path}.insecureSkipVerify");
        found.warning(path, "whoever answers is believed");
        let client = parts.client;
        return Some(BackendTls::Insecure { sni, client });
    }
    let names = it.subject_alt_names.iter();
    Some(BackendTls::Verify {
        sni,
        roots: parts.roots,
        revoked: parts.revoked,
        subject_alt_names: names.map(|name| alt_name(name)).collect(),
        client: parts.client,
    })
}

/// The fields that name certificates and are set.
fn given(it: &crd::ClientTlsSettings) -> Vec<&'static str> {
    let fields = [
        ("clientCertificate", &it.client_certificate),
        ("privateKey", &it.private_key),
        ("caCertificates", &it.ca_certificates),
        ("caCrl", &it.ca_crl),
        ("credentialName", &it.credential_name),
    ];
    let given = fields
        .iter()
        .filter(|(_, text)| !text.is_empty() && *text != SYSTEM);
    given.map(|(field, _)| *field).collect()
}

/// The files that are named; none: a credential is.
fn written(it: &crd::ClientTlsSettings, is_mutual: bool) -> Result<Option<Parts>, String> {
    let given = given(it);
    let has_credential = given.contains(&"credentialName");
    if has_credential && given.len() > 1 {
        return Err("credentialName excludes files".to_owned());
    }
    if it.insecure_skip_verify == Some(true)
        && (given.contains(&"caCertificates") || given.contains(&"caCrl"))
    {
        return Err("insecureSkipVerify excludes caCertificates and caCrl".to_owned());
    }
    if has_credential {
        return Ok(None);
    }
    let (chain, key) = (&it.client_certificate, &it.private_key);
    let client = match (is_mutual, chain.is_empty() || key.is_empty()) {
        (true, false) => Some(ClientCertificate {
            chain: file("clientCertificate", chain)?,
            key: file("privateKey", key)?,
        }),
        (true, true) => {
            let problem = "MUTUAL needs clientCertificate and privateKey, or credentialName";
            return Err(problem.to_owned());
        }
        (false, _) if !chain.is_empty() || !key.is_empty() => {
            return Err("clientCertificate and privateKey are for MUTUAL".to_owned());
        }
        (false, _) => None,
    };
    let optional = |field: &str, path: &str| match path {
        "" | SYSTEM => Ok(None),
        path => file(field, path).map(Some),
    };
    Ok(Some(Parts {
        client,
        roots: optional("caCertificates", &it.ca_certificates)?,
        revoked: optional("caCrl", &it.ca_crl)?,
    }))
}

fn file(field: &str, path: &str) -> Result<Pem, String> {
    let is_plain = path.starts_with('/') && !path.split('/').any(|part| part == "..");
    match is_plain {
        true => Ok(Pem::File(path.into())),
        false => Err(format!("{field}: {path:?} is no absolute path without ..")),
    }
}

fn of_credential(
    name: &str,
    is_mutual: bool,
    credentials: &Credentials<'_>,
) -> Result<Parts, String> {
    let parts = credentials(name)?;
    match (is_mutual, &parts.client) {
        (true, None) => Err(format!(
            "credentialName {name:?}: holds no tls.crt and tls.key, which MUTUAL needs"
        )),
        (true, Some(_)) => Ok(parts),
        // SIMPLE shows nothing.
        (false, _) => Ok(Parts {
            client: None,
            ..parts
        }),
    }
}

fn alt_name(text: &str) -> SubjectAltName {
    match text.contains("://") {
        true => SubjectAltName::Uri(text.into()),
        false => SubjectAltName::Hostname(text.into()),
    }
}
