//! The root of the mesh replaced in three steps under load, with upstream's tunnel on the client's node and ours on the
//! other, both of which have clients and servers. Leaves are renewed all the while, at each end in its own time, so that one
//! has only what the new root signed while the other still shows what the old one did. Ours to ours: `net::ca::rotation`,
//! on a virtual clock.

use std::{collections::BTreeMap, fs, os::unix::fs::PermissionsExt, path::Path};

use anyhow::{Context, Result, ensure};
use controlplane::ca::disk::{CA_FILE, ROOT_FILE, load_or_create};
use mesh::identity::TrustDomain;
use rig::{
    NODES, Options, Running,
    yaml::{idle_pod, pod, service},
};
use serde_json::Value;

use crate::{
    interop,
    scene::{SERVICE, Scene, Shop},
};

/// Two minutes of it have passed when it is signed; upstream renews at half of the whole, five seconds later.
const LIFE: &str = "export SECRET_TTL=130s";

/// The other way: from a pod of the second node to one of the first.
const BACK: &str = "back.shop.svc.cluster.local:9000";

/// A signing key, and the roots: what the control plane reads at its start.
struct Root {
    signer: String,
    certificate: String,
}

impl Root {
    fn read(folder: &Path) -> Result<Self> {
        Ok(Self {
            signer: fs::read_to_string(folder.join(CA_FILE))?,
            certificate: fs::read_to_string(folder.join(ROOT_FILE))?,
        })
    }

    fn new() -> Result<Self> {
        let folder = tempfile::tempdir()?;
        load_or_create(folder.path(), &TrustDomain::default())?;
        Self::read(folder.path())
    }
}

/// The serial number of each identity's certificate and how many roots came with it, at both tunnels.
fn certificates(scene: &Scene) -> Result<BTreeMap<String, (String, usize)>> {
    let mut all = BTreeMap::new();
    for node in NODES {
        let dump = scene
            .mesh
            .admin(&format!("ztunnel-{node}"), "/config_dump")?;
        let dump: Value = serde_json::from_str(&dump)?;
        for one in dump["certificates"].as_array().context("certificates")? {
            let name = format!("{node} {}", one["identity"]);
            ensure!(one["state"] == "Available", "{name}: {}", one["state"]);
            let serial = one["certChain"][0]["serialNumber"].to_string();
            let roots = one["rootCerts"].as_array().context("roots")?.len();
            all.insert(name, (serial, roots));
        }
    }
    Ok(all)
}

/// Starts the control plane with `content`, and waits until every certificate is a new one that came with so many roots.
fn step(scene: &Scene, content: &str, roots: usize) -> Result<()> {
    let before = certificates(scene)?;
    scene.mesh.stop("controlplane")?;
    let path = scene.mesh.supervisor()?.runtime()?.join("ca").join(CA_FILE);
    fs::write(&path, content)?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600))?;
    scene.mesh.resume("controlplane")?;
    scene
        .mesh
        .eventually(&format!("all have {roots} roots"), || {
            let now = certificates(scene)?;
            let renewed = |(name, (serial, count)): (&String, &(String, usize))| {
                *count == roots && before.get(name).is_some_and(|(old, _)| old != serial)
            };
            ensure!(now.iter().all(renewed), "{before:?}, then {now:?}");
            Ok(())
        });
    Ok(())
}

/// What is held and what is made, from a pod to a service.
fn load(scene: &Scene, pod: &str, to: &str) -> Result<[Running; 2]> {
    let spawn = |words: &[&str]| {
        scene
            .mesh
            .spawn(pod, &[&[scene.load.as_str()], words].concat())
    };
    let mut held = spawn(&["live", to, "--connections", "10"])?;
    held.json()?;
    let rate = ["--seconds", "0", "--parallel", "2", "--rate", "20"];
    Ok([held, spawn(&[&["connect", to][..], &rate].concat())?])
}

#[test]
fn a_root_is_replaced_under_load_between_our_tunnel_and_the_peers() -> Result<()> {
    let Some(peer) = interop::peer()? else {
        return Ok(());
    };
    let (_folder, options) = Options::prepared(LIFE, &[("node1", Some(peer)), ("node2", None)])?;
    let scene = Scene::start_with(Shop::InMesh, &idle_pod("shop", "there", "node2"), &options)?;
    let serve = format!("[{}, serve, '[::]:9001']", scene.load);
    let back = [
        pod("shop", "back", "node1", &serve),
        service("shop", "back"),
    ]
    .concat();
    scene.mesh.write("back.yaml", &back)?;
    scene
        .mesh
        .eventually("the way back is there", || scene.ping("shop/there", BACK));

    let (old, new) = (
        Root::read(&scene.mesh.supervisor()?.runtime()?.join("ca"))?,
        Root::new()?,
    );
    let ways = [
        load(&scene, "shop/client", SERVICE)?,
        load(&scene, "shop/there", BACK)?,
    ];
    step(&scene, &format!("{}{}", old.signer, new.certificate), 2)?;
    step(&scene, &format!("{}{}", new.signer, old.certificate), 2)?;
    step(&scene, &new.signer, 1)?;
    for [held, made] in ways {
        let made: Value = serde_json::from_str(&made.finish()?)?;
        ensure!(made["failed"] == 0 && made["connections"] != 0, "{made}");
        let held: Value = serde_json::from_str(&held.finish()?)?;
        ensure!(held["cut"] == 0, "{held}");
    }
    scene.ping("shop/client", SERVICE)?;
    scene.ping("shop/there", BACK)?;
    Ok(())
}
