//! The Gateway API's conformance suite, on the bed: `tests/conformance` is the suite as a program.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context, Result, ensure};

use super::{HUB, bed::Bed, machine};

/// Runs tests of the suite by their short names, or all of its tests for meshes where none is named. What it printed; an error,
/// with that, when one failed. A report is written where one is wanted. On the rig, its image is loaded first.
pub fn run(bed: &Bed, only: &[&str], report: Option<&Path>) -> Result<String> {
    bed.load(&[image()?])?;
    let mut suite = Command::new(machine::built("conformance")?.join("suite"));
    suite
        .arg("-test.v")
        // The suite waits for itself; this is for a suite that hangs.
        .arg("-test.timeout=20m")
        .arg(format!("-only={}", only.join(",")))
        .arg(format!("-image={HUB}/echo:dev"))
        .arg(format!(
            "-implementation-version={}",
            env!("CARGO_PKG_VERSION")
        ))
        .env("KUBECONFIG", bed.kube().kubeconfig())
        .stdin(Stdio::null());
    if let Some(report) = report {
        suite.arg("-report").arg(report);
    }
    let output = suite.output().with_context(|| format!("{suite:?}"))?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    ensure!(
        output.status.success(),
        "{}\n{text}\n{}",
        output.status,
        crate::stderr(&output)
    );
    Ok(text)
}

/// The image of the suite's echo server, with its client beside it, and a certificate of its own.
fn image() -> Result<PathBuf> {
    let (programs, out) = (
        machine::built("conformance")?,
        machine::target()?.join("cluster/images"),
    );
    let (certificate, key) = (programs.join("cert.crt"), programs.join("cert.key"));
    if !key.exists() {
        let made = rcgen::generate_simple_self_signed(["echo".to_owned()])?;
        fs::write(&certificate, made.cert.pem())?;
        fs::write(&key, made.signing_key.serialize_pem())?;
    }
    let at = |file: &Path, place: &str| PathBuf::from(format!("{}:{place}", file.display()));
    let files = [
        programs.join("server"),
        programs.join("client"),
        at(&certificate, "/cert.crt"),
        at(&key, "/cert.key"),
    ];
    let files: Vec<&Path> = files.iter().map(PathBuf::as_path).collect();
    machine::pack(&out, "echo", "1000", &files)?;
    Ok(out.join("echo.tar"))
}
