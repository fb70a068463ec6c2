//! A certificate is taken back while its pod uses it: both ends refuse it, count that, and say which it was.

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, ensure};
use rcgen::{
    CertificateRevocationListParams, Issuer, KeyIdMethod, KeyPair, RevokedCertParams, SerialNumber,
    date_time_ymd,
};
use rig::{NODES, Options, holds};
use serde_json::Value;

use crate::scene::{CLIENT, SERVER, SERVICE, Scene, Shop};

/// The number of an identity's certificate, at the tunnel of its node.
fn serial(scene: &Scene, node: &str, identity: &str) -> Result<SerialNumber> {
    let part = format!("ztunnel-{node}");
    let dump: Value = serde_json::from_str(&scene.mesh.admin(&part, "/config_dump")?)?;
    let all = dump["certificates"].as_array().context("certificates")?;
    let one = all.iter().find(|one| one["identity"] == identity);
    let one = one.with_context(|| format!("no certificate of {identity} in {dump}"))?;
    let told = &one["certChain"][0]["serialNumber"];
    let decimal = told.as_str().with_context(|| format!("{told}"))?;
    Ok(SerialNumber::from(bytes_of(decimal)?))
}

/// A number of any length, in big-endian bytes.
fn bytes_of(decimal: &str) -> Result<Vec<u8>> {
    let mut bytes: Vec<u8> = Vec::new();
    for digit in decimal.chars() {
        let mut carry = digit.to_digit(10).context("a digit")?;
        for byte in bytes.iter_mut().rev() {
            let [.., high, low] = (u32::from(*byte) * 10 + carry).to_be_bytes();
            (*byte, carry) = (low, high.into());
        }
        if carry > 0 {
            bytes.insert(0, u8::try_from(carry)?);
        }
    }
    Ok(bytes)
}

/// What both tunnels are told of certificates that the mesh's authority has taken back.
struct List {
    path: PathBuf,
    authority: Issuer<'static, KeyPair>,
}

impl List {
    fn of(scene: &Scene, path: &Path) -> Result<Self> {
        let text = fs::read_to_string(scene.mesh.authority()?)?;
        let certificate = text.find("-----BEGIN CERTIFICATE").context("a root")?;
        let key = KeyPair::from_pem(&text[..certificate])?;
        Ok(Self {
            path: path.to_owned(),
            authority: Issuer::from_ca_cert_pem(&text[certificate..], key)?,
        })
    }

    /// In the place of what was revoked before.
    fn revoke(&self, serial: &SerialNumber) -> Result<()> {
        let revoked = RevokedCertParams {
            serial_number: serial.clone(),
            revocation_time: date_time_ymd(2020, 1, 1),
            reason_code: None,
            invalidity_date: None,
        };
        let list = CertificateRevocationListParams {
            this_update: date_time_ymd(2020, 1, 1),
            next_update: date_time_ymd(2100, 1, 1),
            crl_number: SerialNumber::from(1_u64),
            issuing_distribution_point: None,
            revoked_certs: vec![revoked],
            key_identifier_method: KeyIdMethod::Sha256,
        };
        let text = list.signed_by(&self.authority)?.pem()?;
        let whole = self.path.with_extension("new");
        fs::write(&whole, text)?;
        Ok(fs::rename(whole, &self.path)?)
    }
}

/// Handshakes that the tunnel of a node has refused.
fn rejections(scene: &Scene, node: &str, reporter: &str) -> Result<u64> {
    let series = format!("istio_crl_policy_rejections_total{{reporter=\"{reporter}\"}} ");
    let text = scene.mesh.metrics(node)?;
    let mut lines = text.lines();
    let count = lines.find_map(|line| line.strip_prefix(&series));
    Ok(count.with_context(|| format!("no {series}"))?.parse()?)
}

/// Waits until the client cannot reach the server any more, as the tunnel of a node refuses the certificate of the other.
fn refused(scene: &Scene, node: &str, reporter: &str, serial: &SerialNumber) -> Result<()> {
    ensure!(
        rejections(scene, node, reporter)? == 0,
        "nothing is revoked"
    );
    scene.mesh.eventually("the client is cut off", || {
        scene.refused("shop/client", SERVICE)?;
        let count = rejections(scene, node, reporter)?;
        ensure!(count > 0, "{node} has refused none");
        Ok(())
    });
    let named: String = serial
        .as_ref()
        .iter()
        .map(|it| format!("{it:02x}"))
        .collect();
    let line = scene.access_line(node, &[&named, "is revoked"]);
    holds(&line, "the certificate with the serial number")
}

#[test]
fn a_revoked_certificate_is_refused_by_both_ends_counted_and_named() -> Result<()> {
    let folder = tempfile::tempdir()?;
    fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o755))?;
    let path = folder.path().join("ca-crl.pem");
    let prepare = format!("export CRL_PATH={}", path.display());
    let (_folder, options) = Options::prepared(&prepare, &NODES.map(|node| (node, None)))?;
    let scene = Scene::start_with(Shop::InMesh, "", &options)?;
    let list = List::of(&scene, &path)?;
    let (client, server) = (
        serial(&scene, "node1", CLIENT)?,
        serial(&scene, "node2", SERVER)?,
    );

    list.revoke(&client)?;
    refused(&scene, "node2", "destination", &client)?;

    list.revoke(&server)?;
    refused(&scene, "node1", "source", &server)
}
