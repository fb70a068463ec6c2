//! What the mesh does to the machine: nothing that outlives it, and no need of root.

use std::{
    collections::BTreeSet,
    fs,
    os::unix::process::CommandExt,
    process::{Command, Stdio},
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use rig::{leyline, program, until};

use crate::scene::{SERVICE, Scene, Shop};

/// What of the machine a mesh could leave behind: the host's links, rules of its firewall, named namespaces, mounts.
fn traces() -> Result<BTreeSet<String>> {
    let mut found = BTreeSet::new();
    for (program, arguments) in [
        ("ip", vec!["-o", "link"]),
        ("nft", vec!["list", "tables"]),
        ("ip", vec!["netns", "list"]),
    ] {
        let output = Command::new(program)
            .args(&arguments)
            .output()
            .with_context(|| program.to_owned())?;
        found.extend(
            String::from_utf8_lossy(&output.stdout)
                .lines()
                .map(str::to_owned),
        );
    }
    let mounts = fs::read_to_string("/proc/self/mounts")?;
    found.extend(mounts.lines().map(str::to_owned));
    Ok(found)
}

/// Processes of the mesh called `name`, anywhere on the machine.
fn processes(name: &str) -> Result<Vec<String>> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc")?.flatten() {
        let line = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let line = String::from_utf8_lossy(&line).replace('\0', " ");
        if line.contains("leyline") && line.contains(name) {
            found.push(line);
        }
    }
    Ok(found)
}

#[test]
fn down_leaves_nothing_behind() -> Result<()> {
    let before = traces()?;
    let scene = Scene::start(Shop::InMesh, "")?;
    scene.ping("shop/client", SERVICE)?;
    let name = scene.mesh.name().to_owned();
    scene.mesh.down()?;
    let left: Vec<_> = traces()?
        .difference(&before)
        .filter(|line| line.contains(&name))
        .cloned()
        .collect();
    ensure!(left.is_empty(), "left behind: {left:?}");
    until(Duration::from_secs(5), || {
        let alive = processes(&name)?;
        ensure!(alive.is_empty(), "still running: {alive:?}");
        Ok(())
    })
}

#[test]
fn a_supervisor_that_is_killed_takes_everything_with_it() -> Result<()> {
    let scene = Scene::start(Shop::InMesh, "")?;
    let supervisor = scene.mesh.supervisor()?.0;
    let marker = scene.load.clone();
    let alive = || -> Result<usize> {
        let all = fs::read_dir("/proc")?.flatten();
        let lines = all.map(|entry| fs::read(entry.path().join("cmdline")).unwrap_or_default());
        Ok(lines
            .filter(|line| String::from_utf8_lossy(line).contains(&marker))
            .count())
    };
    ensure!(alive()? > 0, "the server's process is seen from outside");
    Command::new("kill")
        .args(["-9", &supervisor.to_string()])
        .status()?;
    until(Duration::from_secs(5), || {
        ensure!(alive()? == 0, "pods live on");
        Ok(())
    })
}

/// The demo itself is `make demo`; as an ordinary user it must work, too.
#[test]
fn the_demo_runs_as_an_ordinary_user() -> Result<()> {
    let home = tempfile::tempdir()?;
    let own = home.path().join("leyline");
    program::copy(&leyline(), &own)?;
    let nobody = 65_534;
    for path in [home.path(), own.as_path()] {
        std::os::unix::fs::chown(path, Some(nobody), Some(nobody))?;
    }
    let mut command = Command::new(&own);
    command
        .args(["local", "demo"])
        .env("HOME", home.path())
        .env_remove("XDG_RUNTIME_DIR")
        .current_dir("/");
    let output = command
        .uid(nobody)
        .gid(nobody)
        .stdin(Stdio::null())
        .output()?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned()
        + &String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{}:\n{text}", output.status);
    Ok(())
}
