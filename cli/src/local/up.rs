//! `leyline local up`: starts the supervisor in namespaces of its own, tells how it goes and, in the foreground, stays
//! until it ends.

use std::{
    collections::BTreeMap,
    ffi::CString,
    fs::File,
    io::{BufRead, BufReader, Write},
    os::fd::{AsRawFd, OwnedFd},
    path::PathBuf,
    process::ExitCode,
};

use anyhow::{Context, Result, bail};
use nix::{
    sys::{
        signal::{SigSet, Signal, kill},
        wait::{WaitPidFlag, WaitStatus, waitpid},
    },
    unistd::Pid,
};

use super::{
    runtime::Runtime,
    sandbox::{self, Start},
    supervisor::{self, News, Plan},
    vip,
};
use crate::{args::Up, screen};

/// Runs the command.
pub(crate) fn run(options: &Up) -> Result<ExitCode> {
    let runtime = Runtime::named(&options.mesh.name)?;
    check_tools()?;
    let tunnels = tunnels(options)?;
    let lock = runtime.claim()?;
    // The lock must live as long as the mesh: the supervisor inherits it.
    sandbox::keep_across_exec(&*lock)?;
    let folder = match &options.folder {
        Some(folder) => folder
            .canonicalize()
            .with_context(|| format!("open the folder {}", folder.display()))?,
        None => empty_folder(&runtime)?,
    };
    let mesh_config = options.mesh_config.as_ref().map(|file| {
        file.canonicalize()
            .with_context(|| format!("open the mesh's configuration {}", file.display()))
    });
    let (reading, writing) = nix::unistd::pipe().context("make a pipe")?;
    let plan = Plan {
        name: options.mesh.name.clone(),
        root: runtime.root().to_owned(),
        folder,
        mesh_config: mesh_config.transpose()?,
        nodes: options.nodes,
        tunnels,
        rootless: sandbox::needs_user_namespace(),
        report: writing.as_raw_fd(),
        lock: lock.as_raw_fd(),
    };
    let child = start(&plan, &runtime, writing, !options.detach)?;
    let code = attend(&plan, child, reading, options);
    if !options.detach || !matches!(code, Ok(code) if code == ExitCode::SUCCESS) {
        runtime.remove();
    }
    code
}

fn check_tools() -> Result<()> {
    if !vip::nft_program().is_absolute() {
        bail!("nft is missing: install the package nftables");
    }
    Ok(())
}

fn tunnels(options: &Up) -> Result<BTreeMap<String, PathBuf>> {
    let parse = |text: &String| {
        let (node, path) = text
            .split_once('=')
            .with_context(|| format!("{text:?} is not of the form NODE=PATH"))?;
        let known = (1..=options.nodes).any(|number| super::world::name(number) == node);
        if !known {
            bail!("there will be no {node}: --nodes is {}", options.nodes);
        }
        let path = PathBuf::from(path)
            .canonicalize()
            .with_context(|| format!("find the tunnel {path}"))?;
        Ok((node.to_owned(), path))
    };
    options.tunnels.iter().map(parse).collect()
}

fn empty_folder(runtime: &Runtime) -> Result<PathBuf> {
    let folder = runtime.root().join("objects");
    super::runtime::private_folder(&folder).context("make an empty folder")?;
    Ok(folder)
}

fn start(plan: &Plan, runtime: &Runtime, report: OwnedFd, die_with_parent: bool) -> Result<Pid> {
    let log = runtime.part_log("supervisor");
    let log = File::options()
        .create(true)
        .append(true)
        .open(&log)
        .with_context(|| format!("open {}", log.display()))?;
    let arguments = ["leyline", supervisor::ROLE, &plan.name].map(CString::new);
    let arguments = arguments.into_iter().collect::<Result<Vec<_>, _>>()?;
    let plan = serde_json::to_string(plan)?;
    let environment = std::env::vars_os()
        .filter_map(|(name, value)| Some(format!("{}={}", name.to_str()?, value.to_str()?)));
    let environment = environment
        .chain([format!("{}={plan}", supervisor::VARIABLE)])
        .filter_map(|pair| CString::new(pair).ok());
    let start = Start {
        arguments,
        environment: environment.collect(),
        die_with_parent,
        report,
        output: log.into(),
    };
    Ok(sandbox::spawn(&start)?)
}

/// Tells how it goes. Returns when the mesh runs (detached), or has ended.
fn attend(plan: &Plan, child: Pid, reading: OwnedFd, options: &Up) -> Result<ExitCode> {
    let Up {
        detach,
        until_input_ends,
        ..
    } = *options;
    let screen = screen::output();
    let signals: SigSet = [
        Signal::SIGINT,
        Signal::SIGTERM,
        Signal::SIGHUP,
        Signal::SIGCHLD,
    ]
    .into_iter()
    .collect();
    signals.thread_block().context("block signals")?;
    let watcher = std::thread::spawn(move || forward(child, &signals));
    if until_input_ends {
        std::thread::spawn(move || {
            let _ = std::io::copy(&mut std::io::stdin(), &mut std::io::sink());
            let _ = kill(child, Signal::SIGTERM);
        });
    }
    let mut failed = false;
    for line in BufReader::new(File::from(reading)).lines() {
        let line = line.context("read from the supervisor")?;
        match serde_json::from_str::<News>(&line) {
            Ok(News::Step(step)) => say(&format!("{} {step}", screen.good("ok"))),
            Ok(News::Note(note)) => say(&format!("{} {note}", screen.waiting("note"))),
            Ok(News::Ready) => {
                summary(plan, detach);
                if detach {
                    return Ok(ExitCode::SUCCESS);
                }
            }
            Ok(News::Failed(why)) => {
                failed = true;
                eprintln!("{} {why}", screen::errors().bad("error:"));
            }
            Err(_) => {
                failed = true;
                eprintln!("{}", line.trim_end());
            }
        }
    }
    let code = watcher.join().unwrap_or(1);
    if !failed && code == 0 {
        say("the mesh is down");
    } else if !failed {
        let log = super::logs::tail(
            &Runtime::at(plan.root.clone()).part_log("supervisor"),
            Some(20),
        )
        .unwrap_or_default();
        eprintln!(
            "{} the mesh ended unexpectedly ({code})\n{log}",
            screen::errors().bad("error:")
        );
    }
    Ok(if code == 0 && !failed {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

fn say(text: &str) {
    // Nobody listens any more: the mesh goes on all the same.
    let _ = writeln!(std::io::stdout(), "{text}");
}

/// Passes signals on to the supervisor until it has ended: its exit code. The second Ctrl-C does not ask.
fn forward(child: Pid, signals: &SigSet) -> i32 {
    let mut asked = 0;
    loop {
        match signals.wait() {
            Ok(Signal::SIGCHLD) => match waitpid(child, Some(WaitPidFlag::WNOHANG)) {
                Ok(WaitStatus::Exited(_, code)) => return code,
                Ok(WaitStatus::Signaled(_, signal, _)) => return 128 + signal as i32,
                Ok(_) | Err(nix::errno::Errno::EINTR) => {}
                Err(_) => return 1,
            },
            Ok(_) => {
                asked += 1;
                let _ = kill(
                    child,
                    if asked > 1 {
                        Signal::SIGKILL
                    } else {
                        Signal::SIGTERM
                    },
                );
            }
            Err(_) => return 1,
        }
    }
}

fn summary(plan: &Plan, detach: bool) {
    let screen = screen::output();
    let name = if plan.name == "default" {
        String::new()
    } else {
        format!(" --name {}", plan.name)
    };
    let mut lines = vec![format!(
        "\n{} {} node{} on this machine, following {}",
        screen.good("The mesh is up:"),
        plan.nodes,
        if plan.nodes == 1 { "" } else { "s" },
        plan.folder.display()
    )];
    let row = |command: &str, what: &str| {
        let (verb, rest) = command.split_once(' ').unwrap_or((command, ""));
        let line = format!("  leyline local {verb}{name} {rest}");
        vec![line.trim_end().to_owned(), screen.quiet(what)]
    };
    let rows = [
        row("status", "what runs, what is in force"),
        row(
            "label NAMESPACE istio.io/dataplane-mode=ambient",
            "bring a namespace into the mesh",
        ),
        row(
            "exec NAMESPACE/POD -- COMMAND",
            "run something in a pod, or on a node",
        ),
        row(
            "forward NAMESPACE/SERVICE 8080:80",
            "reach a service from this machine",
        ),
        row("logs ztunnel-node1 -f", "watch connections"),
        row("down", "stop; nothing is left"),
    ];
    lines.push(screen::table(&rows).trim_end().to_owned());
    if plan.rootless {
        lines
            .push(screen.quiet("  (in a user namespace: pods reach each other, not the internet)"));
    }
    if !detach {
        lines.push(screen.quiet("Ctrl-C stops it."));
    }
    say(&lines.join("\n"));
}
