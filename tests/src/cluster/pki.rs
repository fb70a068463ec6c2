//! The cluster's own authority and the certificates of its parts: keys on P-256, in files that the parts read.

use std::{fs, net::IpAddr, os::unix::fs::PermissionsExt, path::Path};

use anyhow::{Context, Result};
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, SanType,
};

/// The authority that signs for the API server and all its clients.
pub struct Authority {
    issuer: Issuer<'static, KeyPair>,
    certificate: String,
}

impl Authority {
    /// A new one.
    pub fn new() -> Result<Self> {
        let mut params = CertificateParams::default();
        params
            .distinguished_name
            .push(DnType::CommonName, "cluster rig");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let key = KeyPair::generate()?;
        let certificate = params.self_signed(&key)?.pem();
        Ok(Self {
            issuer: Issuer::new(params, key),
            certificate,
        })
    }

    /// Writes `ca.crt` and `ca.key`.
    pub fn write(&self, folder: &Path) -> Result<()> {
        self.write_certificate(folder)?;
        secret(&folder.join("ca.key"), &self.issuer.key().serialize_pem())
    }

    /// Writes `ca.crt`.
    pub fn write_certificate(&self, folder: &Path) -> Result<()> {
        fs::write(folder.join("ca.crt"), &self.certificate).context("write ca.crt")
    }

    /// Writes `NAME.crt` and `NAME.key` for a user of Kubernetes (`name`, in `group`), who may also serve at `addresses` and
    /// `hosts`.
    pub fn issue(
        &self,
        folder: &Path,
        file: &str,
        user: (&str, Option<&str>),
        addresses: &[IpAddr],
        hosts: &[&str],
    ) -> Result<()> {
        let mut params = CertificateParams::default();
        let (name, group) = user;
        params.distinguished_name.push(DnType::CommonName, name);
        if let Some(group) = group {
            params
                .distinguished_name
                .push(DnType::OrganizationName, group);
        }
        for host in hosts {
            let host = (*host).try_into().context("a host's name")?;
            params.subject_alt_names.push(SanType::DnsName(host));
        }
        let addresses = addresses.iter().copied().map(SanType::IpAddress);
        params.subject_alt_names.extend(addresses);
        params.extended_key_usages = vec![
            ExtendedKeyUsagePurpose::ClientAuth,
            ExtendedKeyUsagePurpose::ServerAuth,
        ];
        let key = KeyPair::generate()?;
        let certificate = params.signed_by(&key, &self.issuer)?;
        fs::write(folder.join(format!("{file}.crt")), certificate.pem())
            .with_context(|| format!("write {file}.crt"))?;
        secret(&folder.join(format!("{file}.key")), &key.serialize_pem())
    }
}

/// Writes `sa.key` and `sa.pub`, which sign and check the tokens of ServiceAccounts.
pub fn write_token_key(folder: &Path) -> Result<()> {
    let key = KeyPair::generate()?;
    fs::write(folder.join("sa.pub"), key.public_key_pem()).context("write sa.pub")?;
    secret(&folder.join("sa.key"), &key.serialize_pem())
}

fn secret(path: &Path, pem: &str) -> Result<()> {
    fs::write(path, pem).with_context(|| format!("write {}", path.display()))?;
    Ok(fs::set_permissions(
        path,
        fs::Permissions::from_mode(0o600),
    )?)
}
