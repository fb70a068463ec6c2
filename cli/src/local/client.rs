//! The commands that talk to a running mesh.

use std::{
    collections::BTreeMap,
    io::{self, IsTerminal, Write},
    net::{Ipv4Addr, TcpListener},
    os::{
        fd::{AsFd, BorrowedFd},
        unix::net::UnixStream,
    },
    process::ExitCode,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};
use serde_json::Value;

use super::{
    control, logs,
    objects::Key,
    parts::{Action, CONTROL_PLANE, tunnel},
    protocol::{PodStatus, Reply, Request, Status, receive_reply, send_request},
    rewrite,
    runtime::Runtime,
    terminal,
};
use crate::{
    args::Output,
    operator::explain::{self, Question},
    screen,
};

/// Talks to one mesh.
#[derive(Clone, Debug)]
pub(crate) struct Client {
    name: String,
    runtime: Runtime,
}

impl Client {
    /// The mesh called `name`, which must run.
    pub(crate) fn named(name: &str) -> Result<Self> {
        let client = Self {
            name: name.to_owned(),
            runtime: Runtime::named(name)?,
        };
        client.connect()?;
        Ok(client)
    }

    fn connect(&self) -> Result<UnixStream> {
        UnixStream::connect(self.runtime.control_socket()).map_err(|_| {
            let others: Vec<_> = Runtime::names()
                .into_iter()
                .filter(|name| *name != self.name)
                .collect();
            let hint = match others.as_slice() {
                [] => "`leyline local up` starts one".to_owned(),
                others => format!("there are: {}; choose with --name", others.join(", ")),
            };
            anyhow::anyhow!("no mesh called {:?} runs here ({hint})", self.name)
        })
    }

    /// The mesh's name.
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// Where its logs and state are.
    pub(crate) fn runtime(&self) -> &Runtime {
        &self.runtime
    }

    /// Sends a request and waits for the answer.
    pub(crate) fn ask(&self, request: &Request) -> Result<Value> {
        self.ask_with(request, &[])
    }

    /// The same, with open files beside the request.
    fn ask_with(&self, request: &Request, files: &[BorrowedFd<'_>]) -> Result<Value> {
        let stream = self.connect()?;
        send_request(&stream, request, files).context("ask the mesh")?;
        answered(&stream)
    }

    /// The JSON that a part's admin endpoint answers.
    fn json(&self, part: &str, path: &str) -> Result<Value> {
        let answer = self.ask(&Request::Admin {
            part: part.to_owned(),
            endpoint: "admin".to_owned(),
            method: "GET".to_owned(),
            path: path.to_owned(),
        })?;
        if answer["status"] != 200 {
            bail!("{part} answers {} to {path}", answer["status"]);
        }
        let body = answer["body"].as_str().unwrap_or_default();
        serde_json::from_str(body).with_context(|| format!("read what {part} answers to {path}"))
    }

    /// Everything about the mesh.
    pub(crate) fn status(&self) -> Result<Status> {
        let mut status: Status = serde_json::from_value(self.ask(&Request::Status)?)?;
        // Only from outside its namespaces does its process have this number.
        let peer = getsockopt(&self.connect()?, PeerCredentials).context("ask who answers")?;
        status.supervisor.host_pid = Some(peer.pid());
        Ok(status)
    }

    /// Stops the mesh and waits until it has ended.
    fn down(&self) -> Result<ExitCode> {
        const LIMIT: Duration = Duration::from_secs(20);
        // One that ends before it answers has ended all the same.
        let _ = self.ask(&Request::Down);
        let started = Instant::now();
        while UnixStream::connect(self.runtime.control_socket()).is_ok() {
            if started.elapsed() > LIMIT {
                bail!("the mesh has not ended after {LIMIT:?}");
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        self.runtime.remove();
        Ok(ExitCode::SUCCESS)
    }

    /// Starts a command in a pod or on a node with the given standard input, output and error. Closing the connection
    /// ends it.
    pub(crate) fn start_exec(
        &self,
        request: &Request,
        files: [&dyn AsFd; 3],
    ) -> Result<UnixStream> {
        let stream = self.connect()?;
        send_request(&stream, request, &files.map(AsFd::as_fd)).context("ask the mesh")?;
        Ok(stream)
    }

    /// Waits for the end of a command: its exit code.
    pub(crate) fn finish_exec(stream: &UnixStream) -> Result<u8> {
        let answer = answered(stream)?;
        Ok(answer["exit"]
            .as_i64()
            .and_then(|code| u8::try_from(code & 0xff).ok())
            .unwrap_or(1))
    }
}

fn answered(stream: &UnixStream) -> Result<Value> {
    match receive_reply(stream).context("the mesh ended before it answered")? {
        Reply::Ok(value) => Ok(value),
        Reply::Error(message) => bail!(message),
    }
}

/// `down`: also what a killed mesh left, which is its runtime folder and nothing else.
pub(crate) fn down(name: &str) -> Result<ExitCode> {
    let runtime = Runtime::named(name)?;
    match Client::named(name) {
        Ok(client) => client.down(),
        Err(_) if runtime.left_behind() => {
            runtime.remove();
            println!("the mesh {name:?} had ended already; its files are removed");
            Ok(ExitCode::SUCCESS)
        }
        Err(error) => Err(error),
    }
}

/// `status`.
pub(crate) fn status(client: &Client, output: Output) -> Result<ExitCode> {
    let status = client.status()?;
    let text = match output {
        Output::Json => serde_json::to_string_pretty(&status)? + "\n",
        Output::Table => tables(&status),
    };
    io::stdout().write_all(text.as_bytes())?;
    Ok(ExitCode::SUCCESS)
}

fn tables(status: &Status) -> String {
    let screen = screen::output();
    let head = |words: &[&str]| {
        words
            .iter()
            .map(|word| screen.heading(word))
            .collect::<Vec<_>>()
    };
    let dash = |text: Option<&str>| {
        text.filter(|text| !text.is_empty())
            .unwrap_or("-")
            .to_owned()
    };
    let mut parts = vec![head(&["PART", "STATE", "RESTARTS", "WHY"])];
    for (name, part) in &status.parts {
        let state = match (part.ready, part.running, part.held) {
            (true, ..) => screen.good("ready"),
            (false, true, _) => screen.waiting("starting"),
            (false, false, true) => screen.waiting("held"),
            (false, false, false) => screen.bad("down"),
        };
        parts.push(vec![
            name.clone(),
            state,
            part.restarts.to_string(),
            dash(part.reason.as_deref()),
        ]);
    }
    let mut nodes = vec![head(&["NODE", "PODS", "ADDRESSES"])];
    nodes.extend(status.nodes.iter().map(|(name, node)| {
        vec![
            name.clone(),
            node.pods.to_string(),
            node.addresses.join(" "),
        ]
    }));
    let mut pods = vec![head(&[
        "NAMESPACE",
        "POD",
        "READY",
        "MESH",
        "RESTARTS",
        "NODE",
        "ADDRESS",
        "WHY",
    ])];
    pods.extend(status.pods.iter().map(|pod| pod_row(pod, screen)));
    let mut services = vec![head(&["SERVICE", "ADDRESS"])];
    let rows = status.services.iter();
    services.extend(rows.map(|(name, addresses)| vec![name.clone(), addresses.join(" ")]));
    let mut text = [parts, nodes, pods, services]
        .iter()
        .filter(|rows| rows.len() > 1)
        .map(|rows| screen::table(rows))
        .collect::<Vec<_>>()
        .join("\n");
    let objects = object_rows(status, screen);
    if !objects.is_empty() {
        let rows: Vec<_> = [head(&["KIND", "OBJECT", "CONDITION", "STATUS", "MESSAGE"])]
            .into_iter()
            .chain(objects)
            .collect();
        text.push('\n');
        text.push_str(&screen::table(&rows));
    }
    if let Some(why) = &status.objects_error {
        text.push_str(&format!(
            "\n{} {why}\n",
            screen.waiting("objects' conditions are not known:")
        ));
    }
    if !status.problems.is_empty() {
        text.push_str(&format!("\n{}\n", screen.heading("PROBLEMS")));
        status
            .problems
            .iter()
            .for_each(|problem| text.push_str(&format!("{problem}\n")));
    }
    text
}

fn pod_row(pod: &PodStatus, screen: screen::Screen) -> Vec<String> {
    let ready = match (pod.ready, pod.phase.as_str()) {
        (true, _) => screen.good("yes"),
        (false, "Running" | "Pending") => screen.waiting(if pod.phase == "Running" {
            "no"
        } else {
            "pending"
        }),
        (false, "Failed") => screen.bad("failed"),
        (false, phase) => phase.to_lowercase(),
    };
    let mesh = match pod.mesh.as_str() {
        "yes" => screen.good("yes"),
        "no" => "no".to_owned(),
        other => screen.waiting(other),
    };
    let dash = |text: Option<&String>| {
        text.filter(|text| !text.is_empty())
            .map_or("-", String::as_str)
            .to_owned()
    };
    vec![
        pod.namespace.clone(),
        pod.name.clone(),
        ready,
        mesh,
        pod.restarts.to_string(),
        dash(Some(&pod.node)),
        dash(pod.ips.first()),
        dash(pod.reason.as_ref()),
    ]
}

fn object_rows(status: &Status, screen: screen::Screen) -> Vec<Vec<String>> {
    let text = |value: &Value, key: &str| value[key].as_str().unwrap_or_default().to_owned();
    let mut rows = Vec::new();
    for object in status.objects.iter().filter(|object| worth_showing(object)) {
        let name = match object["namespace"].as_str() {
            Some(namespace) => format!("{namespace}/{}", text(object, "name")),
            None => text(object, "name"),
        };
        for condition in object["conditions"].as_array().into_iter().flatten() {
            let truth = text(condition, "status");
            let painted = if truth == "True" {
                screen.good(&truth)
            } else {
                screen.bad(&truth)
            };
            let message = text(condition, "message");
            rows.push(vec![
                text(object, "kind"),
                name.clone(),
                text(condition, "type"),
                painted,
                message,
            ]);
        }
    }
    rows
}

/// In the table, pods have a row of their own already, and what the supervisor wrote itself is no news; what is wrong
/// always is. `-o json` has everything.
fn worth_showing(object: &Value) -> bool {
    let kind = object["kind"].as_str().unwrap_or_default();
    let accepted =
        |condition: &Value| condition["type"] != "Accepted" || condition["status"] == "True";
    let sound = object["conditions"]
        .as_array()
        .into_iter()
        .flatten()
        .all(accepted);
    !sound
        || ![
            "Deployment",
            "EndpointSlice",
            "Namespace",
            "Node",
            "Pod",
            "ServiceAccount",
        ]
        .contains(&kind)
}

/// `label`.
pub(crate) fn label(
    client: &Client,
    target: &str,
    labels: &[String],
    write: bool,
) -> Result<ExitCode> {
    let labels = parse_labels(labels)?;
    if write {
        let (namespace, name) = match target.split_once('/') {
            Some((namespace, name)) => (Some(namespace), name),
            None => (None, target),
        };
        let file = rewrite::in_folder(&client.status()?.folder, namespace, name, &labels)?;
        println!("{target} labelled in {}", file.display());
        return Ok(ExitCode::SUCCESS);
    }
    client.ask(&Request::Label {
        target: target.to_owned(),
        labels,
    })?;
    println!("{target} labelled (while the mesh runs; the folder's files stay as they are)");
    Ok(ExitCode::SUCCESS)
}

/// Reads `key=value` and `key-`.
pub(crate) fn parse_labels(texts: &[String]) -> Result<BTreeMap<String, Option<String>>> {
    let parse = |text: &String| match (text.split_once('='), text.strip_suffix('-')) {
        (Some((key, value)), _) if !key.is_empty() => Ok((key.to_owned(), Some(value.to_owned()))),
        (None, Some(key)) if !key.is_empty() => Ok((key.to_owned(), None)),
        _ => bail!("{text:?} is neither key=value nor key-"),
    };
    texts.iter().map(parse).collect()
}

/// `exec`: with a terminal of its own where ours is one.
pub(crate) fn exec(
    client: &Client,
    target: String,
    container: Option<String>,
    command: Vec<String>,
) -> Result<ExitCode> {
    let terminal = io::stdin().is_terminal() && io::stdout().is_terminal();
    let term = terminal.then(|| std::env::var("TERM").ok()).flatten();
    let request = Request::Exec {
        target,
        container,
        command,
        terminal,
        term,
    };
    let code = if terminal {
        terminal::with_own(|end| {
            Client::finish_exec(&client.start_exec(&request, [end, end, end])?)
        })?
    } else {
        Client::finish_exec(
            &client.start_exec(&request, [&io::stdin(), &io::stdout(), &io::stderr()])?,
        )?
    };
    Ok(ExitCode::from(code))
}

/// `forward`: until killed.
pub(crate) fn forward(
    client: &Client,
    target: &str,
    ports: &str,
    from: Option<String>,
) -> Result<ExitCode> {
    let number = |text: &str| {
        text.parse::<u16>()
            .with_context(|| format!("{text:?} is no port"))
    };
    let (local, port) = match ports.split_once(':') {
        Some((local, port)) => (number(local)?, number(port)?),
        None => (number(ports)?, number(ports)?),
    };
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, local))
        .with_context(|| format!("listen on 127.0.0.1:{local}"))?;
    println!(
        "{} leads to {target}, port {port}; Ctrl-C ends it",
        listener.local_addr()?
    );
    for stream in listener.incoming() {
        let (stream, client) = (stream.context("accept")?, client.clone());
        let request = Request::Forward {
            target: target.to_owned(),
            port,
            from: from.clone(),
        };
        std::thread::spawn(move || {
            if let Err(error) = client.ask_with(&request, &[stream.as_fd()]) {
                eprintln!("{} {error:#}", screen::errors().bad("error:"));
            }
        });
    }
    Ok(ExitCode::SUCCESS)
}

/// `logs`.
pub(crate) fn logs(
    client: &Client,
    target: &str,
    container: Option<&str>,
    follow: bool,
    tail: Option<usize>,
) -> Result<ExitCode> {
    let path = match target.split_once('/') {
        None => client.runtime().part_log(target),
        Some(_) => {
            let status = client.status()?;
            let pod = find_pod(&status, target)?;
            let container = container.or(pod.containers.first().map(String::as_str));
            let container = container.with_context(|| format!("{target} has no container"))?;
            client
                .runtime()
                .container_log(&Key::new(&pod.namespace, &pod.name), container)
        }
    };
    if !path.exists() {
        let status = client.status()?;
        let known: Vec<_> = status
            .parts
            .keys()
            .map(String::as_str)
            .chain(["supervisor"])
            .collect();
        bail!("{target} has no log (parts are: {})", known.join(", "));
    }
    let text = logs::tail(&path, tail)?;
    let printed = if follow {
        let gone = || UnixStream::connect(client.runtime().control_socket()).is_err();
        logs::follow(&path, tail, io::stdout(), gone)
    } else {
        io::stdout().write_all(text.as_bytes())
    };
    match printed {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(error.into()),
        _ => Ok(ExitCode::SUCCESS),
    }
}

fn find_pod<'a>(status: &'a Status, target: &str) -> Result<&'a PodStatus> {
    let (namespace, name) = target
        .split_once('/')
        .context("the form is NAMESPACE/POD")?;
    let mut inside = status.pods.iter().filter(|pod| pod.namespace == namespace);
    let exact = inside.clone().find(|pod| pod.name == name);
    exact
        .or_else(|| inside.find(|pod| pod.deployment.as_deref() == Some(name)))
        .with_context(|| format!("there is no pod {target}"))
}

/// `kill`.
pub(crate) fn kill(client: &Client, part: &str, hold: bool) -> Result<ExitCode> {
    let action = if hold { Action::Hold } else { Action::Kill };
    client.ask(&Request::Part {
        part: part.to_owned(),
        action,
    })?;
    println!(
        "{part} {}",
        if hold {
            "killed, and held down until `leyline local restart`"
        } else {
            "killed; it is started again"
        }
    );
    Ok(ExitCode::SUCCESS)
}

/// `restart`.
pub(crate) fn restart(client: &Client, part: &str) -> Result<ExitCode> {
    client.ask(&Request::Part {
        part: part.to_owned(),
        action: Action::Restart,
    })?;
    println!("{part} is started again");
    Ok(ExitCode::SUCCESS)
}

/// `admin`.
pub(crate) fn admin(client: &Client, part: &str, path: &str, post: bool) -> Result<ExitCode> {
    let metrics = path.starts_with("/metrics") || path.starts_with("/stats/prometheus");
    let endpoint = if metrics { "metrics" } else { "admin" };
    let method = if post { "POST" } else { "GET" };
    let request = Request::Admin {
        part: part.to_owned(),
        endpoint: endpoint.to_owned(),
        method: method.to_owned(),
        path: path.to_owned(),
    };
    let answer = client.ask(&request)?;
    io::stdout().write_all(answer["body"].as_str().unwrap_or_default().as_bytes())?;
    let status = answer["status"].as_u64().unwrap_or(0);
    Ok(if (200..300).contains(&status) {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// Why a connection of the mesh is allowed or denied, as its tunnels decide.
pub(crate) fn explain(client: &Client, asked: &Question) -> Result<ExitCode> {
    let status = client.status()?;
    let node = node_of_source(&status, asked.source())?;
    let fetch = |node: &str| client.json(&tunnel(node), "/config_dump");
    let waypoint = |pod: &str| client.json(&format!("{}{pod}", control::POD), "/config_dump");
    let objects = client.json(CONTROL_PLANE, "/status").unwrap_or_default();
    let place = |by: &mesh::explain::Decider| place(&objects, by);
    explain::local(asked, &node, &fetch, &waypoint, &place)
}

/// The node of a pod that is named `NAMESPACE/POD`, `POD.NAMESPACE` or by its address; also by its deployment's name.
fn node_of_source(status: &Status, source: &str) -> Result<String> {
    let (namespace, name) = match (source.split_once('/'), source.rsplit_once('.')) {
        (Some((namespace, name)), _) => (namespace, name),
        (None, Some((name, namespace))) => (namespace, name),
        (None, None) => ("default", source),
    };
    let is = |pod: &&PodStatus| {
        let made = pod
            .name
            .strip_prefix(name)
            .is_some_and(|it| it.is_empty() || it.starts_with('-'));
        (pod.namespace == namespace && made) || pod.ips.iter().any(|it| it == source)
    };
    let found = status.pods.iter().filter(is).min_by_key(|it| it.name.len());
    let found = found.with_context(|| format!("there is no pod {source} (NAMESPACE/POD)"))?;
    Ok(found.node.clone())
}

/// The file and line of an object, as the control plane tells them.
fn place(objects: &Value, by: &mesh::explain::Decider) -> Option<String> {
    let is = |it: &&Value| {
        it["kind"] == by.kind && it["namespace"] == *by.namespace && it["name"] == *by.name
    };
    let object = objects.as_array()?.iter().find(is)?;
    Some(format!("{}:{}", object["file"].as_str()?, object["line"]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_are_set_or_removed() {
        let parse = |texts: &[&str]| {
            parse_labels(
                &texts
                    .iter()
                    .map(|text| (*text).to_owned())
                    .collect::<Vec<_>>(),
            )
        };
        let labels = parse(&["a/b=c", "x=", "gone-"]).unwrap();
        assert_eq!(labels["a/b"].as_deref(), Some("c"));
        assert_eq!(labels["x"].as_deref(), Some(""));
        assert_eq!(labels["gone"], None);
        for text in ["", "=", "-", "word", "=x"] {
            assert!(parse(&[text]).is_err(), "{text:?}");
        }
    }
}
