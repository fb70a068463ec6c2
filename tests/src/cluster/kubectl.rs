//! kubectl, as a user has it, with the waits that tests need.

use std::{
    ffi::OsStr,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::machine::feed;
use crate::{Running, stderr};

/// kubectl for one cluster.
#[derive(Clone, Debug)]
pub struct Kube {
    program: PathBuf,
    kubeconfig: PathBuf,
}

impl Kube {
    /// For the cluster that `kubeconfig` names.
    pub fn new(program: PathBuf, kubeconfig: PathBuf) -> Self {
        Self {
            program,
            kubeconfig,
        }
    }

    /// The cluster's kubeconfig.
    pub fn kubeconfig(&self) -> &Path {
        &self.kubeconfig
    }

    /// A command of kubectl.
    pub fn command<A: AsRef<OsStr>>(&self, arguments: &[A]) -> Command {
        let mut command = Command::new(&self.program);
        command
            .arg("--kubeconfig")
            .arg(&self.kubeconfig)
            .args(arguments)
            .stdin(Stdio::null());
        command
    }

    /// Runs it to its end; what it prints, if it succeeds.
    pub fn run<A: AsRef<OsStr>>(&self, arguments: &[A]) -> Result<String> {
        crate::run(&mut self.command(arguments))
    }

    /// `kubectl get -o json`.
    pub fn json<A: AsRef<OsStr>>(&self, arguments: &[A]) -> Result<Value> {
        let mut command = self.command(&["get", "-o", "json"]);
        command.args(arguments);
        let text = crate::run(&mut command)?;
        serde_json::from_str(&text).with_context(|| format!("{command:?}"))
    }

    /// `kubectl apply`, on the server's side: what an earlier call set and this one does not goes.
    pub fn apply(&self, yaml: &str) -> Result<()> {
        let arguments = ["apply", "--server-side", "--force-conflicts", "-f", "-"];
        feed(&mut self.command(&arguments), yaml)
    }

    /// The same, in a namespace unless an object names its own.
    pub fn apply_in(&self, namespace: &str, yaml: &str) -> Result<()> {
        let arguments = [
            "apply",
            "-n",
            namespace,
            "--server-side",
            "--force-conflicts",
            "-f",
            "-",
        ];
        feed(&mut self.command(&arguments), yaml)
    }

    /// `kubectl delete` of the objects in a text; those that are not there are no error.
    pub fn delete(&self, yaml: &str) -> Result<()> {
        let arguments = ["delete", "--ignore-not-found", "--wait=false", "-f", "-"];
        feed(&mut self.command(&arguments), yaml)
    }

    /// `kubectl wait --for=CONDITION OBJECT`, for at most `seconds`.
    pub fn wait(&self, namespace: &str, object: &str, condition: &str, seconds: u32) -> Result<()> {
        self.run(&[
            "-n",
            namespace,
            "wait",
            object,
            &format!("--for={condition}"),
            &format!("--timeout={seconds}s"),
        ])
        .map(drop)
    }

    /// `kubectl rollout status`, for at most `seconds`.
    pub fn rolled_out(&self, namespace: &str, object: &str, seconds: u32) -> Result<()> {
        let timeout = format!("--timeout={seconds}s");
        self.run(&["-n", namespace, "rollout", "status", object, &timeout])
            .map(drop)
    }

    /// Runs a command in a pod (`namespace/name`, or `namespace/deploy/name`) to its end.
    pub fn exec(&self, pod: &str, line: &[&str]) -> Result<Output> {
        let mut command = self.exec_command(pod, line)?;
        command.output().with_context(|| format!("exec in {pod}"))
    }

    /// The same; what it prints, if it succeeds.
    pub fn succeed(&self, pod: &str, line: &[&str]) -> Result<String> {
        let output = self.exec(pod, line)?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        ensure!(
            output.status.success(),
            "{line:?} in {pod}: {text}{}",
            stderr(&output)
        );
        Ok(text)
    }

    /// Starts a command in a pod and goes on; it ends with its value, or with its input.
    pub fn spawn(&self, pod: &str, line: &[&str]) -> Result<Running> {
        Running::start(&mut self.exec_command(pod, line)?)
    }

    fn exec_command(&self, pod: &str, line: &[&str]) -> Result<Command> {
        let (namespace, name) = pod.split_once('/').context("namespace/name")?;
        let mut command = self.command(&["-n", namespace, "exec", "-i", name, "--"]);
        command.args(line);
        Ok(command)
    }
}
