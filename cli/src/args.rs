//! The command line.

use std::path::PathBuf;

use clap::{Args as ClapArgs, Parser, Subcommand};

use crate::tool::Tool;

/// A service mesh without sidecars.
#[derive(Debug, Parser)]
#[command(
    name = "leyline",
    version,
    propagate_version = true,
    max_term_width = 100
)]
pub(crate) struct Args {
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// A whole mesh on this machine: no cluster, no container engine
    #[command(subcommand)]
    Local(Local),
    /// Print the version
    Version,
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
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_sound() {
        Args::command().debug_assert();
    }
}
