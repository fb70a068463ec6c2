//! The command line.

use std::{ffi::OsString, path::PathBuf};

use clap::{Args as ClapArgs, CommandFactory, FromArgMatches, Parser, Subcommand};

use crate::{
    operator::{Operator, access::Access, explain::Question},
    tool::Tool,
};

/// A service mesh without sidecars.
#[derive(Debug, Parser)]
#[command(
    name = "leyline",
    version,
    propagate_version = true,
    max_term_width = 100
)]
pub(crate) struct Args {
    #[command(flatten)]
    pub access: Access,
    #[command(subcommand)]
    pub command: Command,
}

impl Args {
    /// Reads the command line; ends the process where it is wrong, or asks for help.
    pub(crate) fn read() -> Self {
        let matches = command().get_matches_from(plain(std::env::args_os().collect()));
        Self::from_arg_matches(&matches).unwrap_or_else(|error| error.exit())
    }
}

/// The words of istioctl's users as ours: what is experimental there is a command like any other here, and its precheck
/// is the part of `check` that needs no mesh.
fn plain(mut words: Vec<OsString>) -> Vec<OsString> {
    let is = |word: Option<&OsString>, texts: &[&str]| {
        word.and_then(|it| it.to_str())
            .is_some_and(|it| texts.contains(&it))
    };
    if is(words.get(1), &["x", "experimental"]) {
        words.remove(1);
    }
    if is(words.get(1), &["precheck"]) {
        words.splice(1..2, ["check".into(), "--pre".into()]);
    }
    words
}

/// The command line. Flags that name a cluster may stand before a command, too, but belong to operators' commands alone.
fn command() -> clap::Command {
    Args::command().mut_args(|it| it.global(false).hide(true))
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// A whole mesh on this machine: no cluster, no container engine
    #[command(subcommand)]
    Local(Local),
    #[command(flatten)]
    Operator(Box<Operator>),
    /// Small programs for the demo and for tests
    #[command(subcommand, hide = true)]
    Tool(Tool),
}

#[derive(Debug, ClapArgs)]
pub(crate) struct Mesh {
    /// Which mesh, where several run
    #[arg(
        long,
        global = true,
        default_value = "default",
        env = "LEYLINE_LOCAL_NAME"
    )]
    pub name: String,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Local {
    /// Start a mesh that runs what the YAML files in a folder say, and follows their changes
    Up(Up),
    /// See a mesh at work in under a minute: real traffic, every claim with its evidence
    Demo {
        /// Keep the mesh after the last step, until Ctrl-C
        #[arg(long)]
        keep: bool,
    },
    /// Stop the mesh; nothing of it is left
    Down {
        #[command(flatten)]
        mesh: Mesh,
    },
    /// Show parts, nodes, pods and what is in force
    Status {
        #[command(flatten)]
        mesh: Mesh,
        /// Form of the output
        #[arg(long, short, value_enum, default_value_t = Output::Table)]
        output: Output,
    },
    /// Change labels of a namespace or a pod of the running mesh (`key=value`, or `key-` to remove one)
    ///
    /// The change holds while the mesh runs and is laid over the folder's files, which stay as they are; with --write it
    /// is made in the file itself instead.
    Label {
        #[command(flatten)]
        mesh: Mesh,
        /// Change the object's own file
        #[arg(long)]
        write: bool,
        /// NAMESPACE, or NAMESPACE/POD
        target: String,
        /// key=value or key-
        #[arg(required = true)]
        labels: Vec<String>,
    },
    /// Run a command in a pod (NAMESPACE/POD; a deployment's name will do), or on a node (node1)
    Exec {
        #[command(flatten)]
        mesh: Mesh,
        /// NAMESPACE/POD, or a node
        target: String,
        /// Which container; the first when not given
        #[arg(long, short)]
        container: Option<String>,
        /// Taken for the sake of fingers used to kubectl: a terminal is given where there is one
        #[arg(short, hide = true)]
        i: bool,
        /// As -i
        #[arg(short, hide = true)]
        t: bool,
        /// Program and arguments
        #[arg(last = true, required = true)]
        command: Vec<String>,
    },
    /// Reach a service or a pod from this machine: listen on 127.0.0.1 and carry connections in
    Forward {
        #[command(flatten)]
        mesh: Mesh,
        /// NAMESPACE/NAME of a service or a pod
        target: String,
        /// PORT, or LOCAL:PORT
        ports: String,
        /// Connect as this pod (NAMESPACE/POD), with its identity where it is in the mesh; otherwise from a node
        #[arg(long)]
        from: Option<String>,
    },
    /// Print the log of a pod (NAMESPACE/POD) or of a part (see status)
    Logs {
        #[command(flatten)]
        mesh: Mesh,
        /// NAMESPACE/POD, or a part
        target: String,
        /// Which container; the first when not given
        #[arg(long, short)]
        container: Option<String>,
        /// Go on printing what is added
        #[arg(long, short)]
        follow: bool,
        /// Only the last lines
        #[arg(long)]
        tail: Option<usize>,
    },
    /// End a part at once, as a crash would; it is started again unless held
    Kill {
        #[command(flatten)]
        mesh: Mesh,
        /// Name of the part, as status shows it
        part: String,
        /// Leave it down until `restart`
        #[arg(long)]
        hold: bool,
    },
    /// End a part gently and start it again, or start one that is held
    Restart {
        #[command(flatten)]
        mesh: Mesh,
        /// Name of the part, as status shows it
        part: String,
    },
    /// Why a connection is allowed, denied or routed so: the data plane's own decision
    Explain {
        #[command(flatten)]
        mesh: Mesh,
        #[command(flatten)]
        asked: Question,
    },
    /// Ask a part's admin endpoint, such as /config_dump, or its /metrics
    Admin {
        #[command(flatten)]
        mesh: Mesh,
        /// Name of the part, as status shows it
        part: String,
        /// The path
        #[arg(default_value = "/")]
        path: String,
        /// Send a POST instead of a GET
        #[arg(long)]
        post: bool,
    },
}

#[derive(Debug, ClapArgs)]
pub(crate) struct Up {
    #[command(flatten)]
    pub mesh: Mesh,
    /// Folder of Kubernetes YAML; an empty one is made when not given
    pub folder: Option<PathBuf>,
    /// How many nodes
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u8).range(1..=200))]
    pub nodes: u8,
    /// Return when the mesh runs; `leyline local down` stops it
    #[arg(long, short)]
    pub detach: bool,
    /// Stop when standard input ends: for programs that start a mesh
    #[arg(long, hide = true, conflicts_with = "detach")]
    pub until_input_ends: bool,
    /// Run another program as a node's tunnel, for example --ztunnel node2=./ztunnel
    #[arg(long = "ztunnel", value_name = "NODE=PATH")]
    pub tunnels: Vec<String>,
    /// File of the mesh's configuration (Istio's MeshConfig), watched
    #[arg(long, value_name = "FILE")]
    pub mesh_config: Option<PathBuf>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Output {
    /// For people
    Table,
    /// For programs
    Json,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_sound() {
        command().debug_assert();
    }

    #[track_caller]
    fn read(line: &str) -> Args {
        let words = line.split(' ').map(OsString::from);
        let matches = command().try_get_matches_from(plain(words.collect()));
        Args::from_arg_matches(&matches.unwrap_or_else(|error| panic!("{line}: {error}"))).unwrap()
    }

    #[test]
    fn lines_of_istioctls_users_are_understood() {
        for line in [
            "istioctl install --set profile=ambient --set values.global.hub=x -y --readiness-timeout 10m",
            "istioctl uninstall --purge --skip-confirmation",
            "istioctl version --short --remote=false",
            "istioctl version -o json",
            "istioctl -n shop waypoint apply --enroll-namespace --wait",
            "istioctl waypoint apply -n shop --for all --name w --overwrite --enroll-namespace -r canary",
            "istioctl waypoint list -A",
            "istioctl waypoint delete a b -n shop",
            "istioctl waypoint delete --all",
            "istioctl waypoint generate --for service -n shop",
            "istioctl proxy-status -i mesh-system",
            "istioctl ps ztunnel-x.istio-system -v 1",
            "istioctl zc workload ztunnel-x.istio-system --workload-namespace shop -o json",
            "istioctl ztunnel-config workloads web-1.shop --address 10.0.0.1",
            "istioctl zc svc --service-namespace shop --node n1",
            "istioctl zc all --with-headers -f dump.json",
            "istioctl zc cons --direction inbound --raw",
            "istioctl zc log ztunnel-x --level access:debug,info -r",
            "istioctl zc certs -c kubeconfig --context other",
            "istioctl x precheck -o json",
            "istioctl experimental waypoint list -A",
            "istioctl analyze a.yaml dir --use-kube=false -R --failure-threshold Warning -S IST0101=*x.y",
        ] {
            read(line);
        }
    }

    #[test]
    fn a_cluster_is_named_before_or_after_the_command() {
        for line in [
            "leyline -n shop -i mesh version",
            "leyline -n other version -n shop -i mesh",
        ] {
            let args = read(line);
            let Command::Operator(operator) = args.command else {
                panic!("{line}");
            };
            let Operator::Version(version) = *operator else {
                panic!("{line}");
            };
            let access = version.access.or(&args.access);
            assert_eq!(access.namespace.as_deref(), Some("shop"), "{line}");
            assert_eq!(access.istio_namespace(), "mesh", "{line}");
        }
    }
}
