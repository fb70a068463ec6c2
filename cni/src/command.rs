//! The agent's command line: Istio's own, of which most is settled otherwise here.

/// What the process should do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Command {
    /// Its task.
    pub task: Task,
    /// Log directives (`RUST_LOG`'s language), where a level was asked for.
    pub log_filter: Option<String>,
    /// Log lines as JSON objects.
    pub log_as_json: bool,
    /// Arguments that have no effect here.
    pub ignored: Vec<String>,
}

/// The agent, or the short task that comes before its removal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Task {
    /// `install-cni`, or nothing: the agent.
    Agent,
    /// `leave-cluster`: end all agents, each of which takes its node's pods out of the mesh.
    LeaveCluster,
}

impl Command {
    /// Reads arguments (without the program's name) as Istio's `install-cni` gets them. `--name value` and
    /// `--name=value` are the same.
    pub fn parse(arguments: impl IntoIterator<Item = String>) -> Command {
        let mut command = Command {
            task: Task::Agent,
            log_filter: None,
            log_as_json: false,
            ignored: Vec::new(),
        };
        let mut arguments = arguments.into_iter().peekable();
        while let Some(argument) = arguments.next() {
            let (name, value) = match argument.split_once('=') {
                Some((name, value)) => (name.to_owned(), Some(value.to_owned())),
                None => (argument.clone(), None),
            };
            match name.as_str() {
                "install-cni" => command.task = Task::Agent,
                "leave-cluster" => command.task = Task::LeaveCluster,
                "--log_output_level" => {
                    let level = value.or_else(|| arguments.next()).unwrap_or_default();
                    command.log_filter = filter(&level);
                }
                "--log_as_json" => command.log_as_json = value.is_none_or(|value| value != "false"),
                _ => command.ignored.push(argument),
            }
        }
        command
    }
}

/// Istio's `default:info,cni:debug` or `debug`; scopes other than `default` name parts of Istio's program.
pub fn filter(level: &str) -> Option<String> {
    let scoped = |part: &str| match part.split_once(':') {
        Some(("default" | "all", level)) => Some(level.to_owned()),
        Some(_) => None,
        None => Some(part.to_owned()),
    };
    let level = level.split(',').find_map(|part| scoped(part.trim()))?;
    let ours = match level.as_str() {
        "debug" | "info" | "warn" | "error" => level.as_str(),
        "fatal" => "error",
        "none" => "off",
        _ => return None,
    };
    Some(ours.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Command {
        Command::parse(line.split_whitespace().map(str::to_owned))
    }

    #[test]
    fn istios_arguments_are_understood_or_named() {
        let command =
            parse("install-cni --log_output_level=default:debug,cni:info --log_as_json --x=1");
        assert_eq!(command.log_filter.as_deref(), Some("debug"));
        assert!(command.log_as_json);
        assert_eq!(command.ignored, ["--x=1"]);
        assert_eq!(
            parse("--log_output_level warn").log_filter.as_deref(),
            Some("warn")
        );
        assert_eq!(parse("leave-cluster").task, Task::LeaveCluster);
        assert_eq!(parse(""), parse("install-cni"));
    }

    #[test]
    fn levels_are_translated() {
        for (text, expected) in [
            ("info", Some("info")),
            ("cni:debug,default:none", Some("off")),
            ("all:fatal", Some("error")),
            ("cni:debug", None),
            ("loud", None),
            ("", None),
        ] {
            assert_eq!(filter(text).as_deref(), expected, "{text}");
        }
    }
}
