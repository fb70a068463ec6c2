//! The embedded chart, and the `helm` program that applies it. One way to install, whoever installs: what `leyline install`
//! does, `helm upgrade` can go on with.

use std::{
    ffi::OsString,
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context, Result, anyhow, bail};
use include_dir::{Dir, include_dir};
use serde::Deserialize;

use super::access::Access;

static CHART: Dir<'_> = include_dir!("$CARGO_MANIFEST_DIR/../deploy/charts/leyline");

/// The name of the chart, and of the release of the default revision.
pub(crate) const NAME: &str = "leyline";

/// The release of a revision.
pub(crate) fn release(revision: Option<&str>) -> String {
    match revision.filter(|it| !it.is_empty() && *it != "default") {
        Some(revision) => format!("{NAME}-{revision}"),
        None => NAME.to_owned(),
    }
}

/// The helm program, bound to a cluster.
pub(crate) struct Helm {
    program: PathBuf,
    cluster: Vec<OsString>,
}

/// A release, as `helm list` tells.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub(crate) struct Release {
    pub name: String,
    /// Name and version of its chart.
    pub chart: String,
    pub revision: String,
    pub status: String,
}

impl Release {
    /// Whether it is one of ours.
    pub(crate) fn is_ours(&self) -> bool {
        let version = self
            .chart
            .strip_prefix(NAME)
            .and_then(|it| it.strip_prefix('-'));
        version.is_some_and(|it| it.starts_with(|c: char| c.is_ascii_digit()))
    }

    /// Why helm would not apply anything to it at the moment, with the remedy.
    pub(crate) fn unfinished(&self) -> Option<String> {
        let name = &self.name;
        match self.status.as_str() {
            "uninstalling" => Some(format!(
                "the removal of release {name} has not ended: its pre-delete hook did not see every node agent leave\n  \
                 remedy: leyline uninstall once more, then install; if agents stay because their nodes are gone, delete \
                 their pods first: kubectl delete pod --force -l k8s-app=istio-cni-node"
            )),
            "pending-install" | "pending-upgrade" | "pending-rollback" => Some(format!(
                "another helm works on release {name}, or was stopped at it ({})\n  remedy: wait for it; if there is \
                 none any more: helm rollback {name}, or helm uninstall {name} where it was the first install",
                self.status
            )),
            _ => None,
        }
    }
}

impl Helm {
    /// The program given, or the one on PATH.
    pub(crate) fn find(given: Option<&Path>, access: &Access) -> Result<Self> {
        let program = given.unwrap_or(Path::new(HELM)).to_owned();
        let answer = Command::new(&program)
            .args(["version", "--short"])
            .stdin(Stdio::null())
            .output()
            .map_err(|error| {
                anyhow!(
                    "cannot run {}: {error}\n  remedy: install Helm (https://helm.sh) 3.14 or newer, or name it with \
                     --helm PATH",
                    program.display()
                )
            })?;
        let version = String::from_utf8_lossy(&answer.stdout);
        let version = version.trim();
        if !answer.status.success() || version.starts_with("v2") {
            bail!(
                "{} is no Helm 3 or 4 ({version})\n  remedy: name another with --helm PATH",
                program.display()
            );
        }
        Ok(Self {
            program,
            cluster: cluster_flags(access),
        })
    }

    /// Runs helm with these arguments; what it printed.
    pub(crate) fn run(&self, arguments: &[OsString]) -> Result<String> {
        let answer = self.command(arguments).output();
        let answer = answer.with_context(|| format!("run {}", self.program.display()))?;
        if !answer.status.success() {
            bail!(
                "helm: {}",
                complaint(&String::from_utf8_lossy(&answer.stderr))
            );
        }
        Ok(String::from_utf8_lossy(&answer.stdout).into_owned())
    }

    fn command(&self, arguments: &[OsString]) -> Command {
        let mut command = Command::new(&self.program);
        command
            .args(arguments)
            .args(&self.cluster)
            .stdin(Stdio::null());
        command
    }

    /// Our releases in a namespace.
    pub(crate) fn releases(&self, namespace: &str) -> Result<Vec<Release>> {
        // Every state by its name: Helm 3 shows only some without `--all`, which Helm 4 does not know.
        let arguments = [
            "list",
            "--deployed",
            "--failed",
            "--pending",
            "--uninstalling",
            "--output",
            "json",
            "--namespace",
            namespace,
        ];
        let text = self.run(&arguments.map(OsString::from))?;
        let releases: Vec<Release> = serde_json::from_str(&text).context("read helm's list")?;
        Ok(releases.into_iter().filter(Release::is_ours).collect())
    }
}

const HELM: &str = "helm";

fn cluster_flags(access: &Access) -> Vec<OsString> {
    let mut flags = Vec::new();
    let mut flag = |name: &str, value: &dyn AsRef<std::ffi::OsStr>| {
        flags.push(OsString::from(name));
        flags.push(value.as_ref().to_owned());
    };
    if let Some(path) = &access.kubeconfig {
        flag("--kubeconfig", path);
    }
    if let Some(context) = &access.context {
        flag("--kube-context", context);
    }
    if let Some(user) = &access.impersonate {
        flag("--kube-as-user", user);
    }
    for group in &access.impersonate_groups {
        flag("--kube-as-group", group);
    }
    flags
}

/// What went wrong, without the warnings that helm prints before it.
fn complaint(stderr: &str) -> String {
    let lines = stderr
        .lines()
        .filter(|it| !it.starts_with("WARNING:") && !it.trim().is_empty());
    let text = lines.collect::<Vec<_>>().join("\n  ");
    text.strip_prefix("Error: ").unwrap_or(&text).to_owned()
}

/// Writes the embedded chart into `folder`; the chart's own folder.
pub(crate) fn unpack(folder: &Path) -> Result<PathBuf> {
    let chart = folder.join(NAME);
    fs::create_dir_all(&chart).with_context(|| format!("make {}", chart.display()))?;
    CHART
        .extract(&chart)
        .with_context(|| format!("write the chart to {}", chart.display()))?;
    Ok(chart)
}

/// The version of the embedded chart.
pub(crate) fn chart_version() -> Option<&'static str> {
    let text = CHART.get_file("Chart.yaml")?.contents_utf8()?;
    let value = text.lines().find_map(|it| it.strip_prefix("version:"))?;
    Some(value.trim().trim_matches('"'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_chart_is_whole() {
        let folder = tempfile::tempdir().unwrap();
        let chart = unpack(folder.path()).unwrap();
        for file in ["Chart.yaml", "values.yaml", "templates"] {
            assert!(chart.join(file).exists(), "{file}");
        }
        assert!(chart_version().is_some());
    }

    #[test]
    fn a_release_is_ours_by_its_chart() {
        let release = |chart: &str| Release {
            name: "x".to_owned(),
            chart: chart.to_owned(),
            revision: "1".to_owned(),
            status: "deployed".to_owned(),
        };
        assert!(release("leyline-0.1.0").is_ours());
        for other in ["leyline-demo-0.1.0", "istiod-1.30.0", "leyline"] {
            assert!(!release(other).is_ours(), "{other}");
        }
    }

    #[test]
    fn a_release_whose_removal_failed_is_told_with_the_remedy() {
        let release = |status: &str| Release {
            name: "leyline".to_owned(),
            chart: "leyline-0.1.0".to_owned(),
            revision: "1".to_owned(),
            status: status.to_owned(),
        };
        for status in ["deployed", "failed", "superseded"] {
            assert_eq!(release(status).unfinished(), None, "{status}");
        }
        for (status, remedy) in [
            ("uninstalling", "leyline uninstall"),
            ("pending-upgrade", "helm rollback leyline"),
        ] {
            let told = release(status).unfinished().unwrap();
            assert!(told.contains("remedy: ") && told.contains(remedy), "{told}");
        }
    }

    #[test]
    fn a_missing_helm_is_named_with_the_remedy() {
        let missing = Path::new("/nowhere/helm");
        let error = Helm::find(Some(missing), &Access::default())
            .err()
            .unwrap()
            .to_string();
        assert!(
            error.contains("/nowhere/helm") && error.contains("--helm"),
            "{error}"
        );
    }

    #[test]
    fn helms_warnings_do_not_hide_its_error() {
        let stderr = "WARNING: Kubernetes configuration file is group-readable\nError: values don't meet the schema\n- x\n";
        assert_eq!(complaint(stderr), "values don't meet the schema\n  - x");
    }
}
