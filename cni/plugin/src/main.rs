//! The CNI plugin, installed as `istio-cni` behind the cluster's own plugins.
//!
//! The container runtime starts it for each sandbox. It decides nothing but who need not be asked about: every other
//! pod is put to the node's agent, which knows labels and rules, and only its yes lets the pod start. Without an agent
//! pods wait (kubelet tries again): a pod never runs outside the mesh because something was down. It keeps no state,
//! touches no network and never speaks to the API server.

mod agent;
mod config;
mod protocol;

use std::{
    env,
    io::{self, Read, Write},
    panic,
    path::Path,
    process::ExitCode,
};

use config::{NetworkConfig, PodArguments};
use protocol::{Code, Failure};

/// A configuration is a few kilobytes.
const INPUT_LIMIT: u64 = 1 << 20;
/// The agent's pods, which must start without an agent. Source: `spec/cni.md` 4.
const AGENT_POD_PREFIX: &str = "istio-cni-node-";

fn main() -> ExitCode {
    // The runtime reads stdout alone: what panics must be an error there too.
    panic::set_hook(Box::new(|_| {}));
    let outcome = panic::catch_unwind(run).unwrap_or_else(|_| {
        let failure = Failure::new(Code::Internal, "the plugin failed; this is a bug");
        (protocol::DEFAULT_VERSION.to_owned(), Err(failure))
    });
    match outcome {
        (_, Ok(answer)) => {
            let written = io::stdout().write_all(answer.as_bytes());
            written.map_or(ExitCode::FAILURE, |()| ExitCode::SUCCESS)
        }
        (version, Err(failure)) => {
            let _ = io::stdout().write_all(failure.json(&version).as_bytes());
            ExitCode::FAILURE
        }
    }
}

/// The version that the runtime speaks, and what it gets on stdout.
fn run() -> (String, Result<String, Failure>) {
    let read = NetworkConfig::read(io::stdin().lock().take(INPUT_LIMIT));
    let config = match read {
        Ok(config) => config,
        Err(failure) => return (protocol::DEFAULT_VERSION.to_owned(), Err(failure)),
    };
    let version = config.version().to_owned();
    (version, carry_out(&config))
}

fn carry_out(config: &NetworkConfig) -> Result<String, Failure> {
    let command = environment("CNI_COMMAND")?;
    match command.as_str() {
        "ADD" => add(config),
        // What ADD brought in, the agent takes out when the pod's object ends. STATUS must not depend on the agent: a
        // runtime without network starts no pod at all, the agent's own among them.
        "DEL" | "CHECK" | "GC" | "STATUS" => Ok(String::new()),
        "VERSION" => Ok(protocol::versions(config.version())),
        other => Err(Failure::new(
            Code::InvalidEnvironment,
            format!("CNI_COMMAND={other:?} is not known"),
        )),
    }
}

fn add(config: &NetworkConfig) -> Result<String, Failure> {
    let pod = PodArguments::parse(&env::var("CNI_ARGS").unwrap_or_default());
    if let Some(pod) = pod.filter(|pod| must_be_asked(config, pod)) {
        let request = agent::Request {
            netns: environment("CNI_NETNS")?,
            pod,
            ips: config.ips()?,
        };
        agent::ask(Path::new(config.run_folder()), &request)?;
    }
    Ok(config.result())
}

/// Whether the agent has a say in this pod.
fn must_be_asked(config: &NetworkConfig, pod: &PodArguments) -> bool {
    let agent = pod.namespace == config.agent_namespace() && pod.name.starts_with(AGENT_POD_PREFIX);
    config.ambient_enabled() && !agent && !config.excludes(&pod.namespace)
}

fn environment(name: &str) -> Result<String, Failure> {
    env::var(name)
        .ok()
        .filter(|value| !value.is_empty())
        .ok_or_else(|| Failure::new(Code::InvalidEnvironment, format!("{name} is not set")))
}
