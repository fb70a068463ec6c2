//! `leyline validate`: whether objects in files are what they should be, by themselves: as the webhook would say, offline.

use std::{path::PathBuf, process::ExitCode};

use anyhow::{Result, bail};
use clap::Args;

use super::{Finding, Level, findings, mesh_config, statuses, suppressed, texts, told};
use crate::operator::{access::Access, output::Form};

/// What is wrong with an object whatever else there is.
const OF_ITSELF: [&str; 3] = ["IST0106", "IST0133", "LEY-A01"];

/// Check the objects in files, without a cluster
#[derive(Debug, Args)]
pub(crate) struct Validate {
    /// A file or folder of YAML; - is standard input; may be repeated
    #[arg(long = "filename", short = 'f', value_name = "FILE", required = true)]
    files: Vec<PathBuf>,
    /// Also whether what objects name is in these files
    #[arg(long, short = 'x')]
    referential: bool,
    /// Folders within folders, too
    #[arg(long, short = 'R')]
    recursive: bool,
    /// Form of the output
    #[arg(long, short, value_enum, default_value_t)]
    output: Form,
}

/// Runs the command. Fails where an object is wrong.
pub(crate) async fn run(command: Validate, before: &Access) -> Result<ExitCode> {
    let texts = texts(&command.files, command.recursive)?;
    if texts.is_empty() {
        bail!("there is no YAML in what was named");
    }
    let root = before.istio_namespace();
    let mesh = mesh_config::written(None, &texts, &[], root);
    let settings = mesh_config::settings(&mesh, root);
    let known = texts.clone();
    let statuses = tokio::task::spawn_blocking(move || statuses(&known, &[], settings)).await??;
    let mut found = findings(&statuses, Vec::new(), None, &suppressed(&texts, &[]));
    found.retain(|it| is_asked(it, command.referential));
    told(&found, command.output)?;
    Ok(match found.iter().any(|it| it.level == Level::Error) {
        true => ExitCode::FAILURE,
        false => ExitCode::SUCCESS,
    })
}

fn is_asked(finding: &Finding, referential: bool) -> bool {
    OF_ITSELF.contains(&finding.code) || (referential && finding.code == "IST0101")
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    /// The policy is wrong by itself; the service names what is elsewhere.
    const TEXT: &str = "
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: { name: typo, namespace: shop }
spec: { actoin: DENY }
---
apiVersion: v1
kind: Service
metadata: { name: web, namespace: shop, labels: { istio.io/use-waypoint: elsewhere } }
spec: { ports: [{ port: 80 }] }
";

    #[test]
    fn an_object_is_judged_by_itself_unless_what_it_names_is_asked_for() {
        let texts = BTreeMap::from([("a.yaml".to_owned(), TEXT.to_owned())]);
        let settings = mesh_config::settings(&[], "istio-system");
        let statuses = statuses(&texts, &[], settings).unwrap();
        let found = findings(&statuses, Vec::new(), None, &BTreeMap::new());
        let codes = |referential| -> Vec<&str> {
            let asked = found.iter().filter(|it| is_asked(it, referential));
            asked.map(|it| it.code).collect()
        };
        assert_eq!(codes(false), ["IST0106"], "{found:#?}");
        assert_eq!(codes(true), ["IST0106", "IST0101"], "{found:#?}");
    }
}
