//! The supervisor's end of the control socket.

use std::{
    collections::BTreeMap,
    fs, io,
    net::{Ipv4Addr, SocketAddr},
    os::{
        fd::OwnedFd,
        unix::{
            fs::PermissionsExt,
            net::{UnixListener, UnixStream},
        },
    },
    path::Path,
    time::Duration,
};

use serde_json::{Value, json};
use tokio::{io::AsyncReadExt, sync::oneshot};

use super::{
    http,
    netns::Netns,
    parts::{self, Acting, PartHandle},
    pod::{ContainerState, Phase},
    process::Running,
    protocol::{
        NodeStatus, PodStatus, Reply, Request, Status, SupervisorStatus, receive_request,
        send_reply,
    },
    shim::{Task, User, World as Surroundings},
    supervisor::Mesh,
    world::{LivePod, World},
};

/// A request on its way to the supervisor.
pub(super) struct Asked {
    request: Request,
    files: Vec<OwnedFd>,
    answer: oneshot::Sender<Answer>,
}

/// What the supervisor answers: something that is known now, or something that takes its time.
enum Answer {
    Now(Reply),
    Command(Box<Task>, [OwnedFd; 3]),
    Status(Box<Status>, Option<Endpoint>),
    Admin(Endpoint, String, String),
    PodAdmin(Netns, SocketAddr, String, String),
    Part(Acting),
    Forward(Netns, SocketAddr, OwnedFd),
}

/// What stands before a pod's name where a part's is expected: `pod/NAMESPACE/POD`.
pub(super) const POD: &str = "pod/";

/// An endpoint and from where it can be reached.
type Endpoint = (tokio::runtime::Handle, SocketAddr);

/// Accepts requests and hands each to `take`.
pub(super) fn listen(
    path: &Path,
    take: impl Fn(Asked) + Send + Sync + Clone + 'static,
) -> io::Result<()> {
    let listener = UnixListener::bind(path)?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o600))?;
    let executor = tokio::runtime::Handle::current();
    std::thread::Builder::new()
        .name("control".to_owned())
        .spawn(move || {
            for stream in listener.incoming().flatten() {
                let (take, executor) = (take.clone(), executor.clone());
                // A thread each: people ask seldom, and a slow one must not hold up another.
                let served = std::thread::Builder::new()
                    .spawn(move || executor.block_on(serve(stream, take)));
                drop(served);
            }
        })?;
    Ok(())
}

async fn serve(stream: UnixStream, take: impl Fn(Asked)) {
    let _ = stream.set_read_timeout(Some(Duration::from_secs(5)));
    let Ok((request, files)) = receive_request(&stream) else {
        return;
    };
    let (answer, answered) = oneshot::channel();
    take(Asked {
        request,
        files,
        answer,
    });
    let reply = match answered.await {
        Ok(Answer::Now(reply)) => reply,
        Ok(Answer::Command(task, files)) => run_command(&stream, &task, files).await,
        Ok(Answer::Status(status, endpoint)) => with_objects(*status, endpoint).await,
        Ok(Answer::Admin((handle, address), method, path)) => {
            match http::request(&handle, &method, address, &path, Duration::from_secs(10)).await {
                Ok(answer) => Reply::Ok(json!({"status": answer.status, "body": answer.body})),
                Err(error) => Reply::Error(format!("{method} {address}{path}: {error}")),
            }
        }
        Ok(Answer::PodAdmin(netns, address, method, path)) => {
            match pod_admin(netns, address, method, path).await {
                Ok(answer) => Reply::Ok(json!({"status": answer.status, "body": answer.body})),
                Err(error) => Reply::Error(format!("ask the pod on its {address}: {error}")),
            }
        }
        Ok(Answer::Forward(netns, address, file)) => match carry(netns, address, file).await {
            Ok(()) => Reply::Ok(Value::Null),
            Err(error) => Reply::Error(format!("carry a connection to {address}: {error}")),
        },
        Ok(Answer::Part(acting)) => {
            acting.done().await;
            Reply::Ok(Value::Null)
        }
        Err(_) => Reply::Error("the mesh is going down".to_owned()),
    };
    let _ = stream.set_nonblocking(false);
    let _ = send_reply(&stream, &reply);
}

/// Where a proxy in a pod answers as a part does.
fn pod_endpoint(name: &str) -> SocketAddr {
    let port = match name {
        "metrics" => 15020,
        "ready" => 15021,
        _ => 15000,
    };
    SocketAddr::new(Ipv4Addr::LOCALHOST.into(), port)
}

/// Asks a proxy in a pod, as from inside of the pod.
async fn pod_admin(
    netns: Netns,
    address: SocketAddr,
    method: String,
    path: String,
) -> io::Result<http::Answer> {
    const LIMIT: Duration = Duration::from_secs(10);
    let asked = tokio::task::spawn_blocking(move || {
        netns.run(move |runtime| {
            let handle = runtime.handle();
            runtime.block_on(http::request(handle, &method, address, &path, LIMIT))
        })
    });
    asked.await.map_err(io::Error::other)?
}

/// Joins a connection from outside to one made in `netns`, until both have ended.
async fn carry(netns: Netns, address: SocketAddr, outside: OwnedFd) -> io::Result<()> {
    const LIMIT: Duration = Duration::from_secs(10);
    let inside = tokio::task::spawn_blocking(move || netns.connect(address, LIMIT));
    let joined = |stream: std::net::TcpStream| {
        stream.set_nonblocking(true)?;
        stream.set_nodelay(true)?;
        tokio::net::TcpStream::from_std(stream)
    };
    let mut inside = joined(inside.await.map_err(io::Error::other)??)?;
    let mut outside = joined(outside.into())?;
    tokio::io::copy_bidirectional(&mut outside, &mut inside).await?;
    Ok(())
}

/// Runs a command until it ends or the one who asked goes away.
async fn run_command(stream: &UnixStream, task: &Task, files: [OwnedFd; 3]) -> Reply {
    let mut running = match Running::attached(task, files) {
        Ok(running) => running,
        Err(error) => return Reply::Error(format!("start the command: {error}")),
    };
    let gone = async {
        let watched = stream.try_clone().and_then(|stream| {
            stream.set_nonblocking(true)?;
            tokio::net::UnixStream::from_std(stream)
        });
        if let Ok(mut watched) = watched {
            let mut byte = [0];
            while matches!(watched.read(&mut byte).await, Ok(1..)) {}
        }
    };
    tokio::select! {
        code = running.ended() => Reply::Ok(json!({"exit": code})),
        () = gone => {
            running.stop(Duration::from_secs(2)).await;
            Reply::Error("interrupted".to_owned())
        }
    }
}

async fn with_objects(mut status: Status, endpoint: Option<Endpoint>) -> Reply {
    if let Some((handle, address)) = endpoint {
        match http::request(&handle, "GET", address, "/status", Duration::from_secs(2)).await {
            Ok(answer) if answer.status == 200 => {
                status.objects = serde_json::from_str(&answer.body).unwrap_or_default();
            }
            Ok(answer) => {
                status.objects_error =
                    Some(format!("the control plane answers with {}", answer.status))
            }
            Err(error) => {
                status.objects_error = Some(format!("the control plane does not answer: {error}"))
            }
        }
    }
    serde_json::to_value(status).map_or_else(|error| Reply::Error(error.to_string()), Reply::Ok)
}

/// Answers a request. Whether the world must be looked at again, and whether it is to end.
pub(super) fn answer(mesh: &mut Mesh, asked: Asked) -> (bool, bool) {
    let Asked {
        request,
        files,
        answer,
    } = asked;
    let (mut changed, mut down) = (false, false);
    let now = |result: Result<Value, String>| match result {
        Ok(value) => Answer::Now(Reply::Ok(value)),
        Err(error) => Answer::Now(Reply::Error(error)),
    };
    let reply = match request {
        Request::Status => Answer::Status(
            Box::new(status(mesh)),
            endpoint(mesh, parts::CONTROL_PLANE, "admin").ok(),
        ),
        Request::Label { target, labels } => {
            let edited = label(&mut mesh.world, &target, labels);
            changed = edited.is_ok();
            now(edited)
        }
        Request::Exec {
            target,
            container,
            command,
            terminal,
            term,
        } => {
            let task = command_task(mesh, &target, container.as_deref(), command);
            match (task, <[OwnedFd; 3]>::try_from(files)) {
                (Ok(mut task), Ok(files)) => {
                    task.terminal = terminal;
                    task.environment
                        .extend(term.map(|term| ("TERM".to_owned(), term)));
                    Answer::Command(Box::new(task), files)
                }
                (Err(error), _) => now(Err(error)),
                (_, Err(_)) => now(Err(
                    "standard input, output and error must come with the request".to_owned(),
                )),
            }
        }
        Request::Forward { target, port, from } => {
            let way = way(&mesh.world, &target, port, from.as_deref());
            match (way, files.into_iter().next()) {
                (Ok((netns, address)), Some(file)) => Answer::Forward(netns, address, file),
                (Err(error), _) => now(Err(error)),
                (_, None) => now(Err("the connection must come with the request".to_owned())),
            }
        }
        Request::Part { part, action } => match find_part(mesh, &part) {
            Ok(handle) => Answer::Part(handle.act(action)),
            Err(error) => now(Err(error)),
        },
        Request::Admin {
            part,
            endpoint: name,
            method,
            path,
        } => match part.strip_prefix(POD) {
            Some(pod) => match mesh.world.find_pod(pod) {
                Ok(pod) => Answer::PodAdmin(pod.netns.clone(), pod_endpoint(&name), method, path),
                Err(error) => now(Err(error)),
            },
            None => match endpoint(mesh, &part, &name) {
                Ok(endpoint) => Answer::Admin(endpoint, method, path),
                Err(error) => now(Err(error)),
            },
        },
        Request::Down => {
            down = true;
            now(Ok(Value::Null))
        }
    };
    // Fails when the one who asked has gone away.
    let _ = answer.send(reply);
    (changed, down)
}

fn find_part<'a>(mesh: &'a Mesh, name: &str) -> Result<&'a PartHandle, String> {
    mesh.parts.get(name).ok_or_else(|| {
        let known: Vec<_> = mesh.parts.keys().cloned().collect();
        format!("there is no part {name} (there are: {})", known.join(", "))
    })
}

fn endpoint(mesh: &Mesh, part: &str, name: &str) -> Result<Endpoint, String> {
    let part = &find_part(mesh, part)?.part;
    let address = match name {
        "ready" => Some(part.ready.0),
        name => part.admin.get(name).copied(),
    };
    let address = address.ok_or_else(|| format!("{} has no endpoint {name}", part.name))?;
    Ok((part.netns.clone(), address))
}

/// Where `target` is, and from where it is to be reached.
fn way(
    world: &World,
    target: &str,
    port: u16,
    from: Option<&str>,
) -> Result<(Netns, SocketAddr), String> {
    let netns = match from {
        Some(pod) => &world.find_pod(pod)?.netns,
        None => {
            &world
                .nodes
                .values()
                .next()
                .ok_or("the mesh has no nodes")?
                .netns
        }
    };
    let service = world
        .services
        .iter()
        .find(|(key, _)| key.to_string() == target);
    let address = match service.and_then(|(_, service)| service.addresses.first()) {
        Some(address) => *address,
        None => world.find_pod(target)?.place.address.v4.into(),
    };
    Ok((netns.clone(), SocketAddr::new(address, port)))
}

fn label(
    world: &mut World,
    target: &str,
    labels: BTreeMap<String, Option<String>>,
) -> Result<Value, String> {
    let edits = if target.contains('/') {
        let key = world.find_pod(target)?.plan.key.to_string();
        world.edits.pods.entry(key).or_default()
    } else {
        if !world.objects.namespaces.contains_key(target) {
            let known: Vec<_> = world.objects.namespaces.keys().cloned().collect();
            return Err(format!(
                "there is no namespace {target} (there are: {})",
                known.join(", ")
            ));
        }
        world.edits.namespaces.entry(target.to_owned()).or_default()
    };
    edits.extend(labels);
    Ok(Value::Null)
}

fn command_task(
    mesh: &Mesh,
    target: &str,
    container: Option<&str>,
    command: Vec<String>,
) -> Result<Task, String> {
    if let Some(node) = mesh.world.nodes.get(target) {
        return Ok(station_task(&node.netns, command));
    }
    if target == "control" {
        return Ok(station_task(&mesh.control, command));
    }
    let pod = mesh.world.find_pod(target)?;
    let plan = match container {
        None => pod
            .containers
            .first()
            .ok_or_else(|| format!("{target} has no container"))?,
        Some(name) => pod
            .containers
            .iter()
            .find(|container| container.name == name)
            .ok_or_else(|| {
                let known: Vec<_> = pod
                    .containers
                    .iter()
                    .map(|container| container.name.as_str())
                    .collect();
                format!(
                    "{target} has no container {name} (it has: {})",
                    known.join(", ")
                )
            })?,
    };
    let state = pod.state();
    let shim = state
        .containers
        .get(&plan.name)
        .and_then(|container| container.shim);
    let shim = shim.ok_or_else(|| {
        let why = state
            .message
            .clone()
            .or_else(|| state.containers.get(&plan.name)?.reason.clone());
        format!(
            "container {} of {} does not run{}",
            plan.name,
            pod.plan.key,
            why.map(|why| format!(": {why}")).unwrap_or_default()
        )
    })?;
    Ok(Task {
        netns: Some(pod.netns.path().to_owned()),
        world: Surroundings::Inside(shim),
        files: Vec::new(),
        hide: Vec::new(),
        hostname: None,
        user: Some(User {
            uid: plan.uid,
            gid: plan.gid,
            nested: mesh.plan.rootless,
        }),
        directory: plan.directory.clone().into(),
        command,
        environment: plan.environment.clone(),
        terminal: false,
    })
}

/// On a node, or beside the control plane: with the mesh's own privileges, to look at links, routes and rules.
fn station_task(netns: &Netns, command: Vec<String>) -> Task {
    let path = format!(
        "/run/leyline/bin:{}:/usr/sbin:/sbin",
        std::env::var("PATH").unwrap_or_default()
    );
    Task {
        netns: Some(netns.path().to_owned()),
        world: Surroundings::Part,
        files: Vec::new(),
        hide: Vec::new(),
        hostname: None,
        user: None,
        directory: "/".into(),
        command,
        environment: BTreeMap::from([
            ("PATH".to_owned(), path),
            ("HOME".to_owned(), "/".to_owned()),
        ]),
        terminal: false,
    }
}

fn status(mesh: &Mesh) -> Status {
    let world = &mesh.world;
    let mut pods: Vec<PodStatus> = world
        .pods
        .values()
        .map(|pod| pod_status(world, pod))
        .collect();
    pods.extend(world.unplaced.iter().map(|(key, why)| PodStatus {
        namespace: key.namespace.clone(),
        name: key.name.clone(),
        phase: "Pending".to_owned(),
        mesh: "no".to_owned(),
        reason: Some(why.clone()),
        ..PodStatus::default()
    }));
    pods.sort_by(|one, other| (&one.namespace, &one.name).cmp(&(&other.namespace, &other.name)));
    let nodes = world.nodes.values().map(|node| {
        let count = world
            .pods
            .values()
            .filter(|pod| pod.place.node == node.name)
            .count();
        let addresses = super::address::node(node.number).texts().to_vec();
        (
            node.name.clone(),
            NodeStatus {
                addresses,
                pods: count,
            },
        )
    });
    let services = world
        .services
        .values()
        .filter(|service| !service.addresses.is_empty());
    Status {
        name: mesh.plan.name.clone(),
        folder: mesh.plan.folder.clone(),
        rootless: mesh.plan.rootless,
        supervisor: SupervisorStatus::default(),
        parts: mesh
            .parts
            .iter()
            .map(|(name, part)| (name.clone(), part.state()))
            .collect(),
        nodes: nodes.collect(),
        pods,
        services: services
            .map(|service| {
                (
                    service.key.to_string(),
                    service.addresses.iter().map(ToString::to_string).collect(),
                )
            })
            .collect(),
        problems: world.problems.iter().map(ToString::to_string).collect(),
        objects: Vec::new(),
        objects_error: None,
    }
}

fn pod_status(world: &World, pod: &LivePod) -> PodStatus {
    let state = pod.state();
    let labels = world.objects.namespace_labels(&pod.plan.key.namespace);
    let wanted =
        cni::facts::Policy::default().wanted(&super::observe::facts(pod, &labels, Vec::new()));
    let wanted = wanted == cni::facts::Wanted::In;
    let enrolled = pod
        .enrolment
        .as_ref()
        .map(|(redirection, _)| redirection == "enabled");
    let mesh = match (wanted, enrolled) {
        (true, Some(true)) => "yes",
        (true, _) => "pending",
        (false, Some(_)) => "leaving",
        (false, None) => "no",
    };
    let container_reason = |(name, container): (&String, &ContainerState)| {
        container
            .reason
            .as_ref()
            .map(|reason| format!("{name}: {reason}"))
    };
    let enrolment_reason = pod
        .enrolment
        .as_ref()
        .and_then(|(_, reason)| reason.clone());
    // That a pod waits for the mesh is less than why it does.
    let reason = enrolment_reason
        .or_else(|| state.message.clone())
        .or_else(|| state.containers.iter().find_map(container_reason));
    let phase = if pod.terminating {
        "Terminating"
    } else {
        state.phase.as_str()
    };
    PodStatus {
        namespace: pod.plan.key.namespace.clone(),
        name: pod.plan.key.name.clone(),
        uid: pod.place.uid.clone(),
        node: pod.place.node.clone(),
        ips: pod.place.address.texts().to_vec(),
        phase: phase.to_owned(),
        ready: state.ready && !pod.terminating,
        mesh: mesh.to_owned(),
        restarts: state
            .containers
            .values()
            .map(|container| container.restarts)
            .sum(),
        reason: reason
            .filter(|_| !state.ready || mesh == "pending")
            .filter(|_| state.phase != Phase::Succeeded),
        deployment: pod.plan.deployment.as_ref().map(|key| key.name.clone()),
        containers: pod
            .containers
            .iter()
            .map(|container| container.name.clone())
            .collect(),
    }
}
