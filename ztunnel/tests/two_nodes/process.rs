//! The program itself: its arguments, and how it ends.

use std::{
    ffi::OsStr,
    io::{BufRead, BufReader},
    net::SocketAddr,
    os::unix::ffi::OsStrExt,
    process::{Child, Command, Stdio},
    sync::mpsc,
};

use net::zds::{AgentConnection, Listener, Request};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use crate::{
    rig::{
        DEADLINE, eventually,
        network::{self, Pod},
        node::{add_request, own_addresses},
        soon,
    },
    telemetry,
};

/// The program with these arguments: its exit code, and what it wrote.
fn program(arguments: &[&str], settings: &[(&str, &str)]) -> (Option<i32>, String, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_ztunnel"));
    command.args(arguments).envs(settings.iter().copied());
    ended(command)
}

fn ended(mut command: Command) -> (Option<i32>, String, String) {
    let output = command.output().expect("it runs");
    let text = |bytes| String::from_utf8(bytes).expect("text");
    (
        output.status.code(),
        text(output.stdout),
        text(output.stderr),
    )
}

#[test]
fn the_program_tells_its_version_its_usage_and_what_it_cannot_use() {
    let (code, told, _) = program(&["version"], &[]);
    assert_eq!(code, Some(0));
    assert!(told.starts_with("leyline ztunnel "), "{told}");
    let (code, usage, _) = program(&["help"], &[]);
    assert_eq!(code, Some(0));
    assert!(
        usage.starts_with("usage: ztunnel [proxy|version|help]"),
        "{usage}"
    );
    let (code, _, error) = program(&["proxies"], &[]);
    assert_eq!(code, Some(1));
    assert!(
        error.contains("unknown command: proxies") && error.ends_with(&usage),
        "{error}"
    );
    // As the chart runs it: what follows is ignored.
    let (code, _, error) = program(&["proxy", "ztunnel"], &[("LOG_FORMAT", "xml")]);
    assert_eq!(code, Some(1));
    assert!(error.contains("LOG_FORMAT"), "{error}");
}

#[test]
fn a_setting_that_is_no_text_is_refused_by_name_and_not_passed_over() {
    let mut command = Command::new(env!("CARGO_BIN_EXE_ztunnel"));
    command.arg("proxy").env("LOG_FORMAT", "xml");
    command.env("TLS12_ENABLED", OsStr::from_bytes(b"fals\xff"));
    let (code, _, error) = ended(command);
    assert_eq!(code, Some(1));
    for name in ["LOG_FORMAT", "TLS12_ENABLED"] {
        assert!(error.contains(name), "{name} is not in {error}");
    }
}

/// The one line of a start that fails, under these settings.
fn line_of_a_failed_start(settings: &[(&str, &str)]) -> String {
    // Somebody has that port already. An address of nobody would not do: transparent sockets may be bound to one.
    let held = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let held = (held.local_addr().expect("bound").to_string(), held);
    let fails = [
        ("XDS_ADDRESS", ""),
        ("CA_ADDRESS", "http://127.0.0.1:1"),
        ("LEYLINE_STATS_ADDRESS", &held.0),
        ("LEYLINE_ADMIN_ADDRESS", "127.0.0.1:0"),
        ("RUST_LOG", "error"),
    ];
    let (code, told, _) = program(&["proxy"], &[&fails, settings].concat());
    assert_eq!(code, Some(1), "{told}");
    told
}

#[test]
fn lines_are_of_the_form_and_level_that_are_asked_for() {
    let told = line_of_a_failed_start(&[]);
    assert_eq!(told.lines().count(), 1, "{told}");
    assert!(
        told.contains("\terror\truntime\tztunnel ends\terror="),
        "{told}"
    );
    let told = line_of_a_failed_start(&[("LOG_FORMAT", "json")]);
    let line: serde_json::Value = serde_json::from_str(&told).expect("one object");
    assert_eq!(
        (&line["level"], &line["message"]),
        (&"error".into(), &"ztunnel ends".into())
    );
    assert_eq!(line_of_a_failed_start(&[("RUST_LOG", "off")]), "");
}

/// A running program, killed when it is dropped.
struct Program {
    child: Child,
    admin: SocketAddr,
    lines: mpsc::Receiver<String>,
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Program {
    /// With one pod, for which it awaits a successor as long as it may: its drain does not end by itself.
    async fn serving(pod: &Pod) -> (Self, AgentConnection) {
        let folder = tempfile::tempdir().expect("a folder");
        let socket = folder.path().join("zds.sock");
        let listener = Listener::bind(&socket).expect("a ZDS socket");
        let [stats, admin, readiness] = own_addresses();
        let mut command = Command::new(env!("CARGO_BIN_EXE_ztunnel"));
        command
            .env("XDS_ADDRESS", "")
            .env("CA_ADDRESS", "http://127.0.0.1:1")
            .env("INPOD_UDS", &socket)
            .env("LEYLINE_STATS_ADDRESS", stats.to_string())
            .env("LEYLINE_ADMIN_ADDRESS", admin.to_string())
            .env("LEYLINE_READINESS_ADDRESS", readiness.to_string())
            .env("LEYLINE_AWAIT_SUCCESSOR", "true")
            .env("CONNECTION_TERMINATION_DEADLINE", "10m")
            .stdout(Stdio::piped());
        let mut child = command.spawn().expect("it runs");
        let lines = followed(&mut child);
        let program = Self {
            child,
            admin,
            lines,
        };
        let incoming = soon(listener.accept()).await.expect("it connects");
        let mut agent = soon(AgentConnection::greet(incoming)).await.expect("Hello");
        for request in [add_request(pod), Request::SnapshotSent] {
            soon(agent.call(&request)).await.expect("acknowledged");
        }
        (program, agent)
    }

    fn signal(&self, signal: Signal) {
        let id = i32::try_from(self.child.id()).expect("a process");
        kill(Pid::from_raw(id), signal).expect("it is there");
    }

    /// Waits for a line that has this in it.
    fn says(&self, text: &str) {
        loop {
            let line = self.lines.recv_timeout(DEADLINE);
            let line = line.unwrap_or_else(|_| panic!("it does not say {text:?}"));
            if line.contains(text) {
                return;
            }
        }
    }

    /// Its exit code, once it has ended.
    async fn ends(&mut self) -> Option<i32> {
        let child = std::sync::Mutex::new(&mut self.child);
        let ended = async || child.lock().unwrap().try_wait().unwrap().is_some();
        eventually("it ends", ended).await;
        self.child.wait().unwrap().code()
    }
}

/// What it logs. Read on a thread of its own, which ends with the program.
fn followed(child: &mut Child) -> mpsc::Receiver<String> {
    let (tell, lines) = mpsc::channel();
    let output = child.stdout.take().expect("piped");
    std::thread::spawn(move || {
        for line in BufReader::new(output).lines().map_while(Result::ok) {
            if tell.send(line).is_err() {
                return;
            }
        }
    });
    lines
}

macro_rules! pod_or_skip {
    () => {
        match network::two_pods() {
            Ok([pod, _]) => pod,
            Err(reason) => {
                println!("skipped: no network namespaces here: {reason}");
                return;
            }
        }
    };
}

#[tokio::test(flavor = "multi_thread")]
async fn the_second_interrupt_ends_a_drain_at_once() {
    let pod = pod_or_skip!();
    let (mut program, _agent) = Program::serving(&pod).await;
    program.signal(Signal::SIGINT);
    program.says("interrupted: draining");
    assert!(program.child.try_wait().unwrap().is_none(), "it drains");
    program.signal(Signal::SIGINT);
    assert_eq!(program.ends().await, Some(0));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_termination_drains_until_the_last_pod_is_gone() {
    let pod = pod_or_skip!();
    let (mut program, mut agent) = Program::serving(&pod).await;
    program.signal(Signal::SIGTERM);
    program.says("told to terminate: draining");
    assert!(program.child.try_wait().unwrap().is_none(), "it drains");
    let leave = Request::Delete {
        uid: crate::rig::node::uid(&pod),
    };
    soon(agent.call(&leave)).await.expect("acknowledged");
    program.says("drained");
    assert_eq!(program.ends().await, Some(0));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_operators_word_drains_as_a_signal_does() {
    let pod = pod_or_skip!();
    let (mut program, mut agent) = Program::serving(&pod).await;
    let answer = telemetry::request(program.admin, "POST", "/quitquitquit").await;
    assert_eq!(answer, "shutdown now\n");
    program.says("told to quit: draining");
    let leave = Request::Delete {
        uid: crate::rig::node::uid(&pod),
    };
    soon(agent.call(&leave)).await.expect("acknowledged");
    assert_eq!(program.ends().await, Some(0));
}
