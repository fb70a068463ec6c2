//! The program as a container runtime starts it: environment and stdin in, stdout and exit code out.

use std::{
    io::{Read, Write},
    os::unix::net::{UnixListener, UnixStream},
    path::Path,
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use serde_json::{Value, json};

const ARGUMENTS: &str = "IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web-0;K8S_POD_INFRA_CONTAINER_ID=c1;K8S_POD_UID=1-2";

struct Run {
    success: bool,
    stdout: String,
}

fn configuration(folder: &Path) -> Value {
    json!({
        "cniVersion": "1.0.0", "name": "k8s-pod-network", "type": "istio-cni",
        "cni_agent_run_dir": folder, "exclude_namespaces": ["kube-system"], "pod_namespace": "istio-system",
        "prevResult": { "cniVersion": "1.0.0", "zulu": 1, "interfaces": [{ "name": "eth0", "sandbox": "/x" }],
            "ips": [{ "address": "10.1.0.5/24", "gateway": "10.1.0.1", "interface": 0 }], "dns": {} },
    })
}

fn plugin(command: &str, arguments: &str, stdin: &str) -> Run {
    let mut child = Command::new(env!("CARGO_BIN_EXE_cni-plugin"))
        .env_clear()
        .env("CNI_COMMAND", command)
        .env("CNI_NETNS", "/var/run/netns/cni-1")
        .env("CNI_ARGS", arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("the plugin starts");
    // One that needs no input may have ended already.
    let _ = child
        .stdin
        .take()
        .expect("a pipe")
        .write_all(stdin.as_bytes());
    let output = child.wait_with_output().expect("the plugin ends");
    Run {
        success: output.status.success(),
        stdout: String::from_utf8(output.stdout).expect("UTF-8"),
    }
}

/// Answers one question; what was asked is the result.
fn agent(folder: &Path, answer: &'static str) -> thread::JoinHandle<String> {
    let listener = UnixListener::bind(folder.join("pluginevent.sock")).expect("a socket");
    thread::spawn(move || {
        let (stream, _) = listener.accept().expect("a question");
        let asked = question(&stream);
        (&stream).write_all(answer.as_bytes()).expect("answered");
        asked
    })
}

fn question(mut stream: &UnixStream) -> String {
    let (mut text, mut buffer) = (String::new(), [0; 4096]);
    loop {
        let read = stream.read(&mut buffer).expect("a question");
        text.push_str(std::str::from_utf8(&buffer[..read]).expect("UTF-8"));
        if let Some((_, body)) = text.split_once("\r\n\r\n")
            && serde_json::from_str::<Value>(body).is_ok()
        {
            return text;
        }
    }
}

#[track_caller]
fn failure(run: &Run) -> (u64, String) {
    assert!(!run.success, "{}", run.stdout);
    let error: Value = serde_json::from_str(&run.stdout).expect("an error is JSON");
    assert!(error["cniVersion"].is_string());
    let message = error["msg"].as_str().expect("a message").to_owned();
    (error["code"].as_u64().expect("a code"), message)
}

#[test]
fn a_pod_that_the_agent_takes_keeps_the_result_it_had() {
    let folder = tempfile::tempdir().expect("a folder");
    let config = configuration(folder.path());
    let agent = agent(
        folder.path(),
        "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n",
    );
    let run = plugin("ADD", ARGUMENTS, &config.to_string());
    assert!(run.success, "{}", run.stdout);
    assert_eq!(run.stdout, config["prevResult"].to_string());
    let asked = agent.join().expect("asked");
    assert!(asked.starts_with("POST /cmdadd HTTP/1.1\r\n"), "{asked}");
    for part in [
        r#""Netns":"/var/run/netns/cni-1""#,
        r#""PodName":"web-0""#,
        r#""PodUID":"1-2""#,
        r#""IP":"10.1.0.5""#,
        r#""Mask":"////AA==""#,
    ] {
        assert!(asked.contains(part), "{part} in {asked}");
    }
}

#[test]
fn a_pod_that_the_agent_refuses_does_not_start() {
    for (answer, code) in [
        (
            "HTTP/1.1 500 Internal Server Error\r\n\r\nno node tunnel is connected",
            11,
        ),
        ("HTTP/1.1 400 Bad Request\r\n\r\nwhat is this", 100),
        ("garbage", 11),
        ("", 11),
    ] {
        let folder = tempfile::tempdir().expect("a folder");
        let agent = agent(folder.path(), answer);
        let run = plugin("ADD", ARGUMENTS, &configuration(folder.path()).to_string());
        let (found, message) = failure(&run);
        assert_eq!(found, code, "{answer}: {message}");
        if let Some((_, why)) = answer.split_once("\r\n\r\n") {
            assert!(message.contains(why), "{message}");
        }
        agent.join().expect("asked");
    }
}

/// The kubelet's rhythm: ADD, and after a failure DEL and ADD anew. Nothing of an attempt may decide the next one.
#[test]
fn each_retry_of_the_kubelet_asks_anew_and_the_last_answer_counts() {
    let folder = tempfile::tempdir().expect("a folder");
    let config = configuration(folder.path());
    let refused = "HTTP/1.1 503 Service Unavailable\r\n\r\nno node tunnel is connected";
    let taken = "HTTP/1.1 200 OK\r\n\r\n";
    let mut questions = Vec::new();
    for (answer, succeeds) in [
        (refused, false),
        (refused, false),
        (taken, true),
        (taken, true),
    ] {
        let agent = agent(folder.path(), answer);
        let run = plugin("ADD", ARGUMENTS, &config.to_string());
        assert_eq!(run.success, succeeds, "{}", run.stdout);
        questions.push(agent.join().expect("asked"));
        std::fs::remove_file(folder.path().join("pluginevent.sock")).expect("remove");
        if succeeds {
            assert_eq!(run.stdout, config["prevResult"].to_string());
        } else {
            assert!(plugin("DEL", ARGUMENTS, &config.to_string()).success);
        }
    }
    let first = questions[0].clone();
    assert!(questions.iter().all(|it| *it == first), "{questions:?}");
}

#[test]
fn without_an_agent_pods_wait_and_the_reason_is_told() {
    let folder = tempfile::tempdir().expect("a folder");
    let began = Instant::now();
    let run = plugin("ADD", ARGUMENTS, &configuration(folder.path()).to_string());
    let (code, message) = failure(&run);
    assert_eq!(code, 11);
    assert!(
        message.contains("failed to contact node agent"),
        "{message}"
    );
    assert!(message.contains("pluginevent.sock"), "{message}");
    // It gives up after 4 s, and well before the runtime would.
    assert!(
        began.elapsed() < Duration::from_secs(20),
        "{:?}",
        began.elapsed()
    );
}

#[test]
fn an_agent_that_is_just_starting_is_waited_for() {
    let folder = tempfile::tempdir().expect("a folder");
    let config = configuration(folder.path()).to_string();
    // The socket of an agent that has ended: nobody answers there.
    drop(UnixListener::bind(folder.path().join("pluginevent.sock")).expect("a socket"));
    let run = thread::spawn(move || plugin("ADD", ARGUMENTS, &config));
    std::fs::remove_file(folder.path().join("pluginevent.sock")).expect("remove");
    let agent = agent(folder.path(), "HTTP/1.1 200 OK\r\n\r\n");
    assert!(run.join().expect("no panic").success);
    agent.join().expect("asked");
}

#[test]
fn who_need_not_be_asked_passes_without_an_agent() {
    let folder = tempfile::tempdir().expect("a folder");
    let pod =
        |namespace: &str, name: &str| format!("K8S_POD_NAMESPACE={namespace};K8S_POD_NAME={name}");
    let config = configuration(folder.path());
    let mut off = config.clone();
    off["ambient_enabled"] = false.into();
    for (config, arguments) in [
        (&config, pod("istio-system", "istio-cni-node-x7k2p")),
        (&config, pod("kube-system", "coredns-1")),
        (&config, String::new()),
        (&off, pod("shop", "web-0")),
    ] {
        // Whoever asked would fail: nobody is there.
        let run = plugin("ADD", &arguments, &config.to_string());
        assert!(run.success, "{arguments}: {}", run.stdout);
        let result: Value = serde_json::from_str(&run.stdout).expect("JSON");
        assert_eq!(result, config["prevResult"]);
    }
}

#[test]
fn the_agents_prefix_counts_in_its_own_namespace_alone() {
    let folder = tempfile::tempdir().expect("a folder");
    let agent = agent(folder.path(), "HTTP/1.1 500 No\r\n\r\n");
    let arguments = "K8S_POD_NAMESPACE=shop;K8S_POD_NAME=istio-cni-node-x7k2p";
    let run = plugin("ADD", arguments, &configuration(folder.path()).to_string());
    assert!(!run.success);
    agent.join().expect("asked");
}

#[test]
fn other_commands_succeed_and_say_nothing() {
    let folder = tempfile::tempdir().expect("a folder");
    let config = configuration(folder.path()).to_string();
    for command in ["DEL", "CHECK", "GC", "STATUS"] {
        let run = plugin(command, ARGUMENTS, &config);
        assert!(
            run.success && run.stdout.is_empty(),
            "{command}: {}",
            run.stdout
        );
    }
    let run = plugin("VERSION", "", r#"{"cniVersion":"1.1.0"}"#);
    let answer: Value = serde_json::from_str(&run.stdout).expect("JSON");
    assert_eq!(answer["cniVersion"], "1.1.0");
    let supported = answer["supportedVersions"].as_array().expect("a list");
    assert!(supported.contains(&"0.3.1".into()) && supported.contains(&"1.1.0".into()));
}

#[test]
fn bad_input_is_an_error_with_its_code() {
    let folder = tempfile::tempdir().expect("a folder");
    let mut mask = configuration(folder.path());
    mask["prevResult"]["ips"][0]["address"] = "10.1.0.5".into();
    for (command, stdin, code) in [
        ("ADD", "", 6),
        ("ADD", "{", 6),
        ("ADD", "[]", 7),
        ("ADD", r#"{"exclude_namespaces":"kube-system"}"#, 7),
        ("ADD", mask.to_string().as_str(), 7),
        ("UPDATE", "{}", 4),
        ("", "{}", 4),
    ] {
        let (found, message) = failure(&plugin(command, ARGUMENTS, stdin));
        assert_eq!(found, code, "{command} {stdin}: {message}");
    }
}
